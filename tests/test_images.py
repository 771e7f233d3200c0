"""Reading and writing images: formats, scaling, orientation, faults told for people."""

from __future__ import annotations

import gzip
import logging
import os
import pickle
import re
import subprocess
import sys
import zlib
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk

from scripts.imaging import images
from scripts.imaging.images import ImageReadError, image_suffix, read_grid, read_image, read_scan, write_mask

BUNDLE = Path(__file__).resolve().parents[1] / "bundle"
CASES = BUNDLE.parents[1] / "shared" / "cases"
SHAPE = (7, 6, 5)
OBLIQUE = np.array([[1.9, 0.3, 0.1, -20.0], [-0.28, 1.9, -0.2, 30.0], [-0.12, 0.18, 2.95, 5.0], [0, 0, 0, 1]])


def values(dtype=np.int16):
    return np.random.default_rng(0).integers(-900, 900, size=SHAPE).astype(dtype)


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.uint16, np.float32, np.dtype(">i2"), np.dtype(">f4")])
@pytest.mark.parametrize("version", [nib.Nifti1Image, nib.Nifti2Image])
def test_nifti_as_nibabel_reads_it(tmp_path, suffix, dtype, version):
    path = tmp_path / f"a{suffix}"
    image = version(np.abs(values()).astype(dtype), OBLIQUE)
    image.header.set_data_dtype(dtype)
    nib.save(image, path)
    array, affine = read_image(path)
    reference = nib.load(path)
    np.testing.assert_array_equal(array, np.asarray(reference.dataobj))
    np.testing.assert_allclose(affine, reference.affine)
    assert array.dtype == np.dtype(dtype).newbyteorder("=")
    assert affine.dtype == np.float64


def test_big_endian_header(tmp_path):
    image = nib.Nifti1Image(values(), OBLIQUE, nib.Nifti1Header(endianness=">"))
    nib.save(image, tmp_path / "a.nii.gz")
    np.testing.assert_array_equal(read_image(tmp_path / "a.nii.gz")[0], values())


def test_scaling_is_applied(tmp_path):
    """0.25 and -3 are written into the header by hand: what the file then means is known."""
    content = bytearray(nib.Nifti1Image(values(), np.eye(4)).to_bytes())
    content[112:120] = np.array([0.25, -3.0], dtype="<f4").tobytes()  # scl_slope, scl_inter
    (tmp_path / "a.nii").write_bytes(content)
    array, _ = read_image(tmp_path / "a.nii")
    assert array.dtype == np.float32
    np.testing.assert_allclose(array, values() * 0.25 - 3.0)


def test_double_becomes_single(tmp_path):
    nib.save(nib.Nifti1Image(values(np.float64), np.eye(4)), tmp_path / "a.nii")
    assert read_image(tmp_path / "a.nii")[0].dtype == np.float32


def test_one_volume_in_four_dimensions(tmp_path):
    nib.save(nib.Nifti1Image(values()[..., None], np.eye(4)), tmp_path / "a.nii")
    assert read_image(tmp_path / "a.nii")[0].shape == SHAPE


@pytest.mark.parametrize("suffix", [".mha", ".mhd", ".nrrd"])
def test_itk_formats_lie_where_nifti_lies(tmp_path, suffix):
    """SimpleITK itself writes the same image in both formats: the two must be read alike."""
    image = sitk.GetImageFromArray(values().transpose())
    turn = np.linalg.qr(OBLIQUE[:3, :3])[0]
    image.SetDirection((turn * np.sign(np.diag(turn))).ravel().tolist())
    image.SetSpacing((0.9, 1.1, 3.0))
    image.SetOrigin((-12.0, 7.0, 40.0))
    sitk.WriteImage(image, tmp_path / f"a{suffix}")
    sitk.WriteImage(image, tmp_path / "a.nii")
    array, affine = read_image(tmp_path / f"a{suffix}")
    expected, expected_affine = read_image(tmp_path / "a.nii")
    np.testing.assert_array_equal(array, expected)
    np.testing.assert_allclose(affine, expected_affine, atol=1e-5)


