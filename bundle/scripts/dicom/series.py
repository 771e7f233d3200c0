"""DICOM series in folders, and the volume of a series.

:func:`find_series` reads the headers of all files; :func:`read_series` gives a volume in HU or in the units of the PET,
which :func:`scripts.dicom.suv.suv_of` converts to SUV. highdicom's ``get_volume_from_series`` is not used: it does not
detect several of the faults that :func:`read_series` refuses, and does not say where a slice is missing.
"""

from __future__ import annotations

import filecmp
import logging
import math
import re
from collections import Counter
from collections.abc import Container, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import date
from functools import cached_property
from itertools import combinations
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from scripts.cohorts.scans import clean_id, counted
from scripts.dicom.files import (
    CONSTANT_TAGS,
    Damaged,
    Names,
    describe,
    is_archive,
    is_other,
    names_of,
    ought_to_be_dicom,
    pointed_at,
    walk,
)
from scripts.dicom.tags import (
    DicomError,
    cause_of,
    integer_of,
    lenient,
    needed_module,
    number_of,
    numbers_of,
    read_file,
    read_header,
    tag_name,
    text_of,
    words_of,
)
from scripts.dicom.tracer import Tracer, tracer_of
from scripts.imaging.geometry import Grid, field_of_view_fault
from scripts.imaging.images import LPS_TO_RAS

if TYPE_CHECKING:
    from pydicom import Dataset

logger = logging.getLogger(__name__)

SAME_POSITION_MM = 0.01
MOST_EDGE, MOST_VOXELS = 4096, 2**30  # limits of rows and columns of an image, and of voxels of a series
CT_STORAGE = "1.2.840.10008.5.1.4.1.1.2"
PET_STORAGE = "1.2.840.10008.5.1.4.1.1.128"
# Tolerance of a slice position against even spacing: a share of the spacing, or the effect of rounding to 0.1 mm.
GAP_TOLERANCE, ROUNDING_MM = 0.1, 0.1
SIDEWAYS_MM = 0.5  # over the whole stack; a tilted gantry gives far more
SAME_ORIENTATION = 1e-3  # direction cosines
# Difference of adjacent slices relative to that of slices two apart: 0.5 to 0.8 in real CT and PET, 1 in noise, 2 to 3
# where every second slice is of another patient.
LEAST_ALIKE = 1.3
AGAIN = "copy it again or remove it"
_SCANS = {"", "CT", "PT", CT_STORAGE, PET_STORAGE}


