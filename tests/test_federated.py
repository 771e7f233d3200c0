"""Federated training: the job folder, what a centre sends, the global model.

What needs NVIDIA FLARE runs in its own environment: ``python scripts/run_checks.py --runtime federated``.
"""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from monai.fl.utils.exchange_object import ExchangeObject
from monai.utils import set_determinism

from conftest import BUNDLE, COLUMNS, make_tiny_cohort
from runtimes.federated_job import federated_job
from runtimes.federated_run import FederatedRunError, federated_run, simulate
from scripts.cohorts.cohort import CohortError
from scripts.model.ensemble import saved_provenance
from scripts.model.networks import MultitaskNet
from scripts.runtimes.federated import (
    METRICS,
    CentreClient,
    FederatedError,
    Update,
    check_update,
    norm_names,
    read_weights,
    validation_numbers,
    write_global_model,
)
from scripts.training.sampling import innermost

SETTINGS: dict[str, Any] = {
    "roi_size": [32, 32, 32],
    "spacing_mm": 8.0,
    "num_workers": 0,
    "device": "cpu",
    "batch_size": 2,
    "num_folds": 2,
}
A, B = "CHUM", "MDA"
FLARE = pytest.mark.skipif(
    os.environ.get("FEDERATED_ENVIRONMENT") != "1",
    reason="NVIDIA FLARE: python scripts/run_checks.py --runtime federated",
)
MONAI_WARNING = pytest.mark.filterwarnings("ignore:executing the bundle config:UserWarning")


