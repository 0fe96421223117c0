"""CORE by its definition: one prompt after the other, whole, through the NumPy model. The tests compare with it."""

import math
import random

import numpy as np

from jaxchat.model import reference


def decisions(config, params, tokenizer, kind, shots, delimiter, items, limit=None):
    """For each item in the order in which it is asked: (its place in the file, right, scores)."""
    weights = _as_float64(params)
    data = list(enumerate(items))
    random.Random(1337).shuffle(data)
    data = data[:limit]
    found = []
    for index, (place, item) in enumerate(data):
        others = [i for i in range(len(data)) if i != index]
        examples = [data[i][1] for i in random.Random(1234 + index).sample(others, shots)]
        rows, spans = _rows(tokenizer, kind, delimiter, examples, item)
        tables = [_log_probabilities(config, weights, row) for row in rows]
        scores = []
        for table, row, (start, end) in zip(tables, rows, spans, strict=True):
            # What predicts token i stands at i - 1; nothing is predicted from the last token.
            losses = [-table[i][token] for i, token in enumerate(row[1:])] + [math.nan]
            scored = losses[start - 1 : end - 1]
            scores.append(float(np.mean(scored)) if scored else math.nan)
        if kind == "language_modeling":
            start, end = spans[0]
            right = all(np.argmax(tables[0][i - 1]) == rows[0][i] for i in range(start, end))
        else:
            best = 0
            for choice, score in enumerate(scores):  # a NaN that comes first stays, since nothing is less than it
                best = choice if score < scores[best] else best
            right = best == item["gold"]
        found.append((place, right, scores))
    return found


def _rows(tokenizer, kind, delimiter, examples, item):
    def encoded(text):
        return [tokenizer.bos_token_id, *tokenizer.encode(text)]

    if kind == "language_modeling":
        before = (
            "".join(f"{e['context'].strip()}{delimiter}{e['continuation']}\n\n" for e in [*examples])
            + f"{item['context'].strip()}{delimiter}"
        )
        without, row = encoded(before.strip()), encoded(before + item["continuation"])
        assert row[: len(without)] == without and len(row) > len(without)
        return [row], [(len(without), len(row))]
    if kind == "multiple_choice":
        before = "".join(f"{e['query']}{delimiter}{e['choices'][e['gold']]}\n\n" for e in examples)
        rows = [encoded(f"{before}{item['query']}{delimiter}{choice}") for choice in item["choices"]]
        start = _common(rows)
        return rows, [(start, len(row)) for row in rows]
    before = "".join(f"{e['context_options'][e['gold']]}{delimiter}{e['continuation']}\n\n" for e in examples)
    rows = [encoded(f"{before}{option}{delimiter}{item['continuation']}") for option in item["context_options"]]
    length = _common([row[::-1] for row in rows])
    return rows, [(len(row) - length, len(row)) for row in rows]


def _common(rows):
    length = 0
    while all(len(row) > length and row[length] == rows[0][length] for row in rows):
        length += 1
    return length


def _as_float64(tree):
    if isinstance(tree, dict):
        return {name: _as_float64(branch) for name, branch in tree.items()}
    return np.asarray(tree, np.float64)


_memory = {}


def _log_probabilities(config, weights, row):
    """[T, V]; remembered, since several tests ask the same."""
    key = (config, float(weights["head"]["kernel"].sum()), tuple(row))
    if key not in _memory:
        scores = reference.logits(config, weights, np.asarray(row))
        top = scores.max(-1, keepdims=True)
        _memory[key] = scores - top - np.log(np.exp(scores - top).sum(-1, keepdims=True))
    return _memory[key]
