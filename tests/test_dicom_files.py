"""DICOM as folders hold it: whose a file is, links, files without preamble, copies, rubbish; no file is left out."""

from __future__ import annotations

import io
import logging
import os
import shutil
import threading
import tracemalloc
import warnings
from pathlib import Path

import numpy as np
import pydicom
import pytest
from dicom_study import SECRETS, slice_dataset, write_series
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    RLELossless,
)

from scripts import keys
from scripts.dicom.choice import choose_pet_ct
from scripts.dicom.examinations import find_examinations, pair_examination
from scripts.dicom.series import find_series, people_differ, read_headers, read_series
from scripts.dicom.tags import DicomError, lenient
from scripts.prediction.inputs import find_cases

FEATURES = ("age", "gender", "m_stage")
SLICES = 12


def write_study(folder, patient="ID-4711", number=1, **tags):
    """A CT and a PET of one study, twelve slices each."""
    tags = {"PatientID": patient, "StudyInstanceUID": f"1.2.3.4.1{number}", **tags}
    tags = {"FrameOfReferenceUID": f"1.2.3.4.2{number}", **tags}
    write_series(folder / "CT", uid=f"1.2.3.4.3{number}", tags={**tags, "SeriesNumber": 2})
    write_series(folder / "PT", "PT", uid=f"1.2.3.4.4{number}", tags={**tags, "SeriesNumber": 3})
    return folder


def change(path, **tags):
    """Set tags of a file; None removes one."""
    dataset = pydicom.dcmread(path)
    for name, value in tags.items():
        if value is None:
            del dataset[name]
        else:
            setattr(dataset, name, value)
    dataset.save_as(path)


def without_preamble(path, syntax=None):
    """Take preamble and ``DICM`` off a file; with a transfer syntax, the file's own header, too."""
    if syntax is None:
        path.write_bytes(path.read_bytes()[132:])
        return
    buffer = io.BytesIO()
    dataset = pydicom.dcmread(path)
    pydicom.dcmwrite(buffer, pydicom.Dataset(dict(dataset.items())), **encoding(syntax), enforce_file_format=False)
    path.write_bytes(buffer.getvalue())


def encoding(syntax):
    return {"implicit_vr": syntax == ImplicitVRLittleEndian, "little_endian": True}


def rows(folder, clinical=None):
    """Patient -> problem, "" for those who can be predicted."""
    return {case[keys.PATIENT_ID]: case[keys.PROBLEM] for case in find_cases(folder, FEATURES, clinical)}


# --- files without preamble ----------------------------------------------------------------------------------------
@pytest.mark.parametrize("count", [SLICES, 4], ids=["all_slices", "some_slices"])
@pytest.mark.parametrize(
    "syntax",
    [
        pytest.param(None, id="with_transfer_syntax"),
        pytest.param(ImplicitVRLittleEndian, id="implicit"),
        pytest.param(ExplicitVRLittleEndian, id="explicit"),
    ],
)
def test_files_without_preamble_are_read(tmp_path, syntax, count):
    stored = write_series(tmp_path, uid="1.2.3.4.30")
    for path in sorted(tmp_path.iterdir())[:count]:
        without_preamble(path, syntax)
    [series] = find_series(tmp_path)
    assert len(series) == SLICES and len(read_headers(series)) == SLICES
    np.testing.assert_array_equal(read_series(series)[0].transpose(2, 1, 0), stored)


@pytest.mark.parametrize(
    ("content", "dicom"),
    [
        pytest.param(b"\x08\x00\x05\x00\x0a\x00\x00\x00ISO_IR 100", True, id="no_sop_class"),
        pytest.param(b"\x08\x00\x10\x00\x0c\x00\x00\x00ACR-NEMA 2.0", True, id="acr_nema"),
        pytest.param(b"\x02\x00\x00\x00UL\x04\x00\xff", True, id="cut_off"),
        pytest.param(b"\x08\x00\x05\x00\xff\xff\xff\x7f" + b"x" * 99, False, id="no_length"),
        pytest.param(b"\x08", False, id="one_byte"),
        pytest.param(b"GIF89a" * 99, False, id="picture"),
        pytest.param(b"PatientID,Age\n" * 20, False, id="table"),
    ],
)
def test_what_begins_like_dicom_without_preamble(tmp_path, content, dicom):
    write_series(tmp_path)
    (tmp_path / "other").write_bytes(content)
    found = find_series(tmp_path)
    assert (len(found.damaged), len(found.others)) == (int(dicom), int(not dicom))
    assert bool(found[0].damaged) == dicom