@dataclass(frozen=True, eq=False, repr=False)
class Series:
    """The slices of one series of one patient and study on one grid, from their headers.

    A series whose images differ in size, pixel spacing, orientation or frame of reference (a scout stored with its
    scan) becomes several of these, with ``part`` 1, 2, ... Slices are sorted by their position along the normal of the
    slice plane.

    Args:
        told: values of :data:`scripts.dicom.files.CONSTANT_TAGS` in the first file.
        people: (name, birth date, sex) of the patient, all combinations in the files.
        differing: a tag that differs although it must be equal in a series, "" where none does.
        paths: one file per slice.
        positions: (N, 3) mm (LPS+), the centre of each slice's first pixel; None where a header has none.
        orientation: (6,) direction cosines (LPS+) of a row and of a column; None where there are none.
        pixel_spacing: (2,) mm between rows and between columns; None where there is none.
        tracer: of a PET.
        day: date of the first image as ordinal number (``date.toordinal``); None where none is stated.
        start: minute of the first image by Acquisition Date and Time, counted from day 0; None where none is stated.
        lossy: whether an image was compressed with loss by Lossy Image Compression.
        repeated: files ignored as copies of another image.
        shared: images with the SOPInstanceUID of another image of the series.
        damaged: problem of a damaged file that may be one of its slices, "" where there is none.
    """

    modality: str
    sop_class: str
    uid: str
    study_uid: str
    study_date: str
    patient_id: str
    told: Mapping[str, str]
    people: frozenset[tuple[str, str, str]]
    differing: str
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
    tracer: Tracer = field(default_factory=Tracer)
    day: int | None = None
    start: int | None = None
    lossy: bool = False
    part: int = 0
    repeated: int = 0
    shared: int = 0
    damaged: str = ""

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
        """Whether the PET is attenuation corrected; None where it is not stated."""
        return None if self.corrections is None else "ATTN" in self.corrections

    @property
    def original(self) -> bool:
        """Whether the images are original, not derived."""
        return self.image_type[:1] == ("ORIGINAL",)

    @cached_property
    def grid(self) -> Grid:
        """The grid in mm (RAS+), array axes (column, row, slice).

        Raises:
            DicomError: when the slices do not form a regular upright stack.
        """
        return _stack(self)

    @property
    def label(self) -> str:
        """One line on the series, without anything that identifies a patient.

        Example: ``series 4 (PT), 48 slices of 30 x 27, 5.47 x 5.47 x 3.27 mm, GML, attenuation corrected, FDG``
        """
        part = f", part {self.part}" if self.part else ""
        words = [f"series {self.number}{part} ({self.modality or 'no modality'})"]
        words.append(
            f"{counted(len(self), 'slice')} of {self.columns} x {self.rows}"
            if self.rows
            else counted(len(self), "file")
        )
        if self.pixel_spacing is not None:
            sizes = [f"{self.pixel_spacing[1]:.2f}", f"{self.pixel_spacing[0]:.2f}"]
            if self.positions is not None and self.normal is not None and len(self) > 1:
                sizes.append(f"{np.median(np.diff(self.positions @ self.normal)):.2f}")
            words.append(f"{' x '.join(sizes)} mm")
        words += [text for text in (self.units, f"kernel {self.kernel}" if self.kernel else "") if text]
        if self.modality == "PT":
            words += [_AC_WORDS[self.attenuation_corrected], self.tracer.name or "tracer not known"]
        words += [f"{counted(self.repeated, 'file')} repeated"] if self.repeated else []
        words += [f"{self.shared} images with one SOP Instance UID (0008,0018) of several"] if self.shared else []
        return ", ".join(words)

    @cached_property
    def folders(self) -> frozenset[Path]:
        """Folders of its files."""
        return frozenset(path.parent for path in self.paths)

    @cached_property
    def names(self) -> dict[Path, Names]:
        """The pattern of its file names, by folder."""
        return names_of(self.paths)

    @property
    def complete(self) -> bool:
        """Whether it is known to be complete: a PET states its number of slices (0054,0081)."""
        return self.modality == "PT" and self.expected_slices == len(self) > 1


class SeriesList(list[Series]):
    """The series found, and the other files.

    Args:
        series: the series.
        files: number of files.
        others: files that are not DICOM.
        loose: files of DICOM that belong to no series (a DICOMDIR).
        damaged: files that cannot be read or assigned to a series.
        lost: those of them that may be part of a CT or PET and belong to none of the series.
        loops: number of links to a parent folder or to themselves.
    """

    def __init__(
        self,
        series: Sequence[Series] = (),
        files: int = 0,
        others: Sequence[Path] = (),
        loose: int = 0,
        damaged: Sequence[Damaged] = (),
        lost: Sequence[Damaged] = (),
        loops: int = 0,
    ) -> None:
        super().__init__(series)
        self.files, self.others, self.loose = files, tuple(others), loose
        self.damaged, self.lost, self.loops = tuple(damaged), tuple(lost), loops

    @property
    def account(self) -> str:
        """One line on the use of all files.

        Example: ``97 files: 96 in 2 DICOM series, 1 not DICOM (.txt 1)``
        """
        repeated = sum(series.repeated for series in self)
        used = sum(map(len, self)) + repeated
        words = [f"{used} in {len(self)} DICOM series" + (f" ({repeated} repeated)" if repeated else "")]
        if self.loose:
            words.append(f"{self.loose} DICOM of no series (DICOMDIR)")
        if self.others:
            endings = Counter(path.suffix.lower() or "no ending" for path in self.others)
            words.append(f"{len(self.others)} not DICOM ({', '.join(f'{e} {n}' for e, n in endings.most_common(5))})")
        if self.damaged:
            words.append(f"{len(self.damaged)} that cannot be used")
        loops = f"; {self.loops} circular links, not followed" if self.loops else ""
        return f"{counted(self.files, 'file')}: {', '.join(words)}{loops}"


