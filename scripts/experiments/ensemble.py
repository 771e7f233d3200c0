"""The folds of an experiment as one model with its provenance.

Provenance: description of the training cases, metrics of each fold, clinical features and their coding, preprocessing,
versions, hashes of the configs, range of voxel sizes, HPV threshold and calibration of absolute risk. Threshold and
calibration are chosen on cases to which the weights of the predicting network were not fitted; with ``keep_epoch:
best`` its epoch was selected on them, which the provenance says.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from experiments.experiment import (
    FAILED,
    FINISHED,
    LOG_FILE,
    TRAINING,
    VALIDATION,
    ExperimentError,
    evaluation_folder,
    fold_folder,
    read_experiment,
    read_fold,
    statement_on_part,
)
from scripts.cohorts.clinical import feature_named
from scripts.cohorts.thresholds import HALF
from scripts.evaluation.case_metrics import balanced_accuracy
from scripts.evaluation.case_table import read_features
from scripts.evaluation.survival import CalibrationError, FoldScale, fit_calibration, normalise_out_of_fold
from scripts.imaging.quality_features import fit_feature_statistics
from scripts.model.ensemble import (
    EXTRA_STATE,
    KEEP_EPOCH,
    SETTINGS,
    TRAINED_ON,
    FoldEnsemble,
    describe_model,
    join_folds,
    load_weights,
    read_state,
    save_weights,
)
from scripts.model.spec import ModelSpec
from scripts.training.handlers import BEST

MISSING_IS_ZERO = "a missing value is 0"


def join_experiment(runs: str | Path, out: str | Path, half: bool = False, allow_missing: bool = False) -> FoldEnsemble:
    """Join the folds of an experiment and write the model file; arguments as for ``ensemble_folds.py``.

    Raises:
        ExperimentError: folds are missing.
        CheckpointError: the folds cannot be read or joined.
    """
    record = read_experiment(runs)
    folds = finished_folds(runs, record, allow_missing)
    states = {f"fold {fold}": read_state(fold_folder(runs, fold) / "models" / "model.pt") for fold in folds}
    joint = join_folds(states)
    ensemble = empty_ensemble(joint[EXTRA_STATE][SETTINGS])
    ensemble.load_state_dict(joint)
    ensemble.provenance = provenance(runs, record, folds, ensemble.settings)
    save_weights(ensemble, out, half=half)
    load_weights(empty_ensemble(ensemble.settings), out)  # fails here rather than for a user if it cannot be read
    return ensemble


def finished_folds(runs: str | Path, record: Mapping[str, Any], allow_missing: bool) -> list[int]:
    """Numbers of the folds that can be joined.

    Raises:
        ExperimentError: some are missing and that is not allowed, or all are.
    """
    outcomes = {fold: read_fold(runs, fold) for fold in range(record["num_folds"])}
    finished = [fold for fold, outcome in outcomes.items() if outcome["status"] == FINISHED]
    missing = [
        f"fold {fold} {'failed, see ' + str(fold_folder(runs, fold) / LOG_FILE) if status == FAILED else 'is not done'}"
        for fold, outcome in outcomes.items()
        if (status := outcome["status"]) != FINISHED
    ]
    if missing and not (allow_missing and finished):
        advice = "; --allow_missing joins the others" if finished else ""
        raise ExperimentError(f"{runs}: {'; '.join(missing)}. Go on with it by `{record['command']}`{advice}")
    return finished


def empty_ensemble(settings: Mapping[str, Any]) -> FoldEnsemble:
    """An untrained ensemble of one fold with these settings (:meth:`.to_dict`)."""
    spec = ModelSpec.read(settings, "the folds")
    return FoldEnsemble(spec.network(), spec)


# --- provenance -----------------------------------------------------------------------------------------------------


def provenance(
    runs: str | Path, record: Mapping[str, Any], folds: Sequence[int], settings: Mapping[str, Any]
) -> dict[str, Any]:
    """The provenance of the weights of these folds, in the order of the members, as plain Python."""
    cases = out_of_fold(runs, folds)
    cohort = dict(record["cohort"])
    return {
        TRAINED_ON: statement_on_training(runs, folds, cohort.pop(TRAINED_ON), cohort["cases"]),
        "intended_use": "research use only; not a medical device, not for clinical decisions",
        "command": record["command"],
        "protocol": record["protocol"],
        "folds": [describe_fold(read_fold(runs, fold)) for fold in folds],
        "folds_missing": sorted(set(range(record["num_folds"])) - set(folds)),
        "voxel_limits": cohort.pop("voxel_limits"),
        "cohort": cohort,
        "clinical": {
            "features": list(settings["clinical_features"]),
            "coding": {name: describe_coding(name) for name in settings["clinical_features"]},
        },
        "preprocessing": dict(settings),
        "versions": record["versions"],
        "configs": record["configs"],
        KEEP_EPOCH: record["settings"].get(KEEP_EPOCH),
        "selection": describe_chosen_on(record["settings"].get(KEEP_EPOCH)),
        "hpv_threshold": choose_hpv_threshold(cases),
        "calibration": calibrate(runs, folds, cases),
        "feature_statistics": [describe_features(runs, fold) for fold in folds] if "log_hazard" in cases else [],
    }


def statement_on_training(runs: str | Path, folds: Sequence[int], statement: str, cases: int) -> str:
    """The statement on a cohort's ``cases``, with the number that were trained on where that is smaller.

    Training leaves out scans that cannot be read or that quality control rejects; a test set is not trained on either.
    """
    tables = [evaluation_folder(runs, fold, TRAINING) / "cases.csv" for fold in folds]
    used = {patient for path in tables for patient in pd.read_csv(path, converters={"PatientID": str})["PatientID"]}
    return statement_on_part(statement, cases, len(used))


def describe_chosen_on(keep_epoch: str | None) -> str:
    """In words, what the calibration, the HPV threshold and the folds' metrics rest on."""
    chosen = "calibration and HPV threshold were chosen on the folds' validation cases, which no weights were fitted to"
    if keep_epoch == BEST:
        chosen += "; the epochs were chosen on the same cases, so that both and the folds' metrics are too good"
    return chosen


