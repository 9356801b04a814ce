"""One progress bar for the whole run, and the clock of the optimizer steps."""

import time
from collections.abc import Callable

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers import TrainerCallback

# In a process that trains for another one: what passes on the fields of its bar (`fastpeft.cli.compare_worker`).
listener: Callable[[dict], None] | None = None


def progress(console) -> Progress:
    """A task takes the field `loss` besides those of rich."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
    )


def tell(**fields) -> None:
    if listener is not None:
        listener(fields)


class ProgressBar(TrainerCallback):
    """`seconds` and `tokens` cover the optimizer steps of this process, without evaluation and checkpoints."""

    def __init__(self, console):
        self.bar = progress(console)
        self.seconds = 0.0
        self.tokens = 0

    def update(self, **fields) -> None:
        self.bar.update(self.task, **fields)
        tell(**fields)

    def on_train_begin(self, args, state, control, **kwargs):
        self.tokens_at_start = state.num_input_tokens_seen
        self.task = self.bar.add_task("training", total=state.max_steps, completed=state.global_step, loss="-")
        self.bar.start()

    def on_step_begin(self, args, state, control, **kwargs):
        self.update(description="training")
        self.step_start = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        self.seconds += time.perf_counter() - self.step_start
        self.tokens = state.num_input_tokens_seen - self.tokens_at_start
        self.update(completed=state.global_step)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" in logs:
            self.update(loss=f"{logs['loss']:.3f}")

    def on_prediction_step(self, args, state, control, **kwargs):
        self.update(description="evaluating")

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        self.bar.console.print(f"step {state.global_step}: evaluation loss {metrics['eval_loss']:.4f}", highlight=False)

    def on_train_end(self, args, state, control, **kwargs):
        self.update(description="trained")
        self.bar.stop()


class MethodsBar:
    """One bar over the steps of all methods, which come one after the other."""

    def __init__(self, bar: Progress, methods: int, steps: int):
        self.bar, self.steps = bar, steps
        self.task = bar.add_task("", total=methods * steps, loss="-")
        self.begun = 0

    def begin(self, name: str) -> None:
        self.name, self.first = name, self.begun * self.steps
        self.begun += 1
        self.bar.update(self.task, completed=self.first, description=f"{name}: loading", loss="-")

    def update(self, fields: dict) -> None:
        """fields: those that the method's own bar shows."""
        if "description" in fields:
            fields["description"] = f"{self.name}: {fields['description']}"
        if "completed" in fields:
            fields["completed"] += self.first
        self.bar.update(self.task, **fields)

    def end(self) -> None:
        self.bar.update(self.task, completed=self.begun * self.steps, description="compared", loss="-")
