"""The files of the page."""

from __future__ import annotations

import os
from pathlib import Path

from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.staticfiles import StaticFiles
from starlette.types import Scope

FOLDER = Path(__file__).parent / "page"


class Page(StaticFiles):
    """The page and its assets. Browsers keep them, and ask by their ETag whether they have changed."""

    def __init__(self):
        super().__init__(directory=FOLDER, html=True, check_dir=False)

    async def get_response(self, path: str, scope: Scope) -> Response:
        if scope["method"] not in ("GET", "HEAD") and not os.path.isfile(FOLDER / path):
            raise HTTPException(404)
        # The files are small, and starlette answers an impossible Range with an error of its own form.
        scope["headers"] = [(name, value) for name, value in scope["headers"] if name != b"range"]
        response = await super().get_response(path, scope)
        response.headers["cache-control"] = "no-cache"
        return response
