"""Training by several processes: the loss and its gradients of the one large batch, one network, every case once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from torch import nn

from scripts import keys
from scripts.model import ranks
from scripts.model.losses import CoxLoss, MultitaskLoss, SegmentationLoss
from scripts.model.networks import MultitaskNet
from scripts.training.engine import local_rank, over_ranks
from scripts.training.handlers import RankStatistics
from scripts.training.metrics import ConcordanceIndexMetric
from scripts.training.sampling import CaseDataset, EventBatchSampler, share_of_rank

CASES, EDGE = 6, 16
SIZES = (3, 2)  # processes; two or three cases each
FLAGS = (keys.SEG_KNOWN, keys.HPV_KNOWN, keys.SURV_KNOWN)
SCENARIOS: dict[str, dict[str, Any]] = {
    "all_known": {},
    "labels_missing_here_and_there": {keys.SEG_KNOWN: (1, 0, 1, 1, 0, 1), keys.HPV_KNOWN: (0, 1, 1, 1, 1, 0)},
    "a_rank_without_an_event": {keys.EVENT: (0, 0, 0, 1, 0, 1)},
    "a_rank_without_labels": {flag: (0, 0, 0, 1, 1, 1) for flag in FLAGS},
    "no_event_at_all": {keys.EVENT: (0,) * CASES},
    "learned_weights": {"task_weights": "uncertainty"},
}


def cases(scenario: str) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """Images, clinical values and targets of six cases; labels that are not known are NaN."""
    generator = torch.Generator().manual_seed(3)
    image = torch.rand(CASES, 2, EDGE, EDGE, EDGE, generator=generator, dtype=torch.float64)
    clinical = torch.rand(CASES, 7, generator=generator, dtype=torch.float64)
    targets = {
        keys.SEG: (image[:, 1:] > 0.8).double(),
        keys.HPV: torch.tensor([0, 1, 1, 0, 1, 0]).double(),
        keys.TIME: torch.tensor([5, 3, 8, 3, 1, 9]).double(),
        keys.EVENT: torch.tensor([1, 0, 1, 1, 0, 1]).bool(),
    } | {flag: torch.ones(CASES, dtype=torch.bool) for flag in FLAGS}
    targets |= {key: torch.tensor(value).bool() for key, value in SCENARIOS[scenario].items() if key in targets}
    for label, flag in ((keys.SEG, keys.SEG_KNOWN), (keys.HPV, keys.HPV_KNOWN), (keys.TIME, keys.SURV_KNOWN)):
        targets[label][~targets[flag]] = torch.nan
    return image, clinical, targets


def network() -> MultitaskNet:
    """A network whose gradients flow everywhere, without dropout; its batch norms are frozen."""
    torch.manual_seed(1)
    net = MultitaskNet(mask_gradient="flow", hpv_inputs=["image", "clinical"], dropout=0.0, dense_dropout=0.0).double()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm3d):
            module.eval()
    return net


def step(scenario: str, own: slice, wrap: bool) -> dict[str, Any]:
    """Value, parts, gradients and learned weights after a step of the cases ``own``."""
    image, clinical, targets = cases(scenario)
    net = network()
    weights = SCENARIOS[scenario].get("task_weights")
    loss = MultitaskLoss(survival_weights=net.survival_weights(), task_weights=weights)
    model = over_ranks(net, torch.device("cpu")) if wrap else net
    optimizer = torch.optim.Adam(loss.parameter_groups(net, 0.01), lr=1e-3)
    outputs = model(image[own], clinical[own])
    value = loss(outputs, {key: label[own] for key, label in targets.items()})
    value.backward()
    gradients = torch.cat([torch.zeros(p.numel()) if p.grad is None else p.grad.flatten() for p in net.parameters()])
    learned = {name: (p.grad.clone(), p.detach()) for name, p in loss.named_parameters()}
    optimizer.step()
    return {"value": value.detach(), "parts": loss.parts, "gradients": gradients, "learned": learned}


def classes(own: slice) -> dict[str, Any]:
    """Loss and gradient of logits of two classes, which some masks tell apart, and one is not known."""
    generator = torch.Generator().manual_seed(5)
    logits, union = (torch.randn(CASES, n, 4, 4, 4, generator=generator, dtype=torch.float64) for n in (2, 1))
    mask = torch.randint(0, 3, (CASES, 1, 4, 4, 4), generator=generator).double()
    known, apart = torch.tensor([1, 1, 1, 0, 1, 1]).bool(), torch.tensor([1, 1, 1, 1, 0, 0]).bool()
    inputs = [tensor[own].requires_grad_() for tensor in (union, logits)]
    loss = SegmentationLoss()(inputs[0], mask[own], known[own], inputs[1], apart[own])
    return {"value": loss.detach(), "gradients": torch.autograd.grad(loss, inputs)}


def statistics(rank: int) -> dict[str, Any]:
    """Batch norms that each rank trained on other data, before and after they are averaged."""
    torch.manual_seed(rank)
    net = nn.Sequential(nn.BatchNorm3d(2), nn.Flatten(), nn.BatchNorm1d(16))
    net(torch.randn(4, 2, 2, 2, 2) + rank)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    RankStatistics(net).average()
    return {"before": before, "after": net.state_dict()}


def judged(patients: int) -> dict[str, Any]:
    """The C-index of cases that the ranks share, and this rank's share."""
    dataset = CaseDataset([{keys.PATIENT_ID: f"P-{k}"} for k in range(patients)], None)
    own = list(share_of_rank(dataset))
    metric = ConcordanceIndexMetric()
    for k in own:
        metric(y_pred=torch.tensor([[float(k * k % 5)]]), y=torch.tensor([[float(k), 1.0]]))
    return {"own": own, "c_index": metric.aggregate(), "rows": len(metric.get_buffer())}


