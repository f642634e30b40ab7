"""What one step's loss is an average of: training against a plain loop in torch, sample by sample, without our code for it."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import record_batches
import torch
import torch.nn.functional as F
from record_batches import record
from running import together
from safetensors.torch import load_file
from test_finetune_models import prepared
from tiny_models import make_model
from toy_data import write_drawn_dataset
from transformers import AutoTokenizer

import finetune

RATE = 0.2
Batches = list[
    list[tuple[str, str, int | None]]
]  # prompt, response of each sample, and the process that it was drawn for


def flags(folder: Path, accumulation: int, *more: str) -> list[str]:
    """23 samples of six tasks, two epochs, plain gradient steps of a constant size."""
    own = ["--base_model", str(folder / "base"), "--output_dir", str(folder / "out"), "--dataset", "Toy"]
    own += ["--data_path", str(folder / "data"), "--deepspeed", "none", "--report_to", "none", "--only_train_response"]
    own += ["--optim", "sgd", "--learning_rate", str(RATE), "--lr_scheduler_type", "constant", "--weight_decay", "0"]
    own += ["--warmup_ratio", "0", "--per_device_batch_size", "3", "--gradient_accumulation_steps", str(accumulation)]
    own += ["--epochs", "2", "--logging_step", "1", "--train_data_sample_num", "6,4,4,4,2,3"]
    return [*own, "--save_and_eval_strategy", "steps", "--save_and_eval_steps", "1000", *more]


def loss_by_hand(
    model: Any,
    tokenizer: Any,
    processes: list[Batches],
    average: str,
    weights: torch.Tensor | None = None,
    term: Callable | None = None,
) -> torch.Tensor:
    """The loss of one step from the micro-batches of each process; a batch's mean by the weights of token ids, if given.

    `term(ids, length of the prompt, logits)` joins the loss of each labelled token.
    """
    means, total, count = [], 0.0, 0
    for batch in (batch for batches in processes for batch in batches):
        losses, shares = [], []
        for prompt, response, _ in batch:
            shown = len(tokenizer(prompt)["input_ids"])
            whole = tokenizer(prompt + response)["input_ids"] + [tokenizer.eos_token_id]
            logits = model(torch.tensor([whole]), use_cache=False).logits[0, shown - 1 : -1]
            losses.append(F.cross_entropy(logits, torch.tensor(whole[shown:]), reduction="none"))
            if term is not None:
                losses[-1] = losses[-1] + term(whole, shown, logits)
            shares.append(torch.ones(len(losses[-1])) if weights is None else weights[whole[shown:]])
        share = torch.cat(shares)
        means.append(torch.cat(losses) @ share / share.sum())
        total, count = total + torch.cat(losses).sum(), count + sum(map(len, losses))
    return torch.stack(means).mean() if average == "batch" else total / count


def as_drawn(processes: list[Batches]) -> list[Batches]:
    """The micro-batches before samples were dealt to the processes by length."""
    drawn: list[Batches] = [[] for _ in processes]
    for number, dealt in enumerate(zip(*processes, strict=True)):
        samples = [sample for batch in dealt for sample in batch]
        for process, batches in enumerate(drawn):
            own = [sample for sample in samples if sample[2] == process]
            batches.append(own or processes[process][number])
    return drawn


def train_by_hand(
    model: Any,
    tokenizer: Any,
    processes: list[Batches],
    accumulation: int,
    average: str,
    weights: torch.Tensor | None = None,
    term: Callable | None = None,
) -> list[tuple[float, float]]:
    """Change `model` as training does; loss and gradient norm of each step. An epoch's last step has what is left of it."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    epoch = len(processes[0]) // 2
    log = []
    for begin in (0, epoch):
        for start in range(begin, begin + epoch, accumulation):
            step = [batches[start : min(start + accumulation, begin + epoch)] for batches in processes]
            loss = loss_by_hand(model, tokenizer, step, average, weights, term)
            gradients = torch.autograd.grad(loss, parameters)
            norm = torch.stack([gradient.norm() for gradient in gradients]).norm()
            with torch.no_grad():
                for parameter, gradient in zip(parameters, gradients, strict=True):
                    parameter -= RATE * gradient / max(1.0, norm.item())
            log.append((loss.item(), norm.item()))
    return log


def check_log(history: list[dict], wanted: list[tuple[float, float]], rel: float = 1e-4) -> None:
    """The logged losses and gradient norms are those by hand."""
    rows = [row for row in history if "loss" in row]
    assert [row["loss"] for row in rows] == pytest.approx([loss for loss, _ in wanted], rel=rel)
    assert [row["grad_norm"] for row in rows] == pytest.approx([norm for _, norm in wanted], rel=10 * rel)


@pytest.fixture
def world(tmp_path: Path) -> Path:
    make_model("llama", tmp_path / "base")
    write_drawn_dataset(tmp_path / "data")
    return tmp_path


