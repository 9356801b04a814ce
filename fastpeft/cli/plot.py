"""loss.png of a run; curves.png and tradeoff.png of a comparison."""

from collections.abc import Sequence
from pathlib import Path

LOSS = "loss (nats)"
# Apart from each other in hue and lightness, by turns, so that neighbours differ for colour-blind eyes too; as many as
# there are methods, so that a method keeps its colour from one comparison to the next.
COLOURS = (
    "#1f77b4", "#d95f02", "#2ca02c", "#c2185b", "#7e57c2", "#8c6d31", "#00a3b4", "#d99a00", "#4d4d4d", "#7fae2e",
    "#e377c2", "#8b0000", "#0b3d91",
)  # fmt: skip
MARKERS = "osD^vP*X<>phd"


def points(history: list[dict], key: str) -> tuple[list[int], list[float]]:
    rows = [row for row in history if key in row]
    return [row["step"] for row in rows], [row[key] for row in rows]


def new_figure(width: float, height: float):
    """In inches."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # no pyplot: nothing global, no display
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def loss_plot(history: list[dict], title: str, path: Path) -> None:
    """history: the Trainer's `log_history`."""
    figure = new_figure(8, 4.5)
    axes = figure.subplots()
    axes.plot(*points(history, "loss"), color="#7aa6d6", linewidth=1.2, label="training")
    axes.plot(*points(history, "eval_loss"), color="#c8452c", linewidth=2, marker="o", label="evaluation")
    axes.set(xlabel="optimizer step", ylabel=LOSS, title=title)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path)


def curves_plot(panels: dict[str, dict[str, list]], styles: dict[str, int], title: str, path: Path) -> None:
    """panels: by title, of each method [[step, loss]]. styles: the place of a method in COLOURS and MARKERS."""
    figure = new_figure(5.5 * len(panels), 4.8)
    for axes, (name, curves) in zip(figure.subplots(1, len(panels)), panels.items(), strict=True):
        for method, curve in curves.items():
            style = styles[method]
            steps, losses = zip(*curve, strict=True)
            axes.plot(steps, losses, color=COLOURS[style], marker=MARKERS[style], markersize=4, label=method)
        axes.set(xlabel="optimizer step", ylabel=LOSS, title=name)
        axes.locator_params(axis="x", integer=True)
        axes.grid(alpha=0.3)
    figure.suptitle(title)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right center")
    figure.savefig(path)


def tradeoff_plot(
    losses: dict[str, float], costs: dict[str, dict[str, float]], styles: dict[str, int], title: str, path: Path
) -> None:
    """losses: evaluation loss by method, of all that are drawn. costs: by the label of an axis, a number by method."""
    from matplotlib.ticker import EngFormatter

    figure = new_figure(6 * len(costs), 4.8)
    for axes, (label, cost) in zip(figure.subplots(1, len(costs), squeeze=False)[0], costs.items(), strict=True):
        axes.set(xlabel=label, ylabel=f"evaluation {LOSS}")
        if max(cost.values(), default=0) > 20 * min(cost.values(), default=0) > 0:
            axes.set_xscale("log")
        if max(cost.values(), default=0) > 1e5:
            axes.xaxis.set_major_formatter(EngFormatter(sep=""))  # 4.9M
        axes.grid(alpha=0.3)
        axes.margins(0.08)
        for method, loss in losses.items():
            style = styles[method]
            axes.plot(cost[method], loss, color=COLOURS[style], marker=MARKERS[style], markersize=8, linestyle="")
        label_at_right(axes, [(method, cost[method], loss, COLOURS[styles[method]]) for method, loss in losses.items()])
    figure.suptitle(title)
    figure.savefig(path)


def label_at_right(axes, points: Sequence[tuple[str, float, float, str]]) -> None:
    """Names in a column beside the axes, each joined to its point: they cannot overlap, however close the points are.

    points: (name, x, y, colour).
    """
    points = sorted(points, key=lambda point: point[2])
    low, high = axes.get_ylim()
    heights = spread([(y - low) / (high - low) for _, _, y, _ in points], gap=0.06)
    for (name, x, y, colour), height in zip(points, heights, strict=True):
        axes.annotate(
            name,
            (x, y),
            (1.04, height),
            textcoords="axes fraction",
            color=colour,
            va="center",
            arrowprops={
                "arrowstyle": "-",
                "color": colour,
                "alpha": 0.4,
                "relpos": (0, 0.5),
                "shrinkA": 0,
                "shrinkB": 4,
            },
        )


def spread(heights: list[float], gap: float) -> list[float]:
    """The heights, which ascend, moved apart to at least `gap`, within 0 and 1 as far as there is room."""
    up = []
    for height in heights:
        up.append(max(height, up[-1] + gap if up else 0.0))
    down = []
    for height in reversed(up):
        down.append(min(height, down[-1] - gap if down else 1.0))
    return down[::-1]
