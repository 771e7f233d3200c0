"""The evidence of an experiment: each fold, all out-of-fold cases pooled, each centre, against clinical values alone.

``python scripts/evaluate_folds.py --run runs/NAME`` reads what ``scripts/train_folds.py`` left and writes ::

    runs/NAME/evaluation/metrics.json   every figure with its interval, its counts, or why there is none
    runs/NAME/evaluation/cases.csv      a row a patient, with normalised risk, survival and HPV threshold
    runs/NAME/evaluation/figures/       plots (PNG), each with the data it shows (JSON)
    runs/NAME/evaluation/figures_external/  the same of the other cohort, where one is given

No patient is judged with anything that was fitted to that patient: the network has not seen it, and the calibration,
the cut points of risk groups and the HPV threshold come from the held-out predictions of the other folds.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import fire
import numpy as np
import pandas as pd
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "bundle"))

from compare_clinical import code_cohort, fill_missing, fit_cox  # noqa: E402
from ensemble_folds import calibrate as calibrate_ensemble  # noqa: E402
from ensemble_folds import choose_hpv_threshold, finished_folds, out_of_fold  # noqa: E402
from experiment import (  # noqa: E402
    FINISHED,
    OUT_OF_FOLD_FILE,
    TEST,
    TRAINING,
    VALIDATION,
    ExperimentError,
    evaluation_folder,
    fold_folder,
    read_experiment,
)

from scripts import keys  # noqa: E402
from scripts.bootstrap import BOOTSTRAP_SAMPLES, paired_bootstrap  # noqa: E402
from scripts.cohort import Case, CohortError, load_cohort  # noqa: E402
from scripts.evaluation import (  # noqa: E402
    HPV_THRESHOLD,
    MEASURES,
    PAPER_MEASURES,
    SMALL_GROUP,
    case_figures,
    centre_groups,
    format_summary,
    roc_data,
    summarise,
    too_few,
)
from scripts.files import write_text  # noqa: E402
from scripts.plots import (  # noqa: E402
    Drawn,
    forest_figure,
    roc_figure,
    save_plots,
    survival_figures,
    training_figure,
)
from scripts.survival import (  # noqa: E402
    DAYS_PER_YEAR,
    Calibration,
    CalibrationError,
    FoldScale,
    HorizonError,
    Outcomes,
    SurvivalFunction,
    fit_calibration,
    normalise_out_of_fold,
    risk_groups,
)
from scripts.survival_metrics import FigureUnavailableError, ensemble_survival, survival_metrics  # noqa: E402

EVALUATION_FOLDER, METRICS_FILE, CASES_FILE = "evaluation", "metrics.json", "cases.csv"
FIGURES_FOLDER, EXTERNAL_FOLDER = "figures", "figures_external"
SHARED = -1  # the fold of patients whom every fold validates and none trains on (protocol "full")
CLINICAL_CODING, CLINICAL_FILL, CLINICAL_PENALIZER = "indicators", "training_median", 0.1
MODEL, CLINICAL_ONLY = "model", "clinical values alone"
COMPARED = (*PAPER_MEASURES, "hpv_auc")
HPV_COMPARED = ("hpv_auc", "balanced_accuracy")
NO_CALIBRATION = "there are no held-out cases of another fold to calibrate on"


# --- what an experiment left ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """The held-out predictions of an experiment, one row a patient.

    Attributes:
        folder: of the experiment.
        record: its ``experiment.json``.
        cases: columns of the bundle's ``cases.csv``, ``fold``, ``risk`` (the normalised log hazard; where survival is
            a task) and ``hpv_threshold`` (where HPV is).
        reference: the same of other cases than those judged, for the ablation, whose test cases are judged by what
            its validation cases tell; None where the folds do that for each other.
        calibrations: fold to the calibration by other cases, or why there is none.
        normalisation: how log hazards were brought to one scale, in words.
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
    """Read an experiment, bring its log hazards to one scale, and fit for each fold what the others tell.

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
    scales, normalisation = fold_scales(folder, tables["cases"])
    tables = {name: merge_shared(add_risk(table, scales), notes) for name, table in tables.items()}
    run = Run(folder, record, tables["cases"], tables.get("reference"), {}, normalisation, notes)
    for fold in run.cases["fold"].unique().tolist():
        run.calibrations[fold] = calibrate(run, fold)
        if "hpv_prob" in run.cases:
            run.cases.loc[run.cases["fold"] == fold, "hpv_threshold"] = hpv_threshold(run, fold)
    return run


def read_cases(path: Path) -> pd.DataFrame:
    """A table of cases as the bundle writes it.

    Raises:
        ExperimentError: there is none, or it lacks the columns that name a patient and an outcome.
    """
    if not path.is_file():
        raise ExperimentError(f"no table of cases at {path}: it is written by the bundle's `evaluating`")
    table = pd.read_csv(path, dtype={"PatientID": str, keys.CENTRE: str})
    missing = [name for name in ("PatientID", keys.CENTRE, keys.TIME, keys.EVENT, keys.HPV) if name not in table]
    if missing:
        raise ExperimentError(f"{path} has no column {', '.join(missing)}: is it a cases.csv of `evaluating`?")
    return table


def fold_scales(folder: Path, cases: pd.DataFrame) -> tuple[dict[int, FoldScale], str]:
    """Where the log hazards of each fold lie, and in words by which patients.

    By the fold's training cases where ``evaluation_training/cases.csv`` is there, else by its held-out ones.
    """
    if "log_hazard" not in cases:
        return {}, "survival is not a task of this model"
    scales, by_held_out = {}, []
    for fold, rows in cases.groupby("fold"):
        path = evaluation_folder(folder, fold, TRAINING) / CASES_FILE
        known = read_cases(path) if path.is_file() else rows
        by_held_out += [] if path.is_file() else [str(fold)]
        scales[fold] = FoldScale.of(known["log_hazard"])
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
    """One row a patient: of those whom several folds predict the mean, as fold :data:`SHARED`."""
    repeated = cases["PatientID"].duplicated(keep=False)
    if not repeated.any():
        return cases.reset_index(drop=True)
    groups = cases[repeated].groupby("PatientID", sort=True)
    how = {name: "mean" if pd.api.types.is_numeric_dtype(cases[name]) else "first" for name in cases.columns[1:]}
    merged = groups.agg(how).reset_index().assign(fold=SHARED)
    notes.append(f"{len(merged)} patients are predicted by several folds, none trained on them: they count once (mean)")
    return pd.concat([cases[~repeated], merged], ignore_index=True)


def outcomes_of(cases: pd.DataFrame) -> Outcomes:
    """What became of the cases whose survival is known."""
    known = cases.dropna(subset=[keys.TIME])
    return Outcomes(known[keys.TIME].to_numpy(), known[keys.EVENT].to_numpy())


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
        run.notes.append(f"HPV threshold of {where} is {HPV_THRESHOLD}: {chosen['reason']}")
        return HPV_THRESHOLD
    return float(chosen["value"])


# --- figures ----------------------------------------------------------------------------------------------------------


def survival_of(cases: pd.DataFrame, calibrations: Mapping[int, Calibration | str]) -> SurvivalFunction:
    """Survival of each case by the calibration of its fold, as :func:`survival_metrics` takes it.

    Where a fold has none the figures say why.
    """
    risk, folds = cases["risk"].to_numpy(), cases["fold"].to_numpy()

    def survival(days: np.ndarray) -> np.ndarray:
        result = np.empty((len(risk), len(days)))
        for fold in np.unique(folds):
            calibration = calibrations[fold]
            if isinstance(calibration, str):
                raise FigureUnavailableError(f"no absolute risk: {calibration}")
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
    """Every figure of some of the cases.

    Args:
        run: of the experiment.
        cases: rows of its cases.
        train: cases whose follow-up weights the survival figures.
        seed: of the bootstrap.
        samples: its draws.
        least: counts below which no figure is given, such as :data:`scripts.evaluation.SMALL_GROUP`.

    Returns:
        ``metrics`` by :func:`scripts.evaluation.summarise`, ``survival`` by
        :func:`scripts.survival_metrics.survival_metrics` or ``{"reason": why not}``.
    """
    metrics = summarise(on_one_scale(cases), seed, least=least, samples=samples)
    report: dict[str, Any] = {"cases": len(cases), "metrics": metrics}
    if reason := why_no_survival(cases, train, least):
        return report | {"survival": {"reason": reason}}
    known = cases.dropna(subset=[keys.TIME])
    return report | {
        "survival": survival_metrics(
            outcomes_of(train),
            outcomes_of(known),
            known["risk"],
            survival=survival_of(known, run.calibrations),
            cuts=cuts_of(known, run.calibrations),
            seed=seed,
            samples=samples,
        )
    }


def why_no_survival(cases: pd.DataFrame, train: pd.DataFrame, least: Mapping[str, int] | None) -> str:
    """Why nothing can be said about the survival of these cases; empty where something can."""
    if "log_hazard" not in cases:
        return "survival is not a task of this model"
    known = cases.dropna(subset=[keys.TIME])
    if not len(known) or not train[keys.TIME].notna().any():
        return "no case with known survival"
    return too_few({"patients": len(known), "events": int(known[keys.EVENT].sum())}, least)


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


# --- comparisons ------------------------------------------------------------------------------------------------------


def clinical_parts(run: Run, known: str, others: Sequence[Case] | None = None) -> list[tuple[list[Case], list[Case]]]:
    """Of each fold the network's training cases and those it held out, as far as they have a label.

    Args:
        run: whose folds.
        known: flag of the label.
        others: cases of another cohort, instead of those that each fold held out.

    Raises:
        CohortError: the cohort is gone or has changed, or no held-out case has the label.
    """
    settings = run.record["settings"]
    cohort = load_cohort(run.record["dataset_dir"], settings.get("ehr_csv"), settings["clinical_features"])
    if cohort.fingerprint != run.record["cohort"]["fingerprint"]:
        raise CohortError(f"{run.record['dataset_dir']} is no longer the cohort that the folds were dealt from")
    found = []
    for fold in run.folds:
        split = cohort.split(settings["protocol"], run.record["num_folds"], fold, settings["seed"])
        judged = split.part(run.record["held_out"]) if others is None else others
        train, test = ([case for case in cases if case[known]] for cases in (split.part(TRAINING), judged))
        if test:
            found.append((train, test))
    if not found:
        what = "survival" if known == keys.SURV_KNOWN else "HPV status"
        raise CohortError(f"no held-out case has known {what}")
    return found


def clinical_risks(run: Run, others: Sequence[Case] | None = None) -> pd.DataFrame:
    """Risks by a ridge Cox model of clinical values alone, fitted in each fold to the network's training patients.

    Args:
        run: whose folds.
        others: cases of another cohort that get risks, instead of those that each fold held out.

    Returns:
        ``PatientID`` and ``clinical_risk``, normalised like the network's; a patient of several folds has the mean.

    Raises:
        CohortError: as :func:`clinical_parts`, or no model can be fitted.
        CalibrationError: the model gives everybody the same.
    """
    features, tables = run.record["settings"]["clinical_features"], []
    for parts in clinical_parts(run, keys.SURV_KNOWN, others):
        train, test = fill_missing(*(code_cohort(part, features, CLINICAL_CODING) for part in parts), CLINICAL_FILL)
        fit = fit_cox(train, CLINICAL_PENALIZER)
        risks = [fit.model.predict_log_partial_hazard(table[fit.used]).to_numpy() for table in (train, test)]
        scale = FoldScale.of(risks[0])
        tables.append(pd.DataFrame({"PatientID": test.index, "clinical_risk": (risks[1] - scale.centre) / scale.scale}))
    return pd.concat(tables).groupby("PatientID", as_index=False)["clinical_risk"].mean()


def clinical_hpv(run: Run, others: Sequence[Case] | None = None) -> pd.DataFrame:
    """HPV probabilities by a logistic regression of clinical values alone, fitted like :func:`clinical_risks`.

    Both classes weigh alike, so that 0.5 is the threshold.

    Returns:
        ``PatientID`` and ``clinical_hpv``; a patient of several folds has the mean.

    Raises:
        CohortError: as :func:`clinical_parts`, or no model can be fitted.
    """
    features = [name for name in run.record["settings"]["clinical_features"] if name != "hpv"]
    if not features:
        raise CohortError("the network reads no clinical values")
    tables = []
    for parts in clinical_parts(run, keys.HPV_KNOWN, others):
        coded = fill_missing(*(code_cohort(part, features, CLINICAL_CODING) for part in parts), CLINICAL_FILL)
        train, test = (table.drop(columns=[keys.TIME, keys.EVENT]) for table in coded)
        status = [int(case[keys.HPV]) for case in parts[0]]
        if len(set(status)) < 2:
            raise CohortError(f"the {len(status)} training patients of a fold have one HPV status")
        model = make_pipeline(StandardScaler(), LogisticRegression(class_weight="balanced")).fit(train, status)
        tables.append(pd.DataFrame({"PatientID": test.index, "clinical_hpv": model.predict_proba(test)[:, 1]}))
    return pd.concat(tables).groupby("PatientID", as_index=False)["clinical_hpv"].mean()


def add_clinical(
    run: Run, cases: pd.DataFrame, seed: int, samples: int, others: Sequence[Case] | None = None
) -> tuple[pd.DataFrame, dict[str, Any]]:
    """The cases with ``clinical_risk``, and the C-index of it beside the model's, or why there is none.

    Args:
        run: whose folds' training cases the clinical models are fitted to.
        cases: held out by these folds, or of another cohort.
        seed: of the bootstrap.
        samples: its draws.
        others: the other cohort's cases.
    """
    about = {"model": f"Cox, ridge {CLINICAL_PENALIZER:g}", "features": run.record["settings"]["clinical_features"]}
    try:
        cases = cases.merge(clinical_risks(run, others), on="PatientID", how="left", validate="one_to_one")
    except (CohortError, CalibrationError, OSError) as error:
        return cases, about | {"c_index": {"value": None, "reason": str(error).splitlines()[0], "patients": 0}}
    known = cases.dropna(subset=["clinical_risk"])
    clinical = known.assign(log_hazard=known["clinical_risk"])
    about["c_index"] = summarise(clinical, seed, ("c_index",), samples=samples)["c_index"]
    if "log_hazard" in cases:
        about["model_minus_clinical"] = compare_tables(on_one_scale(known), clinical, seed, samples)
    return cases, about


def add_clinical_hpv(
    run: Run, cases: pd.DataFrame, seed: int, samples: int, others: Sequence[Case] | None = None
) -> tuple[pd.DataFrame, dict[str, Any]]:
    """The cases with ``clinical_hpv``, and its figures beside the model's, or why there are none.

    Arguments are those of :func:`add_clinical`.
    """
    about: dict[str, Any] = {"model": "logistic regression, ridge 1, both classes alike"}
    try:
        cases = cases.merge(clinical_hpv(run, others), on="PatientID", how="left", validate="one_to_one")
    except (CohortError, OSError) as error:
        none = {"value": None, "reason": str(error).splitlines()[0], "patients": 0}
        return cases, about | dict.fromkeys(HPV_COMPARED, none)
    table = cases.dropna(subset=["clinical_hpv"])
    table = table.assign(hpv_prob=table["clinical_hpv"], hpv_threshold=HPV_THRESHOLD)
    about |= summarise(table, seed, HPV_COMPARED, samples=samples)
    about["model_minus_clinical"] = {name: compare_tables(cases, table, seed, samples, name) for name in HPV_COMPARED}
    return cases, about


def compare_tables(
    first: pd.DataFrame, second: pd.DataFrame, seed: int, samples: int, name: str = "c_index"
) -> dict[str, Any]:
    """Paired difference of one measure between two tables of cases, on the patients whom both know."""
    measure = MEASURES[name]
    if any(column not in table for table in (first, second) for column in measure.columns):
        return {"value": None, "reason": "not a task of both models", "patients": 0}
    columns = ["PatientID", *measure.columns, *(["hpv_threshold"] if "hpv" in measure.columns else [])]
    tables = [table.reindex(columns=columns).dropna(subset=list(measure.columns)) for table in (first, second)]
    common = set(tables[0]["PatientID"]) & set(tables[1]["PatientID"])
    tables = [table[table["PatientID"].isin(common)].sort_values("PatientID") for table in tables]
    left_out = len(set(first["PatientID"]) ^ set(second["PatientID"]))
    result = paired_bootstrap(measure.statistic, tables[0], tables[1], samples=samples, seed=seed)
    return result | ({"in_one_only": left_out} if left_out else {})


def compare_runs(run: Run, other: Run, seed: int, samples: int) -> dict[str, Any]:
    """This experiment less another, measure by measure, on the patients that both hold out."""
    tables = on_one_scale(run.cases), on_one_scale(other.cases)
    differences = {name: compare_tables(*tables, seed, samples, name) for name in COMPARED}
    return {"other": str(other.folder), "other_command": other.record["command"], "differences": differences}


def oracle(cases: pd.DataFrame, dataset_dir: str | Path, seed: int, samples: int) -> dict[str, Any] | None:
    """C-index of the phantoms' true log hazard on these cases; None for a cohort that is not of phantoms."""
    path = Path(dataset_dir) / "truth.csv"
    if not path.is_file():
        return None
    truth = pd.read_csv(path, dtype={"PatientID": str})[["PatientID", "log_hazard"]]
    cases = cases.drop(columns="log_hazard", errors="ignore").merge(truth, on="PatientID", how="left")
    return summarise(cases, seed, ("c_index",), samples=samples)["c_index"]