_AC_WORDS = {True: "attenuation corrected", False: "not attenuation corrected", None: "attenuation correction unknown"}
_HEADER_TAGS = (
    *(*CONSTANT_TAGS, "SOPInstanceUID", "PatientName", "PatientBirthDate", "PatientSex"),
    *("FrameOfReferenceUID", "SeriesNumber", "ImageType", "SeriesType", "CorrectedImage", "Units"),
    *("ConvolutionKernel", "NumberOfSlices", "Rows", "Columns", "PixelSpacing", "AcquisitionNumber", "InstanceNumber"),
    *("ImageOrientationPatient", "ImagePositionPatient"),
    *("RadiopharmaceuticalInformationSequence", "SeriesDescription", "AcquisitionDate", "SeriesDate"),
    *("AcquisitionTime", "LossyImageCompression"),
)
_ALIKE = ("SOPClassUID", "Modality", "Rows", "Columns", "FrameOfReferenceUID")
_Files = list[tuple[Path, "Dataset"]]


def find_series(*folders: str | PathLike[str], without: Container[Path] = ()) -> SeriesList:
    """Read the headers of all DICOM files below folders and group them by series. Folders in ``without`` are ignored.

    Patients and series may be mixed in any folder structure, including links. Pixels are read only of files with equal
    SOPInstanceUID and position. Images without a SeriesInstanceUID count as damaged.

    Returns:
        The series, by patient, study and SeriesInstanceUID, in the order of their numbers, divided where images differ
        in size, spacing, orientation or frame of reference; and the other files. ``damaged`` is set for series that a
        damaged file may belong to, since a slice may be missing.

    Raises:
        DicomError: a folder does not exist.
        ImportError: pydicom is not installed.
    """
    for folder in folders:
        if not Path(folder).is_dir():
            raise DicomError(f"{folder}: no such folder")
    found = walk(*map(Path, folders), without=without)
    groups: dict[tuple[str, ...], _Files] = {}
    others, damaged, loose = list(found.others), list(found.damaged), 0
    with lenient():
        for path in found.files:
            header = _header_of(path)
            if header is None:
                others.append(path)
            elif isinstance(header, Damaged):
                damaged.append(header)
            elif not text_of(header, "SeriesInstanceUID"):
                loose += 1
            else:
                uids = (text_of(header, "StudyInstanceUID"), text_of(header, "SeriesInstanceUID"))
                groups.setdefault((_patient(header), *uids), []).append((path, header))
        series = [part for members in groups.values() for part in _series_of(members)]
    named = [(folder, names) for each in series for folder, names in each.names.items()]
    stray = {
        path
        for path in others
        if not is_other(path) and any(path.parent == folder and names.near(path.name) for folder, names in named)
    }
    others = [path for path in others if path not in stray]
    damaged += [Damaged(path, f"not DICOM, but named like the series in its folder; {AGAIN}") for path in sorted(stray)]
    for line in describe(damaged):
        logger.warning("%s", line)
    archives = [path for path in others if is_archive(path)]
    for line in describe([Damaged(path, "archives are not read; unpack those with scans") for path in archives]):
        logger.warning("%s", line)
    series, lost = _blamed(series, damaged)
    series.sort(key=lambda s: (s.number, s.uid, s.part))
    files = len(found.files) + len(found.others) + len(found.damaged)
    return SeriesList(series, files, others, loose, damaged, lost, len(found.loops))


