"""The package as the zoo wants it, and used elsewhere by the commands of its own README."""

from __future__ import annotations

import ast
import csv
import hashlib
import importlib.metadata
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.version import Version
from tiny_model import SETTINGS

import package_bundle
from conftest import BUNDLE, ROOT, TINY, make_tiny_cohort
from experiments.ensemble import empty_ensemble
from package_bundle import NAME, OWN_VERSIONS, REQUIREMENTS, PackageError, read_requirements, version_problems
from scripts.model.ensemble import save_weights

SMALL = ["--epochs", "1", "--val_interval", "1", "--batch_size", "2", "--num_folds", "2", *TINY]


def change_metadata(bundle: Path, **changes: Any) -> None:
    file = bundle / "configs" / "metadata.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def installed_versions() -> dict[str, Any]:
    """What metadata say of the packages here, which may be newer than those of the release."""
    names = read_requirements(REQUIREMENTS).values()
    versions = {each.name: Version(importlib.metadata.version(each.name)).public for each in names}
    own = {key: versions.pop(package) for key, package in OWN_VERSIONS.items()}
    return {**own, "required_packages_version": versions}


pytest.importorskip("black", reason="needs pip install -r tests/requirements.txt")
pytest.importorskip("isort", reason="needs pip install -r tests/requirements.txt")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundle with tiny weights, metadata of its own version, and what a working copy leaves lying about."""
    bundle = tmp_path_factory.mktemp("source") / "bundle"
    shutil.copytree(BUNDLE, bundle, ignore=shutil.ignore_patterns("output", "data", "*.pt", "__pycache__"))
    ensemble = empty_ensemble(SETTINGS)
    ensemble.provenance = {"trained_on": "0 digital phantoms: a test"}
    save_weights(ensemble, bundle / "models" / "model.pt", half=True)
    change_metadata(bundle, version="9.8.7", changelog={"9.8.7": "a test"}, **installed_versions())
    format_ = json.loads((bundle / "configs" / "metadata.json").read_text())["network_data_format"]
    format_["inputs"]["image"]["spatial_shape"] = [32, 32, 32]
    change_metadata(bundle, network_data_format=format_)
    for stray in ("models/.gitkeep", "output/models/model.pt", "data/a.nii.gz", "scripts/__pycache__/a.pyc"):
        (bundle / stray).parent.mkdir(parents=True, exist_ok=True)
        (bundle / stray).write_text("stray")
    return bundle


@pytest.fixture(scope="module")
def package(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with the packaged directory and zip; every check was passed on the way."""
    out = tmp_path_factory.mktemp("dist")
    package_bundle.package_bundle("9.8.7", str(out), bundle=str(source))
    return out


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out the checks, which have tests of their own."""
    monkeypatch.setattr("zoo.checks.run_checks", lambda bundle: {})


def imports_first(code: bytes) -> ast.Module:
    """A module whose imports stand in one order: they are sorted otherwise in the package."""
    tree = ast.parse(code)
    imports = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    for node in imports:
        node.names.sort(key=lambda name: name.name)
    rest = [node for node in tree.body if node not in imports]
    return ast.Module([*sorted(imports, key=ast.dump), *rest], [])


# --- what is in it ------------------------------------------------------------------------------------------------
def test_the_package_holds_the_bundle_and_nothing_else(package: Path, source: Path) -> None:
    assert sorted(path.name for path in package.iterdir()) == [NAME, f"{NAME}_of_phantoms_v9.8.7.zip"]
    root = package / NAME
    files = {path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()}
    assert {"LICENSE", "docs/README.md", "docs/data_license.txt", "configs/metadata.json", "models/model.pt"} <= files
    assert {f"scripts/{path.name}" for path in BUNDLE.glob("scripts/*.py")} <= files
    templates = {path.relative_to(BUNDLE).as_posix() for path in BUNDLE.glob("scripts/prediction/templates/*")}
    assert "scripts/prediction/templates/report.html" in templates and templates <= files
    assert not [name for name in files if name.startswith(("output", "data")) or "pycache" in name or "/." in name]
    for name in files:
        packaged, original = (root / name).read_bytes(), (source / name).read_bytes()
        if name.endswith(".json"):
            assert json.loads(packaged) == json.loads(original)
        elif name.endswith(".py"):
            assert ast.dump(imports_first(packaged)) == ast.dump(imports_first(original)), name
        elif name.endswith(".md"):
            assert packaged.endswith(original.partition(b"\n")[2])
        else:
            assert packaged == original
    with zipfile.ZipFile(package / f"{NAME}_of_phantoms_v9.8.7.zip") as archive:
        assert archive.namelist() == sorted(f"{NAME}/{name}" for name in files)
        assert {entry.date_time for entry in archive.infolist()} == {(1980, 1, 1, 0, 0, 0)}


def test_configs_and_code_are_in_the_zoos_style(package: Path) -> None:
    """By the zoo's own commands, in a folder like the zoo's."""
    files = list((package / NAME / "configs").glob("*.json"))
    assert len(files) == 12
    for file in files:
        assert file.read_text() == json.dumps(json.loads(file.read_text()), indent=4, ensure_ascii=False) + "\n"


def test_the_zoos_commands_find_nothing(package: Path, tmp_path: Path) -> None:
    shutil.copytree(package / NAME, tmp_path / "models" / NAME)
    black = "[tool.black]\nline-length = 120\ntarget-version = ['py37', 'py38', 'py39']\n"
    (tmp_path / "pyproject.toml").write_text(black)
    (tmp_path / "setup.cfg").write_text("[isort]\nknown_first_party = models\nprofile = black\nline_length = 120\n")
    for command in (["isort", "--check"], ["black", "--skip-magic-trailing-comma", "--check"]):
        ended = subprocess.run([sys.executable, "-m", *command, "."], cwd=tmp_path, capture_output=True, text=True)
        assert ended.returncode == 0, ended.stdout + ended.stderr


def test_every_module_is_imported_with_only_the_bundle_on_the_path(package: Path, tmp_path: Path) -> None:
    code = (
        "import importlib, pkgutil, sys; sys.path.insert(0, sys.argv[1]); import scripts\n"
        "for module in pkgutil.walk_packages(scripts.__path__, 'scripts.'): importlib.import_module(module.name)"
    )
    command = [sys.executable, "-I", "-B", "-c", code, str(package / NAME)]
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr


def test_guides_say_that_tools_are_not_in_the_package(package: Path, source: Path, tmp_path: Path, quick: None) -> None:
    package_bundle.package_bundle("9.8.7", str(tmp_path), bundle=str(source), repository="https://example.org/tools")
    tools = {path.stem for path in (ROOT / "scripts").iterdir()} - {path.stem for path in BUNDLE.glob("scripts/*.py")}
    told = []
    for guide in sorted((tmp_path / NAME / "docs").glob("*.md")):
        text = guide.read_text()
        if any(re.search(rf"scripts/{tool}\b", text) for tool in tools):
            told.append(guide.name)
            assert "tools of the repository, not of this package (https://example.org/tools)" in text.split("\n")[2]
            assert "ask for its address" in (package / NAME / "docs" / guide.name).read_text().split("\n")[2]
    assert {"README.md", "predict.md", "label.md", "deploy.md", "exports.md"} <= set(told)


def test_without_the_packages_that_it_needs_it_says_which(source: Path, tmp_path: Path) -> None:
    """As after the installation of requirements.txt alone."""
    code = (
        "import importlib.util as util, runpy, sys; find = util.find_spec\n"
        "util.find_spec = lambda name, *rest: None if name in ('yaml', 'black', 'isort') else find(name, *rest)\n"
        "sys.modules['yaml'] = None; sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    typed = [str(ROOT / "scripts" / "package_bundle.py"), "--version", "9.8.7", "--out", str(tmp_path / "out")]
    command = [sys.executable, "-c", code, *typed, "--bundle", str(source)]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT / "scripts"), os.environ.get("PYTHONPATH", "")]),
    }
    ended = subprocess.run(command, env=environment, capture_output=True, text=True)
    said = "package_bundle: needs black, isort, pyyaml: pip install -r tests/requirements.txt\n"
    assert (ended.returncode, ended.stderr) == (1, said)
    assert not (tmp_path / "out").exists()


def test_the_same_bundle_gives_the_same_zip(package: Path, source: Path, tmp_path: Path, quick: None) -> None:
    os.utime(source / "LICENSE", (1, 1))
    package_bundle.package_bundle("9.8.7", str(tmp_path), bundle=str(source))
    name = f"{NAME}_of_phantoms_v9.8.7.zip"
    assert (tmp_path / name).read_bytes() == (package / name).read_bytes()


def test_large_files_are_named_and_left_out_of_the_directory(source, tmp_path, monkeypatch, quick) -> None:
    monkeypatch.setattr(package_bundle, "LARGE_BYTES", 5_000_000)
    with pytest.raises(
        PackageError, match=r"models/model.pt: over 25 MB; give the address to download from: --large_files_url"
    ):
        package_bundle.package_bundle("9.8.7", str(tmp_path), bundle=str(source))
    assert not list(tmp_path.iterdir())
    package_bundle.package_bundle("9.8.7", str(tmp_path), bundle=str(source), large_files_url="https://example.org/x/")
    assert not (tmp_path / NAME / "models" / "model.pt").exists()
    (entry,) = yaml.safe_load((tmp_path / NAME / "large_files.yml").read_text())["large_files"]
    assert entry["path"] == "models/model.pt"
    assert entry["url"] == "https://example.org/x/model.pt"
    assert entry["hash_type"] == "sha256"
    with zipfile.ZipFile(tmp_path / f"{NAME}_of_phantoms_v9.8.7.zip") as archive:
        assert hashlib.sha256(archive.read(f"{NAME}/models/model.pt")).hexdigest() == entry["hash_val"]
        assert f"{NAME}/large_files.yml" not in archive.namelist()


def test_a_changelog_on_the_command_line_goes_into_the_package(source: Path, tmp_path: Path, quick: None) -> None:
    package_bundle.package_bundle("9.9.0", str(tmp_path), changelog="better", bundle=str(source))
    packaged = json.loads((tmp_path / NAME / "configs" / "metadata.json").read_text())
    assert packaged["version"] == "9.9.0"
    assert list(packaged["changelog"].items()) == [("9.9.0", "better"), ("9.8.7", "a test")]
    assert json.loads((source / "configs" / "metadata.json").read_text())["version"] == "9.8.7"


# --- what is refused -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        pytest.param({"version": "9.9.0"}, "has version 9.8.7, not 9.9.0", id="other_version"),
        pytest.param({"version": "new"}, "'new' is no version", id="no_version"),
        pytest.param({"version": 0.1}, "0.1 is no version", id="number"),
        pytest.param({"version": "9.8.7", "changelog": "else"}, "already has 9.8.7: a test", id="other_changelog"),
        pytest.param({"version": "9.8.7", "bundle": "."}, "is no bundle", id="no_bundle"),
    ],
)
def test_what_does_not_agree_is_refused(source, tmp_path, quick, monkeypatch, arguments, message) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(PackageError, match=message):
        package_bundle.package_bundle(out=str(tmp_path / "out"), **{"bundle": str(source), **arguments})
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        pytest.param("configs/metadata.json", "{", "metadata.json cannot be read: Expecting", id="metadata"),
        pytest.param("configs/metadata.json", "[]", "metadata.json is a list, not an object", id="metadata_list"),
        pytest.param("configs/inference.json", "{", "configs/inference.json cannot be read: Expecting", id="config"),
        pytest.param("scripts/keys.py", "def (", "scripts/keys.py cannot be read: invalid syntax", id="code"),
        pytest.param("models/model.pt", "weights", "model.pt cannot be read as a checkpoint", id="weights"),
    ],
)
def test_a_damaged_file_is_named(source, tmp_path, quick, name, content, message) -> None:
    bundle = shutil.copytree(source, tmp_path / "bundle")
    (bundle / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        package_bundle.package_bundle("9.8.7", str(tmp_path / "out"), bundle=str(bundle))
    assert not list((tmp_path / "out").glob("*"))


def test_nothing_is_overwritten(source: Path, tmp_path: Path, quick: None) -> None:
    (tmp_path / NAME).mkdir()
    with pytest.raises(PackageError, match="exists: remove it"):
        package_bundle.package_bundle("9.8.7", str(tmp_path), bundle=str(source))


def test_a_bundle_that_fails_a_check_is_not_packaged(source: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("zoo.checks.run_checks", lambda bundle: {"network in and out": "FAILED: shape"})
    with pytest.raises(PackageError, match="these checks failed: network in and out"):
        package_bundle.package_bundle("9.8.7", str(tmp_path / "out"), bundle=str(source))
    assert not list((tmp_path / "out").iterdir())


def test_versions_that_are_not_the_tested_ones_are_named(tmp_path: Path) -> None:
    requirements = tmp_path / "requirements.txt"
    requirements.write_text("numpy>=99  # new\nnibabel==5.4.2\nfire\n")
    numpy = json.loads((BUNDLE / "configs" / "metadata.json").read_text())["numpy_version"]
    metadata = {"numpy_version": numpy, "required_packages_version": {"nibabel": "1.0", "nowhere-at-all": "1.0"}}
    assert version_problems(metadata, requirements) == [
        "fire is required and not named",
        f"numpy is {numpy}, requirements.txt wants >=99",
        f"nibabel is 1.0, installed is {importlib.metadata.version('nibabel')}",
        "nibabel is 1.0, requirements.txt wants ==5.4.2",
        "nowhere-at-all 1.0 is not installed, so it was not tested with",
    ]


def test_the_bundle_names_every_requirement_with_a_version_that_it_allows() -> None:
    """Installed versions may be newer here; those that are named must be allowed and complete."""
    metadata = json.loads((BUNDLE / "configs" / "metadata.json").read_text())
    problems = [p for p in version_problems(metadata, REQUIREMENTS) if "required and not named" in p or "wants" in p]
    assert problems == []
    assert "torch" in read_requirements(REQUIREMENTS)


# --- used elsewhere, with nothing but its README ---------------------------------------------------------------------
def readme_command(bundle: Path, run: str, cohort: Path) -> list[str]:
    """The first command of the packaged README that runs ``run``, with a cohort in the place of DIR."""
    lines = (bundle / "docs" / "README.md").read_text().splitlines()
    line = next(line for line in lines if line.startswith("python -m monai.bundle run") and f" {run} " in line)
    words = [str(cohort) if word == "DIR" else word for word in shlex.split(line)]
    return [sys.executable, *words[1:]]


def test_unzipped_elsewhere_the_readmes_commands_train_and_predict(package: Path, tmp_path: Path) -> None:
    cohort = make_tiny_cohort(tmp_path / "cohort", patients=4)
    with zipfile.ZipFile(package / f"{NAME}_of_phantoms_v9.8.7.zip") as archive:
        archive.extractall(tmp_path)
    bundle = tmp_path / NAME
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": ""}
    for run, extra in (("training", SMALL), ("inference", [])):
        command = [*readme_command(bundle, run, cohort), *extra]
        result = subprocess.run(command, cwd=bundle, env=environment, capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]
    assert (bundle / "output" / "models" / "model.pt").is_file()
    rows = list(csv.DictReader((bundle / "output" / "predictions" / "predictions.csv").read_text().splitlines()))
    assert [row["status"] for row in rows] == ["ok"] * 4
