"""transformers' NanoChat in NumPy: what its class computes from the files of an exported model, in float64."""

import json

import numpy as np
from safetensors.numpy import load_file


def nanochat_logits(folder, tokens):
    """Logits [T, V] of one row of tokens."""
    config = json.loads((folder / "config.json").read_text())
    weight = {name: array.astype(np.float64) for name, array in load_file(folder / "model.safetensors").items()}
    length, heads, shared = len(tokens), config["num_attention_heads"], config["num_key_value_heads"]
    size = config["hidden_size"] // heads
    frequencies = config["rope_parameters"]["rope_theta"] ** (-np.arange(0, size, 2) / size)
    angles = np.outer(np.arange(length), frequencies)[:, None]
    cos, sin = np.cos(angles), np.sin(angles)

    def norm(x):
        return x / np.sqrt(np.mean(x**2, -1, keepdims=True) + config["rms_norm_eps"])

    def rotated(x):  # the second half with plus into the first: the mirror of Llama's rotation
        a, b = np.split(x, 2, -1)
        return norm(np.concatenate([a * cos + b * sin, b * cos - a * sin], -1))

    def linear(x, name):
        return x @ weight[f"{name}.weight"].T

    def attention(x, name):
        q = rotated(linear(x, f"{name}.q_proj").reshape(length, heads, size))
        k = rotated(linear(x, f"{name}.k_proj").reshape(length, shared, size)).repeat(heads // shared, 1)
        v = linear(x, f"{name}.v_proj").reshape(length, shared, size).repeat(heads // shared, 1)
        scores = q.transpose(1, 0, 2) @ k.transpose(1, 2, 0) / np.sqrt(size)
        scores[:, np.triu(np.ones((length, length), bool), 1)] = -np.inf
        shares = np.exp(scores - scores.max(-1, keepdims=True))
        mixed = shares @ v.transpose(1, 0, 2) / shares.sum(-1, keepdims=True)
        return linear(mixed.transpose(1, 0, 2).reshape(length, -1), f"{name}.o_proj")

    x = norm(weight["model.embed_tokens.weight"][tokens])
    for layer in range(config["num_hidden_layers"]):
        block = f"model.layers.{layer}"
        x = x + attention(norm(x), f"{block}.self_attn")
        x = x + linear(np.maximum(linear(norm(x), f"{block}.mlp.fc1"), 0) ** 2, f"{block}.mlp.fc2")
    cap = config["final_logit_softcapping"]
    return cap * np.tanh(linear(norm(x), "lm_head") / cap)
