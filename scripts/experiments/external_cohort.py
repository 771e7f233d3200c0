"""Evaluation of the ensemble of an experiment on another cohort."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd

from command_line import BUNDLE

from experiments.comparators import HPV_COMPARED, add_clinical, add_clinical_hpv, oracle
from experiments.ensemble import calibrate as calibrate_ensemble
from experiments.ensemble import choose_hpv_threshold, finished_folds, join_experiment, out_of_fold
from experiments.evidence import CASES_FILE, METRICS_FILE, Run, read_cases, selection_of
from experiments.experiment import TEST, TRAINING, VALIDATION, ExperimentError, bundle_command, evaluation_folder
from scripts import keys
from scripts.cohorts.cohort import load_cohort
from scripts.cohorts.scans import shared_patients
from scripts.cohorts.thresholds import HALF
from scripts.evaluation.case_metrics import SMALL_GROUP, centre_groups
from scripts.evaluation.case_table import case_figures
from scripts.evaluation.judge import judge, outcomes_of
from scripts.evaluation.plots import save_plots, survival_figures
from scripts.evaluation.survival_metrics import ensemble_survival


def predict_external(run: Run, dataset_dir: Path, folder: Path) -> Path:
    """The table of every case of another cohort, predicted by the joined folds with the bundle's ``evaluating``.

    Args:
        run: whose folds.
        dataset_dir: folder of the other cohort, in one of HECKTOR's layouts.
        folder: receives ``models/model.pt`` and ``evaluation_all/``.

    Raises:
        ExperimentError: the cohort cannot be read or shares patients with the experiment's, or the command failed.
    """
    refuse_if_shared(run, [case[keys.PATIENT_ID] for case in load_cohort(dataset_dir).cases], dataset_dir)
    model = folder / "models" / "model.pt"
    join_experiment(run.folder, model, allow_missing=True)
    options = {"dataset_dir": str(dataset_dir.resolve()), "output_dir": str(folder.resolve())}
    options |= {"ckpt_dir": str(model.parent.resolve()), "evaluate_on": "all"}
    code = subprocess.run(bundle_command("evaluating", list(run.record["configs"]), options), cwd=BUNDLE).returncode
    if code:
        raise ExperimentError(f"evaluating {dataset_dir} ended with exit code {code}: see the messages above")
    return folder / "evaluation_all" / CASES_FILE


def refuse_if_shared(run: Run, patients: Sequence[str], place: Path) -> None:
    """Raise ExperimentError where patients of another cohort are of the experiment too, in whatever part of it.

    Spellings of an id count as one, as everywhere: ``CHUM_001`` is CHUM-001.
    """
    paths = [
        evaluation_folder(run.folder, fold, part) / CASES_FILE
        for fold in run.folds
        for part in (TRAINING, VALIDATION, TEST)
    ]
    own = {patient for path in paths if path.is_file() for patient in read_cases(path)["PatientID"]}
    if seen := shared_patients(patients, own | set(run.cases["PatientID"])):
        raise ExperimentError(
            f"{place} is no external cohort: {len(seen)} patients are of the experiment ({seen[0]} ...)"
        )


def read_external(run: Run, path: Path) -> pd.DataFrame:
    """Cases of another cohort, as the bundle's ``evaluating`` wrote them with the ensemble, with its HPV threshold.

    Raises:
        ExperimentError: patients of the experiment are among them, or there is no such table.
    """
    cases = read_cases(path)
    refuse_if_shared(run, cases["PatientID"].tolist(), path)
    if "hpv_prob" in cases:
        train = run.cases if run.reference is None else run.reference
        chosen = choose_hpv_threshold(train)["value"] if "hpv_prob" in train else None
        cases["hpv_threshold"] = HALF if chosen is None else chosen
    return cases


def judge_external(run: Run, path: Path, figures: Path, seed: int, samples: int) -> dict[str, Any]:
    """All metrics of another cohort (``cases.csv`` at ``path``) and of each of its centres, and ``figures``.

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
        calibrated = partial(ensemble_survival, stored=stored)
        return judge(group, outcomes_of(train), calibrated, least=least, seed=seed, samples=samples)

    try:
        report = {"table": str(path), "selection": selection_of(run.record, "all"), **judge_group(cases)}
        report["centres"] = {centre: judge_group(group, SMALL_GROUP) for centre, group in centre_groups(cases)}
    except ValueError as error:
        raise ExperimentError(f"{path}: {error}") from error
    report |= compare_external(run, cases, path, seed, samples)
    drawn = case_figures(cases, report["metrics"]) | survival_figures(report["survival"], stored.get("reason", ""))
    report["figures"] = save_plots(figures, drawn, report["data"])
    return report


def compare_external(run: Run, cases: pd.DataFrame, path: Path, seed: int, samples: int) -> dict[str, Any]:
    """References on another cohort: models of the clinical values alone and the true risk of phantoms.

    The folder of the cohort is read from ``metrics.json`` in the folder of the table ``path``.
    """
    try:
        place = json.loads((path.parent / METRICS_FILE).read_text(encoding="utf-8"))["dataset_dir"]
        cohort = load_cohort(place, None, run.record["settings"]["clinical_features"])
    except (OSError, KeyError, ValueError) as error:  # CohortError is a ValueError
        why = f"the cohort of {path} cannot be read: {str(error).splitlines()[0]}"
        none = {"value": None, "reason": why, "patients": 0}
        clinical = {"c_index": none, "hpv": dict.fromkeys(HPV_COMPARED, none)}
        return {"data": f"{path}, a cohort that cannot be read", "clinical_only": clinical, "oracle": None}
    _, clinical = add_clinical(run, cases, seed, samples, cohort.cases)
    _, clinical["hpv"] = add_clinical_hpv(run, cases, seed, samples, cohort.cases)
    about = {"data": f"{Path(place).name}: {cohort.statement()}", "dataset_dir": place}
    return about | {"clinical_only": clinical, "oracle": oracle(cases, place, seed, samples)}
