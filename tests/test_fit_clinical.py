"""The clinical-only Cox model: against lifelines, on made-up cohorts and on a real one."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from lifelines import CoxPHFitter
from lifelines.utils import concordance_index

from command_line import read_arguments

import fit_clinical as tool
from experiments import clinical_cox as cox
from scripts import keys
from scripts.cohorts.cohort import CohortError, load_cohort
from scripts.model.losses import CoxLoss
from scripts.training.concordance import concordance_index as concordance_index_of_bundle

TOOL = Path(__file__).resolve().parents[1] / "scripts" / "fit_clinical.py"
REAL = Path(__file__).resolve().parents[2] / "shared" / "data" / "hn_clinical" / "hn_clinical.csv"
FEATURES = ("age", "t_stage", "n_stage", "hpv")


@pytest.fixture
def real_csv() -> Path:
    if not REAL.is_file():
        pytest.skip("real data hn_clinical is not beside the repository")
    return REAL


@pytest.fixture
def made_up_csv(tmp_path: Path) -> Path:
    """150 patients of three centres whose hazard rises with age and performance status; alcohol is never known."""
    rng = np.random.default_rng(3)
    rows = []
    for number in range(150):
        age, status = rng.integers(40, 85), rng.integers(0, 4)
        time = rng.exponential(2000 * np.exp(-0.06 * (age - 62) - 0.5 * status))
        followed = rng.uniform(200, 3000)
        centre = ("CHUM", "MDA", "USZ")[number % 3]
        known = number % 30 != 7
        rows.append(
            {
                "PatientID": f"{centre}-{number:03d}",
                "Age": age,
                "Gender": rng.integers(0, 2),
                "Performance Status": status if number % 3 else "",
                "M-stage": "M1" if number in (4, 16) else "M0",
                "RFS": max(1, round(min(time, followed))) if known else "",
                "Relapse": int(time <= followed) if known else "",
            }
        )
    path = tmp_path / "made_up.csv"
    pd.DataFrame(rows).to_csv(path, index=False)
    return path


def run(csv: Path, output: Path, **options) -> dict:
    tool.fit_clinical(str(csv), output=str(output), bootstrap=100, **options)
    return json.loads(output.read_text())


# --- score -------------------------------------------------------------------------------------------------


def outcome(seed: int, count: int = 80) -> tuple[np.ndarray, pd.DataFrame]:
    """Risks and times with many ties."""
    rng = np.random.default_rng(seed)
    table = pd.DataFrame({keys.TIME: rng.integers(1, 15, count), keys.EVENT: rng.integers(0, 2, count)})
    return rng.integers(0, 8, count).astype(float), table


@pytest.mark.parametrize("seed", range(4))
def test_c_index_is_that_of_lifelines_with_ties(seed):
    risk, table = outcome(seed)
    expected = concordance_index(table[keys.TIME], -risk, table[keys.EVENT])
    scored = cox.score([risk], [table], bootstrap=50, seed=0)
    assert scored.c_index == pytest.approx(expected, abs=1e-12)
    assert (scored.patients, scored.events) == (80, int(table[keys.EVENT].sum()))


def test_interval_is_that_of_resampled_patients():
    risk, table = outcome(1)
    scored = cox.score([risk], [table], bootstrap=200, seed=5)
    weights = np.random.default_rng(5).multinomial(80, np.full(80, 1 / 80), size=200)
    drawn = []
    for weight in weights:
        rows = np.repeat(np.arange(80), weight)
        drawn.append(
            concordance_index(table[keys.TIME].to_numpy()[rows], -risk[rows], table[keys.EVENT].to_numpy()[rows])
        )
    np.testing.assert_allclose((scored.low, scored.high), np.quantile(drawn, (0.025, 0.975)), atol=1e-12)
    assert scored.low < scored.c_index < scored.high


def test_pairs_are_formed_within_folds():
    risk, table = outcome(2)
    shifted = cox.score([risk, risk + 1000], [table, table], bootstrap=50, seed=0)
    single = cox.score([risk], [table], bootstrap=50, seed=0)
    assert shifted.c_index == pytest.approx(single.c_index)
    assert shifted.patients == 160


def test_no_comparable_pair_is_not_a_number():
    table = pd.DataFrame({keys.TIME: [1.0, 2.0], keys.EVENT: [0, 0]})
    scored = cox.score([np.array([0.0, 1.0])], [table], bootstrap=10, seed=0)
    assert np.isnan([scored.c_index, scored.low, scored.high]).all()
    assert tool._interval(scored) == "none (no comparable pair)"


# --- fitting -----------------------------------------------------------------------------------------------


def test_missing_numbers_become_the_training_median():
    filled = cox.fill_missing(pd.DataFrame({"x": [1.0, 3.0, np.nan]}), pd.DataFrame({"x": [np.nan, 9.0]}))
    assert [frame["x"].tolist() for frame in filled] == [[1.0, 3.0, 2.0], [2.0, 9.0]]


def test_column_that_is_missing_everywhere_becomes_zero():
    empty = pd.DataFrame({"x": [np.nan, np.nan]})
    assert cox.fill_missing(empty, empty)[0]["x"].tolist() == [0.0, 0.0]


def cox_table(**columns) -> pd.DataFrame:
    count = len(next(iter(columns.values())))
    return pd.DataFrame({**columns, keys.TIME: np.arange(1.0, count + 1), keys.EVENT: [1] * (count - 1) + [0]})


def test_without_a_penalty_redundant_columns_are_left_out():
    male = np.array([0.0, 1.0, 1.0, 0.0, 1.0, 0.0, 1.0, 1.0])
    table = cox_table(female=1 - male, male=male, x=[3.0, 1.0, 2.0, 1.0, 0.0, 2.0, 1.0, 4.0])
    assert cox.fit_cox(table, 0.0).dropped == ["male"]
    assert cox.fit_cox(table, 0.1).dropped == []


def test_constant_columns_are_left_out_and_named():
    fit = cox.fit_cox(cox_table(x=[3.0, 1.0, 2.0, 1.0, 0.0, 2.0], same=[1.0] * 6), 0.1)
    assert (fit.used, fit.dropped, fit.warnings) == (["x"], ["same"], [])


def test_doubts_of_lifelines_are_kept_not_printed_as_warnings():
    # Without a penalty, x = 1 exactly for those who relapse has no finite coefficient.
    relapse = np.arange(40) % 2
    table = pd.DataFrame({"x": relapse.astype(float), keys.TIME: np.arange(1.0, 41), keys.EVENT: relapse})
    fit = cox.fit_cox(table, penalizer=0.0)
    assert any("complete separation" in text for text in fit.warnings)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        pytest.param(cox_table(x=[1.0, 1.0, 1.0]), r"same clinical values \(x\)", id="nothing_varies"),
        pytest.param(
            cox_table(x=[1.0, 2.0]).assign(event=0), "none of the 2 training patients has a relapse", id="no_event"
        ),
    ],
)
def test_what_cannot_be_fitted(table, message):
    with pytest.raises(CohortError, match=message):
        cox.fit_cox(table, 0.1)


# --- the tool ------------------------------------------------------------------------------------------------


def test_centres_are_told_apart(made_up_csv, tmp_path, capsys):
    options = {
        "train_centres": ("CHUM", "MDA"),
        "test_centres": "USZ",
        "features": "age,gender,alcohol,performance_status",
    }
    report = run(made_up_csv, tmp_path / "out.json", **options)
    text = capsys.readouterr().out
    first = report["result"]
    assert [item["patients"] for item in (first["train"], first["test"])] == [95, 50]
    assert report["left_out"] == {"no mask, HPV status or survival: nothing to learn from": 5}
    assert report["missing"] == {"age": 0, "gender": 0, "alcohol": 145, "performance_status": 50}
    assert first["dropped"] == ["alcohol=0", "alcohol=1"]
    assert [row["column"] for row in first["coefficients"]] == ["age", "gender=0", "gender=1", "performance_status"]
    left_out = "left out: 5 patients, no mask, HPV status or survival"
    for expected in (str(made_up_csv), left_out, "alcohol 145", "alcohol=0, alcohol=1"):
        assert expected in text


def test_what_is_doubtful_about_the_table_is_told(made_up_csv, tmp_path, capsys):
    table = pd.read_csv(made_up_csv)
    table["RFS"] = table["RFS"] / 30.4  # months
    table.loc[0, "RFS"] = 9999
    table.to_csv(made_up_csv, index=False)
    report = run(made_up_csv, tmp_path / "out.json", train_centres="MDA", test_centres="USZ", features="age,gender")
    text = capsys.readouterr().out
    sentinel, longest = report["notes"][1], report["notes"][-1]
    assert "read as days: is it in months or years?" in longest
    assert "9999 in made_up.csv, row 2, CHUM-000" in sentinel
    assert f"note: {longest}" in text and f"note: {sentinel}" in text


def test_model_and_scores_are_those_of_lifelines(made_up_csv, tmp_path):
    report = run(made_up_csv, tmp_path / "out.json", train_centres="MDA", test_centres="USZ", features="age,gender")
    table = pd.read_csv(made_up_csv).dropna(subset=["RFS"])
    table = table.assign(female=1.0 - table["Gender"], centre=table["PatientID"].str.split("-").str[0])
    columns = ["Age", "female", "Gender"]
    model = CoxPHFitter(penalizer=0.1).fit(
        table.loc[table.centre == "MDA", [*columns, "RFS", "Relapse"]], "RFS", "Relapse"
    )
    first = report["result"]
    np.testing.assert_allclose([row["log_hazard_ratio"] for row in first["coefficients"]], model.params_, rtol=1e-5)
    for side, centre in (("train", "MDA"), ("test", "USZ")):
        part = table[table.centre == centre]
        expected = concordance_index(part["RFS"], -model.predict_partial_hazard(part), part["Relapse"])
        assert first[side]["c_index"] == pytest.approx(expected, abs=1e-9)


def test_cross_validation_uses_the_folds_of_the_bundle(made_up_csv, tmp_path):
    options = {"features": ("age", "performance_status"), "num_folds": 3, "seed": 4}
    report = run(made_up_csv, tmp_path / "out.json", **options)
    cohort = load_cohort(None, made_up_csv, ("age", "performance_status"), require_images=False)
    concordant = comparable = 0.0
    for fold in range(3):
        split = cohort.split("partial", 3, fold, 4)
        sides = []
        for cases in (split.training, split.validation):
            known = [case for case in cases if case[keys.SURV_KNOWN]]
            sides.append(cox.code_cohort(known, ("age", "performance_status")))
        train, test = cox.fill_missing(*sides)
        risk = CoxPHFitter(penalizer=0.1).fit(train, keys.TIME, keys.EVENT).predict_log_partial_hazard(test)
        pairs = comparable_pairs(test)
        concordant += pairs * concordance_index(test[keys.TIME], -risk, test[keys.EVENT])
        comparable += pairs
    first = report["result"]
    assert first["test"]["c_index"] == pytest.approx(concordant / comparable, abs=1e-9)
    assert first["test"]["patients"] == first["train"]["patients"] == 145
    assert first["train"]["low"] is None


def comparable_pairs(table: pd.DataFrame) -> int:
    rows = list(zip(table[keys.TIME], table[keys.EVENT], strict=True))
    return sum(bool(e) and (t < other or (t == other and not f)) for t, e in rows for other, f in rows)


def test_doubtful_fit_is_printed(tmp_path, capsys):
    path = tmp_path / "ehr.csv"
    lines = [f"{'AB'[n % 4 > 1]}-{n:03d},{n % 2},{n % 2},{n + 1}" for n in range(80)]
    path.write_text("\n".join(["PatientID,Tobacco,Relapse,RFS", *lines]))
    options = {"train_centres": "A", "test_centres": "B", "features": "tobacco"}
    run(path, tmp_path / "out.json", penalizer=0.0, **options)
    assert "lifelines warns: " in capsys.readouterr().out


def test_data_set_folder_without_images(made_up_csv, tmp_path, capsys):
    tool.fit_clinical(str(made_up_csv.parent), features="age", num_folds=2, bootstrap=20)
    assert f"data: {made_up_csv}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        pytest.param(
            {"train_centres": "HGJ", "test_centres": "USZ"}, "no patient is from HGJ; the centres", id="absent"
        ),
        pytest.param({"train_centres": "MDA"}, "--train_centres and --test_centres go together", id="only_one"),
        pytest.param({"train_centres": "MDA", "test_centres": "MDA"}, "MDA stands in", id="shared"),
        pytest.param({"features": "weight"}, "unknown clinical feature 'weight'", id="feature"),
        pytest.param({"features": "t_stage", "num_folds": 2}, "same clinical values", id="no_such_column"),
        pytest.param({"num_folds": 1}, "num_folds is 1; at least 2", id="folds"),
        pytest.param({"penalizer": -0.1}, "--seed and --penalizer are 0 or more", id="penalizer"),
        pytest.param({"seed": -1}, "--seed and --penalizer are 0 or more", id="seed"),
        pytest.param({"bootstrap": 0}, "--bootstrap is 1 or more", id="bootstrap"),
    ],
)
def test_options_that_cannot_be_met(made_up_csv, options, message):
    with pytest.raises(ValueError, match=message):
        tool.fit_clinical(str(made_up_csv), **options)


def test_a_mapping_is_for_a_table(tmp_path):
    with pytest.raises(CohortError, match="--mapping is for one table, not for the folder"):
        tool.fit_clinical(str(tmp_path), mapping="mapping.json")


def test_cohort_without_outcomes(tmp_path):
    path = tmp_path / "ehr.csv"
    path.write_text("PatientID,Age,HPV Status\nCHUM-001,61,1\nCHUM-002,62,0\n")
    with pytest.raises(CohortError, match=r"ehr\.csv: no patient has both RFS and Relapse"):
        tool.fit_clinical(str(path), features="age")


def test_command_line(made_up_csv, capsys):
    centres = ["--train_centres", "5,1", "--test_centres=8"]
    typed = [str(made_up_csv), *centres, "--features=age,gender", "--bootstrap=20"]
    tool.fit_clinical(**read_arguments(tool.fit_clinical, typed))
    assert "train: MDA, CHUM, 95 patients" in capsys.readouterr().out


def test_failure_is_one_line_and_an_exit_code(made_up_csv):
    command = [sys.executable, str(TOOL), str(made_up_csv), "--train_centres=MDA", "--test_centres=6"]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 1
    assert run.stderr == "fit_clinical: no patient is from HGJ; the centres of this cohort are CHUM, MDA, USZ\n"


# --- the bundle's own Cox loss and C-index ---------------------------------------------------------------------


def fit_linear_torch_model(table: pd.DataFrame, columns: list[str]) -> torch.nn.Linear:
    """Ridge Cox model by the bundle's loss: full batch, columns already standardised."""
    x = torch.tensor(table[columns].to_numpy(), dtype=torch.float64)
    time, event = torch.tensor(table[keys.TIME].to_numpy()), torch.tensor(table[keys.EVENT].to_numpy()).bool()
    model = torch.nn.Linear(len(columns), 1, bias=False, dtype=torch.float64)
    torch.nn.init.zeros_(model.weight)
    loss = CoxLoss()
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=100, line_search_fn="strong_wolfe")
    events_share = event.double().mean()

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        # lifelines averages the likelihood over patients, CoxLoss over events.
        value = events_share * loss(model(x)[:, 0], time, event) + 0.5 * 0.1 * model.weight.square().sum()
        value.backward()
        return value

    optimizer.step(closure)
    return model


