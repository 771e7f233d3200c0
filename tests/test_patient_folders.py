"""Whatever a patient is called, what is written and removed lies in a folder of its own below OUTPUT."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from conftest import exit_code, make_tiny_cohort
from predict import predict
from runtimes.inference import forget


@pytest.fixture
def work(tmp_path) -> Path:
    """A patient as ``given``, and the results of somebody else, by the same names as ours, as ``other_results``."""
    make_tiny_cohort(tmp_path / "given", 1)
    (tmp_path / "results").mkdir()
    other = tmp_path / "other_results" / "CHUM-007"
    other.mkdir(parents=True)
    (other / "prediction.json").write_text(json.dumps({"files": {"mask": "CHUM-007__tumour.nii.gz"}}))
    (other / "CHUM-007__tumour.nii.gz").write_bytes(b"mask")
    return tmp_path


def others(work: Path) -> list[str]:
    return sorted(path.name for path in (work / "other_results" / "CHUM-007").iterdir())


def run(work: Path, model: Path, code: int = 1) -> dict[str, dict[str, str]]:
    """Predict ``given`` into ``results``; rows of the table."""
    options = {"ckpt_dir": str(model), "device": "cpu", "report": False}
    assert exit_code(predict, str(work / "given"), str(work / "results"), **options) == code
    with (work / "results" / "predictions.csv").open(newline="") as file:
        return {row["PatientID"]: row for row in csv.DictReader(file)}


@pytest.mark.parametrize("absolute", [False, True])
def test_a_table_removes_nobody_elses_results(work, model, absolute):
    patient = f"{work / 'other_results'}/CHUM-007" if absolute else "../other_results/CHUM-007"
    table = next((work / "given").glob("*.csv"))
    table.write_text(table.read_text() + f"{patient},1,50,1,,,,,M0,100,1,1\n")
    rows = run(work, model)
    assert others(work) == ["CHUM-007__tumour.nii.gz", "prediction.json"]
    assert rows[patient]["status"] == "failed" and "no CT and no PET" in rows[patient]["reason"]
    assert rows["CHUM-001"]["status"] == "ok"
    assert {path.name for path in work.iterdir()} == {"given", "other_results", "results"}


def test_a_link_below_the_output_is_not_followed(work, model):
    (work / "results" / "CHUM-001").symlink_to(work / "other_results" / "CHUM-007")
    rows = run(work, model)
    assert others(work) == ["CHUM-007__tumour.nii.gz", "prediction.json"]
    assert rows["CHUM-001"]["status"] == "failed"
    assert "CHUM-001 is a link" in rows["CHUM-001"]["reason"] and "remove it" in rows["CHUM-001"]["reason"]


@pytest.mark.parametrize("file", ["..", "../../other_results/CHUM-007/CHUM-007__tumour.nii.gz", "", "a/.."])
def test_an_earlier_prediction_names_only_files_of_its_own_folder(work, file):
    folder = work / "results" / "CHUM-007"
    folder.mkdir()
    (folder / "prediction.json").write_text(json.dumps({"files": {"mask": file}}))
    forget(folder)
    assert list(folder.iterdir()) == []
    assert others(work) == ["CHUM-007__tumour.nii.gz", "prediction.json"]


def test_a_list_of_patients_of_every_name(work, model):
    """Each is predicted, has a folder and a report of its own, and is called in the table as in the list."""
    scans = sorted(path.relative_to(work / "given") for path in (work / "given").rglob("*__*.nii.gz"))
    names = [
        "<script>alert(1)</script>",
        r"$\frac{$",
        "=1+1",
        "../up",
        "a/b",
        "a_b",
        "@b::$(c)",
        "CON",
        "x" * 300,
        "Mu\u0308ller\x1b[31m",
    ]
    rows = [{"patient_id": name, "ct": str(scans[0]), "pet": str(scans[1]), "Age": 61} for name in names]
    (work / "given" / "cases.json").write_text(json.dumps(rows))
    output = work / "results"
    predict(str(work / "given" / "cases.json"), str(output), ckpt_dir=str(model), device="cpu", report=True)
    with (output / "predictions.csv").open(newline="", encoding="utf-8") as file:
        table = list(csv.DictReader(file))
    shown = [*names[:2], "'=1+1", *names[3:6], "'@b::$(c)", *names[7:9], "M\u00fcller\\x1b[31m"]
    assert sorted(row["PatientID"] for row in table) == sorted(shown)
    assert {row["status"] for row in table} == {"ok"}
    assert {path.name for path in work.iterdir()} == {"given", "other_results", "results"}
    folders = [path for path in output.iterdir() if path.is_dir()]
    assert len(folders) == len(names) and all((folder / "report.pdf").is_file() for folder in folders)
    assert {row["mask"].split("/")[0] for row in table} == {folder.name for folder in folders}
    pages = [path.read_text(encoding="utf-8") for path in (output / "index.html", *output.glob("*/report.html"))]
    assert not [page for page in pages if "<script>alert" in page]
    assert sum("&lt;script&gt;alert" in page for page in pages) == 2
    assert pages[0].count("/report.html") == len(names)
