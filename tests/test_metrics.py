"""Metrics against golden values, lifelines, torchsurv and MONAI; over epochs and ranks; with unknown cases."""

from __future__ import annotations

import json
import math
from pathlib import Path

import lifelines.utils
import metric_ranks
import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from monai.metrics import DiceMetric
from torch import multiprocessing
from torchsurv.metrics.cindex import ConcordanceIndex

from scripts.training import concordance
from scripts.training.concordance import concordance_index
from scripts.training.metrics import (
    BalancedAccuracyMetric,
    ConcordanceIndexMetric,
    MaskedDiceMetric,
    balanced_accuracy,
    dice_scores,
)

GOLDEN = json.loads((Path(__file__).parent / "golden" / "metrics.json").read_text(encoding="utf-8"))
NAN = float("nan")


def golden(table):
    return [pytest.param(case, id=case["name"]) for case in GOLDEN[table]]


def cohort(n, seed=0):
    rng = np.random.default_rng(seed)
    return rng.integers(1, 30, n).astype(float), rng.random(n) < 0.3, rng.normal(size=n).round(1)


# --- C-index, eq. 7 ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", golden("concordance"))
def test_concordance_golden(case):
    assert concordance_index(case["time"], case["event"], case["risk"]) == pytest.approx(case["expected"], abs=1e-12)


@pytest.mark.parametrize("seed", range(5))
def test_concordance_agrees_with_lifelines(seed):
    time, event, risk = cohort(150, seed)
    expected = lifelines.utils.concordance_index(time, -risk, event)
    assert concordance_index(time, event, risk) == pytest.approx(expected, abs=1e-12)


def test_concordance_agrees_with_torchsurv():
    time, event, risk = cohort(100)
    time = np.arange(100.0)  # torchsurv treats ties of an event and a censoring differently
    tensors = (torch.tensor(risk), torch.tensor(event), torch.tensor(time))
    assert concordance_index(time, event, risk) == pytest.approx(float(ConcordanceIndex()(*tensors)), abs=1e-6)


def test_concordance_does_not_depend_on_the_size_of_its_steps(monkeypatch):
    time, event, risk = cohort(90)
    whole = concordance_index(time, event, risk)
    monkeypatch.setattr(concordance, "PAIRS_AT_ONCE", 200)
    assert concordance_index(time, event, risk) == whole


@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=lambda d: str(d).removeprefix("torch.")
)
def test_concordance_takes_tensors(dtype):
    risk = torch.tensor([3.0, 2.0, 1.0, 2.0], dtype=dtype, requires_grad=True)
    event = torch.tensor([True, False, True, True])
    assert concordance_index(torch.tensor([1, 2, 3, 4]), event, risk) == pytest.approx(3 / 4)


NOT_COMPARABLE = [
    pytest.param([], [], id="nobody"),
    pytest.param([3.0], [1], id="one_case"),
    pytest.param([1.0, 2.0], [0, 0], id="no_event"),
    pytest.param([2.0, 2.0], [1, 1], id="two_events_at_once"),
    pytest.param([1.0, 2.0], [0, 1], id="event_last"),
]


@pytest.mark.parametrize(("time", "event"), NOT_COMPARABLE)
def test_concordance_without_a_comparable_pair_is_nan(time, event):
    assert math.isnan(concordance_index(time, event, [0.5] * len(time)))


@pytest.mark.parametrize("other", [pytest.param(9.0, id="followed_longer"), pytest.param(5.0, id="censored_that_day")])
def test_concordance_of_a_relapse_and_a_censoring(other):
    assert concordance_index([5.0, other], [1, 0], [2.0, 1.0]) == 1.0


CONCORDANCE_ERRORS = [
    pytest.param(([1, 2], [1, 0], [0.1, NAN]), "1 of 2 values of risk are NaN", id="risk"),
    pytest.param(([1, NAN], [1, 0], [0.1, 0.2]), "values of time are NaN", id="time"),
    pytest.param(([1, 2], [1, 0], [0.1]), "2, 2 and 1 values", id="lengths"),
]


@pytest.mark.parametrize(("arguments", "message"), CONCORDANCE_ERRORS)
def test_concordance_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        concordance_index(*arguments)


