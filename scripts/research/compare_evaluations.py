"""Networks on the same patients: metrics of groups of evaluations, such as seeds of a training, and their differences.

``python scripts/research compare_evaluations --groups "pooled=A/evaluation_all,B/evaluation_all other=C,D"`` reads
the ``cases.csv`` that the bundle's ``evaluating`` wrote into each folder. It prints for each group the mean over its
networks, with an interval over patients and the value of each network, and the differences to the first group; the
first network of a group is compared with the first of the other, and so on. Intervals are as in ``study_learning``.
"""

from __future__ import annotations

import shlex
from pathlib import Path

from command_line import run_tool

from experiments.evidence import CASES_FILE, read_cases
from experiments.experiment import ExperimentError
from research.study_report import COLUMNS, Cells, difference, markdown_rows, metric, shown_difference
from scripts import keys
from scripts.evaluation.bootstrap import BOOTSTRAP_SAMPLES

SHOWN = [name for name in COLUMNS if name != "balanced_accuracy_chosen"]  # it needs the training cases


def compare_evaluations(groups: str, samples: int = BOOTSTRAP_SAMPLES) -> None:
    """Print metrics of groups of evaluations of the same patients, and their differences to the first group.

    Args:
        groups: NAME=FOLDER,FOLDER NAME=FOLDER,FOLDER (in quotes): folders that hold a cases.csv, one for each network.
        samples: draws of the bootstrap over patients, the networks fixed.
    """
    cells = {name: read_group(name, folders) for name, folders in parse_groups(groups).items()}
    head = ["group", "networks", *(COLUMNS[name] for name in SHOWN)]
    rows = [[name, str(len(found)), *(cell(found, one, samples) for one in SHOWN)] for name, found in cells.items()]
    print("\n".join(markdown_rows([head]) + markdown_rows(rows, head=0)), end="\n\n")
    first, *others = cells
    for name in others:
        found = {one: shown_difference(difference(cells[name], cells[first], one, samples, 0)) for one in SHOWN}
        print("\n".join(f"{name} - {first}, {COLUMNS[one]}: {value}" for one, value in found.items()))
    print(keys.RESEARCH_USE_ONLY)


def parse_groups(text: str) -> dict[str, list[Path]]:
    """Folders by the name of their group.

    Raises:
        ExperimentError: a group has no name or no folder, or a name comes twice.

    Example:
        >>> parse_groups("a=x,y b=z")
        {'a': [PosixPath('x'), PosixPath('y')], 'b': [PosixPath('z')]}
    """
    groups: dict[str, list[Path]] = {}
    for part in shlex.split(text):
        name, _, folders = part.partition("=")
        paths = [Path(folder.strip()).expanduser() for folder in folders.split(",") if folder.strip()]
        if not name.strip() or not paths or name.strip() in groups:
            raise ExperimentError(f"--groups is NAME=FOLDER,FOLDER NAME=FOLDER with each name once; got {part!r}")
        groups[name.strip()] = paths
    if not groups:
        raise ExperimentError("--groups is empty: give NAME=FOLDER,FOLDER NAME=FOLDER")
    return groups


def read_group(name: str, folders: list[Path]) -> Cells:
    """The cases of each network, by its number in the group.

    Raises:
        ExperimentError: there is no table of cases, or networks of the group have different patients.
    """
    cells = {f"network {k}": read_cases(folder / CASES_FILE) for k, folder in enumerate(folders)}
    cells = {number: table.set_index("PatientID").sort_index() for number, table in cells.items()}
    for folder, table in zip(folders, cells.values(), strict=True):
        if not table.index.equals(cells["network 0"].index):
            raise ExperimentError(f"{name}: {folder} has other patients than {folders[0]}")
    return cells


def cell(cells: Cells, name: str, samples: int) -> str:
    """Mean [interval] (each network), and counts."""
    found = metric(cells, name, samples, 0)
    if found["value"] is None:
        return "-"
    each = ", ".join(f"{value:.3f}" for value in found["networks"].values())
    events = f", {found['events']} relapses" if "events" in found else ""
    return (
        f"{found['value']:.3f} [{found['low']:.3f}, {found['high']:.3f}] ({each}); {found['patients']} patients{events}"
    )


if __name__ == "__main__":
    run_tool(compare_evaluations, ExperimentError, OSError)
