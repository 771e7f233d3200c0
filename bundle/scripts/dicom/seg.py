"""Lesions as a DICOM segmentation, and what all DICOM objects written here share: model, source headers, codes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from os import PathLike
from typing import TYPE_CHECKING, Any

import numpy as np

from scripts.cohorts.files import written_whole
from scripts.dicom.series import Series, read_headers
from scripts.dicom.tags import DicomError, lenient, needed_module, numbers_of, tag_name, text_of
from scripts.imaging.lesions import COLOURS, Lesion
from scripts.keys import RESEARCH_USE_ONLY

if TYPE_CHECKING:
    from pydicom import Dataset

LONGEST_TEXT = 1024  # letters of a short text (ST)
SEG_SERIES_NUMBER = 9101  # far above those of scanners
UTF_8 = "ISO_IR 192"  # for names and notes in any script
# Of a lesion's class: type and region of the segment. Nothing is said of primary or node where they are one label.
HEAD_AND_NECK = ("774007", "Head and Neck")
CODES = {
    "GTV": (("108369006", "Neoplasm"), HEAD_AND_NECK),
    "GTVp": (("372087000", "Neoplasm, Primary"), HEAD_AND_NECK),
    "GTVn": (("14799000", "Neoplasm, Secondary"), ("312501005", "lymph node of head and neck")),
}
REFERRED = ("SOPClassUID", "SOPInstanceUID", "SeriesInstanceUID", "StudyInstanceUID")
# Patient and study in every DICOM object, with an empty value where unknown (type 2).
DESCRIBED = ("PatientID", "PatientName", "AccessionNumber", "StudyID", "ReferringPhysicianName")
PATIENT_AND_STUDY = (*DESCRIBED, "PatientBirthDate", "PatientSex", "StudyDate", "StudyTime", "StudyInstanceUID")
SEXES = ("M", "F", "O")


@dataclass(frozen=True)
class Model:
    """What made a result, as it is written into the DICOM objects.

    Args:
        name: of the model.
        version: of the model.
        manufacturer: who is behind it.
        weights: identifies the weights, e.g. their SHA-256; written as serial number and parameter.
        trained_on: what the model was trained on, in words.
    """

    name: str
    version: str
    manufacturer: str
    weights: str = "unknown"
    trained_on: str = "not recorded"

    @property
    def equipment(self) -> dict[str, str]:
        """Attributes of the General Equipment module, as highdicom names them."""
        return {
            "manufacturer": self.manufacturer,
            "manufacturer_model_name": self.name,
            "software_versions": self.version,
            "device_serial_number": self.weights[:64],
        }

    @property
    def parameters(self) -> dict[str, str]:
        """What is written of it beside name and version."""
        return {"weights": self.weights, "trained on": self.trained_on}

    @property
    def statements(self) -> tuple[str, str]:
        """What has to be said wherever a result stands."""
        return RESEARCH_USE_ONLY, f"The model was trained on: {self.trained_on}"


def write_seg(
    path: str | PathLike[str],
    numbers: np.ndarray,
    lesions: Sequence[Lesion],
    source: Series,
    *,
    model: Model,
    description: str = "Tumour, automatic; research use only",
) -> Dataset:
    """Write lesions as a binary DICOM segmentation of the CT, one segment for each.

    Segment k is the k-th lesion, with its name as label and tracking id, a tracking UID, a colour, and codes by its
    class (:data:`CODES`): category Morphologically Abnormal Structure (SCT 49755003), type Neoplasm, region Head and
    Neck; for ``GTVp`` Neoplasm, Primary; for ``GTVn`` Neoplasm, Secondary in a lymph node of head and neck. Only slices
    with a lesion are stored. Without a lesion there is one segment ``GTV`` with all its empty slices, since "looked for
    and not found" is a result. The segments' description says that they are for research use only and what the model
    was trained on. Tags of patient and study that the CT lacks, as after de-identification, are empty; where it lacks
    a slice thickness, the distance of the slices is written.

    Args:
        path: the file; it appears under this name only when complete.
        numbers: (X, Y, Z) integers on the grid that :func:`read_series` gives for ``source``, 0 for background, k for
            ``lesions[k - 1]`` (:meth:`scripts.imaging.lesions.Lesions.on`).
        lesions: of :func:`scripts.imaging.lesions.find_lesions`.
        source: the CT, whose patient, study, frame of reference and images the segmentation refers to.
        model: what made the segmentation.
        description: series description, 64 characters at most.

    Returns:
        The dataset as written, for :func:`write_sr`.

    Raises:
        DicomError: when the numbers are not on the grid of ``source`` or no lesion has them; when the CT lacks a UID by
            which a segmentation refers to it.
    """
    check_numbers(numbers, lesions, source)
    hd = needed_module("highdicom")
    frames = np.ascontiguousarray(numbers.transpose(2, 1, 0))
    images = source_headers(source)
    described = [(lesion.name, lesion.label) for lesion in lesions] or [("GTV", "GTV")]
    with lenient():
        for image in images:
            _state_slices(image, float(np.linalg.norm(source.grid.affine[:3, 2])))
        seg = hd.seg.Segmentation(
            source_images=images,
            pixel_array=frames,
            segmentation_type="BINARY",
            segment_descriptions=[_segment(k, *one, model) for k, one in enumerate(described, start=1)],
            series_instance_uid=hd.UID(),
            series_number=SEG_SERIES_NUMBER,
            sop_instance_uid=hd.UID(),
            instance_number=1,
            **model.equipment,
            omit_empty_frames=bool(lesions),
            content_label="TUMOUR",
            content_description="Research use only",
            series_description=description,
            specific_character_set=UTF_8,
        )
        save_whole(seg, path)
    return seg


def check_numbers(numbers: np.ndarray, lesions: Sequence[Lesion], source: Series) -> None:
    """See that lesions and the numbers of their voxels (X, Y, Z) belong to each other and to a CT.

    Raises:
        DicomError: they do not; or the CT has no frame of reference.
    """
    if tuple(numbers.shape) != source.grid.shape:
        raise DicomError(f"the lesions have shape {tuple(numbers.shape)}, the CT {source.grid.shape}")
    if numbers.dtype.kind not in "ui" or not np.array_equal(
        np.unique(numbers[numbers != 0]), range(1, len(lesions) + 1)
    ):
        raise DicomError(f"the voxels of {len(lesions)} lesions are not numbered with the integers 1 to {len(lesions)}")
    if not source.frame_of_reference:
        name = tag_name("FrameOfReferenceUID")
        raise DicomError(f"{source.label}: no {name}, without which a segmentation has no place in space")


def save_whole(dataset: Dataset, path: str | PathLike[str]) -> None:
    """Write a new series of one DICOM object, dated now; the file appears under its final name only when complete."""
    dataset.SeriesDate, dataset.SeriesTime = dataset.InstanceCreationDate, dataset.InstanceCreationTime
    with written_whole(path) as partial:
        dataset.save_as(partial, enforce_file_format=True)


def source_headers(series: Series) -> list[Dataset]:
    """Headers to refer to and to take patient and study tags from.

    What de-identification has removed, or replaced by what is no date, time or sex, is empty in them. A study id that
    is too long for DICOM is cut.

    Raises:
        DicomError: when a UID by which other objects refer to the images is missing.
    """
    headers = read_headers(series)
    with lenient():
        for header in headers:
            lacking = [tag_name(keyword) for keyword in REFERRED if not text_of(header, keyword)]
            if lacking:
                raise DicomError(
                    f"{series.label}: no {lacking[0]}, by which segmentation and report refer to the images"
                )
            _describe(header)
    return headers


def _describe(header: Dataset) -> None:
    """Give a header all that is copied from it, empty where it has none that can be copied."""
    valuerep = needed_module("pydicom.valuerep")
    for keyword in DESCRIBED:
        if header.get(keyword) is None or header[keyword].VM > 1:
            setattr(header, keyword, "")
    header.StudyID = text_of(header, "StudyID")[:16]
    for keyword, kind in (("PatientBirthDate", "DA"), ("StudyDate", "DA"), ("StudyTime", "TM")):
        text = text_of(header, keyword)
        try:
            getattr(valuerep, kind)(text)
        except ValueError:
            text = ""
        setattr(header, keyword, text)
    sex = text_of(header, "PatientSex")
    header.PatientSex = sex if sex in SEXES else ""


def _state_slices(image: Dataset, distance_mm: float) -> None:
    """Thickness and distance of the slices; the latter is measured, whatever the header says."""
    thickness = numbers_of(image, "SliceThickness", 1)
    if thickness is None or thickness[0] <= 0:
        image.SliceThickness = f"{distance_mm:.6g}"
    image.SpacingBetweenSlices = f"{distance_mm:.6g}"


def code(scheme: str, value: str, meaning: str) -> Any:
    """A coded concept."""
    return needed_module("highdicom").sr.CodedConcept(value=value, scheme_designator=scheme, meaning=meaning)


def _segment(number: int, name: str, label: str, model: Model) -> Any:
    hd = needed_module("highdicom")
    kind, region = CODES[label]
    segment = hd.seg.SegmentDescription(
        segment_number=number,
        segment_label=name,
        segmented_property_category=code("SCT", "49755003", "Morphologically Abnormal Structure"),
        segmented_property_type=code("SCT", *kind),
        algorithm_type="AUTOMATIC",
        algorithm_identification=hd.AlgorithmIdentificationSequence(
            name=model.name,
            family=code("DCM", "123110", "Artificial Intelligence"),
            version=model.version,
            source=model.manufacturer,
            parameters=model.parameters,
        ),
        tracking_uid=hd.UID(),
        tracking_id=name,
        anatomic_regions=[code("SCT", *region)],
        display_color=hd.color.CIELabColor.from_rgb(*COLOURS[label]),
    )
    segment.SegmentDescription = " ".join(model.statements)[:LONGEST_TEXT]
    return segment
