"""SEG, SR and RTSTRUCT of scans that lack tags; what viewers and renderers need of them."""

from pathlib import Path

import highdicom as hd
import numpy as np
import pydicom
import pytest
import torch
from dicom_study import write_series
from pydicom.config import disable_value_validation
from report_case import prediction, uncalibrated, without_tasks

from scripts import keys
from scripts.dicom.choice import choose_pet_ct
from scripts.dicom.examinations import find_examinations
from scripts.dicom.rtstruct import write_rtstruct
from scripts.dicom.seg import Model, write_seg
from scripts.dicom.series import find_series
from scripts.dicom.sr import Findings, write_sr
from scripts.dicom.tags import DicomError
from scripts.imaging.lesions import find_lesions
from scripts.prediction.dicom_results import FORCED, notes, remarks, write_dicom_results
from scripts.prediction.findings import AS_IN_TRAINING

SHARED = Path(__file__).resolve().parents[2] / "shared" / "cases"
MODEL = Model("multitask", "1.2.3", "maintainers", "sha256:0123456789abcdef", "9 phantoms")
FINDINGS = Findings(
    {"volume_ml": 12.5, "suv_max": 14.25, "lesions": 1}, [{"volume_ml": 12.5, "longest_diameter_mm": 31.0}],
    log_hazard=-0.75, survival={730: 0.81}, hpv_positive=True,
)  # fmt: skip
# What a scanner writes beside the tags of write_series().
SCANNER = {
    **{"SpecificCharacterSet": "ISO_IR 100", "SeriesDate": "20200102", "SeriesTime": "100000", "StudyDescription": "S"},
    **{"AcquisitionDate": "20200102", "AcquisitionTime": "100000", "ContentDate": "20200102", "ContentTime": "100000"},
    **{"PatientAge": "050Y", "PatientWeight": 70, "KVP": 120, "AcquisitionNumber": 1, "SliceLocation": 3},
    **{"SpacingBetweenSlices": 3, "InstitutionName": "X", "ManufacturerModelName": "M", "ConvolutionKernel": "B31f"},
}
# Patient and study in every DICOM object, with an empty value where it is not known (type 2).
EMPTY_OR_NOT = (
    *("PatientName", "PatientID", "PatientBirthDate", "PatientSex", "StudyDate", "StudyTime", "AccessionNumber"),
    *("StudyID", "ReferringPhysicianName"),
)
# Without these there are no slices, no place in space or nothing to refer to.
INDISPENSABLE = {
    **{"SOPClassUID": "not stored as CT", "Modality": "no usable CT", "FrameOfReferenceUID": "none stated"},
    **{"SOPInstanceUID": "CT", "StudyInstanceUID": "Study Instance UID", "SeriesInstanceUID": "no usable CT"},
    **{"ImagePositionPatient": "no position", "ImageOrientationPatient": "no position", "PixelSpacing": "no position"},
    **{"Rows": "no usable CT", "Columns": "no usable CT", "PatientID": "2 patients"},
}


def study(folder):
    """A CT and a PET of one study."""
    write_series(folder / "ct", shape=(8, 6), depths=np.arange(9) * 3.0, tags=SCANNER)
    pet = {"SeriesNumber": 2, "PixelSpacing": [5, 5]}
    write_series(folder / "pet", "PT", uid="1.2.3.4.4", depths=np.arange(9) * 3.0, tags=pet)
    return folder


def change(folder, edit):
    """Change the header of every file."""
    with disable_value_validation():
        for path in sorted(path for path in Path(folder).rglob("*") if path.is_file()):
            dataset = pydicom.dcmread(path)
            edit(dataset)
            dataset.save_as(path)


def without(keyword):
    """An edit that removes a tag."""
    return lambda dataset: dataset.__delitem__(keyword) if keyword in dataset else None


def results(folder, out):
    """SEG, SR and RTSTRUCT of the study in a folder, read back."""
    choice = choose_pet_ct(find_series(folder))
    mask = np.zeros(choice.ct.grid.shape, np.uint8)
    mask[1:4, 2:5, 3:6] = 1
    seg = write_objects(mask, choice, out)
    assert seg.pixel_array.sum() == mask.sum()
    return seg, hd.sr.srread(out / "sr.dcm"), pydicom.dcmread(out / "rtstruct.dcm")


def write_objects(mask, choice, out):
    """All three objects of a mask with one lesion; the SEG, read back."""
    lesions = find_lesions(mask, choice.ct.grid)
    numbers = lesions.on(mask.shape)
    seg = write_seg(out / "seg.dcm", numbers, lesions.found, choice.ct, model=MODEL)
    write_rtstruct(out / "rtstruct.dcm", numbers, lesions.found, choice.ct, model=MODEL)
    write_sr(out / "sr.dcm", FINDINGS, ct=choice.ct, pet=choice.pet, model=MODEL, seg=seg)
    return hd.seg.segread(out / "seg.dcm")


