"""The dataset's files, checked once, and the samples of the six tasks made from them.

Files lie in `<data_path>/<dataset>/` (README, "Files"). Splits are leave-one-out: every prefix of `items[:-2]` predicts its
next item in training, `items[-2]` is the validation target, `items[-1]` the test target. Samples are made when they are
asked for: what is kept in memory is a table of integers, not texts.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from prompt import Prompts, Template
from utils import UserError, read_json, say

ITEM_TOKEN = re.compile(r"<[a-z]+_\d+>")
TITLE_EDGES = " \t\r\n.!?,;:`"


@dataclass(frozen=True)
class Intention:
    """What a user searched for: two wordings, the item that was meant, and the history before it."""

    item: int
    inters: list[int]
    queries: tuple[str, str]  # user-related, item-related


@dataclass(frozen=True)
class UserTexts:
    """`<D>.user.json`: preferences of every user, and a training and a test intention."""

    preferences: dict[str, list[str]]
    intentions: dict[str, dict[str, Intention]]  # "train" | "test" → user → intention

    @cached_property
    def user_ids(self) -> list[str]:
        """The users with preferences, in the file's order."""
        return list(self.preferences)


@dataclass(frozen=True)
class RecData:
    """One dataset, checked: every item of every history has a text and an index."""

    name: str
    folder: Path
    inters: dict[str, list[int]]
    titles: list[str]
    descriptions: list[str]
    indices: list[tuple[str, ...]]
    users: UserTexts | None
    files: dict[str, Path] = field(default_factory=dict)

    @cached_property
    def user_ids(self) -> list[str]:
        """The users in the file's order."""
        return list(self.inters)

    @cached_property
    def item_tokens(self) -> list[str]:
        """The distinct item tokens, sorted as strings: the order in which they enter the vocabulary."""
        return sorted({token for index in self.indices for token in index})

    @cached_property
    def canonical(self) -> list[int]:
        """For every item the lowest id that has the same index."""
        first: dict[tuple[str, ...], int] = {}
        return [first.setdefault(index, item) for item, index in enumerate(self.indices)]

    @cached_property
    def train_counts(self) -> np.ndarray:
        """How often every item occurs in the training parts (`items[:-2]`): int64 (items,)."""
        counts = np.zeros(len(self.titles), dtype=np.int64)
        for items in self.inters.values():
            np.add.at(counts, items[:-2], 1)
        return counts

    @cached_property
    def shared_items(self) -> int:
        """How many items share their index with another item."""
        _, counts = np.unique(self.canonical, return_counts=True)
        return int(counts[counts > 1].sum())

    def index_text(self, item: int) -> str:
        """The item's index as text, such as `<a_12><b_201><c_7><d_88>`."""
        return "".join(self.indices[item])


def clean_title(title: str) -> str:
    """A title without blanks, `.!?,;:` and back-ticks at its ends."""
    return title.strip(TITLE_EDGES)


# ---- reading and checking ----


def load_data(data_path: str, dataset: str, index_file: str = ".index.json", need_users: bool = False) -> RecData:
    """Read and check the files of a dataset.

    Args:
        data_path: the folder that holds `<dataset>/`.
        index_file: the ending of the index file, such as `.index.json`.
        need_users: read `<dataset>.user.json` too.

    Raises:
        UserError: a file is missing or broken; the message says file, key and reason.
    """
    folder = Path(data_path) / dataset
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder (--data_path and --dataset)")
    files = {
        "inter": folder / f"{dataset}.inter.json",
        "item": folder / f"{dataset}.item.json",
        "index": folder / f"{dataset}{index_file}",
    }
    if need_users:
        files["user"] = folder / f"{dataset}.user.json"
    titles, descriptions = read_items(files["item"])
    indices = _read_indices(files["index"], len(titles))
    inters = read_inters(files["inter"], len(titles))
    users = read_users(files["user"], inters, len(titles)) if need_users else None
    data = RecData(dataset, folder, inters, titles, descriptions, indices, users, files)
    if data.shared_items:
        say(
            f"warning: {files['index']}: {data.shared_items} of {len(titles)} items share their index with another item; "
            "a hit on the index counts for each of them"
        )
    return data


def _object(path: Path, content: Any, key: str = "") -> dict:
    if not isinstance(content, dict) or not content:
        raise UserError(f"{path}:{f' {key!r}' if key else ''} must be an object that is not empty")
    return content


