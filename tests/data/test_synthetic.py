"""The synthetic corpus has right answers and consistent facts, and no test question in what is trained on."""

import collections
import hashlib
import itertools
import json
import re

import pytest

from jaxchat.data.synthetic import write_synthetic
from jaxchat.data.synthetic.world import ATTRIBUTES, QUESTIONS, STATEMENTS, VALUES, build_world
from jaxchat.data.text.folder import find_text
from jaxchat.data.text.shards import iterate_texts
from jaxchat.errors import UserError
from jaxchat.tokenizer import Tokenizer
from jaxchat.tools.calculator import calculate

SEED = 7
SPLITS = list(itertools.product(("sums", "letters", "long_sums", "facts"), ("train", "test")))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    directory = tmp_path_factory.mktemp("corpus")
    write_synthetic(directory, seed=SEED, documents=1500, conversations=1500)
    return directory


@pytest.fixture(scope="module")
def texts(corpus):
    split = find_text(corpus)
    return [*iterate_texts(split.train), *iterate_texts(split.val)]


@pytest.fixture(scope="module")
def chats(corpus):
    return read(corpus / "chat" / "train.jsonl") + read(corpus / "chat" / "val.jsonl")


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def plain(content):
    return content if isinstance(content, str) else "".join(part["text"] for part in content if part["type"] == "text")


def said(conversation, role):
    return [plain(message["content"]) for message in conversation["messages"] if message["role"] == role]


def tool_calls(conversations):
    for conversation in conversations:
        for message in conversation["messages"]:
            if not isinstance(message["content"], str):
                yield [part["text"] for part in message["content"]]


def digest(directory):
    return {
        str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in directory.rglob("*")
        if path.is_file()
    }


