"""Checkpoints on S3: Orbax hands TensorStore paths of this machine and of gs:// alone, although TensorStore knows s3://.

What Orbax asks of TensorStore for a path of gs:// is asked for one of s3:// here. `AWS_ENDPOINT_URL` names another
server than Amazon's, as for its own tools.
"""

from __future__ import annotations

import functools
import os
from typing import Any

from orbax.checkpoint._src.serialization import tensorstore_utils

_build_spec = tensorstore_utils.build_kvstore_tspec


@functools.wraps(_build_spec)
def _build_spec_on_s3(directory: str | os.PathLike, *args: Any, **options: Any) -> dict[str, Any]:
    scheme, _, path = os.fspath(directory).partition("://")
    if scheme != "s3":
        return _build_spec(directory, *args, **options)
    return _on_s3(_build_spec(f"gs://{path}", *args, **options))


def _on_s3(spec: Any) -> Any:
    """The spec with S3 in the place of Google's storage, wherever it is nested."""
    if not isinstance(spec, dict):
        return spec
    if str(spec.get("driver")).startswith("gcs"):
        return {**spec, "driver": "s3", **_server()}
    return {name: _on_s3(value) for name, value in spec.items()}


def _server() -> dict[str, Any]:
    settings: dict[str, Any] = {}
    if "AWS_ACCESS_KEY_ID" in os.environ:
        # By itself TensorStore looks for files first, and complains on stderr about those that are missing.
        settings["aws_credentials"] = {"type": "environment"}
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    if endpoint:
        region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION") or "us-east-1"
        settings |= {"endpoint": endpoint, "aws_region": region}
    return settings


def install() -> None:
    """Lets Orbax write to and read from s3:// in this process."""
    tensorstore_utils.build_kvstore_tspec = _build_spec_on_s3
