"""Which hosts and origins a MONAI Label server with this bundle accepts, and the text of its error replies.

MONAI Label accepts every ``Host`` and every ``Origin``, and lets web pages of any origin read its replies. Here
``Host`` must name this server, which prevents DNS rebinding, and ``Origin`` must be that of the server's own pages or
one that is allowed. :mod:`scripts.runtimes.label_guard` installs this in the server.
"""

from __future__ import annotations

import ipaddress
import json
import logging
import os
import re
import socket
import sys
from collections.abc import Awaitable, Callable, Iterable, MutableMapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import parse_qs, urlsplit

from scripts.imaging.images import image_suffix
from scripts.runtimes.label_guard import NAME, RequestError, for_client, serves

logger = logging.getLogger(__name__)

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]

# Environment variables, each a JSON list: further names of this server, and the origins whose pages may use it.
# MONAI Label's own MONAI_LABEL_CORS_ORIGINS counts too, but its version 0.8.5 does not start with it.
HOSTS, ORIGINS = "MONAI_LABEL_ALLOWED_HOSTS", "MONAI_LABEL_ALLOWED_ORIGINS"
SESSION = r"[\w-]+"
LOG_PAGE = """<!doctype html>
<html><head><meta charset="utf-8"><title>Log</title></head>
<body><pre id="log" style="white-space: pre-wrap"></pre>
<script>
function fetch() {
  var asked = new XMLHttpRequest();
  asked.onload = function () {
    document.getElementById("log").textContent = asked.responseText;
    window.scrollTo(0, document.body.scrollHeight);
  };
  asked.open("GET", "?text=true&lines=LINES_T");
  asked.send();
}
fetch();
REFRESH_T
</script></body></html>
"""
"""The page of the log; MONAI Label's own page loads scripts from the internet and is empty offline."""


# --- hosts and origins ----------------------------------------------------------------------------------------------
def is_own_host(host: str, server: str, hosts: Iterable[str] = ()) -> bool:
    """Whether a request with this header ``Host`` is addressed to the server, at whose address it came in.

    It may have the names ``hosts`` besides.

    Example:
        >>> [is_own_host(host, "10.0.0.5") for host in ("localhost:8000", "10.0.0.5:8000", "evil.example:8000")]
        [True, True, False]
    """
    try:
        name = (urlsplit(f"//{host}").hostname or "").lower()
    except ValueError:
        return False
    machine = socket.gethostname().lower()
    if name and name in {
        "localhost",
        server.lower(),
        machine,
        machine.split(".")[0],
        *(each.lower() for each in hosts),
    }:
        return True
    try:
        address = ipaddress.ip_address(name)
    except ValueError:
        return False
    return address.is_loopback or address.is_unspecified


def is_allowed_origin(origin: str, host: str, origins: Iterable[str] = ()) -> bool:
    """Whether a web page of this origin may send requests: the server's own pages, and those allowed.

    Example:
        >>> [is_allowed_origin(o, "localhost:8000") for o in ("http://localhost:8000", "http://localhost:3000", "null")]
        [True, False, False]
    """
    try:
        page = urlsplit(origin)
    except ValueError:
        return False
    same = page.scheme in ("http", "https") and page.netloc.lower() == host.lower()
    return same or origin.lower() in {each.rstrip("/").lower() for each in origins}


def refusal(scope: Message, hosts: Sequence[str] = (), origins: Sequence[str] = ()) -> tuple[int, str] | None:
    """Status and text with which a request is refused; None for one that is accepted."""
    headers: dict[str, list[str]] = {}
    for name, value in scope.get("headers", []):
        headers.setdefault(name.decode("latin-1").lower(), []).append(value.decode("latin-1"))
    addressed = headers.get("host", [])
    server = (scope.get("server") or ("", 0))[0]
    if len(addressed) != 1 or not is_own_host(addressed[0], server, hosts):
        return 403, f"this server does not go by the name {', '.join(addressed)!r}; {HOSTS} allows more names"
    for origin in headers.get("origin", []):
        if not is_allowed_origin(origin, addressed[0], origins):
            return 403, f"web pages of {origin!r} may not use this server; {ORIGINS} allows more origins"
    return _refused_names(scope) if scope["type"] == "http" else None


def _refused_names(scope: Message) -> tuple[int, str] | None:
    """Refuse names that contain a path, and requests to replace or remove linked scans or the weights."""
    path, method = scope["path"].rstrip("/"), scope["method"]
    query = parse_qs(scope.get("query_string", b"").decode("latin-1"), keep_blank_values=True)
    for name, pattern in (("session_id", SESSION), *((each, NAME) for each in ("id", "image", "label", "tag"))):
        if name == "session_id" or re.search("/datastore(/|$)", path):
            for value in query.get(name, []):
                if value and not re.fullmatch(pattern, value):
                    return 400, f"{name} is a plain name, got {value[:60]!r}"
    if re.search("/session$", path) and query.get("uncompress", ["false"])[-1].lower() not in ("", "0", "false"):
        return 400, "uncompress: archives are not unpacked; send their files"
    if re.search("/datastore(/image)?$", path) and method in ("PUT", "DELETE"):
        scan = (query.get("image" if method == "PUT" else "id") or [""])[-1]
        if not scan:
            return 400, "name the scan in the address: ?image=ID (to remove one, ?id=ID)"
        if _is_link(scan):
            return 403, f"{scan}: the list only links to this scan; replace or remove its file itself"
    model = re.search("/model/([^/]+)$", path)
    if model and method in ("PUT", "DELETE") and _is_guarded_model(model[1]):
        return 403, "weights are put into the model's folder models/ on the server, not by a request"
    return None


