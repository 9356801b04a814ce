import subprocess
import sys

import fastpeft
from fastpeft.cli import doctor as module


def test_doctor_tells_what_is_there():
    import torch

    from fastpeft import backend

    found = module.doctor()
    assert found["versions"]["torch"] == torch.__version__
    assert found["backends"] == backend.availability()
    assert found["backends"]["eager"] is None
    assert found["devices"]
    assert found["native"] is None or isinstance(found["native"], str)


def test_a_missing_package_is_said_to_be_missing():
    assert module.version("no-such-package-anywhere") == "not installed"


def test_doctor_prints_every_fact(command_line):
    code, out, err = command_line("doctor")
    assert (code, err) == (0, "")
    for word in ("torch", "bitsandbytes", "native module", "device", "backend triton", "backend eager"):
        assert word in out


def test_version(command_line):
    assert command_line("--version")[1] == f"fastpeft {module.version('fastpeft')}\n"


def test_help_does_not_wait_for_torch():
    program = (
        "import sys\nfrom fastpeft.cli import main\n"
        "try: main(['finetune', '--help'])\n"
        "except SystemExit as stop: assert stop.code == 0\n"
        "assert not {'torch', 'transformers', 'datasets'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "--compare-steps" in done.stdout


def test_the_public_name_is_the_same_function():
    assert fastpeft.doctor is module.doctor
