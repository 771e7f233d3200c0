"""Join the folds of an experiment into one model file that inference, MONAI Label and MONAI Deploy load.

``python scripts/ensemble_folds.py --runs runs/NAME --out bundle/models/model.pt`` joins the folds that
``scripts/train_folds.py`` has trained. The file also contains their provenance, see :mod:`experiments.ensemble`.
"""

from __future__ import annotations

from pathlib import Path

from command_line import BUNDLE, run_tool

from experiments.ensemble import join_experiment
from experiments.experiment import VALIDATION, ExperimentError
from scripts.model.ensemble import CheckpointError, FoldEnsemble, SettingsMismatch, describe_model


def ensemble_folds(
    runs: str, out: str = str(BUNDLE / "models" / "model.pt"), half: bool = False, allow_missing: bool = False
) -> None:
    """Join the folds of an experiment into one model file and describe it.

    Args:
        runs: folder of the experiment, as written by train_folds.py.
        out: the file; an existing one is replaced.
        half: store the weights in half precision: half the size; predictions differ in the third digit.
        allow_missing: join the finished folds although others are missing.
    """
    print(summary(join_experiment(runs, out, half, allow_missing), Path(out)))


def summary(ensemble: FoldEnsemble, path: Path) -> str:
    """Description of a model file, to print."""
    known = ensemble.provenance
    lines = [f"{path}: {path.stat().st_size / 1e6:.1f} MB", f"  {describe_model(ensemble)}"]
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


if __name__ == "__main__":
    run_tool(ensemble_folds, ExperimentError, CheckpointError, SettingsMismatch, OSError)
