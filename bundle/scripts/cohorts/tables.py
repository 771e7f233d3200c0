"""Tables of a cohort (CSV and JSON), parsed by :mod:`scripts.cohorts.clinical` and merged by patient."""

from __future__ import annotations

import csv
import io
import json
import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from scripts.cohorts import clinical
from scripts.cohorts.clinical import DEFAULT_FEATURES, ClinicalValueError, _squeeze
from scripts.cohorts.scans import CONTAINER, CohortError, clean_id, containers, no_file, patient_key, printable, some

logger = logging.getLogger(__name__)

CENTRES = {1: "CHUM", 2: "CHUP", 3: "CHUS", 5: "MDA", 6: "HGJ", 7: "HMR", 8: "USZ"}
"""CenterID of HECKTOR 2025 -> name of the hospital."""

ID_COLUMNS = frozenset(("patientid", "patient", "subjectid", "caseid", "id"))
_LARGEST_FILE = 200e6  # bytes; enough for a million patients
_CENTRE_COLUMNS = frozenset(("centerid", "centreid", "center", "centre"))
_NO_CSV = (".xlsx", ".xls", ".ods", ".tsv", ".sav", ".dta")
_KNOWN = ", ".join(feature.column for feature in clinical.FEATURES.values())


@dataclass(frozen=True)
class Fault:
    """A fault in a table."""

    message: str  # what is wrong and where
    patient: str = ""  # key of the patient, or "" where the fault affects the whole table
    label: bool = False  # True where only a label is affected, which prediction does not need
    # the message without contents of the table, for users who may not see it; "" where the message has none
    told: str = ""
    nobodys: bool = False  # True where only a row is affected that matches no patient


@dataclass
class Record:
    """The values of one patient."""

    patient_id: str  # the id as in the first table
    values: dict[str, float] = field(default_factory=dict)  # parsed value by feature or label name
    places: dict[str, str] = field(default_factory=dict)  # file, row and column of each value, for messages
    centre: str = ""  # name of the centre, "" where no table states it
    rows: list[str] = field(default_factory=list)  # file and row of the patient, one per table
    others: dict[str, float] = field(default_factory=dict)


@dataclass
class Tables:
    """All tables of a cohort, merged by patient."""

    records: dict[str, Record] = field(default_factory=dict)  # by patient key, see patient_key
    columns: dict[str, list[str]] = field(default_factory=dict)  # feature or label name -> names of its columns
    # names of unknown columns, with the most similar known name, "" where none is similar
    unknown: dict[str, str] = field(default_factory=dict)
    # feature or label name -> implausible values, which are read as missing
    doubts: dict[str, list[str]] = field(default_factory=dict)
    short: list[str] = field(default_factory=list)  # file and row of rows with fewer cells than there are columns
    faults: list[Fault] = field(default_factory=list)  # all faults, in order of file and row
    files: list[Path] = field(default_factory=list)  # the tables read

    def notes(self, features: Sequence[str], besides: Iterable[str] = ()) -> list[str]:
        """Notes on missing columns, unless they are ``besides``, and implausible values."""
        if not self.files:
            return []
        notes = []
        absent = [name for name in dict.fromkeys(features) if not self.columns.get(name)]
        if absent:
            others = f"; unknown columns: {described(self.unknown)}" if self.unknown else ""
            notes.append(f"no column for {', '.join(absent)}: unknown for every case{others}")
        for name, doubts in self.doubts.items():
            if name in (*features, *besides):
                notes.append(f"{name} is read as missing where it is implausible ({len(doubts)} x): {some(doubts)}")
        if self.short:
            message = "have fewer cells than there are columns; the last ones are read as missing (a comma too few?)"
            notes.append(f"{len(self.short)} rows {message}: {some(self.short)}")
        return notes


