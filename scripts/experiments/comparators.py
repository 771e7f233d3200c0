"""References for an experiment: clinical values alone, another experiment, the phantoms' truth."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from experiments.clinical_cox import code_cohort, fill_missing, fit_cox
from experiments.evidence import Run, on_one_scale
from experiments.experiment import TRAINING, ExperimentError
from scripts import keys
from scripts.cohorts.cohort import Case, Cohort, CohortError, load_cohort
from scripts.cohorts.scans import patient_key
from scripts.cohorts.thresholds import HALF
from scripts.evaluation.bootstrap import paired_bootstrap
from scripts.evaluation.case_metrics import MEASURES, PAPER_MEASURES, summarise
from scripts.evaluation.clinical_model import ClinicalModelError, shipped
from scripts.evaluation.survival import CalibrationError, FoldScale

CLINICAL_PENALIZER = 0.1
COMPARED = (*PAPER_MEASURES, "hpv_auc")
HPV_COMPARED = ("hpv_auc", "balanced_accuracy")


def cohort_of(record: Mapping[str, Any]) -> Cohort:
    """The cohort of an experiment with this record.

    Raises:
        CohortError: it is gone or has changed.
    """
    settings = record["settings"]
    cohort = load_cohort(record["dataset_dir"], settings.get("ehr_csv"), settings["clinical_features"])
    if cohort.fingerprint != record["cohort"]["fingerprint"]:
        raise CohortError(f"{record['dataset_dir']} is no longer the cohort from which the folds were made")
    return cohort


def clinical_parts(run: Run, known: str, others: Sequence[Case] | None = None) -> list[tuple[list[Case], list[Case]]]:
    """Of each fold the network's training cases, and those it held out or ``others``, that have the label ``known``.

    Raises:
        CohortError: the cohort is gone or has changed, or no held-out case has the label.
    """
    settings, cohort, found = run.record["settings"], cohort_of(run.record), []
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

    They are of the cases that each fold held out, or of those of another cohort.

    Returns:
        ``PatientID`` and ``clinical_risk``, normalised like the network's; a patient of several folds has the mean.

    Raises:
        CohortError: as :func:`clinical_parts`, or no model can be fitted.
        CalibrationError: the model gives all patients the same log hazard.
    """
    features, tables = run.record["settings"]["clinical_features"], []
    for parts in clinical_parts(run, keys.SURV_KNOWN, others):
        train, test = (code_cohort(part, features) for part in parts)
        train, test = fill_missing(train, test)
        fit = fit_cox(train, CLINICAL_PENALIZER)
        risks = [fit.model.predict_log_partial_hazard(table[fit.used]).to_numpy() for table in (train, test)]
        scale = FoldScale.of(risks[0])
        tables.append(pd.DataFrame({"PatientID": test.index, "clinical_risk": (risks[1] - scale.centre) / scale.scale}))
    return pd.concat(tables).groupby("PatientID", as_index=False)["clinical_risk"].mean()


def clinical_hpv(run: Run, others: Sequence[Case] | None = None) -> pd.DataFrame:
    """HPV probabilities by a logistic regression of clinical values alone, fitted like :func:`clinical_risks`.

    Both classes have the same weight, so that 0.5 is the threshold.

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
        train, test = (code_cohort(part, features) for part in parts)
        coded = fill_missing(train, test)
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

    The bundle's own clinical model, trained on other patients, stands in ``shipped``: see :func:`add_shipped`.
    """
    about = {
        "model": f"Cox, ridge {CLINICAL_PENALIZER:g}, on the same folds",
        "features": run.record["settings"]["clinical_features"],
        "shipped": add_shipped(run, cases, seed, samples, others),
    }
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


