"""Demonstration on phantoms: make a cohort, train briefly, evaluate, predict, and print the results.

Every step is the command that a user would type for real data; it is printed before it runs.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd

from command_line import BUNDLE, ROOT, run_tool

from scripts.evaluation.bootstrap import bootstrap_interval
from scripts.evaluation.case_metrics import c_index, format_summary
from scripts.prediction.figures import save_case_figure

TRAIN = "['configs/train.json','configs/demo.json']"
EVALUATE = "['configs/train.json','configs/demo.json','configs/evaluate.json']"


def run_demo(
    cohort_dir: str = "bundle/data/demonstration",
    output_dir: str = "output/demo",
    cases: int = 300,
    epochs: int = 24,
    seed: int = 0,
) -> None:
    """Make phantoms, train one fold, evaluate it on the held-out phantoms, predict all, and print the metrics.

    Args:
        cohort_dir: folder of the phantoms; existing ones are used again.
        output_dir: folder for everything else; an interrupted run is resumed.
        cases: number of phantoms; a third of them are held out.
        epochs: of training.
        seed: of the cohort, of the folds and of the training.
    """
    start = time.monotonic()
    cohort, output = Path(cohort_dir).resolve(), Path(output_dir).resolve()
    make = [str(ROOT / "scripts" / "make_cohort.py"), "--out", str(cohort), "--cases", str(cases)]
    _step("1/4 make the phantom cohort", [*make, "--seed", str(seed), "--scale", "small"])
    common = ["--dataset_dir", str(cohort), "--output_dir", str(output), "--seed", str(seed)]
    run = ["-m", "monai.bundle", "run"]
    _step("2/4 train", [*run, "training", "--config_file", TRAIN, *common, "--epochs", str(epochs)])
    _step("3/4 evaluate", [*run, "evaluating", "--config_file", EVALUATE, *common])
    predict = [*run, "inference", "--config_file", "configs/inference.json", "--dataset_dir", str(cohort)]
    predictions = output / "predictions"
    _step("4/4 predict", [*predict, "--ckpt_dir", str(output / "models"), "--output_dir", str(predictions)])
    picture = _picture(cohort, output)
    print(_summary(cohort, output, picture, time.monotonic() - start))


def _step(title: str, command: list[str]) -> None:
    shown = " ".join(f'"{part}"' if "[" in part else part for part in command)
    print(f"\n== {title}\n   (in {BUNDLE.name}/)  python {shown}", flush=True)
    code = subprocess.run([sys.executable, *command], cwd=BUNDLE, check=False).returncode
    if code:
        print(f"step '{title}' ended with exit code {code}; see the messages above", file=sys.stderr)
        raise SystemExit(code)


def _picture(cohort: Path, output: Path) -> Path:
    """Held-out phantom of median Dice with its true and its predicted outline."""
    held_out = pd.read_csv(output / "evaluation" / "cases.csv", converters={"PatientID": str}).dropna(subset=["dice"])
    patient = held_out.sort_values("dice").iloc[len(held_out) // 2]["PatientID"]
    files = cohort / "Task 1" / patient / patient
    masks = {
        "true": f"{files}.nii.gz",
        "predicted": output / "predictions" / patient / f"{patient}__tumour.nii.gz",
    }
    path = output / "median_case.png"
    save_case_figure(path, f"{files}__CT.nii.gz", f"{files}__PT.nii.gz", masks, f"phantom {patient}, held out")
    return path


def _summary(cohort: Path, output: Path, picture: Path, seconds: float) -> str:
    report = json.loads((output / "evaluation" / "metrics.json").read_text())
    held_out = pd.read_csv(output / "evaluation" / "cases.csv", converters={"PatientID": str})
    truth = pd.read_csv(cohort / "truth.csv", converters={"PatientID": str}).set_index("PatientID")
    oracle = held_out.dropna(subset=["time"]).copy()
    oracle["log_hazard"] = truth.loc[oracle["PatientID"], "log_hazard"].to_numpy()
    low, high = bootstrap_interval(c_index, oracle)
    return "\n".join(
        [
            "",
            f"== done in {seconds / 60:.1f} min",
            f"On {len(held_out)} held-out PHANTOMS (no patients), by the last epoch, value [95 % interval]:",
            format_summary(report["metrics"]),
            f"  {'oracle C-index':<22} {c_index(oracle):.3f}  [{low:.3f}, {high:.3f}]  (the phantoms' true log hazard)",
            "",
            "Where to look next:",
            f"  {picture}   a held-out phantom of median Dice, true and predicted outline",
            f"  {output / 'predictions' / 'predictions.csv'}   all phantoms, the training cases too; masks beside it",
            f"  {output / 'evaluation' / 'cases.csv'}   the held-out cases one by one",
            f"  tensorboard --logdir {output / 'tensorboard'}   the training curves",
            "  README.md, 'Train on your data': the same commands on a HECKTOR folder",
        ]
    )


if __name__ == "__main__":
    run_tool(run_demo, OSError)