@pytest.fixture(scope="module")
def centres(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two centres: CHUM with every label, MDA without HPV status and without events."""
    folder = make_tiny_cohort(tmp_path_factory.mktemp("centres"))
    other = make_tiny_cohort(tmp_path_factory.mktemp("other"), patients=4, first=7)
    table = folder / "HECKTOR_2025_Training_Task_3.csv"
    rows = list(csv.reader(table.read_text().splitlines()))
    for row in list(csv.reader((other / table.name).read_text().splitlines()))[1:]:
        patient = row[0].replace(A, B)
        for file in (other / "Task 1" / row[0]).iterdir():
            target = folder / "Task 1" / patient / file.name.replace(A, B)
            target.parent.mkdir(exist_ok=True)
            shutil.copy(file, target)
        rows.append([patient, "5", *row[2 : COLUMNS.index("Relapse")], "0", ""])
    with table.open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    return folder


@pytest.fixture(scope="module")
def job(centres: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("job") / "job"
    federated_job(str(folder), str(centres), rounds=2, **SETTINGS)
    return folder


@pytest.fixture
def client_of(centres: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., CentreClient]]:
    """Make a client; what its config changes in this process is undone."""
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)

    def make(centre: str = A, place: str = "output", **options: Any) -> CentreClient:
        settings = {**SETTINGS, **options.pop("settings", {})}
        output = tmp_path / centre / place
        client = CentreClient(str(BUNDLE), str(centres), str(output), settings=settings, centre=centre, **options)
        client.initialize()
        return client

    yield make
    set_determinism(None)


def start_of(job: Path) -> Path:
    return job / "app_server" / "custom" / "start.pt"


def one_round(client: CentreClient, weights: dict[str, np.ndarray], number: int = 0) -> Update:
    client.train(ExchangeObject(weights=dict(weights)), {"round": number})
    return client.update()


def averaged(weights: dict[str, np.ndarray], updates: list[Update]) -> dict[str, np.ndarray]:
    """FedAvg as NVIDIA FLARE computes it: each weight over those that sent it."""
    result = {}
    for name, value in weights.items():
        sent = [(update.cases, update.weights[name]) for update in updates if name in update.weights]
        total = sum(cases for cases, _ in sent)
        result[name] = value + (sum(cases / total * change for cases, change in sent) if sent else np.float32(0))
    return result


# --- the job folder ---------------------------------------------------------------------------------------------
def test_a_job_holds_code_configs_settings_and_random_weights_only(job: Path, centres: Path) -> None:
    meta = json.loads((job / "meta.json").read_text())
    assert meta["deploy_map"] == {"app_server": ["server"], "app_client": [A, B]}
    assert meta["min_clients"] == 2
    for app in ("app_server", "app_client"):
        for part in ("configs", "scripts"):
            there, own = (
                {p.relative_to(place) for p in (place / part).rglob("*") if p.is_file()}
                for place in (job / app / "custom", BUNDLE)
            )
            assert there == {path for path in own if "__pycache__" not in path.parts}
    files = {path.relative_to(job).as_posix() for path in job.rglob("*") if path.is_file()}
    others = {name for name in files if "/custom/configs/" not in name and "/custom/scripts/" not in name}
    assert others == {
        "meta.json",
        "app_client/config/config_fed_client.json",
        "app_client/custom/LICENSE",
        "app_client/custom/federated_flare.py",
        "app_server/config/config_fed_server.json",
        "app_server/custom/LICENSE",
        "app_server/custom/federated_flare.py",
        "app_server/custom/start.pt",
    }
    assert saved_provenance(start_of(job))["trained_on"] == "nothing: random weights"
    everything = b"".join((job / name).read_bytes() for name in others)
    assert b"CHUM-0" not in everything
    assert b"MDA-0" not in everything


def test_a_job_for_hospitals_names_no_path(tmp_path: Path) -> None:
    federated_job(
        str(tmp_path / "job"), "$PET_CT", sites="north,south", rounds=3, local_epochs=2, norms="local", **SETTINGS
    )
    client = json.loads((tmp_path / "job/app_client/config/config_fed_client.json").read_text())
    options = client["executors"][0]["executor"]["args"]
    assert (options["dataset_dir"], options["by_centre"], options["norms"]) == ("$PET_CT", False, "local")
    assert json.loads((tmp_path / "job/meta.json").read_text())["deploy_map"]["app_client"] == ["north", "south"]


def test_a_users_overlay_travels_with_the_job(tmp_path: Path, centres: Path) -> None:
    (tmp_path / "mine.json").write_text('{"spec#bn_eps": 0.001}')
    federated_job(str(tmp_path / "job"), str(centres), config_file=str(tmp_path / "mine.json"), **SETTINGS)
    assert (tmp_path / "job/app_client/custom/configs/mine.json").is_file()
    client = json.loads((tmp_path / "job/app_client/config/config_fed_client.json").read_text())
    assert client["executors"][0]["executor"]["args"]["config_files"] == ["configs/mine.json"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"centres": "CHUM,XXX"}, "no case of the centre XXX; the cohort has CHUM, MDA"),
        ({"centres": "CHUM"}, "at least 2 different centres are needed; got CHUM"),
        ({"sites": "a,a"}, "at least 2 different centres are needed; got a, a"),
        ({"sites": "a,b c"}, "'b c' cannot be the name of a client"),
        ({"min_centres": 3}, "--min_centres is 2 to 2, or 0 for all; got 3"),
        ({"min_centres": 1}, "--min_centres is 2 to 2, or 0 for all; got 1"),
        ({"rounds": 0}, "--rounds and --local_epochs are 1 or more"),
        ({"norms": "own"}, "--norms shared or local"),
        ({"bath_size": 2}, "is 'batch_size' meant?"),
        ({"start": "models/model.pt"}, "it was not trained federated"),
        ({"num_folds": 5}, "centre MDA has 4 cases, 5 are needed: 4 cases cannot be divided into 5 folds"),
        ({"num_folds": 9, "centres": "MDA,CHUM"}, "centre CHUM has 6 cases, 9 are needed"),
        ({"protocol": "full"}, "centre MDA has 4 cases, 3 are needed: protocol 'full' needs cases with mask and HPV"),
        ({"protocol": "ablation"}, "centre CHUM has 6 cases, 10 are needed"),
        ({"protocol": "leave_one_centre_out"}, "no centre can train like that: protocol 'leave_one_centre_out' needs"),
        ({"sites": "a,b", "batch_size": 1}, "no centre can train like that: batch_size 1 is too small"),
        ({"sites": "a,b", "num_folds": "two"}, "num_folds is 'two'"),
    ],
    ids=str,
)
def test_a_job_that_cannot_be_made(options: dict[str, Any], message: str, centres: Path, tmp_path: Path) -> None:
    if "start" in options:
        options = {"start": str(BUNDLE / options["start"])}
    with pytest.raises(ValueError, match=message.replace("(", r"\(").replace("?", r"\?")):
        federated_job(str(tmp_path / "job"), str(centres), **options)
    assert not (tmp_path / "job").exists()


@pytest.mark.parametrize(
    ("settings", "needed"),
    [({}, 3), ({"num_folds": 2}, 4), ({"num_folds": 7}, 7), ({"protocol": "full"}, 3), ({"protocol": "ablation"}, 10)],
    ids=str,
)
def test_a_job_says_how_many_cases_a_centre_needs(
    settings: dict[str, Any], needed: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    federated_job(str(tmp_path / "job"), "$PET_CT", sites="north,south", **{**SETTINGS, "num_folds": 3, **settings})
    assert f"a centre needs {needed} cases" in capsys.readouterr().out


def test_centres_with_too_few_cases_are_all_named(centres: Path, tmp_path: Path) -> None:
    with pytest.raises(CohortError) as raised:
        federated_job(str(tmp_path / "job"), str(centres), **{**SETTINGS, "num_folds": 7})
    lines = str(raised.value).splitlines()
    assert [line.strip().partition(",")[0] for line in lines[1:3]] == [
        "centre CHUM has 6 cases",
        "centre MDA has 4 cases",
    ]


@pytest.mark.parametrize(
    ("name", "text"), [("notes.txt", "mine"), ("meta.json", '{"name": "of something else"}'), ("meta.json", "[")]
)
def test_other_folders_are_not_replaced(centres: Path, tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match="holds something else than a job"):
        federated_job(str(tmp_path), str(centres))
    assert (tmp_path / name).read_text() == text


def test_a_job_that_was_not_written_to_its_end_is_not_run_and_can_be_replaced(
    centres: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = tmp_path / "job"

    def stop(*arguments: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("runtimes.federated_job.save_weights", stop)
        federated_job(str(job), str(centres), **SETTINGS)
    with pytest.raises(ValueError, match="is no whole job folder"):
        federated_run(str(job), str(tmp_path / "out"))
    federated_job(str(job), str(centres), **SETTINGS)
    assert json.loads((job / "meta.json").read_text())["deploy_map"]["app_client"] == [A, B]


# a Python that does what NVIDIA FLARE's simulator does in one round, and is stopped in the next
SIMULATOR = """#!{python}
import os, pathlib, signal, sys
folder = pathlib.Path("server/simulate_job")
if {stop} != "at once":
    folder.mkdir(parents=True)
    (folder / "model.pt").write_text("round 1")
    (folder / "history.json").write_text('[{{"round": 1}}]')
    log = pathlib.Path("CHUM/simulate_job/app_CHUM/output/centre.log")
    log.parent.mkdir(parents=True)
    log.write_text("ERROR scripts: the task failed\\nValueError: why\\nERROR scripts: reason: why\\n")
os.kill(os.getppid() if {stop} == "by the keyboard" else os.getpid(), signal.SIGINT)
"""


@pytest.fixture
def keyboard() -> Iterator[None]:
    """Ctrl-C interrupts, also where the tests run in the background, in which a shell has it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("keyboard")
@pytest.mark.parametrize("stop", ["by the keyboard", "by itself"])
def test_the_rounds_of_a_training_that_ends_early_are_kept(job: Path, tmp_path: Path, stop: str) -> None:
    """Also when the next run starts, which empties the workspace."""
    python, out = tmp_path / "python", tmp_path / "out"

    def run(how: str) -> None:
        python.write_text(SIMULATOR.format(python=sys.executable, stop=repr(how)))
        python.chmod(0o755)
        simulate(python, job, out)

    ends: Any = {"by the keyboard": pytest.raises(KeyboardInterrupt)}
    told = rf"ended early .*; CHUM: why; {out}/model.pt is of round 1, federated_job --start continues from it; see"
    with ends.get(stop, pytest.raises(FederatedRunError, match=told)):
        run(stop)
    assert (out / "model.pt").read_text() == "round 1"
    (out / "model.pt").unlink()  # as if this process had been killed, too
    with pytest.raises(FederatedRunError, match="ended early"):
        run("at once")
    assert (out / "model.pt").read_text() == "round 1"
    assert not list((out / "workspace").rglob("model.pt"))


# --- what is sent -----------------------------------------------------------------------------------------------
@MONAI_WARNING
@pytest.mark.parametrize(
    ("centre", "norms", "left_out"),
    [
        (A, "shared", set()),
        (B, "shared", {"hpv", "hpv_clinical", "burden"}),
        (A, "local", set()),
    ],
)
def test_a_centre_sends_weights_and_counted_metrics_only(
    centre: str,
    norms: str,
    left_out: set[str],
    job: Path,
    client_of: Callable[..., CentreClient],
    centres: Path,
    tmp_path: Path,
) -> None:
    weights = read_weights(start_of(job))
    client = client_of(centre, norms=norms)
    before = {name: value.clone() for name, value in client.network.state_dict().items()}
    evaluated = client.evaluate(ExchangeObject(weights=dict(weights)))
    update = one_round(client, weights)

    network = {k: value.clone() for k, value in client.network.state_dict().items() if value.is_floating_point()}
    own = norm_names(client.network) if norms == "local" else set()
    assert set(vars(update)) == {"weights", "metrics", "cases"}
    assert set(update.weights) == {name for name in network if name.split(".")[0] not in left_out} - own
    for name, value in update.weights.items():
        assert (type(value), value.dtype, value.shape) == (np.ndarray, np.float32, tuple(network[name].shape))
        np.testing.assert_allclose(weights[name] + value, network[name].numpy(), atol=1e-6)
    assert any(np.abs(value).max() > 0 for value in update.weights.values())
    count = {A: 3, B: 2}[centre]
    assert update.metrics == {"cases": count, "phantoms": 0}  # a mean of so few cases says too much about each
    assert evaluated.metrics == {}
    assert update.cases == count
    sent = repr((update.metrics, update.cases, list(update.weights)))
    assert "CHUM-0" not in sent
    assert "MDA-0" not in sent
    assert str(centres) not in sent
    if norms == "local":  # those received are not taken, those of the centre are trained, and in its own model
        assert any(not torch.equal(before[name], network[name]) for name in own if name in network)
        client.evaluate(ExchangeObject(weights={name: value * 2 for name, value in weights.items()}))
        client.save_own_model(tmp_path / "model.pt")
        for name, value in read_weights(tmp_path / "model.pt").items():
            np.testing.assert_array_equal(value, network[name] if name in own else weights[name] * 2)
        assert "federated, norms of this centre" in saved_provenance(tmp_path / "model.pt")["trained_on"]


NETWORK = MultitaskNet(clinical_features=2, survival_inputs=("burden",))


def weight(name: str) -> np.ndarray:
    return NETWORK.state_dict()[name].numpy().copy()


FIRST = next(name for name, value in NETWORK.state_dict().items() if value.is_floating_point())


@pytest.mark.parametrize(
    ("update", "message"),
    [
        (Update({"patients": np.zeros(3, np.float32)}, {}, 3), "'patients' is no weight of the network"),
        (Update({"../CHUM-001": weight(FIRST)}, {}, 3), "is no weight of the network"),
        (Update({FIRST: np.zeros((1, 7), np.float32)}, {}, 3), r"not float32"),
        (Update({FIRST: weight(FIRST).astype(np.float64)}, {}, 3), "is float64"),
        (Update({FIRST: weight(FIRST) * np.nan}, {}, 3), "values that are not finite"),
        (Update({FIRST: weight(FIRST).tolist()}, {}, 3), "is list"),  # type: ignore[dict-item]
        (Update({}, {"patient": 1.0}, 3), "'patient' is no metric that a centre sends"),
        (Update({}, {"dice": [0.7, 0.8, 0.9]}, 3), "dice is list, not a finite number"),  # type: ignore[dict-item]
        (Update({}, {"dice": "CHUM-001"}, 3), "dice is str, not a finite number"),  # type: ignore[dict-item]
        (Update({}, {"dice": float("nan")}, 3), "dice is float, not a finite number"),
        (Update({}, {}, ["CHUM-001"]), "the number of cases is a list"),  # type: ignore[arg-type]
    ],
)
def test_anything_else_is_not_sent(update: Update, message: str) -> None:
    with pytest.raises(FederatedError, match=message):
        check_update(update, NETWORK)


def test_weights_and_metrics_are_sent() -> None:
    update = Update({FIRST: weight(FIRST)}, dict.fromkeys(METRICS, 1), 30)
    assert check_update(update, NETWORK) is update


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ({"seg_known": 10, "hpv_known": 9, "surv_known": 20}, {"loss", "dice", "c_index"}),
        ({"seg_known": 0, "hpv_known": 20, "surv_known": 9}, {"loss", "balanced_accuracy"}),
    ],
)
def test_a_metric_of_few_cases_is_not_sent(flags: dict[str, int], expected: set[str]) -> None:
    cases = [{name: k < count for name, count in flags.items()} for k in range(20)]
    metrics = {"loss": 1.0, "dice": 0.5, "c_index": 0.7, "balanced_accuracy": 0.6, "best": 0.9}
    assert set(validation_numbers(metrics, cases)) == expected
    assert validation_numbers(metrics, cases[:9]) == {}
    assert validation_numbers({"loss": float("nan")}, cases) == {}


