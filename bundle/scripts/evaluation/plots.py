"""Statistical plots: Kaplan-Meier curves, calibration, ROC, Dice, training curves, forest plots.

Each function takes data of ``metrics.json`` or ``history.json`` and returns a matplotlib figure; :func:`save_plots`
writes figures with their data. If nothing can be drawn, the figure contains the reason.
"""

from __future__ import annotations

import json
import math
import textwrap
from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Text

from scripts.cohorts.files import write_text, written_whole
from scripts.evaluation.survival import DAYS_PER_YEAR

COLOURS = ("#0072b2", "#e69f00", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#999933", "#555555")  # Okabe and Ito
GREY = "#8a8a8a"
GROUP_COLOURS = {"low": COLOURS[0], "intermediate": COLOURS[1], "high": COLOURS[2]}  # of the risk
DPI = 110
NOTE_LETTERS = 15  # of the note below a figure on an inch
CHANCE = 0.5  # C-index of a random order
Drawn = tuple[Figure | None, Any]  # a picture and the plain data that it shows, or None and the reason

LEAST_AT_RISK = 10  # with fewer patients each step of a curve is a single patient: not shown
LOSSES = {"loss": "loss", "seg": "segmentation loss", "hpv": "HPV loss", "surv": "survival loss"}
VALIDATION = {"val_c_index": "C-index", "val_dice": "Dice", "val_balanced_accuracy": "HPV balanced accuracy"}


def save_plot(path: str | Path, figure: Figure, data: Any = None) -> None:
    """Write ``figure`` as a PNG to ``path``, and its ``data`` (without NaN), if given, as JSON beside it."""
    path = Path(path)
    as_written(figure)
    with written_whole(path) as partial:
        figure.savefig(partial, format="png", dpi=DPI)
    if data is not None:
        write_text(path.with_suffix(".json"), json.dumps(data, indent=1, allow_nan=False))


def png_of(figure: Figure, dpi: int) -> bytes:
    """A figure as a PNG."""
    buffer = BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi)
    return buffer.getvalue()


def as_written(figure: Figure) -> None:
    """Show all texts of a figure literally: names of patients and centres may contain ``$``, which starts a formula."""
    for text in figure.findobj(Text):
        text.set_parse_math(False)


def save_plots(folder: Path, drawn: Mapping[str, Drawn], data: str) -> dict[str, dict[str, str]]:
    """Write the figures of an evaluation, each with its data, and remove those of an earlier one.

    Args:
        folder: for ``<name>.png`` and ``<name>.json``.
        drawn: by name.
        data: what the data are, written below the figures and to the JSON files.

    Returns:
        by name ``{"file": path from the parent folder}``, or ``{"reason": why there is none}``.
    """
    entries = {}
    for name, (figure, content) in drawn.items():
        path = folder / f"{name}.png"
        for old in (path, path.with_suffix(".json")):
            old.unlink(missing_ok=True)
        entries[name] = {"reason": content} if figure is None else {"file": f"{folder.name}/{path.name}"}
        if figure is not None:
            lines = textwrap.fill(data, int(NOTE_LETTERS * figure.get_figwidth()))
            figure.supxlabel(lines, x=0.99, ha="right", fontsize=7, color=GREY)
            save_plot(path, figure, {"data": data, "content": content})
    return entries


def survival_figures(survival: Mapping[str, Any], no_groups: str) -> dict[str, Drawn]:
    """Kaplan-Meier curves of the risk groups, and calibration at two years.

    Args:
        survival: of :func:`.survival_metrics`, or ``{"reason": why there is none}``.
        no_groups: reason for missing risk groups.

    Returns:
        ``kaplan_meier_median``, ``kaplan_meier_tertiles``, ``calibration_2y``.
    """
    drawn: dict[str, Drawn] = {}
    why = survival.get("reason", no_groups)
    for name in ("median", "tertiles"):
        groups = survival.get("risk_groups", {}).get(name)
        drawn[f"kaplan_meier_{name}"] = (
            (kaplan_meier_figure(groups, f"cut at the {name}"), groups) if groups else (None, why)
        )
    calibration = survival.get("calibration_2y", {"groups": [], "difference": {}})
    if any(group["value"] is not None for group in calibration["groups"]):
        drawn["calibration_2y"] = (calibration_figure(calibration), calibration)
    else:
        drawn["calibration_2y"] = (None, calibration["difference"].get("reason", why))
    return drawn


