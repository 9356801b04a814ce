"""fastpeft.memory against what is really allocated: models of tiny size, a CPU, torch's own record of allocations."""

import importlib
from dataclasses import replace

import pytest
import torch
from transformers import (
    BertConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
    T5Config,
)

import fastpeft
from benchmarks.harness import Device
from benchmarks.memory import peak_bytes, saved_bytes
from fastpeft import memory
from fastpeft.memory import METHODS, Options, estimate, shape_of
from fastpeft.nn import BottleneckConfig, add_bottleneck
from fastpeft.ops import cross_entropy, prefix_attention_eager, products
from tests import models

SIZES = dict(
    hidden_size=64,
    intermediate_size=192,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    vocab_size=128,
)
LLAMA = LlamaConfig(**SIZES)
WIDE_VOCABULARY = LlamaConfig(**SIZES | dict(vocab_size=4096, tie_word_embeddings=True))
QWEN3 = Qwen3Config(**SIZES)
# Dropout inside attention: a CPU has no kernel that keeps no scores then.
GPT2 = GPT2Config(n_embd=64, n_layer=4, n_head=4, vocab_size=128, n_positions=256, attn_pdrop=0)
OPTIONS = Options(rank=4, bottleneck=8, positions=5)


def auto(config, device="cpu"):
    from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSeq2SeqLM

    classes = {"bert": AutoModel, "t5": AutoModelForSeq2SeqLM}
    with torch.device(device):
        return classes.get(config.model_type, AutoModelForCausalLM).from_config(config)


def peft_config(method, config):
    import peft

    common = {"task_type": "CAUSAL_LM"}
    positions = common | {"num_virtual_tokens": OPTIONS.positions}
    if method.endswith(("lora", "dora")):
        return peft.LoraConfig(r=4, target_modules="all-linear", use_dora=method.endswith("dora"), **common)
    if method == "ia3":
        return peft.IA3Config(**common)  # peft's own choice of targets
    if method in ("prefix", "p-tuning-v2"):
        return peft.PrefixTuningConfig(prefix_projection=method == "p-tuning-v2", **positions)
    if method == "prompt":
        return peft.PromptTuningConfig(**positions)
    return peft.PromptEncoderConfig(**positions)


def bottleneck_config(method):
    return BottleneckConfig(placement=method.removeprefix("adapter-"), r=OPTIONS.bottleneck)


def adapted(model, config, method):
    from peft import get_peft_model

    if method.startswith("adapter-"):
        add_bottleneck(model, bottleneck_config(method))
        fastpeft.accelerate(model)
        return model
    model = get_peft_model(model, peft_config(method, config))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    fastpeft.accelerate(model, strict=True)  # what peft's own code allocates is not what is estimated
    return model


def trained(config, method):
    """As finetune makes it: a base in bf16 or nf4, and everything that trains in float32."""
    model = auto(config)
    if method == "full":
        fastpeft.accelerate(model)
        return model.train()
    model = model.to(torch.bfloat16)
    if METHODS[method].four_bits:
        models.quantize(model, torch.bfloat16)
    return adapted(model, config, method).train()


def storage(model):
    tensors = {id(t): t for t in (*model.parameters(), *model.buffers())}
    for module in model.modules():
        state = getattr(getattr(module, "weight", None), "quant_state", None)
        for part in (state, getattr(state, "state2", None)):
            tensors |= {id(t): t for t in (getattr(part, "absmax", None),) if t is not None}
    frozen = sum(t.nbytes for t in tensors.values() if not t.requires_grad)
    return frozen, sum(t.nbytes for t in tensors.values() if t.requires_grad)


def measured(config, method, batch_size, seq_len, checkpointing):
    """(weights and adapters, optimizer, saved, peak) in bytes, of the second step: the optimizer has its state."""
    model = trained(config, method)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        if method != "full":
            model.enable_input_require_grads()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], fused=True)
    tokens = torch.randint(0, config.vocab_size, (batch_size, seq_len))

    def forward():
        with torch.autocast("cpu", torch.bfloat16):
            return model(input_ids=tokens, labels=tokens, use_cache=False).loss

    def step():
        forward().backward()
        optimizer.step()

    step()
    optimizer.zero_grad(set_to_none=True)
    saved = saved_bytes(forward, model)
    optimizer.zero_grad(set_to_none=True)
    frozen, trainable = storage(model)
    state = sum(t.nbytes for of in optimizer.state.values() for t in of.values())
    return frozen, trainable, state, saved, frozen + trainable + state + peak_bytes(step, Device(torch.device("cpu")))


