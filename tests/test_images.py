"""Reading and writing images: formats, scaling, orientation, faults told for people."""

from __future__ import annotations

import gzip
import os
import pickle

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813

from scripts import images
from scripts.images import ImageReadError, image_suffix, read_image, write_mask

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


@pytest.mark.parametrize(
    ("make", "message"),
    [
        pytest.param(lambda t: t / "absent.nii.gz", "no such file", id="absent"),
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
    ],
)
def test_faults_are_told(tmp_path, make, message):
    path = make(tmp_path)
    with pytest.raises(ImageReadError, match=message) as caught:
        read_image(path)
    assert str(path) in str(caught.value)
    assert caught.value.advice


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
