"""The lock is complete and names no machine; the table of `make compat` is red where it should be."""

import importlib.util
import re
import runpy
import sys
from collections import Counter
from pathlib import Path
from xml.etree import ElementTree

import pytest

ROOT = Path(__file__).parents[1]
LOCK = runpy.run_path(str(ROOT / "scripts/lock.py"))


@pytest.fixture(scope="module")
def compat():
    spec = importlib.util.spec_from_file_location("compat", ROOT / "scripts/compat.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["compat"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules["compat"]


def test_the_lock_has_all_that_pyproject_names():
    locked = LOCK["versions"]((ROOT / "requirements.lock").read_text())
    text = (ROOT / "pyproject.toml").read_text()
    lines = text[text.index("dependencies = [") : text.index("[project.scripts]")].splitlines()
    named = {name for line in lines for name in re.findall(r'"([\w-]+)[^"]*"', line.split("#")[0])} - {"fastpeft"}
    assert {"torch", "transformers", "trl", "pytest", "cuda-toolkit"} <= named
    assert not {name.replace("_", "-") for name in named} - set(locked)
    assert len(locked["torch"]) == 1


@pytest.mark.parametrize("line", ["torch==2.13.0+cpu", "--index-url https://example.org", "fastpeft @ file:///x"])
def test_a_lock_that_names_a_build_an_index_or_a_path_is_refused(line):
    with pytest.raises(ValueError, match="requirements.lock"):
        LOCK["versions"](f"numpy==2.4.6\n{line}\n")


def test_what_moved_is_said_by_package():
    old, new = {"a": ["1"], "b": ["1", "2"], "c": ["1"]}, {"a": ["1"], "b": ["1", "3"], "d": ["4"]}
    assert LOCK["moved"](old, new) == ["b 1, 2 -> 1, 3", "c 1 -> -", "d - -> 4"]


REPORT = """<testsuites><testsuite><testcase classname="a"/><testcase classname="a"><skipped/></testcase>
<testcase classname="b"><failure/></testcase><testcase classname="b"><error/></testcase></testsuite></testsuites>"""


def test_a_report_is_counted(compat):
    result = compat.read(ElementTree.fromstring(REPORT))
    assert (result.passed, result.skipped, result.failed, result.ran) == (1, 1, 2, Counter(a=1, b=2))


def test_a_row_is_red_for_a_failure_a_missing_test_and_a_broken_run(compat):
    green = compat.Result(passed=3, ran=Counter(a=1, b=2))
    assert compat.faults(green, Counter(a=1, b=2)) == []
    assert compat.faults(green, Counter(a=2, b=2)) == ["a: 1 ran, 2 in main"]
    assert compat.faults(green, Counter(c=1)) == ["c: 0 ran, 1 in main"]
    assert compat.faults(compat.Result(passed=2, failed=1, ran=Counter(a=3)), {}) == ["1 failed"]
    assert compat.faults(compat.Result(error="pytest ended with 2"), {}) == ["pytest ended with 2", "no test passed"]
    rows = [("one", "x 1", green, []), ("two", "x 2", green, ["1 failed"])]
    assert re.search(r"one .* green .*\ntwo .* RED .*\ntwo: 1 failed$", compat.table(rows))
