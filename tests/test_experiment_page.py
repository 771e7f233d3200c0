"""The page about an experiment says what it is on, shows what there is and why something is missing."""

from __future__ import annotations

import json
import re
import shutil
import sys
from html import unescape
from pathlib import Path

import pandas as pd
import pytest
from synthetic_run import external_table, make_cohort, make_run

import evaluate_folds
from experiments import page as tool
from experiments.experiment import ExperimentError, evaluation_folder

SAMPLES = 20


def text_of(path: Path) -> str:
    """The page without markup and pictures."""
    html = re.sub(r"<style>.*?</style>|data:image[^\"]*", "", path.read_text(), flags=re.DOTALL)
    return " ".join(unescape(re.sub(r"<[^>]*>", " ", html)).split())


def write_page(run: Path, *others: Path, examples: bool = False) -> str:
    """The text of the page of an evaluated experiment."""
    return text_of(tool.write_page(run, [tool.read_evaluated(other) for other in others], examples))


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[str, Path]:
    """Evaluated experiments on a cohort that says that it is of phantoms."""
    folder = tmp_path_factory.mktemp("runs")
    cohort = make_cohort(folder / "cohort")
    (cohort / "cohort.json").write_text(json.dumps({"notice": "Digital phantoms, for software demonstration only"}))
    made = {
        "partial": make_run(folder / "partial", cohort),
        "centres": make_run(folder / "centres", cohort, "leave_one_centre_out"),
        "surv": make_run(folder / "surv", cohort, "ablation", tasks=["surv"]),
        "all": make_run(folder / "all", cohort, "ablation"),
    }
    for run in made.values():
        evaluate_folds.evaluate_folds(str(run), samples=SAMPLES, examples=False)
    for fold, doubts in enumerate(["P1,mask_uptake\nP1,misalignment\n", "P2,mask_uptake\n"]):
        place = evaluation_folder(made["partial"], fold, "validation")
        (place / "quality.csv").write_text(f"PatientID,check\n{doubts}")
        (place / "exclusions.csv").write_text(f"PatientID,set,reason\nP9,cohort,no PET\nP{fold},validation,no PET\n")
    return made


@pytest.fixture(scope="module")
def page(runs) -> str:
    return write_page(runs["partial"], runs["centres"], runs["surv"], runs["all"])


def test_phantoms_and_research_use_are_said_before_anything_else(page) -> None:
    start = page[:600]
    assert "digital PHANTOMS" in start
    assert "For research only" in start
    assert "90 digital phantoms" in page


def test_every_figure_of_the_evaluation_is_on_the_page(runs, page) -> None:
    report = json.loads((runs["partial"] / "evaluation" / "metrics.json").read_text())
    for name, row in report["pooled"]["metrics"].items():
        shown = row.get("reason") != tool.NOT_APART  # of a model with one class of tumour
        assert (tool.value_cell(row, tool.MEASURES[name].digits) in page) == shown, name
    assert tool.value_cell(report["oracle"]) in page
    assert tool.value_cell(report["clinical_only"]["model_minus_clinical"]) in page
    for name, row in report["clinical_only"]["hpv"]["model_minus_clinical"].items():
        assert tool.value_cell(row) in page and tool.value_cell(report["clinical_only"]["hpv"][name]) in page
    html = (runs["partial"] / "report.html").read_text()
    assert html.count("data:image/png;base64,") == len(report["figures"]) + 3
    assert not re.search(r'(src|href)="(?!data:)', html)


def test_the_cohort_and_its_flow_are_told(page) -> None:
    assert "90 patients in the folder or its tables" in page
    assert (
        "90 cases evaluated by a network that had not seen them: 75 for segmentation, 72 for HPV, 80 for survival"
        in page
    )
    assert "female: 45, male: 45" in page
    assert "2 are left out, with the reasons: see fold_*/evaluation*/exclusions.csv" in page
    assert "Quality control: 2 of the evaluated cases are doubtful (mask_uptake 2, misalignment 1)" in page


