"""Files that appear under their name only when they are whole, and names of files in configs."""

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


def in_config(text: str) -> str:
    r"""How to write a text into a MONAI config so that it means itself.

    MONAI's parser takes ``#`` for its separator of ids and writes ``::`` there, and a leading ``$``, ``@`` or ``%`` for
    an expression, a reference or a macro. Such a text becomes an expression that is one quoted literal.

    Example:
        >>> in_config("/data/new"), in_config("/data/#2")
        ('/data/new', "$'/data/\\x232'")
    """
    if not set("#@%$") & set(text):
        return text
    return "$" + "".join(f"\\x{ord(letter):02x}" if letter in "#@%" else letter for letter in repr(text))
