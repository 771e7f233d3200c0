"""The DICOM node on loopback: who may send, what is kept, answers, and a node that is killed."""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from dicom_study import SECRETS, slice_dataset, write_tiny_study

from command_line import UsageError

from conftest import ROOT

net = pytest.importorskip("pynetdicom", reason="needs pip install -r requirements-dicom.txt")
import pydicom  # noqa: E402
from pynetdicom import association as pynetdicom_association  # noqa: E402

from runtimes import dicom_listener as listener  # noqa: E402
from runtimes.dicom_listener import Peer, Receiver, Worker, receiver, send_files, sender  # noqa: E402
from runtimes.dicom_queue import StudyQueue  # noqa: E402
from scripts.dicom.seg import Model  # noqa: E402
from scripts.dicom.web import DicomWeb  # noqa: E402
from serve import serve_dicom  # noqa: E402

# pynetdicom leaves the sockets of broken connections to the garbage collector
pytestmark = pytest.mark.filterwarnings(
    "ignore:Exception ignored in. <socket.socket:pytest.PytestUnraisableExceptionWarning"
)
STUDY = "1.2.3.4.101"
MODEL = Model("multitask", "1.2.3", "maintainers", "sha256:0123456789abcdef", "9 phantoms")
CT, PET = "1.2.840.10008.5.1.4.1.1.2", "1.2.840.10008.5.1.4.1.1.128"


@pytest.fixture(autouse=True)
def collect_sockets() -> Iterator[None]:
    """Such sockets are collected here, where they are ignored, and not in another test."""
    yield
    gc.collect()


WRITE = "import sys; from pathlib import Path; out = Path(sys.argv[2])"  # of a predict.py that only fails


@pytest.fixture(scope="session")
def phantom(tmp_path_factory) -> Path:
    """A patient of the tiny cohort as DICOM."""
    folder = tmp_path_factory.mktemp("dicom")
    write_tiny_study(folder, "CHUM-001")
    return folder


def images(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


@pytest.fixture
def queue(tmp_path):
    queue = StudyQueue(tmp_path / "spool", 0.0, 1e6, 0.0)
    yield queue
    queue.close()


@pytest.fixture
def node(queue):
    """A node that takes what ``SCANNER`` and, from another address, ``ELSEWHERE`` sends; gives its port."""
    network = Receiver(queue, "HNPETCT", [sender("SCANNER"), sender("ELSEWHERE@192.0.2.1")])
    yield network.start("127.0.0.1", 0)
    network.stop()


def associate(port: int, calling: str = "SCANNER", called: str = "HNPETCT", contexts=(CT, PET, "1.2.840.10008.1.1")):
    scu = net.AE(calling)
    scu.acse_timeout = scu.dimse_timeout = scu.network_timeout = 10
    for context in contexts:
        scu.add_requested_context(context)
    return scu.associate("127.0.0.1", port, ae_title=called)


def one_image(**tags) -> pydicom.Dataset:
    return slice_dataset("CT", np.zeros((4, 4), np.int16), (0, 0, 0), tags)


class Archive:
    """A node that keeps what it gets; ``status`` is its answer."""

    def __init__(self) -> None:
        self.got: list[pydicom.Dataset] = []
        self.status = 0x0000
        node = net.AE("ARCHIVE")
        for context in net.AllStoragePresentationContexts:
            node.add_supported_context(context.abstract_syntax)
        self.server = node.start_server(("127.0.0.1", 0), block=False, evt_handlers=[(net.evt.EVT_C_STORE, self.keep)])
        self.port = self.server.socket.getsockname()[1]

    def keep(self, event) -> int:
        self.got.append(event.dataset)
        return self.status


@pytest.fixture
def archive():
    archive = Archive()
    yield archive
    archive.server.shutdown()


# --- who may send, and what ----------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "calling, called, state",
    [
        pytest.param("SCANNER", "HNPETCT", "established", id="known"),
        pytest.param("STRANGER", "HNPETCT", "rejected", id="unknown"),
        pytest.param("ELSEWHERE", "HNPETCT", "aborted", id="from_another_address"),
        pytest.param("SCANNER", "OTHER", "rejected", id="for_another_node"),
    ],
)
def test_peers(calling, called, state, node, queue):
    association = associate(node, calling, called)
    assert getattr(association, f"is_{state}")
    if state == "established":
        assert association.send_c_echo().Status == 0x0000
        association.release()
    assert list(queue.studies.iterdir()) == []


