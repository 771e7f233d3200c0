"""The bundle's ``inference.json`` for a checkpoint, and a prediction of cases by it."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from monai.bundle import ConfigParser

from command_line import BUNDLE

from scripts import keys
from scripts.cohorts.cohort import Case
from scripts.cohorts.files import in_config
from scripts.cohorts.scans import counted
from scripts.model.ensemble import read_state
from scripts.prediction.description import Model
from scripts.prediction.dicom_results import write_dicom_results
from scripts.prediction.outputs import PredictionWriter, is_link
from scripts.training.configuration import check_device

logger = logging.getLogger("predict")

PREDICTION = "prediction.json"


class CaseList(tuple):
    """Cases that a config parser hands on as they are: no copies, and no reading of ``$`` and ``@`` in paths."""

    __slots__ = ()

    def __deepcopy__(self, memo: dict[int, Any]) -> CaseList:
        return self


def inference_config(checkpoint: Path, **changes: Any) -> ConfigParser:
    """The config with a checkpoint and other changes; texts are taken as they are, not as expressions."""
    parser = ConfigParser()
    parser.read_config(str(BUNDLE / "configs" / "inference.json"))
    parser.read_meta(str(BUNDLE / "configs" / "metadata.json"))
    values = {"bundle_root": str(BUNDLE), "checkpoint": str(checkpoint.absolute()), **changes}
    parser.update({name: in_config(value) if isinstance(value, str) else value for name, value in values.items()})
    return parser


def configure_log() -> None:
    """One line a message on the error stream; of libraries only what is wrong."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    for name in ("predict", "scripts"):
        logging.getLogger(name).setLevel(logging.INFO)


def load_bundle(
    output: str,
    ckpt_dir: str,
    device: str | None = None,
    force: bool = False,
    audit: str | None = None,
    viewer: str | None = None,
) -> ConfigParser:
    """The bundle's ``inference.json`` with its places and options set; None leaves an option to the config.

    Raises:
        FileNotFoundError: there are no weights.
        scripts.model.errors.CheckpointError: the file is none.
        scripts.training.configuration.ConfigurationError: there is no such device.
    """
    if device is not None:
        check_device(device)
    read_state(Path(ckpt_dir) / "model.pt")
    changes = {} if device is None else {"device": torch.device(device)}
    place = str(Path(output).expanduser().resolve())
    parser = inference_config(Path(ckpt_dir).expanduser() / "model.pt", output_dir=place, force=force, **changes)
    for name, value in {"audit": audit, "viewer": viewer}.items():
        if value is not None:
            parser[f"handlers#0#{name}"] = in_config(value)
    return parser


def run_cases(
    parser: ConfigParser,
    cases: Sequence[Case],
    report: bool = False,
    explain: bool = False,
    resume: bool = False,
    elsewhere: Callable[[PredictionWriter, Sequence[Case]], None] | None = None,
) -> PredictionWriter:
    """Predict the cases; what happened to each stands in the ``rows`` of the writer that is given back.

    ``elsewhere`` predicts them in other processes and gives the writer what belongs in its tables.
    """
    parser["dataset#data"] = CaseList(cases)
    writer = parser.get_parsed_content("handlers#0")
    wanted = [*(["report", "report_pdf"] if report or explain else []), *(["explanation"] if explain else [])]
    wanted += [name for name in writer.products if name == "viewer"]
    done = finished(parser, writer, cases, wanted) if resume else set()
    todo = CaseList(case for case in cases if case[keys.PATIENT_ID] not in done)
    add_products(parser, writer, report or explain, explain and elsewhere is None)
    for case in todo:
        try:
            forget(writer.folder(case[keys.PATIENT_ID]))
        except OSError as error:
            case[keys.PROBLEM] = case.get(keys.PROBLEM) or f"an earlier prediction cannot be removed: {error}"
    if todo and elsewhere is None:
        parser.get_parsed_content("initialize")
        predict_cases(parser, todo)
        return writer
    if todo and elsewhere is not None:
        elsewhere(writer, todo)
    writer.write_table()
    return writer


