"""What libraries have a say in: names of optimisers, schedules and trackers, and the DeepSpeed configuration of `--deepspeed`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from arguments import comma_list
from utils import UserError, first_line, read_json, world_size


def check_choices(optimizer: str, scheduler: str) -> None:
    """Refuse an optimiser (`--optim`) or a schedule that transformers does not know. Raises UserError."""
    from transformers.trainer_utils import SchedulerType
    from transformers.training_args import OptimizerNames

    rows = (("optim", optimizer, OptimizerNames), ("lr_scheduler_type", scheduler, SchedulerType))
    for flag, value, choices in rows:
        known = [choice.value for choice in choices]
        if value not in known:
            raise UserError(f"--{flag} {value}: unknown; known: {', '.join(known)}")


def check_trackers(report_to: str) -> None:
    """Refuse a tracker that is unknown or not installed. Raises UserError."""
    from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

    names = comma_list(report_to)
    for name in names if names not in (["none"], ["all"]) else []:
        if name not in INTEGRATION_TO_CALLBACK:
            raise UserError(f"--report_to {name}: unknown; known: {', '.join(INTEGRATION_TO_CALLBACK)}, or none")
        try:
            INTEGRATION_TO_CALLBACK[name]()
        except (ImportError, RuntimeError) as error:
            raise UserError(f"--report_to {name}: {first_line(error)}") from None


def check_optimizer(training: Any, model: Any) -> None:
    """Refuse an optimiser that is not installed or needs more than its name. Raises UserError."""
    from transformers import Trainer

    try:
        Trainer.get_optimizer_cls_and_kwargs(training, model)
    except Exception as error:  # noqa: BLE001  (every optimiser has errors of its own)
        raise UserError(f"--optim {training.optim}: {first_line(error)}") from None


# ---- DeepSpeed ----


def read_deepspeed(path: str | None, batch: int, steps: int, precisions: set[str]) -> dict[str, Any]:
    """The content of a DeepSpeed configuration, {} without one.

    Args:
        batch, steps: samples per process and batches per optimiser step, as the flags say.
        precisions: those of "bf16" and "fp16" that the flags ask for.

    Raises:
        UserError: names the file and the key that is wrong or contradicts a flag.
    """
    if not path:
        return {}
    try:
        config = read_json(path)
    except UserError as error:
        raise UserError(f"--deepspeed {error} (none: plain DDP)") from None
    if not isinstance(config, dict):
        raise UserError(f"--deepspeed {path}: must be an object")
    _check_zero(path, config)
    _check_precision(path, config, precisions)
    said = {
        "train_micro_batch_size_per_gpu": (batch, "--per_device_batch_size"),
        "gradient_accumulation_steps": (steps, "--gradient_accumulation_steps"),
        "train_batch_size": (batch * steps * world_size(), "that of the flags"),
    }
    for key, (value, flag) in said.items():
        own = config.get(key, "auto")
        if own != "auto" and (type(own) is not int or own != value):
            raise UserError(f'--deepspeed {path}: {key!r} is {str(own)[:40]}, but {flag} is {value}; write "auto"')
    clipping = config.get("gradient_clipping", "auto")
    if clipping != "auto" and (type(clipping) not in (int, float) or not 0 <= clipping < float("inf")):
        raise UserError(
            f"--deepspeed {path}: 'gradient_clipping' is {str(clipping)[:40]}, neither a number from 0 nor auto"
        )
    for key in ("optimizer", "scheduler"):
        if key in config:
            raise UserError(f"--deepspeed {path}: {key!r} is decided by --optim and --lr_scheduler_type; take it out")
    return config


def zero_stage(config: dict[str, Any]) -> int:
    """The ZeRO stage of a configuration that `read_deepspeed` has checked; 0 without one."""
    return config.get("zero_optimization", {}).get("stage", 0)


def _check_zero(path: str, config: dict[str, Any]) -> None:
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    zero = config.get("zero_optimization", {})
    if not isinstance(zero, dict):
        raise UserError(f"--deepspeed {path}: 'zero_optimization' must be an object")
    stage = zero.get("stage", 0)
    if type(stage) is not int or not 0 <= stage <= 3:
        raise UserError(f"--deepspeed {path}: 'zero_optimization.stage' is {str(stage)[:40]}; the stages are 0 to 3")
    known = {name for key, field in DeepSpeedZeroConfig.model_fields.items() for name in (key, field.alias) if name}
    for key, value in zero.items():
        if key not in known:
            raise UserError(f"--deepspeed {path}: 'zero_optimization.{key[:80]}' is a key that DeepSpeed does not know")
        sized = key.endswith(("_size", "_threshold", "_parameters", "_distance"))
        if sized and value != "auto" and (type(value) not in (int, float) or not 0 <= value < float("inf")):
            raise UserError(
                f"--deepspeed {path}: 'zero_optimization.{key}' is {str(value)[:40]}, neither a number from 0 nor auto"
            )


def _check_precision(path: str, config: dict[str, Any], precisions: set[str]) -> None:
    for key in ("bf16", "fp16"):
        section = config.get(key, {})
        enabled = section.get("enabled", False) if isinstance(section, dict) else None
        if not (isinstance(enabled, bool) or enabled == "auto"):
            raise UserError(f"--deepspeed {path}: {key!r} must be an object with 'enabled': true, false or auto")
        if enabled is True and key not in precisions:
            raise UserError(f'--deepspeed {path}: {key!r} is on without --{key}; write "auto", or add the flag')


def complete_deepspeed(config: dict[str, Any], prepared: Path) -> dict[str, Any] | None:
    """`config` with `auto` buckets and thresholds never below what a small model needs; None for none.

    transformers derives them from the hidden size alone, so that a model of 128 dimensions would talk in crumbs of 16,384
    numbers. From about 3,000 dimensions on these are transformers' own values.

    Args:
        prepared: the folder of the model that is to train.
    """
    if not config:
        return None
    from reading import model_config

    hidden, zero = model_config(prepared).get_text_config().hidden_size, config.get("zero_optimization", {})
    values = {
        "reduce_bucket_size": max(hidden**2, 10**7),
        "stage3_prefetch_bucket_size": max(int(0.9 * hidden**2), 10**7),
        "stage3_param_persistence_threshold": max(10 * hidden, 10**5),
    }
    zero.update({key: value for key, value in values.items() if zero.get(key) == "auto"})
    return config
