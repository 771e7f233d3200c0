"""When a probability counts as positive: one rule for masks and HPV status, in training, evaluation and prediction."""

from __future__ import annotations

from typing import TypeVar

import numpy as np
import torch

HALF = 0.5
"""The threshold of the masks, and of HPV status where a model has none of its own."""

Probability = TypeVar("Probability", float, np.ndarray, torch.Tensor)


def above(probability: Probability, threshold: float | np.ndarray = HALF) -> Probability:
    """Whether a probability is positive: above the threshold, and not at it.

    Args:
        probability: a number, an array or a tensor.
        threshold: one for all, or an array of the same shape.

    Returns:
        bool, of the same shape.

    Example:
        >>> above(0.5), above(0.51), above(0.3, 0.25)
        (False, True, True)
    """
    return probability > threshold  # type: ignore[return-value]
