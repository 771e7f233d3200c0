"""Predict from scans: ``python scripts/predict.py INPUT OUTPUT``.

INPUT is a folder of patients (NIfTI, MHA or DICOM) or a CSV or JSON list of cases; ``--ct`` and ``--pet`` name the two
scans of one patient instead, ``--dicomweb`` and ``--study`` a study on a DICOMweb server. OUTPUT receives a folder for
each patient, ``predictions.csv`` and a page of the cohort. The prediction itself is that of the bundle's
``configs/inference.json``. See ``bundle/docs/predict.md``.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from command_line import BUNDLE, UsageError, run_tool

from cluster.nodes import ClusterError, connected
from scripts import keys
from scripts.cohorts.clinical import FEATURES, parse_clinical
from scripts.cohorts.cohort import Case
from scripts.cohorts.files import WriteError, require_writable
from scripts.cohorts.scans import printable
from scripts.dicom.tags import DicomError
from scripts.dicom.web import DicomWeb
from scripts.keys import FAILED, OK
from scripts.prediction.inputs import NoScanError, add_clinical_values, clinical_object, find_cases, pair_case

if TYPE_CHECKING:
    from scripts.prediction.outputs import PredictionWriter

logger = logging.getLogger("predict")

WAYS = "give INPUT OUTPUT; or OUTPUT --ct CT --pet PET; or OUTPUT --dicomweb URL --study UID; --help tells more"
ALIKE = 5  # patients with one fault, from which on they are told in one line
WIDEST = 40  # letters of a cell on the screen
TYPED = "option"  # where a clinical value comes from that was given on the command line
COLUMNS = {  # of the table on the screen: title -> column of predictions.csv, digits
    "patient": ("PatientID", 0),
    "status": ("status", 0),
    "risk group": ("risk_group", 0),
    "percentile": ("percentile", 0),
    "log hazard": ("log_hazard", 2),
    "RFS 2 years": ("survival_2y", 2),
    "HPV prob.": ("hpv_probability", 2),
    "HPV": ("hpv_class", 0),
    "volume ml": ("tumour_volume_ml", 1),
    "SUVmax": ("suv_max", 1),
    "quality": ("quality", 0),
    "forced": ("forced", 0),
}


def predict(
    input: str | None = None,
    output: str | None = None,
    ct: str | None = None,
    pet: str | None = None,
    patient_id: str | None = None,
    clinical: str | None = None,
    ckpt_dir: str = str(BUNDLE / "models"),
    device: str | None = None,
    report: bool = True,
    explain: bool = False,
    resume: bool = False,
    force: bool = False,
    dicomweb: str | None = None,
    study: str | None = None,
    store: bool = False,
    audit: str | None = None,
    viewer: str | None = None,
    ray: str | None = None,
    ray_cores: int = 1,
    ray_gpus: float | None = None,
    **values: Any,
) -> None:
    """Predict tumour mask, HPV status and risk of recurrence from PET/CT. Research use only.

    Two arguments: INPUT OUTPUT; with --ct and --pet, or --dicomweb and --study, OUTPUT alone. Ends with exit code 1 if
    a patient has no prediction, or not all that was asked for; the others have.

    Further options are clinical values of the only patient, which go before every other source: --age 61 --gender male
    --tobacco yes --alcohol no --treatment chemoradiotherapy --performance_status 1 --m_stage M0 --t_stage T2
    --n_stage N1 --hpv positive.

    Args:
        **values: clinical values by name.
        input: folder of patients (NIfTI, MHA, or any mixture of DICOM), or CSV or JSON with patient_id, ct, pet.
        output: folder for the results.
        ct: CT of one patient instead of INPUT: an image file, or the folder of its DICOM series.
        pet: PET of the same patient, in SUV (DICOM: SUV is computed from the headers).
        patient_id: what to call the patient of --ct and --pet.
        clinical: clinical values: CSV or JSON with a PatientID, or a JSON object of the only patient (ehr.json).
        ckpt_dir: folder that holds the weights, model.pt.
        device: cpu or cuda:0; by default the GPU where there is one.
        report: write report.html and report.pdf of each patient, and index.html of all.
        explain: say in the reports what moved each risk; takes several times as long.
        resume: leave out patients whose prediction is whole, by the same model from the same scans and clinical values.
        force: predict scans that quality control rejects, too; every output says so.
        dicomweb: address of a DICOMweb server to download the study from. User and password are read from the
            environment (DICOMWEB_USER and DICOMWEB_PASSWORD, or DICOMWEB_TOKEN) or from ~/.netrc.
        study: StudyInstanceUID of the PET/CT on that server.
        store: store the DICOM results on that server, too.
        audit: file that gets one line of JSON for each patient: UIDs or hashes of the scans, hash of the weights,
            outcome; OUTPUT/audit.jsonl by default.
        viewer: write viewer.html of each patient: CT, PET and mask in the browser, some MB. The npm package of niivue,
            which is not part of this software: niivue-niivue-0.69.0.tgz, from: npm pack @niivue/niivue@0.69.0
        ray: predict on a Ray cluster: auto (this computer's), HOST:PORT of its head, or local (this computer alone).
        ray_cores: cores of each process there.
        ray_gpus: GPU of each process there: 0.25 for four on a GPU; 1 by default where the cluster has GPUs.
    """
    if output is None and (dicomweb is not None or (ct is not None and pet is not None)):
        input, output = None, input
    check_usage(input, output, ct, pet, values)
    check_web(input, ct, dicomweb, study, store)
    if ray is not None:
        device, ray_gpus = None, gpus_of_process(device, ray_gpus, dicomweb)  # each process has its own
        input, ct, pet, viewer, ckpt_dir = map(absolute, (input, ct, pet, viewer, ckpt_dir))  # type: ignore[assignment]
    require_writable(str(output))
    check_scans(input, ct, pet)

    from runtimes.inference import configure_log, load_bundle, run_cases  # imports torch and MONAI, which takes seconds
    from scripts.training.engine import plain_errors

    plain_errors()
    configure_log()
    parser = load_bundle(str(output), ckpt_dir, device, force, audit, viewer)
    features = parser.get_parsed_content("spec").clinical_features
    options = {"ckpt_dir": ckpt_dir, "force": force, "report": report, "explain": explain, "viewer": viewer}
    with downloaded(dicomweb, study) as folder, other_processes(ray, ray_cores, ray_gpus, options) as elsewhere:
        one = None if ct is None else one_case(ct, str(pet), features, patient_id, clinical, values)
        cases = one or gather_cases(str(input or folder), features, clinical, values, str(output))
        writer = run_cases(parser, cases, report, explain, resume, elsewhere)
    if store:
        store_results(DicomWeb(str(dicomweb)), writer)
    print(summary(writer))
    if writer.problems or any(row["status"] != OK for row in writer.rows.values()):
        raise SystemExit(1)


def check_usage(
    input: str | None, output: str | None, ct: str | None, pet: str | None, values: Mapping[str, Any]
) -> None:
    """Refuse what cannot be meant."""
    if output is None or (ct is None) != (pet is None):
        raise UsageError(WAYS)
    unknown = [name for name in values if name not in FEATURES]
    if unknown:
        raise UsageError(f"no option --{unknown[0]}; --help lists them, clinical values are {', '.join(FEATURES)}")


def check_web(input: str | None, ct: str | None, dicomweb: str | None, study: str | None, store: bool) -> None:
    """Refuse scans that are named in no way or in several."""
    if (dicomweb is None) != (study is None):
        raise UsageError("--dicomweb URL and --study UID go together")
    if store and dicomweb is None:
        raise UsageError("--store needs --dicomweb: on which server?")
    if [input, ct, dicomweb].count(None) != 2:
        raise UsageError(WAYS)


def check_scans(*paths: str | None) -> None:
    """Refuse scans that are not there."""
    for path in paths:
        if path is not None and not Path(path).expanduser().exists():
            raise UsageError(f"{path} does not exist")


def gpus_of_process(device: str | None, gpus: float | None, dicomweb: str | None) -> float | None:
    """GPUs of each process on a cluster; None: one where the cluster has GPUs."""
    if dicomweb is not None:
        raise UsageError("--dicomweb downloads one study to this computer: leave out --ray")
    if device not in (None, "cpu", "cuda", "cuda:0") or (device == "cpu" and gpus):
        raise UsageError(f"with --ray, --device is cpu or cuda, and Ray chooses the GPU; got {device}, {gpus} GPUs")
    return gpus if device is None or gpus else float(device != "cpu")


@contextmanager
def other_processes(
    ray: str | None, cores: int, gpus: float | None, options: Mapping[str, Any]
) -> Iterator[Callable[[PredictionWriter, Sequence[Case]], None] | None]:
    """What predicts cases on a Ray cluster; None where there is none and this process does.

    Options of :class:`cluster.worker.Worker`.
    """
    if ray is None:
        yield None
        return
    from cluster.patients import predict_on_nodes

    with connected(ray, cores, gpus) as share:
        yield partial(predict_on_nodes, share=share, **options)


def absolute(path: str | None) -> str | None:
    """A path as every node sees it."""
    return None if path is None else str(Path(path).expanduser().absolute())


@contextmanager
def downloaded(dicomweb: str | None, study: str | None) -> Iterator[str | None]:
    """The folder of a study from a DICOMweb server while it is predicted; None where no server is named.

    Raises:
        DicomError: it cannot be downloaded; the message says why and what to do.
    """
    if dicomweb is None:
        yield None
        return
    with tempfile.TemporaryDirectory(prefix="study_") as folder:
        DicomWeb(dicomweb).download(str(study), Path(folder))
        yield folder


def store_results(web: DicomWeb, writer: PredictionWriter) -> None:
    """Store the DICOM results of every predicted patient; what cannot be stored is a problem of the writer."""
    from runtimes.inference import named_files

    for patient, row in writer.rows.items():
        if row["status"] == FAILED:
            continue
        folder = writer.folder(patient)
        paths = [folder / file for name, file in named_files(folder).items() if name.startswith("dicom_")]
        try:
            web.store(paths)
        except DicomError as error:
            writer.problems[f"results of {patient} on the server"] = f"{error}; --resume stores without predicting"
        else:
            logger.info("%s: stored: %s", patient, ", ".join(path.name for path in paths))


def gather_cases(
    source: str, features: Sequence[str], clinical: str | None, values: Mapping[str, Any], output: str
) -> list[Case]:
    """The cases of a folder or list with all that is known of them; ``output`` is not searched."""
    own = None if clinical is None else clinical_object(clinical)
    try:
        cases = find_cases(source, features, None if own is not None else clinical, output)
    except NoScanError as error:
        raise UsageError(f"{error}; two files are named with --ct and --pet") from error
    return with_values(cases, clinical, own, values)


def one_case(
    ct: str, pet: str, features: Sequence[str], patient_id: str | None, clinical: str | None, values: Mapping[str, Any]
) -> list[Case]:
    """The case of one pair of scans; other arguments as for :func:`gather_cases`."""
    own = None if clinical is None else clinical_object(clinical)
    case = pair_case(ct, pet, features, patient_id)
    if clinical is not None and own is None:
        raise UsageError(f"with --ct and --pet, --clinical is a JSON object of this patient, not a table: {clinical}")
    return with_values([case], clinical, own, values)


def with_values(
    cases: list[Case], clinical: str | None, own: Mapping[str, Any] | None, values: Mapping[str, Any]
) -> list[Case]:
    """The cases with values of a single patient added; typed ones go before those of a file."""
    if own is not None:
        add_clinical_values(cases, own, Path(str(clinical)).name)
    parse_clinical(values, list(FEATURES), where=TYPED)  # a mistyped one is an error, whichever model reads it
    add_clinical_values(cases, values, TYPED)
    for case in cases:
        sources = case.get(keys.CLINICAL_SOURCE, {})
        for source in dict.fromkeys(sources.values()):
            names = ", ".join(name for name, of in sources.items() if of == source)
            logger.info("%s: %s from: %s", case[keys.PATIENT_ID], names, source)
    return cases


def summary(writer: PredictionWriter) -> str:
    """A table of the patients, in the order of the cases, and what to think of it."""
    rows = [writer.rows[patient] for patient in writer.cases]
    alike: dict[str, list[str]] = {}
    for row in rows:
        if row["reason"]:
            alike.setdefault(f"{row['status']}: {row['reason']}", []).append(row["PatientID"])
    crowds = [what for what, patients in alike.items() if len(patients) > ALIKE and what.startswith(FAILED)]
    hidden = {patient for what in crowds for patient in alike[what]}
    lines = table([row for row in rows if row["PatientID"] not in hidden])
    for what, patients in alike.items():
        more = f" and {len(patients) - ALIKE} more" if len(patients) > ALIKE else ""
        lines.append(f"{', '.join(patients[:ALIKE])}{more}: {what}")
    trained = next((row["trained_on"] for row in rows if row["trained_on"]), "")
    lines += [f"model trained on: {trained}"] if trained else []
    lines += [f"no {name}: {why}" for name, why in writer.problems.items()]
    return "\n".join([*lines, f"results: {writer.output_dir}", keys.RESEARCH_USE_ONLY])


def table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The lines of a table of patients; columns that are empty for all of them are left out."""
    cells = [list(COLUMNS), *([shown(row[name], digits) for name, digits in COLUMNS.values()] for row in rows)]
    used = [k for k in range(len(COLUMNS)) if k == 0 or any(row[k] for row in cells[1:])]
    widths = {k: max(len(row[k]) for row in cells) for k in used}
    return ["  ".join(row[k].ljust(widths[k]) for k in used).rstrip() for row in cells]


def shown(value: Any, digits: int) -> str:
    """A cell of the table: numbers rounded, yes or nothing for flags, "" where there is nothing to say."""
    if isinstance(value, bool):
        return "yes" if value else ""
    return f"{value:.{digits}f}" if isinstance(value, float) else printable(str(value), WIDEST)


if __name__ == "__main__":
    again = "the same command with --resume leaves out the patients who are done"
    run_tool(
        predict,
        *(WriteError, DicomError, ClusterError, ImportError),
        words=("input", "output"),
        others=FEATURES,
        resume=again,
    )
