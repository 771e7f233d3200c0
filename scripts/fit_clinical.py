"""Models of clinical values alone: a reference for models with images, and the model that the bundle ships.

Usage:
    python scripts/fit_clinical.py COHORT.csv --train_centres HGJ,CHUS --test_centres HMR,CHUM \
        --features age,t_stage,n_stage,hpv
    python scripts/fit_clinical.py DATASET_DIR --num_folds 5 --output clinical.json
    python scripts/fit_clinical.py RADCURE.csv --mapping scripts/experiments/mappings/radcure.json \
        --external OTHER.csv --out bundle/models/clinical_rfs.json --output evidence.json
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pandas as pd

from command_line import UsageError, run_tool

from experiments.clinical_cox import Result, Score, evaluate_cox
from experiments.clinical_evidence import (
    FEATURES,
    HPV_FEATURES,
    PENALIZER,
    cross_validated,
    hpv_evidence,
    judge_survival,
    make_model,
    split_by_year,
)
from experiments.foreign_table import ForeignTable, read_foreign_table
from scripts import keys
from scripts.cohorts import clinical
from scripts.cohorts.cohort import Case, Cohort, CohortError, load_cohort
from scripts.cohorts.files import write_text
from scripts.cohorts.scans import counted
from scripts.cohorts.tables import centre_name


def split_groups(
    cohort: Cohort, train_centres: Sequence[str], test_centres: Sequence[str], num_folds: int, seed: int
) -> list[tuple[list[Case], list[Case]]]:
    """(training, test) cases with known survival: by centre, or the bundle's folds where no centre is named.

    Raises:
        CohortError: no patient has known survival, only one of the two lists is given, they share a centre, or a
            centre has no patient.
    """
    if not _with_survival(cohort.cases):
        raise CohortError(f"{cohort.dataset_dir}: no patient has both RFS and Relapse, so there is nothing to fit")
    if not train_centres and not test_centres:
        splits = [cohort.split("partial", num_folds, fold, seed) for fold in range(num_folds)]
        return [(_with_survival(split.training), _with_survival(split.validation)) for split in splits]
    shared = sorted(set(train_centres) & set(test_centres))
    if shared:
        raise CohortError(f"{', '.join(shared)} stands in --train_centres and in --test_centres")
    present = sorted({case[keys.CENTRE] for case in cohort.cases})
    absent = sorted({*train_centres, *test_centres} - set(present))
    if absent or not (train_centres and test_centres):
        what = f"no patient is from {', '.join(absent)}" if absent else "--train_centres and --test_centres go together"
        raise CohortError(f"{what}; the centres of this cohort are {', '.join(present)}")
    sides = [[case for case in cohort.cases if case[keys.CENTRE] in side] for side in (train_centres, test_centres)]
    return [(_with_survival(sides[0]), _with_survival(sides[1]))]


def _with_survival(cases: Iterable[Case]) -> list[Case]:
    return [case for case in cases if case[keys.SURV_KNOWN]]


def _left_out(cohort: Cohort, centres: Sequence[Sequence[str]]) -> dict[str, int]:
    """Reason -> number of patients of the cohort that take no part."""
    reasons = Counter(exclusion.reason for exclusion in cohort.exclusions)
    named = {name for side in centres for name in side}
    for case in cohort.cases:
        if not case[keys.SURV_KNOWN]:
            reasons["survival unknown"] += 1
        elif named and case[keys.CENTRE] not in named:
            reasons["of another centre"] += 1
    return dict(reasons)


def _names(value: str | Sequence[object]) -> list[str]:
    """A list from ``a,b``, or from a list."""
    items = value if isinstance(value, (list, tuple)) else str(value).split(",")
    return [str(item).strip() for item in items if str(item).strip()]


def _interval(item: Score) -> str:
    """``0.742 [0.64, 0.84]`` or what is missing of it."""
    if math.isnan(item.c_index):
        return "none (no comparable pair)"
    return f"{item.c_index:.3f}" + ("" if math.isnan(item.low) else f" [{item.low:.3f}, {item.high:.3f}]")


def print_report(report: dict[str, Any], result: Result) -> None:
    """Print the data, the model's scores and its coefficients."""
    print(f"Cox model of clinical values alone (lifelines, ridge penalizer {report['penalizer']:g})")
    print(f"data: {', '.join(report['data'])}")
    print(f"train: {report['train']}, {result.train.patients} patients, {result.train.events} events")
    print(f"test: {report['test']}, {result.test.patients} patients, {result.test.events} events")
    print(
        f"values missing among {report['patients']}: "
        + ", ".join(f"{name} {count}" for name, count in report["missing"].items())
    )
    for reason, count in report["left_out"].items():
        print(f"left out: {counted(count, 'patient')}, {reason}")
    for note in report["notes"]:
        print(f"note: {note}")
    print("\nC-index [95 % bootstrap interval over patients, model fixed]")
    print(f"train {_interval(result.train)}, test {_interval(result.test)}")
    print(f"\ncoefficients ({report['coefficients_of']})")
    print(pd.DataFrame(result.coefficients).to_string(index=False, float_format=lambda number: f"{number:.4g}"))
    if result.dropped:
        print(f"columns left out, as constant or redundant among training patients: {', '.join(result.dropped)}")
    for text in result.warnings:
        print(f"lifelines warns: {text}")


