"""Files of a prediction: mask and ``prediction.json`` of each patient, ``predictions.csv`` and ``lesions.csv``."""

from __future__ import annotations

import contextlib
import csv
import hashlib
import io
import json
import logging
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ignite.engine import Events
from monai.engines import IterationEvents, Workflow

from scripts import keys
from scripts.cohorts.files import WriteError, require_writable, write_text
from scripts.cohorts.scans import UNNAMED, counted, without_formula
from scripts.imaging.images import ITK_SUFFIXES, image_suffix, write_mask
from scripts.keys import FAILED, INCOMPLETE, OK
from scripts.prediction.audit import AUDIT, append_line, audit_line
from scripts.prediction.measures import OF_LESION
from scripts.training.sampling import reason

logger = logging.getLogger(__name__)

TABLE, LESION_TABLE = "predictions.csv", "lesions.csv"
YEARS = (1, 2, 3, 5)
COLUMNS = (
    *("PatientID", "status", "reason"),
    *("log_hazard", "log_hazard_std", "percentile", "risk_group", *(f"survival_{year}y" for year in YEARS)),
    *("hpv_probability", "hpv_class"),
    *("clinical_model_values", "clinical_model_percentile", *(f"clinical_model_survival_{year}y" for year in YEARS)),
    "clinical_model_summary",  # ``trained_on`` is of the network
    *("tumour_volume_ml", "lesions", "suv_max", "mtv_ml", "tlg_g"),
    *("quality", "forced", "crop_method", "crop_flag", "trained_on", "model_sha256", "mask"),
)
LESION_COLUMNS = (
    *("PatientID", "lesion", "label", *OF_LESION, "centre_x_mm", "centre_y_mm", "centre_z_mm"),
    *("forced", "trained_on", "model_sha256"),
)
NO_CLINICAL_ROW = "no row of the clinical table has this PatientID: all clinical values are read as missing"

_LONGEST_NAME = 200  # bytes, of the 255 that file systems allow: endings of files come behind
_RESERVED = re.compile(
    r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?|(predictions|lesions)\.csv(\.partial)?|index\.html|audit\.jsonl",
    re.IGNORECASE,
)

Product = Callable[[Mapping[str, Any], Mapping[str, Any], Path], Iterable[tuple[str, str]]]


