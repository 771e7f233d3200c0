"""Primary tumour and nodes apart, from a cohort to the DICOM objects: training, evaluation and prediction."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import highdicom as hd
import jsonschema
import nibabel
import numpy as np
import pydicom
import pytest
import torch
from dicom_study import write_pet_ct
from tiny_model import write_model

from conftest import BUNDLE, SMALL_RUN, TINY, make_tiny_cohort, write_image
from predict import predict
from scripts import keys
from scripts.evaluation.case_metrics import NOT_APART
from scripts.imaging.geometry import Grid, resample
from scripts.imaging.images import read_image
from scripts.imaging.transforms import RestoreMaskd
from scripts.model.ensemble import saved_spec
from scripts.prediction.coarse import CoarsePass

CLASSES = ["--spec#seg_classes", "GTVp,GTVn"]
APART, MERGED = "CHUM", "CHUS"
SPACING = 8.0


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six patients of two centres; the masks of the second one are merged."""
    folder = make_tiny_cohort(tmp_path_factory.mktemp("mixed"))
    (table,) = folder.glob("*.csv")
    rows = list(csv.reader(table.read_text().splitlines()))
    for row in rows[4:]:
        row[1] = "3"  # CHUS
        path = folder / "Task 1" / row[0] / f"{row[0]}.nii.gz"
        mask = np.asarray(nibabel.load(path).dataobj)
        write_image(path, (mask > 0).astype(np.uint8), SPACING)
    with table.open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    return folder


@pytest.fixture(scope="module")
def two_classes(mixed: Path, tmp_path_factory: pytest.TempPathFactory, run_bundle: Callable) -> Path:
    """Output folder of a training of two classes on the mixed cohort."""
    output = tmp_path_factory.mktemp("two_classes")
    where = ("--dataset_dir", str(mixed), "--output_dir", str(output))
    said = run_bundle("training", "--config_file", "configs/train.json", *where, *SMALL_RUN, *CLASSES)
    (output / "log.txt").write_text(said.stdout + said.stderr)
    return output


def evaluated(
    run_bundle: Callable, model: Path, cohort: Path, output: Path, *given: str
) -> tuple[dict, dict[str, dict[str, str]]]:
    """Metrics and rows of all cases of a cohort by a model, with options ``given`` in training, too."""
    files = "['configs/train.json','configs/evaluate.json']"
    where = ("--dataset_dir", str(cohort), "--ckpt_dir", str(model / "models"), "--output_dir", str(output))
    run_bundle("evaluating", "--config_file", files, *where, "--evaluate_on", "all", *TINY, *given)
    folder = output / "evaluation_all"
    rows = csv.DictReader((folder / "cases.csv").read_text().splitlines())
    return json.loads((folder / "metrics.json").read_text()), {row["PatientID"]: row for row in rows}


def test_training_tells_classes_apart_where_masks_do(two_classes: Path) -> None:
    log = (two_classes / "log.txt").read_text()
    assert f"5 masks: they tell GTVp (1) and GTVn (2) apart in {APART}; they hold no GTVn in {MERGED}" in log
    last = json.loads((two_classes / "history.json").read_text())[-1]
    assert all(0 <= last[f"val_{name}"] <= 1 for name in ("dice", "dice_gtvp", "dice_gtvn"))
    assert math.isfinite(last["val_loss"])
    assert saved_spec(two_classes / "models" / "model.pt").seg_classes == ("GTVp", "GTVn")


def test_evaluation_judges_each_class_where_masks_tell_it(two_classes, mixed, tmp_path, run_bundle) -> None:
    metrics, rows = evaluated(run_bundle, two_classes, mixed, tmp_path, *CLASSES)
    assert {row["centre"] for row in rows.values()} == {APART, MERGED}
    for row in rows.values():
        told = row["centre"] == APART and row["dice"] != ""
        for name in ("dice_gtvp", "dice_gtvn", "true_volume_ml_gtvp", "true_nodes", "true_primaries"):
            assert (row[name] != "") == told, (row["PatientID"], name)
        assert row["volume_ml_gtvp"] != ""
        volumes = [float(row[name]) for name in ("volume_ml", "volume_ml_gtvp", "volume_ml_gtvn")]
        assert volumes[0] == pytest.approx(volumes[1] + volumes[2])
    assert metrics["metrics"]["dice"]["patients"] == 5
    assert metrics["metrics"]["dice_gtvp"]["patients"] == metrics["metrics"]["dice_gtvn"]["patients"] == 2
    assert float(rows["CHUM-001"]["true_volume_ml_gtvn"]) == pytest.approx(2 * 2 * 2 * 0.512)


def test_a_merged_model_is_judged_without_classes(trained, mixed, tmp_path, run_bundle) -> None:
    metrics, rows = evaluated(run_bundle, trained, mixed, tmp_path)
    assert not any("gtv" in name for name in rows["CHUM-001"])
    assert metrics["metrics"]["dice_gtvp"]["reason"] == NOT_APART
    assert [rows[f"CHUM-00{k}"]["true_nodes"] for k in (1, 4)] == ["1.0", ""]
    assert metrics["metrics"]["dice"]["patients"] == 5


