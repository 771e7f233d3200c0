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
from datetime import datetime
from pathlib import Path
from typing import Any

from scripts.cohorts.clinical import ClinicalValueError, feature_named, parse_value
from scripts.cohorts.cohort import Cohort, CohortError, Exclusion, make_case
from scripts.cohorts.scans import clean_id, list_faults, patient_key, printable
from scripts.cohorts.tables import Record, read_json, read_records

NOT_POSITIVE = "time to failure or last follow-up is not positive"
NAMES = {"patient_id", "date_format", "values", "survival"}
OPTIONAL = {"about", "centre"}


@dataclass(frozen=True)
class ForeignTable:
    """A table as read.

    Attributes:
        cohort: its cases; patients without a positive time are among the exclusions.
        years: calendar year of the start, by patient id.
        about: what the mapping says of the source.
    """

    cohort: Cohort
    years: dict[str, int]
    about: dict[str, str]


@dataclass
class _Reader:
    """Rows of one table by the names of its columns, and what is wrong with them."""

    table: Path
    mapping_file: Path
    mapping: dict[str, Any]
    titles: list[str]
    faults: list[str] = field(default_factory=list)
    row: str = ""
    cells: dict[str, str] = field(default_factory=dict)

    def column(self, place: str, name: object) -> str:
        """A column that the mapping names; one that the table lacks is a fault."""
        if str(name).strip() not in self.titles:
            listed = ", ".join(printable(title, 40) for title in self.titles)
            self.faults.append(f"{place}: no column {name!r} in {self.table.name}; its columns are {listed}")
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
    cohort = Cohort(str(table), cases, exclusions, notes, [str(table)], columns)
    return ForeignTable(cohort, years, dict(content.get("about", {})))


def _checked(content: Any, mapping: Path) -> dict[str, Any]:
    """The mapping, as far as it has the names it needs and no others."""
    if not isinstance(content, dict):
        raise CohortError(f"{mapping}: a mapping is an object with {', '.join(sorted(NAMES))}")
    faults = [f"no {name!r}" for name in sorted(NAMES - set(content))]
    faults += [
        f"{name!r} is not known; known are {', '.join(sorted(NAMES | OPTIONAL))}"
        for name in content
        if name not in NAMES | OPTIONAL
    ]
    for name, entry in (content.get("values") or {}).items():
        try:
            known = feature_named(name)
        except ValueError as error:
            faults.append(f"values: {error}")
            continue
        if not isinstance(entry, dict) or "column" not in entry or set(entry) - {"column", "levels"}:
            faults.append(f'values.{name}: give {{"column": ..., "levels": {{...}}}}')
        elif wrong := [
            v for v in entry.get("levels", {}).values() if v is not None and known.levels and v not in known.levels
        ]:
            faults.append(f"values.{name}: {wrong[0]!r} is no level; accepted: {known.accepted}")
    survival = content.get("survival") or {}
    if set(survival) != {"start", "failures", "last_follow_up"} or not survival.get("failures"):
        faults.append("survival: give start, failures and last_follow_up")
    for failure in survival.get("failures", []):
        if set(failure) != {"date", "status", "levels"} or not set(failure["levels"].values()) <= {0, 1}:
            faults.append('survival.failures: each is {"date": column, "status": column, "levels": {text: 1 or 0}}')
    if faults:
        raise CohortError(list_faults(f"{mapping} is no mapping that can be used", faults))
    return content


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
        if value is not None:
            record.values[name] = value
            record.places[name] = place
    start, end, relapse = _survival(reader)
    if start is not None:
        years[clean_id(patient)] = start.year
    if start is not None and end is not None:
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
