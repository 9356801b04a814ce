"""Bottleneck adapters in models: they start as the model, train alone, switch, merge, and come back from files."""

import copy
import json

import pytest
import torch
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from fastpeft.nn import (
    BottleneckAdapter,
    BottleneckConfig,
    active_bottleneck,
    add_bottleneck,
    delete_bottleneck,
    load_bottleneck,
    merge_bottlenecks,
    save_bottleneck,
    set_bottleneck,
)
from tests.models import VOCAB, gpt2, llama, quantize, tokens

FP32 = torch.float32
_DECODER = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
                num_key_value_heads=2, vocab_size=VOCAB, pad_token_id=0)  # fmt: skip


def bert():
    config = BertConfig(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
                        vocab_size=VOCAB, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)  # fmt: skip
    return BertForSequenceClassification(config)


def t5():
    config = T5Config(d_model=64, d_ff=96, num_layers=2, num_heads=4, d_kv=16, vocab_size=VOCAB, dropout_rate=0.0,
                      decoder_start_token_id=0)  # fmt: skip
    return T5ForConditionalGeneration(config)


MODELS = {
    "llama": llama,
    "llama4bit": lambda: quantize(llama(), FP32),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**_DECODER)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**_DECODER)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**_DECODER, head_dim=16)),
    "gpt2": gpt2,
    "bert": bert,
    "t5": t5,
}
# Places: of houlsby, of the others. T5 has an encoder too.
COUNTS = {name: (8, 4) if name == "t5" else (4, 2) for name in MODELS}


def logits(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    return model(input_ids=ids, **({"labels": ids} if hasattr(model, "decoder") else {})).logits


def randomize(model: nn.Module, name: str) -> None:
    for key, parameter in model.named_parameters():
        if f".bottleneck.{name}." in key:
            nn.init.normal_(parameter, std=0.3)


@pytest.mark.parametrize("placement", ("houlsby", "pfeiffer", "parallel"))
@pytest.mark.parametrize("kind", MODELS)
def test_starts_as_the_model_and_every_part_gets_a_gradient(kind, placement):
    model, ids = MODELS[kind]().train(), tokens()
    keys, before = set(model.state_dict()), logits(model, ids).detach()
    places = add_bottleneck(model, BottleneckConfig(placement, r=4, activation="gelu"))
    assert len(places) == COUNTS[kind][placement != "houlsby"]
    assert torch.allclose(logits(model, ids), before, atol=1e-5)
    trainable = [name for name, p in model.named_parameters() if p.requires_grad]
    assert len(trainable) == 4 * len(places) and all(".bottleneck.default." in name for name in trainable)
    assert keys == {name for name in model.state_dict() if ".bottleneck." not in name}
    randomize(model, "default")
    after = logits(model, ids)
    assert not torch.allclose(after, before, atol=1e-2)
    after.square().sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in model.parameters() if p.requires_grad)


def test_where_the_adapters_work():
    """Houlsby: after attention and after the feed-forward. Parallel: from its input to its output."""
    model, ids = llama().eval(), tokens()
    layer, seen = model.model.layers[1], {}
    add_bottleneck(model, BottleneckConfig("houlsby", r=4, activation="silu", scaling=0.5), "h")
    add_bottleneck(model, BottleneckConfig("parallel", r=4, scaling=4.0), "p")
    randomize(model, "h"), randomize(model, "p")

    def keep(name):
        return lambda module, args, kwargs, output: seen.update({name: (args, kwargs, output)})

    for name in ("self_attn", "mlp", "input_layernorm", "post_attention_layernorm"):
        layer.get_submodule(name).register_forward_hook(keep(name), with_kwargs=True)
    forward = type(layer.mlp).forward
    with torch.no_grad():
        set_bottleneck(model, "p")
        logits(model, ids)
        (x,), _, y = seen["mlp"]
        adapter = layer.mlp.bottleneck["p"]
        update = 4.0 * adapter.up(adapter.down(x).relu())
        assert torch.allclose(y, forward(layer.mlp, x) + update, atol=1e-5)
        set_bottleneck(model, "h")
        logits(model, ids)
        (x,), _, y = seen["mlp"]
        adapter, plain = layer.mlp.bottleneck["h"], forward(layer.mlp, x)
        assert torch.allclose(y, plain + 0.5 * adapter.up(nn.functional.silu(adapter.down(plain))), atol=1e-5)
        residual = seen["input_layernorm"][0][0]
        assert torch.allclose(seen["post_attention_layernorm"][0][0], residual + seen["self_attn"][2][0], atol=1e-5)
        adapter, (_, kwargs, y) = layer.self_attn.bottleneck["h"], seen["self_attn"]
        plain = type(layer.self_attn).forward(layer.self_attn, **kwargs)[0]
        assert torch.allclose(y[0], plain + 0.5 * adapter.up(nn.functional.silu(adapter.down(plain))), atol=1e-5)


