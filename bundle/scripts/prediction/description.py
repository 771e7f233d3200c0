"""All that is said of one patient, in one dictionary: ``prediction.json``, and what report, DICOM and servers read.

Its form is described by ``docs/prediction.schema.json``. Whatever cannot be said is None, beside the reason.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import time
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.transforms import Transform

from scripts import keys
from scripts.cohorts.clinical import FEATURES
from scripts.cohorts.files import sha256_of
from scripts.cohorts.thresholds import above
from scripts.evaluation.clinical_model import ClinicalModelError, few_known, shipped
from scripts.evaluation.survival import (
    DAYS_PER_YEAR,
    HORIZON_YEARS,
    Calibration,
    CalibrationError,
    group_names,
    risk_groups,
)
from scripts.imaging.lesions import APART, MERGED
from scripts.imaging.quality import (
    FLAG,
    RAISE,
    REJECT,
    VERDICTS,
    Check,
    Limits,
    QualityError,
    check_features,
    checks_from_json,
    verdict,
)
from scripts.model.ensemble import NOT_RECORDED, PROVENANCE, TRAINED_ON, FoldEnsemble, read_facts, saved_spec
from scripts.model.networks import MultitaskNet

SCHEMA_VERSION = "1"
METADATA = Path(__file__).resolve().parents[2] / "configs" / "metadata.json"
CURVE_POINTS = 120
NO_STATISTICS = "the model file holds no statistics of its training cases' features"
SINGLE_FOLD = (
    "the model file holds {what}: it is one fold as it was trained. scripts/ensemble_folds.py fits that and stores it "
    "with the weights"
)


@dataclass(frozen=True)
class Model:
    """What a prediction says of the model, and what it needs of it."""

    sha256: str  # of the model file; of names and values of the weights where the model has no file
    folds: int  # members
    tasks: tuple[str, ...]  # of "seg", "hpv", "surv"
    hpv_inputs: tuple[str, ...]  # what the HPV probability is read from: "image", "clinical"
    provenance: Mapping[str, Any]  # stored with the weights (see scripts.model.ensemble)
    seg_classes: tuple[str, ...] = MERGED  # names of the mask's values 1, 2,

    @classmethod
    def of(cls, model: FoldEnsemble | str | os.PathLike[str]) -> Model:
        """The facts of a model in memory or in a file.

        Raises:
            FileNotFoundError: where there is no such file.
            scripts.model.ensemble.CheckpointError: where the file is not a checkpoint of this bundle.
        """
        if isinstance(model, str | os.PathLike):
            (facts, folds), spec = read_facts(model), saved_spec(model)
            return cls(
                sha256_of(model), folds, spec.tasks, spec.hpv_inputs, facts.get(PROVENANCE, {}), spec.seg_classes
            )
        first: MultitaskNet = model.folds[0]  # type: ignore[assignment]
        classes = MERGED if first.seg_classes == len(MERGED) else APART
        return cls(weights_sha256(model), len(model.folds), first.tasks, first.hpv_inputs, model.provenance, classes)


def weights_sha256(network: torch.nn.Module) -> str:
    """SHA-256 of names, shapes and values of all weights and buffers, the same on every device."""
    digest = hashlib.sha256()
    for name, value in sorted(network.state_dict().items()):
        if isinstance(value, torch.Tensor):
            array = np.ascontiguousarray(value.detach().cpu().float().numpy())
            digest.update(f"{name}{array.shape}".encode())
            digest.update(array.tobytes())
    return digest.hexdigest()


class DescribePredictiond(Transform):
    """Say all there is to say of one patient (see the module), after :class:`.MeasureTumourd`.

    Sets ``prediction``, a dictionary that JSON can hold. ``fingerprint`` (of the scan files) and ``files`` are for the
    writer of the files to fill. Batch axes of length one are accepted everywhere.

    Args:
        model: the model file, or the network itself. The file is read at the first patient.
        on_reject: ``"raise"`` stops a patient whose features are unlike those of training; ``"flag"`` predicts and sets
            ``forced``.
        limits: of the quality checks, as :class:`scripts.imaging.quality.CheckQualityd` takes them.

    Raises:
        scripts.imaging.quality.QualityError: when a check rejects the patient and ``on_reject`` is ``"raise"``.
        ValueError: when the network gave a number that is not finite.
    """

    def __init__(
        self,
        model: FoldEnsemble | str | os.PathLike[str],
        on_reject: str = RAISE,
        limits: Limits | None = None,
    ) -> None:
        super().__init__()
        if on_reject not in (RAISE, FLAG):
            raise ValueError(f"on_reject is {RAISE!r} or {FLAG!r}, got {on_reject!r}")
        self.model, self.on_reject, self.limits = model, on_reject, limits
        self._known: Model | None = None

    @property
    def known(self) -> Model:
        """The model's facts, read once."""
        if self._known is None:
            self._known = Model.of(self.model)
        return self._known

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Describe the patient's prediction."""
        d = dict(data)
        values = json.loads(d.get(keys.CLINICAL_VALUES, "[]"))
        d[keys.PREDICTION] = {
            "schema_version": SCHEMA_VERSION,
            "patient_id": str(d.get(keys.PATIENT_ID, "")),
            "notice": keys.RESEARCH_USE_ONLY,
            "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "model": describe_model(self.known),
            "survival": self._survival(d),
            "hpv": self._hpv(d),
            "tumour": d.get(keys.MEASURES),
            "clinical": [row for row in values if row["coded"] is not None],
            "clinical_model": describe_clinical_model({row["name"]: row["value"] for row in values}),
            "crop": describe_crop(d),
            "quality": self._quality(d),
            "seconds": {"total": _seconds(d.get(keys.STARTED))},
            "fingerprint": None,
            "files": {"mask": None},
        }
        return d

    def _survival(self, data: Mapping[Hashable, Any]) -> dict[str, Any] | None:
        if data.get(keys.LOG_HAZARD) is None:
            return None
        return describe_survival(
            _number(data, keys.LOG_HAZARD),
            _spread(data, keys.LOG_HAZARD_STD),
            _numbers(data, keys.LOG_HAZARD_FOLDS),
            self.known.provenance,
        )

    def _hpv(self, data: Mapping[Hashable, Any]) -> dict[str, Any] | None:
        if data.get(keys.HPV_PROB) is None:
            return None
        probability = _number(data, keys.HPV_PROB)
        stored = self.known.provenance.get("hpv_threshold") or {}
        threshold = stored.get("value")
        return {
            "inputs": list(self.known.hpv_inputs),
            "probability": probability,
            "probability_std": _spread(data, keys.HPV_PROB_STD),
            "probability_folds": _numbers(data, keys.HPV_PROB_FOLDS),
            "threshold": threshold,
            "positive": None if threshold is None else above(probability, threshold),
            "unavailable": ""
            if threshold is not None
            else stored.get("reason", SINGLE_FOLD.format(what="no threshold for HPV status")),
        }

    def _quality(self, data: Mapping[Hashable, Any]) -> dict[str, Any]:
        checks = checks_from_json(data.get(keys.QUALITY, "[]"))
        checks.append(worst_features(data.get(keys.FEATURES), self.known, self.limits))
        result = verdict(checks)
        if result == REJECT and self.on_reject == RAISE:
            raise QualityError(str(data.get(keys.PATIENT_ID, "?")), checks)
        return {"verdict": result, "forced": result == REJECT, "checks": [asdict(check) for check in checks]}


