"""What fastpeft uses of other packages beyond their documented interface, and what it does where that is not there.

Each use belongs to a feature ("lora", "dora", "ia3", "prefix", "prompt", "loss"). `find` takes a name out of a package,
`parameters` and `attributes` look at what a function or an object must have. What is missing is kept as a reason:
`why_not(feature)` gives it, `accelerate` leaves such modules to their owner and prints the reason in its Report.
"""

from __future__ import annotations

import inspect
import logging
import re
from collections.abc import Callable, Mapping
from functools import cache
from importlib import import_module, metadata
from typing import Any

# The releases that the tests have run with, oldest and newest. `make compat` runs both ends and some between.
COVERED = {
    "torch": ("2.11", "2.13"),
    "triton": ("3.6", "3.9"),
    "transformers": ("5.16", "5.24"),
    "peft": ("0.20", "0.21"),
    "bitsandbytes": ("0.49", "0.50"),
    "trl": ("1.0", "1.16"),
    "numpy": ("2.0", "2.4"),
}

_missing: dict[str, list[str]] = {}


class Absent:
    """Stands for a class that the installed release does not have: nothing is an instance of it."""


def find(feature: str, path: str) -> Any:
    """What `path`, "package.module:name", names; `Absent`, and a reason kept, where it is not there."""
    module, _, name = path.partition(":")
    try:
        return getattr(import_module(module), name)
    except (ImportError, AttributeError):
        miss(feature, f"{_release(module)} has no {module}.{name}")
        return Absent


def parameters(feature: str, function: Callable, *names: str) -> None:
    """Keeps a reason where `function` takes no argument of one of these names."""
    if function is not Absent and (lacking := set(names) - set(inspect.signature(function).parameters)):
        miss(feature, f"{_release(function.__module__)}: {function.__qualname__} takes no {', '.join(sorted(lacking))}")


def miss(feature: str, reason: str) -> None:
    """Keeps a reason why `feature` cannot be served with the installed packages."""
    _missing.setdefault(feature, []).append(reason)


def why_not(feature: str) -> str | None:
    """The first reason why `feature` cannot be served with the installed packages; None where it can."""
    return next(iter(_missing.get(feature, ())), None)


def attributes(thing: object, *names: str) -> str | None:
    """Why `thing`, an object of another package, is not what fastpeft expects: what it lacks. None where it has all."""
    lacking = [name for name in names if not hasattr(thing, name)]
    cls = type(thing)
    return f"{_release(cls.__module__)}: a {cls.__name__} has no {', '.join(lacking)}" if lacking else None


def _release(module: str) -> str:
    """Package and installed version, for a reason."""
    package = module.partition(".")[0]
    try:
        return f"{package} {metadata.version(package)}"
    except metadata.PackageNotFoundError:
        return package


# transformers renamed the argument and the output in 5.24; the old argument is taken until 5.40.
CACHE_NAMES = ("cache", "past_key_values")


def cache_name(forward: Callable) -> str | None:
    """The name under which the forward of a transformers model takes a cache; None where it takes none."""
    taken = inspect.signature(forward).parameters
    return next((name for name in CACHE_NAMES if name in taken), None)


def cache_of(named: Mapping[str, Any]) -> Any:
    """The cache among the arguments or outputs of a transformers model, under either name; None without one."""
    return next((named[name] for name in CACHE_NAMES if named.get(name) is not None), None)


def versions() -> dict[str, str]:
    """Package -> installed version, of those in COVERED that are installed."""
    found = {}
    for package in COVERED:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def uncovered(installed: Mapping[str, str] | None = None) -> dict[str, str]:
    """Package -> what is said of its version, for those outside of the range that the tests have covered."""
    outside = {}
    for package, version in (versions() if installed is None else installed).items():
        oldest, newest = COVERED[package]
        if not _numbers(oldest) <= _numbers(version)[:2] <= _numbers(newest):
            outside[package] = f"{package} {version} is outside of {oldest} to {newest}, which the tests have covered"
    return outside


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version.partition("+")[0])[:3])


@cache
def warn_of_uncovered() -> None:
    """Logs once for each package whose version the tests have not covered."""
    for line in uncovered().values():
        logging.getLogger("fastpeft").warning("%s", line)
