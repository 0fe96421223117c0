"""A GPT of 10 layers and 91 million parameters: a graphics card of 16 to 24 GB, an evening.

    python launch.py --experiment=rtx24gb                # on downloaded text, 2.9 GB with the conversations
    python launch.py --experiment=rtx24gb --data=DIR     # on your text

Hardware: an RTX 3090 or 4090, or any NVIDIA GPU of 16 GB or more from Ampere on (RTX 30 and later). Expected, not
measured: 5.1 hours for pretraining on 0.9 billion tokens on an RTX 3090 at 40 % MFU, 6 hours in all, about 80 cents of
electricity; on an RTX 4090 half of that.
Result, expected as well: a model between d6 and d12, of paragraphs that hold together and answers to simple requests;
much of what it says about the world is wrong.
"""

from jaxchat.recipes import evening

experiment = evening(10, device="NVIDIA GeForce RTX 3090", dollars=0.13, mfu=0.40, shards=20, vocab_size=32_768)