def kaplan_meier_figure(groups: Mapping[str, Any], title: str = "") -> Figure:
    """Recurrence-free survival of risk groups with 95 % intervals, censored patients and numbers at risk.

    ``groups`` is an entry of ``risk_groups`` of :func:`.survival_metrics`.
    """
    curves = groups["curves"]
    figure = _figure(6.4, 4.2 + 0.22 * len(curves))
    panel, table = figure.subplots(2, 1, height_ratios=[10, 1.2 + len(curves)])
    for colour, curve in zip(_group_colours(len(curves)), curves, strict=True):
        label = f"{curve['group']} ({curve['patients']} patients, {curve['events']} relapses)"
        years = np.array(curve["days"]) / DAYS_PER_YEAR
        panel.plot(years, curve["survival"], drawstyle="steps-post", color=colour, label=label, linewidth=1.8)
        low, high = (_floats(curve[name]) for name in ("low", "high"))
        panel.fill_between(years, low, high, step="post", color=colour, alpha=0.13, linewidth=0)
        if curve["days"]:
            censored = np.array(curve["censored_days"])
            rows = np.searchsorted(curve["days"], censored, side="right") - 1
            heights = np.array(curve["survival"])[rows]
            panel.plot(censored / DAYS_PER_YEAR, heights, linestyle="none", marker="|", color=colour, markersize=5)
    followed = np.sum([curve["at_risk"] for curve in curves], axis=0)
    end = float(max([1.0, *np.array(groups["at_risk_days"])[followed >= LEAST_AT_RISK] / DAYS_PER_YEAR]))
    panel.set(xlim=(0, end * 1.02), ylim=(0, 1.03), ylabel="recurrence-free survival")
    panel.set_title(title, loc="left")
    panel.set_title(_log_rank_text(groups["log_rank"]), loc="right", fontsize=9)
    panel.set_xlabel(f"years (while {LEAST_AT_RISK} patients are followed)" if end > 1 else "years")
    panel.legend(title="predicted risk", loc="lower left", framealpha=0.75, edgecolor="none", fontsize=9)
    _at_risk_table(table, groups, end)
    return figure


def _at_risk_table(panel: Axes, groups: Mapping[str, Any], end: float) -> None:
    curves = groups["curves"]
    years = np.array(groups["at_risk_days"]) / DAYS_PER_YEAR
    shown = np.flatnonzero(years <= end)[:: max(1, math.ceil(len(years) / 9))]
    panel.set(xlim=(0, end * 1.02), ylim=(len(curves) - 0.4, -1.6))
    panel.text(0, -1.0, "at risk", fontsize=9, ha="left", va="center")
    for row, (colour, curve) in enumerate(zip(_group_colours(len(curves)), curves, strict=True)):
        for column in shown:
            side = "left" if years[column] == 0 else "center"
            count = str(curve["at_risk"][column])
            panel.text(years[column], row, count, color=colour, fontsize=9, ha=side, va="center")
    panel.set_axis_off()


def _log_rank_text(log_rank: Mapping[str, Any]) -> str:
    if log_rank["value"] is None:
        return f"no log-rank test: {log_rank['reason']}"
    value = log_rank["value"]
    return "log-rank p < 0.001" if value < 0.001 else f"log-rank p = {value:.3f}"


def calibration_figure(calibration: Mapping[str, Any]) -> Figure:
    """Observed (Kaplan-Meier) against predicted survival of risk groups, from ``calibration_2y`` of the metrics."""
    figure = _figure(4.6, 4.4)
    panel = figure.subplots()
    years = calibration["days"] / DAYS_PER_YEAR
    panel.plot([0, 1], [0, 1], color=GREY, linewidth=1, linestyle="--", label="perfect")
    drawn = [group for group in calibration["groups"] if group["value"] is not None]
    for colour, group in zip(_group_colours(len(drawn)), drawn, strict=True):
        value = group["value"]
        low, high = (value if group[name] is None else group[name] for name in ("low", "high"))
        errors = [[value - low], [high - value]]
        style: dict[str, Any] = {"marker": "o", "capsize": 3, "color": colour, "linestyle": "none"}
        label = f"{group['group']} risk ({group['patients']})"
        panel.errorbar(group["predicted"], value, yerr=errors, label=label, **style)
    notes = [_named("observed - predicted", calibration["difference"], 3), _named("slope", calibration["slope"], 2)]
    panel.text(0.03, 0.97, "\n".join(notes), transform=panel.transAxes, va="top", fontsize=9, wrap=True)
    panel.set(xlim=(0, 1), ylim=(0, 1), aspect="equal")
    panel.set(xlabel=f"predicted survival at {years:g} years", ylabel="observed survival (Kaplan-Meier, 95 %)")
    panel.legend(loc="lower right", frameon=False, fontsize=9)
    return figure


