"""The multitask network: tumour segmentation, HPV status and the hazard of relapse from one PET/CT.

Three named parts meet in :class:`MultitaskNet`:

* :class:`Encoder` and :class:`Decoder`, a 3D U-Net of residual convolutions, give the tumour probability map, and
  the encoder's five levels give ``z1`` (:class:`LevelSummaries`, 124 features);
* :class:`HPVBranch`, a 3D DenseNet on PET, CT and the tumour probability map, gives the HPV logit and ``z2``
  (112 features); where wanted, :class:`ClinicalTerm` adds what the clinical values tell of HPV status;
* :class:`SurvivalBranch` turns ``z1``, ``z2`` and the clinical values ``z3`` into the log hazard; beside it or instead
  of it :class:`BurdenBranch` does so from few values: the burden of the tumour that was found, the HPV probability and
  ``z3``.

Source: "Enhancing Survival Outcomes in Head and Neck Cancer through Joint HPV Classification and Tumor Segmentation"
(HECKTOR 2025), but for the burden and the clinical term, which are ours. Shapes below: ``B`` cases, ``R`` voxels along
an edge of the box, ``C`` channels, ``F`` clinical values.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch.utils.checkpoint import checkpoint

from scripts.keys import FEATURES, HPV_LOGIT, LOG_HAZARD, SEG_LOGITS, TASK_SEG, TASK_SURV, TASKS

__all__ = ["HPV_INPUTS", "MASK_GRADIENTS", "SURVIVAL_INPUTS", "MultitaskNet", "tumour_burden"]

LEVEL_CHANNELS = (8, 16, 32, 64, 128)
ENCODER_CONVOLUTIONS = (2, 2, 3, 3, 4)
DECODER_CONVOLUTIONS = (2, 2, 3, 3)  # of levels 1 to 4; the paper lists them on the way up: 3, 3, 2, 2
SUMMARY_CHANNELS = (4, 8, 16, 32, 64)  # 124 in all
STEM_CHANNELS = 24
DENSE_LAYERS = (4, 8, 16)
GROWTH = 16
BOTTLENECK = 64
TRANSITION_CHANNELS = (16, 32, 64)  # 112 in all
HIDDEN_FEATURES = 64
ROI_FACTOR = 2 ** (len(LEVEL_CHANNELS) - 1)

BURDEN_FEATURES = 3
BURDEN_FLOOR = 0.1  # permille of the box; about 1 ml in a box of 22 to 26 cm

MASK_GRADIENTS = ("stop", "flow")
SURVIVAL_INPUTS = ("deep", "burden")
HPV_INPUTS = ("image", "clinical")
LEVEL_SCALE = (1.0, 1.0, 1.0)  # of a clinical value that is a level, coded 1, 2, ...; see ClinicalTerm


class SafeConv3d(nn.Conv3d):
    """A convolution that keeps clear of two faults of torch 2.13 on CPU.

    oneDNN's bfloat16 kernel for AVX-512 (jit_bf16) leaves the gradient of a 3x3x3 weight unwritten on maps of depth 2:
    it is whatever the memory held. Such maps are tiny, so in training they are computed in the weight's own precision.

    At inference in float32, torch gives a single small map (and on one thread every 1x1x1 kernel) to a kernel of its
    own that takes several times as long as oneDNN's; here all of them go to oneDNN.
    """

    def forward(self, x: Tensor) -> Tensor:
        """(B, C_in, r, r, r) -> (B, C_out, r, r, r)."""
        if self.training and x.shape[2] == 2 and x.device.type == "cpu":
            with torch.autocast("cpu", enabled=False):
                return self._conv_forward(x.to(self.weight.dtype), self.weight, self.bias)
        if not torch.jit.is_scripting():  # TorchScript leaves this branch out
            alone = onednn_alone(x)
            if alone:
                layout = (self.stride, self.dilation, self.groups)
                return torch.mkldnn_convolution(x, self.weight, self.bias, self.padding, *layout)  # type: ignore[arg-type]
        return self._conv_forward(x, self.weight, self.bias)


def onednn_alone(x: Tensor) -> bool:
    """Whether a convolution of ``x`` may call oneDNN itself: eager float32 on CPU, without a gradient."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or x.device.type != "cpu" or x.dtype != torch.float32:
        return False
    eager = not torch.is_grad_enabled() and not torch.is_autocast_enabled("cpu")
    return eager and torch.backends.mkldnn.is_available() and bool(torch.backends.mkldnn.enabled)


