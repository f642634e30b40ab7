"""Whole or not at all: killed at every step, on a full disk, by two processes at once; and in how much memory."""

from __future__ import annotations

import json
import os
import shutil
import signal
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from convert_parts import ITEM_TOKENS, ROOT, delta_parts, run_script, save_word_tokenizer
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig

from convert import convert, make_delta, merge_delta
from convert.folder import skeleton
from folders import locked
from utils import UserError


def merge(folder: Path, target: Path, *words: str) -> None:
    paths = [
        "--base-model-path",
        f"{folder}/base",
        "--delta-path",
        f"{folder}/delta",
        "--target-model-path",
        f"{target}",
    ]
    merge_delta.main([*paths, *words])


def loads(folder: Path) -> bool:
    """True if transformers makes a model of the folder."""
    try:
        AutoModelForCausalLM.from_pretrained(folder)
    except (OSError, ValueError):
        return False
    return True


def killed_at(step: int, folder: Path, *words: str) -> bool:
    """Merge in a child that kills itself (-9) at its `step`-th file operation below `folder`; False if it got through."""
    child = os.fork()
    if not child:
        count = 0

        def hook(event: str, arguments: tuple) -> None:
            nonlocal count
            writes = event in ("os.rename", "os.mkdir", "os.remove", "os.rmdir") or (
                event == "open" and isinstance(arguments[1], str) and set("wax+") & set(arguments[1])
            )
            if writes and str(arguments[0]).startswith((str(folder), ".target")):
                count += 1
                if count == step:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(hook)
        try:
            merge(folder, folder / "target", *words)
        except BaseException as error:
            print(error, file=sys.stderr)
            os._exit(1)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert status == 0 or os.WIFSIGNALED(status), status
    return os.WIFSIGNALED(status)


def folders(folder: Path) -> list[Path]:
    """All folders beside the inputs."""
    return [path for path in folder.iterdir() if path.is_dir() and path.name not in ("base", "delta", "reference")]


@pytest.mark.slow
@pytest.mark.parametrize("overwrite", [False, True])
def test_killed_at_every_step_no_folder_loads_that_is_not_complete(tmp_path, overwrite):
    delta_parts(tmp_path)
    merge(tmp_path, tmp_path / "reference", "--max-shard-size", "40KB")
    wanted = {path.name: path.read_bytes() for path in (tmp_path / "reference").glob("model*")}
    words = ["--max-shard-size", "40KB", *(["--overwrite"] if overwrite else [])]
    if overwrite:  # what stands there is another, complete model
        merge(tmp_path, tmp_path / "target", "--dtype", "float32")
    before = load_file(tmp_path / "target/model.safetensors") if overwrite else None
    step, was_killed = 1, True
    while was_killed:
        was_killed = killed_at(step, tmp_path, *words)
        for path in folders(tmp_path):
            complete = (path / "config.json").is_file() and {
                p.name: p.read_bytes() for p in path.glob("model*")
            } == wanted
            if before and path.name in ("target", ".target.old") and (path / "config.json").is_file() and not complete:
                assert all(torch.equal(load_file(path / "model.safetensors")[name], before[name]) for name in before)
            elif not complete:
                assert not loads(path), f"step {step}: {path} loads"
        step += 1
        if was_killed and not overwrite and (tmp_path / "target").exists():
            shutil.rmtree(tmp_path / "target")
    assert step > 10
    assert [path.name for path in folders(tmp_path)] == ["target"]
    assert loads(tmp_path / "target")


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 100 KB: enough for a tokenizer and a shard, not for a model."""
    path = tmp_path / "disk"
    path.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=100k", "tmpfs", str(path)]
    if os.geteuid() or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("mounting a small disk needs root")
    yield path
    subprocess.run(["umount", str(path)], check=True)


@pytest.mark.parametrize("way", ["merge", "delta", "convert"])
def test_a_full_disk_leaves_nothing(tmp_path, small_disk, way):
    delta_parts(tmp_path)
    merge(tmp_path, tmp_path / "tuned")
    target = small_disk / "target"
    with pytest.raises(UserError, match=r"cannot be written \(.*No space left on device.*\)"):
        if way == "merge":
            merge(tmp_path, target, "--max-shard-size", "40KB")
        elif way == "delta":
            words = ["--base-model-path", f"{tmp_path}/base", "--target-model-path", f"{tmp_path}/tuned"]
            make_delta.main([*words, "--delta-path", str(target)])
        else:
            convert.main(["-s", f"{tmp_path}/tuned", "-t", str(target)])
    assert list(small_disk.iterdir()) == []


def test_two_processes_do_not_write_the_same_folder(tmp_path):
    delta_parts(tmp_path)
    with locked(tmp_path / "target"), pytest.raises(UserError, match="another process is writing it now"):
        merge(tmp_path, tmp_path / "target")
    merge(tmp_path, tmp_path / "target")
    assert not list(tmp_path.glob(".target*"))


# ---- memory ----

MEASURE = """
import sys
from convert import make_delta, merge_delta
{"merge": merge_delta, "make": make_delta}[sys.argv[1]].main(sys.argv[2:])
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""


