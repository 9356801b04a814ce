"""fastpeft: parameter-efficient fine-tuning at the speed of the frozen model.

model = get_peft_model(model, LoraConfig(...))   # peft, as before
fastpeft.accelerate(model)                       # the one line to add
"""

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("fastpeft")
except PackageNotFoundError:  # run from a source tree that is not installed
    __version__ = "0+unknown"

# Public name -> the module that defines it. Loaded on first use: `fastpeft --help` needs no torch, and a person who
# writes modules needs no peft.
_HOME = {
    "accelerate": "fastpeft.integrations.peft",
    "restore": "fastpeft.integrations.peft",
    "Report": "fastpeft.integrations.peft",
    "attach_prefix": "fastpeft.integrations.prefix",
    "detach_prefix": "fastpeft.integrations.prefix",
    "use_backend": "fastpeft.backend",
    "NF4Weight": "fastpeft.quant",
    "convert": "fastpeft.nn",
    "save_adapter": "fastpeft.nn",
    "load_adapter": "fastpeft.nn",
    "doctor": "fastpeft.cli.doctor",
}
_SUBMODULES = ("backend", "integrations", "nn", "ops", "quant", "reference")

__all__ = [*_HOME, *_SUBMODULES]


def __getattr__(name: str):
    if name in _HOME:
        value = getattr(import_module(_HOME[name]), name)
        globals()[name] = value
        return value
    if name in _SUBMODULES:
        return import_module(f"fastpeft.{name}")
    raise AttributeError(f"module 'fastpeft' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
