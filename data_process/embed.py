"""Embed the items' texts with a pretrained language model: `<D>.item.json` → `<D>.emb-<plm>-td.npy`.

    python data_process/embed.py --data_path ./data --dataset ml-100k --plm_name minilm \\
        --model_path "$(python data_process/fetch.py minilm)"
    python data_process/embed.py --data_path ./data --dataset Games --plm_name llama --model_path huggyllama/llama-7b

Title and description are cleaned of markup, entities and line breaks, each is encoded and mean-pooled on its own, and
an item's row is the average over the fields that are not empty (float32, row = item id). Equal texts are encoded once,
so equal items get equal rows to the last bit.
"""

from __future__ import annotations

import argparse
import html
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from utils import UserError, atomic_path, read_json, run_main  # noqa: E402

FIELDS = ("title", "description")  # the "td" in the file's name
COMMENT_OR_SCRIPT = re.compile(r"<!--.*?-->|<(script|style)\b.*?</\1\s*>", re.IGNORECASE | re.DOTALL)
TAG = re.compile(r"</?[a-zA-Z][^<>]*>")  # not "<3", not "a < b"


def clean_text(text: str) -> str:
    """`text` as one plain line: entities resolved (twice: catalogues hold `&amp;quot;`), markup and blanks removed."""
    text = html.unescape(html.unescape(text))
    text = TAG.sub(" ", COMMENT_OR_SCRIPT.sub(" ", text))
    return " ".join(text.replace("\x00", " ").split())


def field_texts(items: Any, source: Path, missing_text: str | None = None) -> list[list[str]]:
    """The non-empty cleaned fields of each item, row = item id.

    Args:
        items: the parsed content of `<D>.item.json`.
        source: where it came from, for messages.
        missing_text: stands in for an item without any text; None makes such an item an error.

    Raises:
        UserError: keys are not "0" … "n-1", an item is no object, a field is no text, an item has no text.
    """
    if not isinstance(items, dict) or not items:
        raise UserError(f'{source}: expected a non-empty object {{"0": {{"title": …, "description": …}}, …}}')
    rows: list[list[str]] = []
    for number in range(len(items)):
        item = items.get(str(number))
        if item is None:
            raise UserError(f'{source}: has {len(items)} items but no key "{number}"; keys must run from "0"')
        if not isinstance(item, dict):
            raise UserError(f'{source}: item "{number}" is not an object with title and description')
        texts = []
        for field in FIELDS:
            value = item.get(field) or ""
            if isinstance(value, list) and all(isinstance(part, str) for part in value):
                value = " ".join(value)  # raw Amazon metadata keeps descriptions as lists
            if not isinstance(value, str):
                raise UserError(f'{source}: item "{number}": {field} is {type(value).__name__}, expected text')
            texts.append(clean_text(value))
        texts = [text for text in texts if text] or ([missing_text] if missing_text else [])
        if not texts:
            raise UserError(
                f'{source}: item "{number}" has neither title nor description; add one or give --missing_text'
            )
        rows.append(texts)
    return rows


def load_encoder(model_path: str, device: Any, dtype: str) -> tuple[Any, Any]:
    """Tokenizer and model (evaluation mode, on `device`) from a folder or hub id; of encoder-decoders the encoder.

    Raises:
        UserError: nothing loadable at `model_path`.
    """
    import torch
    from transformers import AutoModel, AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(model_path)
        model = AutoModel.from_pretrained(model_path, dtype=getattr(torch, dtype))
    except (OSError, ValueError, ImportError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"--model_path {model_path}: no model could be loaded ({reason})") from None
    if model.config.is_encoder_decoder:
        model = model.get_encoder()
    if tokenizer.pad_token is None:  # LLaMA and most decoders; the attention mask keeps padding out of the mean
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    tokenizer.padding_side = "right"
    return tokenizer, model.eval().to(device)


def longest_input(model: Any, max_sent_len: int) -> int:
    """`max_sent_len` tokens, or as many as the model has positions for."""
    positions = getattr(model.config, "max_position_embeddings", None) or max_sent_len
    padding_idx = getattr(getattr(model, "embeddings", None), "padding_idx", None)
    if model.config.model_type in ("roberta", "xlm-roberta", "mpnet") and padding_idx is not None:
        positions -= padding_idx + 1  # these count positions from padding_idx + 1
    return min(max_sent_len, positions)


