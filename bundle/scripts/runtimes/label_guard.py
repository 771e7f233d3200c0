"""What a MONAI Label server accepts in a request for this bundle: listed parameters, and files of the studies.

MONAI Label writes parameters of a request into configs, which are then evaluated. Here every value is first parsed by
its own rule, and unknown parameters are refused by name; the only values that reach a config are a boolean and the path
of a file in ``models/``. ``inference.json`` imports this module, so that it is active in every MONAI Label server that
serves the bundle; elsewhere the import has no effect. It also adds the overlays ``configs/label.json`` and
``configs/label_train.json``. :mod:`scripts.runtimes.label_web` decides who may send requests.
"""

from __future__ import annotations

import difflib
import functools
import logging
import math
import os
import re
import sys
import tempfile
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from scripts.cohorts.clinical import FEATURES, match_columns, parse_clinical
from scripts.cohorts.files import in_config
from scripts.dicom.web import DicomWeb

logger = logging.getLogger(__name__)

CHECKPOINT, FORCE = "checkpoint", "force"  # ids of inference.json
PREDICTION_OVERLAY, TRAINING_OVERLAY = "label.json", "label_train.json"
DEFAULT_WEIGHTS = "model.pt"
TABLES = (".csv", ".tsv", ".json")
SCANS = "scans"  # ``--conf scans DIR``: a folder beside the studies whose files a request may name
AUDIT = "audit"  # ``--conf audit FILE``: the file that gets a line for each prediction
NAME = r"[^./\\\x00-\x1f\x7f][^/\\\x00-\x1f\x7f]*"  # of a scan, a mask or a tag: no path
UPLOAD = r"tmp[a-z0-9_]{8}(\..*)?"  # how MONAI Label names the file of a request, by the module tempfile
LOGGING = ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")
INTEGERS = ("uint8", "uint16", "int16", "int32")
LONGEST = 1024  # letters of a text

_MARK = "_guarded"
_TURN = threading.RLock()  # requests share one config: one at a time


class RequestError(ValueError):
    """A request that is refused; the message names the parameter and says what is accepted."""


@dataclass(frozen=True)
class Parameter:
    """A parameter of a request."""

    accepted: str  # what is accepted, in words
    read: Callable[[Any], Any]  # gives the value as the server takes it; raises ValueError for any other


def _truth(value: Any) -> bool:
    words = {"true": True, "false": False}
    if isinstance(value, bool):
        return value
    if not isinstance(value, str) or value.lower() not in words:
        raise ValueError(value)
    return words[value.lower()]


def _whole(low: int, high: int) -> Parameter:
    def read(value: Any) -> int:
        number = _number(value)
        if number != int(number) or not low <= number <= high:
            raise ValueError(value)
        return int(number)

    return Parameter(f"a whole number from {low} to {high}", read)


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise ValueError(value)
    number = float(value)
    if not math.isfinite(number):
        raise ValueError(value)
    return number


def _text(value: Any, pattern: str = r"[^\x00-\x1f\x7f]*") -> str:
    if not isinstance(value, str) or len(value) > LONGEST or not re.fullmatch(pattern, value):
        raise ValueError(value)
    return str(value)


def _like(accepted: str, pattern: str) -> Parameter:
    return Parameter(accepted, lambda value: _text(value, pattern))


def _one_of(*names: str) -> Parameter:
    def read(value: Any) -> str:
        return next(name for name in names if name.lower() == _text(value).lower())

    return Parameter(" or ".join(repr(name) for name in names), read)


def _patient(value: Any) -> str:
    return _text(str(value) if isinstance(value, int) and not isinstance(value, bool) else value, r"[^\x00-\x1f/\\]*")


def _device(value: Any) -> str:
    """``cpu``, ``cuda``, ``cuda:N``, or the name of a GPU as MONAI Label lists it.

    Without any GPU MONAI Label takes the CPU for all of them.
    """
    name = _text(value)
    generic = sys.modules.get("monailabel.utils.others.generic")
    listed = re.fullmatch(r"cpu|cuda(?::(\d\d?))?", name)
    if name and name not in (generic.device_map() if generic else {}) and not listed:
        raise ValueError(value)
    if listed and listed[1]:
        import torch  # slow: serve.py reads its options with this module

        if 0 < torch.cuda.device_count() <= int(listed[1]):
            raise ValueError(value)
    return name


