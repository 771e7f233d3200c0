"""The bundle in MONAI Label: requests, replies, and training on masks that were edited there.

MONAI Label calls the parts of ``inference.json`` one after another with a *request*: a dictionary with the CT's path
under ``image`` and the client's other parameters. :mod:`scripts.runtimes.label_guard` adds two overlays:
``configs/label.json`` for predictions, and ``configs/label_train.json`` for training, in which the cases are pairs of
CT and edited mask, the settings are those of ``models/model.pt``, and the new weights replace that file at the end.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import Compose, MapTransform

from scripts import keys
from scripts.cohorts import cohort
from scripts.cohorts.clinical import DEFAULT_FEATURES
from scripts.cohorts.cohort import Case, Cohort, CohortError, Split
from scripts.cohorts.files import dated_name, written_whole
from scripts.cohorts.scans import Scans, patient_key
from scripts.cohorts.tables import Tables, find_tables, read_tables
from scripts.dicom.examinations import Examination, pair_examination
from scripts.imaging.headers import read_header
from scripts.imaging.images import image_suffix
from scripts.imaging.transforms import INFERENCE_KEYS, ToNetworkItemd
from scripts.keys import FAILED, OK
from scripts.model.ensemble import EXTRA_STATE, PROVENANCE, SETTINGS, TRAINED_ON, FoldEnsemble, count_folds
from scripts.model.preprocessing import Preprocessing
from scripts.model.spec import ModelSpec, check_provenance, check_state
from scripts.prediction import inputs
from scripts.prediction.audit import append_line, audit_line
from scripts.runtimes.label_guard import TABLES, RequestError, confined, dicomweb_address, is_upload, read_prediction
from scripts.runtimes.label_study import fetched_series, study_examination
from scripts.training.engine import EnsembleInferer
from scripts.training.sampling import CaseDataset

logger = logging.getLogger(__name__)

LATENCIES = "latencies"  # MONAI Label's own notes in the request


# --- prediction --------------------------------------------------------------------------------------------------
class TakeRequestd(MapTransform):
    """Turn a request into a case.

    The PET is the one named in the request under ``pet``, or else that of the study where the CT is from a DICOMweb
    server (:mod:`scripts.runtimes.label_study`), or the one in the CT's folder with HECKTOR's name
    (``<PatientID>__CT.nii.gz``, ``<PatientID>__PT.nii.gz``). Clinical values are taken from the request, by any name
    that a CSV column may have, or else from the CSV of the cohort, by patient id. The request is kept under
    ``request``.

    Raises:
        scripts.cohorts.cohort.CohortError: there is no such CT or PET, or a table cannot be used; the message says
        what to do.
        scripts.cohorts.clinical.ClinicalValueError: a clinical value cannot be read.
    """

    def __init__(self, features: Sequence[str] = DEFAULT_FEATURES, keys: KeysCollection = keys.IMAGE) -> None:
        super().__init__(keys, allow_missing_keys=True)
        self.features = tuple(features)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Make the case."""
        request = {str(name): value for name, value in data.items()}
        made: dict[Hashable, Any] = {keys.REQUEST: request}
        made.update(request_case(request, self.features))
        return made


class KeepRequestd(ToNetworkItemd):
    """:class:`scripts.imaging.transforms.ToNetworkItemd` that returns the request to the server.

    MONAI Label passes only the image to the inferer, so the clinical values are put into its metadata.
    """

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Pick the network's item, and what the server needs."""
        item = super().__call__(data)
        image = item[keys.IMAGE]
        item[keys.IMAGE] = MetaTensor(image.as_tensor(), affine=image.affine, meta={keys.CLINICAL: item[keys.CLINICAL]})
        return {**data[keys.REQUEST], LATENCIES: data.get(LATENCIES, {}), **item}


class ServedPreprocessing(Preprocessing):
    """:class:`.Preprocessing` of a request; arguments as there."""

    def __init__(self, spec: ModelSpec, purpose: str, **options: Any) -> None:
        super().__init__(spec, purpose, **options)
        self.transforms = (TakeRequestd(spec.clinical_features), *self.transforms[:-1], KeepRequestd(INFERENCE_KEYS))