def test_concordance_metric_over_an_epoch_is_that_of_the_known_cases():
    time, event, risk = cohort(40)
    known = np.random.default_rng(1).random(40) < 0.7
    y = torch.tensor(np.stack([time, event], axis=1))
    y[~torch.tensor(known)] = NAN
    metric = ConcordanceIndexMetric()
    for part in torch.arange(40).split(7):
        metric(y_pred=torch.tensor(risk)[part, None].float(), y=y[part])
    assert metric.aggregate().item() == pytest.approx(concordance_index(time[known], event[known], risk[known]))


def test_concordance_metric_takes_decollated_metatensors_and_half_a_label():
    metric = ConcordanceIndexMetric()
    y = [torch.tensor([1.0, 1.0]), torch.tensor([2.0, 0.0]), torch.tensor([0.5, NAN])]
    metric(y_pred=[MetaTensor([0.9]), MetaTensor([0.1]), MetaTensor([-5.0])], y=y)
    assert metric.aggregate() == 1


def test_concordance_metric_reports_a_network_that_diverged():
    metric = ConcordanceIndexMetric()
    metric(y_pred=torch.tensor([[NAN], [0.0]]), y=torch.tensor([[1.0, 1.0], [2.0, 0.0]]))
    with pytest.raises(ValueError, match="values of risk are NaN"):
        metric.aggregate()


# --- Dice, eq. 8 -------------------------------------------------------------------------------------------


def test_dice_agrees_with_monai_and_with_the_formula():
    torch.manual_seed(0)
    prediction, mask = ((torch.rand(5, 1, 6, 6, 6) < share).float() for share in (0.3, 0.4))
    scores = dice_scores(prediction, mask)
    formula = 2 * (prediction * mask).sum((1, 2, 3, 4)) / (prediction + mask).sum((1, 2, 3, 4))
    torch.testing.assert_close(scores[:, 0], formula)
    metric, theirs = MaskedDiceMetric(), DiceMetric()
    metric(y_pred=prediction, y=mask)
    theirs(y_pred=prediction, y=mask)
    assert metric.aggregate().item() == pytest.approx(theirs.aggregate().item())


EMPTY, FULL = torch.zeros(1, 1, 4, 4, 4), torch.ones(1, 1, 4, 4, 4)
DICE_CASES = [
    pytest.param(EMPTY, EMPTY, 1.0, id="both_empty"),
    pytest.param(FULL, EMPTY, 0.0, id="empty_mask_but_something_found"),
    pytest.param(EMPTY, FULL, 0.0, id="nothing_found"),
    pytest.param(FULL, FULL, 1.0, id="all_found"),
    pytest.param(FULL, FULL * NAN, NAN, id="no_mask"),
]


@pytest.mark.parametrize(("prediction", "mask", "expected"), DICE_CASES)
def test_dice_metric_of_one_case(prediction, mask, expected):
    metric = MaskedDiceMetric()
    metric(y_pred=prediction, y=mask)
    assert metric.aggregate().item() == pytest.approx(expected, nan_ok=True)


def test_dice_metric_keeps_each_case_and_averages_the_known():
    metric = MaskedDiceMetric()
    partly_nan = FULL.clone()
    partly_nan[0, 0, 0, 0, 0] = NAN
    metric(y_pred=torch.cat([FULL, FULL]).bool(), y=torch.cat([FULL, partly_nan]))
    metric(y_pred=[EMPTY[0], MetaTensor(EMPTY[0])], y=[FULL[0], MetaTensor(EMPTY[0])])
    assert metric.get_buffer().flatten().tolist() == pytest.approx([1.0, NAN, 0.0, 1.0], nan_ok=True)
    assert metric.aggregate().item() == pytest.approx(2 / 3)


DICE_ERRORS = [
    pytest.param(FULL * 0.7, FULL, "values other than 0 and 1", id="probability"),
    pytest.param(FULL * NAN, FULL, "values other than 0 and 1", id="nan_prediction"),
    pytest.param(FULL, FULL[..., :2], "y_pred has shape", id="shape"),
    pytest.param(FULL, None, "but y None", id="no_label"),
]


@pytest.mark.parametrize(("prediction", "mask", "message"), DICE_ERRORS)
def test_dice_metric_refuses(prediction, mask, message):
    with pytest.raises(ValueError, match=message):
        MaskedDiceMetric()(y_pred=prediction, y=mask)


