"""pytest plugin inside a guest: each test's outcome as data, and a limit on the time.

Outcomes go to $VMTEST_RESULTS/tests.jsonl as they come, one object a line. When $VMTEST_BUDGET seconds are
over, no further test starts; what was not run is written down and counts as failed on the host: a matrix that
silently grows beyond its time would otherwise shrink silently too.
"""

from __future__ import annotations

import fnmatch
import json
import os
import subprocess
import time
import tomllib
from pathlib import Path
from typing import Any

import pytest

from vmtest import zygote

_BEGIN = time.monotonic()


def _write(record: dict[str, Any]) -> None:
    with (Path(os.environ["VMTEST_RESULTS"]) / "tests.jsonl").open("a") as file:
        file.write(json.dumps(record) + "\n")


def _left_out(item: str) -> bool:
    # A test of files or of our own code is the same on each kernel, and emulation makes a few seconds a
    # minute.
    path, kernel = os.environ.get("VMTEST_LEFT_OUT"), os.environ.get("VMTEST_KERNEL", "")
    for entry in tomllib.loads(Path(path).read_text()).get("left_out", []) if path else []:
        if any(fnmatch.fnmatch(kernel, k) for k in entry.get("kernels", ["*"])):
            kept = any(fnmatch.fnmatch(item, p) for p in entry.get("but", []))
            if fnmatch.fnmatch(item, entry["tests"]) and not kept:
                return True
    return False


class Outcomes:
    """Collects the phases of each test into one outcome."""

    def __init__(self, config: pytest.Config) -> None:
        self._config = config
        self._thp = ""
        self._worst: dict[str, tuple[str, str]] = {}
        self._time: dict[str, float] = {}
        self._budget = float(os.environ.get("VMTEST_BUDGET", "inf"))

    @pytest.hookimpl
    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        """Leaves out what tests/kernels/left_out.toml names."""
        out = [i for i in items if _left_out(i.nodeid)]
        if out:
            config.hook.pytest_deselected(items=out)
            items[:] = [i for i in items if i not in out]

    @pytest.hookimpl
    def pytest_runtest_protocol(self, item: pytest.Item) -> bool | None:
        """Ends the session's tests when the time is over."""
        if time.monotonic() - _BEGIN > self._budget:
            _write(
                {
                    "test": item.nodeid,
                    "outcome": "not run",
                    "why": f"time budget of {self._budget:.0f} s",
                    "s": 0.0,
                }
            )
            return True
        return None

    @pytest.hookimpl
    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Passed only when setup, call and teardown are."""
        outcome, why = "passed", ""
        if report.failed:
            outcome, why = "failed", f"{report.when}: {report.longreprtext[-2000:]}"
            # At once: a guest that panics later would take pytest's own report with it.
            self._say(report.longreprtext)
        elif report.skipped:
            outcome = "skipped"
            why = (
                report.longrepr[2]
                if isinstance(report.longrepr, tuple)
                else str(getattr(report, "wasxfail", ""))
            )
        order = ("passed", "skipped", "failed")
        before = self._worst.get(report.nodeid, ("passed", ""))
        if order.index(outcome) > order.index(before[0]):
            self._worst[report.nodeid] = (outcome, why)
        self._time[report.nodeid] = self._time.get(report.nodeid, 0.0) + report.duration
        if report.when == "teardown":
            outcome, why = self._worst.get(report.nodeid, ("passed", ""))
            _write(
                {
                    "test": report.nodeid,
                    "outcome": outcome,
                    "why": why,
                    "s": round(self._time[report.nodeid], 2),
                }
            )

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_setup(self, item: pytest.Item) -> None:
        """tests/live counts pages one by one, as on a machine that gives huge pages on demand only."""
        mode = "always" if item.nodeid.startswith("tests/kernels") else "madvise"
        if mode != self._thp:
            Path("/sys/kernel/mm/transparent_hugepage/enabled").write_text(mode)
            self._thp = mode

    def _say(self, text: str) -> None:
        terminal: Any = self._config.pluginmanager.get_plugin("terminalreporter")
        if terminal is not None:
            terminal.write_line(f"\n{text}")

    @pytest.hookimpl
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        """The failures were printed as they came."""
        session.config.option.tbstyle = "no"

    @pytest.hookimpl
    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """A module that cannot be imported is a failure, not fewer tests; a module skipped whole is a
        skip."""
        if report.failed:
            _write({"test": report.nodeid, "outcome": "failed", "why": report.longreprtext[-2000:], "s": 0.0})
        elif report.skipped:
            why = report.longrepr[2] if isinstance(report.longrepr, tuple) else ""
            _write({"test": report.nodeid, "outcome": "skipped", "why": why, "s": 0.0})


def _patient() -> None:
    # A guest runs some ten times slower than the machine that a test's time limit was written for.
    slower = 10
    communicate, wait = subprocess.Popen.communicate, subprocess.Popen.wait

    def longer(timeout: float | None) -> float | None:
        return None if timeout is None else timeout * slower

    def patient_communicate(self: Any, input: Any = None, timeout: float | None = None) -> Any:
        return communicate(self, input, longer(timeout))

    def patient_wait(self: Any, timeout: float | None = None) -> int:
        return wait(self, longer(timeout))

    subprocess.Popen.communicate = patient_communicate  # type: ignore[method-assign]
    subprocess.Popen.wait = patient_wait  # type: ignore[method-assign]


def pytest_configure(config: pytest.Config) -> None:
    """Registers itself where there is a place for results."""
    if os.environ.get("VMTEST_RESULTS"):
        _patient()
        if os.environ.get("VMTEST_ZYGOTE", "1") != "0":
            zygote.install()
        config.pluginmanager.register(Outcomes(config), "vmtest-outcomes")