def read_items(path: Path) -> tuple[list[str], list[str]]:
    """Titles and descriptions by item id, stripped. Raises UserError with file and key."""
    content = _object(path, read_json(path))
    titles, descriptions = [], []
    for number in range(len(content)):
        entry = content.get(str(number))
        if not isinstance(entry, dict):
            raise UserError(f"{path}: has no item {str(number)!r}; the {len(content)} keys must count from 0")
        texts = [entry.get("title"), entry.get("description", "")]
        for name, text in zip(("title", "description"), texts, strict=True):
            if not isinstance(text, str):
                raise UserError(f"{path}: item {str(number)!r} has no text in {name!r}")
        if not any(text.strip() for text in texts):
            raise UserError(f"{path}: item {str(number)!r} has neither a title nor a description")
        titles.append(clean_title(texts[0]))
        descriptions.append(texts[1].strip())
    return titles, descriptions


def _read_indices(path: Path, n_items: int) -> list[tuple[str, ...]]:
    content = _object(path, read_json(path))
    indices = []
    for number in range(n_items):
        tokens = content.get(str(number))
        if tokens is None:
            raise UserError(f"{path}: item {str(number)!r} has no index, but it is in the item file")
        if not isinstance(tokens, list) or not tokens:
            raise UserError(f"{path}: item {str(number)!r} must have a list of tokens")
        for token in tokens:
            if not isinstance(token, str) or not ITEM_TOKEN.fullmatch(token):
                raise UserError(f"{path}: item {str(number)!r} has {token!r}, which is not a token such as <a_12>")
        indices.append(tuple(tokens))
    if len(content) != n_items:
        extra = next(key for key in content if not (key.isdigit() and int(key) < n_items))
        raise UserError(f"{path}: has item {extra!r}, but the item file has {n_items} items, counted from 0")
    return indices


def _check_item_ids(where: str, items: Any, n_items: int) -> list[int]:
    if not isinstance(items, list):
        raise UserError(f"{where} must be a list of items")
    for item in items:
        if isinstance(item, bool) or not isinstance(item, int) or not 0 <= item < n_items:
            raise UserError(f"{where}: {item!r} is not an item; items are whole numbers from 0 to {n_items - 1}")
    return items


def read_inters(path: Path, n_items: int) -> dict[str, list[int]]:
    """Every user's items, oldest first. Raises UserError with file and key."""
    content = _object(path, read_json(path))
    for user, items in content.items():
        _check_item_ids(f"{path}: user {user!r}", items, n_items)
        if len(items) < 3:
            raise UserError(f"{path}: user {user!r} has {len(items)} interactions; leave-one-out needs 3 or more")
    return content


def read_users(path: Path, inters: dict[str, list[int]], n_items: int) -> UserTexts:
    """Preferences and intentions. Raises UserError with file and key."""
    content = _object(path, read_json(path))
    preferences = _object(path, content.get("user_explicit_preference"), "user_explicit_preference")
    for user, texts in preferences.items():
        where = f"{path}: user_explicit_preference {user!r}"
        if user not in inters:
            raise UserError(f"{where} is not a user of the interaction file")
        if (
            not isinstance(texts, list)
            or not texts
            or not all(isinstance(text, str) and text.strip() for text in texts)
        ):
            raise UserError(f"{where} must be a list of texts")
    splits = _object(path, content.get("user_vague_intention"), "user_vague_intention")
    intentions = {  # a split may be empty, as the test part of some published files is; a task that needs it says so
        split: _read_intentions(path, split, _object(path, splits[split], split), preferences, n_items)
        for split in ("train", "test")
        if splits.get(split)
    }
    return UserTexts(preferences, intentions)


def _read_intentions(path: Path, split: str, rows: dict, users: dict, n_items: int) -> dict[str, Intention]:
    intentions = {}
    for user in users:
        where = f"{path}: user_vague_intention {split!r} {user!r}"
        row = rows.get(user)
        if not isinstance(row, dict):
            raise UserError(f"{where} is missing, but the user has preferences")
        queries = row.get("querys")
        if (
            not isinstance(queries, list)
            or len(queries) != 2
            or not all(isinstance(q, str) and q.strip() for q in queries)
        ):
            raise UserError(f"{where}: 'querys' must be two texts")
        item = _check_item_ids(f"{where}: 'item'", [row.get("item")], n_items)[0]
        intentions[user] = Intention(
            item, _check_item_ids(f"{where}: 'inters'", row.get("inters"), n_items), tuple(queries)
        )
    return intentions


# ---- histories ----


