"""Silence what libraries say about themselves."""

from __future__ import annotations

import logging
import sys
import warnings


def silence_libraries() -> None:
    """No warnings of libraries about their own ways, and no progress bars of theirs where there is no terminal."""
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", message=".*past_key_values.*|.*use_cache=True.*|.*lr_scheduler.step.*")
    for name in ("bitsandbytes", "DeepSpeed", "deepspeed", "accelerate", "torch.distributed"):
        logging.getLogger(name).setLevel(logging.ERROR)
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    if not sys.stderr.isatty():
        transformers_logging.disable_progress_bar()
