"""A HECKTOR folder and its CSV files -> a list of cases, with folds and with every exclusion accounted for.

Reading goes in three steps: :func:`find_scans` (files of each patient), :func:`read_table` (rows of a CSV, every
cell parsed by :mod:`scripts.clinical`), and the merge of both into cases. Nothing is dropped silently: what is
not used stands in :attr:`Cohort.exclusions`, what is odd but usable in :attr:`Cohort.notes`, and what is wrong is
raised as a :class:`CohortError` that lists all faults at once.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import logging
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from scripts import clinical, keys
from scripts.clinical import DEFAULT_FEATURES, ClinicalValueError

logger = logging.getLogger(__name__)

CENTRES = {1: "CHUM", 2: "CHUP", 3: "CHUS", 5: "MDA", 6: "HGJ", 7: "HMR", 8: "USZ"}
"""CenterID of HECKTOR 2025 -> name of the hospital."""

Case = dict[str, Any]

RECORD_FILE = "cohort.json"
"""What a made-up cohort says about itself, in its folder."""

_MAX_FAULTS = 20
_ABLATION_HANDS = (0, 1, 0, 0, 1, 0, 0, 1, 0, 2)  # of ten cases 6 for training (0), 3 for validation, 1 for test
_SUFFIX = r"\.(?:nii|nii\.gz|mha|mhd|nrrd)"
_SCAN_FILE = re.compile(rf"(?P<id>.+?)__(?P<kind>CT|PT|PET){_SUFFIX}", re.IGNORECASE)
_MASK_FILE = re.compile(rf"(?P<id>(?:(?!__).)+){_SUFFIX}", re.IGNORECASE)
_CONTAINER = re.compile(r"images|labels|(images|labels)t[rs]|task[ _-]*\d+", re.IGNORECASE)
_PATIENT_FOLDER = re.compile(r"[A-Za-z]{2,}[-_]\d+")
ID_COLUMNS = frozenset(("patientid", "patient", "subjectid", "caseid", "id"))
_CENTRE_COLUMNS = frozenset(("centerid", "centreid", "center", "centre"))


class CohortError(ValueError):
    """A cohort that cannot be used as it is; the message lists every fault found, with file and row."""


@dataclass(frozen=True)
class Exclusion:
    """A patient that is left out.

    Attributes:
        patient_id: the patient.
        reason: why, in words that are the same for all patients with this fault.
        detail: what belongs to this patient alone, such as the path that was expected.
    """

    patient_id: str
    reason: str
    detail: str = ""


@dataclass(frozen=True)
class Split:
    """Cases of one fold; no patient is in two of the lists.

    Attributes:
        training: what the network learns from.
        validation: what chooses the best epoch.
        test: what neither has seen; empty where the protocol has no such part.
    """

    training: list[Case]
    validation: list[Case]
    test: list[Case] = field(default_factory=list)

    def part(self, name: str) -> list[Case]:
        """The cases of one part.

        Args:
            name: ``training``, ``validation``, ``test``, or ``all`` for those of all three, for a cohort that the
                network has not learnt from.

        Raises:
            CohortError: there is no such part, or it is empty.
        """
        parts = {"training": self.training, "validation": self.validation, "test": self.test}
        everyone = {case[keys.PATIENT_ID]: case for cases in parts.values() for case in cases}
        parts["all"] = [everyone[patient] for patient in sorted(everyone)]
        if name not in parts:
            raise CohortError(f"evaluate_on is '{name}'; the parts of a split are {', '.join(parts)}")
        if not parts[name]:
            raise CohortError(f"this split has no {name} cases; evaluate on another part of it")
        return parts[name]


@dataclass(frozen=True)
class Scans:
    """Files of one patient; None where there is none.

    Attributes:
        patient_id: the patient's id as the files spell it.
        folder: folder where the files lie.
        ct: CT file.
        pet: PET file.
        mask: tumour mask.
    """

    patient_id: str
    folder: Path
    ct: Path | None = None
    pet: Path | None = None
    mask: Path | None = None


@dataclass(frozen=True)
class Fault:
    """Something wrong in a table.

    Attributes:
        message: what and where.
        patient: key of the patient, or "" where the whole table is concerned.
        label: True where only a label is concerned, which prediction does not need.
    """

    message: str
    patient: str = ""
    label: bool = False


@dataclass
class Record:
    """What the tables say about one patient.

    Attributes:
        patient_id: the id as the first table spells it.
        values: parsed value by feature or label name.
        places: where each value stands, for messages.
        centre: name of the centre, "" where no table tells it.
        rows: places of the patient's rows, one a table.
    """

    patient_id: str
    values: dict[str, float] = field(default_factory=dict)
    places: dict[str, str] = field(default_factory=dict)
    centre: str = ""
    rows: list[str] = field(default_factory=list)


@dataclass
class Tables:
    """All tables of a cohort, merged by patient.

    Attributes:
        records: by patient key, see :func:`patient_key`.
        columns: feature or label name -> names of the columns it was found in.
        faults: everything wrong, in order of file and row.
        files: the tables read.
    """

    records: dict[str, Record] = field(default_factory=dict)
    columns: dict[str, list[str]] = field(default_factory=dict)
    faults: list[Fault] = field(default_factory=list)
    files: list[Path] = field(default_factory=list)


@dataclass
class Remarks:
    """What was found on the way: faults to raise, and notes grouped by what they say."""

    faults: list[str] = field(default_factory=list)
    notes: dict[str, list[str]] = field(default_factory=dict)

    def note(self, title: str, item: str) -> None:
        """Add an item to the note called ``title``."""
        self.notes.setdefault(title, []).append(item)


def patient_key(patient_id: str) -> str:
    """One key for all spellings of a patient's id.

    Example:
        >>> {patient_key(spelling) for spelling in ("CHUM-001", "CHUM_001", " chum-001 ")}
        {'CHUM-001'}
    """
    return re.sub(r"[-_\s]+", "-", patient_id.strip()).upper()


def centre_name(centre: str, patient_id: str) -> str:
    """Name of a centre from CenterID (a number or a name), or else from the first letters of the patient's id.

    Example:
        >>> centre_name("3.0", "P-1"), centre_name("hgj", "P-1"), centre_name("", "CHUM-001"), centre_name("", "17")
        ('CHUS', 'HGJ', 'CHUM', 'unknown')
    """
    text = centre.strip()
    prefix = re.match(r"[A-Za-z]+", patient_id.strip())
    if re.fullmatch(r"\d+([.,]0*)?", text):
        number = int(re.split("[.,]", text)[0])
        return CENTRES.get(number, f"centre {number}")
    if text and text.lower() not in ("nan", "na", "n/a", "none", "unknown"):
        return text.upper()
    return prefix.group().upper() if prefix else "unknown"


# --- scans -----------------------------------------------------------------------------------------------


def find_scans(dataset_dir: str | Path) -> tuple[dict[str, Scans], list[str]]:
    """Files of every patient below a folder, in any of the layouts that HECKTOR has used.

    The folder holds patient folders (``<PatientID>/<PatientID>__CT.nii.gz``, ``__PT.nii.gz``, mask
    ``<PatientID>.nii.gz``), or the files themselves, or is a single patient's folder; or it has these in
    ``images/``, ``Task N/``, ``imagesTr/`` + ``labelsTr/``. Planning CT and dose files are left alone. ``.nii``,
    ``.mha``, ``.mhd`` and ``.nrrd`` are read as well.

    Args:
        dataset_dir: the folder.

    Returns:
        Scans by patient key, sorted, and notes on what was ambiguous. A patient found in several places is one
        entry: the place with CT, PET and mask goes first.

    Raises:
        CohortError: the folder does not exist, a file lies in another patient's folder, or two files of one
            place claim to be the same scan of the same patient.
    """
    root = Path(dataset_dir).expanduser()
    if not root.is_dir():
        raise CohortError(f"dataset_dir {root} is {'a file, not a folder' if root.exists() else 'not there'}")
    found: dict[str, list[Scans]] = {}
    remarks = Remarks()
    for container in [root, *_containers(root)]:
        labels_only = container.name.lower().startswith("labels")
        groups = _group_files(container, remarks, labels_only)
        folders = {} if labels_only else _patient_folders(container, remarks)
        for key in {*groups, *folders}:
            found.setdefault(key, []).extend(scans for scans in (groups.get(key), folders.get(key)) if scans)
    if remarks.faults:
        raise CohortError(_list_faults(f"{root}: the image files contradict each other", remarks.faults))
    scans = {key: _merge_scans(found[key], remarks) for key in sorted(found)}
    return scans, [f"{title}: {_some(items)}" for title, items in remarks.notes.items()]


def _containers(root: Path) -> list[Path]:
    """Folders below ``root`` that hold patients, by their names."""
    return sorted(entry for entry in root.iterdir() if entry.is_dir() and _CONTAINER.fullmatch(entry.name))


def _group_files(folder: Path, remarks: Remarks, masks_only: bool = False) -> dict[str, Scans]:
    """Sort the files of one folder by patient and kind; a file name that says neither is none of ours."""
    groups: dict[str, dict[str, Path]] = {}
    names: dict[str, str] = {}
    for path in sorted(entry for entry in folder.iterdir() if entry.is_file() and not entry.name.startswith(".")):
        scan, mask = _SCAN_FILE.fullmatch(path.name), _MASK_FILE.fullmatch(path.name)
        match = mask if masks_only else scan or mask
        if match is None:
            continue
        kind = "mask" if match is mask else "ct" if match["kind"].lower() == "ct" else "pet"
        key = patient_key(match["id"])
        other = groups.setdefault(key, {}).get(kind)
        if other is not None and other.name.removesuffix(".gz") != path.name.removesuffix(".gz"):
            remarks.faults.append(f"{other} and {path.name} are both the {kind} of {key}")
        elif other is not None:
            remarks.note("the .nii.gz is used where a .nii of the same name exists", str(path))
        groups[key][kind] = path
        names.setdefault(key, match["id"])
    return {key: Scans(names[key], folder, **group) for key, group in groups.items()}


def _patient_folders(container: Path, remarks: Remarks) -> dict[str, Scans]:
    """Patients that have a folder of their own in ``container``."""
    patients: dict[str, Scans] = {}
    for folder in sorted(entry for entry in container.iterdir() if entry.is_dir()):
        if folder.name.startswith(".") or _CONTAINER.fullmatch(folder.name):
            continue
        key = patient_key(folder.name)
        groups = _group_files(folder, remarks)
        scans = groups.pop(key, None)
        strangers = [str(path) for other in groups.values() for path in (other.ct, other.pet, other.mask) if path]
        if scans is None and not _PATIENT_FOLDER.fullmatch(folder.name):
            if strangers:
                remarks.note("not read, since the folder has no patient's name", str(folder))
            continue
        if any(other.ct or other.pet for other in groups.values()):
            remarks.faults.append(f"{folder} holds scans named for another patient: {_some(strangers)}")
        elif strangers:
            remarks.note("not read, since neither CT, PET nor mask by its name", _some(strangers))
        if key in patients:
            remarks.faults.append(f"{patients[key].folder} and {folder.name} are folders of the same patient")
        patients[key] = replace(scans or Scans(folder.name, folder), patient_id=folder.name)
    return patients


def _merge_scans(places: list[Scans], remarks: Remarks) -> Scans:
    """One entry of a patient found in several places: scans that belong together stay together."""
    best = max(places, key=lambda scans: (bool(scans.ct and scans.pet), bool(scans.mask), bool(scans.ct or scans.pet)))
    ct, pet, mask = best.ct, best.pet, best.mask
    for other in places:
        ct, pet, mask = ct or other.ct, pet or other.pet, mask or other.mask
        for used, unused in ((ct, other.ct), (pet, other.pet), (mask, other.mask)):
            if used and unused and used.stat().st_size != unused.stat().st_size:
                remarks.note("not used, since another folder has this scan of the patient, which differs", str(unused))
    return Scans(best.patient_id, best.folder, ct, pet, mask)


# --- tables ----------------------------------------------------------------------------------------------


def find_tables(dataset_dir: str | Path, patients: Iterable[str] = ()) -> list[Path]:
    """CSV files of a cohort.

    Looked for in the folder and its ``Task N/``, ``images/`` ... folders; where there is none, in the folder above
    (and, if that is called ``Task N`` or ``images``, the one above it), where a table counts only if it names one of
    ``patients``. Tables called ``hecktor*.csv`` go before others; of others there must be exactly one with a
    PatientID column (and with a known column besides, if several have that).

    Args:
        dataset_dir: folder of the cohort.
        patients: keys of the patients that have scans.

    Returns:
        Paths, sorted; empty where there is no table.

    Raises:
        CohortError: several tables could be meant.
    """
    root = Path(dataset_dir).expanduser().resolve()
    inside = _choose_tables([path for folder in (root, *_containers(root)) for path in _csv_files(folder)], root)
    if inside:
        return inside
    wanted = set(patients)
    above = [root.parent, *([root.parent.parent] if _CONTAINER.fullmatch(root.parent.name) else [])]
    for folder in above:
        tables = _choose_tables([path for path in _csv_files(folder) if wanted & _patients_named(path)], folder)
        if tables:
            return tables
    return []


def _csv_files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_file() and path.suffix.lower() == ".csv")


def _choose_tables(paths: list[Path], folder: Path) -> list[Path]:
    """The tables meant among the CSV files of a folder."""
    hecktor = [path for path in paths if path.name.lower().startswith("hecktor") and _header(path)]
    if hecktor:
        return hecktor
    others = [path for path in paths if _header(path)]
    if len(others) > 1:
        names = (*clinical.FEATURES, "rfs", "relapse")
        others = [path for path in others if any(clinical.match_columns(_header(path), name) for name in names)]
    if len(others) > 1:
        listed = ", ".join(path.name for path in others)
        raise CohortError(f"{folder} has several tables with a PatientID ({listed}): name the right one with ehr_csv")
    return others


def _header(path: Path) -> list[str]:
    """Column names of a CSV with a PatientID column; empty for any other file."""
    records = read_records(path)
    header = records[0][1] if records else []
    return header if any(_squeeze(name) in ID_COLUMNS for name in header) else []


def _patients_named(path: Path) -> set[str]:
    """Keys of the patients in a CSV; empty without a PatientID column."""
    header = _header(path)
    if not header:
        return set()
    column = first_column(header, ID_COLUMNS)
    return {patient_key(cells[column]) for _, cells in read_records(path)[1:] if column < len(cells)}


def _squeeze(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "", text.lower())


def first_column(header: Sequence[str], names: frozenset[str]) -> int:
    """Position of the first column with one of the names, or -1; ``patientid`` goes before ``id``."""
    squeezed = [_squeeze(name) for name in header]
    matches = [index for index, name in enumerate(squeezed) if name in names]
    return max(matches, key=lambda index: (len(squeezed[index]), -index), default=-1)


def read_records(path: Path) -> list[tuple[int, list[str]]]:
    """Non-empty records of a CSV with the row number a spreadsheet shows; delimiter and encoding are found out.

    A JSON file gives the same: a header, then one record an object, counted from 1.
    """
    if path.suffix.lower() == ".json":
        return _json_records(path)
    data = path.read_bytes()
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        text = data.decode("utf-16")
    else:
        try:
            text = data.decode("utf-8-sig")
        except UnicodeDecodeError:
            text = data.decode("latin-1")
    if "\0" in text:
        raise CohortError(f"{path} is not a text file: save the table as CSV")
    first = next((line for line in text.splitlines() if line.strip() and not line.lower().startswith("sep=")), "")
    delimiter = max(
        ",;\t", key=lambda mark: (any(_squeeze(n) in ID_COLUMNS for n in first.split(mark)), first.count(mark))
    )
    try:
        records = list(enumerate(csv.reader(io.StringIO(text, newline=""), delimiter=delimiter), start=1))
    except csv.Error as error:
        raise CohortError(f"{path} is no readable CSV: {error}") from error
    records = [(row, [cell.strip() for cell in cells]) for row, cells in records if any(map(str.strip, cells))]
    return records[1:] if records and records[0][1][0].lower().startswith("sep=") else records


def read_json(path: str | Path) -> Any:
    """The content of a JSON file.

    Raises:
        CohortError: the file is not there or is no valid JSON; the message says where it breaks off.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise CohortError(f"{path} cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise CohortError(f"{path} is not a text file in UTF-8") from error
    except json.JSONDecodeError as error:
        before = error.doc[: error.pos].rstrip()
        comma = before.endswith(",") or error.msg.startswith("Illegal trailing comma")
        hint = "; JSON has no comma after the last entry: remove it" if comma else ""
        raise CohortError(f"{path}, line {error.lineno}: not valid JSON ({error.msg}){hint}") from error


def _json_records(path: Path) -> list[tuple[int, list[str]]]:
    """The records of a list of objects (or of a single one) as if they stood in a CSV."""
    content = read_json(path)
    rows = content if isinstance(content, list) else [content]
    if not all(isinstance(row, dict) for row in rows):
        raise CohortError(f"{path}: expected a list of objects, one a patient, with the names of the CSV's columns")
    titles = list(dict.fromkeys(str(name) for row in rows for name in row))
    cells = [["" if row.get(name) is None else str(row[name]).strip() for name in titles] for row in rows]
    return [(0, titles), *enumerate(cells, start=1)]


def read_tables(paths: Iterable[str | Path], features: Sequence[str] = DEFAULT_FEATURES) -> Tables:
    """Read and merge CSV files by patient; every cell goes through :func:`scripts.clinical.parse_value`.

    Args:
        paths: CSV files (comma, semicolon or tab; with or without byte-order mark), or JSON files with a list of
            objects that have the same names as the columns of a CSV.
        features: clinical features to read besides the labels.

    Returns:
        The merged tables, with all faults of single rows in :attr:`Tables.faults`.

    Raises:
        CohortError: a file is not there, is no CSV or has no PatientID column.
    """
    tables = Tables()
    for path in map(Path, paths):
        _read_table(path, features, tables)
    return tables


@dataclass(frozen=True)
class _Header:
    """Columns of one table: names, position of id and centre, positions of each value; which are labels only."""

    file: str
    titles: list[str]
    patient_id: int
    centre: int
    columns: dict[str, list[int]]
    labels: frozenset[str]


def _read_table(path: Path, features: Sequence[str], tables: Tables) -> None:
    """Add one CSV to the merged tables."""
    if not path.is_file():
        raise CohortError(f"no such table: {path}")
    records = read_records(path)
    header = _read_header(path, records[0][1] if records else [], features, tables)
    rows: dict[str, int] = {}
    for row, cells in records[1:]:
        place = f"{path.name}, row {row}"
        cells = cells + [""] * (len(header.titles) - len(cells))
        patient_id = cells[header.patient_id]
        key = patient_key(patient_id)
        if not patient_id:
            tables.faults.append(Fault(f"{place}: no PatientID"))
        elif any(cells[len(header.titles) :]):
            message = f"{place}: {len(cells)} cells under {len(header.titles)} column names (a comma too many?)"
            tables.faults.append(Fault(message, key))
        elif key in rows:
            tables.faults.append(Fault(f"{place}: {patient_id} stands in row {rows[key]} already", key))
        else:
            rows[key] = row
            record = tables.records.setdefault(key, Record(patient_id))
            record.rows.append(place)
            tables.faults += _read_row(record, header, cells, place)


def _read_header(path: Path, titles: list[str], features: Sequence[str], tables: Tables) -> _Header:
    """Find the columns of a table and note them in the merged tables."""
    patient_id = first_column(titles, ID_COLUMNS)
    if patient_id < 0:
        raise CohortError(
            f"{path} has no PatientID column; its columns are: {', '.join(titles) or 'none (empty file)'}"
        )
    cut = [title for title in titles if title.count("(") != title.count(")")]
    if cut:
        raise CohortError(f"{path}: the column name {cut[0]!r} is cut in two at a comma; put the whole name in quotes")
    columns: dict[str, list[int]] = {}
    labels = frozenset(clinical.LABELS) - frozenset(features)
    for name in dict.fromkeys((*features, *clinical.LABELS)):
        try:
            columns[name] = clinical.match_columns(titles, name)
        except ClinicalValueError as error:
            tables.faults.append(Fault(f"{path.name}, {error}", label=name in labels))
        else:
            tables.columns.setdefault(name, []).extend(titles[index] for index in columns[name])
    tables.files.append(path)
    return _Header(path.name, titles, patient_id, first_column(titles, _CENTRE_COLUMNS), columns, labels)


def _read_row(record: Record, header: _Header, cells: Sequence[str], place: str) -> list[Fault]:
    """Parse the cells of one row into the patient's record; unreadable and contradictory cells are returned."""
    faults = []
    key = patient_key(record.patient_id)
    for name, index in ((name, index) for name, indices in header.columns.items() for index in indices):
        where = f"{place}, column '{header.titles[index]}'"
        label = name in header.labels
        try:
            value = clinical.parse_value(name, cells[index], where=where)
        except ClinicalValueError as error:
            faults.append(Fault(str(error), key, label))
            continue
        if value is None:
            continue
        if record.values.setdefault(name, value) != value:
            known = f"{record.values[name]:g} in {record.places[name]}"
            faults.append(Fault(f"{where}: {name} of {record.patient_id} is {value:g}, but {known}", key, label))
        record.places.setdefault(name, where)
    if header.centre >= 0 and cells[header.centre]:
        centre = centre_name(cells[header.centre], record.patient_id)
        if record.centre not in ("", centre):
            message = f"{place}: centre of {record.patient_id} is {centre}, but {record.centre} in {record.rows[0]}"
            faults.append(Fault(message, key, label=True))
        record.centre = record.centre or centre
    return faults


def _list_faults(title: str, faults: Sequence[str]) -> str:
    """All faults below a title, cut to the first few."""
    shown = "\n".join(f"  {fault}" for fault in faults[:_MAX_FAULTS])
    more = f"\n  ... and {len(faults) - _MAX_FAULTS} more" if len(faults) > _MAX_FAULTS else ""
    return f"{title} ({len(faults)} {'fault' if len(faults) == 1 else 'faults'}):\n{shown}{more}"


# --- cases -----------------------------------------------------------------------------------------------


def make_case(scans: Scans | None, record: Record | None, features: Sequence[str], has_tables: bool) -> Case:
    """The dictionary of one patient, with every label's own flag; without any table, no row is missed."""
    files = {kind: getattr(scans, kind) if scans else None for kind in ("ct", "pet", "mask")}
    values = record.values if record else {}
    patient_id = scans.patient_id if scans else record.patient_id if record else ""
    survival_known = "rfs" in values and "relapse" in values and values["rfs"] > 0
    return {
        keys.PATIENT_ID: patient_id,
        keys.CENTRE: (record.centre if record else "") or centre_name("", patient_id),
        keys.CT: _text(files["ct"]),
        keys.PET: _text(files["pet"]),
        keys.MASK: _text(files["mask"]),
        keys.CLINICAL: {name: values.get(name) for name in features},
        keys.CLINICAL_FOUND: record is not None or not has_tables,
        keys.HPV: float(values.get("hpv", 0.0)),
        keys.HPV_KNOWN: "hpv" in values,
        keys.TIME: values["rfs"] if survival_known else 0.0,
        keys.EVENT: bool(survival_known and values["relapse"] == 1.0),
        keys.SURV_KNOWN: survival_known,
        keys.SEG_KNOWN: files["mask"] is not None,
        keys.FINGERPRINT: files_fingerprint(files.values()),
    }


def _text(path: Path | None) -> str | None:
    return None if path is None else str(path)


def files_fingerprint(paths: Iterable[Path | None]) -> str:
    """Sizes and times of the files as a short text: a cache keyed by the case notices changed files."""
    files = [path if path and path.is_file() else None for path in paths]
    stats = [(path.stat().st_size, path.stat().st_mtime_ns) if path else None for path in files]
    return hashlib.sha256(repr(stats).encode()).hexdigest()[:16]


@dataclass
class Cohort:
    """Cases of a data set and what became of the rest.

    Attributes:
        dataset_dir: folder the cohort was read from.
        cases: case dictionaries, see :mod:`scripts.keys`, sorted by patient id.
        exclusions: patients left out, sorted by reason and patient id.
        notes: what is odd but usable.
        files: the tables read.
        columns: feature or label name -> columns it was read from.
    """

    dataset_dir: str
    cases: list[Case]
    exclusions: list[Exclusion] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    files: list[str] = field(default_factory=list)
    columns: dict[str, list[str]] = field(default_factory=dict)

    def describe(self) -> str:
        """What the cohort holds, as a short table: counts a centre, missing values, exclusions with reasons."""
        groups: dict[str, list[Case]] = {}
        for case in self.cases:
            groups.setdefault(case[keys.CENTRE], []).append(case)
        rows = [(centre, *_counts(groups[centre])) for centre in sorted(groups)]
        rows.append(("all", *_counts(self.cases)))
        titles = ("centre", "cases", "mask", "HPV known", "HPV+", "survival", "events")
        lines = [f"cohort {self.dataset_dir}", f"tables: {', '.join(self.files) or 'none'}", *_aligned(titles, rows)]
        lines += self._describe_features()
        lines.append(f"excluded: {len(self.exclusions)}")
        lines += [f"  {text}" for text in _by_reason(self.exclusions)]
        lines += [f"note: {note}" for note in self.notes]
        return "\n".join(lines)

    def _describe_features(self) -> list[str]:
        """One line with the share of cases in which each clinical value is known."""
        names = list(self.cases[0][keys.CLINICAL]) if self.cases else []
        known = {name: sum(case[keys.CLINICAL][name] is not None for case in self.cases) for name in names}
        listed = ", ".join(f"{name} {100 * count / len(self.cases):.0f} %" for name, count in known.items())
        return [f"clinical values known: {listed}"] if names else []

    @property
    def centres(self) -> list[str]:
        """Names of the centres that have cases, sorted."""
        return sorted({case[keys.CENTRE] for case in self.cases})

    @property
    def fingerprint(self) -> str:
        """A short text that changes when a patient, a label or a clinical value does, wherever the files lie.

        Folds are dealt anew then: what was trained on the old ones no longer fits.
        """
        places = (keys.CT, keys.PET, keys.MASK, keys.FINGERPRINT)
        facts = [sorted((name, value) for name, value in case.items() if name not in places) for case in self.cases]
        return hashlib.sha256(repr(facts).encode()).hexdigest()[:16]

    def statement(self, cases: Sequence[Case] | None = None) -> str:
        """What a model trained on ``cases`` (all of the cohort by default) must say about them, in one line."""
        cases = self.cases if cases is None else cases
        root = Path(self.dataset_dir).expanduser().resolve()
        records = [folder / RECORD_FILE for folder in (root, root.parent)]  # dataset_dir may be the images' folder
        notices = [json.loads(path.read_text(encoding="utf-8")).get("notice", "") for path in records if path.is_file()]
        if any("phantom" in notice.lower() for notice in notices):
            return f"{len(cases)} digital phantoms, not for clinical use"
        centres = sorted({case[keys.CENTRE] for case in cases})
        listed = f"{len(centres)} {'centre' if len(centres) == 1 else 'centres'} ({', '.join(centres)})"
        return f"{len(cases)} cases of {listed}; research use only, not for clinical use"

    def split(self, protocol: str = "partial", num_folds: int = 3, fold: int = 0, seed: int = 0) -> Split:
        """Training and validation cases of one fold, and test cases where the protocol has them.

        - ``partial`` deals all cases over the folds.
        - ``full`` deals the cases with mask and HPV status and adds all others to the validation set of every fold.
        - ``ablation`` is one split into 60 % training, 30 % validation and 10 % test: there is fold 0 only, and
          ``num_folds`` counts for nothing.
        - ``leave_one_centre_out`` validates on one centre and trains on the others: fold k is the k-th of
          :attr:`centres`, and nothing is random.

        Dealing goes round robin over cases sorted by event (unknown is a group of its own) and centre and shuffled
        within: folds differ by at most one case in size and in events, and the parts of the ablation split by at most
        one from their share.

        Args:
            protocol: a key of :data:`PROTOCOLS`.
            num_folds: number of folds, at least 2; the number of centres for ``leave_one_centre_out``.
            fold: which fold is validated, from 0.
            seed: seed of the shuffle.

        Returns:
            Lists of cases, each sorted by patient id.

        Raises:
            CohortError: there is no such protocol or fold, or there are too few cases or centres for it.
        """
        if protocol not in PROTOCOLS:
            raise CohortError(f"unknown protocol '{protocol}'; known are {', '.join(PROTOCOLS)}")
        return PROTOCOLS[protocol](self.cases, num_folds, fold, seed)


def _counts(cases: Sequence[Case]) -> tuple[int, ...]:
    hpv = [case[keys.HPV] for case in cases if case[keys.HPV_KNOWN]]
    masks = sum(case[keys.SEG_KNOWN] for case in cases)
    survival = sum(case[keys.SURV_KNOWN] for case in cases)
    return len(cases), masks, len(hpv), int(sum(hpv)), survival, sum(case[keys.EVENT] for case in cases)


def _aligned(titles: Sequence[str], rows: Sequence[Sequence[object]]) -> list[str]:
    """Lines of a table: first column to the left, the others to the right."""
    cells = [[str(cell) for cell in row] for row in (titles, *rows)]
    widths = [max(len(row[index]) for row in cells) for index in range(len(titles))]
    return [
        "  ".join(
            cell.rjust(width) if index else cell.ljust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in cells
    ]


def _by_reason(exclusions: Sequence[Exclusion], shown: int = 5) -> list[str]:
    """One line a reason with the number of patients and the first of them."""
    reasons: dict[str, list[Exclusion]] = {}
    for exclusion in exclusions:
        reasons.setdefault(exclusion.reason, []).append(exclusion)
    lines = []
    for reason, group in reasons.items():
        names = [item.patient_id + (f" ({item.detail})" if item.detail else "") for item in group[:shown]]
        more = f", and {len(group) - shown} more" if len(group) > shown else ""
        lines.append(f"{len(group)} x {reason}: {', '.join(names)}{more}")
    return lines


def load_cohort(
    dataset_dir: str | Path | None,
    ehr_csv: str | Path | Sequence[str | Path] | None = None,
    clinical_features: Sequence[str] = DEFAULT_FEATURES,
    require_images: bool = True,
) -> Cohort:
    """Read a cohort for training or evaluation.

    Left out and reported: patients without CT or PET, with RFS <= 0, without a row and without a mask, or with no
    label at all. A patient with a mask and no row stays, all clinical values and other labels unknown.

    Args:
        dataset_dir: folder with the scans, see :func:`find_scans`; None: tables only, named by ``ehr_csv``.
        ehr_csv: table or tables; None: found beside the scans, see :func:`find_tables`. A relative path is taken
            from the working folder or else from ``dataset_dir``.
        clinical_features: names of the clinical values to read, in the network's order.
        require_images: False keeps patients without scans (for models of clinical values alone).

    Returns:
        The cohort; its cases are sorted by patient id.

    Raises:
        CohortError: faults in files or tables (all of them are listed), or no usable case.
    """
    scans, tables, notes = _gather(dataset_dir, ehr_csv, clinical_features, require_images)
    if tables.faults:
        title = f"{', '.join(map(str, tables.files))}: cannot be used as it is"
        raise CohortError(_list_faults(title, [fault.message for fault in tables.faults]))
    cases, exclusions = [], []
    for key in sorted({*scans, *tables.records}):
        reason = _reason_to_exclude(scans.get(key), tables.records.get(key), require_images)
        case = make_case(scans.get(key), tables.records.get(key), clinical_features, bool(tables.files))
        if reason is None:
            cases.append(case)
        else:
            exclusions.append(Exclusion(case[keys.PATIENT_ID], *reason))
    exclusions.sort(key=lambda item: (item.reason, patient_key(item.patient_id)))
    source = str(dataset_dir or ", ".join(map(str, tables.files)))
    if not cases:
        raise CohortError("\n  ".join([f"{source}: no case can be used", *_by_reason(exclusions)]))
    notes += _notes_on_tables(tables, cases, clinical_features)
    cohort = Cohort(source, cases, exclusions, notes, list(map(str, tables.files)), tables.columns)
    logger.info("%s", cohort.describe())
    return cohort


def _gather(
    dataset_dir: str | Path | None,
    ehr_csv: str | Path | Sequence[str | Path] | None,
    features: Sequence[str],
    require_images: bool,
) -> tuple[dict[str, Scans], Tables, list[str]]:
    """Scans and tables of a cohort, before they are joined."""
    for name in features:
        clinical.feature_named(name)
    if dataset_dir is None and (ehr_csv is None or require_images):
        raise CohortError("without a dataset_dir, a table must be named (ehr_csv) and require_images be False")
    root = Path(dataset_dir or ".").expanduser()
    scans, notes = find_scans(root) if dataset_dir is not None else ({}, [])
    if require_images and not any(found.ct or found.pet for found in scans.values()):
        raise CohortError(
            f"{dataset_dir} holds no scan: expected <PatientID>/<PatientID>__CT.nii.gz and __PT.nii.gz (or .nii, .mha, "
            ".nrrd) there, or in images/, Task N/ or imagesTr/ below it"
        )
    if ehr_csv is None:
        paths = find_tables(root, scans)
    else:
        named = [ehr_csv] if isinstance(ehr_csv, str | Path) else list(ehr_csv)
        paths = [_locate_table(Path(path).expanduser(), root) for path in named]
    return scans, read_tables(paths, features), notes


def _locate_table(path: Path, dataset_dir: Path) -> Path:
    inside = dataset_dir / path
    return inside if not path.is_file() and inside.is_file() else path


def _reason_to_exclude(scans: Scans | None, record: Record | None, require_images: bool) -> tuple[str, str] | None:
    """Why a patient is left out of training and evaluation: (reason, detail), or None."""
    rows = "; ".join(record.rows) if record else ""
    if require_images and (scans is None or not (scans.ct or scans.pet)):
        return ("row in the table but no scans" if record else "no scans", rows)
    if require_images and scans is not None and not (scans.ct and scans.pet):
        missing, suffix = ("PET", "PT") if scans.ct else ("CT", "CT")
        return f"no {missing}", f"expected {scans.folder / scans.patient_id}__{suffix}.nii.gz"
    if record and record.values.get("rfs", 1.0) <= 0:
        return "RFS <= 0", record.places["rfs"]
    has_mask = scans is not None and scans.mask is not None
    if record is None and not has_mask:
        return "scans without a row in a table and without a mask: nothing to learn from", ""
    values = record.values if record else {}
    if not has_mask and "hpv" not in values and not {"rfs", "relapse"} <= set(values):
        return "no mask, HPV status or survival: nothing to learn from", rows
    return None


def _notes_on_tables(tables: Tables, cases: Sequence[Case], features: Sequence[str]) -> list[str]:
    """What a reader should know about the tables although it is no fault."""
    if not tables.files:
        return ["no table found: clinical values, HPV status and survival are unknown for every case"]
    notes = []
    absent = [name for name in (*features, "rfs", "relapse", "hpv") if not tables.columns.get(name)]
    if absent:
        notes.append(f"no column for {', '.join(dict.fromkeys(absent))}: unknown for every case")
    no_row = [case[keys.PATIENT_ID] for case in cases if not case[keys.CLINICAL_FOUND]]
    if no_row:
        notes.append(f"{len(no_row)} with a mask but no row in a table are kept, all else unknown: {_some(no_row)}")
    half = [
        record.patient_id
        for record in tables.records.values()
        if ("rfs" in record.values) != ("relapse" in record.values)
    ]
    if half:
        notes.append(f"{len(half)} have only one of RFS and Relapse, so survival is unknown: {_some(half)}")
    times = [case[keys.TIME] for case in cases if case[keys.SURV_KNOWN]]
    if len(times) >= 20 and max(times) < 200:
        notes.append(f"the longest RFS is {max(times):g}, read as days: is it in months or years?")
    return notes


def _some(names: Sequence[str], shown: int = 5) -> str:
    return ", ".join(names[:shown]) + (f", and {len(names) - shown} more" if len(names) > shown else "")


def inference_cases(
    dataset_dir: str | Path,
    ehr_csv: str | Path | Sequence[str | Path] | None = None,
    clinical_features: Sequence[str] = DEFAULT_FEATURES,
) -> list[Case]:
    """Every patient to predict, also those that cannot be predicted, so that each gets a row in the output.

    Labels are optional and faults in them count for nothing. What keeps a patient from being predicted (CT or PET
    missing, a clinical value that cannot be read, two rows) stands in ``case[keys.PROBLEM]``, which is empty otherwise.
    Patients that only a table knows are listed if the table lies in ``dataset_dir`` and are only logged if it lies
    elsewhere: predicting one folder with the table of a whole cohort is no fault.

    Args:
        dataset_dir: folder with the scans, see :func:`find_scans`.
        ehr_csv: table or tables, as in :func:`load_cohort`.
        clinical_features: names of the clinical values to read, in the network's order.

    Returns:
        Cases as in :func:`load_cohort`, sorted by patient id, CT or PET None where missing.

    Raises:
        CohortError: the folder holds no scan, or a table cannot be read at all.
    """
    scans, tables, notes = _gather(dataset_dir, ehr_csv, clinical_features, require_images=True)
    for note in notes:
        logger.warning("%s", note)
    masks_only = {key for key, found in scans.items() if found.mask and not (found.ct or found.pet)}
    rows_only = set(tables.records) - set(scans)
    root = Path(dataset_dir).expanduser().resolve()
    if not all(root in path.resolve().parents for path in tables.files):
        if rows_only:
            listed = _some(sorted(rows_only))
            logger.info("%d patients of the tables have no scans in %s: %s", len(rows_only), dataset_dir, listed)
        rows_only = set()
    left_alone = masks_only - set(tables.records)
    if left_alone:
        logger.warning("masks without scans are left alone: %s", _some(sorted(left_alone)))
    patients = sorted({*scans, *rows_only} - left_alone)
    return cases_to_predict(patients, scans, tables, clinical_features, str(dataset_dir))


def cases_to_predict(
    patients: Iterable[str], scans: Mapping[str, Scans], tables: Tables, features: Sequence[str], place: str
) -> list[Case]:
    """Cases of the patients named, each with what keeps it from being predicted in ``case[keys.PROBLEM]``.

    Args:
        patients: keys of the patients, see :func:`patient_key`.
        scans: files by patient key.
        tables: what is known about the patients.
        features: names of the clinical values, in the network's order.
        place: where scans were looked for, for patients that have none.

    Raises:
        CohortError: a table has a fault that concerns no single patient.
    """
    problems = patient_problems(tables)
    cases = []
    for key in patients:
        case = make_case(scans.get(key), tables.records.get(key), features, bool(tables.files))
        missing = [name for name, kind in (("CT", keys.CT), ("PET", keys.PET)) if case[kind] is None]
        lacking = [f"no {' and no '.join(missing)} found in {scans[key].folder if key in scans else place}"]
        case[keys.PROBLEM] = "; ".join([*(lacking if missing else []), *problems.get(key, [])])
        cases.append(case)
    return cases


def patient_problems(tables: Tables) -> dict[str, list[str]]:
    """What keeps each patient from being predicted; a fault that concerns no single patient is raised."""
    problems: dict[str, list[str]] = {}
    for fault in tables.faults:
        if fault.label:
            logger.warning("label ignored: %s", fault.message)
        else:
            problems.setdefault(fault.patient, []).append(fault.message)
    if "" in problems:
        raise CohortError(_list_faults(f"{', '.join(map(str, tables.files))}: cannot be used as it is", problems[""]))
    return problems


def default_dataset_dir(bundle_root: str | Path) -> str:
    """Folder of the demonstration cohort.

    Args:
        bundle_root: folder that holds ``configs`` and ``scripts`` of the bundle.

    Returns:
        ``<bundle_root>/data/demonstration``.

    Raises:
        FileNotFoundError: it has not been made yet; the message says in one line how to.
    """
    path = Path(bundle_root).resolve() / "data" / "demonstration"
    if not path.is_dir() or not find_scans(path)[0]:
        raise FileNotFoundError(
            f"no dataset_dir given and no demonstration cohort at {path}: make it with "
            f"`python scripts/make_cohort.py --out {path}` in the repository's root, or give --dataset_dir"
        )
    return str(path)


# --- folds -----------------------------------------------------------------------------------------------


def deal_folds(cases: Sequence[Case], num_folds: int, seed: int) -> list[int]:
    """Fold of each case: sorted by event and centre, shuffled within each group, dealt round robin.

    Args:
        cases: the cases.
        num_folds: number of folds.
        seed: seed of the shuffle; the order in which cases are given does not matter.

    Returns:
        A fold for each case, in the order of ``cases``.

    Raises:
        CohortError: fewer than two folds, or fewer cases than folds.
    """
    if num_folds < 2:
        raise CohortError(f"num_folds is {num_folds}; at least 2 are needed")
    if len(cases) < num_folds:
        raise CohortError(f"{len(cases)} cases cannot be dealt over {num_folds} folds")
    return _deal(cases, range(num_folds), seed)


def _deal(cases: Sequence[Case], hands: Sequence[int], seed: int) -> list[int]:
    """What falls to each case when ``hands`` go round and round over the cases, sorted by stratum and shuffled."""
    by_id = sorted(range(len(cases)), key=lambda index: patient_key(cases[index][keys.PATIENT_ID]))
    shuffled = [by_id[index] for index in np.random.default_rng(seed).permutation(len(cases))]
    shuffled.sort(key=lambda index: _stratum(cases[index]))
    dealt = [0] * len(cases)
    for position, index in enumerate(shuffled):
        dealt[index] = hands[position % len(hands)]
    return dealt


def _stratum(case: Case) -> tuple[str, str]:
    state = "unknown" if not case[keys.SURV_KNOWN] else "event" if case[keys.EVENT] else "censored"
    return state, case[keys.CENTRE]


def _split_partial(cases: Sequence[Case], num_folds: int, fold: int, seed: int) -> Split:
    """All cases are dealt over the folds."""
    folds = deal_folds(cases, num_folds, seed)
    if not 0 <= fold < num_folds:
        raise CohortError(f"fold is {fold}; with num_folds = {num_folds} it must be from 0 to {num_folds - 1}")
    training = [case for case, dealt in zip(cases, folds, strict=True) if dealt != fold]
    return Split(training, [case for case, dealt in zip(cases, folds, strict=True) if dealt == fold])


def _split_full(cases: Sequence[Case], num_folds: int, fold: int, seed: int) -> Split:
    """Cases with mask and HPV status are dealt over the folds; the others are validated in every fold."""
    full = [case for case in cases if case[keys.SEG_KNOWN] and case[keys.HPV_KNOWN]]
    if len(full) < num_folds:
        raise CohortError(
            f"protocol 'full' deals cases with mask and HPV status, of which there are {len(full)} among {len(cases)}, "
            f"over {num_folds} folds; use protocol 'partial'"
        )
    split = _split_partial(full, num_folds, fold, seed)
    others = [case for case in cases if not (case[keys.SEG_KNOWN] and case[keys.HPV_KNOWN])]
    validation = sorted([*split.validation, *others], key=lambda case: patient_key(case[keys.PATIENT_ID]))
    return Split(split.training, validation)


def _split_ablation(cases: Sequence[Case], num_folds: int, fold: int, seed: int) -> Split:
    """One split into 60 % training, 30 % validation and 10 % test cases."""
    if fold != 0:
        raise CohortError(f"fold is {fold}; protocol 'ablation' is one split, which is fold 0")
    if len(cases) < len(_ABLATION_HANDS):
        raise CohortError(
            f"{len(cases)} cases cannot be split 60/30/10 (protocol 'ablation'): at least {len(_ABLATION_HANDS)} needed"
        )
    dealt = _deal(cases, _ABLATION_HANDS, seed)
    training, validation, test = (
        [case for case, hand in zip(cases, dealt, strict=True) if hand == part] for part in range(3)
    )
    return Split(training, validation, test)


def _split_by_centre(cases: Sequence[Case], num_folds: int, fold: int, seed: int) -> Split:
    """Fold k validates on the cases of the k-th centre."""
    centres = sorted({case[keys.CENTRE] for case in cases})
    listed = ", ".join(centres)
    if len(centres) < 2:
        raise CohortError(f"protocol 'leave_one_centre_out' needs two centres; every case is of {listed}")
    if num_folds != len(centres):
        raise CohortError(
            f"num_folds is {num_folds}; protocol 'leave_one_centre_out' has a fold for each of the "
            f"{len(centres)} centres ({listed}): set it to {len(centres)}"
        )
    if not 0 <= fold < num_folds:
        raise CohortError(f"fold is {fold}; it must be from 0 to {num_folds - 1}, one of the centres {listed}")
    held_out = [case[keys.CENTRE] == centres[fold] for case in cases]
    training = [case for case, out in zip(cases, held_out, strict=True) if not out]
    return Split(training, [case for case, out in zip(cases, held_out, strict=True) if out])


PROTOCOLS: dict[str, Callable[[Sequence[Case], int, int, int], Split]] = {
    "partial": _split_partial,
    "full": _split_full,
    "ablation": _split_ablation,
    "leave_one_centre_out": _split_by_centre,
}
"""Ways to split a cohort: (cases, num_folds, fold, seed) -> split."""
