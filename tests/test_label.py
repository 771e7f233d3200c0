"""The bundle in MONAI Label.

What needs MONAI Label itself runs in its own environment: ``python scripts/run_checks.py --runtime label``.
"""

from __future__ import annotations

import csv
import hashlib
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import nibabel
import numpy as np
import pytest
import torch
from dicom_study import write_pet_ct
from monai.bundle import ConfigParser
from monai.data import MetaTensor

from command_line import UsageError

import serve
from conftest import BUNDLE, ROOT, SHARED_DATA
from runtimes import check, environments, label_environment
from scripts import keys
from scripts.cohorts.clinical import ClinicalValueError
from scripts.cohorts.cohort import CohortError
from scripts.model.ensemble import FoldEnsemble, load_weights, save_weights
from scripts.model.networks import MultitaskNet
from scripts.runtimes import label, label_guard, label_web
from scripts.runtimes.label_guard import RequestError
from scripts.training.configuration import check_ids
from scripts.training.engine import EnsembleInferer

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
WANTED = (
    os.environ.get("LABEL_ENVIRONMENT") == "1"
)  # set by run_checks.py --runtime label: there nothing may be skipped for it
in_monai_label = pytest.mark.skipif(
    not WANTED and find_spec("monailabel") is None,
    reason="MONAI Label is not in this environment: see run_checks.py --runtime label",
)
MAIN_PYTHON = os.environ.get("MAIN_PYTHON", sys.executable)  # of the environment that predict.py is made for
VIEWER = "http://viewer.example:3000"  # its pages may use the server of the tests
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


# --- requests ----------------------------------------------------------------------------------------------------
def test_a_request_finds_the_pet_and_the_clinical_values(tiny_cohort: Path) -> None:
    request = {"image": str(ct_of(tiny_cohort, 2)), "device": "cpu", "Age": "72", "M-stage": "M1"}
    case = label.TakeRequestd(FEATURES)(request)
    assert case[keys.PATIENT_ID] == "CHUM-002"
    assert case[keys.CT] == request["image"]
    assert Path(case[keys.PET]).name == "CHUM-002__PT.nii.gz"
    known = {"age": 72.0, "gender": 1.0, "tobacco": None, "alcohol": 1.0, "treatment": 1.0, "m_stage": 1.0}
    assert case[keys.CLINICAL] == {**known, "performance_status": None}
    assert case[keys.MASK] is None  # a tumour mask that lies beside the CT is none of the request
    assert case[keys.REQUEST] == request


def test_a_request_may_name_pet_patient_and_table(tiny_cohort: Path, tmp_path: Path) -> None:
    shutil.copy(ct_of(tiny_cohort, 1), tmp_path / "upload.nii.gz")
    table = tmp_path / "others.csv"
    table.write_text("PatientID,Age\nX-9,41\n")
    pet = str(ct_of(tiny_cohort, 1)).replace("__CT", "__PT")
    request = {"image": str(tmp_path / "upload.nii.gz"), "pet": pet, "patient_id": "X-9", "ehr_csv": str(table)}
    case = label.TakeRequestd(FEATURES)(request)
    assert case[keys.REQUEST] == request
    assert (case[keys.PATIENT_ID], case[keys.PET], case[keys.CLINICAL]["age"]) == ("X-9", pet, 41.0)


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
    assert label.request_case({"image": str(ct_of(tiny_cohort, 2)), "ehr_csv": str(table)})[keys.CLINICAL]["age"] == 50


# --- what a request may say ---------------------------------------------------------------------------------------
CLIENTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "3d_slicer": (
        {"device": "cpu", "model_filename": "model.pt", "force": False, "client_id": "user-xyz"}
        | {"result_extension": ".nrrd", "result_dtype": "uint8"},
        {"device": "cpu", "model_filename": "model.pt", "force": False}
        | {"result_extension": ".nrrd", "result_dtype": "uint8"},
    ),
    "ohif": (
        {"device": ["cpu"], "model_filename": ["model.pt", "model_before_20250131_120000.pt"], "force": False}
        | {"result_extension": ".nrrd", "result_dtype": "uint8", "result_compress": False, "restore_label_idx": False},
        {"device": "cpu", "model_filename": "model.pt", "force": False}
        | {"result_extension": ".nrrd", "result_dtype": "uint8", "result_compress": False},
    ),
    "batch": (
        {"device": "cuda", "multi_gpu": True, "gpus": "all", "logging": "WARNING", "save_label": True}
        | {"label_tag": "original", "max_workers": 1, "max_batch_size": 0, "images": "all"},
        {"device": "cuda", "multi_gpu": True, "gpus": "all", "logging": "WARNING", "save_label": True}
        | {"label_tag": "original", "max_workers": 1, "max_batch_size": 0, "images": "all"},
    ),
    "clinical_values": (
        {"Age": "61", "M-stage": "M1", "gender": "male", "Tobacco Consumption": None},
        {"Age": "61", "M-stage": "M1", "gender": "male", "Tobacco Consumption": None},
    ),
    "words_for_force": ({"force": "TRUE"}, {"force": True}),
    "nothing_said": ({"pet": "", "ehr_csv": "", "patient_id": None}, {}),
    "patient_id_as_a_number": ({"patient_id": 2024001}, {"patient_id": "2024001"}),
}


@pytest.mark.parametrize("name", CLIENTS)
def test_what_the_clients_send_is_taken_by_name_and_type(name: str) -> None:
    sent, taken = CLIENTS[name]
    assert label_guard.read_prediction(sent) == taken


TRAININGS = {
    "3d_slicer": (
        {"device": "cpu", "pretrained": True, "max_epochs": 50, "val_split": 0.2, "multi_gpu": True, "gpus": "all"}
        | {"tracking": "None", "tracking_uri": "", "tracking_experiment_name": "", "run_id": "", "client_id": "user-x"},
        {"device": "cpu", "pretrained": True, "max_epochs": 50, "val_split": 0.2, "multi_gpu": True, "gpus": "all"}
        | {"tracking": "None"},
    ),
    "words": ({"max_epochs": "3", "val_split": "-1"}, {"max_epochs": 3, "val_split": -1}),
}


