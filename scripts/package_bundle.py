"""Package the bundle for the MONAI model zoo, or check the directory of a bundle.

``python scripts/package_bundle.py --version 0.10.0 --out dist`` writes ::

    dist/head_neck_pet_ct_multitask/               content of a pull request to the zoo
    dist/head_neck_pet_ct_multitask_v0.10.0.zip    the whole bundle, to unzip anywhere; see its docs/README.md

(``head_neck_pet_ct_multitask_of_phantoms_v0.10.0.zip`` if the weights were trained on phantoms.)

Files over 25 MB are only in the zip; ``large_files.yml`` in the directory gives their addresses (``--large_files_url``)
and SHA-256. Configs and code are formatted in the zoo's style. A note is added to guides that describe commands of the
repository, since these are not in the package; ``--repository`` gives its address. The outputs appear under their names
only if all checks of :mod:`zoo.checks` pass. The same bundle gives the same zip, byte for byte.

``python scripts/package_bundle.py --check DIR`` makes these checks on any bundle and writes nothing.
"""

from __future__ import annotations

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

from command_line import NAME, ROOT, UsageError, run_tool

from scripts.cohorts.files import sha256_of, write_text, written_whole
from scripts.model.errors import CheckpointError
from zoo.contents import CODE, LARGE_BYTES, LARGE_FILES, METADATA, WEIGHTS, stray_reason
from zoo.style import style_code, styled_json

SOURCE = ROOT / "bundle"
REQUIREMENTS = ROOT / "requirements.txt"
NEEDED = {"black": "black", "isort": "isort", "yaml": "pyyaml"}  # module -> package
OWN_VERSIONS = {"monai_version": "monai", "pytorch_version": "torch", "numpy_version": "numpy"}
PACKAGE_LISTS = ("required_packages_version", "optional_packages_version")
COMMAND = re.compile(r"python scripts/(\w+)")
ZIP_TIME = (1980, 1, 1, 0, 0, 0)  # the earliest that a zip can store


class PackageError(ValueError):
    """The bundle cannot be packaged; the message says why and what to do."""


def package_bundle(
    version: str = "",
    out: str = "",
    changelog: str = "",
    large_files_url: str = "",
    repository: str = "",
    bundle: str = str(SOURCE),
    schema: str = "",
    check: str = "",
    run_code: bool = False,
) -> None:
    """Write the directory and the zip of the bundle, or with --check only check a directory.

    Args:
        version: of the package; must be the version in metadata.json, unless changelog is given.
        out: folder for both outputs; neither may exist.
        changelog: changes of this version, added with the version to the packaged metadata.
        large_files_url: address of the folder from which files over 25 MB can be downloaded.
        repository: address of the repository, for guides that describe its commands.
        bundle: the directory to package.
        schema: file of the metadata's schema; by default looked for in ../shared/data/schema.
        check: directory of any bundle: print a line for each check, write nothing; exit code 1 if a check fails.
        run_code: with check, also make the checks that execute code of the bundle: only for bundles that you trust.
    """
    schema_file = Path(schema).resolve() if schema else None
    if check:
        if version or out:
            raise UsageError("--check DIR writes nothing: leave out --version and --out")
        check_directory(Path(check), schema_file, run_code)
        return
    if not version or not out:
        raise UsageError("give --version and --out, or --check DIR")
    if missing := [package for module, package in NEEDED.items() if find_spec(module) is None]:
        raise PackageError(f"needs {', '.join(missing)}: pip install -r tests/requirements.txt")
    from scripts.model.ensemble import name_of_release, saved_provenance  # imports torch, which takes seconds
    from zoo.checks import Bundle, run_checks

    source, folder = Path(bundle).resolve(), Path(out).resolve()
    provenance = saved_provenance(source / WEIGHTS) if (source / WEIGHTS).is_file() else {}
    released = name_of_release(NAME, provenance)
    target, archive = folder / NAME, folder / f"{released}_v{version}.zip"
    for path in (target, archive):
        if path.exists():
            raise PackageError(f"{path} exists: remove it or choose another --out")
    files = bundle_files(source)
    metadata = packaged_metadata(source, version, changelog)
    problems = version_problems(metadata, REQUIREMENTS)
    if problems:
        raise PackageError(f"{source / METADATA}: " + "; ".join(problems))
    with written_directory(target) as building:
        copy_files(source, files, metadata, building)
        write_as_the_zoo(building)
        guides = name_repository(building, repository)
        large = {name: path for name in files if (path := building / name).stat().st_size > LARGE_BYTES}
        if large and not large_files_url:
            raise PackageError(f"{', '.join(large)}: over 25 MB; give the address to download from: --large_files_url")
        name_large_files(building, large, large_files_url)
        outcomes = run_checks(Bundle(building, schema_file))
        if failed := [name for name, outcome in outcomes.items() if outcome.startswith("FAILED")]:
            raise PackageError(f"not packaged, since these checks failed: {', '.join(failed)}")
        with written_whole(archive) as partial:
            write_zip(building, files, partial)
        for path in large.values():
            path.unlink()
    print(summary(target, archive, files, list(large)))
    if guides and not repository:
        print(f"{', '.join(guides)} mention commands of the repository; --repository gives its address")


