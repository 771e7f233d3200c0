"""DICOM as cases to predict: which series, read when their turn comes, with the age and sex that the headers hold."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from os import PathLike
from typing import TYPE_CHECKING

import numpy as np

from scripts.clinical import ClinicalValueError, parse_value
from scripts.dicom_choice import Choice, Study, choose_pet_ct, find_studies
from scripts.dicom_series import Series, SeriesList, find_series, read_headers, read_series
from scripts.dicom_suv import Suv, suv_of
from scripts.dicom_tags import DicomError

if TYPE_CHECKING:
    from pydicom import Dataset

logger = logging.getLogger(__name__)

HEADER = "DICOM header"
UNNAMED = "unnamed"  # a patient whose files have no PatientID
DAYS_A_YEAR = 365.25
AGE_UNITS = {"D": DAYS_A_YEAR, "W": DAYS_A_YEAR / 7, "M": 12.0, "Y": 1.0}


@dataclass(frozen=True)
class DicomScan:
    """A series that is read when it is needed, so that a cohort of them takes no memory.

    Args:
        series: a CT or a PET, from :func:`scripts.dicom_series.find_series`.
    """

    series: Series

    @cached_property
    def suv(self) -> Suv:
        """What a PET's headers say of SUV.

        Raises:
            scripts.dicom_tags.DicomError: when they do not give it.
        """
        return suv_of(read_headers(self.series))

    @property
    def doubts(self) -> tuple[str, ...]:
        """What is doubtful in the headers, for people."""
        return self.suv.doubts if self.series.modality == "PT" else ()

    def read(self) -> tuple[np.ndarray, np.ndarray]:
        """The volume, CT in HU and PET in SUV by body weight, as :func:`scripts.dicom_series.read_series` gives it.

        Raises:
            scripts.dicom_tags.DicomError: when the slices form no volume, or a PET's headers do not give SUV.
        """
        factor = self.suv.factor if self.series.modality == "PT" else 1.0
        array, affine = read_series(self.series)
        return (array if factor == 1.0 else array * np.float32(factor)), affine


@dataclass(frozen=True)
class Examination:
    """One patient's PET/CT, or the reason why there is none.

    Args:
        patient_id: as the files have it.
        choice: the series to predict from.
        problem: why there is none, "" otherwise.
        number: of the examination among those of the patient, in the order of their dates.
    """

    patient_id: str
    choice: Choice | None
    problem: str = ""
    number: int = 1

    @property
    def name(self) -> str:
        """The patient's id; with ``_2``, ``_3`` ... for a further examination."""
        return (self.patient_id or UNNAMED) + (f"_{self.number}" if self.number > 1 else "")


def find_examinations(folder: str | PathLike[str]) -> list[Examination]:
    """The PET/CT examinations below a folder with any mixture of patients, studies and series.

    Studies without a PET and a CT are passed over where their patient has one with both.

    Args:
        folder: where to look.

    Raises:
        scripts.dicom_tags.DicomError: no DICOM in it.
    """
    patients: dict[str, list[Study]] = {}
    for study in find_studies(folder):
        patients.setdefault(study.patient_id, []).append(study)
    found = []
    for patient, studies in sorted(patients.items()):
        complete = sorted(filter(lambda study: study.is_pet_ct, studies), key=_date)
        if not complete:
            names = sorted({series.modality or "unknown" for study in studies for series in study.series})
            missing = [name for name, code in (("CT", "CT"), ("PET", "PT")) if code not in names]
            lacking = f"no {' and no '.join(missing)}" if missing else "CT and PET are of different examinations"
            found.append(Examination(patient, None, f"{lacking} among its DICOM series ({', '.join(names)})"))
        for number, study in enumerate(complete, start=1):
            found.append(replace(_chosen(patient, study.series, study.ignored), number=number))
    return found


def pair_examination(ct: str | PathLike[str], pet: str | PathLike[str]) -> Examination:
    """The PET/CT whose CT lies in one folder and whose PET lies in another (or in the same one).

    Raises:
        scripts.dicom_tags.DicomError: a folder holds no DICOM.
    """
    series = {(each.uid, each.part): each for folder in (ct, pet) for each in find_series(folder)}
    if not series:
        raise DicomError(f"{ct} and {pet}: no DICOM series in them")
    patients = [each.patient_id for each in series.values() if each.modality in ("CT", "PT")]
    return _chosen(patients[0] if patients else "", list(series.values()), 0)


def clinical_values(choice: Choice, features: Iterable[str]) -> dict[str, float]:
    """Age (years) and gender as the CT's header states them, those that it does and that are wanted.

    The age is Patient's Age, or else the time from Patient's Birth Date to the study. An age of 0, which
    de-identification leaves behind, and a sex other than M and F count as not stated.
    """
    header = read_headers(choice.ct)[0]
    values: dict[str, float | None] = {"age": _age(header), "gender": _gender(header)}
    return {name: value for name in features if (value := values.get(name)) is not None}


def _chosen(patient: str, series: Sequence[Series], ignored: int) -> Examination:
    try:
        return Examination(patient, choose_pet_ct(SeriesList(series, ignored)))
    except DicomError as error:
        return Examination(patient, None, "; ".join(str(error).splitlines()))


def _date(study: Study) -> tuple[str, str]:
    header = read_headers(study.series[0])[0]
    return str(header.get("StudyDate") or ""), study.study_uid


def _age(header: Dataset) -> float | None:
    text = str(header.get("PatientAge") or "").strip().upper()
    if text[:-1].isdigit() and text[-1:] in AGE_UNITS:
        years = float(int(text[:-1]) / AGE_UNITS[text[-1]])
    else:
        years = _years_between(header.get("PatientBirthDate"), header.get("StudyDate"))
    try:
        return parse_value("age", float(int(years))) or None
    except ClinicalValueError:
        return None


def _years_between(start: object, end: object) -> float:
    """Whole years between two DICOM dates, 0 where either is not stated."""
    days = [str(day or "").replace(".", "").strip() for day in (start, end)]
    if not all(len(day) == 8 and day.isdigit() for day in days):
        return 0.0
    return float((int(days[1]) - int(days[0])) // 10000)  # as numbers YYYYMMDD: a year is 10000


def _gender(header: Dataset) -> float | None:
    return {"M": 1.0, "F": 0.0}.get(str(header.get("PatientSex") or "").strip().upper())
