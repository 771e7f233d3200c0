"""Time of injection and start of the scan from a PET's headers, with doubts about them."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from datetime import datetime, time, timedelta, timezone
from typing import TYPE_CHECKING, Any

from scripts.dicom.tags import AbsentTagError, DicomError, needed_module, number_of, private_text, tag_name, text_of

if TYPE_CHECKING:
    from pydicom import Dataset

DAY = timedelta(days=1)
LONGEST_UPTAKE = timedelta(hours=6)  # an FDG scan starts 1 to 2 h after the injection
USUAL_UPTAKE = timedelta(minutes=30), timedelta(hours=4)
LONGEST_SCAN = timedelta(hours=6)
SAME_MOMENT = timedelta(minutes=1)  # 0.6 % of SUV
NEAR_MOMENT = timedelta(minutes=10)  # 6 % of SUV; with a larger difference of two sources it is unclear which is right
LATE_BED = timedelta(minutes=30)  # the first bed position normally starts with the series
AROUND_MIDNIGHT = timedelta(hours=2)  # for a series before and its acquisitions after midnight
# Offsets from UTC in minutes, other than whole hours: Marquesas, Newfoundland in winter and summer, Iran,
# Kabul, India, Nepal, Myanmar, Eucla, Adelaide and Lord Howe in winter, Adelaide in summer, Chatham Islands.
ODD_ZONES = (-570, -210, -150, 210, 270, 330, 345, 390, 525, 570, 630, 765, 825)
START_DATE_TIME, START_TIME = "RadiopharmaceuticalStartDateTime", "RadiopharmaceuticalStartTime"
GE_PET = (0x0009, "GEMS_PETD_01")  # group and private creator


def scan_start(slices: Sequence[Dataset], half_life: float, doubts: list[str]) -> datetime:
    """The time to which Decay Correction START corrects the values, by the scanner's clock.

    It is the series' date and time, unless these are later than the first acquisition (a series made afterwards). Then
    it is GE's private (0009,100D); otherwise it is computed from the first image's frame reference time and duration;
    otherwise it is the first acquisition. If the scan passes midnight without a change of date, times after midnight
    count as of the next day.

    Args:
        slices: headers of one series.
        half_life: of the nuclide in s.
        doubts: list to which doubts are appended.

    Raises:
        DicomError: a date or a time is missing or cannot be read, or the acquisition times do not form one scan.
    """
    series = min(_moment(s, "SeriesDate", "SeriesTime") for s in slices)
    times = _over_midnight([_moment(s, "AcquisitionDate", "AcquisitionTime") for s in slices])
    if max(times) - min(times) > LONGEST_SCAN:
        raise DicomError(
            f"SUV: by {tag_name('AcquisitionTime')} the scan took {_hours(max(times) - min(times))}, more than "
            f"{_hours(LONGEST_SCAN)}: the times do not belong together"
        )
    acquired, first = min(zip(times, slices, strict=True), key=lambda pair: pair[0])
    if series.date() == acquired.date():
        if acquired - series > DAY / 2:
            series += DAY
        elif acquired + DAY - series <= AROUND_MIDNIGHT:
            acquired += DAY
    private = private_text(first, *GE_PET, 0x0D)
    stated = _date_time(private, first, "SUV: GE's scan date and time (0009,100D)") if private else None
    if series <= acquired:
        if acquired - series > LATE_BED:
            doubts.append(
                f"the first acquisition is {_minutes(acquired - series)} after {tag_name('SeriesTime')}, which counts "
                "as the start of the scan"
            )
        if stated is not None:
            name = "GE's scan time (0009,100D)"
            _say_if_apart(stated.time(), series.time(), name, tag_name("SeriesTime"), doubts)
        return series
    if stated is not None:
        return stated
    reference = number_of(first, "FrameReferenceTime", 0.0) / 1000.0
    duration = number_of(first, "ActualFrameDuration", 0.0) / 1000.0
    if reference <= 0 or duration <= 0:
        return acquired
    # The time within the frame at which the activity equals its mean over the frame.
    rate = math.log(2) / half_life
    mean_activity = math.log(rate * duration / -math.expm1(-rate * duration)) / rate
    return acquired + timedelta(seconds=mean_activity - reference)


def uptake_time(item: Dataset, header: Dataset, scan: datetime, doubts: list[str]) -> timedelta:
    """The time from an injection to the start of the scan.

    Radiopharmaceutical Start DateTime is used with its date if it is at most 6 h before the scan; otherwise
    (de-identified dates), and for Radiopharmaceutical Start Time, the time of day is used, on the day before if it is
    later than that of the scan.

    Args:
        item: of Radiopharmaceutical Information Sequence (0054,0016).
        header: of the image that holds the item.
        scan: start of the scan (:func:`scan_start`).
        doubts: list to which doubts are appended: an uptake time outside 30 to 240 min, sources that differ, a date
            other than that of the scan.

    Raises:
        DicomError: no time is stated; two sources differ by more than 10 min and both, or neither, may be right; the
            injection is at the very moment of the scan, or more than 6 h before it.
    """
    full, clock = _injected(item, header)
    if full is None and clock is None:
        raise AbsentTagError(f"SUV: {tag_name(START_TIME)} is missing or empty")
    moments = [moment for moment in (full, clock) if moment is not None]
    uptakes = [_since(moment, scan) for moment in moments]
    chosen = 0
    if full is not None and clock is not None:
        chosen = _preferred(uptakes, _apart(full.time(), clock), doubts)
    used, uptake = moments[chosen], uptakes[chosen]
    if isinstance(used, datetime) and scan - used != uptake:
        doubts.append(f"the date in {tag_name(START_DATE_TIME)} is not that of the scan; its time of day is used")
    private = private_text(header, *GE_PET, 0x3B)
    if private:
        stated = _date_time(private, header, "SUV: GE's injection date and time (0009,103B)").time()
        told = used.time() if isinstance(used, datetime) else used
        _say_if_apart(stated, told, "GE's injection time (0009,103B)", tag_name(START_TIME), doubts)
    _check_uptake(uptake, doubts)
    return uptake


def check_decay_factor(
    slices: Sequence[Dataset], half_life: float, start: datetime, before: timedelta, doubts: list[str]
) -> None:
    """A doubt if Decay Factor (0054,1321) does not correct to the moment that Decay Correction states.

    An activity is multiplied by the factor ``2 ** (t / half_life)`` for the time t from the moment to the middle of the
    acquisition. The first image, that of the lowest factor, is checked; a factor of 1 counts as not stated.

    Args:
        slices: headers of one series.
        half_life: of the nuclide in s.
        start: of the scan, see :func:`scan_start`.
        before: from the stated moment to the start of the scan.
        doubts: list to which the doubt is appended.

    Raises:
        DicomError: a factor, a date or a time cannot be read.
    """
    factor, first = min(((number_of(s, "DecayFactor", 0.0), s) for s in slices), key=lambda pair: pair[0])
    if factor <= 1:
        return
    found = timedelta(seconds=half_life * math.log2(factor))
    acquired = _moment(first, "AcquisitionDate", "AcquisitionTime") - start
    acquired = (acquired + DAY / 2) % DAY - DAY / 2  # the date may not change at midnight
    stated = before + acquired + timedelta(milliseconds=number_of(first, "ActualFrameDuration", 0.0)) / 2
    if abs(found - stated) > NEAR_MOMENT:
        doubts.append(
            f"by {tag_name('DecayFactor')} the first image is corrected for a decay of {_minutes(found)}, and by the "
            f"times and {tag_name('DecayCorrection')} for {_minutes(stated)}: to which moment are the values corrected?"
        )


def _injected(item: Dataset, header: Dataset) -> tuple[datetime | None, time | None]:
    """The time of an injection by its two tags, by the scanner's clock; None where a tag does not state it."""
    text, clock = text_of(item, START_DATE_TIME), None
    if text_of(item, START_TIME):
        clock = _parsed("TM", text_of(item, START_TIME), START_TIME)
    if not re.match(r"\d{12}", text):
        return None, clock
    value = _parsed_date_time(text, f"SUV: {tag_name(START_DATE_TIME)}")
    if value.tzinfo is None or text_of(header, "TimezoneOffsetFromUTC"):
        return _local(value, header), clock
    if clock is None:
        raise DicomError(
            f"SUV: {tag_name(START_DATE_TIME)} has an offset from UTC, and without "
            f"{tag_name('TimezoneOffsetFromUTC')} or {tag_name(START_TIME)} the scanner's clock is not known"
        )
    if not _is_zone(value.astimezone(timezone.utc).time(), clock):
        raise DicomError(
            f"SUV: {tag_name(START_DATE_TIME)} and {tag_name(START_TIME)} disagree in any time zone; correct the one "
            "that is wrong"
        )
    return None, clock


