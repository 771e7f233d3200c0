"""The PET of a CT that MONAI Label has fetched from a DICOMweb server.

MONAI Label keeps a CT in its cache twice: the folder ``<SeriesInstanceUID>`` with the DICOM files, and
``<SeriesInstanceUID>.nii.gz`` beside it, which it made of them. The PET series of the study are put beside them in the
same way, so that a study is downloaded once. User and password are those of :mod:`scripts.dicom.web`.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import numpy as np

from scripts.dicom.choice import Choice
from scripts.dicom.examinations import Examination, pair_examination
from scripts.dicom.tags import DicomError
from scripts.dicom.web import DicomWeb, WebSeries, is_uid
from scripts.imaging.geometry import Grid
from scripts.imaging.headers import read_header
from scripts.imaging.images import image_suffix

SAME_MM = 0.1  # largest difference of the edges of one CT in two formats


def fetched_series(ct: Path) -> Path | None:
    """The folder with the DICOM files of a CT (itself, or made of them) in MONAI Label's cache; None for another CT."""
    folder = ct if ct.is_dir() else ct.with_name(ct.name.removesuffix(image_suffix(ct)))
    return folder if is_uid(folder.name) and folder.is_dir() else None


def study_examination(ct: Path, series: Path, address: str) -> Examination:
    """The CT with the PET of its study, which :func:`scripts.dicom.choice.choose_pet_ct` selects.

    Raises:
        DicomError: the server cannot be reached or refuses, the study has no PET, or the files are not whole.
        scripts.imaging.images.ImageReadError: the CT is a damaged file.
    """
    web = DicomWeb(address)
    study = web.study_of(series.name)
    listed = web.wanted(study)
    stated = next((each.instances for each in listed if each.uid == series.name), 0)
    if (count := _images(series)) < stated:
        raise DicomError(
            f"series {series.name}: the server's cache has {count} of {stated} images; "
            "remove its folder and its .nii.gz from the cache, and ask again"
        )
    pets = [_fetched(web, study, each, series.parent) for each in listed if each.modality == "PT"]
    examination = pair_examination(series, *pets)
    if examination.choice is not None and not ct.is_dir():
        _require_same_place(ct, examination.choice)
    return examination


def _fetched(web: DicomWeb, study: str, series: WebSeries, cache: Path) -> Path:
    """The folder of a series in the cache, downloaded where it is not there whole."""
    folder = cache / series.uid
    if folder.is_dir() and _images(folder) >= max(series.instances, 1):
        return folder
    with tempfile.TemporaryDirectory(dir=cache, prefix=".download_") as partial:
        web.fetch(study, series, Path(partial) / series.uid)
        shutil.rmtree(folder, ignore_errors=True)
        (Path(partial) / series.uid).rename(folder)
    return folder


def _images(folder: Path) -> int:
    return sum(path.is_file() for path in folder.iterdir())


def _require_same_place(ct: Path, choice: Choice) -> None:
    """Check that the image file shows what the DICOM series does."""
    header = read_header(ct, image_suffix(ct))
    made, series = Grid(header.shape, header.affine), choice.ct.grid
    if sorted(made.shape) != sorted(series.shape) or np.abs(made.bounds - series.bounds).max() > SAME_MM:
        raise DicomError(f"{ct.name}: does not show the same field of view as the DICOM series it was made of")
