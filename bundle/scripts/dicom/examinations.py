"""DICOM as cases to predict: the series, which are read when needed, and age and sex from the headers."""

from __future__ import annotations

import logging
import re
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import count, groupby
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from scripts.cohorts.clinical import ClinicalValueError, parse_value
from scripts.cohorts.scans import UNNAMED, clean_id
from scripts.dicom.choice import Choice, Study, choose_pet_ct, missing_scans, studies_of
from scripts.dicom.files import DICOM_ENDING, Damaged, describe
from scripts.dicom.series import Series, SeriesList, find_series, people_differ, read_headers, read_series
from scripts.dicom.suv import Suv, suv_of
from scripts.dicom.tags import DicomError, lenient, read_header, tag_name, text_of

if TYPE_CHECKING:
    from pydicom import Dataset

logger = logging.getLogger(__name__)

HEADER = "DICOM header"
DAYS_A_YEAR = 365.25
AGE_UNITS = {"D": DAYS_A_YEAR, "W": DAYS_A_YEAR / 7, "M": 12.0, "Y": 1.0}
ADULT_YEARS = 15, 110  # a Patient's Age without a unit is taken for years within these limits
AGE_TAGS = "PatientAge", "PatientBirthDate", "StudyDate"


@dataclass(frozen=True)
class DicomScan:
    """A series that is read when needed, so that a cohort needs no memory.

    Args:
        series: a CT or a PET, from :func:`scripts.dicom.series.find_series`.
        beside: doubts other than those of its own headers.
    """

    series: Series
    beside: tuple[str, ...] = ()

    @cached_property
    def suv(self) -> Suv:
        """The SUV factor of a PET.

        Raises:
            scripts.dicom.tags.DicomError: the headers do not give it.
        """
        return suv_of(read_headers(self.series))

    @property
    def doubts(self) -> tuple[str, ...]:
        """Doubts, as texts."""
        return (*self.beside, *(self.suv.doubts if self.series.modality == "PT" else ()))

    def read(self) -> tuple[np.ndarray, np.ndarray]:
        """The volume, CT in HU and PET in SUV by body weight, see :func:`scripts.dicom.series.read_series`.

        Raises:
            scripts.dicom.tags.DicomError: when the slices form no volume, or a PET's headers do not give SUV.
        """
        factor = self.suv.factor if self.series.modality == "PT" else 1.0
        array, affine = read_series(self.series)
        return (array if factor == 1.0 else array * np.float32(factor)), affine


@dataclass(frozen=True)
class Examination:
    """One patient's PET/CT, or the reason why there is none.

    Args:
        patient_id: the id in the files, "" where they have none (not in ``repr``).
        choice: the series to predict from.
        problem: why there is none, "" otherwise.
        name: the patient's id, ``unnamed`` without one; with ``_2``, ``_3`` ... for a further examination, in the order
            of their dates (not in ``repr``).
        passed_over: series of the patient's studies without a PET/CT.
        sharing: the tag by which the examinations under this PatientID are of several people, "" where they may be of
            one.
    """

    patient_id: str = field(repr=False)
    choice: Choice | None
    problem: str = ""
    name: str = field(default="", repr=False)
    passed_over: tuple[Series, ...] = ()
    sharing: str = ""


def find_examinations(folder: str | PathLike[str], without: Container[Path] = ()) -> list[Examination]:
    """The PET/CT examinations below a folder with any mixture of patients, studies and series.

    Folders in ``without`` are ignored.

    Studies without a PET and a CT are ignored if their patient has one with both. Files that cannot be read and may be
    part of a CT or PET of no other patient are reported as a patient of their own, with the PatientID of their header
    or, without one, the name of the folder that has only such files. The use of all files is logged.

    Raises:
        scripts.dicom.tags.DicomError: no DICOM in it.
    """
    series = find_series(folder, without=without)
    if not series and not any(each.told for each in series.damaged):
        problems = "; ".join([series.account, *describe(series.damaged)])
        raise DicomError(f"{folder}: no DICOM series in it ({problems})")
    logger.info("%s: %s", Path(folder).resolve().name, series.account)
    grouped = groupby(studies_of(series), key=lambda study: study.patient_id)
    studies = {patient: list(group) for patient, group in grouped}
    lone = {code for group in studies.values() for code in _lone_scan(group)}
    patients: dict[str, list[Examination]] = {}
    for patient, group in studies.items():
        patients[patient] = _of_patient(patient, group, lone)
    for patient, problem in _lost(series, Path(folder)):
        patients.setdefault(patient, []).append(Examination(patient, None, problem))
    return _named(patients)


def _lone_scan(studies: Sequence[Study]) -> set[str]:
    """CT or PT where a patient has images of one of them alone."""
    held = {"CT", "PT"} & {series.modality for study in studies for series in study.series}
    return held if len(held) == 1 else set()


def _of_patient(patient: str, studies: Sequence[Study], lone: Container[str]) -> list[Examination]:
    """The examinations of one patient, by date; ``lone``: modalities that a patient of the folder has alone."""
    complete = sorted(filter(lambda study: study.is_pet_ct, studies), key=lambda study: (study.date, study.study_uid))
    if not complete:
        series = [each for study in studies for each in study.series]
        faults = [each.damaged for each in series if each.damaged]
        listed = "; ".join([missing_scans(series, lone), *dict.fromkeys(faults)])
        return [Examination(patient, None, listed)]
    found = [_chosen(patient, study.series) for study in complete]
    others = tuple(series for study in studies if study not in complete for series in study.series)
    people = [person for study in complete for series in study.series for person in series.people]
    found[0] = replace(found[0], passed_over=others)
    return [replace(each, sharing=people_differ(people) if len(found) > 1 else "") for each in found]


