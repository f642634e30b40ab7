"""Score a checkpoint on the test split with any number of processes: the same numbers as test.py, sooner.

    torchrun --nproc_per_node=8 --master_port=23324 test_ddp.py --ckpt_path ./ckpt/Games/ --dataset Games \
        --data_path ./data --results_file ./results/Games/result.json --test_batch_size auto --num_beams 20 \
        --test_prompt_ids all

No sample is lost or counted twice, whatever the number of processes. The same command after an interruption, with as many
processes or another number, goes on where it was.
"""

from testing import test_checkpoint
from utils import run_main


def main(argv: list[str] | None = None) -> None:
    """Parse the flags and score."""
    test_checkpoint(__doc__, argv, single=False)


if __name__ == "__main__":
    run_main(main)
