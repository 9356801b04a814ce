"""`fastpeft recommend`: which method fits a GPU, and which of those that fit suits a goal."""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from enum import Enum
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated

import typer

from fastpeft import memory
from fastpeft.cli.errors import BadInput
from fastpeft.memory import METHODS, OPTIMIZERS, Estimate, Method, Options, Shape

GIB = 2**30
UNITS = {"MiB": 2**20, "GiB": GIB, "TiB": 2**40, "MB": 10**6, "GB": 10**9, "TB": 10**12}
# Left free: the CUDA context with its libraries takes about half a GiB, the allocator's fragments the rest (modelled).
RESERVED = GIB
CONFIG = "config.json"
# Shorter rows than this are not proposed.
SHORTEST_ROW = 128


class Goal(str, Enum):
    quality = "quality"
    speed = "speed"
    many_tasks = "many-tasks"
    frozen_weights = "frozen-weights"
    latency = "latency"


class Quantize(str, Enum):
    nf4 = "nf4"


@dataclass(frozen=True)
class Settings:
    """What the size of a step depends on, beside model and method."""

    batch_size: int
    seq_len: int
    optimizer: str
    gradient_checkpointing: bool
    four_bits: bool
    options: Options

    def estimate(self, shape: Shape, method: str) -> Estimate:
        # Full fine-tuning has no frozen weights that could be in 4 bits.
        return memory.estimate(shape, method, **vars(self) | {"four_bits": self.four_bits and method != "full"})

    def step_seconds(self, shape: Shape, method: str) -> float:
        return memory.step_seconds(shape, method, **{k: v for k, v in vars(self).items() if k != "optimizer"})


@dataclass(frozen=True)
class Row:
    """A method and why it stands where it does. way_out: None where it fits; else what makes it fit, "" for nothing."""

    method: Method
    estimate: Estimate
    reason: str
    way_out: str | None


def command(
    model: Annotated[
        str, typer.Option(help="Folder, config.json, hub name, or smollm2. Its configuration is enough: no weights.")
    ],
    gpu_memory: Annotated[str, typer.Option(help="With its unit: 24GiB, 80GB.")],
    goal: Annotated[
        Goal,
        typer.Option(
            help="quality; speed of training; many-tasks: small files; frozen-weights: layers stay as they are, shared"
            " by all tasks; latency: of the trained model."
        ),
    ] = Goal.quality,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows a step.")] = 2,
    seq_len: Annotated[int, typer.Option(min=2, help="Tokens a row.")] = 256,
    optimizer: Annotated[str, typer.Option(help=f"One of {', '.join(OPTIMIZERS)}.")] = "paged_adamw_8bit",
    gradient_checkpointing: Annotated[
        bool, typer.Option("--gradient-checkpointing", help="Less memory, about a third more time.")
    ] = False,
    quantize: Annotated[
        Quantize | None, typer.Option(help="The frozen base in 4 bits under every method; qlora and qdora imply it.")
    ] = None,
    rank: Annotated[int, typer.Option(min=1, help="Of LoRA and DoRA, on all linears.")] = 16,
    bottleneck: Annotated[int, typer.Option(min=1, help="Features inside an adapter.")] = 64,
    prefix_length: Annotated[int, typer.Option(min=1, help="Positions of a prefix or prompt.")] = 32,
) -> None:
    """Show what each method needs on a GPU, and rank them for a goal. Nothing is loaded but the configuration."""
    if optimizer not in OPTIMIZERS:
        raise BadInput(f"--optimizer: '{optimizer}' is not estimated; known are {', '.join(OPTIMIZERS)}")
    available = parse_bytes(gpu_memory)
    settings = Settings(
        batch_size,
        seq_len,
        optimizer,
        gradient_checkpointing,
        quantize is not None,
        Options(rank, bottleneck, prefix_length),
    )
    shape = load_shape(model)
    show(shape, model, available, goal, settings, recommend(shape, available, goal, settings))


def parse_bytes(text: str) -> int:
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", text.strip())
    unit = {name.lower(): size for name, size in UNITS.items()}.get(found[2].lower()) if found else None
    if unit is None:
        raise BadInput(f"--gpu-memory: '{text}' should be a number with its unit, such as 24GiB; units: "
                       f"{', '.join(UNITS)}")  # fmt: skip
    return int(float(found[1]) * unit)


