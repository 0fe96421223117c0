"""Facts about the machine: the table of peaks, the record of the machine, peak memory."""

from __future__ import annotations

import json
import os

import jax
import numpy as np
import pytest

from jaxchat.devices.machine import device_peak_flops, machine_info, peak_memory_bytes


@pytest.mark.parametrize(
    "kind, tera",
    [
        ("NVIDIA H100 80GB HBM3", 989.5),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 NVL", 835),
        ("NVIDIA H200", 989.5),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A100-PCIE-40GB", 312),
        ("NVIDIA L4", 121),
        ("NVIDIA L40S", 362),
        ("NVIDIA GeForce RTX 4090", 165),
        ("NVIDIA GeForce RTX 3090", 71),
        ("NVIDIA B200", 2250),
        ("TPU v4", 275),
        ("TPU v5 lite", 197),
        ("TPU v5", 459),
        ("TPU v5p", 459),
        ("TPU v6 lite", 918),
        ("TPU v4 lite", None),
        ("NVIDIA L40", None),
        ("NVIDIA GB200", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA GeForce RTX 4090 D", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("cpu", None),
    ],
)
def test_device_peak_flops(kind, tera):
    assert device_peak_flops(kind) == (None if tera is None else tera * 1e12)


def test_machine_info_is_json_without_names(tmp_path):
    info = machine_info()
    assert json.loads(json.dumps(info)) == info
    assert info["device_count"] == len(jax.devices()) and info["jax"] == jax.__version__
    assert info["cores"] >= 1 and info["memory_bytes"] > 2**28
    assert os.uname().nodename not in json.dumps(info)


def test_peak_memory_counts_what_was_held():
    before = peak_memory_bytes()
    block = np.ones(2**28 // 8)
    assert block.sum() == block.size and peak_memory_bytes() >= max(before, 2**28)
