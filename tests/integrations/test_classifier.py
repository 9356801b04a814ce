"""A BERT with random weights learns a small separable task by each method, through the calls of the library."""

import pytest
import torch
from torch.nn.functional import cross_entropy

import fastpeft
from fastpeft.memory import METHODS

VOCABULARY, LENGTH, OWN = 32, 12, 11
# AdamW, on a model of two layers that knows nothing; by the first word of the method's family.
LR = {"lora": 3e-3, "dora": 3e-3, "adapter": 1e-2, "prefix": 0.1, "prompt": 0.1, "p-tuning-v2": 1e-2, "p-tuning": 3e-3,
      "ia3": 0.1, "full": 1e-3, "head": 0.1}  # fmt: skip


def bert(four_bit):
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=VOCABULARY, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=64, initializer_range=0.2, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    model = BertForSequenceClassification(config)
    if four_bit:
        quantize(model)
    return model


def quantize(model):
    """The linears of the layers, as `from_pretrained` does."""
    from bitsandbytes.nn import Linear4bit

    for layer in model.bert.encoder.layer:
        for name, linear in [(n, m) for n, m in layer.named_modules() if type(m) is torch.nn.Linear]:
            packed = Linear4bit(linear.in_features, linear.out_features, quant_type="nf4", compute_dtype=torch.float32)
            packed.load_state_dict(linear.state_dict())
            layer.set_submodule(name, packed.to("cpu"))
    model.is_loaded_in_4bit = True


def with_method(model, method):
    """The model as it trains; the head is new, and trains in full."""
    from peft import (
        IA3Config,
        LoraConfig,
        PrefixTuningConfig,
        PromptEncoderConfig,
        PromptTuningConfig,
        get_peft_model,
    )  # fmt: skip

    if method == "full":
        return model
    if method == "head":
        model.requires_grad_(False)
        model.classifier.requires_grad_(True)
        return model
    if method.startswith("adapter-"):
        config = fastpeft.nn.BottleneckConfig(method.removeprefix("adapter-"), r=8)
        fastpeft.nn.add_bottleneck(model, config)
        model.classifier.requires_grad_(True)
        return model
    lora = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"}
    config_class, options = {
        "lora": (LoraConfig, lora),
        "dora": (LoraConfig, lora | {"use_dora": True}),
        "ia3": (IA3Config, {}),
        "prefix": (PrefixTuningConfig, {"num_virtual_tokens": 4}),
        "p-tuning-v2": (PrefixTuningConfig, {"num_virtual_tokens": 4, "prefix_projection": True}),
        "prompt": (PromptTuningConfig, {"num_virtual_tokens": 4}),
        "p-tuning": (PromptEncoderConfig, {"num_virtual_tokens": 4}),
    }[method.removeprefix("q")]
    return get_peft_model(model, config_class(task_type="SEQ_CLS", **options))


def examples(count, seed):
    """A class is which half of the vocabulary all words but one are of."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 2, (count,), generator=generator)
    half = labels[:, None].expand(-1, LENGTH).clone()
    half[:, OWN:] = 1 - half[:, OWN:]
    ids = torch.randint(0, VOCABULARY // 2, (count, LENGTH), generator=generator) + half * (VOCABULARY // 2)
    order = torch.rand(count, LENGTH, generator=generator).argsort(1)
    return ids.gather(1, order), labels


def accuracy(model, ids, labels):
    with torch.no_grad():
        found = model.eval()(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.argmax(-1)
    return (found == labels).double().mean().item()


def train(model, lr):
    """Returns the accuracy on other examples."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr, weight_decay=0.0)
    ids, labels = examples(4096, seed=1)
    torch.manual_seed(0)
    model.train()
    for _ in range(90):
        rows = torch.randint(0, len(ids), (32,))
        logits = model(input_ids=ids[rows], attention_mask=torch.ones_like(ids[rows])).logits
        optimizer.zero_grad()
        cross_entropy(logits, labels[rows]).backward()
        optimizer.step()
    return accuracy(model, *examples(200, seed=2))


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("method", METHODS)
def test_each_method_learns(method):
    model = with_method(bert(METHODS[method].four_bits), method)
    fastpeft.accelerate(model)
    before = {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}
    name = method.removeprefix("q")
    assert train(model, LR["adapter" if name.startswith("adapter") else name]) > 0.9
    after = dict(model.named_parameters())
    assert [name for name in before if not torch.equal(before[name], after[name])] == []


def test_the_head_alone_does_not():
    assert train(with_method(bert(False), "head"), LR["head"]) < 0.9
