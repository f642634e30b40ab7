"""finetune.py from data to a plain model, with several processes: ZeRO-3, DDP, two nodes, a rank that is killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from finetune_world import command, evaluations, in_two, inside, loss_of, losses, make_world, run
from running import ROOT, free_port
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

ZERO3 = ("--bf16", "--packing", "--learning_rate", "3e-2", "--eval_ranking", "24")


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    return make_world(tmp_path_factory.mktemp("finetune"))


def ranking_of(model: torch.nn.Module, tokenizer: object, folder: Path) -> dict[str, float]:
    """HR and NDCG of all validation users."""
    from data import load_data
    from prompt import load_prompts
    from samples import ValidSet
    from tasks import HistoryFormat
    from valid_ranking import Ranking

    data = load_data(str(folder / "data"), "Toy", ".index.json")
    valid = ValidSet(data, load_prompts(None), HistoryFormat(), 42, prompt_num=1)
    return Ranking(valid, tokenizer, 24, 4, 42)(model.eval())


@pytest.fixture(scope="module")
def zero3(world) -> str:
    """What a run under ZeRO-3 with two processes, in `world/out`, said."""
    return run(command(world, *ZERO3, processes=2))


@pytest.mark.slow
def test_two_processes_with_zero3_from_finetune_to_a_plain_model(world, zero3):
    text = zero3
    assert "the 14 item-token rows train, in embeddings and head" in text
    assert "Warning" not in text, text
    folder = world / "out"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert load_file(folder / "model.safetensors")["lm_head.weight"].dtype == torch.bfloat16

    # what lies in the folder is the best checkpoint, not the last
    scores = evaluations(max(folder.glob("checkpoint-*"), key=lambda path: int(path.name[11:])))
    assert len(scores) == 2
    assert loss_of(model, tokenizer, world) == pytest.approx(min(scores.values()), abs=0.03)
    assert abs(scores[min(scores)] - scores[max(scores)]) > 0.06, "the test needs two different evaluations"

    # and one process ranks the users as the two together did
    figures = ranking_of(model.to(torch.bfloat16), tokenizer, world)
    last = max(folder.glob("checkpoint-*"), key=lambda path: int(path.name[11:]))
    state = json.loads((last / "trainer_state.json").read_text())
    logged = [row for row in state["log_history"] if row.get("eval_loss") == min(scores.values())]
    for name in ("hit@10", "ndcg@10"):
        assert logged[0][f"eval_{name}"] == pytest.approx(figures[name], abs=0.05) and figures[name] > 0

    # the rows of the item tokens moved
    from modeling import add_item_tokens, grow_vocabulary, load_model, load_tokenizer

    base, names = load_model(world / "base"), load_tokenizer(world / "base")
    tokens = sorted({f"<a_{i}>" for i in range(5)} | {f"<b_{i}>" for i in range(6)} | {f"<c_{i}>" for i in range(3)})
    ids = add_item_tokens(names, tokens)
    torch.manual_seed(42)
    grow_vocabulary(base, names, ids)
    for get in ("get_input_embeddings", "get_output_embeddings"):
        before, after = getattr(base, get)().weight[ids], getattr(model, get)().weight[ids]
        moved = (before - after).abs().amax(1) > 1e-3
        assert bool(moved.all()), (get, moved)
    log = (folder / "train.log").read_text()
    assert "tokens/s" in log and "loss_itemsearch" in log and "eval_loss" in log
    assert not list(folder.glob(".*")) and not (folder / "base_with_item_tokens").exists()


@pytest.mark.slow
def test_two_processes_without_deepspeed_have_the_losses_of_one(world):
    flags = ["--deepspeed", "none", "--epochs", "1", "--loss_average", "token"]
    inside(command(world, *flags, out="one"))
    # packed: samples are dealt to the processes by length, within a step
    in_two(command(world, *flags, "--per_device_batch_size", "2", "--packing", out="ddp"))
    one, two = (losses(world / out / "checkpoint-8") for out in ("one", "ddp"))
    assert [step for step, _ in one] == [step for step, _ in two] == list(range(1, 9))
    assert [loss for _, loss in two] == pytest.approx([loss for _, loss in one], rel=1e-4)
    assert one[-1][1] < one[0][1]
    tuned = [load_file(world / out / "model.safetensors") for out in ("one", "ddp")]
    for key in tuned[0]:
        torch.testing.assert_close(tuned[0][key], tuned[1][key], atol=1e-4, rtol=1e-2)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["z2_bf16", "z2_bf16_offload", "z3_bf16_offload", "z3_bf16_save16bit"])
def test_every_bf16_configuration_trains_on_two_nodes(world, name):
    """Two torchrun agents on loopback stand for two nodes; after the first configuration two processes stand for these."""
    args = command(world, "--bf16", "--deepspeed", f"config/ds_{name}.json", "--epochs", "1", out=name)
    if name == "z2_bf16":
        start = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=1"]
        start += ["--rdzv_backend=c10d", f"--rdzv_endpoint=127.0.0.1:{free_port()}", "--rdzv_id=test"]
        pipes = {"cwd": ROOT, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        agents = [subprocess.Popen([*start, "--local_addr=127.0.0.1", *args[1:]], env=env, **pipes) for _ in range(2)]
        texts = [agent.communicate(timeout=240)[0] for agent in agents]
        assert [agent.returncode for agent in agents] == [0, 0], texts[0][-3000:] + texts[1][-3000:]
    else:
        in_two(args, nodes=2)
    assert json.loads((world / name / "run.json").read_text())["processes"] == 2
    AutoModelForCausalLM.from_pretrained(world / name)


def process_of_rank(number: int, parent: int) -> int:
    """The process id of torchrun's worker with that global rank."""
    for path in Path("/proc").glob("[0-9]*"):
        try:
            settings = (path / "environ").read_bytes().split(b"\0")
            father = int((path / "stat").read_text().rpartition(")")[2].split()[1])
        except OSError:  # gone meanwhile, or another user's
            continue
        if father == parent and f"RANK={number}".encode() in settings:
            return int(path.name)
    raise AssertionError(f"torchrun has no worker of rank {number}")


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds a rank's process in /proc")
def test_one_rank_killed_under_zero3_then_resumed_equals_the_run_without_interruption(world, zero3):
    whole, cut = world / "out", world / "zero-cut"
    args = command(world, *ZERO3, "--resume_from_checkpoint", "auto", processes=2, out="zero-cut")
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    log = cut / "train.log"
    for victim, step in ((0, 2), (1, 6)):  # before there is a checkpoint, and after the first
        with open(world / "zero-cut.log", "w") as output:
            agent = subprocess.Popen(args, env=env, cwd=ROOT, stdout=output, stderr=output)
            deadline = time.monotonic() + 120
            while time.monotonic() < deadline and not (log.is_file() and f"step {step}/8" in log.read_text()):
                time.sleep(0.02)
            os.kill(process_of_rank(victim, agent.pid), signal.SIGKILL)
            assert agent.wait(timeout=120) != 0, "torchrun ends the other rank too"
        assert f"step {step}/8" in log.read_text()
        assert not (cut / "config.json").exists(), "it was killed too late"
    text = run(args)
    assert f"resuming from {cut / 'checkpoint-4'}" in text
    assert losses(cut / "checkpoint-8") == losses(whole / "checkpoint-8")
    assert evaluations(cut / "checkpoint-8") == evaluations(whole / "checkpoint-8")
    one, other = (load_file(folder / "model.safetensors") for folder in (whole, cut))
    assert all(torch.equal(one[key], other[key]) for key in one)
