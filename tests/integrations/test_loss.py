"""The fused loss inside a model: transformers' value and gradient; set, kept and taken back with accelerate."""

import copy

import pytest
import torch
from transformers.loss.loss_utils import ForCausalLMLoss

import fastpeft
from fastpeft.integrations.transformers import causal_lm_loss
from tests.models import VOCAB, gpt2, llama, tokens, with_lora


@pytest.mark.parametrize("items", (None, 7, torch.tensor(7)))
@pytest.mark.parametrize("shifted", (False, True))
def test_equals_transformers(items, shifted):
    labels = tokens(3, 8)
    labels[1, :5] = -100
    options = {"num_items_in_batch": items, "unknown_option": 1}
    if shifted:
        options["shift_labels"] = torch.roll(labels, -1, 1)
    results = []
    for loss in (ForCausalLMLoss, causal_lm_loss):
        logits = torch.randn(3, 8, VOCAB, generator=torch.Generator().manual_seed(1), requires_grad=True)
        value = loss(logits, labels, VOCAB, **options)
        value.backward()
        results.append((value.detach(), logits.grad))
    for a, b in zip(*results, strict=True):
        assert torch.allclose(a, b, atol=1e-6)


def test_logits_may_be_a_view():
    logits, labels = torch.randn(2, 6, VOCAB).bfloat16()[:, 1:], tokens(2, 5)
    assert torch.allclose(causal_lm_loss(logits, labels, VOCAB), ForCausalLMLoss(logits, labels, VOCAB))


@pytest.mark.parametrize("make", (llama, gpt2))
def test_accelerate_sets_it_and_restore_takes_it_back(make):
    model = with_lora(make(), target_modules=["c_attn"] if make is gpt2 else ["q_proj"])
    base = model.get_base_model()
    stock = base.loss_function
    report = fastpeft.accelerate(model)
    assert report.loss and base.loss_function is causal_lm_loss and "so is the loss" in str(report)
    assert copy.deepcopy(model).get_base_model().loss_function is causal_lm_loss
    fastpeft.restore(model)
    assert base.loss_function is stock


def test_a_loss_of_the_user_stays():
    model = with_lora(llama())

    def own(*args, **kwargs):
        return torch.zeros(())

    model.get_base_model().loss_function = own
    assert not fastpeft.accelerate(model).loss
    fastpeft.restore(model)
    assert model.get_base_model().loss_function is own
