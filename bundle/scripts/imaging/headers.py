"""Headers of NIfTI, MetaImage and NRRD files, checked before memory is allocated for the voxels.

A header is checked against the size of the file, the possible size of a scan, and for consistency. SimpleITK is not
used for MetaImage and NRRD: it crashes the process on some damaged headers and allocates whatever memory a header
states.
"""

from __future__ import annotations

import logging
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from io import BytesIO
from pathlib import Path
from types import ModuleType

import nibabel as nib
import numpy as np

from scripts.imaging.geometry import field_of_view_fault

try:  # same results, two to four times faster
    zlib: ModuleType = import_module("isal.isal_zlib")
except ImportError:
    zlib = import_module("zlib")

NIFTI_SUFFIXES = (".nii", ".nii.gz")
ITK_SUFFIXES = (".mha", ".mhd", ".nrrd")
# World axes of ITK are LPS+, those of NIfTI RAS+.
LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])

HEAD_BYTES = 2**16  # longer than any header; NIfTI has 348 or 540 bytes
MAX_BYTES = 2**31
MAX_RATIO = 1040  # deflate compresses by at most 1032
GZIP_MAGIC = b"\x1f\x8b"
GZIP, ZLIB = 31, 15  # window bits, which select the format in zlib

# Tolerance between two statements of the geometry in one header.
SPACING_TOLERANCE = 0.01
PLACE_TOLERANCE_MM = 1.0
SHEAR_TOLERANCE_DEG = 1.0

COPY_AGAIN = "copy or convert it again"
CONVERT_AGAIN = "convert it again from DICOM with a tool that keeps the geometry, such as dcm2niix"
NO_POSITION = "the header gives no position in space"
MORE_THAN_TOLD = "a slice or more of data follows the last voxel: the header does not describe all of it"
ONE_VOLUME = "give a 3-D image with one value per voxel"

_UNIT_MM = {0: 1.0, 1: 1000.0, 2: 1.0, 3: 0.001}  # NIfTI's xyzt_units: not stated, metres, millimetres, micrometres
_UNIT_NAME = {1: "metres", 3: "micrometres"}
_META_TYPES = {
    **{"MET_CHAR": "i1", "MET_UCHAR": "u1", "MET_SHORT": "i2", "MET_USHORT": "u2", "MET_INT": "i4", "MET_UINT": "u4"},
    **{"MET_LONG": "i4", "MET_ULONG": "u4", "MET_LONG_LONG": "i8", "MET_ULONG_LONG": "u8"},
    **{"MET_FLOAT": "f4", "MET_DOUBLE": "f8"},
}
_META_ALIASES = {
    **{"Position": "Offset", "Origin": "Offset", "Rotation": "TransformMatrix", "Orientation": "TransformMatrix"},
    **{"ElementSize": "ElementSpacing", "ElementByteOrderMSB": "BinaryDataByteOrderMSB"},
}
_META_SCALING = (("ElementToIntensityFunctionSlope", 1.0), ("ElementToIntensityFunctionOffset", 0.0))
_META_UNITS = {"?": 1.0, "mm": 1.0, "cm": 10.0, "um": 0.001}
_NRRD_TYPES = {
    **{"signed char": "i1", "int8": "i1", "int8_t": "i1", "uchar": "u1", "unsigned char": "u1", "uint8": "u1"},
    **{"uint8_t": "u1", "short": "i2", "short int": "i2", "signed short": "i2", "signed short int": "i2"},
    **{"int16": "i2", "int16_t": "i2", "ushort": "u2", "unsigned short": "u2", "unsigned short int": "u2"},
    **{"uint16": "u2", "uint16_t": "u2", "int": "i4", "signed int": "i4", "int32": "i4", "int32_t": "i4"},
    **{"uint": "u4", "unsigned int": "u4", "uint32": "u4", "uint32_t": "u4", "longlong": "i8", "long long": "i8"},
    **{"long long int": "i8", "int64": "i8", "int64_t": "i8", "ulonglong": "u8", "unsigned long long": "u8"},
    **{"uint64": "u8", "uint64_t": "u8", "float": "f4", "double": "f8"},
}
_NRRD_ALIASES = {"datafile": "data file", "lineskip": "line skip", "byteskip": "byte skip"}
_NRRD_SPACES = {  # to RAS+
    **dict.fromkeys(("right-anterior-superior", "ras"), np.eye(4)),
    **dict.fromkeys(("left-anterior-superior", "las"), np.diag([-1.0, 1.0, 1.0, 1.0])),
    **dict.fromkeys(("left-posterior-superior", "lps"), LPS_TO_RAS),
}

