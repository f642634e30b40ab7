"""The tiny base model, on a small dataset."""

import pytest

from data_process import base_model
from utils import UserError


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
    with pytest.raises(UserError, match="is there and not empty"):
        base_model.main(flags)
