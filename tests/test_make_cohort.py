"""The demonstration cohort: layout, codings, determinism, plausibility of images and outcomes, folder safety."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import re
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
from lifelines.utils import concordance_index
from scipy import ndimage

import make_cohort
import phantom
from phantom import cohort as tool

SCRIPT = Path(make_cohort.__file__)
SEED = 3


@pytest.fixture(scope="module")
def cohort(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("cohort") / "made"
    make_cohort.make_cohort(str(folder), cases=8, seed=SEED, jobs=1)
    return folder


@pytest.fixture(scope="module")
def patients() -> list[phantom.Patient]:
    """Enough patients for rates; drawing them makes no image."""
    return [phantom.draw_patient(0, index) for index in range(600)]


def digest(folder: Path) -> dict[str, str]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(files)}


# --- layout and codings ------------------------------------------------------------------------------------


def test_layout_is_that_of_hecktor_2025(cohort):
    truth = pd.read_csv(cohort / "truth.csv")
    expected = {"cohort.json", "truth.csv"} | {f"HECKTOR_2025_Training_Task_{task}.csv" for task in (1, 2, 3)}
    for row in truth.itertuples():
        home = f"Task 1/{row.PatientID}"
        expected |= {f"{home}/{row.PatientID}__CT.nii.gz", f"{home}/{row.PatientID}__PT.nii.gz"}
        if row.mask_known:
            expected.add(f"{home}/{row.PatientID}.nii.gz")
    assert set(digest(cohort)) == expected
    assert all(re.fullmatch(r"(CHUM|CHUP|CHUS|MDA|HGJ|HMR|USZ)-3\d{4}", name) for name in truth["PatientID"])


@pytest.mark.parametrize(
    ("task", "labels"),
    [
        pytest.param(1, [], id="segmentation has clinical values only"),
        pytest.param(2, ["RFS", "Relapse"], id="survival adds RFS and Relapse"),
        pytest.param(3, ["HPV Status"], id="HPV adds its status"),
    ],
)
def test_csv_columns_and_codings(cohort, task, labels):
    table = pd.read_csv(cohort / f"HECKTOR_2025_Training_Task_{task}.csv")
    assert list(table.columns) == [
        "PatientID", "CenterID", "Age", "Gender", "Tobacco Consumption", "Alcohol Consumption", "Performance Status",
        "Treatment", "M-stage", *labels,
    ]  # fmt: skip
    assert len(table) == 8
    assert table["PatientID"].is_unique
    assert set(table["M-stage"]) <= {"M0", "M1", "Mx"}
    assert set(table["CenterID"]) <= {1, 2, 3, 5, 6, 7, 8}
    for column in {"Gender", "Tobacco Consumption", "Treatment", "Relapse", "HPV Status"} & set(table.columns):
        assert set(table[column].dropna()) <= {0, 1}


def test_hidden_values_are_blank_and_the_truth_is_kept():
    patient = phantom.draw_patient(SEED, 0)
    hidden = frozenset({"RFS", "HPV Status", "M-stage", "Performance Status"})
    row = tool.clinical_row(dataclasses.replace(patient, missing=hidden))
    assert [row[name] for name in ("RFS", "Relapse", "HPV Status", "Performance Status")] == [None] * 4
    assert row["M-stage"] == "Mx"
    truth = tool.truth_row(dataclasses.replace(patient, missing=hidden))
    assert (truth["rfs_days"], truth["hpv"], truth["rfs_known"]) == (patient.rfs_days, int(patient.hpv), 0)


def test_the_record_says_that_these_are_phantoms(cohort):
    record = json.loads((cohort / "cohort.json").read_text())
    assert "phantom" in record["notice"].lower()
    assert "demonstration only" in record["notice"]
    assert (record["cases"], record["seed"], record["scale"], record["complete"]) == (8, SEED, "small", True)
    assert set(pd.read_csv(cohort / "truth.csv")["note"]) == {"phantom, for software demonstration only"}


# --- images ------------------------------------------------------------------------------------------------


def test_small_images_are_small_and_of_the_right_kind(cohort):
    sizes = []
    for home in (cohort / "Task 1").iterdir():
        ct, pet = (nib.load(home / f"{home.name}__{kind}.nii.gz") for kind in ("CT", "PT"))
        assert ct.get_data_dtype() == np.int16
        hu, suv = ct.get_fdata(), pet.get_fdata()
        assert hu.min() == -1000
        assert 700 < hu.max() < 3090
        assert suv.min() == 0
        assert 5 < suv.max() < 40
        assert not np.allclose(ct.affine, pet.affine)
        np.testing.assert_allclose(ct.get_sform(), ct.get_qform(), atol=1e-4)
        mask_path = home / f"{home.name}.nii.gz"
        if mask_path.exists():
            mask = nib.load(mask_path)
            assert mask.shape == ct.shape
            np.testing.assert_array_equal(mask.affine, ct.affine)
            assert set(np.unique(np.asarray(mask.dataobj))) <= {0, 1, 2}
        sizes.append(sum(path.stat().st_size for path in home.iterdir()))
    assert np.mean(sizes) < 120_000


def test_mask_volume_is_the_stated_volume(cohort):
    truth = pd.read_csv(cohort / "truth.csv", index_col="PatientID")
    for name in truth.index[truth["mask_known"] == 1]:
        image = nib.load(cohort / "Task 1" / name / f"{name}.nii.gz")
        voxel_ml = abs(np.linalg.det(image.affine[:3, :3])) / 1000
        labels = np.asarray(image.dataobj)
        assert (labels > 0).sum() * voxel_ml == pytest.approx(truth.loc[name, "volume_ml"], rel=0.2)
        assert (labels == 2).sum() * voxel_ml == pytest.approx(truth.loc[name, "gtvn_ml"], rel=0.3, abs=1.0)


def test_tumours_take_up_more_than_their_surroundings_but_less_than_some_of_the_body(cohort):
    hotter_elsewhere = 0
    masks = sorted((cohort / "Task 1").glob("*/*[0-9].nii.gz"))
    for path in masks:
        mask, pet = nib.load(path), nib.load(path.with_name(f"{path.parent.name}__PT.nii.gz"))
        onto_pet = np.linalg.inv(mask.affine) @ pet.affine
        inside = ndimage.affine_transform(np.asarray(mask.dataobj) > 0, onto_pet, output_shape=pet.shape, order=0)
        near = ndimage.binary_dilation(inside, iterations=4) & ~ndimage.binary_dilation(inside, iterations=2)
        suv = pet.get_fdata()
        assert suv[inside].mean() > 2 * suv[near].mean()
        hotter_elsewhere += (suv[~ndimage.binary_dilation(inside, iterations=3)] > suv[inside].mean()).sum() > 50
    assert hotter_elsewhere >= len(masks) // 3


def test_brain_is_found_by_uptake():
    """The rule of the paper's authors: smoothed SUV > 3, the component with most voxels in the top third."""
    for index in range(6):
        patient = phantom.draw_patient(SEED, index)
        scan = phantom.scan_patient(patient, SEED, index, "small")
        sigma = [3.0 / size for size in scan.pet_grid.spacing_mm]
        hot, _ = ndimage.label(ndimage.gaussian_filter(scan.pet * scan.pet_slope, sigma) > 3)
        top = hot[:, :, 2 * hot.shape[2] // 3 :]
        brain = hot == np.bincount(top[top > 0]).argmax()
        assert 800 < brain.sum() * np.prod(scan.pet_grid.spacing_mm) / 1000 < 2800
        voxel = np.append(np.argwhere(brain).mean(axis=0), 1)
        expected = patient.pose.to_world(np.array([[0.0, -12.0, 118.0]]))[0]
        assert np.linalg.norm((scan.pet_grid.affine @ voxel)[:3] - expected) < 25


def test_ct_and_pet_show_the_same_body():
    """Where CT is far from any tissue PET is nearly cold, and the airway is open."""
    patient = phantom.draw_patient(SEED, 1)
    scan = phantom.scan_patient(patient, SEED, 1, "small")
    onto_pet = np.linalg.inv(scan.ct_grid.affine) @ scan.pet_grid.affine
    ct = ndimage.affine_transform(scan.ct.astype(float), onto_pet, output_shape=scan.pet.shape, order=1, cval=-1000)
    suv = scan.pet * scan.pet_slope
    head = ndimage.binary_erosion(ct > -200, iterations=2)
    assert suv[ndimage.binary_erosion(ct < -900, iterations=2)].mean() < 0.1
    assert suv[head].mean() > 1
    trachea = patient.pose.to_world(np.array([[0.0, 4.0, -75.0]]))
    i, j, k = np.round(np.linalg.solve(scan.ct_grid.affine, np.append(trachea, 1))[:3]).astype(int)
    assert scan.ct[i, j, k] < -400


@pytest.mark.parametrize("centre", phantom.CENTRES, ids=lambda centre: centre.name)
def test_full_grids_lie_in_the_published_ranges_and_hold_the_head(centre):
    patient = dataclasses.replace(phantom.draw_patient(SEED, 0), centre=centre)
    ct, pet = phantom.scan_grids(patient, np.random.default_rng(1), "full")
    assert 0.49 <= ct.spacing_mm[0] <= 2.73
    assert 2 <= ct.spacing_mm[2] <= 3.27
    assert 0.98 <= pet.spacing_mm[0] <= 5.47
    for grid in (ct, pet):
        corners = [np.array([0, 0, 0, 1]), np.append(np.array(grid.shape) - 1, 1)]
        low, high = np.sort([(grid.affine @ corner)[:3] for corner in corners], axis=0)
        tumour = patient.pose.to_world(np.array([lesion.centre for lesion in patient.lesions]))
        assert (tumour > low).all()
        assert (tumour < high).all()


def test_a_full_scan_shows_the_same_patient():
    index = next(k for k in range(60) if phantom.draw_patient(SEED, k).centre.name == "USZ")  # its matrix is small
    patient = phantom.draw_patient(SEED, index)
    grid, _ = phantom.scan_grids(patient, np.random.default_rng(0), "full")
    mask = phantom.paint_mask(patient, grid, oversample=1)
    volume_ml = (mask > 0).sum() * np.prod(grid.spacing_mm) / 1000
    assert volume_ml == pytest.approx(patient.gtvp_ml + patient.gtvn_ml, rel=0.05)


def test_finer_grid_has_the_same_field_of_view():
    grid = phantom.Grid((4, 5, 6), (2.0, 3.0, 4.0), (10.0, 20.0, -30.0))
    fine = grid.finer(2)
    for corner in ((-0.5, -0.5, -0.5), (3.5, 4.5, 5.5)):
        there = [2 * (value + 0.5) - 0.5 for value in corner]
        np.testing.assert_allclose(fine.affine @ [*there, 1], grid.affine @ [*corner, 1])


# --- patients and outcomes ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rate", "expected", "tolerance"),
    [
        pytest.param(lambda p: "mask" in p.missing, 0.12, 0.03, id="mask missing"),
        pytest.param(lambda p: "HPV Status" in p.missing, 0.24, 0.03, id="HPV missing"),
        pytest.param(lambda p: "RFS" in p.missing, 0.07, 0.02, id="RFS missing"),
        pytest.param(lambda p: "Performance Status" in p.missing, 0.40, 0.03, id="performance status missing"),
        pytest.param(lambda p: "Alcohol Consumption" in p.missing, 0.34, 0.03, id="alcohol missing"),
        pytest.param(lambda p: "Tobacco Consumption" in p.missing, 0.33, 0.03, id="tobacco missing"),
        pytest.param(lambda p: "Treatment" in p.missing, 0.02, 0.02, id="treatment missing"),
        pytest.param(lambda p: p.hpv, 0.65, 0.05, id="HPV positive"),
        pytest.param(lambda p: p.relapse, 0.225, 0.045, id="relapses"),
        pytest.param(lambda p: p.gtvp_ml == 0, 0.03, 0.015, id="unknown primary"),
        pytest.param(lambda p: p.gtvn_ml == 0, 0.2, 0.05, id="no nodes"),
        pytest.param(lambda p: p.gtvn_ml > 100, 0.03, 0.02, id="bulky nodes"),
        pytest.param(lambda p: overlap(p.lesions), 0.15, 0.07, id="matted nodes"),
        pytest.param(lambda p: any(lesion.core > 0.7 for lesion in p.lesions), 0.3, 0.12, id="thin rim of a core"),
        pytest.param(lambda p: bool(p.fillings), 0.4, 0.06, id="fillings"),
        pytest.param(lambda p: p.body["arms_up"], 0.1, 0.03, id="arms up"),
        pytest.param(lambda p: p.body["brown_fat_left"] > 0, 0.05, 0.03, id="brown fat"),
        pytest.param(lambda p: p.body["injection"] > 0, 0.25, 0.05, id="injection site"),
    ],
)
def test_rates(patients, rate, expected, tolerance):
    assert np.mean([rate(patient) for patient in patients]) == pytest.approx(expected, abs=tolerance)