@pytest.mark.parametrize("name", TRAININGS)
def test_what_the_clients_send_to_train_is_taken_by_name_and_type(name: str) -> None:
    sent, taken = TRAININGS[name]
    assert label_guard.read_training(sent) == taken


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "misspelt": ({"agee": 50}, "unknown parameter 'agee'; is 'age' meant?"),
    "misspelt_column": ({"Perfomance Status": 1}, "is 'Performance Status' meant?"),
    "unknown": ({"zzz": 1}, "unknown parameter 'zzz'; known are device, model_filename"),
    "a_config_id": ({"network_def": {}}, "unknown parameter 'network_def'"),
    "an_id_within": ({"displayable_configs#force": True}, "unknown parameter"),
    "expression": ({"force": "$print(1)"}, "force is true or false, got '$print(1)'"),
    "number_for_force": ({"force": 1}, "force is true or false"),
    "component": ({"force": {"_target_": "os.system", "command": "id"}}, "force is true or false"),
    "reference": ({"device": "@run"}, "device is 'cpu'"),
    "macro": ({"device": "%configs/train.json"}, "device is 'cpu'"),
    "device_of_lists": ({"device": [["$1"]]}, "device is 'cpu'"),
    "weights_elsewhere": ({"model_filename": "/weights/model.pt"}, "model_filename is the name of a file"),
    "weights_above": ({"model_filename": "../model.pt"}, "model_filename is the name of a file"),
    "weights_expression": ({"model_filename": "$1"}, "model_filename is the name of a file"),
    "weights_of_lists": ({"model_filename": [{"_target_": "builtins.open"}]}, "model_filename is the name of a file"),
    "clinical_list": ({"age": [50]}, "age is a single number or word"),
    "clinical_component": ({"gender": {"_target_": "os.system"}}, "gender is a single number or word"),
    "clinical_range": ({"age": 500}, "'500' is no value of age"),
    "clinical_expression": ({"age": "$1"}, "'$1' is no value of age"),
    "extension": ({"result_extension": "/../x.nii"}, "result_extension is '.nrrd'"),
    "dtype": ({"result_dtype": "object"}, "result_dtype is 'uint8'"),
    "tag": ({"label_tag": "../final"}, "label_tag is a plain name"),
    "timeout": ({"timeout": -1}, "timeout is a whole number from 1"),
    "images": ({"images": ["/etc/passwd"]}, "images is 'all'"),
    "logging": ({"logging": "$1"}, "logging is 'DEBUG'"),
    "pet_list": ({"pet": ["a"]}, "pet is a file beside the CT"),
    "control_letters": ({"pet": "a\0b"}, "pet is a file beside the CT"),
    "patient_path": ({"patient_id": "../x"}, "patient_id is a patient's id"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_on_the_list_is_refused_by_name(name: str, tiny_cohort: Path) -> None:
    request, message = REFUSED[name]
    for read in (
        label_guard.read_prediction,
        lambda asked: label.TakeRequestd(FEATURES)({"image": str(ct_of(tiny_cohort, 1)), **asked}),
    ):
        with pytest.raises(ValueError) as error:
            read(request)
        assert message in str(error.value)


REFUSED_TRAININGS: dict[str, tuple[dict[str, Any], str]] = {
    "misspelt": ({"max_epoch": 1}, "is 'max_epochs' meant?"),
    "epochs_expression": ({"max_epochs": "$1"}, "max_epochs is a whole number from 1 to 10000"),
    "epochs": ({"max_epochs": 0}, "max_epochs is a whole number"),
    "epochs_inf": ({"max_epochs": float("inf")}, "max_epochs is a whole number"),
    "run_id": ({"run_id": "initialize"}, "run_id is 'run'"),
    "tracking_file": ({"tracking": "/uploads/config.json"}, "tracking is 'None' or 'mlflow'"),
    "tracking_uri": ({"tracking_uri": "http://evil.example"}, "tracking_uri is empty, or the address"),
    "experiment": ({"tracking_experiment_name": "$1"}, "tracking_experiment_name is a name of letters"),
    "from_scratch": ({"pretrained": False}, "pretrained is true (from scratch, train with"),
    "split": ({"val_split": 1.0}, "val_split is a number from 0 to 0.9"),
    "gpus": ({"gpus": "0; id"}, "gpus is 'all' or numbers"),
    "bundle_id": ({"bundle_root": "/x"}, "unknown parameter 'bundle_root'"),
    "dataset": ({"dataset": {"_target_": "x"}}, "unknown parameter 'dataset'"),
}


@pytest.mark.parametrize("name", REFUSED_TRAININGS)
def test_trainings_are_refused_likewise(name: str) -> None:
    request, message = REFUSED_TRAININGS[name]
    with pytest.raises(RequestError) as error:
        label_guard.read_training(request)
    assert message in str(error.value)


@pytest.fixture
def settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> SimpleNamespace:
    """MONAI Label's settings, of a server for ``tmp_path/studies``."""
    (tmp_path / "studies").mkdir()
    names = ("SESSION_PATH", "DICOMWEB_CACHE_PATH", "DATASTORE_CACHE_PATH", "TRACKING_URI")
    made = SimpleNamespace(**{f"MONAI_LABEL_{name}": "" for name in names})
    made.MONAI_LABEL_STUDIES, made.MONAI_LABEL_APP_CONF = str(tmp_path / "studies"), {}
    monkeypatch.setitem(sys.modules, "monailabel.config", SimpleNamespace(settings=made))
    return made


@pytest.fixture
def study(settings: SimpleNamespace, tiny_cohort: Path, tmp_path: Path) -> Path:
    """The CT of a patient of the studies, with PET and table; and files that are none of a request's business."""
    folder = tmp_path / "studies" / "CHUM-001"
    shutil.copytree(ct_of(tiny_cohort, 1).parent, folder)
    (folder / "own.csv").write_text("PatientID,Age\nCHUM-001,41\n")
    (tmp_path / "secret.csv").write_text("PatientID,Age\nCHUM-001,42\n")
    (tmp_path / "secret.nii.gz").write_bytes((folder / "CHUM-001__PT.nii.gz").read_bytes())
    (folder / "link.csv").symlink_to(tmp_path / "secret.csv")
    (folder / "link.nii.gz").symlink_to(tmp_path / "secret.nii.gz")
    (folder / "notes.txt").write_text("a secret")
    return folder / "CHUM-001__CT.nii.gz"


OUT_OF_REACH: dict[str, tuple[str, str, str]] = {
    "system_file": ("ehr_csv", "/etc/passwd", "ehr_csv is a file of the studies, got 'passwd'"),
    "absent": ("ehr_csv", "/none/at/all.csv", "ehr_csv is a file of the studies, got 'all.csv'"),
    "above": ("ehr_csv", "../../secret.csv", "ehr_csv is a file of the studies"),
    "link": ("ehr_csv", "link.csv", "ehr_csv is a file of the studies"),
    "no_table": ("ehr_csv", "notes.txt", "ehr_csv is a table"),
    "pet": ("pet", "{folder}/secret.nii.gz", "pet is a file of the studies"),
    "pet_above": ("pet", "../../secret.nii.gz", "pet is a file of the studies"),
    "pet_link": ("pet", "link.nii.gz", "pet is a file of the studies"),
    "no_pet": ("pet", "notes.txt", "image and pet are scans"),
    "image": ("image", "{folder}/secret.nii.gz", "image is a file of the studies"),
    "no_image": ("image", "{folder}/studies/CHUM-001/notes.txt", "image and pet are scans"),
}


@pytest.mark.parametrize("name", OUT_OF_REACH)
def test_a_request_reaches_no_file_outside_of_the_studies(name: str, study: Path, tmp_path: Path) -> None:
    parameter, value, message = OUT_OF_REACH[name]
    with pytest.raises(RequestError) as error:
        label.request_case({"image": str(study), parameter: value.format(folder=tmp_path)}, FEATURES)
    assert message in str(error.value)
    assert "secret" not in str(error.value).replace("secret.", "")


def test_a_request_reaches_what_is_in_the_studies(study: Path, settings: SimpleNamespace, tmp_path: Path) -> None:
    for named in ("own.csv", str(study.with_name("own.csv")), "../CHUM-001/own.csv"):
        case = label.request_case({"image": str(study), "ehr_csv": named, "pet": "CHUM-001__PT.nii.gz"}, FEATURES)
        assert case[keys.CLINICAL]["age"] == 41
    settings.MONAI_LABEL_APP_CONF["scans"] = str(tmp_path)  # --conf scans DIR
    case = label.request_case({"image": str(study), "ehr_csv": str(tmp_path / "secret.csv")}, FEATURES)
    assert case[keys.CLINICAL]["age"] == 42
    (tmp_path / "list").mkdir()
    (tmp_path / "list" / study.name).symlink_to(study)
    settings.MONAI_LABEL_STUDIES = str(tmp_path / "list")
    settings.MONAI_LABEL_APP_CONF.clear()
    study.with_name("link.csv").unlink()  # of two tables neither is taken
    assert label.request_case({"image": str(study)}, FEATURES)[keys.PATIENT_ID] == "CHUM-001"


def test_an_upload_is_reached_alone(study: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(label_guard.tempfile, "gettempdir", lambda: str(tmp_path))
    upload = tmp_path / "tmpab12cd_9.nii.gz"
    shutil.copy(study, upload)
    pet = str(study.with_name("CHUM-001__PT.nii.gz"))
    assert label.request_case({"image": str(upload), "pet": pet}, FEATURES)[keys.CT] == str(upload)
    with pytest.raises(RequestError, match="pet is a file of the studies"):
        label.request_case({"image": str(upload), "pet": "secret.nii.gz"}, FEATURES)
    header = tmp_path / "tmpab12cd_8.mhd"
    place = "Offset = 0 0 0\nTransformMatrix = 1 0 0 0 1 0 0 0 1"
    geometry = f"NDims = 3\nDimSize = 4 4 4\nElementType = MET_UCHAR\nElementSpacing = 1 1 1\n{place}"
    header.write_text(f"ObjectType = Image\nBinaryData = True\n{geometry}\nElementDataFile = others.raw\n")
    (tmp_path / "others.raw").write_bytes(bytes(64))
    with pytest.raises(RequestError, match="an uploaded scan is one file"):
        label.request_case({"image": str(header), "pet": pet}, FEATURES)


TABLES = {
    "no_table": ("root:x:0:0:secret\n", "own.csv: no table of clinical values"),
    "cut_header": ("PatientID,HPV (secret, 1=+)\nA-1,2\n", "own.csv: no table of clinical values"),
    "cell": ("PatientID,Age\nCHUM-001,secret\n", "own.csv, row 2, column 'Age': no value of age; accepted: a number"),
    "remark": (
        "PatientID,Gender (0=male secret)\nCHUM-001,0\n",
        "own.csv: the column of gender states another coding in brackets",
    ),
    "other_row": (
        "PatientID,Age,ID\nCHUM-001,50,secret\nCHUM-001,51,secret\n",
        "row 3: the patient is already in row 2",
    ),
    "two_columns": ("PatientID,Age,Age at diagnosis\nCHUM-001,50,77\n", "own.csv, row 2: age contradicts another"),
    "json": ('[{"patient_id": "CHUM-001", "age": "secret"}]', "no value of age"),
    "broken_json": ('[{"secret": }]', "no table of clinical values"),
}


@pytest.mark.parametrize("name", TABLES)
def test_what_stands_in_a_table_is_not_told(name: str, study: Path, caplog: pytest.LogCaptureFixture) -> None:
    content, message = TABLES[name]
    table = study.with_name("own.json" if "json" in name else "own.csv")
    table.write_text(content)
    with pytest.raises(CohortError) as error:
        label.request_case({"image": str(study), "ehr_csv": table.name}, FEATURES)
    assert message in str(error.value)
    assert not any(word in str(error.value) + caplog.text for word in ("secret", "77"))


def test_messages_for_the_client_have_no_folder_of_the_server(study: Path) -> None:
    told = label_guard.for_client(
        f"{study}: damaged; /srv/app/model/x.pt and (/a/b/c), see http://a.example/b/c; CT/PET"
    )
    assert told == "CHUM-001/CHUM-001__CT.nii.gz: damaged; x.pt and (c), see http://a.example/b/c; CT/PET"


# --- who may ask -----------------------------------------------------------------------------------------------------
def scope(method: str = "GET", address: str = "/info/", server: str = "127.0.0.1", **headers: str) -> dict[str, Any]:
    path, _, query = address.partition("?")
    given = [(name.encode(), value.encode()) for name, value in {"host": "127.0.0.1:8000", **headers}.items()]
    start = {"type": "http", "method": method, "path": path, "query_string": query.encode()}
    return {**start, "headers": [pair for pair in given if pair[1]], "server": (server, 8000)}


ASKED: dict[str, tuple[dict[str, Any], int]] = {
    "no_origin": (scope(), 200),
    "localhost": (scope(host="localhost:8000"), 200),
    "ipv6": (scope(host="[::1]:8000", server="::1"), 200),
    "own_address": (scope(host="10.0.0.5:8000", server="10.0.0.5"), 200),
    "own_name": (scope(host=f"{socket.gethostname()}:8000"), 200),
    "allowed_name": (scope(host="GPU1.hospital.example:8000"), 200),
    "rebinding": (scope(host="evil.example:8000"), 403),
    "rebinding_own_page": (scope(host="evil.example:8000", origin="http://evil.example:8000"), 403),
    "name_like_an_address": (scope(host="127.0.0.1.evil.example"), 403),
    "other_address": (scope(host="10.0.0.6:8000", server="10.0.0.5"), 403),
    "no_host": (scope(host=""), 403),
    "odd_host": (scope(host="[::1"), 403),
    "own_page": (scope("POST", origin="http://127.0.0.1:8000"), 200),
    "allowed_page": (scope("POST", origin="https://viewer.example"), 200),
    "other_page": (scope("POST", origin="http://evil.example"), 403),
    "other_page_reads": (scope(origin="http://evil.example"), 403),
    "preflight": (scope("OPTIONS", origin="http://evil.example"), 403),
    "other_port": (scope("POST", origin="http://127.0.0.1:3000"), 403),
    "sandbox_or_file": (scope("POST", origin="null"), 403),
    "allowed_page_below": (scope("POST", origin="https://viewer.example.evil.example"), 403),
    "session": (scope(address="/session/?session_id=ab-12"), 200),
    "session_above": (scope("POST", "/infer/m?session_id=../../x"), 400),
    "session_archive": (scope("PUT", "/session/?uncompress=true"), 400),
    "scan": (scope(address="/datastore/image?image=CHUM (2) 1__CT"), 200),
    "scan_above": (scope("PUT", "/datastore/image?image=..%2F..%2Fx"), 400),
    "scan_without_name": (scope("PUT", "/datastore/image"), 400),
    "scan_hidden": (scope("PUT", "/datastore/?image=.lock"), 400),
    "new_scan": (scope("PUT", "/datastore/?image=new"), 200),
    "linked_scan": (scope("PUT", "/datastore/?image=CHUM-009__CT"), 403),
    "linked_scan_removed": (scope("DELETE", "/datastore/image?id=CHUM-009__CT"), 403),
    "tag": (scope("PUT", "/datastore/label?image=A&tag=final"), 200),
    "tag_above": (scope("PUT", "/datastore/label?image=A&tag=../../scripts"), 400),
}


@pytest.mark.parametrize("name", ASKED)
def test_only_own_pages_and_names_are_answered(name: str, settings: SimpleNamespace, tmp_path: Path) -> None:
    asked, status = ASKED[name]
    (tmp_path / "studies" / "CHUM-009__CT.nii.gz").symlink_to(tmp_path / "elsewhere.nii.gz")
    refused = label_web.refusal(asked, ["gpu1.hospital.example"], ["https://viewer.example/"])
    assert (refused[0] if refused else 200) == status


@pytest.mark.parametrize("variable", ["MONAI_LABEL_ALLOWED_HOSTS", "MONAI_LABEL_ALLOWED_ORIGINS"])
def test_what_is_allowed_in_the_environment_is_a_list(variable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(variable, raising=False)
    assert label_web.allowed(variable) == []
    monkeypatch.setenv(variable, '["a.example"]')
    assert label_web.allowed(variable) == ["a.example"]
    monkeypatch.setenv(variable, "a.example")
    with pytest.raises(ValueError, match=f"{variable} is a JSON list, such as"):
        label_web.allowed(variable)


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("{", json.JSONDecodeError, "Expecting"),
        ("[1]", RequestError, "params is an object"),
        ("5", RequestError, "params is an object"),
        ("null", RequestError, "params is an object"),
        ("[" * 200_000, RequestError, "params is an object"),
        (f'{{"age": {"9" * 5000}}}', RequestError, "params is an object"),
    ],
    ids=["no_json", "list", "number", "null", "nested", "long_number"],
)
def test_parameters_are_an_object(text: str, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message) as raised:
        label_web.read_params(text)
    assert label_web.explain(raised.value)[0] == 400


@pytest.mark.parametrize(
    ("gpus", "device", "accepted"),
    [(0, "cpu", True), (0, "cuda:3", True), (1, "cuda", True), (1, "cuda:0", True), (1, "cuda:1", False)],
)
def test_a_gpu_is_one_of_the_server(gpus: int, device: str, accepted: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: gpus)
    if accepted:
        assert label_guard.read_prediction({"device": device}) == {"device": device}
    else:
        with pytest.raises(RequestError, match=f"or the name of a GPU of the server, got '{device}'"):
            label_guard.read_prediction({"device": device})


def test_only_words_of_the_bundle_are_told() -> None:
    wrapped = RuntimeError("Failed to instantiate /srv/x")
    wrapped.__cause__ = CohortError("no PET beside /srv/a/b.nii.gz")
    assert label_web.explain(wrapped) == (400, "no PET beside b.nii.gz")
    assert label_web.explain(OSError("root:x:0:0")) == (500, "the server failed at this (OSError); its log tells more")


def test_the_page_of_the_log_needs_nothing_from_elsewhere() -> None:
    assert "://" not in label_web.LOG_PAGE and "src=" not in label_web.LOG_PAGE


def test_no_setting_of_the_bundle_is_open_to_requests() -> None:
    """MONAI Label writes what a request says into these, and evaluates it."""
    for config in (BUNDLE / "configs").glob("*.json"):
        assert "displayable_configs" not in json.loads(config.read_text()), config.name
    assert (
        "$import scripts.runtimes.label_guard"
        in json.loads((BUNDLE / "configs" / "inference.json").read_text())["imports"]
    )


# --- item and network ---------------------------------------------------------------------------------------------
def make_item() -> dict[str, Any]:
    image = MetaTensor(torch.rand(2, 32, 32, 32), affine=torch.eye(4))
    return {keys.PATIENT_ID: "P-1", keys.IMAGE: image, keys.CLINICAL: torch.arange(7.0), "other": 3}


@pytest.mark.parametrize(
    ("names", "changed"),
    [
        pytest.param(("inference.json", "label.json"), {"preprocessing", "inferer", "postprocessing"}, id="prediction"),
        pytest.param(
            ("train.json", "label_train.json"),
            {
                *("dataset_dir", "output_dir", "spec", "split", "network_def", "train", "validate", "finalize"),
                *("keep_epoch", "early_stop_patience"),  # a training that a viewer starts ends by itself
            },
            id="training",
        ),
    ],
)
def test_the_overlays_change_only_what_a_server_needs(names: tuple[str, str], changed: set[str]) -> None:
    parsers = [ConfigParser(), ConfigParser()]
    for parser, used in zip(parsers, (names[:1], names), strict=True):
        parser.read_config([str(BUNDLE / "configs" / name) for name in used])
    alone, served = (parser.get() for parser in parsers)
    assert {name for name in served if served[name] != alone.get(name)} - {"_meta_"} == changed
    check_ids(served)


def test_a_request_is_prepared_as_a_case_is(tiny_cohort: Path, tmp_path: Path) -> None:
    save_weights(make_ensemble(1), tmp_path / "model.pt")
    items = []
    for names in (("inference.json",), ("inference.json", "label.json")):
        parser = ConfigParser()
        parser.read_config([str(BUNDLE / "configs" / name) for name in names])
        parser.update({"checkpoint": str(tmp_path / "model.pt"), "device": "cpu", "dataset_dir": str(tiny_cohort)})
        preprocessing = parser.get_parsed_content("preprocessing")
        case = parser.get_parsed_content("dataset#data")[0]
        items.append(preprocessing({"image": case[keys.CT]} if len(names) > 1 else case))
    plain, served = items
    assert torch.equal(plain[keys.IMAGE].as_tensor(), served[keys.IMAGE].as_tensor())
    assert torch.equal(plain[keys.CLINICAL], served[keys.CLINICAL])
    assert set(served) == {*plain, "latencies"}


def test_a_server_gets_its_request_back_and_the_clinical_values_reach_the_network() -> None:
    request = {"image": "/a/ct.nii.gz", "image_path": "/a/ct.nii.gz", "device": "cpu", "model_filename": "model.pt"}
    data = {**make_item(), keys.REQUEST: request, "latencies": {"pre": {}}}
    item = label.KeepRequestd((keys.PATIENT_ID, keys.IMAGE, keys.CLINICAL))(data)
    assert {name: item[name] for name in request if name != "image"} == {
        k: v for k, v in request.items() if k != "image"
    }
    assert "other" not in item
    batch = item[keys.IMAGE][None].to("cpu")  # as MONAI Label makes one
    network = make_ensemble(2)
    with torch.no_grad():
        served = label.ServedInferer()(batch, network)
        given = EnsembleInferer()(batch.as_tensor(), network, item[keys.CLINICAL][None])
        without = EnsembleInferer()(batch.as_tensor(), network)
        both = label.ServedInferer()(batch.as_tensor(), network, item[keys.CLINICAL][None])
    assert torch.equal(served[keys.LOG_HAZARD], given[keys.LOG_HAZARD])
    assert torch.equal(both[keys.LOG_HAZARD], given[keys.LOG_HAZARD])
    assert not torch.allclose(served[keys.LOG_HAZARD], without[keys.LOG_HAZARD], atol=1e-4)
    assert not isinstance(served[keys.SEG_PROB], MetaTensor)


# --- training -----------------------------------------------------------------------------------------------------
def test_edited_masks_get_their_labels_from_the_table(
    tiny_cohort: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    lonely = tmp_path / "LONE-001__CT.nii.gz"
    shutil.copy(ct_of(tiny_cohort, 1), lonely)
    pairs = [{"image": str(ct_of(tiny_cohort, k)), "label": f"/masks/{k}.nii.gz"} for k in (1, 2)]
    cases = label.edited_cases([*pairs, {"image": str(lonely), "label": "/masks/3.nii.gz"}], FEATURES)
    assert [case[keys.PATIENT_ID] for case in cases] == ["CHUM-001", "CHUM-002"]
    assert [case[keys.MASK] for case in cases] == ["/masks/1.nii.gz", "/masks/2.nii.gz"]
    assert [case[keys.HPV_KNOWN] for case in cases] == [True, False]
    assert [(case[keys.TIME], case[keys.EVENT], case[keys.SURV_KNOWN]) for case in cases] == [
        (300, True, True),
        (400, False, True),
    ]
    assert cases[0][keys.CLINICAL]["age"] == 50
    assert "left out of the training: patient LONE-001: no PET" in caplog.text


def test_without_a_table_an_edited_mask_is_all_that_is_known(tiny_cohort: Path, tmp_path: Path) -> None:
    for kind in ("CT", "PT"):
        shutil.copy(str(ct_of(tiny_cohort, 1)).replace("__CT", f"__{kind}"), tmp_path / f"A-1__{kind}.nii.gz")
    (case,) = label.edited_cases([{"image": str(tmp_path / "A-1__CT.nii.gz"), "label": "/mask.nii.gz"}], FEATURES)
    assert (case[keys.SEG_KNOWN], case[keys.HPV_KNOWN], case[keys.SURV_KNOWN]) == (True, False, False)


def test_without_validation_cases_label_selects_by_the_training_cases(caplog: pytest.LogCaptureFixture) -> None:
    training = label.CaseDataset([{keys.PATIENT_ID: "A"}], lambda x: x)
    assert list(label.edited_dataset([], lambda x: x, None, FEATURES, training).data) == training.data
    assert "no case is set apart for validation" in caplog.text


def make_started(seed: int = 2) -> label.StartedEnsemble:
    started = label.StartedEnsemble(make_ensemble(1, seed).folds[0], SETTINGS)
    started.provenance = {"trained_on": "5 cases"}
    return started


def test_further_training_starts_from_the_first_fold_of_an_ensemble(tmp_path: Path) -> None:
    shipped, fresh = make_ensemble(3, seed=1), make_started()
    shipped.provenance["feature_statistics"] = [{"reason": "a test"}] * 3
    save_weights(shipped, tmp_path / "model.pt", half=True)
    state = torch.load(tmp_path / "model.pt", weights_only=True)
    fresh.load_state_dict(state, strict=False)  # what MONAI's CheckpointLoader does
    assert len(fresh.folds) == 1
    for name, value in shipped.folds[0].state_dict().items():
        assert torch.allclose(fresh.folds[0].state_dict()[name].float(), value.float(), atol=1e-2), name
    assert fresh.provenance["trained_on"] == "5 cases; started from weights trained on nothing at all"
    assert "trained further" in fresh.provenance["calibration"]["reason"]
    assert fresh.provenance["hpv_threshold"]["value"] is None
    provenance = dict(fresh.provenance)
    fresh.load_state_dict(fresh.state_dict())
    assert fresh.provenance == provenance  # it has started already


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param(
            lambda state: state["_extra_state"]["settings"].update(spacing_mm=2.0),
            r"spacing_mm: weights 2\.0, config 8\.0",
            id="settings",
        ),
        pytest.param(lambda state: state.pop("folds.1.decoder.logits.bias"), "1 weights are missing", id="weights"),
        pytest.param(
            lambda state: state["_extra_state"]["provenance"].update(trained_on=["x"]), "trained_on is", id="provenance"
        ),
    ],
)
def test_weights_that_training_cannot_start_from_are_refused(change: Callable, message: str) -> None:
    fresh, state = make_started(), make_ensemble(2).state_dict()
    before = {name: value.clone() for name, value in fresh.folds[0].state_dict().items()}
    change(state)
    with pytest.raises(ValueError, match=message):
        fresh.load_state_dict(state, strict=False)
    assert all(torch.equal(value, before[name]) for name, value in fresh.folds[0].state_dict().items())
    assert fresh.provenance == {"trained_on": "5 cases"}


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
    assert re.fullmatch(r"model_before_\d{8}_\d{6}\.pt", backup.name)
    assert backup.read_text() == "old"
    assert not (tmp_path / "run" / "cache").exists()


