"""Cohorts: layouts, tables as people write them, faults, exclusions and folds."""

from __future__ import annotations

import json
import logging
import os
import re
from pathlib import Path

import pytest

from scripts import keys
from scripts.cohorts import cohort
from scripts.cohorts import tables as cohort_tables
from scripts.cohorts.clinical import DEFAULT_FEATURES
from scripts.cohorts.cohort import CohortError, Exclusion
from scripts.cohorts.scans import patient_key

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
HEADER = (
    "PatientID,CenterID,Age,Gender,Tobacco Consumption,Alcohol Consumption,Performance Status,Treatment,M-stage,"
    "RFS,Relapse,HPV Status"
)
ROWS = (
    "CHUM-001,1,61,1,1,,1,1,M0,1240,0,1",
    "CHUS-002,3,55.0,0.0,,1.0,,0,Mx,300,1,0",
    "MDA-003,5,70,1,,,,,M1,,,",
)


def real_data(name: str) -> Path:
    if not (SHARED / name).is_dir():
        pytest.skip(f"real data {name} is not beside the repository")
    return SHARED / name


def add_scans(folder: Path, patient: str, kinds: str = "ct pet mask", suffix: str = ".nii.gz") -> None:
    """Files with the names of one patient's scans; a cohort never opens them."""
    names = {"ct": f"{patient}__CT", "pet": f"{patient}__PT", "mask": patient}
    folder.mkdir(parents=True, exist_ok=True)
    for kind in kinds.split():
        (folder / (names[kind] + suffix)).write_bytes(kind.encode())


def add_table(folder: Path, rows=ROWS, name: str = "HECKTOR_2025_Training_Task_2.csv", header: str = HEADER) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    path.write_text("\n".join((header, *rows)) + "\n")
    return path


def add_patients(root: Path, *patients: str) -> Path:
    for patient in patients or ("CHUM-001", "CHUS-002", "MDA-003"):
        add_scans(root / patient, patient)
    return root


def ids(cases) -> list[str]:
    return [case[keys.PATIENT_ID] for case in cases]


# --- layouts ---------------------------------------------------------------------------------------------


def nested(root: Path) -> Path:
    add_table(root)
    return add_patients(root)


def in_images(root: Path) -> Path:
    add_table(root)
    add_patients(root / "images")
    return root


def images_folder_itself(root: Path) -> Path:
    return in_images(root) / "images"


def several_tasks(root: Path) -> Path:
    add_patients(root / "Task 1", "CHUM-001", "MDA-003")
    add_scans(root / "Task 2" / "CHUM-001", "CHUM-001", "ct pet")
    add_scans(root / "Task 2" / "CHUS-002", "CHUS-002")
    add_table(
        root, [row.rsplit(",", 3)[0] for row in ROWS], "HECKTOR_2025_Training_Task_1.csv", HEADER.rsplit(",", 3)[0]
    )
    add_table(root)
    return root


def tables_in_the_tasks(root: Path) -> Path:
    add_patients(root / "Task 2")
    add_table(root / "Task 2")
    return root


def flat(root: Path) -> Path:
    for patient in ("CHUM-001", "CHUS-002", "MDA-003"):
        add_scans(root / "imagesTr", patient, "ct pet")
        add_scans(root / "labelsTr", patient, "mask")
    add_table(root)
    return root


def flat_2022_tables(root: Path) -> Path:
    flat(root)
    (root / "HECKTOR_2025_Training_Task_2.csv").unlink()
    add_table(
        root,
        ["CHUM-001,0,1,1,M,61,80,1,,1,1,,1", "CHUS-002,1,1,3,F,55,,,1,,0,,0", "MDA-003,0,1,5,M,70,,,,,,,"],
        "hecktor2022_clinical_info_training.csv",
        "PatientID,Task 1,Task 2,CenterID,Gender,Age,Weight,Tobacco,Alcohol,Performance status,"
        '"HPV status (0=-, 1=+)",Surgery,Chemotherapy',
    )
    add_table(
        root,
        ["CHUM-001,0,1240", "CHUS-002,1,300"],
        "hecktor2022_endpoint_training.csv",
        "PatientID,Relapse,RFS",
    )
    return root


def uncompressed(root: Path) -> Path:
    add_table(root)
    for patient in ("CHUM-001", "CHUS-002", "MDA-003"):
        add_scans(root / patient, patient, suffix=".nii")
    return root


def files_in_the_folder_itself(root: Path) -> Path:
    add_table(root)
    for patient in ("CHUM-001", "CHUS-002", "MDA-003"):
        add_scans(root, patient)
    return root


def other_spelling_of_ids(root: Path) -> Path:
    add_table(root, [row.replace("-", "_", 1) for row in ROWS])
    return add_patients(root)


def extras_of_hecktor(root: Path) -> Path:
    nested(root)
    for name in ("CHUM-001__CTPlanning.nii.gz", "CHUM-001__RTDOSE.nii.gz", "._CHUM-001__CT.nii.gz", "notes.txt"):
        (root / "CHUM-001" / name).write_bytes(b"x")
    (root / "__MACOSX").mkdir()
    add_table(root, ["CHUM-001,0.3"], "truth.csv", "PatientID,log_hazard")
    return root


LAYOUTS = [
    nested,
    in_images,
    images_folder_itself,
    several_tasks,
    tables_in_the_tasks,
    flat,
    flat_2022_tables,
    uncompressed,
    files_in_the_folder_itself,
    other_spelling_of_ids,
    extras_of_hecktor,
]


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.__name__)
def test_every_layout_gives_the_same_cases(tmp_path, layout):
    found = cohort.load_cohort(layout(tmp_path / "data"))
    assert ids(found.cases) == ["CHUM-001", "CHUS-002", "MDA-003"]
    assert found.exclusions == []
    first, second, third = found.cases
    for case in found.cases:
        names = {kind: Path(case[kind]).name.split(".")[0] for kind in (keys.CT, keys.PET, keys.MASK)}
        patient = case[keys.PATIENT_ID]
        assert names == {keys.CT: f"{patient}__CT", keys.PET: f"{patient}__PT", keys.MASK: patient}
        assert case[keys.SEG_KNOWN] is True
        assert case[keys.CLINICAL_FOUND] is True
        assert re.fullmatch("[0-9a-f]{16}", case[keys.FINGERPRINT])
    m_stages = (0.0, None, 1.0) if layout is not flat_2022_tables else (None, None, None)
    treatment = (1.0, 0.0, None)
    assert [case[keys.CLINICAL]["m_stage"] for case in found.cases] == list(m_stages)
    assert [case[keys.CLINICAL]["treatment"] for case in found.cases] == list(treatment)
    assert first[keys.CLINICAL] | {"m_stage": 0.0} == {
        "age": 61.0,
        "gender": 1.0,
        "tobacco": 1.0,
        "alcohol": None,
        "treatment": 1.0,
        "performance_status": 1.0,
        "m_stage": 0.0,
    }
    assert [case[keys.CENTRE] for case in found.cases] == ["CHUM", "CHUS", "MDA"]
    labels = (keys.HPV, keys.HPV_KNOWN, keys.TIME, keys.EVENT, keys.SURV_KNOWN)
    assert [first[label] for label in labels] == [1.0, True, 1240.0, False, True]
    assert [second[label] for label in labels] == [0.0, True, 300.0, True, True]
    assert [third[label] for label in labels] == [0.0, False, 0.0, False, False]


def test_scans_of_one_folder_stay_together_across_tasks(tmp_path):
    found = cohort.load_cohort(several_tasks(tmp_path))
    folders = {Path(found.cases[0][kind]).parent for kind in (keys.CT, keys.PET, keys.MASK)}
    assert folders == {tmp_path / "Task 1" / "CHUM-001"}