def test_the_papers_tables_are_rebuilt(runs, page) -> None:
    table = page[page.index("Table 1") : page.index("Table 2")]
    for name in ("surv", "all"):
        report = json.loads((runs[name] / "evaluation" / "metrics.json").read_text())
        assert tool.value_cell(report["pooled"]["metrics"]["c_index"]) in table
    assert table.index("tasks cases") < table.index("survival validation") < table.index("segmentation, HPV, survival")
    protocols = page[page.index("Table 2") : page.index("Each centre left out")]
    report = json.loads((runs["partial"] / "evaluation" / "metrics.json").read_text())
    mean = report["fold_mean"]["c_index"]
    assert f"{mean['mean']:.3f} ± {mean['standard_deviation']:.3f}" in protocols
    assert "CHUM" in page[page.index("Each centre left out") :]


def test_experiments_of_the_same_tasks_are_told_apart(runs, tmp_path) -> None:
    run, again = (
        Path(shutil.copytree(runs[name], tmp_path / new)) for name, new in (("surv", "run"), ("all", "again"))
    )
    table = write_page(run, runs["all"], again)
    table = table[table.index("Table 1") : table.index("Table 2")]
    assert "segmentation, HPV, survival (all) validation" in table
    assert "segmentation, HPV, survival (again) validation" in table
    assert "survival validation" in table, "the only one of its tasks needs no name"


def test_centres_have_survival_figures_or_the_reason(runs, page) -> None:
    centres = json.loads((runs["partial"] / "evaluation" / "metrics.json").read_text())["centres"]
    part = page[page.index("By centre") : page.index("Example cases")]
    assert tool.value_cell(centres["MDA"]["survival"]["auc_2y"]) in part
    assert "none: too few: 3 patients of at least 10" in part


def test_another_cohort_has_all_figures_and_pictures(runs, tmp_path) -> None:
    run = Path(shutil.copytree(runs["partial"], tmp_path / "run"))
    others = str(external_table(run, tmp_path))
    evaluate_folds.evaluate_folds(str(run), external=others, samples=SAMPLES, examples=False)
    external = json.loads((run / "evaluation" / "metrics.json").read_text())["external"]
    text = text_of(run / "report.html")
    part = text[text.index("Another cohort") : text.index("Example cases")]
    figures = [external["metrics"]["dice"], external["survival"]["uno_c_index"], external["survival"]["brier_skill"]]
    figures.append(external["centres"]["MDA"]["survival"]["calibration_2y"]["difference"])
    for row in figures:
        assert tool.value_cell(row) in part
    assert "C-index of clinical values alone none: the cohort of" in part
    html = (run / "report.html").read_text()
    pictures = html[html.index("Another cohort") : html.index("Example cases")].count("data:image/png;base64,")
    assert pictures == len(external["figures"]) == 5


def test_missing_runs_tell_how_to_make_them(runs) -> None:
    text = write_page(runs["surv"])
    assert "No cross-validation (protocol partial or full) was given" in text
    assert "Not drawn: not a task of this model" in text
    assert "None: no case has both a true and a predicted mask" in text


def test_real_data_are_not_called_phantoms(runs, tmp_path) -> None:
    run = Path(shutil.copytree(runs["all"], tmp_path / "run"))
    path = run / "evaluation" / "metrics.json"
    report = json.loads(path.read_text()) | {"data": "90 cases of 3 centres; research use only"}
    path.write_text(json.dumps(report))
    text = write_page(run)
    assert "PHANTOMS" not in text
    assert "For research only" in text


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        pytest.param("evaluation/metrics.json", None, "is not evaluated: run", id="not_evaluated"),
        pytest.param("experiment.json", None, "make an experiment with", id="no_experiment"),
        pytest.param("evaluation/metrics.json", {"folds_evaluated": [0, 1]}, r"finished are \[0, 1, 2\]", id="old"),
        pytest.param("evaluation/metrics.json", {"centres": {"MDA": {"c_index": {}}}}, "earlier version", id="version"),
    ],
)
def test_what_cannot_be_reported_is_refused(runs, tmp_path, name, change, message) -> None:
    run = Path(shutil.copytree(runs["partial"], tmp_path / "run"))
    if change is None:
        (run / name).unlink()
    else:
        (run / name).write_text(json.dumps(json.loads((run / name).read_text()) | change))
    with pytest.raises(ExperimentError, match=message):
        tool.read_evaluated(run)