def _header_of(path: Path) -> Dataset | Damaged | None:
    """A file's header, or its problem; None for a file of another type."""
    header = None
    try:
        header = read_header(path, _HEADER_TAGS)
        if header is None:
            problem = ought_to_be_dicom(path)
            return Damaged(path, problem) if problem else None
        kinds = _check_whole(header, path)
    except DicomError as error:
        if header is None and is_other(path):
            return None
        return Damaged.of(path, header, str(error).removeprefix(f"{path.name}: "))
    if not text_of(header, "SeriesInstanceUID") and (not kinds or kinds & {CT_STORAGE, PET_STORAGE}):
        problem = f"no {tag_name('SeriesInstanceUID')}, which identifies the series; export the series again"
        return Damaged.of(path, header, problem, cut_off=False)
    return header


def _check_whole(header: Dataset, path: Path) -> set[str]:
    """The SOP classes that a file states, normally one; refuses a (possible) image that ends within its header."""
    kinds = {text_of(header, "SOPClassUID"), text_of(header.file_meta, "MediaStorageSOPClassUID")} - {""}
    if (not kinds or kinds & {CT_STORAGE, PET_STORAGE}) and not integer_of(header, "Rows"):
        raise DicomError(f"{path.name}: not a complete DICOM file (no Rows); {AGAIN}")
    return kinds


def _blamed(series: Sequence[Series], damaged: Sequence[Damaged]) -> tuple[list[Series], list[Damaged]]:
    """The series with the problems of damaged files that may belong to them, and damaged files of no series.

    The possible series are restricted by the file's name, and by PETs that are complete.
    """
    faults: dict[int, list[Damaged]] = {}
    lost = []
    for each in damaged:
        possible = [k for k, one in enumerate(series) if each.may_belong_to(one.told, one.folders)]
        for k in (possible[n] for n in pointed_at(each.path, [series[k].names for k in possible])):
            if not series[k].complete:
                faults.setdefault(k, []).append(each)
        if not possible and {each.told.get("SOPClassUID", ""), each.told.get("Modality", "")} <= _SCANS:
            lost.append(each)
    marked = [
        replace(one, damaged="; ".join(describe(faults[k]))) if k in faults else one for k, one in enumerate(series)
    ]
    return marked, lost


def read_headers(series: Series) -> list[Dataset]:
    """The full headers, without pixels, of a series' slices in their order.

    Raises:
        DicomError: a file has been removed or cannot be read any more.
    """
    with lenient():
        headers = [read_header(path) for path in series.paths]
    if any(header is None for header in headers):
        raise DicomError(f"{series.label}: a file is no longer DICOM; find the series again")
    return [header for header in headers if header is not None]


def _series_of(members: _Files) -> list[Series]:
    """The images of one series, divided by grid."""
    parts: list[_Files] = []
    for path, header in members:
        part = next((part for part in parts if _same_grid(part[0][1], header)), None)
        if part is None:
            parts.append([(path, header)])
        else:
            part.append((path, header))
    differing = _differing([member for part in parts for member in _without_copies(part)[0]])
    series = [replace(_one_series(part), differing=differing) for part in parts]
    return series if len(series) == 1 else [replace(s, part=k) for k, s in enumerate(series, start=1)]


def _without_copies(members: _Files) -> tuple[_Files, int]:
    """The images without copies, and the number of images with the SOPInstanceUID of another one."""
    kept: dict[str, _Files] = {}
    for path, header in members:
        alike = kept.setdefault(text_of(header, "SOPInstanceUID"), [])
        if not any(_same_image(path, header, *other) for other in alike):
            alike.append((path, header))
    shared = sum(len(alike) for uid, alike in kept.items() if uid and len(alike) > 1)
    images = [member for alike in kept.values() for member in alike]
    return sorted(images, key=lambda member: member[0]), shared


def _same_image(path: Path, header: Dataset, other: Path, other_header: Dataset) -> bool:
    """Whether two files of equal, stated SOPInstanceUID have the same image at the same position."""
    if not text_of(header, "SOPInstanceUID") or not np.array_equal(_place(header), _place(other_header)):
        return False
    if path.samefile(other) or filecmp.cmp(path, other, shallow=False):
        return True
    try:
        images = [read_file(each) for each in (path, other)]
        values = [_rescaled(_decoded(image), image, "") for image in images if image is not None]
    except Exception:  # unreadable pixels are reported when the series is read
        return False
    return len(values) == 2 and np.array_equal(values[0], values[1])


