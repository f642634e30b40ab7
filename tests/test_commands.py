"""The commands of the README run as printed, apart from paths, ports and process counts, on the released file formats."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from running import as_script, free_port
from toy_data import write_dataset

from data_process import base_model

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.slow


def environment(**more: str) -> dict[str, str]:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return {**os.environ, "PATH": path, "VIRTUAL_ENV": sys.prefix, "OMP_NUM_THREADS": "1", **more}


def shell(command: str, **more: str) -> str:
    result = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", command], cwd=ROOT, env=environment(**more), capture_output=True, text=True
    )
    assert result.returncode == 0, f"{command}\n{result.stdout[-3000:]}\n{result.stderr[-3000:]}"
    return result.stdout


def readme_commands() -> str:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    return re.search(r"<!-- commands:.*?-->\n```bash\n(.*?)```", text, re.DOTALL).group(1)


def test_the_papers_commands(tmp_path):
    """finetune.py, convert.sh, test.py and test_ddp.py in one go; then what they must leave behind."""
    write_dataset(tmp_path / "data", "Games")
    tiny = ["tiny", "--data_path", str(tmp_path / "data"), "--dataset", "Games", "--vocab_size", "400"]
    base_model.main([*tiny, "--target", str(tmp_path / "base"), "--hidden_size", "32", "--layers", "2", "--heads", "2"])

    commands = readme_commands()
    assert commands.count("torchrun") == 2 and "convert.sh" in commands and "python test.py" in commands
    commands = commands.replace("huggyllama/llama-7b", str(tmp_path / "base"))
    commands = re.sub(r"(?<![\w.])\./(data|ckpt|results)\b", rf"{tmp_path}/\1", commands)
    commands = commands.replace("--nproc_per_node=8", "--nproc_per_node=2")
    commands = commands.replace("--master_port=23324", f"--master_port={free_port()}")
    commands = commands.replace(">convert.log 2>&1 &", f">{tmp_path}/convert.log 2>&1;")  # wait for it here
    shell(commands)

    from transformers import AutoModelForCausalLM, AutoTokenizer

    trained = tmp_path / "ckpt" / "Games"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(trained), AutoTokenizer.from_pretrained(trained)
    assert tokenizer.convert_tokens_to_ids("<a_0>") == len(tokenizer) - 10  # ten item tokens, sorted, at the end
    assert model.get_input_embeddings().weight.shape[0] == len(tokenizer)
    finals = sorted(trained.glob("final-checkpoint-*"))
    assert finals, (tmp_path / "convert.log").read_text()
    AutoModelForCausalLM.from_pretrained(finals[-1])
    one = json.loads((tmp_path / "results" / "Games" / "result.json").read_text())
    many = json.loads((tmp_path / "results" / "Games" / "result-ddp.json").read_text())
    assert one["test_prompt_ids"] == "all" and len(one["all_prompt_results"]) == 17
    for key in ("mean_results", "min_results", "max_results", "all_prompt_results"):
        assert one[key] == many[key]

    delta, rebuilt = tmp_path / "delta", tmp_path / "rebuilt"
    base = finals[-1]  # any model of the same shape serves as the base of a delta
    for command in (
        f"convert/make_delta.py --base-model-path {base} --target-model-path {trained} --delta-path {delta}",
        f"convert/merge_delta.py --base-model-path {base} --target-model-path {rebuilt} --delta-path {delta} "
        "--low-cpu-mem",
        f"convert/convert_fp16.py --in-checkpoint {base} --out-checkpoint {tmp_path / 'half'}",
        f"convert/convert.py -s {sorted(trained.glob('checkpoint-*'))[-1]} -t {tmp_path / 'again'}",
    ):
        result = as_script(*shlex.split(command))
        assert result.returncode == 0, result.stderr
    same = AutoModelForCausalLM.from_pretrained(rebuilt).state_dict()
    for name, tensor in model.state_dict().items():
        assert (same[name].float() - tensor.float()).abs().max() < 2e-3, name


def test_a_process_ends_with_status_2(tmp_path):
    command = [sys.executable, "data.py", "--check", "--data_path", str(tmp_path), "--dataset", "Nope"]
    result = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True)
    assert result.returncode == 2 and result.stderr.startswith("error: ") and result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("finetune.py --data_path {data} --dataset Nope --deepspeed none", "no such folder"),
        ("finetune.py --data_path {data} --dataset Toy --deepspeed none --tasks seqrec,typo", "unknown task 'typo'"),
        ("finetune.py --dataset Toy --deepspeed none --tasks seqrec --train_data_sample_num 1,1", "has 2 numbers"),
        ("finetune.py --data_path {data} --dataset Toy --deepspeed nope.json", "no such file"),
        ("finetune.py --data_path {data} --dataset Toy --deepspeed none --base_model {data}/nope", "no such folder"),
        ("test.py --data_path {data} --dataset Toy --ckpt_path {base}", "lacks 10 of the 10 item tokens"),
        ("test.py --data_path {data} --dataset Toy --ckpt_path {base} --num_beams 5", "hit@10"),
        ("test.py --data_path {data} --dataset Toy --ckpt_path {data}", "holds no model"),
        ("test.py --data_path {data} --dataset Toy --ckpt_path {base} --lora", "holds no LoRA adapter"),
        ("test.py --data_path {data} --dataset Toy --ckpt_path {base} --test_task Typo", "SeqRec, ItemSearch"),
        ("test.py --data_path {data} --dataset Toy --ckpt_path {base} --test_prompt_ids 17", "templates 0 to 16"),
        ("evaluate.py --predictions {data}/nope.jsonl", "nope.jsonl"),
        ("index/main.py --data_path {data}/nope.npy --ckpt_dir {data}/rq", "nope.npy"),
        ("data_process/user_texts.py --data_path {data} --dataset Nope", "no such file"),
    ],
)
def test_wrong_input_is_one_line_and_status_2(tmp_path, command, message):
    write_dataset(tmp_path / "data")
    base = tmp_path / "base"
    if "{base}" in command:
        tiny = ["tiny", "--data_path", str(tmp_path / "data"), "--dataset", "Toy", "--vocab_size", "400"]
        base_model.main([*tiny, "--target", str(base), "--hidden_size", "32", "--layers", "1", "--heads", "2"])
    words = shlex.split(command.format(data=tmp_path / "data", base=base))
    results = ["--results_file", str(tmp_path / "result.json")] if words[0] == "test.py" else []
    output = ["--output_dir", str(tmp_path / "out")] if words[0] == "finetune.py" else []
    result = as_script(*words, *results, *output)
    assert result.returncode == 2, result.stdout + result.stderr
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and message in errors[0], result.stderr
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "out").exists()
