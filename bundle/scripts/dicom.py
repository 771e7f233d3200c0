"""DICOM in and out: the CT and PET of a study as volumes, the tumour as a SEG, the prediction as a structured report.

In: :func:`find_series` (or :func:`find_studies`) reads the headers of whatever lies in a folder, :func:`choose_pet_ct`
picks the pair, :func:`read_series` gives a volume in HU or in the PET's own units, and :func:`suv_factor` what to
multiply the latter by. Out: :func:`write_seg` and :func:`write_sr`.

    choice = choose_pet_ct(find_series(folder))
    print(choice.describe())
    ct, ct_affine = read_series(choice.ct)
    pet, pet_affine = read_series(choice.pet)
    pet *= suv_factor(read_headers(choice.pet))

pydicom (reading) and highdicom (writing) are imported when one of these functions is called: training and NIfTI need
neither. Nothing that this module prints, raises or shows by ``repr`` holds a name, an identifier or a date; the SEG
and the report carry the patient's and the study's tags, as they must.
"""

from __future__ import annotations

import logging
import math
import re
import struct
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta, timezone
from functools import cached_property
from importlib import import_module
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .files import written_whole
from .geometry import Grid
from .images import LPS_TO_RAS
from .keys import RESEARCH_USE_ONLY

if TYPE_CHECKING:
    from pydicom import Dataset

CT_STORAGE = "1.2.840.10008.5.1.4.1.1.2"
PET_STORAGE = "1.2.840.10008.5.1.4.1.1.128"
MULTIFRAME_STORAGE = (f"{CT_STORAGE}.1", f"{CT_STORAGE}.2", f"{PET_STORAGE}.1", "1.2.840.10008.5.1.4.1.1.130")
READABLE_UNITS = ("BQML", "CNTS", "GML")
# ImageType values of pictures that are not slices of the body.
PICTURE_TYPES = {"LOCALIZER", "MIP", "MINIP", "PROJECTION IMAGE", "REPROJECTION", "SCREEN SAVE", "SCREENSHOT", "VRT"}

MIN_SLICES = 8  # fewer are a scout, a test shot or a biopsy check
AXIAL_COSINE = math.cos(math.radians(30))  # slice normal to body axis
SAME_POSITION_MM = 0.01
# How far a slice may lie from where even spacing puts it: a share of the spacing, or what rounding to 0.1 mm explains.
GAP_TOLERANCE, ROUNDING_MM = 0.1, 0.1
SIDEWAYS_MM = 0.5  # over the whole stack; a tilted gantry moves far more
SAME_ORIENTATION = 1e-3  # direction cosines
OVERLAP_STEP_MM = 50.0  # differences in common length below this do not decide between two CTs

WEIGHT_KG = (2.0, 500.0)
DOSE_BQ = (1e6, 1e11)  # a dose written in MBq, against the standard, falls below
LONGEST_UPTAKE = timedelta(hours=6)  # an FDG scan starts 1 to 2 h after the injection

SEG_SERIES_NUMBER, SR_SERIES_NUMBER = 9101, 9102  # far above those of scanners
UTF_8 = "ISO_IR 192"  # holds whatever the source's names and the notes are written in


class DicomError(ValueError):
    """DICOM data that cannot be used, told for people: what is wrong, where, and what to do."""


# --- series in a folder ------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False, repr=False)
class Series:
    """The slices of one series that lie on one grid, by their headers.

    A series whose images differ in size, pixel spacing or direction (a scout filed with its scan) becomes several of
    these, with ``part`` 1, 2, ...; ``repeated`` counts files left out because they hold an image that is there already.
    Slices are sorted by their position along the normal of the slice plane.

    Args:
        paths: one file a slice.
        positions: (N, 3) mm (LPS+), the centre of each slice's first pixel; None where a header has none.
        orientation: (6,) direction cosines (LPS+) of a row and of a column; None where there are none.
        pixel_spacing: (2,) mm between rows and between columns; None where there is none.
    """

    modality: str
    sop_class: str
    uid: str
    study_uid: str
    patient_id: str
    frame_of_reference: str
    number: int
    image_type: tuple[str, ...]
    series_type: tuple[str, ...]
    corrections: tuple[str, ...] | None
    units: str
    kernel: str
    expected_slices: int
    rows: int
    columns: int
    orientation: np.ndarray | None
    pixel_spacing: np.ndarray | None
    paths: tuple[Path, ...]
    positions: np.ndarray | None
    part: int = 0
    repeated: int = 0

    def __len__(self) -> int:
        return len(self.paths)

    def __repr__(self) -> str:
        return f"<{self.label}>"

    @property
    def normal(self) -> np.ndarray | None:
        """(3,) unit normal (LPS+) of the slice plane, None without an orientation."""
        return None if self.orientation is None else np.cross(self.orientation[:3], self.orientation[3:])

    @property
    def attenuation_corrected(self) -> bool | None:
        """Whether the PET says that it is; None when it does not say."""
        return None if self.corrections is None else "ATTN" in self.corrections

    @property
    def original(self) -> bool:
        """Whether the images come from the scanner and were not derived from others."""
        return self.image_type[:1] == ("ORIGINAL",)

    @cached_property
    def grid(self) -> Grid:
        """Where the voxels are, in mm (RAS+), array axes (column, row, slice).

        Raises:
            DicomError: when the slices do not form a regular upright stack.
        """
        return _stack(self)

    @property
    def label(self) -> str:
        """What the series is, in one line, with nothing that identifies a patient.

        Example: ``series 4 (PT), 48 slices of 30 x 27, 5.47 x 5.47 x 3.27 mm, GML, attenuation corrected``
        """
        part = f", part {self.part}" if self.part else ""
        words = [f"series {self.number}{part} ({self.modality or 'no modality'})"]
        words.append(f"{len(self)} slices of {self.columns} x {self.rows}" if self.rows else f"{len(self)} files")
        if self.pixel_spacing is not None:
            sizes = [f"{self.pixel_spacing[1]:.2f}", f"{self.pixel_spacing[0]:.2f}"]
            if self.positions is not None and self.normal is not None and len(self) > 1:
                sizes.append(f"{np.median(np.diff(self.positions @ self.normal)):.2f}")
            words.append(f"{' x '.join(sizes)} mm")
        words += [text for text in (self.units, f"kernel {self.kernel}" if self.kernel else "") if text]
        if self.modality == "PT":
            words.append(_AC_WORDS[self.attenuation_corrected])
        return ", ".join(words) + (f", {self.repeated} files repeated" if self.repeated else "")


class SeriesList(list[Series]):
    """The series found, and how many files were none.

    Args:
        series: what was found.
        ignored: files that are not DICOM, or DICOM without a series (a DICOMDIR).
    """

    def __init__(self, series: Sequence[Series] = (), ignored: int = 0) -> None:
        super().__init__(series)
        self.ignored = ignored


_AC_WORDS = {True: "attenuation corrected", False: "not attenuation corrected", None: "attenuation correction unknown"}
_HEADER_TAGS = (
    *("SOPClassUID", "SOPInstanceUID", "Modality", "SeriesInstanceUID", "StudyInstanceUID", "PatientID"),
    *("FrameOfReferenceUID", "SeriesNumber", "ImageType", "SeriesType", "CorrectedImage", "Units"),
    *("ConvolutionKernel", "NumberOfSlices", "Rows", "Columns", "PixelSpacing"),
    *("ImageOrientationPatient", "ImagePositionPatient"),
)


