"""The first steps of a model: a line for each start and prompt, and figures that belong to them."""

from __future__ import annotations

from tiny_models import make_model
from toy_data import write_drawn_dataset

from benchmarks import bench_start


def test_each_start_and_prompt_has_a_line(tmp_path, capsys):
    make_model("smollm", tmp_path / "base")
    write_drawn_dataset(tmp_path / "data")
    flags = ["--data_path", str(tmp_path / "data"), "--dataset", "Toy", "--base_model", str(tmp_path / "base")]
    bench_start.main([*flags, "--batches", "2", "--batch_size", "3"])
    rows = [
        [cell.strip() for cell in line.split("|")[1:-1]]
        for line in capsys.readouterr().out.splitlines()
        if line[:1] == "|"
    ]
    rows, shares = rows[:-7], dict(rows[-5:])
    assert [*shares] == ["0", "0.01", "0.05", "0.1", "0.2"] and all(0 < float(loss) < 20 for loss in shares.values())
    assert [row[:2] for row in rows[2:]] == [
        ["drawn", "bare"],
        ["drawn", "frame"],
        ["words", "bare"],
        ["words", "frame"],
    ]
    for row in rows[2:]:
        assert len(row) == len(bench_start.COLUMNS)
        assert 0 < float(row[2]) < 20 and 0 <= int(row[6].rstrip("%")) <= 100
        assert all(float(cell) > 0.9 for cell in row[7:])  # two layers without a sink