@pytest.mark.parametrize("suffix", [".nii.gz", ".nii", ".mha", ".nrrd"])
def test_mask_comes_back_as_written(tmp_path, suffix):
    mask = (values() > 0).astype(np.uint8)
    affine = np.array([[0, -1.5, 0, 3.0], [1.2, 0, 0, -4.0], [0, 0, 3.0, 9.0], [0, 0, 0, 1]])
    path = tmp_path / "new" / f"a{suffix}"
    write_mask(path, mask, affine)
    array, again = read_image(path)
    np.testing.assert_array_equal(array, mask)
    np.testing.assert_allclose(again, affine, atol=1e-5)
    assert array.dtype == np.uint8
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_mask_header_is_complete_and_the_file_reproducible(tmp_path):
    for name in ("a", "b"):
        write_mask(tmp_path / f"{name}.nii.gz", np.ones(SHAPE, dtype=np.uint8), OBLIQUE)
    header = nib.load(tmp_path / "a.nii.gz").header
    assert int(header["sform_code"]) == int(header["qform_code"]) == 1
    np.testing.assert_allclose(header.get_sform(), OBLIQUE, atol=1e-5)
    assert (tmp_path / "a.nii.gz").read_bytes() == (tmp_path / "b.nii.gz").read_bytes()


@pytest.mark.parametrize(
    ("notice", "kept"),
    [
        pytest.param("trained on 899 digital phantoms", "trained on 899 digital phantoms", id="short"),
        pytest.param("x" * 79, "x" * 79, id="just_fits"),
        pytest.param("x" * 80, "x" * 76 + "...", id="too_long"),
        pytest.param("Universitätsspital", "Universit?tsspital", id="no_ascii"),
    ],
)
def test_a_mask_says_in_its_header_what_it_is(tmp_path, notice, kept):
    for name in ("a.nii.gz", "a.mha", "a.nrrd"):
        write_mask(tmp_path / name, np.ones(SHAPE, dtype=np.uint8), np.eye(4), notice)
    assert nib.load(tmp_path / "a.nii.gz").header["descrip"].item().decode() == kept
    for name in ("a.mha", "a.nrrd"):
        assert sitk.ReadImage(tmp_path / name).GetMetaData("Notice") == notice


def test_mask_file_has_the_users_permissions(tmp_path):
    (tmp_path / "plain").touch()
    write_mask(tmp_path / "a.nii.gz", np.ones(SHAPE, dtype=np.uint8), np.eye(4))
    assert os.stat(tmp_path / "a.nii.gz").st_mode == os.stat(tmp_path / "plain").st_mode  # noqa: PTH116


