"""GPT-2's CORE in an hour and a half: a modern GPT of 24 layers, 5.8 billion tokens of ClimbMix, eight GPUs.

    python launch.py --experiment=gpt2                # on downloaded text
    python launch.py --experiment=gpt2 --data=DIR     # on your text

The modern recipe (jaxchat/recipes.py) at the size and on the text by which nanochat passes the CORE of GPT-2, 0.2565:
8 tokens for each parameter that counts, steps of 1,048,576 tokens, windows in three of four layers, fp8. ClimbMix is
CC BY-NC 4.0, not for commercial use; --data.download=fineweb-edu:240,smoltalk,core takes other text, which by
nanochat's runs needs 26 layers and a third more time.
Hardware: 8 x H100. Expected, not measured: 1.55 hours for pretraining at 65 % MFU, about $37 at $3 a GPU-hour. One H200
reached 74.5 % with 20 layers in fp8, without what is modern about the model (benchmarks/RESULTS.md); the rest is left
for that, and for eight GPUs instead of one. Bits per byte are expected to be 0.79 to 1.06, by curves through runs with
a four-hundredth of these FLOPs or less, on other text: the dry run has them.
"""

import dataclasses

from jaxchat.recipes import modern, on_text

recipe = on_text(
    24, devices=8, shards=120, mfu=0.65, pretrain_tokens=1_048_576, midtrain_tokens=524_288, text="climbmix"
)
downloads = dataclasses.replace(recipe.data, download=(*recipe.data.download, "core"))
recipe = dataclasses.replace(recipe, precision="fp8", data=downloads)
experiment = modern(recipe, tokens_per_counted_param=8.0, warmup_steps=40)
