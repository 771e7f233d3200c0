"""Train and evaluate every fold of an experiment with the bundle's own commands, and keep the out-of-fold predictions.

``python scripts/train_folds.py --dataset_dir DIR`` writes the files of :mod:`experiments.experiment`. Each fold is
trained by ``python -m monai.bundle run training`` and evaluated by ``... run evaluating``, in processes of their own.
If interrupted, rerun the same command to resume from the last complete epoch; finished folds are kept.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any

import numpy as np
import pandas as pd

from command_line import BUNDLE, run_tool

from cluster.folds import NodeStep, NodeSteps
from cluster.nodes import ClusterError, connected, mark
from experiments.experiment import (
    FINISHED,
    LOG_FILE,
    TEXT_IDS,
    TRAINING,
    ExperimentError,
    Plan,
    as_list,
    claim_folder,
    fold_folder,
    gather,
    is_finished,
    make_plan,
    read_override,
    typed,
    write_fold,
)
from experiments.processes import FolderInUseError, last_lines, lock_folder, signals_as_exit, start_logged, stop
from scripts import keys
from scripts.cohorts.cohort import CohortError

POLL_SECONDS = 0.5
REPORT_SECONDS = 60.0


# --- running it -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Failure:
    """How a fold failed."""

    step: str  # the step that failed
    exit_code: int  # of the command; negative for the signal that ended it
    log: str  # file with its output
    last_lines: list[str]  # the end of it


Start = Callable[[Sequence[str], Path, str], subprocess.Popen | NodeStep]


class FoldRun:
    """The steps of one fold, run one after another."""

    def __init__(self, plan: Plan, fold: int, lock: IO[str], start: Start, device: str | None) -> None:
        self.fold = fold
        self.folder = fold_folder(plan.folder, fold)
        self.steps = plan.steps(fold)
        self.start = start
        self.device = [] if device is None else [f"--device={device}"]
        self.number = 0
        self.failure: Failure | None = None
        self.lock = lock
        self.process = self._start()

    @property
    def step(self) -> str:
        """Title of the running step."""
        return self.steps[self.number][0]

    def is_over(self) -> bool:
        """Start the next step if one has ended; True once the last step has ended or a step has failed."""
        code = self.process.poll()
        if code is None:
            return False
        last = self.number == len(self.steps) - 1
        if code:
            log = self.folder / LOG_FILE
            self.failure = Failure(self.step, code, str(log), last_lines(log))
        elif not last:
            self.number += 1
            self.process = self._start()
            return False
        self.lock.close()
        return True

    def _start(self) -> subprocess.Popen | NodeStep:
        """Start the current step."""
        command = [*self.steps[self.number][1], *self.device]
        return self.start(command, self.folder / LOG_FILE, self.step)


def start_here(
    environment: Mapping[str, str], lock: IO[str], command: Sequence[str], log: Path, title: str
) -> subprocess.Popen:
    """Start a step on this computer; every process of the fold holds the lock."""
    return start_logged(command, log, title, environment, BUNDLE, [lock.fileno()])


def parse_devices(devices: Any) -> list[str]:
    """Devices for the folds: ``cpu``, or numbers of GPUs.

    Example:
        >>> parse_devices("cpu"), parse_devices((0, 1)), parse_devices("")
        (['cpu'], ['0', '1'], [])
    """
    names = [str(name) for name in as_list(devices)]
    if any(name != "cpu" and not name.isdigit() for name in names):
        raise ExperimentError(f"--devices is 'cpu' or numbers of GPUs such as 0,1; got {devices!r}")
    return names


def environment_of(device: str | None, jobs: int) -> dict[str, str]:
    """Environment of the processes of one fold: its share of the cores, its GPU, and few lines of progress bars."""
    environment = {**os.environ, "TQDM_MININTERVAL": "30"}
    if jobs > 1:
        environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // jobs)))
    if device is not None and device != "cpu":
        visible = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
        if visible and int(device) >= len(visible):
            raise ExperimentError(f"no GPU {device}: CUDA_VISIBLE_DEVICES is {','.join(visible)}")
        environment["CUDA_VISIBLE_DEVICES"] = visible[int(device)] if visible else device
    return environment


def run_folds(
    plan: Plan, record: dict[str, Any], jobs: int, devices: Sequence[str], nodes: NodeSteps | None = None
) -> list[FoldRun]:
    """Run the unfinished folds, ``jobs`` at a time here, or with ``nodes`` all on a cluster; gives those that failed.

    Raises:
        FolderInUseError: another process uses one of the folds; none is run then.
        ClusterError: a node does not see a path.
    """
    waiting = [fold for fold in plan.folds if not is_finished(plan, fold)]
    failed: list[FoldRun] = []
    with ExitStack() as held:
        locks = {fold: held.enter_context(lock_folder(fold_folder(plan.folder, fold))) for fold in waiting}
        display = Display(plan, waiting)
        active: dict[int, FoldRun] = {}  # by the place that a fold has taken
        held.callback(display.close)
        held.callback(lambda: stop([r.process for r in active.values() if isinstance(r.process, subprocess.Popen)]))
        while waiting or active:
            for place in set(range(len(plan.folds) if nodes else jobs)) - set(active):
                if waiting and nodes:
                    fold = waiting.pop(0)
                    locks[fold].close()  # the node takes it
                    active[place] = FoldRun(plan, fold, locks[fold], nodes.start, nodes.device)
                elif waiting:
                    fold, device = waiting.pop(0), devices[place % len(devices)] if devices else None
                    name = None if device is None else "cpu" if device == "cpu" else "cuda:0"
                    start = partial(start_here, environment_of(device, jobs), locks[fold])
                    active[place] = FoldRun(plan, fold, locks[fold], start, name)
            for place, run in list(active.items()):
                if run.is_over():
                    del active[place]
                    write_fold(plan, run.fold, asdict(run.failure) if run.failure else None)
                    gather(plan, record)
                    failed += [run] if run.failure else []
                    display.end(run)
            display.show(list(active.values()))
            time.sleep(POLL_SECONDS)
    return failed


@contextmanager
def on_nodes(plan: Plan, address: str, cores: int, gpus: float | None) -> Iterator[NodeSteps]:
    """Be connected to a Ray cluster on which the steps of a plan are started."""
    with connected(address, cores, gpus) as share, mark(plan.folder) as marker:
        yield NodeSteps(share, [plan.overrides["dataset_dir"], str(marker)])


# --- what is shown --------------------------------------------------------------------------------------------------


class Display:
    """One line on which folds are at which epoch, and the time left.

    On a terminal the line is overwritten; elsewhere a line is printed at each new step of a fold and once a minute.
    """

    def __init__(self, plan: Plan, folds: Sequence[int]) -> None:
        self.plan = plan
        self.total = len(folds) * plan.epochs
        self.done = {fold: epochs_done(plan.folder, fold) for fold in folds}
        self.before = sum(self.done.values())
        self.start = time.monotonic()
        self.over_write = sys.stderr.isatty()
        self.steps: dict[int, str] = {}
        self.reported = -REPORT_SECONDS

    def show(self, runs: Sequence[FoldRun]) -> None:
        """Show epoch or step of each fold."""
        for run in runs:
            trained = run.step != TRAINING
            self.done[run.fold] = self.plan.epochs if trained else epochs_done(self.plan.folder, run.fold)
        steps = {run.fold: run.step for run in runs}
        now = time.monotonic()
        if not runs or not (self.over_write or steps != self.steps or now - self.reported >= REPORT_SECONDS):
            return
        self.steps, self.reported = steps, now
        where = ", ".join(
            f"fold {run.fold} epoch {self.done[run.fold]}/{self.plan.epochs}"
            if run.step == TRAINING
            else f"fold {run.fold} {run.step}"
            for run in runs
        )
        done = sum(self.done.values())
        left = time_left(now - self.start, done - self.before, self.total - done)
        self._write(f"{where} | {100 * done // max(1, self.total)} % of all epochs | {left}")

    def end(self, run: FoldRun) -> None:
        """Print that a fold has ended."""
        self.done[run.fold] = self.plan.epochs
        self.close()
        print(f"fold {run.fold}: {f'failed in {run.failure.step}' if run.failure else FINISHED}", file=sys.stderr)

    def close(self) -> None:
        """Clear the line."""
        if self.over_write:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)

    def _write(self, text: str) -> None:
        if self.over_write:
            print(f"\r\x1b[K{text[: shutil.get_terminal_size().columns - 1]}", end="", file=sys.stderr, flush=True)
        else:
            print(text, file=sys.stderr, flush=True)


def epochs_done(run: Path, fold: int) -> int:
    """The last complete epoch of a fold."""
    path = fold_folder(run, fold) / "history.json"
    history = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []
    return int(history[-1]["epoch"]) if history else 0


def time_left(seconds: float, done: int, left: int) -> str:
    """Remaining time for ``left`` epochs if ``done`` epochs took ``seconds``, as text.

    Example:
        >>> time_left(60.0, 4, 8), time_left(60.0, 1, 300), time_left(5.0, 0, 8)
        ('2 min left', '5.0 h left', 'time left known after the next epoch')
    """
    if not left:
        return "training done"
    if not done:
        return "time left known after the next epoch"
    minutes = seconds / done * left / 60
    return f"{minutes / 60:.1f} h left" if minutes >= 100 else f"{max(1, round(minutes))} min left"


def summary(plan: Plan, record: Mapping[str, Any], pooled: pd.DataFrame) -> str:
    """Metrics of each fold and their mean, missing cases, and the folder, as text."""
    from experiments.evidence import selection_of  # imports torch, which takes seconds

    names = {"c_index": "C-index", "dice": "Dice", "balanced_accuracy": "HPV bal. acc."}
    lines = [f"{'':<8}" + "".join(f"{title:>15}" for title in ("cases", "events", *names.values()))]
    values: dict[str, list[float]] = {name: [] for name in names}
    for fold, outcome in record["folds"].items():
        if outcome["status"] != FINISHED:
            lines.append(f"fold {fold:<3}{outcome['status']:>15}")
            continue
        metrics = outcome["metrics"][plan.held_out]
        cells = [str(outcome["cases"][plan.held_out][name]) for name in ("cases", "events")]
        for name in names:
            value = metrics[name]["value"]
            values[name] += [] if value is None else [value]
            cells.append("-" if value is None else f"{value:.3f}")
        lines.append(f"fold {fold:<3}" + "".join(f"{cell:>15}" for cell in cells))
    means = [f"{np.mean(found):.3f}" if found else "-" for found in values.values()]
    lines.append(f"{'mean':<8}{'':>30}" + "".join(f"{mean:>15}" for mean in means))
    expected = {case[keys.PATIENT_ID] for split in plan.splits for case in split.part(plan.held_out)}
    missing = sorted(expected - set(pooled.get("PatientID", [])))
    if missing and all(outcome["status"] == FINISHED for outcome in record["folds"].values()):
        shown = ", ".join(missing[:5]) + (" ..." if len(missing) > 5 else "")
        lines.append(f"{len(missing)} of {len(expected)} are left out ({shown}): see fold_*/evaluation*/exclusions.csv")
    title = f"{plan.held_out} cases, from networks that have not learnt from them ({plan.cohort.statement()})"
    chosen = selection_of(record)
    if chosen["fitted_to_these_cases"] != []:
        lines.append(f"note: {chosen['statement']}")
    return "\n".join([title, *lines, f"written: {plan.folder}"])


def report_failure(run: FoldRun) -> str:
    """Step, exit code and end of the log of a failed fold."""
    assert run.failure is not None  # only such folds come here
    said = "\n".join(f"    {line}" for line in run.failure.last_lines)
    return (
        f"fold {run.fold} failed in {run.failure.step} (exit code {run.failure.exit_code}), {run.failure.log}:\n{said}"
    )


# --- the command ----------------------------------------------------------------------------------------------------


def command_line(arguments: Mapping[str, Any]) -> str:
    """The command for the same experiment.

    Example:
        >>> command_line({"dataset_dir": "data", "epochs": 3, "tasks": None})
        'python scripts/train_folds.py --dataset_dir data --epochs 3'
        >>> print(command_line({"dataset_dir": "data", "tasks": ["seg", "surv"]}))
        python scripts/train_folds.py --dataset_dir data --tasks '["seg", "surv"]'
    """
    given = {
        name: value for name, value in arguments.items() if value is not None and value is not False and value != []
    }
    options = []
    for name, value in given.items():
        word = str(value) if name in TEXT_IDS else typed(value)
        options += [f"--{name}", word if '"' in word else word.replace("'", '"')]  # easier to read within a shell's
    return shlex.join(["python", "scripts/train_folds.py", *options])


def train_folds(
    dataset_dir: str,
    protocol: str = "partial",
    num_folds: int | None = None,
    leave_one_centre_out: bool = False,
    folds: int | Sequence[int] | None = None,
    tasks: str | Sequence[str] | None = None,
    config_file: str | Sequence[str] = (),
    output_dir: str | None = None,
    jobs: int = 0,
    devices: str | int | Sequence[int] = "",
    epochs: int | None = None,
    ray: str | None = None,
    ray_cores: int = 2,
    ray_gpus: float | None = None,
    **overrides: Any,
) -> None:
    """Train and evaluate the folds of an experiment. If interrupted, rerun the same command to resume.

    Args:
        dataset_dir: folder in one of HECKTOR's layouts.
        protocol: ``partial`` (all cases), ``full`` (only cases with mask and HPV status),
            ``ablation`` (one split 60/30/10; 100 epochs, validated every 10) or ``leave_one_centre_out``.
        num_folds: 3 for ``partial``, 5 for ``full``, the number of centres for ``leave_one_centre_out``.
        leave_one_centre_out: short for ``--protocol leave_one_centre_out``.
        folds: folds to run, such as 0,2; all if not given.
        tasks: such as surv or seg,surv.
        config_file: overlays to add to ``configs/train.json``, such as configs/paper.json.
        output_dir: folder of the experiment; ``runs/<cohort>_<protocol>`` with the tasks if not given.
        jobs: number of folds in parallel; 0: one for each of ``devices``.
        devices: ``cpu`` or numbers of GPUs; the bundle's own choice if not given.
        epochs: maximum number of epochs.
        ray: run the folds on a Ray cluster: auto (the one this computer belongs to), HOST:PORT of its head, or local.
            Every node sees the same paths.
        ray_cores: cores of each fold there.
        ray_gpus: GPUs of each fold; 1 by default where the cluster has GPUs.
        **overrides: any other id of the configs.
    """
    given = {"num_folds": num_folds, "tasks": tasks, "epochs": epochs}
    overrides = {name: value for name, value in given.items() if value is not None} | overrides
    shown = {"dataset_dir": dataset_dir, "protocol": protocol, "leave_one_centre_out": leave_one_centre_out}
    command = command_line({**shown, **overrides, "config_file": as_list(config_file), "output_dir": output_dir})
    if leave_one_centre_out:
        if protocol not in ("partial", "leave_one_centre_out"):
            raise ExperimentError(f"--leave_one_centre_out is a protocol of its own: leave out --protocol {protocol}")
        protocol = "leave_one_centre_out"
    places = parse_devices(devices)
    if jobs < 0:
        raise ExperimentError(f"--jobs is the number of folds in parallel; got {jobs}")
    if places and "device" in overrides:
        raise ExperimentError("give --devices or --device, not both")
    if ray is not None and (jobs or places or "device" in overrides):
        raise ExperimentError("Ray places the folds: with --ray, leave out --jobs, --devices and --device")
    plan = make_plan(dataset_dir, protocol, config_file, folds, output_dir, overrides, command)
    record = claim_folder(plan)
    print(f"{plan.cohort.describe()}\nexperiment {plan.folder}, logs in fold_*/{LOG_FILE}", file=sys.stderr)
    for fold in plan.folds:
        if is_finished(plan, fold):
            print(f"fold {fold}: finished before", file=sys.stderr)
    with nullcontext() if ray is None else on_nodes(plan, ray, ray_cores, ray_gpus) as nodes, signals_as_exit():
        failed = run_folds(plan, record, jobs or max(1, len(places)), places, nodes)
    print(summary(plan, record, gather(plan, record)))
    for run in failed:
        print(report_failure(run), file=sys.stderr)
    if failed:
        raise SystemExit(1)


if __name__ == "__main__":
    run_tool(train_folds, ExperimentError, CohortError, FolderInUseError, ClusterError, OSError, read=read_override)
