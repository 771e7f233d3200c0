"""MONAI Label with a DICOMweb server: the PET is found in the study of the CT, and the audit names the series."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import nibabel
import numpy as np
import pytest
from dicom_study import write_series, write_tiny_study

import serve
from runtimes import label_environment
from scripts import keys
from scripts.cohorts.cohort import CohortError
from scripts.dicom.tags import DicomError
from scripts.imaging.images import write_mask
from scripts.runtimes import label, label_guard

pytest.importorskip("dicomweb_client", reason="needs pip install -r requirements-dicom.txt")
requests = pytest.importorskip("requests", reason="needs pip install -r requirements-dicom.txt")
from dicomweb_server import ADDRESS, FakeServer  # noqa: E402

CT, PET, UNCORRECTED = "1.2.3.4.301", "1.2.3.4.401", "1.2.3.4.501"
AGES = ("age", "gender")
pytestmark = pytest.mark.usefixtures("no_credentials")


@pytest.fixture(scope="module")
def phantom(tmp_path_factory) -> Path:
    """A patient of the tiny cohort as DICOM, with a second PET, not attenuation corrected, of the same study."""
    folder = tmp_path_factory.mktemp("dicom")
    ct = write_tiny_study(folder, "ID-4711")
    frame = {"FrameOfReferenceUID": "1.2.3.4.201", "StudyInstanceUID": "1.2.3.4.101", "PatientID": "ID-4711"}
    write_series(folder / "NAC", "PT", uid=UNCORRECTED, tags={**frame, "CorrectedImage": ["DECY"]}, depths=range(40))
    affine = np.diag([8.0, 8.0, 8.0, 1.0])
    nibabel.save(nibabel.Nifti1Image(ct.astype(np.int16), affine), folder / "ct.nii.gz")
    return folder


@pytest.fixture
def server(phantom, monkeypatch, tmp_path) -> FakeServer:
    """The server, and MONAI Label's settings for it."""
    names = ("SESSION_PATH", "DATASTORE_CACHE_PATH", "TRACKING_URI")
    settings = SimpleNamespace(**{f"MONAI_LABEL_{name}": "" for name in names})
    settings.MONAI_LABEL_STUDIES, settings.MONAI_LABEL_APP_CONF = ADDRESS, {}
    settings.MONAI_LABEL_DICOMWEB_CACHE_PATH = str(tmp_path / "cache")
    monkeypatch.setitem(sys.modules, "monailabel.config", SimpleNamespace(settings=settings))
    dicom = tmp_path / "held"
    for name in ("CT", "PET", "NAC"):
        shutil.copytree(phantom / name, dicom / name)
    return FakeServer(monkeypatch, dicom)


@pytest.fixture
def ct(phantom, tmp_path) -> Path:
    """The CT as MONAI Label has it in its cache."""
    cache = tmp_path / "cache" / "abc"
    shutil.copytree(phantom / "CT", cache / CT)
    return Path(shutil.copy(phantom / "ct.nii.gz", cache / f"{CT}.nii.gz"))


def test_the_pet_of_the_study_is_found_and_kept(server, ct):
    case = label.request_case({"image": str(ct), "device": "cpu"}, AGES)
    assert case[keys.CT] == str(ct)  # the mask lies on what the viewer shows
    assert case[keys.PET].series.uid == PET
    assert (case[keys.PATIENT_ID], case[keys.CLINICAL]) == ("ID-4711", {"age": 20.0, "gender": 0.0})
    pet, affine = case[keys.PET].read()
    assert pet.max() > 1 and np.allclose(np.abs(np.diag(affine)[:3]), 8)
    assert sorted(path.name for path in ct.parent.iterdir()) == [CT, f"{CT}.nii.gz", PET, UNCORRECTED]
    before = len(server.requests)
    label.request_case({"image": str(ct)}, AGES)
    assert not any(request.url.endswith(PET) for request in server.requests[before:])  # it is there already


def test_a_ct_that_stays_dicom(server, ct):
    case = label.request_case({"image": str(ct.parent / CT)}, AGES)
    assert (case[keys.CT].series.uid, case[keys.PET].series.uid) == (CT, PET)


def test_a_request_goes_before_the_header(server, ct):
    (ct.parent / "values.csv").write_text("PatientID,Age\nID-4711,71\n")
    case = label.request_case({"image": str(ct), "ehr_csv": "values.csv", "gender": "male"}, AGES)
    assert case[keys.CLINICAL] == {"age": 71.0, "gender": 1.0}


def test_a_download_that_was_cut_off_is_done_again(server, ct):
    shutil.copytree(ct.parent / CT, ct.parent / PET)  # as many files as the PET has, but one
    next((ct.parent / PET).iterdir()).unlink()
    assert label.request_case({"image": str(ct)}, AGES)[keys.PET].series.uid == PET


def leave(*kept: str):
    def change(server, ct):
        server.held = [dataset for dataset in server.held if dataset.SeriesInstanceUID in kept]

    return change


def fault(method: str, part: str, what: int | Exception):
    def change(server, ct):
        server.faults[method, part] = what

    return change


def cut_ct(server, ct):
    next((ct.parent / CT).iterdir()).unlink()


