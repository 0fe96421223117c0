"""Facts about the machine: the table of peaks, the record of the machine, peak memory."""

from __future__ import annotations

import json
import os

import jax
import numpy as np
import pytest

from jaxchat.devices.machine import device_memory, device_peak_flops, lacks_bf16, machine_info, peak_memory_bytes


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
        ("NVIDIA A10", 125),
        ("NVIDIA A10G", 70),
        ("Tesla T4", 8.1),
        ("NVIDIA GB10", 125),
        ("AMD Instinct MI300X", 1307.4),
        # the white papers of GA102, AD102 and RTX Blackwell
        ("NVIDIA GeForce RTX 5090", 209.5),
        ("NVIDIA GeForce RTX 5080", 112.6),
        ("NVIDIA GeForce RTX 4090", 165.2),
        ("RTX 4090", 165.2),
        ("NVIDIA GeForce RTX 4080", 97.5),
        ("NVIDIA GeForce RTX 4070 Ti", 80.2),
        ("NVIDIA GeForce RTX 3090", 71.2),
        ("NVIDIA GeForce RTX 3080", 59.5),
        ("NVIDIA GeForce RTX 3070", 40.6),
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
        ("NVIDIA GeForce RTX 3080 Ti Laptop GPU", None),
        ("NVIDIA GeForce RTX 2080", None),
        ("NVIDIA RTX A4000", None),
        ("NVIDIA A100X", None),
        ("NVIDIA GeForce RTX 4090 D", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("cpu", None),
    ],
)
def test_device_peak_flops(kind, tera):
    peak = device_peak_flops(kind)
    assert (None if peak is None else round(peak / 1e12, 1)) == tera


@pytest.mark.parametrize(
    "kind, gib",
    [
        *(("NVIDIA H200", 141), ("NVIDIA H100 80GB HBM3", 80), ("NVIDIA H100 NVL", 94), ("NVIDIA A10G", 24)),
        *(("NVIDIA A100-SXM4-40GB", 40), ("NVIDIA GeForce RTX 4060", 8), ("NVIDIA GeForce RTX 3090", 24)),
        *(("TPU v5 lite", 16), ("TPU v5", 95), ("Tesla T4", 16)),
        *(("NVIDIA GeForce RTX 4060 Ti", None), ("NVIDIA GeForce RTX 4090 Laptop GPU", None), ("cpu", None)),
        *(("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None), ("NVIDIA GH200 480GB", None)),
    ],
)
def test_device_memory_is_known_where_all_of_a_name_have_the_same(kind, gib):
    assert device_memory(kind) == (None if gib is None else gib << 30)


def test_names_of_gpus_without_bf16():
    assert all(map(lacks_bf16, ("Tesla T4", "Tesla V100-SXM2-16GB", "NVIDIA GeForce RTX 2080 Ti")))
    assert not any(map(lacks_bf16, ("NVIDIA RTX A2000", "NVIDIA T400", "NVIDIA H100", "TPU v4", "AMD Instinct MI300X")))


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