def centre_name(centre: str, patient_id: str) -> str:
    """Name of a centre from CenterID (a number or a name), otherwise from the first letters of the patient's id.

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
        return clean_id(text).upper()
    return prefix.group().upper() if prefix else "unknown"


def find_tables(dataset_dir: str | Path, patients: Iterable[str] = ()) -> list[Path]:
    """CSV files of a cohort.

    The folder and its ``Task N/``, ``images/`` ... folders are searched; if they have none, the parent folder (and, if
    that is called ``Task N`` or ``images``, its parent), where a table is used only if it has one of ``patients``.
    Tables called ``hecktor*.csv`` take precedence; of others there must be exactly one with a PatientID column (if
    several have that, with a clinical value or a label).

    Returns:
        Paths, sorted; empty where there is no table. A table without known columns is ignored with a warning.

    Raises:
        CohortError: there are several such tables.
    """
    root = Path(dataset_dir).expanduser().resolve()
    inside = _choose_tables([path for folder in (root, *containers(root)) for path in _csv_files(folder)], root)
    if inside:
        return inside
    wanted = set(patients)
    above = [root.parent, *([root.parent.parent] if CONTAINER.fullmatch(root.parent.name) else [])]
    for folder in above:
        tables = _choose_tables([path for path in _csv_files(folder) if wanted & _patients_named(path)], folder)
        if tables:
            return tables
    for path in sorted(path for folder in (root, *containers(root)) for path in folder.iterdir()):
        if path.suffix.lower() in _NO_CSV and not path.name.startswith((".", "~")):
            logger.warning("%s is not read: save the table as CSV", path)
    return []


def _csv_files(folder: Path) -> list[Path]:
    found = (path for path in folder.iterdir() if path.is_file() and path.suffix.lower() == ".csv")
    # systems and spreadsheets leave hidden files beside a table, such as ._clinical.csv and .~lock.clinical.csv
    return sorted(p for p in found if not p.name.startswith((".", "~")) and p.stat().st_size <= _LARGEST_FILE)


def _choose_tables(paths: list[Path], folder: Path) -> list[Path]:
    """The tables to use among the CSV files of a folder."""
    headers = {path: header for path in paths if (header := _header(path))}
    tables = [path for path, header in headers.items() if _has_known_column(header)]
    if headers and not tables:
        path, header = next(iter(headers.items()))
        logger.warning("%s is not read: %s", path, _nothing_known(header))
    hecktor = [path for path in tables if path.name.lower().startswith("hecktor")]
    if hecktor:
        return hecktor
    others = tables if len(tables) < 2 else [path for path in tables if _values_of(headers[path])]
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
    """Keys of the patients in a CSV; empty if it has no PatientID column or cannot be read."""
    try:
        header = _header(path)
    except CohortError as error:
        logger.warning("ignored: %s", error)
        return set()
    if not header:
        return set()
    column = first_column(header, ID_COLUMNS)
    return {patient_key(cells[column]) for _, cells in read_records(path)[1:] if column < len(cells)}


def _values_of(titles: Sequence[str]) -> list[str]:
    """Clinical values and labels that the columns hold."""
    found = []
    for name in (*clinical.FEATURES, *clinical.LABELS):
        try:
            found += [name] if clinical.match_columns(titles, name) else []
        except ClinicalValueError:  # another coding: reported when the table is read
            found.append(name)
    return found


def _has_known_column(titles: Sequence[str], besides: frozenset[str] = frozenset()) -> bool:
    """Whether a table has a clinical value, a label, the centre, or a column named in ``besides``."""
    return bool(_values_of(titles)) or any(_squeeze(title) in _CENTRE_COLUMNS | besides for title in titles)


def unknown_titles(titles: Iterable[str]) -> dict[str, str]:
    """Names other than of patient id, centre, clinical values and labels, with the most similar known name."""
    known = ID_COLUMNS | _CENTRE_COLUMNS
    return clinical.unknown_names(title for title in titles if _squeeze(title) not in known)


def described(unknown: Mapping[str, str]) -> str:
    """Unknown names for a message, those with a similar known name first."""
    near_first = sorted(unknown.items(), key=lambda item: not item[1])
    return some([f"{printable(name, 40)!r}{f' ({near}?)' if near else ''}" for name, near in near_first], 10)


def _nothing_known(titles: Sequence[str]) -> str:
    found = described(unknown_titles(titles)) or "only the PatientID"
    return f"none of its columns is a known clinical value or label; found: {found}; known are {_KNOWN}"


def check_names(values: Mapping[str, Any], place: str) -> None:
    """Check that a patient's object, such as ``ehr.json``, holds clinical values; warn of unknown names.

    Raises:
        CohortError: it has names, and none of them is known.
    """
    nested = [name for name, value in values.items() if isinstance(value, dict | list)]  # no value, whatever its name
    plain = [name for name in values if name not in nested]
    unknown = {**unknown_titles(plain), **dict.fromkeys(nested, "")}
    if unknown and not any(name in clinical.FEATURES for name in _values_of(plain)):
        hint = f"; {printable(nested[0], 40)!r} holds further values: give only its content" if nested else ""
        message = f"{place}: none of its names is a known clinical value; found: {described(unknown)}"
        raise CohortError(f"{message}; known are {_KNOWN}{hint}")
    if unknown:
        logger.warning("%s: unknown names are ignored: %s", place, described(unknown))


def first_column(header: Sequence[str], names: frozenset[str]) -> int:
    """Position of the first column with one of the names, or -1; ``patientid`` takes precedence over ``id``."""
    squeezed = [_squeeze(name) for name in header]
    matches = [index for index, name in enumerate(squeezed) if name in names]
    return max(matches, key=lambda index: (len(squeezed[index]), -index), default=-1)


def read_records(path: Path) -> list[tuple[int, list[str]]]:
    """Non-empty records of a CSV with their row numbers in a spreadsheet; delimiter and encoding are detected.

    A JSON file gives the same: a header, then one record per object, counted from 1.
    """
    if path.suffix.lower() == ".json":
        return _json_records(path)
    data = _read_bytes(path)
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
        raise CohortError(f"{path} is not a readable CSV: {error}") from error
    records = [(row, [cell.strip() for cell in cells]) for row, cells in records if any(map(str.strip, cells))]
    return records[1:] if records and records[0][1][0].lower().startswith("sep=") else records


def _read_bytes(path: Path) -> bytes:
    """The content of a file."""
    try:
        if what := no_file(path):
            raise CohortError(f"{path} cannot be read: it is {what}")
        if path.stat().st_size > _LARGEST_FILE:
            raise CohortError(f"{path} has more than {_LARGEST_FILE / 1e6:.0f} MB: it is not a clinical table")
        return path.read_bytes()
    except OSError as error:
        raise CohortError(f"{path} cannot be read: {error.strerror or error}") from error


def _only_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; a repeated name is an error, where Python would keep the last value."""
    content = dict(pairs)
    if len(content) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise CohortError(f"{printable(twice, 40)!r} occurs twice in one object")
    return content