# --- training ---------------------------------------------------------------------------------------------------
@MONAI_WARNING
def test_one_centre_alone_is_ordinary_training_and_goes_on_after_a_restart(
    centres: Path, job: Path, client_of: Callable[..., CentreClient], run_bundle: Callable, tmp_path: Path
) -> None:
    """Two rounds of one epoch, by two processes, give the weights of two epochs of configs/train.json."""
    weights = start = read_weights(start_of(job))
    for number in (0, 1):
        client = client_of(A)  # a new one in each round
        weights = averaged(weights, [one_round(client, weights, number)])
    cohort = tmp_path / "alone"
    shutil.copytree(centres, cohort)
    for folder in (cohort / "Task 1").glob(f"{B}*"):
        shutil.rmtree(folder)
    options = [f"--{name}={value}" for name, value in SETTINGS.items()]
    places = ["--dataset_dir", str(cohort), "--output_dir", str(tmp_path / "output")]
    epochs = ["--epochs", "2", "--keep_epoch", "last", "--early_stop_patience", "0"]
    run_bundle("training", "--config_file", "configs/train.json", *options, *places, *epochs)
    ordinary = read_weights(tmp_path / "output" / "models" / "model.pt")
    moved = max(float(np.abs(ordinary[name] - start[name]).max()) for name in start)
    assert moved > 1e-4
    for name, value in ordinary.items():
        np.testing.assert_allclose(weights[name], value, atol=2e-5, err_msg=name)


