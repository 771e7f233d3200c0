"""Cox model of clinical values alone: what a model that sees images has to beat.

Usage:
    python scripts/compare_clinical.py COHORT.csv --train_centres HGJ,CHUS --test_centres HMR,CHUM \
        --features age,t_stage,n_stage,hpv
    python scripts/compare_clinical.py DATASET_DIR --num_folds 5 --output clinical.json
"""

from __future__ import annotations

import json
import math
import warnings
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from lifelines import CoxPHFitter
from lifelines.exceptions import ConvergenceError, ConvergenceWarning

from command_line import run_tool

from scripts import keys
from scripts.cohorts import clinical
from scripts.cohorts.cohort import Case, Cohort, CohortError, load_cohort
from scripts.cohorts.files import write_text
from scripts.cohorts.tables import centre_name
from scripts.training.concordance import comparable_pairs, resampled_concordance

CODINGS = ("indicators", "paper")
FILLS = ("training_median", "cohort_median", "zero")


@dataclass(frozen=True)
class Score:
    """C-index of one set of patients.

    Attributes:
        c_index: Harrell's C-index (lifelines), NaN without a comparable pair.
        low: lower end of the 95 % bootstrap interval over patients, the model held fixed.
        high: upper end.
        patients: number of patients.
        events: number of relapses.
    """

    c_index: float
    low: float
    high: float
    patients: int
    events: int


@dataclass(frozen=True)
class Result:
    """One coding, fitted and scored.

    Attributes:
        coding: ``indicators`` or ``paper``.
        fill: what stood for a missing number or stage; always ``zero`` in the paper's coding.
        train: score on the patients the model was fitted to; in cross-validation over all folds, without interval.
        test: score on the other patients; in cross-validation out of fold, with pairs formed within folds.
        coefficients: a row for each column; in cross-validation of a model fitted to all patients.
        dropped: columns left out because they are constant among training patients.
        warnings: what lifelines found doubtful about the fit.
    """

    coding: str
    fill: str
    train: Score
    test: Score
    coefficients: list[dict[str, Any]]
    dropped: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Fit:
    """A fitted Cox model, the columns it uses, those that are constant, and lifelines' warnings."""

    model: CoxPHFitter
    used: list[str]
    dropped: list[str]
    warnings: list[str]


def code_cohort(cases: Sequence[Case], features: Sequence[str], coding: str) -> pd.DataFrame:
    """Coded clinical values, time and event of a cohort.

    Args:
        cases: cases with known survival.
        features: names of the clinical features.
        coding: ``paper`` (missing = 0, levels shifted by one) or ``indicators`` (a column a level of a category,
            numbers and stages as numbers, NaN where these are missing).

    Returns:
        One row a patient, indexed by patient id: the coded columns, then ``time`` and ``event``.
    """
    if coding == "paper":
        names = list(features)
        rows = [clinical.code_clinical(case[keys.CLINICAL], features) for case in cases]
    else:
        names = clinical.indicator_names(features)
        rows = [clinical.code_indicators(case[keys.CLINICAL], features, missing_number=np.nan) for case in cases]
    table = pd.DataFrame(np.asarray(rows, dtype=float).reshape(len(cases), len(names)), columns=names)
    table.index = pd.Index([case[keys.PATIENT_ID] for case in cases], name="patient_id")
    table[keys.TIME] = [float(case[keys.TIME]) for case in cases]
    table[keys.EVENT] = [int(case[keys.EVENT]) for case in cases]
    return table


