"""Users per second of constrained beam search, against transformers' generate and against a plain forward pass.

    python benchmarks/bench_decode.py                       # SmolLM2-135M and a tiny LLaMA, two threads, float32
    python benchmarks/bench_decode.py --models smollm2 --users 64 --device cuda --dtype bfloat16

Measured in turn, on the same prompts (template 0 of seqrec over real test histories):

a  generate with `prefix_allowed_tokens_fn` and one set of tokens per position, one user at a time (LC-Rec's original way)
b  generate with `prefix_allowed_tokens_fn` and a prefix trie, one user at a time
c  decoding.beam_search, batches by length, weights packed for the CPU: as test.py does it
d  one forward pass over the prompts in the same batches, logits of the last position only: nothing is decoded

Histories are those of `../shared/data/Office` (Amazon 2018) if that is there, else of MovieLens-100k. The index is random
(4 levels of 256 codes, no two items alike), so the benchmark runs from a fresh clone. Lists of b and c are compared.
"""

from __future__ import annotations

import copy
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from arguments import make_parser
from beam_rows import PrefixCache
from collator import encode_prompts, pad
from data import RecData, load_data
from data_process import base_model, from_recbole
from data_process.fetch import fetch
from decoding import beam_search, pack_linears
from flag_values import SEEDS, whole
from modeling import DTYPES, add_item_tokens, grow_vocabulary, item_token_ids, load_model, load_tokenizer
from prompt import load_prompts
from samples import TestSet
from tasks import HistoryFormat
from trie import ItemTrie
from utils import run_main, set_seed, versions, write_json

OFFICE = Path(__file__).resolve().parents[2] / "shared/data/Office"


def real_data(folder: Path, seed: int) -> RecData:
    """Office or MovieLens-100k with a random index, written to `folder` and read as the scripts read it."""
    name = "Office"
    if OFFICE.is_dir():
        (folder / name).mkdir()
        for kind in ("inter", "item"):
            (folder / f"{name}/{name}.{kind}.json").symlink_to(OFFICE / f"{name}.{kind}.json")
    else:
        name = "ml-100k"
        print(f"{OFFICE} is absent: MovieLens-100k instead")
        source = str(fetch(name))
        from_recbole.main(["--source", source, "--data_path", str(folder), "--dataset", name, "--k_core", "5"])
    items = len(json.loads((folder / f"{name}/{name}.item.json").read_text(encoding="utf-8")))
    codes = np.random.default_rng(seed).choice(256**4, items, replace=False)
    index = {
        str(item): [f"<{'abcd'[level]}_{code >> 8 * level & 255}>" for level in range(4)]
        for item, code in enumerate(codes.tolist())
    }
    write_json(folder / f"{name}/{name}.index.json", index)
    return load_data(str(folder), name)


def make_model(kind: str, data: RecData, folder: Path, options: Any) -> tuple[Any, Any]:
    """A base model (made on the spot, or that of the folder `kind`) with the item tokens added, and its tokenizer."""
    base = folder / kind if kind in ("tiny", "smollm2") else Path(kind)
    if kind == "smollm2":
        base_model.main(["smollm2", "--target", str(base)])
    elif kind == "tiny":
        place = ["--data_path", str(data.folder.parent), "--dataset", data.name]
        base_model.main(["tiny", *place, "--target", str(base)])
    tokenizer, model = load_tokenizer(base), load_model(base, torch.float32)
    new_ids = add_item_tokens(tokenizer, data.item_tokens)
    torch.manual_seed(options.seed)
    grow_vocabulary(model, tokenizer, new_ids)
    return model.to(options.device, DTYPES[options.dtype]).eval(), tokenizer


def choose(ids: list[list[int]], count: int, tokens: int) -> list[list[int]]:
    """The `count` prompts whose lengths are nearest to `tokens`, longest first, or (0) as many evenly over all lengths.

    A real run has thousands of prompts, so the batches that are cut from them by length are as even as the former.
    """
    if tokens:
        return sorted(sorted(ids, key=lambda row: abs(len(row) - tokens))[:count], key=len, reverse=True)
    ordered = sorted(ids, key=len, reverse=True)
    return [ordered[int((n + 0.5) * len(ordered) / count)] for n in range(count)]


