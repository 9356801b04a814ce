"""A run of `fastpeft finetune`: what it does in which order."""

import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

from fastpeft.cli import data, methods, models, tasks
from fastpeft.cli.errors import BadInput
from fastpeft.cli.finetune import Settings
from fastpeft.cli.output import Output
from fastpeft.cli.tasks import TASKS


def own_device(processes):
    """With its index, which accelerate compares with where a 4-bit model lies."""
    import torch

    if processes.device.type == "cuda":
        return torch.device("cuda", torch.cuda.current_device())
    return processes.device


def curve(trainer, key: str) -> list[list]:
    """[step, value] of each that the Trainer logged."""
    from fastpeft.cli.plot import points

    return [list(pair) for pair in zip(*points(trainer.state.log_history, key), strict=True)]


class Run:
    def __init__(self, settings: Settings, output: Output, processes, console):
        self.task = TASKS[settings.task]
        self.output = output
        self.processes = processes
        self.device = own_device(processes)
        # After a --resume the settings hold the type that the run began with.
        dtype, self.why_dtype = models.choose_dtype(settings.dtype, self.device.type)
        self.settings = replace(settings, dtype=dtype)
        self.console = console

    def prepare(self) -> None:
        """Everything that bad input can spoil."""
        from fastpeft.cli import training
        from fastpeft.cli.progress import waiting

        settings = self.settings
        training.optimizer_name(settings.optimizer, self.device)
        # The others find what the main process has cached.
        with waiting(self.console, "reading the data"), self.processes.local_main_process_first():
            self.train_data, self.eval_data, self.kind = data.load(
                settings.data, settings.eval_fraction, settings.seed, settings.task.value
            )
            source = models.resolve(settings.model)
        config = models.load_config(source, settings.model, settings.task.value)
        self.tokenizer = models.load_tokenizer(source, settings.model, settings.task.value)
        self.example = (self.eval_data or self.train_data)[0]
        if data.is_conversation(self.example) and self.tokenizer.chat_template is None:
            raise BadInput(f"--data: the tokenizer of {settings.model} has no chat template, which messages need")
        self.prepare_task(config)
        with waiting(self.console, "loading the model"):
            self.model = self.adapted(source, config)
        self.print_plan()

    def prepare_task(self, config) -> None:
        """Of a task that TRL does not know: the classes, which the configuration names, and the features."""
        task, parts = self.task, [part for part in (self.train_data, self.eval_data) if part is not None]
        if task.features is None:
            return
        ids = {}
        if task.labels is not None:
            names, ids = tasks.class_names(parts, task.labels)
            config.id2label, config.label2id = dict(enumerate(names)), {name: i for i, name in enumerate(names)}
        if config.pad_token_id is None:
            config.pad_token_id = self.tokenizer.pad_token_id
        if self.settings.way.family == "prompt" and task.has_head and models.is_decoder(config):
            # Behind virtual tokens such a classifier reads the last position, whatever stands there.
            self.tokenizer.padding_side = "left"
        length = self.settings.seq_len
        features = [tasks.prepare(task, part, self.tokenizer, length, ids) for part in parts]
        self.train_data, self.eval_data = features[0], features[1] if len(features) > 1 else None

    def adapted(self, source: str, config):
        import torch
        from transformers import set_seed

        settings = self.settings
        # What trains is kept in float32.
        dtype = torch.float32 if settings.way.family == "full" else models.torch_dtype(settings.dtype)
        set_seed(settings.seed)  # a new head starts from random numbers
        base, fresh = models.load_base(
            source,
            settings.model,
            config,
            four_bit=settings.four_bit,
            device=self.device,
            dtype=dtype,
            task=settings.task,
        )
        set_seed(settings.seed)  # and so does the adapter
        model = settings.way.add(base, settings, tasks.heads(base, fresh) if self.task.has_head else [])
        self.fused, self.why_not = methods.count_bottlenecks(model), Counter()
        if settings.accelerate:
            import fastpeft

            report = fastpeft.accelerate(model)
            self.fused += report.fused
            self.why_not = Counter(row.reason for row in report if row.reason)
        return model

    def print_plan(self) -> None:
        self.trainable, self.total = methods.count_parameters(self.model)
        adapters = f"{self.fused} adapter modules accelerated" if self.settings.accelerate else "stock peft"
        if self.settings.way.family == "full":
            adapters = "no adapter"
        evaluation = 0 if self.eval_data is None else len(self.eval_data)
        self.console.print(f"[bold]{self.settings.model}[/] with {self.settings.method.value} on {self.device_name()}")
        self.console.print(f"computed in {self.settings.dtype.value}: {self.why_dtype}")
        self.console.print(f"{self.trainable:,} of {self.total:,} parameters train; {adapters}")
        for reason, count in self.why_not.items():  # what stays slow is said, not left to be guessed
            self.console.print(f"{count} not accelerated: {reason}", markup=False)
        self.console.print(f"{len(self.train_data)} examples to train on, {evaluation} to evaluate ({self.kind})")

    def device_name(self) -> str:
        import torch

        return torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else self.device.type

    def train(self, compare_steps: int) -> dict:
        from fastpeft.cli import sample, training
        from fastpeft.cli.progress import ProgressBar, waiting

        start = time.perf_counter()
        bar = ProgressBar(self.console)
        with waiting(self.console, "preparing the data"):
            trainer = training.build(
                self.settings,
                self.output,
                self.model,
                self.tokenizer,
                self.train_data,
                self.eval_data,
                self.kind,
                self.device,
                bar,
            )
        with waiting(self.console, "writing a sample"):
            text = sample.Sample(self.model, self.tokenizer, self.example) if self.task.generates else None
        checkpoint = self.output.resume_point(self.settings.steps)
        training.start_peak(self.device)
        try:
            trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint))
        finally:
            bar.bar.stop()
        peak_bytes = training.peak_bytes(self.device)
        eval_before, eval_after, measured = training.eval_results(trainer)
        with waiting(self.console, "writing a sample"):
            text = text and text.after()
        seconds = time.perf_counter() - start
        metrics = {
            "method": self.settings.method.value,
            "task": self.settings.task.value,
            "model": self.settings.model,
            "data": self.settings.data,
            "eval_loss_before": eval_before,
            "eval_loss_after": eval_after,
            "eval_metrics": measured,
            "tokens_per_second": bar.tokens / bar.seconds if bar.seconds else None,
            "accelerated_modules": self.fused,
            "trainable_parameters": self.trainable,
            "total_parameters": self.total,
            "peak_memory_bytes": peak_bytes,
            "loss_curve": curve(trainer, "loss"),
            "eval_loss_curve": curve(trainer, "eval_loss"),
            "steps": trainer.state.global_step,
            "seconds": seconds,
            "device": self.device_name(),
            "dtype": self.settings.dtype.value,
            "processes": self.processes.num_processes,
            "versions": self.versions(),
        }
        if compare_steps:
            from fastpeft.cli import steptime, tokentime

            settings = self.settings
            with waiting(self.console, "timing steps"):
                metrics |= steptime.compare(
                    trainer, compare_steps, accelerated=settings.accelerate, of_peft=settings.way.of_peft
                )
            if self.task.generates:
                prompt = sample.prompt_of(self.example, self.tokenizer)
                with waiting(self.console, "timing answers"):
                    metrics |= tokentime.compare(self.model, prompt, compare_steps)
        self.write(trainer, metrics, text)
        self.print_results(metrics, text)
        return metrics

    def versions(self) -> dict[str, str]:
        from fastpeft.cli.doctor import versions

        return versions()

    def write(self, trainer, metrics: dict, text: str | None) -> None:
        from fastpeft.cli.plot import loss_plot

        trainer.save_model(str(self.output.final))  # all processes: a sharded model is gathered
        if self.processes.is_main_process:
            metrics["adapter_bytes"] = methods.saved_bytes(self.output.final)
            if text is not None:
                (self.output.final / "sample.txt").write_text(text, encoding="utf-8")
            model, source = (Path(name).name for name in (self.settings.model, self.settings.data))
            title = f"{model}, {self.settings.method.value}, {source}"
            loss_plot(trainer.state.log_history, title, self.output.final / "loss.png")
            self.output.finish(metrics)
        self.processes.wait_for_everyone()

    def print_results(self, metrics: dict, text: str | None) -> None:
        from rich.markup import escape

        if text is not None:
            self.console.print(f"\n[dim]{escape(text)}[/]")
        if metrics["eval_loss_before"] is not None:
            change = f"{metrics['eval_loss_before']:.4f} -> {metrics['eval_loss_after']:.4f}"
            measured = "".join(f", {name} {value:.3f}" for name, value in metrics["eval_metrics"].items())
            self.console.print(f"evaluation loss {change}{measured}")
        if metrics["tokens_per_second"]:
            self.console.print(f"{metrics['tokens_per_second']:.0f} tokens a second, {metrics['seconds']:.0f} s in all")
        if metrics.get("speedup"):
            self.console.print(
                f"a step: {metrics['step_ms_peft']:.0f} ms with peft, {metrics['step_ms_accelerated']:.0f} ms "
                f"accelerated ({metrics['speedup']:.2f} times as fast)"
            )
        elif "speedup" in metrics:
            self.console.print(f"a step: {metrics['step_ms_accelerated']:.0f} ms; peft has no such method")
        if metrics.get("token_ms_adapted"):
            self.console.print(
                f"a token: {metrics['token_ms_base']:.1f} ms without the adapter, "
                f"{metrics['token_ms_adapted']:.1f} ms with it"
            )
        self.console.print(f"what was trained, metrics.json and loss.png are in {self.output.path}", soft_wrap=True)
