"""What the model zoo accepts in the directory of a bundle: names of files, the largest size, stray files."""

from __future__ import annotations

from pathlib import Path

METADATA, LICENSE, WEIGHTS, TORCHSCRIPT = "configs/metadata.json", "LICENSE", "models/model.pt", "models/model.ts"
CODE = "scripts"
LARGE_FILES = "large_files.yml"
LARGE_BYTES = 25_000_000  # the zoo accepts no larger file; large_files.yml then gives its address

STRAY_FOLDERS = ("__pycache__", "mlruns", "runs", "wandb")
STRAY_AT_TOP = ("data", "output", "eval")  # written by the bundle's own commands and by the zoo's checks
STRAY_ENDINGS = (".pyc", ".pyo", ".partial", ".orig", ".rej", ".swp", "~")


def stray_reason(path: Path, root: Path) -> str:
    """Why a file does not belong in a bundle; empty for one that does.

    Example:
        >>> stray_reason(Path("b/scripts/__pycache__/keys.cpython-311.pyc"), Path("b"))
        'cache or log'
        >>> stray_reason(Path("b/scripts/keys.py"), Path("b"))
        ''
    """
    parts = path.relative_to(root).parts
    if path.is_symlink():
        return "link"
    if any(part.startswith(".") for part in parts):
        return "hidden"
    if any(part in STRAY_FOLDERS for part in parts[:-1]):
        return "cache or log"
    if len(parts) > 1 and parts[0] in STRAY_AT_TOP:
        return "data or output"
    return "leftover" if path.name.endswith(STRAY_ENDINGS) else ""
