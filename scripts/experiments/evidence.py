"""The held-out predictions of an experiment, brought to one scale and judged.

No weight was fitted to a patient whom it predicts, nor were the calibration, the cut points of the risk groups and the
HPV threshold, which come from the held-out predictions of the other folds. The epoch may have been selected on the
held-out cases: with ``keep_epoch: best`` it is the best one on the fold's validation cases, so that the metrics of
these cases are optimistic. :func:`selection_of` says whether it was, and every report repeats it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from experiments.ensemble import choose_hpv_threshold
from experiments.experiment import (
    FINISHED,
    OUT_OF_FOLD_FILE,
    TEST,
    TRAINING,
    VALIDATION,
    ExperimentError,
    evaluation_folder,
    read_experiment,
)
from scripts import keys
from scripts.cohorts.thresholds import HALF
from scripts.evaluation.case_metrics import PAPER_MEASURES
from scripts.evaluation.case_table import describe_selection
from scripts.evaluation.judge import judge as judge_cases
from scripts.evaluation.judge import outcomes_of
from scripts.evaluation.survival import (
    Calibration,
    CalibrationError,
    FoldScale,
    SurvivalFunction,
    fit_calibration,
    normalise_out_of_fold,
)
from scripts.evaluation.survival_metrics import MetricUnavailableError

EVALUATION_FOLDER, METRICS_FILE, CASES_FILE = "evaluation", "metrics.json", "cases.csv"
SHARED = -1  # the fold of patients whom every fold validates and none trains on (protocol "full")
PREDICTED = ("log_hazard", "hpv_prob", "dice")  # columns, of those tasks that a model has
NO_CALIBRATION = "there are no held-out cases of another fold to calibrate on"


@dataclass(frozen=True)
class Run:
    """The held-out predictions of an experiment, one row for each patient.

    Attributes:
        folder: of the experiment.
        record: its ``experiment.json``.
        cases: columns of the bundle's ``cases.csv``, ``fold``, ``risk`` (the normalised log hazard; where survival is
            a task) and ``hpv_threshold`` (where HPV is).
        reference: the same of other cases than those judged, for the ablation, whose test cases are judged by what
            its validation cases tell; None where the folds do that for each other.
        calibrations: fold to the calibration by other cases, or why there is none.
        normalisation: how log hazards were normalised to one scale, as text.
        notes: what a reader must know.
    """

    folder: Path
    record: dict[str, Any]
    cases: pd.DataFrame
    reference: pd.DataFrame | None
    calibrations: dict[int, Calibration | str] = field(default_factory=dict)
    normalisation: str = ""
    notes: list[str] = field(default_factory=list)

    @property
    def folds(self) -> list[int]:
        """Folds that have cases of their own."""
        return sorted(fold for fold in self.cases["fold"].unique().tolist() if fold != SHARED)

    def others(self, fold: int) -> pd.DataFrame:
        """Cases that what is fitted for the cases of ``fold`` may look at."""
        return self.cases[self.cases["fold"] != fold] if self.reference is None else self.reference

    def name(self, fold: int) -> str:
        """What to call a fold: its centre where one is left out."""
        return str(self.record["folds"].get(str(fold), {}).get("centre", f"fold {fold}"))


def read_run(folder: str | Path) -> Run:
    """Read an experiment, normalise its log hazards, and fit for each fold the calibration on the other folds.

    Raises:
        ExperimentError: it is none, or no fold is finished.
    """
    folder = Path(folder)
    record = read_experiment(folder)
    path = folder / OUT_OF_FOLD_FILE
    if not path.is_file():
        raise ExperimentError(f"no fold of {folder} is finished: go on with it by `{record['command']}`")
    tables = {"cases": read_cases(path)}
    if record["held_out"] == TEST:
        folds = tables["cases"]["fold"].unique()
        parts = [read_cases(evaluation_folder(folder, fold, VALIDATION) / CASES_FILE) for fold in folds]
        tables["reference"] = pd.concat([part.assign(fold=fold) for part, fold in zip(parts, folds, strict=True)])
    notes: list[str] = []
    unfinished = [fold for fold, outcome in record["folds"].items() if outcome["status"] != FINISHED]
    if unfinished:
        notes.append(f"fold {', '.join(unfinished)} of {record['num_folds']} is not finished and counts nowhere")
    notes += mixed_versions(record)
    scales, normalisation = fold_scales(folder, tables["cases"], notes)
    tables = {name: merge_shared(add_risk(table, scales), notes) for name, table in tables.items()}
    run = Run(folder, record, tables["cases"], tables.get("reference"), {}, normalisation, notes)
    for fold in run.cases["fold"].unique().tolist():
        run.calibrations[fold] = calibrate(run, fold)
        if "hpv_prob" in run.cases:
            run.cases.loc[run.cases["fold"] == fold, "hpv_threshold"] = hpv_threshold(run, fold)
    selection = selection_of(record)
    if selection["fitted_to_these_cases"] != []:
        notes.append(selection["statement"])
    return run


def mixed_versions(record: Mapping[str, Any]) -> list[str]:
    """A note for each package of which the finished folds were made by different versions.

    Example:
        >>> folds = {"0": {"status": "finished"}, "1": {"status": "finished", "versions": {"bundle": "0.9.1"}}}
        >>> mixed_versions({"versions": {"bundle": "0.8.0"}, "folds": folds})
        ['the folds were made by different versions of bundle: fold 0 by 0.8.0, fold 1 by 0.9.1']
    """
    finished = {fold: outcome for fold, outcome in record["folds"].items() if outcome["status"] == FINISHED}
    made = {fold: outcome.get("versions", record.get("versions", {})) for fold, outcome in finished.items()}
    notes = []
    for name in sorted({name for versions in made.values() for name in versions}):
        each = {fold: versions.get(name, "unknown") for fold, versions in made.items()}
        if len(set(each.values())) > 1:
            listed = ", ".join(f"fold {fold} by {version}" for fold, version in each.items())
            notes.append(f"the folds were made by different versions of {name}: {listed}")
    return notes


def selection_of(record: Mapping[str, Any], judged: str | None = None) -> dict[str, Any]:
    """What was fitted to the cases that are judged (see :func:`scripts.evaluation.case_table.describe_selection`)."""
    selection = describe_selection(record["settings"].get("keep_epoch"), judged or record["held_out"])
    if "epoch" in (selection["fitted_to_these_cases"] or []):
        selection["statement"] = (
            "each network is of the epoch that was best on the cases that judge it, and calibration, cut points and "
            "HPV threshold come from cases of other folds, on which their epochs were chosen: the metrics are too "
            "optimistic (keep_epoch: best)"
        )
    return selection


def read_cases(path: Path) -> pd.DataFrame:
    """A table of cases as the bundle writes it.

    Raises:
        ExperimentError: there is none, it cannot be read, has no row, lacks the columns that name a patient and an
            outcome, holds text in a column of numbers, or has a patient twice in one fold.
    """
    if not path.is_file():
        raise ExperimentError(f"no table of cases at {path}: it is written by the bundle's `evaluating`")
    as_written = {"PatientID": str, keys.CENTRE: str}  # a patient may be called NA or 001
    try:
        table = pd.read_csv(path, converters=as_written)
    except ValueError as error:  # of pandas, or no text
        raise ExperimentError(f"{path} cannot be read as a table: {str(error).splitlines()[0]}") from error
    missing = [name for name in ("PatientID", keys.CENTRE, keys.TIME, keys.EVENT, keys.HPV) if name not in table]
    if missing:
        raise ExperimentError(f"{path} has no column {', '.join(missing)}: is it a cases.csv of `evaluating`?")
    if not len(table):
        raise ExperimentError(f"{path} has no row: no case was evaluated")
    for name in (keys.TIME, keys.EVENT, keys.HPV, *(column for column in PREDICTED if column in table)):
        if pd.to_numeric(table[name], errors="coerce").notna().sum() < table[name].notna().sum():
            raise ExperimentError(f"{path}: column {name} holds something else than numbers")
    twice = table["PatientID"][table.duplicated([column for column in ("PatientID", "fold") if column in table])]
    if len(twice):
        raise ExperimentError(f"{path}: {len(twice)} patients stand there twice ({twice.iloc[0]} ...)")
    return table


def fold_scales(folder: Path, cases: pd.DataFrame, notes: list[str]) -> tuple[dict[int, FoldScale], str]:
    """Where the log hazards of each fold lie, and in words by which patients.

    By the fold's training cases where ``evaluation_training/cases.csv`` is there, else by its held-out ones. A network
    that gives all of them the same log hazard, as one that finds no tumour does, keeps its unit and gets a note.
    """
    if "log_hazard" not in cases:
        return {}, "survival is not a task of this model"
    scales, by_held_out = {}, []
    for fold, rows in cases.groupby("fold"):
        path = evaluation_folder(folder, fold, TRAINING) / CASES_FILE
        known = read_cases(path) if path.is_file() else rows
        by_held_out += [] if path.is_file() else [str(fold)]
        hazards = known["log_hazard"]
        if hazards.nunique() == 1:
            scales[fold] = FoldScale(float(hazards.iloc[0]))
            notes.append(f"fold {fold} gives all {len(hazards)} patients by which it is scaled the same log hazard")
        else:
            scales[fold] = FoldScale.of(hazards)
    how = "log hazards less the mean, divided by the standard deviation, of the fold's network on its training cases"
    if by_held_out:
        how += f" (fold {', '.join(by_held_out)}: on the held-out cases themselves, no others being predicted)"
    return scales, how


def add_risk(cases: pd.DataFrame, scales: Mapping[int, FoldScale]) -> pd.DataFrame:
    """The table with ``risk``, its normalised log hazards."""
    if "log_hazard" not in cases:
        return cases
    folds = sorted(scales)
    numbers = cases["fold"].map({fold: number for number, fold in enumerate(folds)})
    return cases.assign(risk=normalise_out_of_fold(cases["log_hazard"], numbers, [scales[fold] for fold in folds]))


def merge_shared(cases: pd.DataFrame, notes: list[str]) -> pd.DataFrame:
    """One row for each patient: of those whom several folds predict the mean, as fold :data:`SHARED`."""
    repeated = cases["PatientID"].duplicated(keep=False)
    if not repeated.any():
        return cases.reset_index(drop=True)
    groups = cases[repeated].groupby("PatientID", sort=True)
    how = {name: "mean" if pd.api.types.is_numeric_dtype(cases[name]) else "first" for name in cases.columns[1:]}
    merged = groups.agg(how).reset_index().assign(fold=SHARED)
    notes.append(f"{len(merged)} patients are predicted by several folds, none trained on them: they count once (mean)")
    return pd.concat([cases[~repeated], merged], ignore_index=True)


def calibrate(run: Run, fold: int) -> Calibration | str:
    """The calibration of the cases of one fold by others, or why there is none."""
    others = run.others(fold).dropna(subset=[keys.TIME])
    if "risk" not in others:
        return "survival is not a task of this model"
    if not len(others):
        return NO_CALIBRATION
    try:
        return fit_calibration(others["risk"], others[keys.TIME], others[keys.EVENT])
    except CalibrationError as error:
        return str(error)


def hpv_threshold(run: Run, fold: int) -> float:
    """The HPV threshold for the cases of one fold, chosen on others; 0.5, with a note, where there is no choice."""
    chosen = choose_hpv_threshold(run.others(fold))
    if chosen["value"] is None:
        where = "patients of all folds" if fold == SHARED else run.name(fold)
        run.notes.append(f"HPV threshold of {where} is {HALF}: {chosen['reason']}")
        return HALF
    return float(chosen["value"])


def survival_of(cases: pd.DataFrame, calibrations: Mapping[int, Calibration | str]) -> SurvivalFunction:
    """Survival of each case by the calibration of its fold, as :func:`survival_metrics` takes it.

    Where a fold has none, the metrics give the reason.
    """
    risk, folds = cases["risk"].to_numpy(), cases["fold"].to_numpy()

    def survival(days: np.ndarray) -> np.ndarray:
        result = np.empty((len(risk), len(days)))
        for fold in np.unique(folds):
            calibration = calibrations[fold]
            if isinstance(calibration, str):
                raise MetricUnavailableError(f"no absolute risk: {calibration}")
            result[folds == fold] = calibration.survival(risk[folds == fold], days)
        return result

    return survival


def cuts_of(cases: pd.DataFrame, calibrations: Mapping[int, Calibration | str]) -> dict[str, list[float]]:
    """Where to cut risk groups: the cut points by the other folds, averaged over the cases; empty without any."""
    found = [calibrations[fold] for fold in cases["fold"]]
    fitted = [calibration for calibration in found if isinstance(calibration, Calibration)]
    if not fitted or len(fitted) < len(found):
        return {}
    names = fitted[0].cut_points
    return {name: np.mean([item.cut_points[name] for item in fitted], axis=0).tolist() for name in names}


def judge(
    run: Run,
    cases: pd.DataFrame,
    train: pd.DataFrame,
    seed: int,
    samples: int,
    least: Mapping[str, int] | None = None,
) -> dict[str, Any]:
    """All metrics of some of the cases, each with the calibration and cut points of its fold.

    The follow-up of ``train`` weights the survival metrics; no metric is given of counts below ``least``.
    """

    def absolute_risk(known: pd.DataFrame) -> dict[str, Any]:
        survival, cuts = survival_of(known, run.calibrations), cuts_of(known, run.calibrations)
        return {"log_hazard": known["risk"], "survival": survival, "cuts": cuts}

    return judge_cases(on_one_scale(cases), outcomes_of(train), absolute_risk, least=least, seed=seed, samples=samples)


def on_one_scale(cases: pd.DataFrame) -> pd.DataFrame:
    """The table with the normalised log hazard in place of the fold's own."""
    return cases.assign(log_hazard=cases["risk"]) if "risk" in cases else cases


def fold_means(folds: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Mean and standard deviation over the folds of the paper's metrics, as the paper gives them."""
    means = {}
    for name in PAPER_MEASURES:
        values = [fold["metrics"][name]["value"] for fold in folds.values()]
        found = [value for value in values if value is not None]
        means[name] = {"folds": len(found), "mean": float(np.mean(found)) if found else None}
        means[name]["standard_deviation"] = float(np.std(found, ddof=1)) if len(found) > 1 else None
    return means
