"""A tumour mask as a DICOM segmentation, and what every DICOM object written here says of the model."""

from __future__ import annotations

from dataclasses import dataclass
from os import PathLike
from typing import TYPE_CHECKING, Any

import numpy as np

from scripts.cohorts.files import written_whole
from scripts.dicom.series import Series, read_headers
from scripts.dicom.tags import DicomError, lenient, needed_module, numbers_of, tag_name, text_of
from scripts.keys import RESEARCH_USE_ONLY

if TYPE_CHECKING:
    from pydicom import Dataset

LONGEST_TEXT = 1024  # letters of a short text (ST)
SEG_SERIES_NUMBER = 9101  # far above those of scanners
UTF_8 = "ISO_IR 192"  # holds whatever the source's names and the notes are written in
RED = (230, 40, 40)  # of 255, in which viewers draw the tumour
REFERRED = ("SOPClassUID", "SOPInstanceUID", "SeriesInstanceUID", "StudyInstanceUID")
# Of patient and study, what every DICOM object has, with an empty value where it is not known.
DESCRIBED = ("PatientID", "PatientName", "AccessionNumber", "StudyID", "ReferringPhysicianName")
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
    mask: np.ndarray,
    source: Series,
    *,
    model: Model,
    description: str = "Tumour (primary and nodes), automatic; research use only",
    series_number: int = SEG_SERIES_NUMBER,
) -> Dataset:
    """Write a tumour mask as a binary DICOM segmentation of the CT.

    One segment: category Morphologically Abnormal Structure (SCT 49755003), type Neoplasm (SCT 108369006; primary and
    nodes are one label), region Head and Neck (SCT 774007). Only slices with tumour are stored. An empty mask is
    written with all its empty slices, since "looked for and not found" is a result. The segment's description says that
    it is for research use only and what the model was trained on. Tags of patient and study that the CT lacks, as after
    de-identification, are empty; where it lacks a slice thickness, the distance of the slices stands there.

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
        DicomError: when the mask is not on the grid of ``source`` or holds other values; when the CT lacks a UID by
            which a segmentation refers to it.
    """
    if tuple(mask.shape) != source.grid.shape:
        raise DicomError(f"the mask has shape {tuple(mask.shape)}, the CT {source.grid.shape}")
    if mask.dtype.kind not in "bui" or mask.min() < 0 or mask.max() > 1:
        raise DicomError("the mask holds values other than the integers 0 and 1")
    hd = needed_module("highdicom")
    frames = np.ascontiguousarray(mask.transpose(2, 1, 0).astype(np.uint8))
    images = source_headers(source)
    with lenient():
        if not all(text_of(image, "FrameOfReferenceUID") for image in images):
            name = tag_name("FrameOfReferenceUID")
            raise DicomError(f"{source.label}: no {name}, without which a segmentation has no place in space")
        for image in images:
            _state_slices(image, float(np.linalg.norm(source.grid.affine[:3, 2])))
        seg = hd.seg.Segmentation(
            source_images=images,
            pixel_array=frames,
            segmentation_type="BINARY",
            segment_descriptions=[_segment(model)],
            series_instance_uid=hd.UID(),
            series_number=series_number,
            sop_instance_uid=hd.UID(),
            instance_number=1,
            **model.equipment,
            omit_empty_frames=bool(frames.any()),
            content_label="TUMOUR",
            content_description="Research use only",
            series_description=description,
            specific_character_set=UTF_8,
        )
        save_whole(seg, path)
    return seg


def save_whole(dataset: Dataset, path: str | PathLike[str]) -> None:
    """Write a DICOM file, whole or not at all."""
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


def _segment(model: Model) -> Any:
    hd = needed_module("highdicom")
    segment = hd.seg.SegmentDescription(
        segment_number=1,
        segment_label="Tumour",
        segmented_property_category=code("SCT", "49755003", "Morphologically Abnormal Structure"),
        segmented_property_type=neoplasm(),
        algorithm_type="AUTOMATIC",
        algorithm_identification=hd.AlgorithmIdentificationSequence(
            name=model.name,
            family=artificial_intelligence(),
            version=model.version,
            source=model.manufacturer,
            parameters=model.parameters,
        ),
        tracking_uid=hd.UID(),
        tracking_id="Tumour",
        anatomic_regions=[head_and_neck()],
        display_color=hd.color.CIELabColor.from_rgb(*RED),
    )
    segment.SegmentDescription = " ".join(model.statements)[:LONGEST_TEXT]
    return segment


def neoplasm() -> Any:
    """Primary tumour and nodes, which are one label."""
    return code("SCT", "108369006", "Neoplasm")


def head_and_neck() -> Any:
    """The region."""
    return code("SCT", "774007", "Head and Neck")


def artificial_intelligence() -> Any:
    """The family of the algorithm."""
    return code("DCM", "123110", "Artificial Intelligence")
