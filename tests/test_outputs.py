"""What the writer leaves on disk: whole files, one row for each patient, nothing kept in memory."""

from __future__ import annotations

import csv
import errno
import gc
import json
import os
import weakref
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.data import MetaTensor

from scripts import keys
from scripts.cohorts.files import write_text
from scripts.imaging.images import read_image
from scripts.prediction.outputs import (
    COLUMNS,
    LESION_COLUMNS,
    PredictionWriter,
    folder_name,
    folder_names,
    mask_suffix,
    prediction_row,
)
from scripts.prediction.summary import write_summary

AFFINE = np.array([[-2.0, 0, 0, 10], [0, -2, 0, 20], [0, 0, 3, -5], [0, 0, 0, 1]])


def case(patient: str = "CHUM-001", ct: object = "a__CT.nii.gz", **more: object) -> dict:
    return {keys.PATIENT_ID: patient, keys.CT: ct, **more}


def lesion(name: str, volume: float, uptake: float | None) -> dict:
    suv = dict.fromkeys(("suv_max", "suv_mean", "suv_peak", "mtv_ml", "tlg_g"), uptake)
    return {
        "name": name,
        "label": "GTV",
        "volume_ml": volume,
        **suv,
        "longest_diameter_mm": 21.0,
        "centre_mm": [1, 2, 3],
    }


def prediction(patient: str = "CHUM-001", sha256: str = "ab") -> dict:
    rows = [{"years": float(y), "days": 365.25 * y, "survival": 1 - 0.1 * y, "low": 0.1, "high": 0.95} for y in (1, 2)]
    return {
        "patient_id": patient,
        "model": {"trained_on": "phantoms, not for clinical use", "sha256": sha256},
        "clinical_model": {"survival": None, "values": [], "known": 0, "summary": ""},
        "survival": {
            **{"log_hazard": -0.5, "log_hazard_std": 0.1, "percentile": 40.0, "risk_group": "low"},
            "recurrence_free_survival": rows,
        },
        "hpv": {"probability": 0.7, "positive": True},
        "tumour": {
            **{"volume_ml": 12.0, "lesions": 2, "suv_max": 11.0, "mtv_ml": 5.0, "tlg_g": 40.0},
            "lesion_list": [lesion("GTV_01", 8.0, 11.0), lesion("GTV_02", 4.0, None)],
        },
        "quality": {"verdict": "warn", "forced": False},
        "crop": {"method": "pet_brain", "flag": "cut"},
        "files": {"mask": None},
    }


def result(patient: str = "CHUM-001", mask: bool = True, **more: object) -> dict:
    volume = np.zeros((1, 6, 5, 4), dtype=np.uint8)
    volume[0, 2:4, 2:4, 1:3] = 1
    found = {keys.PRED: MetaTensor(torch.from_numpy(volume), affine=torch.from_numpy(AFFINE))} if mask else {}
    return {
        **found,
        keys.PATIENT_ID: patient,
        keys.CT_AFFINE: torch.from_numpy(AFFINE),
        keys.PREDICTION: prediction(patient),
        **more,
    }


def table(folder: Path) -> list[dict[str, str]]:
    return list(csv.DictReader((folder / "predictions.csv").read_text().splitlines()))


