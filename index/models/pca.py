"""A start at principal components: encoder and decoder that already reconstruct as well as PCA does.

A ReLU network can carry a linear map: the pair relu(z), relu(-z) holds z, and passes any further ReLU layer unchanged.
So the first 2k units of each hidden layer carry the first k principal coordinates through the network; all other units
keep their random start, with no say in the output until training gives them one.
"""

from __future__ import annotations

import torch
from torch import nn

from models.layers import MLPLayers
from models.rqvae import RQVAE


def principal_components(covariance: torch.Tensor, count: int) -> torch.Tensor:
    """The `count` leading eigenvectors of `covariance` (dim, dim) as rows (count, dim), signs fixed."""
    _, vectors = torch.linalg.eigh(covariance.double())
    components = vectors.flip(-1).t()[:count]
    largest = components.gather(1, components.abs().argmax(1, keepdim=True))
    return components * largest.sign()


def _linears(layers: MLPLayers) -> list[nn.Linear]:
    return [module for module in layers.mlp_layers if isinstance(module, nn.Linear)]


def _carry(layers: MLPLayers, before: torch.Tensor, before_bias: torch.Tensor, after: torch.Tensor) -> None:
    """Set `layers` to x → after · (before · x + before_bias), (k, in) and (out, k), by way of the first 2k hidden units."""
    k = len(before)
    first, *middle, last = _linears(layers)
    first.weight[: 2 * k] = torch.cat([before, -before]).to(first.weight)
    first.bias[: 2 * k] = torch.cat([before_bias, -before_bias]).to(first.bias)
    for linear in middle:
        linear.weight[: 2 * k] = torch.eye(2 * k, linear.in_features).to(linear.weight)
    last.weight.zero_()
    last.weight[:, : 2 * k] = torch.cat([after, -after], dim=1).to(last.weight)


@torch.no_grad()
def start_at_components(model: RQVAE, mean: torch.Tensor, covariance: torch.Tensor) -> int:
    """Start `model` (without batch normalisation, at least one hidden layer) at the data's principal components.

    Args:
        mean: (in_dim,) of the embeddings.
        covariance: (in_dim, in_dim) of the embeddings.

    Returns:
        how many components are carried: e_dim, or half the narrowest hidden layer.
    """
    config = model.config
    k = min(config.e_dim, min(config.layers) // 2, model.in_dim)
    components = principal_components(covariance, k).to(mean.device)
    mean = mean.double()
    into = torch.eye(config.e_dim, k, dtype=torch.float64, device=mean.device)
    _carry(model.encoder, components, -components @ mean, into)
    _carry(model.decoder, into.t(), torch.zeros(k, dtype=torch.float64, device=mean.device), components.t())
    _linears(model.decoder)[-1].bias.copy_(mean)
    return k
