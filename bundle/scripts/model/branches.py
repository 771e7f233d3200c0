"""Branches of the network for HPV status and log hazard.

Shapes: ``B`` cases, ``R`` voxels along an edge of the box, ``C`` channels, ``F`` clinical values.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from scripts.model.layers import FullPrecisionLinear, SafeConv3d, global_average

STEM_CHANNELS = 24
DENSE_LAYERS = (4, 8, 16)
GROWTH = 16
BOTTLENECK = 64
TRANSITION_CHANNELS = (16, 32, 64)  # 112 in all
HIDDEN_FEATURES = 64

BURDEN_FEATURES = 3
BURDEN_FLOOR = 0.1  # permille of the box; about 1 ml in a box of 22 to 26 cm


class NormReLUConv(nn.Sequential):
    """Batch norm, ReLU, convolution: the unit of a DenseNet."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, bn: tuple[float, float]) -> None:
        super().__init__(
            nn.BatchNorm3d(in_channels, momentum=bn[0], eps=bn[1]),
            nn.ReLU(),
            SafeConv3d(in_channels, out_channels, kernel_size, padding=kernel_size // 2, bias=False),
        )


class DenseLayer(nn.Module):
    """A bottleneck of 64 channels, 16 new channels, dropout; concatenated to the input."""

    def __init__(self, in_channels: int, dropout: float, bn: tuple[float, float]) -> None:
        super().__init__()
        self.bottleneck = NormReLUConv(in_channels, BOTTLENECK, 1, bn)
        self.growth = NormReLUConv(BOTTLENECK, GROWTH, 3, bn)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, r, r, r) -> (B, C + 16, r, r, r)."""
        return torch.cat([x, self.dropout(self.growth(self.bottleneck(x)))], dim=1)


class DenseStage(nn.Module):
    """A dense block with its transition and, optionally, a summary of the output.

    Args:
        in_channels: channels of the input.
        layers: dense layers of the block.
        out_channels: channels after the transition.
        summary: whether to return the normalised and averaged output, for ``z2`` or the HPV logit.
        dropout: of the dense layers.
        bn: momentum and epsilon of the batch norms.
    """

    def __init__(
        self, in_channels: int, layers: int, out_channels: int, summary: bool, dropout: float, bn: tuple[float, float]
    ) -> None:
        super().__init__()
        self.block = nn.Sequential(*(DenseLayer(in_channels + k * GROWTH, dropout, bn) for k in range(layers)))
        self.transition = NormReLUConv(in_channels + layers * GROWTH, out_channels, 1, bn)
        self.norm = nn.BatchNorm3d(out_channels, momentum=bn[0], eps=bn[1]) if summary else None

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """(B, C_in, r, r, r) -> feature map (B, C_out, r, r, r) and its summary (B, C_out) or None."""
        x = self.transition(self.block(x))
        if self.norm is None:
            return x, None
        return x, global_average(functional.relu(self.norm(x)))


class HPVBranch(nn.Module):
    """A 3D DenseNet on [PET, CT, tumour probability]: the HPV logit and ``z2``.

    Args:
        in_channels: channels of the input.
        z2: whether to compute ``z2``; otherwise only the last stage has a summary, which the logit reads.
        dropout: of the dense layers.
        bn: momentum and epsilon of the batch norms.
    """

    features = sum(TRANSITION_CHANNELS)

    def __init__(self, in_channels: int, z2: bool, dropout: float, bn: tuple[float, float]) -> None:
        super().__init__()
        self.stem = SafeConv3d(in_channels, STEM_CHANNELS, kernel_size=3, stride=2, padding=1, bias=False)
        inputs = (STEM_CHANNELS, *TRANSITION_CHANNELS[:-1])
        self.stages = nn.ModuleList(
            DenseStage(c_in, n, c, z2 or c == TRANSITION_CHANNELS[-1], dropout, bn)
            for c_in, n, c in zip(inputs, DENSE_LAYERS, TRANSITION_CHANNELS, strict=True)
        )
        self.logit = FullPrecisionLinear(TRANSITION_CHANNELS[-1], 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(B, C, R, R, R) -> HPV logit (B,) and z2 (B, 112; the last 64 without ``z2``)."""
        x = functional.max_pool3d(self.stem(x), kernel_size=3, stride=2, padding=1)
        summaries: list[Tensor] = []
        for k, stage in enumerate(self.stages):
            if k > 0:
                x = functional.avg_pool3d(x, kernel_size=2)
            x, summary = stage(x)
            if summary is not None:
                summaries.append(summary)
        return self.logit(summaries[-1]).squeeze(1), torch.cat(summaries, dim=1)


class ClinicalTerm(nn.Module):
    r"""A logistic regression on the clinical values ``z3``, added to the HPV logit.

    .. math:: \sum_j v_j k_j + w_j \frac{z_j - c_j k_j}{s_j}, \qquad k_j = \min(z_j / a_j, 1)

    A missing value (coded 0) adds nothing: k is 1 for known values. A category of two levels (coded 1 and 2) has a
    weight for each level, as in :func:`.code_indicators`. All weights start at zero.

    Args:
        scales: (a, c, s) of each value: threshold from which it is known, typical value, typical difference.
    """

    def __init__(self, scales: Sequence[Sequence[float]]) -> None:
        super().__init__()
        self.register_buffer("scales", torch.tensor(scales, dtype=torch.float32).T.contiguous())
        self.weight = nn.Parameter(torch.zeros(2, len(scales)))

    def forward(self, clinical: Tensor) -> Tensor:
        """z3 (B, F) -> part of the HPV logit (B,)."""
        z = clinical.to(self.weight.dtype)
        scales = self.scales  # not annotated on the class: TorchScript would read the annotation
        known_from, usual, spread = scales[0], scales[1], scales[2]  # type: ignore[index]
        known = (z / known_from).clamp(max=1.0)
        return (self.weight[0] * known + self.weight[1] * (z - usual * known) / spread).sum(dim=1)