def test_single_patient_folder_finds_the_table_above_images(tmp_path):
    found = cohort.load_cohort(in_images(tmp_path) / "images" / "CHUS-002")
    assert ids(found.cases) == ["CHUS-002"]
    assert found.cases[0][keys.TIME] == 300.0
    assert ids_of(found.exclusions) == ["CHUM-001", "MDA-003"]


def ids_of(exclusions: list[Exclusion]) -> list[str]:
    return [exclusion.patient_id for exclusion in exclusions]


def test_table_above_the_folder_must_name_its_patients(tmp_path):
    add_table(tmp_path, ["CHUV-009,1,61,1,,,,,,100,1,1"])
    found = cohort.load_cohort(add_patients(tmp_path / "mine"))
    assert found.files == []
    assert all(case[keys.CLINICAL_FOUND] for case in found.cases), "without a table no row is missed"
    assert "no table found" in found.describe()


def test_without_a_table_only_cases_with_masks_stay(tmp_path):
    add_scans(tmp_path / "CHUM-001", "CHUM-001")
    add_scans(tmp_path / "CHUM-002", "CHUM-002", "ct pet")
    found = cohort.load_cohort(tmp_path)
    assert ids(found.cases) == ["CHUM-001"]
    reason = "scans without a row in a table and without a mask: nothing to learn from"
    assert found.exclusions == [Exclusion("CHUM-002", reason)]


@pytest.mark.parametrize("as_list", [False, True], ids=["one_path", "list"])
def test_named_table_is_used_instead_of_the_found_one(tmp_path, as_list):
    root = nested(tmp_path / "data")
    mine = add_table(tmp_path, ["CHUM-001,1,61,1,,,,,,77,1,"], "mine.csv")
    found = cohort.load_cohort(root, ehr_csv=[mine] if as_list else mine)
    assert found.cases[0][keys.TIME] == 77.0
    assert found.files == [str(mine)]


def test_named_table_may_be_relative_to_the_data_set(tmp_path):
    root = nested(tmp_path)
    add_table(root, ["CHUM-001,1,61,1,,,,,,77,1,"], "mine.csv")
    assert cohort.load_cohort(root, ehr_csv="mine.csv").cases[0][keys.TIME] == 77.0


def test_table_alone_is_a_cohort_without_scans(tmp_path):
    found = cohort.load_cohort(None, add_table(tmp_path), require_images=False)
    assert ids(found.cases) == ["CHUM-001", "CHUS-002"]
    assert [case[keys.CT] for case in found.cases] == [None, None]
    assert ids_of(found.exclusions) == ["MDA-003"]


@pytest.mark.parametrize(
    "options", [{"require_images": False}, {"ehr_csv": "ehr.csv"}], ids=["no_table", "scans_wanted"]
)
def test_neither_folder_nor_table(options):
    with pytest.raises(CohortError, match="without a dataset_dir, a table must be named"):
        cohort.load_cohort(None, **options)


def test_fingerprint_changes_with_a_file(tmp_path):
    before = cohort.load_cohort(nested(tmp_path)).cases
    (tmp_path / "CHUM-001" / "CHUM-001__PT.nii.gz").write_bytes(b"another scan")
    after = cohort.load_cohort(tmp_path).cases
    assert [a[keys.FINGERPRINT] == b[keys.FINGERPRINT] for a, b in zip(before, after, strict=True)] == [
        False,
        True,
        True,
    ]


# --- tables as people write them ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "centre"),
    [
        pytest.param(b"PatientID,Age,Relapse,RFS\nCHUM-001,61,1,300\n", "CHUM", id="plain"),
        pytest.param("\ufeffPatientID,Age,Relapse,RFS\nCHUM-001,61,1,300\n".encode(), "CHUM", id="bom"),
        pytest.param("PatientID;Age;Relapse;RFS\r\nCHUM-001;61,0;1;300\r\n".encode("utf-16"), "CHUM", id="utf16_excel"),
        pytest.param(
            "Patient ID;Age;Relapse;RFS;Médecin\nCHUM-001;61;1;300;é\n".encode("latin-1"), "CHUM", id="latin1"
        ),
        pytest.param(b"sep=;\npatient_id;age;relapse;rfs\nCHUM_001;61;1;300\n", "CHUM", id="sep_line"),
        pytest.param(b"patientid\tAGE\tRELAPSE\tRfs\nCHUM-001\t61\t1\t300\n", "CHUM", id="tabs"),
        pytest.param(b"\n\nPatientID,Age,Relapse,RFS\n,,,\nCHUM-001 , 61.0 ,1.0, 300.0\n\n", "CHUM", id="blank_lines"),
        pytest.param(b'"PatientID","Age","Relapse","RFS"\n"CHUM-001","61","1.0","300"\n', "CHUM", id="quotes"),
        pytest.param(b"PatientID,Extra,Age,Relapse,RFS\nCHUM-001,a,61,1,300\n", "CHUM", id="extra_column"),
        pytest.param(b"ID,PatientID,Age,Relapse,RFS\n1,CHUM-001,61,1,300\n", "CHUM", id="number_beside_the_id"),
        pytest.param(b"PatientID,Age,Relapse,RFS,Note,More\nCHUM-001,61,1,300\n", "CHUM", id="short_row"),
        pytest.param(b"PatientID,Age,Relapse,RFS,CenterID\nCHUM-001,61,1,300,6.0\n", "HGJ", id="centre_number"),
        pytest.param(b"PatientID,Age,Relapse,RFS,Center ID\nCHUM-001,61,1,300,hmr\n", "HMR", id="centre_name"),
        pytest.param(b"PatientID,Age,Relapse,RFS,CenterID\nCHUM-001,61,1,300,4\n", "centre 4", id="centre_unknown"),
    ],
)
def test_table_is_read_however_it_was_saved(tmp_path, data, centre):
    add_scans(tmp_path / "CHUM-001", "CHUM-001")
    (tmp_path / "ehr.csv").write_bytes(data)
    (case,) = cohort.load_cohort(tmp_path).cases
    assert case[keys.CLINICAL]["age"] == 61.0
    assert (case[keys.TIME], case[keys.EVENT], case[keys.CENTRE]) == (300.0, True, centre)


@pytest.mark.parametrize(
    ("rows", "messages"),
    [
        pytest.param(
            ["CHUM-001,1,61,1,,,,,,100,1,1", "CHUM_001,1,61,1,,,,,,100,1,1"],
            ["row 3: CHUM_001 is already in row 2"],
            id="duplicate_id",
        ),
        pytest.param(
            ["", "CHUM-001,1,61,1,,,,,,100,2,1"],
            ["row 3, column 'Relapse': '2' is no value of relapse; accepted: 0 (no"],
            id="relapse_2",
        ),
        pytest.param(["CHUM-001,1,61,1,,,,,,100,1,7"], ["row 2, column 'HPV Status': '7'"], id="hpv_7"),
        pytest.param(["CHUM-001,1,61,1,,,,,,soon,1,1"], ["row 2, column 'RFS': 'soon'", "in days"], id="rfs_word"),
        pytest.param(["CHUM-001,1,61,X,,,,,,9,1,1"], ["row 2, column 'Gender': 'X'", "0 (female/f)"], id="gender"),
        pytest.param([",1,61,1,,,,,,100,1,1"], ["row 2: no PatientID"], id="no_id"),
        pytest.param(["CHUM-001,1,6,1,1,,,,,,100,1,1"], ["row 2: 13 cells under 12 column names"], id="stray_comma"),
        pytest.param(
            ["CHUM-001,1,61,X,,,,,,9,1,1", "CHUS-002,1,old,1,,,,,,9,3,1"],
            ["(3 faults)", "row 2, column 'Gender'", "row 3, column 'Age'", "row 3, column 'Relapse'"],
            id="all_faults_at_once",
        ),
    ],
)
def test_faults_of_a_table_are_listed_with_file_and_row(tmp_path, rows, messages):
    add_patients(tmp_path)
    add_table(tmp_path, rows)
    with pytest.raises(CohortError) as error:
        cohort.load_cohort(tmp_path)
    assert "HECKTOR_2025_Training_Task_2.csv, row" in str(error.value)
    for message in messages:
        assert message in str(error.value)


