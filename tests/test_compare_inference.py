"""Ways of inference: what a flip, dropped components and an ensemble do, and the table of differences."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch
from tiny_model import write_model

from conftest import make_tiny_cohort
from research.compare_inference import DIFFERENCES, compare, compare_inference, without_small
from scripts import keys


def test_a_cohort_is_predicted_once_and_compared(tmp_path, capsys) -> None:
    """Dropping nothing changes nothing; the second run predicts no case again and gives the same table."""
    cohort = make_tiny_cohort(tmp_path / "in", 4)
    folds = [str(write_model(tmp_path / f"fold_{k}", folds=1, seed=k)) for k in range(2)]
    for _ in range(2):
        compare_inference(folds, str(cohort), str(tmp_path / "out"), drop_ml=0.0, samples=20)
    [path] = (tmp_path / "out").glob("cases_*.csv")
    cases = pd.read_csv(path)
    ways = {
        f"{name}{flip}{left_out}"
        for name in ("fold 0", "fold 1", "ensemble")
        for flip in ("", " + flip")
        for left_out in ("", " + drop", " + peak")
    }
    assert set(cases["way"]) == ways and len(cases) == 4 * len(ways)
    by = {way: rows.set_index("PatientID") for way, rows in cases.groupby("way")}
    mean = (by["fold 0"]["hpv_prob"] + by["fold 1"]["hpv_prob"]) / 2
    np.testing.assert_allclose(by["ensemble"]["hpv_prob"], mean, rtol=1e-5)
    assert not np.array_equal(by["ensemble + flip"]["hpv_prob"], by["ensemble"]["hpv_prob"])
    found = pd.read_csv(tmp_path / "out" / DIFFERENCES)
    assert (found[found["way"].str.endswith("drop") & (found["metric"] == "dice")]["value"] == 0).all()
    assert "Research use only" in capsys.readouterr().out


def test_a_model_that_sees_the_mirror_image_alike_gains_nothing_from_it(tmp_path) -> None:
    """A network of zeros predicts the same everywhere, so that the flip changes no output."""
    folder = write_model(tmp_path / "fold", folds=1)
    state = torch.load(folder / "model.pt", weights_only=True)
    torch.save({k: v * 0 if isinstance(v, torch.Tensor) else v for k, v in state.items()}, folder / "model.pt")
    compare_inference(str(folder), str(make_tiny_cohort(tmp_path / "in", 3)), str(tmp_path / "out"), samples=5)
    [path] = (tmp_path / "out").glob("cases_*.csv")
    by = {way: rows.reset_index(drop=True) for way, rows in pd.read_csv(path).groupby("way")}
    for name in ("log_hazard", "hpv_prob", "volume_ml"):
        np.testing.assert_allclose(by["fold 0 + flip"][name], by["fold 0"][name])


@pytest.mark.parametrize(
    ("voxels", "left"),
    [
        pytest.param(0.0, 9, id="nothing_dropped"),
        pytest.param(1.0, 9, id="as_large_as_the_smallest"),
        pytest.param(1.5, 8, id="a_little_larger"),
        pytest.param(8.0, 8, id="as_large_as_the_largest"),
        pytest.param(8.1, 0, id="all_dropped"),
    ],
)
def test_small_components_are_dropped(voxels: float, left: int) -> None:
    probability = torch.full((1, 1, 8, 8, 8), 0.2)
    probability[..., :2, :2, :2] = 0.9
    probability[..., 6, 6, 6] = 0.7
    kept = without_small({keys.SEG_PROB: probability, keys.HPV_PROB: torch.tensor([0.3])}, voxels)
    assert int((kept[keys.SEG_PROB] > 0.5).sum()) == left
    assert kept[keys.HPV_PROB] == 0.3 and int((probability > 0.5).sum()) == 9


def test_differences_are_of_the_same_patients() -> None:
    table = pd.DataFrame({"PatientID": list("abc"), "dice": [0.5, 0.6, np.nan]})
    ways = {"fold 0": 0.0, "fold 0 + flip": 0.1, "fold 0 + drop": 0.2, "fold 0 + peak": 0.25, "ensemble": 0.3}
    cases = pd.concat(
        table.assign(
            way=way,
            dice=table["dice"] + more,
            time=[1, 2, 3],
            event=1,
            hpv=[0, 1, 1],
            log_hazard=0.0,
            hpv_prob=0.5,
            matched_lesions=1,
            predicted_lesions=1,
            true_lesions=1,
        )
        for name, more in ways.items()
        for way in ([name] if "fold" in name else [name, *(f"{name} + {way}" for way in ("flip", "drop", "peak"))])
    )
    found = compare(cases, 1, samples=10).set_index(["way", "minus", "metric"])
    flip = found.loc[("fold 0 + flip", "fold 0", "dice")]
    assert (flip["value"], flip["low"], flip["high"], flip["patients"]) == pytest.approx((0.1, 0.1, 0.1, 2))
    assert found.loc[("ensemble", "fold 0", "dice")]["value"] == pytest.approx(0.3)
    assert found.loc[("fold 0 + peak", "fold 0", "dice")]["value"] == pytest.approx(0.25)
    assert ("fold 0 + drop", "fold 0", "c_index") not in found.index
