"""Several real processes that train as one, on this machine, each with its own virtual devices."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jaxchat.checkpoint import Checkpoints
from jaxchat.data.text.lanes import place_in_epoch
from jaxchat.devices.launchers import LOST
from jaxchat.devices.processes import StopFlag, cause_of, exchange, on_process_zero
from jaxchat.stopping import Cause
from tests.stages.test_while_training import write_bundle
from tests.tiny import ARGUMENTS, ROOT, STEPS, copy, damage, record, start, values

# A process that sends itself a signal when it asks for the batch of a step: `SIGKILL 1 3` in process 1 at step 3.
PROGRAM = """
import os, signal, sys
import jax
from jaxchat.cli.launch import main
from jaxchat.devices import processes
from jaxchat.stages.training import Batches

processes.LOST_SECONDS, processes.HEARTBEAT_SECONDS = 4.0, 0.5  # so that the tests need not wait long
name, process, at = sys.argv[1].split()
real = Batches.next_batch

def next_batch(self, step, params):
    if (step, jax.process_index()) == (int(at), int(process)):
        os.kill(os.getpid(), getattr(signal, name))
    return real(self, step, params)

Batches.next_batch = next_batch
sys.exit(main(sys.argv[2:]))
"""
NEVER = "SIGKILL 0 -1"


def free_port():
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]


def start_several(program, arguments, *, count=2, devices=2):
    """The exit code and the output of each of several processes that are started together."""
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices)}
    env["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    port = free_port()
    processes = []
    for i in range(count):
        flags = [f"--coordinator=127.0.0.1:{port}", f"--num-processes={count}", f"--process-id={i}"]
        command = [sys.executable, "-c", *program, *arguments, *flags]
        streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        processes.append(subprocess.Popen(command, cwd=ROOT, env=env, text=True, **streams))
    try:
        ends = [process.communicate(timeout=200) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(process.returncode, out + err) for process, (out, err) in zip(processes, ends, strict=True)]


def train(run, *arguments, fault=NEVER):
    return start_several((PROGRAM, fault), [*ARGUMENTS, f"--run-dir={run}", *arguments])


def assert_same(run, whole, stage):
    """The same values up to rounding: sums over devices may be in another order."""
    for name in ("loss", "grad_norm", "bpb"):
        mine, theirs = values(run, stage, name), values(whole, stage, name)
        assert [step for step, _ in mine] == [step for step, _ in theirs]
        np.testing.assert_allclose([v for _, v in mine], [v for _, v in theirs], rtol=2e-5, err_msg=name)
    assert record(run, stage)["tokens"] == record(whole, stage)["tokens"]
    assert position(run, stage) == position(whole, stage)


def position(run, stage):
    newest = run / stage / "checkpoints" / str(Checkpoints(run / stage / "checkpoints").latest_step())
    return json.loads((newest / "data" / "metadata").read_text())


def last_line(err):
    return err.splitlines()[-1]


@pytest.mark.multiprocess
@pytest.mark.slow
def test_sigterm_to_one_saves_one_step_from_which_a_single_process_resumes(whole, tmp_path):
    run = copy(whole, tmp_path / "run")
    ends = train(run, "--stages=pretrain", fault="SIGTERM 1 2")  # one of the two is asked
    assert [code for code, _ in ends] == [75, 75], ends
    assert all("stopped by SIGTERM, step 3 saved; the same command resumes from there" in err for _, err in ends)
    assert Checkpoints(run / "pretrain" / "checkpoints").latest_step() == 3
    code, _, err = start(run, "--stages=pretrain")
    assert code == 0 and "resuming at step 3 of 6" in err, err
    assert_same(run, whole, "pretrain")


@pytest.mark.multiprocess
@pytest.mark.slow
def test_each_reads_its_lanes_and_a_single_process_resumes_with_all_of_them(tmp_path):
    documents = [f"the {i} cats sat on {i} mats, {'and ' * (i % 7)}then went" for i in range(340)]
    for name, texts in (("0", documents[:320]), ("1", documents[320:])):
        pq.write_table(pa.table({"text": texts}), tmp_path / f"{name}.parquet", row_group_size=20, use_dictionary=False)
    for group in (2, 3):  # of four, one in each of four lanes
        damage(tmp_path / "0.parquet", group)
    settings = [f"--data={tmp_path}", "--stages=tokenizer,pretrain", "--data.lanes=4", "--data.on-bad=skip"]
    settings += ["--data.no-shuffle", "--data.packing=concat"]  # so that the test knows which process reads what
    write_bundle(tmp_path / "eval" / "eval_bundle")
    settings.append("--pretrain.core-every=2")  # which all processes measure together, before and after the signal
    code, _, err = start(tmp_path / "whole", *settings)
    assert code == 0, err
    run = tmp_path / "run"
    ends = train(run, *settings, fault="SIGTERM 0 3")
    assert [code for code, _ in ends] == [75, 75], ends
    state = position(run, "pretrain")
    assert state["of"] == len(state["lanes"]) == 4 and all(lane["blocks"] == 16 for lane in state["lanes"].values())
    for group in (2, 3):
        process = next(lane for lane in range(4) if place_in_epoch(42, 0, 0, lane, 4) == group) // 2
        message = f"row group {group} cannot be read: .*left out \\(process {process}\\)"
        assert [bool(re.search(message, out)) for _, out in ends] == [process == 0, process == 1], ends
    code, _, err = start(run, *settings)
    assert code == 0, err
    assert_same(run, tmp_path / "whole", "pretrain")
    for name in ("core/copa", "core/lambada_openai"):
        assert values(run, "pretrain", name) == values(tmp_path / "whole", "pretrain", name)
        assert [step for step, _ in values(run, "pretrain", name)] == [2, 4, STEPS]
    for fact in ("packing", "left_out"):
        assert record(run, "pretrain")[fact] == record(tmp_path / "whole", "pretrain")[fact]
    assert record(run, "pretrain")["left_out"] == {"unreadable_blocks": 2}


@pytest.mark.multiprocess
@pytest.mark.slow
@pytest.mark.parametrize("lost", [0, 1])
def test_when_one_is_killed_the_others_end_and_the_job_resumes(whole, tmp_path, lost):
    run = copy(whole, tmp_path / "run")
    ends = train(run, "--stages=pretrain", fault=f"SIGKILL {lost} 3")
    (killed, _), (code, err) = ends[lost], ends[1 - lost]
    assert killed == -signal.SIGKILL and code == LOST, err
    assert last_line(err).startswith(f"error: process {1 - lost} stops: process {lost} is lost"), err
    assert last_line(err).endswith("the same command resumes from what is saved")
    if lost == 0:
        code, _, err = start(run, "--stages=pretrain")
        assert code == 0, err
    else:
        scored = ("--sft.tasks=sums", "--sft.task-questions=4")
        ends = train(run, "--stages=pretrain,sft,rl", "--rl.num-iterations=1", "--rl.eval-questions=2", *scored)
        assert [code for code, _ in ends] == [0, 0], ends
        assert_same(run, whole, "sft")
        assert [step for step, _ in values(run, "sft", "sample_score/sums")] == [0, STEPS]
        assert len(values(run, "rl")) == 1
    assert [step for step, _ in values(run, "pretrain")] == list(range(STEPS))
    assert_same(run, whole, "pretrain")


@pytest.mark.multiprocess
@pytest.mark.slow
def test_bad_input_ends_all_with_the_same_message(whole, tmp_path):
    run = copy(whole, tmp_path / "run", "pretrain")
    shutil.rmtree(run / "pretrain" / "checkpoints")
    ends = train(run, "--stages=sft")
    assert [code for code, _ in ends] == [2, 2], ends
    assert all(f"has no checkpoint of step {STEPS}, the result of pretrain" in last_line(err) for _, err in ends)


AGREEING = """
import sys, tempfile, time
from pathlib import Path
import jax
import jax.numpy as jnp
from jaxchat.devices import processes as d
from jaxchat.devices.launchers import Cluster
from jaxchat.config import MeshConfig
from jaxchat.model.config import GPTConfig
from jaxchat.errors import UserError
from jaxchat.eval.chat import choose
from jaxchat.eval.core import evaluate_core, load_bundle
from jaxchat.infer.engine import Engine
from jaxchat.devices.mesh import make_mesh
from jaxchat.model.parameters import shardings
from jaxchat.model.gpt import abstract_params, init_params
from jaxchat.ops.compute import Compute
from jaxchat.tokenizer import Tokenizer
from tests.eval.core.conftest import TASKS, write_bundle

