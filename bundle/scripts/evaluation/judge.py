"""All metrics of a table of cases: a fold, all folds, a centre or another cohort."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pandas as pd

from scripts import keys
from scripts.evaluation.bootstrap import BOOTSTRAP_SAMPLES
from scripts.evaluation.case_metrics import summarise, too_few
from scripts.evaluation.survival import Outcomes
from scripts.evaluation.survival_metrics import survival_metrics


def judge(
    cases: pd.DataFrame,
    train: Outcomes | None,
    absolute_risk: Callable[[pd.DataFrame], Mapping[str, Any]],
    *,
    least: Mapping[str, int] | None = None,
    seed: int = 0,
    samples: int = BOOTSTRAP_SAMPLES,
) -> dict[str, Any]:
    """All metrics of some cases.

    Args:
        cases: columns of ``cases.csv``; its log hazards are of one network or on one scale.
        train: patients whose follow-up weights the survival metrics; None leaves these out.
        absolute_risk: function of the cases with known survival that returns arguments of :func:`.survival_metrics`:
            ``log_hazard``, and ``calibration`` or ``survival`` and ``cuts``.
        least: counts below which no metric is reported, such as :data:`.SMALL_GROUP`.
        seed: of the bootstrap.
        samples: number of bootstrap draws.

    Returns:
        ``cases`` (their number), ``metrics`` by :func:`.summarise` and, with ``train``, ``survival`` by
        :func:`.survival_metrics` or ``{"reason": why not}``.
    """
    report: dict[str, Any] = {"cases": len(cases), "metrics": summarise(cases, seed, least=least, samples=samples)}
    if train is None:
        return report
    known = cases.dropna(subset=[keys.TIME])
    if "log_hazard" not in known:
        reason = "survival is not a task of this model"
    elif not len(known) or not train.patients:
        reason = "no case with known survival"
    else:
        reason = too_few({"patients": len(known), "events": int(known[keys.EVENT].sum())}, least)
    if reason:
        return report | {"survival": {"reason": reason}}
    survival = survival_metrics(train, outcomes_of(known), **absolute_risk(known), seed=seed, samples=samples)
    return report | {"survival": survival}


def outcomes_of(cases: pd.DataFrame) -> Outcomes:
    """Outcomes of the cases whose survival is known."""
    known = cases.dropna(subset=[keys.TIME])
    return Outcomes(known[keys.TIME].to_numpy(), known[keys.EVENT].to_numpy())
