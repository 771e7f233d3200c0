"""One patient as the HECKTOR container gets it: ``/input`` in, ``/output`` out, no network.

Reads ``images/ct/*.mha``, ``images/pet/*.mha`` and ``ehr.json``; writes ``rfs.json`` (a bare number),
``hpv-status.json`` (a bare boolean) and ``images/tumor-lymph-node-segmentation/output.mha`` (uint8 on the CT's grid).
The prediction is that of ``scripts/predict.py``. Research use only.
"""

from __future__ import annotations

import json
import logging
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from command_line import BUNDLE, UsageError, run_tool

from predict import configure_log, load_bundle, run_cases
from scripts import keys
from scripts.cohorts.cohort import Case, CohortError
from scripts.cohorts.files import require_writable, write_text, written_whole
from scripts.cohorts.tables import check_names, read_json
from scripts.cohorts.thresholds import HALF, above
from scripts.prediction.inputs import add_clinical_values, pair_case
from scripts.prediction.outputs import FAILED
from scripts.training.engine import plain_errors

logger = logging.getLogger("predict")

EHR = "ehr.json"
RFS_FILE, HPV_FILE, MASK_FILE = "rfs.json", "hpv-status.json", "images/tumor-lymph-node-segmentation/output.mha"
SIGNS = {"risk": 1.0, "time": -1.0}


def grand_challenge(
    rfs: str,
    input: str = "/input",
    output: str = "/output",
    ckpt_dir: str = str(BUNDLE / "models"),
    device: str | None = None,
    force: bool = True,
) -> None:
    """Predict the patient in INPUT and write the three answers into OUTPUT.

    Args:
        rfs: what the number in rfs.json means: "risk" (higher = earlier relapse, HECKTOR 2025) or "time" (higher =
            later, HECKTOR 2026).
        input: folder with images/ct, images/pet and ehr.json.
        output: folder for the answers.
        ckpt_dir: folder that holds the weights, model.pt.
        device: cpu or cuda:0; by default the GPU where there is one.
        force: answer although quality control rejects the scans, as a challenge wants it; the log says so.
    """
    if rfs not in SIGNS:
        raise UsageError(f"--rfs is risk (2025: higher = earlier relapse) or time (2026: higher = later), got {rfs!r}")
    configure_log()
    require_writable(output)
    for name in (RFS_FILE, HPV_FILE, MASK_FILE):  # nobody shall take an earlier answer for this one's
        (Path(output) / name).unlink(missing_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        parser = load_bundle(folder, ckpt_dir, device, force)
        case = read_case(Path(input), parser.get_parsed_content("spec").clinical_features)
        writer = run_cases(parser, [case])
        row = writer.rows[case[keys.PATIENT_ID]]
        if row["status"] == FAILED:
            raise CohortError(f"no prediction: {row['reason']}")
        place = writer.folder(case[keys.PATIENT_ID])
        write_answers(json.loads((place / "prediction.json").read_text(encoding="utf-8")), place, Path(output), rfs)


def read_case(folder: Path, features: Sequence[str]) -> Case:
    """The one patient of an input folder.

    Raises:
        CohortError: there is not exactly one CT and one PET, or ``ehr.json`` is no object in valid JSON, or names no
            clinical value that is known.
        scripts.cohorts.clinical.ClinicalValueError: a clinical value cannot be read.
    """
    case = pair_case(only_image(folder / "images" / "ct"), only_image(folder / "images" / "pet"), features, "patient")
    if not os.path.lexists(folder / EHR):
        logger.warning("no %s: all clinical values are taken as missing", folder / EHR)
        return case
    values = read_json(folder / EHR)
    if not isinstance(values, dict):
        raise CohortError(f"{folder / EHR}: expected one object with the clinical values of one patient")
    if not values:
        logger.warning("%s is empty: all clinical values are taken as missing", folder / EHR)
    check_names(values, EHR)
    add_clinical_values([case], values, EHR)
    return case


def only_image(folder: Path) -> Path:
    """The one ``.mha`` file of a folder.

    Raises:
        CohortError: there is none, or there are several.
    """
    found = sorted(folder.glob("*.mha"))
    if len(found) != 1:
        names = ", ".join(path.name for path in found) or "none"
        raise CohortError(f"{folder}: expected one .mha file, found {names}")
    return found[0]


def write_answers(prediction: Mapping[str, Any], folder: Path, output: Path, rfs: str) -> None:
    """Write the three files of the contract.

    Args:
        prediction: as ``prediction.json`` has it.
        folder: where its mask lies.
        output: receives the answers.
        rfs: a key of :data:`SIGNS`.

    Raises:
        CohortError: the model lacks one of the three tasks.
    """
    survival, hpv, mask = prediction["survival"], prediction["hpv"], prediction["files"]["mask"]
    if survival is None or hpv is None or mask is None:
        tasks = ", ".join(prediction["model"]["tasks"])
        raise CohortError(f"the model has the tasks {tasks}; seg, hpv and surv are asked for")
    positive = hpv["positive"]
    if positive is None:
        positive = above(hpv["probability"])
        logger.warning("the model has no HPV threshold of its own: %g is taken", HALF)
    if prediction["quality"]["forced"]:
        logger.warning("quality control rejects these scans; they are predicted all the same")
    with written_whole(output / MASK_FILE) as partial:
        partial.write_bytes((folder / mask).read_bytes())
    write_text(output / HPV_FILE, json.dumps(bool(positive)))
    write_text(output / RFS_FILE, json.dumps(SIGNS[rfs] * survival["log_hazard"]))
    logger.info("%s, HPV positive: %s, tumour: %.1f ml", rfs, positive, prediction["tumour"]["volume_ml"])
    logger.info("%s The model was trained on: %s", prediction["notice"], prediction["model"]["trained_on"])


if __name__ == "__main__":
    plain_errors()
    run_tool(grand_challenge, CohortError)