# --- whose a file is -----------------------------------------------------------------------------------------------
SAME = {"FrameOfReferenceUID": "1.2.3.4.5", "StudyInstanceUID": "1.2.3.4.6"}
APART = pytest.mark.parametrize("apart", [0.0, 1.5], ids=["same_positions", "half_a_slice_apart"])


def two_people(folder, apart, one, other):
    """Two scans with the same SeriesInstanceUIDs; the second one's slices lie ``apart`` mm higher."""
    for person, (tags, shift) in enumerate(((one, 0.0), (other, apart))):
        for modality, uid in (("CT", "1.2.3.4.30"), ("PT", "1.2.3.4.40")):
            place = folder / str(person) / modality
            write_series(place, modality, uid=uid, tags={**SAME, **tags}, origin=(-20, -30, 100 + shift), seed=person)


@APART
def test_two_patients_under_one_series_uid_are_two(tmp_path, apart):
    two_people(tmp_path, apart, {"PatientID": "A"}, {"PatientID": "B"})
    assert rows(tmp_path) == {"A": "", "B": ""}
    assert [len(s) for s in find_series(tmp_path)] == [SLICES] * 4


@APART
def test_two_studies_under_one_series_uid_are_two(tmp_path, apart):
    later = {"StudyInstanceUID": "1.2.3.4.7", "FrameOfReferenceUID": "1.2.3.4.8", "StudyDate": "20210102"}
    two_people(tmp_path, apart, {"PatientID": "A"}, {"PatientID": "A", **later})
    assert rows(tmp_path) == {"A": "", "A_2": ""}


@APART
def test_two_frames_of_reference_under_one_series_uid_are_no_volume(tmp_path, apart):
    two_people(tmp_path, apart, {}, {"FrameOfReferenceUID": "1.2.3.4.8"})
    assert sorted((s.modality, s.part, len(s)) for s in find_series(tmp_path)) == [
        ("CT", 1, SLICES),
        ("CT", 2, SLICES),
        ("PT", 1, SLICES),
        ("PT", 2, SLICES),
    ]


@APART
@pytest.mark.parametrize(
    ("other", "told"),
    [
        pytest.param({"PatientName": "Roe^Richard"}, r"Patient's Name \(0010,0010\)", id="name"),
        pytest.param({"PatientBirthDate": "19710203"}, r"Patient's Birth Date \(0010,0030\)", id="birth_date"),
        pytest.param({"PatientSex": "M"}, r"Patient's Sex \(0010,0040\)", id="sex"),
        pytest.param({"StudyDate": "20210203"}, r"Study Date \(0008,0020\)|Instance Number", id="study_date"),
        pytest.param({"SeriesNumber": 9}, r"Series Number \(0020,0011\)|Instance Number", id="series_number"),
        pytest.param({}, r"Instance Number \(0020,0013\)|more than one image", id="nothing_but_pixels"),
    ],
)
def test_two_people_under_the_same_ids_are_refused(tmp_path, apart, other, told):
    two_people(tmp_path, apart, {}, other)
    [problem] = rows(tmp_path).values()
    with pytest.raises(DicomError, match=told):
        choose_pet_ct(find_series(tmp_path))
    assert "differ" in problem or "hold more than one image" in problem
    assert not [secret for secret in (*SECRETS, "Roe", "1971") if secret in problem]


def test_two_people_under_the_same_ids_on_different_grids_are_refused(tmp_path):
    for modality, uid in (("CT", "1.2.3.4.30"), ("PT", "1.2.3.4.40")):
        for columns in (5, 4):
            write_series(tmp_path / modality / str(columns), modality, uid=uid, tags=SAME, shape=(6, columns))
    [problem] = rows(tmp_path).values()
    assert "differ in the place that one Instance Number (0020,0013) has" in problem


# --- days --------------------------------------------------------------------------------------------------------
def day(text):
    return {**SAME, "AcquisitionDate": text, "SeriesDate": text}


