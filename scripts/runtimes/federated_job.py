"""Make the job folder of a federated training, for NVIDIA FLARE: ``python scripts/runtimes federated_job``.

The folder holds the bundle's configs and code, the settings of the training and the weights that it starts from. It
holds no cases and no weights that were trained, unless ``--start`` names some.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from monai.bundle import ConfigParser
from monai.utils import set_determinism

from command_line import BUNDLE, NAME, ROOT, UsageError, run_tool

from experiments.experiment import ExperimentError, as_list, find_config, merge_configs, read_override
from scripts import keys
from scripts.cohorts.cohort import Cohort, CohortError, load_cohort
from scripts.model.ensemble import (
    CheckpointError,
    FoldEnsemble,
    load_weights,
    record,
    save_weights,
    saved_provenance,
)
from scripts.runtimes.federated import FEDERATED, NORMS
from scripts.training.configuration import ConfigurationError, check_numbers
from scripts.training.sampling import EventBatchSampler

FLARE = Path(__file__).with_name("federated_flare.py")
SITE = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")  # as NVIDIA FLARE names clients
FEWEST = 2
MOST_NEEDED = 100  # cases more than folds: with so many any protocol for one centre can divide them
SERVER, CLIENT, META = "app_server", "app_client", "meta.json"


def federated_job(
    out: str,
    dataset_dir: str,
    centres: str | Sequence[str] = "",
    sites: str | Sequence[str] = "",
    rounds: int = 24,
    local_epochs: int = 1,
    config_file: str | Sequence[str] = "",
    norms: str = "shared",
    min_centres: int = 0,
    wait_s: int = 600,
    start: str = "",
    **overrides: Any,
) -> None:
    """Write the job folder of a federated training. Any id of the configs is an option, such as --seed 1.

    Args:
        out: folder of the job, new or a job to be replaced.
        dataset_dir: a cohort of several centres, for the simulator, where each client takes the cases of one centre.
            With ``--sites`` the folder at each site: a path that is the same everywhere, or '$NAME', the variable of
            the environment that holds it at the site.
        centres: centres of the cohort that take part; all by default.
        sites: names of the clients, of hospitals that each hold their own cases only.
        rounds: how often weights are sent and averaged.
        local_epochs: epochs of each centre in a round.
        config_file: overlays on ``configs/train.json``, such as configs/demo.json.
        norms: shared, batch norms are averaged; local, they stay at each centre (FedBN).
        min_centres: centres that must answer in each round; all by default.
        wait_s: seconds that the others are waited for once so many have answered.
        start: a global ``model.pt`` to continue from, whose rounds count; by default random weights.
        **overrides: any other id of the configs.
    """
    if min(rounds, local_epochs) < 1 or wait_s < 0 or norms not in NORMS:
        raise UsageError("--rounds and --local_epochs are 1 or more, --wait_s 0 or more, --norms shared or local")
    overlays = [BUNDLE / find_config(name) for name in as_list(config_file)]
    files = [f"configs/{path.name}" for path in overlays]
    config, settings = read_settings([str(path) for path in overlays], overrides)
    cohort = None if sites else load_cohort(Path(dataset_dir).expanduser().resolve(), settings.get("ehr_csv"))
    names = [str(name) for name in as_list(sites)] if cohort is None else centres_of(cohort, as_list(centres))
    check_names(names, min_centres)
    needed = cases_needed(config)
    if cohort is not None:
        check_sizes(config, cohort, names, needed)
    done = rounds_of(start) if start else 0
    if done >= rounds:
        raise UsageError(f"{start} has {done} rounds already: --rounds is the number of all rounds, more than that")
    if start and norms != NORMS[0]:
        raise UsageError(
            "--start needs --norms shared: norms that are local are in the clients' folders of the old job"
        )
    ensemble = starting_model(config, start)
    folder = Path(out).expanduser().resolve()
    if not is_replaceable(folder):
        raise UsageError(f"{folder} holds something else than a job; name a new folder")
    place = str(Path(dataset_dir).expanduser().resolve()) if not sites else dataset_dir
    client = {"by_centre": not sites, "dataset_dir": place, "local_epochs": local_epochs, "norms": norms}
    client |= {"config_files": files, "settings": settings}
    facts = {"local_epochs": local_epochs, "norms": norms}
    server = {"min_centres": min_centres or len(names), "wait_s": wait_s, "facts": facts}
    server |= {"num_clients": len(names), "num_rounds": rounds - done, "start_round": done}
    workflow = {"workflows": [component("GlobalModel", server, "fedavg")]}
    executor = {"tasks": ["train", "validate"], "executor": component("CentreExecutor", client)}
    meta = {"name": NAME, "min_clients": min_centres or len(names), "resource_spec": {}}
    shutil.rmtree(folder, ignore_errors=True)
    write_json(folder / META, meta)  # first, so that what an interruption leaves can be replaced
    write_app(folder / SERVER, "config_fed_server.json", workflow, overlays)
    write_app(folder / CLIENT, "config_fed_client.json", {"executors": [executor]}, overlays)
    save_weights(ensemble, folder / SERVER / "custom" / "start.pt")
    write_json(folder / META, {**meta, "deploy_map": {SERVER: ["server"], CLIENT: names}})
    listed = ", ".join(names)
    print(f"{folder}: {len(names)} centres ({listed}), rounds {done + 1} to {rounds}; a centre needs {needed} cases")


def is_replaceable(folder: Path) -> bool:
    """Whether a folder is new, empty, or a job, whole or not."""
    if not folder.exists():
        return True
    if not folder.is_dir():
        return False
    try:
        return not any(folder.iterdir()) or json.loads((folder / META).read_text(encoding="utf-8"))["name"] == NAME
    except (OSError, ValueError, KeyError, TypeError):
        return False


def read_settings(files: Sequence[str], overrides: dict[str, Any]) -> tuple[ConfigParser, dict[str, Any]]:
    """The configs of a centre in one parser, and the settings of the training, checked."""
    parser, settings = merge_configs(["configs/train.json", *files, "configs/federated.json"], "", overrides)
    parser.update(settings)
    check_numbers(parser.get())
    return parser, settings


def centres_of(cohort: Cohort, chosen: Sequence[Any]) -> list[str]:
    """The centres of a cohort, or those chosen among them."""
    strange = sorted({str(name) for name in chosen} - set(cohort.centres))
    if strange:
        raise UsageError(f"no case of the centre {strange[0]}; the cohort has {', '.join(cohort.centres)}")
    return [str(name) for name in chosen] or cohort.centres


def fault_of_division(config: ConfigParser, cohort: Cohort) -> str:
    """Why a centre with these cases cannot divide them into training and validation, or fill a batch; "" if it can."""
    names = ("protocol", "num_folds", "fold", "seed")
    try:
        split = cohort.split(**{name: config.get_parsed_content(name) for name in names})
        EventBatchSampler(split.training, config.get_parsed_content("batch_size"), event_fraction=None)
    except ValueError as error:
        return str(error)
    return ""


def cases_needed(config: ConfigParser) -> int:
    """The least number of cases, with every label, that a centre can train and validate on.

    Raises:
        UsageError: none is enough: a number of folds, fold, protocol or batch size is wrong.
    """
    case = {keys.PATIENT_ID: "", keys.CENTRE: "", keys.SEG_KNOWN: True, keys.HPV_KNOWN: True, keys.SURV_KNOWN: False}
    fault = ""
    for count in range(1, config.get_parsed_content("num_folds") + MOST_NEEDED):
        fault = fault_of_division(config, Cohort("", [case] * count))
        if not fault:
            return count
    raise UsageError(f"no centre can train like that: {fault}")


def check_sizes(config: ConfigParser, cohort: Cohort, names: Sequence[str], needed: int) -> None:
    """Check that every centre has cases enough.

    Raises:
        CohortError: one has not; all of them are listed, with how many cases they have and need.
    """
    faults = {}
    for name in names:
        cases = [case for case in cohort.cases if case[keys.CENTRE] == name]
        if fault := fault_of_division(config, replace(cohort, cases=cases)):
            held = "1 case" if len(cases) == 1 else f"{len(cases)} cases"
            faults[name] = f"centre {name} has {held}, {needed} are needed: {fault}"
    if faults:
        others = ",".join(name for name in names if name not in faults)
        raise CohortError(
            "\n  ".join(["centres with too few cases:", *faults.values()])
            + f"\nLower --num_folds, or leave them out{f': --centres {others}' if ',' in others else ''}"
        )


def check_names(names: Sequence[str], min_centres: int) -> None:
    """Check the names of the clients, and how many must answer.

    Raises:
        UsageError: fewer than two, one twice, a name that NVIDIA FLARE does not take, or another number.
    """
    if len(names) < FEWEST or len(set(names)) < len(names):
        raise UsageError(f"at least {FEWEST} different centres are needed; got {', '.join(names)}")
    for name in names:
        if not SITE.fullmatch(name):
            raise UsageError(f"{name!r} cannot be the name of a client: letters, digits, - and _")
    if not 0 <= min_centres <= len(names) or min_centres == 1:
        raise UsageError(f"--min_centres is {FEWEST} to {len(names)}, or 0 for all; got {min_centres}")


def rounds_of(path: str) -> int:
    """The rounds that a global model was trained for."""
    facts = saved_provenance(path).get(FEDERATED)
    if not isinstance(facts, dict):
        raise UsageError(f"--start {path}: it was not trained federated")
    return int(facts["rounds"])


def component(name: str, options: dict[str, Any], identity: str = "") -> dict[str, Any]:
    """An entry of NVIDIA FLARE's configs."""
    return {**({"id": identity} if identity else {}), "path": f"{FLARE.stem}.{name}", "args": options}


def write_app(app: Path, name: str, config: dict[str, Any], overlays: Sequence[Path]) -> None:
    """Write the config of a server or client, and the code that it runs."""
    filters: dict[str, list] = {"task_data_filters": [], "task_result_filters": []}
    write_json(app / "config" / name, {"format_version": 2, **filters, **config})
    custom = app / "custom"
    for part in ("configs", "scripts"):
        shutil.copytree(BUNDLE / part, custom / part, ignore=shutil.ignore_patterns("__pycache__"))
    for path in (FLARE, ROOT / "LICENSE"):
        shutil.copy(path, custom)
    for path in overlays:  # of a user's own too
        shutil.copy(path, custom / "configs")


def starting_model(config: ConfigParser, start: str) -> FoldEnsemble:
    """The model that the training starts from, random weights or those of a checkpoint."""
    set_determinism(config.get_parsed_content("seed"))
    ensemble = config.get_parsed_content("network_def")
    set_determinism(None)
    record(ensemble, trained_on="nothing: random weights")
    return load_weights(ensemble, start) if start else ensemble


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a file of the job."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    errors = (ExperimentError, CohortError, CheckpointError, ConfigurationError, OSError)
    run_tool(federated_job, *errors, words=("out",), read=read_override)
