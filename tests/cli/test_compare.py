import csv
import itertools
import json
import os
import stat

import pytest
import torch

from fastpeft.cli import compare, compare_worker
from fastpeft.cli.finetune import Settings
from fastpeft.cli.methods import Method


@pytest.fixture
def comparison(command_line, model_dir, jsonl, tmp_path):
    """A few quick steps of some methods; keyword arguments become options, and None leaves one out."""

    def run(methods="lora,prefix", **changes):
        options = {
            "model": model_dir,
            "data": jsonl,
            "output": tmp_path / "all",
            "steps": 4,
            "seq_len": 32,
            "timed_steps": 1,
        }
        words = ["compare", "--methods", methods]
        for name, value in (options | changes).items():
            flag = "--" + name.replace("_", "-")
            words += [flag] if value is True else [] if value is None else [flag, value]
        return command_line(*words)

    return run


@pytest.fixture
def in_process(monkeypatch):
    """Runs the methods here, where a process of their own would first import torch; returns the names of those run."""
    names = []

    def run(job, log, hear):
        names.append(job.settings.method.value)
        job = compare_worker.Job.from_json(job.to_json())
        return 0 if compare_worker.work(job, lambda message: hear(json.loads(json.dumps(message)))) else 1

    monkeypatch.setattr(compare, "run_apart", run)
    return names


def break_method(monkeypatch, name):
    """Makes a method fail while its model is prepared."""
    from dataclasses import replace

    from fastpeft.cli.methods import WAYS

    def broken(model, settings, heads):
        raise RuntimeError("no [room]\nat all")

    monkeypatch.setitem(WAYS, name, replace(WAYS[name], add=broken))


def rows_of(folder):
    with (folder / "report.csv").open() as file:
        return {row["method"]: row for row in csv.DictReader(file)}


def cells_of(folder, title):
    """Of the table below a heading of report.md: method -> column -> cell."""
    below = (folder / "report.md").read_text().split(f"## {title}\n")[1]
    lines = [line for line in below.split("\n## ")[0].splitlines() if line.startswith("|")]
    names, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {row[0]: dict(zip(names, row, strict=True)) for row in rows}


@pytest.mark.slow
def test_the_report_says_what_the_runs_measured(comparison, in_process, read_metrics, model_dir, jsonl, tmp_path):
    methods = ["lora", "qlora", "adapter-houlsby", "prefix", "full"]
    code, out, err = comparison(",".join(methods), steps=2)
    assert (code, err) == (0, "")
    assert in_process == methods
    folder = tmp_path / "all"
    metrics = {method: read_metrics(folder / method) for method in methods}
    for method, row in rows_of(folder).items():
        numbers = {name: float(value) for name, value in row.items() if value and name not in ("method", "lr")}
        assert numbers == {name: metrics[method][name] for name in numbers}
        assert {"trainable_parameters", "adapter_bytes", "step_ms_accelerated", "eval_loss_after"} <= numbers.keys()
        assert f"{method}: evaluation loss {numbers['eval_loss_before']:.4f}" in out

    report = (folder / "report.md").read_text()
    assert f"# {model_dir} on {jsonl}" in report
    assert "steps 2, batch size 2, seq len 32" in report
    assert "seed 0" in report
    training, answering = cells_of(folder, "Training"), cells_of(folder, "Answering")
    assert list(training) == list(answering) == methods
    assert training["lora"]["trainable"] == f"{metrics['lora']['trainable_parameters']:,}"
    assert training["full"]["% of all"] == "100"
    without_stock = {m for m in methods if training[m]["step, peft (ms)"] == training[m]["times as fast"] == "-"}
    assert without_stock == {"adapter-houlsby", "full"}
    assert {m for m in methods if answering[m]["merged (ms)"] != "-"} == {"lora"}
    assert {m for m in methods if answering[m]["of base"] == "-"} == {"full"}
    expected = metrics["prefix"]["token_ms_adapted"] / metrics["prefix"]["token_ms_base"]
    assert answering["prefix"]["of base"] == f"{expected:.2f}"

    # The same data and model: what starts as the model itself starts from the same loss.
    assert metrics["adapter-houlsby"]["eval_loss_before"] == pytest.approx(
        metrics["lora"]["eval_loss_before"], abs=0.01
    )
    from matplotlib.image import imread

    for name in ("curves.png", "tradeoff.png"):
        assert imread(folder / name)[..., :3].std() > 0.05


