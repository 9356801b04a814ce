"""loss.png: training and evaluation loss over steps."""

from pathlib import Path


def points(history: list[dict], key: str) -> tuple[list[int], list[float]]:
    rows = [row for row in history if key in row]
    return [row["step"] for row in rows], [row[key] for row in rows]


def loss_plot(history: list[dict], title: str, path: Path) -> None:
    """history: the Trainer's `log_history`."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # no pyplot: nothing global, no display
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.plot(*points(history, "loss"), color="#7aa6d6", linewidth=1.2, label="training")
    axes.plot(*points(history, "eval_loss"), color="#c8452c", linewidth=2, marker="o", label="evaluation")
    axes.set(xlabel="optimizer step", ylabel="loss (nats per token)", title=title)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path)
