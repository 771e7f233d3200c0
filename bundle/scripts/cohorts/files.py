"""Files that appear under their name only when they are whole, and names of files in configs."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from itertools import count
from pathlib import Path

FULL_BYTES = 2**16  # of a disk that has no more left, a writer that gives no reason failed for that


class WriteError(OSError):
    """A file cannot be written; the message names it and says why."""


@contextmanager
def written_whole(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary name beside ``path`` to write to; it takes the name ``path`` when the block ends well.

    Missing folders are made. Whatever goes wrong in the block, ``path`` stays as it was and nothing is left over. A
    temporary file that a killed process left behind is removed by the next write of the same ``path``.

    Args:
        path: the final name; its ending is kept by the temporary one, for writers that choose a format by it.

    Raises:
        WriteError: a full disk, a folder that is read-only, a name that is taken: whatever the writer raises for it.
    """
    target = Path(path)
    partial = target.with_name(f".{os.getpid()}.{target.name}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(target)
        yield partial
        partial.replace(target)
    except Exception as error:
        why = _why_unwritten(error, target)
        if not why:
            raise
        raise WriteError(f"cannot write {target}: {why}") from error
    finally:
        _remove(partial)


def require_writable(folder: str | os.PathLike[str]) -> None:
    """Make a folder for results if it is not there, and see that files can be written in it.

    Raises:
        WriteError: they cannot.
    """
    folder = Path(folder)
    if not folder.is_dir() and (folder.exists() or folder.is_symlink()):
        what = "it is a file, not a folder" if folder.exists() else "it is a link to what is not there"
        raise WriteError(f"cannot write to {folder}: {what}")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"0")
    except OSError as error:
        raise WriteError(f"cannot write to {folder}: {_words(error)}") from error


def _why_unwritten(error: Exception, target: Path) -> str:
    """What kept a file from being written, in words; nothing where something else went wrong."""
    if isinstance(error, WriteError):
        return ""
    if isinstance(error, OSError) and error.errno is not None:
        # a file elsewhere was read by the writer; a write to an open file has no name
        elsewhere = error.filename is not None and not Path(os.fsdecode(error.filename)).is_relative_to(target.parent)
        made = error.filename is not None and target.is_relative_to(os.fsdecode(error.filename))
        return "" if elsewhere and not made else _words(error)
    try:
        full = shutil.disk_usage(target.parent).free < FULL_BYTES
    except OSError:
        return ""
    return _words(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))) if full else ""


def _words(error: OSError) -> str:
    said = error.strerror or str(error)
    return said[:1].lower() + said[1:]


def _remove(file: Path) -> None:
    """Remove a file if it is there and may be removed: where it may not, the cause has been told already."""
    with contextlib.suppress(OSError):
        file.unlink(missing_ok=True)


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


def dated_name(path: str | os.PathLike[str]) -> Path:
    """A free name beside ``path`` to keep it under before another file takes its place: ``model_before_<time>.pt``.

    Two in one second are told apart by a number at the end.
    """
    target = Path(path)
    stem = f"{target.stem}_before_{datetime.now():%Y%m%d_%H%M%S}"
    names = (target.with_name(f"{stem}{f'_{number}' if number else ''}{target.suffix}") for number in count())
    return next(name for name in names if not name.exists())