def read_external(run: Run, path: Path) -> pd.DataFrame:
    """Cases of another cohort, as the bundle's ``evaluating`` wrote them with the ensemble, with its HPV threshold.

    Raises:
        ExperimentError: patients of the experiment are among them, or there is no such table.
    """
    cases = read_cases(path)
    seen = sorted(set(cases["PatientID"]) & set(run.cases["PatientID"]))
    if seen:
        raise ExperimentError(
            f"{path} is no external cohort: {len(seen)} patients are of the experiment ({seen[0]} ...)"
        )
    if "hpv_prob" in cases:
        train = run.cases if run.reference is None else run.reference
        chosen = choose_hpv_threshold(train)["value"] if "hpv_prob" in train else None
        cases["hpv_threshold"] = HPV_THRESHOLD if chosen is None else chosen
    return cases


def judge_external(run: Run, path: Path, seed: int, samples: int) -> dict[str, Any]:
    """Every figure of another cohort, of all its cases and of each centre, and ``figures``, what could be drawn.

    ``metrics`` rank by the mean of the folds' log hazards, as inference gives it; ``survival`` takes them on their
    common scale, where the calibration of the out-of-fold predictions turns them into absolute risk.

    Raises:
        ExperimentError: as :func:`read_external`, or the table is not of this ensemble.
    """
    cases = read_external(run, path)
    folds = finished_folds(run.folder, run.record, allow_missing=True)
    stored = calibrate_ensemble(run.folder, folds, out_of_fold(run.folder, folds))
    train = run.cases if run.reference is None else run.reference

    def judge_group(group: pd.DataFrame, least: Mapping[str, int] | None = None) -> dict[str, Any]:
        metrics = summarise(group, seed, least=least, samples=samples)
        report: dict[str, Any] = {"cases": len(group), "metrics": metrics}
        if reason := why_no_survival(group, train, least):
            return report | {"survival": {"reason": reason}}
        known = group.dropna(subset=[keys.TIME])
        needed, outcomes = ensemble_survival(known, stored), (outcomes_of(train), outcomes_of(known))
        return report | {"survival": survival_metrics(*outcomes, **needed, seed=seed, samples=samples)}

    try:
        report = {"table": str(path), **judge_group(cases)}
        report["centres"] = {centre: judge_group(group, SMALL_GROUP) for centre, group in centre_groups(cases)}
    except ValueError as error:
        raise ExperimentError(f"{path}: {error}") from error
    report |= compare_external(run, cases, path, seed, samples)
    drawn = case_figures(cases, report["metrics"]) | survival_figures(report["survival"], stored.get("reason", ""))
    report["figures"] = save_plots(run.folder / EVALUATION_FOLDER / EXTERNAL_FOLDER, drawn, str(path))
    return report


