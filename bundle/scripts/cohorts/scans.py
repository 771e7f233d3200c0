"""Scans and masks of each patient in a HECKTOR folder, in any layout that HECKTOR has used; patient ids."""

from __future__ import annotations

import os
import re
import stat
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

UNNAMED = "unnamed"
"""Name of a patient whose id is empty."""

SYSTEM_FOLDERS = frozenset(("lost+found", "System Volume Information", "$RECYCLE.BIN", "__MACOSX"))
"""Folders that operating systems create on every disk."""

_FORMATS = ".nii, .nii.gz, .mha, .mhd, .nrrd"
_NO_NAME = "not read, since neither CT, PET nor mask by its name"
_MAX_FAULTS = 20
_SPACES = r"[-_\s\u2010-\u2015\u2212]+"
_CONTROLS = ("Cc", "Cf", "Cn", "Co", "Cs", "Zl", "Zp")
_FORMULA = re.compile(r"[=@\t\r\uff1d\uff0b\uff0d\uff20]|[+-](?![\d.,]+$)")  # a signed number is not a formula
_SUFFIX = r"\.(?:nii|nii\.gz|mha|mhd|nrrd)"
_FILE = re.compile(r"\.(nii|gz|mha|mhd|nrrd|csv|json|tsv|xlsx?|txt|pdf)", re.IGNORECASE)
_SCAN_FILE = re.compile(rf"(?P<id>.+?)__(?P<kind>CT|PT|PET){_SUFFIX}", re.IGNORECASE | re.DOTALL)
_OTHER_FORMAT = re.compile(r"(?P<id>.+?)__(?P<kind>CT|PT|PET)\..+", re.IGNORECASE | re.DOTALL)
_OTHER_NAME = re.compile(rf"(?P<id>.+?)__(?!(CTPlanning|RTDOSE|Dose)\.)[^.]*{_SUFFIX}", re.IGNORECASE | re.DOTALL)
_MASK_FILE = re.compile(rf"(?P<id>(?:(?!__).)+){_SUFFIX}", re.IGNORECASE | re.DOTALL)
_PATIENT_FOLDER = re.compile(r"[A-Za-z]{2,}[-_]\d+")
CONTAINER = re.compile(r"images|labels|(images|labels)t[rs]|task[ _-]*\d+", re.IGNORECASE)
"""Names of folders that hold patients."""


class CohortError(ValueError):
    """A cohort that cannot be used; the message lists every fault, with file and row."""


@dataclass(frozen=True)
class Scans:
    """Files of one patient; None where there is none."""

    patient_id: str  # the patient's id as the files spell it
    folder: Path  # folder where the files lie
    ct: Path | None = None  # CT file
    pet: Path | None = None  # PET file
    mask: Path | None = None  # tumour mask
    problem: str = ""  # which of them cannot be read, "" where all can
    # "ct", "pet" or "mask" -> the files named as it; the attribute is None then
    contradictions: Mapping[str, str] = field(default_factory=dict)
    unlike_a_patient: bool = False  # a folder without files of a patient, whose name is unlike those of the patients

    def contradiction(self, *kinds: str) -> str:
        """The contradictory files of these kinds, "" where there are none."""
        return "; ".join(dict.fromkeys(text for kind, text in self.contradictions.items() if kind in kinds))


@dataclass
class Remarks:
    """Notes on the files found, grouped by title."""

    notes: dict[str, list[str]] = field(default_factory=dict)

    def note(self, title: str, item: str) -> None:
        """Add an item to the note called ``title``."""
        self.notes.setdefault(title, []).append(item)


def patient_key(patient_id: str) -> str:
    """One key for all spellings of a patient's id: upper case, every dash and space a hyphen, Unicode form NFKC.

    NFKC has one character for a letter with its accent, and for a digit of any width.

    Example:
        >>> {patient_key(spelling) for spelling in ("CHUM-001", "CHUM_001", " chum-001 ", "CHUM\u2013001")}
        {'CHUM-001'}
        >>> patient_key("Mu\u0308ller") == patient_key("M\u00fcller"), patient_key("CHUM-\uff10\uff11")
        (True, 'CHUM-01')
    """
    text = _visible(patient_id)
    text = text.removeprefix("'") if _FORMULA.match(text.removeprefix("'")) else text
    return unicodedata.normalize("NFKC", re.sub(_SPACES, "-", unicodedata.normalize("NFKC", text)).upper())


