"""Export a trained model as TorchScript and ONNX; each file is compared with PyTorch before it is kept.

``python scripts/runtimes export --out exports`` writes ``exports/head_neck_pet_ct_multitask.ts`` and ``.onnx`` (with
``_of_phantoms`` in the name if the weights were trained on phantoms) from ``bundle/models/model.pt``. ONNX needs
``pip install onnx onnxruntime``. Inputs are ``image`` (B, 2, R, R, R) and ``clinical`` (B, F), as ``inference.json``
prepares them; outputs, float32:

    seg_prob (B, 1, R, R, R), hpv_prob (B,), log_hazard (B,)     means over the folds
    class_prob (B, 2, R, R, R)                                   likewise, of a model of GTVp and GTVn
    hpv_prob_folds, log_hazard_folds (B, K)                      of each fold

without those of tasks that the model does not have. Settings, provenance and the research-use notice are stored in the
file. A phantom and, where available, a real case are preprocessed by the bundle and predicted with the file and with
PyTorch; a file whose mask or scores differ is not kept.

TensorRT needs no file: ``configs/inference_trt.json`` builds its engines on the machine where it runs.
"""

from __future__ import annotations

import json
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from command_line import BUNDLE, NAME, ROOT, run_tool

from phantom.cohort import write_cohort
from runtimes.inference import inference_config
from scripts import keys
from scripts.cohorts.cohort import cases_to_predict, inference_cases
from scripts.cohorts.files import written_whole
from scripts.cohorts.scans import find_scans
from scripts.cohorts.tables import read_tables
from scripts.cohorts.thresholds import label_map
from scripts.model.ensemble import (
    FoldEnsemble,
    describe_model,
    load_weights,
    name_of_release,
)
from scripts.model.errors import CheckpointError, SettingsMismatch
from scripts.model.networks import class_probabilities
from scripts.training.engine import EnsembleInferer

REAL_CASES = ROOT.parent / "shared" / "data" / "sts_petct" / "images"

OPSET = 18
INPUTS = (keys.IMAGE, keys.CLINICAL)
SCORES = (keys.HPV_PROB, keys.LOG_HAZARD, keys.HPV_PROB_FOLDS, keys.LOG_HAZARD_FOLDS)
OUTPUTS = (keys.SEG_PROB, *SCORES, keys.CLASS_PROB)
LEAST_DICE = 0.999
TOLERANCE = 1e-3  # relative, of every score
ROUNDING = 1e-6  # absolute, for scores near 0, where float32 rounds more than that relatively

Run = Callable[[Tensor, Tensor], Mapping[str, Tensor]]


class ExportError(RuntimeError):
    """The model cannot be exported, or the exported file differs from it; the message says why."""


class AllHeads(nn.Module):
    """All heads of a :class:`scripts.model.ensemble.FoldEnsemble` from tensors alone, as exporters want it."""

    def __init__(self, ensemble: FoldEnsemble) -> None:
        super().__init__()
        self.folds = ensemble.folds
        self.names = OUTPUTS  # TorchScript sees attributes, not this module's constants

    def forward(self, image: Tensor, clinical: Tensor) -> dict[str, Tensor]:
        """Image (B, 2, R, R, R) and coded clinical values (B, F) -> the outputs that this module's head names."""
        masks: list[Tensor] = []
        classes: list[Tensor] = []
        hpv: list[Tensor] = []
        hazards: list[Tensor] = []
        for fold in self.folds:
            class_logits, hpv_logit, log_hazard, _ = fold.heads(image, clinical)  # type: ignore[operator]
            if class_logits is not None:
                seg_logits = fold.union(class_logits.float())  # type: ignore[operator]
                masks.append(torch.sigmoid(seg_logits))
                if fold.seg_classes > 1:  # type: ignore[operator]
                    classes.append(class_probabilities(seg_logits, class_logits.float()))
            if hpv_logit is not None:
                hpv.append(torch.sigmoid(hpv_logit.float()))
            if log_hazard is not None:
                hazards.append(log_hazard.float())
        outputs: dict[str, Tensor] = {}
        if len(masks) > 0:
            outputs[self.names[0]] = torch.stack(masks).mean(dim=0)
        if len(classes) > 0:
            outputs[self.names[5]] = torch.stack(classes).mean(dim=0)
        if len(hpv) > 0:
            outputs[self.names[1]] = torch.stack(hpv).mean(dim=0)
            outputs[self.names[3]] = torch.stack(hpv, dim=1)
        if len(hazards) > 0:
            outputs[self.names[2]] = torch.stack(hazards).mean(dim=0)
            outputs[self.names[4]] = torch.stack(hazards, dim=1)
        return outputs