def test_a_training_of_monai_label_says_what_it_was_trained_on(tiny_cohort: Path, tmp_path: Path) -> None:
    case = {keys.CT: str(ct_of(tiny_cohort, 1)), keys.CENTRE: "CHUM"}
    cohort = label.LabelCohort("studies", [])
    assert cohort.split("partial", 3, 0, 0).training == []
    assert cohort.statement([case]) == (
        "1 cases of 1 centre (CHUM); research use only, not for clinical use; masks edited in MONAI Label"
    )
    (tmp_path / "images" / "A").mkdir(parents=True)
    (tmp_path / "cohort.json").write_text(json.dumps({"notice": "Digital phantoms"}))
    phantom = {keys.CT: str(tmp_path / "images" / "A" / "A__CT.nii.gz"), keys.CENTRE: "A"}
    assert cohort.statement([phantom]) == "1 digital phantoms, not for clinical use; masks edited in MONAI Label"


# --- the server's script --------------------------------------------------------------------------------------------
def test_the_server_lists_a_link_to_each_ct(tiny_cohort: Path, tmp_path: Path) -> None:
    folder = Path(serve.list_studies(str(tiny_cohort), str(tmp_path / "store")))
    again = Path(serve.list_studies(str(tiny_cohort), str(tmp_path / "store")))
    assert folder == again == tmp_path / "store"
    links = sorted(folder.iterdir())
    assert [link.name for link in links] == [f"CHUM-{k:03d}__CT.nii.gz" for k in range(1, 7)]
    assert links[0].resolve() == ct_of(tiny_cohort, 1).resolve()
    assert serve.list_studies("http://127.0.0.1:8042/dicom-web") == "http://127.0.0.1:8042/dicom-web"


