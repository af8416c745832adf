"""The benchmark for a GPU: the machine's peaks, training steps side by side, where their time goes, and the goals.

    python -m benchmarks.gpu                                       # from the checkout; 12 minutes on a GPU
    python -m benchmarks.gpu --json gpu.json --figure gpu.svg
    python -m benchmarks.gpu --only 'resnet50 224px*blurpool' --minutes 5
    python -m benchmarks.gpu --quick                               # within a minute on a CPU; checks that it works

It needs a checkout, torch and torchvision; Composer, timm and antialiased_cnns are measured beside it where they are
installed. docs/gpu_benchmark.md says what is measured and what each column means.
"""

from __future__ import annotations

import os
import sys

# torch's profiler tells of its beginning and end otherwise; it reads this when torch is imported.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")

from benchmarks.gpu_step.command import main

if __name__ == "__main__":
    sys.exit(main())
