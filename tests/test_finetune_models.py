"""Any causal LM: new rows, old rows, ties, tokens; and the same losses as a plain Trainer on a collation by hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_models import ARCHITECTURES, make_model
from toy_data import write_drawn_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

import finetune
from arguments import style_flags
from collator import TrainCollator, encode_samples
from data import USER_PARTS, load_data
from modeling import add_item_tokens, grow_vocabulary, item_trie, load_model, load_tokenizer
from prompt import load_prompts
from prompt_style import PromptStyle
from samples import TaskValidSet, ValidSet
from tasks import HistoryFormat
from utils import UserError

_SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
ITEM_TOKENS = sorted({f"<a_{i}>" for i in range(5)} | {f"<b_{i}>" for i in range(6)} | {f"<c_{i}>" for i in range(3)})


def flags(folder: Path, *more: str, out: str = "out") -> list[str]:
    own = ["--base_model", str(folder / "base"), "--output_dir", str(folder / out), "--dataset", "Toy"]
    own += ["--data_path", str(folder / "data"), "--deepspeed", "none", "--report_to", "none", "--weight_decay", "0"]
    own += ["--per_device_batch_size", "3", "--logging_step", "1", "--learning_rate", "1e-3", "--epochs", "1"]
    return [*own, "--train_data_sample_num", "6,3,3,4,2,2", "--valid_prompt_sample_num", "1", *more]


def prepared(folder: Path) -> tuple[torch.nn.Module, list[int]]:
    """The model as training begins, and the ids of the item tokens."""
    model, tokenizer = load_model(folder / "base"), load_tokenizer(folder / "base")
    ids = add_item_tokens(tokenizer, ITEM_TOKENS)
    torch.manual_seed(42)
    grow_vocabulary(model, tokenizer, ids)
    return model, ids


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture_trains_and_reloads(name, tmp_path):
    make_model(name, tmp_path / "base")
    write_drawn_dataset(tmp_path / "data")
    options = flags(tmp_path, "--only_train_response", *(["--packing"] if name != "qwen2" else []))
    finetune.main(options)
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(tmp_path / "out"),
        AutoTokenizer.from_pretrained(tmp_path / "out"),
    )
    config, kind, spare = ARCHITECTURES[name]
    before, ids = prepared(tmp_path)

    assert tokenizer.convert_tokens_to_ids(ITEM_TOKENS) == ids
    rows = model.get_input_embeddings().weight
    base_rows = load_model(tmp_path / "base").get_input_embeddings().weight.shape[0]
    assert len(rows) == max(len(tokenizer), base_rows) and len(rows) == model.config.get_text_config().vocab_size
    tied = config.tie_word_embeddings
    assert (model.get_input_embeddings().weight is model.get_output_embeddings().weight) == tied

    # every item token occurs in the training data, as target or in a history
    moved = (rows - before.get_input_embeddings().weight).abs().amax(1) > 0
    assert bool(moved[ids].all())
    if not tied:  # a row without a gradient stays as it was; the head's rows all move, through the softmax
        run_tokens = used_tokens(tmp_path, options)
        untouched = sorted(set(range(len(rows))) - run_tokens)
        assert untouched and not bool(moved[untouched].any())

    index = "".join(ITEM_TOKENS[i] for i in (0, 5, 11))
    for before_text, after_text in (("", ""), ("I saw ", " yesterday"), ("Response:", ""), ("x", ", "), ("\n", "\n")):
        encoded = tokenizer(before_text + index + after_text, add_special_tokens=False)["input_ids"]
        wanted = [ids[i] for i in (0, 5, 11)]
        assert any(encoded[i : i + 3] == wanted for i in range(len(encoded))), (before_text, encoded)
        assert sum(token in ids for token in encoded) == 3


def used_tokens(folder: Path, options: list[str]) -> set[int]:
    """All tokens of the training samples of an epoch."""
    args = finetune.parse(options)
    _, train_set, _ = finetune.load_datasets(args, PromptStyle.of_flags(**style_flags(args)))
    tokenizer = load_tokenizer(folder / "out")
    samples = [train_set[i] for i in range(len(train_set))]
    rows, _ = encode_samples(tokenizer, [s["prompt"] for s in samples], [s["response"] for s in samples], 2048)
    return {token for row in rows for token in row} | {tokenizer.pad_token_id, 0}


@pytest.mark.parametrize("legacy", [True, False])
def test_text_after_an_item_token_is_cut_as_the_tokenizers_files_say(tmp_path, legacy):
    from data_process import base_model
    from modeling import prepare_base

    base_model.train_tokenizer(iter(["The red pen, the blue pen. Next"] * 40), tmp_path / "base", 300)
    settings = json.loads((tmp_path / "base" / "tokenizer_config.json").read_text())
    (tmp_path / "base" / "tokenizer_config.json").write_text(json.dumps(settings | {"legacy": legacy}))
    size = len(load_tokenizer(tmp_path / "base"))
    AutoModelForCausalLM.from_config(type(ARCHITECTURES["llama"][0])(**_SIZES, vocab_size=size)).save_pretrained(
        tmp_path / "base"
    )
    prepare_base(str(tmp_path / "base"), tmp_path / "ready", ITEM_TOKENS, 42)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "ready")  # what is trained with and saved
    rows, _ = encode_samples(tokenizer, ["red pen <a_1><b_2>, <a_0> Next"], ["<a_2>"], 99)
    tokens = tokenizer.convert_ids_to_tokens(rows[0])
    after = tokens.index("<b_2>") + 1
    assert tokens[after : after + 2] == (["▁", ","] if legacy else [",", "▁"])
    assert tokens[-2:] == ["<a_2>", "</s>"] and tokens[0] == "<s>"


@pytest.mark.parametrize("only_response", [True, False])
def test_losses_over_all_tokens_are_those_of_a_plain_trainer_on_a_collation_by_hand(tmp_path, only_response):
    from transformers import Trainer

    make_model("llama", tmp_path / "base")
    write_drawn_dataset(tmp_path / "data")
    more = ["--max_steps", "20", "--epochs", "9", "--learning_rate", "3e-3", "--loss_average", "token"]
    more += ["--only_train_response"] * only_response
    padded = finetune.prepare(finetune.parse(flags(tmp_path, *more, out="padded")))
    packed = finetune.prepare(finetune.parse(flags(tmp_path, *more, "--packing", out="packed")))
    theirs = finetune.prepare(finetune.parse(flags(tmp_path, *more, out="theirs")))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "base")
    tokenizer.add_tokens(ITEM_TOKENS)

    def collate(samples: list[dict]) -> dict[str, torch.Tensor]:
        rows = []
        for sample in samples:
            tokens = tokenizer(sample["prompt"] + sample["response"])["input_ids"] + [tokenizer.eos_token_id]
            shown = len(tokenizer(sample["prompt"])["input_ids"])
            rows.append((tokens, [-100] * shown + tokens[shown:] if only_response else list(tokens)))
        width = max(len(tokens) for tokens, _ in rows)
        return {
            "input_ids": torch.tensor([t + [0] * (width - len(t)) for t, _ in rows]),
            "attention_mask": torch.tensor([[1] * len(t) + [0] * (width - len(t)) for t, _ in rows]),
            "labels": torch.tensor([k + [-100] * (width - len(k)) for _, k in rows]),
        }

    theirs.training.eval_strategy, theirs.training.load_best_model_at_end = "no", False
    plain = Trainer(theirs.model, theirs.training, data_collator=collate, train_dataset=theirs.train_set)
    for trainer in (padded.trainer, packed.trainer, plain):
        trainer.train()
    one, two, other = (
        [row for row in t.state.log_history if "loss" in row] for t in (padded.trainer, packed.trainer, plain)
    )
    assert len(one) == len(two) == len(other) == 20
    for ours in (one, two):
        for mine, wanted in zip(ours, other, strict=True):
            assert mine["loss"] == pytest.approx(wanted["loss"], rel=2e-4)
            assert mine["grad_norm"] == pytest.approx(wanted["grad_norm"], rel=1e-2)
    assert one[-1]["loss"] < one[0]["loss"]


@pytest.mark.slow
def test_a_pretrained_model_from_gguf_goes_on_from_what_it_knows(tmp_path, smollm2_folder):
    """SmolLM2-135M, dequantised: tied embeddings, no BOS, real weights."""
    (tmp_path / "base").symlink_to(smollm2_folder)
    write_drawn_dataset(tmp_path / "data")
    more = ["--tasks", "index2item", "--train_prompt_sample_num", "1", "--train_data_sample_num", "3", "--packing"]
    more += ["--only_train_response", "--learning_rate", "1e-4", "--gradient_accumulation_steps", "1"]
    more += ["--per_device_batch_size", "1"]
    before, ids = prepared(tmp_path)
    run = finetune.prepare(finetune.parse([*flags(tmp_path, *more), "--save_and_eval_strategy", "steps"]))
    samples = [run.train_set[i] for i in range(3)]
    at_first = loss_by_hand(run.model.eval(), run.tokenizer, samples)
    assert at_first < 8  # English costs a model that knows nothing ln(49,000) = 10.8 a token
    run.trainer.train()
    assert run.trainer.state.global_step == 3
    assert loss_by_hand(run.model.eval(), run.tokenizer, samples) < at_first
    finetune.save_final(run)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert len(ids) == 14 and tokenizer.convert_tokens_to_ids(ITEM_TOKENS) == ids == list(range(49152, 49166))
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    moved = (model.get_input_embeddings().weight - before.get_input_embeddings().weight.float()).abs().amax(1)
    assert len(moved) == 49166 and bool((moved[ids] > 0).all())
    index = "".join(ITEM_TOKENS[i] for i in (0, 5, 11))
    assert tokenizer(index, add_special_tokens=False)["input_ids"] == [ids[i] for i in (0, 5, 11)]


def loss_by_hand(model: torch.nn.Module, tokenizer: object, samples: list[dict]) -> float:
    """Mean loss over the responses' tokens, each sample alone through the plain model."""
    total = count = 0.0
    for sample in samples:
        shown = len(tokenizer(sample["prompt"])["input_ids"])
        whole = tokenizer(sample["prompt"] + sample["response"])["input_ids"] + [tokenizer.eos_token_id]
        labels = [-100] * shown + whole[shown:]
        with torch.no_grad():
            loss = model(torch.tensor([whole]), labels=torch.tensor([labels])).loss.item()
        total, count = total + loss * (len(whole) - shown), count + len(whole) - shown
    return total / count


