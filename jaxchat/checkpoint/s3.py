"""Lets Orbax keep checkpoints on S3, which it does not offer although TensorStore, which writes its arrays, does.

Orbax chooses TensorStore's driver by the path, and knows two: files on this machine, and gs:// (version 0.12.8: no
argument, registry or context of its public interface reaches that choice). So one function of it is replaced: for a
path on s3:// it makes the specification that it would make for gs://, with the driver exchanged. `AWS_ENDPOINT_URL`
names another server than Amazon's, as it does for Amazon's own tools.
"""

from __future__ import annotations

import functools
import os
from typing import Any

from orbax.checkpoint._src.serialization import tensorstore_utils

_build_spec = tensorstore_utils.build_kvstore_tspec


def enable() -> None:
    """Lets Orbax write to and read from s3:// in this process; other paths are treated as before."""
    tensorstore_utils.build_kvstore_tspec = _build_spec_with_s3


@functools.wraps(_build_spec)
def _build_spec_with_s3(directory: str | os.PathLike[str], *args: Any, **options: Any) -> dict[str, Any]:
    scheme, _, path = os.fspath(directory).partition("://")
    if scheme != "s3":
        return _build_spec(os.fspath(directory), *args, **options)
    return _with_s3_driver(_build_spec(f"gs://{path}", *args, **options))


def _with_s3_driver(spec: Any) -> Any:
    """The specification with the driver for Google's storage replaced by that for S3, at any depth."""
    if not isinstance(spec, dict):
        return spec
    if str(spec.get("driver")).startswith("gcs"):
        return {**spec, "driver": "s3", **_server()}
    return {name: _with_s3_driver(value) for name, value in spec.items()}


def _server() -> dict[str, Any]:
    settings: dict[str, Any] = {}
    if "AWS_ACCESS_KEY_ID" in os.environ:
        # Without this, TensorStore looks for files first, and complains on stderr about those that are missing.
        settings["aws_credentials"] = {"type": "environment"}
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    if endpoint:
        region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION") or "us-east-1"
        settings |= {"endpoint": endpoint, "aws_region": region}
    return settings
