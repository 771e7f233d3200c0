"""The segmentation path: a 3D U-Net of residual convolutions, and summaries of its levels for survival.

Shapes: ``B`` cases, ``R`` voxels along an edge of the box, ``C`` channels.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from scripts.model.layers import SafeConv3d, global_average

LEVEL_CHANNELS = (8, 16, 32, 64, 128)
ENCODER_CONVOLUTIONS = (2, 2, 3, 3, 4)
DECODER_CONVOLUTIONS = (2, 2, 3, 3)  # of levels 1 to 4; the paper lists them on the way up: 3, 3, 2, 2
SUMMARY_CHANNELS = (4, 8, 16, 32, 64)  # 124 in all
ROI_FACTOR = 2 ** (len(LEVEL_CHANNELS) - 1)


class ResidualConv(nn.Module):
    """Convolution 3x3x3, batch norm, ReLU, plus the input itself.

    If the number of channels changes, a 1x1x1 convolution of the input is added instead.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output.
        bn_momentum: momentum of the batch norm, in torch's sense (weight of the new value).
        bn_eps: epsilon of the batch norm.
    """

    def __init__(self, in_channels: int, out_channels: int, bn_momentum: float = 0.1, bn_eps: float = 1e-5) -> None:
        super().__init__()
        self.conv: nn.Module = SafeConv3d(in_channels, out_channels, kernel_size=3, padding=1, bias=False)
        self.norm: nn.Module = nn.BatchNorm3d(out_channels, eps=bn_eps, momentum=bn_momentum)
        same = in_channels == out_channels
        self.shortcut: nn.Module = nn.Identity() if same else SafeConv3d(in_channels, out_channels, kernel_size=1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C_in, r, r, r) -> (B, C_out, r, r, r)."""
        y = functional.relu(self.norm(self.conv(x)), inplace=True)
        # in place where possible: memory traffic dominates at full resolution; autograd needs the operands
        return y + self.shortcut(x) if torch.is_grad_enabled() else y.add_(self.shortcut(x))


class ResidualLevel(nn.Sequential):
    """One level of the U-Net: ``convolutions`` residual convolutions, the first from ``in_channels``.

    Attributes:
        checkpointing: recompute the maps in the backward pass instead of storing them: less memory, more time.
    """

    def __init__(self, in_channels: int, channels: int, convolutions: int, bn: tuple[float, float]) -> None:
        inputs = [in_channels] + [channels] * (convolutions - 1)
        super().__init__(*(ResidualConv(c, channels, *bn) for c in inputs))
        self.checkpointing = False

    def forward(self, x: Tensor, skip: Tensor | None = None) -> Tensor:
        """(B, C_in, r, r, r) -> (B, C, r, r, r); with ``skip`` (B, C, r, r, r) x has half the size."""
        if not torch.jit.is_scripting():
            frugal = self.checkpointing and torch.is_grad_enabled()
            if frugal:
                at_rest = partial(norms_seen_once, self)
                return checkpoint(self.convolve, x, skip, use_reentrant=False, context_fn=at_rest)
        return self.convolve(x, skip)

    def convolve(self, x: Tensor, skip: Tensor | None) -> Tensor:
        """:meth:`forward` itself."""
        if skip is not None:
            x = torch.cat([functional.interpolate(x, scale_factor=2.0, mode="nearest"), skip], dim=1)
        for block in self:
            x = block(x)
        return x


def norms_seen_once(module: nn.Module) -> tuple[AbstractContextManager, AbstractContextManager]:
    """Contexts of a forward pass and of its repetition; the latter does not update running statistics."""
    return nullcontext(), norms_at_rest(module)


@contextmanager
def norms_at_rest(module: nn.Module) -> Iterator[None]:
    """Batch norms in training mode do not update their running statistics."""
    norms = [norm for norm in module.modules() if isinstance(norm, nn.BatchNorm3d)]
    kept = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm in norms:
        norm.momentum, norm.num_batches_tracked = 0.0, None
    try:
        yield
    finally:
        for norm, (momentum, batches) in zip(norms, kept, strict=True):
            norm.momentum, norm.num_batches_tracked = momentum, batches