@pytest.mark.parametrize(
    ("config", "method", "batch_size", "seq_len", "checkpointing"),
    [
        (LLAMA, "lora", 2, 128, False),
        (LLAMA, "lora", 1, 200, True),
        (LLAMA, "qlora", 2, 128, False),
        (LLAMA, "qlora", 4, 64, True),
        (LLAMA, "dora", 2, 128, False),
        (LLAMA, "dora", 2, 128, True),
        (LLAMA, "qdora", 1, 256, False),
        (LLAMA, "ia3", 2, 128, False),
        (LLAMA, "ia3", 2, 128, True),
        (LLAMA, "adapter-houlsby", 2, 128, False),
        (LLAMA, "adapter-houlsby", 2, 128, True),
        (LLAMA, "adapter-pfeiffer", 2, 128, False),  # of the first layer only the adapter is kept
        (LLAMA, "adapter-parallel", 2, 128, False),
        (LLAMA, "adapter-parallel", 2, 128, True),
        (LLAMA, "prefix", 2, 128, False),
        (LLAMA, "prefix", 2, 128, True),
        (LLAMA, "p-tuning-v2", 2, 128, False),
        (LLAMA, "p-tuning-v2", 2, 128, True),
        (LLAMA, "prompt", 2, 128, False),
        (LLAMA, "prompt", 2, 128, True),
        (LLAMA, "p-tuning", 2, 128, False),
        (LLAMA, "p-tuning", 2, 128, True),
        (GPT2, "prefix", 2, 128, False),
        (GPT2, "p-tuning-v2", 2, 128, False),
        (GPT2, "prompt", 2, 128, False),
        (GPT2, "p-tuning", 2, 128, False),
        (LLAMA, "full", 4, 64, False),
        (LLAMA, "full", 1, 16, False),  # gradients outweigh activations
        (LLAMA, "full", 2, 128, True),
        (WIDE_VOCABULARY, "lora", 2, 128, False),
        (WIDE_VOCABULARY, "lora", 2, 128, True),
        (WIDE_VOCABULARY, "full", 2, 128, True),
        (WIDE_VOCABULARY, "full", 1, 32, False),  # the tied embedding's two gradients
        (QWEN3, "lora", 2, 128, False),
        (GPT2, "lora", 2, 128, False),
        (GPT2, "lora", 2, 128, True),
        (GPT2, "adapter-houlsby", 2, 128, False),
        (GPT2, "adapter-pfeiffer", 2, 128, False),
        (GPT2, "ia3", 2, 128, False),
        (GPT2, "full", 2, 128, False),
    ],
    ids=lambda value: getattr(value, "model_type", None),
)
def test_a_step(monkeypatch, config, method, batch_size, seq_len, checkpointing):
    monkeypatch.setattr(memory.os, "cpu_count", torch.get_num_threads)
    # The estimate is of a CPU with instructions for bf16. Without them products have float32 tiles, which at these
    # sizes are as large as all else.
    for ops in (products, prefix_attention_eager):
        monkeypatch.setattr(ops, "multiplies_natively", lambda dtype: True)
    found = estimate(
        config,
        method,
        batch_size=batch_size,
        seq_len=seq_len,
        optimizer="adamw_torch_fused",
        gradient_checkpointing=checkpointing,
        options=OPTIONS,
        device="cpu",
    )
    frozen, trainable, state, saved, peak = measured(config, method, batch_size, seq_len, checkpointing)
    print(f"{config.model_type} {method}: {found}, measured {frozen, trainable, state, saved, peak}")
    assert found.trainable * 4 == found.gradients == trainable
    assert found.weights + found.adapters == pytest.approx(frozen + trainable, rel=0.02)
    assert found.optimizer == pytest.approx(state, rel=0.01)
    if not checkpointing:
        assert found.activations == pytest.approx(saved, rel=0.1)
    assert found.peak == pytest.approx(peak, rel=0.1)


COUNTED = [
    LLAMA,
    LlamaConfig(**SIZES | dict(attention_bias=True, mlp_bias=True, tie_word_embeddings=True)),
    MistralConfig(**SIZES),
    Qwen2Config(**SIZES),
    QWEN3,
    GPT2,
    BertConfig(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=96, vocab_size=97),
    T5Config(d_model=64, d_ff=96, d_kv=16, num_layers=2, num_decoder_layers=3, num_heads=4, vocab_size=97),
]


