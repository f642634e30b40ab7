"""The top items, with titles and scores, for users, for histories, or for a search text.

    python recommend.py --ckpt_path ./ckpt/Games/ --history 12 873 "Super Mario 64" --top_k 5 --exclude_history
    python recommend.py --ckpt_path ./ckpt/Games/ --query "a racing game for two players"
    python recommend.py --ckpt_path ./ckpt/Games/ --requests requests.jsonl --format json > answers.jsonl
    ./my_shop | python recommend.py --ckpt_path ./ckpt/Games/ --requests -
    python recommend.py --ckpt_path ./ckpt/Games/ --dataset Games --data_path ./data --users 0,17

A model knows how it wants to be asked and which items it was trained on (`prompt_style.json`, `item_index.json` in its folder);
users' histories are in the dataset, and so are items that are new since (`--data_path`, `--dataset`, `--index_file`).

`--requests` reads a JSON object a line from a file, or from stdin with `-`, where each line is answered at once while the
model stays loaded: `{"user": "17"}`, `{"history": [12, "Super Mario 64"]}` or `{"query": "…"}`, and if you like `"id"` (comes
back in the answer), `"top_k"` and `"exclude_history"`. A line that is wrong is answered with `{"error": "…"}`. Items are ids
or titles. A user's history is all that the dataset has of them, so the answer is what comes after its end.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import json
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from arguments import MODEL, add_data, add_flags, add_global, make_parser, parse_given, style_flags
from collator import encode_prompts
from data import RecData, clean_title, load_data
from decoding import pack_linears
from flag_values import whole
from modeling import DTYPES, find_with_base, item_trie, load_for_test
from processes import pick_device
from prompt import Template
from prompt_style import PromptStyle, check_same_items, choose_style, saved_items
from quiet import silence_libraries
from scoring import Scorer, check_length
from testing import answers_with_item
from utils import UserError, parse_json, regular_file, run_main, say, set_seed


@dataclass(frozen=True)
class Request:
    """One question: what follows `history`, or what answers `query`."""

    history: list[int] = field(default_factory=list)
    query: str = ""
    top_k: int = 10
    exclude: frozenset[int] = frozenset()  # items that are not to be named
    echo: dict[str, Any] = field(default_factory=dict)  # comes back with the answer


class RequestReader:
    """Makes requests of what users write; needs no model.

    Args:
        data: the dataset whose items are recommended.
    """

    def __init__(self, data: RecData):
        self.data = data

    @cached_property
    def _by_title(self) -> dict[str, int]:
        """Title in small letters → the first item that has it."""
        found: dict[str, int] = {}
        for item, title in enumerate(self.data.titles):
            found.setdefault(title.lower(), item)
        return found

    def item(self, name: int | str) -> int:
        """The item with this id (a whole number, or its digits) or this title.

        Raises:
            UserError: there is none; the message has the nearest titles.
        """
        last = len(self.data.titles) - 1
        if isinstance(name, int) or name.strip().isdecimal():
            digits = str(name).strip()
            if isinstance(name, bool) or len(digits) > 12 or not 0 <= int(digits) <= last:
                raise UserError(f"item {digits[:40]} is unknown; the items of {self.data.name} are 0 to {last}")
            return int(digits)
        wanted = clean_title(name).lower()
        if wanted in self._by_title:
            return self._by_title[wanted]
        near = difflib.get_close_matches(wanted, self._by_title, n=3, cutoff=0.0)
        within = [title for title in self._by_title if wanted and wanted in title][:3]
        shown = "; ".join(
            f"{self.data.titles[self._by_title[title]]!r} ({self._by_title[title]})"
            for title in list(dict.fromkeys(within + near))[:3]
        )
        raise UserError(f"no item has the title {name[:80]!r}; the nearest: {shown}")

    def request(self, content: dict[str, Any], top_k: int = 10, exclude_history: bool = False) -> Request:
        """A request from the object that a line of `--requests` holds.

        Raises:
            UserError: an unknown key, user or item, or nothing that is asked for.
        """
        if not isinstance(content, dict):
            raise UserError('a request is an object such as {"user": "17"}')
        known = {"user", "history", "query", "id", "top_k", "exclude_history"}
        if unknown := sorted(set(content) - known):
            raise UserError(f"unknown key {unknown[0]!r}; a request may have {', '.join(sorted(known))}")
        if sum(key in content for key in ("user", "history", "query")) != 1:
            raise UserError("a request has exactly one of user, history and query")
        history, query = [], ""
        if "user" in content:
            if str(content["user"]) not in self.data.inters:
                where = self.data.files.get("inter", "the checkpoint, which knows items alone: give --data_path")
                raise UserError(f"user {content['user']!r} is not in {where}")
            history = self.data.inters[str(content["user"])]
        elif "history" in content:
            if not isinstance(content["history"], list) or not content["history"]:
                raise UserError("history must be a list of at least one item")
            for name in content["history"]:
                if not isinstance(name, (int, str)):
                    raise UserError(f"history: {name!r} is neither an id nor a title")
            history = [self.item(name) for name in content["history"]]
        else:
            query = content["query"]
            if not isinstance(query, str) or not query.strip():
                raise UserError("query must be a text")
        top_k = content.get("top_k", top_k)
        if isinstance(top_k, bool) or not isinstance(top_k, int) or top_k < 1:
            raise UserError(f"top_k is {top_k!r}; it must be 1 or more")
        exclude_history = content.get("exclude_history", exclude_history)
        if not isinstance(exclude_history, bool):
            raise UserError(f"exclude_history is {exclude_history!r}; it must be true or false")
        exclude = frozenset(history) if exclude_history else frozenset()
        echo: dict[str, Any] = {key: content[key] for key in ("id", "user", "query") if key in content}
        if "history" in content:
            echo["history"] = history
        return Request(history, query, top_k, exclude, echo)


class Recommender(RequestReader):
    """A loaded model that answers requests.

    Args:
        data: the dataset whose items are recommended.
        style: the templates and the form of a history.
        prompt_id: the template of seqrec (for histories) or itemsearch (for queries); by default the first that fits.
        num_beams: beams; more are taken where a request needs them to fill its list.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        data: RecData,
        style: PromptStyle,
        num_beams: int = 20,
        prompt_id: int | None = None,
    ):
        super().__init__(data)
        self.prompts, self.form = style.prompts, style.form
        self.num_beams, self.prompt_id = num_beams, prompt_id
        self.scorer = Scorer(model, tokenizer, item_trie(tokenizer, data, style.no_eos), num_beams)
        self.shared: Template | None = None  # the template whose beginning the scorer holds
        self.alike: dict[int, list[int]] = defaultdict(list)  # lowest id → all items with its index
        for item, first in enumerate(data.canonical):
            self.alike[first].append(item)

    def template(self, request: Request) -> Template:
        """The template for `request`.

        Raises:
            UserError: `prompt_id` is none, or it needs what a request does not have.
        """
        task = "itemsearch" if request.query else "seqrec"
        has = {"query", "item"} if request.query else {"inters", "item"}
        templates = self.prompts.of(task)
        fitting = [n for n, t in enumerate(templates) if t.slots <= has and answers_with_item(t)]
        if not fitting:
            raise UserError(
                f"no template of {task} has {' and '.join(sorted(has - {'item'}))} alone and answers with an item"
            )
        if self.prompt_id is None:
            return templates[fitting[0]]
        if self.prompt_id not in fitting:
            raise UserError(
                f"--prompt_id {self.prompt_id}: of {task} only {', '.join(map(str, fitting))} fit such a request"
            )
        return templates[self.prompt_id]

    def check(self, request: Request) -> None:
        """Raise a UserError if `request` cannot be answered: no template fits it, or its prompt is too long."""
        text = self.prompts.prompt(self.template(request), self._slots(request))
        (ids,) = encode_prompts(self.scorer.tokenizer, [text])
        check_length(self.scorer.model, len(ids) + self.scorer.trie.levels)

    def answer(self, requests: list[Request]) -> list[dict[str, Any]]:
        """An answer to each request, all decoded together: what it echoes and `items`, best first."""
        groups: dict[tuple[Template, int], list[int]] = defaultdict(list)
        for number, request in enumerate(requests):  # what is asked beside it must not change an answer
            needed = request.top_k + len(request.exclude)  # in few sizes, so that there are few groups
            beams = self.num_beams if needed <= self.num_beams else 2 ** (needed - 1).bit_length()
            groups[self.template(request), beams].append(number)
        answers: list[dict[str, Any]] = [{} for _ in requests]
        for (template, beams), numbers in groups.items():
            self.scorer.num_beams = beams
            found = self._decode(template, [requests[number] for number in numbers])
            for number, answer in zip(numbers, found, strict=True):
                answers[number] = answer
        return answers

    def _decode(self, template: Template, requests: list[Request]) -> list[dict[str, Any]]:
        texts = [self.prompts.prompt(template, self._slots(request)) for request in requests]
        ids = encode_prompts(self.scorer.tokenizer, texts)
        if self.shared is not template:  # what every prompt of this template begins with is read once
            other = self.prompts.prompt(template, dict.fromkeys(template.slots, "-"))
            self.scorer.share([ids[0], *encode_prompts(self.scorer.tokenizer, [other])])
            self.shared = template
        return [
            self._told(request, items, scores)
            for request, items, scores in zip(requests, *self.scorer.decode(ids), strict=True)
        ]

    def _slots(self, request: Request) -> dict[str, str]:
        history = self.form.cut(request.history)
        return {"query": request.query, "inters": self.form.join([self.data.index_text(item) for item in history])}

    def _told(self, request: Request, items: list[int], scores: list[float]) -> dict[str, Any]:
        left_out = {self.data.canonical[item] for item in request.exclude}
        rows = []
        for item, score in zip(items, scores, strict=True):
            if item not in left_out:
                row = {"item": item, "title": self.data.titles[item], "score": round(score, 6)}
                if len(self.alike[item]) > 1:
                    row["same_index"] = self.alike[item][1:]
                rows.append(row)
        return {**request.echo, "items": rows[: request.top_k]}


