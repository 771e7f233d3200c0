"""Images from and to files: NIfTI quickly, other formats through SimpleITK.

Arrays are (X, Y, Z) as nibabel gives them, with the affine from voxel index to world millimetres (RAS+).
"""

from __future__ import annotations

import os
from importlib import import_module
from io import BytesIO
from pathlib import Path
from types import ModuleType

import nibabel as nib
import numpy as np

from scripts.files import written_whole

try:  # the same format and the same answer, two to four times as quick
    gzip: ModuleType = import_module("isal.igzip")
    zlib: ModuleType = import_module("isal.isal_zlib")
except ImportError:
    gzip, zlib = import_module("gzip"), import_module("zlib")

NIFTI_SUFFIXES = (".nii", ".nii.gz")
ITK_SUFFIXES = (".mha", ".mhd", ".nrrd")
NIFTI_LETTERS = 79  # of its description
# World axes of ITK are LPS+, those of NIfTI RAS+.
LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])


class ImageReadError(Exception):
    """An image file that cannot be used, told for people: which file, why, and what to do.

    Args:
        path: the file.
        reason: what is wrong with it.
        advice: what the reader can do about it.
    """

    def __init__(self, path: str | os.PathLike[str], reason: str = "", advice: str = "") -> None:
        super().__init__(path, reason, advice)
        self.path, self.reason, self.advice = str(path), reason, advice

    def __str__(self) -> str:
        return "; ".join(
            part for part in (f"{self.path}: {self.reason}" if self.reason else self.path, self.advice) if part
        )


def image_suffix(path: str | os.PathLike[str]) -> str:
    """The known ending of an image's file name in lower case, ``""`` when the format is not known.

    Example:
        >>> image_suffix("CHUM-001__CT.NII.GZ")
        '.nii.gz'
    """
    name = Path(path).name.lower()
    return next((s for s in (*NIFTI_SUFFIXES[::-1], *ITK_SUFFIXES) if name.endswith(s)), "")


def read_image(path: str | os.PathLike[str]) -> tuple[np.ndarray, np.ndarray]:
    """Read a 3-D image.

    Args:
        path: ``.nii``, ``.nii.gz``, ``.mha``, ``.mhd`` or ``.nrrd``.

    Returns:
        The (X, Y, Z) array, in the file's own data type when the header asks for no scaling and in float32
        otherwise (float64 files become float32), and the (4, 4) float64 affine to world mm (RAS+).

    Raises:
        ImageReadError: when the file is absent, of an unknown format, damaged, not a 3-D image of numbers, or
            without a usable position in space.
    """
    suffix = image_suffix(path)
    if not suffix:
        known = ", ".join((*NIFTI_SUFFIXES, *ITK_SUFFIXES))
        raise ImageReadError(path, "not a known image format", f"give one of {known}")
    if not Path(path).is_file():
        raise ImageReadError(path, "no such file", "check the path in the datalist or in dataset_dir")
    array, affine = _read_nifti(path, suffix) if suffix in NIFTI_SUFFIXES else _read_itk(path)
    if array.dtype.kind not in "biuf":
        raise ImageReadError(path, f"voxels are of type {array.dtype}, not numbers", "convert it to one value a voxel")
    if not np.isfinite(affine).all() or abs(np.linalg.det(affine)) < 1e-12:
        raise ImageReadError(path, "the header gives no usable voxel size or direction", "write its affine again")
    return _three_dimensional(array, path), affine


def write_mask(path: str | os.PathLike[str], mask: np.ndarray, affine: np.ndarray, notice: str = "") -> None:
    """Write a label image so that a reader never meets half a file.

    The file is written under a temporary name in the same folder and then renamed. NIfTI carries the affine as sform
    and as qform; gzip is at its quickest level, which is small enough for masks, and without a time stamp, so that
    equal masks give equal files.

    Args:
        path: where to; the ending chooses the format (see :func:`read_image`), folders are made.
        mask: (X, Y, Z) integers between 0 and 255.
        affine: (4, 4) voxel index to world mm (RAS+).
        notice: what whoever opens the file must know, for its header: ``descrip`` of NIfTI, which holds the first 79
            letters, or ``Notice``.

    Raises:
        ValueError: when the ending is not known or the mask is not three-dimensional.
    """
    path = Path(path)
    suffix = image_suffix(path)
    if not suffix or suffix == ".mhd":
        raise ValueError(f"{path}: masks are written as .nii.gz, .nii, .mha or .nrrd")
    if mask.ndim != 3:
        raise ValueError(f"{path}: a mask has three axes, got shape {mask.shape}")
    with written_whole(path) as partial:
        if suffix in NIFTI_SUFFIXES:
            partial.write_bytes(_nifti_bytes(mask, affine, notice, compress=suffix == ".nii.gz"))
        else:
            _write_itk(str(partial), mask, affine, notice)


