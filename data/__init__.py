"""Images to batches: sources, the .beton file, and loaders whose image size and batch size can change between passes.

Names are imported when they are first used, so reading labels out of a file costs neither torch nor torchvision.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_PUBLIC = {
    "Beton": ".beton",
    "FFCVLoader": ".ffcv_loader",
    "Loader": ".loader",
    "Normalizer": ".normalize",
    "SOURCES": ".sources",
    "Source": ".sources",
    "TorchLoader": ".torch_loader",
    "build_loader": ".build",
    "build_source": ".sources",
    "cifar10": ".cifar",
    "cifar100": ".cifar",
    "center_crops": ".crops",
    "channel_statistics": ".sources",
    "digits": ".sources",
    "epoch_order": ".order",
    "eval_batches": ".order",
    "folder": ".sources",
    "random_resized_crops": ".crops",
    "synthetic": ".sources",
    "train_batches": ".order",
    "write_beton": ".write",
}


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'data' has no attribute {name!r}; it has: {', '.join(__dir__())}")
    return getattr(import_module(_PUBLIC[name], __name__), name)


def __dir__() -> list[str]:
    return sorted(_PUBLIC)