def test_missing_values_depend_on_the_centre(patients):
    by_centre = {
        name: np.mean(["Tobacco Consumption" in p.missing for p in patients if p.centre.name == name])
        for name in ("MDA", "CHUS")
    }
    assert by_centre["CHUS"] > 3 * by_centre["MDA"]


def test_patients_are_in_range(patients):
    assert all(7 <= p.rfs_days <= 5888 and 0 <= p.performance_status <= 4 and 34 <= p.age <= 89 for p in patients)
    nodes = [sum(lesion.label == 2 for lesion in p.lesions) for p in patients]
    assert (min(nodes), max(nodes)) == (0, 9)
    assert all(len(p.lesions) >= 1 for p in patients)
    assert {p.centre.name for p in patients} == {centre.name for centre in phantom.CENTRES}


def test_hpv_shows_in_the_tumours(patients):
    """Positive: smaller primary, more and more cystic nodes, less uptake; but no single value tells them apart."""
    positive = [p for p in patients if p.hpv]
    negative = [p for p in patients if not p.hpv]
    for value, higher, lower in (
        (lambda p: p.gtvp_ml, negative, positive),
        (lambda p: p.suv_mean, negative, positive),
        (lambda p: p.gtvn_ml, positive, negative),
        (lambda p: sum(lesion.core > 0 for lesion in p.lesions if lesion.label == 2), positive, negative),
    ):
        high, low = np.array([value(p) for p in higher]), np.array([value(p) for p in lower])
        better = (high[:, None] > low).mean() + (high[:, None] == low).mean() / 2
        assert 0.6 < better < 0.92