def _place(header: Dataset) -> np.ndarray:
    """Position of an image in units of :data:`SAME_POSITION_MM`; empty where it is not stated."""
    place = numbers_of(header, "ImagePositionPatient", 3)
    return np.array([]) if place is None else np.round(place / SAME_POSITION_MM)


def _differing(members: _Files) -> str:
    """A tag that differs among the files of one series although it must be equal; "" where none does."""
    people = people_differ({_person(header) for _, header in members})
    if people:
        return people
    for name in ("StudyDate", "SeriesNumber"):
        if len({text_of(header, name) for _, header in members}) > 1:
            return tag_name(name)
    numbers = Counter(
        (text_of(header, "AcquisitionNumber"), text_of(header, "InstanceNumber")) for _, header in members
    )
    twice = sum(count for count in numbers.values() if count > 1)
    if len(numbers) > 1 and 2 * twice > len(members):
        return f"the place that one {tag_name('InstanceNumber')} has"
    return ""


def _day(header: Dataset) -> int | None:
    """The date of an image, otherwise of its series, see :attr:`Series.day`."""
    for keyword in ("AcquisitionDate", "SeriesDate"):
        text = text_of(header, keyword).replace(".", "")
        if re.fullmatch(r"\d{8}", text, re.ASCII):
            with suppress(ValueError):
                return date(int(text[:4]), int(text[4:6]), int(text[6:])).toordinal()
    return None


def _minute(header: Dataset) -> int | None:
    """The date and time of an image, see :attr:`Series.start`."""
    day, clock = _day(header), re.match(r"([01]\d|2[0-3]):?([0-5]\d)", text_of(header, "AcquisitionTime"), re.ASCII)
    return None if day is None or clock is None else (day * 24 + int(clock[1])) * 60 + int(clock[2])


def _patient(header: Dataset) -> str:
    return clean_id(text_of(header, "PatientID")) if text_of(header, "PatientID") else ""


def _person(header: Dataset) -> tuple[str, str, str]:
    return (
        text_of(header, "PatientName"),
        text_of(header, "PatientBirthDate").replace(".", ""),
        text_of(header, "PatientSex").upper(),
    )


def people_differ(people: Iterable[tuple[str, str, str]]) -> str:
    """The tag by which (name, birth date, sex) are of different people, "" where they may all be of one.

    What is not stated differs from nothing; names differ where they have no word in common, so that spellings,
    titles and middle names may.

    Example:
        >>> people_differ([("Doe^Jane", "19600101", "F"), ("DOE^JANE^^Dr", "", ""), ("", "19600101", "O")])
        ''
        >>> people_differ([("Doe^Jane", "", ""), ("Roe^Richard", "", "")])
        "Patient's Name (0010,0010)"
    """
    people = list(people)
    if len({birth for _, birth, _ in people if birth}) > 1:
        return tag_name("PatientBirthDate")
    if len({sex for _, _, sex in people} & {"M", "F"}) > 1:
        return tag_name("PatientSex")
    names = [words for name, _, _ in people if (words := set(re.findall(r"\w+", name.upper().replace("_", " "))))]
    apart = any(not one & other for one, other in combinations(names, 2))
    return tag_name("PatientName") if apart else ""


def _same_grid(one: Dataset, other: Dataset) -> bool:
    if any(text_of(one, key) != text_of(other, key) for key in _ALIKE):
        return False
    if len({"LOCALIZER" in words_of(each, "ImageType") for each in (one, other)}) > 1:  # axial, as the slices are
        return False
    for key, count in (("ImageOrientationPatient", 6), ("PixelSpacing", 2)):
        a, b = numbers_of(one, key, count), numbers_of(other, key, count)
        if a is None or b is None:
            if a is not b:
                return False
        elif not np.allclose(a, b, rtol=0, atol=SAME_ORIENTATION):
            return False
    return True


