"""Classify pictures with what a run has trained: `python predict.py --help`."""

import sys

from training.judging.predict import main

if __name__ == "__main__":
    sys.exit(main())