@pytest.mark.parametrize("packing", [[], ["--packing"]], ids=["padded", "packed"])
@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("average", ["batch", "token"])
@pytest.mark.parametrize("lora", [[], ["--lora", "--lora_dropout", "0"]], ids=["full", "lora"])
def test_one_process_trains_as_by_hand(world, average, accumulation, packing, lora):
    args = finetune.parse(flags(world, accumulation, "--loss_average", average, *packing, *lora))
    run = finetune.prepare(args)
    model = copy.deepcopy(run.model)
    batches = record(run)
    run.trainer.train()
    assert [len(batch) for batch in batches] == [3, 3, 3, 3, 3, 3, 3, 2] * 2
    wanted = train_by_hand(model, run.tokenizer, [batches], accumulation, average)
    check_log(run.trainer.state.log_history, wanted)
    for (name, mine), other in zip(run.model.named_parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(mine, other, atol=2e-5, rtol=1e-4, msg=name)


@pytest.mark.parametrize("packing", [[], ["--packing"]], ids=["padded", "packed"])
def test_the_last_codes_weigh_more(world, packing):
    run = finetune.prepare(finetune.parse(flags(world, 2, "--last_code_weight", "3", *packing)))
    model, batches = copy.deepcopy(run.model), record(run)
    run.trainer.train()
    last = {index[-1] for index in run.data.indices}
    tokens = run.tokenizer.convert_ids_to_tokens(list(range(len(run.tokenizer))))
    weights = torch.tensor([3.0 if token in last else 1.0 for token in tokens])
    assert 0 < len(last) < len(run.data.item_tokens)
    check_log(run.trainer.state.log_history, train_by_hand(model, run.tokenizer, [batches], 2, "batch", weights))


def test_the_default_is_the_originals_and_recorded(world):
    finetune.main(flags(world, 1, "--max_steps", "1"))
    assert json.loads((world / "out" / "run.json").read_text())["arguments"]["loss_average"] == "batch"


TOGETHER = {
    "ddp": [],
    "ddp-packed": ["--packing"],
    "zero2": ["--deepspeed", "config/ds_z2_bf16.json"],
    "zero3": ["--deepspeed", "config/ds_z3_bf16.json", "--packing"],
    "zero3-bf16": ["--deepspeed", "config/ds_z3_bf16.json", "--packing", "--bf16"],
}


@pytest.mark.slow
@pytest.mark.parametrize("average", ["batch", "token"])
@pytest.mark.parametrize("name", TOGETHER)
def test_two_processes_train_as_by_hand(world, name, average):
    words = flags(world, 2, "--loss_average", average, *TOGETHER[name])
    together(record_batches.main, [str(world / "batches"), *words])
    files = [json.loads((world / f"batches.{rank}.json").read_text()) for rank in (0, 1)]
    processes = as_drawn([file["batches"] for file in files])
    assert (processes != [file["batches"] for file in files]) == ("packing" in "".join(TOGETHER[name])), (
        "some are dealt"
    )
    tokenizer = AutoTokenizer.from_pretrained(world / "out")
    model, other = prepared(world)[0], prepared(world)[0]
    wanted = train_by_hand(model, tokenizer, processes, 2, average)
    unwanted = train_by_hand(other, tokenizer, processes, 2, "token" if average == "batch" else "batch")
    assert abs(wanted[0][1] - unwanted[0][1]) > 0.05 * wanted[0][1], "the test needs two gradients"
    state = load_file(world / "out" / "model.safetensors")
    if not name.endswith("bf16"):
        check_log(files[0]["log"], wanted)
        for key, weight in model.state_dict().items():
            torch.testing.assert_close(state[key], weight, atol=2e-5, rtol=1e-4, msg=key)
        return
    check_log(files[0]["log"][:1], wanted[:1], rel=1e-2)
    away = [sum((m.state_dict()[key] - state[key].float()).norm() ** 2 for key in state) for m in (model, other)]
    assert away[0] < away[1] / 4


@pytest.mark.slow
def test_two_processes_weigh_the_last_codes(world):
    words = flags(world, 2, "--packing", "--last_code_weight", "3")
    together(record_batches.main, [str(world / "batches"), *words])
    files = [json.loads((world / f"batches.{rank}.json").read_text()) for rank in (0, 1)]
    model, tokenizer, data = prepared(world)[0], AutoTokenizer.from_pretrained(world / "out"), world / "data/Toy"
    last = {index[-1] for index in json.loads((data / "Toy.index.json").read_text()).values()}
    tokens = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    weights = torch.tensor([3.0 if token in last else 1.0 for token in tokens])
    drawn = as_drawn([file["batches"] for file in files])
    check_log(files[0]["log"], train_by_hand(model, tokenizer, drawn, 2, "batch", weights))
