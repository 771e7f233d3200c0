"""PET in Bq/ml by the challenge's table of factors: what is converted, and what is refused with which words."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from scripts.cohorts.cohort import CohortError
from scripts.dicom.suv_table import ActivityScan, read_suv_factor
from scripts.imaging.images import ImageReadError
from scripts.imaging.transforms import LoadScansd

TITLES = "pid,units,patient_weight_kg,radiopharmaceutical,decay_corrected_dose_at_scan_bq,dose_for_suv_bq,"
TITLES += "bqml_to_suvbw_factor"
DOSE = 140_000_000
FACTOR = 70_000 / DOSE


def table(folder: Path, *rows: str, titles: str = TITLES) -> Path:
    path = folder / "suv_conversion_tags.csv"
    path.write_text("\n".join([titles, "MDA-001,BQML,80,FDG,,200000000,0.0004", *rows]) + "\n")
    return path


@pytest.mark.parametrize(
    ("row", "patient"),
    [
        pytest.param(f"CHUP-014,BQML,70,FDG,{DOSE},{DOSE},{FACTOR}", "CHUP-014", id="all_given"),
        pytest.param(f"CHUP-014,BQML,70,FDG,,{DOSE},", "CHUP-014", id="weight_and_dose"),
        pytest.param(f"CHUP-014,BQML,,FDG,,,{FACTOR}", "CHUP-014", id="factor_alone"),
        pytest.param(f"CHUP-014,BQML,70,FDG,,,{FACTOR}", "CHUP-014", id="weight_without_dose"),
        pytest.param(f"CHUP-014,bqml,70,FDG,,{DOSE},0.00050001", "chup_014", id="rounded_and_another_spelling"),
    ],
)
def test_the_factor_of_a_patient(tmp_path, row, patient):
    assert read_suv_factor(table(tmp_path, row), patient) == pytest.approx(FACTOR, rel=1e-12)


def test_the_organisers_own_numbers(tmp_path):
    row = "CHUP-014,BQML,77,Fluorodeoxyglucose,137231850.3,137231850.3,0.000561094"
    assert read_suv_factor(table(tmp_path, row), "CHUP-014") == pytest.approx(0.000561094, rel=2e-6)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        pytest.param([], "no patient CHUP-014, whose PET is to be converted; it has MDA-001", id="unknown_patient"),
        pytest.param([f"CHUP-014,BQML,70,,,{DOSE},"] * 2, r"patient CHUP-014 is in rows 3, 4", id="twice"),
        pytest.param(
            [f"CHUP-014,BQML,70,,,{DOSE},0.0007"],
            r"row 3 \(CHUP-014\): bqml_to_suvbw_factor is 0.0007, but weight and dose \(70 kg, .* Bq\) give 0.0005",
            id="contradiction",
        ),
        pytest.param([f"CHUP-014,GML,70,,,{DOSE},"], "units are GML: the PET is in SUV already", id="suv_already"),
        pytest.param([f"CHUP-014,CNTS,70,,,{DOSE},"], "units are CNTS; only BQML can be converted", id="counts"),
        pytest.param([f"CHUP-014,,70,,,{DOSE},"], "units are missing; only BQML", id="no_units"),
        pytest.param(["CHUP-014,BQML,70,,,,"], "neither bqml_to_suvbw_factor nor patient_weight_kg and", id="nothing"),
        pytest.param(
            [f"CHUP-014,BQML,70000,,,{DOSE},"],
            "patient_weight_kg is '70000'; expected a number between 2 and 500",
            id="weight_in_grams",
        ),
        pytest.param(
            ["CHUP-014,BQML,70,,,140,"], r"dose_for_suv_bq is '140'; expected a number between", id="dose_in_MBq"
        ),
        pytest.param(["CHUP-014,BQML,,,,,-0.0005"], "factor is '-0.0005'; expected a number above 0", id="negative"),
        pytest.param(["CHUP-014,BQML,,,,,nan"], "factor is 'nan'; expected a number above 0", id="not_a_number"),
        pytest.param(["CHUP-014,BQML"], "neither bqml_to_suvbw_factor nor", id="short_row"),
    ],
)
def test_what_cannot_be_a_factor_is_told(tmp_path, rows, message):
    with pytest.raises(CohortError, match=message):
        read_suv_factor(table(tmp_path, *rows), "CHUP-014")


def test_another_table_is_told(tmp_path):
    with pytest.raises(
        CohortError, match=r"has the columns pid, units, bqml_to_suvbw_factor, .*; it has PatientID, Age"
    ):
        read_suv_factor(table(tmp_path, titles="PatientID,Age"), "MDA-001")
    (tmp_path / "empty.csv").write_text("")
    with pytest.raises(CohortError, match="has the columns pid"):
        read_suv_factor(tmp_path / "empty.csv", "MDA-001")
    with pytest.raises(CohortError, match=r"no\.csv"):
        read_suv_factor(tmp_path / "no.csv", "MDA-001")


def write(path: Path, highest: float) -> Path:
    values = np.linspace(0, highest, 64).reshape(4, 4, 4)
    nib.Nifti1Image(values.astype(np.float32), np.diag([4.0, 4.0, 4.0, 1.0])).to_filename(path)
    return path


def test_a_scan_is_read_as_suv(tmp_path):
    scan = ActivityScan(write(tmp_path / "a__PT.nii.gz", 30_000.0), 0.0005)
    ct = write(tmp_path / "a__CT.nii.gz", 1000.0)
    loaded = LoadScansd()({"patient_id": "a", "ct": str(ct), "pet": scan})
    assert float(loaded["pet"].max()) == pytest.approx(15.0)
    assert loaded["pet"].dtype == loaded["ct"].dtype and loaded["pet"].shape == (1, 4, 4, 4)
    np.testing.assert_allclose(loaded["pet"].affine, np.diag([4.0, 4.0, 4.0, 1.0]))


@pytest.mark.parametrize(("highest", "refused"), [(14.4, True), (200.0, True), (5000.0, False), (0.0, False)])
def test_values_that_are_suv_already_are_told(tmp_path, highest, refused):
    scan = ActivityScan(write(tmp_path / "a__PT.nii.gz", highest), 0.0005)
    if not refused:
        assert scan.read()[0].max() == pytest.approx(highest * 0.0005)
        return
    with pytest.raises(ImageReadError, match=r"highest value is .* would be SUV .*is the PET in SUV already"):
        scan.read()
