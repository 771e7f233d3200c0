"""Ways of inference compared on the same networks and patients: flips, lesions left out, ensemble or one fold.

``python scripts/research compare_inference --models fold_0,fold_1 --dataset_dir COHORT --output_dir OUT`` predicts each
case of a cohort that the networks were not trained on with every fold, from the scan and from its mirror image. It
writes ``cases_*.csv`` (a row for each case and way) and ``differences.csv`` (paired, 95 % intervals over patients).
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import cc3d
import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from tqdm import tqdm

from command_line import run_tool

from experiments.ensemble import empty_ensemble
from experiments.experiment import as_list
from scripts import keys
from scripts.cohorts.cohort import CohortError, load_cohort
from scripts.cohorts.files import sha256_of, write_text
from scripts.cohorts.thresholds import HALF, above
from scripts.evaluation.bootstrap import BOOTSTRAP_SAMPLES, paired_bootstrap
from scripts.evaluation.case_metrics import MEASURES
from scripts.evaluation.case_table import case_rows
from scripts.model.ensemble import EXTRA_STATE, SETTINGS, FoldEnsemble, join_folds, read_state
from scripts.model.errors import CheckpointError, SettingsMismatch
from scripts.model.preprocessing import Preprocessing
from scripts.model.spec import ModelSpec
from scripts.prediction.coarse import CoarsePass
from scripts.training.engine import NetworkInferer, default_amp, prepare_batch
from scripts.training.sampling import ERROR, GuardedDataset, collate_one

ENSEMBLE, FLIP, DROP, PEAK = "ensemble", " + flip", " + drop", " + peak"
LEFT_RIGHT = 2  # axis of (B, C, X, Y, Z)
DIFFERENCES = "differences.csv"
OF_MASKS, OF_RISKS = ("dice", "lesion_f1"), ("c_index", "balanced_accuracy")


class Given(nn.Module):
    """A fold whose ``outputs`` were computed before."""

    def __init__(self, outputs: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.outputs = dict(outputs)

    def forward(self, image: Tensor, clinical: Tensor | None = None) -> dict[str, Tensor]:
        """The outputs."""
        return self.outputs


def compare_inference(
    models: str | Sequence[str],
    dataset_dir: str,
    output_dir: str,
    drop_ml: float = 0.5,
    peak: float = 0.7,
    device: str = "cpu",
    samples: int = BOOTSTRAP_SAMPLES,
) -> None:
    """Compare ways of inference. If interrupted, rerun the same command: finished cases are kept.

    "flip" (test-time augmentation) is the mean of the logits and log hazards of the image and of its mirror image, left
    and right. "drop" removes connected components of the predicted mask that are smaller than drop_ml, "peak" those
    whose tumour probability is nowhere above peak (spec#lesion_peak). The other ways keep all components.

    Args:
        models: folders that each hold the model.pt of one fold, such as runs/a/fold_0/models,runs/a/fold_1/models.
        dataset_dir: a cohort that no fold was trained on.
        output_dir: receives the results.
        drop_ml: smallest component that is kept, ml.
        peak: probability that some voxel of a lesion must exceed.
        device: cpu or cuda:0.
        samples: draws of the bootstrap.
    """
    paths = [Path(folder) / "model.pt" for folder in as_list(models)]
    state = join_folds({str(path): read_state(path) for path in paths})
    ensemble = empty_ensemble(state[EXTRA_STATE][SETTINGS]).to(device).eval()
    ensemble.load_state_dict(state)
    spec = ModelSpec.read(ensemble.settings, "the folds")
    facts = [*(sha256_of(path) for path in paths), str(dataset_dir), str(drop_ml), str(peak)]
    table = Path(output_dir) / f"cases_{hashlib.sha256(' '.join(facts).encode()).hexdigest()[:12]}.csv"
    done = pd.read_csv(table, dtype={"PatientID": str}) if table.is_file() else pd.DataFrame({"PatientID": []})
    cases = load_cohort(dataset_dir, None, spec.clinical_features).cases
    todo = [case for case in cases if case[keys.PATIENT_ID] not in set(done["PatientID"])]
    advisory = ("head_in_view", "box_in_view")  # as in evaluation
    prepare = Preprocessing(spec, "evaluation", CoarsePass(paths[0], device=device), advisory=advisory)
    excluded: dict[str, str] = {}
    for item in tqdm(GuardedDataset(todo, prepare), desc="predicting", unit="case"):
        if ERROR in item:
            excluded[item[keys.PATIENT_ID]] = item[ERROR]
            continue
        done = pd.concat([done, pd.DataFrame(ways_of(ensemble, collate_one([item]), drop_ml, peak, device))])
        write_text(table, done.to_csv(index=False))
    if not len(done):
        raise CohortError(f"{dataset_dir}: no case can be predicted: {excluded}")
    found = compare(done, len(paths), samples)
    write_text(Path(output_dir) / DIFFERENCES, found.to_csv(index=False))
    print(found.to_string(index=False, float_format="{:.3f}".format))
    print("\n".join([*(f"excluded: {name}: {why}" for name, why in excluded.items()), keys.RESEARCH_USE_ONLY]))


@torch.inference_mode()
def ways_of(
    ensemble: FoldEnsemble, batch: Mapping[str, Any], drop_ml: float, peak: float, device: str
) -> list[dict[str, Any]]:
    """Rows of the table of cases (:func:`.case_rows`) of one patient, one for each way, with a column ``way``."""
    image, _, _, extra = prepare_batch(batch, device)
    infer, clinical = NetworkInferer(default_amp(device)), extra[keys.CLINICAL]
    plain = [infer(image, fold, clinical) for fold in ensemble.folds]
    mirrored = [infer(image.flip(LEFT_RIGHT), fold, clinical) for fold in ensemble.folds]
    back = [{name: v.flip(LEFT_RIGHT) if v.ndim == 5 else v for name, v in each.items()} for each in mirrored]
    mean = [{name: (one[name] + two[name]) / 2 for name in one} for one, two in zip(plain, back, strict=True)]
    voxel_ml = float(np.prod(np.broadcast_to(ensemble.settings["spacing_mm"], 3))) / 1000
    rows = []
    for flip, outputs in (("", plain), (FLIP, mean)):
        groups = {f"fold {k}": [each] for k, each in enumerate(outputs)} | {ENSEMBLE: outputs}
        for name, members in groups.items():
            joint = FoldEnsemble(Given(members[0]), ensemble.settings)  # type: ignore[arg-type]
            joint.folds = nn.ModuleList(map(Given, members))
            pred = joint.predict(image, clinical)
            small = without_small(pred, drop_ml / voxel_ml)
            for left_out, each, least in (("", pred, HALF), (DROP, small, HALF), (PEAK, pred, peak)):
                rows += [{"way": name + flip + left_out, **row} for row in case_rows(batch, each, least)]
    return rows


def without_small(pred: Mapping[str, Tensor], voxels: float) -> dict[str, Tensor]:
    """A prediction of one patient without components (26 neighbours) of the mask below a number of voxels."""
    mask = above(pred[keys.SEG_PROB])[0, 0].cpu().numpy()
    kept = cc3d.dust(mask, threshold=int(np.ceil(voxels)), connectivity=26, in_place=False)
    lost = torch.from_numpy(mask & (kept == 0)).to(pred[keys.SEG_PROB].device)
    return {**pred, keys.SEG_PROB: pred[keys.SEG_PROB].masked_fill(lost, 0.0)}


def compare(cases: pd.DataFrame, folds: int, samples: int = BOOTSTRAP_SAMPLES) -> pd.DataFrame:
    """Paired differences of one way minus another (:func:`.paired_bootstrap`), networks fixed."""
    names = [ENSEMBLE, *(f"fold {k}" for k in range(folds))]
    pairs: list[tuple[str, str, tuple[str, ...]]] = [(name + FLIP, name, OF_MASKS + OF_RISKS) for name in names]
    # risks are of the mask with all components
    pairs += [(name + left_out, name, OF_MASKS) for left_out in (DROP, PEAK) for name in names]
    pairs += [(ENSEMBLE, name, OF_MASKS + OF_RISKS) for name in names[1:]]
    rows = []
    for one, other, metrics in pairs:
        for metric in metrics:
            columns = [column for column in MEASURES[metric].columns if column in cases]
            first, second = (cases[cases["way"] == way].dropna(subset=columns) for way in (one, other))
            difference = paired_bootstrap(MEASURES[metric].statistic, first, second, samples)
            rows.append({"way": one, "minus": other, "metric": metric, **difference})
    return pd.DataFrame(rows)


if __name__ == "__main__":
    run_tool(compare_inference, CohortError, CheckpointError, SettingsMismatch, OSError)