class ServedInferer(EnsembleInferer):
    """:class:`.EnsembleInferer` that takes the clinical values from the image's metadata.

    It folds batch norms as :func:`scripts.training.engine.speed_up` does, which a server does not call, so that the
    numbers are exactly those of the other runtimes.
    """

    def __call__(
        self, inputs: torch.Tensor, network: Any, clinical: torch.Tensor | None = None
    ) -> dict[str, torch.Tensor]:
        """Predictions of the ensemble ``network``; shapes as in :class:`scripts.training.engine.NetworkInferer`."""
        if isinstance(inputs, MetaTensor):
            if clinical is None and keys.CLINICAL in inputs.meta:
                clinical = inputs.meta[keys.CLINICAL].reshape(len(inputs), -1).to(inputs.device)
            inputs = inputs.as_tensor()
        network.fold_norms()
        return super().__call__(inputs, network, clinical)


def request_case(request: Mapping[str, Any], features: Sequence[str] = DEFAULT_FEATURES) -> Case:
    """The case that a request asks for, as :func:`scripts.cohorts.cohort.inference_cases` gives one.

    Args:
        request: ``image``, the path of the CT (or a folder with its DICOM series); optional ``pet`` (a path, or a name
            beside the CT; needed for DICOM, but for that of a DICOMweb server), ``patient_id``, ``ehr_csv`` (the table
            to look the patient up in) and clinical values. Other names that MONAI Label knows have no meaning here.
        features: names of the clinical values, in the network's order.

    Raises:
        scripts.runtimes.label_guard.RequestError: a parameter is not known, or is none of the values accepted.
        scripts.cohorts.cohort.CohortError: there is no such CT or PET, or a table cannot be used; the message says
            what to do, and nothing of what stands in a table.
        scripts.dicom.tags.DicomError: the DICOMweb server, or the study, does not give the PET.
        scripts.cohorts.clinical.ClinicalValueError: a clinical value cannot be read.
    """
    request = read_prediction(request)
    address = dicomweb_address()
    ct = named_file(request, keys.IMAGE)
    if ct is None:
        raise CohortError("image: the server has no such CT; its list is at datastore/?output=all")
    pet = named_file(request, "pet", ct)
    if not all(path is None or path.is_dir() or image_suffix(path) for path in (ct, pet)):
        raise RequestError("image and pet are scans: .nii.gz, .nii, .mha, .mhd, .nrrd, or a folder with DICOM")
    if is_upload(ct) and read_header(ct, image_suffix(ct)).path != ct:  # what lies beside it is somebody else's
        raise RequestError("an uploaded scan is one file; this one names another file for its voxels")
    patient = request.get("patient_id")
    named = named_file(request, "ehr_csv", ct)
    if named is not None and named.suffix.lower() not in TABLES:
        raise RequestError(f"ehr_csv is a table ({', '.join(TABLES)}), got {named.name!r}")
    series = fetched_series(ct) if address and pet is None else None
    if address and series:
        case = _dicom_case(study_examination(ct, series, address), ct, features, named, patient)
    elif ct.is_dir():
        if pet is None:
            raise CohortError(f"{ct} holds DICOM: name the folder of the PET series in the request as 'pet'")
        case = _dicom_case(pair_examination(ct, pet), ct, features, named, patient)
    else:
        scans = _scans_with(ct, pet, patient)
        # of an uploaded file without a name nobody knows whose it is
        found = _tables_of(scans) if named is None and (patient or named_ct(ct)) else []
        tables = found if named is None else [named]
        case = _named_case(scans, features, tables)
    if case[keys.PROBLEM]:
        raise CohortError(f"patient {case[keys.PATIENT_ID]}: {case[keys.PROBLEM]}")
    inputs.add_clinical_values([case], request, "request")
    return case


def audit_request(
    path: Path, request: Mapping[str, Any], checkpoint: str, prediction: Mapping[str, Any] | None = None
) -> None:
    """Append a line to the audit (:mod:`scripts.prediction.audit`); without a prediction the request failed."""
    try:
        case = request_case(request)
    except Exception:  # then the CT is all that is known
        ct = request.get(keys.IMAGE)
        series = fetched_series(Path(ct)) if ct and dicomweb_address() else None
        case = {keys.CT: series or ct}
    append_line(path, audit_line(case, FAILED if prediction is None else OK, checkpoint, prediction))


