"""The speedrun: a GPT of 20 layers and 561 million parameters, 11.2 billion tokens, eight GPUs for three hours.

    python launch.py --experiment=speedrun                # on downloaded text
    python launch.py --experiment=speedrun --data=DIR     # on your text

The run of nanochat's `speedrun.sh`: vocabulary 65,536, 524,288 tokens a step, 20 tokens a parameter.
Hardware: 8 x H100. Expected, not measured: 3.1 hours for pretraining at 45 % MFU, about $73 at $3 a GPU-hour.
"""

from jaxchat.recipes import on_text

experiment = on_text(20, devices=8, shards=240, mfu=0.45, vocab_size=65_536, midtrain_tokens=524_288)
