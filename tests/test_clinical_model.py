"""The clinical model that is shipped: what is in it, against lifelines and scikit-learn, and that it can be remade."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import numpy as np
import pandas as pd
import pytest
from lifelines import CoxPHFitter
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score

import fit_clinical as tool
from conftest import BUNDLE, ROOT
from experiments import clinical_evidence as made
from experiments.clinical_cox import code_cohort, fill_missing
from scripts import keys
from scripts.cohorts.cohort import Case, CohortError
from scripts.evaluation.clinical_model import MODEL_FILE, ClinicalModel, ClinicalModelError, few_known
from scripts.evaluation.survival import FoldScale

DATA = ROOT.parent / "shared" / "data"
RADCURE = DATA / "radcure_clinical" / "RADCURE_Clinical_v04_20241219.csv"
EXTERNAL = DATA / "hn_clinical" / "hn_clinical.csv"
FEATURES = ("age", "gender", "t_stage")


def made_up(count: int = 600, seed: int = 0) -> tuple[list[Case], list[int]]:
    """Patients whose hazard rises with age and T; HPV follows from the sex."""
    rng = np.random.default_rng(seed)
    cases, years = [], []
    for number in range(count):
        age, stage, male = float(rng.integers(40, 85)), float(rng.integers(1, 5)), float(rng.integers(0, 2))
        time = rng.exponential(3000 * np.exp(-0.03 * (age - 62) - 0.4 * (stage - 2)))
        followed = rng.uniform(500, 3000)
        hpv = float(rng.random() < (0.7 if male else 0.4))
        cases.append(
            {
                keys.PATIENT_ID: f"P-{number:03d}",
                keys.CENTRE: "A",
                keys.CLINICAL: {"age": age, "gender": male, "t_stage": stage if number % 7 else None, "hpv": hpv},
                keys.TIME: float(max(1, round(min(time, followed)))),
                keys.EVENT: bool(time <= followed),
                keys.SURV_KNOWN: True,
                keys.HPV: hpv,
                keys.HPV_KNOWN: True,
            }
        )
        years.append(2000 + number % 12)
    return cases, years


@pytest.fixture(scope="module")
def model() -> ClinicalModel:
    cases, years = made_up()
    return made.make_model(cases, years, FEATURES, 0.01, {"source": "made up"}, {})


def test_coefficients_and_ranks_are_those_of_lifelines(model):
    cases, _ = made_up()
    table, _ = fill_missing(*[code_cohort(cases, FEATURES)] * 2)
    reference = CoxPHFitter(penalizer=0.01).fit(table, keys.TIME, keys.EVENT)
    np.testing.assert_allclose(list(model.coefficients.values()), reference.params_, rtol=1e-5)
    found = model.log_hazard([case[keys.CLINICAL] for case in cases])
    expected = reference.predict_log_partial_hazard(table).to_numpy()
    np.testing.assert_allclose(found - found.mean(), expected - expected.mean(), atol=1e-4)


def test_survival_is_right_on_the_patients_it_is_made_from(model):
    """Mean predicted survival is Kaplan-Meier's at one, two and five years, within two per cent."""
    from lifelines import KaplanMeierFitter

    cases, _ = made_up()
    fitter = KaplanMeierFitter().fit([c[keys.TIME] for c in cases], [c[keys.EVENT] for c in cases])
    days = np.array([1, 2, 5]) * 365.25
    predicted = model.calibration.survival(model.normalised([case[keys.CLINICAL] for case in cases]), days).mean(axis=0)
    np.testing.assert_allclose(predicted, fitter.survival_function_at_times(days), atol=0.02)


def test_nothing_of_single_patients_is_stored(model):
    calibration = model.calibration
    np.testing.assert_allclose(np.diff(calibration.baseline_days), 365.25 / 12, atol=0.01)
    assert min(calibration.baseline_at_risk) >= made.LEAST_AT_RISK
    assert calibration.last_day == calibration.baseline_days[-1]
    assert len(calibration.quantiles) == made.PERCENTILES


