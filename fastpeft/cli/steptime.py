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


def compare(trainer, steps: int, *, accelerated: bool, of_peft: bool) -> dict[str, float | None]:
    """Medians. The two take turns, in reversed order from pair to pair, so that a machine that slows down or speeds up
    does so for both; the first pair warms up.

    accelerated: the state in which to leave the model. of_peft: False where there is no stock peft to compare with;
    then its time and the speedup are None.
    """
    import fastpeft
    from fastpeft.cli.progress import tell

    tell(description="timing steps")
    trainer.model.train()
    batch = next(iter(trainer.get_train_dataloader()))
    arms = {"accelerated": fastpeft.accelerate} | ({"peft": fastpeft.restore} if of_peft else {})
    times_ms = {arm: [] for arm in arms}
    for pair in range(steps + 1):
        for arm, prepare in sorted(arms.items(), reverse=pair % 2 == 0):
            prepare(trainer.model)
            times_ms[arm].append(one_step_ms(trainer, batch))
    arms["accelerated" if accelerated else "peft"](trainer.model)
    trainer.model.zero_grad(set_to_none=True)
    medians_ms = {arm: statistics.median(times[1:]) for arm, times in times_ms.items()}
    peft_ms, accelerated_ms = medians_ms.get("peft"), medians_ms["accelerated"]
    return {
        "step_ms_peft": peft_ms,
        "step_ms_accelerated": accelerated_ms,
        "speedup": peft_ms and peft_ms / accelerated_ms,
    }
