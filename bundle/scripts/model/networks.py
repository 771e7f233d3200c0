"""The multitask network: tumour segmentation, HPV status and log hazard of relapse from one PET/CT.

* :class:`Encoder` and :class:`Decoder`, a 3D U-Net of residual convolutions: tumour probability map, of one class or
  of primary tumour and nodes apart, and from the encoder's five levels ``z1`` (:class:`LevelSummaries`, 124 features);
* :class:`HPVBranch`, a 3D DenseNet on PET, CT and the tumour probability map: HPV logit and ``z2`` (112 features);
  optionally :class:`ClinicalTerm` adds a logistic regression on the clinical values to the logit;
* :class:`SurvivalBranch`: log hazard from ``z1``, ``z2`` and the clinical values ``z3``; or :class:`BurdenBranch`: log
  hazard from volume and uptake of the segmented tumour, the HPV probability and ``z3``.

Source: "Enhancing Survival Outcomes in Head and Neck Cancer through Joint HPV Classification and Tumor Segmentation"
(HECKTOR 2025); burden, clinical term and classes of tumour are additions. Shapes: ``B`` cases, ``R`` voxels along an
edge of the box, ``C`` channels, ``F`` clinical values.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from scripts.keys import CLASS_LOGITS, FEATURES, HPV_LOGIT, LOG_HAZARD, SEG_LOGITS, TASK_SURV, TASKS
from scripts.model.branches import (
    BURDEN_FEATURES,
    BurdenBranch,
    ClinicalTerm,
    DenseLayer,
    HPVBranch,
    SurvivalBranch,
    tumour_burden,
)
from scripts.model.choices import SURVIVAL_INPUTS, checked_hpv_inputs, checked_inputs, checked_tasks
from scripts.model.layers import fuse, initialise
from scripts.model.unet import ROI_FACTOR, Decoder, Encoder, LevelSummaries, ResidualConv

IN_CHANNELS = 2  # CT, PET; the HPV branch reads them in the paper's order, PET first
MASK_GRADIENTS = ("stop", "flow")
LEVEL_SCALE = (1.0, 1.0, 1.0)  # of a clinical value that is a level, coded 1, 2, ...; see ClinicalTerm


class MultitaskNet(nn.Module):
    """Segmentation, HPV status and log hazard from one PET/CT and the clinical values.

    Branches of missing tasks are not built: without ``seg`` there is no decoder, and the HPV branch reads PET and CT
    only; without ``hpv`` survival has neither ``z2`` nor HPV probability; without ``surv`` there is no ``z1``;
    ``("hpv",)`` has no encoder. In training mode survival normalises over the batch and needs at least two cases.

    **Classes of tumour.** The decoder gives a logit l_c of each class c against the background. Classes exclude each
    other: the probabilities are the softmax of the l_c and of 0 for the background. HPV branch, survival and all other
    readers get the union, whose logit and probability are

        l = log sum_c exp(l_c),  p = sigmoid(l) = sum_c exp(l_c) / (1 + sum_c exp(l_c))

    With one class l is l_c itself.

    Args:
        clinical_features: number F of clinical values.
        tasks: any of "seg", "hpv", "surv".
        seg_classes: number of classes of tumour.
        mask_gradient: "stop" detaches the probability map from the HPV and survival losses, and the HPV probability
            from the survival loss; "flow" is the published setting. May be changed between steps.
        survival_inputs: inputs of the log hazard besides the clinical values: "deep" (``z1`` and ``z2``, the paper's
            :class:`SurvivalBranch`) or "burden" (:class:`BurdenBranch`, needs the segmentation).
        hpv_inputs: inputs of the HPV logit: "image" (the paper's :class:`HPVBranch`), or with "clinical"
            (:class:`ClinicalTerm`) added.
        clinical_scales: of each clinical value for :class:`ClinicalTerm`, of
            :func:`scripts.cohorts.clinical.clinical_scales`; None if all are levels.
        tumour_prior: the tumour probability of every voxel before training, of all classes together: the layer of the
            logits starts with zero weights (Lin et al., "Focal Loss for Dense Object Detection", 2017). None: with
            random weights, as published, for which some seeds start with a probability of 1 everywhere and end with 0.
        bn_momentum: momentum of every batch norm, in torch's sense (Keras' 0.99 is 0.01 here).
        bn_eps: epsilon of every batch norm (Keras: 1e-3).
        dropout: dropout of the survival branch.
        dense_dropout: dropout of the HPV branch's dense layers.

    Raises:
        ValueError: unknown, repeated or no tasks, an unknown ``mask_gradient``, ``survival_inputs`` that are unknown or
            need another task, ``hpv_inputs`` that are unknown or lack the image, ``clinical_scales`` of another
            number of values, or a ``tumour_prior`` that is no probability between 0 and 1.

    Example:
        Missing clinical values are coded as zeros:

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
        seg_classes: int = 1,
        mask_gradient: str = "stop",
        survival_inputs: Sequence[str] = ("deep",),
        hpv_inputs: Sequence[str] = ("image",),
        clinical_scales: Sequence[Sequence[float]] | None = None,
        tumour_prior: float | None = None,
        bn_momentum: float = 0.1,
        bn_eps: float = 1e-5,
        dropout: float = 0.5,
        dense_dropout: float = 0.05,
    ) -> None:
        super().__init__()
        self.tasks = checked_tasks(tasks)
        self.clinical_features = clinical_features
        self.seg_classes = seg_classes
        self.mask_gradient = mask_gradient
        bn = (bn_momentum, bn_eps)
        seg, hpv, surv = (task in self.tasks for task in TASKS)
        self.encoder = Encoder(IN_CHANNELS, bn) if seg or surv else None
        self.decoder = Decoder(bn, seg_classes) if seg else None
        self.survival_inputs = checked_inputs(survival_inputs, self.tasks) if surv else ()
        deep, burden = (name in self.survival_inputs for name in SURVIVAL_INPUTS)
        self.hpv = HPVBranch(IN_CHANNELS + int(seg), deep, dense_dropout, bn) if hpv else None
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
        if self.decoder is not None and tumour_prior is not None:
            self.decoder.start_at(tumour_prior)

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
        """Outputs of all tasks for a batch.

        Args:
            image: (B, 2, R, R, R), channel 0 CT, channel 1 PET; R (each edge) divisible by 16.
            clinical: (B, F) coded clinical values, 0 where missing; None if all are missing.

        Returns:
            ``seg_logits`` (B, 1, R, R, R) of the union, ``hpv_logit`` (B,), ``log_hazard`` (B,), each only with its
            task; with several classes ``class_logits`` (B, C, R, R, R); with ``surv`` also ``features`` (B, ...),
            detached: z1, z2 and burden, if computed (236 for the paper's network).

        Raises:
            ValueError: image or clinical values of the wrong shape, or a single case in training mode.
        """
        self.check_shapes(image, clinical)
        class_logits, hpv_logit, log_hazard, features = self.heads(image, clinical)
        outputs = {HPV_LOGIT: hpv_logit, LOG_HAZARD: log_hazard, FEATURES: features}
        if class_logits is not None:
            classes = {CLASS_LOGITS: class_logits} if self.seg_classes > 1 else {}
            outputs = {SEG_LOGITS: self.union(class_logits), **classes, **outputs}
        return {name: value for name, value in outputs.items() if value is not None}

    def heads(
        self, image: Tensor, clinical: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
        """Logits of the classes (B, C, R, R, R), HPV logit, log hazard, features; None without the task.

        :meth:`forward` as exporters can trace it.
        """
        maps = self.encode(image)
        class_logits = self.decode(maps)
        probability = self.probability(class_logits)
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
            return class_logits, hpv_logit, None, None
        return class_logits, hpv_logit, log_hazard, torch.cat(features, dim=1).detach().float()

    def encode(self, image: Tensor) -> list[Tensor]:
        """The encoder's five feature maps; empty if no task needs them."""
        if self.encoder is None:
            return []
        return self.encoder(image)

    def decode(self, features: list[Tensor]) -> Tensor | None:
        """Logits of the classes (B, C, R, R, R), or None without the segmentation task."""
        if self.decoder is None:
            return None
        return self.decoder(features)

    def union(self, class_logits: Tensor) -> Tensor:
        """Tumour logit (B, 1, R, R, R) of any class, from those of the classes (B, C, R, R, R)."""
        if self.seg_classes == 1:
            return class_logits
        return torch.logsumexp(class_logits.float(), dim=1, keepdim=True)

    def probability(self, class_logits: Tensor | None) -> Tensor | None:
        """Tumour probability (B, 1, R, R, R) for the other branches, or None without the segmentation task."""
        if class_logits is None:
            return None
        return self.passed_on(torch.sigmoid(self.union(class_logits)))

    def passed_on(self, estimate: Tensor) -> Tensor:
        """One task's estimate for another task, detached if ``mask_gradient`` is "stop"."""
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
        """The deep features: z1 (B, 124), if the survival branch reads it, and z2, if there is an HPV branch."""
        deep: list[Tensor] = []
        if self.summaries is not None:
            deep.append(self.summaries(maps))
        if z2 is not None:
            deep.append(z2)
        return deep

    def measure(self, image: Tensor, probability: Tensor, hpv_logit: Tensor | None) -> Tensor:
        """Input of the burden branch: :func:`tumour_burden` and the HPV probability, (B, 4; 3 without HPV task)."""
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
        return torch.sigmoid(self.union(logits.float()))

    def survival_weights(self) -> list[nn.Parameter]:
        """The weights in the L2 term of eq. 1.

        All fully connected ones of the survival branch (three; two without z2), or
        :meth:`BurdenBranch.regularised_weights`.

        Example:
            >>> [tuple(weight.shape) for weight in MultitaskNet().survival_weights()]
            [(64, 124), (64, 112), (1, 135)]
            >>> [tuple(weight.shape) for weight in MultitaskNet(survival_inputs=["burden"]).survival_weights()]
            [(1, 7)]
        """
        if self.survival is not None:
            return [weight for weight in self.survival.parameters() if weight.ndim == 2]
        return [] if self.burden is None else self.burden.regularised_weights()

    def check_shapes(self, image: Tensor, clinical: Tensor | None) -> None:
        """Raise ValueError, with the expected shape, for inputs of the wrong shape."""
        edges_fit = all(n and n % ROI_FACTOR == 0 for n in image.shape[2:])
        if image.ndim != 5 or image.shape[1] != IN_CHANNELS or not edges_fit:
            raise ValueError(
                f"the image's shape is {tuple(image.shape)}; the network reads (batch, {IN_CHANNELS}, x, y, z) "
                f"with x, y and z multiples of {ROI_FACTOR} (set roi_size accordingly)"
            )
        expected = (image.shape[0], self.clinical_features)
        if clinical is not None and tuple(clinical.shape) != expected:
            raise ValueError(
                f"the clinical values' shape is {tuple(clinical.shape)}; {expected} is expected: one row for each "
                "case, one column for each feature of the config's list"
            )
        if self.training and TASK_SURV in self.tasks and image.shape[0] < 2:
            raise ValueError(
                "a batch of one case in training mode: survival normalises over the batch and needs at "
                "least two (raise batch_size, or drop the last incomplete batch)"
            )


def class_probabilities(seg_logits: Tensor, class_logits: Tensor) -> Tensor:
    """Probabilities (B, C, ...) of the classes from the logits of their union (B, 1, ...) and their own (B, C, ...).

    Example:
        >>> class_probabilities(torch.zeros(1, 1), torch.tensor([[0.5, 0.5]]).log())
        tensor([[0.2500, 0.2500]])
    """
    return torch.sigmoid(seg_logits) * torch.softmax(class_logits, dim=1)


def fold_norms(network: nn.Module) -> None:
    """Fold each batch norm that directly follows a convolution into it, in place, for inference; repeatable.

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


def checked_scales(scales: Sequence[Sequence[float]] | None, clinical_features: int) -> list[Sequence[float]]:
    """The scale of each clinical value; by default that of a level.

    Raises:
        ValueError: not three positive numbers for each value.
    """
    checked: list[Sequence[float]] = [LEVEL_SCALE] * clinical_features if scales is None else list(scales)
    if len(checked) != clinical_features or any(len(s) != 3 or min(s) <= 0 for s in checked):
        raise ValueError(
            f"clinical_scales is {scales}; it must give three positive numbers for each of {clinical_features} values"
        )
    return checked
