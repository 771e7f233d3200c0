"""Datasets, loaders and batches.

All random numbers of an epoch depend on ``(seed, epoch)`` only, so that a resumed run draws the same as an
uninterrupted one, with any number of workers.
"""

from __future__ import annotations

import csv
import json
import logging
import os
import threading
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import torch
import torch.distributed as dist
from monai.data import DataLoader, Dataset, MetaTensor, PersistentDataset, list_data_collate
from monai.data.utils import pickle_hashing
from monai.transforms import Compose
from monai.utils import convert_to_tensor
from torch.utils.data import Sampler
from tqdm import tqdm

from scripts import keys
from scripts.cohorts.cohort import Cohort
from scripts.cohorts.files import damaged_part, written_whole
from scripts.imaging.localise import Location
from scripts.imaging.quality import OK, VOXEL_SIZES, Check, checks_from_json
from scripts.model.ranks import rank, world_size
from scripts.training.configuration import CONFIGS

logger = logging.getLogger(__name__)

ERROR = "error"
EXCLUSIONS_FILE, DOUBTS_FILE = "exclusions.csv", "quality.csv"
_WRITING = threading.Lock()  # a case that is drawn twice may be prepared by two threads
COHORT = "cohort"  # in the column "set": excluded before the cases were divided
AUTO, MASKS_MERGED, MASKS_APART = "auto", "merged", "apart"
MASK_LABELS = (AUTO, MASKS_MERGED, MASKS_APART)
IMAGE_DTYPES = {"float32": torch.float32, "float16": torch.float16}


class Draw(NamedTuple):
    """One case of one epoch: its index in the datalist and the seed of its augmentation."""

    case: int
    seed: int