def find_series(folder: str | PathLike[str]) -> SeriesList:
    """Read the headers of every DICOM file under a folder and sort them into series.

    Any mixture of series in any nesting will do. Pixels are not read.

    Args:
        folder: where to look, all levels below included.

    Returns:
        The series, in the order of their numbers, each cut where its images change size, spacing or direction; with
        ``.ignored``, the number of other files.

    Raises:
        DicomError: when the folder does not exist, or a file that says it is DICOM cannot be read.
        ImportError: when pydicom is not installed.
    """
    if not Path(folder).is_dir():
        raise DicomError(f"{folder}: no such folder")
    groups: dict[str, list[tuple[Path, Dataset]]] = {}
    ignored = 0
    with _lenient():
        for path in sorted(p for p in Path(folder).rglob("*") if p.is_file()):
            header = _read_header(path, _HEADER_TAGS)
            if header is None or not _text(header, "SeriesInstanceUID"):
                ignored += 1
            else:
                groups.setdefault(_text(header, "SeriesInstanceUID"), []).append((path, header))
        series = [part for members in groups.values() for part in _series_of(members)]
    return SeriesList(sorted(series, key=lambda s: (s.number, s.uid, s.part)), ignored)


def read_headers(series: Series) -> list[Dataset]:
    """The full headers, without pixels, of a series' slices in their order.

    Raises:
        DicomError: when a file has gone or cannot be read any more.
    """
    with _lenient():
        headers = [_read_header(path) for path in series.paths]
    if any(header is None for header in headers):
        raise DicomError(f"{series.label}: a file is no longer DICOM; look for the series again")
    return [header for header in headers if header is not None]


def _pydicom() -> Any:
    return _module("pydicom")


def _module(name: str) -> Any:
    try:
        return import_module(name)
    except ImportError as error:
        raise ImportError(f"DICOM needs {name}: pip install pydicom highdicom") from error


@contextmanager
def _lenient() -> Iterator[None]:
    """Faults in tags that are of no use here (a study id that is too long) are not this module's to complain about.

    What pydicom and highdicom warn of and log is kept back: they quote names and identifiers.
    """
    loggers = [logging.getLogger(name) for name in ("pydicom", "highdicom")]
    levels = [logger.level for logger in loggers]
    with _module("pydicom.config").disable_value_validation(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=UserWarning, module=r"(pydicom|highdicom)\b")
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


def _read_header(path: Path, keywords: Sequence[str] | None = None) -> Dataset | None:
    """The header of a DICOM file, None for a file of another kind."""
    pydicom = _pydicom()
    tags = None if keywords is None else list(keywords)
    try:
        return pydicom.dcmread(path, stop_before_pixels=True, specific_tags=tags)
    except pydicom.errors.InvalidDicomError:
        return None
    except (OSError, EOFError, ValueError, KeyError, NotImplementedError, struct.error) as error:
        raise DicomError(
            f"{path.name}: not a complete DICOM file ({_cause(error)}); copy it again or remove it"
        ) from error


def _cause(error: Exception) -> str:
    """What went wrong, without the path that the system's own messages quote."""
    return (error.strerror or type(error).__name__) if isinstance(error, OSError) else str(error)


def _series_of(members: Sequence[tuple[Path, Dataset]]) -> list[Series]:
    """The images of one series, cut where they change grid."""
    parts: list[list[tuple[Path, Dataset]]] = []
    seen: set[str] = set()
    for path, header in members:
        instance = _text(header, "SOPInstanceUID")
        if instance in seen:
            continue
        seen.add(instance)
        for part in parts:
            if _same_grid(part[0][1], header):
                part.append((path, header))
                break
        else:
            parts.append([(path, header)])
    series = [_one_series(part) for part in parts]
    repeated = len(members) - len(seen)
    series[0] = replace(series[0], repeated=repeated)
    return series if len(series) == 1 else [replace(s, part=k) for k, s in enumerate(series, start=1)]


def _same_grid(one: Dataset, other: Dataset) -> bool:
    if any(_text(one, key) != _text(other, key) for key in ("SOPClassUID", "Rows", "Columns")):
        return False
    for key, count in (("ImageOrientationPatient", 6), ("PixelSpacing", 2)):
        a, b = _numbers(one, key, count), _numbers(other, key, count)
        if a is None or b is None:
            if a is not b:
                return False
        elif not np.allclose(a, b, rtol=0, atol=SAME_ORIENTATION):
            return False
    return True


def _one_series(members: Sequence[tuple[Path, Dataset]]) -> Series:
    header = members[0][1]
    orientation = _unit_axes(_numbers(header, "ImageOrientationPatient", 6))
    spacing = _numbers(header, "PixelSpacing", 2)
    paths = [path for path, _ in members]
    found = [_numbers(each, "ImagePositionPatient", 3) for _, each in members]
    positions = None if orientation is None or any(p is None for p in found) else np.array(found)
    if positions is not None and orientation is not None:
        order = np.argsort(positions @ np.cross(orientation[:3], orientation[3:]), kind="stable")
        positions, paths = positions[order], [paths[k] for k in order]
    return Series(
        modality=_text(header, "Modality").upper(),
        sop_class=_text(header, "SOPClassUID"),
        uid=_text(header, "SeriesInstanceUID"),
        study_uid=_text(header, "StudyInstanceUID"),
        patient_id=_text(header, "PatientID"),
        frame_of_reference=_text(header, "FrameOfReferenceUID"),
        number=_integer(header, "SeriesNumber"),
        image_type=_words(header, "ImageType"),
        series_type=_words(header, "SeriesType"),
        corrections=_words(header, "CorrectedImage") or None,
        units=_text(header, "Units").upper(),
        kernel=" ".join(_words(header, "ConvolutionKernel")),
        expected_slices=_integer(header, "NumberOfSlices"),
        rows=_integer(header, "Rows"),
        columns=_integer(header, "Columns"),
        orientation=orientation,
        pixel_spacing=None if spacing is None or spacing.min() <= 0 else spacing,
        paths=tuple(paths),
        positions=positions,
    )


def _unit_axes(orientation: np.ndarray | None) -> np.ndarray | None:
    """Direction cosines of exactly unit length; None when they are not two perpendicular directions."""
    if orientation is None:
        return None
    row, column = orientation[:3], orientation[3:]
    lengths = np.linalg.norm(row), np.linalg.norm(column)
    if min(lengths) < 0.5 or abs(row @ column) > 1e-2:
        return None
    return np.concatenate([row / lengths[0], column / lengths[1]])


def _text(header: Dataset, keyword: str) -> str:
    value = header.get(keyword)
    return "" if value is None else str(value).strip()


def _words(header: Dataset, keyword: str) -> tuple[str, ...]:
    """The values of a multi-valued text tag in upper case, none when it is absent or empty."""
    value = header.get(keyword)
    if value is None or value == "":
        return ()
    return tuple(str(v).strip().upper() for v in ([value] if isinstance(value, str) else value))


