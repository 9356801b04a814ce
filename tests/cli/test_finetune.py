import json

import pytest

import fastpeft


@pytest.mark.slow
def test_a_prefix_trains_with_gradient_checkpointing(finetune, trained, read_metrics, tmp_path):
    """peft refuses; the losses are those of a run without."""
    options = {"method": "prefix", "rank": None}
    assert finetune(output=tmp_path / "plain", **options)[0] == 0
    code, _, err = finetune(output=tmp_path / "checkpointing", gradient_checkpointing=True, **options)
    assert (code, err) == (0, "")
    assert trained["model"].is_gradient_checkpointing
    plain, checkpointing = (read_metrics(tmp_path / name)["eval_loss_after"] for name in ("plain", "checkpointing"))
    assert checkpointing == pytest.approx(plain, abs=1e-4)


@pytest.mark.slow
def test_stock_peft_learns_the_same(finetune, read_metrics, tmp_path):
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


def test_options_reach_the_run(finetune, trained, read_metrics, tmp_path):
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
