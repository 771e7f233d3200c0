"""Basics of the DICOM modules: the error, lazy imports, reading of files and tag values.

pydicom (reading) and highdicom (writing) are imported when needed: training and NIfTI need neither. Messages, errors
and ``repr`` of the DICOM modules contain no name, identifier or date of a patient; the segmentation and the report have
the tags of patient and study, as required.
"""

from __future__ import annotations

import logging
import struct
import threading
import warnings
import zlib
from collections.abc import Iterator, MutableSequence, Sequence
from contextlib import ExitStack, contextmanager
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from pydicom import Dataset

PREAMBLE = 128  # bytes before the letters DICM
DEFLATED = "1.2.840.10008.1.2.1.99"
# Limits for a deflated file: bytes, compression ratio, and size from which the ratio is checked (blank images are
# small).
MOST_BYTES, MOST_RATIO, SMALL_BYTES = 2**31, 100, 2**26
CHUNK = 2**20


class DicomError(ValueError):
    """DICOM data that cannot be used: what is wrong, where, and what to do."""


class AbsentTagError(DicomError):
    """A required tag is missing, empty or zero."""


def needed_module(name: str) -> Any:
    """Import a module that only DICOM needs."""
    try:
        return import_module(name)
    except ImportError as error:
        raise ImportError(f"DICOM needs {name}: pip install pydicom highdicom") from error


class _Leniency:
    """Process-wide settings, changed by the first thread that enters and restored by the last."""

    def __init__(self) -> None:
        self.lock, self.inside, self.changes = threading.Lock(), 0, ExitStack()

    def enter(self) -> None:
        with self.lock:
            if not self.inside:
                self._change()
            self.inside += 1

    def leave(self) -> None:
        with self.lock:
            self.inside -= 1
            if not self.inside:
                self.changes.close()

    def _change(self) -> None:
        self.changes.enter_context(needed_module("pydicom.config").disable_value_validation())
        self.changes.enter_context(warnings.catch_warnings())
        warnings.filterwarnings("ignore", category=UserWarning, module=r"(pydicom|highdicom)\b")
        for name in ("pydicom", "highdicom"):
            library = logging.getLogger(name)
            self.changes.callback(library.setLevel, library.level)
            library.setLevel(logging.CRITICAL)


_leniency = _Leniency()


@contextmanager
def lenient() -> Iterator[None]:
    """Do not validate values of tags, and suppress warnings and logs of pydicom and highdicom.

    Their messages quote names and identifiers. These settings, warning filters and logger levels are process-wide.
    Several threads may be inside at once: the settings are changed by the first and restored by the last.
    """
    _leniency.enter()
    try:
        yield
    finally:
        _leniency.leave()


def read_header(path: Path, keywords: Sequence[str] | None = None) -> Dataset | None:
    """The header of a DICOM file, or some of its tags; None for a file of another type.

    Raises:
        DicomError: the file cannot be read, or is incomplete DICOM.
    """
    return read_file(
        path, stop_before_pixels=True, specific_tags=None if keywords is None else ["SOPClassUID", *keywords]
    )


def read_file(path: Path, **options: Any) -> Dataset | None:
    """A DICOM file, None for a file of another type; with the options of ``pydicom.dcmread``.

    Old archives have files without the preamble of 128 bytes and the prefix ``DICM``, with or without the group 0002
    that states the transfer syntax. Such a file is DICOM if it begins with an element of group 0002 or 0008 and states
    a SOP class. Without a transfer syntax the file is little endian with implicit or explicit VR (PS3.10, 7.1; PS3.5,
    A.1).

    Raises:
        DicomError: the file cannot be read, or is incomplete DICOM.
    """
    pydicom = needed_module("pydicom")
    try:
        with path.open("rb") as file:
            start = file.read(PREAMBLE + 4)
        bare = start[PREAMBLE:] != b"DICM"
        if bare and not _begins_with_an_element(start):
            return None
        _check_deflated(path, bare)
        dataset = pydicom.dcmread(path, force=bare, **options)
    except OSError as error:
        raise DicomError(f"{path.name}: cannot be read ({cause_of(error)})") from error
    except DicomError:
        raise
    except Exception as error:  # damaged bytes can cause any error
        raise DicomError(
            f"{path.name}: not a complete DICOM file ({cause_of(error)}); copy it again or remove it"
        ) from error
    if bare:
        _check_bare(dataset, path)
    return dataset


def _check_deflated(path: Path, bare: bool) -> None:
    """Refuse a deflated file larger than any image; pydicom inflates without a limit."""
    with path.open("rb") as file:
        file.seek(0 if bare else PREAMBLE + 4)
        meta = needed_module("pydicom.filereader").read_dataset(
            file, False, True, stop_when=lambda tag, vr, length: tag >> 16 != 2
        )
        if text_of(meta, "TransferSyntaxUID") != DEFLATED:
            return
        most = min(MOST_BYTES, max(SMALL_BYTES, MOST_RATIO * path.stat().st_size))
        inflater, size = zlib.decompressobj(-zlib.MAX_WBITS), 0
        packed = file.read(CHUNK)
        while packed and not inflater.eof:
            size += len(inflater.decompress(packed, CHUNK))
            if size > most:
                raise DicomError(
                    f"{path.name}: it is deflated, and has more than {most / 2**20:.0f} MB inflated, more than any "
                    "image; remove it"
                )
            packed = inflater.unconsumed_tail or file.read(CHUNK)


