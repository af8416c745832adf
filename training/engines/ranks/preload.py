"""Importing this module imports what every rank needs; a fork server does so once for all ranks that it starts."""

from training.engines.lean_import import import_lean

import_lean()

from training.engines import probe  # noqa: E402  Composer, torchvision, and our own modules

__all__ = ["probe"]
