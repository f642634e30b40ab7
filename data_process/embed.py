"""Embed the items' texts with a pretrained language model: `<D>.item.json` → `<D>.emb-<plm>-td.npy`.

    python data_process/embed.py --data_path ./data --dataset ml-100k --plm_name minilm \\
        --model_path "$(python data_process/fetch.py minilm)"
    torchrun --nproc_per_node=8 data_process/embed.py --data_path ./data --dataset Games --plm_name llama \\
        --model_path huggyllama/llama-7b --bf16

Each field is cleaned, encoded and pooled on its own, and an item's row is the weighted average over the fields that are not
empty (float32, row = item id). Equal texts are encoded once, so equal items get equal rows to the last bit. Finished parts
are kept in `<output>.parts/` until the end: the same command after a kill goes on from there (docs/embeddings.md).
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import sys
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from arguments import make_parser
from data_process.item_texts import CLEANERS, ItemTexts, item_texts, parse_fields
from data_process.text_vectors import Parts, Team, encode_parts, gather_rows
from flag_values import array_file, plain_name, whole
from folders import locked
from provenance import note_made, record_in
from quiet import silence_libraries
from utils import UserError, is_main, local_rank, read_json, run_main, say, versions, world_size


def encoder_device(name: str) -> str:
    """`--device`, this process's own GPU under torchrun, or the CPU, said in one line, where CUDA is absent."""
    import torch

    try:
        kind = torch.device(name).type
    except RuntimeError:
        kind = ""
    if kind in ("", "meta"):
        raise UserError(f"--device {name}: no such device; use cpu or cuda:0")
    if kind == "cuda" and not torch.cuda.is_available():
        say(f"no CUDA here: --device {name} becomes cpu")
        return "cpu"
    if kind != "cuda" or world_size() == 1:
        return name
    if local_rank() >= torch.cuda.device_count():
        raise UserError(f"{torch.cuda.device_count()} GPUs here: start as many processes a node, or give --device cpu")
    return f"cuda:{local_rank()}"


def plan_of(args: argparse.Namespace, texts: ItemTexts, parts: Parts) -> dict[str, Any]:
    """Everything that the vectors of the parts depend on: parts of two plans must not be mixed."""
    folder = Path(args.model_path).expanduser()
    files = {path.name: path.stat() for path in sorted(folder.glob("*")) if path.is_file()} if folder.is_dir() else {}
    return {
        "--model_path": args.model_path,
        "model's files": {name: [stat.st_size, stat.st_mtime_ns] for name, stat in files.items()},
        "list of texts": hashlib.sha256("\0".join(texts.texts).encode()).hexdigest(),
        "--pooling": args.pooling,
        "--dtype": args.dtype,
        "--max_sent_len": args.max_sent_len,
        "--batch_size": args.batch_size,
        "--part_size": parts.size,
        "--device": args.device.split(":")[0],
        "library": versions("torch", "transformers", "tokenizers"),
    }


def _parser() -> argparse.ArgumentParser:
    parser = make_parser(__doc__)
    parser.add_argument("--data_path", default="./data", help="folder that holds the datasets' folders")
    parser.add_argument("--dataset", type=plain_name, default="Games", help="D: reads <data_path>/D/D.item.json")
    parser.add_argument(
        "--plm_name", type=plain_name, default="minilm", help="name of the model in the output file's name"
    )
    parser.add_argument("--model_path", required=True, help="folder or hub id of the language model")
    parser.add_argument(
        "--fields", default="title,description", help="fields of an item and their weights: title:2,brand"
    )
    parser.add_argument("--pooling", choices=("mean", "last"), default="mean", help="of a text's last hidden states")
    way = "clean: markup removed, blanks joined; original: also the original's full stops and gaps (docs/embeddings.md)"
    parser.add_argument("--text", choices=CLEANERS, default="clean", help=way)
    parser.add_argument("--missing_text", help="text for items that have none; without it such an item is an error")
    parser.add_argument(
        "--max_sent_len", type=whole(1), default=2048, help="tokens of a field at most, or the model's limit"
    )
    parser.add_argument("--batch_size", type=whole(1), default=32, help="texts encoded at once")
    parser.add_argument("--part_size", type=whole(0), default=0, help="texts between two savings; 0: 256 or more")
    parser.add_argument("--device", default="cuda:0", help="where the model runs; without CUDA the CPU")
    dtypes = ("float32", "bfloat16", "float16")
    parser.add_argument(
        "--dtype", choices=dtypes, default="float32", help="of the model's weights; the output is float32"
    )
    parser.add_argument("--bf16", dest="dtype", action="store_const", const="bfloat16", help="= --dtype bfloat16")
    parser.add_argument(
        "--output_file", type=array_file, help="default: <data_path>/D/D.emb-<plm_name>-<initials of fields>.npy"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace the output and parts of another run")
    return parser


def main(argv: list[str] | None = None) -> None:
    args = _parser().parse_args(argv)
    fields = parse_fields(args.fields)
    source = Path(args.data_path) / args.dataset / f"{args.dataset}.item.json"
    initials = "".join(field[0] for field in fields)
    target = args.output_file or source.with_name(f"{args.dataset}.emb-{args.plm_name}-{initials}.npy")
    if target.exists() and not args.overwrite:
        raise UserError(f"{target} is there already; --overwrite replaces it")
    record = record_in(target.parent, args.dataset)
    texts = item_texts(read_json(source), source, fields, args.text, args.missing_text)

    from data_process.encoder import encode, load_encoder, longest_input

    silence_libraries()
    args.device = encoder_device(args.device)
    tokenizer, model = load_encoder(args.model_path, args.device, args.dtype)
    max_len = longest_input(model, args.max_sent_len)
    parts = Parts.of(target.with_name(f"{target.name}.parts"), texts.texts, args.part_size)
    with locked(target) if is_main() else contextlib.nullcontext():
        team = Team()
        run = parts.begin(plan_of(args, texts, parts), args.overwrite, team)
        settings = {"max_len": max_len, "batch_size": args.batch_size, "pooling": args.pooling}
        try:
            encode_parts(parts, texts.texts, partial(encode, tokenizer=tokenizer, model=model, **settings), run, team)
        except UserError:
            if is_main() and not any(parts.folder.glob("part-*.npy")):
                parts.remove()
            raise
        if is_main():
            items, hidden = gather_rows(parts, texts.fields, texts.weights, target)
            parts.remove()
    if is_main():
        note_made(record, "data_process/embed.py", [target], [source], ("torch", "transformers"))
        say(f"{target}: {items:,} items × {hidden} numbers from {len(texts.texts):,} different texts")
    team.close()


if __name__ == "__main__":
    run_main(main)