def _one_series(files: _Files) -> Series:
    members, shared = _without_copies(files)
    header = members[0][1]
    orientation = _unit_axes(numbers_of(header, "ImageOrientationPatient", 6))
    spacing = numbers_of(header, "PixelSpacing", 2)
    paths = [path for path, _ in members]
    found = [numbers_of(each, "ImagePositionPatient", 3) for _, each in members]
    positions = None if orientation is None or any(p is None for p in found) else np.array(found)
    if positions is not None and orientation is not None:
        order = np.argsort(positions @ np.cross(orientation[:3], orientation[3:]), kind="stable")
        positions, paths = positions[order], [paths[k] for k in order]
    return Series(
        modality=text_of(header, "Modality").upper(),
        sop_class=text_of(header, "SOPClassUID"),
        uid=text_of(header, "SeriesInstanceUID"),
        study_uid=text_of(header, "StudyInstanceUID"),
        study_date=text_of(header, "StudyDate").replace(".", ""),
        patient_id=_patient(header),
        told={name: text_of(header, name) for name in CONSTANT_TAGS},
        people=frozenset(_person(each) for _, each in members),
        differing=_differing(members),
        frame_of_reference=text_of(header, "FrameOfReferenceUID"),
        number=integer_of(header, "SeriesNumber"),
        image_type=words_of(header, "ImageType"),
        series_type=words_of(header, "SeriesType"),
        corrections=words_of(header, "CorrectedImage") or None,
        units=text_of(header, "Units").upper(),
        kernel=" ".join(words_of(header, "ConvolutionKernel")),
        expected_slices=integer_of(header, "NumberOfSlices"),
        rows=integer_of(header, "Rows"),
        columns=integer_of(header, "Columns"),
        orientation=orientation,
        pixel_spacing=None if spacing is None or spacing.min() <= 0 else spacing,
        paths=tuple(paths),
        positions=positions,
        tracer=tracer_of(header) if text_of(header, "Modality").upper() == "PT" else Tracer(),
        day=min((day for _, each in members if (day := _day(each)) is not None), default=None),
        start=min((minute for _, each in members if (minute := _minute(each)) is not None), default=None),
        lossy=any(text_of(each, "LossyImageCompression") == "01" for _, each in members),
        repeated=len(files) - len(members),
        shared=shared,
    )


def _unit_axes(orientation: np.ndarray | None) -> np.ndarray | None:
    """Direction cosines normalised to unit length; None where they are not perpendicular."""
    if orientation is None:
        return None
    row, column = orientation[:3], orientation[3:]
    lengths = np.linalg.norm(row), np.linalg.norm(column)
    if min(lengths) < 0.5 or abs(row @ column) > 1e-2:
        return None
    return np.concatenate([row / lengths[0], column / lengths[1]])


def read_series(series: Series) -> tuple[np.ndarray, np.ndarray]:
    """Read a series as a volume.

    Slices are sorted by position along their normal, not by instance number. The rescale slope and intercept of each
    slice are applied (those of PET differ between slices).

    Returns:
        The (X, Y, Z) array (column, row, slice), int16 for a CT whose rescaled values are whole numbers that fit and
        float32 otherwise, in HU or in the PET's units; and the (4, 4) float64 affine to world mm (RAS+).

    Raises:
        DicomError: slices are missing, duplicate, unevenly spaced or of two interleaved scans, the gantry was tilted,
            slices of a CT have different scales, or the pixels cannot be decoded.
    """
    affine = series.grid.affine
    if len(series) * series.rows * series.columns > MOST_VOXELS:
        size = f"{series.columns} x {series.rows} x {len(series)}"
        raise DicomError(f"{series.label}: {size} voxels, more than any scan has; export the series again")
    volume: np.ndarray | None = None
    scales: set[tuple[str, str]] = set()
    with lenient():
        for index, path in enumerate(series.paths):
            try:
                dataset = read_file(path)
            except DicomError as error:
                raise DicomError(f"{series.label}: {error}") from error
            if dataset is None:
                raise DicomError(f"{series.label}: {path.name}: no longer DICOM; find the series again")
            values = _rescaled(_pixels(dataset, series, path), dataset, f"{series.label}: {path.name}")
            scales.add((text_of(dataset, "RescaleSlope"), text_of(dataset, "RescaleIntercept")))
            if volume is None:
                volume = np.empty((len(series), series.rows, series.columns), dtype=values.dtype)
            elif values.dtype == np.float32 != volume.dtype:
                volume = volume.astype(np.float32)
            volume[index] = values
    assert volume is not None  # a grid has at least two slices
    if series.modality == "CT":
        _check_scales(scales, series.label)
    _check_one_body(volume, series.label)
    return volume.transpose(2, 1, 0), affine.copy()


