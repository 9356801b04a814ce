"""The output folder: what may be written where, and when it counts as finished.

While a run is under way its folder holds only `checkpoints/` beside whatever a finished run left there before. The
results are written to `checkpoints/final/` and moved up at the end, `metrics.json` last: a folder with `metrics.json`
and no `checkpoints/` is a finished run.
"""

import json
import os
import shutil
from pathlib import Path

from fastpeft.cli.errors import BadInput

METRICS = "metrics.json"


class Output:
    unfinished = "an interrupted run"  # what there is where there are settings

    def __init__(self, path: Path):
        self.path = path.expanduser().absolute()
        self.checkpoints = self.path / "checkpoints"
        self.final = self.checkpoints / "final"
        self.settings = self.checkpoints / "settings.json"
        self.existed = self.path.exists()

    def check(self, settings: dict, *, resume: bool, overwrite: bool) -> None:
        """Refuses what would mix or lose runs. `settings`: what shapes a run, and so must not change in the middle."""
        if resume and overwrite:
            raise BadInput("--resume and --overwrite exclude each other")
        self.check_place()
        if self.settings.exists():
            if resume:
                self.check_same(settings)
            elif not overwrite:
                raise BadInput(f"--output: {self.path} holds {self.unfinished}; add --resume or --overwrite")
        elif (self.path / METRICS).exists():
            if not overwrite:
                raise BadInput(f"--output: {self.path} holds a finished run; add --overwrite to replace it")
        elif self.existed and any(self.path.iterdir()):
            raise BadInput(f"--output: {self.path} is not empty and holds no run of fastpeft")

    def check_place(self) -> None:
        place = self.path
        while not place.exists():
            place = place.parent
        if not place.is_dir():
            raise BadInput(f"--output: {place} is not a folder")
        if not os.access(place, os.W_OK):
            raise BadInput(f"--output: cannot write into {place}")

    def kept(self, key: str):
        """A setting of the run that was interrupted; None without one."""
        return json.loads(self.settings.read_text()).get(key) if self.settings.exists() else None

    def check_same(self, settings: dict) -> None:
        before = json.loads(self.settings.read_text())
        for key, value in settings.items():
            if before.get(key) != value:
                raise BadInput(f"--resume: {self.unfinished} has {key} {before.get(key)}, not {value}")

    def begin(self, settings: dict, *, resume: bool) -> None:
        if not resume:
            shutil.rmtree(self.checkpoints, ignore_errors=True)
        self.checkpoints.mkdir(parents=True, exist_ok=True)
        self.settings.write_text(json.dumps(settings, indent=2))

    def whole_checkpoints(self) -> dict[int, Path]:
        """By step. The Trainer writes trainer_state.json last; without it a folder is half-written."""
        whole = [p.parent for p in self.checkpoints.glob("checkpoint-*/trainer_state.json")]
        return {int(p.name.removeprefix("checkpoint-")): p for p in whole}

    def resume_point(self, steps: int) -> Path | None:
        """The newest checkpoint before the last step: from one at the last step the Trainer takes a step too many."""
        before = {step: path for step, path in self.whole_checkpoints().items() if step < steps}
        return before[max(before)] if before else None

    def abandon(self) -> None:
        """After a failure: keeps what --resume can use, and leaves nothing otherwise."""
        if self.whole_checkpoints():
            return
        shutil.rmtree(self.checkpoints, ignore_errors=True)
        if not self.existed and self.path.exists():
            self.path.rmdir()

    def finish(self, metrics: dict) -> None:
        (self.final / METRICS).write_text(json.dumps(metrics, indent=2) + "\n")
        (self.path / METRICS).unlink(missing_ok=True)  # an older run stops counting before its files are replaced
        for file in sorted(self.final.iterdir(), key=lambda p: p.name == METRICS):
            os.replace(file, self.path / file.name)
        shutil.rmtree(self.checkpoints)
