"""The application's operators. They connect the bundle's own functions and hold no second version of any.

Import this with the bundle's directory on ``sys.path``.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from monai.data import decollate_batch
from monai.deploy.core import AppContext, Fragment, IOType, Operator, OperatorSpec
from monai.deploy.operators.monai_bundle_inference_operator import (
    DISALLOW_LOAD_SAVE,
    IOMapping,
    MonaiBundleInferenceOperator,
    get_bundle_config,
)

from scripts import keys
from scripts.cohorts.cohort import CohortError
from scripts.cohorts.files import in_config
from scripts.prediction.dicom_results import write_dicom_results
from scripts.prediction.inputs import add_clinical_values, clinical_object, find_cases
from scripts.prediction.outputs import PredictionWriter
from scripts.prediction.report import ReportWriter
from scripts.training.engine import prepare_batch
from scripts.training.sampling import innermost

logger = logging.getLogger(__name__)

CLINICAL_FILE = "ehr.json"


class StudyOperator(Operator):
    """Find the CT and the attenuation-corrected PET of the one study in a folder, and its clinical values.

    Port ``case``: the case as :func:`.find_cases` gives it; its scans are read when they are needed.

    Args:
        fragment: the application.
        folder: holds the study's DICOM files in any order and, if there are clinical values, ``ehr.json``.
        features: names of the clinical values that the network reads.
    """

    def __init__(self, fragment: Fragment, *args: Any, folder: Path, features: Sequence[str], **kwargs: Any) -> None:
        self.folder, self.features = folder, tuple(features)
        super().__init__(fragment, *args, **kwargs)

    def setup(self, spec: OperatorSpec) -> None:
        """Declare the ports."""
        spec.output("case")

    def compute(self, op_input: Any, op_output: Any, context: Any) -> None:
        """Find the study and pass it on; raises what :func:`read_study` raises."""
        op_output.emit(read_study(self.folder, self.features), "case")


class BundleOperator(MonaiBundleInferenceOperator):
    """The bundle's ``preprocessing``, ``inferer`` and ``postprocessing`` for one case, with all that they give.

    The SDK's operator knows one image in and one image out. This one hands a whole case to the bundle and takes its
    mask and its prediction; configuration, transforms and inferer are what the bundle's ``inference.json`` defines,
    with the weights loaded and checked by the bundle's own ``initialize``.

    Ports: ``case`` in; ``result`` out, all that the bundle's postprocessing gives (see :mod:`scripts.keys`).

    Args:
        fragment: the application.
        app_context: paths of the application.
        bundle_path: the bundle's directory.
        force: whether a study that quality control rejects is predicted all the same.
    """

    def __init__(
        self, fragment: Fragment, *args: Any, app_context: AppContext, bundle_path: Path, force: bool, **kwargs: Any
    ) -> None:
        self.force = force
        super().__init__(
            fragment,
            *args,
            app_context=app_context,
            input_mapping=[IOMapping("case", dict, IOType.IN_MEMORY)],
            output_mapping=[IOMapping("result", dict, IOType.IN_MEMORY)],
            bundle_path=bundle_path,
            **kwargs,
        )
        self._init_config(self._bundle_config_names.config_names)  # now: what is wrong with it shall show at the start
        self._init_completed = True

    @property
    def features(self) -> list[str]:
        """Names of the clinical values that the network reads, in its order."""
        return list(self._parser.get_parsed_content("spec").clinical_features)

    def _init_config(self, config_names: Sequence[str]) -> None:
        """Parse the bundle as its own ``bundle_root``, wherever the application runs, and load its weights."""
        self._parser = get_bundle_config(self.bundle_path, config_names)
        self._parser["bundle_root"] = in_config(str(self.bundle_path))
        self._parser["force"] = self.force
        self._parser.get_parsed_content("initialize")
        self._device = self._parser.get_parsed_content("device")
        self._model_network = self._parser.get_parsed_content("network").eval()
        names = self._bundle_config_names
        self._inferer = self._parser.get_parsed_content(names.inferer_name)
        self._preproc = self._get_compose(names.preproc_name, DISALLOW_LOAD_SAVE)
        self._postproc = self._get_compose(names.postproc_name, DISALLOW_LOAD_SAVE)

    def compute(self, op_input: Any, op_output: Any, context: Any) -> None:
        """Predict the case.

        Raises:
            scripts.imaging.quality.QualityError: when quality control rejects it and ``force`` is off.
            ValueError: when its scans cannot be used.
        """
        op_output.emit(self.predict_case(op_input.receive("case")), "result")

    def predict_case(self, case: Mapping[str, Any]) -> dict[str, Any]:
        """All that the bundle's chain gives for a case, without a batch axis."""
        try:
            item = self._preproc(case)
            batch = {name: item[name][None] for name in (keys.IMAGE, keys.CLINICAL)}
            image, _, _, others = prepare_batch(batch, self._device)
            with torch.no_grad():
                outputs = self.predict(image, **others)
            return self._postproc({**item, keys.PRED: decollate_batch(outputs)[0]})
        except RuntimeError as error:
            raise innermost(error) from None  # MONAI wraps what its transforms raise


