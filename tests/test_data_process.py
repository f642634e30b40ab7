"""User texts by rule and the tiny base model, on small datasets."""

import numpy as np
import pytest

from data_process import base_model, user_texts
from utils import UserError


def test_user_texts_use_the_history_before_the_targets(toy):
    items = [
        {"title": f"Thing {word}", "description": f"Some {word} text here.", "brand": brand, "categories": kind}
        for word, brand, kind in [
            ("apple", "Acme", "Fruit"),
            ("banana", "Acme", "Fruit"),
            ("carrot", "Root", "Vegetable"),
            ("potato", "Root", "Vegetable"),
            ("quince", "Tree", "Rare"),
        ]
    ]
    content = user_texts.user_texts({"7": [0, 1, 2, 3, 4]}, items, seed=1)
    liked = " ".join(content["user_explicit_preference"]["7"])
    assert "Fruit" in liked and "Acme" in liked and "apple" in liked
    assert "Vegetable" not in liked and "Rare" not in liked and "quince" not in liked
    rows = content["user_vague_intention"]
    assert (rows["train"]["7"]["item"], rows["train"]["7"]["inters"]) == (2, [0, 1])
    assert (rows["test"]["7"]["item"], rows["test"]["7"]["inters"]) == (4, [0, 1, 2, 3])
    assert content == user_texts.user_texts({"7": [0, 1, 2, 3, 4]}, items, seed=1)


def test_an_item_without_description_shows_half_of_its_title_at_most():
    item = {"title": "Heavy Duty Steel Stapler", "description": "", "brand": "", "categories": ""}
    words = user_texts.item_words(item, np.random.default_rng(0)).split()
    assert len(words) == 2 and set(words) < {"heavy", "duty", "steel", "stapler"}


def test_tiny_base_model_loads_and_is_not_replaced(toy, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    target = tmp_path / "tiny"
    flags = ["tiny", "--data_path", str(toy), "--dataset", "Toy", "--target", str(target), "--vocab_size", "400"]
    base_model.main([*flags, "--hidden_size", "32", "--layers", "1", "--heads", "2"])
    tokenizer = AutoTokenizer.from_pretrained(target)
    model = AutoModelForCausalLM.from_pretrained(target)
    ids = tokenizer('Which item is called "Red Pen"?', return_tensors="pt").input_ids
    assert ids[0, 0] == tokenizer.bos_token_id
    assert model(input_ids=ids).logits.shape == (1, ids.shape[1], len(tokenizer))
    with pytest.raises(UserError, match="holds a model already"):
        base_model.main(flags)