def _read_nifti(path: str | os.PathLike[str], suffix: str) -> tuple[np.ndarray, np.ndarray]:
    """Decode a NIfTI file in memory: quicker than nibabel's own way, which seeks in the compressed file."""
    try:
        content = Path(path).read_bytes()
        if suffix == ".nii.gz":
            content = gzip.decompress(content)
    except (OSError, EOFError, zlib.error) as error:
        raise ImageReadError(path, f"not a complete gzip file ({error})", "copy it again") from error
    kind = nib.Nifti2Image if _is_nifti2(content) else nib.Nifti1Image
    try:
        header = kind.header_class.from_fileobj(BytesIO(content))
        dtype, shape, offset = header.get_data_dtype(), header.get_data_shape(), header.get_data_offset()
        raw = np.frombuffer(content, dtype, int(np.prod(shape, dtype=np.int64)), offset).reshape(shape, order="F")
        slope, inter = header.get_slope_inter()
        affine = np.asarray(header.get_best_affine(), dtype=np.float64)
    except (nib.spatialimages.HeaderDataError, nib.wrapstruct.WrapStructError, ValueError) as error:
        raise ImageReadError(path, f"not a complete NIfTI file ({error})", "copy or convert it again") from error
    return _scaled(raw, 1.0 if slope is None else slope, 0.0 if inter is None else inter), affine


def _is_nifti2(content: bytes) -> bool:
    return content[:4] in (b"\x1c\x02\x00\x00", b"\x00\x00\x02\x1c")  # header size 540 in either byte order


def _scaled(raw: np.ndarray, slope: float, inter: float) -> np.ndarray:
    """Values in this machine's byte order, with the header's scaling applied where it asks for any."""
    if (slope, inter) == (1.0, 0.0):
        dtype = np.dtype(np.float32) if raw.dtype.kind == "f" else raw.dtype.newbyteorder("=")
        return raw.astype(dtype, copy=False)
    scaled = raw.astype(np.float32)
    scaled *= np.float32(slope)
    scaled += np.float32(inter)
    return scaled


def _nifti_bytes(mask: np.ndarray, affine: np.ndarray, notice: str, compress: bool) -> bytes:
    image = nib.Nifti1Image(mask.astype(np.uint8, copy=False), affine)
    image.set_sform(affine, code=1)
    image.set_qform(affine, code=1)  # without the shears, which a qform cannot hold; readers prefer the sform
    image.header.set_xyzt_units("mm")
    letters = notice.encode("ascii", "replace")
    image.header["descrip"] = letters if len(letters) <= NIFTI_LETTERS else letters[: NIFTI_LETTERS - 3] + b"..."
    content = image.to_bytes()
    return gzip.compress(content, 1, mtime=0) if compress else content


def _read_itk(path: str | os.PathLike[str]) -> tuple[np.ndarray, np.ndarray]:
    """Read through SimpleITK, which is only needed for its own formats."""
    import SimpleITK as sitk  # noqa: N813

    try:
        image = sitk.ReadImage(str(path))
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1]
        raise ImageReadError(path, f"SimpleITK cannot read it ({reason})", "copy or convert it again") from error
    if image.GetNumberOfComponentsPerPixel() != 1 or image.GetDimension() != 3:
        reason = f"{image.GetDimension()} dimensions, {image.GetNumberOfComponentsPerPixel()} values a voxel"
        raise ImageReadError(path, reason, "give a 3-D image with one value a voxel")
    affine = np.eye(4)
    affine[:3, :3] = np.array(image.GetDirection()).reshape(3, 3) * np.array(image.GetSpacing())
    affine[:3, 3] = image.GetOrigin()
    array = sitk.GetArrayFromImage(image).transpose()
    return (array.astype(np.float32) if array.dtype == np.float64 else array), LPS_TO_RAS @ affine


def _write_itk(path: str, mask: np.ndarray, affine: np.ndarray, notice: str) -> None:
    import SimpleITK as sitk  # noqa: N813

    lps = LPS_TO_RAS @ affine
    spacing = np.linalg.norm(lps[:3, :3], axis=0)
    image = sitk.GetImageFromArray(np.ascontiguousarray(mask.astype(np.uint8, copy=False).transpose()))
    image.SetSpacing(spacing.tolist())
    image.SetDirection((lps[:3, :3] / spacing).ravel().tolist())
    image.SetOrigin(lps[:3, 3].tolist())
    if notice:
        image.SetMetaData("Notice", notice)
    sitk.WriteImage(image, path, useCompression=True)


def _three_dimensional(array: np.ndarray, path: str | os.PathLike[str]) -> np.ndarray:
    """Drop trailing axes of length one; anything but three axes then is an error."""
    while array.ndim > 3 and array.shape[-1] == 1:
        array = array[..., 0]
    if array.ndim != 3 or array.size == 0:
        raise ImageReadError(path, f"shape {array.shape} is not that of one 3-D image", "give a single volume")
    return array
