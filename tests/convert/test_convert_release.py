"""The walk-through of docs/checkpoints.md: a released delta, merged, scored with templates in the original's layout."""

from __future__ import annotations

import json
import re
import shlex

import pytest
import torch
from convert_parts import (
    ITEM_TOKENS,
    ROOT,
    VOCABULARY,
    fine_tuned,
    save_delta,
    save_model,
    save_tokenizer,
    tiny_llama,
)
from running import as_script
from transformers import AutoModelForCausalLM, AutoTokenizer

PROMPTS = """
sft_prompt = "Do as told.\\n\\n### Instruction:\\n{instruction}\\n\\n### Response:{response}"
all_prompt = {}

seqrec_prompt = []
prompt = {}
prompt["instruction"] = "the user bought {inters} and also"
prompt["response"] = "{item}"
seqrec_prompt.append(prompt)
prompt = {}
prompt["instruction"] = "blue things {inters} or red"
prompt["response"] = "{item}"
seqrec_prompt.append(prompt)
all_prompt["seqrec"] = seqrec_prompt
"""


def write_release(folder):
    """Base, delta, data and templates as a user downloads them; nothing in safetensors, a slow tokenizer."""
    base = tiny_llama(max_position_embeddings=512)
    save_model(base, folder / "llama-7b", "bin-sharded")
    save_tokenizer(folder / "llama-7b")
    save_delta(base, fine_tuned(base), folder / "Games-delta", "bin-sharded")
    data = folder / "data/Games"
    data.mkdir(parents=True)
    indices = {str(i): [f"<a_{i % 4}>", f"<b_{i // 4}>", f"<c_{(i * 3) % 4}>", f"<d_{i % 3}>"] for i in range(16)}
    (data / "Games.index.json").write_text(json.dumps(indices))
    (data / "Games.item.json").write_text(
        json.dumps({i: {"title": f"game {i}", "description": "a game"} for i in indices})
    )
    (data / "Games.inter.json").write_text(json.dumps({str(u): [(u + k) % 16 for k in range(5)] for u in range(4)}))
    (folder / "released_prompts.py").write_text(PROMPTS)


def commands() -> list[list[str]]:
    """The commands of the walk-through's first block, as words."""
    text = (ROOT / "docs/checkpoints.md").read_text(encoding="utf-8")
    block = re.search(r"## From a released delta.*?```bash\n(.*?)```", text, re.DOTALL)[1]
    return [shlex.split(line) for line in block.splitlines()]


@pytest.mark.slow
def test_walk_through(tmp_path):
    write_release(tmp_path)
    for words in commands():
        assert words[0] == "python"
        result = as_script(*words[1:], cwd=tmp_path)
        assert result.returncode == 0, result.stderr
    assert "running released_prompts.py for its templates" in result.stdout + result.stderr
    results = json.loads((tmp_path / "results/Games/result.json").read_text())
    assert len(results["all_prompt_results"]) == 2  # as many as the file has, not as this repository has
    lines = (tmp_path / "results/Games/result.predictions.jsonl").read_text().splitlines()
    assert len(lines) == 2 * 4

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "ckpt/Games", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "ckpt/Games")
    indices = json.loads((tmp_path / "data/Games/Games.index.json").read_text())
    histories = json.loads((tmp_path / "data/Games/Games.inter.json").read_text())
    for line in map(json.loads, lines):
        history = ", ".join("".join(indices[str(item)]) for item in histories[line["user"]][:-1])
        instruction = ("the user bought {} and also", "blue things {} or red")[line["prompt_id"]].format(history)
        prompt = f"Do as told.\n\n### Instruction:\n{instruction}\n\n### Response:"
        assert line["target"] == histories[line["user"]][-1]
        scores = {item: score_by_hand(model, tokenizer, prompt, index) for item, index in indices.items()}
        best = max(scores, key=scores.get)
        assert line["items"][0] == int(best)
        assert abs(line["scores"][0] - scores[best]) < 1e-3


def score_by_hand(model, tokenizer, prompt: str, index: list[str]) -> float:
    """Log-probability of an item's tokens and EOS after the prompt, by one plain forward pass."""
    answer = [*tokenizer.convert_tokens_to_ids(index), tokenizer.eos_token_id]
    start = tokenizer(prompt).input_ids
    with torch.no_grad():
        logs = model(torch.tensor([start + answer])).logits[0].log_softmax(-1)
    return float(sum(logs[len(start) - 1 + k, token] for k, token in enumerate(answer)))


def test_release_has_the_layout_it_should(tmp_path):
    write_release(tmp_path)
    names = {path.name for path in (tmp_path / "Games-delta").iterdir()}
    assert {"added_tokens.json", "tokenizer.model", "pytorch_model-00001-of-00003.bin"} <= names
    assert len(ITEM_TOKENS) + VOCABULARY == json.loads((tmp_path / "Games-delta/config.json").read_text())["vocab_size"]
