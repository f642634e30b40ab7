"""A small folder in which every command of index/ ends well, for tests that break it."""

import json
import shutil
import sys
from pathlib import Path

import numpy as np

sys.path.append(str(Path(__file__).resolve().parents[2] / "index"))

import generate_indices
import main as index_main

SMALL = "--num_emb_list 8 8 8 --sk_epsilons 0 0 0.003 --layers 32 16 --e_dim 4 --batch_size 30 --epochs 4 --eval_step 2"


def make_index_world(folder: Path) -> Path:
    """90 clustered rows in e.npy, three more in more.npy, titles in D.item.json, a run in run/, its D.index.json."""
    generator = np.random.default_rng(0)
    rows = generator.normal(size=(9, 12))[np.arange(90) % 9] + 0.1 * generator.normal(size=(90, 12))
    np.save(folder / "e.npy", rows.astype(np.float32))
    np.save(folder / "more.npy", np.concatenate([rows, rows[:3] + 0.01]).astype(np.float32))
    (folder / "D.item.json").write_text(json.dumps({str(i): {"title": f"thing {i}"} for i in range(90)}))
    words = [*SMALL.split(), "--warmup_epochs", "1", "--save_limit", "1", "--data_path", str(folder / "e.npy")]
    shutil.move(index_main.main([*words, "--device", "cpu", "--ckpt_dir", str(folder / "new")]), folder / "run")
    shutil.rmtree(folder / "new")
    flags = ["--device", "cpu", "--ckpt_path", str(folder / "run"), "--output_file", str(folder / "D.index.json")]
    generate_indices.main(flags)
    return folder


def with_header(words: str) -> bytes:
    """An `.npy` file with any header."""
    data = words.encode("latin1").ljust(118) + b"\n"
    return b"\x93NUMPY\x01\x00" + len(data).to_bytes(2, "little") + data + bytes(400)
