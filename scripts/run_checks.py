"""Run every check of the project: style, types, tests, bundle metadata. Ends with 1 if any fails.

With ``--runtime label``, ``deploy`` or ``federated`` instead the tests of MONAI Label, MONAI Deploy or NVIDIA FLARE,
which need an environment of their own; with ``--runtime orthanc`` the tests with an Orthanc server; with
``--runtime ray`` those on a Ray cluster.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time

from command_line import ROOT, UsageError, run_tool

OWN_ENVIRONMENT = ("label", "deploy", "federated")
SCHEMA = ROOT.parent / "shared" / "data" / "schema" / "meta_schema_20240725.json"


def run_checks(jobs: int = 2, runtime: str = "", environment: str = "") -> None:
    """Run ruff, mypy, pytest (warnings are errors) and MONAI's metadata check, and print one line for each.

    Args:
        jobs: test processes at once.
        runtime: label, deploy or federated: run the tests of MONAI Label, MONAI Deploy or NVIDIA FLARE and nothing
            else, in a virtual environment that is made the first time (about 3 GB, some minutes; 80 MB for federated).
            orthanc: run those with an Orthanc server, ray: on a Ray cluster of this computer; either has to be
            installed. Exit code 77: it is not, or the environment cannot be made.
        environment: folder of that virtual environment; .label_env, .deploy_env or .federated_env beside this project
            by default.
    """
    if runtime not in ("", *OWN_ENVIRONMENT, "orthanc", "ray"):
        raise UsageError(f"--runtime is label, deploy, federated, orthanc or ray, got {runtime!r}")
    if environment and runtime not in OWN_ENVIRONMENT:
        raise UsageError("--environment needs --runtime label, deploy or federated: which tests run there?")
    if runtime:
        from runtimes import check  # imports the bundle, which the checks below report on even if it is broken

        if runtime == "orthanc":
            check.check_orthanc()
        if runtime == "ray":
            check.check_ray()
        check.check_environment(runtime, environment)
    python = [sys.executable, "-m"]
    checks = {
        "ruff check": [*python, "ruff", "check", "."],
        "ruff format": [*python, "ruff", "format", "--check", "."],
        "mypy": [*python, "mypy"],
        "pytest": [*python, "pytest", "-n", str(jobs), "--dist", "worksteal", "--durations", "10"],
    }
    results = {name: _run(name, command) for name, command in checks.items()}
    results["metadata"] = _check_metadata()
    print("\n" + "\n".join(f"{result:<8} {name}" for name, result in results.items()))
    if "FAILED" in results.values():
        raise SystemExit(1)


def _run(name: str, command: list[str]) -> str:
    print(f"\n== {name}: {' '.join(command[1:])}", flush=True)
    start = time.monotonic()
    # One thread a process: two test processes share two cores.
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    code = subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode
    print(
        f"== {name}: {'passed' if code == 0 else f'failed with {code}'} in {time.monotonic() - start:.0f} s", flush=True
    )
    return "passed" if code == 0 else "FAILED"


def _check_metadata() -> str:
    """``python -m monai.bundle verify_metadata`` against a schema on disk, since it would download one."""
    if not SCHEMA.is_file():
        print(f"\n== metadata: skipped, no schema at {SCHEMA}")
        return "skipped"
    with tempfile.TemporaryDirectory() as folder:
        schema = shutil.copy(SCHEMA, folder)
        metadata = ROOT / "bundle" / "configs" / "metadata.json"
        command = [sys.executable, "-m", "monai.bundle", "verify_metadata"]
        return _run("metadata", [*command, "--meta_file", str(metadata), "--filepath", str(schema)])


if __name__ == "__main__":
    run_tool(run_checks, OSError)
