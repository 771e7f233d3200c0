"""Groups of evaluations: their metrics are those of the networks, differences are paired, faults are named."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from lifelines.utils import concordance_index

from experiments.experiment import ExperimentError
from research.compare_evaluations import compare_evaluations


def write_evaluation(folder: Path, seed: int, noise: float, patients: int = 60) -> str:
    """``cases.csv`` of a network; patients and outcomes are the same for all, predictions are not."""
    outcome, own = np.random.default_rng(0), np.random.default_rng(seed)
    risk = outcome.normal(size=patients)
    table = pd.DataFrame({"PatientID": [f"P-{k:03d}" for k in range(patients)], "centre": "A"})
    table["time"], table["event"] = outcome.exponential(1000 * np.exp(-risk)), outcome.random(patients) < 0.5
    table["log_hazard"] = risk + noise * own.normal(size=patients)
    table["hpv"] = (outcome.random(patients) < 0.5).astype(float)
    table["hpv_prob"] = np.clip(table["hpv"] * 0.4 + 0.6 * own.random(patients), 0, 1)
    folder.mkdir(parents=True)
    table.to_csv(folder / "cases.csv", index=False)
    return str(folder)


def test_means_and_differences_are_those_of_the_tables(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sharp = [write_evaluation(tmp_path / f"sharp{k}", k, 0.5) for k in (1, 2)]
    dull = [write_evaluation(tmp_path / f"dull{k}", k, 3.0) for k in (3, 4)]
    compare_evaluations(f"sharp={','.join(sharp)} dull={','.join(dull)}", samples=20)
    printed = capsys.readouterr().out
    found = {}
    for name, folders in (("sharp", sharp), ("dull", dull)):
        tables = [pd.read_csv(Path(folder) / "cases.csv") for folder in folders]
        found[name] = [concordance_index(t["time"], -t["log_hazard"], t["event"]) for t in tables]
        line = next(line for line in printed.splitlines() if line.startswith(f"| {name} | 2 |"))
        assert f" {np.mean(found[name]):.3f} [" in line
        assert f"({', '.join(f'{value:.3f}' for value in found[name])}); 60 patients" in line
    assert f"dull - sharp, C-index: {np.mean(found['dull']) - np.mean(found['sharp']):+.3f} [" in printed
    assert "(60 patients in 2)" in printed and "sharp - " not in printed
    assert "| - |" in printed and "Research use only" in printed  # no masks


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        pytest.param("", "--groups is empty", id="empty"),
        pytest.param("{a}", "got ", id="no_name"),
        pytest.param("x={a} x={a}", "each name once", id="name_twice"),
        pytest.param("x=", "got 'x='", id="no_folder"),
        pytest.param("x={a},{none}", "no table of cases at", id="no_table"),
        pytest.param("x={a},{fewer}", "has other patients than", id="other_patients"),
    ],
)
def test_what_cannot_be_compared_is_named(tmp_path: Path, groups: str, message: str) -> None:
    places = {
        "a": write_evaluation(tmp_path / "a", 1, 1.0),
        "fewer": write_evaluation(tmp_path / "fewer", 1, 1.0, patients=50),
        "none": str(tmp_path / "none"),
    }
    with pytest.raises(ExperimentError, match=message):
        compare_evaluations(groups.format(**places), samples=5)
