"""decoding.py against two oracles: transformers' generate under a trie constraint, and brute force over the catalogue."""

import copy
import functools

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    GPT2Config,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    Qwen3Config,
)

import beam_rows
import decoding
from beam_rows import PrefixCache
from decoding import beam_search
from trie import ItemTrie

VOCABULARY, EOS = 160, 2
SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
CONFIGS = {
    "llama": lambda: LlamaConfig(**SMALL),
    "qwen": lambda: Qwen3Config(**SMALL, num_key_value_heads=2, head_dim=8, tie_word_embeddings=True),
    "mistral": lambda: MistralConfig(**SMALL, num_key_value_heads=2, sliding_window=None),
    "window": lambda: MistralConfig(**SMALL, num_key_value_heads=2, sliding_window=24),
    "gpt2": lambda: GPT2Config(n_embd=32, n_layer=2, n_head=4),
    "alibi": lambda: BloomConfig(hidden_size=32, n_layer=2, n_head=4),
    "state": lambda: MambaConfig(hidden_size=32, num_hidden_layers=2),
}
ATTENTION = ["llama", "qwen", "mistral", "gpt2"]


@functools.cache
def build(kind: str, dtype: torch.dtype = torch.float32, attention: str | None = None) -> torch.nn.Module:
    """A tiny random model with sharp distributions (large weights), so that scores differ clearly."""
    torch.manual_seed(len(kind))
    config = CONFIGS[kind]()
    config.vocab_size, config.initializer_range = VOCABULARY, 0.3
    config.bos_token_id, config.eos_token_id, config.pad_token_id = 1, EOS, 0
    # settings of the base model that must play no part
    model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention).eval()
    model.generation_config.temperature, model.generation_config.do_sample = 0.3, True
    return model


