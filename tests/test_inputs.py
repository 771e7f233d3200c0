"""What somebody points at, as cases: layouts and formats, lists, pairs, DICOM, clinical values, and faults in them."""

from __future__ import annotations

import json
import logging
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from dicom_study import SECRETS, write_pet_ct, write_series

from conftest import SHARED_DATA
from scripts import keys
from scripts.cohorts.clinical import ClinicalValueError
from scripts.cohorts.cohort import CohortError
from scripts.dicom.tags import DicomError
from scripts.prediction.inputs import add_clinical_values, clinical_object, find_cases, listed_cases, pair_case

FEATURES = ("age", "gender", "m_stage")


def add_scans(folder: Path, patient: str, suffix: str = ".nii.gz") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for kind in ("CT", "PT"):
        (folder / f"{patient}__{kind}{suffix}").write_bytes(kind.encode())


def write_dicom(folder: Path, patient: str = "P-1", number: int = 1, pet=None, **tags) -> None:
    """CT of 40 HU and PET of 3 SUV."""
    tags = {"PatientID": patient, **tags}
    write_pet_ct(folder, np.full((6, 5, 12), 40), np.full((6, 5, 12), 3.0), 4.0, tags, number, pet)


def by_id(cases) -> dict[str, dict]:
    return {case[keys.PATIENT_ID]: case for case in cases}


# --- folders of images ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize("suffix", [".nii", ".nii.gz", ".mha", ".mhd", ".nrrd", ".MHA"])
def test_every_format_in_the_hecktor_layout(tmp_path, suffix):
    add_scans(tmp_path / "CHUM-001", "CHUM-001", suffix)
    (case,) = find_cases(tmp_path, FEATURES)
    assert case[keys.PATIENT_ID] == "CHUM-001" and case[keys.PROBLEM] == ""
    assert [Path(case[kind]).name for kind in (keys.CT, keys.PET)] == [f"CHUM-001__CT{suffix}", f"CHUM-001__PT{suffix}"]


def test_one_scan_in_two_formats_is_refused(tmp_path):
    add_scans(tmp_path, "CHUM-001", ".nii.gz")
    add_scans(tmp_path, "CHUM-001", ".mha")
    add_scans(tmp_path, "CHUM-002", ".mha")
    cases = by_id(find_cases(tmp_path, FEATURES))
    assert "are both the ct of CHUM-001" in cases["CHUM-001"][keys.PROBLEM]
    assert cases["CHUM-001"][keys.CT] is None and cases["CHUM-002"][keys.PROBLEM] == ""


def test_a_row_of_a_list_without_an_id_has_a_row_of_its_own(tmp_path):
    add_scans(tmp_path, "CHUM-001", ".mha")
    rows = [{"patient_id": name, "ct": "CHUM-001__CT.mha", "pet": "CHUM-001__PT.mha"} for name in ("CHUM-001", "", "")]
    (tmp_path / "cases.json").write_text(json.dumps(rows))
    problems = {name: case[keys.PROBLEM] for name, case in by_id(find_cases(tmp_path / "cases.json")).items()}
    assert problems == {
        "CHUM-001": "",
        "row 2": "cases.json, row 2: no PatientID",
        "row 3": "cases.json, row 3: no PatientID",
    }


def test_clinical_json_with_one_object_a_patient(tmp_path):
    for patient in ("CHUM-001", "CHUM-002"):
        add_scans(tmp_path / "scans" / patient, patient)
    table = tmp_path / "ehr.json"
    table.write_text(
        json.dumps([{"PatientID": "CHUM_001", "Age": 61, "M-stage": "M1"}, {"PatientID": "CHUM-002", "Age": None}])
    )
    cases = by_id(find_cases(tmp_path / "scans", FEATURES, table))
    assert cases["CHUM-001"][keys.CLINICAL] == {"age": 61.0, "gender": None, "m_stage": 1.0}
    assert cases["CHUM-002"][keys.CLINICAL]["age"] is None


@pytest.mark.parametrize(
    "text, message",
    [
        pytest.param('{"PatientID": "A",\n "Age": 61,\n}', r"t\.json, line [23]: not .*remove it", id="comma"),
        pytest.param('[{"Age": 61}', r"t\.json, line 1: not valid JSON", id="cut_off"),
        pytest.param("[1, 2]", r"expected a list of objects", id="numbers"),
        pytest.param('[{"Age": 61}]', r"no PatientID column; its columns are: Age", id="no_id"),
    ],
)
def test_unusable_json_tables_are_refused(tmp_path, text, message):
    add_scans(tmp_path / "A-1", "A-1")
    (tmp_path / "t.json").write_text(text)
    with pytest.raises(CohortError, match=message):
        find_cases(tmp_path, FEATURES, tmp_path / "t.json")