def test_an_image_is_on_the_disk_when_it_is_acknowledged(node, queue):
    image = one_image()
    association = associate(node)
    assert association.send_c_store(image).Status == 0x0000
    kept = pydicom.dcmread(queue.studies / image.StudyInstanceUID / "images" / f"{image.SOPInstanceUID}.dcm")
    assert kept.PixelData == image.PixelData and kept.file_meta.TransferSyntaxUID in listener.PLAIN
    association.release()


@pytest.mark.parametrize(
    "tags, status",
    [
        pytest.param({"StudyInstanceUID": "../../../etc/cron.d/x"}, 0xC000, id="path_for_a_study"),
        pytest.param({"StudyInstanceUID": None}, 0xC000, id="no_study"),
        pytest.param({"StudyInstanceUID": ["1.2", "1.3"]}, 0xC000, id="two_studies"),
    ],
)
def test_hostile_objects_are_refused(tags, status, node, queue, tmp_path):
    with pydicom.config.disable_value_validation():
        image = one_image(**tags)
        association = associate(node)
        before = sorted(tmp_path.rglob("*"))
        assert association.send_c_store(image).Status == status
        assert sorted(tmp_path.rglob("*")) == before
        assert association.send_c_store(one_image()).Status == 0x0000  # and the node goes on
    association.release()


@pytest.mark.parametrize("sent", ["SOPClassUID", "SOPInstanceUID", "no_dicom"])
def test_an_object_that_is_not_the_announced_one_is_refused(sent, node, queue, monkeypatch):
    encode, other = pynetdicom_association.encode, one_image(**{} if sent == "no_dicom" else {sent: "1.2.3"})
    garbage = b"\x08\x00\x18\x00\xff\xff\xff\x7fgarbage" * 9
    content = (lambda *_: garbage) if sent == "no_dicom" else lambda _, *form: encode(other, *form)
    monkeypatch.setattr(pynetdicom_association, "encode", content)
    association = associate(node)
    assert association.send_c_store(one_image()).Status == 0xC000
    association.release()
    assert list(queue.studies.iterdir()) == []


def test_an_object_that_is_too_large_ends_the_connection(node, queue, monkeypatch, caplog):
    monkeypatch.setattr(listener, "MOST_BYTES", 100_000)
    image = slice_dataset("CT", np.zeros((1000, 1000), np.int16), (0, 0, 0), {})
    association = associate(node)
    assert "Status" not in association.send_c_store(image)
    assert "more than 0 MB" in caplog.text
    association = associate(node)
    assert all(association.send_c_store(one_image()).Status == 0x0000 for _ in range(3))
    association.release()


@pytest.mark.parametrize("kind", [0x01, 0x04], ids=["request", "data"])
def test_a_message_without_end_is_not_read_into_memory(kind, node, caplog):
    """Its length is announced before the sender has said who it is."""
    with socket.create_connection(("127.0.0.1", node), timeout=10) as sent:
        sent.sendall(struct.pack(">BBL", kind, 0, 2**32 - 1))
        with contextlib.suppress(ConnectionError):
            assert sent.recv(100) == b""
    assert "a message of 4096 MB is announced" in caplog.text
    association = associate(node)
    assert association.send_c_echo().Status == 0x0000
    association.release()


def test_a_full_disk_is_told_to_the_sender(node, queue):
    queue.min_free_bytes = 1e18
    association = associate(node)
    assert association.send_c_store(one_image()).Status == 0xA700
    association.release()


def test_results_of_an_earlier_run_are_not_predicted_again(node, queue):
    """An archive that sends whole studies sends SEG and SR back, too."""
    report = one_image(SOPClassUID="1.2.840.10008.5.1.4.1.1.88.33")
    association = associate(node, contexts=[report.SOPClassUID])
    assert association.send_c_store(report).Status == 0x0000
    association.release()
    assert list(queue.studies.iterdir()) == [] and queue.next_complete() is None