def test_interrupted_writing_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "a.nii.gz"
    write_mask(path, np.ones(SHAPE, dtype=np.uint8), np.eye(4))
    before = path.read_bytes()

    def stop(*_args, **_kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(images, "_nifti_bytes", stop)
    with pytest.raises(KeyboardInterrupt):
        write_mask(path, np.zeros(SHAPE, dtype=np.uint8), np.eye(4))
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def damaged(tmp_path, name: str, content: bytes):
    (tmp_path / name).write_bytes(content)
    return tmp_path / name


def good_nifti(tmp_path) -> bytes:
    nib.save(nib.Nifti1Image(values(), np.eye(4)), tmp_path / "good.nii")
    return (tmp_path / "good.nii").read_bytes()


def colour(tmp_path):
    rgb = np.zeros(SHAPE, dtype=[("R", "u1"), ("G", "u1"), ("B", "u1")])
    nib.save(nib.Nifti1Image(rgb, np.eye(4)), tmp_path / "a.nii")
    return tmp_path / "a.nii"


def four_dimensional(tmp_path):
    nib.save(nib.Nifti1Image(np.zeros((*SHAPE, 3), np.int16), np.eye(4)), tmp_path / "a.nii")
    return tmp_path / "a.nii"


def flat_affine(tmp_path):
    image = nib.Nifti1Image(values(), np.eye(4))
    image.header["sform_code"], image.header["srow_z"] = 1, 0
    content = bytearray(image.to_bytes())
    content[280:328] = bytes(48)  # the three rows of the sform
    return damaged(tmp_path, "a.nii", bytes(content))


PLACE = np.array([[-2.0, 0, 0, 90.0], [0, 2.5, 0, -70.0], [0, 0, 3.0, 40.0], [0, 0, 0, 1]])


def nifti(affine=PLACE, version=nib.Nifti1Image, **fields) -> bytes:
    """A NIfTI file with one place in sform and qform, and then ``fields`` of its header set by hand."""
    image = version(values(), affine)
    image.set_sform(affine, 1)
    image.set_qform(affine, 1)
    image.header.set_xyzt_units("mm")
    content = image.to_bytes()
    header = version.header_class(content[: version.header_class.template_dtype.itemsize], check=False)
    for name, value in fields.items():
        header[name] = value
    return header.binaryblock + content[len(header.binaryblock) :]


META = {
    **{"ObjectType": "Image", "NDims": "3", "BinaryData": "True", "BinaryDataByteOrderMSB": "False"},
    **{"CompressedData": "False", "TransformMatrix": "1 0 0 0 1 0 0 0 1", "Offset": "-90 70 40"},
    **{"AnatomicalOrientation": "RAI", "ElementSpacing": "2 2.5 3", "DimSize": "7 6 5", "ElementType": "MET_SHORT"},
}
NRRD = {
    **{"type": "short", "dimension": "3", "space": "left-posterior-superior", "sizes": "7 6 5"},
    **{"space directions": "(2,0,0) (0,2.5,0) (0,0,3)", "kinds": "domain domain domain", "endian": "little"},
    **{"encoding": "raw", "space origin": "(-90,70,40)"},
}


def written(fields: dict[str, str | None], changes: dict[str, str | None], form: str) -> str:
    return "".join(form.format(k, v) for k, v in {**fields, **changes}.items() if v is not None)


PIXELS = values().tobytes("F")


def meta(data=PIXELS, file="LOCAL", **changes) -> bytes:
    """A MetaImage file with some fields changed, or left out where None."""
    return (written(META, changes, "{} = {}\n") + f"ElementDataFile = {file}\n").encode() + data


def nrrd(data=PIXELS, **changes) -> bytes:
    changes = {name.replace("_", " "): value for name, value in changes.items()}
    return b"NRRD0004\n" + (written(NRRD, changes, "{}: {}\n") + "\n").encode() + data


def special(folder: Path, name: str, make) -> Path:
    make(folder / name)
    return folder / name


def linked(folder: Path, name: str, target: str) -> Path:
    (folder / name).symlink_to(target)
    return folder / name


def fault(name: str, content: bytes, message: str, case: str):
    return pytest.param(lambda t: damaged(t, name, content), message, id=case)


FAULTS = [
    # --- no place in space, or none of a body
    fault("a.nii", nifti(sform_code=0, qform_code=0), "sform_code and qform_code are 0", "codes_0"),
    fault("a.nii", nifti(version=nib.Nifti2Image, sform_code=0, qform_code=0), "are 0", "codes_0_of_nifti_2"),
    fault("a.nii", nifti(xyzt_units=1), r"2000 x 2500 x 3000 mm.*unit \(xyzt_units\) is metres", "metres_for_mm"),
    fault("a.nii", nifti(np.diag([980, 980, 3000, 1]), xyzt_units=0), "980.*not stated", "unit_not_told"),
    fault("a.nii", nifti(np.diag([1e6, 1, 1, 1])), "no scan of a body", "affine_of_1e6"),
    fault("a.nii", nifti(np.diag([0.0001, 1, 1, 1])), "no scan of a body", "voxels_too_small"),
    fault("a.nii", nifti(srow_x=[2, 0, 0, 1e20]), "no place in a scanner", "far_away"),
    fault("a.nii", nifti(srow_x=[np.inf, 0, 0, 9]), "no usable voxel size", "infinite"),
    fault("a.nii", nifti(srow_x=[2, 0, 0, np.nan]), "no usable voxel size", "not_a_number"),
    fault("a.nii", nifti(sform_code=0, pixdim=[1, 0, 2, 3, 0, 0, 0, 0]), "pixdim. of zero", "voxel_size_0"),
    fault("a.nii", nifti(sform_code=0, quatern_b=7), "not a complete NIfTI", "no_quaternion"),
    fault("a.mha", meta(ElementSpacing=None), "no voxel size", "meta_without_spacing"),
    fault("a.mha", meta(ElementSpacing="2 -2.5 3"), "no usable voxel size", "meta_negative_spacing"),
    fault("a.mha", meta(ElementSpacing="2 nan 3"), "not 3 finite numbers", "meta_spacing_nan"),
    fault("a.mha", meta(Offset=None), "no position in space", "meta_without_offset"),
    fault("a.mha", meta(TransformMatrix=None, AnatomicalOrientation="LPI"), "LPI only", "meta_orientation_only"),
    fault("a.mha", meta(TransformMatrix=None, AnatomicalOrientation=None), "no directions", "meta_no_directions"),
    fault("a.mha", meta(TransformMatrix=None, AnatomicalOrientation="???"), "no directions", "meta_unknown_directions"),
    fault("a.mha", meta(TransformMatrix="9 0 0 0 1 0 0 0 1"), "length 1", "meta_directions_not_of_unit_length"),
    fault("a.mha", meta(TransformMatrix="1 0 0 1 0 0 0 0 1"), "no usable voxel size", "meta_flat"),
    fault("a.mha", meta(DistanceUnits="parsec"), "DistanceUnits", "meta_unknown_unit"),
    fault("a.mha", meta(ElementSpacing="2000 2500 3000"), "no scan of a body", "meta_micrometres"),
    fault("a.nrrd", nrrd(space=None), "no position in space", "nrrd_without_space"),
    fault("a.nrrd", nrrd(space="scanner-xyz"), "scanner-xyz", "nrrd_unknown_space"),
    fault("a.nrrd", nrrd(space_origin=None), "no position in space", "nrrd_without_origin"),
    fault("a.nrrd", nrrd(space_directions="none (2,0,0) (0,0,3)"), "not 9 finite", "nrrd_without_a_direction"),
    fault("a.nrrd", nrrd(space_units='"m" "m" "m"'), "space units", "nrrd_metres"),
    # --- headers that ask for what is not there
    fault("a.mha", meta(NDims="-1"), "NDims = -1", "ndims_negative"),
    fault("a.mha", meta(NDims="99999999"), "NDims = 99999999", "ndims_huge"),
    fault("a.mha", meta(DimSize="7 6"), "not 3 integers", "two_sizes"),
    fault("a.mha", meta(DimSize="7 6 -5"), "one 3-D image", "negative_size"),
    fault("a.mha", meta(DimSize="7 1e20 5"), "not 3 integers", "size_with_exponent"),
    fault("a.mha", meta(DimSize="100000000000000000000 6 5"), "more than any scan", "size_of_1e20"),
    fault("a.mha", meta(DimSize="7 6 50"), "not a complete .mha file", "meta_cut"),
    fault("a.mha", meta(zlib.compress(PIXELS), CompressedData="True", DimSize="70 60 500"), "not a complete", "cut"),
    fault("a.mha", meta(zlib.compress(PIXELS)[:-9], CompressedData="True"), "not a complete zlib", "zlib_cut"),
    fault("a.mha", meta(DimSize="7 6 4"), "follows the last voxel", "meta_hides_a_slice"),
    fault("a.mha", meta() + b"\n" * 90, "follows the last voxel", "meta_goes_on"),
    fault("a.mha", meta(ElementNumberOfChannels="3"), "3 values per voxel", "meta_colour"),
    fault("a.mha", meta(ElementType="MET_STRING"), "not numbers", "meta_text"),
    fault("a.mha", meta(BinaryData="False"), "written as text", "meta_ascii"),
    fault("a.mha", meta(ElementToIntensityFunctionSlope="2"), "scaling", "meta_scaling"),
    fault("a.mha", b"NDims = 3\n" + meta(), "NDims is given twice", "meta_field_twice"),
    fault("a.mha", meta(Offset="0 0 0\nDimSize = 9 9 9"), "DimSize is given twice", "meta_size_twice"),
    fault("a.mha", b"ObjectType = " + b"x" * 2**17, "ends before ElementDataFile", "meta_endless_type"),
    fault("a.nrrd", b"\n" + nrrd(), "not an NRRD header", "nrrd_after_a_blank_line"),
    fault("a.mha", b"\xff\x00" * 40000, "not a MetaImage header", "meta_noise"),
    fault("a.mhd", meta(b"", "gone.raw"), "gone.raw, is not in the same folder", "mhd_without_its_file"),
    fault("a.mhd", meta(b"", "/etc/hostname"), "not a single file in the same folder", "mhd_reads_elsewhere"),
    fault("a.mhd", meta(b"", "../a.raw"), "not a single file in the same folder", "mhd_reads_above"),
    fault("a.mhd", meta(b"", "LIST"), "not a single file in the same folder", "mhd_of_a_list"),
    fault("a.mhd", meta(b"", "a%03d.raw 1 5 1"), "not a single file in the same folder", "mhd_of_a_pattern"),
    fault("a.nrrd", nrrd(data_file="/etc/hostname"), "not a single file in the same folder", "nrrd_reads_elsewhere"),
    fault("a.nrrd", nrrd(sizes="7 6 5000000000"), "more than any scan", "nrrd_huge"),
    fault("a.nrrd", nrrd(sizes="7 6 50"), "not a complete .nrrd file", "nrrd_cut"),
    fault("a.nrrd", nrrd(dimension="4"), "dimension: 4", "nrrd_of_4"),
    fault("a.nrrd", nrrd(encoding="bzip2"), "encoded as bzip2", "nrrd_bzip2"),
    fault("a.nrrd", nrrd(encoding="gzip"), "not a complete gzip", "nrrd_not_gzip"),
    fault("a.nrrd", nrrd(endian=None), "byte order", "nrrd_without_endian"),
    fault("a.nrrd", nrrd(type="block"), "not numbers", "nrrd_block"),
    fault("a.nrrd", nrrd(byte_skip="9"), "do not begin directly after the header", "nrrd_skip"),
    fault("a.nrrd", b"NRRD0004\ntype: short\n", "not a complete NRRD", "nrrd_header_cut"),
    fault("a.nii", nifti(dim=[3, 7, 6, 4, 1, 1, 1, 1]), "follows the last voxel", "nifti_hides_a_slice"),
    fault("a.nii.gz", gzip.compress(nifti(dim=[3, 7, 6, 4, 1, 1, 1, 1])), "follows the last", "gzip_hides_a_slice"),
    fault("a.nii", nifti(dim=[3, -7, 6, 5, 1, 1, 1, 1]), "one 3-D image", "nifti_negative_size"),
    fault("a.nii", nifti(dim=[3, 32767, 32767, 32767, 1, 1, 1, 1]), "more than any scan", "nifti_huge"),
    fault("a.nii", nifti(vox_offset=np.nan), "not a complete NIfTI", "nifti_offset_nan"),
    fault("a.nii", nifti(magic=b"ni1"), "of a pair", "nifti_half_of_a_pair"),
    fault("a.nii", nifti(magic=b""), "an Analyze file", "analyze"),
    fault("a.nii.gz", gzip.compress(nifti())[:-9] + b"123456789", "not a complete gzip", "checksum"),
    # --- something else altogether
    fault("a.nii.gz", b"\n<!DOCTYPE html><html>Please log in</html>", "a web page", "html"),
    fault("a.nii.gz", gzip.compress(b"<html>Please log in</html>"), "a web page", "html_in_gzip"),
    fault("a.nii.gz", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "Git LFS pointer", "lfs"),
    fault("a.mha", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "Git LFS pointer", "lfs_mha"),
    fault("a.nrrd", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "Git LFS pointer", "lfs_nrrd"),
    fault("a.nii.gz", b"PK\x03\x04" + bytes(500), "a zip archive", "zip"),
    fault("a.nii.gz", gzip.compress(gzip.compress(nifti())), "compressed by gzip", "gzip_twice"),
    fault("a.nii.gz", gzip.compress(bytes(257) + b"ustar" + bytes(300)), "a tar archive", "tar"),
    fault("a.nii", bytes(128) + b"DICM" + bytes(500), "a DICOM file", "dicom"),
    fault("a.nii", meta(), "a MetaImage file; rename it to .mha", "meta_called_nifti"),
    fault("a.mha", nifti(), "a NIfTI or Analyze file; rename it to .nii", "nifti_called_meta"),
    fault("a.mha", b"", "is empty", "empty_mha"),
]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        pytest.param(lambda t: t / "absent.nii.gz", "no such file", id="absent"),
        pytest.param(lambda t: special(t, "a.nii.gz", os.mkfifo), "it is a pipe, not a file", id="pipe"),
        pytest.param(lambda t: special(t, "a.mha", Path.mkdir), "it is a folder, not a file", id="folder"),
        pytest.param(lambda t: linked(t, "a.nii", "/dev/zero"), "it is a device or socket, not a file", id="device"),
        pytest.param(lambda t: linked(t, "a.nii", "gone"), "it is a broken link", id="dangling"),
        pytest.param(lambda t: damaged(t, "a.jpg", b"x"), "not a known image format", id="unknown_format"),
        pytest.param(lambda t: damaged(t, "a.nii.gz", b""), "is empty", id="empty"),
        pytest.param(lambda t: damaged(t, "a.nii.gz", b"no gzip at all"), "gzip", id="not_gzip"),
        pytest.param(
            lambda t: damaged(t, "a.nii.gz", gzip.compress(good_nifti(t))[:-40]), "not a complete gzip", id="cut_gzip"
        ),
        pytest.param(lambda t: damaged(t, "a.nii", good_nifti(t)[:-40]), "not a complete NIfTI", id="cut_nifti"),
        pytest.param(lambda t: damaged(t, "a.nii", good_nifti(t)[:100]), "not a complete NIfTI", id="cut_header"),
        pytest.param(lambda t: damaged(t, "a.nii", b"\0" * 500), "not a complete NIfTI", id="zeros"),
        pytest.param(lambda t: damaged(t, "a.mha", b"no image"), "not a MetaImage header", id="broken_mha"),
        pytest.param(four_dimensional, "not that of one 3-D image", id="several_volumes"),
        pytest.param(colour, "not numbers", id="colour"),
        pytest.param(flat_affine, "no usable voxel size", id="flat_affine"),
        *FAULTS,
    ],
)
def test_faults_are_told(tmp_path, make, message):
    path = make(tmp_path)
    with pytest.raises(ImageReadError, match=message) as caught:
        read_image(path)
    assert str(path) in str(caught.value)
    assert caught.value.advice


