"""Concordance of a risk with survival: comparable pairs of patients, and the share that the risk orders correctly.

lifelines has the same index, but raises without a comparable pair, loops in Python and has no weighted pairs.
"""

from __future__ import annotations

from typing import Any

import numpy as np

PAIRS_AT_ONCE = 2**24  # bounds the memory of concordance_index


def concordance_index(time: Any, event: Any, risk: Any) -> float:
    r"""Harrell's concordance index: the share of comparable pairs that the risk orders correctly (eq. 7).

    .. math:: C = \frac{\sum_{(i, j)} 1[r_i > r_j] + \frac{1}{2} 1[r_i = r_j]}{\sum_{(i, j)} 1}

    over the pairs of :func:`comparable_pairs` (lifelines' semantics).

    Args:
        time: (N,) array or tensor, time to the event or to the last visit.
        event: (N,) bool or 0/1, True = event.
        risk: (N,) any score, higher = earlier event.

    Returns:
        A number in [0, 1]; 0.5 is chance; NaN without a comparable pair.

    Raises:
        ValueError: the lengths differ or a value is NaN.

    Example:
        The indices of a risk and of its negative add up to 1:

        >>> time, event, risk = [5, 3, 8, 1], [1, 0, 0, 1], [0.2, 0.9, 0.1, 0.4]
        >>> concordance_index(time, event, risk) + concordance_index(time, event, [-r for r in risk])
        1.0
    """
    time, event, risk = (_as_vector(name, v) for name, v in (("time", time), ("event", event), ("risk", risk)))
    if not len(time) == len(event) == len(risk):
        raise ValueError(f"time, event and risk have {len(time)}, {len(event)} and {len(risk)} values")
    event = event.astype(bool)
    comparable, concordant = 0, 0.0
    event_rows = np.flatnonzero(event)
    step = max(1, PAIRS_AT_ONCE // max(1, len(time)))
    for start in range(0, len(event_rows), step):
        rows = event_rows[start : start + step]
        pairs = comparable_pairs(time, event, rows)
        higher, equal = _order(risk, rows)
        comparable += int(np.count_nonzero(pairs))
        concordant += float(np.count_nonzero(pairs & higher) + np.count_nonzero(pairs & equal) / 2)
    return concordant / comparable if comparable else float("nan")


def comparable_pairs(time: np.ndarray, event: np.ndarray, rows: np.ndarray | slice = slice(None)) -> np.ndarray:
    """Whether patient i had the event before j, or before j was censored.

    That is ``time_i < time_j``, or ``time_i = time_j`` and j is censored. Two events at one time are not comparable.

    Args:
        time: (N,) time to the event or to the last visit.
        event: (N,) bool, True = event.
        rows: the patients i; all by default.

    Returns:
        (R, N) bool, a row for each of ``rows``.
    """
    first = time[rows, None]
    return event[rows, None] & ((time > first) | ((time == first) & ~event))


def resampled_concordance(draws: np.ndarray, pairs: np.ndarray, risk: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    r"""Numerator and denominator of a concordance in each draw of a bootstrap.

    .. math:: \sum_{ij} n_i n_j w_{ij} r_{ij} \quad \text{and} \quad \sum_{ij} n_i n_j w_{ij}

    A draw only changes the counts of patients, so all draws are computed with two matrix products.

    Args:
        draws: (B, N) counts n.
        pairs: (N, N) weights w, 0 where i and j are not comparable.
        risk: (N,); r is 1 where i has the higher risk, 1/2 where the risks are equal.

    Returns:
        (B,) and (B,); their ratio is the concordance.
    """
    pairs = pairs.astype(float)
    higher, equal = _order(risk)
    numerator = ((draws @ (pairs * (higher + 0.5 * equal))) * draws).sum(axis=1)
    return numerator, ((draws @ pairs) * draws).sum(axis=1)


def _order(risk: np.ndarray, rows: np.ndarray | slice = slice(None)) -> tuple[np.ndarray, np.ndarray]:
    """(R, N) bool twice: whether each patient of ``rows`` has a higher risk than j, and whether an equal one."""
    first = risk[rows, None]
    return first > risk, first == risk


def _as_vector(name: str, values: Any) -> np.ndarray:
    """(N,) float64; half precision and tensors with a graph included."""
    if hasattr(values, "detach"):  # a tensor; torch is not imported here
        values = values.detach().cpu().double().numpy()
    vector = np.asarray(values, dtype=np.float64).reshape(-1)
    if np.isnan(vector).any():
        raise ValueError(f"{int(np.isnan(vector).sum())} of {len(vector)} values of {name} are NaN")
    return vector
