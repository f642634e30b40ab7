"""Scoring a checkpoint on a test split: what test.py (one process) and test_ddp.py (any number) have in common.

The samples of a prompt are sorted by length and cut into batches before these are dealt out, so the numbers do not depend on
how many processes there are. Each process appends its predictions to a file of its own in `<results stem>.partial/`; the same
command after an interruption goes on from these. At the end the main process puts them together: predictions beside the
results file, then the results, both atomically.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

from arguments import add_data, add_global, add_test, make_parser
from beam_rows import PrefixCache
from collator import encode_prompts, pad
from data import RecData, load_data
from decoding import beam_search, pack_linears
from evaluate import check_metrics, ranks_of, summarise, too_long
from metrics.ranking import means, rank_of
from modeling import DTYPES, find_checkpoint, item_trie, load_for_test, pick_device
from prompt import SLOT, Prompts, Template, load_prompts
from samples import TestSet
from tasks import TASKS, TEST_TASKS, HistoryFormat
from utils import (
    UserError,
    atomic_path,
    is_main,
    local_rank,
    rank,
    read_json,
    say,
    set_seed,
    sha256,
    versions,
    world_size,
    write_json,
)

# How many prompts `--test_batch_size auto` takes on the CPU, where more bring no more speed.
CPU_BATCH = 32
# Arguments that change how a run goes, not what it finds: a resumed run may have other ones.
FREE = {"base_model", "ckpt_path", "data_path", "filter_items", "gpu_id", "metrics", "output_dir", "restart"}
FREE |= {"results_file", "test_batch_size", "test_prompt_ids", "prompt_file", "index_file", "test_task"}
# Arguments of the data group that concern training alone.
TRAINING = {"tasks", "only_train_response", "train_prompt_sample_num", "train_data_sample_num", "valid_prompt_id"}
TRAINING |= {"sample_valid", "valid_prompt_sample_num", "longest_history_only"}
# Arguments that should be at test time what they were in training.
PROMPT_FLAGS = ("max_his_len", "add_prefix", "his_sep", "no_eos", "prompt_file")


def make_test_parser(description: str) -> argparse.ArgumentParser:
    """The flags of test.py and test_ddp.py."""
    parser = make_parser(description)
    add_global(parser)
    add_data(parser)
    add_test(parser)
    group = parser.add_argument_group("precision")
    choices = ("auto", *DTYPES)
    group.add_argument("--dtype", choices=choices, default="auto", help="auto: bfloat16 on a GPU, float32 on the CPU")
    return parser


def run(args: argparse.Namespace, single: bool) -> dict[str, Any]:
    """Score the checkpoint as `args` say; returns the results (on the main process; elsewhere {}).

    Args:
        single: this is test.py: one process, on GPU `--gpu_id`.

    Raises:
        UserError: a flag, a file or the checkpoint does not fit, or earlier results would be overwritten.
    """
    task = check_flags(args, single)
    start_processes()
    device = pick_device(args.gpu_id if single else None)
    set_seed(args.seed)
    data = load_data(args.data_path, args.dataset, args.index_file, TASKS[task].splits["test"].user_parts)
    prompts = load_prompts(args.prompt_file)
    prompt_ids = choose_prompts(prompts, task, args.test_prompt_ids)
    form = HistoryFormat(args.max_his_len, args.add_prefix, args.his_sep)
    samples = TestSet(data, task, form, seed=args.seed)
    numbers = choose_samples(len(samples), args.sample_num, args.seed)
    items = min(args.num_beams, len(set(data.canonical)))
    for name in too_long(args.metrics, items):
        say(f"note: {name} is taken from lists of {items} items only")

    find_checkpoint(args.ckpt_path, args.lora)  # before anything is said about earlier results
    config = describe(args, data, prompts, task, prompt_ids, device)
    store = Store(args.results_file, [(prompt, sample) for prompt in prompt_ids for sample in numbers])
    missing = store.open(config, args.restart)
    note_other_training(args)
    if missing:
        dtype = DTYPES.get(args.dtype)
        model, tokenizer = load_for_test(args.ckpt_path, args.base_model, args.lora, device, dtype)
        pack_linears(model)
        scorer = Scorer(model, tokenizer, data, args.num_beams, args.test_batch_size, args.no_eos)
        progress = Progress(len(missing), args.metrics)
        for prompt in prompt_ids:
            template = prompts.of(task)[prompt]
            for records in score_prompt(scorer, prompt, template, prompts, samples, numbers, missing):
                store.append(records)
                progress.add(records)
        progress.close()
    results = store.close(config, args.metrics, args.test_prompt_ids)
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
    if args.num_beams < 1:
        raise UserError(f"--num_beams {args.num_beams}: at least 1")
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
    template: Template,
    prompts: Prompts,
    samples: TestSet,
    numbers: list[int],
    missing: set[tuple[int, int]],
) -> Iterator[list[dict[str, Any]]]:
    """Predict the samples `numbers` with one template; yields this process's records, batch by batch.

    Batches are made of all samples, whatever is `missing`, so a resumed run has those of an uninterrupted one.
    """
    wanted = {place for place, number in enumerate(numbers) if (prompt, number) in missing}
    if not wanted:
        return
    texts = [prompts.prompt(template, samples[number].slots) for number in numbers]
    for places, found in scorer.score(texts, wanted):
        yield [
            record(scorer.data, prompt, numbers[place], samples[numbers[place]], items, scores)
            for place, (items, scores) in zip(places, found, strict=True)
        ]


# ---- processes ----


def start_processes() -> None:
    """Join the other processes (gloo: only small objects travel, and only at the beginning and at the end)."""
    if world_size() > 1 and not dist.is_initialized():
        # The end waits for the slowest process; one that dies breaks its connections, which ends the others at once.
        dist.init_process_group("gloo", timeout=timedelta(days=30))


def on_main(function: Callable[[], Any]) -> Any:
    """What `function` returns on the main process, on all processes; its `UserError` ends them all, told once."""
    outcome: list[Any] = [None, None]
    if is_main():
        try:
            outcome = [function(), None]
        except UserError as error:
            outcome = [None, str(error)]
    if world_size() > 1:
        dist.broadcast_object_list(outcome)
    if outcome[1] is not None:
        if is_main():
            raise UserError(outcome[1])
        sys.exit(2)
    return outcome[0]


# ---- what is to be scored ----


def choose_prompts(prompts: Prompts, task: str, wanted: str) -> list[int]:
    """The template numbers that `--test_prompt_ids` names, in its order.

    Raises:
        UserError: a number does not exist, or its template does not answer with an item.
    """
    templates = prompts.of(task)
    fitting = [number for number, template in enumerate(templates) if template.response.startswith("{item}")]
    if wanted.strip().lower() == "all":
        if not fitting:
            raise UserError(f"no template of {task} answers with an item")
        return fitting
    parts = [part.strip() for part in wanted.split(",") if part.strip()]
    if not parts or not all(part.isdecimal() for part in parts):
        raise UserError(f"--test_prompt_ids {wanted!r}: write numbers separated by commas, or all")
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


def choose_samples(total: int, wanted: int, seed: int) -> list[int]:
    """All sample numbers, or `wanted` of them drawn by `seed`, ascending."""
    if wanted < 0 or wanted >= total:
        return list(range(total))
    if wanted == 0:
        raise UserError("--sample_num 0: nothing to test; -1 tests all")
    return sorted(np.random.default_rng(seed).choice(total, wanted, replace=False).tolist())


def describe(
    args: argparse.Namespace, data: RecData, prompts: Prompts, task: str, prompt_ids: list[int], device: torch.device
) -> dict[str, Any]:
    """What the results depend on, for the record and for noticing that a resumed run is another one."""
    arguments = {key: value for key, value in vars(args).items() if key not in TRAINING}
    templates = [prompts.of(task)[number] for number in prompt_ids]
    frame = json.dumps([prompts.frame, [[t.instruction, t.response] for t in templates]])
    return {
        "arguments": arguments,
        "task": task,
        "prompt_ids": prompt_ids,
        "prompts_sha256": hashlib.sha256(frame.encode()).hexdigest(),
        "data_sha256": {name: sha256(path) for name, path in sorted(data.files.items())},
        "checkpoint": fingerprint(args.ckpt_path),
        "base": fingerprint(args.base_model) if args.lora else None,
        "items_that_share_an_index": data.shared_items,
        "device": device.type,
        "versions": versions("torch", "transformers", "peft"),
    }


def identity(config: dict[str, Any]) -> dict[str, Any]:
    """The part of `config` that a resumed run must share."""
    free = {key: value for key, value in config["arguments"].items() if key not in FREE}
    kept = ("task", "prompt_ids", "prompts_sha256", "data_sha256", "checkpoint", "base", "device")
    flat = {f"--{key}": value for key, value in free.items()} | {key: config[key] for key in kept}
    flat |= {f"data file {name}": value for name, value in flat.pop("data_sha256").items()}
    return flat


def fingerprint(folder: str, blocks: int = 64, block: int = 1 << 16) -> str:
    """A SHA-256 over a checkpoint's file names, sizes and contents: whole small files, `blocks` samples of large ones.

    Reading 64 blocks instead of 13 GB takes no time, and no two trainings agree on any of them.
    """
    path = Path(folder)
    if not path.is_dir():
        return f"hub:{folder}"
    digest = hashlib.sha256()
    weights = ("*.safetensors", "*.bin", "*.pt", "*config.json", "tokenizer*", "added_tokens.json")
    for file in sorted({file for pattern in weights for file in path.glob(pattern)}):
        size = file.stat().st_size
        digest.update(f"{file.name}\0{size}\0".encode())
        with open(file, "rb") as content:
            step = max(block, size // blocks)
            for start in range(0, size, step):
                content.seek(start)
                digest.update(content.read(block))
    return digest.hexdigest()


def record(data: RecData, prompt: int, number: int, sample: Any, items: list[int], scores: list[float]) -> dict:
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


# ---- decoding ----


def note_other_training(args: argparse.Namespace) -> None:
    """Say which flags of the prompts differ from those that the checkpoint was trained with, as its `run.json` tells."""
    source = Path(args.ckpt_path) / "run.json"
    if not source.is_file():
        return
    trained = read_json(source)
    trained = trained.get("arguments") if isinstance(trained, dict) else None
    for flag in PROMPT_FLAGS if isinstance(trained, dict) else ():
        here, there = getattr(args, flag), trained.get(flag, getattr(args, flag))
        if flag == "prompt_file":
            here, there = (str(path and Path(str(path)).name) for path in (here, there))
        if here != there:
            say(f"note: --{flag} is {here!r} here, but {source} says that the model was trained with {there!r}")


@dataclass
class Scorer:
    """A model with the items' trie: prompts in, ranked items out."""

    model: Any
    tokenizer: Any
    data: RecData
    num_beams: int
    batch_size: int | str = 1
    no_eos: bool = False

    def __post_init__(self) -> None:
        self.device = next(self.model.parameters()).device
        self.trie = item_trie(self.tokenizer, self.data, self.no_eos).to(self.device)
        self.prefix: PrefixCache | None = None
        self.largest: int | None = None  # prompts that fit the memory, once too many did not
        self.free = on_main(self._free_memory) if self.batch_size == "auto" else 0

    def score(self, texts: list[str], wanted: set[int]) -> Iterator[tuple[list[int], list[tuple[list, list]]]]:
        """Decode this process's share of `texts`, batch by batch.

        Args:
            wanted: positions in `texts` that still lack a result. A batch is decoded whole if any of its texts does.

        Yields:
            positions in `texts`, and for each its items, best first, and their scores.
        """
        ids = encode_prompts(self.tokenizer, texts)
        self.share(ids)
        check_length(self.model, max(map(len, ids)) + self.trie.levels)
        batches = [batch for batch in self.batches(ids) if not wanted.isdisjoint(batch)]
        for batch in batches[rank() :: world_size()]:
            items, scores = self.decode([ids[n] for n in batch])
            yield batch, list(zip(items, scores, strict=True))

    def batches(self, ids: list[list[int]]) -> list[list[int]]:
        """Positions in `ids`, longest first, in batches of prompts of similar length."""
        order = sorted(range(len(ids)), key=lambda n: (-len(ids[n]), n))
        size = self.batch_size
        if size == "auto":
            size = self.auto_size(len(ids[order[0]]))
        return [order[start : start + size] for start in range(0, len(order), size)]

    def share(self, ids: list[list[int]]) -> None:
        """Read what all of `ids` begin with, once for all of their batches."""
        common = os.path.commonprefix(ids)[: min(map(len, ids)) - 1]
        self.prefix = PrefixCache(self.model, common) if common else None

    def _free_memory(self) -> int:
        return torch.cuda.mem_get_info(self.device)[0] if self.device.type == "cuda" else 0

    def auto_size(self, longest: int) -> int:
        """How many prompts of `longest` tokens fit the memory that is free on the main process's GPU."""
        if self.device.type == "cpu":
            return CPU_BATCH
        config = self.model.config.get_text_config()
        width, layers, size = config.hidden_size, config.num_hidden_layers, self.model.dtype.itemsize
        cache = 2 * layers * (longest + self.num_beams * self.trie.levels) * width * size  # as if no heads were shared
        logits = 3 * self.num_beams * config.vocab_size * 4
        activations = 12 * longest * width * size
        return max(1, min(512, int(0.8 * self.free / (2 * cache + logits + activations))))

    def decode(self, ids: list[list[int]]) -> tuple[list[list[int]], list[list[float]]]:
        """Items and scores of each prompt; what does not fit the memory is decoded in halves, never with fewer beams.

        Raises:
            UserError: a single prompt does not fit, or the model's numbers are not finite.
        """
        if self.largest is not None and len(ids) > self.largest:
            return self._halves(ids)
        try:
            tokens = pad(ids, 0, left=True).to(self.device)
            mask = pad([[1] * len(row) for row in ids], 0, left=True).to(self.device)
            items, scores = beam_search(self.model, self.trie, tokens, mask, self.num_beams, self.prefix)
            items, scores = items.tolist(), scores.tolist()
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            if len(ids) == 1:
                raise UserError(
                    f"one prompt of {len(ids[0])} tokens with {self.num_beams} beams exceeds memory"
                ) from error
        else:
            if not np.isfinite(scores).all():
                raise UserError("the model's log-probabilities are not finite; try --dtype float32 or bfloat16")
            return items, scores
        self.largest = len(ids) // 2
        print(f"note: out of memory with {len(ids)} prompts; going on with {self.largest}", file=sys.stderr, flush=True)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return self._halves(ids)

    def _halves(self, ids: list[list[int]]) -> tuple[list[list[int]], list[list[float]]]:
        half = (len(ids) + 1) // 2
        first, second = self.decode(ids[:half]), self.decode(ids[half:])
        return first[0] + second[0], first[1] + second[1]


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether `error` says that a GPU or the host has no memory left."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def check_length(model: Any, longest: int) -> None:
    """Raise a UserError if sequences of `longest` tokens exceed the model's positions."""
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if limit and longest > limit:
        raise UserError(f"a prompt with its answer has {longest} tokens, the model takes {limit}; lower --max_his_len")


