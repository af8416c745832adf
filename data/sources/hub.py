"""The files of a data set on the Hugging Face Hub, in the Hub's own cache on this disk."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

_ID = re.compile(r"[\w.-]{1,96}(?:/[\w.-]{1,96})?")


def downloaded(
    dataset: str, *, revision: str | None, config: str | None, suffixes: Sequence[str], download: bool
) -> Path:
    """The folder with the files of `dataset` that end in one of `suffixes`; of the folder `config`, if given.

    Raises:
        FileNotFoundError: no such data set or files, or the Hub cannot be reached and they are not in the cache.
        ModuleNotFoundError: huggingface_hub is not installed.
    """
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import LocalEntryNotFoundError
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"{dataset} is on the Hub, which needs a package: pip install 'brisk-vision[parquet]'; for files on this "
            "disk, give an existing path",
            name="huggingface_hub",
        ) from error
    if not _ID.fullmatch(dataset):
        raise FileNotFoundError(f"{dataset!r} is neither a file here nor an id of a data set, as uoft-cs/cifar10")
    inside = f"{config}/" if config is not None else ""
    settings: dict[str, Any] = {
        "repo_type": "dataset",
        "revision": revision,
        "allow_patterns": [f"{inside}*{suffix}" for suffix in suffixes],
    }
    try:
        # Asks the Hub which commit it is, and downloads what the cache lacks. Offline it takes the cache.
        folder = Path(snapshot_download(dataset, local_files_only=not download, **settings))
    except LocalEntryNotFoundError as error:
        where = "download is off" if not download else "the Hub cannot be reached"
        raise FileNotFoundError(
            f"no copy of the data set {dataset} in the Hub's cache, and {where}: check the network, or give the path "
            "of files on this disk"
        ) from error
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise FileNotFoundError(
            f"the data set {dataset} cannot be downloaded ({reason}): check the id, the revision and HF_TOKEN, or give "
            "the path of files on this disk"
        ) from error
    if not any(path.is_file() for suffix in suffixes for path in folder.rglob(f"*{suffix}")):
        raise FileNotFoundError(
            f"the data set {dataset} has no Parquet files there: try revision=refs/convert/parquet, which the Hub makes"
        )
    return folder