# --- options -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "read, text, expected",
    [
        pytest.param(sender, "SCANNER", Peer("SCANNER"), id="title"),
        pytest.param(sender, "PET 1@10.0.0.5", Peer("PET 1", "10.0.0.5"), id="title_and_address"),
        pytest.param(sender, "PET@::1", Peer("PET", "::1"), id="ipv6"),
        pytest.param(sender, "PET@scanner.example", None, id="name_of_a_host"),
        pytest.param(sender, "", None, id="empty"),
        pytest.param(sender, "A" * 17, None, id="long"),
        pytest.param(sender, "A\\B", None, id="backslash"),
        pytest.param(receiver, "ARCHIVE@pacs.example:104", Peer("ARCHIVE", "pacs.example", 104), id="receiver"),
        pytest.param(receiver, "ARCHIVE@pacs", None, id="no_port"),
        pytest.param(receiver, "ARCHIVE@pacs:99999", None, id="high_port"),
        pytest.param(receiver, "pacs:104", None, id="no_title"),
    ],
)
def test_nodes(read, text, expected):
    if expected is None:
        with pytest.raises(UsageError, match="AE_TITLE"):
            read(text)
    else:
        assert read(text) == expected


@pytest.mark.parametrize(
    "options, message",
    [
        pytest.param({}, "where do the answers go", id="no_destination"),
        pytest.param({"send": "A@b:1", "stow": "http://x"}, "where do the answers go", id="two_destinations"),
        pytest.param({"send": "A@b:1", "ae_title": "A" * 17}, "--ae_title has 1 to 16", id="title"),
        pytest.param({"send": "A@b:1", "stable": -1.0}, "0 or more", id="negative"),
    ],
)
def test_what_cannot_be_meant(options, message, tmp_path):
    with pytest.raises(UsageError, match=message):
        serve_dicom(str(tmp_path / "spool"), "SCANNER", **options)
    assert not (tmp_path / "spool").exists()


# --- answers -------------------------------------------------------------------------------------------------------
def fill(queue: StudyQueue, paths: list[Path]) -> None:
    for path in paths:
        header = pydicom.dcmread(path, stop_before_pixels=True)
        queue.receive(header.StudyInstanceUID, header.SOPInstanceUID, path.read_bytes())


def texts(dataset: pydicom.Dataset) -> list[str]:
    return [item.TextValue for item in dataset.ContentSequence if item.ValueType == "TEXT"]


@pytest.mark.parametrize(
    "kind, reason",
    [pytest.param("CT", "no PET", id="ct_alone"), pytest.param("PET", "no CT", id="pet_alone")],
)
def test_half_an_examination_is_answered_by_a_reason(kind, reason, queue, phantom, archive, model, caplog):
    fill(queue, images(phantom / kind))
    options = {"ckpt_dir": str(model), "device": "cpu", "report": "False"}
    worker = Worker(queue, "HNPETCT", Peer("ARCHIVE", "127.0.0.1", archive.port), options, MODEL)
    with caplog.at_level(logging.INFO):
        assert [worker.step() for _ in range(3)] == [True, True, False]
    (report,) = archive.got
    assert (report.SOPClassUID, report.StudyInstanceUID) == ("1.2.840.10008.5.1.4.1.1.88.22", STUDY)
    assert report.PatientID == "CHUM-001"
    assert any(reason in text for text in texts(report)) and any("Research use only" in text for text in texts(report))
    assert f"study {STUDY}: no prediction" in caplog.text and reason in (queue.folder / "answers.jsonl").read_text()
    assert not any(secret in caplog.text for secret in SECRETS if secret != "1.2.3.4.")
    assert list(queue.work.iterdir()) == []


