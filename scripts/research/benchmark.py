"""Measure each stage of training and prediction against a plain implementation: ``python scripts/research benchmark``.

The plain implementation is MONAI without changes over whole volumes, and the same network in float32 with torch's
defaults. Each implementation has its own process, whose peak memory is measured; their runs alternate, so that other
load on the machine affects all of them, and medians are compared. The results are compared first; if they differ, the
benchmark ends with an error. The stages are in ``benchmark_stages.py``, results in ``bundle/docs/speed.md``.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import platform
import statistics
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from importlib import metadata
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from command_line import run_tool

from research import benchmark_profile
from research import benchmark_stages as at
from research.machine import cores, cpu_name
from scripts.cohorts.files import write_text

PLAIN, PRODUCT = "plain", "bundle"
MIB = 2**20
PACKAGES = ("torch", "monai", "numpy", "nibabel", "isal", "scipy")


@dataclass(frozen=True)
class Stage:
    """One line of the table, or several."""

    title: str  # what is measured
    ways: Mapping[str, Callable[[at.Setup], at.Run]]  # name of each implementation -> its set-up; the plain one first
    # compares the results of the plain implementation and of another; describes their agreement
    check: Callable[[at.Setup, at.Answer, at.Answer], str]
    reach: float | None  # target speedup of bundle (see bundle/docs/speed.md); None without a target
    runs: int = 4  # timed runs of each implementation
    rehearse: bool = True  # whether a run that is not timed goes first
    together: bool = True  # whether the processes alternate; False if the memory does not suffice for all of them


STAGES = {
    "preprocessing": Stage(
        "two files to the network's input",
        {PLAIN: at.preprocess_plainly, PRODUCT: at.preprocess},
        at.check_preprocessing,
        25,
        runs=2,
        rehearse=False,
    ),
    "network": Stage(
        "network, one case",
        {PLAIN: at.plain_network_run(1), PRODUCT: at.network_run(1), "compiled": at.network_run(1, compile=True)},
        at.check_network,
        6,
    ),
    "ensemble": Stage(
        f"{at.FOLDS} folds, one case",
        {PLAIN: at.plain_network_run(at.FOLDS), PRODUCT: at.network_run(at.FOLDS)},
        at.check_network,
        6,
        runs=2,
    ),
    "mask": Stage(
        "mask back on the CT's grid and written", {PLAIN: at.restore_plainly, PRODUCT: at.restore}, at.check_mask, None
    ),
    "patient": Stage(
        "one patient, files to mask and JSON",
        {PLAIN: at.patient_plainly, PRODUCT: at.patient},
        at.check_patient,
        15,
        runs=2,
    ),
    "cohort": Stage(
        "a cohort",
        {
            PLAIN: at.cohort({"_target_": "torch.utils.data.DataLoader"}),
            PRODUCT: at.cohort({}),
        },
        at.check_cohort,
        None,
        runs=2,
    ),
    "training": Stage(
        f"training step, batch {at.BATCH}",
        {
            PLAIN: at.train_plainly,
            PRODUCT: at.training(),
            "compiled": at.training(compile=True),
            "frugal": at.training(checkpointing=True),
        },
        at.check_training,
        3.5,
        runs=2,
    ),
    "training_large": Stage(
        f"training step, batch {at.BATCH}",
        {PLAIN: at.train_plainly, PRODUCT: at.training(), "frugal": at.training(checkpointing=True)},
        at.check_training,
        3.5,
        runs=1,
        rehearse=False,
        together=False,
    ),
}

EXTRAS: dict[str, Callable[[at.Setup], dict[str, float]]] = {
    "loading": at.trace_loading,
    "startup": benchmark_profile.startup,
}
PROFILES: dict[str, Callable[[at.Setup], dict[str, float]]] = {
    "profile_patient": benchmark_profile.profile_patient,
    "profile_network": benchmark_profile.profile_network,
    "profile_training": benchmark_profile.profile_training,
}
DEFAULT = (*STAGES, *EXTRAS)


def benchmark(
    out: str = "benchmark.json",
    stages: str | tuple[str, ...] = DEFAULT,
    cohort: int = 5,
    quick: bool = False,
    threads: int = 0,
    compiled: bool = False,
    amp: bool | None = None,
    workdir: str = "",
) -> None:
    """Measure, print a table and write it as JSON; about ten minutes on two cores.

    Args:
        out: the JSON file.
        stages: some of preprocessing, network, ensemble, mask, patient, cohort, training (64 voxels an edge),
            training_large (128), loading, startup; all of these by default. Profiles of one run: profile_patient,
            profile_network, profile_training.
        cohort: number of patients of the stage cohort.
        quick: small images and few runs, for a quick test.
        threads: of torch; 0: one for each core.
        compiled: also measure compiled networks: six minutes more, most of them for compilation.
        amp: compute in bfloat16 or not; by default as the configs choose on this machine.
        workdir: folder that keeps the generated scans for the next run; by default a temporary one.
    """
    names = [name.strip() for name in stages.split(",")] if isinstance(stages, str) else list(stages)
    known = (*DEFAULT, *PROFILES)
    unknown = sorted(set(names) - set(known))
    if unknown:
        raise ValueError(f"no stage {unknown[0]!r}; stages are {', '.join(known)}")
    threads = threads or cores()
    os.environ.update(OMP_NUM_THREADS=str(threads), MKL_NUM_THREADS=str(threads), TQDM_DISABLE="1")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(workdir or temporary).resolve() / ("quick" if quick else "full")
        sizes = {"roi": 32, "shrink": 4, "cohort": min(cohort, 3)} if quick else {"cohort": cohort}
        setup = at.Setup(folder, **sizes, amp=amp)
        print(f"making the inputs in {folder}", flush=True)
        at.make_inputs(setup)
        result: dict[str, Any] = {"machine": machine(threads), "quick": quick, "amp": amp, "stages": {}}
        for name in names:
            print(f"== {name}", flush=True)
            if name in STAGES:
                result["stages"][name] = measure(STAGES[name], of_size(setup, name), quick, compiled)
            else:
                result["stages"][name] = {"trace": {**EXTRAS, **PROFILES}[name](setup)}
            write_text(Path(out), json.dumps(result, indent=1) + "\n")
    print("\n" + table(result))


def of_size(setup: at.Setup, stage: str) -> at.Setup:
    """The setup for a stage: the stage training uses half the edge, which is fast enough to repeat."""
    return replace(setup, roi=setup.roi // 2) if stage == "training" and setup.roi >= 64 else setup


# --- one stage ---------------------------------------------------------------------------------------------------
def measure(stage: Stage, setup: at.Setup, quick: bool, compiled: bool = False) -> dict[str, Any]:
    """Compare the results of a stage, then time its implementations alternately.

    Returns:
        title, agreement (text), and for each way seconds and cpu_seconds (lists), median_s, peak_mib, times_plain.
    """
    ways = {name: make for name, make in stage.ways.items() if compiled or name != "compiled"}
    runs = 1 if quick else stage.runs
    groups = [list(ways)] if stage.together else [[name] for name in ways]
    answers: dict[str, at.Answer] = {}
    timed: dict[str, list[dict[str, float]]] = {name: [] for name in ways}
    agreement = {}
    for group in groups:
        workers = {name: Worker(ways[name], setup) for name in group}
        try:
            for name, worker in workers.items():
                first, answers[name] = worker.run(answer=True)
                if not stage.rehearse:
                    timed[name].append(first)
                if name != PLAIN:
                    agreement[name] = stage.check(setup, answers[PLAIN], answers[name])
                    print(f"   {name}: {agreement[name]}", flush=True)
            for _ in range(runs if stage.rehearse else runs - 1):
                for name, worker in workers.items():
                    timed[name].append(worker.run()[0])
        finally:
            for worker in workers.values():
                worker.close()
    medians = {name: statistics.median(run["seconds"] for run in of) for name, of in timed.items()}
    return {
        "title": stage.title,
        "roi": setup.roi,
        "reach": stage.reach,
        "agreement": agreement,
        "ways": {
            name: {
                "median_s": medians[name],
                "seconds": [run["seconds"] for run in of],
                "cpu_seconds": [run["cpu_seconds"] for run in of],
                "busy_cores": statistics.median(run["cpu_seconds"] / run["seconds"] for run in of),
                "peak_mib": max(run["peak_mib"] for run in of),
                "times_plain": medians[PLAIN] / medians[name],
            }
            for name, of in timed.items()
        },
    }


class Worker:
    """A process that sets up one implementation and runs it on request."""

    def __init__(self, make: Callable[[at.Setup], at.Run], setup: at.Setup) -> None:
        self.way = next((s, w) for s, stage in STAGES.items() for w, of in stage.ways.items() if of is make)
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, *self.way, setup), daemon=True)
        self.process.start()
        theirs.close()

    def run(self, answer: bool = False) -> tuple[dict[str, float], at.Answer]:
        """Seconds, CPU seconds and peak memory of one run, and its results if ``answer``.

        Raises:
            RuntimeError: the run failed; with the traceback of the process.
        """
        self.pipe.send(answer)
        try:
            reply = self.pipe.recv()
        except EOFError:
            raise RuntimeError(f"{' '.join(self.way)}: the process ended (was there enough memory?)") from None
        if isinstance(reply, str):
            raise RuntimeError(f"{' '.join(self.way)}: {reply}")
        return reply

    def close(self) -> None:
        """End the process."""
        self.pipe.close()
        self.process.join(timeout=20)
        if self.process.is_alive():
            self.process.kill()


def _serve(pipe: Connection, stage: str, way: str, setup: at.Setup) -> None:
    """Main function of a worker's process; an error of the set-up is the reply to the first run."""
    try:
        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
        run = STAGES[stage].ways[way](setup)
        while True:
            wanted = pipe.recv()
            start, cpu = time.perf_counter(), time.process_time()
            answer = run()
            seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
            reply = {"seconds": seconds, "cpu_seconds": cpu, "peak_mib": peak_mib()}
            pipe.send((reply, answer if wanted else {}))
    except EOFError:
        return
    except Exception:
        pipe.recv()
        pipe.send(traceback.format_exc())


