"""Training and generation with torchrun equal those of one process; embeddings that stay on disk give the same run."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from running import together

sys.path.append(str(Path(__file__).resolve().parents[2] / "index"))

import embeddings as index_embeddings
import main as index_main
from checkpoints import load_checkpoint

ROOT = Path(__file__).resolve().parents[2]

FLAGS = "--device cpu --num_emb_list 8 8 8 --sk_epsilons 0 0 0.003 --layers 32 16 --e_dim 4 --batch_size 51 --epochs 4"
FLAGS += " --warmup_epochs 1 --eval_step 4 --lr_scheduler_type linear --weight_decay 1e-4 --num_workers 0"


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """103 clustered rows: 51 + 51 + a last batch of one, of which one process gets nothing."""
    generator = np.random.default_rng(0)
    rows = generator.normal(size=(15, 12))[np.arange(103) % 15] + 0.3 * generator.normal(size=(103, 12))
    np.save(tmp_path / "x.npy", rows.astype(np.float16))
    return tmp_path / "x.npy"


def final(folder: Path) -> dict:
    (path,) = folder.glob("*/epoch_3_*")
    return load_checkpoint(path)


@pytest.mark.slow
@pytest.mark.parametrize("extra", ["", "--preset fast --kmeans_rows all --init pca --balance_rounds 1"])
def test_two_processes_equal_one(data: Path, extra: str) -> None:
    flags = [*FLAGS.split(), *extra.split(), "--data_path", str(data)]
    together(index_main.main, [*flags, "--ckpt_dir", str(data.parent / "two")])
    index_main.main([*flags, "--ckpt_dir", str(data.parent / "one")])
    one, two = final(data.parent / "one"), final(data.parent / "two")
    for name, value in one["state_dict"].items():
        torch.testing.assert_close(two["state_dict"][name], value, rtol=1e-3, atol=1e-5, msg=name)
    assert two["best_loss"] == pytest.approx(one["best_loss"], rel=1e-4)
    assert two["best_collision_rate"] == one["best_collision_rate"]


@pytest.mark.parametrize("workers", ["0", "2"])
def test_rows_read_from_disk_give_the_same_run(data: Path, monkeypatch: pytest.MonkeyPatch, workers: str) -> None:
    flags = [*FLAGS.split(), "--num_workers", workers, "--data_path", str(data)]
    index_main.main([*flags, "--ckpt_dir", str(data.parent / "memory")])
    monkeypatch.setattr(index_embeddings, "RESIDENT_BYTES", 0)
    index_main.main([*flags, "--ckpt_dir", str(data.parent / "disk")])
    one, two = final(data.parent / "memory"), final(data.parent / "disk")
    assert all(torch.equal(two["state_dict"][name], value) for name, value in one["state_dict"].items())
