"""The report says all that the prediction says, names what is missing, and is one self-contained page."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pypdf import PdfReader
from report_case import prediction, scans, uncalibrated, without_tasks

from scripts import keys
from scripts.imaging.geometry import Grid
from scripts.prediction.explain import Explanation
from scripts.prediction.findings import (
    FORCED,
    NO_TUMOUR,
    key_results,
    notice_of,
    page_verdict,
    quality_problems,
    quality_section,
    sections_of,
    survival_section,
    warnings_of,
)
from scripts.prediction.outputs import folder_name
from scripts.prediction.report import ReportWriter, class_masks, lesion_rows, write_report
from scripts.prediction.summary import SummaryError, write_summary

NOTICE = "Research use only. Not a medical device; not for clinical decisions."


def words(page: Path) -> str:
    """The text of a page, pictures, style and markup aside."""
    body = re.sub(r"<(style|script)>.*?</\1>", " ", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    return " ".join(html.unescape(re.sub(r"<[^>]*>", " ", body)).split())


def pdf_words(path: Path) -> str:
    reader = PdfReader(path)
    assert len(reader.pages) == 2
    for page in reader.pages:
        assert [round(float(edge) * 25.4 / 72) for edge in page.mediabox[2:]] == [210, 297]
        footer = " ".join(page.extract_text().split())[-260:]
        assert re.search(r"PET/CT report: .* \| Research use only.*page [12] of 2$", footer), footer
    return " ".join(" ".join(page.extract_text() for page in reader.pages).split())


def written(folder: Path, said: dict[str, Any], masked: bool = True, explanation: Any = None) -> tuple[str, str]:
    ct, pet, mask = scans()
    page, sheet = write_report(folder, said, ct, pet, mask if masked else None, explanation)
    assert sorted(path.name for path in folder.iterdir()) == ["report.html", "report.pdf"], "nothing else is left over"
    return words(page), pdf_words(sheet)


def explanation(tumour: bool = True) -> Explanation:
    image = np.zeros((2, 16, 16, 16), dtype=np.float32)
    image[0, 2, 2, 2], image[1, 8, 8, 8] = -0.1, 0.5
    inside = np.zeros((16, 16, 16), dtype=bool)
    inside[8, 8, 8] = True
    grid = Grid((16, 16, 16), np.diag([10.0, 10.0, 10.0, 1.0]))
    clinical = [("age", 61.0, 0.3), ("tobacco", 0.0, 0.0)]
    return Explanation("P", 1.0, 0.3, image, clinical, inside if tumour else None, grid, 8, 1, 0.1)


EVERYTHING = (
    *(NOTICE, "300 digital phantoms, not for clinical use", "CHUM-001"),
    *("risk group high", "higher than in 81 % of the training cases"),
    *("recurrence-free at 3 years", "72 %", "no confidence interval: 66 to 79 %", "It is not a confidence interval"),
    "Recurrence, a death without one, and the day from which time is counted are defined as in the training data",
    *("5 years not given: beyond the follow-up", "0.83 ± 0.21 over 5 folds"),
    *("probability of HPV 0.73 ± 0.06 over 5 folds", "threshold 0.55", "class positive"),
    "read from PET/CT and clinical values (2 of 3 known)",
    *(
        "GTVp (primary tumour): 12.1 ml, SUVmax 14.2",
        "GTVn (lymph node): 6.2 ml, SUVmax 9.0",
        "lesions 2",
        "volume 18.3 ml",
        "SUVmax 14.2",
        "SUVmean 7.3",
        "MTV 9.8 ml",
        "TLG 93 g",
    ),
    *("41 % of the lesion's SUVmax", "Age 61 years", "Gender male", "missing Tobacco Consumption"),
    *("WARNINGS (1 of 2 checks passed)", "warning: ct slice CT slice spacing: 6 mm: beyond the training range"),
    *(
        "Outlines (with white rims): predicted primary tumour (red) and lymph node (blue)",
        "CT window -160 to 240 HU",
        "PET window 0 to 12 SUV",
    ),
    *("Network 0.2.0, 5 folds", "below the brain in the PET", "in 12.7 s", "2026-11-23T09:00:00+00:00"),
)


def test_everything_is_said(tmp_path: Path) -> None:
    page, sheet = written(tmp_path, prediction())
    for said in EVERYTHING:
        assert said in page
        assert said in sheet
    assert "ab12" * 16 in page
    assert "ab12" * 16 in sheet.replace(" ", ""), "broken over two lines"
    for text in (page, sheet):
        assert "overlap is fine" not in text, "checks that are passed are only counted"
        assert FORCED not in text


def test_what_is_not_known_is_said_with_its_reason(tmp_path: Path) -> None:
    for text in written(tmp_path, uncalibrated()):
        assert "Not available: no calibration was stored." in text
        assert "Not available: no threshold was stored." in text
        assert "risk group not available" in text
        assert "class not available" in text
        assert "no tumour found" in text
        assert NO_TUMOUR in text, "among the warnings"
        assert "SUVmax" not in text
        assert "None" not in text
        assert "nan" not in text.split()


def test_tasks_that_a_model_has_not(tmp_path: Path) -> None:
    for text in written(tmp_path, without_tasks(), masked=False):
        assert text.count("not a task of this model") == 3
        assert "this model reads images alone" in text
        assert "not available: the scans were not checked" in text
        assert "no tumour outlined" in text
        assert NOTICE in text


@pytest.mark.parametrize(
    "patient, shown",
    [
        pytest.param("\u738b\u660e-7", r"\u738b\u660e-7", id="letters_that_the_font_lacks"),
        pytest.param("\u041f\u0451\u0442\u0440-7", "\u041f\u0451\u0442\u0440-7", id="cyrillic"),
        pytest.param("**b** <b>x</b>", "**b** <b>x</b>", id="markup"),
    ],
)
def test_no_letter_of_an_id_is_lost_on_paper(patient, shown, tmp_path: Path) -> None:
    _, sheet = written(tmp_path, prediction() | {"patient_id": patient})
    assert f"PET/CT report: {shown}" in sheet


def test_forced_predictions_are_loud(tmp_path: Path) -> None:
    said = prediction()
    said["quality"].update(verdict="reject", forced=True)
    for text in written(tmp_path, said):
        assert FORCED in text
        assert "REJECTED, prediction FORCED" in text
    assert warnings_of(said)[0] == FORCED


def voxel_check(name: str, value: float, verdict: str = "warn") -> dict[str, Any]:
    limit = "at least 6.3 and at most 6.9 mm"
    return {"name": name, "value": value, "unit": "mm", "limit": limit, "verdict": verdict, "message": f"size {value}"}


@pytest.mark.parametrize(
    ("checks", "verdict", "shown", "warnings", "remarks"),
    [
        pytest.param([("ct_slice", 3.0)], "warn", "ok", 0, 1, id="a slice of 3 mm is ordinary"),
        pytest.param([("ct_in_plane", 0.98), ("pet_slice", 3.27)], "warn", "ok", 0, 2, id="so are pixels of 1 mm"),
        pytest.param([("ct_slice", 1.0), ("ct_slice", 5.0)], "warn", "ok", 0, 2, id="so are slices of 1 and 5 mm"),
        pytest.param([("ct_slice", 6.0)], "warn", "warn", 1, 0, id="a slice of 6 mm is not"),
        pytest.param([("ct_slice", 3.0), ("overlap", 40.0)], "warn", "warn", 1, 1, id="other checks warn as before"),
        pytest.param([("ct_slice", 3.0)], "reject", "reject", 0, 1, id="a rejected case stays rejected"),
    ],
)
def test_ordinary_voxel_sizes_are_a_remark_and_no_warning(checks, verdict, shown, warnings, remarks) -> None:
    quality = {"verdict": verdict, "forced": False, "checks": [voxel_check(*check) for check in checks]}
    assert page_verdict(quality) == shown
    assert len(quality_problems(quality)) == warnings
    rows = quality_section(quality).rows
    assert sum(name.startswith("remark: ") for name, _ in rows) == remarks
    assert len(rows) == 1 + len(checks), "all are listed"


def test_a_rejected_voxel_size_is_no_remark() -> None:
    quality = {"verdict": "reject", "forced": True, "checks": [voxel_check("ct_slice", 3.0, "reject")]}
    assert quality_problems(quality) == ["rejected: size 3.0"]


def test_the_largest_four_lesions_have_pictures_and_the_others_are_told() -> None:
    ct, pet, mask = scans()
    lesion = prediction()["tumour"]["lesion_list"][0]
    rows = lesion_rows(ct, pet, class_masks(mask, ["GTVp", "GTVn"]), [{**lesion, "name": f"L{k}"} for k in range(6)])
    assert [row.title.split(" ")[0] for row in rows] == ["L0", "L1", "L2", "L3"]
    assert rows[-1].title.endswith("(no pictures of 2 more: see the table of lesions)")
    assert {len(row.tiles) for row in rows} == {5}


def test_a_mask_has_the_classes_that_are_in_it() -> None:
    _, _, (mask, grid) = scans()
    assert list(class_masks((mask, grid), ["GTVp", "GTVn"])) == ["GTVp", "GTVn"]
    assert list(class_masks((mask == 2, grid), ["GTV"])) == ["GTV"]
    assert list(class_masks((np.zeros_like(mask), grid), ["GTVp", "GTVn"])) == ["GTVp"]


@pytest.mark.parametrize(
    ("folds", "at_risk", "row"),
    [
        pytest.param(5, 96, ["1 year", "91 %", "88 to 93 %", "96"], id="several folds"),
        pytest.param(5, None, ["1 year", "91 %", "88 to 93 %", "\u2013"], id="the number at risk is not known"),
        pytest.param(1, 96, ["1 year", "91 %", "96"], id="one fold has no range"),
    ],
)
def test_survival_is_given_with_the_range_of_the_folds_and_the_number_at_risk(folds, at_risk, row) -> None:
    survival = prediction()["survival"]
    survival["log_hazard_folds"] = [0.5] * folds
    survival["recurrence_free_survival"][0]["at_risk"] = at_risk
    table = survival_section(survival).table
    assert table is not None
    assert table[1][0] == row


MERGED = [{"label": "GTV"}] * 2
NODES = [{"label": "GTVn"}] * 2


@pytest.mark.parametrize(
    ("part", "changes", "shown"),
    [
        pytest.param("hpv", {}, "positive: probability 0.73 \u00b1 0.06 over 5 folds; positive above 0.55", id="hpv"),
        pytest.param(
            "hpv", {"probability_folds": [0.7]}, "positive: probability 0.73; positive above 0.55", id="one fold"
        ),
        pytest.param(
            "hpv",
            {"threshold": None, "positive": None},
            "not available: probability 0.73 \u00b1 0.06 over 5 folds",
            id="no threshold",
        ),
        pytest.param("tumour", {}, "18.3 ml: 1 primary tumour, 1 lymph node, SUVmax 14.2", id="both classes"),
        pytest.param(
            "tumour", {"lesion_list": NODES}, "18.3 ml: no primary tumour, 2 lymph nodes, SUVmax 14.2", id="nodes"
        ),
        pytest.param("tumour", {"lesion_list": MERGED}, "18.3 ml: 2 lesions, SUVmax 14.2", id="not told apart"),
        pytest.param("tumour", {"lesion_list": [], "lesions": 1}, "18.3 ml: 1 lesion, SUVmax 14.2", id="no list"),
        pytest.param("tumour", {"lesion_list": [], "lesions": 0}, "18.3 ml: no lesion", id="no lesion"),
    ],
)
def test_the_main_results_are_called_predicted_and_say_what_they_mean(part, changes, shown) -> None:
    said = prediction()
    said[part].update(changes)
    names = {"hpv": "predicted HPV status", "tumour": "tumour and lymph nodes"}
    [result] = [result for result in key_results(said) if result[0] == names[part]]
    assert f"{result[1]}: {result[2]}" == shown


def test_doubts_are_loud() -> None:
    said = prediction()
    said["survival"]["doubt"] = "the slope is zero"
    said["crop"]["flag"] = "no brain"
    loud = [text for section in sections_of(said) for text in section.loud]
    assert loud == ["In doubt: the slope is zero", "Position of this region in doubt: no brain"]


def test_a_model_that_does_not_say_what_it_was_trained_on() -> None:
    said = prediction()
    said["model"]["trained_on"] = ""
    assert notice_of(said) == f"{NOTICE} The model was trained on: not recorded."


def test_texts_from_files_stay_text(tmp_path: Path) -> None:
    evil = "<script>alert('&')</script> $x_1$ \\frac"
    said = prediction(patient_id=evil)
    said["quality"]["checks"][1]["message"] = evil
    said["crop"]["flag"] = evil
    said["tumour"]["lesion_list"][0]["name"] = evil
    page, sheet = written(tmp_path, said)
    assert page.count(evil) == 7  # title of the document, heading, lesion, warning, table of lesions, check, flag
    assert sheet.replace(" ", "").count(evil.replace(" ", "")) == 6 + 2  # at the foot of both pages
    assert "<script" not in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_the_page_holds_all_it_shows(tmp_path: Path) -> None:
    written(tmp_path, prediction())
    source = (tmp_path / "report.html").read_text(encoding="utf-8")
    addresses = re.findall(r'(?:src|href)="([^"]*)"', source)
    assert len(addresses) == 2 * 5 + 2 + 1, "planes of two lesions, projections, the curve"
    assert all(address.startswith("data:image/png;base64,") for address in addresses)
    assert "url(" not in source
    assert "http" not in source


def test_a_long_list_of_warnings_stays_on_one_page_and_what_is_cut_is_said(tmp_path: Path) -> None:
    said = prediction(patient_id="LONG-" * 60)
    warning = said["quality"]["checks"][1]
    said["quality"]["checks"] = [{**warning, "message": f"warning {k} " + "and so on " * 15} for k in range(60)]
    page, sheet = written(tmp_path, said)
    assert "warning 59 and so on" in page
    assert "warning 0 and so on" in sheet
    assert "warning 59 and" not in sheet
    assert re.search(r"\d+ more: see report.html", sheet)
    assert "Network 0.2.0" in sheet, "the quality of the scans comes last"


def test_the_explanation_is_shown(tmp_path: Path) -> None:
    for text in written(tmp_path, prediction(), explanation=explanation()):
        assert "images: CT -0.100" in text
        assert "images: PET +0.500" in text
        assert "images: tumour +0.500; 83 % of all that" in text
        assert "Age +0.300" in text
        assert "missing values 0 (Tobacco Consumption)" in text
        assert "no statement about causes" in text
        assert "red raised the computed risk" in text


def test_an_explanation_without_a_tumour(tmp_path: Path) -> None:
    for text in written(tmp_path, without_tasks(), masked=False, explanation=explanation(tumour=False)):
        assert "images: tumour not available: segmentation is not a task of this model" in text


# --- the handler ------------------------------------------------------------------------------------------------


def result(said: dict[str, Any]) -> dict[str, Any]:
    from monai.data import MetaTensor

    items = {}
    for key, (array, grid) in zip((keys.CT, keys.PET, keys.PRED), scans(), strict=True):
        items[key] = MetaTensor(array[None].copy(), affine=grid.affine)
    return {**items, keys.PREDICTION: said}


def test_the_writer_is_a_product(tmp_path: Path) -> None:
    item = result(prediction())
    ct = item.pop(keys.CT)
    case = {
        keys.PATIENT_ID: "CHUM-001",
        keys.CT: (np.asarray(ct[0]), np.asarray(ct.affine)),
    }  # read again for the report
    writer = ReportWriter(str(tmp_path))
    written = dict(writer(case, item, tmp_path / "CHUM-001"))
    assert written == {"report": "report.html", "report_pdf": "report.pdf"}
    assert "risk group high" in words(tmp_path / "CHUM-001" / "report.html")


def test_the_writer_explains(tmp_path: Path) -> None:
    case = {keys.PATIENT_ID: "CHUM-001"}
    writer = ReportWriter(str(tmp_path), lambda item: explanation())  # type: ignore[arg-type]
    files = dict(writer(case, result(prediction()), tmp_path))
    assert files["explanation"] == "explanation.json"
    assert json.loads((tmp_path / "explanation.json").read_text())["image"]["inside"] == pytest.approx(0.5)
    assert "What moved the risk" in words(tmp_path / "report.html")


# --- the cohort -------------------------------------------------------------------------------------------------


@pytest.fixture
def cohort(tmp_path: Path) -> Iterator[Path]:
    """Three predicted patients, one of them forced and one without calibration, and one that failed."""
    forced = prediction(patient_id="B & <b>")
    forced["quality"].update(verdict="reject", forced=True)
    bare = {**uncalibrated(), "patient_id": "C-3"}
    for said in (prediction(patient_id="A-1"), forced, bare):
        folder = tmp_path / folder_name(said["patient_id"])
        folder.mkdir()
        (folder / "prediction.json").write_text(json.dumps(said))
        (folder / "report.html").write_text("a report")
    (tmp_path / "C-3" / "report.html").unlink()
    rows = [
        "PatientID,status,reason",
        "A-1,ok,",
        "B & <b>,ok,",
        "C-3,incomplete,no row; no report: no space left",
        "D-4,failed,PET is missing",
    ]
    (tmp_path / "predictions.csv").write_text("\n".join(rows) + "\n")
    yield tmp_path


def test_the_page_of_a_cohort(cohort: Path) -> None:
    page = write_summary(cohort)
    assert page == cohort / "index.html"
    text, source = words(page), page.read_text(encoding="utf-8")
    for said in (
        *("Predictions of 4 patients", NOTICE, "trained on: 300 digital phantoms, not for clinical use"),
        *("4 (2 ok, 1 incomplete, 1 failed)", "2 high", "2 positive, 0 negative, 1 without a class"),
        *("incomplete: no row; no report: no space left", "failed: PET is missing"),
        *("warning: CT slice spacing: 6 mm", "1 patient: B & <b>", FORCED, "reject (forced)"),
    ):
        assert said in text
    assert re.findall(r'href="([^"]*)"', source) == ["B_b/report.html", "A-1/report.html", "predictions.csv"]
    names = re.findall(r"<td>(?:<a[^>]*>)?([^<]*)(?:</a>)?</td>\s*<td>(?:ok|incomplete|failed)</td>", source)
    assert [html.unescape(name) for name in names] == ["D-4", "C-3", "B & <b>", "A-1"], "failed and doubtful ones first"
    assert "http" not in source
    assert source.count("<script>") == 1
    assert all(address.startswith("data:") for address in re.findall(r'src="([^"]*)"', source))


def test_tables_sort_by_numbers_and_groups(cohort: Path) -> None:
    source = write_summary(cohort).read_text(encoding="utf-8")
    assert '<td data-sort="81.2">81</td>' in source
    assert '<td data-sort="2">high</td>' in source
    assert '<td data-sort="">\u2013</td>' in source


def test_a_cohort_of_failures(tmp_path: Path) -> None:
    (tmp_path / "predictions.csv").write_text("PatientID,status,reason\nA,failed,no CT\n")
    text = words(write_summary(tmp_path))
    assert "Predictions of 1 patient" in text
    assert "failed: no CT" in text
    assert "risk groups not available: no prediction" in text


def test_no_predictions(tmp_path: Path) -> None:
    with pytest.raises(SummaryError, match=r"holds no predictions\.csv: predict some patients first"):
        write_summary(tmp_path)
