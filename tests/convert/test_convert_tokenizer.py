"""Tokenizers of released checkpoints: rebuilt, they tokenise as the slow class did that the models were trained with.

The tables are what transformers 4.28.1 (4.33.3 gives the same) and 4.36.2 returned for these texts and this tokenizer.
"""

from __future__ import annotations

import json
import shutil

import pytest
from convert_parts import ITEM_TOKENS, UNTIL_4_33, VOCABULARY, save_tokenizer
from transformers import AutoTokenizer

from convert import old_tokenizer
from convert.folder import find_model, item_tokens, read_tokenizer

SINCE_4_34 = {
    "hi<a_1><b_2> the</s>": "▁ h i <a_1> <b_2> ▁ ▁th e </s>",
    "<a_1><b_2>, <c_1><d_2>": "<a_1> <b_2> ▁ <0x2C> ▁ <c_1> <d_2>",
    "user: <a_1><b_2>, <a_0><d_3> and\nblue things <a_1>. The red": (
        "▁ u s er <0x3A> ▁ <a_1> <b_2> ▁ <0x2C> ▁ <a_0> <d_3> ▁ ▁a nd <0x0A> b lu e ▁th in gs ▁ <a_1> ▁ "
        "<0x2E> ▁ <0x54> h e ▁ r ed"
    ),
    "Response:<a_1><b_2></s>": "▁ <0x52> e s <0x70> o n s e <0x3A> <a_1> <b_2> </s>",
    "1. <a_1><b_2>, 2. <a_0>": "▁ 1 <0x2E> ▁ <a_1> <b_2> ▁ <0x2C> ▁ 2 <0x2E> ▁ <a_0>",
    "items:\n\n<a_1>\n### Response:": (
        "▁ it em s <0x3A> <0x0A> <0x0A> <a_1> ▁ <0x0A> <0x23> <0x23> <0x23> ▁ <0x52> e s <0x70> o n s e <0x3A>"
    ),
    "a  <a_1>  b": "▁a ▁ ▁ <a_1> ▁ ▁ ▁b",
}


def since_4_34(folder) -> None:
    """Describe the item tokens in tokenizer_config.json, as later versions do."""
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": False}
    tokens = {str(VOCABULARY + number): {"content": token} | flags for number, token in enumerate(ITEM_TOKENS)}
    settings |= {"added_tokens_decoder": tokens, "legacy": True}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


@pytest.mark.parametrize(("later", "table"), [(False, UNTIL_4_33), (True, SINCE_4_34)], ids=["4.28", "4.36"])
def test_text_is_cut_as_in_training(tmp_path, later, table):
    save_tokenizer(tmp_path / "old", ITEM_TOKENS)
    if later:
        since_4_34(tmp_path / "old")
    (tmp_path / "new").mkdir()
    assert "rules of its training" in old_tokenizer.save_old_tokenizer(find_model(tmp_path / "old"), tmp_path / "new")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "new")
    for text, wanted in table.items():
        tokens = tokenizer.convert_ids_to_tokens(tokenizer(text).input_ids)
        assert tokens == ["<s>", *wanted.split(" ")], text
    assert tokenizer.convert_tokens_to_ids(ITEM_TOKENS) == list(range(VOCABULARY, VOCABULARY + len(ITEM_TOKENS)))
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.unk_token) == ("<s>", "</s>", "<unk>")


def test_it_differs_from_what_the_library_makes_of_the_files(tmp_path):
    """If this fails, the library follows the old rules itself and the rebuilding can go."""
    save_tokenizer(tmp_path / "old", ITEM_TOKENS)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "old")
    text = "<a_1><b_2>, <c_1><d_2>"
    assert tokenizer.convert_ids_to_tokens(tokenizer(text).input_ids)[1:] != UNTIL_4_33[text].split(" ")


def test_new_tokenizers_are_copied_as_they_are(tmp_path):
    save_tokenizer(tmp_path / "old", ITEM_TOKENS)
    AutoTokenizer.from_pretrained(tmp_path / "old").save_pretrained(tmp_path / "today")
    (tmp_path / "copy").mkdir()
    assert old_tokenizer.save_old_tokenizer(find_model(tmp_path / "today"), tmp_path / "copy") is None
    for path in (tmp_path / "today").iterdir():
        assert (tmp_path / "copy" / path.name).read_bytes() == path.read_bytes()
    shutil.rmtree(tmp_path / "copy")
    settings = json.loads((tmp_path / "old/tokenizer_config.json").read_text()) | {"legacy": False}
    (tmp_path / "old/tokenizer_config.json").write_text(json.dumps(settings))
    assert old_tokenizer.rebuild(find_model(tmp_path / "old")) is None


def test_item_tokens_are_those_that_train(tmp_path):
    """data.py's pattern: levels of more than one letter too."""
    save_tokenizer(tmp_path / "model", ["<ab_0>"])
    assert item_tokens(read_tokenizer(find_model(tmp_path / "model"))) == {"<ab_0>": VOCABULARY}