class SurvivalBranch(nn.Module):
    """``z1``, ``z2`` (where there is an HPV branch) and ``z3`` to the log hazard.

    Each of ``z1`` and ``z2``: batch norm, dropout, fully connected layer of 64, ReLU. Then, with ``z3``: batch norm,
    dropout, one linear unit.
    """

    def __init__(
        self, deep_features: Sequence[int], clinical_features: int, dropout: float, bn: tuple[float, float]
    ) -> None:
        super().__init__()
        self.hidden = nn.ModuleList(
            nn.Sequential(
                nn.BatchNorm1d(width, momentum=bn[0], eps=bn[1]),
                nn.Dropout(dropout),
                FullPrecisionLinear(width, HIDDEN_FEATURES),
                nn.ReLU(),
            )
            for width in deep_features
        )
        joined = HIDDEN_FEATURES * len(deep_features) + clinical_features
        self.norm = nn.BatchNorm1d(joined, momentum=bn[0], eps=bn[1])
        self.dropout = nn.Dropout(dropout)
        self.log_hazard = FullPrecisionLinear(joined, 1)

    def forward(self, deep: list[Tensor], clinical: Tensor) -> Tensor:
        """[z1 (B, 124), z2 (B, 112)] and z3 (B, F) -> log hazard (B,)."""
        parts: list[Tensor] = []
        for k, hidden in enumerate(self.hidden):
            parts.append(hidden(deep[k]))
        parts.append(clinical.to(parts[0].dtype))
        return self.log_hazard(self.dropout(self.norm(torch.cat(parts, dim=1)))).squeeze(1)


def tumour_burden(probability: Tensor, pet: Tensor, floor: float = BURDEN_FLOOR) -> Tensor:
    r"""Volume and uptake of the tumour, from its probability map p over the N voxels of the box.

    .. math:: \ln\Bigl(\frac{1000}{N} \sum p + 0.1\Bigr), \qquad \frac{\sum p \cdot PET}{1 + \sum p}, \qquad
              \max p \cdot PET

    that is the logarithm of its volume (in permille of the box, which does not depend on the voxel size), and its mean
    and highest uptake in the network's units of PET. Without a tumour, volume and uptake are at their minimum.

    Args:
        probability: (B, R, R, R).
        pet: (B, R, R, R).
        floor: permille of the box below which volumes do not differ; an argument, since TorchScript reads no globals.

    Returns:
        (B, 3) float32.

    Example:
        No tumour, then a thousandth of the box with an uptake of 0.5:

        >>> p = torch.zeros(1, 10, 10, 10)
        >>> tumour_burden(p, torch.full_like(p, 0.5))
        tensor([[-2.3026,  0.0000,  0.0000]])
        >>> p[0, 0, 0, 0] = 1
        >>> tumour_burden(p, torch.full_like(p, 0.5))
        tensor([[0.0953, 0.2500, 0.5000]])
    """
    p = probability.float().flatten(1)
    uptake = p * pet.float().flatten(1)
    size = p.sum(dim=1)
    volume = torch.log(1000 * p.mean(dim=1) + floor)
    return torch.stack([volume, uptake.sum(dim=1) / (1 + size), uptake.amax(dim=1)], dim=1)


class BurdenBranch(nn.Module):
    """A Cox regression on tumour burden, HPV probability and ``z3``.

    Batch norm, then one linear unit that starts at zero. Few inputs with a known meaning overfit less where relapses
    are few.

    Args:
        burden_features: number of values that describe the tumour.
        clinical_features: number F of clinical values.
        bn: momentum and epsilon of the batch norm.
    """

    def __init__(self, burden_features: int, clinical_features: int, bn: tuple[float, float]) -> None:
        super().__init__()
        self.burden_features = burden_features
        self.norm = nn.BatchNorm1d(burden_features + clinical_features, momentum=bn[0], eps=bn[1])
        self.burden = FullPrecisionLinear(burden_features, 1)
        self.clinical = FullPrecisionLinear(clinical_features, 1) if clinical_features else None

    def forward(self, burden: Tensor, clinical: Tensor) -> Tensor:
        """Burden (B, burden_features) and z3 (B, F) -> log hazard (B,)."""
        x = self.norm(torch.cat([burden, clinical.to(burden.dtype)], dim=1))
        log_hazard = self.burden(x[:, : self.burden_features])
        if self.clinical is not None:
            log_hazard = log_hazard + self.clinical(x[:, self.burden_features :])
        return log_hazard.squeeze(1)

    def start_at_zero(self) -> None:
        """Set all weights to zero: the same hazard for all patients."""
        for parameter in (*self.burden.parameters(), *self.regularised_weights()):
            nn.init.zeros_(parameter)

    def regularised_weights(self) -> list[nn.Parameter]:
        """Weights in the L2 term: those of the clinical values, not those of the burden."""
        return [] if self.clinical is None else [p for p in self.clinical.parameters() if p.ndim == 2]