def test_long_lists_of_faults_are_cut(tmp_path):
    add_patients(tmp_path)
    add_table(tmp_path, [f"CHUM-{number:03d},1,61,1,,,,,,100,5,1" for number in range(1, 31)])
    with pytest.raises(CohortError) as error:
        cohort.load_cohort(tmp_path)
    lines = str(error.value).splitlines()
    assert "(30 faults)" in lines[0]
    assert len(lines) == 22
    assert lines[-1].strip() == "... and 10 more"


def test_tables_that_contradict_each_other_are_an_error(tmp_path):
    add_patients(tmp_path)
    add_table(tmp_path, ["CHUM-001,1,61,1,,,,,,100,1,1"], "HECKTOR_2025_Training_Task_1.csv")
    add_table(tmp_path, ["CHUM_001,2,61,1,1,,,,,101,1,1"])
    with pytest.raises(CohortError) as error:
        cohort.load_cohort(tmp_path)
    assert "column 'RFS': rfs of CHUM-001 is 101, but 100 in HECKTOR_2025_Training_Task_1.csv, row 2" in str(
        error.value
    )
    assert "centre of CHUM-001 is CHUP, but CHUM in HECKTOR_2025_Training_Task_1.csv, row 2" in str(error.value)


def test_tables_complete_each_other(tmp_path):
    add_patients(tmp_path, "CHUM-001")
    add_table(tmp_path, ["CHUM-001,1,61,1,,,,,,,,1"], "HECKTOR_2025_Training_Task_1.csv")
    add_table(tmp_path, ["CHUM_001,1,,1,1,,,,,100,1,"])
    (case,) = cohort.load_cohort(tmp_path).cases
    assert (case[keys.CLINICAL]["age"], case[keys.CLINICAL]["tobacco"]) == (61.0, 1.0)
    assert (case[keys.TIME], case[keys.HPV]) == (100.0, 1.0)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        pytest.param(
            "Name,Age\nx,1\n", "has no PatientID column; its columns are: Name, Age; call the column", id="no_id_column"
        ),
        pytest.param("", "none (empty file)", id="empty"),
        pytest.param("PK\x03\x04\0\0", "is not a text file: save the table as CSV", id="excel_file"),
        pytest.param("PatientID,HPV status (0=-, 1=+)\nCHUM-001,1\n", "cut in two at a comma", id="unquoted_remark"),
        pytest.param("PatientID,RFS (months),Relapse\nCHUM-001,1,1\n", "is read in days", id="months"),
    ],
)
def test_unusable_named_table(tmp_path, content, message):
    add_patients(tmp_path)
    (tmp_path / "mine.csv").write_bytes(content.encode())
    with pytest.raises(CohortError) as error:
        cohort.load_cohort(tmp_path, ehr_csv=tmp_path / "mine.csv")
    assert message in str(error.value)
    assert "mine.csv" in str(error.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        pytest.param(
            "PatientID,AgeAtDx,SexMF,TNM_M\nCHUM-001,61,1,M1\n",
            "found: 'AgeAtDx' (Age?), 'SexMF' (Sex?), 'TNM_M'",
            id="csv",
        ),
        pytest.param("PatientID\nCHUM-001\n", "found: only the PatientID", id="ids_alone"),
        pytest.param('[{"PatientID": "CHUM-001", "ehr": {"Age": 61}}]', "found: 'ehr'", id="nested_json"),
    ],
)
def test_a_table_in_which_no_column_is_known_is_refused(tmp_path, content, message):
    root = add_patients(tmp_path / "data")
    path = tmp_path / ("mine.json" if content.startswith("[") else "mine.csv")
    path.write_text(content)
    for read in (cohort.load_cohort, cohort.inference_cases):
        with pytest.raises(CohortError, match="none of its columns is a known clinical value or label") as error:
            read(root, ehr_csv=path)
        assert message in str(error.value) and "known are Age, Gender, Tobacco Consumption" in str(error.value)


def test_a_table_beside_the_scans_in_which_no_column_is_known_is_told(tmp_path, caplog):
    (add_patients(tmp_path) / "clinical.csv").write_text("PatientID,AgeAtDx\nCHUM-001,61\n")
    cases = cohort.inference_cases(tmp_path)
    assert all(case[keys.CLINICAL]["age"] is None and case[keys.PROBLEM] == "" for case in cases)
    assert "clinical.csv is not read: none of its columns" in caplog.text and "'AgeAtDx' (Age?)" in caplog.text


def test_columns_that_are_not_known_are_told_where_a_value_has_none(tmp_path, caplog):
    root = add_patients(tmp_path / "data")
    table = tmp_path / "mine.csv"
    table.write_text("PatientID,Age,Weight,SexMF\nCHUM-001,61,70,1\n")
    cohort.inference_cases(root, table, ("age", "gender"))
    said = "no column for gender: unknown for every case; unknown columns: 'SexMF' (Sex?), 'Weight'"
    assert said in caplog.text
    assert (
        said.replace("gender", "gender, rfs, relapse, hpv") in cohort.load_cohort(root, table, ("age", "gender")).notes
    )


@pytest.mark.parametrize("rfs", ["99999", "1e9", "9999"])
def test_a_follow_up_longer_than_a_life_is_told_and_not_used(tmp_path, rfs):
    add_table(tmp_path, [ROWS[0].replace("1240", rfs), *ROWS[1:]])
    found = cohort.load_cohort(add_patients(tmp_path))
    assert [case[keys.SURV_KNOWN] for case in found.cases] == [False, True, False]
    assert found.cases[0][keys.TIME] == 0 and found.cases[0][keys.HPV_KNOWN]
    (note,) = (note for note in found.notes if "rfs is read as missing where it is implausible (1 x)" in note)
    assert f"{float(rfs):g} in HECKTOR_2025_Training_Task_2.csv, row 2, CHUM-001" in note
    assert note in "\n".join(found.notes) and note in found.describe()


def test_an_age_of_0_is_told_when_predicting(tmp_path, caplog):
    add_table(tmp_path, [ROWS[0].replace(",61,", ",0,"), *ROWS[1:]])
    case, *_ = cohort.inference_cases(add_patients(tmp_path))
    assert case[keys.CLINICAL]["age"] is None and case[keys.PROBLEM] == ""
    assert "age is read as missing where it is implausible (1 x): 0 in HECKTOR" in caplog.text


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        pytest.param("a.json", "[" * 100000, "nested too deeply", id="deep"),
        pytest.param(
            "a.json", '{"PatientID": "a", "Age": 61, "Age": 62}', "'Age' occurs twice in one object", id="twice"
        ),
        pytest.param("a.json", f'{{"Age": {"9" * 5000}}}', "not read: Exceeds the limit", id="digits"),
        pytest.param("a.json", b"\xff\xfe\x00", "not a text file in UTF-8", id="no_text"),
        pytest.param("a.csv", 'PatientID,Age\n"' + "x" * 200000 + '",61\n', "not a readable CSV", id="long_cell"),
        pytest.param("a.csv", b"PatientID,Age\nCHUM\0001,61\n", "is not a text file", id="nul"),
        pytest.param("a.csv", "PatientID,Age\nCHUM-001,1e400\n", "'1e400' is no value of age", id="overflow"),
        pytest.param("a.json", '[{"PatientID": "CHUM-001", "Age": 1e400}]', "'inf' is no value of age", id="infinite"),
        pytest.param("a.json", '[{"PatientID": "CHUM-001", "Age": [61]}]', "'[61]' is no value of age", id="list"),
    ],
)
def test_a_file_made_to_break_the_reader_is_refused_in_one_line(tmp_path, name, content, message):
    root = add_patients(tmp_path / "data", "CHUM-001")
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(CohortError) as error:
        cohort.load_cohort(root, tmp_path / name)
    assert message in str(error.value) and len(str(error.value)) < 600