@dataclass(frozen=True)
class Case:
    """A preprocessed case and its outputs in PyTorch."""

    name: str  # for the report
    image: Tensor  # (1, 2, R, R, R)
    clinical: Tensor  # (1, F)
    expected: Mapping[str, Tensor]  # outputs of the ensemble in float32


@dataclass(frozen=True)
class Difference:
    """How far an exported model is from PyTorch on a case."""

    case: str  # its name
    voxels: int  # of PyTorch's mask in the box
    # of the two masks, 1.0 where both are empty; the lower one of two classes; None without the segmentation task
    dice: float | None
    scores: Mapping[str, float]  # largest relative difference of each score, over the folds
    wrong: tuple[str, ...]  # what is outside the limits, empty where all is well


def export(
    out: str, model: str = str(BUNDLE / "models" / "model.pt"), formats: str = "torchscript,onnx", cases: str = ""
) -> None:
    """Export a model and print how far each file is from PyTorch.

    Args:
        out: folder for the files.
        model: the weights.
        formats: some of torchscript, onnx.
        cases: folder with scans in the HECKTOR layout, whose first usable case is compared in addition to a phantom; by
            default ../shared/data/sts_petct/images, if it exists.
    """
    chosen = [name.strip() for name in (formats.split(",") if isinstance(formats, str) else formats)]
    unknown = sorted(set(chosen) - set(FORMATS))
    if unknown or not chosen:
        raise ExportError(f"formats are some of {', '.join(FORMATS)}; got {formats}")
    ensemble = load_model(Path(model))
    print(f"{model}\n  {describe_model(ensemble)}\n  {keys.RESEARCH_USE_ONLY}")
    prepared = comparison_cases(ensemble, Path(model), cases)
    for name in chosen:
        ending, write, open_file = FORMATS[name]
        path = Path(out) / f"{name_of_release(NAME, ensemble.provenance)}{ending}"
        with written_whole(path) as partial:
            write(AllHeads(ensemble).eval(), prepared[0], about(ensemble), partial)
            differences = [compare(case, open_file(partial)) for case in prepared]
            print(report(name, path, partial.stat().st_size, differences))
            refuse_if_wrong(name, differences)


# --- the model and the cases ------------------------------------------------------------------------------------------


def load_model(path: Path) -> FoldEnsemble:
    """The ensemble of a checkpoint, on CPU in float32, as ``inference.json`` builds it."""
    parser = inference_config(path, device="cpu", amp=False)
    return load_weights(parser.get_parsed_content("network_def"), path).eval()


def comparison_cases(ensemble: FoldEnsemble, model: Path, folder: str = "") -> list[Case]:
    """A phantom and a real case, prepared as for inference.

    Args:
        ensemble: gives the expected outputs.
        model: its checkpoint, whose settings decide the preprocessing.
        folder: of the real cases; empty: those of ``../shared`` where they are.
    """
    with tempfile.TemporaryDirectory() as phantoms:
        write_cohort(Path(phantoms), cases=1)
        prepared = [prepare(ensemble, model, phantoms, "phantom", tables=True)]
    if folder or REAL_CASES.is_dir():
        prepared.append(prepare(ensemble, model, folder or str(REAL_CASES), "real case", tables=bool(folder)))
    else:
        print(f"  no real case at {REAL_CASES}: compared on a phantom alone (--cases names a folder)")
    return prepared


