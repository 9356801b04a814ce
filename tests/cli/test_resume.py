import json

import pytest
import torch
from safetensors.torch import load_file

OPTIONS = {
    "lora": {"rank": 4},
    "adapter-houlsby": {"rank": None, "bottleneck": 4},
    "p-tuning-v2": {"rank": None, "prefix_length": 6},
    "p-tuning": {"rank": None, "prefix_length": 6},
    "full": {"rank": None, "lr": 1e-3},
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "no_accelerate"),
    [(method, False) for method in OPTIONS] + [("p-tuning-v2", True)],
)
def test_resumed_run_ends_as_the_uninterrupted_one(
    method, no_accelerate, finetune, interrupt, monkeypatch, read_metrics, tmp_path
):
    """Of P-Tuning and P-Tuning v2 peft saves what a network makes, from which it cannot be trained on."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    options = OPTIONS[method] | {"method": method, "steps": 6, "no_accelerate": no_accelerate}
    assert finetune(output=whole, **options)[0] == 0

    interrupt(5)  # checkpoints are written every second step
    assert finetune(output=parts, **options)[0] == 130
    monkeypatch.undo()
    assert [p.name for p in parts.iterdir()] == ["checkpoints"]
    written = [p.name for p in (parts / "checkpoints" / "checkpoint-4").iterdir()]
    assert ("model.safetensors" in written) == (method == "full")
    assert "training_args.bin" not in written

    code, out, err = finetune(output=parts, resume=True, **options)
    assert (code, err) == (0, "")
    assert "step 0:" not in out  # it did not start again
    weights = "model.safetensors" if method == "full" else "adapter_model.safetensors"
    ours, theirs = (load_file(path / weights) for path in (parts, whole))
    torch.testing.assert_close(ours, theirs, rtol=0.02, atol=2e-3)
    ours, theirs = read_metrics(parts), read_metrics(whole)
    assert [step for step, _ in ours["loss_curve"]] == [1, 2, 3, 4, 5, 6]
    assert ours["eval_loss_curve"][0] == theirs["eval_loss_curve"][0]
    assert ours["eval_loss_after"] == pytest.approx(theirs["eval_loss_after"], abs=2e-3)
    assert not (parts / "checkpoints").exists()


def test_an_interrupted_run_goes_on_with_its_own_settings_only(finetune, interrupt, monkeypatch, tmp_path):
    interrupt(3)
    assert finetune(steps=6)[0] == 130
    monkeypatch.undo()
    code, _, err = finetune(steps=6)
    assert code == 2
    assert "--resume" in err
    code, _, err = finetune(steps=6, resume=True, rank=5)
    assert code == 2
    assert "rank 4, not 5" in err


def test_interrupted_between_training_and_results(finetune, monkeypatch, tmp_path):
    from fastpeft.cli.output import Output

    def stop(self, metrics):
        raise KeyboardInterrupt

    monkeypatch.setattr(Output, "finish", stop)
    assert finetune()[0] == 130
    monkeypatch.undo()
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["checkpoints"]
    code, _, err = finetune(resume=True)
    assert (code, err) == (0, "")
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["steps"] == 4
    assert metrics["eval_loss_after"] < metrics["eval_loss_before"] - 0.2


def test_interrupted_before_the_first_checkpoint_leaves_nothing(finetune, interrupt, tmp_path):
    interrupt(1)
    assert finetune(steps=10)[0] == 130
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_finished_run_is_replaced_only_when_told_and_only_when_the_new_one_is_done(
    finetune, interrupt, monkeypatch, tmp_path
):
    run = tmp_path / "run"
    assert finetune(steps=1)[0] == 0
    before = (run / "metrics.json").read_text()
    for more in ({}, {"resume": True}):
        code, _, err = finetune(steps=1, **more)
        assert code == 2
        assert "--overwrite" in err
    interrupt(1)
    assert finetune(steps=10, overwrite=True)[0] == 130
    monkeypatch.undo()
    assert (run / "metrics.json").read_text() == before
    assert not (run / "checkpoints").exists()
    assert finetune(steps=2, overwrite=True)[0] == 0
    assert json.loads((run / "metrics.json").read_text())["steps"] == 2


def test_resume_without_an_earlier_run_starts_one(finetune, tmp_path):
    assert finetune(steps=1, resume=True)[0] == 0
    assert (tmp_path / "run" / "metrics.json").exists()