def compare_external(run: Run, cases: pd.DataFrame, path: Path, seed: int, samples: int) -> dict[str, Any]:
    """What clinical values alone tell of another cohort, and the phantoms' truth, as far as the cohort can be read.

    Its folder is named in the ``metrics.json`` beside the table ``path``.
    """
    try:
        place = json.loads((path.parent / METRICS_FILE).read_text(encoding="utf-8"))["dataset_dir"]
        others = load_cohort(place, None, run.record["settings"]["clinical_features"]).cases
    except (OSError, KeyError, ValueError) as error:  # CohortError is a ValueError
        why = f"the cohort of {path} cannot be read: {str(error).splitlines()[0]}"
        none = {"value": None, "reason": why, "patients": 0}
        return {"clinical_only": {"c_index": none, "hpv": dict.fromkeys(HPV_COMPARED, none)}, "oracle": None}
    _, clinical = add_clinical(run, cases, seed, samples, others)
    _, clinical["hpv"] = add_clinical_hpv(run, cases, seed, samples, others)
    return {"dataset_dir": place, "clinical_only": clinical, "oracle": oracle(cases, place, seed, samples)}


# --- files ------------------------------------------------------------------------------------------------------------


def describe(run: Run, seed: int, samples: int) -> dict[str, Any]:
    """What ``metrics.json`` says before any figure."""
    record = run.record
    return {
        "run": run.folder.name,
        "data": record["cohort"]["trained_on"],
        "dataset_dir": record["dataset_dir"],
        "command": record["command"],
        "protocol": record["protocol"],
        "held_out": record["held_out"],
        "tasks": record["tasks"],
        "folds_evaluated": run.folds,
        "normalisation": run.normalisation,
        "risk_groups": "cut at quantiles of the other folds' held-out risks; pooled: the mean of these cut points",
        "censoring": "weights by the other folds' patients; pooled: by all",
        "interval": f"95 %, bootstrap over patients, {samples} draws, seed {seed}, networks fixed",
        "notes": run.notes,
    }


