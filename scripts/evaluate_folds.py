"""Evaluate an experiment: metrics, figures and one self-contained HTML page.

``python scripts/evaluate_folds.py --run runs/NAME`` reads what ``scripts/train_folds.py`` wrote, evaluates each fold,
all out-of-fold cases pooled, each centre, and models of the clinical values alone (:mod:`experiments.evaluation`), and
writes the page ``runs/NAME/report.html``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from command_line import run_tool

from experiments.comparators import HPV_COMPARED
from experiments.evaluation import CLINICAL_ONLY, SHIPPED_CLINICAL, evaluate
from experiments.evidence import EVALUATION_FOLDER
from experiments.experiment import ExperimentError, as_list
from experiments.page import read_evaluated, write_page
from scripts.cohorts.cohort import CohortError
from scripts.evaluation.bootstrap import BOOTSTRAP_SAMPLES
from scripts.evaluation.case_metrics import MEASURES, format_summary
from scripts.evaluation.survival import CalibrationError
from scripts.model.ensemble import CheckpointError, SettingsMismatch


def evaluate_folds(
    run: str,
    compare: str | None = None,
    external: str | None = None,
    runs: str | Sequence[str] = (),
    examples: bool = True,
    samples: int = BOOTSTRAP_SAMPLES,
) -> None:
    """Evaluate an experiment and write metrics.json, cases.csv, figures and the page report.html in its folder.

    Args:
        run: folder of the experiment, as written by train_folds.py.
        compare: folder of another experiment, for paired differences on the same patients.
        external: folder of another cohort, which the ensemble of the folds is to predict; or cases.csv that the
            bundle's evaluating wrote of it with this ensemble.
        runs: other experiments on the same cohort, evaluated before, for the paper's Tables 1 and 2, such as
            runs/a,runs/b.
        examples: predict the masks of the example cases on the page; existing ones are kept.
        samples: draws of the bootstrap.
    """
    others = [read_evaluated(name) for name in as_list(runs) if Path(name).resolve() != Path(run).resolve()]
    report = evaluate(run, compare, external, samples)
    page = write_page(Path(run), others, examples)
    print(f"{summary(report, Path(run) / EVALUATION_FOLDER)}, {page}")


def summary(report: Mapping[str, Any], folder: Path) -> str:
    """The results, to print."""
    lines = [f"{report['held_out']} cases of {report['data']}; {report['protocol']}, [95 % interval]"]
    lines += [f"  note: {note}" for note in report["notes"]]
    lines += ["pooled out-of-fold", *told(report["pooled"]["metrics"], report)]
    if "external" in report:
        external = report["external"]
        lines += [f"external, {external['cases']} cases: {external['data']}", *told(external["metrics"], external)]
    differences = {}
    for name, row in report.get("comparison", {}).get("differences", {}).items():
        differences[f"{MEASURES[name].title} minus that of {report['comparison']['other']}"] = row
    return "\n".join([*lines, *told_differences(differences), f"written: {folder}"])


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


if __name__ == "__main__":
    run_tool(evaluate_folds, ExperimentError, CohortError, CalibrationError, CheckpointError, SettingsMismatch, OSError)
