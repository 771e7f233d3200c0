"""The bundle in MONAI Label.

What needs MONAI Label itself runs in its own environment: ``python scripts/check_label.py``.
"""

from __future__ import annotations

import csv
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import check_label
import nibabel
import numpy as np
import pytest
import serve_label
import torch
from monai.data import MetaTensor

from conftest import BUNDLE, ROOT, SHARED_DATA
from scripts import keys as K
from scripts import label
from scripts.clinical import ClinicalValueError
from scripts.cohort import CohortError
from scripts.engine import EnsembleInferer
from scripts.ensemble import FoldEnsemble, SettingsMismatch, load_weights, save_weights
from scripts.networks import MultitaskNet
from scripts.transforms import ToNetworkItemd

NAME = "head_neck_pet_ct_multitask"
FEATURES = ("age", "gender", "tobacco", "alcohol", "treatment", "performance_status", "m_stage")
SETTINGS = {
    "tasks": ["seg", "hpv", "surv"],
    "clinical_features": list(FEATURES),
    "survival_inputs": ["burden"],
    "hpv_inputs": ["image"],
    "roi_size": [32, 32, 32],
    "spacing_mm": 8.0,
    "ct_window": [-1000, 1000],
    "pet_window": None,
    "bn_eps": 1e-05,
}
WANTED = os.environ.get("LABEL_ENVIRONMENT") == "1"  # set by check_label.py: there nothing may be skipped for it
in_monai_label = pytest.mark.skipif(
    not WANTED and find_spec("monailabel") is None, reason="MONAI Label is not in this environment: see check_label.py"
)
MAIN_PYTHON = os.environ.get("MAIN_PYTHON", sys.executable)  # of the environment that predict.py is made for
REAL = SHARED_DATA / "sts_petct" / "images" / "STS-002" / "STS-002__CT.nii.gz"


def make_ensemble(folds: int, seed: int = 0) -> FoldEnsemble:
    torch.manual_seed(seed)
    ensemble = FoldEnsemble(MultitaskNet(clinical_features=len(FEATURES), survival_inputs=["burden"]), SETTINGS)
    ensemble.resize(folds)
    for fold in ensemble.folds:
        for name, value in fold.named_parameters():
            if "weight" in name and value.ndim > 1:
                torch.nn.init.kaiming_normal_(value)
    ensemble.provenance = {"trained_on": "nothing at all", "calibration": {"reason": "a test"}}
    return ensemble.eval()


def ct_of(cohort: Path, number: int) -> Path:
    return cohort / "Task 1" / f"CHUM-{number:03d}" / f"CHUM-{number:03d}__CT.nii.gz"


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(label, "serving", lambda: True)


# --- requests ----------------------------------------------------------------------------------------------------
def test_a_case_passes_unchanged() -> None:
    case = {K.CT: "ct", K.PET: "pet", K.CLINICAL: {"age": 3}}
    assert label.TakeRequestd(FEATURES)(case) == case


def test_a_request_finds_the_pet_and_the_clinical_values(tiny_cohort: Path) -> None:
    request = {"image": str(ct_of(tiny_cohort, 2)), "device": "cpu", "Age": "72", "M-stage": "M1"}
    case = label.TakeRequestd(FEATURES)(request)
    assert case[K.PATIENT_ID] == "CHUM-002"
    assert case[K.CT] == request["image"]
    assert Path(case[K.PET]).name == "CHUM-002__PT.nii.gz"
    known = {"age": 72.0, "gender": 1.0, "tobacco": None, "alcohol": 1.0, "treatment": 1.0, "m_stage": 1.0}
    assert case[K.CLINICAL] == {**known, "performance_status": None}
    assert case[K.MASK] is None  # a tumour mask that lies beside the CT is none of the request
    assert case[K.REQUEST] == request


