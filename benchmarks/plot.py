"""Draws the PNGs of the README from CSV files alone: python -m benchmarks.plot [--results DIR] [--out DIR]

speedup-<device>.png   training step, stock peft over fastpeft, by method and model
roofline-<device>.png  fraction of the measured roofline by M, a panel for each layer and pass
memory-<device>.png    bytes that a decoder layer keeps for backward, by method

The newest row of each configuration counts; the subtitle says which commit and versions it came from.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from pathlib import Path

from benchmarks.environment import RESULTS, read_csv

Rows = list[dict[str, str]]

# Of Okabe and Ito: told apart by people who are colour-blind, too.
_COLOURS = {"fastpeft": "#D55E00", "peft": "#0072B2", "frozen layer": "#555555", "torch.compile": "#CC79A7",
            "unsloth": "#009E73", "axolotl": "#56B4E9", "torchao": "#E69F00", "gemlite": "#8B6914"}  # fmt: skip


def newest(rows: Rows, keys: Sequence[str]) -> Rows:
    """The last row of each combination of `keys`, in the order of their first appearance."""
    found = {}
    for row in rows:
        found[tuple(row[key] for key in keys)] = row
    return list(found.values())


def _slug(device: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")


def _by(rows: Rows, key: str) -> dict[str, Rows]:
    groups: dict[str, Rows] = {}
    for row in rows:
        groups.setdefault(row[key], []).append(row)
    return groups


def _source(rows: Rows) -> str:
    row = max(rows, key=lambda row: row["date"])
    versions = ", ".join(f"{name} {row[name]}" for name in ("torch", "peft", "bitsandbytes"))
    commits = ", ".join(sorted({row["commit"] + ("+" if row["dirty"] == "true" else "") for row in rows}))
    return f"{row['device']}; {versions}; commit {commits}; {row['date'][:10]}"


def _figure(width: float, height: float, title: str, rows: Rows):
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # no pyplot: nothing global, no display
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=12)
    figure.supxlabel(_source(rows), fontsize=7, color="#555555")
    return figure


def speedup(rows: Rows, path: Path) -> None:
    """A bar a method, a colour a configuration: the median ratio of pairs, whiskers from p20 to p80."""
    configurations = _by([row | {"configuration": _configuration(row)} for row in rows], "configuration")
    methods = list(_by(rows, "method"))
    figure = _figure(8, 4.2, "Training step: times as fast as stock peft", rows)
    axes = figure.subplots()
    width = 0.8 / len(configurations)
    for index, (configuration, of_one) in enumerate(configurations.items()):
        at = [methods.index(row["method"]) + (index - (len(configurations) - 1) / 2) * width for row in of_one]
        ratios = [float(row["ratio"]) for row in of_one]
        low = [max(0.0, ratio - float(row["ratio_p20"])) for ratio, row in zip(ratios, of_one, strict=True)]
        high = [max(0.0, float(row["ratio_p80"]) - ratio) for ratio, row in zip(ratios, of_one, strict=True)]
        colour = list(_COLOURS.values())[index % len(_COLOURS)]
        axes.bar(at, ratios, width * 0.9, color=colour, label=configuration)
        axes.errorbar(at, ratios, [low, high], fmt="none", ecolor="#222222", elinewidth=1, capsize=3)
        for x, ratio, above in zip(at, ratios, high, strict=True):
            axes.annotate(f"{ratio:.2f}", (x, ratio + above), xytext=(0, 3), textcoords="offset points",
                          ha="center", fontsize=8)  # fmt: skip
    axes.axhline(1, color="#222222", linewidth=1)
    axes.set_xticks(range(len(methods)), methods)
    room = 1.05 + 0.07 * len(configurations)  # for the legend
    axes.set(ylabel="time of peft / time of fastpeft", ylim=(0, axes.get_ylim()[1] * room))
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)
    axes.legend(fontsize=8, loc="upper left")
    figure.savefig(path)


def _configuration(row: dict[str, str]) -> str:
    parts = [f"{row['model']} shape", f"{row['layers']} layers", f"{row['tokens']} tokens"]
    parts += [f"dropout {row['dropout']}"] if float(row["dropout"]) else []
    return ", ".join(parts + (["checkpointing"] if row["checkpointing"] == "true" else []))


def roofline(rows: Rows, path: Path) -> None:
    """A panel for each layer and pass, a line for each side that reaches every M or one of them."""
    panels = _by([row | {"panel": f"{row['model']} {row['layer']} [{row['N']}, {row['K']}]\n{row['weight']}, "
                                  f"rank {row['R']}, {row['pass']}"} for row in rows], "panel")  # fmt: skip
    columns = min(3, len(panels))
    lines = -(-len(panels) // columns)
    figure = _figure(4.2 * columns + 1.8, 3.1 * lines + 1.2, "lora_linear: fraction of the measured roofline", rows)
    grid = figure.subplots(lines, columns, squeeze=False, sharey=True)
    handles = {}
    for axes, (title, of_panel) in zip(grid.flat, panels.items(), strict=False):
        for side, of_side in _by(of_panel, "side").items():
            if side.startswith("fastpeft,"):
                continue  # forced backends: for tuning, not for this plot
            points = sorted((int(row["M"]), float(row["fraction"])) for row in of_side)
            colour = next((c for name, c in _COLOURS.items() if side.startswith(name)), "#999999")
            style = (
                {"linestyle": "--", "marker": "s", "markerfacecolor": "white"} if "fp32" in side else {"marker": "o"}
            )
            (line,) = axes.plot(*zip(*points, strict=True), markersize=5, color=colour, **style)
            handles.setdefault(side, line)
        ticks = sorted({int(row["M"]) for row in of_panel})
        axes.set_xscale("log", base=2)
        axes.set_xticks(ticks, [str(M) for M in ticks], fontsize=8)
        axes.minorticks_off()
        axes.set_title(title, fontsize=8)
        axes.set_xlabel("M (tokens)", fontsize=8)
        axes.grid(alpha=0.3)
    grid[0, 0].set_ylim(0, 1.08 * max(float(row["fraction"]) for row in rows))  # shared by all panels
    for axes in list(grid.flat)[len(panels) :]:
        axes.set_axis_off()
    for axes in grid[:, 0]:
        axes.set_ylabel("floor / time", fontsize=8)
    figure.legend(handles.values(), handles.keys(), loc="outside right upper", fontsize=8)
    figure.savefig(path)


def memory(rows: Rows, path: Path) -> None:
    """Two bars a method: what autograd keeps of a decoder layer, by peft and by fastpeft; a panel a model."""
    models = _by(rows, "model")
    figure = _figure(6.5 * len(models), 4.2, "Kept for backward by a decoder layer", rows)
    panels = figure.subplots(1, len(models), squeeze=False).flat
    for axes, (model, of_model) in zip(panels, models.items(), strict=True):
        for offset, side in ((-0.2, "peft"), (0.2, "fastpeft")):
            values = [int(row[f"{side}_saved_bytes_per_layer"]) / 2**20 for row in of_model]
            at = [index + offset for index in range(len(of_model))]
            bars = axes.bar(at, values, 0.38, color=_COLOURS[side], label=side)
            axes.bar_label(bars, [f"{value:.3g}" for value in values], fontsize=8, padding=2)
        axes.set_xticks(range(len(of_model)), [row["method"] for row in of_model])
        axes.set_title(f"{model} shape, {of_model[0]['tokens']} tokens, {of_model[0]['dtype']}", fontsize=9)
        axes.set_ylabel("MiB a layer")
        axes.margins(y=0.25)  # room for the legend
        axes.grid(axis="y", alpha=0.3)
        axes.set_axisbelow(True)
        axes.legend(fontsize=8, loc="upper right", ncols=2)
    figure.savefig(path)


_STEP_KEYS = (
    "model",
    "method",
    "hidden",
    "layers",
    "tokens",
    "rank",
    "dropout",
    "dtype",
    "accumulation",
    "checkpointing",
)
_OP_KEYS = ("model", "layer", "pass", "weight", "M", "R", "side")
PLOTS = {
    "speedup": ("step.csv", _STEP_KEYS, speedup),
    "roofline": ("lora_linear.csv", _OP_KEYS, roofline),
    "memory": ("memory.csv", ("model", "method", "hidden", "tokens", "dropout", "dtype"), memory),
}


def draw(results: Path, out: Path) -> list[Path]:
    """The PNGs that `results` has rows for; one a device."""
    drawn = []
    for name, (file, keys, plot) in PLOTS.items():
        if not (results / file).exists():
            continue
        rows = [row for row in read_csv(results / file) if row.get("ms_p50") != ""]
        for device, of_device in _by(rows, "device").items():
            out.mkdir(parents=True, exist_ok=True)
            drawn.append(out / f"{name}-{_slug(device)}.png")
            plot(newest(of_device, keys), drawn[-1])
    return drawn


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="DIR", help="where the CSV files are")
    parser.add_argument("--out", type=Path, metavar="DIR", help="where the PNGs go; default: beside the CSV files")
    args = parser.parse_args(argv)
    for path in draw(args.results, args.out or args.results) or ["no results to draw"]:
        print(path)


if __name__ == "__main__":
    main()