def read_json(path: str | Path) -> Any:
    """The content of a JSON file.

    Raises:
        CohortError: the file does not exist or is not valid JSON; the message says in which line.
    """
    data = _read_bytes(Path(path))
    try:
        return json.loads(data.decode("utf-8-sig"), object_pairs_hook=_only_once)
    except CohortError as error:
        raise CohortError(f"{path}: {error}") from error
    except RecursionError as error:
        raise CohortError(f"{path}: not read, as its values are nested too deeply") from error
    except UnicodeDecodeError as error:
        raise CohortError(f"{path} is not a text file in UTF-8") from error
    except json.JSONDecodeError as error:
        before = error.doc[: error.pos].rstrip()
        comma = before.endswith(",") or error.msg.startswith("Illegal trailing comma")
        hint = "; JSON has no comma after the last entry: remove it" if comma else ""
        raise CohortError(f"{path}, line {error.lineno}: not valid JSON ({error.msg}){hint}") from error
    except ValueError as error:  # an integer of thousands of digits
        raise CohortError(f"{path}: not read: {error}") from error


def _json_records(path: Path) -> list[tuple[int, list[str]]]:
    """The records of a list of objects (or of a single one), as of a CSV."""
    content = read_json(path)
    rows = content if isinstance(content, list) else [content]
    if not all(isinstance(row, dict) for row in rows):
        raise CohortError(f"{path}: expected a list of objects, one per patient, with the column names of a CSV")
    titles = list(dict.fromkeys(str(name) for row in rows for name in row))
    cells = [["" if row.get(name) is None else str(row[name]).strip() for name in titles] for row in rows]
    return [(0, titles), *enumerate(cells, start=1)]