def test_validation_samples_of_tasks_stop_before_the_test_target(tmp_path):
    write_drawn_dataset(tmp_path / "data")
    data = load_data(str(tmp_path / "data"), "Toy", user_parts=USER_PARTS)
    names = ["fusionseqrec", "preferenceobtain", "itemsearch", "index2item"]
    form = HistoryFormat(max_his_len=-1)
    samples = TaskValidSet(data, load_prompts(), names, form, count=10)
    assert samples.counts() == dict.fromkeys(names, 10)
    again = TaskValidSet(data, load_prompts(), names, form, count=10)
    assert [samples[i] for i in range(40)] == [again[i] for i in range(40)]
    users = list(data.inters)
    for number in range(10):  # the history shown is all that precedes the validation target
        fusion, preference = samples[number], samples[10 + number]
        items = data.inters[users[samples.rows[0][number][0]]]
        shown = {data.index_text(i) in fusion["prompt"] or data.titles[i] in fusion["prompt"] for i in items[:-2]}
        assert shown == {True} and data.index_text(items[-1]) not in fusion["prompt"] + fusion["response"]
        answers = (data.index_text(items[-2]), data.titles[items[-2]], data.descriptions[items[-2]])
        assert fusion["response"].strip() in answers
        items = data.inters[users[samples.rows[1][number][0]]]
        assert [data.index_text(i) in preference["prompt"] for i in items[-3:]] == [True, False, False]


