"""merge_delta and make_delta: the released convention, checked on weights and logits, for every kind of file."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from convert_parts import (
    ITEM_TOKENS,
    VOCABULARY,
    delta_parts,
    fine_tuned,
    half,
    save_delta,
    save_model,
    save_tokenizer,
    tiny_llama,
)
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from convert import make_delta, merge_delta
from utils import UserError, sha256

KINDS = ("safetensors", "safetensors-sharded", "bin", "bin-sharded")


def expected(base, target) -> dict[str, torch.Tensor]:
    """base + delta in float16, everything in memory: the slow oracle."""
    ours, theirs = half(base), half(target)
    return {n: t if t.shape != ours[n].shape else ours[n] + (t - ours[n]) for n, t in theirs.items()}


@pytest.fixture
def parts(tmp_path):
    return *delta_parts(tmp_path), tmp_path


def merge(folder: Path, *words: str) -> dict:
    merge_delta.main(
        ["--base-model-path", f"{folder}/base", "--delta-path", f"{folder}/delta"]
        + ["--target-model-path", f"{folder}/target", *words]
    )
    return json.loads((folder / "target/merge_report.json").read_text())


@pytest.mark.parametrize("base_dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("kind", KINDS)
def test_merge_is_the_float16_sum_for_every_kind_of_file(tmp_path, kind, base_dtype):
    base = tiny_llama().to(base_dtype)
    target = fine_tuned(tiny_llama().to(base_dtype).float())
    save_model(base, tmp_path / "base", kind, base_dtype)
    save_tokenizer(tmp_path / "base")
    save_delta(base, target, tmp_path / "delta", KINDS[-1 - KINDS.index(kind)])
    merge(tmp_path, "--max-shard-size", "40KB")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "target")
    assert merged.dtype == torch.float16
    for name, tensor in expected(base, target).items():
        assert torch.equal(merged.state_dict()[name], tensor), name
    assert len(list((tmp_path / "target").glob("model-*.safetensors"))) > 1


def test_files_of_old_torch_and_tensors_that_lie_crosswise(parts):
    """Neither can be handed out as rows of a mapped file; the memory of the first is not to be given back either."""
    base, target, folder = parts
    (folder / "base/model.safetensors").unlink()
    torch.save(half(base), folder / "base/pytorch_model.bin", _use_new_zipfile_serialization=False)
    for path in (folder / "delta").glob("*.bin"):
        crosswise = {n: v.t().contiguous().t() for n, v in torch.load(path, weights_only=True).items() if v.dim() == 2}
        torch.save(torch.load(path, weights_only=True) | crosswise, path)
    merge(folder)
    merged = load_file(folder / "target/model.safetensors")
    assert all(torch.equal(merged[name], tensor) for name, tensor in expected(base, target).items())


def test_merged_model_has_the_logits_of_the_fine_tuned_one_and_its_tokenizer(parts):
    base, target, folder = parts
    report = merge(folder)
    merged = AutoModelForCausalLM.from_pretrained(folder / "target", dtype=torch.float32)
    ids = torch.arange(VOCABULARY + len(ITEM_TOKENS))[None, -40:]
    assert torch.allclose(merged(ids).logits, target(ids).logits, atol=2e-3)
    inside = torch.arange(VOCABULARY)[None, -40:]
    assert (merged(inside).logits[..., :VOCABULARY] - base(inside).logits).abs().max() > 0.01
    tokenizer = AutoTokenizer.from_pretrained(folder / "target")
    assert len(tokenizer) == merged.config.vocab_size == VOCABULARY + len(ITEM_TOKENS)
    assert tokenizer.convert_tokens_to_ids(ITEM_TOKENS) == list(range(VOCABULARY, VOCABULARY + len(ITEM_TOKENS)))
    assert report["tensors"]["lm_head.weight"]["done"] == "copied whole"
    assert report["tensors"]["model.norm.weight"]["done"] == "summed"


def test_make_delta_then_merge_gives_the_target_back_where_it_can_be_represented(parts):
    base, target, folder = parts
    with torch.no_grad():
        target.model.norm.weight[:2] = -0.0  # -0 - 1 + 1 is 0, the same number in another bit
    save_model(target, folder / "tuned")
    save_tokenizer(folder / "tuned", ITEM_TOKENS)
    shutil.rmtree(folder / "delta")
    words = ["--base-model-path", f"{folder}/base", "--target-model-path", f"{folder}/tuned"]
    make_delta.main([*words, "--delta-path", f"{folder}/delta"])
    report = json.loads((folder / "delta/delta_report.json").read_text())
    merge(folder)
    got, wanted = load_file(folder / "target/model.safetensors"), load_file(folder / "tuned/model.safetensors")
    assert got.keys() == wanted.keys()
    wrong = {name: int((got[name].view(torch.int16) != wanted[name].view(torch.int16)).sum()) for name in wanted}
    assert wrong["model.norm.weight"] >= 2
    assert {name: count for name, count in wrong.items() if count} == report["inexact"]
    for name, ours in half(base).items():
        if ours.shape == wanted[name].shape:
            exact = wanted[name].double() - ours.double()
            representable = exact == exact.half().double()
            assert torch.equal(got[name][representable], wanted[name][representable]), name
            assert representable.any() and not (name.endswith("proj.weight") and representable.all())


def test_old_llama_buffers_are_dropped_with_a_note(parts, capsys):
    _, _, folder = parts
    state = torch.load(folder / "delta/pytorch_model-00001-of-00003.bin", weights_only=True)
    state["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    torch.save(state, folder / "delta/pytorch_model-00001-of-00003.bin")
    index = json.loads((folder / "delta/pytorch_model.bin.index.json").read_text())
    index["weight_map"]["model.layers.0.self_attn.rotary_emb.inv_freq"] = "pytorch_model-00001-of-00003.bin"
    (folder / "delta/pytorch_model.bin.index.json").write_text(json.dumps(index))
    report = merge(folder)
    assert report["dropped"] == ["model.layers.0.self_attn.rotary_emb.inv_freq"]
    assert "dropped" in capsys.readouterr().out


def test_an_existing_target_stays_unless_told(parts):
    _, _, folder = parts
    merge(folder)
    before = (folder / "target/model.safetensors").read_bytes()
    with pytest.raises(UserError, match="exists.*--overwrite"):
        merge(folder, "--dtype", "float32")
    assert (folder / "target/model.safetensors").read_bytes() == before
    merge(folder, "--dtype", "float32", "--overwrite")
    assert (folder / "target/model.safetensors").read_bytes() != before


@pytest.mark.parametrize(("place", "message"), [("base", "is what is read from"), ("other", "was not written here")])
def test_overwriting_is_for_our_own_output(parts, place, message):
    _, _, folder = parts
    (folder / "other").mkdir()
    (folder / "other/precious").write_text("x")
    before = {path: path.read_bytes() for path in (folder / place).iterdir()}
    with pytest.raises(UserError, match=message):
        words = ["--base-model-path", f"{folder}/base", "--delta-path", f"{folder}/delta"]
        merge_delta.main([*words, "--target-model-path", f"{folder}/{place}", "--overwrite"])
    assert {path: path.read_bytes() for path in (folder / place).iterdir()} == before


def test_the_report_has_the_hash_of_every_file(parts):
    _, _, folder = parts
    report = merge(folder, "--max-shard-size", "40KB")
    for side, suffix in (("base", ".safetensors"), ("delta", ".bin"), ("target", ".safetensors")):
        files = {path.name: sha256(path) for path in (folder / side).glob(f"*{suffix}")}
        assert len(files) > (side != "base") and report["sha256"][side] == files
