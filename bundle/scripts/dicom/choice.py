"""Selection of the CT and the PET of an examination to predict from, with reasons against the other series.

Example: ``print(choose_pet_ct(find_series(folder)).describe())``
"""

from __future__ import annotations

import math
import re
from collections.abc import Container, Sequence
from dataclasses import dataclass, field

import numpy as np

from scripts.cohorts.scans import counted
from scripts.dicom.series import CT_STORAGE, PET_STORAGE, Series, people_differ
from scripts.dicom.suv import READABLE_UNITS
from scripts.dicom.tags import DicomError, tag_name

MULTIFRAME_STORAGE = (f"{CT_STORAGE}.1", f"{CT_STORAGE}.2", f"{PET_STORAGE}.1", "1.2.840.10008.5.1.4.1.1.130")
# ImageType values of images that are not slices of the body.
PICTURE_TYPES = {"LOCALIZER", "MIP", "MINIP", "PROJECTION IMAGE", "REPROJECTION", "SCREEN SAVE", "SCREENSHOT", "VRT"}

MIN_SLICES = 8  # fewer are a scout, a test or a biopsy control
AXIAL_COSINE = math.cos(math.radians(30))  # slice normal to body axis
SAME_SCAN_MIN = 10  # PETs that start within this time may be reconstructions of one scan
ONE_DAY = 1  # maximum difference of CT and PET of one examination, which may pass midnight
FURTHER_MM = 50.0  # of the body, in another PET of the scan: beds stored as series
MOST_FOUND = 3  # series that a message lists
OVERLAP_STEP_MM = 50.0  # smaller differences in overlap do not decide between two CTs


@dataclass(frozen=True, eq=False)
class Choice:
    """The CT and the PET to predict from, and every other series with the reason why it is not used."""

    ct: Series
    pet: Series
    rejected: list[tuple[Series, str]]

    @property
    def doubts(self) -> tuple[str, ...]:
        """Doubts about the pair, as texts."""
        found, apart = [], days_apart(self.ct, self.pet)
        if apart > ONE_DAY:
            found.append(f"CT and PET are {apart} days apart by their dates: are they of one examination?")
        for other in (series for series, _ in self.rejected if series.modality == "PT" and self._could_be(series)):
            later = other.start - self.pet.start if other.start and self.pet.start else 0
            further = _further_mm(self.pet, other)
            if abs(later) <= SAME_SCAN_MIN and further > FURTHER_MM:
                found.append(
                    f"another PET of this examination (series {other.number}) shows {further:.0f} mm of the body "
                    f"beyond series {self.pet.number}: is one scan stored as several series? Export it as one"
                )
            elif abs(later) > SAME_SCAN_MIN:
                days = days_apart(self.pet, other)
                apart_by = f"{days} days" if days > ONE_DAY else f"{abs(later)} min"
                found.append(
                    f"another PET of this examination (series {other.number}) was scanned {apart_by} "
                    f"{'later' if later > 0 else 'earlier'}: is series {self.pet.number} the one to predict from?"
                )
        for name, series in (("CT", self.ct), ("PET", self.pet)):
            if series.lossy:
                found.append(
                    f"the {name} was compressed with loss by {tag_name('LossyImageCompression')}: its values are not "
                    "those that were measured"
                )
        return tuple(found)

    def _could_be(self, pet: Series) -> bool:
        """Whether another PET could be predicted from with this CT."""
        return not _unfit(pet) and not _mismatch(self.ct, pet) and days_apart(self.ct, pet) <= ONE_DAY

    def describe(self) -> str:
        """The choice and the other series, one per line, without anything that identifies a patient."""
        return "\n".join([f"CT:  {self.ct.label}", f"PET: {self.pet.label}", *_reasons(self.rejected)])


@dataclass(frozen=True, eq=False)
class Study:
    """The series of one patient that belong to one examination.

    Args:
        patient_id: the patient's id in the files (not in ``repr``).
        study_uid: StudyInstanceUID of its first series (not in ``repr``).
        series: all series of the examination.
    """

    patient_id: str = field(repr=False)
    study_uid: str = field(repr=False)
    series: list[Series]

    @property
    def is_pet_ct(self) -> bool:
        """Whether there is at least one CT and one PET series."""
        return {"CT", "PT"} <= {s.modality for s in self.series}

    @property
    def date(self) -> str:
        """Earliest StudyDate, YYYYMMDD; "" where none is stated."""
        return min((s.study_date for s in self.series if s.study_date), default="")