def test_loss_by_task_and_validation_in_the_log(tmp_path):
    make_model("llama", tmp_path / "base")
    write_drawn_dataset(tmp_path / "data")
    more = ["--only_train_response", "--eval_ranking", "10", "--select_by", "ndcg@10", "--epochs", "3"]
    run = finetune.prepare(
        finetune.parse(flags(tmp_path, *more, "--report_to", "tensorboard", "--learning_rate", "3e-2"))
    )
    run.trainer.train()
    history = run.trainer.state.log_history
    lines = [row for row in history if "loss" in row]
    seen = {name for row in lines for name in row if name.startswith("loss_")}
    assert seen == {f"loss_{name}" for name in run.train_set.names}
    assert all(row["tokens_per_second"] > 0 and row["memory_gib"] > 0 for row in lines)
    evaluations = [row for row in history if "eval_loss" in row]
    assert len(evaluations) == 3
    assert all(0 <= row["eval_ndcg@10"] <= row["eval_hit@10"] <= 1 for row in evaluations)
    best = max(evaluations, key=lambda row: row["eval_ndcg@10"])
    assert run.trainer.state.best_metric == best["eval_ndcg@10"], "--select_by"
    assert Path(run.trainer.state.best_model_checkpoint).name == f"checkpoint-{best['step']}"
    curves = EventAccumulator(str(tmp_path / "out" / "runs")).Reload().Tags()["scalars"]
    wanted = {f"train/loss_{name}" for name in run.train_set.names} | {"train/tokens_per_second", "train/memory_gib"}
    wanted |= {f"eval/loss_{name}" for name in run.train_set.names} | {"eval/ndcg@10", "eval/loss", "train/loss"}
    assert wanted <= set(curves)
    # the weights of the best evaluation are loaded again at the end
    sets = {"seqrec": [run.valid_set[i] for i in range(len(run.valid_set))]}
    for sample in run.trainer.task_set:
        sets.setdefault(sample["task"], []).append(sample)
    assert set(sets) == set(run.train_set.names)
    run.model.eval()
    for name, samples in sets.items():
        assert best[f"eval_loss_{name}"] == pytest.approx(loss_by_hand(run.model, run.tokenizer, samples), rel=1e-4)
    assert best["eval_loss"] == best["eval_loss_seqrec"]
    log = (tmp_path / "out" / "train.log").read_text().splitlines()
    assert len(log) == len(lines) + 3
    json.dumps(history)


