"""The threshold rule for masks and HPV status, the same in training, evaluation and prediction."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

import numpy as np

if TYPE_CHECKING:
    import torch

HALF = 0.5
"""The threshold of masks, and of HPV status where a model does not define one."""

Probability = TypeVar("Probability", float, np.ndarray, "torch.Tensor")


def above(probability: Probability, threshold: float | np.ndarray = HALF) -> Probability:
    """Whether a number, array or tensor is above the threshold or thresholds (at them: not); bool, of its shape.

    Example:
        >>> above(0.5), above(0.51), above(0.3, 0.25)
        (False, True, True)
    """
    return probability > threshold  # type: ignore[return-value]


def label_map(
    tumour: torch.Tensor, classes: torch.Tensor | None = None, dim: int = 1, threshold: float = HALF
) -> torch.Tensor:
    """The mask of a tumour probability: 0, or k for the k-th class where tumour of any class is above the threshold.

    Args:
        tumour: (B, 1, ...) probability of tumour of any class.
        classes: (B, C, ...) probability of each class, of which the highest is taken (the first of equal ones); None of
            a model of one class.
        dim: of the classes.
        threshold: for ``tumour``.

    Returns:
        (B, 1, ...) uint8.

    Example:
        >>> import torch
        >>> label_map(torch.tensor([[0.4], [0.6], [0.6]]), torch.tensor([[0.1, 0.3], [0.4, 0.2], [0.2, 0.4]])).flatten()
        tensor([0, 1, 2], dtype=torch.uint8)
    """
    labels = above(tumour, threshold).byte()
    return labels if classes is None else labels * (1 + classes.argmax(dim=dim, keepdim=True)).byte()