@pytest.mark.parametrize(
    ("name", "content"),
    [
        pytest.param("a.nii", nifti(), id="nifti"),
        pytest.param("a.nii", gzip.compress(nifti()), id="gzip_called_nii"),
        pytest.param("a.nii.gz", nifti(), id="nifti_called_gz"),
        pytest.param("a.nii.gz", gzip.compress(nifti()) + b"garbage after the end", id="bytes_after_the_gzip"),
        pytest.param("a.nii.gz", gzip.compress(nifti()) + bytes(512), id="padded_with_zeros"),
        pytest.param("a.nii.gz", gzip.compress(nifti()[:400]) + gzip.compress(nifti()[400:]), id="gzip_of_two_parts"),
        pytest.param("a.nii", nifti(qform_code=0), id="sform_alone"),
        pytest.param("a.nii", nifti(sform_code=0), id="qform_alone"),
        pytest.param("a.nii", nifti(xyzt_units=0), id="unit_not_told"),
        pytest.param("a.mha", meta(), id="meta"),
        pytest.param("a.mha", meta().replace(b"\n", b"\r\n", 12), id="meta_from_windows"),
        pytest.param("a.mha", meta(TransformMatrix=None), id="meta_directions_by_letters"),
        pytest.param("a.mha", meta(Offset=None, Position="-90 70 40"), id="meta_by_another_name"),
        pytest.param("a.mha", meta(DistanceUnits="cm", ElementSpacing=".2 .25 .3", Offset="-9 7 4"), id="meta_in_cm"),
        pytest.param("a.mha", meta(zlib.compress(PIXELS), CompressedData="True"), id="meta_packed"),
        pytest.param("a.mha", meta(gzip.compress(PIXELS), CompressedData="True"), id="meta_packed_by_gzip"),
        pytest.param("a.mha", meta(values(">i2").tobytes("F"), BinaryDataByteOrderMSB="True"), id="meta_big_endian"),
        pytest.param("a.nrrd", nrrd(), id="nrrd"),
        pytest.param("a.nrrd", nrrd(gzip.compress(PIXELS), encoding="gz"), id="nrrd_packed"),
        pytest.param("a.nrrd", nrrd(values(">i2").tobytes("F"), endian="big"), id="nrrd_big_endian"),
        pytest.param(
            "a.nrrd",
            nrrd(space="RAS", space_directions="(-2,0,0) (0,-2.5,0) (0,0,3)", space_origin="(90,-70,40)"),
            id="nrrd_in_ras",
        ),
        pytest.param("a.nrrd", nrrd().replace(b"type:", b"# a comment\nmine:=type: no\ntype:"), id="nrrd_comments"),
    ],
)
def test_what_is_whole_is_read_without_a_doubt(tmp_path, name, content):
    path = damaged(tmp_path, name, content)
    array, affine, doubts = read_scan(path)
    np.testing.assert_array_equal(array, values())
    expected = PLACE if name.startswith("a.nii") else PLACE @ np.diag([1, -1, 1, 1])
    np.testing.assert_allclose(affine, expected, atol=1e-5)
    assert doubts == ()
    grid = read_grid(path)
    assert grid.shape == SHAPE
    np.testing.assert_array_equal(grid.affine, affine)