# Other file types by their signature (and its position): what it is, what to do.
_STRANGERS: tuple[tuple[int, bytes, str, str], ...] = (
    (0, b"version https://git-lfs", "a Git LFS pointer, not the file itself", "fetch the file with git lfs pull"),
    (0, b"<!doctype html", "a web page", "download the file again; the server may want a login"),
    (0, b"<html", "a web page", "download the file again; the server may want a login"),
    (0, b"<?xml", "an XML text", "download the file again; the server may want a login"),
    (0, b"pk\x03\x04", "a zip archive", "unpack it"),
    (0, b"bzh", "compressed by bzip2", "unpack it"),
    (0, b"\xfd7zxz", "compressed by xz", "unpack it"),
    (0, b"7z\xbc\xaf", "a 7z archive", "unpack it"),
    (0, GZIP_MAGIC, "compressed by gzip, which this format does not support", "unpack it"),
    (257, b"ustar", "a tar archive", "unpack it"),
    (128, b"dicm", "a DICOM file", "give the folder that holds the series"),
    (0, b"nrrd", "an NRRD file", "rename it to .nrrd"),
    (0, b"objecttype", "a MetaImage file", "rename it to .mha or .mhd"),
    (0, b"\x5c\x01\x00\x00", "a NIfTI or Analyze file", "rename it to .nii"),
    (0, b"\x89hdf", "an HDF5 file", "convert it to .nii.gz"),
)


class ImageReadError(Exception):
    """An image file that cannot be used: which file, why, and what to do.

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


class _Fault(Exception):  # noqa: N818 - raised on as an ImageReadError
    """What is wrong with a header, and what to do: an :class:`ImageReadError` without the path."""


@dataclass(frozen=True)
class Header:
    """Position of the voxels of a 3-D image in its file and in space."""

    path: Path  # file with the voxels; for .mhd not that of the header
    shape: tuple[int, int, int]  # voxels along x, y, z
    dtype: np.dtype  # of the stored numbers, byte order included
    affine: np.ndarray  # (4, 4) float64, voxel index to world mm (RAS+)
    start: int = 0  # first byte of the (compressed) voxels in the file
    packed: int | None = None  # GZIP or ZLIB where they are compressed
    skip: int = 0  # bytes before the voxels, after decompression
    slope: float = 1.0  # the values are slope * stored + inter
    inter: float = 0.0
    doubts: tuple[str, ...] = ()  # inconsistencies in it, as texts

    @property
    def slice_bytes(self) -> int:
        """Bytes of one slice (z)."""
        return self.shape[0] * self.shape[1] * self.dtype.itemsize

    @property
    def end(self) -> int:
        """Bytes from ``start`` to the last voxel, after decompression."""
        return self.skip + self.slice_bytes * self.shape[2]


def read_header(path: str | os.PathLike[str], suffix: str) -> Header:
    """Read and check the header of an image file.

    Raises:
        ImageReadError: the header is damaged, does not match the file's size, or has no possible position in space.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            head = file.read(HEAD_BYTES)
        header = _parse(path, head, suffix)
        header = _check_size(header, "NIfTI" if suffix in NIFTI_SUFFIXES else suffix)
    except _Fault as fault:
        raise ImageReadError(path, *fault.args) from fault.__cause__
    except OSError as error:
        raise ImageReadError(path, f"cannot be read ({error.strerror})", "check its permissions") from error
    return header


