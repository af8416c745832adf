"""For all tests: one thread a process.

The networks are so small that threads wait for each other longer than they work, and on a busy machine their spinning
makes a run a hundred times slower. Set before torch is imported, and inherited by every process that a test starts.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
