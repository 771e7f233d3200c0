"""An experiment as ``train_folds.py`` leaves it, without any training: predictions are truth plus seeded noise."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from conftest import COLUMNS, write_image
from experiments.experiment import (
    Plan,
    counts,
    evaluation_folder,
    fold_folder,
    gather,
    make_plan,
    new_record,
    write_record,
)
from scripts import keys
from scripts.evaluation.case_metrics import summarise

SAMPLES = 40  # of the bootstrap
CENTRES = {1: "CHUM", 2: "CHUP", 5: "MDA"}


def make_cohort(folder: Path, patients: int = 90, seed: int = 0, first: int = 0) -> Path:
    """Cohort whose scans are single voxels, with a ``truth.csv``; masks, HPV and survival missing here and there.

    Patients are numbered from ``first``.
    """
    rng = np.random.default_rng(seed)
    rows, truth = [], []
    for k in range(patients):
        number, name = list(CENTRES.items())[0 if k % 10 < 3 else 1 if k % 30 == 3 else 2]
        patient = f"{name}-{first + k:03d}"
        risk = rng.normal()
        place = folder / "Task 1" / patient
        for suffix in ("__CT", "__PT", *([""] if k % 6 else [])):
            write_image(place / f"{patient}{suffix}.nii.gz", np.ones((2, 2, 2), np.uint8), 4.0)
        relapse, censored = rng.exponential(1500 * np.exp(-1.2 * risk)), rng.uniform(300, 4000)
        time, event = max(1, int(min(relapse, censored))), int(relapse < censored)
        hpv = int(rng.random() < 0.6) if k % 5 else ""
        known = k % 9 != 4
        rows.append([patient, number, 50 + int(5 * risk + rng.normal()), k % 2, "", 1, "", 1, "M0"])
        rows[-1] += [time if known else "", event if known else "", hpv]
        truth.append([patient, risk, hpv])
    with (folder / "HECKTOR_2025_Training_Task_3.csv").open("w", newline="") as file:
        csv.writer(file).writerows([COLUMNS, *rows])
    pd.DataFrame(truth, columns=["PatientID", "log_hazard", "hpv"]).to_csv(folder / "truth.csv", index=False)
    return folder


def predictions(cases: list[dict[str, Any]], truth: pd.DataFrame, plan: Plan, fold: int, seed: int) -> pd.DataFrame:
    """A table of cases as ``evaluating`` writes it; each fold has a zero and a unit of its own."""
    tasks = plan.config["tasks"]
    rng = np.random.default_rng([seed, fold, len(cases)])
    rows = []
    for case in cases:
        row: dict[str, Any] = {"PatientID": case[keys.PATIENT_ID], keys.CENTRE: case[keys.CENTRE]}
        if "surv" in tasks:
            risk = truth.loc[case[keys.PATIENT_ID], "log_hazard"] if len(truth) else 0.0
            row["log_hazard"] = (risk + rng.normal(0, 0.7)) * (1 + 2 * fold) + 10 * fold
        row["time"] = case[keys.TIME] if case[keys.SURV_KNOWN] else np.nan
        row["event"] = float(case[keys.EVENT]) if case[keys.SURV_KNOWN] else np.nan
        if "hpv" in tasks:
            row["hpv_prob"] = float(np.clip(0.25 + 0.4 * case[keys.HPV] + rng.normal(0, 0.2), 0, 1))
        row["hpv"] = case[keys.HPV] if case[keys.HPV_KNOWN] else np.nan
        if "seg" in tasks:
            known = case[keys.SEG_KNOWN]
            labels = {"dice": rng.beta(8, 2), "true_volume_ml": 20.0, "surface_distance_mm": rng.gamma(2, 2)}
            labels |= {"true_lesions": 2, "found_lesions": rng.integers(3), "false_lesions": rng.integers(2)}
            labels |= {f"{what}_{of}": 1 for what in ("true", "found") for of in ("primaries", "nodes")}
            labels |= {"matched_lesions": labels["found_lesions"]}
            row |= {
                "volume_ml": 20 + rng.normal(),
                "predicted_lesions": 2,
                **{k: v if known else np.nan for k, v in labels.items()},
            }
        rows.append(row)
    return pd.DataFrame(rows)


def make_run(
    folder: Path,
    cohort: Path,
    protocol: str = "partial",
    seed: int = 0,
    config_files: Sequence[str] = (),
    split_seed: int = 0,
    **overrides: Any,
) -> Path:
    """The folder of a finished experiment; ``seed`` is of the noise, ``split_seed`` the config's."""
    overrides |= {"seed": split_seed} if split_seed else {}
    plan = make_plan(
        str(cohort), protocol, config_files, None, str(folder), overrides, f"python scripts/train_folds.py {protocol}"
    )
    path = cohort / "truth.csv"
    truth = pd.read_csv(path, dtype={"PatientID": str}).set_index("PatientID") if path.is_file() else pd.DataFrame()
    for fold, split in enumerate(plan.splits):
        place = fold_folder(folder, fold)
        metrics = {}
        for part in plan.parts:
            table = predictions(split.part(part), truth, plan, fold, seed)
            to = evaluation_folder(folder, fold, part)
            to.mkdir(parents=True)
            table.to_csv(to / "cases.csv", index=False)
            metrics[part] = summarise(table, samples=20)
        (place / "models").mkdir()
        (place / "models" / "model.pt").touch()
        epochs = [{"epoch": k, "loss": 2 / k, "val_c_index": None if k == 1 else 0.6} for k in (1, 2, 3)]
        (place / "history.json").write_text(json.dumps(epochs))
        outcome = {"fold": fold, "status": "finished", "epoch": 3, "best_epoch": 2, "metrics": metrics}
        outcome["cases"] = {part: counts(split.part(part)) for part in plan.parts}
        if protocol == "leave_one_centre_out":
            outcome["centre"] = plan.cohort.centres[fold]
        (place / "fold.json").write_text(json.dumps(outcome))
    record = new_record(plan)
    write_record(folder, record)
    gather(plan, record)
    return folder


def external_table(run: Path, folder: Path, folds: int = 3, cohort: Path | None = None) -> Path:
    """Strangers with the log hazards of three networks on scales of their own, as :func:`predictions` gives them.

    Their cohort, where one is given, is named beside the table as ``evaluating`` does.
    """
    table = pd.read_csv(run / "out_of_fold.csv")
    table["PatientID"] = [f"{patient[:-3]}{500 + int(patient[-3:])}" for patient in table["PatientID"]]
    if cohort is not None:
        (folder / "metrics.json").write_text(json.dumps({"dataset_dir": str(cohort)}))
    risk = (table["log_hazard"] - 10 * table["fold"]) / (1 + 2 * table["fold"])
    for k in range(folds):
        table[f"log_hazard_fold_{k}"] = risk * (1 + 2 * k) + 10 * k
    table["log_hazard"] = table[[f"log_hazard_fold_{k}" for k in range(folds)]].mean(axis=1)
    table.drop(columns="fold").to_csv(folder / "cases.csv", index=False)
    return folder / "cases.csv"
