"""The facts of an examination that a report shows are those of the DICOM headers, as far as they are stated."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from dicom_study import pet_tags, write_series

from scripts import keys
from scripts.dicom.choice import choose_pet_ct
from scripts.dicom.series import find_series
from scripts.dicom.tags import DicomError
from scripts.imaging.geometry import Grid
from scripts.prediction.facts import study_facts

CT, PET = (Grid((4, 4, 4), np.diag([*edges, 1.0])) for edges in ((-0.98, 0.98, 3.27), (5.47, 5.47, 3.27)))
VOXELS = [("CT voxels", "0.98 x 0.98 x 3.27 mm"), ("PET voxels", "5.47 x 5.47 x 3.27 mm")]
SCANNER, DATE = ("PET scanner", "GE MEDICAL SYSTEMS"), ("study date", "2020-01-02")
DOSE, UPTAKE = ("injected activity", "370 MBq"), ("uptake time", "110 min")
SERIES = ("series number", "CT 1, PET 1")
AGE, SEX = ("age", "20 years"), ("sex", "female")
PATIENT = [AGE, SEX]


def dicom_case(folder: Path, ct: dict | None = None, pet: dict | None = None) -> dict:
    study = {"StudyInstanceUID": "1.2.3.4.1", "FrameOfReferenceUID": "1.2.3.4.2"}
    write_series(folder / "CT", uid="1.2.3.4.5", tags={**study, **(ct or {})})
    write_series(folder / "PT", "PT", uid="1.2.3.4.6", tags={**study, "dtype": np.uint16, **(pet or {})})
    return {keys.DICOM: choose_pet_ct(find_series(folder))}


@pytest.mark.parametrize(
    ("ct", "pet", "facts"),
    [
        pytest.param({}, {}, [DATE, *PATIENT, SCANNER, DOSE, UPTAKE], id="all of it"),
        pytest.param(
            {},
            {"ManufacturerModelName": "Discovery ST"},
            [DATE, *PATIENT, ("PET scanner", "GE MEDICAL SYSTEMS Discovery ST"), DOSE, UPTAKE],
            id="with the model of the scanner",
        ),
        pytest.param(
            {"PatientAge": "061Y", "PatientSex": "M"},
            {"PatientSex": "M"},
            [DATE, ("age", "61 years"), ("sex", "male"), SCANNER, DOSE, UPTAKE],
            id="the age is stated",
        ),
        pytest.param(
            {"StudyDate": "", "PatientBirthDate": "", "PatientSex": "O"},
            {"StudyDate": "", "PatientBirthDate": "", "PatientSex": "O", "Manufacturer": ""},
            [DOSE, UPTAKE],
            id="after de-identification",
        ),
        pytest.param({}, {"StudyDate": "2020.01.02"}, [DATE, *PATIENT, SCANNER, DOSE, UPTAKE], id="an old date"),
        pytest.param({}, {"StudyDate": "20200"}, [*PATIENT, SCANNER, DOSE, UPTAKE], id="no date"),
        pytest.param(
            {},
            {"RadiopharmaceuticalInformationSequence": None},
            [DATE, *PATIENT, SCANNER],
            id="nothing about the tracer",
        ),
    ],
)
def test_facts_of_dicom(ct, pet, facts, tmp_path) -> None:
    assert study_facts(dicom_case(tmp_path, ct, pet), CT, PET) == [*facts, SERIES, *VOXELS]


@pytest.mark.parametrize(
    ("change", "lost"),
    [
        pytest.param({"RadionuclideTotalDose": None}, DOSE, id="no dose"),
        pytest.param({"RadionuclideTotalDose": 370.0}, DOSE, id="a dose in MBq, against the standard"),
        pytest.param({"RadiopharmaceuticalStartTime": None}, UPTAKE, id="no time of the injection"),
        pytest.param({"RadiopharmaceuticalStartTime": "115000"}, UPTAKE, id="injected when the scan began"),
    ],
)
def test_what_is_not_stated_or_cannot_be_is_left_out(change, lost, tmp_path) -> None:
    case = dicom_case(tmp_path, pet=pet_tags(**change))
    expected = [fact for fact in (DATE, *PATIENT, SCANNER, DOSE, UPTAKE) if fact != lost]
    assert study_facts(case, CT, PET) == [*expected, SERIES, *VOXELS]


@pytest.mark.parametrize(
    ("ct", "pet", "shown"),
    [
        pytest.param(2, 4, "CT 2, PET 4", id="both"),
        pytest.param(None, 304, "CT without, PET 304", id="one without a number"),
    ],
)
def test_the_series_that_were_used_are_named(ct, pet, shown, tmp_path) -> None:
    case = dicom_case(tmp_path, {"SeriesNumber": ct}, {"SeriesNumber": pet})
    assert ("series number", shown) in study_facts(case, CT, PET)


def test_what_the_network_reads_comes_before_the_header(tmp_path) -> None:
    case = {**dicom_case(tmp_path), keys.CLINICAL: {"age": 70.0, "gender": None, "tobacco": 1.0}}
    assert study_facts(case, CT, PET)[:3] == [DATE, ("age", "70 years"), SEX]


def test_without_dicom_age_and_sex_are_those_of_the_table() -> None:
    for case in (
        {keys.CLINICAL: {"gender": 1.0, "age": 61.0}},
        {keys.CLINICAL: {"gender": 1.0}, keys.CLINICAL_OTHERS: {"age": 61.0}},
    ):
        assert study_facts(case, CT, PET) == [("age", "61 years"), ("sex", "male"), *VOXELS]
    assert study_facts({}, CT, PET) == VOXELS


def test_files_that_have_gone_are_an_error(tmp_path) -> None:
    case = dicom_case(tmp_path)
    for path in (tmp_path / "PT").iterdir():
        path.unlink()
    with pytest.raises(DicomError):
        study_facts(case, CT, PET)
