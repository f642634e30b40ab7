"""Training of an RQ-VAE: batches, losses, schedule, evaluations, kept checkpoints, exact resumption."""

from __future__ import annotations

import argparse
import math
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from tqdm import tqdm

from checkpoints import prune, save_checkpoint
from commands import InputError, Interrupted, tell
from embeddings import Embeddings
from figures import collision_rate, level_usage
from models.rqvae import RQVAE
from parallel import Processes
from start import balance

LEARNERS = {
    "adamw": torch.optim.AdamW,
    "adam": torch.optim.Adam,
    "sgd": torch.optim.SGD,
    "adagrad": torch.optim.Adagrad,
    "rmsprop": torch.optim.RMSprop,
}
EVAL_BATCH = 4096
LOG_SECONDS = 60.0  # how often a run without a terminal says where it is


def learning_rate_factor(step: int, warmup: int, total: int, kind: str) -> float:
    """What the learning rate is multiplied with at `step`: up from 0 over `warmup` steps, then constant or down to 0."""
    if step < warmup:
        return step / max(1, warmup)
    if kind == "constant":
        return 1.0
    return max(0.0, (total - step) / max(1, total - warmup))


class Trainer:
    """Trains `model` on `embeddings` as `args` (the flags of main.py) say, in `folder`.

    With several processes each global batch of `args.batch_size` rows is shared out; gradients, k-means and Sinkhorn
    see the whole batch, so the result is that of one process up to float rounding.
    """

    def __init__(
        self, model: RQVAE, embeddings: Embeddings, args: argparse.Namespace, folder: Path, processes: Processes
    ) -> None:
        self.model = model.to(processes.device)
        self.embeddings = embeddings
        self.args = args
        self.folder = folder
        self.processes = processes
        for level in model.rq.vq_layers:
            level.gather = processes.gather
        if args.bn and len(embeddings) < 2:
            raise InputError(f"{embeddings.path}: has one row; --bn True needs two at least")
        self.steps_per_epoch = len(self.batches(np.arange(len(embeddings))))
        self.optimizer = self._build_optimizer()
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer,
            lambda step: learning_rate_factor(
                step,
                args.warmup_epochs * self.steps_per_epoch,
                args.epochs * self.steps_per_epoch,
                args.lr_scheduler_type,
            ),
        )
        self.epoch = 0  # epochs done
        self.best_loss = math.inf
        self.best_collision_rate = math.inf
        self.stop_signal: int | None = None
        self.assigned = {
            number: torch.zeros(level.embedding.num_embeddings, dtype=torch.int64, device=processes.device)
            for number, level in enumerate(model.rq.vq_layers)
            if level.sk_epsilon > 0
        }

    def _build_optimizer(self) -> torch.optim.Optimizer:
        learner = LEARNERS[self.args.learner]
        options: dict[str, Any] = {"lr": self.args.lr, "weight_decay": self.args.weight_decay}
        if learner is not torch.optim.RMSprop:
            options["fused"] = True  # the same steps in fewer passes over the weights
        return learner(self.model.parameters(), **options)

    def batches(self, order: np.ndarray) -> list[np.ndarray]:
        """`order` in global batches; with batch norm a last single row joins the batch before it (it has no variance)."""
        bounds = range(self.args.batch_size, len(order) - int(self.args.bn), self.args.batch_size)
        return np.split(order, bounds)

    def fit(self) -> None:
        """Train up to `args.epochs` epochs; evaluate every `args.eval_step`.

        Raises:
            Interrupted: a signal asked to stop; the state is in `last_model.pth`.
            InputError: the loss is no longer finite; the checkpoints written before are whole.
        """
        before = {number: signal.signal(number, self._note_signal) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            self._loop()
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _note_signal(self, number: int, _frame: Any) -> None:
        if self.stop_signal is not None:
            raise KeyboardInterrupt  # asked twice: at once
        self.stop_signal = number

    def _loop(self) -> None:
        eval_step = min(self.args.eval_step, self.args.epochs)
        said = time.monotonic()
        started, first = said, self.epoch
        on_terminal = self.processes.is_main and sys.stderr.isatty()
        with tqdm(total=self.args.epochs, initial=first, unit="epoch", desc="rq-vae", disable=not on_terminal) as bar:
            while self.epoch < self.args.epochs:
                loss, reconstruction = self.train_epoch(self.epoch)
                self.epoch += 1
                bar.update()
                bar.set_postfix(loss=f"{loss / self.steps_per_epoch:.5f}")
                evaluates = self.epoch % eval_step == 0 or self.epoch == self.args.epochs
                if self.epoch == self.args.epochs and self.args.balance_rounds:
                    balance(self.model, self.embeddings, self.processes, self.args.balance_rounds)
                due = not on_terminal and time.monotonic() - said > LOG_SECONDS
                if evaluates or due:
                    said = time.monotonic()
                    pace = (said - started) / (self.epoch - first)
                    line = (
                        f"epoch {self.epoch}/{self.args.epochs}: loss {loss:.5f} (reconstruction {reconstruction:.5f})"
                    )
                    if evaluates:
                        line += f", collision rate {self.evaluate(loss):.4f}{self.evenness()}"
                    with tqdm.external_write_mode():
                        tell(f"{line}, {pace:.2f} s/epoch, about {pace * (self.args.epochs - self.epoch):.0f} s left")
                self._stop_if_asked()

    def _stop_if_asked(self) -> None:
        asked = torch.tensor(int(self.stop_signal is not None), device=self.processes.device)
        if self.processes.sum_(asked).item():
            if self.processes.is_main:
                self._check_weights()
                save_checkpoint(self.folder / "last_model.pth", self.state())
            raise Interrupted(f"after epoch {self.epoch}; go on with --resume {self.folder}")

    def train_epoch(self, epoch: int) -> tuple[float, float]:
        """One pass over all items in an order drawn from (seed, epoch).

        Returns:
            total loss and reconstruction loss, each the sum over the batches of the batch's mean.
        """
        self.model.train()
        generator = torch.Generator().manual_seed(self.args.seed * 1_000_003 + epoch)
        order = torch.randperm(len(self.embeddings), generator=generator).numpy()
        batches = self.batches(order)
        own = [self.processes.share(batch) for batch in batches]
        for counts in self.assigned.values():
            counts.zero_()
        sums = torch.zeros(2, dtype=torch.float64, device=self.processes.device)
        workers = min(self.args.num_workers, len(os.sched_getaffinity(0)))
        rows = self.embeddings.batches(own, workers)
        for x, batch in zip(rows, batches, strict=True):
            sums += self.train_step(x, len(x) / len(batch))
        return tuple(self.processes.sum_(sums).tolist())

    def train_step(self, x: torch.Tensor, weight: float) -> torch.Tensor:
        """One optimiser step on this process's rows `x`, which are the share `weight` of the global batch.

        Returns:
            float64 (2,): this process's part of total and reconstruction loss.

        Raises:
            InputError: loss or gradient are not finite; the weights are still those of the step before.
        """
        self.optimizer.zero_grad(set_to_none=True)
        try:
            output, rq_loss, codes = self.model(x)
        except FloatingPointError as error:  # k-means of the first batch
            self._stop_at(str(error))
        for level, counts in self.assigned.items():
            counts += torch.bincount(codes[:, level], minlength=len(counts))
        loss, reconstruction = self.model.losses(output, rq_loss, x)
        (loss * weight).backward()
        self._sum_gradients()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        if not torch.isfinite(loss.detach() + norm):
            self._stop_at(f"the loss is {loss.item():g}, its gradient {norm.item():g}")
        self.optimizer.step()
        self.scheduler.step()
        return torch.stack([loss.detach(), reconstruction.detach()]).double() * weight

    def _stop_at(self, what: str) -> NoReturn:
        kept = (
            f"the checkpoints in {self.folder} are from before" if self.best_loss < math.inf else "nothing is saved yet"
        )
        raise InputError(f"epoch {self.epoch + 1}: {what}; {kept}; lower --lr or look at the embeddings")

    def _sum_gradients(self) -> None:
        if self.processes.count == 1:
            return
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        flat = self.processes.sum_(torch.cat([g.flatten() for g in gradients]))
        for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(part.view_as(gradient))

    def nearest_codes(self) -> np.ndarray:
        """Every item's nearest codes: int64 (items, levels)."""
        self.model.eval()
        bounds = [len(self.embeddings) * rank // self.processes.count for rank in range(self.processes.count + 1)]
        first, last = bounds[self.processes.rank], bounds[self.processes.rank + 1]
        parts = [self.model.get_indices(x) for x in self.embeddings.in_order(EVAL_BATCH, first, last)]
        width = len(self.model.rq.vq_layers)
        own = torch.cat(parts) if parts else torch.empty(0, width, dtype=torch.int64, device=self.processes.device)
        return self.processes.gather(own)[0].cpu().numpy()

    def evenness(self) -> str:
        """How even the codes were that Sinkhorn assigned in the last epoch, in words; nothing without Sinkhorn."""
        words = ""
        for level, counts in self.assigned.items():
            total = self.processes.sum_(counts.clone()).cpu().numpy()
            usage = level_usage(np.repeat(np.arange(len(total)), total), len(total))
            words += (
                f", Sinkhorn on level {level + 1}: {usage['used']} of {usage['codes']} codes, entropy "
                f"{usage['entropy_bits']:.2f} bits, largest {usage['largest_share'] * usage['codes']:.1f} × even"
            )
        return words

    def evaluate(self, loss: float) -> float:
        """The collision rate with nearest codes; on the main process checkpoints are written and old ones removed.

        Raises:
            InputError: a weight is not finite, though the losses were; nothing is written.
        """
        self._check_weights()
        rate = collision_rate(self.nearest_codes())
        better_loss, better_rate = loss < self.best_loss, rate < self.best_collision_rate
        self.best_loss = min(self.best_loss, loss)
        self.best_collision_rate = min(self.best_collision_rate, rate)
        if self.processes.is_main:
            state = self.state()
            if better_loss:
                save_checkpoint(self.folder / "best_loss_model.pth", state)
            if better_rate:
                save_checkpoint(self.folder / "best_collision_model.pth", state)
            save_checkpoint(self.folder / f"epoch_{self.epoch - 1}_collision_{rate:.4f}_model.pth", state)
            prune(self.folder, self.args.save_limit)
        return rate

    def _check_weights(self) -> None:
        for name, value in self.model.state_dict().items():
            if not torch.isfinite(value).all():
                self._stop_at(f"the weights {name} are not finite")

    def state(self) -> dict[str, Any]:
        """The checkpoint: the original's keys, and under `resume` what exact resumption needs besides."""
        return {
            "args": self.args,
            "epoch": self.epoch - 1,
            "best_loss": self.best_loss,
            "best_collision_rate": self.best_collision_rate,
            "state_dict": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "resume": {
                "rng": torch.get_rng_state(),
                "embeddings": self.embeddings.digest(),
            },
        }

    def restore(self, content: dict[str, Any], source: Path) -> None:
        """Go on from the checkpoint `content` of the file `source` (the model's weights are loaded already).

        The schedule is put where the epochs say. A checkpoint of the original has no `resume` part.

        Raises:
            InputError: optimiser or random state are missing, damaged or another model's.
        """
        try:
            own = self.optimizer.state_dict()["param_groups"]
            self.optimizer.load_state_dict({"state": content["optimizer"]["state"], "param_groups": own})
            complete = len(self.optimizer.state) == len(list(self.model.parameters()))
            if not complete and self.args.learner != "sgd":  # which keeps no moments
                raise ValueError("moments of some weights are missing")
            for parameter, values in self.optimizer.state.items():
                for value in values.values():
                    if isinstance(value, torch.Tensor) and value.dim() and value.shape != parameter.shape:
                        raise ValueError("moments of another shape than the weights")
                    if not torch.isfinite(torch.as_tensor(value)).all():
                        raise ValueError("moments that are not finite")
            self.epoch = content["epoch"] + 1
            self.best_loss = float(content.get("best_loss", math.inf))
            self.best_collision_rate = float(content.get("best_collision_rate", math.inf))
            if math.isnan(self.best_loss) or math.isnan(self.best_collision_rate):
                raise ValueError("its best loss or collision rate is NaN")
            if "resume" in content:
                torch.set_rng_state(content["resume"]["rng"].cpu())
        except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
            reason = " ".join(str(error).split())[:120]
            raise InputError(f"{source}: its optimiser or random state is damaged ({reason})") from None
        self.scheduler.last_epoch = self.epoch * self.steps_per_epoch
        rates = [base * self.scheduler.lr_lambdas[0](self.scheduler.last_epoch) for base in self.scheduler.base_lrs]
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        self.scheduler._last_lr = rates