def _numbers(header: Dataset, keyword: str, count: int) -> np.ndarray | None:
    """(count,) finite numbers, None when the tag does not hold so many."""
    try:
        value = header.get(keyword)
        numbers = np.array([] if value is None else value, dtype=np.float64).ravel()
    except (TypeError, ValueError):
        return None
    return numbers if len(numbers) == count and np.isfinite(numbers).all() else None


def _integer(header: Dataset, keyword: str) -> int:
    """An integer tag, 0 when it is absent or not a number."""
    number = _numbers(header, keyword, 1)
    return 0 if number is None else int(number[0])


# --- studies, and the choice of a pair --------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Choice:
    """The CT and the PET that belong together.

    Args:
        ct: the CT.
        pet: the PET.
        rejected: every other series, with the reason why it is not used.
        ignored: files that were no DICOM images at all.
    """

    ct: Series
    pet: Series
    rejected: list[tuple[Series, str]]
    ignored: int = 0

    def describe(self) -> str:
        """The choice and what was left out, one series a line, with nothing that identifies a patient."""
        lines = [f"CT:  {self.ct.label}", f"PET: {self.pet.label}", *_reasons(self.rejected)]
        return "\n".join([*lines, f"not DICOM: {self.ignored} files"] if self.ignored else lines)


@dataclass(frozen=True, eq=False)
class Study:
    """The series of one patient that belong to one examination.

    Args:
        patient_id: the patient's id as the files have it (kept out of ``repr``).
        study_uid: StudyInstanceUID of its first series (kept out of ``repr``).
        series: all series of the examination.
        ignored: files in the folder that were no DICOM images (of the whole folder, not of this study).
    """

    patient_id: str = field(repr=False)
    study_uid: str = field(repr=False)
    series: list[Series]
    ignored: int = 0

    @property
    def is_pet_ct(self) -> bool:
        """Whether there is at least one CT and one PET series."""
        return {"CT", "PT"} <= {s.modality for s in self.series}

    def choose(self, require_same_frame: bool = True) -> Choice:
        """:func:`choose_pet_ct` among this study's series."""
        return choose_pet_ct(SeriesList(self.series, self.ignored), require_same_frame)


def find_studies(folder: str | PathLike[str]) -> list[Study]:
    """The examinations in a folder that may hold several patients.

    Series of one PatientID belong together when they share the StudyInstanceUID or the frame of reference (some sites
    file the CT and the PET of one examination as two studies).

    Args:
        folder: where to look, all levels below included.

    Returns:
        The studies in the order of patient id and study UID.

    Raises:
        DicomError: as :func:`find_series`, and when there is no DICOM series at all.
    """
    series = find_series(folder)
    if not series:
        raise DicomError(f"{folder}: no DICOM series in it ({series.ignored} files of other kinds)")
    return _studies(series)


def choose_pet_ct(series: Sequence[Series], require_same_frame: bool = True) -> Choice:
    """Pick the CT and the PET to predict from.

    Not considered: modalities other than CT and PT, multi-frame and secondary-capture objects, localizers, projections
    and screen captures, dynamic or gated PET, PET in other units than BQML, CNTS or GML, PET that says it is not
    attenuation corrected, fewer than 8 slices, slices that are not axial (within 30 degrees), and stacks that
    :func:`read_series` would refuse (missing slices, tilted gantry).

    Of the PETs left, the first in this order that has a CT: known to be attenuation corrected, original rather than
    derived, more slices, finer pixels, lower series number. Of the CTs in its frame of reference that overlap it:
    longer overlap along the body (in steps of 50 mm), soft-tissue kernel rather than lung or bone, original rather
    than derived, more slices, finer pixels, lower series number.

    Args:
        series: series of one examination, from :func:`find_series`.
        require_same_frame: whether CT and PET must share the FrameOfReferenceUID, which says that they are registered.
            Only give False when it is known that they are and that the UID was lost.

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
    pets = sorted(fit["PT"], key=lambda s: (_values(_pet_rank(s)), s.uid, s.part))
    pet = next((p for p in pets if any(not _mismatch(c, p, require_same_frame) for c in fit["CT"])), None)
    if pet is None:
        rejected += [(c, _mismatch(c, pets[0], require_same_frame)) for c in fit["CT"]]
        raise DicomError("\n".join(["no CT belongs to the PET", f"PET: {pets[0].label}", *_reasons(rejected)]))
    partners = [c for c in fit["CT"] if not _mismatch(c, pet, require_same_frame)]
    ct = min(partners, key=lambda s: (_values(_ct_rank(s, pet)), s.uid, s.part))
    rejected += [(p, _why_not(p, pet, ct, require_same_frame)) for p in pets if p is not pet]
    for other in (c for c in fit["CT"] if c is not ct):
        mismatch = _mismatch(other, pet, require_same_frame)
        rejected.append((other, mismatch or _lost(_ct_rank(other, pet), _ct_rank(ct, pet))))
    return Choice(ct, pet, sorted(rejected, key=lambda r: (r[0].number, r[0].uid, r[0].part)), _ignored(series))


def _studies(series: Sequence[Series]) -> list[Study]:
    """Groups of series of one patient that share a study or a frame of reference."""
    groups: list[tuple[set[tuple[str, str]], list[Series]]] = []
    for each in series:
        links = {(each.patient_id, uid) for uid in (each.study_uid, each.frame_of_reference) if uid}
        members = [each]
        for group in [g for g in groups if g[0] & links]:
            groups.remove(group)
            links, members = links | group[0], group[1] + members
        groups.append((links, members))
    studies = [Study(m[0].patient_id, m[0].study_uid, m, _ignored(series)) for _, m in groups]
    return sorted(studies, key=lambda s: (s.patient_id, s.study_uid))


def _ignored(series: Sequence[Series]) -> int:
    return series.ignored if isinstance(series, SeriesList) else 0


def _one_examination(series: Sequence[Series]) -> tuple[list[Series], list[tuple[Series, str]]]:
    """The series to choose from, and those of examinations that are no PET/CT."""
    patients = {s.patient_id for s in series if s.modality in ("CT", "PT")}
    if len(patients) > 1:
        raise DicomError(f"scans of {len(patients)} patients: give one patient at a time, or use find_studies")
    pairs = [study for study in _studies(series) if study.is_pet_ct]
    if len(pairs) > 1:
        raise DicomError(f"{len(pairs)} PET/CT examinations of one patient: give one of them, or use find_studies")
    if not pairs:  # the checks of each series and of each pair say what is amiss
        return list(series), []
    chosen = {id(s) for s in pairs[0].series}
    others = [(s, "of another examination than the PET/CT") for s in series if id(s) not in chosen]
    return pairs[0].series, others


def _unfit(series: Series) -> str:
    """Why a series can be neither the CT nor the PET, "" when it can."""
    if series.modality not in ("CT", "PT"):
        return f"modality {series.modality or 'unknown'}"
    if series.sop_class in MULTIFRAME_STORAGE:
        return "multi-frame images; convert them to one file a slice"
    if series.sop_class != (CT_STORAGE if series.modality == "CT" else PET_STORAGE):
        return "not stored as CT or PET images (a screen capture or a derived object)"
    picture = PICTURE_TYPES & {*series.image_type, *series.series_type}
    if picture:
        return f"a picture, not slices ({sorted(picture)[0].lower()})"
    if series.modality == "PT" and _unfit_pet(series):
        return _unfit_pet(series)
    if len(series) < MIN_SLICES:
        return f"only {len(series)} slices"
    if series.normal is None or series.positions is None or series.pixel_spacing is None or not series.rows:
        return "no position in space in its headers"
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
        return f"in units {series.units or 'not stated'}, from which no SUV can be had"
    return ""


def _pet_rank(pet: Series) -> list[tuple[str, float]]:
    """Criteria, first to last: what is said of a PET that loses by it, and a value that is lower for the better."""
    return [
        ("attenuation correction not stated", not pet.attenuation_corrected),
        ("derived; an original was preferred", not pet.original),
        *_common_rank(pet),
    ]


def _ct_rank(ct: Series, pet: Series) -> list[tuple[str, float]]:
    return [
        ("less of the PET's length covered", -round(_overlap_mm(ct, pet)[2] / OVERLAP_STEP_MM)),
        ("lung or bone kernel; soft tissue was preferred", is_sharp_kernel(ct.kernel)),
        ("derived; an original was preferred", not ct.original),
        *_common_rank(ct),
    ]


def _common_rank(series: Series) -> list[tuple[str, float]]:
    pixel = float(series.pixel_spacing.max()) if series.pixel_spacing is not None else math.inf
    return [
        ("fewer slices", -len(series)),
        ("coarser pixels", round(pixel, 2)),
        ("as good; the lower series number was preferred", series.number),
    ]


def is_sharp_kernel(kernel: str) -> bool:
    """Whether a CT reconstruction kernel is made for lung or bone rather than for soft tissue.

    Knows GE's and Philips' words, Siemens' numbers (50 and above) and Canon's (FC30 and above).

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
    """(3,) common length in mm along x, y, z of the boxes around two fields of view; negative where they are apart."""
    a, b = one.grid.bounds, other.grid.bounds
    return np.minimum(a[1], b[1]) - np.maximum(a[0], b[0])


