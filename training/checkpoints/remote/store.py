"""One run's folder at the remote, through fsspec: files that are whole or absent under their names."""

from __future__ import annotations

import contextlib
import logging
import os
from pathlib import Path
from typing import Any
from uuid import uuid4

from training.checkpoints.names import sync
from training.recipe.remote import mask, protocol_of

_CONNECT_SECONDS = 10
_SILENCE_SECONDS = 60  # after which a connection counts as lost
_OBJECT_STORES = ("s3", "gs")  # where a file appears when all of it is there
PARTIAL = ".partial-"


class Store:
    """The folder `run_name` at `url`. Connects at the first use, and anew after `disconnect`.

    Every method may raise whatever the protocol's library raises; `reason_of` tells it in a line. Not for two threads.
    """

    def __init__(self, url: str, run_name: str) -> None:
        self._url = url.rstrip("/")
        self._run_name = run_name
        self._partial = f"{PARTIAL}{uuid4().hex[:8]}"  # one name: a failed attempt is overwritten by the next
        self._fs: Any = None
        self._folder = ""

    def __str__(self) -> str:
        return f"{mask(self._url)}/{self._run_name}"

    def disconnect(self) -> None:
        """Forget the connection, which may be lost."""
        client, self._fs = getattr(self._fs, "client", None), None
        with contextlib.suppress(Exception):
            if client is not None:
                client.close()

    def read(self, name: str) -> bytes | None:
        """The content of a small file; None if there is none."""
        self._connect()
        try:
            return self._fs.cat_file(self._path(name))
        except FileNotFoundError:
            return None

    def write(self, name: str, content: bytes) -> None:
        """Replace a small file."""
        self._connect()
        with self._whole(name) as path:
            self._fs.pipe_file(path, content)

    def put(self, source: Path, name: str) -> None:
        """Upload a file."""
        self._connect()
        with self._whole(name) as path:
            self._fs.put_file(str(source), path)
            found, size = self._fs.info(path)["size"], source.stat().st_size
            if found != size:
                raise OSError(f"{name} has {found} bytes there, and {size} here")

    def get(self, name: str, path: Path) -> None:
        """Download a file to `path`, onto the disk. What is there after an error is not whole."""
        self._connect()
        self._fs.get_file(self._path(name), str(path))
        sync(path)

    def names(self) -> list[str]:
        """The names of files and folders in it."""
        self._connect()
        try:
            found = self._fs.ls(self._folder, detail=False)
        except FileNotFoundError:
            return []
        return sorted(path.rstrip("/").rpartition("/")[2] for path in found)

    def remove(self, name: str) -> None:
        """Remove a file, or a folder with all that is in it."""
        self._connect()
        with contextlib.suppress(FileNotFoundError):
            self._fs.rm(self._path(name), recursive=self._fs.isdir(self._path(name)))

    def _path(self, name: str) -> str:
        return f"{self._folder}/{name}"

    @contextlib.contextmanager
    def _whole(self, name: str) -> Any:
        """Where to write what shall be `name`: in an object store there, elsewhere beside it until it is complete."""
        path = self._path(name)
        if protocol_of(self._url) in _OBJECT_STORES:
            yield path
            return
        self._fs.makedirs(path.rpartition("/")[0], exist_ok=True)
        beside = self._path(self._partial)
        yield beside
        if protocol_of(self._url) == "file":
            sync(Path(beside))
            os.replace(beside, path)
        else:
            self._fs.mv(beside, path)

    def _connect(self) -> None:
        if self._fs is None:
            self._fs = connect(self._url)
            self._folder = f"{self._fs._strip_protocol(_expanded(self._url))}/{self._run_name}"


def connect(url: str) -> Any:
    """A new connection, as a file system of fsspec."""
    import fsspec

    protocol = protocol_of(url)
    for name in ("paramiko", "botocore", "aiobotocore", "s3fs", "gcsfs"):
        logging.getLogger(name).setLevel(logging.CRITICAL)  # what goes wrong is told once, by us
    if protocol == "sftp":
        return _connect_sftp(url)
    settings: dict[str, Any] = {"skip_instance_cache": True, "use_listings_cache": False}
    if protocol == "s3":
        # With credentials and AWS_ENDPOINT_URL from the environment, as every library of Amazon's.
        settings["config_kwargs"] = {
            "connect_timeout": _CONNECT_SECONDS, "read_timeout": _SILENCE_SECONDS, "retries": {"max_attempts": 2},
        }  # fmt: skip
    if protocol == "file":
        return fsspec.filesystem(protocol, **settings)
    from fsspec.asyn import get_loop

    # A request that failed beside the one whose error is raised would be told with a traceback.
    get_loop().call_soon_threadsafe(get_loop().set_exception_handler, lambda loop, context: None)
    made = fsspec.filesystem(protocol, **settings)
    made.retries = 1  # s3fs: beside botocore's own, and ours
    return made


def _connect_sftp(url: str) -> Any:
    import paramiko
    from fsspec.implementations.sftp import SFTPFileSystem

    class Refuse(paramiko.MissingHostKeyPolicy):
        def missing_host_key(self, client: Any, hostname: str, key: Any) -> None:
            raise paramiko.SSHException(
                f"~/.ssh/known_hosts does not have {hostname}; add its key (ssh-keyscan), {key.fingerprint} if that is "
                "the right one"
            )

    class Sftp(SFTPFileSystem):
        """Keys are those of ~/.ssh and the agent. As by ssh, a host that known_hosts does not have is refused."""

        def _connect(self) -> None:
            self.client = paramiko.SSHClient()
            self.client.load_system_host_keys()
            self.client.set_missing_host_key_policy(Refuse())
            limits = dict.fromkeys(("timeout", "banner_timeout", "auth_timeout"), _CONNECT_SECONDS)
            self.client.connect(self.host, **limits, **self.ssh_kwargs)
            self.ftp = self.client.open_sftp()
            channel = self.ftp.get_channel()
            assert channel is not None
            channel.settimeout(_SILENCE_SECONDS)

    return Sftp(**Sftp._get_kwargs_from_urls(url), skip_instance_cache=True)


def reason_of(error: BaseException) -> str:
    """One line on an error of a library, without passwords."""
    return mask(" ".join(str(error).split()))[:200].rstrip(".") or type(error).__name__


def _expanded(url: str) -> str:
    return url if protocol_of(url) != "file" else os.path.abspath(os.path.expanduser(url.removeprefix("file://")))
