"""The benchmark of proposed sizes: a grid around the proposal, each of its others with one size changed."""

import dataclasses
import json
import random

import proposal
import pytest

from jaxchat.data.synthetic.stories import write_document
from jaxchat.data.synthetic.world import build_world
from jaxchat.planning.known_text import ENGLISH
from jaxchat.planning.proposal import propose
from jaxchat.planning.text_amount import TextAmount

SIZES = ("depth", "vocab_size", "batch_tokens", "sequence_len")


def test_the_grid_is_the_proposal_and_its_neighbours():
    text = TextAmount(30_000_000, 3000, True, ENGLISH, 10_000)
    place = {"shards": 1, "on_cpu": True}
    first = propose(text, **place)
    grid = list(proposal._grid(first, text, place))
    assert grid[0] is first
    for other in grid[1:]:
        assert sum(getattr(other, name) != getattr(first, name) for name in SIZES) == 1
    for name in SIZES[:3]:
        values = {getattr(other, name) for other in grid}
        assert min(values) < getattr(first, name) < max(values)


def test_the_table_shows_the_distance_to_the_best():
    text = TextAmount(30_000_000, 3000, True, ENGLISH, 10_000)
    facts = {"step_seconds": 0.1, "seconds": 9.0, "passes": 1.0, **dataclasses.asdict(propose(text))}
    records = [{**facts, "number": number, "name": str(number), "bpb": bpb, "best_bpb": 1.0} for number, bpb in
               ((0, 1.02), (1, 1.01))]  # fmt: skip
    rows = proposal._rows(records)
    assert rows[0][1] == "0 (proposed)"
    assert [row[-2:] for row in rows] == [["+0.99%", "+2.00%"], ["+0.00%", "+1.00%"]]
    assert proposal._rows([]) == []


def test_a_part_of_the_grid_of_equal_flops(tmp_path, capsys):
    world = build_world(0)
    lines = [json.dumps({"text": write_document(world, random.Random(number))}) for number in range(400)]
    (tmp_path / "text.jsonl").write_text("\n".join(lines))
    out = tmp_path / "out.json"
    options = [str(tmp_path), "--flops", "6e9", "--by", "flops"]
    assert proposal.main([*options, "--only", "0", "--json", str(out)]) == 0
    (record,) = (json.loads(line) for line in out.read_text().splitlines())
    assert record["number"] == 0 and record["flops"] == pytest.approx(6e9, rel=0.1)
    assert record["steps"] > proposal.EVALUATIONS < len(record["curve"])  # also before the first step
    assert record["bpb"] < record["curve"][0] and record["best_bpb"] == min(record["curve"])
    assert proposal.main([*options, "--only", "40"]) == 2
    assert "--only has 40; the grid has the numbers 0 to" in capsys.readouterr().err


def test_a_folder_without_text(tmp_path, capsys):
    assert proposal.main([str(tmp_path)]) == 2
    assert "no text in" in capsys.readouterr().err
