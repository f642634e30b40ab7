"""Models, adapters and arrays that people hand over. With `tokenising.load_tokenizer` the only place of the root that loads them.

(JSON is read by `utils.read_json`, predictions by `results.read_predictions`, DeepSpeed's and torch's files of a checkpoint by
the trainer after `convert.scan.check_checkpoint`.) No code of a file is run, nothing is waited for, and whatever is wrong is
a `UserError` that names the file.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from utils import UserError, first_line, read_json, regular_file

# what checkpoints of older libraries store besides their weights
BUFFERS = ("rotary_emb.inv_freq", "attn.bias", "attn.masked_bias")
JSON_FILES = (
    *(f"{kind}config.json" for kind in ("", "generation_", "tokenizer_", "adapter_", "processor_", "preprocessor_")),
    *("special_tokens_map.json", "added_tokens.json", "tokenizer.json", "*.index.json"),
)
READ = ("*.json", "*.safetensors", "*.bin", "*.model", "*.gguf", "*.txt", "*.jinja")
ADAPTER = "adapter_config.json"


@contextlib.contextmanager
def faults_said(path: str | Path, what: str) -> Iterator[None]:
    """Whatever goes wrong within the block, as files can be wrong in any way, is a `UserError`: no `what` can be loaded."""
    try:
        yield
    except (UserError, MemoryError, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # noqa: BLE001  (a panic of the libraries in Rust is no Exception)
        raise UserError(f"{path}: no {what} can be loaded ({first_line(error)})") from error


# ---- folders of models ----


def check_model_folder(path: str | Path) -> None:
    """Look at the files that a loader would open: regular, settings in objects, whole tensors. A hub id is left to the hub.

    Raises:
        UserError: names the first file that is wrong.
    """
    folder = Path(path)
    if not folder.is_dir():
        return
    for file in sorted({file for pattern in (*READ, "additional_chat_templates/*") for file in folder.glob(pattern)}):
        regular_file(file)
    for file in sorted({file for pattern in JSON_FILES for file in folder.glob(pattern)}):
        content = read_json(file)
        if not isinstance(content, dict):
            raise UserError(f"{file}: must be an object")
        if file.name.endswith(".index.json") and file.name != "item_index.json":
            _check_shards(file, content)


def _check_shards(path: Path, content: dict[str, Any]) -> None:
    shards = content.get("weight_map")
    if not isinstance(shards, dict) or not all(isinstance(shard, str) for shard in shards.values()):
        raise UserError(f"{path}: 'weight_map' must be an object of file names")
    for shard in set(shards.values()):
        if Path(shard).name != shard:
            raise UserError(f"{path}: {shard!r} is not the name of a file beside it")


def _tensor_names(folder: Path) -> set[str]:
    """The names in the safetensors files of `folder`, whose headers are checked against their sizes."""
    from safetensors import safe_open

    names: set[str] = set()
    for file in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(regular_file(file), framework="pt") as tensors:
                names |= set(tensors.keys())
        except Exception as error:  # noqa: BLE001  (safetensors has its own class, beside OSError)
            raise UserError(f"{file}: no safetensors file, or only a part of one ({first_line(error)})") from None
    return names


def model_config(path: str | Path) -> Any:
    """The configuration of the model in a folder or of a hub id.

    Raises:
        UserError: there is none that loads, or the weights have fewer tensors than it has layers.
    """
    check_model_folder(path)
    if Path(path).is_dir():
        regular_file(Path(path) / "config.json")
    with faults_said(path, "configuration"):
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
        layers = int(getattr(config.get_text_config(), "num_hidden_layers", 0))
        _refuse_kernels(path, config)
    names = _tensor_names(Path(path))
    if names and layers > len(names):  # building so many would take for ever
        raise UserError(f"{path}: config.json has {layers} layers, but the weights are {len(names)} tensors in all")
    return config


def _refuse_kernels(path: str | Path, config: Any) -> None:
    """A kernel of the hub, `owner/name`, is code."""
    for kind in ("attn", "experts"):
        name = str(getattr(config, f"_{kind}_implementation", ""))
        if "/" in name:
            raise UserError(f"{path}: config.json asks for {name} from the hub, which is code and is not run")


# ---- models ----


def load_model(
    path: str | Path, dtype: torch.dtype | None = None, model_class: Any = AutoModelForCausalLM, **more: Any
) -> PreTrainedModel:
    """A causal LM of a folder or hub id in `dtype` (default: the checkpoint's); no code of the checkpoint is run.

    Args:
        model_class: of transformers; with another one than a causal LM's the checkpoint may have parts that it has not (a
            head), lack a pooler or the decoder of an encoder-decoder, and be quantised.

    Raises:
        UserError: there is no model that loads, or its weights are not those of its configuration.
    """
    config = model_config(path)
    if (Path(path) / ADAPTER).exists():  # transformers would apply it in passing
        raise UserError(f"{path}: holds a model and an adapter ({ADAPTER}); give each a folder of its own")
    causal = model_class is AutoModelForCausalLM
    if causal and getattr(config, "quantization_config", None) and "quantization_config" not in more:
        raise UserError(f"{path}: config.json quantises the weights (quantization_config); take the plain model")
    with faults_said(path, "model"):
        model, report = model_class.from_pretrained(
            path, dtype=dtype or "auto", trust_remote_code=False, output_loading_info=True, **more
        )
    missing, extra = sorted(report["missing_keys"]), sorted(set(map(str, report["unexpected_keys"])))
    extra = [name for name in extra if not name.endswith(BUFFERS)]
    if not causal:
        parts = ("pooler", "decoder.") if config.is_encoder_decoder else ("pooler",)
        missing, extra = [name for name in missing if not any(part in name for part in parts)], []
    if missing or extra:
        what = f"lack {missing[0]}" if missing else f"have {extra[0]}, which the model has not"
        raise UserError(f"{path}: the weights do not fit config.json: they {what} ({len(missing + extra)} such names)")
    return model


# ---- adapters ----


def adapter_weights(path: str | Path) -> dict[str, torch.Tensor]:
    """The tensors of an adapter (`adapter_model.safetensors`, or the older `.bin`).

    Raises:
        UserError: there are none that load.
    """
    from peft import load_peft_weights

    files = [Path(path) / name for name in ("adapter_model.safetensors", "adapter_model.bin")]
    file = next((file for file in files if file.exists() or file.is_symlink()), files[0])
    regular_file(file)
    with faults_said(file, "adapter"):
        weights = load_peft_weights(str(path), device="cpu")
    if not isinstance(weights, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in weights.values()):
        raise UserError(f"{file}: holds other things than tensors")
    return weights


def fill_adapter(model: Any, weights: dict[str, torch.Tensor], path: str | Path) -> None:
    """Give a PEFT model the `weights` of an adapter of the same shape, all of them.

    Raises:
        UserError: names a part that one of them lacks.
    """
    from peft import get_peft_model_state_dict, set_peft_model_state_dict

    wanted = get_peft_model_state_dict(model, save_embedding_layers=False).keys()
    if missing := sorted(wanted - weights.keys()):
        raise UserError(f"{path}: the adapter's weights lack {missing[0]} ({len(missing)} such names)")
    try:
        result = set_peft_model_state_dict(model, weights)
    except Exception as error:  # noqa: BLE001  (shapes and names can be wrong in any way)
        raise UserError(f"{path}: the adapter does not fit ({first_line(error)})") from error
    if result.unexpected_keys:
        raise UserError(
            f"{path}: the adapter has {result.unexpected_keys[0]}, the model has not (--lora_*, --base_model)"
        )


# ---- arrays ----


def read_array(path: str | Path) -> np.ndarray:
    """The numbers of a `.npy` file, float32; an archive or pickled objects are refused.

    Raises:
        UserError: it is no such file.
    """
    regular_file(path)
    with faults_said(path, "array"), warnings.catch_warnings(action="ignore"):  # of what is odd in a header
        # mapped: the size that the header names is compared with the file's before memory is asked for
        array = np.lib.format.open_memmap(path, mode="r")
        if array.dtype.kind not in "fiu":
            raise ValueError(f"it holds {array.dtype} instead of real numbers")
        return np.array(array, dtype=np.float32)