def test_a_number_that_is_none_is_missing(tmp_path):
    """As pandas writes NaN into JSON, which has no such number."""
    root = add_patients(tmp_path / "data", "CHUM-001")
    (tmp_path / "a.json").write_text('[{"PatientID": "CHUM-001", "Age": NaN, "Gender": 1}]')
    (case,) = cohort.load_cohort(root, tmp_path / "a.json", ("age", "gender")).cases
    assert case[keys.CLINICAL] == {"age": None, "gender": 1.0}


def test_a_huge_file_is_no_table(tmp_path, monkeypatch):
    root = nested(tmp_path / "data")
    monkeypatch.setattr(cohort_tables, "_LARGEST_FILE", 10.0)
    with pytest.raises(CohortError, match="it is not a clinical table"):
        cohort.load_cohort(root, root / "HECKTOR_2025_Training_Task_2.csv")


def test_a_broken_file_above_the_folder_costs_nothing(tmp_path, caplog):
    root = add_patients(tmp_path / "data")
    (tmp_path / "numbers.csv").write_bytes(b"\0\1\2")
    assert len(cohort.inference_cases(root)) == 3
    assert "ignored" in caplog.text and "numbers.csv is not a text file" in caplog.text


def test_named_table_that_is_not_there(tmp_path):
    with pytest.raises(CohortError, match=r"no such table: nowhere\.csv"):
        cohort.load_cohort(nested(tmp_path), ehr_csv="nowhere.csv")


def test_several_tables_that_could_be_meant(tmp_path):
    add_patients(tmp_path)
    add_table(tmp_path, name="a.csv")
    add_table(tmp_path, name="b.csv")
    with pytest.raises(CohortError, match=r"several tables with a PatientID \(a.csv, b.csv\).*ehr_csv"):
        cohort.load_cohort(tmp_path)


def test_of_several_tables_the_one_with_known_columns_is_meant(tmp_path):
    add_patients(tmp_path)
    add_table(tmp_path, name="mine.csv")
    add_table(tmp_path, ["CHUM-001,5"], "scores.csv", "PatientID,score")
    assert cohort.load_cohort(tmp_path).files == [str(tmp_path / "mine.csv")]


def test_unknown_clinical_feature_is_named(tmp_path):
    with pytest.raises(ValueError, match="unknown clinical feature 'weight'; known are age"):
        cohort.load_cohort(nested(tmp_path), clinical_features=("age", "weight"))


def test_only_the_wanted_features_are_read(tmp_path):
    add_patients(tmp_path)
    add_table(tmp_path, ["CHUM-001,1,61,neither,,,,,,100,1,1"])
    (case, *_) = cohort.load_cohort(tmp_path, clinical_features=("m_stage", "age")).cases
    assert list(case[keys.CLINICAL].items()) == [("m_stage", None), ("age", 61.0)]


# --- exclusions --------------------------------------------------------------------------------------------


def test_every_patient_is_a_case_or_an_exclusion_with_a_reason(tmp_path):
    add_table(
        tmp_path,
        [
            "CHUM-001,1,61,1,,,,,,100,1,1",
            "CHUM-002,1,61,1,,,,,,100,1,1",
            "CHUM-003,1,61,1,,,,,,100,1,1",
            "CHUM-004,1,61,1,,,,,,100,1,1",
            "CHUM-005,1,61,1,,,,,,0,1,1",
            "CHUM-006,1,61,1,,,,,,-5,0,",
            "CHUM-009,1,61,1,,,,,,,,",
            "CHUM-010,1,61,1,,,,,,500,,",
            "CHUM-011,1,61,1,,,,,,,1,",
        ],
    )
    add_patients(tmp_path, "CHUM-001", "CHUM-005", "CHUM-006", "CHUM-007", "CHUM-010", "CHUM-011")
    add_scans(tmp_path / "CHUM-003", "CHUM-003", "ct mask")
    add_scans(tmp_path / "CHUM-004", "CHUM-004", "pet mask")
    add_scans(tmp_path / "CHUM-008", "CHUM-008", "ct pet")
    add_scans(tmp_path / "CHUM-009", "CHUM-009", "ct pet")
    (tmp_path / "CHUM-012").mkdir()
    found = cohort.load_cohort(tmp_path)
    table = "HECKTOR_2025_Training_Task_2.csv, row"
    assert ids(found.cases) == ["CHUM-001", "CHUM-007", "CHUM-010", "CHUM-011"]
    assert {(item.patient_id, item.reason, item.detail) for item in found.exclusions} == {
        ("CHUM-002", "row in the table but no scans", f"{table} 3"),
        ("CHUM-003", "no PET", f"expected {tmp_path}/CHUM-003/CHUM-003__PT.nii.gz"),
        ("CHUM-004", "no CT", f"expected {tmp_path}/CHUM-004/CHUM-004__CT.nii.gz"),
        ("CHUM-005", "RFS <= 0", f"{table} 6, column 'RFS'"),
        ("CHUM-006", "RFS <= 0", f"{table} 7, column 'RFS'"),
        ("CHUM-008", "scans without a row in a table and without a mask: nothing to learn from", ""),
        ("CHUM-009", "no mask, HPV status or survival: nothing to learn from", f"{table} 8"),
        (
            "CHUM-012",
            "no scans",
            f"{tmp_path}/CHUM-012 holds no file; expected CHUM-012__CT.nii.gz and CHUM-012__PT.nii.gz (or .nii, .mha, "
            ".nrrd)",
        ),
    }
    unlabelled = {case[keys.PATIENT_ID]: case for case in found.cases}["CHUM-007"]
    assert unlabelled[keys.CLINICAL_FOUND] is False
    assert not (unlabelled[keys.HPV_KNOWN] or unlabelled[keys.SURV_KNOWN])
    text = found.describe()
    assert "1 with a mask but no row in a table are kept, all else unknown: CHUM-007" in text
    assert "2 have only one of RFS and Relapse, so survival is unknown: CHUM-010, CHUM-011" in text


def test_no_usable_case_is_an_error_with_the_reasons(tmp_path):
    add_scans(tmp_path / "CHUM-001", "CHUM-001", "ct pet")
    with pytest.raises(CohortError, match=r"no case can be used\n.*1 x scans without a row.*CHUM-001"):
        cohort.load_cohort(tmp_path)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        pytest.param(lambda root: root / "nowhere", "does not exist", id="no_folder"),
        pytest.param(add_table, "is a file, not a folder", id="file"),
        pytest.param(
            lambda root: root, r"holds no scan: expected <PatientID>/<PatientID>__CT.nii.gz", id="empty_folder"
        ),
        pytest.param(
            lambda root: add_patients(root / "HECKTOR 2025 Training Data").parent,
            "holds no scan: .*\n  not read, since patients are searched in .*: .*/HECKTOR 2025 Training Data$",
            id="folder_above",
        ),
    ],
)
def test_folder_without_a_cohort(tmp_path, make, message):
    with pytest.raises(CohortError, match=message):
        cohort.load_cohort(make(tmp_path))


