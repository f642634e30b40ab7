"""bench_index.py runs to its end on small inputs, and what it prints agrees with what it measured."""

import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))

import bench_index


@pytest.mark.slow
def test_plain_loop_and_preset_side_by_side(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(20, 16))[np.arange(300) % 20] + 0.3 * rng.normal(size=(300, 16))
    np.save(tmp_path / "D.emb-x-td.npy", rows.astype(np.float32))
    found = bench_index.main(["--data_path", str(tmp_path / "D.emb-x-td.npy"), "--epochs", "2", "--warmup_epochs", "1"])
    shown = capsys.readouterr().out
    assert found["plain_cpu_seconds"] > 0 and found["whole_preset_reaches"]
    assert f"{found['fast_cpu_seconds_whole_preset']:.1f} CPU against {found['plain_cpu_seconds']:.1f}" in shown
