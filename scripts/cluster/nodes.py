"""A Ray cluster: connecting to it, how many processes it holds, and what its nodes see.

Ray (Apache-2.0, ``requirements-ray.txt``) places, starts and watches the processes. What runs on a node before it is
known to see this software is sent to it as code, so that it can say what it does not see.
"""

from __future__ import annotations

import hashlib
import os
import socket
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any
from uuid import uuid4

from command_line import BUNDLE, ROOT

AUTO, LOCAL = "auto", "local"
CONNECT_SECONDS = 10.0
SOFTWARE = (BUNDLE / "scripts", BUNDLE / "configs", ROOT / "scripts")


class ClusterError(RuntimeError):
    """A cluster that cannot be used; the message says why and what to do."""


@dataclass(frozen=True)
class Share:
    """What one process gets of a node."""

    cores: int  # number of cores, and of threads
    gpus: float  # 1 for a GPU, less where several processes share one, 0 for the CPU

    def options(self) -> dict[str, Any]:
        """For Ray."""
        return {"num_cpus": self.cores, "num_gpus": self.gpus, "scheduling_strategy": "SPREAD"}


@contextmanager
def connected(address: str, cores: int, gpus: float | None) -> Iterator[Share]:
    """Be connected to a cluster; at the end its processes are ended.

    Args:
        address: ``auto``: the cluster that this computer belongs to; HOST:PORT of a cluster's head; ``local``: this
            computer alone.
        cores: of each process.
        gpus: of each process; None: one where the cluster has GPUs, else none.

    Yields:
        The share of each process.

    Raises:
        ClusterError: Ray is not installed, there is no such cluster, or a share cannot be.
    """
    try:
        import ray
    except ImportError:
        raise ClusterError("--ray needs Ray: pip install -r requirements-ray.txt") from None
    if cores < 1 or (gpus is not None and not 0 <= gpus <= 1):
        raise ClusterError(f"each process gets one core or more, and a GPU, a part of one or none; got {cores}, {gpus}")
    host, colon, port = address.rpartition(":")
    if address not in (AUTO, LOCAL) and not (host and colon and port.isdecimal()):
        raise ClusterError(f"--ray is auto, local or HOST:PORT; got {address!r}")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # Ray sends nothing about its use
    local = {"include_dashboard": False} if address == LOCAL else {}
    try:
        if host:  # Ray itself tries for many minutes
            socket.create_connection((host, int(port)), CONNECT_SECONDS).close()
        ray.init(address, logging_level="warning", **local)
    except Exception as error:  # Ray raises many kinds
        why = " ".join(str(error).split())
        raise ClusterError(
            f"no Ray cluster at {address!r} ({why}): start one with 'ray start --head' on one computer and "
            "'ray start --address=HOST:PORT' on the others, or give --ray local"
        ) from None
    try:
        ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
        yield Share(cores, float(ray.cluster_resources().get("GPU", 0) > 0) if gpus is None else gpus)
    finally:
        ray.shutdown()


def places(share: Share) -> int:
    """Number of processes that the cluster holds, if it does nothing else."""
    import ray

    count, nodes = 0, [node["Resources"] for node in ray.nodes() if node["Alive"]]
    for has in nodes:
        fits = has.get("CPU", 0) // share.cores
        count += int(min(fits, has.get("GPU", 0) // share.gpus) if share.gpus else fits)
    if not count:
        raise ClusterError(
            f"none of {len(nodes)} nodes has {share.cores} cores and {share.gpus:g} GPUs for a process; the largest "
            f"have {max(has.get('CPU', 0) for has in nodes):g} cores, {max(has.get('GPU', 0) for has in nodes):g} GPUs"
        )
    return count


def software() -> str:
    """Changes with the code and configs of this software, and with the version of torch."""
    digest = hashlib.sha256(version("torch").encode())
    for path in sorted(path for folder in SOFTWARE for path in folder.rglob("*") if path.suffix in (".py", ".json")):
        digest.update(path.relative_to(ROOT).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()


def node_name() -> str:
    """Host name and Ray's name of the node that this runs on; called in a task or actor."""
    import ray

    own = ray.get_runtime_context().get_node_id()
    node = next(node for node in ray.nodes() if node["NodeID"] == own)
    return f"{node['NodeManagerHostname']} ({node['NodeName']})"


def see_software(code: str) -> None:
    """Let this process, which Ray started on a node, import this software."""
    if code not in sys.path:
        sys.path.insert(0, code)


def unseen(paths: Iterable[str]) -> list[str]:
    """The paths that do not exist here."""
    return [path for path in paths if not Path(path).exists()]


@contextmanager
def mark(folder: Path) -> Iterator[Path]:
    """A file in a folder by which a node can tell whether it sees this very folder, and not one of the same name."""
    marker = folder / f".run_{uuid4().hex}"
    marker.touch()
    try:
        yield marker
    finally:
        marker.unlink(missing_ok=True)