def load_shape(name: str) -> Shape:
    config = load_config(name)
    try:
        shape = memory.shape_of(config)
        sizes = [n for group in shape.layers for linear in group.linears for n in (group.count, linear.K, linear.N)]
        if min(*sizes, shape.hidden, shape.vocab, shape.key_width) > 0:
            return shape
        error = "a size is not positive"
    except (AttributeError, TypeError, ValueError, ZeroDivisionError) as failed:  # sizes that do not go together
        error = str(failed)
    raise BadInput(f"--model: no model can be made from the configuration of {name}: {error}")


def load_config(name: str):
    """The configuration of a causal language model. Raises BadInput for anything else."""
    from fastpeft.cli import models

    if name == "smollm2":
        return SimpleNamespace(**models.SMOLLM2_CONFIG)
    path = Path(name).expanduser()
    if (path / CONFIG).is_file():
        path = path / CONFIG
    if not path.is_file():
        return models.load_config(models.resolve(name), name)
    content = read_config(path, name)
    return SimpleNamespace(**content) if says_all(content) else models.load_config(str(path), name)


def read_config(path: Path, name: str) -> dict:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:  # undecodable bytes are a ValueError too
        raise BadInput(f"--model: {name} is neither a folder with a model nor a {CONFIG}: {error}") from error
    if not isinstance(content, dict) or not isinstance(content.get("model_type"), str):
        raise BadInput(f"--model: {name} is not the {CONFIG} of a model: it has no model_type")
    classes = content.get("architectures") or []
    if not isinstance(classes, list) or not all(isinstance(each, str) for each in classes):
        raise BadInput(f"--model: in {name} architectures is {classes}; it should be a list of names")
    return content


def says_all(config: dict) -> bool:
    """Whether it is complete: no default is needed that only transformers knows, whose import takes seconds."""
    extra, classes = memory.LLAMA_LIKE.get(config["model_type"]), config.get("architectures")
    if extra is None or not classes:
        return False
    sizes = [config.get(name) for name in (*memory.LLAMA_FIELDS, *extra)]
    return all(name.endswith("ForCausalLM") for name in classes) and all(isinstance(size, int) for size in sizes)


def recommend(shape: Shape, available: int, goal: Goal, settings: Settings) -> list[Row]:
    """The methods, best first: those that fit, those that would with other settings, the others; each group by goal."""
    ranked = []
    for position, (name, method) in enumerate(METHODS.items()):
        group, way_out, changed = 0, None, settings
        estimate = settings.estimate(shape, name)
        if estimate.peak + RESERVED > available:
            changed, way_out = a_way_out(shape, available, settings, method)
            group = 1 if way_out else 2
        grade, reason = GOALS[goal](shape, method, estimate, changed)
        ranked.append(((group, grade, position), Row(method, estimate, reason, way_out)))
    return [row for _, row in sorted(ranked, key=lambda pair: pair[0])]


def a_way_out(shape: Shape, available: int, settings: Settings, method: Method) -> tuple[Settings, str]:
    """The mildest change of the settings that makes the method fit, and its words; the settings and "" for none."""
    for changed, words in milder_to_harder(settings, method):
        estimate = changed.estimate(shape, method.name)
        if estimate.peak + RESERVED <= available:
            return changed, f"fits in {human(estimate.peak)} with {' '.join(words)}"
    return settings, ""


