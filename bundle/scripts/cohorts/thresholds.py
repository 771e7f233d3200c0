"""The threshold rule for masks and HPV status, the same in training, evaluation and prediction."""

from __future__ import annotations

from typing import TypeVar

import numpy as np
import torch

HALF = 0.5
"""The threshold of masks, and of HPV status where a model does not define one."""

Probability = TypeVar("Probability", float, np.ndarray, torch.Tensor)


def above(probability: Probability, threshold: float | np.ndarray = HALF) -> Probability:
    """Whether a probability is above the threshold (at the threshold it is negative).

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
