"""For all tests: one thread per process, and this checkout's packages in every process that a test starts.

The networks are so small that threads wait for each other longer than they work, and on a busy machine their spinning
makes a run a hundred times slower. This is set before torch is imported, and every process of a test inherits it.
"""

import os
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH")]))


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
