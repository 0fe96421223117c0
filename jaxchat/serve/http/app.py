"""The application: all routes, and what every request goes through."""

from __future__ import annotations

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route

from jaxchat.serve.http import models, run, tokens
from jaxchat.serve.http.chat import chat_completions
from jaxchat.serve.http.completions import completions
from jaxchat.serve.http.errors import ApiError, on_api_error, on_bug, on_http_exception
from jaxchat.serve.http.guard import Guard
from jaxchat.serve.http.pages import Page
from jaxchat.serve.http.serving import Server


def build_app(server: Server) -> Starlette:
    """The ASGI application of a server."""
    routes = [
        Route("/v1/chat/completions", chat_completions, methods=["POST"]),
        Route("/v1/completions", completions, methods=["POST"]),
        Route("/v1/models", models.models),
        Route("/v1/models/{id:path}", models.model),
        Route("/health", models.health),
        Route("/version", models.version),
        Route("/metrics", models.metrics),
        Route("/tokenize", tokens.tokenize, methods=["POST"]),
        Route("/detokenize", tokens.detokenize, methods=["POST"]),
        Route("/tokenizer_info", tokens.tokenizer_info),
        Route("/api/info", models.info),
    ]
    if server.service is not None:
        from jaxchat.serve.http import inside  # imports JAX, which a run can be watched without

        routes += inside.routes(server.service)
    if server.run_dir is not None:
        routes += run.routes(server.run_dir)
    middleware = []
    if server.origins:
        cors = {"allow_origins": server.origins, "allow_methods": ["GET", "POST"], "allow_headers": ["*"]}
        middleware.append(Middleware(CORSMiddleware, **cors, expose_headers=["x-request-id", "retry-after"]))
    middleware.append(Middleware(Guard, server=server))
    app = Starlette(
        routes=routes,
        middleware=middleware,
        exception_handlers={
            ApiError: on_api_error,
            HTTPException: on_http_exception,
            ClientDisconnect: _on_left,
            Exception: on_bug,
        },
    )
    app.router.default = Page()
    app.state.server = server
    return app


def _on_left(request: Request, error: Exception) -> Response:
    """The client has gone: nobody reads this; the log shows nginx's code for it."""
    return Response(status_code=499)