def other_image(server, ct):
    write_mask(ct, np.zeros((8, 8, 8), np.uint8), np.diag([8.0, 8.0, 8.0, 1.0]))


def another_patient(server, ct):
    for dataset in server.held:
        if dataset.Modality == "PT":
            dataset.PatientID = "ID-9"


FAULTS = {
    "no_pet": (leave(CT), DicomError, f"study 1.2.3.4.101 of {ADDRESS} has no PET; its series are of: CT"),
    "no_usable_pet": (leave(CT, UNCORRECTED), CohortError, "no usable attenuation-corrected PET .* not attenuation co"),
    "deleted_study": (leave(), DicomError, f"has no series {CT}"),
    "not_whole": (cut_ct, DicomError, "the server's cache has 31 of 32 images; remove its folder"),
    "other_image": (other_image, DicomError, "not show the same field of view"),
    "another_patient": (another_patient, CohortError, "scans of 2 patients"),
    "no_password": (fault("GET", "/series", 401), DicomError, "refuses access .401.; set DICOMWEB_USER"),
    "unreachable": (fault("GET", "/series", requests.ConnectionError("x")), DicomError, "cannot be reached"),
    "pet_refused": (fault("GET", f"/series/{PET}", 500), DicomError, f"cannot download series {PET} .* answers 500"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_why_there_is_no_pet_is_told(name, server, ct):
    change, kind, message = FAULTS[name]
    change(server, ct)
    with pytest.raises(kind, match=message) as told:
        label.request_case({"image": str(ct)}, AGES)
    assert str(ct.parent) not in label_guard.for_client(str(told.value))
    assert not [path for path in ct.parent.iterdir() if path.name.startswith(".")]


def test_the_address_is_never_that_of_a_request(server, ct):
    with pytest.raises(label_guard.RequestError, match="unknown parameter"):
        label.request_case({"image": str(ct), "dicomweb": "http://evil.example"}, AGES)
    assert {request.url.split("/dicom-web")[0] for request in server.requests} <= {ADDRESS.removesuffix("/dicom-web")}


def test_the_audit_names_the_series(server, ct, tmp_path):
    prediction = {"model": {"sha256": "f00"}, "quality": {"verdict": "ok", "forced": False}, "files": {"mask": None}}
    audit = tmp_path / "app" / "audit.jsonl"
    label.audit_request(audit, {"image": str(ct)}, "none.pt", prediction)
    (tmp_path / "model.pt").write_bytes(b"weights")
    server.held = [dataset for dataset in server.held if dataset.Modality == "CT"]
    label.audit_request(audit, {"image": str(ct)}, str(tmp_path / "model.pt"))
    good, bad = [json.loads(line) for line in audit.read_text().splitlines()]
    assert (good["outcome"], good["weights_sha256"], good["quality"]) == ("ok", "f00", "ok")
    series = {"ct": {"series": CT, "images": 32}, "pet": {"series": PET, "images": 32}}
    assert good["input"] == {"studies": ["1.2.3.4.101"], **series}
    assert (bad["outcome"], bad["input"]) == ("failed", {"ct": series["ct"], "pet": None})
    assert not any(word in audit.read_text() for word in ("ID-4711", "Doe", str(tmp_path)))


# --- the start of the server ------------------------------------------------------------------------------------
LOGINS = {
    "none": ({}, {}),
    "password": (
        {"USER": "me", "PASSWORD": "x"},
        {"MONAI_LABEL_DICOMWEB_USERNAME": "me", "MONAI_LABEL_DICOMWEB_PASSWORD": "x"},
    ),
    "token": ({"TOKEN": "t"}, "MONAI Label has no use for DICOMWEB_TOKEN"),
    "user_alone": ({"USER": "me"}, "one alone is set"),
}


@pytest.mark.parametrize("name", LOGINS)
def test_user_and_password_reach_monai_label(name, monkeypatch):
    given, wanted = LOGINS[name]
    for variable, value in given.items():
        monkeypatch.setenv(f"DICOMWEB_{variable}", value)
    assert serve.web_login("folder") == {}
    if isinstance(wanted, dict):
        assert serve.web_login(ADDRESS) == wanted
    else:
        with pytest.raises(ValueError, match=wanted):
            serve.web_login(ADDRESS)


def test_a_password_in_the_address_is_refused():
    with pytest.raises(ValueError, match="holds a user or password"):
        serve.web_login("https://me:secret@pacs.example/dicom-web")


def test_the_server_starts_with_the_programs_of_its_environment(monkeypatch, tmp_path):
    started: list = []
    monkeypatch.setattr(serve.os, "execve", lambda *arguments: started.append(arguments))
    places = {"scans": "/s", "audit": "/a.jsonl"}
    serve.start_server(tmp_path / "bin" / "python", tmp_path, ADDRESS, "h", 1, places, {"MONAI_LABEL_X": "y"})
    ((_, command, environment),) = started
    assert environment["PATH"].split(":")[0] == str(tmp_path / "bin")
    assert environment["MONAI_LABEL_X"] == "y"
    assert " ".join(command).endswith("--conf scans /s --conf audit /a.jsonl")
    assert any(package.startswith("dcmqi==") for package in label_environment.ALONE)