def prepare(ensemble: FoldEnsemble, model: Path, folder: str, kind: str, tables: bool) -> Case:
    """The first case of a folder that can be prepared."""
    # Scans that quality control rejects can still be used to compare two runtimes.
    parser = inference_config(model, device="cpu", amp=False, dataset_dir=folder, force=True)
    preprocessing, reasons = parser.get_parsed_content("preprocessing"), []
    for case in cases_in(folder, parser.get_parsed_content("spec").clinical_features, tables):
        patient = case[keys.PATIENT_ID]
        if case[keys.PROBLEM]:
            reasons.append(f"{patient}: {case[keys.PROBLEM]}")
            continue
        try:
            item = preprocessing(case)
        except Exception as error:  # one bad case is no reason not to try the next
            reasons.append(f"{patient}: {error}")
            continue
        image, clinical = (torch.as_tensor(item[key])[None].float() for key in INPUTS)
        with torch.no_grad():
            expected = EnsembleInferer(amp=False)(image, ensemble, clinical)
        return Case(f"{kind} {patient}", image, clinical, {k: expected[k] for k in OUTPUTS if k in expected})
    raise ExportError(f"{folder}: no case to compare on: {'; '.join(reasons[:3]) or 'it is empty'}")


def cases_in(folder: str, features: Sequence[str], tables: bool) -> list[dict[str, Any]]:
    """The cases of a folder; without ``tables``, those beside the scans are not read and all values are missing."""
    if tables:
        return inference_cases(folder, None, features)
    scans = find_scans(folder)[0]
    return cases_to_predict(sorted(scans), scans, read_tables([], features), features, folder)


def about(ensemble: FoldEnsemble) -> dict[str, str]:
    """Name, version, notice, settings and provenance that are stored in a file."""
    metadata = json.loads((BUNDLE / "configs" / "metadata.json").read_text(encoding="utf-8"))
    return {
        "name": NAME,
        "version": metadata["version"],
        "notice": keys.RESEARCH_USE_ONLY,
        "model": describe_model(ensemble),
        "settings": json.dumps(ensemble.settings),
        "provenance": json.dumps(ensemble.provenance),
    }


# --- the formats ------------------------------------------------------------------------------------------------------


def write_torchscript(network: AllHeads, case: Case, facts: Mapping[str, str], path: Path) -> None:
    """Script the network; ``case`` is not needed, since nothing is traced."""
    with torch.no_grad():
        torch.jit.save(torch.jit.script(network), path, _extra_files={"about.json": json.dumps(dict(facts))})


def open_torchscript(path: Path) -> Run:
    """The file as a function of image and clinical values."""
    network = torch.jit.load(path, map_location="cpu").eval()

    def run(image: Tensor, clinical: Tensor) -> Mapping[str, Tensor]:
        with torch.no_grad(), torch.jit.optimized_execution(False):  # tuning it takes longer than a few cases
            return network(image, clinical)

    return run


def write_onnx(network: AllHeads, case: Case, facts: Mapping[str, str], path: Path) -> None:
    """Trace the network for the box of the settings, with any number of cases a batch, and check it as ONNX does."""
    onnx = needed("onnx")
    outputs = ordered_outputs(network, case)
    with torch.no_grad(), warnings.catch_warnings():
        # torch would rather have its newer exporter used, whose file of this network onnxruntime 1.32 cannot run
        # ("bias must be a 1D tensor") unless it is optimised, which takes minutes.
        warnings.simplefilter("ignore")
        torch.onnx.export(
            network,
            (case.image, case.clinical),
            path,
            dynamo=False,
            opset_version=OPSET,
            input_names=list(INPUTS),
            output_names=outputs,
            dynamic_axes={name: {0: "batch"} for name in (*INPUTS, *outputs)},
        )
    model = onnx.load(path)
    onnx.helper.set_model_props(model, dict(facts))
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, path)


def ordered_outputs(network: AllHeads, case: Case) -> list[str]:
    """Names of the network's outputs in the order in which it gives them."""
    with torch.no_grad():
        return list(network(case.image, case.clinical))


def open_onnx(path: Path) -> Run:
    """The file in onnxruntime on CPU as a function of image and clinical values."""
    runtime = needed("onnxruntime")
    session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]

    def run(image: Tensor, clinical: Tensor) -> Mapping[str, Tensor]:
        values = session.run(names, {keys.IMAGE: image.numpy(), keys.CLINICAL: clinical.numpy()})
        return {name: torch.from_numpy(value) for name, value in zip(names, values, strict=True)}

    return run