# ---- the command ----


def parse_command(argv: list[str] | None) -> tuple[argparse.Namespace, frozenset[str]]:
    """The flags, and which of those of the prompts were given."""
    parser = make_parser(__doc__)
    add_global(parser)
    add_data(parser)
    model = add_flags(parser, "model", MODEL)
    model.add_argument("--num_beams", type=whole(1), default=20, help="beams; more where a list needs them")
    model.add_argument("--prompt_id", type=whole(0), help="template number; by default the first that fits")
    ask = parser.add_argument_group("what is asked")
    ask.add_argument("--users", metavar="ID,ID,…", help="users of the dataset by commas, or all")
    ask.add_argument("--history", nargs="+", action="append", metavar="ITEM", help="ids or titles, oldest first")
    ask.add_argument("--query", action="append", metavar="TEXT", help="a search text")
    ask.add_argument("--requests", metavar="F", help="JSON lines from a file, or - for stdin")
    ask.add_argument("--top_k", type=whole(1), default=10, help="items in an answer")
    ask.add_argument("--exclude_history", action="store_true", help="never name items of the history")
    ask.add_argument("--batch_size", type=whole(1), default=16, help="requests decoded together (stdin: one by one)")
    ask.add_argument("--format", choices=("auto", "json", "table"), default="auto", help="auto: table on a terminal")
    args, given = parse_given(parser, argv)
    if not args.ckpt_path:
        raise UserError("--ckpt_path is missing: the folder or hub id of the model to ask")
    if not (args.users or args.history or args.query or args.requests):
        raise UserError("nothing is asked: give --users, --history, --query or --requests")
    if args.requests not in (None, "-"):
        regular_file(args.requests)
    return args, given