def _load(path: Path, features: Sequence[str], mapping: str | None) -> Cohort:
    """A cohort from a folder or from a table alone."""
    if mapping is not None:
        if path.is_dir():
            raise CohortError(f"--mapping is for one table, not for the folder {path}")
        return read_foreign_table(path, mapping, features).cohort
    folder, table = (path, None) if path.is_dir() else (None, path)
    return load_cohort(folder, table, features, require_images=False)


def _json_ready(value: Any) -> Any:
    """Replace NaN, which JSON lacks, by None."""
    if isinstance(value, dict):
        return {key: _json_ready(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_json_ready(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def fit_clinical(
    cohort: str,
    train_centres: str | Sequence[str] = (),
    test_centres: str | Sequence[str] = (),
    features: str | Sequence[str] | None = None,
    penalizer: float | None = None,
    num_folds: int = 3,
    seed: int = 0,
    bootstrap: int = 1000,
    mapping: str | None = None,
    out: str | None = None,
    external: str | None = None,
    output: str | None = None,
) -> None:
    """Fit a Cox model to clinical values alone and print its C-index; with --out, make the model that the bundle ships.

    Args:
        cohort: a CSV file, or a HECKTOR data set folder with one or more beside its scans.
        train_centres: centres to fit to; without centres, cross-validation over the bundle's folds.
        test_centres: centres to test on; with --out, centres of --external that are also judged on their own.
        features: clinical features, such as ``age,t_stage,n_stage,hpv``; by default the paper's, with --out those of
            the bundle's model.
        penalizer: strength of the ridge penalty, 0.1 by default, with --out 0.01.
        num_folds: number of folds.
        seed: seed of folds and bootstrap.
        bootstrap: number of bootstrap resamples.
        mapping: JSON file that tells how to read a table of another data set.
        out: JSON file for a model of all patients with its evidence; needs --mapping, as it needs the years.
        external: table of other hospitals to test that model on, read like any cohort.
        output: JSON file for the result.
    """
    if seed < 0 or bootstrap < 1 or (penalizer or 0.0) < 0:
        raise UsageError("--seed and --penalizer are 0 or more, --bootstrap is 1 or more")
    if out is not None:
        if train_centres or mapping is None:
            raise CohortError("--out fits all patients of a table read by --mapping: no --train_centres")
        names = FEATURES if features is None else _names(features)
        table = read_foreign_table(cohort, mapping, [*names, *HPV_FEATURES])
        others = [] if external is None else _load(Path(external), [*names, *HPV_FEATURES], None).cases
        strength = PENALIZER if penalizer is None else penalizer
        report = make_shipped(table, others, _centres(test_centres), out, names, strength, seed, bootstrap)
    elif external is not None:
        raise CohortError("--external tests the model that --out makes; it needs --out")
    else:
        names = list(clinical.DEFAULT_FEATURES) if features is None else _names(features)
        loaded = _load(Path(cohort).expanduser(), names, mapping)
        centres = (_centres(train_centres), _centres(test_centres))
        strength = 0.1 if penalizer is None else penalizer
        report = evaluate(loaded, centres, names, strength, num_folds, seed, bootstrap)
    if output:
        write_text(output, json.dumps(_json_ready(report), indent=2) + "\n")
        print(f"\nwritten: {output}")


def evaluate(
    loaded: Cohort,
    centres: tuple[list[str], list[str]],
    names: Sequence[str],
    penalizer: float,
    num_folds: int,
    seed: int,
    bootstrap: int,
) -> dict[str, Any]:
    """Fit, score and print a model; arguments as :func:`fit_clinical`."""
    groups = split_groups(loaded, centres[0], centres[1], num_folds, seed)
    known = [case for pair in groups[:1] for side in pair for case in side]
    missing = {name: sum(case[keys.CLINICAL][name] is None for case in known) for name in names}
    result = evaluate_cox(groups, names, penalizer, bootstrap, seed)
    folds = f"{num_folds}-fold cross-validation, seed {seed}"
    report = {
        "data": loaded.files,
        "features": list(names),
        "penalizer": penalizer,
        "train": ", ".join(centres[0]) or folds,
        "test": ", ".join(centres[1]) or f"{folds}, out of fold",
        "patients": len(known),
        "missing": missing,
        "left_out": _left_out(loaded, centres),
        "notes": loaded.notes,
        "coefficients_of": "model of the training centres" if centres[0] else "model of all patients",
        "result": asdict(result),
    }
    print_report(report, result)
    return report


def _centres(names: str | Sequence[str]) -> list[str]:
    return [centre_name(name, "") for name in _names(names)]


# --- the model that the bundle ships ----------------------------------------------------------------------------------


def make_shipped(
    table: ForeignTable,
    others: Sequence[Case],
    centres: Sequence[str],
    out: str,
    names: Sequence[str],
    penalizer: float,
    seed: int,
    bootstrap: int,
) -> dict[str, Any]:
    """Fit the model to all patients of a table, write it, and print how good it is on patients it has not seen.

    ``centres`` of the ``others`` are judged on their own as well.
    """
    print(table.cohort.describe())
    cases = _with_survival(table.cohort.cases)
    years = [table.years[case[keys.PATIENT_ID]] for case in cases]
    early, late, middle = split_by_year(cases, years)
    split = make_model(early, [table.years[case[keys.PATIENT_ID]] for case in early], names, penalizer, {}, {})
    report: dict[str, Any] = {"features": list(names), "penalizer": penalizer, "from_year": middle}
    report["excluded"] = [asdict(exclusion) for exclusion in table.cohort.exclusions]
    report["temporal"] = judge_survival(split, early, late, seed, bootstrap)
    report["by_year"] = cross_validated(cases, years, names, penalizer, seed, bootstrap)
    model = make_model(cases, years, names, penalizer, table.about, {})
    judged = _with_survival(others)
    groups = {"external": judged, "external_centres": [case for case in judged if case[keys.CENTRE] in centres]}
    report |= {name: judge_survival(model, cases, group, seed, bootstrap) for name, group in groups.items() if group}
    report["hpv"] = hpv_evidence(cases, years, others, seed, bootstrap)
    evidence: dict[str, Any] = {
        name: _counted(report[name]["c_index"]) for name in ("temporal", "external") if name in report
    }
    if judged:
        evidence["external"]["hospitals"] = len({case[keys.CENTRE] for case in judged})
    model = make_model(cases, years, names, penalizer, table.about, evidence)
    write_text(out, json.dumps(asdict(model), indent=1) + "\n")
    print_shipped(report)
    print(f"\nwritten: {out}: {model.summary}")
    return report


def _counted(found: dict[str, Any]) -> dict[str, Any]:
    """A C-index as the model states it."""
    numbers = {name: round(found[name], 3) for name in ("value", "low", "high")}
    return numbers | {name: found[name] for name in ("patients", "events")}


def print_shipped(report: dict[str, Any]) -> None:
    """Print the evidence, a line for each metric: value, 95 % interval, patients, events."""
    rows = []
    for name in ("temporal", "external", "external_centres"):
        for metric, found in _flat(report.get(name, {})):
            rows.append((name, metric, found))
    rows.append(("by_year", "c_index", report["by_year"]))
    for name in ("temporal", "by_year", "external"):
        rows += [(f"HPV, {name}", metric, found) for metric, found in _flat(report["hpv"].get(name, {}))]
    for name, metric, found in rows:
        counts = ", ".join(f"{found[what]} {what}" for what in ("patients", "events", "positive") if what in found)
        print(f"{name:18}{metric:32}{_value(found):26}{counts}")


def _flat(report: dict[str, Any], prefix: str = "") -> Iterable[tuple[str, dict[str, Any]]]:
    """Name and values of all metrics in a report."""
    for name, item in report.items():
        if isinstance(item, dict) and "value" in item:
            yield f"{prefix}{name}", item
        elif isinstance(item, dict):
            yield from _flat(item, f"{prefix}{name}.")


def _value(found: dict[str, Any]) -> str:
    if found["value"] is None:
        return f"none: {found['reason']}"
    return f"{found['value']:.3f} [{found['low']:.3f}, {found['high']:.3f}]"


if __name__ == "__main__":
    run_tool(fit_clinical, ValueError, OSError)