def _mismatch(ct: Series, pet: Series, require_same_frame: bool) -> str:
    """Why a CT cannot go with a PET, "" when it can."""
    same = bool(ct.frame_of_reference) and ct.frame_of_reference == pet.frame_of_reference
    if require_same_frame and not same:
        return "another frame of reference than the PET's, or none stated"
    return "" if _overlap_mm(ct, pet).min() > 0 else "shows another part of the body than the PET"


def _why_not(pet: Series, chosen: Series, ct: Series, require_same_frame: bool) -> str:
    if _values(_pet_rank(pet)) < _values(_pet_rank(chosen)):
        mismatch = _mismatch(ct, pet, require_same_frame)
        return "no CT in its frame of reference" if "frame" in mismatch else "no CT of the same part of the body"
    return _lost(_pet_rank(pet), _pet_rank(chosen))


def _values(rank: Sequence[tuple[str, float]]) -> tuple[float, ...]:
    return tuple(value for _, value in rank)


def _lost(loser: Sequence[tuple[str, float]], winner: Sequence[tuple[str, float]]) -> str:
    """The first criterion that tells two series apart."""
    decisive = (text for (text, value), (_, best) in zip(loser, winner, strict=True) if value != best)
    return next(decisive, "equal in every respect; the first was taken")


def _reasons(rejected: Sequence[tuple[Series, str]]) -> list[str]:
    return [f"rejected: {series.label}: {reason}" for series, reason in rejected]


# --- volumes -------------------------------------------------------------------------------------------------------


def read_series(series: Series) -> tuple[np.ndarray, np.ndarray]:
    """Read a series as a volume.

    Slices are stacked by position along their normal, whatever their instance numbers; each slice's own rescale slope
    and intercept are applied (those of PET differ from slice to slice).

    Args:
        series: from :func:`find_series`.

    Returns:
        The (X, Y, Z) array (column, row, slice), int16 for a CT whose rescaled values are whole numbers that fit and
        float32 otherwise, in HU or in the PET's units; and the (4, 4) float64 affine to world mm (RAS+).

    Raises:
        DicomError: when slices are missing, doubled or irregularly spaced, the gantry was tilted, or the pixels
            cannot be decoded.
    """
    affine = series.grid.affine
    pydicom = _pydicom()
    volume: np.ndarray | None = None
    with _lenient():
        for index, path in enumerate(series.paths):
            try:
                dataset = pydicom.dcmread(path)
            except (OSError, EOFError, ValueError, struct.error, pydicom.errors.InvalidDicomError) as error:
                raise DicomError(
                    f"{series.label}: {path.name}: cannot be read ({_cause(error)}); copy it again"
                ) from error
            values = _rescaled(_pixels(dataset, series, path), dataset)
            if volume is None:
                volume = np.empty((len(series), series.rows, series.columns), dtype=values.dtype)
            elif values.dtype == np.float32 != volume.dtype:
                volume = volume.astype(np.float32)
            volume[index] = values
    assert volume is not None  # a grid has at least two slices
    return volume.transpose(2, 1, 0), affine.copy()


def _stack(series: Series) -> Grid:
    """The regular grid on which the slices lie."""
    where = series.label
    if series.orientation is None or series.positions is None or series.pixel_spacing is None or series.normal is None:
        raise DicomError(
            f"{where}: Image Position (0020,0032), Image Orientation (0020,0037) or Pixel Spacing (0028,0030) is "
            "missing or unreadable"
        )
    if len(series) < 2:
        raise DicomError(f"{where}: one slice is not a volume")
    depth = series.positions @ series.normal
    _check_gaps(depth, where)
    if series.modality == "PT" and series.expected_slices > len(series):
        raise DicomError(
            f"{where}: Number of Slices (0054,0081) says {series.expected_slices}, {len(series)} found; copy the "
            "series again"
        )
    step = (depth[-1] - depth[0]) / (len(depth) - 1)
    _check_upright(series.positions - np.outer(depth, series.normal), depth[-1] - depth[0], where)
    lps = np.eye(4)
    lps[:3, 0] = series.orientation[:3] * series.pixel_spacing[1]  # along a row: one column further
    lps[:3, 1] = series.orientation[3:] * series.pixel_spacing[0]
    lps[:3, 2] = series.normal * step
    lps[:3, 3] = series.positions[0]
    return Grid((series.columns, series.rows, len(series)), LPS_TO_RAS @ lps)


def _check_gaps(depth: np.ndarray, where: str) -> None:
    """Refuse doubled, missing and unevenly spaced slices at ``depth`` (N,) mm along the normal."""
    gaps = np.diff(depth)
    step = float(np.median(gaps))
    doubled = np.flatnonzero(gaps < SAME_POSITION_MM)
    if len(doubled):
        raise DicomError(
            f"{where}: {len(doubled)} positions hold more than one image, the first at {depth[doubled[0]]:.2f} mm "
            f"(slice {doubled[0] + 1}); several time points or reconstructions are mixed: keep one"
        )
    wide = np.flatnonzero(gaps > 1.5 * step)
    if len(wide):
        places = "; ".join(
            f"{round(gaps[k] / step) - 1} between {depth[k]:.2f} and {depth[k + 1]:.2f} mm (after slice {k + 1})"
            for k in wide[:5]
        )
        more = f"; and {len(wide) - 5} more gaps" if len(wide) > 5 else ""
        raise DicomError(f"{where}: slices are missing: {places}{more}; copy the series again")
    even = np.linspace(depth[0], depth[-1], len(depth))
    worst = int(np.argmax(np.abs(depth - even)))
    if abs(depth[worst] - even[worst]) > max(GAP_TOLERANCE * step, ROUNDING_MM):
        low, high = gaps.min(), gaps.max()
        raise DicomError(
            f"{where}: slices are unevenly spaced, {low:.2f} to {high:.2f} mm, worst at {depth[worst]:.2f} mm (slice "
            f"{worst + 1}); resample the series to one spacing"
        )


