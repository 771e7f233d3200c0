"""Distribution of the network's features over the training cases, and the distance of a case from it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np


def fit_feature_statistics(features: np.ndarray, components: int = 16, parts: int = 5) -> dict[str, Any]:
    """Statistics of the features of training cases, in plain Python for a checkpoint.

    Features are standardised; their covariance C is that of probabilistic PCA (Tipping and Bishop 1999): the first axes
    U with variances L, and one noise variance s for all others, C = U (L - s) U' + s I. It is invertible with fewer
    cases than features. ``reference`` is the 99th percentile of the distance of held-out cases (cross-validation in
    ``parts``), since distances of the fitted cases are too small.

    Args:
        features: (N, F), one row per training case.
        components: maximum number of axes.
        parts: folds of the cross-validation.

    Returns:
        ``count``, ``mean`` (F), ``scale`` (F), ``axes`` (k, F), ``variances`` (k), ``noise`` and ``reference``.

    Raises:
        ValueError: when there are fewer than 10 cases, or values that are not finite.
    """
    table = np.asarray(features, dtype=np.float64)
    if table.ndim != 2 or len(table) < 10 or table.shape[1] < 1:
        raise ValueError(f"statistics of features need (N, F) values with N of 10 or more, got shape {table.shape}")
    if not np.isfinite(table).all():
        raise ValueError("the features of the training cases hold values that are not finite numbers")
    part = np.arange(len(table)) % parts
    left_out = [feature_distance(table[part == k], _gaussian(table[part != k], components)) for k in range(parts)]
    return {**_gaussian(table, components), "reference": float(np.quantile(np.concatenate(left_out), 0.99))}


def feature_distance(features: np.ndarray, statistics: Mapping[str, Any]) -> np.ndarray:
    """Mahalanobis distance per feature, sqrt(d' C^-1 d / F), of cases (N, F) from the training cases.

    Returns:
        (N,) distances, about 1 for cases like the training cases; infinite where a feature is not finite.

    Raises:
        ValueError: when the number of features differs from the statistics'.
    """
    table = np.atleast_2d(np.asarray(features, dtype=np.float64))
    if table.shape[1] != len(statistics["mean"]):
        raise ValueError(f"{table.shape[1]} features, but the statistics hold {len(statistics['mean'])}")
    finite = np.asarray(np.isfinite(table).all(axis=1))
    deviation = (np.where(finite[:, None], table, 0.0) - statistics["mean"]) / np.asarray(statistics["scale"])
    along = deviation @ np.reshape(statistics["axes"], (-1, table.shape[1])).T
    across = np.clip((deviation**2).sum(axis=1) - (along**2).sum(axis=1), 0, None)
    squared = (along**2 / np.asarray(statistics["variances"])).sum(axis=1) + across / statistics["noise"]
    return np.where(finite, np.sqrt(squared / table.shape[1]), np.inf)


def _gaussian(table: np.ndarray, components: int) -> dict[str, Any]:
    """Mean and covariance of standardised features by probabilistic PCA."""
    mean, spread = table.mean(axis=0), table.std(axis=0)
    # a unit without variance in training must not give an infinite distance
    least = 0.05 * float(np.sqrt(np.mean(spread**2)))
    scale = np.maximum(spread, least if least > 0 else 1.0)
    _, singular, axes = np.linalg.svd((table - mean) / scale, full_matrices=False)
    variances = singular**2 / max(1, len(table) - 1)
    kept = max(1, min(components, len(table) // 3, table.shape[1] - 1))
    noise = max(float(variances[kept:].sum()) / max(1, table.shape[1] - kept), 1e-3)
    return {
        "count": len(table),
        "mean": mean.tolist(),
        "scale": scale.tolist(),
        "axes": axes[:kept].tolist(),
        "variances": np.maximum(variances[:kept], noise).tolist(),
        "noise": noise,
    }
