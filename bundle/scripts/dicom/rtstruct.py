"""Lesions as a DICOM RT Structure Set: closed planar contours on the slices of the CT."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from datetime import datetime
from itertools import pairwise
from os import PathLike
from typing import TYPE_CHECKING, Any

import contourpy
import numpy as np

from scripts.dicom.seg import LONGEST_TEXT, PATIENT_AND_STUDY, UTF_8, Model, check_numbers, save_whole, source_headers
from scripts.dicom.series import Series
from scripts.dicom.tags import lenient, needed_module
from scripts.imaging.lesions import COLOURS, Lesion

if TYPE_CHECKING:
    from pydicom import Dataset

RTSTRUCT_SERIES_NUMBER = 9103
RTSTRUCT_STORAGE = "1.2.840.10008.5.1.4.1.1.481.3"
DETACHED_STUDY = "1.2.840.10008.3.1.2.3.1"  # the retired class by which structure sets refer to a study


def write_rtstruct(
    path: str | PathLike[str],
    numbers: np.ndarray,
    lesions: Sequence[Lesion],
    source: Series,
    *,
    model: Model,
    description: str = "Tumour contours, automatic; research use only",
) -> Dataset:
    """Write lesions as a DICOM RT Structure Set with one ROI for each, unapproved.

    A contour passes halfway between the centres of voxels inside and outside, so that the centres within it are the
    mask's. A hole is joined to its outer contour by a channel without width ("keyhole technique" of PS3.3, C.8.8.6.3),
    which readers that fill polygons need not know about. Without a lesion there is one ROI ``GTV`` without contours.

    Raises:
        scripts.dicom.tags.DicomError: when the numbers are not on the grid of ``source`` or no lesion has them; when
            the CT lacks a UID by which contours refer to it.
    """
    check_numbers(numbers, lesions, source)
    headers = source_headers(source)
    described = [(lesion.name, lesion.label, lesion.volume_ml) for lesion in lesions] or [("GTV", "GTV", 0.0)]
    with lenient():
        dataset = _structure_set(headers, model)
        dataset.SeriesDescription, dataset.SeriesNumber = description, RTSTRUCT_SERIES_NUMBER
        dataset.StructureSetROISequence, dataset.ROIContourSequence = [], []
        dataset.RTROIObservationsSequence = []
        for number, (name, label, volume) in enumerate(described, start=1):
            region = _item(
                ROINumber=number,
                ReferencedFrameOfReferenceUID=source.frame_of_reference,
                ROIName=name,
                ROIVolume=f"{volume:.6g}",
                ROIGenerationAlgorithm="AUTOMATIC",
                ROIDescription=" ".join(model.statements)[:LONGEST_TEXT],
            )
            outlines = _item(ROIDisplayColor=list(COLOURS[label]), ReferencedROINumber=number)
            if lesions:
                outlines.ContourSequence = _contours(numbers, number, lesions[number - 1], source, headers)
            observation = _item(
                ObservationNumber=number, ReferencedROINumber=number, RTROIInterpretedType="GTV", ROIInterpreter=""
            )
            dataset.StructureSetROISequence.append(region)
            dataset.ROIContourSequence.append(outlines)
            dataset.RTROIObservationsSequence.append(observation)
        save_whole(dataset, path)
    return dataset


def _structure_set(headers: Sequence[Dataset], model: Model) -> Dataset:
    """A structure set of the CT with these headers, without regions."""
    pydicom, uids, now, first = needed_module("pydicom"), needed_module("pydicom.uid"), datetime.now(), headers[0]
    dataset = pydicom.Dataset()
    dataset.file_meta = pydicom.dataset.FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = uids.ExplicitVRLittleEndian
    dataset.SpecificCharacterSet = UTF_8
    dataset.SOPClassUID, dataset.SOPInstanceUID = RTSTRUCT_STORAGE, uids.generate_uid(prefix=None)
    dataset.Modality, dataset.SeriesInstanceUID = "RTSTRUCT", uids.generate_uid(prefix=None)
    for keyword in PATIENT_AND_STUDY:
        value = first[keyword].value
        setattr(dataset, keyword, str(value) if value is not None else "")
    dataset.Manufacturer, dataset.ManufacturerModelName = model.manufacturer, model.name
    dataset.SoftwareVersions, dataset.DeviceSerialNumber = model.version, model.weights[:64]
    dataset.InstanceCreationDate = dataset.StructureSetDate = f"{now:%Y%m%d}"
    dataset.InstanceCreationTime = dataset.StructureSetTime = f"{now:%H%M%S}"
    dataset.InstanceNumber, dataset.OperatorsName = 1, ""
    dataset.StructureSetLabel, dataset.StructureSetName = "Tumour", "Research use only"
    dataset.ApprovalStatus = "UNAPPROVED"
    dataset.FrameOfReferenceUID, dataset.PositionReferenceIndicator = first.FrameOfReferenceUID, ""
    series = _item(SeriesInstanceUID=first.SeriesInstanceUID, ContourImageSequence=[_image(h) for h in headers])
    study = _item(
        ReferencedSOPClassUID=DETACHED_STUDY,
        ReferencedSOPInstanceUID=first.StudyInstanceUID,
        RTReferencedSeriesSequence=[series],
    )
    frame = _item(FrameOfReferenceUID=first.FrameOfReferenceUID, RTReferencedStudySequence=[study])
    dataset.ReferencedFrameOfReferenceSequence = [frame]
    return dataset


def _contours(
    numbers: np.ndarray, number: int, lesion: Lesion, source: Series, headers: Sequence[Dataset]
) -> list[Dataset]:
    """The contours of a lesion as items of a ContourSequence, slice by slice."""
    x, y, z = lesion.window
    items: list[Dataset] = []
    for k in range(z.start, z.stop):
        for polygon in polygons(numbers[x, y, k] == number):
            points = _positions(polygon + np.array([x.start, y.start]), source, k)
            items.append(
                _item(
                    ContourNumber=len(items) + 1,
                    ContourImageSequence=[_image(headers[k])],
                    ContourGeometricType="CLOSED_PLANAR",
                    NumberOfContourPoints=len(points),
                    ContourData=[_decimal(value) for value in points.ravel()],
                )
            )
    return items


def polygons(part: np.ndarray) -> Iterator[np.ndarray]:
    """Outlines (N, 2) of a binary image (X, Y) in its voxel indices, holes joined to their outer contours.

    The last point is not the first one again.
    """
    generator = contourpy.contour_generator(
        x=np.arange(-1, part.shape[0] + 1),
        y=np.arange(-1, part.shape[1] + 1),
        z=np.pad(part, 1).T.astype(float),
        fill_type=contourpy.FillType.OuterOffset,
    )
    for points, offsets in zip(*generator.filled(0.5, 2.0), strict=True):
        rings = [points[a : b - 1] for a, b in pairwise(offsets)]
        yield _without_straight(_joined(rings))


def _joined(rings: Sequence[np.ndarray]) -> np.ndarray:
    """An outer ring and its holes as one.

    From left to right, the leftmost point of each hole is joined to the nearest point to its left, so that no channel
    crosses a hole that is joined later.
    """
    whole = rings[0]
    for ring in sorted(rings[1:], key=lambda hole: hole[:, 0].min()):
        hole = np.roll(ring, -int(ring[:, 0].argmin()), axis=0)
        distances = np.linalg.norm(whole - hole[0], axis=1)
        distances[whole[:, 0] > hole[0, 0]] = np.inf
        here = int(distances.argmin())
        whole = np.concatenate([whole[: here + 1], hole, hole[:1], whole[here:]])
    return whole


def _without_straight(ring: np.ndarray) -> np.ndarray:
    """A closed ring without the points on straight lines between their neighbours; those where it turns back stay."""
    before, after = ring - np.roll(ring, 1, axis=0), np.roll(ring, -1, axis=0) - ring
    cross = before[:, 0] * after[:, 1] - before[:, 1] * after[:, 0]
    return ring[(np.abs(cross) > 1e-9) | ((before * after).sum(axis=1) <= 0)]


def _positions(indices: np.ndarray, source: Series, k: int) -> np.ndarray:
    """Positions (N, 3) in mm (LPS+) of indices (column, row) (N, 2) on the k-th slice, by its own header."""
    assert source.positions is not None and source.orientation is not None and source.pixel_spacing is not None
    between_rows, between_columns = source.pixel_spacing
    along_row, along_column = source.orientation[:3], source.orientation[3:]
    return (
        source.positions[k]
        + np.outer(indices[:, 0] * between_columns, along_row)
        + np.outer(indices[:, 1] * between_rows, along_column)
    )


def _decimal(value: float) -> str:
    """A position in mm as a decimal string, which has 16 characters at most."""
    return f"{value:.4f}".replace("-0.0000", "0.0000")


def _image(header: Dataset) -> Dataset:
    return _item(ReferencedSOPClassUID=header.SOPClassUID, ReferencedSOPInstanceUID=header.SOPInstanceUID)


def _item(**values: Any) -> Dataset:
    item = needed_module("pydicom").Dataset()
    for name, value in values.items():
        setattr(item, name, value)
    return item