def test_log_hazard_by_hand():
    value = phantom.log_hazard(50.0, 10.0, hpv=False, performance_status=2, m1=True)
    assert value == pytest.approx(1.3 * math.log(2) + 0.12 * 2 + 0.9 + 0.5 * 2 + 1.2)


def test_stated_hazard_orders_relapses(patients):
    times = np.array([p.rfs_days for p in patients])
    relapse = np.array([p.relapse for p in patients])
    hazard = np.array([p.log_hazard for p in patients])
    assert 0.76 < concordance_index(times, -hazard, relapse) < 0.86
    volume = np.array([p.gtvp_ml + p.gtvn_ml for p in patients])
    assert 0.65 < concordance_index(times, -volume, relapse) < 0.8


def test_summary_counts_only_what_is_known(patients):
    summary = tool.summarise(patients[:100])
    known = [p for p in patients[:100] if "RFS" not in p.missing]
    assert summary["with_rfs"] == len(known)
    assert summary["relapses"] == sum(p.relapse for p in known)
    truth = np.array([(p.rfs_days, -p.log_hazard, p.relapse) for p in known]).T
    assert summary["oracle_c_index"] == round(concordance_index(*truth), 4)
    low, high = summary["oracle_c_index_interval"]
    assert low < summary["oracle_c_index"] < high


