"""Report of a study of learning: metrics with intervals, differences, and tables in Markdown."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from experiments.comparators import clinical_hpv, clinical_risks
from experiments.ensemble import choose_hpv_threshold
from experiments.evidence import read_cases, read_run
from experiments.experiment import EXPERIMENT_FILE, ExperimentError, read_experiment
from research.study import BASE, VARIANTS, Study, check_run, run_name
from scripts import keys
from scripts.cohorts.cohort import load_cohort
from scripts.cohorts.thresholds import HALF
from scripts.evaluation.bootstrap import bootstrap_interval, paired_bootstrap
from scripts.evaluation.case_metrics import MEASURES

RUN_FILE = "run.json"

COLUMNS = {
    "c_index": "C-index",
    "dice": "Dice",
    "balanced_accuracy": "HPV balanced accuracy, threshold 0.5",
    "balanced_accuracy_chosen": "HPV balanced accuracy, threshold chosen on training cases",
    "hpv_auc": "HPV ROC AUC",
}
CLINICAL, ORACLE = "clinical values alone (Cox, logistic regression)", "oracle (the phantoms' true log hazard)"

Cells = dict[str, pd.DataFrame]
"""Cases on which networks are evaluated, by seed and fold, indexed by patient."""


def read_cells(study: Study, variant: str) -> Cells:
    """Cases on which the finished networks of a variant are evaluated, with the HPV threshold chosen on training cases.

    Raises:
        ExperimentError: a run is not what its name says.
    """
    cells: Cells = {}
    for seed in study.seeds:
        for fold in study.folds:
            if not study.is_complete(variant, seed, [fold]):
                continue
            check_run(study, variant, seed)
            table, training = map(read_cases, study.cases_files(variant, seed, fold))
            if "hpv_prob" in table:
                chosen = choose_hpv_threshold(training)
                table["chosen"] = HALF if chosen["value"] is None else chosen["value"]
            cells[f"seed {seed}, fold {fold}"] = table.set_index("PatientID").sort_index()
    return cells


def columns_of(name: str) -> dict[str, str]:
    """Columns of the held-out cases that a metric reads, and what its measure calls them."""
    if name == "balanced_accuracy_chosen":
        return {"hpv_prob": "hpv_prob", "hpv": "hpv", "chosen": "hpv_threshold"}
    return {column: column for column in MEASURES[name].columns}


def wide_table(cells: Cells, name: str) -> pd.DataFrame:
    """A row for each patient; for every network the columns that a metric reads, NaN where it did not hold it out."""
    columns = columns_of(name)
    parts = {
        cell: table[list(columns)].astype(float).dropna().rename(columns=columns)
        for cell, table in cells.items()
        if set(columns) <= set(table)
    }
    return pd.concat(parts, axis=1, sort=True) if parts else pd.DataFrame()


def mean_over_networks(rows: pd.DataFrame, name: str) -> float:
    """Mean of a metric over the networks of :func:`wide_table`, each on the patients among ``rows`` that it held out.

    Pairs of patients are compared within a network: log hazards of two networks have no common scale.
    """
    values = list(each_network(rows, name).values())
    return float(np.nanmean(values)) if not np.isnan(values).all() else math.nan


def each_network(rows: pd.DataFrame, name: str) -> dict[str, float]:
    """A metric of each network; NaN where it is undefined."""
    statistic = MEASURES["balanced_accuracy" if name == "balanced_accuracy_chosen" else name].statistic
    names = list(columns_of(name).values())
    numbers = rows.to_numpy()
    found = {}
    for position, cell in enumerate(dict.fromkeys(rows.columns.get_level_values(0))):
        block = numbers[:, position * len(names) : (position + 1) * len(names)]
        block = block[~np.isnan(block).any(axis=1)]
        found[cell] = statistic(pd.DataFrame(block, columns=names)) if len(block) else math.nan
    return found


def metric(cells: Cells, name: str, samples: int, seed: int) -> dict[str, Any]:
    """Mean of a metric over networks with its interval over patients, the spread over networks, and counts."""
    table = wide_table(cells, name)
    if table.empty:
        return {"value": None, "reason": "not a task of this variant" if cells else "no finished run"}
    networks = each_network(table, name)
    value = mean_over_networks(table, name)
    head: dict[str, Any] = {"networks": networks, "patients": len(table)}
    if keys.EVENT in columns_of(name):
        head["events"] = int(table.xs(keys.EVENT, axis=1, level=1).max(axis=1).sum())
    if math.isnan(value):
        return {"value": None, "reason": "it is undefined for these patients", **head}
    low, high = bootstrap_interval(partial(mean_over_networks, name=name), table, samples, seed)
    spread = float(np.nanstd(list(networks.values()), ddof=1)) if len(networks) > 1 else None
    return {"value": value, "low": low, "high": high, "standard_deviation": spread, **head}


def difference(cells: Cells, base: Cells, name: str, samples: int, seed: int) -> dict[str, Any]:
    """A metric minus that of the base, on the patients that both held out with the same seed and fold."""
    shared = [cell for cell in cells if cell in base]
    pairs = [wide_table({cell: table[cell] for cell in shared}, name) for table in (cells, base)]
    if any(pair.empty for pair in pairs):
        return {"value": None, "reason": "nothing that both have"}
    first, second = pairs[0].align(pairs[1], join="inner")
    both = first.notna() & second.notna()
    some = both.any(axis=1)
    statistic: Callable[[pd.DataFrame], float] = partial(mean_over_networks, name=name)
    result = paired_bootstrap(statistic, first.where(both)[some], second.where(both)[some], samples, seed)
    return result | {"networks": len(shared)}


def with_oracle(cells: Cells, dataset_dir: str) -> Cells:
    """The same cases with the phantoms' true log hazard; none for a cohort that is not of phantoms."""
    path = Path(dataset_dir) / "truth.csv"
    if not path.is_file():
        return {}
    truth = pd.read_csv(path, converters={"PatientID": str}).set_index("PatientID")["log_hazard"]
    return {cell: with_risk(table, truth) for cell, table in cells.items()}