def set_checkpointing(network: nn.Module, checkpointing: bool) -> None:
    """Set gradient checkpointing of every level of the U-Net (see :class:`ResidualLevel`)."""
    for module in network.modules():
        if isinstance(module, ResidualLevel):
            module.checkpointing = checkpointing


class Encoder(nn.Module):
    """The way down: five levels of 8, 16, 32, 64, 128 channels with max pooling between them."""

    def __init__(self, in_channels: int, bn: tuple[float, float]) -> None:
        super().__init__()
        inputs = (in_channels, *LEVEL_CHANNELS[:-1])
        self.levels = nn.ModuleList(
            ResidualLevel(c_in, c, n, bn)
            for c_in, c, n in zip(inputs, LEVEL_CHANNELS, ENCODER_CONVOLUTIONS, strict=True)
        )

    def forward(self, x: Tensor) -> list[Tensor]:
        """(B, C, R, R, R) -> five tensors (B, 8 * 2^k, R / 2^k, ...) for k = 0..4."""
        features: list[Tensor] = []
        for level in self.levels:
            if len(features) > 0:
                x = functional.max_pool3d(x, kernel_size=2)
            x = level(x)
            features.append(x)
        return features


class Decoder(nn.Module):
    """The way up: nearest up-sampling, skip concatenation, residual convolutions; then a logit a class and voxel."""

    def __init__(self, bn: tuple[float, float], classes: int = 1) -> None:
        super().__init__()
        self.levels = nn.ModuleList(
            ResidualLevel(below + c, c, n, bn)
            for below, c, n in reversed(
                list(zip(LEVEL_CHANNELS[1:], LEVEL_CHANNELS[:-1], DECODER_CONVOLUTIONS, strict=True))
            )
        )
        self.logits = SafeConv3d(LEVEL_CHANNELS[0], classes, kernel_size=1)

    def start_at(self, probability: float) -> None:
        """Every voxel starts with this probability of a tumour, shared evenly by the classes.

        Raises:
            ValueError: it is not between 0 and 1.
        """
        if not 0 < probability < 1:
            raise ValueError(f"tumour_prior is {probability!r}; a probability between 0 and 1, or null, is expected")
        nn.init.zeros_(self.logits.weight)
        odds = probability / (1 - probability)  # of tumour against background, whose logit is 0
        assert self.logits.bias is not None  # it is made with one
        nn.init.constant_(self.logits.bias, math.log(odds / self.logits.out_channels))

    def forward(self, features: list[Tensor]) -> Tensor:
        """The encoder's five feature maps -> logits (B, classes, R, R, R)."""
        x = features[-1]
        for k, level in enumerate(self.levels):
            x = level(x, features[-2 - k])
        return self.logits(x)


class LevelSummaries(nn.Module):
    """``z1``: each encoder level through a 1x1x1 convolution, batch norm and ReLU, then averaged over the box."""

    features = sum(SUMMARY_CHANNELS)

    def __init__(self, bn: tuple[float, float]) -> None:
        super().__init__()
        self.levels = nn.ModuleList(
            nn.Sequential(
                SafeConv3d(c, s, kernel_size=1, bias=False), nn.BatchNorm3d(s, momentum=bn[0], eps=bn[1]), nn.ReLU()
            )
            for c, s in zip(LEVEL_CHANNELS, SUMMARY_CHANNELS, strict=True)
        )

    def forward(self, features: list[Tensor]) -> Tensor:
        """The encoder's five feature maps -> z1 (B, 124)."""
        means: list[Tensor] = []
        for k, level in enumerate(self.levels):
            means.append(global_average(level(features[k])))
        return torch.cat(means, dim=1)