@MONAI_WARNING
def test_the_global_model_is_a_checkpoint_of_the_bundle(
    centres: Path, job: Path, client_of: Callable[..., CentreClient], run_bundle: Callable, tmp_path: Path
) -> None:
    start = read_weights(start_of(job))
    updates = {centre: one_round(client_of(centre), start) for centre in (A, B)}
    path = tmp_path / "models" / "model.pt"
    facts = {"rounds": 1, "local_epochs": 1, "norms": "shared"}
    weights = averaged(start, list(updates.values()))
    write_global_model(path, start_of(job), weights, {name: update.metrics for name, update in updates.items()}, facts)
    found = read_weights(path)
    for name, value in weights.items():
        np.testing.assert_array_equal(found[name], value)
    one = {name for name in start if name.split(".")[0] == "hpv"}  # of the centre with HPV status alone
    for name in one:
        np.testing.assert_array_equal(found[name], start[name] + updates[A].weights[name])
    provenance = saved_provenance(path)
    expected = "5 cases, federated over 2 centres (CHUM, MDA), 1 rounds; research use only, not for clinical use"
    assert provenance["trained_on"] == expected
    assert provenance["federated"] == {**facts, "cases": {A: 3, B: 2}}
    configs = "['configs/train.json','configs/evaluate.json']"
    places = ["--dataset_dir", str(centres), "--ckpt_dir", str(path.parent), "--output_dir", str(tmp_path / "output")]
    run_bundle("evaluating", "--config_file", configs, *places, "--evaluate_on", "all", "--num_workers", "0")
    assert json.loads((tmp_path / "output" / "evaluation_all" / "metrics.json").read_text())["metrics"]


