"""merge_lora against peft's own merge_and_unload."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from convert_parts import ITEM_TOKENS, VOCABULARY, save_model, save_tokenizer, tiny_llama
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from convert import merge_lora
from modeling import load_for_test
from utils import UserError

ROWS = VOCABULARY + len(ITEM_TOKENS)
IDS = torch.arange(ROWS)[None, -40:]


def save_adapter(folder: Path, *, tied: bool = False, **settings) -> torch.Tensor:
    """Make `folder`/base and `folder`/adapter as finetune.py does, all weights random; the adapter's logits."""
    base = tiny_llama(tied=tied)
    save_model(base, folder / "base", dtype=torch.float32)
    save_tokenizer(folder / "base")
    base = AutoModelForCausalLM.from_pretrained(folder / "base")
    base.resize_token_embeddings(ROWS, mean_resizing=False)
    options = {"target_modules": ["q_proj", "down_proj"], "modules_to_save": ["embed_tokens", "lm_head"]} | settings
    lora = LoraConfig(r=4, lora_alpha=16, **options)
    model = get_peft_model(base, lora)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(folder / "adapter", save_embedding_layers=False)
    save_tokenizer(folder / "adapter", ITEM_TOKENS)
    with torch.no_grad():
        return model.eval()(IDS).logits


def merge(folder: Path, *words: str) -> dict:
    merge_lora.main(["--adapter-path", f"{folder}/adapter", "--target-model-path", f"{folder}/target", *words])
    return json.loads((folder / "target/merge_report.json").read_text())


@pytest.mark.parametrize(
    "settings",
    [{}, {"use_rslora": True}, {"rank_pattern": {"down_proj": 8}, "alpha_pattern": {"layers.0.self_attn.q_proj": 2}}],
    ids=["plain", "rslora", "patterns"],
)
def test_merged_logits_are_those_of_the_adapter_and_of_peft(tmp_path, settings):
    logits = save_adapter(tmp_path, **settings)
    report = merge(tmp_path)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "target")
    assert torch.allclose(merged(IDS).logits, logits, atol=1e-5)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    base.resize_token_embeddings(ROWS, mean_resizing=False)
    oracle = PeftModel.from_pretrained(base, tmp_path / "adapter").merge_and_unload().state_dict()
    ours = load_file(tmp_path / "target/model.safetensors")
    assert ours.keys() == oracle.keys()
    assert all(torch.allclose(ours[name], oracle[name], atol=1e-6) for name in ours)
    assert report["tensors"]["lm_head.weight"]["done"] == "replaced"
    assert merged.config.vocab_size == ROWS
    scored = load_for_test(str(tmp_path / "adapter"), str(tmp_path / "base"), lora=True, dtype=torch.bfloat16)[0]
    assert {parameter.dtype for parameter in scored.parameters()} == {torch.bfloat16}
    assert torch.allclose(scored(IDS).logits.float(), logits, atol=0.1)


@pytest.mark.parametrize("whole", [["embed_tokens", "lm_head"], ["embed_tokens"]], ids=["both", "embedding"])
def test_tied_base(tmp_path, whole):
    logits = save_adapter(tmp_path, tied=True, ensure_weight_tying=True, modules_to_save=whole)
    merge(tmp_path)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "target")
    assert torch.allclose(merged(IDS).logits, logits, atol=1e-5)


def test_tied_base_whose_adapter_trained_both_apart(tmp_path):
    logits = save_adapter(tmp_path, tied=True)
    merge(tmp_path)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "target")
    assert torch.allclose(merged(IDS).logits, logits, atol=1e-5)


def test_dora_is_merged_too(tmp_path):
    logits = save_adapter(tmp_path, use_dora=True)
    merge(tmp_path)
    assert torch.allclose(AutoModelForCausalLM.from_pretrained(tmp_path / "target")(IDS).logits, logits, atol=1e-5)


@pytest.mark.parametrize("tied", [False, True])
def test_an_adapter_that_trained_the_new_rows_alone(tmp_path, tied):
    """As finetune.py --lora --train_new_rows_only makes it."""
    new = list(range(VOCABULARY, ROWS))
    rows = {"embed_tokens": new} | ({} if tied else {"lm_head": new})
    logits = save_adapter(
        tmp_path, tied=tied, modules_to_save=None, trainable_token_indices=rows, ensure_weight_tying=tied
    )
    report = merge(tmp_path)
    assert report["tensors"]["model.embed_tokens.weight"]["done"] == "rows replaced"
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "target")
    assert torch.allclose(merged(IDS).logits, logits, atol=1e-5)
    scored = load_for_test(str(tmp_path / "adapter"), str(tmp_path / "base"), lora=True)[0]
    assert torch.allclose(scored(IDS).logits, logits, atol=1e-5)


def change_settings(**values):
    def spoil(folder: Path) -> None:
        path = folder / "adapter/adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return spoil


def change_tensors(change):
    def spoil(folder: Path) -> None:
        path = folder / "adapter/adapter_model.safetensors"
        state = load_file(path)
        change(state)
        save_file(state, path)

    return spoil


def write(name: str, content: bytes):
    return lambda folder: (folder / "adapter" / name).write_bytes(content)


def instead(name: str, make):
    """Something else in place of a file."""

    def spoil(folder: Path) -> None:
        (folder / "adapter" / name).unlink()
        make(folder / "adapter" / name)

    return spoil


def shorten(name: str):
    return lambda folder: os.truncate(folder / "adapter" / name, (folder / "adapter" / name).stat().st_size - 10)


def base_of_another_size(folder: Path) -> None:
    shutil.rmtree(folder / "base")
    save_model(tiny_llama(hidden_size=16), folder / "base", dtype=torch.float32)
    save_tokenizer(folder / "base")


