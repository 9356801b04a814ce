import json
import math

import pytest

import fastpeft

METRICS = {
    "method": str,
    "model": str,
    "data": str,
    "eval_loss_before": float,
    "eval_loss_after": float,
    "tokens_per_second": float,
    "accelerated_modules": int,
    "trainable_parameters": int,
    "steps": int,
    "seconds": float,
    "device": str,
    "versions": dict,
}


def read_metrics(path):
    return json.loads((path / "metrics.json").read_text())


@pytest.fixture
def trained(monkeypatch):
    """Keeps the model of the run, which the command line does not return."""
    from fastpeft.cli.finetune import Run

    kept = {}
    write = Run.write

    def keep(self, trainer, *rest):
        kept["model"] = trainer.model
        write(self, trainer, *rest)

    monkeypatch.setattr(Run, "write", keep)
    return kept


def stock_model(model_dir, run, four_bit):
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from fastpeft.cli.models import nf4
    from fastpeft.integrations.bitsandbytes import close_cpu_trap

    quantized = {"quantization_config": nf4(torch.bfloat16)} if four_bit else {}
    base = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.bfloat16, **quantized)
    close_cpu_trap(base)
    return PeftModel.from_pretrained(base, run)


@pytest.mark.parametrize("method", ["lora", "qlora", "dora", "qdora"])
def test_adapter_is_the_trained_one_in_stock_peft(method, finetune, trained, model_dir, tmp_path):
    import torch

    code, out, err = finetune(method=method, compare_steps=1)
    assert (code, err) == (0, "")
    run = tmp_path / "run"
    names = {p.name for p in run.iterdir()}
    wanted = "adapter_config.json adapter_model.safetensors tokenizer.json metrics.json loss.png sample.txt"
    assert set(wanted.split()) <= names
    assert not {"checkpoints", "training_args.bin"} & names

    stock = stock_model(model_dir, run, method.startswith("q")).eval()
    ids = torch.arange(40).view(2, 20) * 5 % 250
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        ours = trained["model"].eval()(input_ids=ids).logits.float()
        theirs = stock(input_ids=ids).logits.float()
        with stock.disable_adapter():
            base = stock(input_ids=ids).logits.float()
    learnt = (theirs - base).norm()
    assert learnt > 0.1 * base.norm()
    assert (ours - theirs).norm() < 0.03 * learnt

    metrics = read_metrics(run)
    assert metrics["speedup"] == pytest.approx(metrics["step_ms_peft"] / metrics["step_ms_accelerated"])
    assert {k: type(metrics[k]) for k in METRICS} == METRICS
    assert metrics["method"] == method
    assert metrics["steps"] == 4
    assert metrics["accelerated_modules"] == fastpeft.accelerate(stock).fused
    assert metrics["trainable_parameters"] == sum(p.numel() for n, p in stock.named_parameters() if "lora_" in n)
    assert metrics["eval_loss_before"] == pytest.approx(math.log(258), abs=0.2)  # an untrained model knows nothing
    assert metrics["eval_loss_after"] < metrics["eval_loss_before"] - 0.2
    assert "accelerated" in out
    assert json.loads((run / "adapter_config.json").read_text())["base_model_name_or_path"] == str(model_dir)


@pytest.mark.parametrize("method", ["prefix", "p-tuning-v2"])
def test_a_prefix_is_the_trained_one_in_stock_peft(method, finetune, trained, model_dir, tmp_path):
    import torch

    options = {"rank": None, "lr": None, "steps": 12, "prefix_length": 6}
    code, _, err = finetune(method=method, compare_steps=1, **options)
    assert (code, err) == (0, "")
    stock = stock_model(model_dir, tmp_path / "run", False).eval()
    ids = torch.arange(40).view(2, 20) * 5 % 250
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        ours = trained["model"].eval()(input_ids=ids).logits.float()
        theirs = stock(input_ids=ids).logits.float()
        with stock.disable_adapter():
            base = stock(input_ids=ids).logits.float()
    assert (ours - theirs).norm() < 0.03 * (theirs - base).norm()
    assert stock.prompt_encoder["default"].embedding.weight.shape == (6, 2 * 2 * 32)
    metrics = read_metrics(tmp_path / "run")
    assert metrics["accelerated_modules"] == 1
    assert metrics["eval_loss_after"] < metrics["eval_loss_before"] - 0.002
    assert metrics["speedup"] == pytest.approx(metrics["step_ms_peft"] / metrics["step_ms_accelerated"])


def test_a_prefix_trains_with_gradient_checkpointing(finetune, trained, tmp_path):
    """peft refuses; the losses are those of a run without."""
    options = {"method": "prefix", "rank": None}
    assert finetune(output=tmp_path / "plain", **options)[0] == 0
    code, _, err = finetune(output=tmp_path / "checkpointing", gradient_checkpointing=True, **options)
    assert (code, err) == (0, "")
    assert trained["model"].is_gradient_checkpointing
    plain, checkpointing = (read_metrics(tmp_path / name)["eval_loss_after"] for name in ("plain", "checkpointing"))
    assert checkpointing == pytest.approx(plain, abs=1e-4)


def test_adapters_train_in_float32_on_a_4_bit_base(finetune, trained):
    import torch

    assert finetune(method="qlora", steps=1)[0] == 0
    assert {p.dtype for p in trained["model"].parameters() if p.requires_grad} == {torch.float32}


def test_stock_peft_learns_the_same(finetune, tmp_path):
    """The evaluation before training would spoil 4-bit training on some CPUs, were it not prevented."""
    finetune(method="qlora", output=tmp_path / "fast")
    finetune(method="qlora", output=tmp_path / "stock", no_accelerate=True)
    fast, stock = read_metrics(tmp_path / "fast"), read_metrics(tmp_path / "stock")
    assert stock["accelerated_modules"] == 0
    assert stock["eval_loss_before"] == pytest.approx(fast["eval_loss_before"], abs=0.02)
    assert stock["eval_loss_after"] == pytest.approx(fast["eval_loss_after"], abs=0.02)


def test_what_is_not_accelerated_is_said(finetune, monkeypatch):
    from fastpeft.integrations.peft import Report, Row

    report = Report([Row("a", "fused"), Row("b", "peft", "odd [shape]"), Row("c", "peft", "odd [shape]")])
    monkeypatch.setattr(fastpeft, "accelerate", lambda model: report)
    out = finetune(steps=1)[1]
    assert "1 adapter modules accelerated" in out
    assert "2 not accelerated: odd [shape]" in out


def test_options_reach_the_run(finetune, trained, tmp_path):
    code, _, err = finetune(
        target_modules="q_proj, v_proj",
        rank=3,
        alpha=5,
        dropout=0.1,
        eval_fraction=0,
        steps=1,
        optimizer="sgd",
        gradient_checkpointing=True,
    )
    assert (code, err) == (0, "")
    run = tmp_path / "run"
    config = json.loads((run / "adapter_config.json").read_text())
    assert sorted(config["target_modules"]) == ["q_proj", "v_proj"]
    assert (config["r"], config["lora_alpha"], config["lora_dropout"]) == (3, 5, 0.1)
    metrics = read_metrics(run)
    assert metrics["eval_loss_before"] is None
    assert metrics["eval_loss_after"] is None
    assert metrics["accelerated_modules"] == 4
    assert trained["model"].is_gradient_checkpointing