@pytest.mark.parametrize(("unit", "factor"), [(1, 1e-3), (2, 1.0), (3, 1e3)])
@pytest.mark.parametrize("codes", [{"sform_code": 0}, {"qform_code": 0}, {}])
def test_metres_and_micrometres_become_millimetres(tmp_path, unit, factor, codes):
    content = nifti(np.diag([factor] * 3 + [1]) @ PLACE, xyzt_units=unit, **codes)
    _, affine, doubts = read_scan(damaged(tmp_path, "a.nii", content))
    np.testing.assert_allclose(affine, PLACE, rtol=1e-5)
    assert doubts == ()


@pytest.mark.parametrize(
    ("name", "content", "doubt"),
    [
        pytest.param("a.nii", nifti(qoffset_x=102), "sform and its qform are up to 12 mm apart", id="shifted"),
        pytest.param("a.nii", nifti(quatern_c=0.9), "sform and its qform are up to", id="turned"),
        pytest.param("a.nii", nifti(quatern_b=7), "qform is invalid", id="no_rotation"),
        pytest.param("a.nii", nifti(qoffset_x=np.nan), "qform is invalid", id="qform_not_a_number"),
        pytest.param("a.nii", nifti(qoffset_x=np.inf), "qform is invalid", id="qform_infinite"),
        pytest.param("a.nii", nifti(srow_y=[0, -2.5, 0, -70]), "sform and its qform are up to", id="mirrored"),
        pytest.param(
            "a.nii",
            nifti(qform_code=0, srow_z=[0, 0, 6, 40]),
            "voxels of 2 x 2.5 x 6 mm, its pixdim 2 x 2.5 x 3",
            id="size",
        ),
        pytest.param("a.nii", nifti(qform_code=0, srow_x=[-2, 0.1, 0, 90]), "2.29 degrees from right", id="sheared"),
        pytest.param("a.nii", nifti(np.eye(4)), "not known", id="identity"),
        pytest.param("a.mha", meta(ElementSpacing="1 1 1", Offset="0 0 0"), "not known", id="meta_identity"),
        pytest.param("a.mha", meta(TransformMatrix="1 0 0 .1 .995 0 0 0 1"), "right angles", id="meta_sheared"),
        pytest.param("a.mha", meta(PIXELS[:99] + b"x" + PIXELS[99:]), "1 bytes follow", id="a_byte_put_in"),
    ],
)
def test_a_doubtful_place_is_said(tmp_path, name, content, doubt):
    _, _, doubts = read_scan(damaged(tmp_path, name, content))
    assert len(doubts) == 1
    assert doubt in doubts[0]