def _check_upright(sideways: np.ndarray, length: float, where: str) -> None:
    """Refuse stacks whose slices are shifted (N, 3) mm within their plane: a tilted gantry, or a moved table."""
    drift = sideways - sideways[0]
    total = float(np.linalg.norm(drift[-1]))
    if total > SIDEWAYS_MM:
        angle = math.degrees(math.atan2(total, length))
        raise DicomError(
            f"{where}: the slices are stacked at {angle:.1f} degrees to their normal (tilted gantry), which a volume "
            "of upright voxels cannot hold; resample it upright first"
        )
    stray = int(np.argmax(np.linalg.norm(drift, axis=1)))
    if np.linalg.norm(drift[stray]) > SIDEWAYS_MM:
        raise DicomError(f"{where}: slice {stray + 1} is shifted sideways; the slices do not form one stack")


def _pixels(dataset: Dataset, series: Series, path: Path) -> np.ndarray:
    """The stored values (rows, columns) of one image."""
    where = f"{series.label}: {path.name}"
    if not _decodable(dataset):
        syntax = dataset.file_meta.get("TransferSyntaxUID")
        raise DicomError(
            f"{where}: no decoder for transfer syntax {syntax.name if syntax is not None else '(not stated)'}; install "
            "one (pip install python-gdcm) or decompress the series first (gdcmconv --raw)"
        )
    try:
        values = dataset.pixel_array
    except (RuntimeError, AttributeError, KeyError, ValueError, EOFError, struct.error) as error:
        cause = " ".join(_cause(error).split())
        raise DicomError(f"{where}: pixel data cannot be decoded ({cause}); copy the file again") from error
    if values.shape != (series.rows, series.columns):
        raise DicomError(f"{where}: pixel data of shape {values.shape}, not one grey image")
    return values


def _decodable(dataset: Dataset) -> bool:
    """Whether a decoder for the dataset's transfer syntax is installed."""
    syntax = dataset.file_meta.get("TransferSyntaxUID")
    if syntax is None:
        return False
    if not syntax.is_encapsulated:
        return True
    try:
        return bool(_module("pydicom.pixels").get_decoder(syntax).is_available)
    except NotImplementedError:
        return False


def _rescaled(values: np.ndarray, dataset: Dataset) -> np.ndarray:
    """Stored values to HU or PET units; whole numbers stay int16 where they fit."""
    slope = _one_number(dataset, "RescaleSlope", 1.0)
    intercept = _one_number(dataset, "RescaleIntercept", 0.0)
    whole = _text(dataset, "Modality") == "CT" and slope == 1.0 and intercept.is_integer()
    if whole:
        low, high = int(values.min()) + int(intercept), int(values.max()) + int(intercept)
        if low >= -32768 and high <= 32767:
            return (values.astype(np.int32) + int(intercept)).astype(np.int16)
    # In float64, since stored values of 32 bits would lose digits before the slope is applied.
    return (values.astype(np.float64) * slope + intercept).astype(np.float32)


def _one_number(dataset: Dataset, keyword: str, default: float) -> float:
    if dataset.get(keyword) is None:
        return default
    number = _numbers(dataset, keyword, 1)
    if number is None:
        raise DicomError(f"{_tag(keyword)} is {_text(dataset, keyword)!r}, not a number")
    return float(number[0])


# --- standardised uptake values ----------------------------------------------------------------------------------


def suv_factor(headers: Dataset | Sequence[Dataset]) -> float:
    """What PET values, rescaled as the headers say, are multiplied by to become SUV by body weight (g/ml).

    Follows the QIBA vendor-neutral pseudo-code (QIBA Profile FDG-PET/CT, appendix G). With BQML

        factor = weight [g] / (dose [Bq] * 2 ** (-uptake time / half-life))

    where, for decay correction START, the uptake time runs from the injection to the start of the scan; for ADMIN the
    values are corrected to the injection, so that it is 0. CNTS takes Philips' own factor (7053,1000), or else its
    (7053,1009), which leads to Bq/ml. GML values are SUV already and are taken as they are.

    The scan starts at the series' date and time unless these are later than the first acquisition (a series made
    afterwards). Then GE's private (0009,100D) says it; else it is computed back from the first image's frame reference
    time and duration; else it is the first acquisition itself. The injection's date is believed when it lies at most
    6 h before the scan; otherwise (de-identified dates, or only a time of day) the time of day counts, on the day
    before when it is later than the scan's.

    Args:
        headers: the headers of all slices of one PET series (:func:`read_headers`).

    Returns:
        The factor, the same for all slices.

    Raises:
        DicomError: naming the tag that is missing, zero, implausible or differs between slices; for other units
            (PROPCNTS), SUV by another measure than body weight, and images without attenuation or decay correction.
    """
    slices: list[Dataset] = list(headers) if isinstance(headers, Sequence) else [headers]
    if not slices:
        raise DicomError("SUV: no PET slices")
    with _lenient():
        units = _agreed(slices, "Units")
        if units == "GML":
            _check_suv_type(slices)
            return 1.0
        if units not in READABLE_UNITS:
            raise DicomError(f"SUV: {_tag('Units')} is {units}; SUV can be had from {', '.join(READABLE_UNITS)} only")
        decay = _check_corrections(slices)
        return _counts_factor(slices, decay) if units == "CNTS" else _activity_factor(slices, decay)


def _activity_factor(slices: Sequence[Dataset], decay: str) -> float:
    """From Bq/ml to SUV."""
    weight = _positive(slices, "PatientWeight", WEIGHT_KG, "kg")
    items = [_radiopharmaceutical(s) for s in slices]
    dose = _positive(items, "RadionuclideTotalDose", DOSE_BQ, "Bq")
    if decay == "START":
        half_life = _positive(items, "RadionuclideHalfLife", (60.0, 1e7), "s")
        uptake = _uptake_time(items[0], slices[0], _scan_start(slices, half_life))
        dose *= 2.0 ** (-uptake.total_seconds() / half_life)
    return weight * 1000.0 / dose


def _counts_factor(slices: Sequence[Dataset], decay: str) -> float:
    """From Philips' counts to SUV."""
    creator = "Philips PET Private Group"
    for offset in (0x00, 0x09):
        found = {_private(s, 0x7053, creator, offset) for s in slices}
        if len(found) > 1:
            raise DicomError(f"SUV: the slices differ in (7053,10{offset:02X})")
        factor = _as_number(found.pop(), f"SUV: (7053,10{offset:02X}), {creator},")
        if factor > 0:  # Philips writes 0 where it has no factor
            return factor if offset == 0x00 else factor * _activity_factor(slices, decay)
    raise DicomError(f"SUV: units are CNTS, and both (7053,1000) and (7053,1009) of {creator} are missing or zero")