@pytest.mark.parametrize("config", COUNTED, ids=lambda config: config.model_type)
def test_parameters(config):
    from peft import LoraConfig, get_peft_model

    model = auto(config, "meta")
    shape = shape_of(config)
    assert shape.parameters == model.num_parameters()
    assert shape.checked == (config.model_type not in ("bert", "t5"))
    # By peft's pattern of names, since "all-linear" means BERT's pooler too, which is no layer's.
    names = {linear.name.rsplit(".", 1)[-1] for layers in shape.layers for linear in layers.linears}
    pattern = rf".*(layer|layers|h|block)\.\d+\..*({'|'.join(names)})"
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules=pattern))
    assert METHODS["lora"].parameters(shape, OPTIONS) == adapted.get_nb_trainable_parameters()[0]


@pytest.mark.parametrize("config", [LLAMA, GPT2], ids=lambda config: config.model_type)
@pytest.mark.parametrize("method", ["lora", "dora", "ia3", "prefix", "p-tuning-v2", "prompt", "p-tuning"])
def test_trainable_parameters(config, method):
    from peft import get_peft_model

    model = get_peft_model(auto(config), peft_config(method, config))
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert METHODS[method].parameters(shape_of(config), OPTIONS) == trainable


@pytest.mark.parametrize("config", [LLAMA, GPT2], ids=lambda config: config.model_type)
@pytest.mark.parametrize("method", ["adapter-houlsby", "adapter-pfeiffer", "adapter-parallel"])
def test_trainable_parameters_of_bottlenecks(config, method):
    model = auto(config, "meta")
    add_bottleneck(model, bottleneck_config(method))
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert METHODS[method].parameters(shape_of(config), OPTIONS) == trainable


def test_the_buffer_of_the_loss_is_the_one_that_the_loss_has():
    assert importlib.import_module(cross_entropy.__module__)._BUFFER_BYTES == memory.LOSS_BUFFER


def test_the_block_of_attention_is_the_one_that_prefix_attention_has():
    assert prefix_attention_eager._BLOCK_ELEMENTS["cpu"] == memory.SCORES_BLOCK


def test_8_bit_states():
    import bitsandbytes as bnb

    parameter = torch.nn.Parameter(torch.randn(256, 128))
    optimizer = bnb.optim.AdamW8bit([parameter])
    parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    state = optimizer.state[parameter]
    found = sum(state[name].nbytes for name in ("state1", "state2", "absmax1", "absmax2"))
    assert memory.OPTIMIZERS["adamw_8bit"][0] * parameter.numel() == found


def test_parts_grow_with_what_they_depend_on():
    def of(method="lora", **changes):
        return estimate(LLAMA, method, options=OPTIONS, **changes)

    small = of()
    assert of(seq_len=512).activations > small.activations == of(batch_size=1, seq_len=512).activations
    assert of(gradient_checkpointing=True).activations < small.activations
    assert of("qlora").weights < small.weights == of("dora").weights
    assert of("ia3", four_bits=True).weights == of("qlora").weights
    assert of("prompt").activations > of("prefix").activations == of("p-tuning-v2").activations
    assert of("p-tuning-v2").stored == of("prefix").stored < of("p-tuning-v2").trainable
    assert of(optimizer="sgd").optimizer == 0
    for method in METHODS:
        found = of(method)
        parts = (found.weights, found.adapters, found.gradients, found.optimizer, found.activations, found.workspace)
        assert all(part >= 0 for part in parts)
        assert found.weights + found.adapters + found.optimizer < found.peak <= sum(parts)


def test_a_shape_serves_instead_of_a_configuration():
    shape = shape_of(LLAMA)
    assert estimate(shape, "lora") == estimate(LLAMA, "lora")
    deeper = replace(shape, layers=(replace(shape.layers[0], count=8),))
    assert estimate(deeper, "lora").adapters == 2 * estimate(shape, "lora").adapters


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"method": "magic"}, "magic"),
        ({"optimizer": "sgdd"}, "sgdd"),
        ({"seq_len": 0}, "seq_len is 0"),
        ({"options": Options(rank=0)}, "rank is 0"),
        ({"method": "full", "four_bits": True}, "4 bits"),
    ],
)
def test_bad_input(changes, words):
    arguments = {"method": "lora"} | changes
    with pytest.raises(ValueError, match=words):
        estimate(LLAMA, **arguments)


def test_the_steps_that_products_take():
    def of(method, **changes):
        return memory.step_seconds(shape_of(LLAMA), method, seq_len=4096, options=OPTIONS, **changes)

    assert of("prefix") < of("ia3") < of("lora") < of("full")
    assert of("lora") < of("qlora")
    assert of("prefix") < of("prompt")
    assert of("lora") < of("lora", gradient_checkpointing=True)