class ResidualConv(nn.Module):
    """Convolution 3x3x3, batch norm, ReLU, plus the input itself.

    Where the number of channels changes, the input comes through a 1x1x1 convolution instead.

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
        # maps at full resolution cost memory traffic more than arithmetic; autograd still needs the sum's operands
        return y + self.shortcut(x) if torch.is_grad_enabled() else y.add_(self.shortcut(x))


class ResidualLevel(nn.Sequential):
    """One level of the U-Net: ``convolutions`` residual convolutions, the first from ``in_channels``.

    Attributes:
        checkpointing: keep none of its maps for the backward pass, which computes them again: less memory, more time.
    """

    def __init__(self, in_channels: int, channels: int, convolutions: int, bn: tuple[float, float]) -> None:
        inputs = [in_channels] + [channels] * (convolutions - 1)
        super().__init__(*(ResidualConv(c, channels, *bn) for c in inputs))
        self.checkpointing = False

    def forward(self, x: Tensor, skip: Tensor | None = None) -> Tensor:
        """(B, C_in, r, r, r) -> (B, C, r, r, r); with ``skip`` (B, C, r, r, r) x comes from below at half the size."""
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
    """Contexts of a forward pass and of its repetition, in which running statistics stay as they are."""
    return nullcontext(), norms_at_rest(module)


@contextmanager
def norms_at_rest(module: nn.Module) -> Iterator[None]:
    """Batch norms in training mode normalise as ever, and learn nothing of the batch."""
    norms = [norm for norm in module.modules() if isinstance(norm, nn.BatchNorm3d)]
    kept = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm in norms:
        norm.momentum, norm.num_batches_tracked = 0.0, None
    try:
        yield
    finally:
        for norm, (momentum, batches) in zip(norms, kept, strict=True):
            norm.momentum, norm.num_batches_tracked = momentum, batches


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
    """The way up: nearest up-sampling, skip concatenation, residual convolutions; then one logit a voxel."""

    def __init__(self, bn: tuple[float, float]) -> None:
        super().__init__()
        self.levels = nn.ModuleList(
            ResidualLevel(below + c, c, n, bn)
            for below, c, n in reversed(
                list(zip(LEVEL_CHANNELS[1:], LEVEL_CHANNELS[:-1], DECODER_CONVOLUTIONS, strict=True))
            )
        )
        self.logits = SafeConv3d(LEVEL_CHANNELS[0], 1, kernel_size=1)

    def forward(self, features: list[Tensor]) -> Tensor:
        """The encoder's five feature maps -> tumour logits (B, 1, R, R, R)."""
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


class NormReLUConv(nn.Sequential):
    """Batch norm, ReLU, convolution: the unit a DenseNet is made of."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, bn: tuple[float, float]) -> None:
        super().__init__(
            nn.BatchNorm3d(in_channels, momentum=bn[0], eps=bn[1]),
            nn.ReLU(),
            SafeConv3d(in_channels, out_channels, kernel_size, padding=kernel_size // 2, bias=False),
        )


class DenseLayer(nn.Module):
    """A bottleneck of 64 channels, 16 new channels, dropout; the input is kept beside them."""

    def __init__(self, in_channels: int, dropout: float, bn: tuple[float, float]) -> None:
        super().__init__()
        self.bottleneck = NormReLUConv(in_channels, BOTTLENECK, 1, bn)
        self.growth = NormReLUConv(BOTTLENECK, GROWTH, 3, bn)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, r, r, r) -> (B, C + 16, r, r, r)."""
        return torch.cat([x, self.dropout(self.growth(self.bottleneck(x)))], dim=1)