def scans(folder, **series):
    """Series by name, whose first two letters are the modality and whose value is its day."""
    for number, (name, of) in enumerate(series.items(), start=1):
        modality = name[:2].upper()
        tags = {**day(of), "SeriesNumber": number}
        write_series(folder / name, modality, uid=f"1.2.3.4.5{number}", tags=tags, seed=number)


@pytest.mark.parametrize("frame", ["1.2.3.4.5", "1.2.3.4.9"], ids=["one_frame", "two_frames"])
def test_two_days_of_one_study_are_two_examinations(tmp_path, frame):
    scans(tmp_path / "1", pt="20200402", ct="20200402")
    for name, uid in (("ct", "1.2.3.4.60"), ("pt", "1.2.3.4.61")):
        tags = {**day("20200102"), "FrameOfReferenceUID": frame, "SeriesNumber": 9}
        write_series(tmp_path / "2" / name, name.upper(), uid=uid, tags=tags)
    first, second = find_examinations(tmp_path)
    assert (first.name, second.name) == ("ID-4711", "ID-4711_2")
    assert {first.choice.ct.number, first.choice.pet.number} == {9}, "the earlier day is the first"
    assert (second.choice.ct.number, second.choice.pet.number) == (2, 1)


def test_scans_of_one_day_go_together(tmp_path):
    scans(tmp_path, pt_late="20200402", ct="20200102", pt="20200103", ct_early="20191001")
    [found] = find_examinations(tmp_path)
    assert (found.choice.ct.number, found.choice.pet.number, found.choice.doubts) == (2, 3, ())
    reasons = {series.number: reason for series, reason in found.choice.rejected}
    assert reasons == {1: "of another day than the CTs", 4: "of another day than the PET"}


@pytest.mark.parametrize(("ct", "apart"), [("20200102", 0), ("20200101", 0), ("20191223", 10), ("", 0), ("2020", 0)])
def test_ct_and_pet_of_different_days_are_a_doubt(tmp_path, ct, apart):
    scans(tmp_path, pt="20200102", ct=ct)
    [case] = find_cases(tmp_path, FEATURES)
    told = [doubt for doubt in case[keys.PET].doubts if "days apart" in doubt]
    assert told == (
        [f"CT and PET are {apart} days apart by their dates: are they of one examination?"] if apart else []
    )


@pytest.mark.parametrize(
    ("one", "other", "differ"),
    [
        (("Doe^Jane", "19600101", "F"), ("DOE^JANE^^Dr", "", ""), False),
        (("Doe^Jane", "", ""), ("Doe_Jane", "", "O"), False),
        (("", "", ""), ("Doe^Jane", "19600101", "F"), False),
        (("Doe^Jane", "", ""), ("Miller^Jane", "", ""), False),
        (("Case01", "", ""), ("Case02", "", ""), True),
        (("Doe^Jane", "19600101", "F"), ("Doe^Jane", "19600102", "F"), True),
        (("Doe^Jane", "", "F"), ("Doe^Jane", "", "M"), True),
    ],
)
def test_people_differ(one, other, differ):
    assert bool(people_differ([one, other])) == differ


def test_ct_and_pet_of_different_people_under_one_id_are_refused(tmp_path):
    write_study(tmp_path)
    for path in (tmp_path / "PT").iterdir():
        change(path, PatientBirthDate="19710203")
    [problem] = rows(tmp_path).values()
    assert problem.startswith("CT and PET differ in Patient's Birth Date (0010,0030): of two patients")


def test_people_who_share_an_id_get_no_value_of_its_row(tmp_path, caplog):
    write_study(tmp_path / "in" / "a", "ANON", 1)
    write_study(tmp_path / "in" / "b", "ANON", 2, PatientName="Roe^Richard")
    assert rows(tmp_path / "in") == {"ANON": "", "ANON_2": ""}
    assert "ANON_2: several people have this PatientID, by Patient's Name (0010,0010)" in caplog.text
    (tmp_path / "table.csv").write_text("PatientID,Age\nANON,61\n")
    assert set(map(bool, rows(tmp_path / "in", tmp_path / "table.csv").values())) == {True}