def milder_to_harder(settings: Settings, method: Method) -> Iterator[tuple[Settings, list[str]]]:
    checkpoints = {"gradient_checkpointing": True}, ["--gradient-checkpointing"]
    four_bits = {"four_bits": True}, ["--quantize nf4"]
    no_checkpoints = not settings.gradient_checkpointing
    # lora and dora in 4 bits are rows of their own.
    has_16_bits = not (settings.four_bits or method.four_bits or method.name in ("full", "lora", "dora"))
    steps = [checkpoints] * no_checkpoints + [four_bits] * has_16_bits
    for change, words in steps:
        yield replace(settings, **change), words
    words = []
    for change, more in steps:
        settings, words = replace(settings, **change), words + more
    yield settings, words
    if settings.batch_size > 1:
        settings, words = replace(settings, batch_size=1), [*words, "--batch-size 1"]
        yield settings, words
    while settings.seq_len // 2 >= SHORTEST_ROW:
        settings = replace(settings, seq_len=settings.seq_len // 2)
        yield settings, [*words, f"--seq-len {settings.seq_len}"]


# What a goal makes of a method: a grade, lower is better, and a reason. Equal grades are in the order of METHODS, which
# is by quality.


def for_quality(shape: Shape, method: Method, estimate: Estimate, settings: Settings) -> tuple[float, str]:
    return 0, method.quality


def for_speed(shape: Shape, method: Method, estimate: Estimate, settings: Settings) -> tuple[float, str]:
    part = settings.step_seconds(shape, method.name) / settings.step_seconds(shape, "full")
    return round(part, 2), f"{part:.2f} of the time of full fine-tuning's products (modelled for an H100)"


def for_many_tasks(shape: Shape, method: Method, estimate: Estimate, settings: Settings) -> tuple[float, str]:
    whole = memory.HALF * shape.parameters
    if method.changes == "weights":
        return 2, f"each task is a model of its own, {human(whole)}"
    size = memory.FLOAT * estimate.stored
    # Whether a thousand tasks take less than the model.
    return int(1000 * size > whole), f"a task takes {human(size)}, the model {human(whole)}"


def for_frozen_weights(shape: Shape, method: Method, estimate: Estimate, settings: Settings) -> tuple[float, str]:
    return {
        "input": (0, "no layer is touched: trained vectors stand before the text, or before its keys"),
        "layers": (1, "the weights stay as they are; modules are added beside them"),
        "weights": (2, "every weight changes"),
    }[method.changes]


def for_latency(shape: Shape, method: Method, estimate: Estimate, settings: Settings) -> tuple[float, str]:
    if method.changes == "weights":
        return 0, "as fast as the model"
    if method.merges and not (settings.four_bits or method.four_bits):
        return 0, "merges into the weights, then as fast as the model"
    if method.merges:
        return 1, "merged into 4 bits it loses accuracy, and beside them it costs small products in every layer"
    if method.changes == "input":
        return 1, f"{settings.options.positions} more positions for every token to attend to"
    return 2, "two more products in every layer; in series 20 to 30% at batch 1 (Hu et al., 2021, table 1)"


GOALS = {
    Goal.quality: for_quality,
    Goal.speed: for_speed,
    Goal.many_tasks: for_many_tasks,
    Goal.frozen_weights: for_frozen_weights,
    Goal.latency: for_latency,
}

# Narrower, the numbers of a method do not stand in one line.
LINE = 104
PARTS = ("weights", "adapters", "gradients", "optimizer", "activations", "workspace", "peak")


def human(size: float) -> str:
    """Three digits are more than a model of memory is worth."""
    for unit, name in ((GIB, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if size >= unit:
            return f"{size / unit:.{0 if size >= 100 * unit else 1}f} {name}"
    return f"{size:.0f} B"


def table(rows: list[Row]):
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    result = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    result.add_column("method", no_wrap=True)
    for name in PARTS:
        result.add_column(name, justify="right", no_wrap=True)
    result.add_column("fits")
    for row in rows:
        sizes = [human(getattr(row.estimate, part)) for part in PARTS]
        result.add_row(row.method.name, *sizes, "[green]yes[/]" if row.way_out is None else "[red]no[/]")
    return result


def show(shape: Shape, model: str, available: int, goal: Goal, settings: Settings, rows: list[Row]) -> None:
    from rich.console import Console

    console = Console(highlight=False)
    if console.width < LINE:
        console = Console(highlight=False, width=LINE)
    checkpoints = "with" if settings.gradient_checkpointing else "no"
    console.print(
        f"{model}: {shape.parameters / 1e9:.3g} billion parameters in {shape.depth} layers",
        markup=False,
        soft_wrap=True,
    )
    console.print(
        f"{settings.batch_size} x {settings.seq_len} tokens, {settings.optimizer}, {checkpoints} checkpoints;"
        f" {human(available)} of memory, {human(RESERVED)} of it left to CUDA"
    )
    if not shape.checked:
        console.print("The activations of this architecture are a rough guess.")
    console.print(table(rows))
    console.print("peak: below the sum where gradients come after activations have gone. Estimated, not measured.\n")
    console.print(f"[bold]For {goal.value}[/], best first:")
    for number, row in enumerate(rows, 1):
        fit = "" if row.way_out is None else f"; {row.way_out or 'needs ' + human(row.estimate.peak + RESERVED)}"
        console.print(f"{number:2}. [bold]{row.method.name}[/]: {row.reason}{fit}", soft_wrap=True)
    if all(row.way_out is not None for row in rows):
        least = min(row.estimate.peak for row in rows) + RESERVED
        console.print(f"\nNothing fits as it is: the least is a GPU of {human(least)}, or the changes above.")
