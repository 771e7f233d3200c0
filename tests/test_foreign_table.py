"""Clinical tables of other data sets, read by a mapping file."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from conftest import ROOT
from experiments.foreign_table import NOT_POSITIVE, read_foreign_table
from scripts import keys
from scripts.cohorts.cohort import CohortError

RADCURE = ROOT.parent / "shared" / "data" / "radcure_clinical" / "RADCURE_Clinical_v04_20241219.csv"
MAPPING = ROOT / "scripts" / "experiments" / "mappings" / "radcure.json"
FEATURES = ("age", "tobacco", "treatment", "t_stage", "n_stage", "hpv")
ROW = {
    "patient_id": "P-1",
    "Age": "62.6",
    "Smoking Status": "Ex-smoker",
    "Chemo": "none",
    "T": "T3 (2)",
    "N": "pN2b",
    "HPV": "",
    "RT Start": "2/20/2002",
    "Last FU": "5/12/2003",
    "Local": "",
    "Date Local": "",
    "Distant": "",
    "Date Distant": "",
}
STATUS = {"Yes": 1, "Persistent": 1, "Possible": 0}
SMALL: dict[str, Any] = {
    "patient_id": "patient_id",
    "centre": "Toronto",
    "date_format": "%m/%d/%Y",
    "values": {
        "age": {"column": "Age"},
        "tobacco": {"column": "Smoking Status", "levels": {"Current": 1, "Ex-smoker": 1, "unknown": None}},
        "treatment": {"column": "Chemo", "levels": {"none": 0}},
        "t_stage": {"column": "T"},
        "n_stage": {"column": "N"},
        "hpv": {"column": "HPV"},
    },
    "survival": {
        "start": "RT Start",
        "failures": [
            {"date": "Date Local", "status": "Local", "levels": STATUS},
            {"date": "Date Distant", "status": "Distant", "levels": STATUS},
        ],
        "last_follow_up": "Last FU",
    },
}


def written(folder: Path, rows: list[dict[str, str]], mapping: Any = SMALL) -> tuple[Path, Path]:
    table, file = folder / "table.csv", folder / "mapping.json"
    lines = [list(ROW), *([row[title] for title in ROW] for row in rows)]
    table.write_text("\n".join(",".join(f'"{cell}"' for cell in line) for line in lines) + "\n")
    file.write_text(json.dumps(mapping))
    return table, file


@pytest.mark.parametrize(
    "change, time, event",
    [
        pytest.param({}, 446, False, id="last_follow_up"),
        pytest.param({"Local": "Yes", "Date Local": "2/21/2003"}, 366, True, id="one_failure"),
        pytest.param(
            {"Local": "yes", "Date Local": "2/21/2003", "Distant": "Persistent", "Date Distant": "3/20/2002"},
            28,
            True,
            id="first_of_two",
        ),
        pytest.param({"Local": "Possible", "Date Local": "2/21/2003"}, 446, False, id="status_that_is_no_failure"),
        pytest.param({"Local": "Yes", "Date Local": "6/1/2003"}, 466, True, id="failure_after_last_follow_up"),
    ],
)
def test_time_and_event_from_dates(tmp_path, change, time, event):
    found = read_foreign_table(*written(tmp_path, [ROW | change]), FEATURES)
    (case,) = found.cohort.cases
    assert (case[keys.TIME], case[keys.EVENT], case[keys.SURV_KNOWN]) == (time, event, True)
    assert (case[keys.CENTRE], found.years) == ("Toronto", {"P-1": 2002})


@pytest.mark.parametrize(
    "column, text, feature, value",
    [
        pytest.param("T", "T3 (2)", "t_stage", 3, id="several_tumours"),
        pytest.param("T", "rT0", "t_stage", 0, id="at_recurrence"),
        pytest.param("T", "yT2", "t_stage", 2, id="after_treatment"),
        pytest.param("T", "T2(m)", "t_stage", 2, id="multiple"),
        pytest.param("T", "Tis", "t_stage", 0, id="in_situ"),
        pytest.param("T", "TX", "t_stage", None, id="x"),
        pytest.param("N", "pN2b", "n_stage", 2, id="by_pathology"),
        pytest.param("HPV", "Yes, Negative", "hpv", 0, id="tested_negative"),
        pytest.param("HPV", "Yes, positive", "hpv", 1, id="tested_positive"),
        pytest.param("Smoking Status", "EX-smoker", "tobacco", 1, id="level_of_the_mapping"),
        pytest.param("Smoking Status", "unknown", "tobacco", None, id="level_null"),
        pytest.param("Smoking Status", "no", "tobacco", 0, id="word_of_any_table"),
        pytest.param("Chemo", "none", "treatment", 0, id="none_is_a_level_here"),
    ],
)
def test_values(tmp_path, column, text, feature, value):
    (case,) = read_foreign_table(*written(tmp_path, [ROW | {column: text}]), FEATURES).cohort.cases
    assert case[keys.CLINICAL][feature] == value


@pytest.mark.parametrize(
    "change",
    [
        pytest.param({"Last FU": "2/20/2002"}, id="zero"),
        pytest.param({"Last FU": "2/19/2002"}, id="follow_up_before_start"),
        pytest.param({"Local": "Yes", "Date Local": "1/1/2002"}, id="failure_before_start"),
    ],
)
def test_times_that_are_not_positive_are_excluded_and_listed(tmp_path, change):
    found = read_foreign_table(*written(tmp_path, [ROW | change, ROW | {"patient_id": "P-2"}]), FEATURES)
    (excluded,) = found.cohort.exclusions
    assert (excluded.patient_id, excluded.reason) == ("P-1", NOT_POSITIVE)
    assert "days in table.csv, row 2" in excluded.detail
    assert [case[keys.PATIENT_ID] for case in found.cohort.cases] == ["P-2"]


@pytest.mark.parametrize(
    "change, message",
    [
        pytest.param(
            {"T": "big"}, "row 2, patient P-1, column 'T': 'big' is no value of t_stage.*give it a level", id="value"
        ),
        pytest.param({"Smoking Status": "pipe"}, "'Smoking Status': 'pipe' is no value of tobacco", id="level"),
        pytest.param({"Local": "Maybe"}, "row 2, patient P-1, column 'Local': 'Maybe' has no level", id="status"),
        pytest.param({"Local": "Yes"}, "'Date Local': no date, but 'Local' says 'Yes'", id="no_date_of_failure"),
        pytest.param({"Last FU": "2003-05-12"}, "'2003-05-12' is no date as %m/%d/%Y", id="date"),
        pytest.param({"patient_id": ""}, "row 2: no patient id", id="no_id"),
        pytest.param({"patient_id": "P_2"}, "row 3, patient P-2: stands in table.csv, row 2 already", id="twice"),
    ],
)
def test_cells_at_fault(tmp_path, change, message):
    with pytest.raises(CohortError, match=message):
        read_foreign_table(*written(tmp_path, [ROW | change, ROW | {"patient_id": "P-2"}]), FEATURES)


def changed(**new: Any) -> dict[str, Any]:
    return {**SMALL, **new}


FAILURE: dict[str, Any] = SMALL["survival"]["failures"][0]


def failing(failure: Any) -> dict[str, Any]:
    return {**SMALL["survival"], "failures": [failure]}


def levels(feature: str, entry: Any) -> dict[str, Any]:
    return {feature: {"column": "HPV", "levels": entry}}


@pytest.mark.parametrize(
    "mapping, message",
    [
        pytest.param([], "a mapping is an object", id="no_object"),
        pytest.param({}, "no 'date_format'", id="empty"),
        pytest.param(changed(clinic="x"), "'clinic' is not known", id="unknown_name"),
        pytest.param(changed(patient_id="id"), "patient_id: no column 'id' in table.csv; its columns are", id="id"),
        pytest.param(changed(values={"weight": {"column": "Age"}}), "unknown clinical feature 'weight'", id="feature"),
        pytest.param(changed(values={"age": "Age"}), r'values.age: give {"column"', id="no_entry"),
        pytest.param(changed(values={"age": {"column": "Agee"}}), "values.age: no column 'Agee'", id="column"),
        pytest.param(
            changed(values={"hpv": {"column": "HPV", "levels": {"p16": 3}}}), "values.hpv: 3 is no level", id="level"
        ),
        pytest.param(changed(survival={"start": "RT Start"}), "survival: give start, failures", id="survival"),
        pytest.param(
            changed(survival=SMALL["survival"] | {"failures": [{"date": "Date Local"}]}), "each is", id="failure"
        ),
        pytest.param(changed(survival=SMALL["survival"] | {"start": "RT"}), "start: no column 'RT'", id="start"),
        pytest.param(changed(survival=SMALL["survival"] | {"start": None}), "start: no column None", id="start_null"),
        pytest.param(changed(survival="RT Start"), "survival: give start, failures", id="survival_text"),
        pytest.param(changed(survival=["start", "failures"]), "survival: give start, failures", id="survival_list"),
        pytest.param(changed(survival=failing("Local")), "each is", id="failure_text"),
        pytest.param(changed(survival=failing(["date", "status", "levels"])), "each is", id="failure_list"),
        pytest.param(changed(survival=failing(FAILURE | {"levels": None})), "each is", id="no_failure_levels"),
        pytest.param(changed(survival=failing(FAILURE | {"levels": ["Yes"]})), "each is", id="list_of_failure_levels"),
        pytest.param(changed(survival=failing(FAILURE | {"levels": {"Yes": [1]}})), "each is", id="failure_level"),
        pytest.param(
            changed(survival=failing(FAILURE | {"levels": {"Yes": 1, "YES ": 0}})), "each is", id="failure_level_twice"
        ),
        pytest.param(changed(values=["age"]), "values: give an object", id="values_list"),
        pytest.param(changed(values=None), "values: give an object", id="values_null"),
        pytest.param(changed(values={"age": {"column": None}}), "values.age: no column None", id="column_null"),
        pytest.param(changed(values=levels("hpv", None)), "values.hpv: levels is an object", id="levels_null"),
        pytest.param(changed(values=levels("hpv", ["p16"])), "values.hpv: levels is an object", id="levels_list"),
        pytest.param(
            changed(values=levels("hpv", {"p16": 1, "P16 ": 0})), "values.hpv: levels is an object", id="level_twice"
        ),
        pytest.param(changed(values=levels("hpv", {"p16": [1]})), r"values.hpv: \[1\] is no level", id="level_list"),
        pytest.param(changed(values=levels("age", {"old": "90"})), "values.age: '90' is no level", id="level_text"),
        pytest.param(changed(values=levels("age", {"old": 1e9})), "values.age: 1000000000.0 is no", id="level_range"),
        pytest.param(changed(values=levels("age", {"old": math.nan})), "values.age: nan is no level", id="level_nan"),
        pytest.param(changed(date_format=None), "date_format: None is no text", id="format_null"),
        pytest.param(changed(date_format="%Q"), "date_format: '%Q' gives no day", id="format_unknown"),
        pytest.param(changed(date_format="%d/%m"), "date_format: '%d/%m' gives no day", id="format_without_year"),
        pytest.param(changed(patient_id=3), "patient_id: 3 is no text", id="id_number"),
        pytest.param(changed(centre=["Toronto"]), "centre: .* is no text", id="centre_list"),
        pytest.param(changed(about="RADCURE"), "about: give an object of texts", id="about_text"),
        pytest.param(changed(about={"source": {}}), "about: give an object of texts", id="about_nested"),
    ],
)
def test_mappings_at_fault(tmp_path, mapping, message):
    with pytest.raises(CohortError, match=message):
        read_foreign_table(*written(tmp_path, [ROW], mapping), FEATURES)


def test_a_value_that_the_mapping_lacks_is_told(tmp_path):
    found = read_foreign_table(*written(tmp_path, [ROW]), (*FEATURES, "gender"))
    assert found.cohort.notes == ["no value for gender in mapping.json: unknown for every case"]
    assert found.cohort.cases[0][keys.CLINICAL]["gender"] is None


@pytest.mark.parametrize(
    "change, feature, doubt",
    [
        pytest.param({"Last FU": "12/31/9999"}, "rfs", "more than 50 years", id="date_that_means_never"),
        pytest.param({"RT Start": "1/1/1900"}, "rfs", "more than 50 years", id="date_that_means_missing"),
        pytest.param({"Age": "0"}, "age", "0 years", id="age"),
    ],
)
def test_implausible_values_are_missing_with_a_note_as_in_any_table(tmp_path, change, feature, doubt):
    (case,) = (found := read_foreign_table(*written(tmp_path, [ROW | change]), FEATURES)).cohort.cases
    (note,) = found.cohort.notes
    assert note.startswith(f"{feature} is read as missing where it is implausible (1 x): ")
    assert note.endswith(f" in table.csv, row 2, patient P-1 ({doubt})")
    assert case[keys.SURV_KNOWN] is (feature != "rfs")
    assert case[keys.CLINICAL]["age"] == (None if feature == "age" else 62.6)


@pytest.mark.parametrize(
    "change, message",
    [
        pytest.param(lambda lines: [lines[0], lines[1] + ',"x"'], "row 2: 14 cells under 13 column names", id="cell"),
        pytest.param(
            lambda lines: [line + f',"{text}"' for line, text in zip(lines, ("Age", "33"), strict=True)],
            "values.age: several columns of table.csv are called 'Age'",
            id="column_twice",
        ),
    ],
)
def test_tables_whose_columns_are_in_doubt(tmp_path, change, message):
    table, mapping = written(tmp_path, [ROW])
    table.write_text("\n".join(change(table.read_text().splitlines())) + "\n")
    with pytest.raises(CohortError, match=message):
        read_foreign_table(table, mapping, FEATURES)


@pytest.fixture
def radcure() -> Callable[[tuple[str, ...]], Any]:
    if not RADCURE.is_file():
        pytest.skip("real data radcure_clinical is not beside the repository")
    return lambda features: read_foreign_table(RADCURE, MAPPING, features)


def test_radcure(radcure):
    found = radcure((*FEATURES, "site"))
    cases = found.cohort.cases
    oropharynx = [case for case in cases if case[keys.CLINICAL]["site"] == 0]
    assert (len(cases), len(found.cohort.exclusions)) == (3267, 79)
    assert sum(case[keys.EVENT] for case in cases) == 701
    assert (sum(case[keys.HPV_KNOWN] for case in cases), len(oropharynx)) == (1686, 1464)
    assert sum(case[keys.CLINICAL]["t_stage"] is None for case in cases) == 13
    assert {min(found.years.values()), max(found.years.values())} == {1999, 2011}