def test_patients_without_an_id_and_with_names_that_meet(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    write_study(tmp_path / "a", "", 1)
    write_study(tmp_path / "b", "", 2, StudyDate="20210102")
    write_study(tmp_path / "c", "X", 3)
    write_study(tmp_path / "d", "X", 4, StudyDate="20210102")
    write_study(tmp_path / "e", "X_2", 5)
    assert rows(tmp_path) == {"unnamed": "", "unnamed_2": "", "X": "", "X_3": "", "X_2": ""}
    assert f"unnamed_2: CT from {tmp_path / 'b' / 'CT'}" in caplog.messages


def test_one_id_in_two_ways_of_writing_unicode_is_one_patient(tmp_path):
    write_study(tmp_path, "M\u00fcller", SpecificCharacterSet="ISO_IR 192")
    for path in (tmp_path / "PT").iterdir():
        change(path, PatientID="Mu\u0308ller")
    assert rows(tmp_path) == {"M\u00fcller": ""}


def test_series_that_are_passed_over_are_told(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    write_study(tmp_path / "a")
    other = {"StudyInstanceUID": "1.2.9", "FrameOfReferenceUID": "1.2.8", "SeriesNumber": 8}
    write_series(tmp_path / "old", uid="1.2.7", tags=other)
    assert rows(tmp_path) == {"ID-4711": ""}
    assert "ID-4711: passed over: series 8 (CT), 12 slices" in caplog.text


# --- images that share a SOP instance UID --------------------------------------------------------------------------
def images(folder):
    return sorted((folder / "CT").iterdir(), key=lambda path: float(pydicom.dcmread(path).ImagePositionPatient[2]))


def test_images_that_share_a_sop_instance_uid_are_all_kept_and_it_is_told(tmp_path):
    write_study(tmp_path)
    one, other = images(tmp_path)[4:6]
    change(other, SOPInstanceUID=pydicom.dcmread(one).SOPInstanceUID)
    choice = choose_pet_ct(find_series(tmp_path))
    assert len(choice.ct) == SLICES and choice.ct.repeated == 0
    assert "2 images with one SOP Instance UID (0008,0018) of several" in choice.describe()


@pytest.mark.parametrize("edit", [{}, {"SeriesDescription": "again"}], ids=["byte_by_byte", "another_description"])
def test_a_copy_is_left_out_and_it_is_told(tmp_path, edit):
    write_study(tmp_path)
    shutil.copytree(tmp_path / "CT", tmp_path / "again")
    for path in (tmp_path / "again").iterdir():
        change(path, **edit)
    found = find_series(tmp_path)
    assert (len(found[0]), found[0].repeated) == (SLICES, SLICES)
    assert found.account == "36 files: 36 in 2 DICOM series (12 repeated)"
    assert "12 files repeated" in choose_pet_ct(found).describe()


@pytest.mark.parametrize("edit", [{"PixelData": b"\1\0" * 30}, {"RescaleIntercept": 5}], ids=["pixels", "rescaling"])
def test_other_values_at_the_same_place_are_refused(tmp_path, edit):
    write_study(tmp_path)
    shutil.copy(images(tmp_path)[4], tmp_path / "CT" / "copy")
    change(tmp_path / "CT" / "copy", **edit)
    with pytest.raises(DicomError, match=r"1 positions hold more than one image, the first at 112.00 mm"):
        choose_pet_ct(find_series(tmp_path))


def test_images_without_a_sop_instance_uid_are_all_kept(tmp_path):
    write_study(tmp_path)
    for path in images(tmp_path):
        change(path, SOPInstanceUID=None)
    assert len(find_series(tmp_path)[0]) == SLICES


# --- no series instance UID ----------------------------------------------------------------------------------------
def test_images_without_a_series_uid_have_a_row_that_says_so(tmp_path):
    write_study(tmp_path / "good", "A", 1)
    write_study(tmp_path / "bad", "B", 2)
    for path in (tmp_path / "bad").rglob("IM*"):
        change(path, SeriesInstanceUID=None)
    problems = rows(tmp_path)
    assert problems["A"] == "" and "24" not in problems["A"]
    assert problems["B"].startswith(
        "IM0000, IM0001, IM0002 and 21 more: no Series Instance UID (0020,000E), which identifies"
    )


@pytest.mark.parametrize("place", ["beside", "in_another_folder"])
def test_slices_without_a_series_uid_may_be_the_scans(tmp_path, place):
    write_study(tmp_path / "a")
    (tmp_path / "b").mkdir()
    for path in images(tmp_path / "a")[-2:]:
        change(path, SeriesInstanceUID=None)
        if place != "beside":
            path.rename(tmp_path / "b" / path.name)
    [problem] = rows(tmp_path).values()
    assert "a damaged file may be a slice of it" in problem and "no Series Instance UID" in problem


# --- links, folders, rubbish ---------------------------------------------------------------------------------------
def test_linked_folders_and_files_are_read_once(tmp_path):
    write_study(tmp_path / "elsewhere" / "a", "A", 1)
    write_study(tmp_path / "elsewhere" / "b", "B", 2)
    source = tmp_path / "in"
    source.mkdir()
    (source / "one").symlink_to(tmp_path / "elsewhere" / "a")
    (source / "again").symlink_to(tmp_path / "elsewhere" / "a")
    (source / "files").mkdir()
    for path in (tmp_path / "elsewhere" / "b").rglob("IM*"):
        (source / "files" / f"{path.parent.name}{path.name}").symlink_to(path)
    found = find_series(source)
    assert [(s.patient_id, len(s), s.repeated) for s in found] == [(p, SLICES, 0) for p in ("A", "B", "A", "B")]
    assert rows(source) == {"A": "", "B": ""}


def test_links_in_a_circle_end(tmp_path):
    write_study(tmp_path / "in" / "a")
    write_study(tmp_path / "b", "NOT-ASKED-FOR", 2)
    for place, target in (("a/up", ".."), ("a/CT/above", tmp_path), ("self", "self"), ("x", "y"), ("y", "x")):
        (tmp_path / "in" / place).symlink_to(target)
    found = find_series(tmp_path / "in")
    assert found.account == "24 files: 24 in 2 DICOM series; 5 circular links, not followed"
    assert rows(tmp_path / "in") == {"ID-4711": ""}


@pytest.mark.parametrize(
    ("link", "failed"),
    [
        pytest.param("P1/CT/IM0012", "P1", id="slice"),
        pytest.param("P1/CT/x.dcm", "P1", id="named_dcm"),
        pytest.param("P1/CT/readme.txt", None, id="text"),
        pytest.param("P3", "P3", id="patient"),
        pytest.param("P1/old", "P1/old", id="study"),
    ],
)
def test_links_to_nothing(tmp_path, link, failed):
    write_study(tmp_path / "P1", "P1", 1)
    write_study(tmp_path / "P2", "P2", 2)
    (tmp_path / link).symlink_to(tmp_path / "gone")
    problems = rows(tmp_path)
    assert set(problems) == {"P1", "P2", *([failed] if failed else [])}
    assert [patient for patient, problem in problems.items() if problem] == ([failed] if failed else [])
    assert failed is None or f"{Path(link).name}: a broken link" in problems[failed]


@pytest.mark.parametrize(
    ("locked", "failed"),
    [
        pytest.param("P3", {"P3"}, id="patient"),
        pytest.param("P1/PT", {"P1", "P1/PT"}, id="pet"),
        pytest.param("lost+found", set(), id="folder_of_the_disk"),
    ],
)
def test_folders_that_cannot_be_read(tmp_path, monkeypatch, locked, failed):
    write_study(tmp_path / "P1", "P1", 1)
    write_study(tmp_path / "P2", "P2", 2)
    (tmp_path / locked).mkdir(exist_ok=True)
    scandir = os.scandir

    def guarded(path):
        if Path(path) == tmp_path / locked:
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", guarded)
    problems = {patient for patient, problem in rows(tmp_path).items() if problem}
    assert problems == failed


def test_a_slice_that_cannot_be_read_fails_its_patient(tmp_path, monkeypatch):
    write_study(tmp_path / "P1", "P1", 1)
    write_study(tmp_path / "P2", "P2", 2)
    opened = Path.open

    def guarded(self, *arguments, **options):
        if self == tmp_path / "P1" / "CT" / "IM0003":
            raise PermissionError(13, "Permission denied", str(self))
        return opened(self, *arguments, **options)

    monkeypatch.setattr(Path, "open", guarded)
    problems = rows(tmp_path)
    assert "IM0003: cannot be read (Permission denied)" in problems["P1"] and problems["P2"] == ""


def test_a_folder_of_empty_files_is_a_patient_lost(tmp_path):
    write_study(tmp_path / "P1", "P1", 1)
    for path in write_study(tmp_path / "P2", "P2", 2).rglob("IM*"):
        path.write_bytes(b"")
    problems = rows(tmp_path)
    assert problems["P1"] == ""
    assert problems["P2"] == "IM0000, IM0001, IM0002 and 21 more: empty; copy it again or remove it"


def test_every_file_is_accounted_for(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    write_study(tmp_path)
    other = slice_dataset(
        "RTSTRUCT", np.zeros((2, 2), np.int16), (0, 0, 0), {"SOPClassUID": "1.2.840.10008.5.1.4.1.1.481.3"}
    )
    other.StudyInstanceUID, other.SeriesInstanceUID, other.SeriesNumber = "1.2.3.4.11", "1.2.77", 5
    other.save_as(tmp_path / "rt.dcm", enforce_file_format=True)
    directory = slice_dataset("CT", np.zeros((2, 2), np.int16), (0, 0, 0), {"SOPClassUID": "1.2.840.10008.1.3.10"})
    del directory.SeriesInstanceUID
    directory.save_as(tmp_path / "DICOMDIR", enforce_file_format=True)
    for name in ("Thumbs.db", "CT/.DS_Store", "CT/._IM0003", "PT/notes.txt"):
        (tmp_path / name).write_bytes(b"\0" * 200)
    assert rows(tmp_path) == {"ID-4711": ""}
    said = [message for message in caplog.messages if " files: " in message]
    assert said == [
        f"{tmp_path.name}: 30 files: 25 in 3 DICOM series, 1 DICOM of no series (DICOMDIR), "
        "4 not DICOM (no ending 2, .txt 1, .db 1)"
    ]
    assert "ID-4711: rejected: series 5 (RTSTRUCT), 1 slice of 2 x 2, 2.00 x 2.50 mm: modality RTSTRUCT" in caplog.text


def test_archives_are_told_and_cost_nobody(tmp_path, caplog):
    write_study(tmp_path / "one")
    for name in ("one.zip", "two/three.TAR", "two/CT.nii.gz"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"PK")
    with caplog.at_level(logging.WARNING):
        found = find_series(tmp_path)
    assert [record.message for record in caplog.records] == [
        "one.zip, three.TAR: archives are not read; unpack those with scans"
    ]
    assert len(found) == 2 and not found.lost


def test_empty_files_of_a_cd_are_no_patient(tmp_path):
    write_study(tmp_path / "DICOM")
    for name in ("LOCKFILE", "VERSION"):
        (tmp_path / name).touch()
    assert rows(tmp_path) == {"ID-4711": ""}


def test_a_patient_id_with_a_backslash_is_shown_as_the_file_has_it(tmp_path):
    write_study(tmp_path, patient=["A", "1"])
    assert rows(tmp_path) == {"A\\1": ""}


def test_nothing_but_rubbish_is_no_patient(tmp_path):
    (tmp_path / "P1").mkdir()
    (tmp_path / "P1" / "CT").write_bytes(b"")
    (tmp_path / "P2").symlink_to("gone")
    with pytest.raises(
        ValueError, match=r"holds no scan: .*2 files: .*2 that cannot be used; P2: a broken link; .*; CT: empty"
    ):
        find_cases(tmp_path, FEATURES)


def test_a_pair_of_folders_takes_each_file_once_and_no_half_of_a_series(tmp_path):
    write_study(tmp_path / "in")
    (tmp_path / "more").mkdir()
    for path in sorted((tmp_path / "in" / "PT").iterdir())[:5]:
        path.rename(tmp_path / "more" / path.name)
    examination = pair_examination(tmp_path / "in", tmp_path / "more")
    assert examination.choice is not None and len(examination.choice.pet) == SLICES
    (tmp_path / "in" / "lost").symlink_to("gone")
    assert "lost: a broken link" in pair_examination(tmp_path / "in", tmp_path / "more").problem


# --- what is shown, and threads ------------------------------------------------------------------------------------
def test_nothing_that_is_shown_identifies_anyone(tmp_path):
    write_study(tmp_path / "a", number=1)
    write_study(tmp_path / "b", number=2, StudyDate="20210102", PatientName="Roe^Richard")
    write_series(tmp_path / "c", tags={"StudyInstanceUID": "1.2.3.4.9", "FrameOfReferenceUID": "1.2.3.4.8"})
    (tmp_path / "c" / "x.dcm").write_bytes(b"")
    found = find_examinations(tmp_path)
    assert len(found) == 2
    series = find_series(tmp_path)
    shown = (
        repr(found)
        + repr(series)
        + repr(series.damaged)
        + series.account
        + repr([case[keys.CT] for case in find_cases(tmp_path)])
    )
    assert not [secret for secret in (*SECRETS, "Roe", "20200102") if secret in shown], shown


def test_settings_of_pydicom_are_restored_whatever_two_threads_do():
    settings, library = pydicom.config.settings, logging.getLogger("pydicom")
    before = settings._reading_validation_mode, settings._writing_validation_mode, library.level, list(warnings.filters)
    entered, left = threading.Event(), threading.Event()

    def other():
        with lenient():
            entered.set()
            left.wait(10)

    thread = threading.Thread(target=other)
    with lenient():
        thread.start()
        assert entered.wait(10)
    inside = settings.reading_validation_mode
    left.set()
    thread.join()
    assert inside == pydicom.config.IGNORE, "the other thread is still inside"
    assert before == (
        settings._reading_validation_mode,
        settings._writing_validation_mode,
        library.level,
        list(warnings.filters),
    )


def test_settings_are_restored_after_an_error():
    before = pydicom.config.settings._reading_validation_mode
    with pytest.raises(KeyError), lenient(), lenient():
        raise KeyError
    assert pydicom.config.settings._reading_validation_mode == before


# --- files that ask for more memory than there is ------------------------------------------------------------------
def deflate(path, padding=0):
    """Write a file with the deflated transfer syntax, with so many zeros more in a private element."""
    dataset = pydicom.dcmread(path)
    if padding:
        block = dataset.private_block(0x0099, "PADDING", create=True)
        block.add_new(1, "OB", bytes(padding))
    dataset.file_meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian
    dataset.save_as(path, implicit_vr=False, little_endian=True)


def test_deflated_files_are_read(tmp_path):
    write_study(tmp_path)
    before = read_series(next(s for s in find_series(tmp_path) if s.modality == "CT"))
    for path in (tmp_path / "CT").iterdir():
        deflate(path)
    after = read_series(next(s for s in find_series(tmp_path) if s.modality == "CT"))
    assert np.array_equal(before[0], after[0])


@pytest.mark.parametrize("preamble", [True, False])
def test_a_deflated_file_that_grows_beyond_any_image_is_refused(tmp_path, preamble):
    """The patient has a row with the reason, and the others go on."""
    write_study(tmp_path / "a", "P-1", 1)
    write_study(tmp_path / "b", "P-2", 2)
    bomb = sorted((tmp_path / "a" / "CT").iterdir())[4]
    deflate(bomb, 80 * 2**20)
    assert bomb.stat().st_size < 2**20
    if not preamble:
        without_preamble(bomb)
    tracemalloc.start()
    found = rows(tmp_path)
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found["P-2"] == "" and most < 60 * 2**20
    assert "deflated, and has more than 64 MB inflated" in found["P-1"]


@pytest.mark.parametrize(
    "tags",
    [
        pytest.param({"Rows": 65535, "Columns": 65535}, id="pixels"),
        pytest.param({"NumberOfFrames": 2**31 - 1}, id="frames"),
        pytest.param({"SamplesPerPixel": 3}, id="values_a_pixel"),
    ],
)
def test_compressed_slices_that_ask_for_too_much_are_not_decoded(tmp_path, monkeypatch, tags):
    write_series(tmp_path, syntax=RLELossless)
    for path in tmp_path.iterdir():
        change(path, **tags)
    asked = []
    monkeypatch.setattr(pydicom.Dataset, "pixel_array", property(lambda dataset: asked.append(dataset)))
    (series,) = find_series(tmp_path)
    with pytest.raises(DicomError, match=r"not one grey image of at most|more than any scan has"):
        read_series(series)
    assert asked == []