@pytest.mark.parametrize(
    "make, message",
    [
        pytest.param(lambda p: p / "absent", "does not exist", id="absent"),
        pytest.param(lambda p: p, "holds no scan: neither .* nor DICOM", id="empty"),
    ],
)
def test_nothing_to_predict(tmp_path, make, message):
    with pytest.raises(CohortError, match=message):
        find_cases(make(tmp_path), FEATURES)


def test_linked_patients_and_files_are_read(tmp_path):
    add_scans(tmp_path / "elsewhere" / "CHUM-001", "CHUM-001")
    add_scans(tmp_path / "elsewhere" / "files", "CHUM-002")
    source = tmp_path / "in"
    (source / "CHUM-002").mkdir(parents=True)
    (source / "CHUM-001").symlink_to(tmp_path / "elsewhere" / "CHUM-001")
    for path in (tmp_path / "elsewhere" / "files").iterdir():
        (source / "CHUM-002" / path.name).symlink_to(path)
    (source / "circle").symlink_to(source)
    assert {name: case[keys.PROBLEM] for name, case in by_id(find_cases(source)).items()} == {
        "CHUM-001": "",
        "CHUM-002": "",
    }


@pytest.mark.parametrize(
    "link, failed, problem",
    [
        pytest.param("CHUM-003", "CHUM-003", "is a broken link", id="patient"),
        pytest.param("P3", "P3", "is a broken link", id="patient_of_any_name"),
        pytest.param("CHUM-003__CT.nii.gz", "CHUM-003", "CHUM-003__CT.nii.gz is a broken link", id="ct_without_folder"),
        pytest.param("CHUM-001/CHUM-001__PT.nii.gz", "CHUM-001", "CHUM-001__PT.nii.gz is a broken link", id="pet"),
        pytest.param("CHUM-001/CHUM-001.nii.gz", None, "", id="mask"),
        pytest.param("readme.txt", None, "", id="text"),
        pytest.param("self", "self", "is a broken link", id="to_itself"),
    ],
)
def test_links_to_nothing_fail_their_patient(tmp_path, link, failed, problem):
    for patient in ("CHUM-001", "CHUM-002"):
        add_scans(tmp_path / patient, patient)
    (tmp_path / link).unlink(missing_ok=True)
    (tmp_path / link).symlink_to(tmp_path / ("self" if link == "self" else "gone"))
    problems = {name: case[keys.PROBLEM] for name, case in by_id(find_cases(tmp_path)).items()}
    assert set(problems) == {"CHUM-001", "CHUM-002", *([failed] if failed else [])}
    assert [name for name, text in problems.items() if text] == ([failed] if failed else [])
    assert failed is None or problem in problems[failed]


def test_a_patient_whose_folder_cannot_be_read_has_a_row(tmp_path, monkeypatch):
    for patient in ("CHUM-001", "CHUM-002"):
        add_scans(tmp_path / patient, patient)
    (tmp_path / "lost+found").mkdir()
    locked = {tmp_path / "CHUM-002", tmp_path / "lost+found"}
    forbid(monkeypatch, locked)
    cases = by_id(find_cases(tmp_path, FEATURES))
    assert set(cases) == {"CHUM-001", "CHUM-002"} and cases["CHUM-001"][keys.PROBLEM] == ""
    assert cases["CHUM-002"][keys.PROBLEM] == f"{tmp_path / 'CHUM-002'} cannot be read (Permission denied)"
    locked.add(tmp_path)
    with pytest.raises(CohortError, match=r"cannot be read \(Permission denied\)"):
        find_cases(tmp_path, FEATURES)


def forbid(monkeypatch, folders: set[Path]) -> None:
    """Let nobody list the folders: root, as whom tests may run, could."""
    scandir, listdir = os.scandir, os.listdir

    def guarded(path=".", list_folder=scandir):
        if Path(path) in folders:
            raise PermissionError(13, "Permission denied", str(path))
        return list_folder(path)

    monkeypatch.setattr(os, "scandir", guarded)
    monkeypatch.setattr(os, "listdir", lambda path=".": guarded(path, listdir))


def test_a_single_scan_asks_for_the_other(tmp_path):
    add_scans(tmp_path, "A-1")
    with pytest.raises(CohortError, match="is a single file, neither a folder nor a list"):
        find_cases(tmp_path / "A-1__CT.nii.gz", FEATURES)


