"""The measurement of localisation: its scenes are what they say, and its table counts right."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pytest

import phantom
from research import measure_localisation as measuring
from scripts.imaging.geometry import Grid
from scripts.imaging.localise import Anchor, Candidate


@pytest.fixture(autouse=True)
def coarse_voxels(monkeypatch):
    """Phantoms in voxels of 8 mm: quick to draw."""
    monkeypatch.setattr(measuring, "CT_MM", 8.0)
    monkeypatch.setattr(measuring, "PET_MM", 8.0)


def scene(name: str, index: int = 0) -> measuring.Scene:
    return measuring.draw_scene(measuring.SCENARIOS[name], phantom.draw_patient(0, index), 0, index)


def centre_of_mass(mask: np.ndarray, grid: Grid) -> np.ndarray:
    return grid.to_world(np.argwhere(mask)).mean(axis=0)


@pytest.mark.parametrize("name", ["head_at_low_index", "axes_permuted", "oblique"])
def test_another_array_is_the_same_patient(name):
    """However the voxels lie, the tumour and the hottest PET voxels stay where they are in the world."""
    plain, other = scene("native"), scene(name)
    assert not np.allclose(plain.ct_grid.affine, other.ct_grid.affine)
    found, expected = centre_of_mass(other.mask, other.ct_grid), centre_of_mass(plain.mask, plain.ct_grid)
    np.testing.assert_allclose(found, expected, atol=3)
    hot, plain_hot = centre_of_mass(other.pet > 5, other.pet_grid), centre_of_mass(plain.pet > 5, plain.pet_grid)
    np.testing.assert_allclose(hot, plain_hot, atol=8)


@pytest.mark.parametrize(
    ("name", "ct_mm", "pet_mm"),
    [
        ("whole_body", 1130, 1130),
        ("arms_up", 1300, 1300),
        ("short_field_of_view", 170, 170),
        ("long_pet_short_ct", 220, 1130),
        ("long_ct_short_pet", 1130, 220),
    ],
)
def test_scans_are_as_long_as_said(name, ct_mm, pet_mm):
    drawn = scene(name)
    assert drawn.ct_grid.extent[2] == pytest.approx(ct_mm, rel=0.12)
    assert drawn.pet_grid.extent[2] == pytest.approx(pet_mm, rel=0.12)
    assert drawn.mask.any()


def test_faults_are_there():
    assert not scene("blank_pet").pet.any()
    assert scene("injection_site_up").pet.max() > 100
    assert scene("injection_site_down").pet.max() > 100
    assert scene("whole_body").pet.max() < 60
    plain, cold = scene("native"), scene("no_brain_uptake")
    assert (cold.pet > 5).sum() < 0.2 * (plain.pet > 5).sum()
    arms = scene("arms_up")
    above = arms.ct[:, :, -5:] > -400  # the last 4 cm hold forearms and no head
    assert 0 < above.mean() < 0.2


class FixedPass:
    """Proposes the same candidates for every scan."""

    def __init__(self, candidates):
        self.candidates = candidates

    def __call__(self, *_):
        return self.candidates


def test_every_rule_answers_for_itself():
    drawn = scene("native")
    scans = (drawn.ct, drawn.ct_grid, drawn.pet, drawn.pet_grid)
    seen = [Candidate(np.array([[0.0, 0, 0], [10, 10, 10]]), 5.0, 0.9)]
    found = measuring.answers(scans, FixedPass(seen))
    methods = {rule: answer[0].method for rule, answer in found.items()}
    assert methods == {
        "PET brain": "pet_brain",
        "CT body top": "ct_body_top",
        "scan centre": "scan_centre",
        "network alone": "scan_centre",
        "rules": "pet_brain",
        "rules + network always": "pet_brain",
        "rules + network in doubt": "pet_brain",
    }
    assert [rule for rule, answer in found.items() if answer[1]] == ["network alone", "rules + network always"]
    cut = scene("brain_cut_off")
    in_doubt = measuring.answers((cut.ct, cut.ct_grid, cut.pet, cut.pet_grid), FixedPass(seen))
    assert in_doubt["rules + network in doubt"][1] == seen
    blank = (*scans[:2], 0 * drawn.pet, drawn.pet_grid)
    without = measuring.answers(blank, FixedPass(seen))
    assert without["PET brain"][0] is None
    assert without["network alone"][0] is None
    assert isinstance(without["rules + network in doubt"][0], Anchor)
    assert set(measuring.answers(scans, None)) == {"PET brain", "CT body top", "scan centre", "rules"}


def row(rule="rules", primary=1.0, tumour=1.0, flag="", method="pet_brain", has_primary=True, seconds=1.0):
    return {
        "scenario": "native",
        "crop": "224 mm",
        "rule": rule,
        "primary": primary,
        "tumour": tumour,
        "flag": flag,
        "method": method,
        "has_primary": has_primary,
        "seconds": seconds,
    }


SUMMARIES = [
    pytest.param([row(), row(primary=0.98, tumour=0.9)], (1, 0, 0.98, 0.9), id="one_lost"),
    pytest.param([row(), row(primary=0.995)], (0, 0, 0.995, 1.0), id="less_than_1_percent"),
    pytest.param([row(), row(primary=np.nan, has_primary=False)], (0, 0, 1.0, 1.0), id="no_primary_is_none_lost"),
    pytest.param(
        [row(), row(primary=np.nan, tumour=np.nan, flag="no answer")], (1, 1, 1.0, 1.0), id="no_answer_is_lost"
    ),
]


@pytest.mark.parametrize(("rows", "expected"), SUMMARIES)
def test_summary_counts_what_is_lost(rows, expected):
    (item,) = measuring.summarise(pd.DataFrame(rows))
    assert (item["lost_primary"], item["no_answer"], item["worst_primary"], item["worst_tumour"]) == expected


def test_table_has_a_cell_for_each_rule():
    rows = [row(), row(primary=0.5), row("PET brain", np.nan, np.nan, "no answer"), row("PET brain", np.nan, np.nan)]
    text = measuring.as_markdown(measuring.summarise(pd.DataFrame(rows)))
    assert "| scenario | cases | PET brain | rules |" in text
    assert "| native | 2 | no answer | 50 / 100, 1 |" in text
    assert text.startswith(measuring.NOTICE)


def test_command_writes_what_it_prints(tmp_path, capsys):
    measuring.measure_localisation(out=str(tmp_path), cases_each=1, scenarios="native,blank_pet", jobs=1)
    printed = capsys.readouterr().out
    table = (tmp_path / "localisation.md").read_text()
    assert table in printed
    record = json.loads((tmp_path / "localisation.json").read_text())
    rules = [item for item in record["summary"] if item["rule"] == "rules"]
    assert {(item["scenario"], item["crop"]) for item in rules} == {
        (scenario, crop) for scenario in ("native", "blank_pet") for crop in ("224 mm", "256 mm")
    }
    assert all(item["lost_primary"] == 0 for item in rules)
    cases = pd.read_csv(tmp_path / "cases.csv", keep_default_na=False)
    assert len(cases) == 2 * 2 * 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scenarios": "upside_down"}, "unknown scenario upside_down"),
        ({"cases_each": 0}, "1 or more"),
        ({"checkpoint": "absent.pt"}, "no model at absent.pt"),
    ],
)
def test_refusals_say_what_to_do(tmp_path, options, message):
    with pytest.raises(measuring.MeasureError, match=message):
        measuring.measure_localisation(out=str(tmp_path), **options)