@pytest.mark.parametrize("norm", ("before", "after"))
def test_norms(norm):
    adapter, x, other = BottleneckAdapter(24, 5, "gelu_tanh", 0.5, norm), torch.randn(2, 3, 24), torch.randn(2, 3, 24)
    assert torch.equal(adapter(x), x) and torch.equal(adapter(x, other), other)
    for parameter in adapter.parameters():
        nn.init.normal_(parameter)

    def update(x):
        hidden = nn.functional.gelu(adapter.down(adapter.norm(x) if norm == "before" else x), approximate="tanh")
        y = 0.5 * adapter.up(hidden)
        return adapter.norm(y) if norm == "after" else y

    assert torch.allclose(adapter(x), x + update(x), atol=1e-4)
    assert torch.allclose(adapter(x, other), other + update(x), atol=1e-4)
    half = copy.deepcopy(adapter)(x.bfloat16())
    assert half.dtype == torch.bfloat16 and (half - adapter(x)).norm() < 0.02 * adapter(x).norm()


def test_several_by_name_switch_delete_and_copy():
    model, ids = llama().eval(), tokens()
    base = logits(model, ids).detach()
    add_bottleneck(model, BottleneckConfig("houlsby", r=4), "a")
    add_bottleneck(model, BottleneckConfig("parallel", r=8, activation="silu"), "b")
    randomize(model, "a"), randomize(model, "b")
    assert active_bottleneck(model) == "b"
    outputs = {}
    for name in ("a", "b"):
        set_bottleneck(model, name)
        outputs[name] = logits(model, ids).detach()
        trainable = [key for key, p in model.named_parameters() if p.requires_grad]
        assert trainable and all(f".bottleneck.{name}." in key for key in trainable)
    assert not torch.allclose(outputs["a"], outputs["b"], atol=1e-3)
    set_bottleneck(model, None)
    assert torch.equal(logits(model, ids), base)
    set_bottleneck(model, "a")
    clone = copy.deepcopy(model)
    randomize(model, "a")
    assert torch.equal(logits(clone, ids), outputs["a"])
    delete_bottleneck(clone, "a")
    assert active_bottleneck(clone) is None and torch.equal(logits(clone, ids), base)
    set_bottleneck(clone, "b")
    assert torch.equal(logits(clone, ids), outputs["b"])


def test_merged_adapters_do_what_they_do_together():
    model, ids = llama().eval(), tokens()
    for name, r, scaling in (("a", 4, 0.5), ("b", 7, 2.0)):
        add_bottleneck(model, BottleneckConfig("houlsby", r=r, scaling=scaling, activation="gelu"), name)
        randomize(model, name)
    merge_bottlenecks(model, ["a", "b"], [0.3, -0.6], "both")
    adapters, x = model.model.layers[0].mlp.bottleneck, torch.randn(5, 128)
    expected = x + 0.3 * (adapters["a"](x) - x) - 0.6 * (adapters["b"](x) - x)
    assert torch.allclose(adapters["both"](x), expected, atol=1e-4) and adapters["both"].down.out_features == 11
    assert active_bottleneck(model) == "both" and logits(model, ids).isfinite().all()
    add_bottleneck(model, BottleneckConfig("houlsby", norm="after"), "normed")
    for names, weights, match in ((["a", "normed"], [1, 1], "no norm"), (["a"], [1, 2], "1 adapters and 2 weights"),
                                  (["c"], [1], "no adapter 'c'")):  # fmt: skip
        with pytest.raises(ValueError, match=match):
            merge_bottlenecks(model, names, weights, "other")