def fill_missing(train: pd.DataFrame, test: pd.DataFrame, fill: str) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Put a number where one is missing: the training patients' median, that of all patients, or zero.

    ``cohort_median`` looks at the clinical values (not the outcomes) of the test patients; a column that is missing
    everywhere becomes zero.
    """
    if fill == "zero":
        values = pd.Series(0.0, index=train.columns)
    else:
        values = (train if fill == "training_median" else pd.concat([train, test])).median().fillna(0.0)
    return train.fillna(values), test.fillna(values)


def fit_cox(train: pd.DataFrame, penalizer: float) -> Fit:
    """Fit a ridge Cox model.

    Args:
        train: coded columns, ``time`` and ``event``, without missing values.
        penalizer: strength of the ridge penalty (lifelines standardises the columns itself).

    Returns:
        The fitted model. Left out of it are columns that are constant and, without a penalty, those that follow from
        the columns before them (such as gender=1 after gender=0), whose coefficients would not be determined.

    Raises:
        CohortError: no events, no column that varies, or no convergence.
    """
    columns = [name for name in train.columns if name not in (keys.TIME, keys.EVENT)]
    used = [name for name in columns if train[name].nunique() > 1]
    if penalizer == 0:
        used = _independent(train[used])
    if not train[keys.EVENT].any():
        raise CohortError(f"none of the {len(train)} training patients has a relapse: a Cox model cannot be fitted")
    if not used:
        raise CohortError(f"all {len(train)} training patients have the same clinical values ({', '.join(columns)})")
    model = CoxPHFitter(penalizer=penalizer)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            model.fit(train[[*used, keys.TIME, keys.EVENT]], duration_col=keys.TIME, event_col=keys.EVENT)
        except ConvergenceError as error:
            raise CohortError(f"the Cox model does not converge with --penalizer {penalizer:g}; try more") from error
    doubts = [warning for warning in caught if issubclass(warning.category, ConvergenceWarning)]
    for warning in caught:
        if warning not in doubts:
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
    texts = [" ".join(str(warning.message).split()) for warning in doubts]
    return Fit(model, used, [name for name in columns if name not in used], texts)


def _independent(table: pd.DataFrame) -> list[str]:
    """Columns that are no linear combination of a constant and the columns before them."""
    kept: list[str] = []
    for name in table.columns:
        candidate = np.column_stack([np.ones(len(table)), table[[*kept, name]].to_numpy()])
        if np.linalg.matrix_rank(candidate) == candidate.shape[1]:
            kept.append(name)
    return kept


def score(risks: Sequence[np.ndarray], tables: Sequence[pd.DataFrame], bootstrap: int, seed: int) -> Score:
    """C-index over one or several sets of patients, with a bootstrap interval; pairs are formed within a set.

    Args:
        risks: log hazard of each patient, one array a set.
        tables: ``time`` and ``event`` of each patient, one table a set.
        bootstrap: number of resamples of patients, drawn within each set.
        seed: seed of the resampling.

    Returns:
        The score; for one set the C-index is exactly lifelines'.
    """
    rng = np.random.default_rng(seed)
    found, draws = np.zeros(2), np.zeros((2, bootstrap))  # concordant and comparable pairs
    for risk, table in zip(risks, tables, strict=True):
        time, event = table[keys.TIME].to_numpy(), table[keys.EVENT].to_numpy().astype(bool)
        pairs = comparable_pairs(time, event)
        weights = rng.multinomial(len(risk), np.full(len(risk), 1 / len(risk)), size=bootstrap).astype(float)
        draws += resampled_concordance(weights, pairs, risk)
        found += np.ravel(resampled_concordance(np.ones((1, len(risk))), pairs, risk))
    patients, events = sum(map(len, tables)), int(sum(table[keys.EVENT].sum() for table in tables))
    drawn = draws[0, draws[1] > 0] / draws[1, draws[1] > 0]
    if found[1] == 0 or not len(drawn):
        return Score(float("nan"), float("nan"), float("nan"), patients, events)
    low, high = np.quantile(drawn, (0.025, 0.975))
    return Score(float(found[0] / found[1]), float(low), float(high), patients, events)


def evaluate_coding(
    groups: Sequence[tuple[Sequence[Case], Sequence[Case]]],
    features: Sequence[str],
    coding: str,
    fill: str,
    penalizer: float = 0.1,
    bootstrap: int = 1000,
    seed: int = 0,
) -> Result:
    """Fit and score one coding.

    Args:
        groups: (training cases, test cases) with known survival: one pair, or one a fold.
        features: names of the clinical features.
        coding: one of :data:`CODINGS`.
        fill: one of :data:`FILLS`.
        penalizer: strength of the ridge penalty.
        bootstrap: number of bootstrap resamples.
        seed: seed of the bootstrap.

    Returns:
        The scores, and the coefficients of the model (of one fitted to all cases where there are several folds).
    """
    fits, sides, risks = [], [], []
    for train_cases, test_cases in groups:
        pair = fill_missing(code_cohort(train_cases, features, coding), code_cohort(test_cases, features, coding), fill)
        fits.append(fit_cox(pair[0], penalizer))
        sides.append(pair)
        risks.append([fits[-1].model.predict_log_partial_hazard(table[fits[-1].used]).to_numpy() for table in pair])
    train, test = (score([r[k] for r in risks], [pair[k] for pair in sides], bootstrap, seed) for k in (0, 1))
    shown = fits[0]
    if len(groups) > 1:
        everyone = pd.concat([code_cohort(cases, features, coding) for _, cases in groups])
        shown = fit_cox(fill_missing(everyone, everyone, fill)[0], penalizer)
        # Training sets of folds overlap: an interval over their patients would be too narrow.
        train = replace(train, low=math.nan, high=math.nan, patients=test.patients, events=test.events)
    dropped = sorted({name for fit in fits for name in fit.dropped})
    doubts = sorted({text for fit in fits for text in fit.warnings})
    return Result(coding, fill, train, test, _coefficients(shown), dropped, doubts)


def _coefficients(fit: Fit) -> list[dict[str, Any]]:
    """Log hazard ratio and hazard ratio with its 95 % interval, a row for each column."""
    summary = fit.model.summary
    titles = {
        "log_hazard_ratio": "coef",
        "hazard_ratio": "exp(coef)",
        "low": "exp(coef) lower 95%",
        "high": "exp(coef) upper 95%",
        "p": "p",
    }
    return [
        {"column": name} | {title: float(summary.loc[name, source]) for title, source in titles.items()}
        for name in fit.used
    ]


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


def _variants(missing: dict[str, int], coding: str, fill: str) -> list[tuple[str, str]]:
    """Codings to compare, the chosen one first; fills differ only where a number or a stage is missing."""
    numbers = any(count and clinical.feature_named(name).kind != clinical.CATEGORY for name, count in missing.items())
    fills = FILLS if numbers else (fill,)
    variants = [("indicators", name) for name in fills] + [("paper", "zero")]
    chosen = (coding, "zero" if coding == "paper" else fill)
    return [chosen, *(variant for variant in variants if variant != chosen)]


def print_report(report: dict[str, Any], results: Sequence[Result]) -> None:
    """Print what was compared on which data, the scores of every coding and the chosen model's coefficients."""
    chosen = results[0]
    print(f"Cox model of clinical values alone (lifelines, ridge penalizer {report['penalizer']:g})")
    print(f"data: {', '.join(report['data'])}")
    print(f"train: {report['train']}, {chosen.train.patients} patients, {chosen.train.events} events")
    print(f"test: {report['test']}, {chosen.test.patients} patients, {chosen.test.events} events")
    print(
        f"values missing among {report['patients']}: "
        + ", ".join(f"{name} {count}" for name, count in report["missing"].items())
    )
    for reason, count in report["left_out"].items():
        print(f"left out: {count} patients, {reason}")
    for note in report["notes"]:
        print(f"note: {note}")
    rows = [(r.coding, r.fill, _interval(r.train), _interval(r.test)) for r in results]
    print("\nC-index [95 % bootstrap interval over patients, model fixed]; the first line is the chosen coding")
    print(pd.DataFrame(rows, columns=["coding", "missing number", "train", "test"]).to_string(index=False))
    print(f"\ncoefficients ({report['coefficients_of']})")
    print(pd.DataFrame(chosen.coefficients).to_string(index=False, float_format=lambda number: f"{number:.4g}"))
    if chosen.dropped:
        print(f"columns left out, as constant or redundant among training patients: {', '.join(chosen.dropped)}")
    for text in chosen.warnings:
        print(f"lifelines warns: {text}")