def read_tables(
    paths: Iterable[str | Path],
    features: Sequence[str] = DEFAULT_FEATURES,
    besides: frozenset[str] = frozenset(),
) -> Tables:
    """Read and merge CSV files by patient; every cell goes through :func:`scripts.cohorts.clinical.parse_value`.

    Args:
        paths: CSV files (comma, semicolon or tab; with or without byte-order mark), or JSON files with a list of
            objects that have the same names as the columns of a CSV.
        features: clinical features to read, in addition to the labels.
        besides: names of further columns that the caller reads, in lower case without punctuation.

    Returns:
        The merged tables, with all faults of single rows in :attr:`Tables.faults`.

    Raises:
        CohortError: a file does not exist, is not a CSV, or has no PatientID column or no other known column.
    """
    tables = Tables()
    for path in map(Path, paths):
        _read_table(path, features, tables, besides)
    tables.unknown = {name: near for name, near in tables.unknown.items() if _squeeze(name) not in besides}
    return tables


@dataclass(frozen=True)
class _Header:
    """Columns of one table: names, positions of the id (and of all columns of its name), centre, values; labels."""

    file: str
    titles: list[str]
    patient_id: int
    same_id: list[int]
    centre: int
    columns: dict[str, list[int]]
    labels: frozenset[str]


def _read_table(path: Path, features: Sequence[str], tables: Tables, besides: frozenset[str]) -> None:
    """Add one CSV to the merged tables."""
    if not path.is_file():
        raise CohortError(f"no such table: {path}")
    records = read_records(path)
    titles = records[0][1] if records else []
    header = _read_header(path, titles, features, tables)
    if not _has_known_column(titles, besides):
        raise CohortError(f"{path}: {_nothing_known(titles)}")
    tables.unknown |= unknown_titles(titles)
    for name, index in ((name, index) for name, indices in header.columns.items() for index in indices):
        column, what = [cells[index] for _, cells in records[1:] if index < len(cells)], ""
        if clinical.counts_from_one(name, column):
            what = f"coded by 1 and 2; accepted: {clinical.feature_named(name).accepted}; recode it"
        elif clinical.has_dots_of_thousands(name, column):
            what = "dots seem to stand between thousands, as 1.089 for 1089: write the numbers without them"
        if what:
            message = f"{path.name}, column '{titles[index]}': {what}"
            tables.faults.append(Fault(message, label=name in header.labels))
    others = _other_columns(path, records, features, tables.doubts)
    rows: dict[str, int] = {}
    for row, cells in records[1:]:
        place = f"{path.name}, row {row}"
        if len(cells) < len(header.titles):
            tables.short.append(place)
        cells = cells + [""] * (len(header.titles) - len(cells))
        patient_id = cells[header.patient_id]
        key = patient_key(patient_id)
        if not patient_id:
            tables.faults.append(Fault(f"{place}: no PatientID", nobodys=True))
        elif len(patient_id.splitlines()) > 1 and set(",;\t") & set(patient_id):
            message = f"{place}: a PatientID of several lines: is there a quotation mark without its second?"
            tables.faults.append(Fault(message))
        elif len(named := {patient_key(cells[index]) for index in header.same_id}) > 1:
            message = f"{place}: the columns called {header.titles[header.patient_id]!r} name different patients"
            tables.faults += [Fault(message, name) for name in sorted(named) if name]
        elif any(cells[len(header.titles) :]):
            message = f"{place}: {len(cells)} cells under {len(header.titles)} column names (a comma too many?)"
            tables.faults.append(Fault(message, key))
        elif key in rows:
            told = f"{place}: the patient is already in row {rows[key]}; keep one of them"
            message = f"{place}: {clean_id(patient_id)} is already in row {rows[key]}; keep one of them"
            tables.faults.append(Fault(message, key, told=told))
        else:
            rows[key] = row
            record = tables.records.setdefault(key, Record(patient_id))
            record.rows.append(place)
            tables.faults += _read_row(record, header, cells, place, tables.doubts)
            _read_others(record, titles, others, cells, place, tables.doubts)


