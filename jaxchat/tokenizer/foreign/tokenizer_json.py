"""`tokenizer.json`, the format of Hugging Face's `tokenizers`: jaxchat's own files, and those of others.

jaxchat saves its tokenizers in this format, with a few facts and a checksum of its own added.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from jaxchat.config import NUM_BYTES
from jaxchat.tokenizer.base import SPECIAL_TOKENS
from jaxchat.tokenizer.patterns import GPT2_PATTERN, KNOWN, cuts, for_oniguruma, literal, read_differently
from jaxchat.tokenizer.vocabulary import Unsupported, Vocabulary, with_chat_tokens


def _alphabet() -> dict[int, int]:
    """GPT-2's printable character for every byte, as a table for `str.translate`.

    It is the byte itself if that is printable in Latin-1, else the next unused character from U+0100.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = (byte for byte in range(NUM_BYTES) if byte not in printable)
    return {byte: byte for byte in printable} | {byte: 0x100 + i for i, byte in enumerate(others)}


_TO_TEXT = _alphabet()
_TO_BYTE = {character: byte for byte, character in _TO_TEXT.items()}
_CHARACTERS = set(map(chr, _TO_BYTE))


def bytes_of(name: str) -> bytes | None:
    """The bytes that a byte-level vocabulary writes as `name`; None if `name` has other characters."""
    return name.translate(_TO_BYTE).encode("latin-1") if _CHARACTERS.issuperset(name) else None


def parse(text: str | bytes) -> dict[str, Any]:
    """Parses a `tokenizer.json` to a dict with a model and a vocabulary, and verifies its checksum if it has one.

    Raises `ValueError` for anything else.
    """
    data = json.loads(text)
    if not isinstance(data, dict) or not isinstance(data.get("model"), dict) or "vocab" not in data["model"]:
        raise ValueError("it has no model with a vocabulary")
    facts = data["model"].get("jaxchat")
    if facts is not None and facts["sha256"] != _digest(data):
        raise ValueError("it was changed after it was written")
    return data


def with_checksum(data: dict[str, Any], **facts: Any) -> str:
    """The text of a `tokenizer.json` with `facts` and a checksum, where other readers of the format ignore them."""
    data = {**data, "model": {**data["model"], "jaxchat": facts}}
    facts["sha256"] = _digest(data)
    return json.dumps(data, ensure_ascii=False, indent=1) + "\n"


def _digest(data: dict[str, Any]) -> str:
    facts = {name: value for name, value in data["model"]["jaxchat"].items() if name != "sha256"}
    content = {**data, "model": {**data["model"], "jaxchat": facts}}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def to_json(vocabulary: Vocabulary) -> str:
    """Writes a vocabulary as a `tokenizer.json`, with which Hugging Face's `tokenizers` gives the same ids.

    `from_json` builds the same vocabulary from it.
    """
    data = _to_dict(vocabulary)
    merges = "any" if vocabulary.merges is None else "listed"
    return with_checksum(data, pattern=vocabulary.pattern, keep_gaps=vocabulary.keep_gaps, merges=merges)


def from_json(data: dict[str, Any]) -> Vocabulary:
    """Reads the vocabulary of a parsed `tokenizer.json`.

    Raises `Unsupported` if the Rust encoder cannot reproduce it, and `ValueError`, `KeyError`, `TypeError` or
    `AttributeError` if it is damaged.
    """
    facts = data["model"].get("jaxchat", {})
    if "pattern" not in facts:
        return _from_first_format(data) if _is_first_format(data) else _from_foreign(data)
    special = {token["content"]: token["id"] for token in data["added_tokens"]}
    names = sorted(data["model"]["vocab"], key=data["model"]["vocab"].__getitem__)
    tokens = [_token(name, special) for name in names]
    merges = None if facts["merges"] == "any" else _merges(data["model"])
    whole_pieces = data["model"]["ignore_merges"]
    return Vocabulary(tokens, special, facts["pattern"], merges, whole_pieces, facts["keep_gaps"])


def _token(name: str, special: Mapping[str, int]) -> bytes:
    token = name.encode() if name in special else bytes_of(name)
    if token is None:
        raise Unsupported(f"its vocabulary is not byte-level: {name!r}")
    return token


def _is_first_format(data: dict[str, Any]) -> bool:
    """Whether jaxchat wrote the file, before it wrote checksums. Hugging Face always writes `dropout` too."""
    ours = any(token["content"] in SPECIAL_TOKENS for token in data.get("added_tokens") or [])
    return ours and data["model"].keys() == {"type", "ignore_merges", "vocab", "merges"}


def _from_first_format(data: dict[str, Any]) -> Vocabulary:
    try:
        foreign = _from_foreign(data)
    except Unsupported as error:
        raise ValueError(str(error)) from None
    vocabulary = Vocabulary(foreign.tokens, foreign.special, foreign.pattern)
    ranks = list(data["model"]["vocab"].values())
    if data != _to_dict(vocabulary) or ranks != list(range(len(ranks))):
        raise ValueError("its parts contradict each other")
    return vocabulary