def test_out_of_fold_log_hazards_are_of_models_of_other_years():
    cases, years = made_up(200)
    risks, tables, pooled = made.out_of_fold(cases, years, FEATURES, 0.01)
    table, folds = code_cohort(cases, FEATURES), made.year_folds(years)
    assert sum(map(len, risks)) == sum(map(len, tables)) == 200
    for rows, others in folds:
        assert not {years[row] for row in rows} & {years[row] for row in others}
    rows, others = folds[3]
    train, test = fill_missing(table.iloc[rows], table.iloc[others])
    reference = CoxPHFitter(penalizer=0.01).fit(train, keys.TIME, keys.EVENT)
    columns = list(reference.params_.index)
    scale = FoldScale.of(train[columns].to_numpy() @ reference.params_.to_numpy())
    expected = (test[columns].to_numpy() @ reference.params_.to_numpy() - scale.centre) / scale.scale
    np.testing.assert_allclose(pooled[others], expected, atol=1e-8)


def test_missing_values_are_filled(model):
    full = {"age": model.fill["age"], "gender": 1.0, "t_stage": model.fill["t_stage"]}
    found = model.log_hazard([{"gender": "male"}, full, {}])
    assert found[0] == pytest.approx(found[1])
    assert found[0] - found[2] == pytest.approx(model.coefficients["gender=1"])


def test_hpv_is_that_of_scikit_learn():
    cases, _ = made_up()
    train, test = cases[:400], cases[400:]
    found = made.hpv_probabilities(made.fit_hpv(train, ("gender", "age")), test, ("gender", "age"))
    clinical = [pd.DataFrame([case[keys.CLINICAL] for case in part]) for part in (train, test)]
    coded = [
        np.column_stack([table["gender"] == 0, table["gender"] == 1, table["age"]]).astype(float) for table in clinical
    ]
    mean, deviation = coded[0].mean(axis=0), coded[0].std(axis=0)
    status = [[int(c[keys.HPV]) for c in part] for part in (train, test)]
    reference = LogisticRegression().fit((coded[0] - mean) / deviation, status[0])
    np.testing.assert_allclose(found, reference.predict_proba((coded[1] - mean) / deviation)[:, 1], atol=1e-6)
    judged = made.judge_hpv(found, test, seed=0, samples=20)
    assert judged["roc_auc"]["value"] == pytest.approx(roc_auc_score(status[1], found))
    assert judged["difference"]["value"] == pytest.approx(np.mean(status[1]) - found.mean())
    assert judged["slope"]["low"] < judged["slope"]["value"] < judged["slope"]["high"]


def test_halves_by_year():
    cases, years = made_up(120)
    early, late, middle = made.split_by_year(cases, years)
    assert (middle, len(early) + len(late)) == (2005, 120)
    with pytest.raises(CohortError, match="before 2003"):
        made.split_by_year(cases[:3], [2003] * 3)
    with pytest.raises(CohortError, match="treated in one year"):
        made.year_folds([2003] * 3)


@pytest.mark.parametrize("known, few", [(8, False), (7, False), (6, True), (0, True)])
def test_few_values(known, few):
    assert few_known(known, 8) is few


# --- files --------------------------------------------------------------------------------------------------------


def test_a_file_gives_the_model_back(model, tmp_path):
    path = tmp_path / "model.json"
    path.write_text(json.dumps(asdict(model)))
    assert asdict(ClinicalModel.read(path)) == asdict(model)


@pytest.mark.parametrize(
    "change, message",
    [
        pytest.param(lambda content: "[]", "expected the names", id="no_object"),
        pytest.param(lambda content: "{", "is no clinical model", id="no_json"),
        pytest.param(lambda content: json.dumps(content | {"format": 2}), "and the format 1", id="format"),
        pytest.param(lambda content: json.dumps(content | {"extra": 2}), "expected the names", id="unknown_name"),
        pytest.param(lambda content: json.dumps(content | {"features": ["age"]}), "do not belong to age", id="columns"),
        pytest.param(lambda content: json.dumps(content | {"features": ["size"]}), "unknown clinical", id="feature"),
        pytest.param(lambda content: json.dumps(content | {"calibration": {}}), "stored calibration", id="calibration"),
    ],
)
def test_files_that_are_no_model(model, tmp_path, change: Callable[[dict[str, Any]], str], message):
    path = tmp_path / "model.json"
    path.write_text(change(asdict(model)))
    with pytest.raises(ClinicalModelError, match=message):
        ClinicalModel.read(path)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(ClinicalModelError, match=r"none\.json cannot be read: No such file"):
        ClinicalModel.read(tmp_path / "none.json")