def _as_number(text: str, where: str) -> float:
    """A private tag's number, 0 when it is empty."""
    try:
        return float(text or 0)
    except ValueError as error:
        raise DicomError(f"{where} is {text!r}, not a number") from error


def _check_suv_type(slices: Sequence[Dataset]) -> None:
    kind = _agreed(slices, "SUVType", optional=True)
    if kind not in ("", "BW"):
        raise DicomError(f"SUV: {_tag('SUVType')} is {kind}; values by body weight (BW) are needed")


def _check_corrections(slices: Sequence[Dataset]) -> str:
    """The moment to which decay is corrected, START or ADMIN."""
    done = set(_words(slices[0], "CorrectedImage"))
    if not done:
        raise DicomError(f"SUV: {_tag('CorrectedImage')} is missing")
    if "ATTN" not in done:
        raise DicomError(f"SUV: {_tag('CorrectedImage')} has no ATTN: the PET is not attenuation corrected")
    decay = _agreed(slices, "DecayCorrection")
    if decay not in ("START", "ADMIN"):
        reason = "the values are not corrected to one moment" if decay == "NONE" else "START or ADMIN was expected"
        raise DicomError(f"SUV: {_tag('DecayCorrection')} is {decay}: {reason}")
    if not done & {"DECY", "DECAY"}:
        raise DicomError(
            f"SUV: {_tag('CorrectedImage')} has no DECY, though {_tag('DecayCorrection')} is {decay}: the values may "
            "not be decay corrected"
        )
    return decay


def _scan_start(slices: Sequence[Dataset], half_life: float) -> datetime:
    """The moment to which START corrects the decay."""
    series = min(_moment(s, "SeriesDate", "SeriesTime") for s in slices)
    acquired, first = min(((_moment(s, "AcquisitionDate", "AcquisitionTime"), s) for s in slices), key=lambda a: a[0])
    if series <= acquired:
        return series
    private = _private(first, 0x0009, "GEMS_PETD_01", 0x0D)
    if private:
        return _date_time(private, first, "SUV: GE's scan date and time (0009,100D)")
    reference = _one_number(first, "FrameReferenceTime", 0.0) / 1000.0
    duration = _one_number(first, "ActualFrameDuration", 0.0) / 1000.0
    if reference <= 0 or duration <= 0:
        return acquired
    # The moment within the frame when the activity equals its mean over the frame.
    rate = math.log(2) / half_life
    mean_activity = math.log(rate * duration / -math.expm1(-rate * duration)) / rate
    return acquired + timedelta(seconds=mean_activity - reference)


def _uptake_time(item: Dataset, header: Dataset, scan: datetime) -> timedelta:
    """Injection to scan."""
    given = _text(item, "RadiopharmaceuticalStartDateTime")
    if len(given) >= len("YYYYMMDDHHMM"):
        injected = _date_time(given, header, f"SUV: {_tag('RadiopharmaceuticalStartDateTime')}")
        if timedelta(0) <= scan - injected <= LONGEST_UPTAKE:
            return scan - injected
        clock = injected.time()
    else:
        clock = _parsed("TM", _required(item, "RadiopharmaceuticalStartTime"), "RadiopharmaceuticalStartTime")
    uptake = scan - datetime.combine(scan.date(), clock)
    if uptake < timedelta(0):
        uptake += timedelta(days=1)
    if uptake > LONGEST_UPTAKE:
        hours, limit = (t.total_seconds() / 3600 for t in (uptake, LONGEST_UPTAKE))
        raise DicomError(
            f"SUV: by {_tag('RadiopharmaceuticalStartTime')} the injection was {hours:.1f} h before the scan, more "
            f"than {limit:.0f} h: the times do not belong together"
        )
    return uptake


def _moment(header: Dataset, day: str, clock: str) -> datetime:
    date = _parsed("DA", _required(header, day), day)
    return datetime.combine(date, _parsed("TM", _required(header, clock), clock))


def _parsed(kind: str, text: str, keyword: str) -> Any:
    """A DICOM date (DA) or time (TM) as Python's."""
    try:
        value = getattr(_module("pydicom.valuerep"), kind)(text.replace(":", ""))
    except ValueError as error:
        raise DicomError(f"SUV: {_tag(keyword)} is no date or time that can be read") from error
    return value


def _date_time(text: str, header: Dataset, where: str) -> datetime:
    """A DICOM date and time (DT) in the scanner's own time, to which the header's other times refer."""
    try:
        value = _module("pydicom.valuerep").DT(text)
        offset = _text(header, "TimezoneOffsetFromUTC")
        if value.tzinfo is not None and offset:
            sign = -1 if offset.startswith("-") else 1
            minutes = 60 * int(offset.lstrip("+-")[:2]) + int(offset.lstrip("+-")[2:])
            value = value.astimezone(timezone(sign * timedelta(minutes=minutes)))
    except ValueError as error:
        raise DicomError(f"{where} is no date and time that can be read") from error
    return datetime.combine(value.date(), value.time())


def _radiopharmaceutical(header: Dataset) -> Dataset:
    sequence = header.get("RadiopharmaceuticalInformationSequence")
    if not sequence:
        raise DicomError(f"SUV: {_tag('RadiopharmaceuticalInformationSequence')} is missing or empty")
    return sequence[0]


def _positive(headers: Sequence[Dataset], keyword: str, limits: tuple[float, float], unit: str) -> float:
    """A number that all headers agree on and that lies within its limits."""
    found = {_as_number(_required(h, keyword), f"SUV: {_tag(keyword)}") for h in headers}
    if len(found) > 1:
        raise DicomError(f"SUV: the slices differ in {_tag(keyword)}")
    number = found.pop()
    if number == 0:
        raise DicomError(f"SUV: {_tag(keyword)} is zero")
    if not limits[0] <= number <= limits[1]:
        raise DicomError(
            f"SUV: {_tag(keyword)} is {number:g} {unit}, outside {limits[0]:g} to {limits[1]:g} {unit}; check its unit"
        )
    return number


def _agreed(headers: Sequence[Dataset], keyword: str, optional: bool = False) -> str:
    found = {(_text(h, keyword) if optional else _required(h, keyword)).upper() for h in headers}
    if len(found) > 1:
        raise DicomError(f"SUV: the slices differ in {_tag(keyword)}: {', '.join(sorted(found))}")
    return found.pop()


def _required(header: Dataset, keyword: str) -> str:
    text = _text(header, keyword)
    if not text:
        raise DicomError(f"SUV: {_tag(keyword)} is missing or empty")
    return text


def _private(header: Dataset, group: int, creator: str, offset: int) -> str:
    """A private tag's text, "" when it is absent."""
    try:
        value = header.private_block(group, creator)[offset].value
    except KeyError:
        return ""
    return (value.decode("ascii", "replace") if isinstance(value, bytes) else str(value or "")).strip(" \0")


