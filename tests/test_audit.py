"""The audit: a line for every patient, whatever became of it, without anything that names one."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import nibabel
import numpy as np
import pytest
from dicom_study import write_pet_ct

from conftest import make_tiny_cohort
from predict import predict
from scripts.prediction.audit import append_line, audit_line
from scripts.prediction.outputs import PredictionWriter


@pytest.fixture(scope="module")
def patients(tmp_path_factory) -> Path:
    """Two patients as NIfTI, the CT of the second damaged."""
    folder = make_tiny_cohort(tmp_path_factory.mktemp("patients"), 2) / "Task 1"
    next(folder.parent.glob("*.csv")).unlink()
    (folder / "CHUM-002" / "CHUM-002__CT.nii.gz").write_bytes(b"no image")
    return folder


@pytest.fixture(scope="module")
def study(patients, tmp_path_factory) -> Path:
    """The first of them as DICOM."""
    scans, folder = patients / "CHUM-001" / "CHUM-001", tmp_path_factory.mktemp("study")
    ct, pet = (np.asarray(nibabel.load(f"{scans}__{kind}.nii.gz").dataobj) for kind in ("CT", "PT"))
    write_pet_ct(folder, ct, pet, 8.0, {"PatientID": "ID-4711"})
    return folder


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_every_patient_leaves_one_line(patients, study, model, tmp_path):
    audit = tmp_path / "elsewhere" / "audit.jsonl"
    options = {"ckpt_dir": str(model), "device": "cpu", "report": False}
    with pytest.raises(SystemExit):
        predict(str(patients), str(tmp_path / "out"), audit=str(audit), **options)
    predict(str(study), str(tmp_path / "out"), audit=str(audit), **options)
    assert not (tmp_path / "out" / "audit.jsonl").exists()
    found = lines(audit)
    good, bad, dicom = found
    assert [line["outcome"] for line in found] == ["ok", "failed", "ok"]
    weights = hashlib.sha256((model / "model.pt").read_bytes()).hexdigest()
    assert {line["weights_sha256"] for line in found} == {weights}
    for name, kind in (("ct", "CT"), ("pet", "PT")):
        for patient, line in (("CHUM-001", good), ("CHUM-002", bad)):
            content = (patients / patient / f"{patient}__{kind}.nii.gz").read_bytes()
            assert line["input"][name] == {"sha256": hashlib.sha256(content).hexdigest()}
    assert dicom["input"] == {
        "studies": ["1.2.3.4.101"],
        "ct": {"series": "1.2.3.4.301", "images": 32},
        "pet": {"series": "1.2.3.4.401", "images": 32},
    }
    assert {"dicom_seg", "dicom_sr", "mask"} <= set(dicom["files"]) and bad["files"] == []
    assert all(name not in audit.read_text() for name in ("CHUM-00", "ID-4711", "Doe", str(patients)))


def test_a_patient_without_scans(tmp_path):
    append_line(tmp_path / "audit.jsonl", audit_line({"ct": None, "pet": str(tmp_path / "gone")}, "failed", None, None))
    (line,) = lines(tmp_path / "audit.jsonl")
    assert line["input"] == {"ct": None, "pet": None} and line["weights_sha256"] is None


def test_an_audit_that_cannot_be_written_is_a_problem(tmp_path, caplog):
    (tmp_path / "file").write_text("")
    writer = PredictionWriter(str(tmp_path), [{"patient_id": "A"}], audit=str(tmp_path / "file" / "audit.jsonl"))
    writer.fail("A", "no CT")
    assert "audit.jsonl" in writer.problems["audit"] and "no audit" in caplog.text
    assert writer.rows["A"]["status"] == "failed"


def test_a_failure_that_is_told_again_leaves_no_further_line(tmp_path):
    writer = PredictionWriter(str(tmp_path), [{"patient_id": "A"}])
    for _ in range(3):
        writer.fail("A", "no CT")
    assert len(lines(tmp_path / "audit.jsonl")) == 1
