"""What a run says where its output is no terminal."""

import io
import time

from rich.console import Console

from fastpeft.cli import progress
from fastpeft.cli.finetune import how_to_go_on
from fastpeft.cli.output import Output


def wait_for(lines, count: int) -> list[str]:
    end = time.monotonic() + 10
    while len(found := lines.getvalue().splitlines()) < count and time.monotonic() < end:
        time.sleep(0.01)
    return found


def test_a_file_gets_a_line_every_so_many_seconds(monkeypatch):
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0.05)
    file = io.StringIO()
    bar = progress.progress(Console(file=file, width=40))
    task = bar.add_task("training", total=60, loss="-")
    with bar:
        bar.update(task, completed=3, loss="3.071", tokens_per_second=170.4)
        lines = wait_for(file, 2)
    assert len(lines) >= 2
    assert lines[0].startswith("training: step 3 of 60, loss 3.071, 170 tokens/s")
    time.sleep(0.2)
    count = len(file.getvalue().splitlines())
    time.sleep(0.2)
    assert len(file.getvalue().splitlines()) == count  # it ends with the run


def test_an_evaluation_after_the_last_step_is_not_silent(monkeypatch):
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0.05)
    file = io.StringIO()
    bar = progress.progress(Console(file=file))
    task = bar.add_task("evaluating", total=3, loss="-")
    with bar:
        bar.update(task, completed=3)
        assert wait_for(file, 1)[0].startswith("evaluating: step 3 of 3")


def test_what_has_no_steps_is_named_with_its_seconds(monkeypatch):
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0.05)
    file = io.StringIO()
    with progress.waiting(Console(file=file), "timing steps"):
        lines = wait_for(file, 1)
    assert lines[0].startswith("timing steps: 0 s")


def test_a_terminal_has_bars_and_no_lines(monkeypatch):
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0.05)
    file = io.StringIO()
    with progress.waiting(Console(file=file, force_terminal=True), "timing steps"):
        time.sleep(0.3)
    assert "timing steps: " not in file.getvalue()


def test_ctrl_c_says_how_to_go_on(tmp_path):
    output = Output(tmp_path / "run")
    assert how_to_go_on(output) == "nothing was saved yet"
    for step in (10, 20):
        (output.checkpoints / f"checkpoint-{step}").mkdir(parents=True)
        (output.checkpoints / f"checkpoint-{step}" / "trainer_state.json").write_text("{}")
    assert how_to_go_on(output) == "saved up to step 20; the same command with --resume goes on from there"
