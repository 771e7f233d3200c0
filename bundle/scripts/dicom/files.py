"""Files below a folder, with links followed, and files that cannot be read."""

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
"""Tags that are equal in all files of a series, in the order of a file (PS3.3, Patient to General Series Module)."""

_OTHER_ENDING = re.compile(
    r"\.(txt|md|csv|tsv|json|xml|html?|pdf|docx?|xlsx?|log|png|jpe?g|gif|bmp|db|ini|inf|exe|dll|zip|gz|tar|7z"
    r"|nii|mha|mhd|nrrd)",
    re.IGNORECASE,
)
DICOM_ENDING = re.compile(r"\.(dcm|dicom|dic|ima)", re.IGNORECASE)
_ARCHIVES = {".zip", ".7z", ".rar", ".tar", ".tgz", ".gz", ".bz2", ".xz"}
_OF_CDS = {"LOCKFILE", "VERSION"}  # files without suffix next to a DICOMDIR, often empty
_NO_ENDING = re.compile(r"|\.\d+")  # including names that are numbers or UIDs
_NUMBERED = re.compile(r"(.*?)(\d+)(\D*)", re.ASCII)
_FEWEST_NAMES = 3  # to derive a pattern


@dataclass(frozen=True, repr=False)
class Damaged:
    """A file or folder that cannot be read, and the readable part of its header.

    Args:
        path: the file or folder.
        problem: what is wrong and what to do, without the name.
        told: values of :data:`CONSTANT_TAGS` by keyword, those that its header has complete and not empty.
    """

    path: Path
    problem: str
    told: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, path: Path, header: Dataset | None, problem: str, cut_off: bool = True) -> Damaged:
        """From the readable part of the header; None where nothing is readable."""
        if header is None:
            return cls(path, problem)
        tags = sorted(header.keys())
        whole = tags[:-1] if cut_off else tags  # the last value may be truncated
        tag_of = needed_module("pydicom.datadict").tag_for_keyword
        told = {name: text_of(header, name) for name in CONSTANT_TAGS if tag_of(name) in whole}
        told.setdefault("SOPClassUID", text_of(header.file_meta, "MediaStorageSOPClassUID"))
        return cls(path, problem, {name: value for name, value in told.items() if value})

    def may_belong_to(self, told: Mapping[str, str], folders: Container[Path]) -> bool:
        """Whether it may belong to a series: tags do not differ, and it states the study or is in the same folder."""
        if any(told.get(name, "") != value for name, value in self.told.items()):
            return False
        return "StudyInstanceUID" in self.told or self.path.parent in folders


def describe(damaged: Sequence[Damaged], shown: int = 3) -> list[str]:
    """One line per problem, with the names of the first files that have it and the number of further ones."""
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
    """Content of folders."""

    files: list[Path] = field(default_factory=list)  # regular files, sorted
    # broken links with a name of another file type, pipes, sockets and the like
    others: list[Path] = field(default_factory=list)
    # other broken links, and folders and files without read permission
    damaged: list[Damaged] = field(default_factory=list)
    loops: list[Path] = field(default_factory=list)  # links to a parent folder or to themselves, which are not followed


def walk(*folders: Path, without: Container[Path] = ()) -> Found:
    """All files below folders; links are followed, except to a parent folder; each folder is read once.

    Folders in ``without`` are ignored.
    """
    found, seen = Found(), set()

    def note_folder(error: OSError) -> None:
        place = Path(error.filename)
        found.damaged.append(
            Damaged(place, f"folder that cannot be read ({error.strerror}); change its permissions or remove it")
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
    """Whether a file is of another type by its name: by its suffix, hidden, or a system file of a CD."""
    return path.name.startswith(".") or path.name.upper() in _OF_CDS or _OTHER_ENDING.fullmatch(path.suffix) is not None


def is_archive(path: Path) -> bool:
    """Whether a file is an archive by its name; compressed images (.nii.gz) are not."""
    return path.suffix.lower() in _ARCHIVES and path.suffixes[-2:-1] != [".nii"]


def ought_to_be_dicom(path: Path) -> str:
    """Why a file that is not DICOM should be: by its suffix, or since it is empty or only zeros; "" otherwise.

    A failed copy leaves such files.
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
        return f"{'holds only zeros' if size else 'empty'}; copy it again or remove it"
    return "not DICOM despite its suffix; copy it again or remove it" if named else ""


@dataclass(frozen=True)
class Names:
    """The pattern of the file names of a series in one folder: equal except for their last number."""

    before: str  # the text before the number
    after: str  # the text after it
    lowest: int  # lowest number
    highest: int  # highest number
    dense: bool  # whether at least half of the numbers in the range occur

    def like(self, name: str) -> bool:
        """Whether a name matches the pattern, with any number."""
        match = _NUMBERED.fullmatch(name)
        return match is not None and (match[1], match[3]) == (self.before, self.after)

    def near(self, name: str) -> bool:
        """Whether a name matches the pattern, with a number in or next to the range."""
        match = _NUMBERED.fullmatch(name)
        return match is not None and self.like(name) and self.lowest - 1 <= int(match[2]) <= self.highest + 1


def names_of(paths: Iterable[Path]) -> dict[Path, Names]:
    """The name pattern of a series' files, by folder; folders with few files or other names are omitted."""
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
    """The series that a file may belong to by its name: those of the same pattern; of several, those of near numbers.

    Numbers are used only where those of each series are dense. A name of no pattern may belong to any series.

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