def shared_patients(patients: Iterable[str], others: Iterable[str]) -> list[str]:
    """The patients, sorted, who are also among the others, whatever the spelling of their ids.

    Example:
        >>> shared_patients(["CHUM_001", "CHUM-002"], ["chum-001"])
        ['CHUM_001']
    """
    known = {patient_key(patient) for patient in others}
    return sorted({patient for patient in patients if patient_key(patient) in known})


def clean_id(patient_id: str) -> str:
    r"""A patient's id for output: as written, but safe in a table and a log.

    Unicode is composed (NFC), characters without width are removed, control characters become escapes such as ``\n``.
    What a spreadsheet would run as a formula gets an apostrophe before it. An empty id becomes ``unnamed``.

    Example:
        >>> clean_id(" CHUM 001 "), clean_id("a\nb"), clean_id("=1+1"), clean_id("-1"), clean_id("")
        ('CHUM 001', 'a\\nb', "'=1+1", '-1', 'unnamed')
    """
    return without_formula(printable(_visible(patient_id))) or UNNAMED


def printable(text: str, longest: int | None = None) -> str:
    """The text with escapes for control characters, cut to ``longest`` characters."""
    shown = "".join(
        sign.encode("unicode_escape").decode() if unicodedata.category(sign) in _CONTROLS else sign for sign in text
    )
    return shown if longest is None or len(shown) <= longest else f"{shown[:longest]}..."


def without_formula(text: str) -> str:
    """The text with an apostrophe before it where a spreadsheet would run it as a formula."""
    return f"'{text}" if _FORMULA.match(text) else text


def _visible(text: str) -> str:
    """The text in form NFC, without characters of no width, stripped."""
    composed = unicodedata.normalize("NFC", text)
    return "".join(sign for sign in composed if unicodedata.category(sign) != "Cf").strip()


def find_scans(dataset_dir: str | Path, without: Sequence[Path] = ()) -> tuple[dict[str, Scans], list[str]]:
    """Files of every patient in a folder, in any layout that HECKTOR has used. Folders in ``without`` are ignored.

    The folder holds patient folders (``<PatientID>/<PatientID>__CT.nii.gz``, ``__PT.nii.gz``, mask
    ``<PatientID>.nii.gz``), or the files themselves, or is a single patient's folder; or it has these in
    ``images/``, ``Task N/``, ``imagesTr/`` + ``labelsTr/``. Planning CT and dose files are ignored. ``.nii``, ``.mha``,
    ``.mhd`` and ``.nrrd`` are read as well.

    A folder without scans is a patient, too; ``unlike_a_patient`` where its name is not made like those of the others.

    Links are followed. A broken link and a patient's folder that cannot be read are that patient's ``problem``. Two
    files of one folder named as the same scan, two folders of one patient, and a file in another patient's folder are
    that patient's ``contradictions``. Other patients are not affected.

    Returns:
        Scans by patient key, sorted, and notes on what was ambiguous. A patient found in several places is one
        entry; a place with CT, PET and mask takes precedence.

    Raises:
        CohortError: the folder does not exist, or it or a folder of patients in it cannot be read.
    """
    root = Path(dataset_dir).expanduser()
    if not root.is_dir():
        raise CohortError(f"dataset_dir {root} {'is a file, not a folder' if root.exists() else 'does not exist'}")
    found: dict[str, list[Scans]] = {}
    remarks = Remarks()
    place = root
    try:
        below = containers(root)
        for place in [root, *below]:
            _find_below(place, found, remarks, [*below, *without])
    except OSError as error:
        raise CohortError(f"{place} cannot be read ({error.strerror})") from error
    scans = {key: _merge_scans(found[key], remarks) for key in sorted(found)}
    return scans, [printable(f"{title}: {some(items)}") for title, items in remarks.notes.items()]


def _find_below(container: Path, found: dict[str, list[Scans]], remarks: Remarks, others: Sequence[Path]) -> None:
    """Add the patients of one folder of patients; ``others`` are none of a patient."""
    groups = _group_files(container, remarks, container.name.lower().startswith("labels"))
    folders = _patient_folders(container, remarks, others)
    for key in {*groups, *folders}:
        found.setdefault(key, []).extend(scans for scans in (groups.get(key), folders.get(key)) if scans)