def _is_zone(utc: time, clock: time) -> bool:
    """Whether there is a time zone with this clock time at this time of UTC."""
    day = datetime.min.date()
    ahead = datetime.combine(day, clock) - datetime.combine(day, utc)
    hour = timedelta(hours=1)
    known = [ahead - ahead // hour * hour, ahead - ahead // hour * hour - hour]
    known += [(ahead - timedelta(minutes=zone) + DAY / 2) % DAY - DAY / 2 for zone in ODD_ZONES]
    return min(map(abs, known)) <= SAME_MOMENT


def _since(moment: datetime | time, scan: datetime) -> timedelta:
    """From an injection to the scan; by the time of day only where the date is not that of the scan."""
    if isinstance(moment, datetime):
        if timedelta(0) <= scan - moment <= LONGEST_UPTAKE:
            return scan - moment
        moment = moment.time()
    return (scan - datetime.combine(scan.date(), moment)) % DAY


def _preferred(uptakes: Sequence[timedelta], apart: timedelta, doubts: list[str]) -> int:
    """The source to use: the first unless only it is impossible; a difference is a doubt."""
    if apart <= SAME_MOMENT:
        return 0
    names = [tag_name(START_DATE_TIME), tag_name(START_TIME)]
    possible = [timedelta(0) < uptake <= LONGEST_UPTAKE for uptake in uptakes]
    if apart > NEAR_MOMENT and possible[0] == possible[1]:
        raise DicomError(f"SUV: {' and '.join(names)} are {_minutes(apart)} apart; correct the one that is wrong")
    chosen = 0 if possible[0] else 1
    doubts.append(f"{' and '.join(names)} are {_minutes(apart)} apart; {names[chosen]} is used")
    return chosen


def _say_if_apart(one: time, used: time, name: str, used_name: str, doubts: list[str]) -> None:
    if _apart(one, used) > SAME_MOMENT:
        doubts.append(f"{name} and {used_name} are {_minutes(_apart(one, used))} apart; the latter is used")


def _check_uptake(uptake: timedelta, doubts: list[str]) -> None:
    if uptake == timedelta(0):
        raise DicomError(
            "SUV: injection and scan have the same time, so that the uptake time is unknown; "
            "de-identification may have replaced the times"
        )
    if uptake > LONGEST_UPTAKE:
        raise DicomError(
            f"SUV: by {tag_name(START_TIME)} the injection was {_hours(uptake)} before the scan, more than "
            f"{_hours(LONGEST_UPTAKE)}: the times do not belong together"
        )
    if not USUAL_UPTAKE[0] <= uptake <= USUAL_UPTAKE[1]:
        usual = " to ".join(f"{t.total_seconds() / 60:.0f}" for t in USUAL_UPTAKE)
        doubts.append(f"the scan started {_minutes(uptake)} after the injection; {usual} min are usual for FDG")


def _over_midnight(moments: Sequence[datetime]) -> list[datetime]:
    """Times of one scan, those after midnight on the next day where the date did not change."""
    latest = {moment.date(): moment for moment in sorted(moments)}
    return [m + DAY if latest[m.date()] - m > DAY / 2 else m for m in moments]


def _apart(one: time, other: time) -> timedelta:
    """The time between two times of day, at most 12 h."""
    day = datetime.min.date()
    apart = abs(datetime.combine(day, one) - datetime.combine(day, other))
    return min(apart, DAY - apart)


def _hours(span: timedelta) -> str:
    return f"{span.total_seconds() / 3600:.1f} h"


def _minutes(span: timedelta) -> str:
    return f"{span.total_seconds() / 60:.0f} min"


def _moment(header: Dataset, day: str, clock: str) -> datetime:
    date = _parsed("DA", required(header, day), day)
    return datetime.combine(date, _parsed("TM", required(header, clock), clock))


def required(header: Dataset, keyword: str) -> str:
    """A tag as text; a missing or empty one raises :class:`.AbsentTagError`."""
    text = text_of(header, keyword)
    if not text:
        raise AbsentTagError(f"SUV: {tag_name(keyword)} is missing or empty")
    return text


def _parsed(kind: str, text: str, keyword: str) -> Any:
    """A DICOM date (DA) or time (TM) as Python's."""
    try:
        value = getattr(needed_module("pydicom.valuerep"), kind)(text.replace(":", ""))
    except ValueError as error:
        raise DicomError(f"SUV: {tag_name(keyword)} is not a valid date or time") from error
    return value


def _parsed_date_time(text: str, where: str) -> datetime:
    try:
        value: datetime = needed_module("pydicom.valuerep").DT(text)
    except ValueError as error:
        raise DicomError(f"{where} is not a valid date and time") from error
    return value


def _date_time(text: str, header: Dataset, where: str) -> datetime:
    """A DICOM date and time (DT) by the scanner's clock, to which the header's other times refer."""
    return _local(_parsed_date_time(text, where), header)


def _local(value: datetime, header: Dataset) -> datetime:
    """A time by the scanner's clock; unchanged if it has no offset from UTC or that of the scanner is not known."""
    offset = text_of(header, "TimezoneOffsetFromUTC")
    if value.tzinfo is not None and offset:
        match = re.fullmatch(r"([+-])(\d\d)([0-5]\d)", offset)
        if match is None:
            raise DicomError(f"SUV: {tag_name('TimezoneOffsetFromUTC')} is not a single offset such as +0100")
        ahead = timedelta(hours=int(match[2]), minutes=int(match[3]))
        value = value.astimezone(timezone(-ahead if match[1] == "-" else ahead))
    return datetime.combine(value.date(), value.time())
