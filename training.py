"""The training loop's own parts: loss at labelled positions, validation, logging, checkpoints that are whole or absent.

`RecTrainer` is transformers' `Trainer` (optimiser, schedule, DeepSpeed, DDP and accumulation are its own) with these replaced.
"""

from __future__ import annotations

import math
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Trainer

from callbacks import peak_memory
from collator import IGNORE
from even_rows import MOST_DEALT, Dealt, EvenRows
from folders import check_space, disk_full_is_said, partial_of
from modeling import full_state
from packing import LabelledHead
from processes import barrier, sum_over_processes
from resume import unfit_is_said
from run_folder import RunFolder
from unlikelihood import Unlikelihood
from utils import UserError, checkpoints, is_main, rank, world_size


class RecTrainer(Trainer):
    """A `Trainer` whose loss and evaluation know tasks and labelled positions, and whose checkpoints are atomic.

    Args:
        tasks: the names that the numbers in a batch's `tasks` stand for.
        task_set: further validation samples, for the loss of each task alone; the evaluation loss leaves them out.
        ranking: called with the model after each evaluation; its figures join the evaluation's.
        beside_checkpoint: writes to the folder that it is given what belongs beside a checkpoint's weights.
        loss_average: "batch" or "token", what the loss of an optimiser's step is (`compute_loss`).
        weights: of each token id in the training loss, float `(vocabulary,)`; all alike if absent.
        unlikelihood: a second term of the training loss.
    """

    def __init__(
        self,
        *args: Any,
        tasks: list[str],
        task_set: Any = None,
        ranking: Any = None,
        beside_checkpoint: Callable[[Path], None] | None = None,
        loss_average: str = "batch",
        weights: Tensor | None = None,
        unlikelihood: Unlikelihood | None = None,
        **more: Any,
    ):
        if more["data_collator"].packing and 1 < world_size() <= MOST_DEALT:
            more["train_dataset"] = Dealt(more["train_dataset"])
        super().__init__(*args, **more)
        self.beside_checkpoint, self.resumed = beside_checkpoint, Path(self.args.output_dir)
        self.tasks, self.task_set, self.ranking = tasks, task_set, ranking
        self.weights, self.unlikelihood = weights, unlikelihood
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

    def token_losses(self, model: Any, batch: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
        """Cross-entropy (float32) of every labelled token of a batch, its task's number, both `(labelled,)`, and its logits.

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
        logits = logits[: len(targets)].float()
        return F.cross_entropy(logits, targets, reduction="none"), tasks[:, 1:][keep], logits

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Tensor:
        """A micro-batch's part of the loss of an optimiser's step.

        `batch`: the mean over the micro-batch's own labelled tokens, 0 without any. The `Trainer` divides it by the number of
        accumulated micro-batches, and the processes' gradients are averaged: a plain mean of means.
        `token`: the mean over all labelled tokens of the step, on all processes and accumulated micro-batches.
        With `unlikelihood` a token's loss is cross-entropy and that term.
        With `weights` the means are weighted ones; under `token`, whose step is not known at once, a token's loss counts by its
        weight over the mean weight of its micro-batch.
        """
        drawn_for = inputs.pop("drawn_for", None)
        losses, tasks, logits = self.token_losses(model, inputs)
        self._count(inputs, losses.detach(), tasks)
        if self.unlikelihood is not None:
            losses = losses + self.unlikelihood(inputs, logits, losses)
        keep = inputs["labels"][:, 1:] != IGNORE
        shares = torch.ones_like(losses)
        if self.weights is not None:
            shares = self.weights.to(losses.device)[inputs["labels"][:, 1:][keep]]
        losses = losses * shares
        if num_items_in_batch is not None:
            mean = shares.mean() if len(shares) else 1.0
            return losses.sum() / mean * self.accelerator.num_processes / num_items_in_batch.clamp(min=1)
        if drawn_for is None:
            return losses.sum() / shares.sum().clamp(min=1e-12)
        batch = drawn_for[:, 1:][keep]  # samples count in the mean that they were drawn for
        sums = torch.bincount(batch, weights=shares, minlength=self.accelerator.num_processes)
        return (losses / sum_over_processes(sums)[batch]).sum()

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
            losses, tasks = self.token_losses(model, batch)[:2]  # the logits are not kept
            if numbers:
                sums[:, 0].index_add_(0, tasks, losses.double())
                sums[:, 1] += torch.bincount(tasks, minlength=len(self.tasks))
        return sum_over_processes(sums)

    # ---- checkpoints ----

    def _save_checkpoint(self, model: Any, trial: Any = None) -> None:
        """Write `checkpoint-N` under another name, which it gets when all of it is there."""
        out, step = RunFolder(self.args.output_dir), self.state.global_step
        folder = partial_of(out / f"checkpoint-{step}")
        if is_main():
            check_space(out.path, checkpoint_bytes(self.model), f"checkpoint-{step} needs")
            shutil.rmtree(folder, ignore_errors=True)
        barrier()
        folder.mkdir(parents=True, exist_ok=True)
        with disk_full_is_said(folder):
            self.save_model(str(folder), _internal_call=True)
            self._save_optimizer_and_scheduler(str(folder))
            self._save_scaler(str(folder))
            self._save_rng_state(str(folder))
            best = self.state.best_global_step
            if (
                best == step or (out / f"checkpoint-{best}").is_dir()
            ):  # on every process: all load it together at the end
                self.state.best_model_checkpoint = str(out / f"checkpoint-{best}")
            barrier()
            if is_main():
                if self.beside_checkpoint:
                    self.beside_checkpoint(folder)
                self.state.save_to_json(str(folder / "trainer_state.json"))
                out.finish_checkpoint(step, best, self.args.save_total_limit)
        barrier()

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


def code_weights(indices: list[tuple[str, ...]], tokenizer: Any, weight: float) -> torch.Tensor | None:
    """What `--last_code_weight` asks for: `weight` for the ids of the indices' last tokens, 1 for others: float (tokens,)."""
    if weight == 1:
        return None
    weights = torch.ones(len(tokenizer))
    weights[tokenizer.convert_tokens_to_ids(sorted({index[-1] for index in indices}))] = weight
    return weights


def checkpoint_bytes(model: Any) -> int:
    """About how large a checkpoint is: weights, and AdamW's two moments and master weights of what trains."""
    sizes = [getattr(p, "ds_numel", p.numel()) for p in model.parameters() if p.requires_grad]
    return 14 * sum(sizes)
