"""Losses against golden values, MONAI, torchsurv and plain definitions; masks, ties, extremes, gradients, precision."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pandas as pd
import pytest
import torch
from lifelines import CoxPHFitter
from monai.data import MetaTensor
from monai.losses import DiceLoss, FocalLoss
from torchsurv.loss.cox import neg_partial_log_likelihood

from scripts.keys import (
    CLASS_LOGITS,
    EVENT,
    HPV,
    HPV_KNOWN,
    HPV_LOGIT,
    LOG_HAZARD,
    SEG,
    SEG_CLASSES_KNOWN,
    SEG_KNOWN,
    SEG_LOGITS,
    SURV_KNOWN,
    TIME,
)
from scripts.model.losses import CoxLoss, HPVLoss, MultitaskLoss, SegmentationLoss
from scripts.model.networks import MultitaskNet

GOLDEN = json.loads((Path(__file__).parent / "golden" / "losses.json").read_text(encoding="utf-8"))


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def golden(table):
    return [pytest.param(case, id=case["name"]) for case in GOLDEN[table]]


def cohort(n, dtype=torch.float32, ties=True):
    time = torch.randint(1, n // 2, (n,)).to(dtype) if ties else torch.randperm(n).to(dtype) + 1
    event = torch.rand(n) < 0.4
    event[0] = True
    return torch.randn(n, dtype=dtype), time, event


def gradient(loss, tensor):
    return torch.autograd.grad(loss, tensor)[0]


# --- Cox, eq. 6 --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", golden("cox"))
def test_cox_golden(case):
    h = torch.tensor(case["log_hazard"], dtype=torch.float64)
    loss = CoxLoss()(h, torch.tensor(case["time"]), torch.tensor(case["event"]))
    assert loss.item() == pytest.approx(case["breslow"], rel=1e-12, abs=1e-12)


def test_cox_agrees_with_a_lifelines_fit():
    """Lifelines knows Efron's treatment of ties alone, so that there are none here."""
    x, time, event = cohort(60, torch.float64, ties=False)
    fit = CoxPHFitter().fit(pd.DataFrame({"x": x, "time": time, "event": event}), "time", "event")
    beta = torch.tensor(fit.params_["x"], dtype=torch.float64, requires_grad=True)
    loss = CoxLoss()(beta * x, time, event)
    assert -loss.item() * event.sum().item() == pytest.approx(fit.log_likelihood_, rel=1e-10)
    assert gradient(loss, beta).item() == pytest.approx(0, abs=1e-6), "lifelines' coefficient is the optimum"


@pytest.mark.filterwarnings("ignore:Ties in `time`")
@pytest.mark.parametrize("tied_times", [True, False])
def test_cox_agrees_with_torchsurv_in_value_and_gradient(tied_times):
    h, time, event = cohort(50, ties=tied_times)
    h.requires_grad_()
    ours = CoxLoss()(h, time, event)
    theirs = neg_partial_log_likelihood(h, event, time, ties_method="breslow", reduction="sum") / event.sum()
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(gradient(ours, h), gradient(theirs, h), atol=1e-6, rtol=1e-4)


def test_cox_does_not_depend_on_the_order_or_on_a_shift():
    h, time, event = cohort(40, torch.float64)
    order = torch.randperm(40)
    loss = CoxLoss()(h, time, event)
    torch.testing.assert_close(CoxLoss()(h[order], time[order], event[order]), loss)
    torch.testing.assert_close(CoxLoss()(h + 1000, time, event), loss)
    assert not torch.isclose(CoxLoss()(h * 2, time, event), loss)


def test_cox_gradient_is_right_and_sums_to_zero():
    h, time, event = cohort(12, torch.float64)
    h.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: CoxLoss()(x, time, event), h)
    assert gradient(CoxLoss()(h, time, event), h).sum().abs() < 1e-12


