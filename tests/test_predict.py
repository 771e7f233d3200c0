"""predict.py as a user runs it: every kind of input, faults, resuming, exit codes; the same answer as the bundle."""

from __future__ import annotations

import csv
import errno
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk
from dicom_study import SECRETS, write_pet_ct
from tiny_model import TRAINED_ON, write_model

from command_line import read_arguments

import predict as tool
from conftest import ROOT, SHARED_DATA, exit_code, make_tiny_cohort
from predict import UsageError, predict
from runtimes.inference import is_whole
from scripts import keys
from scripts.cohorts.clinical import FEATURES
from scripts.cohorts.cohort import CohortError
from scripts.cohorts.files import WriteError
from scripts.imaging.geometry import Grid
from scripts.imaging.images import read_image
from scripts.imaging.lesions import find_lesions
from scripts.prediction.inputs import NoScanError, find_cases

hd = pytest.importorskip("highdicom", reason="DICOM needs pip install pydicom highdicom")
SPACING = 8.0


@pytest.fixture(scope="session")
def patients(tmp_path_factory) -> Path:
    """Two patients, as folders, without a table."""
    folder = make_tiny_cohort(tmp_path_factory.mktemp("patients"), 2)
    next(folder.glob("*.csv")).unlink()
    return folder / "Task 1"


@pytest.fixture
def options(model) -> dict:
    return {"ckpt_dir": str(model), "device": "cpu", "report": False}


def run(*arguments, code: int = 0, **options) -> None:
    """Run the tool in this process and check its exit code."""
    assert exit_code(predict, *map(str, arguments), **options) == code


def prediction_of(output: Path, patient: str = "CHUM-001") -> dict:
    return json.loads((output / patient / "prediction.json").read_text())


def rows_of(output: Path) -> dict[str, dict[str, str]]:
    return {row["PatientID"]: row for row in csv.DictReader((output / "predictions.csv").read_text().splitlines())}


def told(prediction: dict) -> dict:
    """What is predicted, without what differs from run to run."""
    return {name: prediction[name] for name in ("survival", "hpv", "tumour", "clinical", "crop", "model")}


def scans(folder: Path, patient: str = "CHUM-001") -> tuple[Path, Path]:
    return folder / patient / f"{patient}__CT.nii.gz", folder / patient / f"{patient}__PT.nii.gz"


def as_mha(source: Path, target: Path) -> Path:
    """A NIfTI file as MHA."""
    image = sitk.ReadImage(str(source))
    for name in image.GetMetaDataKeys():
        image.EraseMetaData(name)
    target.parent.mkdir(parents=True, exist_ok=True)
    sitk.WriteImage(image, str(target), True)
    return target


def dicom_of(patients: Path, folder: Path, patient: str = "CHUM-001", number: int = 1, **tags) -> Path:
    """A patient of the tiny cohort as DICOM, its lower corner at world zero as in the NIfTI files."""
    ct, pet = (np.asarray(nibabel.load(path).dataobj) for path in scans(patients, patient))
    pet_tags = tags.pop("pet", None)
    write_pet_ct(folder, ct, pet, SPACING, {"PatientID": patient, **tags}, number, pet_tags)
    return folder


def said_by(items):
    """Name and value of every number and text of a structured report."""
    for item in items:
        name = item.ConceptNameCodeSequence[0].CodeMeaning if "ConceptNameCodeSequence" in item else ""
        if item.ValueType == "NUM":
            yield name, float(item.MeasuredValueSequence[0].NumericValue)
        elif item.ValueType == "TEXT":
            yield name, item.TextValue
        yield from said_by(item.get("ContentSequence", []))