def test_a_patient_has_a_mask_a_json_and_a_row(tmp_path: Path) -> None:
    writer = PredictionWriter(str(tmp_path), [case()])
    written = writer.write_patient(result())
    writer.write_table()
    assert json.loads((tmp_path / "CHUM-001" / "prediction.json").read_text()) == written
    assert written["files"] == {"mask": "CHUM-001__tumour.nii.gz"}
    mask, affine = read_image(tmp_path / "CHUM-001" / written["files"]["mask"])
    np.testing.assert_array_equal(mask, result()[keys.PRED][0].numpy())
    header = nib.load(tmp_path / "CHUM-001" / written["files"]["mask"]).header
    assert header["descrip"].item().decode() == f"Research use; trained on {written['model']['trained_on']}"
    np.testing.assert_allclose(affine, AFFINE)
    (row,) = table(tmp_path)
    assert tuple(row) == COLUMNS
    expected = {
        **{"PatientID": "CHUM-001", "status": "ok", "reason": "", "log_hazard": "-0.5", "percentile": "40.0"},
        **{"risk_group": "low", "survival_1y": "0.9", "survival_2y": "0.8", "survival_3y": "", "survival_5y": ""},
        **{"hpv_probability": "0.7", "hpv_class": "positive", "tumour_volume_ml": "12.0", "lesions": "2"},
        **{"suv_max": "11.0", "mtv_ml": "5.0", "tlg_g": "40.0", "quality": "warn", "forced": "False"},
        **{"crop_method": "pet_brain", "crop_flag": "cut", "trained_on": "phantoms, not for clinical use"},
        **{"model_sha256": "ab", "mask": "CHUM-001/CHUM-001__tumour.nii.gz"},
    }
    assert {name: row[name] for name in expected} == expected
    assert sorted(p.name for p in tmp_path.rglob("*") if p.is_file()) == [
        "CHUM-001__tumour.nii.gz",
        "audit.jsonl",
        "lesions.csv",
        "prediction.json",
        "predictions.csv",
    ]


def test_every_lesion_has_a_row_and_a_failed_patient_none(tmp_path: Path) -> None:
    writer = PredictionWriter(str(tmp_path), [case("=B"), case("CHUM-001"), case("CHUM-003")])
    for patient in ("CHUM-001", "=B", "CHUM-003"):
        writer.write_patient(result(patient))
    writer.fail("CHUM-003", "later")
    writer.write_table()
    rows = list(csv.DictReader((tmp_path / "lesions.csv").read_text().splitlines()))
    assert tuple(rows[0]) == LESION_COLUMNS
    assert [(row["PatientID"], row["lesion"]) for row in rows] == [
        *(("'=B", "GTV_01"), ("'=B", "GTV_02"), ("CHUM-001", "GTV_01"), ("CHUM-001", "GTV_02"))
    ]
    assert (rows[0]["volume_ml"], rows[0]["suv_peak"], rows[0]["centre_z_mm"]) == ("8.0", "11.0", "3")
    assert rows[1]["suv_peak"] == "" and rows[1]["label"] == "GTV"
    assert (rows[1]["trained_on"], rows[1]["model_sha256"]) == ("phantoms, not for clinical use", "ab")


def test_without_lesions_the_table_has_its_columns(tmp_path: Path) -> None:
    writer = PredictionWriter(str(tmp_path), [case()])
    writer.write_patient(result(mask=False, **{keys.PREDICTION: {**prediction(), "tumour": None}}))
    writer.write_table()
    assert (tmp_path / "lesions.csv").read_text() == ",".join(LESION_COLUMNS) + "\n"


def test_a_prediction_without_a_measurement_of_its_lesions_is_made_again(tmp_path: Path) -> None:
    """As an earlier version has left it."""
    writer = PredictionWriter(str(tmp_path), [case()])
    written = writer.write_patient(result())
    del written["tumour"]["lesion_list"][0]["suv_peak"]
    (tmp_path / "CHUM-001" / "prediction.json").write_text(json.dumps(written))
    again = PredictionWriter(str(tmp_path), [case()])
    assert not again.take_over("CHUM-001", "ab") and (again.rows, again.lesions) == ({}, {})


@pytest.mark.parametrize(
    ("ct", "suffix"),
    [
        ("a.nii", ".nii.gz"),
        ("a.nii.gz", ".nii.gz"),
        ("A.MHA", ".mha"),
        (Path("a.mhd"), ".mha"),
        ((np.zeros((2, 2, 2)), np.eye(4)), ".nii.gz"),
        (SimpleNamespace(read=None), ".nii.gz"),
    ],
)
def test_masks_are_of_the_scans_format(ct: object, suffix: str) -> None:
    assert mask_suffix(ct) == suffix


