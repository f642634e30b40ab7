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
    flags = ["--data_path", str(tmp_path / "D.emb-x-td.npy"), "--epochs", "2", "--warmup_epochs", "1"]
    found = bench_index.main([*flags, "--no-equal_time"])
    shown = capsys.readouterr().out
    assert found["plain_cpu_seconds"] > 0 and found["whole_preset_reaches"]
    assert f"{found['fast_cpu_seconds_whole_preset']:.1f} CPU against {found['plain_cpu_seconds']:.1f}" in shown
    kept, final = found["indices"]["--preset fast, --allow_conflicts"], found["indices"]["--preset fast"]
    assert final["conflicts"].endswith("in the end 0") and kept["purity"]["10 nearest neighbours"]
    assert {"plain, 2 epochs", "--method rqkmeans", "--method random"} <= set(found["indices"])


@pytest.mark.slow
def test_scale_counts_memory_and_conflicts(tmp_path: Path) -> None:
    found = bench_index.main(["--items", "3000", "--dim", "24", "--folder", str(tmp_path), "--scale_batch", "500"])
    assert found["conflicts"] == 0
    for part in ("train", "generate"):
        assert 0.1 < found[part]["peak_gib"] < 3 and found[part]["seconds"] > 1
    assert not list(tmp_path.iterdir())


def test_memory_of_children_is_counted() -> None:
    """A process whose child holds 300 MB: the sum is found, though the process itself is small."""
    child = "import time; x = bytearray(b'x') * 300_000_000; time.sleep(1.5)"
    command = [sys.executable, "-c", f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"]
    assert 0.27 < bench_index.measured("child", command)["peak_gib"] < 0.5