@dataclass(frozen=True)
class HistoryFormat:
    """How a history becomes text."""

    max_his_len: int = 20
    add_prefix: bool = False
    his_sep: str = ", "

    def cut(self, items: list[int]) -> list[int]:
        """The newest `max_his_len` items (all for -1, none for 0)."""
        return items if self.max_his_len < 0 else items[max(0, len(items) - self.max_his_len) :]

    def join(self, texts: list[str]) -> str:
        """The texts, numbered if asked for, in one line."""
        if self.add_prefix:
            texts = [f"{number}. {text}" for number, text in enumerate(texts, 1)]
        return self.his_sep.join(texts)


# ---- the six tasks: one row each ----


@dataclass(frozen=True)
class Sample:
    """One sample before a template is chosen: whose it is, what comes before, what is asked for, and the slots' texts."""

    user: str
    history: list[int]
    target: int
    slots: dict[str, str]


def _prefix_rows(data: RecData) -> np.ndarray:
    """(user number, position of the target) for every prefix of every training part: int32 (n, 2)."""
    targets = np.array([max(0, len(items) - 3) for items in data.inters.values()])
    users = np.repeat(np.arange(len(targets)), targets)
    starts = np.repeat(np.cumsum(targets) - targets, targets)
    return np.stack([users, np.arange(len(users)) - starts + 1], axis=1).astype(np.int32)


def _longest(rows: np.ndarray) -> np.ndarray:
    """Of `_prefix_rows` each user's last one."""
    return rows[np.diff(rows[:, 0], append=-1) != 0]


def _last_rows(back: int) -> Callable[[RecData], np.ndarray]:
    """(user number, position of the target) with the target `back` items from the end."""

    def rows(data: RecData) -> np.ndarray:
        return np.array([[user, len(items) - back] for user, items in enumerate(data.inters.values())], dtype=np.int32)

    return rows


def _item_rows(data: RecData) -> np.ndarray:
    return np.arange(len(data.titles), dtype=np.int32)[:, None]


def _user_rows(data: RecData) -> np.ndarray:
    return np.arange(len(_users(data).user_ids), dtype=np.int32)[:, None]


def _search_rows(split: str) -> Callable[[RecData], np.ndarray]:
    """Every user with preferences. Raises UserError if the file has no intentions of `split`."""

    def rows(data: RecData) -> np.ndarray:
        if split not in _users(data).intentions:
            raise UserError(
                f"{data.files.get('user')}: user_vague_intention has nothing in {split!r}, which itemsearch needs"
            )
        return _user_rows(data)

    return rows


def _preference_rows(data: RecData) -> np.ndarray:
    """The users who have a history before the last three items."""
    users = _users(data).user_ids
    return np.array([[number] for number, user in enumerate(users) if len(data.inters[user]) > 3], dtype=np.int32)


def _users(data: RecData) -> UserTexts:
    if data.users is None:
        raise UserError(f"{data.folder}: this task needs {data.name}.user.json; data_process/user_texts.py makes it")
    return data.users


def _item_slots(data: RecData, item: int) -> dict[str, str]:
    return {"item": data.index_text(item), "title": data.titles[item], "description": data.descriptions[item]}


def _history_slots(data: RecData, form: HistoryFormat, history: list[int]) -> dict[str, str]:
    return {
        "inters": form.join([data.index_text(item) for item in history]),
        "inter_titles": form.join([f'"{data.titles[item]}"' for item in history]),
    }


def _sequence_sample(data: RecData, row: np.ndarray, form: HistoryFormat, rng: np.random.Generator) -> Sample:
    user, position = data.user_ids[row[0]], int(row[1])
    items = data.inters[user]
    history, target = form.cut(items[:position]), items[position]
    return Sample(user, history, target, _history_slots(data, form, history) | _item_slots(data, target))


def _item_sample(data: RecData, row: np.ndarray, form: HistoryFormat, rng: np.random.Generator) -> Sample:
    return Sample("", [], int(row[0]), _item_slots(data, int(row[0])))


def _search_sample(split: str) -> Callable[..., Sample]:
    def sample(data: RecData, row: np.ndarray, form: HistoryFormat, rng: np.random.Generator) -> Sample:
        user = data.users.user_ids[row[0]]
        intention = data.users.intentions[split][user]
        history = form.cut(intention.inters)
        preferences = data.users.preferences[user]
        slots = _history_slots(data, form, history) | {
            "item": data.index_text(intention.item),
            "explicit_preference": preferences[rng.integers(len(preferences))],
            "query": intention.queries[rng.integers(2)],
            "user_related_intention": intention.queries[0],
            "item_related_intention": intention.queries[1],
        }
        return Sample(user, history, intention.item, slots)

    return sample


