"""Every check of the zoo on a tiny bundle of another maker: it passes, and each check fails for its own reason."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from command_line import UsageError

import check_bundle
from check_bundle import CHECKS, LARGE_BYTES, Bundle, on_path, outcome_of
from conftest import SHARED_DATA

NETWORK_CODE = """import torch


class Double(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor(2.0))

    def forward(self, x):
        return self.weight * x
"""
SCHEMA_URL = "https://example.org/meta_schema_20240725.json"
TENSOR = {"type": "image", "format": "magnitude", "num_channels": 1, "spatial_shape": [4, 4], "dtype": "float32"}
METADATA: dict[str, Any] = {
    "schema": SCHEMA_URL,
    "version": "0.0.1",
    "changelog": {"0.0.1": "first"},
    "monai_version": "1.6.1",
    "pytorch_version": "2.13.0",
    "numpy_version": "2.4.6",
    "required_packages_version": {"fire": "0.7.1"},
    "task": "doubling",
    "description": "Doubles an image",
    "authors": "nobody",
    "copyright": "nobody",
    "network_data_format": {
        "inputs": {"image": {**TENSOR, "value_range": [0, 1]}},
        "outputs": {"pred": {**TENSOR, "value_range": [0, 2]}},
    },
}
INFERENCE: dict[str, Any] = {
    "bundle_root": ".",
    "device": "cpu",
    "dataset_dir": "data",
    "network_def": {"_target_": "scripts.double.Double"},
    "inferer": {"_target_": "SimpleInferer"},
    "dataset": {"_target_": "Dataset", "data": []},
    "evaluator": {"_target_": "SupervisedEvaluator", "inferer": "@inferer"},
}
TRAIN: dict[str, Any] = {
    "bundle_root": ".",
    "device": "cpu",
    "dataset_dir": "data",
    "network_def": {"_target_": "scripts.double.Double"},
    "val_interval": 1,
    "train": {
        "dataset": {"_target_": "Dataset", "data": []},
        "handlers": [
            {"_target_": "ValidationHandler", "validator": "@validate#evaluator", "interval": "@val_interval"}
        ],
        "inferer": {"_target_": "SimpleInferer"},
        "trainer": {"_target_": "SupervisedTrainer", "max_epochs": 1, "inferer": "@train#inferer"},
    },
    "validate": {"dataset": {"_target_": "Dataset", "data": []}, "handlers": [], "evaluator": {"_target_": "x"}},
}
REQUIRED = ("schema", "version", "task", "network_data_format")


def write(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content, indent=4) + "\n")


def change(path: Path, **changes: Any) -> None:
    """Set top-level entries of a JSON file; None takes one away."""
    content = {**json.loads(path.read_text()), **changes}
    write(path, {name: value for name, value in content.items() if value is not None})


@pytest.fixture
def doubling(tmp_path: Path) -> Bundle:
    """A whole bundle whose network doubles its input."""
    root = tmp_path / "doubling"
    files = {"metadata": METADATA, "inference": INFERENCE, "train": TRAIN}
    for name, content in files.items():
        write(root / "configs" / f"{name}.json", content)
    for name in ("LICENSE", "docs/README.md", "docs/data_license.txt"):
        write(root / name, "free\n")
    write(root / "scripts" / "__init__.py", "")
    write(root / "scripts" / "double.py", NETWORK_CODE)
    (root / "models").mkdir()
    torch.save({"weight": torch.tensor(2.0)}, root / "models" / "model.pt")
    write(tmp_path / "meta_schema_20240725.json", {"type": "object", "required": list(REQUIRED)})
    return Bundle(root, schema=tmp_path / "meta_schema_20240725.json")


def outcome(name: str, bundle: Bundle) -> str:
    with on_path(bundle.root):
        return outcome_of(CHECKS[name], bundle)


def test_a_whole_bundle_passes_and_is_left_as_it_was(doubling: Bundle, capsys: pytest.CaptureFixture) -> None:
    before = sorted(doubling.root.rglob("*"))
    modules = {name: module for name, module in sys.modules.items() if name.split(".")[0] == "scripts"}
    check_bundle.check_bundle(str(doubling.root), schema=str(doubling.schema), run_code=True)
    lines = capsys.readouterr().out.splitlines()
    skipped = {"version not released before", *([] if find_spec("black") and find_spec("isort") else ["code style"])}
    assert [line[9:] for line in lines[:-1] if line.startswith("ok ")] == [n for n in CHECKS if n not in skipped]
    assert lines[-1] == "no check failed"
    assert sorted(doubling.root.rglob("*")) == before
    assert {name: module for name, module in sys.modules.items() if name.split(".")[0] == "scripts"} == modules


MARK = "__import__('pathlib').Path({!r}).touch()"


@pytest.mark.parametrize("run_code", [False, True], ids=["as_it_is", "with_run_code"])
def test_nothing_of_a_bundle_is_run_unless_that_is_asked_for(doubling: Bundle, tmp_path, capsys, run_code) -> None:
    ran = tmp_path / "ran"
    code = MARK.format(str(ran))
    for name in (
        "scripts/__init__.py",
        "scripts/other.py",
        "jsonschema.py",
        "sitecustomize.py",
        "isort.py",
        "black.py",
    ):
        write(doubling.root / name, f"{code}\n")
    change(doubling.root / "configs/inference.json", network_def=f"${code}", imports=["$import scripts"])
    change(doubling.root / "configs/train.json", dataset_dir=f"${code}", imports=["$import scripts"])
    write(doubling.root / "configs/extra.yaml", f"a: !!python/object/apply:eval ['{code}']".replace("'", '"', 2))
    torch.save({"weight": Runs(str(ran))}, doubling.root / "models" / "model.pt")
    with pytest.raises(SystemExit):
        check_bundle.check_bundle(str(doubling.root), schema=str(doubling.schema), run_code=run_code)
    said = capsys.readouterr().out.splitlines()
    assert ran.exists() == run_code
    skipped = [line[9:].split(":")[0] for line in said if line.endswith("--run_code makes this check")]
    assert skipped == ([] if run_code else list(check_bundle.RUN_CODE))
    assert said[-1].endswith("failed" if run_code else "3 that run the bundle's code were not made (--run_code)")


class Runs:
    """Leaves a mark where it is unpickled."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path(self.path),)


