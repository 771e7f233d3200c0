"""The container's contract: what lies in /input, what must lie in /output, and what is said when it cannot."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from tiny_model import write_model

from command_line import UsageError

from conftest import ROOT, make_tiny_cohort
from runtimes.grand_challenge import (
    CONTRACTS,
    INCOMPLETE,
    UPLOADED,
    grand_challenge,
    not_answered,
    weights_folder,
    write_answers,
)
from scripts.cohorts.cohort import CohortError
from scripts.imaging.lesions import APART, MERGED

MASK = "images/tumor-lymph-node-segmentation/output.mha"
MASK_2026 = "images/head-neck-tumor-segmentation/output.mha"
EHR = {"Age": 61, "Gender": 1.0, "Tobacco Consumption": None, "M-stage": "M0", "CenterID": 3}


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


def run(given: Path, output: Path, model: Path, year: int = 2025, **more) -> tuple[float, bool]:
    grand_challenge(year, str(given), str(output), str(model), device="cpu", **more)
    return answers(output)


def run_2026(given: Path, output: Path, model: Path, **more) -> float:
    """The number in rfs.json of a run that ends with the code of incomplete answers."""
    with pytest.raises(SystemExit) as ended:
        grand_challenge(2026, str(given), str(output), str(model), device="cpu", **more)
    assert ended.value.code == INCOMPLETE
    return json.loads((output / "rfs.json").read_text())


def files_in(output: Path) -> set[str]:
    return {path.relative_to(output).as_posix() for path in output.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("year", "code", "written", "mask"),
    [
        pytest.param(2025, 0, {"rfs.json", "hpv-status.json", MASK}, MASK, id="2025"),
        pytest.param(2026, 3, {"rfs.json", MASK_2026}, MASK_2026, id="2026"),
    ],
)
def test_the_contract(given, model, tmp_path, year, code, written, mask):
    command = [sys.executable, "scripts/runtimes", "grand_challenge", "--year", year, "--input", given]
    command += ["--output", tmp_path / "out", "--ckpt_dir", model, "--device", "cpu"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    ended = subprocess.run([*map(str, command)], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert ended.returncode == code, ended.stderr
    said = [line for line in ended.stderr.splitlines() if line.startswith("not answered: ")]
    assert [line.split()[2] for line in said] == (["t-stage.json", "GTVp"] if year == 2026 else [])
    assert files_in(tmp_path / "out") == written
    assert re.fullmatch(r"-?\d+\.\d+(e-?\d+)?", (tmp_path / "out" / "rfs.json").read_text())
    if year == 2025:
        assert (tmp_path / "out" / "hpv-status.json").read_text() in ("true", "false")
    mask = sitk.ReadImage(str(tmp_path / "out" / mask))
    ct = sitk.ReadImage(str(next((given / "images" / "ct").iterdir())))
    assert mask.GetPixelID() == sitk.sitkUInt8 and mask.GetSize() == ct.GetSize()
    for of in ("GetSpacing", "GetOrigin", "GetDirection"):
        np.testing.assert_allclose(getattr(mask, of)(), getattr(ct, of)(), atol=1e-9)
    assert set(np.unique(sitk.GetArrayFromImage(mask))) <= {0, 1}


def test_the_year_decides_on_the_sign_and_nothing_of_another_year_stays(given, model, tmp_path):
    risk, _ = run(given, tmp_path / "out", model)
    for stage in ("t-stage.json", "n-stage.json"):  # of another program: nobody shall take them for answers of this one
        (tmp_path / "out" / stage).write_text('"T1"')
    time = run_2026(given, tmp_path / "out", model)
    assert time == -risk != 0
    assert files_in(tmp_path / "out") == {"rfs.json", MASK_2026}
    with pytest.raises(UsageError, match="--year is 2025 or 2026, got 2024"):
        run(given, tmp_path / "out", model, 2024)


def test_2026_may_give_the_hpv_status(given, tmp_path):
    """A network that reads it takes it; a value that means nothing is refused."""
    features = ["age", "gender", "m_stage", "hpv"]
    reader = write_model(tmp_path / "reader", clinical_features=features, hpv_inputs=["image"])
    answered = []
    for status in (None, 0, 1):
        (given / "ehr.json").write_text(json.dumps({**EHR, "HPV Status": status}))
        answered.append(run_2026(given, tmp_path / "out", reader))
    assert len(set(answered)) == 3
    (given / "ehr.json").write_text(json.dumps({**EHR, "HPV Status": "maybe"}))
    with pytest.raises(ValueError, match="HPV Status: 'maybe' is no value of hpv"):
        run(given, tmp_path / "out", reader, 2026)


@pytest.mark.parametrize(
    ("year", "classes", "said"),
    [
        pytest.param(2025, MERGED, [], id="2025"),
        pytest.param(2026, APART, ["t-stage.json and n-stage.json"], id="2026_classes_apart"),
        pytest.param(2026, MERGED, ["t-stage.json and n-stage.json", "GTVp and GTVn apart"], id="2026_merged"),
    ],
)
def test_what_is_not_answered_is_said(year, classes, said):
    assert [line.split(":")[0] for line in not_answered(CONTRACTS[year], classes)] == said


def test_a_model_of_two_classes_answers_1_and_2_and_says_nothing_of_them(given, tmp_path, caplog):
    apart = write_model(tmp_path / "apart", seg_classes=["GTVp", "GTVn"])
    run_2026(given, tmp_path / "out", apart)
    values = np.unique(sitk.GetArrayFromImage(sitk.ReadImage(str(tmp_path / "out" / MASK_2026))))
    assert 2 in values and set(values) <= {0, 1, 2}
    said = [record.getMessage() for record in caplog.records if record.getMessage().startswith("not answered")]
    assert len(said) == 1 and "t-stage.json and n-stage.json" in said[0]


# --- weights and PET in Bq/ml ----------------------------------------------------------------------------------------
def test_uploaded_weights_go_before_those_of_the_bundle(tmp_path, caplog):
    assert str(UPLOADED) == "/opt/ml/model"
    bundled = weights_folder(tmp_path / "no_such_folder")
    assert Path(bundled).parts[-2:] == ("bundle", "models")
    assert weights_folder(tmp_path) == bundled, "an empty folder is no upload"
    (tmp_path / "best.pth").touch()
    with pytest.raises(CohortError, match=r"holds no model\.pt but best\.pth: upload the weights as model\.pt"):
        weights_folder(tmp_path)
    (tmp_path / "model.pt").touch()
    with caplog.at_level("INFO", "predict"):
        assert weights_folder(tmp_path) == str(tmp_path)
    assert f"weights: {tmp_path / 'model.pt'}" in caplog.text


FACTOR = 0.0005


def in_activity(given: Path, folder: Path, row: str = f"MDA-410,BQML,70,140000000,{FACTOR}") -> Path:
    """Put the PET into Bq/ml under the patient's name; the table of factors."""
    pet = next((given / "images" / "pet").iterdir())
    image = sitk.Cast(sitk.ReadImage(str(pet)), sitk.sitkFloat32) / FACTOR
    pet.unlink()
    sitk.WriteImage(image, str(pet.with_name("MDA-410__PT.mha")))
    table = folder / "suv_conversion_tags.csv"
    table.write_text(f"pid,units,patient_weight_kg,dose_for_suv_bq,bqml_to_suvbw_factor\n{row}\n")
    return table


