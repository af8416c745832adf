"""Files at a URL, downloaded whole into a folder before they are read, and again only if they changed there."""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from ..prefetch import PrefetchIterator
from ..whole_files import BeingWrittenError, kept_file, replace_file
from .base import say_once

_PROTOCOLS = ("http", "https", "s3", "gs")
_TOLD = ("size", "ETag", "Last-Modified", "LastModified", "mtime")  # what a server may say of a file
_AT_ONCE = 4  # downloads
_CONNECT_SECONDS, _SILENCE_SECONDS = 10, 60
_POLL_SECONDS = 0.2


def fetched(urls: Sequence[str], cache_dir: Path, *, download: bool) -> list[Path]:
    """The local copies of files at `urls`, in `cache_dir`.

    A copy counts while size, ETag and time of change are those at the URL. If the URL cannot be reached, it counts too,
    with a warning. download: False takes what is there and asks nobody.

    Raises:
        FileNotFoundError: a file cannot be downloaded, or is not there and `download` is False.
        ValueError: a URL of another kind, or with a password in it.
        ModuleNotFoundError: fsspec, or what it needs for the protocol, is not installed.
    """
    for url in urls:
        _check(url)
    if not download:
        return [_present(url, cache_dir) for url in urls]
    tasks = (partial(_fetch, url, cache_dir) for url in urls)
    return list(PrefetchIterator(tasks, num_workers=min(_AT_ONCE, len(urls))))


def is_there(url: str, cache_dir: Path, *, download: bool) -> bool:
    """Whether there is a file at `url`. Raises FileNotFoundError if that cannot be found out."""
    _check(url)
    if not download:
        return _copy(url, cache_dir).is_file()
    try:
        return bool(_file_system(url).exists(url))
    except Exception as error:
        raise _unreachable(url, error) from error


def _check(url: str) -> None:
    parts = urlsplit(url)
    if parts.scheme.lower() not in _PROTOCOLS:
        raise ValueError(f"{_masked(url)}: give a local path, or a URL that begins with {'://, '.join(_PROTOCOLS)}://")
    if parts.password or (parts.username and parts.scheme.startswith("http")):
        raise ValueError(f"{_masked(url)} has credentials in it, which end up in logs: leave them to the environment")


def _fetch(url: str, cache_dir: Path) -> Path:
    path = _copy(url, cache_dir)
    try:
        system = _file_system(url)
        info = system.info(url)
    except ModuleNotFoundError:
        raise
    except Exception as error:
        if path.is_file() and not isinstance(error, FileNotFoundError):
            say_once(f"{url} cannot be reached ({_reason(error)}): its copy {path} is used, which may be older")
            return path
        raise _unreachable(url, error) from error
    told = {"url": url} | {key: str(info[key]) for key in _TOLD if info.get(key)}
    while not (path.is_file() and _told(path) == told):
        try:
            _download(system, url, path, told)
        except BeingWrittenError:  # by another rank
            time.sleep(_POLL_SECONDS)
        except Exception as error:
            raise _unreachable(url, error) from error
    return path


def _download(system: Any, url: str, path: Path, told: dict[str, str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with kept_file(path) as file:
        if path.is_file() and _told(path) == told:
            raise BeingWrittenError(f"{path} was written by another process, which was faster")
        file.truncate(0)
        system.get_file(url, file.name)
        size = Path(file.name).stat().st_size
        if "size" in told and size != int(told["size"]):
            raise OSError(f"{size} bytes of {told['size']} came")
        replace_file(_note(path), lambda note: note.write(json.dumps(told).encode()))


def _present(url: str, cache_dir: Path) -> Path:
    path = _copy(url, cache_dir)
    if not path.is_file():
        raise FileNotFoundError(f"no copy of {url} in {cache_dir}, and download is off: download it first")
    return path


def _copy(url: str, cache_dir: Path) -> Path:
    name = urlsplit(url).path.rpartition("/")[2] or "file"
    return cache_dir / f"{hashlib.sha256(url.encode()).hexdigest()[:16]}-{name[-100:]}"


def _note(path: Path) -> Path:
    return path.with_name(f"{path.name}.json")


def _told(path: Path) -> Any:
    try:
        return json.loads(_note(path).read_text())
    except (OSError, ValueError):
        return None


def _file_system(url: str) -> Any:
    protocol = urlsplit(url).scheme.lower()
    try:
        import fsspec

        settings: dict[str, Any] = {}
        if protocol.startswith("http"):
            import aiohttp

            # No limit on the whole: a shard may take long. The default is five minutes.
            times = {"total": None, "sock_connect": _CONNECT_SECONDS, "sock_read": _SILENCE_SECONDS}
            settings["client_kwargs"] = {"timeout": aiohttp.ClientTimeout(**times)}
        elif protocol == "s3":
            for name in ("botocore", "aiobotocore", "s3fs"):
                logging.getLogger(name).setLevel(logging.CRITICAL)  # what goes wrong is told once, by us
            settings["config_kwargs"] = {"connect_timeout": _CONNECT_SECONDS, "read_timeout": _SILENCE_SECONDS}
        return fsspec.filesystem(protocol, use_listings_cache=False, **settings)
    except (ImportError, ValueError) as error:
        package = {"gs": "gcsfs"}.get(protocol, "'brisk-vision[remote]'")
        raise ModuleNotFoundError(
            f"{protocol}:// needs a package that is not installed: pip install {package}"
        ) from error


def _unreachable(url: str, error: Exception) -> FileNotFoundError:
    if isinstance(error, FileNotFoundError):
        return FileNotFoundError(f"no file {url}: correct the URL or the pattern")
    return FileNotFoundError(
        f"{url} cannot be read ({_reason(error)}): check the network, the URL and the credentials, or copy it to a disk"
    )


def _reason(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300].removesuffix(": ")


def _masked(url: str) -> str:
    host = urlsplit(url).netloc.rpartition("@")[2]
    return f"{urlsplit(url).scheme}://{host}{urlsplit(url).path}"
