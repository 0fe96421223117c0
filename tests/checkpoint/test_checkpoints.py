"""Checkpoints: the same state comes back on any mesh, and a damaged one is never used."""

import json
import os
import shutil
import signal
import threading
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxchat.checkpoint import Checkpoints
from jaxchat.config import CheckpointConfig, MeshConfig, OptimizerConfig
from jaxchat.devices.mesh import make_mesh
from jaxchat.errors import UserError
from jaxchat.model.config import GPTConfig
from jaxchat.model.parameters import shardings
from jaxchat.optim.optimizer import make_optimizer

OPTIMIZER = make_optimizer(OptimizerConfig(), GPTConfig(depth=2, vocab_size=256), lambda count: 1.0)
ONE = make_mesh(MeshConfig(), jax.devices()[:1])
ALL = make_mesh(MeshConfig())
SQUARE = make_mesh(MeshConfig(fsdp=2, tensor=2))


def state(seed=0, width=16, step=0, mesh=None):
    rng = np.random.default_rng(seed)

    def array(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    attn = {name: {"kernel": array(width, width)} for name in ("q", "o")}
    block = {"attn": attn, "mlp": {"up": {"kernel": array(width, 4 * width)}}}
    params = {"embed": {"embedding": array(32, width)}, "blocks": {"0": block}, "head": {"kernel": array(width, 32)}}
    opt_state = OPTIMIZER.init(params)
    opt_state = jax.tree.map(lambda x: array(*x.shape) if x.ndim else x + step, opt_state)
    tree = {"params": params, "opt_state": opt_state, "step": jnp.asarray(step, jnp.int32)}
    return jax.device_put(tree, shardings(mesh, tree)) if mesh else tree


def abstract(tree, mesh):
    return jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree, shardings(mesh, tree)
    )


def assert_same(got, expected):
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, got, expected)


@pytest.fixture
def checkpoints(tmp_path):
    checkpoints = Checkpoints(tmp_path / "run" / "checkpoints")
    yield checkpoints
    checkpoints.close()


@pytest.mark.parametrize("before, after", [(ALL, ONE), (ALL, SQUARE), (SQUARE, ALL), (ONE, SQUARE), (SQUARE, ONE)])
def test_comes_back_on_another_mesh(checkpoints, before, after):
    saved = state(step=7, mesh=before)
    data, meta = {"shard": 3, "rows": [1, 2], "rng": {"seed": 1}}, {"tokens": 2**40, "seconds": 1.5, "parent": None}
    checkpoints.save(7, saved, data=data, meta=meta)
    target = abstract(saved, after)
    got, got_data, got_meta = checkpoints.restore(target)
    assert_same(got, saved)
    assert (got_data, got_meta) == (data, meta)
    jax.tree.map(
        lambda g, t: g.sharding.is_equivalent_to(t.sharding, g.ndim) or pytest.fail("another sharding"), got, target
    )


def test_training_resumes_from_it_exactly(checkpoints):
    @jax.jit
    def step(tree):
        updates, opt_state = OPTIMIZER.update(tree["params"], tree["opt_state"], tree["params"])
        return {
            "params": optax.apply_updates(tree["params"], updates),
            "opt_state": opt_state,
            "step": tree["step"] + 1,
        }

    def steps(tree, count):
        for _ in range(count):
            tree = step(tree)
        return tree

    start = state()
    start["opt_state"] = OPTIMIZER.init(start["params"])
    checkpoints.save(2, steps(start, 2), data={}, meta={})
    restored, _, _ = checkpoints.restore(start)
    assert_same(steps(restored, 2), steps(start, 4))


@pytest.fixture(params=["with room", "without room"])
def room(request, monkeypatch):
    """The devices have, or do not have, the memory for a second state; CPU devices do not report it."""
    if request.param == "without room":
        full = {"bytes_limit": 1000, "peak_bytes_in_use": 1000}
        monkeypatch.setattr(type(jax.devices()[0]), "memory_stats", lambda device: full)


@pytest.mark.parametrize("mesh", [ONE, ALL, SQUARE])
def test_overwriting_the_state_after_the_save_does_not_change_the_checkpoint(checkpoints, room, mesh):
    overwrite = jax.jit(lambda tree: jax.tree.map(lambda x: x * 0 - 1, tree), donate_argnums=0)
    for step in (1, 2):
        saved, expected = state(seed=step, width=256, step=step, mesh=mesh), state(seed=step, width=256, step=step)
        checkpoints.save(step, saved, data={}, meta={})
        for _ in range(3):
            saved = overwrite(saved)
        jax.tree.map(lambda x: x.delete(), saved)
        got, _, _ = checkpoints.restore(abstract(expected, mesh))
        assert_same(got, expected)


