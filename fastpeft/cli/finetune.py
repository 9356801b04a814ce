"""`fastpeft finetune`: from a model and a file of text to an adapter, its metrics and its loss curve."""

import importlib.util
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated

import typer

from fastpeft.cli import data, methods, tasks
from fastpeft.cli.errors import BadInput
from fastpeft.cli.methods import OPTIONS, WAYS, Method, Way
from fastpeft.cli.models import Dtype
from fastpeft.cli.output import Output
from fastpeft.cli.recommend import Quantize
from fastpeft.cli.tasks import TaskName


@dataclass(frozen=True)
class Settings:
    """What shapes a run: it must be the same when an interrupted run continues."""

    model: str
    data: str
    method: Method
    lr: float | None = None  # what suits the method
    quantize: Quantize | None = None
    steps: int = 60
    batch_size: int = 2
    seq_len: int = 256
    rank: int = 16
    alpha: float = 32
    dropout: float = 0.0
    target_modules: str = "all-linear"
    prefix_length: int = 32
    bottleneck: int = 64
    eval_fraction: float = 0.05
    seed: int = 0
    optimizer: str | None = None
    gradient_checkpointing: bool = False
    accelerate: bool = True
    task: TaskName = TaskName.causal_lm
    dtype: Dtype = Dtype.auto

    def __post_init__(self) -> None:
        if self.lr is None:
            object.__setattr__(self, "lr", self.way.lr)

    @property
    def way(self) -> Way:
        return WAYS[self.method.value]

    @property
    def four_bit(self) -> bool:
        return self.way.four_bit or self.quantize is not None


# What `fastpeft compare` takes too.
ModelOption = Annotated[str, typer.Option(help="Folder, hub name, or smollm2 (SmolLM2-135M from a PyPI wheel).")]
DataOption = Annotated[
    str, typer.Option(help="File (.jsonl .json .txt .csv .parquet), hub name, or pydoc (CPython's own reference).")
]
PrefixLengthOption = Annotated[int, typer.Option(min=1, help="Virtual tokens of a prefix, prompt or P-tuning.")]
BottleneckOption = Annotated[int, typer.Option(min=1, help="Features inside an adapter.")]
DtypeOption = Annotated[
    Dtype, typer.Option(help="Of the products; auto: bf16 where the device has instructions for it, else fp32.")
]
SeedOption = Annotated[int, typer.Option(min=0)]
OptimizerOption = Annotated[
    str | None, typer.Option(help="Any of transformers; by default paged 8-bit AdamW on CUDA, AdamW elsewhere.")
]
GradientCheckpointingOption = Annotated[
    bool, typer.Option("--gradient-checkpointing", help="Less memory, about a third more time.")
]