def without_a_layer(state: dict[str, torch.Tensor]) -> None:
    for name in [name for name in state if ".layers.1." in name]:
        state.pop(name)


A = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
HEAD = "base_model.model.lm_head.weight"
BROKEN = {
    "another method": (change_settings(peft_type="IA3"), "peft_type is 'IA3', only LORA"),
    "no method": (change_settings(peft_type=None), "peft_type is None, only LORA"),
    "rank 0": (change_settings(r=0), "r is 0, not a positive number"),
    "rank as text": (change_settings(r="4"), "r is '4', not a positive number"),
    "another rank": (change_settings(r=8), r"lora_A.weight is \[4, 48\].* make it \[8, 48\]"),
    "a rank that no memory holds": (change_settings(r=65_000), r"make it \[65000, 48\]"),
    "a fraction of a rank": (change_settings(r=4.5), "adapter_config.json"),
    "endless alpha": (change_settings(lora_alpha=float("inf")), "lora_alpha is inf, not a positive number"),
    "modules of no model": (change_settings(target_modules=["nothing"]), "does not fit the base"),
    "modules as a number": (change_settings(target_modules=3), "adapter_config.json"),
    "patterns as a list": (change_settings(rank_pattern=["q_proj"]), "adapter_config.json"),
    "a module to import": (change_settings(megatron_config={"a": 1}, megatron_core="evil"), "megatron_config is not"),
    "a base that is changed": (change_settings(init_lora_weights="pissa"), "init_lora_weights is 'pissa'"),
    "rows beyond the vocabulary": (
        change_settings(modules_to_save=None, trainable_token_indices={"embed_tokens": [10**6]}),
        "adapter_config.json",
    ),
    "settings that are a list": (write("adapter_config.json", b"[]"), "not a JSON object"),
    "settings that are none": (write("adapter_config.json", b"{}"), "peft_type is None"),
    "broken settings": (write("adapter_config.json", b"{"), "broken JSON"),
    "no settings": (lambda f: (f / "adapter/adapter_config.json").unlink(), "adapter_config.json"),
    "no weights": (lambda f: (f / "adapter/adapter_model.safetensors").unlink(), "has no weights"),
    "weights cut short": (shorten("adapter_model.safetensors"), "not a readable safetensors file"),
    "empty weights": (write("adapter_model.safetensors", b""), "not a readable safetensors file"),
    "a folder as weights": (instead("adapter_model.safetensors", Path.mkdir), "not a regular file"),
    "a pipe as weights": (instead("adapter_model.safetensors", os.mkfifo), "not a regular file"),
    "a pipe as settings": (instead("adapter_config.json", os.mkfifo), "adapter_config.json"),
    "a pipe as tokenizer": (instead("tokenizer.model", os.mkfifo), "tokenizer.model: not a regular file"),
    "half a factor": (change_tensors(lambda state: state.pop(A)), f"lacks {A}"),
    "a layer missing": (change_tensors(without_a_layer), "lacks base_model.model.model.layers.1"),
    "no head": (change_tensors(lambda state: state.pop(HEAD)), f"lacks {HEAD}"),
    "a tensor too many": (
        change_tensors(lambda state: state.update({"base_model.model.x.lora_A.weight": torch.ones(4, 4)})),
        "has base_model.model.x.lora_A.weight, which its adapter_config.json or the base knows nothing of",
    ),
    "a factor of another shape": (
        change_tensors(lambda state: state.update({A: torch.ones(4, 16)})),
        r"lora_A.weight is \[4, 16\]",
    ),
    "NaN": (change_tensors(lambda state: state[A].fill_(float("nan"))), f"{A} holds NaN or inf"),
    "a base of another size": (base_of_another_size, "the base make it"),
    "item tokens without rows": (
        lambda folder: (
            change_settings(modules_to_save=None)(folder),
            change_tensors(lambda state: [state.pop(name) for name in list(state) if ".lora_" not in name])(folder),
        ),
        "brings no embedding for <a_0> and 15 more tokens",
    ),
    "code of its own": (
        lambda f: (f / "adapter/tokenizer_config.json").write_text('{"auto_map": {"AutoTokenizer": ["evil.T", null]}}'),
        "auto_map",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_adapters_are_one_line(tmp_path, case):
    spoil, message = BROKEN[case]
    save_adapter(tmp_path)
    spoil(tmp_path)
    with pytest.raises(UserError, match=message) as caught:
        merge(tmp_path, "--base-model-path", f"{tmp_path}/base")
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir() if path.name not in ("base", "adapter")] == []
    if case not in ("a pipe as tokenizer", "code of its own"):
        with pytest.raises(UserError):
            load_for_test(str(tmp_path / "adapter"), str(tmp_path / "base"), lora=True)


def test_a_tokenizer_without_item_tokens_is_refused(tmp_path):
    save_adapter(tmp_path)
    (tmp_path / "adapter/added_tokens.json").unlink()
    with pytest.raises(UserError, match="no item tokens"):
        merge(tmp_path)


def test_float16_base_and_a_wider_result(tmp_path):
    """An adapter trained on a 4-bit base is merged into the base in full precision, in the type asked for."""
    logits = save_adapter(tmp_path)
    for path in (tmp_path / "base").glob("model*"):
        path.unlink()
    save_model(tiny_llama(), tmp_path / "base", "bin-sharded", torch.float16)
    merge(tmp_path, "--dtype", "float32")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "target")
    assert merged.dtype == torch.float32
    assert torch.allclose(merged(IDS).logits, logits, atol=5e-3)
