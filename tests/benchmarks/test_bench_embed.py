"""bench_embed.py compares what it says: the same rows by one text at a time and by the command."""

import json

import pytest
from tiny_models import make_model
from toy_data import write_dataset

from benchmarks import bench_embed


@pytest.mark.slow
def test_same_rows_both_ways(tmp_path, capsys):
    write_dataset(tmp_path / "data")
    make_model("llama", tmp_path / "model")
    flags = ["--data_path", str(tmp_path / "data"), "--dataset", "Toy", "--model_path", str(tmp_path / "model")]
    bench_embed.main([*flags, "--items", "4", "--processes", "1", "--output", str(tmp_path / "figures.json")])
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures["differences"]["b"]["largest_difference"] < 1e-5
    assert 1e-5 < figures["differences"]["c"]["largest_difference"] < 0.2
    assert "x as fast" in capsys.readouterr().out