def _parse(path: Path, head: bytes, suffix: str) -> Header:
    if not head:
        raise _Fault("the file is empty", "copy it again")
    if suffix in NIFTI_SUFFIXES:
        packed = head.startswith(GZIP_MAGIC)  # whatever the suffix: both occur with either
        return _nifti_header(path, _unpack_head(head) if packed else head, GZIP if packed else None)
    if suffix == ".nrrd":
        return _nrrd_header(path, head)
    return _meta_header(path, head)


def _unpack_head(head: bytes) -> bytes:
    try:
        unpacked: bytes = zlib.decompressobj(GZIP).decompress(head, HEAD_BYTES)
    except zlib.error as error:
        raise _Fault(f"not a complete gzip file ({error})", "copy it again") from error
    return unpacked


def _check_size(header: Header, name: str) -> Header:
    """The header, after a check against the size of its file."""
    if header.dtype.kind not in "biuf":
        raise _Fault(f"voxels are of type {header.dtype}, not numbers", "convert it to one value per voxel")
    if fault := field_of_view_fault(header.shape, header.affine):
        raise _Fault("; ".join([fault, *header.doubts]), f"correct its geometry, or {CONVERT_AGAIN}")
    if header.end > MAX_BYTES:
        raise _Fault(f"the header states {header.end / 2**30:.3g} GiB, more than any scan has", COPY_AGAIN)
    stored = header.path.stat().st_size - header.start
    if stored * (MAX_RATIO if header.packed else 1) < header.end:
        bytes_there = f"{stored} bytes{' (compressed)' if header.packed else ''} of {header.end}"
        raise _Fault(f"not a complete {name} file ({bytes_there})", COPY_AGAIN)
    # compression enlarges incompressible data by some bytes per thousand
    if stored - header.end * (1.01 if header.packed else 1) >= max(header.slice_bytes, 2**16 if header.packed else 1):
        raise _Fault(MORE_THAN_TOLD, COPY_AGAIN)
    if not header.packed and stored > header.end:
        more = (
            f"{stored - header.end} bytes follow its last voxel: was data inserted, or is the header of another file?"
        )
        return replace(header, doubts=(*header.doubts, more))
    return header


def _check_strangers(head: bytes, own: bytes = b"") -> None:
    """Refuse a file with the signature of another type than that of its suffix, whose signature is ``own``."""
    for offset, magic, what, advice in _STRANGERS:
        if magic != own and (head if offset else head.lstrip())[offset : offset + len(magic)].lower() == magic:
            raise _Fault(f"it is {what}", advice)


# --- NIfTI ------------------------------------------------------------------------------------------------------------


