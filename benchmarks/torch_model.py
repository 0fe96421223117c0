"""jaxchat's GPT in PyTorch, from a folder that `jaxchat export --to hf` has written.

The benchmarks hand it to nanochat's evaluators, which ask of a model what nanochat's own GPT gives: logits of tokens,
losses of targets, and a forward pass with their KV cache. nanochat's own class of today is another model. This one
needs nothing but torch and safetensors; `against_transformers.py` compares it with transformers' class.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn


class TorchGPT(nn.Module):
    """Embedding, blocks, untied head; logits in fp32 after the soft cap, over the vocabulary without padding.

    Attributes:
      config: the sizes that nanochat's engine and evaluators read, by its names.
    """

    def __init__(self, folder: Path, device: torch.device, dtype: torch.dtype):
        super().__init__()
        saved = json.loads((folder / "config.json").read_text())
        self.config = SimpleNamespace(
            n_layer=saved["num_hidden_layers"],
            n_head=saved["num_attention_heads"],
            n_kv_head=saved["num_key_value_heads"],
            n_embd=saved["hidden_size"],
            sequence_len=saved["max_position_embeddings"],
            vocab_size=saved["vocab_size"],
        )
        self.eps, self.cap = saved["rms_norm_eps"], saved["final_logit_softcapping"]
        self.theta = saved["rope_parameters"]["rope_theta"]
        weights = {}
        for file in sorted(folder.glob("*.safetensors")):
            weights |= load_file(file)
        self.weights = {name: weight.to(device, dtype) for name, weight in weights.items()}

    def get_device(self) -> torch.device:
        return self.weights["lm_head.weight"].device

    @torch.no_grad()
    def forward(self, idx: Tensor, targets: Tensor | None = None, kv_cache=None, loss_reduction: str = "mean"):
        """Logits [B, T, V] of tokens [B, T], or the cross-entropy of `targets`, of which negative ones are ignored."""
        start = 0 if kv_cache is None else kv_cache.get_pos()
        rope = self._rope(start, idx.shape[1])
        x = self._norm(self.weights["model.embed_tokens.weight"][idx])
        for layer in range(self.config.n_layer):
            x = self._block(layer, x, rope, start, kv_cache)
        if kv_cache is not None:
            kv_cache.advance(idx.shape[1])
        scores = F.linear(self._norm(x), self.weights["lm_head.weight"]).float()
        scores = self.cap * torch.tanh(scores / self.cap)
        if targets is None:
            return scores
        return F.cross_entropy(
            scores.flatten(0, 1), targets.flatten(), ignore_index=-1, reduction=loss_reduction
        )  # one number for each target with "none", as nanochat's

    def _norm(self, x: Tensor) -> Tensor:
        wide = x.float()
        return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)).to(x.dtype)

    def _rope(self, start: int, length: int) -> tuple[Tensor, Tensor]:
        size = self.config.n_embd // self.config.n_head
        device = self.get_device()
        frequencies = self.theta ** -(torch.arange(0, size, 2, device=device, dtype=torch.float64) / size)
        angles = torch.arange(start, start + length, device=device)[:, None] * frequencies
        return angles.cos().float()[:, None], angles.sin().float()[:, None]  # [T, 1, H/2], for [B, T, N, H/2]

    def _rotate(self, x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        (cos, sin), (first, second) = rope, x.float().chunk(2, dim=-1)
        return torch.cat([first * cos + second * sin, second * cos - first * sin], dim=-1).to(x.dtype)

    def _block(self, layer: int, x: Tensor, rope: tuple[Tensor, Tensor], start: int, kv_cache) -> Tensor:
        def product(y: Tensor, name: str) -> Tensor:
            return F.linear(y, self.weights[f"model.layers.{layer}.{name}.weight"])

        normed = self._norm(x)
        heads = {"q": self.config.n_head, "k": self.config.n_kv_head, "v": self.config.n_kv_head}
        q, k, v = (product(normed, f"self_attn.{n}_proj").unflatten(-1, (count, -1)) for n, count in heads.items())
        q, k = (self._norm(self._rotate(y, rope)) for y in (q, k))
        if kv_cache is not None:
            end = start + x.shape[1]
            keys, values = kv_cache.get_layer_cache(layer)  # [B, T, N, H] each
            keys[:, start:end], values[:, start:end] = k, v
            k, v = keys[:, :end], values[:, :end]
        if start and x.shape[1] > 1:
            raise ValueError("after the prompt, tokens come one at a time")
        q, k, v = (y.transpose(1, 2) for y in (q, k, v))
        mixed = F.scaled_dot_product_attention(
            q, k, v, is_causal=x.shape[1] > 1, enable_gqa=self.config.n_kv_head != self.config.n_head
        )
        x = x + product(mixed.transpose(1, 2).flatten(2), "self_attn.o_proj")
        return x + product(F.relu(product(self._norm(x), "mlp.fc1")).square(), "mlp.fc2")