def peak_mib() -> float:
    """Largest resident memory of this process so far.

    On Linux from /proc; ``getrusage`` would include the parent's.
    """
    status = Path("/proc/self/status")
    if status.is_file():
        return next(int(row.split()[1]) for row in status.read_text().splitlines() if row.startswith("VmHWM")) / 1024
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / MIB  # bytes on macOS


# --- what is said ------------------------------------------------------------------------------------------------
def machine(threads: int) -> dict[str, Any]:
    """Hardware and versions of the measurement."""
    capabilities = torch.cpu.get_capabilities()
    kinds = ("avx2", "avx512_f", "avx512_bf16", "amx_bf16")
    return {
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": threads,
        "vector_units": [kind for kind in kinds if capabilities.get(kind)],
        "fp32_gflops": round(matmul_gflops(torch.float32, threads)),
        "bf16_gflops": round(matmul_gflops(torch.bfloat16, threads)),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "load_at_start": [round(load, 2) for load in os.getloadavg()],
        "system": f"{platform.system()} {platform.release()} {platform.libc_ver()[0]} {platform.libc_ver()[1]}",
        "python": platform.python_version(),
        **{name: metadata.version(name) for name in PACKAGES},
    }


def matmul_gflops(dtype: torch.dtype, threads: int, size: int = 1536) -> float:
    """GFLOP/s of a matrix product, an upper limit for convolutions."""
    torch.set_num_threads(threads)
    a, b = (torch.rand((size, size)).to(dtype) for _ in range(2))
    best = float("inf")
    for _ in range(4):
        start = time.perf_counter()
        torch.mm(a, b)
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best / 1e9


def table(result: Mapping[str, Any]) -> str:
    """The result as a Markdown table, and the machine under it."""
    lines = ["| stage | way | median s | times plain | aim | CPU s | peak MiB |", "|---|---|---|---|---|---|---|"]
    for name, stage in result["stages"].items():
        for way, of in stage.get("ways", {}).items():
            aim = f"{stage['reach']:g}" if stage["reach"] and way == PRODUCT else ""
            cpu = statistics.median(of["cpu_seconds"])
            title = f"{stage['title']} ({stage['roi']}^3)"
            cells = [f"{of['median_s']:.3f}", f"{of['times_plain']:.1f}", aim, f"{cpu:.2f}", f"{of['peak_mib']:.0f}"]
            lines.append(f"| {title} | {way} | " + " | ".join(cells) + " |")
        for key, value in stage.get("trace", {}).items():
            lines.append(f"| {name} | {key} | {value:.3f} | | | | |")
    told = ", ".join(f"{key} {value}" for key, value in result["machine"].items())
    return "\n".join([*lines, "", told])


if __name__ == "__main__":
    run_tool(benchmark, OSError)
