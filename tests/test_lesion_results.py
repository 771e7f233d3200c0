"""One patient with a primary and three nodes: JSON, CSV, SEG, RTSTRUCT and SR say the same of every lesion."""

from __future__ import annotations

import csv
import json
from types import SimpleNamespace

import highdicom as hd
import numpy as np
import pydicom
import pytest
import torch
from dicom_study import write_series
from monai.data import MetaTensor
from test_rtstruct import ball, rasterised

from scripts import keys
from scripts.dicom.choice import choose_pet_ct
from scripts.dicom.series import find_series, read_headers, read_series
from scripts.dicom.sr import MEASUREMENTS
from scripts.dicom.suv import suv_of
from scripts.imaging.lesions import APART, MERGED
from scripts.prediction.dicom_results import RTSTRUCT_FILE, SEG_FILE, SR_FILE, write_dicom_results
from scripts.prediction.measures import OF_LESION, TOTALS, MeasureTumourd
from scripts.prediction.outputs import PredictionWriter

BALLS = [
    ((12, 14, 8), 6, 1),
    ((26, 12, 8), 4, 2),
    ((28, 30, 18), 5, 2),
    ((10, 30, 20), 3.3, 2),
]  # centre, radius, class
SMALL = ((34, 36, 27), 1, 1)  # too small for a lesion
NAMES = {MERGED: ["GTV_01", "GTV_02", "GTV_03", "GTV_04"], APART: ["GTVp", "GTVn_01", "GTVn_02", "GTVn_03"]}


@pytest.fixture(scope="module", params=[MERGED, APART], ids=["merged", "apart"])
def patient(request, tmp_path_factory) -> SimpleNamespace:
    """What was written of a patient."""
    folder = tmp_path_factory.mktemp("patient")
    write_series(folder / "in" / "ct", shape=(40, 38), depths=np.arange(30) * 2.0)
    pet = {"SeriesNumber": 2, "PixelSpacing": [4, 4]}
    write_series(folder / "in" / "pet", "PT", uid="1.2.3.4.4", shape=(26, 20), depths=np.arange(20) * 3.0, tags=pet)
    choice = choose_pet_ct(find_series(folder / "in"))
    mask = np.zeros(choice.ct.grid.shape, np.uint8)
    for centre, radius, value in (*BALLS, SMALL):
        mask[ball(mask.shape, centre, (radius, radius * 0.8, radius))] = value if request.param == APART else 1
    values, affine = read_series(choice.pet)
    scans = {
        keys.PRED: MetaTensor(torch.from_numpy(mask[None]), affine=torch.from_numpy(choice.ct.grid.affine)),
        keys.PET: MetaTensor(
            torch.from_numpy(values[None] * suv_of(read_headers(choice.pet)).factor), affine=torch.from_numpy(affine)
        ),
    }
    measured = MeasureTumourd(classes=request.param)(scans)
    prediction = {
        **{"patient_id": "ID-1", "survival": None, "hpv": None, "tumour": measured[keys.MEASURES], "clinical": []},
        "clinical_model": {"survival": None, "values": [], "known": 0, "summary": ""},
        "model": {"name": "multitask", "version": "1.2.3", "sha256": "ab", "trained_on": "9 phantoms"},
        "quality": {"verdict": "ok", "forced": False, "checks": []},
        "crop": {"method": "pet_brain", "flag": ""},
        "files": {"mask": None},
    }
    case = {keys.PATIENT_ID: "ID-1", keys.CT: "ct.nii.gz", keys.DICOM: choice}
    writer = PredictionWriter(str(folder / "out"), [case], {"DICOM objects": write_dicom_results})
    writer.write_patient(
        {**measured, keys.CT_AFFINE: torch.from_numpy(choice.ct.grid.affine), keys.PREDICTION: prediction}
    )
    writer.write_table()
    assert writer.failures == writer.problems == {}
    place = folder / "out" / "ID-1"
    return SimpleNamespace(
        names=NAMES[request.param],
        json=json.loads((place / "prediction.json").read_text()),
        csv=list(csv.DictReader((folder / "out" / "lesions.csv").read_text().splitlines())),
        seg=hd.seg.segread(place / SEG_FILE),
        sr=hd.sr.srread(place / SR_FILE).content,
        rtstruct=pydicom.dcmread(place / RTSTRUCT_FILE),
        headers=read_headers(choice.ct),
        grid=choice.ct.grid,
        place=place,
    )


