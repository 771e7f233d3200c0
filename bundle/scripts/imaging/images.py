"""Reading and writing of NIfTI, MetaImage and NRRD files.

Arrays are (X, Y, Z) as nibabel gives them, with the affine from voxel index to world millimetres (RAS+).
"""

from __future__ import annotations

import logging
import os
from importlib import import_module
from pathlib import Path
from types import ModuleType

import nibabel as nib
import numpy as np

from scripts.cohorts.files import written_whole
from scripts.cohorts.scans import no_file
from scripts.imaging.geometry import Grid
from scripts.imaging.headers import (
    COPY_AGAIN,
    GZIP,
    GZIP_MAGIC,
    ITK_SUFFIXES,
    LPS_TO_RAS,
    MORE_THAN_TOLD,
    NIFTI_SUFFIXES,
    Header,
    ImageReadError,
    read_header,
    zlib,
)

try:
    gzip: ModuleType = import_module("isal.igzip")
except ImportError:
    gzip = import_module("gzip")

logger = logging.getLogger(__name__)

NIFTI_LETTERS = 79  # of the field descrip
CHUNK_BYTES = 2**20


def image_suffix(path: str | os.PathLike[str]) -> str:
    """The suffix of an image file in lower case, ``""`` when the format is not known.

    Example:
        >>> image_suffix("CHUM-001__CT.NII.GZ")
        '.nii.gz'
    """
    name = Path(path).name.lower()
    return next((s for s in (*NIFTI_SUFFIXES[::-1], *ITK_SUFFIXES) if name.endswith(s)), "")


def read_image(path: str | os.PathLike[str]) -> tuple[np.ndarray, np.ndarray]:
    """Array and affine of a 3-D image, see :func:`read_scan`."""
    return read_scan(path)[:2]


def read_scan(path: str | os.PathLike[str]) -> tuple[np.ndarray, np.ndarray, tuple[str, ...]]:
    """Read a 3-D image.

    The header is checked before the voxels are read (:mod:`scripts.imaging.headers`), so that no memory is
    allocated for a file that is refused.

    Args:
        path: ``.nii``, ``.nii.gz``, ``.mha``, ``.mhd`` or ``.nrrd``.

    Returns:
        The (X, Y, Z) array, in the file's data type where the header has no scaling and in float32 otherwise (float64
        becomes float32); the (4, 4) float64 affine to world mm (RAS+); and doubts about the position in space.

    Raises:
        ImageReadError: the file does not exist, is damaged, of an unknown format, not a 3-D image of numbers, or has
            no usable position in space.
    """
    header = _header(path)
    try:
        with header.path.open("rb") as file:
            file.seek(header.start)
            content = file.read() if header.packed else file.read(header.end)
        if header.packed:
            content = _unpack(content, header, path)
        raw = np.frombuffer(content, header.dtype, int(np.prod(header.shape)), header.skip)
    except (OSError, ValueError) as error:
        raise ImageReadError(path, f"cannot be read ({error})", COPY_AGAIN) from error
    return _scaled(raw.reshape(header.shape, order="F"), header.slope, header.inter), header.affine, header.doubts


def read_grid(path: str | os.PathLike[str]) -> Grid:
    """The grid of a 3-D image, from its header; errors as :func:`read_scan`."""
    header = _header(path)
    return Grid(header.shape, header.affine)


def write_mask(path: str | os.PathLike[str], mask: np.ndarray, affine: np.ndarray, notice: str = "") -> None:
    """Write a label image atomically (:func:`scripts.cohorts.files.written_whole`).

    NIfTI has the affine as sform and as qform. Compression is gzip level 1 without a time stamp, so that equal masks
    give equal files.

    Args:
        path: the file; the suffix chooses the format (see :func:`read_scan`).
        mask: (X, Y, Z) integers between 0 and 255.
        affine: (4, 4) voxel index to world mm (RAS+).
        notice: a text for the header: ``descrip`` of NIfTI, which holds the first 79 characters, or ``Notice``.

    Raises:
        ValueError: the suffix is not known, or the mask is not three-dimensional.
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


def _header(path: str | os.PathLike[str]) -> Header:
    suffix = image_suffix(path)
    if not suffix:
        known = ", ".join((*NIFTI_SUFFIXES, *ITK_SUFFIXES))
        raise ImageReadError(path, "not a known image format", f"give one of {known}")
    if not Path(path).is_file():
        what = f"it is {no_file(Path(path))}" if os.path.lexists(path) else "no such file"
        raise ImageReadError(path, what, "check the path in the datalist or in dataset_dir")
    return read_header(path, suffix)


def _unpack(content: bytes, header: Header, path: str | os.PathLike[str]) -> bytes:
    """The decompressed bytes up to the last voxel; further data are checked and discarded."""
    name = "gzip file" if header.packed == GZIP else "zlib stream"
    parts, room, surplus = [], header.end, 0
    stream = zlib.decompressobj(header.packed)
    try:
        while True:
            part = stream.decompress(content, room or CHUNK_BYTES)
            if room:
                parts.append(part)
                room -= len(part)
            else:
                surplus += len(part)
            if surplus >= header.slice_bytes:
                raise ImageReadError(path, MORE_THAN_TOLD, COPY_AGAIN)
            if stream.eof and stream.unused_data.startswith(GZIP_MAGIC) and header.packed == GZIP:
                content, stream = stream.unused_data, zlib.decompressobj(GZIP)  # several gzip members
                continue
            if stream.eof or not (part or stream.unconsumed_tail):
                break
            content = stream.unconsumed_tail
    except zlib.error as error:
        raise ImageReadError(path, f"not a complete {name} ({error})", "copy it again") from error
    if not stream.eof or room:
        raise ImageReadError(path, f"not a complete {name}", "copy it again")
    if stream.unused_data.strip(b"\0"):
        logger.warning("%s: %d bytes after the end of the %s are ignored", path, len(stream.unused_data), name)
    return parts[0] if len(parts) == 1 else b"".join(parts)


def _scaled(raw: np.ndarray, slope: float, inter: float) -> np.ndarray:
    """Values in native byte order, with the header's scaling applied."""
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
    image.set_qform(affine, code=1)  # without shear, which a qform cannot represent; readers prefer the sform
    image.header.set_xyzt_units("mm")
    letters = notice.encode("ascii", "replace")
    image.header["descrip"] = letters if len(letters) <= NIFTI_LETTERS else letters[: NIFTI_LETTERS - 3] + b"..."
    content = image.to_bytes()
    return gzip.compress(content, 1, mtime=0) if compress else content


def _write_itk(path: str, mask: np.ndarray, affine: np.ndarray, notice: str) -> None:
    import SimpleITK as sitk

    lps = LPS_TO_RAS @ affine
    spacing = np.linalg.norm(lps[:3, :3], axis=0)
    image = sitk.GetImageFromArray(np.ascontiguousarray(mask.astype(np.uint8, copy=False).transpose()))
    image.SetSpacing(spacing.tolist())
    image.SetDirection((lps[:3, :3] / spacing).ravel().tolist())
    image.SetOrigin(lps[:3, 3].tolist())
    if notice:
        image.SetMetaData("Notice", notice)
    sitk.WriteImage(image, path, useCompression=True)