def _tag(keyword: str) -> str:
    """A tag as people look it up: ``Patient's Weight (0010,1030)``."""
    dictionary = _module("pydicom.datadict")
    number = dictionary.tag_for_keyword(keyword)
    return f"{dictionary.dictionary_description(number)} ({number >> 16:04X},{number & 0xFFFF:04X})"


# --- results -------------------------------------------------------------------------------------------------------

# Concepts for which neither DICOM nor SNOMED has a code. The report names the scheme in its coding scheme
# identification; survival at d days has the code RFS_<d>D.
PRIVATE_SCHEME = "99HNPETCT"
PRIVATE_CODES = {
    "LOG_HAZARD": "Log hazard of recurrence relative to the training cohort",
    "RISK_PERCENTILE": "Percentile of the log hazard in the training cohort",
    "HPV_PROBABILITY": "Predicted probability of positive HPV status",
    "HPV_STATUS": "Predicted HPV status",
    "PREDICTION": "Prognosis and HPV status predicted by a model",
}


@dataclass(frozen=True)
class Model:
    """What made a result, as it is written into the DICOM objects.

    Args:
        name: of the model.
        version: of the model.
        manufacturer: who is behind it.
        weights: identifies the weights, e.g. their SHA-256; written as serial number and parameter.
    """

    name: str
    version: str
    manufacturer: str
    weights: str = "unknown"


@dataclass(frozen=True)
class Findings:
    """What a report states; None is left out.

    Args:
        volume_ml: volume of the segmented tumour.
        suv_max: highest SUV (body weight) in it.
        suv_mean: mean SUV in it.
        mtv_ml: metabolic tumour volume.
        tlg_g: total lesion glycolysis, mean SUV times metabolic volume (g).
        lesions: number of separate lesions.
        log_hazard: of recurrence.
        risk_percentile: of the log hazard in the training cohort, 0 to 100.
        survival: recurrence-free survival probability (0 to 1) by days since the scan.
        hpv_probability: 0 to 1.
        hpv_positive: the class.

    Raises:
        ValueError: when a number is not finite.
    """

    volume_ml: float | None = None
    suv_max: float | None = None
    suv_mean: float | None = None
    mtv_ml: float | None = None
    tlg_g: float | None = None
    lesions: int | None = None
    log_hazard: float | None = None
    risk_percentile: float | None = None
    survival: Mapping[int, float] = field(default_factory=dict)
    hpv_probability: float | None = None
    hpv_positive: bool | None = None

    def __post_init__(self) -> None:
        numbers = {**vars(self), **{f"survival at {day} days": p for day, p in self.survival.items()}}
        for name, value in numbers.items():
            if isinstance(value, (int, float)) and not math.isfinite(value):
                raise ValueError(f"report: {name} is {value}; leave out what is not known")


def write_seg(
    path: str | PathLike[str],
    mask: np.ndarray,
    source: Series,
    *,
    model: Model,
    description: str = "Tumour (primary and nodes), automatic segmentation",
    series_number: int = SEG_SERIES_NUMBER,
) -> Dataset:
    """Write a tumour mask as a binary DICOM segmentation of the CT.

    One segment: category Morphologically Abnormal Structure (SCT 49755003), type Neoplasm (SCT 108369006; primary and
    nodes are one label), region Head and Neck (SCT 774007). Only slices with tumour are stored. An empty mask is
    written with all its empty slices, since "looked for and not found" is a result.

    Args:
        path: where to; the file appears whole or not at all.
        mask: (X, Y, Z), 0 or 1, on the grid that :func:`read_series` gives for ``source``.
        source: the CT, whose patient, study, frame of reference and images the segmentation refers to.
        model: what made the mask.
        description: series description, 64 characters at most.
        series_number: of the new series.

    Returns:
        The dataset as written, for :func:`write_sr`.

    Raises:
        DicomError: when the mask is not on the grid of ``source`` or holds other values.
    """
    if tuple(mask.shape) != source.grid.shape:
        raise DicomError(f"the mask has shape {tuple(mask.shape)}, the CT {source.grid.shape}")
    if mask.dtype.kind not in "bui" or mask.min() < 0 or mask.max() > 1:
        raise DicomError("the mask holds values other than the integers 0 and 1")
    hd = _module("highdicom")
    frames = np.ascontiguousarray(mask.transpose(2, 1, 0).astype(np.uint8))
    with _lenient():
        seg = hd.seg.Segmentation(
            source_images=_source_headers(source),
            pixel_array=frames,
            segmentation_type="BINARY",
            segment_descriptions=[_segment(model)],
            series_instance_uid=hd.UID(),
            series_number=series_number,
            sop_instance_uid=hd.UID(),
            instance_number=1,
            manufacturer=model.manufacturer,
            manufacturer_model_name=model.name,
            software_versions=model.version,
            device_serial_number=model.weights[:64],
            omit_empty_frames=bool(frames.any()),
            content_label="TUMOUR",
            content_description="Research use only",
            series_description=description,
            specific_character_set=UTF_8,
        )
        _save(seg, path)
    return seg


def write_sr(
    path: str | PathLike[str],
    findings: Findings,
    *,
    ct: Series,
    pet: Series,
    model: Model,
    seg: Dataset | None = None,
    notes: Sequence[str] = (),
    description: str = "PET/CT measurements and prediction (research use only)",
    series_number: int = SR_SERIES_NUMBER,
) -> Dataset:
    """Write measurements and prediction as a DICOM structured report (Comprehensive SR, template TID 1500).

    The tumour's measurements form a volumetric ROI group (TID 1411) that refers to the segmentation; the prediction is
    a measurement group of its own (TID 1501) with codes of the private scheme ``99HNPETCT`` (:data:`PRIVATE_CODES`).
    Both name the model and state that they are for research use only. The report is unverified and preliminary.

    Args:
        path: where to; the file appears whole or not at all.
        findings: the numbers.
        ct: the CT used.
        pet: the PET used.
        model: what made the prediction.
        seg: the segmentation (:func:`write_seg`); needed when there are measurements of the tumour.
        notes: remarks for the reader, e.g. quality flags; each becomes a comment. Put nothing identifying in them.
        description: series description, 64 characters at most.
        series_number: of the new series.

    Returns:
        The dataset as written.

    Raises:
        DicomError: when there are measurements of a tumour and no segmentation, or nothing to report.
    """
    hd = _module("highdicom")
    with _lenient():
        measured, predicted = _tumour_measurements(findings), _predictions(findings)
        if measured and seg is None:
            raise DicomError("measurements of the tumour refer to its segmentation: give seg")
        groups = [_tumour_group(measured, seg, ct, model)] if measured else []
        statuses = _hpv_status(findings)
        groups += [_prediction_group(predicted, statuses, model)] if predicted or statuses else []
        if not groups:
            raise DicomError("nothing to report")
        for text in (RESEARCH_USE_ONLY, *notes):
            for group in groups:
                group[0].ContentSequence.append(_comment(text))
        report = hd.sr.MeasurementReport(
            observation_context=_observer(model),
            procedure_reported=[_code("LN", "44136-0", "PET unspecified body region")],
            imaging_measurements=groups,
            title=_code("DCM", "126000", "Imaging Measurement Report"),
        )
        evidence = [*_source_headers(ct), *_source_headers(pet), *([seg] if seg is not None else [])]
        document = hd.sr.ComprehensiveSR(
            evidence=evidence,
            content=report[0],
            series_instance_uid=hd.UID(),
            series_number=series_number,
            sop_instance_uid=hd.UID(),
            instance_number=1,
            manufacturer=model.manufacturer,
            manufacturer_model_name=model.name,
            software_versions=model.version,
            device_serial_number=model.weights[:64],
            is_complete=True,
            series_description=description,
            coding_schemes=[_private_scheme()],
            specific_character_set=UTF_8,
        )
        _save(document, path)
    return document