@pytest.mark.parametrize(("folder", "message"), [("none", "does not exist"), ("empty", "no CT in")])
def test_the_server_needs_scans(folder: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=message):
        serve.list_studies(str(tmp_path / folder))


def test_trained_weights_in_the_app_are_kept(tmp_path: Path) -> None:
    app, bundle = tmp_path / "app", tmp_path / "bundle"
    app.mkdir()
    (app / "main.py").touch()
    for name in ("configs", "scripts", "docs", "models"):
        (bundle / name).mkdir(parents=True)
    with pytest.raises(UsageError, match="no weights at"):
        serve.install_bundle(Path(sys.executable), app, bundle)
    (bundle / "models" / "model.pt").write_text("shipped")
    (bundle / "configs" / "a.json").write_text("1")
    target = serve.install_bundle(Path(sys.executable), app, bundle)
    assert target == app / "model" / NAME
    (target / "models" / "model.pt").write_text("trained since")
    (bundle / "configs" / "a.json").write_text("2")
    serve.install_bundle(Path(sys.executable), app, bundle)
    assert (target / "configs" / "a.json").read_text() == "2"
    assert (target / "models" / "model.pt").read_text() == "trained since"
    serve.install_bundle(Path(sys.executable), app, bundle, fresh_model=True)
    assert (target / "models" / "model.pt").read_text() == "shipped"
    (target / "models" / "model.pt").write_text("trained again")
    serve.install_bundle(Path(sys.executable), app, bundle, fresh_model=True)
    backups = sorted((target / "models").glob("model_before_*"))
    assert sorted(path.read_text() for path in backups) == ["trained again", "trained since"]
    assert all(re.fullmatch(r"model_before_\d{8}_\d{6}(_\d+)?\.pt", path.name) for path in backups)


