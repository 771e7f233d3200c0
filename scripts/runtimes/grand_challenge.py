"""One patient as the HECKTOR container gets it: ``/input`` in, ``/output`` out, no network.

Reads ``images/ct/*.mha``, ``images/pet/*.mha`` and ``ehr.json`` and writes the answers that the challenge of a year
asks for (:data:`CONTRACTS`). The prediction is that of ``scripts/predict.py``. Research use only.
"""

from __future__ import annotations

import json
import logging
import os
import re
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from command_line import BUNDLE, UsageError, run_tool

from runtimes.inference import configure_log, load_bundle, run_cases
from scripts import keys
from scripts.cohorts.cohort import Case, CohortError
from scripts.cohorts.files import require_writable, write_text, written_whole
from scripts.cohorts.tables import check_names, read_json
from scripts.cohorts.thresholds import HALF, above
from scripts.dicom.suv_table import ActivityScan, read_suv_factor
from scripts.imaging.images import image_suffix
from scripts.imaging.lesions import APART
from scripts.keys import FAILED
from scripts.prediction.inputs import add_clinical_values, pair_case
from scripts.training.engine import plain_errors

logger = logging.getLogger("predict")

EHR = "ehr.json"
RFS_FILE, HPV_FILE, STAGE_FILES = "rfs.json", "hpv-status.json", ("t-stage.json", "n-stage.json")
UPLOADED = Path("/opt/ml/model")  # where the platform puts weights that are uploaded apart from the container
WEIGHTS = "model.pt"
INCOMPLETE = 3  # exit code: answers are written, but not all that the challenge asks for


@dataclass(frozen=True)
class Contract:
    """What the challenge of a year asks for.

    Args:
        mask: file of the tumour mask, uint8 on the CT's grid; 1 is GTVp and 2 is GTVn.
        sign: of the log hazard in ``rfs.json``: 1 for a risk (higher = earlier relapse), -1 for a time-like score
            (higher = later relapse).
        hpv: whether ``hpv-status.json`` is asked for.
        stages: whether ``t-stage.json`` and ``n-stage.json`` are.
    """

    mask: str
    sign: float
    hpv: bool
    stages: bool


CONTRACTS = {
    2025: Contract("images/tumor-lymph-node-segmentation/output.mha", 1.0, hpv=True, stages=False),
    2026: Contract("images/head-neck-tumor-segmentation/output.mha", -1.0, hpv=False, stages=True),
}


