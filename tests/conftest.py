"""For all tests, in variables that every process of a test inherits, set before torch is imported.

One thread per process: the networks are so small that threads wait for each other longer than they work, and on a busy
machine their spinning makes a run a hundred times slower. Likewise torch's compiler compiles in the process itself: its
own processes take seven seconds to start. What a test starts finds this checkout's packages.
"""

import os
import shutil
from pathlib import Path

import pytest

HERE = Path(__file__).parent
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
if shutil.which("g++") and shutil.which("flock"):
    os.environ.setdefault("CXX", str(HERE / "precompiling" / "g++"))
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(HERE.parent), os.environ.get("PYTHONPATH")]))


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
    "training/test_composer_shim.py", "training/test_startup.py",
)  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests of `make test-quarter`."""
    for item in items:
        whole = any(
            name in item.nodeid for name in ("two_ranks", "compil", "kernels", "pair")
        )  # minutes of every pair of algorithms
        if item.nodeid.removeprefix("tests/").startswith(_QUARTER) and not whole:
            item.add_marker("quarter")