def with_clinical(study: Study, variant: str, cells: Cells) -> Cells:
    """The same cases by models of clinical values, fitted to the network's training cases: log hazard, HPV probability.

    Raises:
        ValueError: no model can be fitted, or it gives everybody the same.
    """
    found: Cells = {}
    for seed in study.seeds:
        mine = {cell: table for cell, table in cells.items() if cell.startswith(f"seed {seed},")}
        if mine:
            run = read_run(study.run_folder(variant, seed))
            others = load_cohort(study.test_dir).cases if study.test_dir else None
            risks = clinical_risks(run, others).set_index("PatientID")["clinical_risk"]
            status = clinical_hpv(run, others).set_index("PatientID")["clinical_hpv"]
            for cell, table in mine.items():
                found[cell] = with_risk(table, risks)
                if "hpv" in table:
                    hpv = {"hpv": table["hpv"], "hpv_prob": status.reindex(table.index), "chosen": HALF}
                    found[cell] = found[cell].assign(**hpv)
    return found


def with_risk(cases: pd.DataFrame, risk: pd.Series) -> pd.DataFrame:
    """Outcomes of the cases with another log hazard."""
    return cases[[keys.TIME, keys.EVENT]].assign(log_hazard=risk.reindex(cases.index))


def make_report(
    study: Study, samples: int, seed: int, command: str, tell: Callable[[str], None] = lambda _: None
) -> dict[str, Any]:
    """Every metric of the finished runs.

    Args:
        study: what is reported.
        samples: draws of the bootstrap.
        seed: of the draws.
        command: that makes the report.
        tell: called with a line of text for each variant.

    Raises:
        ExperimentError: nothing is finished, or a run is not what its name says.
    """
    cells = {variant: read_cells(study, variant) for variant in study.variants}
    cells = {variant: found for variant, found in cells.items() if found}
    if not cells:
        raise ExperimentError(f"no finished run of these variants, seeds and folds in {study.folder}")
    first = BASE if BASE in cells else next(iter(cells))
    others: dict[str, Cells] = {}
    notes: list[str] = []
    try:
        others[CLINICAL] = with_clinical(study, first, cells[first])
    except ValueError as error:
        notes.append(f"{CLINICAL}: {str(error).splitlines()[0]}")
    others[ORACLE] = with_oracle(cells[first], study.test_dir or study.dataset_dir)
    rows = {}
    for variant, found in cells.items():
        tell(f"{variant}: {len(found)} networks")
        against = VARIANTS[variant].against if VARIANTS[variant].against in cells else first
        rows[variant] = {"what": VARIANTS[variant].what, **judge(found, against, cells, samples, seed)}
        rows[variant]["runs"] = {
            run_name(variant, number): run_facts(study.run_folder(variant, number)) for number in study.seeds
        }
    comparators = {name: judge(found, first, cells, samples, seed) for name, found in others.items() if found}
    return {
        "notice": keys.RESEARCH_USE_ONLY,
        "data": read_experiment(study.run_folder(first, seed_of(cells[first])))["cohort"]["trained_on"],
        "dataset_dir": study.dataset_dir,
        "judged_by": judged_by(study),
        "seeds": list(study.seeds),
        "folds": list(study.folds),
        "interval": f"95 %, bootstrap over patients, {samples} draws, seed {seed}, networks fixed",
        "command": command,
        "notes": notes,
        "variants": rows,
        "comparators": comparators,
        "share_of_oracle": share_of_oracle(rows, comparators),
    }


