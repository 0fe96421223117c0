"""Compiles the training step for TPUs on a machine without one, and prints the memory that it takes.

    pip install '.[tpu]'
    python benchmarks/tpu.py
    python benchmarks/tpu.py --depth 20 --chips v5e-8 --fsdp 1 --rows 4 8 --remat=mlp
    python benchmarks/tpu.py --depth 12 --chips v6e-8 --model.window-pattern=SSSL

The step is that of pretraining: model, loss, gradients over all micro-batches, Muon and AdamW, in bf16. The TPU's own
compiler (libtpu) compiles it ahead of time; nothing runs, so there is no speed here. `held` is the memory of
parameters, optimizer and batch, `step` what a step takes in addition, and `code` the program, which a TPU holds in the
same memory. Where the plain step does not fit into 95 % of a chip's memory, those that recompute more are tried, as in
a run. `splash` counts the calls of splash attention's kernels in the compiled program: three a layer, where the
backward pass does not compute attention again. Other fields of an experiment may follow, as for launch.py. A
compilation takes two to four minutes on two cores.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import os
import sys
from datetime import date
from typing import Any, NamedTuple

import jax
from timing import have, machine, say, table

from jaxchat.analysis.dry_run import compile_pretraining
from jaxchat.cli.options import override
from jaxchat.cli.parser import option_strings
from jaxchat.config import Experiment, MeshConfig, ModelConfig
from jaxchat.devices.mesh import make_mesh
from jaxchat.errors import UserError, check
from jaxchat.model.config import GPTConfig
from jaxchat.train.memory import GIB, SPARE

VOCABULARY = 32_768


class Chips(NamedTuple):
    """`count` chips as libtpu names their topology, of `kind` as JAX names it, with `memory` GiB each for programs."""

    topology: str
    kind: str
    count: int
    memory: float


# Of 16 and 32 GiB: what the compiler says that it has.
CHIPS = {
    "v5e-8": Chips("v5e:2x4", "TPU v5 lite", 8, 15.75),
    "v6e-8": Chips("v6e:2x4", "TPU v6 lite", 8, 31.25),
}


def main(argv: list[str] | None = None) -> int:
    """Prints the table; returns 2 if nothing could be compiled."""
    parser = _parser()
    options, overrides = parser.parse_known_args(argv)
    try:
        check(have("libtpu"), "the TPU's compiler is missing; install it with pip install '.[tpu]'")
        works = [
            (chips, _experiment(chips, depth, fsdp, rows, overrides, option_strings(parser)))
            for chips, depth, fsdp, rows in itertools.product(options.chips, options.depth, options.fsdp, options.rows)
        ]
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    _without_a_tpu()
    file = open(options.json, "w") if options.json else None
    records = []
    for number, (chips, experiment) in enumerate(works, 1):
        name = f"d{experiment.model.depth} on {chips}, fsdp {experiment.mesh.fsdp}"
        say(f"{number} of {len(works)}, {name}: compiling, for minutes")
        record = {"chips": chips, "overrides": overrides, "date": date.today().isoformat()}
        try:
            record |= _figures(CHIPS[chips], experiment)
        except Exception as error:  # what one program fails with is a line of the table
            record |= _named(experiment) | {"error": " ".join(f"{type(error).__name__}: {error}".split())[:300]}
        records.append(record)
        say(f"{name}: {record.get('error') or _total(record)}")
        if file:
            print(json.dumps(record), file=file, flush=True)
    _print(records)
    return 0 if any("error" not in record for record in records) else 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--depth", type=int, nargs="+", default=[12, 20], help="one or more depths (default 12 20)")
    add("--chips", nargs="+", choices=list(CHIPS), default=list(CHIPS), help="(default: all)")
    add("--fsdp", type=int, nargs="+", default=[1, 8], metavar="N",
        help="devices that share parameters and optimizer; the rest are data-parallel (default 1 8)")  # fmt: skip
    add("--rows", type=int, nargs="+", default=[8], help="of 2,048 tokens, per chip and micro-batch (default 8)")
    add("--json", metavar="FILE", help="write all figures to FILE, one JSON object per line")
    return parser


def _experiment(chips: str, depth: int, fsdp: int, rows: int, overrides: list[str], names: list[str]) -> Experiment:
    base = Experiment(name="benchmark", model=ModelConfig(depth), mesh=MeshConfig(fsdp=fsdp))
    base = dataclasses.replace(
        base,
        pretrain=dataclasses.replace(base.pretrain, device_rows=rows),
        # A device with a known peak is an accelerator: the step is compiled in bf16.
        cost=dataclasses.replace(base.cost, device=CHIPS[chips].kind, devices=CHIPS[chips].count),
    )
    return override(base, overrides, names)


def _without_a_tpu() -> None:
    """Has JAX use the CPU for what it computes itself, and libtpu not look for the machine it is on."""
    jax.config.update("jax_platforms", "cpu")
    for name, value in (
        ("TPU_SKIP_MDS_QUERY", "1"),
        ("TPU_ACCELERATOR_TYPE", "v5litepod-8"),
        ("TPU_WORKER_HOSTNAMES", "localhost"),
        ("ALLOW_MULTIPLE_LIBTPU_LOAD", "1"),  # else only one process of a machine may compile at a time
    ):
        os.environ.setdefault(name, value)


def _named(experiment: Experiment) -> dict[str, Any]:
    mesh = experiment.mesh
    return {"depth": experiment.model.depth, "fsdp": mesh.fsdp, "rows": experiment.pretrain.device_rows}


def _figures(chips: Chips, experiment: Experiment) -> dict[str, Any]:
    from jax.experimental import topologies

    mesh = make_mesh(experiment.mesh, topologies.get_topology_desc(chips.topology, "tpu").devices)
    limit = int((1 - SPARE) * chips.memory * GIB)
    step = compile_pretraining(experiment, GPTConfig.of(experiment.model, VOCABULARY), mesh, limit)
    analysis, text = step.compiled.memory_analysis(), step.compiled.as_text()
    assert analysis and text, "libtpu gives both"
    return _named(experiment) | {
        "mesh": dict(mesh.shape),
        "device_kind": mesh.devices.flat[0].device_kind,
        "remat": step.remat,
        "fits": step.fits,
        "held_bytes": step.memory.held,
        "used_bytes": step.memory.used,
        "code_bytes": analysis.generated_code_size_in_bytes,
        "memory_bytes": int(chips.memory * GIB),
        "tried_bytes": {level: memory.total for level, memory in step.memories.items()},
        "splash_calls": text.count('custom_call_target="tpu_custom_call"'),
        "seconds": step.seconds,
        "machine": machine("jax", "jaxlib", "libtpu"),
    }


# --- the table --------------------------------------------------------------------------------------------------------


def _total(record: dict[str, Any]) -> str:
    total = record["held_bytes"] + record["used_bytes"] + record["code_bytes"]
    return f"{total / GIB:.2f} of {record['memory_bytes'] / GIB:.2f} GiB" + ("" if record["fits"] else ", too much")


def _print(records: list[dict[str, Any]]) -> None:
    head = ["chips", "model", "data x fsdp", "rows", "remat", "held, GiB", "step", "code", "in all", "splash", "s"]
    table(head, [_line(record, len(head)) for record in records])
    compiled = [record for record in records if "error" not in record]
    if compiled:
        versions = compiled[0]["machine"]
        print(f"\njax {versions['jax']}, libtpu {versions['libtpu']}, {versions['cores']} cores; compiled, not run")


def _line(record: dict[str, Any], columns: int) -> list[str]:
    cells = [record["chips"], f"d{record['depth']}"]
    if "error" in record:
        cells += [f"? x {record['fsdp']}", str(record["rows"]), record["error"]]
        return cells + [""] * (columns - len(cells))
    return [
        *cells,
        f"{record['mesh']['data']} x {record['mesh']['fsdp']}",
        str(record["rows"]),
        record["remat"],
        *(f"{record[f'{part}_bytes'] / GIB:.2f}" for part in ("held", "used", "code")),
        _total(record),
        str(record["splash_calls"]),
        f"{sum(record['seconds'].values()):.0f}",
    ]


if __name__ == "__main__":
    sys.exit(main())
