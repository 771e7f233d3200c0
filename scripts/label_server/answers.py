"""MONAI Label's web application, whose replies say what was wrong with a request.

MONAI Label answers an error with "Internal Server Error" and writes the reason to its log only. ``serve_label.py`` runs
this module inside MONAI Label's environment (``--uvicorn_app answers:app``).
"""

from __future__ import annotations

import logging

from fastapi import Request
from fastapi.responses import JSONResponse
from monailabel.app import app
from monailabel.interfaces.exception import MONAILabelException
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware, RequestResponseEndpoint
from starlette.responses import Response

logger = logging.getLogger(__name__)

__all__ = ["app"]

UNFORESEEN = (LookupError, TypeError, AttributeError)  # their words alone tell nobody anything

WRAPPED = ("Failed to instantiate", "Failed to evaluate")  # what MONAI says of a config in the place of the cause


class Explain(BaseHTTPMiddleware):
    """Replies with the error's own words, as FastAPI does for its errors: ``{"detail": ...}``."""

    async def dispatch(self, request: Request, call_next: RequestResponseEndpoint) -> Response:
        """Answer, or say why not: 400 for what the request is to blame for, 500 for the rest."""
        try:
            return await call_next(request)
        except Exception as caught:  # the bundle's errors are of classes that are loaded anew for each request
            error: BaseException = caught
            logger.exception("%s", request.url.path)
            while error.__cause__ is not None and str(error).startswith(WRAPPED):
                error = error.__cause__
            message = error.msg if isinstance(error, MONAILabelException) else str(error)
            if isinstance(error, UNFORESEEN):
                message = f"{type(error).__name__}: {message}; the server's log tells more"
            code = 500 if isinstance(error, UNFORESEEN) else 400
            return JSONResponse(status_code=code, content={"detail": message or type(error).__name__})


app.user_middleware.append(Middleware(Explain))  # innermost: a browser may read the reply only with the headers for it
