#!/usr/bin/env python
"""Try a run's network on a picture; see `python demo.py --help`."""

import sys

from training.demo import main

if __name__ == "__main__":
    sys.exit(main())
