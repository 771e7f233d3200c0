"""Exports that give what PyTorch gives, and refusals of those that do not."""

from __future__ import annotations

import json
from pathlib import Path

import onnx
import onnxruntime
import pytest
import torch
from monai.bundle import ConfigParser
from monai.networks.trt_compiler import unroll_input
from monai.networks.utils import convert_to_onnx
from tiny_model import SETTINGS

from conftest import BUNDLE, make_tiny_cohort
from experiments.ensemble import empty_ensemble
from runtimes import export
from runtimes.export import FORMATS, NAME, OUTPUTS, AllHeads, Case, ExportError, compare
from runtimes.inference import inference_config
from scripts.cohorts.clinical import DEFAULT_FEATURES
from scripts.imaging.lesions import APART, MERGED
from scripts.model.ensemble import FoldEnsemble, save_weights
from scripts.runtimes import trt
from scripts.training.engine import EnsembleInferer

BOX = (16, 16, 16)


def make_ensemble(
    tasks: tuple[str, ...] = ("seg", "hpv", "surv"), folds: int = 1, seg_classes: tuple[str, ...] = MERGED
) -> FoldEnsemble:
    torch.manual_seed(0)
    settings = {
        **SETTINGS,
        "seg_classes": list(seg_classes),
        "clinical_features": list(DEFAULT_FEATURES),
        "roi_size": list(BOX),
        "tasks": list(tasks),
    }
    settings["survival_inputs"] = ["burden"] if "seg" in tasks else ["deep"]
    ensemble = empty_ensemble(settings)
    if "hpv" in tasks:
        torch.nn.init.normal_(ensemble.folds[0].hpv_clinical.weight)  # trained, so that the values matter
    ensemble.resize(folds)
    with torch.no_grad():
        for fold in ensemble.folds[1:]:
            for weight in fold.parameters():
                weight.mul_(1.1)
    ensemble.provenance = {"trained_on": "nothing: a test"}
    return ensemble.eval()


def make_case(ensemble: FoldEnsemble, cases: int = 1) -> Case:
    image, clinical = torch.rand(cases, 2, *BOX), torch.randint(0, 3, (cases, 7)).float()
    with torch.no_grad():
        expected = EnsembleInferer(amp=False)(image, ensemble, clinical)
    return Case("noise", image, clinical, {name: expected[name] for name in OUTPUTS if name in expected})


@pytest.mark.parametrize("name", sorted(FORMATS))
@pytest.mark.parametrize(
    ("tasks", "folds", "seg_classes"),
    [
        pytest.param(("seg", "hpv", "surv"), 2, MERGED, id="all_two_folds"),
        pytest.param(("seg", "hpv", "surv"), 2, APART, id="all_two_folds_two_classes"),
        pytest.param(("surv",), 1, MERGED, id="survival_alone"),
    ],
)
def test_an_export_gives_all_heads_for_any_number_of_cases(
    tmp_path: Path, name: str, tasks, folds: int, seg_classes
) -> None:
    ensemble = make_ensemble(tasks, folds, seg_classes)
    case, three = make_case(ensemble), make_case(ensemble, cases=3)
    ending, write, open_file = FORMATS[name]
    write(AllHeads(ensemble).eval(), case, {"model": "a test"}, tmp_path / f"m{ending}")
    run = open_file(tmp_path / f"m{ending}")
    for each in (case, three):
        found = run(each.image, each.clinical)
        assert set(found) == set(each.expected)
        assert {key: value.shape for key, value in found.items()} == {k: v.shape for k, v in each.expected.items()}
        assert compare(each, run).wrong == ()
    assert ("seg_prob" in found) == ("seg" in tasks)
    assert ("class_prob" in found) == (seg_classes == APART)
    assert found["log_hazard_folds"].shape == (3, folds)


def test_the_command_writes_both_formats_and_says_how_close_they_are(tmp_path: Path, capsys) -> None:
    save_weights(make_ensemble(), tmp_path / "model.pt", half=True)
    cohort = make_tiny_cohort(tmp_path / "cohort", patients=1)
    export.export(str(tmp_path / "out"), str(tmp_path / "model.pt"), cases=str(cohort))
    printed = capsys.readouterr().out
    assert "trained on nothing: a test" in printed
    assert "Research use only" in printed
    assert printed.count("  ok    phantom ") == 2
    assert printed.count("  ok    real case CHUM-001: mask of ") == 2
    assert "onnx, opset 18" in printed
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [f"{NAME}.onnx", f"{NAME}.ts"]
    facts = {entry.key: entry.value for entry in onnx.load(tmp_path / "out" / f"{NAME}.onnx").metadata_props}
    files = {"about.json": ""}
    torch.jit.load(tmp_path / "out" / f"{NAME}.ts", _extra_files=files)
    assert facts == json.loads(files["about.json"])
    assert "trained on nothing: a test" in facts["model"]
    assert json.loads(facts["settings"])["spacing_mm"] == 8.0


def write_spoiled(network: AllHeads, case: Case, facts, path: Path) -> None:
    with torch.no_grad():
        network.folds[0].burden.burden.bias.add_(0.5)
    export.write_torchscript(network, case, facts, path)


