"""What every DICOM module needs: the error for people, the libraries, a file's header and the values of its tags.

pydicom (reading) and highdicom (writing) are imported when they are needed: training and NIfTI need neither. Nothing
that the DICOM modules print, raise or show by ``repr`` holds a name, an identifier or a date; the segmentation and the
report carry the patient's and the study's tags, as they must.
"""

from __future__ import annotations

import logging
import struct
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from pydicom import Dataset


class DicomError(ValueError):
    """DICOM data that cannot be used, told for people: what is wrong, where, and what to do."""


class AbsentTagError(DicomError):
    """A tag that is needed is missing, empty or zero."""


def needed_module(name: str) -> Any:
    """A module that only DICOM needs.

    Raises:
        ImportError: says what to install.
    """
    try:
        return import_module(name)
    except ImportError as error:
        raise ImportError(f"DICOM needs {name}: pip install pydicom highdicom") from error


@contextmanager
def lenient() -> Iterator[None]:
    """Faults in tags that are of no use here (a study id that is too long) are not this module's to complain about.

    What pydicom and highdicom warn of and log is kept back: they quote names and identifiers.
    """
    loggers = [logging.getLogger(name) for name in ("pydicom", "highdicom")]
    levels = [logger.level for logger in loggers]
    with needed_module("pydicom.config").disable_value_validation(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=UserWarning, module=r"(pydicom|highdicom)\b")
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


def read_header(path: Path, keywords: Sequence[str] | None = None) -> Dataset | None:
    """The header of a DICOM file, None for a file of another kind."""
    pydicom = needed_module("pydicom")
    tags = None if keywords is None else list(keywords)
    try:
        return pydicom.dcmread(path, stop_before_pixels=True, specific_tags=tags)
    except pydicom.errors.InvalidDicomError:
        return None
    except (OSError, EOFError, ValueError, KeyError, NotImplementedError, struct.error) as error:
        raise DicomError(
            f"{path.name}: not a complete DICOM file ({cause_of(error)}); copy it again or remove it"
        ) from error


def cause_of(error: Exception) -> str:
    """What went wrong, without the path that the system's own messages quote."""
    return (error.strerror or type(error).__name__) if isinstance(error, OSError) else str(error)


def text_of(header: Dataset, keyword: str) -> str:
    """The value of a tag as text, "" when it is absent or empty."""
    value = header.get(keyword)
    return "" if value is None else str(value).strip()


def words_of(header: Dataset, keyword: str) -> tuple[str, ...]:
    """The values of a multi-valued text tag in upper case, none when it is absent or empty."""
    value = header.get(keyword)
    if value is None or value == "":
        return ()
    return tuple(str(v).strip().upper() for v in ([value] if isinstance(value, str) else value))


def items_of(header: Dataset, keyword: str) -> list[Dataset]:
    """The items of a sequence, none where it is absent or no sequence."""
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
    """(count,) finite numbers, None when the tag does not hold so many."""
    try:
        value = header.get(keyword)
        numbers = np.array([] if value is None else value, dtype=np.float64).ravel()
    except (TypeError, ValueError):
        return None
    return numbers if len(numbers) == count and np.isfinite(numbers).all() else None


def integer_of(header: Dataset, keyword: str) -> int:
    """An integer tag, 0 when it is absent or not a number."""
    number = numbers_of(header, keyword, 1)
    return 0 if number is None else int(number[0])


def number_of(dataset: Dataset, keyword: str, default: float) -> float:
    """A number, or the default where the tag is absent.

    Raises:
        DicomError: when it is there and no number.
    """
    if dataset.get(keyword) is None:
        return default
    number = numbers_of(dataset, keyword, 1)
    if number is None:
        raise DicomError(f"{tag_name(keyword)} is {text_of(dataset, keyword)!r}, not a number")
    return float(number[0])


def tag_name(keyword: str) -> str:
    """A tag as people look it up: ``Patient's Weight (0010,1030)``."""
    dictionary = needed_module("pydicom.datadict")
    number = dictionary.tag_for_keyword(keyword)
    return f"{dictionary.dictionary_description(number)} ({number >> 16:04X},{number & 0xFFFF:04X})"