class PredictionWriter:
    """Handler that writes each patient's files and collects ``predictions.csv``, one row for *every* patient.

    A row's status is ``ok``, ``incomplete`` (predicted, but a product could not be written, or a clinical table was
    given and lacks the patient) or ``failed`` (no prediction); the reason says why. Rows go to
    ``predictions.csv.partial`` while the run lasts and take their final name at its end, together with ``lesions.csv``,
    which has one row for every lesion. ``prediction.json`` is written last of a patient's files: where it is, all that
    it names are. Of a patient that is done only the rows are kept in memory.

    Args:
        output_dir: receives ``predictions.csv``, ``lesions.csv`` and, in a folder for each patient, ``prediction.json``
            and ``<PatientID>__tumour.nii.gz`` (``.mha`` where the CT came in a format of ITK).
        cases: the datalist, which fixes the order of the rows.
        products: more to write of each patient, by what it is called: functions of the case, its result (all keys after
            the post transforms, ``prediction`` among them) and its folder, which give (name, path relative to the
            folder) of each file as soon as it is written, for ``files`` of the prediction. A product that fails is
            named in the row and costs neither the prediction nor the other products.
        audit: file that gets a line for every patient (see :mod:`scripts.prediction.audit`); ``audit.jsonl`` in
            ``output_dir`` by default.
        checkpoint: the weights, which the audit names of a patient without a prediction, too.
        viewer: npm package of niivue, with which ``viewer.html`` of each patient is written (see
            :mod:`scripts.prediction.viewer`); where it cannot be read, the log says how to get it.

    Attributes:
        rows: of ``predictions.csv``, by patient.
        lesions: rows of ``lesions.csv``, by patient.
        failures: patient to the products that could not be written, and why.
        pages: more to write of the whole cohort at the end, by the name of the file.
        problems: tables and pages that could not be written, and why.
    """

    def __init__(
        self,
        output_dir: str,
        cases: Sequence[Mapping[str, Any]],
        products: Mapping[str, Product] | None = None,
        audit: str | None = None,
        checkpoint: str | None = None,
        viewer: str | None = None,
    ) -> None:
        self.output_dir = Path(output_dir)
        self.cases = {case[keys.PATIENT_ID]: case for case in cases}
        self.folders = folder_names(self.cases)
        self.products = {**_viewer(viewer), **(products or {})}
        self.audit = Path(audit).expanduser() if audit else self.output_dir / AUDIT
        self.checkpoint = checkpoint
        self._audited: set[tuple[str, str]] = set()
        self.rows: dict[str, dict[str, Any]] = {}
        self.lesions: dict[str, list[dict[str, Any]]] = {}
        self.failures: dict[str, str] = {}
        self.pages: dict[str, Callable[[], None]] = {}
        self.problems: dict[str, str] = {}

    def attach(self, engine: Workflow) -> None:
        """Register with a :class:`scripts.training.engine.PatientEvaluator`."""
        engine.add_event_handler(Events.STARTED, lambda: require_writable(self.output_dir))
        # In the same event as the post transforms and after them: what fails here fails one patient.
        engine.add_event_handler(IterationEvents.MODEL_COMPLETED, self.write_result)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self.note_failure)
        engine.add_event_handler(Events.COMPLETED, self.write_table)

    def write_result(self, engine: Workflow) -> None:
        """Write the files of the one patient of the batch and fill its row."""
        self.write_patient({**engine.state.batch[0], **engine.state.output[0]})

    def folder(self, patient: str) -> Path:
        """Folder of a patient's files, directly below the output folder whatever the patient is called."""
        return self.output_dir / self.folders[patient]

    def write_patient(self, result: Mapping[str, Any]) -> dict[str, Any]:
        """Write a patient's files, ``prediction.json`` last, and fill the row; gives the prediction as written.

        Args:
            result: the item after the post transforms, without a batch axis.

        Raises:
            OSError: the patient's folder is a link, or cannot be written to.
        """
        prediction = dict(result[keys.PREDICTION])
        patient = prediction["patient_id"]
        case, folder = self.cases[patient], self.folder(patient)
        if is_link(folder):
            raise OSError(f"{folder} is a link: nothing is written through it; remove it or choose another OUTPUT")
        prediction["files"] = dict(prediction["files"])
        try:
            self._write_files(result, prediction, case, folder)
            prediction["fingerprint"] = case.get(keys.FINGERPRINT)
            write_text(folder / "prediction.json", json.dumps(prediction, indent=1, allow_nan=False) + "\n")
        except BaseException:
            for file in prediction["files"].values():  # no prediction: nobody shall take them for one
                with contextlib.suppress(OSError):
                    (folder / file).unlink(missing_ok=True)
            raise
        self._take(patient, prediction)
        self._note(patient, prediction)
        return prediction

    def _write_files(
        self, result: Mapping[str, Any], prediction: dict[str, Any], case: Mapping[str, Any], folder: Path
    ) -> None:
        """Write what ``prediction.json`` is to name, and name each in the ``files`` of the prediction."""
        files, patient = prediction["files"], prediction["patient_id"]
        if result.get(keys.PRED) is not None:
            files["mask"] = f"{folder.name}__tumour{mask_suffix(case.get(keys.CT))}"
            mask = np.asarray(torch.as_tensor(result[keys.PRED]).cpu())[0].astype(np.uint8, copy=False)
            affine = np.asarray(torch.as_tensor(result[keys.CT_AFFINE]), dtype=float)
            write_mask(
                folder / files["mask"], mask, affine, f"Research use; trained on {prediction['model']['trained_on']}"
            )
        failed = []
        for name, product in self.products.items():
            try:
                for kind, file in product(case, {**result, keys.PREDICTION: prediction}, folder):
                    files[kind] = file
            except Exception as error:  # whatever it is, what there is stays
                failed.append(f"no {name}: {reason(error)}")
                logger.error("%s: predicted, but %s", patient, failed[-1])
        if failed:
            self.failures[patient] = "; ".join(failed)

    def take_over(self, patient: str, sha256: str) -> bool:
        """Take the row of a patient from the ``prediction.json`` that an earlier run has left.

        Returns:
            False where there is no such file, or it is damaged, or of another model: the patient is to be predicted.
        """
        try:
            prediction = json.loads((self.folder(patient) / "prediction.json").read_text(encoding="utf-8"))
            if prediction["model"]["sha256"] != sha256 or prediction["patient_id"] != patient:
                return False
            self._take(patient, prediction)
        except (OSError, ValueError, KeyError, TypeError):
            return False
        return True

    def take_result(
        self,
        patient: str,
        row: Mapping[str, Any],
        lesions: Sequence[Mapping[str, Any]],
        audit: Sequence[str],
        problems: Mapping[str, str],
    ) -> None:
        """Take what another process, which has written the patient's files, found."""
        self.rows[patient], self.lesions[patient] = dict(row), [dict(lesion) for lesion in lesions]
        self.problems |= problems
        try:
            for line in audit:
                self.append_audit(line)
        except OSError as error:
            self._report_audit(error)

    def fail(self, patient: str, why: str) -> None:
        """Give a patient the row ``failed``."""
        self.rows[patient] = self._row(patient, FAILED, why)
        self.lesions.pop(patient, None)
        self._note(patient)

    def _note(self, patient: str, prediction: Mapping[str, Any] | None = None) -> None:
        """Write the patient's line of the audit, once; where that fails, ``problems`` says so."""
        status = self.rows[patient]["status"]
        if (patient, status) in self._audited:
            return
        self._audited.add((patient, status))
        try:
            self.append_audit(audit_line(self.cases[patient], status, self.checkpoint, prediction))
        except OSError as error:
            self._report_audit(error)

    def _report_audit(self, error: OSError) -> None:
        self.problems["audit"] = f"{self.audit}: {error.strerror}"
        logger.error("no audit: %s", self.problems["audit"])

    def append_audit(self, line: str) -> None:
        """Append a patient's line to the audit."""
        append_line(self.audit, line)

    def note_failure(self, engine: Workflow) -> None:
        """Give a failed patient its row, and keep the table so far."""
        for patient, why in engine.state.failures.items():
            self.fail(patient, why)
        self.write_partial()

    def write_partial(self) -> None:
        """Write the rows so far to ``predictions.csv.partial``."""
        with contextlib.suppress(WriteError):  # said at the end, if it cannot be written then either
            write_text(self._partial, self._table())

    def write_table(self, engine: Workflow | None = None) -> None:
        """Write tables and pages of the cohort, as far as they can be written; ``problems`` has the others."""
        for name, write in {TABLE: self._write_table, LESION_TABLE: self._write_lesions, **self.pages}.items():
            try:
                write()
            except (OSError, ValueError) as error:  # a page whose table is missing raises ValueError
                self.problems[name] = str(error)
                logger.error("no %s: %s", name, error)
                with contextlib.suppress(OSError):  # nobody shall take an earlier one for it
                    (self.output_dir / name).unlink(missing_ok=True)

    def _write_table(self) -> None:
        """Write ``predictions.csv`` and log what became of the cohort."""
        write_text(self._partial, self._table())
        self._partial.replace(self.output_dir / TABLE)
        counts = {status: sum(r["status"] == status for r in self.rows.values()) for status in (OK, INCOMPLETE, FAILED)}
        logger.info(
            "%s: %s. Written: %s",
            counted(len(self.rows), "patient"),
            ", ".join(f"{n} {status}" for status, n in counts.items()),
            self.output_dir / TABLE,
        )

    def _write_lesions(self) -> None:
        """Write ``lesions.csv``."""
        rows = [row for patient in self.cases for row in self.lesions.get(patient, [])]
        write_text(self.output_dir / LESION_TABLE, _csv(LESION_COLUMNS, rows))

    def exit_if_incomplete(self) -> None:
        """End the program with exit code 1 if any patient's row is not ``ok``, or there is no table of them.

        Raises:
            SystemExit: so that a script sees it.
        """
        if TABLE in self.problems:
            logger.error("the rows that could not be written:\n%s", self._table())
        bad = [f"{p} ({r['status']}: {r['reason']})" for p, r in self.rows.items() if r["status"] != OK]
        if bad:
            logger.error("patients that are not ok: %d of %d: %s", len(bad), len(self.rows), "; ".join(bad))
        if bad or self.problems:
            raise SystemExit(1)

    @property
    def _partial(self) -> Path:
        return self.output_dir / f"{TABLE}.partial"

    def _take(self, patient: str, prediction: Mapping[str, Any]) -> None:
        """Fill the rows of a predicted patient."""
        row, lesions = self._predicted(prediction), lesion_rows(prediction)
        self.rows[patient], self.lesions[patient] = row, lesions

    def _predicted(self, prediction: Mapping[str, Any]) -> dict[str, Any]:
        """Row of a predicted patient."""
        patient = prediction["patient_id"]
        lacking = [self.failures[patient]] if patient in self.failures else []
        lacking += [NO_CLINICAL_ROW] if self.cases[patient].get(keys.CLINICAL_FOUND) is False else []
        row = self._row(patient, INCOMPLETE if lacking else OK, "; ".join(lacking))
        row |= prediction_row(prediction)
        mask = prediction["files"].get("mask")
        return row | {"mask": f"{self.folders[patient]}/{mask}" if mask else ""}

    def _row(self, patient: str, status: str, why: str) -> dict[str, Any]:
        return {**dict.fromkeys(COLUMNS, ""), "PatientID": patient, "status": status, "reason": why}

    def _table(self) -> str:
        return _csv(COLUMNS, [self.rows[patient] for patient in self.cases if patient in self.rows])