class CaseDataset(PersistentDataset):
    """MONAI's disk-cached dataset, which passes on the seeds that the sampler draws.

    ``transform`` is computed once and cached in ``cache_dir``, under a hash of the case and of the transforms with
    their parameters, and the bundle's version, since another version may compute other values from them. The files are
    mapped into memory. So the system keeps them there as long as memory is free, all processes share them, also those
    of other folds, and a case is read without unpickling. Masks are kept as uint8, and become float32 again in
    :func:`scripts.training.engine.prepare_batch`.

    A file that cannot be read is computed again; if none can be written (full disk), the case is prepared each time.
    (MONAI's own cache raises for a truncated file and for a full disk, and does not write atomically across disks.)

    Args:
        data: datalist of :mod:`scripts.cohorts.cohort`.
        transform: MONAI ``Compose`` of deterministic transforms. The whole batch is augmented later, on its device
            (:mod:`scripts.training.augmentation`).
        cache_dir: folder of the cache, or ``None`` to compute every time.
        mask_labels: whether masks tell primary tumour (1) and nodes (2) apart: ``"apart"`` all, ``"merged"`` none,
            ``"auto"`` those that hold a 2 and, once :func:`prepare_datasets` has seen all masks, those of a centre with
            such a mask.
        shared_cache_dir: folder of the cache of a training. Of a :class:`.Preprocessing` with a proposer, which follows
            from the weights, the cases whose box is not in doubt are prepared without it and kept there, for other
            evaluations to use; None: all are kept in ``cache_dir``.
        image_dtype: type in which images are kept: ``"float32"``, or ``"float16"``, which takes half of the memory and
            changes a value of [0, 1] by at most 0.00025 (0.5 HU of 2000, 0.006 SUV of 25).

    Attributes:
        centres_apart: the centres with such a mask.

    Raises:
        ValueError: another ``mask_labels`` or ``image_dtype``.
    """

    def __init__(
        self,
        data: Sequence[Mapping],
        transform: Compose,
        cache_dir: str | None = None,
        mask_labels: str = AUTO,
        image_dtype: str = "float32",
        shared_cache_dir: str | None = None,
    ) -> None:
        if image_dtype not in IMAGE_DTYPES:
            raise ValueError(f"image_dtype is one of {', '.join(IMAGE_DTYPES)}; got {image_dtype!r}")
        if mask_labels not in MASK_LABELS:
            raise ValueError(f"mask_labels is one of {', '.join(MASK_LABELS)}; got {mask_labels!r}")
        super().__init__(data=list(data), transform=transform, cache_dir=cache_dir, hash_transform=pickle_hashing)
        self.mask_labels = mask_labels
        self.centres_apart: frozenset[str] = frozenset()
        self._dtypes = {keys.IMAGE: IMAGE_DTYPES[image_dtype], keys.SEG: torch.uint8}
        self._suffix = f"{self.transform_hash}_{_version()}_{image_dtype}.pt"
        self._opened: dict[Path, Mapping[str, Any]] = {}
        self._told_of_disk = False
        self._by_rules: CaseDataset | None = None
        if shared_cache_dir is not None and (rules := getattr(transform, "by_rules", None)) is not None:
            self._by_rules = CaseDataset([], rules, shared_cache_dir, mask_labels, image_dtype)

    def __getitem__(self, index: Any) -> Any:
        """Case ``index``; of a :class:`Draw`, with its seed as ``augmentation_seed``."""
        if isinstance(index, Draw):
            return {**self[index.case], keys.SEED: index.seed}
        item = super().__getitem__(index)
        if isinstance(item, Mapping) and keys.SEG_CLASSES_KNOWN in item:
            return {**item, keys.SEG_CLASSES_KNOWN: torch.tensor(self._tells_classes(item))}
        return item

    def _tells_classes(self, item: Mapping[Any, Any]) -> bool:
        """Whether the mask of a case tells primary tumour and nodes apart; False without a mask."""
        if self.mask_labels == AUTO:
            found = bool(item[keys.SEG_CLASSES_KNOWN]) or item.get(keys.CENTRE) in self.centres_apart
        else:
            found = self.mask_labels == MASKS_APART
        return found and bool(item[keys.SEG_KNOWN])

    def prepare(self, index: int) -> Any:
        """Case ``index`` as the cache, which it fills, has it."""
        return self._cachecheck(self.data[index])

    def _cachecheck(self, item_transformed: Any) -> Any:
        """The prepared case, from memory, from the cache or computed; MONAI's hook."""
        if self._by_rules is not None:
            try:
                item = self._by_rules._cachecheck(item_transformed)
            except Exception:  # with a box by the network it may be sound
                item = None
            if item is not None and not is_in_doubt(item):
                return item
        if self.cache_dir is None:
            return self._kept(self._pre_transform(deepcopy(item_transformed)))
        path = self.cache_dir / f"{self.hash_func(item_transformed).decode()}{self._suffix}"
        there = path.is_file()
        if path not in self._opened and there:
            try:
                self._opened[path] = _mapped(path)
            except Exception as error:  # torch raises many kinds for a damaged file
                why = str(error).splitlines()[0] if str(error) else type(error).__name__
                logger.warning("cached file %s cannot be read and is made again: %s", path, why)
        if path in self._opened:
            return self._opened[path]
        item = self._kept(self._pre_transform(deepcopy(item_transformed)))
        if path.is_file() and not there:  # of another process; a file that a process of another node maps must stay
            return item
        try:
            with _WRITING, written_whole(path) as partial:
                torch.save(item, partial)
        except (OSError, RuntimeError) as error:  # torch's writer raises RuntimeError where the disk is full
            if not self._told_of_disk:
                self._told_of_disk = True
                logger.warning("%s cannot be written to, cases are prepared in every epoch: %s", self.cache_dir, error)
        return item

    def _kept(self, item: Any) -> Any:
        """A prepared case as the cache holds it: image and mask in their types, tensors without metadata.

        A batch may hold cases from the cache and, where the disk is full, others; tensors of two kinds do not collate.
        """
        if not isinstance(item, Mapping):
            return item
        kept = {key: value.to(self._dtypes[key]) if key in self._dtypes else value for key, value in item.items()}
        return convert_to_tensor(kept, convert_numeric=False, track_meta=False)

    def __getstate__(self) -> dict[str, Any]:
        """Without the files that are mapped into the memory of this process."""
        return {**self.__dict__, "_opened": {}}


def is_in_doubt(item: Mapping[Any, Any]) -> bool:
    """Whether the box of a prepared case is where a network would be asked."""
    return Location(np.zeros(3), item[keys.CROP_METHOD], item[keys.CROP_FLAG]).doubtful


def _version() -> str:
    return json.loads((CONFIGS / "metadata.json").read_text(encoding="utf-8"))["version"]


