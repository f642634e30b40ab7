"""Test a checkpoint on a split: the body of test.py (one process) and test_ddp.py (any number)."""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

from arguments import (
    Role,
    add_data,
    add_global,
    add_test,
    comma_list,
    make_parser,
    parse_given,
    style_flags,
    with_role,
)
from data import RecData, load_data
from decoding import pack_linears
from folders import locked
from modeling import DTYPES, find_with_base, item_trie, load_for_test
from processes import join_for_scoring, on_main, pick_device
from prompt import SLOT, Prompts, Template
from prompt_style import PromptStyle, check_same_items, choose_style
from provenance import notes_of
from quiet import silence_libraries
from results import Expected, Store, check_metrics, too_long
from run_folder import model_fingerprint
from samples import TestSet
from scoring import Progress, Scorer
from tasks import TASKS, TEST_TASKS
from utils import UserError, say, set_seed, sha256, versions, world_size


def test_checkpoint(description: str, argv: list[str] | None, single: bool) -> dict[str, Any]:
    """Score a checkpoint as the command line says; returns the results (on the main process; elsewhere {}).

    Args:
        description: the script's docstring, for `--help`.
        single: this is test.py: one process, on GPU `--gpu_id`.

    Raises:
        UserError: a flag, a file or the checkpoint does not fit, or earlier results would be overwritten.
    """
    parser = make_parser(description)
    for add in (add_global, add_data, add_test):
        add(parser)
    args, given = parse_given(parser, argv)
    task = check_flags(args, single)
    silence_libraries()
    join_for_scoring()
    device = pick_device(args.gpu_id if single else None)
    set_seed(args.seed)
    found, args.lora, args.base_model = on_main(
        lambda: find_with_base(args.ckpt_path, args.lora, args.base_model, given)
    )
    folder = Path(found)
    style, chosen = choose_style(folder, style_flags(args), given)
    vars(args).update(chosen)
    data = load_data(args.data_path, args.dataset, args.index_file, TASKS[task].splits["test"].user_parts)
    check_same_items(folder, data, args.allow_other_index)
    prompt_ids = choose_prompts(style.prompts, task, args.test_prompt_ids)
    samples = TestSet(data, task, style.form, seed=args.seed)
    numbers = choose_samples(len(samples), args.sample_num, args.seed)
    length = min(args.num_beams, len(set(data.canonical)))
    for name in too_long(args.metrics, length):
        say(f"note: {name} is taken from lists of {length} items only")

    targets = {(p, n): data.canonical[samples[n].target] for p in prompt_ids for n in numbers}
    config = describe(args, data, style, task, prompt_ids, device, folder)
    store = Store(args.results_file, Expected(targets, len(data.titles), length), config, identity)
    with contextlib.ExitStack() as held:
        on_main(lambda: held.enter_context(locked(args.results_file)))
        missing = store.open(args.restart)
        if missing:
            try:
                model, tokenizer = load_for_test(folder, args.base_model, args.lora, device, DTYPES.get(args.dtype))
                pack_linears(model)
                trie = item_trie(tokenizer, data, style.no_eos)
                scorer = Scorer(model, tokenizer, trie, args.num_beams, args.test_batch_size)
                progress = Progress(len(missing), args.metrics)
                for prompt in prompt_ids:
                    score_prompt(scorer, prompt, style.prompts, data, samples, numbers, missing, store, progress)
                progress.close()
            except UserError:
                store.give_up()
                raise
        results = store.close(args.metrics, args.test_prompt_ids)
    if results:
        say(json.dumps({key: results[key] for key in ("mean_results", "min_results", "max_results")}, indent=2))
        say(f"results: {args.results_file}; predictions: {store.predictions}")
    return results


def check_flags(args: argparse.Namespace, single: bool) -> str:
    """The task that `args` name. Raises UserError where flags are wrong by themselves."""
    task = args.test_task.lower()
    if task not in TEST_TASKS:
        raise UserError(f"--test_task {args.test_task}: write SeqRec, ItemSearch or FusionSeqRec")
    check_metrics(args.metrics)
    if above := too_long(args.metrics, args.num_beams):
        raise UserError(
            f"--metrics {above[0]}: its k is above --num_beams {args.num_beams}; rank more items or lower k"
        )
    if not args.ckpt_path:
        raise UserError("--ckpt_path is missing: the folder of the checkpoint to test")
    if single and world_size() > 1:
        raise UserError("test.py is for one process; use test_ddp.py with torchrun")
    if args.filter_items:
        say("note: --filter_items changes nothing: only items that exist are ever generated")
    return task


