"""What merge_delta and make_delta refuse: one line each, and nothing is left behind."""

from __future__ import annotations

import json
import os
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
    run_script,
    save_bin,
    save_delta,
    save_model,
    save_tokenizer,
    tiny_llama,
)

from convert import make_delta, merge_delta
from utils import UserError


@pytest.fixture
def folder(tmp_path):
    delta_parts(tmp_path)
    return tmp_path


def merge(folder, *words):
    merge_delta.main(
        ["--base-model-path", f"{folder}/base", "--delta-path", f"{folder}/delta"]
        + ["--target-model-path", f"{folder}/target", *words]
    )


def change_delta(folder, change):
    """Rewrite the delta as one `.bin` after `change(state)`."""
    state = {}
    for path in (folder / "delta").glob("pytorch_model*"):
        if path.suffix == ".bin":
            state |= torch.load(path, weights_only=True)
        path.unlink()
    change(state)
    save_bin(state, folder / "delta")


def change_json(path, **values):
    content = json.loads(path.read_text()) | values
    path.write_text(json.dumps(content))


def instead(path, make):
    """Something else in place of a file."""
    path.unlink()
    make(path)


LAYER = "model.layers.1.mlp.up_proj.weight"


def replace_base(folder, model):
    shutil.rmtree(folder / "base")
    save_model(model, folder / "base")
    save_tokenizer(folder / "base")


def unrelated_base(folder):
    replace_base(folder, tiny_llama(seed=7))


def other_tokens(folder):
    """A base with a WordPiece-like vocabulary of its own under the same number of rows."""
    from convert_parts import save_word_tokenizer

    for name in ("tokenizer.model", "tokenizer_config.json", "special_tokens_map.json"):
        (folder / "base" / name).unlink()
    save_word_tokenizer(folder / "base", VOCABULARY)


def wide_layer(state):
    state[LAYER] = torch.zeros(48, 40).half()


def nan(state):
    state[LAYER][3, 3] = float("nan")


def infinite_base(folder):
    model = tiny_llama()
    with torch.no_grad():
        model.get_parameter(LAYER)[5, 5] = float("inf")
    replace_base(folder, model)


def overflow(state):
    state[LAYER][:] = 65_000


