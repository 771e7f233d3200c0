"""A cohort of phantoms in the folder layout of HECKTOR 2025; ``make_cohort.py`` is its command.

Files ::

    DIR/cohort.json                            what this folder is, and how it was made
    DIR/Task 1/<PatientID>/<PatientID>__CT.nii.gz, <PatientID>__PT.nii.gz, <PatientID>.nii.gz (mask, where known)
    DIR/HECKTOR_2025_Training_Task_{1,2,3}.csv  clinical values; 2 adds RFS and Relapse, 3 adds HPV Status
    DIR/truth.csv                              simulated values: true log hazard, volumes, uptake, hidden labels
"""

from __future__ import annotations

import json
import math
import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pandas as pd
from isal import igzip
from numpy.typing import NDArray
from tqdm import tqdm

from phantom import SCALES, Patient, draw_patient, scan_patient
from scripts import keys
from scripts.cohorts.files import written_whole
from scripts.evaluation.bootstrap import bootstrap_interval
from scripts.training.concordance import concordance_index

PHANTOM_VERSION = 2  # raise it when the same seed no longer gives the same bytes
NOTICE = "Digital phantoms, for software demonstration only: no real patient, no clinical conclusion."
RECORD_FILE, TRUTH_FILE, IMAGE_FOLDER = "cohort.json", "truth.csv", "Task 1"
TASK_FILES = {task: f"HECKTOR_2025_Training_Task_{task}.csv" for task in (1, 2, 3)}
TASK_COLUMNS: dict[int, tuple[str, ...]] = {1: (), 2: ("RFS", "Relapse"), 3: ("HPV Status",)}
CLINICAL_COLUMNS = (
    "PatientID", "CenterID", "Age", "Gender", "Tobacco Consumption", "Alcohol Consumption", "Performance Status",
    "Treatment", "M-stage",
)  # fmt: skip
BOOTSTRAP_SAMPLES = 200


class MakeCohortError(ValueError):
    """The cohort cannot be made as asked; the message says why and what to do."""


def write_cohort(folder: Path, cases: int = 300, seed: int = 0, scale: str = "small", jobs: int = 1) -> bool:
    """Write a cohort, or complete an interrupted one; False if it was complete. The same seed gives the same bytes.

    Args:
        folder: to write; new, empty, or holding the same cohort.
        cases: number of patients; patient ``k`` depends on ``seed`` and ``k`` only.
        seed: a whole number, 0 or more.
        scale: ``small`` (6 to 7 mm voxels, some tens of kB a case) or ``full`` (voxel sizes and extents of hospitals).
        jobs: processes; 0: one for each core.

    Raises:
        MakeCohortError: an argument is out of range, or ``folder`` holds anything else.
    """
    recipe = _check_recipe(cases, seed, scale, jobs)
    complete = _claim_folder(folder, recipe)
    patients = [draw_patient(seed, index) for index in range(cases)]
    pending = [index for index, patient in enumerate(patients) if not _has_images(folder, patient)]
    tables = [folder / name for name in (*TASK_FILES.values(), TRUTH_FILE)]
    if complete and not pending and all(table.is_file() for table in tables):
        return False
    _write_images(folder, seed, scale, pending, jobs or _count_cores())
    _write_tables(folder, patients)
    _write_record(folder, {**recipe, "complete": True, **summarise(patients)})
    return True


def summarise(patients: list[Patient]) -> dict[str, Any]:
    """Counts of a cohort and the C-index of an oracle that knows every true log hazard (cases with known RFS).

    Returns:
        ``relapses`` (among known), ``with_mask``, ``with_hpv``, ``with_rfs``, ``oracle_c_index`` and its bootstrap
        ``oracle_c_index_interval`` (2.5 % and 97.5 %); None where no pair of patients can be compared.
    """
    known = [patient for patient in patients if "RFS" not in patient.missing]
    truth = pd.DataFrame(
        {
            keys.TIME: [float(patient.rfs_days) for patient in known],
            keys.EVENT: [bool(patient.relapse) for patient in known],
            "log_hazard": [patient.log_hazard for patient in known],
        }
    )
    point = _c_index(truth)
    interval = () if math.isnan(point) else bootstrap_interval(_c_index, truth, BOOTSTRAP_SAMPLES)
    return {
        "relapses": int(truth[keys.EVENT].sum()),
        "with_mask": sum("mask" not in patient.missing for patient in patients),
        "with_hpv": sum("HPV Status" not in patient.missing for patient in patients),
        "with_rfs": len(known),
        "oracle_c_index": None if math.isnan(point) else round(point, 4),
        "oracle_c_index_interval": None if math.isnan(point) else [round(bound, 4) for bound in interval],
    }


