"""The viewer's page holds the scans where they are, stays small, and takes nothing from a file for markup."""

from __future__ import annotations

import base64
import gzip
import html
import io
import json
import logging
import re
import tarfile
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
from markupsafe import Markup
from report_case import prediction, scans, uncalibrated, without_tasks
from test_outputs import case, result

from scripts import keys
from scripts.imaging.geometry import Grid, resample
from scripts.imaging.lesions import COLOURS
from scripts.prediction import viewer
from scripts.prediction.outputs import PredictionWriter
from scripts.prediction.report import make_report
from scripts.prediction.viewer import (
    CODE,
    LIMIT_BYTES,
    ViewerError,
    ViewerWriter,
    crop,
    packed,
    read_niivue,
    shown_box,
    write_viewer,
)

EVIL = "</script><script>alert('&\"')</script>"


def package(path: Path, code: str = "var niivue = {};", name: str = CODE) -> Path:
    with tarfile.open(path, "w:gz") as file:
        member = tarfile.TarInfo(name)
        member.size = len(code.encode())
        file.addfile(member, io.BytesIO(code.encode()))
    return path


def written(folder: Path, said: dict[str, Any], masked: bool = True) -> str:
    ct, pet, mask = scans()
    return write_viewer(folder, said, ct, pet, mask if masked else None, Markup("code")).read_text(encoding="utf-8")


