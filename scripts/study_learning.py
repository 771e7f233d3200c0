"""Does it learn? The same experiment in variants and with several seeds, and one table of what came out.

``python scripts/study_learning.py --dataset_dir COHORT --output_dir STUDY`` runs ``train_folds.py`` for every variant
and seed; started again it goes on. With ``--report`` it trains nothing and gathers what is finished ::

    STUDY/flow_s1/          a run: variant "flow", seed 1, as train_folds.py leaves it
    STUDY/flow_s1/run.json  where it ran and how long it took
    STUDY/logs/flow_s1.txt  what train_folds.py said
    STUDY/cache/            preprocessed cases, shared by the runs
    STUDY/flow_s1/fold_0/evaluation_others/   with --test_dir: the network on another cohort
    STUDY/study.json        the report: every figure with its interval and its counts
    STUDY/study.md          the same as a table to read

The runs take their code from the folder of this file: run it from a clone that nobody edits.
"""

from __future__ import annotations

import json
import math
import os
import platform
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import IO, Any

import fire
import numpy as np
import pandas as pd

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "bundle"))

from ensemble_folds import choose_hpv_threshold  # noqa: E402
from evaluate_folds import CASES_FILE, clinical_hpv, clinical_risks, read_cases, read_run  # noqa: E402
from experiment import (  # noqa: E402
    DEEP,
    EVALUATE_CONFIG,
    EXPERIMENT_FILE,
    FINISHED,
    TRAIN_CONFIG,
    TRAINING,
    ExperimentError,
    as_list,
    bundle_command,
    config_of,
    evaluation_folder,
    find_config,
    fold_folder,
    merge_configs,
    read_experiment,
    read_fold,
    settings_of,
    typed,
)
from train_folds import STOP_SECONDS, end_with_parent, last_lines, signal_group, signals_as_exit  # noqa: E402

from scripts import keys  # noqa: E402
from scripts.cohort import Cohort, CohortError, load_cohort  # noqa: E402
from scripts.ensemble import EARLIER  # noqa: E402
from scripts.evaluation import BOOTSTRAP_SAMPLES, HPV_THRESHOLD, MEASURES, bootstrap_interval  # noqa: E402
from scripts.files import write_text  # noqa: E402
from scripts.survival import paired_bootstrap  # noqa: E402

BUNDLE = ROOT / "bundle"
OTHERS = "others"  # the part that the cases of another cohort are, in the names of folders
TRAIN_TOOL = ROOT / "scripts" / "train_folds.py"
RUN_FILE, STUDY_FILE, TABLE_FILE, LOG_FOLDER = "run.json", "study.json", "study.md", "logs"
NOT_COMPARED = ("dataset_dir", "ehr_csv")
POLL_SECONDS = 1.0
BEGIN, END = "<!-- table of study_learning.py: begin -->", "<!-- table of study_learning.py: end -->"

# --- what is compared ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Variant:
    """A way to train.

    Attributes:
        what: how it differs from the base, for readers.
        overrides: ids of the configs and their values.
        config_files: overlays on ``configs/train.json``.
    """

    what: str
    overrides: Mapping[str, Any] = field(default_factory=dict)
    config_files: tuple[str, ...] = ("configs/demo.json",)


BASE = "base"
DEMO = ("configs/demo.json",)
PAPER = (*DEMO, "configs/paper.json")
FAST = {"learning_rate": 0.001, "lr_milestones": [16, 21], "lr_factors": [0.3, 0.1]}


def deep(what: str, **overrides: Any) -> Variant:
    """A variant of the base."""
    return Variant(what, {**DEEP, **overrides})


def burden(what: str, **overrides: Any) -> Variant:
    """A variant of ``burden``: HPV status from the image alone."""
    return Variant(what, {"hpv_inputs": ["image"], **overrides})


