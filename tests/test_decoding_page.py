"""docs/decoding.md: its Python block runs as it stands."""

import re
from pathlib import Path

from scoring_world import make_world

from data import load_data
from prompt import load_prompts
from prompt_style import PromptStyle
from tasks import HistoryFormat

PAGE = Path(__file__).parents[1] / "docs" / "decoding.md"


def test_the_python_block_answers(tmp_path):
    make_world(tmp_path)
    PromptStyle(load_prompts(), HistoryFormat()).save(tmp_path / "ckpt", load_data(str(tmp_path), "toy"))
    (block,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    for ours, toy in (
        ("ckpt/Games", str(tmp_path / "ckpt")),
        ('"data", "Games"', f'"{tmp_path}", "toy"'),
        ("cuda", "cpu"),
    ):
        assert ours in block
        block = block.replace(ours, toy)
    names: dict = {}
    exec(block, names)
    (answer,) = names["answers"]
    assert len(answer["items"]) == 5, answer
