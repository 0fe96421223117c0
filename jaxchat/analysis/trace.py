"""Reads a profiler's trace of a training step: which part of the model each kernel belongs to, and idle time.

A kernel carries the name of its HLO instruction, and the compiled program has that instruction's path through the code,
such as `jit(step)/transpose(jvp(jit(_run_block)))/attention/dot_general`, with the names from `jax.named_scope`. If the
path does not tell, the kind of the instruction decides, and finally the kernel's own name.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from jax.profiler import ProfileData

MATMULS, COMMUNICATION, COPIES, ELEMENTWISE = "matmuls of the blocks", "communication", "copies", "element-wise"
# Everything inside such a scope belongs to that part; the outermost of nested scopes decides.
PARTS = {"optimizer": "optimizer", "loss": "head and loss", "head": "head and loss", "attention": "attention"}
# Such a scope subdivides the element-wise work; the innermost decides.
DETAILS = ("norm", "rope", "mlp", "embed")
ROWS = ("attention", MATMULS, "head and loss", "optimizer", COMMUNICATION)

_COLLECTIVE = re.compile(r"^(all-|reduce-scatter|ragged-all|collective-|send|recv)")
_COPY = re.compile(r"^(copy|transpose$)")
_NAMES_OF_KERNELS = (
    (COMMUNICATION, re.compile(r"nccl|nvshmem|multimem", re.I)),
    (COPIES, re.compile(r"^mem(cpy|set)|copy_?kernel|^copy[._\d]|^wrapped_(copy|transpose)|^transpose_fusion", re.I)),
    ("attention", re.compile(r"flash|fmha|sdpa|attention", re.I)),
    (MATMULS, re.compile(r"gemm|nvjet|cutlass|cublas|xmma|splitk|matmul|product_mosaic|^dot[._\d]", re.I)),
)
_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = .*?(?<= )([a-z][\w\-]*)\(")
# The names in a path that are scopes, not functions: `jit(norm)` is a function, `jvp(norm)` and `norm` are scopes.
_SCOPE = re.compile(r"(?<!jit\()\b([A-Za-z_]\w*)\b(?!\()")
_ONE_KERNEL = 'xla_cpu_small_call="true"'  # a call that XLA compiles as one kernel, such as a short loop
_WITH_CHILDREN = ("while", "call", "conditional")  # they run other computations and take no time of their own


@dataclass(frozen=True)
class Instruction:
    """An HLO instruction: its kind, its path through the code, and the library function and computation it calls."""

    opcode: str
    path: str = ""
    target: str = ""
    calls: str = ""


@dataclass(frozen=True)
class Program:
    """A compiled program's module name, its instructions by name, and the names in each computation."""

    module: str
    instructions: dict[str, Instruction]
    computations: dict[str, list[str]]

    @classmethod
    def parse(cls, text: str) -> Program:
        """Parses the text of `compiled.as_text()`."""
        head = re.match(r"HloModule ([\w.\-]+)", text)
        instructions: dict[str, Instruction] = {}
        computations: dict[str, list[str]] = defaultdict(list)
        inside = ""
        for line in text.splitlines():
            if match := _INSTRUCTION.match(line):
                name, opcode = match.groups()
                if _ONE_KERNEL in line:
                    opcode = "fusion"
                values = [_value(line, key) for key in (r'op_name="([^"]*)', r'target="([^"]*)', r"calls=%?([\w.\-]+)")]
                instructions[name] = Instruction(opcode, *values)
                computations[inside].append(name)
            elif match := _COMPUTATION.match(line):
                inside = match[1]
        return cls(head[1] if head else "", instructions, dict(computations))

    @cached_property
    def _by_kernel(self) -> dict[str, str]:
        return {re.sub(r"[.\-]", "_", name): name for name in self.instructions}

    def find(self, op: str | None, kernel: str) -> list[Instruction]:
        """The instruction that a kernel runs, followed by those fused into it; [] if the program does not say.

        XLA names its own kernels after their instructions, with `_` for dots and dashes; that counts where `op` is
        unknown, such as a command buffer, or a loop round the instruction.
        """
        name = op if op in self.instructions else None
        if name is None or self.instructions[name].opcode in _WITH_CHILDREN:
            name = self._by_kernel.get(kernel, name)
        return [] if name is None else self._with_members(name)

    def _with_members(self, name: str) -> list[Instruction]:
        instruction = self.instructions[name]
        members = self.computations.get(instruction.calls, ())
        return [instruction, *(found for member in members for found in self._with_members(member))]


def _value(line: str, pattern: str) -> str:
    match = re.search(pattern, line)
    return match[1] if match else ""


@dataclass(frozen=True)
class Kernel:
    """An interval on a device, in nanoseconds; `op` is its HLO instruction, `module` its program, where known."""

    name: str
    start: float
    end: float
    op: str | None = None
    module: str | None = None


