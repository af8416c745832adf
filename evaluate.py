"""Judge what a run has trained: `python evaluate.py --help`."""

import sys

from training.judging.evaluate import main

if __name__ == "__main__":
    sys.exit(main())
