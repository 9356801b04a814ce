"""`fastpeft compare`: several methods on the same model, data, seed and budget, and one report."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from fastpeft.cli import data, finetune, methods
from fastpeft.cli.compare_worker import Job
from fastpeft.cli.errors import BadInput
from fastpeft.cli.finetune import (
    BottleneckOption,
    DataOption,
    DtypeOption,
    GradientCheckpointingOption,
    ModelOption,
    OptimizerOption,
    PrefixLengthOption,
    SeedOption,
    Settings,
)
from fastpeft.cli.methods import OPTIONS, WAYS, Method
from fastpeft.cli.models import Dtype
from fastpeft.cli.output import METRICS, Output
from fastpeft.cli.recommend import Quantize

SETTINGS = "compare.json"
REPORT = ("report.md", "report.csv", "curves.png", "tradeoff.png")
# What an interrupted process has to write its last words. Longer than a step of a big model takes on a CPU.
SECONDS_TO_END = 60


def command(
    context: typer.Context,
    model: ModelOption,
    data: DataOption,
    methods: Annotated[str, typer.Option(help=f"With commas between: {', '.join(m.value for m in Method)}.")],
    output: Annotated[Path, typer.Option(help="Folder for the report, and a folder for each method.")] = Path(
        "runs/compare"
    ),
    quantize: Annotated[
        Quantize | None,
        typer.Option(help="The frozen base in 4 bits (NF4), under all methods; qlora and qdora imply it."),
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps of each method.")] = Settings.steps,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows a step.")] = Settings.batch_size,
    seq_len: Annotated[int, typer.Option(min=2, help="Tokens a row.")] = Settings.seq_len,
    rank: Annotated[int, typer.Option(min=1, help="Of LoRA and DoRA, on all linears.")] = Settings.rank,
    prefix_length: PrefixLengthOption = Settings.prefix_length,
    bottleneck: BottleneckOption = Settings.bottleneck,
    eval_fraction: Annotated[
        float, typer.Option(min=0.001, max=0.9, help="Part of the data held out.")
    ] = Settings.eval_fraction,
    seed: SeedOption = Settings.seed,
    optimizer: OptimizerOption = Settings.optimizer,
    gradient_checkpointing: GradientCheckpointingOption = Settings.gradient_checkpointing,
    dtype: DtypeOption = Settings.dtype,
    timed_steps: Annotated[
        int, typer.Option(min=1, help="Timed with stock peft and accelerated, and so many answers; after training.")
    ] = 3,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue; methods that are done stay, more may be asked for.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier comparison.")] = False,
) -> int:
    """Train several methods on the same model, data, seed and steps, each in a process of its own, and report."""
    options = {
        "model": model,
        "data": data,
        "quantize": quantize,
        "steps": steps,
        "batch_size": batch_size,
        "seq_len": seq_len,
        "rank": rank,
        "prefix_length": prefix_length,
        "bottleneck": bottleneck,
        "eval_fraction": eval_fraction,
        "seed": seed,
        "optimizer": optimizer,
        "gradient_checkpointing": gradient_checkpointing,
        "dtype": dtype,
    }
    chosen = parse_methods(methods)
    check_options(chosen, [name for name in options if finetune.is_given(context, name)])
    options["dtype"], why_dtype = choose_dtype(output, dtype, resume=resume)
    comparison = Comparison(output, chosen, options, timed_steps, why_dtype)
    comparison.check(resume=resume, overwrite=overwrite)
    failures = comparison.run(resume=resume)
    return 1 if failures else 0


def choose_dtype(path: Path, asked: Dtype, *, resume: bool) -> tuple[Dtype, str]:
    """One type for all methods, and why; the one that an interrupted comparison began with goes on."""
    import torch

    from fastpeft.cli import models

    settings = Folder(path).settings
    if resume and asked == Dtype.auto and settings.exists():
        asked = Dtype(json.loads(settings.read_text()).get("dtype", Dtype.auto))
    device = torch.accelerator.current_accelerator() or torch.device("cpu")
    return models.choose_dtype(asked, device.type)


def parse_methods(text: str) -> list[Method]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    known = [method.value for method in Method]
    for name in names:
        if name not in known:
            raise BadInput(f"--methods: unknown '{name}'; known are {', '.join(known)}")
        if names.count(name) > 1:
            raise BadInput(f"--methods: {name} is there twice")
    if not names:
        raise BadInput("--methods: none is named")
    return [Method(name) for name in names]


def check_options(chosen: list[Method], given: list[str]) -> None:
    """An option of some methods must be of one that is chosen."""
    of_chosen = {name for method in chosen for name in OPTIONS[WAYS[method.value].family]}
    for name in set().union(*OPTIONS.values()).intersection(given) - of_chosen:
        raise BadInput(f"--{name.replace('_', '-')}: none of these methods has one")


class Folder(Output):
    """Of a comparison. It has no state but its settings and the folders of its methods, whose state is finetune's."""

    unfinished = "a comparison"

    def __init__(self, path: Path):
        super().__init__(path)
        self.settings = self.path / SETTINGS

    def check(self, settings: dict, *, resume: bool, overwrite: bool) -> None:
        if (self.path / METRICS).exists():
            raise BadInput(f"--output: {self.path} holds a run of finetune")
        super().check(settings, resume=resume, overwrite=overwrite)

    def clear(self) -> None:
        """Removes what a comparison writes, and nothing else."""
        for method in Method:
            shutil.rmtree(self.path / method.value, ignore_errors=True)
            self.log(method).unlink(missing_ok=True)
        for name in (*REPORT, SETTINGS):
            (self.path / name).unlink(missing_ok=True)

    def log(self, method: Method) -> Path:
        return self.path / f"{method.value}.log"

    def metrics(self, method: Method) -> dict | None:
        """None where it is not finished."""
        run = Output(self.path / method.value)
        if run.checkpoints.exists() or not (run.path / METRICS).exists():
            return None
        return json.loads((run.path / METRICS).read_text())