class DenseStage(nn.Module):
    """A dense block and its transition, and where wanted a summary of what comes out.

    Args:
        in_channels: channels of the input.
        layers: dense layers of the block.
        out_channels: channels after the transition.
        summary: whether the output also goes, normalised and averaged, into ``z2`` or the HPV logit.
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

    The linear unit reads the last stage's summary, so that logit and ``z2`` share it.

    Args:
        in_channels: channels of the input.
        z2: whether ``z2`` is wanted; without, only the last stage has a summary.
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
        """(B, C, R, R, R) -> HPV logit (B,) and z2 (B, 112; the last 64 where it is not wanted)."""
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
    r"""A logistic regression in the network: what the clinical values ``z3`` add to the HPV logit.

    .. math:: \sum_j v_j k_j + w_j \frac{z_j - c_j k_j}{s_j}, \qquad k_j = \min(z_j / a_j, 1)

    A value that is missing (coded 0) adds nothing: k says whether it is known. For a category of two levels (coded 1
    and 2) that is a weight for each level, as in :func:`scripts.clinical.code_indicators`. All weights start at zero.

    Args:
        scales: (a, c, s) of each value: from where on it counts as known, a usual value, a usual difference.
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
    r"""How large the tumour is and how much it takes up, from its probability map p over the N voxels of the box.

    .. math:: \ln\Bigl(\frac{1000}{N} \sum p + 0.1\Bigr), \qquad \frac{\sum p \cdot PET}{1 + \sum p}, \qquad
              \max p \cdot PET

    that is the logarithm of its volume (in permille of the box, so that boxes of different voxels agree), and, in the
    network's units of PET, its mean and its highest uptake. No tumour is a small one without uptake.

    Args:
        probability: (B, R, R, R).
        pet: (B, R, R, R).
        floor: permille of the box, below which sizes no longer differ.

    Returns:
        (B, 3) float32.

    Example:
        A thousandth of the box is tumour, with uptake of 0.5:

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
    """A Cox regression in the network: burden of the tumour, HPV probability and ``z3`` to the log hazard.

    Batch norm, then one linear unit that starts at zero, so that all patients start alike. A few values with a known
    meaning leave little room to learn chance, where relapses are few.

    Args:
        burden_features: what is known of the tumour.
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
        """What is known of the tumour (B, burden_features) and z3 (B, F) -> log hazard (B,)."""
        x = self.norm(torch.cat([burden, clinical.to(burden.dtype)], dim=1))
        log_hazard = self.burden(x[:, : self.burden_features])
        if self.clinical is not None:
            log_hazard = log_hazard + self.clinical(x[:, self.burden_features :])
        return log_hazard.squeeze(1)

    def start_at_zero(self) -> None:
        """The same hazard for everybody."""
        for parameter in (*self.burden.parameters(), *self.held_down()):
            nn.init.zeros_(parameter)

    def held_down(self) -> list[nn.Parameter]:
        """Weights of the clinical values, which the L2 term holds down; those of the burden itself are free."""
        return [] if self.clinical is None else [p for p in self.clinical.parameters() if p.ndim == 2]


class FullPrecisionLinear(nn.Linear):
    """A linear layer that autocast leaves alone.

    The layers here are tiny, so half precision would gain nothing, and a log hazard of three digits ties patients
    that differ. Written as a product and a sum, which autocast does not touch and which export and script alike.

    Example:
        >>> layer = FullPrecisionLinear(3, 2)
        >>> with torch.autocast("cpu", dtype=torch.bfloat16):
        ...     y = layer(torch.rand(4, 3))
        >>> y.dtype, tuple(y.shape)
        (torch.float32, (4, 2))
    """

    def forward(self, x: Tensor) -> Tensor:
        """(B, in) -> (B, out), in the weight's own precision."""
        return (x.to(self.weight.dtype).unsqueeze(1) * self.weight).sum(dim=2) + self.bias


def global_average(x: Tensor) -> Tensor:
    """Mean over the three spatial axes, summed in float32 at least: (B, C, r, r, r) -> (B, C)."""
    return x.mean(dim=(2, 3, 4), dtype=torch.promote_types(x.dtype, torch.float32))


