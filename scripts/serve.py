"""Serve the bundle: with MONAI Label (``serve.py label``), or as a node of a DICOM network (``serve.py dicom``).

MONAI Label runs in an environment of its own that is made on first use: it needs other versions than this project
(pydicom below 3), so that it is never installed beside it. Its server listens on this machine only, unless ``--host``
says otherwise: MONAI Label lets anyone who reaches it read the images and start a training.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import subprocess
import sys
import venv
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from command_line import BUNDLE, ROOT, UsageError, run_commands

from scripts.cohorts.files import dated_name, write_text
from scripts.cohorts.scans import CohortError, find_scans
from scripts.runtimes.label_web import HOSTS, allowed

ENVIRONMENT = ROOT / ".label_env"
NAME = "head_neck_pet_ct_multitask"  # of the model in the server; must hold no word that MONAI Label takes for a task

# Without their own requirements: MONAI Label asks for sam2, mlflow and more that this needs not, torchvision for CUDA.
ALONE = ("monailabel==0.8.5", "torchvision==0.28.0", "pydicom-seg==0.4.1")
REQUIREMENTS = (
    *("torch==2.13.0", "monai==1.6.1", "pytorch-ignite==0.5.5", "numpy==1.26.4", "scipy==1.17.1", "pandas==2.3.3"),
    # what MONAI Label imports
    *("uvicorn==0.54.0", "fastapi==0.165.0", "pydantic==2.14.3", "pydantic-settings==2.16.3", "python-dotenv==1.2.4"),
    *("python-multipart==0.0.34", "httpx==0.28.1", "requests==2.34.2", "requests-toolbelt==1.0.0", "filelock==4.2.11"),
    *("schedule==1.2.2", "timeloop==1.0.2", "expiringdict==1.2.2", "expiring-dict==1.1.2", "cachetools==7.3.2"),
    *("watchdog==7.1.0", "psutil==7.2.2", "PyJWT==2.15.1", "passlib==1.7.4", "bcrypt==5.0.0", "google-auth==2.62.2"),
    *("pydicom==2.4.5", "pynetdicom==2.1.1", "dicomweb-client==0.59.3", "jsonschema==3.2.0", "girder-client==5.0.21"),
    *(
        "itk-core==5.4.7",
        "itk-io==5.4.7",
        "itk-numerics==5.4.7",
        "pynrrd==1.1.3",
        "numpymaxflow==0.0.7",
        "scikit-image==0.26.0",
        "scikit-learn==1.9.1",
    ),
    *("pillow==13.0.0", "shapely==2.2.0", "setuptools==84.2.1"),
    # what the bundle imports, and its tests
    *("nibabel==5.4.2", "SimpleITK==2.5.7", "isal==1.9.1", "connected-components-3d==4.1.1", "lifelines==0.30.3"),
    *("tensorboard==2.21.0", "tqdm==4.70.1", "fire==0.7.1", "pytest==9.2.0"),
)
# On a build of torch without CUDA, importing torchvision fails for want of two operators that nothing here calls.
OPERATORS = """import torch

library = torch.library.Library("torchvision", "DEF")
library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
"""


class LabelEnvironmentError(RuntimeError):
    """MONAI Label's environment cannot be made; the message says at which step and why."""