def _c_index(truth: pd.DataFrame) -> float:
    return concordance_index(truth[keys.TIME], truth[keys.EVENT], truth["log_hazard"])


def describe(folder: Path) -> str:
    """Summary of a complete cohort, from its ``cohort.json``, to print."""
    record = json.loads((folder / RECORD_FILE).read_text())
    if record["oracle_c_index"] is None:
        oracle = "not defined (no two patients can be compared; make more cases)"
    else:
        low, high = record["oracle_c_index_interval"]
        oracle = f"{record['oracle_c_index']:.3f} (95 % bootstrap interval {low:.3f} to {high:.3f})"
    return "\n".join(
        [
            f"Cases: {record['cases']} ({record['scale']} scale, seed {record['seed']})",
            f"With mask: {record['with_mask']}, with HPV status: {record['with_hpv']}, "
            f"with RFS: {record['with_rfs']} (of these {record['relapses']} relapses)",
            f"Oracle's C-index (true log hazard): {oracle}",
            f"{record['notice']}",
            f"Cohort: {folder}",
        ]
    )


def clinical_row(patient: Patient) -> dict[str, Any]:
    """A patient's row over the columns of all three CSV files, in HECKTOR 2025's coding; None where not recorded."""
    row: dict[str, Any] = {
        "PatientID": patient.patient_id,
        "CenterID": patient.centre.center_id,
        "Age": patient.age,
        "Gender": int(patient.male),
        "Tobacco Consumption": int(patient.tobacco),
        "Alcohol Consumption": int(patient.alcohol),
        "Performance Status": patient.performance_status,
        "Treatment": int(patient.chemotherapy),
        "M-stage": "M1" if patient.m1 else "M0",
        "RFS": patient.rfs_days,
        "Relapse": int(patient.relapse),
        "HPV Status": int(patient.hpv),
    }
    for column in patient.missing - {"mask"}:
        row[column] = "Mx" if column == "M-stage" else None
    if "RFS" in patient.missing:
        row["Relapse"] = None
    return row


def truth_row(patient: Patient) -> dict[str, Any]:
    """The simulated values of a patient; ``*_known`` says whether the tables contain them."""
    return {
        "PatientID": patient.patient_id,
        "CenterID": patient.centre.center_id,
        "log_hazard": round(patient.log_hazard, 6),
        "volume_ml": round(patient.gtvp_ml + patient.gtvn_ml, 4),
        "gtvp_ml": round(patient.gtvp_ml, 4),
        "gtvn_ml": round(patient.gtvn_ml, 4),
        "nodes": sum(lesion.label == 2 for lesion in patient.lesions),
        "suv_mean": round(patient.suv_mean, 4),
        "suv_max": round(patient.suv_max, 4),
        "hpv": int(patient.hpv),
        "performance_status": patient.performance_status,
        "m1": int(patient.m1),
        "rfs_days": patient.rfs_days,
        "relapse": int(patient.relapse),
        "mask_known": int("mask" not in patient.missing),
        "hpv_known": int("HPV Status" not in patient.missing),
        "rfs_known": int("RFS" not in patient.missing),
        "note": "phantom, for software demonstration only",
    }


def image_paths(folder: Path, patient: Patient) -> dict[str, Path]:
    """Where a patient's files are: ``ct``, ``pet`` and, where it is known, ``mask``."""
    home = folder / IMAGE_FOLDER / patient.patient_id
    paths = {"ct": home / f"{patient.patient_id}__CT.nii.gz", "pet": home / f"{patient.patient_id}__PT.nii.gz"}
    if "mask" not in patient.missing:
        paths["mask"] = home / f"{patient.patient_id}.nii.gz"
    return paths


def write_case(folder: Path, seed: int, index: int, scale: str) -> None:
    """Scan a patient and write the images; each appears only when complete."""
    patient = draw_patient(seed, index)
    scan = scan_patient(patient, seed, index, scale)
    images = {
        "ct": _nifti(scan.ct, scan.ct_grid.affine),
        "pet": _nifti(scan.pet, scan.pet_grid.affine, scan.pet_slope),
        "mask": _nifti(scan.mask, scan.ct_grid.affine),
    }
    for name, path in image_paths(folder, patient).items():
        _write_whole(path, igzip.compress(images[name].to_bytes(), 2, mtime=0))