def describe_fold(outcome: Mapping[str, Any]) -> dict[str, Any]:
    """What the provenance keeps of a fold's record."""
    kept = ("fold", "centre", "cases", "epoch", "best_epoch", "metrics")
    described = {name: outcome[name] for name in kept if name in outcome}
    described["metrics"] = {part: value for part, value in outcome["metrics"].items() if part != TRAINING}
    return described


def describe_coding(name: str) -> str:
    """How a clinical value becomes a number, in words.

    Example:
        >>> describe_coding("age"), describe_coding("gender")
        ('years as they are; a missing value is 0', '0 (female/f) -> 1, 1 (male/m) -> 2; a missing value is 0')
    """
    feature = feature_named(name)
    if not feature.levels:
        return f"{feature.unit or 'numbers'} as they are; {MISSING_IS_ZERO}"
    levels = []
    for level, words in feature.levels.items():
        meaning = f" ({'/'.join(words)})" if words else ""
        levels.append(f"{level}{meaning} -> {level + 1}")
    return f"{', '.join(levels)}; {MISSING_IS_ZERO}"


def out_of_fold(runs: str | Path, folds: Sequence[int]) -> pd.DataFrame:
    """Validation cases of the folds with ``member``, the place of the predicting network in the ensemble."""
    tables = []
    for member, fold in enumerate(folds):
        table = pd.read_csv(evaluation_folder(runs, fold, VALIDATION) / "cases.csv", converters={"PatientID": str})
        tables.append(table.assign(member=member))
    return pd.concat(tables, ignore_index=True)


def calibrate(runs: str | Path, folds: Sequence[int], cases: pd.DataFrame) -> dict[str, Any]:
    """Absolute risk from pooled out-of-fold log hazards, each on the scale of its own fold's training cases.

    A patient whom several folds validate (protocol ``full``) counts once, with the mean.

    Returns:
        :meth:`scripts.evaluation.survival.Calibration.to_dict`, or ``{"reason": why there is none}``.
    """
    if "log_hazard" not in cases:
        return {"reason": "survival is not a task of this model"}
    known = cases.dropna(subset=["time"])
    try:
        scales = [
            FoldScale.of(pd.read_csv(evaluation_folder(runs, fold, TRAINING) / "cases.csv")["log_hazard"])
            for fold in folds
        ]
        risk = normalise_out_of_fold(known["log_hazard"], known["member"], scales)
        patients = known.assign(risk=risk).groupby("PatientID")[["risk", "time", "event"]].mean()
        return fit_calibration(patients["risk"], patients["time"], patients["event"], scales).to_dict()
    except CalibrationError as error:
        print(f"the model gives no absolute risk: {error}", file=sys.stderr)
        return {"reason": str(error)}