def _nifti_header(path: Path, head: bytes, packed: int | None) -> Header:
    sizes = {b"\x5c\x01\x00\x00", b"\x00\x00\x01\x5c", b"\x1c\x02\x00\x00", b"\x00\x00\x02\x1c"}
    if head[:4] not in sizes:
        _check_strangers(head)
        raise _Fault("not a complete NIfTI file (wrong signature)", COPY_AGAIN)
    kind = nib.Nifti2Image if head[:4] in (b"\x1c\x02\x00\x00", b"\x00\x00\x02\x1c") else nib.Nifti1Image
    quiet = logging.Logger("nifti", level=logging.CRITICAL)  # nibabel logs repairs without the file name
    try:
        header = kind.header_class.from_fileobj(BytesIO(head), check=False)
        spacing = np.abs(np.asarray(header["pixdim"][1:4], dtype=np.float64))
        if bytes(header["magic"])[:2] == b"ni":
            raise _Fault("it is the header of a pair .hdr and .img, without voxels", "write both as one .nii.gz")
        if not bytes(header["magic"]).strip(b"\0"):
            raise _Fault(f"it is an Analyze file, not NIfTI: {NO_POSITION}", CONVERT_AGAIN)
        header.check_fix(logger=quiet)
        dtype, slope_inter, skip = header.get_data_dtype(), header.get_slope_inter(), int(header["vox_offset"])
        shape = _one_volume([int(n) for n in header.get_data_shape()])
        with np.errstate(all="ignore"):  # values that are not finite are handled below
            affine, doubts = _nifti_place(header, spacing)
    except (nib.spatialimages.HeaderDataError, nib.wrapstruct.WrapStructError, ValueError, OverflowError) as error:
        raise _Fault(f"not a complete NIfTI file ({error})", COPY_AGAIN) from error
    slope, inter = (default if value is None else value for value, default in zip(slope_inter, (1.0, 0.0), strict=True))
    doubts = [*doubts, *_shape_doubts(affine)]
    return Header(path, shape, dtype, affine, 0, packed, skip, slope, inter, tuple(doubts))


def _nifti_place(header: nib.Nifti1Header, spacing: np.ndarray) -> tuple[np.ndarray, list[str]]:
    """The affine in mm, and doubts about it. The sform takes precedence over the qform, as in nibabel."""
    codes = int(header["sform_code"]), int(header["qform_code"])
    if not any(codes):
        raise _Fault(
            f"{NO_POSITION} (sform_code and qform_code are 0), so that left, right and height are not known",
            f"{CONVERT_AGAIN}; where its affine is known, set it by nibabel's set_sform(affine, code=1)",
        )
    unit = int(header["xyzt_units"]) & 7
    to_mm = np.diag([*[_UNIT_MM.get(unit, 1.0)] * 3, 1.0])
    affine: np.ndarray = to_mm @ np.asarray(header.get_sform() if codes[0] else header.get_qform(), dtype=np.float64)
    doubts = []
    if unit != 2 and field_of_view_fault(header.get_data_shape(), affine):
        doubts.append(f"its unit (xyzt_units) is {_UNIT_NAME.get(unit, 'not stated')}")
    if not codes[0] and not spacing.all():
        raise _Fault("the header gives a voxel size (pixdim) of zero", CONVERT_AGAIN)
    if codes[0]:
        size, told_size = np.linalg.norm(affine[:3, :3], axis=0), _UNIT_MM.get(unit, 1.0) * spacing
        if not np.abs(size - told_size).max() <= SPACING_TOLERANCE * size.max():
            doubts.append(f"its sform states voxels of {_times(size)} mm, its pixdim {_times(told_size)} mm")
    if all(codes):
        try:
            other = to_mm @ np.asarray(header.get_qform(), dtype=np.float64)
        except ValueError:  # not a valid quaternion
            other = np.full((4, 4), np.nan)
        if not np.isfinite(other).all():
            return affine, [*doubts, "its qform is invalid; the sform was used"]
        apart = _apart(affine, other, header.get_data_shape())
        if not apart <= max(PLACE_TOLERANCE_MM, 0.5 * float(np.linalg.norm(affine[:3, :3], axis=0).min())):
            doubts.append(f"its sform and its qform are up to {apart:.4g} mm apart; the sform was used")
    return affine, doubts


def _apart(one: np.ndarray, other: np.ndarray, shape: Sequence[int]) -> float:
    """The largest distance between the corners of a field of view by two affines, in mm."""
    ends = np.stack(np.meshgrid(*[(0, int(n) - 1) for n in shape[:3]], indexing="ij"), axis=-1).reshape(-1, 3)
    corners = np.concatenate([ends, np.ones((len(ends), 1))], axis=1)
    return float(np.linalg.norm((corners @ (one - other).T)[:, :3], axis=1).max())


