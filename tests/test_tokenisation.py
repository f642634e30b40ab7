"""How texts become tokens, frozen: a LLaMA sentencepiece tokenizer, and SmolLM2's byte-level BPE without BOS."""

import pytest

from collator import adds_bos, encode_samples
from data_process import base_model
from modeling import add_item_tokens, load_tokenizer

TOKENS = ["<a_1>", "<a_12>", "<b_3>"]
PROMPT = "The red pen <a_1><b_3>, <a_12><b_3>. Next?\n\n### Response:"
CORPUS = ["The red pen and the blue pen. Next? Next: Response.", "A user chose the red pen, then the blue pen."] * 40


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    base_model.train_tokenizer(iter(CORPUS), folder, 340)
    tokenizer = load_tokenizer(folder)
    add_item_tokens(tokenizer, TOKENS)
    return tokenizer


@pytest.fixture(scope="module")
def smollm2(smollm2_folder):
    tokenizer = load_tokenizer(smollm2_folder)
    add_item_tokens(tokenizer, TOKENS)
    return tokenizer


def tokens_of(tokenizer, response):
    ids, lengths = encode_samples(tokenizer, [PROMPT], [response], 2048)
    tokens = tokenizer.convert_ids_to_tokens(ids[0])
    return tokens[: lengths[0]], tokens[lengths[0] :]


LLAMA_PROMPT = (
    "<s> ▁The ▁red ▁pen ▁ <a_1> <b_3> , ▁ <a_12> <b_3> . ▁Next ? <0x0A> <0x0A> <0x23> <0x23> <0x23> ▁Response :".split()
)
SMOLLM2_PROMPT = "The Ġred Ġpen Ġ <a_1> <b_3> , Ġ <a_12> <b_3> . ĠNext ? Ċ Ċ ### ĠResponse :".split()


def test_llama_prompt_and_responses(llama):
    assert adds_bos(llama) and llama.pad_token_id == 0
    assert tokens_of(llama, "<a_12><b_3>") == (LLAMA_PROMPT, ["<a_12>", "<b_3>", "</s>"])
    # after the colon a text starts without the blank that the start of a text gets
    assert tokens_of(llama, "red pen") == (LLAMA_PROMPT, ["r", "ed", "▁pen", "</s>"])


@pytest.mark.slow
def test_smollm2_prompt_and_responses(smollm2):
    assert not adds_bos(smollm2) and len(smollm2) == 49152 + 3
    assert tokens_of(smollm2, "<a_12><b_3>") == (SMOLLM2_PROMPT, ["<a_12>", "<b_3>", "<|im_end|>"])
    assert tokens_of(smollm2, "blue pen") == (SMOLLM2_PROMPT, ["blue", "Ġpen", "<|im_end|>"])
    ids = smollm2("<a_1><b_3>", add_special_tokens=False)["input_ids"]
    assert ids == [49152, 49154]


@pytest.mark.parametrize("context", ["{}", "{}, {}", "x{}y", " {} ", "({})", "###{}\n", "Ünicode {}!", "<a_{}>"])
@pytest.mark.parametrize("name", ["llama", pytest.param("smollm2", marks=pytest.mark.slow)])
def test_an_index_is_its_tokens_in_every_context(name, context, request):
    tokenizer = request.getfixturevalue(name)
    index = ["<a_12>", "<b_3>", "<a_1>"]
    text = context.replace("{}", "".join(index))
    ids = [i for i in tokenizer(text)["input_ids"] if i in set(tokenizer.convert_tokens_to_ids(TOKENS))]
    assert tokenizer.convert_ids_to_tokens(ids) == index * context.count("{}")
