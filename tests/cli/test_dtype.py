"""The type that a run computes in: chosen by the device, said, and kept when the run goes on elsewhere."""

import dataclasses

import pytest
import torch

from fastpeft import cpu
from fastpeft.cli.errors import BadInput
from fastpeft.cli.finetune import Settings
from fastpeft.cli.methods import Method
from fastpeft.cli.models import Dtype, choose_dtype


@pytest.fixture
def believe(monkeypatch):
    """Makes fastpeft believe that the CPU has (1) or has not (0) instructions for bf16 and fp16."""

    def set_to(value: str) -> None:
        monkeypatch.setenv("FASTPEFT_CPU_HALF", value)
        cpu.multiplies_natively.cache_clear()

    yield set_to
    cpu.multiplies_natively.cache_clear()


def test_a_cpu_without_bf16_instructions_computes_in_float32(believe):
    believe("0")
    assert choose_dtype(Dtype.auto, "cpu") == (Dtype.fp32, "this CPU has no instructions for bf16")
    assert choose_dtype(Dtype.bf16, "cpu")[0] == Dtype.bf16  # who asks for it gets it
    believe("1")
    assert choose_dtype(Dtype.auto, "cpu")[0] == Dtype.bf16


def test_fp16_on_a_cpu_is_refused():
    with pytest.raises(BadInput, match="fp16 cannot be trained on a CPU"):
        choose_dtype(Dtype.fp16, "cpu")


def test_a_gpu_without_bf16_computes_in_float16(monkeypatch):
    for supported, expected in ((True, Dtype.bf16), (False, Dtype.fp16)):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation, s=supported: s)
        assert choose_dtype(Dtype.auto, "cuda")[0] == expected


@pytest.mark.parametrize(("has", "name"), [("0", "fp32"), ("1", "bf16")])
def test_it_is_said_and_recorded(has, name, believe, finetune, read_metrics, tmp_path):
    believe(has)
    code, out, err = finetune(steps=1)
    assert (code, err) == (0, "")
    assert f"computed in {name}: this CPU has" in out
    assert read_metrics(tmp_path / "run")["dtype"] == name


def test_resume_keeps_the_type_that_the_run_began_with(believe, tmp_path, monkeypatch):
    from fastpeft.cli import finetune as module
    from fastpeft.cli.output import Output

    output = Output(tmp_path / "run")
    settings = Settings(model="m", data="pydoc", method=Method("lora"))
    output.begin(dataclasses.asdict(dataclasses.replace(settings, dtype=Dtype.bf16)), resume=False)
    believe("0")
    seen = []

    class Stop(Exception):
        pass

    def run(settings, *_):
        seen.append(settings.dtype)
        raise Stop

    monkeypatch.setattr("fastpeft.cli.run.Run", run)
    with pytest.raises(Stop):
        module.finetune(settings, tmp_path / "run", resume=True)
    assert seen == [Dtype.bf16]
    with pytest.raises(BadInput, match="has dtype bf16, not"):
        module.finetune(dataclasses.replace(settings, dtype=Dtype.fp32), tmp_path / "run", resume=True)


def test_compare_has_one_type_for_all_methods(believe, tmp_path):
    from fastpeft.cli import compare

    believe("0")
    assert compare.choose_dtype(tmp_path, Dtype.auto, resume=False)[0] == Dtype.fp32
    (tmp_path / compare.SETTINGS).write_text('{"dtype": "bf16"}')
    assert compare.choose_dtype(tmp_path, Dtype.auto, resume=True)[0] == Dtype.bf16  # as it began, maybe elsewhere
    assert compare.choose_dtype(tmp_path, Dtype.auto, resume=False)[0] == Dtype.fp32
    with pytest.raises(BadInput, match="fp16 cannot be trained on a CPU"):
        compare.choose_dtype(tmp_path, Dtype.fp16, resume=False)
