"""Processes ("ranks") that train one network together, each with a batch of its own (torch.distributed)."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def world_size() -> int:
    """Number of ranks; 1 without ``torch.distributed``."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Number of this process among the ranks, from 0."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def all_ranks(values: Tensor) -> Tensor:
    """``values`` of every rank, (W, ...); all ranks must call it, with the same shape and type.

    The gradient assumes that every rank computes the same loss from the result, and that the gradients of the
    parameters are then averaged over ranks, as ``DistributedDataParallel`` does. The average is the gradient of that
    loss, once.
    """
    return _AllRanks.apply(values)


class _AllRanks(torch.autograd.Function):
    """Gathering without communication in ``backward``: this rank's gradient is W times that of its own values.

    (``torch.distributed.nn.functional.all_gather`` communicates to add W equal gradients.)
    """

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        gathered = [torch.empty_like(values) for _ in range(world_size())]
        dist.all_gather(gathered, values.contiguous())
        return torch.stack(gathered)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0][rank()] * world_size()
