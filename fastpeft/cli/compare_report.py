"""The report of `fastpeft compare`: report.md, report.csv, curves.png and tradeoff.png, from each method's metrics."""

import csv
import math
from collections.abc import Callable
from pathlib import Path

from fastpeft.cli.methods import Method
from fastpeft.cli.recommend import human

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
    "trainable": (lambda m: m["trainable_parameters"], formatted(",")),
    "% of all": (lambda m: 100 * ratio(m, "trainable_parameters", "total_parameters"), formatted(".2g")),
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
    lines = [f"# {settings['model']}: {', '.join(m.value for m in (*done, *failures))}", ""]
    if failures:
        lines += [f"- **{method.value} failed**: {reason}" for method, reason in failures.items()] + [""]
    if done:
        first = next(iter(done.values()))
        versions = ", ".join(f"{name} {version}" for name, version in first["versions"].items())
        lines += [
            f"Trained on {settings['data']} with seed {settings['seed']}: {settings['steps']} steps of "
            f"{settings['batch_size']} x {settings['seq_len']} tokens. On {first['device']}; {versions}.",
            "",
            "## Training",
            "",
            *table(done, TRAINING),
            "",
            f"Losses are in nats per token, on the {settings['eval_fraction']:.3g} of the data held out (at most 200 "
            "examples), the same for all methods. A step is forward, loss and backward of one batch, without the "
            f"optimizer, the mean of {settings['timed_steps']}; peft and accelerated take turns on the same model. "
            "Peak memory is of the method's own process: what torch allocated on a GPU, all memory of the process on "
            "a CPU, its libraries included.",
            "",
            "![loss over steps](curves.png)",
            "",
            "![evaluation loss against its price](tradeoff.png)",
            "",
            "## Answering",
            "",
            *table(done, ANSWERING),
            "",
            "Time of one token: 24 tokens of the data continued greedily by 16 with a cache of keys and values, one "
            "row, all of it divided by 16; the mean of as many answers as steps were timed, by turns. Base is the same "
            "model with its adapter switched off. Merged is with the adapter in the weights; not for 4-bit weights, "
            "whose rounding would change the model.",
        ]
    return "\n".join(lines) + "\n"


def write(folder: Path, settings: dict, results: dict[Method, dict | None], failures: dict[Method, str]) -> None:
    """results: metrics.json of each method, None of one that failed."""
    done = {method: metrics for method, metrics in results.items() if metrics is not None}
    (folder / "report.md").write_text(markdown(settings, done, failures), encoding="utf-8")
    with (folder / "report.csv").open("w", newline="", encoding="utf-8") as file:
        rows = csv.DictWriter(file, ["method", *KEYS, "failed"], extrasaction="ignore")
        rows.writeheader()
        rows.writerows({"method": m.value, "failed": failures.get(m, "")} | (results[m] or {}) for m in results)
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
