"""The report of `fastpeft compare`: report.md, report.csv, curves.png and tradeoff.png, from each method's metrics."""

import csv
import math
from collections.abc import Callable
from pathlib import Path

from fastpeft.cli.data import MOST_EVAL_EXAMPLES
from fastpeft.cli.methods import WAYS, Method
from fastpeft.cli.recommend import human
from fastpeft.cli.tokentime import NEW_TOKENS

NONE = "-"
# Of report.csv: keys of metrics.json, with the units in their names.
KEYS = (
    "trainable_parameters", "total_parameters", "adapter_bytes", "step_ms_peft", "step_ms_accelerated", "speedup",
    "peak_memory_bytes", "eval_loss_before", "eval_loss_after", "token_ms_base", "token_ms_adapted", "token_ms_merged",
)  # fmt: skip


def formatted(text: str) -> Callable[[float], str]:
    return lambda value: format(value, text)


def ratio(metrics: dict, above: str, below: str) -> float | None:
    return None if metrics[above] is None else metrics[above] / metrics[below]


# Column -> (value of a method's metrics, None where there is none; how it is written).
TRAINING = {
    "lr": (lambda m: WAYS[m["method"]].lr, formatted("g")),
    "trainable": (lambda m: m["trainable_parameters"], formatted(",")),
    "% of all": (lambda m: 100 * ratio(m, "trainable_parameters", "total_parameters"), formatted(".3g")),
    "file": (lambda m: m["adapter_bytes"], human),
    "step, peft (ms)": (lambda m: m["step_ms_peft"], formatted(".0f")),
    "step, accelerated (ms)": (lambda m: m["step_ms_accelerated"], formatted(".0f")),
    "times as fast": (lambda m: m["speedup"], formatted(".2f")),
    "peak memory": (lambda m: m["peak_memory_bytes"], human),
    "loss before": (lambda m: m["eval_loss_before"], formatted(".4f")),
    "loss after": (lambda m: m["eval_loss_after"], formatted(".4f")),
}
ANSWERING = {
    "base (ms)": (lambda m: m["token_ms_base"], formatted(".1f")),
    "with adapter (ms)": (lambda m: m["token_ms_adapted"], formatted(".1f")),
    "of base": (lambda m: ratio(m, "token_ms_adapted", "token_ms_base"), formatted(".2f")),
    "merged (ms)": (lambda m: m["token_ms_merged"], formatted(".1f")),
    "merged, of base": (lambda m: ratio(m, "token_ms_merged", "token_ms_base"), formatted(".2f")),
}


def cell(metrics: dict, value: Callable, text: Callable[[float], str]) -> str:
    found = value(metrics)
    return NONE if found is None else text(found)


def one_line(method: Method, metrics: dict | None, failure: str | None) -> str:
    """As rich's markup."""
    from rich.markup import escape

    if failure is not None:
        return f"[red]{method.value} failed[/]: {escape(failure)}"
    change = f"evaluation loss {metrics['eval_loss_before']:.4f} -> {metrics['eval_loss_after']:.4f}"
    return f"[bold]{method.value}[/]: {change}, {metrics['trainable_parameters']:,} parameters trained"


def table(results: dict[Method, dict], columns: dict) -> list[str]:
    lines = [f"| method | {' | '.join(columns)} |", "|---|" + "---:|" * len(columns)]
    for method, metrics in results.items():
        cells = [cell(metrics, *column) for column in columns.values()]
        lines.append(f"| {method.value} | {' | '.join(cells)} |")
    return lines


def markdown(settings: dict, done: dict[Method, dict], failures: dict[Method, str]) -> str:
    lines = [f"# {settings['model']} on {settings['data']}", ""]
    lines += [f"- **{method.value} failed**: {reason}" for method, reason in failures.items()] + [""] * bool(failures)
    if done:
        lines += [conditions(settings, next(iter(done.values()))), ""]
        lines += ["## Training", "", *table(done, TRAINING), "", training_notes(settings), ""]
        lines += ["![loss over steps](curves.png)", "", "![evaluation loss against its price](tradeoff.png)", ""]
        lines += ["## Answering", "", *table(done, ANSWERING), "", ANSWERING_NOTES]
    return "\n".join(lines) + "\n"


def conditions(settings: dict, metrics: dict) -> str:
    given = {name: getattr(value, "value", value) for name, value in settings.items() if name not in ("model", "data")}
    options = [f"{name.replace('_', ' ')} {value}" for name, value in given.items() if value is not None]
    versions = [f"{name} {version}" for name, version in metrics["versions"].items()]
    return f"For every method: {', '.join(options)}. On {metrics['device']}; {', '.join(versions)}."


def training_notes(settings: dict) -> str:
    return (
        "Each method has the learning rate (lr) that finetune gives it. A step is forward, loss and backward of one "
        f"batch, without the optimizer: the median of {settings['timed_steps']} after one to warm up, stock peft and "
        "accelerated by turns on the same model; - where peft has no such method. Peak memory is that of training, in "
        "a process of its own: on a GPU what torch allocated, on a CPU the resident size of the whole process, its "
        "libraries included. Loss is in nats per token, on the part of the data held out, at most "
        f"{MOST_EVAL_EXAMPLES} examples, before and after training."
    )


ANSWERING_NOTES = (
    f"The time of a token: the prompt of sample.txt, one row, continued greedily by {NEW_TOKENS} tokens with a cache "
    f"of keys and values; all of it, divided by {NEW_TOKENS}. Medians of as many answers as steps were timed, by "
    "turns, after one to warm up. Base: the same model with its adapter switched off. With adapter: accelerated, the "
    "adapter beside the weights. Merged: in the weights, with peft's modules still around them (merge_and_unload "
    "removes those, and leaves the base); - where it cannot be, and for weights in 4 bits, which rounding would change."
)


def write(folder: Path, settings: dict, results: dict[Method, dict | None], failures: dict[Method, str]) -> None:
    """results: metrics.json of each method, None of one that failed."""
    done = {method: metrics for method, metrics in results.items() if metrics is not None}
    (folder / "report.md").write_text(markdown(settings, done, failures), encoding="utf-8")
    with (folder / "report.csv").open("w", newline="", encoding="utf-8") as file:
        rows = csv.DictWriter(file, ["method", "lr", *KEYS, "failed"], extrasaction="ignore")
        rows.writeheader()
        rows.writerows(
            {"method": m.value, "lr": WAYS[m.value].lr, "failed": failures.get(m)} | (results[m] or {}) for m in results
        )
    if done:
        draw(folder, settings, {method.value: metrics for method, metrics in done.items()})


def draw(folder: Path, settings: dict, done: dict[str, dict]) -> None:
    from fastpeft.cli import plot

    def of_all(key: str) -> dict:
        return {method: metrics[key] for method, metrics in done.items()}

    title = f"{Path(settings['model']).name}, {Path(settings['data']).name}"
    styles = {method.value: index for index, method in enumerate(Method)}
    panels = {"training": of_all("loss_curve"), "evaluation": of_all("eval_loss_curve")}
    plot.curves_plot(panels, styles, title, folder / "curves.png")
    # One that has diverged has no place there.
    done = {method: metrics for method, metrics in done.items() if math.isfinite(metrics["eval_loss_after"])}
    costs = {
        "trainable parameters": of_all("trainable_parameters"),
        "step, accelerated (ms)": of_all("step_ms_accelerated"),
    }
    title = f"{title}, after {settings['steps']} steps"
    plot.tradeoff_plot(of_all("eval_loss_after"), costs, styles, title, folder / "tradeoff.png")