def test_a_save_leaves_nothing_on_the_devices(checkpoints):
    saved = state(mesh=SQUARE)
    before = len(jax.live_arrays())
    for step in (1, 2):
        checkpoints.save(step, saved, data={}, meta={})
        checkpoints.wait()
        assert len(jax.live_arrays()) == before


def test_ctrl_c_while_waiting_for_a_save_ends_only_the_wait(checkpoints):
    saved = {"params": {"w": jax.random.normal(jax.random.key(0), 1 << 24)}, "step": jnp.asarray(1)}
    checkpoints.save(1, saved, data={}, meta={})
    threading.Timer(0.01, signal.pthread_kill, (threading.main_thread().ident, signal.SIGINT)).start()
    with pytest.raises(KeyboardInterrupt):
        checkpoints.wait()
    assert_same(checkpoints.restore(saved)[0], saved)


def test_only_the_parameters(checkpoints):
    saved = state()
    checkpoints.save(5, saved, data={}, meta={})
    checkpoints.wait()
    shutil.rmtree(checkpoints.directory / "5" / "training")
    without_sharding = jax.eval_shape(lambda: saved["params"])
    assert_same(checkpoints.restore_params(without_sharding, 5), saved["params"])


def test_keeps_the_newest_and_restores_any_step(checkpoints):
    assert checkpoints.latest_step() is None
    for step in (3, 20, 100):
        checkpoints.save(step, state(seed=step, step=step), data={"at": step}, meta={})
    assert checkpoints.steps() == [20, 100] and checkpoints.latest_step() == 100
    target = state()
    assert checkpoints.restore(target)[1] == {"at": 100}
    got, data, _ = checkpoints.restore(target, 20)
    assert data == {"at": 20}
    assert_same(got, state(seed=20, step=20))
    checkpoints.close()
    again = Checkpoints(checkpoints.directory)
    assert again.steps() == [20, 100]
    again.save(120, target, data={}, meta={})
    assert again.steps() == [100, 120]
    again.close()


def test_a_step_is_not_written_twice(checkpoints):
    checkpoints.save(1, state(seed=1), data={"n": 1}, meta={})
    checkpoints.save(1, state(seed=2), data={"n": 2}, meta={})
    assert checkpoints.restore(state())[1] == {"n": 1}


def test_no_checkpoint(checkpoints):
    with pytest.raises(UserError, match="there is no checkpoint in .*checkpoints"):
        checkpoints.restore(state())
    checkpoints.save(4, state(), data={}, meta={})
    with pytest.raises(UserError, match="there is no checkpoint of step 5 in .*, only of 4"):
        checkpoints.restore(state(), 5)


@pytest.mark.parametrize("restore", ["state", "params"])
def test_another_model_is_refused(checkpoints, restore):
    checkpoints.save(4, state(), data={}, meta={})
    other = state(width=32)
    with pytest.raises(
        UserError, match=r"params/blocks/0/attn/o/kernel is float32\[16,16\] there and float32\[32,32\] here"
    ):
        checkpoints.restore(other) if restore == "state" else checkpoints.restore_params(other["params"])
    fewer = state()
    del fewer["params"]["blocks"]
    with pytest.raises(UserError, match="params/blocks/0/attn/o/kernel is .* there and missing here"):
        checkpoints.restore(fewer) if restore == "state" else checkpoints.restore_params(fewer["params"])


def files(folder):
    return sorted(path for path in Path(folder).rglob("*") if path.is_file())


def biggest(folder):
    return max(files(folder), key=lambda path: path.stat().st_size)


def truncate(folder):
    path = biggest(folder)
    path.write_bytes(path.read_bytes()[:-100])


def flip_a_bit(folder):
    path = biggest(folder)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))


def delete_metadata(folder):
    (folder / "params" / "_METADATA").unlink()


def edit_the_data_position(folder):
    (folder / "data" / "metadata").write_text('{"at": 3}')


def delete_the_manifest(folder):
    (folder / "manifest.json").unlink()


def scribble_over_the_manifest(folder):
    (folder / "manifest.json").write_text('{"params/_METADATA": [')


def change_the_manifests_type(folder):
    (folder / "manifest.json").write_text("[1, 2]")


def leave_nothing_in_the_manifest(folder):
    (folder / "manifest.json").write_text("{}")


def leave_a_file_out_of_the_manifest(folder):
    listed = json.loads((folder / "manifest.json").read_text())
    listed.pop(next(name for name in listed if name.startswith("params/d/")))
    (folder / "manifest.json").write_text(json.dumps(listed))