def _load(path: Path, features: Sequence[str], with_scans: bool) -> Cohort:
    """A cohort from a folder or from a table alone."""
    if path.is_dir():
        return load_cohort(path, clinical_features=features, require_images=with_scans)
    if with_scans:
        raise CohortError(f"--with_scans needs the folder of the data set, not a table: {path}")
    return load_cohort(None, path, features, require_images=False)


def _json_ready(value: Any) -> Any:
    """Replace NaN, which JSON lacks, by None."""
    if isinstance(value, dict):
        return {key: _json_ready(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_json_ready(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def compare_clinical(
    cohort: str,
    train_centres: str | Sequence[str] = (),
    test_centres: str | Sequence[str] = (),
    features: str | Sequence[str] = clinical.DEFAULT_FEATURES,
    coding: str = "indicators",
    fill: str = "training_median",
    penalizer: float = 0.1,
    num_folds: int = 3,
    seed: int = 0,
    bootstrap: int = 1000,
    with_scans: bool = False,
    output: str | None = None,
) -> None:
    """Fit a Cox model to clinical values alone and print its C-index.

    Args:
        cohort: a CSV file, or a HECKTOR data set folder with one or more beside its scans.
        train_centres: centres to fit to; without centres, cross-validation over the bundle's folds.
        test_centres: centres to test on.
        features: clinical features, such as ``age,t_stage,n_stage,hpv``.
        coding: ``indicators`` (a 0/1 column for each level of a category) or ``paper`` (missing 0, levels from 1).
        fill: what a missing number or stage becomes with indicators: ``training_median``, ``cohort_median`` (which
            looks at the test patients' clinical values too) or ``zero``.
        penalizer: strength of the ridge penalty.
        num_folds: number of folds.
        seed: seed of folds and bootstrap.
        bootstrap: number of bootstrap resamples.
        with_scans: use only patients with scans, so that the folds are those of the bundle's training.
        output: JSON file for the result.
    """
    if coding not in CODINGS or fill not in FILLS:
        raise CohortError(f"--coding is one of {', '.join(CODINGS)} and --fill one of {', '.join(FILLS)}")
    names = _names(features)
    loaded = _load(Path(cohort).expanduser(), names, with_scans)
    centres = [[centre_name(name, "") for name in _names(side)] for side in (train_centres, test_centres)]
    groups = split_groups(loaded, centres[0], centres[1], num_folds, seed)
    known = [case for pair in groups[:1] for side in pair for case in side]
    missing = {name: sum(case[keys.CLINICAL][name] is None for case in known) for name in names}
    results = [
        evaluate_coding(groups, names, *variant, penalizer, bootstrap, seed)
        for variant in _variants(missing, coding, fill)
    ]
    folds = f"{num_folds}-fold cross-validation, seed {seed}"
    report = {
        "data": loaded.files,
        "features": names,
        "penalizer": penalizer,
        "train": ", ".join(centres[0]) or folds,
        "test": ", ".join(centres[1]) or f"{folds}, out of fold",
        "patients": len(known),
        "missing": missing,
        "left_out": _left_out(loaded, centres),
        "notes": loaded.notes,
        "coefficients_of": "model of the training centres" if centres[0] else "model of all patients",
        "results": [asdict(result) for result in results],
    }
    print_report(report, results)
    if output:
        write_text(output, json.dumps(_json_ready(report), indent=2) + "\n")
        print(f"\nwritten: {output}")


if __name__ == "__main__":
    run_tool(compare_clinical, ValueError, OSError)
