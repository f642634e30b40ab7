"""Templates: their numbers and slots, filling, and files of the user's own."""

import json

import pytest

from prompt import Template, fill, load_prompts
from tasks import TASKS
from utils import UserError

NUMBERS = {
    "seqrec": 17,
    "item2index": 19,
    "index2item": 17,
    "fusionseqrec": 12,
    "itemsearch": 11,
    "preferenceobtain": 11,
}


def test_numbers_and_order_of_the_templates():
    templates = load_prompts().templates
    assert {task: len(rows) for task, rows in templates.items()} == NUMBERS
    for task in ("seqrec", "itemsearch"):
        assert {row.response for row in templates[task]} == {"{item}"}
    slots = [row.slots - {"item"} for row in templates["item2index"]]
    assert slots == [{"title"}] * 6 + [{"description"}] * 6 + [{"title", "description"}] * 7
    assert [row.response for row in templates["index2item"]] == (
        ["{title}"] * 6 + ["{description}"] * 6 + ["{title}\n\n{description}"] * 5
    )
    assert [(row.slots, row.response) for row in templates["fusionseqrec"]] == (
        [({"inters", "title"}, "{title}")] * 4
        + [({"inters", "description"}, "{description}")] * 4
        + [({"inter_titles", "item"}, "{item}")] * 4
    )
    search = [row.slots - {"item"} for row in templates["itemsearch"]]
    assert search == (
        [
            {"explicit_preference", "inters"},
            {"inters", "user_related_intention"},
            {"inters", "item_related_intention"},
        ]
        + [{"query", "inters", "explicit_preference"}] * 3
        + [{"query"}] * 5
    )
    assert {row.response for row in templates["preferenceobtain"]} == {"{explicit_preference}"}


def test_templates_differ_from_one_another():
    for rows in load_prompts().templates.values():
        assert len({row.instruction for row in rows}) == len(rows)


def test_the_response_follows_the_colon_without_a_blank():
    prompts = load_prompts()
    template = Template("Next of {inters}?", "{item}")
    slots = {"inters": "<a_1><b_2>", "item": "<a_3><b_4>"}
    assert prompts.prompt(template, slots) == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request."
        "\n\n### Instruction:\nNext of <a_1><b_2>?\n\n### Response:"
    )
    assert prompts.response(template, slots) == "<a_3><b_4>"


def test_values_are_not_searched_for_slots_again():
    assert fill("{title} {item}", {"title": "{item} {0.__class__} {response}", "item": "<a_1>"}) == (
        "{item} {0.__class__} {response} <a_1>"
    )
    prompts = load_prompts()
    text = prompts.prompt(Template("{title}", "{item}"), {"title": "{response}{instruction}", "item": "x"})
    assert text.endswith("{response}{instruction}\n\n### Response:")


@pytest.mark.parametrize("suffix", [".json", ".py"])
def test_a_file_of_the_users_own(tmp_path, suffix, capsys):
    content = {
        "sft_prompt": "Q {instruction} A {response}",
        "all_prompt": {"seqrec": [{"instruction": "{inters}?", "response": "{item}"}]},
    }
    path = tmp_path / f"mine{suffix}"
    path.write_text(
        json.dumps(content)
        if suffix == ".json"
        else "".join(f"{name} = {value!r}\n" for name, value in content.items())
    )
    prompts = load_prompts(str(path))
    assert prompts.prompt(prompts.of("seqrec")[0], {"inters": "x", "item": "y"}) == "Q x? A "
    assert (f"running {path}" in capsys.readouterr().out) == (suffix == ".py")
    with pytest.raises(UserError, match="no templates for the task itemsearch"):
        prompts.of("itemsearch")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"sft_prompt": "no slots", "all_prompt": {}}, "sft_prompt must be a text with"),
        ({"sft_prompt": "{response}{instruction}", "all_prompt": {}}, "before"),
        ({"sft_prompt": "{instruction}{response}"}, "all_prompt must map"),
        ({"sft_prompt": "{instruction}{response}", "all_prompt": {"other": []}}, "unknown task 'other'"),
        (
            {"sft_prompt": "{instruction}{response}", "all_prompt": {"seqrec": [{"instruction": "x"}]}},
            r"all_prompt\['seqrec'\]\[0\] must have the texts",
        ),
        (
            {
                "sft_prompt": "{instruction}{response}",
                "all_prompt": {"seqrec": [{"instruction": "{titel}", "response": "{item}"}]},
            },
            r"\{titel\} in the instruction is unknown; seqrec has inters there",
        ),
    ],
)
def test_broken_prompt_files(tmp_path, content, message):
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match=message):
        load_prompts(str(path))


@pytest.mark.parametrize(
    ("task", "instruction", "response", "slot"),
    [
        ("seqrec", "{inters} {item}", "{item}", "item"),
        ("fusionseqrec", "{inters} {title}", "{item}", "title"),
        ("item2index", "{title} {item}", "{item}", "item"),
        ("index2item", "{item} {title}", "{description}", "title"),
        ("preferenceobtain", "{inters} {explicit_preference}", "{explicit_preference}", "explicit_preference"),
    ],
)
def test_an_instruction_that_betrays_the_answer_is_refused(tmp_path, task, instruction, response, slot):
    rows = {task: [{"instruction": instruction, "response": response}]}
    path = tmp_path / "mine.json"
    path.write_text(json.dumps({"sft_prompt": "{instruction}{response}", "all_prompt": rows}))
    with pytest.raises(UserError, match=rf"{{{slot}}} in the instruction would betray the answer"):
        load_prompts(str(path))


def test_every_task_has_slots():
    assert set(TASKS) == set(NUMBERS)