def serve_label(
    studies: str | None = None,
    port: int = 8000,
    host: str = "127.0.0.1",
    env: str | None = None,
    app: str | None = None,
    store: str | None = None,
    bundle: str | None = None,
    fresh_model: bool = False,
    scans: str | None = None,
) -> None:
    """Start MONAI Label with this bundle; Ctrl+C or SIGTERM ends it.

    Args:
        studies: folder with CT and PET in one of HECKTOR's layouts (``<PatientID>/<PatientID>__CT.nii.gz`` and
            ``__PT.nii.gz``); or the address of a DICOMweb server.
        port: of the server.
        host: address it listens on; this machine only by default.
        env: folder of its Python environment; ``.label_env`` beside this project by default (about 2.5 GB).
        app: folder of MONAI Label's app ``monaibundle`` with its copy of the bundle; inside ``env`` by default.
        store: folder of the server's list of CTs and of the masks that are edited; ``<studies>/monailabel`` by default.
        bundle: the bundle to serve; this project's by default.
        fresh_model: serve the bundle's weights again where training from MONAI Label has put others in their place.
        scans: folder whose files a request may name; ``studies`` by default, if that is a folder.
    """
    if not studies:
        sys.exit("serve_label: name the folder of the scans with --studies")
    place = Path(env or ENVIRONMENT).expanduser().resolve()
    try:
        python = make_environment(place)
    except LabelEnvironmentError as error:
        sys.exit(f"serve_label: MONAI Label's environment cannot be made: {error}")
    folder = Path(app).expanduser().resolve() if app else place / "apps" / "monaibundle"
    name_segments(install_bundle(python, folder, Path(bundle or BUNDLE).expanduser().resolve(), fresh_model))
    reach = scans or ("" if str(studies).startswith(("http://", "https://")) else str(studies))
    start_server(python, folder, list_studies(str(studies), store), host, port, reach)


def make_environment(place: Path) -> Path:
    """The Python of MONAI Label's environment, which is created if it is missing or of another version.

    Raises:
        LabelEnvironmentError: it cannot be made.
    """
    python = place / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    stamp = place / "installed.txt"
    wanted = hashlib.sha256("\n".join((*ALONE, *REQUIREMENTS, OPERATORS)).encode()).hexdigest()
    made = stamp.read_text() if stamp.is_file() else None
    if made == wanted and python.is_file():
        return python
    if made is None and place.is_dir() and any(place.iterdir()):
        raise LabelEnvironmentError(f"{place} holds something else; name a new folder with --env")
    print(f"making MONAI Label's environment in {place} (some minutes, about 2.5 GB) ...", file=sys.stderr, flush=True)
    try:
        venv.create(place, with_pip=True, clear=made is not None)
    except (OSError, subprocess.CalledProcessError) as error:
        raise LabelEnvironmentError(f"python -m venv {place}: {error}") from error
    stamp.write_text("not finished")
    pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    _run([*pip, *REQUIREMENTS])
    _run([*pip, "--no-deps", *ALONE])
    if subprocess.run([str(python), "-c", "import torchvision"], capture_output=True, check=False).returncode:
        packages = _run([str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]).strip()
        (Path(packages) / "torchvision_operators.py").write_text(OPERATORS)
        (Path(packages) / "torchvision_operators.pth").write_text("import torchvision_operators\n")  # at every start
    _run([str(python), "-c", "import torchvision, monailabel.app, monailabel.tasks.train.bundle"])
    stamp.write_text(wanted)
    return python


def _run(command: list[str]) -> str:
    """Run a step of the installation.

    Raises:
        LabelEnvironmentError: it fails; with the end of what it printed.
    """
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        shown = "\n  ".join((done.stdout + done.stderr).strip().splitlines()[-8:])
        raise LabelEnvironmentError(f"`{' '.join(command[:6])} ...` ended with {done.returncode}:\n  {shown}")
    return done.stdout


def install_bundle(python: Path, app: Path, bundle: Path, fresh_model: bool = False) -> Path:
    """Put the bundle into MONAI Label's app, which is created if it is missing.

    Configs and scripts are brought up to date each time. Weights that are there stay: they may have been trained since.

    Args:
        python: of MONAI Label's environment.
        app: folder of the app ``monaibundle``.
        bundle: folder of the bundle.
        fresh_model: put the bundle's weights in; those that are there are kept beside them.

    Returns:
        The bundle in the app.

    Raises:
        SystemExit: the bundle has no weights.
    """
    weights = bundle / "models" / "model.pt"
    if not weights.is_file():
        sys.exit(f"serve_label: no weights at {weights}: README.md says how to train or to get them")
    if not (app / "main.py").is_file():
        command = ["-m", "monailabel.main", "apps", "--download", "--name", "monaibundle", "--output", str(app.parent)]
        _run([str(python), *command])
        if app.name != "monaibundle":
            (app.parent / "monaibundle").rename(app)
    target = app / "model" / NAME
    for name in ("configs", "scripts", "docs"):
        shutil.rmtree(target / name, ignore_errors=True)
        shutil.copytree(bundle / name, target / name, ignore=shutil.ignore_patterns("__pycache__"))
    served = target / "models" / "model.pt"
    served.parent.mkdir(exist_ok=True)
    if fresh_model and served.is_file():
        served.rename(dated_name(served))
    if not served.is_file():
        shutil.copyfile(weights, served)
    elif served.read_bytes() != weights.read_bytes():
        print(f"serve_label: serving the weights in {served}, not the bundle's own (--fresh_model for those)")
    return target