def test_a_pet_in_bq_per_ml_gives_the_answers_of_that_in_suv(given, model, tmp_path):
    suv, _ = run(given, tmp_path / "suv", model)
    table = in_activity(given, tmp_path)
    assert run(given, tmp_path / "bq", model, suv_csv=str(table))[0] == pytest.approx(suv, abs=1e-5)
    one, other = (sitk.GetArrayFromImage(sitk.ReadImage(str(tmp_path / of / MASK))) for of in ("suv", "bq"))
    assert (one != other).mean() < 1e-4


@pytest.mark.parametrize(
    ("row", "options", "message"),
    [
        pytest.param(
            f"CHUP-1,BQML,70,140000000,{FACTOR}",
            {},
            r"no patient MDA-410, .* it has CHUP-1 \(the PET is called MDA-410__PT.mha; --patient_id names",
            id="unknown",
        ),
        pytest.param(f"MDA-410,BQML,70,140000000,{FACTOR}", {"patient_id": "MDA-9"}, "no patient MDA-9", id="other_id"),
        pytest.param("MDA-410,GML,,,", {}, "the PET is in SUV already", id="suv_already"),
        pytest.param("MDA-410,BQML,70,140000000,0.0007", {}, "is 0.0007, but weight and dose", id="contradiction"),
        pytest.param(
            "MDA-410,BQML,,,1e-9", {}, r"no prediction: .*is the PET in SUV already\?", id="suv_by_its_values"
        ),
    ],
)
def test_a_pet_that_cannot_be_converted_is_told_and_leaves_no_answer(given, model, tmp_path, row, options, message):
    table = in_activity(given, tmp_path, row)
    with pytest.raises(CohortError, match=message):
        run(given, tmp_path / "out", model, suv_csv=str(table), **options)
    assert files_in(tmp_path / "out") == set()