def test_a_data_set_needs_the_bundles_code(doubling: Bundle) -> None:
    with pytest.raises(UsageError, match="give --run_code too"):
        check_bundle.check_bundle(str(doubling.root), dataset_dir="data")


Spoil = Callable[[Path], Any]
FAILURES: list[tuple[str, str, Spoil, str]] = [
    ("no_licence", "necessary files", lambda root: (root / "LICENSE").unlink(), "missing: LICENSE"),
    ("no_weights", "preferred files", lambda root: (root / "models/model.pt").unlink(), "models/model.pt is missing"),
    (
        "no_inference",
        "preferred files",
        lambda root: (root / "configs/inference.json").unlink(),
        "missing: configs/inference.json",
    ),
    ("empty_terms", "licences and README", lambda root: write(root / "docs/data_license.txt", " "), "data_license.txt"),
    ("cache", "no stray files", lambda root: write(root / "scripts/__pycache__/a.pyc", "x"), "a.pyc (cache or log)"),
    ("hidden", "no stray files", lambda root: write(root / "models/.gitkeep", ""), ".gitkeep (hidden)"),
    ("output", "no stray files", lambda root: write(root / "output/a.csv", ""), "a.csv (data or output)"),
    ("link", "no stray files", lambda root: (root / "docs/x").symlink_to("README.md"), "docs/x (link)"),
    (
        "big",
        "large files",
        lambda root: (root / "models/model.pt").write_bytes(bytes(LARGE_BYTES + 1)),
        "models/model.pt has 25.0 MB",
    ),
    (
        "other_hash",
        "large files",
        lambda root: write(
            root / "large_files.yml",
            {"large_files": [{"path": "LICENSE", "url": "u", "hash_type": "sha256", "hash_val": "0"}]},
        ),
        "LICENSE is not the file that large_files names",
    ),
    (
        "silent_version",
        "version in changelog",
        lambda root: change(root / "configs/metadata.json", version="0.0.2"),
        "does not say what version 0.0.2 changes",
    ),
    (
        "no_changelog",
        "version in changelog",
        lambda root: change(root / "configs/metadata.json", changelog=None),
        "needs a 'version' and a 'changelog'",
    ),
    (
        "schema",
        "metadata schema",
        lambda root: change(root / "configs/metadata.json", task=None),
        "'task' is a required property",
    ),
    (
        "range_of_versions",
        "exact package versions",
        lambda root: change(root / "configs/metadata.json", required_packages_version={"fire": ">=0.7"}),
        "fire '>=0.7' is no exact version",
    ),
    (
        "leads_out",
        "large files",
        lambda root: write(root / "large_files.yml", {"large_files": [{"path": "../x.pt", "url": "u"}]}),
        "../x.pt leads out of the bundle",
    ),
    (
        "compact_config",
        "configs are indented",
        lambda root: write(root / "configs/train.json", json.dumps(TRAIN)),
        "configs/train.json is not indented by 4",
    ),
    (
        "compact_list",
        "configs are indented",
        lambda root: write(root / "configs/more.json", '{\n    "size": [1, 2]\n}\n'),
        "configs/more.json is not indented by 4",
    ),
    (
        "black",
        "code style",
        lambda root: write(root / "scripts/double.py", NETWORK_CODE.replace("2.0", " 2.0 ")),
        "scripts/double.py is not formatted by the zoo's black and isort",
    ),
    (
        "trailing_comma",
        "code style",
        lambda root: write(root / "scripts/more.py", "SIZE = [\n    1,\n    2,\n]\n"),
        "scripts/more.py is not formatted",
    ),
    (
        "isort",
        "code style",
        lambda root: write(root / "scripts/more.py", "import torch\nimport os\n"),
        "scripts/more.py is not formatted",
    ),
    (
        "no_python",
        "code style",
        lambda root: write(root / "scripts/more.py", "def ("),
        "black: ",
    ),
    ("no_json", "configs can be read", lambda root: write(root / "configs/train.json", "{"), "configs/train.json"),
    (
        "no_device",
        "ids of the inference config",
        lambda root: change(root / "configs/inference.json", device=None),
        "no 'device'",
    ),
    (
        "no_trainer",
        "ids of the train config",
        lambda root: change(root / "configs/train.json", train={"dataset": {"data": []}, "handlers": []}),
        "no 'train#trainer'; train config: no 'train#trainer#max_epochs'",
    ),
    (
        "interval",
        "ids of the train config",
        lambda root: change(root / "configs/train.json", val_interval=None),
        "interval is not '@val_interval'",
    ),
    (
        "inferer_elsewhere",
        "properties of the inference workflow",
        lambda root: change(root / "configs/inference.json", inferer=None),
        "property 'inferer' is missing",
    ),
    (
        "no_dataset_dir",
        "properties of the train workflow",
        lambda root: change(root / "configs/train.json", dataset_dir=None),
        "property 'dataset_dir' is missing",
    ),
    (
        "other_channels",
        "network in and out",
        lambda root: write(
            root / "scripts/double.py",
            NETWORK_CODE.replace("self.weight * x", "torch.cat([x, x], 1)"),
        ),
        "output channel number `2` doesn't match: `1`",
    ),
    (
        "not_scriptable",
        "TorchScript export",
        lambda root: write(root / "scripts/double.py", NETWORK_CODE.replace("return", "print(**{}); return")),
        "FAILED",
    ),
    (
        "broken_torchscript",
        "TorchScript export",
        lambda root: write(root / "models/model.ts", "none"),
        "FAILED: RuntimeError",
    ),
    (
        "import_from_outside",
        "scripts import elsewhere",
        lambda root: write(root / "scripts/alone.py", "import check_bundle\n"),
        "No module named 'check_bundle'",
    ),
]