def named_file(request: Mapping[str, Any], name: str, ct: Path | None = None) -> Path | None:
    """The file or folder that a request names, which may lie beside its CT; None where it names none.

    Raises:
        scripts.runtimes.label_guard.RequestError: it is out of a request's reach.
        CohortError: there is none.
    """
    given = request.get(name)
    if not given:
        return None
    path = confined(name, (ct.parent if ct is not None else Path()) / given, ct)
    if not path.exists():
        what = "no such table" if name == "ehr_csv" else "the server has no such file or folder"
        raise CohortError(f"{name} {given!r}: {what}")
    return path


def _scans_with(ct: Path, pet: Path | None = None, patient: str | None = None) -> Scans:
    """The CT's patient and scans, without a mask."""
    named = named_ct(ct)
    name = patient or named or _stem(ct)
    if pet is None and named:
        pets = re.compile(rf"{re.escape(named)}__(PT|PET)", re.IGNORECASE)
        # a .nii.gz goes before a .nii of the same name, as in scripts.cohorts.scans
        pet = max((path for path in ct.parent.iterdir() if pets.fullmatch(_stem(path))), default=None)
    if pet is None:
        expected = f"{named}__PT.nii.gz" if named else "<PatientID>__PT.nii.gz beside <PatientID>__CT.nii.gz"
        raise CohortError(
            f"patient {name}: no PET beside {ct}: expected {expected}; or name it in the request as 'pet'"
        )
    return Scans(name, ct.parent, ct, pet)


def named_ct(ct: Path) -> str | None:
    """The patient's id in the name of a CT, None where it is not named as HECKTOR does.

    Example:
        >>> named_ct(Path("CHUM-001__CT.nii.gz")), named_ct(Path("scan.nii.gz"))
        ('CHUM-001', None)
    """
    match = re.fullmatch("(.+)__CT", _stem(ct), re.IGNORECASE)
    return match[1] if match else None


def _stem(path: Path) -> str:
    """A file's name without the ending of an image."""
    return path.name[: len(path.name) - len(image_suffix(path))]


def _named_case(scans: Scans, features: Sequence[str], tables: Sequence[str | Path]) -> Case:
    """The case of these scans, with what the tables say of the patient."""
    key = patient_key(scans.patient_id)
    read = _read_tables(tables, features)
    return cohort.cases_to_predict([key], {key: scans}, read, features, str(scans.folder))[0]


def _dicom_case(
    examination: Examination, ct: Path, features: Sequence[str], table: Path | None, patient: str | None
) -> Case:
    """The case of a PET/CT in DICOM; its CT is the image file that the mask is to lie on, where there is one."""
    tables = _read_tables([] if table is None else [table], features)
    problems = cohort.patient_problems(tables, features)
    case = inputs.examination_case(examination, ct, features, tables, problems, patient)
    if case[keys.CT] is not None and not ct.is_dir():
        case[keys.CT] = str(ct)
    return case


def _read_tables(paths: Sequence[str | Path], features: Sequence[str]) -> Tables:
    """The tables, whose faults say nothing of what stands in them: the client may not see them, but the messages."""
    try:
        tables = read_tables(paths, features)
    except CohortError:
        names = ", ".join(Path(path).name for path in paths)
        raise CohortError(f"{names}: no table of clinical values (CSV or JSON) with a column PatientID") from None
    tables.faults = [replace(fault, message=fault.told or fault.message) for fault in tables.faults]
    return tables


def _tables_of(scans: Scans) -> list[Path]:
    """The tables of the cohort among whose folders the scans lie."""
    return find_tables(scans.folder, [patient_key(scans.patient_id)])


# --- training ----------------------------------------------------------------------------------------------------
class LabelCohort(Cohort):
    """A cohort whose cases come from MONAI Label."""

    def split(self, *_: Any, **__: Any) -> Split:
        """No cases: MONAI Label splits its own."""
        return Split([], [])

    def statement(self, cases: Sequence[Case] | None = None) -> str:
        """As :meth:`scripts.cohorts.cohort.Cohort.statement`, from the folders of the cases."""
        cases = self.cases if cases is None else cases
        folders = [folder for case in cases for folder in Path(case[keys.CT]).parents[:4]]
        recorded = next((folder for folder in folders if (folder / cohort.RECORD_FILE).is_file()), self.dataset_dir)
        return f"{Cohort(str(recorded), []).statement(cases)}; masks edited in MONAI Label"


