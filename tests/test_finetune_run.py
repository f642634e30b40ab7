"""finetune.py as a user runs it: processes, ZeRO-3, resumption, LoRA, what lies in the output folder."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import make_model
from toy_data import write_drawn_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from utils import UserError

ROOT = Path(__file__).resolve().parent.parent
ZERO3 = ("--bf16", "--packing", "--learning_rate", "3e-2", "--eval_ranking", "24")


def command(folder: Path, *flags: str, processes: int = 1, out: str = "out") -> list[str]:
    """finetune.py on the toy data; flags given here win over those before them."""
    start = [sys.executable]
    if processes > 1:
        start += ["-m", "torch.distributed.run", f"--nproc_per_node={processes}", f"--master_port={free_port()}"]
    own = ["--base_model", str(folder / "base"), "--output_dir", str(folder / out), "--dataset", "Toy"]
    own += ["--data_path", str(folder / "data"), "--per_device_batch_size", "4", "--gradient_accumulation_steps", "1"]
    own += [
        "--learning_rate",
        "1e-3",
        "--epochs",
        "2",
        "--only_train_response",
        "--train_data_sample_num",
        "12,4,4,6,3,3",
    ]
    own += ["--logging_step", "1", "--valid_prompt_sample_num", "1", "--report_to", "none"]
    return [*start, str(ROOT / "finetune.py"), *own, *flags]


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def inside(args: list[str]) -> None:
    """finetune.py in this process: for one process without DeepSpeed, which saves the time that imports take."""
    import finetune

    finetune.main(args[2:])


def run(*args: str, status: int = 0, **more: object) -> str:
    env = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(*args, env=env, cwd=ROOT, capture_output=True, text=True, timeout=240, **more)
    assert done.returncode == status, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("finetune")
    make_model("llama", folder / "base")
    write_drawn_dataset(folder / "data")
    return folder


def losses(path: Path) -> list[tuple[int, float]]:
    state = json.loads((path / "trainer_state.json").read_text())
    return [(row["step"], row["loss"]) for row in state["log_history"] if "loss" in row]


def evaluations(path: Path) -> dict[int, float]:
    state = json.loads((path / "trainer_state.json").read_text())
    return {row["step"]: row["eval_loss"] for row in state["log_history"] if "eval_loss" in row}


def loss_of(model: torch.nn.Module, tokenizer: object, folder: Path) -> float:
    """The validation loss, sample by sample, without any of the training's code for it."""
    from data import load_data
    from prompt import load_prompts
    from samples import ValidSet
    from tasks import HistoryFormat

    data = load_data(str(folder / "data"), "Toy", ".index.json")
    valid = ValidSet(data, load_prompts(None), HistoryFormat(), 42, prompt_num=1)
    total = count = 0.0
    for number in range(len(valid)):
        sample = valid[number]
        prompt = tokenizer(sample["prompt"])["input_ids"]
        whole = tokenizer(sample["prompt"] + sample["response"])["input_ids"] + [tokenizer.eos_token_id]
        labels = [-100] * len(prompt) + whole[len(prompt) :]
        with torch.no_grad():
            total += model(torch.tensor([whole]), labels=torch.tensor([labels])).loss.item() * (
                len(whole) - len(prompt)
            )
        count += len(whole) - len(prompt)
    return total / count


def ranking_of(model: torch.nn.Module, tokenizer: object, folder: Path) -> dict[str, float]:
    """HR and NDCG of all validation users."""
    from data import load_data
    from prompt import load_prompts
    from samples import ValidSet
    from tasks import HistoryFormat
    from training import Ranking

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
    run(command(world, *flags, "--per_device_batch_size", "2", "--packing", processes=2, out="ddp"))
    one, two = (losses(world / out / "checkpoint-8") for out in ("one", "ddp"))
    assert [step for step, _ in one] == [step for step, _ in two] == list(range(1, 9))
    assert [loss for _, loss in two] == pytest.approx([loss for _, loss in one], rel=1e-4)
    assert one[-1][1] < one[0][1]
    tuned = [load_file(world / out / "model.safetensors") for out in ("one", "ddp")]
    for key in tuned[0]:
        torch.testing.assert_close(tuned[0][key], tuned[1][key], atol=1e-4, rtol=1e-2)


THREE_EPOCHS = ("--deepspeed", "none", "--save_and_eval_strategy", "epoch", "--epochs", "3")


@pytest.fixture(scope="module")
def whole(world) -> Path:
    """The folder of a run of three epochs in one process, never interrupted: 24 steps."""
    inside(command(world, *THREE_EPOCHS, out="whole"))
    return world / "whole"


def check_equal_runs(one: Path, other: Path) -> None:
    """The same losses and, to the bit, the same weights."""
    last = max(one.glob("checkpoint-*"), key=lambda path: int(path.name[11:])).name
    assert losses(one / last) == losses(other / last)
    weights, others = (load_file(folder / "model.safetensors") for folder in (one, other))
    assert all(torch.equal(weights[key], others[key]) for key in weights)


