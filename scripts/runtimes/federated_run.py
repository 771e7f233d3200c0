"""Run a federated training on this machine, with NVIDIA FLARE's simulator: ``python scripts/runtimes federated_run``.

A process for each centre and one for the server exchange messages as they would between hospitals. NVIDIA FLARE is in a
Python environment of its own, which is made on first use beside the packages of this one.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

from command_line import ROOT, UsageError, run_tool

from runtimes.environments import OwnEnvironmentError, make_environment, packages_of, pip_install
from runtimes.federated_job import CLIENT, META
from scripts.cohorts.files import written_whole
from scripts.model.ensemble import CheckpointError, saved_provenance
from scripts.runtimes.federated import CENTRE_LOG, REASON

ENVIRONMENT = ROOT / ".federated_env"
REQUIREMENTS = ROOT / "requirements-federated.txt"
SIMULATOR = "nvflare.private.fed.app.simulator.simulator"
RUN = Path("server", "simulate_job")  # of the server, in the simulator's workspace


class FederatedRunError(RuntimeError):
    """The training ended early; the message says why."""


def federated_run(job: str, out: str, threads: int = 0, env: str = "") -> None:
    """Train federated with the clients of a job folder, and write ``model.pt`` and ``history.json``.

    Args:
        job: folder of ``federated_job``.
        out: folder for the results; NVIDIA FLARE's files are in ``workspace`` there, with the folder of each centre.
        threads: centres that train at the same time; all by default.
        env: folder of NVIDIA FLARE's environment; ``.federated_env`` beside this project by default.
    """
    folder, results = Path(job).expanduser().resolve(), Path(out).expanduser().resolve()
    if CLIENT not in deploy_map(folder):
        raise UsageError(f"{folder} is no whole job folder: make one with python scripts/runtimes federated_job")
    python = make_federated_environment(Path(env or ENVIRONMENT).expanduser().resolve())
    simulate(python, folder, results, threads)
    print(f"{results / 'model.pt'}: {saved_provenance(results / 'model.pt')['trained_on']}")


def simulate(python: Path, job: Path, results: Path, threads: int = 0) -> None:
    """Run NVIDIA FLARE's simulator and copy ``model.pt`` and ``history.json`` to the results.

    The last complete round is copied, too, where the simulator is stopped or fails, or was killed in an earlier run.
    """
    names = deploy_map(job)[CLIENT]
    workspace = results / "workspace"
    if history := copy_results(workspace, results):
        print(
            f"{results / 'model.pt'}, of an earlier run, has its rounds up to {history[-1]['round']}", file=sys.stderr
        )
    shutil.rmtree(workspace, ignore_errors=True)
    workspace.mkdir(parents=True)
    command = [str(python), "-m", SIMULATOR, str(job), "-w", str(workspace), "-c", ",".join(names)]
    environment = {**os.environ}
    environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // len(names))))
    command += ["-t", str(threads or len(names))]
    try:
        code = subprocess.run(command, cwd=workspace, env=environment, check=False).returncode
    finally:
        history = copy_results(workspace, results)
    if code or not history or history[-1]["round"] != "final":
        last = history[-1]["round"] if history else 0
        kept = f"; {results / 'model.pt'} is of round {last}, federated_job --start continues from it" if last else ""
        failed = "".join(f"; {name}: {why}" for name in names if (why := reason_of(workspace, name)))
        what = f"the training ended early (exit code {code}){failed}{kept}"
        raise FederatedRunError(f"{what}; see the log above and {workspace}")


def reason_of(workspace: Path, name: str) -> str:
    """Why the last task of a centre failed, by its log; "" where none did."""
    log = workspace / name / RUN.name / f"app_{name}" / "output" / CENTRE_LOG
    text = log.read_text(encoding="utf-8", errors="replace") if log.is_file() else ""
    return next((line.partition(REASON)[2] for line in reversed(text.splitlines()) if f": {REASON}" in line), "")


def deploy_map(job: Path) -> dict[str, list[str]]:
    """The names of the clients in a job folder; empty where it is none, or was not written to its end."""
    try:
        return json.loads((job / META).read_text(encoding="utf-8")).get("deploy_map", {})
    except (OSError, ValueError, AttributeError):
        return {}


def copy_results(workspace: Path, results: Path) -> list[dict[str, Any]]:
    """Copy ``model.pt`` and ``history.json`` of the server to the results; gives the entries of the history."""
    written = workspace / RUN / "history.json"
    if not written.is_file():
        return []
    for name in ("model.pt", "history.json"):
        with written_whole(results / name) as partial:
            shutil.copyfile(workspace / RUN / name, partial)
    return json.loads(written.read_text(encoding="utf-8"))


def make_federated_environment(place: Path) -> Path:
    """The Python of NVIDIA FLARE's environment, as :func:`.make_environment` makes it.

    It sees the packages of this Python, so that only what they lack is installed (some 80 MB).
    """
    packages = sysconfig.get_path("purelib")

    def install(python: Path) -> None:
        (packages_of(python) / "project.pth").write_text(f"{packages}\n")
        pip_install(python, "-r", str(REQUIREMENTS))

    contents = f"{packages}\n{REQUIREMENTS.read_text()}"
    return make_environment(place, "NVIDIA FLARE (a minute, about 80 MB)", contents, install)


if __name__ == "__main__":
    run_tool(federated_run, FederatedRunError, OwnEnvironmentError, CheckpointError, OSError)