# --- lists ---------------------------------------------------------------------------------------------------------
@pytest.fixture
def images(tmp_path) -> Path:
    for name in ("a_ct.mha", "a_pet.mha", "b_ct.nii.gz", "b_pet.nii.gz"):
        (tmp_path / "images" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "images" / name).write_bytes(b"x")
    return tmp_path


def test_csv_and_json_lists_say_the_same(images):
    (images / "cases.csv").write_text(
        "patient_id,ct,pet,Age,Gender\na,images/a_ct.mha,images/a_pet.mha,61,male\nb,images/b_ct.nii.gz,images/b_pet.nii.gz,,\n"
    )
    rows = [
        {"patient_id": "a", "ct": "images/a_ct.mha", "pet": "images/a_pet.mha", "Age": 61, "Gender": "male"},
        {"patient_id": "b", "ct": "images/b_ct.nii.gz", "pet": str(images / "images" / "b_pet.nii.gz")},
    ]
    (images / "cases.json").write_text(json.dumps(rows))
    csv, js = find_cases(images / "cases.csv", FEATURES), find_cases(images / "cases.json", FEATURES)
    assert csv == js
    assert csv[0][keys.CLINICAL] == {"age": 61.0, "gender": 1.0, "m_stage": None}
    assert csv[0][keys.CT] == str(images / "images" / "a_ct.mha")
    assert [case[keys.PROBLEM] for case in csv] == ["", ""]


def test_faults_of_a_list_stay_with_their_patient(images):
    (images / "cases.csv").write_text(
        "patient_id,ct,pet,Age\na,images/a_ct.mha,,61\nb,images/b_ct.nii.gz,images/b_pet.nii.gz,old\n"
        "c/d,images/a_ct.mha,images/a_pet.mha,50\n"
    )
    cases = by_id(listed_cases(images / "cases.csv", FEATURES))
    assert "no PET found in" in cases["a"][keys.PROBLEM]
    assert "cases.csv, row 3, column 'Age': 'old' is no value of age" in cases["b"][keys.PROBLEM]
    assert cases["c/d"][keys.PROBLEM] == ""


def test_a_table_besides_a_list_has_to_name_somebody_of_it(images):
    (images / "cases.csv").write_text("patient_id,ct,pet\n001,images/a_ct.mha,images/a_pet.mha\n")
    (images / "clinical.csv").write_text("PatientID,Age\n1,61\n")
    with pytest.raises(CohortError, match=r"no row belongs to a patient of .*zeros in front are lost"):
        find_cases(images / "cases.csv", FEATURES, images / "clinical.csv")


def test_ids_stay_as_they_are_written(images):
    names = ["a/b", "a b", "c"]
    rows = [{"patient_id": name, "ct": "images/a_ct.mha", "pet": "images/a_pet.mha"} for name in names]
    (images / "cases.json").write_text(json.dumps(rows))
    assert [case[keys.PATIENT_ID] for case in find_cases(images / "cases.json", FEATURES)] == names


def test_a_list_without_its_columns(images):
    (images / "cases.csv").write_text("patient_id,ct\na,images/a_ct.mha\n")
    with pytest.raises(CohortError, match="has the columns patient_id, ct and pet; it has patient_id, ct"):
        listed_cases(images / "cases.csv", FEATURES)


# --- a pair, and values of one patient -----------------------------------------------------------------------------
def test_a_pair_of_files(images):
    case = pair_case(images / "images" / "a_ct.mha", images / "images" / "a_pet.mha", FEATURES)
    assert case[keys.PATIENT_ID] == "a_ct" and case[keys.PROBLEM] == ""
    assert pair_case(case[keys.CT], case[keys.PET], FEATURES, "../x y")[keys.PATIENT_ID] == "../x y"


def test_a_pair_that_is_none(images):
    with pytest.raises(CohortError, match=r"PET .* does not exist"):
        pair_case(images / "images" / "a_ct.mha", images / "absent.mha")
    with pytest.raises(CohortError, match="one is a folder"):
        pair_case(images / "images" / "a_ct.mha", images / "images")


