"""What transformers' NanoChat makes of an exported model; `against_transformers.py` starts it."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import torch
import transformers


def main() -> None:
    folder, directory = map(Path, sys.argv[1:])
    work = json.loads((directory / "work.json").read_text())
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
        scores = model(torch.tensor([work["tokens"]])).logits[0].float()
    np.save(directory / "logits.npy", scores.numpy())
    messages = [[{"role": "user", "content": question}] for question in work["questions"]]
    chats = [tokenizer.apply_chat_template(some, add_generation_prompt=True, return_dict=False) for some in messages]
    ends = model.generation_config.eos_token_id
    answers = []
    for chat in chats:
        ids = torch.tensor([chat])
        whole = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=work["new"])
        answers.append([id for id in whole[0, len(chat) :].tolist() if id not in ends])
    found = {
        "answers": answers,
        "chats": chats,
        "ids": [tokenizer.encode(text, add_special_tokens=False) for text in work["texts"]],
        "model": type(model).__name__,
        "tokenizer": type(tokenizer).__name__,
        "transformers": transformers.__version__,
        "torch": torch.__version__,
    }
    (directory / "result.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
