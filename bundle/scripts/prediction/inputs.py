"""Cases to predict from a folder, a list of cases, a pair of scans or DICOM; and their clinical values.

The reason why a patient cannot be predicted is stored in the case; the other patients are predicted.
"""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from scripts import keys
from scripts.cohorts import cohort
from scripts.cohorts import tables as cohort_tables
from scripts.cohorts.clinical import DEFAULT_FEATURES, FEATURES, ClinicalValueError, parse_clinical
from scripts.cohorts.cohort import Case, CohortError
from scripts.cohorts.scans import (
    UNNAMED,
    Scans,
    containers,
    counted,
    find_scans,
    first_files,
    patient_key,
    printable,
    some,
)
from scripts.cohorts.tables import Tables
from scripts.dicom.examinations import (
    HEADER,
    DicomScan,
    Examination,
    clinical_doubts,
    clinical_values,
    find_examinations,
    pair_examination,
)
from scripts.dicom.tags import DicomError
from scripts.evaluation.clinical_model import shipped_features
from scripts.imaging.images import image_suffix

logger = logging.getLogger(__name__)

LISTS = (".csv", ".json")
_COLUMNS = {
    keys.CT: frozenset(("ct", "ctpath", "ctfile", "ctimage")),
    keys.PET: frozenset(("pet", "pt", "petpath", "ptpath", "petfile", "petimage")),
}


class NoScanError(CohortError):
    """No file has the name of a scan; there may still be two image files."""


def find_cases(
    source: str | Path,
    features: Sequence[str] = DEFAULT_FEATURES,
    clinical: str | Path | None = None,
    results: str | Path | None = None,
) -> list[Case]:
    """The cases in a folder of images, in a folder of DICOM, or in a list.

    Args:
        source: a folder in a layout of :func:`scripts.cohorts.scans.find_scans`; a folder of DICOM files; or a CSV or
            JSON list of cases (:func:`listed_cases`).
        features: names of the clinical values to read, in the network's order.
        clinical: a table of clinical values (CSV or JSON); None: searched beside the scans.
        results: folder of the results, which is not searched if it is in ``source``.

    Raises:
        CohortError: there is nothing to predict, or a table cannot be read.
    """
    source = Path(source).expanduser()
    cases = _find_cases(source, features, clinical, _within(results, source))
    twice = sorted(name for name, count in Counter(case[keys.PATIENT_ID] for case in cases).items() if count > 1)
    if twice:
        raise CohortError(f"{source}: several patients are called {', '.join(twice)}; rename them")
    if clinical and not any(case[keys.CLINICAL_FOUND] for case in cases):
        tables = cohort_tables.read_tables([clinical], features)
        cohort.require_rows(tables, [patient_key(case[keys.PATIENT_ID]) for case in cases], source)
    return cases


def _within(folder: str | Path | None, source: Path) -> list[Path]:
    """A folder as a path below ``source``; none where it is not below it."""
    if folder is None:
        return []
    root, place = source.resolve(), Path(folder).expanduser().resolve()
    return [source / place.relative_to(root)] if root in place.parents else []


def _find_cases(
    source: Path, features: Sequence[str], clinical: str | Path | None, without: Sequence[Path]
) -> list[Case]:
    if source.is_file() and source.suffix.lower() in LISTS:
        return listed_cases(source, features, clinical)
    if not source.is_dir():
        if source.exists():
            raise NoScanError(f"{source} is a single file, neither a folder nor a list of cases (.csv, .json)")
        raise CohortError(f"{source} does not exist")
    found = find_scans(source, without)[0].values()
    if any(scans.ct or scans.pet or scans.contradiction("ct", "pet") for scans in found):
        cases, _ = cohort.folder_cases(source, clinical, features, without)
        return _with_dicom_beside(cases, features, clinical, source, without)
    try:
        cases = _dicom_cases(find_examinations(source, without), features, clinical, source)
        if empty := [str(scans.folder) for scans in found if scans.folder != source and not first_files(scans.folder)]:
            logger.warning("folders without a file: %s", printable(some(empty)))
        return cases
    except DicomError as error:
        raise NoScanError(
            f"{source} holds no scan: neither <PatientID>/<PatientID>__CT.nii.gz and __PT.nii.gz (or .nii, .mha, "
            f".nrrd) nor DICOM files. {error}"
        ) from error