@pytest.mark.parametrize(
    ("extra", "message", "concerned", "predicted"),
    [
        pytest.param("CHUM-001/CHUM-002__CT.nii.gz", "named for another patient", {"CHUM-001"}, False, id="stranger"),
        pytest.param(
            "CHUM-001/CHUM-009__CT.nii.gz", "named for another", {"CHUM-001", "CHUM-009"}, False, id="stranger_alone"
        ),
        pytest.param("CHUM-001/CHUM_001__CT.nii.gz", "are both the ct of", {"CHUM-001"}, False, id="two_spellings"),
        pytest.param("CHUM-001/CHUM-001__PET.mha", "are both the pet of", {"CHUM-001"}, False, id="two_formats"),
        pytest.param("CHUM_001/CHUM_001__CT.nii.gz", "folders of the same", {"CHUM-001"}, False, id="two_folders"),
        pytest.param("CHUM-001/CHUM_001.nii.gz", "are both the mask of", {"CHUM-001"}, True, id="two_masks"),
    ],
)
def test_image_files_that_contradict_each_other_cost_their_patient_alone(
    tmp_path, extra, message, concerned, predicted
):
    """Left out of training with the reason, and a row in what is predicted, unless only masks are concerned."""
    for patient in ("CHUM-001", "CHUM-002", "CHUM-003"):
        add_scans(tmp_path / patient, patient)
    (tmp_path / extra).parent.mkdir(exist_ok=True)
    (tmp_path / extra).write_bytes(b"x")
    found = cohort.load_cohort(tmp_path)
    assert {patient_key(item.patient_id): message in item.detail for item in found.exclusions} == dict.fromkeys(
        concerned, True
    )
    left = {"CHUM-001", "CHUM-002", "CHUM-003"} - concerned
    assert {case[keys.PATIENT_ID] for case in found.cases} == left
    problems = {patient_key(case[keys.PATIENT_ID]): case[keys.PROBLEM] for case in cohort.inference_cases(tmp_path)}
    assert set(problems) == left | concerned
    for patient, problem in problems.items():
        assert (problem == "") if predicted or patient in left else (message in problem)


def test_nobody_is_left_where_the_files_of_the_only_patient_contradict_each_other(tmp_path):
    add_scans(tmp_path, "CHUM-001")
    add_scans(tmp_path, "CHUM-001", "ct", suffix=".mha")
    (case,) = cohort.inference_cases(tmp_path)
    assert "are both the ct of CHUM-001" in case[keys.PROBLEM]
    with pytest.raises(CohortError, match=r"no case can be used\n.*contradict each other: CHUM-001 .*are both the ct"):
        cohort.load_cohort(tmp_path)


@pytest.mark.parametrize("target, what", [("", "a pipe, not a file"), ("/dev/zero", "a device or socket, not a file")])
def test_a_scan_that_is_no_file_is_named_as_what_it_is(tmp_path, target, what):
    """And is not opened: a pipe would wait for ever."""
    for patient in ("CHUM-001", "CHUM-002"):
        add_scans(tmp_path, patient)
    path = tmp_path / "CHUM-001__CT.nii.gz"
    path.unlink()
    if target:
        path.symlink_to(target)
    else:
        os.mkfifo(path)
    assert [case[keys.PROBLEM] for case in cohort.inference_cases(tmp_path)] == [f"{path} is {what}", ""]
    found = cohort.load_cohort(tmp_path)
    assert [(item.patient_id, item.detail) for item in found.exclusions] == [("CHUM-001", f"{path} is {what}")]


def test_a_patient_with_a_mask_whose_scans_are_lost_has_a_row(tmp_path):
    add_scans(tmp_path / "CHUM-001", "CHUM-001", "mask")
    for kind in ("CT", "PT"):
        (tmp_path / "CHUM-001" / f"CHUM-001__{kind}.nii.gz").symlink_to(tmp_path / "nowhere")
    add_scans(tmp_path / "CHUM-002", "CHUM-002")
    assert [bool(case[keys.PROBLEM]) for case in cohort.inference_cases(tmp_path)] == [True, False]


def test_what_is_left_alone_is_noted(tmp_path):
    nested(tmp_path)
    add_scans(tmp_path / "CHUM-001", "CHUM-001", "ct", suffix=".nii")
    (tmp_path / "CHUM-001" / "gtv.nii.gz").write_bytes(b"x")
    add_scans(tmp_path / "old", "CHUM-001")
    found = cohort.load_cohort(tmp_path)
    assert found.cases[0][keys.CT].endswith("CHUM-001__CT.nii.gz")
    text = found.describe()
    assert (
        f"note: the .nii.gz is used where a .nii of the same name exists: {tmp_path}/CHUM-001/CHUM-001__CT.nii.gz"
        in text
    )
    assert f"note: not read, since neither CT, PET nor mask by its name: {tmp_path}/CHUM-001/gtv.nii.gz" in text
    assert (
        "note: not read, since no file is named after its folder, as <PatientID>/<PatientID>__CT.nii.gz: "
        f"{tmp_path}/old" in text
    )


def test_folders_of_patients_too_deep_are_noted(tmp_path, caplog):
    """Patients below a folder of another name would be missing without a word otherwise."""
    add_patients(tmp_path, "CHUM-001")
    add_patients(tmp_path / "site A", "CHUS-002")
    (tmp_path / "results" / "CHUM-001").mkdir(parents=True)
    (tmp_path / "results" / "CHUM-001" / "CHUM-001__tumour.nii.gz").write_bytes(b"x")
    note = f"not read, since patients are searched in the folder itself, images/ and Task N/ only: {tmp_path}/site A"
    assert f"note: {note}\n" in f"{cohort.load_cohort(tmp_path).describe()}\n"
    cohort.inference_cases(tmp_path)
    assert note in caplog.text


@pytest.mark.parametrize(
    ("entry", "patient", "reason", "predicted"),
    [
        pytest.param("P3/", "P3", "no scans: P3 holds no file", "no CT and no PET found", id="empty"),
        pytest.param("P3/1/IM0", "P3", "no scans: P3 holds 1/IM0;", "no CT and no PET found", id="dicom_alone"),
        pytest.param("P3/ct.nii", "P3", "no scans: P3 holds ct.nii;", "no CT and no PET found", id="other_names"),
        pytest.param("P3/a/P3__CT.nii", "P3", "no scans: P3 holds a/P3__CT.nii;", "no CT and no PET", id="too_deep"),
        pytest.param("AB-3/", "AB-3", "no scans: AB-3 holds no file", "no CT and no PET found", id="like_hecktor"),
        pytest.param("Smith/", "Smith", "no scans: Smith holds no file", "ignored", id="another_name"),
        pytest.param("Smith/a/b/c/x.dcm", "Smith", "no scans: Smith holds a/b/c/x.dcm;", "ignored", id="deep"),
        pytest.param("P3.nii/", "P3.nii", "no scans: P3.nii holds no file", "ignored", id="named_as_a_file"),
        pytest.param("P3.nii", "P3", "no scans: only the mask P3.nii", "masks without scans", id="mask_alone"),
        pytest.param("P3__CT.zip", "P3", "cannot be read: P3__CT.zip is in no format", "is in no format", id="format"),
        pytest.param("P3/P3__PT.dcm", "P3", "cannot be read: P3/P3__PT.dcm is in no", "is in no", id="format_inside"),
        pytest.param("Dr. Who -> nowhere", "Dr. Who", "Dr. Who is a broken link", "is a broken link", id="broken_link"),
    ],
)
def test_whatever_may_be_a_patient_is_named(tmp_path, caplog, entry, patient, reason, predicted):
    """In training with the excluded; in prediction with a row, or in the log where it may be no patient's."""
    add_patients(tmp_path, "P1", "P2")
    path, _, target = entry.partition(" -> ")
    if target:
        (tmp_path / path).symlink_to(target)
    elif path.endswith("/"):
        (tmp_path / path).mkdir()
    else:
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_bytes(b"x")
    caplog.set_level(logging.INFO)
    found = cohort.load_cohort(tmp_path)
    assert ids(found.cases) == ["P1", "P2"]
    (one,) = found.exclusions
    assert one.patient_id == patient
    assert reason in f"{one.reason}: {one.detail}".replace(f"{tmp_path}/", "")
    assert f"{patient} ({one.detail})" in caplog.text
    cases = {case[keys.PATIENT_ID]: case[keys.PROBLEM] for case in cohort.inference_cases(tmp_path)}
    if patient in cases:
        assert predicted in cases.pop(patient)
    elif predicted == "ignored":
        assert f"folders without CT and PET as image files, perhaps of no patient: {tmp_path}/{patient}" in caplog.text
    else:
        assert predicted in caplog.text
    assert cases == {"P1": "", "P2": ""}


