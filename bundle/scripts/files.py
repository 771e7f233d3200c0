"""Files that appear under their name only when they are whole."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def written_whole(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary name beside ``path`` to write to; it takes the name ``path`` when the block ends well.

    Missing folders are made. Whatever goes wrong in the block, ``path`` stays as it was and nothing is left over. A
    temporary file that a killed process left behind is removed by the next write of the same ``path``.

    Args:
        path: the final name; its ending is kept by the temporary one, for writers that choose a format by it.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(target)
    partial = target.with_name(f".{os.getpid()}.{target.name}")
    try:
        yield partial
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)


def _remove_leftovers(target: Path) -> None:
    """Remove the temporary files of ``target`` whose process no longer runs."""
    name = re.compile(rf"\.(\d+)\.{re.escape(target.name)}")
    for file in target.parent.iterdir():
        found = name.fullmatch(file.name)
        if found is not None and not _runs(int(found[1])):
            file.unlink(missing_ok=True)


def _runs(pid: int) -> bool:
    """Whether there is a process of this number; on systems that cannot tell, yes."""
    if os.name != "posix":
        return True
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # somebody else's
        return True
    return True


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write ``text`` to ``path``, whole or not at all."""
    with written_whole(path) as partial:
        partial.write_text(text, encoding="utf-8")