def _save(dataset: Dataset, path: str | PathLike[str]) -> None:
    with written_whole(path) as partial:
        dataset.save_as(partial, enforce_file_format=True)


def _source_headers(series: Series) -> list[Dataset]:
    """Headers to take patient and study tags from; a study id that is too long for DICOM is cut."""
    headers = read_headers(series)
    for header in headers:
        if "StudyID" in header:
            header.StudyID = _text(header, "StudyID")[:16]
    return headers


def _code(scheme: str, value: str, meaning: str) -> Any:
    return _module("highdicom").sr.CodedConcept(value=value, scheme_designator=scheme, meaning=meaning)


def _private_code(value: str) -> Any:
    return _code(PRIVATE_SCHEME, value, PRIVATE_CODES[value])


def _private_scheme() -> Any:
    return _module("highdicom.coding_schemes").CodingSchemeIdentificationItem(
        designator=PRIVATE_SCHEME, name="Head and neck PET/CT prediction", version="1"
    )


def _segment(model: Model) -> Any:
    hd = _module("highdicom")
    return hd.seg.SegmentDescription(
        segment_number=1,
        segment_label="Tumour",
        segmented_property_category=_code("SCT", "49755003", "Morphologically Abnormal Structure"),
        segmented_property_type=_neoplasm(),
        algorithm_type="AUTOMATIC",
        algorithm_identification=hd.AlgorithmIdentificationSequence(
            name=model.name,
            family=_artificial_intelligence(),
            version=model.version,
            source=model.manufacturer,
            parameters={"weights": model.weights},
        ),
        tracking_uid=hd.UID(),
        tracking_id="Tumour",
        anatomic_regions=[_head_and_neck()],
    )


def _neoplasm() -> Any:
    return _code("SCT", "108369006", "Neoplasm")


def _head_and_neck() -> Any:
    return _code("SCT", "774007", "Head and Neck")


def _artificial_intelligence() -> Any:
    return _code("DCM", "123110", "Artificial Intelligence")


def _algorithm(model: Model) -> Any:
    return _module("highdicom").sr.AlgorithmIdentification(
        name=model.name, version=model.version, parameters=[f"weights: {model.weights}"]
    )


def _observer(model: Model) -> Any:
    """The device that observes is the model; its UID is the same for the same model and weights."""
    sr = _module("highdicom").sr
    uid = _module("pydicom.uid").generate_uid(entropy_srcs=[model.name, model.version, model.weights])
    device = sr.DeviceObserverIdentifyingAttributes(
        uid=uid,
        name=model.name,
        manufacturer_name=model.manufacturer,
        model_name=f"{model.name} {model.version}",
        serial_number=model.weights,
    )
    context = sr.ObserverContext(observer_type=_code("DCM", "121007", "Device"), observer_identifying_attributes=device)
    return sr.ObservationContext(observer_device_context=context)


def _comment(text: str) -> Any:
    return _module("highdicom").sr.TextContentItem(
        name=_code("DCM", "121106", "Comment"), value=text, relationship_type="CONTAINS"
    )


def _measurement(name: Any, value: float, unit: tuple[str, str], derivation: Any = None) -> Any:
    return _module("highdicom").sr.Measurement(
        name=name, value=float(value), unit=_code("UCUM", *unit), derivation=derivation
    )


def _tumour_measurements(findings: Findings) -> list[Any]:
    suv, suv_unit = _code("DCM", "126401", "SUVbw"), ("g/ml{SUVbw}", "Standardized Uptake Value body weight")
    volume_unit, none = ("cm3", "cubic centimeter"), ("1", "no units")
    rows = [
        (_code("SCT", "118565006", "Volume"), findings.volume_ml, volume_unit, None),
        (suv, findings.suv_max, suv_unit, _code("SCT", "56851009", "Maximum")),
        (suv, findings.suv_mean, suv_unit, _code("SCT", "373098007", "Mean")),
        (_code("DCM", "126032", "Metabolic Volume"), findings.mtv_ml, volume_unit, None),
        (_code("DCM", "126033", "Total Lesion Glycolysis"), findings.tlg_g, ("g", "gram"), None),
        (_code("SCT", "246206008", "Number of lesions"), findings.lesions, none, None),
    ]
    return [_measurement(name, value, unit, how) for name, value, unit, how in rows if value is not None]


def _predictions(findings: Findings) -> list[Any]:
    none, percent = ("1", "no units"), ("%", "Percent")
    rows = [
        (_private_code("LOG_HAZARD"), findings.log_hazard, none),
        (_private_code("RISK_PERCENTILE"), findings.risk_percentile, percent),
        *((_survival_code(day), p, none) for day, p in sorted(findings.survival.items())),
        (_private_code("HPV_PROBABILITY"), findings.hpv_probability, none),
    ]
    return [_measurement(name, value, unit) for name, value, unit in rows if value is not None]


def _survival_code(days: int) -> Any:
    return _code(PRIVATE_SCHEME, f"RFS_{days:d}D", f"Predicted recurrence-free survival at {days:d} days")


def _hpv_status(findings: Findings) -> list[Any]:
    if findings.hpv_positive is None:
        return []
    value = ("10828004", "Positive") if findings.hpv_positive else ("260385009", "Negative")
    evaluation = _module("highdicom").sr.QualitativeEvaluation
    return [evaluation(name=_private_code("HPV_STATUS"), value=_code("SCT", *value))]


def _tumour_group(measurements: list[Any], seg: Any, ct: Series, model: Model) -> Any:
    sr = _module("highdicom").sr
    segment = seg.SegmentSequence[0]
    return sr.VolumetricROIMeasurementsAndQualitativeEvaluations(
        tracking_identifier=sr.TrackingIdentifier(uid=segment.TrackingUID, identifier=segment.TrackingID),
        referenced_segment=sr.ReferencedSegment(
            sop_class_uid=seg.SOPClassUID,
            sop_instance_uid=seg.SOPInstanceUID,
            segment_number=1,
            source_series=sr.SourceSeriesForSegmentation(ct.uid),
        ),
        finding_type=_neoplasm(),
        finding_sites=[sr.FindingSite(anatomic_location=_head_and_neck())],
        algorithm_id=_algorithm(model),
        measurements=measurements,
    )


def _prediction_group(measurements: list[Any], evaluations: list[Any], model: Model) -> Any:
    hd = _module("highdicom")
    return hd.sr.MeasurementsAndQualitativeEvaluations(
        tracking_identifier=hd.sr.TrackingIdentifier(uid=hd.UID(), identifier="Prediction"),
        finding_type=_private_code("PREDICTION"),
        algorithm_id=_algorithm(model),
        measurements=measurements,
        qualitative_evaluations=evaluations,
    )
