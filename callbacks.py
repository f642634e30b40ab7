"""What happens beside training: lines of the log, the progress bar, the epoch's templates, the end of a replaced run."""

from __future__ import annotations

import resource
import sys
import time
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import ProgressCallback, TrainerCallback

from run_folder import RunFolder
from utils import is_main


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