def studies() -> str:
    """Folder of the studies of the server."""
    return os.environ.get("MONAI_LABEL_STUDIES", ".")


def output_dir(bundle_root: str) -> str:
    """Output folder of a training, named by the time."""
    return f"{bundle_root}/output/label_{datetime.now():%Y%m%d_%H%M%S}"


def edited_dataset(
    data: Sequence[Mapping[str, Any]],
    transform: Compose,
    cache_dir: str | None,
    features: Sequence[str],
    otherwise: CaseDataset | None = None,
) -> CaseDataset:
    """The dataset of edited masks (see :func:`edited_cases`); without any, of the cases of ``otherwise``."""
    cases = edited_cases(data, features)
    if not cases and otherwise is not None:
        logger.warning("no case is set apart for validation: the best epoch is selected by the training cases")
        cases = list(otherwise.data)
    return CaseDataset(cases, transform, cache_dir)


def edited_cases(pairs: Sequence[Mapping[str, Any]], features: Sequence[str]) -> list[Case]:
    """Training cases from pairs of CT (``image``) and edited mask (``label``: 1 GTVp, 2 GTVn, on its grid).

    A pair that cannot be used is logged and excluded.

    PET, survival, HPV status and clinical values are looked up by patient id.
    """
    cases = []
    for pair in pairs:
        try:
            scans = _scans_with(Path(pair[keys.IMAGE]))
            case = _named_case(replace(scans, mask=Path(pair["label"])), features, _tables_of(scans))
        except CohortError as error:
            logger.warning("left out of the training: %s", error)
            continue
        if case[keys.PROBLEM]:
            logger.warning("left out of the training: patient %s: %s", case[keys.PATIENT_ID], case[keys.PROBLEM])
        else:
            cases.append(case)
    return cases


class StartedEnsemble(FoldEnsemble):
    """A :class:`.FoldEnsemble` of one fold that starts from the first fold of other weights.

    The first weights that are loaded are those to start from, as MONAI Label does. What was fitted to the joint
    predictions of their folds (calibration of the risk, threshold for HPV) is no longer valid; the provenance says so.
    """

    started = False

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        if not self.started and EXTRA_STATE in state_dict:
            extra, folds = state_dict[EXTRA_STATE], count_folds(state_dict)
            start = extra.get(PROVENANCE, {})
            check_state(state_dict, ModelSpec.read(extra[SETTINGS]), folds, EXTRA_STATE, "the weights to start from")
            check_provenance(start, folds, "the weights to start from")
            for name in [name for name in state_dict if name != EXTRA_STATE and not name.startswith("folds.0.")]:
                del state_dict[name]
            state_dict[EXTRA_STATE] = {**extra, PROVENANCE: self._provenance_from(start)}
        super()._load_from_state_dict(state_dict, prefix, *rest)
        self.started = True

    def _provenance_from(self, start: Mapping[str, Any]) -> dict[str, Any]:
        """The own provenance with the origin of the weights, and without what is no longer valid."""
        own, origin = (facts.get(TRAINED_ON, "cases that are not recorded") for facts in (self.provenance, start))
        reason = "the weights were trained further since it was fitted"
        return {
            **self.provenance,
            TRAINED_ON: f"{own}; started from weights trained on {origin}",
            "calibration": {"reason": reason},
            "hpv_threshold": {"value": None, "reason": reason},
            "voxel_limits": start.get("voxel_limits", {}),
        }


def install_weights(ckpt_dir: str, bundle_root: str, cache_dir: str) -> None:
    """Replace ``models/model.pt`` by the trained weights and remove the run's cache, which no later run uses.

    A copy, ``models/model_before_<time>.pt``, is kept, which a request can select by ``model_filename``.
    """
    shutil.rmtree(cache_dir, ignore_errors=True)
    trained, target = Path(ckpt_dir) / "model.pt", Path(bundle_root) / "models" / "model.pt"
    if not trained.is_file():
        logger.warning("no epoch gave a usable validation: %s stays as it was", target)
        return
    if target.is_file():
        backup = dated_name(target)
        _copy(target, backup)
        logger.info("the weights so far are kept as %s", backup)
    _copy(trained, target)
    logger.info("new weights: %s", target)


def _copy(source: Path, target: Path) -> None:
    with written_whole(target) as partial:
        shutil.copyfile(source, partial)