def test_inference_says_which_classes_there_are(two_classes, mixed, tmp_path, run_bundle) -> None:
    where = ("--dataset_dir", str(mixed), "--ckpt_dir", str(two_classes / "models"), "--output_dir", str(tmp_path))
    run_bundle("inference", "--config_file", "configs/inference.json", *where, "--device", "cpu")
    said = json.loads((tmp_path / "CHUM-001" / "prediction.json").read_text())
    jsonschema.validate(said, json.loads((BUNDLE / "docs" / "prediction.schema.json").read_text()))
    assert said["model"]["seg_classes"] == said["tumour"]["classes"] == ["GTVp", "GTVn"]
    mask, _ = read_image(tmp_path / "CHUM-001" / said["files"]["mask"])
    assert set(np.unique(mask)) <= {0, 1, 2}
    assert np.count_nonzero(mask) * 0.512 == pytest.approx(said["tumour"]["volume_ml"])


def test_the_coarse_pass_reads_a_model_of_two_classes(tmp_path: Path) -> None:
    checkpoint = write_model(tmp_path, seg_classes=["GTVp", "GTVn"]) / "model.pt"
    grid = Grid((48, 48, 48), np.diag([8.0, 8.0, 8.0, 1.0]))
    ct = np.full(grid.shape, 40.0, dtype=np.float32)
    assert isinstance(CoarsePass(checkpoint, when="always")(ct, grid, ct / 20, grid), list)


# --- a patient with a primary and three nodes through predict.py ----------------------------------------------------
PRIMARY = (slice(11, 15), slice(12, 16), slice(8, 12))
NODES = [
    (slice(16, 19), slice(12, 15), slice(4, 7)),
    (slice(8, 10), slice(12, 15), slice(3, 6)),
    (slice(16, 19), slice(9, 11), slice(11, 13)),
]  # 27, 18 and 12 voxels of 0.512 ml


@pytest.fixture
def study(tmp_path: Path) -> tuple[Path, np.ndarray]:
    """DICOM of a patient, and the true mask (X, Y, Z)."""
    folder = make_tiny_cohort(tmp_path / "cohort", 1) / "Task 1" / "CHUM-001"
    ct, pet = (np.asarray(nibabel.load(folder / f"CHUM-001__{kind}.nii.gz").dataobj).copy() for kind in ("CT", "PT"))
    truth = np.zeros(ct.shape, dtype=np.uint8)
    truth[PRIMARY] = 1
    for node in NODES:
        truth[node] = 2
    pet[truth > 0] = 12
    write_pet_ct(tmp_path / "in", ct, pet, SPACING, {"PatientID": "CHUM-001"})
    return tmp_path / "in", truth


def as_predicted(truth: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have every network of two classes predict the true mask, as probabilities on its box."""
    restore, grid = RestoreMaskd.__call__, Grid(truth.shape, np.diag([SPACING, SPACING, SPACING, 1.0]))

    def wrapped(self: RestoreMaskd, data: dict[Any, Any]) -> dict[Any, Any]:
        shape = tuple(data[keys.SEG_PROB].shape[1:])
        assert data[keys.CLASS_PROB].shape == (2, *shape)
        box = Grid(shape, torch.as_tensor(data[keys.BOX_AFFINE]).numpy())
        each = [resample((truth == k).astype(np.float32), grid, box, "linear") for k in (1, 2)]
        classes = torch.from_numpy(np.stack(each))
        return restore(self, {**data, keys.CLASS_PROB: classes, keys.SEG_PROB: classes.sum(dim=0, keepdim=True)})

    monkeypatch.setattr(RestoreMaskd, "__call__", wrapped)


def test_mask_lesions_and_dicom_agree(study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, truth = study
    model = write_model(tmp_path / "model", seg_classes=["GTVp", "GTVn"], roi_size=[48, 48, 48], spacing_mm=4.0)
    as_predicted(truth, monkeypatch)
    predict(str(folder), str(tmp_path / "out"), ckpt_dir=str(model), device="cpu", report=True)
    place = tmp_path / "out" / "CHUM-001"
    said = json.loads((place / "prediction.json").read_text())
    mask, affine = read_image(place / said["files"]["mask"])
    where = Grid(truth.shape, np.diag([SPACING, SPACING, SPACING, 1.0]))
    np.testing.assert_array_equal(resample(mask, Grid(mask.shape, affine), where, "nearest", 0.0), truth)
    names = ["GTVp", "GTVn_01", "GTVn_02", "GTVn_03"]
    lesions = said["tumour"]["lesion_list"]
    assert [(lesion["name"], lesion["label"]) for lesion in lesions] == [(name, name[:4]) for name in names]
    assert sum(lesion["volume_ml"] for lesion in lesions) == pytest.approx(np.count_nonzero(mask) * 0.512)
    rows = list(csv.DictReader((tmp_path / "out" / "lesions.csv").read_text().splitlines()))
    assert [row["lesion"] for row in rows] == names
    seg = hd.seg.segread(place / said["files"]["dicom_seg"])
    assert [seg.get_segment_description(k).segment_label for k in seg.segment_numbers] == names
    rtstruct = pydicom.dcmread(place / said["files"]["dicom_rtstruct"])
    assert [roi.ROIName for roi in rtstruct.StructureSetROISequence] == names
    page = (place / said["files"]["report"]).read_text()
    assert all(name in page for name in names)