def _to_dict(vocabulary: Vocabulary) -> dict[str, Any]:
    inner = {id: name for name, id in vocabulary.special.items() if id < len(vocabulary.tokens)}
    names = [
        inner[id] if id in inner else token.decode("latin-1").translate(_TO_TEXT)
        for id, token in enumerate(vocabulary.tokens)
    ]
    vocab = {name: id for id, name in enumerate(names)}
    if vocabulary.merges is None:
        # As in tiktoken, any two tokens that make a third may be merged, not only the pair that training merged. Of the
        # places in a token of a million bytes, only those are tried where the length of another token ends.
        lengths = sorted(set(map(len, vocab)))
        merges = [
            [name[:middle], name[middle:]]
            for name, id in vocab.items()
            if id not in inner
            for middle in (range(1, len(name)) if len(name) <= len(lengths) else lengths)
            if name[:middle] in vocab and name[middle:] in vocab
        ]
    else:
        merges = [[names[left], names[right]] for left, right in vocabulary.merges]
    special = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    # "Isolated" keeps what the pattern does not match; removing what the inverse matches drops it.
    isolated = vocabulary.keep_gaps or vocabulary.pattern in KNOWN
    split = {
        "type": "Split",
        "pattern": {"Regex": for_oniguruma(vocabulary.pattern)},
        "behavior": "Isolated" if isolated else "Removed",
        "invert": not isolated,
    }
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": id, "content": name, **special} for name, id in vocabulary.special.items()],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
        "post_processor": None,
        "decoder": byte_level,
        "model": {"type": "BPE", "ignore_merges": vocabulary.whole_pieces, "vocab": vocab, "merges": merges},
    }


def _from_foreign(data: dict[str, Any]) -> Vocabulary:
    model = data["model"]
    _supported(model.get("type", "BPE") == "BPE" and "merges" in model, f"its model is {model.get('type')}, not BPE")
    # How BPE treats unknown characters (unk_token, byte_fallback) does not matter: among bytes there are none.
    for name in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        _supported(not model.get(name), f"its model sets {name}")
    _supported(data.get("normalizer") is None, f"it normalizes text ({_type(data.get('normalizer'))})")
    _supported(_type(data.get("decoder")) in (None, "ByteLevel"), f"its decoder is {_type(data.get('decoder'))}")
    pattern, keep_gaps = _split_of(data.get("pre_tokenizer"))

    added = data.get("added_tokens") or []
    plain = next((token["content"] for token in added if not token["special"]), None)
    _supported(plain is None, f"its added token {plain!r} is not special but stands for text")
    special = {token["content"]: token["id"] for token in added}
    names = sorted(model["vocab"], key=model["vocab"].__getitem__)
    for expected, name in enumerate(names):
        found = model["vocab"][name]
        _supported(found == expected, f"its ids have a gap or are used twice ({found} at {expected})")
    while names and names[-1] in special:  # special tokens that the vocabulary also lists
        names.pop()
    outer = {name: id for name, id in special.items() if model["vocab"].get(name, id) != id or id >= len(names)}
    following = list(range(len(names), len(names) + len(outer)))
    _supported(list(outer.values()) == following, "its added tokens do not follow the vocabulary")

    whole_pieces = bool(model.get("ignore_merges"))
    merges = _merges(model, len(names))
    inner = [name for name in names if name in special]
    made = {names[left] + names[right] for left, right in merges}
    for name in inner:
        safe = name not in made and (not whole_pieces or cuts(name, pattern))
        _supported(safe, f"plain text may become its special token {name!r}")
    tokens = [_token(name, special) for name in names]
    missing = sorted({bytes([byte]) for byte in range(NUM_BYTES)} - {*tokens})
    _supported(not missing, f"its vocabulary has no token for {len(missing)} of the 256 bytes")
    special = with_chat_tokens(special, len(tokens))
    return Vocabulary(tokens, special, pattern, merges, whole_pieces, keep_gaps)


def _supported(condition: bool, why: str) -> None:
    if not condition:
        raise Unsupported(why)


def _type(part: Mapping[str, Any] | None) -> str | None:
    return None if part is None else part["type"]


def _split_of(part: dict[str, Any] | None) -> tuple[str, bool]:
    """The split pattern of a pre-tokenizer, and whether it keeps text that the pattern does not match."""
    if part is None:
        raise Unsupported("it does not split text into bytes")
    parts = part["pretokenizers"] if part["type"] == "Sequence" else [part]
    types = [part["type"] for part in parts]
    _supported(types in (["ByteLevel"], ["Split", "ByteLevel"]), f"it splits text by {', '.join(types)}")
    split, byte_level = parts[0], parts[-1]
    _supported(not byte_level.get("add_prefix_space", True), "it adds a space before every text")
    _supported(byte_level.get("use_regex", True) == (len(parts) == 1), "it splits text twice or not at all")
    if len(parts) == 1:
        return GPT2_PATTERN, False
    rule, inverted = split["behavior"], bool(split.get("invert"))
    _supported(rule == "Isolated" or (rule == "Removed" and inverted), f"its split pattern's matches are {rule}")
    ((kind, pattern),) = split["pattern"].items()
    if kind == "String":
        _supported(pattern != "", "its split pattern is empty")
        pattern = literal(pattern)
    strange = read_differently(pattern)
    _supported(strange is None, f"its split pattern has {strange!r}, which Hugging Face's engine reads differently")
    return pattern, rule == "Isolated" and pattern not in KNOWN


def _merges(model: dict[str, Any], size: int | None = None) -> list[tuple[int, int]]:
    """The pairs of ids in the order of their ranks. Ids from `size` on are special tokens."""
    vocab, pairs = model["vocab"], {}
    for merge in model["merges"]:
        if isinstance(merge, str) and merge.startswith("#version"):  # the first line of older merges files
            continue
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        for name in (left, right, left + right):
            if name not in vocab:
                raise ValueError(f"its merge of {left!r} and {right!r} needs {name!r}, which is not a token")
        _supported(size is None or vocab[left + right] < size, f"a merge makes the special token {left + right!r}")
        pair = vocab[left], vocab[right]
        pairs.pop(pair, None)  # a pair that is listed twice has the later rank
        pairs[pair] = None
    return list(pairs)
