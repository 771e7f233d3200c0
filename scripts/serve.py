"""Serve the bundle: with MONAI Label (``serve.py label``), or as a node of a DICOM network (``serve.py dicom``).

MONAI Label runs in an environment of its own that is made on first use: it needs other versions than this project
(pydicom below 3), so that it is never installed beside it. Its server listens on this machine only, unless ``--host``
says otherwise: MONAI Label lets anyone who reaches it read the images and start a training.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NoReturn

from command_line import BUNDLE, NAME, UsageError, run_commands

from runtimes.environments import OwnEnvironmentError, run_step
from runtimes.label_environment import ENVIRONMENT, make_label_environment
from scripts.cohorts.files import dated_name, write_text
from scripts.cohorts.scans import find_scans
from scripts.dicom.web import PASSWORD, TOKEN, USER, checked_address, user_and_password
from scripts.runtimes.label_guard import AUDIT, SCANS
from scripts.runtimes.label_web import HOSTS, allowed


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
    audit: str | None = None,
) -> None:
    """Start MONAI Label with this bundle; Ctrl+C or SIGTERM ends it.

    Args:
        studies: folder with CT and PET in one of HECKTOR's layouts (``<PatientID>/<PatientID>__CT.nii.gz`` and
            ``__PT.nii.gz``); or the address of a DICOMweb server, user and password as for predict.py --dicomweb.
        port: of the server.
        host: address it listens on; this machine only by default.
        env: folder of its Python environment; ``.label_env`` beside this project by default (about 2.5 GB).
        app: folder of MONAI Label's app ``monaibundle`` with its copy of the bundle; inside ``env`` by default.
        store: folder of the server's list of CTs and of the masks that are edited; ``<studies>/monailabel`` by default.
        bundle: the bundle to serve; this project's by default.
        fresh_model: serve the bundle's weights again where training from MONAI Label has put others in their place.
        scans: folder whose files a request may name; ``studies`` by default, if that is a folder.
        audit: file that gets a line for each prediction; ``output/audit.jsonl`` of the bundle in ``app`` by default.
    """
    if not studies:
        raise UsageError("name the folder of the scans with --studies")
    login = web_login(str(studies))
    place = Path(env or ENVIRONMENT).expanduser().resolve()
    try:
        python = make_label_environment(place)
    except OwnEnvironmentError as error:
        raise UsageError(f"MONAI Label's environment cannot be made: {error}") from error
    folder = Path(app).expanduser().resolve() if app else place / "apps" / "monaibundle"
    name_segments(install_bundle(python, folder, Path(bundle or BUNDLE).expanduser().resolve(), fresh_model))
    reach = scans or ("" if is_address(str(studies)) else str(studies))
    places = {name: str(Path(each).expanduser().resolve()) for name, each in ((SCANS, reach), (AUDIT, audit)) if each}
    start_server(python, folder, list_studies(str(studies), store), host, port, places, login)


def is_address(studies: str) -> bool:
    """Whether the studies are on a DICOMweb server."""
    return studies.startswith(("http://", "https://"))


def web_login(studies: str) -> dict[str, str]:
    """MONAI Label's variables for user and password of a DICOMweb server, from this project's; of a folder none."""
    if not is_address(studies):
        return {}
    checked_address(studies)
    login = user_and_password()
    if login and not isinstance(login, tuple):
        raise UsageError(f"MONAI Label has no use for {TOKEN}: set {USER} and {PASSWORD}")
    names = ("MONAI_LABEL_DICOMWEB_USERNAME", "MONAI_LABEL_DICOMWEB_PASSWORD")
    return dict(zip(names, login, strict=True)) if login else {}


def install_bundle(python: Path, app: Path, bundle: Path, fresh_model: bool = False) -> Path:
    """Put the bundle into MONAI Label's app, which is created if it is missing; gives its folder there.

    Configs and scripts are brought up to date each time. Weights that are there stay: they may have been trained since.
    """
    weights = bundle / "models" / "model.pt"
    if not weights.is_file():
        raise UsageError(f"no weights at {weights}: README.md says how to train or to get them")
    if not (app / "main.py").is_file():
        command = ["-m", "monailabel.main", "apps", "--download", "--name", "monaibundle", "--output", str(app.parent)]
        run_step([str(python), *command])
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
    """Write the classes of the served weights into the metadata, from which MONAI Label's clients name the segments."""
    from scripts.model.ensemble import saved_spec  # torch is slow to import

    classes = saved_spec(bundle / "models" / "model.pt").seg_classes
    if len(classes) > 1:
        path = bundle / "configs" / "metadata.json"
        metadata = json.loads(path.read_text(encoding="utf-8"))
        named = {str(value): name for value, name in enumerate(("background", *classes))}
        metadata["network_data_format"]["outputs"]["pred"]["channel_def"] = named
        write_text(path, json.dumps(metadata, indent=4) + "\n")


def list_studies(studies: str, store: str | None = None) -> str:
    """What MONAI Label is to take for its studies: a flat folder with a link to each CT, or a server's address.

    MONAI Label reads links through, so that PET and CSV are found where the CT really lies.
    """
    if is_address(studies):
        return studies
    scans, notes = find_scans(studies)
    folder = Path(store or Path(studies) / "monailabel").expanduser().resolve()
    with_ct = {key: found for key, found in scans.items() if found.ct}
    if not with_ct:
        raise UsageError(f"no CT in {studies}: expected <PatientID>/<PatientID>__CT.nii.gz (and __PT.nii.gz)")
    try:
        _link(folder, [Path(str(found.ct)).resolve() for found in with_ct.values()])
    except OSError as error:
        raise UsageError(f"the list of CTs cannot be written: {error}; name a folder for it with --store") from error
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


def start_server(
    python: Path,
    app: Path,
    studies: str,
    host: str,
    port: int,
    places: Mapping[str, str] | None = None,
    login: Mapping[str, str] | None = None,
) -> NoReturn:
    """Become MONAI Label's server; ``places`` are further settings of the bundle, ``login`` environment variables."""
    environment = {**os.environ, **(login or {})}
    # dcmqi's programs, which it would download
    environment["PATH"] = os.pathsep.join(filter(None, (str(python.parent), environment.get("PATH", ""))))
    environment.pop("PYTHONPATH", None)  # of this project's environment
    environment.setdefault("CUDA_VISIBLE_DEVICES", "0")  # training from MONAI Label takes one GPU
    environment[HOSTS] = json.dumps([*allowed(HOSTS), host])
    settings = {"models": NAME, "zoo_source": "local", "sam2": "false", **(places or {})}
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
    "label": (serve_label, (OSError, OwnEnvironmentError, ValueError)),
    "dicom": (serve_dicom, (OSError, ImportError, ValueError)),
}

if __name__ == "__main__":
    run_commands(COMMANDS)