EXTREMES = [
    pytest.param([100.0, -100.0, 100.0, -100.0], [1.0, 2.0, 3.0, 4.0], [1, 1, 1, 1], id="alternating"),
    pytest.param([-100.0, 100.0, 100.0], [1.0, 2.0, 3.0], [1, 0, 0], id="event_far_below"),
    pytest.param([100.0, 100.0, -100.0], [2.0, 2.0, 2.0], [1, 1, 1], id="tied_events"),
    pytest.param([100.0, 100.0, 100.0, 100.0], [2.0, 2.0, 2.0, 2.0], [1, 1, 1, 1], id="all_equal"),
    pytest.param([-100.0, -100.0, 100.0], [2.0, 2.0, 2.0], [1, 1, 0], id="tied_events_far_below"),
]


@pytest.mark.parametrize(("h", "time", "event"), EXTREMES)
def test_cox_is_exact_for_extreme_log_hazards(h, time, event):
    single = torch.tensor(h, requires_grad=True)
    double = torch.tensor(h, dtype=torch.float64, requires_grad=True)
    loss = CoxLoss()(single, torch.tensor(time), torch.tensor(event))
    reference = CoxLoss()(double, torch.tensor(time), torch.tensor(event))
    assert loss.isfinite() and loss >= 0
    assert loss.item() == pytest.approx(reference.item(), rel=1e-5)
    torch.testing.assert_close(gradient(loss, single).double(), gradient(reference, double), atol=1e-5, rtol=1e-5)


NOTHING_TO_LEARN = [
    pytest.param([0.3, -1.0], [1.0, 2.0], [0, 0], None, id="no_event"),
    pytest.param([0.3, -1.0], [1.0, 2.0], [1, 1], [False, False], id="nothing_known"),
    pytest.param([0.3, -1.0], [1.0, 2.0], [1, 0], [False, True], id="the_event_is_unknown"),
    pytest.param([0.3], [1.0], [0], None, id="one_censored_case"),
    pytest.param([0.3], [1.0], [1], None, id="one_event"),
    pytest.param([], [], [], None, id="empty_batch"),
    pytest.param([float("nan"), float("inf")], [1.0, 2.0], [1, 1], [False, False], id="unknown_and_not_finite"),
    pytest.param([float("nan"), 1.0], [float("nan"), 2.0], [0, 0], None, id="no_event_and_not_finite"),
]


@pytest.mark.parametrize(("h", "time", "event", "known"), NOTHING_TO_LEARN)
def test_cox_with_nothing_to_learn_is_an_exact_zero_with_a_graph(h, time, event, known):
    h = torch.tensor(h, requires_grad=True)
    known = None if known is None else torch.tensor(known)
    loss = CoxLoss()(h, torch.tensor(time), torch.tensor(event), known)
    assert loss.item() == 0
    assert torch.equal(gradient(loss, h), torch.zeros_like(h))


def test_cox_leaves_out_a_case_of_unknown_outcome():
    h, time, event = cohort(10)
    known = torch.rand(10) < 0.6
    known[0] = True
    h_bad, time_bad = h.clone(), time.clone()
    h_bad[~known], time_bad[~known] = torch.nan, torch.nan
    h_bad.requires_grad_()
    loss = CoxLoss()(h_bad, time_bad, event, known)
    torch.testing.assert_close(loss, CoxLoss()(h[known], time[known], event[known]))
    assert torch.equal(gradient(loss, h_bad)[~known], torch.zeros(int((~known).sum())))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_cox_in_half_precision_is_that_of_the_rounded_inputs(dtype):
    h, time, event = cohort(20)
    h = (h * 30).to(dtype).requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = CoxLoss()(h, time, event)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, CoxLoss()(h.float(), time, event))
    assert gradient(loss, h).isfinite().all()


def test_cox_takes_times_and_events_as_they_are_collated():
    h, time, event = cohort(8)
    expected = CoxLoss()(h, time, event)
    torch.testing.assert_close(CoxLoss()(h, time.double(), event.double(), torch.ones(8)), expected)
    torch.testing.assert_close(CoxLoss()(MetaTensor(h), MetaTensor(time), event.long()), expected)