def judged_by(study: Study) -> str:
    """Which cases the metrics are of, in words."""
    if study.test_dir is None:
        return "the cases that each network held out"
    cohort = load_cohort(study.test_dir)
    return f"other cases, {Path(study.test_dir).name}: {cohort.statement(cohort.cases)}"


def seed_of(cells: Cells) -> int:
    """Seed of the first network."""
    return int(next(iter(cells)).split(",")[0].removeprefix("seed "))


def judge(cells: Cells, against: str, others: Mapping[str, Cells], samples: int, seed: int) -> dict[str, Any]:
    """Metrics of one variant, and its differences to that of ``others`` which it is compared with."""
    compared = () if cells is others[against] else tuple(COLUMNS)
    return {
        "networks": list(cells),
        "metrics": {name: metric(cells, name, samples, seed) for name in COLUMNS},
        "against": against,
        "differences": {name: difference(cells, others[against], name, samples, seed) for name in compared},
    }


def run_facts(folder: Path) -> dict[str, Any]:
    """Where a run ran and how long it took, and its epochs; what is not recorded is left out."""
    path = folder / RUN_FILE
    facts = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if (folder / EXPERIMENT_FILE).is_file():
        record = read_experiment(folder)
        facts["epochs"] = record["settings"].get("epochs")
        facts["kept"] = record["settings"].get("keep_epoch", "best")
        facts["bundle"] = record["versions"]["bundle"]
    return facts


def share_of_oracle(rows: Mapping[str, Any], comparators: Mapping[str, Any]) -> dict[str, float]:
    """(C - 0.5) / (oracle's C - 0.5) of each variant; none without an oracle."""
    if ORACLE not in comparators or comparators[ORACLE]["metrics"]["c_index"]["value"] is None:
        return {}
    best = comparators[ORACLE]["metrics"]["c_index"]["value"] - 0.5
    values = {name: row["metrics"]["c_index"]["value"] for name, row in rows.items()}
    return {name: (value - 0.5) / best for name, value in values.items() if value is not None and best > 0}


# --- Markdown ----------------------------------------------------------------------------------------------------


