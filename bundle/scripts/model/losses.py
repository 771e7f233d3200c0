"""Masked losses of the paper: segmentation (eq. 2-5), HPV status (eq. 4, 5), survival (eq. 6), and their sum (eq. 1).

Each label has a "known" flag. Inputs of cases without the label are replaced by zeros (:func:`cleared`) and their loss
is left out of the mean (:func:`mean_of_known`), so that they contribute exactly nothing to value and gradient, even if
their outputs are NaN. A batch without known labels gives an exact zero with a graph, so ``backward`` works. Shapes do
not depend on the flags, so the host need not read them and a GPU never waits. Half precision is computed in float32;
float64 stays.

Where several ranks train together, every loss in training mode is that of the one batch that their batches make up:
means and risk sets are over all ranks, and all ranks get the same value. In evaluation mode it is that of this rank's
batch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from monai.data import MetaTensor
from monai.losses import DiceLoss
from monai.losses.focal_loss import sigmoid_focal_loss
from torch import Tensor, nn

from scripts import keys
from scripts.model.choices import checked_tasks
from scripts.model.ranks import all_ranks, world_size

ALPHA = 0.25  # of the focal losses, eq. 4 and 5: the weight of the positive class
GAMMA = 2.0
L2 = "l2"
UNCERTAINTY = "uncertainty"
CLINICAL_TERM = "hpv_clinical"  # a network's name for it
CLINICAL_RATE = 0.01  # its learning rate: at the network's it stays at a quarter of what a logistic regression gives


class SegmentationLoss(nn.Module):
    r"""Dice with squared denominators plus focal loss, over the cases whose mask is known (eq. 2-5).

    .. math::

        L_{seg} = \frac{1}{|K|} \sum_{k \in K} \Big( 1 - \frac{2 \sum_v p_v g_v + s}{\sum_v p_v^2 + \sum_v g_v^2 + s}
        + \frac{1}{V} \sum_v FL(p_v, g_v) \Big)

    where K are the cases with ``known``, p the sigmoid of ``logits``, g the ``mask``, V the voxels of the box and s
    MONAI's smoothing of 1e-5. The Dice is computed for each case and then averaged, so that small tumours count as much
    as large ones (the paper specifies neither smoothing nor averaging).

    **Classes of tumour.** A network that tells C classes apart gives logits l_c. In a case whose mask does so too, the
    bracket is the mean over the classes, each against the rest, with p_c the softmax of the l_c and of 0 (background):

    .. math:: \frac{1}{C} \sum_c \Big( 1 - Dice(p_c, g_c) + \frac{1}{V} \sum_v FL(p_{c,v}, g_{c,v}) \Big), \quad
        \mathrm{logit}\, p_c = l_c - \log \big( 1 + \sum_{j \ne c} e^{l_j} \big)

    In a case whose mask does not, it is that of the union, as of a network of one class. Both have the same scale, so
    a case counts as much either way.

    Example:
        A case without a mask contributes nothing, even if its logits are NaN:

        >>> logits, mask = torch.randn(2, 1, 4, 4, 4), torch.rand(2, 1, 4, 4, 4).round()
        >>> alone = SegmentationLoss()(logits[:1], mask[:1])
        >>> logits[1] = torch.nan
        >>> bool(SegmentationLoss()(logits, mask, torch.tensor([True, False])) == alone)
        True
    """

    def __init__(self) -> None:
        super().__init__()
        self.dice = DiceLoss(sigmoid=True, squared_pred=True, reduction="none")

    def forward(
        self,
        logits: Tensor,
        mask: Tensor,
        known: Tensor | None = None,
        class_logits: Tensor | None = None,
        classes_known: Tensor | None = None,
    ) -> Tensor:
        """The loss, a scalar.

        Args:
            logits: (B, 1, R, R, R) tumour logits, of the union of the classes.
            mask: (B, 1, R, R, R), 0 for background, k for the k-th class; any value where unknown.
            known: (B,) bool; None if every mask is known.
            class_logits: (B, C, R, R, R); None of a network of one class.
            classes_known: (B,) bool, whether the mask tells the classes apart; None if every mask does.

        Raises:
            ValueError: the shapes differ.
        """
        if class_logits is None:
            known, logits, mask = cleared(known, "tumour logits", logits, mask=mask > 0)
            return self._mean(logits, mask, known)
        mask, known = without_metadata(mask), flags(known, logits)
        truth = torch.cat([mask == k for k in range(1, class_logits.shape[1] + 1)], dim=1)
        apart = known & flags(classes_known, logits)
        merged, union, tumour = cleared(known & ~apart, "tumour logits", logits, mask=mask > 0)
        apart, each, truth = cleared(apart, "logits of the classes", class_logits, **{"masks of the classes": truth})
        parts = (self._mean(union, tumour, merged), self._mean(one_against_rest(each), truth, apart))
        cases = summed(torch.stack([merged.sum(), apart.sum(), known.sum()]), self.training)
        return (cases[0] * parts[0] + cases[1] * parts[1]) / cases[2].clamp(min=1)

    def _mean(self, logits: Tensor, mask: Tensor, known: Tensor) -> Tensor:
        """Dice plus focal loss, each the mean over classes and known cases of (B, C, R, R, R)."""
        mask = mask.to(logits.dtype)
        dice = mean_of_known(self.dice(logits, mask), known, self.training)
        focal = sigmoid_focal_loss(logits, mask, GAMMA, logits.new_full((), ALPHA))
        return dice + mean_of_known(focal, known, self.training)


class HPVLoss(nn.Module):
    r"""Binary focal loss over the cases whose HPV status is known (eq. 4, 5).

    .. math:: FL(p, g) = -\alpha g (1 - p)^\gamma \log p - (1 - \alpha) (1 - g) p^\gamma \log(1 - p)

    Args:
        alpha: weight of HPV-positive cases; negative ones have 1 - alpha.
        gamma: exponent; 0 is the weighted cross entropy.

    Example:
        >>> logit, hpv = torch.randn(5), torch.tensor([0.0, 1.0, 1.0, 0.0, 1.0])
        >>> half_of_bce = 0.5 * nn.functional.binary_cross_entropy_with_logits(logit, hpv)
        >>> torch.testing.assert_close(HPVLoss(alpha=0.5, gamma=0.0)(logit, hpv), half_of_bce)
    """

    def __init__(self, alpha: float = ALPHA, gamma: float = GAMMA) -> None:
        super().__init__()
        self.alpha = alpha
        self.gamma = gamma

    def forward(self, logit: Tensor, hpv: Tensor, known: Tensor | None = None) -> Tensor:
        """The loss, a scalar.

        Args:
            logit: (B,) HPV logits.
            hpv: (B,) in {0, 1}; any value where unknown.
            known: (B,) bool; None if every status is known.

        Raises:
            ValueError: the shapes differ.
        """
        known, logit, hpv = cleared(known, "HPV logits", logit, **{"HPV labels": hpv})
        alpha = logit.new_full((), self.alpha)  # a number would be copied to the GPU, which waits for the host
        focal = sigmoid_focal_loss(logit, hpv.to(logit.dtype), self.gamma, alpha)
        return mean_of_known(focal, known, self.training)


class CoxLoss(nn.Module):
    r"""Cox's negative log partial likelihood of the batch, averaged over its events (eq. 6).

    With ``log_hazard`` h, ``time`` T, ``event`` d and risk sets R_i = {j: T_j >= T_i}:

    .. math:: L = -\frac{1}{\sum_i d_i} \sum_{i: d_i = 1} \Big( h_i - \log \sum_{j \in R_i} e^{h_j} \Big)

    which is Breslow's treatment of tied events. The order of cases is arbitrary. Sums are log-sum-exps, so log hazards
    of +-100 have finite value and gradient.

    References:
        Cox, "Regression models and life-tables", 1972; Breslow, "Covariance analysis of censored survival data", 1974.

    Example:
        >>> h, time, event = torch.randn(6), torch.tensor([3.0, 1.0, 3.0, 2.0, 5.0, 1.0]), torch.arange(6) % 2 == 0
        >>> torch.testing.assert_close(CoxLoss()(h + 50, time, event), CoxLoss()(h, time, event))
    """

    def forward(self, log_hazard: Tensor, time: Tensor, event: Tensor, known: Tensor | None = None) -> Tensor:
        """The loss, a scalar.

        Args:
            log_hazard: (B,) float, higher is worse.
            time: (B,) days to the event or to the last visit; any value where unknown.
            event: (B,) bool, True = relapse.
            known: (B,) bool; None if every outcome is known.

        Raises:
            ValueError: the shapes differ.
        """
        known, log_hazard, time, event = cleared(known, "log hazards", log_hazard, times=time, events=event)
        if self.training and world_size() > 1:
            columns = [column.double() for column in (log_hazard, time, event, known)]  # exact, in one message
            gathered = all_ranks(torch.stack(columns)).transpose(0, 1).flatten(1)
            log_hazard, time, event, known = gathered[0].to(log_hazard.dtype), *gathered[1:3], gathered[3].bool()
        return negative_log_partial_likelihood(log_hazard, time, event.bool(), known)


class MultitaskLoss(nn.Module):
    r"""The sum of the tasks' losses and the L2 term of the survival branch (eq. 1).

    .. math:: L = w_{seg} L_{seg} + w_{hpv} L_{class} + w_{surv} L_{surv} + 0.1 \sum_W \lVert W \rVert_2^2

    where W are the fully connected weights of the survival branch (sum of squares, as Keras' ``l2``; no biases).

    **Learned weights.** With ``task_weights="uncertainty"`` each task has a log variance s, learned with the network:

    .. math:: e^{-s} L_{task} + \frac{s}{2}

    which for a fixed loss is minimal at :math:`s = \log 2 L`. Weights start at 1. A task whose loss is exactly 0 in a
    batch (no known label, no event) does not change its log variance. In evaluation mode the weights are 1, so that
    validation losses of different epochs are comparable. Ranks compute the same loss, so they learn the same weights.
    Given weights, and that of the L2 term, are constant.

    Args:
        tasks: any of "seg", "hpv", "surv".
        survival_weights: ``MultitaskNet.survival_weights()``; none leaves the L2 term out. They are not registered as
            parameters of the loss.
        l2_weight: weight of the L2 term.
        task_weights: weight by task name, by default 1 (no effect for tasks that are not trained); or "uncertainty".
        hpv_alpha: of :class:`HPVLoss`; the paper's 0.25 gives HPV-negative cases three times the weight.
        hpv_gamma: of :class:`HPVLoss`.
        device: of the learned weights: that of the network, which else waits for them.

    Attributes:
        parts: after each call, every unweighted term by name ("seg", "hpv", "surv", "l2"), detached, and learned
            weights ("weight_seg", ...).

    Raises:
        ValueError: unknown tasks or weights.

    References:
        Kendall, Gal, Cipolla, "Multi-task learning using uncertainty to weigh losses for scene geometry and
        semantics", 2018, eq. 10.
    """

    def __init__(
        self,
        tasks: Sequence[str] = keys.TASKS,
        survival_weights: Sequence[nn.Parameter] = (),
        l2_weight: float = 0.1,
        task_weights: Mapping[str, float] | str | None = None,
        hpv_alpha: float = ALPHA,
        hpv_gamma: float = GAMMA,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.tasks = checked_tasks(tasks)
        if task_weights is not None and task_weights != UNCERTAINTY and not isinstance(task_weights, Mapping):
            raise ValueError(f"task_weights is {task_weights!r}; it must be '{UNCERTAINTY}' or a weight by task")
        learned = self.tasks if task_weights == UNCERTAINTY else ()
        self.log_variances = nn.ParameterDict({task: nn.Parameter(torch.zeros((), device=device)) for task in learned})
        weights = {} if isinstance(task_weights, str) else dict(task_weights or {})
        if not set(weights) <= set(keys.TASKS):
            raise ValueError(f"task_weights names {sorted(weights)}; the tasks are {', '.join(keys.TASKS)}")
        self.weights = {task: float(weights.get(task, 1.0)) for task in self.tasks} | {L2: float(l2_weight)}
        self.survival_weights = tuple(survival_weights)  # a tuple, so that they are not registered here
        self.segmentation = SegmentationLoss()
        self.hpv = HPVLoss(hpv_alpha, hpv_gamma)
        self.cox = CoxLoss()
        self.parts: dict[str, Tensor] = {}

    def forward(self, outputs: Mapping[str, Tensor], targets: Mapping[str, Tensor]) -> Tensor:
        """The weighted sum, a scalar; the arguments are those of :meth:`components`."""
        components = self.components(outputs, targets)
        self.parts = {name: value.detach() for name, value in components.items()}
        for task, log_variance in self.log_variances.items():
            self.parts[f"weight_{task}"] = torch.exp(-log_variance.detach())
        return torch.stack([self._weighted(name, value) for name, value in components.items()]).sum()

    def _weighted(self, name: str, value: Tensor) -> Tensor:
        """A term with its weight, and the penalty s / 2 of a learned weight."""
        if name not in self.log_variances or not self.training:
            return self.weights[name] * value
        log_variance = self.log_variances[name].to(value)
        # Without this, the weight of a task without labels in many batches would grow in those batches.
        cost = torch.where(value.detach() != 0, log_variance / 2, 0.0)
        return torch.exp(-log_variance) * value + cost

    def parameter_groups(self, network: nn.Module, task_weights_rate: float) -> list[dict[str, Any]]:
        """Parameter groups of the optimiser, with separate learning rates for parameters that need a higher one.

        Args:
            network: at the optimiser's rate, except its :class:`scripts.model.branches.ClinicalTerm`, at 0.01.
            task_weights_rate: learning rate of the log variances.

        Returns:
            One to three groups, without empty ones.
        """
        term = [p for name, p in network.named_parameters() if CLINICAL_TERM in name.split(".")]
        others = [p for name, p in network.named_parameters() if CLINICAL_TERM not in name.split(".")]
        groups: list[dict[str, Any]] = [{"params": others}]
        if self.log_variances:
            groups.append({"params": list(self.parameters()), "lr": task_weights_rate})
        if term:
            groups.append({"params": term, "lr": CLINICAL_RATE})
        return groups

    def components(self, outputs: Mapping[str, Tensor], targets: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Every unweighted term by name.

        Args:
            outputs: of :class:`scripts.model.networks.MultitaskNet`.
            targets: by the keys of :mod:`scripts.keys`: each task's labels and their "known" flag.

        Raises:
            KeyError: an output or a label of a task is missing.
            ValueError: shapes differ.
        """
        terms: dict[str, Tensor] = {}
        if keys.TASK_SEG in self.tasks:
            mask = (outputs[keys.SEG_LOGITS], targets[keys.SEG], targets[keys.SEG_KNOWN])
            several = keys.CLASS_LOGITS in outputs
            classes = (outputs[keys.CLASS_LOGITS], targets[keys.SEG_CLASSES_KNOWN]) if several else ()
            terms[keys.TASK_SEG] = self.segmentation(*mask, *classes)
        if keys.TASK_HPV in self.tasks:
            terms[keys.TASK_HPV] = self.hpv(outputs[keys.HPV_LOGIT], targets[keys.HPV], targets[keys.HPV_KNOWN])
        if keys.TASK_SURV in self.tasks:
            terms[keys.TASK_SURV] = self.cox(
                outputs[keys.LOG_HAZARD], targets[keys.TIME], targets[keys.EVENT], targets[keys.SURV_KNOWN]
            )
        if self.survival_weights:
            terms[L2] = torch.stack([at_least_float32(w).square().sum() for w in self.survival_weights]).sum()
        return terms


def negative_log_partial_likelihood(log_hazard: Tensor, time: Tensor, event: Tensor, known: Tensor) -> Tensor:
    """The formula of :class:`CoxLoss`.

    Args:
        log_hazard: (N,) float32 or float64.
        time: (N,).
        event: (N,) bool.
        known: (N,) bool: the cases that count.

    Returns:
        A scalar; an exact zero with a graph if there is no event. Time and memory are O(N * N).

    Example:
        >>> event, known = torch.tensor([True, False]), torch.tensor([True, True])
        >>> negative_log_partial_likelihood(torch.zeros(2), torch.tensor([1.0, 2.0]), event, known).exp()
        tensor(2.)
    """
    event = event & known
    log_hazard = torch.where(event.any(), log_hazard, 0.0)  # without an event not even NaN counts
    # A case is at risk at its own time. That of cases that do not count keeps the sums finite; they are left out below.
    at_risk = (known & (time >= time.unsqueeze(1))) | torch.eye(len(time), dtype=torch.bool, device=time.device)
    log_total = torch.where(at_risk, log_hazard, -torch.inf).logsumexp(dim=1)
    return mean_of_known(log_total - log_hazard, event)


def summed(values: Tensor, over_ranks: bool) -> Tensor:
    """``values``, or with ``over_ranks`` their sum over the ranks."""
    return all_ranks(values).sum(dim=0) if over_ranks and world_size() > 1 else values


def mean_of_known(values: Tensor, known: Tensor, over_ranks: bool = False) -> Tensor:
    """Mean of finite ``values`` (B, ...) over the cases with ``known`` (B,); an exact zero with a graph without any.

    Args:
        values: of each case.
        known: bool.
        over_ranks: over the cases of all ranks instead of this one's.
    """
    cases = known.reshape(-1, *[1] * (values.ndim - 1))
    total, count = torch.where(cases, values, 0.0).sum(), known.sum()
    if over_ranks and world_size() > 1:
        total, count = summed(torch.stack([total, count.to(total.dtype)]), over_ranks)
    return total / (count * values.shape[1:].numel()).clamp(min=1)


def one_against_rest(logits: Tensor) -> Tensor:
    r"""Logits of each class against background and all others, from the classes' logits (B, C, ...) against background.

    .. math:: z_c = l_c - \log \big( 1 + \sum_{j \ne c} e^{l_j} \big)

    Example:
        >>> logits = torch.randn(2, 2, 3)
        >>> softmax = torch.softmax(torch.cat([torch.zeros(2, 1, 3), logits], dim=1), dim=1)[:, 1:]
        >>> torch.testing.assert_close(torch.sigmoid(one_against_rest(logits)), softmax)
    """
    background = torch.zeros_like(logits[:, :1])
    columns = [background, *logits.split(1, dim=1)]
    rest = [torch.cat(columns[:c] + columns[c + 1 :], dim=1) for c in range(1, len(columns))]
    return logits - torch.stack([others.logsumexp(dim=1) for others in rest], dim=1)


def flags(known: Tensor | None, output: Tensor) -> Tensor:
    """One flag a case, (B,) bool on the output's device; all are True for None.

    Raises:
        ValueError: there is not one for each case.
    """
    if known is None:
        return output.new_ones(output.shape[:1], dtype=torch.bool)
    known = without_metadata(known).to(output.device).bool()
    if known.shape != output.shape[:1]:
        raise ValueError(f"known has shape {tuple(known.shape)}; one flag a case, {tuple(output.shape[:1])}, is needed")
    return known


def cleared(known: Tensor | None, name: str, output: Tensor, **labels: Tensor) -> tuple[Tensor, ...]:
    """The flags (B,), the output (at least in float32) and its labels, both with zeros for the cases not known.

    The zeros keep NaN of those cases out of the loss and of the gradient.

    Raises:
        ValueError: a label has another shape, or ``known`` does not have one flag for each case.
    """
    for label, values in labels.items():
        if values.shape != output.shape:
            raise ValueError(f"{name} have shape {tuple(output.shape)} but {label} {tuple(values.shape)}")
    output, *rest = (without_metadata(tensor) for tensor in (output, *labels.values()))
    output = at_least_float32(output)
    rest = [label.to(output.device) for label in rest]
    if known is None:
        return (flags(known, output), output, *rest)
    known = flags(known, output)
    cases = known.reshape(-1, *[1] * (output.ndim - 1))
    return (known, *(torch.where(cases, tensor, torch.zeros_like(tensor)) for tensor in (output, *rest)))


def without_metadata(tensor: Tensor) -> Tensor:
    """The tensor without MONAI's metadata."""
    return tensor.as_tensor() if isinstance(tensor, MetaTensor) else tensor


def at_least_float32(tensor: Tensor) -> Tensor:
    """Half precision to float32; float32 and float64 as they are."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