def listed_cases(
    path: str | Path, features: Sequence[str] = DEFAULT_FEATURES, clinical: str | Path | None = None
) -> list[Case]:
    """The cases of a list: one row (CSV) or object (JSON) for each patient with ``patient_id``, ``ct`` and ``pet``.

    Further columns may hold clinical values. Paths are relative to the list's folder, or absolute; a path may also be a
    folder with the DICOM series.

    Raises:
        CohortError: not such a list, or an error that concerns no single patient.
    """
    path = Path(path)
    records = cohort_tables.read_records(path)
    titles = records[0][1] if records else []
    place = {kind: cohort_tables.first_column(titles, names) for kind, names in _COLUMNS.items()}
    if min(place.values()) < 0:
        raise CohortError(f"{path}: a list of cases has the columns patient_id, ct and pet; it has {', '.join(titles)}")
    read_here = frozenset[str]().union(*_COLUMNS.values())
    tables = cohort_tables.read_tables([path, *([clinical] if clinical else [])], features, read_here)
    column = cohort_tables.first_column(titles, cohort_tables.ID_COLUMNS)
    scans: dict[str, Scans] = {}
    for row, cells in records[1:]:
        cells = cells + [""] * (len(titles) - len(cells))
        if not cells[column]:
            name = f"row {row}"
            scans.setdefault(patient_key(name), Scans(name, path, problem=f"{path.name}, {name}: no PatientID"))
        else:
            files = {kind: path.parent / cells[at] if cells[at] else None for kind, at in place.items()}
            scans.setdefault(patient_key(cells[column]), Scans(cells[column], path, files[keys.CT], files[keys.PET]))
    if clinical:
        cohort.require_rows(cohort_tables.read_tables([clinical], features), scans, path)
    cases = cohort.cases_to_predict(scans, scans, tables, features, str(path))
    for case in cases:
        if case[keys.CT] and case[keys.PET] and Path(case[keys.CT]).is_dir() and Path(case[keys.PET]).is_dir():
            try:
                _take_dicom(case, pair_examination(case[keys.CT], case[keys.PET]), features)
            except DicomError as error:
                case[keys.PROBLEM] = "; ".join(filter(None, [str(error), case[keys.PROBLEM]]))
    return cases


def pair_case(
    ct: str | Path, pet: str | Path, features: Sequence[str] = DEFAULT_FEATURES, patient_id: str | None = None
) -> Case:
    """The case of one CT and one PET, with clinical values from the DICOM header only.

    Args:
        ct: image file, or a folder with the DICOM series.
        pet: likewise.
        features: names of the clinical values, in the network's order.
        patient_id: id of the patient; None: from the CT's file name or the DICOM header.

    Raises:
        CohortError: a path does not exist, or one is a folder and the other a file.
        scripts.dicom.tags.DicomError: a folder holds no DICOM.
    """
    paths = {"CT": Path(ct).expanduser(), "PET": Path(pet).expanduser()}
    for name, path in paths.items():
        if not path.exists():
            raise CohortError(f"{name} {path} does not exist")
    if paths["CT"].is_dir() != paths["PET"].is_dir():
        raise CohortError("of CT and PET, one is a folder (DICOM) and the other a file: give two files or two folders")
    if not paths["CT"].is_dir():
        name = paths["CT"].name.removesuffix(image_suffix(paths["CT"]))
        name = re.sub(r"__CT$", "", name, flags=re.IGNORECASE)
        scans = Scans(patient_id or name, paths["CT"].parent, paths["CT"], paths["PET"])
        return {**cohort.make_case(scans, None, features, False), keys.PROBLEM: ""}
    return examination_case(pair_examination(paths["CT"], paths["PET"]), paths["CT"], features, patient_id=patient_id)