def as_markdown(report: Mapping[str, Any]) -> str:
    """The report as tables."""
    runs = [facts for row in report["variants"].values() for facts in row["runs"].values() if "minutes" in facts]
    places = sorted({f"{run['cpu']}, {run['cores']} cores, {run['threads']} threads a run" for run in runs})
    minutes = [run["minutes"] for run in runs]
    kept = {facts["kept"] for row in report["variants"].values() for facts in row["runs"].values() if "kept" in facts}
    epochs = " or ".join(sorted(kept)).replace("best", "best (by the C-index of the cases held out)")
    lines = [
        f"**{report['notice']}**",
        "",
        f"Data: {report['data']}. Seeds {join(report['seeds'])}, fold {join(report['folds'])} of each; every"
        f" seed has other folds. Evaluated on {report['judged_by']}; after the {epochs} epoch of each run.",
        f"Metrics are means over networks, [interval: {report['interval']}], ± standard deviation over networks.",
        f"Machine: {'; '.join(places) or 'not recorded'}"
        + (f"; {min(minutes):.0f} to {max(minutes):.0f} min a run." if minutes else "."),
        f"Command: `{report['command']}`",
        *(f"Note: {note}" for note in report["notes"]),
        "",
        *metrics_table(report),
        "",
        "Differences on the same patients (in so many networks), p two-sided, paired bootstrap:",
        "",
        *differences_table(report),
    ]
    return "\n".join(lines) + "\n"


def join(values: Sequence[Any]) -> str:
    """``0, 1, 2``."""
    return ", ".join(str(value) for value in values)


def metrics_table(report: Mapping[str, Any]) -> list[str]:
    """A row for each variant, then the references without images."""
    lines = markdown_rows([["variant", "what", "networks", "patients (events)", *COLUMNS.values(), "of the oracle"]])
    rows = {**report["variants"], **report["comparators"]}
    for name, row in rows.items():
        survival = row["metrics"]["c_index"]
        known = f"{survival['patients']} ({survival['events']})" if "events" in survival else "-"
        share = report["share_of_oracle"].get(name)
        cells = [shown(row["metrics"].get(column), MEASURES.get(column)) for column in COLUMNS]
        title = f"`{name}`" if name in report["variants"] else name
        counts = [str(len(row["networks"])), known]
        lines += markdown_rows([[title, row.get("what", ""), *counts, *cells, f"{share:.0%}" if share else ""]], head=0)
    return lines


def differences_table(report: Mapping[str, Any]) -> list[str]:
    """A row for each variant."""
    lines = markdown_rows([["variant", "minus", *COLUMNS.values()]])
    for name, row in {**report["variants"], **report["comparators"]}.items():
        if row["differences"]:
            title = f"`{name}`" if name in report["variants"] else name
            cells = [shown_difference(row["differences"].get(column)) for column in COLUMNS]
            lines += markdown_rows([[title, f"`{row['against']}`", *cells]], head=0)
    return lines


def markdown_rows(rows: Sequence[Sequence[str]], head: int = 1) -> list[str]:
    """Lines of a table, with a rule below the heading."""
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return lines + ["|" + " --- |" * len(rows[0])] * head


def shown(found: Mapping[str, Any] | None, measure: Any = None) -> str:
    """A metric as text; a dash where it is not asked for or undefined."""
    if found is None or found["value"] is None:
        return "-"
    spread = "" if found["standard_deviation"] is None else f" ± {found['standard_deviation']:.3f}"
    return f"{found['value']:.3f} [{found['low']:.3f}, {found['high']:.3f}]{spread}"


def shown_difference(found: Mapping[str, Any] | None) -> str:
    """A difference as text."""
    if found is None or found["value"] is None:
        return "-"
    counts = f"{found['patients']} patients in {found['networks']}"
    return f"{found['value']:+.3f} [{found['low']:+.3f}, {found['high']:+.3f}], p {found['p']:.3f} ({counts})"