here = int(sys.argv[3].partition("=")[2])
d.start(Cluster(sys.argv[1].partition("=")[2], 3, here))

def work():
    assert here == 0
    time.sleep(0.3)
    return {"steps": [1, 2]}

def refuse():
    raise UserError("no such thing")

texts = [d.exchange(f"{turn} from {here}") for turn in range(40)]
assert texts == [[f"{turn} from {i}" for i in range(3)] for turn in range(40)]
assert d.on_process_zero(work) == {"steps": [1, 2]}
try:
    d.on_process_zero(refuse)
except UserError as error:
    assert str(error) == "no such thing"
else:
    raise AssertionError("an error of process 0 is raised on all")

config = GPTConfig(depth=1, vocab_size=300, sequence_len=32)
mesh = make_mesh(MeshConfig())
tokenizer = Tokenizer.train_from_iterator(["A B C D and so on, over and over"] * 9, 270)
place = shardings(mesh, abstract_params(config))
params = jax.jit(init_params, static_argnums=0, out_shardings=place)(config, jax.random.key(0))
engine = Engine(config, params, tokenizer, dtype=jnp.float32)
chosen = repr(choose(engine, [[1, 2, 3 + i] for i in range(7)], ["ABCD"] * 7, 4))
assert d.exchange(chosen) == [chosen] * 3
written = repr(engine.generate([[1, 2, 3 + i // 3] for i in range(7)], max_new_tokens=12, seed=1))
assert d.exchange(written) == [written] * 3

folder, calls = Path(tempfile.mkdtemp()), []
bundle = load_bundle(write_bundle(folder, TASKS[1:3]))
for turn in range(2):  # the second goes on from what the first has left, which only process 0 can read
    options = {"keep": folder / "kept", "progress": lambda *facts: calls.append(facts)}
    scores = str(evaluate_core(config, params, tokenizer, bundle, compute=Compute(mesh=mesh), **options).tasks)
    assert d.exchange(scores) == [scores] * 3 and len(calls) == 2
assert (folder / "kept").exists() == (here == 0)
d.finish()
"""


@pytest.mark.multiprocess
def test_agreement_of_three():
    ends = start_several((AGREEING,), [], count=3, devices=1)
    assert [code for code, _ in ends] == [0, 0, 0], ends


SAVING = """
import sys, threading
import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jaxchat.devices import processes as d
from jaxchat.checkpoint import Checkpoints
from jaxchat.devices.launchers import Cluster
from jaxchat.config import CheckpointConfig, MeshConfig
from jaxchat.devices.mesh import make_mesh
from jax.sharding import NamedSharding, PartitionSpec as P

d.start(Cluster(sys.argv[2].partition("=")[2], 2, int(sys.argv[4].partition("=")[2])))
on_devices = multihost_utils.sync_global_devices

def sync_global_devices(name):
    assert threading.current_thread() is threading.main_thread(), "a program on all devices in a thread"
    on_devices(name)

multihost_utils.sync_global_devices = sync_global_devices
mesh = make_mesh(MeshConfig(data=2, fsdp=2))
place = {"params": {"w": NamedSharding(mesh, P("fsdp"))}, "step": NamedSharding(mesh, P())}

@jax.jit(out_shardings=place)
def begin():
    return {"params": {"w": jnp.zeros((256, 128))}, "step": jnp.asarray(0)}

@jax.jit(donate_argnums=0, out_shardings=(place, None))
def step(state):
    total = jnp.sum(state["params"]["w"])  # over the devices of both processes
    state = {"params": {"w": state["params"]["w"] + 1}, "step": state["step"] + 1}
    return state, total

state, totals, beside = begin(), [], 0
checkpoints = Checkpoints(sys.argv[1], CheckpointConfig(keep=6))
checkpoints.prepare(jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state))
for number in range(1, 31):
    state, total = step(state)
    if number % 5 == 0:
        copy = checkpoints.copy(state)
        assert copy is not None
    totals.append(total)
    if number % 5 == 1 and number > 1:
        checkpoints.save(number - 1, copy, data={"at": number - 1}, meta={}, is_copy=True)
        beside += not (checkpoints.directory / str(number - 1)).exists()
assert beside >= 3, "saves are waited for"
checkpoints._copies.has_room = lambda tree: d.jax.process_index() == 0
assert checkpoints.copy(state) is None  # because the other process has no room
checkpoints.save(30, state, data={"at": 30}, meta={})
assert [float(total) for total in totals] == [256 * 128 * i for i in range(30)]
assert checkpoints.steps() == [5, 10, 15, 20, 25, 30]
for number in checkpoints.steps():
    restored, data, _ = checkpoints.restore(state, number)
    assert data == {"at": number} and int(restored["step"]) == number
    for shard in restored["params"]["w"].addressable_shards:
        np.testing.assert_array_equal(shard.data, number)
checkpoints.close()
d.finish()
"""


@pytest.mark.multiprocess
def test_saves_run_beside_steps_of_all_devices(tmp_path):
    ends = start_several((SAVING, str(tmp_path)), [])
    assert [code for code, _ in ends] == [0, 0], ends


def test_a_single_process_agrees_with_itself():
    assert exchange("mine") == ["mine"]
    assert on_process_zero(lambda: 7) == 7


def test_what_stops_a_single_process_is_what_it_was_asked():
    flag = StopFlag()
    for cause in (None, *Cause):
        assert cause_of(float(flag(cause))) is cause
