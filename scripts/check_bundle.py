"""The checks that the MONAI model zoo runs on a bundle, on a directory and without a network.

``python scripts/check_bundle.py DIR`` prints one line a check: ``ok``, ``FAILED`` and why, or ``skipped`` and why, and
ends with 1 if one failed. What is checked follows the zoo's ``ci/verify_bundle.py``, its CONTRIBUTING.md (ids of the
configs, sizes, licences) and its packing (nothing that is not part of the bundle). MONAI's own functions do the work
where there is one. Nothing in the bundle is run or imported; the checks that need its code to run are skipped unless
``--run_code`` says so, which is for bundles that you trust.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import chdir, contextmanager
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from monai.bundle import ConfigParser, ConfigWorkflow, ckpt_export, verify_metadata, verify_net_in_out
from packaging.requirements import InvalidRequirement, Requirement

from command_line import ROOT, UsageError, run_tool

SCHEMAS = ROOT.parent / "shared" / "data" / "schema"

METADATA, LICENSE, WEIGHTS, TORCHSCRIPT = "configs/metadata.json", "LICENSE", "models/model.pt", "models/model.ts"
README, DATA_LICENSE, CODE = "docs/README.md", "docs/data_license.txt", "scripts"
CONFIG_ENDINGS = (".json", ".yaml", ".yml")
LARGE_FILES = "large_files"
LARGE_BYTES = 25_000_000  # the zoo takes no larger file; its address goes into large_files.yml instead
NETWORK = "network_def"

INFERENCE_IDS = ("bundle_root", "device", NETWORK, "inferer")
TRAIN_IDS = ("bundle_root", "device", "dataset_dir")
SECTION_IDS = {
    "train": ("trainer", "trainer#max_epochs", "dataset", "dataset#data", "handlers"),
    "validate": ("evaluator", "handlers", "dataset", "dataset#data"),
}
OWN_VERSIONS = {"monai_version": "monai", "pytorch_version": "torch", "numpy_version": "numpy"}
PACKAGE_LISTS = ("required_packages_version", "optional_packages_version")

# setup.cfg and pyproject.toml of the zoo; its runtests.sh adds --skip-magic-trailing-comma
ZOO_STYLE = """
[tool.black]
line-length = 120
target-version = ["py37", "py38", "py39"]
skip-magic-trailing-comma = true

[tool.isort]
known_first_party = ["models"]
profile = "black"
line_length = 120
"""

STRAY_FOLDERS = ("__pycache__", "mlruns", "runs", "wandb")
STRAY_AT_TOP = ("data", "output", "eval")  # what the bundle's own commands and the zoo's checks leave behind
STRAY_ENDINGS = (".pyc", ".pyo", ".partial", ".orig", ".rej", ".swp", "~")

IMPORT_ALL = """
import importlib, pkgutil, sys
sys.path.insert(0, sys.argv[1])
import scripts
for module in pkgutil.walk_packages(scripts.__path__, "scripts."):
    importlib.import_module(module.name)
