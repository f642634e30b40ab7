"""The fourth part of the table of `test_abuse.py`: the same kinds of abuse with other values."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import torch
from abuse_check import Abuse, Break, both, copy, edit, folder, link, pipe, put, remove, write

CONFIG, WEIGHTS, TOKENIZER, SETTINGS = (
    f"run/{name}" for name in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
)
ADAPTER, INDEX = "adapter/adapter_config.json", "run/model.safetensors.index.json"
CODE = dict.fromkeys(("AutoConfig", "AutoModelForCausalLM", "AutoProcessor"), "evil.C")
EVIL = write("run/evil.py", "raise SystemExit('code was run')\n")
TRILLION = str(10**12)


def _model(name: str, told: str | None, *broken: Break) -> Abuse:
    return Abuse(name, "test", told, both(*broken))


def _header(content: Any) -> bytes:
    raw = content if isinstance(content, bytes) else json.dumps(content).encode()
    return struct.pack("<Q", len(raw)) + raw + bytes(16)


def _tensor(shape: list[int]) -> dict[str, Any]:
    return {"dtype": "F32", "shape": shape, "data_offsets": [0, 16]}


def _tokens(change: Any) -> Break:
    """`change` is given each item token of tokenizer.json."""
    return edit(TOKENIZER, lambda c: [change(t) for t in c["added_tokens"] if t["content"].startswith("<a_")])


def _template(**changes: Any) -> Break:
    return edit(TOKENIZER, lambda content: content.update(changes))


NOTHING = {"type": "TemplateProcessing", "single": [], "pair": [], "special_tokens": {}}
SPLIT = {"type": "Split", "pattern": {"Regex": "("}, "behavior": "Isolated", "invert": False}
MODELS = [
    _model("code for generation's settings", None, EVIL, put("run/generation_config.json", "auto_map", value=CODE)),
    _model("code for a processor", None, EVIL, write("run/processor_config.json", {"auto_map": CODE})),
    _model("code in a part of the configuration", "run", EVIL, put(CONFIG, "text_config", value={"auto_map": CODE})),
    _model(
        "a template that looks for Python", None, put(SETTINGS, "chat_template", value="{{ ''.__class__.__mro__ }}")
    ),
    _model("attention from the hub", "evil/kernel.*is code", put(CONFIG, "attn_implementation", value="evil/kernel")),
    _model("experts from the hub", "evil/kernel.*is code", put(CONFIG, "experts_implementation", value="evil/kernel")),
    _model("weights beside the folder", "run", copy(WEIGHTS, "x"), put(CONFIG, "transformers_weights", value="../x")),
    _model(
        "other weights", "run", copy("base/model.safetensors", "run/x"), put(CONFIG, "transformers_weights", value="x")
    ),
    _model(
        "weights to quantise", "quantization_config", put(CONFIG, "quantization_config", value={"load_in_4bit": True})
    ),
    _model("a model and an adapter", "holds a model and an adapter", copy(ADAPTER, "run/adapter_config.json")),
    *(
        _model(f"{key} is {value!r}", "run|finite", put(CONFIG, key, value=value))
        for key, value in (
            ("num_hidden_layers", "2"),
            ("num_hidden_layers", 1.5),
            ("num_hidden_layers", -1),
            ("num_hidden_layers", float("nan")),
            ("vocab_size", -1),
            ("vocab_size", 10**9),
            ("max_position_embeddings", None),
            ("num_attention_heads", -4),
            ("num_key_value_heads", 3),
            ("head_dim", 10**9),
            ("rms_norm_eps", float("nan")),
            ("rope_parameters", {"rope_type": "nothing", "rope_theta": 1e4}),
            ("rope_parameters", {"rope_type": "default", "rope_theta": float("nan")}),
            ("rope_parameters", {"rope_type": "yarn", "rope_theta": 1e4}),
            ("quantization_config", [1]),
        )
    ),
    *(
        _model(f"a header with {name}", "run/model.safetensors", write(WEIGHTS, _header(content)))
        for name, content in (
            ("a list", []),
            ("a shape below 0", {"a": _tensor([-1, 4])}),
            ("a shape beyond all memory", {"a": _tensor([2**62, 2**62])}),
            ("two tensors in one place", {"a": _tensor([4]), "b": _tensor([4])}),
            ("100,000 lists", b"[" * 100_000),
        )
    ),
    *(
        _model(f"an index of weights {name}", "run", remove(WEIGHTS), write(INDEX, content))
        for name, content in (
            ("that is empty", {"weight_map": {}}),
            ("of a file that is missing", {"metadata": None, "weight_map": {"a": "model-00001-of-00002.safetensors"}}),
            ("that names a file of the system", {"weight_map": {"a": "/etc/passwd"}}),
            ("without names", {"weight_map": {"a": ""}}),
        )
    ),
    *(
        _model(
            f"a .bin with {name}",
            "run",
            remove(WEIGHTS),
            lambda w, c=content: torch.save(c, w / "run/pytorch_model.bin"),
        )
        for name, content in (
            ("a list", [torch.ones(2)]),
            ("a dictionary in it", {"lm_head.weight": {"x": torch.ones(2)}}),
        )
    ),
    _model(
        "item tokens with other ids", "gives <a_0> the id", _tokens(lambda token: token.update(id=token["id"] + 1000))
    ),
    _model(
        "item tokens with one id", "gives <a_. the id|gives <a_.> the id", _tokens(lambda token: token.update(id=5))
    ),
    _model("item tokens below 0", "gives <a_.> the id", _tokens(lambda token: token.update(id=-5))),
    _model("a tokenizer that makes nothing of a text", "makes nothing", _template(post_processor=NOTHING)),
    _model("a pattern that is none", "no tokenizer", _template(pre_tokenizer=SPLIT)),
    _model("a vocabulary that is a list", "no tokenizer", edit(TOKENIZER, lambda c: c["model"].update(vocab=[1]))),
    _model(
        "an end token that the model has not", "has .* tokens, the model", put(SETTINGS, "eos_token", value="<none>")
    ),
    _model("an end token that is a number", "no tokenizer", put(SETTINGS, "eos_token", value=5)),
    _model("another file of the tokenizer's", None, put(SETTINGS, "tokenizer_file", value="/dev/zero")),
    _model(
        "files of the tokenizer's that lead out",
        "no tokenizer",
        put(SETTINGS, "fast_tokenizer_files", value=["tokenizer.1/../../x.json"]),
    ),
    _model("a template in a pipe", "x.jinja: is not a regular", pipe("run/additional_chat_templates/x.jinja")),
]

ADAPTERS = [
    Abuse(f"{key} of the adapter is {value!r}", "test --lora", "adapter", put(ADAPTER, key, value=value))
    for key, value in (
        ("r", True),
        ("r", 1.5),
        ("r", float("nan")),
        ("r", 10**9),
        ("lora_alpha", float("inf")),
        ("lora_dropout", 5),
        ("lora_dropout", "x"),
        ("rank_pattern", {"(": 2}),
        ("rank_pattern", {"q_proj": 10**9}),
        ("alpha_pattern", [1]),
        ("layers_to_transform", [99]),
        ("layers_to_transform", "x"),
        ("layers_pattern", "("),
        ("modules_to_save", ["("]),
        ("modules_to_save", 5),
        ("trainable_token_indices", [10**9]),
        ("trainable_token_indices", {"x": [1]}),
        ("exclude_modules", "("),
        ("task_type", "NOTHING"),
        ("use_dora", True),
        ("init_lora_weights", "pissa"),
        ("target_modules", []),
        ("target_modules", None),
        ("megatron_config", {"x": 1}),
    )
] + [
    Abuse(
        f"a base that is {name}",
        "test",
        "is a LoRA adapter|too long|etc/config.json",
        put(ADAPTER, "base_model_name_or_path", value=name),
        ("--ckpt_path", "{w}/adapter"),
    )
    for name in ("evil/base", "../../../etc", "/dev/zero", "x" * 5000, "a\0b")
]


# ---- runs ----


def _cut_off(world: Path) -> None:
    """The run was killed before its last checkpoint."""
    remove("run/checkpoint-8")(world)
    for name in ("config.json", "model.safetensors"):
        remove(f"run/{name}")(world)


def _saved(name: str, change: Any) -> Break:
    """`change` is given what torch loads from the file, and returns what is saved instead."""

    def broken(world: Path) -> None:
        path = world / "run/checkpoint-4" / name
        torch.save(change(torch.load(path, weights_only=False)), path)

    return broken


def _state(**changes: Any) -> Break:
    return edit("run/checkpoint-4/trainer_state.json", lambda content: content.update(changes))


def _resumed(name: str, told: str, broken: Break) -> Abuse:
    return Abuse(name, "resume", told, both(_cut_off, broken))


RUNS = [
    _resumed("an optimiser that is {}", "its optimiser or schedule cannot", _saved("optimizer.pt", lambda _: {})),
    _resumed(
        "an optimiser that is a tensor",
        "its optimiser or schedule cannot",
        _saved("optimizer.pt", lambda _: torch.ones(3)),
    ),
    _resumed(
        "an optimiser without moments", "no moments", _saved("optimizer.pt", lambda saved: {**saved, "state": {}})
    ),
    _resumed("a schedule that is {}", "its optimiser or schedule cannot", _saved("scheduler.pt", lambda _: {})),
    _resumed("a schedule that is 3", "its optimiser or schedule cannot", _saved("scheduler.pt", lambda _: 3)),
    _resumed("random states that are {}", "its random state cannot", _saved("rng_state.pth", lambda _: {})),
    _resumed(
        "a random state that is short",
        "its random state cannot",
        _saved("rng_state.pth", lambda saved: {**saved, "cpu": torch.ones(3, dtype=torch.uint8)}),
    ),
    *(
        _resumed(f"a state with {key} {value!r}", "holds a run already", _state(**{key: value}))
        for key, value in (
            ("epoch", "x"),
            ("best_metric", "x"),
            ("log_history", {}),
            ("train_batch_size", "x"),
            ("logging_steps", 0),
            ("max_steps", -1),
            ("total_flos", "x"),
            ("nonsense", 1),
        )
    ),
    *(
        Abuse(
            f"a run that says it wrote {name!r}",
            "replace",
            "'written' must be",
            put("run/run.json", "written", value=[name]),
        )
        for name in ("..", ".", "", "../toy", "/etc", 3, None)
    ),
    *(
        Abuse(
            f"{name} is {kind}",
            "finetune",
            r"is no folder that a run makes",
            broken(f"out/{name}"),
            ("--report_to", "tensorboard"),
        )
        for name in ("base_with_item_tokens", ".final", ".replaced", ".base_with_item_tokens.partial", "runs")
        for kind, broken in (("a pipe", pipe), ("a file", lambda path: write(path, b"x")))
    ),
    *(
        Abuse(
            f"{name} is a link to the data",
            "finetune",
            r"is no folder that a run makes",
            both(write("out/x", b""), link(f"out/{name}", "toy")),
        )
        for name in ("base_with_item_tokens", ".final", ".replaced", ".base_with_item_tokens.partial")
    ),
    Abuse("train.log is a pipe", "finetune", "train.log: is not a regular file", pipe("out/train.log")),
    Abuse("train.log is a folder", "finetune", "train.log: is a folder", folder("out/train.log")),
]


# ---- flags and places ----


def _flag(command: str, *words: str, told: str = "") -> Abuse:
    return Abuse(" ".join(words)[:80], command, told or rf"{words[0]}\b", flags=words)


FLAGS = [
    *(
        _flag("finetune", f"--{name}", value)
        for name, value in (
            ("learning_rate", "1e300"),
            ("new_rows_learning_rate", "1e300"),
            ("weight_decay", "1e300"),
            ("epochs", "1e300"),
            ("seed", "4294967296"),
            ("per_device_batch_size", TRILLION + "0"),
            ("train_prompt_sample_num", f"{TRILLION},1,1,1,1,1"),
            ("his_sep", "a\0b"),
            ("dataset", ".."),
            ("dataset", "toy/../toy"),
            ("base_model", "a/b/c"),
            ("deepspeed", "/dev/zero"),
            ("prompt_file", "/dev/stdin"),
            ("resume_from_checkpoint", "/dev/zero"),
        )
    ),
    _flag("finetune", "--base_model", "/dev/zero", told="/dev/zero: a file"),
    _flag("finetune", "--output_dir", "/dev/null"),
    _flag("finetune", "--output_dir", "/dev/null/x", told="/dev/null"),
    _flag("finetune", "--lora_r", TRILLION, "--lora"),
    _flag("finetune", "--lora_target_modules", "(", "--lora"),
    *(
        _flag("test", "--results_file", path, told="results|exists|is not|/dev/null|base/config|toy.inter")
        for path in (
            "{w}/base/config.json",
            "{w}/toy/toy.inter.json",
            "{w}/requests.jsonl",
            "/dev/null",
            "{w}/new/",
            "{w}/new/..",
        )
    ),
    _flag("test", "--restart", "--results_file", "{w}/toy/toy.item.json", told="toy.item.json"),
    _flag("test", "--metrics", f"hit@{TRILLION}"),
    _flag("test", "--index_file", ".inter.json", told="inter.json"),
    _flag("recommend", "--requests", "/dev/zero", told="not a regular file"),
    _flag("report", "--table_file", "{w}/results/r.json"),
    _flag("report", "--references", "/dev/zero", told="not a regular file"),
    _flag("report", "--results_file", "{w}/run/run.json", told="run.predictions.jsonl: no such"),
]
REFERENCE = {"model": "x", "source": "x", "command": "x"}
PLACES = [
    Abuse(
        "a table of others",
        "report",
        r"r\.table\.md: exists and is no table",
        write("results/r.table.md", "# My thesis\n"),
    ),
    Abuse("a table in a pipe", "report", r"r\.table\.md: is not a regular", pipe("results/r.table.md")),
    *(
        Abuse(
            f"a reference of {value!r:.9}",
            "report",
            "toy' has an entry",
            write("f.json", {"toy": [{**REFERENCE, "metrics": {"hit@5": value}}]}),
            ("--references", "{w}/f.json"),
        )
        for value in (10**400, float("nan"), float("inf"), "x", None)
    ),
    Abuse(
        "part of a test in a pipe",
        "test",
        r"part-00000\.jsonl: was not written by a test",
        pipe("new/r.partial/part-00000.jsonl"),
    ),
    Abuse(
        "part of a test in a folder",
        "test",
        r"config\.json: was not written by a test",
        folder("new/r.partial/config.json"),
    ),
    Abuse(
        "partial results behind a link",
        "test",
        r"toy/toy.*was not written|was not written by a test",
        both(write("new/x", b""), link("new/r.partial", "toy")),
    ),
    Abuse("another test's lock in a folder", "test", r"r\.json: cannot be made", folder("new/.r.json.lock")),
]
AGAIN = [*MODELS, *ADAPTERS, *RUNS, *FLAGS, *PLACES]