@pytest.mark.parametrize("placement,norm", [("houlsby", "none"), ("parallel", "before"), ("pfeiffer", "after")])
@pytest.mark.parametrize("kind", ("llama4bit", "bert", "t5"))
def test_files_give_the_same_logits(kind, placement, norm, tmp_path):
    model, ids = MODELS[kind]().eval(), tokens()
    plain = copy.deepcopy(model)
    add_bottleneck(model, BottleneckConfig(placement, r=6, activation="silu", scaling=2, norm=norm), "mine")
    randomize(model, "mine")
    with torch.no_grad():
        expected = logits(model, ids)
        save_bottleneck(model, tmp_path)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
        load_bottleneck(plain, tmp_path, "yours")
        assert active_bottleneck(plain) == "yours" and torch.equal(logits(plain, ids), expected)


def test_files_that_do_not_fit_are_refused_and_nothing_is_changed(tmp_path):
    model = llama()
    add_bottleneck(model, BottleneckConfig("houlsby", r=4))
    save_bottleneck(model, tmp_path)
    path = tmp_path / "adapter_config.json"
    config = json.loads(path.read_text())
    other = gpt2()
    keys = list(other.state_dict())

    def refused(match, target=other, **changes):
        path.write_text(json.dumps({key: value for key, value in (config | changes).items() if value != "drop"}))
        with pytest.raises(ValueError, match=match):
            load_bottleneck(target, tmp_path)

    refused("does not fit the model")
    refused("not a bottleneck adapter", method="lora")
    refused("should have", r="drop")
    refused("should have", surprise=1)
    refused("r is 'x'", r="x")
    refused("activation is 'tanh'", activation="tanh")
    refused("does not fit the model", llama(), r=5)
    refused("does not fit the model", llama(), placement="pfeiffer")
    refused("named 'default'", model)
    (tmp_path / "adapter_model.safetensors").write_bytes(b"nonsense")
    refused("damaged")
    assert keys == list(other.state_dict()) and all(p.requires_grad for p in other.parameters())


def test_bad_input():
    with pytest.raises(ValueError, match="has no layer of LlamaDecoderLayer"):
        add_bottleneck(nn.Linear(3, 3))
    model = llama()
    for name in ("", "a.b"):
        with pytest.raises(ValueError, match="cannot be named"):
            add_bottleneck(model, name=name)
    assert all(p.requires_grad for p in model.parameters())
    with pytest.raises(ValueError, match="no adapter 'x'"):
        set_bottleneck(model, "x")
    for options, match in (({"placement": "left"}, "placement is 'left'"), ({"norm": "both"}, "norm is 'both'"),
                           ({"r": 0}, "r is 0"), ({"scaling": "1"}, "scaling is '1'")):  # fmt: skip
        with pytest.raises(ValueError, match=match):
            BottleneckConfig(**options)
    with pytest.raises(ValueError, match="r is 0"):
        BottleneckAdapter(8, 0)


@pytest.mark.parametrize("placement", ("houlsby", "parallel"))
@pytest.mark.parametrize("reentrant", (True, False))
def test_checkpointing(placement, reentrant):
    model, ids = llama().train(), tokens()
    add_bottleneck(model, BottleneckConfig(placement, r=4))
    randomize(model, "default")

    def gradients():
        model(input_ids=ids, labels=ids).loss.backward()
        found = [p.grad.clone() for p in model.parameters() if p.requires_grad]
        model.zero_grad()
        return found

    plain = gradients()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-6) for a, b in zip(plain, gradients(), strict=True))


@pytest.mark.parametrize("placement", ("houlsby", "parallel"))
def test_compile_has_no_graph_break(placement):
    model, ids = llama().eval(), tokens()
    add_bottleneck(model, BottleneckConfig(placement, r=4))
    randomize(model, "default")
    expected = logits(model, ids).detach()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert torch.allclose(logits(compiled, ids), expected, atol=1e-5)


def test_a_classifier_learns_a_separable_task():
    torch.manual_seed(1)
    model = bert().train()
    add_bottleneck(model, BottleneckConfig("houlsby", r=8))
    model.classifier.requires_grad_(True)
    ids = torch.randint(2, VOCAB, (64, 8))
    labels = (ids[:, 3] > VOCAB // 2).long()
    ids[:, 1] = labels + 5  # what it can learn from
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-2)
    for _ in range(60):
        model(input_ids=ids, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    accuracy = (model.eval()(input_ids=ids).logits.argmax(1) == labels).float().mean()
    assert accuracy > 0.9
