"""Overlap of predicted and true masks as the HECKTOR challenge measures it: by class, and lesion by lesion."""

from __future__ import annotations

from typing import Any

import cc3d
import numpy as np
import torch
from monai.metrics import compute_dice
from scipy.optimize import linear_sum_assignment

from scripts.evaluation.case_metrics import CLASSES

LEAST_IOU = 0.3  # a lesion counts as detected where the intersection over union is above this


def match_lesions(predicted: np.ndarray, truth: np.ndarray) -> tuple[int, int, int]:
    """Numbers of predicted lesions, of true ones, and of pairs of the two that match, in masks (X, Y, Z) bool.

    Lesions are connected components (26 neighbours). A predicted and a true lesion may match where their intersection
    over union is above 0.3, and each matches at most one other. As several predicted lesions can have such an overlap
    with the same true one (and the reverse), the pairs are assigned: as many as possible, and of those assignments the
    one with the greatest sum of IoU. Ties between assignments therefore change no number.

    Returns:
        (P, T, M): with TP = M, FP = P - M and FN = T - M, F1 is 2 M / (P + T).

    Reference:
        HECKTOR 2025, evaluation of Task 1: https://hecktor25.grand-challenge.org/tasks-and-evaluation
    """
    found, p = cc3d.connected_components(predicted, connectivity=26, return_N=True)
    true, t = cc3d.connected_components(truth, connectivity=26, return_N=True)
    if not p or not t:
        return int(p), int(t), 0
    pairs = found.ravel().astype(np.int64) * (t + 1) + true.ravel()
    voxels = np.bincount(pairs, minlength=(p + 1) * (t + 1)).reshape(p + 1, t + 1)
    shared = voxels[1:, 1:]
    iou = shared / (voxels[1:].sum(1)[:, None] + voxels[:, 1:].sum(0)[None] - shared)
    may_match = iou > LEAST_IOU
    # One more pair outweighs any sum of IoU, which is at most the number of pairs.
    rows, columns = linear_sum_assignment(np.where(may_match, min(p, t) + 1 + iou, 0.0), maximize=True)
    return int(p), int(t), int(may_match[rows, columns].sum())


def class_columns(
    predicted: torch.Tensor, truth: torch.Tensor, known: np.ndarray, voxel_ml: np.ndarray
) -> dict[str, Any]:
    """Columns of a table of cases that compare GTVp and GTVn, each on its own.

    Args:
        predicted: (B, 1, X, Y, Z), 0 for background, 1 for GTVp, 2 for GTVn.
        truth: likewise.
        known: (B,) bool, whether the true mask tells GTVp and GTVn apart.
        voxel_ml: (B,) volume of a voxel.

    Returns:
        For each class in :data:`.CLASSES` ``dice_gtvp`` (1 where both masks are empty), ``volume_ml_gtvp`` and
        ``true_volume_ml_gtvp``, ``predicted_primaries`` and ``matched_primaries`` (see :func:`match_lesions`). What
        depends on the true mask is NaN where ``known`` is false.
    """
    columns: dict[str, Any] = {}
    for ending, (_, value, plural) in CLASSES.items():
        found, true = predicted == value, truth == value
        dice = compute_dice(found.float(), true.float(), ignore_empty=False)[:, 0].double().numpy()
        pairs = [match_lesions(f.numpy(), t.numpy()) for f, t in zip(found[:, 0], true[:, 0], strict=True)]
        lesions, _, matched = np.array(pairs).T
        columns |= {
            f"dice_{ending}": np.where(known, dice, np.nan),
            f"volume_ml_{ending}": found.flatten(1).sum(1).double().numpy() * voxel_ml,
            f"true_volume_ml_{ending}": np.where(known, true.flatten(1).sum(1).double().numpy() * voxel_ml, np.nan),
            f"predicted_{plural}": lesions,
            f"matched_{plural}": np.where(known, matched, np.nan),
        }
    return columns