def _preference_sample(held_out: int) -> Callable[..., Sample]:
    """The history leaves the user's `held_out` last items out."""

    def sample(data: RecData, row: np.ndarray, form: HistoryFormat, rng: np.random.Generator) -> Sample:
        user = data.users.user_ids[row[0]]
        history = form.cut(data.inters[user][:-held_out])
        preferences = data.users.preferences[user]
        preference = preferences[rng.integers(len(preferences))]
        slots = _history_slots(data, form, history) | {"explicit_preference": preference}
        return Sample(user, history, -1, slots)

    return sample


@dataclass(frozen=True)
class Task:
    """One task: which samples a split has (rows of integers), and how a row becomes slots.

    `rows` maps "train" and "test" to a function of the data; a task without "test" is for training only.
    """

    rows: dict[str, Callable[[RecData], np.ndarray]]
    sample: dict[str, Callable[[RecData, np.ndarray, HistoryFormat, np.random.Generator], Sample]]
    needs_users: bool = False


_SEQUENCES = {"train": _sequence_sample, "valid": _sequence_sample, "test": _sequence_sample}
_SEQUENCE_ROWS = {"train": _prefix_rows, "valid": _last_rows(2), "test": _last_rows(1)}

TASKS: dict[str, Task] = {
    "seqrec": Task(_SEQUENCE_ROWS, _SEQUENCES),
    "item2index": Task({"train": _item_rows}, {"train": _item_sample}),
    "index2item": Task({"train": _item_rows}, {"train": _item_sample}),
    "fusionseqrec": Task(_SEQUENCE_ROWS, _SEQUENCES),
    "itemsearch": Task(
        {"train": _search_rows("train"), "test": _search_rows("test")},
        {"train": _search_sample("train"), "test": _search_sample("test")},
        needs_users=True,
    ),
    "preferenceobtain": Task(
        {"train": _preference_rows, "valid": _user_rows},
        {"train": _preference_sample(3), "valid": _preference_sample(2)},
        needs_users=True,
    ),
}


# ---- datasets ----


def _random(*key: int) -> np.random.Generator:
    """A generator that depends on `key` alone, whatever was drawn before."""
    return np.random.default_rng(key)


def _template_order(templates: list[Template], slots: dict[str, str], rng: np.random.Generator) -> list[Template]:
    """The templates that the slots can fill, shuffled."""
    fitting = [template for template in templates if template.fits(slots)] or templates
    return [fitting[i] for i in rng.permutation(len(fitting))]


class TrainSet:
    """The mixture of training tasks: `set[i]` is `{"task", "prompt", "response"}`.

    The template (and query, preference) of a sample is drawn from (seed, epoch, task, sample), so that a resumed run sees
    what the uninterrupted one saw. The `repetition`-th copy of a sample takes the `repetition`-th template of one shuffle.

    Args:
        tasks: `(task, train_prompt_sample_num, train_data_sample_num)`, as `arguments.parse_tasks` gives them.
        split: "valid" takes the validation samples of those tasks that have some.
        longest_history_only: of seqrec and fusionseqrec train on each user's longest history, not on every prefix of it.
    """

    def __init__(
        self,
        data: RecData,
        prompts: Prompts,
        tasks: list[tuple[str, int, int]],
        form: HistoryFormat,
        seed: int = 42,
        split: str = "train",
        longest_history_only: bool = False,
    ):
        self.data, self.prompts, self.form, self.seed, self.epoch = data, prompts, form, seed, 0
        self.names = [name for name, _, _ in tasks]
        self.repetitions = [repetitions for _, repetitions, _ in tasks]
        self.templates = [prompts.of(name) for name in self.names]
        splits = [split if split in TASKS[name].rows else "train" for name in self.names]
        self._sample = [TASKS[name].sample[split] for name, split in zip(self.names, splits, strict=True)]
        self.rows = []
        for (name, _, wanted), split in zip(tasks, splits, strict=True):
            rows = TASKS[name].rows[split](data)
            if longest_history_only and TASKS[name].rows[split] is _prefix_rows:
                rows = _longest(rows)
            if 0 < wanted < len(rows):
                chosen = _random(seed, list(TASKS).index(name)).choice(len(rows), wanted, replace=False)
                rows = rows[np.sort(chosen)]
            self.rows.append(rows)
        self.ends = np.cumsum([len(rows) * n for rows, n in zip(self.rows, self.repetitions, strict=True)])
        if not len(self):
            raise UserError("there is no training sample: every user has three interactions, which all are held out")

    def set_epoch(self, epoch: int) -> None:
        """Draw other templates: those of `epoch`, counted from 0."""
        self.epoch = epoch

    def __len__(self) -> int:
        return int(self.ends[-1])

    def counts(self) -> dict[str, int]:
        """The samples of an epoch by task."""
        return {name: len(rows) * n for name, rows, n in zip(self.names, self.rows, self.repetitions, strict=True)}

    def task_of(self, number: int) -> int:
        """The position in `names` of the task that sample `number` belongs to."""
        return int(np.searchsorted(self.ends, number, side="right"))

    def __getitem__(self, number: int) -> dict[str, str]:
        number = range(len(self))[number]  # IndexError and negative numbers as for a list
        task = self.task_of(number)
        name, repetitions = self.names[task], self.repetitions[task]
        row, repetition = divmod(number - (int(self.ends[task - 1]) if task else 0), repetitions)
        key = (self.seed, self.epoch, list(TASKS).index(name), row)
        sample = self._sample[task](self.data, self.rows[task][row], self.form, _random(*key, 1 + repetition))
        order = _template_order(self.templates[task], sample.slots, _random(*key, 0))
        template = order[repetition % len(order)]
        return {
            "task": name,
            "prompt": self.prompts.prompt(template, sample.slots),
            "response": self.prompts.response(template, sample.slots),
        }