def encode(texts: list[str], tokenizer: Any, model: Any, *, max_len: int, batch_size: int) -> np.ndarray:
    """Mean-pooled last hidden states of `texts`: float32, (len(texts), hidden). Long texts first, so memory peaks early."""
    import torch
    from tqdm import tqdm

    device = next(model.parameters()).device
    order = sorted(range(len(texts)), key=lambda i: (-len(texts[i]), i))
    rows: np.ndarray | None = None
    with torch.inference_mode(), tqdm(total=len(texts), unit="text", disable=None, desc="embed") as bar:
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            batch = [texts[i] for i in chosen]
            tokens = tokenizer(batch, return_tensors="pt", padding=True, truncation=True, max_length=max_len).to(device)
            hidden = model(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask).last_hidden_state.float()
            mask = tokens.attention_mask.unsqueeze(-1).float()
            pooled = (hidden * mask).sum(1) / mask.sum(1).clamp(min=1.0)
            if rows is None:
                rows = np.empty((len(texts), pooled.shape[1]), dtype=np.float32)
            rows[chosen] = pooled.cpu().numpy()
            bar.update(len(chosen))
    assert rows is not None
    return rows


def embed_items(rows: list[list[str]], tokenizer: Any, model: Any, *, max_len: int, batch_size: int) -> np.ndarray:
    """One row for each item: the mean of its fields' vectors, float32, (items, hidden)."""
    numbers: dict[str, int] = {}
    for texts in rows:
        for text in texts:
            numbers.setdefault(text, len(numbers))
    vectors = encode(list(numbers), tokenizer, model, max_len=max_len, batch_size=batch_size)
    return np.stack([vectors[[numbers[text] for text in texts]].mean(axis=0) for texts in rows])


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_path", default="./data", help="folder that holds the datasets' folders (./data)")
    parser.add_argument(
        "--dataset", default="Games", help="name D of the dataset: reads <data_path>/D/D.item.json (Games)"
    )
    parser.add_argument("--plm_name", default="minilm", help="name of the model in the output file's name (minilm)")
    parser.add_argument("--model_path", required=True, help="folder or hub id of the language model")
    parser.add_argument(
        "--max_sent_len", type=int, default=2048, help="tokens of a field at most (2048, or the model's limit)"
    )
    parser.add_argument("--batch_size", type=int, default=32, help="texts encoded at once (32)")
    parser.add_argument("--device", default="cuda:0", help="where the model runs (cuda:0; without CUDA the CPU)")
    parser.add_argument(
        "--dtype",
        choices=["float32", "bfloat16", "float16"],
        default="float32",
        help="of the model's weights (float32); the output is float32",
    )
    parser.add_argument("--missing_text", help="text for items that have none (default: such an item is an error)")
    parser.add_argument("--output_file", type=Path, help="default: <data_path>/D/D.emb-<plm_name>-td.npy")
    return parser


def main(argv: list[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    for flag in ("max_sent_len", "batch_size"):
        if getattr(args, flag) < 1:
            raise UserError(f"--{flag} {getattr(args, flag)}: must be at least 1")
    source = Path(args.data_path) / args.dataset / f"{args.dataset}.item.json"
    target = args.output_file or source.with_name(f"{args.dataset}.emb-{args.plm_name}-td.npy")
    rows = field_texts(read_json(source), source, args.missing_text)

    import torch

    if args.device.startswith("cuda") and not torch.cuda.is_available():
        print(f"no CUDA here: --device {args.device} becomes cpu", flush=True)
        args.device = "cpu"
    tokenizer, model = load_encoder(args.model_path, args.device, args.dtype)
    max_len = longest_input(model, args.max_sent_len)
    vectors = embed_items(rows, tokenizer, model, max_len=max_len, batch_size=args.batch_size)
    if not np.isfinite(vectors).all():
        bad = int(np.flatnonzero(~np.isfinite(vectors).all(axis=1))[0])
        raise UserError(f"{args.model_path}: the embedding of item {bad} is not finite; try --dtype float32")
    with atomic_path(target) as temporary, open(temporary, "wb") as file:
        np.save(file, vectors)
    distinct = len(np.unique(vectors, axis=0))
    print(f"{target}: {vectors.shape[0]} items × {vectors.shape[1]} numbers, {distinct} distinct rows", flush=True)


if __name__ == "__main__":
    run_main(main)
