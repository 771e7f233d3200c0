"""The model zoo's style of code and configs."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

# setup.cfg and pyproject.toml of the zoo; its runtests.sh adds --skip-magic-trailing-comma
ZOO_STYLE = """
[tool.black]
line-length = 120
target-version = ["py37", "py38", "py39"]
skip-magic-trailing-comma = true

[tool.isort]
known_first_party = ["models"]
profile = "black"
line_length = 120
"""


class StyleError(ValueError):
    """Files that cannot be formatted; the message has what the formatter said."""


def styled_json(text: str) -> str:
    """A JSON text indented by 4, each entry of a list on a line of its own, without a line end."""
    return json.dumps(json.loads(text), indent=4, ensure_ascii=False)


def style_code(folder: Path) -> None:
    """Format Python files in place with isort and black."""
    with tempfile.TemporaryDirectory() as place:  # away from any other settings
        settings = Path(place) / "pyproject.toml"
        settings.write_text(ZOO_STYLE, encoding="utf-8")
        for tool in (["isort", "--quiet", "--settings-file"], ["black", "--quiet", "--config"]):
            command = [sys.executable, "-m", *tool, str(settings), str(folder.resolve())]
            result = subprocess.run(command, cwd=place, capture_output=True, text=True, check=False)
            if result.returncode:
                raise StyleError(f"{tool[0]}: {(result.stdout + result.stderr).strip().splitlines()[-1]}")