TAGS = sorted(
    {
        *SCANNER,
        *EMPTY_OR_NOT,
        *("ImageType", "SeriesDescription", "Manufacturer", "PatientPosition", "SeriesNumber", "InstanceNumber"),
        *("PositionReferenceIndicator", "Laterality", "SliceThickness", "RescaleSlope", "RescaleIntercept"),
        *("SamplesPerPixel", "PhotometricInterpretation", "BitsAllocated", "BitsStored", "HighBit"),
        *("PixelRepresentation", "SOPClassUID", "SOPInstanceUID", "Modality", "StudyInstanceUID", "SeriesInstanceUID"),
        *("FrameOfReferenceUID", "ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "Rows", "Columns"),
    }
)


def test_the_table_holds_every_tag_of_the_ct(tmp_path):
    header = pydicom.dcmread(next((study(tmp_path) / "ct").iterdir()), stop_before_pixels=True)
    assert {element.keyword for element in header} == set(TAGS)


@pytest.mark.parametrize("keyword", TAGS)
def test_any_tag_of_the_ct_may_be_absent(tmp_path, keyword):
    change(study(tmp_path / "in") / "ct", without(keyword))
    if keyword in INDISPENSABLE:
        with pytest.raises(DicomError, match=INDISPENSABLE[keyword]):
            results(tmp_path / "in", tmp_path)
        return
    for written in results(tmp_path / "in", tmp_path):
        for name in EMPTY_OR_NOT:
            assert name in written, f"{name} is of type 2"
        assert not written.get(keyword) or keyword not in EMPTY_OR_NOT


@pytest.mark.parametrize("keyword", EMPTY_OR_NOT)
def test_tags_of_patient_and_study_may_be_absent_everywhere(tmp_path, keyword):
    change(study(tmp_path / "in"), without(keyword))
    for written in results(tmp_path / "in", tmp_path):
        assert keyword in written and not written[keyword].value


def test_all_tags_of_patient_and_study_may_be_absent_at_once(tmp_path):
    change(
        study(tmp_path / "in"), lambda dataset: [dataset.pop(name, None) for name in (*EMPTY_OR_NOT, "SliceThickness")]
    )
    for written in results(tmp_path / "in", tmp_path):
        assert [written[name].value or None for name in EMPTY_OR_NOT] == [None] * len(EMPTY_OR_NOT)


@pytest.mark.parametrize(
    "tags",
    [
        pytest.param({"PatientBirthDate": "ANONYMIZED"}, id="birth_date"),
        pytest.param({"StudyDate": "0"}, id="study_date"),
        pytest.param({"StudyTime": "REMOVED"}, id="study_time"),
        pytest.param({"PatientSex": "U"}, id="sex"),
        pytest.param({"PatientSex": "REMOVED"}, id="sex_removed"),
        pytest.param({"PatientName": ["A", "B"]}, id="two_names"),
        pytest.param({"AccessionNumber": ["A", "B"]}, id="two_accession_numbers"),
    ],
)
def test_values_that_are_none_of_their_kind_are_emptied(tmp_path, tags):
    change(study(tmp_path / "in"), lambda dataset: [setattr(dataset, name, value) for name, value in tags.items()])
    for written in results(tmp_path / "in", tmp_path):
        assert [str(written[name].value or "") for name in tags] == [""] * len(tags)


@pytest.mark.parametrize("thickness", [None, "", 0, 5])
@pytest.mark.parametrize("spacing", [None, 0, 7])
def test_slices_of_the_segmentation(tmp_path, thickness, spacing):
    def edit(dataset):
        for name, value in (("SliceThickness", thickness), ("SpacingBetweenSlices", spacing)):
            without(name)(dataset)
            if value is not None:
                setattr(dataset, name, value)

    change(study(tmp_path / "in") / "ct", edit)
    seg, _, _ = results(tmp_path / "in", tmp_path)
    [measures] = seg.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence
    assert (measures.SliceThickness, measures.SpacingBetweenSlices) == (thickness or 3, 3)


def test_every_object_has_a_date_of_its_own_series(tmp_path):
    change(study(tmp_path / "in"), without("StudyDate"))
    for written in results(tmp_path / "in", tmp_path):
        assert len(written.SeriesDate) == 8 and len(str(written.SeriesTime).partition(".")[0]) == 6
        assert written.SeriesDate >= "20260101", "today, not the day of the scan"


def test_the_segment_has_a_colour(tmp_path):
    seg, _, _ = results(study(tmp_path / "in"), tmp_path)
    lightness, a, b = seg.SegmentSequence[0].RecommendedDisplayCIELabValue
    assert 0.3 < lightness / 65535 < 0.7, "neither black nor white"
    assert a / 257 - 128 > 40 and b / 257 - 128 > 20, "red"


def containers(item):
    """A container and all below it."""
    inner = [found for child in item.get("ContentSequence", []) for found in containers(child)]
    return [item, *inner] if item.ValueType == "CONTAINER" else inner


def test_items_of_the_report_stand_on_lines_of_their_own(tmp_path):
    results(study(tmp_path / "in"), tmp_path)
    report = pydicom.dcmread(tmp_path / "sr.dcm")
    assert [item.ContinuityOfContent for item in containers(report)] == ["SEPARATE"] * 5
    stated = []
    report.walk(lambda dataset, element: stated.append(dataset) if element.keyword == "ContinuityOfContent" else None)
    assert all(item.ValueType == "CONTAINER" for item in stated) and len(stated) == 5


@pytest.mark.parametrize("name", ["B07", "d0", "d6"])
def test_shared_cases_without_tags(tmp_path, name):
    folder = SHARED / "seg-tags-absent" / name
    if not folder.is_dir():
        pytest.skip("the shared cases are not here")
    [found] = find_examinations(folder)
    write_objects(np.ones(found.choice.ct.grid.shape, np.uint8), found.choice, tmp_path)
    for file in ("seg.dcm", "sr.dcm", "rtstruct.dcm"):
        written = pydicom.dcmread(tmp_path / file)
        assert all(keyword in written for keyword in EMPTY_OR_NOT)


RULE = "Metabolic Volume and Total Lesion Glycolysis: 41 % of the lesion's SUVmax"
RANGE = (
    "Recurrence-free survival, range of 5 folds, no confidence interval: 0.880 to 0.930 at 365 days, 0.770 to 0.860 at "
    "730 days, 0.660 to 0.790 at 1096 days"
)
THRESHOLD = "HPV status is positive above a probability of 0.550"


@pytest.mark.parametrize(
    "said, tumour, predicted",
    [
        pytest.param(
            prediction(), [RULE], [RANGE, AS_IN_TRAINING, f"{THRESHOLD}; of 5 folds 0.700 to 0.700"], id="all"
        ),
        pytest.param(
            prediction(hpv={**prediction()["hpv"], "probability_folds": [0.7]}, survival=None),
            *([RULE], [THRESHOLD]),
            id="one_fold",
        ),
        pytest.param(uncalibrated(), [], [], id="nothing_to_say"),
        pytest.param(without_tasks(), [], [], id="no_tasks"),
    ],
)
def test_the_report_says_how_sure_its_numbers_are_and_how_they_are_defined(said, tumour, predicted):
    assert remarks(said) == {"Tumour": tumour, "Prediction": predicted}


@pytest.mark.parametrize(
    "name, value, verdict, word",
    [
        pytest.param("ct_slice", 3.0, "warn", "remark", id="ordinary_voxel_size"),
        pytest.param("ct_slice", 6.0, "warn", "warning", id="voxel_size"),
        pytest.param("overlap", 40.0, "warn", "warning", id="another_check"),
        pytest.param("overlap", 4.0, "reject", "rejected", id="rejected"),
        pytest.param("overlap", 99.0, "ok", "", id="passed"),
    ],
)
def test_the_report_says_of_the_scans_what_the_page_says(name, value, verdict, word):
    checks = [{"name": name, "value": value, "unit": "", "limit": "", "verdict": verdict, "message": "so it is"}]
    said = notes(prediction(quality={"verdict": verdict, "forced": False, "checks": checks}))
    assert [text for text in said if "so it is" in text] == ([f"Quality control, {word}: so it is"] if word else [])


@pytest.mark.parametrize("forced", [True, False])
def test_the_series_of_a_forced_prediction_say_so(tmp_path, forced):
    choice = choose_pet_ct(find_series(study(tmp_path / "in")))
    mask = torch.zeros(1, *choice.ct.grid.shape, dtype=torch.uint8)
    mask[0, 1:4, 2:5, 3:6] = 1
    said = prediction(quality={"verdict": "reject", "forced": forced, "checks": []})
    said["tumour"]["lesion_list"] = said["tumour"]["lesion_list"][:1]
    result = {keys.PREDICTION: said, keys.PRED: mask}
    written = dict(write_dicom_results({keys.DICOM: choice}, result, tmp_path / "out"))
    assert set(written) == {"dicom_seg", "dicom_rtstruct", "dicom_sr"}
    for name in ("dicom_seg", "dicom_rtstruct"):
        title = pydicom.dcmread(tmp_path / "out" / written[name]).SeriesDescription
        assert (title == FORCED) == forced and "research use only" in title