def _group_files(folder: Path, remarks: Remarks, masks_only: bool = False) -> dict[str, Scans]:
    """The files of one folder by patient; files with other names are ignored."""
    groups: dict[str, dict[str, Path]] = {}
    names: dict[str, str] = {}
    lost: dict[str, list[str]] = {}
    clashes: dict[str, dict[str, str]] = {}
    unread: list[tuple[Path, re.Match[str]]] = []
    for path in sorted(entry for entry in folder.iterdir() if not entry.name.startswith(".")):
        scan, mask = _SCAN_FILE.fullmatch(path.name), _MASK_FILE.fullmatch(path.name)
        match = mask if masks_only else scan or mask
        if path.is_dir():
            continue
        if match is None:
            if not masks_only and (other_format := _OTHER_FORMAT.fullmatch(path.name)):
                unread.append((path, other_format))
            elif _OTHER_NAME.fullmatch(path.name):
                remarks.note(_NO_NAME, str(path))
            continue
        kind = "mask" if match is mask else _kind(match)
        key = patient_key(match["id"])
        what = no_file(path)
        if what and kind == "mask":
            remarks.note(what, str(path))
            continue
        other = groups.setdefault(key, {}).get(kind)
        names.setdefault(key, match["id"])
        if what:
            lost.setdefault(key, []).append(f"{path} is {what}")
            continue
        if other is not None and other.name.removesuffix(".gz") != path.name.removesuffix(".gz"):
            clashes.setdefault(key, {})[kind] = f"{other} and {path.name} are both the {kind} of {key}"
        elif other is not None:
            remarks.note("the .nii.gz is used where a .nii of the same name exists", str(path))
        groups[key][kind] = path
    for path, match in unread:
        key = patient_key(match["id"])
        names.setdefault(key, match["id"])
        if _kind(match) not in groups.setdefault(key, {}):
            lost.setdefault(key, []).append(f"{path} is in no format that is read ({_FORMATS})")
    patients = {}
    for key, files in groups.items():
        problem = "; ".join(lost.get(key, []))
        scans = Scans(names[key], folder, files.get("ct"), files.get("pet"), files.get("mask"), problem)
        patients[key] = without(scans, clashes.get(key, {}))
    return patients


def _kind(match: re.Match[str]) -> str:
    return "ct" if match["kind"].lower() == "ct" else "pet"


def without(scans: Scans, contradictions: Mapping[str, str]) -> Scans:
    """The scans without those that contradict each other."""
    dropped: dict[str, Any] = dict.fromkeys(contradictions)
    return replace(scans, contradictions={**scans.contradictions, **contradictions}, **dropped)


def no_file(path: Path) -> str:
    """What a path is if it is not a file or a link to one, "" otherwise. Nothing is opened, since a pipe could block.

    Raises:
        OSError: it does not exist.
    """
    if leads_nowhere(path):
        return "a broken link"
    mode = path.stat().st_mode
    kinds = ((stat.S_ISREG, ""), (stat.S_ISDIR, "a folder, not a file"), (stat.S_ISFIFO, "a pipe, not a file"))
    return next((what for is_kind, what in kinds if is_kind(mode)), "a device or socket, not a file")


def leads_nowhere(path: Path) -> bool:
    """Whether a path is a broken link, or a link to itself."""
    return path.is_symlink() and not path.exists()


def _patient_folders(container: Path, remarks: Remarks, others: Sequence[Path]) -> dict[str, Scans]:
    """Patients with a folder of their own in ``container``, and those whose scans are in another patient's folder."""
    patients: dict[str, Scans] = {}
    misplaced: dict[str, Scans] = {}
    contents = _contents([folder for folder in container.iterdir() if folder not in others], remarks, patients)
    shapes = {_shape(folder.name) for folder, groups in contents.items() if patient_key(folder.name) in groups}
    shapes = {shape for shape in shapes if "0" in shape}  # names of letters alone have nothing in common
    for folder, groups in contents.items():
        key = patient_key(folder.name)
        scans = groups.pop(key, None)
        strangers = [str(path) for other in groups.values() for path in (other.ct, other.pet, other.mask) if path]
        if scans is None and not _PATIENT_FOLDER.fullmatch(folder.name) and _shape(folder.name) not in shapes:
            if strangers:
                title = "not read, since no file is named after its folder, as <PatientID>/<PatientID>__CT.nii.gz"
                remarks.note(title, str(folder))
            elif any(_SCAN_FILE.fullmatch(path.name) for path in folder.glob("*/*")):
                title = "not read, since patients are searched in the folder itself, images/ and Task N/ only"
                remarks.note(title, str(folder))
            else:
                patients.setdefault(key, Scans(folder.name, folder, unlike_a_patient=True))
            continue
        scans = replace(scans or Scans(folder.name, folder), patient_id=folder.name)
        owners = {name: other for name, other in groups.items() if other.ct or other.pet or other.contradictions}
        if owners:
            fault = f"{folder} holds scans named for another patient: {some(strangers)}"
            scans = without(scans, dict.fromkeys(("ct", "pet"), fault))
            misplaced |= {name: Scans(other.patient_id, folder, problem=fault) for name, other in owners.items()}
        elif strangers:
            remarks.note(_NO_NAME, some(strangers))
        if key in patients:
            fault = f"{patients[key].folder} and {folder.name} are folders of the same patient"
            scans = without(scans, dict.fromkeys(("ct", "pet", "mask"), fault))
        patients[key] = scans
    return misplaced | patients


