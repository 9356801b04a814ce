"""save_adapter, load_adapter: peft's files, both ways, and refusals that leave the model as it was."""

import json

import peft
import pytest
import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file, save_file

from fastpeft import convert, load_adapter, save_adapter
from fastpeft.nn import LoRALinear
from tests.models import fill_adapters, gpt2, llama, quantize, tokens, with_lora


def converted(model, **options):
    # Ranks and alphas that differ by layer: peft keeps them in patterns.
    ranks = iter([4, 4, 6, 4, 4, 4, 8, 4, 4, 4, 4, 4, 4, 4])
    convert(model, lambda linear: LoRALinear(linear, next(ranks), 12, **options))
    for module in model.modules():
        if isinstance(module, LoRALinear):
            module.alpha = 5 if module.r == 6 else 12
    fill_adapters(model)
    return model.eval()


@pytest.mark.parametrize("make", (llama, gpt2))
@pytest.mark.parametrize("rslora", (False, True))
def test_peft_loads_what_fastpeft_saves(make, rslora, tmp_path):
    base, ids = make(), tokens()
    state = {name: value.clone() for name, value in base.state_dict().items()}
    ours = converted(base, rslora=rslora)
    expected = ours(ids).logits
    save_adapter(ours, tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    fresh = make()
    fresh.load_state_dict(state)
    theirs = PeftModel.from_pretrained(fresh, tmp_path).eval()
    assert torch.allclose(theirs(ids).logits, expected, atol=1e-5)


@pytest.mark.parametrize("make", (llama, gpt2))
def test_fastpeft_loads_what_peft_saves(make, tmp_path):
    options = {"rank_pattern": {"c_attn": 3, "layers.1.mlp.up_proj": 3}, "alpha_pattern": {"q_proj": 7, "c_fc": 7}}
    base, ids = make(), tokens()
    state = {name: value.clone() for name, value in base.state_dict().items()}
    theirs = with_lora(base, use_rslora=True, lora_dropout=0.25, fan_in_fan_out=make is gpt2, **options).eval()
    expected = theirs(ids).logits
    theirs.save_pretrained(tmp_path)
    fresh = make().eval()
    fresh.load_state_dict(state)
    names = load_adapter(fresh, tmp_path)
    assert torch.allclose(fresh(ids).logits, expected, atol=1e-5)
    layers = [module for module in fresh.modules() if isinstance(module, LoRALinear)]
    assert len(layers) == len(names) and all(layer.dropout == 0.25 for layer in layers)

    for layer in layers:  # and once more, into layers that are there already
        layer.lora_A.weight.data.zero_()
        layer.alpha = 1
    load_adapter(fresh, tmp_path)
    assert torch.allclose(fresh(ids).logits, expected, atol=1e-5)


def test_round_trip_over_a_4bit_model(tmp_path):
    model, ids = quantize(llama(), torch.float32), tokens()
    converted(model)
    expected = model(ids).logits
    save_adapter(model, tmp_path)
    for module in model.modules():
        if isinstance(module, LoRALinear):
            torch.nn.init.zeros_(module.lora_B.weight)
    assert not torch.allclose(model(ids).logits, expected, atol=1e-3)
    load_adapter(model, tmp_path)
    assert torch.equal(model(ids).logits, expected)


def test_the_active_adapter_of_a_peft_model_is_saved(tmp_path):
    model, ids = with_lora(llama()).eval(), tokens()
    state = {name.replace(".base_layer", ""): value for name, value in model.get_base_model().state_dict().items()}
    model.add_adapter("second", LoraConfig(r=4, target_modules=["q_proj"]))
    fill_adapters(model)
    model.set_adapter("second")
    expected = model(ids).logits
    save_adapter(model, tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    fresh = llama().eval()
    fresh.load_state_dict({name: value for name, value in state.items() if "lora_" not in name})
    assert len(load_adapter(fresh, tmp_path)) == 2
    assert torch.allclose(fresh(ids).logits, expected, atol=1e-5)
    with pytest.raises(TypeError, match="model.load_adapter"):
        load_adapter(model, tmp_path)


def test_damaged_and_foreign_files_are_refused_before_anything_is_touched(tmp_path):
    save_adapter(converted(llama()), tmp_path / "good")
    config = json.loads((tmp_path / "good" / "adapter_config.json").read_text())
    tensors = load_file(tmp_path / "good" / "adapter_model.safetensors")
    key = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    magnitude = key.replace("lora_A.weight", "lora_magnitude_vector")

    def case(name, match, new_config=None, new_tensors=None, raw=None):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "adapter_config.json").write_text(json.dumps(new_config or config))
        if raw is not None:
            (folder / "adapter_model.safetensors").write_bytes(raw)
        elif new_tensors is not False:
            save_file(new_tensors or tensors, folder / "adapter_model.safetensors")
        for model in (llama(), converted(llama())):
            before = {name: value.clone() for name, value in model.state_dict().items()}
            with pytest.raises(ValueError, match=match):
                load_adapter(model, folder)
            after = model.state_dict()
            assert before.keys() == after.keys() and all(torch.equal(before[n], after[n]) for n in before)

    case("none", "holds no adapter_model.safetensors", new_tensors=False)
    case("damaged", "is damaged", raw=b"\x10\x00\x00\x00\x00\x00\x00\x00not safetensors")
    case("dora", "has only lora_A, lora_B", new_config=config | {"use_dora": True})
    case("magnitude", "but use_dora is off", new_tensors=tensors | {magnitude: torch.ones(128)})
    case("loha", "not a plain LoRA or DoRA adapter.*LOHA", new_config=config | {"peft_type": "LOHA"})
    case("half", "has only lora_A", new_tensors={key: tensors[key]})
    case("odd", "is not the name of a LoRA matrix", new_tensors=tensors | {"something.else": torch.zeros(1)})
    case("shape", "q_proj has A", new_tensors=tensors | {key: torch.zeros(4, 7)})
    other = {name.replace("layers.0", "layers.9"): value for name, value in tensors.items()}
    case("elsewhere", "layers.9|adapt different modules", new_tensors=other)
    case("integer", "not floating point|needs", new_tensors=tensors | {key: torch.zeros(4, 128, dtype=torch.int32)})

    case("pissa", "init_lora_weights='pissa'.*load it with peft", new_config=config | {"init_lora_weights": "pissa"})
    case("future", "not a plain LoRA or DoRA adapter .use_magic", new_config=config | {"use_magic": True})
    case("alpha", "lora_alpha is 'abc'", new_config=config | {"lora_alpha": "abc", "alpha_pattern": {}})
    case("no_alpha", "lora_alpha is None", new_config=config | {"lora_alpha": None, "alpha_pattern": {}})
    case("pattern", "alpha_pattern has the key", new_config=config | {"alpha_pattern": {"(": 1}})
    case("patterns", "alpha_pattern is", new_config=config | {"alpha_pattern": [1]})
    case("dropout", "lora_dropout is None", new_config=config | {"lora_dropout": None})
    case("rank", "its configuration says 3", new_config=config | {"r": 3, "rank_pattern": {}})

    merged = converted(llama())
    next(module for module in merged.modules() if isinstance(module, LoRALinear)).merge()
    with pytest.raises(ValueError, match="is merged"):
        load_adapter(merged, tmp_path / "good")

    (tmp_path / "pickle").mkdir()
    torch.save(tensors, tmp_path / "pickle" / "adapter_model.bin")
    (tmp_path / "pickle" / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="pickle and is not loaded"):
        load_adapter(llama(), tmp_path / "pickle")


def test_saving_refuses_what_the_format_cannot_hold(tmp_path):
    with pytest.raises(ValueError, match="no LoRALinear"):
        save_adapter(llama(), tmp_path)
    model = converted(llama())
    next(module for module in model.modules() if isinstance(module, LoRALinear)).dropout = 0.5
    with pytest.raises(ValueError, match="differ in dropout"):
        save_adapter(model, tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    model = converted(llama())
    save_adapter(model, tmp_path)
    before = (tmp_path / "adapter_model.safetensors").read_bytes()
    fill_adapters(model)

    def fail(tensors, path, **_):
        path.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr("safetensors.torch.save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        save_adapter(model, tmp_path)
    assert (tmp_path / "adapter_model.safetensors").read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 2


def test_peft_config_accepts_every_key(tmp_path):
    save_adapter(converted(llama()), tmp_path)
    config = peft.PeftConfig.from_pretrained(tmp_path)
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert written.keys() <= set(config.to_dict())
