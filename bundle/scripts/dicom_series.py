"""The DICOM series in a folder, by their headers, and each as a volume.

:func:`find_series` reads the headers of whatever lies in a folder; :func:`read_series` gives a volume in HU or in the
PET's own units, which :func:`scripts.dicom_suv.suv_factor` turns into SUV.
"""

from __future__ import annotations

import logging
import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from .dicom_tags import (
    DicomError,
    cause_of,
    integer_of,
    lenient,
    needed_module,
    number_of,
    numbers_of,
    read_header,
    tag_name,
    text_of,
    words_of,
)
from .dicom_tracer import Tracer, tracer_of
from .geometry import Grid, field_of_view_fault
from .images import LPS_TO_RAS

if TYPE_CHECKING:
    from pydicom import Dataset

logger = logging.getLogger(__name__)

SAME_POSITION_MM = 0.01
CT_STORAGE = "1.2.840.10008.5.1.4.1.1.2"
PET_STORAGE = "1.2.840.10008.5.1.4.1.1.128"
# How far a slice may lie from where even spacing puts it: a share of the spacing, or what rounding to 0.1 mm explains.
GAP_TOLERANCE, ROUNDING_MM = 0.1, 0.1
SIDEWAYS_MM = 0.5  # over the whole stack; a tilted gantry moves far more
SAME_ORIENTATION = 1e-3  # direction cosines


