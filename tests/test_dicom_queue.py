"""Studies on disk: complete or not, answered or not, and what a program that starts again finds."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from runtimes import dicom_queue
from runtimes.dicom_queue import ANSWERS, DONE, PREDICTING, SENDING, QueueError, StudyQueue

STUDY, OTHER = "1.2.3", "1.2.4"


@pytest.fixture
def start(tmp_path):
    """Start the queue of one folder, again and again, as after the end of the program."""
    running = []

    def start(stable_s: float = 0.0, keep_s: float = 1e6, min_free_bytes: float = 0.0) -> StudyQueue:
        for queue in running:
            queue.close()
        running[:] = [StudyQueue(tmp_path / "spool", stable_s, keep_s, min_free_bytes)]
        return running[0]

    yield start
    running[0].close()


def predict(queue: StudyQueue, tmp_path: Path, study: str = STUDY, names: tuple[str, ...] = ("sr.dcm",)) -> None:
    """Begin and answer a prediction."""
    status = queue.begin(study, queue.work / f"{study}-{len(list(queue.work.iterdir()))}")
    files = [tmp_path / name for name in names]
    for file in files:
        file.write_bytes(b"result")
    queue.answer(study, status, "results", "", files)


def test_a_study_waits_until_no_image_comes(start, monkeypatch):
    clock = [100.0]
    monkeypatch.setattr(dicom_queue.time, "monotonic", lambda: clock[0])
    queue = start(stable_s=60)
    queue.receive(STUDY, "1.1", b"a")
    clock[0] = 150
    queue.receive(STUDY, "1.2", b"b")
    clock[0] = 205
    assert queue.next_complete() is None
    clock[0] = 210
    assert queue.next_complete() == STUDY
    assert queue.images(STUDY) == ["1.1.dcm", "1.2.dcm"]


def test_an_image_that_comes_during_the_prediction_is_predicted_too(start, tmp_path):
    queue = start()
    queue.receive(STUDY, "1.1", b"a")
    status = queue.begin(STUDY, queue.work / "first")
    queue.receive(STUDY, "1.2", b"b")
    assert [path.name for path in (queue.work / "first").iterdir()] == ["1.1.dcm"]
    queue.answer(STUDY, status, "reason", "no PET", [])
    assert queue.next_complete() == STUDY and queue.next_to_send() == STUDY
    status = queue.begin(STUDY, queue.work / "second")
    assert len(list((queue.work / "second").iterdir())) == 2 and status.attempts == 1
    assert queue.next_to_send() is None  # the new answer takes the place of the old one


def test_files_of_one_name_are_all_sent(start, tmp_path):
    """A study of two examinations has two results, whose files have the same names."""
    queue = start()
    queue.receive(STUDY, "1.1", b"a")
    files = [tmp_path / patient / name for patient in ("ID", "ID_2") for name in ("seg.dcm", "sr.dcm")]
    for file in files:
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(f"{file.parent.name} {file.name}".encode())
    queue.answer(STUDY, queue.begin(STUDY, queue.work / "first"), "results", "", files)
    sent = [path.read_text() for path in queue.to_send(STUDY)]
    assert sent == ["ID seg.dcm", "ID sr.dcm", "ID_2 seg.dcm", "ID_2 sr.dcm"]


def test_the_same_images_again_are_not_predicted_again(start, tmp_path):
    queue = start()
    queue.receive(STUDY, "1.1", b"a")
    predict(queue, tmp_path)
    queue.receive(STUDY, "1.1", b"other bytes")
    assert queue.next_complete() is None
    assert (queue.studies / STUDY / "images" / "1.1.dcm").read_bytes() == b"a"


@pytest.mark.parametrize(
    "until, state, complete, to_send",
    [
        pytest.param("received", "", STUDY, None, id="received"),
        pytest.param("begun", PREDICTING, STUDY, None, id="begun"),
        pytest.param("answered", SENDING, None, STUDY, id="answered"),
        pytest.param("postponed", SENDING, None, STUDY, id="not_sent"),
        pytest.param("finished", DONE, None, None, id="finished"),
    ],
)
def test_a_program_that_ended_is_gone_on_with(until, state, complete, to_send, start, tmp_path):
    queue = start()
    queue.receive(STUDY, "1.1", b"a")
    if until == "begun":
        queue.begin(STUDY, queue.work / "first")
    elif until != "received":
        predict(queue, tmp_path)
    if until == "postponed":
        queue.postpone(STUDY, "not reached", 1e6)
        assert queue.next_to_send() is None
    elif until == "finished":
        queue.finish(STUDY, "PACS")
    queue = start()
    assert (queue.status(STUDY).state, queue.next_complete(), queue.next_to_send()) == (state, complete, to_send)
    assert list(queue.work.iterdir()) == []
    if to_send:
        assert [path.read_bytes() for path in queue.to_send(STUDY)] == [b"result"]
    if until == "begun":
        assert queue.begin(STUDY, queue.work / "again").attempts == 2


def test_half_an_image_of_a_killed_program_is_no_image(start):
    queue = start()
    queue.receive(STUDY, "1.1", b"a")
    (queue.studies / STUDY / "images" / "1.2.dcm.part").write_bytes(b"half")
    queue = start()
    assert queue.images(STUDY) == ["1.1.dcm"]
    queue.receive(STUDY, "1.2", b"whole")
    assert queue.images(STUDY) == ["1.1.dcm", "1.2.dcm"]


def test_an_ended_prediction_does_not_count_as_an_attempt(start):
    queue = start()
    queue.receive(STUDY, "1.1", b"a")
    queue.interrupt(STUDY, queue.begin(STUDY, queue.work / "first"))
    assert start().next_complete() == STUDY
    assert start().begin(STUDY, tmp := start().work / "second").attempts == 1 and tmp.is_dir()


@pytest.mark.parametrize("content", ["{", "[]", '{"unknown": 1}', "\xff"])
def test_a_damaged_status_costs_a_prediction_and_no_study(content, start, tmp_path):
    queue = start()
    queue.receive(STUDY, "1.1", b"a")
    predict(queue, tmp_path)
    (queue.studies / STUDY / "status.json").write_bytes(content.encode("latin-1"))
    assert start().next_complete() == STUDY


@pytest.mark.parametrize(
    "study, instance",
    [
        pytest.param("../../out", "1.1", id="path_for_a_study"),
        pytest.param("1.2.3", "../1.1", id="path_for_an_image"),
        pytest.param("1.2.3", "1.1\0", id="zero_byte"),
        pytest.param("", "1.1", id="empty"),
        pytest.param("..", "1.1", id="dots"),
        pytest.param("1.2.3", "1." + "1" * 200, id="long"),
        pytest.param("1.2.3\n", "1.1", id="line"),
        pytest.param("1.2.٣", "1.1", id="digits_of_another_script"),
    ],
)
def test_what_is_no_uid_never_becomes_a_name(study, instance, start, tmp_path):
    queue = start()
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ValueError, match="no valid UID"):
        queue.receive(study, instance, b"a")
    assert sorted(tmp_path.rglob("*")) == before


def test_a_full_disk_refuses_images(start):
    queue = start(min_free_bytes=1e18)
    with pytest.raises(QueueError, match=r"less than 1e\+09 GB are free"):
        queue.receive(STUDY, "1.1", b"a")
    assert queue.next_complete() is None


def test_a_study_without_end_is_refused(start, monkeypatch):
    monkeypatch.setattr(dicom_queue, "MOST_IMAGES", 2)
    queue = start()
    for instance in ("1.1", "1.2", "1.1"):
        queue.receive(STUDY, instance, b"a")
    with pytest.raises(QueueError, match="more than 2 images"):
        queue.receive(STUDY, "1.3", b"a")
    queue.receive(OTHER, "1.3", b"a")


def test_two_programs_do_not_share_a_folder(start, tmp_path):
    start()
    with pytest.raises(QueueError, match="used by another listener"):
        StudyQueue(tmp_path / "spool", 0, 0, 0)


def test_a_folder_that_cannot_be_used(tmp_path):
    (tmp_path / "spool").write_text("a file")
    with pytest.raises(QueueError, match="cannot be used for received studies"):
        StudyQueue(tmp_path / "spool", 0, 0, 0)


def test_every_answer_leaves_a_line(start, tmp_path):
    queue = start()
    for study in (STUDY, OTHER):
        queue.receive(study, "1.1", b"a")
        predict(queue, tmp_path, study)
        queue.finish(study, "PACS")
    lines = [json.loads(line) for line in (queue.folder / ANSWERS).read_text().splitlines()]
    assert [(line["study"], line["outcome"], line["sent_to"]) for line in lines] == [
        (STUDY, "results", "PACS"),
        (OTHER, "results", "PACS"),
    ]


def test_answered_studies_are_removed_after_a_while(start, tmp_path):
    queue = start(keep_s=-1)
    for study in (STUDY, OTHER):
        queue.receive(study, "1.1", b"a")
    predict(queue, tmp_path)
    queue.forget_old()
    assert queue.images(STUDY)  # not sent yet
    queue.finish(STUDY, "PACS")
    queue.forget_old()
    assert [path.name for path in queue.studies.iterdir()] == [OTHER]


def test_patient_data_is_for_this_user_alone(start):
    queue = start()
    queue.receive(STUDY, "1.1", b"a")
    assert {
        path.stat().st_mode & 0o077 for path in (queue.folder, queue.studies, queue.studies / STUDY / "images")
    } == {0}