def name_segments(bundle: Path) -> None:
    """Write the classes of the served weights into the metadata, from which MONAI Label's clients name the segments.

    Args:
        bundle: of :func:`install_bundle`. The metadata of a model of one class stay as they are.

    Raises:
        SystemExit: its weights cannot be read.
    """
    from scripts.model.ensemble import CheckpointError, saved_spec  # torch is slow to import

    try:
        classes = saved_spec(bundle / "models" / "model.pt").seg_classes
    except CheckpointError as error:
        sys.exit(f"serve_label: {error}")
    if len(classes) > 1:
        path = bundle / "configs" / "metadata.json"
        metadata = json.loads(path.read_text(encoding="utf-8"))
        named = {str(value): name for value, name in enumerate(("background", *classes))}
        metadata["network_data_format"]["outputs"]["pred"]["channel_def"] = named
        write_text(path, json.dumps(metadata, indent=4) + "\n")


def list_studies(studies: str, store: str | None = None) -> str:
    """What MONAI Label is to take for its studies: a flat folder with a link to each CT, or a server's address.

    MONAI Label reads links through, so that PET and CSV are found where the CT really lies.

    Args:
        studies: as for :func:`serve_label`.
        store: folder to make; ``<studies>/monailabel`` by default.

    Raises:
        SystemExit: there are no scans.
    """
    if studies.startswith(("http://", "https://")):
        return studies
    try:
        scans, notes = find_scans(studies)
    except CohortError as error:
        sys.exit(f"serve_label: {error}")
    folder = Path(store or Path(studies) / "monailabel").expanduser().resolve()
    with_ct = {key: found for key, found in scans.items() if found.ct}
    if not with_ct:
        sys.exit(f"serve_label: no CT in {studies}: expected <PatientID>/<PatientID>__CT.nii.gz (and __PT.nii.gz)")
    try:
        _link(folder, [Path(str(found.ct)).resolve() for found in with_ct.values()])
    except OSError as error:
        sys.exit(f"serve_label: the list of CTs cannot be written: {error}; name a folder for it with --store")
    notes = [note for note in notes if not note.endswith(f": {folder}")]  # of an earlier start
    notes += [reason for found in scans.values() if (reason := found.contradiction("ct", "pet") or found.problem)]
    for note in [*notes, *(f"{key} has no PET" for key, found in with_ct.items() if not found.pet)]:
        print(f"serve_label: {note}", file=sys.stderr)
    print(f"serve_label: {len(with_ct)} CTs; edited masks go to {folder / 'labels' / 'final'}")
    return str(folder)


def _link(folder: Path, cts: Sequence[Path]) -> None:
    """Put links to the CTs into the folder, in the place of those of an earlier start."""
    folder.mkdir(parents=True, exist_ok=True)
    for link in folder.glob("*__CT.*"):
        if link.is_symlink():
            link.unlink()
    for ct in cts:
        (folder / ct.name).symlink_to(ct)