VARIANTS = {
    BASE: deep(
        "partial labels; segmentation, HPV and survival from deep features; gradient through the map stopped; HPV "
        "weight 10"
    ),
    "burden": burden("survival from burden, HPV probability and clinical values; HPV from the image"),
    "clinical_hpv": Variant("as burden, HPV from image and clinical values: the configs as they stand"),
    "clinical_hpv_slow": Variant(
        "the same, the clinical values' weights learned at the network's rate", {"hpv_clinical_learning_rate": 0.001}
    ),
    "both": burden("survival from deep features and from burden", survival_inputs=["deep", "burden"]),
    "surv": deep("survival alone", tasks=["surv"]),
    "seg_surv": deep("segmentation and survival", tasks=["seg", "surv"]),
    "flow": deep("gradient flows through the probability map", mask_gradient="flow"),
    "equal": deep("equal task weights", task_weights=None),
    "uncertainty": deep("task weights learned by uncertainty", task_weights="uncertainty"),
    "memory": deep("Cox risk set of the batch and the last 64 cases", cox_memory=64),
    "full": deep("trained on cases with every label only (5 folds)", protocol="full"),
    "min_max": deep("PET by its own minimum and maximum", pet_window=None),
    "burden_uncertainty": burden("as burden, task weights learned by uncertainty", task_weights="uncertainty"),
    "burden_min_max": burden("as burden, with PET by its own minimum and maximum", pet_window=None),
    "warmup": deep("gradient flows through the map from epoch 9 on", mask_gradient="flow", mask_gradient_after=8),
    "paper": Variant("paper.json on top: every choice of the paper, its learning rate too", {}, PAPER),
    "paper_rate": Variant("paper.json on top, with the base's learning rate", FAST, PAPER),
    "balanced_hpv": deep("focal weight 0.5 for HPV instead of 0.25", hpv_alpha=0.5),
    "low_l2": deep("weight of the L2 term 0.001 instead of 0.1", l2_weight=0.001),
    "long": deep("three times as many epochs", epochs=72, val_interval=12, lr_milestones=[48, 63]),
}
"""What is compared; the order is that in which they are run unless told otherwise."""

COLUMNS = {
    "c_index": "C-index",
    "dice": "Dice",
    "balanced_accuracy": "HPV balanced accuracy, threshold 0.5",
    "balanced_accuracy_chosen": "HPV balanced accuracy, threshold chosen on training cases",
    "hpv_auc": "HPV ROC AUC",
}
CLINICAL, ORACLE = "clinical values alone (Cox, logistic regression)", "oracle (the phantoms' true log hazard)"


