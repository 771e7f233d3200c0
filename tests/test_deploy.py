"""The MONAI Deploy application: its operators with stub ports, and the whole of it on real and on synthetic DICOM.

MONAI Deploy has an environment of its own: ``python scripts/run_checks.py --runtime deploy`` makes it and runs this
file there. In any other environment the tests that need it are skipped.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import warnings
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import nibabel
import numpy as np
import pytest
import torch
from dicom_study import dciodvfy_errors, pet_tags, write_series

import phantom
from conftest import BUNDLE, ROOT, SHARED_DATA, write_image
from experiments.ensemble import empty_ensemble
from scripts import keys
from scripts.cohorts.clinical import ClinicalValueError
from scripts.cohorts.cohort import CohortError
from scripts.dicom.examinations import DicomScan
from scripts.dicom.series import read_headers
from scripts.imaging.lesions import find_lesions
from scripts.model.ensemble import save_weights
from scripts.prediction.inputs import find_cases

APP = ROOT / "scripts" / "runtimes" / "deploy_app"
REAL = SHARED_DATA / "dicom" / "STS-002"
WANTED = (
    os.environ.get("DEPLOY_ENVIRONMENT") == "1"
)  # set by run_checks.py --runtime deploy: there nothing may be skipped for it
needs_sdk = pytest.mark.skipif(
    not WANTED and find_spec("holoscan") is None,
    reason="MONAI Deploy is not in this environment: see run_checks.py --runtime deploy",
)
needs_data = pytest.mark.skipif(not REAL.is_dir(), reason=f"no real DICOM at {REAL}")

SETTINGS = {
    **{"tasks": ["seg", "hpv", "surv"], "roi_size": [32, 32, 32], "spacing_mm": 7.0},
    **{"ct_window": [-1000, 1000], "pet_window": [0, 25], "bn_eps": 1e-05},
    "clinical_features": ["age", "gender", "tobacco", "alcohol", "treatment", "performance_status", "m_stage"],
    "survival_inputs": ["deep"],
}
EHR = {"Age": 61, "Gender": "male", "M-stage": "M0", "Treatment": 1}
FILES = {
    **{"mask": "{0}__tumour.nii.gz", "dicom_seg": "tumour_seg.dcm", "dicom_sr": "report_sr.dcm"},
    "dicom_rtstruct": "tumour_rtstruct.dcm",
    **{"report": "report.html", "report_pdf": "report.pdf"},
}


class Ports:
    """In the place of the engine's input and output."""

    def __init__(self, **values) -> None:
        self.values = values

    def receive(self, name: str):
        return self.values[name]

    def emit(self, value, name: str) -> None:
        self.values[name] = value


