"""For all tests: one thread a process, and this checkout's packages in every process that a test starts.

The networks are so small that threads wait for each other longer than they work, and on a busy machine their spinning
makes a run a hundred times slower. Set before torch is imported, and inherited by every process that a test starts.
"""

import os
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH")]))
