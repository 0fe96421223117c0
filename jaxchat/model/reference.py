"""The GPT in NumPy, with plain loops over heads: the independent reference that the tests compare the model with."""

from __future__ import annotations

import numpy as np

from jaxchat.model.config import GPTConfig


def norm(x):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6)


def rotate(x, base):
    """One head's vectors [T, H], rotated by position: pair i is (x[i], x[i + H/2])."""
    length, size = x.shape
    out = np.empty_like(x)
    for t in range(length):
        for i in range(size // 2):
            angle = t * base ** (-2 * i / size)
            a, b = x[t, i], x[t, i + size // 2]
            out[t, i] = a * np.cos(angle) + b * np.sin(angle)
            out[t, i + size // 2] = b * np.cos(angle) - a * np.sin(angle)
    return out


def unseen(layer, length, config: GPTConfig):
    """[T, T]: whether the token of a row may not attend to that of a column."""
    letters = config.window_pattern * config.depth
    short = letters[layer] == "S" and layer != config.depth - 1
    hidden = np.zeros((length, length), bool)
    for query in range(length):
        for key in range(length):
            future, too_far = key > query, short and query - key > config.sequence_len // 4
            hidden[query, key] = future or too_far
    return hidden


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def smeared(weights, x, documents):
    """Embedded tokens [T, D], each with a share of the one before it in its document."""
    out = np.array(x)
    for t in range(1, len(x)):
        if documents is None or documents[t] == documents[t - 1]:
            out[t] += weights["scale"] * sigmoid(weights["gate"] @ x[t, :24]) * x[t - 1]
    return out


def bigram_rows(weights, tokens, documents):
    """The row of each token [T, D] for it and the one before it in its document."""
    table, rows = weights["embedding"], []
    for t, token in enumerate(tokens):
        alone = t == 0 or (documents is not None and documents[t] != documents[t - 1])
        previous = -1 if alone else int(tokens[t - 1])
        number = (int(token) * 2654435761 + (previous + 1) * 2246822519) % 2**32
        rows.append(table[(number ^ (number >> 15)) % len(table)])
    return np.stack(rows)


def embedded_values(weights, x, layer, tokens, config: GPTConfig):
    """What a layer's value embeddings add to its values [T, K·H], from the layer's normed input."""
    if layer % 2 != (config.depth - 1) % 2:
        return 0.0
    gates = 3 * sigmoid(x[:, :12] @ weights["gate"][layer // 2])
    return np.repeat(gates, config.head_dim, axis=1) * weights["embedding"][layer // 2][tokens]


def attention(weights, x, layer, config: GPTConfig, added=0.0, documents=None):
    size, group = config.head_dim, config.num_heads // config.kv_heads
    q, k, v = (x @ weights[name]["kernel"] for name in "qkv")
    v = v + added
    hidden = unseen(layer, len(x), config)
    if documents is not None:
        hidden |= documents[:, None] != documents[None, :]
    outputs = []
    for head in range(config.num_heads):
        shared = head // group
        mine, theirs = slice(head * size, (head + 1) * size), slice(shared * size, (shared + 1) * size)
        query = norm(rotate(q[:, mine], config.rope_base))
        key = norm(rotate(k[:, theirs], config.rope_base))
        scores = config.attention_scale * query @ key.T / np.sqrt(size)
        scores[hidden] = -np.inf
        probabilities = np.exp(scores - scores.max(-1, keepdims=True))
        probabilities /= probabilities.sum(-1, keepdims=True)
        outputs.append(probabilities @ v[:, theirs])
    return np.concatenate(outputs, -1) @ weights["o"]["kernel"]


def logits(config: GPTConfig, params, tokens, documents=None):
    """Logits [T, V] of one row of tokens, without the padded ids; `documents` has the number of each token's."""
    x = norm(params["embed"]["embedding"][tokens])
    if config.smear:
        x = smeared(params["smear"], x, documents)
    if config.bigrams:
        x = x + bigram_rows(params["bigrams"], tokens, documents)
    start = middle = x
    for layer in range(config.depth):
        block = params["blocks"][str(layer)]
        if config.residual_scales:
            scales = params["residual_scales"]
            x = scales["residual"][layer] * x + scales["input"][layer] * start
        added = 0.0
        if config.value_embeddings:
            added = embedded_values(params["value_embeddings"], norm(x), layer, tokens, config)
        x = x + attention(block["attn"], norm(x), layer, config, added, documents)
        hidden = np.maximum(norm(x) @ block["mlp"]["up"]["kernel"], 0) ** 2
        x = x + hidden @ block["mlp"]["down"]["kernel"]
        if layer == config.depth // 2:
            middle = x
    if config.backout:
        x = x - params["backout"]["scale"] * middle
    scores = norm(x) @ params["head"]["kernel"]
    return (config.logit_cap * np.tanh(scores / config.logit_cap))[:, : config.vocab_size]
