"""Dice (eq. 8) and balanced accuracy (eq. 9) as functions; these and the C-index (eq. 7) as MONAI metrics.

The metrics collect one row for each case of an epoch, gather the rows of all ranks, and compute once. Cases with an
unknown label (NaN) are left out; without known labels the result is NaN. Every rank must call ``aggregate``, also one
without cases.
"""

from __future__ import annotations

from typing import Any

import torch
from monai.metrics import CumulativeIterationMetric, compute_dice
from monai.metrics.confusion_matrix import compute_confusion_matrix_metric, get_confusion_matrix
from torch import Tensor

from scripts.cohorts.thresholds import HALF, above
from scripts.model.losses import without_metadata
from scripts.training.concordance import concordance_index


def dice_scores(prediction: Tensor, mask: Tensor) -> Tensor:
    r"""Dice of each case (eq. 8).

    .. math:: DSC = \frac{2 |P \cap G|}{|P| + |G|}

    Args:
        prediction: (B, 1, ...) in {0, 1}.
        mask: (B, 1, ...) in {0, 1}.

    Returns:
        (B, 1); 1 if both are empty, 0 if only the mask is.

    Raises:
        ValueError: the shapes differ or the prediction is not binary.

    Example:
        >>> empty, full = torch.zeros(1, 1, 2, 2), torch.ones(1, 1, 2, 2)
        >>> [dice_scores(p, g).item() for p, g in ((empty, empty), (full, empty), (full, full))]
        [1.0, 0.0, 1.0]
    """
    if prediction.shape != mask.shape:
        raise ValueError(f"prediction has shape {tuple(prediction.shape)} but mask {tuple(mask.shape)}")
    if not ((prediction == 0) | (prediction == 1)).all():
        raise ValueError("the prediction holds values other than 0 and 1; threshold the probability first")
    return compute_dice(prediction.float(), mask.float(), include_background=True, ignore_empty=False)


def balanced_accuracy(probability: Tensor, label: Tensor, threshold: float = HALF) -> float:
    """Mean of sensitivity and specificity (eq. 9).

    Args:
        probability: (N,) of the positive class.
        label: (N,) in {0, 1}.
        threshold: above which it is called positive.

    Returns:
        A number in [0, 1]; NaN if one of the classes is absent.

    Raises:
        ValueError: the shapes differ or a probability is NaN.

    Example:
        Calling all cases positive is chance:

        >>> balanced_accuracy(torch.ones(4), torch.tensor([1.0, 1.0, 1.0, 0.0]))
        0.5
    """
    if probability.shape != label.shape:
        raise ValueError(f"probability has shape {tuple(probability.shape)} but label {tuple(label.shape)}")
    if torch.isnan(probability).any():
        raise ValueError(f"{int(torch.isnan(probability).sum())} of {len(probability)} probabilities are NaN")
    if not len(label):
        return float("nan")
    positive = above(probability, threshold).float().reshape(-1, 1)
    counts = get_confusion_matrix(positive, label.float().reshape(-1, 1)).sum(dim=(0, 1))
    return float(compute_confusion_matrix_metric("balanced accuracy", counts))


class _CaseMetric(CumulativeIterationMetric):
    """A metric that collects one row of numbers for each case: the prediction, then ``columns - 1`` labels."""

    columns: int

    def _compute_tensor(self, y_pred: Tensor, y: Tensor | None = None, **kwargs: Any) -> Tensor:
        """(B, columns) float64 on the CPU; every label of a case is NaN where one of them is."""
        shapes = (tuple(y_pred.shape), None if y is None else tuple(y.shape))
        needed = ((len(y_pred), 1), (len(y_pred), self.columns - 1))
        if y is None or shapes != needed:
            raise ValueError(f"y_pred and y have shapes {shapes}; {needed[0]} and {needed[1]} are needed")
        labels = y.cpu().double()
        unknown = torch.isnan(labels).any(dim=1, keepdim=True)
        return torch.cat([y_pred.cpu().double(), labels.masked_fill(unknown, torch.nan)], dim=1)

    def _rows(self) -> Tensor:
        """(N, columns) rows of all ranks and of the whole epoch, unknown cases (NaN) left out."""
        if self._buffers is None:
            # The gathering is collective: a rank that saw no case joins it with an unknown one.
            self.extend(torch.full((1, self.columns), torch.nan, dtype=torch.float64))
        rows = self.get_buffer()
        return rows[~torch.isnan(rows[:, -1])]


class ConcordanceIndexMetric(_CaseMetric):
    """:func:`.concordance_index` of an epoch.

    Called with ``y_pred`` (B, 1), the log hazard or another risk, and ``y`` (B, 2), time and event, NaN where unknown.

    Example:
        >>> metric = ConcordanceIndexMetric()
        >>> y = torch.tensor([[3.0, 1.0], [5.0, 0.0], [torch.nan, torch.nan]])
        >>> _ = metric(y_pred=torch.tensor([[0.7], [0.1], [9.0]]), y=y)
        >>> metric.aggregate()
        tensor(1., dtype=torch.float64)
    """

    columns = 3

    def aggregate(self) -> Tensor:
        """The index, a scalar; NaN where no pair is comparable."""
        risk, time, event = self._rows().unbind(dim=1)
        return torch.tensor(concordance_index(time, event, risk), dtype=torch.float64)


class BalancedAccuracyMetric(_CaseMetric):
    """:func:`balanced_accuracy` of an epoch, at the threshold 0.5.

    Called with ``y_pred`` (B, 1), the probability of the positive class, and ``y`` (B, 1) in {0, 1}, NaN where unknown.
    """

    columns = 2

    def aggregate(self) -> Tensor:
        """The balanced accuracy, a scalar; NaN where one of the classes is absent."""
        probability, label = self._rows().unbind(dim=1)
        return torch.tensor(balanced_accuracy(probability, label), dtype=torch.float64)


class MaskedDiceMetric(_CaseMetric):
    """Mean of :func:`dice_scores` over the cases that have a mask.

    Called with ``y_pred`` (B, 1, ...) in {0, 1} and ``y`` (B, 1, ...) in {0, 1}; a case with NaN anywhere in ``y`` has
    no mask, which is not the same as an empty one. ``get_buffer`` gives the Dice of each case, NaN where unknown.
    (MONAI's ``DiceMetric`` scores a mask of NaN as 0, and its mean over no known case is 0.)

    Example:
        >>> metric = MaskedDiceMetric()
        >>> mask = torch.stack([torch.ones(1, 2, 2), torch.full((1, 2, 2), torch.nan)])
        >>> metric(y_pred=torch.ones(2, 1, 2, 2), y=mask).flatten().tolist()
        [1.0, nan]
        >>> metric.aggregate()
        tensor(1., dtype=torch.float64)
    """

    columns = 1

    def _compute_tensor(self, y_pred: Tensor, y: Tensor | None = None, **kwargs: Any) -> Tensor:
        """(B, 1): Dice."""
        if y is None or y.shape != y_pred.shape:
            raise ValueError(f"y_pred has shape {tuple(y_pred.shape)} but y {None if y is None else tuple(y.shape)}")
        y_pred, y = without_metadata(y_pred), without_metadata(y)
        known = ~torch.isnan(y.flatten(start_dim=1)).any(dim=1)
        scores = torch.full((len(y), 1), torch.nan, dtype=torch.float64)
        if known.any():
            scores[known.cpu()] = dice_scores(y_pred[known], y[known]).to(scores)
        return scores

    def aggregate(self) -> Tensor:
        """The mean, a scalar; NaN where no case has a mask."""
        return self._rows().mean()