# --- balanced accuracy, eq. 9 ------------------------------------------------------------------------------


@pytest.mark.parametrize("case", golden("balanced_accuracy"))
def test_balanced_accuracy_golden(case):
    probability, label = torch.tensor(case["probability"]), torch.tensor(case["label"])
    assert balanced_accuracy(probability, label) == pytest.approx(case["expected"], abs=1e-6)
    metric = BalancedAccuracyMetric()
    for p, y in zip(probability.split(3), label.split(3), strict=True):
        metric(y_pred=p[:, None], y=y[:, None])
    assert metric.aggregate().item() == pytest.approx(case["expected"], abs=1e-6)


def test_balanced_accuracy_counts_an_unknown_case_nowhere():
    metric = BalancedAccuracyMetric()
    metric(y_pred=torch.tensor([[0.9], [0.8], [0.1]]), y=torch.tensor([[1.0], [0.0], [NAN]]))
    assert metric.aggregate() == 0.5, "counted as a true negative, the unknown case would make it 0.75"


@pytest.mark.parametrize("label", [0.0, 1.0])
def test_balanced_accuracy_of_one_class_is_nan(label):
    assert math.isnan(balanced_accuracy(torch.tensor([0.9, 0.1]), torch.full((2,), label)))


def test_balanced_accuracy_threshold_belongs_to_the_negative():
    probability, label = torch.tensor([0.31, 0.3]), torch.tensor([1.0, 0.0])
    assert balanced_accuracy(probability, label, threshold=0.3) == 1
    assert balanced_accuracy(probability, label) == 0.5


BALANCED_ACCURACY_ERRORS = [
    pytest.param(torch.tensor([NAN]), torch.ones(1), "1 of 1 probabilities are NaN", id="nan"),
    pytest.param(torch.ones(2), torch.ones(3), "probability has shape", id="shape"),
]


@pytest.mark.parametrize(("probability", "label", "message"), BALANCED_ACCURACY_ERRORS)
def test_balanced_accuracy_refuses(probability, label, message):
    with pytest.raises(ValueError, match=message):
        balanced_accuracy(probability, label)


# --- what all metrics share --------------------------------------------------------------------------------

ALL = {  # metric, a batch whose value is 1, how many label columns
    "concordance": (ConcordanceIndexMetric, torch.tensor([[0.9], [0.1]]), torch.tensor([[1.0, 1.0], [2.0, 0.0]])),
    "dice": (MaskedDiceMetric, torch.cat([FULL, EMPTY]), torch.cat([FULL, EMPTY])),
    "balanced_accuracy": (BalancedAccuracyMetric, torch.tensor([[0.9], [0.1]]), torch.tensor([[1.0], [0.0]])),
}
EACH = [pytest.param(*values, id=name) for name, values in ALL.items()]


@pytest.mark.parametrize(("metric", "y_pred", "y"), EACH)
def test_nothing_collected_or_known_is_nan_and_reset_forgets(metric, y_pred, y):
    metric = metric()
    assert metric.aggregate().isnan(), "nothing collected"
    metric.reset()
    metric(y_pred=y_pred, y=torch.full_like(y, NAN))
    assert metric.aggregate().isnan(), "nothing known"
    metric(y_pred=y_pred, y=y)
    assert metric.aggregate() == 1
    metric.reset()
    assert metric.aggregate().isnan(), "reset"


@pytest.mark.parametrize("metric", [ConcordanceIndexMetric, BalancedAccuracyMetric])
def test_rows_of_the_wrong_shape_are_refused(metric):
    with pytest.raises(ValueError, match="are needed"):
        metric()(y_pred=torch.zeros(4), y=torch.zeros(4))


def test_two_ranks_compute_what_one_does(tmp_path):
    multiprocessing.spawn(metric_ranks.run_rank, args=(2, str(tmp_path)), nprocs=2)
    for sharing in metric_ranks.SHARINGS:
        alone = metric_ranks.epoch_values(0, 1, sharing)
        assert all(0 < value < 1 for value in alone.values())
        for rank in range(2):
            values = json.loads((tmp_path / f"{rank}.json").read_text(encoding="utf-8"))
            assert values[sharing] == pytest.approx(alone), (sharing, rank)