def test_oracle_is_none_where_no_pair_can_be_compared(patients):
    """Also where nobody has survival."""
    relapsed = next(patient for patient in patients if patient.relapse and "RFS" not in patient.missing)
    for few in ([], [relapsed]):
        summary = tool.summarise(few)
        assert (summary["oracle_c_index"], summary["oracle_c_index_interval"]) == (None, None)
        assert summary["with_rfs"] == len(few)


# --- determinism, continuing, refusing ---------------------------------------------------------------------


def test_same_seed_same_bytes_with_processes(cohort, tmp_path):
    """Through the command line, with two processes."""
    command = [sys.executable, SCRIPT, "--out", tmp_path / "b", "--cases", "8", "--seed", str(SEED), "--jobs", "2"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert digest(tmp_path / "b") == digest(cohort)
    assert "Oracle's C-index" in done.stdout


def test_a_case_does_not_depend_on_how_many_there_are(cohort, tmp_path):
    make_cohort.make_cohort(str(tmp_path), cases=2, seed=SEED, jobs=1)
    whole = digest(cohort)
    images = {name: value for name, value in digest(tmp_path).items() if name.startswith("Task 1")}
    assert len(images) >= 4
    assert images.items() <= whole.items()


def test_other_seeds_give_other_patients():
    one, other = (phantom.draw_patient(seed, 0) for seed in (0, 1))
    assert one.log_hazard != other.log_hazard
    ids = [{phantom.draw_patient(seed, k).patient_id for k in range(100)} for seed in (0, 1)]
    assert not ids[0] & ids[1], "nobody may take a phantom for one of another cohort"


def test_interrupted_cohort_is_continued(cohort, tmp_path, monkeypatch):
    made: list[int] = []
    write = tool.write_case

    def stop_at_third(folder: Path, seed: int, index: int, scale: str) -> None:
        if len(made) == 2:
            raise KeyboardInterrupt
        made.append(index)
        write(folder, seed, index, scale)

    monkeypatch.setattr(tool, "write_case", stop_at_third)
    with pytest.raises(KeyboardInterrupt):
        make_cohort.make_cohort(str(tmp_path), cases=8, seed=SEED, jobs=1)
    assert not list(tmp_path.glob("*.csv"))
    monkeypatch.setattr(tool, "write_case", lambda *args: (made.append(args[2]), write(*args)))
    make_cohort.make_cohort(str(tmp_path), cases=8, seed=SEED, jobs=1)
    assert made == list(range(8))
    assert digest(tmp_path) == digest(cohort)


def test_whole_cohort_is_left_alone(cohort, capsys):
    before = {path: path.stat().st_mtime_ns for path in cohort.rglob("*")}
    make_cohort.make_cohort(str(cohort), cases=8, seed=SEED, jobs=1)
    assert "complete already" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in cohort.rglob("*")} == before