def roc_figure(curves: Mapping[str, Mapping[str, Any]], title: str = "") -> Figure:
    """ROC curves; the first with a thick line, the others (folds) with thin ones.

    Args:
        curves: name to ``false_positive_rate`` and ``true_positive_rate`` (lists), ``auc`` (a metric of
            :func:`.summarise`) and optionally ``point``, the two rates at the threshold in use.
        title: of the figure.
    """
    figure = _figure(4.6, 4.4)
    panel = figure.subplots()
    panel.plot([0, 1], [0, 1], color=GREY, linewidth=1, linestyle="--")
    for number, (name, curve) in enumerate(curves.items()):
        colour, first = COLOURS[number % len(COLOURS)], number == 0
        label = f"{name}: AUC {with_interval(curve['auc'], 2)}" if first else f"{name}: {_value(curve['auc'], 2)}"
        width, alpha = (2.2, 1.0) if first else (1.0, 0.7)
        rates = curve["false_positive_rate"], curve["true_positive_rate"]
        panel.plot(*rates, color=colour, linewidth=width, alpha=alpha, label=label)
        if curve.get("point"):
            panel.plot(*curve["point"], marker="o", color=colour, markersize=6, linestyle="none")
    if not curves:
        _say(panel, "no ROC curve: no patients of both classes")
    panel.set(xlim=(-0.01, 1.01), ylim=(-0.01, 1.01), aspect="equal")
    panel.set(xlabel="1 - specificity", ylabel="sensitivity", title=title)
    if curves:
        panel.legend(loc="lower right", frameon=False, fontsize=8)
    return figure


def dice_figure(groups: Mapping[str, Sequence[float]], title: str = "") -> Figure:
    """Dice of every case, one column for each group that has cases, with median and quartiles."""
    filled = {name: np.asarray(values, dtype=float) for name, values in groups.items() if len(values)}
    figure = _figure(max(4.0, 1.1 + 0.75 * len(filled)), 3.8)
    panel = figure.subplots()
    rng = np.random.default_rng(0)  # of the horizontal scatter
    for place, values in enumerate(filled.values()):
        panel.scatter(place + rng.uniform(-0.22, 0.22, len(values)), values, s=9, alpha=0.5, color=COLOURS[0])
        low, middle, high = np.quantile(values, [0.25, 0.5, 0.75])
        panel.plot([place - 0.32, place + 0.32], [middle, middle], color=COLOURS[2], linewidth=2.2)
        panel.plot([place, place], [low, high], color=COLOURS[2], linewidth=1.4)
    if not filled:
        _say(panel, "no case has both a true and a predicted mask")
    labels = [f"{name}\n(n={len(values)})" for name, values in filled.items()]
    panel.set_xticks(range(len(filled)), labels, fontsize=9)
    panel.set(ylim=(-0.02, 1.02), ylabel="Dice", title=title)
    panel.grid(axis="y", alpha=0.3)
    return figure


def forest_figure(rows: Sequence[Mapping[str, Any]], title: str = "") -> Figure:
    """Forest plot: a row for each value with its interval, or for a ``value`` None with its ``reason``."""
    figure = _figure(6.6, 1.1 + 0.32 * max(1, len(rows)))
    panel = figure.subplots()
    values = [row[name] for row in rows for name in ("value", "low", "high") if row.get(name) is not None]
    lowest, highest = min([*values, CHANCE]), max(values, default=1.0)
    margin = 0.06 * max(highest - lowest, 0.1)
    for place, row in enumerate(rows):
        counts = ", ".join(f"{row[name]} {name}" for name in ("patients", "events") if name in row)
        if row["value"] is None:
            _beside(panel, place, f"none: {row['reason']}", GREY)
            continue
        low, high = (row["value"] if row[name] is None else row[name] for name in ("low", "high"))
        panel.plot([low, high], [place, place], color=COLOURS[0], linewidth=1.6)
        panel.plot(row["value"], place, marker="s", color=COLOURS[0], markersize=5)
        _beside(panel, place, f"{row['value']:.3f}  ({counts})", "black")
    panel.axvline(CHANCE, color=GREY, linestyle="--", linewidth=1)
    panel.set_yticks(range(len(rows)), [row["name"] for row in rows], fontsize=9)
    panel.set(xlim=(lowest - margin, highest + margin), ylim=(len(rows) - 0.4, -0.6), title=title)
    return figure


def _beside(panel: Axes, place: int, text: str, colour: str) -> None:
    """Text to the right of the axes, in the row ``place``."""
    style: dict[str, Any] = {"va": "center", "fontsize": 8, "color": colour, "annotation_clip": False}
    panel.annotate(text, (1.02, place), xycoords=("axes fraction", "data"), **style)