def test_a_mask_in_the_format_of_itk_reads_back(tmp_path: Path) -> None:
    written = PredictionWriter(str(tmp_path), [case(ct="scan.mha")]).write_patient(result())
    mask, affine = read_image(tmp_path / "CHUM-001" / written["files"]["mask"])
    np.testing.assert_array_equal(mask, result()[keys.PRED][0].numpy())
    np.testing.assert_allclose(affine, AFFINE)


def test_what_a_model_does_not_give_is_left_out(tmp_path: Path) -> None:
    writer = PredictionWriter(str(tmp_path), [case()])
    bare = {**prediction(), "survival": None, "hpv": None, "tumour": None}
    written = writer.write_patient(result(mask=False, **{keys.PREDICTION: bare}))
    assert written["files"] == {"mask": None}
    row = prediction_row(written)
    assert {name for name, value in row.items() if value != ""} == {
        *("quality", "forced", "crop_method", "crop_flag", "trained_on", "model_sha256")
    }
    assert not list(tmp_path.rglob("*__tumour*"))


def test_products_are_named_in_the_prediction(tmp_path: Path) -> None:
    seen = []

    def product(of: dict, given: dict, folder: Path) -> Iterator[tuple[str, str]]:
        assert (folder / given[keys.PREDICTION]["files"]["mask"]).is_file()
        assert not (folder / "prediction.json").exists()
        seen.append(of[keys.PATIENT_ID])
        yield "report", "report.html"

    written = PredictionWriter(str(tmp_path), [case()], {"report": product}).write_patient(result())
    assert written["files"]["report"] == "report.html"
    assert seen == ["CHUM-001"]


def test_a_product_that_fails_is_named_and_costs_nothing_else(tmp_path: Path, caplog) -> None:
    def halfway(*_: object) -> Iterator[tuple[str, str]]:
        yield "dicom_seg", "tumour_seg.dcm"
        raise ValueError("no room\nleft")

    def report(*_: object) -> Iterator[tuple[str, str]]:
        yield "report", "report.html"

    writer = PredictionWriter(str(tmp_path), [case()], {"DICOM objects": halfway, "report": report})
    written = writer.write_patient(result())
    assert written == json.loads((tmp_path / "CHUM-001" / "prediction.json").read_text())
    assert {"dicom_seg", "report", "mask"} == set(written["files"])
    row = writer.rows["CHUM-001"]
    assert (row["status"], row["reason"]) == ("incomplete", "no DICOM objects: no room left")
    assert row["log_hazard"] != "" and writer.failures == {"CHUM-001": "no DICOM objects: no room left"}
    assert "CHUM-001: predicted, but no DICOM objects: no room left" in caplog.text


def test_numbers_that_json_does_not_know_are_an_error(tmp_path: Path) -> None:
    bad = prediction()
    bad["tumour"]["suv_max"] = float("nan")
    with pytest.raises(ValueError, match="not JSON compliant"):
        PredictionWriter(str(tmp_path), [case()]).write_patient(result(**{keys.PREDICTION: bad}))
    assert not (tmp_path / "CHUM-001" / "prediction.json").exists()


def test_rows_follow_the_list_and_failures_have_one(tmp_path: Path) -> None:
    cases = [case("CHUM-002", **{keys.CLINICAL_FOUND: False}), case("CHUM-001"), case("CHUM-003")]
    writer = PredictionWriter(str(tmp_path), cases)
    writer.write_patient(result("CHUM-001"))
    engine = SimpleNamespace(state=SimpleNamespace(failures={"CHUM-003": "no PET"}))
    writer.note_failure(engine)
    assert (tmp_path / "predictions.csv.partial").is_file()
    writer.write_patient(result("CHUM-002"))
    writer.write_table(engine)
    assert not (tmp_path / "predictions.csv.partial").exists()
    assert [(row["PatientID"], row["status"]) for row in table(tmp_path)] == [
        ("CHUM-002", "incomplete"),
        ("CHUM-001", "ok"),
        ("CHUM-003", "failed"),
    ]
    assert table(tmp_path)[2]["reason"] == "no PET"
    with pytest.raises(SystemExit):
        writer.exit_if_incomplete()


