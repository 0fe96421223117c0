"""The comparison of constants for decoding, run dry."""

import os

import decode_candidates
from candidates import measures
from candidates.variants import IN_USE, PRODUCTS, VARIANTS

from jaxchat.ops import few_rows, product_chain


def test_constants_of_variants_are_those_of_modules():
    before = few_rows.PARTS, product_chain.RING
    for variant in PRODUCTS.values():
        with measures.applied(variant):
            changed = (few_rows.PARTS, product_chain.RING) != before
        assert changed == bool(variant.settings) and (few_rows.PARTS, product_chain.RING) == before
        assert set(variant.settings.get("few_rows.PARTS", before[0])) == set(before[0])
    assert all(next(iter(variants)) == IN_USE for variants in VARIANTS.values())


def test_the_comparison(capsys):
    """In the processes that it runs on a GPU too."""
    command = ["--rows", "1", "--only", "check", "step", "--processes", "2", "--limit", "60"]
    assert decode_candidates.main([*command, "--variants", "o in 5 parts"]) == 0
    told = capsys.readouterr()
    for line in ("| check | 1 | o in 5 parts |", "| step | 1 | o in 5 parts |", "| step | 1 | in use |"):
        assert line in told.out
    assert "programs compiled" in told.err


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