class ResultOperator(Operator):
    """Write what came out for the study: mask, DICOM SEG and SR, report and, last of all, ``prediction.json``.

    Ports: ``case`` and ``result`` in.

    Args:
        fragment: the application.
        folder: receives a folder with the patient's id as its name.
    """

    def __init__(self, fragment: Fragment, *args: Any, folder: Path, **kwargs: Any) -> None:
        self.folder = folder
        super().__init__(fragment, *args, **kwargs)

    def setup(self, spec: OperatorSpec) -> None:
        """Declare the ports."""
        spec.input("case")
        spec.input("result")

    def compute(self, op_input: Any, op_output: Any, context: Any) -> None:
        """Write the files.

        Raises:
            ValueError: when there is no report, segmentation or structured report; the other files are there.
        """
        case, result = op_input.receive("case"), op_input.receive("result")
        report = ReportWriter(str(self.folder))
        writer = PredictionWriter(str(self.folder), [case], {"DICOM objects": write_dicom_results, "report": report})
        written = writer.write_patient(result)
        for name, file in sorted(written["files"].items()):
            logger.info("written: %s: %s", name, writer.folder(written["patient_id"]) / file)
        for patient, why in writer.failures.items():  # the writer goes on without; here they are part of the result
            raise ValueError(f"patient {patient}: predicted, but {why}")


def read_study(folder: Path, features: Sequence[str]) -> dict[str, Any]:
    """The case of the one study in a folder, with the clinical values of ``ehr.json`` before those of the headers.

    Raises:
        scripts.cohorts.cohort.CohortError: when there is no study, more than one, or one that cannot be predicted.
        scripts.dicom.tags.DicomError: when it holds no DICOM.
        scripts.cohorts.clinical.ClinicalValueError: when a clinical value cannot be read.
    """
    cases = find_cases(folder, features)
    problems = [f"patient {case[keys.PATIENT_ID]}: {case[keys.PROBLEM]}" for case in cases if case[keys.PROBLEM]]
    if len(cases) - len(problems) > 1 or not cases:
        raise CohortError(f"{folder}: {len(cases)} examinations; the application takes one at a time")
    if problems:
        raise CohortError("; ".join(problems))
    case = cases[0]
    if keys.DICOM not in case:
        raise CohortError(f"{folder}: image files, but the application takes DICOM")
    clinical = folder / CLINICAL_FILE
    if clinical.is_file():
        values = clinical_object(clinical)
        if values is None:
            raise CohortError(f"{clinical}: expected one object with clinical values and no patient id")
        add_clinical_values(cases, values, CLINICAL_FILE)
    for name, source in case.get(keys.CLINICAL_SOURCE, {}).items():
        logger.info("%s from %s", name, source)
    return case
