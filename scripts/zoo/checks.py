"""Checks that the MONAI model zoo runs on a bundle (its ``ci/verify_bundle.py`` and CONTRIBUTING.md), offline.

MONAI's own ``verify_metadata``, ``verify_net_in_out``, ``ckpt_export`` and ``check_properties`` do the work where they
exist. The checks of :data:`RUN_CODE` execute code of the bundle, in a process of their own; the others execute none.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import subprocess
import sys
import tempfile
import warnings
import zipfile
from collections.abc import Callable, Iterable
from contextlib import chdir
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from monai.apps.utils import check_hash
from monai.bundle import ConfigParser, ConfigWorkflow, verify_metadata

from command_line import ROOT

from scripts.cohorts.files import damaged_part
from zoo.contents import LARGE_BYTES, LARGE_FILES, LICENSE, METADATA, TORCHSCRIPT, WEIGHTS, stray_reason

SCHEMAS = ROOT.parent / "shared" / "data" / "schema"

REQUIRED = (METADATA, LICENSE, "configs/inference.json", "docs/README.md", "docs/data_license.txt")
NETWORK = "network_def"
PICKLE = b"\x80"  # its first byte


class CheckError(Exception):
    """A failed check; the message says why."""


class CheckSkippedError(Exception):
    """A check that cannot be made; the message says why."""


@dataclass(frozen=True)
class Bundle:
    """The directory of a bundle."""

    root: Path  # the directory
    schema: Path | None = None  # file of the metadata's schema; None: the one of that name in ../shared/data/schema

    @property
    def metadata(self) -> dict[str, Any]:
        """Content of ``configs/metadata.json``."""
        try:
            content = json.loads((self.root / METADATA).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise CheckError(f"{METADATA} cannot be read: {error}") from error
        if not isinstance(content, dict):
            raise CheckError(f"{METADATA} is a {type(content).__name__}, not an object")
        return content

    @property
    def large_files(self) -> dict[str, dict[str, str]]:
        """Entries of ``large_files.yml`` by path; empty without that file."""
        if not (self.root / LARGE_FILES).is_file():
            return {}
        entries = ConfigParser.load_config_file(str(self.root / LARGE_FILES)).get("large_files")
        if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
            raise CheckError(f"{LARGE_FILES} holds no list 'large_files' of path, url, hash_val, hash_type")
        return {str(entry.get("path", "")): entry for entry in entries}


# --- the checks, in the order they are made ---------------------------------------------------------------------------


def required_files(bundle: Bundle) -> None:
    """Metadata, licences, README, inference config, and weights or their address."""
    problems = [
        f"{name} is missing or empty"
        for name in REQUIRED
        if not (bundle.root / name).is_file() or not (bundle.root / name).read_bytes().strip()
    ]
    if not (bundle.root / WEIGHTS).is_file() and WEIGHTS not in bundle.large_files:
        problems.append(f"{WEIGHTS} is missing")
    _fail_if(problems)


def stray_files(bundle: Bundle) -> None:
    """No caches, hidden files, outputs or links."""
    _fail_if(
        f"{path.relative_to(bundle.root)} ({reason})"
        for path in sorted(bundle.root.rglob("*"))
        if (path.is_symlink() or path.is_file()) and (reason := stray_reason(path, bundle.root))
    )


def large_files(bundle: Bundle) -> None:
    """Files over 25 MB have an address and a hash; those that are present have this hash."""
    problems = []
    for name, entry in bundle.large_files.items():
        path, kind = bundle.root / name, entry.get("hash_type", "")
        if not entry.get("url"):
            problems.append(f"{name or 'an entry'} has no url")
        if not path.resolve().is_relative_to(bundle.root.resolve()):
            problems.append(f"{name} is outside the bundle")
        elif path.is_file() and not check_hash(path, entry.get("hash_val"), kind):
            problems.append(f"{name} does not have the {kind} hash of {LARGE_FILES}")
    problems += [
        f"{name} has {size / 1e6:.1f} MB, over 25: leave it out and name it in {LARGE_FILES}"
        for path in sorted(bundle.root.rglob("*"))
        if (size := path.stat().st_size) > LARGE_BYTES
        and (name := path.relative_to(bundle.root).as_posix()) not in bundle.large_files
    ]
    _fail_if(problems)


def weights(bundle: Bundle) -> None:
    """Files of weights are those of ``torch.save`` or ``torch.jit.save``, and have the checksums stored in them.

    Files of torch before 1.6, which start with a pickle, hold none.
    """
    problems = []
    for path in sorted(path for path in (bundle.root / "models").rglob("*") if path.suffix in (".pt", ".ts")):
        name = path.relative_to(bundle.root).as_posix()
        with path.open("rb") as file:
            if file.read(1) == PICKLE:
                continue
        try:
            damaged = damaged_part(path)
        except zipfile.BadZipFile as error:
            problems.append(f"{name} is cut off, or not a file of torch.save: {error}")
            continue
        if damaged:
            problems.append(f"{name} is damaged: {damaged} in it has another checksum")
    _fail_if(problems)


def metadata_schema(bundle: Bundle) -> None:
    """The metadata have a changelog of their version and follow MONAI's schema (``verify_metadata``)."""
    metadata = bundle.metadata
    number, changelog = metadata.get("version"), metadata.get("changelog")
    if not isinstance(changelog, dict) or number not in changelog:
        raise CheckError(f"the changelog in {METADATA} has no entry for version {number}")
    name = str(metadata.get("schema", "")).rsplit("/", 1)[-1]
    file = bundle.schema or SCHEMAS / name
    if not file.is_file():
        if bundle.schema:
            raise CheckError(f"no schema file at {file}")
        raise CheckSkippedError(f"no schema file: download {name or 'it'} and give it with --schema")
    with tempfile.TemporaryDirectory() as folder:  # MONAI downloads a schema only where none has that name
        copy = shutil.copy(file, Path(folder) / (name or file.name))
        verify_metadata(meta_file=str(bundle.root / METADATA), filepath=copy)