# ---- keeping what is done ----


class Store:
    """The predictions of a run on disk: one growing file per process while it runs, one sorted file at its end."""

    def __init__(self, results_file: str, keys: list[tuple[int, int]]):
        self.results = Path(results_file)
        self.predictions = self.results.with_name(f"{self.results.stem}.predictions.jsonl")
        self.partial = self.results.with_name(f"{self.results.stem}.partial")
        self.keys = keys
        self.file: Any = None

    def open(self, config: dict[str, Any], restart: bool) -> set[tuple[int, int]]:
        """Find out what an earlier run left, and be ready to append; the keys (prompt, sample) that are missing.

        Raises:
            UserError: there are results of another run, and no `restart`.
        """
        token = on_main(lambda: self._prepare(config, restart))
        mark = self.partial / "token"
        self.shared = mark.is_file() and mark.read_text() == token  # else this node has a disk of its own
        if not self.shared and local_rank() == 0:
            self._prepare_own_disk(config, restart)
        if world_size() > 1:
            dist.barrier()
        done = set(self._lines()) if is_main() or not self.shared else set()
        if world_size() > 1:
            every: list[Any] = [None] * world_size()
            dist.all_gather_object(every, done)
            done = set().union(*every)
        missing = set(self.keys) - done
        if not missing:
            say("all predictions are there already (--restart makes them anew)")
        elif done:
            say(f"going on: {len(self.keys) - len(missing):,} of {len(self.keys):,} predictions are there")
        return missing

    def _prepare(self, config: dict[str, Any], restart: bool) -> str:
        if restart:
            self._remove_partial()
            self.results.unlink(missing_ok=True)
            self.predictions.unlink(missing_ok=True)
        made = self.partial / "config.json"
        if made.is_file():
            self._compare(made, read_json(made), config)
        elif self.results.exists() or self.predictions.exists():
            if not (self.results.exists() and self.predictions.exists()):
                there = self.results if self.results.exists() else self.predictions
                raise UserError(f"{there} exists; name another --results_file, or replace it with --restart")
            self._compare(self.results, read_json(self.results).get("config"), config)
        write_json(made, config)
        token = os.urandom(8).hex()
        (self.partial / "token").write_text(token)
        return token

    def _prepare_own_disk(self, config: dict[str, Any], restart: bool) -> None:
        """On a node that does not see the main process's folder: keep what an interrupted run of the same kind left."""
        made = self.partial / "config.json"
        if restart or not made.is_file() or identity(read_json(made)) != identity(json.loads(json.dumps(config))):
            self._remove_partial()
        write_json(made, config)

    @staticmethod
    def _compare(path: Path, before: Any, now: dict[str, Any]) -> None:
        try:
            old = identity(before)
        except (KeyError, TypeError):
            raise UserError(
                f"{path} is no result of this script; name another --results_file, or use --restart"
            ) from None
        new = identity(json.loads(json.dumps(now)))
        for key in sorted(old.keys() | new.keys()):
            if old.get(key) != new.get(key):
                raise UserError(
                    f"{path} was made with another {key.lstrip('-')} ({shorten(old.get(key))}, now {shorten(new.get(key))}); "
                    "name another --results_file, or throw the earlier predictions away with --restart"
                )

    def _lines(self) -> dict[tuple[int, int], str]:
        """The complete lines of all files that are there, by (prompt, sample); of repeated ones the first."""
        lines: dict[tuple[int, int], str] = {}
        for path in [self.predictions, *sorted(self.partial.glob("part-*.jsonl"))]:
            if path.is_file():
                with open(path, "rb") as file:
                    for line in file:
                        if line.endswith(b"\n"):  # a process that was killed may have left half a line
                            content = json.loads(line)
                            lines.setdefault((content["prompt_id"], content["sample"]), line.decode())
        return lines

    def append(self, records: list[dict[str, Any]]) -> None:
        """Add `records` to this process's file and hand them to the operating system."""
        if self.file is None:
            path = self.partial / f"part-{rank():05d}.jsonl"
            drop_half_line(path)
            self.file = open(path, "ab", buffering=0)  # noqa: SIM115  (open for as long as the run)
        self.file.write("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records).encode())

    def close(self, config: dict[str, Any], metrics: str, prompt_ids: str) -> dict[str, Any]:
        """Put the parts together and write predictions and results; the results on the main process, elsewhere {}."""
        if self.file is not None:
            self.file.close()
        if world_size() > 1:
            dist.barrier()  # all have written their last line before the main process reads them
        lines = self._lines() if is_main() or not self.shared else {}
        if world_size() > 1:
            every: list[Any] = [None] * world_size()
            dist.gather_object({} if self.shared and not is_main() else lines, every if is_main() else None)
            lines = {key: line for part in reversed(every) for key, line in (part or {}).items()}
        if is_main():
            results = self._write(lines, config, metrics, prompt_ids)
        if world_size() > 1:
            dist.barrier()
            dist.destroy_process_group()
        if is_main():
            self._remove_partial()
            return results
        if not self.shared:
            shutil.rmtree(self.partial, ignore_errors=True)
        return {}

    def _write(self, lines: dict, config: dict[str, Any], metrics: str, prompt_ids: str) -> dict[str, Any]:
        absent = [key for key in self.keys if key not in lines]
        if absent:
            raise RuntimeError(f"{len(absent)} predictions are missing, the first for prompt and sample {absent[0]}")
        with atomic_path(self.predictions) as path, open(path, "w", encoding="utf-8") as file:
            file.writelines(lines[key] for key in self.keys)
        ranks = ranks_of(json.loads(lines[key]) for key in self.keys)
        results = {"test_prompt_ids": prompt_ids, **summarise(ranks, metrics), "config": config}
        write_json(self.results, results)
        return results

    def _remove_partial(self) -> None:
        """Remove the partial folder; its configuration goes last, so that an interrupted removal is no other run's start."""
        for path in sorted(self.partial.glob("part-*.jsonl")):
            path.unlink()
        shutil.rmtree(self.partial, ignore_errors=True)


def drop_half_line(path: Path) -> None:
    """Cut the file after its last line feed."""
    if path.is_file():
        content = path.read_bytes()
        if not content.endswith(b"\n"):
            with open(path, "r+b") as file:
                file.truncate(content.rfind(b"\n") + 1)


def shorten(value: Any) -> str:
    """`value` for a message: digests are cut."""
    text = str(value)
    return text if len(text) <= 40 else f"{text[:12]}…"


class Progress:
    """Users per second, time left and metrics so far: a bar on a terminal, a line a minute elsewhere (main process)."""

    def __init__(self, total: int, metrics: str):
        self.metrics, self.total = metrics, total
        self.ranks: list[int] = []
        self.start = self.told = time.monotonic()
        self.bar = None
        if is_main() and sys.stderr.isatty():
            self.bar = tqdm(total=self.total, unit=" users", smoothing=0.05)

    def add(self, records: list[dict[str, Any]]) -> None:
        """Count `records`, which stand for as many of every process."""
        self.ranks += [rank_of(record["target"], record["items"]) for record in records]
        if not is_main():
            return
        now = time.monotonic()
        done = min(self.total, len(self.ranks) * world_size())
        if self.bar is not None:
            self.bar.set_postfix_str(self._figures(), refresh=False)
            self.bar.update(done - self.bar.n)
        elif now - self.told >= 60:
            self.told = now
            speed = done / (now - self.start)
            left = timedelta(seconds=round((self.total - done) / speed))
            say(f"{done:,} of {self.total:,} predictions, {speed:.1f} a second, {left} left; {self._figures()}")

    def _figures(self) -> str:
        found = means(self.ranks, self.metrics)
        return ", ".join(f"{name} {found[name]:.4f}" for name in list(found)[-3:])

    def close(self) -> None:
        """End the bar."""
        if self.bar is not None:
            self.bar.close()
