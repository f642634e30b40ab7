"""`bash run.sh`, whole, on the real MovieLens-100k with a few steps of everything: that the stages fit together."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.slow
def test_run_sh_end_to_end_and_a_second_time(tmp_path):
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {
        **os.environ,
        "PATH": path,
        "VIRTUAL_ENV": sys.prefix,
        "DATA_PATH": str(tmp_path / "data"),
        "OUTPUT_DIR": str(tmp_path / "ckpt"),
        "RESULTS_DIR": str(tmp_path / "results"),
        "MODELS_DIR": str(tmp_path / "models"),
        "PORT": "23599",
        "INDEX_FLAGS": "--epochs 4 --eval_step 2 --warmup_epochs 1",
        "FINETUNE_FLAGS": "--max_steps 6 --train_data_sample_num 300,0,0,100,0,0",
        "TEST_FLAGS": "--sample_num 40",
    }

    def run(*stages):
        command = ["bash", "run.sh", *stages]
        result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
        noise = re.search(r"(?i).*(warning|it/s|%\|).*", result.stdout + result.stderr)
        assert noise is None, f"a library speaks where there is no terminal: {noise[0]}"
        return result.stdout

    output = run()
    assert "| LC-Rec |" in output and "| popularity |" in output
    results = json.loads((tmp_path / "results" / "result.json").read_text())
    assert set(results["mean_results"]) == {"hit@1", "hit@5", "hit@10", "ndcg@5", "ndcg@10"}
    lines = (tmp_path / "results" / "result.predictions.jsonl").read_text().splitlines()
    assert len(lines) == 40 and all(len(set(json.loads(line)["items"])) == 20 for line in lines)
    report = json.loads((tmp_path / "data" / "ml-100k" / "ml-100k.index.report.json").read_text())
    assert report["distinct_indices"] == 1682

    again = run()
    assert again.count("skipped") >= 5
    assert output[output.index("| model |") :] == again[again.index("| model |") :]