@dataclass(frozen=True)
class Study:
    """What is to be run or reported.

    Attributes:
        folder: of all runs.
        dataset_dir: folder of the cohort.
        fingerprint: of the cohort.
        variants: names, the most important first.
        seeds: of folds, initial weights and batches.
        folds: of each run.
        overrides: ids of the configs for every run.
        test_dir: folder of another cohort to judge the networks by; None: by the cases that each held out.
    """

    folder: Path
    dataset_dir: str
    fingerprint: str
    variants: tuple[str, ...]
    seeds: tuple[int, ...]
    folds: tuple[int, ...]
    overrides: Mapping[str, Any]
    test_dir: str | None = None

    @property
    def runs(self) -> list[tuple[str, int]]:
        """(variant, seed) in the order to run: every variant once before any has a second seed."""
        return [(variant, seed) for seed in self.seeds for variant in self.variants]

    def run_folder(self, variant: str, seed: int) -> Path:
        """Folder of a run."""
        return self.folder / run_name(variant, seed)

    def settings(self, variant: str, seed: int) -> dict[str, Any]:
        """Ids of the configs of a run and their values; those for every run go before the variant's."""
        return {**self.overrides, **VARIANTS[variant].overrides, "seed": seed}

    def commands(self, variant: str, seed: int) -> list[list[str]]:
        """``train_folds.py`` for a run, and with ``test_dir`` the bundle's ``evaluating`` for each fold."""
        folds = self.folds if self.test_dir else ()
        return [self.training(variant, seed), *(self.evaluating(variant, seed, fold) for fold in folds)]

    def evaluating(self, variant: str, seed: int, fold: int) -> list[str]:
        """The bundle's ``evaluating`` of a network on the other cohort."""
        folder = self.run_folder(variant, seed)
        options = {
            "dataset_dir": self.test_dir,
            "output_dir": str(fold_folder(folder, fold)),
            "ckpt_dir": str(fold_folder(folder, fold) / "models"),
            "evaluation_dir": str(evaluation_folder(folder, fold, OTHERS)),
            "evaluate_on": "all",
        }
        files = [TRAIN_CONFIG, *(find_config(name) for name in VARIANTS[variant].config_files), EVALUATE_CONFIG]
        return bundle_command("evaluating", files, options)

    def cases_files(self, variant: str, seed: int, fold: int) -> tuple[Path, Path]:
        """Of one network: the cases that judge it, and its training cases, which its HPV threshold is chosen on."""
        folder = self.run_folder(variant, seed)
        judged = OTHERS if self.test_dir else read_experiment(folder)["held_out"]
        paths = (evaluation_folder(folder, fold, part) / CASES_FILE for part in (judged, TRAINING))
        return next(paths), next(paths)

    def is_complete(self, variant: str, seed: int, folds: Sequence[int]) -> bool:
        """Whether these folds of a run are trained and evaluated."""
        folder = self.run_folder(variant, seed)
        return (folder / EXPERIMENT_FILE).is_file() and all(
            read_fold(folder, fold)["status"] == FINISHED
            and all(path.is_file() for path in self.cases_files(variant, seed, fold))
            for fold in folds
        )

    def training(self, variant: str, seed: int) -> list[str]:
        """``train_folds.py`` for a run."""
        options = {
            "dataset_dir": self.dataset_dir,
            "output_dir": str(self.run_folder(variant, seed)),
            "config_files": list(VARIANTS[variant].config_files),
            "folds": list(self.folds),
            "cache_dir": str(self.folder / "cache"),
            **self.settings(variant, seed),
        }
        return [sys.executable, str(TRAIN_TOOL), *(f"--{name}={typed(value)}" for name, value in options.items())]


def run_name(variant: str, seed: int) -> str:
    """Name of the folder of a run.

    Example:
        >>> run_name("flow", 1)
        'flow_s1'
    """
    return f"{variant}_s{seed}"


def check_variants(names: Sequence[str]) -> tuple[str, ...]:
    """The names, or all.

    Raises:
        ExperimentError: for one that there is not.
    """
    unknown = sorted(set(names) - set(VARIANTS))
    if unknown:
        raise ExperimentError(f"no variant {', '.join(unknown)}; there are {', '.join(VARIANTS)}")
    return tuple(names) or tuple(VARIANTS)


def check_run(study: Study, variant: str, seed: int) -> None:
    """See that a run on disk is what its name says.

    A run may lack an id that came later: it was run with what was done then (:data:`scripts.ensemble.EARLIER`), else
    with the default of ``configs/train.json``.
    Ids of another kind than plain numbers, texts and lists (objects, expressions) follow from the others.

    Raises:
        ExperimentError: it has other settings or another cohort; each difference is named.
    """
    folder = study.run_folder(variant, seed)
    record = read_experiment(folder)
    settings = study.settings(variant, seed)
    files = (TRAIN_CONFIG, *(find_config(name) for name in VARIANTS[variant].config_files))
    parser, values = merge_configs(files, settings.get("protocol", "partial"), settings)
    parser.update(values)
    expected = resolved(settings_of(config_of(parser)))
    defaults, found = config_of(merge_configs((TRAIN_CONFIG,), "partial", {})[0]), record["settings"]
    there = resolved({**defaults, **EARLIER, **found})
    differences = [
        f"{name} {value!r} instead of {expected[name]!r}"
        for name, value in ((name, there.get(name)) for name in expected if name not in NOT_COMPARED)
        if is_plain(value) and is_plain(expected[name]) and value != expected[name]
    ]
    if record["cohort"]["fingerprint"] != study.fingerprint:
        differences.append(f"another cohort ({record['dataset_dir']})")
    if differences:
        raise ExperimentError(f"{folder} is not the run that its name says: {'; '.join(differences)}")