@pytest.mark.parametrize(
    ("classes", "named"),
    [
        pytest.param(["GTV"], {"0": "background", "1": "tumour"}, id="one_class"),
        pytest.param(["GTVp", "GTVn"], {"0": "background", "1": "GTVp", "2": "GTVn"}, id="two_classes"),
    ],
)
def test_segments_are_named_by_the_classes_of_the_model(tmp_path: Path, classes: list[str], named: dict) -> None:
    ensemble = FoldEnsemble(MultitaskNet(len(FEATURES), seg_classes=len(classes)), {**SETTINGS, "seg_classes": classes})
    ensemble.settings["survival_inputs"] = ["deep"]
    save_weights(ensemble, tmp_path / "models" / "model.pt")
    path = tmp_path / "configs" / "metadata.json"
    path.parent.mkdir()
    shutil.copy(BUNDLE / "configs" / "metadata.json", path)
    serve.name_segments(tmp_path)
    metadata = json.loads(path.read_text())
    assert metadata["network_data_format"]["outputs"]["pred"]["channel_def"] == named
    metadata["network_data_format"]["outputs"]["pred"]["channel_def"] = {"0": "background", "1": "tumour"}
    assert metadata == json.loads((BUNDLE / "configs" / "metadata.json").read_text())


def test_a_second_start_is_as_quiet_as_the_first(tiny_cohort: Path, tmp_path: Path, capsys: Any) -> None:
    studies = tmp_path / "studies"
    shutil.copytree(ct_of(tiny_cohort, 1).parent, studies / "CHUM-001")
    store = Path(serve.list_studies(str(studies)))
    first = capsys.readouterr()
    (store / "labels" / "final").mkdir(parents=True)
    shutil.copy(studies / "CHUM-001" / "CHUM-001.nii.gz", store / "labels" / "final" / "CHUM-001__CT.nii.gz")
    assert serve.list_studies(str(studies)) == str(store)
    assert capsys.readouterr() == first
    assert first.err == ""