def describe_features(runs: str | Path, fold: int) -> dict[str, Any]:
    """The deep features of a fold's training cases, by :func:`scripts.imaging.quality_features.fit_feature_statistics`.

    Inference compares a patient's features with them. Too few training cases give no statistics but the ``reason``.

    Raises:
        FileNotFoundError: the training cases were evaluated before features were kept.
    """
    _, features = read_features(evaluation_folder(runs, fold, TRAINING))
    try:
        return fit_feature_statistics(features[:, 0])
    except ValueError as error:
        return {"reason": str(error)}


def summary(ensemble: FoldEnsemble, out: str | Path) -> str:
    """Description of a model file, to print."""
    known = ensemble.provenance
    lines = [f"{out}: {Path(out).stat().st_size / 1e6:.1f} MB", f"  {describe_model(ensemble)}"]
    for fold in known["folds"]:
        metrics = fold["metrics"][VALIDATION]
        values = [f"{name} {row['value']:.3f}" for name, row in metrics.items() if row["value"] is not None]
        lines.append(
            f"  fold {fold['fold']}: weights of epoch {fold['best_epoch']}; {', '.join(values) or 'no metric'}"
        )
    threshold, calibration = known["hpv_threshold"], known["calibration"]
    chosen = f"{threshold['value']:.3f}" if threshold["value"] is not None else f"none ({threshold['reason']})"
    lines.append(f"  HPV threshold: {chosen}")
    lines.append(f"  {known['selection']}")
    fitted = "reason" not in calibration
    absolute = f"up to day {calibration['last_day']:g}, {calibration['events']} events" if fitted else "none"
    lines.append(f"  absolute risk: {absolute}" + ("" if fitted else f" ({calibration['reason']})"))
    return "\n".join(lines)


def choose_hpv_threshold(cases: pd.DataFrame) -> dict[str, Any]:
    """The HPV probability above which a case is called positive, so that balanced accuracy (9) is highest.

    Candidates lie halfway between neighbouring probabilities; of several that are as good, the one nearest to 0.5 is
    taken. The balanced accuracy reached is that of the cases it was chosen on, and so too good.

    Args:
        cases: columns ``PatientID``, ``hpv`` (NaN where unknown) and ``hpv_prob``; a patient in several rows counts
            once, with the mean.

    Returns:
        ``value``, ``balanced_accuracy``, ``patients``, ``positive``; or ``value`` None and a ``reason``.

    Example:
        >>> table = pd.DataFrame({"PatientID": list("abcd"), "hpv": [0, 0, 1, 1], "hpv_prob": [0.1, 0.2, 0.3, 0.9]})
        >>> choose_hpv_threshold(table)
        {'value': 0.25, 'balanced_accuracy': 1.0, 'patients': 4, 'positive': 2}
    """
    if "hpv_prob" not in cases:
        return {"value": None, "reason": "HPV status is not a task of this model"}
    known = cases.dropna(subset=["hpv"]).groupby("PatientID")[["hpv", "hpv_prob"]].mean()
    counts = {"patients": len(known), "positive": int(known["hpv"].sum())}
    levels = np.unique(known["hpv_prob"])
    candidates = [HALF, *((levels[1:] + levels[:-1]) / 2).tolist()]
    reached = [balanced_accuracy(known, threshold) if len(known) else math.nan for threshold in candidates]
    if math.isnan(reached[0]):
        return {"value": None, "reason": "no two classes of HPV status among the cases", **counts}
    best = max(range(len(candidates)), key=lambda k: (round(reached[k], 12), -abs(candidates[k] - HALF)))
    return {"value": candidates[best], "balanced_accuracy": reached[best], **counts}
