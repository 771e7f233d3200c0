"""Steps of folds, run on the nodes of a Ray cluster."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from command_line import BUNDLE, ROOT

from cluster.nodes import ClusterError, Share, node_name, places, see_software, unseen

MOST_RETRIES = 3  # of a step whose process or node died
LOCK_SECONDS = 60.0  # in which the processes of an earlier run end, after their command was killed
NOT_FINISHED = -9  # exit code of a step whose processes died


class NodeSteps:
    """Starts steps on the cluster that this process is connected to; each node has to see ``paths``.

    Raises:
        ClusterError: no node has such a share.
    """

    def __init__(self, share: Share, paths: Sequence[str]) -> None:
        import ray

        ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
        places(share)
        self.share = share
        self.paths = [str(ROOT / "scripts"), str(BUNDLE), sys.executable, *paths]
        self.device = "cuda:0" if share.gpus else "cpu"
        self.run = ray.remote(run_step).options(**share.options(), max_retries=MOST_RETRIES)

    def start(self, command: Sequence[str], log: Path, title: str) -> NodeStep:
        """Start a step as soon as a node has room for it; its output goes to ``log``, in the folder of the fold."""
        threads = str(self.share.cores)
        code = str(ROOT / "scripts")
        return NodeStep(self.run.remote(code, self.paths, list(command), str(log), title, threads, str(BUNDLE)), log)


class NodeStep:
    """A step that runs on a node, or waits for one."""

    def __init__(self, ref: Any, log: Path) -> None:
        self.ref, self.log = ref, log

    def poll(self) -> int | None:
        """Exit code; None while it waits or runs.

        Raises:
            ClusterError: its node does not see a path, or another process uses the folder.
        """
        import ray

        if not ray.wait([self.ref], timeout=0)[0]:
            return None
        try:
            answer = ray.get(self.ref)
        except ray.exceptions.RayError as error:  # the process died too often
            with self.log.open("a", encoding="utf-8") as file:
                file.write(f"error: {' '.join(str(error).split())}\n")
            return NOT_FINISHED
        if answer["problem"]:
            raise ClusterError(answer["problem"])
        return int(answer["code"])


def run_step(
    code: str, paths: Sequence[str], command: Sequence[str], log: str, title: str, threads: str, folder: str
) -> Mapping[str, Any]:
    """Run a step; called by Ray on a node.

    Arguments as for :func:`.start_logged`; ``code``: folder of this software's commands; ``paths``: what the node has
    to see.

    Returns:
        Its exit ``code``; and the ``problem`` because of which it was not run, or "".
    """
    name = node_name()
    if missing := unseen(paths):
        return {"code": None, "problem": f"node {name} does not see {', '.join(missing)}"}
    see_software(code)
    from experiments.processes import FolderInUseError, lock_folder, start_logged, stop

    environment = {**os.environ, "TQDM_MININTERVAL": "30", "OMP_NUM_THREADS": threads}
    try:
        lock = lock_folder(Path(log).parent, LOCK_SECONDS)
    except FolderInUseError as error:
        return {"code": None, "problem": f"node {name}: {error}"}
    with lock:
        process = start_logged(command, Path(log), f"{title} on {name}", environment, Path(folder), [lock.fileno()])
        try:
            return {"code": process.wait(), "problem": ""}
        finally:
            stop([process])
