import json

import pytest
import torch
from safetensors.torch import load_file


@pytest.fixture
def interrupt(monkeypatch):
    """Makes the next run stop as Ctrl-C does, after so many steps."""
    from fastpeft.cli.progress import ProgressBar

    on_step_end = ProgressBar.on_step_end

    def arm(steps):
        def stop(self, args, state, control, **kwargs):
            on_step_end(self, args, state, control, **kwargs)
            if state.global_step == steps:
                raise KeyboardInterrupt

        monkeypatch.setattr(ProgressBar, "on_step_end", stop)

    yield arm


def final_loss(path):
    return json.loads((path / "metrics.json").read_text())["eval_loss_after"]


def test_resumed_run_ends_as_the_uninterrupted_one(finetune, interrupt, monkeypatch, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert finetune(output=whole, steps=6)[0] == 0

    interrupt(5)  # checkpoints are written every second step
    assert finetune(output=parts, steps=6)[0] == 130
    monkeypatch.undo()
    assert [p.name for p in parts.iterdir()] == ["checkpoints"]

    code, _, err = finetune(output=parts, steps=6)
    assert code == 2
    assert "--resume" in err
    code, _, err = finetune(output=parts, steps=6, resume=True, rank=5)
    assert code == 2
    assert "rank 4, not 5" in err

    code, out, err = finetune(output=parts, steps=6, resume=True)
    assert (code, err) == (0, "")
    assert "step 0:" not in out  # it did not start again
    assert final_loss(parts) == pytest.approx(final_loss(whole), abs=2e-3)
    assert json.loads((parts / "metrics.json").read_text())["eval_loss_before"] > 5
    assert not (parts / "checkpoints").exists()


def test_a_resumed_p_tuning_v2_has_its_mlp_back(finetune, interrupt, monkeypatch, tmp_path):
    """peft saves what the MLP makes, from which it cannot be trained on."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    options = {"method": "p-tuning-v2", "rank": None, "steps": 6}
    assert finetune(output=whole, **options)[0] == 0
    interrupt(5)
    assert finetune(output=parts, **options)[0] == 130
    monkeypatch.undo()
    code, _, err = finetune(output=parts, resume=True, **options, no_accelerate=True)
    assert code == 2
    code, _, err = finetune(output=parts, resume=True, **options)
    assert (code, err) == (0, "")
    ours, theirs = (load_file(path / "adapter_model.safetensors")["prompt_embeddings"] for path in (parts, whole))
    torch.testing.assert_close(ours, theirs, rtol=0.02, atol=0.02)


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
