"""Clinical values: spellings, columns, the two codings, and messages that lead to the cell."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from conftest import SHARED_DATA
from scripts.cohorts import clinical
from scripts.cohorts.clinical import ClinicalValueError

NAN = float("nan")


@pytest.mark.parametrize(
    ("feature", "spellings", "value"),
    [
        pytest.param("age", [61, 61.0, "61", " 61.0 ", "61,0", np.int64(61), np.float32(61)], 61.0, id="age"),
        pytest.param("age", ["63.5", "63,5"], 63.5, id="decimal_comma"),
        pytest.param("gender", [1, 1.0, "1", "1.0", "M", "male", " Male ", True, "'male'"], 1.0, id="male"),
        pytest.param("gender", [0, "0.0", "F", "female", False], 0.0, id="female"),
        pytest.param("tobacco", ["yes", "1", 1.0, "TRUE"], 1.0, id="tobacco"),
        pytest.param("alcohol", ["no", "0", "False"], 0.0, id="alcohol"),
        pytest.param("treatment", [1, "chemoradiotherapy", "CRT", "Chemo-radiotherapy"], 1.0, id="chemoradiotherapy"),
        pytest.param("treatment", [0, "radiotherapy", "RT"], 0.0, id="radiotherapy"),
        pytest.param("performance_status", ["2", 2.0, "ECOG 2", "PS2", "ECOG-Pt 2"], 2.0, id="performance_status"),
        pytest.param("m_stage", ["M1", "m1", "cM1", "1", 1, "1.0"], 1.0, id="m1"),
        pytest.param("m_stage", ["M0", "0", 0.0], 0.0, id="m0"),
        pytest.param("t_stage", ["T4a", "4a", "pT4b", "4", "cT4", "T 4"], 4.0, id="t4"),
        pytest.param("t_stage", ["Tis", "T0", "0"], 0.0, id="t0"),
        pytest.param("n_stage", ["N2c", "2b", "2", 2.0], 2.0, id="n2"),
        pytest.param("hpv", ["+", "positive", "1.0", "Pos"], 1.0, id="hpv_positive"),
        pytest.param("hpv", ["-", "negative", "0", "Yes, Negative"], 0.0, id="hpv_negative"),
        pytest.param("rfs", ["1240", "1240.0", 1240], 1240.0, id="rfs"),
        pytest.param("rfs", ["-3"], -3.0, id="negative_rfs_is_left_to_the_cohort"),
        pytest.param("relapse", ["1", 1.0, True, "yes"], 1.0, id="relapse"),
    ],
)
def test_spellings_of_one_value_parse_alike(feature, spellings, value):
    assert [clinical.parse_value(feature, spelling) for spelling in spellings] == [value] * len(spellings)


STAGES = {
    "t_stage": {
        **{"cT2": 2, "pT2": 2, "ycT2": 2, "ypT3": 3, "yT3": 3, "rT0": 0, "rpT4a": 4, "aT1": 1, "uT2": 2, "T3 (2)": 3},
        **{
            "T2(m)": 2,
            "T1 (m)": 1,
            "T2 (m, 2)": 2,
            "T2m": 2,
            "T1(s)": 1,
            "Tis": 0,
            "pTis": 0,
            "Tis(DCIS)": 0,
            "T1mi": 1,
        },
        **{
            "T4NOS": 4,
            "T4 b": 4,
            "T-3": 3,
            "T_2": 2,
            "T2.0": 2,
            "3b": 3,
            "T1a1": 1,
            "TX": None,
            "pTX": None,
            "cTx": None,
        },
    },
    "n_stage": {
        **{
            "pN2b": 2,
            "ypN1": 1,
            "N2a": 2,
            "N3b": 3,
            "pN1mi": 1,
            "pN1 (mi)": 1,
            "N0(i+)": 0,
            "N0 (i-)": 0,
            "pN0(mol+)": 0,
        },
        **{"N1(sn)": 1, "N1(f)": 1, "N2b(ENE-)": 2, "N3b ENE+": 3, "N2 (U)": 2, "N1(L)": 1, "cNX": None, "rN1": 1},
    },
    "m_stage": {"cM0": 0, "pM1": 1, "cM0(i+)": 0, "M0(i+)": 0, "M1a": 1, "M1c": 1, "MX": None, "pMx": None},
}
"""As AJCC writes them: what stands before and behind tells how and when it was found out, not which category."""


@pytest.mark.parametrize(
    ("feature", "raw", "value"),
    [(feature, raw, value) for feature, known in STAGES.items() for raw, value in known.items()],
)
def test_stages_are_read_as_ajcc_writes_them(feature, raw, value):
    assert clinical.parse_value(feature, raw) == value
    assert clinical.parse_value(feature, raw.lower()) == value


@pytest.mark.parametrize(
    ("feature", "raw"),
    [
        *[("t_stage", raw) for raw in ("T5", "N2", "T1-2", "T2/3", "T2N1M0", "T12", "T3(", "T2(?)", "zT2", "T", "T2e")],
        *[("n_stage", raw) for raw in ("N4", "T2", "Nis", "N+", "N2b/c", "N1 2")],
        *[("m_stage", raw) for raw in ("M2", "N0", "Mis", "M")],
    ],
)
def test_what_is_no_stage_or_two_of_them_is_refused(feature, raw):
    with pytest.raises(ClinicalValueError, match="is no value of"):
        clinical.parse_value(feature, raw)


RADCURE = SHARED_DATA / "radcure_clinical" / "RADCURE_Clinical_v04_20241219.csv"


@pytest.mark.skipif(not RADCURE.is_file(), reason="the real table is not beside the repository")
def test_every_stage_of_a_real_table_is_read():
    table = pd.read_csv(RADCURE, dtype=str, keep_default_na=False)
    for feature, column in (("t_stage", "T"), ("n_stage", "N"), ("m_stage", "M ")):
        assert clinical.match_columns(list(table), feature) == [list(table).index(column)]
        for raw in table[column].unique():
            digit = next((float(sign) for sign in raw if sign.isdigit()), 0.0 if raw == "Tis" else None)
            assert clinical.parse_value(feature, raw) == digit, raw
    status = {raw: clinical.parse_value("hpv", raw) for raw in table["HPV"].unique()}
    assert status == {"": None, "Yes, positive": 1.0, "Yes, Negative": 0.0}


@pytest.mark.parametrize(
    ("feature", "value", "doubt"),
    [
        pytest.param("rfs", 99999.0, "more than 50 years", id="nines"),
        pytest.param("rfs", 1e9, "more than 50 years", id="huge"),
        pytest.param("rfs", 9999.0, "all nines", id="four_nines"),
        pytest.param("rfs", 999.0, "", id="under_three_years"),
        pytest.param("rfs", 9998.0, "", id="27_years"),
        pytest.param("age", 0.0, "0 years", id="age_0"),
        pytest.param("age", 99.0, "", id="age_99"),
        pytest.param("age", None, "", id="missing"),
        pytest.param("hpv", 0.0, "", id="level"),
    ],
)
def test_values_that_cannot_be_are_in_doubt(feature, value, doubt):
    assert bool(clinical.doubt_about(feature, value)) == bool(doubt)
    assert doubt in clinical.doubt_about(feature, value)


def test_a_value_in_doubt_counts_as_missing_and_is_told(caplog):
    assert clinical.parse_clinical({"Age": 0}, ("age",), where="ehr.json") == {"age": None}
    assert "ehr.json, Age: 0 is 0 years: read as missing" in caplog.text


@pytest.mark.parametrize("feature", [*clinical.FEATURES, *clinical.LABELS])
@pytest.mark.parametrize("raw", [None, "", "  ", NAN, np.nan, "nan", "NaN", "N/A", "NA", "unknown", "None", "null"])
def test_missing_is_none(feature, raw):
    assert clinical.parse_value(feature, raw) is None


@pytest.mark.parametrize(
    ("feature", "raw"), [("m_stage", "Mx"), ("t_stage", "TX"), ("n_stage", "nx"), ("m_stage", "X")]
)
def test_stage_x_is_missing(feature, raw):
    assert clinical.parse_value(feature, raw) is None


@pytest.mark.parametrize(
    ("feature", "raw", "accepted"),
    [
        pytest.param("gender", "2", "0 (female/f), 1 (male/m)", id="level_out_of_range"),
        pytest.param("gender", "x", "0 (female/f), 1 (male/m)", id="word"),
        pytest.param("performance_status", 5, "0, 1, 2, 3, 4", id="performance_status_5"),
        pytest.param("performance_status", 1.5, "0, 1, 2, 3, 4", id="between_levels"),
        pytest.param("m_stage", "M2", "0 (M0), 1 (M1), or empty/Mx/x", id="m2"),
        pytest.param("n_stage", "N4", "N3", id="n4"),
        pytest.param("age", "-1", "from 0 to 120 in years", id="negative_age"),
        pytest.param("age", "old", "from 0 to 120 in years", id="age_word"),
        pytest.param("age", True, "from 0 to 120 in years", id="age_true"),
        pytest.param("age", 999, "from 0 to 120 in years", id="age_999"),
        pytest.param("age", "1e400", "from 0 to 120 in years", id="age_beyond_floating_point"),
        pytest.param("performance_status", "ECOG 0-1", "0, 1, 2, 3, 4", id="two_levels"),
        pytest.param("rfs", "1,240", "in days", id="thousands_or_decimal"),
        pytest.param("rfs", "inf", "in days", id="infinite_text"),
        pytest.param("rfs", float("inf"), "in days", id="infinite"),
        pytest.param("hpv", "p16", "1 (positive/pos/+", id="hpv_word"),
        pytest.param("relapse", "2", "1 (yes", id="relapse_2"),
    ],
)
def test_unknown_value_says_where_what_and_what_is_accepted(feature, raw, accepted):
    with pytest.raises(ClinicalValueError) as error:
        clinical.parse_value(feature, raw, where="ehr.csv, row 7, column 'X'")
    message = str(error.value)
    assert message.startswith(f"ehr.csv, row 7, column 'X': '{raw}'")
    assert feature in message
    assert accepted in message


@pytest.mark.parametrize(
    ("raw", "shown"),
    [
        pytest.param("x" * 5000, f"'{'x' * 60}...' is no value", id="long"),
        pytest.param("a\x1b[31mb\nc", r"'a\x1b[31mb\nc' is no value", id="control_characters"),
        pytest.param(10**400, f"'1{'0' * 59}...' is no value", id="whole_number_beyond_floating_point"),
    ],
)
def test_a_message_shows_no_more_of_a_cell_than_can_be_read(raw, shown):
    with pytest.raises(ClinicalValueError) as error:
        clinical.parse_value("age", raw)
    assert shown in str(error.value) and len(str(error.value)) < 200


def test_unknown_names_have_the_nearest_known_one():
    names = ["Age", "HPV status (0=-, 1=+)", "AgeAtDx", "SexMF", "Tobaco", "t_stag", "Weight", "TNM_M", "x" * 10000]
    found = clinical.unknown_names(names)
    assert found == {
        **{"AgeAtDx": "Age", "SexMF": "Sex", "Tobaco": "Tobacco", "t_stag": "T-stage", "Weight": "", "TNM_M": ""},
        "x" * 10000: "",
    }


def test_unknown_feature_lists_the_known_ones():
    with pytest.raises(ValueError, match=r"unknown clinical feature 'weight'; known are age, gender, tobacco"):
        clinical.parse_value("weight", 70)


@pytest.mark.parametrize(
    ("title", "feature"),
    [
        pytest.param("Age", "age", id="2025_age"),
        pytest.param("Tobacco Consumption", "tobacco", id="2025_tobacco"),
        pytest.param("Tobacco", "tobacco", id="2022_tobacco"),
        pytest.param("tobacco_consumption", "tobacco", id="underscore"),
        pytest.param("Alcohol", "alcohol", id="2022_alcohol"),
        pytest.param("Performance status", "performance_status", id="2022_performance"),
        pytest.param("Performance Status", "performance_status", id="2025_performance"),
        pytest.param("Chemotherapy", "treatment", id="2022_treatment"),
        pytest.param("M-stage", "m_stage", id="2025_m"),
        pytest.param("T-stage", "t_stage", id="2026_t"),
        pytest.param("N Stage", "n_stage", id="2026_n"),
        pytest.param("HPV status (0=-, 1=+)", "hpv", id="2022_hpv_with_remark"),
        pytest.param("HPV Status", "hpv", id="2025_hpv"),
        *[
            pytest.param(f"Gender ({remark})", "gender", id=remark)
            for remark in ("1=M, 0=F", "M=1; F=0", "F: 0, M: 1", "0 female, 1 male", "F/M = 0/1", "M/F", "at birth")
        ],
        *[pytest.param(f"Age ({unit})", "age", id=f"age_{unit}") for unit in ("years", "y", "in years")],
        pytest.param("Performance Status (ECOG 0-4)", "performance_status", id="range"),
        pytest.param("T-stage (8th edition)", "t_stage", id="edition"),
        pytest.param("RFS", "rfs", id="rfs"),
        pytest.param("RFS (days)", "rfs", id="rfs_days"),
        pytest.param("Relapse", "relapse", id="relapse"),
    ],
)
def test_column_is_found_by_exactly_one_feature(title, feature):
    header = ["PatientID", title, "Weight", "Surgery"]
    every = {**clinical.FEATURES, **clinical.LABELS}
    assert {name: clinical.match_columns(header, name) for name in every if clinical.match_columns(header, name)} == {
        feature: [1]
    }


@pytest.mark.parametrize(
    ("title", "feature", "message"),
    [
        pytest.param("Gender (0=M, 1=F)", "gender", "says 0 = M, but gender is read as", id="turned_round"),
        pytest.param("HPV status (0=+, 1=-)", "hpv", r"says 0 = \+", id="hpv_turned_round"),
        *[
            pytest.param(f"Gender ({remark})", "gender", f"says {code}, but", id=remark)
            for remark, code in {
                "M=0; F=1": "0 = M",
                "M: 0 F: 1": "0 = M",
                "0 male, 1 female": "0 = male",
                "male 0, female 1": "0 = male",
                "F/M = 1/0": "1 = F",
                "1=M, 2=F": "2 = F",
                "male 1, female 2": "2 = female",
            }.items()
        ],
        pytest.param("HPV (-=1, +=0)", "hpv", "says 1 = -, but", id="signs_before_numbers"),
        pytest.param("HPV (negative 1, positive 2)", "hpv", "says 1 = negative, but", id="from_1"),
        pytest.param("Relapse (1 no 0 yes)", "relapse", "says 1 = no, but", id="relapse_turned_round"),
        *[
            pytest.param(f"RFS ({unit})", "rfs", "is read in days", id=unit)
            for unit in ("months", "mo", "in yrs", "wk")
        ],
        *[
            pytest.param(f"Age [{unit}]", "age", "is read in years", id=f"age_{unit}")
            for unit in ("months", "days", "d")
        ],
    ],
)
def test_remark_that_contradicts_is_an_error(title, feature, message):
    with pytest.raises(ClinicalValueError, match=message):
        clinical.match_columns([title], feature)


def test_no_two_features_share_a_column_name():
    every = {**clinical.FEATURES, **clinical.LABELS}.values()
    titles = [
        title for feature in every for title in {feature.column, feature.name.replace("_", " "), *feature.aliases}
    ]
    for title in titles:
        assert len([f for f in every if clinical.match_columns([title], f.name)]) == 1, title


def test_paper_coding_shifts_levels_and_leaves_missing_at_zero():
    values = {
        "age": 61.0,
        "gender": 0.0,
        "tobacco": 1.0,
        "alcohol": None,
        "treatment": 1.0,
        "performance_status": 0.0,
        "m_stage": NAN,
    }
    coded = clinical.code_clinical(values)
    assert coded.dtype == np.float32
    np.testing.assert_array_equal(coded, [61, 1, 2, 0, 2, 1, 0])


@pytest.mark.parametrize("values", [None, {}, dict.fromkeys(clinical.DEFAULT_FEATURES)])
def test_no_values_are_all_zero(values):
    np.testing.assert_array_equal(clinical.code_clinical(values), np.zeros(7))


def test_paper_coding_follows_the_order_of_the_list():
    values = {"t_stage": 3.0, "n_stage": 0.0, "age": 50.0}
    np.testing.assert_array_equal(clinical.code_clinical(values, ("n_stage", "age", "t_stage")), [1, 50, 4])


def test_paper_coding_separates_every_level_from_missing():
    for name, feature in clinical.FEATURES.items():
        codes = [float(clinical.code_clinical({name: level}, (name,))[0]) for level in (None, *feature.levels)]
        assert codes == list(range(len(feature.levels) + 1)), name


def test_coding_of_raw_text_equals_coding_of_parsed_values():
    raw = {"age": "61", "gender": "M", "m_stage": "Mx", "hpv": "+"}
    parsed = {"age": 61.0, "gender": 1.0, "m_stage": None, "hpv": 1.0}
    np.testing.assert_array_equal(clinical.code_clinical(raw, tuple(raw)), clinical.code_clinical(parsed, tuple(raw)))


def test_coding_refuses_what_parsing_refuses():
    with pytest.raises(ClinicalValueError, match=r"clinical value 'gender': '7\.0'"):
        clinical.code_clinical({"gender": 7.0}, ("gender",))


@pytest.mark.parametrize(
    ("values", "coded"),
    [
        pytest.param({"age": 61, "hpv": 0, "t_stage": 2}, [61, 1, 0, 2], id="negative"),
        pytest.param({"age": 61, "hpv": 1, "t_stage": 2}, [61, 0, 1, 2], id="positive"),
        pytest.param({"age": 61, "hpv": None, "t_stage": None}, [61, 0, 0, 0], id="missing_is_zero_everywhere"),
        pytest.param(None, [0, 0, 0, 0], id="no_values"),
    ],
)
def test_indicator_coding(values, coded):
    features = ("age", "hpv", "t_stage")
    assert clinical.indicator_names(features) == ["age", "hpv=0", "hpv=1", "t_stage"]
    np.testing.assert_array_equal(clinical.code_indicators(values, features), coded)


def test_indicator_coding_can_leave_missing_numbers_to_the_caller():
    coded = clinical.code_indicators({"hpv": None}, ("age", "hpv"), missing_number=NAN)
    np.testing.assert_array_equal(coded, [NAN, 0, 0])


def test_every_value_has_a_scale_that_leaves_missing_ones_at_zero_and_known_ones_apart():
    """Levels lie one apart from zero on; ages of patients are known in full and lie within four usual differences."""
    for name, feature in clinical.FEATURES.items():
        ((known_from, usual, spread),) = clinical.clinical_scales([name])
        coded = [float(clinical.code_clinical({name: raw}, (name,))[0]) for raw in feature.levels or (20, 60, 100)]
        assert known_from > 0 and spread > 0 and min(coded) >= known_from
        scaled = [(value - usual) / spread for value in coded]
        assert scaled == ([-4, 0, 4] if name == "age" else list(range(len(coded))))


def test_mapping_of_a_request_is_read_by_feature_or_column_name():
    request = {"Age": 61, "gender": "male", "M-stage": "Mx", "Tobacco Consumption": 1.0, "HPV Status": 1}
    features = ("age", "gender", "m_stage", "tobacco", "alcohol")
    expected = {"age": 61.0, "gender": 1.0, "m_stage": None, "tobacco": 1.0, "alcohol": None}
    assert clinical.parse_clinical(request, features) == expected


def test_mapping_that_contradicts_itself_is_an_error():
    with pytest.raises(ClinicalValueError, match=r"ehr\.json, Tobacco: 1 contradicts another value of tobacco, 0"):
        clinical.parse_clinical({"Tobacco Consumption": 0, "Tobacco": 1}, ("tobacco",), where="ehr.json")
