"""Atomic writing of files, and file names in configs."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import re
import shutil
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from itertools import count
from pathlib import Path

FULL_BYTES = 2**16  # with less free space, the disk is full: some writers fail without a reason


class WriteError(OSError):
    """A file cannot be written; the message names it and says why."""


@contextmanager
def written_whole(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary file of the same suffix beside ``path``, which is renamed to ``path`` when the block succeeds.

    Missing folders are created. If the block raises, ``path`` is unchanged and the temporary file is removed. Temporary
    files of ``path`` left by a killed process are removed.

    Raises:
        WriteError: the disk is full, the folder is read-only, or ``path`` is a folder.
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
        with contextlib.suppress(OSError):  # the cause has been raised already
            partial.unlink(missing_ok=True)


def require_writable(folder: str | os.PathLike[str]) -> None:
    """Create a folder for results where it does not exist, and check that files can be written to it."""
    folder = Path(folder)
    if not folder.is_dir() and (folder.exists() or folder.is_symlink()):
        what = "it is a file, not a folder" if folder.exists() else "it is a broken link"
        raise WriteError(f"cannot write to {folder}: {what}")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"0")
    except OSError as error:
        raise WriteError(f"cannot write to {folder}: {_words(error)}") from error


def _why_unwritten(error: Exception, target: Path) -> str:
    """Why a file could not be written; "" where the error has another cause."""
    if isinstance(error, WriteError):
        return ""
    if isinstance(error, OSError) and error.errno is not None:
        # the error may be about a file that the writer reads; an error of an open file has no filename
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


def _remove_leftovers(target: Path) -> None:
    """Remove temporary files of ``target`` whose process has ended."""
    name = re.compile(rf"\.(\d+)\.{re.escape(target.name)}")
    for file in target.parent.iterdir():
        found = name.fullmatch(file.name)
        if found is not None and not _runs(int(found[1])):
            file.unlink(missing_ok=True)


def _runs(pid: int) -> bool:
    """Whether a process with this id exists; True where the system cannot tell."""
    if os.name != "posix":
        return True
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # of another user
        return True
    return True


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write ``text`` to ``path`` atomically."""
    with written_whole(path) as partial:
        partial.write_text(text, encoding="utf-8")


def damaged_part(path: str | os.PathLike[str]) -> str:
    """The first part of a file of ``torch.save`` that has another checksum than the one stored with it; "" if none.

    ``torch.load`` compares none, so that it reads a flipped bit without a word.

    Raises:
        zipfile.BadZipFile: the file is cut off or something else.
    """
    with zipfile.ZipFile(path) as archive:
        return archive.testzip() or ""


def sha256_of(path: str | os.PathLike[str]) -> str:
    """SHA-256 of a file."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def in_config(text: str) -> str:
    r"""Escape a text so that MONAI's config parser takes it literally.

    The parser replaces ``#``, its separator of ids, by ``::``, and reads a leading ``$``, ``@`` or ``%`` as expression,
    reference or macro. A text with such a character becomes an expression that is one quoted literal.

    Example:
        >>> in_config("/data/new"), in_config("/data/#2")
        ('/data/new', "$'/data/\\x232'")
    """
    if not set("#@%$") & set(text):
        return text
    return "$" + "".join(f"\\x{ord(letter):02x}" if letter in "#@%" else letter for letter in repr(text))


def dated_name(path: str | os.PathLike[str]) -> Path:
    """An unused name for a backup of ``path`` in its folder: ``model_before_<time>.pt``, numbered within a second."""
    target = Path(path)
    stem = f"{target.stem}_before_{datetime.now():%Y%m%d_%H%M%S}"
    names = (target.with_name(f"{stem}{f'_{number}' if number else ''}{target.suffix}") for number in count())
    return next(name for name in names if not name.exists())