def _contents(entries: Iterable[Path], remarks: Remarks, lost: dict[str, Scans]) -> dict[Path, dict[str, Scans]]:
    """The files of each folder by patient; folders that cannot be read, and broken links, are added to ``lost``."""
    contents = {}
    for folder in sorted(entries):
        if folder.name.startswith(".") or folder.name in SYSTEM_FOLDERS:
            continue
        if leads_nowhere(folder) and not _FILE.fullmatch(folder.suffix):
            lost[patient_key(folder.name)] = Scans(folder.name, folder, problem=f"{folder} is a broken link")
        if not folder.is_dir():
            continue
        try:
            contents[folder] = _group_files(folder, remarks)
        except OSError as error:
            problem = f"{folder} cannot be read ({error.strerror})"
            lost[patient_key(folder.name)] = Scans(folder.name, folder, problem=problem)
    return contents


def _shape(name: str) -> str:
    """What names that are made alike have in common: letters and digits in a row are one character each."""
    return re.sub(r"\d+", "0", re.sub(r"[^\W\d_]+", "a", name))


def first_files(folder: Path, number: int = 1) -> list[str]:
    """The first files of a folder, at any depth, as paths in it; links to folders are not followed."""
    names: list[str] = []
    for place, folders, files in os.walk(folder):
        folders.sort()
        names += [str(Path(place, name).relative_to(folder)) for name in sorted(files)]
        if len(names) >= number:
            break
    return names[:number]


def _merge_scans(places: list[Scans], remarks: Remarks) -> Scans:
    """One entry for a patient found in several places; the scans of one place are kept together."""
    best = max(places, key=lambda scans: (bool(scans.ct and scans.pet), bool(scans.ct or scans.pet), bool(scans.mask)))
    ct, pet, mask = best.ct, best.pet, best.mask
    for other in places:
        ct, pet, mask = ct or other.ct, pet or other.pet, mask or other.mask
        for used, unused in ((ct, other.ct), (pet, other.pet), (mask, other.mask)):
            if used and unused and used.stat().st_size != unused.stat().st_size:
                remarks.note("not used, since another folder has this scan of the patient, which differs", str(unused))
    problem = "; ".join(dict.fromkeys(place.problem for place in places if place.problem))
    if problem and ct and pet:
        remarks.note("not used, since another folder has this patient's scans", problem)
    unlike = all(place.unlike_a_patient for place in places)
    merged = Scans(best.patient_id, best.folder, ct, pet, mask, "" if ct and pet else problem, unlike_a_patient=unlike)
    return without(merged, {kind: text for place in places for kind, text in place.contradictions.items()})


def containers(root: Path) -> list[Path]:
    """Folders in ``root`` that hold patients, by their names."""
    return sorted(entry for entry in root.iterdir() if entry.is_dir() and CONTAINER.fullmatch(entry.name))


def list_faults(title: str, faults: Sequence[str]) -> str:
    """A title and the first faults."""
    shown = "\n".join(f"  {fault}" for fault in faults[:_MAX_FAULTS])
    more = f"\n  ... and {len(faults) - _MAX_FAULTS} more" if len(faults) > _MAX_FAULTS else ""
    return f"{title} ({len(faults)} {'fault' if len(faults) == 1 else 'faults'}):\n{shown}{more}"


def some(names: Sequence[str], shown: int = 5) -> str:
    """The first names and the number of further ones.

    Example:
        >>> some(["a", "b", "c"], shown=2)
        'a, b, and 1 more'
    """
    return ", ".join(names[:shown]) + (f", and {len(names) - shown} more" if len(names) > shown else "")


def counted(number: int, name: str) -> str:
    """A number with what it counts, in the plural unless it is one.

    Example:
        >>> counted(1, "patient"), counted(2, "patient"), counted(0, "file")
        ('1 patient', '2 patients', '0 files')
    """
    return f"{number} {name}{'' if number == 1 else 's'}"