@pytest.mark.slow
def test_an_interrupted_comparison_goes_on(comparison, in_process, monkeypatch, tmp_path):
    from fastpeft.cli.progress import ProgressBar

    folder = tmp_path / "all"
    on_step_end = ProgressBar.on_step_end

    def stop(self, args, state, control, **kwargs):
        on_step_end(self, args, state, control, **kwargs)
        if in_process[-1] == "prefix" and state.global_step == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(ProgressBar, "on_step_end", stop)
        code, _, err = comparison(steps=4)
    assert code == 130
    assert "interrupted" in err
    assert not (folder / "report.md").exists()
    assert [p.name for p in (folder / "prefix").iterdir()] == ["checkpoints"]

    code, _, err = comparison()
    assert code == 2
    assert "holds a comparison; add --resume or --overwrite" in err
    code, _, err = comparison(resume=True, steps=5)
    assert code == 2
    assert "has steps 4, not 5" in err

    in_process.clear()
    code, out, err = comparison("lora,prefix,ia3", resume=True)  # with one more
    assert (code, err) == (0, "")
    assert in_process == ["prefix", "ia3"]
    assert "step 0:" not in out.split("with ia3")[0]
    assert list(rows_of(folder)) == ["lora", "prefix", "ia3"]
    curve = json.loads((folder / "prefix" / "metrics.json").read_text())["loss_curve"]
    assert [step for step, _ in curve] == [1, 2, 3, 4]

    in_process.clear()
    (folder / "notes.txt").write_text("mine")
    code, _, err = comparison("ia3", overwrite=True, steps=1)
    assert (code, err) == (0, "")
    assert in_process == ["ia3"]
    kept = {"compare.json", "curves.png", "ia3", "notes.txt", "report.csv", "report.md", "tradeoff.png"}
    assert {p.name for p in folder.iterdir()} == kept


@pytest.mark.slow
def test_a_method_that_fails_does_not_end_the_others(comparison, in_process, monkeypatch, tmp_path):
    folder = tmp_path / "all"
    with monkeypatch.context() as patch:
        break_method(patch, "lora")
        code, out, _ = comparison("lora,ia3", steps=1)
    assert code == 1
    assert in_process == ["lora", "ia3"]
    assert "lora failed: RuntimeError: no [room]" in out
    assert "**lora failed**: RuntimeError: no [room]" in (folder / "report.md").read_text()
    rows = rows_of(folder)
    assert rows["lora"]["failed"] == "RuntimeError: no [room]"
    assert float(rows["ia3"]["eval_loss_after"]) > 0
    assert list(cells_of(folder, "Training")) == ["ia3"]

    in_process.clear()
    code, _, _ = comparison("lora,ia3", steps=1, resume=True)  # tries it again
    assert (code, in_process) == (0, ["lora"])
    assert list(cells_of(folder, "Training")) == ["lora", "ia3"]


