"""Plots show the data they are given, and say in words what they cannot show."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.text import Text

from scripts.evaluation.plots import (
    GROUP_COLOURS,
    calibration_figure,
    dice_figure,
    draw_patient_curve,
    forest_figure,
    kaplan_meier_figure,
    roc_figure,
    save_plot,
    save_plots,
    training_figure,
)
from scripts.evaluation.survival import Outcomes
from scripts.evaluation.survival_metrics import survival_metrics


@pytest.fixture(scope="module")
def figures() -> dict:
    """Survival figures of made-up patients."""
    rng = np.random.default_rng(0)
    risk = rng.normal(size=120)
    outcomes = Outcomes(rng.exponential(1500 * np.exp(-risk)), rng.random(120) < 0.7)

    def survival(days: np.ndarray) -> np.ndarray:
        return np.exp(-np.outer(np.exp(risk), days / 2000))

    cuts = {"median": [0.0], "tertiles": [-0.4, 0.4]}
    return survival_metrics(outcomes, outcomes, risk, survival=survival, cuts=cuts, samples=20)


def texts(figure: Figure) -> str:
    items = [item for panel in figure.axes for item in [*panel.texts, *legend_texts(panel)]]
    titles = [panel.get_title(loc) for panel in figure.axes for loc in ("left", "center", "right")]
    return "\n".join([*titles, *(item.get_text() for item in items)])


def legend_texts(panel) -> list:
    legend = panel.get_legend()
    return legend.get_texts() if legend else []


def test_kaplan_meier_curves_and_numbers_at_risk(figures) -> None:
    groups = figures["risk_groups"]["tertiles"]
    figure = kaplan_meier_figure(groups, "title")
    lines = [line for line in figure.axes[0].get_lines() if line.get_drawstyle() == "steps-post"]
    for line, curve in zip(lines, groups["curves"], strict=True):
        np.testing.assert_allclose(line.get_ydata(), curve["survival"])
        np.testing.assert_allclose(np.asarray(line.get_xdata()) * 365.25, curve["days"])
    shown = texts(figure)
    assert "log-rank p" in shown
    for curve in groups["curves"]:
        assert f"{curve['group']} ({curve['patients']} patients, {curve['events']} relapses)" in shown
        assert str(curve["at_risk"][0]) in [item.get_text() for item in figure.axes[1].texts]


def test_curves_end_while_enough_patients_are_followed(figures) -> None:
    groups = figures["risk_groups"]["median"]
    followed = np.sum([curve["at_risk"] for curve in groups["curves"]], axis=0)
    end = kaplan_meier_figure(groups).axes[0].get_xlim()[1]
    assert end == pytest.approx(1.02 * max(1, np.flatnonzero(followed >= 10).max()))
    assert end < len(followed), "the made-up cohort must reach below ten patients"


def test_an_empty_group_and_no_test_are_drawn_with_their_reason() -> None:
    empty = {"group": "high", "patients": 0, "events": 0, "at_risk": [0, 0]}
    empty |= {name: [] for name in ("days", "survival", "low", "high", "censored_days")}
    full = {"group": "low", "patients": 2, "events": 1, "days": [0, 100, 400], "survival": [1, 0.5, 0.5]}
    full |= {"low": [1, None, 0.1], "high": [1, 0.9, 0.9], "censored_days": [400], "at_risk": [2, 1]}
    log_rank = {"value": None, "reason": "1 of the groups has patients"}
    figure = kaplan_meier_figure({"curves": [full, empty], "at_risk_days": [0, 365.25], "log_rank": log_rank})
    assert "no log-rank test: 1 of the groups has patients" in texts(figure)


def test_calibration_points_and_reasons(figures) -> None:
    calibration = figures["calibration_2y"]
    figure = calibration_figure(calibration)
    points = [container[0].get_xydata()[0] for container in figure.axes[0].containers]
    np.testing.assert_allclose(points, [[group["predicted"], group["value"]] for group in calibration["groups"]])
    none = {"value": None, "reason": "no events"}
    assert "no slope: no events" in texts(calibration_figure(calibration | {"slope": none}))


def test_roc_with_the_point_in_use() -> None:
    auc = {"value": 0.75, "low": 0.6, "high": 0.9}
    curve = {"false_positive_rate": [0, 0.5, 1], "true_positive_rate": [0, 1, 1], "auc": auc, "point": [0.5, 1]}
    figure = roc_figure({"pooled": curve, "fold 0": curve | {"point": None}})
    assert "pooled: AUC 0.75 [0.60, 0.90]" in texts(figure)
    assert "fold 0: 0.75" in texts(figure)
    assert [0.5, 1] in [
        list(line.get_xydata()[0]) for line in figure.axes[0].get_lines() if len(line.get_xydata()) == 1
    ]


def test_dice_of_every_case_is_there() -> None:
    figure = dice_figure({"all": [0.2, 0.9, 0.8], "MDA": [0.9], "USZ": []})
    heights = np.concatenate([points.get_offsets()[:, 1] for points in figure.axes[0].collections])
    np.testing.assert_allclose(sorted(heights), [0.2, 0.8, 0.9, 0.9])
    assert [label.get_text() for label in figure.axes[0].get_xticklabels()] == ["all\n(n=3)", "MDA\n(n=1)"]


def test_forest_rows_have_values_or_reasons() -> None:
    rows = [
        {"name": "pooled", "value": 0.7, "low": 0.6, "high": 0.8, "patients": 50, "events": 9},
        {"name": "one draw", "value": 0.6, "low": None, "high": None, "patients": 5},
        {"name": "USZ", "value": None, "reason": "no events", "patients": 3},
    ]
    shown = texts(forest_figure(rows))
    assert "0.700  (50 patients, 9 events)" in shown
    assert "none: no events" in shown


def test_training_curves_skip_epochs_without_validation() -> None:
    history = [{"epoch": 1, "loss": 3.0, "val_dice": None}, {"epoch": 2, "loss": 2.0, "val_dice": 0.4}]
    figure = training_figure({"fold 0": history})
    lines = {
        panel.get_title(): panel.get_lines()[0].get_xydata().tolist() for panel in figure.axes if panel.get_title()
    }
    assert lines == {"loss (training)": [[1, 3], [2, 2]], "Dice (validation)": [[2, 0.4]]}


def test_a_single_epoch_is_visible() -> None:
    history = [{"epoch": 1, "loss": 3.0}, {"epoch": 2, "loss": 2.0}]
    for rows, marker in ((history[:1], "o"), (history, "None")):
        (panel,) = (axes for axes in training_figure({"fold 0": rows}).axes if axes.get_title())
        assert panel.get_lines()[0].get_marker() == marker


@pytest.mark.parametrize(
    ("figure", "text"),
    [
        pytest.param(lambda: roc_figure({}), "no ROC curve", id="roc"),
        pytest.param(lambda: dice_figure({"all": []}), "no case has both", id="dice"),
        pytest.param(lambda: training_figure({"fold 0": []}), "no epoch is complete", id="training"),
    ],
)
def test_nothing_to_draw_is_said(figure, text) -> None:
    assert text in texts(figure())


def test_a_plot_is_written_with_its_data(tmp_path: Path) -> None:
    save_plot(tmp_path / "figures" / "a.png", dice_figure({"all": [0.5]}), {"all": [0.5]})
    assert (tmp_path / "figures" / "a.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((tmp_path / "figures" / "a.json").read_text()) == {"all": [0.5]}
    with pytest.raises(ValueError, match="JSON"):
        save_plot(tmp_path / "b.png", dice_figure({}), {"all": [math.nan]})


def test_an_evaluation_writes_below_its_figures_what_the_data_are(tmp_path: Path) -> None:
    drawn = {"dice": (dice_figure({"all": [0.5]}), [0.5]), "roc": (None, "no HPV status")}
    entries = save_plots(tmp_path / "figures", drawn, "3 digital phantoms, not for clinical use")
    assert entries == {"dice": {"file": "figures/dice.png"}, "roc": {"reason": "no HPV status"}}
    assert drawn["dice"][0].get_supxlabel() == "3 digital phantoms, not for clinical use"
    written = json.loads((tmp_path / "figures" / "dice.json").read_text())
    assert written == {"data": "3 digital phantoms, not for clinical use", "content": [0.5]}


@pytest.mark.parametrize("width", [4.0, 6.4])
def test_what_the_data_are_stays_within_the_figure(tmp_path: Path, width: float) -> None:
    figure = Figure(figsize=(width, 3.0), layout="constrained")
    figure.subplots()
    data = "43 of 59 cases of 7 centres (CHUM, CHUP, CHUS, HGJ, HMR, MDA, USZ); research use only, not for clinical use"
    save_plots(tmp_path / "figures", {"roc": (figure, [])}, data)
    (note,) = (text for text in figure.findobj(Text) if text.get_text().startswith("43 of 59"))
    box = note.get_window_extent()
    assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= figure.bbox.x1
    assert " ".join(note.get_text().split()) == data


def test_the_curve_of_a_patient_shows_the_years_that_are_given() -> None:
    survival = {
        "curve": {"days": [0, 400, 900], "survival": [1, 0.9, 0.8], "low": [1, 0.8, 0.7], "high": [1, 0.95, 0.9]},
        "recurrence_free_survival": [{"years": 1, "survival": 1.0}, {"years": 2, "survival": 0.9}],
        "risk_group": "high",
    }
    panel = Figure().subplots()
    draw_patient_curve(panel, survival)
    curve, *points = panel.get_lines()
    assert curve.get_ydata().tolist() == [1, 0.9, 0.8]
    assert curve.get_color() == GROUP_COLOURS["high"]
    assert [(point.get_xdata()[0], point.get_ydata()[0]) for point in points] == [(1, 1.0), (2, 0.9)]
    assert panel.get_xlim() == (0, pytest.approx(2 * 1.02)), "the curve ends at the last of them"


@pytest.mark.parametrize(
    "draw",
    [
        pytest.param(lambda name: dice_figure({name: [0.5]}, name), id="dice"),
        pytest.param(lambda name: forest_figure([{"name": name, "value": None, "reason": name}], name), id="forest"),
        pytest.param(
            lambda name: roc_figure(
                {name: {"false_positive_rate": [0, 1], "true_positive_rate": [0, 1], "auc": {"value": 0.5}}}
            ),
            id="roc",
        ),
    ],
)
def test_a_centre_may_be_called_like_a_formula(tmp_path, draw):
    save_plot(tmp_path / "a.png", draw(r"$\nothing{$"))
    assert (tmp_path / "a.png").stat().st_size > 0