# --- MetaImage --------------------------------------------------------------------------------------------------------


def _meta_header(path: Path, head: bytes) -> Header:
    """Of the MetaImage format, with the voxels after the header or in another file of the folder.

    Reference:
        https://itk.org/Wiki/ITK/MetaIO/Documentation
    """
    fields, start = _meta_fields(head)

    def yes(name: str) -> bool:
        return fields.get(name, "False").lower() in ("true", "1")

    if fields.get("NDims") != "3":
        raise _Fault(f"the header says NDims = {_short(fields.get('NDims'))}, not 3", ONE_VOLUME)
    if fields.get("ElementNumberOfChannels", "1") != "1":
        raise _Fault(f"{_short(fields['ElementNumberOfChannels'])} values per voxel", ONE_VOLUME)
    shape = _one_volume(_numbers(fields, "DimSize", int, 3))
    if fields.get("ElementType") not in _META_TYPES:
        raise _Fault(f"voxels are of type {_short(fields.get('ElementType'))}, not numbers", ONE_VOLUME)
    if not yes("BinaryData"):
        raise _Fault("its voxels are written as text", "write them as binary data")
    if any(float(_numbers(fields, name, float, 1)[0]) != default for name, default in _META_SCALING if name in fields):
        raise _Fault(
            "the header states a scaling of the values (ElementToIntensityFunction)", "write the scaled values"
        )
    dtype = np.dtype(_META_TYPES[fields["ElementType"]]).newbyteorder(">" if yes("BinaryDataByteOrderMSB") else "<")
    affine = _meta_place(fields)
    data = path
    if fields["ElementDataFile"].upper() != "LOCAL":
        data, start = _beside(path, fields["ElementDataFile"], "ElementDataFile"), 0
    size = math.prod(shape) * dtype.itemsize
    if (skip := _numbers(fields, "HeaderSize", int, 1)[0] if "HeaderSize" in fields else 0) < 0:  # from the end
        start = max(start, data.stat().st_size - size)
    else:
        start += skip
    packed = _packed_as(data, start) if yes("CompressedData") else None
    return Header(data, shape, dtype, affine, start, packed, doubts=tuple(_shape_doubts(affine)))


def _meta_fields(head: bytes) -> tuple[dict[str, str], int]:
    """The fields of a MetaImage header by their usual names, and the byte after it."""
    fields: dict[str, str] = {}
    at = 0
    while "ElementDataFile" not in fields:
        end = head.find(b"\n", at)
        name, equals, value = head[at : len(head) if end < 0 else end].decode("latin-1").partition("=")
        name = _META_ALIASES.get(name.strip(), name.strip())
        if not equals or name in fields:
            _check_strangers(head, own=b"objecttype")
            fault = f"{_short(name)} is given twice" if equals else "it ends before ElementDataFile"
            raise _Fault(f"not a MetaImage header ({fault})", COPY_AGAIN)
        fields[name] = value.strip()
        at = len(head) if end < 0 else end + 1
    return fields, at