def choose_pet_ct(series: Sequence[Series]) -> Choice:
    """Select the CT and the PET to predict from.

    Not considered: modalities other than CT and PT, multi-frame and secondary-capture objects, localizers, projections
    and screen captures, dynamic or gated PET, PET in other units than BQML, CNTS or GML, PET that says it is not
    attenuation corrected or of another tracer than FDG, fewer than 8 slices, slices that are not axial (within 30
    degrees), and stacks that :func:`scripts.dicom.series.read_series` would refuse (missing slices, tilted gantry) or
    that a damaged file may belong to.

    Of the PETs left, the first in this order that has a CT: known to be attenuation corrected, more certainly of FDG
    (:class:`scripts.dicom.tracer.Tracer`), of the day of a CT, original rather than derived, more slices, finer pixels,
    scanned first, lower series number. Of the CTs in its frame of reference that overlap it: of its day, longer overlap
    along the body (in steps of 50 mm), soft-tissue kernel rather than lung or bone, original rather than derived, more
    slices, finer pixels, lower series number.

    Raises:
        DicomError: when there is no such pair, with the reason for each series; or when there are scans of several
            patients or several PET/CT examinations.
    """
    candidates, rejected = _one_examination(series)
    fit: dict[str, list[Series]] = {"CT": [], "PT": []}
    for each in candidates:
        reason = _unfit(each)
        if reason:
            rejected.append((each, reason))
        else:
            fit[each.modality].append(each)
    for modality, name in (("CT", "CT"), ("PT", "attenuation-corrected PET")):
        if not fit[modality]:
            raise DicomError("\n".join([f"no usable {name} among {len(series)} series", *_reasons(rejected)]))
    pets = sorted(fit["PT"], key=lambda s: (_values(_pet_rank(s, fit["CT"])), s.uid, s.part))
    pet = next((p for p in pets if any(not _mismatch(c, p) for c in fit["CT"])), None)
    if pet is None:
        rejected += [(c, _mismatch(c, pets[0])) for c in fit["CT"]]
        what = "no CT belongs to the PET: send the CT of the same examination, which has the PET's frame of reference"
        raise DicomError("\n".join([what, f"PET: {pets[0].label}", *_reasons(rejected)]))
    partners = [c for c in fit["CT"] if not _mismatch(c, pet)]
    ct = min(partners, key=lambda s: (_values(_ct_rank(s, pet)), s.uid, s.part))
    rejected += [(p, _why_not(p, pet, fit["CT"], ct)) for p in pets if p is not pet]
    for other in (c for c in fit["CT"] if c is not ct):
        mismatch = _mismatch(other, pet)
        rejected.append((other, mismatch or _lost(_ct_rank(other, pet), _ct_rank(ct, pet))))
    return Choice(ct, pet, sorted(rejected, key=lambda r: (r[0].number, r[0].uid, r[0].part)))


def studies_of(series: Sequence[Series]) -> list[Study]:
    """The examinations among series that may be of several patients, in the order of patient id and study UID.

    Series of one PatientID belong together when they share the StudyInstanceUID or the frame of reference (some sites
    file the CT and the PET of one examination as two studies). A study with PET/CTs of several days is divided by day.
    """
    groups: list[tuple[set[tuple[str, str]], list[Series]]] = []
    for each in series:
        links = {(each.patient_id, uid) for uid in (each.study_uid, each.frame_of_reference) if uid}
        members = [each]
        for group in [g for g in groups if g[0] & links]:
            groups.remove(group)
            links, members = links | group[0], group[1] + members
        groups.append((links, members))
    studies = [Study(m[0].patient_id, m[0].study_uid, m) for _, members in groups for m in _by_day(members)]
    return sorted(studies, key=lambda s: (s.patient_id, s.study_uid))


def _by_day(series: Sequence[Series]) -> list[list[Series]]:
    """The series of one study, divided if there are a CT and a PET of one day and a CT and a PET of another.

    Series of neither day are added to the first.
    """
    scans = [s for s in series if s.day is not None and s.sop_class in (CT_STORAGE, PET_STORAGE)]
    days: list[list[int]] = []
    for day in sorted({s.day for s in scans if s.day is not None and len(s) >= MIN_SLICES}):
        if days and day - days[-1][-1] <= ONE_DAY:
            days[-1].append(day)
        else:
            days.append([day])
    pairs = [group for group in days if {"CT", "PT"} <= {s.modality for s in scans if s.day in group}]
    if len(pairs) < 2:
        return [list(series)]
    later = [[s for s in scans if s.day in group] for group in pairs[1:]]
    return [[s for s in series if not any(s is other for group in later for other in group)], *later]


