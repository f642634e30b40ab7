"""Packing and the labelled head change what is computed, never the result."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from tiny_models import ARCHITECTURES, make_model

from collator import IGNORE, ROUND, pack
from packing import PACKED, LabelledHead, check_packing, float32, packed_attention
from utils import UserError


def rows_of(model: torch.nn.Module, lengths: tuple[int, ...]) -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    size = model.get_input_embeddings().weight.shape[0]
    return [torch.randint(size, (n,), generator=generator).tolist() for n in lengths]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_packed_logits_and_gradients_are_those_of_samples_alone(name, tmp_path):
    model = make_model(name, tmp_path / "base").train()
    if name == "gpt2":  # dropout
        model.eval()
    rows = rows_of(model, (9, 80, 1, 30))  # 80 is beyond mistral's window of 64
    labels = [[IGNORE] * (len(row) // 2) + row[len(row) // 2 :] for row in rows]

    total, count = 0.0, 0
    for row, label in zip(rows, labels, strict=True):
        logits = model(torch.tensor([row]), use_cache=False).logits[0, :-1]
        total = total + F.cross_entropy(
            logits, torch.tensor(label[1:], dtype=torch.long), ignore_index=IGNORE, reduction="sum"
        )
        count += sum(value != IGNORE for value in label[1:])
    (total / count).backward()
    wanted = {key: p.grad.clone() for key, p in model.named_parameters()}
    model.zero_grad()

    model.set_attn_implementation(PACKED)
    head = LabelledHead(model)
    batch = pack(rows, labels)
    targets = batch.pop("labels")
    keep = torch.zeros_like(targets, dtype=torch.bool)
    keep[:, :-1] = targets[:, 1:] != IGNORE
    with head.only(keep):
        logits = model(**batch, use_cache=False).logits
    assert logits.shape[1] < ROUND + count
    loss = F.cross_entropy(logits[0, :count], targets[:, 1:][keep[:, :-1]])
    loss.backward()
    assert loss.item() == pytest.approx((total / count).item(), abs=1e-5)
    for key, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, wanted[key], atol=1e-5, rtol=1e-3, msg=key)


def test_no_sample_sees_another(tmp_path):
    model = make_model("llama", tmp_path / "base").eval()
    model.set_attn_implementation(PACKED)
    rows = rows_of(model, (6, 7, 5))
    other = [rows[0], [(token + 1) % 300 for token in rows[1]], rows[2]]
    with torch.no_grad():
        before, after = (model(**without_labels(pack(r, r)), use_cache=False).logits[0] for r in (rows, other))
    assert torch.equal(before[:6], after[:6]) and torch.equal(before[13:], after[13:])
    assert not torch.allclose(before[6:13], after[6:13])


def without_labels(batch: dict) -> dict:
    return {key: value for key, value in batch.items() if key != "labels"}


@pytest.mark.parametrize("window", [None, 4])
def test_the_padded_form_for_gpus_equals_the_form_for_cpus(window):
    import packing

    class Layer(torch.nn.Module):
        num_key_value_groups = 2
        is_causal = True

    torch.manual_seed(0)
    q, k, v = torch.randn(1, 4, 20, 8), torch.randn(1, 2, 20, 8), torch.randn(1, 2, 20, 8)
    lengths = [3, 11, 6]
    wanted = packed_attention(Layer(), q, k, v, None, lengths, window)[0]
    padded = packing._padded_attention(Layer(), q, k, v, lengths, window, {"is_causal": True})
    torch.testing.assert_close(padded, wanted)


@pytest.mark.parametrize("window", [None, 4])
def test_what_flash_attention_is_asked_for_is_the_form_for_cpus(window, monkeypatch):
    """Its kernel needs a GPU; a stand-in that does what torch documents of `varlen_attn` shows that it is asked rightly."""
    import packing

    def documented(q, k, v, cu_seq_q, cu_seq_k, max_q, max_k, *, scale, window_size, enable_gqa):
        assert cu_seq_q.dtype == torch.int32 and torch.equal(cu_seq_q, cu_seq_k) and enable_gqa
        assert max_q == max_k == int(cu_seq_q.diff().max()) and int(cu_seq_q[-1]) == len(q) == len(k)
        left, right = window_size
        out = torch.empty_like(q)
        for begin, end in zip(cu_seq_q[:-1].tolist(), cu_seq_q[1:].tolist(), strict=True):
            for row in range(begin, end):
                first = begin if left < 0 else max(begin, row - left)
                for head in range(q.shape[1]):
                    shared = head // (q.shape[1] // k.shape[1])
                    seen = slice(first, row + right + 1)
                    weights = (k[seen, shared] @ q[row, head] * scale).softmax(0)
                    out[row, head] = weights @ v[seen, shared]
        return out

    class Layer(torch.nn.Module):
        num_key_value_groups = 2
        is_causal = True

    torch.manual_seed(0)
    q, k, v = torch.randn(1, 4, 20, 8), torch.randn(1, 2, 20, 8), torch.randn(1, 2, 20, 8)
    monkeypatch.setattr(packing, "varlen_attn", documented)
    wanted = packed_attention(Layer(), q, k, v, None, [3, 11, 6], window, scaling=0.3)[0]
    torch.testing.assert_close(packing._varlen_attention(q, k, v, [3, 11, 6], window, 0.3), wanted)


def test_batches_that_are_not_packed_are_masked_as_usual(tmp_path):
    model = make_model("llama", tmp_path / "base").eval()
    ids = torch.tensor([[5, 6, 7, 8], [9, 9, 5, 6]])
    mask = torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1]])
    with torch.no_grad():
        wanted = model(ids, attention_mask=mask).logits
        model.set_attn_implementation(PACKED)
        got = model(ids, attention_mask=mask).logits
    torch.testing.assert_close(got[mask.bool()], wanted[mask.bool()])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_that_mixes_packed_samples_is_refused(tmp_path, dtype):
    model = make_model("llama", tmp_path / "base", initializer_range=0.3).to(dtype)
    check_packing(model)
    model.model.layers[0].register_forward_hook(lambda _, __, out: out + out.mean(1, keepdim=True))
    with pytest.raises(UserError, match="--packing: LlamaForCausalLM does not keep packed samples apart"):
        check_packing(model)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}


@pytest.mark.parametrize("tied", [True, False])
def test_the_trial_of_a_16_bit_model_is_exact_and_leaves_it_as_it_was(tmp_path, tied):
    """In bfloat16 itself two ways to compute the same differ by percents: one of twenty vocabularies was refused."""
    model = make_model("llama", tmp_path / "base", initializer_range=0.3, tie_word_embeddings=tied).bfloat16().eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad(), float32(model):
        got = model(ids).logits
    check_packing(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert (model.get_input_embeddings().weight is model.get_output_embeddings().weight) == tied
    with torch.no_grad():
        assert not torch.equal(model(ids).logits.float(), got)
        torch.testing.assert_close(model.float()(ids).logits, got)


def test_rows_are_laid_end_to_end_and_first_tokens_have_no_label():
    batch = pack([[5, 6, 7], [8, 9]], [[5, 6, 7], [IGNORE, 9]])
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 9]]
    assert batch["labels"].tolist() == [[IGNORE, 6, 7, IGNORE, 9]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1]]
    assert batch["packed_lengths"] == [3, 2]
    filled = pack([[5, 6, 7], [8, 9]], [[5, 6, 7], [IGNORE, 9]], multiple=4)
    assert filled["input_ids"].tolist() == [[5, 6, 7, 8, 9, 0, 0, 0]] and filled["packed_lengths"] == [3, 2, 3]
    assert filled["labels"].tolist() == [[IGNORE, 6, 7, IGNORE, 9, IGNORE, IGNORE, IGNORE]]


def test_attention_on_the_cpu_stays_in_float32_under_autocast():
    """torch's own bfloat16 attention is several times as slow; rounding tells which of the two was run."""

    class Layer(torch.nn.Module):
        num_key_value_groups = 1
        is_causal = True

    torch.manual_seed(0)
    q, k, v = torch.randn(3, 1, 2, 9, 8).unbind()
    wanted = packed_attention(Layer(), q, k, v, None, [5, 4])[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = packed_attention(Layer(), q, k, v, None, [5, 4])[0]
    assert torch.equal(got, wanted)


def test_samples_are_dealt_evenly_within_their_step():
    from even_rows import Dealt, EvenRows

    class Sampler(list):
        def set_epoch(self, epoch):
            self.reverse()

    draw = torch.Generator().manual_seed(0)
    sizes = torch.randint(40, 2000, (3 * 8 + 5,), generator=draw).tolist()
    data = Dealt([{"prompt": "x" * (size - 7), "response": "<a_1>"} for size in sizes])
    order = Sampler(torch.randperm(len(data), generator=draw).tolist())
    dealt = EvenRows(order, data, batch=4, processes=2)
    for _ in range(2):
        got, drawn_for = [], []
        for number in dealt:
            got.append(number)
            drawn_for.append(data[number]["batch"])
        assert drawn_for[24:] == [None] * 5
        assert len(got) == len(dealt) == len(data) and got[24:] == order[24:]  # an unfinished step stays
        for start in range(0, 24, 8):
            step = got[start : start + 8]
            assert sorted(step) == sorted(order[start : start + 8])
            gap = abs(sum(sizes[i] for i in step[:4]) - sum(sizes[i] for i in step[4:]))
            assert gap < 0.2 * sum(sizes[i] for i in step)
            for number, process in zip(step, drawn_for[start : start + 8], strict=True):
                assert number in order[start + 4 * process : start + 4 * process + 4]
        dealt.set_epoch(1)
