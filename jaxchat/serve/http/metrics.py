"""Counts and times of the server in Prometheus' text format, under vLLM's names.

The format: https://prometheus.io/docs/instrumenting/exposition_formats/
"""

from __future__ import annotations

import bisect
import itertools
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from jaxchat.infer.request import Output, Request

if TYPE_CHECKING:
    from jaxchat.infer.engine import Engine  # imports JAX

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
_TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000, 100000)
_HISTOGRAMS: Mapping[str, tuple[tuple[float, ...], str]] = {
    "time_to_first_token_seconds": (_SECONDS, "From a request's arrival to its first token."),
    "inter_token_latency_seconds": (_SECONDS, "Between two tokens of a request."),
    "request_time_per_output_token_seconds": (_SECONDS, "Mean time between the tokens of a request."),
    "e2e_request_latency_seconds": (_SECONDS, "From a request's arrival to its last token."),
    "request_decode_time_seconds": (_SECONDS, "From a request's first token to its last."),
    "request_prompt_tokens": (_TOKENS, "Prompt tokens of a request."),
    "request_generation_tokens": (_TOKENS, "Generated tokens of a request."),
}
_REASONS = ("stop", "length", "abort")


class Histogram:
    """Counts of observations by upper bounds, which are inclusive."""

    def __init__(self, bounds: Sequence[float]):
        self.bounds, self.counts, self.sum = bounds, [0] * (len(bounds) + 1), 0.0

    def observe(self, value: float, times: int = 1) -> None:
        self.counts[bisect.bisect_left(self.bounds, value)] += times
        self.sum += value * times

    def lines(self, name: str, labels: str) -> Iterator[str]:
        bounds = [*map(_number, self.bounds), "+Inf"]
        for bound, count in zip(bounds, itertools.accumulate(self.counts), strict=True):
            yield f'{name}_bucket{{{labels},le="{bound}"}} {count}'
        yield f"{name}_sum{{{labels}}} {self.sum!r}"
        yield f"{name}_count{{{labels}}} {sum(self.counts)}"


class Metrics:
    """What the server has done since its start. Written and read in the event loop only."""

    def __init__(self):
        self.prompt_tokens = self.generation_tokens = 0
        self.finished = dict.fromkeys(_REASONS, 0)
        self.histograms = {name: Histogram(bounds) for name, (bounds, _) in _HISTOGRAMS.items()}

    def observe(self, name: str, value: float, times: int = 1) -> None:
        self.histograms[name].observe(value, times)

    def text(self, model: str, engine: Engine | None) -> str:
        """All metrics, with the label `model_name`."""
        name = model.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
        labels = f'model_name="{name}",engine="0"'
        gauges, counters = {}, {"prompt_tokens": self.prompt_tokens, "generation_tokens": self.generation_tokens}
        if engine is not None:
            gauges = {
                "num_requests_running": (engine.running, "Requests that have a row."),
                "num_requests_waiting": (engine.waiting, "Requests that wait for a row."),
                "kv_cache_usage_perc": (engine.cache_usage, "Share of the cache that is in use, 0 to 1."),
            }
            counters |= {"prefix_cache_queries": engine.prefix_queries, "prefix_cache_hits": engine.prefix_hits}
        helps = {
            "prompt_tokens": "Prompt tokens read.",
            "generation_tokens": "Tokens generated.",
            "prefix_cache_queries": "Prompt tokens looked for in the cache of earlier prompts.",
            "prefix_cache_hits": "Prompt tokens found there.",
        }
        lines: list[str] = []
        for key, (value, text) in gauges.items():
            lines += [*_head(key, "gauge", text), f"vllm:{key}{{{labels}}} {value!r}"]
        for key, value in counters.items():
            lines += [*_head(f"{key}_total", "counter", helps[key]), f"vllm:{key}_total{{{labels}}} {value}"]
        lines += _head("request_success_total", "counter", "Requests that ended, by reason.")
        for reason, count in self.finished.items():
            lines.append(f'vllm:request_success_total{{{labels},finished_reason="{reason}"}} {count}')
        for key, histogram in self.histograms.items():
            lines += [*_head(key, "histogram", _HISTOGRAMS[key][1]), *histogram.lines(f"vllm:{key}", labels)]
        return "\n".join(lines) + "\n"


def _head(name: str, kind: str, text: str) -> list[str]:
    return [f"# HELP vllm:{name} {text}", f"# TYPE vllm:{name} {kind}"]


def _number(bound: float) -> str:
    return repr(float(bound))


class Watch:
    """Follows the requests of a call, from their arrival on, for the metrics."""

    def __init__(self, metrics: Metrics, requests: Sequence[Request]):
        self.metrics, self.prompts = metrics, [len(request.prompt) for request in requests]
        self.begun = time.monotonic()
        self.first: dict[int, float] = {}
        self.last: dict[int, float] = {}
        self.tokens = [0] * len(requests)
        self.open = len(requests)

    def see(self, batch: Sequence[tuple[int, Output]]) -> None:
        """Takes note of outputs that have just come, each with the place of its request."""
        now, metrics = time.monotonic(), self.metrics
        for index, output in batch:
            new = len(output.tokens)
            if new and index not in self.first:
                self.first[index] = now
                metrics.prompt_tokens += self.prompts[index]
                metrics.observe("time_to_first_token_seconds", now - self.begun)
            elif new:
                metrics.observe("inter_token_latency_seconds", (now - self.last[index]) / new, new)
            if new:
                self.last[index] = now
                self.tokens[index] += new
                metrics.generation_tokens += new
            if output.finish is not None:
                self._finish(index, output.finish, now)

    def _finish(self, index: int, reason: str, now: float) -> None:
        metrics, seconds, tokens = self.metrics, now - self.first.get(index, now), self.tokens[index]
        self.open -= 1
        metrics.finished[reason if reason in _REASONS else "abort"] += 1
        metrics.observe("e2e_request_latency_seconds", now - self.begun)
        metrics.observe("request_decode_time_seconds", seconds)
        metrics.observe("request_prompt_tokens", self.prompts[index])
        metrics.observe("request_generation_tokens", tokens)
        if tokens > 1:
            metrics.observe("request_time_per_output_token_seconds", seconds / (tokens - 1))

    def close(self) -> None:
        """Counts requests that have not ended as aborted."""
        self.metrics.finished["abort"] += self.open
        self.open = 0
