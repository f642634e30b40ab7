"""The training loop's own parts: loss at labelled positions, validation, logging, checkpoints that are whole or absent.

`RecTrainer` is transformers' `Trainer` (optimiser, schedule, DeepSpeed, DDP and accumulation are its own) with these replaced.
"""

from __future__ import annotations

import math
import os
import random
import resource
import shutil
import sys
import time
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm
from transformers import ProgressCallback, Trainer, TrainerCallback

from beam_rows import PrefixCache
from collator import IGNORE, TestCollator, encode_prompts
from decoding import beam_search
from even_rows import MOST_DEALT, Dealt, EvenRows
from metrics.ranking import hit, ndcg, rank_of
from modeling import full_state, item_trie
from packing import PACKED, LabelledHead
from processes import barrier, sum_over_processes
from resume import unfit_is_said
from run_folder import RunFolder
from utils import UserError, checkpoints, is_main, rank, world_size

_PARTIAL = ".partial"


def peak_memory(device: torch.device) -> float:
    """The most memory this process has had, in GiB: of the GPU if there is one, else resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


class RunLog(TrainerCallback):
    """A readable line for every logging step, on standard output and in `train.log`, from the main process."""

    def __init__(self, path: Path):
        self.path = path
        self.began = time.time()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **more: Any) -> None:
        """Write one line."""
        if not is_main() or not logs or "train_runtime" in logs:
            return
        words = [f"step {state.global_step}/{state.max_steps}", f"epoch {state.epoch or 0:.2f}"]
        shown = {"learning_rate": "lr", "grad_norm": "gradient", "tokens_per_second": "tokens/s", "memory_gib": "GiB"}
        shown |= {"samples_per_second": "samples/s"}
        for name, value in logs.items():
            if name != "epoch" and isinstance(value, (int, float)):
                words.append(f"{shown.get(name, name)} {value:.4g}")
        minutes, seconds = divmod(int(time.time() - self.began), 60)
        line = f"[{minutes:3d}:{seconds:02d}] " + "  ".join(words)
        tqdm.write(line)
        sys.stdout.flush()
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(line + "\n")


class Bar(ProgressCallback):
    """transformers' progress bar, without the raw figures that `RunLog` writes readably."""

    def on_log(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        """Nothing."""


class Epochs(TrainerCallback):
    """Tells the training set which epoch begins, so that it draws that epoch's templates."""

    def __init__(self, train_set: Any):
        self.train_set = train_set

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        """`state.epoch` counts whole and partial epochs; a resumed run begins inside one."""
        self.train_set.set_epoch(int(state.epoch or 0))


class Replacing(TrainerCallback):
    """Removes the run that this one replaces (`--overwrite_output_dir`) as soon as there is a complete checkpoint."""

    def __init__(self, folder: RunFolder):
        self.folder = folder

    def on_save(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        """A checkpoint is there."""
        if is_main():
            self.folder.drop_replaced()


class Ranking:
    """HR and NDCG of a sample of validation users: constrained beam search over all items, as test.py does it.

    Args:
        valid_set: the validation samples; each user's first template is used.
        count: how many users, drawn by `seed`; more than there are: all.
        batch_size: users per process and call.
    """

    def __init__(
        self,
        valid_set: Any,
        tokenizer: Any,
        count: int,
        batch_size: int,
        seed: int,
        num_beams: int = 20,
        no_eos: bool = False,
    ):
        rows = len(valid_set) // valid_set.prompt_num
        self.users = sorted(random.Random(seed).sample(range(rows), min(count, rows)))
        self.valid_set, self.tokenizer, self.num_beams, self.batch_size = valid_set, tokenizer, num_beams, batch_size
        self.trie = item_trie(tokenizer, valid_set.data, no_eos)

    def __call__(self, model: Any) -> dict[str, float]:
        """`{"hit@10": …, "ndcg@10": …}` over the users of all processes, which must all call this."""
        attention = model.config._attn_implementation
        model.set_attn_implementation("sdpa" if attention == PACKED else attention)
        sums = torch.zeros(3, dtype=torch.float64, device=model.device)
        prefix = self._prefix(model)
        # as many calls on every process, and as many passes in each: ZeRO-3 gathers weights together
        for start in range(rank(), len(self.users) + rank(), self.batch_size * world_size()):
            users = [self.users[i] for i in range(start, len(self.users), world_size())[: self.batch_size]]
            for place in self._places(model, users or self.users[:1], prefix)[: len(users)]:
                sums += torch.tensor([hit(place, 10), ndcg(place, 10), 1.0], dtype=torch.float64, device=model.device)
        model.set_attn_implementation(attention)
        hits, gains, count = sum_over_processes(sums).tolist()
        return {"hit@10": hits / count, "ndcg@10": gains / count}

    def _prompts(self, users: list[int]) -> list[str]:
        return [self.valid_set[user * self.valid_set.prompt_num]["prompt"] for user in users]

    def _prefix(self, model: Any) -> PrefixCache:
        """What the prompts begin with, read once: `beam_search` alone has a pass more for two prompts than for one."""
        ids = encode_prompts(self.tokenizer, self._prompts(self.users[:32]))
        return PrefixCache(model, os.path.commonprefix(ids) or ids[0][:1])

    @torch.no_grad()
    def _places(self, model: Any, users: list[int], prefix: PrefixCache) -> list[int]:
        """The rank of each user's validation item, from 0; -1 if it is not among the beams."""
        data = self.valid_set.data
        batch = TestCollator(self.tokenizer)(self._prompts(users))
        ids, mask = batch["input_ids"].to(model.device), batch["attention_mask"].to(model.device)
        items, _ = beam_search(model, self.trie.to(model.device), ids, mask, self.num_beams, prefix, stop_early=False)
        targets = [data.canonical[self.valid_set.sample(user).target] for user in users]
        return [rank_of(target, row) for target, row in zip(targets, items.tolist(), strict=True)]


class RecTrainer(Trainer):
    """A `Trainer` whose loss and evaluation know tasks and labelled positions, and whose checkpoints are atomic.

    Args:
        tasks: the names that the numbers in a batch's `tasks` stand for.
        task_set: further validation samples, for the loss of each task alone; the evaluation loss leaves them out.
        ranking: called with the model after each evaluation; its figures join the evaluation's.
        beside_checkpoint: writes to the folder that it is given what belongs beside a checkpoint's weights.
        loss_average: "batch" or "token", what the loss of an optimiser's step is (`compute_loss`).
    """

    def __init__(
        self,
        *args: Any,
        tasks: list[str],
        task_set: Any = None,
        ranking: Any = None,
        beside_checkpoint: Callable[[Path], None] | None = None,
        loss_average: str = "batch",
        **more: Any,
    ):
        if more["data_collator"].packing and 1 < world_size() <= MOST_DEALT:
            more["train_dataset"] = Dealt(more["train_dataset"])
        super().__init__(*args, **more)
        self.beside_checkpoint, self.resumed = beside_checkpoint, Path(self.args.output_dir)
        self.tasks, self.task_set, self.ranking = tasks, task_set, ranking
        self.model_accepts_loss_kwargs = loss_average == "token"  # then compute_loss is told the step's labelled tokens
        self.args.logging_nan_inf_filter = False  # it would hide what `_get_grad_norm` looks for
        self.head = LabelledHead(self.accelerator.unwrap_model(self.model))
        self._sums = torch.zeros(len(tasks), 2, dtype=torch.float64)  # loss and labelled tokens since the last line
        self._seen = torch.zeros(2, dtype=torch.float64)  # tokens and samples since the last line
        self._clock = time.monotonic()

    def get_train_dataloader(self) -> Any:
        """transformers' own; packed rows of several processes are made about as long as each other."""
        loader = super().get_train_dataloader()
        batches = getattr(loader.batch_sampler, "batch_sampler", None)  # accelerate's shard of the batches
        if isinstance(self.train_dataset, Dealt) and batches is not None:
            batches.sampler = EvenRows(batches.sampler, self.train_dataset, batches.batch_size, world_size())
        return loader

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """The `Trainer`'s. Raises UserError where the checkpoint's are of another run, or without moments."""
        with unfit_is_said(checkpoint, "optimiser or schedule"):
            super()._load_optimizer_and_scheduler(checkpoint)
            if checkpoint is not None:
                self.resumed = Path(checkpoint).parent
                if not (self.is_deepspeed_enabled or self.optimizer.state or self.args.optim == "sgd"):
                    raise ValueError("no moments")

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """The `Trainer`'s. Raises UserError where the checkpoint's is none."""
        with unfit_is_said(checkpoint, "random state"):
            super()._load_rng_state(checkpoint)

    def _load_best_model(self) -> None:
        """The `Trainer`'s, wherever the run's folder is now. Raises UserError if the best checkpoint is gone."""
        name = f"checkpoint-{self.state.best_global_step}"
        places = [folder / name for folder in (Path(self.args.output_dir), self.resumed) if (folder / name).is_dir()]
        if not places:
            raise UserError(
                f"{self.args.output_dir}: {name}, the best, is not there any more: there is no model to save"
            )
        self.state.best_model_checkpoint = str(places[0])
        super()._load_best_model()

    def _run_epoch(self, *args: Any, **more: Any) -> None:
        """The `Trainer`'s, unless all steps are done: a run that was cut off while it saved its last model goes on from there."""
        if self.state.global_step < self.state.max_steps:
            super()._run_epoch(*args, **more)
        else:
            self.control.should_training_stop = True

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        """The `Trainer`'s, before the step is made (DeepSpeed has made it by then).

        Raises:
            UserError: the loss or the gradient is not finite. In float16 gradients may be: those steps are left out.
        """
        norm = super()._get_grad_norm(model, grad_norm)
        step = self.state.global_step + 1
        self._check_finite(step, "the loss", float(sum_over_processes(self._tr_loss.clone())))
        if norm is not None and not self.args.fp16:  # of a gradient that is not finite DeepSpeed says -1
            self._check_finite(step, "the gradient's norm", float(norm) if norm >= 0 else math.nan)
        return norm

    def _check_finite(self, step: int, what: str, value: float) -> None:
        """All processes must see the same `value`; the main one speaks."""
        if not math.isfinite(value):
            if not is_main():
                sys.exit(2)
            kept = checkpoints(Path(self.args.output_dir))
            raise UserError(
                f"step {step}: {what} is {value}, so that nothing can be learned from here on; try a lower --learning_rate, "
                "or another --base_model if this is the first step. "
                + (f"The last checkpoint is {kept[-1]}" if kept else "There is no checkpoint yet")
            )

    # ---- loss ----

    def token_losses(self, model: Any, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Cross-entropy (float32) of every labelled token of a batch, and its task's number, both `(labelled,)`.

        The vocabulary projection is computed at those positions only.
        """
        batch = dict(batch)
        labels, tasks, _ = batch.pop("labels"), batch.pop("tasks"), batch.pop("seen")
        keep = torch.zeros_like(labels, dtype=torch.bool)
        keep[:, :-1] = labels[:, 1:] != IGNORE
        with self.head.only(keep):
            logits = model(**batch, use_cache=False).logits[0]
        keep = keep[:, :-1]
        targets = labels[:, 1:][keep]
        return F.cross_entropy(logits[: len(targets)].float(), targets, reduction="none"), tasks[:, 1:][keep]

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Tensor:
        """A micro-batch's part of the loss of an optimiser's step.

        `batch`: the mean over the micro-batch's own labelled tokens, 0 without any. The `Trainer` divides it by the number of
        accumulated micro-batches, and the processes' gradients are averaged: a plain mean of means.
        `token`: the mean over all labelled tokens of the step, on all processes and accumulated micro-batches.
        """
        drawn_for = inputs.pop("drawn_for", None)
        losses, tasks = self.token_losses(model, inputs)
        self._count(inputs, losses.detach(), tasks)
        if num_items_in_batch is not None:
            return losses.sum() * self.accelerator.num_processes / num_items_in_batch.clamp(min=1)
        if drawn_for is None:
            return losses.sum() / max(1, len(losses))
        batch = drawn_for[:, 1:][
            inputs["labels"][:, 1:] != IGNORE
        ]  # samples count in the mean that they were drawn for
        counts = sum_over_processes(torch.bincount(batch, minlength=self.accelerator.num_processes))
        return (losses / counts[batch]).sum()

    def _count(self, inputs: dict[str, Any], losses: Tensor, tasks: Tensor) -> None:
        self._sums = self._sums.to(losses.device)
        self._sums[:, 0].index_add_(0, tasks, losses.double())
        self._sums[:, 1] += torch.bincount(tasks, minlength=len(self.tasks))
        self._seen += torch.tensor(inputs["seen"])

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add speed, memory and the loss of each task to the line of a logging step."""
        if "loss" in logs:
            sums, seen = sum_over_processes(self._sums.clone()), sum_over_processes(self._seen.to(self.args.device))
            seconds = max(1e-9, time.monotonic() - self._clock)
            logs["tokens_per_second"], logs["samples_per_second"] = (seen / seconds).tolist()
            logs["memory_gib"] = peak_memory(self.args.device)
            for name, (loss, count) in zip(self.tasks, sums.tolist(), strict=True):
                if count:
                    logs[f"loss_{name}"] = loss / count
            self._sums.zero_()
            self._seen = torch.zeros(2, dtype=torch.float64)
            self._clock = time.monotonic()
        super().log(logs, start_time)

    # ---- evaluation ----

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Mean loss over the labelled tokens of the validation set, every sample exactly once; then by task; the ranking."""
        began = time.monotonic()
        model = self.model_wrapped
        training = model.training
        model.eval()
        sums = self._loss_sums(model, eval_dataset or self.eval_dataset)
        metrics = {f"{metric_key_prefix}_loss": (sums[:, 0].sum() / sums[:, 1].sum()).item()}
        self._check_finite(self.state.global_step, "the validation loss", metrics[f"{metric_key_prefix}_loss"])
        if self.task_set is not None:
            sums += self._loss_sums(model, self.task_set)
            for name, (loss, count) in zip(self.tasks, sums.tolist(), strict=True):
                if count:
                    metrics[f"{metric_key_prefix}_loss_{name}"] = loss / count
        if self.ranking is not None:
            metrics |= {
                f"{metric_key_prefix}_{k}": v for k, v in self.ranking(self.accelerator.unwrap_model(model)).items()
            }
        metrics[f"{metric_key_prefix}_seconds"] = time.monotonic() - began
        model.train(training)
        self.log(metrics)
        self.control: Any = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        self._clock += time.monotonic() - began  # not part of the training's speed
        return metrics

    @torch.no_grad()
    def _loss_sums(self, model: Any, dataset: Any) -> Tensor:
        """Summed loss and number of the labelled tokens of `dataset` by task: float64 `(tasks, 2)`, over all processes."""
        sums = torch.zeros(len(self.tasks), 2, dtype=torch.float64, device=self.args.device)
        size = self.args.eval_batch_size
        # every process takes part in as many batches as the others: ZeRO-3 gathers weights together
        for start in range(rank(), len(dataset) + rank(), size * world_size()):
            numbers = range(start, len(dataset), world_size())[:size]
            batch = self._prepare_inputs(self.data_collator([dataset[i] for i in numbers] or [dataset[0]]))
            losses, tasks = self.token_losses(model, batch)
            if numbers:
                sums[:, 0].index_add_(0, tasks, losses.double())
                sums[:, 1] += torch.bincount(tasks, minlength=len(self.tasks))
        return sum_over_processes(sums)

    # ---- checkpoints ----

    def _save_checkpoint(self, model: Any, trial: Any = None) -> None:
        """Write `checkpoint-N` under another name and rename it when all of it is there; then drop the oldest."""
        name = f"checkpoint-{self.state.global_step}"
        folder, final = Path(self.args.output_dir) / f".{name}{_PARTIAL}", Path(self.args.output_dir) / name
        if is_main():
            check_space(folder.parent, checkpoint_bytes(self.model), f"{name} needs")
            shutil.rmtree(folder, ignore_errors=True)
        barrier()
        folder.mkdir(parents=True, exist_ok=True)
        with disk_full_is_said(folder):
            self.save_model(str(folder), _internal_call=True)
            self._save_optimizer_and_scheduler(str(folder))
            self._save_scaler(str(folder))
            self._save_rng_state(str(folder))
            best = Path(self.args.output_dir) / f"checkpoint-{self.state.best_global_step}"
            if best == final or best.is_dir():  # on every process: all load it together at the end
                self.state.best_model_checkpoint = str(best)
            barrier()
            if is_main():
                self._finish_checkpoint(folder, final, best)
        barrier()

    def _finish_checkpoint(self, folder: Path, final: Path, best: Path) -> None:
        if self.beside_checkpoint:
            self.beside_checkpoint(folder)
        self.state.save_to_json(str(folder / "trainer_state.json"))
        for path in folder.rglob("*"):
            if path.is_file():
                with open(path, "rb") as file:
                    os.fsync(file.fileno())
        shutil.rmtree(final, ignore_errors=True)
        folder.rename(final)
        kept = checkpoints(final.parent)
        spare = [path for path in kept[:-1] if path != best]
        for path in spare[: max(0, len(kept) - self.args.save_total_limit)]:
            shutil.rmtree(path, ignore_errors=True)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """The model's part of a checkpoint: an adapter whole; full weights whole unless ZeRO-3 keeps them in its shards."""
        folder = Path(output_dir or self.args.output_dir)
        peft = hasattr(self.model, "peft_config")
        plugin = self.accelerator.state.deepspeed_plugin
        in_shards = plugin is not None and plugin.zero_stage == 3 and not plugin.zero3_save_16bit_model
        if not peft and not in_shards:
            super().save_model(str(folder), _internal_call)
            return
        state = full_state(self.model, only_trained=True) if peft else None
        if is_main():
            folder.mkdir(parents=True, exist_ok=True)
            if peft:
                self.model.save_pretrained(folder, state_dict=state, save_embedding_layers=False)
            else:
                self.model.config.save_pretrained(folder)
            self.processing_class.save_pretrained(folder)
            torch.save(self.args, folder / "training_args.bin")


def checkpoint_bytes(model: Any) -> int:
    """About how large a checkpoint is: weights, and AdamW's two moments and master weights of what trains."""
    sizes = [getattr(p, "ds_numel", p.numel()) for p in model.parameters() if p.requires_grad]
    return 14 * sum(sizes)


def check_space(folder: Path, needed: int, what: str) -> None:
    """Refuse to write `needed` bytes where they do not fit.

    Raises:
        UserError: before anything was written or removed.
    """
    free = shutil.disk_usage(folder).free
    if free < needed * 1.05:
        raise UserError(
            f"{folder}: the disk is too full: {what} about {needed / 1e9:.2f} GB and {free / 1e9:.2f} GB are free; "
            "nothing was removed or overwritten. Make room and go on with --resume_from_checkpoint auto"
        )


@contextmanager
def disk_full_is_said(folder: Path, what: str = "the checkpoint") -> Any:
    """Turn a write of `what` to `folder` that failed for want of space into one line; the half written goes, older files stay."""
    try:
        yield
    except Exception as error:  # OSError, torch's RuntimeError, or safetensors' own, which is neither
        full = "No space left on device" in str(error) or shutil.disk_usage(folder.parent).free < 2**20
        shutil.rmtree(folder, ignore_errors=True)
        if not full:
            raise
        raise UserError(
            f"{folder.parent}: the disk is full; {what} was not written, what was there before is untouched. "
            "Make room and go on with --resume_from_checkpoint auto"
        ) from error
