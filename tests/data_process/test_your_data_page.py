"""docs/your-data.md runs as it stands: every block that is marked, in order, with a few steps of training."""

import gzip
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import provenance
from benchmarks import bench_data

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs/your-data.md"
BLOCK = re.compile(r"<!-- run: (\w+) -->\n```bash\n(.*?)```\n", re.DOTALL)


def blocks(name: str) -> str:
    """The commands of the page's blocks with this mark."""
    return "\n".join(text for mark, text in BLOCK.findall(PAGE.read_text(encoding="utf-8")) if mark == name)


def test_four_commands_from_two_tables():
    *_, commands = (text for mark, text in BLOCK.findall(PAGE.read_text(encoding="utf-8")) if mark == "tables")
    lines = commands.strip().splitlines()
    assert len(lines) == 4 and "from_table.py" in lines[0] and "recommend.py" in lines[-1]


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder that looks like the repository, so that data, checkpoints and results of the page land in it."""
    folder = tmp_path_factory.mktemp("place")
    for path in ROOT.iterdir():
        if path.name not in ("data", "ckpt", "results", "models") and not path.name.startswith("."):
            (folder / path.name).symlink_to(path)
    return folder


def run(place: Path, commands: str, epochs: int = 4) -> str:
    """What the commands print; each must end well."""
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "VIRTUAL_ENV": sys.prefix,
        "PORT": "23611",
        "NPROC": "1",
        "INDEX_FLAGS": f"--epochs {epochs} --eval_step 2 --warmup_epochs 1",
        "FINETUNE_FLAGS": "--max_steps 6",
        "TEST_FLAGS": "--sample_num 20",
    }
    result = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", commands], cwd=place, env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    return result.stdout


@pytest.mark.slow
def test_two_tables_and_then_new_items(place):
    output = run(place, blocks("tables"))
    assert "interactions: 200 read" in output and "| LC-Rec |" in output
    titles = [item["title"] for item in json.loads((place / "data/Mine/Mine.item.json").read_text()).values()]
    assert sum(title in output[output.rindex("| LC-Rec |") :] for title in titles) >= 3
    output = run(place, blocks("extend"))
    old, new = (json.loads((place / f"data/{name}/{name}.index.json").read_text()) for name in ("Mine", "Mine2"))
    assert len(new) == len(old) + 1 and all(new[item] == tokens for item, tokens in old.items())
    assert "Green Pen No. 90" in output
    assert provenance.verify(place / "data/Mine2", provenance.notes_of(place / "data/Mine2", "Mine2")) == []


@pytest.mark.slow
def test_raw_amazon_files(place):
    reviews, metadata = bench_data.raw_files(place, 3_000)
    reviews.rename(place / "Video_Games_5.json.gz")
    metadata.rename(place / "meta_Video_Games.json.gz")
    *data, train, recommend = blocks("amazon").splitlines()  # training and lists: as for two tables, above
    assert train == "DATASET=VideoGames bash run.sh" and "recommend.py" in recommend
    output = run(place, "\n".join([*data, f"{train} data base"]))
    assert "Amazon 2018, reviews" in output and (place / "models/tiny-VideoGames/config.json").exists()
    assert (
        provenance.verify(place / "data/VideoGames", provenance.notes_of(place / "data/VideoGames", "VideoGames")) == []
    )
    with gzip.open(place / "Video_Games_5.json.gz", "rt") as file:
        assert len(file.readlines()) == 3_000
