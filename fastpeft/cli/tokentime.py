"""The time of decoding a token with the adapter, beside it merged into the weights, and without it."""

import contextlib
import statistics
import time

NEW_TOKENS = 16


def token_ms(model, ids) -> float:
    """Of a greedy continuation with a cache of keys and values; the pass over the prompt is shared out."""
    import torch

    def wait() -> None:
        if ids.device.type == "cuda":
            torch.cuda.synchronize()

    wait()
    start = time.perf_counter()
    with torch.no_grad():
        model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=NEW_TOKENS,
            min_new_tokens=NEW_TOKENS,
            do_sample=False,
            pad_token_id=0,  # one row: there is no padding
        )
    wait()
    return (time.perf_counter() - start) * 1000 / NEW_TOKENS


@contextlib.contextmanager
def without_bottleneck(model):
    from fastpeft.nn import active_bottleneck, set_bottleneck

    name = active_bottleneck(model)
    set_bottleneck(model, None)
    try:
        yield
    finally:
        set_bottleneck(model, name)


@contextlib.contextmanager
def merged(model):
    model.merge_adapter()
    try:
        yield
    finally:
        model.unmerge_adapter()


def arms(model) -> dict:
    """The states to time the model in, each as a context; none for a model whose own weights were trained."""
    from peft import PeftModel
    from peft.tuners.tuners_utils import BaseTuner

    from fastpeft.nn import active_bottleneck

    if isinstance(model, PeftModel):
        found = {"base": model.disable_adapter, "adapted": contextlib.nullcontext}
        # Not into 4 bits, whose rounding changes the model.
        if isinstance(model.base_model, BaseTuner) and not getattr(model, "is_loaded_in_4bit", False):
            found["merged"] = lambda: merged(model)
        return found
    if active_bottleneck(model) is not None:
        return {"base": lambda: without_bottleneck(model), "adapted": contextlib.nullcontext}
    return {}


@contextlib.contextmanager
def without_autocast(model):
    """The Trainer wraps it around `forward`, on the model itself; an answer does without."""
    wrapped = vars(model).pop("forward", None)
    try:
        yield
    finally:
        if wrapped is not None:
            model.forward = wrapped


def compare(model, prompt: list[int], rounds: int) -> dict[str, float | None]:
    """`token_ms_*` of base, adapted and merged, None where there is no such thing. Leaves a model that was merged on
    the way with base weights that are rounded once more.

    By turns, as in steptime; the first round warms up. "base" is the same model with its adapter switched off,
    "merged" has the adapter's modules still in place, idle.
    """
    import torch

    from fastpeft.cli.progress import tell

    tell(description="timing answers")
    ids = torch.tensor([prompt], device=model.device)
    contexts = arms(model)
    times_ms = {arm: [] for arm in contexts}
    was_training = model.training
    model.eval()
    with without_autocast(model):
        for _ in range(rounds + 1):
            for arm, context in contexts.items():
                with context():
                    times_ms[arm].append(token_ms(model, ids))
    model.train(was_training)
    medians = {arm: statistics.median(times[1:]) for arm, times in times_ms.items()}
    return {f"token_ms_{arm}": medians.get(arm) for arm in ("base", "adapted", "merged")}
