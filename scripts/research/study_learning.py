"""Study of learning: the same experiment in variants and with several seeds, and a table of the results.

``python scripts/research study_learning --dataset_dir COHORT --output_dir STUDY`` runs ``train_folds.py`` for every
variant and seed. If interrupted, rerun the same command to resume. With ``--report`` it reports the finished runs ::

    STUDY/flow_s1/          a run: variant "flow", seed 1, as train_folds.py leaves it
    STUDY/flow_s1/run.json  where it ran and how long it took
    STUDY/logs/flow_s1.txt  output of train_folds.py
    STUDY/cache/            preprocessed cases, shared by the runs
    STUDY/flow_s1/fold_0/evaluation_others/   with --test_dir: the network on another cohort
    STUDY/study.json        the report: every metric with its interval and counts
    STUDY/study.md          the same as tables

The runs import their code from this repository: do not edit it while they run.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from command_line import BUNDLE, run_tool

from experiments.experiment import TRAIN_CONFIG, ExperimentError, as_list, find_config, merge_configs, read_override
from experiments.processes import STOP_SECONDS, last_lines, signals_as_exit, start_logged, stop
from research.machine import cores, cpu_name
from research.study import DEMO, VARIANTS, Study, check_run, check_variants, run_name
from research.study_report import RUN_FILE, as_markdown, join, make_report
from scripts import keys
from scripts.cohorts.cohort import Cohort, CohortError, load_cohort
from scripts.cohorts.files import write_text
from scripts.cohorts.scans import shared_patients
from scripts.evaluation.bootstrap import BOOTSTRAP_SAMPLES

STUDY_FILE, TABLE_FILE, LOG_FOLDER = "study.json", "study.md", "logs"
POLL_SECONDS = 1.0


class ActiveRun:
    """A run in progress.

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
        self.commands = study.commands(variant, seed)
        self.process = self._begin(None)

    def _begin(self, place: Path | None) -> subprocess.Popen:
        """Start the next command, in this folder; None: in the caller's, which relative paths refer to."""
        count = str(self.threads)
        environment = {**os.environ, "OMP_NUM_THREADS": count, "MKL_NUM_THREADS": count}
        return start_logged(self.commands.pop(0), self.log, self.name, environment, place)

    @property
    def minutes(self) -> float:
        """Minutes since the start."""
        return (time.monotonic() - self.start) / 60

    def is_over(self) -> bool:
        """Whether it has failed, or the last of its commands has ended; begins the next one otherwise."""
        if self.process.poll() == 0 and self.commands:
            self.process = self._begin(BUNDLE)
        return self.process.poll() is not None

    def end(self) -> bool:
        """Record machine and duration; gives whether the run failed."""
        failed = self.process.returncode != 0
        if not failed:
            about: dict[str, Any] = {"minutes": round(self.minutes, 1), "threads": self.threads}
            about |= {"cpu": cpu_name(), "cores": cores()}
            about["command"] = shlex.join(self.study.training(self.variant, self.seed))
            write_text(self.study.run_folder(self.variant, self.seed) / RUN_FILE, json.dumps(about, indent=1))
        return failed


def run_study(study: Study, jobs: int, threads: int) -> list[str]:
    """Run what is not finished, ``jobs`` runs in parallel.

    Returns:
        Names of the runs that failed; the others are continued.
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
        stop([run.process for run in active], 2 * STOP_SECONDS)  # each stops its own folds first
    return failed


def say(text: str) -> None:
    """A line with the time of day."""
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


def study_learning(
    dataset_dir: str,
    output_dir: str,
    variants: str | Sequence[str] = (),
    seeds: int | Sequence[int] = (0, 1, 2),
    folds: int | Sequence[int] = (0,),
    jobs: int = 1,
    threads: int = 1,
    report: bool = False,
    samples: int = BOOTSTRAP_SAMPLES,
    test_dir: str | None = None,
    config_file: str = DEMO,
    **overrides: Any,
) -> None:
    """Run variants of the training with several seeds, or report the results.

    Args:
        dataset_dir: folder of the cohort.
        output_dir: folder of the study.
        variants: names of :data:`VARIANTS`, the most important first; all if not given.
        seeds: one or more; every variant is run with the first before any with the second.
        folds: of each run.
        jobs: number of runs in parallel.
        threads: of each run.
        report: train nothing, write ``study.json`` and ``study.md`` of what is finished.
        samples: draws of the bootstrap.
        test_dir: folder of another cohort without patients of the first, to evaluate the networks on instead of the
            held-out cases. Finished networks are not trained again for it.
        config_file: overlay on ``configs/train.json`` that sets grid, epochs and learning rate, such as
            ``configs/phantoms.json``.
        **overrides: ids of the configs for every run, such as ``epochs``; a variant's own settings take precedence.
    """
    if jobs < 1 or threads < 1:
        raise ExperimentError(f"--jobs and --threads are 1 or more; got {jobs} and {threads}")
    if "seed" in overrides:
        raise ExperimentError("--seed is set for each run: is --seeds meant?")
    overlay = find_config(config_file)
    merge_configs((TRAIN_CONFIG, overlay), "partial", overrides)  # an unknown id shall show before the first run
    place = str(Path(dataset_dir).expanduser().resolve())
    names = check_variants([str(name) for name in as_list(variants)])
    numbers = [tuple(int(value) for value in as_list(values)) for values in (seeds, folds)]
    cohort = load_cohort(place)
    folder = Path(output_dir).expanduser().resolve()
    other = str(Path(test_dir).expanduser().resolve()) if test_dir else None
    if other:
        check_others(cohort, load_cohort(other))
    study = Study(folder, place, cohort.fingerprint, names, numbers[0], numbers[1], overrides, other, overlay)
    if report:
        written = make_report(study, samples, 0, command_line(study, jobs, threads), say)
        write_text(folder / STUDY_FILE, json.dumps(written, indent=1, allow_nan=False))
        write_text(folder / TABLE_FILE, table := as_markdown(written))
        print(table)
        return
    with signals_as_exit():
        failed = run_study(study, jobs, threads)
    if failed:
        sys.exit(f"study_learning: {len(failed)} of {len(study.runs)} runs failed: {', '.join(failed)}")


def check_others(cohort: Cohort, others: Cohort) -> None:
    """Check that two cohorts have no patient in common, in any spelling of the ids.

    Raises:
        ExperimentError: they have; some are named.
    """
    seen, found = ([case[keys.PATIENT_ID] for case in one.cases] for one in (cohort, others))
    if shared := shared_patients(found, seen):
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
    options |= {"config_file": study.overlay} if study.overlay != DEMO else {}
    options |= {"jobs": jobs, "threads": threads, **study.overrides}
    words = [word for name, value in options.items() for word in (f"--{name}", value)]
    return shlex.join(["python", "scripts/research", "study_learning", *(str(word) for word in words)])


if __name__ == "__main__":
    run_tool(study_learning, ExperimentError, CohortError, OSError, read=read_override)
