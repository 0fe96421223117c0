"""A GPT of 8 layers and 42 million parameters: a graphics card of 6 to 12 GB, an evening.

    python launch.py --experiment=rtx8gb                # on downloaded text, 1.9 GB with the conversations
    python launch.py --experiment=rtx8gb --data=DIR     # on your text

Hardware: an RTX 3060 or 4060, or any NVIDIA GPU of 6 GB or more from Ampere on (RTX 30 and later). Expected, not
measured: 3.3 hours for pretraining on 0.4 billion tokens on an RTX 4060 at 35 % MFU, 4.5 hours in all, about 25 cents
of electricity.
Result, expected as well: English sentences, and answers to simple questions; much of what it says about the world is
wrong.
"""

from jaxchat.recipes import evening

experiment = evening(8, device="NVIDIA GeForce RTX 4060", dollars=0.05, mfu=0.35, shards=9, vocab_size=16_384)
