"""One progress bar for the whole run, and the clock of the optimizer steps."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers import TrainerCallback

# In a process that trains for another one: what passes on the fields of its bar (`fastpeft.cli.compare_worker`).
listener: Callable[[dict], None] | None = None


SECONDS_BETWEEN_LINES = 15  # where nobody sees a bar move


class Lines(Progress):
    """rich's bars on a terminal; in a file or a pipe a plain line for each task that goes on, every so many seconds."""

    def start(self) -> None:
        if self.console.is_terminal:
            super().start()
        elif not self.console.quiet:
            self.ended = threading.Event()
            threading.Thread(target=self.write, daemon=True).start()

    def stop(self) -> None:
        if self.console.is_terminal:
            super().stop()
        elif hasattr(self, "ended"):
            self.ended.set()

    def write(self) -> None:
        while not self.ended.wait(SECONDS_BETWEEN_LINES):
            for task in self.tasks:  # after their last step too: an evaluation may follow
                self.console.print(line(task), markup=False, highlight=False, soft_wrap=True)


def line(task) -> str:
    """`training: step 3 of 60, loss 3.071, 170 tokens/s, 5:12 left`, of a task of rich, without what is not known."""
    parts = [f"{task.elapsed or 0:.0f} s"] if task.total is None else [f"step {task.completed:.0f} of {task.total:.0f}"]
    if task.fields.get("loss", "-") != "-":
        parts.append(f"loss {task.fields['loss']}")
    if task.fields.get("tokens_per_second"):
        parts.append(f"{task.fields['tokens_per_second']:.0f} tokens/s")
    if task.time_remaining:
        parts.append(f"{task.time_remaining // 60:.0f}:{task.time_remaining % 60:02.0f} left")
    return f"{task.description}: {', '.join(parts)}"


@contextmanager
def waiting(console, what: str) -> Iterator[None]:
    """Says what goes on, again and again where it takes long, for what has no steps of its own."""
    bar = Lines(TextColumn("{task.description}"), TimeElapsedColumn(), console=console, transient=True)
    bar.add_task(what, total=None)
    with bar:
        yield


def progress(console) -> Progress:
    """A task takes the fields `loss` and `tokens_per_second` besides those of rich."""
    return Lines(
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
        speed = {"tokens_per_second": self.tokens / self.seconds} if self.seconds else {}
        self.update(completed=state.global_step, **speed)

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
