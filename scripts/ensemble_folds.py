"""Join the folds of an experiment into one model file that inference, MONAI Label and MONAI Deploy load.

``python scripts/ensemble_folds.py --runs runs/NAME --out bundle/models/model.pt`` joins the folds that
``scripts/train_folds.py`` has trained. The file also contains their provenance, see :mod:`experiments.ensemble`.
"""

from __future__ import annotations

from command_line import BUNDLE, run_tool

from experiments.experiment import ExperimentError
from scripts.model.errors import CheckpointError, SettingsMismatch


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
    from experiments.ensemble import join_experiment, summary  # imports torch, which takes seconds

    print(summary(join_experiment(runs, out, half, allow_missing), out))


if __name__ == "__main__":
    run_tool(ensemble_folds, ExperimentError, CheckpointError, SettingsMismatch, OSError)
