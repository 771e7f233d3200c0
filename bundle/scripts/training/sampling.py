"""Datasets and batches: which case is read when, with which random numbers.

Everything random about an epoch follows from ``(seed, epoch)`` alone, so that a run which was killed and goes on
draws what the unbroken run would have drawn, whatever the number of workers.
"""

from __future__ import annotations

import csv
import logging
import os
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import torch
import torch.distributed as dist
from monai.data import DataLoader, Dataset, MetaTensor, PersistentDataset, list_data_collate
from monai.data.utils import pickle_hashing
from monai.transforms import Compose, Randomizable
from monai.utils import convert_to_tensor
from torch.utils.data import Sampler
from tqdm import tqdm

from scripts import keys
from scripts.cohorts.files import written_whole
from scripts.imaging.quality import OK, VOXEL_SIZES, Check, checks_from_json

logger = logging.getLogger(__name__)

ERROR = "error"
EXCLUSIONS_FILE, DOUBTS_FILE = "exclusions.csv", "quality.csv"
SHARED_MEMORY = Path("/dev/shm")  # through which Linux passes batches from loading processes


class Draw(NamedTuple):
    """One case of one epoch: its place in the datalist and the seed of its augmentation."""

    case: int
    seed: int


class CaseDataset(PersistentDataset):
    """MONAI's disk-cached dataset whose augmentation is seeded by the sampler.

    The deterministic part of ``transform`` (up to its first random transform) is computed once and kept in
    ``cache_dir``; the name of a cached file is a hash of the case and of the transforms with their parameters, so a
    change of either is never served from an old file. A file that cannot be read is made again; where none can be
    written (full disk) the case is prepared every time it is needed. (MONAI's own cache raises for a truncated or
    empty file and for a full disk, and does not move a file from another disk in one step.)

    Args:
        data: datalist of :mod:`scripts.cohorts.cohort`.
        transform: MONAI ``Compose``.
        cache_dir: folder of the cache, or ``None`` to compute every time.
    """

    def __init__(self, data: Sequence[Mapping], transform: Compose, cache_dir: str | None = None) -> None:
        super().__init__(data=list(data), transform=transform, cache_dir=cache_dir, hash_transform=pickle_hashing)
        self._told_of_disk = False

    def __getitem__(self, index: Any) -> Any:
        """Case ``index``; a :class:`Draw` also seeds the random transforms."""
        if isinstance(index, Draw):
            if isinstance(self.transform, Randomizable):
                self.transform.set_random_state(seed=index.seed)
            index = index.case
        return super().__getitem__(index)

    def prepare(self, index: int) -> Any:
        """Case ``index`` as the cache, which it fills, has it; augmentation is not drawn."""
        return self._cachecheck(self.data[index])

    def _cachecheck(self, item_transformed: Any) -> Any:
        """The deterministic part of a case, from the cache or computed; MONAI's hook."""
        if self.cache_dir is None:
            return super()._cachecheck(item_transformed)
        path = self.cache_dir / f"{self.hash_func(item_transformed).decode()}{self.transform_hash}.pt"
        if path.is_file():
            try:
                item = torch.load(path, weights_only=True)
                if not isinstance(item, Mapping):
                    raise ValueError(f"it holds a {type(item).__name__}, not a case")
                return item
            except Exception as error:  # torch raises many kinds for a damaged file
                why = str(error).splitlines()[0] if str(error) else type(error).__name__
                logger.warning("cached file %s cannot be read and is made again: %s", path, why)
        item = self._pre_transform(deepcopy(item_transformed))
        try:
            with written_whole(path) as partial:
                torch.save(convert_to_tensor(item, convert_numeric=False, track_meta=False), partial)
        except (OSError, RuntimeError) as error:  # torch's writer raises RuntimeError where the disk is full
            if not self._told_of_disk:
                self._told_of_disk = True
                logger.warning("%s cannot be written to, cases are prepared in every epoch: %s", self.cache_dir, error)
        return item


class CaseLoader(DataLoader):
    """MONAI's loader with no more processes than shared memory has room for.

    Loading processes pass their batches on through ``/dev/shm``. Where it is full (Docker gives 64 MB unless told
    otherwise) the system kills them, or they wait for ever. Batches do not depend on the number of processes.

    Args:
        dataset: of cases, each a dictionary.
        num_workers: loading processes wanted.
        **kwargs: as for ``monai.data.DataLoader``.
    """

    def __iter__(self) -> Any:
        fitting = self.num_workers
        if fitting and SHARED_MEMORY.is_dir():
            free = shutil.disk_usage(SHARED_MEMORY).free
            while fitting and self._bytes_in_flight(fitting) > free:
                fitting -= 1
            if fitting < self.num_workers:
                logger.warning(
                    "loading with %d processes instead of %d, which is slower: they need %.0f MB of shared memory and "
                    "%s has %.0f MB free; give a container more (docker run --shm-size 4g, or --ipc host)",
                    *(fitting, self.num_workers, self._bytes_in_flight(self.num_workers) / 1e6, SHARED_MEMORY),
                    free / 1e6,
                )
        self.num_workers = fitting
        return super().__iter__()

    def _bytes_in_flight(self, workers: int) -> int:
        """Bytes of the batches that so many processes keep ready, and of the one in use and the one being made."""
        sampler = self.batch_sampler if self.batch_size is None else self
        batch = int(getattr(sampler, "batch_size", None) or 1)
        return self._case_bytes * batch * (workers * (self.prefetch_factor or 2) + 2)

    @cached_property
    def _case_bytes(self) -> int:
        item = cast(CaseDataset, self.dataset).prepare(0)
        return sum(value.nbytes for value in item.values() if isinstance(value, torch.Tensor | np.ndarray))


