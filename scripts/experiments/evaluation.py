"""The evaluation of an experiment: metrics of each fold, of all out-of-fold cases pooled and of each centre.

Files ::

    runs/NAME/evaluation/metrics.json   every metric with its interval and counts, or the reason why it is undefined
    runs/NAME/evaluation/cases.csv      a row for each patient, with normalised risk, survival and HPV threshold
    runs/NAME/evaluation/figures/       plots (PNG), each with the data it shows (JSON)
    runs/NAME/evaluation/figures_external/  the same of another cohort, where one is given
    runs/NAME/evaluation/external/      the ensemble of the folds and its predictions of that cohort

How cases are evaluated is in :mod:`experiments.evidence`, the references in :mod:`experiments.comparators`, another
cohort in :mod:`experiments.external_cohort`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from experiments.comparators import HPV_COMPARED, add_clinical, add_clinical_hpv, compare_runs, oracle
from experiments.evidence import (
    CASES_FILE,
    EVALUATION_FOLDER,
    METRICS_FILE,
    NO_CALIBRATION,
    Run,
    cuts_of,
    fold_means,
    judge,
    read_run,
    selection_of,
    survival_of,
)
from experiments.experiment import ExperimentError, fold_folder, statement_on_part
from experiments.external_cohort import judge_external, predict_external
from scripts.cohorts.files import write_text
from scripts.evaluation.case_metrics import MEASURES, SMALL_GROUP, centre_groups, format_summary
from scripts.evaluation.case_table import case_figures, roc_data
from scripts.evaluation.plots import Drawn, forest_figure, roc_figure, save_plots, survival_figures, training_figure
from scripts.evaluation.survival import DAYS_PER_YEAR, HorizonError, risk_groups
from scripts.evaluation.survival_metrics import MetricUnavailableError

FIGURES_FOLDER = "figures"
EXTERNAL_FOLDER, EXTERNAL_FIGURES_FOLDER = "external", "figures_external"
CLINICAL_ONLY = "clinical values alone"
SHIPPED_CLINICAL = "clinical model of the bundle"
SEED = 0  # of the bootstrap


def evaluate(run: str, compare: str | None, external: str | None, samples: int) -> dict[str, Any]:
    """Evaluate an experiment and write ``metrics.json``, ``cases.csv`` and figures in ``RUN/evaluation``.

    Arguments as for ``evaluate_folds.py``.

    Raises:
        ExperimentError: the experiment, the other one or the other cohort cannot be read.
    """
    other = Path(external or ".").expanduser()
    if not other.exists():
        raise ExperimentError(f"--external {external}: there is no such folder or table")
    if compare and Path(compare).expanduser().resolve() == Path(run).expanduser().resolve():
        raise ExperimentError(f"--compare {compare} is the experiment itself: name another one")
    judged = read_run(run)
    folder = judged.folder / EVALUATION_FOLDER
    cases, clinical = add_clinical(judged, judged.cases, SEED, samples)
    cases, clinical["hpv"] = add_clinical_hpv(judged, cases, SEED, samples)
    train = cases if judged.reference is None else judged.reference
    report = describe(judged, samples)
    report["pooled"] = judge(judged, judged.cases, train, SEED, samples)
    report["folds"] = {
        judged.name(fold): {
            "fold": fold,
            **judge(judged, cases[cases["fold"] == fold], judged.others(fold), SEED, samples),
        }
        for fold in judged.folds
    }
    report["fold_mean"] = fold_means(report["folds"])
    report["centres"] = {
        centre: judge(judged, group, train, SEED, samples, SMALL_GROUP) for centre, group in centre_groups(judged.cases)
    }
    report |= {"clinical_only": clinical, "oracle": oracle(judged.cases, judged.record["dataset_dir"], SEED, samples)}
    if compare:
        report["comparison"] = compare_runs(judged, read_run(compare), SEED, samples)
    if external:
        table = predict_external(judged, other, folder / EXTERNAL_FOLDER) if other.is_dir() else other
        report["external"] = judge_external(judged, table, folder / EXTERNAL_FIGURES_FOLDER, SEED, samples)
    report["figures"] = write_figures(judged, report, folder / FIGURES_FOLDER)
    write_text(folder / CASES_FILE, case_table(judged, cases).to_csv(index=False))
    write_text(folder / METRICS_FILE, json.dumps(report, indent=1, allow_nan=False))
    return report


def describe(run: Run, samples: int) -> dict[str, Any]:
    """Data, protocol and methods, the first entries of ``metrics.json``."""
    record = run.record
    return {
        "run": run.folder.name,
        "data": statement_on_part(record["cohort"]["trained_on"], record["cohort"]["cases"], len(run.cases)),
        "dataset_dir": record["dataset_dir"],
        "command": record["command"],
        "protocol": record["protocol"],
        "held_out": record["held_out"],
        "selection": selection_of(record),
        "tasks": record["tasks"],
        "folds_evaluated": run.folds,
        "normalisation": run.normalisation,
        "risk_groups": "cut at quantiles of the other folds' held-out risks; pooled: the mean of these cut points",
        "censoring": "weights by the other folds' patients; pooled: by all",
        "interval": f"95 %, bootstrap over patients, {samples} draws, seed {SEED}, networks fixed",
        "notes": run.notes,
    }


def case_table(run: Run, cases: pd.DataFrame) -> pd.DataFrame:
    """The cases with risk group and two-year survival, where these are defined."""
    if "risk" not in cases:
        return cases
    cuts = cuts_of(cases, run.calibrations)
    table = cases.copy()
    if cuts:
        table["risk_group"] = risk_groups(cases["risk"], cuts["tertiles"])
    try:
        table["survival_2y"] = survival_of(cases, run.calibrations)(np.array([2 * DAYS_PER_YEAR]))[:, 0]
    except (MetricUnavailableError, HorizonError) as error:
        run.notes.append(f"no two-year survival in {CASES_FILE}: {error}")
    return table


def histories(run: Run) -> dict[str, list[dict[str, Any]]]:
    """``history.json`` of each fold."""
    paths = {run.name(fold): fold_folder(run.folder, fold) / "history.json" for fold in run.folds}
    return {name: json.loads(path.read_text(encoding="utf-8")) for name, path in paths.items() if path.is_file()}


def roc_curves(run: Run, report: Mapping[str, Any]) -> dict[str, Any]:
    """ROC curves of all cases and of each fold with both classes, for :func:`scripts.evaluation.plots.roc_figure`."""
    parts = {"pooled": (run.cases, report["pooled"])}
    parts |= {name: (run.cases[run.cases["fold"] == block["fold"]], block) for name, block in report["folds"].items()}
    aucs = {name: (rows, block["metrics"]["hpv_auc"]) for name, (rows, block) in parts.items()}
    return {name: roc_data(rows, auc) for name, (rows, auc) in aucs.items() if auc["value"] is not None}


def forest_rows(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """C-index of all cases, of each fold and centre, of clinical values alone and of the true risk of phantoms."""
    rows = [{"name": "pooled out-of-fold", **report["pooled"]["metrics"]["c_index"]}]
    rows += [{"name": name, **block["metrics"]["c_index"]} for name, block in report["folds"].items()]
    if report["protocol"] != "leave_one_centre_out":
        rows += [{"name": name, **block["metrics"]["c_index"]} for name, block in report["centres"].items()]
    rows.append({"name": CLINICAL_ONLY, **report["clinical_only"]["c_index"]})
    rows.append({"name": SHIPPED_CLINICAL, **report["clinical_only"]["shipped"]["c_index"]})
    return rows + ([{"name": "phantoms' truth", **report["oracle"]}] if report["oracle"] else [])


def write_figures(run: Run, report: Mapping[str, Any], folder: Path) -> dict[str, dict[str, str]]:
    """Write the figures; gives the file of each, or the reason why it could not be drawn."""
    forest, curves = forest_rows(report), histories(run)
    drawn: dict[str, Drawn] = {
        "training": (training_figure(curves), curves),
        "c_index": (forest_figure(forest, "C-index, 95 % intervals"), forest),
        **case_figures(run.cases, report["pooled"]["metrics"]),
    }
    if drawn["roc"][0] is not None:
        rocs = roc_curves(run, report)
        drawn["roc"] = (roc_figure(rocs, "HPV status"), rocs)
    why = next((c for c in run.calibrations.values() if isinstance(c, str)), NO_CALIBRATION)
    drawn |= survival_figures(report["pooled"]["survival"], why)
    return save_plots(folder, drawn, report["data"])


# --- what is printed --------------------------------------------------------------------------------------------------


def summary(report: Mapping[str, Any], run: Path) -> str:
    """The results, to print."""
    lines = [f"{report['held_out']} cases: {report['data']}; {report['protocol']}, [95 % interval]"]
    lines += [f"  note: {note}" for note in report["notes"]]
    lines += ["pooled out-of-fold", *told(report["pooled"]["metrics"], report)]
    if "external" in report:
        external = report["external"]
        lines += [f"external, {external['cases']} cases: {external['data']}", *told(external["metrics"], external)]
    differences = {}
    for name, row in report.get("comparison", {}).get("differences", {}).items():
        differences[f"{MEASURES[name].title} minus that of {report['comparison']['other']}"] = row
    return "\n".join([*lines, *told_differences(differences), f"written: {run / EVALUATION_FOLDER}"])


def told(metrics: Mapping[str, Any], report: Mapping[str, Any]) -> list[str]:
    """Metrics of a model, then ``clinical_only`` and ``oracle`` of a report beside them."""
    clinical = report["clinical_only"]
    hpv = clinical["hpv"] if metrics["hpv_auc"]["value"] is not None else {}
    alone = {"c_index": clinical["c_index"], **{name: hpv[name] for name in HPV_COMPARED if name in hpv}}
    lines = [format_summary(metrics), f"{CLINICAL_ONLY}\n{format_summary(alone)}"]
    if shipped := clinical.get("shipped"):
        title = " ".join(filter(None, [SHIPPED_CLINICAL, shipped["model"]]))
        lines.append(f"{title}\n{format_summary({'c_index': shipped['c_index']})}")
    if report["oracle"]:
        lines.append(f"phantoms' truth\n{format_summary({'c_index': report['oracle']})}")
    less = {"c_index": clinical.get("model_minus_clinical"), **hpv.get("model_minus_clinical", {})}
    named = {f"{MEASURES[name].title} minus that of {CLINICAL_ONLY}": row for name, row in less.items() if row}
    return lines + told_differences(named)


def told_differences(differences: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """A line each."""
    lines = []
    for name, row in differences.items():
        if row["value"] is None:
            lines.append(f"{name}: none ({row['reason']})")
            continue
        interval = f"{row['value']:+.3f}  [{row['low']:+.3f}, {row['high']:+.3f}], p {row['p']:.3f}"
        lines.append(f"{name}: {interval} ({row['patients']} patients)")
    return lines