def put_numbers_for_files_into_the_manifest(folder):
    (folder / "manifest.json").write_text('{"params/_METADATA": 5, "data/metadata": ["x", null]}')


def replace_a_file_by_a_folder(folder):
    path = biggest(folder)
    path.unlink()
    path.mkdir()


def replace_a_file_by_a_link_to_nothing(folder):
    path = biggest(folder)
    path.unlink()
    path.symlink_to("nowhere")


def delete_the_parameters(folder):
    shutil.rmtree(folder / "params")


def empty(folder):
    for path in files(folder):
        path.unlink()


DAMAGES = [
    truncate,
    flip_a_bit,
    delete_metadata,
    edit_the_data_position,
    delete_the_manifest,
    scribble_over_the_manifest,
    change_the_manifests_type,
    leave_nothing_in_the_manifest,
    leave_a_file_out_of_the_manifest,
    put_numbers_for_files_into_the_manifest,
    replace_a_file_by_a_folder,
    replace_a_file_by_a_link_to_nothing,
    delete_the_parameters,
    empty,
]


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_refused_with_a_remedy(checkpoints, damage):
    for step in (10, 20):
        checkpoints.save(step, state(seed=step, step=step), data={"at": step}, meta={})
    checkpoints.close()
    damage(checkpoints.directory / "20")
    fresh = Checkpoints(checkpoints.directory)
    assert fresh.latest_step() == 20
    with pytest.raises(UserError) as error:
        fresh.restore(state())
    message = str(error.value)
    assert "\n" not in message and message.endswith(
        f"delete that folder to resume from step 10, or train again with --redo={checkpoints.directory.parent.name}"
    )
    assert message.startswith(f"checkpoint {checkpoints.directory / '20'} is damaged (")
    assert_same(fresh.restore(state(), 10)[0], state(seed=10, step=10))
    shutil.rmtree(checkpoints.directory / "20")
    assert fresh.restore(state())[1] == {"at": 10}
    fresh.save(20, state(seed=20, step=20), data={"at": 20}, meta={})
    assert fresh.restore(state())[1] == {"at": 20}
    fresh.close()


def test_of_a_finished_stage_its_record_is_in_the_way_of_an_earlier_step(checkpoints):
    for step in (10, 20):
        checkpoints.save(step, state(seed=step, step=step), data={}, meta={})
    checkpoints.close()
    record = checkpoints.directory.parent / "stage.json"
    record.write_text("{}")
    truncate(checkpoints.directory / "20")
    with pytest.raises(
        UserError, match=f"; delete it and {record} to resume from step 10, or train again with --redo="
    ):
        Checkpoints(checkpoints.directory).restore(state())


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"20": "x"}', '{"a": 1.0}', '{"20": 1e999}'])
def test_damaged_scores_are_no_scores(checkpoints, text):
    checkpoints.save(20, state(), data={}, meta={})
    checkpoints.close()
    (checkpoints.directory / "worths.json").write_text(text)
    assert Checkpoints(checkpoints.directory).best_step() is None


@pytest.mark.parametrize("damage", [truncate, flip_a_bit, delete_metadata])
def test_without_a_good_step_the_remedy_is_to_train_the_stage_again(checkpoints, damage):
    for step in (10, 20):
        checkpoints.save(step, state(), data={}, meta={})
    checkpoints.close()
    damage(checkpoints.directory / "10" / "params" if damage is not delete_metadata else checkpoints.directory / "10")
    damage(checkpoints.directory / "20" / "params" if damage is not delete_metadata else checkpoints.directory / "20")
    with pytest.raises(UserError, match=r"/20 is damaged \(params/.*\); train again with --redo="):
        Checkpoints(checkpoints.directory).restore_params(state()["params"])


def test_what_was_imported_is_imported_again(checkpoints):
    record = checkpoints.directory.parent / "stage.json"
    record.parent.mkdir(parents=True, exist_ok=True)
    record.write_text('{"imported": {"from": "hf", "file": "/model"}}')
    again = "; import the model again, to a new --run$"
    with pytest.raises(UserError, match=f"there is no checkpoint in .*{again}"):
        checkpoints.restore(state())
    checkpoints.save(20, state(), data={}, meta={})
    checkpoints.close()
    truncate(checkpoints.directory / "20" / "params")
    with pytest.raises(UserError, match=f"/20 is damaged .*{again}"):
        Checkpoints(checkpoints.directory).restore(state())
    record.write_text("{")
    with pytest.raises(UserError, match=r"/20 is damaged .*; train again with --redo="):
        Checkpoints(checkpoints.directory).restore(state())