"""


class CheckError(Exception):
    """What a check found wrong."""


class Skipped(Exception):  # noqa: N818 - no error
    """Why a check could not be made."""


@dataclass(frozen=True)
class Bundle:
    """A bundle's directory and what its checks may use from outside it.

    Attributes:
        root: the directory.
        schema: file of the metadata's schema; None: one of that name in ``../shared/data/schema``.
        model_info: the zoo's list of released versions; None: that check is skipped.
        dataset_dir: a data set for the configs; None: their properties are looked up, not built.
    """

    root: Path
    schema: Path | None = None
    model_info: Path | None = None
    dataset_dir: str | None = None

    @cached_property
    def metadata(self) -> dict[str, Any]:
        """Content of ``configs/metadata.json``.

        Raises:
            CheckError: there is none, or it is no JSON object.
        """
        try:
            content = json.loads((self.root / METADATA).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise CheckError(f"{METADATA} cannot be read: {error}") from error
        if not isinstance(content, dict):
            raise CheckError(f"{METADATA} is a {type(content).__name__}, not an object")
        return content

    @cached_property
    def large_files(self) -> list[dict[str, str]]:
        """Entries of ``large_files.yml`` (or .yaml, .json); none without such a file.

        Raises:
            CheckError: it holds no list ``large_files``.
        """
        file = self.config_file(LARGE_FILES, folder=".")
        if file is None:
            return []
        entries = ConfigParser.load_config_file(str(file)).get(LARGE_FILES)
        if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
            raise CheckError(f"{file.name} holds no list '{LARGE_FILES}' of path, url, hash_val, hash_type")
        return entries

    def config_file(self, name: str, folder: str = "configs") -> Path | None:
        """The file of that name with any of the endings that MONAI reads."""
        found = (self.root / folder / f"{name}{ending}" for ending in CONFIG_ENDINGS)
        return next((path for path in found if path.is_file()), None)

    def needs(self, name: str) -> Path:
        """The config of that name, for a check that makes no sense without it.

        Raises:
            Skipped: there is none.
        """
        file = self.config_file(name)
        if file is None:
            raise Skipped(f"no configs/{name}.json")
        return file

    def weights(self) -> Path:
        """The weights.

        Raises:
            CheckError: there are none and no address of them.
            Skipped: they have to be downloaded first.
        """
        path = self.root / WEIGHTS
        if path.is_file():
            return path
        if any(entry.get("path") == WEIGHTS for entry in self.large_files):
            raise Skipped(f"{WEIGHTS} is not here; `python -m monai.bundle download_large_files` gets it")
        raise CheckError(f"{WEIGHTS} is missing")


# --- the checks, in the order they are made ---------------------------------------------------------------------------


def necessary_files(bundle: Bundle) -> None:
    """Without these there is no bundle."""
    _complain(f"missing: {name}" for name in (METADATA, LICENSE) if not (bundle.root / name).is_file())


def preferred_files(bundle: Bundle) -> None:
    """What the zoo's other tools read: an inference config and weights, here or at an address in large_files.yml."""
    problems = [] if bundle.config_file("inference") else ["missing: configs/inference.json (or .yaml, .yml)"]
    try:
        bundle.weights()
    except CheckError as error:
        problems.append(str(error))
    except Skipped:
        pass  # an address is enough
    _complain(problems)


def licences(bundle: Bundle) -> None:
    """Terms of the bundle and of the data, and the page that tells users about it."""
    files = (LICENSE, DATA_LICENSE, README)
    _complain(
        f"{name} is missing or empty"
        for name in files
        if not (bundle.root / name).is_file() or not (bundle.root / name).read_text(encoding="utf-8").strip()
    )


def stray_files(bundle: Bundle) -> None:
    """Nothing that is not part of it: caches, hidden files, outputs, links."""
    _complain(
        f"{path.relative_to(bundle.root)} ({reason})"
        for path in sorted(bundle.root.rglob("*"))
        if (path.is_symlink() or path.is_file()) and (reason := stray_reason(path, bundle.root))
    )


def large_files(bundle: Bundle) -> None:
    """Files over 25 MB have an address and a hash; one that is here has that hash."""
    listed = {entry.get("path", ""): entry for entry in bundle.large_files}
    problems = [f"{name or 'an entry'} has no url" for name, entry in listed.items() if not entry.get("url")]
    problems += [f"{name} leads out of the bundle" for name in listed if leads_out(name, bundle.root)]
    for path in sorted(p for p in bundle.root.rglob("*") if p.is_file()):
        name = path.relative_to(bundle.root).as_posix()
        if name in listed:
            problems += _wrong_hash(path, name, listed[name])
        elif path.stat().st_size > LARGE_BYTES:
            size = path.stat().st_size / 1e6
            problems.append(f"{name} has {size:.1f} MB, over 25: leave it out and name it in {LARGE_FILES}.yml")
    _complain(problems)