def _validation_share(value: Any) -> float:
    share = _number(value)
    if not (share == -1 or 0 <= share <= 0.9):
        raise ValueError(value)
    return share


def _must_be_true(value: Any) -> bool:
    if not _truth(value):
        raise ValueError(value)
    return True


def _no_address(value: Any) -> str:
    settings = _settings()
    if settings is None or value != settings.MONAI_LABEL_TRACKING_URI:
        raise ValueError(value)
    return str(value)


def _anything(value: Any) -> None:
    """Accept a parameter that clients send and that is not used; it is dropped."""


TRUE_OR_FALSE = Parameter("true or false", _truth)
UNREAD = Parameter("anything", _anything)
_DEVICE = Parameter("'cpu', 'cuda', 'cuda:0', ... or the name of a GPU of the server", _device)
_WEIGHTS = _like("the name of a file in the model's folder models/, such as 'model.pt'", r"\w[\w.-]*\.pt")
_GPUS = _like("'all' or numbers such as '0,1'", r"all|\d\d?(,\d\d?)*")
_WORDS = _like("a name of letters and digits", r"\w[\w .-]*")

CHOICES = ("device", "model_filename", "tracking")  # MONAI Label shows these as lists; the first is the one chosen
SHARED = {  # by predictions and trainings; the last rows are MONAI Label's own and its clients'
    "device": _DEVICE,
    "model_filename": _WEIGHTS,
    "multi_gpu": TRUE_OR_FALSE,
    "gpus": _GPUS,
    **dict.fromkeys(("model", "bundle_path", "client_id", "description", "name"), UNREAD),
}
PREDICTION = {
    **SHARED,
    "image": Parameter("the id of a CT in the server's list", _text),
    "pet": Parameter("a file beside the CT, or a path within the studies", _text),
    "ehr_csv": Parameter("a table beside the CT, or a path within the studies", _text),
    "patient_id": Parameter("a patient's id", _patient),
    FORCE: TRUE_OR_FALSE,
    "result_extension": _one_of(".nrrd", ".seg.nrrd", ".nii.gz", ".nii", ".mha"),
    "result_dtype": _one_of(*INTEGERS, "float32"),
    "result_compress": TRUE_OR_FALSE,
    "result_write_to_file": TRUE_OR_FALSE,
    "logging": _one_of(*LOGGING),
    "save_label": TRUE_OR_FALSE,
    "label_tag": _like("a plain name", NAME),
    "timeout": _whole(1, 86400),
    "images": _one_of("all", "labeled", "unlabeled"),
    "max_workers": _whole(0, 64),
    "max_batch_size": _whole(0, 10**6),
    **dict.fromkeys(("label", "label_info", "label_prompt", "restore_label_idx", "session"), UNREAD),
    **dict.fromkeys(("image_path", "latencies", "_id", "_image_id"), UNREAD),
}
TRAINING = {
    **SHARED,
    "max_epochs": _whole(1, 10000),
    "val_split": Parameter("a number from 0 to 0.9, or -1", _validation_share),
    "pretrained": Parameter("true (from scratch, train with `python -m monai.bundle run training`)", _must_be_true),
    "force_multi_gpu": TRUE_OR_FALSE,
    "run_id": _one_of("run"),
    "tracking": _one_of("None", "mlflow"),
    "tracking_uri": Parameter("empty, or the address that the server is set to", _no_address),
    "tracking_experiment_name": _WORDS,
    "tracking_run_name": _WORDS,
    "local_rank": UNREAD,
}


