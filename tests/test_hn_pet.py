"""A real head and neck FDG-PET (QIN-0024, expert contours): what the models find in it, and what its DICOM study lacks.

The CT was made from the PET, since no CT of the patient is public. One patient shows what a model does on real uptake,
not how good it is: changes of these numbers are to be looked at, and written into docs/learning.md.
"""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from conftest import BUNDLE, ROOT, SHARED_DATA
from predict import predict
from research.measure_masks import METRICS, TABLE, measure_masks

HN_PET = SHARED_DATA / "hn_pet"
GPU_MODELS = ROOT.parent / "shared" / "models" / "gpu_2mm"
pytestmark = pytest.mark.skipif(not HN_PET.is_dir(), reason="the real head and neck PET is not beside the repository")
needs_gpu_models = pytest.mark.skipif(not GPU_MODELS.is_dir(), reason="the 2 mm models are not beside the repository")


@pytest.mark.parametrize(
    ("model", "dice", "volume_ml", "found"),
    [
        pytest.param(BUNDLE / "models", 0.671, 8.1, (1, 1), id="shipped"),
        pytest.param(GPU_MODELS / "fold_0", 0.513, 6.1, (0, 1), id="2mm_fold_0", marks=needs_gpu_models),
        pytest.param(GPU_MODELS / "fold_1", 0.300, 31.4, (1, 1), id="2mm_fold_1", marks=needs_gpu_models),
        pytest.param(GPU_MODELS / "fold_2", 0.334, 22.2, (1, 1), id="2mm_fold_2", marks=needs_gpu_models),
    ],
)
def test_masks_of_a_real_pet(model: Path, dice: float, volume_ml: float, found: tuple[int, int], tmp_path) -> None:
    measure_masks(str(HN_PET), str(tmp_path), str(model), "cpu")
    [row] = csv.DictReader((tmp_path / TABLE).read_text().splitlines())
    assert row["PatientID"] == "QIN-0024" and float(row["true_volume_ml"]) == pytest.approx(11.2, abs=0.05)
    assert float(row["dice"]) == pytest.approx(dice, abs=0.005)
    assert float(row["volume_ml"]) == pytest.approx(volume_ml, rel=0.02)
    assert (float(row["found_primaries"]), float(row["found_nodes"])) == found
    assert (row["crop_method"], row["crop_flag"]) == (
        "pet_brain+network",
        "the brain is cut off at the top of the scan",
    )
    metrics = json.loads((tmp_path / METRICS).read_text())["metrics"]
    assert metrics["dice"]["value"] == float(row["dice"]) and metrics["dice"]["patients"] == 1


def test_the_study_without_a_ct_says_what_to_send(tmp_path) -> None:
    with pytest.raises(SystemExit) as end:
        predict(str(HN_PET / "dicom"), str(tmp_path), device="cpu", report=False)
    assert end.value.code == 1
    [row] = csv.DictReader((tmp_path / "predictions.csv").read_text().splitlines())
    assert row["status"] == "failed"
    assert row["reason"] == (
        "no CT among its DICOM series (PT, SEG); found: series 0 (PT), 299 slices of 128 x 128, 3.54 x 3.54 x 3.38 mm, "
        "BQML, kernel XYZG=7.00, attenuation corrected, tracer not known; send it with the CT of the same examination"
    )