def said(group) -> dict[str, float]:
    """Numbers of a group of the structured report, by their keys in JSON."""
    by_code = {(name[1], how[1] if how else ""): key for key, (name, _, how, _) in MEASUREMENTS.items()}
    return {
        by_code[m.name.value, m.derivation.value if m.derivation else ""]: float(m.value)
        for m in group.get_measurements()
    }


def rounded(measured: dict, names: tuple[str, ...]) -> dict[str, float]:
    return {name: pytest.approx(round(measured[name], MEASUREMENTS[name][3])) for name in names}


def test_every_file_is_named(patient) -> None:
    files = {"dicom_seg": SEG_FILE, "dicom_rtstruct": RTSTRUCT_FILE, "dicom_sr": SR_FILE}
    assert {name: patient.json["files"][name] for name in files} == files
    assert {path.name for path in patient.place.iterdir()} == {"prediction.json", *patient.json["files"].values()}


def test_all_list_the_same_lesions(patient) -> None:
    lesions = patient.json["tumour"]["lesion_list"]
    segments = [patient.seg.get_segment_description(number) for number in patient.seg.segment_numbers]
    groups = patient.sr.get_volumetric_roi_measurement_groups()
    assert patient.json["tumour"]["lesions"] == 4
    for listed in (
        [lesion["name"] for lesion in lesions],
        [row["lesion"] for row in patient.csv],
        [segment.segment_label for segment in segments],
        [group.tracking_identifier for group in groups],
        [roi.ROIName for roi in patient.rtstruct.StructureSetROISequence],
    ):
        assert listed == patient.names
    assert [row["label"] for row in patient.csv] == [lesion["label"] for lesion in lesions]
    assert [segment.tracking_uid for segment in segments] == [group.tracking_uid for group in groups]


def test_measurements_agree(patient) -> None:
    tumour = patient.json["tumour"]
    groups = patient.sr.get_volumetric_roi_measurement_groups()
    for lesion, row, group in zip(tumour["lesion_list"], patient.csv, groups, strict=True):
        assert {name: float(row[name]) for name in OF_LESION} == {name: lesion[name] for name in OF_LESION}
        assert [float(row[f"centre_{axis}_mm"]) for axis in "xyz"] == lesion["centre_mm"]
        assert said(group) == rounded(lesion, OF_LESION)
    [whole] = patient.sr.get_image_measurement_groups()
    assert whole.tracking_identifier == "Tumour" and said(whole) == rounded(tumour, TOTALS)
    assert tumour["volume_ml"] > sum(lesion["volume_ml"] for lesion in tumour["lesion_list"]), "with the small part"
    for name, total in (("suv_max", max), ("suv_peak", max), ("mtv_ml", sum), ("tlg_g", sum)):
        assert tumour[name] == pytest.approx(total(lesion[name] for lesion in tumour["lesion_list"]))


def test_segments_and_contours_have_the_volume_and_centre_of_their_lesion(patient) -> None:
    uids = [header.SOPInstanceUID for header in patient.headers]
    frames = patient.seg.get_pixels_by_source_instance(uids, assert_missing_frames_are_empty=True)
    for number, lesion in enumerate(patient.json["tumour"]["lesion_list"]):
        segment = frames[..., number].transpose(2, 1, 0) > 0
        np.testing.assert_array_equal(rasterised(patient.rtstruct, lesion["name"], patient.headers), segment)
        assert segment.sum() * patient.grid.voxel_ml == pytest.approx(lesion["volume_ml"])
        stated = patient.rtstruct.StructureSetROISequence[number].ROIVolume
        assert float(stated) == pytest.approx(lesion["volume_ml"], rel=1e-5)
        centre = patient.grid.to_world(np.argwhere(segment).mean(axis=0))
        np.testing.assert_allclose(centre, lesion["centre_mm"])
