"""DICOMweb: a study down, results up, and every fault as a sentence; ``predict.py --dicomweb``."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path

import pytest
from dicom_study import write_series, write_tiny_study

from predict import UsageError, predict
from scripts.dicom import web
from scripts.dicom.tags import DicomError
from scripts.dicom.web import DicomWeb, is_uid

INSTALL = "needs pip install -r requirements-dicom.txt"
pytest.importorskip("dicomweb_client", reason=INSTALL)
requests = pytest.importorskip("requests", reason=INSTALL)
from dicomweb_server import ADDRESS, FakeServer  # noqa: E402

STUDY = "1.2.3.4.101"
pytestmark = pytest.mark.usefixtures("no_credentials")


@pytest.fixture(scope="session")
def phantom(tmp_path_factory) -> Path:
    """A patient of the tiny cohort as DICOM, with a report that is not to be downloaded."""
    folder = tmp_path_factory.mktemp("dicom")
    write_tiny_study(folder, "CHUM-001")
    write_series(
        folder / "other", "OT", uid="1.2.3.4.9", depths=[0], tags={"StudyInstanceUID": STUDY, "PatientID": "CHUM-001"}
    )
    return folder


@pytest.fixture
def server(phantom, monkeypatch) -> FakeServer:
    return FakeServer(monkeypatch, phantom)


# --- the client --------------------------------------------------------------------------------------------------
def test_ct_and_pet_of_a_study_are_downloaded(server, tmp_path):
    found = DicomWeb(ADDRESS).download(STUDY, tmp_path / "study")
    assert sorted(series.modality for series in found) == ["CT", "PT"]
    files = list((tmp_path / "study").iterdir())
    assert len(files) == 64 == sum(series.instances for series in found)
    times = {path.name: path.stat().st_mtime_ns for path in files}
    DicomWeb(ADDRESS).download(STUDY, tmp_path / "again")
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "again").iterdir()} == times
    assert len(set(times.values())) == 64


@pytest.mark.parametrize(
    "method, part, fault, message",
    [
        pytest.param("GET", "/series", 401, "refuses access .401.; set DICOMWEB_USER", id="no_password"),
        pytest.param("GET", "/series", 403, "refuses access .403.", id="forbidden"),
        pytest.param("GET", "/series", 404, "not found .404.; Orthanc's address", id="wrong_address"),
        pytest.param("GET", "/series", 500, "it answers 500", id="server_error"),
        pytest.param("GET", "/series", b"<html>", "not that of a DICOMweb server", id="a_page"),
        pytest.param("GET", "/series", b'[{"0020000E": 3}]', "not that of a DICOMweb server", id="odd_json"),
        pytest.param(
            "GET", "/series", requests.ConnectionError("x"), "cannot be reached; is the address", id="unreachable"
        ),
        pytest.param("GET", "/series", requests.ReadTimeout("x"), "does not answer in time", id="timeout"),
        pytest.param(
            "GET", "/series", requests.exceptions.SSLError("x"), "REQUESTS_CA_BUNDLE", id="unknown_certificate"
        ),
        pytest.param("GET", "/series/", 401, "cannot download series .* refuses access", id="refused_later"),
        pytest.param(
            "GET", "/series/", requests.exceptions.ChunkedEncodingError("x"), "the connection broke off", id="cut_off"
        ),
    ],
)
def test_faults_of_a_server_are_told(method, part, fault, message, server, tmp_path):
    server.faults[method, part] = fault
    with pytest.raises(DicomError, match=message) as told:
        DicomWeb(ADDRESS).download(STUDY, tmp_path)
    assert ADDRESS in str(told.value)


@pytest.mark.parametrize("study", ["../1.2", "1.2/3", "", "1.2.3?x=1", "1." + "2" * 64])
def test_a_study_that_is_no_uid_never_reaches_the_server(study, server):
    with pytest.raises(DicomError, match="is no UID of a study"):
        DicomWeb(ADDRESS).series(study)
    assert server.requests == [] and not is_uid(study)


def test_an_unknown_study(server):
    with pytest.raises(DicomError, match=f"{ADDRESS} has no study 9.9"):
        DicomWeb(ADDRESS).series("9.9")


def test_a_study_without_pet(server, tmp_path):
    server.held = [dataset for dataset in server.held if dataset.Modality != "PT"]
    with pytest.raises(DicomError, match="has no PET; its series are of: CT, OT"):
        DicomWeb(ADDRESS).download(STUDY, tmp_path / "study")
    assert not (tmp_path / "study").exists()


def test_a_series_that_is_not_whole(server, tmp_path, monkeypatch):
    listed = DicomWeb(ADDRESS).series(STUDY)
    monkeypatch.setattr(DicomWeb, "series", lambda *_: listed)
    server.held = server.held[1:]
    with pytest.raises(DicomError, match="did not come whole: 31 of 32 images"):
        DicomWeb(ADDRESS).download(STUDY, tmp_path)


@pytest.mark.parametrize(
    "tag, value, said",
    [
        pytest.param("StudyInstanceUID", "1.2.3.4.666", "1.2.3.4.666", id="another_study"),
        pytest.param("StudyInstanceUID", "", "none", id="no_study"),
        pytest.param("SeriesInstanceUID", "1.2.3.4.666", "1.2.3.4.666", id="another_series"),
    ],
)
def test_an_image_of_another_study_or_series_is_refused(tag, value, said, server, tmp_path):
    server.changed[tag] = value
    with pytest.raises(DicomError, match=f"an image of series .* of study {STUDY} has {tag} {said}"):
        DicomWeb(ADDRESS).download(STUDY, tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "url, message",
    [
        pytest.param("ftp://x/dicom-web", "is no address of a DICOMweb server", id="scheme"),
        pytest.param("pacs/dicom-web", "is no address of a DICOMweb server", id="no_scheme"),
        pytest.param("http://[x", "is no address of a DICOMweb server", id="brackets"),
        pytest.param("http://me:secret@pacs/dicom-web", "holds a user or password; set DICOMWEB_USER", id="password"),
    ],
)
def test_addresses_that_are_refused(url, message):
    with pytest.raises(DicomError, match=message) as told:
        DicomWeb(url)
    assert "secret" not in str(told.value)


@pytest.mark.parametrize(
    "settings, sent",
    [
        pytest.param({"DICOMWEB_USER": "me", "DICOMWEB_PASSWORD": "secret"}, "Basic bWU6c2VjcmV0", id="user"),
        pytest.param({"DICOMWEB_TOKEN": "abc"}, "Bearer abc", id="token"),
        pytest.param({"netrc": "machine 127.0.0.1 login me password secret"}, "Basic bWU6c2VjcmV0", id="netrc"),
        pytest.param({}, None, id="none"),
    ],
)
def test_credentials(settings, sent, server, monkeypatch, tmp_path):
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    (tmp_path / "no_netrc").write_text(settings.get("netrc", ""))
    DicomWeb(ADDRESS).series(STUDY)
    assert server.requests[0].headers.get("Authorization") == sent


@pytest.mark.parametrize(
    "settings, message",
    [
        pytest.param({"DICOMWEB_USER": "me"}, "one alone is set", id="no_password"),
        pytest.param({"DICOMWEB_TOKEN": "t", "DICOMWEB_PASSWORD": "p"}, "which is meant", id="two_ways"),
    ],
)
def test_credentials_that_cannot_be_meant(settings, message, monkeypatch):
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(DicomError, match=message):
        DicomWeb(ADDRESS)


def test_a_password_without_encryption_is_told(monkeypatch, caplog):
    monkeypatch.setenv(web.TOKEN, "abc")
    for url in (ADDRESS, "https://pacs/dicom-web"):
        DicomWeb(url)
    assert caplog.text == ""
    DicomWeb("http://pacs/dicom-web")
    assert "sent without encryption; use https" in caplog.text and "abc" not in caplog.text


def test_results_are_stored(server, phantom):
    paths = sorted((phantom / "CT").iterdir())[:3]
    DicomWeb(ADDRESS).store(paths)
    assert len(server.stored) == 3


@pytest.mark.parametrize(
    "fault, message",
    [
        pytest.param(None, r"did not store: .*\(reason 0122H\)", id="refused"),
        pytest.param(b"{}", r"\(the answer does not name it\)", id="no_word_of_it"),
        pytest.param(401, "cannot store results on .* refuses access", id="access"),
        pytest.param(507, "it answers 507", id="full"),
    ],
)
def test_results_that_are_not_stored(fault, message, server, phantom):
    path = next((phantom / "CT").iterdir())
    server.refused = {"1.2.840.10008.5.1.4.1.1.2"}
    if fault is not None:
        server.faults["POST", "/studies"] = fault
    with pytest.raises(DicomError, match=message):
        DicomWeb(ADDRESS).store([path])


# --- predict.py --------------------------------------------------------------------------------------------------
def test_predict_from_a_server_and_store(server, model, phantom, tmp_path, caplog):
    options = {"ckpt_dir": str(model), "device": "cpu", "report": False}
    web_options = {"dicomweb": ADDRESS, "study": STUDY, "store": True}
    server.faults["POST", "/studies"] = 503 + 1000  # not to be tried again by the client
    with pytest.raises(SystemExit):
        predict(str(tmp_path / "web"), **options, **web_options)
    assert server.stored == [] and (tmp_path / "web" / "CHUM-001" / "prediction.json").is_file()
    server.faults.clear()
    with caplog.at_level(logging.INFO):
        predict(str(tmp_path / "web"), resume=True, **options, **web_options)
    assert "1 of 1 patient done already" in caplog.text
    stored = {dataset.Modality: dataset for dataset in server.stored}
    assert {"SEG", "SR"} <= set(stored)
    assert {dataset.StudyInstanceUID for dataset in server.stored} == {STUDY}
    assert {dataset.PatientID for dataset in server.stored} == {"CHUM-001"}
    predict(str(phantom), str(tmp_path / "folder"), **options)
    told = [json.loads((tmp_path / place / "CHUM-001" / "prediction.json").read_text()) for place in ("web", "folder")]
    assert told[0]["tumour"] == told[1]["tumour"] and told[0]["survival"] == told[1]["survival"]


def test_nothing_is_left_of_a_study(server, model, tmp_path, monkeypatch):
    place = tmp_path / "temporary"
    place.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(place))
    server.faults["GET", "/series/"] = 401
    with pytest.raises(DicomError, match="refuses access"):
        predict(str(tmp_path / "out"), dicomweb=ADDRESS, study=STUDY, ckpt_dir=str(model), device="cpu")
    assert os.listdir(place) == []  # noqa: PTH208


@pytest.mark.parametrize(
    "options, message",
    [
        pytest.param({"dicomweb": ADDRESS}, "--dicomweb URL and --study UID go together", id="no_study"),
        pytest.param({"study": STUDY, "output": "o"}, "--dicomweb URL and --study UID go together", id="no_server"),
        pytest.param({"output": "o", "store": True}, "--store needs --dicomweb", id="store_alone"),
        pytest.param(
            {"output": "o", "dicomweb": ADDRESS, "study": STUDY}, "give INPUT OUTPUT; or", id="input_and_server"
        ),
    ],
)
def test_what_cannot_be_meant(options, message, tmp_path):
    with pytest.raises(UsageError, match=message):
        predict("i", **options)