def add_shipped(
    run: Run, cases: pd.DataFrame, seed: int, samples: int, others: Sequence[Case] | None = None
) -> dict[str, Any]:
    """C-index of the clinical model that the bundle ships, which has seen none of these patients, or why there is none.

    Arguments are those of :func:`add_clinical`. It reads the clinical values that it knows in the cohort's tables, also
    those that the network does not read, such as T and N; ``known`` counts them.
    """
    try:
        model = shipped()
        cohort = cohort_of(run.record).cases if others is None else others
    except (ClinicalModelError, CohortError, OSError) as error:
        why = str(error).splitlines()[0]
        return {"model": "", "known": {}, "c_index": {"value": None, "reason": why, "patients": 0}}
    values = [{**case[keys.CLINICAL_OTHERS], **case[keys.CLINICAL]} for case in cohort]
    risks = pd.DataFrame(
        {"PatientID": [case[keys.PATIENT_ID] for case in cohort], "log_hazard": model.normalised(values)}
    )
    table = cases.drop(columns="log_hazard", errors="ignore").merge(risks, on="PatientID", how="inner")
    known = {name: sum(each.get(name) is not None for each in values) for name in model.features}
    about: dict[str, Any] = {"model": model.summary, "known": known, "patients": len(values)}
    about["c_index"] = summarise(table, seed, ("c_index",), samples=samples)["c_index"]
    if "log_hazard" in cases:
        about["model_minus_clinical"] = compare_tables(on_one_scale(cases), table, seed, samples)
    return about


def add_clinical_hpv(
    run: Run, cases: pd.DataFrame, seed: int, samples: int, others: Sequence[Case] | None = None
) -> tuple[pd.DataFrame, dict[str, Any]]:
    """The cases with ``clinical_hpv``, and its metrics and the differences to the model's, or why there are none.

    Arguments are those of :func:`add_clinical`.
    """
    about: dict[str, Any] = {"model": "logistic regression, ridge 1, both classes alike, on the same folds"}
    try:
        cases = cases.merge(clinical_hpv(run, others), on="PatientID", how="left", validate="one_to_one")
    except (CohortError, OSError) as error:
        none = {"value": None, "reason": str(error).splitlines()[0], "patients": 0}
        return cases, about | dict.fromkeys(HPV_COMPARED, none)
    table = cases.dropna(subset=["clinical_hpv"])
    table = table.assign(hpv_prob=table["clinical_hpv"], hpv_threshold=HALF)
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
    # runs may have been made on copies of one cohort that spell its ids in two ways
    first, second = (table.assign(PatientID=table["PatientID"].map(patient_key)) for table in (first, second))
    tables = [table.reindex(columns=columns).dropna(subset=list(measure.columns)) for table in (first, second)]
    common = set(tables[0]["PatientID"]) & set(tables[1]["PatientID"])
    tables = [table[table["PatientID"].isin(common)].sort_values("PatientID") for table in tables]
    left_out = len(set(first["PatientID"]) ^ set(second["PatientID"]))
    result = paired_bootstrap(measure.statistic, tables[0], tables[1], samples=samples, seed=seed)
    return result | ({"in_one_only": left_out} if left_out else {})


def compare_runs(run: Run, other: Run, seed: int, samples: int) -> dict[str, Any]:
    """This experiment less another, measure by measure, on the patients that both hold out.

    Raises:
        ExperimentError: the other gives a patient another outcome or HPV status.
    """
    tables = on_one_scale(run.cases), on_one_scale(other.cases)
    try:
        differences = {name: compare_tables(*tables, seed, samples, name) for name in COMPARED}
    except ValueError as error:
        why = "its cohort has been changed, so the two cannot be compared; train one of them again"
        raise ExperimentError(f"{other.folder}: {error}: {why}") from error
    return {"other": str(other.folder), "other_command": other.record["command"], "differences": differences}


def oracle(cases: pd.DataFrame, dataset_dir: str | Path, seed: int, samples: int) -> dict[str, Any] | None:
    """C-index of the phantoms' true log hazard on these cases; None for a cohort that is not of phantoms."""
    path = Path(dataset_dir) / "truth.csv"
    if not path.is_file():
        return None
    truth = pd.read_csv(path, converters={"PatientID": str})[["PatientID", "log_hazard"]]
    cases = cases.drop(columns="log_hazard", errors="ignore").merge(truth, on="PatientID", how="left")
    return summarise(cases, seed, ("c_index",), samples=samples)["c_index"]