class Ways:
    """The four ways to be timed, each a function of prompts (token ids, longest first)."""

    def __init__(self, model: Any, tokenizer: Any, data: RecData, options: Any):
        self.model, self.options, self.device = model, options, options.device
        self.packed = copy.deepcopy(model)  # as test.py uses it
        pack_linears(self.packed)
        self.rows = item_token_ids(tokenizer, data)
        self.eos, self.pad_id = tokenizer.eos_token_id, tokenizer.pad_token_id
        self.trie = ItemTrie(self.rows, self.eos).to(self.device)
        self.item_of = {row: item for item, row in enumerate(self.rows)}
        levels = len(self.rows[0])
        self.sets = [sorted({row[level] for row in self.rows}) for level in range(levels)] + [[self.eos]]
        follow: dict[tuple[int, ...], set[int]] = {}
        for row in self.rows:
            for level in range(levels + 1):
                follow.setdefault(row[:level], set()).add((*row, self.eos)[level])
        self.follow = {prefix: sorted(tokens) for prefix, tokens in follow.items()}

    def _generate(self, prompts: list[list[int]], allowed: Callable[[list[int]], list[int]]) -> list[list[int]]:
        lists = []
        for prompt in prompts:
            ids, start = torch.tensor([prompt], device=self.device), len(prompt)
            output = self.model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                num_beams=self.options.num_beams,
                num_return_sequences=self.options.num_beams,
                do_sample=False,
                length_penalty=0.0,
                early_stopping=True,
                max_new_tokens=len(self.sets),
                eos_token_id=self.eos,
                pad_token_id=self.pad_id,
                prefix_allowed_tokens_fn=lambda _, row, start=start: allowed(row[start:].tolist()),
            )
            answers = output[:, start:].tolist()
            lists.append([self.item_of.get(tuple(answer[: len(self.sets) - 1]), -1) for answer in answers])
        return lists

    def a(self, prompts: list[list[int]]) -> list[list[int]]:
        """generate, a set of tokens per position."""
        return self._generate(prompts, lambda row: self.sets[len(row)])

    def b(self, prompts: list[list[int]]) -> list[list[int]]:
        """generate, a trie; a beam whose prefix is none (generate keeps -inf beams) may end."""
        return self._generate(prompts, lambda row: self.follow.get(tuple(row), [self.eos]))

    def _batches(self, prompts: list[list[int]]) -> Any:
        size = self.options.batch_size
        for start in range(0, len(prompts), size):
            batch = prompts[start : start + size]
            yield (
                pad(batch, 0, left=True).to(self.device),
                pad([[1] * len(row) for row in batch], 0, left=True).to(self.device),
            )

    def c(self, prompts: list[list[int]]) -> list[list[int]]:
        """decoding.beam_search, as scoring.py calls it."""

        prefix = PrefixCache(self.packed, os.path.commonprefix(prompts)[: min(map(len, prompts)) - 1])
        lists = []
        for ids, mask in self._batches(prompts):
            lists += beam_search(self.packed, self.trie, ids, mask, self.options.num_beams, prefix)[0].tolist()
        return lists

    @torch.inference_mode()
    def d(self, prompts: list[list[int]]) -> list[list[int]]:
        """A forward pass and nothing else."""
        for ids, mask in self._batches(prompts):
            positions = (mask.cumsum(1) - 1).clamp(min=0)
            self.model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False, logits_to_keep=1)
        return []


def seconds(way: Callable, prompts: list[list[int]], options: Any) -> tuple[float, list[list[int]]]:
    """Seconds per user of one call, and its lists."""
    clock = time.process_time if options.clock == "cpu" else time.perf_counter
    start = clock()
    lists = way(prompts)
    if options.device != "cpu":
        torch.cuda.synchronize()
    return (clock() - start) / len(prompts), lists