def test_values_of_one_patient(images, caplog):
    case = pair_case(images / "images" / "a_ct.mha", images / "images" / "a_pet.mha", FEATURES)
    add_clinical_values([case], {"Age": "61", "M-stage": "Mx", "Gender": None, "alcohol": 1}, "ehr.json")
    assert case[keys.CLINICAL] == {"age": 61.0, "gender": None, "m_stage": None}
    assert case[keys.CLINICAL_SOURCE] == {"age": "ehr.json"}
    assert "not read by this model: alcohol" in caplog.text
    with pytest.raises(ClinicalValueError, match="options, age: '300' is no value of age"):
        add_clinical_values([case], {"age": 300}, "options")
    with pytest.raises(CohortError, match="one patient, but there are 2"):
        add_clinical_values([case, case], {"age": 60}, "options")


def test_an_object_without_a_patient_is_no_table(tmp_path):
    for name, content in (
        ("one", {"Age": 1}),
        ("table", [{"PatientID": "a"}]),
        ("named", {"PatientID": "a", "Age": 1}),
    ):
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    assert clinical_object(tmp_path / "one.json") == {"Age": 1}
    assert clinical_object(tmp_path / "table.json") is None and clinical_object(tmp_path / "named.json") is None
    assert clinical_object(tmp_path / "table.csv") is None
    for content in (
        {"ehr": {"Age": 61}},
        {"patient": {"Age": 61}},
        {"CHUM-001": {"Age": 61}, "CHUM-002": {"Age": 62}},
        {"AgeAtDx": 61},
    ):
        (tmp_path / "other.json").write_text(json.dumps(content))
        with pytest.raises(CohortError, match=r"other\.json: none of its names is a known clinical value"):
            clinical_object(tmp_path / "other.json")


# --- DICOM ---------------------------------------------------------------------------------------------------------
def test_dicom_scans_are_read_when_asked_for(tmp_path):
    write_dicom(tmp_path)
    (case,) = find_cases(tmp_path, FEATURES)
    assert case[keys.PATIENT_ID] == "P-1" and case[keys.PROBLEM] == ""
    ct, affine = case[keys.CT].read()
    pet, _ = case[keys.PET].read()
    assert ct.shape == (6, 5, 12) and (ct == 40).all()
    np.testing.assert_allclose(pet, 3.0, rtol=1e-5)  # Bq/ml of the file times the factor of its headers
    np.testing.assert_allclose(np.abs(np.diag(affine)), [4, 4, 4, 1])
    shutil.rmtree(tmp_path / "PET")
    with pytest.raises((DicomError, OSError)):
        case[keys.PET].read()


def test_a_pet_without_weight_fails_when_it_is_read(tmp_path):
    write_dicom(tmp_path, pet={"PatientWeight": None})
    (case,) = find_cases(tmp_path, FEATURES)
    with pytest.raises(DicomError, match=r"Patient's Weight \(0010,1030\) is missing"):
        case[keys.PET].read()


@pytest.mark.parametrize(
    "tags, expected",
    [
        pytest.param({"PatientAge": "061Y"}, {"age": 61.0, "gender": 0.0}, id="stated"),
        pytest.param({"PatientAge": "030M"}, {"age": 2.0, "gender": 0.0}, id="months"),
        pytest.param({"PatientBirthDate": "19600103"}, {"age": 59.0, "gender": 0.0}, id="day_before_the_birthday"),
        pytest.param({"PatientBirthDate": "19600102"}, {"age": 60.0, "gender": 0.0}, id="birthday"),
        pytest.param({"PatientAge": "000Y", "PatientSex": "O"}, {}, id="de_identified"),
        pytest.param({"PatientAge": "??", "PatientBirthDate": "", "PatientSex": "M"}, {"gender": 1.0}, id="unreadable"),
        pytest.param({"PatientAge": "61 y"}, {"age": 61.0, "gender": 0.0}, id="with_a_space"),
        pytest.param({"PatientAge": "61"}, {"age": 20.0, "gender": 0.0}, id="without_unit_and_a_birth_date"),
    ],
)
def test_age_and_sex_of_the_header(tmp_path, tags, expected):
    write_dicom(tmp_path, **tags)
    (case,) = find_cases(tmp_path, FEATURES)
    known = {name: value for name, value in case[keys.CLINICAL].items() if value is not None}
    assert known == expected
    assert case.get(keys.CLINICAL_SOURCE, {}) == dict.fromkeys(expected, "DICOM header")


NO_UNIT = ["Patient's Age (0010,1010) has no unit; it is read as years unless the age is known otherwise"]


