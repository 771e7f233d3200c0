"""DICOM: series found and chosen, volumes against SimpleITK, SUV by hand, SEG and SR read back."""

import io
import itertools
import logging
import math
import os
import re
import shutil
import subprocess
import sys
from datetime import datetime, timedelta
from pathlib import Path

import highdicom as hd
import nibabel as nib
import numpy as np
import pydicom
import pytest
import SimpleITK as sitk
from dicom_study import AXIAL, SECRETS, dciodvfy_errors, pet_header, pet_tags, write_mask, write_series
from pydicom.dataset import Dataset
from pydicom.sr.codedict import codes
from pydicom.sr.coding import Code
from pydicom.uid import JPEGLSLossless, RLELossless

from scripts.dicom.choice import choose_pet_ct, studies_of
from scripts.dicom.examinations import find_examinations
from scripts.dicom.rtstruct import write_rtstruct
from scripts.dicom.seg import Model, write_seg
from scripts.dicom.series import find_series, read_headers, read_series
from scripts.dicom.sr import MEASUREMENTS, PRIVATE_CODES, Findings, write_sr
from scripts.dicom.suv import suv_of
from scripts.dicom.tags import DicomError
from scripts.imaging.lesions import APART, Lesion, find_lesions

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
MODEL = Model("multitask", "1.2.3", "maintainers", "sha256:0123456789abcdef", "9 phantoms")

# --- helpers -----------------------------------------------------------------------------------------------------


def only(folder):
    found = find_series(folder)
    assert len(found) == 1, found
    return found[0]


def pair(folder):
    """A PET/CT of one frame of reference; returns the choice."""
    write_series(folder / "ct", shape=(16, 12), depths=np.arange(30) * 2.0)
    pet = {"SeriesNumber": 2, "PixelSpacing": [5, 5]}
    write_series(folder / "pet", "PT", uid="1.2.3.4.4", depths=np.arange(20) * 3.0, tags=pet)
    return choose_pet_ct(find_series(folder))


def assert_anonymous(text):
    assert not [secret for secret in SECRETS if secret in text], text


# --- volumes -------------------------------------------------------------------------------------------------------

TURN = math.radians(20)
ORIENTATIONS = [
    pytest.param(AXIAL, id="axial"),
    pytest.param((-1, 0, 0, 0, -1, 0), id="prone"),
    pytest.param((1, 0, 0, 0, -1, 0), id="normal_to_the_feet"),
    pytest.param((math.cos(TURN), 0, math.sin(TURN), 0, 1, 0), id="oblique"),
    pytest.param((0, 1, 0, 0, 0, -1), id="sagittal"),
]


@pytest.mark.parametrize("axes", ORIENTATIONS)
def test_volume_and_affine_equal_simpleitk(tmp_path, axes):
    write_series(tmp_path, tags={"ImageOrientationPatient": list(axes), "RescaleIntercept": -24})
    array, affine = read_series(only(tmp_path))
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(tmp_path)))
    image = reader.Execute()
    assert array.dtype == np.int16
    np.testing.assert_array_equal(array, sitk.GetArrayFromImage(image).T)
    for index in [(0, 0, 0), (4, 0, 0), (0, 5, 0), (0, 0, 11)]:
        world = np.array(image.TransformIndexToPhysicalPoint(index)) * (-1, -1, 1)
        np.testing.assert_allclose(affine[:3, :3] @ index + affine[:3, 3], world, atol=1e-4)


def test_each_slice_has_its_own_slope(tmp_path):
    stored = write_series(
        tmp_path, "PT", tags={"dtype": np.uint16}, each=lambda k: {"RescaleSlope": 0.5 + k, "RescaleIntercept": 1}
    )
    array, _ = read_series(only(tmp_path))
    assert array.dtype == np.float32
    slopes = 0.5 + np.arange(12)
    np.testing.assert_allclose(array.transpose(2, 1, 0), stored * slopes[:, None, None] + 1, rtol=1e-6)


@pytest.mark.parametrize(
    "tags, dtype",
    [
        pytest.param({"dtype": np.uint16, "RescaleIntercept": -1024}, np.int16, id="unsigned_stays_whole"),
        pytest.param({"RescaleIntercept": 0.5}, np.float32, id="broken_intercept"),
        pytest.param({"RescaleSlope": 2}, np.float32, id="slope"),
        pytest.param({"RescaleIntercept": 32000}, np.float32, id="beyond_int16"),
        pytest.param({"RescaleSlope": None, "RescaleIntercept": None}, np.int16, id="no_rescale"),
    ],
)
def test_ct_values(tmp_path, tags, dtype):
    stored = write_series(tmp_path, tags=tags)
    array, _ = read_series(only(tmp_path))
    assert array.dtype == dtype
    expected = stored.astype(float) * (tags.get("RescaleSlope", 1) or 1) + (tags.get("RescaleIntercept", 0) or 0)
    np.testing.assert_array_equal(array.transpose(2, 1, 0), expected)


def test_one_slice_with_another_slope_makes_the_whole_ct_float(tmp_path):
    stored = write_series(tmp_path, each=lambda k: {"RescaleSlope": 0.5 if k == 7 else 1})
    array, _ = read_series(only(tmp_path))
    scale = np.where(np.arange(12) == 7, 0.5, 1)[:, None, None]
    np.testing.assert_array_equal(array.transpose(2, 1, 0), stored * scale)


@pytest.mark.parametrize("syntax", [RLELossless, JPEGLSLossless], ids=["rle", "jpeg_ls"])
def test_compressed_slices(tmp_path, syntax):
    stored = write_series(tmp_path, syntax=syntax)
    np.testing.assert_array_equal(read_series(only(tmp_path))[0].transpose(2, 1, 0), stored)


def test_transfer_syntax_without_decoder(tmp_path):
    write_series(tmp_path)
    path = tmp_path / "IM0003"
    dataset = pydicom.dcmread(path)
    dataset.file_meta.TransferSyntaxUID = "1.2.840.10008.1.2.4.100"  # a film, which nothing decodes as slices
    dataset.PixelData = pydicom.encaps.encapsulate([b"\0\0"])
    dataset["PixelData"].VR = "OB"
    dataset.save_as(path)
    with pytest.raises(DicomError, match=r"IM0003: no decoder for transfer syntax MPEG2.*pip install"):
        read_series(only(tmp_path))


def test_damaged_compressed_slice(tmp_path):
    write_series(tmp_path, syntax=RLELossless)
    path = tmp_path / "IM0004"
    dataset = pydicom.dcmread(path)
    dataset.PixelData = pydicom.encaps.encapsulate([b"\1" * 70])
    dataset.save_as(path)
    with pytest.raises(DicomError, match=r"IM0004: pixel data cannot be decoded .*copy"):
        read_series(only(tmp_path))


def test_cut_off_file(tmp_path):
    write_series(tmp_path, shape=(40, 40))
    path = tmp_path / "IM0005"
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(DicomError, match=r"IM0005: .*copy"):
        read_series(only(tmp_path))


def _without(*gone):
    return [3.0 * k for k in range(12) if k not in gone]


def _shifted(amount):
    return lambda k, position: position + np.array([0, amount * k, 0])