@pytest.mark.parametrize(
    "code, reason",
    [
        pytest.param("import sys; sys.exit('cannot write: no space')", "cannot write: no space", id="message"),
        pytest.param("import os; os.kill(os.getpid(), 9)", "ended with code -9", id="killed"),
        pytest.param("import time; time.sleep(60)", "did not end in 0 minutes", id="hangs"),
        pytest.param(
            f"{WRITE}; sys.exit('cannot write ' + str(out / 'ID-4711' / 'x'))", "cannot write (a file)", id="id"
        ),
        pytest.param(
            f"{WRITE}; out.mkdir(); (out / 'predictions.csv').write_text('PatientID,status,reason\\nID-4711,failed,"
            "patient ID-4711: no neck')",
            "no neck",
            id="id_in_a_row",
        ),
    ],
)
def test_a_prediction_that_breaks_off_is_answered_by_a_reason(code, reason, queue, phantom, tmp_path, monkeypatch):
    (tmp_path / "scripts").mkdir()
    (tmp_path / "scripts" / "predict.py").write_text(code)
    monkeypatch.setattr(listener, "ROOT", tmp_path)
    monkeypatch.setattr(listener, "LONGEST_PREDICTION_S", 1.0)
    fill(queue, images(phantom)[:1])
    Worker(queue, "HNPETCT", Peer("ARCHIVE", "127.0.0.1", 1), {}, MODEL).step()
    status = queue.status(STUDY)
    assert (status.state, status.outcome, status.files) == ("sending", "reason", ["refusal_sr.dcm"])
    assert reason in status.reason and "ID-4711" not in status.reason


def test_a_full_disk_puts_a_study_off(queue, phantom, monkeypatch, caplog):
    fill(queue, images(phantom)[:1])

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(StudyQueue, "answer", full)
    monkeypatch.setattr(Worker, "_predicted", lambda *_: ([], "no PET"))
    worker = Worker(queue, "HNPETCT", Peer("ARCHIVE", "127.0.0.1", 1), {}, MODEL)
    assert worker.step() and not worker.step() and "put off for 60 s" in caplog.text
    queue.retry(STUDY, 0)
    assert queue.next_complete() == STUDY


def test_a_study_that_ends_the_node_again_and_again_is_given_up(queue, phantom, monkeypatch):
    fill(queue, images(phantom)[:1])
    for attempt in range(listener.MOST_ATTEMPTS):
        queue.begin(STUDY, queue.work / str(attempt))
        queue._waiting[STUDY] = 0.0  # as a start does
    Worker(queue, "HNPETCT", Peer("ARCHIVE", "127.0.0.1", 1), {}, MODEL).step()
    assert "was begun 5 times and never ended" in queue.status(STUDY).reason


@pytest.mark.parametrize(
    "tags",
    [
        pytest.param(None, id="no_dicom"),
        pytest.param({"SOPClassUID": "1.2"}, id="unknown_class"),
        pytest.param({"SOPClassUID": "x"}, id="class_that_is_no_uid"),
        pytest.param({"SeriesInstanceUID": ["1.2", "1.3"]}, id="two_series"),
    ],
)
def test_images_that_no_report_can_refer_to_leave_a_line(tags, queue, tmp_path, monkeypatch):
    with pydicom.config.disable_value_validation():
        content = BytesIO(b"no DICOM")
        if tags is not None:
            one_image(**tags).save_as(content, enforce_file_format=True)
    queue.receive("1.2", "1.3", content.getvalue())
    monkeypatch.setattr(Worker, "_predicted", lambda *_: ([], "nothing can be read"))
    worker = Worker(queue, "HNPETCT", Peer("ARCHIVE", "127.0.0.1", 1), {}, MODEL)
    assert worker.step() and worker.step()
    assert queue.status("1.2").state == "done"
    assert "nothing can be read" in (queue.folder / "answers.jsonl").read_text()


@pytest.mark.parametrize(
    "status, sent",
    [
        pytest.param(0x0000, True, id="stored"),
        pytest.param(0xB000, True, id="stored_with_a_warning"),
        pytest.param(0xA700, False, id="no_room"),
        pytest.param(0xC000, False, id="not_understood"),
    ],
)
def test_an_answer_is_sent_until_it_is_stored(status, sent, queue, phantom, archive, tmp_path, caplog):
    fill(queue, images(phantom)[:1])
    copy = tmp_path / "report.dcm"
    copy.write_bytes(images(phantom)[0].read_bytes())
    queue.answer(STUDY, queue.begin(STUDY, queue.work / "x"), "results", "", [copy])
    archive.status = status
    worker = Worker(queue, "HNPETCT", Peer("ARCHIVE", "127.0.0.1", archive.port), {}, MODEL)
    assert worker.step()
    assert queue.status(STUDY).state == ("done" if sent else "sending")
    assert ("refuses it with status" in queue.status(STUDY).problem) == (not sent)
    assert not worker.step()  # not again at once
    if not sent:
        archive.status = 0x0000
        queue.postpone(STUDY, "", 0)
        assert worker.step() and queue.status(STUDY).state == "done"