@pytest.mark.parametrize(
    "ct, pet, age, doubts",
    [
        pytest.param("64", "64", 64.0, NO_UNIT, id="years"),
        pytest.param("064", None, 64.0, NO_UNIT, id="three_digits"),
        pytest.param("015", "015", 15.0, NO_UNIT, id="youngest"),
        pytest.param("014", "014", None, [], id="a_child_or_months"),
        pytest.param("110", "110", 110.0, NO_UNIT, id="oldest"),
        pytest.param("720", "720", None, [], id="months"),
        pytest.param("64.5", "64.5", None, [], id="no_whole_number"),
        pytest.param("64", "065Y", 65.0, [], id="the_pet_has_a_unit"),
        pytest.param(None, "065Y", 65.0, [], id="the_pet_alone"),
        pytest.param(None, "65", 65.0, NO_UNIT, id="the_pet_alone_without_unit"),
    ],
)
def test_an_age_without_a_unit_is_read_as_years_with_a_doubt(tmp_path, ct, pet, age, doubts):
    write_dicom(tmp_path, pet={"PatientAge": pet}, PatientAge=ct, PatientBirthDate="")
    (case,) = find_cases(tmp_path, FEATURES)
    assert case[keys.CLINICAL]["age"] == age
    assert list(case[keys.PET].doubts) == doubts


def test_an_age_of_the_table_leaves_no_doubt_about_the_header(tmp_path):
    write_dicom(tmp_path / "dicom", PatientAge="64", PatientBirthDate="")
    (tmp_path / "clinical.csv").write_text("PatientID,Age\nP-1,50\n")
    (case,) = find_cases(tmp_path / "dicom", FEATURES, tmp_path / "clinical.csv")
    assert (case[keys.CLINICAL]["age"], case[keys.PET].doubts) == (50.0, ())


@pytest.mark.parametrize("layout", ["dicom", "images"])
def test_results_within_the_scans_are_not_searched(tmp_path, layout, caplog):
    if layout == "dicom":
        write_dicom(tmp_path / "P-1")
    else:
        add_scans(tmp_path / "CHUM-001", "CHUM-001", ".nii.gz")
    results = tmp_path / "results"
    results.mkdir()
    with caplog.at_level("INFO"):
        expected = find_cases(tmp_path, FEATURES)
        assert str(results) in caplog.text, "as of any folder without scans"
        write_dicom(results / "P-2", "P-2", 2)
        caplog.clear()
        cases = find_cases(tmp_path, FEATURES, None, results)
    assert [case[keys.PATIENT_ID] for case in cases] == [case[keys.PATIENT_ID] for case in expected]
    assert str(results) not in caplog.text and "P-2" not in caplog.text
    assert set(by_id(find_cases(tmp_path, FEATURES))) == {*by_id(expected), "P-2"}


def test_a_table_goes_before_the_header(tmp_path):
    write_dicom(tmp_path / "dicom", PatientAge="061Y")
    (tmp_path / "clinical.csv").write_text("PatientID,Age\nP-1,50\n")
    (case,) = find_cases(tmp_path / "dicom", FEATURES, tmp_path / "clinical.csv")
    assert case[keys.CLINICAL] == {"age": 50.0, "gender": 0.0, "m_stage": None}
    assert case[keys.CLINICAL_SOURCE] == {"gender": "DICOM header"}


def test_a_folder_of_several_patients_and_examinations(tmp_path, caplog):
    write_dicom(tmp_path / "x", "A", 1, StudyDate="20210101")
    write_dicom(tmp_path / "y", "A", 2, StudyDate="20200101")
    write_dicom(tmp_path / "z", "B", 3)
    write_series(
        tmp_path / "lone", tags={"PatientID": "C", "StudyInstanceUID": "1.2.9", "FrameOfReferenceUID": "1.2.8"}
    )
    (tmp_path / "readme.txt").write_text("no DICOM")
    with caplog.at_level(logging.INFO):
        cases = by_id(find_cases(tmp_path, FEATURES))
    assert set(cases) == {"A", "A_2", "B", "C"}
    assert cases["A"][keys.DICOM].ct.study_uid == "1.2.3.4.102"  # the earlier one
    assert "no PET among its DICOM series (CT)" in cases["C"][keys.PROBLEM]
    assert cases["C"][keys.CT] is None
    assert "A: CT:  series 2 (CT), 12 slices" in caplog.text
    assert not [secret for secret in SECRETS if secret in caplog.text]