def process(rank: int, folder: str) -> None:
    """One of three processes; the first two of them then work as two."""
    torch.set_num_threads(1)
    for size in SIZES:
        if rank >= size:
            break
        dist.init_process_group("gloo", init_method=f"file://{folder}/store{size}", rank=rank, world_size=size)
        share = CASES // size
        own = slice(rank * share, (rank + 1) * share)
        found: dict[str, Any] = {name: step(name, own, wrap=True) for name in SCENARIOS}
        found["classes"] = classes(own)
        found |= {"statistics": statistics(rank), "judged": {n: judged(n) for n in (size, size + 1, 2 * size + 1)}}
        found["cox_in_evaluation"] = CoxLoss().eval()(torch.ones(rank + 1), torch.ones(rank + 1), torch.ones(rank + 1))
        sampler = EventBatchSampler([{keys.EVENT: k < 4, keys.SURV_KNOWN: True} for k in range(24)], 4)
        found["batches"] = [[draw.case for draw in batch] for batch in sampler]
        with pytest.raises(RuntimeError, match=f"{size} processes cannot share 1 validation cases: start at most 1"):
            share_of_rank(CaseDataset([{}], None))
        torch.save(found, f"{folder}/{size}-{rank}.pt")
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[dict[str, Any]]]:
    """What every process found, by the number of processes."""
    folder = tmp_path_factory.mktemp("ranks")
    multiprocessing.spawn(process, args=(str(folder),), nprocs=max(SIZES))
    return {size: [torch.load(folder / f"{size}-{rank}.pt") for rank in range(size)] for size in SIZES}


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_ranks_have_the_loss_and_the_gradients_of_the_one_large_batch(results, size: int, scenario: str) -> None:
    whole = step(scenario, slice(0, CASES), wrap=False)
    assert whole["gradients"].abs().max() > 1e-3 and whole["gradients"].isfinite().all()
    for found in (rank[scenario] for rank in results[size]):
        torch.testing.assert_close(found["value"], whole["value"], rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(found["parts"], whole["parts"], rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(found["gradients"], whole["gradients"], rtol=1e-6, atol=1e-9)
        torch.testing.assert_close(found["learned"], whole["learned"], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("size", SIZES)
def test_classes_of_tumour_are_weighed_over_all_ranks(results, size: int) -> None:
    whole = classes(slice(0, CASES))
    for k in range(2):
        mean = torch.cat([found["classes"]["gradients"][k] for found in results[size]]) / size  # as DDP averages
        torch.testing.assert_close(mean, whole["gradients"][k])
    for found in results[size]:
        torch.testing.assert_close(found["classes"]["value"], whole["value"])


@pytest.mark.parametrize("size", SIZES)
def test_ranks_learn_the_same_task_weights(results, size: int) -> None:
    first, *others = [found["learned_weights"]["learned"] for found in results[size]]
    assert set(first) == {f"log_variances.{task}" for task in keys.TASKS}
    for other in others:
        torch.testing.assert_close(other, first, rtol=0, atol=0)


def test_the_equality_is_not_that_of_losses_by_rank() -> None:
    """Risk sets and counts of each rank alone give something else, so the tables above can fail."""
    whole = step("all_known", slice(0, 6), wrap=False)["gradients"]
    halves = [step("all_known", own, wrap=False)["gradients"] for own in (slice(0, 3), slice(3, 6))]
    assert not torch.allclose(sum(halves) / 2, whole, rtol=1e-2)


@pytest.mark.parametrize("size", SIZES)
def test_statistics_are_averaged(results, size: int) -> None:
    found = [rank["statistics"] for rank in results[size]]
    for name, value in found[0]["after"].items():
        assert all(torch.equal(other["after"][name], value) for other in found)
        mean = torch.stack([other["before"][name].double() for other in found]).mean(dim=0)
        torch.testing.assert_close(value.double(), mean, rtol=1e-6, atol=1e-6)
    assert not torch.equal(found[0]["before"]["0.running_mean"], found[1]["before"]["0.running_mean"])


@pytest.mark.parametrize("size", SIZES)
def test_every_validation_case_is_judged_once(results, size: int) -> None:
    for patients in (size, size + 1, 2 * size + 1):
        found = [rank["judged"][patients] for rank in results[size]]
        assert sorted(k for rank in found for k in rank["own"]) == list(range(patients))
        alone = judged(patients)
        assert alone["own"] == list(range(patients))
        for rank in found:
            assert rank["rows"] == patients and rank["c_index"] == alone["c_index"]


@pytest.mark.parametrize("size", SIZES)
def test_batches_of_an_epoch_differ_between_ranks_and_each_has_its_events(results, size: int) -> None:
    found = [rank["batches"] for rank in results[size]]
    assert {len(batches) for batches in found} == {24 // (4 * size)}
    others = [case for batches in found for batch in batches for case in batch if case >= 4]
    assert len(others) == len(set(others))
    assert {sum(case < 4 for case in batch) for batches in found for batch in batches} == {2}


def test_in_evaluation_a_rank_has_the_loss_of_its_own_batch(results) -> None:
    for size in SIZES:
        for rank, found in enumerate(results[size]):
            assert found["cox_in_evaluation"].item() == pytest.approx(torch.tensor(rank + 1.0).log().item())


def test_one_process_is_the_first_and_only_rank() -> None:
    assert (ranks.rank(), ranks.world_size()) == (0, 1)


def test_without_torchrun_one_line_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    with pytest.raises(RuntimeError, match="processes that torchrun starts"):
        local_rank()
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert local_rank() == 3