def describe_model(model: Model) -> dict[str, Any]:
    """Name and version of this bundle with what is known of the weights."""
    bundle = json.loads(METADATA.read_text(encoding="utf-8"))
    return {
        "name": bundle["name"],
        "version": bundle["version"],
        "sha256": model.sha256,
        "folds": model.folds,
        "tasks": list(model.tasks),
        "seg_classes": list(model.seg_classes),
        "trained_on": model.provenance.get(TRAINED_ON) or NOT_RECORDED,
    }


def describe_survival(
    log_hazard: float, log_hazard_std: float | None, log_hazard_folds: Sequence[float], provenance: Mapping[str, Any]
) -> dict[str, Any]:
    """Rank, risk group and recurrence-free survival, as far as the model's calibration goes.

    Args:
        log_hazard: mean of the folds' log hazards as they give them.
        log_hazard_std: their standard deviation, None of one fold.
        log_hazard_folds: (K,) of each fold.
        provenance: of the model; ``calibration`` in it is :meth:`.to_dict` or a ``reason``.

    Returns:
        The part ``survival`` of a prediction. Without a calibration only the log hazards are numbers, and
        ``unavailable`` says why; horizons beyond the training follow-up are listed and not answered.
    """
    described: dict[str, Any] = {
        "log_hazard": log_hazard,
        "log_hazard_std": log_hazard_std,
        "log_hazard_folds": list(log_hazard_folds),
        "percentile": None,
        "risk_group": None,
        "recurrence_free_survival": [],
        "beyond_follow_up": [],
        "curve": None,
        "doubt": "",
        "unavailable": "",
    }
    try:
        calibration = read_calibration(provenance)
    except CalibrationError as error:
        return {**described, "unavailable": str(error)}
    days = np.array(HORIZON_YEARS) * DAYS_PER_YEAR
    usable = calibration.usable(days)
    at = calibration.survival_interval(log_hazard_folds, days[usable])
    years = [year for year, within in zip(HORIZON_YEARS, usable, strict=True) if within]
    ranges: list[list[float | None]] = [at.low.tolist(), at.high.tolist()]
    if len(log_hazard_folds) == 1:  # one fold tells no spread
        ranges = [[None] * len(at.days)] * 2
    described["recurrence_free_survival"] = [
        {
            **{"years": year, "days": float(day), "survival": float(survival), "low": low, "high": high},
            "at_risk": calibration.at_risk(float(day)),
        }
        for year, day, survival, low, high in zip(years, at.days, at.survival, *ranges, strict=True)
    ]
    cuts = calibration.cut_points["tertiles"]
    described["beyond_follow_up"] = [year for year, within in zip(HORIZON_YEARS, usable, strict=True) if not within]
    described["percentile"] = float(calibration.percentile(at.log_hazard))
    described["risk_group"] = group_names(len(cuts) + 1)[int(risk_groups(at.log_hazard, cuts))]
    described["curve"] = survival_curve(calibration, log_hazard_folds)
    described["doubt"] = calibration.doubt
    return described