def sparse_safetensors(path: Path, shapes: dict[str, tuple[int, ...]], dtype: str, size: int) -> None:
    """A file of zeros with a proper header; it takes no room on the disk."""
    header, offset = {}, 0
    for name, shape in shapes.items():
        end = offset + torch.Size(shape).numel() * size
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text)
    os.truncate(path, 8 + len(text) + offset)


def synthetic(folder: Path, rows: int, shards: int, kind: str) -> int:
    """A LLaMA of 400 million parameters, all zero, in several shards; the bytes of its weights."""
    sizes = {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 5, "num_attention_heads": 16}
    config = LlamaConfig(vocab_size=rows, **sizes)
    config.save_pretrained(folder)
    shapes = list(skeleton(config)[0].items())
    step = -(-len(shapes) // shards)
    weight_map = {}
    for number in range(shards):
        part = dict(shapes[number * step : (number + 1) * step])
        if kind == "bin":
            file = f"pytorch_model-{number + 1:05d}-of-{shards:05d}.bin"
            with torch.serialization.skip_data():
                torch.save(
                    {name: torch.empty(shape, dtype=torch.float16) for name, shape in part.items()}, folder / file
                )
        else:
            file = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
            sparse_safetensors(folder / file, part, "F32", 4)
        weight_map |= dict.fromkeys(part, file)
    name = "pytorch_model.bin.index.json" if kind == "bin" else "model.safetensors.index.json"
    (folder / name).write_text(json.dumps({"weight_map": weight_map}))
    return sum(path.stat().st_size for path in folder.glob("*model-*"))


def peak_memory(folder: Path, way: str, *words: object) -> int:
    """Bytes of memory that a child needed at most to `make` or `merge` a delta."""
    paths = ["--base-model-path", folder / "base", *words]
    result = run_script("-c", MEASURE, way, *paths, PYTHONPATH=str(ROOT))
    assert result.returncode == 0, result.stderr
    return int(result.stdout.split()[-1]) * 1024


@pytest.mark.slow
def test_memory_stays_that_of_a_shard(tmp_path):
    """Base 1.7 GB in float32 safetensors, delta 0.8 GB in float16 .bin, four shards each; half a GB is imports."""
    save_word_tokenizer(tmp_path / "base", 32_000)
    save_word_tokenizer(tmp_path / "delta", 32_000, ITEM_TOKENS)
    base = synthetic(tmp_path / "base", 32_000, 4, "safetensors")
    delta = synthetic(tmp_path / "delta", 32_016, 4, "bin")
    assert base > 1.5e9 and delta > 0.75e9
    target, again = ("--target-model-path", tmp_path / "target"), ("--delta-path", tmp_path / "again")
    size = ("--max-shard-size", "200MB")
    merging = peak_memory(tmp_path, "merge", "--delta-path", tmp_path / "delta", "--any-base", *target, *size)
    making = peak_memory(tmp_path, "make", *target, *again, *size)
    print(f"peak {merging / 1e9:.2f} GB to merge, {making / 1e9:.2f} GB to make a delta")
    largest = 32_000 * 2048 * 4
    for peak in (merging, making):
        assert peak < 600e6 + 200e6 + 2 * largest  # imports, the shard, the tensor that is read and made
