"""Run the tests of the bundle in MONAI Label in an environment of its own: ``python scripts/check_label.py``.

The environment is that of ``serve_label.py``, made where it is not there yet (about 2.5 GB, some minutes). Ends with 0
when the tests pass, with 1 when one fails, and with 77 when the environment cannot be made: then nothing was tested,
and the last lines say why.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from command_line import run_tool
from serve_label import ENVIRONMENT, ROOT, LabelEnvironmentError, make_environment

SKIPPED = 77  # as test runners understand it


def check_label(environment: str = str(ENVIRONMENT)) -> None:
    """Make the environment and run ``tests/test_label.py`` in it.

    Args:
        environment: folder of the virtual environment.
    """
    try:
        python = make_environment(Path(environment).expanduser().resolve())
    except LabelEnvironmentError as error:
        print(f"label: SKIPPED, not tested: MONAI Label's environment cannot be made: {error}", flush=True)
        raise SystemExit(SKIPPED) from None
    # Other packages' warnings are no errors there, and their modules hold no doctests of ours.
    options = ["-q", "-rs", "-o", "addopts=", "-o", "filterwarnings=default", "-p", "no:cacheprovider"]
    command = [str(python), "-m", "pytest", *options, "tests/test_label.py"]
    # One thread, as run_checks.py has it; in this environment nothing is skipped for want of MONAI Label; and
    # scripts/predict.py runs in the environment of this program.
    variables = {**os.environ, "OMP_NUM_THREADS": "1", "LABEL_ENVIRONMENT": "1", "MAIN_PYTHON": sys.executable}
    raise SystemExit(1 if subprocess.run(command, cwd=ROOT, env=variables, check=False).returncode else 0)


if __name__ == "__main__":
    run_tool(check_label, OSError)