def _meta_place(fields: Mapping[str, str]) -> np.ndarray:
    for name, what in (("ElementSpacing", "the header gives no voxel size"), ("Offset", NO_POSITION)):
        if name not in fields:
            raise _Fault(f"{what} ({name})", "write it again with its geometry")
    orientation = fields.get("AnatomicalOrientation", "???")
    if "TransformMatrix" not in fields and orientation == "???":
        raise _Fault("the header gives no directions (TransformMatrix)", CONVERT_AGAIN)
    if "TransformMatrix" not in fields and orientation != "RAI":
        raise _Fault(f"it gives directions as {_short(orientation)} only, without TransformMatrix", CONVERT_AGAIN)
    unit = fields.get("DistanceUnits", "?")
    if unit not in _META_UNITS:
        raise _Fault(f"lengths are in {_short(unit)} (DistanceUnits)", "write it again in mm")
    spacing = np.array(_numbers(fields, "ElementSpacing", float, 3))
    if (spacing <= 0).any():
        raise _Fault(f"voxels of {_times(spacing)} mm: no usable voxel size", "write it again with its geometry")
    # a row of the matrix in the file is the direction of one array axis
    axes = np.array(_numbers({"TransformMatrix": "1 0 0 0 1 0 0 0 1", **fields}, "TransformMatrix", float, 9))
    axes = axes.reshape(3, 3).T
    if np.abs(np.linalg.norm(axes, axis=0) - 1).max() > SPACING_TOLERANCE:
        raise _Fault("the directions in TransformMatrix have not the length 1", "write it again with its geometry")
    lps = np.eye(4)
    lps[:3, :3], lps[:3, 3] = axes * spacing, _numbers(fields, "Offset", float, 3)
    return np.asarray(LPS_TO_RAS @ np.diag([*[_META_UNITS[unit]] * 3, 1.0]) @ lps)


# --- NRRD -------------------------------------------------------------------------------------------------------------


def _nrrd_header(path: Path, head: bytes) -> Header:
    """Of the NRRD format.

    Reference:
        https://teem.sourceforge.net/nrrd/format.html
    """
    fields, start = _nrrd_fields(head)
    if fields.get("dimension") != "3":
        raise _Fault(f"the header says dimension: {_short(fields.get('dimension'))}, not 3", ONE_VOLUME)
    shape = _one_volume(_numbers(fields, "sizes", int, 3))
    kind = _NRRD_TYPES.get(fields.get("type", "").lower())
    if kind is None:
        raise _Fault(f"voxels are of type {_short(fields.get('type'))}, not numbers", ONE_VOLUME)
    dtype = np.dtype(kind)
    if dtype.itemsize > 1:
        order = fields.get("endian", "").lower()
        if order not in ("little", "big"):
            raise _Fault("the header does not state the byte order (endian)", "write it again")
        dtype = dtype.newbyteorder("<" if order == "little" else ">")
    encoding = fields.get("encoding", "").lower()
    if encoding not in ("raw", "gzip", "gz"):
        raise _Fault(f"its voxels are encoded as {_short(encoding)}", "write them raw or gzip")
    if any(_numbers(fields, name, int, 1)[0] for name in ("line skip", "byte skip") if name in fields):
        raise _Fault(
            "its voxels do not begin directly after the header (line skip, byte skip)", "write it again as one file"
        )
    data = path
    if "data file" in fields:
        data, start = _beside(path, fields["data file"], "data file"), 0
    affine = _nrrd_place(fields)
    packed = None if encoding == "raw" else GZIP
    return Header(data, shape, dtype, affine, start, packed, doubts=tuple(_shape_doubts(affine)))


def _nrrd_fields(head: bytes) -> tuple[dict[str, str], int]:
    """The fields of an NRRD header by their names in lower case, and the byte after it."""
    fields: dict[str, str] = {}
    if not re.match(rb"NRRD\d{4}\r?\n", head):
        _check_strangers(head, own=b"nrrd")
        raise _Fault("not an NRRD header", COPY_AGAIN)
    blank = re.search(rb"\r?\n\r?\n", head)
    text = head[: blank.start() if blank else len(head)].decode("latin-1")
    for line in text.splitlines()[1:]:
        if line.startswith("#") or ":=" in line:  # a comment, or a key/value pair of a program
            continue
        name, colon, value = line.partition(":")
        name = _NRRD_ALIASES.get(name.strip().lower(), name.strip().lower())
        if not colon or name in fields:
            raise _Fault(f"not an NRRD header ({_short(line)})", COPY_AGAIN)
        fields[name] = value.strip()
    if blank is None and "data file" not in fields:
        raise _Fault("not a complete NRRD header", COPY_AGAIN)
    return fields, blank.end() if blank else len(head)


