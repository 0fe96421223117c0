"""Plots how training speed depends on model size, from the measurements of `train.py`.

    python benchmarks/train.py --depth 6 12 20 26 32 --fit --json growth.json
    python benchmarks/growth.py growth.json growth.png

Useful arithmetic is tokens/s times FLOPs per token; as a share of the device's peak it is the MFU. If several lines or
files measure the same depth, the last one counts.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator
from timing import table

from jaxchat.errors import UserError, check
from jaxchat.runs import plots

TERA = 1e12


def main(argv: list[str] | None = None) -> int:
    """Writes the plot and prints its figures; returns 2 if there is nothing to plot."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("results", nargs="+", metavar="JSON", help="what train.py --json wrote")
    parser.add_argument("png", metavar="PNG", help="the image to write")
    options = parser.parse_args(argv)
    try:
        records = read(options.results)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    Path(options.png).write_bytes(draw(records))
    print(hardware(records[0]))
    head = ["model", "parameters", "rows", "tokens/s", "GFLOP per token", "TFLOP/s per device", "MFU"]
    table(head, [_line(record) for record in records])
    return 0


def read(files: list[str]) -> list[dict[str, Any]]:
    """The measurements in `files`, one per depth, smallest model first.

    Raises:
      UserError: a file that train.py did not write, fewer than two depths, or measurements of different settings.
    """
    by_depth = {}
    for file in files:
        try:
            records = [json.loads(line) for line in Path(file).read_text().splitlines()]
            by_depth |= {record["depth"]: record for record in records if "error" not in record}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{file} is not what train.py --json writes ({type(error).__name__}: {error})") from None
    found = sorted(by_depth.values(), key=lambda record: record["parameters"])
    check(len(found) > 1, "a plot needs two depths; measure more: train.py --depth 6 12 20 --json FILE")
    kinds = {hardware(record) for record in found}
    check(len(kinds) == 1, f"these cannot be compared: {'; '.join(sorted(kinds))}; plot them separately")
    return found


def hardware(record: dict[str, Any]) -> str:
    machine = record["machine"]
    return (
        f"{record['devices']} x {machine['device_kind']}, {record['precision']}, rows of {record['sequence_len']:,} "
        f"tokens, jax {machine['jax']}"
    )


def draw(records: list[dict[str, Any]]) -> bytes:
    """A PNG of useful arithmetic per device (TFLOP/s, and MFU if the peak is known) and of tokens/s, by parameters."""
    parameters = [record["parameters"] for record in records]
    teraflops = [record["flops_per_second_per_device"] / TERA for record in records]
    speeds = [record["tokens_per_second"] for record in records]
    with plots.style():
        figure = Figure(figsize=(11.0, 4.2), layout="constrained")
        computed, tokens = figure.subplots(1, 2)
        for axes, values in ((computed, teraflops), (tokens, speeds)):
            axes.plot(parameters, values, color=plots.COLOURS["pretrain"], linewidth=2, marker="o", markersize=6)
            axes.set_xscale("log")
            axes.set_xlabel("parameters")
            axes.xaxis.set_major_locator(FixedLocator(parameters))
            axes.xaxis.set_minor_locator(NullLocator())
            names = {record["parameters"]: f"{_short(record['parameters'])}\nd{record['depth']}" for record in records}
            axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _, names=names: names[round(value)]))
            axes.margins(x=0.14)
        computed.set_title("useful arithmetic")
        computed.set_ylabel("TFLOP/s per device")
        computed.set_ylim(0, 1.25 * max(teraflops))
        for record, x, y in zip(records, parameters, teraflops, strict=True):
            share = f"\n{record['mfu']:.1%}" if record["mfu"] else ""
            _label(computed, x, y, f"{y:.3g}{share}")
        if records[0]["mfu"]:
            peak = teraflops[0] / records[0]["mfu"]
            share = computed.secondary_yaxis("right", functions=(lambda y: 100 * y / peak, lambda y: y * peak / 100))
            share.set_ylabel(f"MFU (% of {peak:.4g} TFLOP/s)")
        tokens.set_title("speed")
        tokens.set_ylabel("tokens/s")
        tokens.set_yscale("log")
        tokens.set_ylim(min(speeds) / 1.6, 2.2 * max(speeds))
        for x, y in zip(parameters, speeds, strict=True):
            _label(tokens, x, y, f"{y:,.0f}", beside=True)
        figure.suptitle(hardware(records[0]), x=0.01, ha="left", fontsize=10, color=plots.GREY)
        return plots.png(figure)


def _label(axes, x: float, y: float, text: str, beside: bool = False) -> None:
    """Labels a point: above it, or `beside` it where a falling line leaves room."""
    offset, align = ((4, 5), "left") if beside else ((0, 7), "center")
    axes.annotate(text, (x, y), offset, textcoords="offset points", ha=align, va="bottom", fontsize=9)


def _short(parameters: int) -> str:
    return f"{parameters / 1e9:.2f} B" if parameters >= 1e9 else f"{parameters / 1e6:.3g} M"


def _line(record: dict[str, Any]) -> list[str]:
    return [
        f"d{record['depth']}",
        f"{record['parameters']:,}",
        f"{record['rows']} x {record['accumulation']}",
        f"{record['tokens_per_second']:,.0f}",
        f"{record['flops_per_token'] / 1e9:.2f}",
        f"{record['flops_per_second_per_device'] / TERA:.4g}",
        f"{record['mfu']:.1%}" if record["mfu"] else "?",
    ]


if __name__ == "__main__":
    sys.exit(main())