def _is_link(scan: str) -> bool:
    """Whether the server's list has a link of this name."""
    studies = Path(sys.modules["monailabel.config"].settings.MONAI_LABEL_STUDIES)
    links = [path.name for path in studies.iterdir() if path.is_symlink()] if studies.is_dir() else []
    return any(link == scan or link.removesuffix(link[len(link) - len(image_suffix(link)) :]) == scan for link in links)


def _is_guarded_model(model: str) -> bool:
    return serves(sys.modules["monailabel.interfaces.utils.app"].app_instance(), model)


class Guard:
    """ASGI middleware: forwards the requests that :func:`refusal` accepts."""

    def __init__(self, app: App, hosts: Sequence[str] = (), origins: Sequence[str] = ()) -> None:
        self.app, self.hosts, self.origins = app, hosts, origins

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Forward the request or refuse it."""
        refused = refusal(scope, self.hosts, self.origins) if scope["type"] in ("http", "websocket") else None
        if refused is None:
            await self.app(scope, receive, send)
            return
        logger.warning("refused: %s %s: %s", scope.get("method", ""), scope["path"], refused[1])
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        else:
            await _reply(send, *refused)


# --- what replies say -----------------------------------------------------------------------------------------------
def explain(error: BaseException) -> tuple[int, str]:
    """Status and text for an error: 400 with the message of an error of the bundle or of MONAI Label, else 500.

    Messages of other errors may quote the content of a file, so that only their type is given.
    """
    chain = [error]
    while (cause := chain[-1].__cause__) is not None:
        chain.append(cause)
    for each in chain:  # MONAI wraps errors; classes are no help, since the bundle is imported anew for every request
        if type(each).__module__.partition(".")[0] == "scripts":
            return 400, for_client(str(each))
        if isinstance(each, json.JSONDecodeError):
            return 400, f"params is no valid JSON: {each.msg}"
        if type(each).__module__.startswith("monailabel.") and hasattr(each, "msg"):
            return 400, for_client(str(each.msg))
    return 500, f"the server failed at this ({type(chain[-1]).__name__}); its log tells more"


class Explain:
    """ASGI middleware: replies to a failed request with the reason, in FastAPI's format ``{"detail": ...}``."""

    def __init__(self, app: App) -> None:
        self.app = app

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Answer the request, or reply with the reason why not."""
        started = False

        async def sending(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        try:
            await self.app(scope, receive, sending)
        except Exception as error:
            if started or scope["type"] != "http":
                raise
            status, text = explain(error)
            logger.warning("%s: %s", scope["path"], text, exc_info=error if status == 500 else None)
            await _reply(send, status, text)


def read_params(text: str) -> dict[str, Any]:
    """The parameters of a form, for MONAI Label's endpoints, which would fail at anything but an object.

    Raises:
        json.JSONDecodeError: the text is no JSON.
        RequestError: it is no object, or nested or long beyond what Python reads.

    Example:
        >>> read_params('{"age": 61}')
        {'age': 61}
    """
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        raise
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise RequestError('params is an object of names and values, such as {"age": 61}')
    return value


async def _reply(send: Send, status: int, text: str) -> None:
    body = json.dumps({"detail": text}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


# --- in the server --------------------------------------------------------------------------------------------------
def allowed(variable: str) -> list[str]:
    """The texts in the environment variable, :data:`HOSTS` or :data:`ORIGINS`.

    Raises:
        ValueError: it is no JSON list of texts.
    """
    text = os.environ.get(variable, "").strip() or "[]"
    try:
        names = json.loads(text)
    except json.JSONDecodeError:
        names = None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        example = "gpu1.hospital.example" if variable == HOSTS else "https://viewer.hospital.example"
        raise ValueError(f'{variable} is a JSON list, such as ["{example}"], got {text}')
    return names


def install(app: Any) -> None:
    """Put :class:`Guard` and :class:`Explain` into MONAI Label's web application; a second call changes nothing."""
    from fastapi.middleware.cors import CORSMiddleware
    from monailabel.config import settings
    from monailabel.endpoints import datastore, infer, logs
    from starlette.middleware import Middleware

    if getattr(app.state, "guarded", False):
        return
    origins = [str(origin).rstrip("/") for origin in (*settings.MONAI_LABEL_CORS_ORIGINS, *allowed(ORIGINS))]
    kept = [each for each in app.user_middleware if each.cls is not CORSMiddleware]
    cors = Middleware(
        CORSMiddleware, allow_origins=origins, allow_credentials=True, allow_methods=["*"], allow_headers=["*"]
    )
    guard = Middleware(Guard, hosts=allowed(HOSTS), origins=origins)
    app.user_middleware = [guard, *([cors] if origins else []), *kept, Middleware(Explain)]
    if app.middleware_stack is not None:  # it has started: add_middleware would refuse
        app.middleware_stack = app.build_middleware_stack()
    app.state.guarded = True
    logs.HTML_TEMPLATE = LOG_PAGE
    for endpoints in (datastore, infer):
        endpoints.json = SimpleNamespace(loads=read_params, dumps=json.dumps)