COX_ERRORS = [
    pytest.param(lambda: CoxLoss()(torch.zeros(3, 1), torch.ones(3), torch.ones(3)), "log hazards have", id="column"),
    pytest.param(lambda: CoxLoss()(torch.zeros(3), torch.ones(3), torch.ones(2)), r"events \(2,\)", id="events"),
    pytest.param(
        lambda: CoxLoss()(torch.zeros(3), torch.ones(3), torch.ones(3), torch.ones(2)), "one flag a case", id="known"
    ),
]


@pytest.mark.parametrize(("call", "message"), COX_ERRORS)
def test_cox_refuses(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# --- segmentation, eq. 2-5 ---------------------------------------------------------------------------------


@pytest.mark.parametrize("case", golden("segmentation"))
def test_segmentation_golden(case):
    logits, mask = (torch.tensor(case[name], dtype=torch.float64) for name in ("logits", "mask"))
    assert SegmentationLoss()(logits, mask).item() == pytest.approx(case["expected"], rel=1e-10)


def test_segmentation_is_the_sum_of_monais_losses():
    logits, mask = torch.randn(3, 1, 8, 8, 8) * 3, (torch.rand(3, 1, 8, 8, 8) < 0.2).float()
    expected = DiceLoss(sigmoid=True, squared_pred=True)(logits, mask) + FocalLoss(alpha=0.25)(logits, mask)
    torch.testing.assert_close(SegmentationLoss()(logits, mask), expected)


def test_segmentation_gradient_is_right():
    logits = torch.randn(2, 1, 2, 2, 2, dtype=torch.float64, requires_grad=True)
    mask = (torch.rand(2, 1, 2, 2, 2) < 0.5).double()
    assert torch.autograd.gradcheck(lambda x: SegmentationLoss()(x, mask, torch.tensor([True, False])), logits)


def test_segmentation_of_a_missing_mask_does_not_depend_on_its_logits_and_of_an_empty_one_does():
    logits, mask = torch.randn(2, 1, 4, 4, 4), torch.zeros(2, 1, 4, 4, 4)
    missing, empty = torch.tensor([True, False]), torch.tensor([True, True])
    changed = logits.clone()
    changed[1] += 1
    loss = SegmentationLoss()
    assert torch.equal(loss(logits, mask, missing), loss(changed, mask, missing))
    assert loss(changed, mask, empty) > loss(logits, mask, empty)


@pytest.mark.parametrize("scale", [1e4, -1e4, 100.0, -100.0])
def test_segmentation_with_extreme_logits_is_finite_in_value_and_gradient(scale):
    logits = torch.full((1, 1, 4, 4, 4), scale, requires_grad=True)
    mask = (torch.rand(1, 1, 4, 4, 4) < 0.5).float()
    loss = SegmentationLoss()(logits, mask)
    share = mask.mean().item()
    focal = abs(scale) * (0.75 * (1 - share) if scale > 0 else 0.25 * share)
    dice = 1 - 2 * share / (1 + share) if scale > 0 else 1
    assert loss.item() == pytest.approx(dice + focal, rel=1e-5)
    assert gradient(loss, logits).isfinite().all()


def test_segmentation_of_an_empty_mask_found_empty_is_zero():
    logits = torch.full((1, 1, 4, 4, 4), -1e4, requires_grad=True)
    loss = SegmentationLoss()(logits, torch.zeros(1, 1, 4, 4, 4))
    assert loss.item() == 0
    assert gradient(loss, logits).isfinite().all()


@pytest.mark.parametrize("poison", [0.0, float("nan"), float("inf"), -float("inf")])
def test_segmentation_with_no_mask_known_is_an_exact_zero_with_a_graph(poison):
    logits = torch.full((2, 1, 4, 4, 4), poison, requires_grad=True)
    loss = SegmentationLoss()(logits, torch.zeros(2, 1, 4, 4, 4), torch.tensor([False, False]))
    assert loss.item() == 0
    assert torch.equal(gradient(loss, logits), torch.zeros_like(logits))


def test_segmentation_ignores_a_poisoned_sibling():
    logits = torch.randn(2, 1, 4, 4, 4)
    logits[1] = torch.nan
    logits.requires_grad_()
    mask = (torch.rand(2, 1, 4, 4, 4) < 0.5).float()
    mask[1] = torch.nan
    loss = SegmentationLoss()(logits, mask, torch.tensor([True, False]))
    assert torch.equal(loss, SegmentationLoss()(logits[:1], mask[:1]))
    slope = gradient(loss, logits)
    assert slope[0].isfinite().all() and slope[0].any() and not slope[1].any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_segmentation_in_half_precision_is_that_of_the_rounded_logits(dtype):
    logits = (torch.randn(2, 1, 16, 16, 16) * 5).to(dtype).requires_grad_()
    mask = torch.rand(2, 1, 16, 16, 16) < 0.3  # as bool
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = SegmentationLoss()(logits, MetaTensor(mask), torch.tensor([True, True]))
    assert type(loss) is torch.Tensor and loss.dtype == torch.float32
    assert torch.equal(loss, SegmentationLoss()(logits.float(), mask.float()))
    assert gradient(loss, logits).isfinite().all()


def test_segmentation_refuses_a_mask_of_another_shape():
    with pytest.raises(ValueError, match=r"tumour logits have shape .* but mask \(1, 1, 4, 4, 2\)"):
        SegmentationLoss()(torch.zeros(1, 1, 4, 4, 4), torch.zeros(1, 1, 4, 4, 2))


# --- HPV, eq. 4, 5 -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", golden("hpv"))
def test_hpv_golden(case):
    logit = torch.tensor(case["logit"], dtype=torch.float64)
    assert HPVLoss()(logit, torch.tensor(case["hpv"])).item() == pytest.approx(case["expected"], rel=1e-12)


@pytest.mark.parametrize("logit", [1e4, -1e4])
@pytest.mark.parametrize("hpv", [0.0, 1.0])
def test_hpv_with_extreme_logits(logit, hpv):
    x = torch.tensor([logit], requires_grad=True)
    loss = HPVLoss()(x, torch.tensor([hpv]))
    wrong = (logit > 0) != (hpv == 1)
    assert loss.item() == pytest.approx(1e4 * (0.25 if hpv else 0.75) if wrong else 0)
    assert gradient(loss, x).item() == pytest.approx((0.75 if logit > 0 else -0.25) if wrong else 0)


def test_hpv_leaves_out_unknown_cases():
    logit = torch.tensor([0.4, torch.nan, -1.0], requires_grad=True)
    known = torch.tensor([True, False, True])
    loss = HPVLoss()(logit, torch.tensor([1.0, torch.nan, 0.0]), known)
    assert torch.equal(loss, HPVLoss()(torch.tensor([0.4, -1.0]), torch.tensor([1.0, 0.0])))
    assert gradient(loss, logit)[1] == 0


def test_hpv_with_nothing_known_is_an_exact_zero_with_a_graph():
    logit = torch.tensor([torch.nan, torch.inf], requires_grad=True)
    loss = HPVLoss()(logit, torch.zeros(2), torch.zeros(2, dtype=torch.bool))
    assert loss.item() == 0
    assert gradient(loss, logit).tolist() == [0, 0]


def test_hpv_gradient_is_right():
    logit = torch.randn(5, dtype=torch.float64, requires_grad=True)
    hpv = torch.tensor([0.0, 1.0, 1.0, 0.0, 1.0])
    assert torch.autograd.gradcheck(lambda x: HPVLoss()(x, hpv), logit)


def test_hpv_refuses_labels_of_another_shape():
    with pytest.raises(ValueError, match=r"HPV logits have shape \(3,\) but HPV labels \(3, 1\)"):
        HPVLoss()(torch.zeros(3), torch.zeros(3, 1))


# --- classes of tumour ---------------------------------------------------------------------------------------


def case_loss(probability, truth):
    """Eq. 2 to 5 of one case and one class as they are written: probability and truth (V,)."""
    dice = (2 * (probability * truth).sum() + 1e-5) / ((probability**2).sum() + (truth**2).sum() + 1e-5)
    right = torch.where(truth > 0, probability, 1 - probability)
    focal = -torch.where(truth > 0, 0.25, 0.75) * (1 - right) ** 2 * right.log()
    return 1 - dice + focal.mean()


def classes_batch(n=4, classes=2):
    """Logits of classes and of their union, and masks with values up to the number of classes, in float64."""
    logits = torch.randn(n, classes, 4, 4, 4, dtype=torch.float64, requires_grad=True)
    return logits, logits.logsumexp(dim=1, keepdim=True), torch.randint(0, classes + 1, (n, 1, 4, 4, 4)).double()


@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize("known", [(1, 1, 1, 1), (1, 0, 1, 1), (0, 1, 0, 1)])
@pytest.mark.parametrize("apart", [(1, 1, 1, 1), (0, 0, 0, 0), (1, 0, 0, 1), (1, 1, 0, 0)])
def test_classes_are_a_mean_over_cases_of_the_classes_or_of_the_union(classes, known, apart):
    logits, union, mask = classes_batch(classes=classes)
    flags = [torch.tensor(flag).bool() for flag in (known, apart)]
    loss = SegmentationLoss()(union, mask, flags[0], logits, flags[1])
    background = torch.zeros_like(logits[:, :1])
    probabilities = torch.softmax(torch.cat([background, logits], dim=1), dim=1).flatten(2)
    expected = []
    for k in torch.nonzero(flags[0]).flatten():
        truth = mask[k].flatten()
        if apart[k]:
            each = [case_loss(probabilities[k, c], (truth == c).double()) for c in range(1, classes + 1)]
            expected.append(torch.stack(each).mean())
        else:
            expected.append(case_loss(1 - probabilities[k, 0], (truth > 0).double()))
    expected = torch.stack(expected).mean()
    torch.testing.assert_close(loss, expected)
    slope = gradient(loss, logits)
    torch.testing.assert_close(slope, gradient(expected, logits))
    assert not slope[~flags[0]].any()


def test_a_merged_mask_says_nothing_of_the_classes():
    """A gradient step keeps the ratio of the classes' probabilities, and no value but 0 of the mask matters."""
    logits, union, mask = classes_batch()
    merged = torch.zeros(4, dtype=torch.bool)
    loss = SegmentationLoss()(union, mask, None, logits, merged)
    torch.testing.assert_close(loss, SegmentationLoss()(union, (mask > 0).double()))
    slope = gradient(loss, logits)
    torch.testing.assert_close(slope, slope.sum(dim=1, keepdim=True) * torch.softmax(logits, dim=1))


def test_classes_of_unknown_masks_are_exactly_nothing():
    logits, _, mask = classes_batch()
    logits = logits.detach()
    logits[1] = torch.nan
    logits.requires_grad_()
    union = logits.logsumexp(dim=1, keepdim=True)
    known, apart = torch.tensor([True, False, True, False]), torch.tensor([True, True, False, False])
    loss = SegmentationLoss()(union, mask, known, logits, apart)
    alone = SegmentationLoss()(union[known], mask[known], None, logits[known], apart[known])
    torch.testing.assert_close(loss, alone)
    nothing = SegmentationLoss()(union, mask, ~torch.ones(4).bool(), logits, apart)
    assert nothing.item() == 0
    assert not gradient(nothing, logits)[[0, 2, 3]].any()


def test_classes_in_half_precision_are_near():
    logits, union, mask = classes_batch()
    full = SegmentationLoss()(union, mask, None, logits)
    half = SegmentationLoss()(union.bfloat16(), mask, None, logits.bfloat16())
    assert half.dtype == torch.float32
    assert half.item() == pytest.approx(full.item(), rel=0.01)


def test_classes_refuse_masks_of_another_shape():
    logits, union, mask = classes_batch()
    with pytest.raises(ValueError, match=r"tumour logits have shape .* but mask"):
        SegmentationLoss()(union, mask[..., :3], None, logits)


@pytest.mark.parametrize("missing", [CLASS_LOGITS, SEG_CLASSES_KNOWN])
def test_multitask_uses_the_classes_where_the_network_has_some(missing):
    logits, union, mask = classes_batch()
    outputs = {SEG_LOGITS: union, CLASS_LOGITS: logits}
    targets = {SEG: mask, SEG_KNOWN: torch.ones(4).bool(), SEG_CLASSES_KNOWN: torch.tensor([True, True, False, False])}
    loss = MultitaskLoss(("seg",))
    expected = SegmentationLoss()(union, mask, targets[SEG_KNOWN], logits, targets[SEG_CLASSES_KNOWN])
    assert torch.equal(loss(outputs, targets), expected)
    if missing == SEG_CLASSES_KNOWN:
        del targets[missing]
        with pytest.raises(KeyError, match=missing):
            loss(outputs, targets)
    else:
        del outputs[missing]
        assert torch.equal(loss(outputs, targets), SegmentationLoss()(union, (mask > 0).double()))


# --- all together, eq. 1 -----------------------------------------------------------------------------------


def batch(n=4):
    outputs = {SEG_LOGITS: torch.randn(n, 1, 4, 4, 4), HPV_LOGIT: torch.randn(n), LOG_HAZARD: torch.randn(n)}
    targets = {
        SEG: (torch.rand(n, 1, 4, 4, 4) < 0.4).float(),
        HPV: (torch.arange(n) % 2).double(),
        TIME: torch.arange(n).double() + 1,
        EVENT: torch.arange(n) % 2 == 0,
    } | {flag: torch.ones(n, dtype=torch.bool) for flag in (SEG_KNOWN, HPV_KNOWN, SURV_KNOWN)}
    for value in outputs.values():
        value.requires_grad_()
    return outputs, targets


def test_multitask_is_the_sum_of_its_parts():
    outputs, targets = batch()
    weights = [torch.nn.Parameter(torch.full((2, 3), 2.0)), torch.nn.Parameter(torch.ones(1, 4))]
    loss = MultitaskLoss(survival_weights=weights)
    value = loss(outputs, targets)
    expected = {
        "seg": SegmentationLoss()(outputs[SEG_LOGITS], targets[SEG]),
        "hpv": HPVLoss()(outputs[HPV_LOGIT], targets[HPV]),
        "surv": CoxLoss()(outputs[LOG_HAZARD], targets[TIME], targets[EVENT]),
        "l2": torch.tensor(6 * 4.0 + 4),
    }
    torch.testing.assert_close(loss.parts, {k: v.detach() for k, v in expected.items()})
    torch.testing.assert_close(value, expected["seg"] + expected["hpv"] + expected["surv"] + 0.1 * expected["l2"])
    assert not any(part.requires_grad for part in loss.parts.values())
    torch.testing.assert_close(gradient(value, weights[0]), torch.full((2, 3), 0.4))


def test_multitask_does_not_own_the_networks_weights():
    loss = MultitaskLoss(survival_weights=[torch.nn.Parameter(torch.ones(2, 2))])
    assert not list(loss.parameters())
    assert not loss.state_dict()


def test_multitask_weighs_tasks():
    outputs, targets = batch()
    loss = MultitaskLoss(task_weights={"seg": 2.0, "surv": 0.0})
    value = loss(outputs, targets)
    torch.testing.assert_close(value.detach(), 2 * loss.parts["seg"] + loss.parts["hpv"])


SUBSETS = [
    pytest.param(tasks, id="+".join(tasks))
    for tasks in (("surv",), ("seg",), ("hpv",), ("seg", "surv"), ("surv", "hpv"), ("seg", "hpv", "surv"))
]


@pytest.mark.parametrize("tasks", SUBSETS)
def test_multitask_asks_only_for_what_its_tasks_need(tasks):
    outputs, targets = batch()
    needed = {"seg": (SEG_LOGITS, SEG, SEG_KNOWN), "hpv": (HPV_LOGIT, HPV, HPV_KNOWN)}
    needed["surv"] = (LOG_HAZARD, TIME, EVENT, SURV_KNOWN)
    wanted = {key for task in tasks for key in needed[task]}
    loss = MultitaskLoss(tasks)
    value = loss({k: v for k, v in outputs.items() if k in wanted}, {k: v for k, v in targets.items() if k in wanted})
    assert set(loss.parts) == set(tasks) and value > 0


@pytest.mark.parametrize("poison", [0.0, float("nan"), float("inf")])
def test_multitask_with_nothing_known_is_an_exact_zero_with_a_graph(poison):
    outputs, targets = batch()
    outputs = {name: torch.full_like(value, poison).requires_grad_() for name, value in outputs.items()}
    targets |= {flag: torch.zeros(4, dtype=torch.bool) for flag in (SEG_KNOWN, HPV_KNOWN, SURV_KNOWN)}
    value = MultitaskLoss()(outputs, targets)
    assert value.item() == 0
    for slope in torch.autograd.grad(value, list(outputs.values())):
        assert not slope.any()


def test_multitask_each_flag_silences_its_own_task_only():
    outputs, targets = batch()
    full = MultitaskLoss().components(outputs, targets)
    for task, flag in (("seg", SEG_KNOWN), ("hpv", HPV_KNOWN), ("surv", SURV_KNOWN)):
        parts = MultitaskLoss().components(outputs, targets | {flag: torch.zeros(4, dtype=torch.bool)})
        assert parts[task] == 0
        assert all(torch.equal(parts[other], full[other]) for other in full if other != task)


# --- learned task weights ----------------------------------------------------------------------------------


def descend(loss, outputs, targets, steps=600):
    """Learn the log variances alone, the outputs being fixed."""
    optimizer = torch.optim.Adam(loss.parameters(), lr=0.05)
    for _ in range(steps):
        optimizer.zero_grad()
        loss(outputs, targets).backward()
        optimizer.step()


def test_learned_weights_start_at_one_and_cost_nothing_there():
    outputs, targets = batch()
    learned = MultitaskLoss(task_weights="uncertainty")
    torch.testing.assert_close(learned(outputs, targets), MultitaskLoss()(outputs, targets))
    assert {name: value.item() for name, value in learned.parts.items() if name.startswith("weight")} == {
        "weight_seg": 1.0,
        "weight_hpv": 1.0,
        "weight_surv": 1.0,
    }


def test_learned_weights_gradient_is_that_of_the_formula():
    outputs, targets = batch()
    loss = MultitaskLoss(task_weights="uncertainty")
    with torch.no_grad():
        for task, start in {"seg": -0.7, "hpv": 0.3, "surv": 1.1}.items():
            loss.log_variances[task].fill_(start)
    loss(outputs, targets).backward()
    equal = MultitaskLoss()
    terms = equal.components(outputs, targets)
    for task, log_variance in loss.log_variances.items():
        expected = 0.5 - torch.exp(-log_variance) * terms[task]
        torch.testing.assert_close(log_variance.grad, expected.detach())
    (slope,) = torch.autograd.grad(terms["hpv"], outputs[HPV_LOGIT])
    torch.testing.assert_close(outputs[HPV_LOGIT].grad, slope * math.exp(-0.3))


def test_learned_weights_reach_the_closed_form_optimum():
    outputs, targets = batch()
    loss = MultitaskLoss(task_weights="uncertainty")
    descend(loss, outputs, targets)
    for task, log_variance in loss.log_variances.items():
        assert log_variance.item() == pytest.approx(math.log(2 * loss.parts[task].item()), abs=1e-3)
        assert loss.parts[f"weight_{task}"].item() == pytest.approx(1 / (2 * loss.parts[task].item()), rel=1e-2)


SILENT = [
    pytest.param("seg", {SEG_KNOWN: torch.zeros(4, dtype=torch.bool)}, id="no_mask"),
    pytest.param("hpv", {HPV_KNOWN: torch.zeros(4, dtype=torch.bool)}, id="no_status"),
    pytest.param("surv", {SURV_KNOWN: torch.zeros(4, dtype=torch.bool)}, id="no_outcome"),
    pytest.param("surv", {EVENT: torch.zeros(4, dtype=torch.bool)}, id="no_event"),
]


@pytest.mark.parametrize(("silent", "changed"), SILENT)
def test_learned_weight_of_a_silent_task_is_left_alone(silent, changed):
    outputs, targets = batch()
    loss = MultitaskLoss(task_weights="uncertainty")
    with torch.no_grad():
        loss.log_variances[silent].fill_(2.0)
    loss(outputs, targets | changed).backward()
    slopes = {task: value.grad.item() for task, value in loss.log_variances.items()}
    assert slopes.pop(silent) == 0
    assert all(slopes.values())


def test_learned_weights_count_as_one_in_evaluation():
    outputs, targets = batch()
    loss = MultitaskLoss(task_weights="uncertainty")
    descend(loss, outputs, targets, steps=20)
    assert loss(outputs, targets) != MultitaskLoss()(outputs, targets)
    torch.testing.assert_close(loss.eval()(outputs, targets), MultitaskLoss()(outputs, targets))


def test_learned_weights_are_those_of_the_tasks_and_are_state():
    loss = MultitaskLoss(("seg", "surv"), task_weights="uncertainty")
    assert set(loss.log_variances) == {"seg", "surv"}
    with torch.no_grad():
        loss.log_variances["surv"].fill_(-1.5)
    again = MultitaskLoss(("seg", "surv"), task_weights="uncertainty")
    again.load_state_dict(loss.state_dict())
    assert again.log_variances["surv"].item() == -1.5


def test_optimiser_gets_the_learned_task_weights_at_their_own_rate_and_nothing_more_without():
    network = torch.nn.Linear(2, 1)
    kept = [torch.nn.Parameter(torch.ones(2, 2))]
    (alone,) = MultitaskLoss(survival_weights=kept).parameter_groups(network, 0.02)
    assert alone == {"params": list(network.parameters())}
    loss = MultitaskLoss(survival_weights=kept, task_weights="uncertainty")
    groups = torch.optim.Adam(loss.parameter_groups(network, 0.02), lr=1e-4).param_groups
    assert [group["lr"] for group in groups] == [1e-4, 0.02]
    assert [id(value) for value in groups[1]["params"]] == [id(value) for value in loss.log_variances.values()]


@pytest.mark.parametrize("wrapped", [False, True], ids=["network", "as_ddp_wraps_it"])
def test_optimiser_gets_the_clinical_term_at_its_own_rate(wrapped):
    network = MultitaskNet(hpv_inputs=["image", "clinical"])
    given = torch.nn.ModuleDict({"module": network}) if wrapped else network
    groups = torch.optim.Adam(MultitaskLoss().parameter_groups(given, 0.02), lr=1e-4).param_groups
    assert [group["lr"] for group in groups] == [1e-4, 0.01]
    assert [id(value) for value in groups[1]["params"]] == [id(network.hpv_clinical.weight)]
    assert sum(len(group["params"]) for group in groups) == len(list(network.parameters()))


def test_multitask_passes_the_focal_parameters_of_hpv_on():
    outputs, targets = batch()
    terms = MultitaskLoss(hpv_alpha=0.6, hpv_gamma=1.0).components(outputs, targets)
    torch.testing.assert_close(terms["hpv"], HPVLoss(alpha=0.6, gamma=1.0)(outputs[HPV_LOGIT], targets[HPV]))
    assert terms["hpv"] != MultitaskLoss().components(outputs, targets)["hpv"]


MULTITASK_ERRORS = [
    pytest.param({"tasks": ("seg", "os")}, "tasks are some of", id="unknown_task"),
    pytest.param({"tasks": ()}, "tasks are some of", id="no_task"),
    pytest.param({"tasks": ("seg",), "task_weights": {"os": 1.0}}, "task_weights names", id="weight_of_unknown_task"),
    pytest.param(
        {"task_weights": "equal"}, "task_weights is 'equal'; it must be 'uncertainty'", id="unknown_weighting"
    ),
    pytest.param({"task_weights": [1.0, 2.0]}, r"task_weights is \[1.0, 2.0\]; it must be", id="list_of_weights"),
]


@pytest.mark.parametrize(("arguments", "message"), MULTITASK_ERRORS)
def test_multitask_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        MultitaskLoss(**arguments)


def test_multitask_names_a_missing_label():
    outputs, targets = batch()
    del targets[HPV_KNOWN]
    with pytest.raises(KeyError, match=HPV_KNOWN):
        MultitaskLoss()(outputs, targets)
