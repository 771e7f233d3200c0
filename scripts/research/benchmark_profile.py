"""Where the time goes: seconds of each part of one patient, and of each kind of operation of network and training.

For ``benchmark --stages profile_patient,profile_network,profile_training``: one run of each, so that only the
shares are meaningful, not differences of a hundredth.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch.profiler import ProfilerActivity, profile, record_function

from research import benchmark_stages as at

# the kinds of torch's own operations, by what their names begin with; the first that fits counts
KINDS = {
    "convolutions, backward": ("aten::convolution_backward",),
    "convolutions, forward": ("aten::mkldnn_conv", "aten::slow_conv", "aten::_slow_conv", "aten::conv"),
    "batch norm": ("aten::native_batch_norm", "aten::batch_norm"),
    "ReLU and sums": ("aten::threshold", "aten::clamp", "aten::relu", "aten::add", "aten::sigmoid"),
    "pooling, up-sampling": ("aten::max_pool", "aten::avg_pool", "aten::upsample"),
    "copies, concatenation": ("aten::copy", "aten::cat", "aten::fill", "aten::zero"),
    "optimizer": ("optimizer", "aten::_fused_adam"),
}
OTHER = "all else"
IMPORTS = ("torch", "monai", "ignite", "nibabel", "scipy.ndimage")


def profile_patient(setup: at.Setup) -> dict[str, float]:
    """Seconds of each transform, of the network and of the writer, when the patient is predicted again.

    Reading ahead is off, so that nothing of another patient falls into the parts.
    """
    parser = at.bundle(setup)
    parser["evaluator#val_data_loader#_target_"] = "torch.utils.data.DataLoader"
    parser.get_parsed_content("initialize")
    evaluator, writer = parser.get_parsed_content("evaluator"), parser.get_parsed_content("handlers#0")
    spent: dict[str, float] = defaultdict(float)
    for chain in ("preprocessing", "postprocessing"):
        compose = parser.get_parsed_content(chain)
        compose.transforms = [timed(step, type(step).__name__, spent) for step in compose.transforms]
    evaluator.inferer = timed(evaluator.inferer, "network", spent)
    writer.write_patient = timed(writer.write_patient, "writing", spent)
    for _ in range(2):
        spent.clear()
        start = time.perf_counter()
        with at.open_silence():
            evaluator.run()
        spent["whole"] = time.perf_counter() - start
    rest = 2 * spent["whole"] - sum(spent.values())
    return {**spent, OTHER: rest}


def timed(call: Callable[..., Any], name: str, spent: dict[str, float]) -> Callable[..., Any]:
    """``call`` with its seconds added to ``spent[name]``."""

    def run(*args: Any, **options: Any) -> Any:
        start = time.perf_counter()
        try:
            return call(*args, **options)
        finally:
            spent[name] += time.perf_counter() - start

    return run


def profile_network(setup: at.Setup) -> dict[str, float]:
    """Seconds of each kind of operation of one case."""
    return by_kind(at.network_run(1)(setup))


def profile_training(setup: at.Setup) -> dict[str, float]:
    """Seconds of each kind of operation of a training step."""
    return by_kind(at.training()(setup))


def by_kind(run: at.Run) -> dict[str, float]:
    """Seconds of each of :data:`KINDS` in the third run, as torch's profiler tells them, longest first."""
    for _ in range(2):
        run()
    with profile(activities=[ProfilerActivity.CPU]) as found, record_function("whole"):
        run()
    spent: dict[str, float] = defaultdict(float)
    for event in found.key_averages():
        if event.key == "whole":
            spent["whole"] = event.cpu_time_total / 1e6
            spent[OTHER] += event.self_cpu_time_total / 1e6
            continue
        name = event.key.lower()
        kind = next((kind for kind, starts in KINDS.items() if name.startswith(starts)), OTHER)
        spent[kind] += event.self_cpu_time_total / 1e6
    return dict(sorted(spent.items(), key=lambda item: -item[1]))


# --- start-up ---------------------------------------------------------------------------------------------------------
def startup(setup: at.Setup) -> dict[str, float]:
    """Seconds from the command to the first patient being read, and what imports alone take."""
    images, models, out = setup.folder / "cohort", setup.models(1), setup.folder / "startup"
    predict = [str(at.BUNDLE.parent / "scripts" / "predict.py"), str(images), str(out / "a"), "--ckpt_dir", str(models)]
    bundle = ["-m", "monai.bundle", "run", "inference", "--config_file", "configs/inference.json"]
    bundle += ["--dataset_dir", str(images), "--ckpt_dir", str(models), "--output_dir", str(out / "b")]
    found = {
        "predict_s": _until_started([*predict, "--report", "False", "--force", "True"], out / "a"),
        "monai_bundle_s": _until_started([*bundle, "--force", "True"], out / "b"),
    }
    for name in IMPORTS:
        found[f"import_{name}_s"] = _seconds([sys.executable, "-c", f"import {name}"])
    return found


def _until_started(command: list[str], out: Path) -> float:
    whole = min(_seconds([sys.executable, *command]) for _ in range(2))  # the first may have to read from disk
    said = json.loads((out / at.PATIENT / "prediction.json").read_text(encoding="utf-8"))
    return whole - float(said["seconds"]["total"])


def _seconds(command: list[str]) -> float:
    start = time.perf_counter()
    done = subprocess.run(command, cwd=at.BUNDLE, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr[-2000:]}")
    return time.perf_counter() - start