def test_the_shipped_model():
    shipped = ClinicalModel.read()
    assert MODEL_FILE == BUNDLE / "models" / "clinical_rfs.json"
    assert (shipped.about["patients"], shipped.about["events"]) == (3267, 701)
    assert "CC BY 4.0" in shipped.about["licence"] and "RADCURE" in shipped.about["source"]
    assert shipped.summary == (
        "from clinical values alone; trained on 3,267 patients of one hospital, externally C-index 0.655 "
        "[0.591, 0.721] (300 patients, 76 events, 4 hospitals)"
    )
    worse = shipped.log_hazard([{"t_stage": 4, "n_stage": 3, "hpv": 0}, {"t_stage": 1, "n_stage": 0, "hpv": 1}])
    assert worse[0] - worse[1] == pytest.approx(3 * 0.374796 + 3 * 0.348929 + 0.04176 + 0.714294)
    survival = shipped.calibration.survival(shipped.normalised([{}]), np.array([2.0, 5.0]) * 365.25)[0]
    assert 0.6 < survival[1] < survival[0] < 0.9
    assert "RADCURE" in (BUNDLE / "docs" / "data_license.txt").read_text("utf-8")


def test_the_shipped_model_can_be_remade(tmp_path, capsys):
    for path in (RADCURE, EXTERNAL):
        if not path.is_file():
            pytest.skip(f"real data {path.parent.name} is not beside the repository")
    mapping = ROOT / "scripts" / "experiments" / "mappings" / "radcure.json"
    out, output = tmp_path / "model.json", tmp_path / "evidence.json"
    tool.fit_clinical(
        str(RADCURE),
        mapping=str(mapping),
        external=str(EXTERNAL),
        test_centres="HMR,CHUM",
        out=str(out),
        output=str(output),
    )
    assert out.read_text("utf-8") == MODEL_FILE.read_text("utf-8")
    report = json.loads(output.read_text("utf-8"))
    assert len(report["excluded"]) == 79
    rounded = {
        name: round(figure["value"], 3)
        for name, figure in {
            "temporal": report["temporal"]["c_index"],
            "uno": report["temporal"]["uno_c_index"],
            "by_year": report["by_year"],
            "external": report["external"]["c_index"],
            "HMR and CHUM": report["external_centres"]["c_index"],
            "hpv": report["hpv"]["temporal"]["roc_auc"],
            "hpv external": report["hpv"]["external"]["roc_auc"],
        }.items()
    }
    assert rounded == {
        "temporal": 0.709,
        "uno": 0.707,
        "by_year": 0.700,
        "external": 0.655,
        "HMR and CHUM": 0.740,
        "hpv": 0.839,
        "hpv external": 0.748,
    }
    assert abs(report["temporal"]["calibration_2y"]["difference"]["value"]) < 0.02
    assert report["external"]["known"] == {
        "age": 300,
        "gender": 0,
        "performance_status": 0,
        "tobacco": 0,
        "treatment": 0,
        "t_stage": 290,
        "n_stage": 300,
        "hpv": 120,
    }
    assert "written: " in capsys.readouterr().out


@pytest.mark.parametrize(
    "options, message",
    [
        pytest.param({"out": "m.json"}, "--out fits all patients of a table read by --mapping", id="no_mapping"),
        pytest.param({"external": "x.csv"}, "--external tests the model that --out makes", id="external_alone"),
    ],
)
def test_options_that_cannot_be_met(options, message):
    with pytest.raises(CohortError, match=message):
        tool.fit_clinical("table.csv", **options)