def test_the_sform_goes_first(tmp_path):
    path = damaged(tmp_path, "a.nii", nifti(qoffset_x=102))
    np.testing.assert_allclose(read_image(path)[1], nib.load(path).affine)


def test_bytes_after_the_gzip_are_told_in_the_log(tmp_path, caplog):
    with caplog.at_level(logging.WARNING, "scripts.imaging.images"):
        read_image(damaged(tmp_path, "a.nii.gz", gzip.compress(nifti()) + b"garbage"))
    assert "7 bytes after the end" in caplog.text


@pytest.mark.parametrize("compressed", [False, True])
def test_voxels_in_a_file_beside_the_header(tmp_path, compressed):
    data = zlib.compress(PIXELS) if compressed else PIXELS
    (tmp_path / "voxels.raw").write_bytes(data if compressed else bytes(11) + data)
    (tmp_path / "voxels.gz").write_bytes(gzip.compress(PIXELS))
    skip = {"CompressedData": "True"} if compressed else {"HeaderSize": "-1"}
    path = damaged(tmp_path, "a.mhd", meta(b"", "voxels.raw", **skip))
    np.testing.assert_array_equal(read_image(path)[0], values())
    path = damaged(tmp_path, "a.nrrd", nrrd(b"", encoding="gzip", data_file="voxels.gz"))
    np.testing.assert_array_equal(read_image(path)[0], values())