def _lost(series: SeriesList, folder: Path) -> list[tuple[str, str]]:
    """Patient and problem of files that cannot be read and may be part of a scan of no other patient."""
    holding = {parent for one in series for path in one.paths for parent in path.parents}
    groups: dict[str, list[Damaged]] = {}
    for each in series.lost:
        is_file = not each.path.is_symlink() or DICOM_ENDING.fullmatch(each.path.suffix)
        place = each.path.parent if is_file and not each.path.is_dir() else each.path
        while place not in (folder, *folder.parents) and place.parent not in (folder, *holding):
            place = place.parent
        name = str(place.relative_to(folder)) if place != folder else folder.resolve().name
        groups.setdefault(clean_id(each.told.get("PatientID", "") or name), []).append(each)
    return [(patient, "; ".join(describe(each))) for patient, each in groups.items()]


def _named(patients: Mapping[str, Sequence[Examination]]) -> list[Examination]:
    """The examinations in the order of patients, with unique names."""
    taken = {patient or UNNAMED for patient in patients}
    named = []
    for patient, found in sorted(patients.items()):
        names = (name for number in count(2) if (name := f"{patient or UNNAMED}_{number}") not in taken)
        for number, each in enumerate(found):
            name = next(names) if number else patient or UNNAMED
            named.append(replace(each, name=name))
    return named


def pair_examination(ct: str | PathLike[str], *pets: str | PathLike[str]) -> Examination:
    """The PET/CT with the CT in one folder and the PET, or several to choose from, in others (or in the same one).

    Raises:
        scripts.dicom.tags.DicomError: the folders hold no DICOM.
    """
    series = find_series(ct, *pets)
    logger.info("%s: %s", ", ".join(Path(folder).name for folder in (ct, *pets)), series.account)
    problems = "; ".join(describe(series.lost))
    if not series:
        raise DicomError(
            f"{' and '.join(map(str, (ct, *pets)))}: no DICOM series in them" + (f" ({problems})" if problems else "")
        )
    patients = [each.patient_id for each in series if each.modality in ("CT", "PT")]
    found = _chosen(patients[0] if patients else "", series)
    found = replace(found, name=found.patient_id or UNNAMED)
    return (
        replace(found, choice=None, problem="; ".join(filter(None, [found.problem, problems]))) if problems else found
    )


def clinical_values(choice: Choice, features: Iterable[str]) -> dict[str, float]:
    """Age (years) and gender from the header of the CT, or else of the PET, if stated and wanted.

    The age is Patient's Age, or the time from Patient's Birth Date to the study, or Patient's Age without a unit
    (``64``, against the standard) if it is that of an adult in years. An age of 0, an artefact of de-identification,
    and a sex other than M and F count as not stated.

    Raises:
        scripts.dicom.tags.DicomError: a header cannot be read any more.
    """
    headers = _headers_of(choice)
    ages = [age for of in (_age, _age_without_unit) for header in headers if (age := of(header)) is not None]
    sexes = [sex for header in headers if (sex := _gender(header)) is not None]
    values = {name: found[0] for name, found in (("age", ages), ("gender", sexes)) if found}
    return {name: values[name] for name in features if name in values}


def clinical_doubts(choice: Choice) -> dict[str, str]:
    """Doubts about :func:`clinical_values`, by name.

    Raises:
        scripts.dicom.tags.DicomError: a header cannot be read any more.
    """
    headers = _headers_of(choice)
    if any(_age(header) is not None for header in headers) or not any(map(_age_without_unit, headers)):
        return {}
    return {"age": f"{tag_name('PatientAge')} has no unit; it is read as years unless the age is known otherwise"}


def _headers_of(choice: Choice) -> list[Dataset]:
    """Of the CT and of the PET, what they say of age and sex."""
    paths = [series.paths[0] for series in (choice.ct, choice.pet)]
    with lenient():
        headers = [read_header(path, (*AGE_TAGS, "PatientSex")) for path in paths]
    for path, header in zip(paths, headers, strict=True):
        if header is None:
            raise DicomError(f"{path.name}: no longer DICOM")
    return [header for header in headers if header is not None]


def _chosen(patient: str, series: Sequence[Series]) -> Examination:
    try:
        return Examination(patient, choose_pet_ct(series))
    except DicomError as error:
        return Examination(patient, None, "; ".join(str(error).splitlines()))


def _age(header: Dataset) -> float | None:
    stated = re.fullmatch(r"(\d+) ?([DWMY])", text_of(header, "PatientAge").upper(), re.ASCII)
    if stated:
        years = float(int(stated[1]) / AGE_UNITS[stated[2]])
    else:
        years = _years_between(text_of(header, "PatientBirthDate"), text_of(header, "StudyDate"))
    try:
        return parse_value("age", float(int(years))) or None
    except ClinicalValueError:
        return None


def _age_without_unit(header: Dataset) -> float | None:
    text = text_of(header, "PatientAge")
    years = float(text) if re.fullmatch(r"\d+", text, re.ASCII) else 0.0
    return years if ADULT_YEARS[0] <= years <= ADULT_YEARS[1] else None


def _years_between(start: str, end: str) -> float:
    """Whole years between two DICOM dates, 0 where either is not stated."""
    days = [day.replace(".", "") for day in (start, end)]
    if not all(len(day) == 8 and day.isdigit() for day in days):
        return 0.0
    return float((int(days[1]) - int(days[0])) // 10000)  # as numbers YYYYMMDD: a year is 10000


def _gender(header: Dataset) -> float | None:
    return {"M": 1.0, "F": 0.0}.get(text_of(header, "PatientSex").upper())
