"""Errors in OpenAI's form: a status, and `{"error": {"message", "type", "param", "code"}}`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "service_unavailable_error",
}


class ApiError(Exception):
    """What a client gets instead of an answer.

    Args:
      param: the field of the request that is at fault.
      code: what clients look for, such as `context_length_exceeded`.
      retry_after: the seconds after which the client may try again.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
        headers: Mapping[str, str] | None = None,
    ):
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers = dict(headers or {})
        if retry_after is not None:
            self.headers["retry-after"] = str(retry_after)

    def content(self) -> dict[str, Any]:
        """The JSON of the error."""
        kind = _TYPES.get(self.status, "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> Response:
        return JsonResponse(self.content(), self.status, headers=self.headers)


def expect(condition: bool, message: str, param: str | None = None) -> None:
    """Raises an `ApiError` with status 400 unless `condition` holds."""
    if not condition:
        raise ApiError(400, message, param=param)


def to_json(content: Any) -> bytes:
    """JSON in UTF-8; lone surrogates, which a client may have sent, become `?`."""
    return json.dumps(content, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode("utf-8", "replace")


class JsonResponse(Response):
    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return to_json(content)


def on_api_error(request: Request, error: Exception) -> Response:
    """Starlette's handler of `ApiError`."""
    assert isinstance(error, ApiError)
    return error.response()


def on_http_exception(request: Request, error: Exception) -> Response:
    """Starlette's handler of its own exceptions: unknown paths and methods."""
    assert isinstance(error, HTTPException)
    path, method = request.url.path, request.method
    messages = {404: f"there is nothing at {path}", 405: f"{path} does not take {method}"}
    message = messages.get(error.status_code, error.detail)
    allowed = (error.headers or {}).get("Allow")
    if error.status_code == 405 and allowed:
        message = f"{message}, only {allowed}"
    return ApiError(error.status_code, message, headers=error.headers).response()


def on_bug(request: Request, error: Exception) -> Response:
    """Starlette's handler of everything else; uvicorn prints the traceback."""
    return ApiError(500, "the server failed at this request; its log says why").response()