def random_catalogue(
    rng: np.random.Generator, levels: int, items: int, width: int, ragged: bool
) -> list[tuple[int, ...]]:
    """Indices over `width` codes a level, some of them shared, each level with tokens of its own."""
    width = min(width, 150 // levels)
    rows = [
        tuple(
            3 + level * width + int(rng.integers(width))
            for level in range(rng.integers(1, levels + 1) if ragged else levels)
        )
        for _ in range(items)
    ]
    return rows + rows[: items // 8]


def random_prompts(rng: np.random.Generator, batch: int, shared: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Left-padded prompts of different lengths with `shared` common first tokens."""
    beginning = rng.integers(3, VOCABULARY, shared)
    rows = [np.concatenate([beginning, rng.integers(3, VOCABULARY, rng.integers(1, 12))]) for _ in range(batch)]
    longest = max(map(len, rows)) + int(rng.integers(2))  # sometimes a column of padding alone
    ids, mask = np.zeros((batch, longest), int), np.zeros((batch, longest), int)
    for number, row in enumerate(rows):
        ids[number, longest - len(row) :], mask[number, longest - len(row) :] = row, 1
    return torch.from_numpy(ids), torch.from_numpy(mask)


def lowest_ids(catalogue: list[tuple[int, ...]]) -> dict[tuple[int, ...], int]:
    first: dict[tuple[int, ...], int] = {}
    for item, row in enumerate(catalogue):
        first.setdefault(row, item)
    return first


def by_generate(model, catalogue, ids, mask, beams) -> tuple[torch.Tensor, torch.Tensor]:
    """Oracle: transformers' beam search with a full prefix trie as `prefix_allowed_tokens_fn`."""
    follow: dict[tuple[int, ...], set[int]] = {}
    for row in catalogue:
        for depth in range(len(row) + 1):
            follow.setdefault(row[:depth], set()).add((*row, EOS)[depth])
    start = ids.shape[1]
    output = model.generate(
        input_ids=ids,
        attention_mask=mask,
        num_beams=beams,
        num_return_sequences=beams,
        do_sample=False,
        temperature=1.0,
        length_penalty=0.0,
        early_stopping=True,
        max_new_tokens=max(map(len, catalogue)) + 1,
        eos_token_id=EOS,
        pad_token_id=0,
        prefix_allowed_tokens_fn=lambda _, row: sorted(follow.get(tuple(row[start:].tolist()), {EOS})),
        return_dict_in_generate=True,
        output_scores=True,
    )
    first = lowest_ids(catalogue)
    items = [first.get(tuple(row[: row.index(EOS)]), -1) for row in output.sequences[:, start:].tolist()]
    return torch.tensor(items).view(-1, beams), output.sequences_scores.view(-1, beams)


@torch.inference_mode()
def by_brute_force(model, catalogue, ids, mask, end=(EOS,)) -> tuple[list[list[int]], list[list[float]]]:
    """Oracle: the whole catalogue ranked by log-probabilities from plain passes over prompt + index + `end`."""
    items, scores = [], []
    for prompt, real in zip(ids, mask, strict=True):
        prompt = prompt[real.bool()]
        found = []
        for row, item in lowest_ids(catalogue).items():
            answer = torch.tensor([*row, *end])
            whole = torch.cat([prompt, answer])[None]
            logits = model(input_ids=whole, attention_mask=torch.ones_like(whole)).logits[0].float().log_softmax(-1)
            found.append((-float(logits[len(prompt) - 1 : -1].gather(1, answer[:, None]).sum()), item))
        found.sort()
        items.append([item for _, item in found])
        scores.append([-score for score, _ in found])
    return items, scores


def assert_same(items, scores, wanted_items, wanted_scores) -> None:
    """Scores within 1e-4; the same items, but for swaps between scores closer than 1e-5."""
    wanted_items, wanted_scores = torch.as_tensor(wanted_items), torch.as_tensor(wanted_scores)
    assert items.shape == wanted_items.shape
    assert (scores - wanted_scores).abs().max() <= 1e-4
    for row, place in (items != wanted_items).nonzero().tolist():
        near = (wanted_scores[row] - wanted_scores[row, place]).abs() < 1e-5
        assert items[row, place] in wanted_items[row, near]


@pytest.mark.parametrize("kind", [*CONFIGS])
@settings(max_examples=8, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 10**6),
    levels=st.integers(1, 6),
    batch=st.integers(1, 5),
    shared=st.integers(0, 20),
    ragged=st.booleans(),
)
def test_lists_and_scores_equal_generate(kind, seed, levels, batch, shared, ragged):
    rng = np.random.default_rng(seed)
    catalogue = random_catalogue(rng, levels, 400 if ragged else 120, 24, ragged)
    trie = ItemTrie(catalogue, EOS)
    beams = int(rng.integers(2, max(3, min(12, *trie.counts[1:]))))
    ids, mask = random_prompts(rng, batch, shared)
    model = build(kind)
    items, scores = beam_search(model, trie, ids, mask, beams)
    wanted_items, wanted_scores = by_generate(model, catalogue, ids, mask, beams)
    legal = wanted_scores.min(1).values > -1e8  # where endings leave too few beams, generate takes illegal tokens
    assert ragged or legal.all()
    assume(legal.any())
    assert_same(items[legal], scores[legal], wanted_items[legal], wanted_scores[legal])


@pytest.mark.parametrize("kind", [*CONFIGS])
@settings(max_examples=3, deadline=None, derandomize=True)
@given(seed=st.integers(0, 10**6), levels=st.integers(1, 4), ragged=st.booleans(), more=st.integers(0, 30))
def test_with_beams_for_all_items_it_is_brute_force(kind, seed, levels, ragged, more):
    rng = np.random.default_rng(seed)
    catalogue = random_catalogue(rng, levels, 25, 4, ragged)
    trie = ItemTrie(catalogue, EOS)
    ids, mask = random_prompts(rng, 2, 9)
    items, scores = beam_search(build(kind), trie, ids, mask, trie.size + more)
    assert items.shape == (2, len(set(catalogue)))
    assert_same(items, scores, *by_brute_force(build(kind), catalogue, ids, mask))


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@settings(max_examples=8, deadline=None, derandomize=True)
@given(seed=st.integers(0, 10**6), levels=st.integers(1, 4), ragged=st.booleans(), more=st.integers(0, 30))
def test_without_an_end_token_it_is_brute_force_over_the_index_alone(kind, seed, levels, ragged, more):
    rng = np.random.default_rng(seed)
    catalogue = random_catalogue(rng, levels, 25, 4, ragged)
    if any(a != b and b[: len(a)] == a for a in catalogue for b in catalogue):
        with pytest.raises(ValueError, match="beginning of another"):
            ItemTrie(catalogue, None)
        return
    trie = ItemTrie(catalogue, None)
    ids, mask = random_prompts(rng, 2, 9)
    items, scores = beam_search(build(kind), trie, ids, mask, trie.size + more)
    assert_same(items, scores, *by_brute_force(build(kind), catalogue, ids, mask, end=()))


@pytest.mark.parametrize("kind", ATTENTION)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@settings(max_examples=8, deadline=None, derandomize=True)
@given(seed=st.integers(0, 10**6), levels=st.integers(1, 6), beams=st.integers(1, 40), ragged=st.booleans())
def test_results_exist_are_unique_and_complete(kind, dtype, seed, levels, beams, ragged):
    rng = np.random.default_rng(seed)
    catalogue = random_catalogue(rng, levels, 40, 3, ragged)  # fewer continuations than beams on the first levels
    ids, mask = random_prompts(rng, 3, 10)
    items, scores = beam_search(build(kind, dtype), ItemTrie(catalogue, EOS), ids, mask, beams)
    canonical = set(lowest_ids(catalogue).values())
    assert items.shape == scores.shape == (3, min(beams, len(canonical)))
    for row in items.tolist():
        assert len(set(row)) == len(row) and set(row) <= canonical
    assert scores.isfinite().all() and (scores[:, 1:] <= scores[:, :-1]).all()


@pytest.mark.parametrize("kind", ATTENTION)
def test_these_models_share_the_prompts_row(kind):
    """The fast way is what the tests above have tested for these models, and not its fallback."""
    assert beam_rows.way_through(build(kind), 40) is beam_rows.SharedRows
    assert beam_rows.way_through(build(kind, torch.bfloat16), 40) is beam_rows.SharedRows
    assert beam_rows.way_through(build(kind, attention="eager"), 40) is beam_rows.SharedRows


def test_models_that_cannot_share_a_row_are_found_out():
    assert beam_rows.way_through(build("alibi"), 40) is beam_rows.ExpandedRows
    assert beam_rows.way_through(build("state"), 40) is beam_rows.WholeRows
    assert beam_rows.way_through(build("window"), 40) is beam_rows.ExpandedRows
    assert beam_rows.way_through(build("window"), 24) is beam_rows.SharedRows


@pytest.mark.parametrize("kind", [*CONFIGS])
def test_batch_padding_and_prefix_play_no_part(kind):
    rng = np.random.default_rng(5)
    model, trie = build(kind), ItemTrie(random_catalogue(rng, 4, 200, 12, False), EOS)
    ids, mask = random_prompts(rng, 5, 15)
    items, scores = beam_search(model, trie, ids, mask, 10)
    alone = [
        beam_search(model, trie, row[real.bool()][None], real[real.bool()][None], 10)
        for row, real in zip(ids, mask, strict=True)
    ]
    assert_same(items, scores, torch.cat([one for one, _ in alone]), torch.cat([one for _, one in alone]))
    first = ids[0][mask[0].bool()]
    for tokens in (
        first[:15],
        first[:9],
        first[:3],
        first,
        first.flip(0),
    ):  # exact, shorter, too short, longer, another
        assert_same(*beam_search(model, trie, ids, mask, 10, PrefixCache(model, tokens)), items, scores)


def test_eager_attention_finds_the_same():
    rng = np.random.default_rng(6)
    trie = ItemTrie(random_catalogue(rng, 4, 200, 12, False), EOS)
    ids, mask = random_prompts(rng, 3, 12)
    wanted = beam_search(build("llama"), trie, ids, mask, 10)
    assert_same(*beam_search(build("llama", attention="eager"), trie, ids, mask, 10), *wanted)


def test_weights_may_be_away_between_passes():
    """ZeRO-3 keeps parts of large weights and gathers them whole for as long as their layer computes."""
    rng = np.random.default_rng(7)
    trie = ItemTrie(random_catalogue(rng, 4, 200, 12, False), EOS)
    ids, mask = random_prompts(rng, 3, 12)
    wanted = beam_search(build("llama"), trie, ids, mask, 10)
    model, away = copy.deepcopy(build("llama")), torch.empty(0)
    for layer in model.modules():
        if isinstance(layer, torch.nn.Linear | torch.nn.Embedding):
            whole = layer.weight.data
            layer.register_forward_pre_hook(lambda layer, _, whole=whole: setattr(layer.weight, "data", whole))
            layer.register_forward_hook(lambda layer, *_: setattr(layer.weight, "data", away))
            layer.weight.data = away
    assert_same(*beam_search(model, trie, ids, mask, 10), *wanted)


def test_equal_scores_are_ordered_by_token_on_every_run():
    model = AutoModelForCausalLM.from_config(LlamaConfig(**SMALL, vocab_size=VOCABULARY)).eval()
    torch.nn.init.zeros_(model.lm_head.weight)  # every token is as likely as any other
    catalogue = random_catalogue(np.random.default_rng(1), 3, 60, 8, False)
    ids, mask = random_prompts(np.random.default_rng(2), 2, 5)
    items, _ = beam_search(model, ItemTrie(catalogue, EOS), ids, mask, len(catalogue))
    in_order = [item for _, item in sorted(lowest_ids(catalogue).items())]
    assert items.tolist() == [in_order, in_order]
    few = beam_search(model, ItemTrie(catalogue, EOS), ids, mask, 7)[0]
    assert few.tolist() == beam_search(model, ItemTrie(catalogue, EOS), ids, mask, 7)[0].tolist()


def test_an_adapter_is_decoded_as_its_merged_model():
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(LlamaConfig(**SMALL, vocab_size=VOCABULARY, initializer_range=0.3))
    adapted = get_peft_model(base, LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False)).eval()
    rng = np.random.default_rng(3)
    trie = ItemTrie(random_catalogue(rng, 4, 200, 12, False), EOS)
    ids, mask = random_prompts(rng, 3, 12)
    found = beam_search(adapted, trie, ids, mask, 10)
    assert_same(*found, *beam_search(adapted.merge_and_unload(), trie, ids, mask, 10))


@pytest.mark.parametrize("kind", [*CONFIGS])
def test_packed_weights_change_nothing_but_rounding(kind):
    model = copy.deepcopy(build(kind))
    rng = np.random.default_rng(4)
    trie = ItemTrie(random_catalogue(rng, 4, 200, 12, False), EOS)
    ids, mask = random_prompts(rng, 3, 12)
    wanted = beam_search(build(kind), trie, ids, mask, 10)
    packed = decoding.pack_linears(model)
    assert packed == any(isinstance(module, decoding._PackedLinear) for module in model.modules())
    assert packed or not torch.backends.mkldnn.is_available() or kind in ("gpt2", "state")
    assert_same(*beam_search(model, trie, ids, mask, 10), *wanted)


def test_what_cannot_be_packed_stays_as_it_is(monkeypatch):
    assert not decoding.pack_linears(build("llama", torch.bfloat16))
    model = copy.deepcopy(build("llama"))
    before = [type(module) for module in model.modules()]
    monkeypatch.setattr(decoding._PackedLinear, "forward", lambda self, inputs: 1 / 0)
    with pytest.raises(ZeroDivisionError):  # a bug is not hidden
        decoding.pack_linears(model)
    model = copy.deepcopy(build("llama"))
    monkeypatch.setattr(decoding._PackedLinear, "__init__", lambda self, linear: torch.ops.mkldnn._no_such_kernel)
    assert not decoding.pack_linears(model)
    assert [type(module) for module in model.modules()] == before
    ones = torch.ones(1, 3, dtype=torch.long)
    assert torch.equal(model(ones).logits, build("llama")(ones).logits)


def test_what_cannot_be_decoded_is_refused():
    trie, ones = ItemTrie([(5, 6)], EOS), torch.ones(1, 3, dtype=torch.long)
    with pytest.raises(ValueError, match="num_beams"):
        beam_search(build("llama"), trie, ones, ones, 0)
    with pytest.raises(ValueError, match="left"):
        beam_search(build("llama"), trie, ones, torch.tensor([[1, 1, 0]]), 1)
    with pytest.raises(ValueError, match="left"):
        beam_search(build("llama"), trie, ones, torch.tensor([[0, 0, 0]]), 1)
