"""Standardised uptake values: what the values of a PET are multiplied by, from its headers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from datetime import datetime, timedelta, timezone
from typing import TYPE_CHECKING, Any

from .dicom_tags import DicomError, lenient, needed_module, number_of, tag_name, text_of, words_of

if TYPE_CHECKING:
    from pydicom import Dataset

READABLE_UNITS = ("BQML", "CNTS", "GML")
WEIGHT_KG = (2.0, 500.0)
DOSE_BQ = (1e6, 1e11)  # a dose written in MBq, against the standard, falls below
LONGEST_UPTAKE = timedelta(hours=6)  # an FDG scan starts 1 to 2 h after the injection


def suv_factor(headers: Dataset | Sequence[Dataset]) -> float:
    """What PET values, rescaled as the headers say, are multiplied by to become SUV by body weight (g/ml).

    Follows the QIBA vendor-neutral pseudo-code (QIBA Profile FDG-PET/CT, appendix G). With BQML

        factor = weight [g] / (dose [Bq] * 2 ** (-uptake time / half-life))

    where, for decay correction START, the uptake time runs from the injection to the start of the scan; for ADMIN the
    values are corrected to the injection, so that it is 0. CNTS takes Philips' own factor (7053,1000), or else its
    (7053,1009), which leads to Bq/ml. GML values are SUV already and are taken as they are.

    The scan starts at the series' date and time unless these are later than the first acquisition (a series made
    afterwards). Then GE's private (0009,100D) says it; else it is computed back from the first image's frame reference
    time and duration; else it is the first acquisition itself. The injection's date is believed when it lies at most
    6 h before the scan; otherwise (de-identified dates, or only a time of day) the time of day counts, on the day
    before when it is later than the scan's.

    Args:
        headers: the headers of all slices of one PET series (:func:`read_headers`).

    Returns:
        The factor, the same for all slices.

    Raises:
        DicomError: naming the tag that is missing, zero, implausible or differs between slices; for other units
            (PROPCNTS), SUV by another measure than body weight, and images without attenuation or decay correction.
    """
    slices: list[Dataset] = list(headers) if isinstance(headers, Sequence) else [headers]
    if not slices:
        raise DicomError("SUV: no PET slices")
    with lenient():
        units = _agreed(slices, "Units")
        if units == "GML":
            _check_suv_type(slices)
            return 1.0
        if units not in READABLE_UNITS:
            known = ", ".join(READABLE_UNITS)
            raise DicomError(f"SUV: {tag_name('Units')} is {units}; SUV can be had from {known} only")
        decay = _check_corrections(slices)
        return _counts_factor(slices, decay) if units == "CNTS" else _activity_factor(slices, decay)


def _activity_factor(slices: Sequence[Dataset], decay: str) -> float:
    """From Bq/ml to SUV."""
    weight = _positive(slices, "PatientWeight", WEIGHT_KG, "kg")
    items = [_radiopharmaceutical(s) for s in slices]
    dose = _positive(items, "RadionuclideTotalDose", DOSE_BQ, "Bq")
    if decay == "START":
        half_life = _positive(items, "RadionuclideHalfLife", (60.0, 1e7), "s")
        uptake = _uptake_time(items[0], slices[0], _scan_start(slices, half_life))
        dose *= 2.0 ** (-uptake.total_seconds() / half_life)
    return weight * 1000.0 / dose


def _counts_factor(slices: Sequence[Dataset], decay: str) -> float:
    """From Philips' counts to SUV."""
    creator = "Philips PET Private Group"
    for offset in (0x00, 0x09):
        found = {_private(s, 0x7053, creator, offset) for s in slices}
        if len(found) > 1:
            raise DicomError(f"SUV: the slices differ in (7053,10{offset:02X})")
        factor = _as_number(found.pop(), f"SUV: (7053,10{offset:02X}), {creator},")
        if factor > 0:  # Philips writes 0 where it has no factor
            return factor if offset == 0x00 else factor * _activity_factor(slices, decay)
    raise DicomError(f"SUV: units are CNTS, and both (7053,1000) and (7053,1009) of {creator} are missing or zero")


def _as_number(text: str, where: str) -> float:
    """A private tag's number, 0 when it is empty."""
    try:
        return float(text or 0)
    except ValueError as error:
        raise DicomError(f"{where} is {text!r}, not a number") from error


def _check_suv_type(slices: Sequence[Dataset]) -> None:
    kind = _agreed(slices, "SUVType", optional=True)
    if kind not in ("", "BW"):
        raise DicomError(f"SUV: {tag_name('SUVType')} is {kind}; values by body weight (BW) are needed")


def _check_corrections(slices: Sequence[Dataset]) -> str:
    """The moment to which decay is corrected, START or ADMIN."""
    done = set(words_of(slices[0], "CorrectedImage"))
    if not done:
        raise DicomError(f"SUV: {tag_name('CorrectedImage')} is missing")
    if "ATTN" not in done:
        raise DicomError(f"SUV: {tag_name('CorrectedImage')} has no ATTN: the PET is not attenuation corrected")
    decay = _agreed(slices, "DecayCorrection")
    if decay not in ("START", "ADMIN"):
        reason = "the values are not corrected to one moment" if decay == "NONE" else "START or ADMIN was expected"
        raise DicomError(f"SUV: {tag_name('DecayCorrection')} is {decay}: {reason}")
    if not done & {"DECY", "DECAY"}:
        raise DicomError(
            f"SUV: {tag_name('CorrectedImage')} has no DECY, though {tag_name('DecayCorrection')} is {decay}: "
            "the values may not be decay corrected"
        )
    return decay


