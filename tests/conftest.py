"""For all tests, in variables that every process of a test inherits, set before torch is imported.

One thread per process: the networks are so small that threads wait for each other longer than they work, and on a busy
machine their spinning makes a run a hundred times slower. Likewise torch's compiler compiles in the process itself: its
own processes take seven seconds to start. All tests share its kernels. What a test starts finds this checkout's
packages.
"""

import contextlib
import ctypes
import gc
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
MEMORY, LARGE_BYTES = Path("/proc/self/statm"), 2 << 30  # of this process, in pages; beyond which it is handed back
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", f"{tempfile.gettempdir()}/brisk_test_kernels_{os.getuid()}")
if shutil.which("g++") and shutil.which("flock"):
    os.environ.setdefault("CXX", str(HERE / "precompiling" / "g++"))
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(HERE.parent), os.environ.get("PYTHONPATH")]))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--exhaustive", action="store_true", help="run the tests marked exhaustive too")
    parser.addoption("--table", type=Path, metavar="FILE", help="write each test's outcome and seconds to FILE")


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """The table of `make faults` and `make fuzz`."""
    path: Path | None = config.getoption("--table")
    if path is None or hasattr(config, "workerinput"):
        return
    rows, seconds, noted = {}, {}, {}
    for outcome, reports in terminalreporter.stats.items():
        for report in reports:
            if outcome in ("passed", "failed", "error", "skipped", "xfailed", "xpassed"):
                name = report.nodeid.partition("@")[0]
                if report.when == "call" or outcome != "passed":
                    rows[name] = outcome
                seconds[name] = seconds.get(name, 0.0) + report.duration
                noted.update((name, told) for key, told in report.user_properties if key == "outcomes")
    lines = [
        f"| {name} | {outcome} | {seconds[name]:.1f} |{f' {noted.get(name, str())} |' if noted else ''}"
        for name, outcome in sorted(rows.items())
    ]
    counts = ", ".join(f"{list(rows.values()).count(one)} {one}" for one in sorted(set(rows.values())))
    head = ["| case | outcome | seconds | examples, by what came out |", "|---|---|---|---|"]
    head = head if noted else ["| case | outcome | seconds |", "|---|---|---|"]
    text = "\n".join([f"{len(rows)} cases: {counts}", "", *head, *lines, ""])
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item: pytest.Item) -> None:
    """Hand back what large networks have left: four workers and their processes share the machine's memory."""
    if MEMORY.exists() and int(MEMORY.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") > LARGE_BYTES:
        gc.collect()
        with contextlib.suppress(OSError, AttributeError):  # another C library
            ctypes.CDLL(None).malloc_trim(0)


@pytest.hookimpl(trylast=True)
def pytest_collection_finish(session: pytest.Session) -> None:
    """Tests of one xdist_group share runs of minutes; a pytest-xdist that does not keep them together is not used."""
    if getattr(session.config.option, "loadgroup", False):
        apart = [
            item.nodeid for item in session.items if item.get_closest_marker("xdist_group") and "@" not in item.nodeid
        ]
        if apart:
            raise pytest.UsageError(
                f"pytest {pytest.__version__} ignores xdist_group, for one in {apart[0]}; use pytest<9.2"
            )


# Each algorithm, each engine, resumption and the loaders: what another stack breaks first.
_QUARTER = (
    "algos/test_every.py", "algos/test_sam.py", "algos/test_ema.py",
    "data/loading", "models/test_vit.py", "models/test_weights.py", "models/test_hugging_face.py",
    "training/checkpoints", "training/engines/test_fsdp.py", "training/test_session.py",
    "training/test_composer_shim.py",
)  # fmt: skip


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark the tests of `make test-quarter`, and leave out those of `make faults` alone."""
    if not config.getoption("--exhaustive"):
        left_out = [item for item in items if item.get_closest_marker("exhaustive")]
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]
    for item in items:
        # Minutes of every pair of algorithms; and what no version of torch decides.
        apart = any(name in item.nodeid for name in ("two_ranks", "compil", "kernels", "pair", "test_remote"))
        if item.nodeid.removeprefix("tests/").startswith(_QUARTER) and not apart:
            item.add_marker("quarter")
