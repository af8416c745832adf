"""Folders that are complete or absent: filled under a temporary name, and renamed when all is written."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4


def refuse_existing(target: Path) -> None:
    """Raise ValueError if there is something at `target` already."""
    if target.exists() or target.is_symlink():
        raise ValueError(f"{target} is there already; remove it, or give another folder with -o")


@contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """A new folder to fill. It becomes `target` when the block ends, and is removed if the block raises.

    Raises ValueError if `target` exists, OSError if it cannot be written.
    """
    refuse_existing(target)
    beside = target.with_name(f".{target.name}.{uuid4().hex[:8]}.partial")
    beside.mkdir(parents=True)
    try:
        yield beside
        refuse_existing(target)
        os.rename(beside, target)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