def compare(kind: str, ways: Ways, prompts: list[list[int]], options: Any) -> None:
    """Time the four ways in turn, and print figures and ratios."""
    few = prompts[:: max(1, len(prompts) // options.slow_users)]
    for way in (ways.c, ways.d):  # warm up
        way(prompts[:2])
    times: dict[str, list[float]] = {name: [] for name in "abcd"}
    lists: dict[str, list[list[int]]] = {}
    for turn in range(options.repeat):
        for name in "acd" if turn else "abcd":
            spent, lists[name] = seconds(getattr(ways, name), few if name in "ab" else prompts, options)
            times[name].append(spent)
            print(f"  {kind}, turn {turn + 1}, ({name}): {spent:.3f} s a user", file=sys.stderr, flush=True)
    middle = {name: statistics.median(values) for name, values in times.items()}
    ours = dict(zip(map(tuple, prompts), lists["c"], strict=True))
    same = sum(ours[tuple(prompt)] == wanted for prompt, wanted in zip(few, lists["b"], strict=True))
    tokens = sum(map(len, prompts)) / len(prompts)
    print(
        f"\n{kind}: {ways.model.num_parameters():,} parameters, {len(prompts)} users ({len(few)} for a and b), "
        f"{tokens:.0f} tokens a prompt, {options.num_beams} beams, batches of {options.batch_size}"
    )
    what = {"a": "generate, sets per position", "b": "generate, trie", "c": "beam_search", "d": "forward pass alone"}
    for name, text in what.items():
        print(f"  ({name}) {text:<28} {1 / middle[name]:9.3f} users/s  {middle[name] * 1000:10.1f} ms a user")
    print(
        f"  (c) is {middle['a'] / middle['c']:.1f} x (a), {middle['b'] / middle['c']:.1f} x (b), "
        f"and takes {middle['c'] / middle['d']:.2f} x the time of (d); {same} of {len(few)} lists equal (b)'s"
    )


def main(argv: list[str] | None = None) -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--models", default="tiny,smollm2", help="tiny, smollm2 or a base model's folder, by commas")
    parser.add_argument("--users", type=whole(1), default=32, help="users for c and d")
    parser.add_argument(
        "--tokens", type=whole(0), default=130, help="take prompts of about so many tokens; 0: of any length"
    )
    parser.add_argument("--slow_users", type=whole(1), default=4, help="users for a and b, taken evenly from these")
    parser.add_argument("--batch_size", type=whole(1), default=32, help="prompts a batch for c and d")
    parser.add_argument("--num_beams", type=whole(1), default=20, help="beams and items a user")
    parser.add_argument("--repeat", type=whole(1), default=3, help="turns of a, c and d (b: one); the median counts")
    parser.add_argument("--threads", type=whole(1), default=2, help="CPU threads")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="float32", help="of weights and cache")
    parser.add_argument(
        "--clock",
        choices=("wall", "cpu"),
        default="wall",
        help="cpu: processor time, for a busy machine, with --threads 1",
    )
    parser.add_argument("--seed", type=SEEDS, default=42, help="of index and new embeddings")
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    set_seed(options.seed)
    card = (
        torch.cuda.get_device_name()
        if options.device != "cpu"
        else f"CPU, {options.threads} threads, {options.clock} time"
    )
    print(f"{card}, {options.dtype}, {versions('torch', 'transformers')}")
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "data").mkdir()
        data = real_data(Path(folder) / "data", options.seed)
        prompts = load_prompts()
        samples = TestSet(data, "seqrec", HistoryFormat(), seed=options.seed)
        template = prompts.of("seqrec")[0]
        texts = [prompts.prompt(template, samples[number].slots) for number in range(len(samples))]
        for kind in options.models.split(","):
            model, tokenizer = make_model(kind, data, Path(folder), options)
            chosen = choose(encode_prompts(tokenizer, texts), options.users, options.tokens)
            compare(kind, Ways(model, tokenizer, data, options), chosen, options)


if __name__ == "__main__":
    run_main(main)
