"""From the files of a case to the input of the network that a :class:`.ModelSpec` describes."""

from __future__ import annotations

from collections.abc import Sequence

from monai.transforms import Compose

from scripts.imaging.localise import IN_DOUBT, Proposer
from scripts.imaging.quality import CheckQualityd, Limits
from scripts.imaging.transforms import (
    INFERENCE_KEYS,
    TRAINING_KEYS,
    CodeClinicald,
    LoadScansd,
    LocaliseBoxd,
    ResampleToBoxd,
    ScaleIntensityPETCTd,
    ToNetworkItemd,
)
from scripts.model.spec import ModelSpec

TRAINING = "training"
KEYS = {TRAINING: TRAINING_KEYS, "evaluation": TRAINING_KEYS, "inference": INFERENCE_KEYS}


class Preprocessing(Compose):
    """The transforms of a case: load, place the box, check quality, resample, scale, code clinical values, select.

    Args:
        spec: of the model: box, spacing, windows and clinical features.
        purpose: ``"training"`` centres the box on the mask where there is one; ``"evaluation"`` and ``"inference"``
            place it without the mask. Each keeps its own keys of the case.
        proposer: what proposes tumours where the box is in doubt (:class:`scripts.prediction.coarse.CoarsePass`); None
            for the rules alone.
        on_reject: ``"raise"`` excludes a case that quality control rejects, ``"flag"`` keeps it.
        limits: of the quality checks, as :class:`scripts.imaging.quality.CheckQualityd` takes them.
        advisory: names of the checks that reject no case.

    Attributes:
        by_rules: the same without the proposer, where that gives the same for every case whose box is not in doubt;
            else None.

    Raises:
        ValueError: for another purpose.
    """

    def __init__(
        self,
        spec: ModelSpec,
        purpose: str,
        proposer: Proposer | None = None,
        on_reject: str = "raise",
        limits: Limits | None = None,
        advisory: Sequence[str] = (),
    ) -> None:
        if purpose not in KEYS:
            raise ValueError(f"purpose is one of {', '.join(KEYS)}; got {purpose!r}")
        in_doubt = proposer is not None and getattr(proposer, "when", None) == IN_DOUBT
        self.by_rules = Preprocessing(spec, purpose, None, on_reject, limits, advisory) if in_doubt else None
        super().__init__(
            [
                LoadScansd(),
                LocaliseBoxd(spec.roi_size, spec.spacing_mm, use_mask=purpose == TRAINING, proposer=proposer),
                CheckQualityd(spec.roi_size, on_reject=on_reject, limits=limits, advisory=advisory),
                ResampleToBoxd(spec.roi_size),
                ScaleIntensityPETCTd(spec.ct_window, spec.pet_window),
                CodeClinicald(spec.clinical_features),
                ToNetworkItemd(KEYS[purpose]),
            ]
        )
