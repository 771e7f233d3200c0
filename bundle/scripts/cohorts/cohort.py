"""Cases from a HECKTOR folder and its tables.

The files of each patient (:mod:`scripts.cohorts.scans`) and the rows of the tables (:mod:`scripts.cohorts.tables`) are
merged into cases. Patients that are not used are listed in :attr:`Cohort.exclusions`, unusual but usable data in
:attr:`Cohort.notes`. Faults raise a :class:`CohortError` that lists all of them.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import pandas as pd

from scripts import keys
from scripts.cohorts import clinical
from scripts.cohorts.clinical import DEFAULT_FEATURES
from scripts.cohorts.folds import PROTOCOLS, Split
from scripts.cohorts.scans import (
    CohortError,
    Scans,
    clean_id,
    counted,
    find_scans,
    first_files,
    list_faults,
    patient_key,
    printable,
    some,
)
from scripts.cohorts.tables import Record, Tables, centre_name, find_tables, read_tables
from scripts.keys import Case

logger = logging.getLogger(__name__)

FILES_SHOWN = 3  # of a folder without scans
RECORD_FILE = "cohort.json"
"""File in the folder of a synthetic cohort that describes it."""


@dataclass(frozen=True)
class Exclusion:
    """An excluded patient."""

    patient_id: str  # the patient
    reason: str  # the same text for all patients with this fault
    detail: str = ""  # specific to this patient, such as the path that was expected


def make_case(scans: Scans | None, record: Record | None, features: Sequence[str], has_tables: bool) -> Case:
    """The dictionary of one patient, with a "known" flag for each label; without tables, no row counts as missing."""
    files = {kind: getattr(scans, kind) if scans else None for kind in ("ct", "pet", "mask")}
    values = record.values if record else {}
    patient_id = clean_id(scans.patient_id if scans else record.patient_id if record else "")
    survival_known = "rfs" in values and "relapse" in values and values["rfs"] > 0
    return {
        keys.PATIENT_ID: patient_id,
        keys.CENTRE: (record.centre if record else "") or centre_name("", patient_id),
        keys.CT: _text(files["ct"]),
        keys.PET: _text(files["pet"]),
        keys.MASK: _text(files["mask"]),
        keys.CLINICAL: {name: values.get(name) for name in features},
        keys.CLINICAL_OTHERS: _others(record, features),
        keys.CLINICAL_FOUND: record is not None or not has_tables,
        keys.HPV: float(values.get("hpv", 0.0)),
        keys.HPV_KNOWN: "hpv" in values,
        keys.TIME: values["rfs"] if survival_known else 0.0,
        keys.EVENT: bool(survival_known and values["relapse"] == 1.0),
        keys.SURV_KNOWN: survival_known,
        keys.SEG_KNOWN: files["mask"] is not None,
        keys.FINGERPRINT: files_fingerprint(files.values()),
    }


def _others(record: Record | None, features: Sequence[str]) -> dict[str, float]:
    """Known clinical values besides ``features``; the HPV status is a label and, in such a model, a value."""
    known = {**record.others, **record.values} if record else {}
    return {name: known[name] for name in clinical.FEATURES if name in known and name not in features}


def _text(path: Path | None) -> str | None:
    return None if path is None else str(path)


def files_fingerprint(paths: Iterable[Path | None]) -> str:
    """Hash of the sizes and times of files, so that a cache keyed by the case detects changed files."""
    files = [path if path and path.is_file() else None for path in paths]
    stats = [(path.stat().st_size, path.stat().st_mtime_ns) if path else None for path in files]
    return hashlib.sha256(repr(stats).encode()).hexdigest()[:16]


def describe_cases(dataset_dir: str, centres: Sequence[str]) -> str:
    """One line on what cases of these centres are, for whoever was trained or evaluated on them.

    The record in their folder says whether they are phantoms.
    """
    root = Path(dataset_dir).expanduser().resolve()
    records = [folder / RECORD_FILE for folder in (root, root.parent)]  # dataset_dir may be the images' folder
    notices = [json.loads(path.read_text(encoding="utf-8")).get("notice", "") for path in records if path.is_file()]
    if any("phantom" in notice.lower() for notice in notices):
        return f"{len(centres)} digital phantoms, not for clinical use"
    names = sorted(set(centres))
    listed = f"{len(names)} {'centre' if len(names) == 1 else 'centres'} ({', '.join(names)})"
    return f"{len(centres)} cases of {listed}; research use only, not for clinical use"


@dataclass
class Cohort:
    """The cases of a data set, the excluded patients and notes."""

    dataset_dir: str  # folder the cohort was read from
    cases: list[Case]  # case dictionaries, see scripts.keys, sorted by patient id
    exclusions: list[Exclusion] = field(default_factory=list)  # patients left out, sorted by reason and patient id
    notes: list[str] = field(default_factory=list)  # unusual but usable data
    files: list[str] = field(default_factory=list)  # the tables read
    columns: dict[str, list[str]] = field(default_factory=dict)  # feature or label name -> columns it was read from

    def describe(self) -> str:
        """A table of counts by centre, the share of known values, and exclusions with reasons."""
        flags = (
            ("mask", keys.SEG_KNOWN),
            ("HPV known", keys.HPV_KNOWN),
            ("HPV+", keys.HPV),
            ("survival", keys.SURV_KNOWN),
        )
        counted = {title: [int(case[key]) for case in self.cases] for title, key in (*flags, ("events", keys.EVENT))}
        cases = pd.DataFrame({"cases": 1, **counted}, index=[case[keys.CENTRE] for case in self.cases])
        rows = pd.concat([cases.groupby(level=0).sum(), cases.sum().to_frame("all").T]).rename_axis(columns="centre")
        lines = [
            f"cohort {self.dataset_dir}",
            f"tables: {', '.join(self.files) or 'none'}",
            *rows.to_string().split("\n"),
        ]
        lines += self._describe_features()
        lines.append(f"excluded: {len(self.exclusions)}")
        lines += [f"  {text}" for text in _by_reason(self.exclusions)]
        lines += [f"note: {note}" for note in self.notes]
        return "\n".join(lines)

    def _describe_features(self) -> list[str]:
        """The share of cases in which each clinical value is known."""
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
        """Hash of patients, labels and clinical values; file paths do not matter.

        If it changes, the folds change too: a model trained on the old folds no longer matches them.
        """
        places = (keys.CT, keys.PET, keys.MASK, keys.FINGERPRINT, keys.CLINICAL_OTHERS)
        facts = [sorted((name, value) for name, value in case.items() if name not in places) for case in self.cases]
        return hashlib.sha256(repr(facts).encode()).hexdigest()[:16]

    def statement(self, cases: Sequence[Case] | None = None) -> str:
        """:func:`describe_cases` of some cases (default: the whole cohort)."""
        cases = self.cases if cases is None else cases
        return describe_cases(self.dataset_dir, [case[keys.CENTRE] for case in cases])

    def split(self, protocol: str = "partial", num_folds: int = 3, fold: int = 0, seed: int = 0) -> Split:
        """Training, validation and, where the protocol has them, test cases of one fold, each sorted by patient id.

        - ``partial`` divides all cases into folds.
        - ``full`` divides the cases with mask and HPV status, and adds all others to the validation set of every fold.
        - ``ablation`` is one split into 60 % training, 30 % validation and 10 % test: there is fold 0 only, and
          ``num_folds`` is ignored.
        - ``leave_one_centre_out`` validates on one centre and trains on the others: fold k is the k-th of
          :attr:`centres`, and nothing is random.

        Cases are sorted by event (unknown is a group of its own) and centre, shuffled within groups and assigned
        in turn: folds differ by at most one case in size and in events.

        Args:
            protocol: a key of :data:`PROTOCOLS`.
            num_folds: number of folds, at least 2; the number of centres for ``leave_one_centre_out``.
            fold: which fold is validated, from 0.
            seed: seed of the shuffle.

        Raises:
            CohortError: there is no such protocol or fold, or there are too few cases or centres for it.
        """
        if protocol not in PROTOCOLS:
            raise CohortError(f"unknown protocol '{protocol}'; known are {', '.join(PROTOCOLS)}")
        return PROTOCOLS[protocol](self.cases, num_folds, fold, seed)


def _by_reason(exclusions: Sequence[Exclusion]) -> list[str]:
    """One line for each reason with the number of patients and the first of them."""
    reasons: dict[str, list[Exclusion]] = {}
    for exclusion in exclusions:
        reasons.setdefault(exclusion.reason, []).append(exclusion)
    lines = []
    for reason, group in reasons.items():
        names = [item.patient_id + (f" ({item.detail})" if item.detail else "") for item in group]
        lines.append(f"{len(group)} x {reason}: {some(names)}")
    return lines


def load_cohort(
    dataset_dir: str | Path | None,
    ehr_csv: str | Path | Sequence[str | Path] | None = None,
    clinical_features: Sequence[str] = DEFAULT_FEATURES,
    require_images: bool = True,
) -> Cohort:
    """Read a cohort for training or evaluation.

    Excluded and reported: patients without CT or PET, with RFS <= 0, without a row and without a mask, or with no
    label at all. A patient with a mask but no row is kept; the clinical values and other labels are unknown.

    Args:
        dataset_dir: folder with the scans, see :func:`find_scans`; None: tables only, given by ``ehr_csv``.
        ehr_csv: table or tables; None: those found by :func:`find_tables`. A relative path is relative to the working
            folder or, if there is no such file, to ``dataset_dir``.
        clinical_features: names of the clinical values to read, in the network's order.
        require_images: False keeps patients without scans (for models of clinical values only).

    Raises:
        CohortError: faults in files or tables (all of them are listed), or no usable case.
    """
    scans, tables, notes = _gather(dataset_dir, ehr_csv, clinical_features, require_images)
    if tables.faults:
        title = f"{', '.join(map(str, tables.files))}: cannot be used as it is"
        raise CohortError(list_faults(title, [fault.message for fault in tables.faults]))
    if require_images:
        require_rows(tables, scans, dataset_dir)
    cases, exclusions = [], []
    for key in sorted({*scans, *tables.records}):
        reason = _reason_to_exclude(scans.get(key), tables.records.get(key), require_images)
        case = make_case(scans.get(key), tables.records.get(key), clinical_features, bool(tables.files))
        if reason is None:
            cases.append(case)
        else:
            exclusions.append(Exclusion(case[keys.PATIENT_ID], *map(printable, reason)))
    exclusions.sort(key=lambda item: (item.reason, patient_key(item.patient_id)))
    source = str(dataset_dir or ", ".join(map(str, tables.files)))
    if not cases:
        raise CohortError("\n  ".join([f"{source}: no case can be used", *_by_reason(exclusions)]))
    notes += [*_lost_zeros(tables, scans), *_notes_on_tables(tables, cases, clinical_features)]
    if require_images:
        notes += _notes_on_tasks(cases)
    cohort = Cohort(source, cases, exclusions, notes, list(map(str, tables.files)), tables.columns)
    logger.info("%s", cohort.describe())
    return cohort


def split_cohort(cohort: Cohort, protocol: str, num_folds: int, fold: int, seed: int, divided: bool = True) -> Split:
    """:meth:`Cohort.split` as a config calls it.

    Another cohort, of any size, is evaluated as a whole: not ``divided``, all its cases are test cases.
    """
    return cohort.split(protocol, num_folds, fold, seed) if divided else Split([], [], list(cohort.cases))


def _gather(
    dataset_dir: str | Path | None,
    ehr_csv: str | Path | Sequence[str | Path] | None,
    features: Sequence[str],
    require_images: bool,
    without: Sequence[Path] = (),
) -> tuple[dict[str, Scans], Tables, list[str]]:
    """Scans and tables of a cohort, before they are merged."""
    for name in features:
        clinical.feature_named(name)
    if dataset_dir is None and (ehr_csv is None or require_images):
        raise CohortError("without a dataset_dir, a table must be named (ehr_csv) and require_images be False")
    root = Path(dataset_dir or ".").expanduser()
    scans, notes = find_scans(root, without) if dataset_dir is not None else ({}, [])
    if require_images and not any(
        found.ct or found.pet or found.contradiction("ct", "pet") for found in scans.values()
    ):
        what = (
            f"{dataset_dir} holds no scan: expected <PatientID>/<PatientID>__CT.nii.gz and __PT.nii.gz (or .nii, .mha, "
            ".nrrd) there, or in images/, Task N/ or imagesTr/ below it"
        )
        raise CohortError("\n  ".join([what, *notes]))
    if ehr_csv is None:
        paths = find_tables(root, scans)
    else:
        named = [ehr_csv] if isinstance(ehr_csv, str | Path) else list(ehr_csv)
        paths = [_locate_table(Path(path).expanduser(), root) for path in named]
    return scans, read_tables(paths, features), notes


def require_rows(tables: Tables, patients: Iterable[str], place: str | Path | None) -> None:
    """Check that the tables given have a row for at least one of the patients (keys) with scans.

    Raises:
        CohortError: they have none.
    """
    known, there = set(tables.records), set(patients)
    if not tables.files or not there or known & there or tables.faults:
        return
    bare = {_without_zeros(key) for key in there}
    as_numbers = any(_without_zeros(key) in bare for key in known)
    hint = "; zeros in front are lost or '.0' is added, as spreadsheets do" if as_numbers else ""
    raise CohortError(
        f"{', '.join(map(str, tables.files))}: no row belongs to a patient of {place}; PatientID in the table: "
        f"{some(sorted(known)) if known else 'none'}; of the scans: {some(sorted(there))}{hint}; correct the ids, or "
        "leave the table out"
    )


def _lost_zeros(tables: Tables, patients: Iterable[str]) -> list[str]:
    """A note on rows that would belong to a patient with scans if the id were not written as a number."""
    there = set(patients)
    bare = {_without_zeros(key): key for key in sorted(there - set(tables.records))}
    lost = {
        key: bare[_without_zeros(key)] for key in sorted(set(tables.records) - there) if _without_zeros(key) in bare
    }
    listed = some([f"{key} (scans: {patient})" for key, patient in lost.items()])
    message = "belong to no patient, perhaps since a spreadsheet dropped zeros in front of the PatientID or added '.0'"
    return [f"{len(lost)} rows {message}: {listed}; correct the ids"] if lost else []


def _without_zeros(key: str) -> str:
    return re.sub(r"(?<![0-9.])0+(?=[0-9])|\.0+$", "", key)


def _locate_table(path: Path, dataset_dir: Path) -> Path:
    inside = dataset_dir / path
    return inside if not path.is_file() and inside.is_file() else path


def _reason_to_exclude(scans: Scans | None, record: Record | None, require_images: bool) -> tuple[str, str] | None:
    """Why a patient is excluded from training and evaluation: (reason, detail), or None."""
    rows = "; ".join(record.rows) if record else ""
    if require_images and scans is not None and scans.contradictions:
        return "image files that contradict each other", scans.contradiction("ct", "pet", "mask")
    if require_images and scans is not None and scans.problem:
        return "scans that cannot be read", scans.problem
    if require_images and (scans is None or not (scans.ct or scans.pet)):
        return (
            "row in the table but no scans" if record else "no scans",
            "; ".join(filter(None, [_bare(scans), rows])),
        )
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


def _bare(scans: Scans | None) -> str:
    """What there is of a patient without CT and PET, "" where there is nothing."""
    if scans is None:
        return ""
    if scans.mask:
        return f"only the mask {scans.mask}"
    files = first_files(scans.folder, FILES_SHOWN)
    held = f"holds {', '.join(files)}{' ...' if len(files) == FILES_SHOWN else ''}" if files else "holds no file"
    patient = scans.patient_id
    return f"{scans.folder} {held}; expected {patient}__CT.nii.gz and {patient}__PT.nii.gz (or .nii, .mha, .nrrd)"


def _notes_on_tables(tables: Tables, cases: Sequence[Case], features: Sequence[str]) -> list[str]:
    """Notes on missing columns, rows and values."""
    if not tables.files:
        return ["no table found: clinical values, HPV status and survival are unknown for every case"]
    notes = tables.notes((*features, "rfs", "relapse", "hpv"))
    no_row = [case[keys.PATIENT_ID] for case in cases if not case[keys.CLINICAL_FOUND]]
    if no_row:
        notes.append(f"{len(no_row)} with a mask but no row in a table are kept, all else unknown: {some(no_row)}")
    half = [
        record.patient_id
        for record in tables.records.values()
        if ("rfs" in record.values) != ("relapse" in record.values)
    ]
    if half:
        notes.append(f"{len(half)} have only one of RFS and Relapse, so survival is unknown: {some(half)}")
    times = [case[keys.TIME] for case in cases if case[keys.SURV_KNOWN]]
    if len(times) >= 20 and max(times) < 200:
        notes.append(f"the longest RFS is {max(times):g}, read as days: is it in months or years?")
    return notes


def _notes_on_tasks(cases: Sequence[Case]) -> list[str]:
    """Notes on tasks that no network can learn from the cases, since no label tells them apart."""
    statuses = {case[keys.HPV] for case in cases if case[keys.HPV_KNOWN]}
    lacking = {
        keys.TASK_SEG: "" if any(case[keys.SEG_KNOWN] for case in cases) else "no case has a mask",
        keys.TASK_HPV: ("no case has a known HPV status", "every known HPV status is the same", "")[len(statuses)],
        keys.TASK_SURV: "" if any(case[keys.EVENT] for case in cases) else "no case has a relapse with its RFS",
    }
    message = "a network that is trained on these cases does not learn this task; choose the others with --tasks"
    return [f"task {task}: {why}; {message}" for task, why in lacking.items() if why]


def inference_cases(
    dataset_dir: str | Path,
    ehr_csv: str | Path | Sequence[str | Path] | None = None,
    clinical_features: Sequence[str] = DEFAULT_FEATURES,
) -> list[Case]:
    """Every patient to predict, including those that cannot be predicted, so that each has a row in the output.

    Labels are optional, and faults in them are ignored. ``case[keys.PROBLEM]`` says why a patient cannot be predicted
    (CT or PET missing, a clinical value that cannot be read, two rows); it is empty otherwise. Patients that are only
    in a table are listed if the table is in ``dataset_dir``, and only logged if it is elsewhere: it may be the table of
    a larger cohort.

    Returns:
        Cases as in :func:`load_cohort`, sorted by patient id, CT or PET None where missing.

    Raises:
        CohortError: the folder holds no scan, a table cannot be read, or a table given has a row for no patient.
    """
    cases, tables = folder_cases(dataset_dir, ehr_csv, clinical_features)
    if ehr_csv is not None:
        require_rows(tables, [patient_key(case[keys.PATIENT_ID]) for case in cases], dataset_dir)
    return cases


def folder_cases(
    dataset_dir: str | Path,
    ehr_csv: str | Path | Sequence[str | Path] | None,
    clinical_features: Sequence[str],
    without: Sequence[Path] = (),
) -> tuple[list[Case], Tables]:
    """The cases of :func:`inference_cases`, without the check of :func:`require_rows`, and the tables.

    Folders in ``without`` are ignored.
    """
    scans, tables, notes = _gather(dataset_dir, ehr_csv, clinical_features, True, without)
    for note in notes:
        logger.warning("%s", note)
    for note in _lost_zeros(tables, scans):
        logger.warning("%s", note)
    masks_only = {key for key, found in scans.items() if _mask_alone(found)}
    rows_only = set(tables.records) - set(scans)
    root = Path(dataset_dir).expanduser().resolve()
    if not all(root in path.resolve().parents for path in tables.files):
        if rows_only:
            listed = some(sorted(rows_only))
            absent = counted(len(rows_only), "patient")
            logger.info("without scans in %s: %s of the tables: %s", dataset_dir, absent, listed)
        rows_only = set()
    folders_only = {key for key, found in scans.items() if found.unlike_a_patient}
    left_alone = masks_only - set(tables.records)
    if left_alone:
        logger.warning("masks without scans are ignored: %s", some(sorted(left_alone)))
    if no_patients := folders_only - set(tables.records):
        folders = printable(some([str(scans[key].folder) for key in sorted(no_patients)]))
        logger.warning("folders without CT and PET as image files, perhaps of no patient: %s", folders)
        left_alone |= no_patients
    patients = sorted({*scans, *rows_only} - left_alone)
    without_masks = {key: replace(found, mask=None) for key, found in scans.items()}  # they have no part in it
    return cases_to_predict(patients, without_masks, tables, clinical_features, str(dataset_dir)), tables


def _mask_alone(scans: Scans) -> bool:
    """Whether a patient has a mask, or several, and no scan or problem with one."""
    says = scans.ct or scans.pet or scans.problem or scans.contradiction("ct", "pet")
    return bool(scans.mask or scans.contradiction("mask")) and not says


def cases_to_predict(
    patients: Iterable[str], scans: Mapping[str, Scans], tables: Tables, features: Sequence[str], place: str
) -> list[Case]:
    """Cases of the patients with these keys; ``case[keys.PROBLEM]`` says why one cannot be predicted.

    Raises:
        CohortError: a table has a fault that affects all patients.
    """
    problems = patient_problems(tables, features)
    cases = []
    for key in patients:
        case = make_case(scans.get(key), tables.records.get(key), features, bool(tables.files))
        missing = [name for name, kind in (("CT", keys.CT), ("PET", keys.PET)) if case[kind] is None]
        found = scans.get(key)
        lost = (found.contradiction("ct", "pet") or found.problem) if found else ""
        lacking = [lost or f"no {' and no '.join(missing)} found in {found.folder if found else place}"]
        case[keys.PROBLEM] = printable("; ".join([*(lacking if missing else []), *problems.get(key, [])]))
        cases.append(case)
    return cases


def patient_problems(tables: Tables, features: Sequence[str]) -> dict[str, list[str]]:
    """Why patients cannot be predicted, by patient key; notes on the tables are logged.

    A row that matches no patient is ignored with a warning. A fault that affects a whole table is raised.
    """
    problems: dict[str, list[str]] = {}
    for note in tables.notes(features, clinical.FEATURES):
        logger.warning("%s", note)
    for fault in tables.faults:
        if fault.label:
            logger.warning("label ignored: %s", fault.message)
        elif fault.nobodys:
            logger.warning("row ignored: %s", fault.message)
        else:
            problems.setdefault(fault.patient, []).append(fault.message)
    if "" in problems:
        raise CohortError(list_faults(f"{', '.join(map(str, tables.files))}: cannot be used as it is", problems[""]))
    return problems


def default_dataset_dir(bundle_root: str | Path) -> str:
    """Folder of the demonstration cohort, ``<bundle_root>/data/demonstration``.

    Raises:
        FileNotFoundError: it has not been made yet; the message says how to.
    """
    path = Path(bundle_root).resolve() / "data" / "demonstration"
    if not path.is_dir() or not find_scans(path)[0]:
        raise FileNotFoundError(
            f"no dataset_dir given and no demonstration cohort at {path}: make it with "
            f"`python scripts/make_cohort.py --out {path}` in the repository's root, or give --dataset_dir"
        )
    return str(path)