def test_an_earlier_prediction_of_the_same_model_is_taken_over(tmp_path: Path) -> None:
    first = PredictionWriter(str(tmp_path), [case()])
    first.write_patient(result())
    again = PredictionWriter(str(tmp_path), [case(), case("CHUM-002")])
    assert again.take_over("CHUM-001", "ab")
    assert (again.rows, again.lesions) == (first.rows, first.lesions)
    assert not again.take_over("CHUM-001", "another model")
    assert not again.take_over("CHUM-002", "ab")
    (tmp_path / "CHUM-001" / "prediction.json").write_text('{"model": {"sha')
    assert not again.take_over("CHUM-001", "ab")


@pytest.mark.parametrize(
    ("patient", "name"),
    [
        pytest.param("CHUM-001", "CHUM-001", id="plain"),
        pytest.param("P+1.2_x", "P+1.2_x", id="signs_that_stay"),
        pytest.param("../other_results/ID", "other_results_ID", id="above"),
        pytest.param("/etc/passwd", "etc_passwd", id="absolute"),
        pytest.param("C:\\temp\\x", "C_temp_x", id="windows_path"),
        pytest.param("..", "unnamed", id="dots"),
        pytest.param("", "unnamed", id="empty"),
        pytest.param("-rf", "rf", id="option"),
        pytest.param(".hidden", "hidden", id="hidden"),
        pytest.param("name. ", "name", id="ends_in_dot_and_space"),
        pytest.param("con", "patient_con", id="windows_device"),
        pytest.param("LPT1.txt", "patient_LPT1.txt", id="windows_device_with_ending"),
        pytest.param("predictions.csv", "patient_predictions.csv", id="name_of_the_table"),
        pytest.param("a\nb\0c", "a_b_c", id="control_characters"),
        pytest.param("Mu\u0308ller", "M\u00fcller", id="decomposed"),
        pytest.param("\u60a3\u8005 1", "\u60a3\u8005_1", id="other_script"),
        pytest.param("<b>x</b>", "b_x_b", id="html"),
    ],
)
def test_a_folder_is_named_by_the_id_and_by_nothing_that_leads_elsewhere(patient: str, name: str) -> None:
    assert folder_name(patient) == name == folder_name(name)


@pytest.mark.parametrize("letter", ["x", "\u60a3"])
def test_long_ids_have_short_folders_of_their_own(tmp_path: Path, letter: str) -> None:
    first, second = (folder_name(letter * 400 + end) for end in "ab")
    assert first != second
    assert all(len(f".12345678.{name}__tumour.nii.gz".encode()) < 255 for name in (first, second))
    (tmp_path / first).mkdir()


@pytest.mark.parametrize(
    ("patients", "kept"),
    [
        pytest.param(["a/b", "a_b", "a b"], "a_b", id="signs"),
        pytest.param(["p-1", "P-1"], "P-1", id="case"),
        pytest.param(["/", "..", "*"], None, id="nothing_left"),
    ],
)
def test_no_two_patients_share_a_folder(patients: list[str], kept: str | None, caplog) -> None:
    names = folder_names(patients)
    assert names == folder_names(patients[::-1])
    assert len({name.casefold() for name in names.values()}) == len(patients)
    if kept is not None:
        assert names[kept] == kept
    assert "another patient has the folder" in caplog.text


def test_a_patient_of_any_name_is_written_below_the_output_and_shown_as_called(tmp_path: Path) -> None:
    names = ["../up", "a/b", "a_b", "=cmd|' /C calc'!A0"]
    writer = PredictionWriter(str(tmp_path / "out"), [case(name) for name in names])
    for name in names:
        writer.write_patient(result(name))
    writer.write_table()
    assert {path.name for path in tmp_path.iterdir()} == {"out"}
    rows = table(tmp_path / "out")
    assert [row["PatientID"] for row in rows] == [*names[:3], f"'{names[3]}"]
    assert all((tmp_path / "out" / row["mask"]).is_file() for row in rows)
    assert len({row["mask"] for row in rows}) == len(names)