def needed(package: str) -> Any:
    """An optional package."""
    try:
        return __import__(package)
    except ImportError as error:
        raise ExportError(f"ONNX needs {package}: pip install onnx onnxruntime ({error})") from error


Write = Callable[[AllHeads, Case, Mapping[str, str], Path], None]
FORMATS: dict[str, tuple[str, Write, Callable[[Path], Run]]] = {
    "torchscript": (".ts", write_torchscript, open_torchscript),
    "onnx": (".onnx", write_onnx, open_onnx),
}


# --- the comparison ---------------------------------------------------------------------------------------------------


def compare(case: Case, run: Run) -> Difference:
    """Compare an exported model with PyTorch on one case."""
    found = run(case.image, case.clinical)
    wrong = [f"no {name}" for name in case.expected if name not in found]
    dice, voxels = None, 0
    if keys.SEG_PROB in case.expected and keys.SEG_PROB in found:
        expected, mask = (label_map(each[keys.SEG_PROB], each.get(keys.CLASS_PROB)) for each in (case.expected, found))
        voxels = int((expected > 0).sum())
        dice = min(dice_of(expected == value, mask == value) for value in range(1, 1 + classes_in(case.expected)))
        if not dice >= LEAST_DICE:
            wrong.append(f"Dice of the masks {dice:.5f}, below {LEAST_DICE}")
    scores = {}
    for name in SCORES:
        if name in case.expected and name in found:
            scores[name], agree = relative_difference(case.expected[name], found[name])
            if not agree:
                wrong.append(f"{name} differs by {scores[name]:.1e} (relative), over {TOLERANCE:.0e}")
    return Difference(case.name, voxels, dice, scores, tuple(wrong))


def classes_in(outputs: Mapping[str, Tensor]) -> int:
    """Number of classes of tumour that the outputs tell apart."""
    return outputs[keys.CLASS_PROB].shape[1] if keys.CLASS_PROB in outputs else 1


def dice_of(one: Tensor, other: Tensor) -> float:
    """Dice of two masks of the same shape; 1.0 where both are empty.

    Example:
        >>> dice_of(torch.tensor([True, True, False]), torch.tensor([True, False, False]))
        0.6666666666666666
    """
    sizes = int(one.sum()) + int(other.sum())
    return 2 * int((one & other).sum()) / sizes if sizes else 1.0


def relative_difference(expected: Tensor, found: Tensor) -> tuple[float, bool]:
    """Largest relative difference, and whether all are within the limits; a NaN never is.

    Example:
        >>> relative_difference(torch.tensor([2.0]), torch.tensor([2.5]))
        (0.25, False)
        >>> relative_difference(torch.tensor([1e-8]), torch.tensor([2e-8]))[1]
        True
    """
    if expected.shape != found.shape:
        return float("inf"), False
    difference, size = (found - expected).abs(), expected.abs()
    agree = bool((difference <= TOLERANCE * size + ROUNDING).all())
    return float((difference / size.clamp_min(ROUNDING)).max()), agree


def report(name: str, path: Path, size: int, differences: Sequence[Difference]) -> str:
    """The comparison, a line for each case."""
    opset = f", opset {OPSET}" if name == "onnx" else ""
    lines = [f"{name}{opset}: {path}, {size / 1e6:.1f} MB"]
    for row in differences:
        dice = "" if row.dice is None else f"mask of {row.voxels} voxels, Dice {row.dice:.5f}; "
        scores = ", ".join(f"{score} {value:.1e}" for score, value in row.scores.items())
        lines.append(f"  {'ok' if not row.wrong else 'WRONG':<6}{row.case}: {dice}relative difference: {scores}")
    return "\n".join(lines)


def refuse_if_wrong(name: str, differences: Sequence[Difference]) -> None:
    """Raise ExportError if a case differs from PyTorch, so that the file is discarded."""
    wrong = [f"{row.case}: {', '.join(row.wrong)}" for row in differences if row.wrong]
    if wrong:
        raise ExportError(f"the {name} file differs from PyTorch and is not kept: {'; '.join(wrong)}")


if __name__ == "__main__":
    run_tool(export, ExportError, CheckpointError, SettingsMismatch, OSError)
