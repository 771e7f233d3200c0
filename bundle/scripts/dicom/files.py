"""What lies below a folder: files, links followed, and what cannot be read; told so that nothing is left out unseen."""

from __future__ import annotations

import errno
import os
import re
import stat
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from scripts.cohorts.scans import SYSTEM_FOLDERS
from scripts.dicom.tags import needed_module, text_of

if TYPE_CHECKING:
    from pydicom import Dataset

CONSTANT_TAGS = (
    *("SOPClassUID", "Modality", "StudyDate", "StudyTime", "AccessionNumber", "PatientID", "StudyInstanceUID"),
    "SeriesInstanceUID",
)
"""What is the same in all files of a series, in the order of a file (PS3.3, Patient to General Series Module)."""

_OTHER_ENDING = re.compile(
    r"\.(txt|md|csv|tsv|json|xml|html?|pdf|docx?|xlsx?|log|png|jpe?g|gif|bmp|db|ini|inf|exe|dll|zip|gz|tar|7z"
    r"|nii|mha|mhd|nrrd)",
    re.IGNORECASE,
)
DICOM_ENDING = re.compile(r"\.(dcm|dicom|dic|ima)", re.IGNORECASE)
_ARCHIVES = {".zip", ".7z", ".rar", ".tar", ".tgz", ".gz", ".bz2", ".xz"}
_OF_CDS = {"LOCKFILE", "VERSION"}  # of no ending, and often empty, beside the DICOMDIR
_NO_ENDING = re.compile(r"|\.\d+")  # of names that are numbers or UIDs, too
_NUMBERED = re.compile(r"(.*?)(\d+)(\D*)", re.ASCII)
_FEWEST_NAMES = 3  # from which a pattern is read


@dataclass(frozen=True, repr=False)
class Damaged:
    """A file that cannot be read, or a folder, and what its header tells as far as it goes.

    Args:
        path: where it is.
        problem: what is wrong and what to do, for people, without the name.
        told: value by keyword of those of :data:`CONSTANT_TAGS` that its header holds whole and not empty.
    """

    path: Path
    problem: str
    told: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, path: Path, header: Dataset | None, problem: str, cut_off: bool = True) -> Damaged:
        """From the readable part of the header, None where nothing of it can be read."""
        if header is None:
            return cls(path, problem)
        tags = sorted(header.keys())
        whole = tags[:-1] if cut_off else tags  # the last value may be cut off
        tag_of = needed_module("pydicom.datadict").tag_for_keyword
        told = {name: text_of(header, name) for name in CONSTANT_TAGS if tag_of(name) in whole}
        told.setdefault("SOPClassUID", text_of(header.file_meta, "MediaStorageSOPClassUID"))
        return cls(path, problem, {name: value for name, value in told.items() if value})

    def may_belong_to(self, told: Mapping[str, str], folders: Container[Path]) -> bool:
        """Whether it may be one of a series' files: nothing told differs, and it tells the study or lies beside them.

        Args:
            told: the series' values of :data:`CONSTANT_TAGS`.
            folders: where the series' files lie.
        """
        if any(told.get(name, "") != value for name, value in self.told.items()):
            return False
        return "StudyInstanceUID" in self.told or self.path.parent in folders


def describe(damaged: Sequence[Damaged], shown: int = 3) -> list[str]:
    """What is wrong, one line a fault: with the names of the first files that have it, and how many have."""
    alike: dict[str, list[str]] = {}
    for each in damaged:
        alike.setdefault(each.problem, []).append(each.path.name)
    lines = []
    for problem, names in alike.items():
        more = f" and {len(names) - shown} more" if len(names) > shown else ""
        lines.append(f"{', '.join(names[:shown])}{more}: {problem}")
    return lines


@dataclass
class Found:
    """What lies below folders.

    Attributes:
        files: regular files, sorted.
        others: links to nothing whose names say that they are no DICOM, pipes, sockets and the like.
        damaged: other links to nothing, and folders and files that may not be read.
        loops: links to a folder in which they lie, or to themselves, which are not followed.
    """

    files: list[Path] = field(default_factory=list)
    others: list[Path] = field(default_factory=list)
    damaged: list[Damaged] = field(default_factory=list)
    loops: list[Path] = field(default_factory=list)


def walk(*folders: Path, without: Container[Path] = ()) -> Found:
    """All files below folders; links are followed, and a folder that is reached twice is read once.

    A link to a folder above it leads to itself and is not followed.

    Args:
        folders: where to look.
        without: folders below them that are left alone, with all that is in them.
    """
    found, seen = Found(), set()

    def note_folder(error: OSError) -> None:
        place = Path(error.filename)
        found.damaged.append(
            Damaged(place, f"folder that cannot be read ({error.strerror}); give yourself the right to, or remove it")
        )

    for folder in folders:
        for place, names, plain in os.walk(folder, followlinks=True, onerror=note_folder):
            status = Path(place).stat()
            if (status.st_dev, status.st_ino) in seen:
                names.clear()
                continue
            seen.add((status.st_dev, status.st_ino))
            here = Path(place)
            back = [name for name in names if (here / name).is_symlink() and _leads_back(here / name)]
            found.loops += [here / name for name in back]
            names[:] = sorted(
                name for name in set(names) - set(back) if name not in SYSTEM_FOLDERS and here / name not in without
            )
            for name in plain:
                _note_file(here / name, found)
    found.files.sort()
    found.damaged.sort(key=lambda damaged: damaged.path)
    return found


