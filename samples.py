"""Samples with their templates: the mixture that is trained on, the validation sets, the test set.

A sample is made when it is asked for: what is kept in memory is a table of integers, not texts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from collator import TrainCollator
from data import RecData
from prompt import Prompts, Template
from tasks import TASKS, HistoryFormat, Sample, longest_rows, prefix_rows, window_rows
from utils import UserError, say

CHECKED = 64  # samples of each task whose length is looked at


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
        history_windows: of seqrec train on pieces of the whole training parts, cut at other places in each epoch.
        swap: of seqrec, a user's items → the items that stand for them in this epoch (`item_vectors.ItemSwap`).
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
        history_windows: bool = False,
        swap: Callable[[list[int], np.random.Generator], list[int]] | None = None,
    ):
        self.data, self.prompts, self.form, self.seed, self.epoch = data, prompts, form, seed, 0
        self.names = [name for name, _, _ in tasks]
        self.repetitions = [repetitions for _, repetitions, _ in tasks]
        self.templates = [prompts.of(name) for name in self.names]
        self._wanted = [wanted for _, _, wanted in tasks]
        self._splits = [TASKS[name].splits.get(split, TASKS[name].splits["train"]) for name in self.names]
        self._sample = [each.sample for each in self._splits]
        self._longest, self._windows = longest_history_only, history_windows and form.max_his_len > 0
        self._swap = swap
        self._sources = [data] * len(tasks)
        self.rows = [self._rows_of(task) for task in range(len(tasks))]
        self.ends = np.cumsum([len(rows) * n for rows, n in zip(self.rows, self.repetitions, strict=True)])
        if not len(self):
            raise UserError("there is no training sample: every user has three interactions, which all are held out")
        self._draw_sequences()

    def _rows_of(self, task: int) -> np.ndarray:
        """The rows of the task at this place in `names`: as many, and drawn alike, in every epoch."""
        name, wanted = self.names[task], self._wanted[task]
        if self._windows and name == "seqrec":
            rows = window_rows(self.data, self.form.max_his_len + 1, _random(self.seed, self.epoch))
        else:
            rows = self._splits[task].rows(self.data)
        if self._longest and self._splits[task].rows is prefix_rows and rows.shape[1] == 2:
            rows = longest_rows(rows)
        if 0 < wanted < len(rows):
            chosen = _random(self.seed, list(TASKS).index(name)).choice(len(rows), wanted, replace=False)
            rows = rows[np.sort(chosen)]
        return rows

    def set_epoch(self, epoch: int) -> None:
        """Draw other templates, cut windows elsewhere and swap other items: those of `epoch`, counted from 0."""
        self.epoch = epoch
        self._draw_sequences()

    def _draw_sequences(self) -> None:
        if "seqrec" not in self.names:
            return
        task = self.names.index("seqrec")
        if self._windows:
            self.rows[task] = self._rows_of(task)
        if self._swap is not None:
            rng, inters = _random(self.seed, self.epoch, 1), self.data.inters
            swapped = {user: [*self._swap(items[:-2], rng), *items[-2:]] for user, items in inters.items()}
            self._sources[task] = replace(self.data, inters=swapped)

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
        sample = self._sample[task](self._sources[task], self.rows[task][row], self.form, _random(*key, 1 + repetition))
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
        self.rows = TASKS["seqrec"].splits["valid"].rows(data)

    def __len__(self) -> int:
        return len(self.rows) * self.prompt_num

    def sample(self, row: int) -> Sample:
        """The validation sample of the `row`-th user."""
        return TASKS["seqrec"].splits["valid"].sample(self.data, self.rows[row], self.form, _random(self.seed))

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
        if split not in TASKS[task].splits:
            raise UserError(f"the task {task} has no {split} split")
        self.data, self.task, self.form, self.seed = data, task, form, seed
        self.rows = TASKS[task].splits[split].rows(data)
        self._sample = TASKS[task].splits[split].sample

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: int) -> Sample:
        number = range(len(self))[number]
        return self._sample(self.data, self.rows[number], self.form, _random(self.seed, number))


def check_lengths(train_set: TrainSet, valid_set: ValidSet, collator: TrainCollator) -> None:
    """Look at some samples of each task, and of the validation, for responses that the collator cuts off.

    Raises:
        UserError: a task would train, or the validation be measured, without any label.
    """
    parts, begin = {}, 0
    for name, count in train_set.counts().items():
        parts[name] = [train_set[begin + i] for i in range(0, count, max(1, count // CHECKED))]
        begin += count
    n_valid = len(valid_set)
    parts["validation"] = [valid_set[i] for i in range(0, n_valid, max(1, n_valid // CHECKED))]
    short = {name: collator.without_label(samples) for name, samples in parts.items()}
    for name, samples in parts.items():
        if samples and short[name] == len(samples):
            raise UserError(
                f"--model_max_length {collator.max_length} cuts {name} before the response begins in each of "
                f"{len(samples)} samples looked at: nothing would be learned from them; allow more tokens"
            )
    if cut := ", ".join(f"{n} of {len(parts[name])} of {name}" for name, n in short.items() if n):
        say(f"note: --model_max_length leaves no label in {cut} (samples looked at); they train nothing")