def _mapped(path: Path) -> Mapping[str, Any]:
    """A cached case, with its arrays mapped from the file.

    The file is read once as a whole to compare its checksums.

    Raises:
        ValueError: the file is damaged or holds something else. For one that is cut off, errors of zipfile and torch.
    """
    if damaged := damaged_part(path):
        raise ValueError(f"{damaged} in it has another checksum")
    item = torch.load(path, weights_only=True, mmap=True)
    if not isinstance(item, Mapping):
        raise ValueError(f"it holds a {type(item).__name__}, not a case")
    return item


class CaseLoader(DataLoader):
    """MONAI's loader with threads instead of processes.

    A cached case is mapped from its file, so that a batch is one copy, during which Python's lock is free. Batches of
    other processes would come through shared memory, which takes longer to hand over and to free, and of which
    containers have little. Batches and random numbers do not depend on the number of threads.

    Args:
        dataset: of cases, each a dictionary.
        num_workers: threads that prepare the next batches, each up to two; 0: none is prepared ahead.
        pin_memory: copy tensors to memory from which a GPU reads without waiting.
        **kwargs: as for ``monai.data.DataLoader``.
    """

    def __init__(self, dataset: Any, num_workers: int = 0, pin_memory: bool = False, **kwargs: Any) -> None:
        super().__init__(dataset, num_workers=0, **kwargs)
        self.threads, self.pinned = num_workers, pin_memory

    def __iter__(self) -> Any:
        torch.empty((), dtype=torch.int64).random_()  # which torch's own iterators draw, too: dropout follows from it
        batches = iter(cast(Iterable[list[Any]], self.batch_sampler))
        return self._prepared_ahead(batches) if self.threads else map(self._load, batches)

    def _prepared_ahead(self, batches: Iterator[list[Any]]) -> Iterator[Any]:
        pool = ThreadPoolExecutor(self.threads, thread_name_prefix="cases")
        try:
            ahead = deque(pool.submit(self._load, batch) for batch in islice(batches, 2 * self.threads))
            while ahead:
                batch = ahead.popleft().result()
                ahead.extend(pool.submit(self._load, following) for following in islice(batches, 1))
                yield batch
        finally:
            pool.shutdown(cancel_futures=True)

    def _load(self, batch: Sequence[Any]) -> Any:
        loaded = self.collate_fn([self.dataset[index] for index in batch])
        if not self.pinned:
            return loaded
        return {key: value.pin_memory() if isinstance(value, torch.Tensor) else value for key, value in loaded.items()}


class GuardedDataset(Dataset):
    """Dataset that returns ``{patient_id, "error"}`` for a case that cannot be prepared, instead of raising.

    :class:`scripts.training.engine.PatientEvaluator` reports it, and the other patients are predicted.
    """

    def __getitem__(self, index: Any) -> Any:
        """Prepared case ``index``, or its error."""
        case = self.data[index]
        if case.get(keys.PROBLEM):
            return {keys.PATIENT_ID: case[keys.PATIENT_ID], ERROR: case[keys.PROBLEM]}
        try:
            return super().__getitem__(index)
        except Exception as error:
            return {keys.PATIENT_ID: case[keys.PATIENT_ID], ERROR: reason(error)}


def collate_one(items: Sequence[Mapping]) -> Any:
    """MONAI's ``list_data_collate`` for a batch of one patient, without copying images.

    Stacking would copy the native PET voxel by voxel, which takes as long as all other steps together.
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
    """One-line message of the innermost cause, without MONAI's wrapping of transform errors."""
    cause = innermost(error)
    return " ".join(str(cause).split()) or type(cause).__name__


def innermost(error: BaseException) -> BaseException:
    """The first exception of a chain of ``raise ... from ...``, as far as RuntimeErrors wrap it."""
    while error.__cause__ is not None and isinstance(error, RuntimeError):
        error = error.__cause__
    return error