def score_prompt(
    scorer: Scorer,
    prompt: int,
    prompts: Prompts,
    data: RecData,
    samples: TestSet,
    numbers: list[int],
    missing: set[tuple[int, int]],
    store: Store,
    progress: Progress,
) -> None:
    """Predict the samples `numbers` by one template, and store this process's records, batch by batch.

    Batches are made of all samples, whatever is `missing`, so a resumed run has those of an uninterrupted one.
    """
    wanted = {place for place, number in enumerate(numbers) if (prompt, number) in missing}
    if not wanted:
        return
    template = prompts.of(samples.task)[prompt]
    texts = [prompts.prompt(template, samples[number].slots) for number in numbers]
    for places, found in scorer.score(texts, wanted):
        records = [
            prediction(data, prompt, numbers[place], samples[numbers[place]], items, scores)
            for place, (items, scores) in zip(places, found, strict=True)
        ]
        store.append(records)
        progress.add(records)


def prediction(data: RecData, prompt: int, number: int, sample: Any, items: list[int], scores: list[float]) -> dict:
    """One line of the predictions file."""
    return {
        "prompt_id": prompt,
        "sample": number,
        "user": sample.user,
        "target": data.canonical[sample.target],
        "target_item": sample.target,
        "items": items,
        "scores": [round(score, 6) for score in scores],
    }


# ---- what is to be scored ----


def choose_prompts(prompts: Prompts, task: str, wanted: str) -> list[int]:
    """The template numbers that `--test_prompt_ids` names, in its order.

    Raises:
        UserError: a number does not exist, or its template does not answer with an item.
    """
    templates = prompts.of(task)
    fitting = [number for number, template in enumerate(templates) if answers_with_item(template)]
    if wanted.strip().lower() == "all":
        if not fitting:
            raise UserError(f"no template of {task} answers with an item")
        return fitting
    parts = comma_list(wanted)
    if not parts or not all(part.isascii() and part.isdecimal() and len(part) < 10 for part in parts):
        raise UserError(f"--test_prompt_ids {wanted[:40]!r}: write numbers separated by commas, or all")
    for part in parts:
        if int(part) >= len(templates):
            raise UserError(f"--test_prompt_ids: {task} has the templates 0 to {len(templates) - 1}, not {part}")
        if int(part) not in fitting:
            answer = ", ".join(SLOT.findall(templates[int(part)].response)) or "a fixed text"
            raise UserError(
                f"--test_prompt_ids: template {part} of {task} answers with {answer}, and only items can be ranked; "
                f"those that answer with an item are {', '.join(map(str, fitting))}"
            )
    return list(dict.fromkeys(map(int, parts)))


def answers_with_item(template: Template) -> bool:
    """Whether the answer of `template` begins with an item's index."""
    return template.response.startswith("{item}")


def choose_samples(total: int, wanted: int, seed: int) -> list[int]:
    """All sample numbers, or `wanted` of them drawn by `seed`, ascending."""
    if wanted < 0 or wanted >= total:
        return list(range(total))
    return sorted(np.random.default_rng(seed).choice(total, wanted, replace=False).tolist())


def describe(
    args: argparse.Namespace,
    data: RecData,
    style: PromptStyle,
    task: str,
    prompt_ids: list[int],
    device: torch.device,
    folder: Path,
) -> dict[str, Any]:
    """What the results depend on, for the record and for noticing that a resumed run is another one."""
    templates = [style.prompts.of(task)[number] for number in prompt_ids]
    frame = json.dumps([style.prompts.frame, [[t.instruction, t.response] for t in templates]])
    training = with_role(Role.TRAINING)
    return {
        "argv": sys.argv,
        "processes": world_size(),
        "arguments": {key: value for key, value in vars(args).items() if key not in training},
        "task": task,
        "prompt_ids": prompt_ids,
        "prompts_sha256": hashlib.sha256(frame.encode()).hexdigest(),
        "data_sha256": {name: sha256(path) for name, path in sorted(data.files.items())},
        "made": notes_of(data.folder, data.name, args.index_file),
        "checkpoint": on_main(lambda: model_fingerprint(folder)),
        "base": on_main(lambda: model_fingerprint(args.base_model)) if args.lora else None,
        "items_that_share_an_index": data.shared_items,
        "device": device.type,
        "versions": versions("torch", "transformers", "peft"),
    }


def identity(config: dict[str, Any]) -> dict[str, Any]:
    """The part of `config` that a resumed run must share."""
    free = with_role(Role.FREE)
    flat = {f"--{key}": value for key, value in config["arguments"].items() if key not in free}
    kept = ("task", "prompt_ids", "prompts_sha256", "checkpoint", "base", "device")
    flat |= {key: config[key] for key in kept}
    return flat | {f"data file {name}": value for name, value in config["data_sha256"].items()}