@pytest.mark.parametrize(("check", "spoil", "message"), [pytest.param(*case[1:], id=case[0]) for case in FAILURES])
def test_each_check_fails_for_its_own_reason(doubling: Bundle, check: str, spoil: Spoil, message: str) -> None:
    if check == "code style":
        pytest.importorskip("black"), pytest.importorskip("isort")
    spoil(doubling.root)
    result = outcome(check, doubling)
    assert result.startswith("FAILED")
    assert message in result


def test_a_bundle_in_a_folder_of_any_name_passes(doubling: Bundle) -> None:
    root = doubling.root.rename(doubling.root.with_name("a#b @c$d"))
    results = check_bundle.run_checks(Bundle(root, schema=doubling.schema))
    assert not [result for result in results if result[1].startswith("FAILED")]


def test_every_check_is_made_to_fail_once() -> None:
    assert {case[1] for case in FAILURES} == set(CHECKS) - {"version not released before"}


def test_a_released_version_is_refused(doubling: Bundle, tmp_path: Path) -> None:
    released = tmp_path / "model_info.json"
    write(released, {"doubling_v0.0.1": {}})
    again = Bundle(doubling.root, model_info=released)
    assert "doubling_v0.0.1 is released already" in outcome("version not released before", again)
    change(doubling.root / "configs" / "metadata.json", version="0.0.2")
    assert outcome("version not released before", Bundle(doubling.root, model_info=released)) == "ok"


