"""Run the tests of the MONAI Deploy application in an environment of its own: ``python scripts/check_deploy.py``.

The environment is made where there is none or its requirements have changed (about 3 GB, some minutes). Ends with 0
when the tests pass, with 1 when one fails, and with 77 when the environment cannot be made: then nothing was tested,
and the last lines say why.
"""

from __future__ import annotations

import hashlib
import os
import resource
import subprocess
import sys
from pathlib import Path

from command_line import run_tool

ROOT = Path(__file__).resolve().parents[1]
APP = ROOT / "scripts" / "deploy_app"
SKIPPED = 77  # as test runners understand it
STACK_BYTES = 32 * 2**20  # what MONAI Deploy's engine asks for


def check_deploy(environment: str = str(ROOT / ".deploy_env")) -> None:
    """Make the environment and run ``tests/test_deploy.py`` in it.

    Args:
        environment: folder of the virtual environment.
    """
    python = make_environment(Path(environment).expanduser().resolve())
    if python is None:
        raise SystemExit(SKIPPED)
    _, hard = resource.getrlimit(resource.RLIMIT_STACK)
    if hard == resource.RLIM_INFINITY or hard >= STACK_BYTES:
        resource.setrlimit(resource.RLIMIT_STACK, (STACK_BYTES, hard))
    command = [str(python), "-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider", "tests/test_deploy.py"]
    # One thread, as run_checks.py has it; and in this environment nothing is skipped for want of MONAI Deploy.
    variables = {**os.environ, "OMP_NUM_THREADS": "1", "DEPLOY_ENVIRONMENT": "1"}
    raise SystemExit(1 if subprocess.run(command, cwd=ROOT, env=variables, check=False).returncode else 0)


def make_environment(folder: Path) -> Path | None:
    """The Python of the environment, which is made where it is not there as it should be.

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


if __name__ == "__main__":
    run_tool(check_deploy, OSError)
