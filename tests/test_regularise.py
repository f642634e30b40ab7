"""Dropout by hooks: only in training, nothing in the weights, refused where it would do nothing."""

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from regularise import add_dropout
from utils import UserError

IDS = torch.arange(12).reshape(2, 6)


def tiny():
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=20, **sizes))


def test_dropout_acts_in_training_alone_and_leaves_the_weights_as_they_are():
    plain, model = tiny().eval(), tiny().eval()
    names = list(model.state_dict())
    assert add_dropout(model, 0.3) == 1 + 2 * 3  # the embeddings, and two branches a layer
    assert list(model.state_dict()) == names
    torch.testing.assert_close(model(IDS).logits, plain(IDS).logits)
    model.train()
    assert not torch.allclose(model(IDS).logits, plain(IDS).logits)
    assert not torch.allclose(model(IDS).logits, model(IDS).logits)


def test_the_share_is_dropped_and_the_rest_scaled():
    model = tiny().train()
    add_dropout(model, 0.25)
    ids = torch.zeros(1, 5000, dtype=torch.long)
    row, dropped = model.get_input_embeddings().weight[0].detach(), model.get_input_embeddings()(ids)[0].detach()
    gone = dropped == 0
    assert gone.float().mean().item() == pytest.approx(0.25, abs=0.01)
    torch.testing.assert_close(dropped[~gone], (row / 0.75).expand_as(dropped)[~gone])


def test_other_architectures_are_refused():
    with pytest.raises(UserError, match="--dropout: Sequential"):
        add_dropout(nn.Sequential(nn.Linear(2, 2)), 0.1)
