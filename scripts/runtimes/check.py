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
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import NoReturn

from command_line import ROOT

from runtimes.environments import OwnEnvironmentError, pip_install, run_step
from runtimes.federated_run import ENVIRONMENT as FEDERATED_ENVIRONMENT
from runtimes.federated_run import make_federated_environment
from runtimes.label_environment import ENVIRONMENT as LABEL_ENVIRONMENT
from runtimes.label_environment import make_label_environment

APP = ROOT / "scripts" / "runtimes" / "deploy_app"
SKIPPED = 77  # as test runners understand it
STACK_BYTES = 32 * 2**20  # what MONAI Deploy's engine asks for


def check_environment(runtime: str, folder: str = "") -> NoReturn:
    """Run the tests of a program in its own environment, where nothing is skipped for want of it.

    Args:
        runtime: ``label`` (about 2.5 GB), ``deploy`` (about 3 GB) or ``federated`` (about 80 MB).
        folder: of the environment; by default the program's own, such as that of ``serve.py label``.
    """
    title, place, make, options, variables = OWN[runtime]
    try:
        python = make(Path(folder or place).expanduser().resolve())
    except OwnEnvironmentError as error:
        print(f"{runtime}: SKIPPED, not tested: {title}'s environment cannot be made: {error}", flush=True)
        raise SystemExit(SKIPPED) from None
    if runtime == "deploy":
        _, hard = resource.getrlimit(resource.RLIMIT_STACK)
        if hard == resource.RLIM_INFINITY or hard >= STACK_BYTES:
            resource.setrlimit(resource.RLIMIT_STACK, (STACK_BYTES, hard))
    _run_tests(python, options, f"tests/test_{runtime}.py", {f"{runtime.upper()}_ENVIRONMENT": "1", **variables})


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


def make_deploy_environment(folder: Path) -> Path:
    """The Python of the environment, which is created if it is missing or of other versions."""
    lists = [APP / "requirements.txt", ROOT / "requirements.txt", ROOT / "tests" / "requirements.txt"]
    wanted = hashlib.sha256(b"".join(path.read_bytes() for path in lists)).hexdigest()
    python, stamp = folder / "bin" / "python", folder / "requirements.sha256"
    if stamp.is_file() and stamp.read_text() == wanted and python.is_file():
        return python
    print(f"deploy: making the environment {folder}", flush=True)
    run_step([sys.executable, "-m", "venv", str(folder)])
    limits = [word for path in lists[1:] for word in ("-c", str(path))]
    pip_install(python, "-r", str(lists[0]), "pytest", "fire", *limits)
    stamp.write_text(wanted)
    return python


# Program -> its name, its environment and how this is made, options of pytest, further variables. In MONAI Label's,
# warnings of other packages are no errors and modules hold no doctests of ours; predict.py runs in this program's.
OWN: dict[str, tuple[str, Path, Callable[[Path], Path], list[str], dict[str, str]]] = {
    "label": (
        *("MONAI Label", LABEL_ENVIRONMENT, make_label_environment),
        *(["-q", "-o", "addopts=", "-o", "filterwarnings=default"], {"MAIN_PYTHON": sys.executable}),
    ),
    "deploy": ("MONAI Deploy", ROOT / ".deploy_env", make_deploy_environment, [], {}),
    "federated": ("NVIDIA FLARE", FEDERATED_ENVIRONMENT, make_federated_environment, [], {}),
}


def _run_tests(python: Path, options: list[str], file: str, variables: dict[str, str]) -> NoReturn:
    command = [str(python), "-m", "pytest", "-rs", *options, "-p", "no:cacheprovider", file]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **variables}  # one thread, as run_checks.py has it
    raise SystemExit(1 if subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode else 0)
