"""A trace is read rightly: made-up kernels of a GPU, and a real trace of this CPU."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxchat.analysis.profile import table
from jaxchat.analysis.trace import (
    COMMUNICATION,
    COPIES,
    MATMULS,
    Kernel,
    Program,
    break_down,
    covered,
    part_of,
    read_trace,
)

# As XLA writes it for a GPU, shortened.
HLO = """HloModule jit_step, is_scheduled=true, entry_computation_layout={(f32[4]{0})->f32[4]{0}}

%fused_computation.1 (param_0: bf16[8,16]) -> bf16[8,16] {
  %param_0 = bf16[8,16]{1,0} parameter(0)
  %multiply.1 = bf16[8,16]{1,0} multiply(%param_0, %param_0), metadata={op_name="jit(step)/jvp(jit(_run_block))/rope/mul"}
  %multiply.2 = bf16[8,16]{1,0} multiply(%multiply.1, %param_0), metadata={op_name="jit(step)/jvp(jit(_run_block))/norm/mul"}
  ROOT %add.3 = bf16[8,16]{1,0} add(%multiply.2, %multiply.1), metadata={op_name="jit(step)/jvp(jit(_run_block))/norm/mul"}
}

%gemm_fusion_dot.5_computation (a: bf16[8,16], b: bf16[16,8]) -> bf16[8,8] {
  %a = bf16[8,16]{1,0} parameter(0)
  %b = bf16[16,8]{1,0} parameter(1)
  ROOT %dot.5 = bf16[8,8]{1,0} dot(%a, %b), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

ENTRY %main.9 (x: f32[4]) -> f32[4] {
  %x = bf16[8,16]{1,0} parameter(0)
  %loop_add_fusion.1 = bf16[8,16]{1,0} fusion(%x), kind=kLoop, calls=%fused_computation.1, metadata={op_name="jit(step)/transpose(jvp())/add_any"}
  %gemm_fusion_dot.5 = bf16[8,8]{1,0} fusion(%x, %x), kind=kCustom, calls=%gemm_fusion_dot.5_computation, metadata={op_name="jit(step)/jvp(jit(_run_block))/mlp/dot_general"}
  %cublas-gemm.2 = (bf16[8,8]{1,0}, s8[1024]{0}) custom-call(%x, %x), custom_call_target="__cublas$lt$matmul", metadata={op_name="jit(step)/jvp(jit(_run_block))/dot_general"}
  %cublas-gemm.3 = (bf16[8,8]{1,0}, s8[1024]{0}) custom-call(%x, %x), custom_call_target="__cublas$lt$matmul", metadata={op_name="jit(step)/jvp(loss)/while/body/dot_general"}
  %cublas-gemm.4 = (bf16[8,8]{1,0}, s8[1024]{0}) custom-call(%x, %x), custom_call_target="__cublas$lt$matmul", metadata={op_name="jit(step)/optimizer/jit(norm)/dot_general"}
  %attend.1 = bf16[8,16]{1,0} custom-call(%x), custom_call_target="__cudnn$fmhaSoftmaxBackward"
  %all-reduce-start.1 = f32[4]{0} all-reduce-start(%x), metadata={op_name="jit(step)/optimizer/add"}
  %copy.7 = bf16[8,16]{0,1} copy(%x), metadata={op_name="jit(step)/jvp(jit(_run_block))/transpose"}
  %input_reduce_fusion.2 = f32[] fusion(%x), kind=kInput, calls=%fused_computation.1, metadata={op_name="jit(step)/optimizer/jit(norm)/reduce_sum"}
  %while.6 = (s32[], f32[4]{0}) while(%x), condition=%cond, body=%body, metadata={op_name="jit(step)/while"}
  ROOT %wrapped_add.1 = f32[4]{0} fusion(%x), kind=kLoop, calls=%wrapped, metadata={op_name="jit(step)/jit(norm)/add"}
}
"""  # noqa: E501


@pytest.mark.parametrize(
    ("op", "kernel", "part"),
    [
        # by the scope
        ("cublas-gemm.3", "nvjet_hsh_128x256", "head and loss"),
        ("cublas-gemm.4", "nvjet_hsh_128x256", "optimizer"),
        ("input_reduce_fusion.2", "input_reduce_fusion_2", "optimizer"),
        ("copy.7", "wrapped_copy_7", COPIES),
        # no scope of its own: what most of the fused instructions have
        ("loop_add_fusion.1", "loop_add_fusion_1", "element-wise, norm"),
        # by the instruction
        ("cublas-gemm.2", "some_library_kernel", MATMULS),
        ("gemm_fusion_dot.5", "gemm_fusion_dot_5", MATMULS),
        ("attend.1", "some_library_kernel", "attention"),
        ("all-reduce-start.1", "some_library_kernel", COMMUNICATION),
        ("wrapped_add.1", "wrapped_add_1", "element-wise, other"),  # jit(norm) is a function, not a scope
        # the instruction is not known, but XLA's kernel bears its name
        (None, "input_reduce_fusion_2", "optimizer"),
        ("command_buffer", "gemm_fusion_dot_5", MATMULS),
        ("while.6", "loop_add_fusion_1", "element-wise, norm"),
        # by the kernel's name
        (None, "ncclDevKernel_AllGather_RING_LL", COMMUNICATION),
        (None, "MemcpyD2D", COPIES),
        (None, "cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma", "attention"),
        (None, "sm90_xmma_gemm_bf16bf16_bf16f32", MATMULS),
        (None, "mystery", "element-wise, other"),
    ],
)
def test_parts(op, kernel, part):
    assert part_of(Kernel(kernel, 0, 1, op), Program.parse(HLO)) == part


@given(st.lists(st.tuples(st.integers(0, 60), st.integers(0, 60)).map(sorted).map(tuple)))
def test_covered(intervals):
    seconds = np.zeros(60, bool)
    for start, end in intervals:
        seconds[start:end] = True
    assert covered(intervals) == seconds.sum()


def test_breakdown_of_two_devices():
    program = Program.parse(HLO)
    assert program.module == "jit_step"
    first = [
        Kernel("MemcpyH2D", 0, 50),  # before the program
        Kernel("nvjet", 100, 200, "cublas-gemm.2", "jit_step"),
        Kernel("nccl", 150, 260, "all-reduce-start.1", "jit_step"),
        Kernel("MemcpyD2D", 300, 310),
        Kernel("nvjet", 390, 400, "cublas-gemm.4", "jit_step"),
    ]
    second = [Kernel("nvjet", 1000, 1100, "cublas-gemm.2", "jit_step")]
    got = break_down([first, second], program)
    assert (got.span, got.idle, got.overlap) == (300 + 100, 120, 50)
    assert {part: (total.time, total.count) for part, total in got.parts.items()} == {
        MATMULS: (200, 2), "optimizer": (10, 1), COMMUNICATION: (110, 1), COPIES: (10, 1),
    }  # fmt: skip
    assert list(got.parts) == [MATMULS, "optimizer", COMMUNICATION, COPIES]
    assert sum(total.time for total in got.parts.values()) == got.span - got.idle + got.overlap
    assert got.kernels["nvjet", MATMULS].count == 2 and got.kernels["nvjet", "optimizer"].count == 1
    text = table(dataclasses.replace(got, span=4e6, idle=1e6), program, 2)
    assert "| idle | 0.500 | 25.0% |" in text and "| **a step** | 2.000 | 100.0% |" in text
    assert "cublas-gemm.2, jit(step)/jvp(jit(_run_block))/dot_general |" in text


def test_scopes_in_a_real_trace(tmp_path):
    """Through gradients, an inner jit, a loop and a custom derivative."""

    @jax.jit
    def block(x, w):
        with jax.named_scope("attention"):
            y = x @ w
        return jnp.tanh(y) @ w

    @jax.custom_vjp
    def loss(x):
        return jnp.sum(x)

    def forward(x):
        with jax.named_scope("loss"):
            return jax.lax.scan(lambda total, row: (total + jnp.sum(row @ x), jnp.cos(row)), 0.0, x)

    loss.defvjp(forward, lambda grad, cotangent: (grad * cotangent,))

    @jax.jit
    def step(w, x):
        grad = jax.grad(lambda w: loss(block(block(x, w), w)))(w)
        with jax.named_scope("optimizer"):
            return w - grad @ grad

    x = jnp.ones((128, 128))
    compiled = step.lower(x, x).compile()
    compiled(x, x).block_until_ready()
    with jax.profiler.trace(str(tmp_path)):
        for _ in range(2):
            compiled(x, x).block_until_ready()
    program = Program.parse(compiled.as_text())
    (kernels,) = read_trace(next(tmp_path.glob("plugins/profile/*/*.xplane.pb")), program)
    got = break_down([kernels], program)
    assert {"attention", MATMULS, "head and loss", "optimizer"} <= set(got.parts)
    assert got.parts["optimizer"].count >= 2 and got.parts["attention"].count >= 4
    loop = got.parts["head and loss"]  # JAX 0.12 compiles it as one kernel on the CPU
    assert loop.count >= 2 * 128 or loop.ops["call"] == 2
    assert 0 <= got.idle < got.span