# --- the same answer as the bundle's own workflow ------------------------------------------------------------------
def test_predict_and_bundle_run_give_the_same(model, tiny_cohort, tmp_path, run_bundle):
    cohort = tmp_path / "one"
    shutil.copytree(tiny_cohort / "Task 1" / "CHUM-001", cohort / "CHUM-001")
    table = (tiny_cohort / "HECKTOR_2025_Training_Task_3.csv").read_text().splitlines()
    (cohort / "clinical.csv").write_text("\n".join(table[:2]) + "\n")
    arguments = ["--dataset_dir", str(cohort), "--ckpt_dir", str(model), "--output_dir", str(tmp_path / "bundle")]
    run_bundle("inference", "--config_file", "configs/inference.json", *arguments, "--device", "cpu")
    command = [sys.executable, "scripts/predict.py", cohort, tmp_path / "tool", "--ckpt_dir", model, "--device", "cpu"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    ended = subprocess.run([*command, "--report", "False"], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    one, other = prediction_of(tmp_path / "bundle"), prediction_of(tmp_path / "tool")
    assert told(one) == told(other)
    assert other["clinical"][0]["value"] == 50.0
    name = "CHUM-001/CHUM-001__tumour.nii.gz"
    assert (tmp_path / "bundle" / name).read_bytes() == (tmp_path / "tool" / name).read_bytes()
    ours, theirs = rows_of(tmp_path / "tool"), rows_of(tmp_path / "bundle")
    assert ours == theirs
    assert "CHUM-001" in ended.stdout and TRAINED_ON in ended.stdout and keys.RESEARCH_USE_ONLY in ended.stdout


# --- every kind of input gives one answer --------------------------------------------------------------------------
@pytest.fixture(scope="session")
def reference(model, patients, tmp_path_factory) -> Path:
    """Output for the folder of NIfTI files."""
    output = tmp_path_factory.mktemp("reference")
    run(patients, output, ckpt_dir=str(model), device="cpu", report=False)
    return output


def mha_folder(patients: Path, folder: Path) -> dict:
    for kind, path in zip(("CT", "PT"), scans(patients), strict=True):
        as_mha(path, folder / "CHUM-001" / f"CHUM-001__{kind}.mha")
    return {"input": str(folder)}


def pair(patients: Path, folder: Path) -> dict:
    ct, pet = scans(patients)
    return {"ct": str(ct), "pet": str(pet), "patient_id": "CHUM-001"}


def csv_list(patients: Path, folder: Path) -> dict:
    ct, pet = scans(patients)
    folder.mkdir()
    (folder / "cases.csv").write_text(f"patient_id,ct,pet\nCHUM-001,{os.path.relpath(ct, folder)},{pet}\n")
    return {"input": str(folder / "cases.csv")}


def dicom(patients: Path, folder: Path) -> dict:
    return {"input": str(dicom_of(patients, folder, PatientSex="O", PatientAge="", PatientBirthDate=""))}


@pytest.mark.parametrize("make", [mha_folder, pair, csv_list, dicom])
def test_one_patient_in_every_form(make, patients, reference, options, tmp_path):
    run(output=str(tmp_path / "out"), **make(patients, tmp_path / "in"), **options)
    expected, got = prediction_of(reference), prediction_of(tmp_path / "out")
    approximate = 1e-3 if make is dicom else 1e-6  # the PET of DICOM is stored in steps of 0.01 SUV
    assert got["survival"]["log_hazard"] == pytest.approx(expected["survival"]["log_hazard"], abs=approximate)
    assert got["hpv"]["probability"] == pytest.approx(expected["hpv"]["probability"], abs=approximate)
    assert got["crop"]["method"] == expected["crop"]["method"]
    np.testing.assert_allclose(got["crop"]["centre_mm"], expected["crop"]["centre_mm"], atol=1e-3)
    masks = [
        read_image(folder / "CHUM-001" / name["files"]["mask"])
        for folder, name in ((reference, expected), (tmp_path / "out", got))
    ]
    assert got["files"]["mask"].endswith(".mha" if make is mha_folder else ".nii.gz")
    volumes = [int(mask.sum()) for mask, _ in masks]
    assert volumes[1] == pytest.approx(volumes[0], rel=0.01, abs=0 if make is not dicom else 5)
    if make is not dicom:
        np.testing.assert_array_equal(masks[0][0], masks[1][0])
        np.testing.assert_allclose(masks[0][1], masks[1][1], atol=1e-6)


def test_dicom_comes_back_as_dicom(patients, options, tmp_path, caplog, capsys):
    source = dicom_of(patients, tmp_path / "in", PatientAge="061Y", PatientSex="M")
    with caplog.at_level(logging.INFO):
        run(source, tmp_path / "out", **options)
    prediction, folder = prediction_of(tmp_path / "out"), tmp_path / "out" / "CHUM-001"
    seg = hd.seg.segread(folder / prediction["files"]["dicom_seg"])
    mask, affine = read_image(folder / prediction["files"]["mask"])
    voxel_ml = (SPACING / 10) ** 3
    lesions = find_lesions(mask, Grid(mask.shape, affine))
    assert len(seg.segment_numbers) == prediction["tumour"]["lesions"] == len(lesions.found) > 0
    assert seg.pixel_array.sum() == (lesions.on(mask.shape) > 0).sum()
    assert mask.sum() * voxel_ml == pytest.approx(prediction["tumour"]["volume_ml"], rel=1e-6)
    report = hd.sr.srread(folder / prediction["files"]["dicom_sr"])
    assert report.PatientID == "CHUM-001" and report.StudyInstanceUID == seg.StudyInstanceUID
    values = dict(said_by(report.ContentSequence))
    assert values["Log hazard of recurrence relative to the training cohort"] == pytest.approx(
        prediction["survival"]["log_hazard"], abs=0.0005
    )
    assert values["Volume"] == pytest.approx(prediction["tumour"]["volume_ml"], abs=0.005)
    comments = [text for name, text in said_by(report.ContentSequence) if name == "Comment"]
    assert {keys.RESEARCH_USE_ONLY, f"The model was trained on: {TRAINED_ON}"} <= set(comments)
    assert "Clinical values that were missing: M-stage" in comments
    assert [text for text in comments if text.startswith("Metabolic Volume and Total Lesion Glycolysis: per lesion")]
    sources = {row["name"]: row.get("source") for row in prediction["clinical"]}
    assert sources == {"age": "DICOM header", "gender": "DICOM header", "m_stage": None}
    assert "CHUM-001: age, gender from: DICOM header" in caplog.text
    shown = caplog.text + capsys.readouterr().out
    assert not [secret for secret in SECRETS if secret in shown]


@pytest.mark.parametrize("name", ["2024_001", "1.10", "a#b", "$x @y%z", "it's", "[1,2]", "None"])
def test_names_stay_what_was_typed(name, model, patients, tmp_path, monkeypatch):
    """Of patient, folder of the output and folder of the model, through command line and config."""
    ct, pet = scans(patients)
    (tmp_path / f"model {name}").symlink_to(model, target_is_directory=True)
    monkeypatch.chdir(tmp_path)
    typed = [name, "--ct", str(ct), "--pet", str(pet), "--patient_id", "1.10", "--ckpt_dir", f"model {name}"]
    words = {"words": ("input", "output"), "others": FEATURES}
    predict(**read_arguments(predict, [*typed, "--device=cpu", "--report=False"], **words))
    assert prediction_of(tmp_path / name, "1.10")["patient_id"] == "1.10"
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([name, f"model {name}"])


# --- clinical values -----------------------------------------------------------------------------------------------
def test_typed_values_go_before_a_file_and_that_before_dicom(patients, options, tmp_path):
    source = dicom_of(patients, tmp_path / "in", PatientAge="061Y", PatientSex="M")
    (tmp_path / "ehr.json").write_text(json.dumps({"Age": 70, "M-stage": "M1"}))
    run(source, tmp_path / "out", clinical=str(tmp_path / "ehr.json"), m_stage="M0", **options)
    rows = {row["name"]: (row["value"], row.get("source")) for row in prediction_of(tmp_path / "out")["clinical"]}
    assert rows == {"age": (70.0, "ehr.json"), "gender": (1.0, "DICOM header"), "m_stage": (0.0, "option")}


def test_values_change_the_risk(patients, options, tmp_path):
    ct, pet = scans(patients)
    risks = []
    for age in (40, 80):
        run(output=str(tmp_path / str(age)), ct=str(ct), pet=str(pet), patient_id="x", age=age, **options)
        risks.append(prediction_of(tmp_path / str(age), "x")["survival"]["log_hazard"])
    assert abs(risks[0] - risks[1]) > 1e-3


# --- faults --------------------------------------------------------------------------------------------------------
def test_one_failed_patient_stops_no_other(patients, options, tmp_path, capsys):
    broken = shutil.copytree(patients, tmp_path / "in")
    shutil.copytree(broken / "CHUM-001", broken / "CHUM-003")
    for path in (broken / "CHUM-003").iterdir():
        path.rename(path.with_name(path.name.replace("CHUM-001", "CHUM-003")))
    scans(broken, "CHUM-001")[1].unlink()
    ct = scans(broken, "CHUM-003")[0]
    ct.write_bytes(ct.read_bytes()[:500])
    (tmp_path / "out" / "CHUM-001").mkdir(parents=True)
    (tmp_path / "out" / "CHUM-001" / "prediction.json").write_text("{}")  # of an earlier run
    run(broken, tmp_path / "out", code=1, **options)
    rows = rows_of(tmp_path / "out")
    assert {patient: row["status"] for patient, row in rows.items()} == {
        "CHUM-001": "failed",
        "CHUM-002": "ok",
        "CHUM-003": "failed",
    }
    assert "no PET found in" in rows["CHUM-001"]["reason"]
    assert "CHUM-003__CT.nii.gz" in rows["CHUM-003"]["reason"]
    assert not (tmp_path / "out" / "CHUM-001" / "prediction.json").exists()
    shown = capsys.readouterr().out
    assert "CHUM-001: failed: no PET found in" in shown and "CHUM-003: failed" in shown


def test_images_with_bad_headers_fail_their_patients_only(patients, options, tmp_path):
    """NDims of -1 ended the process inside SimpleITK; no position in space gave another tumour without a word."""

    def another(patient: str) -> Path:
        folder = shutil.copytree(patients / "CHUM-001", tmp_path / "in" / patient)
        for path in folder.iterdir():
            path.rename(path.with_name(path.name.replace("CHUM-001", patient)))
        return scans(folder.parent, patient)[0]

    ct = another("CHUM-010")
    path = as_mha(ct, ct.with_name("CHUM-010__CT.mha"))
    path.write_bytes(path.read_bytes().replace(b"NDims = 3", b"NDims = -1"))
    ct.unlink()
    for patient, codes, shift in (("CHUM-011", (0, 0), 0.0), ("CHUM-012", (1, 1), 25.0), ("CHUM-013", (1, 1), 0.0)):
        ct = another(patient)
        image = nibabel.load(ct)
        header, affine = image.header.copy(), image.affine.copy()
        header.set_sform(affine, codes[0])
        affine[0, 3] += shift
        header.set_qform(affine, codes[1])
        content = np.asarray(image.dataobj)
        nibabel.save(nibabel.Nifti1Image(content, None, header), ct)
    run(tmp_path / "in", tmp_path / "out", code=1, **options)
    rows = rows_of(tmp_path / "out")
    states = {patient: row["status"] for patient, row in rows.items()}
    assert states == {"CHUM-010": "failed", "CHUM-011": "failed", "CHUM-012": "ok", "CHUM-013": "ok"}
    assert "NDims = -1" in rows["CHUM-010"]["reason"]
    assert "no position in space" in rows["CHUM-011"]["reason"]
    assert rows["CHUM-012"]["quality"] == "warn"
    said = {p: (tmp_path / "out" / p / "prediction.json").read_text() for p in ("CHUM-012", "CHUM-013")}
    assert "sform and its qform are up to 25 mm apart" in said["CHUM-012"]
    assert "sform" not in said["CHUM-013"]


def test_an_unknown_clinical_value_names_file_and_value(patients, options, tmp_path):
    (tmp_path / "clinical.csv").write_text("PatientID,Age,Gender\nCHUM-001,61,robot\nCHUM-002,50,f\n")
    run(patients, tmp_path / "out", clinical=str(tmp_path / "clinical.csv"), code=1, **options)
    rows = rows_of(tmp_path / "out")
    assert "clinical.csv, row 2, column 'Gender': 'robot' is no value of gender" in rows["CHUM-001"]["reason"]
    assert rows["CHUM-002"]["status"] == "ok"


def test_a_pet_in_becquerel_is_rejected_and_can_be_forced(patients, options, tmp_path, capsys):
    folder = shutil.copytree(patients / "CHUM-001", tmp_path / "in" / "CHUM-001")
    path = scans(folder.parent)[1]
    image = nibabel.load(path)
    nibabel.save(nibabel.Nifti1Image(np.asarray(image.dataobj) * 5000, image.affine), path)
    run(tmp_path / "in", tmp_path / "out", code=1, **options)
    assert "pet_body" in rows_of(tmp_path / "out")["CHUM-001"]["reason"]
    assert not (tmp_path / "out" / "CHUM-001" / "prediction.json").exists()
    run(tmp_path / "in", tmp_path / "out", force=True, **options)
    assert prediction_of(tmp_path / "out")["quality"]["forced"] is True
    assert rows_of(tmp_path / "out")["CHUM-001"]["forced"] == "True"
    assert "forced" in capsys.readouterr().out


def test_a_damaged_dicom_file_fails_its_patient_only(patients, options, tmp_path):
    damaged = dicom_of(patients, tmp_path / "in" / "a", "CHUM-001", 1)
    dicom_of(patients, tmp_path / "in" / "b", "CHUM-002", 2)
    path = sorted((damaged / "CT").iterdir())[0]
    path.write_bytes(path.read_bytes()[:700])
    run(tmp_path / "in", tmp_path / "out", code=1, **options)
    rows = rows_of(tmp_path / "out")
    assert f"a damaged file may be a slice of it: {path.name}: not a complete DICOM file" in rows["CHUM-001"]["reason"]
    assert rows["CHUM-002"]["status"] == "ok"


def test_a_patient_who_cannot_be_had_has_a_row_and_costs_the_exit_code(patients, options, tmp_path, capsys):
    dicom_of(patients, tmp_path / "in" / "a", "CHUM-001", 1)
    for path in dicom_of(patients, tmp_path / "in" / "b", "CHUM-002", 2).rglob("IM*"):
        path.write_bytes(path.read_bytes()[:60])  # of a copy that failed
    (tmp_path / "in" / "c").symlink_to("gone")
    run(tmp_path / "in", tmp_path / "out", code=1, **options)
    rows = rows_of(tmp_path / "out")
    assert {patient: row["status"] for patient, row in rows.items()} == {"CHUM-001": "ok", "b": "failed", "c": "failed"}
    assert "c: a broken link" in rows["c"]["reason"]
    assert "c: failed: c: a broken link" in capsys.readouterr().out


SHARED_CASES = SHARED_DATA.parent / "cases"


@pytest.mark.skipif(not SHARED_CASES.is_dir(), reason="no ../shared/cases")
@pytest.mark.parametrize(
    "name, expected",
    [
        pytest.param("mixed-patients-one-series-uid", {"PAT-A": "", "PAT-B": ""}, id="two_patients_one_series_uid"),
        pytest.param("no-series-uid", {"E2-noseriesuid": "no Series Instance UID (0020,000E)"}, id="no_series_uid"),
    ],
)
def test_shared_cases(name, expected):
    found = {case[keys.PATIENT_ID]: case[keys.PROBLEM] for case in find_cases(SHARED_CASES / name)}
    assert set(found) == set(expected)
    assert all(text in found[patient] and bool(text) == bool(found[patient]) for patient, text in expected.items())


def test_a_value_that_is_no_number_is_told_by_quality_control(patients, options, tmp_path):
    folder = shutil.copytree(patients / "CHUM-001", tmp_path / "in" / "CHUM-001")
    path = scans(folder.parent)[1]
    image = nibabel.load(path)
    values = np.asarray(image.dataobj, dtype=np.float32)
    values[0, 0, 0] = np.nan
    nibabel.save(nibabel.Nifti1Image(values, image.affine), path)
    run(tmp_path / "in", tmp_path / "out", code=1, **options)
    assert "CHUM-001: rejected by quality control: pet_not_finite" in rows_of(tmp_path / "out")["CHUM-001"]["reason"]


def test_many_patients_without_scans_are_told_in_one_line(patients, options, tmp_path, capsys):
    cohort = shutil.copytree(patients, tmp_path / "in")
    table = "".join(f"X-{k:02d},61\n" for k in range(12))
    (cohort / "clinical.csv").write_text(f"PatientID,Age\nCHUM-001,61\nCHUM-002,62\n{table}")
    run(cohort, tmp_path / "out", code=1, **options)
    assert len(rows_of(tmp_path / "out")) == 14
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[:3]] == ["patient", "CHUM-001", "CHUM-002"]
    assert lines[3].startswith("X-00, X-01, X-02, X-03, X-04 and 7 more: failed: no CT and no PET found in")


def test_a_pet_without_dose_fails_its_patient_only(patients, options, tmp_path):
    dicom_of(patients, tmp_path / "in" / "a", "CHUM-001", 1, pet={"PatientWeight": None})
    dicom_of(patients, tmp_path / "in" / "b", "CHUM-002", 2)
    run(tmp_path / "in", tmp_path / "out", code=1, **options)
    rows = rows_of(tmp_path / "out")
    assert "Patient's Weight (0010,1030) is missing" in rows["CHUM-001"]["reason"]
    assert rows["CHUM-002"]["status"] == "ok"


@pytest.mark.parametrize(
    "arguments, message",
    [
        pytest.param({}, "give INPUT OUTPUT", id="nothing"),
        pytest.param({"input": "x"}, "give INPUT OUTPUT", id="no_output"),
        pytest.param({"input": "x", "output": "y", "ct": "c", "pet": "p"}, "give INPUT OUTPUT", id="both"),
        pytest.param({"output": "y", "ct": "c"}, "give INPUT OUTPUT", id="half_a_pair"),
        pytest.param({"input": "x", "output": "y", "agee": 61}, "no option --agee", id="mistyped"),
    ],
)
def test_options_that_do_not_go_together(arguments, message):
    with pytest.raises(UsageError, match=message):
        predict(**arguments)


def test_help_names_every_option():
    ended = subprocess.run([sys.executable, "scripts/predict.py", "--help"], cwd=ROOT, capture_output=True, text=True)
    shown = ended.stdout + ended.stderr
    assert ended.returncode == 0 and "Traceback" not in shown
    for option in ("input", "output", "ct", "pet", "clinical", "ckpt_dir", "explain", "resume", "force", "--age 61"):
        assert option in shown


def test_faults_end_the_tool_with_one_line(model, tmp_path):
    command = [sys.executable, "scripts/predict.py", str(tmp_path / "absent"), str(tmp_path / "out")]
    ended = subprocess.run([*command, "--ckpt_dir", str(model)], cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 1
    assert ended.stderr.strip().splitlines()[-1] == f"predict: {tmp_path / 'absent'} does not exist"
    with pytest.raises(FileNotFoundError, match="no weights at"):
        predict(str(tmp_path), str(tmp_path / "out"), ckpt_dir=str(tmp_path))
    with pytest.raises(CohortError, match="one patient, but there are 2"):
        tool.with_values([{keys.CLINICAL: {}}] * 2, None, None, {"age": 61})


# --- resuming ------------------------------------------------------------------------------------------------------
def test_a_killed_run_is_resumed(model, patients, tmp_path):
    """Killed after its first patient, started again: the first is left as it was, the others follow."""
    cohort = tmp_path / "in"
    for k in range(1, 7):
        for path in (patients / "CHUM-001").iterdir():
            (cohort / f"P-{k}").mkdir(parents=True, exist_ok=True)
            shutil.copy(path, cohort / f"P-{k}" / path.name.replace("CHUM-001", f"P-{k}"))
    output = tmp_path / "out"
    command = [sys.executable, "scripts/predict.py", str(cohort), str(output), "--ckpt_dir", str(model)]
    command += ["--report", "False", "--device", "cpu", "--resume"]
    process = subprocess.Popen(command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, stderr=subprocess.DEVNULL)
    first = output / "P-1" / "prediction.json"
    while not first.exists() and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = [path for path in output.glob("*/prediction.json")]
    assert 1 <= len(done) < 6 and not (output / "predictions.csv").exists()
    before = first.stat().st_mtime_ns
    run(cohort, output, ckpt_dir=str(model), device="cpu", report=False, resume=True)
    assert first.stat().st_mtime_ns == before
    assert [row["status"] for row in rows_of(output).values()] == ["ok"] * 6
    assert not [path.name for path in output.rglob("*") if path.name.startswith(".") or path.suffix == ".partial"]


def test_what_is_done_is_done_again_when_something_changed(patients, reference, model, tmp_path, caplog):
    output = shutil.copytree(reference, tmp_path / "out")
    options = {"device": "cpu", "report": False, "resume": True}

    def done(**more) -> str:
        caplog.clear()
        with caplog.at_level(logging.INFO):
            run(patients, output, **{"ckpt_dir": str(model), **options, **more})
        return next(message for message in caplog.messages if "done already" in message)

    assert done() == "2 of 2 patients done already"
    (tmp_path / "c.csv").write_text("PatientID,Age\nCHUM-001,61\nCHUM-002,\n")
    assert done(clinical=str(tmp_path / "c.csv")) == "1 of 2 patients done already"
    assert done(clinical=str(tmp_path / "c.csv")) == "2 of 2 patients done already"
    (output / "CHUM-002" / "CHUM-002__tumour.nii.gz").unlink()
    assert done(clinical=str(tmp_path / "c.csv")) == "1 of 2 patients done already"
    other = write_model(tmp_path / "other", seed=1)
    assert done(ckpt_dir=str(other), clinical=str(tmp_path / "c.csv")) == "0 of 2 patients done already"


def test_an_exchanged_scan_is_noticed_and_leaves_nothing_of_the_old_one(patients, reference, model, tmp_path, caplog):
    cohort = shutil.copytree(patients, tmp_path / "in")
    output, options = tmp_path / "out", {"ckpt_dir": str(model), "device": "cpu", "report": False, "resume": True}
    run(cohort, output, **options)
    pet = scans(cohort, "CHUM-002")[1]
    pet.write_bytes(b"another scan")
    with caplog.at_level(logging.INFO):
        run(cohort, output, code=1, **options)
    assert "1 of 2 patients done already" in caplog.messages
    assert {patient: row["status"] for patient, row in rows_of(output).items()} == {
        "CHUM-001": "ok",
        "CHUM-002": "failed",
    }
    assert not list((output / "CHUM-002").iterdir())


def test_an_exchanged_dicom_slice_is_noticed(patients, options, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    source = dicom_of(patients, tmp_path / "in")
    run(source, tmp_path / "out", **options)
    run(source, tmp_path / "out", resume=True, **options)
    os.utime(sorted((source / "PET").iterdir())[5], ns=(1, 1))
    run(source, tmp_path / "out", resume=True, **options)
    said = [message for message in caplog.messages if "done already" in message]
    assert said == ["1 of 1 patient done already", "0 of 1 patient done already"]


@pytest.mark.parametrize("content", ["", "{", "[]", '{"files": {}}'])
def test_a_damaged_prediction_is_not_whole(tmp_path, content):
    (tmp_path / "prediction.json").write_text(content)
    assert not is_whole(tmp_path, {keys.CLINICAL: {}}, [], force=False)


# --- reports -------------------------------------------------------------------------------------------------------
def test_reports_and_explanation(patients, options, tmp_path):
    shutil.copytree(patients / "CHUM-001", tmp_path / "in" / "CHUM-001")
    run(tmp_path / "in", tmp_path / "out", explain=True, **{**options, "report": True})
    files = prediction_of(tmp_path / "out")["files"]
    assert {"mask", "report", "report_pdf", "explanation"} <= set(files)
    assert all((tmp_path / "out" / "CHUM-001" / name).stat().st_size for name in files.values())
    assert "CHUM-001" in (tmp_path / "out" / "index.html").read_text()


def test_a_failed_report_keeps_the_prediction_and_is_told(patients, options, tmp_path, monkeypatch, capsys):
    def broken(*arguments, **more):
        raise OSError("no ink")

    monkeypatch.setattr("scripts.prediction.report.write_report", broken)
    run(patients, tmp_path / "out", code=1, **{**options, "report": True})
    assert prediction_of(tmp_path / "out")["files"]["mask"]
    rows = rows_of(tmp_path / "out")
    assert {row["status"] for row in rows.values()} == {"incomplete"}
    assert rows["CHUM-001"]["reason"] == "no report: no ink" and rows["CHUM-001"]["log_hazard"]
    assert "CHUM-002: incomplete: no report: no ink" in capsys.readouterr().out


def test_a_failed_structured_report_keeps_the_rest(patients, options, tmp_path, monkeypatch, capsys):
    def broken(*arguments, **more):
        raise OSError("no ink")

    monkeypatch.setattr("scripts.prediction.dicom_results.write_sr", broken)
    run(dicom_of(patients, tmp_path / "in"), tmp_path / "out", code=1, **options)
    assert set(prediction_of(tmp_path / "out")["files"]) == {"mask", "dicom_seg", "dicom_rtstruct"}
    assert "CHUM-001: incomplete: no DICOM objects: no ink" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["notes.txt", "."])
def test_a_place_without_scans_is_told_with_what_to_do_here_alone(name, patients, options, tmp_path):
    (tmp_path / "notes.txt").touch()
    with pytest.raises(UsageError, match="two files are named with --ct and --pet"):
        predict(str(tmp_path / name), str(tmp_path / "out"), **options)
    with pytest.raises(NoScanError) as error:  # as other tools tell it, which have no such options
        find_cases(tmp_path / name)
    assert "--" not in str(error.value)


# --- an output that takes nothing ----------------------------------------------------------------------------------
def test_a_long_id_is_cut_on_the_screen():
    row = dict.fromkeys((name for name, _ in tool.COLUMNS.values()), "")
    lines = tool.table([row | {"PatientID": "a" * 600, "status": "ok"}, row | {"PatientID": "b\u202e", "status": "ok"}])
    assert lines == [f"{'patient':43}  status", f"{'a' * 40}...  ok", f"{'b' + chr(92) + 'u202e':43}  ok"]


def test_a_full_disk_costs_the_patients_it_meets_and_the_rows_are_shown(
    patients, options, tmp_path, monkeypatch, capsys
):
    """Masks can be written, and for the first patient all of it; then nothing."""
    written = []

    def write(self: Path, text: str, **more: str) -> int:
        if len(written) > 1:  # the first prediction and the table after it
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        written.append(self)
        return self.write_bytes(text.encode())

    monkeypatch.setattr(Path, "write_text", write)
    run(patients, tmp_path / "out", code=1, **options)
    shown = capsys.readouterr().out
    assert "CHUM-001  ok" in shown and "CHUM-002  failed" in shown
    place = tmp_path / "out"
    assert f"CHUM-002: failed: cannot write {place}/CHUM-002/prediction.json: no space left on device" in shown
    assert f"no predictions.csv: cannot write {place}/predictions.csv.partial: no space left on device" in shown
    assert [path.name for path in place.rglob("*.nii.gz")] == ["CHUM-001__tumour.nii.gz"]


def test_an_output_that_cannot_be_written_to_is_told_before_anything_is_read(patients, options, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(WriteError, match=r"cannot write to .*/file/out: not a directory"):
        predict(str(tmp_path / "absent"), str(tmp_path / "file" / "out"), **options)


def test_an_earlier_prediction_that_cannot_be_removed_fails_its_patient_only(patients, options, tmp_path, monkeypatch):
    run(patients, tmp_path / "out", **options)

    def keep(folder: Path) -> None:
        if folder.name == "CHUM-001":
            raise OSError(errno.EACCES, os.strerror(errno.EACCES), str(folder / "prediction.json"))

    monkeypatch.setattr("runtimes.inference.forget", keep)
    run(patients, tmp_path / "out", code=1, **options)
    rows = rows_of(tmp_path / "out")
    assert {patient: row["status"] for patient, row in rows.items()} == {"CHUM-001": "failed", "CHUM-002": "ok"}
    assert "an earlier prediction cannot be removed" in rows["CHUM-001"]["reason"]


# --- real data -----------------------------------------------------------------------------------------------------
@pytest.mark.skipif(not (SHARED_DATA / "dicom").is_dir(), reason="real DICOM is not beside the repository")
def test_real_legs_are_rejected_and_can_be_forced(options, tmp_path):
    source = SHARED_DATA / "dicom" / "STS-002"
    run(source, tmp_path / "out", code=1, **options)
    assert "head or neck outside the field of view" in rows_of(tmp_path / "out")["STS_002"]["reason"]
    run(source, tmp_path / "out", force=True, **options)
    prediction = prediction_of(tmp_path / "out", "STS_002")
    assert prediction["quality"]["forced"] and {"dicom_seg", "dicom_sr"} <= set(prediction["files"])