def test_a_list_that_cannot_be_written_is_told(tiny_cohort: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match=r"the list of CTs cannot be written: .*--store"):
        serve.list_studies(str(tiny_cohort), str(tmp_path / "file"))


def test_an_environment_that_cannot_be_made_is_told_with_its_own_exit_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(label_environment, "REQUIREMENTS", ("nothing",))

    def make_venv(place: Path, **_: Any) -> None:
        (place / "bin").mkdir(parents=True)
        (place / "bin" / "python").symlink_to("/bin/false")

    monkeypatch.setattr(environments.venv, "create", make_venv)
    with pytest.raises(SystemExit) as error:
        check.check_environment("label", str(tmp_path / "env"))
    assert error.value.code == check.SKIPPED == 77
    told = capsys.readouterr().out
    assert "SKIPPED, not tested: MONAI Label's environment cannot be made" in told and "-m pip install" in told
    with pytest.raises(UsageError, match="MONAI Label's environment cannot be made"):
        serve.serve_label(str(tmp_path), env=str(tmp_path / "env"))
    assert (tmp_path / "env" / "installed.txt").read_text() == "not finished"


def test_a_folder_that_holds_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "pyvenv.cfg").write_text("of another environment")
    with pytest.raises(environments.OwnEnvironmentError, match="holds something else; name a new folder"):
        label_environment.make_label_environment(tmp_path)
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


