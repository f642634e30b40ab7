"""finetune.py that also writes down, for each process, its log and the texts of every micro-batch that it trained on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import finetune
from utils import rank


def record(run: Any) -> list[list[tuple[str, str, int | None]]]:
    """The micro-batches of `run` in the list that this returns, as training goes on: (prompt, response, the process that the
    sample was drawn for if another may have it) of each sample.
    """
    batches: list[list[tuple[str, str, int | None]]] = []
    collate = run.trainer.data_collator

    class Recorder(type(collate)):
        def __call__(self, samples: list[dict[str, str]]) -> dict[str, Any]:
            batches.append([(sample["prompt"], sample["response"], sample.get("batch")) for sample in samples])
            return super().__call__(samples)

    collate.__class__ = Recorder
    return batches


def main(argv: list[str]) -> None:
    """Train and save as finetune.py does with `argv[1:]`, and write `<argv[0]>.<rank>.json`."""
    args = finetune.parse(argv[1:])
    run = finetune.prepare(args)
    batches = record(run)
    run.trainer.train()
    Path(f"{argv[0]}.{rank()}.json").write_text(json.dumps({"batches": batches, "log": run.trainer.state.log_history}))
    finetune.save_final(run)