def read_prediction(request: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters of a prediction that are used, parsed.

    Args:
        request: of the client, completed by MONAI Label. Clinical values may have any name that a table may have.

    Raises:
        RequestError: a parameter is not known, or its value is none of those accepted.
        scripts.cohorts.clinical.ClinicalValueError: a clinical value cannot be read.

    Example:
        >>> read_prediction({"force": "true", "Age": 61, "client_id": "slicer"})
        {'force': True, 'Age': 61}
        >>> read_prediction({"agee": 61})
        Traceback (most recent call last):
        ...
        scripts.runtimes.label_guard.RequestError: unknown parameter 'agee'; is 'age' meant?
    """
    clinical = {name: value for name, value in request.items() if _is_clinical(name)}
    for name, value in clinical.items():
        if not isinstance(value, int | float | str | None) or len(str(value)) > 100:
            raise RequestError(f"{name} is a single number or word, got {_shown(value)}")
    parse_clinical(clinical, list(FEATURES), where="request")
    return _read(request, PREDICTION, clinical)


def read_training(request: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters of a training, as :func:`read_prediction` gives those of a prediction."""
    return _read(request, TRAINING)


def _read(
    request: Mapping[str, Any], known: Mapping[str, Parameter], clinical: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    taken: dict[str, Any] = {}
    for name, value in request.items():
        if clinical and name in clinical:
            taken[name] = value
            continue
        if name not in known:
            raise RequestError(f"unknown parameter {_shown(name)}; {_meant(str(name), known, clinical is not None)}")
        if known[name] is UNREAD or value in (None, ""):
            continue
        single = value[0] if name in CHOICES and isinstance(value, list) and value else value
        try:
            taken[name] = known[name].read(single.value if isinstance(single, Enum) else single)
        except (ValueError, StopIteration):
            raise RequestError(f"{name} is {known[name].accepted}, got {_shown(value)}") from None
    return taken


def _is_clinical(name: str) -> bool:
    return any(match_columns([str(name)], feature) for feature in FEATURES)


def _meant(name: str, known: Mapping[str, Parameter], clinical: bool) -> str:
    """The most similar known name, or all known names."""
    names = [each for each in known if known[each] is not UNREAD]
    columns = [each for feature in FEATURES.values() for each in (feature.name, feature.column)] if clinical else []
    lower = {each.lower(): each for each in (*columns[::-1], *names)}
    near = difflib.get_close_matches(name.lower(), lower, n=1)
    return f"is {lower[near[0]]!r} meant?" if near else f"known are {', '.join((*names, *columns[::2]))}"


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."


# --- files ----------------------------------------------------------------------------------------------------------
def _settings() -> Any:
    """MONAI Label's settings; None outside its server."""
    return getattr(sys.modules.get("monailabel.config"), "settings", None)


def dicomweb_address() -> str | None:
    """Address of the DICOMweb server that the studies are on, as the server was started; None for a folder."""
    settings = _settings()
    studies = settings.MONAI_LABEL_STUDIES if settings is not None else ""
    return studies if studies and studies.startswith(("http://", "https://")) else None


def request_places() -> list[Path] | None:
    """The folders whose files a request may name, links resolved; None outside a server.

    They are the studies (of a DICOMweb server, its cache on this disk), the folder of ``--conf scans DIR``, and the
    sessions of MONAI Label, which hold uploads.
    """
    settings = _settings()
    if settings is None or not settings.MONAI_LABEL_STUDIES:
        return None
    cache = Path.home() / ".cache" / "monailabel"
    places = [settings.MONAI_LABEL_SESSION_PATH.strip() or cache / "sessions"]
    if dicomweb_address():
        places += [settings.MONAI_LABEL_DICOMWEB_CACHE_PATH.strip() or cache / "dicom"]
        places += [settings.MONAI_LABEL_DATASTORE_CACHE_PATH]
    else:
        places += [settings.MONAI_LABEL_STUDIES]
    places += [settings.MONAI_LABEL_APP_CONF.get(SCANS)]
    return [Path(place).expanduser().resolve() for place in places if place]


def is_upload(path: Path) -> bool:
    """Whether this is the temporary file in which MONAI Label stores an upload; its name cannot be guessed."""
    folder = Path(tempfile.gettempdir()).resolve()
    return path.parent.resolve() == folder and not path.is_symlink() and bool(re.fullmatch(UPLOAD, path.name))


def confined(name: str, path: Path, ct: Path | None = None) -> Path:
    """The path in a request, if it may be used.

    Args:
        name: of the parameter.
        path: what it says.
        ct: the CT of the request, whose folder counts too.

    Raises:
        RequestError: with links resolved, it lies neither in the studies nor in the upload. The message does not tell
            whether there is such a file.
    """
    places = request_places()
    if places is None:
        return path
    found = path.resolve()
    if ct is not None and not is_upload(ct):
        places.append(ct.parent.resolve())
    if not (is_upload(path) or any(found.is_relative_to(place) for place in places) or _is_listed(found)):
        raise RequestError(f"{name} is a file of the studies, got {_shown(str(path.name))}, which is none of them")
    return path


def _is_listed(found: Path) -> bool:
    """Whether the server's list of scans has a link to this file."""
    studies = Path(_settings().MONAI_LABEL_STUDIES)
    links = [path for path in studies.iterdir() if path.is_symlink()] if studies.is_dir() else []
    return any(link.resolve() == found for link in links)


def for_client(text: str) -> str:
    """A message without folders of this machine: paths relative to the studies, or file names."""
    bundle = Path(__file__).resolve().parents[2]
    for place in [*(request_places() or []), bundle, Path(tempfile.gettempdir()), Path.home()]:
        text = text.replace(f"{place}{os.sep}", "")
    return re.sub(r"(?<![\w.~/-])(?:[A-Za-z]:)?[\\/](?:[^\s\\/'\":;,()]+[\\/])+", "", text)


# --- MONAI Label ----------------------------------------------------------------------------------------------------
def is_guarded(bundle_path: Any) -> bool:
    """Whether the folder is a bundle with this module."""
    return bool(bundle_path) and (Path(str(bundle_path)) / "scripts" / "runtimes" / Path(__file__).name).is_file()


def serves(app: Any, model: Any) -> bool:
    """Whether the model of this name in MONAI Label's app is a bundle with this module."""
    file = app.model_file(model, validate=False) if isinstance(model, str) else None
    return bool(file) and is_guarded(Path(str(file)).parents[1])


def _choose_weights(taken: Mapping[str, Any], bundle_path: str) -> str:
    """The name of the requested weights, from the list of the folder."""
    wanted = taken.get("model_filename", DEFAULT_WEIGHTS)
    names = sorted(path.name for path in (Path(bundle_path) / "models").glob("*.pt"))
    if wanted not in names:
        raise RequestError(f"model_filename is one of {', '.join(names)}, got {_shown(wanted)}")
    return names[names.index(wanted)]


def _add_overlay(task: Any, name: str) -> None:
    """Let a task of MONAI Label use its config with an overlay of the bundle; a second call changes nothing."""
    if not isinstance(task.bundle_config_path, list):
        task.bundle_config_path = [task.bundle_config_path, str(Path(task.bundle_path) / "configs" / name)]
        task.bundle_config = task._load_bundle_config(task.bundle_path, task.bundle_config_path)


def audit_file(bundle_path: str) -> Path:
    """The server's audit: the file of ``--conf audit FILE``, by default ``output/audit.jsonl`` of the bundle."""
    settings = _settings()
    named = settings.MONAI_LABEL_APP_CONF.get(AUDIT) if settings is not None else None
    return Path(named).expanduser() if named else Path(bundle_path) / "output" / "audit.jsonl"


def _audit(task: Any, taken: Mapping[str, Any], checkpoint: str, prediction: Mapping[str, Any] | None = None) -> None:
    """Append a request to the audit; where that fails, the log says so."""
    sys.path.insert(0, task.bundle_path)  # MONAI Label takes it away, and the modules too
    try:
        from scripts.runtimes.label import audit_request

        audit_request(audit_file(task.bundle_path), taken, checkpoint, prediction)
    except OSError as error:
        logger.error("no audit: %s: %s", audit_file(task.bundle_path), error.strerror)
    finally:
        sys.path.remove(task.bundle_path)


def _guard_predictions(task_class: Any) -> None:
    """Pass requests to the task of a bundle only after :func:`read_prediction`."""
    predict, show = task_class.__call__, task_class.config

    @functools.wraps(predict)
    def guarded(task: Any, request: Mapping[str, Any], *more: Any, **options: Any) -> Any:
        if not is_guarded(task.bundle_path):
            return predict(task, request, *more, **options)
        taken = read_prediction(request)
        taken["model_filename"] = _choose_weights(taken, task.bundle_path)
        taken.setdefault("image", "")  # of an id that is not in the list
        with _TURN:  # setting an id resets the parser, so that weights trained since then are read
            _add_overlay(task, PREDICTION_OVERLAY)
            chosen = Path(task.bundle_path) / "models" / taken["model_filename"]
            task.bundle_config.set(in_config(str(chosen)), CHECKPOINT)
            task.bundle_config.set(taken.get(FORCE, False), FORCE)
            try:
                reply = predict(task, taken, *more, **options)
            except Exception:
                _audit(task, taken, str(chosen))  # a line of what failed, too
                raise
            _audit(task, taken, str(chosen), reply[1])
            return reply

    @functools.wraps(show)
    def config(task: Any) -> dict[str, Any]:
        return {**show(task), FORCE: False} if is_guarded(task.bundle_path) else show(task)

    task_class.__call__, task_class.config = guarded, config


def _guard_trainings(task_class: Any) -> None:
    """Pass requests to the training task of a bundle only after :func:`read_training`."""
    train = task_class.__call__

    @functools.wraps(train)
    def guarded(task: Any, request: Mapping[str, Any], *more: Any, **options: Any) -> Any:
        if is_guarded(task.bundle_path):
            model = request.get("model")
            request = read_training(request)
            request = {**request, "model": model, "model_filename": _choose_weights(request, task.bundle_path)}
            _add_overlay(task, TRAINING_OVERLAY)
        return train(task, request, *more, **options)

    task_class.__call__ = guarded


def _guard_jobs(job_class: Any) -> None:
    """Refuse an invalid request before a background job is started."""
    run = job_class.run

    @functools.wraps(run)
    def guarded(method: str, request: Any = None, params: Any = None, *more: Any, **options: Any) -> Any:
        from monailabel.interfaces.utils.app import app_instance

        app = app_instance()
        asked = {**(request or {}), **(params or {})}
        model = asked.get("model")
        if method in ("train", "batch_infer") and serves(app, model):
            models = app.info()["models"]  # OHIF sends {model: its parameters}
            asked = {name: value for name, value in asked.items() if not (name in models and isinstance(value, dict))}
            request, params = (read_training if method == "train" else read_prediction)(asked), None
            request = {**request, "model": model}
        return run(method, request, params, *more, **options)

    job_class.run = staticmethod(guarded)


def _fetch(datastore: Any, image: str) -> None:
    """Let MONAI Label fetch a CT into its cache.

    At the first request MONAI Label returns the path of a temporary copy, which it does not remove; after that, the
    path of the file in its cache.
    """
    named = Path(datastore.get_image_uri(image))
    if is_upload(named):
        named.unlink(missing_ok=True)


def _guard_app(app_class: Any) -> None:
    """Check the image before the list of scans is used; refuse whole-slide images."""
    infer, infer_wsi = app_class.infer, app_class.infer_wsi

    @functools.wraps(infer)
    def guarded(app: Any, request: Any, datastore: Any = None) -> Any:
        image = request.get("image")
        if serves(app, request.get("model")):
            try:
                _text(image)
            except ValueError:
                raise RequestError(f"image is {PREDICTION['image'].accepted}, got {_shown(image)}") from None
            if image and (address := dicomweb_address()) and not os.path.exists(image):  # noqa: PTH110 - as below
                DicomWeb(address).study_of(image)  # MONAI Label would not say what is wrong with it
                _fetch(datastore or app.datastore(), image)
            if image and (os.path.exists(image) or not re.fullmatch(NAME, image)):  # noqa: PTH110 - it raises nothing
                confined("image", Path(image))
        return infer(app, request, datastore)

    @functools.wraps(infer_wsi)
    def refused(app: Any, request: Any, datastore: Any = None) -> Any:
        if serves(app, request.get("model")):
            raise RequestError("this model takes no whole-slide images: POST to infer/MODEL")
        return infer_wsi(app, request, datastore)

    app_class.infer, app_class.infer_wsi = guarded, refused


def install() -> None:
    """Check all requests to MONAI Label; a second call changes nothing."""
    from monailabel.interfaces.app import MONAILabelApp
    from monailabel.tasks.infer.bundle import BundleInferTask
    from monailabel.tasks.train.bundle import BundleTrainTask
    from monailabel.utils.async_tasks.task import AsyncTask

    if not hasattr(MONAILabelApp, _MARK):
        setattr(MONAILabelApp, _MARK, True)
        _guard_app(MONAILabelApp)
        _guard_predictions(BundleInferTask)
        _guard_trainings(BundleTrainTask)
        _guard_jobs(AsyncTask)
    if "monailabel.app" in sys.modules:
        from scripts.runtimes import label_web

        label_web.install(sys.modules["monailabel.app"].app)


if "monailabel" in sys.modules:
    install()
