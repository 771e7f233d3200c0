"""Build the bundle as the MONAI model zoo wants it: a directory and a zip.

``python scripts/package_bundle.py --version 0.2.0 --out dist`` writes ::

    dist/head_neck_pet_ct_multitask/               what a pull request to the zoo holds
    dist/head_neck_pet_ct_multitask_v0.2.0.zip     the whole bundle: unzip it anywhere, its docs/README.md says the rest

(``head_neck_pet_ct_multitask_of_phantoms_v0.2.0.zip`` where the weights are of phantoms.)

Files over 25 MB are only in the zip; ``large_files.yml`` in the directory says where they are (``--large_files_url``)
and what their sha256 is. Configs and code are written in the zoo's style. Guides that describe tools of the repository
say that these are not in the package; ``--repository`` names its address. Every check of ``check_bundle.py`` is passed
before anything appears under its name. The same bundle gives the same zip, byte for byte. Needs what
``tests/requirements.txt`` names.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import re
import shutil
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import InvalidVersion, Version

from command_line import ROOT, run_tool

from check_bundle import (
    CHECKS,
    CODE,
    LARGE_BYTES,
    LARGE_FILES,
    METADATA,
    WEIGHTS,
    Bundle,
    CheckError,
    large_files,
    package_versions,
    run_checks,
    stray_reason,
    style_code,
    styled_json,
)
from scripts.cohorts.files import write_text, written_whole
from scripts.model.ensemble import CheckpointError, name_of_release, saved_provenance

NAME = "head_neck_pet_ct_multitask"  # MONAI Label guesses a task from "classification", "deepedit", ... in a name
SOURCE = ROOT / "bundle"
REQUIREMENTS = ROOT / "requirements.txt"
NEEDED = {"black": "black", "isort": "isort", "yaml": "pyyaml"}  # module -> package
TOOL = re.compile(r"python scripts/(\w+)")
ZIP_TIME = (1980, 1, 1, 0, 0, 0)  # the earliest that a zip can say


class PackageError(ValueError):
    """The bundle cannot be packaged; the message says why and what to do."""


def package_bundle(
    version: str,
    out: str,
    changelog: str = "",
    large_files_url: str = "",
    bundle: str = str(SOURCE),
    requirements: str = str(REQUIREMENTS),
    schema: str = "",
    repository: str = "",
) -> None:
    """Write the bundle's directory and zip, and say what they hold.

    Args:
        version: of the package; metadata.json must have it, and its changelog, unless ``changelog`` is given.
        out: folder for both; neither may be there already.
        changelog: what this version changes; with ``version`` it goes into the packaged metadata.
        large_files_url: address of the folder from which files over 25 MB can be downloaded.
        bundle: the directory to package.
        requirements: the requirements that the metadata's versions have to meet.
        schema: file of the metadata's schema, as for check_bundle.py.
        repository: address of the repository, for the guides that describe its tools.
    """
    if missing := [package for module, package in NEEDED.items() if find_spec(module) is None]:
        raise PackageError(f"needs {', '.join(missing)}: pip install -r tests/requirements.txt")
    source, folder = Path(bundle).resolve(), Path(out).resolve()
    released = name_of_release(NAME, saved_provenance(source / WEIGHTS, {}))
    target, archive = folder / NAME, folder / f"{released}_v{version}.zip"
    for path in (target, archive):
        if path.exists():
            raise PackageError(f"{path} is there already: remove it or choose another --out")
    files = bundle_files(source)
    metadata = packaged_metadata(source, version, changelog)
    problems = version_problems(metadata, Path(requirements))
    if problems:
        raise PackageError(f"{source / METADATA}: " + "; ".join(problems))
    with written_directory(target) as building:
        copy_files(source, files, metadata, building)
        write_as_the_zoo(building)
        guides = name_repository(building, repository)
        large = {name: path for name in files if (path := building / name).stat().st_size > LARGE_BYTES}
        require_addresses(large, large_files_url)
        fail_if_unsound(building, schema)
        with written_whole(archive) as partial:
            write_zip(building, files, partial)
        leave_out(building, large, large_files_url)
    print(summary(target, archive, files, list(large)))
    if guides and not repository:
        print(f"{', '.join(guides)}: they say that tools are in the repository, but not where: --repository names it")


def bundle_files(source: Path) -> list[str]:
    """Files of the bundle relative to ``source``, sorted; what does not belong in one is left behind.

    Raises:
        PackageError: there are none.
    """
    found = (path for path in source.rglob("*") if path.is_file() and not stray_reason(path, source))
    files = sorted(path.relative_to(source).as_posix() for path in found)
    if METADATA not in files:
        raise PackageError(f"{source} is no bundle: it has no {METADATA}")
    return files


def packaged_metadata(source: Path, version: str, changelog: str) -> dict[str, Any]:
    """The metadata with the version that is asked for.

    Raises:
        PackageError: version or changelog disagree with it, or it is no version.
    """
    try:
        Version(version)  # a number on the command line would be 0.1 where 0.10 was typed
    except (InvalidVersion, TypeError):
        raise PackageError(f"--version {version!r} is no version such as 0.2.0") from None
    metadata = json.loads((source / METADATA).read_text(encoding="utf-8"))
    if changelog:
        known = metadata.get("changelog", {})
        if known.get(version, changelog) != changelog:
            raise PackageError(f"the changelog in {METADATA} says of {version} already: {known[version]}")
        # The newest first, as the zoo's bundles have it.
        return {**metadata, "version": version, "changelog": {version: changelog, **known}}
    if metadata.get("version") != version:
        raise PackageError(
            f"{METADATA} has version {metadata.get('version')}, not {version}: change it there, with a line in its "
            "changelog, or give that line with --changelog"
        )
    if version not in metadata.get("changelog", {}):
        raise PackageError(f"the changelog in {METADATA} says nothing of {version}: give it with --changelog")
    return metadata


def version_problems(metadata: Mapping[str, Any], requirements: Path) -> list[str]:
    """Where the metadata's package versions are not those that are required and installed, a line each."""
    named = {canonicalize_name(name): number for name, number in package_versions(metadata).items()}
    required = read_requirements(requirements)
    problems = [f"{name} is required and not named" for name in required if name not in named]
    for name, number in named.items():
        try:
            installed = Version(importlib.metadata.version(name)).public
        except importlib.metadata.PackageNotFoundError:
            problems.append(f"{name} {number} is not installed, so it was not tested with")
            continue
        if number != installed:
            problems.append(f"{name} is {number}, installed is {installed}")
        if name in required and not required[name].specifier.contains(number):
            problems.append(f"{name} is {number}, {requirements.name} wants {required[name].specifier}")
    return problems