def _scan_start(slices: Sequence[Dataset], half_life: float) -> datetime:
    """The moment to which START corrects the decay."""
    series = min(_moment(s, "SeriesDate", "SeriesTime") for s in slices)
    acquired, first = min(((_moment(s, "AcquisitionDate", "AcquisitionTime"), s) for s in slices), key=lambda a: a[0])
    if series <= acquired:
        return series
    private = _private(first, 0x0009, "GEMS_PETD_01", 0x0D)
    if private:
        return _date_time(private, first, "SUV: GE's scan date and time (0009,100D)")
    reference = number_of(first, "FrameReferenceTime", 0.0) / 1000.0
    duration = number_of(first, "ActualFrameDuration", 0.0) / 1000.0
    if reference <= 0 or duration <= 0:
        return acquired
    # The moment within the frame when the activity equals its mean over the frame.
    rate = math.log(2) / half_life
    mean_activity = math.log(rate * duration / -math.expm1(-rate * duration)) / rate
    return acquired + timedelta(seconds=mean_activity - reference)


def _uptake_time(item: Dataset, header: Dataset, scan: datetime) -> timedelta:
    """Injection to scan."""
    given = text_of(item, "RadiopharmaceuticalStartDateTime")
    if len(given) >= len("YYYYMMDDHHMM"):
        injected = _date_time(given, header, f"SUV: {tag_name('RadiopharmaceuticalStartDateTime')}")
        if timedelta(0) <= scan - injected <= LONGEST_UPTAKE:
            return scan - injected
        clock = injected.time()
    else:
        clock = _parsed("TM", _required(item, "RadiopharmaceuticalStartTime"), "RadiopharmaceuticalStartTime")
    uptake = scan - datetime.combine(scan.date(), clock)
    if uptake < timedelta(0):
        uptake += timedelta(days=1)
    if uptake > LONGEST_UPTAKE:
        hours, limit = (t.total_seconds() / 3600 for t in (uptake, LONGEST_UPTAKE))
        raise DicomError(
            f"SUV: by {tag_name('RadiopharmaceuticalStartTime')} the injection was {hours:.1f} h before the scan, more "
            f"than {limit:.0f} h: the times do not belong together"
        )
    return uptake


def _moment(header: Dataset, day: str, clock: str) -> datetime:
    date = _parsed("DA", _required(header, day), day)
    return datetime.combine(date, _parsed("TM", _required(header, clock), clock))


def _parsed(kind: str, text: str, keyword: str) -> Any:
    """A DICOM date (DA) or time (TM) as Python's."""
    try:
        value = getattr(needed_module("pydicom.valuerep"), kind)(text.replace(":", ""))
    except ValueError as error:
        raise DicomError(f"SUV: {tag_name(keyword)} is no date or time that can be read") from error
    return value


def _date_time(text: str, header: Dataset, where: str) -> datetime:
    """A DICOM date and time (DT) in the scanner's own time, to which the header's other times refer."""
    try:
        value = needed_module("pydicom.valuerep").DT(text)
        offset = text_of(header, "TimezoneOffsetFromUTC")
        if value.tzinfo is not None and offset:
            sign = -1 if offset.startswith("-") else 1
            minutes = 60 * int(offset.lstrip("+-")[:2]) + int(offset.lstrip("+-")[2:])
            value = value.astimezone(timezone(sign * timedelta(minutes=minutes)))
    except ValueError as error:
        raise DicomError(f"{where} is no date and time that can be read") from error
    return datetime.combine(value.date(), value.time())


def _radiopharmaceutical(header: Dataset) -> Dataset:
    sequence = header.get("RadiopharmaceuticalInformationSequence")
    if not sequence:
        raise DicomError(f"SUV: {tag_name('RadiopharmaceuticalInformationSequence')} is missing or empty")
    return sequence[0]


def _positive(headers: Sequence[Dataset], keyword: str, limits: tuple[float, float], unit: str) -> float:
    """A number that all headers agree on and that lies within its limits."""
    found = {_as_number(_required(h, keyword), f"SUV: {tag_name(keyword)}") for h in headers}
    if len(found) > 1:
        raise DicomError(f"SUV: the slices differ in {tag_name(keyword)}")
    number = found.pop()
    if number == 0:
        raise DicomError(f"SUV: {tag_name(keyword)} is zero")
    if not limits[0] <= number <= limits[1]:
        raise DicomError(
            f"SUV: {tag_name(keyword)} is {number:g} {unit}, outside {limits[0]:g} to {limits[1]:g} {unit}; "
            "check its unit"
        )
    return number


def _agreed(headers: Sequence[Dataset], keyword: str, optional: bool = False) -> str:
    found = {(text_of(h, keyword) if optional else _required(h, keyword)).upper() for h in headers}
    if len(found) > 1:
        raise DicomError(f"SUV: the slices differ in {tag_name(keyword)}: {', '.join(sorted(found))}")
    return found.pop()


def _required(header: Dataset, keyword: str) -> str:
    text = text_of(header, keyword)
    if not text:
        raise DicomError(f"SUV: {tag_name(keyword)} is missing or empty")
    return text


def _private(header: Dataset, group: int, creator: str, offset: int) -> str:
    """A private tag's text, "" when it is absent."""
    try:
        value = header.private_block(group, creator)[offset].value
    except KeyError:
        return ""
    return (value.decode("ascii", "replace") if isinstance(value, bytes) else str(value or "")).strip(" \0")
