"""finetune.py --lora: from an adapter to a model that scores as it says, to another run, and rows that alone train."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from finetune_world import command, evaluations, in_two, inside, loss_of, losses, make_world, run
from safetensors.torch import load_file
from tiny_models import make_model
from toy_data import write_drawn_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    return make_world(tmp_path_factory.mktemp("finetune"))


def merged_by_hand(world: Path, adapter: Path) -> torch.nn.Module:
    """Base plus adapter from the adapter's tensors, without PEFT: W + alpha / r · B A, and the modules saved whole."""
    model = AutoModelForCausalLM.from_pretrained(world / "base", dtype=torch.float32)
    weights = load_file(adapter / "adapter_model.safetensors")
    config = json.loads((adapter / "adapter_config.json").read_text())
    model.resize_token_embeddings(len(AutoTokenizer.from_pretrained(adapter)), mean_resizing=False)
    state = model.state_dict()
    for key, value in weights.items():
        name = key.removeprefix("base_model.model.")
        if name.endswith("lora_A.weight"):
            other = weights[key.replace("lora_A", "lora_B")]
            state[name.replace("lora_A.weight", "weight")] += (
                config["lora_alpha"] / config["r"] * other.float() @ value.float()
            )
        elif "lora_B" not in name:
            state[name] = value.float()
    model.load_state_dict(state)
    return model.eval()


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_lora_from_finetune_to_a_model_that_scores_as_the_adapter_says(world, processes):
    from modeling import load_for_test

    out = f"lora{processes}"
    flags = ["--lora", "--learning_rate", "1e-2", "--packing"] + (
        ["--bf16"] if processes > 1 else ["--deepspeed", "none"]
    )
    args = command(world, *flags, out=out)
    text = run(args) if processes == 1 else in_two(args)
    assert "the 14 item-token rows train, in embeddings and head" in text
    folder = world / out
    wanted = merged_by_hand(world, folder)
    model, tokenizer = load_for_test(str(folder), str(world / "base"), lora=True)
    ids = tokenizer("Which item comes after <a_1><b_2><c_0>?", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, wanted(ids).logits, atol=1e-4, rtol=1e-3)
        before = AutoModelForCausalLM.from_pretrained(world / "base")(ids[:, :3]).logits
        assert not torch.allclose(model(ids[:, :3]).logits[..., :300], before, atol=1e-2)
    last = max(folder.glob("checkpoint-*"), key=lambda path: int(path.name[11:]))
    assert loss_of(model, tokenizer, world) == pytest.approx(min(evaluations(last).values()), abs=0.02)

    if processes == 1:
        check_a_later_run_begins_with_the_adapter(world, folder, flags)
        check_adapter_and_merged_model_rank_alike(world, folder)


def check_adapter_and_merged_model_rank_alike(world: Path, adapter: Path) -> None:
    """test.py --lora and, after merge_lora.py, test.py."""
    import testing
    from convert import merge_lora

    merged = world / "merged"
    merge_lora.main(
        ["--adapter-path", str(adapter), "--base-model-path", str(world / "base"), "--target-model-path", str(merged)]
    )
    results = []
    for flags in (
        ["--lora", "--base_model", str(world / "base"), "--ckpt_path", str(adapter)],
        ["--ckpt_path", str(merged)],
    ):
        flags += ["--data_path", str(world / "data"), "--dataset", "Toy", "--num_beams", "10", "--test_batch_size", "8"]
        target = world / f"result{len(results)}.json"
        testing.test_checkpoint("", [*flags, "--results_file", str(target)], single=True)
        lines = (world / f"{target.stem}.predictions.jsonl").read_text().splitlines()
        rows = [json.loads(line) for line in lines]
        results.append((json.loads(target.read_text())["mean_results"], [row["items"] for row in rows]))
    assert results[0] == results[1] and results[0][0]["hit@10"] > 0 and len(results[0][1]) == 24


def check_a_later_run_begins_with_the_adapter(world: Path, folder: Path, flags: list[str]) -> None:
    """The adapter may be in the older format."""
    old = world / "lora-old"
    old.mkdir()
    torch.save(load_file(folder / "adapter_model.safetensors"), old / "adapter_model.bin")
    (old / "adapter_config.json").write_text((folder / "adapter_config.json").read_text())
    more = ["--resume_from_checkpoint", str(old), "--learning_rate", "1e-9", "--epochs", "1"]
    inside(command(world, *flags, *more, out="lora-more"))
    one, other = (load_file(path / "adapter_model.safetensors") for path in (folder, world / "lora-more"))
    for key in one:
        torch.testing.assert_close(one[key].float(), other[key].float(), atol=1e-2, rtol=1e-2)


@pytest.mark.slow
@pytest.mark.parametrize("flags", [[], ["--load_in_4bit"], ["--load_in_8bit"]], ids=["lora", "4 bits", "8 bits"])
def test_only_the_new_rows_train(tmp_path, flags):
    from modeling import load_for_test

    make_model("llama", tmp_path / "base", hidden_size=64, intermediate_size=128, head_dim=16)
    write_drawn_dataset(tmp_path / "data")
    own = [
        "--lora",
        "--train_new_rows_only",
        "--deepspeed",
        "none",
        "--learning_rate",
        "1e-2",
        "--lora_target_modules",
        "q_proj",
    ]
    inside(command(tmp_path, *own, *flags, "--epochs", "1"))
    model, tokenizer = load_for_test(str(tmp_path / "out"), str(tmp_path / "base"), lora=True)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    for get in ("get_input_embeddings", "get_output_embeddings"):
        torch.testing.assert_close(getattr(model, get)().weight[:300], getattr(base, get)().weight[:300])
    last = max((tmp_path / "out").glob("checkpoint-*"), key=lambda path: int(path.name[11:]))
    scores = evaluations(last)
    assert loss_of(model, tokenizer, tmp_path) == pytest.approx(min(scores.values()), abs=0.1)
    assert losses(last)[-1][1] < losses(last)[0][1]