def _leads_back(link: Path) -> bool:
    target, place = link.resolve(), link.parent.resolve()
    return target == place or target in place.parents


def _note_file(path: Path, found: Found) -> None:
    try:
        regular = stat.S_ISREG(path.stat().st_mode)
    except OSError as error:
        if error.errno == errno.ELOOP:
            found.loops.append(path)
        elif is_other(path):
            found.others.append(path)
        elif path.is_symlink():
            problem = "a broken link; restore its target, copy the file itself, or remove the link"
            found.damaged.append(Damaged(path, problem))
        else:
            found.damaged.append(Damaged(path, f"cannot be read ({error.strerror})"))
        return
    (found.files if regular else found.others).append(path)


def is_other(path: Path) -> bool:
    """Whether a name says that a file is no DICOM: by its ending, hidden as those of the system are, or of a CD."""
    return path.name.startswith(".") or path.name.upper() in _OF_CDS or _OTHER_ENDING.fullmatch(path.suffix) is not None


def is_archive(path: Path) -> bool:
    """Whether a file may hold others, by its name; those of images (.nii.gz) are none."""
    return path.suffix.lower() in _ARCHIVES and path.suffixes[-2:-1] != [".nii"]


def ought_to_be_dicom(path: Path) -> str:
    """Why a file that is not DICOM seems to be meant as such, "" where it does not: its name ends so, or it is blank.

    A copy that failed leaves files that are empty or hold zeros alone.
    """
    if is_other(path):
        return ""
    named = DICOM_ENDING.fullmatch(path.suffix) is not None
    if not named and not _NO_ENDING.fullmatch(path.suffix):
        return ""
    size = path.stat().st_size
    with path.open("rb") as file:
        blank = not file.read(4096).strip(b"\0")
    if blank:
        return f"{'holds zeros alone' if size else 'empty'}; copy it again or remove it"
    return "not DICOM, though its name ends so; copy it again or remove it" if named else ""


@dataclass(frozen=True)
class Names:
    """How the files of a series are named in one folder: alike but for their last number.

    Attributes:
        before: what stands before the number.
        after: what stands after it.
        lowest: number.
        highest: number.
        dense: whether at least half of the numbers between are there.
    """

    before: str
    after: str
    lowest: int
    highest: int
    dense: bool

    def like(self, name: str) -> bool:
        """Whether a name is such a name, whatever its number."""
        match = _NUMBERED.fullmatch(name)
        return match is not None and (match[1], match[3]) == (self.before, self.after)

    def near(self, name: str) -> bool:
        """Whether a name is such a name with a number among theirs, or the next."""
        match = _NUMBERED.fullmatch(name)
        return match is not None and self.like(name) and self.lowest - 1 <= int(match[2]) <= self.highest + 1


def names_of(paths: Iterable[Path]) -> dict[Path, Names]:
    """How the files of a series are named, by folder; nothing of folders where they are few or named in other ways."""
    folders: dict[Path, list[str]] = {}
    for path in paths:
        folders.setdefault(path.parent, []).append(path.name)
    named = {}
    for folder, names in folders.items():
        matches = [match for name in names if (match := _NUMBERED.fullmatch(name))]
        frames = {(match[1], match[3]) for match in matches}
        if len(matches) == len(names) >= _FEWEST_NAMES and len(frames) == 1:
            numbers = [int(match[2]) for match in matches]
            low, high = min(numbers), max(numbers)
            named[folder] = Names(*frames.pop(), low, high, 2 * len(numbers) >= high - low + 1)
    return named


def pointed_at(path: Path, series: Sequence[Mapping[Path, Names]]) -> list[int]:
    """Which of several series a file's name points to: those named like it; of several, those whose numbers are near.

    Numbers tell only where those of each series run on. A name that points to none may belong to any.

    Example:
        >>> def files(names, numbers):
        ...     return names_of(Path(names.format(k)) for k in numbers)
        >>> own = [files("P1-CT-{:02d}", range(9)), files("P1-PT-{:02d}", range(9))]
        >>> one = [files("IM{:02d}", range(9)), files("IM{:02d}", range(10, 19)), files("IM{:02d}", range(20, 29))]
        >>> pointed_at(Path("P1-PT-31"), own), pointed_at(Path("IM09"), one), pointed_at(Path("IM14"), one)
        ([1], [0, 1], [1])
        >>> pointed_at(Path("CT"), own), pointed_at(Path("IM99"), one)
        ([0, 1], [0, 1, 2])
    """
    named = [(k, names[path.parent]) for k, names in enumerate(series) if path.parent in names]
    alike = [(k, names) for k, names in named if names.like(path.name)]
    near = [k for k, names in alike if names.near(path.name)] if all(names.dense for _, names in alike) else []
    if len(alike) > 1 and near:
        return near
    return [k for k, _ in alike] or list(range(len(series)))
