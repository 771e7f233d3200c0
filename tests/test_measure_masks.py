"""Predicted against true masks on the scans' grid: every case counts, whatever the grids and classes."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path

import nibabel
import numpy as np
import pytest
from tiny_model import write_model

from conftest import make_tiny_cohort
from research.measure_masks import METRICS, TABLE, MeasureError, compare, measure_masks

AFFINE = np.diag([2.0, 2.0, 3.0, 1.0])


def block(value: int, *window: slice, shape: tuple[int, int, int] = (20, 20, 20)) -> np.ndarray:
    mask = np.zeros(shape, dtype=np.uint8)
    mask[window] = value
    return mask


def write(path: Path, mask: np.ndarray, affine: np.ndarray = AFFINE) -> Path:
    nibabel.save(nibabel.Nifti1Image(mask, affine), path)
    return path


EMPTY = block(0)
CUBE = block(1, slice(4, 8), slice(4, 8), slice(4, 8))  # 64 voxels of 12 mm3
HALF = block(1, slice(4, 8), slice(4, 8), slice(4, 6))
NODE = block(2, slice(12, 16), slice(12, 16), slice(12, 16))
CORNER = block(1, slice(0, 2), slice(0, 2), slice(0, 2))


@pytest.mark.parametrize(
    ("predicted", "true", "expected"),
    [
        pytest.param(CUBE, CUBE, {"dice": 1, "volume_ml": 0.768, "surface_distance_mm": 0}, id="equal"),
        pytest.param(HALF, CUBE, {"dice": 2 / 3, "volume_ml": 0.384, "surface_distance_mm": 6}, id="half"),
        pytest.param(CORNER, CUBE, {"dice": 0, "found_lesions": 0, "false_lesions": 1}, id="elsewhere"),
        pytest.param(EMPTY, CUBE, {"dice": 0, "volume_ml": 0, "surface_distance_mm": math.inf}, id="nothing_found"),
        pytest.param(CUBE, EMPTY, {"dice": 0, "true_volume_ml": 0, "false_lesions": 1}, id="nothing_to_find"),
        pytest.param(EMPTY, EMPTY, {"dice": 1, "true_lesions": 0}, id="both_empty"),
        pytest.param(
            CUBE, CUBE + NODE, {"dice": 2 / 3, "found_primaries": 1, "true_nodes": 1, "found_nodes": 0}, id="no_node"
        ),
    ],
)
def test_masks_are_compared(tmp_path, predicted, true, expected) -> None:
    found = compare(write(tmp_path / "p.nii", predicted), write(tmp_path / "t.nii", true), True, False)
    assert {name: found[name] for name in expected} == pytest.approx(expected)


def test_the_classes_of_a_model_of_two_are_compared_each_on_its_own(tmp_path) -> None:
    """The predicted node is the true one; the predicted primary tumour is half of the true one."""
    found = compare(write(tmp_path / "p.nii", HALF + NODE), write(tmp_path / "t.nii", CUBE + NODE), True, True)
    assert (found["dice_gtvp"], found["dice_gtvn"]) == pytest.approx((2 / 3, 1))
    merged = compare(tmp_path / "p.nii", tmp_path / "t.nii", False, True)
    assert math.isnan(merged["dice_gtvp"]) and merged["dice"] == found["dice"]


def test_a_true_mask_on_another_grid_is_resampled(tmp_path) -> None:
    finer = np.kron(CUBE, np.ones((2, 2, 2), dtype=np.uint8))
    affine = np.diag([1.0, 1.0, 1.5, 1.0])
    affine[:3, 3] = [-0.5, -0.5, -0.75]  # the corners of the two fields of view are the same
    found = compare(write(tmp_path / "p.nii", CUBE), write(tmp_path / "t.nii", finer, affine), False, False)
    assert found["dice"] == 1


def test_a_folder_of_patients(tmp_path, capsys) -> None:
    """Those without a mask are left out; one that cannot be predicted is told and ends the command with code 1."""
    cohort, model, out = make_tiny_cohort(tmp_path / "in", 4), write_model(tmp_path / "model"), tmp_path / "out"
    pet = cohort / "Task 1" / "CHUM-002" / "CHUM-002__PT.nii.gz"
    image = nibabel.load(pet)
    values = np.asarray(image.dataobj).copy()
    values[0, 0, 0] = np.nan
    nibabel.save(nibabel.Nifti1Image(values, image.affine), pet)
    with pytest.raises(SystemExit) as end:
        measure_masks(str(cohort), str(out), str(model), "cpu")
    assert end.value.code == 1
    rows = list(csv.DictReader((out / TABLE).read_text().splitlines()))
    assert [row["PatientID"] for row in rows] == ["CHUM-001", "CHUM-004"]  # CHUM-003 has no mask
    report = json.loads((out / METRICS).read_text())
    assert report["failed"] == ["CHUM-002"] and report["metrics"]["dice"]["patients"] == 2
    assert report["metrics"]["dice"]["value"] == pytest.approx(np.mean([float(row["dice"]) for row in rows]))
    assert "no prediction of CHUM-002" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("tasks", "masks", "message"),
    [
        pytest.param(["seg", "hpv", "surv"], False, "holds no mask to compare with", id="no_mask"),
        pytest.param(["surv"], True, "this model predicts no mask", id="no_segmentation"),
    ],
)
def test_what_cannot_be_measured(tmp_path, tasks, masks, message) -> None:
    cohort = make_tiny_cohort(tmp_path / "in", 1)
    if not masks:
        (cohort / "Task 1" / "CHUM-001" / "CHUM-001.nii.gz").unlink()
    inputs = {} if "seg" in tasks else {"survival_inputs": ["deep"]}
    model = write_model(tmp_path / "model", tasks=tasks, **inputs)
    with pytest.raises(MeasureError, match=message):
        measure_masks(str(cohort), str(tmp_path / "out"), str(model), "cpu")