def test_the_seed_decides_everything(tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        write_synthetic(tmp_path / name, seed=seed, documents=200, conversations=200)
    first, again, other = (digest(tmp_path / name) for name in "abc")
    assert first == again
    assert all(first[path] != other[path] for path in first)


def test_layout_and_sizes(corpus, texts, chats):
    split = find_text(corpus)
    assert [path.name for path in split.train.files] == [f"shard_0000{i}.parquet" for i in range(3)]
    assert [path.name for path in split.val.files] == ["shard_00003.parquet"]
    assert len(texts) == 1500 + 30 and len(chats) == 1500 + 30
    assert all(texts)
    assert {f"{path.parent.name}/{path.name}" for path in (corpus / "eval").rglob("*.jsonl")} == {
        f"{name}/{split}.jsonl" for name, split in SPLITS
    }
    for name, split in SPLITS:
        items = read(corpus / "eval" / name / f"{split}.jsonl")
        assert len(items) >= 100
        assert len({item["messages"][0]["content"] for item in items}) == len(items)
        assert all(item["source"] == name for item in items)


def test_too_small_a_corpus_is_refused(tmp_path):
    with pytest.raises(UserError, match="synthetic-documents"):
        write_synthetic(tmp_path, seed=0, documents=10)
    with pytest.raises(UserError, match="synthetic-conversations"):
        write_synthetic(tmp_path, seed=0, conversations=10)


def test_roles_alternate_after_an_optional_system_message(chats):
    for conversation in chats:
        roles = [message["role"] for message in conversation["messages"]]
        roles = roles[1:] if roles[0] == "system" else roles
        assert roles == ["user", "assistant"] * (len(roles) // 2) and roles
    assert any(conversation["messages"][0]["role"] == "system" for conversation in chats)
    assert any(len(conversation["messages"]) >= 6 for conversation in chats)


def test_every_tool_call_is_right_and_in_the_answer(corpus, chats):
    items = [item for name, split in SPLITS[:6] for item in read(corpus / "eval" / name / f"{split}.jsonl")]
    calls = list(tool_calls(chats + items))
    assert len(calls) > 2000
    for expression, output, text in calls:
        assert calculate(expression) == output
        assert re.search(rf"(?<!\d){output}(?!\d)", text)


@pytest.mark.parametrize("name", ["sums", "long_sums"])
@pytest.mark.parametrize("split", ["train", "test"])
def test_sums_add_up(corpus, split, name):
    words = {"plus": "+", "minus": "-", "times": "*"}
    verbs = {"Add": "+", "sum": "+", "Take": "-", "Subtract": "-", "Multiply": "*"}
    for item in read(corpus / "eval" / name / f"{split}.jsonl"):
        question = item["messages"][0]["content"]
        for word, sign in words.items():
            question = question.replace(word, sign)
        verb = next((verb for verb in verbs if verb in question), None)
        numbers = [int(number) for number in re.findall(r"\d+", question)]
        if verb is None:
            signs = ["+", *re.findall(r"[-+*]", question)]
        else:
            signs = ["+", verbs[verb]]
            numbers = numbers[::-1] if verb in ("Take", "Subtract") else numbers
        value = 0
        for sign, number in zip(signs, numbers, strict=True):
            value = {"+": value + number, "-": value - number, "*": value * number}[sign]
        assert item["answer"] == str(value), question
        assert value >= 0
        assert name == "sums" or (len(numbers) == 2 and all(1000 <= number <= 9999 for number in numbers))


@pytest.mark.parametrize("split", ["train", "test"])
def test_letters_are_counted(corpus, split):
    counts = collections.Counter()
    for item in read(corpus / "eval" / "letters" / f"{split}.jsonl"):
        letter, word = letter_and_word(item["messages"][0]["content"])
        assert item["answer"] == str(sum(1 for character in word if character == letter))
        counts[item["answer"]] += 1
    # No constant answer is right more often than one time in four.
    assert set(counts) == {*"0123"} and max(counts.values()) <= sum(counts.values()) / 4 + 1


def letter_and_word(question):
    if quoted := re.findall(r'"(\w+)"', question):
        letter, word = quoted
    else:
        letter, word = re.search(r"(?:How many|letter) (\w) .*?(\w+)[.?]$", question).groups()
    return letter, word


@pytest.mark.parametrize("split", ["train", "test"])
def test_facts_agree_with_the_world(corpus, split):
    world = build_world(SEED)
    items = read(corpus / "eval" / "facts" / f"{split}.jsonl")
    asked = set()
    for item in items:
        question, answer = (message["content"] for message in item["messages"])
        (name,) = (name for name in world.people if re.search(rf"\b{name}\b", question))
        (attribute,) = (a for a in ATTRIBUTES if question in {form.format(n=name) for form in QUESTIONS[a]})
        asked.add((name, attribute))
        assert item["answer"] == world.people[name].facts[attribute]
        assert set(re.findall(r"\w+", answer)) & {*VALUES[attribute]} - {name} == {item["answer"]}
        assert {item["answer"], *item["others"]} | {name} == {*VALUES[attribute]} | {name}
        assert item["answer"] not in item["others"] and name not in item["others"]
    assert (asked <= world.held_out) == (split == "test")
    assert asked.isdisjoint(world.held_out) == (split == "train")


def test_a_quarter_of_the_facts_is_held_out():
    for seed in range(5):
        world = build_world(seed)
        assert len(world.held_out) == 36
        assert collections.Counter(attribute for _, attribute in world.held_out) == dict.fromkeys(ATTRIBUTES, 6)
        assert max(collections.Counter(name for name, _ in world.held_out).values()) <= 2
        for attribute in set(ATTRIBUTES) - {"friend"}:
            shown = {p.facts[attribute] for name, p in world.people.items() if world.is_open(name, attribute)}
            assert shown == {*VALUES[attribute]}
        for name, person in world.people.items():
            friend = person.facts["friend"]
            assert world.people[friend].facts["friend"] == name != friend
            assert world.is_open(name, "friend") == world.is_open(friend, "friend")


def test_the_text_never_contradicts_itself(texts):
    told = collections.defaultdict(set)
    patterns = {
        "home": r"(?:^|[.\n] )(\w+) lives in (\w+)\.|(\w+)'s house stands in (\w+)\.",
        "job": r"(\w+), the (\w+) of \w+\.|(\w+) works as a (\w+)\.",
        "pet": r"(\w+) has a (\w+)\.|The (?P<value>\w+) of (?P<name>\w+) was gone",
        "friend": r"(\w+)'s best friend is (\w+)\.|(\w+) and (\w+) are best friends\.",
    }
    for attribute, pattern in patterns.items():
        for match in re.finditer(pattern, "\n".join(texts)):
            if match.groupdict().get("name"):
                name, value = match["name"], match["value"]
            else:
                name, value = [group for group in match.groups() if group]
            if name not in ("He", "She"):
                told[name, attribute].add(value)
    assert len(told) == 24 * len(patterns)
    assert all(len(values) == 1 for values in told.values()), told


def test_every_fact_is_stated_in_many_ways(texts):
    world = build_world(SEED)
    text = "\n".join(texts)
    for attribute in ATTRIBUTES:
        for name, person in world.people.items():
            fields = {"S": name, "s": name, "P": f"{name}'s", "p": f"{name}'s", "o": name}
            forms = [form.format(v=person.facts[attribute], **fields) for form in STATEMENTS[attribute]]
            assert sum(form in text for form in forms) >= 4, (name, attribute)


def test_no_test_question_is_trained_on(corpus, texts, chats):
    trained = {question for conversation in chats for question in said(conversation, "user")}
    whole = "\n".join(texts) + "\n" + "\n".join(trained)
    for name, split in SPLITS:
        if split == "train" and name != "facts":
            continue
        for item in read(corpus / "eval" / name / f"{split}.jsonl"):
            question = item["messages"][0]["content"]
            if question[0].isdigit():  # "3 + 4" alone is also the end of "23 + 4"
                assert not re.search(rf"(?<![\d+*-] )(?<!\d){re.escape(question)}(?! ?[\d+*-])", whole), question
            else:
                assert question not in whole


def test_no_held_out_fact_is_asked_or_answered(texts, chats):
    world = build_world(SEED)
    questions = {form.format(n=name) for name, attribute in world.held_out for form in QUESTIONS[attribute]}
    for text in [*texts, *(question for conversation in chats for question in said(conversation, "user"))]:
        assert not any(line.removeprefix("Question: ") in questions for line in text.splitlines())
    for conversation in chats:
        for answer in said(conversation, "assistant"):
            words = set(re.findall(r"\w+", answer))
            if len(named := words & world.people.keys()) == 1:
                (name,) = named
                held_out = {world.people[name].facts[a] for n, a in world.held_out if n == name}
                assert not words & held_out, answer


def test_no_story_of_a_chat_tells_a_held_out_fact(chats):
    world = build_world(SEED)
    tells = {
        "home": "{n} from {v}|{n} left {v}|house in {v}|home to {v}",
        "pet": "{v} of {n}",
        "job": "{n} the {v}|{n} is a {v}|{n}, the {v}",
        "friend": "{n} and {v} are best|{v} is the best friend of {n}",
        "food": "{n} loves {v}|bowl of {v}",
    }
    stories = [c["messages"][-1]["content"] for c in chats if c["source"] == "stories"]
    assert len(stories) > 50
    found = 0
    for name, person in world.people.items():
        for attribute, patterns in tells.items():
            for pattern in patterns.split("|"):
                if "{n}" not in pattern:
                    continue
                sentence = pattern.format(n=name, v=person.facts[attribute])
                count = sum(sentence in story for story in stories)
                assert count == 0 or world.is_open(name, attribute), sentence
                found += count
    assert found > 50


def test_sums_and_words_of_the_test_are_new_in_any_form(corpus, texts, chats):
    def two_number_sums(expressions):
        parts = [expression.split() for expression in expressions]
        return {(b, *(a if b == "-" else sorted(a))) for (a, b) in (((p[0], p[2]), p[1]) for p in parts if len(p) == 3)}

    calls = [expression for expression, _, _ in tool_calls(chats)]
    seen = two_number_sums(re.findall(r"\d+(?: [-+*] \d+)+", "\n".join(texts + calls)))
    tested = two_number_sums(
        call
        for call, _, _ in tool_calls(
            [item for name in ("sums", "long_sums") for item in read(corpus / "eval" / name / "test.jsonl")]
        )
    )
    assert len(seen) > 500 and len(tested) > 100
    assert not seen & tested

    quoted = set(re.findall(r'"(\w+)"', "\n".join(texts + calls)))
    words = {letter_and_word(i["messages"][0]["content"])[1] for i in read(corpus / "eval" / "letters" / "test.jsonl")}
    assert len(words) > 50 and len(quoted) > 500
    assert not words & quoted


def test_words_and_numbers_can_be_copied_piece_by_piece(corpus, texts):
    """The question has the pieces of the expression's word or sum: a tiny model can learn to copy."""
    tokenizer = Tokenizer.train_from_iterator(texts, 800)
    copied = 0
    for name in ("sums", "letters"):
        for item in read(corpus / "eval" / name / "test.jsonl"):
            question, expression = item["messages"][0]["content"], item["messages"][1]["content"][0]["text"]
            wanted = expression if name == "sums" else expression.split(".")[0].strip('"')
            if wanted in question and (name == "sums" or f'"{wanted}"' in question):
                pieces = tokenizer.encode(expression if name == "sums" else f'"{wanted}')[name == "letters" :]
                assert tokenizer.decode(pieces) == wanted
                ids = tokenizer.encode(question)
                assert any(ids[i : i + len(pieces)] == pieces for i in range(len(ids))), question
                copied += 1
    assert copied > 300
