"""One function loads each kind of thing that people hand over: no other module calls a loader, and none trusts code."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# loader → the modules that may call it. What a module loads that it has just written itself counts too.
ALLOWED = {
    "from_pretrained": {
        *("reading.py", "tokenising.py", "convert/folder.py"),
        *("data_process/base_model.py", "data_process/pretrained.py", "benchmarks/bench_embed.py"),
    },
    "torch.load": {"convert/weights.py", "index/input_files.py"},
    "np.load": {
        "index/input_files.py",
        "benchmarks/bench_index.py",
        "benchmarks/bench_embed.py",
    },
    "open_memmap": {"reading.py", "data_process/text_vectors.py", "benchmarks/bench_index.py"},  # the last two write
    "format.read_array": set(),
    "load_peft_weights": {"reading.py"},
    "load_file": set(),
    "safe_open": {"reading.py", "resume.py", "convert/weights.py", "benchmarks/compare.py"},
    "pickle.load": set(),
    "pickle.loads": set(),
    "runpy.run_path": {"prompt.py"},  # --prompt_file F.py, which the user names as code
    "json.load": set(),
    "json.loads": {
        "utils.py",
        "results.py",  # its own lines, checked before
        "tokenising.py",  # what a tokenizer says of itself
        "index/input_files.py",  # index/ stands alone: its own reader
        "data_process/raw_files.py",  # lines of raw files, with their numbers
        "testing.py",
        "benchmarks",  # what they have written themselves
    },
    "read_text": {"convert", "results.py", "resume.py", "benchmarks"},
    "eval": set(),
    "exec": set(),
}
BUILTINS = {"eval", "exec"}
UNTRUSTED = {"from_pretrained"}  # takes trust_remote_code


def sources() -> list[Path]:
    folders = ("", "convert", "index", "data_process", "benchmarks", "metrics")
    return sorted(path for folder in folders for path in (ROOT / folder).glob("*.py"))


def calls(path: Path) -> Iterator[tuple[str, ast.Call]]:
    """Every call in a source file, by the dotted name that it has there."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


def loader(name: str) -> str | None:
    """The key of `ALLOWED` that a call of `name` is one of."""
    for known in ALLOWED:
        if name == known or (known not in BUILTINS and name.endswith(f".{known}")):
            return known
    return None


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(ROOT)))
def test_only_readers_read(path):
    name = str(path.relative_to(ROOT))
    folder = name.partition("/")[0]
    for called, node in calls(path):
        known = loader(called)
        if known is None:
            continue
        assert {name, folder} & ALLOWED[known], (
            f"{name}:{node.lineno} calls {called}; use reading.py or utils.read_json"
        )
        if known in UNTRUSTED and "LoraConfig" not in called:
            flags = {word.arg: ast.unparse(word.value) for word in node.keywords}
            assert flags.get("trust_remote_code") == "False", (
                f"{name}:{node.lineno}: trust_remote_code=False is missing"
            )


def test_torch_load_never_unpickles_at_will():
    for path in sources():
        for called, node in calls(path):
            if called.endswith("torch.load"):
                flags = {word.arg: ast.unparse(word.value) for word in node.keywords}
                assert flags.get("weights_only") == "True", f"{path.name}:{node.lineno}"
            assert not any(word.arg == "allow_pickle" and ast.unparse(word.value) == "True" for word in node.keywords)


def test_the_list_names_files_that_are_there():
    for places in ALLOWED.values():
        assert all((ROOT / place).exists() for place in places)