def _begins_with_an_element(start: bytes) -> bool:
    """Whether the bytes are an element of group 0002 or 0008 with its length, little endian."""
    if len(start) < 8:
        return False
    group, element, vr, short, length = (*struct.unpack("<HH2sH", start[:8]), struct.unpack("<I", start[4:8])[0])
    if group not in (0x0002, 0x0008) or element > 0x0100:
        return False
    explicit = vr in (b"UL", b"OB", b"UI", b"CS", b"SH", b"DA", b"TM", b"LO", b"DT", b"SQ")
    return (explicit and short <= 1024) or (group == 0x0008 and length <= 1024)


def _check_bare(dataset: Dataset, path: Path) -> None:
    """Refuse a file without preamble and SOP class; add the transfer syntax where it is missing."""
    uids = needed_module("pydicom.uid")
    named = uids.UID(text_of(dataset, "SOPClassUID") or text_of(dataset.file_meta, "MediaStorageSOPClassUID"))
    if not (named and named.is_valid):
        raise DicomError(
            f"{path.name}: begins like DICOM without a preamble and states no SOP class (ACR-NEMA, or truncated?); "
            "convert it to DICOM, copy it again or remove it"
        )
    implicit, little = dataset.original_encoding
    if "TransferSyntaxUID" not in dataset.file_meta and little:
        dataset.file_meta.TransferSyntaxUID = uids.ImplicitVRLittleEndian if implicit else uids.ExplicitVRLittleEndian


def cause_of(error: Exception) -> str:
    """The message of an error, without the path that system errors quote."""
    return (error.strerror or type(error).__name__) if isinstance(error, OSError) else str(error)


def value_of(header: Dataset, keyword: str) -> Any:
    """The value of a tag, None where it is absent or invalid."""
    try:
        return header.get(keyword)
    except Exception:  # pydicom converts values on access, and damaged ones can cause any error
        return None


def text_of(header: Dataset, keyword: str) -> str:
    """The value of a tag as text, "" where it is absent, empty or damaged; several values separated by backslashes."""
    value = value_of(header, keyword)
    values = [value] if isinstance(value, str) or not isinstance(value, MutableSequence) else value
    return "" if value is None else "\\".join(str(each) for each in values).strip()


def words_of(header: Dataset, keyword: str) -> tuple[str, ...]:
    """The values of a multi-valued text tag in upper case, () where it is absent, empty or damaged."""
    value = value_of(header, keyword)
    if value is None or value == "":
        return ()
    return tuple(str(v).strip().upper() for v in ([value] if isinstance(value, str) else value))


def items_of(header: Dataset, keyword: str) -> list[Dataset]:
    """The items of a sequence, [] where it is absent or not a sequence."""
    sequence = needed_module("pydicom.sequence").Sequence
    value = header.get(keyword)
    return list(value) if isinstance(value, sequence) else []


def private_text(header: Dataset, group: int, creator: str, offset: int) -> str:
    """A private tag's value as text, "" when it is absent."""
    try:
        value = header.private_block(group, creator)[offset].value
    except KeyError:
        return ""
    return (value.decode("ascii", "replace") if isinstance(value, bytes) else str(value or "")).strip(" \0")


def numbers_of(header: Dataset, keyword: str, count: int) -> np.ndarray | None:
    """(count,) finite numbers, None where the tag does not have that many."""
    value = value_of(header, keyword)
    try:
        numbers = np.array([] if value is None else value, dtype=np.float64).ravel()
    except (TypeError, ValueError):
        return None
    return numbers if len(numbers) == count and np.isfinite(numbers).all() else None


def integer_of(header: Dataset, keyword: str) -> int:
    """An integer tag, 0 when it is absent or not a number."""
    number = numbers_of(header, keyword, 1)
    return 0 if number is None else int(number[0])


def number_of(dataset: Dataset, keyword: str, default: float) -> float:
    """A number, or the default where the tag is absent or empty.

    Raises:
        DicomError: it is not a number.
    """
    if keyword not in dataset or dataset.get_item(keyword).value in (None, b"", ""):
        return default
    number = numbers_of(dataset, keyword, 1)
    if number is None:
        raise DicomError(f"{tag_name(keyword)} is {text_of(dataset, keyword)!r}, not a number")
    return float(number[0])


def tag_name(keyword: str) -> str:
    """Name and number of a tag: ``Patient's Weight (0010,1030)``."""
    dictionary = needed_module("pydicom.datadict")
    number = dictionary.tag_for_keyword(keyword)
    return f"{dictionary.dictionary_description(number)} ({number >> 16:04X},{number & 0xFFFF:04X})"