def test_a_file_that_gives_something_else_is_not_kept(tmp_path: Path, monkeypatch) -> None:
    ensemble = make_ensemble()
    save_weights(ensemble, tmp_path / "model.pt")
    monkeypatch.setattr(export, "comparison_cases", lambda *_: [make_case(ensemble)])
    monkeypatch.setitem(FORMATS, "torchscript", (".ts", write_spoiled, export.open_torchscript))
    with pytest.raises(ExportError, match=r"the torchscript file .* is not kept: noise: log_hazard differs"):
        export.export(str(tmp_path / "out"), str(tmp_path / "model.pt"), formats="torchscript")
    assert not list((tmp_path / "out").iterdir())


MASK, SCORE = torch.zeros(1, 1, 4, 4, 4), torch.tensor([0.3])
MASK[..., :2] = 0.9


@pytest.mark.parametrize(
    ("found", "message"),
    [
        pytest.param({"seg_prob": MASK.roll(1, -1), "log_hazard": SCORE}, "Dice of the masks 0.50000", id="mask"),
        pytest.param(
            {"seg_prob": MASK, "class_prob": torch.cat([MASK.roll(1, -1), 0.5 * MASK], dim=1), "log_hazard": SCORE},
            "Dice of the masks 0.66667",
            id="classes",
        ),
        pytest.param({"seg_prob": MASK, "log_hazard": SCORE * 1.002}, "log_hazard differs by 2.0e-03", id="risk"),
        pytest.param({"seg_prob": MASK, "log_hazard": SCORE * torch.nan}, "log_hazard differs by nan", id="nan"),
        pytest.param({"seg_prob": MASK, "log_hazard": torch.ones(1, 1)}, "differs by inf", id="shape"),
        pytest.param({"seg_prob": MASK}, "no log_hazard", id="head_lost"),
    ],
)
def test_every_kind_of_difference_is_named(found: dict[str, torch.Tensor], message: str) -> None:
    case = Case("x", torch.rand(1), torch.rand(1), {"seg_prob": MASK, "log_hazard": SCORE})
    assert compare(case, lambda image, clinical: case.expected).wrong == ()
    (wrong,) = compare(case, lambda image, clinical: found).wrong
    assert message in wrong


def test_paths_stay_what_was_typed(tmp_path: Path) -> None:
    parser = inference_config(tmp_path / "a#b" / "model.pt", dataset_dir="$x#@y")
    found = [parser.get_parsed_content(name) for name in ("checkpoint", "dataset_dir", "bundle_root")]
    assert found == [str(tmp_path / "a#b" / "model.pt"), "$x#@y", str(BUNDLE)]


def test_unknown_formats_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="formats are some of torchscript, onnx; got tflite"):
        export.export(str(tmp_path), formats="tflite")


def test_a_folder_without_a_usable_case_is_an_error(tmp_path: Path) -> None:
    save_weights(make_ensemble(), tmp_path / "model.pt")
    cohort = make_tiny_cohort(tmp_path / "cohort", patients=1)
    next(cohort.rglob("*__PT.nii.gz")).unlink()
    with pytest.raises(ExportError, match="no case to compare on: CHUM-001: no PET found"):
        export.prepare(make_ensemble(), tmp_path / "model.pt", str(cohort), "real case", tables=False)


# --- TensorRT: what can be seen without a GPU ------------------------------------------------------------------------
def test_without_tensorrt_the_overlay_says_so_in_one_line(tmp_path: Path) -> None:
    if trt.importlib.util.find_spec("tensorrt") and torch.cuda.is_available():
        pytest.skip("TensorRT can run here")
    with pytest.raises(trt.TensorRTMissing, match=r"inference_trt.json cannot run here \(.*pip install tensorrt"):
        trt.compile_folds(make_ensemble(), tmp_path / "engines", "fp32", tmp_path / "model.pt")


def test_the_overlay_compiles_after_the_weights_are_loaded() -> None:
    parser = ConfigParser()
    configs = BUNDLE / "configs"
    parser.read_config([str(configs / "inference.json"), str(configs / "inference_trt.json")])
    steps = parser["initialize"]
    targets = [step["_target_"] for step in steps[1:]]
    assert targets[-1] == "scripts.runtimes.trt.compile_folds"
    assert "scripts.training.configuration.load_model" in targets[:-1]


@pytest.mark.filterwarnings("ignore")  # torch would rather have its newer exporter used
@pytest.mark.parametrize("seg_classes", [MERGED, APART], ids=["one_class", "two_classes"])
def test_every_part_goes_to_tensorrt_as_onnx_that_gives_the_same(tmp_path: Path, seg_classes) -> None:
    """As MONAI's TrtCompiler exports it, run by onnxruntime in the place of TensorRT."""
    ensemble = make_ensemble(seg_classes=seg_classes)
    fold = ensemble.folds[0]
    image = torch.rand(1, 2, *BOX)
    with torch.no_grad():
        maps = fold.encode(image)
        inputs = {"encoder": {"x": image}, "decoder": {"features": maps}, "hpv": {"x": torch.rand(1, 3, *BOX)}}
        assert trt.engine_parts(ensemble) == [f"folds.0.{part}" for part in inputs]
        for name in trt.engine_parts(ensemble):
            part, given = ensemble.get_submodule(name), inputs[name.split(".")[-1]]
            unrolled = unroll_input(list(given), given)
            file = tmp_path / "part.onnx"
            convert_to_onnx(part, given, filename=file, input_names=list(unrolled), output_names=[], **trt.EXPORT)
            session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
            found = session.run(None, {key: value.numpy() for key, value in unrolled.items()})
            expected = part(**given)
            for one, other in zip(found, [expected] if torch.is_tensor(expected) else expected, strict=True):
                torch.testing.assert_close(torch.from_numpy(one), other, rtol=1e-3, atol=1e-3)