def test_a_process_that_is_killed_is_a_failure(comparison, monkeypatch, tmp_path):
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\nkill -9 $$\n")
    python.chmod(python.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setattr(compare.sys, "executable", str(python))
    code, out, _ = comparison("lora")
    assert code == 1
    assert "its process was ended by SIGKILL, as the system does when memory runs out; see lora.log" in out
    report = (tmp_path / "all" / "report.md").read_text()
    assert "SIGKILL" in report
    assert "## Training" not in report


@pytest.mark.slow
def test_a_process_of_its_own_is_interrupted_and_leaves_what_it_can_go_on_from(model_dir, jsonl, tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    settings = Settings(model=str(model_dir), data=str(jsonl), method=Method("lora"), steps=40, seq_len=32, rank=4)
    job = compare_worker.Job(settings, tmp_path / "lora", 1)
    messages, processes = [], []
    popen = compare.subprocess.Popen

    def start(*args, **kwargs):
        processes.append(popen(*args, **kwargs))
        return processes[0]

    def hear(message):
        messages.append(message)
        if message.get("completed") == 9:  # checkpoints are written every 8 steps
            raise KeyboardInterrupt

    monkeypatch.setattr(compare.subprocess, "Popen", start)
    with pytest.raises(KeyboardInterrupt):
        compare.run_apart(job, tmp_path / "log", hear)
    assert processes[0].poll() == 130
    with pytest.raises(ProcessLookupError):
        os.kill(processes[0].pid, 0)
    assert {"description": "evaluating"} in messages
    assert [m["completed"] for m in messages if "completed" in m] == list(range(1, 10))
    assert [p.name for p in (tmp_path / "lora").iterdir()] == ["checkpoints"]
    assert "checkpoint-8" in {p.name for p in (tmp_path / "lora" / "checkpoints").iterdir()}
    assert "parameters train" in (tmp_path / "log").read_text()


def no_packages(monkeypatch):
    import importlib.util

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "bitsandbytes" else name)


BAD = {
    "unknown method": ({"methods": "lora,lorra"}, "unknown 'lorra'"),
    "a method twice": ({"methods": "lora,ia3,lora"}, "lora is there twice"),
    "no method": ({"methods": ", "}, "none is named"),
    "an option of none": ({"methods": "prefix,ia3", "rank": 4}, "--rank: none of these methods"),
    "full in 4 bits": ({"methods": "lora,full", "quantize": "nf4"}, "--quantize: full"),
    "prefix with checkpoints": ({"gradient_checkpointing": True}, "--gradient-checkpointing: stock peft"),
    "no model": ({"model": "/nowhere"}, "no such folder"),
    "no data": ({"data": "/nowhere.jsonl"}, "no such file"),
    "optimizer": ({"optimizer": "sgdd"}, "sgdd"),
    "both": ({"resume": True, "overwrite": True}, "exclude"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_before_anything_is_written(case, comparison, in_process, tmp_path):
    changes, words = BAD[case]
    code, _, err = comparison(**changes)
    assert code == 2
    assert words in err
    assert err.startswith("fastpeft: error: ")
    assert err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
    assert in_process == []


def test_missing_packages_several_processes_and_other_peoples_folders_are_refused(
    comparison, in_process, monkeypatch, tmp_path
):
    with monkeypatch.context() as patch:
        no_packages(patch)
        assert "needs bitsandbytes" in comparison("lora,qlora")[2]
    with monkeypatch.context() as patch:
        patch.setenv("WORLD_SIZE", "2")
        assert "without torchrun" in comparison()[2]
    (tmp_path / "all").mkdir()
    (tmp_path / "all" / "metrics.json").write_text("{}")
    assert "holds a run of finetune" in comparison(overwrite=True)[2]
    (tmp_path / "all" / "metrics.json").rename(tmp_path / "all" / "notes.txt")
    assert "not empty" in comparison(overwrite=True)[2]
    assert in_process == []
    assert [p.name for p in (tmp_path / "all").iterdir()] == ["notes.txt"]


@pytest.mark.parametrize("method", ["lora", "dora", "qlora", "ia3", "prefix", "prompt", "adapter-parallel", "full"])
def test_answers_are_timed_without_with_and_with_a_merged_adapter(method, model_dir):
    """Which model answers where, by its logits."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    import fastpeft
    from fastpeft.cli import models, tokentime

    settings = Settings(model=str(model_dir), data="", method=Method(method), rank=4, prefix_length=4, bottleneck=4)
    source = str(model_dir)
    config = models.load_config(source, source)
    base, _ = models.load_base(source, source, config, four_bit=settings.four_bit, device=torch.device("cpu"))
    ids = torch.arange(24).view(1, 24) * 7 % 250

    def logits(model):
        answer = model.eval().generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=1,
            do_sample=False,
            return_dict_in_generate=True,
            output_logits=True,
        )
        return answer.logits[0].float()

    plain = logits(base)
    model = settings.way.add(base, settings, [])
    for parameter in model.parameters():
        if parameter.requires_grad and method != "full":
            parameter.data = parameter.data.float() + 0.1 * torch.randn_like(parameter, dtype=torch.float32)
    fastpeft.accelerate(model)
    found, merged = {}, {}
    for name, context in tokentime.arms(model).items():
        with context():
            found[name] = logits(model)
            merged[name] = {module.merged for module in model.modules() if isinstance(module, BaseTunerLayer)}
    if method == "full":
        assert found == {}
        return
    torch.testing.assert_close(found["base"], plain)
    learnt = (found["adapted"] - plain).norm()
    assert learnt > 0.05 * plain.norm()
    assert ("merged" in found) == (method in ("lora", "dora", "ia3"))
    if "merged" in found:
        assert (found["merged"] - found["adapted"]).norm() < 0.1 * learnt
        assert merged == {"base": {False}, "adapted": {False}, "merged": {True}}
    assert (logits(model) - found["adapted"]).norm() <= 0.1 * learnt


def test_answers_are_timed_without_the_autocast_of_training(model_dir):
    """And the model has it again afterwards."""
    from fastpeft.cli import models, tokentime

    settings = Settings(model=str(model_dir), data="", method=Method("adapter-parallel"), bottleneck=4)
    config = models.load_config(settings.model, settings.model)
    base, _ = models.load_base(settings.model, settings.model, config, four_bit=False, device=torch.device("cpu"))
    model = settings.way.add(base, settings, []).train()

    def wrapped(*args, **kwargs):
        raise AssertionError("an answer came here")

    model.forward = wrapped
    times = tokentime.compare(model, [1, 2, 3], 1)
    assert times["token_ms_base"] > 0
    assert times["token_ms_adapted"] > 0
    assert times["token_ms_merged"] is None
    assert model.forward is wrapped
    assert model.training


@pytest.mark.parametrize("losses", [[2.0] * 13, [2 + i / 10 for i in range(13)], [1.0, 1.001, 1.002, 3.0], [2.5]])
def test_labels_beside_a_plot_do_not_overlap(losses):
    from matplotlib.text import Text

    from fastpeft.cli.plot import label_at_right, new_figure

    figure = new_figure(6, 4.8)
    axes = figure.subplots()
    points = [("adapter-houlsby", 1.0 + i, loss, "black") for i, loss in enumerate(losses)]
    for _, x, y, _ in points:
        axes.plot(x, y, "o")
    label_at_right(axes, points)
    figure.canvas.draw()
    boxes = [Text.get_window_extent(text) for text in axes.texts]  # without the lines to the points
    assert len(boxes) == len(losses)
    assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))
    for text, box in zip(axes.texts, boxes, strict=True):
        assert figure.bbox.containsx(box.x0) and figure.bbox.containsx(box.x1), text
        assert figure.bbox.containsy(box.y0) and figure.bbox.containsy(box.y1), text