@pytest.mark.parametrize(
    ("content", "arguments", "message"),
    [
        pytest.param({"notes.txt": "x"}, {}, "holds no phantom cohort", id="somebody's folder"),
        pytest.param({"cohort.json": "{}"}, {}, "not the record of a phantom cohort", id="another cohort.json"),
        pytest.param({"cohort.json": "{"}, {}, "not the record of a phantom cohort", id="broken cohort.json"),
        pytest.param({}, {"cases": 0}, "--cases 0", id="no cases"),
        pytest.param({}, {"cases": 2.5}, "--cases 2.5", id="half a case"),
        pytest.param({}, {"seed": -1}, "--seed -1", id="negative seed"),
        pytest.param({}, {"jobs": -2}, "--jobs -2", id="negative jobs"),
        pytest.param({}, {"scale": "tiny"}, "small, full", id="unknown scale"),
    ],
)
def test_refusals_leave_the_folder_as_it_was(tmp_path, content, arguments, message):
    for name, text in content.items():
        (tmp_path / name).write_text(text)
    before = digest(tmp_path)
    with pytest.raises(tool.MakeCohortError, match=message):
        make_cohort.make_cohort(str(tmp_path), **{"cases": 2, "seed": 0, **arguments})
    assert digest(tmp_path) == before


def test_another_cohort_is_refused_by_name(cohort):
    with pytest.raises(tool.MakeCohortError, match="cases 8 there, 9 asked; seed 3 there, 4 asked"):
        make_cohort.make_cohort(str(cohort), cases=9, seed=4, jobs=1)


