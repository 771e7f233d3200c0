"""Random augmentation of training batches, all cases at once, on the batch's device.

CT and PET are changed in the ways in which examinations differ: position, resolution, noise and scale of the PET, noise
and contrast of the CT, movement between the two scans. Lengths are in mm, intensities in units of the network's input
(1 is the upper end of the window or the maximum, see :class:`scripts.imaging.transforms.ScaleIntensityPETCTd`).

Random numbers depend on the seed of a case alone (:class:`scripts.training.sampling.Draw`), not on the other cases of
its batch, on the number of loading threads or on the rank. Noise is drawn on the device, so that it differs between
kinds of devices.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from monai.transforms import Compose, Randomizable
from monai.transforms.utils import create_rotate, create_scale, create_translate

CHANNELS = {"both": slice(0, 2), "ct": slice(0, 1), "pet": slice(1, 2)}
FWHM_PER_SD = 2 * math.sqrt(2 * math.log(2))
SEEDS = 2**31
LARGEST_SCALE = 0.9  # of a size of 1: nothing is mirrored or shrunk to nothing
LEAST_GAMMA = 0.01


@dataclass
class Volumes:
    """A batch that is augmented in place."""

    image: torch.Tensor  # (B, 2, X, Y, Z) float32, CT and PET as the network reads them
    seg: torch.Tensor  # (B, 1, X, Y, Z) float32, the mask's values
    spacing_mm: np.ndarray  # voxel size along x, y and z

    def there(self, values: np.ndarray | Sequence[int]) -> torch.Tensor:
        """Integers, or numbers as float32, on the batch's device; nothing waits for the copy."""
        found = torch.as_tensor(values)
        return (found.float() if found.is_floating_point() else found).to(self.image.device, non_blocking=True)

    def per_case(self, values: np.ndarray) -> torch.Tensor:
        """Numbers (n,) as (n, 1, 1, 1, 1) on the batch's device."""
        return self.there(values).reshape(-1, 1, 1, 1, 1)


class RandomChange(Randomizable, ABC):
    """One kind of random change, with the probability ``prob`` that a case is changed."""

    def __init__(self, prob: float) -> None:
        (self.prob,) = _checked(self, "prob", prob, most=1)

    def draw(self) -> list[float] | None:
        """The random numbers of one case; None if it stays as it is."""
        return self.numbers() if self.R.rand() < self.prob else None

    @abstractmethod
    def numbers(self) -> list[float]:
        """Draw the numbers of a changed case from ``self.R``."""

    @abstractmethod
    def apply(self, volumes: Volumes, cases: Sequence[int], drawn: np.ndarray) -> None:
        """Change ``cases`` of a batch in place; ``drawn`` (n, numbers of a case) float64."""


