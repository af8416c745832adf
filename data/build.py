"""Builds a loader from settings, writing the .beton file first if there is none yet."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from .beton.format import check_sizes, convert_command, report_path, tier_path
from .beton.journal import writer_of
from .beton.write import default_write_settings, with_sizes, write_beton
from .decoding.decode import make_decoder, present_decoders
from .loading.ahead import BatchesAhead
from .loading.ffcv_loader import FFCVLoader
from .loading.loader import Loader
from .sources import SPLITS, build_source, source_stamp
from .whole_files import BeingWrittenError, is_being_written, kept_path, partial_files

LOADERS = ("auto", "ffcv", "torch")
_CACHE_VERSION = 2  # increase when the same settings give other bytes
_POLL_SECONDS = 0.2


def build_loader(
    *,
    source: str,
    source_settings: dict[str, Any] | None = None,
    split: str,
    loader: str = "auto",
    cache_dir: str | Path = ".cache/brisk",
    path: str | Path | None = None,
    write_settings: dict[str, Any] | None = None,
    sizes: Sequence[int] | None = None,
    tier_headroom: float | None = None,
    batches_ahead: BatchesAhead = "auto",
    class_names: Sequence[str] | None = None,
    stall_timeout_seconds: float = 300,
    rank: int = 0,
    log: Callable[[str], None] = print,
    **settings: Any,
) -> Loader:
    """The loader of one split of a source.

    Args:
        source: name in `data.sources.SOURCES`.
        source_settings: keyword arguments of that source, without the split.
        split: "train" shuffles and augments, "eval" and "test" do neither.
        loader: "ffcv", "torch", or "auto": FFCV if it is installed, else torch; `log` says which.
        cache_dir: folder for the FFCV loader's files. A source is converted on its first use with these settings.
        path: a .beton file to use as it is. The source is then ignored.
        write_settings: `write_mode`, `jpeg_share`, `max_side_px`, `jpeg_quality` and `restart_rows`. By default
            pixels for sources of small images, and JPEGs of up to 500 px for image folders. Unusable images are left
            out, and `log` says where they are listed.
        sizes: longest sides in px, in place of `max_side_px`: the conversion writes a file for each, and every pass
            reads the smallest one that serves it. Only the FFCV loader has files.
        tier_headroom, batches_ahead: see `FFCVLoader`; the torch loader has no use for them.
        class_names: the model's classes; data with other classes are refused. None accepts any.
        stall_timeout_seconds: rank 0 converts and the other ranks wait; they give up when nothing has been written
            for this long.
        settings: see `Loader`.

    Raises:
        ValueError, FileNotFoundError: bad settings or data.
        ModuleNotFoundError: "ffcv" is requested but not installed.
    """
    if split not in SPLITS:
        raise ValueError(f"split {split!r}: give one of {', '.join(SPLITS)}")
    if sizes is not None:
        check_sizes(sizes)
        _refuse_sizes(sizes, loader, path)
    chosen = _choose(loader, path, log)
    settings = {"rank": rank, "train": split == "train"} | settings
    source_settings = {"split": split} | (source_settings or {})
    if chosen == "torch":
        from .loading.torch_loader import TorchLoader  # imports torchvision, which the other loader does not need

        if sizes is not None:
            log("the torch loader reads the images themselves: no files of other sizes are written")
        images = build_source(source, **source_settings)
        _refuse_other_classes(images.class_names, class_names, images.name)
        return TorchLoader(images, **settings)
    if path is None:
        path = _converted(
            source, source_settings, with_sizes(write_settings or default_write_settings(source), sizes),
            Path(cache_dir), rank=rank, stall_timeout_seconds=stall_timeout_seconds, log=log,
        )  # fmt: skip
    made = FFCVLoader(path, tier_headroom=tier_headroom, batches_ahead=batches_ahead, **settings)
    _refuse_other_classes(made.class_names, class_names, str(path), named=made.described)
    if not made.described and rank == 0:
        log(f"{path} has no description beside it: using class numbers as names, and ImageNet's mean and std")
    if rank == 0 and split == "train":
        for line in made.describe_tiers():
            log(line)
        if batches_ahead != "auto":
            size = batches_ahead * made.batch_size * 3 * made.image_size**2 / 2**20
            log(f"{batches_ahead} batches ahead take {size:,.1f} MiB a rank at {made.image_size} px")
    return made


def _refuse_sizes(sizes: Sequence[int], loader: str, path: str | Path | None) -> None:
    told = ", ".join(map(str, sizes))
    if path is not None:
        raise ValueError(
            f"sizes {told} beside {path}, which has the sizes that it was written with: leave one of them out, or "
            f"write the file anew: {convert_command(path)} --sizes {','.join(map(str, sizes))}"
        )
    if loader == "torch":
        raise ValueError(f"sizes {told} beside loader 'torch', which reads no files of ours: leave one of them out")


def cached_beton_path(
    source: str, source_settings: dict[str, Any], write_settings: dict[str, Any], cache_dir: Path
) -> Path:
    """Path of the .beton file of a source with these settings; its name includes their hash."""
    stamp = source_stamp(source, **source_settings)
    told = json.dumps([_CACHE_VERSION, source, source_settings, write_settings, stamp], sort_keys=True, default=str)
    split = source_settings.get("split") or "all"
    return cache_dir / f"{source}-{split}-{hashlib.sha256(told.encode()).hexdigest()[:12]}.beton"


def _choose(loader: str, path: str | Path | None, log: Callable[[str], None]) -> str:
    if loader not in LOADERS:
        raise ValueError(f"loader {loader!r}: give one of {', '.join(LOADERS)}")
    if path is not None and loader == "torch":
        raise ValueError(f"loader 'torch' cannot read {path}: a .beton file needs loader 'ffcv'")
    if loader == "ffcv" or path is not None:
        make_decoder()
        return "ffcv"
    if loader == "auto":
        decoders = present_decoders()
        loader = "ffcv" if decoders else "torch"
        log(f"loader: {loader} ({f'decoder: {decoders[0]}' if decoders else 'no decoder of .beton files is there'})")
    return loader


def _refuse_other_classes(
    found: Sequence[str], expected: Sequence[str] | None, what: str, *, named: bool = True
) -> None:
    if expected is None or (tuple(found) == tuple(expected) if named else len(found) <= len(expected)):
        return
    repair = "give data of the same classes, or the model as many as the data has"
    if len(found) != len(expected):
        raise ValueError(f"{what} has labels of {len(found)} classes, and the model has {len(expected)}: {repair}")
    label = next(i for i, names in enumerate(zip(found, expected, strict=True)) if names[0] != names[1])
    raise ValueError(
        f"{what} has other classes than the model: label {label} is {found[label]!r} there and {expected[label]!r} "
        f"here: {repair}"
    )


def _converted(
    source: str,
    source_settings: dict[str, Any],
    write_settings: dict[str, Any],
    cache_dir: Path,
    *,
    rank: int,
    stall_timeout_seconds: float,
    log: Callable[[str], None],
) -> Path:
    path = cached_beton_path(source, source_settings, write_settings, cache_dir)
    paths = [path, *(tier_path(path, size) for size in write_settings.get("sizes", ())[:-1])]
    if all(one.is_file() for one in paths):
        return path
    while rank == 0:
        images = build_source(source, **source_settings)
        log(f"converting {len(images)} images of {images.name} to {path}")
        about = {"built_from": source, "settings": source_settings}
        try:
            write_beton(images, path, strict=False, about=about, resumable=True, say=log, **write_settings)
        except BeingWrittenError:  # by another run; should that end without the file, this one goes on
            log(f"{path} is being written by {writer_of(path) or 'another process'}: waiting for it")
            _wait_for(path, stall_timeout_seconds=stall_timeout_seconds, while_written=True)
        if all(one.is_file() for one in paths):
            break
    if rank == 0:
        if report_path(path).is_file():
            log(f"some images cannot be used and are left out; they are listed in {report_path(path)}")
        return path
    for one in paths:
        _wait_for(one, stall_timeout_seconds=stall_timeout_seconds)
    return path


def _wait_for(path: Path, *, stall_timeout_seconds: float, while_written: bool = False) -> None:
    """while_written: also until nobody is writing it any more."""
    last_change, last_size = time.monotonic(), -1
    while not path.is_file() and (is_being_written(path) or not while_written):
        size = sum(_size_or_zero(p) for p in [kept_path(path), *partial_files(path)])
        if size != last_size:
            last_change, last_size = time.monotonic(), size
        if time.monotonic() - last_change > stall_timeout_seconds:
            raise FileNotFoundError(
                f"{path} has not come, and nothing was written to it for {stall_timeout_seconds:g} seconds: see rank "
                "0's output for its error. If the ranks do not share this folder, set a cache_dir that they share, or "
                f"convert on every machine beforehand with python -m {__package__}.convert"
            )
        time.sleep(_POLL_SECONDS)


def _size_or_zero(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:  # just renamed
        return 0
