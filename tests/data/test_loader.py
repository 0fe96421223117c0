"""Batches from files to the end: order, shares of processes, epochs, resuming, threads."""

import gc
import json
import subprocess
import sys
import threading
from collections import Counter
from functools import partial

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxchat.data.chat.packing import RenderedConversations
from jaxchat.data.loader import chat_batches, count_rows
from jaxchat.data.positions import totals
from jaxchat.data.text import rows as text_rows
from jaxchat.data.text.shards import TextFiles, iterate_texts
from jaxchat.errors import UserError
from tests.data.small_text import BOS, PACKINGS, TOKENIZER, assert_same, take, text_batches

CHATS = [
    {"messages": [{"role": "user", "content": f"say {i}"}, {"role": "assistant", "content": f"{i} " * (1 + i % 9)}]}
    for i in range(60)
]
RENDERED = RenderedConversations(CHATS, TOKENIZER, 100)


def tokens_of(side: TextFiles) -> list[int]:
    return [token for text in iterate_texts(side) for token in [BOS, *TOKENIZER.encode(text)]]


def chats(**changes):
    return chat_batches(RENDERED, TOKENIZER, **{"rows": 2, "sequence_len": 100, "seed": 0} | changes)


def test_text_is_read_in_order_repeatedly_without_a_gap(side):
    expected = tokens_of(side)
    batches = take(text_batches(side), 3 * len(expected) // 32)
    assert all(b["inputs"].shape == b["targets"].shape == (2, 16) for b in batches)
    assert all(b["inputs"].dtype == b["targets"].dtype == np.int32 for b in batches)
    inputs = np.concatenate([b["inputs"].ravel() for b in batches])
    targets = np.concatenate([b["targets"].ravel() for b in batches])
    endless = np.array(expected * 4)
    np.testing.assert_array_equal(inputs, endless[: len(inputs)])
    np.testing.assert_array_equal(targets, endless[1 : len(targets) + 1])


@pytest.mark.parametrize("rows", [1, 2, 7, 100])
def test_validation_begins_at_the_beginning_and_ends_with_the_last_token(side, rows):
    expected = tokens_of(side)
    for _ in range(2):
        batches = list(text_batches(side, repeat=False, rows=rows))
        assert all(b["inputs"].shape == (rows, 16) for b in batches)
        targets = np.concatenate([b["targets"].ravel() for b in batches])
        assert targets[: len(expected) - 1].tolist() == expected[1:]
        assert (targets[len(expected) - 1 :] == -1).all() and len(targets) - len(expected) < rows * 16


def test_shuffling_reorders_blocks_by_seed_and_epoch_and_loses_none(side):
    def documents(seed: int, epochs: int) -> list[str]:
        inputs = np.concatenate([b["inputs"].ravel() for b in take(text_batches(side, shuffle=True, seed=seed), 100)])
        starts = np.flatnonzero(inputs == BOS)[: 18 * epochs + 1]
        return [TOKENIZER.decode(inputs[a + 1 : b].tolist()) for a, b in zip(starts, starts[1:], strict=False)]

    texts = list(iterate_texts(side))
    both = documents(0, 2)
    first, second = both[:18], both[18:]
    assert sorted(first) == sorted(second) == sorted(texts)
    assert first != second and first != texts and documents(1, 1) != first
    assert documents(0, 2) == both
    block = texts.index(first[0])
    assert first[:3] == texts[block : block + 3]


@settings(max_examples=40, deadline=None)
@given(taken=st.integers(0, 70), shuffle=st.booleans(), rows=st.integers(1, 3), packing=st.sampled_from(PACKINGS))
def test_text_resumes_from_any_batch(side, taken, shuffle, rows, packing):
    iterator = text_batches(side, shuffle=shuffle, rows=rows, packing=packing)
    take(iterator, taken)
    state = json.loads(json.dumps(iterator.get_state()))
    resumed = text_batches(side, shuffle=shuffle, rows=rows, packing=packing)
    resumed.set_state(state)
    assert resumed.get_state() == state
    assert_same(take(resumed, 5), take(iterator, 5))


@settings(max_examples=25, deadline=None)
@given(taken=st.integers(0, 40), rows=st.integers(1, 3))
def test_chats_resume_from_any_batch(taken, rows):
    iterator = chats(rows=rows)
    take(iterator, taken)
    state = json.loads(json.dumps(iterator.get_state()))
    resumed = chats(rows=rows)
    resumed.set_state(state)
    assert resumed.get_state() == state
    assert_same(take(resumed, 5), take(iterator, 5))


@pytest.fixture(autouse=True)
def small_windows(monkeypatch):
    monkeypatch.setattr(text_rows, "WINDOW_ROWS", 6)
    monkeypatch.setattr(text_rows, "EPOCH_ROWS", 3)
    monkeypatch.setattr(text_rows, "ENCODE_CHARS", 40)


def best_fit_batches(side, **changes):
    return text_batches(side, **{"packing": "best-fit"} | changes)


@settings(max_examples=40, deadline=None)
@given(lengths=st.lists(st.integers(1, 60), min_size=1, max_size=40), rows=st.integers(1, 9))
def test_best_fit_trains_on_every_token_once_and_begins_every_row_with_bos(tmp_path_factory, lengths, rows):
    folder = tmp_path_factory.mktemp("text")
    texts = [f"{i} " + "cat" * length for i, length in enumerate(lengths)]
    pq.write_table(pa.table({"text": texts}), folder / "a.parquet", row_group_size=7)
    side = TextFiles((folder / "a.parquet",))
    found = []
    for batch in best_fit_batches(side, rows=rows, repeat=False):
        for inputs, targets in zip(batch["inputs"].tolist(), batch["targets"].tolist(), strict=True):
            assert inputs[0] == BOS
            length = next((i for i, target in enumerate(targets) if target < 0), len(targets))
            assert targets[length:] == [-1] * (len(targets) - length), "the unfilled part is at the end"
            row = [*inputs[: length + 1], *targets[length - 1 : length]] if length == 16 else inputs[: length + 1]
            assert row[1:] == targets[:length]
            starts = [i for i, token in enumerate(row) if token == BOS]
            found += [tuple(row[a + 1 : b]) for a, b in zip(starts, [*starts[1:], len(row)], strict=True)]
    documents = [TOKENIZER.encode(text) for text in texts]
    assert Counter(token for piece in found for token in piece) == Counter(token for ids in documents for token in ids)
    spelled = [f",{','.join(map(str, ids))}," for ids in documents]
    assert all(any(f",{','.join(map(str, piece))}," in ids for ids in spelled) for piece in found if piece)


@settings(max_examples=100, deadline=None)
@given(lengths=st.lists(st.integers(1, 300), min_size=1, max_size=60), row_len=st.integers(4, 200))
def test_best_fit_places_every_part_of_a_document_once_and_leaves_little_room(lengths, row_len):
    ends = np.cumsum(lengths).tolist()
    documents = list(zip([0, *ends[:-1]], ends, strict=True))
    rows = text_rows.best_fit(documents, row_len)
    used = [sum(end - start + (not whole) for start, end, whole in row) for row in rows]
    assert max(used) <= row_len and min(used[:-1], default=row_len) >= row_len - max(2, row_len // text_rows.GAP)
    pieces = sorted(piece for row in rows for piece in row)
    assert all(start < end for start, end, _ in pieces)
    assert [start for start, _, _ in pieces] == [0, *(end for _, end, _ in pieces[:-1])] and pieces[-1][1] == ends[-1]
    assert [start for start, _, whole in pieces if whole] == [start for start, _ in documents]


def test_best_fit_cuts_few_documents_and_counts_them(side):
    iterator = best_fit_batches(side, repeat=False, sequence_len=40)
    rows = sum(int((batch["targets"] >= 0).any(axis=1).sum()) for batch in iterator)
    packed = totals(iterator.get_state())["packed"]
    assert (packed["documents"], packed["rows"]) == (18, rows) and 0 < packed["cut"] <= rows
    pieces = packed["targets"] + rows - len(tokens_of(side))  # each has one more <|bos|>
    assert packed["cut"] <= pieces <= rows
    whole = best_fit_batches(side, repeat=False, sequence_len=5000)
    assert len(list(whole)) == 1 and totals(whole.get_state())["packed"]["cut"] == 0


def test_borders_are_not_targets_if_masked(side):
    for packing_name in PACKINGS:
        plain, masked = (take(text_batches(side, packing=packing_name, mask_borders=mask), 5) for mask in (False, True))
        for a, b in zip(plain, masked, strict=True):
            np.testing.assert_array_equal(a["inputs"], b["inputs"])
            np.testing.assert_array_equal(np.where(a["targets"] == BOS, -1, a["targets"]), b["targets"])
        assert any((batch["targets"] == BOS).any() for batch in plain)


def test_a_position_of_another_packing_is_refused(side):
    for packing_name, other in (PACKINGS, PACKINGS[::-1]):
        state = text_batches(side, packing=packing_name).get_state()
        with pytest.raises(UserError, match=f"resume with --data.packing={packing_name}"):
            text_batches(side, packing=other).set_state(state)


@pytest.mark.parametrize("count", [2, 3])
def test_processes_share_the_rows_of_the_same_global_batches(side, count):
    def joined(make) -> list[dict]:
        parts = [take(make(rows=2, process_index=i, process_count=count), 12) for i in range(count)]
        return [{k: np.concatenate([part[k] for part in b]) for k in b[0]} for b in zip(*parts, strict=True)]

    assert_same(joined(lambda **options: text_batches(side, **options)), take(text_batches(side, rows=2 * count), 12))
    best = joined(lambda **options: best_fit_batches(side, **options))
    assert_same(best, take(best_fit_batches(side, rows=2 * count), 12))
    assert_same(joined(chats), take(chats(rows=2 * count), 12))


def test_a_position_fits_any_number_of_processes_and_rows(side):
    for make in (partial(text_batches, side), partial(best_fit_batches, side), chats):
        one = make(rows=4)
        take(one, 5)
        two = [make(rows=1, process_index=i, process_count=2) for i in range(2)]
        for iterator in two:
            iterator.set_state(one.get_state())
        rows = [b["inputs"] for batches in zip(*(take(it, 4) for it in two), strict=True) for b in batches]
        np.testing.assert_array_equal(np.concatenate(rows), np.concatenate([b["inputs"] for b in take(one, 2)]))


@pytest.mark.parametrize("count", [1, 3])
def test_finite_iterators_of_all_processes_end_together(side, count):
    makers = (partial(text_batches, side, repeat=False), partial(best_fit_batches, side, repeat=False))
    for make in (*makers, partial(chats, epochs=1)):
        batches = [list(make(process_index=i, process_count=count)) for i in range(count)]
        assert len({len(part) for part in batches}) == 1
        targets = sum((b["targets"] >= 0).sum() for part in batches for b in part)
        assert targets == sum((b["targets"] >= 0).sum() for b in make(rows=50))


def test_each_epoch_has_every_conversation_whole_and_once():
    rows = count_rows(CHATS, TOKENIZER, sequence_len=100, seed=0)
    rendered = sorted(TOKENIZER.render_conversation(chat, max_tokens=101)[0] for chat in CHATS)
    assert sum(map(len, rendered)) / (101 * rows) > 0.9
    assert len(list(chats(epochs=1))) == -(-rows // 2)
    orders = []
    for epochs in (1, 2):
        seen = []
        for batch in chats(epochs=epochs):
            for row, last in zip(batch["inputs"].tolist(), batch["targets"][:, -1].tolist(), strict=True):
                row += [last] if last >= 0 else []
                starts = [i for i, token in enumerate(row) if token == BOS]
                pieces = [row[a:b] for a, b in zip(starts, [*starts[1:], len(row)], strict=True)]
                seen += [piece for piece in pieces if len(piece) > 1]
        orders.append(seen)
    assert sorted(orders[0]) == rendered
    assert orders[1][: len(CHATS)] == orders[0]
    assert sorted(orders[1][len(CHATS) :]) == rendered and orders[1][len(CHATS) :] != orders[0]


def test_a_seed_decides_the_order():
    assert_same(take(chats(seed=1), 3), take(chats(seed=1), 3))
    assert (next(chats(seed=1))["inputs"] != next(chats(seed=2))["inputs"]).any()


def test_conversations_are_rendered_once_for_counting_and_training():
    class Counting:
        bos_token_id = BOS
        calls = 0

        def render_conversation(self, conversation, max_tokens):
            self.calls += 1
            return TOKENIZER.render_conversation(conversation, max_tokens)

    counting = Counting()
    rendered = RenderedConversations(CHATS, counting, 100)
    count_rows(rendered, counting, sequence_len=100, seed=0)
    list(chat_batches(rendered, counting, rows=2, sequence_len=100, seed=3, epochs=2))
    assert counting.calls == len(CHATS)
    with pytest.raises(ValueError, match="another sequence length"):
        chat_batches(rendered, counting, rows=2, sequence_len=50, seed=0)


def test_a_position_is_small():
    many = chat_batches(CHATS * 100, TOKENIZER, rows=4, sequence_len=200, seed=0)
    take(many, 3)
    assert len(json.dumps(many.get_state())) < 3000


def loader_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if "prefetch" in thread.name]


def test_the_thread_stops_when_the_iterator_is_dropped(side):
    gc.collect()
    assert not loader_threads()
    iterator = text_batches(side)
    next(iterator)
    assert len(loader_threads()) == 1
    del iterator
    gc.collect()
    assert not loader_threads()


def test_a_program_may_end_while_a_thread_reads(side):
    program = f"""
import pathlib
from jaxchat.data.loader import pretrain_batches
from jaxchat.data.text.shards import TextFiles
from jaxchat.tokenizer import Tokenizer
tokenizer = Tokenizer.train_from_iterator(["the cat sat on the mat"] * 3, 265)
side = TextFiles(tuple(map(pathlib.Path, {[str(path) for path in side.files]!r})))
iterator = pretrain_batches(side, tokenizer, rows=64, sequence_len=512, seed=0)
print(next(iterator)["inputs"].shape)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "(64, 512)\n", "")


def test_an_error_in_a_file_comes_out_of_next_unchanged(tmp_path):
    lines = ['{"text": "the cat sat on the mat"}\n'] * 9 + ["nonsense\n"]
    (tmp_path / "a.jsonl").write_text("".join(lines))
    iterator = text_batches(TextFiles((tmp_path / "a.jsonl",)))
    for _ in range(2):
        with pytest.raises(UserError) as raised:
            next(iterator)
        assert str(raised.value).startswith(f"{tmp_path}/a.jsonl:10: broken JSON") and "\n" not in str(raised.value)


def test_too_little_text_and_other_data_are_refused(side, tmp_path):
    (tmp_path / "a.txt").write_text("the cat")
    with pytest.raises(UserError, match="a.txt holds only . tokens, fewer than the 17 of one row"):
        next(text_batches(TextFiles((tmp_path / "a.txt",))))
    (tmp_path / "a.txt").write_text("")
    with pytest.raises(UserError, match="a.txt holds no text"):
        next(text_batches(TextFiles((tmp_path / "a.txt",)), repeat=False))
    state = text_batches(side).get_state()
    with pytest.raises(UserError, match="has changed, or .*: it has 3 blocks now, but had 6 when"):
        text_batches(TextFiles(side.files[:1])).set_state(state)
    with pytest.raises(UserError, match="no conversations"):
        chat_batches([], TOKENIZER, rows=1, sequence_len=8, seed=0)
    state = chats().get_state()
    with pytest.raises(UserError, match="have changed: there are 5 now, but were 60 when .* --redo=sft"):
        chat_batches(CHATS[:5], TOKENIZER, rows=1, sequence_len=8, seed=0).set_state(state)
