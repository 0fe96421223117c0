import pytest

from jaxchat.errors import UserError
from jaxchat.eval.core import BASELINES, find_bundle, load_bundle
from tests.eval.core.conftest import LANGUAGE_MODELING, MULTIPLE_CHOICE, SCHEMA, entry, write_bundle

CHOICE = MULTIPLE_CHOICE[0]


def test_tasks_come_in_the_order_of_the_list(tmp_path):
    listed = [
        (entry("winograd", "schema", 0), SCHEMA),
        (entry("mine", "multiple_choice", 3, continuation_delimiter="\nAnswer: "), MULTIPLE_CHOICE),
        (entry("jeopardy", "language_modeling", 10), [LANGUAGE_MODELING[0], "", LANGUAGE_MODELING[1]]),
    ]
    bundle = load_bundle(write_bundle(tmp_path, listed))
    assert [(t.label, t.kind, t.shots, t.delimiter) for t in bundle.tasks] == [
        ("winograd", "schema", 0, " "),
        ("mine", "multiple_choice", 3, "\nAnswer: "),
        ("jeopardy", "language_modeling", 10, " "),
    ]
    assert list(bundle.tasks[0].items) == SCHEMA and bundle.tasks[2].lines == (1, 3)
    assert [task.baselines for task in bundle.tasks] == [
        {"core_v1": 0.5, "core_v2": 0.5},
        {},
        {"core_v1": 0.0, "core_v2": 0.0},
    ]


def test_a_partial_bundle_says_what_is_missing(tmp_path):
    listed = [(entry("copa", "multiple_choice", 0), [CHOICE]), (entry("squad", "language_modeling", 10), [])]
    folder = write_bundle(tmp_path, listed)
    (folder / "eval_data" / "made" / "squad.jsonl").unlink()
    bundle = load_bundle(folder)
    assert [task.label for task in bundle.tasks] == ["copa"]
    assert set(bundle.missing) == set(BASELINES) - {"copa"} and len(BASELINES) == 22
    assert bundle.missing["squad"] == f"{folder}/eval_data/made/squad.jsonl is missing"
    assert bundle.missing["coqa"] == f"{folder}/core.yaml does not list it"
    assert set(bundle.only(["copa"]).missing) == set(bundle.missing)


def refusal(folder):
    with pytest.raises(UserError) as caught:
        load_bundle(folder)
    message = str(caught.value)
    assert "\n" not in message
    return message.replace(str(folder), "BUNDLE")


@pytest.mark.parametrize(
    ("kind", "item", "message"),
    [
        ("multiple_choice", {**CHOICE, "gold": 4}, "'gold' is 4, and the 4 choices have the indices 0 to 3"),
        ("multiple_choice", {**CHOICE, "gold": -1}, "'gold' is -1, and the 4 choices have the indices 0 to 3"),
        ("multiple_choice", {**CHOICE, "gold": "A"}, "'gold' is not the index of a choice"),
        ("multiple_choice", {**CHOICE, "gold": True}, "'gold' is not the index of a choice"),
        ("multiple_choice", {"query": "?", "choices": ["a"]}, "'gold' is missing"),
        ("multiple_choice", {**CHOICE, "choices": []}, "'choices' is empty"),
        ("multiple_choice", {**CHOICE, "choices": ["a", 2]}, "'choices' is not a list of texts"),
        ("multiple_choice", {"choices": ["a"], "gold": 0}, "'query' is missing"),
        ("schema", CHOICE, "'continuation' is missing"),
        ("schema", {**SCHEMA[0], "context_options": []}, "'context_options' is empty"),
        ("schema", {"continuation": "a", "gold": 0}, "'context_options' is missing"),
        ("language_modeling", {"context": "a", "continuation": ""},
         "'continuation' is empty: there is nothing to predict"),
        ("language_modeling", {"context": None, "continuation": "a"}, "'context' is not text"),
    ],
)  # fmt: skip
def test_an_item_that_cannot_be_asked_is_refused_with_its_line(tmp_path, kind, item, message):
    good = {"multiple_choice": CHOICE, "schema": SCHEMA[0], "language_modeling": LANGUAGE_MODELING[0]}[kind]
    folder = write_bundle(tmp_path, [(entry("copa", kind, 0), [good, "", item])])
    assert refusal(folder) == f"BUNDLE/eval_data/made/copa.jsonl:3: {message}; correct or remove it"


def test_a_broken_line_is_refused(tmp_path):
    folder = write_bundle(tmp_path, [(entry("copa", "multiple_choice", 0), [CHOICE, '{"query": '])])
    assert refusal(folder).startswith("BUNDLE/eval_data/made/copa.jsonl:2: ")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "does not exist; give the folder of a CORE bundle (jaxchat data get core)"),
        ("icl_tasks: [", "is not YAML (while parsing a flow node); download it again: jaxchat data get core"),
        ("tasks: []", "has no list 'icl_tasks'; download it again: jaxchat data get core"),
        ("icl_tasks: [{label: ../a, dataset_uri: a, icl_task_type: schema, num_fewshot: [0]}]",
         ": ../a is no label; it must be letters, digits, _, - and ."),
        ("icl_tasks: [{label: copa, icl_task_type: schema, num_fewshot: [0]}]",
         ": copa: 'dataset_uri' must be text; download it again: jaxchat data get core"),
        ("icl_tasks: [{label: copa, dataset_uri: a, icl_task_type: schema, num_fewshot: [ten]}]",
         ": copa: 'num_fewshot' must be a list of whole numbers, such as [10]; download it again: jaxchat data get "
         "core"),
        ("icl_tasks: [{label: copa, dataset_uri: a, icl_task_type: generation, num_fewshot: [0]}]",
         ": copa: tasks of the type 'generation' cannot be asked; known: multiple_choice, schema, language_modeling"),
    ],
)  # fmt: skip
def test_a_damaged_list_is_refused(tmp_path, text, message):
    if text is not None:
        (tmp_path / "core.yaml").write_text(text)
    assert refusal(tmp_path).removeprefix("BUNDLE/core.yaml").strip() == message.strip()


def test_a_bundle_without_any_file_is_refused(tmp_path):
    folder = write_bundle(tmp_path, [(entry("copa", "multiple_choice", 0), [CHOICE])])
    (folder / "eval_data" / "made" / "copa.jsonl").write_text("\n")
    assert refusal(folder) == "BUNDLE/eval_data/made/copa.jsonl has no items; download it again: jaxchat data get core"
    (folder / "eval_data" / "made" / "copa.jsonl").unlink()
    assert refusal(folder).startswith("BUNDLE has none of the files that its core.yaml lists")


@pytest.mark.parametrize("place", ["eval/eval_bundle", "eval_bundle", "."])
def test_the_bundle_of_a_data_folder_is_found(tmp_path, place):
    assert find_bundle(tmp_path) is None
    (tmp_path / place).mkdir(parents=True, exist_ok=True)
    write_bundle(tmp_path / place, [(entry("copa", "multiple_choice", 0), [CHOICE])])
    assert [task.label for task in load_bundle(find_bundle(tmp_path)).tasks] == ["copa"]