CASES = {
    "base without a layer": (
        lambda f: replace_base(f, tiny_llama(num_hidden_layers=3)),
        "num_hidden_layers is 2, the base's 3",
    ),
    "other hidden size": (lambda f: replace_base(f, tiny_llama(hidden_size=16)), "hidden_size is 32, the base's 16"),
    "base of the same size": (unrelated_base, "do not resemble.*cosine"),
    "vocabulary that shrinks": (
        lambda f: replace_base(f, tiny_llama(VOCABULARY + 50)),
        r"\[316, 32\] on the delta's side, \[350, 32\] in the base",
    ),
    "other vocabulary": (other_tokens, "another base.*other ids"),
    "tensor missing in the delta": (
        lambda f: change_delta(f, lambda s: s.pop(LAYER)),
        f"lacks {LAYER}, which the base",
    ),
    "tensor missing in the base": (
        lambda f: change_delta(f, lambda s: s.update({"model.layers.0.extra.weight": torch.ones(2)})),
        "lacks model.layers.0.extra.weight, which .*delta has",
    ),
    "other shape": (lambda f: change_delta(f, wide_layer), r"\[48, 40\] on the delta's side, \[48, 32\] in the base"),
    "NaN": (lambda f: change_delta(f, nan), "the delta holds NaN or inf"),
    "inf in the base": (infinite_base, "the base holds NaN or inf"),
    "too few rows": (
        lambda f: save_tokenizer(f / "delta", [*ITEM_TOKENS, "<e_0>"]),
        "317 tokens, the embedding only 316 rows",
    ),
    "no item tokens": (lambda f: (f / "delta/added_tokens.json").unlink(), "no item tokens"),
    "no tokenizer": (lambda f: [p.unlink() for p in (f / "delta").glob("tokenizer*")], "has no tokenizer"),
    "item token on a token of the base": (
        lambda f: change_json(f / "delta/added_tokens.json", **{"<a_0>": 299}),
        "added_tokens.json: gives <a_0> the id 299, but",
    ),
    "a gap between the ids": (
        lambda f: change_json(f / "delta/added_tokens.json", **{ITEM_TOKENS[-1]: 400}),
        "gives <d_3> the id 400, but",
    ),
    "shard missing": (
        lambda f: (f / "delta/pytorch_model-00002-of-00003.bin").unlink(),
        "pytorch_model-00002-of-00003.bin: no such file",
    ),
    "shard cut short": (
        lambda f: (f / "delta/pytorch_model-00002-of-00003.bin").write_bytes(b"PK\x03\x04 cut"),
        "pytorch_model-00002-of-00003.bin: not a readable torch file",
    ),
    "safetensors cut short": (
        lambda f: (f / "base/model.safetensors").write_bytes((f / "base/model.safetensors").read_bytes()[:-10]),
        "model.safetensors: not a readable safetensors file",
    ),
    "broken index": (lambda f: (f / "delta/pytorch_model.bin.index.json").write_text("{"), "broken JSON at line 1"),
    "index without map": (lambda f: (f / "delta/pytorch_model.bin.index.json").write_text("[]"), "no weight_map"),
    "no config": (lambda f: (f / "base/config.json").unlink(), "config.json: no such file"),
    "own code": (
        lambda f: change_json(f / "delta/config.json", auto_map={"AutoConfig": "evil.Config"}),
        "needs code of its own",
    ),
    "no weights": (lambda f: (f / "base/model.safetensors").unlink(), "has no weights"),
    "own code for the tokenizer": (
        lambda f: change_json(f / "delta/tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.T", None]}),
        "needs code of its own",
    ),
    "empty weights": (
        lambda f: (f / "base/model.safetensors").write_bytes(b""),
        "model.safetensors: not a readable safetensors file",
    ),
    "a folder as weights": (
        lambda f: instead(f / "base/model.safetensors", Path.mkdir),
        "model.safetensors: not a regular file",
    ),
    "a pipe as weights": (
        lambda f: instead(f / "delta/pytorch_model-00002-of-00003.bin", os.mkfifo),
        "pytorch_model-00002-of-00003.bin: not a regular file",
    ),
    "a pipe as index": (
        lambda f: instead(f / "delta/pytorch_model.bin.index.json", os.mkfifo),
        "index.json: not a regular file",
    ),
    "a pipe as config": (lambda f: instead(f / "base/config.json", os.mkfifo), "config.json: not a regular file"),
    "a device as tokenizer": (
        lambda f: instead(f / "delta/tokenizer.model", lambda path: path.symlink_to("/dev/zero")),
        "tokenizer.model: a link that leads out",
    ),
    "config that is a list": (lambda f: (f / "base/config.json").write_text("[]"), "config.json: not a JSON object"),
    "config without a type": (lambda f: (f / "base/config.json").write_text("{}"), "config.json: "),
    "config of no language model": (
        lambda f: change_json(f / "delta/config.json", model_type="vit"),
        "its model_type is vit",
    ),
    "a number as text": (lambda f: change_json(f / "delta/config.json", hidden_size="x"), "config.json: "),
    "heads that do not divide": (lambda f: change_json(f / "base/config.json", num_attention_heads=7), "config.json: "),
    "no heads": (lambda f: change_json(f / "base/config.json", num_attention_heads=0), "config.json: "),
    "negative sizes": (lambda f: change_json(f / "base/config.json", intermediate_size=-5), "config.json|another base"),
    "endless layers": (
        lambda f: change_json(f / "base/config.json", num_hidden_layers=10**9),
        "num_hidden_layers is 1000000000",
    ),
    "sizes that differ from the weights": (
        lambda f: [change_json(f / side / "config.json", intermediate_size=64) for side in ("base", "delta")],
        r"is \[48, 32\], config.json makes it \[64, 32\]",
    ),
    "fewer layers than the weights": (
        lambda f: [change_json(f / side / "config.json", num_hidden_layers=1) for side in ("base", "delta")],
        "layers.1.*(is not part of|lacks)",
    ),
    "more layers than the weights": (
        lambda f: [change_json(f / side / "config.json", num_hidden_layers=3) for side in ("base", "delta")],
        "lacks model.layers.2",
    ),
    "a tokenizer that is nothing": (
        lambda f: (f / "delta/tokenizer.json").write_text("{}"),
        "the tokenizer cannot be read",
    ),
    "a tokenizer that is a list": (lambda f: (f / "delta/tokenizer.json").write_text("[]"), "tokenizer"),
    "a tokenizer cut short": (
        lambda f: os.truncate(f / "delta/tokenizer.model", 100),
        "the tokenizer cannot be read",
    ),
    "tokens that are a list": (
        lambda f: (f / "delta/added_tokens.json").write_text("[]"),
        "the tokenizer cannot be read",
    ),
    "tokens without numbers": (lambda f: change_json(f / "delta/added_tokens.json", **{"<a_0>": "x"}), "token"),
    "settings of a tokenizer that are a list": (
        lambda f: (f / "delta/tokenizer_config.json").write_text("[]"),
        "tokenizer_config.json: not a JSON object",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_refused_with_one_line_and_nothing_left(folder, case):
    spoil, message = CASES[case]
    spoil(folder)
    with pytest.raises(UserError, match=message) as caught:
        merge(folder)
    assert "\n" not in str(caught.value)
    assert not (folder / "target").exists()
    assert not list(folder.glob(".target*"))


def test_float16_overflow_is_named_and_another_type_helps(folder):
    change_delta(folder, overflow)
    state = half(tiny_llama()) | {LAYER: torch.full((48, 32), 2_000.0).half()}
    (folder / "base/model.safetensors").unlink()
    save_bin(state, folder / "base")
    with pytest.raises(UserError, match="overflows float16; use --dtype"):
        merge(folder)
    merge(folder, "--dtype", "float32")


def test_unrelated_base_is_possible_on_request(folder):
    unrelated_base(folder)
    merge(folder, "--any-base")
    assert (folder / "target/config.json").is_file()


@pytest.mark.slow
def test_status_2_and_no_traceback(folder):
    (folder / "base/config.json").unlink()
    words = ["--base-model-path", folder / "base", "--delta-path", folder / "delta"]
    result = run_script("convert/merge_delta.py", *words, "--target-model-path", folder / "target")
    assert result.returncode == 2
    assert result.stderr.splitlines()[-1].startswith("error: ")
    assert "Traceback" not in result.stderr


def test_make_delta_names_a_target_that_diverged(tmp_path):
    base = tiny_llama()
    target = fine_tuned(base)
    with torch.no_grad():
        target.model.layers[0].mlp.up_proj.weight[0, 0] = float("nan")
    save_model(base, tmp_path / "base")
    save_tokenizer(tmp_path / "base")
    save_model(target, tmp_path / "tuned", dtype=torch.float32)
    save_tokenizer(tmp_path / "tuned", ITEM_TOKENS)
    words = ["--base-model-path", f"{tmp_path}/base", "--target-model-path", f"{tmp_path}/tuned"]
    with pytest.raises(UserError, match="target holds NaN or inf"):
        make_delta.main([*words, "--delta-path", f"{tmp_path}/delta"])
    assert not (tmp_path / "delta").exists()


@pytest.mark.parametrize("base_tied", [False, True])
@pytest.mark.parametrize("target_tied", [False, True])
def test_tied_and_untied_on_either_side(tmp_path, base_tied, target_tied):
    from transformers import AutoModelForCausalLM

    base = tiny_llama(tied=base_tied)
    target = tiny_llama(VOCABULARY + len(ITEM_TOKENS), tied=target_tied, seed=0)
    with torch.no_grad():
        target.get_input_embeddings().weight[:VOCABULARY] = base.get_input_embeddings().weight
    save_model(base, tmp_path / "base")
    save_tokenizer(tmp_path / "base")
    save_delta(base, target, tmp_path / "delta")
    merge(tmp_path)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "target", dtype=torch.float32)
    ids = torch.arange(40)[None]
    assert torch.allclose(merged(ids).logits, target(ids).logits, atol=2e-3)
    assert merged.config.tie_word_embeddings == target_tied
