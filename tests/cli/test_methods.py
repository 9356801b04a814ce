"""Every method of `fastpeft finetune`: it learns, and what it leaves behind is what it trained."""

import json
import math

import pytest
import torch

import fastpeft
from fastpeft.cli.methods import OPTIONS, WAYS, Method
from fastpeft.cli.models import Dtype, choose_dtype, torch_dtype
from fastpeft.memory import METHODS

DTYPE = torch_dtype(choose_dtype(Dtype.auto, "cpu")[0])  # of a run on this machine


# For twelve steps of a tiny model, which the defaults are not made for.
LR = {"lora": 1e-2, "adapter": 1e-2, "ia3": 1e-1, "full": 3e-3, "prompt": 3e-2, "prefix": 1e-2}


def load_base(model_dir, *, four_bit=False, dtype=DTYPE):
    from transformers import AutoModelForCausalLM

    from fastpeft.cli.models import nf4
    from fastpeft.integrations.bitsandbytes import close_cpu_trap

    quantized = {"quantization_config": nf4(DTYPE)} if four_bit else {}
    base = AutoModelForCausalLM.from_pretrained(model_dir, dtype=dtype, **quantized)
    close_cpu_trap(base)
    return base


def reloaded(method, model_dir, run, four_bit):
    """By stock peft, where it is a method of peft."""
    from peft import PeftModel

    way = WAYS[method]
    if way.family == "full":
        return load_base(run, dtype=None)
    base = load_base(model_dir, four_bit=four_bit)
    if way.family == "adapter":
        fastpeft.nn.load_bottleneck(base, run)
        return base
    return PeftModel.from_pretrained(base, run)


def logits(model):
    ids = torch.arange(40).view(2, 20) * 5 % 250
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=torch.bfloat16 == DTYPE):
        return model.eval()(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.float()


def options_of(method):
    family = WAYS[method].family
    sizes = {"rank": 4, "bottleneck": 4, "prefix_length": 6}
    return {"rank": None, "lr": LR[family]} | {k: v for k, v in sizes.items() if k in OPTIONS[family]}


def test_recommend_and_finetune_know_the_same_methods():
    assert set(WAYS) == set(METHODS) == {method.value for method in Method}
    assert all(WAYS[name].four_bit == METHODS[name].four_bits for name in WAYS)


@pytest.mark.parametrize(
    ("method", "quantize"),
    [(method, None) for method in WAYS] + [("adapter-houlsby", "nf4"), ("prompt", "nf4")],
)
def test_it_learns_and_is_loaded_as_it_was_trained(
    method, quantize, finetune, trained, read_metrics, model_dir, tmp_path
):
    way, run = WAYS[method], tmp_path / "run"
    compare = {"compare_steps": 1}
    code, out, err = finetune(method=method, quantize=quantize, steps=6, **options_of(method), **compare)
    assert (code, err) == (0, "")
    names = {p.name for p in run.iterdir()}
    weights = "model.safetensors" if way.family == "full" else "adapter_model.safetensors"
    assert {weights, "tokenizer.json", "metrics.json", "loss.png", "sample.txt"} <= names
    assert not {"checkpoints", "training_args.bin"} & names
    assert way.family == "full" or "model.safetensors" not in names

    four_bit = way.four_bit or quantize is not None
    again = reloaded(method, model_dir, run, four_bit)
    ours, theirs = logits(trained["model"]), logits(again)
    base = logits(load_base(model_dir, four_bit=four_bit))
    assert theirs.shape[-2] == 20 + (6 if way.family == "prompt" else 0)
    theirs, ours = theirs[:, -20:], ours[:, -20:]
    learnt = (theirs - base).norm()
    assert learnt > 0.02 * base.norm()
    assert (ours - theirs).norm() < 0.05 * learnt  # accelerated and stock differ by rounding

    metrics = read_metrics(run)
    assert metrics["eval_loss_before"] == pytest.approx(math.log(258), abs=0.2)  # an untrained model knows nothing
    assert metrics["eval_loss_after"] < metrics["eval_loss_before"] - 0.001
    assert metrics["method"] == method
    assert metrics["adapter_bytes"] == (run / weights).stat().st_size
    trains = [p for p in trained["model"].parameters() if p.requires_grad]
    assert {p.dtype for p in trains} == {torch.float32}
    assert metrics["trainable_parameters"] == sum(p.numel() for p in trains)
    assert (metrics["trainable_parameters"] == metrics["total_parameters"]) == (way.family == "full")
    if way.of_peft:
        assert metrics["speedup"] == pytest.approx(metrics["step_ms_peft"] / metrics["step_ms_accelerated"])
        assert json.loads((run / "adapter_config.json").read_text())["base_model_name_or_path"] == str(model_dir)
    else:
        assert (metrics["step_ms_peft"], metrics["speedup"]) == (None, None)
        assert metrics["step_ms_accelerated"] > 0


@pytest.mark.parametrize(
    ("method", "accelerate"),
    [("lora", True), ("adapter-parallel", True), ("full", True)]
    + [(method, accelerate) for method in ("prefix", "prompt") for accelerate in (True, False)],
)
def test_the_evaluation_loss_of_conversations_is_the_mean_over_their_tokens(
    method, accelerate, finetune, read_metrics, model_dir, tokenizer, tmp_path
):
    """Several lie in one row, or beside padding, where virtual tokens come before each."""
    texts = ["short", "somewhat longer", "by far the longest of all of these"] * 4
    rows = [{"messages": [{"role": "user", "content": f"{i} {text}"}]} for i, text in enumerate(texts)]
    path = tmp_path / "chat.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = options_of(method) | {"eval_fraction": 0.25, "steps": 1, "batch_size": 4, "seq_len": 256}
    code, _, err = finetune(method=method, data=path, no_accelerate=not accelerate, **options)
    assert (code, err) == (0, "")

    from fastpeft.cli import data

    model = reloaded(method, model_dir, tmp_path / "run", False).eval()
    fastpeft.accelerate(model)
    total, count = 0.0, 0
    for row in data.load(str(path), 0.25, seed=0)[1]:
        ids = torch.tensor([tokenizer.apply_chat_template(row["messages"], tokenize=True, return_dict=False)])
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=torch.bfloat16 == DTYPE):
            loss = model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids).loss
        total, count = total + loss.item() * (ids.numel() - 1), count + ids.numel() - 1
    metrics = read_metrics(tmp_path / "run")
    assert metrics["eval_loss_after"] == pytest.approx(total / count, abs=4e-3)
    assert metrics["eval_loss_curve"][-1] == [1, metrics["eval_loss_after"]]
    assert [step for step, _ in metrics["loss_curve"]] == [1]
    assert metrics["peak_memory_bytes"] > 50 * 2**20
