"""The clinical model in every prediction: which values reach it, what is said of its result, and where."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from predict import with_values
from runtimes.inference import is_whole
from scripts import keys
from scripts.cohorts.clinical import ClinicalValueError
from scripts.cohorts.cohort import inference_cases, load_cohort
from scripts.evaluation.clinical_model import ClinicalModelError, shipped
from scripts.imaging.transforms import CodeClinicald
from scripts.prediction import description
from scripts.prediction.description import describe_clinical_model
from scripts.prediction.findings import clinical_model_section, clinical_name
from scripts.prediction.inputs import add_clinical_values
from scripts.prediction.outputs import COLUMNS, prediction_row

FEATURES = ("age", "m_stage")
ALL = {
    "age": 61.0,
    "gender": 1.0,
    "performance_status": 0.0,
    "tobacco": 1.0,
    "treatment": 1.0,
    "t_stage": 3.0,
    "n_stage": 2.0,
    "hpv": 1.0,
}


@pytest.fixture
def folder(tmp_path) -> Path:
    for kind in ("CT", "PT"):
        (tmp_path / "P-1").mkdir(exist_ok=True)
        (tmp_path / "P-1" / f"P-1__{kind}.nii.gz").write_bytes(b"x")
    return tmp_path


def case_of(folder: Path, titles: str, row: str) -> dict[str, Any]:
    (folder / "ehr.csv").write_text(f"PatientID,{titles}\nP-1,{row}\n")
    (case,) = inference_cases(folder, None, FEATURES)
    return case


@pytest.mark.parametrize(
    "titles, row, others",
    [
        pytest.param("Age,T-stage,N-stage", "61,T4a,2b", {"t_stage": 4, "n_stage": 2}, id="stages"),
        pytest.param("Age,HPV Status", "61,1", {"hpv": 1}, id="hpv_is_a_label_too"),
        pytest.param("Age,T-stage", "61,Tx", {}, id="missing"),
        pytest.param("Age,T-stage,Gender", "61,banana,1", {"gender": 1}, id="no_value_is_left_out"),
        pytest.param("Age,T-stage,T", "61,2,3", {"t_stage": 2}, id="contradiction_keeps_the_first"),
        pytest.param("Age,Site", "61,CHUM", {}, id="another_column_of_that_name"),
        pytest.param("Age,Gender (1=F; 0=M)", "61,1", {}, id="another_coding"),
        pytest.param("Age,M-stage", "61,0", {}, id="none"),
    ],
)
def test_values_that_the_network_does_not_read(folder, titles, row, others):
    case = case_of(folder, titles, row)
    assert case[keys.CLINICAL_OTHERS] == others
    assert case[keys.PROBLEM] == ""
    assert list(case[keys.CLINICAL]) == list(FEATURES)


def test_a_value_that_cannot_be_read_is_told(folder, caplog):
    with caplog.at_level(logging.WARNING):
        case_of(folder, "Age,T-stage", "61,banana")
    assert "ehr.csv, row 2, column 'T-stage', P-1: 'banana' is no value of t_stage" in caplog.text


def test_they_change_no_fold(folder):
    found = []
    for row in ("61,0,2,1,800", "61,0,4,1,800"):
        (folder / "ehr.csv").write_text(f"PatientID,Age,M-stage,T-stage,Relapse,RFS\nP-1,{row}\n")
        found.append(load_cohort(folder, clinical_features=FEATURES))
    assert found[0].cases[0][keys.CLINICAL_OTHERS] != found[1].cases[0][keys.CLINICAL_OTHERS]
    assert found[0].fingerprint == found[1].fingerprint


def test_values_of_options_and_requests(folder, caplog):
    case = case_of(folder, "Age", "61")
    with caplog.at_level(logging.WARNING):
        add_clinical_values([case], {"T": "T2", "m_stage": 0, "site": "larynx"}, "request")
    assert case[keys.CLINICAL_OTHERS] == {"t_stage": 2}
    assert case[keys.CLINICAL] == {"age": 61, "m_stage": 0}
    assert "request: not read by this model: site" in caplog.text


def test_a_value_of_one_patient_that_only_the_clinical_model_reads_is_optional(folder, caplog):
    case = case_of(folder, "Age", "61")
    with caplog.at_level(logging.WARNING):
        add_clinical_values([case], {"T": "banana", "N": "N1", "m_stage": 0}, "ehr.json")
    assert (case[keys.CLINICAL_OTHERS], case[keys.CLINICAL]) == ({"n_stage": 1}, {"age": 61, "m_stage": 0})
    assert "ehr.json, T: 'banana' is no value of t_stage" in caplog.text and "read as missing" in caplog.text
    with pytest.raises(ClinicalValueError, match="M-stage: 'banana' is no value"):
        add_clinical_values([case], {"M-stage": "banana"}, "ehr.json")
    with pytest.raises(ClinicalValueError, match="option, t_stage: 'banana' is no value"):
        with_values([case], None, None, {"t_stage": "banana"})


def test_they_travel_beside_the_vector_of_the_network():
    given = {
        keys.CLINICAL: {"age": 61.0},
        keys.CLINICAL_OTHERS: {"t_stage": 3.0},
        keys.CLINICAL_SOURCE: {"t_stage": "x"},
    }
    item = CodeClinicald(FEATURES)(given)
    assert item[keys.CLINICAL].tolist() == [61.0, 0.0]
    rows = json.loads(item[keys.CLINICAL_VALUES])
    assert [row["name"] for row in rows] == ["age", "m_stage", "t_stage"]
    assert rows[2] == {"name": "t_stage", "value": 3.0, "coded": None, "missing": False, "source": "x"}


# --- what is said ---------------------------------------------------------------------------------------------------


def test_survival_is_that_of_the_file():
    found, model = describe_clinical_model(ALL), shipped()
    calibration = model.calibration
    risk = sum(model.coefficients[name] * value for name, value in ALL.items() if name in model.fill)
    risk += sum(model.coefficients[f"{name}={value:g}"] for name, value in ALL.items() if name not in model.fill)
    z = (risk - calibration.fold_centres[0]) / calibration.fold_scales[0]
    at = np.searchsorted(calibration.baseline_days, 2 * 365.25, side="right") - 1
    expected = np.exp(-calibration.baseline_hazard[at] * np.exp(calibration.slope * z))
    rows = {row["years"]: row["survival"] for row in found["survival"]["recurrence_free_survival"]}
    assert rows[2] == pytest.approx(expected)
    assert rows[1] > rows[2] > rows[3] > rows[5]
    assert (found["known"], found["warning"], found["unavailable"]) == (8, "", "")
    assert found["survival"]["risk_group"] == "intermediate"


@pytest.mark.parametrize(
    "lacking, known, warns",
    [
        pytest.param((), 8, False, id="all"),
        pytest.param(("hpv",), 7, False, id="one_missing"),
        pytest.param(("t_stage", "n_stage"), 6, True, id="two_missing"),
        pytest.param(tuple(ALL), 0, True, id="none_known"),
    ],
)
def test_few_values_are_told(lacking, known, warns):
    found = describe_clinical_model({name: value for name, value in ALL.items() if name not in lacking})
    assert (found["known"], bool(found["warning"])) == (known, warns)
    assert all(clinical_name(name) in found["warning"] for name in lacking) or not warns
    section = clinical_model_section(found)
    assert bool(section.loud) is warns
    assert ("values known", f"{known} of 8") in section.rows


def test_the_section_names_the_model():
    section = clinical_model_section(describe_clinical_model(ALL))
    assert section.title == "Recurrence-free survival from clinical values alone"
    assert "trained on 3,267 patients of one hospital, externally C-index 0.655" in section.notes[0]
    assert "counted from the start of radiotherapy" in section.notes[1] and "deaths" in section.notes[1]
    assert [name for name, _ in section.rows][1:] == [
        "1 year",
        "2 years",
        "3 years",
        "5 years",
        "values known",
    ]


def test_without_the_file_the_reason_is_given(monkeypatch):
    def gone() -> None:
        raise ClinicalModelError("the clinical model x cannot be read: No such file")

    monkeypatch.setattr(description, "shipped", gone)
    found = describe_clinical_model(ALL)
    assert (found["survival"], found["unavailable"]) == (None, "the clinical model x cannot be read: No such file")
    assert clinical_model_section(found).rows == [
        ("survival", "not available: the clinical model x cannot be read: No such file")
    ]


@pytest.mark.parametrize("stage, whole", [(3.0, True), (2.0, False)])
def test_another_value_makes_a_new_prediction(tmp_path, stage, whole):
    case = {keys.CLINICAL: {"age": 61.0}, keys.CLINICAL_OTHERS: {**ALL, "t_stage": stage}, keys.FINGERPRINT: "f"}
    prediction = {
        "fingerprint": "f",
        "clinical": [{"name": "age", "value": 61.0}],
        "clinical_model": describe_clinical_model(ALL),
        "quality": {"forced": False},
        "files": {},
    }
    (tmp_path / "prediction.json").write_text(json.dumps(prediction))
    assert is_whole(tmp_path, case, [], force=False) is whole


def test_columns_of_the_table():
    prediction = {
        **dict.fromkeys(("survival", "hpv", "tumour")),
        "clinical_model": describe_clinical_model(ALL),
        "quality": {"verdict": "ok", "forced": False},
        "crop": {"method": "mask", "flag": ""},
        "model": {"trained_on": "phantoms", "sha256": "ab"},
    }
    row = prediction_row(prediction)
    rows = prediction["clinical_model"]["survival"]["recurrence_free_survival"]
    assert set(row) <= set(COLUMNS)
    assert row["clinical_model_values"] == "8 of 8"
    assert row["clinical_model_summary"].startswith("from clinical values alone; trained on 3,267 patients")
    assert [row[f"clinical_model_survival_{year}y"] for year in (1, 2, 3, 5)] == [each["survival"] for each in rows]
    assert 0 < row["clinical_model_percentile"] < 100
    assert row["survival_2y"] == ""