def _read_header(path: Path, titles: list[str], features: Sequence[str], tables: Tables) -> _Header:
    """Find the columns of a table and add them to the merged tables."""
    patient_id = first_column(titles, ID_COLUMNS)
    if patient_id < 0:
        raise CohortError(
            f"{path} has no PatientID column; its columns are: "
            f"{some([printable(title, 40) for title in titles], 40) or 'none (empty file)'}; "
            "call the column of the ids PatientID"
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
            told = f"{path.name}: the column of {name} states another coding in brackets than the one read"
            tables.faults.append(Fault(f"{path.name}, {error}", label=name in labels, told=told))
        else:
            tables.columns.setdefault(name, []).extend(titles[index] for index in columns[name])
    tables.files.append(path)
    same_id = [index for index, title in enumerate(titles) if _squeeze(title) == _squeeze(titles[patient_id])]
    return _Header(path.name, titles, patient_id, same_id, first_column(titles, _CENTRE_COLUMNS), columns, labels)


def _other_columns(
    path: Path, records: Sequence[tuple[int, list[str]]], features: Sequence[str], doubts: dict[str, list[str]]
) -> dict[str, list[int]]:
    """Columns of the clinical values besides ``features`` and the labels, without those of another coding."""
    columns: dict[str, list[int]] = {}
    for name in (name for name in clinical.FEATURES if name not in {*features, *clinical.LABELS}):
        try:
            found = clinical.match_columns(records[0][1], name)
        except ClinicalValueError as error:
            doubts.setdefault(name, []).append(f"{path.name}, {error}")
            continue
        cells = {index: [row[index] for _, row in records[1:] if index < len(row)] for index in found}
        columns[name] = [index for index in found if not clinical.counts_from_one(name, cells[index])]
        if columns[name] != found:
            doubts.setdefault(name, []).append(f"{path.name}: coded by 1 and 2")
    return columns


def _read_others(
    record: Record,
    titles: Sequence[str],
    columns: Mapping[str, Sequence[int]],
    cells: Sequence[str],
    place: str,
    doubts: dict[str, list[str]],
) -> None:
    """Put the values of ``columns`` into the patient's record; one that cannot be read, or twice, is in doubt."""
    for name, index in ((name, index) for name, indices in columns.items() for index in indices):
        where = f"{place}, column '{titles[index]}', {clean_id(record.patient_id)}"
        try:
            value = clinical.parse_value(name, cells[index])
        except ClinicalValueError as error:
            doubts.setdefault(name, []).append(f"{where}: {error}")
            continue
        doubt = clinical.doubt_about(name, value)
        if value is not None and record.others.get(name, value) != value:
            doubt = f"but {record.others[name]:g} in another column or table"
        if doubt:
            doubts.setdefault(name, []).append(f"{value:g} in {where} ({doubt})")
        elif value is not None:
            record.others[name] = value


def _read_row(
    record: Record, header: _Header, cells: Sequence[str], place: str, doubts: dict[str, list[str]]
) -> list[Fault]:
    """Parse the cells of one row into the patient's record; return the faults of unreadable or contradictory cells."""
    faults = []
    key = patient_key(record.patient_id)
    for name, index in ((name, index) for name, indices in header.columns.items() for index in indices):
        where = f"{place}, column '{header.titles[index]}'"
        label = name in header.labels
        try:
            value = clinical.parse_value(name, cells[index], where=where)
        except ClinicalValueError as error:
            column = re.sub(r"[(\[].*", "", header.titles[index]).strip()  # a known name, without the remark
            told = f"{place}, column '{column}': no value of {name}; accepted: {clinical.feature_named(name).accepted}"
            faults.append(Fault(str(error), key, label, told))
            continue
        if value is None:
            continue
        if doubt := clinical.doubt_about(name, value):
            doubts.setdefault(name, []).append(f"{value:g} in {place}, {clean_id(record.patient_id)} ({doubt})")
            continue
        if record.values.setdefault(name, value) != value:
            known = f"{record.values[name]:g} in {record.places[name]}"
            message = f"{where}: {name} of {clean_id(record.patient_id)} is {value:g}, but {known}"
            faults.append(Fault(message, key, label, f"{place}: {name} contradicts another row or table"))
        record.places.setdefault(name, where)
    if header.centre >= 0 and cells[header.centre]:
        centre = centre_name(cells[header.centre], record.patient_id)
        if record.centre not in ("", centre):
            message = (
                f"{place}: centre of {clean_id(record.patient_id)} is {centre}, but {record.centre} in {record.rows[0]}"
            )
            told = f"{place}: the centre contradicts another row or table"
            faults.append(Fault(message, key, label=True, told=told))
        record.centre = record.centre or centre
    return faults
