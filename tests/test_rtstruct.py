"""Contours of lesions: rasterised again they are the mask; what they refer to; read by other software."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import numpy as np
import pydicom
import pytest
from dicom_study import dciodvfy_errors, write_series

from scripts.dicom.rtstruct import polygons, write_rtstruct
from scripts.dicom.seg import Model
from scripts.dicom.series import Series, find_series, read_headers
from scripts.imaging.images import read_image
from scripts.imaging.lesions import APART, MERGED, find_lesions

MODEL = Model("multitask", "1.2.3", "maintainers", "sha256:0123456789abcdef", "9 phantoms")
TURN = np.deg2rad(25)
OBLIQUE = [np.cos(TURN), 0, np.sin(TURN), 0, 1, 0]
COARSE = {"PixelSpacing": [3.0, 3.0]}


def ct_of(
    folder: Path, shape: tuple[int, int] = (40, 36), slices: int = 12, step: float = 3.0, **tags: object
) -> Series:
    """A CT of 2.5 x 2 mm pixels."""
    write_series(folder, shape=shape, depths=np.arange(slices) * step, origin=(-35.5, -1042.25, 99.875), tags=tags)
    [series] = find_series(folder)
    return series


def ball(shape: tuple[int, ...], centre: tuple[float, ...], radii: tuple[float, ...]) -> np.ndarray:
    """An ellipsoid in voxels."""
    axes = np.meshgrid(*[np.arange(n) for n in shape], indexing="ij")
    return sum(((a - c) / r) ** 2 for a, c, r in zip(axes, centre, radii, strict=True)) <= 1


def shapes(shape: tuple[int, ...]) -> dict[str, np.ndarray]:
    """Masks (X, Y, Z) of lesions that are hard to draw."""
    noise = np.random.default_rng(0).random(shape)
    hollow = ball(shape, (17, 19, 6), (12, 14, 5))
    nested = hollow & ~ball(shape, (17, 19, 6), (9, 11, 5)) | ball(shape, (17, 19, 6), (5, 7, 4))
    block = np.zeros(shape, bool)
    block[5:15, 5:15, 3:6] = block[16:24, 5:15, 3:6] = True
    return {
        "ball": hollow,
        "hole": hollow & ~ball(shape, (17, 19, 6), (6, 6, 3)),
        "two_holes": hollow & ~ball(shape, (12, 19, 6), (4, 5, 3)) & ~ball(shape, (22, 19, 6), (3, 5, 3)),
        "ball_in_a_shell": nested,
        "many_holes": hollow & (noise > 0.2),
        "blocks": block,
        "at_the_edge": ball(shape, (0, 0, 0), (14, 14, 8)),
        "all": np.ones(shape, bool),
    }


def inside(points: np.ndarray, polygon: np.ndarray) -> np.ndarray:
    """Whether points (N, 2) lie in a polygon (M, 2): rays to the right cross it an odd number of times."""
    odd = np.zeros(len(points), bool)
    for (x1, y1), (x2, y2) in zip(polygon, np.roll(polygon, -1, axis=0), strict=True):
        crosses = (y1 > points[:, 1]) != (y2 > points[:, 1])
        if crosses.any():
            at = x1 + (points[:, 1] - y1) * (x2 - x1) / (y2 - y1)
            odd ^= crosses & (points[:, 0] < at)
    return odd


def rasterised(structures: object, name: str, headers: list) -> np.ndarray:
    """A region as a mask (X, Y, Z), from the headers of the images that its contours refer to."""
    [number] = [roi.ROINumber for roi in structures.StructureSetROISequence if roi.ROIName == name]
    [roi] = [roi for roi in structures.ROIContourSequence if roi.ReferencedROINumber == number]
    by_uid = {header.SOPInstanceUID: k for k, header in enumerate(headers)}
    mask = np.zeros((headers[0].Columns, headers[0].Rows, len(headers)), bool)
    pixels = np.argwhere(np.ones(mask.shape[:2]))
    for contour in roi.ContourSequence:
        [image] = contour.ContourImageSequence
        k = by_uid[image.ReferencedSOPInstanceUID]
        assert contour.ContourGeometricType == "CLOSED_PLANAR"
        points = np.array(contour.ContourData, float).reshape(-1, 3)
        assert len(points) == contour.NumberOfContourPoints >= 3
        row, column = np.array(headers[k].ImageOrientationPatient, float).reshape(2, 3)
        relative = points - np.array(headers[k].ImagePositionPatient, float)
        np.testing.assert_allclose(relative @ np.cross(row, column), 0, atol=1e-3)
        between_rows, between_columns = map(float, headers[k].PixelSpacing)
        indices = np.stack([relative @ row / between_columns, relative @ column / between_rows], axis=1)
        mask[..., k] ^= inside(pixels, indices).reshape(mask.shape[:2])
    return mask


def dice(a: np.ndarray, b: np.ndarray) -> float:
    return 2 * (a & b).sum() / (a.sum() + b.sum())


def written(folder: Path, mask: np.ndarray, ct: Series, classes: tuple[str, ...] = MERGED) -> tuple:
    """The file, read back, and the lesions."""
    lesions = find_lesions(mask, ct.grid, classes)
    write_rtstruct(folder / "rtstruct.dcm", lesions.on(mask.shape), lesions.found, ct, model=MODEL)
    return pydicom.dcmread(folder / "rtstruct.dcm"), lesions


@pytest.mark.parametrize("name", shapes((36, 40, 12)))
@pytest.mark.parametrize("tags", [{}, {"ImageOrientationPatient": OBLIQUE}, COARSE], ids=["axial", "oblique", "square"])
def test_rasterised_contours_are_the_mask(tmp_path: Path, name: str, tags: dict) -> None:
    ct = ct_of(tmp_path / "ct", **tags)
    mask = shapes(ct.grid.shape)[name]
    structures, lesions = written(tmp_path, mask, ct)
    whole, headers = lesions.on(mask.shape), read_headers(ct)
    assert lesions.found[0].volume_ml > 1
    for number, lesion in enumerate(lesions.found, start=1):
        np.testing.assert_array_equal(rasterised(structures, lesion.name, headers), whole == number)
    assert dciodvfy_errors(tmp_path / "rtstruct.dcm") in (None, [])


def test_contours_lie_halfway_to_the_neighbours() -> None:
    part = np.zeros((4, 5), bool)
    part[1, 1:4] = True
    [ring] = polygons(part)
    assert {tuple(point) for point in ring} == {(0.5, 1), (0.5, 3), (1, 3.5), (1.5, 3), (1.5, 1), (1, 0.5)}


def test_a_hole_is_joined_by_a_channel_without_width() -> None:
    part = np.ones((7, 7), bool)
    part[3, 3] = False
    [ring] = polygons(part)
    x, y = ring.T
    area = abs(x @ np.roll(y, -1) - y @ np.roll(x, -1)) / 2
    assert area == pytest.approx(49 - 4 / 8 - 1 / 2), "corners are cut; the hole is a diamond"


def test_regions_have_names_classes_and_colours(tmp_path: Path) -> None:
    ct = ct_of(tmp_path / "ct")
    mask = np.zeros(ct.grid.shape, np.uint8)
    mask[4:14, 4:14, 2:8], mask[20:26, 4:14, 2:8], mask[4:14, 24:28, 2:8] = 1, 2, 2
    structures, lesions = written(tmp_path, mask, ct, APART)
    assert [roi.ROIName for roi in structures.StructureSetROISequence] == ["GTVp", "GTVn_01", "GTVn_02"]
    assert [float(roi.ROIVolume) for roi in structures.StructureSetROISequence] == pytest.approx(
        [lesion.volume_ml for lesion in lesions.found]
    )
    colours = [tuple(roi.ROIDisplayColor) for roi in structures.ROIContourSequence]
    assert colours[0] != colours[1] == colours[2]
    assert {roi.RTROIInterpretedType for roi in structures.RTROIObservationsSequence} == {"GTV"}
    assert all("Research use only" in roi.ROIDescription for roi in structures.StructureSetROISequence)


def test_references_and_tags_are_those_of_the_ct(tmp_path: Path) -> None:
    ct = ct_of(tmp_path / "ct", PatientName="Müller^Jürgen", SpecificCharacterSet="ISO_IR 100")
    structures, _ = written(tmp_path, ball(ct.grid.shape, (17, 19, 6), (8, 8, 4)), ct)
    headers = read_headers(ct)
    assert str(structures.PatientName) == "Müller^Jürgen"
    for keyword in ("PatientID", "PatientBirthDate", "PatientSex", "StudyInstanceUID", "StudyDate", "AccessionNumber"):
        assert structures[keyword].value == headers[0][keyword].value
    [frame] = structures.ReferencedFrameOfReferenceSequence
    [study] = frame.RTReferencedStudySequence
    [series] = study.RTReferencedSeriesSequence
    assert frame.FrameOfReferenceUID == structures.FrameOfReferenceUID == ct.frame_of_reference
    assert study.ReferencedSOPInstanceUID == ct.study_uid and series.SeriesInstanceUID == ct.uid
    uids = [header.SOPInstanceUID for header in headers]
    assert [image.ReferencedSOPInstanceUID for image in series.ContourImageSequence] == uids
    assert structures.SeriesInstanceUID != ct.uid and structures.ApprovalStatus == "UNAPPROVED"
    roi = structures.ROIContourSequence[0]
    [region] = structures.StructureSetROISequence
    assert region.ReferencedFrameOfReferenceUID == ct.frame_of_reference
    raw = [str(value) for contour in roi.ContourSequence for value in contour.ContourData]
    assert max(map(len, raw)) <= 16 and "-0.0000" not in raw


def test_without_a_lesion_there_is_a_region_without_contours(tmp_path: Path) -> None:
    ct = ct_of(tmp_path / "ct")
    structures, _ = written(tmp_path, np.zeros(ct.grid.shape, np.uint8), ct)
    assert [roi.ROIName for roi in structures.StructureSetROISequence] == ["GTV"]
    assert "ContourSequence" not in structures.ROIContourSequence[0]
    assert dciodvfy_errors(tmp_path / "rtstruct.dcm") in (None, [])


@pytest.mark.parametrize("name", ["ball", "hole", "two_holes", "many_holes"])
@pytest.mark.parametrize("tags", [{}, {"ImageOrientationPatient": OBLIQUE}], ids=["axial", "oblique"])
def test_plastimatch_reads_the_contours(tmp_path: Path, name: str, tags: dict) -> None:
    if shutil.which("plastimatch") is None:
        pytest.skip("plastimatch is not installed (apt-get install plastimatch)")
    ct = ct_of(tmp_path / "ct", **tags)
    mask = shapes(ct.grid.shape)[name]
    _, lesions = written(tmp_path, mask, ct)
    command = ["plastimatch", "convert", "--input", tmp_path / "rtstruct.dcm", "--referenced-ct", tmp_path / "ct"]
    out = ["--output-prefix", tmp_path / "out", "--prefix-format", "nii.gz"]
    subprocess.run([*command, *out], check=True, capture_output=True)
    whole = lesions.on(mask.shape)
    for number, lesion in enumerate(lesions.found, start=1):
        read, affine = read_image(tmp_path / "out" / f"{lesion.name}.nii.gz")
        np.testing.assert_allclose(np.abs(affine), np.abs(ct.grid.affine), atol=1e-2)
        assert dice(read > 0, whole == number) >= 0.98
