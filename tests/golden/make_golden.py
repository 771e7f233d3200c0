"""Write the golden values that the tests of losses and metrics compare with: ``losses.json`` and ``metrics.json``.

Every expected value comes from a library other than this repository's code (torchsurv, lifelines, scikit-survival,
scikit-learn) or from a plain Python loop over the paper's formula, in float64. Run from the repository's root:

    python tests/golden/make_golden.py
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from lifelines import CoxPHFitter
from lifelines.utils import concordance_index
from sklearn.metrics import balanced_accuracy_score
from sksurv.metrics import concordance_index_censored
from torchsurv.loss.cox import neg_partial_log_likelihood

HERE = Path(__file__).parent


def cox_sum(h: list, time: list, event: list) -> float:
    """Equation 6 by a loop over the distinct event times, summed over events."""
    total = 0.0
    for at in sorted({t for t, e in zip(time, event, strict=True) if e}):
        tied = [k for k in range(len(h)) if time[k] == at and event[k]]
        at_risk = sum(math.exp(h[k]) for k in range(len(h)) if time[k] >= at)
        total += sum(math.log(at_risk) - h[k] for k in tied)
    return total


def cox_case(name: str, log_hazard: list, time: list, event: list) -> dict:
    """Breslow's likelihood averaged over events; torchsurv (float32 inside) must confirm it."""
    case: dict = {"name": name, "log_hazard": log_hazard, "time": time, "event": event}
    h, t, e = torch.tensor(log_hazard), torch.tensor(time), torch.tensor(event, dtype=torch.bool)
    expected = cox_sum(log_hazard, time, event)
    confirmed = float(neg_partial_log_likelihood(h, e, t, ties_method="breslow", reduction="sum"))
    assert math.isclose(expected, confirmed, rel_tol=1e-5, abs_tol=1e-6), (name, expected, confirmed)
    case["breslow"] = expected / sum(event)
    return case


def cox_cases(rng: np.random.Generator) -> list[dict]:
    """Small cases that can be checked by hand, and one of 60 with many ties."""
    tied_times = [float(t) for t in rng.integers(1, 15, 60)]
    return [
        cox_case("two_cases", [0.5, -0.25], [1.0, 2.0], [1, 0]),
        cox_case("event_last", [0.5, -0.25, 1.0], [1.0, 2.0, 3.0], [0, 0, 1]),
        cox_case("distinct", [0.3, -1.2, 2.0, 0.0], [5.0, 3.0, 8.0, 1.0], [1, 0, 1, 1]),
        cox_case("tied_events", [0.3, -1.2, 2.0, 0.0], [3.0, 3.0, 3.0, 5.0], [1, 1, 1, 0]),
        cox_case("event_tied_with_censored", [0.3, -1.2, 2.0], [3.0, 3.0, 1.0], [1, 0, 0]),
        cox_case("all_tied_all_events", [0.1, 0.2, 0.3, 0.4], [2.0] * 4, [1] * 4),
        cox_case("two_groups_tied", [1.0, -1.0, 0.5, 0.2, -0.3], [1.0, 1.0, 2.0, 2.0, 2.0], [1, 1, 1, 1, 0]),
        cox_case(
            "sixty",
            rng.normal(0, 1.5, 60).round(4).tolist(),
            tied_times,
            [int(e) for e in rng.random(60) < 0.3],
        ),
    ]


def cox_fit(rng: np.random.Generator) -> dict:
    """One covariate fitted by lifelines (Efron): its coefficient and log likelihood."""
    x = rng.normal(size=80).round(4)
    time = np.ceil(rng.exponential(np.exp(-0.8 * x)) * 10)
    event = (rng.random(80) < 0.6).astype(int)
    frame = pd.DataFrame({"x": x, "time": time, "event": event})
    fit = CoxPHFitter().fit(frame, "time", "event", fit_options={"precision": 1e-12})
    return {
        "x": x.tolist(),
        "time": time.tolist(),
        "event": event.tolist(),
        "coefficient": float(fit.params_["x"]),
        "log_likelihood": float(fit.log_likelihood_),
    }


def focal(p: float, g: float, alpha: float = 0.25, gamma: float = 2.0) -> float:
    """Equations 4 and 5 for one probability and one label."""
    return -alpha * g * (1 - p) ** gamma * math.log(p) - (1 - alpha) * (1 - g) * p**gamma * math.log(1 - p)


