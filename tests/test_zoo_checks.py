"""Every check of the zoo on a tiny bundle that is not ours: it passes, and each check fails for its own reason."""

from __future__ import annotations

import json
import sys
import zipfile
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

from command_line import UsageError

import package_bundle
from conftest import SHARED_DATA
from zoo import checks
from zoo.checks import CHECKS, RUN_CODE, Bundle, outcome_of, run_checks
from zoo.contents import LARGE_BYTES

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
    return outcome_of(CHECKS[name], bundle)


def check(bundle: Bundle, **options: Any) -> None:
    package_bundle.package_bundle(check=str(bundle.root), schema=str(bundle.schema), **options)


def test_a_whole_bundle_passes_and_is_left_as_it_was(doubling: Bundle, capsys: pytest.CaptureFixture) -> None:
    before = sorted(doubling.root.rglob("*"))
    modules = {name: module for name, module in sys.modules.items() if name.split(".")[0] == "scripts"}
    check(doubling, run_code=True)
    assert capsys.readouterr().out.splitlines() == [
        *(f"ok       {name}" for name in CHECKS),
        f"0 of {len(CHECKS)} checks failed",
    ]
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
    with pytest.raises(SystemExit) if run_code else nullcontext():
        check(doubling, run_code=run_code)
    said = capsys.readouterr().out.splitlines()
    assert ran.exists() == run_code
    skipped = [line[9:].split(":")[0] for line in said if line.endswith("needs --run_code")]
    assert skipped == ([] if run_code else list(RUN_CODE))