def _nrrd_place(fields: Mapping[str, str]) -> np.ndarray:
    space = fields.get("space", "").lower()
    if space not in _NRRD_SPACES:
        what = f"its space {_short(space)} is not known" if space else f"{NO_POSITION} (space)"
        raise _Fault(what, CONVERT_AGAIN)
    if {"space directions", "space origin"} - set(fields):
        raise _Fault(f"{NO_POSITION} (space directions, space origin)", CONVERT_AGAIN)
    units = set(re.findall(r'"([^"]*)"', fields.get("space units", "")))
    if units - {"mm"}:
        raise _Fault(f"lengths are in {_short(', '.join(sorted(units)))} (space units)", "write it again in mm")
    affine = np.eye(4)
    columns = re.sub(r"[(),]", " ", fields["space directions"]), re.sub(r"[(),]", " ", fields["space origin"])
    affine[:3, :3] = np.array(_numbers({"space directions": columns[0]}, "space directions", float, 9)).reshape(3, 3).T
    affine[:3, 3] = _numbers({"space origin": columns[1]}, "space origin", float, 3)
    return np.asarray(_NRRD_SPACES[space] @ affine)


# --- of all formats ---------------------------------------------------------------------------------------------------


def _beside(path: Path, name: str, field: str) -> Path:
    """The file that a header names, which must be a single file in the same folder."""
    if not name or Path(name).name != name or "\\" in name or "%" in name or name.upper().startswith("LIST"):
        raise _Fault(f"{field} = {_short(name)} is not a single file in the same folder", "write the image as one file")
    data = path.parent / name
    if not data.is_file():
        raise _Fault(f"the file of its voxels, {_short(name)}, is not in the same folder", "copy both files")
    return data


def _packed_as(path: Path, start: int) -> int:
    with path.open("rb") as file:
        file.seek(start)
        return GZIP if file.read(2) == GZIP_MAGIC else ZLIB


def _numbers(fields: Mapping[str, str], name: str, kind: Callable[[str], float], count: int) -> list:
    """The numbers of a field."""
    try:
        found = [kind(word) for word in fields.get(name, "").split()]
    except ValueError:
        found = []
    if len(found) != count or not all(math.isfinite(number) for number in found):
        what = "integers" if kind is int else "finite numbers"
        raise _Fault(f"{name} is {_short(fields.get(name))}, not {count} {what}", COPY_AGAIN)
    return found


def _one_volume(shape: Sequence[int]) -> tuple[int, int, int]:
    """The shape without trailing axes of length one, which must have three axes."""
    short = list(shape)
    while len(short) > 3 and short[-1] == 1:
        short.pop()
    if len(short) != 3 or min(short) < 1:
        raise _Fault(f"shape ({', '.join(map(str, shape))}) is not that of one 3-D image", "give a single volume")
    return short[0], short[1], short[2]


def _shape_doubts(affine: np.ndarray) -> list[str]:
    """Doubts about an affine."""
    if np.array_equal(affine, np.eye(4)) or np.array_equal(affine, LPS_TO_RAS):
        return ["voxels of 1 mm at the origin, as if the geometry were not known"]
    size = np.linalg.norm(affine[:3, :3], axis=0)
    if not size.all() or not np.isfinite(size).all():
        return []
    axes = affine[:3, :3] / size
    cosine = float(np.abs(axes.T @ axes - np.eye(3)).max())
    shear = 90.0 - math.degrees(math.acos(min(1.0, cosine)))
    return [f"its axes are {shear:.3g} degrees from right angles"] if shear > SHEAR_TOLERANCE_DEG else []


def _times(sizes: np.ndarray) -> str:
    return " x ".join(f"{size:.4g}" for size in sizes)


def _short(text: str | None) -> str:
    """A text of a header, shortened, without control characters."""
    return "absent" if text is None else "".join(c if c.isprintable() else "?" for c in text[:40]) or "empty"