class ValidSet:
    """seqrec on the validation targets, with `prompt_num` templates a user, drawn once, or with template `prompt_id` alone."""

    def __init__(
        self,
        data: RecData,
        prompts: Prompts,
        form: HistoryFormat,
        seed: int = 42,
        prompt_num: int = 2,
        prompt_id: int | None = None,
    ):
        self.data, self.prompts, self.form, self.seed, self.prompt_id = data, prompts, form, seed, prompt_id
        self.templates = prompts.of("seqrec")
        if prompt_id is not None and not 0 <= prompt_id < len(self.templates):
            raise UserError(f"--valid_prompt_id {prompt_id}: seqrec has the templates 0 to {len(self.templates) - 1}")
        if prompt_id is None and not 0 < prompt_num <= len(self.templates):
            raise UserError(f"--valid_prompt_sample_num {prompt_num}: seqrec has {len(self.templates)} templates")
        self.prompt_num = prompt_num if prompt_id is None else 1
        self.rows = TASKS["seqrec"].rows["valid"](data)

    def __len__(self) -> int:
        return len(self.rows) * self.prompt_num

    def sample(self, row: int) -> Sample:
        """The validation sample of the `row`-th user."""
        return TASKS["seqrec"].sample["valid"](self.data, self.rows[row], self.form, _random(self.seed))

    def __getitem__(self, number: int) -> dict[str, str]:
        row, repetition = divmod(range(len(self))[number], self.prompt_num)
        template = self.prompt_id
        if template is None:
            template = _random(self.seed, row).permutation(len(self.templates))[repetition]
        sample = self.sample(row)
        return {
            "task": "seqrec",
            "prompt": self.prompts.prompt(self.templates[template], sample.slots),
            "response": self.prompts.response(self.templates[template], sample.slots),
        }


class TaskValidSet(TrainSet):
    """Up to `count` samples of each of `tasks`, drawn once, for the validation loss by task; no training depends on them.

    fusionseqrec asks for the validation target, and preferenceobtain shows the history before it. Nothing is held out of the
    other tasks, whose texts belong to an item or to the training target: theirs are training samples with a template drawn
    anew, which tell how well the task is learned, not how well it generalises.
    """

    def __init__(
        self, data: RecData, prompts: Prompts, tasks: list[str], form: HistoryFormat, seed: int = 42, count: int = 100
    ):
        super().__init__(data, prompts, [(name, 1, count) for name in tasks], form, seed, "valid")
        self.set_epoch(2**31)  # a draw that no epoch has


class TestSet:
    """The test samples of `task` (seqrec, itemsearch, fusionseqrec): `set[i]` is a `Sample`.

    Query and preference of itemsearch are drawn from (seed, sample) alone: the same on every run and process.
    """

    __test__ = False  # not a pytest class

    def __init__(self, data: RecData, task: str, form: HistoryFormat, seed: int = 42, split: str = "test"):
        if split not in TASKS[task].rows:
            raise UserError(f"the task {task} has no {split} split")
        self.data, self.form, self.seed = data, form, seed
        self.rows = TASKS[task].rows[split](data)
        self._sample = TASKS[task].sample[split]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: int) -> Sample:
        number = range(len(self))[number]
        return self._sample(self.data, self.rows[number], self.form, _random(self.seed, number))