class Runs:
    """Leaves a mark where it is unpickled."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path(self.path),)


@pytest.mark.parametrize(
    "options, message",
    [
        pytest.param({"check": "x", "version": "1.0", "out": "dist"}, "--check DIR writes nothing", id="both"),
        pytest.param({"version": "1.0"}, "give --version and --out, or --check DIR", id="no_folder"),
        pytest.param({}, "give --version and --out, or --check DIR", id="nothing"),
    ],
)
def test_the_command_packages_or_checks(options: dict[str, str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        package_bundle.package_bundle(**options)


Spoil = Callable[[Path], Any]
FAILURES: list[tuple[str, str, Spoil, str]] = [
    ("no_licence", "required files", lambda root: (root / "LICENSE").unlink(), "LICENSE is missing or empty"),
    ("no_weights", "required files", lambda root: (root / "models/model.pt").unlink(), "models/model.pt is missing"),
    (
        "no_inference",
        "required files",
        lambda root: (root / "configs/inference.json").unlink(),
        "configs/inference.json is missing",
    ),
    ("empty_terms", "required files", lambda root: write(root / "docs/data_license.txt", " "), "data_license.txt"),
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
    ("other_hash", "large files", lambda root: name_large(root, "LICENSE", hash_val="0"), "LICENSE does not have the"),
    ("no_hash", "large files", lambda root: name_large(root, "LICENSE", hash_type=""), "is not a valid value"),
    ("no_url", "large files", lambda root: name_large(root, "x.pt", url=""), "x.pt has no url"),
    ("outside", "large files", lambda root: name_large(root, "../x.pt"), "../x.pt is outside the bundle"),
    ("no_list", "large files", lambda root: write(root / "large_files.yml", {}), "holds no list 'large_files'"),
    (
        "cut_off",
        "weights",
        lambda root: (root / "models/model.pt").write_bytes((root / "models/model.pt").read_bytes()[:500]),
        "models/model.pt is cut off",
    ),
    ("other_bytes", "weights", lambda root: write(root / "models/other.pt", "none"), "models/other.pt is cut off, or"),
    ("one_bit", "weights", lambda root: flip_a_bit(root / "models/model.pt"), "models/model.pt is damaged"),
    (
        "silent_version",
        "metadata",
        lambda root: change(root / "configs/metadata.json", version="0.0.2"),
        "has no entry for version 0.0.2",
    ),
    (
        "no_changelog",
        "metadata",
        lambda root: change(root / "configs/metadata.json", changelog=None),
        "has no entry for version 0.0.1",
    ),
    ("no_json", "metadata", lambda root: write(root / "configs/metadata.json", "{"), "metadata.json cannot be read"),
    ("no_object", "metadata", lambda root: write(root / "configs/metadata.json", []), "is a list, not an object"),
    (
        "schema",
        "metadata",
        lambda root: change(root / "configs/metadata.json", task=None),
        "'task' is a required property",
    ),
    (
        "no_inferer",
        "properties of the inference config",
        lambda root: change(root / "configs/inference.json", inferer=None),
        "property 'inferer' is missing",
    ),
    (
        "no_device",
        "properties of the inference config",
        lambda root: change(root / "configs/inference.json", device=None),
        "property 'device' is missing",
    ),
    (
        "no_dataset_dir",
        "properties of the train config",
        lambda root: change(root / "configs/train.json", dataset_dir=None),
        "property 'dataset_dir' is missing",
    ),
    (
        "no_trainer",
        "properties of the train config",
        lambda root: change(root / "configs/train.json", train={"dataset": {"data": []}, "handlers": []}),
        "property 'trainer' is missing",
    ),
    (
        "interval",
        "properties of the train config",
        lambda root: change(root / "configs/train.json", train=interval_of("@other")),
        "property 'val_interval' is missing or has another id",
    ),
    ("train_json", "properties of the train config", lambda root: write(root / "configs/train.json", "{"), "FAILED"),
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
        "import_from_outside",
        "network in and out",
        lambda root: write(root / "scripts/double.py", "import command_line\n" + NETWORK_CODE),
        "No module named 'command_line'",
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
        "cause",
        "TorchScript export",
        lambda root: write(
            root / "scripts/double.py", NETWORK_CODE.replace("super()", "raise OSError('why'); super()")
        ),
        "FAILED: OSError: why",
    ),
]


def flip_a_bit(path: Path) -> None:
    """Change one bit of the last tensor in a file of weights."""
    with zipfile.ZipFile(path) as archive:
        place = archive.getinfo(next(name for name in archive.namelist() if "/data/" in name)).header_offset
    content = bytearray(path.read_bytes())
    content[content.index(torch.tensor(2.0).numpy().tobytes(), place)] ^= 1
    path.write_bytes(content)


def interval_of(reference: str) -> dict[str, Any]:
    """The section ``train`` with another interval of its ValidationHandler."""
    return {**TRAIN["train"], "handlers": [{**TRAIN["train"]["handlers"][0], "interval": reference}]}


def name_large(root: Path, path: str, **changes: str) -> None:
    entry = {"path": path, "url": "https://example.org", "hash_type": "sha256", "hash_val": "0"}
    write(root / "large_files.yml", {"large_files": [{**entry, **changes}]})


@pytest.mark.parametrize(("check", "spoil", "message"), [pytest.param(*case[1:], id=case[0]) for case in FAILURES])
def test_each_check_fails_for_its_own_reason(doubling: Bundle, check: str, spoil: Spoil, message: str) -> None:
    spoil(doubling.root)
    result = outcome(check, doubling)
    assert result.startswith("FAILED")
    assert message in result


def test_a_bundle_in_a_folder_of_any_name_passes(doubling: Bundle) -> None:
    root = doubling.root.rename(doubling.root.with_name("a#b @c$d"))
    assert set(run_checks(Bundle(root, schema=doubling.schema)).values()) == {"ok"}


def test_every_check_is_made_to_fail_once() -> None:
    assert {case[1] for case in FAILURES} == set(CHECKS)


def test_what_cannot_be_checked_is_skipped_with_its_reason(doubling: Bundle, monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setattr(checks, "SCHEMAS", tmp_path / "nowhere")
    bundle = Bundle(doubling.root)
    assert outcome("metadata", bundle).startswith("skipped: no schema file: download meta_schema_20240725.json")
    assert "no schema file at" in outcome("metadata", Bundle(doubling.root, tmp_path / "nowhere.json"))
    (bundle.root / "configs" / "train.json").unlink()
    assert outcome("properties of the train config", bundle) == "skipped: no configs/train.json"


def test_weights_may_lie_at_an_address(doubling: Bundle) -> None:
    (doubling.root / "models" / "model.pt").unlink()
    name_large(doubling.root, "models/model.pt")
    bundle = Bundle(doubling.root)
    assert outcome("required files", bundle) == "ok"
    assert outcome("large files", bundle) == "ok"
    assert outcome("TorchScript export", bundle).startswith("skipped: models/model.pt is absent")


def test_the_command_ends_with_one_where_a_check_fails(doubling: Bundle, capsys: pytest.CaptureFixture) -> None:
    write(doubling.root / ".cache", "")
    (doubling.root / "LICENSE").unlink()
    with pytest.raises(SystemExit) as stop:
        check(doubling)
    assert stop.value.code == 1
    lines = capsys.readouterr().out.splitlines()
    assert "FAILED   no stray files: .cache (hidden)" in lines
    assert lines[-1] == f"2 of {len(CHECKS)} checks failed"


def test_no_directory_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(package_bundle.PackageError, match="none is not a directory"):
        package_bundle.package_bundle(check=str(tmp_path / "none"))


def test_monais_own_schema_is_found(doubling: Bundle) -> None:
    if not (SHARED_DATA / "schema").is_dir():
        pytest.skip(f"no schema at {SHARED_DATA / 'schema'}")
    assert outcome("metadata", Bundle(doubling.root)) == "ok"
    change(doubling.root / "configs" / "metadata.json", authors=None)
    assert "'authors' is a required property" in outcome("metadata", Bundle(doubling.root))