class MultitaskNet(nn.Module):
    """Segmentation, HPV status and log hazard from one PET/CT and the clinical values.

    Any non-empty subset of the tasks builds the network without the missing branches: without ``seg`` there is no
    decoder, the HPV branch reads PET and CT alone and no tumour can be measured; without ``hpv`` survival has neither
    ``z2`` nor HPV probability; without ``surv`` there are neither ``z1`` nor a survival branch; ``("hpv",)`` has no
    encoder.

    In training mode survival normalises over the batch, so it needs at least two cases at a time.

    Args:
        clinical_features: number F of clinical values.
        tasks: any of "seg", "hpv", "surv".
        mask_gradient: "stop" keeps the gradients of the HPV and survival losses from reaching the segmentation
            through its probability map, and that of the survival loss from reaching the HPV branch through its
            probability; "flow" is the published setting. May be changed between steps.
        survival_inputs: what the log hazard is made of beside the clinical values: "deep" (``z1`` and ``z2``, the
            paper's :class:`SurvivalBranch`), "burden" (:class:`BurdenBranch`, needs the segmentation), or both, whose
            log hazards add up.
        hpv_inputs: what the HPV logit is made of: "image" (the paper's :class:`HPVBranch`) alone, or with "clinical"
            (:class:`ClinicalTerm`) on top.
        clinical_scales: of each clinical value for :class:`ClinicalTerm`, as
            :func:`scripts.clinical.clinical_scales` gives them; None where all are levels.
        in_channels: image channels, in the order CT, PET. The HPV branch reads them in the paper's order, PET first.
        bn_momentum: momentum of every batch norm, in torch's sense (Keras' 0.99 is 0.01 here).
        bn_eps: epsilon of every batch norm (Keras: 1e-3).
        dropout: dropout of the survival branch.
        dense_dropout: dropout of the HPV branch's dense layers.
        seg_prior: tumour probability that an untrained segmentation starts from; None starts at one half.

    Raises:
        ValueError: for unknown, repeated or no tasks, an unknown ``mask_gradient``, ``survival_inputs`` that are
            unknown or that the tasks cannot give, ``hpv_inputs`` that are unknown or lack the image,
            ``clinical_scales`` of another number of values, or a ``seg_prior`` outside (0, 1).

    Example:
        Missing clinical values are zeros, so ``None`` and zeros are the same patient:

        >>> net = MultitaskNet().eval()
        >>> image = torch.rand(2, 2, 32, 32, 32)
        >>> with torch.no_grad():
        ...     unknown, zeros = net(image), net(image, torch.zeros(2, 7))
        >>> {name: tuple(value.shape) for name, value in unknown.items()}
        {'seg_logits': (2, 1, 32, 32, 32), 'hpv_logit': (2,), 'log_hazard': (2,), 'features': (2, 236)}
        >>> torch.equal(unknown["log_hazard"], zeros["log_hazard"])
        True
    """

    __jit_unused_properties__ = ("mask_gradient",)

    def __init__(
        self,
        clinical_features: int = 7,
        tasks: Sequence[str] = TASKS,
        mask_gradient: str = "stop",
        survival_inputs: Sequence[str] = ("deep",),
        hpv_inputs: Sequence[str] = ("image",),
        clinical_scales: Sequence[Sequence[float]] | None = None,
        in_channels: int = 2,
        bn_momentum: float = 0.1,
        bn_eps: float = 1e-5,
        dropout: float = 0.5,
        dense_dropout: float = 0.05,
        seg_prior: float | None = None,
    ) -> None:
        super().__init__()
        self.tasks = checked_tasks(tasks)
        self.clinical_features = clinical_features
        self.in_channels = in_channels
        self.mask_gradient = mask_gradient
        bn = (bn_momentum, bn_eps)
        seg, hpv, surv = (task in self.tasks for task in TASKS)
        self.encoder = Encoder(in_channels, bn) if seg or surv else None
        self.decoder = Decoder(bn) if seg else None
        self.survival_inputs = checked_inputs(survival_inputs, self.tasks) if surv else ()
        deep, burden = (name in self.survival_inputs for name in SURVIVAL_INPUTS)
        self.hpv = HPVBranch(in_channels + int(seg), deep, dense_dropout, bn) if hpv else None
        self.hpv_inputs = checked_hpv_inputs(hpv_inputs) if hpv else ()
        scales = checked_scales(clinical_scales, clinical_features)
        self.hpv_clinical = ClinicalTerm(scales) if "clinical" in self.hpv_inputs and scales else None
        self.summaries = LevelSummaries(bn) if deep else None
        widths = [LevelSummaries.features] + [HPVBranch.features] * int(hpv)
        self.survival = SurvivalBranch(widths, clinical_features, dropout, bn) if deep else None
        self.burden = BurdenBranch(BURDEN_FEATURES + int(hpv), clinical_features, bn) if burden else None
        self.apply(initialise)
        if self.burden is not None:
            self.burden.start_at_zero()
        if self.decoder is not None and self.decoder.logits.bias is not None and seg_prior is not None:
            nn.init.constant_(self.decoder.logits.bias, prior_logit(seg_prior))

    @property
    def mask_gradient(self) -> str:
        """Whether gradients flow back through the probability map: "stop" or "flow"."""
        return "flow" if self._mask_gradient_flows else "stop"

    @mask_gradient.setter
    def mask_gradient(self, value: str) -> None:
        if value not in MASK_GRADIENTS:
            raise ValueError(f"mask_gradient is {value!r}; it must be one of {', '.join(MASK_GRADIENTS)}")
        self._mask_gradient_flows = value == "flow"

    @torch.jit.unused
    def forward(self, image: Tensor, clinical: Tensor | None = None) -> dict[str, Tensor]:
        """All that the tasks give for a batch.

        Args:
            image: (B, 2, R, R, R), channel 0 CT, channel 1 PET; R (each edge) divisible by 16.
            clinical: (B, F) coded clinical values, 0 where missing; None where all are missing.

        Returns:
            ``seg_logits`` (B, 1, R, R, R), ``hpv_logit`` (B,), ``log_hazard`` (B,), those of absent tasks absent; with
            the log hazard ``features`` (B, ...), without a gradient: z1, z2 and burden as far as they are computed
            (236 for the paper's network).

        Raises:
            ValueError: for an image or clinical values of the wrong shape, or a single case in training mode.
        """
        self.check_shapes(image, clinical)
        seg_logits, hpv_logit, log_hazard, features = self.heads(image, clinical)
        outputs = {SEG_LOGITS: seg_logits, HPV_LOGIT: hpv_logit, LOG_HAZARD: log_hazard, FEATURES: features}
        return {name: value for name, value in outputs.items() if value is not None}

    def heads(
        self, image: Tensor, clinical: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
        """:meth:`forward` as a tuple, None where a task is absent: what exporters can trace."""
        maps = self.encode(image)
        seg_logits = self.decode(maps)
        probability = self.probability(seg_logits)
        if clinical is None:
            clinical = image.new_zeros((image.shape[0], self.clinical_features))
        hpv_logit, z2 = self.classify(image, probability, clinical)
        features = self.summarise(maps, z2)
        hazards: list[Tensor] = []
        if self.survival is not None:
            hazards.append(self.survival(features, clinical))
        if self.burden is not None and probability is not None:
            features.append(self.measure(image, probability, hpv_logit))
            hazards.append(self.burden(features[-1], clinical))
        if len(hazards) == 0:
            return seg_logits, hpv_logit, None, None
        return seg_logits, hpv_logit, torch.stack(hazards).sum(dim=0), torch.cat(features, dim=1).detach().float()

    def encode(self, image: Tensor) -> list[Tensor]:
        """The encoder's five feature maps; none where no task needs them."""
        if self.encoder is None:
            return []
        return self.encoder(image)

    def decode(self, features: list[Tensor]) -> Tensor | None:
        """Tumour logits (B, 1, R, R, R), or None without the segmentation task."""
        if self.decoder is None:
            return None
        return self.decoder(features)

    def probability(self, seg_logits: Tensor | None) -> Tensor | None:
        """Tumour probability (B, 1, R, R, R) for the other branches, or None without the segmentation task."""
        if seg_logits is None:
            return None
        return self.passed_on(torch.sigmoid(seg_logits))

    def passed_on(self, estimate: Tensor) -> Tensor:
        """One task's estimate for another task: with a gradient or, where ``mask_gradient`` is "stop", without."""
        if self._mask_gradient_flows:
            return estimate
        return estimate.detach()

    def classify(
        self, image: Tensor, probability: Tensor | None, clinical: Tensor
    ) -> tuple[Tensor | None, Tensor | None]:
        """HPV logit (B,) and z2 (B, 112; 64 without deep survival inputs), or None and None without the HPV task."""
        if self.hpv is None:
            return None, None
        x = image.flip(1)  # [CT, PET] -> [PET, CT]
        if probability is not None:
            x = torch.cat([x, probability.to(x.dtype)], dim=1)
        logit, z2 = self.hpv(x)
        if self.hpv_clinical is not None:
            logit = logit + self.hpv_clinical(clinical)
        return logit, z2

    def summarise(self, maps: list[Tensor], z2: Tensor | None) -> list[Tensor]:
        """The deep features: z1 (B, 124), where the survival branch reads it, and z2, where there is an HPV branch."""
        deep: list[Tensor] = []
        if self.summaries is not None:
            deep.append(self.summaries(maps))
        if z2 is not None:
            deep.append(z2)
        return deep

    def measure(self, image: Tensor, probability: Tensor, hpv_logit: Tensor | None) -> Tensor:
        """What the burden branch reads: :func:`tumour_burden` and the HPV probability, (B, 4; 3 without HPV task)."""
        burden = tumour_burden(probability[:, 0], image[:, 1])
        if hpv_logit is None:
            return burden
        return torch.cat([burden, self.passed_on(torch.sigmoid(hpv_logit.float())).unsqueeze(1)], dim=1)

    def tumour_probability(self, image: Tensor) -> Tensor:
        """The segmentation path alone: image (B, 2, R, R, R) -> float32 probability (B, 1, R, R, R).

        Raises:
            RuntimeError: without the segmentation task.
        """
        logits = self.decode(self.encode(image))
        if logits is None:
            raise RuntimeError("this network was built without the 'seg' task and gives no tumour probability")
        return torch.sigmoid(logits.float())

    def survival_weights(self) -> list[nn.Parameter]:
        """The weights that the L2 term of eq. 1 holds down.

        All fully connected ones of the survival branch (three; two without z2), and :meth:`BurdenBranch.held_down`.

        Example:
            >>> [tuple(weight.shape) for weight in MultitaskNet().survival_weights()]
            [(64, 124), (64, 112), (1, 135)]
            >>> [tuple(weight.shape) for weight in MultitaskNet(survival_inputs=["burden"]).survival_weights()]
            [(1, 7)]
        """
        deep = [] if self.survival is None else [weight for weight in self.survival.parameters() if weight.ndim == 2]
        return deep if self.burden is None else [*deep, *self.burden.held_down()]

    def check_shapes(self, image: Tensor, clinical: Tensor | None) -> None:
        """Raise ValueError, saying what would be right, for inputs that the network cannot read."""
        if (
            image.ndim != 5
            or image.shape[1] != self.in_channels
            or any(n % ROI_FACTOR or not n for n in image.shape[2:])
        ):
            raise ValueError(
                f"the image's shape is {tuple(image.shape)}; the network reads (batch, {self.in_channels}, x, y, z) "
                f"with x, y and z multiples of {ROI_FACTOR} (set roi_size accordingly)"
            )
        expected = (image.shape[0], self.clinical_features)
        if clinical is not None and tuple(clinical.shape) != expected:
            raise ValueError(
                f"the clinical values' shape is {tuple(clinical.shape)}; {expected} is expected: one row a case, "
                "one column a feature of the config's list"
            )
        if self.training and TASK_SURV in self.tasks and image.shape[0] < 2:
            raise ValueError(
                "a batch of one case in training mode: survival normalises over the batch and needs at "
                "least two (raise batch_size, or drop the last incomplete batch)"
            )


def set_checkpointing(network: nn.Module, checkpointing: bool) -> None:
    """Whether every level of the U-Net trains in less memory and more time (see :class:`ResidualLevel`)."""
    for module in network.modules():
        if isinstance(module, ResidualLevel):
            module.checkpointing = checkpointing


def fold_norms(network: nn.Module) -> None:
    """Fold each batch norm that follows a convolution directly into it, in place, for inference alone.

    Where an activation lies between the two, or a sum, nothing changes. It does no harm to do it again.

    Example:
        >>> net, image = MultitaskNet().eval(), torch.rand(1, 2, 32, 32, 32)
        >>> with torch.no_grad():
        ...     before, _ = net(image), fold_norms(net)
        ...     torch.allclose(before["log_hazard"], net(image)["log_hazard"], atol=1e-5)
        True
    """
    for module in network.modules():
        if isinstance(module, ResidualConv):
            module.conv, module.norm = fuse(module.conv, module.norm)
        elif isinstance(module, DenseLayer):
            module.bottleneck[2], module.growth[0] = fuse(module.bottleneck[2], module.growth[0])
        elif isinstance(module, LevelSummaries):
            for level in module.levels:
                level[0], level[1] = fuse(level[0], level[1])  # type: ignore[index,operator]


def fuse(convolution: nn.Module, norm: nn.Module) -> tuple[nn.Module, nn.Module]:
    """A convolution that does both, and an identity."""
    if isinstance(norm, nn.Identity):
        return convolution, norm
    return fuse_conv_bn_eval(convolution, norm), nn.Identity()  # type: ignore[type-var,arg-type]


def checked_tasks(tasks: Sequence[str]) -> tuple[str, ...]:
    """The tasks in their fixed order.

    Raises:
        ValueError: where there are none, unknown or repeated ones.

    Example:
        >>> checked_tasks(["surv", "seg"])
        ('seg', 'surv')
    """
    chosen = [tasks] if isinstance(tasks, str) else list(tasks)
    if not chosen or len(set(chosen)) != len(chosen) or not set(chosen) <= set(TASKS):
        raise ValueError(f"tasks is {chosen}; it must name one or more of {', '.join(TASKS)}, each once")
    return tuple(task for task in TASKS if task in chosen)


def checked_inputs(survival_inputs: Sequence[str], tasks: Sequence[str]) -> tuple[str, ...]:
    """What the log hazard is made of, in its fixed order.

    Raises:
        ValueError: where there is nothing, something unknown or repeated, or a burden that no task measures.

    Example:
        >>> checked_inputs(["burden", "deep"], ("seg", "surv"))
        ('deep', 'burden')
    """
    chosen = [survival_inputs] if isinstance(survival_inputs, str) else list(survival_inputs)
    if not chosen or len(set(chosen)) != len(chosen) or not set(chosen) <= set(SURVIVAL_INPUTS):
        raise ValueError(
            f"survival_inputs is {chosen}; it must name one or both of {', '.join(SURVIVAL_INPUTS)}, each once"
        )
    if "burden" in chosen and TASK_SEG not in tasks:
        raise ValueError(
            f"survival_inputs is {chosen} and tasks is {list(tasks)}: without the task 'seg' there is no tumour whose "
            "burden could be measured; set survival_inputs to ['deep']"
        )
    return tuple(name for name in SURVIVAL_INPUTS if name in chosen)


def checked_hpv_inputs(hpv_inputs: Sequence[str]) -> tuple[str, ...]:
    """What the HPV logit is made of, in its fixed order.

    Raises:
        ValueError: where it is unknown or repeated, or the image is not among it.

    Example:
        >>> checked_hpv_inputs(["clinical", "image"])
        ('image', 'clinical')
    """
    chosen = [hpv_inputs] if isinstance(hpv_inputs, str) else list(hpv_inputs)
    if "image" not in chosen or len(set(chosen)) != len(chosen) or not set(chosen) <= set(HPV_INPUTS):
        raise ValueError(f"hpv_inputs is {chosen}; it must be ['image'] or ['image', 'clinical']")
    return tuple(name for name in HPV_INPUTS if name in chosen)


def checked_scales(scales: Sequence[Sequence[float]] | None, clinical_features: int) -> list[Sequence[float]]:
    """The scale of each clinical value, that of a level where none are given.

    Raises:
        ValueError: where they are not three positive numbers for each value.
    """
    checked: list[Sequence[float]] = [LEVEL_SCALE] * clinical_features if scales is None else list(scales)
    if len(checked) != clinical_features or any(len(s) != 3 or min(s) <= 0 for s in checked):
        raise ValueError(
            f"clinical_scales is {scales}; it must give three positive numbers for each of {clinical_features} values"
        )
    return checked


def initialise(module: nn.Module) -> None:
    """Keras' defaults, as in the published network: Glorot uniform weights, zero biases, unit batch norms."""
    if isinstance(module, nn.Conv3d | nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def prior_logit(probability: float) -> float:
    """log(p / (1 - p)).

    Example:
        >>> prior_logit(0.5)
        0.0
    """
    if not 0 < probability < 1:
        raise ValueError(f"seg_prior is {probability}; it must lie between 0 and 1, both excluded")
    return math.log(probability / (1 - probability))
