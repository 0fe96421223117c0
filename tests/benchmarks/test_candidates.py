"""The comparison of constants for decoding, run dry."""

import os

import decode_candidates
import jax
import jax.numpy as jnp
import pytest
from candidates import measures
from candidates.variants import DIAGNOSES, IN_USE, VARIANTS

from jaxchat.ops import dispatch, few_rows
from jaxchat.ops.decode import Splits
from jaxchat.ops.dispatch import Level


def test_settings_of_variants_are_those_of_modules():
    for variant in VARIANTS["products"].values():
        places = {name: measures.place(name) for name in variant.settings}
        before = {name: getattr(*place) for name, place in places.items()}
        with measures.applied(variant):
            assert {name: getattr(*place) for name, place in places.items()} == variant.settings
        assert {name: getattr(*place) for name, place in places.items()} == before
        for name, value in variant.settings.items():
            assert not name.endswith("PARTS") or set(value) == set(before[name])
    assert all(next(iter(variants)) == IN_USE for variants in VARIANTS.values())


def test_what_is_wrong_is_not_compared_and_not_called_wrong():
    assert not any(variant.right for variant in DIAGNOSES.values())
    assert all(variant.right for measure in ("check", "step") for variant in VARIANTS[measure].values())
    line = {"difference": float("nan"), "time": 1.0}
    assert decode_candidates._verdict("products", "no waiting", line, 2.0) == "only its time counts"
    assert decode_candidates._verdict("products", "ring of 140 KB", line, 2.0) == "WRONG"


@pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="this JAX cannot lower the kernel")
@pytest.mark.parametrize(
    "name",
    [IN_USE, "as several rows", "ring of 200 KB", *DIAGNOSES],
    ids=lambda name: name.replace(" ", "-"),
)
def test_kernels_are_lowered(monkeypatch, name):
    """That for one row gets attention's splits."""
    monkeypatch.setattr(dispatch, "highest_level", lambda *_, **__: Level.HOPPER)
    hopper = jax.sharding.AbstractDevice(device_kind="NVIDIA H200", num_cores=132, platform="gpu")
    shapes = (512, 256), (256, 1024), (1024, 256), (256, 768)
    weights = [jnp.zeros(shape, jnp.bfloat16) for shape in shapes]
    variant, texts = VARIANTS["products"][name], {}

    def run(x, splits, *rest):
        return few_rows.between_attentions(x, Splits(splits, splits), *rest, 0)

    for rows in (1, 2):
        x = jnp.zeros((rows, 256), jnp.bfloat16)
        mesh = jax.sharding.AbstractMesh((), (), abstract_device=hopper)
        with measures.applied(variant), jax.sharding.use_abstract_mesh(mesh):
            given = x, jnp.ones((4, rows, 512)), *weights, few_rows.new_counters(1, x, *weights[:2])
            texts[rows] = jax.jit(run).trace(*given).lower(lowering_platforms=("cuda",)).as_text()
    for rows, text in texts.items():
        (call,) = [line for line in text.splitlines() if "@mosaic_gpu_v2(" in line]
        assert ("tensor<4x512xf32>" in call) == (rows == 1 and name != "as several rows")
        cleared = rows == 1  # what blocks leave each other
        assert ("tensor<1x512xi32>" in call) == (not cleared)
        counts = rows == 1 or "ops.several_rows._signal" not in variant.settings
        assert ("output_operand_aliases = [#" in call) == counts  # in memory that it gets and passes on


def test_the_comparison(capsys):
    """In the processes that it runs on a GPU too."""
    command = ["--rows", "1", "--only", "check", "step", "--processes", "2", "--limit", "60"]
    assert decode_candidates.main([*command, "--variants", "as several rows", "ring of 140 KB"]) == 0
    told = capsys.readouterr()
    for name in ("as several rows", "ring of 140 KB", "in use"):
        assert f"| check | 1 | {name} |" in told.out and f"| step | 1 | {name} |" in told.out
    assert "programs compiled" in told.err


def test_attention_by_itself(capsys):
    assert decode_candidates._work("time", [("attention", "32 keys, 7 stages, 4 warps", 2)]) == 0
    line = decode_candidates.json.loads(capsys.readouterr().out)
    assert line["difference"] == 0 and line["time"] > 0


def test_right_and_wrong_products(capsys, monkeypatch):
    name = "ring of 140 KB"
    tasks = ["check", name, 1], ["products", "o in 5 parts", 1], ["check", "no such variant", 1], ["step", "x", 1]
    assert decode_candidates._work("time", [tuple(task) for task in tasks]) == 1
    right, timed, wrong = map(decode_candidates.json.loads, capsys.readouterr().out.splitlines())
    assert right["difference"] < 1e-3 and "time" not in right
    assert timed["time"] > 0 and timed["difference"] == 0
    assert "no such variant" in wrong["error"]  # and the process does not go on
    monkeypatch.setitem(decode_candidates.ALLOWED, "check", -1.0)
    assert decode_candidates._print("check", [1], {("check", name, 1): right}) == 1
    assert "WRONG" in capsys.readouterr().out


def test_one_that_hangs_does_not_keep_the_others(monkeypatch):
    tasks = [("check", IN_USE, 1), ("check", "ring of 140 KB", 1)]
    assert list(decode_candidates._lines("time", tasks, dict(os.environ), 0.01)) == [{"error": "not done in 0 s"}]
    calls = []

    def lines(work, left, environment, limit):
        calls.append(list(left))
        yield {"error": "not done"} if len(calls) == 1 else {"difference": 0.0}

    monkeypatch.setattr(decode_candidates, "_lines", lines)
    found = decode_candidates._measure(tasks, {}, 1)
    assert calls == [tasks, tasks[1:]] and found[tasks[1]] == {"difference": 0.0}


def test_a_profile(capsys):
    assert decode_candidates._work("profile", [("step", IN_USE, 1)]) == 0
    text = decode_candidates.json.loads(capsys.readouterr().out)["text"]
    assert "1 rows:" in text and "µs a step, idle" in text and "| all others | |" in text