@MONAI_WARNING
@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"centre": "XXX"}, CohortError, "has no case of the centre 'XXX'; it has CHUM, MDA"),
        ({"norms": "own"}, FederatedError, "norms is one of shared, local"),
    ],
)
def test_a_centre_that_cannot_take_part(
    options: dict[str, Any], error: type[Exception], message: str, client_of: Callable[..., CentreClient]
) -> None:
    with pytest.raises((error, RuntimeError)) as raised:
        client_of(**options)
    cause = innermost(raised.value)  # MONAI wraps errors of configs
    assert isinstance(cause, error)
    assert message in str(cause)


def test_a_site_names_its_folder_in_its_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PET_CT", str(tmp_path / "here"))
    client = CentreClient(str(BUNDLE), "$PET_CT/hecktor", str(tmp_path))
    assert client.train_kwargs["dataset_dir"] == str(tmp_path / "here" / "hecktor")
    monkeypatch.delenv("PET_CT")
    with pytest.raises(FederatedError, match="set this variable of the environment"):
        CentreClient(str(BUNDLE), "$PET_CT/hecktor", str(tmp_path))


# --- NVIDIA FLARE -----------------------------------------------------------------------------------------------
INSPECTOR = '''
"""Writes down everything that this client sends."""
import json
from nvflare.apis.filter import Filter
import numpy


def described(value):
    if isinstance(value, dict):
        return {str(key): described(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [described(item) for item in value]
    if isinstance(value, numpy.ndarray):
        return f"array {value.dtype} {list(value.shape)}"
    return value if value is None or isinstance(value, (bool, int, float, str)) else f"object {type(value).__name__}"


class Inspector(Filter):
    def __init__(self, file):
        super().__init__()
        self.file = file

    def process(self, shareable, fl_ctx):
        with open(self.file, "a") as file:
            file.write(json.dumps({"client": fl_ctx.get_identity_name(), "sent": described(shareable)}) + "\\n")
        return shareable
'''


