"""A GPT of 12 layers by the modern recipe: one GPU, for comparison with d12.

    python launch.py --experiment=d12_modern                # on downloaded text
    python launch.py --experiment=d12_modern --data=DIR     # on your text

What differs from d12 is in `modern` of jaxchat/recipes.py; here are 12 tokens for each parameter that counts, half of
d12's.
Hardware: one H100 or H200. Expected, not measured: 0.59 hours of pretraining on 1.3 billion tokens, at 50 % MFU.
"""

from jaxchat.recipes import modern, on_text

experiment = modern(on_text(12, devices=1, shards=30, mfu=0.50))
