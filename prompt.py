"""The prompt frame and the templates of the six tasks (LC-Rec, section III-C), and loading a user's own from a file.

A template is an instruction and a response with slots in braces. `tasks.TASKS` says which slots a task can fill. Slots
are replaced by plain text search, never by `str.format`: nothing in a data file is looked up as an attribute.
"""

from __future__ import annotations

import re
import runpy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tasks import TASKS
from utils import UserError, first_line, read_json, regular_file, say

SLOT = re.compile(r"\{(\w+)\}")

# The Alpaca instruction format (Taori et al., 2023); the response follows the colon without a blank.
sft_prompt = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request."
    "\n\n### Instruction:\n{instruction}\n\n### Response:{response}"
)


def _rows(response: str, *instructions: str) -> list[dict[str, str]]:
    return [{"instruction": instruction, "response": response} for instruction in instructions]


all_prompt: dict[str, list[dict[str, str]]] = {
    "seqrec": _rows(
        "{item}",
        "These are the items a user has interacted with, oldest first: {inters}. Which item comes next?",
        "Given the user's interaction history {inters}, predict the item the user will choose next.",
        "A shopper went through the following items in order: {inters}. Recommend the next one.",
        "In time order, the user picked {inters}. Name the item that is most likely to follow.",
        "The history of a user reads {inters}. Continue it with one item.",
        "After {inters}, what will this user want next?",
        "Here is a chronological list of items: {inters}. Say which item the same person would take now.",
        "Someone bought {inters}, one after the other. What should we suggest to them now?",
        "Look at the sequence {inters} and work out the item at its next position.",
        "The user's past items are {inters}. Based on them, recommend an item the user has not seen yet.",
        "Consider the ordered interactions {inters}. Which item fits as the following step?",
        "You are a recommender. Your customer's record: {inters}. Your recommendation:",
        "Knowing that a person has chosen {inters} so far, guess their coming choice.",
        "The items {inters} were used by one user in this order. Find the item used afterwards.",
        "Please extend this behaviour sequence by its most probable next item: {inters}.",
        "From the record {inters}, infer the current interest of the user and answer it with one item.",
        "Complete the series of this user's choices: {inters}, and then?",
    ),
    "item2index": [
        *_rows(
            "{item}",
            'Which item is called "{title}"?',
            'Give the index of the item with the title "{title}".',
            'An item is named "{title}". State its index.',
            'Translate the title "{title}" into an item index.',
            'Look up "{title}" in the catalogue and return its index.',
            '"{title}" is the name of an item. How is this item indexed?',
            "Which item is described as follows: {description}",
            "Find the index of the item that this description belongs to: {description}",
            "Read the description and name the item it is about. {description}",
            "The catalogue says of an item: {description} Tell me the item's index.",
            "Match this text with an item index: {description}",
            "Someone describes an item in these words: {description} Which item do they mean?",
            'An item has the title "{title}" and the description: {description} Which index does it have?',
            'Title: "{title}". Description: {description} Give the index of this item.',
            'Identify the item "{title}", about which we know: {description}',
            'Assign the right index to the item "{title}" with these details: {description}',
            'Here is the catalogue entry of "{title}": {description} Return the matching item.',
            'What is the index of "{title}"? More about it: {description}',
            'Of the item "{title}" it is written: {description} Express this item by its index.',
        )
    ],
    "index2item": [
        *_rows(
            "{title}",
            "What is the title of the item {item}?",
            "Name the item with the index {item}.",
            "Which title does {item} stand for?",
            "Translate the item index {item} into the title of the item.",
            "How is the item {item} called in the catalogue?",
            "Give me the name that belongs to {item}.",
        ),
        *_rows(
            "{description}",
            "Describe the item {item}.",
            "What does the catalogue say about the item {item}?",
            "Tell me the details of the item with the index {item}.",
            "Write the description that belongs to {item}.",
            "What kind of item is {item}? Describe it.",
            "Give the product text of the item {item}.",
        ),
        *_rows(
            "{title}\n\n{description}",
            "Give the title and the description of the item {item}.",
            "What is {item}? Answer with its title and then its description.",
            "Write out the catalogue entry of the item {item}: first its title, then its description.",
            "Present the item {item} by name and description.",
            "Tell me all about {item}, that is, its title followed by its description.",
        ),
    ],
    "fusionseqrec": [
        *_rows(
            "{title}",
            "A user has interacted with {inters}, oldest first. What is the title of the next item?",
            "Given the history {inters}, name the item the user will choose next by its title.",
            "The sequence of a user is {inters}. Write the title of the item that follows.",
            "Recommend one item to the person who chose {inters}, and call it by its title.",
        ),
        *_rows(
            "{description}",
            "A user has interacted with {inters}, oldest first. Describe the next item.",
            "Given the history {inters}, what would the item the user wants next look like? Describe it.",
            "The sequence of a user is {inters}. Write the description of the item that follows.",
            "Recommend one item to the person who chose {inters}, in the form of its description.",
        ),
        *_rows(
            "{item}",
            "A user has interacted with the following items, oldest first: {inter_titles}. Which item comes next?",
            "The titles of a user's past items are {inter_titles}. Predict the next item.",
            "Given that someone chose {inter_titles} in this order, recommend an item for them.",
            "Continue the history {inter_titles} with the most probable item.",
        ),
    ],
    "itemsearch": _rows(
        "{item}",
        'A user with the preference "{explicit_preference}" has interacted with {inters}. Which item suits them?',
        'After {inters}, the user explains: "{user_related_intention}" Which item answers this wish?',
        'The user\'s history is {inters}. They now look for the following: "{item_related_intention}" Find the item.',
        'Search for "{query}" on behalf of a user who chose {inters} and who prefers: "{explicit_preference}"',
        'Preference: "{explicit_preference}". History: {inters}. Query: "{query}". Which item should come first?',
        'Someone asks for "{query}". Their past items are {inters}, and they like: "{explicit_preference}" '
        "Pick the item for them.",
        'Find the item that a user means by "{query}".',
        'A customer says: "{query}" Which item should they be shown?',
        'Answer the search query with an item: "{query}"',
        'Which item of the catalogue satisfies this need: "{query}"',
        'Recommend an item for the request "{query}".',
    ),
    "preferenceobtain": _rows(
        "{explicit_preference}",
        "A user has interacted with {inters}. What does the user prefer?",
        "Summarise the preference of a user whose history is {inters}.",
        "What do the items {inters} tell about the taste of the person who chose them?",
        "From the sequence {inters}, work out what the user likes.",
        "Write in one or two sentences what someone who chose {inters} cares about.",
        "The user's items are {inters}, oldest first. State the user's preference.",
        "Explain the interests behind these choices: {inters}.",
        "Given {inters}, describe the kind of items this user is looking for in general.",
        "Characterise the user who went through {inters}.",
        "Which preference connects the items {inters} of this user?",
        "Read the interaction history {inters} and put the user's taste into words.",
    ),
}


