"""The benchmarks themselves: wrong results are not timed, slow ones show, absent ones are named, plots are drawn."""

import subprocess
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks import decode, harness, layers, lora_linear, memory, micro, plot, run, shapes, step
from benchmarks.costs import Cost
from benchmarks.environment import append_csv, read_csv
from benchmarks.harness import Absent, Case, Ceilings, Device, Run, Side, Timing, WrongResult
from fastpeft import ops
from setup import gpu_archs

CPU = Device(torch.device("cpu"))
CEILINGS = Ceilings(copy_bytes_per_s=1e10, matmul_ops_per_s=1e11)
TIMING = Timing(rounds=3, sample_ms=0.1, sets=2)


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def lora_case(*names: str) -> Case:
    """The smallest dense case, with fastpeft and the sides of these names."""
    case = next(case for case in lora_linear.cases("smoke", CPU.device) if case.labels["weight"] == "dense")
    return replace(case, sides=[side for side in case.sides if side.name in ("fastpeft", *names)])


def toy_case(*sides: Side) -> Case:
    """y = 2x; cost: 800 bytes, read and written, no products."""
    return Case(
        labels={"M": 100},
        inputs=lambda: torch.randn(100),
        sides=sides,
        formula=lambda x, dtype: {"y": (x if dtype is None else x.to(dtype)) * 2},
        cost=Cost(400, 400, 100),
    )


RIGHT = Side("right", lambda x: lambda: {"y": x + x})


def rows_of(case: Case) -> dict[str, dict]:
    return {row["side"]: row for row in harness.measure(case, CPU, TIMING, CEILINGS)}


def test_a_sleep_in_the_op_shows_in_the_ratio(monkeypatch):
    frozen = "frozen layer, bf16, no adapter"
    before = rows_of(lora_case(frozen))
    fast = ops.lora_linear

    def slow(*arguments, **options):
        time.sleep(0.1)
        return fast(*arguments, **options)

    monkeypatch.setattr(ops, "lora_linear", slow)
    after = rows_of(lora_case(frozen))
    assert after["fastpeft"]["ms_p20"] >= 100
    assert after[frozen]["ratio"] < before[frozen]["ratio"] / 2
    assert after["fastpeft"]["fraction"] < before["fastpeft"]["fraction"] / 2


@pytest.mark.parametrize("wrong", [lambda y: 1.1 * y, lambda y: y * float("nan"), lambda y: y[:1]])
def test_a_wrong_result_stops_before_anything_is_timed(monkeypatch, wrong):
    right = ops.lora_linear
    monkeypatch.setattr(ops, "lora_linear", lambda *a, **options: wrong(right(*a, **options)))
    monkeypatch.setattr(harness, "in_turns", lambda *a: pytest.fail("it was timed"))
    with pytest.raises(WrongResult, match="fastpeft: y"):
        rows_of(lora_case())


def test_a_wrong_gradient_is_a_wrong_result(monkeypatch):
    right = ops.lora_linear
    case = lora_case()
    backward = replace(case, inputs=lambda: lora_linear.inputs(CPU.device, 5, 64, 64, 4, "dense", True))

    def wrong(x, weight, A, B, scaling, **options):
        return right(x, weight, A, B, scaling, **options) + (x - x.detach()).sum()

    rows_of(backward)
    monkeypatch.setattr(ops, "lora_linear", wrong)
    with pytest.raises(WrongResult, match="fastpeft: dx"):
        rows_of(backward)


def test_bytes_may_differ_in_ties_only():
    codes = torch.zeros(10000, dtype=torch.uint8)
    few, many = codes.clone(), codes.clone()
    few[:5], many[:50] = 1, 1
    case = replace(toy_case(), inputs=lambda: codes, formula=lambda i, dtype: {"packed": i})
    harness.check(replace(case, sides=[Side("few", lambda i: lambda: {"packed": few})]))
    with pytest.raises(WrongResult, match="0.5% of the bytes"):
        harness.check(replace(case, sides=[Side("many", lambda i: lambda: {"packed": many})]))


def test_sides_that_cannot_run_are_named():
    def absent(x):
        raise Absent("it is not installed")

    def broken(x):
        raise TypeError("it has another signature")

    rows = rows_of(toy_case(RIGHT, Side("absent", absent), Side("a peer", broken, peer=True)))
    assert rows["absent"]["note"] == "absent: it is not installed" and rows["absent"]["ms_p50"] == ""
    assert rows["a peer"]["note"] == "failed: TypeError: it has another signature" and rows["a peer"]["ratio"] == ""
    assert list(rows["right"]) == list(rows["absent"])
    with pytest.raises(TypeError):
        rows_of(toy_case(RIGHT, Side("ours", broken)))
    with pytest.raises(RuntimeError, match="cannot run here: absent: it is not installed"):
        rows_of(toy_case(Side("fastpeft", absent), RIGHT))


