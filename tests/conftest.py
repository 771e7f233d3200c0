"""Shared fixtures: a tiny cohort in the HECKTOR layout, and the bundle's commands run as a user runs them."""

from __future__ import annotations

import csv
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest

# The generators of golden values need libraries that only their oracles need.
collect_ignore_glob = ["golden/*"]

ROOT = Path(__file__).resolve().parents[1]
BUNDLE = ROOT / "bundle"
SHARED_DATA = ROOT.parent / "shared" / "data"
TINY = ["--roi_size", "[32,32,32]", "--spacing_mm", "8.0", "--num_workers", "0", "--device", "cpu"]
SMALL_RUN = ["--epochs", "2", "--val_interval", "1", "--batch_size", "2", "--num_folds", "2", *TINY]

COLUMNS = (
    *("PatientID", "CenterID", "Age", "Gender", "Tobacco Consumption", "Alcohol Consumption"),
    *("Performance Status", "Treatment", "M-stage", "RFS", "Relapse", "HPV Status"),
)


def write_image(path: Path, array: np.ndarray, spacing: float) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(array, np.diag([spacing, spacing, spacing, 1.0])), path)


def make_tiny_cohort(folder: Path, patients: int = 6, first: int = 1) -> Path:
    """Cohort of blocks: a body with an airway, a warm brain at its top, a hot tumour; labels missing here and there.

    Patients are numbered from ``first``.
    """
    rows = []
    for k in range(patients):
        patient = f"CHUM-{first + k:03d}"
        rng = np.random.default_rng(k)
        ct = np.full((28, 28, 32), -1000, dtype=np.int16)
        ct[6:22, 6:22, :28] = 40 + rng.integers(-20, 20, (16, 16, 28))
        ct[13:15, 18:20, :18] = -950
        pet = np.zeros((28, 28, 32), dtype=np.float32)
        pet[6:22, 6:22, :28] = 0.8
        pet[8:20, 8:20, 19:27] = 7.0
        mask = np.zeros(ct.shape, dtype=np.uint8)
        mask[11:15, 12 : 14 + k % 3, 8:12] = 1
        mask[16:18, 12:14, 6:8] = 2
        pet[mask > 0] = 10 + k
        place = folder / "Task 1" / patient
        write_image(place / f"{patient}__CT.nii.gz", ct, 8.0)
        write_image(place / f"{patient}__PT.nii.gz", pet, 8.0)
        if k != 2:
            write_image(place / f"{patient}.nii.gz", mask, 8.0)
        hpv = "" if k == 1 else k % 2
        rows.append([patient, 1, 50 + k, k % 2, "", 1, "", 1, "M0", 300 + 100 * k, int(k % 3 == 0), hpv])
    with (folder / "HECKTOR_2025_Training_Task_3.csv").open("w", newline="") as file:
        csv.writer(file).writerows([COLUMNS, *rows])
    return folder


def exit_code(command: Callable[..., Any], *arguments: Any, **options: Any) -> int:
    """Call a command in this process; the code with which it ends the program, 0 where it does not."""
    try:
        command(*arguments, **options)
    except SystemExit as end:
        return int(str(end.code))
    return 0


@pytest.fixture(scope="session")
def tiny_cohort(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six patients of 28 x 28 x 32 voxels of 8 mm; two events in every fold of three is not guaranteed."""
    return make_tiny_cohort(tmp_path_factory.mktemp("cohort"))


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the weights of ``tiny_model.py``; not to be changed."""
    from tiny_model import write_model  # it imports torch, which some tests do without

    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The cohort of ``synthetic_run.py``: scans of single voxels, for experiments that nobody trains."""
    from synthetic_run import make_cohort  # it imports from here

    return make_cohort(tmp_path_factory.mktemp("synthetic"))


@pytest.fixture(scope="session")
def evaluated(cohort: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three folds of ``synthetic_run.py``, evaluated; not to be changed."""
    from synthetic_run import SAMPLES, make_run

    from evaluate_folds import evaluate_folds

    folder = make_run(tmp_path_factory.mktemp("runs") / "partial", cohort)
    evaluate_folds(str(folder), samples=SAMPLES, examples=False)
    return folder


@pytest.fixture(scope="session")
def evaluated_report(evaluated: Path) -> dict[str, Any]:
    return json.loads((evaluated / "evaluation" / "metrics.json").read_text())


@pytest.fixture
def evaluated_copy(evaluated: Path, tmp_path: Path) -> Path:
    """The evaluated experiment, to be changed."""
    return Path(shutil.copytree(evaluated, tmp_path / "copy"))


@pytest.fixture
def no_credentials(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No user, password or token of a DICOMweb server in the environment or in ~/.netrc."""
    from scripts.dicom import web

    for name in (web.USER, web.PASSWORD, web.TOKEN):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "no_netrc"))


@pytest.fixture(scope="session")
def run_bundle() -> Callable[..., subprocess.CompletedProcess]:
    """Run ``python -m monai.bundle run ...`` in ``bundle/`` and check its exit code."""

    def run(*arguments: str, code: int = 0, cwd: Path = BUNDLE, path: str = "") -> subprocess.CompletedProcess:
        result = subprocess.run(
            [sys.executable, "-m", "monai.bundle", "run", *arguments],
            cwd=cwd,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path},
            capture_output=True,
            text=True,
            check=False,
        )
        assert result.returncode == code, result.stdout[-3000:] + result.stderr[-3000:]
        return result

    return run


@pytest.fixture(scope="session")
def trained(tiny_cohort: Path, tmp_path_factory: pytest.TempPathFactory, run_bundle: Callable) -> Path:
    """Output folder of ``configs/train.json`` after two epochs on the tiny cohort."""
    output = tmp_path_factory.mktemp("trained")
    run_bundle(
        "training",
        "--config_file",
        "configs/train.json",
        *("--dataset_dir", str(tiny_cohort), "--output_dir", str(output)),
        *SMALL_RUN,
    )
    return output