def segmentation_case(name: str, logits: np.ndarray, mask: np.ndarray) -> dict:
    """Equations 2 to 5 by a loop over cases and voxels, smoothing 1e-5."""
    total = 0.0
    for case_logits, case_mask in zip(logits.reshape(len(logits), -1), mask.reshape(len(mask), -1), strict=True):
        p = [1 / (1 + math.exp(-z)) for z in case_logits]
        overlap = sum(a * b for a, b in zip(p, case_mask, strict=True))
        squares = sum(a * a for a in p) + sum(b * b for b in case_mask)
        dice = 1 - (2 * overlap + 1e-5) / (squares + 1e-5)
        total += dice + sum(focal(a, b) for a, b in zip(p, case_mask, strict=True)) / len(p)
    return {"name": name, "logits": logits.tolist(), "mask": mask.tolist(), "expected": total / len(logits)}


def segmentation_cases(rng: np.random.Generator) -> list[dict]:
    """A mixed batch, an empty mask and a full one; (B, 1, 2, 2, 2)."""
    logits = rng.normal(0, 2, (3, 1, 2, 2, 2)).round(3)
    mask = (rng.random((3, 1, 2, 2, 2)) < 0.4).astype(float)
    return [
        segmentation_case("mixed_batch", logits, mask),
        segmentation_case("empty_mask", logits[:1], np.zeros((1, 1, 2, 2, 2))),
        segmentation_case("full_mask", logits[:1], np.ones((1, 1, 2, 2, 2))),
    ]


def hpv_cases() -> list[dict]:
    """The binary focal loss by the formula."""
    cases = {"one_positive": ([0.3], [1]), "one_negative": ([0.3], [0]), "batch": ([-2.0, 0.0, 1.5, 3.0], [0, 1, 1, 0])}
    return [
        {
            "name": name,
            "logit": logit,
            "hpv": hpv,
            "expected": sum(focal(1 / (1 + math.exp(-z)), g) for z, g in zip(logit, hpv, strict=True)) / len(hpv),
        }
        for name, (logit, hpv) in cases.items()
    ]


def concordance_case(name: str, time: list, event: list, risk: list) -> dict:
    """The C-index of lifelines, which scikit-survival must confirm."""
    expected = float(concordance_index(time, [-r for r in risk], event))
    confirmed = concordance_index_censored(np.array(event, bool), np.array(time), np.array(risk))[0]
    assert math.isclose(expected, confirmed), (name, expected, confirmed)
    return {"name": name, "time": time, "event": event, "risk": risk, "expected": expected}


def concordance_cases(rng: np.random.Generator) -> list[dict]:
    """Ties in time, in risk, between events and censorings, and a cohort of 200."""
    return [
        concordance_case("perfect", [1, 2, 3], [1, 1, 1], [3, 2, 1]),
        concordance_case("reversed", [1, 2, 3], [1, 1, 0], [1, 2, 3]),
        concordance_case("tied_risk", [1, 2, 3], [1, 1, 0], [1, 1, 1]),
        concordance_case("tied_events_not_comparable", [2, 2, 3], [1, 1, 0], [0.1, 0.9, 0.5]),
        concordance_case("event_tied_with_censored", [2, 2], [1, 0], [0.9, 0.1]),
        concordance_case("censored_before_event", [1, 2, 3], [0, 1, 0], [0.9, 0.5, 0.1]),
        concordance_case(
            "cohort_of_200",
            [int(t) for t in rng.integers(1, 60, 200)],
            [int(e) for e in rng.random(200) < 0.25],
            rng.normal(size=200).round(1).tolist(),
        ),
    ]


def balanced_accuracy_cases(rng: np.random.Generator) -> list[dict]:
    """scikit-learn's balanced accuracy."""
    table = {
        "all_right": ([0.9, 0.1], [1, 0]),
        "half": ([0.9, 0.9, 0.1, 0.1], [1, 0, 1, 0]),
        "unbalanced": ([0.9, 0.8, 0.7, 0.6, 0.2], [1, 1, 1, 1, 0]),
        "hundred": (rng.random(100).round(3).tolist(), [int(v) for v in rng.random(100) < 0.8]),
    }
    return [
        {
            "name": name,
            "probability": p,
            "label": y,
            "expected": float(balanced_accuracy_score(y, [v >= 0.5 for v in p])),
        }
        for name, (p, y) in table.items()
    ]


def main() -> None:
    """Write both files."""
    rng = np.random.default_rng(20)
    losses = {
        "cox": cox_cases(rng),
        "cox_fit": cox_fit(rng),
        "segmentation": segmentation_cases(rng),
        "hpv": hpv_cases(),
    }
    metrics = {"concordance": concordance_cases(rng), "balanced_accuracy": balanced_accuracy_cases(rng)}
    for name, content in (("losses", losses), ("metrics", metrics)):
        (HERE / f"{name}.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
