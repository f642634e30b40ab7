"""The rows of new tokens: where they start, and a learning rate of their own."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_models import make_model
from toy_data import write_drawn_dataset

import finetune
from data import load_data
from item_rows import rows_from_embeddings, rows_from_words
from modeling import load_model, load_tokenizer, prepare_base
from row_rate import RowRate
from utils import UserError, sha256


def flags(folder: Path, *more: str) -> list[str]:
    own = [
        "--base_model",
        str(folder / "base"),
        "--output_dir",
        str(folder / "out"),
        "--dataset",
        "Toy",
        "--deepspeed",
        "none",
    ]
    return [*own, "--data_path", str(folder / "data"), "--report_to", "none", "--tasks", "seqrec", *more]


def one_task(*more: str) -> list[str]:
    return ["--train_prompt_sample_num", "1", "--train_data_sample_num", "0", "--valid_prompt_sample_num", "1", *more]


def test_rows_can_start_from_the_items_embeddings(tmp_path):
    write_drawn_dataset(tmp_path / "data")
    data = load_data(str(tmp_path / "data"), "Toy")
    vectors = np.random.default_rng(0).normal(size=(len(data.titles), 6)).astype(np.float32)
    np.save(tmp_path / "e.npy", vectors)
    rows = rows_from_embeddings(tmp_path / "e.npy", data, data.item_tokens, 8)
    assert torch.allclose(rows.square().mean(1), torch.ones(len(rows))) and not rows[:, 6:].any()
    # turning to principal components keeps inner products: those of the tokens' mean embeddings
    unit = vectors - vectors.mean(0)
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    unit -= unit.mean(0)
    means = np.stack([unit[[token in index for index in data.indices]].mean(0) for token in data.item_tokens])
    means /= np.sqrt((means**2).sum(1, keepdims=True) / 8)
    assert np.allclose(rows @ rows.T, means @ means.T, atol=1e-4)
    np.save(tmp_path / "e.npy", vectors[1:])
    with pytest.raises(UserError, match="a row of finite numbers for each"):
        rows_from_embeddings(tmp_path / "e.npy", data, data.item_tokens, 8)
    np.savez(tmp_path / "e.npz", vectors)
    with pytest.raises(UserError, match="no array can be loaded"):
        rows_from_embeddings(tmp_path / "e.npz", data, data.item_tokens, 8)


def test_rows_from_words_are_their_items_titles_and_their_level_as_far_from_the_mean_as_the_models_own(tmp_path):
    make_model("llama", tmp_path / "base")
    write_drawn_dataset(tmp_path / "data")
    data, tokenizer = load_data(str(tmp_path / "data"), "Toy"), load_tokenizer(tmp_path / "base")
    own = load_model(tmp_path / "base").get_input_embeddings().weight.detach()[: len(tokenizer)].float() + 3.0
    rows = rows_from_words(own, tokenizer, data, data.item_tokens)
    spread = (own - own.mean(0)).norm(dim=1).median()
    rows = (rows - own.mean(0)) / spread
    assert torch.allclose(rows.norm(dim=1), torch.ones(len(rows)), rtol=1e-4)
    titles = [tokenizer(title, add_special_tokens=False)["input_ids"] for title in data.titles]
    items = torch.stack([own[ids].mean(0) for ids in titles])
    named = []
    for token in data.item_tokens:
        mine = torch.tensor([token in index for index in data.indices])
        named.append(items[mine].mean(0) - items.mean(0))
    named = torch.stack(named) / torch.stack(named).norm(dim=1, keepdim=True)
    for letter in "abc":  # what is left of a row without its own words is the same for all tokens of a level
        same = [i for i, token in enumerate(data.item_tokens) if token[1] == letter]
        plane = torch.stack(
            [row - scale * name for row, name, scale in zip(*halves(rows[same], named[same]), strict=True)]
        )
        assert torch.allclose(plane / plane.norm(dim=1, keepdim=True), plane[:1] / plane[:1].norm(), atol=1e-3)


def halves(rows: torch.Tensor, names: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rows, names, and how much of a row is its name, if row = scale · (name + level) with two unit vectors."""
    # |row|² = 1 = scale² (2 + 2 name·level), and row·name = scale (1 + name·level) = 1 / (2 scale)
    return rows, names, 1 / (2 * (rows * names).sum(dim=1))


