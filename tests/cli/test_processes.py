import json
import os
import subprocess
import sys

import pytest


@pytest.mark.slow
def test_two_processes_train_as_one_run(model_dir, jsonl, tmp_path):
    """As `torchrun --nproc_per_node 2`, on the CPU: one of them speaks and writes."""
    run = tmp_path / "run"
    command = f"-m torch.distributed.run --standalone --nproc_per_node 2 -m fastpeft finetune --model {model_dir} "
    options = f"--data {jsonl} --output {run} --method qlora --steps 2 --seq-len 32 --rank 4 --lr 0.01"
    done = subprocess.run(
        [sys.executable, *(command + options).split()],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("parameters train") == 1
    assert done.stdout.count("step 2: evaluation loss") == 1
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["processes"] == 2
    assert metrics["eval_loss_after"] < metrics["eval_loss_before"]
    assert not (run / "checkpoints").exists()
