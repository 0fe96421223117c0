"""A GPT of 32 layers and 1.9 billion parameters: 38 billion tokens, eight GPUs for more than a day.

    python launch.py --experiment=d32                # on downloaded text
    python launch.py --experiment=d32 --data=DIR     # on your text

Hardware: 8 x H100. Expected, not measured: 32 hours for pretraining at 50 % MFU, about $765 at $3 a GPU-hour.
"""

from jaxchat.recipes import on_text

experiment = on_text(32, devices=8, shards=800, mfu=0.50, vocab_size=65_536, midtrain_tokens=524_288)