def test_what_cannot_be_checked_is_skipped_with_its_reason(doubling: Bundle, monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setattr(check_bundle, "SCHEMAS", tmp_path / "nowhere")
    bundle = Bundle(doubling.root)
    assert outcome("metadata schema", bundle).startswith("skipped: no schema file")
    (bundle.root / "configs" / "train.json").unlink()
    assert outcome("ids of the train config", bundle) == "skipped: no configs/train.json"
    for file in (bundle.root / "scripts").iterdir():
        file.unlink()
    assert outcome("scripts import elsewhere", bundle) == "skipped: no package scripts"


def test_weights_may_lie_at_an_address(doubling: Bundle) -> None:
    (doubling.root / "models" / "model.pt").unlink()
    write(
        doubling.root / "large_files.yml", {"large_files": [{"path": "models/model.pt", "url": "https://example.org"}]}
    )
    bundle = Bundle(doubling.root)
    assert outcome("preferred files", bundle) == "ok"
    assert outcome("large files", bundle) == "ok"
    assert outcome("TorchScript export", bundle).startswith("skipped: models/model.pt is not here")


def test_the_command_ends_with_one_where_a_check_fails(doubling: Bundle, capsys: pytest.CaptureFixture) -> None:
    write(doubling.root / ".cache", "")
    for file in (doubling.root / "scripts").iterdir():
        file.unlink()
    with pytest.raises(SystemExit) as stop:
        check_bundle.check_bundle(str(doubling.root), schema=str(doubling.schema), run_code=True)
    assert stop.value.code == 1
    lines = capsys.readouterr().out.splitlines()
    assert "FAILED   no stray files: .cache (hidden)" in lines
    failed = sum(line.startswith("FAILED") for line in lines)
    assert lines[-1] == f"{failed} of {len(CHECKS)} checks failed"


def test_no_directory_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(NotADirectoryError, match="no directory at"):
        check_bundle.check_bundle(str(tmp_path / "none"))


def test_monais_own_schema_is_found(doubling: Bundle) -> None:
    if not (SHARED_DATA / "schema").is_dir():
        pytest.skip(f"no schema at {SHARED_DATA / 'schema'}")
    assert outcome("metadata schema", Bundle(doubling.root)) == "ok"
    change(doubling.root / "configs" / "metadata.json", authors=None)
    assert "'authors' is a required property" in outcome("metadata schema", Bundle(doubling.root))