def test_dicom_and_image_files_in_one_folder_are_all_predicted(tmp_path, caplog):
    add_scans(tmp_path / "CHUM-001", "CHUM-001")
    write_dicom(tmp_path / "CHUM-001" / "originals", "CHUM-001", 1)  # of what was converted
    write_dicom(tmp_path / "a", "P-2", 2)
    write_dicom(tmp_path / "b", "CHUM-001", 3)
    (tmp_path / "clinical.csv").write_text("PatientID,Age\nCHUM-001,50\nP-2,60\nP-3,70\n")
    cases = by_id(find_cases(tmp_path, FEATURES))
    assert {name: case[keys.PROBLEM] for name, case in cases.items()} == {
        "CHUM-001": "",
        "P-2": "",
        "P-3": f"no CT and no PET found in {tmp_path}",
    }
    assert "CHUM-001: has image files; the DICOM of this patient is not read" in caplog.messages
    assert isinstance(cases["CHUM-001"][keys.CT], str) and cases["P-2"][keys.DICOM]
    assert cases["P-2"][keys.CLINICAL]["age"] == 60.0


def test_a_folder_whose_dicom_is_predicted_under_its_own_id_is_no_second_patient(tmp_path):
    """Unless clinical values stand in a row of its name, which the patient of the DICOM does not get."""
    for patient in ("A1", "A2"):
        add_scans(tmp_path / patient, patient)
    write_dicom(tmp_path / "A3", "P-2", 2)
    (tmp_path / "A4").mkdir()
    nothing = f"no CT and no PET found in {tmp_path}"
    whole = {"A1": "", "A2": "", "A4": f"{nothing}/A4", "P-2": ""}
    assert {name: case[keys.PROBLEM] for name, case in by_id(find_cases(tmp_path, FEATURES)).items()} == whole
    (tmp_path / "clinical.csv").write_text("PatientID,Age\nA3,50\n")
    problems = {name: case[keys.PROBLEM] for name, case in by_id(find_cases(tmp_path, FEATURES)).items()}
    assert problems == {**whole, "A3": f"{nothing}/A3"}


def test_empty_folders_beside_dicom_are_told(tmp_path, caplog):
    write_dicom(tmp_path / "a", "P-1")
    (tmp_path / "b" / "c").mkdir(parents=True)
    assert set(by_id(find_cases(tmp_path, FEATURES))) == {"P-1"}
    assert f"folders without a file: {tmp_path}/b" in caplog.messages


def test_patients_whom_only_the_table_has_fail_beside_dicom_too(tmp_path):
    write_dicom(tmp_path / "in" / "a", "P-1")
    (tmp_path / "all.csv").write_text("PatientID,Age\nP-1,50\nP-2,60\n")
    assert set(by_id(find_cases(tmp_path / "in", FEATURES, tmp_path / "all.csv"))) == {"P-1"}
    shutil.copy(tmp_path / "all.csv", tmp_path / "in" / "clinical.csv")
    assert by_id(find_cases(tmp_path / "in", FEATURES))["P-2"][keys.PROBLEM].startswith("no CT and no PET found")


def test_a_list_with_a_folder_that_holds_no_dicom_fails_its_patient_only(tmp_path):
    write_dicom(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "cases.csv").write_text("patient_id,ct,pet\nA,CT,PET\nB,empty,empty\n")
    cases = by_id(find_cases(tmp_path / "cases.csv", FEATURES))
    assert cases["A"][keys.PROBLEM] == "" and "no DICOM series" in cases["B"][keys.PROBLEM]


def test_a_pair_of_dicom_folders(tmp_path):
    write_dicom(tmp_path)
    case = pair_case(tmp_path / "CT", tmp_path / "PET", FEATURES)
    assert case[keys.PATIENT_ID] == "P-1" and case[keys.CT].read()[0].shape == (6, 5, 12)
    (tmp_path / "cases.csv").write_text("patient_id,ct,pet\nmine,CT,PET\n")
    (listed,) = find_cases(tmp_path / "cases.csv", FEATURES)
    assert listed[keys.PATIENT_ID] == "mine" and listed[keys.PET].read()[0].shape == (6, 5, 12)


@pytest.mark.skipif(not (SHARED_DATA / "dicom").is_dir(), reason="real DICOM is not beside the repository")
def test_real_dicom():
    cases = by_id(find_cases(SHARED_DATA / "dicom", FEATURES))
    assert set(cases) == {"STS_002", "STS_008"}
    assert cases["STS_002"][keys.CLINICAL]["gender"] == 1.0
    ct, _ = cases["STS_002"][keys.CT].read()
    pet, _ = cases["STS_002"][keys.PET].read()
    assert ct.shape == (161, 143, 48)
    assert pet.min() >= 0 and 2 < pet.max() < 50
