"""Train a LoRA adapter: `finetune.py --lora`, under the name that users' scripts have for it.

    torchrun --nproc_per_node=8 lora_finetune.py --base_model huggyllama/llama-7b --output_dir ./ckpt/Games-lora/ \\
        --dataset Games --data_path ./data --bf16 --only_train_response
"""

from __future__ import annotations

import sys

import finetune
from utils import run_main


def main(argv: list[str] | None = None) -> None:
    """`finetune.main` with `--lora`."""
    finetune.main(["--lora", *(sys.argv[1:] if argv is None else argv)])


if __name__ == "__main__":
    run_main(main)
