"""The benchmark of proposed sizes: a grid around the proposal, each of its others with one size changed."""

import dataclasses

import proposal

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
    records = [{**facts, "name": name, "proposed": name == "one", "bpb": bpb, "best_bpb": bpb} for name, bpb in
               (("one", 1.02), ("other", 1.0))]  # fmt: skip
    rows = proposal._rows(records)
    assert rows[0][0] == "one (proposed)" and [row[-1] for row in rows] == ["+2.00%", "+0.00%"]


def test_a_folder_without_text(tmp_path, capsys):
    assert proposal.main([str(tmp_path)]) == 2
    assert "no text in" in capsys.readouterr().err
