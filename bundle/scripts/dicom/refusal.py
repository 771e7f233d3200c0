"""The reason why a study has no prediction, as a DICOM structured report in that study."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scripts.dicom.seg import REFERRED, UTF_8, Model, _describe, code, save_whole
from scripts.dicom.sr import _comment
from scripts.dicom.tags import DicomError, lenient, needed_module, read_header, text_of
from scripts.dicom.web import is_uid
from scripts.keys import RESEARCH_USE_ONLY

if TYPE_CHECKING:
    from pydicom import Dataset

REFUSAL_SERIES_NUMBER = 9109  # behind the series of results
DESCRIPTION = "No prediction: reason (research use only)"


def write_refusal(path: str | PathLike[str], reason: str, images: Iterable[Path], *, model: Model) -> Dataset:
    """Write a reason as an Enhanced SR of two comments: the reason, and that the software is for research use only.

    Patient and study are those of the images, to one of which in each series the report refers.

    Args:
        path: where to; the file appears whole or not at all.
        reason: why there is no prediction; nothing identifying.
        images: files of the study.
        model: the software that speaks.

    Raises:
        DicomError: no image can be referred to.
    """
    hd = needed_module("highdicom")
    evidence = _one_of_each_series(images)
    if not evidence:
        raise DicomError("no image of the study can be read, to which a report could refer")
    with lenient():
        content = hd.sr.ContainerContentItem(name=code("LN", "18748-4", "Diagnostic imaging report"))
        content.ContentSequence = hd.sr.ContentSequence(
            [*_observer(model), *map(_comment, (f"No prediction: {reason}", RESEARCH_USE_ONLY))]
        )
        content.ContinuityOfContent = "SEPARATE"
        document = hd.sr.EnhancedSR(
            evidence=evidence,
            content=content,
            series_instance_uid=hd.UID(),
            series_number=REFUSAL_SERIES_NUMBER,
            sop_instance_uid=hd.UID(),
            instance_number=1,
            **model.equipment,
            is_complete=True,
            series_description=DESCRIPTION,
            specific_character_set=UTF_8,
        )
        save_whole(document, path)
    return document


def _one_of_each_series(images: Iterable[Path]) -> Sequence[Dataset]:
    """Headers of one readable image of each series, all of the study of the first."""
    found: dict[str, Dataset] = {}
    with lenient():
        for path in images:
            try:
                header = read_header(path)
            except DicomError:
                continue
            if header is not None and all(is_uid(text_of(header, keyword)) for keyword in REFERRED):
                _describe(header)
                found.setdefault(text_of(header, "SeriesInstanceUID"), header)
        studies = [text_of(header, "StudyInstanceUID") for header in found.values()]
    return [header for header, study in zip(found.values(), studies, strict=True) if study == studies[0]]


def _observer(model: Model) -> list[Any]:
    """The device that speaks (TID 1004)."""
    sr = needed_module("highdicom").sr
    relation = {"relationship_type": "HAS OBS CONTEXT"}
    uid = needed_module("pydicom.uid").generate_uid(entropy_srcs=[model.name, model.version, model.weights])
    return [
        sr.CodeContentItem(
            name=code("DCM", "121005", "Observer Type"), value=code("DCM", "121007", "Device"), **relation
        ),
        sr.UIDRefContentItem(name=code("DCM", "121012", "Device Observer UID"), value=uid, **relation),
        sr.TextContentItem(name=code("DCM", "121013", "Device Observer Name"), value=model.name, **relation),
    ]
