"""The process of one method of `fastpeft compare`: `python -m fastpeft.cli.compare_worker JOB`, a Job as JSON.

Its stdout carries a JSON object a line: what `fastpeft finetune` would show in its bar, and at the end `failed` with
the reason where there is one. Everything else that is printed goes to stderr.
"""

import json
import os
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from fastpeft.cli.errors import BadInput, one_line
from fastpeft.cli.finetune import Settings, finetune
from fastpeft.cli.methods import Method
from fastpeft.cli.models import Dtype
from fastpeft.cli.recommend import Quantize
from fastpeft.cli.tasks import TaskName


@dataclass(frozen=True)
class Job:
    settings: Settings
    path: Path
    timed_steps: int

    def to_json(self) -> str:
        return json.dumps(asdict(self) | {"path": str(self.path)})

    @classmethod
    def from_json(cls, text: str) -> "Job":
        job = json.loads(text)
        settings = job["settings"]
        settings["method"] = Method(settings["method"])
        settings["quantize"] = settings["quantize"] and Quantize(settings["quantize"])
        settings["dtype"] = Dtype(settings["dtype"])
        settings["task"] = TaskName(settings["task"])
        return cls(Settings(**settings), Path(job["path"]), job["timed_steps"])


def work(job: Job, tell: Callable[[dict], None]) -> bool:
    """Whether the method was trained. Continues what was interrupted."""
    from fastpeft.cli import progress

    progress.listener = tell
    try:
        finetune(job.settings, job.path, compare_steps=job.timed_steps, resume=True)
        return True
    except BadInput as error:
        tell({"failed": str(error)})
    except Exception as error:
        import traceback

        traceback.print_exc()
        tell({"failed": f"{type(error).__name__}: {one_line(error)}"})
    finally:
        progress.listener = None
    return False


def main(job: str) -> int:
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as messages:
        os.dup2(2, 1)

        def tell(message: dict) -> None:
            print(json.dumps(message), file=messages, flush=True)

        try:
            return 0 if work(Job.from_json(job), tell) else 1
        except KeyboardInterrupt:
            return 130


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
