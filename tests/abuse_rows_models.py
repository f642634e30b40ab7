"""The second part of the table of `test_abuse.py`: models, adapters, arrays, runs."""

from __future__ import annotations

import json

import numpy as np
import torch
from abuse_check import (
    Abuse,
    both,
    copy,
    cut,
    device,
    drop,
    edit,
    folder,
    json_rows,
    loop,
    pipe,
    put,
    remove,
    weights,
    write,
)

CONFIG, WEIGHTS, TOKENIZER = "run/config.json", "run/model.safetensors", "run/tokenizer.json"
ADAPTER, ADAPTED = "adapter/adapter_config.json", "adapter/adapter_model.safetensors"
CODE = {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.C", "AutoTokenizer": ["evil.C", None]}
EVIL = write("run/evil.py", "raise SystemExit('code was run')\n")


def _model(name: str, told: str | None, *broken) -> Abuse:
    return Abuse(name, "test", told, both(*broken))


def _each(function):
    """A change of every tensor."""

    def change(tensors):
        for name in tensors:
            tensors[name] = function(tensors[name])

    return change


def _without(part: str):
    def change(tensors):
        for name in [name for name in tensors if part in name]:
            del tensors[name]

    return change


def _nan(tensors):
    for tensor in tensors.values():
        tensor.fill_(float("nan"))


HEADER = (2**60).to_bytes(8, "little") + b"{}"
MODELS = [
    *json_rows("test", CONFIG, told="run"),
    *json_rows("test", "run/tokenizer_config.json", "missing", told="run"),
    *json_rows("test", TOKENIZER, "missing"),
    _model("tokenizer.json is missing", "tokenizer", remove(TOKENIZER)),
    *json_rows("test", "run/generation_config.json", "missing", told="run"),
    *json_rows("finetune", "base/config.json", "a key twice", told="base"),
    _model("config.json is {}", "run", write(CONFIG, {})),
    _model("an unknown model_type", "run", put(CONFIG, "model_type", value="nothing")),
    _model("another model_type", "run.*weights do not fit", put(CONFIG, "model_type", value="gpt2")),
    _model("a model_type that is a list", "run", put(CONFIG, "model_type", value=["llama"])),
    _model("fewer layers in config.json", "run.*weights do not fit", put(CONFIG, "num_hidden_layers", value=1)),
    _model("more layers in config.json", "run.*weights do not fit", put(CONFIG, "num_hidden_layers", value=3)),
    _model("a million layers in config.json", "run.*", put(CONFIG, "num_hidden_layers", value=10**6)),
    _model("another width in config.json", "run", put(CONFIG, "hidden_size", value=64)),
    _model("a width of 10^12", "run", put(CONFIG, "hidden_size", value=10**12)),
    _model("a width that is a text", "run", put(CONFIG, "hidden_size", value="32")),
    _model("no heads", "run", put(CONFIG, "num_attention_heads", value=0)),
    _model("another vocabulary in config.json", "run", put(CONFIG, "vocab_size", value=7)),
    _model("an unknown activation", "run", put(CONFIG, "hidden_act", value="nothing")),
    _model("a dtype that is none", "run", put(CONFIG, "dtype", value="nothing")),
    _model(
        "quantised weights that are not",
        "run",
        put(CONFIG, "quantization_config", value={"quant_method": "gptq", "bits": 4}),
    ),
    _model(
        "code for the configuration",
        "run",
        EVIL,
        put(CONFIG, "auto_map", value=CODE),
        put(CONFIG, "model_type", value="evil"),
    ),
    _model(
        "code for the tokenizer",
        "run",
        EVIL,
        put("run/tokenizer_config.json", "auto_map", value=CODE),
        put("run/tokenizer_config.json", "tokenizer_class", value="C"),
    ),
    _model("code that a known model does not need", None, EVIL, put(CONFIG, "auto_map", value=CODE)),
    _model("code for generation", None, write("run/custom_generate/generate.py", "raise SystemExit('code was run')")),
    _model("model.safetensors is missing", "run", remove(WEIGHTS)),
    _model("model.safetensors is empty", "run", write(WEIGHTS, b"")),
    _model("model.safetensors is cut", "run", cut(WEIGHTS)),
    _model("model.safetensors lacks its last byte", "run", cut(WEIGHTS, 0.9999)),
    _model("model.safetensors with a header of 2^60 bytes", "run", write(WEIGHTS, HEADER)),
    _model("model.safetensors is text", "run", write(WEIGHTS, "version https://git-lfs.github.com/spec/v1\n")),
    _model("model.safetensors is a folder", "run", folder(WEIGHTS)),
    _model("model.safetensors is a pipe", "run.*not a regular file", pipe(WEIGHTS)),
    _model("model.safetensors is a device", "run.*not a regular file", device(WEIGHTS)),
    _model("model.safetensors is a link to itself", "run", loop(WEIGHTS)),
    _model("a layer is missing", "run.*lack model.layers.1", weights(WEIGHTS, _without("layers.1."))),
    _model("the embedding is missing", "run.*lack model.embed", weights(WEIGHTS, _without("embed_tokens"))),
    _model("the head is missing", "run.*lack lm_head", weights(WEIGHTS, _without("lm_head"))),
    _model("a tensor more", "run.*have extra", weights(WEIGHTS, lambda t: t.update(extra=torch.ones(2)))),
    _model("no tensors", "run", weights(WEIGHTS, lambda t: t.clear())),
    _model(
        "tensors of another shape", "run", weights(WEIGHTS, lambda t: t.update({"model.norm.weight": torch.ones(3)}))
    ),
    _model("NaN for weights", "not finite", weights(WEIGHTS, _nan)),
    _model(
        "an index of weights that leaves the folder",
        "run",
        copy(WEIGHTS, "secret.safetensors"),
        remove(WEIGHTS),
        write(
            "run/model.safetensors.index.json",
            {"metadata": {}, "weight_map": {"lm_head.weight": "../secret.safetensors"}},
        ),
    ),
    _model("an index of weights that is a list", "run", remove(WEIGHTS), write("run/model.safetensors.index.json", [])),
    _model(
        "a .bin that is a pickle", "run", remove(WEIGHTS), write("run/pytorch_model.bin", b"cos\nsystem\n(S'true'\ntR.")
    ),
    _model("a .bin that is cut", "run", remove(WEIGHTS), write("run/pytorch_model.bin", b"PK\x03\x04")),
    _model("tokenizer.json is {}", "run", write(TOKENIZER, {})),
    _model(
        "the base's tokenizer",
        "lacks .* item tokens",
        copy("base/tokenizer.json", TOKENIZER),
        copy("base/tokenizer_config.json", "run/tokenizer_config.json"),
    ),
    _model("a model folder without anything", "holds no model", remove("run"), write("run/x", b"")),
    _model("a file for the model's folder", "run", remove("run"), write("run", b"")),
    Abuse("no such checkpoint", "test", "nowhere: no such folder", flags=("--ckpt_path", "nowhere")),
    Abuse("a checkpoint's path with NUL", "test", "", flags=("--ckpt_path", "a\0b")),
    Abuse(
        "an adapter whose base is gone",
        "test",
        "is a LoRA adapter",
        put(ADAPTER, "base_model_name_or_path", value="./gone"),
        flags=("--ckpt_path", "{w}/adapter"),
    ),
    Abuse("--lora without an adapter", "test", "no LoRA adapter", flags=("--lora", "--base_model", "{w}/base")),
    Abuse(
        "code for the base",
        "finetune",
        "base",
        both(
            write("base/evil.py", "1 / 0"),
            put("base/config.json", "auto_map", value=CODE),
            put("base/config.json", "model_type", value="evil"),
        ),
    ),
    Abuse("no base", "finetune", "--base_model", flags=("--base_model", "{w}/nowhere")),
    Abuse("a file for the base", "finetune", "base", both(remove("base"), write("base", b""))),
    Abuse(
        "a layer of the base is missing",
        "finetune",
        "base.*lack model.layers.1",
        weights("base/model.safetensors", _without("layers.1.")),
    ),
    Abuse("the base is cut", "finetune", "base", cut("base/model.safetensors")),
    Abuse("a pipe for the base's weights", "finetune", "base.*not a regular file", pipe("base/model.safetensors")),
]


def _adapter(name: str, told: str | None, *broken) -> Abuse:
    return Abuse(name, "test --lora", told, both(*broken))


ADAPTERS = [
    *json_rows("test --lora", ADAPTER, "missing", told="adapter"),
    _adapter("adapter_config.json is missing", "no LoRA adapter", remove(ADAPTER), write("adapter/config.json", {})),
    _adapter("adapter_config.json is {}", "adapter", write(ADAPTER, {})),
    _adapter("an unknown peft_type", "adapter", put(ADAPTER, "peft_type", value="NOTHING")),
    _adapter("an adapter that is none of LoRA", "adapter", put(ADAPTER, "peft_type", value="PROMPT_TUNING")),
    _adapter("another rank", "adapter", put(ADAPTER, "r", value=3)),
    _adapter("rank 0", "adapter", put(ADAPTER, "r", value=0)),
    _adapter("a rank that is a text", "adapter", put(ADAPTER, "r", value="2")),
    _adapter("unknown modules", "adapter", put(ADAPTER, "target_modules", value=["nothing"])),
    _adapter("fewer modules", "adapter", put(ADAPTER, "target_modules", value=["q_proj"])),
    _adapter("a pattern without end for modules", "adapter", put(ADAPTER, "target_modules", value="(")),
    _adapter("a bias that is none", "adapter", put(ADAPTER, "bias", value="nothing")),
    _adapter(
        "a library to import",
        None,
        put(ADAPTER, "auto_mapping", value={"base_model_class": "C", "parent_library": "evil"}),
    ),
    _adapter("no weights", "adapter", remove(ADAPTED)),
    _adapter("weights that are cut", "adapter", cut(ADAPTED)),
    _adapter("weights that are empty", "adapter", write(ADAPTED, b"")),
    _adapter("weights that are a folder", "adapter", folder(ADAPTED)),
    _adapter("weights that are a pipe", "adapter.*not a regular file", pipe(ADAPTED)),
    _adapter("weights without tensors", "adapter", weights(ADAPTED, lambda t: t.clear())),
    _adapter("weights without one layer", "adapter.*lack", weights(ADAPTED, _without("layers.1."))),
    _adapter("weights without the embedding", "adapter.*lack", weights(ADAPTED, _without("embed_tokens"))),
    _adapter("weights with a tensor more", "adapter.*extra", weights(ADAPTED, lambda t: t.update(extra=torch.ones(2)))),
    _adapter("weights of another shape", "adapter", weights(ADAPTED, _each(lambda t: torch.ones(3, 3)))),
    _adapter("weights that are NaN", "NaN or inf", weights(ADAPTED, _nan)),
    _adapter(
        "weights in a pickle",
        "adapter",
        remove(ADAPTED),
        write("adapter/adapter_model.bin", b"cos\nsystem\n(S'true'\ntR."),
    ),
    _adapter(
        "another base",
        "adapter",
        put("base/config.json", "num_hidden_layers", value=1),
        weights("base/model.safetensors", _without("layers.1.")),
    ),
    Abuse("no base", "test --lora", "--base_model", flags=("--base_model", "{w}/nowhere")),
]

# ---- arrays, DeepSpeed, runs ----


def _npy(array: np.ndarray, pickled: bool = False) -> bytes:
    import io

    file = io.BytesIO()
    np.save(file, array, allow_pickle=pickled)
    return file.getvalue()


def _array(name: str, told: str, broken) -> Abuse:
    return Abuse(
        f"item embeddings: {name}",
        "finetune",
        rf"--init_item_tokens.*items\.npy.*{told}",
        broken,
        ("--init_item_tokens", "{w}/items.npy"),
    )


NAN = np.ones((30, 8), np.float32)
NAN[3, 3] = np.nan
ARRAYS = [
    _array("missing", "", remove("items.npy")),
    _array("a folder", "", folder("items.npy")),
    _array("a pipe", "not a regular file", pipe("items.npy")),
    _array("a device", "not a regular file", device("items.npy")),
    _array("a loop", "", loop("items.npy")),
    _array("empty", "", write("items.npy", b"")),
    _array("cut", "", cut("items.npy")),
    _array("an archive", "", write("items.npy", b"PK\x03\x04" + b"\0" * 50)),
    _array("objects", "", write("items.npy", _npy(np.array([{}] * 30), pickled=True))),
    _array("NaN", "finite", write("items.npy", _npy(NAN))),
    _array("too few rows", r"shape \(29, 8\)", write("items.npy", _npy(NAN[1:]))),
    _array("one dimension", r"shape \(30,\)", write("items.npy", _npy(NAN[:, 0]))),
    _array("no columns", r"shape \(30, 0\)", write("items.npy", _npy(NAN[:, :0]))),
    _array("texts", "", write("items.npy", _npy(np.array([["x"]] * 30)))),
    _array("complex numbers", "", write("items.npy", _npy(NAN.astype(complex)))),
    _array("float64 beyond float32", "finite", write("items.npy", _npy(np.full((30, 8), 1e300)))),
    _array(
        "a shape that no memory holds",
        "",
        write(
            "items.npy",
            b"\x93NUMPY\x01\x00v\x00{'descr': '<f4', 'fortran_order': False, 'shape': (999999999999, 999), }".ljust(127)
            + b"\n",
        ),
    ),
]


def _deepspeed(name: str, told: str, content: object, *flags: str) -> Abuse:
    raw = content if isinstance(content, bytes) else json.dumps(content).encode()
    return Abuse(
        f"DeepSpeed: {name}",
        "finetune",
        rf"deepspeed\.json.*{told}",
        write("deepspeed.json", raw),
        ("--deepspeed", "{w}/deepspeed.json", *flags),
    )


DEEPSPEED = [
    *json_rows("finetune", "deepspeed.json", flags=("--deepspeed", "{w}/deepspeed.json")),
    _deepspeed("stage 7", "zero_optimization.stage", {"zero_optimization": {"stage": 7}}),
    _deepspeed("stage '3'", "zero_optimization.stage", {"zero_optimization": {"stage": "3"}}),
    _deepspeed("stage true", "zero_optimization.stage", {"zero_optimization": {"stage": True}}),
    _deepspeed("no object for ZeRO", "zero_optimization", {"zero_optimization": [3]}),
    _deepspeed(
        "a bucket that is a text",
        "reduce_bucket_size",
        {"zero_optimization": {"stage": 2, "reduce_bucket_size": "big"}},
    ),
    _deepspeed("a bucket below 0", "reduce_bucket_size", {"zero_optimization": {"stage": 2, "reduce_bucket_size": -1}}),
    _deepspeed("a micro batch of 3", "train_micro_batch_size_per_gpu", {"train_micro_batch_size_per_gpu": 3}),
    _deepspeed(
        "a micro batch that is a list", "train_micro_batch_size_per_gpu", {"train_micro_batch_size_per_gpu": [8]}
    ),
    _deepspeed("other accumulation", "gradient_accumulation_steps", {"gradient_accumulation_steps": 4}),
    _deepspeed("another batch", "train_batch_size", {"train_batch_size": 7}),
    _deepspeed("clipping that is a text", "gradient_clipping", {"gradient_clipping": "much"}),
    _deepspeed("float16 with --bf16", "fp16", {"fp16": {"enabled": True}}, "--bf16"),
    _deepspeed("bfloat16 without --bf16", "bf16", {"bf16": {"enabled": True}}),
    _deepspeed("precision that is no object", "bf16", {"bf16": True}),
    _deepspeed("an optimiser of its own", "optimizer", {"optimizer": {"type": "Adam"}}),
    _deepspeed(
        "a key that DeepSpeed does not know", "reduce_bucket", {"zero_optimization": {"stage": 2, "reduce_bucket": 3}}
    ),
]
RUNS = [
    *json_rows("resume", "run/run.json", "missing"),
    Abuse("run.json without arguments", "resume", r"run\.json: is no record", drop("run/run.json", "arguments")),
    Abuse("run.json with files in a list", "resume", r"run\.json", put("run/run.json", "files", value=[])),
    Abuse(
        "run.json with files without hash",
        "resume",
        r"run\.json: 'files'",
        put("run/run.json", "files", value={"inter": {"path": "x"}}),
    ),
    Abuse("another learning rate", "resume", "--learning_rate is", flags=("--learning_rate", "0.5")),
    Abuse("other data", "resume", "has changed since", edit("toy/toy.item.json", lambda c: c["1"].update(title="new"))),
    Abuse(
        "other weights of the base",
        "resume",
        "not the model that the run began with",
        weights("base/model.safetensors", _each(lambda t: t * 2)),
    ),
    Abuse(
        "a checkpoint that is none",
        "finetune",
        "neither a complete checkpoint",
        flags=("--resume_from_checkpoint", "{w}/base"),
    ),
    Abuse(
        "a checkpoint that is nowhere",
        "finetune",
        "neither a complete checkpoint",
        flags=("--resume_from_checkpoint", "{w}/nowhere"),
    ),
    Abuse("another run replaced, with an unknown tracker", "replace", "--report_to", flags=("--report_to", "nothing")),
    Abuse("another run replaced, with an optimiser that is not there", "replace", "--optim", flags=("--optim", "lomo")),
    Abuse(
        "another run replaced, with a tracker that is not there",
        "replace",
        "--report_to",
        flags=("--report_to", "comet_ml"),
    ),
    Abuse(
        "another run replaced, with DeepSpeed's wrong file",
        "replace",
        "deepspeed.json",
        write("deepspeed.json", b"[]"),
        ("--deepspeed", "{w}/deepspeed.json"),
    ),
    Abuse("another run replaced, with a broken base", "replace", "base", cut("base/model.safetensors")),
    Abuse("another run replaced, that has no record", "replace", r"no run\.json", remove("run/run.json")),
    Abuse("another run replaced, that has a broken record", "replace", r"run\.json", write("run/run.json", b"{")),
]