class EventBatchSampler(Sampler[list[Draw]]):
    """Shuffled batches of equal size, optionally with a fixed share of events.

    With ``event_fraction`` 0.5 and ``batch_size`` 4 every batch holds two relapses, as in the paper: the Cox loss of a
    batch without relapses is zero. Events and other cases are two shuffled streams, each reshuffled when exhausted.

    Args:
        cases: datalist with ``event`` and ``surv_known``.
        batch_size: cases for each batch and rank; at most the number of cases.
        seed: of the run.
        event_fraction: share of each batch with a known event; ``None`` for plain shuffling.

    Raises:
        ValueError: fewer than two cases, which batch normalisation needs.
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
            self.groups = [(np.flatnonzero(has_event), events), (np.flatnonzero(~has_event), self.batch_size - events)]
        elif event_fraction is not None:
            logger.info("batches are not balanced: %d of %d cases have an event", has_event.sum(), len(cases))
        self.num_batches = max(1, len(cases) // (self.batch_size * world_size()))

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch of the next iteration."""
        self.epoch = int(epoch)

    def __len__(self) -> int:
        return self.num_batches

    def __iter__(self) -> Iterator[list[Draw]]:
        rng = np.random.default_rng([self.seed, self.epoch])
        total = self.num_batches * world_size()
        columns = [_stream(indices, share * total, rng).reshape(total, share) for indices, share in self.groups]
        batches = np.concatenate(columns, axis=1)
        seeds = rng.integers(0, 2**31, size=batches.shape)
        own = slice(rank(), None, world_size())
        for row, row_seeds in zip(batches[own], seeds[own], strict=True):
            yield [Draw(int(i), int(s)) for i, s in zip(row, row_seeds, strict=True)]