def describe_clinical_model(values: Mapping[str, float | None]) -> dict[str, Any]:
    """Recurrence-free survival by the shipped model of clinical values alone, as far as they are known.

    Returns:
        The part ``clinical_model`` of a prediction. Where there is no such model, ``unavailable`` says why and
        ``survival`` is None.
    """
    try:
        model = shipped()
    except ClinicalModelError as error:
        return dict.fromkeys(("summary", "endpoint", "warning"), "") | {
            **{"unavailable": str(error), "values": [], "known": 0, "survival": None}
        }
    known = {name: value for name in model.features if (value := values.get(name)) is not None}
    warning = ""
    if few_known(len(known), len(model.features)):
        missing = ", ".join(FEATURES[name].column for name in model.features if name not in known)
        count = f"only {len(known)} of its {len(model.features)} values {'is' if len(known) == 1 else 'are'} known"
        warning = f"{count} (missing: {missing}): the result is less accurate"
    log_hazard = float(model.log_hazard([known])[0])
    survival = describe_survival(log_hazard, None, [log_hazard], {"calibration": model.calibration.to_dict()})
    for name in ("log_hazard_std", "log_hazard_folds", "doubt", "unavailable"):  # of networks
        del survival[name]
    return {
        "unavailable": "",
        "summary": model.summary,
        "endpoint": model.endpoint,
        "values": [{"name": name, "value": known.get(name)} for name in model.features],
        "known": len(known),
        "warning": warning,
        "survival": survival,
    }