def items_to_recommend(args: argparse.Namespace, folder: Path) -> RecData:
    """The dataset if `--data_path` names one, else the items that the model's folder knows."""
    if not args.data_path and (known := saved_items(folder)):
        return known
    if not args.data_path and not Path(args.dataset).is_dir():
        raise UserError(f"{folder}: knows no items (no item_index.json); give --data_path and --dataset")
    data = load_data(args.data_path, args.dataset, args.index_file)
    check_same_items(folder, data, args.allow_other_index)
    return data


def asked(args: argparse.Namespace, data: RecData) -> Iterator[dict[str, Any]]:
    """The requests of the command line itself."""
    if args.users:
        everyone = args.users == "all" and data.inters
        users = data.user_ids if everyone else [user.strip() for user in args.users.split(",")]
        yield from ({"user": user} for user in users)
    yield from ({"history": history} for history in args.history or [])
    yield from ({"query": query} for query in args.query or [])


def show(answer: dict[str, Any], table: bool) -> None:
    """Print one answer."""
    if not table:
        print(json.dumps(answer, ensure_ascii=False), flush=True)
        return
    head = [f"{key} {value}" for key, value in answer.items() if key not in ("items", "error")]
    print("; ".join(head) or "answer")
    if "error" in answer:
        print(f"  error: {answer['error']}")
    for place, row in enumerate(answer.get("items", []), 1):
        print(f"  {place:>3}  {row['score']:>9.3f}  {row['item']:>7}  {row['title']}")
    print(flush=True)


