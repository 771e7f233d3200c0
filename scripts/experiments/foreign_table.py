"""A clinical table of another data set, read as a mapping file says: columns, levels, and survival from dates.

The mapping is a JSON object; ``mappings/radcure.json`` is one to copy. Its names:

- ``about`` (optional): ``source``, ``licence``, ``attribution``; passed on to what is made from the table.
- ``patient_id``: the column of it. ``centre`` (optional): the name of the only centre.
- ``date_format``: as Python's ``strptime`` takes it.
- ``values``: feature -> ``{"column": ..., "levels": {text: level or null}}``. A text that is not in ``levels`` is read
  as in any table (:func:`scripts.cohorts.clinical.parse_value`); ``null`` is missing.
- ``survival``: ``start``, ``last_follow_up`` (columns of dates) and ``failures``, a list of ``{"date": column,
  "status": column, "levels": {text: 1 or 0}}``. The time is counted from the start, in days, to the first failure, else
  to the last follow-up. A status that is empty is no failure.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from scripts.cohorts.clinical import ClinicalValueError, doubt_about, feature_named, parse_value
from scripts.cohorts.cohort import Cohort, CohortError, Exclusion, make_case
from scripts.cohorts.scans import clean_id, list_faults, patient_key, printable, some
from scripts.cohorts.tables import Record, read_json, read_records

NOT_POSITIVE = "time to failure or last follow-up is not positive"
NAMES = {"patient_id", "date_format", "values", "survival"}
OPTIONAL = {"about", "centre"}


@dataclass(frozen=True)
class ForeignTable:
    """A table as read."""

    cohort: Cohort  # its cases; patients without a positive time are among the exclusions
    years: dict[str, int]  # calendar year of the start, by patient id
    about: dict[str, str]  # what the mapping says of the source


@dataclass
class _Reader:
    """Rows of one table by the names of its columns, and what is wrong with them."""

    table: Path
    mapping_file: Path
    mapping: dict[str, Any]
    titles: list[str]
    faults: list[str] = field(default_factory=list)
    doubts: dict[str, list[str]] = field(default_factory=dict)  # feature -> implausible values, read as missing
    row: str = ""
    cells: dict[str, str] = field(default_factory=dict)

    def column(self, place: str, name: object) -> str:
        """A column that the mapping names; one that the table lacks is a fault."""
        if not isinstance(name, str) or name.strip() not in self.titles:
            listed = ", ".join(printable(title, 40) for title in self.titles)
            self.faults.append(f"{place}: no column {name!r} in {self.table.name}; its columns are {listed}")
        elif self.titles.count(name.strip()) > 1:
            self.faults.append(f"{place}: several columns of {self.table.name} are called {name!r}; rename the others")
        return str(name).strip()

    def fault(self, column: str, what: str) -> None:
        self.faults.append(f"{self.row}, column '{column}': {what}")

    def level(self, name: str, entry: Mapping[str, Any]) -> float | None:
        """The value of a feature in this row, None where it is missing or a fault."""
        column, text = str(entry["column"]).strip(), self.cells[str(entry["column"]).strip()]
        levels = {_plain(key): value for key, value in entry.get("levels", {}).items()}
        if text and _plain(text) in levels:
            value = levels[_plain(text)]
            return None if value is None else float(value)
        try:
            return parse_value(name, text)
        except ClinicalValueError as error:
            listed = "; or give it a level (null: missing) in 'levels' of"
            self.fault(column, f"{error}{listed} values.{name} in {self.mapping_file.name}")
            return None

    def plausible(self, name: str, value: float) -> bool:
        """Whether a value is used; one that is not is in doubt, see :func:`scripts.cohorts.clinical.doubt_about`."""
        if doubt := doubt_about(name, value):
            self.doubts.setdefault(name, []).append(f"{value:g} in {self.row} ({doubt})")
        return not doubt

    def date(self, column: str) -> datetime | None:
        """A date, None where the cell is empty or a fault."""
        text, form = self.cells[column], self.mapping["date_format"]
        if not text:
            return None
        try:
            return datetime.strptime(text, form)
        except ValueError:
            self.fault(
                column, f"{printable(text, 40)!r} is no date as {form} (date_format in {self.mapping_file.name})"
            )
            return None


def read_foreign_table(table: str | Path, mapping: str | Path, features: Sequence[str]) -> ForeignTable:
    """Read a clinical table by a mapping file.

    Args:
        table: CSV file.
        mapping: JSON file, see the module.
        features: names of the clinical values wanted; one that the mapping lacks is missing in all patients.

    Returns:
        The cohort, with ``relapse`` and ``rfs`` made from the dates. HPV status is a label and a value.

    Raises:
        CohortError: a file cannot be read, the mapping names what there is not, or cells are at fault; all of them are
            listed with file, row and patient.
    """
    table, mapping = Path(table).expanduser(), Path(mapping).expanduser()
    content = _checked(read_json(mapping), mapping)
    records = read_records(table)
    if not records:
        raise CohortError(f"{table} is empty")
    reader = _Reader(table, mapping, content, [title.strip() for title in records[0][1]])
    _check_columns(reader)
    _stop_at(reader, f"{mapping} does not fit {table}")
    found: dict[str, Record] = {}
    years: dict[str, int] = {}
    for row, cells in records[1:]:
        if any(cells[len(reader.titles) :]):
            what = f"{len(cells)} cells under {len(reader.titles)} column names (a comma too many?)"
            reader.faults.append(f"{table.name}, row {row}: {what}")
            continue
        reader.cells = dict(zip(reader.titles, [*cells, *[""] * len(reader.titles)], strict=False))
        _read_patient(reader, row, found, years)
    _stop_at(reader, f"{table}: cannot be used as it is")
    cases, exclusions = [], []
    for record in found.values():
        case = make_case(None, record, features, True)
        if record.values.get("rfs", 1.0) <= 0:
            days = f"{record.values['rfs']:g} days in {record.places['rfs']}"
            exclusions.append(Exclusion(clean_id(record.patient_id), NOT_POSITIVE, days))
        else:
            cases.append(case)
    columns = {name: [entry["column"]] for name, entry in content["values"].items()}
    absent = [name for name in features if name not in content["values"]]
    notes = [f"no value for {', '.join(absent)} in {mapping.name}: unknown for every case"] if absent else []
    for name, doubts in reader.doubts.items():
        notes.append(f"{name} is read as missing where it is implausible ({len(doubts)} x): {some(doubts)}")
    cohort = Cohort(str(table), cases, exclusions, notes, [str(table)], columns)
    return ForeignTable(cohort, years, dict(content.get("about", {})))


def _checked(content: Any, mapping: Path) -> dict[str, Any]:
    """The mapping, if it has the names that it needs and no others, and each holds what it must."""
    if not isinstance(content, dict):
        raise CohortError(f"{mapping}: a mapping is an object with {', '.join(sorted(NAMES))}")
    faults = [f"no {name!r}" for name in sorted(NAMES - set(content))]
    known = ", ".join(sorted(NAMES | OPTIONAL))
    faults += [f"{name!r} is not known; known are {known}" for name in content if name not in NAMES | OPTIONAL]
    faults += [
        f"{name}: {content[name]!r} is no text"
        for name in ("patient_id", "centre", "date_format")
        if name in content and not isinstance(content[name], str)
    ]
    about = content.get("about", {})
    if not isinstance(about, dict) or not all(isinstance(text, str) for text in about.values()):
        faults.append("about: give an object of texts")
    if isinstance(form := content.get("date_format"), str) and not _is_date_format(form):
        faults.append(
            f"date_format: {form!r} gives no day, month and year; write it as for Python's strptime: %d/%m/%Y"
        )
    values, survival = content.get("values", {}), content.get("survival")
    if isinstance(values, dict):
        faults += [fault for name, entry in values.items() for fault in _value_faults(name, entry)]
    else:
        faults.append('values: give an object, feature -> {"column": ..., "levels": {...}}')
    faults += _survival_faults(survival)
    if faults:
        raise CohortError(list_faults(f"{mapping} is no mapping that can be used", faults))
    return content


def _is_date_format(form: str) -> bool:
    """Whether a date that is written in a format can be read again."""
    day = datetime(2001, 2, 3, tzinfo=timezone.utc)
    try:
        return datetime.strptime(day.strftime(form), form).date() == day.date()
    except ValueError:
        return False


def _value_faults(name: str, entry: Any) -> list[str]:
    """What is wrong with the entry of a feature."""
    try:
        feature = feature_named(name)
    except ValueError as error:
        return [f"values: {error}"]
    if not isinstance(entry, dict) or "column" not in entry or set(entry) - {"column", "levels"}:
        return [f'values.{name}: give {{"column": ..., "levels": {{...}}}}']
    levels = entry.get("levels", {})
    if not _is_levels(levels):
        return [f"values.{name}: levels is an object, text -> level; case and spaces of a text do not matter"]
    wrong = [level for level in levels.values() if not _is_level(name, level)]
    return [f"values.{name}: {wrong[0]!r} is no level; accepted: {feature.accepted}"] if wrong else []


def _survival_faults(survival: Any) -> list[str]:
    """What is wrong with the part that tells how time and event follow."""
    parts = survival if isinstance(survival, dict) else {}
    if set(parts) != {"start", "failures", "last_follow_up"} or not parts["failures"]:
        return ["survival: give start, failures and last_follow_up"]
    failures = parts["failures"] if isinstance(parts["failures"], list) else [None]
    each = 'survival.failures: each is {"date": column, "status": column, "levels": {text: 1 or 0}}'
    return [each for failure in failures if not _is_failure(failure)]


def _is_failure(failure: Any) -> bool:
    if not isinstance(failure, dict) or set(failure) != {"date", "status", "levels"}:
        return False
    levels = failure["levels"]
    return _is_levels(levels) and all(isinstance(level, int | float) and level in (0, 1) for level in levels.values())


def _is_levels(levels: Any) -> bool:
    return isinstance(levels, dict) and len(set(map(_plain, levels))) == len(levels)


def _is_level(name: str, level: Any) -> bool:
    """Whether a feature may have a level: None (missing), or a number that a table may have."""
    if level is None or isinstance(level, bool) or not isinstance(level, int | float):
        return level is None
    try:
        return parse_value(name, level) is not None
    except ClinicalValueError:
        return False


def _check_columns(reader: _Reader) -> None:
    mapping, name = reader.mapping, reader.mapping_file.name
    reader.column(f"{name}, patient_id", mapping["patient_id"])
    for feature, entry in mapping["values"].items():
        reader.column(f"{name}, values.{feature}", entry["column"])
    survival = mapping["survival"]
    for key in ("start", "last_follow_up"):
        reader.column(f"{name}, survival.{key}", survival[key])
    for failure in survival["failures"]:
        for key in ("date", "status"):
            reader.column(f"{name}, survival.failures, {key}", failure[key])


def _stop_at(reader: _Reader, title: str) -> None:
    if reader.faults:
        raise CohortError(list_faults(title, reader.faults))


def _read_patient(reader: _Reader, row: int, found: dict[str, Record], years: dict[str, int]) -> None:
    """Add one row to the records and years, or its faults to the reader."""
    patient = reader.cells[str(reader.mapping["patient_id"]).strip()]
    reader.row = f"{reader.table.name}, row {row}, patient {clean_id(patient)}"
    if not patient:
        reader.faults.append(f"{reader.table.name}, row {row}: no patient id")
        return
    key = patient_key(patient)
    if key in found:
        reader.faults.append(f"{reader.row}: stands in {found[key].rows[0]} already")
        return
    place = f"{reader.table.name}, row {row}"
    record = found[key] = Record(patient, centre=str(reader.mapping.get("centre", "")), rows=[place])
    for name, entry in reader.mapping["values"].items():
        value = reader.level(name, entry)
        if value is not None and reader.plausible(name, value):
            record.values[name] = value
            record.places[name] = place
    start, end, relapse = _survival(reader)
    if start is not None:
        years[clean_id(patient)] = start.year
    if start is not None and end is not None and reader.plausible("rfs", float((end - start).days)):
        record.values |= {"rfs": float((end - start).days), "relapse": float(relapse)}
        record.places |= dict.fromkeys(("rfs", "relapse"), place)


def _survival(reader: _Reader) -> tuple[datetime | None, datetime | None, bool]:
    """Start, end of the time and whether it ends with a failure."""
    survival, failed = reader.mapping["survival"], []
    for failure in survival["failures"]:
        status, column = reader.cells[failure["status"].strip()], failure["status"].strip()
        levels = {_plain(text): level for text, level in failure["levels"].items()}
        if status and _plain(status) not in levels:
            accepted = ", ".join(map(repr, failure["levels"]))
            what = f"{printable(status, 40)!r} has no level; known are {accepted}"
            reader.fault(column, f"{what}; add it to survival.failures in {reader.mapping_file.name}")
        elif status and levels[_plain(status)] == 1:
            before = len(reader.faults)
            date = reader.date(failure["date"].strip())
            if date is not None:
                failed.append(date)
            elif len(reader.faults) == before:
                reader.fault(
                    failure["date"].strip(), f"no date, but '{column}' says {status!r}: a failure needs its date"
                )
    start, last = reader.date(survival["start"].strip()), reader.date(survival["last_follow_up"].strip())
    return start, min(failed) if failed else last, bool(failed)


def _plain(text: str) -> str:
    return " ".join(str(text).split()).lower()
