"""Flags of index/: the originals' defaults, presets that give way, batch norm as it ran, help and docs that agree."""

import argparse
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.append(str(Path(__file__).resolve().parents[2] / "index"))

import generate_indices
import main as index_main
from checkpoints import load_checkpoint, model_from_checkpoint
from flag_kinds import FlagParser

ROOT = Path(__file__).resolve().parents[2]
PARSERS = {"main.py": index_main.training_parser, "generate_indices.py": generate_indices.index_parser}


def test_without_flags_the_originals_defaults() -> None:
    args, given = index_main.parse_flags([])
    wanted = argparse.Namespace(
        lr=1e-3, epochs=5000, batch_size=2048, num_workers=4, eval_step=50, learner="adamw", lr_scheduler_type="constant",
        warmup_epochs=50, data_path="", weight_decay=0.0, dropout_prob=0.0, bn=False, loss_type="mse", kmeans_init=True,
        kmeans_iters=100, sk_epsilons=[0.0, 0.0, 0.0], sk_iters=50, device="cuda:0", num_emb_list=[256, 256, 256], e_dim=32,
        quant_loss_weight=1.0, beta=0.25, layers=[2048, 1024, 512, 256, 128, 64], save_limit=5, ckpt_dir="",
    )  # fmt: skip
    assert {name: getattr(args, name) for name in vars(wanted)} == vars(wanted) and given == set()


def test_the_papers_preset_is_what_ran_and_gives_way_to_flags() -> None:
    args, _ = index_main.parse_flags(["--preset", "paper"])
    assert (args.num_emb_list, args.sk_epsilons) == ([256] * 4, [0.0, 0.0, 0.0, 0.003])
    assert (args.batch_size, args.epochs, args.weight_decay, args.lr_scheduler_type) == (1024, 10_000, 1e-4, "linear")
    assert args.bn is True and (args.warmup_epochs, args.lr, args.seed) == (50, 1e-3, 2024)
    args, given = index_main.parse_flags("--preset paper --bn False --epochs 7 --num_emb_list 64 64 64".split())
    assert (args.bn, args.epochs, args.batch_size, args.sk_epsilons) == (False, 7, 1024, [0.0, 0.0, 0.003])
    assert given == {"preset", "bn", "epochs", "num_emb_list"}


@pytest.mark.parametrize(("word", "value"), [("False", False), ("true", True), ("0", False), ("yes", True)])
def test_booleans_mean_what_they_say(word: str, value: bool) -> None:
    assert index_main.parse_flags(["--bn", word])[0].bn is value


@pytest.mark.parametrize("dataset", ["Games", "Arts", "Instruments"])
def test_the_recipes_of_the_papers_datasets_take_its_preset(dataset: str) -> None:
    script = f'source scripts/recipes.sh; recipe {dataset} "" 0; echo $INDEX_RECIPE'
    assert subprocess.check_output(["bash", "-c", script], cwd=ROOT, text=True).strip() == "--preset paper"


@pytest.mark.parametrize("rows", [41, 40, 2])
def test_batch_norm_trains_with_any_number_of_rows(tmp_path: Path, rows: int) -> None:
    """A last batch of one row has no variance: it joins the one before. The statistics are kept and used."""
    np.save(tmp_path / "e.npy", np.random.default_rng(0).normal(size=(rows, 6)).astype(np.float32))
    flags = "--preset paper --num_emb_list 4 4 --layers 8 6 --e_dim 3 --batch_size 20 --epochs 3 --warmup_epochs 0"
    words = [
        *flags.split(),
        "--device",
        "cpu",
        "--data_path",
        str(tmp_path / "e.npy"),
        "--ckpt_dir",
        str(tmp_path / "c"),
    ]
    (path,) = index_main.main(words).glob("epoch_2_*")
    content = load_checkpoint(path)
    steps = 3 * max(1, rows // 20)
    assert content["state_dict"]["encoder.mlp_layers.2.num_batches_tracked"] == steps
    model = model_from_checkpoint(content, path).eval()
    one = torch.ones(1, 6)
    assert torch.isfinite(model(one, use_sk=False)[0]).all()


@pytest.mark.parametrize("name", PARSERS)
def test_help_is_grouped_with_ranges_defaults_and_an_example(name: str) -> None:
    shown = " ".join(PARSERS[name]().format_help().split())
    assert f"python index/{name}" in shown and "files and machine:" in shown
    assert "default 4096" in shown or "a number above 0; default 0.001" in shown
    assert re.search(r"a whole number from 0 on, 10\^12 at most; default (4|20)\)", shown)


def flags_of(parser: FlagParser) -> set[str]:
    return set(re.findall(r"--\w+", parser.format_usage()))
