"""Tests of other programs: ``run_checks.py --runtime label``, ``deploy``, ``federated``, ``orthanc`` or ``ray``.

MONAI Label, MONAI Deploy and NVIDIA FLARE have environments of their own, made where there is none or its requirements
have changed; Orthanc is a program of the system, Ray a package of this program's environment. The program ends with 0
when the tests pass, with 1 when one fails, and with 77 when the environment cannot be made or Orthanc or Ray is not
installed: then nothing was tested, and the last lines say why.
"""

from __future__ import annotations

import hashlib
import os
import resource
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import NoReturn

from command_line import ROOT

from runtimes.environments import OwnEnvironmentError
from runtimes.federated_run import ENVIRONMENT as FEDERATED_ENVIRONMENT
from runtimes.federated_run import make_federated_environment
from runtimes.label_environment import ENVIRONMENT, make_label_environment

APP = ROOT / "scripts" / "runtimes" / "deploy_app"
SKIPPED = 77  # as test runners understand it
STACK_BYTES = 32 * 2**20  # what MONAI Deploy's engine asks for


def check_label(environment: str = "") -> NoReturn:
    """Run ``tests/test_label.py`` in the environment of ``serve.py label`` (about 2.5 GB, some minutes to make).

    Args:
        environment: folder of the virtual environment.
    """
    try:
        python = make_label_environment(Path(environment or ENVIRONMENT).expanduser().resolve())
    except OwnEnvironmentError as error:
        print(f"label: SKIPPED, not tested: MONAI Label's environment cannot be made: {error}", flush=True)
        raise SystemExit(SKIPPED) from None
    # Other packages' warnings are no errors there, and their modules hold no doctests of ours.
    options = ["-o", "addopts=", "-o", "filterwarnings=default"]
    # In this environment nothing is skipped for want of MONAI Label; scripts/predict.py runs in that of this program.
    _run_tests(python, options, "tests/test_label.py", {"LABEL_ENVIRONMENT": "1", "MAIN_PYTHON": sys.executable})


def check_deploy(environment: str = "") -> NoReturn:
    """Run ``tests/test_deploy.py`` in an environment of the application (about 3 GB, some minutes to make).

    Args:
        environment: folder of the virtual environment.
    """
    python = make_deploy_environment(Path(environment or ROOT / ".deploy_env").expanduser().resolve())
    if python is None:
        raise SystemExit(SKIPPED)
    _, hard = resource.getrlimit(resource.RLIMIT_STACK)
    if hard == resource.RLIM_INFINITY or hard >= STACK_BYTES:
        resource.setrlimit(resource.RLIMIT_STACK, (STACK_BYTES, hard))
    # In this environment nothing is skipped for want of MONAI Deploy.
    _run_tests(python, [], "tests/test_deploy.py", {"DEPLOY_ENVIRONMENT": "1"})


def check_federated(environment: str = "") -> NoReturn:
    """Run ``tests/test_federated.py`` in the environment of ``federated_run`` (about 80 MB, a minute to make).

    Args:
        environment: folder of the virtual environment.
    """
    try:
        python = make_federated_environment(Path(environment or FEDERATED_ENVIRONMENT).expanduser().resolve())
    except OwnEnvironmentError as error:
        print(f"federated: SKIPPED, not tested: NVIDIA FLARE's environment cannot be made: {error}", flush=True)
        raise SystemExit(SKIPPED) from None
    # In this environment nothing is skipped for want of NVIDIA FLARE.
    _run_tests(python, [], "tests/test_federated.py", {"FEDERATED_ENVIRONMENT": "1"})


def check_orthanc() -> NoReturn:
    """Run ``tests/test_orthanc.py`` with the Orthanc that is installed, in the environment of this program."""
    lacking = [] if shutil.which("Orthanc") else ["Orthanc and its DICOMweb plugin (Debian: orthanc, orthanc-dicomweb)"]
    lacking += [name for name in ("pynetdicom", "dicomweb_client") if find_spec(name) is None]
    if lacking:
        print(f"orthanc: SKIPPED, not tested: not installed: {', '.join(lacking)}", flush=True)
        raise SystemExit(SKIPPED)
    _run_tests(Path(sys.executable), [], "tests/test_orthanc.py", {"ORTHANC_TESTS": "1"})


def check_ray() -> NoReturn:
    """Run ``tests/test_ray.py`` on a cluster of this computer, in the environment of this program."""
    if find_spec("ray") is None:
        print("ray: SKIPPED, not tested: not installed: pip install -r requirements-ray.txt", flush=True)
        raise SystemExit(SKIPPED)
    _run_tests(Path(sys.executable), [], "tests/test_ray.py", {"RAY_TESTS": "1"})


def make_deploy_environment(folder: Path) -> Path | None:
    """The Python of the environment, which is created if it is missing or of other versions.

    Returns:
        None where it cannot be made; why has been printed.
    """
    lists = [APP / "requirements.txt", ROOT / "requirements.txt", ROOT / "tests" / "requirements.txt"]
    wanted = hashlib.sha256(b"".join(path.read_bytes() for path in lists)).hexdigest()
    python, stamp = folder / "bin" / "python", folder / "requirements.sha256"
    if stamp.is_file() and stamp.read_text() == wanted and python.is_file():
        return python
    print(f"deploy: making the environment {folder}", flush=True)
    limits = [word for path in lists[1:] for word in ("-c", str(path))]
    pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    for command in (
        [sys.executable, "-m", "venv", str(folder)],
        [*pip, "-r", str(lists[0]), "pytest", "fire", *limits],
    ):
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        if result.returncode:
            why = "\n".join((result.stdout + result.stderr).strip().splitlines()[-5:])
            print(f"deploy: SKIPPED, not tested: the environment {folder} cannot be made:\n{why}", flush=True)
            return None
    stamp.write_text(wanted)
    return python


def _run_tests(python: Path, options: list[str], file: str, variables: dict[str, str]) -> NoReturn:
    command = [str(python), "-m", "pytest", "-q", "-rs", *options, "-p", "no:cacheprovider", file]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **variables}  # one thread, as run_checks.py has it
    raise SystemExit(1 if subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode else 0)