class DeclaredWorkflow(ConfigWorkflow):
    """A workflow whose properties are looked up in the config and not built: no data and no code are needed."""

    def _get_property(self, name: str, property: dict[str, Any]) -> Any:
        try:
            config_id = self._get_prop_id(name, property)
        except KeyError as error:
            raise AttributeError(name) from error  # check_properties then reports it as missing
        return None if config_id is None else self.parser[config_id]


def properties_of(kind: str) -> Callable[[Bundle], None]:
    """The check of the properties of the config ``kind``, "inference" or "train"."""

    def check(bundle: Bundle) -> None:
        config = f"configs/{kind}.json"
        if not (bundle.root / config).is_file():
            raise CheckSkippedError(f"no {config}")
        with chdir(bundle.root):  # MONAI's parser changes a # in a path, so paths are relative
            workflow = DeclaredWorkflow(config, METADATA, logging_file=False, workflow_type=kind, bundle_root=".")
            workflow.parser.parse(reset=True)
            wrong = workflow.check_properties() or []
        _fail_if(f"{kind} config: property '{name}' is missing or has another id" for name in wrong)

    check.__doc__ = f"The {kind} config has the properties of MONAI's workflow (``check_properties``)."
    return check


def network_in_out(bundle: Bundle) -> None:
    """Input and output of the network are as the metadata say (``verify_net_in_out``)."""
    run_monai(bundle, "verify_net_in_out", "--device", "cpu")


def torchscript(bundle: Bundle) -> None:
    """The weights can be exported as TorchScript (``ckpt_export``) and the file loads, as does one in the bundle."""
    if not (bundle.root / WEIGHTS).is_file():
        raise CheckSkippedError(f"{WEIGHTS} is absent: `python -m monai.bundle download_large_files` downloads it")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.ts"
        run_monai(bundle, "ckpt_export", "--filepath", str(file), "--ckpt_file", WEIGHTS)
        torch.jit.load(file)
    if (bundle.root / TORCHSCRIPT).is_file():
        torch.jit.load(bundle.root / TORCHSCRIPT)


def run_monai(bundle: Bundle, command: str, *options: str) -> None:
    """Run a command of ``monai.bundle`` on the bundle's network, in its folder."""
    files = ["--meta_file", METADATA, "--config_file", "configs/inference.json", "--bundle_root", "."]
    call = [sys.executable, "-m", "monai.bundle", command, "--net_id", NETWORK, *files, *options]
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1", "PYTHONPATH": ""}
    result = subprocess.run(call, cwd=bundle.root, env=environment, capture_output=True, text=True, check=False)
    if result.returncode:
        raise CheckError(cause_in(result.stderr) or f"exit code {result.returncode}")


def cause_in(stderr: str) -> str:
    """The error that a program ended with: of a chain of tracebacks the first, which caused the others."""
    found = re.search(r"^Traceback \(most recent call last\):\n(?: .*\n)+(\S.*)", stderr, re.MULTILINE)
    return found[1] if found else (stderr.strip().splitlines() or [""])[-1]


CHECKS: dict[str, Callable[[Bundle], None]] = {
    "required files": required_files,
    "no stray files": stray_files,
    "large files": large_files,
    "weights": weights,
    "metadata": metadata_schema,
    "properties of the inference config": properties_of("inference"),
    "properties of the train config": properties_of("train"),
    "network in and out": network_in_out,
    "TorchScript export": torchscript,
}
RUN_CODE = ("network in and out", "TorchScript export")
"""Checks that execute code of the bundle."""
NOT_RUN = "skipped: executes code of the bundle, needs --run_code"


# --- running them -----------------------------------------------------------------------------------------------------


def run_checks(bundle: Bundle, code: bool = True) -> dict[str, str]:
    """Make the checks and print a line for each.

    Args:
        bundle: what to check.
        code: make those of :data:`RUN_CODE` too: only for a bundle that you trust.

    Returns:
        Name of each check to ``"ok"``, ``"FAILED: why"`` or ``"skipped: why"``.
    """
    outcomes = {}
    for name, check in CHECKS.items():
        outcomes[name] = outcome_of(check, bundle) if code or name not in RUN_CODE else NOT_RUN
        result, colon, reason = outcomes[name].partition(":")
        print(f"{result:<8} {name}{colon}{reason}", flush=True)
    return outcomes


def outcome_of(check: Callable[[Bundle], None], bundle: Bundle) -> str:
    """The result of a check in one line."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)  # MONAI logs its arguments
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            check(bundle)
    except CheckSkippedError as reason:
        return f"skipped: {reason}"
    except CheckError as error:
        return f"FAILED: {error}"
    except Exception as error:  # an unreadable file or config is a fault of the bundle
        text = " ".join(f"{type(error).__name__}: {error.__cause__ or error}".split())
        return f"FAILED: {text[:300]}"
    finally:
        logging.disable(level)
    return "ok"


def _fail_if(problems: Iterable[str]) -> None:
    """Raise CheckError with the first problems, if there are any."""
    if found := list(problems):
        raise CheckError("; ".join(found[:5]) + (f" (and {len(found) - 5} more)" if len(found) > 5 else ""))