def _stream(indices: np.ndarray, length: int, rng: np.random.Generator) -> np.ndarray:
    """``length`` items of ``indices``, reshuffled at each pass."""
    passes = -(-length // len(indices))
    return np.concatenate([rng.permutation(indices) for _ in range(passes)])[:length]


def share_of_rank(dataset: CaseDataset) -> range:
    """Indices of the cases that this rank validates, for a loader's ``sampler``; every case is of exactly one rank.

    Raises:
        RuntimeError: there are fewer cases than ranks.
    """
    if len(dataset) < world_size():
        raise RuntimeError(
            f"{world_size()} processes cannot share {len(dataset)} validation cases: start at most {len(dataset)}"
        )
    return range(rank(), len(dataset), world_size())


def prepare_datasets(
    datasets: Mapping[str, CaseDataset], output_dir: str, cohort: Cohort | None = None, show_progress: bool = True
) -> None:
    """Preprocess every case once, fill the cache, and remove the cases that cannot be read.

    A case that fails is logged and listed in ``<output_dir>/exclusions.csv``, after the patients that the cohort
    excludes (set ``cohort``). Doubtful cases are kept, listed in
    ``<output_dir>/quality.csv`` and counted in the log; voxel sizes are not checked, since the cohort defines their
    range. Empty lists are not written. The datasets are told in which centres masks tell primary tumour and nodes
    apart. All ranks of a training share the work and the result.

    Args:
        datasets: name ("training", "validation") to dataset; their ``data`` lists are changed in place.
        output_dir: folder of the lists.
        cohort: that the cases are of.
        show_progress: show a progress bar.

    Raises:
        RuntimeError: a dataset is empty, or none of its cases can be read.
    """
    excluded = [
        {"PatientID": one.patient_id, "set": COHORT, "reason": ": ".join(filter(None, [one.reason, one.detail]))}
        for one in (cohort.exclusions if cohort is not None else ())
    ]
    doubtful: list[dict[str, Any]] = []
    holds_nodes: dict[str, tuple[str, bool]] = {}
    for name, dataset in datasets.items():
        if len(dataset) == 0:
            raise RuntimeError(f"the {name} set is empty: check dataset_dir, protocol, fold and num_folds")
        failures, doubts, masks = map(_over_ranks, _prepare(dataset, name, show_progress and rank() == 0))
        holds_nodes |= masks
        cases = len(dataset)
        for patient, why in failures.items():
            logger.warning("%s: left out of the %s set: %s", patient, name, why)
            excluded.append({"PatientID": patient, "set": name, "reason": why})
        doubts = {patient: checks for patient, checks in doubts.items() if patient not in failures}
        doubtful += [
            {"PatientID": patient, "set": name, "check": check.name, "value": check.value, "message": check.message}
            for patient, checks in doubts.items()
            for check in checks
        ]
        if doubts:
            counts = Counter(check.name for checks in doubts.values() for check in checks)
            shown = ", ".join(f"{check} {count}" for check, count in counts.most_common())
            where = Path(output_dir) / DOUBTS_FILE
            logger.warning("%d of %d %s cases are kept with doubts (%s): %s", len(doubts), cases, name, shown, where)
        dataset.data = [case for case in dataset.data if case[keys.PATIENT_ID] not in failures]
        if len(dataset) == 0:
            raise RuntimeError(f"no case of the {name} set can be read; the first one: {next(iter(failures.values()))}")
    _tell_centres_apart(datasets.values(), holds_nodes)
    if rank() == 0:
        _write_rows(Path(output_dir) / EXCLUSIONS_FILE, excluded)
        _write_rows(Path(output_dir) / DOUBTS_FILE, doubtful)


def _tell_centres_apart(datasets: Iterable[CaseDataset], holds_nodes: Mapping[str, tuple[str, bool]]) -> None:
    """Set ``centres_apart`` of the datasets and log it.

    Args:
        datasets: of one run.
        holds_nodes: patient id -> centre, and whether the mask holds GTVn; of patients with a mask.
    """
    apart = frozenset(centre for centre, nodes in holds_nodes.values() if nodes)
    for dataset in datasets:
        dataset.centres_apart = apart
        asked = dataset.mask_labels
    if not holds_nodes:
        return
    merged = sorted({centre for centre, _ in holds_nodes.values()} - apart)
    found = [f"tell GTVp (1) and GTVn (2) apart in {', '.join(sorted(apart))}"] if apart else []
    found += [f"hold no GTVn in {', '.join(merged)}, so that 1 is tumour of any class there"] if merged else []
    said = "" if asked == AUTO else f"; all are taken as {asked} (mask_labels)"
    logger.info("%d masks: they %s%s", len(holds_nodes), "; they ".join(found), said)


def _over_ranks(found: dict[str, Any]) -> dict[str, Any]:
    """Results of all ranks by patient id."""
    if world_size() == 1:
        return found
    gathered: list[dict[str, Any]] = [{} for _ in range(world_size())]
    dist.all_gather_object(gathered, found)
    return {patient: value for each in gathered for patient, value in each.items()}


def _prepare(dataset: CaseDataset, name: str, show_progress: bool) -> tuple[dict[str, Any], ...]:
    """By patient id: errors of cases that cannot be prepared, doubts about others, centre and nodes of their masks.

    Of this rank's share of the cases. The last is whether the mask holds GTVn; it leaves out cases without a mask.
    """
    share = range(rank(), len(dataset), world_size())
    masks: dict[str, tuple[str, bool]] = {}

    def attempt(index: int) -> str | list[Check]:
        try:
            item = dataset.prepare(index)
        except Exception as error:
            return reason(error)
        if item.get(keys.SEG_KNOWN):
            centre, nodes = str(item.get(keys.CENTRE, "")), bool(item[keys.SEG_CLASSES_KNOWN])
            masks[dataset.data[index][keys.PATIENT_ID]] = centre, nodes
        checks = checks_from_json(item.get(keys.QUALITY, "[]"))
        return [check for check in checks if check.verdict != OK and check.name not in VOXEL_SIZES]

    # Threads suffice: decompression and matrix products release the interpreter lock.
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        bar = tqdm(
            pool.map(attempt, share),
            total=len(share),
            desc=f"preparing {name} cases",
            unit="case",
            disable=not show_progress,
        )
        found = {dataset.data[k][keys.PATIENT_ID]: outcome for k, outcome in zip(share, bar, strict=True) if outcome}
    failures = {patient: outcome for patient, outcome in found.items() if isinstance(outcome, str)}
    return failures, {patient: outcome for patient, outcome in found.items() if isinstance(outcome, list)}, masks


def _write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write a table; without rows, remove that of an earlier run."""
    if not rows:
        path.unlink(missing_ok=True)
        return
    with written_whole(path) as partial, partial.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def seed_epoch(seed: int, epoch: int) -> None:
    """Seed torch (dropout) for one epoch of one rank."""
    torch.manual_seed(int(np.random.SeedSequence([seed, epoch, rank()]).generate_state(1)[0]))