def part_of(kernel: Kernel, program: Program) -> str:
    """The row of the table that a kernel belongs to."""
    found = program.find(kernel.op, kernel.name)
    opcodes = {instruction.opcode for instruction in found}
    by_name = next((part for part, pattern in _NAMES_OF_KERNELS if pattern.search(kernel.name)), None)
    if by_name == COMMUNICATION or any(map(_COLLECTIVE.match, opcodes)):
        return COMMUNICATION
    scopes = [_SCOPE.findall(instruction.path) for instruction in found]
    part = _decide([next((PARTS[word] for word in words if word in PARTS), None) for words in scopes])
    if part:
        return part
    targets = " ".join(instruction.target for instruction in found)
    if "fmha" in targets:
        return "attention"
    if found and _COPY.match(found[0].opcode):
        return COPIES
    if "dot" in opcodes or re.search("cublas|gemm|matmul", targets):
        return MATMULS
    if by_name:
        return by_name
    detail = _decide([next((word for word in reversed(words) if word in DETAILS), None) for words in scopes])
    return f"{ELEMENTWISE}, {detail or 'other'}"


def _decide(values: Sequence[str | None]) -> str | None:
    """The first value, which is the kernel's own; without one, the most frequent of those fused into it."""
    if values and values[0]:
        return values[0]
    counts = Counter(value for value in values if value)
    return counts.most_common(1)[0][0] if counts else None


def covered(intervals: Iterable[tuple[float, float]]) -> float:
    """The length of the union of intervals (start, end)."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(intervals):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total


@dataclass
class Total:
    """The time in nanoseconds and the number of some kernels, and the instructions they ran."""

    time: float = 0.0
    count: int = 0
    ops: Counter = field(default_factory=Counter)

    def add(self, kernel: Kernel) -> None:
        self.time += kernel.end - kernel.start
        self.count += 1
        self.ops[kernel.op or "?"] += 1


@dataclass(frozen=True)
class Breakdown:
    """Where the time of the traced steps went, in nanoseconds, summed over devices.

    `kernels` has totals by kernel name and part. The times of the parts sum to `span` - `idle` + `overlap`; overlap is
    the time in which more than one kernel ran.
    """

    span: float
    idle: float
    overlap: float
    parts: dict[str, Total]
    kernels: dict[tuple[str, str], Total]


def break_down(devices: Sequence[Sequence[Kernel]], program: Program) -> Breakdown:
    """The breakdown of each device's kernels, from the first to the last one of `program`."""
    span = busy = time = 0.0
    parts: dict[str, Total] = defaultdict(Total)
    kernels: dict[tuple[str, str], Total] = defaultdict(Total)
    for device in devices:
        own = [kernel for kernel in device if kernel.module == program.module] or device
        start, end = min(kernel.start for kernel in own), max(kernel.end for kernel in own)
        inside = [kernel for kernel in device if kernel.start >= start and kernel.end <= end]
        for kernel in inside:
            part = part_of(kernel, program)
            parts[part].add(kernel)
            kernels[kernel.name, part].add(kernel)
            time += kernel.end - kernel.start
        span += end - start
        busy += covered((kernel.start, kernel.end) for kernel in inside)
    order = {part: number for number, part in enumerate(ROWS)}
    ordered = sorted(parts, key=lambda part: (order.get(part, len(order) + (part == COPIES)), part))
    return Breakdown(span, span - busy, time - busy, {part: parts[part] for part in ordered}, dict(kernels))


def read_trace(file: Path, program: Program) -> list[list[Kernel]]:
    """The kernels of each device in an `.xplane.pb`, of every program on it; on a CPU, the instructions `program` ran.

    A GPU's plane has a line a stream; a TPU's has one line of operations among others that repeat them.
    """
    planes = list(ProfileData.from_file(str(file)).planes)
    devices = []
    for plane in planes:
        if re.match(r"/device:(GPU|TPU):\d+", plane.name):
            lines = list(plane.lines)
            streams = [line for line in lines if line.name.startswith("Stream")]
            streams = streams or [line for line in lines if line.name == "XLA Ops"]
            devices.append([_kernel(event) for line in streams for event in line.events])
    if not any(devices):
        by_number: dict[int, list[Kernel]] = defaultdict(list)
        for plane in (plane for plane in planes if plane.name.startswith("/host:CPU")):
            for event in (event for line in plane.lines for event in line.events):
                if _ran_on_cpu(kernel := _kernel(event), program):
                    by_number[dict(event.stats).get("device_ordinal", 0)].append(kernel)
        devices = list(by_number.values())
    return [device for device in devices if device]


def _kernel(event) -> Kernel:
    stats = dict(event.stats)
    op = stats.get("hlo_op") or event.name.partition(" = ")[0].lstrip("%")
    return Kernel(event.name, event.start_ns, event.start_ns + event.duration_ns, op, stats.get("hlo_module"))


def _ran_on_cpu(kernel: Kernel, program: Program) -> bool:
    """Whether the kernel is an instruction of `program` that does not merely contain others."""
    if kernel.module != program.module or kernel.op not in program.instructions:
        return False
    return program.instructions[kernel.op].opcode not in _WITH_CHILDREN