@dataclass(frozen=True)
class Template:
    """An instruction and its response, with slots in braces."""

    instruction: str
    response: str

    @property
    def slots(self) -> set[str]:
        """The names of all slots in instruction and response."""
        return set(SLOT.findall(self.instruction)) | set(SLOT.findall(self.response))

    def fits(self, slots: dict[str, str]) -> bool:
        """True if every slot has a text that is not blank (an item without description gets no description prompt)."""
        return all(slots.get(name, "").strip() for name in self.slots)


@dataclass(frozen=True)
class Prompts:
    """The frame and the templates of every task; templates count from 0 in the order of the file."""

    frame: str
    templates: dict[str, list[Template]]

    def prompt(self, template: Template, slots: dict[str, str]) -> str:
        """The text up to where the response starts (`…### Response:`)."""
        before, after = self.frame.split("{response}")[0].split("{instruction}")
        return before + fill(template.instruction, slots) + after

    def response(self, template: Template, slots: dict[str, str]) -> str:
        """The text of the answer, without the end-of-sequence token."""
        return fill(template.response, slots) + self.frame.split("{response}")[1]

    def as_json(self) -> dict[str, Any]:
        """The two objects of a prompt file, `sft_prompt` and `all_prompt`."""
        tasks = {task: [vars(template) for template in rows] for task, rows in self.templates.items()}
        return {"sft_prompt": self.frame, "all_prompt": tasks}

    def of(self, task: str) -> list[Template]:
        """The templates of `task`. Raises UserError if there are none."""
        if not self.templates.get(task):
            raise UserError(f"the prompt file has no templates for the task {task}; it has {', '.join(self.templates)}")
        return self.templates[task]