def test_a_request_may_name_pet_patient_and_table(tiny_cohort: Path, tmp_path: Path) -> None:
    shutil.copy(ct_of(tiny_cohort, 1), tmp_path / "upload.nii.gz")
    table = tmp_path / "others.csv"
    table.write_text("PatientID,Age\nX-9,41\n")
    pet = str(ct_of(tiny_cohort, 1)).replace("__CT", "__PT")
    request = {"image": str(tmp_path / "upload.nii.gz"), "pet": pet, "patient_id": "X-9", "ehr_csv": str(table)}
    case = label.TakeRequestd(FEATURES)(request)
    assert case[K.REQUEST] == request
    assert (case[K.PATIENT_ID], case[K.PET], case[K.CLINICAL]["age"]) == ("X-9", pet, 41.0)


FAULTS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "no_such_image": ({"image": ""}, CohortError, "the server has no such CT"),
    "no_pet": ({"image": "{lonely}"}, CohortError, "expected LONE-001__PT.nii.gz; or name it"),
    "no_such_pet": ({"image": "{lonely}", "pet": "other.nii.gz"}, CohortError, "pet 'other.nii.gz': the server has no"),
    "unnamed_ct": ({"image": "{unnamed}"}, CohortError, "<PatientID>__PT.nii.gz beside <PatientID>__CT.nii.gz"),
    "dicom_without_pet": ({"image": "{folder}"}, CohortError, "name the folder of the PET series"),
    "bad_value": ({"image": "{ct}", "gender": "old"}, ClinicalValueError, "request, gender: 'old' is no value"),
    "no_such_table": ({"image": "{ct}", "ehr_csv": "/none.csv"}, CohortError, "no such table"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_request_that_cannot_be_served_says_why(name: str, tiny_cohort: Path, tmp_path: Path) -> None:
    request, kind, message = FAULTS[name]
    for file in ("LONE-001/LONE-001__CT.nii.gz", "scan/scan.nii.gz"):
        (tmp_path / file).parent.mkdir()
        shutil.copy(ct_of(tiny_cohort, 1), tmp_path / file)
    places = {
        "lonely": tmp_path / "LONE-001" / "LONE-001__CT.nii.gz",
        "unnamed": tmp_path / "scan" / "scan.nii.gz",
        "folder": tmp_path,
        "ct": ct_of(tiny_cohort, 1),
    }
    with pytest.raises(kind) as error:
        label.request_case({key: value.format(**places) for key, value in request.items()}, FEATURES)
    assert message in str(error.value)


def test_a_fault_in_the_patients_row_stops_the_request(tiny_cohort: Path, tmp_path: Path) -> None:
    table = tmp_path / "faulty.csv"
    table.write_text("PatientID,Age\nCHUM-001,old\nCHUM-002,50\n")
    with pytest.raises(CohortError, match=r"CHUM-001: faulty.csv, row 2, column 'Age': no value of age; acc") as error:
        label.request_case({"image": str(ct_of(tiny_cohort, 1)), "ehr_csv": str(table)}, FEATURES)
    assert "old" not in str(error.value)  # the client may not see the table
    assert label.request_case({"image": str(ct_of(tiny_cohort, 2)), "ehr_csv": str(table)})[K.CLINICAL]["age"] == 50


# --- item and network ---------------------------------------------------------------------------------------------
def make_item() -> dict[str, Any]:
    image = MetaTensor(torch.rand(2, 32, 32, 32), affine=torch.eye(4))
    return {K.PATIENT_ID: "P-1", K.IMAGE: image, K.CLINICAL: torch.arange(7.0), "other": 3}


def test_an_item_without_a_request_is_the_networks_item() -> None:
    names = (K.PATIENT_ID, K.IMAGE, K.CLINICAL)
    kept, plain = label.KeepRequestd(names)(make_item()), ToNetworkItemd(names)(make_item())
    assert list(kept) == list(plain) == list(names)
    assert K.CLINICAL not in kept[K.IMAGE].meta


def test_a_server_gets_its_request_back_and_the_clinical_values_reach_the_network() -> None:
    request = {"image": "/a/ct.nii.gz", "image_path": "/a/ct.nii.gz", "device": "cpu", "model_filename": "model.pt"}
    data = {**make_item(), K.REQUEST: request, "latencies": {"pre": {}}}
    item = label.KeepRequestd((K.PATIENT_ID, K.IMAGE, K.CLINICAL))(data)
    assert {name: item[name] for name in request if name != "image"} == {
        k: v for k, v in request.items() if k != "image"
    }
    assert "other" not in item
    batch = item[K.IMAGE][None].to("cpu")  # as MONAI Label makes one
    network = make_ensemble(2)
    with torch.no_grad():
        served = label.ServedInferer()(batch, network)
        given = EnsembleInferer()(batch.as_tensor(), network, item[K.CLINICAL][None])
        without = EnsembleInferer()(batch.as_tensor(), network)
        both = label.ServedInferer()(batch.as_tensor(), network, item[K.CLINICAL][None])
    assert torch.equal(served[K.LOG_HAZARD], given[K.LOG_HAZARD])
    assert torch.equal(both[K.LOG_HAZARD], given[K.LOG_HAZARD])
    assert not torch.allclose(served[K.LOG_HAZARD], without[K.LOG_HAZARD], atol=1e-4)
    assert not isinstance(served[K.SEG_PROB], MetaTensor)


# --- training -----------------------------------------------------------------------------------------------------
def test_edited_masks_get_their_labels_from_the_table(
    tiny_cohort: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    lonely = tmp_path / "LONE-001__CT.nii.gz"
    shutil.copy(ct_of(tiny_cohort, 1), lonely)
    pairs = [{"image": str(ct_of(tiny_cohort, k)), "label": f"/masks/{k}.nii.gz"} for k in (1, 2)]
    cases = label.edited_cases([*pairs, {"image": str(lonely), "label": "/masks/3.nii.gz"}], FEATURES)
    assert [case[K.PATIENT_ID] for case in cases] == ["CHUM-001", "CHUM-002"]
    assert [case[K.MASK] for case in cases] == ["/masks/1.nii.gz", "/masks/2.nii.gz"]
    assert [case[K.HPV_KNOWN] for case in cases] == [True, False]
    assert [(case[K.TIME], case[K.EVENT], case[K.SURV_KNOWN]) for case in cases] == [
        (300, True, True),
        (400, False, True),
    ]
    assert cases[0][K.CLINICAL]["age"] == 50
    assert "left out of the training: patient LONE-001: no PET" in caplog.text


def test_without_a_table_an_edited_mask_is_all_that_is_known(tiny_cohort: Path, tmp_path: Path) -> None:
    for kind in ("CT", "PT"):
        shutil.copy(str(ct_of(tiny_cohort, 1)).replace("__CT", f"__{kind}"), tmp_path / f"A-1__{kind}.nii.gz")
    (case,) = label.edited_cases([{"image": str(tmp_path / "A-1__CT.nii.gz"), "label": "/mask.nii.gz"}], FEATURES)
    assert (case[K.SEG_KNOWN], case[K.HPV_KNOWN], case[K.SURV_KNOWN]) == (True, False, False)


def test_a_dataset_of_cases_is_left_alone(caplog: pytest.LogCaptureFixture) -> None:
    cases = [{K.PATIENT_ID: "A"}, {K.PATIENT_ID: "B"}]
    assert list(label.case_dataset(cases, lambda x: x, None, FEATURES).data) == cases
    assert len(label.case_dataset([], lambda x: x, None, FEATURES, label.CaseDataset(cases, lambda x: x))) == 0


@pytest.mark.usefixtures("served")
def test_without_validation_cases_label_chooses_by_the_training_cases(caplog: pytest.LogCaptureFixture) -> None:
    training = label.CaseDataset([{K.PATIENT_ID: "A"}], lambda x: x)
    assert list(label.case_dataset([], lambda x: x, None, FEATURES, training).data) == training.data
    assert "no case is set apart for validation" in caplog.text


def test_further_training_starts_from_the_first_fold_of_an_ensemble(tmp_path: Path) -> None:
    shipped, fresh = make_ensemble(3, seed=1), make_ensemble(1, seed=2)
    fresh.provenance = {"trained_on": "5 cases"}
    save_weights(shipped, tmp_path / "model.pt", half=True)
    state = torch.load(tmp_path / "model.pt", weights_only=True)
    label.accept_ensembles(fresh)
    fresh.folds[0].load_state_dict(state, strict=False)  # what MONAI's CheckpointLoader does
    for name, value in shipped.folds[0].state_dict().items():
        assert torch.allclose(fresh.folds[0].state_dict()[name].float(), value.float(), atol=1e-2), name
    assert fresh.provenance["trained_on"] == "5 cases; started from weights trained on nothing at all"
    assert "trained further" in fresh.provenance["calibration"]["reason"]
    assert fresh.provenance["hpv_threshold"]["value"] is None
    fresh.load_state_dict(fresh.state_dict())  # resuming a run is as it was


def test_weights_of_other_settings_are_refused() -> None:
    fresh = make_ensemble(1)
    fresh.settings = {**SETTINGS, "spacing_mm": 2.0}
    label.accept_ensembles(fresh)
    with pytest.raises(SettingsMismatch, match=r"spacing_mm: weights 8\.0, config 2\.0"):
        fresh.folds[0].load_state_dict(make_ensemble(2).state_dict(), strict=False)


def test_outside_of_monai_label_training_installs_nothing(tmp_path: Path) -> None:
    (tmp_path / "run" / "cache").mkdir(parents=True)
    (tmp_path / "run" / "model.pt").write_text("new")
    label.install_weights(str(tmp_path / "run"), str(tmp_path), str(tmp_path / "run" / "cache"))
    assert not (tmp_path / "models").exists()
    assert (tmp_path / "run" / "cache").exists()
    assert label.output_dir("/b") == "/b/output"
    save_weights(make_ensemble(1), tmp_path / "shipped.pt")
    assert label.training_settings(str(tmp_path / "shipped.pt"), {"roi_size": 3}) == {"roi_size": 3}


@pytest.mark.usefixtures("served")
def test_training_from_monai_label_has_the_settings_of_its_weights(tmp_path: Path) -> None:
    save_weights(make_ensemble(1), tmp_path / "shipped.pt")
    assert label.training_settings(str(tmp_path / "shipped.pt"), {"roi_size": 3}) == SETTINGS


@pytest.mark.usefixtures("served")
def test_new_weights_keep_a_copy_of_the_old_ones(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "run" / "cache").mkdir(parents=True)
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "model.pt").write_text("old")
    arguments = (str(tmp_path / "run"), str(tmp_path), str(tmp_path / "run" / "cache"))
    label.install_weights(*arguments)
    assert "stays as it was" in caplog.text
    assert (tmp_path / "models" / "model.pt").read_text() == "old"
    (tmp_path / "run" / "model.pt").write_text("new")
    label.install_weights(*arguments)
    assert (tmp_path / "models" / "model.pt").read_text() == "new"
    (backup,) = (tmp_path / "models").glob("model_before_*.pt")
    assert backup.read_text() == "old"
    assert not (tmp_path / "run" / "cache").exists()


@pytest.mark.usefixtures("served")
def test_a_training_of_monai_label_says_what_it_was_trained_on(tiny_cohort: Path, tmp_path: Path) -> None:
    case = {K.CT: str(ct_of(tiny_cohort, 1)), K.CENTRE: "CHUM"}
    cohort = label.load_cohort("studies", None, FEATURES)
    assert cohort.statement([case]) == (
        "1 cases of 1 centre (CHUM); research use only, not for clinical use; masks edited in MONAI Label"
    )
    (tmp_path / "images" / "A").mkdir(parents=True)
    (tmp_path / "cohort.json").write_text(json.dumps({"notice": "Digital phantoms"}))
    phantom = {K.CT: str(tmp_path / "images" / "A" / "A__CT.nii.gz"), K.CENTRE: "A"}
    assert cohort.statement([phantom]) == "1 digital phantoms, not for clinical use; masks edited in MONAI Label"


# --- the server's script --------------------------------------------------------------------------------------------
def test_the_server_lists_a_link_to_each_ct(tiny_cohort: Path, tmp_path: Path) -> None:
    folder = Path(serve_label.list_studies(str(tiny_cohort), str(tmp_path / "store")))
    again = Path(serve_label.list_studies(str(tiny_cohort), str(tmp_path / "store")))
    assert folder == again == tmp_path / "store"
    links = sorted(folder.iterdir())
    assert [link.name for link in links] == [f"CHUM-{k:03d}__CT.nii.gz" for k in range(1, 7)]
    assert links[0].resolve() == ct_of(tiny_cohort, 1).resolve()
    assert serve_label.list_studies("http://127.0.0.1:8042/dicom-web") == "http://127.0.0.1:8042/dicom-web"


@pytest.mark.parametrize(("folder", "message"), [("none", "is not there"), ("empty", "no CT in")])
def test_the_server_needs_scans(folder: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(SystemExit, match=message):
        serve_label.list_studies(str(tmp_path / folder))


def test_trained_weights_in_the_app_are_kept(tmp_path: Path) -> None:
    app, bundle = tmp_path / "app", tmp_path / "bundle"
    app.mkdir()
    (app / "main.py").touch()
    for name in ("configs", "scripts", "docs", "models"):
        (bundle / name).mkdir(parents=True)
    with pytest.raises(SystemExit, match="no weights at"):
        serve_label.install_bundle(Path(sys.executable), app, bundle)
    (bundle / "models" / "model.pt").write_text("shipped")
    (bundle / "configs" / "a.json").write_text("1")
    target = serve_label.install_bundle(Path(sys.executable), app, bundle)
    assert target == app / "model" / NAME
    (target / "models" / "model.pt").write_text("trained since")
    (bundle / "configs" / "a.json").write_text("2")
    serve_label.install_bundle(Path(sys.executable), app, bundle)
    assert (target / "configs" / "a.json").read_text() == "2"
    assert (target / "models" / "model.pt").read_text() == "trained since"
    serve_label.install_bundle(Path(sys.executable), app, bundle, fresh_model=True)
    assert (target / "models" / "model.pt").read_text() == "shipped"
    assert [path.read_text() for path in (target / "models").glob("model_before_*")] == ["trained since"]


def test_a_second_start_is_as_quiet_as_the_first(tiny_cohort: Path, tmp_path: Path, capsys: Any) -> None:
    studies = tmp_path / "studies"
    shutil.copytree(ct_of(tiny_cohort, 1).parent, studies / "CHUM-001")
    store = Path(serve_label.list_studies(str(studies)))
    first = capsys.readouterr()
    (store / "labels" / "final").mkdir(parents=True)
    shutil.copy(studies / "CHUM-001" / "CHUM-001.nii.gz", store / "labels" / "final" / "CHUM-001__CT.nii.gz")
    assert serve_label.list_studies(str(studies)) == str(store)
    assert capsys.readouterr() == first
    assert first.err == ""


def test_a_list_that_cannot_be_written_is_told(tiny_cohort: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit, match=r"the list of CTs cannot be written: .*--store"):
        serve_label.list_studies(str(tiny_cohort), str(tmp_path / "file"))


def test_an_environment_that_cannot_be_made_is_told_with_its_own_exit_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(serve_label, "REQUIREMENTS", ("nothing",))

    def make_venv(place: Path, **_: Any) -> None:
        (place / "bin").mkdir(parents=True)
        (place / "bin" / "python").symlink_to("/bin/false")

    monkeypatch.setattr(serve_label.venv, "create", make_venv)
    with pytest.raises(SystemExit) as error:
        check_label.check_label(str(tmp_path / "env"))
    assert error.value.code == check_label.SKIPPED == 77
    told = capsys.readouterr().out
    assert "SKIPPED, not tested: MONAI Label's environment cannot be made" in told and "-m pip install" in told
    with pytest.raises(SystemExit, match="MONAI Label's environment cannot be made"):
        serve_label.serve_label(str(tmp_path), env=str(tmp_path / "env"))
    assert (tmp_path / "env" / "installed.txt").read_text() == "not finished"


def test_a_folder_that_holds_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "pyvenv.cfg").write_text("of another environment")
    with pytest.raises(serve_label.LabelEnvironmentError, match="holds something else; name a new folder"):
        serve_label.make_environment(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["pyvenv.cfg"]


# --- in MONAI Label's own environment -------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def studies(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four phantoms; of two more, one has no PET and one half a CT."""
    from make_cohort import make_cohort

    folder = tmp_path_factory.mktemp("studies") / "cohort"
    make_cohort(str(folder), cases=4, jobs=1)
    ct = sorted(folder.glob("Task 1/*/*__CT.nii.gz"))[0]
    (folder / "Task 1" / "LONE-001").mkdir()
    shutil.copy(ct, folder / "Task 1" / "LONE-001" / "LONE-001__CT.nii.gz")
    (folder / "Task 1" / "LOST-001").mkdir()
    (folder / "Task 1" / "LOST-001" / "LOST-001__CT.nii.gz").write_bytes(ct.read_bytes()[:3000])
    shutil.copy(str(ct).replace("__CT", "__PT"), folder / "Task 1" / "LOST-001" / "LOST-001__PT.nii.gz")
    return folder


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundle with an ensemble of two folds that nobody has trained, whose mask is half of the box."""
    folder = tmp_path_factory.mktemp("bundle") / NAME
    for name in ("configs", "scripts", "docs"):
        shutil.copytree(BUNDLE / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    save_weights(make_ensemble(2), folder / "models" / "model.pt")
    return folder


def predict(run_bundle: Callable, bundle: Path, dataset: Path, output: Path, *more: str) -> Path:
    """``monai.bundle run inference`` on the patients of ``dataset``."""
    arguments = ("--dataset_dir", str(dataset), "--output_dir", str(output), "--device", "cpu", *more)
    run_bundle("inference", "--config_file", "configs/inference.json", *arguments, cwd=bundle)
    return output


def assert_same(reply: dict, mask: Path, expected: Path) -> None:
    """The reply and mask of MONAI Label are what the bundle itself wrote into the folder ``expected``."""
    wanted = json.loads((expected / "prediction.json").read_text())
    one, other = nibabel.load(mask), nibabel.load(next(expected.glob("*__tumour.nii.gz")))
    voxels = np.asarray(one.dataobj)
    assert 0 < voxels.sum() < voxels.size
    assert np.array_equal(voxels, np.asarray(other.dataobj))
    assert np.allclose(one.affine, other.affine, atol=1e-4)
    assert reply["survival"]["log_hazard"] == pytest.approx(wanted["survival"]["log_hazard"], abs=1e-5)
    assert reply["hpv"]["probability"] == pytest.approx(wanted["hpv"]["probability"], abs=1e-5)
    assert reply["tumour"]["volume_ml"] == pytest.approx(wanted["tumour"]["volume_ml"])
    assert reply["quality"] == wanted["quality"]
    assert [{**row, "source": ""} for row in reply["clinical"]] == [{**row, "source": ""} for row in wanted["clinical"]]
    assert reply["model"] == wanted["model"]


@pytest.fixture(scope="module")
def task(bundle: Path) -> Any:
    """The bundle's task in MONAI Label, without a server."""
    from monailabel.tasks.infer.bundle import BundleInferTask

    return BundleInferTask(str(bundle), {})


@in_monai_label
def test_the_task_is_known_by_the_bundles_files(task: Any) -> None:
    assert task.is_valid() and str(task.type).endswith("SEGMENTATION")
    assert task.labels == {"tumour": 1}


@in_monai_label
@pytest.mark.parametrize("name", ["phantom", "real"])
def test_bundle_predict_and_label_agree(
    name: str, task: Any, studies: Path, bundle: Path, run_bundle: Callable, tmp_path: Path
) -> None:
    if name == "real" and not REAL.is_file():
        pytest.skip(f"no real scan at {REAL}")
    ct = REAL if name == "real" else sorted(studies.glob("Task 1/[!L]*/*__CT.nii.gz"))[0]
    forced = name == "real"  # there is no head in view
    folder = tmp_path / "study" / ct.parent.name  # out of reach of any table
    folder.mkdir(parents=True)
    for kind in ("CT", "PT"):
        shutil.copy(ct.with_name(f"{ct.parent.name}__{kind}.nii.gz"), folder)
    row = {"PatientID": ct.parent.name, "Age": "61", "Gender": "0", "M-stage": "M1"}
    (folder.parent / "hecktor.csv").write_text("\n".join([",".join(row), ",".join(row.values())]))
    expected = predict(run_bundle, bundle, folder.parent, tmp_path / "a", "--force", str(forced)) / ct.parent.name

    typed = [f"--{kind}={folder / ct.parent.name}__{file}.nii.gz" for kind, file in (("ct", "CT"), ("pet", "PT"))]
    typed += [f"--patient_id={ct.parent.name}", "--age=61", "--gender=female", "--m_stage=M1", f"--force={forced}"]
    command = [MAIN_PYTHON, str(ROOT / "scripts" / "predict.py"), str(tmp_path / "b"), *typed, "--report=False"]
    done = subprocess.run(
        [*command, f"--ckpt_dir={bundle / 'models'}", "--device=cpu"],
        env={**os.environ, "PYTHONPATH": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    told = json.loads((tmp_path / "b" / ct.parent.name / "prediction.json").read_text())
    assert_same(told, next((tmp_path / "b" / ct.parent.name).glob("*__tumour.nii.gz")), expected)

    (folder.parent / "hecktor.csv").unlink()
    request = {"image": str(folder / ct.name), "device": "cpu", "force": forced, "age": 61, "gender": "female"}
    mask, reply = task({**request, "M-stage": "M1"})
    json.dumps(reply, allow_nan=False)
    assert_same(reply, Path(mask), expected)
    Path(mask).unlink()


def draw_mask(ct: Path, path: Path) -> Path:
    """A block in the middle of the CT, as somebody might draw it."""
    image = nibabel.load(ct)
    mask = np.zeros(image.shape, dtype=np.uint8)
    mask[tuple(slice(n // 2 - 3, n // 2 + 3) for n in image.shape)] = 1
    nibabel.save(nibabel.Nifti1Image(mask, image.affine), path)
    return path


@pytest.fixture(scope="module")
def server(studies: Path, bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """Address of a server that ``scripts/serve_label.py`` started, and its copy of the bundle."""
    folder = tmp_path_factory.mktemp("server")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = ("--studies", str(studies), "--bundle", str(bundle), "--app", str(folder / "monaibundle"))
    command = [
        sys.executable,
        str(ROOT / "scripts" / "serve_label.py"),
        *options,
        "--env",
        sys.prefix,
        f"--port={port}",
    ]
    with (folder / "log.txt").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env={**os.environ, "PYTHONPATH": ""})
    try:
        address = f"http://127.0.0.1:{port}"
        wait_for(lambda: answers(address), process, folder / "log.txt")
        yield address, folder / "monaibundle" / "model" / NAME
    finally:
        process.terminate()
        process.wait(30)


def answers(address: str) -> bool:
    import requests

    try:
        return NAME in requests.get(f"{address}/info/", timeout=300).json()["models"]
    except requests.ConnectionError:
        return False


def wait_for(ready: Callable[[], bool], process: subprocess.Popen, log: Path, seconds: int = 900) -> None:
    end = time.monotonic() + seconds
    while not ready():
        assert process.poll() is None and time.monotonic() < end, log.read_text()[-4000:]
        time.sleep(1)


@in_monai_label
def test_a_server_answers_and_trains(
    server: tuple[str, Path], studies: Path, run_bundle: Callable, tmp_path: Path
) -> None:
    import requests

    address, served = server
    cts = sorted(studies.glob("Task 1/[!L]*/*__CT.nii.gz"))
    ids = [ct.name.removesuffix(".nii.gz") for ct in cts]

    def infer(image: str, output: str, **params: Any) -> requests.Response:
        form = {"params": json.dumps({"device": "cpu", **params})}
        return requests.post(f"{address}/infer/{NAME}?image={image}&output={output}", data=form, timeout=900)

    # a mask and numbers, with the clinical values of the request in the place of the table's
    table = next(studies.glob("*Task_1.csv"))
    rows = list(csv.DictReader(table.read_text().splitlines()))
    dataset = tmp_path / "dataset"
    (dataset / cts[0].parent.name).mkdir(parents=True)
    for file in cts[0].parent.iterdir():
        shutil.copy(file, dataset / cts[0].parent.name)
    row = {**next(row for row in rows if row["PatientID"] == cts[0].parent.name), "Age": "72", "Gender": "1"}
    (dataset / "hecktor.csv").write_text("\n".join([",".join(row), ",".join(row.values())]))
    expected = predict(run_bundle, served, dataset, tmp_path / "out") / cts[0].parent.name
    reply = infer(ids[0], "json", age=72, gender="male")
    assert reply.status_code == 200, reply.text
    mask = tmp_path / "mask.nii.gz"
    mask.write_bytes(infer(ids[0], "image", age=72, gender="male").content)
    assert_same(reply.json(), mask, expected)

    # what was wrong with a request
    for image, params, message in (
        ("LONE-001__CT", {}, "LONE-001__PT.nii.gz"),
        ("NO-ONE", {}, "the server has no such CT"),
        ("LOST-001__CT", {}, "LOST-001__CT.nii.gz: not a complete gzip file"),
        (ids[0], {"age": "old"}, "'old' is no value of age"),
        (ids[0], {"force": "maybe"}, "force is true or false"),
    ):
        refused = infer(image, "json", **params)
        assert refused.status_code == 400
        assert message in refused.json()["detail"]
    named = infer("LONE-001__CT", "json", pet=str(cts[0]).replace("__CT", "__PT"))
    assert (named.status_code, named.json()["patient_id"]) == (200, "LONE-001")

    # one epoch on edited masks
    for ct, image in zip(cts, ids, strict=True):
        with draw_mask(ct, tmp_path / "edited.nii.gz").open("rb") as file:
            put = requests.put(f"{address}/datastore/label?image={image}&tag=final", files={"label": file}, timeout=300)
        assert put.status_code == 200, put.text
    before = (served / "models" / "model.pt").read_bytes()
    started = requests.post(f"{address}/train/{NAME}", json={"max_epochs": 1, "device": "cpu"}, timeout=300)
    assert started.status_code == 200, started.text
    end = time.monotonic() + 1800
    while (state := requests.get(f"{address}/train/", timeout=300).json())["status"] in ("SUBMITTED", "RUNNING"):
        assert time.monotonic() < end
        time.sleep(2)
    assert state["status"] == "DONE", "\n".join(state["details"])
    (backup,) = (served / "models").glob("model_before_*.pt")
    assert backup.read_bytes() == before
    trained = load_weights(
        FoldEnsemble(MultitaskNet(clinical_features=len(FEATURES), survival_inputs=["burden"]), SETTINGS),
        served / "models/model.pt",
    )
    assert len(trained.folds) == 1
    statement = "3 digital phantoms, not for clinical use; masks edited in MONAI Label; started from weights trained on"
    assert trained.provenance["trained_on"].startswith(statement)
    after = infer(ids[0], "json")
    assert after.json()["model"]["trained_on"].startswith(statement)
    assert after.json()["model"]["folds"] == 1
    older = infer(ids[0], "json", model_filename=backup.name)
    assert older.json()["model"]["trained_on"] == "nothing at all"
    assert older.json()["model"]["folds"] == 2
