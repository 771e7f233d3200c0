"""One rule wherever a probability is turned into yes or no: above the threshold, not at it."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch

from experiments.ensemble import choose_hpv_threshold
from scripts import keys
from scripts.cohorts.thresholds import above
from scripts.evaluation.case_metrics import confusion, hpv_calls
from scripts.evaluation.case_table import case_rows
from scripts.imaging.geometry import box_grid
from scripts.imaging.transforms import RestoreMaskd
from scripts.prediction.coarse import find_candidates
from scripts.training.handlers import mask_pairs
from scripts.training.metrics import balanced_accuracy

BOX = box_grid((0.0, 0.0, 0.0), 4, 2.0)
AT, OVER = 0.5, float(np.nextafter(np.float32(0.5), np.float32(1)))


def probability(value: float) -> torch.Tensor:
    """One voxel of this value in a box of zeros, as a batch."""
    map_ = torch.zeros(1, 1, *BOX.shape)
    map_[0, 0, 2, 2, 2] = value
    return map_


def evaluated(value: float, peak: float = 0.5) -> int:
    affine = torch.from_numpy(BOX.affine)[None]
    nothing = {
        keys.TIME: torch.zeros(1),
        keys.EVENT: torch.zeros(1),
        keys.HPV: torch.zeros(1),
        keys.SEG_INSIDE: torch.zeros(1),
    }
    batch = {
        **nothing,
        **{known: torch.tensor([False]) for known in (keys.SURV_KNOWN, keys.HPV_KNOWN, keys.SEG_KNOWN)},
        **{
            keys.PATIENT_ID: ["a"],
            keys.CENTRE: ["b"],
            keys.CROP_METHOD: ["mask"],
            keys.CROP_FLAG: [""],
            keys.BOX_AFFINE: affine,
        },
        **{keys.SEG: torch.zeros(1, 1, *BOX.shape), keys.SEG_CLASSES_KNOWN: torch.tensor([False])},
    }
    return round(case_rows(batch, {keys.SEG_PROB: probability(value)}, peak)[0]["volume_ml"] / BOX.voxel_ml)


def restored(value: float, peak: float = 0.5) -> int:
    affine = torch.from_numpy(BOX.affine)
    item = {keys.SEG_PROB: probability(value)[0], keys.BOX_AFFINE: affine, keys.CT_AFFINE: affine}
    return int(RestoreMaskd(peak=peak)({**item, keys.CT_SHAPE: torch.tensor(BOX.shape)})[keys.PRED].sum())


def validated(value: float) -> int:
    label = {keys.SEG: torch.zeros(1, 1, *BOX.shape), keys.SEG_KNOWN: torch.tensor([True])}
    return int(mask_pairs({"pred": {keys.SEG_PROB: probability(value)}, "label": label})[0].sum())


def status(value: float) -> pd.DataFrame:
    return pd.DataFrame({"PatientID": ["a", "b"], "hpv": [1.0, 0.0], "hpv_prob": [value, 0.0]})


@pytest.mark.parametrize(
    "positives",
    [
        pytest.param(lambda p: int(above(p)), id="rule"),
        pytest.param(evaluated, id="mask_in_evaluation"),
        pytest.param(validated, id="mask_in_training"),
        pytest.param(restored, id="mask_in_prediction"),
        pytest.param(lambda p: len(find_candidates(probability(p)[0, 0].numpy(), BOX)), id="coarse_look"),
        pytest.param(lambda p: int(hpv_calls(status(p)).sum()), id="hpv_in_evaluation"),
        pytest.param(lambda p: int(hpv_calls(status(p).assign(hpv_threshold=0.5)).sum()), id="hpv_by_own_threshold"),
        pytest.param(lambda p: confusion(status(p))["true_positive"], id="hpv_in_the_confusion"),
        pytest.param(
            lambda p: round(2 * balanced_accuracy(torch.tensor([p, 0.0]), torch.tensor([1.0, 0.0])) - 1),
            id="hpv_in_training",
        ),
    ],
)
def test_at_the_threshold_is_negative_and_above_it_positive(positives):
    assert (positives(AT), positives(OVER)) == (0, 1)


@pytest.mark.parametrize("mask", [evaluated, restored])
@pytest.mark.parametrize(("value", "voxels"), [(0.6, 0), (0.75, 1)])
def test_faint_lesions_are_left_out_in_evaluation_and_prediction(mask, value, voxels):
    assert (mask(value, peak=0.5), mask(value, peak=0.7)) == (1, voxels)


def test_a_threshold_that_was_chosen_separates_by_the_same_rule():
    table = pd.DataFrame({"PatientID": list("abcd"), "hpv": [0, 0, 1, 1], "hpv_prob": [0.1, 0.5, 0.75, 1.0]})
    chosen = choose_hpv_threshold(table)
    assert (chosen["value"], chosen["balanced_accuracy"]) == (0.5, 1.0)
    assert hpv_calls(table, chosen["value"]).tolist() == [False, False, True, True]
