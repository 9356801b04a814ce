"""PrefixEncoder: its two forms, peft's files both ways, and an encoder that can be trained on."""

import json

import peft
import pytest
import torch
from peft import PrefixTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file

from fastpeft.nn import PrefixEncoder
from tests.models import gpt2, llama


@pytest.mark.parametrize("hidden", (None, 24))
def test_keys_and_values_are_those_of_peft(hidden):
    """The same parameters under the same names; peft evaluates them for every sample, here it is once."""
    base = llama()
    options = {"prefix_projection": hidden is not None, "encoder_hidden_size": hidden}
    stock = get_peft_model(base, PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5, **options))
    encoder = PrefixEncoder.for_model(base, 5, hidden)
    encoder.load_state_dict(stock.prompt_encoder["default"].state_dict())
    cache = stock.get_prompt(batch_size=2)
    for layer, (keys, values) in enumerate(split(encoder)):
        torch.testing.assert_close(cache.layers[layer].keys[1], keys)
        torch.testing.assert_close(cache.layers[layer].values[0], values)
    torch.testing.assert_close(encoder.flat()(), encoder())
    assert encoder.flat().hidden is None


def split(encoder):
    flat = encoder().view(encoder.P, encoder.layers, 2, encoder.heads, encoder.head_dim)
    return [(flat[:, i, 0].transpose(0, 1), flat[:, i, 1].transpose(0, 1)) for i in range(encoder.layers)]


@pytest.mark.parametrize("hidden", (None, 24))
def test_peft_loads_what_is_saved(hidden, tmp_path):
    base = llama().eval()
    encoder = PrefixEncoder.for_model(base, 5, hidden)
    encoder.save(tmp_path)
    loaded = peft.PeftModel.from_pretrained(base, tmp_path)
    torch.testing.assert_close(loaded.prompt_encoder["default"].embedding.weight, encoder(), rtol=0, atol=0)


@pytest.mark.parametrize("hidden", (None, 24))
def test_an_encoder_comes_back_with_its_mlp(hidden, tmp_path):
    encoder = PrefixEncoder(3, 2, 8, 5, hidden)
    encoder.save(tmp_path / "mine")
    loaded = PrefixEncoder.load(tmp_path / "mine")
    assert loaded.state_dict().keys() == encoder.state_dict().keys()
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), encoder.parameters(), strict=True))
    assert all(parameter.requires_grad for parameter in loaded.parameters())


def test_a_prefix_of_peft_is_loaded_flat(tmp_path):
    """peft keeps what its MLP makes, not the MLP."""
    options = {"num_virtual_tokens": 5, "prefix_projection": True, "encoder_hidden_size": 9}
    config = PrefixTuningConfig(task_type="CAUSAL_LM", **options)
    model = get_peft_model(llama(), config)
    model.save_pretrained(tmp_path)
    loaded = PrefixEncoder.load(tmp_path)
    assert loaded.hidden is None
    torch.testing.assert_close(loaded(), model.get_prompt_embedding_to_save("default"), rtol=0, atol=0)


@pytest.mark.parametrize("make", (llama, gpt2))
def test_init_text_is_what_the_model_keeps_of_the_text(make):
    model, text = make().eval(), torch.randint(1, 90, (6,))
    encoder = PrefixEncoder.for_model(model, init_text=text)
    with torch.no_grad():
        cache = model(input_ids=text[None], use_cache=True).past_key_values
    assert encoder.P == 6
    for layer, (keys, values) in enumerate(split(encoder)):
        assert torch.equal(cache.layers[layer].keys[0], keys) and torch.equal(cache.layers[layer].values[0], values)


@pytest.mark.parametrize(
    "options,message",
    [
        ({}, "either P or init_text"),
        ({"P": 3, "init_text": torch.arange(3)}, "either P or init_text"),
        ({"hidden": 8, "init_text": torch.arange(1, 3)}, "flat prefix"),
        ({"P": 0}, "P is 0"),
        ({"P": 3, "hidden": 0}, "hidden is 0"),
        ({"P": 3, "part": "both"}, "part is 'both'"),
    ],
)
def test_bad_input(options, message):
    with pytest.raises(ValueError, match=message):
        PrefixEncoder.for_model(llama(), **options)


@pytest.mark.parametrize(
    "spoil,message",
    [
        (lambda path: (path / "adapter_config.json").unlink(), "holds no"),
        (lambda path: (path / "adapter_model.safetensors").write_bytes(b"no"), "damaged"),
        (lambda path: (path / "prefix_encoder.safetensors").write_bytes(b"no"), "damaged"),
        (lambda path: change(path, peft_type="LORA"), "not a prefix"),
        (lambda path: change(path, num_layers=4), "prompt_embeddings is"),
        (lambda path: change(path, encoder_hidden_size=7), "the encoder is"),
        (lambda path: save_file({"a": torch.ones(1)}, path / "adapter_model.safetensors"), "prompt_embeddings is None"),
    ],
)
def test_a_spoiled_folder_is_refused(spoil, message, tmp_path):
    PrefixEncoder(3, 2, 8, 5, 6).save(tmp_path)
    spoil(tmp_path)
    with pytest.raises(ValueError, match=message):
        PrefixEncoder.load(tmp_path)


def change(path, **settings):
    file = path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))


def test_files_hold_tensors_only(tmp_path):
    PrefixEncoder(3, 2, 8, 5, 6).save(tmp_path)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"adapter_config.json", "adapter_model.safetensors", "prefix_encoder.safetensors"}
    assert load_file(tmp_path / "adapter_model.safetensors")["prompt_embeddings"].shape == (5, 3 * 2 * 2 * 8)