def understand(recommender: Recommender, line: bytes, args: argparse.Namespace) -> Request | dict[str, Any]:
    """The request in a line, or the answer to a line that holds none."""
    content = None
    try:
        read = parse_json(line)
        json.dumps([[[[read]]]], allow_nan=False)  # what can be read and not be written, such as NaN, has no answer
        content = read
        request = recommender.request(content, args.top_k, args.exclude_history)
        recommender.check(request)
        return request
    except RecursionError:
        return {"error": "nested too deep"}
    except (ValueError, UserError) as error:
        told = {"id": content["id"]} if isinstance(content, dict) and "id" in content else {}
        return {**told, "error": str(error)}


def respond(
    recommender: Recommender, lines: Iterable[bytes], args: argparse.Namespace, batch: int, table: bool
) -> None:
    """Answer JSON lines in their order, `batch` at a time; a wrong line gets an error for an answer."""
    waiting: list[Request | dict[str, Any]] = []

    def flush() -> None:
        good = [entry for entry in waiting if isinstance(entry, Request)]
        answers = iter(recommender.answer(good)) if good else iter(())
        for entry in waiting:
            show(next(answers) if isinstance(entry, Request) else entry, table)
        waiting.clear()

    for line in lines:
        if line.strip():
            waiting.append(understand(recommender, line, args))
        if len(waiting) >= batch:
            flush()
    flush()


def main(argv: list[str] | None = None) -> None:
    """Load the model, answer what the command line asks, then the requests of `--requests`."""
    args, given = parse_command(argv)
    silence_libraries()
    set_seed(args.seed)
    with contextlib.redirect_stdout(sys.stderr):  # stdout is for answers alone
        found, args.lora, args.base_model = find_with_base(args.ckpt_path, args.lora, args.base_model, given)
        folder = Path(found)
        style, chosen = choose_style(folder, style_flags(args), given)
        vars(args).update(chosen)
        data = items_to_recommend(args, folder)
        reader = RequestReader(data)
        requests = [reader.request(content, args.top_k, args.exclude_history) for content in asked(args, data)]
        device = pick_device(args.gpu_id)
        model, tokenizer = load_for_test(folder, args.base_model, args.lora, device, DTYPES.get(args.dtype))
        pack_linears(model)
    recommender = Recommender(model, tokenizer, data, style, args.num_beams, args.prompt_id)
    table = sys.stdout.isatty() if args.format == "auto" else args.format == "table"
    for request in requests:
        recommender.check(request)
    for start in range(0, len(requests), args.batch_size):
        for answer in recommender.answer(requests[start : start + args.batch_size]):
            show(answer, table)
    if args.requests == "-":
        say("ready", file=sys.stderr)
        respond(recommender, iter(sys.stdin.buffer.readline, b""), args, 1, table)
    elif args.requests:
        with open(regular_file(args.requests), "rb") as file:
            respond(recommender, file, args, args.batch_size, table)


if __name__ == "__main__":
    run_main(main)