def check_directory(folder: Path, schema: Path | None, run_code: bool) -> None:
    """Print a line for each check of a bundle; ends the program with 1 if one fails."""
    from zoo.checks import Bundle, run_checks

    if not folder.is_dir():
        raise PackageError(f"{folder} is not a directory")
    outcomes = run_checks(Bundle(folder.resolve(), schema), code=run_code)
    failed = sum(outcome.startswith("FAILED") for outcome in outcomes.values())
    print(f"{failed} of {len(outcomes)} checks failed")
    if failed:
        raise SystemExit(1)


def bundle_files(source: Path) -> list[str]:
    """Files of the bundle relative to ``source``, sorted, without stray files."""
    found = (path for path in source.rglob("*") if path.is_file() and not stray_reason(path, source))
    files = sorted(path.relative_to(source).as_posix() for path in found)
    if METADATA not in files:
        raise PackageError(f"{source} is no bundle: it has no {METADATA}")
    return files


def packaged_metadata(source: Path, version: str, changelog: str) -> dict[str, Any]:
    """The metadata with the requested version.

    Raises:
        PackageError: version or changelog disagree with it, or it is no version.
    """
    try:
        Version(version)  # a number on the command line would be 0.1 where 0.10 was typed
    except (InvalidVersion, TypeError):
        raise PackageError(f"--version {version!r} is no version such as 0.2.0") from None
    try:
        metadata = json.loads((source / METADATA).read_text(encoding="utf-8"))
    except ValueError as error:
        raise PackageError(f"{source / METADATA} cannot be read: {error}") from error
    if not isinstance(metadata, dict):
        raise PackageError(f"{source / METADATA} is a {type(metadata).__name__}, not an object")
    if changelog:
        known = metadata.get("changelog", {})
        if known.get(version, changelog) != changelog:
            raise PackageError(f"the changelog in {METADATA} already has {version}: {known[version]}")
        # The newest first, as the zoo's bundles have it.
        return {**metadata, "version": version, "changelog": {version: changelog, **known}}
    if metadata.get("version") != version:
        raise PackageError(
            f"{METADATA} has version {metadata.get('version')}, not {version}: change it there, with a line in its "
            "changelog, or give that line with --changelog"
        )
    if version not in metadata.get("changelog", {}):
        raise PackageError(f"the changelog in {METADATA} has no entry for {version}: give it with --changelog")
    return metadata


def version_problems(metadata: Mapping[str, Any], requirements: Path) -> list[str]:
    """Package versions in the metadata that differ from the required or installed ones, a line each."""
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


def package_versions(metadata: Mapping[str, Any]) -> dict[str, str]:
    """Versions of all packages in a bundle's metadata.

    Example:
        >>> package_versions({"monai_version": "1.6.1", "required_packages_version": {"fire": "0.7.1"}})
        {'monai': '1.6.1', 'fire': '0.7.1'}
    """
    versions = {package: str(metadata[key]) for key, package in OWN_VERSIONS.items() if key in metadata}
    for key in PACKAGE_LISTS:
        versions |= {name: str(number) for name, number in metadata.get(key, {}).items()}
    return versions