def test_sides_with_another_result_have_another_reference():
    triple = Side("triple", lambda x: lambda: {"y": 3 * x}, exact=lambda x: {"y": x.double() * 3})
    assert rows_of(toy_case(RIGHT, triple))["triple"]["timer"] == "clock"
    with pytest.raises(WrongResult):
        rows_of(toy_case(RIGHT, replace(triple, exact=None)))


def test_sides_take_turns_in_reversed_order():
    order = []
    runs = {name: Run(lambda name=name: order.append(name), 1) for name in "ab"}

    class Clock(Device):
        def elapsed_ms(self, call, repeats):
            call()
            return 1.0 * repeats

    samples = harness.in_turns(runs, Clock(CPU.device), Timing(rounds=3, sample_ms=1, sets=2))
    assert order == list("aabb" + "ab" + "ba" + "ab")  # first each warms up and is timed once to choose repeats
    assert samples == {"a": [1.0] * 3, "b": [1.0] * 3}


def test_times_are_those_of_one_call_over_rotating_inputs(monkeypatch):
    seen = []

    def prepare(x):
        def call():
            seen.append(x)
            return {"y": x + x}

        return call

    monkeypatch.setattr(Device, "cache_bytes", 700)
    row = rows_of(toy_case(Side("right", prepare)))["right"]
    # 2 x 700 bytes need four sets of 400; TIMING stops at two.
    assert row["sets"] == 2 and len({x.data_ptr() for x in seen}) >= 2
    assert row["fraction"] == pytest.approx(800 / 1e10 * 1e3 / row["ms_p50"], rel=1e-2)


class FakeGpu(Device):
    """Times like a CPU; `capturing` is True while a call is captured."""

    is_cuda = True
    cache_bytes = 700
    capturing = False

    def elapsed_ms(self, call, repeats):
        return CPU.elapsed_ms(call, repeats)

    def synchronize(self):
        pass

    def captured(self, run):
        FakeGpu.capturing = True
        try:
            run.call()
        finally:
            FakeGpu.capturing = False
        return Run(lambda: [run.call() for _ in range(3)], 3 * run.count)


def waiting(x):
    """As something that asks the device for a value, and so cannot be captured."""

    def call():
        if FakeGpu.capturing:
            raise RuntimeError("it waits for the device\nand says more")
        return {"y": x + x}

    return call


def test_what_cannot_be_captured_is_timed_beside_a_call_of_ours():
    device = FakeGpu(torch.device("cpu"))
    case = toy_case(RIGHT, replace(RIGHT, name="other"), Side("waiting", waiting))
    rows = {row["side"]: row for row in harness.measure(case, device, TIMING, CEILINGS)}
    assert [row["timer"] for row in rows.values()] == ["graph", "graph", "events"]
    assert rows["waiting"]["note"] == "no CUDA graph: it waits for the device" and rows["waiting"]["ratio"] > 0
    assert rows["right"]["ratio"] == 1 and rows["right"]["note"] == ""


def test_a_graph_is_never_compared_with_a_call():
    device = FakeGpu(torch.device("cpu"))
    rows = harness.measure(toy_case(Side("fastpeft", waiting), RIGHT), device, TIMING, CEILINGS)
    assert [row["timer"] for row in rows] == ["events", "events"]


def test_the_floor_is_that_of_the_slower_unit():
    assert CEILINGS.floor_ms(Cost(5 * 10**9, 5 * 10**9, 0, 10**10)) == pytest.approx(1000)
    assert CEILINGS.floor_ms(Cost(5 * 10**8, 5 * 10**8, 0, 10**11)) == pytest.approx(1000)


def test_cost_of_lora_linear():
    forward = lora_linear.cost(M=3, N=64, K=128, R=2, weight="dense", backward=False)
    assert forward.read_bytes == 2 * 64 * 128 + 2 * 3 * 128 + 4 * 2 * (64 + 128)
    assert forward.written_bytes == 2 * 3 * 64
    assert forward.tensor_core_ops == 2 * 3 * (64 * 128 + 2 * (64 + 128))
    both = lora_linear.cost(M=3, N=64, K=128, R=2, weight="dense", backward=True)
    assert both.bytes == forward.bytes + 2 * 3 * (64 + 128) + 4 * 2 * (64 + 128)  # dy, dx, dA, dB
    assert both.tensor_core_ops == 2 * 3 * (2 * 64 * 128 + 3 * 2 * (64 + 128))


