"""The container's contract: what lies in /input, what must lie in /output, and what is said when it cannot."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from tiny_model import write_model

from conftest import ROOT, make_tiny_cohort
from predict import UsageError
from runtimes.grand_challenge import grand_challenge, write_answers
from scripts.cohorts.cohort import CohortError

MASK = "images/tumor-lymph-node-segmentation/output.mha"
EHR = {"Age": 61, "Gender": 1.0, "Tobacco Consumption": None, "M-stage": "M0", "CenterID": 3}


@pytest.fixture(scope="session")
def model(tmp_path_factory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def given(tmp_path) -> Path:
    """An input folder as the challenge has it, CT and PET under names of their own."""
    cohort = make_tiny_cohort(tmp_path / "cohort", 1) / "Task 1" / "CHUM-001"
    for kind, name in (("ct", "CT"), ("pet", "PT")):
        image = sitk.ReadImage(str(cohort / f"CHUM-001__{name}.nii.gz"))
        for key in image.GetMetaDataKeys():
            image.EraseMetaData(key)
        folder = tmp_path / "input" / "images" / kind
        folder.mkdir(parents=True)
        sitk.WriteImage(image, str(folder / f"{kind}-5f3a.mha"), True)
    (tmp_path / "input" / "ehr.json").write_text(json.dumps(EHR))
    return tmp_path / "input"


def answers(output: Path) -> tuple[float, bool]:
    return json.loads((output / "rfs.json").read_text()), json.loads((output / "hpv-status.json").read_text())


def run(given: Path, output: Path, model: Path, rfs: str = "risk", **more) -> tuple[float, bool]:
    grand_challenge(rfs, str(given), str(output), str(model), device="cpu", **more)
    return answers(output)


def test_the_contract(given, model, tmp_path):
    command = [sys.executable, "scripts/runtimes", "grand_challenge", "--rfs", "risk", "--input", given]
    command += ["--output", tmp_path / "out", "--ckpt_dir", model, "--device", "cpu"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    ended = subprocess.run([*map(str, command)], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    files = {path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert files == {"rfs.json", "hpv-status.json", MASK}
    assert re.fullmatch(r"-?\d+\.\d+(e-?\d+)?", (tmp_path / "out" / "rfs.json").read_text())
    assert (tmp_path / "out" / "hpv-status.json").read_text() in ("true", "false")
    mask = sitk.ReadImage(str(tmp_path / "out" / MASK))
    ct = sitk.ReadImage(str(next((given / "images" / "ct").iterdir())))
    assert mask.GetPixelID() == sitk.sitkUInt8 and mask.GetSize() == ct.GetSize()
    for of in ("GetSpacing", "GetOrigin", "GetDirection"):
        np.testing.assert_allclose(getattr(mask, of)(), getattr(ct, of)(), atol=1e-9)
    assert set(np.unique(sitk.GetArrayFromImage(mask))) <= {0, 1}


def test_the_sign_is_a_choice(given, model, tmp_path):
    risk, _ = run(given, tmp_path / "risk", model)
    time, _ = run(given, tmp_path / "time", model, "time")
    assert time == -risk != 0
    with pytest.raises(UsageError, match=r"--rfs is risk .* or time"):
        run(given, tmp_path / "out", model, "days")


def test_clinical_values_count(given, model, tmp_path):
    before, _ = run(given, tmp_path / "a", model)
    (given / "ehr.json").write_text(json.dumps({**EHR, "Age": 90}))
    assert run(given, tmp_path / "b", model)[0] != before


@pytest.mark.parametrize(
    "text, message",
    [
        pytest.param(
            '{"Age": 61,\n "Gender": 1,\n}', r"ehr.json, line \d: not valid JSON .*comma.*remove it", id="comma"
        ),
        pytest.param('{"Age": ', "ehr.json, line 1: not valid JSON", id="cut_off"),
        pytest.param("[61]", "expected one object", id="list"),
        pytest.param('{"Age": "old"}', "ehr.json, Age: 'old' is no value of age", id="value"),
        pytest.param('{"Age": 61, "Age": 62}', "ehr.json: 'Age' occurs twice", id="twice"),
        pytest.param(
            '{"patient": {"Age": 63, "M-stage": "M0"}}',
            "none of its names is a known clinical value; found: 'patient'; known are Age.*give only its content",
            id="nested",
        ),
        pytest.param('{"CenterID": 1, "AgeAtDx": 63}', r"found: 'AgeAtDx' \(Age\?\)", id="other_names"),
    ],
)
def test_a_broken_ehr_is_told_and_leaves_no_answer(given, model, tmp_path, text, message):
    (given / "ehr.json").write_text(text)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "rfs.json").write_text("1.0")  # of an earlier run
    with pytest.raises(ValueError, match=message):
        run(given, tmp_path / "out", model)
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize("kind", ["folder", "pipe", "link"])
def test_an_ehr_that_is_no_file_is_told(given, model, tmp_path, kind):
    path = given / "ehr.json"
    path.unlink()
    {"folder": path.mkdir, "pipe": lambda: os.mkfifo(path), "link": lambda: path.symlink_to("gone")}[kind]()
    with pytest.raises(CohortError, match=rf"ehr\.json cannot be read: it is a (broken )?{kind}"):
        run(given, tmp_path / "out", model)


def test_an_empty_ehr_is_told(given, model, tmp_path, caplog):
    (given / "ehr.json").write_text("{}")
    run(given, tmp_path / "out", model)
    assert "ehr.json is empty: all clinical values are taken as missing" in caplog.text


def test_names_that_are_not_known_are_told(given, model, tmp_path, caplog):
    (given / "ehr.json").write_text('{"Age": 61, "Tobaco Consumption": 1}')
    run(given, tmp_path / "out", model)
    assert "ehr.json: unknown names are ignored: 'Tobaco Consumption' (Tobacco Consumption?)" in caplog.text


@pytest.mark.parametrize("kind", ["ct", "pet"])
def test_a_missing_or_doubled_image_is_told(given, model, tmp_path, kind):
    image = next((given / "images" / kind).iterdir())
    (image.parent / "second.mha").write_bytes(image.read_bytes())
    with pytest.raises(
        CohortError, match=rf"images/{kind}: expected one \.mha file, found {kind}-5f3a\.mha, second\.mha"
    ):
        run(given, tmp_path / "out", model)
    for path in image.parent.iterdir():
        path.unlink()
    with pytest.raises(CohortError, match=rf"images/{kind}: expected one \.mha file, found none"):
        run(given, tmp_path / "out", model)


def test_a_broken_image_fails(given, model, tmp_path):
    image = next((given / "images" / "ct").iterdir())
    image.write_bytes(image.read_bytes()[:400])
    with pytest.raises(CohortError, match=r"no prediction: .*ct-5f3a\.mha"):
        run(given, tmp_path / "out", model)


# --- thresholds and tasks ------------------------------------------------------------------------------------------
def prediction(**changes) -> dict:
    said = {
        "survival": {"log_hazard": 0.25},
        "hpv": {"probability": 0.45, "positive": None},
        "tumour": {"volume_ml": 1.0},
        "files": {"mask": "m.mha"},
        "quality": {"forced": False},
        "model": {"tasks": ["seg", "hpv"], "trained_on": "phantoms"},
        "notice": "research",
    }
    return {**said, **changes}


@pytest.mark.parametrize(
    "hpv, expected, said",
    [
        pytest.param({"probability": 0.45, "positive": True}, True, "", id="own_threshold"),
        pytest.param({"probability": 0.45, "positive": None}, False, "0.5 is taken", id="below_half"),
        pytest.param({"probability": 0.55, "positive": None}, True, "0.5 is taken", id="above_half"),
    ],
)
def test_hpv_by_the_stored_threshold_or_half(tmp_path, caplog, hpv, expected, said):
    (tmp_path / "m.mha").write_bytes(b"mask")
    write_answers(prediction(hpv=hpv), tmp_path, tmp_path / "out", "time")
    assert answers(tmp_path / "out") == (-0.25, expected)
    assert (said in caplog.text) if said else "threshold" not in caplog.text


def test_a_forced_answer_is_said(tmp_path, caplog):
    (tmp_path / "m.mha").write_bytes(b"mask")
    write_answers(prediction(quality={"forced": True}), tmp_path, tmp_path / "out", "risk")
    assert "quality control rejects these scans" in caplog.text


@pytest.mark.parametrize("part", [{"survival": None}, {"hpv": None}, {"files": {"mask": None}}])
def test_a_model_without_a_task_is_refused(tmp_path, part):
    with pytest.raises(CohortError, match="has the tasks seg, hpv; seg, hpv and surv are asked for"):
        write_answers(prediction(**part), tmp_path, tmp_path / "out", "risk")
    assert not (tmp_path / "out").exists()