def fill(text: str, slots: dict[str, str]) -> str:
    """`text` with every `{slot}` replaced; the values are not searched again."""
    return SLOT.sub(lambda match: slots[match.group(1)], text)


def checked_prompts(source: str, frame: object, templates: object) -> Prompts:
    """Prompts from the two objects of a prompt file. Raises UserError with file and key."""
    if not isinstance(frame, str) or frame.count("{instruction}") != 1 or frame.count("{response}") != 1:
        raise UserError(f"{source}: sft_prompt must be a text with {{instruction}} and {{response}} once each")
    if frame.index("{instruction}") > frame.index("{response}"):
        raise UserError(f"{source}: sft_prompt must have {{instruction}} before {{response}}")
    if not isinstance(templates, dict):
        raise UserError(f"{source}: all_prompt must map task names to lists of templates")
    tasks: dict[str, list[Template]] = {}
    for task, rows in templates.items():
        if task not in TASKS:
            raise UserError(f"{source}: all_prompt has an unknown task {task!r}; known: {', '.join(TASKS)}")
        if not isinstance(rows, list):
            raise UserError(f"{source}: all_prompt[{task!r}] must be a list")
        tasks[task] = [_checked_row(f"{source}: all_prompt[{task!r}][{i}]", task, row) for i, row in enumerate(rows)]
    return Prompts(frame, tasks)


def _checked_row(where: str, task: str, row: object) -> Template:
    if not isinstance(row, dict) or not all(isinstance(row.get(key), str) for key in ("instruction", "response")):
        raise UserError(f"{where} must have the texts instruction and response")
    template = Template(row["instruction"], row["response"])
    for key, known in (("instruction", TASKS[task].asks), ("response", TASKS[task].answers)):
        if unknown := set(SLOT.findall(row[key])) - known:
            slot = min(unknown)
            why = "would betray the answer" if slot in TASKS[task].answers else "is unknown"
            raise UserError(f"{where}: {{{slot}}} in the {key} {why}; {task} has {', '.join(sorted(known))} there")
    return template


def load_prompts(path: str | None = None) -> Prompts:
    """The templates of this repository, or those of a user's file.

    Args:
        path: a JSON file `{"sft_prompt": str, "all_prompt": {task: [{"instruction", "response"}, …]}}`, or a Python
            file that defines these two names. A Python file is code and is run, because the user named it; this is said.

    Raises:
        UserError: the file is missing or not of this form.
    """
    if not path:
        return checked_prompts("prompt.py", sft_prompt, all_prompt)
    regular_file(path)
    if Path(path).suffix == ".py":
        say(f"note: running {path} for its templates (--prompt_file)")
        try:
            content = runpy.run_path(path)
        except (Exception, SystemExit) as error:
            raise UserError(f"{path}: stopped with {type(error).__name__}: {first_line(error)}") from error
    else:
        content = read_json(path)
        if not isinstance(content, dict):
            raise UserError(f"{path}: must be an object with sft_prompt and all_prompt")
    return checked_prompts(str(path), content.get("sft_prompt"), content.get("all_prompt"))
