"""Facts of the examination for the report: date, patient, scanner, dose, uptake time, series, as far as known."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from scripts import keys
from scripts.cohorts.clinical import FEATURES
from scripts.dicom.choice import Choice
from scripts.dicom.examinations import clinical_values
from scripts.dicom.series import read_headers
from scripts.dicom.suv import DOSE_BQ
from scripts.dicom.tags import DicomError, items_of, lenient, number_of, text_of
from scripts.dicom.times import scan_start, uptake_time
from scripts.dicom.tracer import F18, HALF_LIFE_S
from scripts.imaging.geometry import Grid

if TYPE_CHECKING:
    from pydicom import Dataset

Facts = list[tuple[str, str]]


def study_facts(case: Mapping[str, Any], ct: Grid, pet: Grid) -> Facts:
    """Name and value of each fact that is known of a case; of one in DICOM also from the headers.

    Raises:
        scripts.dicom.tags.DicomError: the files cannot be read any more.
    """
    choice: Choice | None = case.get(keys.DICOM)
    headers = [] if choice is None else read_headers(choice.pet)
    values = {**(case.get(keys.CLINICAL_OTHERS) or {}), **(case.get(keys.CLINICAL) or {})}
    if choice is not None:  # what the models read comes first, from whatever source
        stated = clinical_values(choice, ("age", "gender"))
        values = stated | {name: value for name, value in values.items() if value is not None}
    facts = [] if not headers else _of_scan(headers)
    for name in ("gender", "age"):
        if values.get(name) is not None:
            facts.insert(1 if facts and facts[0][0] == "study date" else 0, _of_patient(name, values[name]))
    if choice is not None:
        numbers = (f"{name} {one.number or 'without'}" for name, one in (("CT", choice.ct), ("PET", choice.pet)))
        facts.append(("series number", ", ".join(numbers)))
    return [*facts, ("CT voxels", _voxels(ct)), ("PET voxels", _voxels(pet))]


def _of_patient(name: str, value: float) -> tuple[str, str]:
    words = FEATURES[name].levels.get(int(value), ())
    return ("sex", words[0]) if words else (name, f"{value:g} {FEATURES[name].unit}".strip())


def _of_scan(headers: Sequence[Dataset]) -> Facts:
    """Date, scanner, dose and uptake time from the headers of the PET."""
    with lenient():
        first = headers[0]
        date = text_of(first, "StudyDate").replace(".", "")
        facts = [("study date", f"{date[:4]}-{date[4:6]}-{date[6:]}")] if len(date) == 8 and date.isdigit() else []
        scanner = " ".join(filter(None, (text_of(first, tag) for tag in ("Manufacturer", "ManufacturerModelName"))))
        facts += [("PET scanner", scanner)] if scanner else []
        injections = items_of(first, "RadiopharmaceuticalInformationSequence")
        try:
            doses = [number_of(item, "RadionuclideTotalDose", 0.0) or 0.0 for item in injections]
            if doses and all(DOSE_BQ[0] <= dose <= DOSE_BQ[1] for dose in doses):
                facts.append(("injected activity", f"{sum(doses) / 1e6:.0f} MBq"))
        except DicomError:  # not a number: not known
            pass
        if len(injections) == 1:  # of several, none is the time
            facts += _uptake(injections[0], headers)
    return facts


def _uptake(injection: Dataset, headers: Sequence[Dataset]) -> Facts:
    try:
        half_life = number_of(injection, "RadionuclideHalfLife", 0.0) or HALF_LIFE_S[F18]
        uptake = uptake_time(injection, headers[0], scan_start(headers, half_life, []), [])
    except DicomError:  # not stated, or contradictory: not known
        return []
    return [("uptake time", f"{uptake.total_seconds() / 60:.0f} min")]


def _voxels(grid: Grid) -> str:
    return f"{' x '.join(f'{edge:.2f}' for edge in grid.spacing)} mm"
