"""Texts that are difficult for tokenizers."""

import random

from hypothesis import strategies as st

WORDS = (
    "the cat's hat wasn't there; I'll go (again) to 12345 Zürich, naïve café — über 3.14% für £99! "
    "def f(x):\n\treturn x ** 2  # square\n\n"
    "日本語のテキスト 한국어 Ελληνικά русский язык العربية हिन्दी 😀👍🏽 ſ K ½ Ⅷ ٣٤ \u00a0 \u2028"
).split(" ")
# Text that the pattern cuts in unusual places.
HARD = st.text(
    st.sampled_from(" \t\r\n\u00a0\u2028\u3000'sSdlLvere\u017f\u212aaé1٣½.,$_\u0301\u200d中😀<|>"), max_size=60
)
ANY = st.text(max_size=60) | HARD | st.lists(st.sampled_from(WORDS)).map(" ".join)


def corpus(seed: int, words: int) -> list[str]:
    """Documents of words with frequencies as in language: few are frequent, many are rare."""
    rng = random.Random(seed)
    syllables = ["ka", "lo", "mi", "the", "ing", "er", "ß", "qu", "ee", "st", "on", "й", *"abcdefgh12"]
    rare = ["".join(rng.choices(syllables, k=rng.randint(1, 5))) for _ in range(3000)]
    draw = [
        rare[min(int(rng.paretovariate(0.7)), 3000) - 1] if rng.random() < 0.8 else rng.choice(WORDS)
        for _ in range(words)
    ]
    return [" ".join(draw[start : start + 50]) + rng.choice(["", "\n", ".\n\n"]) for start in range(0, words, 50)]