@contextmanager
def serving(folder: Path, bundle: Path, studies: str, **settings: str) -> Iterator[tuple[str, Path]]:
    """Address of a server that ``scripts/serve.py label`` started, and its copy of the bundle."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = ("--studies", studies, "--bundle", str(bundle), "--app", str(folder / "monaibundle"))
    script = str(ROOT / "scripts" / "serve.py")
    command = [sys.executable, script, "label", *options, "--env", sys.prefix, f"--port={port}"]
    command.append(f"--audit={folder / 'audit.jsonl'}")
    settings = {"MONAI_LABEL_SESSION_PATH": str(folder / "sessions"), "PYTHONPATH": "", **settings}
    with (folder / "log.txt").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env={**os.environ, **settings})
    try:
        address = f"http://127.0.0.1:{port}"
        wait_for(lambda: answers(address), process, folder / "log.txt")
        yield address, folder / "monaibundle" / "model" / NAME
    finally:
        process.terminate()
        process.wait(30)


@pytest.fixture(scope="module")
def server(studies: Path, bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """A server of a folder of scans, which pages of :data:`VIEWER` may use."""
    folder = tmp_path_factory.mktemp("server")
    with serving(folder, bundle, str(studies), MONAI_LABEL_ALLOWED_ORIGINS=json.dumps([VIEWER])) as started:
        yield started


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


PYTHON = '$__import__("pathlib").Path("{canary}").touch() or {value}'
TARGET = {"_target_": "builtins.open", "file": "{canary}", "mode": "w"}
CT_1 = "/infer/{model}?image={ct}&output=json"
ATTACKS: dict[str, tuple[str, str, Any, str]] = {  # method, address, parameters, what the reply says
    "force": ("POST", CT_1, {"force": PYTHON.replace("{value}", "False")}, "force is true or false"),
    "force_component": ("POST", CT_1, {"force": TARGET}, "force is true or false"),
    "weights": ("POST", CT_1, {"model_filename": PYTHON.replace("{value}", "'model.pt'")}, "model_filename is"),
    "weights_component": ("POST", CT_1, {"model_filename": [TARGET]}, "model_filename is"),
    "weights_of_another": ("POST", CT_1, {"model_filename": "other.pt"}, "model_filename is one of model.pt"),
    "device": ("POST", CT_1, {"device": PYTHON.replace("{value}", "'cpu'")}, "device is"),
    "device_reference": ("POST", CT_1, {"device": "@run"}, "device is"),
    "age": ("POST", CT_1, {"age": PYTHON.replace("{value}", "50")}, "age is a single number"),
    "age_component": ("POST", CT_1, {"age": TARGET}, "age is a single number or word"),
    "config_id": ("POST", CT_1, {"checkpoint": PYTHON}, "unknown parameter 'checkpoint'"),
    "misspelt": ("POST", CT_1, {"agee": 50}, "unknown parameter 'agee'; is 'age' meant?"),
    "table": ("POST", CT_1, {"ehr_csv": "/etc/passwd"}, "ehr_csv is a file of the studies, got 'passwd'"),
    "pet": ("POST", CT_1, {"pet": "/etc/passwd"}, "pet is a file of the studies, got 'passwd'"),
    "image": ("POST", CT_1, {"image": "/etc/passwd"}, "image is a file of the studies, got 'passwd'"),
    "image_above": ("POST", CT_1, {"image": "../../etc/passwd"}, "image is a file of the studies"),
    "mask": ("POST", CT_1, {"save_label": True, "label_tag": "../../x"}, "label_tag is a plain name"),
    "image_nul": ("POST", CT_1, {"image": "a\0b"}, "image is the id of a CT in the server's list"),
    "no_json": ("POST", CT_1, "{", "params is no valid JSON"),
    "a_list": ("POST", CT_1, "[1]", "params is an object"),
    "null": ("POST", CT_1, "null", "params is an object"),
    "nested": ("POST", CT_1, "[" * 20000, "params is an object"),
    "long_number": ("POST", CT_1, f'{{"age": {"9" * 5000}}}', "params is an object"),
    "slide": ("POST", "/infer/wsi/{model}?image={ct}", {"level": 0}, "takes no whole-slide images"),
    "epochs": ("POST", "/train/{model}", {"max_epochs": PYTHON.replace("{value}", "1")}, "max_epochs is a whole"),
    "epochs_at_once": ("POST", "/train/{model}?run_sync=true", {"max_epochs": TARGET}, "max_epochs is a whole"),
    "training_device": ("POST", "/train/{model}", {"device": PYTHON}, "device is"),
    "run_id": ("POST", "/train/{model}", {"run_id": PYTHON}, "run_id is 'run'"),
    "tracking": ("POST", "/train/{model}", {"tracking": "{canary}.json"}, "tracking is 'None'"),
    "ohif_training": ("POST", "/train/", {"{model}": {"max_epochs": PYTHON}}, "max_epochs is a whole"),
    "batch": ("POST", "/batch/infer/{model}", {"images": ["/etc/passwd"]}, "images is 'all'"),
    "batch_force": ("POST", "/batch/infer/{model}", {"force": PYTHON}, "force is true or false"),
    "new_scan": ("PUT", "/datastore/image?image=../../canary", None, "image is a plain name"),
    "scan_replaced": ("PUT", "/datastore/image?image={ct}", None, "the list only links to this scan"),
    "scan_removed": ("DELETE", "/datastore/image?id={ct}", None, "the list only links to this scan"),
    "tag": ("PUT", "/datastore/label?image={ct}&tag=../../../canary", None, "tag is a plain name"),
    "archive": ("PUT", "/session/?uncompress=true", None, "archives are not unpacked"),
    "session": ("POST", "/infer/{model}?session_id=../../x", {}, "session_id is a plain name"),
    "new_weights": ("PUT", "/model/{model}", None, "not by a request"),
}


def filled(value: Any, **names: Any) -> Any:
    """The names in braces of all texts within."""
    if isinstance(value, dict):
        return {filled(key, **names): filled(each, **names) for key, each in value.items()}
    if isinstance(value, list):
        return [filled(each, **names) for each in value]
    for name, text in names.items() if isinstance(value, str) else ():
        value = value.replace(f"{{{name}}}", str(text))
    return value


def files_of(*folders: Path) -> dict[Path, bytes]:
    """What there is, but caches of Python."""
    files = [path for folder in folders for path in folder.rglob("*") if path.is_file() and path.suffix != ".pyc"]
    return {path: path.read_bytes() for path in files}


@in_monai_label
@pytest.mark.parametrize("name", ATTACKS)
def test_a_server_refuses_what_an_attacker_sends(
    name: str, server: tuple[str, Path], studies: Path, tmp_path: Path
) -> None:
    import requests

    address, served = server
    ct = sorted(studies.glob("Task 1/[!L]*/*__CT.nii.gz"))[0].name.removesuffix(".nii.gz")
    names = {"canary": tmp_path / "canary", "model": NAME, "ct": ct}
    method, path, params, message = filled(list(ATTACKS[name]), **names)
    before = files_of(served, studies)
    body: dict[str, Any] = {"json": params}
    if path.startswith(f"/infer/{NAME}"):
        body = {"data": {"params": params if isinstance(params, str) else json.dumps(params)}}
    elif method == "PUT":
        body = {"files": {each: ("x.py", b"raise SystemExit") for each in ("file", "files", "label")}}
    reply = requests.request(method, f"{address}{path}", timeout=300, **body)
    assert reply.status_code in (400, 403), reply.text
    assert message in reply.json()["detail"]
    assert not any(word in reply.text for word in ("root:", str(studies), str(served)))
    assert not list(tmp_path.iterdir())
    assert files_of(served, studies) == before


PAGES: dict[str, tuple[dict[str, str], int]] = {
    "another_origin": ({"Origin": "http://evil.example"}, 403),
    "a_file": ({"Origin": "null"}, 403),
    "rebinding": ({"Host": "evil.example", "Origin": "http://evil.example"}, 403),
    "own_page": ({"Origin": "{address}"}, 200),
    "allowed_viewer": ({"Origin": VIEWER}, 200),
    "no_page": ({}, 200),
}


@in_monai_label
@pytest.mark.parametrize("name", PAGES)
@pytest.mark.parametrize("method", ["GET", "POST"])
def test_a_server_answers_its_own_pages_and_allowed_ones(name: str, method: str, server: tuple[str, Path]) -> None:
    import requests

    address, _ = server
    headers, status = filled(PAGES[name][0], address=address), PAGES[name][1]
    path = "/datastore/" if method == "GET" else "/activelearning/first"
    reply = requests.request(method, f"{address}{path}", headers=headers, timeout=300)
    assert reply.status_code == status, reply.text
    allowed = VIEWER if name == "allowed_viewer" else None
    assert reply.headers.get("Access-Control-Allow-Origin") == allowed
    asks = {**headers, "Access-Control-Request-Method": "PUT"}  # as a browser does before it sends to another origin
    before = requests.options(f"{address}{path}", headers=asks, timeout=300)
    assert before.headers.get("Access-Control-Allow-Origin") == allowed
    assert before.status_code == 200 if allowed else before.status_code != 200


@in_monai_label
@pytest.mark.parametrize("way", ["file", "session"])
def test_a_server_takes_an_upload_with_a_pet_of_the_studies(way: str, server: tuple[str, Path], studies: Path) -> None:
    import requests

    address, _ = server
    ct = sorted(studies.glob("Task 1/[!L]*/*__CT.nii.gz"))[0]
    pet = str(ct).replace("__CT", "__PT")
    form = {"params": json.dumps({"device": "cpu", "pet": pet, "result_extension": ".nrrd"})}
    if way == "file":
        with ct.open("rb") as file:
            url = f"{address}/infer/{NAME}?output=json"
            reply = requests.post(url, data=form, files={"file": ("x.nii.gz", file)}, timeout=900)
    else:
        with ct.open("rb") as file:
            made = requests.put(f"{address}/session/", files={"files": (ct.name, file)}, timeout=300).json()
        url = f"{address}/infer/{NAME}?output=json&session_id={made['session_id']}"
        reply = requests.post(url, data=form, timeout=900)
        assert requests.delete(f"{address}/session/{made['session_id']}", timeout=300).status_code == 200
    assert reply.status_code == 200, reply.text
    assert reply.json()["tumour"]["volume_ml"] > 0


@in_monai_label
def test_a_server_shows_its_log_without_the_internet(server: tuple[str, Path]) -> None:
    import requests

    page = requests.get(f"{server[0]}/logs/?lines=7", timeout=300).text
    assert "://" not in page and "lines=7" in page


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

    # each prediction that was tried left a line, with what it was made from
    audit = served.parents[2] / "audit.jsonl"
    lines = [json.loads(line) for line in audit.read_text().splitlines()][-6:]
    assert [line["outcome"] for line in lines] == ["ok", "ok", "failed", "failed", "failed", "ok"]
    hashes = {
        name: hashlib.sha256(Path(str(cts[0]).replace("__CT", f"__{file}")).read_bytes()).hexdigest()
        for name, file in (("ct", "CT"), ("pet", "PT"))
    }
    assert lines[0]["input"] == {name: {"sha256": digest} for name, digest in hashes.items()}
    assert lines[0]["weights_sha256"] == reply.json()["model"]["sha256"]
    assert not any(word in audit.read_text() for word in ("LONE", "LOST", cts[0].parent.name, str(studies)))

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


# --- with a DICOMweb server, as OHIF uses it -------------------------------------------------------------------------
@pytest.fixture(scope="module")
def archived(studies: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of two studies as DICOM: a phantom's PET/CT, and a CT alone."""
    folder = tmp_path_factory.mktemp("dicom")
    ct, pet = (resample_to_cubes(sorted(studies.glob(f"Task 1/[!L]*/*__{kind}.nii.gz"))[0]) for kind in ("CT", "PT"))
    write_pet_ct(folder / "both", ct, pet, 4.0, {"PatientID": "ID-4711"}, 1)
    write_pet_ct(folder / "other", ct, pet, 4.0, {"PatientID": "ID-4712"}, 2)
    return {"both": folder / "both", "alone": folder / "other" / "CT"}


