"""convert.sh on real DeepSpeed checkpoints (two processes, bf16): the logits of the trained model come back."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import convert_train
import pytest
import torch
from convert_parts import ITEM_TOKENS, ROOT, VOCABULARY, save_model, tiny_llama
from running import together
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from convert import merge_lora

pytestmark = pytest.mark.slow
IDS = torch.arange(40)[None]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Train once per kind, convert, and give the run's folder: `runs("3", "--tied")`."""
    made = {}

    def run(*words: str) -> Path:
        if words not in made:
            folder = tmp_path_factory.mktemp("run") / "ckpt"
            together(convert_train.main, [words[0], str(folder), *words[1:]])
            result = convert(ROOT / "convert/convert.sh", folder)
            assert result.returncode == 0, result.stderr
            made[words] = folder
        return made[words]

    return run


def environment() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHON": sys.executable}


def convert(*words: object, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["bash", *map(str, words)], cwd=cwd, capture_output=True, text=True, env=environment())


@pytest.mark.parametrize("words", [("2",), ("3",)], ids=" ".join)
def test_every_checkpoint_is_converted_with_the_logits_of_the_run(runs, words):
    run = runs(*words)
    final = run / "final-checkpoint-2"
    model = AutoModelForCausalLM.from_pretrained(final)
    assert model.dtype == torch.float32
    trained = torch.load(run / "logits.pt")
    assert torch.allclose(model.to(torch.bfloat16)(IDS).logits.float(), trained, atol=0.02)
    assert (run / "final-checkpoint-1").is_dir() == (words == ("2",))  # as many as the run saved
    if words == ("2",):
        other = AutoModelForCausalLM.from_pretrained(run / "final-checkpoint-1").to(torch.bfloat16)
        assert not torch.allclose(other(IDS).logits.float(), trained, atol=0.05)
    assert len(AutoTokenizer.from_pretrained(final)) == VOCABULARY + len(ITEM_TOKENS)
    assert (final / "trainer_state.json").is_file()
    assert (final / "training_args.bin").is_file()
    assert not list(final.glob("global_step*"))


def test_float32_master_weights_round_to_the_16_bit_weights_that_the_run_saved(runs):
    run = runs("2")
    saved = load_file(run / "checkpoint-2/model.safetensors")
    final = load_file(run / "final-checkpoint-2/model.safetensors")
    assert all(torch.equal(final[name].to(torch.bfloat16), saved[name]) for name in saved)


def test_adapter_of_a_lora_run(runs, tmp_path):
    """The checkpoint's own adapter file is bfloat16; the converted one has the float32 weights behind it."""
    run = runs("3", "--lora")
    saved = load_file(run / "checkpoint-2/adapter_model.safetensors")
    final = load_file(run / "final-checkpoint-2/adapter_model.safetensors")
    assert final.keys() == saved.keys()
    assert all(torch.equal(final[name].to(torch.bfloat16), saved[name]) for name in saved)
    save_model(tiny_llama(VOCABULARY + len(ITEM_TOKENS)), tmp_path / "base", dtype=torch.float32)
    words = ["--adapter-path", f"{run}/final-checkpoint-2", "--base-model-path", f"{tmp_path}/base"]
    merge_lora.main([*words, "--target-model-path", f"{tmp_path}/merged"])
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").to(torch.bfloat16)
    assert torch.allclose(merged(IDS).logits.float(), torch.load(run / "logits.pt"), atol=0.02)


def test_zero_2_and_zero_3_agree(runs):
    first, second = (load_file(runs(stage) / "final-checkpoint-2/model.safetensors") for stage in "23")
    assert all(torch.allclose(first[name], second[name], atol=1e-3) for name in first)


def test_paths_relative_to_the_root_from_inside_convert(runs, tmp_path):
    """`cd convert; ./convert.sh ./ckpt/D/` with a copy of the repository's scripts around it."""
    root = tmp_path / "repository"
    shutil.copytree(ROOT / "convert", root / "convert", ignore=shutil.ignore_patterns("__pycache__"))
    for path in ROOT.glob("*.py"):
        shutil.copy(path, root)
    shutil.copytree(runs("3") / "checkpoint-2", root / "ckpt/D/checkpoint-2")
    command = ["bash", "./convert.sh", "./ckpt/D/"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": environment()}
    both = [subprocess.Popen(command, cwd=root / "convert", **pipes) for _ in range(2)]  # at once: no harm is done
    results = [(process.communicate(timeout=200), process.returncode) for process in both]
    for (_, errors), status in results:
        assert status == 0 or "another process is writing it now" in errors or "exists; choose" in errors, errors
    assert 0 in [status for _, status in results]
    final = root / "ckpt/D/final-checkpoint-2"
    assert (final / "config.json").is_file()
    again = convert("./convert.sh", "./ckpt/D/", cwd=root / "convert")
    assert again.returncode == 0 and "skipped" in again.stdout
    shutil.rmtree(final)
    assert convert("convert.sh", "../ckpt/D", cwd=root / "convert").returncode == 0
    assert (final / "config.json").is_file()


@pytest.mark.parametrize(("words", "message"), [((), "give the folder"), (("./nowhere",), "no such folder")])
def test_wrong_folder_is_one_line_and_status_2(words, message):
    result = convert(ROOT / "convert/convert.sh", *words)
    assert result.returncode == 2
    assert message in result.stderr.splitlines()[-1]
