"""Write `<D>.user.json`, the preferences and intentions that itemsearch and preferenceobtain need.

    python data_process/user_texts.py --data_path ./data --dataset ml-100k                                    # by rule
    OPENAI_API_KEY=… python data_process/user_texts.py --data_path ./data --dataset Games --model gpt-4o-mini \\
        --base_url https://api.openai.com/v1 --dry_run --price_in 0.15 --price_out 0.60                       # what it costs
    python data_process/user_texts.py --data_path ./data --dataset Games --base_url http://localhost:8000/v1 --model M
    python data_process/user_texts.py --data_path ./data --dataset ml-100k --local_model FOLDER

The paper had GPT-3.5 write these texts (section III-C). A preference is told from the history `items[:-3]`, an intention from
its target: `items[-3]` in the part "train", `items[-1]` in "test"; both with the users' reviews, if `<D>.review.json` is
there. A target's title never stands in its intention. `made_by` in the file says who wrote what (docs/user-texts.md).
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from arguments import make_parser
from data import read_inters, read_items
from data_process.answers import ATTEMPT, AnswerFile, Ask, Endpoint
from data_process.local_model import LocalModel
from data_process.rule_texts import preferences, queries
from data_process.text_requests import (
    HELD_OUT,
    SYSTEM,
    TEXT_KINDS,
    Sources,
    TextRequest,
    parse_answer,
    prompt_of,
    read_reviews,
    requests_of,
)
from flag_values import SEEDS, plain_name, real, whole
from folders import locked
from provenance import note_made, record_path
from utils import UserError, parse_json, read_json, run_main, say, write_json

LETTERS_A_TOKEN = 4  # of English text, for estimates
USUAL_ANSWER = 80  # tokens

Found = Callable[[str, str], "list[str] | None"]  # (user, kind) → texts, None: make them by rule


def user_texts(inters: dict[str, list[int]], items: list[dict], seed: int, found: Found | None = None) -> dict:
    """The content of `<D>.user.json` (DESIGN: formats), with the texts that are `found` and the others by rule."""
    splits: dict[str, dict] = {"train": {}, "test": {}}
    content: dict = {"user_explicit_preference": {}, "user_vague_intention": splits}
    for number, (user, history) in enumerate(inters.items()):
        entries = [items[i] for i in history]
        given = found(user, "preference") if found else None
        content["user_explicit_preference"][user] = given or preferences(entries[: -HELD_OUT["preference"]])
        for split, rows in splits.items():
            place = len(history) - HELD_OUT[split]
            given = found(user, split) if found else None
            rng = np.random.default_rng([seed, number, place])
            rows[user] = {
                "item": history[place],
                "inters": history[:place],
                "querys": given or queries(entries[place], entries[:place], rng),
            }
    return content


# ---- texts of a language model ----


def parsed(request: TextRequest, sources: Sources, answers: AnswerFile, tries: int) -> list[str] | None:
    """The texts of the first answer (of `tries`) that is well formed."""
    items = sources.inters[request.user]
    title = sources.items[items[len(items) - HELD_OUT[request.kind]]]["title"]
    for answer in answers.answers.get(request.key, [])[:tries]:
        if texts := parse_answer(answer, request.kind, title):
            return texts
    return None


def ask_all(requests: list[TextRequest], sources: Sources, answers: AnswerFile, writer: Any, tries: int) -> None:
    """Ask for what is not answered yet, and again, `tries` times in all, where an answer is malformed."""
    from tqdm import tqdm

    for attempt in range(tries):
        unanswered = {
            request.key: request
            for request in requests
            if len(answers.answers.get(request.key, [])) == attempt and not parsed(request, sources, answers, tries)
        }  # by key: equal questions are asked once

        def questions(open_requests: dict[str, TextRequest] = unanswered) -> Iterator[Ask]:
            for key, request in open_requests.items():
                yield key, prompt_of(sources, request.user, request.kind)

        with tqdm(total=len(unanswered), unit="answer", disable=None, desc=f"ask, turn {attempt + 1}") as bar:

            def keep(key: str, answer: str, tokens: dict[str, int], bar: Any = bar) -> None:
                answers.keep(key, answer, tokens)
                bar.update()

            if unanswered:
                writer.ask(questions(), SYSTEM, attempt, keep)


def estimate(requests: list[TextRequest], sources: Sources, answers: AnswerFile, options: argparse.Namespace) -> None:
    """Print how many calls are to be made, their tokens and their price."""
    unanswered = {
        request.key: request
        for request in requests
        if len(answers.answers.get(request.key, [])) < options.tries
        and not parsed(request, sources, answers, options.tries)
    }
    letters = sum(len(SYSTEM) + len(prompt_of(sources, r.user, r.kind)) for r in unanswered.values())
    tokens = letters // LETTERS_A_TOKEN
    usual, most = USUAL_ANSWER * len(unanswered), options.max_tokens * len(unanswered)
    say(f"{len(unanswered):,} calls for {len(requests):,} texts (equal questions are asked once, answers are kept)")
    say(f"about {tokens:,} tokens in the questions, about {usual:,} in the answers, {most:,} at most")
    if options.price_in is None or options.price_out is None:
        say("--price_in and --price_out (dollars for a million tokens) give the cost")
    else:
        cost = [(tokens * options.price_in + count * options.price_out) / 1e6 for count in (usual, most)]
        say(f"about ${cost[0]:,.2f}, ${cost[1]:,.2f} with the longest answers; malformed ones are asked again on top")


def texts_by_model(sources: Sources, target: Path, options: argparse.Namespace) -> tuple[Found, dict[str, Any]] | None:
    """Ask the endpoint or the local model: what was found, and the record of it. None after `--dry_run`."""
    writer = writer_of(options)
    model = options.model or options.local_model
    secret = getattr(writer, "secret", "")
    answers = AnswerFile(target.with_name(f"{target.stem}.answers.jsonl"), secret)
    requests = list(requests_of(sources, model))
    if options.dry_run:
        estimate(requests, sources, answers, options)
        return None
    ask_all(requests, sources, answers, writer, options.tries)
    found = {(r.user, r.kind): texts for r in requests if (texts := parsed(r, sources, answers, options.tries))}
    by_rule = Counter(r.kind for r in requests if (r.user, r.kind) not in found)
    nobody = len(sources.inters) * len(TEXT_KINDS) - len(requests)
    say(
        f"{len(found):,} texts by {model}; tokens paid now: {answers.tokens['prompt']:,} + {answers.tokens['answer']:,}"
    )
    if by_rule:
        count = ", ".join(f"{by_rule[kind]:,} {kind}" for kind in TEXT_KINDS if by_rule[kind])
        say(f"note: by rule, as no answer was well formed: {count}; refused by the endpoint: {writer.refused:,} calls")
    record = {
        "method": "endpoint" if options.base_url else "local_model",
        "model": model,
        "texts_by_model": len(found),
        "texts_by_rule": {kind: by_rule[kind] for kind in TEXT_KINDS} | {"without_history": nobody},
    }
    if options.base_url:
        record["base_url"] = writer.place
    return lambda user, kind: found.get((user, kind)), record


def writer_of(options: argparse.Namespace) -> Endpoint | LocalModel:
    """Who is asked, as the flags say. Raises UserError."""
    if options.local_model:
        import torch

        device = "cuda" if torch.cuda.is_available() else "cpu"
        settings = (options.batch_size, options.max_tokens, options.temperature, options.seed)
        return LocalModel(options.local_model, *settings, device, options.dtype)
    settings = {"temperature": options.temperature, "max_tokens": options.max_tokens, "seed": ATTEMPT}
    if options.settings:
        settings = parse_settings(options.settings)
    limits = (options.concurrency, options.retries, options.timeout)
    endpoint = Endpoint(options.base_url, options.model, *limits, settings)
    endpoint.check()
    return endpoint


def parse_settings(text: str) -> dict[str, Any]:
    """`--settings`: a JSON object without what every question sets itself. Raises UserError."""
    try:
        settings = parse_json(text.encode())
    except ValueError:
        settings = None
    if not isinstance(settings, dict) or settings.keys() & {"model", "messages", "stream", "n"}:
        raise UserError(f'--settings {text[:80]}: must be a JSON object such as {{"max_completion_tokens": 300}}')
    return settings


# ---- command line ----


def _parser() -> argparse.ArgumentParser:
    parser = make_parser(__doc__)
    parser.add_argument("--data_path", default="./data", help="folder that holds <dataset>/")
    parser.add_argument("--dataset", type=plain_name, required=True, help="name of the dataset")
    parser.add_argument("--seed", type=SEEDS, default=42, help="of the choice of title words, and of sampled answers")
    parser.add_argument("--overwrite", action="store_true", help="replace the file if it is there; kept answers stay")
    group = parser.add_argument_group("texts of a language model")
    group.add_argument("--base_url", help="OpenAI-compatible endpoint; its key is read from OPENAI_API_KEY")
    group.add_argument("--model", help="name of the endpoint's model")
    group.add_argument("--local_model", help="instead of an endpoint: folder or hub id of a causal LM, run here")
    group.add_argument("--reviews", type=Path, help="default: <D>.review.json, if it is there")
    group.add_argument("--concurrency", type=whole(1), default=8, help="questions on their way at once")
    group.add_argument(
        "--retries", type=whole(0), default=8, help="of a call that fails (429, 5xx, silence), ever later"
    )
    group.add_argument(
        "--timeout", type=real(0, below=1e6, above_low=True), default=60.0, help="seconds until silence is a failure"
    )
    group.add_argument(
        "--tries", type=whole(1), default=3, help="times that a question with malformed answers is asked"
    )
    group.add_argument("--max_tokens", type=whole(1), default=200, help="of an answer")
    group.add_argument(
        "--temperature", type=real(0, below=1e3), default=0.7, help="of sampling (local: from the second try on)"
    )
    of_endpoint = 'JSON object sent in place of temperature, max_tokens and seed: {"max_completion_tokens": 300}'
    group.add_argument("--settings", help=of_endpoint)
    group.add_argument("--batch_size", type=whole(1), default=8, help="questions answered at once (local)")
    dtypes = ("float32", "bfloat16", "float16")
    group.add_argument("--dtype", choices=dtypes, default="float32", help="of the weights (local)")
    group.add_argument("--dry_run", action="store_true", help="print calls, tokens and cost; ask and write nothing")
    group.add_argument("--price_in", type=real(0, below=1e9), help="dollars for a million tokens of questions")
    group.add_argument("--price_out", type=real(0, below=1e9), help="dollars for a million tokens of answers")
    return parser


def refuse_flags(options: argparse.Namespace) -> None:
    """Refuse flags that do not go together. Raises UserError."""
    if options.base_url and options.local_model:
        raise UserError("--base_url and --local_model: give one of them")
    if bool(options.base_url) != bool(options.model):
        raise UserError("--base_url and --model: give both")
    if options.dry_run and not (options.base_url or options.local_model):
        raise UserError("--dry_run: texts by rule cost nothing; give --base_url and --model")


def main(argv: list[str] | None = None) -> None:
    options = _parser().parse_args(argv)
    refuse_flags(options)
    stem = Path(options.data_path) / options.dataset / options.dataset
    target = Path(f"{stem}.user.json")
    if target.exists() and not options.overwrite and not options.dry_run:
        raise UserError(f"{target} is there already; --overwrite replaces it")
    note = record_path(options.data_path, options.dataset)
    titles, _ = read_items(Path(f"{stem}.item.json"))
    inters = read_inters(Path(f"{stem}.inter.json"), len(titles))
    entries = read_json(f"{stem}.item.json")
    items = [entries[str(i)] for i in range(len(entries))]
    found, record, inputs = None, {"method": "rule"}, [Path(f"{stem}.inter.json"), Path(f"{stem}.item.json")]
    if options.base_url or options.local_model:
        path = options.reviews or Path(f"{stem}.review.json")
        reviews = read_reviews(path, inters) if options.reviews or os.path.lexists(path) else {}
        with (
            contextlib.nullcontext() if options.dry_run else locked(target)
        ):  # two at once would pay for each answer twice
            result = texts_by_model(Sources(inters, items, reviews), target, options)
        if result is None:
            return
        found, record = result
        record["reviews"] = bool(reviews)
        inputs += [path] if reviews else []
    made_by = {"program": "data_process/user_texts.py", "seed": options.seed} | record
    write_json(target, {"made_by": made_by} | user_texts(inters, items, options.seed, found), indent=1)
    note_made(note, "data_process/user_texts.py", [target], inputs)
    say(f"{target}: preferences and intentions of {len(inters):,} users, made by {record.get('model', 'rule')}")


if __name__ == "__main__":
    run_main(main)