def case_table(run: Run, cases: pd.DataFrame) -> pd.DataFrame:
    """The cases with risk group and two-year survival, where these can be had."""
    if "risk" not in cases:
        return cases
    cuts = cuts_of(cases, run.calibrations)
    table = cases.copy()
    if cuts:
        table["risk_group"] = risk_groups(cases["risk"], cuts["tertiles"])
    try:
        table["survival_2y"] = survival_of(cases, run.calibrations)(np.array([2 * DAYS_PER_YEAR]))[:, 0]
    except (FigureUnavailableError, HorizonError) as error:
        run.notes.append(f"no two-year survival in {CASES_FILE}: {error}")
    return table


def histories(run: Run) -> dict[str, list[dict[str, Any]]]:
    """``history.json`` of each fold."""
    paths = {run.name(fold): fold_folder(run.folder, fold) / "history.json" for fold in run.folds}
    return {name: json.loads(path.read_text(encoding="utf-8")) for name, path in paths.items() if path.is_file()}


def roc_curves(run: Run, report: Mapping[str, Any]) -> dict[str, Any]:
    """What :func:`scripts.plots.roc_figure` takes: all cases, then each fold that has both classes."""
    parts = {"pooled": (run.cases, report["pooled"])}
    parts |= {name: (run.cases[run.cases["fold"] == block["fold"]], block) for name, block in report["folds"].items()}
    aucs = {name: (rows, block["metrics"]["hpv_auc"]) for name, (rows, block) in parts.items()}
    return {name: roc_data(rows, auc) for name, (rows, auc) in aucs.items() if auc["value"] is not None}


