"""How a pretrained model begins: what its first steps look like, by the start of the new rows and by the prompt.

    python benchmarks/bench_start.py --base_model ./models/smollm2-135m --data_path ./data --dataset Office

For rows that are drawn and rows from words (`--init_item_tokens`), and for histories that stand alone (config/short_prompts.json)
or in the instruction frame, over `--batches` batches of seqrec in float32: the loss of item tokens, the logits of text and item
tokens, the gradient's norm (before any clipping) from batch to batch, what part of it is in the new rows, and the cosine
between the gradients in float32 and in bfloat16 (autocast) of the worst batch, in the new rows and in the lower half of the
layers. A second table: the loss on the first items' titles and descriptions, before any training, by `--dropout`: what is left
of what the model knows. No weight is changed.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from arguments import add_dataset, make_parser
from collator import IGNORE, TrainCollator
from data import RecData, load_data
from flag_values import whole
from modeling import load_model, load_tokenizer, prepare_base
from prompt import load_prompts
from regularise import add_dropout
from samples import TrainSet
from tasks import HistoryFormat
from utils import UserError, run_main, say

SHORT = Path(__file__).resolve().parent.parent / "config" / "short_prompts.json"
DROPOUTS = (0, 0.01, 0.05, 0.1, 0.2)
COLUMNS = (
    "rows",
    "prompt",
    "loss of item tokens",
    "logits of text",
    "of items",
    "gradient",
    "in new rows",
    "bf16: rows",
    "bf16: layers",
)


def batches(data: RecData, tokenizer: Any, prompt_file: str | None, count: int, size: int) -> Iterator[dict[str, Any]]:
    """Batches of each user's longest history, the first users of the file."""
    form = HistoryFormat(20, False, "")
    train = TrainSet(data, load_prompts(prompt_file), [("seqrec", 1, 0)], form, longest_history_only=True)
    collator = TrainCollator(tokenizer)
    for begin in range(0, count * size, size):
        yield collator([train[number] for number in range(begin, begin + size)])


def gradients(
    model: Any, batch: dict[str, Any], ids: torch.Tensor, bf16: bool
) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    """The gradient of the loss on whole samples, in three parts, each flat; and figures of the forward pass."""
    labels = batch["labels"][:, 1:]
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits[
            :, :-1
        ]
    losses = F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=IGNORE, reduction="none")
    (losses.sum() / (labels != IGNORE).sum()).backward()
    items = torch.isin(labels, ids)
    seen = logits.detach().float()[items]
    figures = {"loss": losses.detach()[items.flatten()].mean().item(), "items": seen[:, ids].mean().item()}
    figures["text"] = seen[:, : int(ids.min())].mean().item()
    embeddings = model.get_input_embeddings().weight
    half = model.config.num_hidden_layers // 2
    parts: dict[str, list[torch.Tensor]] = {"rows": [embeddings.grad[ids].flatten()], "layers": [], "rest": []}
    for name, parameter in model.named_parameters():
        if parameter is not embeddings:
            lower = ".layers." in name and int(name.split(".layers.")[1].split(".")[0]) < half
            parts["layers" if lower else "rest"].append(parameter.grad.flatten().clone())
    rest = embeddings.grad.clone()
    rest[ids] = 0
    parts["rest"].append(rest.flatten())
    model.zero_grad(set_to_none=True)
    return {name: torch.cat(tensors) for name, tensors in parts.items()}, figures


def cosine(one: torch.Tensor, other: torch.Tensor) -> float:
    """The cosine between two flat tensors, in float64."""
    return F.cosine_similarity(one.double(), other.double(), dim=0).item()


def row(model: Any, tokenizer: Any, data: RecData, prompt_file: str | None, count: int, size: int) -> list[str]:
    """The figures of one start and one prompt, over `count` batches."""
    ids = torch.tensor(tokenizer.convert_tokens_to_ids(data.item_tokens))
    norms, shares, seen, angles = [], [], [], []
    for batch in batches(data, tokenizer, prompt_file, count, size):
        exact, figures = gradients(model, batch, ids, bf16=False)
        rough, _ = gradients(model, batch, ids, bf16=True)
        norms.append(torch.cat(list(exact.values())).norm().item())
        shares.append((exact["rows"].norm() / norms[-1]).item() ** 2)
        angles.append(
            [
                F.cosine_similarity(exact[name].double(), rough[name].double(), dim=0).item()
                for name in ("rows", "layers")
            ]
        )
        seen.append(figures)
    mean = {name: sum(figures[name] for figures in seen) / count for name in seen[0]}
    worst = [min(column) for column in zip(*angles, strict=True)]
    gradient = f"{min(norms):.0f} to {max(norms):.0f}"
    texts = [f"{mean[name]:.1f}" for name in ("loss", "text", "items")]
    return [*texts, gradient, f"{sum(shares) / count:.0%}", *(f"{angle:.2f}" for angle in worst)]


def text_loss(base: str, data: RecData, share: float, count: int, size: int) -> float:
    """The mean loss over the texts of the first `count` times `size` items, in training mode, `share` of every branch dropped."""
    model, tokenizer = load_model(base, torch.float32), load_tokenizer(base)
    if share:
        add_dropout(model, share)
    model.train()
    texts = [f"{data.titles[item]} {data.descriptions[item]}" for item in range(min(count * size, len(data.titles)))]
    losses = []
    for text in texts:
        ids = tokenizer(text, return_tensors="pt", truncation=True, max_length=256)["input_ids"]
        if ids.shape[1] > 1:
            with torch.no_grad():
                losses.append(model(input_ids=ids, labels=ids).loss.item())
    return sum(losses) / len(losses)


def main(argv: list[str] | None = None) -> None:
    parser = make_parser(__doc__)
    add_dataset(parser)
    parser.add_argument("--base_model", required=True, help="a pretrained causal LM")
    parser.add_argument("--batches", type=whole(1), default=5, help="batches for each line")
    parser.add_argument("--batch_size", type=whole(1), default=4, help="histories in a batch")
    options = parser.parse_args(argv)
    data = load_data(options.data_path, options.dataset, options.index_file)
    say("| " + " | ".join(COLUMNS) + " |\n|" + " --- |" * len(COLUMNS))
    for start in (None, "words"):
        with tempfile.TemporaryDirectory() as folder:
            ready = Path(folder) / "ready"
            prepare_base(options.base_model, ready, data.item_tokens, 42, start=(start, data) if start else None)
            model, tokenizer = load_model(ready, torch.float32), load_tokenizer(ready)
        for prompt, file in (("bare", str(SHORT)), ("frame", None)):
            figures = row(model, tokenizer, data, file, options.batches, options.batch_size)
            say("| " + " | ".join([start or "drawn", prompt, *figures]) + " |")
    say("\n| dropout | loss on the items' texts |\n| --- | --- |")
    torch.manual_seed(42)
    for share in DROPOUTS:
        try:
            loss = f"{text_loss(options.base_model, data, share, options.batches, options.batch_size):.2f}"
        except UserError:  # layers that --dropout does not know
            loss = "–"
        say(f"| {share:g} | {loss} |")


if __name__ == "__main__":
    run_main(main)
