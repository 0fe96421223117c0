"""Two models, and what transformers' own NanoChat makes of their exports, kept in golden.npz.

    python -m tests.export.golden

makes that file anew; it needs torch and transformers. The weights are not kept: NumPy promises that `RandomState` gives
the same numbers for good.
"""

import tempfile
from pathlib import Path

import numpy as np

from jaxchat.export.hf import export_hf
from jaxchat.export.names import params_of, weights
from jaxchat.model.config import GPTConfig
from jaxchat.tokenizer import Tokenizer

FILE = Path(__file__).with_name("golden.npz")
LENGTH, NEW = 2048, 32
WHOLE = (0, 1, 2, 127, 1023, 2047)  # the positions of which all logits are kept; of the others, those of `SOME` ids
SOME = (7, 289)
PROMPT = "the quick brown fox"


def tokenizer():
    text = "the quick brown fox jumps over the lazy dog, thirty-four and fifty-eight make ninety-two. " * 3
    return Tokenizer.train_from_iterator([text], 290)


MODELS = {
    "two heads that share keys": GPTConfig(depth=3, num_kv_heads=1, vocab_size=290),
    "other constants": GPTConfig(depth=4, rope_base=5000.0, logit_cap=9.0, vocab_size=290),
}


def parameters(config):
    """Random parameters without zeros, of which every part of the model matters to the logits."""
    random = np.random.RandomState(config.depth)
    table = weights(config, "hf")
    arrays = {name: random.standard_normal(table[name].shape) for name in sorted(table)}
    arrays = {name: array / (1 if "embed" in name else array.shape[1] ** 0.5) for name, array in arrays.items()}
    arrays["lm_head.weight"] *= 3
    params = params_of(config, "hf", arrays.__getitem__)
    # What only pads the vocabulary must not matter.
    params["embed"]["embedding"][config.vocab_size :] = 100
    return params


def row():
    return np.random.RandomState(0).randint(0, 290, LENGTH)


def main():
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    kept = {}
    for name, config in MODELS.items():
        with tempfile.TemporaryDirectory() as folder:
            export_hf(config, parameters(config), tokenizer(), Path(folder) / "out")
            model = AutoModelForCausalLM.from_pretrained(Path(folder) / "out")
            encode = AutoTokenizer.from_pretrained(Path(folder) / "out")
        with torch.no_grad():
            logits = model(torch.from_numpy(row())[None]).logits[0].numpy()
        prompt = encode(PROMPT, return_tensors="pt")
        answer = model.generate(**prompt, do_sample=False, max_new_tokens=NEW)[0].tolist()
        with torch.no_grad():
            two = model(torch.tensor([answer])).logits[0].topk(2).values
        margin = (two[:, 0] - two[:, 1])[prompt["input_ids"].shape[1] - 1 :].min()
        print(f"{name}: largest logit {abs(logits).max():.2f}, smallest margin of a greedy choice {margin:.4f}")
        kept |= {f"{name}/whole": logits[list(WHOLE)], f"{name}/some": logits[:, list(SOME)]}
        kept[f"{name}/greedy"] = np.array(answer)
    np.savez(FILE, **kept)


if __name__ == "__main__":
    main()
