"""Score a checkpoint on the test split, on one GPU or the CPU: HR@k and NDCG@k of constrained beam search.

    python test.py --gpu_id 0 --ckpt_path ./ckpt/Games/ --dataset Games --data_path ./data \
        --results_file ./results/Games/result.json --test_batch_size auto --num_beams 20 --test_prompt_ids all

Writes the results file and, beside it, `<stem>.predictions.jsonl` with every ranked list. The same command after an
interruption goes on where it was. test_ddp.py does the same on several GPUs.
"""

from testing import test_checkpoint
from utils import run_main


def main(argv: list[str] | None = None) -> None:
    """Parse the flags and score."""
    test_checkpoint(__doc__, argv, single=True)


if __name__ == "__main__":
    run_main(main)
