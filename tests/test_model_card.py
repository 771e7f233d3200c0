"""The model card: what it says is what metadata, weights and metrics say; what none says is not recorded."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from command_line import UsageError

from conftest import BUNDLE
from runtimes.model_card import card, model_card, plain, results
from scripts.evaluation.case_table import describe_selection
from scripts.prediction.description import Model

CHAI = ("Basic information", "Uses and directions", "Warnings", "Trust ingredients", "Key metrics", "Resources")
METADATA = json.loads((BUNDLE / "configs" / "metadata.json").read_text())
BARE = Model("ab" * 32, 1, ("seg",), (), {})
VALUES = {"release": "research", "contact": "nobody", "results": []}


def test_the_card_of_the_bundle_is_up_to_date(tmp_path):
    model_card(str(tmp_path / "card.md"))
    text = (tmp_path / "card.md").read_text()
    again = "python scripts/runtimes model_card --out bundle/docs/model_card.md"
    assert (BUNDLE / "docs" / "model_card.md").read_text() == text, f"make it again: {again}"
    assert METADATA["version"] in text and "599 digital phantoms" in text
    assert [title for title in CHAI if f"## {title}\n" not in text] == []


def test_every_item_of_tripod_is_answered():
    text = card(METADATA, BARE, VALUES).partition("## TRIPOD+AI")[2]
    rows = [re.fullmatch(r"\| ([\d, ]+) \| (.+) \| (.+) \|", line) for line in text.splitlines()]
    items = [int(item) for row in rows if row for item in row[1].split(", ")]
    assert items == list(range(1, 28))


def test_what_is_not_known_is_said():
    text = card({**METADATA, "eval_metrics": {}}, BARE, VALUES)
    assert "| trained on | not recorded |" in text and "| cases | not recorded (not recorded with mask" in text
    assert "No metrics are recorded." in text and "| HPV threshold | not recorded |" in text
    assert "{{" not in text and "None" not in text


@pytest.mark.parametrize(
    "value, text",
    [
        pytest.param("a | b", "a \\| b", id="cell"),
        pytest.param("<script>\nx", "&lt;script> x", id="markup"),
        pytest.param(None, "not recorded", id="none"),
        pytest.param(0, "0", id="zero"),
        pytest.param(0.123456, "0.1235", id="number"),
    ],
)
def test_values_end_no_cell(value, text):
    assert plain(value) == text


def test_metrics_of_an_evaluation(tmp_path):
    row = {"value": 0.71234, "low": 0.6, "high": 0.8, "patients": 50}
    none = {"value": None, "reason": "no labelled case", "patients": 0}
    pooled = {"held_out": 60, "data": "60 cases", "pooled": {"metrics": {"c_index": row, "dice": none}}}
    other = {"external": {"cases": 20, "data": "another centre", "metrics": {"c_index": row}}}
    path = tmp_path / "metrics.json"
    path.write_text(json.dumps(pooled | other))
    first, second = results({}, {}, str(path))
    assert first["title"] == "Cross-validation: 60 cases of 60 cases" and second["title"].startswith("Other cohort: 20")
    assert first["rows"] == [
        {"name": "C-index", "value": "0.712 [0.600, 0.800]", "patients": 50},
        {"name": "Dice", "value": "none (no labelled case)", "patients": 0},
    ]


@pytest.mark.parametrize(
    ("keep_epoch", "note"),
    [
        pytest.param("best", "The epoch was selected on these cases: the metrics are too optimistic", id="best"),
        pytest.param("last", "", id="last"),
        pytest.param(None, "Whether the epoch was selected on these cases is not recorded", id="not_recorded"),
    ],
)
def test_metrics_of_cases_on_which_the_epoch_was_chosen_say_so(tmp_path, keep_epoch, note):
    row = {"value": 0.7, "low": 0.6, "high": 0.8, "patients": 20}
    fold = {"fold": 0, "cases": {"validation": {"cases": 20}}, "metrics": {"validation": {"c_index": row}}}
    report = {"held_out": 20, "data": "20 cases", "pooled": {"metrics": {"c_index": row}}}
    report["selection"] = describe_selection(keep_epoch, "validation")
    (tmp_path / "metrics.json").write_text(json.dumps(report))
    [of_fold] = results({}, {"keep_epoch": keep_epoch, "folds": [fold]}, None)
    [pooled] = results({}, {}, str(tmp_path / "metrics.json"))
    assert of_fold["note"].startswith(note) and pooled["note"] == of_fold["note"]
    assert bool(of_fold["note"]) == bool(note)
    written = card(METADATA, BARE, {**VALUES, "results": [of_fold]})
    assert (note in written) and ("too optimistic" in written) == bool(note)


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"held_out": 1, "data": "x", "pooled": 3}'])
def test_a_file_without_metrics(content, tmp_path):
    (tmp_path / "metrics.json").write_text(content)
    with pytest.raises(UsageError, match=r"is no metrics\.json of"):
        results({}, {}, str(tmp_path / "metrics.json"))


def test_a_bundle_without_weights(tmp_path):
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "metadata.json").write_text("{}")
    with pytest.raises(FileNotFoundError):
        model_card(str(tmp_path / "card.md"), str(tmp_path))
    assert not Path(tmp_path / "card.md").exists()