def test_a_patients_id_without_a_table_is_refused(given, model, tmp_path):
    with pytest.raises(UsageError, match="--patient_id needs --suv_csv"):
        run(given, tmp_path / "out", model, patient_id="MDA-410")


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
    write_answers(prediction(hpv=hpv), tmp_path, tmp_path / "out", CONTRACTS[2025])
    assert answers(tmp_path / "out") == (0.25, expected)
    assert (said in caplog.text) if said else "threshold" not in caplog.text


def test_a_forced_answer_is_said(tmp_path, caplog):
    (tmp_path / "m.mha").write_bytes(b"mask")
    write_answers(prediction(quality={"forced": True}), tmp_path, tmp_path / "out", CONTRACTS[2025])
    assert "quality control rejects these scans" in caplog.text


@pytest.mark.parametrize(
    ("year", "part", "wanted"),
    [
        *((2025, part, "seg, hpv and surv") for part in ({"survival": None}, {"hpv": None}, {"files": {"mask": None}})),
        *((2026, part, "seg and surv") for part in ({"survival": None}, {"files": {"mask": None}})),
    ],
)
def test_a_model_without_a_task_is_refused(tmp_path, year, part, wanted):
    with pytest.raises(CohortError, match=f"has the tasks seg, hpv; {wanted} are asked for"):
        write_answers(prediction(**part), tmp_path, tmp_path / "out", CONTRACTS[year])
    assert not (tmp_path / "out").exists()


def test_2026_needs_no_hpv_status_of_the_model(tmp_path):
    (tmp_path / "m.mha").write_bytes(b"mask")
    write_answers(prediction(hpv=None), tmp_path, tmp_path / "out", CONTRACTS[2026])
    assert files_in(tmp_path / "out") == {"rfs.json", MASK_2026}
    assert json.loads((tmp_path / "out" / "rfs.json").read_text()) == -0.25


def test_the_dockerfile_copies_all_that_the_command_imports(tmp_path):
    """The copies of the Dockerfile start the command by themselves."""
    text = (ROOT / "Dockerfile").read_text()
    for *sources, target in (line.split()[1:] for line in text.splitlines() if line.startswith("COPY")):
        for source in sources:
            place = tmp_path / target / Path(source).name if target.endswith(("/", ".")) else tmp_path / target
            place.parent.mkdir(parents=True, exist_ok=True)
            if (ROOT / source).is_dir():
                shutil.copytree(ROOT / source, place, ignore=shutil.ignore_patterns("models", "__pycache__"))
            else:
                shutil.copyfile(ROOT / source, place)
    command = re.search(r"ENTRYPOINT (\[.*\])\nCMD (\[.*\])", text)
    assert json.loads(command[2]) == ["--year", "2025"]
    words = [sys.executable, *json.loads(command[1])[1:]]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    ended = subprocess.run([*words, "--help"], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert (ended.returncode, "--suv_csv" in ended.stdout) == (0, True), ended.stderr
