#!/usr/bin/env python
"""Train a recipe: python run.py -f yamls/digits_medium.yaml [key=value ...]"""

import sys

from training.cli import main

if __name__ == "__main__":
    sys.exit(main())
