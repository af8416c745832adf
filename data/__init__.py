"""Images to batches: sources, the .beton file, and loaders whose image size and batch size can change between passes.

Names are imported on first use, so reading a file's labels imports neither torch nor torchvision.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_PUBLIC = {
    "Beton": ".beton.format",
    "FFCVLoader": ".loading.ffcv_loader",
    "Loader": ".loading.loader",
    "Normalizer": ".loading.normalize",
    "SOURCES": ".sources",
    "Source": ".sources",
    "TorchLoader": ".loading.torch_loader",
    "build_loader": ".build",
    "build_source": ".sources",
    "cifar10": ".sources",
    "cifar100": ".sources",
    "center_crops": ".decoding.crops",
    "channel_statistics": ".sources",
    "csv": ".sources",
    "digits": ".sources",
    "epoch_order": ".loading.order",
    "eval_batches": ".loading.order",
    "folder": ".sources",
    "hf": ".sources",
    "normalize": ".loading.normalize",
    "prepare_image": ".loading.one_image",
    "random_resized_crops": ".decoding.crops",
    "read_image": ".loading.one_image",
    "synthetic": ".sources",
    "train_batches": ".loading.order",
    "webdataset": ".sources",
    "write_beton": ".beton.write",
}


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has: {', '.join(__dir__())}")
    return getattr(import_module(_PUBLIC[name], __name__), name)


def __dir__() -> list[str]:
    return sorted(_PUBLIC)