def read_requirements(path: Path) -> dict[str, Requirement]:
    """The requirements of a requirements.txt without options, by canonical name."""
    lines = (line.split("#")[0].strip() for line in path.read_text(encoding="utf-8").splitlines())
    parsed = [Requirement(line) for line in lines if line]
    return {canonicalize_name(requirement.name): requirement for requirement in parsed}


@contextmanager
def written_directory(target: Path) -> Iterator[Path]:
    """A directory to fill that takes the name ``target`` when the block ends well, and is gone otherwise.

    Meanwhile it lies in a hidden folder beside ``target`` and has the same last name, since what a bundle's directory
    is called matters to its checks.
    """
    partial = target.parent / f".{os.getpid()}.{target.name}"
    building = partial / target.name
    building.mkdir(parents=True)
    try:
        yield building
        building.rename(target)
    finally:
        shutil.rmtree(partial)


def copy_files(source: Path, files: list[str], metadata: Mapping[str, Any], building: Path) -> None:
    """Copy the files, with the metadata in the place of the source's."""
    for name in files:
        (building / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / name, building / name)
    if metadata != json.loads((source / METADATA).read_text(encoding="utf-8")):
        write_text(building / METADATA, json.dumps(metadata, indent=4, ensure_ascii=False) + "\n")