def start_server(python: Path, app: Path, studies: str, host: str, port: int, scans: str = "") -> NoReturn:
    """Become MONAI Label's server."""
    environment = dict(os.environ)
    environment.pop("PYTHONPATH", None)  # of this project's environment
    environment.setdefault("CUDA_VISIBLE_DEVICES", "0")  # training from MONAI Label takes one GPU
    try:
        environment[HOSTS] = json.dumps([*allowed(HOSTS), host])
    except ValueError as error:
        sys.exit(f"serve_label: {error}")
    settings = {"models": NAME, "zoo_source": "local", "sam2": "false"}
    if scans:
        settings["scans"] = str(Path(scans).expanduser().resolve())
    conf = [word for pair in settings.items() for word in ("--conf", *pair)]
    where = ["--app", str(app), "--studies", studies, "--host", host, "--port", str(port)]
    print(f"serve_label: starting http://{host}:{port} (model {NAME}); research use only", flush=True)
    os.execve(python, [str(python), "-m", "monailabel.main", "start_server", *where, *conf], environment)


def serve_dicom(
    spool: str,
    peers: str | Sequence[str],
    send: str | None = None,
    stow: str | None = None,
    ae_title: str = "HNPETCT",
    host: str = "127.0.0.1",
    port: int = 11112,
    stable: float = 60.0,
    keep_hours: float = 24.0,
    min_free_gb: float = 5.0,
    ckpt_dir: str = str(BUNDLE / "models"),
    device: str | None = None,
) -> None:
    """Receive PET/CT studies by DICOM, predict them, and send SEG, SR and RTSTRUCT back. Research use only.

    A study that cannot be predicted is answered by a structured report with the reason. What was received is kept in
    SPOOL until it is answered, also when this program ends; start it again with the same options. Ctrl+C or SIGTERM
    ends it. Needs requirements-dicom.txt.

    Args:
        spool: folder for received studies and answers (patient data: on a disk that only this user reads).
        peers: who may send: AE_TITLE or AE_TITLE@IP_ADDRESS; several separated by commas.
        send: node that gets the answers: AE_TITLE@HOST:PORT.
        stow: or the address of a DICOMweb server that gets them; user and password as for predict.py --dicomweb.
        ae_title: of this node.
        host: address it listens on; this machine only by default.
        port: it listens on.
        stable: seconds without a further image after which a study is complete.
        keep_hours: hours for which an answered study is kept, should further images of it come.
        min_free_gb: free disk space (GB) below which images are refused.
        ckpt_dir: folder that holds the weights, model.pt.
        device: cpu or cuda:0; by default the GPU where there is one.
    """
    from runtimes import dicom_listener
    from scripts.dicom.web import DicomWeb

    if (send is None) == (stow is None):
        raise UsageError("where do the answers go? Give --send AE_TITLE@HOST:PORT or --stow URL")
    if not dicom_listener.AE_TITLE.fullmatch(ae_title):
        raise UsageError(f"--ae_title has 1 to 16 letters of ASCII, got {ae_title!r}")
    if min(stable, keep_hours, min_free_gb) < 0 or not 0 <= port < 2**16:
        raise UsageError("--stable, --keep_hours and --min_free_gb are 0 or more, --port is below 65536")
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(message)s", stream=sys.stderr)
    for name in ("serve", "scripts"):
        logging.getLogger(name).setLevel(logging.INFO)
    audit = str(Path(spool).expanduser().resolve() / "audit.jsonl")
    options = {"ckpt_dir": ckpt_dir, "report": "False", "audit": audit, **({"device": device} if device else {})}
    dicom_listener.listen(
        Path(spool),
        dicom_listener.receiver(send) if send else DicomWeb(str(stow)),
        [dicom_listener.sender(text) for text in ([peers] if isinstance(peers, str) else peers)],
        ae_title,
        (host, port),
        (stable, keep_hours * 3600, min_free_gb * 1e9),
        options,
    )


COMMANDS: dict[str, tuple[Callable[..., None], Sequence[type[Exception]]]] = {
    "label": (serve_label, (OSError,)),
    "dicom": (serve_dicom, (OSError, ImportError, ValueError)),
}

if __name__ == "__main__":
    run_commands(COMMANDS)