def test_out_may_not_be_a_file(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(tool.MakeCohortError, match="is a file"):
        make_cohort.make_cohort(str(tmp_path / "file"), cases=1)


def test_command_line_failure_is_one_line_and_non_zero(tmp_path):
    (tmp_path / "notes.txt").write_text("x")
    done = subprocess.run([sys.executable, SCRIPT, "--out", tmp_path], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("make_cohort: ")
    assert len(done.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("scale", "view", "message"),
    [
        pytest.param("huge", "hospital", "unknown scale 'huge'", id="scale"),
        pytest.param("small", "feet", "unknown view 'feet': give one of hospital, neck", id="view"),
    ],
)
def test_an_unknown_scale_or_view_is_refused_by_the_phantom_too(scale, view, message):
    with pytest.raises(ValueError, match=message):
        phantom.scan_patient(phantom.draw_patient(0, 0), 0, 0, scale, view)


# --- the population's range ---------------------------------------------------------------------------------


def of_kind(patients: list[phantom.Patient], label: int) -> np.ndarray:
    return np.round([2 * lesion.radius_mm for p in patients for lesion in p.lesions if lesion.label == label], 6)


@pytest.mark.parametrize(
    ("values", "low", "high"),
    [
        pytest.param(lambda patients: of_kind(patients, 1), (10, 12), (65, 70), id="primaries, mm"),
        pytest.param(lambda patients: of_kind(patients, 2), (8, 9), (55, 65), id="nodes, mm"),
        pytest.param(lambda patients: [p.gtvn_ml for p in patients], (0, 0), (170, 240), id="all nodes, ml"),
        pytest.param(lambda patients: [p.suv_max for p in patients], (2.5, 4.5), (30, 38), id="SUVmax"),
        pytest.param(lambda patients: [p.body["brain"] for p in patients], (5, 5.5), (14, 15), id="brain"),
        pytest.param(lambda patients: [p.scanner.psf_fwhm_mm for p in patients], (4, 4.8), (8, 9), id="PSF, mm"),
        pytest.param(lambda patients: [p.body["contrast_hu"] for p in patients], (0, 0), (150, 180), id="contrast"),
    ],
)
def test_the_population_reaches_from_small_to_large(patients, values, low, high):
    found = values(patients)
    assert low[0] <= min(found) <= low[1]
    assert high[0] <= max(found) <= high[1]


def overlap(lesions: tuple[phantom.Lesion, ...]) -> bool:
    """Whether two nodes of a patient are one mass."""
    nodes = [lesion for lesion in lesions if lesion.label == 2]
    pairs = ((one, other) for k, one in enumerate(nodes) for other in nodes[:k])
    return any(math.dist(a.centre, b.centre) < 0.9 * (a.radius_mm + b.radius_mm) for a, b in pairs)


def test_matted_nodes_are_one_component_and_counted_once(patients):
    """Their union is smaller than their sum, and is what the mask shows."""
    index = next(k for k, p in enumerate(patients) if len(p.lesions) == 3 and overlap(p.lesions))
    patient = patients[index]
    grid = phantom.Grid(
        (120, 120, 120), (2.0, 2.0, 2.0), tuple(patient.pose.to_world(np.array([[0, 0, 0]]))[0] + [119, 119, -119])
    )
    mask = phantom.paint_mask(patient, grid, oversample=1) == 2
    assert ndimage.label(mask)[1] == 1
    assert mask.sum() * 0.008 == pytest.approx(patient.gtvn_ml, rel=0.05)
    assert patient.gtvn_ml < sum(
        phantom.measure_lesions((one,), patient.pose)["gtvn_ml"] for one in patient.lesions[1:]
    )


@pytest.mark.parametrize("diameter_mm", [3.0, 8.0, 10.0])
def test_no_lesion_is_lost_at_coarse_voxels(patients, diameter_mm):
    """A primary far smaller than a voxel is in the mask all the same: nobody is taken for a patient without one."""
    patient = patients[0]
    tiny = dataclasses.replace(patient.lesions[0], semi=(diameter_mm / 2,) * 3)
    assert tiny.label == 1
    for shift in np.linspace(0, 6, 7):
        moved = dataclasses.replace(tiny, centre=(tiny.centre[0] + shift, *tiny.centre[1:]))
        small = dataclasses.replace(patient, lesions=(moved,))
        grid, _ = phantom.scan_grids(small, np.random.default_rng(0), "small")
        mask = phantom.paint_mask(small, grid, oversample=2)
        assert 1 <= (mask == 1).sum() <= 8
        assert (
            np.linalg.norm(
                (grid.affine @ [*np.argwhere(mask.T == 1).mean(axis=0), 1])[:3]
                - small.pose.to_world(np.array([moved.centre]))[0]
            )
            < 6.5
        )


@pytest.mark.parametrize("scale", ["small", "full"])
def test_a_neck_alone(patients, scale):
    """No brain in view, a PET of 0.7 m of which the body fills little, and noise in the air around it."""
    index = next(k for k, p in enumerate(patients) if p.centre.name == "MDA" and p.scanner.air_suv > 0.01)
    patient = patients[index]
    scan = phantom.scan_patient(patient, 0, index, scale, view="neck")
    assert np.array(scan.pet_grid.shape)[:2] * scan.pet_grid.spacing_mm[:2] == pytest.approx(700, abs=7)
    assert 150 < scan.pet_grid.shape[2] * scan.pet_grid.spacing_mm[2] < 200
    suv = scan.pet * scan.pet_slope
    assert (suv > 0.3).mean() < 0.15
    if scale == "full":
        assert 0.5 < suv[:15, :15].mean() / patient.scanner.air_suv < 3
    brain = np.linalg.solve(scan.pet_grid.affine, np.append(patient.pose.to_world(np.array([[0.0, -8.0, 80.0]]))[0], 1))
    assert brain[2] > scan.pet_grid.shape[2]


def test_a_cohort_of_an_earlier_version_is_refused(cohort, tmp_path):
    record = json.loads((cohort / "cohort.json").read_text())
    (tmp_path / "cohort.json").write_text(json.dumps({**record, "phantom_version": 1}))
    with pytest.raises(tool.MakeCohortError, match="phantom_version 1 there, 2 asked"):
        make_cohort.make_cohort(str(tmp_path), cases=8, seed=SEED, jobs=1)