@pytest.mark.parametrize("ragged", [False, True])
def test_every_process_ranks_in_as_many_passes_as_the_others(tmp_path, monkeypatch, ragged):
    """Under ZeRO-3 a pass gathers weights from all: one process with a pass more would wait for the others for ever."""
    from valid_ranking import Ranking

    make_model("llama", tmp_path / "base")
    write_drawn_dataset(tmp_path / "data")
    if ragged:
        path = tmp_path / "data/Toy/Toy.index.json"
        index = json.loads(path.read_text())
        path.write_text(json.dumps(index | {i: row[:2] for i, row in index.items() if row[0] == "<a_1>"}))
    model, _ = prepared(tmp_path)
    tokenizer = load_tokenizer(tmp_path / "base")
    add_item_tokens(tokenizer, ITEM_TOKENS)
    data = load_data(str(tmp_path / "data"), "Toy")
    valid = ValidSet(data, load_prompts(None), HistoryFormat(), 42, prompt_num=1)
    ranking = Ranking(valid, tokenizer, 11, 4, seed=42, num_beams=4)  # 6 and 5 users: last calls of two and of one
    ranking(model.eval())  # the trial of the model's attention comes once, on every process
    passes = [0, 0]
    count = model.register_forward_hook(lambda *_: passes.__setitem__(rank, passes[rank] + 1))
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in (0, 1):
        monkeypatch.setenv("RANK", str(rank))
        ranking(model)
    count.remove()
    assert passes[0] == passes[1] > 0


def test_without_eos_samples_end_with_the_response_and_indices_end_by_themselves(tmp_path):
    make_model("llama", tmp_path / "base")
    write_drawn_dataset(tmp_path / "data")
    tokenizer = load_tokenizer(tmp_path / "base")
    add_item_tokens(tokenizer, ITEM_TOKENS)
    sample = {"prompt": "desk ", "response": "<a_1><b_0>", "task": "seqrec"}
    rows = [TrainCollator(tokenizer, no_eos=no_eos)([sample])["input_ids"][0].tolist() for no_eos in (False, True)]
    assert rows[0] == [*rows[1], tokenizer.eos_token_id]
    assert rows[1][-2:] == tokenizer.convert_tokens_to_ids(["<a_1>", "<b_0>"])

    assert item_trie(tokenizer, load_data(str(tmp_path / "data"), "Toy"), no_eos=True).eos is None
    path = tmp_path / "data/Toy/Toy.index.json"
    index = json.loads(path.read_text())
    path.write_text(json.dumps(index | {"16": index["1"][:2]}))
    with pytest.raises(UserError, match=r"Toy.index.json: .*beginning of another \(--no_eos\)$"):
        item_trie(tokenizer, load_data(str(tmp_path / "data"), "Toy"), no_eos=True)