@pytest.mark.slow
def test_ceilings_are_measured(monkeypatch):
    measured = harness.ceilings(CPU, harness.SMOKE)
    assert 1e8 < measured.copy_bytes_per_s < 1e13 and 1e8 < measured.matmul_ops_per_s < 1e16


def test_an_op_writes_its_csv_and_plot_draws_it(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(micro, "ceilings", lambda device, timing: CEILINGS)
    monkeypatch.setattr(micro, "SMOKE", TIMING)
    out = tmp_path / "lora_linear.csv"
    arguments = ["--suite", "smoke", "--device", "cpu", "--out", str(out)]
    micro.main("lora_linear", lambda suite, device: [lora_case("peft, fp32 adapter")], arguments)
    rows = read_csv(out)
    assert [row["side"] for row in rows] == ["fastpeft", "peft, fp32 adapter"]
    described = {"date", "commit", "dirty", "device", "capability", "driver", "torch", "triton", "sm_mhz", "memory_mhz"}
    assert described <= rows[0].keys()
    assert rows[0]["torch"] == torch.__version__ and rows[0]["fraction"] and rows[1]["ratio_p80"]
    assert "of the roofline" in capsys.readouterr().out and "peft, fp32 adapter" in run.summary(tmp_path)
    (png,) = plot.draw(tmp_path, tmp_path)
    assert png.name.startswith("roofline-") and png.read_bytes()[:4] == b"\x89PNG"


def test_a_wrong_result_is_the_exit_status(monkeypatch, tmp_path):
    monkeypatch.setattr(micro, "ceilings", lambda device, timing: CEILINGS)
    wrong = toy_case(Side("fastpeft", lambda x: lambda: {"y": 3 * x}))
    arguments = ["--suite", "smoke", "--device", "cpu", "--out", str(tmp_path / "toy.csv")]
    monkeypatch.setattr(micro, "SMOKE", TIMING)
    right = replace(toy_case(RIGHT), labels={"M": 7})
    with pytest.raises(SystemExit, match="1 cases were not timed: M=100"):
        micro.main("toy", lambda suite, device: [wrong, right], arguments)
    assert [row["M"] for row in read_csv(tmp_path / "toy.csv")] == ["7"]


def test_a_csv_keeps_its_columns(tmp_path):
    append_csv(tmp_path / "a.csv", {"a": 1})
    with pytest.raises(ValueError, match="move the old file away"):
        append_csv(tmp_path / "a.csv", {"b": 1})


def test_plots_take_the_newest_row_of_each_device(monkeypatch, tmp_path):
    columns = {"date", "torch", "peft", "bitsandbytes", "commit", "dirty", "ratio_p20", *plot.PLOTS["speedup"][1]}
    for device, ratio in (("GPU", "1.0"), ("GPU", "2.0"), ("CPU, 2 threads", "1.5")):
        append_csv(tmp_path / "step.csv", dict.fromkeys(sorted(columns), "1") | {"device": device, "ratio": ratio})
    drawn = {}
    file, keys, _ = plot.PLOTS["speedup"]
    monkeypatch.setitem(plot.PLOTS, "speedup", (file, keys, lambda rows, path: drawn.update({path: rows})))
    assert [path.name for path in plot.draw(tmp_path, tmp_path)] == ["speedup-gpu.png", "speedup-cpu-2-threads.png"]
    assert [[row["ratio"] for row in rows] for rows in drawn.values()] == [["2.0"], ["1.5"]]


@pytest.mark.parametrize("device", shapes.DEVICES)
@pytest.mark.parametrize("suite", shapes.SUITES)
def test_every_command_of_a_suite_is_understood(suite, device):
    parsers = {"step": step.parse, "decode": decode.parse, "memory": memory.parse}
    for name, *arguments in run.commands(run.EVERY, suite, device):
        if name in parsers:
            parsers[name](arguments)
        else:
            assert arguments[:2] == ["--suite", suite]


@pytest.mark.parametrize("suite", shapes.SUITES)
def test_every_case_of_a_suite_has_sizes_and_a_cost(suite):
    for device in ("cuda", "cpu"):
        cases = list(lora_linear.cases(suite, torch.device(device)))
        assert cases and len({case.title for case in cases}) == len(cases)
        assert all(case.cost.bytes > 0 and case.sides[0].name == "fastpeft" for case in cases)


def test_ops_are_found_by_their_name():
    assert {"lora_linear", "nf4", "cross_entropy"} <= set(run.OPS) and run.EVERY[0] == "lora_linear"
    assert not {"__init__", "step", "harness"} & set(run.OPS)


def test_methods_that_need_bitsandbytes_are_left_out_without_it(monkeypatch):
    find_spec = run.find_spec
    monkeypatch.setattr(run, "find_spec", lambda name: None if name == "bitsandbytes" else find_spec(name))
    monkeypatch.setattr(layers, "find_spec", lambda name: None if name == "bitsandbytes" else find_spec(name))
    for device in shapes.DEVICES:
        found = run.commands(["step", "decode", "memory"], "quick", device)
        assert found and not any("qlora" in command or "qdora" in command for command in found)
    # The 4-bit side of ours stays; peft's is named.
    case = next(case for case in lora_linear.cases("smoke", CPU.device) if case.labels["weight"] == "nf4")
    able, notes = harness.check(case)
    assert "fastpeft" in [side.name for side in able]
    assert notes["peft + bitsandbytes, fp32 adapter"] == "absent: bitsandbytes is not installed"


def test_saved_bytes_counts_each_storage_once_and_no_parameter():
    linear = nn.Linear(64, 32)
    x = torch.randn(10, 64)
    # The layer keeps x for its weight's gradient and the square its input, twice the same storage.
    assert memory.saved_bytes(lambda: linear(x).square().sum(), linear) == 4 * 10 * 64 + 4 * 10 * 32
    assert memory.saved_bytes(lambda: linear.weight.square().sum(), linear) == 0
    # A part of the graph that is dropped, as a norm that is detached, is not kept.
    assert memory.saved_bytes(lambda: x + linear(x).square().sum().detach(), linear) == 0


def test_peak_bytes_counts_what_is_alive_at_once():
    def function():
        first = torch.empty(2**20)
        second = torch.empty(2**19)
        del first
        return torch.empty(2**20), second

    peak = memory.peak_bytes(function, CPU)
    assert 4 * (2**20 + 2**19) <= peak <= 4 * (2**20 + 2**19) + 4096


SMALL = ["--model", "smoke", "--device", "cpu", "--batch", "1"]


def test_step_writes_a_row_of_both_sides(tmp_path, capsys):
    out = tmp_path / "step.csv"
    step.main(["--method", "lora", *SMALL, "--seq", "8", "--repeats", "2", "--accumulation", "2", "--out", str(out)])
    (row,) = read_csv(out)
    assert row["fused"].startswith("14 of 14") and row["repeats"] == "2" and row["accumulation"] == "2"
    assert float(row["ratio_p20"]) <= float(row["ratio"]) <= float(row["ratio_p80"])
    assert float(row["peft_tokens_per_s"]) == pytest.approx(16e3 / float(row["peft_ms"]), rel=0.05)
    assert row["frozen_ms"] == row["fastpeft_to_frozen"] == ""
    assert "times as fast" in capsys.readouterr().out


def test_step_beside_the_frozen_model(tmp_path, capsys):
    out = tmp_path / "step.csv"
    step.main(["--method", "dora", *SMALL, "--seq", "8", "--repeats", "2", "--frozen", "--out", str(out)])
    (row,) = read_csv(out)
    assert float(row["frozen_ms"]) > 0 and 0 < float(row["fastpeft_to_frozen"]) < 100
    assert "the model without an adapter" in capsys.readouterr().out


def test_step_does_not_time_a_wrong_model(monkeypatch, tmp_path):
    from fastpeft.integrations import peft as integration

    stock = integration.lora.Linear.forward
    monkeypatch.setattr(integration.FusedLinear, "forward", lambda self, x, *a, **k: 1.5 * stock(self, x, *a, **k))
    monkeypatch.setattr(step, "in_pairs", lambda *a: pytest.fail("it was timed"))
    with pytest.raises(SystemExit, match="do not compute the same"):
        step.main(["--method", "lora", *SMALL, "--seq", "8", "--out", str(tmp_path / "step.csv")])


def test_accelerated_lora_keeps_less_for_backward(tmp_path):
    out = tmp_path / "memory.csv"
    memory.main(["--method", "lora", *SMALL, "--seq", "64", "--out", str(out)])
    (row,) = read_csv(out)
    assert 0 < int(row["fastpeft_saved_bytes_per_layer"]) < int(row["peft_saved_bytes_per_layer"])
    assert 0 < int(row["fastpeft_peak_bytes_per_layer"]) < int(row["peft_peak_bytes_per_layer"])


SCRIPT = Path(__file__).parents[1] / "scripts" / "gpu_check.sh"


@pytest.mark.skipif(bool(gpu_archs()), reason="a GPU is here")
def test_gpu_check_says_that_there_is_no_gpu(tmp_path):
    result = subprocess.run(["bash", SCRIPT, tmp_path], capture_output=True, text=True)
    assert result.returncode == 3 and result.stdout.count("\n") == 1 and "no NVIDIA GPU" in result.stdout
    assert subprocess.run(["bash", SCRIPT, tmp_path, "--stage", "nonsense"], capture_output=True).returncode == 2
    assert list(tmp_path.iterdir()) == []