class GuardedDataset(Dataset):
    """Dataset that turns a case which cannot be prepared into ``{patient_id, "error"}`` instead of raising.

    One unreadable patient must not cost the others their prediction; :class:`scripts.training.engine.PatientEvaluator`
    reports the marker.
    """

    def __getitem__(self, index: Any) -> Any:
        """Prepared case ``index`` or its failure."""
        case = self.data[index]
        if case.get(keys.PROBLEM):
            return {keys.PATIENT_ID: case[keys.PATIENT_ID], ERROR: case[keys.PROBLEM]}
        try:
            return super().__getitem__(index)
        except Exception as error:
            return {keys.PATIENT_ID: case[keys.PATIENT_ID], ERROR: reason(error)}


def collate_one(items: Sequence[Mapping]) -> Any:
    """MONAI's ``list_data_collate`` for a batch of one patient, whose images get a batch axis and are not copied.

    Stacking would copy the native PET, in the order of a file, voxel by voxel: as long as everything else together.
    """
    (item,) = items
    images = {key: value for key, value in item.items() if isinstance(value, MetaTensor)}
    stand_ins = {key: MetaTensor(torch.empty(1), meta=image.meta) for key, image in images.items()}
    batch = list_data_collate([{**item, **stand_ins}])
    for key, image in images.items():
        batch[key] = MetaTensor(image.as_tensor()[None], meta=batch[key].meta)
        batch[key].is_batch = True
    return batch


def reason(error: BaseException) -> str:
    """What went wrong, in one line: the innermost cause, without MONAI's wrapping of transform errors."""
    cause = innermost(error)
    return " ".join(str(cause).split()) or type(cause).__name__


def innermost(error: BaseException) -> BaseException:
    """The exception at the start of a chain of ``raise ... from ...`` that stands for the others."""
    while error.__cause__ is not None and isinstance(error, RuntimeError):
        error = error.__cause__
    return error


