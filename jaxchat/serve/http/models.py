"""What the server says about itself: its models, its health, and what the page needs to know."""

from __future__ import annotations

from pathlib import PurePath
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from jaxchat import __version__
from jaxchat.serve.http.errors import JsonResponse
from jaxchat.serve.http.serving import Served, ready, server_of

_QUESTIONS = ("Who are you?", "What is 34 + 58?", "How many r are in strawberry?")
_BEGINNINGS = ("Once upon a time", "The capital of", "In the morning")


def _model(served: Served) -> dict[str, Any]:
    return {
        "id": served.name,
        "object": "model",
        "created": served.created,
        "owned_by": "jaxchat",
        "root": served.name,
        "max_model_len": served.context,
    }


async def models(request: Request) -> Response:
    """GET /v1/models"""
    _, served = ready(request)
    return JsonResponse({"object": "list", "data": [_model(served)]})


async def model(request: Request) -> Response:
    """GET /v1/models/{id}"""
    _, served = ready(request)
    served.check_name(request.path_params["id"])
    return JsonResponse(_model(served))


async def health(request: Request) -> Response:
    """GET /health: status 200 if requests are answered, else 503."""
    if server_of(request).service is None:
        return JsonResponse({"status": "watching"})
    ready(request)
    return JsonResponse({"status": "ready"})


async def version(request: Request) -> Response:
    """GET /version"""
    return JsonResponse({"version": __version__})


async def metrics(request: Request) -> Response:
    """GET /metrics"""
    server = server_of(request)
    name = server.served.name if server.served else ""
    text = server.service.metrics.text(name, server.service.engine) if server.service else ""
    return Response(text, media_type="text/plain; version=0.0.4")


async def info(request: Request) -> Response:
    """GET /api/info: the model and the run, for the page; `model` is null if only a run is watched."""
    server = server_of(request)
    content: dict[str, Any] = {
        "version": __version__,
        "run": PurePath(server.run_dir).name if server.run_dir else None,
        "model": None,
    }
    if server.service is not None:
        _, served = ready(request)
        content |= {
            "model": served.name,
            "stage": served.stage,
            "stages": served.stages,
            "base": served.base,
            "context": served.context,
            "vocabulary": served.vocabulary,
            "parameters": served.parameters,
            "tools": served.tool_name,
            "examples": _BEGINNINGS if served.base else _QUESTIONS,
        }
    return JsonResponse(content)
