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

logger = logging.getLogger(__name__)

__all__ = ["app"]


@app.exception_handler(MONAILabelException)
@app.exception_handler(OSError)
@app.exception_handler(RuntimeError)
@app.exception_handler(ValueError)
async def explain(request: Request, error: Exception) -> JSONResponse:
    """Reply with the error's own words, as FastAPI does for its errors: ``{"detail": ...}``."""
    logger.error("%s: %s", request.url.path, error, exc_info=error)
    message = error.msg if isinstance(error, MONAILabelException) else str(error)
    return JSONResponse(status_code=400, content={"detail": message or type(error).__name__})