def resample_to_cubes(path: Path, spacing: float = 4.0) -> np.ndarray:
    """A scan on cubic voxels over the field of view of the phantom's CT, clipped to what 16 bits hold."""
    from nibabel.processing import resample_from_to

    ct = nibabel.load(str(path).replace("__PT", "__CT"))
    extent = np.array(ct.shape) * nibabel.affines.voxel_sizes(ct.affine)
    affine = ct.affine @ np.diag([*(spacing / nibabel.affines.voxel_sizes(ct.affine)), 1.0])
    shape = tuple(int(n) for n in extent // spacing)
    low = -1000.0 if "__CT" in path.name else 0.0
    cubes = resample_from_to(nibabel.load(path), (shape, affine), order=1, cval=low)
    return np.asarray(cubes.dataobj).clip(low, 600)


@pytest.fixture(scope="module")
def ohif(
    bundle: Path, archived: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[str, Path, Any]]:
    """Address of a server whose studies are in Orthanc, its folder, and Orthanc."""
    import orthanc_server

    if not orthanc_server.is_installed():
        pytest.skip("DICOMweb is not tested: Orthanc is not installed (Debian: orthanc, orthanc-dicomweb)")
    user, password = orthanc_server.LOGIN
    folder = tmp_path_factory.mktemp("ohif")
    with orthanc_server.running(tmp_path_factory.mktemp("orthanc")) as archive:
        for study in archived.values():
            archive.upload(study)
        login = {"DICOMWEB_USER": user, "DICOMWEB_PASSWORD": password, "NETRC": os.devnull}
        (folder / "tmp").mkdir()
        cache = {"MONAI_LABEL_DICOMWEB_CACHE_PATH": str(folder / "cache"), "TMPDIR": str(folder / "tmp")}
        with serving(folder, bundle, f"{archive.url}/dicom-web", **login, **cache) as (address, _):
            yield address, folder, archive


@in_monai_label
def test_ohif_names_the_ct_and_gets_a_mask_on_it(
    ohif: tuple[str, Path, Any], bundle: Path, archived: dict[str, Path], tmp_path: Path
) -> None:
    import io

    import pydicom
    import requests
    import SimpleITK

    address, folder, archive = ohif
    ct, pet = "1.2.3.4.301", "1.2.3.4.401"

    def infer(image: str, output: str, **params: Any) -> requests.Response:
        form = {"params": json.dumps({"device": "cpu", "result_extension": ".nrrd", **params})}
        return requests.post(f"{address}/infer/{NAME}?image={image}&output={output}", data=form, timeout=900)

    assert requests.get(f"{address}/datastore/", timeout=300).json()["total"] == 2  # the CTs
    reply = infer(ct, "image")
    assert reply.status_code == 200, reply.text
    (tmp_path / "mask.nrrd").write_bytes(reply.content)
    mask = SimpleITK.ReadImage(str(tmp_path / "mask.nrrd"))
    reader = SimpleITK.ImageSeriesReader()
    reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(archived["both"] / "CT")))
    shown = reader.Execute()
    assert mask.GetSize() == shown.GetSize()
    for one, other in ((mask.GetOrigin(), shown.GetOrigin()), (mask.GetSpacing(), shown.GetSpacing())):
        assert np.allclose(one, other, atol=1e-3)
    assert np.allclose(mask.GetDirection(), shown.GetDirection(), atol=1e-6)

    # the numbers of predict.py for the same study
    told = infer(ct, "json").json()
    options = [f"--ckpt_dir={bundle / 'models'}", "--device=cpu", "--report=False"]
    command = [MAIN_PYTHON, str(ROOT / "scripts" / "predict.py"), str(archived["both"]), str(tmp_path / "out")]
    environment = {**os.environ, "PYTHONPATH": ""}
    done = subprocess.run([*command, *options], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    wanted = json.loads((tmp_path / "out" / "ID-4711" / "prediction.json").read_text())
    assert told["patient_id"] == "ID-4711"
    assert told["survival"]["log_hazard"] == pytest.approx(wanted["survival"]["log_hazard"], abs=1e-4)
    assert told["tumour"]["volume_ml"] == pytest.approx(wanted["tumour"]["volume_ml"], rel=1e-3)
    assert told["tumour"]["suv_max"] == pytest.approx(wanted["tumour"]["suv_max"], rel=1e-4)
    voxels = SimpleITK.GetArrayFromImage(mask)
    assert (voxels > 0).sum() * 4.0**3 / 1000 == pytest.approx(wanted["tumour"]["volume_ml"], rel=1e-3)
    assert told["clinical"][0] == {**told["clinical"][0], "name": "age", "value": 20.0, "source": "DICOM header"}

    # DICOM SEG by dcmqi's program of the environment: nothing is downloaded
    seg = infer(ct, "dicom_seg", label_info=[{"name": "tumour", "model_name": NAME}])
    assert seg.status_code == 200, seg.text
    dataset = pydicom.dcmread(io.BytesIO(seg.content))
    assert (dataset.Modality, dataset.StudyInstanceUID) == ("SEG", "1.2.3.4.101")
    assert not list((folder / "monaibundle" / "bin").iterdir())
    assert not list(folder.glob("tmp/*.nii.gz")), "a copy of a scan stays behind"

    # a mask that is submitted goes into the archive
    with (tmp_path / "mask.nrrd").open("rb") as file:
        params = {"params": json.dumps({"label_info": [{"name": "tumour", "model_name": NAME}]})}
        url = f"{address}/datastore/label?image={ct}&tag=final"
        put = requests.put(url, data=params, files={"label": ("mask.nrrd", file)}, timeout=300)
    assert put.status_code == 200, put.text
    assert archive.modalities("1.2.3.4.101") == {"SEG"}

    for image, message in (
        ("1.2.3.4.302", "has no PET; its series are of: CT"),
        (pet, "no usable CT"),
        ("1.2.3.4.999", "has no series 1.2.3.4.999"),
        ("CHUM-001", "'CHUM-001' is no UID of a series"),
    ):
        refused = infer(image, "json")
        assert refused.status_code == 400, refused.text
        assert message in refused.json()["detail"]
    lines = [json.loads(line) for line in (folder / "audit.jsonl").read_text().splitlines()]
    assert [line["outcome"] for line in lines] == ["ok", "ok", "ok", "failed", "failed"]
    assert lines[0]["input"]["studies"] == ["1.2.3.4.101"]
    assert [lines[0]["input"][name]["series"] for name in ("ct", "pet")] == [ct, pet]
    assert lines[3]["input"]["ct"]["series"] == "1.2.3.4.302"
    assert "ID-471" not in (folder / "audit.jsonl").read_text()

    archive.stop()
    unreachable = infer(ct, "json")
    assert (unreachable.status_code, "it cannot be reached" in unreachable.json()["detail"]) == (400, True)