def version(bundle: Bundle) -> None:
    """The version stands in the changelog."""
    number, changelog = bundle.metadata.get("version"), bundle.metadata.get("changelog")
    if not number or not isinstance(changelog, dict):
        raise CheckError(f"{METADATA} needs a 'version' and a 'changelog' (version -> what changed)")
    if number not in changelog:
        raise CheckError(f"the changelog in {METADATA} does not say what version {number} changes")


def unused_version(bundle: Bundle) -> None:
    """The zoo has not released this version before."""
    if bundle.model_info is None:
        raise Skipped("needs the zoo's models/model_info.json (--model_info)")
    name = f"{bundle.root.name}_v{bundle.metadata.get('version')}"
    if name in json.loads(bundle.model_info.read_text(encoding="utf-8")):
        raise CheckError(f"{name} is released already: raise the version")


def metadata_schema(bundle: Bundle) -> None:
    """The metadata follow MONAI's schema (``monai.bundle verify_metadata``; it downloads no schema that is there)."""
    name = str(bundle.metadata.get("schema", "")).rsplit("/", 1)[-1]
    file = bundle.schema or SCHEMAS / name
    if not file.is_file():
        if bundle.schema:
            raise CheckError(f"no schema file at {file}")
        raise Skipped("no schema file: download the one that the metadata's 'schema' names and give it with --schema")
    with tempfile.TemporaryDirectory() as folder:
        copy = shutil.copy(file, Path(folder) / (name or file.name))
        verify_metadata(meta_file=str(bundle.root / METADATA), filepath=copy)


def packages(bundle: Bundle) -> None:
    """Every package has an exact version that pip can read, as the zoo installs what the metadata name."""
    versions = package_versions(bundle.metadata)
    problems = [f"{name} has no version" for name, number in versions.items() if not number]
    for name, number in versions.items():
        try:
            Requirement(f"{name}=={number}")
        except InvalidRequirement:
            problems.append(f"{name} {number!r} is no exact version")
    _complain(f"{METADATA}: {problem}" for problem in problems)


def configs(bundle: Bundle) -> None:
    """Every config can be read."""
    problems = []
    for file in sorted((bundle.root / "configs").glob("*")):
        if file.suffix in CONFIG_ENDINGS:
            try:
                ConfigParser.load_config_file(str(file))
            except Exception as error:  # each reader has its own
                problems.append(f"configs/{file.name}: {_one_line(error)}")
    _complain(problems)


def config_style(bundle: Bundle) -> None:
    """JSON configs are written as the zoo writes them: indented by 4, each entry of a list on a line of its own."""
    files = sorted((bundle.root / "configs").glob("*.json"))
    _complain(
        f"configs/{file.name} is not indented by 4 as by json.dumps"
        for file in files
        if (text := file.read_text(encoding="utf-8").strip()) not in (styled_json(text), styled_json(text, ascii=True))
    )


def code_style(bundle: Bundle) -> None:
    """The zoo's black and isort would change nothing."""
    if missing := [name for name in ("black", "isort") if find_spec(name) is None]:
        raise Skipped(f"needs {' and '.join(missing)}: pip install -r tests/requirements.txt")
    if not list((bundle.root / CODE).rglob("*.py")):
        raise Skipped(f"no package {CODE}")
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(shutil.copytree(bundle.root / CODE, Path(folder) / CODE))
        style_code(copy)
        files = sorted(path.relative_to(copy) for path in copy.rglob("*.py"))
        changed = [name for name in files if (copy / name).read_bytes() != (bundle.root / CODE / name).read_bytes()]
    _complain(f"{CODE}/{name} is not formatted by the zoo's black and isort" for name in changed)


def inference_ids(bundle: Bundle) -> None:
    """Ids that the zoo asks of an inference config."""
    parser = _read(bundle.needs("inference"))
    _complain(f"inference config: no '{name}'" for name in INFERENCE_IDS if name not in parser)


