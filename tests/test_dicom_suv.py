"""SUV of DICOM PET: the tracer, the moments of injection and scan, sources that disagree; real headers, cases."""

import re
from pathlib import Path

import pytest
from dicom_study import pet_header, write_series

from scripts.dicom_choice import choose_pet_ct
from scripts.dicom_series import find_series
from scripts.dicom_tags import DicomError
from scripts.dicom_tracer import FDG, tracer_of

pydicom = pytest.importorskip("pydicom", reason="DICOM needs pip install pydicom highdicom")
from pydicom.dataset import Dataset  # noqa: E402

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
        pytest.param(coded("C118961", "NCIt", "PSMA-11 Ga^68^"), "the tracer is PSMA", id="psma"),
        pytest.param({"Radiopharmaceutical": None}, "less surely of FDG", id="not_stated"),
        pytest.param({"Radiopharmaceutical": None, "SeriesDescription": "FMISO"}, "less surely", id="hint"),
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
