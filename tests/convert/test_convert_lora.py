"""merge_lora against peft's own merge_and_unload."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from convert_parts import ITEM_TOKENS, VOCABULARY, save_model, save_tokenizer, tiny_llama
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from convert import merge_lora
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


def test_refusals(tmp_path):
    save_adapter(tmp_path)
    place = tmp_path / "adapter/adapter_config.json"
    settings = json.loads(place.read_text())
    for change, message in [
        ({"use_dora": True}, "use_dora is not supported here"),
        ({"peft_type": "IA3"}, "peft_type is 'IA3', only LORA"),
        ({"r": 0}, "r is 0, not a positive number"),
    ]:
        place.write_text(json.dumps(settings | change))
        with pytest.raises(UserError, match=message):
            merge(tmp_path)
    place.write_text(json.dumps(settings))
    save_model(tiny_llama(hidden_size=16), tmp_path / "other")
    save_tokenizer(tmp_path / "other")
    with pytest.raises(UserError, match="in the base"):
        merge(tmp_path, "--base-model-path", f"{tmp_path}/other")
    (tmp_path / "adapter/added_tokens.json").unlink()
    with pytest.raises(UserError, match="no item tokens"):
        merge(tmp_path)
    assert not (tmp_path / "target").exists()


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