@dataclass(frozen=True, eq=False, repr=False)
class Series:
    """The slices of one series that lie on one grid, by their headers.

    A series whose images differ in size, pixel spacing or direction (a scout filed with its scan) becomes several of
    these, with ``part`` 1, 2, ...; ``repeated`` counts files left out because they hold an image that is there already;
    ``damaged`` tells of a file that cannot be read and may be one of them (:class:`Damaged`), "" where there is none.
    Slices are sorted by their position along the normal of the slice plane.

    Args:
        paths: one file a slice.
        positions: (N, 3) mm (LPS+), the centre of each slice's first pixel; None where a header has none.
        orientation: (6,) direction cosines (LPS+) of a row and of a column; None where there are none.
        pixel_spacing: (2,) mm between rows and between columns; None where there is none.
        tracer: of a PET.
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
    tracer: Tracer = field(default_factory=Tracer)
    part: int = 0
    repeated: int = 0
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

        Example: ``series 4 (PT), 48 slices of 30 x 27, 5.47 x 5.47 x 3.27 mm, GML, attenuation corrected, FDG``
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
            words += [_AC_WORDS[self.attenuation_corrected], self.tracer.name or "tracer not known"]
        return ", ".join(words) + (f", {self.repeated} files repeated" if self.repeated else "")


class SeriesList(list[Series]):
    """The series found, and how many files were none.

    Args:
        series: what was found.
        ignored: files that are not DICOM, or DICOM without a series (a DICOMDIR).
        damaged: what is wrong with files that say they are DICOM and cannot be read.
    """

    def __init__(self, series: Sequence[Series] = (), ignored: int = 0, damaged: Sequence[str] = ()) -> None:
        super().__init__(series)
        self.ignored, self.damaged = ignored, tuple(damaged)


@dataclass(frozen=True, repr=False)
class Damaged:
    """A file that says it is DICOM and cannot be read, and what its header tells as far as it goes.

    Args:
        path: the file.
        problem: what is wrong, for people.
        uid: of its series, "" where the header ends before.
        patient_id: likewise.
    """

    path: Path
    problem: str
    uid: str = ""
    patient_id: str = ""

    @classmethod
    def of(cls, path: Path, header: Dataset | None, problem: str) -> Damaged:
        """From the readable part of the header, None where nothing of it can be read."""
        if header is None:
            return cls(path, problem)
        whole = {header[tag].keyword for tag in sorted(header.keys())[:-1]}  # the last value may be cut off
        told = (text_of(header, name) if name in whole else "" for name in ("SeriesInstanceUID", "PatientID"))
        return cls(path, problem, *told)

    def may_belong_to(self, series: Series) -> bool:
        """Whether it may be a slice of a series: of that series, or beside its files and told to be of no other."""
        if self.uid:
            return self.uid == series.uid
        beside = any(path.parent == self.path.parent for path in series.paths)
        return beside and self.patient_id in ("", series.patient_id)


_AC_WORDS = {True: "attenuation corrected", False: "not attenuation corrected", None: "attenuation correction unknown"}
_HEADER_TAGS = (
    *("SOPClassUID", "SOPInstanceUID", "Modality", "SeriesInstanceUID", "StudyInstanceUID", "PatientID"),
    *("FrameOfReferenceUID", "SeriesNumber", "ImageType", "SeriesType", "CorrectedImage", "Units"),
    *("ConvolutionKernel", "NumberOfSlices", "Rows", "Columns", "PixelSpacing"),
    *("ImageOrientationPatient", "ImagePositionPatient"),
    *("RadiopharmaceuticalInformationSequence", "SeriesDescription"),
)


def find_series(folder: str | PathLike[str]) -> SeriesList:
    """Read the headers of every DICOM file under a folder and sort them into series.

    Any mixture of series in any nesting will do. Pixels are not read.

    Args:
        folder: where to look, all levels below included.

    Returns:
        The series, in the order of their numbers, each cut where its images change size, spacing or direction; with
        ``.ignored``, the number of other files, and ``.damaged``. A series that a damaged file may belong to says so:
        a slice of it may be missing.

    Raises:
        DicomError: when the folder does not exist.
        ImportError: when pydicom is not installed.
    """
    if not Path(folder).is_dir():
        raise DicomError(f"{folder}: no such folder")
    groups: dict[str, list[tuple[Path, Dataset]]] = {}
    damaged: list[Damaged] = []
    ignored = 0
    with lenient():
        for path in sorted(p for p in Path(folder).rglob("*") if p.is_file()):
            header = None
            try:
                header = read_header(path, _HEADER_TAGS)
                if header is not None:
                    _check_whole(header, path)
            except DicomError as error:
                logger.warning("%s", error)
                damaged.append(Damaged.of(path, header, str(error)))
                continue
            if header is None or not text_of(header, "SeriesInstanceUID"):
                ignored += 1
            else:
                groups.setdefault(text_of(header, "SeriesInstanceUID"), []).append((path, header))
        series = [part for members in groups.values() for part in _series_of(members)]
    for file in reversed(damaged):  # the first in the folder has the last word
        series = [replace(s, damaged=file.problem) if file.may_belong_to(s) else s for s in series]
    problems = [file.problem for file in damaged]
    return SeriesList(sorted(series, key=lambda s: (s.number, s.uid, s.part)), ignored, problems)


def _check_whole(header: Dataset, path: Path) -> None:
    """Refuse an image, or what may be one, whose file ends within its header: pydicom reads as far as it goes."""
    kinds = {text_of(header, "SOPClassUID"), text_of(header.file_meta, "MediaStorageSOPClassUID")} - {""}
    if (not kinds or kinds & {CT_STORAGE, PET_STORAGE}) and not integer_of(header, "Rows"):
        raise DicomError(f"{path.name}: not a complete DICOM file (no Rows); copy it again or remove it")


def read_headers(series: Series) -> list[Dataset]:
    """The full headers, without pixels, of a series' slices in their order.

    Raises:
        DicomError: when a file has gone or cannot be read any more.
    """
    with lenient():
        headers = [read_header(path) for path in series.paths]
    if any(header is None for header in headers):
        raise DicomError(f"{series.label}: a file is no longer DICOM; look for the series again")
    return [header for header in headers if header is not None]


def _series_of(members: Sequence[tuple[Path, Dataset]]) -> list[Series]:
    """The images of one series, cut where they change grid."""
    parts: list[list[tuple[Path, Dataset]]] = []
    seen: set[str] = set()
    for path, header in members:
        instance = text_of(header, "SOPInstanceUID")
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
    if any(text_of(one, key) != text_of(other, key) for key in ("SOPClassUID", "Rows", "Columns")):
        return False
    for key, count in (("ImageOrientationPatient", 6), ("PixelSpacing", 2)):
        a, b = numbers_of(one, key, count), numbers_of(other, key, count)
        if a is None or b is None:
            if a is not b:
                return False
        elif not np.allclose(a, b, rtol=0, atol=SAME_ORIENTATION):
            return False
    return True


def _one_series(members: Sequence[tuple[Path, Dataset]]) -> Series:
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
        patient_id=text_of(header, "PatientID"),
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
    pydicom = needed_module("pydicom")
    volume: np.ndarray | None = None
    with lenient():
        for index, path in enumerate(series.paths):
            try:
                dataset = pydicom.dcmread(path)
            except (OSError, EOFError, ValueError, struct.error, pydicom.errors.InvalidDicomError) as error:
                raise DicomError(
                    f"{series.label}: {path.name}: cannot be read ({cause_of(error)}); copy it again"
                ) from error
            values = _rescaled(_pixels(dataset, series, path), dataset, f"{series.label}: {path.name}")
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
    grid = Grid((series.columns, series.rows, len(series)), LPS_TO_RAS @ lps)
    if fault := field_of_view_fault(grid.shape, grid.affine):
        raise DicomError(f"{where}: {fault}; is its Pixel Spacing (0028,0030) in mm?")
    return grid


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
        cause = " ".join(cause_of(error).split())
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
        return bool(needed_module("pydicom.pixels").get_decoder(syntax).is_available)
    except NotImplementedError:
        return False


def _rescaled(values: np.ndarray, dataset: Dataset, where: str) -> np.ndarray:
    """Stored values to HU or PET units; whole numbers stay int16 where they fit.

    Raises:
        DicomError: a PET without a slope: no scale can be taken for granted.
    """
    if text_of(dataset, "Modality").upper() == "PT" and not text_of(dataset, "RescaleSlope"):
        raise DicomError(
            f"{where}: {tag_name('RescaleSlope')} is missing or empty; a PET must have it: export it again"
        )
    slope = number_of(dataset, "RescaleSlope", 1.0)
    intercept = number_of(dataset, "RescaleIntercept", 0.0)
    whole = text_of(dataset, "Modality") == "CT" and slope == 1.0 and intercept.is_integer()
    if whole:
        low, high = int(values.min()) + int(intercept), int(values.max()) + int(intercept)
        if low >= -32768 and high <= 32767:
            return (values.astype(np.int32) + int(intercept)).astype(np.int16)
    # In float64, since stored values of 32 bits would lose digits before the slope is applied.
    return (values.astype(np.float64) * slope + intercept).astype(np.float32)