def read_requirements(path: Path) -> dict[str, Requirement]:
    """The requirements of a requirements.txt without options, by canonical name."""
    lines = (line.split("#")[0].strip() for line in path.read_text(encoding="utf-8").splitlines())
    parsed = [Requirement(line) for line in lines if line]
    return {canonicalize_name(requirement.name): requirement for requirement in parsed}


@contextmanager
def written_directory(target: Path) -> Iterator[Path]:
    """A directory to fill that is renamed to ``target`` when the block succeeds, and removed otherwise.

    Until then it is in a hidden folder beside ``target``, under the same last name, which the checks depend on.
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
    """Copy the files; the metadata replace those of the source."""
    for name in files:
        (building / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / name, building / name)
    if metadata != json.loads((source / METADATA).read_text(encoding="utf-8")):
        write_text(building / METADATA, json.dumps(metadata, indent=4, ensure_ascii=False) + "\n")


def write_as_the_zoo(building: Path) -> None:
    """Format configs and code in the zoo's style.

    Raises:
        PackageError: a file cannot be read as what it is; the message names it.
    """
    try:
        for file in sorted((building / "configs").glob("*.json")):
            write_text(file, styled_json(file.read_text(encoding="utf-8")) + "\n")
        for file in sorted((building / CODE).rglob("*.py")):
            compile(file.read_bytes(), file.name, "exec")  # the formatters name no file
    except (ValueError, SyntaxError) as error:
        raise PackageError(f"{file.relative_to(building)} cannot be read: {error}") from error
    try:
        style_code(building / CODE)
    except ValueError as error:
        raise PackageError(f"the files cannot be formatted in the zoo's style: {error}") from error


def name_repository(building: Path, address: str) -> list[str]:
    """Add a note to every guide that mentions commands of the repository, and give the names of these guides."""
    where = address or "ask for its address where you have the package from"
    note = f"The commands `python scripts/...` are tools of the repository, not of this package ({where})."
    guides = []
    for file in sorted((building / "docs").glob("*.md")):
        title, _, text = file.read_text(encoding="utf-8").partition("\n")
        if any(not (building / CODE / f"{tool}.py").is_file() for tool in COMMAND.findall(text)):
            write_text(file, f"{title}\n\n{note}\n{text}")
            guides.append(file.relative_to(building).as_posix())
    return guides


def write_zip(building: Path, files: list[str], archive: Path) -> None:
    """Zip the files under the bundle's name, the same bytes for the same files."""
    with zipfile.ZipFile(archive, "w") as stream:
        for name in files:
            entry = zipfile.ZipInfo(f"{NAME}/{name}", ZIP_TIME)
            entry.external_attr = 0o100644 << 16
            entry.create_system = 3  # Unix, wherever this runs
            entry.compress_type = zipfile.ZIP_DEFLATED
            stream.writestr(entry, (building / name).read_bytes(), compresslevel=9)


def name_large_files(building: Path, large: Mapping[str, Path], url: str) -> None:
    """Write ``large_files.yml`` with address and SHA-256 of the large files, if there are any."""
    if not large:
        return
    import yaml

    entries = [
        {"path": name, "url": f"{url.rstrip('/')}/{path.name}", "hash_val": sha256_of(path), "hash_type": "sha256"}
        for name, path in large.items()
    ]
    write_text(building / LARGE_FILES, yaml.safe_dump({"large_files": entries}, sort_keys=False))


def summary(target: Path, archive: Path, files: list[str], large: list[str]) -> str:
    """The outputs and their sizes, to print."""
    left_out = f", without {', '.join(large)} (see {LARGE_FILES})" if large else ""
    size = archive.stat().st_size / 1e6
    return (
        f"{target}: {len(files) - len(large)} files{left_out}\n"
        f"{archive}: {len(files)} files, {size:.1f} MB, sha256 {sha256_of(archive)}"
    )


if __name__ == "__main__":
    run_tool(package_bundle, PackageError, CheckpointError, OSError)