class Comparison:
    def __init__(self, path: Path, chosen: list[Method], options: dict, timed_steps: int, why_dtype: str):
        self.folder = Folder(path)
        self.jobs = {
            method: Job(Settings(method=method, **options), self.folder.path / method.value, timed_steps)
            for method in chosen
        }
        self.settings = options | {"timed_steps": timed_steps}
        self.why_dtype = why_dtype

    def check(self, *, resume: bool, overwrite: bool) -> None:
        """Everything that bad input can spoil, as far as it can be known without the model's weights."""
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise BadInput("compare uses one device: start it without torchrun")
        for job in self.jobs.values():
            finetune.check_packages(job.settings)
            methods.check_way(job.settings, job.timed_steps)
        options = self.settings
        data.check_source(options["data"])
        self.folder.check(self.settings, resume=resume, overwrite=overwrite)
        finetune.quiet()

        import torch

        from fastpeft.cli import models, training

        training.optimizer_name(options["optimizer"], torch.accelerator.current_accelerator() or torch.device("cpu"))
        train, _, _ = data.load(options["data"], options["eval_fraction"], options["seed"])
        source = models.resolve(options["model"])
        models.load_config(source, options["model"])
        tokenizer = models.load_tokenizer(source, options["model"])
        if data.is_conversation(train[0]) and tokenizer.chat_template is None:
            raise BadInput(f"--data: the tokenizer of {options['model']} has no chat template, which messages need")

    def run(self, *, resume: bool) -> dict[Method, str]:
        """Returns the reason of each method that failed."""
        from rich.console import Console

        from fastpeft.cli import compare_report
        from fastpeft.cli.progress import MethodsBar, progress

        if not resume:
            self.folder.clear()
        self.folder.path.mkdir(parents=True, exist_ok=True)
        self.folder.settings.write_text(json.dumps(self.settings, indent=2) + "\n")
        console = Console(highlight=False)
        console.print(f"computed in {self.settings['dtype'].value}: {self.why_dtype}")
        failures = {}
        with progress(console) as rich_bar:
            bar = MethodsBar(rich_bar, len(self.jobs), self.settings["steps"])
            for method in self.jobs:
                bar.begin(method.value)
                try:
                    if self.folder.metrics(method) is None and (reason := self.train(method, bar.update)):
                        failures[method] = reason
                except KeyboardInterrupt:
                    console.print(f"{method.value} is not done; the same command with --resume goes on from there")
                    raise
                line = compare_report.one_line(method, self.folder.metrics(method), failures.get(method))
                console.print(line, soft_wrap=True)
            bar.end()
        results = {method: self.folder.metrics(method) for method in self.jobs}
        compare_report.write(self.folder.path, self.settings, results, failures)
        console.print(f"{', '.join(REPORT)} are in {self.folder.path}", soft_wrap=True)
        return failures

    def train(self, method: Method, show: Callable[[dict], None]) -> str | None:
        """Returns why it failed, or None."""
        reasons = []

        def hear(message: dict) -> None:
            if "failed" in message:
                reasons.append(message["failed"])
            else:
                show(message)

        code = run_apart(self.jobs[method], self.folder.log(method), hear)
        if code == 0:
            return None
        return reasons[0] if reasons else f"{how_it_ended(code)}; see {self.folder.log(method).name}"


def how_it_ended(code: int) -> str:
    """code: of a process, as subprocess has it."""
    if code >= 0:
        return f"its process ended with code {code}"
    name = signal.Signals(-code).name
    memory = ", as the system does when memory runs out" if name == "SIGKILL" else ""
    return f"its process was ended by {name}{memory}"


def run_apart(job: Job, log: Path, hear: Callable[[dict], None]) -> int:
    """Runs a job in a process of its own, and returns its exit code. Whatever ends this function ends the process.

    A session of its own keeps Ctrl-C from it, so that it is interrupted once, from here, and not again while it writes
    what a later run can continue from.
    """
    command = [sys.executable, "-m", "fastpeft.cli.compare_worker", job.to_json()]
    with (
        log.open("w") as stderr,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stderr, text=True, start_new_session=True) as process,
    ):
        try:
            for line in process.stdout:
                hear(json.loads(line))
            return process.wait()
        except BaseException:
            with contextlib.suppress(subprocess.TimeoutExpired):
                end(process)
            raise


def end(process: subprocess.Popen) -> None:
    process.send_signal(signal.SIGINT)
    try:
        process.wait(SECONDS_TO_END)
    finally:  # it took too long, or there is a second Ctrl-C
        process.kill()