def test_an_experiment_on_another_cohort_is_refused(runs, tmp_path) -> None:
    run = Path(shutil.copytree(runs["all"], tmp_path / "run"))
    record = json.loads((run / "experiment.json").read_text())
    record["cohort"]["fingerprint"] = "other"
    (run / "experiment.json").write_text(json.dumps(record))
    with pytest.raises(ExperimentError, match="another cohort"):
        write_page(runs["partial"], run)
    assert "no longer the cohort from which the folds were made" in write_page(run)


@pytest.mark.parametrize(
    ("dice", "expected"),
    [
        pytest.param([0.5, 0.9, 0.1, None], {"best": "p1", "median": "p0", "worst": "p2"}, id="three"),
        pytest.param([0.5, 0.9], {"best": "p1", "median": "p0"}, id="two"),
        pytest.param([0.5], {"best": "p0"}, id="one"),
        pytest.param([None], {}, id="none"),
    ],
)
def test_examples_are_best_median_and_worst(dice, expected) -> None:
    cases = pd.DataFrame({"PatientID": [f"p{k}" for k in range(len(dice))], "dice": pd.Series(dice, dtype=float)})
    assert {name: row["PatientID"] for name, row in tool.choose_examples(cases).items()} == expected


def test_examples_are_predicted_by_the_network_that_had_not_seen_them(
    trained, tiny_cohort, tmp_path, monkeypatch
) -> None:
    """One finished fold of two, trained and evaluated by the bundle."""
    sizes = {"roi_size": [32, 32, 32], "spacing_mm": 8.0, "num_folds": 2}
    run = make_run(tmp_path / "run", tiny_cohort, **sizes)
    shutil.copytree(trained / "models", run / "fold_0" / "models", dirs_exist_ok=True)
    cases = pd.read_csv(run / "out_of_fold.csv")
    cases[cases["fold"] == 0].to_csv(run / "out_of_fold.csv", index=False)
    record = json.loads((run / "experiment.json").read_text())
    record["folds"]["1"]["status"] = "failed"
    (run / "experiment.json").write_text(json.dumps(record))
    evaluate_folds.evaluate_folds(str(run), samples=SAMPLES)
    masks = sorted((run / "evaluation" / "examples" / "fold_0").rglob("*__tumour.nii.gz"))
    held_out = set(cases.loc[(cases["fold"] == 0) & cases["dice"].notna(), "PatientID"])
    assert {path.parent.name for path in masks} == held_out
    text = text_of(run / "report.html")
    assert "has no predicted outline" not in text
    assert "fold 1 of 2 is not finished" in text
    monkeypatch.setattr(tool, "bundle_command", lambda *_: pytest.fail("masks that are there are predicted again"))
    write_page(run, examples=True)


def test_an_inference_that_fails_is_said_on_the_page(runs, tmp_path, monkeypatch) -> None:
    run = Path(shutil.copytree(runs["all"], tmp_path / "run"))
    fails = [sys.executable, "-c", "import sys; sys.exit('these are no weights')"]
    monkeypatch.setattr(tool, "bundle_command", lambda *_: fails)
    expected = "has no predicted outline: inference of fold 0 ended with exit code 1: these are no weights"
    assert expected in write_page(run, examples=True)