def examination_case(
    examination: Examination,
    place: Path,
    features: Sequence[str] = DEFAULT_FEATURES,
    tables: Tables | None = None,
    problems: Mapping[str, Sequence[str]] | None = None,
    patient_id: str | None = None,
) -> Case:
    """The case of a PET/CT in DICOM, with age and sex from its headers where no table has them.

    Args:
        examination: the PET/CT, or why there is none, which becomes the case's problem.
        place: where it was found, for messages.
        features: names of the clinical values, in the network's order.
        tables: of clinical values.
        problems: of patients in the tables, by key, see :func:`scripts.cohorts.cohort.patient_problems`.
        patient_id: id of the patient; None: that of the header.
    """
    tables, key = tables or Tables(), patient_key(patient_id or examination.patient_id or UNNAMED)
    scans = Scans(patient_id or examination.name, place)
    case = cohort.make_case(scans, tables.records.get(key), features, bool(tables.files))
    case[keys.PROBLEM] = "; ".join((problems or {}).get(key, []))
    if examination.sharing and key in tables.records:
        case[keys.PROBLEM] = (
            f"its row of the table may be another's: several people have this PatientID, by {examination.sharing}"
        )
    _take_dicom(case, examination, features)
    return case


def add_clinical_values(cases: Sequence[Case], values: Mapping[str, Any], source: str) -> None:
    """Set clinical values of a single case, replacing known ones.

    Args:
        cases: one case, changed in place.
        values: raw values by feature name or column name; None and values the model does not read are ignored.
        source: of the values, for messages and the output.

    Raises:
        CohortError: there are several patients.
        scripts.cohorts.clinical.ClinicalValueError: a value that the network reads cannot be read. Another one is
            missing then, with a message in the log.
    """
    given = {name: value for name, value in values.items() if value is not None}
    if not given:
        return
    if len(cases) != 1:
        raise CohortError(f"{source}: clinical values of one patient, but there are {len(cases)}; give a table of them")
    case, unused = cases[0], []
    for name, value in _parsed(given, case[keys.CLINICAL], source).items():
        if value is not None and (name in case[keys.CLINICAL] or name in shipped_features()):
            case.setdefault(keys.CLINICAL if name in case[keys.CLINICAL] else keys.CLINICAL_OTHERS, {})[name] = value
            case.setdefault(keys.CLINICAL_SOURCE, {})[name] = source
        elif value is not None:
            unused.append(name)
    if unused:
        logger.warning("%s: not read by this model: %s", source, ", ".join(unused))


def _parsed(given: Mapping[str, Any], needed: Collection[str], source: str) -> dict[str, float | None]:
    """Values by feature name; one that cannot be read is an error if it is needed, otherwise missing."""
    found = parse_clinical(given, [name for name in FEATURES if name in needed], where=source)
    for name in (name for name in FEATURES if name not in needed):
        try:
            found |= parse_clinical(given, [name], where=source)
        except ClinicalValueError as error:
            logger.warning("%s: read as missing", error)
    return found


def clinical_object(path: str | Path) -> dict[str, Any] | None:
    """The content of a JSON file of one patient without an id (``ehr.json``); None for a table.

    Raises:
        CohortError: the file cannot be read, is not valid JSON, or has no known clinical value.
    """
    if Path(path).suffix.lower() != ".json":
        return None
    content = cohort_tables.read_json(path)
    if not isinstance(content, dict):
        return None
    plain = [name for name, value in content.items() if not isinstance(value, dict | list)]
    if cohort_tables.first_column(plain, cohort_tables.ID_COLUMNS) >= 0:
        return None
    cohort_tables.check_names(content, str(path))
    return content