def resolved(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings in which what refers to the config's ``default_settings`` has their value.

    Example:
        >>> resolved({"default_settings": {"a": [1], "b": [2]}, "a": "$@saved['a']", "b": [3]})
        {'a': [1], 'b': [3]}
    """
    values = dict(settings)
    for name, value in values.pop("default_settings", {}).items():
        if not is_plain(values.get(name, "$")):
            values[name] = value
    return values


def is_plain(value: Any) -> bool:
    """Whether a value of a config stands for itself.

    Example:
        >>> is_plain([0, 25]), is_plain({"hpv": 10.0}), is_plain("$@a + 1"), is_plain("%run")
        (True, True, False, False)
    """
    text = json.dumps(value)
    return not any(mark in text for mark in ("$", "@", "%", "_target_"))


# --- running it ---------------------------------------------------------------------------------------------------


class ActiveRun:
    """A run on its way.

    Args:
        study: that it is of.
        variant: its name.
        seed: its seed.
        threads: of each of its processes.
    """

    def __init__(self, study: Study, variant: str, seed: int, threads: int) -> None:
        self.study, self.variant, self.seed, self.threads = study, variant, seed, threads
        self.name = run_name(variant, seed)
        self.log = study.folder / LOG_FOLDER / f"{self.name}.txt"
        self.log.parent.mkdir(parents=True, exist_ok=True)
        self.start = time.monotonic()
        self.file: IO[str] = self.log.open("a", encoding="utf-8")
        self.commands = study.commands(variant, seed)
        self.process = self._begin(None)

    def _begin(self, place: Path | None) -> subprocess.Popen:
        """The next command, in this folder; None: in the caller's, where paths of the user's count from."""
        command = self.commands.pop(0)
        count = str(self.threads)
        self.file.write(f"\n== {time.strftime('%Y-%m-%d %H:%M:%S')} {shlex.join(command)}\n")
        self.file.flush()
        return subprocess.Popen(
            command,
            cwd=place,
            env={**os.environ, "OMP_NUM_THREADS": count, "MKL_NUM_THREADS": count},
            stdin=subprocess.DEVNULL,
            stdout=self.file,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # a Ctrl-C reaches only this tool, which passes it on
            preexec_fn=end_with_parent if sys.platform == "linux" else None,
        )

    @property
    def minutes(self) -> float:
        """Since it began."""
        return (time.monotonic() - self.start) / 60

    def is_over(self) -> bool:
        """Whether it has failed, or the last of its commands has ended; begins the next one otherwise."""
        if self.process.poll() == 0 and self.commands:
            self.process = self._begin(BUNDLE)
        return self.process.poll() is not None

    def end(self) -> bool:
        """Note where it ran and how long; whether it failed."""
        self.file.close()
        failed = self.process.returncode != 0
        if not failed:
            about = {"minutes": round(self.minutes, 1), "threads": self.threads, **machine()}
            about["command"] = shlex.join(self.study.training(self.variant, self.seed))
            write_text(self.study.run_folder(self.variant, self.seed) / RUN_FILE, json.dumps(about, indent=1))
        return failed


def machine() -> dict[str, Any]:
    """Processor and number of cores that this process may use."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {"cpu": names[0] if names else platform.processor() or platform.machine(), "cores": cores}


def run_study(study: Study, jobs: int, threads: int) -> list[str]:
    """Run what is not finished, ``jobs`` runs at once.

    Returns:
        Names of the runs that failed; the others go on.
    """
    waiting = []
    for variant, seed in study.runs:
        if study.is_complete(variant, seed, study.folds):
            check_run(study, variant, seed)
            say(f"{run_name(variant, seed)}: finished before")
        else:
            waiting.append((variant, seed))
    active: list[ActiveRun] = []
    failed: list[str] = []
    total = len(waiting)
    try:
        while waiting or active:
            while waiting and len(active) < jobs:
                active.append(ActiveRun(study, *waiting.pop(0), threads))
                say(f"{active[-1].name}: started, {len(waiting)} of {total} waiting ({active[-1].log})")
            time.sleep(POLL_SECONDS)
            for run in [run for run in active if run.is_over()]:
                active.remove(run)
                if run.end():
                    failed.append(run.name)
                    said = "\n".join(f"    {line}" for line in last_lines(run.log))
                    say(f"{run.name}: FAILED (exit code {run.process.returncode}), {run.log}:\n{said}")
                else:
                    say(f"{run.name}: finished in {run.minutes:.0f} min")
    finally:
        stop(active)
    return failed


def stop(active: Sequence[ActiveRun]) -> None:
    """End runs that are still going; each ends its own folds first."""
    for run in active:
        signal_group(run.process, signal.SIGTERM)
    for run in active:
        try:
            run.process.wait(2 * STOP_SECONDS)
        except subprocess.TimeoutExpired:
            signal_group(run.process, signal.SIGKILL)
            run.process.wait()
        run.file.close()


def say(text: str) -> None:
    """A line with the time of day."""
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


# --- what came out ------------------------------------------------------------------------------------------------

Cells = dict[str, pd.DataFrame]
"""Cases that networks are judged by, by seed and fold, indexed by patient."""


def read_cells(study: Study, variant: str) -> Cells:
    """Cases that judge every finished network of a variant, with the HPV threshold chosen on its training cases.

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
                table["chosen"] = HPV_THRESHOLD if chosen["value"] is None else chosen["value"]
            cells[f"seed {seed}, fold {fold}"] = table.set_index("PatientID").sort_index()
    return cells


def columns_of(name: str) -> dict[str, str]:
    """Columns of the held-out cases that a figure reads, and what its measure calls them."""
    if name == "balanced_accuracy_chosen":
        return {"hpv_prob": "hpv_prob", "hpv": "hpv", "chosen": "hpv_threshold"}
    return {column: column for column in MEASURES[name].columns}


def wide_table(cells: Cells, name: str) -> pd.DataFrame:
    """A row a patient, and for every network the columns that a figure reads; NaN where it did not hold it out."""
    columns = columns_of(name)
    parts = {
        cell: table[list(columns)].astype(float).dropna().rename(columns=columns)
        for cell, table in cells.items()
        if set(columns) <= set(table)
    }
    return pd.concat(parts, axis=1, sort=True) if parts else pd.DataFrame()


def mean_over_networks(rows: pd.DataFrame, name: str) -> float:
    """Mean of a figure over the networks of :func:`wide_table`, each on the patients among ``rows`` that it held out.

    Pairs of patients are compared within a network: log hazards of two networks have no common scale.
    """
    values = list(each_network(rows, name).values())
    return float(np.nanmean(values)) if not np.isnan(values).all() else math.nan


def each_network(rows: pd.DataFrame, name: str) -> dict[str, float]:
    """A figure of each network; NaN where it does not exist."""
    statistic = MEASURES["balanced_accuracy" if name == "balanced_accuracy_chosen" else name].statistic
    names = list(columns_of(name).values())
    numbers = rows.to_numpy()
    found = {}
    for position, cell in enumerate(dict.fromkeys(rows.columns.get_level_values(0))):
        block = numbers[:, position * len(names) : (position + 1) * len(names)]
        block = block[~np.isnan(block).any(axis=1)]
        found[cell] = statistic(pd.DataFrame(block, columns=names)) if len(block) else math.nan
    return found


def figure(cells: Cells, name: str, samples: int, seed: int) -> dict[str, Any]:
    """Mean of a figure over networks with its interval over patients, the spread over networks, and counts."""
    table = wide_table(cells, name)
    if table.empty:
        return {"value": None, "reason": "not a task of this variant" if cells else "no finished run"}
    networks = each_network(table, name)
    value = mean_over_networks(table, name)
    head: dict[str, Any] = {"networks": networks, "patients": len(table)}
    if keys.EVENT in columns_of(name):
        head["events"] = int(table.xs(keys.EVENT, axis=1, level=1).max(axis=1).sum())
    if math.isnan(value):
        return {"value": None, "reason": "it does not exist for these patients", **head}
    low, high = bootstrap_interval(partial(mean_over_networks, name=name), table, samples, seed)
    spread = float(np.nanstd(list(networks.values()), ddof=1)) if len(networks) > 1 else None
    return {"value": value, "low": low, "high": high, "standard_deviation": spread, **head}


def difference(cells: Cells, base: Cells, name: str, samples: int, seed: int) -> dict[str, Any]:
    """A figure less the base's, on the patients that both held out with the same seed and fold."""
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
    truth = pd.read_csv(path, dtype={"PatientID": str}).set_index("PatientID")["log_hazard"]
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
                    hpv = {"hpv": table["hpv"], "hpv_prob": status.reindex(table.index), "chosen": HPV_THRESHOLD}
                    found[cell] = found[cell].assign(**hpv)
    return found


def with_risk(cases: pd.DataFrame, risk: pd.Series) -> pd.DataFrame:
    """Outcomes of the cases with another log hazard."""
    return cases[[keys.TIME, keys.EVENT]].assign(log_hazard=risk.reindex(cases.index))


def make_report(study: Study, samples: int, seed: int, command: str) -> dict[str, Any]:
    """Every figure of the finished runs."""
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
        say(f"{variant}: {len(found)} networks")
        rows[variant] = {"what": VARIANTS[variant].what, **judge(found, cells[first], tuple(COLUMNS), samples, seed)}
        rows[variant]["runs"] = {
            run_name(variant, number): run_facts(study.run_folder(variant, number)) for number in study.seeds
        }
    comparators = {
        name: judge(found, cells[first], tuple(COLUMNS), samples, seed) for name, found in others.items() if found
    }
    return {
        "notice": keys.RESEARCH_USE_ONLY,
        "data": read_experiment(study.run_folder(first, seed_of(cells[first])))["cohort"]["trained_on"],
        "dataset_dir": study.dataset_dir,
        "judged_by": judged_by(study),
        "base": first,
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
    """Which cases the figures are of, in words."""
    if study.test_dir is None:
        return "the cases that each network held out"
    cohort = load_cohort(study.test_dir)
    return f"other cases, {Path(study.test_dir).name}: {cohort.statement(cohort.cases)}"


def seed_of(cells: Cells) -> int:
    """Seed of the first network."""
    return int(next(iter(cells)).split(",")[0].removeprefix("seed "))


def judge(cells: Cells, base: Cells, names: Sequence[str], samples: int, seed: int) -> dict[str, Any]:
    """Figures of one variant, and its differences to the base."""
    compared = () if cells is base else names
    return {
        "networks": list(cells),
        "figures": {name: figure(cells, name, samples, seed) for name in names},
        "minus_base": {name: difference(cells, base, name, samples, seed) for name in compared},
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
    if ORACLE not in comparators or comparators[ORACLE]["figures"]["c_index"]["value"] is None:
        return {}
    best = comparators[ORACLE]["figures"]["c_index"]["value"] - 0.5
    values = {name: row["figures"]["c_index"]["value"] for name, row in rows.items()}
    return {name: (value - 0.5) / best for name, value in values.items() if value is not None and best > 0}


# --- to read ------------------------------------------------------------------------------------------------------


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
        f"Data: {report['data']}. Seeds {join(report['seeds'])}, fold {join(report['folds'])} of each: a seed deals the"
        f" folds anew. Judged by {report['judged_by']}; after the {epochs} epoch of each run.",
        f"Figures are means over networks, [interval: {report['interval']}], ± standard deviation over networks.",
        f"Machine: {'; '.join(places) or 'not recorded'}"
        + (f"; {min(minutes):.0f} to {max(minutes):.0f} min a run." if minutes else "."),
        f"Command: `{report['command']}`",
        *(f"Note: {note}" for note in report["notes"]),
        "",
        *figures_table(report),
        "",
        f"Difference to `{report['base']}` on the same patients (in so many networks), p two-sided, paired bootstrap:",
        "",
        *differences_table(report),
    ]
    return "\n".join(lines) + "\n"


def join(values: Sequence[Any]) -> str:
    """``0, 1, 2``."""
    return ", ".join(str(value) for value in values)


def figures_table(report: Mapping[str, Any]) -> list[str]:
    """A row a variant, then those who see no image."""
    lines = markdown_rows([["variant", "what", "networks", "patients (events)", *COLUMNS.values(), "of the oracle"]])
    rows = {**report["variants"], **report["comparators"]}
    for name, row in rows.items():
        survival = row["figures"]["c_index"]
        known = f"{survival['patients']} ({survival['events']})" if "events" in survival else "-"
        share = report["share_of_oracle"].get(name)
        cells = [shown(row["figures"].get(column), MEASURES.get(column)) for column in COLUMNS]
        title = f"`{name}`" if name in report["variants"] else name
        counts = [str(len(row["networks"])), known]
        lines += markdown_rows([[title, row.get("what", ""), *counts, *cells, f"{share:.0%}" if share else ""]], head=0)
    return lines


def differences_table(report: Mapping[str, Any]) -> list[str]:
    """A row a variant."""
    lines = markdown_rows([["variant", *COLUMNS.values()]])
    for name, row in {**report["variants"], **report["comparators"]}.items():
        if row["minus_base"]:
            cells = [shown_difference(row["minus_base"].get(column)) for column in COLUMNS]
            lines += markdown_rows([[f"`{name}`" if name in report["variants"] else name, *cells]], head=0)
    return lines


def markdown_rows(rows: Sequence[Sequence[str]], head: int = 1) -> list[str]:
    """Lines of a table, with a rule below the heading."""
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return lines + ["|" + " --- |" * len(rows[0])] * head


def shown(found: Mapping[str, Any] | None, measure: Any = None) -> str:
    """A figure to read; a dash where it is not asked for or cannot be had."""
    if found is None or found["value"] is None:
        return "-"
    spread = "" if found["standard_deviation"] is None else f" ± {found['standard_deviation']:.3f}"
    return f"{found['value']:.3f} [{found['low']:.3f}, {found['high']:.3f}]{spread}"


def shown_difference(found: Mapping[str, Any] | None) -> str:
    """A difference to read."""
    if found is None or found["value"] is None:
        return "-"
    counts = f"{found['patients']} patients in {found['networks']}"
    return f"{found['value']:+.3f} [{found['low']:+.3f}, {found['high']:+.3f}], p {found['p']:.3f} ({counts})"


def put_into(path: Path, table: str) -> None:
    """Replace what stands between the two marks of a document.

    Raises:
        ExperimentError: it has not both marks.
    """
    text = path.read_text(encoding="utf-8")
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ExperimentError(f"{path} has no place for the table: it must hold the lines {BEGIN} and {END}")
    write_text(path, f"{before}{BEGIN}\n{table}{END}{after}")


def study_learning(
    dataset_dir: str,
    output_dir: str,
    variants: str | Sequence[str] = (),
    seeds: int | Sequence[int] = (0, 1, 2),
    folds: int | Sequence[int] = (0,),
    jobs: int = 1,
    threads: int = 1,
    report: bool = False,
    doc: str | None = None,
    samples: int = BOOTSTRAP_SAMPLES,
    bootstrap_seed: int = 0,
    test_dir: str | None = None,
    **overrides: Any,
) -> None:
    """Run variants of the training with several seeds, or report what came out.

    Args:
        dataset_dir: folder of the cohort.
        output_dir: folder of the study; the same for running, going on and reporting.
        variants: names of :data:`VARIANTS`, the most important first; all if not given.
        seeds: one or more; every variant is run with the first before any with the second.
        folds: of each run.
        jobs: runs at once.
        threads: of each run.
        report: train nothing, write ``study.json`` and ``study.md`` of what is finished.
        doc: with ``report``, a Markdown file whose marked place gets the table.
        samples: draws of the bootstrap.
        bootstrap_seed: of the draws.
        test_dir: folder of another cohort, none of whose patients is in the first: networks are judged by it instead of
            by the cases that each held out. Networks that are finished are not trained again for it.
        **overrides: ids of the configs for every run, such as ``epochs``; a variant's own go before them.
    """
    if jobs < 1 or threads < 1:
        raise ExperimentError(f"--jobs and --threads are 1 or more; got {jobs} and {threads}")
    place = str(Path(dataset_dir).expanduser().resolve())
    names = check_variants([str(name) for name in as_list(variants)])
    numbers = [tuple(int(value) for value in as_list(values)) for values in (seeds, folds)]
    cohort = load_cohort(place)
    folder = Path(output_dir).expanduser().resolve()
    other = str(Path(test_dir).expanduser().resolve()) if test_dir else None
    if other:
        check_others(cohort, load_cohort(other))
    study = Study(folder, place, cohort.fingerprint, names, numbers[0], numbers[1], overrides, other)
    if report:
        written = make_report(study, samples, bootstrap_seed, command_line(study, jobs, threads))
        write_text(folder / STUDY_FILE, json.dumps(written, indent=1, allow_nan=False))
        write_text(folder / TABLE_FILE, table := as_markdown(written))
        if doc:
            put_into(Path(doc), table)
        print(table)
        return
    with signals_as_exit():
        failed = run_study(study, jobs, threads)
    if failed:
        sys.exit(f"study_learning: {len(failed)} of {len(study.runs)} runs failed: {', '.join(failed)}")


def check_others(cohort: Cohort, others: Cohort) -> None:
    """See that two cohorts have no patient in common.

    Raises:
        ExperimentError: they have; some are named.
    """
    seen, found = ({case[keys.PATIENT_ID] for case in one.cases} for one in (cohort, others))
    if shared := sorted(seen & found):
        raise ExperimentError(
            f"{len(shared)} patients of the test cohort are in the study's own ({', '.join(shared[:3])} ...): give "
            "another cohort, such as phantoms of another seed"
        )


def command_line(study: Study, jobs: int, threads: int) -> str:
    """What a reader types for the same study."""
    options: dict[str, Any] = {"dataset_dir": Path(study.dataset_dir).name, "output_dir": study.folder.name}
    if study.variants != tuple(VARIANTS):
        options["variants"] = ",".join(study.variants)
    options |= {"seeds": join(study.seeds).replace(" ", ""), "folds": join(study.folds).replace(" ", "")}
    options |= {"test_dir": Path(study.test_dir).name} if study.test_dir else {}
    options |= {"jobs": jobs, "threads": threads, **study.overrides}
    words = [word for name, value in options.items() for word in (f"--{name}", value)]
    return shlex.join(["python", "scripts/study_learning.py", *(str(word) for word in words)])


if __name__ == "__main__":
    try:
        fire.Fire(study_learning)
    except (ExperimentError, CohortError, OSError) as error:
        sys.exit(f"study_learning: {error}")