@pytest.mark.slow
def test_kill_minus_nine_then_resume_equals_the_run_without_interruption(world, whole, capsys):
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    log = world / "cut" / "train.log"
    for step in (3, 12, 18):  # before the first checkpoint, and within each later epoch
        victim = subprocess.Popen(
            command(world, *THREE_EPOCHS, "--resume_from_checkpoint", "auto", out="cut"),
            env=env,
            cwd=ROOT,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and not (log.is_file() and f"step {step}/" in log.read_text()):
            time.sleep(0.02)
        victim.send_signal(signal.SIGKILL)
        victim.wait()
        assert f"step {step}/" in log.read_text()
        assert not (world / "cut" / "config.json").exists(), "it was killed too late"
    inside(command(world, *THREE_EPOCHS, "--resume_from_checkpoint", "auto", out="cut"))
    text = capsys.readouterr().out
    assert "resuming from" in text and "checkpoint-16" in text
    check_equal_runs(whole, world / "cut")


KILLED_IN_A_SAVE = """
import os, pathlib, signal, sys
import finetune
rename, replace, move = pathlib.Path.rename, pathlib.Path.replace, sys.argv.pop(1)
def die(self, target):
    if str(self).endswith(move):
        os.kill(os.getpid(), signal.SIGKILL)
    return (rename if "checkpoint" in str(self) else replace)(self, target)
pathlib.Path.rename = pathlib.Path.replace = die
finetune.main(sys.argv[2:])
"""


@pytest.mark.slow
def test_a_save_that_is_killed_never_becomes_the_latest(world, whole, capsys):
    moves = (".checkpoint-16.partial", ".final/model.safetensors", ".final/config.json")
    for move, latest in zip(moves, ("checkpoint-8", "checkpoint-24", "checkpoint-24"), strict=True):
        flags = command(world, *THREE_EPOCHS, "--resume_from_checkpoint", "auto", out="saves")
        killed = subprocess.run(
            [sys.executable, "-c", KILLED_IN_A_SAVE, move, *flags[1:]],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            cwd=ROOT,
            capture_output=True,
        )
        assert killed.returncode == -signal.SIGKILL
        assert (world / "saves" / move).exists()
        assert not (world / "saves" / "config.json").exists()
        found = max((world / "saves").glob("checkpoint-*"), key=lambda path: int(path.name[11:]))
        assert found.name == latest
    inside(command(world, *THREE_EPOCHS, "--resume_from_checkpoint", "auto", out="saves"))
    assert "checkpoint-24" in capsys.readouterr().out
    assert not list((world / "saves").glob(".*"))
    check_equal_runs(whole, world / "saves")


@pytest.mark.slow
def test_changed_data_and_flags_are_refused_on_resume(world):
    flags = ["--deepspeed", "none", "--epochs", "1", "--tasks", "seqrec", "--train_prompt_sample_num", "1"]
    flags += ["--train_data_sample_num", "8"]
    inside(command(world, *flags, out="once"))
    again = [*flags, "--resume_from_checkpoint", "auto"]
    text = run(command(world, *again, "--max_his_len", "3", out="once"), status=2)
    assert "error: --max_his_len is 3, but the run to go on with had 20" in text and "Traceback" not in text
    items = world / "data" / "Toy" / "Toy.item.json"
    before = items.read_text()
    try:
        items.write_text(before.replace("made to last", "made to break"))
        with pytest.raises(UserError, match="Toy.item.json has changed since the run began"):
            inside(command(world, *again, out="once"))
    finally:
        items.write_text(before)
    with pytest.raises(UserError, match="holds a run already"):
        inside(command(world, *flags, out="once"))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["z2_bf16", "z2_bf16_offload", "z3_bf16_offload", "z3_bf16_save16bit"])
def test_every_bf16_configuration_trains_on_two_nodes(world, name):
    """Two torchrun agents on loopback stand for two nodes."""
    flags = ["--bf16", "--deepspeed", f"config/ds_{name}.json", "--epochs", "1"]
    args = command(world, *flags, out=name)[1:]
    start = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=1", "--rdzv_backend=c10d"]
    start += [f"--rdzv_endpoint=127.0.0.1:{free_port()}", "--rdzv_id=test", "--local_addr=127.0.0.1"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    nodes = [
        subprocess.Popen(
            [*start, *args], env=env, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        for _ in range(2)
    ]
    texts = [node.communicate(timeout=240)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], texts[0][-3000:] + texts[1][-3000:]
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


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 3 MB: enough for a few of the toy's checkpoints."""
    path = tmp_path / "disk"
    path.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(path)]
    if sys.platform != "linux" or os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a small disk needs root")
    yield path
    subprocess.run(["umount", "--lazy", str(path)], check=True)  # weights of it may still be mapped


@pytest.mark.slow
def test_a_full_disk_stops_the_run_and_destroys_nothing(world, small_disk, monkeypatch):
    import training

    flags = ["--deepspeed", "none", "--output_dir", str(small_disk), "--resume_from_checkpoint", "auto"]
    check, filler = training.check_space, small_disk / "filler"

    def fill(folder: Path, needed: int, what: str) -> None:
        """The disk fills up before the second checkpoint."""
        if what.startswith("checkpoint-16"):
            filler.write_bytes(bytes(shutil.disk_usage(small_disk).free - needed // 4))

    def fill_and_check(*args: object) -> None:
        fill(*args)
        check(*args)

    cases = {"the disk is too full: checkpoint-16 needs": fill_and_check, "the disk is full; the checkpoint was": fill}
    for message, looks in cases.items():
        monkeypatch.setattr(training, "check_space", looks)
        with pytest.raises(UserError, match=message):
            inside(command(world, *flags))
        assert [path.name for path in training.checkpoints(small_disk)] == ["checkpoint-8"]
        assert not list(small_disk.glob(".checkpoint*"))
        load_file(small_disk / "checkpoint-8" / "model.safetensors")
        filler.unlink()
    monkeypatch.setattr(training, "check_space", check)
    inside(command(world, *flags))
    steps = [step for step, _ in losses(small_disk / "checkpoint-16")]
    assert steps == list(range(1, 17)) and (small_disk / "model.safetensors").is_file()


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
    text = run(command(world, *flags, processes=processes, out=out))
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