def train_ids(bundle: Bundle) -> None:
    """Ids that the zoo asks of a train config, and of its parts ``train`` and ``validate`` where it has them."""
    parser = _read(bundle.needs("train"))
    wanted = [*TRAIN_IDS]
    for section, names in SECTION_IDS.items():
        wanted += [f"{section}#{name}" for name in names if section in parser]
    problems = [f"no '{name}'" for name in wanted if name not in parser]
    handlers = parser.get("train#handlers", [])
    for handler in handlers if isinstance(handlers, list) else []:
        validates = isinstance(handler, Mapping) and handler.get("_target_") == "ValidationHandler"
        if validates and ("val_interval" not in parser or handler.get("interval") != "@val_interval"):
            problems.append("ValidationHandler's interval is not '@val_interval'")
    _complain(f"train config: {problem}" for problem in problems)


class DeclaredWorkflow(ConfigWorkflow):
    """A workflow whose properties are what the config says, not what it would build: no data are needed."""

    def _get_property(self, name: str, property: dict[str, Any]) -> Any:
        try:
            config_id = self._get_prop_id(name, property)
        except KeyError as error:
            raise AttributeError(name) from error  # so that check_properties finds that it is not there
        return None if config_id is None else self.parser[config_id]


def properties_of(kind: str) -> Callable[[Bundle], None]:
    """The check that MONAI's workflow finds its properties in the config ``kind``, "inference" or "train"."""

    def check(bundle: Bundle) -> None:
        arguments: dict[str, Any] = {"config_file": str(bundle.needs(kind)), "meta_file": str(bundle.root / METADATA)}
        arguments |= {"workflow_type": kind, "logging_file": False, "bundle_root": "."}
        if bundle.dataset_dir is None:
            workflow: ConfigWorkflow = DeclaredWorkflow(**arguments)
            workflow.parser.parse(reset=True)
            wrong = workflow.check_properties()
        else:
            with tempfile.TemporaryDirectory() as folder:
                workflow = ConfigWorkflow(**arguments, dataset_dir=bundle.dataset_dir, output_dir=folder)
                workflow.initialize()
                wrong = workflow.check_properties()
                workflow.finalize()
        _complain(f"{kind} config: property '{name}' is missing or has another id" for name in wrong or [])

    check.__doc__ = f"MONAI's workflow finds its properties in the {kind} config (``check_properties``)."
    return check


def network_in_out(bundle: Bundle) -> None:
    """The network reads and gives what the metadata say (``monai.bundle verify_net_in_out``)."""
    config = bundle.needs("inference")
    verify_net_in_out(
        net_id=NETWORK,
        meta_file=str(bundle.root / METADATA),
        config_file=str(config),
        device="cpu",
        bundle_root=".",
    )


def torchscript(bundle: Bundle) -> None:
    """The weights become TorchScript that loads (``monai.bundle ckpt_export``), and so does a file that is there."""
    config, weights = bundle.needs("inference"), bundle.weights()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "verify_model.ts"
        ckpt_export(
            net_id=NETWORK,
            filepath=str(file),
            ckpt_file=str(weights),
            meta_file=str(bundle.root / METADATA),
            config_file=str(config),
            bundle_root=".",
        )
        torch.jit.load(file)
    if (bundle.root / TORCHSCRIPT).is_file():
        torch.jit.load(bundle.root / TORCHSCRIPT)


def imports_elsewhere(bundle: Bundle) -> None:
    """Every module of the bundle's ``scripts`` is imported with nothing but the bundle on the path."""
    if not (bundle.root / CODE / "__init__.py").is_file():
        raise Skipped(f"no package {CODE}")
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-I", "-B", "-c", IMPORT_ALL, str(bundle.root)]
        result = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if result.returncode:
        raise CheckError(result.stderr.strip().splitlines()[-1])