def command(
    context: typer.Context,
    model: ModelOption,
    data: DataOption,
    output: Annotated[Path, typer.Option(help="Folder for the adapter, metrics.json, loss.png and sample.txt.")],
    method: Annotated[Method, typer.Option(help="A q stands for a base in 4 bits.")] = Method.qlora,
    task: Annotated[
        TaskName,
        typer.Option(help="Columns: text | text, label | tokens, tags | question, context, answer | source, target."),
    ] = Settings.task,
    quantize: Annotated[
        Quantize | None,
        typer.Option(help="The frozen base in 4 bits (NF4), under any method; qlora and qdora imply it."),
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps.")] = Settings.steps,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows a step, on each device.")] = Settings.batch_size,
    seq_len: Annotated[int, typer.Option(min=2, help="Tokens a row.")] = Settings.seq_len,
    lr: Annotated[
        float | None, typer.Option(min=0, help="Highest learning rate; by default what suits the method.")
    ] = None,
    rank: Annotated[
        int, typer.Option(min=1, help="Of LoRA and DoRA, as are alpha, dropout and target modules.")
    ] = Settings.rank,
    alpha: Annotated[float, typer.Option(min=0)] = Settings.alpha,
    dropout: Annotated[float, typer.Option(min=0, max=1)] = Settings.dropout,
    target_modules: Annotated[
        str, typer.Option(help="Names with commas between, or all-linear.")
    ] = Settings.target_modules,
    prefix_length: PrefixLengthOption = Settings.prefix_length,
    bottleneck: BottleneckOption = Settings.bottleneck,
    eval_fraction: Annotated[
        float, typer.Option(min=0, max=0.9, help="Part of the data held out.")
    ] = Settings.eval_fraction,
    seed: SeedOption = Settings.seed,
    optimizer: OptimizerOption = Settings.optimizer,
    gradient_checkpointing: GradientCheckpointingOption = Settings.gradient_checkpointing,
    dtype: DtypeOption = Settings.dtype,
    no_accelerate: Annotated[bool, typer.Option("--no-accelerate", help="Stock peft.")] = False,
    compare_steps: Annotated[
        int, typer.Option(min=0, help="Then time so many steps with stock peft and accelerated.")
    ] = 0,
    resume: Annotated[bool, typer.Option("--resume", help="Continue an interrupted run.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier run.")] = False,
) -> None:
    """Fine-tune a language model, or train it to classify or to find answers."""
    methods.check_options(method.value, [name for name in set().union(*OPTIONS.values()) if is_given(context, name)])
    settings = Settings(
        model=model,
        data=data,
        method=method,
        task=task,
        quantize=quantize,
        steps=steps,
        batch_size=batch_size,
        seq_len=seq_len,
        lr=lr,
        rank=rank,
        alpha=alpha,
        dropout=dropout,
        target_modules=target_modules,
        prefix_length=prefix_length,
        bottleneck=bottleneck,
        eval_fraction=eval_fraction,
        seed=seed,
        optimizer=optimizer,
        gradient_checkpointing=gradient_checkpointing,
        accelerate=not no_accelerate,
        dtype=dtype,
    )
    finetune(settings, output, compare_steps=compare_steps, resume=resume, overwrite=overwrite)


def is_given(context: typer.Context, name: str) -> bool:
    return context.get_parameter_source(name).name == "COMMANDLINE"


def check_packages(settings: Settings) -> None:
    needed = ["transformers", "peft", "accelerate", "trl", "datasets", "matplotlib"]
    missing = [p for p in needed + ["bitsandbytes"] * settings.four_bit if importlib.util.find_spec(p) is None]
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


def how_to_go_on(output: Output) -> str:
    """After Ctrl-C."""
    if not output.whole_checkpoints():
        return "nothing was saved yet"
    return f"saved up to step {max(output.whole_checkpoints())}; the same command with --resume goes on from there"


def finetune(settings: Settings, path: Path, *, compare_steps: int = 0, resume: bool = False, overwrite: bool = False):
    """Returns the metrics, and writes them with the adapter into `path`. Raises BadInput before anything is written."""
    check_packages(settings)
    methods.check_way(settings, compare_steps)
    tasks.check_task(settings, compare_steps)
    data.check_source(settings.data)
    output = Output(path)
    if resume and settings.dtype == Dtype.auto:  # a machine without bf16 may go on with what one with it has begun
        settings = replace(settings, dtype=Dtype(output.kept("dtype") or Dtype.auto))
    output.check(asdict(settings), resume=resume, overwrite=overwrite)
    quiet()

    import torch
    from accelerate import PartialState
    from rich.console import Console

    from fastpeft.cli.run import Run

    # Without cpu=True, processes that torchrun starts on a machine without an accelerator do not find each other.
    processes = PartialState(cpu=not torch.accelerator.is_available())
    console = Console(quiet=not processes.is_main_process, highlight=False)
    run = Run(settings, output, processes, console)
    run.prepare()
    if processes.is_main_process:
        output.begin(asdict(run.settings), resume=resume)
    processes.wait_for_everyone()
    try:
        return run.train(compare_steps)
    except BaseException as error:  # Ctrl-C too
        if processes.is_main_process:
            output.abandon()
            if isinstance(error, KeyboardInterrupt):
                console.print(how_to_go_on(output), markup=False, soft_wrap=True)
        raise