@pytest.mark.parametrize("name", ["llama", "smollm"])  # a head of its own, and a tied one
def test_the_prepared_base_has_them_in_embeddings_and_head(name, tmp_path):
    make_model(name, tmp_path / "base")
    write_drawn_dataset(tmp_path / "data")
    data = load_data(str(tmp_path / "data"), "Toy")
    prepare_base(str(tmp_path / "base"), tmp_path / "ready", data.item_tokens, 0, start=("words", data))
    prepare_base(str(tmp_path / "base"), tmp_path / "again", data.item_tokens, 0, start=("words", data))
    assert sha256(tmp_path / "ready" / "model.safetensors") == sha256(tmp_path / "again" / "model.safetensors")
    before, model = load_model(tmp_path / "base", torch.float32), load_model(tmp_path / "ready", torch.float32)
    tokenizer = load_tokenizer(tmp_path / "ready")
    ids = tokenizer.convert_tokens_to_ids(data.item_tokens)
    for get in ("get_input_embeddings", "get_output_embeddings"):
        own = getattr(before, get)().weight.detach()[: min(ids)]
        away = getattr(model, get)().weight.detach()[ids] - own.mean(0)
        assert torch.allclose(away.norm(dim=1), (own - own.mean(0)).norm(dim=1).median().expand(len(ids)), rtol=2e-2)


@pytest.mark.parametrize("tied", [True, False])
def test_a_rate_of_their_own_equals_two_groups_of_parameters(tied):
    """Against AdamW with the rows as parameters of their own."""
    torch.manual_seed(0)
    start, head_start, ids = torch.randn(7, 4), torch.randn(7, 4), [2, 5]

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.head = torch.nn.Embedding(7, 4), torch.nn.Linear(4, 7, bias=False)
            self.inner.weight.data.copy_(start)
            self.head.weight.data.copy_(head_start)
            if tied:
                self.head.weight = self.inner.weight

        def get_input_embeddings(self):
            return self.inner

        def get_output_embeddings(self):
            return self.head

    def loss(rows, head, step):
        return ((rows[step % 7] + rows[2]).tanh() @ head.T).logsumexp(0)

    model = Model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    RowRate(model, ids, 5.0).on_train_begin(None, None, None, optimizer=optimizer)
    matrices = [start] if tied else [start, head_start]
    others = [torch.nn.Parameter(m.clone()) for m in matrices]
    ours = [torch.nn.Parameter(m[ids].clone()) for m in matrices]
    reference = torch.optim.AdamW([{"params": others}, {"params": ours, "lr": 5e-2}], lr=1e-2, weight_decay=0.1)
    for step in range(20):
        optimizer.zero_grad()
        loss(model.inner.weight, model.head.weight, step).backward()
        optimizer.step()
        whole = [other.index_copy(0, torch.tensor(ids), own) for other, own in zip(others, ours, strict=True)]
        reference.zero_grad()
        loss(whole[0], whole[-1], step).backward()
        reference.step()
    whole = [other.index_copy(0, torch.tensor(ids), own) for other, own in zip(others, ours, strict=True)]
    assert torch.allclose(model.inner.weight, whole[0], atol=1e-5)
    assert torch.allclose(model.head.weight, whole[-1], atol=1e-5)


def test_training_gives_the_new_rows_their_rate(tmp_path):
    """With a rate that moves nothing but the rows of the item tokens."""
    make_model("smollm", tmp_path / "base")
    write_drawn_dataset(tmp_path / "data")
    rates = ["--learning_rate", "1e-9", "--new_rows_learning_rate", "1e-2", "--init_item_tokens", "words"]
    finetune.main(flags(tmp_path, *one_task(*rates, "--epochs", "1")))
    data = load_data(str(tmp_path / "data"), "Toy")
    prepare_base(str(tmp_path / "base"), tmp_path / "ready", data.item_tokens, 42, start=("words", data))
    before = load_model(tmp_path / "ready", torch.float32).get_input_embeddings().weight
    after = load_model(tmp_path / "out", torch.float32).get_input_embeddings().weight
    ids = load_tokenizer(tmp_path / "out").convert_tokens_to_ids(data.item_tokens)
    moved = (after - before).abs().amax(1)
    assert bool((moved[ids] > 1e-3).all()) and moved[: min(ids)].max() < 1e-6


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (["--init_item_tokens", "nowhere.npy"], "nowhere.npy: no such file"),
        (["--new_rows_learning_rate", "1e-3", "--lora"], "goes with whole weights and --deepspeed none alone"),
        (["--new_rows_learning_rate", "0"], "a number above 0"),
    ],
)
def test_what_does_not_fit_is_one_line(more, told, tmp_path):
    with pytest.raises(UserError, match=told):
        finetune.parse(flags(tmp_path, *one_task(*more)))
