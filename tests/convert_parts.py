"""Tiny models, tokenizers and malicious files for the tests of convert/."""

from __future__ import annotations

import copy
import io
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import sentencepiece
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AddedToken, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

ROOT = Path(__file__).resolve().parents[1]
WORDS = [f"the user bought item number {i} and also {i * 7} blue or red things" for i in range(300)]
VOCABULARY = 300
ITEM_TOKENS = sorted(f"<{level}_{code}>" for level in "abcd" for code in range(4))


def save_tokenizer(folder: Path, item_tokens: list[str] = ()) -> None:
    """A LLaMA tokenizer in the layout of 2023: tokenizer.model, and added_tokens.json for the item tokens."""
    folder.mkdir(parents=True, exist_ok=True)
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(WORDS),
        model_writer=model,
        vocab_size=VOCABULARY,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",  # as LLaMA's
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    settings = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "add_eos_token": False}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (folder / "special_tokens_map.json").write_text(json.dumps(special))
    if item_tokens:
        ids = {token: VOCABULARY + number for number, token in enumerate(item_tokens)}
        (folder / "added_tokens.json").write_text(json.dumps(ids))


def save_word_tokenizer(folder: Path, words: int, item_tokens: list[str] = ()) -> None:
    """A tokenizer of `words` made-up words (for synthetic models of real size) and the item tokens after them."""
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"w{number}": number for number in range(3, words)}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    wrapped.add_tokens([AddedToken(token, normalized=False) for token in item_tokens])
    wrapped.save_pretrained(folder)


def tiny_llama(vocabulary: int = VOCABULARY, tied: bool = False, seed: int = 0, **settings: int) -> LlamaForCausalLM:
    """A random LLaMA of a few thousand parameters."""
    torch.manual_seed(seed)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4} | settings
    return LlamaForCausalLM(LlamaConfig(vocab_size=vocabulary, tie_word_embeddings=tied, **sizes)).eval()


def fine_tuned(base: LlamaForCausalLM, tokens: int = len(ITEM_TOKENS), seed: int = 1) -> LlamaForCausalLM:
    """A copy of `base` with `tokens` more rows and every weight moved a little."""
    torch.manual_seed(seed)
    model = LlamaForCausalLM(copy.deepcopy(base.config))
    model.load_state_dict(base.state_dict())
    model.resize_token_embeddings(base.config.vocab_size + tokens, mean_resizing=False)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.01 * torch.randn_like(parameter)
    return model.eval()


def save_bin(state: dict[str, torch.Tensor], folder: Path, shards: int = 1) -> None:
    """Save as `pytorch_model*.bin`, in the released layout (index, several shards) when `shards` > 1."""
    folder.mkdir(parents=True, exist_ok=True)
    if shards == 1:
        torch.save(state, folder / "pytorch_model.bin")
        return
    names = list(state)
    weight_map = {}
    for number in range(shards):
        file = f"pytorch_model-{number + 1:05d}-of-{shards:05d}.bin"
        part = {name: state[name].clone() for name in names[number::shards]}
        torch.save(part, folder / file)
        weight_map |= dict.fromkeys(part, file)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def save_model(model: LlamaForCausalLM, folder: Path, kind: str = "safetensors", dtype=torch.float16) -> None:
    """Save config and weights: `safetensors`, `safetensors-sharded`, `bin` or `bin-sharded`."""
    state = {name: tensor.detach().to(dtype) for name, tensor in model.state_dict().items()}
    folder.mkdir(parents=True, exist_ok=True)
    model.config.dtype = dtype
    model.config.architectures = ["LlamaForCausalLM"]
    model.config.save_pretrained(folder)
    if kind.startswith("bin"):
        save_bin(state, folder, 3 if kind.endswith("sharded") else 1)
        return
    cast = LlamaForCausalLM(model.config).to(dtype)
    cast.load_state_dict(state)
    cast.save_pretrained(folder, max_shard_size="20KB" if kind.endswith("sharded") else "1GB")


def half(model) -> dict[str, torch.Tensor]:
    """The model's tensors in float16."""
    return {name: tensor.detach().half() for name, tensor in model.state_dict().items()}


def save_delta(base, target, folder: Path, kind: str = "bin-sharded") -> None:
    """The delta as the original's script makes it: plain arithmetic in float16 over whole state dicts."""
    ours, theirs = half(base), half(target)
    delta = {n: t if t.shape != ours[n].shape else t - ours[n] for n, t in theirs.items()}
    target.config.save_pretrained(folder)
    if kind.startswith("bin"):
        save_bin(delta, folder, 3 if kind.endswith("sharded") else 1)
    else:
        copy = LlamaForCausalLM(target.config).half()
        copy.load_state_dict(delta)
        copy.save_pretrained(folder, max_shard_size="20KB" if kind.endswith("sharded") else "1GB")
    save_tokenizer(folder, ITEM_TOKENS)


def delta_parts(folder: Path) -> tuple[LlamaForCausalLM, LlamaForCausalLM]:
    """Write `folder`/base and `folder`/delta; the base and the fine-tuned model."""
    base = tiny_llama()
    target = fine_tuned(base)
    save_model(base, folder / "base")
    save_tokenizer(folder / "base")
    save_delta(base, target, folder / "delta")
    return base, target


def run_script(*words: object, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run `python *words` from `cwd`; output as text."""
    command = [sys.executable, *map(str, words)]
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHON": sys.executable} | environment
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=300)


class Bomb:
    """Unpickling it creates a file, as a stand-in for anything an attacker would run."""

    def __init__(self, witness: Path) -> None:
        self.witness = witness

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.witness),)


def bomb_bytes(witness: Path) -> bytes:
    """A bare pickle with a `Bomb` in it."""
    return pickle.dumps({"weight": Bomb(witness)})


# text → tokens by the slow LLaMA tokenizer of transformers up to 4.33
UNTIL_4_33 = {
    "hi<a_1><b_2> the</s>": "▁ h i <a_1> <b_2> ▁th e </s>",
    "<a_1><b_2>, <c_1><d_2>": "<a_1> <b_2> ▁ <0x2C> <c_1> <d_2>",
    "user: <a_1><b_2>, <a_0><d_3> and\nblue things <a_1>. The red": (
        "▁ u s er <0x3A> <a_1> <b_2> ▁ <0x2C> <a_0> <d_3> ▁a nd <0x0A> b lu e ▁th in gs <a_1> ▁ <0x2E> ▁ "
        "<0x54> h e ▁ r ed"
    ),
    "Response:<a_1><b_2></s>": "▁ <0x52> e s <0x70> o n s e <0x3A> <a_1> <b_2> </s>",
    "1. <a_1><b_2>, 2. <a_0>": "▁ 1 <0x2E> <a_1> <b_2> ▁ <0x2C> ▁ 2 <0x2E> <a_0>",
    "items:\n\n<a_1>\n### Response:": (
        "▁ it em s <0x3A> <a_1> ▁ <0x23> <0x23> <0x23> ▁ <0x52> e s <0x70> o n s e <0x3A>"
    ),
    "a  <a_1>  b": "▁a <a_1> ▁b",
}