class EventBatchSampler(Sampler[list[Draw]]):
    """Shuffled batches of equal size, half of each with an event if wanted.

    With ``event_fraction`` 0.5 and ``batch_size`` 4 every batch holds two relapses, as in the paper: a Cox loss over
    four cases of which none relapsed teaches nothing. Events and other cases come from two shuffled streams; a
    stream that runs out starts again, so that within an epoch no case comes twice before all of its kind came once.

    Args:
        cases: datalist with ``event`` and ``surv_known``.
        batch_size: cases a batch and rank; cut to the number of cases.
        seed: of the run.
        event_fraction: share of each batch with a known event; ``None`` for plain shuffling.

    Raises:
        ValueError: fewer than two cases (batch normalisation has nothing to average over).
    """

    def __init__(
        self, cases: Sequence[Mapping], batch_size: int, seed: int = 0, event_fraction: float | None = 0.5
    ) -> None:
        if len(cases) < 2:
            raise ValueError(f"training needs at least two cases and has {len(cases)}: give more data or another fold")
        if event_fraction is not None and not 0 < event_fraction < 1:
            raise ValueError(f"event_fraction lies between 0 and 1 or is null; got {event_fraction}")
        has_event = np.array([bool(c.get(keys.SURV_KNOWN)) and bool(c.get(keys.EVENT)) for c in cases])
        self.batch_size = min(int(batch_size), len(cases))
        if self.batch_size < 2:
            raise ValueError(f"batch_size {batch_size} is too small: batch normalisation needs at least 2 cases")
        self.seed = int(seed)
        self.epoch = 1
        self.groups: list[tuple[np.ndarray, int]] = [(np.arange(len(cases)), self.batch_size)]
        if event_fraction is not None and has_event.any() and not has_event.all():
            events = min(max(1, round(self.batch_size * event_fraction)), self.batch_size - 1)
            self.groups = [
                (np.flatnonzero(has_event), events),
                (np.flatnonzero(~has_event), self.batch_size - events),
            ]
        elif event_fraction is not None:
            logger.info("batches are not balanced: %d of %d cases have an event", has_event.sum(), len(cases))
        self.num_batches = max(1, len(cases) // (self.batch_size * _world_size()))

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose batches the next iteration gives."""
        self.epoch = int(epoch)

    def __len__(self) -> int:
        return self.num_batches

    def __iter__(self) -> Iterator[list[Draw]]:
        rng = np.random.default_rng([self.seed, self.epoch])
        total = self.num_batches * _world_size()
        columns = [_stream(indices, share * total, rng).reshape(total, share) for indices, share in self.groups]
        batches = np.concatenate(columns, axis=1)
        seeds = rng.integers(0, 2**31, size=batches.shape)
        for row, row_seeds in zip(batches[_rank() :: _world_size()], seeds[_rank() :: _world_size()], strict=True):
            yield [Draw(int(i), int(s)) for i, s in zip(row, row_seeds, strict=True)]


def _stream(indices: np.ndarray, length: int, rng: np.random.Generator) -> np.ndarray:
    """``length`` items of ``indices``, each pass over them in a new order."""
    passes = -(-length // len(indices))
    return np.concatenate([rng.permutation(indices) for _ in range(passes)])[:length]


def _world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def _rank() -> int:
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def prepare_datasets(datasets: Mapping[str, CaseDataset], output_dir: str, show_progress: bool = True) -> None:
    """Read and preprocess every case once, fill the cache, and take out the cases that cannot be read.

    A case that fails is removed from its dataset, logged, and listed in ``<output_dir>/exclusions.csv``: it neither
    stops the cohort nor disappears silently. What quality control doubts of the others is listed in
    ``<output_dir>/quality.csv`` and counted in the log, but for voxel sizes, of which the cohort itself sets the range.
    A list that would be empty is not written. Ranks of one training share what they found.

    Args:
        datasets: name ("training", "validation") to dataset; their ``data`` lists are changed in place.
        output_dir: where the lists go.
        show_progress: draw a bar.

    Raises:
        RuntimeError: nothing is left of a dataset.
    """
    excluded: list[dict[str, Any]] = []
    doubtful: list[dict[str, Any]] = []
    for name, dataset in datasets.items():
        if len(dataset) == 0:
            raise RuntimeError(f"the {name} set is empty: check dataset_dir, protocol, fold and num_folds")
        failures, doubts = _prepare(dataset, name, show_progress and _rank() == 0)
        failures, doubts = _over_ranks(failures), _over_ranks(doubts)
        cases = len(_over_ranks({case[keys.PATIENT_ID]: None for case in dataset.data}))
        for patient, why in failures.items():
            logger.warning("%s: left out of the %s set: %s", patient, name, why)
            excluded.append({"PatientID": patient, "set": name, "reason": why})
        doubts = {patient: checks for patient, checks in doubts.items() if patient not in failures}
        for patient, checks in doubts.items():
            who = {"PatientID": patient, "set": name}
            doubtful += [
                {**who, "check": check.name, "value": check.value, "message": check.message} for check in checks
            ]
        if doubts:
            counts = Counter(check.name for checks in doubts.values() for check in checks)
            shown = ", ".join(f"{check} {count}" for check, count in counts.most_common())
            where = Path(output_dir) / DOUBTS_FILE
            logger.warning("%d of %d %s cases are kept with doubts (%s): %s", len(doubts), cases, name, shown, where)
        dataset.data = [case for case in dataset.data if case[keys.PATIENT_ID] not in failures]
        if len(dataset) == 0:
            raise RuntimeError(f"no case of the {name} set can be read; the first one: {next(iter(failures.values()))}")
    if _rank() == 0:
        _write_rows(Path(output_dir) / EXCLUSIONS_FILE, excluded)
        _write_rows(Path(output_dir) / DOUBTS_FILE, doubtful)


def _over_ranks(found: dict[str, Any]) -> dict[str, Any]:
    """What all ranks found, by patient id; of what several found the first rank's."""
    if _world_size() == 1:
        return found
    gathered: list[dict[str, Any]] = [{} for _ in range(_world_size())]
    dist.all_gather_object(gathered, found)
    return {patient: value for each in reversed(gathered) for patient, value in each.items()}


def _prepare(dataset: CaseDataset, name: str, show_progress: bool) -> tuple[dict[str, str], dict[str, list[Check]]]:
    """Id of every patient of ``dataset`` who cannot be prepared and why, and of every other who is in doubt."""

    def attempt(index: int) -> str | list[Check]:
        try:
            item = dataset.prepare(index)
        except Exception as error:
            return reason(error)
        checks = checks_from_json(item.get(keys.QUALITY, "[]"))
        return [check for check in checks if check.verdict != OK and check.name not in VOXEL_SIZES]

    # Threads suffice: decompression and matrix products leave the interpreter lock.
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        bar = tqdm(
            pool.map(attempt, range(len(dataset))),
            total=len(dataset),
            desc=f"preparing {name} cases",
            unit="case",
            disable=not show_progress,
        )
        found = {dataset.data[index][keys.PATIENT_ID]: outcome for index, outcome in enumerate(bar) if outcome}
    failures = {patient: outcome for patient, outcome in found.items() if isinstance(outcome, str)}
    return failures, {patient: outcome for patient, outcome in found.items() if isinstance(outcome, list)}


def _write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write a table; without rows there is none, and one of an earlier run goes."""
    if not rows:
        path.unlink(missing_ok=True)
        return
    with written_whole(path) as partial, partial.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def seed_epoch(seed: int, epoch: int) -> None:
    """Seed what is random inside the network (dropout) for one epoch of one rank."""
    torch.manual_seed(int(np.random.SeedSequence([seed, epoch, _rank()]).generate_state(1)[0]))