def missing_scans(series: Sequence[Series], elsewhere: Container[str] = ()) -> str:
    """Why the series of one patient are no PET/CT examination, what was found, and what to send.

    ``elsewhere``: modalities (CT, PT) of other patients in the same place that lack the other scan.
    """
    names = {"CT": "CT", "PT": "PET"}
    held = sorted({each.modality or "unknown" for each in series})
    absent = {code: name for code, name in names.items() if code not in held}
    found = [each.label for each in series if each.modality in names]
    parts = [f"no {' and no '.join(absent.values())} among its DICOM series ({', '.join(held)})"]
    if not absent:
        parts = [
            f"CT and PET are of different examinations among its DICOM series ({', '.join(held)}): they share neither "
            "the study (0020,000D) nor the frame of reference (0020,0052)"
        ]
    if found:
        more = len(found) - MOST_FOUND
        parts.append(f"found: {' | '.join(found[:MOST_FOUND])}" + (f" and {more} more" if more > 0 else ""))
    if len(absent) == 1:
        [(code, name)] = absent.items()
        corrected = "attenuation-corrected " if code == "PT" else ""
        parts.append(f"send it with the {corrected}{name} of the same examination")
        if code in elsewhere:
            parts.append(
                f"a {name} of another Patient ID (0010,0020) is here: if both are of one person, correct the Patient ID"
            )
    else:
        parts.append("send the CT and the attenuation-corrected PET of one examination")
    return "; ".join(parts)


def days_apart(one: Series, other: Series) -> int:
    """Days between two series; 0 where one does not state its day."""
    return 0 if one.day is None or other.day is None else abs(one.day - other.day)


def _one_examination(series: Sequence[Series]) -> tuple[list[Series], list[tuple[Series, str]]]:
    """The series to choose from, and those of other examinations."""
    patients = {s.patient_id for s in series if s.modality in ("CT", "PT")}
    if len(patients) > 1:
        raise DicomError(f"scans of {len(patients)} patients: give one patient at a time")
    pairs = [study for study in studies_of(series) if study.is_pet_ct]
    if len(pairs) > 1:
        raise DicomError(f"{len(pairs)} PET/CT examinations of one patient: give one of them")
    for members in [study.series for study in pairs] or [list(series)]:
        apart = people_differ(person for each in members if each.modality in ("CT", "PT") for person in each.people)
        if apart:
            raise DicomError(f"CT and PET differ in {apart}: of two patients with one Patient ID? Give each an id")
    if not pairs:  # the checks of each series and each pair give the reason
        return list(series), []
    chosen = {id(s) for s in pairs[0].series}
    others = [(s, "of another examination than the PET/CT") for s in series if id(s) not in chosen]
    return pairs[0].series, others


def _unfit(series: Series) -> str:
    """Why a series cannot be used, "" if it can."""
    if series.modality not in ("CT", "PT"):
        return f"modality {series.modality or 'unknown'}"
    if series.sop_class in MULTIFRAME_STORAGE:
        return "multi-frame images; convert them to one file per slice"
    if series.sop_class != (CT_STORAGE if series.modality == "CT" else PET_STORAGE):
        return "not stored as CT or PET images (a screen capture or a derived object)"
    picture = PICTURE_TYPES & {*series.image_type, *series.series_type}
    if picture:
        return f"not slices of the body ({sorted(picture)[0].lower()})"
    if series.modality == "PT" and _unfit_pet(series):
        return _unfit_pet(series)
    if series.differing:
        return (
            f"its images differ in {series.differing}: of several scans or patients under one Series Instance UID "
            "(0020,000E); sort them into folders, or export them again"
        )
    if series.damaged:
        return f"a damaged file may be a slice of it: {series.damaged}"
    if len(series) < MIN_SLICES:
        return f"only {counted(len(series), 'slice')}"
    if series.normal is None or series.positions is None or series.pixel_spacing is None:
        return "no position in space in its headers"
    if not series.rows or not series.columns:
        return "no size in its headers (Rows, Columns)"
    if abs(series.normal[2]) < AXIAL_COSINE:
        return "slices are not axial"
    try:
        _ = series.grid
    except DicomError as error:
        return str(error).removeprefix(f"{series.label}: ")
    return ""


def _unfit_pet(series: Series) -> str:
    moving = {"DYNAMIC", "GATED"} & set(series.series_type[:1])
    if moving:
        return f"{moving.pop().lower()} PET: several images at each position"
    if series.attenuation_corrected is False:
        return "not attenuation corrected"
    if series.units not in READABLE_UNITS:
        return f"in units {series.units or 'not stated'}, from which SUV cannot be computed"
    return series.tracer.problem


