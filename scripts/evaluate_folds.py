"""Evaluate an experiment: metrics, figures and one self-contained HTML page.

``python scripts/evaluate_folds.py --run runs/NAME`` reads what ``scripts/train_folds.py`` wrote, evaluates each fold,
all out-of-fold cases pooled, each centre, and models of the clinical values alone (:mod:`experiments.evaluation`), and
writes the page ``runs/NAME/report.html``.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from command_line import UsageError, run_tool

from experiments.experiment import ExperimentError, as_list
from scripts.cohorts.cohort import CohortError
from scripts.evaluation.bootstrap import BOOTSTRAP_SAMPLES
from scripts.evaluation.survival import CalibrationError
from scripts.model.errors import CheckpointError, SettingsMismatch


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
    if samples < 1:
        raise UsageError(f"--samples is the number of draws, 1 or more; got {samples}")
    from experiments.evaluation import evaluate, summary  # imports torch, which takes seconds
    from experiments.page import read_evaluated, write_page

    others = [read_evaluated(name) for name in as_list(runs) if Path(name).resolve() != Path(run).resolve()]
    report = evaluate(run, compare, external, samples)
    page = write_page(Path(run), others, examples)
    print(f"{summary(report, Path(run))}, {page}")


if __name__ == "__main__":
    run_tool(evaluate_folds, ExperimentError, CohortError, CalibrationError, CheckpointError, SettingsMismatch, OSError)