def draw_patient_curve(panel: Axes, survival: Mapping[str, Any]) -> None:
    """Predicted recurrence-free survival of one patient: the curve, the range of the folds, the reported years.

    The curve ends at the last of these years (at the end of follow-up where none is reported).
    """
    curve = survival["curve"]
    years = np.array(curve["days"], dtype=float) / DAYS_PER_YEAR
    colour = GROUP_COLOURS.get(survival.get("risk_group") or "", GREY)
    if curve["low"] is not None:  # several folds
        panel.fill_between(
            years, _floats(curve["low"]), _floats(curve["high"]), step="post", color=colour, alpha=0.2, linewidth=0
        )
    panel.plot(years, _floats(curve["survival"]), drawstyle="steps-post", color=colour, linewidth=1.8)
    for row in survival.get("recurrence_free_survival", []):
        panel.plot(row["years"], row["survival"], "o", color=colour, markersize=4)
    given = [row["years"] for row in survival.get("recurrence_free_survival", [])]
    panel.set(xlim=(0, max(given, default=max(1.0, float(years[-1]))) * 1.02), ylim=(0, 1.03))
    panel.set_ylabel("recurrence-free survival", fontsize=8)
    panel.set_xlabel("years", fontsize=8)
    panel.tick_params(labelsize=8)
    panel.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f} %")
    panel.spines[["top", "right"]].set_visible(False)
    panel.grid(alpha=0.25)


def training_figure(histories: Mapping[str, Sequence[Mapping[str, Any]]]) -> Figure:
    """Training losses and validation metrics by epoch, one line for each fold (name to its ``history.json``)."""
    named = {**LOSSES, **VALIDATION}
    rows = [row for history in histories.values() for row in history]
    shown = {key: name for key, name in named.items() if any(row.get(key) is not None for row in rows)}
    columns = min(4, max(1, len(shown)))
    lines = max(1, math.ceil(len(shown) / columns))
    figure = _figure(3.0 * columns, 0.6 + 2.3 * lines)
    panels = np.atleast_1d(figure.subplots(lines, columns)).ravel()
    for panel in panels[max(1, len(shown)) :]:
        panel.set_axis_off()
    for panel, (key, name) in zip(panels, shown.items(), strict=False):
        for number, (fold, history) in enumerate(histories.items()):
            points = [(row["epoch"], row[key]) for row in history if row.get(key) is not None]
            if points:
                line: dict[str, Any] = {"color": COLOURS[number % len(COLOURS)], "label": fold, "linewidth": 1.3}
                single = {"marker": "o", "markersize": 4} if len(points) == 1 else {}  # a line needs two points
                panel.plot(*zip(*points, strict=True), **line, **single)
        panel.set_title(f"{name} ({'validation' if key in VALIDATION else 'training'})", fontsize=9)
        panel.set_xlabel("epoch", fontsize=8)
        panel.tick_params(labelsize=8)
        panel.grid(alpha=0.25)
    if shown:
        panels[0].legend(frameon=False, fontsize=8)
    else:
        _say(panels[0], "no epoch is complete")
    return figure


def _figure(width: float, height: float) -> Figure:
    return Figure(figsize=(width, height), layout="constrained", facecolor="white")


def _group_colours(groups: int) -> tuple[str, ...]:
    """A colour for each risk group, from blue to red."""
    return (COLOURS[0], COLOURS[2]) if groups == 2 else COLOURS[:groups]


def _floats(values: Sequence[float | None]) -> np.ndarray:
    return np.array([math.nan if value is None else value for value in values], dtype=float)


def _value(row: Mapping[str, Any], digits: int) -> str:
    return "none" if row["value"] is None else decimals(row["value"], digits)


def with_interval(row: Mapping[str, Any], digits: int) -> str:
    """``0.712 [0.650, 0.770]``, the value alone where there is no interval, or ``none``."""
    if row["value"] is None or row.get("low") is None or row.get("high") is None:
        return _value(row, digits)
    value, low, high = (decimals(row[name], digits) for name in ("value", "low", "high"))
    return f"{value} [{low}, {high}]"


def decimals(value: float, digits: int) -> str:
    """A rounded number, without the sign of a zero.

    Example:
        >>> decimals(-0.0001, 3), decimals(-0.51, 1)
        ('0.000', '-0.5')
    """
    return f"{round(value, digits) + 0.0:.{digits}f}"


def _named(name: str, row: Mapping[str, Any], digits: int) -> str:
    return f"no {name}: {row['reason']}" if row["value"] is None else f"{name} {with_interval(row, digits)}"


def _say(panel: Axes, text: str) -> None:
    panel.text(0.5, 0.5, text, transform=panel.transAxes, ha="center", va="center", color=GREY, wrap=True)
