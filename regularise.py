"""Keep a model that has little to learn from from learning it by heart."""

from __future__ import annotations

from torch import nn
from torch.nn import functional

from utils import UserError

BRANCHES = ("Attention", "MLP")  # how transformers ends the class names of a decoder layer's two branches


def add_dropout(model: nn.Module, share: float) -> int:
    """Drop `share` of the numbers that the embeddings and every layer's attention and MLP put out, in training only.

    As in the Transformer's first description; today's large models come without. Hooks do it: nothing is added to the
    weights, and a saved model has no trace of it.

    Returns:
        How many modules drop.

    Raises:
        UserError: the model's layers are not made of an attention and an MLP.
    """
    found = [module for module in model.modules() if type(module).__name__.endswith(BRANCHES)]
    kinds = {name for module in found for name in BRANCHES if type(module).__name__.endswith(name)}
    if len(kinds) < len(BRANCHES):
        raise UserError(
            f"--dropout: {type(model).__name__} has no layers of an attention and an MLP; leave the flag out"
        )

    def drop(module: nn.Module, inputs: tuple, output: object) -> object:
        if isinstance(output, tuple):
            return (functional.dropout(output[0], share, module.training), *output[1:])
        return functional.dropout(output, share, module.training)

    modules = [model.get_input_embeddings(), *found]
    for module in modules:
        module.register_forward_hook(drop)
    return len(modules)