def _pet_rank(pet: Series, cts: Sequence[Series]) -> list[tuple[str, float]]:
    """Criteria in order: the reason against a PET that is worse by it, and a value, lower for the better one."""
    return [
        ("attenuation correction not stated", not pet.attenuation_corrected),
        ("less certainly of FDG by its header", pet.tracer.order),
        ("of another day than the CTs", min(days_apart(ct, pet) for ct in cts) > ONE_DAY),
        ("derived; an original was preferred", not pet.original),
        *_common_rank(pet),
    ]


def _ct_rank(ct: Series, pet: Series) -> list[tuple[str, float]]:
    return [
        ("of another day than the PET", days_apart(ct, pet) > ONE_DAY),
        ("less overlap with the PET along the body", -round(_overlap_mm(ct, pet)[2] / OVERLAP_STEP_MM)),
        ("lung or bone kernel; soft tissue was preferred", is_sharp_kernel(ct.kernel)),
        ("derived; an original was preferred", not ct.original),
        *_common_rank(ct),
    ]


def _common_rank(series: Series) -> list[tuple[str, float]]:
    pixel = float(series.pixel_spacing.max()) if series.pixel_spacing is not None else math.inf
    return [
        ("fewer slices", -len(series)),
        ("coarser pixels", round(pixel, 2)),
        ("scanned later or at an unknown time; the first was preferred", _when(series)),
        ("equal; the lower series number was preferred", series.number),
    ]


def _when(series: Series) -> float:
    """Start of a PET in steps of :data:`SAME_SCAN_MIN`, the last where it is not stated; CTs do not differ by it."""
    if series.modality != "PT":
        return 0.0
    return math.inf if series.start is None else series.start // SAME_SCAN_MIN


def is_sharp_kernel(kernel: str) -> bool:
    """Whether a CT reconstruction kernel is for lung or bone rather than for soft tissue.

    By the names of GE and Philips, the numbers of Siemens (50 and above) and Canon (FC30 and above).

    Example:
        >>> [is_sharp_kernel(k) for k in ("STANDARD", "B31f", "Br38d 3", "FC18", "")]
        [False, False, False, False, False]
        >>> [is_sharp_kernel(k) for k in ("LUNG", "B70f", "Bl57d 2", "FC51", "BONEPLUS", "YC")]
        [True, True, True, True, True, True]
    """
    name = kernel.strip().upper()
    if re.match(r"(LUNG|BONE|EDGE|ULTRA|SHARP)", name) or name in ("L", "C", "D", "E", "YC", "YD", "YE"):
        return True
    canon, siemens = re.match(r"FC(\d+)", name), re.match(r"[A-Z]{1,2}(\d\d)", name)
    if canon:
        return int(canon[1]) >= 30
    return siemens is not None and int(siemens[1]) >= 50


def _overlap_mm(one: Series, other: Series) -> np.ndarray:
    """(3,) overlap in mm along x, y, z of the bounds of two fields of view; negative where they are apart."""
    a, b = one.grid.bounds, other.grid.bounds
    return np.minimum(a[1], b[1]) - np.maximum(a[0], b[0])


def _further_mm(pet: Series, other: Series) -> float:
    """How far another PET reaches beyond one along the body, above or below."""
    (_, _, low), (_, _, high) = pet.grid.bounds
    (_, _, other_low), (_, _, other_high) = other.grid.bounds
    return float(max(low - other_low, other_high - high))


def _mismatch(ct: Series, pet: Series) -> str:
    """Why a CT does not match a PET, "" if it does."""
    if not ct.frame_of_reference or ct.frame_of_reference != pet.frame_of_reference:
        return "another frame of reference than the PET's, or none stated"
    return "" if _overlap_mm(ct, pet).min() > 0 else "shows another part of the body than the PET"


def _why_not(pet: Series, chosen: Series, cts: Sequence[Series], ct: Series) -> str:
    if _values(_pet_rank(pet, cts)) < _values(_pet_rank(chosen, cts)):
        mismatch = _mismatch(ct, pet)
        return "no CT in its frame of reference" if "frame" in mismatch else "no CT of the same part of the body"
    return _lost(_pet_rank(pet, cts), _pet_rank(chosen, cts))


def _values(rank: Sequence[tuple[str, float]]) -> tuple[float, ...]:
    return tuple(value for _, value in rank)


def _lost(loser: Sequence[tuple[str, float]], winner: Sequence[tuple[str, float]]) -> str:
    """The first criterion in which two series differ."""
    decisive = (text for (text, value), (_, best) in zip(loser, winner, strict=True) if value != best)
    return next(decisive, "equal in all criteria; the first was used")


def _reasons(rejected: Sequence[tuple[Series, str]]) -> list[str]:
    return [f"rejected: {series.label}: {reason}" for series, reason in rejected]