def _check_scales(scales: set[tuple[str, str]], where: str) -> None:
    """Refuse a CT with (slope, intercept) missing in some slices, or with several intercepts for one slope."""
    for place, name in enumerate(("RescaleSlope", "RescaleIntercept")):
        if len({bool(scale[place]) for scale in scales}) > 1:
            raise DicomError(f"{where}: {tag_name(name)} is missing or empty in some slices; export the series again")
    numbers = {(float(slope or 1), float(intercept or 0)) for slope, intercept in scales}
    if len({slope for slope, _ in numbers}) < len(numbers):
        raise DicomError(
            f"{where}: slices of one {tag_name('RescaleSlope')} differ in {tag_name('RescaleIntercept')}: some are not "
            "in HU; export the series again"
        )


def _check_one_body(volume: np.ndarray, where: str) -> None:
    """Refuse a volume (N, rows, columns) of two interleaved scans: adjacent slices differ more than those two apart."""
    near = far = 0.0
    before: list[np.ndarray] = []
    for values in volume:
        now = values.astype(np.float32)
        if len(before) == 2:
            near += float(np.abs(now - before[1]).mean())
            far += float(np.abs(now - before[0]).mean())
        before = [*before[-1:], now]
    if near > LEAST_ALIKE * far:
        raise DicomError(
            f"{where}: slices are less like their neighbours than like the next but one: the series holds slices of "
            "two scans or patients in turn; sort them apart, or export them again"
        )


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
    grid = Grid((series.columns, series.rows, len(series)), LPS_TO_RAS @ lps)
    if fault := field_of_view_fault(grid.shape, grid.affine):
        raise DicomError(f"{where}: {fault}; is its Pixel Spacing (0028,0030) in mm?")
    return grid


