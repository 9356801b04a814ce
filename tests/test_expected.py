"""What is expected of other packages: found, or a reason; never a guess."""

import logging

import pytest
import torch

import fastpeft
from fastpeft import expected
from tests.models import gpt2, llama, with_lora


@pytest.fixture
def unmet(monkeypatch):
    """Reasons that are forgotten after the test."""
    monkeypatch.setattr(expected, "_missing", {})


def test_a_name_that_is_gone_is_a_reason_and_stands_for_no_class(unmet):
    found = expected.find("dora", "peft.tuners.lora.dora:NoSuchLayer")
    assert found is expected.Absent and not isinstance(object(), found)
    assert expected.why_not("dora").endswith("has no peft.tuners.lora.dora.NoSuchLayer")
    assert expected.find("ia3", "no_such_package.module:Name") is expected.Absent
    assert "no_such_package" in expected.why_not("ia3")
    assert expected.why_not("lora") is None


def test_an_argument_that_is_gone_is_a_reason(unmet):
    expected.parameters("loss", lambda logits, labels: None, "logits", "labels")
    assert expected.why_not("loss") is None
    expected.parameters("loss", lambda logits, targets: None, "logits", "labels")
    assert "takes no labels" in expected.why_not("loss")


@pytest.mark.parametrize(("feature", "dora"), [("lora", False), ("dora", True)])
def test_layers_of_a_feature_with_a_reason_are_left_to_peft(feature, dora, unmet):
    model, ids = with_lora(llama(), use_dora=dora), torch.arange(12).view(2, 6)
    stock, classes = model(input_ids=ids).logits, [type(module) for module in model.modules()]
    expected.miss(feature, "peft 99 has other layers")
    report = fastpeft.accelerate(model)
    assert report.fused == 0 and {row.reason for row in report} == {"peft 99 has other layers"}
    assert [type(module) for module in model.modules()] == classes
    assert torch.equal(model(input_ids=ids).logits, stock)
    with pytest.raises(ValueError, match="peft 99 has other layers"):
        fastpeft.accelerate(model, strict=True)


def test_a_layer_without_an_attribute_that_is_read_is_left_to_peft():
    model = with_lora(llama())
    layer = next(module for module in model.modules() if hasattr(module, "lora_variant"))
    del layer.lora_variant
    rows = [row for row in fastpeft.accelerate(model) if row.status == "peft"]
    assert len(rows) == 1 and "has no lora_variant" in rows[0].reason


def test_a_loss_that_is_not_as_expected_stays(unmet):
    expected.miss("loss", "transformers 99 has another loss")
    model = with_lora(llama())
    assert not fastpeft.accelerate(model).loss
    assert "_loss_function" not in vars(model.get_base_model())


def test_a_prefix_that_cannot_be_served_is_refused_or_left(unmet):
    from peft import PrefixTuningConfig, get_peft_model

    expected.miss("prefix", "transformers 99 has another attention")
    model = gpt2()
    with pytest.raises(ValueError, match="transformers 99"):
        fastpeft.attach_prefix(model, fastpeft.nn.PrefixEncoder.for_model(model, 4))
    model = get_peft_model(model, PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4))
    assert [row.reason for row in fastpeft.accelerate(model)] == ["transformers 99 has another attention"]


def test_a_cache_is_found_under_either_name():
    old, new = (lambda x, past_key_values=None: None), (lambda x, cache=None: None)
    assert (expected.cache_name(old), expected.cache_name(new)) == ("past_key_values", "cache")
    assert expected.cache_name(lambda x: None) is None
    assert expected.cache_of({"cache": None, "past_key_values": 1}) == expected.cache_of({"cache": 1}) == 1
    assert expected.cache_of({"x": 1}) is None


def test_a_release_that_was_not_tested_is_named(monkeypatch, caplog):
    assert expected.uncovered({"peft": "0.20.0", "torch": "2.13.0+cpu", "transformers": "5.24.9"}) == {}
    (text,) = expected.uncovered({"peft": "0.99.1"}).values()
    assert text == "peft 0.99.1 is outside of 0.20 to 0.21, which the tests have covered"
    monkeypatch.setattr(expected, "versions", lambda: {"peft": "0.99.1"})
    expected.warn_of_uncovered.cache_clear()
    with caplog.at_level(logging.WARNING, "fastpeft"):
        for _ in range(2):
            fastpeft.accelerate(with_lora(llama()))
    expected.warn_of_uncovered.cache_clear()
    assert [record.getMessage() for record in caplog.records] == [text]