def flatten(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    yield from [(name, value)] if not isinstance(value, dict | list) else ()
    for key, item in items:
        yield from flatten(item, f"{name}/{key}")


@FLARE
def test_two_centres_in_the_simulator(centres: Path, tmp_path: Path, run_bundle: Callable) -> None:
    """Every message of a client is written down and looked at; the global model predicts."""
    job, out, messages = tmp_path / "job", tmp_path / "out", tmp_path / "messages.jsonl"
    federated_job(str(job), str(centres), rounds=2, **SETTINGS)
    (job / "app_client" / "custom" / "inspector.py").write_text(INSPECTOR)
    config = json.loads((job / "app_client/config/config_fed_client.json").read_text())
    entry = {"path": "inspector.Inspector", "args": {"file": str(messages)}}
    config["task_result_filters"] = [{"tasks": ["train", "validate"], "filters": [entry]}]
    (job / "app_client/config/config_fed_client.json").write_text(json.dumps(config))
    simulate(Path(sys.executable), job, out)

    start = read_weights(start_of(job))
    rows = [json.loads(line) for line in messages.read_text().splitlines()]
    assert sorted(row["client"] for row in rows) == [A] * 3 + [B] * 3  # two rounds and the final evaluation
    for row in rows:
        leaves = dict(flatten(row["sent"]))
        arrays = {name.rsplit("/", 1)[-1]: value for name, value in leaves.items() if str(value).startswith("array")}
        assert set(arrays) <= set(start)
        assert all(value == f"array float32 {list(start[name].shape)}" for name, value in arrays.items())
        assert not any(str(value).startswith("object") for value in leaves.values())
        assert b"CHUM-0" not in json.dumps(row).encode()
        assert b"MDA-0" not in json.dumps(row).encode()
        assert str(centres) not in json.dumps(row)
        numbers = {name.rsplit("/", 1)[-1] for name, value in leaves.items() if isinstance(value, float)}
        assert numbers <= set(METRICS)
    logs = [path for path in (out / "workspace").rglob("log*") if path.is_file()]  # which go to the server
    assert logs
    assert not [path for path in logs if b"CHUM-0" in path.read_bytes() or b"MDA-0" in path.read_bytes()]

    history = json.loads((out / "history.json").read_text())
    assert [entry["round"] for entry in history] == [1, 2, "final"]
    assert history[0]["centres"] == {A: {"cases": 3, "phantoms": 0}, B: {"cases": 2, "phantoms": 0}}
    provenance = saved_provenance(out / "model.pt")
    assert provenance["federated"] == {"rounds": 2, "local_epochs": 1, "norms": "shared", "cases": {A: 3, B: 2}}
    model = read_weights(out / "model.pt")
    assert all(np.isfinite(value).all() for value in model.values())
    assert max(float(np.abs(model[name] - start[name]).max()) for name in start) > 1e-4
    folder = tmp_path / "predictions"
    places = ["--dataset_dir", str(centres), "--ckpt_dir", str(out), "--output_dir", str(folder)]
    run_bundle("inference", "--config_file", "configs/inference.json", *places)
    assert len((folder / "predictions.csv").read_text().splitlines()) == 11

    more = tmp_path / "more"  # goes on where it ended
    federated_job(str(more), str(centres), rounds=3, start=str(out / "model.pt"), **SETTINGS)
    simulate(Path(sys.executable), more, out)
    assert saved_provenance(out / "model.pt")["federated"]["rounds"] == 3


@FLARE
@pytest.mark.parametrize(("needed", "rounds"), [(2, 1), (3, 0)], ids=["enough are left", "all are needed"])
def test_a_centre_that_fails(needed: int, rounds: int, centres: Path, tmp_path: Path) -> None:
    """Where enough others answer, training goes on without it; else it ends, and nothing of it is taken for a model.

    Its failure is no answer: without waiting for more than are needed (0 s), both others are in the average.
    """
    job, out = tmp_path / "job", tmp_path / "out"
    federated_job(str(job), str(centres), rounds=1, min_centres=2, wait_s=0, **SETTINGS)
    for file in ("meta.json", "app_server/config/config_fed_server.json"):  # a third client, without a case
        text = (job / file).read_text().replace('"MDA"', '"MDA", "XXX"').replace('"num_clients": 2', '"num_clients": 3')
        (job / file).write_text(text.replace('"min_centres": 2', f'"min_centres": {needed}'))
    if rounds:
        simulate(Path(sys.executable), job, out)
        assert set(json.loads((out / "history.json").read_text())[0]["centres"]) == {A, B}
    else:
        with pytest.raises(
            FederatedRunError, match=r"the training ended early .*XXX: .* has no case of the centre 'XXX'"
        ):
            simulate(Path(sys.executable), job, out)
        assert not (out / "model.pt").exists()
    log = (out / "workspace" / "XXX" / "simulate_job" / "app_XXX" / "output" / "centre.log").read_text()
    assert "has no case of the centre 'XXX'; it has CHUM, MDA" in log


def test_a_folder_that_is_no_job(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is no whole job folder: make one with"):
        federated_run(str(tmp_path), str(tmp_path / "out"))
