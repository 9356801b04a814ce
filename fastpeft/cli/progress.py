"""One progress bar for the whole run, and the clock of the optimizer steps."""

import time

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers import TrainerCallback


class ProgressBar(TrainerCallback):
    """`seconds` and `tokens` cover the optimizer steps of this process, without evaluation and checkpoints."""

    def __init__(self, console):
        self.bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
        )
        self.seconds = 0.0
        self.tokens = 0

    def on_train_begin(self, args, state, control, **kwargs):
        self.tokens_at_start = state.num_input_tokens_seen
        self.task = self.bar.add_task("training", total=state.max_steps, completed=state.global_step, loss="-")
        self.bar.start()

    def on_step_begin(self, args, state, control, **kwargs):
        self.bar.update(self.task, description="training")
        self.step_start = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        self.seconds += time.perf_counter() - self.step_start
        self.tokens = state.num_input_tokens_seen - self.tokens_at_start
        self.bar.update(self.task, completed=state.global_step)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" in logs:
            self.bar.update(self.task, loss=f"{logs['loss']:.3f}")

    def on_prediction_step(self, args, state, control, **kwargs):
        self.bar.update(self.task, description="evaluating")

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        self.bar.console.print(f"step {state.global_step}: evaluation loss {metrics['eval_loss']:.4f}", highlight=False)

    def on_train_end(self, args, state, control, **kwargs):
        self.bar.update(self.task, description="trained")
        self.bar.stop()