def read_calibration(provenance: Mapping[str, Any]) -> Calibration:
    """The calibration stored with a model.

    Raises:
        CalibrationError: where there is none; the message is the reason to print.
    """
    stored = provenance.get("calibration")
    if stored is None:
        raise CalibrationError(SINGLE_FOLD.format(what="no calibration of the risk"))
    if "reason" in stored:
        raise CalibrationError(str(stored["reason"]))
    return Calibration.from_dict(stored)


def survival_curve(calibration: Calibration, log_hazard_folds: Sequence[float]) -> dict[str, list[float] | None]:
    """Recurrence-free survival from day 0 to the end of follow-up, with the range of the folds where there are several.

    At most :data:`CURVE_POINTS` of the days on which it falls; it is constant between those of the calibration.
    """
    days = np.unique([0.0, *calibration.baseline_days, calibration.last_day])
    if len(days) > CURVE_POINTS:
        days = days[np.rint(np.linspace(0, len(days) - 1, CURVE_POINTS)).astype(int)]
    curve = calibration.survival_interval(log_hazard_folds, days)
    several = len(log_hazard_folds) > 1
    return {
        "days": curve.days.tolist(),
        "survival": curve.survival.tolist(),
        "low": curve.low.tolist() if several else None,
        "high": curve.high.tolist() if several else None,
    }


def worst_features(features: torch.Tensor | None, model: Model, limits: Limits | None = None) -> Check:
    """The check ``feature_distance`` of the fold to whose training cases the patient is the least alike.

    Args:
        features: (K, F) of the K folds; None where the model gives none.
        model: whose provenance may hold ``feature_statistics``, one for each fold.
        limits: that differ from the default ones.
    """
    stored = model.provenance.get("feature_statistics")
    if features is None or not stored:
        why = "a model without the survival task has no such features" if features is None else NO_STATISTICS
        return check_features(np.zeros(0), {"reason": why}, limits)
    table = torch.as_tensor(features).detach().cpu().reshape(model.folds, -1).numpy()
    checks = [check_features(row, statistics, limits) for row, statistics in zip(table, stored, strict=True)]
    return max(checks, key=lambda check: (VERDICTS.index(check.verdict), check.value or 0.0))


def describe_crop(data: Mapping[Hashable, Any]) -> dict[str, Any]:
    """Where the network looked, by which rule, and what is doubtful about it."""
    affine = torch.as_tensor(data[keys.BOX_AFFINE]).detach().cpu().double().numpy().reshape(4, 4)
    shape = np.array(data[keys.IMAGE].shape[-3:])
    centre = affine[:3, :3] @ ((shape - 1) / 2) + affine[:3, 3]
    return {
        "method": str(data[keys.CROP_METHOD]),
        "flag": str(data[keys.CROP_FLAG]),
        "centre_mm": centre.tolist(),
        "size_mm": (np.linalg.norm(affine[:3, :3], axis=0) * shape).tolist(),
    }


def _seconds(started: Any) -> float | None:
    """Time since the clock showed ``started``; in a run that reads ahead it includes the waiting for its turn."""
    return None if started is None else time.monotonic() - float(started)


def _number(data: Mapping[Hashable, Any], key: str) -> float:
    """A score as a number."""
    number = float(data[key])
    if not math.isfinite(number):
        raise ValueError(f"the network gave {key} = {number}; the weights or the input are damaged")
    return number


def _spread(data: Mapping[Hashable, Any], key: str) -> float | None:
    """Standard deviation over the folds; None of one fold, which tells no spread."""
    return None if data.get(key) is None else _number(data, key)


def _numbers(data: Mapping[Hashable, Any], key: str) -> list[float]:
    """Scores of the folds as a list."""
    return torch.as_tensor(data[key]).detach().cpu().double().reshape(-1).tolist()