def _viewer(niivue: str | None) -> dict[str, Product]:
    """The product that writes the viewer; none where it is not wanted or niivue is not there."""
    if niivue is None:
        return {}
    from scripts.prediction.viewer import VIEWER_HTML, ViewerError, ViewerWriter

    try:
        return {"viewer": ViewerWriter(niivue)}
    except ViewerError as error:
        logger.warning("no %s: %s", VIEWER_HTML, error)
        return {}


def _csv(columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> str:
    """A table as text; no cell is taken for a formula by a spreadsheet."""
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(
        {k: without_formula(cell) if isinstance(cell, str) else cell for k, cell in r.items()} for r in rows
    )
    return text.getvalue()


def prediction_row(prediction: Mapping[str, Any]) -> dict[str, Any]:
    """What ``predictions.csv`` says of a prediction, as ``prediction.json`` holds it, but for the mask's path.

    Where it says nothing, the cell is empty.
    """
    survival, hpv, tumour = (prediction[part] or {} for part in ("survival", "hpv", "tumour"))
    clinical = prediction["clinical_model"]
    at, clinically = (_at_years(part or {}) for part in (survival, clinical["survival"]))
    row = {
        **{name: survival.get(name) for name in ("log_hazard", "log_hazard_std", "percentile", "risk_group")},
        **{f"survival_{year}y": at.get(year) for year in YEARS},
        "hpv_probability": hpv.get("probability"),
        "hpv_class": {True: "positive", False: "negative"}.get(hpv.get("positive")),  # type: ignore[arg-type]
        "clinical_model_values": f"{clinical['known']} of {len(clinical['values'])}" if clinical["values"] else None,
        "clinical_model_percentile": (clinical["survival"] or {}).get("percentile"),
        **{f"clinical_model_survival_{year}y": clinically.get(year) for year in YEARS},
        "clinical_model_summary": clinical["summary"],
        "tumour_volume_ml": tumour.get("volume_ml"),
        **{name: tumour.get(name) for name in ("lesions", "suv_max", "mtv_ml", "tlg_g")},
        "quality": prediction["quality"]["verdict"],
        "forced": prediction["quality"]["forced"],
        "crop_method": prediction["crop"]["method"],
        "crop_flag": prediction["crop"]["flag"],
        "trained_on": prediction["model"]["trained_on"],
        "model_sha256": prediction["model"]["sha256"],
    }
    return {name: "" if value is None else value for name, value in row.items()}


def _at_years(survival: Mapping[str, Any]) -> dict[float, float]:
    return {row["years"]: row["survival"] for row in survival.get("recurrence_free_survival", [])}


def lesion_rows(prediction: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Rows of ``lesions.csv`` of a prediction, as ``prediction.json`` holds it; an unknown value is an empty cell."""
    rows = []
    for lesion in (prediction["tumour"] or {}).get("lesion_list", []):
        x, y, z = lesion["centre_mm"]
        row = {
            **{"PatientID": prediction["patient_id"], "lesion": lesion["name"], "label": lesion["label"]},
            **{name: lesion[name] for name in OF_LESION},
            **{"centre_x_mm": x, "centre_y_mm": y, "centre_z_mm": z, "forced": prediction["quality"]["forced"]},
            **{name: prediction["model"][key] for name, key in (("trained_on",) * 2, ("model_sha256", "sha256"))},
        }
        rows.append({name: "" if value is None else value for name, value in row.items()})
    return rows


def folder_name(patient_id: str) -> str:
    """The name that a patient's folder and files get: letters, digits and ``. + - _`` of the id, all else ``_``.

    No name leads out of its folder, is hidden, reserved by Windows or by the files of a cohort, or too long.

    Example:
        >>> [folder_name(name) for name in ("CHUM-001", "../a/b", "x y.", "nul", "..")]
        ['CHUM-001', 'a_b', 'x_y', 'patient_nul', 'unnamed']
    """
    name = re.sub(r"[^\w.+-]+", "_", unicodedata.normalize("NFC", patient_id)).lstrip("._-").rstrip("._") or UNNAMED
    name = f"patient_{name}" if _RESERVED.fullmatch(name) else name
    if len(name.encode()) <= _LONGEST_NAME:
        return name
    return f"{name.encode()[: _LONGEST_NAME - 9].decode(errors='ignore')}-{_digest(patient_id)}"


def folder_names(patients: Iterable[str]) -> dict[str, str]:
    """Name of each patient's folder, no two alike, whatever a file system makes of upper and lower case.

    Of patients for whom :func:`folder_name` gives the same, the one who is called so keeps the name; to those of the
    others a short hash of the id is added, and the log says so.
    """
    names = {patient: folder_name(patient) for patient in patients}
    alike = Counter(name.casefold() for name in names.values())
    kept = {name.casefold(): name for name in sorted(names, reverse=True) if names[name] == name}
    for patient, name in names.items():
        if alike[name.casefold()] > 1 and kept.get(name.casefold()) != patient:
            names[patient] = f"{name}-{_digest(patient)}"
            logger.warning("%s: another patient has the folder %s; this one's is %s", patient, name, names[patient])
    return names


def is_link(folder: Path) -> bool:
    """Whether a folder is a link to another one, or a junction of Windows."""
    return folder.is_symlink() or folder.resolve().parent != folder.parent.resolve()


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()[:8]


def mask_suffix(ct: Any) -> str:
    """Ending of the mask's file name: that of the CT's family of formats."""
    is_file = isinstance(ct, str | os.PathLike)
    return ".mha" if is_file and image_suffix(ct) in ITK_SUFFIXES else ".nii.gz"