def _bodies(*heights):
    """Slices (N, 6, 5) of smooth bodies, in turn, each with its own values."""
    return np.stack([np.full((6, 5), 100 * k // len(heights) * len(heights) + h) for k in range(6) for h in heights])


@pytest.mark.parametrize(
    "series, message",
    [
        pytest.param({"depths": _without(5)}, r"1 between 112.00 and 118.00 mm \(after slice 5\)", id="missing"),
        pytest.param(
            {"depths": _without(1, 6, 7)},
            r"1 between 100.00 and 106.00 mm \(after slice 1\); 2 between 115.00 and 124.00 mm \(after slice 5\)",
            id="two_gaps",
        ),
        pytest.param({"depths": [0, 3, 6, 6, 9, 12, 15]}, r"more than one image.*106.00 mm \(slice 3\)", id="doubled"),
        pytest.param(
            {"depths": [*range(0, 30, 3), *range(30, 61, 6)]},
            r"slice spacing changes: 3.00 mm from 100.00 to 130.00 mm, 6.00 mm from 130.00 to 160.00 mm\. A volume",
            id="spacing_doubles",
        ),
        pytest.param(
            {"depths": [*range(0, 20, 5), *range(20, 40, 2), *range(40, 61, 5)]},
            r"changes: 5.00 mm from 100.00 to 120.00 mm, 2.00 mm from 120.00 to 140.00 mm, 5.00 mm from 140.00 to 160",
            id="finer_in_the_middle",
        ),
        pytest.param(
            {"depths": [*range(0, 30, 3), *range(30, 51, 4)]}, "3.00 mm from .* 4.00 mm from", id="by_a_third"
        ),
        pytest.param({"depths": [0, 3, 6, 10, 13, 16, 19, 22]}, "unevenly spaced, 3.00 to 4.00 mm", id="uneven"),
        pytest.param({"edit": _shifted(-0.8)}, "stacked at 14.9 degrees.*tilted gantry", id="tilted_gantry"),
        pytest.param(
            {"edit": lambda k, p: p + (np.array([2.0, 0, 0]) if k == 4 else 0)}, "slice 5 is shifted", id="sideways"
        ),
        pytest.param({"depths": [0]}, "one slice is not a volume", id="one_slice"),
        pytest.param(
            {"modality": "PT", "tags": {"NumberOfSlices": 14}}, r"\(0054,0081\) says 14, 12 found", id="end_missing"
        ),
        pytest.param({"stored": _bodies(0, 900).astype(np.int16)}, "of two scans or patients in turn", id="in_turn"),
        pytest.param(
            {"stored": _bodies(0, 900).astype(np.int16), "modality": "PT"}, "two scans or patients", id="pets_in_turn"
        ),
        pytest.param(
            {"each": lambda k: {"RescaleIntercept": None if k == 4 else -1024}},
            r"Rescale Intercept \(0028,1052\) is missing or empty in some slices",
            id="an_intercept_missing",
        ),
        pytest.param(
            {"each": lambda k: {"RescaleSlope": "" if k == 4 else 1}},
            r"Rescale Slope \(0028,1053\) is missing or empty in some slices",
            id="a_slope_missing",
        ),
        pytest.param(
            {"each": lambda k: {"RescaleIntercept": 0 if k == 4 else -1024}},
            r"slices of one Rescale Slope \(0028,1053\) differ in Rescale Intercept",
            id="another_intercept",
        ),
        pytest.param({"tags": {"PixelSpacing": None}}, r"\(0028,0030\)", id="no_spacing"),
        pytest.param({"tags": {"PixelSpacing": [980, 980]}}, "no scan of a body.*in mm", id="spacing_in_micrometres"),
    ],
)
def test_stacks_that_are_refused(tmp_path, series, message):
    write_series(tmp_path, **{"origin": (-20, -30, 100), **series})
    with pytest.raises(DicomError, match=message) as error:
        read_series(only(tmp_path))
    assert_anonymous(str(error.value))


def test_positions_rounded_to_a_tenth_are_accepted(tmp_path):
    write_series(tmp_path, depths=np.round(np.arange(40) * 0.625, 1))
    _, affine = read_series(only(tmp_path))
    assert affine[2, 2] == pytest.approx(0.625, abs=0.003)


# --- finding ---------------------------------------------------------------------------------------------------------


def test_any_nesting_and_other_files(tmp_path):
    write_series(tmp_path / "a" / "b", depths=_without(*range(0, 12, 2)))
    write_series(tmp_path / "c", depths=_without(*range(1, 12, 2)), seed=1)  # the other half of the same series
    write_series(tmp_path / "a", "PT", uid="1.2.3.4.9", tags={"SeriesNumber": 5})
    (tmp_path / "DICOMDIR.txt").write_text("not an image")
    (tmp_path / "a" / "empty.log").touch()
    found = find_series(tmp_path)
    assert [(s.modality, len(s), s.number) for s in found] == [("CT", 12, 1), ("PT", 12, 5)]
    assert found.account == "26 files: 24 in 2 DICOM series, 2 not DICOM (.txt 1, .log 1)"
    assert np.all(np.diff(found[0].positions[:, 2]) == 3)


def test_a_file_cut_off_in_its_header_is_told_by_the_series_beside_it(tmp_path):
    pair(tmp_path)
    path = tmp_path / "pet" / "IM0000"
    path.write_bytes(path.read_bytes()[:700])
    found = find_series(tmp_path)
    assert [bool(series.damaged) for series in found] == [False, True]
    assert [d.path.name for d in found.damaged] == ["IM0000"]
    with pytest.raises(DicomError, match=r"a damaged file may be a slice of it: IM0000: not a complete.*copy it again"):
        choose_pet_ct(found)


P1, P2, BOTH = {("P1", "PT")}, {("P2", "PT")}, {("P1", "CT"), ("P1", "PT"), ("P2", "CT"), ("P2", "PT")}


@pytest.mark.parametrize(
    ("last", "damaged"),
    [
        # everything of two patients lies in one folder; the header of one patient's PET slice ends after this tag
        pytest.param("SeriesNumber", P1, id="series_number"),
        pytest.param("SeriesInstanceUID", P1, id="series_uid_may_be_cut_off_itself"),
        pytest.param("PatientID", P1 | P2, id="patient_id_may_be_cut_off_itself"),
        pytest.param("SOPClassUID", P1 | P2, id="sop_class"),
        pytest.param(None, P1 | P2, id="after_the_file's_own_header"),
        pytest.param(140, BOTH, id="within_the_file's_own_header"),
        pytest.param(0, BOTH, id="empty"),
    ],
)
def test_a_file_cut_off_in_its_header_costs_only_whose_it_may_be(tmp_path, last, damaged):
    flat = flat_folder(tmp_path, "{number:03d}")
    victim = next(path for path in sorted(flat.iterdir()) if is_of(path, "P1", "PT"))
    victim.write_bytes(victim.read_bytes()[: end_of(victim, last)])
    found = find_series(flat)
    assert len(found) == 4 and len(found.damaged) == 1
    assert {(s.patient_id, s.modality) for s in found if s.damaged} == damaged
    for study in studies_of(found):
        if study.patient_id in {patient for patient, _ in damaged}:
            with pytest.raises(
                DicomError, match=rf"a damaged file may be a slice of it: {victim.name}: .*copy it again"
            ):
                choose_pet_ct(study.series)
        else:
            choose_pet_ct(study.series)


@pytest.mark.parametrize(
    ("pattern", "victim", "damaged"),
    [
        pytest.param("{patient}-{modality}-{k:04d}.dcm", "P1-PT-0003.dcm", P1, id="patient_and_modality"),
        pytest.param("{patient}-{k:04d}{modality}", "P2-0011PT", P2, id="last_of_its_series"),
        pytest.param("IM-{series:04d}-{k:04d}", "IM-0002-0000", P1, id="number_of_the_series"),
        pytest.param("{patient}-{modality}-{k:04d}", "P1-PT-0031", P1, id="any_number_after_their_name"),
        pytest.param("{run:03d}", "018", P1, id="numbers_that_run_on"),
        pytest.param("{run:03d}", "023", {("P1", "PT"), ("P2", "CT")}, id="between_two_series"),
        pytest.param("{run:03d}", "900", BOTH, id="no_number_of_anybody"),
        pytest.param("{number:03d}", "000", BOTH, id="numbers_in_no_order"),
        pytest.param("{patient}-{modality}-{k:04d}", "P3-PT-0003", BOTH, id="of_nobody_here"),
    ],
)
@pytest.mark.parametrize("kind", ["empty", "zeros", "dangling"])
def test_the_name_of_a_damaged_file_points_to_its_series(tmp_path, pattern, victim, damaged, kind):
    flat = flat_folder(tmp_path, pattern)
    victim = flat / victim
    victim.unlink(missing_ok=True)
    if kind == "dangling":
        victim.symlink_to(tmp_path / "gone")
    else:
        victim.write_bytes(bytes(5000 if kind == "zeros" else 0))
    found = find_series(flat)
    assert {(s.patient_id, s.modality) for s in found if s.damaged} == damaged
    assert all(f"{victim.name}: " in s.damaged for s in found if s.damaged)


@pytest.mark.parametrize(
    ("name", "damaged"),
    [
        pytest.param("P1-PT-0005", P1, id="named_like_a_slice"),
        pytest.param("P2-PT-0012", P2, id="named_like_the_next_slice"),
        pytest.param("P2-PT-0050", set(), id="named_like_none"),
        pytest.param("a.dcm", BOTH, id="named_dcm"),
        pytest.param("notes.txt", set(), id="text"),
        pytest.param(".P1-PT-0005", set(), id="hidden"),
        pytest.param("._a.dcm", set(), id="hidden_by_macos"),
        pytest.param("Thumbs.db", set(), id="thumbnails"),
    ],
)
def test_a_file_that_is_not_dicom_is_a_slice_lost_where_its_name_says_so(tmp_path, name, damaged):
    flat = flat_folder(tmp_path, "{patient}-{modality}-{k:04d}")
    (flat / name).write_bytes(b"GIF89a" * 99)
    found = find_series(flat)
    assert {(s.patient_id, s.modality) for s in found if s.damaged} == damaged
    assert len(found.damaged) + len(found.others) == 1


def test_a_damaged_file_is_no_slice_of_a_pet_that_has_all_it_announces(tmp_path):
    flat = flat_folder(tmp_path, "{number:03d}", lambda modality: {"NumberOfSlices": 12 if modality == "PT" else None})
    (flat / "048").write_bytes(b"")
    assert {s.modality for s in find_series(flat) if s.damaged} == {"CT"}


def flat_folder(folder, pattern, tags=lambda modality: {}):
    """Two patients' CT and PET in one folder; numbers of the files run through all of them in no order."""
    numbers = iter(np.random.default_rng(3).permutation(4 * 12))
    for series, (patient, modality) in enumerate(itertools.product(("P1", "P2"), ("CT", "PT")), start=1):
        own = {"PatientID": patient, "SeriesNumber": 7, "StudyInstanceUID": f"1.2.3.{patient[1]}", **tags(modality)}
        write_series(folder / str(series), modality, uid=f"1.2.3.{patient[1]}.{series}", tags=own)
        (folder / "flat").mkdir(exist_ok=True)
        for k, path in enumerate(sorted((folder / str(series)).iterdir())):
            name = pattern.format(
                patient=patient, modality=modality, k=k, series=series, number=next(numbers), run=12 * (series - 1) + k
            )
            path.rename(folder / "flat" / name)
        (folder / str(series)).rmdir()
    return folder / "flat"


def is_of(path, patient, modality):
    header = pydicom.dcmread(path, stop_before_pixels=True)
    return (header.PatientID, header.Modality) == (patient, modality)


def end_of(path, keyword):
    """Bytes up to the end of an element; of the file's own header where there is no keyword."""
    if isinstance(keyword, int):
        return keyword
    header = pydicom.dcmread(path)
    for element in list(header):
        if keyword is None or element.tag > pydicom.datadict.tag_for_keyword(keyword):
            del header[element.tag]
    buffer = io.BytesIO()
    header.save_as(buffer)
    return len(buffer.getvalue())


def test_a_folder_with_damaged_files_alone(tmp_path):
    write_series(tmp_path, depths=[0])
    path = tmp_path / "IM0000"
    path.write_bytes(path.read_bytes()[:700])
    assert find_series(tmp_path) == []
    [examination] = find_examinations(tmp_path)
    assert examination.problem.startswith("IM0000: not a complete DICOM file")


def test_files_that_repeat_an_image_are_left_out(tmp_path):
    write_series(tmp_path / "ct")
    shutil.copytree(tmp_path / "ct", tmp_path / "again")
    series = only(tmp_path)
    assert (len(series), series.repeated) == (12, 12)
    assert "12 files repeated" in series.label


@pytest.mark.parametrize(
    "tags, shape",
    [
        pytest.param({"ImageOrientationPatient": [1, 0, 0, 0, 0, -1]}, (9, 9), id="coronal"),
        pytest.param({}, (6, 5), id="axial_at_a_slice"),
    ],
)
def test_scout_filed_with_its_scan_becomes_a_part(tmp_path, tags, shape):
    write_series(tmp_path / "ct")
    tags = {**tags, "ImageType": ["ORIGINAL", "PRIMARY", "LOCALIZER"]}
    write_series(tmp_path / "scout", depths=[0], shape=shape, tags=tags)
    assert sorted((s.part, len(s)) for s in find_series(tmp_path)) == [(1, 12), (2, 1)]


def test_folder_that_is_not_there(tmp_path):
    with pytest.raises(DicomError, match="no such folder"):
        find_series(tmp_path / "nowhere")


def test_folder_without_dicom(tmp_path):
    (tmp_path / "a.txt").touch()
    assert find_series(tmp_path) == []
    with pytest.raises(DicomError, match="no DICOM series"):
        find_examinations(tmp_path)


# --- choosing ------------------------------------------------------------------------------------------------------

CT_TAGS = {"SeriesNumber": 3, "ConvolutionKernel": "STANDARD"}
LONG = np.arange(20) * 9.0  # 180 mm, so that overlaps differ by more than a step
OTHERS = [
    pytest.param("CT", {"ImageType": ["ORIGINAL", "PRIMARY", "LOCALIZER"]}, {}, "localizer", id="scout"),
    pytest.param("CT", {"ImageType": ["DERIVED", "SECONDARY", "MIP"]}, {}, r"not slices of the body \(mip", id="mip"),
    pytest.param("CT", {"SOPClassUID": "1.2.840.10008.5.1.4.1.1.7"}, {}, "screen capture", id="secondary_capture"),
    pytest.param("CT", {"SOPClassUID": "1.2.840.10008.5.1.4.1.1.2.1"}, {}, "multi-frame", id="enhanced_ct"),
    pytest.param("CT", {"FrameOfReferenceUID": "1.2.3.4.77"}, {}, "another frame", id="second_frame_of_reference"),
    pytest.param("CT", {"FrameOfReferenceUID": None}, {}, "none stated", id="no_frame_of_reference"),
    pytest.param("CT", {}, {"depths": LONG[:5]}, "only 5 slices", id="few_slices"),
    pytest.param("CT", {}, {"depths": LONG[:9]}, "less overlap with the PET", id="shorter"),
    pytest.param("CT", {"ImageOrientationPatient": [1, 0, 0, 0, 0, -1]}, {}, "not axial", id="coronal"),
    pytest.param("CT", {"ConvolutionKernel": "LUNG"}, {}, "lung or bone kernel", id="lung_kernel"),
    pytest.param("CT", {"ImageType": ["DERIVED", "SECONDARY"]}, {}, "derived", id="derived_ct"),
    pytest.param("CT", {}, {"depths": LONG[LONG != 63]}, "slices are missing", id="ct_with_gap"),
    pytest.param("CT", {}, {"origin": (500, 500, 100)}, "another part of the body", id="elsewhere"),
    pytest.param("CT", {"SeriesNumber": 8}, {}, "lower series number", id="equal_ct"),
    pytest.param("CT", {"PixelSpacing": None}, {}, "no position", id="no_geometry"),
    pytest.param("MR", {}, {}, "modality MR", id="other_modality"),
    pytest.param("PT", {"CorrectedImage": ["DECY"]}, {}, "not attenuation corrected", id="nac_pet"),
    pytest.param("PT", {"CorrectedImage": None}, {}, "correction not stated", id="pet_of_unknown_correction"),
    pytest.param("PT", {"Units": "PROPCNTS"}, {}, "PROPCNTS", id="proportional_counts"),
    pytest.param("PT", {"SeriesType": ["DYNAMIC", "IMAGE"]}, {}, "dynamic PET", id="dynamic"),
    pytest.param("PT", {"SeriesType": ["STATIC", "REPROJECTION"]}, {}, "reprojection", id="pet_mip"),
    pytest.param("PT", {"ImageType": ["DERIVED", "PRIMARY"]}, {}, "derived", id="derived_pet"),
    pytest.param("PT", {}, {"depths": LONG[:15]}, "fewer slices", id="short_pet"),
    pytest.param("PT", {"PixelSpacing": [6, 6]}, {}, "coarser", id="coarse_pet"),
    pytest.param("PT", {"AcquisitionTime": "125000"}, {}, "scanned later", id="delayed_pet"),
    pytest.param("PT", {"AcquisitionTime": None}, {}, "at an unknown time", id="pet_without_time"),
    pytest.param(
        "PT", {"FrameOfReferenceUID": "1.2.3.4.78"}, {"depths": np.arange(25) * 9.0}, "no CT in its", id="lone_pet"
    ),
]


@pytest.fixture(scope="module")
def only_pair(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pair")
    write_series(folder / "ct", depths=LONG, tags=CT_TAGS)
    write_series(folder / "pet", "PT", uid="1.2.3.4.4", depths=LONG, tags={"SeriesNumber": 4})
    return find_series(folder)


@pytest.mark.parametrize("modality, tags, series, reason", OTHERS)
@pytest.mark.parametrize("number", [1, 9], ids=["comes_first", "comes_last"])
def test_the_other_series_is_rejected(tmp_path, only_pair, modality, tags, series, reason, number):
    other = {**(CT_TAGS if modality == "CT" else {}), "SeriesNumber": number, **tags}
    write_series(tmp_path, modality, uid="1.2.3.4.5", tags=other, **{"depths": LONG, **series})
    choice = choose_pet_ct([*only_pair, *find_series(tmp_path)])
    assert (choice.ct.number, choice.pet.number) == (3, 4)
    [(rejected, why)] = choice.rejected
    assert rejected.number == other["SeriesNumber"]
    assert re.search(reason, why), why
    assert why in choice.describe()
    assert_anonymous(choice.describe() + repr(choice) + repr(rejected))


ANOTHER = "another PET of this examination (series 9) was scanned"
LOSSY = "compressed with loss by Lossy Image Compression (0028,2110)"


@pytest.mark.parametrize(
    "modality, tags, told",
    [
        pytest.param("PT", {"AcquisitionTime": "115500"}, "", id="another_reconstruction"),
        pytest.param("PT", {"AcquisitionTime": "125000"}, f"{ANOTHER} 60 min later", id="delayed"),
        pytest.param("PT", {"AcquisitionTime": "12:50:00"}, f"{ANOTHER} 60 min later", id="old_way_of_writing_times"),
        pytest.param(
            "PT", {"AcquisitionTime": "110000", "PixelSpacing": [6, 6]}, f"{ANOTHER} 50 min earlier", id="coarser"
        ),
        pytest.param("PT", {"AcquisitionTime": None}, "", id="time_not_stated"),
        pytest.param("PT", {"AcquisitionTime": "noon"}, "", id="time_unreadable"),
        pytest.param("PT", {"AcquisitionTime": "125000", "CorrectedImage": ["DECY"]}, "", id="not_corrected"),
        pytest.param("PT", {"AcquisitionTime": "125000", "Radiopharmaceutical": "FMISO"}, "", id="another_tracer"),
        pytest.param(
            "PT",
            {"AcquisitionTime": "125000", "AcquisitionDate": "20200601"},
            f"{ANOTHER} 151 days later",
            id="another_day_and_a_ct_without_a_date",
        ),
        pytest.param("PT", {"AcquisitionTime": "125000", "FrameOfReferenceUID": "1.2.3"}, "", id="another_frame"),
        pytest.param("CT", {"AcquisitionTime": "125000"}, "", id="ct"),
    ],
)
def test_another_pet_of_the_examination_is_a_doubt(tmp_path, only_pair, modality, tags, told):
    other = {**(CT_TAGS | tags if modality == "CT" else pet_tags(**tags)), "SeriesNumber": 9}
    write_series(tmp_path, modality, uid="1.2.3.4.5", tags=other, depths=LONG)
    choice = choose_pet_ct([*only_pair, *find_series(tmp_path)])
    assert (choice.ct.number, choice.pet.number) == (3, 4)
    assert [doubt.partition(":")[0] for doubt in choice.doubts] == ([told] if told else [])


FURTHER = "another PET of this examination (series 9) shows {} mm of the body beyond series 4"


@pytest.mark.parametrize(
    "depths, tags, told",
    [
        pytest.param(LONG[:10] - 60, {}, [FURTHER.format(60)], id="below"),
        pytest.param(LONG[-8:] + 60, {"AcquisitionTime": "115500"}, [FURTHER.format(60)], id="above"),
        pytest.param(LONG[-8:] + 60, {"AcquisitionTime": None}, [FURTHER.format(60)], id="time_not_stated"),
        pytest.param(LONG[-8:] + 60, {"AcquisitionTime": "125000"}, [f"{ANOTHER} 60 min later"], id="another_scan"),
        pytest.param(LONG[-8:] + 40, {}, [], id="little"),
        pytest.param(LONG[4:14], {}, [], id="a_part"),
    ],
)
def test_a_scan_stored_as_several_series_is_a_doubt(tmp_path, only_pair, depths, tags, told):
    write_series(tmp_path, "PT", uid="1.2.3.4.5", tags={**pet_tags(**tags), "SeriesNumber": 9}, depths=depths)
    choice = choose_pet_ct([*only_pair, *find_series(tmp_path)])
    assert choice.pet.number == 4
    assert [doubt.partition(":")[0] for doubt in choice.doubts] == told


@pytest.mark.parametrize(
    "ct, pet, told",
    [
        pytest.param("00", None, [], id="none"),
        pytest.param("01", "00", [f"the CT was {LOSSY}"], id="ct"),
        pytest.param("01", "01", [f"the CT was {LOSSY}", f"the PET was {LOSSY}"], id="both"),
    ],
)
def test_compression_with_loss_is_a_doubt(tmp_path, ct, pet, told):
    write_series(tmp_path / "ct", tags={"LossyImageCompression": ct})
    write_series(tmp_path / "pet", "PT", uid="1.2.3.4.4", tags={"LossyImageCompression": pet, "SeriesNumber": 2})
    assert [doubt.partition(":")[0] for doubt in choose_pet_ct(find_series(tmp_path)).doubts] == told


def test_ct_and_pet_share_the_frame_of_reference(tmp_path):
    write_series(tmp_path / "ct")
    write_series(tmp_path / "pet", "PT", uid="1.2.3.4.4", tags={"FrameOfReferenceUID": "1.2.3.4.55"})
    found = find_series(tmp_path)
    with pytest.raises(DicomError, match=r"no CT belongs to the PET(.|\n)*another frame"):
        choose_pet_ct(found)


@pytest.mark.parametrize(
    "modality, message",
    [("CT", "no usable attenuation-corrected PET"), ("PT", "no usable CT")],
    ids=["no_pet", "no_ct"],
)
def test_half_a_pair(tmp_path, modality, message):
    write_series(tmp_path, modality)
    write_series(tmp_path / "nac", "PT", uid="1.2.3.4.8", tags={"CorrectedImage": ["DECY"], "SeriesNumber": 7})
    with pytest.raises(DicomError, match=rf"{message} among 2 series\nrejected: series 7.*not attenuation") as error:
        choose_pet_ct(find_series(tmp_path))
    assert_anonymous(str(error.value))


CT_LABEL, PET_LABEL = r"series 1 \(CT\), 12 slices of 5 x 6, [^|;]*", r"series 1 \(PT\), 12 slices of 5 x 6, [^|;]*"
SEND_CT = "send it with the CT of the same examination"
SEND_PET = "send it with the attenuation-corrected PET of the same examination"
OF_ANOTHER = r"of another Patient ID \(0010,0020\) is here: if both are of one person, correct the Patient ID"
NO_CT, NO_PET = r"no CT among its DICOM series \({}\)", r"no PET among its DICOM series \({}\)"


def _lone(modality, number=1, patient="A", study="1.2.3.4.1", frame="1.2.3.4.2"):
    """Arguments of a series: modality, UID and tags."""
    tags = {"PatientID": patient, "StudyInstanceUID": study, "FrameOfReferenceUID": frame, "SeriesNumber": number}
    tags |= {"SOPClassUID": "1.2.840.10008.5.1.4.1.1.66.4"} if modality == "SEG" else {}
    return modality, f"1.2.3.4.3{patient}{number}".replace("A", "1").replace("B", "2"), tags


@pytest.mark.parametrize(
    ("scans", "reasons"),
    [
        pytest.param([_lone("PT")], [f"{NO_CT.format('PT')}; found: {PET_LABEL}; {SEND_CT}"], id="PET_only"),
        pytest.param(
            [_lone("PT"), _lone("SEG", 2)],
            [f"{NO_CT.format('PT, SEG')}; found: {PET_LABEL}; {SEND_CT}"],
            id="PET_and_SEG",
        ),
        pytest.param([_lone("CT")], [f"{NO_PET.format('CT')}; found: {CT_LABEL}; {SEND_PET}"], id="CT_only"),
        pytest.param(
            [_lone("SEG")],
            [
                r"no CT and no PET among its DICOM series \(SEG\); send the CT and the attenuation-corrected PET of "
                "one examination"
            ],
            id="SEG_only",
        ),
        pytest.param(
            [_lone("PT", number) for number in range(1, 6)],
            [rf"{NO_CT.format('PT')}; found: {PET_LABEL}( \| series \d \(PT\), [^|;]*){{2}} and 2 more; {SEND_CT}"],
            id="five_PETs",
        ),
        pytest.param(
            [_lone("CT", patient="A"), _lone("PT", patient="B")],
            [
                f"{NO_PET.format('CT')}; found: {CT_LABEL}; {SEND_PET}; a PET {OF_ANOTHER}",
                f"{NO_CT.format('PT')}; found: {PET_LABEL}; {SEND_CT}; a CT {OF_ANOTHER}",
            ],
            id="CT_and_PET_of_two_patients",
        ),
        pytest.param(
            [_lone("PT", patient="A"), _lone("PT", patient="B")],
            [f"{NO_CT.format('PT')}; found: {PET_LABEL}; {SEND_CT}"] * 2,
            id="PETs_of_two_patients",
        ),
        pytest.param(
            [_lone("CT"), _lone("PT", 2, frame="1.2.3.4.9")],
            [
                "no CT belongs to the PET: send the CT of the same examination, which has the PET's frame of "
                "reference; PET: series 2 .*; rejected: series 1 .*another frame of reference than the PET's"
            ],
            id="two_frames_of_one_study",
        ),
        pytest.param(
            [_lone("CT"), _lone("PT", 2, study="1.2.3.4.8", frame="1.2.3.4.9")],
            [
                r"CT and PET are of different examinations among its DICOM series \(CT, PT\): they share neither the "
                r"study .* nor the frame of reference .*; found: .*\(CT\).* \| .*\(PT\).*; send the CT and the "
                "attenuation-corrected PET of one examination"
            ],
            id="two_examinations",
        ),
    ],
)
def test_what_a_study_without_a_pet_ct_lacks(tmp_path, scans, reasons):
    for number, (modality, uid, tags) in enumerate(scans):
        write_series(tmp_path / str(number), modality, uid=uid, tags=tags)
    found = find_examinations(tmp_path)
    assert [each.choice for each in found] == [None] * len(reasons)
    for each, reason in zip(found, reasons, strict=True):
        assert re.fullmatch(reason + ".*", each.problem), each.problem
        assert_anonymous(each.problem)


def _examination(folder, patient, study, frame):
    tags = {"PatientID": patient, "FrameOfReferenceUID": frame}
    write_series(folder / "ct", uid=f"{study}.1", tags={**tags, "StudyInstanceUID": study})
    # filed as a study of its own, as some sites do
    write_series(folder / "pet", "PT", uid=f"{study}.2", tags={**tags, "StudyInstanceUID": f"{study}.9"})


def test_studies_of_several_patients(tmp_path):
    for k, patient in enumerate(("ID-4711-B", "ID-4711-A", "ID-4711-A")):
        _examination(tmp_path / str(k), patient, f"1.2.3.4.1{k}", f"1.2.3.4.2{k}")
    studies = studies_of(find_series(tmp_path))
    assert [s.patient_id for s in studies] == ["ID-4711-A", "ID-4711-A", "ID-4711-B"]
    assert all(len(s.series) == 2 and s.is_pet_ct and choose_pet_ct(s.series).ct.modality == "CT" for s in studies)
    assert_anonymous(repr(studies))
    with pytest.raises(DicomError, match=r"scans of 2 patients: give one patient at a time") as error:
        choose_pet_ct(find_series(tmp_path))
    assert_anonymous(str(error.value))
    with pytest.raises(DicomError, match="2 PET/CT examinations of one patient"):
        choose_pet_ct(studies[0].series + studies[1].series)


def test_ct_of_another_examination_is_left_aside(tmp_path):
    _examination(tmp_path, "ID-4711", "1.2.3.4.10", "1.2.3.4.20")
    old = {"StudyInstanceUID": "1.2.3.4.30", "FrameOfReferenceUID": "1.2.3.4.40", "SeriesNumber": 6}
    write_series(tmp_path / "old", uid="1.2.3.4.31", tags=old)
    [(rejected, why)] = choose_pet_ct(find_series(tmp_path)).rejected
    assert (rejected.number, why) == (6, "of another examination than the PET/CT")


# --- SUV -----------------------------------------------------------------------------------------------------------

ONE_HALF_LIFE = 70_000 / 185e6  # 70 kg; of 370 MBq half is left after 6600 s
AT_INJECTION = 70_000 / 370e6
PHILIPS = (0x7053, "Philips PET Private Group")
GE_SCAN = (0x0009, "GEMS_PETD_01", 0x0D, "DT", "20200102115000.00")
LATE = {"SeriesTime": "150000"}


@pytest.mark.parametrize(
    "changes, factor",
    [
        pytest.param({}, ONE_HALF_LIFE, id="bqml_start"),
        pytest.param({"DecayCorrection": "ADMIN"}, AT_INJECTION, id="bqml_admin"),
        pytest.param({"DecayCorrection": "ADMIN", "SeriesTime": None}, AT_INJECTION, id="admin_needs_no_times"),
        pytest.param({"AcquisitionTime": "120500"}, ONE_HALF_LIFE, id="series_before_acquisition"),
        pytest.param({**LATE, "private": GE_SCAN, "AcquisitionTime": "121000"}, ONE_HALF_LIFE, id="ge_private_start"),
        pytest.param(LATE, ONE_HALF_LIFE, id="late_series_takes_acquisition"),
        # The mean activity of a frame of 600 s is reached after 298.425 s: 300 - ln(2) / 6600 * 600 ** 2 / 24.
        pytest.param(
            {**LATE, "AcquisitionTime": "120000", "FrameReferenceTime": 898425, "ActualFrameDuration": 600000},
            ONE_HALF_LIFE,
            id="late_series_computed_back",
        ),
        pytest.param(
            {"SeriesTime": "012000", "AcquisitionTime": "012000", "RadiopharmaceuticalStartTime": "233000"},
            ONE_HALF_LIFE,
            id="over_midnight",
        ),
        pytest.param(
            {"SeriesTime": "012000", "AcquisitionTime": "012000", "RadiopharmaceuticalStartDateTime": "20200101233000"},
            ONE_HALF_LIFE,
            id="over_midnight_with_date",
        ),
        pytest.param({"RadiopharmaceuticalStartDateTime": "20200102100000.00"}, ONE_HALF_LIFE, id="date_and_time"),
        pytest.param({"RadiopharmaceuticalStartDateTime": "20190704100000"}, ONE_HALF_LIFE, id="date_of_another_year"),
        pytest.param({"RadiopharmaceuticalStartDateTime": "20200103100000"}, ONE_HALF_LIFE, id="date_after_the_scan"),
        pytest.param(
            {"RadiopharmaceuticalStartDateTime": "20200102080000+0000", "TimezoneOffsetFromUTC": "+0200"},
            ONE_HALF_LIFE,
            id="other_time_zone",
        ),
        pytest.param({"RadiopharmaceuticalStartDateTime": "20200102"}, ONE_HALF_LIFE, id="date_without_time"),
        pytest.param({"RadiopharmaceuticalStartTime": "10:00:00"}, ONE_HALF_LIFE, id="old_way_of_writing_times"),
        pytest.param({"CorrectedImage": ["ATTN", "DECAY"]}, ONE_HALF_LIFE, id="decay_spelt_out"),
        pytest.param({"PatientWeight": "35"}, ONE_HALF_LIFE / 2, id="half_the_weight"),
        pytest.param({"Units": "CNTS", "private": (*PHILIPS, 0x00, "DS", "0.00123")}, 0.00123, id="philips_suv"),
        pytest.param({"Units": "CNTS", "private": (*PHILIPS, 0x00, "UN", b"0.00123 ")}, 0.00123, id="philips_bytes"),
        pytest.param(
            {
                "Units": "CNTS",
                "private": (*PHILIPS, 0x00, "DS", "0"),
                "private2": (*PHILIPS, 0x09, "DS", "2.5"),
            },
            2.5 * ONE_HALF_LIFE,
            id="philips_activity",
        ),
        pytest.param({"Units": "GML", "SUVType": "BW"}, 1.0, id="gml"),
        pytest.param({"Units": "GML", "DecayCorrection": None, "PatientWeight": None}, 1.0, id="gml_as_it_is"),
    ],
)
def test_suv_factor(changes, factor):
    assert suv_of(pet_header(**changes)).factor == pytest.approx(factor, rel=1e-7)


@pytest.mark.parametrize(
    "changes, message",
    [
        pytest.param({"Units": None}, r"Units \(0054,1001\) is missing", id="no_units"),
        pytest.param({"Units": "PROPCNTS"}, r"\(0054,1001\) is PROPCNTS", id="proportional_counts"),
        pytest.param({"Units": "CM2ML"}, r"\(0054,1001\) is CM2ML", id="by_body_surface"),
        pytest.param({"Units": "GML", "SUVType": "LBM"}, r"\(0054,1006\) is LBM", id="by_lean_mass"),
        pytest.param({"DecayCorrection": "NONE"}, r"\(0054,1102\) is NONE: .*not corrected", id="no_decay_correction"),
        pytest.param({"DecayCorrection": None}, r"Decay Correction \(0054,1102\) is missing", id="decay_not_stated"),
        pytest.param({"CorrectedImage": ["DECY"]}, r"\(0028,0051\) has no ATTN", id="nac"),
        pytest.param({"CorrectedImage": None}, r"Corrected Image \(0028,0051\) is missing", id="corrections_missing"),
        pytest.param({"CorrectedImage": ["ATTN", "SCAT"]}, r"\(0028,0051\) has no DECY", id="decay_contradiction"),
        pytest.param({"PatientWeight": None}, r"Patient's Weight \(0010,1030\) is missing", id="no_weight"),
        pytest.param({"PatientWeight": ""}, r"\(0010,1030\) is missing or empty", id="empty_weight"),
        pytest.param({"PatientWeight": 0}, r"\(0010,1030\) is zero", id="zero_weight"),
        pytest.param({"PatientWeight": 70000}, r"\(0010,1030\) is 70000 kg, outside 2 to 500", id="weight_in_grams"),
        pytest.param({"RadionuclideTotalDose": None}, r"\(0018,1074\) is missing", id="no_dose"),
        pytest.param({"RadionuclideTotalDose": 0}, r"\(0018,1074\) is zero", id="zero_dose"),
        pytest.param({"RadionuclideTotalDose": 370}, r"\(0018,1074\) is 370 Bq.*check its unit", id="dose_in_mbq"),
        pytest.param({"RadionuclideHalfLife": None}, r"Half Life \(0018,1075\) is missing", id="no_half_life"),
        pytest.param({"RadionuclideHalfLife": 0}, r"\(0018,1075\) is zero", id="zero_half_life"),
        pytest.param({"RadiopharmaceuticalStartTime": None}, r"\(0018,1072\) is missing", id="no_injection_time"),
        pytest.param(
            {"RadiopharmaceuticalStartTime": "late"}, r"\(0018,1072\) is not a valid date", id="odd_injection_time"
        ),
        pytest.param({"RadiopharmaceuticalStartTime": "120000"}, r"23.8 h before the scan", id="injected_afterwards"),
        pytest.param({"RadiopharmaceuticalInformationSequence": None}, r"\(0054,0016\)", id="no_radiopharmaceutical"),
        pytest.param({"RadiopharmaceuticalInformationSequence": []}, r"\(0054,0016\)", id="empty_radiopharmaceutical"),
        pytest.param({"SeriesTime": None}, r"Series Time \(0008,0031\) is missing", id="no_series_time"),
        pytest.param({"SeriesDate": ""}, r"Series Date \(0008,0021\) is missing", id="no_series_date"),
        pytest.param({"AcquisitionDate": None}, r"\(0008,0022\) is missing", id="no_acquisition_date"),
        pytest.param({"AcquisitionTime": None}, r"\(0008,0032\) is missing", id="no_acquisition_time"),
        pytest.param({"Units": "CNTS"}, r"\(7053,1000\) and \(7053,1009\)", id="counts_without_philips"),
    ],
)
def test_suv_refusals_name_the_tag(changes, message):
    with pytest.raises(DicomError, match=message):
        suv_of(pet_header(**changes))


def test_suv_of_a_late_series_starts_with_its_first_bed_position():
    beds = [pet_header(**LATE, AcquisitionTime=clock) for clock in ("121000", "115000", "120000")]
    assert suv_of(beds).factor == pytest.approx(ONE_HALF_LIFE)


@pytest.mark.parametrize(
    "changes, message",
    [
        pytest.param({"Units": "GML"}, r"differ in Units \(0054,1001\): BQML, GML", id="units"),
        pytest.param({"PatientWeight": 71}, r"differ in Patient's Weight", id="weight"),
        pytest.param({"RadionuclideTotalDose": 3e8}, r"differ in Radionuclide Total Dose", id="dose"),
        pytest.param({"DecayCorrection": "ADMIN"}, r"differ in Decay Correction", id="decay"),
    ],
)
def test_suv_needs_slices_that_agree(changes, message):
    with pytest.raises(DicomError, match=message):
        suv_of([pet_header(), pet_header(**changes)])


def test_suv_of_no_slices():
    with pytest.raises(DicomError, match="no PET slices"):
        suv_of([])


def test_suv_factor_follows_the_formula_for_any_uptake_time():
    rng = np.random.default_rng(1)
    for _ in range(20):
        weight, dose, minutes = rng.uniform(40, 120), rng.uniform(1e8, 5e8), int(rng.integers(30, 300))
        injected = datetime(2020, 1, 2, 11, 50) - timedelta(minutes=minutes)
        header = pet_header(
            PatientWeight=f"{weight:.3f}",
            RadionuclideTotalDose=f"{dose:.0f}",
            RadiopharmaceuticalStartTime=f"{injected:%H%M%S}",
        )
        expected = 1000 * weight / (dose * math.exp(-math.log(2) * 60 * minutes / 6600))
        assert suv_of(header).factor == pytest.approx(expected, rel=1e-4)


def test_suv_from_the_files_of_a_series(tmp_path):
    write_series(tmp_path, "PT", each=lambda k: {"RescaleSlope": 1 + k})
    assert suv_of(read_headers(only(tmp_path))).factor == pytest.approx(ONE_HALF_LIFE)


# --- results -------------------------------------------------------------------------------------------------------


def tumour(shape):
    mask = np.zeros(shape, dtype=np.uint8)
    mask[2:6, 4:9, 10:15] = 1
    mask[9, 14, 20] = 1
    return mask


def test_segmentation_reads_back(tmp_path):
    choice = pair(tmp_path / "in")
    mask = tumour(choice.ct.grid.shape)
    write_mask(tmp_path / "out" / "seg.dcm", mask, choice.ct, MODEL)
    seg = hd.seg.segread(tmp_path / "out" / "seg.dcm")
    ct = read_headers(choice.ct)
    by_uid = {header.SOPInstanceUID: k for k, header in enumerate(ct)}
    assert seg.NumberOfFrames == 5, "only slices with a lesion are stored"
    mask[9, 14, 20] = 0  # too small for a lesion
    frames = seg.get_pixels_by_source_instance([h.SOPInstanceUID for h in ct], assert_missing_frames_are_empty=True)
    np.testing.assert_array_equal(frames[..., 0].transpose(2, 1, 0), mask)
    for frame, item in zip(seg.pixel_array, seg.PerFrameFunctionalGroupsSequence, strict=True):
        source = item.DerivationImageSequence[0].SourceImageSequence[0].ReferencedSOPInstanceUID
        np.testing.assert_array_equal(frame.T, mask[:, :, by_uid[source]])
        position = item.PlanePositionSequence[0].ImagePositionPatient
        np.testing.assert_allclose(position, ct[by_uid[source]].ImagePositionPatient)
    assert seg.FrameOfReferenceUID == choice.ct.frame_of_reference
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["seg.dcm"]


def test_segmentation_of_an_oblique_ct(tmp_path):
    turned = [math.cos(TURN), 0, math.sin(TURN), 0, 1, 0]
    write_series(tmp_path / "ct", tags={"ImageOrientationPatient": turned})
    ct = only(tmp_path / "ct")
    mask = find_lesions(np.random.default_rng(2).random(ct.grid.shape) > 0.5, ct.grid).on(ct.grid.shape)
    assert mask.max() == 1 and mask.mean() > 0.4
    write_mask(tmp_path / "seg.dcm", mask, ct, MODEL)
    volume = hd.seg.segread(tmp_path / "seg.dcm").get_volume(combine_segments=True)
    np.testing.assert_array_equal(volume.match_geometry(_volume_geometry(ct)).array.transpose(2, 1, 0), mask)


def _volume_geometry(series):
    lps = np.diag([-1.0, -1, 1, 1]) @ series.grid.affine @ np.eye(4)[:, [2, 1, 0, 3]]
    return hd.VolumeGeometry(lps, series.grid.shape[::-1], "PATIENT", series.frame_of_reference)


def test_segment_is_coded_and_carries_patient_and_study(tmp_path):
    choice = pair(tmp_path / "in")
    write_mask(tmp_path / "seg.dcm", tumour(choice.ct.grid.shape), choice.ct, MODEL)
    seg, ct = hd.seg.segread(tmp_path / "seg.dcm"), read_headers(choice.ct)[0]
    segment = seg.get_segment_description(1)
    assert segment.segmented_property_category == codes.SCT.MorphologicallyAbnormalStructure
    assert segment.segmented_property_type == codes.SCT.Neoplasm
    assert segment.anatomic_regions == [codes.SCT.HeadAndNeck]
    assert segment.algorithm_identification.name == MODEL.name
    assert segment.algorithm_identification.version == MODEL.version
    assert segment.SegmentDescription == " ".join(MODEL.statements)
    assert "trained on=9 phantoms" in segment.algorithm_identification[0].AlgorithmParameters
    assert "research use only" in seg.SeriesDescription
    for tag in ("PatientName", "PatientID", "PatientBirthDate", "PatientSex", "StudyInstanceUID", "StudyDate"):
        assert seg[tag].value == ct[tag].value
    assert seg.AccessionNumber == "ACC-0815" and seg.SeriesInstanceUID != ct.SeriesInstanceUID


def test_classes_have_codes_and_colours_of_their_own(tmp_path):
    choice = pair(tmp_path / "in")
    mask = tumour(choice.ct.grid.shape)
    mask[7:10, 4:9, 10:15] = mask[2:6, 11:14, 10:15] = 2
    seg = write_mask(tmp_path / "seg.dcm", mask, choice.ct, MODEL, APART)
    read = hd.seg.segread(tmp_path / "seg.dcm")
    assert read.SegmentsOverlap == "NO"
    described = [read.get_segment_description(number) for number in read.segment_numbers]
    assert (
        [one.segment_label for one in described]
        == ["GTVp", "GTVn_01", "GTVn_02"]
        == [one.tracking_id for one in described]
    )
    primary, *nodes = described
    assert primary.segmented_property_type == codes.SCT.NeoplasmPrimary
    assert primary.anatomic_regions == [codes.SCT.HeadAndNeck]
    for node in nodes:
        assert node.segmented_property_type == codes.SCT.NeoplasmSecondary
        assert node.anatomic_regions == [codes.SCT.LymphNodeOfHeadAndNeck]
    assert len({one.tracking_uid for one in described}) == 3
    colours = [tuple(one.RecommendedDisplayCIELabValue) for one in read.SegmentSequence]
    assert colours[0] != colours[1] == colours[2]
    lesions = [{"volume_ml": 1.5}, {"volume_ml": 1.1}, {"volume_ml": 0.9}]
    write_sr(tmp_path / "sr.dcm", Findings({}, lesions), ct=choice.ct, pet=choice.pet, model=MODEL, seg=seg)
    groups = hd.sr.srread(tmp_path / "sr.dcm").content.get_volumetric_roi_measurement_groups()
    assert [group.tracking_identifier for group in groups] == ["GTVp", "GTVn_01", "GTVn_02"]
    for number, (group, one, lesion) in enumerate(zip(groups, described, lesions, strict=True), start=1):
        assert (group.tracking_uid, group.finding_type) == (one.tracking_uid, one.segmented_property_type)
        assert [site.value for site in group.finding_sites] == one.anatomic_regions
        [image] = [item for item in group[0].ContentSequence if item.ValueType == "IMAGE"]
        assert image.ReferencedSOPSequence[0].ReferencedSegmentNumber == number
        assert numbers(group)[("118565006", "")][0] == lesion["volume_ml"]
    assert [dciodvfy_errors(tmp_path / f) or [] for f in ("seg.dcm", "sr.dcm")] == [[], []]


def test_empty_mask_is_stored_with_its_empty_slices(tmp_path):
    choice = pair(tmp_path / "in")
    write_mask(tmp_path / "seg.dcm", np.zeros(choice.ct.grid.shape, np.uint8), choice.ct, MODEL)
    seg = hd.seg.segread(tmp_path / "seg.dcm")
    assert seg.NumberOfFrames == 30 and not seg.pixel_array.any()
    assert dciodvfy_errors(tmp_path / "seg.dcm") in (None, [])


LESION = Lesion("GTV", "GTV", 1.5, np.zeros(3), (slice(2, 6), slice(4, 9), slice(10, 15)))


@pytest.mark.parametrize(
    "numbers, message",
    [
        pytest.param(np.zeros((30, 16, 12), np.uint8), r"shape \(30, 16, 12\), the CT \(12, 16, 30\)", id="turned"),
        pytest.param(np.full((12, 16, 30), 2, np.uint8), "integers 1 to 1", id="another_number"),
        pytest.param(np.zeros((12, 16, 30), np.uint8), "integers 1 to 1", id="not_there"),
        pytest.param(np.full((12, 16, 30), 0.5), "integers 1 to 1", id="probability"),
    ],
)
@pytest.mark.parametrize("write", [write_seg, write_rtstruct])
def test_numbers_that_are_refused(tmp_path, write, numbers, message):
    choice = pair(tmp_path / "in")
    with pytest.raises(DicomError, match=message):
        write(tmp_path / "out.dcm", numbers, [LESION], choice.ct, model=MODEL)
    assert not (tmp_path / "out.dcm").exists()


def test_no_half_file_is_left(tmp_path, monkeypatch):
    choice = pair(tmp_path / "in")

    def full_disk(self, path, **kwargs):
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Dataset, "save_as", full_disk)
    with pytest.raises(OSError, match="no space left"):
        write_mask(tmp_path / "out" / "seg.dcm", tumour(choice.ct.grid.shape), choice.ct, MODEL)
    assert list((tmp_path / "out").iterdir()) == []


FINDINGS = Findings(
    {"volume_ml": 12.5, "suv_max": 14.25, "suv_mean": 6.5, "mtv_ml": 10.0, "tlg_g": 81.25, "lesions": 1},
    [{"volume_ml": 12.4958, "suv_max": 14.2499, "suv_mean": 6.5, "suv_peak": 12.126, "mtv_ml": 10.0, "tlg_g": 81.25,
      "longest_diameter_mm": 31.04}],
    log_hazard=-0.75041, risk_percentile=30.8, survival={730: 0.80996, 365: 0.9}, hpv_probability=0.7,
    hpv_positive=True,
)  # fmt: skip


def written_report(folder, findings=FINDINGS, **options):
    choice = pair(folder / "in")
    seg = write_mask(folder / "seg.dcm", tumour(choice.ct.grid.shape), choice.ct, MODEL)
    write_sr(folder / "sr.dcm", findings, ct=choice.ct, pet=choice.pet, model=MODEL, seg=seg, **options)
    return hd.sr.srread(folder / "sr.dcm"), seg, choice


def numbers(group):
    """(code, derivation) -> (value, unit) of a group's measurements."""
    return {
        (m.name.value, m.derivation.meaning if m.derivation else ""): (m.value, m.unit.value)
        for m in group.get_measurements()
    }


def test_report_reads_back(tmp_path):
    report, seg, _ = written_report(tmp_path)
    [roi] = report.content.get_volumetric_roi_measurement_groups()
    assert numbers(roi) == {  # rounded
        ("118565006", ""): (12.5, "cm3"),
        ("126401", "Maximum"): (14.25, "g/ml{SUVbw}"),
        ("126401", "Mean"): (6.5, "g/ml{SUVbw}"),
        ("126401", "Peak Value Within ROI"): (12.13, "g/ml{SUVbw}"),
        ("126032", ""): (10.0, "cm3"),
        ("126033", ""): (81.2, "g"),
        ("L0JK", ""): (31.0, "mm"),
    }
    [image] = [item for item in roi[0].ContentSequence if item.ValueType == "IMAGE"]
    [reference] = image.ReferencedSOPSequence
    assert (reference.ReferencedSOPInstanceUID, reference.ReferencedSegmentNumber) == (seg.SOPInstanceUID, 1)
    assert roi.tracking_uid == seg.SegmentSequence[0].TrackingUID
    tumour, prediction = report.content.get_image_measurement_groups()
    assert numbers(tumour) == {
        ("118565006", ""): (12.5, "cm3"),
        ("126401", "Maximum"): (14.25, "g/ml{SUVbw}"),
        ("126401", "Mean"): (6.5, "g/ml{SUVbw}"),
        ("126032", ""): (10.0, "cm3"),
        ("126033", ""): (81.2, "g"),
        ("246206008", ""): (1.0, "1"),
    }
    assert numbers(prediction) == {
        ("LOG_HAZARD", ""): (-0.75, "1"),
        ("RISK_PERCENTILE", ""): (31.0, "%"),
        ("RFS_365D", ""): (0.9, "1"),
        ("RFS_730D", ""): (0.81, "1"),
        ("HPV_PROBABILITY", ""): (0.7, "1"),
    }
    [status] = prediction.get_qualitative_evaluations()
    assert (status.name.value, status.value) == ("HPV_STATUS", codes.SCT.Positive)


def test_report_refers_to_its_sources(tmp_path):
    report, seg, choice = written_report(tmp_path)
    referred = {
        item.ReferencedSOPInstanceUID
        for key in ("CurrentRequestedProcedureEvidenceSequence", "PertinentOtherEvidenceSequence")
        for study in report.get(key, [])
        for series in study.ReferencedSeriesSequence
        for item in series.ReferencedSOPSequence
    }
    sources = [h.SOPInstanceUID for s in (choice.ct, choice.pet) for h in read_headers(s)]
    assert referred == {*sources, seg.SOPInstanceUID}
    assert report.StudyInstanceUID == "1.2.3.4.1" and str(report.PatientName) == "Doe^Jane"
    assert (report.VerificationFlag, report.PreliminaryFlag) == ("UNVERIFIED", "PRELIMINARY")
    [scheme] = report.CodingSchemeIdentificationSequence
    assert scheme.CodingSchemeDesignator == "99HNPETCT"


def test_report_says_what_made_it_and_that_it_is_for_research(tmp_path):
    remarks = {"Tumour": ["of the tumour"], "Prediction": ["of the prediction"]}
    report, _, _ = written_report(tmp_path, notes=["PET does not reach the top of the CT"], remarks=remarks)
    texts = []
    report.walk(lambda _, element: texts.append(str(element.value)) if element.keyword == "TextValue" else None)
    comments = [text for text in texts if text.startswith(("Research use only", "PET does not"))]
    assert len(comments) == 5, "both for tumour and prediction, the restriction for the lesion"
    assert {MODEL.name, MODEL.version, f"weights: {MODEL.weights}", MODEL.manufacturer} <= set(texts)
    assert texts.count("The model was trained on: 9 phantoms") == 2
    for group in report.content.get_image_measurement_groups():
        own = [item.TextValue for item in group[0].ContentSequence if item.get("TextValue", "").startswith("of the")]
        assert own == remarks[group.tracking_identifier]


def test_codes_are_those_of_the_dictionaries(tmp_path):
    known = {
        "126401": codes.DCM.Suvbw,
        "126032": codes.DCM.MetabolicVolume,
        "126033": codes.DCM.TotalLesionGlycolysis,
        "118565006": codes.SCT.Volume,
        "246206008": codes.SCT.NumberOfLesions,
        "L0JK": codes.IBSI.Maximum3DDiameterOfAMesh,
    }
    assert {value for (_, value, _), *_ in MEASUREMENTS.values()} == set(known)
    for name, *_ in MEASUREMENTS.values():
        assert known[name[1]] == Code(name[1], name[0], name[2])
    assert codes.DCM.PeakValueWithinROI.value == MEASUREMENTS["suv_peak"][2][1]
    # short string and long string of DICOM
    assert all(len(code) <= 16 and len(meaning) <= 64 for code, meaning in PRIVATE_CODES.items())


def test_prediction_without_a_mask(tmp_path):
    choice = pair(tmp_path / "in")
    alone = Findings(log_hazard=0.5, hpv_positive=False)
    write_sr(tmp_path / "sr.dcm", alone, ct=choice.ct, pet=choice.pet, model=MODEL)
    content = hd.sr.srread(tmp_path / "sr.dcm").content
    assert content.get_volumetric_roi_measurement_groups() == []
    [prediction] = content.get_image_measurement_groups()
    assert numbers(prediction) == {("LOG_HAZARD", ""): (0.5, "1")}
    assert prediction.get_qualitative_evaluations()[0].value == codes.SCT.Negative


@pytest.mark.parametrize(
    "findings, message",
    [
        pytest.param(Findings(lesions=[{"volume_ml": 1.0}]), "give seg", id="lesion_without_segmentation"),
        pytest.param(Findings(tumour={"volume_ml": None}), "nothing to report", id="nothing_known"),
        pytest.param(Findings(), "nothing to report", id="nothing"),
    ],
)
def test_reports_that_are_refused(tmp_path, findings, message):
    choice = pair(tmp_path / "in")
    with pytest.raises(DicomError, match=message):
        write_sr(tmp_path / "sr.dcm", findings, ct=choice.ct, pet=choice.pet, model=MODEL)


@pytest.mark.parametrize(
    "values",
    [
        pytest.param({"log_hazard": math.nan}, id="hazard"),
        pytest.param({"survival": {365: math.inf}}, id="survival"),
        pytest.param({"tumour": {"suv_max": math.nan}}, id="tumour"),
        pytest.param({"lesions": [{}, {"tlg_g": math.inf}]}, id="lesion"),
    ],
)
def test_findings_must_be_finite(values):
    with pytest.raises(ValueError, match="leave out what is not known"):
        Findings(**values)


def test_dciodvfy_finds_no_errors(tmp_path):
    written_report(tmp_path)
    if dciodvfy_errors(tmp_path / "seg.dcm") is None:
        pytest.skip("dciodvfy is not installed (apt-get install dicom3tools)")
    assert dciodvfy_errors(tmp_path / "seg.dcm") == []
    assert dciodvfy_errors(tmp_path / "sr.dcm") == []


@pytest.mark.parametrize(
    "name, charset",
    [
        pytest.param("Müller^Jürgen", "ISO_IR 100", id="latin_1"),
        pytest.param("Παπαδόπουλος^Νίκος", "ISO_IR 192", id="greek_in_utf_8"),
        pytest.param("Yamada^Tarou=山田^太郎", ["", "ISO 2022 IR 87"], id="kanji"),
    ],
)
def test_names_in_any_script_are_carried_over(tmp_path, name, charset):
    script = {"PatientName": name, "SpecificCharacterSet": charset}
    write_series(tmp_path / "ct", tags=script)
    write_series(tmp_path / "pet", "PT", uid="1.2.3.4.4", tags={**script, "SeriesNumber": 2})
    choice = choose_pet_ct(find_series(tmp_path))
    seg = write_mask(tmp_path / "seg.dcm", np.ones(choice.ct.grid.shape, np.uint8), choice.ct, MODEL)
    write_sr(tmp_path / "sr.dcm", FINDINGS, ct=choice.ct, pet=choice.pet, model=MODEL, seg=seg)
    for file in ("seg.dcm", "sr.dcm"):
        assert str(pydicom.dcmread(tmp_path / file).PatientName) == name
        assert dciodvfy_errors(tmp_path / file) in (None, [])


@pytest.mark.parametrize("charset", [None, "ISO_IR 100"], ids=["ascii", "latin_1"])
def test_notes_in_any_script(tmp_path, charset):
    write_series(tmp_path / "ct", tags={"SpecificCharacterSet": charset})
    write_series(tmp_path / "pet", "PT", uid="1.2.3.4.4", tags={"SpecificCharacterSet": charset})
    choice = choose_pet_ct(find_series(tmp_path))
    note = "SUV ≥ 4, 視野"
    write_sr(tmp_path / "sr.dcm", Findings(log_hazard=0.0), ct=choice.ct, pet=choice.pet, model=MODEL, notes=[note])
    texts = []
    report = pydicom.dcmread(tmp_path / "sr.dcm")
    report.walk(lambda _, element: texts.append(element.value) if element.keyword == "TextValue" else None)
    assert note in texts


def test_nothing_identifying_is_logged(tmp_path, caplog, capfd):
    odd = {"PatientName": "Doe Jane", "StudyID": "ID-4711 is far too long"}
    write_series(tmp_path / "ct", tags=odd)
    write_series(tmp_path / "pet", "PT", uid="1.2.3.4.4", tags={**odd, "SeriesNumber": 2})
    with caplog.at_level(logging.DEBUG):
        choice = choose_pet_ct(find_series(tmp_path))
        read_series(choice.pet)
        suv_of(read_headers(choice.pet))
        seg = write_mask(tmp_path / "seg.dcm", np.ones(choice.ct.grid.shape, np.uint8), choice.ct, MODEL)
        write_sr(tmp_path / "sr.dcm", FINDINGS, ct=choice.ct, pet=choice.pet, model=MODEL, seg=seg)
    out, err = capfd.readouterr()
    assert_anonymous(caplog.text + out + err)
    for file in ("seg.dcm", "sr.dcm"):
        written = pydicom.dcmread(tmp_path / file)
        assert (str(written.PatientName), written.StudyID) == ("Doe Jane", "ID-4711 is far t"), "16 characters at most"


# --- real patients, and life without pydicom -------------------------------------------------------------------------


@pytest.mark.parametrize("patient", ["STS-002", "STS-008"])
def test_real_patients_equal_their_nifti(patient, tmp_path):
    folder, images = SHARED / "dicom" / patient, SHARED / "sts_petct" / "images" / patient
    if not folder.is_dir() or not images.is_dir():
        pytest.skip("the real DICOM patients and their NIfTI are not here")
    choice = choose_pet_ct(find_series(folder))
    assert [s.modality for s, _ in choice.rejected] == ["RTSTRUCT"]
    assert "STS" not in choice.describe() and " x 3.27 mm" in choice.describe()
    for series, suffix in ((choice.ct, "CT"), (choice.pet, "PT")):
        array, affine = read_series(series)
        nifti = nib.load(images / f"{patient}__{suffix}.nii.gz")
        np.testing.assert_allclose(affine, nifti.affine, atol=1e-4)
        np.testing.assert_allclose(array, np.asarray(nifti.dataobj), atol=1e-5)
    assert suv_of(read_headers(choice.pet)).factor == 1.0
    mask = (np.asarray(nib.load(images / f"{patient}.nii.gz").dataobj) > 0).astype(np.uint8)
    seg = write_mask(tmp_path / "seg.dcm", mask, choice.ct, MODEL)
    found = Findings(FINDINGS.tumour, [FINDINGS.tumour] * len(seg.SegmentSequence))
    write_sr(tmp_path / "sr.dcm", found, ct=choice.ct, pet=choice.pet, model=MODEL, seg=seg)
    read = hd.seg.segread(tmp_path / "seg.dcm")
    lesions = find_lesions(mask, choice.ct.grid)
    numbers = lesions.on(mask.shape)
    assert read.pixel_array.sum() == (numbers > 0).sum() > 0
    write_rtstruct(tmp_path / "rtstruct.dcm", numbers, lesions.found, choice.ct, model=MODEL)
    assert [dciodvfy_errors(tmp_path / f"{name}.dcm") or [] for name in ("seg", "sr", "rtstruct")] == [[], [], []]


def test_without_pydicom_the_error_says_what_to_install(tmp_path):
    code = (
        "import sys; sys.modules['pydicom'] = None; sys.modules['highdicom'] = None\n"
        "from scripts.dicom.series import find_series\nfrom scripts.dicom.tags import needed_module\n"
        "for call in (lambda: find_series('.'), lambda: needed_module('highdicom')):\n"
        "    try: call()\n"
        "    except ImportError as error: print(error)\n"
    )
    bundle = str(Path(__file__).resolve().parents[1] / "bundle")
    environment = {**os.environ, "PYTHONPATH": bundle}
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment, cwd=tmp_path
    )
    assert result.stdout.splitlines() == [
        "DICOM needs pydicom.config: pip install pydicom highdicom",
        "DICOM needs highdicom: pip install pydicom highdicom",
    ]