@pytest.fixture(scope="module")
def sdk(bundle: Path) -> SimpleNamespace:
    """The application's modules, and what it takes to make its operators."""
    sys.path[:0] = [str(APP)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the SDK: the size of the stack, deprecations
        import app
        import operators
        from monai.deploy.core import AppContext, Application
    context = AppContext({"input": "", "output": "", "model": str(bundle)})
    return SimpleNamespace(app=app, operators=operators, context=context, application=Application())


@pytest.fixture(scope="module")
def bundle(tmp_path_factory) -> Path:
    """The bundle as it is, with random weights that call about a seventh of the box tumour."""
    folder = tmp_path_factory.mktemp("model") / "bundle"
    (folder / "models").mkdir(parents=True)
    for name in ("configs", "scripts"):
        (folder / name).symlink_to(BUNDLE / name)
    torch.manual_seed(1)
    ensemble = empty_ensemble(SETTINGS)
    ensemble.provenance = {"trained_on": "nothing: random weights"}
    save_weights(ensemble, folder / "models" / "model.pt")
    return folder


@pytest.fixture(scope="module")
def scan() -> phantom.Scan:
    return phantom.scan_patient(phantom.draw_patient(0, 0), 0, 0, "small")


@pytest.fixture(scope="module")
def study(scan, tmp_path_factory) -> Path:
    """The phantom as a DICOM study with ``ehr.json``; the PET in Bq/ml."""
    folder = tmp_path_factory.mktemp("study")
    bq_per_suv = 370e6 * 0.5 / 70_000  # as pet_tags() has it: 70 kg, one half-life after 370 MBq
    pet = {"SeriesNumber": 2, "RescaleSlope": scan.pet_slope * bq_per_suv, **pet_tags()}
    for modality, volume, grid, tags in (("CT", scan.ct, scan.ct_grid, {}), ("PT", scan.pet, scan.pet_grid, pet)):
        x, y, z = grid.spacing_mm
        write_series(
            folder / modality,
            modality,
            uid="1.2.3.4.3" if modality == "CT" else "1.2.3.4.4",
            depths=np.arange(grid.shape[2]) * z,
            origin=(-grid.origin_mm[0], -grid.origin_mm[1], grid.origin_mm[2]),
            tags={**tags, "PatientID": "PHANTOM-1", "PixelSpacing": [y, x]},
            stored=np.ascontiguousarray(volume.transpose(2, 1, 0)),
        )
    (folder / "ehr.json").write_text(json.dumps(EHR))
    return folder


@pytest.fixture(scope="module")
def predictor(sdk, bundle):
    return sdk.operators.BundleOperator(
        sdk.application, app_context=sdk.context, bundle_path=bundle, force=False, name="bundle"
    )


@pytest.fixture(scope="module")
def predicted(sdk, predictor, study, tmp_path_factory) -> SimpleNamespace:
    """The phantom, predicted once."""
    out = tmp_path_factory.mktemp("out")
    case, result = run_operators(sdk, predictor, study, out)
    prediction, mask = read_result(out, "PHANTOM-1")
    return SimpleNamespace(case=case, result=result, folder=out / "PHANTOM-1", prediction=prediction, mask=mask)


def run_operators(sdk, predictor, study: Path, out: Path) -> tuple[dict, dict]:
    """Case and result of a study, through ``compute()`` of each operator, all files written."""
    finder = sdk.operators.StudyOperator(
        sdk.application, folder=study, features=predictor.features, name=f"s{out.name}"
    )
    writer = sdk.operators.ResultOperator(sdk.application, folder=out, name=f"r{out.name}")
    ports = Ports()
    for operator in (finder, predictor, writer):
        operator.compute(ports, ports, None)
    return ports.values["case"], ports.values["result"]


def run_app(study: Path, out: Path, bundle: Path, code: int = 0, **environment: str) -> str:
    """The application as a user starts it; what it wrote to the error stream."""
    result = subprocess.run(
        [sys.executable, str(APP), "--input", str(study), "--output", str(out), "--model", str(bundle)],
        cwd=out.parent,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": "", **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == code, result.stdout[-3000:] + result.stderr[-3000:]
    return result.stderr


def read_result(out: Path, patient: str) -> tuple[dict, np.ndarray]:
    prediction = json.loads((out / patient / "prediction.json").read_text())
    mask = nibabel.load(out / patient / prediction["files"]["mask"])
    return prediction, np.asarray(mask.dataobj)


def run_inference(case: dict, bundle: Path, folder: Path, run_bundle, *options: str) -> tuple[dict, np.ndarray]:
    """What ``monai.bundle run inference`` says of the same scans as NIfTI and the same values in a CSV."""
    name = case[keys.PATIENT_ID]
    for kind, scan in (("CT", case[keys.CT]), ("PT", case[keys.PET])):
        array, affine = scan.read() if isinstance(scan, DicomScan) else scan
        path = folder / "data" / name / f"{name}__{kind}.nii.gz"
        path.parent.mkdir(parents=True, exist_ok=True)
        nibabel.save(nibabel.Nifti1Image(array, affine), path)
    (folder / "data" / "ehr.csv").write_text(f"PatientID,{','.join(EHR)}\n{name},{','.join(map(str, EHR.values()))}\n")
    places = ("--dataset_dir", str(folder / "data"), "--output_dir", str(folder / "out"))
    run_bundle(
        *("inference", "--config_file", "configs/inference.json", "--bundle_root", str(bundle), *places, *options),
        cwd=bundle,
    )
    return read_result(folder / "out", name)


def assert_same(one: dict, other: dict) -> None:
    """Two predictions that differ in nothing but time and files."""
    scores = [(p["survival"]["log_hazard"], p["hpv"]["probability"], p["tumour"]["suv_max"]) for p in (one, other)]
    np.testing.assert_allclose(scores[0], scores[1], rtol=0, atol=1e-5)
    assert one["model"] == other["model"] and one["crop"]["method"] == other["crop"]["method"]
    np.testing.assert_allclose(one["crop"]["centre_mm"], other["crop"]["centre_mm"], atol=1e-4)  # NIfTI rounds it
    coded = [{row["name"]: row["coded"] for row in prediction["clinical"]} for prediction in (one, other)]
    assert coded[0] == coded[1]
    assert one["quality"]["verdict"] == other["quality"]["verdict"]
    assert one["tumour"]["volume_ml"] == pytest.approx(other["tumour"]["volume_ml"], rel=1e-6)


# --- what needs no SDK ---------------------------------------------------------------------------------------------


def test_versions_are_those_of_the_project():
    def versions(path: Path) -> dict[str, str]:
        lines = [line for line in path.read_text().splitlines() if line and not line.startswith("#")]
        return {re.split(r"[=<>]", line)[0]: line for line in lines}

    project, own = versions(ROOT / "requirements.txt"), versions(APP / "requirements.txt")
    only_here = {"monai-deploy-app-sdk", "holoscan-cli", "holoscan-cu13"}
    assert only_here <= set(own) and set(own) - only_here <= set(project)
    assert {name: line for name, line in own.items() if name not in only_here}.items() <= project.items()


def test_version_is_that_of_the_bundle():
    version = re.search(r"^  version: (\S+)$", (APP / "app.yaml").read_text(), re.MULTILINE)
    assert version and version[1] == json.loads((BUNDLE / "configs" / "metadata.json").read_text())["version"]


# --- operators -----------------------------------------------------------------------------------------------------


@needs_sdk
def test_packager_accepts_the_configuration(sdk):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from holoscan_cli.packager.config_reader import ApplicationConfiguration
    configuration = ApplicationConfiguration()
    configuration.read(APP / "app.yaml")
    assert configuration.title() == "head_neck_pet_ct_multitask"


@needs_sdk
def test_operators_agree_with_the_bundle_on_a_phantom(predicted, bundle, scan, tmp_path, run_bundle):
    mask = predicted.mask
    assert 0 < mask.sum() < mask.size and np.array_equal(mask, np.asarray(predicted.result[keys.PRED])[0])
    # the phantom itself, not what was read back from DICOM: this checks geometry and SUV of that way, too
    original = {
        keys.PATIENT_ID: "PHANTOM-1",
        keys.CT: (scan.ct, scan.ct_grid.affine),
        keys.PET: (scan.pet * np.float32(scan.pet_slope), scan.pet_grid.affine),
    }
    expected, expected_mask = run_inference(original, bundle, tmp_path, run_bundle)
    np.testing.assert_array_equal(mask, expected_mask)
    assert_same(predicted.prediction, expected)


@needs_sdk
def test_every_file_is_there_and_says_what_the_prediction_says(predicted):
    import highdicom

    prediction, folder = predicted.prediction, predicted.folder
    assert prediction["files"] == {name: file.format("PHANTOM-1") for name, file in FILES.items()}
    assert {path.name for path in folder.iterdir()} == {"prediction.json", *prediction["files"].values()}
    assert predicted.case[keys.CLINICAL_SOURCE] == dict.fromkeys(("age", "gender", "m_stage", "treatment"), "ehr.json")
    assert_lesions(folder / "tumour_seg.dcm", predicted.case, predicted.mask)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        said = list(report_values(highdicom.sr.srread(folder / "report_sr.dcm").content))
    log_hazard = next(v for n, v in said if n.startswith("Log hazard"))
    assert prediction["survival"]["log_hazard"] == pytest.approx(log_hazard, abs=0.0005)
    volumes = [lesion["volume_ml"] for lesion in prediction["tumour"]["lesion_list"]]
    assert [v for n, v in said if n == "Volume"] == pytest.approx(
        [*volumes, prediction["tumour"]["volume_ml"]], abs=0.005
    )
    assert ("Comment", "The model was trained on: nothing: random weights") in said
    assert (folder / "report.pdf").read_bytes().startswith(b"%PDF-")
    for file in ("tumour_seg.dcm", "tumour_rtstruct.dcm", "report_sr.dcm"):
        assert dciodvfy_errors(folder / file) in (None, [])
        assert b"forced" not in (folder / file).read_bytes().lower()


def assert_lesions(path: Path, case: dict, mask: np.ndarray) -> None:
    """The segments of a segmentation are the lesions of the mask (X, Y, Z) on the CT that it refers to."""
    import highdicom

    instances = [header.SOPInstanceUID for header in read_headers(case[keys.DICOM].ct)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the phantom's short UIDs
        seg = highdicom.seg.segread(path)
        frames = seg.get_pixels_by_source_instance(instances, assert_missing_frames_are_empty=True)
    lesions = find_lesions(mask, case[keys.DICOM].ct.grid)
    numbers = (frames.astype(int) * np.arange(1, frames.shape[-1] + 1)).sum(axis=-1).transpose(2, 1, 0)
    np.testing.assert_array_equal(numbers, lesions.on(mask.shape))


def report_values(items):
    """Name and value of everything in a structured report."""
    for item in items:
        yield item.name.meaning, getattr(item, "value", None)
        yield from report_values(getattr(item, "ContentSequence", []))


@needs_sdk
def test_age_and_sex_come_from_the_headers_where_nothing_else_tells(sdk, study, tmp_path):
    bare = shutil.copytree(study, tmp_path / "bare")
    (bare / "ehr.json").unlink()
    case = sdk.operators.read_study(bare, SETTINGS["clinical_features"])
    assert case[keys.CLINICAL] == {**dict.fromkeys(SETTINGS["clinical_features"]), "age": 20.0, "gender": 0.0}
    assert set(case[keys.CLINICAL_SOURCE].values()) == {"DICOM header"}
    (bare / "ehr.json").write_text('{"age": 61}')
    assert sdk.operators.read_study(bare, ("age", "gender"))[keys.CLINICAL] == {"age": 61.0, "gender": 0.0}


@needs_sdk
@pytest.mark.parametrize(
    "content, error, message",
    [
        pytest.param("[1, 2]", CohortError, "expected one object with clinical values", id="list"),
        pytest.param('{"PatientID": "A", "Age": 61}', CohortError, "and no patient id", id="table"),
        pytest.param('{"Age": 61,}', CohortError, "not valid JSON", id="comma"),
        pytest.param('{"Gender": "unclear?"}', ClinicalValueError, r"ehr\.json.*'unclear\?' is no value", id="value"),
    ],
)
def test_clinical_values_that_cannot_be_read_are_refused(sdk, study, tmp_path, content, error, message):
    (tmp_path / "CT").symlink_to(study / "CT")
    shutil.copytree(study, tmp_path / "s")
    (tmp_path / "s" / "ehr.json").write_text(content)
    with pytest.raises(error, match=message):
        sdk.operators.read_study(tmp_path / "s", ("age", "gender"))


@needs_sdk
def test_folders_that_hold_no_single_study_are_refused(sdk, study, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(CohortError, match="holds no scan"):
        sdk.operators.read_study(tmp_path / "empty", ("age",))
    shutil.copytree(study / "CT", tmp_path / "ct" / "CT")
    with pytest.raises(CohortError, match="PHANTOM-1: no PET among its DICOM series"):
        sdk.operators.read_study(tmp_path / "ct", ("age",))
    write_series(tmp_path / "two" / "b", uid="1.2.3.4.9", tags={"PatientID": "B", "StudyInstanceUID": "1.2.3.4.8"})
    shutil.copytree(study, tmp_path / "two" / "a")
    with pytest.raises(CohortError, match=r"^patient B: no PET among its DICOM series"):
        sdk.operators.read_study(tmp_path / "two", ("age",))
    for kind, number in (("CT", 5), ("PT", 6)):
        tags = {"PatientID": "B", "StudyInstanceUID": "1.2.3.4.8", "FrameOfReferenceUID": "1.2.3.4.7"}
        write_series(tmp_path / "two" / kind, kind, uid=f"1.2.3.4.1{number}", tags=tags)
    shutil.rmtree(tmp_path / "two" / "b")
    with pytest.raises(CohortError, match="2 examinations; the application takes one"):
        sdk.operators.read_study(tmp_path / "two", ("age",))
    for kind in ("CT", "PT"):
        write_image(tmp_path / "nifti" / f"A__{kind}.nii.gz", np.zeros((4, 4, 4), np.int16), 2.0)
    with pytest.raises(CohortError, match="image files, but the application takes DICOM"):
        sdk.operators.read_study(tmp_path / "nifti", ("age",))


@needs_sdk
def test_a_report_that_fails_is_an_error(sdk, predictor, study, tmp_path, monkeypatch):
    import scripts.prediction.report

    def full_disk(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(scripts.prediction.report, "write_report", full_disk)
    with pytest.raises(ValueError, match=r"PHANTOM-1: predicted, but no report: .*No space left"):
        run_operators(sdk, predictor, study, tmp_path)


# --- the start -----------------------------------------------------------------------------------------------------


@needs_sdk
def test_bundle_is_the_model_path_or_the_only_one_in_it(sdk, bundle, tmp_path):
    assert sdk.app.find_bundle(bundle) == bundle.resolve() == sdk.app.find_bundle(bundle.parent)
    for path, message in ((tmp_path / "none", "no bundle there; name"), (BUNDLE / "configs", "no bundle there; name")):
        with pytest.raises(sdk.app.AppError, match=message):
            sdk.app.find_bundle(path)
    for name in ("one", "two"):
        (tmp_path / name / "configs").mkdir(parents=True)
        (tmp_path / name / "configs" / "inference.json").write_text("{}")
    with pytest.raises(sdk.app.AppError, match="2 bundles there"):
        sdk.app.find_bundle(tmp_path)
    with pytest.raises(sdk.app.AppError, match=r"model\.pt does not exist: put the trained weights there"):
        sdk.app.find_bundle(tmp_path / "one")


@needs_sdk
def test_force_is_on_or_off(sdk, monkeypatch):
    found = []
    for value in ("", "0", "1", "True", " no "):
        monkeypatch.setenv("QUALITY_FORCE", value)
        found.append(sdk.app.forced())
    assert found == [False, False, True, True, False]
    monkeypatch.setenv("QUALITY_FORCE", "maybe")
    with pytest.raises(sdk.app.AppError, match="QUALITY_FORCE is 1 or 0, not 'maybe'"):
        sdk.app.forced()


@needs_sdk
def test_output_of_an_earlier_run_is_never_mixed_with_the_new(sdk, tmp_path):
    assert sdk.app.unused(tmp_path / "new") == tmp_path / "new" and sdk.app.unused(tmp_path) == tmp_path
    (tmp_path / "somebody").mkdir()
    with pytest.raises(sdk.app.AppError, match="is not empty: name another folder with --output"):
        sdk.app.unused(tmp_path)


@pytest.mark.skipif(find_spec("holoscan") is not None, reason="MONAI Deploy is in this environment")
def test_without_monai_deploy_it_says_so_in_one_line(tmp_path):
    said = run_app(tmp_path, tmp_path / "out", BUNDLE, code=1)
    assert said.count("\n") == 1 and said.startswith("error: MONAI Deploy cannot be imported (No module named ")
    assert "pip install -r scripts/runtimes/deploy_app/requirements.txt" in said


@needs_sdk
@pytest.mark.parametrize(
    ("option", "message"),
    [
        pytest.param(["--input", "absent"], "--input/-i: No such file/folder", id="no_study"),
        pytest.param(["--model", "absent"], "--model/-m: No such file/folder", id="no_bundle"),
        pytest.param(["--ct", "a"], "unrecognized arguments: --ct a", id="unknown"),
        pytest.param(["--input"], "expected one argument", id="no_value"),
    ],
)
def test_a_command_line_that_cannot_be_read_ends_as_documented(tmp_path, option, message):
    ended = subprocess.run([sys.executable, str(APP), *option], cwd=tmp_path, capture_output=True, text=True)
    last = ended.stderr.strip().splitlines()[-1]
    assert ended.returncode == 1 and last.startswith("error: ") and message in last


@needs_sdk
def test_a_folder_without_scans_is_told_without_options_of_other_tools(sdk, tmp_path):
    (tmp_path / "notes.txt").touch()
    with pytest.raises(CohortError, match="holds no scan") as error:
        sdk.operators.read_study(tmp_path, ("age",))
    assert "--" not in str(error.value)


# --- the application -----------------------------------------------------------------------------------------------


@needs_sdk
@needs_data
def test_real_study_is_rejected_and_nothing_is_written(bundle, tmp_path):
    said = run_app(REAL, tmp_path / "out", bundle, code=1).splitlines()[-1]
    assert said.startswith("error: patient STS_002: rejected by quality control: ") and "QUALITY_FORCE=1" in said
    assert list((tmp_path / "out").iterdir()) == []


@needs_sdk
@needs_data
def test_forced_real_study_agrees_with_the_bundle_and_says_that_it_was_forced(bundle, tmp_path, run_bundle):
    study = shutil.copytree(REAL, tmp_path / "study")
    (study / "ehr.json").write_text(json.dumps(EHR))
    run_app(study, tmp_path / "out", bundle, QUALITY_FORCE="1")
    prediction, mask = read_result(tmp_path / "out", "STS_002")
    assert prediction["files"] == {name: file.format("STS_002") for name, file in FILES.items()}
    folder = tmp_path / "out" / "STS_002"
    case = find_cases(REAL, SETTINGS["clinical_features"])[0]
    assert_lesions(folder / "tumour_seg.dcm", case, mask)
    assert prediction["quality"]["forced"] and "FORCED" in (folder / "report.html").read_text()
    for file in ("tumour_seg.dcm", "tumour_rtstruct.dcm", "report_sr.dcm"):
        assert dciodvfy_errors(folder / file) in (None, [])
        assert b"forced" in (folder / file).read_bytes().lower()
    expected, expected_mask = run_inference(case, bundle, tmp_path / "bundle", run_bundle, "--force", "True")
    np.testing.assert_array_equal(mask, expected_mask)
    assert mask.any()
    assert_same(prediction, expected)