def grand_challenge(
    year: int,
    input: str = "/input",
    output: str = "/output",
    ckpt_dir: str | None = None,
    suv_csv: str | None = None,
    patient_id: str | None = None,
    device: str | None = None,
    force: bool = True,
) -> None:
    """Predict the patient in INPUT and write the answers that the challenge of YEAR asks for into OUTPUT.

    Ends with exit code 3 where answers are missing that this model cannot give, such as T and N stage (2026): those
    files are not written, the others are. With code 1 there is no answer.

    Args:
        year: 2025 (rfs.json: higher = earlier relapse; HPV status; mask) or 2026 (rfs.json: higher = later relapse;
            mask; T and N stage, which are not answered).
        input: folder with images/ct, images/pet and ehr.json.
        output: folder for the answers.
        ckpt_dir: folder that holds the weights, model.pt; by default /opt/ml/model where it holds files, else the
            bundle's models.
        suv_csv: the PET is in Bq/ml: table with its factor to SUV (suv_conversion_tags.csv).
        patient_id: the patient's pid in that table; by default from the PET's file name (<pid>__PT.mha).
        device: cpu or cuda:0; by default the GPU where there is one.
        force: answer although quality control rejects the scans, as a challenge wants it; the log says so.
    """
    if year not in CONTRACTS:
        raise UsageError(f"--year is {' or '.join(map(str, CONTRACTS))}, got {year}")
    if patient_id is not None and suv_csv is None:
        raise UsageError("--patient_id needs --suv_csv: it names the patient's row there")
    configure_log()
    require_writable(output)
    for name in answer_files():  # nobody shall take an earlier answer for this one's
        (Path(output) / name).unlink(missing_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        parser = load_bundle(folder, ckpt_dir or weights_folder(UPLOADED), device, force)
        spec = parser.get_parsed_content("spec")
        case = read_case(Path(input), spec.clinical_features)
        if suv_csv is not None:
            case[keys.PET] = activity_scan(Path(case[keys.PET]), suv_csv, patient_id)
        writer = run_cases(parser, [case])
        row = writer.rows[case[keys.PATIENT_ID]]
        if row["status"] == FAILED:
            raise CohortError(f"no prediction: {row['reason']}")
        place = writer.folder(case[keys.PATIENT_ID])
        prediction = json.loads((place / "prediction.json").read_text(encoding="utf-8"))
        write_answers(prediction, place, Path(output), CONTRACTS[year])
        unanswered = not_answered(CONTRACTS[year], spec.seg_classes)
    for line in unanswered:
        logger.error("not answered: %s", line)
    if unanswered:
        raise SystemExit(INCOMPLETE)


def answer_files() -> list[str]:
    """All files that an answer of any year may consist of."""
    return [RFS_FILE, HPV_FILE, *STAGE_FILES, *(contract.mask for contract in CONTRACTS.values())]


def weights_folder(uploaded: Path) -> str:
    """The folder with the weights: ``uploaded`` where it holds anything, else that of the bundle.

    Raises:
        CohortError: ``uploaded`` holds files, but no weights.
    """
    names = sorted(path.name for path in uploaded.iterdir()) if uploaded.is_dir() else []
    if names and WEIGHTS not in names:
        raise CohortError(f"{uploaded} holds no {WEIGHTS} but {', '.join(names[:5])}: upload the weights as {WEIGHTS}")
    place = uploaded if names else BUNDLE / "models"
    logger.info("weights: %s", place / WEIGHTS)
    return str(place)


def read_case(folder: Path, features: Sequence[str]) -> Case:
    """The one patient of an input folder.

    Raises:
        CohortError: there is not exactly one CT and one PET, or ``ehr.json`` is no object in valid JSON, or names no
            clinical value that is known.
        scripts.cohorts.clinical.ClinicalValueError: a clinical value cannot be read.
    """
    case = pair_case(only_image(folder / "images" / "ct"), only_image(folder / "images" / "pet"), features, "patient")
    given = os.path.lexists(folder / EHR)
    values = read_json(folder / EHR) if given else {}
    if not isinstance(values, dict):
        raise CohortError(f"{folder / EHR}: expected one object with the clinical values of one patient")
    if not values:
        why = f"{folder / EHR} is empty" if given else f"no {folder / EHR}"
        logger.warning("%s: all clinical values are taken as missing", why)
    check_names(values, EHR)
    add_clinical_values([case], values, EHR)
    return case


def only_image(folder: Path) -> Path:
    """The one ``.mha`` file of a folder."""
    found = sorted(folder.glob("*.mha"))
    if len(found) != 1:
        names = ", ".join(path.name for path in found) or "none"
        raise CohortError(f"{folder}: expected one .mha file, found {names}")
    return found[0]


def activity_scan(pet: Path, table: str, patient: str | None) -> ActivityScan:
    """The PET in Bq/ml, to be read as SUV.

    Args:
        pet: its file.
        table: with the factors.
        patient: its id there; None for the file's name without ``__PT``.
    """
    named = re.sub(r"__PT$", "", pet.name.removesuffix(image_suffix(pet)), flags=re.IGNORECASE)
    try:
        factor = read_suv_factor(table, patient or named)
    except CohortError as error:
        hint = "" if patient else f" (the PET is called {pet.name}; --patient_id names the patient)"
        raise CohortError(f"{error}{hint}") from error
    logger.info("PET of %s: 1 Bq/ml is SUV %g, from %s", patient or named, factor, Path(table).name)
    return ActivityScan(pet, factor)


def write_answers(prediction: Mapping[str, Any], folder: Path, output: Path, contract: Contract) -> None:
    """Write the files of the contract that the model can answer.

    Raises:
        CohortError: the model lacks one of the tasks.
    """
    survival, hpv, mask = prediction["survival"], prediction["hpv"], prediction["files"]["mask"]
    if survival is None or mask is None or (contract.hpv and hpv is None):
        tasks, wanted = ", ".join(prediction["model"]["tasks"]), "seg, hpv and surv" if contract.hpv else "seg and surv"
        raise CohortError(f"the model has the tasks {tasks}; {wanted} are asked for")
    if prediction["quality"]["forced"]:
        logger.warning("quality control rejects these scans; they are predicted all the same")
    with written_whole(output / contract.mask) as partial:
        partial.write_bytes((folder / mask).read_bytes())
    if contract.hpv:
        write_text(output / HPV_FILE, json.dumps(hpv_positive(hpv)))
    score = contract.sign * survival["log_hazard"]
    write_text(output / RFS_FILE, json.dumps(score))
    meaning = "earlier" if contract.sign > 0 else "later"
    logger.info("tumour: %.1f ml", prediction["tumour"]["volume_ml"])
    logger.info("%s: %.3f, higher = %s relapse", RFS_FILE, score, meaning)
    logger.info("%s The model was trained on: %s", prediction["notice"], prediction["model"]["trained_on"])


def hpv_positive(hpv: Mapping[str, Any]) -> bool:
    """HPV status by the model's own threshold, else by 0.5."""
    positive = hpv["positive"]
    if positive is None:
        positive = above(hpv["probability"])
        logger.warning("the model has no HPV threshold of its own: %g is taken", HALF)
    logger.info("HPV positive: %s", bool(positive))
    return bool(positive)


def not_answered(contract: Contract, classes: Sequence[str]) -> list[str]:
    """What the challenge asks for and the model cannot tell, a text each."""
    lines = []
    if contract.stages:
        lines.append(f"{' and '.join(STAGE_FILES)}: no model of T and N stage is trained, so they are not written")
        if tuple(classes) != APART:
            lines.append(
                "GTVp and GTVn apart: the model does not tell them apart; 1 in the mask is tumour of either kind"
            )
    return lines


if __name__ == "__main__":
    plain_errors()
    run_tool(grand_challenge, CohortError)
