"""Make a LLaMA tokenizer of 2023 tokenise today as it did in training.

Checkpoints of that time were trained with the slow `LlamaTokenizer`. It cut a text at the item tokens and gave every
piece to sentencepiece on its own, which puts a `▁` before each: `<b_2>, <a_1>` was `<b_2>` `▁,` `<a_1>`. Until
transformers 4.33 it also stripped the blanks and line breaks around item tokens. Today's class does neither, so a
history, all item tokens and separators, reaches the model in tokens it has never seen there.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from convert.folder import TOKENIZER_FILES, ModelFolder, copy_files
from tokenising import cut_as_in_2023, load_tokenizer


def rebuild(folder: ModelFolder) -> tuple[Any, str] | None:
    """The tokenizer of a folder in the old layout, as a fast one with the old rules, and a note on what was done.

    None if the folder is not of that kind: it has a `tokenizer.json`, no `tokenizer.model`, another class than LLaMA's,
    or says `"legacy": false` (the new rules).
    """
    settings = folder.json("tokenizer_config.json") if folder.has("tokenizer_config.json") else {}
    old_layout = folder.has("tokenizer.model") and not folder.has("tokenizer.json")
    if not old_layout or settings.get("legacy") is False:
        return None
    if not str(settings.get("tokenizer_class", "LlamaTokenizer")).startswith("LlamaTokenizer"):
        return None
    strips = "added_tokens_decoder" not in settings  # how 4.34 and later write what they know of added tokens
    loaded = load_tokenizer(folder.path, settings.get("model_max_length", 2048))
    made = cut_as_in_2023(loaded, strips, settings.get("add_bos_token", True))
    around = ", blanks around item tokens dropped" if strips else ""
    return made, f"tokenizer rebuilt with the rules of its training (▁ before each piece of text{around})"


def save_old_tokenizer(folder: ModelFolder, target: Path) -> str | None:
    """Write the folder's tokenizer to `target`: an old one rebuilt (the note says so), any other as it is (None)."""
    rebuilt = rebuild(folder)
    if rebuilt is None:
        copy_files(folder, target, TOKENIZER_FILES)
        return None
    rebuilt[0].save_pretrained(target)
    return rebuilt[1]