def test_paths_with_line_breaks_stay_on_one_line(tmp_path, caplog):
    """In exclusions, notes, problems and the log."""
    add_patients(tmp_path, "P1", "P2", "P\n3")
    (tmp_path / "P\n4").mkdir()
    (tmp_path / "P\n3" / "gtv\n.nii").write_bytes(b"x")
    (tmp_path / "a\nb").mkdir()
    found = cohort.load_cohort(tmp_path)
    assert ids(found.cases) == ["P\\n3", "P1", "P2"]
    assert ids_of(found.exclusions) == ["a\\nb", "P\\n4"]
    told = [f"{item.reason} {item.detail}" for item in found.exclusions] + found.notes
    told += [case[keys.PROBLEM] for case in cohort.inference_cases(tmp_path)]
    told += [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert len(told) > 5 and not any("\n" in text for text in told)


def test_what_an_operating_system_or_another_format_leaves_costs_no_patient(tmp_path):
    add_patients(tmp_path, "P1", "P2")
    for name in (".cache", "lost+found", "__MACOSX"):
        (tmp_path / name).mkdir()
    (tmp_path / "P1" / "P1__CT.json").write_text("{}")
    found = cohort.load_cohort(tmp_path)
    assert (ids(found.cases), found.exclusions) == (["P1", "P2"], [])
    assert not any("P1__CT" in note for note in found.notes)


def test_masks_in_folders_of_their_own_are_found(tmp_path):
    for patient in ("P1", "P2"):
        add_scans(tmp_path / "imagesTr", patient, "ct pet")
        add_scans(tmp_path / "labelsTr" / patient, patient, "mask")
    found = cohort.load_cohort(tmp_path)
    assert (ids(found.cases), found.exclusions) == (["P1", "P2"], [])
    assert all(case[keys.SEG_KNOWN] for case in found.cases)


@pytest.mark.parametrize(
    ("path", "note"),
    [
        pytest.param("P1/P1__GTV.nii.gz", "neither CT, PET nor mask by its name", id="mask_of_another_name"),
        pytest.param("Task 1/imagesTr/P9__CT.nii.gz", "no file is named after its folder", id="folder_in_a_task"),
    ],
)
def test_files_that_are_left_out_are_noted(tmp_path, path, note):
    add_patients(tmp_path, "P1", "P2")
    (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / path).write_bytes(b"x")
    assert any(note in text and str(Path(path).parent) in text for text in cohort.load_cohort(tmp_path).notes)


@pytest.mark.parametrize("name", ["clinical.xlsx", "table.XLS", "clinical.tsv"])
def test_a_table_that_is_no_csv_is_named_where_there_is_no_other(tmp_path, caplog, name):
    add_patients(tmp_path / "images", "CHUM-001")
    (tmp_path / name).write_bytes(b"PK\x03\x04")
    cohort.load_cohort(tmp_path)
    assert f"{tmp_path / name} is not read: save the table as CSV" in caplog.text
    caplog.clear()
    add_table(tmp_path, ["CHUM-001,1,61,1,,,,,,60,1,1"])
    cohort.load_cohort(tmp_path)
    assert "is not read" not in caplog.text


def test_rows_with_too_few_cells_are_noted(tmp_path, caplog):
    add_patients(tmp_path, "CHUM-001", "CHUM-002")
    (tmp_path / "clinical.csv").write_text("PatientID,Age,RFS,Relapse\nCHUM-001,61,100,1\nCHUM-002,70\n")
    note = "1 rows have fewer cells than there are columns; the last ones are read as missing (a comma too few?): "
    assert f"note: {note}clinical.csv, row 3" in cohort.load_cohort(tmp_path).describe()
    cohort.inference_cases(tmp_path)
    assert f"{note}clinical.csv, row 3" in caplog.text


def test_rows_that_lost_their_zeros_are_noted(tmp_path, caplog):
    for patient in ("0017", "0100", "5"):
        add_scans(tmp_path / patient, patient, "ct pet mask")
    (tmp_path / "clinical.csv").write_text("PatientID,Age\n17,61\n100.0,70\n5,50\n9,40\n")
    note = "2 rows belong to no patient, perhaps since a spreadsheet dropped zeros in front of the PatientID or added "
    note += "'.0': 100.0 (scans: 0100), 17 (scans: 0017); correct the ids"
    assert f"note: {note}" in cohort.load_cohort(tmp_path).describe()
    cohort.inference_cases(tmp_path)
    assert note in caplog.text


def test_a_table_found_in_the_folder_without_any_of_the_patients_is_refused_in_training(tmp_path):
    add_scans(tmp_path / "001", "001", "ct pet mask")
    (tmp_path / "clinical.csv").write_text("PatientID,Age\n1,61\n")
    with pytest.raises(CohortError, match="; of the scans: 001; zeros in front are lost"):
        cohort.load_cohort(tmp_path)


def test_copy_of_a_scan_that_differs_is_noted(tmp_path):
    several_tasks(tmp_path)
    (tmp_path / "Task 2" / "CHUM-001" / "CHUM-001__CT.nii.gz").write_bytes(b"another one")
    assert f"which differs: {tmp_path}/Task 2/CHUM-001/CHUM-001__CT.nii.gz" in cohort.load_cohort(tmp_path).describe()


@pytest.mark.parametrize("name", ["._clinical.csv", ".~lock.clinical.csv", "~$clinical.csv"])
@pytest.mark.parametrize("content", [b"\0\5\x16\7", b"PatientID,Age\nCHUM-001,1\n"], ids=["binary", "table"])
def test_hidden_files_beside_a_table_are_no_tables(tmp_path, name, content):
    """Left by macOS on disks of other systems, and by spreadsheets while a table is open."""
    add_patients(tmp_path)
    table = add_table(tmp_path, name="clinical.csv")
    (tmp_path / name).write_bytes(content)
    assert cohort.load_cohort(tmp_path).files == [str(table)]


def test_the_file_that_is_expected_is_beside_the_other_scan(tmp_path):
    add_scans(tmp_path / "imagesTr", "CHUM-001", "ct")
    add_scans(tmp_path / "imagesTr", "CHUS-002", "ct pet")
    for patient in ("CHUM-001", "CHUS-002"):
        add_scans(tmp_path / "labelsTr", patient, "mask")
    expected = f"expected {tmp_path}/imagesTr/CHUM-001__PT.nii.gz"
    assert cohort.load_cohort(tmp_path).exclusions == [Exclusion("CHUM-001", "no PET", expected)]


def test_dots_between_thousands_are_refused_as_labels(tmp_path, caplog):
    add_patients(tmp_path)
    rows = ["CHUM-001,1.240,0", "CHUS-002,300,1", "MDA-003,,"]
    add_table(tmp_path, rows, "clinical.csv", "PatientID,RFS,Relapse")
    with pytest.raises(CohortError, match=r"clinical.csv, column 'RFS': dots seem to stand between thousands"):
        cohort.load_cohort(tmp_path)
    assert [case[keys.PROBLEM] for case in cohort.inference_cases(tmp_path)] == ["", "", ""]
    assert "label ignored: clinical.csv, column 'RFS': dots seem to stand" in caplog.text


@pytest.mark.parametrize(
    ("kinds", "labels", "expected"),
    [
        pytest.param("ct pet mask", ("900,1,1", "800,0,0"), set(), id="all"),
        pytest.param("ct pet", ("900,1,1", "800,0,0"), {"task seg: no case has a mask"}, id="no_mask"),
        pytest.param("ct pet mask", ("900,1,1", "800,0,1"), {"task hpv: every known HPV status is"}, id="one_status"),
        pytest.param(
            "ct pet mask",
            ("900,0,", ",1,"),
            {"task hpv: no case has a known HPV status", "task surv: no case has a relapse with its RFS"},
            id="masks_only",
        ),
    ],
)
def test_tasks_that_cannot_be_learnt_are_noted(tmp_path, kinds, labels, expected):
    for patient in ("CHUM-001", "CHUM-002"):
        add_scans(tmp_path / patient, patient, kinds)
    rows = [f"CHUM-00{k},{text}" for k, text in enumerate(labels, start=1)]
    add_table(tmp_path, rows, "clinical.csv", "PatientID,RFS,Relapse,HPV Status")
    notes = [note for note in cohort.load_cohort(tmp_path).notes if note.startswith("task ")]
    assert len(notes) == len(expected) and all(any(note.startswith(text) for note in notes) for text in expected)
    assert all(note.endswith("does not learn this task; choose the others with --tasks") for note in notes)


def test_months_are_suspected(tmp_path):
    patients = [f"CHUM-{number:03d}" for number in range(1, 21)]
    add_patients(tmp_path, *patients)
    add_table(tmp_path, [f"{patient},1,61,1,,,,,,60,1,1" for patient in patients])
    assert "the longest RFS is 60, read as days: is it in months or years?" in cohort.load_cohort(tmp_path).describe()


def test_description_counts(tmp_path):
    text = cohort.load_cohort(nested(tmp_path)).describe()
    rows = {line.split()[0]: line.split()[1:] for line in text.splitlines() if re.match(r"(CHUM|CHUS|MDA|all) ", line)}
    assert rows == {
        "CHUM": ["1", "1", "1", "1", "1", "0"],
        "CHUS": ["1", "1", "1", "0", "1", "1"],
        "MDA": ["1", "1", "0", "0", "0", "0"],
        "all": ["3", "3", "2", "1", "2", "1"],
    }
    assert "age 100 %, gender 100 %, tobacco 33 %, alcohol 33 %, treatment 67 %, performance_status 33 %" in text
    assert "excluded: 0" in text


def test_absent_columns_are_named(tmp_path):
    root = nested(tmp_path)
    found = cohort.load_cohort(root, clinical_features=("age", "t_stage", "n_stage"))
    assert "note: no column for t_stage, n_stage: unknown for every case" in found.describe()


# --- prediction --------------------------------------------------------------------------------------------


def test_inference_lists_every_patient_and_ignores_faults_in_labels(tmp_path, caplog):
    add_table(
        tmp_path,
        [
            "CHUM-001,1,61,1,,,,,,-7,1,1",
            "CHUM-002,1,61,1,,,,,,100,never,9",
            "CHUM-003,1,61,X,,,,,,100,1,1",
            "CHUM-004,1,61,1,,,,,,100,1,1",
            "CHUM-004,1,62,1,,,,,,100,1,1",
            "CHUM-005,1,61,1,,,,,,100,1,1",
        ],
    )
    add_patients(tmp_path, "CHUM-001", "CHUM-002", "CHUM-003", "CHUM-004")
    add_scans(tmp_path / "CHUM-006", "CHUM-006", "ct pet")
    add_scans(tmp_path / "CHUM-007", "CHUM-007", "ct")
    with caplog.at_level(logging.WARNING):
        cases = {case[keys.PATIENT_ID]: case for case in cohort.inference_cases(tmp_path)}
    problems = {patient: case[keys.PROBLEM] for patient, case in cases.items()}
    assert list(problems) == [f"CHUM-00{number}" for number in range(1, 8)]
    assert [patient for patient, problem in problems.items() if not problem] == ["CHUM-001", "CHUM-002", "CHUM-006"]
    assert "row 4, column 'Gender': 'X'" in problems["CHUM-003"]
    assert "row 6: CHUM-004 is already in row 5" in problems["CHUM-004"]
    assert problems["CHUM-005"] == f"no CT and no PET found in {tmp_path}"
    assert problems["CHUM-007"] == f"no PET found in {tmp_path / 'CHUM-007'}"
    assert cases["CHUM-007"][keys.PET] is None
    assert [patient for patient, case in cases.items() if not case[keys.CLINICAL_FOUND]] == ["CHUM-006", "CHUM-007"]
    assert not cases["CHUM-001"][keys.SURV_KNOWN]
    assert "label ignored" in caplog.text
    assert "column 'Relapse': 'never'" in caplog.text


@pytest.mark.parametrize("where", ["single_patient", "table_elsewhere"])
def test_inference_on_a_part_of_a_cohort_does_not_list_the_rest(tmp_path, where):
    root = in_images(tmp_path / "data")
    if where == "single_patient":
        cases = cohort.inference_cases(root / "images" / "CHUS-002")
    else:
        add_patients(tmp_path / "part", "CHUS-002")
        cases = cohort.inference_cases(tmp_path / "part", root / "HECKTOR_2025_Training_Task_2.csv")
    assert ids(cases) == ["CHUS-002"]
    assert (cases[0][keys.PROBLEM], cases[0][keys.CLINICAL]["age"]) == ("", 55.0)


@pytest.mark.parametrize(
    ("folder", "rows", "message"),
    [
        pytest.param(
            "001", "1,61", "PatientID in the table: 1; of the scans: 001; zeros in front are lost", id="zeros"
        ),
        pytest.param("1", "1.0,61", "in the table: 1.0; of the scans: 1; zeros", id="spreadsheet_number"),
        pytest.param(
            "CHUM-001", "CHUS-001,61", "in the table: CHUS-001; of the scans: CHUM-001; correct the", id="others"
        ),
        pytest.param("CHUM-001", "", "PatientID in the table: none; of the scans: CHUM-001", id="no_row"),
    ],
)
def test_a_named_table_without_any_of_the_patients_is_refused(tmp_path, folder, rows, message):
    add_scans(tmp_path / "data" / folder, folder, "ct pet mask")
    (tmp_path / "clinical.csv").write_text(f"PatientID,Age\n{rows}\n")
    for read in (cohort.inference_cases, cohort.load_cohort):
        with pytest.raises(CohortError, match=f"no row belongs to a patient of .*{re.escape(message)}"):
            read(tmp_path / "data", tmp_path / "clinical.csv")


@pytest.mark.parametrize(
    ("table", "message"),
    [
        pytest.param(
            'PatientID,Age\n"CHUM-001,61\nCHUM-002,55\n', "row 2: a PatientID of several lines", id="quotation_mark"
        ),
        pytest.param(
            "PatientID,Gender\nCHUM-001,1\nCHUM-002,2\n",
            r"column 'Gender': coded by 1 and 2; accepted: 0 \(f",
            id="1_2",
        ),
    ],
)
def test_a_table_that_may_mean_another_patient_or_value_is_refused(tmp_path, table, message):
    add_scans(tmp_path / "CHUM-001", "CHUM-001", "ct pet")
    (tmp_path / "clinical.csv").write_text(table)
    with pytest.raises(CohortError, match=message):
        cohort.inference_cases(tmp_path)


def test_inference_without_a_table(tmp_path):
    add_scans(tmp_path, "CHUM-001", "ct pet")
    add_scans(tmp_path, "atlas", "mask")
    (case,) = cohort.inference_cases(tmp_path)
    assert case[keys.CLINICAL] == dict.fromkeys(DEFAULT_FEATURES)
    assert (case[keys.CLINICAL_FOUND], case[keys.SEG_KNOWN], case[keys.PROBLEM]) == (True, False, "")


@pytest.mark.parametrize(
    ("folder", "written", "shown"),
    [
        pytest.param("Mu\u0308ller-1", "M\u00fcller-1", "M\u00fcller-1", id="decomposed_folder"),
        pytest.param("M\u00fcller-1", "Mu\u0308ller-1", "M\u00fcller-1", id="decomposed_table"),
        pytest.param("CHUM-001", "CHUM\u2013001", "CHUM-001", id="dash_of_a_word_processor"),
        pytest.param("CHUM-001", "CHUM\u00a0001", "CHUM-001", id="space_that_does_not_break"),
        pytest.param("CHUM-001", "\u200bCHUM-001\u00ad", "CHUM-001", id="without_width"),
        pytest.param("CHUM-001", "CHUM\uff0d\uff10\uff10\uff11", "CHUM-001", id="wide_digits"),
        pytest.param("=1+1", "=1+1", "'=1+1", id="formula"),
        pytest.param("=1+1", "'=1+1", "'=1+1", id="formula_as_shown"),
        pytest.param("a\x1b[31m\nb", "a\x1b[31m\nb", "a\\x1b[31m\\nb", id="control_characters"),
    ],
)
def test_a_row_is_found_however_the_id_is_encoded(tmp_path, folder, written, shown):
    add_scans(tmp_path / folder, folder, "ct pet")
    (tmp_path / "clinical.csv").write_text(f'PatientID,Age\n"{written}",61\n', encoding="utf-8")
    (case,) = cohort.inference_cases(tmp_path)
    assert (case[keys.PATIENT_ID], case[keys.CLINICAL]["age"], case[keys.CLINICAL_FOUND]) == (shown, 61.0, True)


def test_a_name_that_is_no_text_is_shown_all_the_same(tmp_path):
    """A folder of a disk with another encoding."""
    add_scans(tmp_path / "caf\udce9-1", "caf\udce9-1", "ct pet")
    (case,) = cohort.inference_cases(tmp_path)
    assert case[keys.PATIENT_ID] == "caf\\udce9-1"


def test_a_mask_beside_the_scans_has_no_part_in_a_prediction(tmp_path):
    """Neither is it read, nor can quality control refuse the patient for it."""
    add_scans(tmp_path, "CHUM-001", "ct pet mask")
    (case,) = cohort.inference_cases(tmp_path)
    assert (case[keys.MASK], case[keys.SEG_KNOWN], case[keys.PROBLEM]) == (None, False, "")
    assert cohort.load_cohort(tmp_path).cases[0][keys.MASK] is not None


def test_a_row_that_is_nobodys_keeps_nobody_from_being_predicted(tmp_path, caplog):
    add_scans(tmp_path, "CHUM-001", "ct pet")
    add_table(tmp_path, [",1,50,1,,,,,,100,1,1", "CHUM-001,1,61,1,,,,,,100,1,1"])
    (case,) = cohort.inference_cases(tmp_path)
    assert (case[keys.PROBLEM], case[keys.CLINICAL]["age"]) == ("", 61.0)
    assert "row ignored: HECKTOR_2025_Training_Task_2.csv, row 2: no PatientID" in caplog.text
    with pytest.raises(CohortError, match="row 2: no PatientID"):
        cohort.load_cohort(tmp_path)


def test_a_row_that_names_two_patients_concerns_them_alone(tmp_path):
    for patient in ("CHUM-001", "CHUM-002", "CHUM-003"):
        add_scans(tmp_path, patient, "ct pet")
    (tmp_path / "t.csv").write_text("PatientID,patient_id,Age\nCHUM-001,CHUM-002,50\nCHUM-003,CHUM-003,61\n")
    problems = [case[keys.PROBLEM] for case in cohort.inference_cases(tmp_path)]
    assert ["row 2: the columns called 'PatientID' name different patients" in problem for problem in problems] == [
        True,
        True,
        False,
    ]
    assert problems[2] == ""


# --- the demonstration cohort --------------------------------------------------------------------------------


def test_demonstration_cohort_is_found_where_it_was_made(tmp_path):
    add_patients(tmp_path / "data" / "demonstration" / "Task 1")
    assert cohort.default_dataset_dir(tmp_path) == str(tmp_path / "data" / "demonstration")


def test_missing_demonstration_cohort_says_in_one_line_how_to_make_it(tmp_path):
    (tmp_path / "data" / "demonstration").mkdir(parents=True)
    with pytest.raises(FileNotFoundError) as error:
        cohort.default_dataset_dir(tmp_path)
    message = str(error.value)
    assert f"python scripts/make_cohort.py --out {tmp_path}/data/demonstration" in message
    assert "--dataset_dir" in message
    assert "\n" not in message


# --- what a model must say of it ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("record", "below", "statement"),
    [
        pytest.param(None, "", "3 cases of 3 centres (CHUM, CHUS, MDA); research use only, not for", id="patients"),
        pytest.param("Digital phantoms, for software", "", "3 digital phantoms, not for clinical use", id="phantoms"),
        pytest.param("Digital phantoms", "images", "3 digital phantoms, not for clinical use", id="folder_of_images"),
        pytest.param("Made by me", "", "3 cases of 3 centres", id="other_record"),
    ],
)
def test_what_a_model_must_say_about_its_cases(tmp_path, record, below, statement):
    in_images(tmp_path)
    if record is not None:
        (tmp_path / "cohort.json").write_text(json.dumps({"notice": record}))
    assert cohort.load_cohort(tmp_path / below).statement().startswith(statement)


# --- real data -----------------------------------------------------------------------------------------------


def test_real_sarcoma_cohort_has_masks_and_no_other_label():
    found = cohort.load_cohort(real_data("sts_petct"))
    assert len(found.cases) == 20
    assert found.exclusions == []
    assert all(case[keys.SEG_KNOWN] and case[keys.CLINICAL_FOUND] for case in found.cases)
    assert not any(case[keys.SURV_KNOWN] or case[keys.HPV_KNOWN] for case in found.cases)
    assert all(Path(case[kind]).is_file() for case in found.cases for kind in (keys.CT, keys.PET, keys.MASK))
    split = found.split("partial", 3, 0, 0)
    assert (len(split.training), len(split.validation)) == (13, 7)


def test_real_head_and_neck_table():
    found = cohort.load_cohort(
        real_data("hn_clinical"), clinical_features=("age", "t_stage", "n_stage", "hpv"), require_images=False
    )
    assert len(found.cases) == 300
    counts = [line.split() for line in found.describe().splitlines() if line.startswith("all ")]
    assert counts == [["all", "300", "0", "120", "79", "300", "76"]]
    assert sum(case[keys.CLINICAL]["t_stage"] is None for case in found.cases) == 10
