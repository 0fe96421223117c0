"""A GPT of 12 layers, about the size of GPT-2 small: one GPU.

    python launch.py --experiment=d12                # on downloaded text
    python launch.py --experiment=d12 --data=DIR     # on your text

Hardware: one H100 or H200. Expected, not measured: 1.3 hours of pretraining on 2.7 billion tokens,
at 50 % MFU.
Measured on one H200 (benchmarks/RESULTS.md): 659,000 tokens/s; 1.098 validation bits per byte on 150 MB of
English after --pretrain.num-iterations=400 --pretrain.batch-tokens=131072 --data.packing=concat.
"""

from jaxchat.recipes import on_text

experiment = on_text(12, devices=1, shards=60, mfu=0.50)