def forest_rows(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """C-index of all cases, of each fold and centre, of clinical values alone and of the truth, where there is one."""
    rows = [{"name": "pooled out-of-fold", **report["pooled"]["metrics"]["c_index"]}]
    rows += [{"name": name, **block["metrics"]["c_index"]} for name, block in report["folds"].items()]
    if report["protocol"] != "leave_one_centre_out":
        rows += [{"name": name, **block["metrics"]["c_index"]} for name, block in report["centres"].items()]
    rows.append({"name": CLINICAL_ONLY, **report["clinical_only"]["c_index"]})
    return rows + ([{"name": "phantoms' truth", **report["oracle"]}] if report["oracle"] else [])


def write_figures(run: Run, report: Mapping[str, Any], folder: Path) -> dict[str, dict[str, str]]:
    """Draw what can be drawn, and tell the file of each picture or why there is none."""
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


def summary(report: Mapping[str, Any], folder: Path) -> str:
    """What came out, to read."""
    lines = [f"{report['held_out']} cases of {report['data']}; {report['protocol']}, [95 % interval]"]
    lines += [f"  note: {note}" for note in report["notes"]]
    lines += ["pooled out-of-fold", *told(report["pooled"]["metrics"], report)]
    if "external" in report:
        external = report["external"]
        lines += [f"external, {external['cases']} cases of {external['table']}", *told(external["metrics"], external)]
    differences = {}
    for name, row in report.get("comparison", {}).get("differences", {}).items():
        differences[f"{MEASURES[name].title} less that of {report['comparison']['other']}"] = row
    return "\n".join([*lines, *told_differences(differences), f"written: {folder}"])


def told(metrics: Mapping[str, Any], report: Mapping[str, Any]) -> list[str]:
    """Figures of a model, then ``clinical_only`` and ``oracle`` of a report beside them."""
    clinical = report["clinical_only"]
    hpv = clinical["hpv"] if metrics["hpv_auc"]["value"] is not None else {}
    alone = {"c_index": clinical["c_index"], **{name: hpv[name] for name in HPV_COMPARED if name in hpv}}
    lines = [format_summary(metrics), f"{CLINICAL_ONLY}\n{format_summary(alone)}"]
    if report["oracle"]:
        lines.append(f"phantoms' truth\n{format_summary({'c_index': report['oracle']})}")
    less = {"c_index": clinical.get("model_minus_clinical"), **hpv.get("model_minus_clinical", {})}
    named = {f"{MEASURES[name].title} less that of {CLINICAL_ONLY}": row for name, row in less.items() if row}
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


def evaluate_folds(
    run: str, compare: str | None = None, external: str | None = None, seed: int = 0, samples: int = BOOTSTRAP_SAMPLES
) -> None:
    """Judge an experiment and write ``metrics.json``, ``cases.csv`` and figures in ``RUN/evaluation``.

    Args:
        run: folder of the experiment, as ``train_folds.py`` wrote it.
        compare: folder of another experiment, for paired differences on the same patients.
        external: ``cases.csv`` that the bundle's ``evaluating`` wrote of another cohort with the ensemble.
        seed: of the bootstrap.
        samples: its draws.
    """
    judged = read_run(run)
    folder = judged.folder / EVALUATION_FOLDER
    cases, clinical = add_clinical(judged, judged.cases, seed, samples)
    cases, clinical["hpv"] = add_clinical_hpv(judged, cases, seed, samples)
    train = cases if judged.reference is None else judged.reference
    report = describe(judged, seed, samples)
    report["pooled"] = judge(judged, judged.cases, train, seed, samples)
    report["folds"] = {
        judged.name(fold): {
            "fold": fold,
            **judge(judged, cases[cases["fold"] == fold], judged.others(fold), seed, samples),
        }
        for fold in judged.folds
    }
    report["fold_mean"] = fold_means(report["folds"])
    report["centres"] = {
        centre: judge(judged, group, train, seed, samples, SMALL_GROUP) for centre, group in centre_groups(judged.cases)
    }
    report |= {"clinical_only": clinical, "oracle": oracle(judged.cases, judged.record["dataset_dir"], seed, samples)}
    if compare:
        report["comparison"] = compare_runs(judged, read_run(compare), seed, samples)
    if external:
        report["external"] = judge_external(judged, Path(external), seed, samples)
    report["figures"] = write_figures(judged, report, folder / FIGURES_FOLDER)
    write_text(folder / CASES_FILE, case_table(judged, cases).to_csv(index=False))
    write_text(folder / METRICS_FILE, json.dumps(report, indent=1, allow_nan=False))
    print(summary(report, folder))


if __name__ == "__main__":
    try:
        fire.Fire(evaluate_folds)
    except (ExperimentError, CohortError, CalibrationError, OSError) as error:
        sys.exit(f"evaluate_folds: {error}")