def test_an_archive_that_is_not_there(tmp_path, phantom):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        peer = Peer("ARCHIVE", "127.0.0.1", taken.getsockname()[1])
        with pytest.raises(listener.NotSentError, match="cannot be reached"):
            send_files("HNPETCT", peer, images(phantom)[:1])


def test_an_archive_that_does_not_know_this_node(node, phantom):
    with pytest.raises(listener.NotSentError, match="rejects the association"):
        send_files("STRANGER", Peer("HNPETCT", "127.0.0.1", node), images(phantom)[:1])


def test_answers_to_a_dicomweb_server(queue, phantom, tmp_path, monkeypatch):
    pytest.importorskip("dicomweb_client")
    from dicomweb_server import ADDRESS, FakeServer

    server = FakeServer(monkeypatch, tmp_path / "empty")
    fill(queue, images(phantom)[:1])
    copy = tmp_path / "report.dcm"
    copy.write_bytes(images(phantom)[0].read_bytes())
    queue.answer(STUDY, queue.begin(STUDY, queue.work / "x"), "results", "", [copy])
    server.faults["POST", "/studies"] = 401
    worker = Worker(queue, "HNPETCT", DicomWeb(ADDRESS), {}, MODEL)
    worker.step()
    assert "refuses access" in queue.status(STUDY).problem
    server.faults.clear()
    queue.postpone(STUDY, "", 0)
    worker.step()
    assert queue.status(STUDY).state == "done" and len(server.stored) == 1


# --- the program ---------------------------------------------------------------------------------------------------
def test_a_node_that_is_killed_loses_nothing(phantom, archive, model, tmp_path):
    """Killed while images come in, and again before the results are sent; results come once it runs again."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = {
        **{"spool": tmp_path / "spool", "peers": "SCANNER@127.0.0.1", "send": f"ARCHIVE@127.0.0.1:{archive.port}"},
        **{"port": port, "ckpt_dir": model, "device": "cpu", "min_free_gb": 0},
    }

    def start(stable: float) -> subprocess.Popen:
        words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
        command = [sys.executable, str(ROOT / "scripts" / "serve.py"), "dicom", *words, "--stable", str(stable)]
        with (tmp_path / "log.txt").open("ab") as log:
            return subprocess.Popen(command, stdout=log, stderr=log, env={**os.environ, "OMP_NUM_THREADS": "1"})

    def send(paths: list[Path]) -> None:
        end = time.monotonic() + 60
        while not (association := associate(port)).is_established:
            assert time.monotonic() < end, (tmp_path / "log.txt").read_text()
            time.sleep(0.2)
        assert {association.send_c_store(path).Status for path in paths} == {0x0000}
        association.release()

    paths = images(phantom)
    first = start(stable=600)
    try:
        send(paths[:40])
    finally:
        first.kill()
        first.wait()
    second = start(stable=1)
    try:
        send(paths[40:])
        status = tmp_path / "spool" / "studies" / STUDY / "status.json"
        wait(lambda: status.is_file() and "predicting" in status.read_text(), second, tmp_path)
    finally:
        second.kill()
        second.wait()
    assert archive.got == []
    third = start(stable=1)
    try:
        wait(lambda: {"SEG", "SR", "RTSTRUCT"} <= {dataset.Modality for dataset in archive.got}, third, tmp_path)
        wait(lambda: (tmp_path / "spool" / "answers.jsonl").is_file(), third, tmp_path)
    finally:
        third.send_signal(signal.SIGTERM)
        assert third.wait(30) == 0, (tmp_path / "log.txt").read_text()
    assert {dataset.StudyInstanceUID for dataset in archive.got} == {STUDY}
    said = (tmp_path / "log.txt").read_text()
    assert "64 images, attempt 2" in said and "stopped; what was received is kept" in said
    assert not any(secret in said for secret in SECRETS if secret != "1.2.3.4.")


def wait(until, process: subprocess.Popen, folder: Path, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not until():
        assert process.poll() is None and time.monotonic() < end, (folder / "log.txt").read_text()
        time.sleep(0.1)