class Augmentation:
    """Random changes of a batch, one after another.

    Args:
        transforms: the changes.
        spacing_mm: voxel size of the network's box, one number or three.

    Example:
        >>> flip = Augmentation([Flip(prob=1.0)], spacing_mm=4.0)
        >>> image = torch.arange(4.0).reshape(1, 2, 2, 1, 1)
        >>> flip(image, torch.zeros(1, 1, 2, 1, 1), [7])[0].flatten()
        tensor([1., 0., 3., 2.])
    """

    def __init__(self, transforms: Sequence[RandomChange], spacing_mm: float | Sequence[float]) -> None:
        self.transforms = tuple(transforms)
        self.spacing_mm = np.broadcast_to(np.asarray(spacing_mm, dtype=float), 3)
        pipeline: list[Any] = [Compose(cast(Any, self.transforms))]  # nested as at the end of a MONAI pipeline
        self._seeded = Compose(pipeline)

    def __call__(
        self, image: torch.Tensor, seg: torch.Tensor, seeds: Sequence[int]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Change a batch in place.

        Args:
            image: (B, 2, X, Y, Z) float32, CT and PET.
            seg: (B, 1, X, Y, Z) float32.
            seeds: of the cases.

        Returns:
            ``image`` and ``seg``.
        """
        volumes = Volumes(image, seg, self.spacing_mm)
        drawn = [self._draw(seed) for seed in seeds]
        for transform, numbers in zip(self.transforms, zip(*drawn, strict=True), strict=True):
            cases = [case for case, found in enumerate(numbers) if found is not None]
            if cases:
                transform.apply(volumes, cases, np.array([numbers[case] for case in cases], dtype=float))
        return volumes.image, volumes.seg

    def _draw(self, seed: int) -> list[list[float] | None]:
        """The numbers of every change for one case."""
        self._seeded.set_random_state(seed=int(seed))
        return [transform.draw() for transform in self.transforms]


# --- position -----------------------------------------------------------------------------------------------------
class Flip(RandomChange):
    """Mirror image and mask along a spatial axis (0: left and right)."""

    def __init__(self, prob: float, axis: int = 0) -> None:
        super().__init__(prob)
        if axis not in (0, 1, 2):
            raise ValueError(f"axis of Flip is 0, 1 or 2; got {axis!r}")
        self.axis = axis

    def numbers(self) -> list[float]:
        """None are needed."""
        return []

    def apply(self, volumes: Volumes, cases: Sequence[int], drawn: np.ndarray) -> None:
        """Mirror the cases."""
        chosen = volumes.there(cases)
        for values in (volumes.image, volumes.seg):
            values[chosen] = values[chosen].flip(2 + self.axis)


class Affine(RandomChange):
    """Rotate, shift and scale image and mask about the box's centre; air (zeros) comes in from outside.

    The image is interpolated linearly, the mask has the nearest voxel's value.

    Args:
        rotate_range: largest angle about x, y and z in radians.
        translate_mm: largest shift along x, y and z.
        scale_range: largest relative change of size along x, y and z.
    """

    def __init__(
        self,
        prob: float,
        rotate_range: Sequence[float] = (0.0, 0.0, 0.0),
        translate_mm: Sequence[float] = (0.0, 0.0, 0.0),
        scale_range: Sequence[float] = (0.0, 0.0, 0.0),
    ) -> None:
        super().__init__(prob)
        limits = _checked(self, "rotate_range", rotate_range, 3) + _checked(self, "translate_mm", translate_mm, 3)
        limits += _checked(self, "scale_range", scale_range, 3, most=LARGEST_SCALE)
        self.limits = np.array(limits, dtype=float)

    def numbers(self) -> list[float]:
        """Three angles, shifts and changes of size."""
        return list(self.R.uniform(-self.limits, self.limits))

    def apply(self, volumes: Volumes, cases: Sequence[int], drawn: np.ndarray) -> None:
        """Resample the cases."""
        size = volumes.image.shape[2:]
        theta = np.stack([self._normalised(row, np.array(size), volumes.spacing_mm) for row in drawn])
        grid = torch.nn.functional.affine_grid(volumes.there(theta), [len(cases), 1, *size], align_corners=False)
        chosen = volumes.there(cases)
        for values, mode in ((volumes.image, "bilinear"), (volumes.seg, "nearest")):
            values[chosen] = torch.nn.functional.grid_sample(
                values[chosen], grid, mode=mode, padding_mode="zeros", align_corners=False
            )

    @staticmethod
    def _normalised(row: np.ndarray, size: np.ndarray, spacing_mm: np.ndarray) -> np.ndarray:
        """The (3, 4) matrix for ``affine_grid``, which counts in half edges of the box, in the order z, y, x."""
        rotate, translate, scale = row.reshape(3, 3).tolist()
        parts = create_rotate(3, rotate), create_translate(3, translate), create_scale(3, [1 + by for by in scale])
        matrix = np.linalg.multi_dot([np.asarray(part) for part in parts])  # output to input, in mm about the centre
        half = size * spacing_mm / 2
        linear = matrix[:3, :3] * half[None, :] / half[:, None]
        return np.concatenate([linear[::-1, ::-1], (matrix[:3, 3] / half)[::-1, None]], axis=1)


class Misregistration(RandomChange):
    """Shift the CT against the PET and the mask by whole voxels: patients move between the scans.

    Args:
        shift_mm: largest shift along each axis.
    """

    def __init__(self, prob: float, shift_mm: float) -> None:
        super().__init__(prob)
        (self.shift_mm,) = _checked(self, "shift_mm", shift_mm)

    def numbers(self) -> list[float]:
        """A shift in mm along each axis."""
        return list(self.R.uniform(-self.shift_mm, self.shift_mm, 3))

    def apply(self, volumes: Volumes, cases: Sequence[int], drawn: np.ndarray) -> None:
        """Shift the CTs; air comes in."""
        size = np.array(volumes.image.shape[2:])
        shifts = np.clip(np.rint(drawn / volumes.spacing_mm).astype(int), -size, size)
        for case, voxels in zip(cases, shifts.tolist(), strict=True):
            ct = volumes.image[case, 0]
            shifted = torch.zeros_like(ct)
            to = tuple(slice(max(0, by), n + min(0, by)) for by, n in zip(voxels, ct.shape, strict=True))
            source = tuple(slice(max(0, -by), n - max(0, by)) for by, n in zip(voxels, ct.shape, strict=True))
            shifted[to] = ct[source]
            volumes.image[case, 0] = shifted


# --- intensity ----------------------------------------------------------------------------------------------------
class IntensityChange(RandomChange):
    """A change of one or both channels of the image by one random number.

    Args:
        channel: ``"ct"``, ``"pet"`` or ``"both"``.
        low: smallest number.
        high: largest number.
    """

    def __init__(self, prob: float, channel: str, low: float, high: float) -> None:
        super().__init__(prob)
        if channel not in CHANNELS:
            raise ValueError(f"channel is one of {', '.join(CHANNELS)}; got {channel!r}")
        self.channel, self.low, self.high = CHANNELS[channel], low, high

    def numbers(self) -> list[float]:
        """One number."""
        return [self.R.uniform(self.low, self.high)]

    def apply(self, volumes: Volumes, cases: Sequence[int], drawn: np.ndarray) -> None:
        """Change the channel of the cases."""
        channel, chosen = volumes.image[:, self.channel], volumes.there(cases)
        channel[chosen] = self.changed(channel[chosen], volumes, drawn)

    @abstractmethod
    def changed(self, values: torch.Tensor, volumes: Volumes, drawn: np.ndarray) -> torch.Tensor:
        """The changed values (n, C, X, Y, Z)."""


class Scale(IntensityChange):
    """Multiply by 1 + factor, as MONAI's ``RandScaleIntensity``. PET: calibration, body weight, uptake time.

    Args:
        factors: largest change; the factor lies between -factors and factors.
    """

    def __init__(self, prob: float, factors: float, channel: str = "both") -> None:
        (most,) = _checked(self, "factors", factors, most=1)
        super().__init__(prob, channel, -most, most)

    def changed(self, values: torch.Tensor, volumes: Volumes, drawn: np.ndarray) -> torch.Tensor:
        """Scaled values."""
        return values * volumes.per_case(1 + drawn[:, 0])


class Shift(IntensityChange):
    """Add an offset, as MONAI's ``RandShiftIntensity``.

    Args:
        offsets: largest offset; it lies between -offsets and offsets.
    """

    def __init__(self, prob: float, offsets: float, channel: str = "both") -> None:
        (most,) = _checked(self, "offsets", offsets)
        super().__init__(prob, channel, -most, most)

    def changed(self, values: torch.Tensor, volumes: Volumes, drawn: np.ndarray) -> torch.Tensor:
        """Shifted values."""
        return values + volumes.per_case(drawn[:, 0])


class Gamma(IntensityChange):
    """Raise to a power: contrast of the CT; of the PET, of tumour to background, which grows with the uptake time.

    0 and 1 stay as they are; negative values become 0.

    Args:
        gamma: smallest and largest exponent; its logarithm is uniform.
    """

    def __init__(self, prob: float, gamma: tuple[float, float], channel: str = "both") -> None:
        super().__init__(prob, channel, *np.log(_checked(self, "gamma", gamma, 2, least=LEAST_GAMMA)).tolist())

    def changed(self, values: torch.Tensor, volumes: Volumes, drawn: np.ndarray) -> torch.Tensor:
        """Values to the power of gamma."""
        return values.clamp(min=0) ** volumes.per_case(np.exp(drawn[:, 0]))


class Blur(IntensityChange):
    """Smooth with a Gaussian. PET: a scanner or reconstruction of lower resolution; CT: a scan of poor quality.

    An image of resolution r then has sqrt(r^2 + fwhm^2). The Gaussian is sampled at the voxels: a width below 1.5
    voxels has less effect than that, one below half a voxel none.

    Args:
        fwhm_mm: smallest and largest full width at half maximum.
    """

    def __init__(self, prob: float, fwhm_mm: tuple[float, float], channel: str = "both") -> None:
        super().__init__(prob, channel, *_checked(self, "fwhm_mm", fwhm_mm, 2))

    def changed(self, values: torch.Tensor, volumes: Volumes, drawn: np.ndarray) -> torch.Tensor:
        """Smoothed values."""
        return _smoothed(values, volumes.there(drawn[:, 0]), volumes.spacing_mm, order=1)


class Noise(IntensityChange):
    """Add white Gaussian noise; negative values become 0.

    Args:
        std: largest standard deviation.
    """

    def __init__(self, prob: float, std: float, channel: str = "both") -> None:
        super().__init__(prob, channel, 0.0, *_checked(self, "std", std))

    def numbers(self) -> list[float]:
        """The standard deviation and the seed of the noise."""
        return [*super().numbers(), self.R.randint(SEEDS)]

    def changed(self, values: torch.Tensor, volumes: Volumes, drawn: np.ndarray) -> torch.Tensor:
        """Noisy values."""
        return (values + volumes.per_case(drawn[:, 0]) * _white(values, drawn[:, 1])).clamp(min=0)


class PetNoise(IntensityChange):
    """Add noise like that of a reconstructed PET: correlated, and growing with the square root of the uptake.

    ``pet + cv * sqrt(pet * m) * noise``, never below 0. m is the mean uptake of the body (the voxels above the mean of
    the box), so that ``cv`` is the coefficient of variation where the uptake is m. ``noise`` has the standard deviation
    1 and is white noise smoothed by a Gaussian.

    Args:
        cv: largest coefficient of variation at the body's mean uptake.
        fwhm_mm: smallest and largest full width at half maximum of the Gaussian.
    """

    def __init__(self, prob: float, cv: float, fwhm_mm: tuple[float, float]) -> None:
        super().__init__(prob, "pet", 0.0, *_checked(self, "cv", cv))
        self.narrowest, self.widest = _checked(self, "fwhm_mm", fwhm_mm, 2)

    def numbers(self) -> list[float]:
        """Coefficient of variation, width of the Gaussian, seed of the noise."""
        return [*super().numbers(), self.R.uniform(self.narrowest, self.widest), self.R.randint(SEEDS)]

    def changed(self, values: torch.Tensor, volumes: Volumes, drawn: np.ndarray) -> torch.Tensor:
        """Noisy values."""
        body = values > values.mean(dim=(1, 2, 3, 4), keepdim=True)
        total = (values * body).sum(dim=(1, 2, 3, 4), keepdim=True)
        mean = total / body.sum(dim=(1, 2, 3, 4), keepdim=True).clamp(min=1)
        noise = _smoothed(_white(values, drawn[:, 2]), volumes.there(drawn[:, 1]), volumes.spacing_mm, order=2)
        spread = volumes.per_case(drawn[:, 0]) * (values * mean).clamp(min=0).sqrt()
        return (values + spread * noise).clamp(min=0)


def _checked(
    change: RandomChange, name: str, given: Any, count: int = 1, least: float = 0.0, most: float = math.inf
) -> list[float]:
    """The numbers of an argument.

    Args:
        change: whose argument it is.
        name: of the argument.
        given: a number, or a list where ``count`` is not 1; two are the smallest and the largest.
        count: of the numbers.
        least: smallest allowed.
        most: largest allowed.

    Raises:
        ValueError: it holds anything else.
    """
    values = [given] if count == 1 else list(given) if isinstance(given, list | tuple) else []
    fits = len(values) == count and all(
        isinstance(value, int | float) and math.isfinite(value) and least <= value <= most for value in values
    )
    if not fits or (count == 2 and values[0] > values[1]):
        what = {1: "a number", 2: "the smallest and the largest number", 3: "a number for each of x, y and z"}[count]
        limits = f"from {least:g} to {most:g}" if math.isfinite(most) else f"from {least:g} on"
        raise ValueError(f"{name} of {type(change).__name__} is {what}, {limits}; got {given!r}")
    return values


def _white(like: torch.Tensor, seeds: np.ndarray) -> torch.Tensor:
    """Standard normal noise of the shape of ``like`` (n, C, X, Y, Z), of one generator for each case."""
    noise = torch.empty_like(like)
    for values, seed in zip(noise, seeds.astype(np.int64).tolist(), strict=True):
        values.normal_(generator=torch.Generator(like.device).manual_seed(seed))
    return noise


def _smoothed(values: torch.Tensor, fwhm_mm: torch.Tensor, spacing_mm: np.ndarray, order: int) -> torch.Tensor:
    """``values`` (n, C, X, Y, Z) smoothed with a Gaussian of each case, as one matrix product along each axis.

    Args:
        values: of the cases.
        fwhm_mm: (n,) full widths at half maximum.
        spacing_mm: (3,) voxel size.
        order: 1 for weights whose sum is 1, which keep the mean, also at the edges of the box; 2 for weights whose
            squares sum to 1, which keep the variance of white noise.
    """
    n, channels, x, y, z = values.shape
    weights = [
        _gaussian(fwhm_mm / (spacing * FWHM_PER_SD), size, order)
        for spacing, size in zip(spacing_mm.tolist(), (x, y, z), strict=True)
    ]
    values = (weights[0][:, None] @ values.reshape(n, channels, x, y * z)).reshape(values.shape)
    values = weights[1][:, None, None] @ values
    return values @ weights[2][:, None, None].mT


def _gaussian(sd_voxels: torch.Tensor, size: int, order: int) -> torch.Tensor:
    """(n, size, size): row k holds the Gaussian about voxel k."""
    voxels = torch.arange(size, device=sd_voxels.device, dtype=sd_voxels.dtype)
    distance = voxels[:, None] - voxels
    weights = torch.exp(-0.5 * (distance / sd_voxels.clamp(min=1e-3)[:, None, None]) ** 2)
    return weights / torch.linalg.vector_norm(weights, order, dim=-1, keepdim=True)