def _nifti(array: NDArray[Any], affine: NDArray[np.float64], slope: float | None = None) -> nib.Nifti1Image:
    image = nib.Nifti1Image(array, affine)
    image.set_qform(affine, code=1)
    image.set_sform(affine, code=1)
    image.header.set_xyzt_units("mm")
    if slope is not None:  # the integers are stored as they are, and readers multiply them by the slope
        image.header.set_slope_inter(slope, 0)
    return image


def _check_recipe(cases: int, seed: int, scale: str, jobs: int) -> dict[str, Any]:
    """The recipe that decides every byte of a cohort, once its parts are known to be sound."""
    for name, value, least in (("cases", cases, 1), ("seed", seed, 0), ("jobs", jobs, 0)):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise MakeCohortError(f"--{name} {value}: give a whole number, {least} or more")
    if scale not in SCALES:
        raise MakeCohortError(f"--scale {scale}: give one of {', '.join(SCALES)}")
    return {"notice": NOTICE, "phantom_version": PHANTOM_VERSION, "cases": cases, "seed": seed, "scale": scale}


def _claim_folder(folder: Path, recipe: dict[str, Any]) -> bool:
    """Make sure that ``folder`` is this cohort's. Returns whether it was finished before."""
    if folder.exists() and not folder.is_dir():
        raise MakeCohortError(f"{folder} is a file: give a folder with --out")
    record_path = folder / RECORD_FILE
    if not record_path.exists():
        if folder.exists() and any(folder.iterdir()):
            raise MakeCohortError(
                f"{folder} is not empty and holds no phantom cohort: give a new or empty folder with --out"
            )
        _write_record(folder, {**recipe, "complete": False})
        return False
    try:
        record = json.loads(record_path.read_text())
        differences = [
            f"{key} {record[key]} there, {value} asked" for key, value in recipe.items() if record[key] != value
        ]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise MakeCohortError(
            f"{record_path} is not the record of a phantom cohort: give another folder with --out"
        ) from error
    if differences:
        raise MakeCohortError(
            f"{folder} holds another phantom cohort ({'; '.join(differences)}): "
            "give another folder with --out, or remove it"
        )
    return bool(record["complete"])


def _count_cores() -> int:
    """Cores that this process may use (where the platform tells, else all)."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _has_images(folder: Path, patient: Patient) -> bool:
    return all(path.is_file() for path in image_paths(folder, patient).values())


def _write_images(folder: Path, seed: int, scale: str, indices: list[int], jobs: int) -> None:
    """Make the cases ``indices``, in this process or in ``jobs`` others."""
    with tqdm(total=len(indices), desc="Making phantoms", unit="case", disable=len(indices) < 2) as bar:
        if jobs == 1 or len(indices) <= 1:
            for index in indices:
                write_case(folder, seed, index, scale)
                bar.update()
            return
        context = multiprocessing.get_context("spawn")  # the same on every platform, and safe beside threads
        pool = ProcessPoolExecutor(min(jobs, len(indices)), mp_context=context)
        try:
            for future in as_completed([pool.submit(write_case, folder, seed, index, scale) for index in indices]):
                future.result()
                bar.update()
        finally:
            pool.shutdown(cancel_futures=True)


def _write_tables(folder: Path, patients: list[Patient]) -> None:
    """The three CSV files of the tasks and the truth, sorted by patient."""
    ordered = sorted(patients, key=lambda patient: patient.patient_id)
    clinical = pd.DataFrame([clinical_row(patient) for patient in ordered], dtype=object)
    for task, name in TASK_FILES.items():
        table = clinical[[*CLINICAL_COLUMNS, *TASK_COLUMNS[task]]]
        _write_whole(folder / name, table.to_csv(index=False, lineterminator="\n").encode())
    truth = pd.DataFrame([truth_row(patient) for patient in ordered])
    _write_whole(folder / TRUTH_FILE, truth.to_csv(index=False, lineterminator="\n").encode())


def _write_record(folder: Path, record: dict[str, Any]) -> None:
    _write_whole(folder / RECORD_FILE, (json.dumps(record, indent=2) + "\n").encode())


def _write_whole(path: Path, content: bytes) -> None:
    """Write under another name, then rename: a file that is there is complete."""
    with written_whole(path) as partial:
        partial.write_bytes(content)
