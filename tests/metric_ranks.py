"""What a rank does in test_metrics.py; apart from it, so that a spawned process imports nothing it does not need."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor, distributed

from scripts.training.metrics import BalancedAccuracyMetric, ConcordanceIndexMetric, MaskedDiceMetric

SHARINGS = ("both_know", "rank_with_nothing_known", "rank_without_cases")
CASES = 31


def labelled_cases() -> dict[str, tuple[type, Tensor, Tensor]]:
    """By name: a metric, and the predictions and labels of 31 cases."""
    generator = torch.Generator().manual_seed(0)
    time = torch.randint(1, 30, (CASES,), generator=generator).float()
    event = (torch.rand(CASES, generator=generator) < 0.3).float()
    risk = torch.randn(CASES, generator=generator)
    voxels = torch.arange(CASES * 8).reshape(CASES, 1, 2, 2, 2)
    return {
        "concordance": (ConcordanceIndexMetric, risk[:, None], torch.stack([time, event], dim=1)),
        "balanced_accuracy": (BalancedAccuracyMetric, risk[:, None].sigmoid(), event[:, None].clone()),
        "dice": (MaskedDiceMetric, (voxels % 4 == 0).float(), (voxels % 3 == 0).float()),
    }


def epoch_values(rank: int, size: int, sharing: str) -> dict[str, float]:
    """Each metric over this rank's cases in batches of four, aggregated over the ranks."""
    odd = torch.arange(CASES) % 2 == 1
    mine = odd == bool(rank) if size > 1 else torch.ones(CASES, dtype=torch.bool)
    if sharing == "rank_without_cases" and size > 1:
        mine = torch.full((CASES,), rank == 0)
    values = {}
    for name, (metric_class, y_pred, y) in labelled_cases().items():
        if sharing == "rank_with_nothing_known":
            y[odd] = torch.nan
        metric = metric_class()
        for p, label in zip(y_pred[mine].split(4), y[mine].split(4), strict=True):
            if len(p):
                metric(y_pred=p, y=label)
        values[name] = metric.aggregate().item()
    return values


def run_rank(rank: int, size: int, folder: str) -> None:
    """Join the others over gloo and write this rank's values to ``<folder>/<rank>.json``."""
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=size)
    values = {sharing: epoch_values(rank, size, sharing) for sharing in SHARINGS}
    (Path(folder) / f"{rank}.json").write_text(json.dumps(values), encoding="utf-8")
    distributed.destroy_process_group()
