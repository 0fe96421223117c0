"""A GPT of 6 layers: one small GPU, minutes to an hour.

    python launch.py --experiment=d6                # on downloaded text
    python launch.py --experiment=d6 --data=DIR     # on your text

Hardware: one GPU of 6 GB or more. Expected, not measured: 8 minutes of pretraining on 0.7 billion tokens on an H100, at
30 % MFU.
"""

from jaxchat.recipes import on_text

experiment = on_text(6, devices=1, shards=16, mfu=0.30, pretrain_tokens=262_144)