def data_of(page: str) -> dict[str, Any]:
    (found,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    return json.loads(found)


def decoded(text: str) -> tuple[np.ndarray, Grid, int]:
    image = nibabel.Nifti1Image.from_bytes(gzip.decompress(base64.b64decode(text)))
    array = np.asarray(image.dataobj)
    return array, Grid(array.shape, image.affine), int(image.header["intent_code"])


def test_the_page_says_what_the_prediction_says(tmp_path: Path) -> None:
    page = written(tmp_path, prediction())
    text = " ".join(html.unescape(re.sub(r"<(script|style)\b.*?</\1>|<[^>]*>", " ", page, flags=re.DOTALL)).split())
    for said in (
        *("PET/CT viewer: CHUM-001", prediction()["notice"], "300 digital phantoms, not for clinical use"),
        *("GTVp 12.1 ml SUVmax 14.2", "GTVn 6.2 ml SUVmax 9.0", "WARNINGS (1 of 2 checks passed)", "niivue"),
        "pictures of the largest lesions instead",
    ):
        assert said in text
    assert [path.name for path in tmp_path.iterdir()] == ["viewer.html"]
    assert page.count('class="tiles"') == 2
    assert json.loads(re.findall(r'data-centre="([^"]*)"', page)[1]) == [-48.0, 116.0, 116.0]


def test_the_volumes_are_the_scans_in_their_places(tmp_path: Path) -> None:
    data = data_of(written(tmp_path, prediction()))
    (ct, ct_grid), (pet, pet_grid), (mask, mask_grid) = scans()
    shown = {name: decoded(text) for name, text in data["volumes"].items()}
    assert data["colours"] == [list(COLOURS["GTVp"]), list(COLOURS["GTVn"])]
    assert data["start"] == [-84.0, 92.0, 76.0]
    assert shown["mask"][2] == 1002, "labels"
    for name, scan, grid, mode, within in (
        ("ct", ct, ct_grid, "nearest", 1.0),
        ("pet", pet, pet_grid, "linear", 0.02),
        ("mask", mask, mask_grid, "nearest", 0.0),
    ):
        array, place, _ = shown[name]
        np.testing.assert_allclose(array, resample(scan, grid, place, mode), atol=within + 1e-4, err_msg=name)
    assert sorted(np.unique(shown["mask"][0])) == [0, 1, 2]
    assert shown["pet"][1].spacing.tolist() == pytest.approx([2.0] * 3)


def test_nothing_from_a_file_becomes_markup_and_nothing_is_fetched(tmp_path: Path) -> None:
    said = prediction(patient_id=EVIL)
    said["tumour"]["lesion_list"][0]["name"] = EVIL
    said["model"]["trained_on"] = EVIL
    said["quality"]["checks"][0].update(message=EVIL, verdict="warn")
    page = written(tmp_path, said)
    assert "<script>alert" not in page
    assert page.count("<script") == page.count("</script>") == 3
    assert all(address.startswith("data:") for address in re.findall(r'(?:src|href)="([^"]*)"', page))
    assert "default-src 'none'" in page


@pytest.mark.parametrize(
    ("said", "masked", "lesions"),
    [
        pytest.param(uncalibrated(), True, 0, id="no lesion"),
        pytest.param(without_tasks(), False, 0, id="no segmentation"),
        pytest.param(prediction(), True, 2, id="two lesions"),
    ],
)
def test_patients_without_a_lesion_have_a_viewer(tmp_path: Path, said, masked, lesions) -> None:
    page = written(tmp_path, said, masked)
    assert page.count('class="lesion" data-group') == lesions
    assert ("mask" in data_of(page)["volumes"]) == masked
    assert ("No lesion." in page) == (lesions == 0)


def cube(edge_mm: float, spacing: float = 1.0) -> Grid:
    return Grid((round(edge_mm / spacing),) * 3, np.diag([spacing, spacing, spacing, 1.0]))


def marked(grid: Grid, *places: tuple[int, int, int]) -> np.ndarray:
    mask = np.zeros(grid.shape, dtype=np.uint8)
    for place in places:
        mask[place] = 1
    return mask


@pytest.mark.parametrize(
    ("places", "box"),
    [
        pytest.param([], [[30.0] * 3, [270.0] * 3], id="no tumour: the middle of the CT"),
        pytest.param([(75, 75, 75)], [[31.0] * 3, [271.0] * 3], id="240 mm around a tumour"),
        pytest.param([(10, 75, 75)], [[-1.0, 31.0, 31.0], [141.0, 271.0, 271.0]], id="not beyond the CT"),
        pytest.param(
            [(75, 75, 12), (75, 75, 137)], [[31.0, 31.0, 3.0], [271.0, 271.0, 295.0]], id="all lesions and a margin"
        ),
    ],
)
def test_the_box_holds_the_tumour(places, box) -> None:
    grid = cube(300.0, 2.0)
    found = shown_box(grid, (marked(grid, *places), grid) if places else None)
    np.testing.assert_allclose(found, box, atol=1.0)


def test_a_scan_beside_the_box_is_one_voxel() -> None:
    array, grid = crop(np.arange(8).reshape(2, 2, 2), cube(2.0), np.array([[50.0] * 3, [60.0] * 3]))
    assert array.tolist() == [[[7]]]
    assert grid.centre.tolist() == [1.0, 1.0, 1.0]


@pytest.mark.parametrize(
    ("most", "spacing"),
    [
        pytest.param(10**6, 1.0, id="its own voxels"),
        pytest.param(10_000, 2.0, id="the first that is small enough"),
        pytest.param(3_000, 4.0, id="the last"),
    ],
)
def test_a_scan_that_is_too_large_gets_larger_voxels(most, spacing) -> None:
    noise = np.random.default_rng(0).normal(0.0, 15.0, (40, 40, 40)).astype(np.float32)
    box = cube(40.0).bounds
    voxels = [None, np.full(3, 1.5), np.full(3, 2.0), np.full(3, 4.0)]
    text = packed((noise, cube(40.0)), box, 2.0, most, voxels, 0.0)
    assert len(text) <= most
    array, grid, _ = decoded(text)
    assert grid.spacing.tolist() == pytest.approx([spacing] * 3)
    np.testing.assert_allclose(grid.bounds, box, atol=1.0)
    assert array.std() > 1.0


def test_a_scan_without_room_is_an_error() -> None:
    noise = np.random.default_rng(0).normal(0.0, 15.0, (40, 40, 40)).astype(np.float32)
    with pytest.raises(ViewerError, match="no room in a page of 8 MB"):
        packed((noise, cube(40.0)), cube(40.0).bounds, 2.0, 100, [None, np.full(3, 4.0)], 0.0)


def test_a_large_scan_stays_below_the_limit(tmp_path: Path) -> None:
    shape = (300, 300, 120)
    noise = np.random.default_rng(0).integers(-200, 200, shape, dtype=np.int16)
    grid = Grid(shape, np.diag([-1.0, 1.0, 2.0, 1.0]))
    ct, pet = (
        (noise, grid),
        (np.abs(noise[::2, ::2]).astype(np.float32), grid.crop((slice(0, 300),) * 2 + (slice(0, 120),), (2, 2, 1))),
    )
    path = write_viewer(tmp_path, without_tasks(), ct, pet, None, Markup("x" * 2_300_000))
    assert path.stat().st_size < LIMIT_BYTES
    assert decoded(data_of(path.read_text())["volumes"]["ct"])[1].spacing[0] <= 2.5


def test_damaged_values_and_large_ones_are_written() -> None:
    values = np.array([[[np.nan, np.inf, 1000.0, 1.0]]], dtype=np.float32)
    grid = Grid(values.shape, np.eye(4))
    array, _, _ = decoded(packed((values, grid), grid.bounds, 0.02, 10**6, [None], 0.0))
    np.testing.assert_allclose(array, [[[0.0, 0.0, 1000.0, 1.0]]], atol=0.02)


def test_the_code_of_the_viewer_cannot_end_its_script(tmp_path: Path) -> None:
    code = read_niivue(package(tmp_path / "niivue.tgz", "a = '</script><!--<SCRIPT>' ; b < c"))
    assert code == r"a = '\x3c/script>\x3c!--\x3cSCRIPT>' ; b < c"


@pytest.mark.parametrize("content", ["absent", "no archive", "another package"])
def test_where_niivue_is_not_the_way_to_it_is_told(tmp_path: Path, content: str) -> None:
    path = tmp_path / "niivue.tgz"
    if content == "no archive":
        path.write_text("x")
    if content == "another package":
        package(path, name="package/index.js")
    with pytest.raises(ViewerError, match=r"npm pack @niivue/niivue@[\d.]+; then give its path"):
        read_niivue(path)


def test_without_niivue_the_prediction_is_written_and_one_line_says_why(tmp_path: Path, caplog) -> None:
    with caplog.at_level(logging.WARNING):
        writer = PredictionWriter(str(tmp_path), [case()], viewer=str(tmp_path / "absent.tgz"))
    assert [message.startswith("no viewer.html: niivue cannot be read from") for message in caplog.messages] == [True]
    assert writer.write_patient(result())["files"] == {"mask": "CHUM-001__tumour.nii.gz"}
    assert writer.rows["CHUM-001"]["status"] == "ok"
    assert not writer.problems


def test_the_writer_names_the_viewer(tmp_path: Path) -> None:
    (ct, grid), _, (mask, _) = scans()
    patient, unknown = prediction()["patient_id"], {"survival": None, "values": [], "known": 0, "summary": ""}
    writer = PredictionWriter(str(tmp_path), [case(patient)], viewer=str(package(tmp_path / "niivue.tgz")))
    volumes = {
        key: viewer_tensor(array, grid)
        for key, array in ((keys.CT, ct), (keys.PET, np.ones(grid.shape, dtype=np.float32)), (keys.PRED, mask))
    }
    said = writer.write_patient(
        {**result(patient, mask=False), keys.PREDICTION: prediction(clinical_model=unknown), **volumes}
    )
    assert said["files"]["viewer"] == "viewer.html"
    assert "PET/CT viewer: CHUM-001" in (tmp_path / patient / "viewer.html").read_text()
    assert isinstance(writer.products["viewer"], ViewerWriter)


def viewer_tensor(array: np.ndarray, grid: Grid) -> Any:
    import torch
    from monai.data import MetaTensor

    return MetaTensor(torch.from_numpy(np.ascontiguousarray(array))[None], affine=torch.from_numpy(grid.affine))


@pytest.mark.parametrize("files", [{"mask": None}, {"mask": None, "viewer": "viewer.html"}])
def test_the_report_leads_to_the_viewer(files: dict[str, Any]) -> None:
    ct, pet, mask = scans()
    assert make_report(prediction(files=files), ct, pet, mask, None, []).viewer == files.get("viewer")


def test_the_limits_fit(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setattr(viewer, "LIMIT_BYTES", 1_000)
    with pytest.raises(ViewerError, match="8 MB"):
        written(tmp_path, prediction())
    assert not list(tmp_path.iterdir())