REFUSE = """
import resource, sys
sys.path.insert(0, sys.argv[1])
from scripts.imaging.images import ImageReadError, read_image
pages = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (pages + 2**26, pages + 2**26))
for path in sys.argv[2:]:
    try:
        read_image(path)
    except ImageReadError as error:
        print(error)
    else:
        print(path, "was read")
"""


def bomb(written) -> bytes:
    """5 GB of zeros in some MB: 2000 x 2000 x 1250 bytes, with a header of ``written``."""
    pack = zlib.compressobj(wbits=31 if written is nifti else 15)
    start = nifti(dim=[3, 2000, 2000, 1250, 1, 1, 1, 1], datatype=2, bitpix=8)[:352] if written is nifti else b""
    packed = pack.compress(start) + pack.flush(zlib.Z_FULL_FLUSH)
    packed += 500 * (pack.compress(bytes(10**7)) + pack.flush(zlib.Z_FULL_FLUSH))
    fields = {"ElementType": "MET_UCHAR", "CompressedData": "True", "DimSize": "2000 2000 1250"}
    return packed if written is nifti else meta(packed, CompressedDataSize=str(len(packed)), **fields)


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory is limited by /proc and RLIMIT_AS, of Linux")
def test_what_is_refused_takes_no_memory(tmp_path):
    """64 MB are left to a process that is given what would take gigabytes, or ended the process in SimpleITK."""
    hostile = {
        "ndims.mha": meta(NDims="99999999"),
        "size.mha": meta(DimSize="100000000000000000000 6 5"),
        "gigabytes.mha": meta(DimSize="1000 1000 500", CompressedData="True"),
        "bomb.mha": bomb(meta),
        "bomb.nii.gz": bomb(nifti),
        "inside.nii.gz": gzip.compress(nifti() + bytes(10**8)),
        "affine.nii": nifti(np.diag([1e6, 1e6, 1e6, 1])),
        "offset.nii": nifti(vox_offset=1.9e9),
        "sizes.nrrd": nrrd(sizes="1000 1000 500", encoding="gzip"),
        "long.mha": b"NDims = 3\n" + b"x" * 10**8,
    }
    paths = [damaged(tmp_path, name, content) for name, content in hostile.items()]
    run = subprocess.run([sys.executable, "-c", REFUSE, BUNDLE, *paths], capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    lines = run.stdout.splitlines()
    assert [re.match(r".*/(\S+?):? ", line)[1] for line in lines] == list(hostile)
    assert "was read" not in run.stdout


@pytest.mark.skipif(not CASES.is_dir(), reason="no ../shared/cases")
@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("nifti-codes-0/*/*.nii.gz", "no position in space"),
        ("mha_segv/in/CHUM-40005/*CT.mha", "NDims = 99999999"),
        ("mha_segv/in/CHUM-40010/*.mha", ""),
        ("gz-messages/*/*.nii.gz", ""),
    ],
)
def test_cases_of_the_field(pattern, message):
    found = sorted(CASES.glob(pattern))
    assert found
    for path in found:
        if message:
            with pytest.raises(ImageReadError, match=message):
                read_image(path)
        else:
            assert read_scan(path)[2] == ()


def test_error_survives_a_worker_process():
    error = pickle.loads(pickle.dumps(ImageReadError("a.nii", "broken", "copy it again")))
    assert str(error) == "a.nii: broken; copy it again"


@pytest.mark.parametrize(
    ("name", "mask", "message"),
    [("a.txt", np.zeros(SHAPE), "masks are written"), ("a.nii", np.zeros((1, *SHAPE)), "three axes")],
)
def test_what_cannot_be_written(tmp_path, name, mask, message):
    with pytest.raises(ValueError, match=message):
        write_mask(tmp_path / name, mask, np.eye(4))


@pytest.mark.parametrize(
    ("name", "suffix"), [("a.nii.gz", ".nii.gz"), ("a.NII", ".nii"), ("x.y.mha", ".mha"), ("a.gz", ""), ("nii", "")]
)
def test_image_suffix(name, suffix):
    assert image_suffix(name) == suffix