def test_real_patients_through_the_cox_loss_and_c_index_of_the_bundle(real_csv):
    cohort = load_cohort(None, real_csv, FEATURES, require_images=False)
    train, test = (
        cox.code_cohort([case for case in cohort.cases if case[keys.CENTRE] in side], FEATURES)
        for side in (("HGJ", "CHUS"), ("HMR", "CHUM"))
    )
    train, test = cox.fill_missing(train, test)
    columns = [name for name in train.columns if name not in (keys.TIME, keys.EVENT)]
    mean, deviation = train[columns].mean(), train[columns].std()
    train[columns], test[columns] = (train[columns] - mean) / deviation, (test[columns] - mean) / deviation
    model = fit_linear_torch_model(train, columns)
    reference = CoxPHFitter(penalizer=0.1).fit(train, keys.TIME, keys.EVENT)
    np.testing.assert_allclose(model.weight.detach()[0], reference.params_, atol=2e-3)
    for table, expected in ((train, 0.642), (test, 0.731)):
        risk = model(torch.tensor(table[columns].to_numpy()))[:, 0].detach()
        c_index = concordance_index_of_bundle(table[keys.TIME], table[keys.EVENT], risk)
        assert c_index == pytest.approx(expected, abs=0.003)


# --- real data -----------------------------------------------------------------------------------------------


def test_real_patients_of_two_centres_predict_two_others(real_csv, tmp_path, capsys):
    options = {"train_centres": ("HGJ", "CHUS"), "test_centres": ("HMR", "CHUM"), "features": FEATURES}
    report = run(real_csv, tmp_path / "out.json", **options)
    first = report["result"]
    assert [round(first[side]["c_index"], 3) for side in ("train", "test")] == [0.642, 0.731]
    assert [first["train"][key] for key in ("patients", "events")] == [194, 50]
    assert [first["test"][key] for key in ("patients", "events")] == [106, 26]
    assert report["missing"] == {"age": 0, "t_stage": 10, "n_stage": 0, "hpv": 180}
    assert first["test"]["low"] > 0.55
    assert str(real_csv) in capsys.readouterr().out