CHECKS: dict[str, Callable[[Bundle], None]] = {
    "necessary files": necessary_files,
    "preferred files": preferred_files,
    "licences and README": licences,
    "no stray files": stray_files,
    "large files": large_files,
    "version in changelog": version,
    "version not released before": unused_version,
    "metadata schema": metadata_schema,
    "exact package versions": packages,
    "configs can be read": configs,
    "configs are indented": config_style,
    "code style": code_style,
    "ids of the inference config": inference_ids,
    "ids of the train config": train_ids,
    "properties of the inference workflow": properties_of("inference"),
    "properties of the train workflow": properties_of("train"),
    "network in and out": network_in_out,
    "TorchScript export": torchscript,
    "scripts import elsewhere": imports_elsewhere,
}
RUN_CODE = ("network in and out", "TorchScript export", "scripts import elsewhere")
"""Checks that run the bundle's code or evaluate its configs."""
NOT_RUN = "it would run the bundle's code: --run_code makes this check"


# --- running them -----------------------------------------------------------------------------------------------------


def check_bundle(
    directory: str, schema: str = "", model_info: str = "", dataset_dir: str = "", run_code: bool = False
) -> None:
    """Check a bundle's directory and print one line a check.

    Args:
        directory: the bundle.
        schema: file of the metadata's schema; it is looked for in ``../shared/data/schema`` otherwise.
        model_info: the zoo's ``models/model_info.json``, to see that the version is new.
        dataset_dir: a data set; then the workflows' properties are not only looked up but built, with run_code.
        run_code: make the checks that run the bundle's own code too: only for a bundle that you trust.
    """
    if dataset_dir and not run_code:
        raise UsageError("--dataset_dir builds the bundle's workflows, which runs its code: give --run_code too")
    if not Path(directory).is_dir():
        raise NotADirectoryError(f"no directory at {directory}")
    bundle = Bundle(
        Path(directory).resolve(),
        Path(schema).resolve() if schema else None,
        Path(model_info).resolve() if model_info else None,
        str(Path(dataset_dir).resolve()) if dataset_dir else None,
    )
    failed = [name for name, outcome in run_checks(bundle, code=run_code) if outcome.startswith("FAILED")]
    print(f"{len(failed)} of {len(CHECKS)} checks failed" if failed else "no check failed", end="")
    print("" if run_code else f"; {len(RUN_CODE)} that run the bundle's code were not made (--run_code)")
    if failed:
        raise SystemExit(1)


def run_checks(bundle: Bundle, names: tuple[str, ...] = tuple(CHECKS), code: bool = True) -> list[tuple[str, str]]:
    """Make the checks, print a line for each, and give back ``(name, "ok" | "FAILED: why" | "skipped: why")``.

    Args:
        bundle: what to check.
        names: of the checks.
        code: make those of :data:`RUN_CODE` too.
    """
    outcomes = []
    for name in names:
        if name in RUN_CODE and not code:
            outcome = f"skipped: {NOT_RUN}"
        else:
            with on_path(bundle.root) if code else in_folder(bundle.root):
                outcome = outcome_of(CHECKS[name], bundle)
        print(f"{outcome.split(':')[0]:<8} {name}{outcome[len(outcome.split(':')[0]) :]}", flush=True)
        outcomes.append((name, outcome))
    return outcomes


def outcome_of(check: Callable[[Bundle], None], bundle: Bundle) -> str:
    """What a check says, in one line."""
    try:
        check(bundle)
    except Skipped as reason:
        return f"skipped: {reason}"
    except CheckError as error:
        return f"FAILED: {error}"
    except Exception as error:  # whatever the bundle's own code raises is its failure, not the tool's
        return f"FAILED: {type(error).__name__}: {_one_line(error)}"
    return "ok"


@contextmanager
def in_folder(root: Path) -> Iterator[None]:
    """Work in the bundle's folder without a word of MONAI's about its arguments; nothing is imported from there.

    ``bundle_root`` is "." meanwhile, since MONAI's parser changes a ``#`` in a path.
    """
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), chdir(root):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)


@contextmanager
def on_path(root: Path) -> Iterator[None]:
    """:func:`in_folder`, and import ``scripts`` from this bundle and from no other; it is left without caches."""
    path, write = list(sys.path), sys.dont_write_bytecode
    others = {name: sys.modules.pop(name) for name in list(sys.modules) if name.split(".")[0] == CODE}
    sys.path.insert(0, str(root))
    sys.dont_write_bytecode = True
    try:
        with in_folder(root):
            yield
    finally:
        sys.path[:], sys.dont_write_bytecode = path, write
        for name in [name for name in sys.modules if name.split(".")[0] == CODE]:
            del sys.modules[name]
        sys.modules.update(others)