def write_as_the_zoo(building: Path) -> None:
    """Write configs and code in the zoo's style, which its checks ask for.

    Raises:
        PackageError: a file is no JSON or no Python.
    """
    try:
        for file in sorted((building / "configs").glob("*.json")):
            write_text(file, styled_json(file.read_text(encoding="utf-8")) + "\n")
        style_code(building / CODE)
    except (ValueError, CheckError) as error:
        raise PackageError(f"the files cannot be written in the zoo's style: {error}") from error


def name_repository(building: Path, address: str) -> list[str]:
    """Say in every guide that describes tools of the repository that they are not in the package, and where they are.

    Returns:
        Names of the guides.
    """
    where = address or "ask for its address where you have the package from"
    note = f"The commands `python scripts/...` are tools of the repository, not of this package ({where})."
    guides = []
    for file in sorted((building / "docs").glob("*.md")):
        title, _, text = file.read_text(encoding="utf-8").partition("\n")
        if any(not (building / CODE / f"{tool}.py").is_file() for tool in TOOL.findall(text)):
            write_text(file, f"{title}\n\n{note}\n{text}")
            guides.append(file.relative_to(building).as_posix())
    return guides


def require_addresses(large: Mapping[str, Path], url: str) -> None:
    """Raise PackageError for large files that nobody could download."""
    if large and not url:
        raise PackageError(f"{', '.join(large)}: over 25 MB; say with --large_files_url where they can be downloaded")


def fail_if_unsound(building: Path, schema: str) -> None:
    """Make every check of check_bundle.py on the whole bundle.

    Raises:
        PackageError: one failed; its line has been printed.
    """
    names = tuple(name for name, check in CHECKS.items() if check is not large_files)  # they are left out afterwards
    outcomes = run_checks(Bundle(building, Path(schema).resolve() if schema else None), names)
    failed = [name for name, outcome in outcomes if outcome.startswith("FAILED")]
    if failed:
        raise PackageError(f"not packaged, since these checks failed: {', '.join(failed)}")


def write_zip(building: Path, files: list[str], archive: Path) -> None:
    """Zip the files under the bundle's name, the same bytes for the same files."""
    with zipfile.ZipFile(archive, "w") as stream:
        for name in files:
            entry = zipfile.ZipInfo(f"{NAME}/{name}", ZIP_TIME)
            entry.external_attr = 0o100644 << 16
            entry.create_system = 3  # Unix, wherever this runs
            entry.compress_type = zipfile.ZIP_DEFLATED
            stream.writestr(entry, (building / name).read_bytes(), compresslevel=9)


def leave_out(building: Path, large: Mapping[str, Path], url: str) -> None:
    """Put ``large_files.yml`` in the place of the large files; without any, nothing happens."""
    if not large:
        return
    entries = []
    for name, path in large.items():
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        address = f"{url.rstrip('/')}/{path.name}"
        entries.append({"path": name, "url": address, "hash_val": digest, "hash_type": "sha256"})
        path.unlink()
    import yaml

    write_text(building / f"{LARGE_FILES}.yml", yaml.safe_dump({LARGE_FILES: entries}, sort_keys=False))


def summary(target: Path, archive: Path, files: list[str], large: list[str]) -> str:
    """What was written, for people."""
    left_out = f", without {', '.join(large)} (see {LARGE_FILES}.yml)" if large else ""
    digest = hashlib.sha256(archive.read_bytes()).hexdigest()
    return "\n".join(
        [
            f"{target}: {len(files) - len(large)} files{left_out}",
            f"{archive}: {len(files)} files, {archive.stat().st_size / 1e6:.1f} MB, sha256 {digest}",
        ]
    )


if __name__ == "__main__":
    run_tool(package_bundle, PackageError, CheckpointError, OSError)
