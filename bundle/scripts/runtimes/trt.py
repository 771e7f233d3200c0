"""TensorRT for the convolutions of an ensemble, through MONAI's ``trt_compile``.

Each fold's encoder, decoder and HPV branch becomes a TensorRT engine; the rest (summaries, survival branch, averages
over folds) is small and runs in PyTorch, so outputs and callers are unchanged. Engines are built at their first use,
minutes each, and kept on disk for the next run.
"""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Any

import torch
from monai.networks import trt_compile

from scripts.model.ensemble import FoldEnsemble

PACKAGES = ("tensorrt", "polygraphy", "onnx")
PARTS = ("encoder", "decoder", "hpv")
# Options of the ONNX export. MONAI's default, torch's newer exporter, takes minutes for this network.
EXPORT = {"dynamo": False, "opset_version": 18}


class TensorRTMissing(RuntimeError):  # noqa: N818 - it is named for what the user sees
    """TensorRT, or a GPU for it, is missing."""


def compile_folds(
    network: FoldEnsemble, folder: str | os.PathLike[str], precision: str, checkpoint: str | os.PathLike[str]
) -> None:
    """Run the convolutions of ``network`` in TensorRT; its weights have to be loaded.

    Args:
        network: on a GPU, in evaluation mode; changed in place.
        folder: for the engines; those of older weights are rebuilt.
        precision: "fp32", or "tf32", "bf16", "fp16", which are faster and less exact.
        checkpoint: the file of the weights.

    Raises:
        TensorRTMissing: without a GPU or one of the packages; MONAI itself would continue without TensorRT.
    """
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing or not torch.cuda.is_available():
        why = f"{', '.join(missing)} not installed" if missing else "no CUDA device"
        raise TensorRTMissing(
            f"inference_trt.json cannot run here ({why}): it needs an NVIDIA GPU and `pip install tensorrt polygraphy "
            "onnx`; without that overlay, inference.json gives the same results"
        )
    Path(folder).mkdir(parents=True, exist_ok=True)
    arguments: dict[str, Any] = {
        "precision": precision,
        "timestamp": Path(checkpoint).stat().st_mtime,
        "export_args": dict(EXPORT),
    }
    trt_compile(network, str(Path(folder) / "engine"), args=arguments, submodule=engine_parts(network))


def engine_parts(network: FoldEnsemble) -> list[str]:
    """Names of the modules that become engines: those that the tasks have.

    Example:
        >>> from scripts.model.networks import MultitaskNet
        >>> engine_parts(FoldEnsemble(MultitaskNet(tasks=["seg", "surv"]), {}))
        ['folds.0.encoder', 'folds.0.decoder']
    """
    return [
        f"folds.{number}.{part}"
        for number, fold in enumerate(network.folds)
        for part in PARTS
        if getattr(fold, part) is not None
    ]