def stray_reason(path: Path, root: Path) -> str:
    """Why a file does not belong in a bundle; empty for one that does.

    Example:
        >>> stray_reason(Path("b/scripts/__pycache__/keys.cpython-311.pyc"), Path("b"))
        'cache or log'
        >>> stray_reason(Path("b/scripts/keys.py"), Path("b"))
        ''
    """
    parts = path.relative_to(root).parts
    if path.is_symlink():
        return "link"
    if any(part.startswith(".") for part in parts):
        return "hidden"
    if any(part in STRAY_FOLDERS for part in parts[:-1]):
        return "cache or log"
    if len(parts) > 1 and parts[0] in STRAY_AT_TOP:
        return "data or output"
    return "leftover" if path.name.endswith(STRAY_ENDINGS) else ""


def styled_json(text: str, ascii: bool = False) -> str:
    """A JSON text as the zoo writes it, without a line end."""
    return json.dumps(json.loads(text), indent=4, ensure_ascii=ascii)


def style_code(folder: Path) -> None:
    """Format Python files in place by the zoo's isort and black.

    Raises:
        CheckError: one of them cannot; its last line says why.
    """
    with tempfile.TemporaryDirectory() as place:  # away from any other settings
        settings = Path(place) / "pyproject.toml"
        settings.write_text(ZOO_STYLE, encoding="utf-8")
        for tool in (["isort", "--quiet", "--settings-file"], ["black", "--quiet", "--config"]):
            command = [sys.executable, "-m", *tool, str(settings), str(folder.resolve())]
            result = subprocess.run(command, cwd=place, capture_output=True, text=True, check=False)
            if result.returncode:
                raise CheckError(f"{tool[0]}: {(result.stdout + result.stderr).strip().splitlines()[-1]}")


def leads_out(name: str, root: Path) -> bool:
    """Whether a path of ``large_files.yml`` would be written outside the bundle."""
    return not (root / name).resolve().is_relative_to(root.resolve())


def package_versions(metadata: Mapping[str, Any]) -> dict[str, str]:
    """Versions of all packages that a bundle's metadata name.

    Example:
        >>> package_versions({"monai_version": "1.6.1", "required_packages_version": {"fire": "0.7.1"}})
        {'monai': '1.6.1', 'fire': '0.7.1'}
    """
    versions = {package: str(metadata[key]) for key, package in OWN_VERSIONS.items() if key in metadata}
    for key in PACKAGE_LISTS:
        versions |= {name: str(number) for name, number in metadata.get(key, {}).items()}
    return versions


def _wrong_hash(path: Path, name: str, entry: Mapping[str, str]) -> list[str]:
    kind, expected = entry.get("hash_type", ""), entry.get("hash_val", "")
    if not kind or not expected:
        return [f"{name} has no hash_type and hash_val"]
    with path.open("rb") as file:
        found = hashlib.file_digest(file, kind).hexdigest()
    return [] if found == expected else [f"{name} is not the file that {LARGE_FILES} names: {kind} {found}"]


def _read(file: Path) -> ConfigParser:
    parser = ConfigParser()
    parser.read_config(str(file))
    return parser


def _complain(problems: Any) -> None:
    """Raise CheckError with what there is to say, if anything."""
    if found := list(problems):
        more = f" (and {len(found) - 5} more)" if len(found) > 5 else ""
        raise CheckError("; ".join(found[:5]) + more)


def _one_line(error: BaseException) -> str:
    """The innermost message of an error, short."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = " ".join(str(error).split())
    return text if len(text) < 300 else text[:300] + " ..."


if __name__ == "__main__":
    os.environ.setdefault("PYTHONDONTWRITEBYTECODE", "1")
    run_tool(check_bundle, OSError)