def predict_cases(parser: ConfigParser, cases: Sequence[Case]) -> None:
    """Predict the cases with what ``initialize`` of the config has made ready; the writer of the config has the rows.

    If it is called several times, then always with the same number of cases.
    """
    parser.get_parsed_content("dataset").data = CaseList(cases)
    evaluator = parser.get_parsed_content("evaluator")
    evaluator.state.failures.clear()
    evaluator.run()


def forget(folder: Path) -> None:
    """Remove an earlier prediction and the files it names: should the patient fail now, they must not stand there.

    Only files that lie in the folder itself: a name that leads elsewhere, or a folder that is a link, is left alone.
    """
    if is_link(folder):
        return
    for path in (folder / Path(file).name for file in (*named_files(folder).values(), PREDICTION)):
        if path.is_file() or path.is_symlink():
            path.unlink()


def named_files(folder: Path) -> dict[str, str]:
    """The files that a patient's prediction names; none where there is no readable prediction."""
    try:
        files = json.loads((folder / PREDICTION).read_text(encoding="utf-8"))["files"]
        return {name: str(file) for name, file in files.items() if file is not None}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def finished(parser: ConfigParser, writer: PredictionWriter, cases: Sequence[Case], wanted: Sequence[str]) -> set[str]:
    """Ids of the patients who are done, by the same model from the same scans and values; takes their rows.

    ``wanted`` files have to be there besides those that a prediction names.
    """
    sha256 = Model.of(parser.get_parsed_content("checkpoint")).sha256
    force = parser.get_parsed_content("force")
    done = {
        case[keys.PATIENT_ID]
        for case in cases
        if is_whole(writer.folder(case[keys.PATIENT_ID]), case, [*wanted, *dicom_files(case)], force)
        and writer.take_over(case[keys.PATIENT_ID], sha256)
    }
    logger.info("%d of %s done already", len(done), counted(len(cases), "patient"))
    return done


def dicom_files(case: Case) -> list[str]:
    """Names of the files that only a case given as DICOM has."""
    return ["dicom_sr"] if keys.DICOM in case else []


def is_whole(folder: Path, case: Case, wanted: Sequence[str], force: bool) -> bool:
    """Whether a patient's folder holds a prediction from this case's scans and values, and every file that it names."""
    if is_link(folder):
        return False
    files = named_files(folder)
    try:
        prediction = json.loads((folder / PREDICTION).read_text(encoding="utf-8"))
        scans = prediction["fingerprint"]
        clinical = {row["name"]: row["value"] for row in prediction["clinical"]}
        others = {row["name"]: row["value"] for row in prediction["clinical_model"]["values"]}
        forced = prediction["quality"]["forced"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False
    there = all((folder / file).is_file() for file in files.values()) and set(wanted) <= set(files)
    given = {**case.get(keys.CLINICAL_OTHERS, {}), **case[keys.CLINICAL]}
    same = clinical == case[keys.CLINICAL] and all(given.get(name) == value for name, value in others.items())
    same = same and scans == case.get(keys.FINGERPRINT)
    return there and same and (force or not forced)


def add_products(parser: ConfigParser, writer: PredictionWriter, report: bool, explain: bool) -> None:
    """Let the writer make DICOM objects and, with ``report``, a report of each patient and a page of all at the end."""
    writer.products["DICOM objects"] = write_dicom_results
    if not report:
        return
    from scripts.prediction.report import ReportWriter
    from scripts.prediction.summary import INDEX

    explainer = None
    if explain:
        from scripts.prediction.explain import RiskExplainer

        explainer = RiskExplainer(parser.get_parsed_content("network"))
    reports = ReportWriter(str(writer.output_dir), explainer)
    writer.products["report"] = reports
    writer.pages[INDEX] = reports.write_cohort
