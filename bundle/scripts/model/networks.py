"""The multitask network: tumour segmentation, HPV status and the hazard of relapse from one PET/CT.

Parts of :mod:`scripts.model.unet` and :mod:`scripts.model.branches` meet in :class:`MultitaskNet`:

* :class:`Encoder` and :class:`Decoder`, a 3D U-Net of residual convolutions, give the tumour probability map, and
  the encoder's five levels give ``z1`` (:class:`LevelSummaries`, 124 features);
* :class:`HPVBranch`, a 3D DenseNet on PET, CT and the tumour probability map, gives the HPV logit and ``z2``
  (112 features); where wanted, :class:`ClinicalTerm` adds what the clinical values tell of HPV status;
* :class:`SurvivalBranch` turns ``z1``, ``z2`` and the clinical values ``z3`` into the log hazard; instead of it
  :class:`BurdenBranch` does so from few values: the burden of the tumour that was found, the HPV probability and
  ``z3``.

Source: "Enhancing Survival Outcomes in Head and Neck Cancer through Joint HPV Classification and Tumor Segmentation"
(HECKTOR 2025), but for the burden and the clinical term, which are ours. Shapes below: ``B`` cases, ``R`` voxels along
an edge of the box, ``C`` channels, ``F`` clinical values.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from scripts.keys import FEATURES, HPV_LOGIT, LOG_HAZARD, SEG_LOGITS, TASK_SEG, TASK_SURV, TASKS
from scripts.model.branches import (
    BURDEN_FEATURES,
    BurdenBranch,
    ClinicalTerm,
    DenseLayer,
    HPVBranch,
    SurvivalBranch,
    tumour_burden,
)
from scripts.model.layers import fuse, initialise
from scripts.model.unet import ROI_FACTOR, Decoder, Encoder, LevelSummaries, ResidualConv

__all__ = ["HPV_INPUTS", "MASK_GRADIENTS", "SURVIVAL_INPUTS", "MultitaskNet"]

MASK_GRADIENTS = ("stop", "flow")
SURVIVAL_INPUTS = ("deep", "burden")
HPV_INPUTS = ("image", "clinical")
LEVEL_SCALE = (1.0, 1.0, 1.0)  # of a clinical value that is a level, coded 1, 2, ...; see ClinicalTerm


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
            paper's :class:`SurvivalBranch`) or "burden" (:class:`BurdenBranch`, needs the segmentation).
        hpv_inputs: what the HPV logit is made of: "image" (the paper's :class:`HPVBranch`) alone, or with "clinical"
            (:class:`ClinicalTerm`) on top.
        clinical_scales: of each clinical value for :class:`ClinicalTerm`, as
            :func:`scripts.cohorts.clinical.clinical_scales` gives them; None where all are levels.
        in_channels: image channels, in the order CT, PET. The HPV branch reads them in the paper's order, PET first.
        bn_momentum: momentum of every batch norm, in torch's sense (Keras' 0.99 is 0.01 here).
        bn_eps: epsilon of every batch norm (Keras: 1e-3).
        dropout: dropout of the survival branch.
        dense_dropout: dropout of the HPV branch's dense layers.

    Raises:
        ValueError: for unknown, repeated or no tasks, an unknown ``mask_gradient``, ``survival_inputs`` that are
            unknown or that the tasks cannot give, ``hpv_inputs`` that are unknown or lack the image, or
            ``clinical_scales`` of another number of values.

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
        if self.survival is not None:
            log_hazard = self.survival(features, clinical)
        elif self.burden is not None and probability is not None:
            features.append(self.measure(image, probability, hpv_logit))
            log_hazard = self.burden(features[-1], clinical)
        else:
            return seg_logits, hpv_logit, None, None
        return seg_logits, hpv_logit, log_hazard, torch.cat(features, dim=1).detach().float()

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

        All fully connected ones of the survival branch (three; two without z2), or :meth:`BurdenBranch.held_down`.

        Example:
            >>> [tuple(weight.shape) for weight in MultitaskNet().survival_weights()]
            [(64, 124), (64, 112), (1, 135)]
            >>> [tuple(weight.shape) for weight in MultitaskNet(survival_inputs=["burden"]).survival_weights()]
            [(1, 7)]
        """
        if self.survival is not None:
            return [weight for weight in self.survival.parameters() if weight.ndim == 2]
        return [] if self.burden is None else self.burden.held_down()

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
    """What the log hazard is made of.

    Raises:
        ValueError: where it is not exactly one known input, or a burden that no task measures.

    Example:
        >>> checked_inputs(["burden"], ("seg", "surv"))
        ('burden',)
    """
    chosen = [survival_inputs] if isinstance(survival_inputs, str) else list(survival_inputs)
    if len(chosen) != 1 or chosen[0] not in SURVIVAL_INPUTS:
        raise ValueError(f"survival_inputs is {chosen}; it must be ['deep'] or ['burden'], not both")
    if "burden" in chosen and TASK_SEG not in tasks:
        raise ValueError(
            f"survival_inputs is {chosen} and tasks is {list(tasks)}: without the task 'seg' there is no tumour whose "
            "burden could be measured; set survival_inputs to ['deep']"
        )
    return tuple(chosen)


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