def _with_dicom_beside(
    cases: Sequence[Case], features: Sequence[str], clinical: str | Path | None, folder: Path, without: Sequence[Path]
) -> list[Case]:
    """Cases of image files and those of DICOM in the same folder, except DICOM within a patient's folder.

    Folders in ``without`` are ignored.
    """
    files = [Path(case[kind]) for case in cases for kind in (keys.CT, keys.PET) if case[kind]]
    own = {file.parent for file in files} - {folder, *containers(folder)}
    having = {patient_key(case[keys.PATIENT_ID]) for case in cases if case[keys.CT] or case[keys.PET]}
    try:
        found = find_examinations(folder, {*own, *without})
    except DicomError:  # there is none
        return list(cases)
    for each in (each for each in found if patient_key(each.patient_id) in having):
        logger.warning("%s: has image files; the DICOM of this patient is not read", each.name)
    found = [each for each in found if patient_key(each.patient_id) not in having]
    beside = _dicom_cases(found, features, clinical, folder, table_alone=False)
    names = {patient_key(case[keys.PATIENT_ID]) for case in beside if case[keys.CT]}
    names |= _folders_of(beside, folder) - {patient_key(case[keys.PATIENT_ID]) for case in cases if _has_row(case)}
    kept = [case for case in cases if patient_key(case[keys.PATIENT_ID]) not in names - having]
    known = {patient_key(case[keys.PATIENT_ID]) for case in kept}
    return kept + [case for case in beside if patient_key(case[keys.PATIENT_ID]) not in known]


def _folders_of(cases: Sequence[Case], folder: Path) -> set[str]:
    """Names, as patient keys, of the folders that hold the DICOM of cases: the PatientID there may be another."""
    choices = [case[keys.DICOM] for case in cases if case[keys.CT]]
    paths = [path for choice in choices for path in (choice.ct.paths[0], choice.pet.paths[0])]
    return {patient_key(name) for path in paths for name in path.relative_to(folder).parts[:-1]}


def _has_row(case: Case) -> bool:
    """Whether clinical values of the case are known, which are not those of a patient with another id."""
    return any(value is not None for name in (keys.CLINICAL, keys.CLINICAL_OTHERS) for value in case[name].values())


def _dicom_cases(
    found: Sequence[Examination],
    features: Sequence[str],
    clinical: str | Path | None,
    folder: Path,
    table_alone: bool = True,
) -> list[Case]:
    """Cases of DICOM examinations; with ``table_alone`` also of patients who are only in a table of the folder."""
    ids = {patient_key(each.patient_id or UNNAMED) for each in found}
    paths = [clinical] if clinical else cohort_tables.find_tables(folder, ids)
    tables = cohort_tables.read_tables(paths, features)
    problems = cohort.patient_problems(tables, features)
    cases = [examination_case(each, folder, features, tables, problems) for each in found]
    absent = sorted(set(tables.records) - ids)
    if table_alone and absent and all(folder.resolve() in Path(path).resolve().parents for path in tables.files):
        cases += cohort.cases_to_predict(absent, {}, tables, features, str(folder))
    elif absent:
        logger.info("without DICOM in %s: %s of the tables: %s", folder, counted(len(absent), "patient"), some(absent))
    return cases


def _take_dicom(case: Case, examination: Examination, features: Sequence[str]) -> None:
    """Set the selected series of a case, and age and sex if not known otherwise; log the selection."""
    case[keys.CT] = case[keys.PET] = None
    patient = case[keys.PATIENT_ID]
    for series in examination.passed_over:
        logger.info("%s: passed over: %s: of a study without CT and PET", patient, series.label)
    if examination.choice is None:
        case[keys.PROBLEM] = "; ".join(filter(None, [examination.problem, case[keys.PROBLEM]]))
        return
    choice = examination.choice
    case[keys.DICOM] = choice
    case[keys.FINGERPRINT] = cohort.files_fingerprint([*choice.ct.paths, *choice.pet.paths])
    for line in choice.describe().splitlines():
        logger.info("%s: %s", patient, line)
    if examination.name != examination.patient_id:  # the name alone does not identify the patient
        logger.info("%s: CT from %s", patient, choice.ct.paths[0].parent)
    if examination.sharing:
        logger.warning("%s: several people have this PatientID, by %s", patient, examination.sharing)
    doubts = list(choice.doubts)
    for name, value in clinical_values(choice, FEATURES).items():
        values = case[keys.CLINICAL if name in features else keys.CLINICAL_OTHERS]
        if values.get(name) is None:
            values[name] = value
            case.setdefault(keys.CLINICAL_SOURCE, {})[name] = HEADER
            doubts += [doubt for of, doubt in clinical_doubts(choice).items() if of == name]
    case[keys.CT], case[keys.PET] = DicomScan(choice.ct), DicomScan(choice.pet, tuple(doubts))
