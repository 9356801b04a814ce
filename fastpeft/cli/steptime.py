"""The time of a forward and backward pass with stock peft and accelerated, on the same model and batch."""

import statistics
import time


def one_step_ms(trainer, batch: dict) -> float:
    import torch

    def wait() -> None:
        if trainer.args.device.type == "cuda":
            torch.cuda.synchronize()

    trainer.model.zero_grad(set_to_none=True)
    wait()
    start = time.perf_counter()
    trainer.training_step(trainer.model_wrapped, dict(batch))
    wait()
    return (time.perf_counter() - start) * 1000


def compare(trainer, steps: int, *, accelerated: bool) -> dict[str, float]:
    """Alternates the two, so that a machine that slows down or speeds up does so for both; the first pair warms up.

    accelerated: the state in which to leave the model.
    """
    import fastpeft
    from fastpeft.cli import tokentime

    trainer.model.train()
    batch = next(iter(trainer.get_train_dataloader()))
    arms = {"peft": fastpeft.restore, "accelerated": fastpeft.accelerate}
    times_ms = {arm: [] for arm in arms}
    for _ in range(steps + 1):
        for arm, prepare in arms.items():
            prepare(trainer.model)
            times_ms[arm].append(one_step_ms(trainer, batch))
    arms["accelerated" if accelerated else "peft"](trainer.model)
    trainer.model.zero_grad(set_to_none=True)
    peft_ms, accelerated_ms = (statistics.mean(times_ms[arm][1:]) for arm in arms)
    return {
        "step_ms_peft": peft_ms,
        "step_ms_accelerated": accelerated_ms,
        "speedup": peft_ms / accelerated_ms,
        "curve": trainer.state.log_history,
    } | tokentime.compare(trainer.model, batch["input_ids"][:1], steps)