def _check_gaps(depth: np.ndarray, where: str) -> None:
    """Refuse duplicate, missing and unevenly spaced slices at ``depth`` (N,) mm along the normal."""
    gaps = np.diff(depth)
    step = float(np.median(gaps))
    doubled = np.flatnonzero(gaps < SAME_POSITION_MM)
    if len(doubled):
        raise DicomError(
            f"{where}: {len(doubled)} positions hold more than one image, the first at {depth[doubled[0]]:.2f} mm "
            f"(slice {doubled[0] + 1}); several time points, reconstructions or patients are mixed: keep one"
        )
    stretches = _stretches(depth)
    if len(stretches) > 1:
        listed = ", ".join(f"{gap:.2f} mm from {low:.2f} to {high:.2f} mm" for gap, low, high in stretches)
        raise DicomError(
            f"{where}: the slice spacing changes: {listed}. A volume has one: reconstruct or resample the series to "
            "one spacing, or keep the part with the head and neck; if it should have one spacing, slices are missing"
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


def _stretches(depth: np.ndarray) -> list[tuple[float, float, float]]:
    """Spacing, start and end (mm) of the parts of even spacing, if slices at ``depth`` (N,) have several spacings.

    Empty if a part has fewer than three slices: a single gap is not another spacing.
    """
    ends, found = [0], []
    for k in range(1, len(depth)):
        spacing = depth[ends[-1] + 1] - depth[ends[-1]]
        if abs(depth[k] - depth[k - 1] - spacing) > max(GAP_TOLERANCE * spacing, ROUNDING_MM):
            found.append((float(spacing), float(depth[ends[-1]]), float(depth[k - 1])))
            ends.append(k - 1)
    found.append((float(depth[ends[-1] + 1] - depth[ends[-1]]), float(depth[ends[-1]]), float(depth[-1])))
    counts = np.diff([*ends, len(depth) - 1])
    return found if counts.min() > 1 else []


def _check_upright(sideways: np.ndarray, length: float, where: str) -> None:
    """Refuse slices shifted by (N, 3) mm within their plane: a tilted gantry, or a moved table."""
    drift = sideways - sideways[0]
    total = float(np.linalg.norm(drift[-1]))
    if total > SIDEWAYS_MM:
        angle = math.degrees(math.atan2(total, length))
        raise DicomError(
            f"{where}: the slices are stacked at {angle:.1f} degrees to their normal (tilted gantry), which a volume "
            "of rectangular voxels cannot represent; resample it first"
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
        values = _decoded(dataset)
    except Exception as error:  # damaged bytes end in nearly any error
        cause = " ".join(cause_of(error).split())
        raise DicomError(f"{where}: pixel data cannot be decoded ({cause}); copy the file again") from error
    if values.shape != (series.rows, series.columns):
        raise DicomError(f"{where}: pixel data of shape {values.shape}, not one grey image")
    return values


def _decoded(dataset: Dataset) -> np.ndarray:
    """The stored values of one image, after a check of its size, before a decoder allocates memory.

    Raises:
        ValueError: for more than one grey image of at most :data:`MOST_EDGE` rows and columns.
    """
    told = {name: integer_of(dataset, name) for name in ("Rows", "Columns", "NumberOfFrames", "SamplesPerPixel")}
    if max(told["Rows"], told["Columns"]) > MOST_EDGE or told["NumberOfFrames"] > 1 or told["SamplesPerPixel"] > 1:
        size = f"{told['Rows']} x {told['Columns']}"
        more = f" of {told['NumberOfFrames'] or 1} frames with {told['SamplesPerPixel'] or 1} values a pixel"
        raise ValueError(
            f"the header states {size} pixels{more}, not one grey image of at most {MOST_EDGE} x {MOST_EDGE}"
        )
    values: np.ndarray = dataset.pixel_array
    return values


def _decodable(dataset: Dataset) -> bool:
    """Whether a decoder for the dataset's transfer syntax is installed."""
    syntax = dataset.file_meta.get("TransferSyntaxUID")
    if syntax is None:
        return False
    if not syntax.is_encapsulated:
        return True
    try:
        return bool(needed_module("pydicom.pixels").get_decoder(syntax).is_available)
    except NotImplementedError:
        return False


def _rescaled(values: np.ndarray, dataset: Dataset, where: str) -> np.ndarray:
    """Stored values in HU or PET units; integers remain int16 if they fit.

    Raises:
        DicomError: a PET without a slope; a slope that is not above 0, except in an image of zeros, where some software
            derives the slope from the maximum.
    """
    if text_of(dataset, "Modality").upper() == "PT" and not text_of(dataset, "RescaleSlope"):
        raise DicomError(
            f"{where}: {tag_name('RescaleSlope')} is missing or empty; a PET must have it: export it again"
        )
    slope = number_of(dataset, "RescaleSlope", 1.0)
    if slope <= 0 and values.any():
        raise DicomError(f"{where}: {tag_name('RescaleSlope')} is {slope:g}, not above 0; export the series again")
    intercept = number_of(dataset, "RescaleIntercept", 0.0)
    whole = text_of(dataset, "Modality") == "CT" and slope == 1.0 and intercept.is_integer()
    if whole:
        low, high = int(values.min()) + int(intercept), int(values.max()) + int(intercept)
        if low >= -32768 and high <= 32767:
            return (values.astype(np.int32) + int(intercept)).astype(np.int16)
    # float64, since stored values of 32 bits would lose precision before the slope is applied
    return (values.astype(np.float64) * slope + intercept).astype(np.float32)