def test_random_damage_never_gives_another_state(checkpoints, capsys):
    """Any file: a bit flipped, the end cut off, or deleted. JAXCHAT_DAMAGES sets how many times."""
    good = {step: state(seed=step, step=step) for step in (10, 20)}
    for step in good:
        checkpoints.save(step, good[step], data={"at": step}, meta={})
    checkpoints.close()
    folder, draw, refused = checkpoints.directory / "20", np.random.default_rng(0), 0
    count = int(os.environ.get("JAXCHAT_DAMAGES", "20"))
    for _ in range(count):
        path = draw.choice(files(folder))
        content = path.read_bytes()
        damaged, place = bytearray(content), draw.integers(len(content))
        match draw.integers(3):
            case 0:
                damaged[place] ^= 1 << draw.integers(8)
            case 1:
                del damaged[place:]
            case 2:
                path.unlink()
        if path.exists():
            path.write_bytes(damaged)
        fresh = Checkpoints(checkpoints.directory)
        try:
            got, data, _ = fresh.restore(state(), 20)
        except UserError as error:
            refused += 1
            assert str(folder) in str(error) and "\n" not in str(error)
            assert "resume from step 10" in str(error) or "there is no checkpoint of step 20" in str(error)
        else:  # the file is not needed to restore
            assert path.parent == Path(folder), path
            assert_same(got, good[20])
            assert data == {"at": 20}
        path.write_bytes(content)
    assert_same(fresh.restore(state(), 10)[0], good[10])
    assert_same(fresh.restore(state(), 20)[0], good[20])
    with capsys.disabled():
        print(f" {count} damages, {refused} refused, {count - refused} of files that are not read ", end="")


def test_every_file_is_covered_by_the_manifest(checkpoints):
    checkpoints.save(1, state(), data={}, meta={})
    checkpoints.wait()
    folder = checkpoints.directory / "1"
    here = {str(path.relative_to(folder)) for path in files(folder) if path.parent != Path(folder)}
    assert set(json.loads((folder / "manifest.json").read_text())) == here


def test_a_half_written_save_is_not_a_checkpoint_and_the_next_save_deletes_it(checkpoints):
    checkpoints.save(1, state(), data={}, meta={})
    checkpoints.close()
    half = checkpoints.directory / "2.orbax-checkpoint-tmp-0"
    shutil.copytree(checkpoints.directory / "1", half)
    again = Checkpoints(checkpoints.directory)
    assert again.steps() == [1] and half.exists()
    again.save(2, state(seed=2), data={"n": 2}, meta={})
    assert again.steps() == [1, 2]
    assert again.restore(state())[1] == {"n": 2}
    again.close()
    assert not half.exists()


def kept(directory, config, scores=(), steps=range(1, 9)):
    """The steps that are left after a save at each of these, each followed by the score of its evaluation."""
    checkpoints, scores = Checkpoints(directory, config), dict(scores)
    for step in steps:
        checkpoints.save(step, {"params": {"w": jnp.zeros(2)}, "step": jnp.asarray(step)}, data={}, meta={})
        if step in scores:
            checkpoints.record_score(step, scores[step])
    left = checkpoints.steps()
    checkpoints.close()
    return left


def test_which_are_kept(tmp_path):
    assert kept(tmp_path / "newest", CheckpointConfig()) == [7, 8]
    assert kept(tmp_path / "one", CheckpointConfig(keep=1)) == [8]
    assert kept(tmp_path / "every", CheckpointConfig(keep=1, keep_every=3)) == [3, 6, 8]
    scores = {2: -1.5, 4: -1.1, 6: -1.3}
    assert kept(tmp_path / "best", CheckpointConfig(keep_best=True), scores) == [4, 7, 8]
    # The best step so far is known after a restart too; a better one takes its place.
    assert kept(tmp_path / "best", CheckpointConfig(keep_best=True), steps=(9, 10)) == [4, 9, 10]
    assert kept(tmp_path / "best", CheckpointConfig(keep_best=True), {11: -1.0}, (11, 12, 13)) == [11, 12, 13]
    assert kept(tmp_path / "best", CheckpointConfig(), steps=(14, 15)) == [14, 15]
    for wrong in ({"keep": 0}, {"keep_every": 0}):
        with pytest.raises(UserError, match="must be at least 1"):
            CheckpointConfig(**wrong)


def test_directories_relative_and_remote(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert str(Checkpoints("runs/a").directory) == str(tmp_path / "runs" / "a")
    assert str(Checkpoints("gs://bucket/runs/a").directory) == "gs://bucket/runs/a"


def test_silent(tmp_path, capfd):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, state(mesh=SQUARE), data={}, meta={})
    checkpoints.restore(abstract(state(), ONE))
    checkpoints.close()
    out, err = capfd.readouterr()
    assert out == "" and err == ""