def test_a_prediction_of_another_patient_is_not_taken_over(tmp_path: Path) -> None:
    """Alone, ``a/b`` has the folder that ``a_b`` has in the next run."""
    PredictionWriter(str(tmp_path), [case("a/b")]).write_patient(result("a/b"))
    assert not PredictionWriter(str(tmp_path), [case("a_b")]).take_over("a_b", "ab")


def test_text_that_a_spreadsheet_would_run_is_no_formula(tmp_path: Path) -> None:
    writer = PredictionWriter(str(tmp_path), [case()])
    writer.fail("CHUM-001", '=HYPERLINK("http://x")')
    writer.write_table()
    assert table(tmp_path)[0]["reason"] == '\'=HYPERLINK("http://x")'


def test_only_the_row_of_a_patient_stays_in_memory(tmp_path: Path) -> None:
    writer = PredictionWriter(str(tmp_path), [case()])
    given = result()
    volume = weakref.ref(given[keys.PRED])
    writer.write_patient(given)
    del given
    gc.collect()
    assert volume() is None
    assert set(writer.rows["CHUM-001"]) == set(COLUMNS)
    assert all(isinstance(value, str | float | int | bool) for value in writer.rows["CHUM-001"].values())


# --- a disk that takes no more ---------------------------------------------------------------------------------------
def fill_up(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    """Let files whose path has one of these in it be refused as by a full disk."""
    method = Path.write_text

    def write(self: Path, *arguments: Any, **more: Any) -> int:
        if any(name in str(self) for name in names):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return method(self, *arguments, **more)

    monkeypatch.setattr(Path, "write_text", write)


def test_a_patient_that_could_not_be_written_leaves_nothing(tmp_path: Path, monkeypatch) -> None:
    def report(of: dict, given: dict, folder: Path) -> Iterator[tuple[str, str]]:
        (folder / "report.html").touch()
        yield "report", "report.html"

    fill_up(monkeypatch, "prediction.json")
    writer = PredictionWriter(str(tmp_path), [case()], {"report": report})
    with pytest.raises(OSError, match=r"cannot write .*/CHUM-001/prediction\.json: no space left on device"):
        writer.write_patient(result())
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_rows_are_kept_while_the_table_cannot_be_written(tmp_path: Path, monkeypatch) -> None:
    writer = PredictionWriter(str(tmp_path), [case()])
    with monkeypatch.context() as patch:
        fill_up(patch, "predictions.csv")
        writer.note_failure(SimpleNamespace(state=SimpleNamespace(failures={"CHUM-001": "no PET"})))
    writer.write_table()
    assert table(tmp_path)[0]["reason"] == "no PET" and not writer.problems


def test_without_its_table_a_cohort_is_told_and_fails(tmp_path: Path, monkeypatch, caplog) -> None:
    (tmp_path / "predictions.csv").write_text("of an earlier run")
    writer = PredictionWriter(str(tmp_path), [case()])
    writer.write_patient(result())
    writer.pages["index.html"] = lambda: write_summary(tmp_path)
    fill_up(monkeypatch, "predictions.csv")
    writer.write_table()
    assert set(writer.problems) == {"predictions.csv", "index.html"}
    assert "no space left on device" in writer.problems["predictions.csv"]
    assert not (tmp_path / "predictions.csv").exists()
    with pytest.raises(SystemExit, match="1"):
        writer.exit_if_incomplete()
    assert "CHUM-001,ok," in caplog.text  # the rows are on the console


def test_a_page_that_cannot_be_written_costs_the_exit_code(tmp_path: Path, monkeypatch) -> None:
    writer = PredictionWriter(str(tmp_path), [case()])
    writer.write_patient(result())
    writer.pages["index.html"] = lambda: write_text(tmp_path / "index.html", "page")
    fill_up(monkeypatch, "index.html")
    writer.write_table()
    assert set(writer.problems) == {"index.html"} and table(tmp_path)[0]["status"] == "ok"
    with pytest.raises(SystemExit, match="1"):
        writer.exit_if_incomplete()
