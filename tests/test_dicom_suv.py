"""SUV of DICOM PET: the tracer, the moments of injection and scan, sources that disagree; real headers, cases."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from dicom_study import pet_header, pet_tags, write_series
from pydicom.dataset import Dataset

from scripts import keys
from scripts.dicom.choice import choose_pet_ct
from scripts.dicom.examinations import DicomScan, find_examinations
from scripts.dicom.series import find_series, read_series
from scripts.dicom.suv import Suv, suv_of
from scripts.dicom.tags import DicomError
from scripts.dicom.tracer import FDG, tracer_of
from scripts.imaging.quality import CheckQualityd, checks_from_json
from scripts.imaging.transforms import LoadScansd, LocaliseBoxd

SHARED = Path(__file__).resolve().parents[2] / "shared"


def concept(value, scheme, meaning=""):
    item = Dataset()
    item.CodeValue, item.CodingSchemeDesignator, item.CodeMeaning = value, scheme, meaning
    return item


def coded(value, scheme, meaning="", text=None):
    """A PET whose tracer is coded."""
    return {"Radiopharmaceutical": text, "RadiopharmaceuticalCode": [concept(value, scheme, meaning)]}


def header_of(changes):
    """The header of a PET, with sequences of its radiopharmaceutical item by short names."""
    names = {
        "RadiopharmaceuticalCode": "RadiopharmaceuticalCodeSequence",
        "RadionuclideCode": "RadionuclideCodeSequence",
    }
    header = pet_header(**{k: v for k, v in changes.items() if k not in names})
    for short, name in names.items():
        if short in changes:
            setattr(header.RadiopharmaceuticalInformationSequence[0], name, changes[short])
    return header


# --- the tracer ------------------------------------------------------------------------------------------------------

FDG_TEXTS = [
    *("FDG", "18F-FDG", "F-18 FDG", "[18F]FDG", "F18_FDG", "FDG -- fluorodeoxyglucose", "Fluorodeoxyglucose F^18^"),
    *("FLUORO-D-GLUCOSE", "2-deoxy-2-[18F]fluoro-D-glucose", "Fludeoxyglucose (18F)", "Fluordesoxyglukose"),
    *("Fluorodésoxyglucose", "Fluorodeoxiglucosa", "fluorodeoksyglukoza", "FDG all patients"),
]


@pytest.mark.parametrize("text", FDG_TEXTS)
def test_fdg_by_its_text(text):
    assert tracer_of(pet_header(Radiopharmaceutical=text)).name == FDG


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param(coded("35321007", "SCT"), id="snomed"),
        pytest.param(coded("C-B1031", "SRT"), id="snomed_rt"),
        pytest.param(coded("C-B1031", "SNM3"), id="snomed_3"),
        pytest.param(coded("C-B1031", "99SDM"), id="snomed_private"),
        pytest.param(coded("C2166", "NCIt", "Fludeoxyglucose F 18"), id="nci_by_its_meaning"),
        pytest.param(coded("C-B1031", "SRT", text="Solution"), id="text_is_no_tracer"),
        pytest.param({"RadionuclideCode": [concept("C-111A1", "SRT", "^18^Fluorine")]}, id="nuclide_too"),
        pytest.param({"RadionuclideCode": [concept("77004003", "SCT")]}, id="nuclide_without_meaning"),
        pytest.param({"RadionuclideHalfLife": 6588}, id="half_life_rounded"),
        pytest.param({"RadionuclideHalfLife": None}, id="half_life_not_stated"),
        pytest.param({"SeriesDescription": "WB FDG AC"}, id="series_description_too"),
    ],
)
def test_fdg_by_its_header(changes):
    tracer = tracer_of(header_of(changes))
    assert (tracer.name, tracer.problem, tracer.doubt, tracer.order) == (FDG, "", "", 0)


@pytest.mark.parametrize(
    "text, name",
    [
        *[("FMISO", "FMISO"), ("18F-FMISO", "FMISO"), ("Fluoromisonidazole F^18^", "FMISO"), ("FAZA", "FAZA")],
        *[("68Ga-PSMA-11", "PSMA"), ("F-18 PSMA 1007", "PSMA"), ("DCFPyL", "PSMA"), ("Piflufolastat F18", "PSMA")],
        *[("Ga-68 DOTA-TATE", "DOTATATE, DOTATOC or DOTANOC"), ("68Ga-DOTATOC", "DOTATATE, DOTATOC or DOTANOC")],
        *[("Fluorocholine", "choline"), ("FCH", "choline"), ("18F-FLT", "FLT"), ("F18 FLT", "FLT"), ("FET", "FET")],
        *[("O-(2-fluoroethyl)-L-tyrosine", "FET"), ("F-DOPA", "DOPA"), ("NaF", "sodium fluoride")],
        *[(text, "sodium fluoride") for text in ("Na18F", "Na[18F]F", "[18F]NaF", "Na-18F", "Na (18F)")],
        *[("ПСМА (PSMA-1007)", "PSMA"), ("前立腺 PSMA造影", "PSMA"), ("18F-\uff30\uff33\uff2d\uff21", "PSMA")],
        *[("Sodium Fluoride F^18^", "sodium fluoride"), ("FAPI-46", "FAPI"), ("Cu-ATSM", "ATSM")],
    ],
)
def test_other_tracers_are_a_problem_by_name(text, name):
    tracer = tracer_of(pet_header(Radiopharmaceutical=text))
    assert tracer.name == name
    assert tracer.problem.startswith(f"the tracer is {name} by") and "(0054,0016)" in tracer.problem


@pytest.mark.parametrize(
    "changes, problem",
    [
        pytest.param(coded("422598008", "SCT"), "the tracer is FMISO", id="fmiso_by_code"),
        pytest.param(coded("C118961", "NCIt"), "the tracer is PSMA", id="psma_by_code"),
        pytest.param(coded("129512009", "SCT"), "the tracer is Raclopride", id="any_tracer_of_the_dictionary"),
        pytest.param(coded("999", "99X", "FLT"), "the tracer is FLT", id="by_the_meaning_of_an_unknown_code"),
        pytest.param(coded("35321007", "SCT", text="FMISO"), "both FDG and FMISO", id="code_and_text_disagree"),
        pytest.param(coded("35321007", "SCT", "PSMA-11"), "both FDG and PSMA", id="code_and_meaning_disagree"),
        pytest.param({"RadionuclideHalfLife": 4062.6}, r"is 4062.6 s, that of Ga-68; F-18", id="half_life_of_ga68"),
        pytest.param({"RadionuclideHalfLife": 1223}, r"is 1223 s, that of C-11; F-18", id="half_life_of_c11"),
        pytest.param({"RadionuclideHalfLife": 109.77}, r"\(0018,1075\) is 109.77 s; F-18", id="half_life_in_minutes"),
        pytest.param(
            {"Radiopharmaceutical": None, "RadionuclideHalfLife": 4062.6}, "that of Ga-68", id="no_name_and_ga68"
        ),
        pytest.param({"RadionuclideCode": [concept("C-131A3", "SRT")]}, "nuclide is Ga-68", id="nuclide_by_code"),
        pytest.param({"RadionuclideCode": [concept("x", "99X", "11C")]}, "nuclide is C-11", id="nuclide_by_meaning"),
    ],
)
def test_what_cannot_be_fdg(changes, problem):
    found = tracer_of(header_of(changes)).problem
    assert re.search(problem, found), found


@pytest.mark.parametrize(
    "changes, name, doubt, order",
    [
        pytest.param({"Radiopharmaceutical": None}, "", "names no tracer that is known", 3, id="not_stated"),
        pytest.param({"Radiopharmaceutical": "Solution"}, "", "names no tracer that is known", 3, id="not_known"),
        pytest.param({"Radiopharmaceutical": "Fluorine-18"}, "", "names no tracer that is known", 3, id="nuclide_only"),
        pytest.param(
            {"RadiopharmaceuticalInformationSequence": None}, "", "names no tracer that is known", 3, id="no_item"
        ),
        pytest.param(
            {"Radiopharmaceutical": None, "SeriesDescription": "PET FDG"}, "", "no tracer", 2, id="description_of_fdg"
        ),
        pytest.param(
            {"Radiopharmaceutical": None, "SeriesDescription": "FMISO AC"},
            *("", "description names FMISO, and .* names no tracer", 4),
            id="description_of_fmiso",
        ),
        pytest.param({"SeriesDescription": "PSMA"}, FDG, "names PSMA, and .* says FDG", 1, id="description_disagrees"),
    ],
)
def test_tracers_in_doubt(changes, name, doubt, order):
    tracer = tracer_of(header_of(changes))
    assert (tracer.name, tracer.problem, tracer.order) == (name, "", order)
    assert re.search(doubt, tracer.doubt), tracer.doubt


def two_pets(folder, first, second):
    """A CT with two PETs of one study, the second of more slices; returns the series."""
    write_series(folder / "ct", depths=[3.0 * k for k in range(20)])
    for number, (changes, slices) in enumerate(((first, 12), (second, 20)), start=4):
        header = header_of(changes)
        tags = {
            "SeriesNumber": number,
            "RadiopharmaceuticalInformationSequence": header.get("RadiopharmaceuticalInformationSequence"),
        }
        if "SeriesDescription" in changes:
            tags["SeriesDescription"] = changes["SeriesDescription"]
        write_series(
            folder / str(number), "PT", uid=f"1.2.3.4.{number}", tags=tags, depths=[3.0 * k for k in range(slices)]
        )
    return find_series(folder)


@pytest.mark.parametrize(
    "other, reason",
    [
        pytest.param({"Radiopharmaceutical": "FMISO"}, "the tracer is FMISO", id="fmiso"),
        pytest.param({"Radiopharmaceutical": "Fluorocolina (18F)"}, "the tracer is choline", id="choline_in_spanish"),
        pytest.param({"Radiopharmaceutical": "Fluorure-18"}, "the tracer is sodium fluoride", id="fluoride_in_french"),
        pytest.param({"Radiopharmaceutical": "Metionina"}, "the tracer is methionine", id="methionine_in_italian"),
        pytest.param(coded("C118961", "NCIt", "PSMA-11 Ga^68^"), "the tracer is PSMA", id="psma"),
        pytest.param({"Radiopharmaceutical": None}, "less certainly of FDG", id="not_stated"),
        pytest.param({"Radiopharmaceutical": None, "SeriesDescription": "FMISO"}, "less certainly", id="hint"),
        pytest.param({"RadionuclideHalfLife": 4062.6}, "that of Ga-68", id="half_life"),
    ],
)
@pytest.mark.parametrize("fdg_first", [True, False], ids=["fdg_first", "fdg_last"])
def test_of_two_pets_the_one_of_fdg_is_chosen(tmp_path, other, reason, fdg_first):
    found = two_pets(tmp_path, *(({}, other) if fdg_first else (other, {})))
    choice = choose_pet_ct(found)
    assert choice.pet.number == (4 if fdg_first else 5) and choice.pet.label.endswith("attenuation corrected, FDG")
    [(_, why)] = choice.rejected
    assert reason in why


@pytest.mark.parametrize("text", ["FMISO", "68Ga-PSMA-11", "Fluorocholine", "NaF"])
def test_a_pet_of_another_tracer_alone_is_refused_by_name(tmp_path, text):
    write_series(tmp_path / "ct")
    item = pet_header(Radiopharmaceutical=text).RadiopharmaceuticalInformationSequence
    tags = {"SeriesNumber": 2, "RadiopharmaceuticalInformationSequence": item}
    write_series(tmp_path / "pet", "PT", uid="1.2.3.4.4", tags=tags)
    with pytest.raises(
        DicomError,
        match=rf"no usable .*PET(.|\n)*the tracer is {tracer_of(pet_header(Radiopharmaceutical=text)).name} by",
    ):
        choose_pet_ct(find_series(tmp_path))


# --- moments ---------------------------------------------------------------------------------------------------------

# of pet_header(): 70 kg, 370 MBq at 10:00, scan at 11:50, half-life 110 min
ONE_HALF_LIFE = 70_000 / 185e6
AT_INJECTION = 70_000 / 370e6
GE = (0x0009, "GEMS_PETD_01")
PHILIPS = (0x7053, "Philips PET Private Group")
LATER_SERIES = {"SeriesDate": "20200102", "SeriesTime": "150000"}


def after(minutes):
    """The factor when the scan starts so many minutes after the injection."""
    return AT_INJECTION * 2 ** (minutes / 110)


def scan_of(*times, dates=("20200102",), **changes):
    """Slices acquired at these times of day."""
    days = [*dates, *[dates[-1]] * (len(times) - len(dates))]
    return [
        pet_header(AcquisitionTime=clock, AcquisitionDate=day, **changes)
        for clock, day in zip(times, days, strict=True)
    ]


ZEROS = {"SeriesTime": "000000", "AcquisitionTime": "000000", "RadiopharmaceuticalStartTime": "000000"}
NOON = dict.fromkeys(ZEROS, "120000")
DATE_TIME = "RadiopharmaceuticalStartDateTime"
CLOCK = "RadiopharmaceuticalStartTime"


@pytest.mark.parametrize(
    "changes, factor",
    [
        # the scanner's clock is not stated: 1072, on that clock, agrees with 1078 in some time zone
        pytest.param({DATE_TIME: "20200102090000+0000"}, ONE_HALF_LIFE, id="utc_without_zone_of_the_scanner"),
        pytest.param({DATE_TIME: "20200102043000-0530"}, ONE_HALF_LIFE, id="offset_without_zone_of_the_scanner"),
        pytest.param({DATE_TIME: "20200102154500+0545"}, ONE_HALF_LIFE, id="zone_of_quarter_hours"),
        pytest.param({DATE_TIME: "20200102100000+0100"}, ONE_HALF_LIFE, id="offset_of_the_scanner_itself"),
        pytest.param(
            {DATE_TIME: "20200102090000+0000", "TimezoneOffsetFromUTC": "+0100"},
            ONE_HALF_LIFE,
            id="zone_of_the_scanner",
        ),
        pytest.param(
            {DATE_TIME: "20200102100000", "TimezoneOffsetFromUTC": "+0100"}, ONE_HALF_LIFE, id="zone_and_no_offset"
        ),
        pytest.param({DATE_TIME: "20200102+0100"}, ONE_HALF_LIFE, id="date_with_offset_and_no_time"),
        pytest.param({DATE_TIME: "20200102100030"}, after(109.5), id="half_a_minute_apart"),
        pytest.param({DATE_TIME: "20200102100000", CLOCK: None}, ONE_HALF_LIFE, id="date_and_time_alone"),
        pytest.param({"private": (*GE, 0x3B, "DT", "20200102100000.00")}, ONE_HALF_LIFE, id="ge_injection_agrees"),
        pytest.param({"private": (*GE, 0x0D, "DT", "20200102115000.00")}, ONE_HALF_LIFE, id="ge_scan_agrees"),
        pytest.param({CLOCK: "112000"}, after(30), id="shortest_usual_uptake"),
        pytest.param({CLOCK: "075000"}, after(240), id="longest_usual_uptake"),
        pytest.param(
            {"private": (*PHILIPS, 0, "DS", "0.00101"), "private2": (*PHILIPS, 9, "DS", "2.67")},
            ONE_HALF_LIFE,
            id="philips_agrees",
        ),
    ],
)
def test_sources_that_agree_are_no_doubt(changes, factor):
    found = suv_of(pet_header(**changes))
    assert found.factor == pytest.approx(factor, rel=1e-6)
    assert found.doubts == ()


BEFORE_MIDNIGHT = {"SeriesTime": "233000", CLOCK: "223000"}


@pytest.mark.parametrize(
    "slices, minutes",
    [
        pytest.param(scan_of("233000", "234000", "000500", **BEFORE_MIDNIGHT), 60, id="date_stays"),
        pytest.param(scan_of("000500", "233000", "235900", **BEFORE_MIDNIGHT), 60, id="date_stays_in_any_order"),
        pytest.param(
            scan_of("233000", "000500", dates=("20200102", "20200103"), **BEFORE_MIDNIGHT), 60, id="date_changes"
        ),
        pytest.param(
            scan_of("233000", "000500", dates=("20200103",), **{**BEFORE_MIDNIGHT, "SeriesDate": "20200103"}),
            60,
            id="date_of_the_second_day",
        ),
        pytest.param(
            scan_of("233000", "000500", **BEFORE_MIDNIGHT, **{DATE_TIME: "20200102223000"}), 60, id="injection_dated"
        ),
        pytest.param(
            scan_of("233000", "000500", **{**BEFORE_MIDNIGHT, "SeriesTime": "001500", "SeriesDate": "20200103"}),
            60,
            id="series_made_afterwards",
        ),
        pytest.param(
            scan_of("233000", "000500", **{**BEFORE_MIDNIGHT, "SeriesTime": "001500"}),
            60,
            id="series_made_afterwards_with_the_date_of_the_first_day",
        ),
        pytest.param(
            scan_of("000200", "001500", SeriesTime="235800", **{CLOCK: "225800"}), 60, id="beds_after_midnight"
        ),
        pytest.param(
            scan_of("003000", "004500", SeriesTime="003000", **{CLOCK: "233000"}), 60, id="injection_before_midnight"
        ),
        pytest.param(
            scan_of("130500", **{**LATER_SERIES, "SeriesDate": "20200103", "SeriesTime": "121000", CLOCK: "120500"}),
            60,
            id="series_made_on_the_next_day",
        ),
        pytest.param(scan_of("080000", SeriesTime="203000", **{CLOCK: "070000"}), 60, id="series_made_in_the_evening"),
    ],
)
def test_scans_and_midnight(slices, minutes):
    found = suv_of(slices)
    assert found.factor == pytest.approx(after(minutes), rel=1e-9)
    assert found.doubts == ()


PART_1 = {CLOCK: "100000", "RadionuclideTotalDose": 185e6}
PART_2 = {CLOCK: "104500", "RadionuclideTotalDose": 185e6}


def decayed(minutes, **changes):
    """A PET of 2 min a bed, whose Decay Factor corrects for a decay of so many minutes."""
    return pet_header(DecayFactor=f"{2 ** (minutes / 110):.6g}", ActualFrameDuration=120_000, **changes)


def parts(*items, **changes):
    """A PET with several radiopharmaceutical items."""
    header = pet_header(**changes)
    header.RadiopharmaceuticalInformationSequence = [
        pet_header(**item).RadiopharmaceuticalInformationSequence[0] for item in items
    ]
    return header


@pytest.mark.parametrize(
    "header, factor, doubt",
    [
        pytest.param(pet_header(**{CLOCK: "112100"}), after(29), "29 min after the injection; 30 to 240", id="early"),
        pytest.param(pet_header(**{CLOCK: "074900"}), after(241), "241 min after the injection", id="late"),
        pytest.param(
            pet_header(**{DATE_TIME: "20200102100500"}),
            after(105),
            r"1078\) and .*1072\) are 5 min apart",
            id="minutes",
        ),
        pytest.param(
            pet_header(**{DATE_TIME: "20200102153000"}),
            ONE_HALF_LIFE,
            r"330 min apart; .*1072\) is used",
            id="impossible",
        ),
        pytest.param(
            pet_header(**{DATE_TIME: "20190704100000"}), ONE_HALF_LIFE, r"date in .*1078\)", id="another_date"
        ),
        pytest.param(
            pet_header(private=(*GE, 0x3B, "DT", "20200102103000.00")),
            ONE_HALF_LIFE,
            r"103B\).* 30 min",
            id="ge_injection",
        ),
        pytest.param(
            pet_header(private=(*GE, 0x0D, "DT", "20200102120000.00")), ONE_HALF_LIFE, r"100D\).* 10 min", id="ge_scan"
        ),
        pytest.param(
            pet_header(AcquisitionTime="123000"), ONE_HALF_LIFE, "40 min after Series Time", id="series_long_before"
        ),
        pytest.param(
            pet_header(private=(*PHILIPS, 0, "DS", "0.002"), private2=(*PHILIPS, 9, "DS", "2.67")),
            *(ONE_HALF_LIFE, "Philips.* 1.98 times"),
            id="philips_bqml",
        ),
        pytest.param(
            pet_header(Units="CNTS", private=(*PHILIPS, 0, "DS", "0.002"), private2=(*PHILIPS, 9, "DS", "2.67")),
            *(0.002, "Philips.* 1.98 times"),
            id="philips_counts",
        ),
        pytest.param(pet_header(Units="GML", **ZEROS), 1.0, "have the same time", id="gml_times_zero"),
        pytest.param(
            pet_header(DecayCorrection="ADMIN", **ZEROS), AT_INJECTION, "have the same time", id="admin_times_zero"
        ),
        pytest.param(pet_header(Units="GML", **{CLOCK: "112100"}), 1.0, "29 min after", id="gml_early"),
        pytest.param(
            pet_header(Units="CNTS", private=(*PHILIPS, 0, "DS", "0.002"), **ZEROS),
            0.002,
            "have the same time",
            id="counts_zero",
        ),
        pytest.param(pet_header(Radiopharmaceutical=None), ONE_HALF_LIFE, "names no tracer", id="tracer_not_stated"),
        pytest.param(
            parts(PART_1, PART_2), 70_000 / (185e6 * (0.5 + 2 ** (-65 / 110))), "given in 2 parts", id="two_injections"
        ),
        pytest.param(
            pet_header(PatientWeight=7),
            ONE_HALF_LIFE / 10,
            "Weight .* is 7 kg; 30 to 250 kg are usual",
            id="weight_low",
        ),
        pytest.param(pet_header(PatientWeight=280), ONE_HALF_LIFE * 4, "is 280 kg; 30 to 250", id="weight_high"),
        pytest.param(
            pet_header(RadionuclideTotalDose=3.7e9),
            ONE_HALF_LIFE / 10,
            "Dose .* is 3700 MBq; 20 to 1000",
            id="dose_high",
        ),
        pytest.param(pet_header(RadionuclideTotalDose=3.7e6), ONE_HALF_LIFE * 100, "is 3.7 MBq", id="dose_low"),
        pytest.param(
            decayed(110 + 1),
            ONE_HALF_LIFE,
            "decay of 111 min, and by the times .* for 1 min",
            id="start_but_to_injection",
        ),
        pytest.param(decayed(15), ONE_HALF_LIFE, "decay of 15 min, and by the times .* for 1 min", id="start_15_min"),
        pytest.param(
            decayed(1, DecayCorrection="ADMIN"),
            *(AT_INJECTION, "decay of 1 min, and by the times .* for 111 min"),
            id="admin_but_to_start",
        ),
    ],
)
def test_doubts_are_said(header, factor, doubt):
    found = suv_of(header)
    assert found.factor == pytest.approx(factor, rel=1e-9)
    assert len(found.doubts) == 1 and re.search(doubt, found.doubts[0]), found.doubts


@pytest.mark.parametrize(
    "header",
    [
        pytest.param(decayed(1), id="start"),
        pytest.param(decayed(10), id="start_within_tolerance"),
        pytest.param(decayed(111, DecayCorrection="ADMIN"), id="admin"),
        pytest.param(decayed(31, AcquisitionTime="122000"), id="late_bed"),
        pytest.param(pet_header(DecayFactor=1.0, AcquisitionTime="121000"), id="one_says_nothing"),
        pytest.param([decayed(9, AcquisitionTime="115800"), decayed(1)], id="first_of_two_beds"),
        pytest.param(decayed(1, SeriesTime="235900", AcquisitionTime="000000", **{CLOCK: "225900"}), id="midnight"),
        pytest.param(pet_header(PatientWeight=30, RadionuclideTotalDose=20e6), id="lowest"),
        pytest.param(pet_header(PatientWeight=250, RadionuclideTotalDose=1e9), id="highest"),
    ],
)
def test_what_is_usual_is_no_doubt(header):
    assert suv_of(header).doubts == ()


def test_a_decay_factor_that_cannot_be_compared_changes_nothing():
    header = pet_header(DecayFactor="2.5", DecayCorrection="ADMIN", AcquisitionDate=None)
    assert suv_of(header) == Suv(AT_INJECTION)


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"Units": "GML", CLOCK: None}, id="gml_without_injection"),
        pytest.param({"Units": "GML", "SeriesTime": None}, id="gml_without_series_time"),
        pytest.param({"DecayCorrection": "ADMIN", "AcquisitionDate": None}, id="admin_without_acquisition"),
        pytest.param(
            {"Units": "CNTS", "private": (*PHILIPS, 0, "DS", "0.002"), "PatientWeight": 0}, id="counts_weight_0"
        ),
    ],
)
def test_absent_tags_that_are_not_needed_are_no_doubt(changes):
    assert suv_of(pet_header(**changes)).doubts == ()


@pytest.mark.parametrize(
    "header, message",
    [
        pytest.param(pet_header(**ZEROS), "have the same time", id="all_times_zero"),
        pytest.param(pet_header(**NOON), "have the same time", id="all_times_noon"),
        pytest.param(pet_header(**{**ZEROS, CLOCK: "100000"}), "14.0 h before the scan", id="times_of_the_scan_zero"),
        pytest.param(pet_header(**{CLOCK: "000000"}), "11.8 h before the scan", id="time_of_the_injection_zero"),
        pytest.param(pet_header(**{DATE_TIME: "20200102110000"}), "60 min apart; correct", id="an_hour_apart"),
        pytest.param(pet_header(**{DATE_TIME: "20200102101100"}), "11 min apart; correct", id="11_min_apart"),
        pytest.param(
            pet_header(**{DATE_TIME: "20200102090000+0000", "TimezoneOffsetFromUTC": "+0200"}),
            *("60 min apart; correct",),
            id="an_hour_apart_by_the_time_zone",
        ),
        pytest.param(pet_header(**{DATE_TIME: "20200102090700+0000"}), "disagree in any time zone", id="no_time_zone"),
        pytest.param(
            pet_header(**{DATE_TIME: "20200102094500+0000"}), "disagree in any time zone", id="no_zone_of_quarter_hours"
        ),
        pytest.param(
            pet_header(**{DATE_TIME: "20200102083000+0000"}), "disagree in any time zone", id="no_zone_of_half_hours"
        ),
        pytest.param(
            pet_header(**{DATE_TIME: "20200102090000+0000", CLOCK: None}),
            r"\(0008,0201\) or .*clock is not known",
            id="utc",
        ),
        pytest.param(
            pet_header(**{DATE_TIME: "20200102090000+0000", "TimezoneOffsetFromUTC": "CET"}),
            r"\(0008,0201\)",
            id="zone",
        ),
        pytest.param(scan_of("115000", "000000", "120000"), "the scan took 12.0 h", id="one_slice_without_its_time"),
        pytest.param(parts(PART_1, PART_1), "2 items with the same dose and time", id="one_dose_twice"),
        pytest.param(parts(PART_1, PART_2, DecayCorrection="ADMIN"), "one of several injections", id="parts_and_admin"),
        pytest.param(
            parts(PART_1, {**PART_2, "RadionuclideTotalDose": None}), r"\(0018,1074\)", id="part_without_dose"
        ),
        pytest.param(parts(PART_1, {"Radiopharmaceutical": "FMISO"}), "both FDG and FMISO", id="two_tracers"),
        pytest.param(pet_header(Radiopharmaceutical="FMISO"), "the tracer is FMISO", id="another_tracer"),
        pytest.param(pet_header(Units="GML", Radiopharmaceutical="PSMA"), "the tracer is PSMA", id="gml_of_psma"),
        pytest.param(
            [pet_header(), pet_header(Radiopharmaceutical=None)],
            "slices differ in their tracer",
            id="slices_and_tracer",
        ),
        pytest.param([pet_header(), parts(PART_1, PART_2)], "differ in the number of items", id="slices_and_items"),
        pytest.param([pet_header(), pet_header(**{CLOCK: "101000"})], r"differ in .*1072\)", id="slices_and_injection"),
        pytest.param(
            pet_header(Units="CNTS", private=(*PHILIPS, 0, "UN", b"1e400")), r"\(7053,1000\).*finite", id="factor_inf"
        ),
        pytest.param(
            pet_header(Units="CNTS", private=(*PHILIPS, 0, "UN", b"x")), r"\(7053,1000\).*finite", id="factor_text"
        ),
        pytest.param(pet_header(RadionuclideTotalDose=370e3), "is 370000 Bq.*check its unit", id="dose_in_kbq"),
        pytest.param(pet_header(RadionuclideTotalDose=10), "is 10 Bq.*check its unit", id="dose_in_mci"),
        pytest.param(
            pet_header(RadionuclideHalfLife=110), "is 110 s.*check tracer and unit", id="half_life_in_minutes"
        ),
    ],
)
def test_headers_without_suv_are_refused(header, message):
    with pytest.raises(DicomError, match=message):
        suv_of(header)


# --- files, real headers, cases --------------------------------------------------------------------------------------


@pytest.mark.parametrize("slices", [range(12), [7]], ids=["all_slices", "one_slice"])
@pytest.mark.parametrize("value", [None, ""], ids=["absent", "empty"])
def test_a_pet_without_rescale_slope_is_refused(tmp_path, slices, value):
    write_series(tmp_path, "PT", each=lambda k: {"RescaleSlope": value} if k in slices else {})
    with pytest.raises(DicomError, match=r"IM\d+: Rescale Slope \(0028,1053\) is missing or empty"):
        read_series(find_series(tmp_path)[0])


@pytest.mark.parametrize("modality", ["CT", "PT"])
@pytest.mark.parametrize("slope", [0, -0.5])
def test_a_slope_that_is_not_above_zero_is_refused(tmp_path, modality, slope):
    write_series(tmp_path, modality, each=lambda k: {"RescaleSlope": slope} if k == 7 else {})
    with pytest.raises(DicomError, match=r"IM\d+: Rescale Slope \(0028,1053\) is .* not above 0"):
        read_series(find_series(tmp_path)[0])


def test_an_image_of_zeros_may_have_a_slope_of_zero(tmp_path):
    stored = np.ones((12, 6, 5), dtype=np.int16)
    stored[7] = 0
    write_series(tmp_path, "PT", each=lambda k: {"RescaleSlope": int(k != 7)}, stored=stored)
    np.testing.assert_array_equal(read_series(find_series(tmp_path)[0])[0].transpose(2, 1, 0), stored)


def test_doubts_become_warnings_of_the_case(tmp_path):
    write_series(tmp_path / "ct", depths=np.arange(20) * 3.0)
    tags = {"SeriesNumber": 2, **pet_tags(RadiopharmaceuticalStartTime="112100")}
    write_series(tmp_path / "pet", "PT", uid="1.2.3.4.4", tags=tags, depths=np.arange(20) * 3.0)
    choice = choose_pet_ct(find_series(tmp_path))
    case = LoadScansd()({keys.CT: DicomScan(choice.ct), keys.PET: DicomScan(choice.pet)})
    assert case[keys.DOUBTS] == ["the scan started 29 min after the injection; 30 to 240 min are usual for FDG"]
    checked = CheckQualityd(16, on_reject="flag")(LocaliseBoxd(16, 4.0)(case))
    [check] = [check for check in checks_from_json(checked[keys.QUALITY]) if check.name == "headers"]
    assert (check.verdict, check.message) == ("warn", case[keys.DOUBTS][0])
    assert keys.DOUBTS not in checked


def test_real_headers_give_the_known_factor():
    path = SHARED / "data" / "suv_headers" / "suv_headers.json"
    if not path.is_file():
        pytest.skip("the real PET headers are not here")
    for series in json.loads(path.read_text(encoding="utf-8")):
        found = suv_of([_from_json(each) for each in series["slices"]])
        assert found.factor == pytest.approx(series["suvbw_factor"], rel=1e-6), series["name"]
        assert [doubt for doubt in found.doubts if "no tracer" not in doubt] == [], series["name"]


def _from_json(values):
    header, item = Dataset(), Dataset()
    for name, value in values.items():
        if name == "PhilipsPETPrivateGroup":
            block = header.private_block(*PHILIPS, create=True)
            for key, offset in (("SUVScaleFactor", 0), ("ActivityConcentrationScaleFactor", 9)):
                if key in value:
                    block.add_new(offset, "DS", value[key])
        else:
            setattr(item if name.startswith("Radi") else header, name, value)
    header.RadiopharmaceuticalInformationSequence = [item]
    return header


@pytest.mark.parametrize(
    "name, refused",
    [
        ("suv-zero-times", "have the same time"),
        ("suv-no-rescale-slope", r"\(0028,1053\)"),
        ("suv-midnight-date-not-changed", ""),
        ("suv-utc-datetime", ""),
        ("two-tracers", ""),
    ],
)
def test_shared_cases(name, refused):
    folder = SHARED / "cases" / name
    if not folder.is_dir():
        pytest.skip("the shared cases are not here")
    [found] = find_examinations(folder)
    scan = DicomScan(found.choice.pet)
    if refused:
        with pytest.raises(DicomError, match=refused):
            scan.read()
    else:
        assert scan.read()[0].max() == pytest.approx(14.44, abs=0.005)
        assert scan.doubts == ()


def test_real_pet_is_read_and_its_unknown_tracer_said():
    folder = SHARED / "data" / "hn_pet" / "dicom" / "PET"
    if not folder.is_dir():
        pytest.skip("the real head and neck PET is not here")
    scan = DicomScan(find_series(folder)[0])
    assert scan.suv.factor == pytest.approx(2.9448040e-4, rel=1e-6)
    [doubt] = scan.doubts
    assert "names no tracer" in doubt
