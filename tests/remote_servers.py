"""Servers on this machine to which checkpoints are uploaded, and a line to them that breaks."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

BUCKET = "checkpoints"


@dataclass
class Place:
    """url: for checkpoints.remote. line: what every byte to the server passes."""

    url: str
    line: Line

    @property
    def kind(self) -> str:
        """Its protocol."""
        return self.url.partition("://")[0]


class Line:
    """Passes connections on to `port` of this machine. down: it takes none. drops: how often it was cut."""

    def __init__(self, port: int) -> None:
        self._to = port
        self._left_bytes: int | None = None
        self._stays_down = False
        self._open: list[socket.socket] = []
        self._lock = threading.Lock()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self.down = False
        self.drops = 0
        threading.Thread(target=self._accept, daemon=True).start()

    def cut_after(self, sent_bytes: int, *, stays_down: bool = False) -> None:
        """Drop all connections once so many more bytes were sent to the server; those after that pass, or none."""
        self._left_bytes, self._stays_down = sent_bytes, stays_down

    def close(self) -> None:
        self._listener.close()
        self._drop()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                if self.down:
                    near.close()
                    continue
                far = socket.create_connection(("127.0.0.1", self._to))
                with self._lock:
                    self._open += [near, far]
                for one, other, counted in ((near, far, True), (far, near, False)):
                    threading.Thread(target=self._pass_on, args=(one, other, counted), daemon=True).start()

    def _pass_on(self, one: socket.socket, other: socket.socket, counted: bool) -> None:
        with contextlib.suppress(OSError):
            while content := one.recv(1 << 14):
                if counted and self._left_bytes is not None:
                    self._left_bytes -= len(content)
                    if self._left_bytes < 0:
                        self._left_bytes = None
                        self.drops += 1
                        self.down = self._stays_down
                        self._drop()
                        return
                other.sendall(content)
        with contextlib.suppress(OSError):
            other.shutdown(socket.SHUT_WR)

    def _drop(self) -> None:
        with self._lock:
            dropped, self._open = self._open, []
        for one in dropped:
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
            one.close()


@contextlib.contextmanager
def sftp_place(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    """A server of asyncssh's, which serves `folder`/served to the key in `folder`/.ssh, the home from here on."""
    import asyncssh

    (folder / ".ssh").mkdir(parents=True)
    (folder / "served").mkdir()
    monkeypatch.setenv("HOME", str(folder))
    monkeypatch.delenv("SSH_AUTH_SOCK", raising=False)
    key, host_key = asyncssh.generate_private_key("ssh-ed25519"), asyncssh.generate_private_key("ssh-ed25519")
    key.write_private_key(folder / ".ssh" / "id_ed25519")
    allowed = asyncssh.import_authorized_keys(key.export_public_key().decode())
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()

    async def listen() -> asyncssh.SSHAcceptor:
        return await asyncssh.listen(
            "127.0.0.1", 0, server_host_keys=[host_key], authorized_client_keys=allowed,
            sftp_factory=lambda channel: asyncssh.SFTPServer(channel, chroot=str(folder / "served")),
        )  # fmt: skip

    acceptor = asyncio.run_coroutine_threadsafe(listen(), loop).result(20)
    line = Line(acceptor.get_port())
    known = host_key.export_public_key().decode()
    (folder / ".ssh" / "known_hosts").write_text(f"[127.0.0.1]:{line.port} {known}")
    try:
        yield Place(f"sftp://someone@127.0.0.1:{line.port}/runs", line)
    finally:
        line.close()
        loop.call_soon_threadsafe(acceptor.close)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(10)


@contextlib.contextmanager
def s3_place(monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    """A server of moto's, with an empty bucket."""
    import botocore.session
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    line = Line(server.get_host_and_port()[1])
    for name, value in {
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "testing",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{line.port}",
    }.items():
        monkeypatch.setenv(name, value)
    try:
        client = botocore.session.Session().create_client("s3")
        client.create_bucket(Bucket=BUCKET)
        client.close()
        yield Place(f"s3://{BUCKET}/runs", line)
    finally:
        line.close()
        server.stop()


@contextlib.contextmanager
def place_of(kind: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    """kind: sftp or s3."""
    with sftp_place(folder, monkeypatch) if kind == "sftp" else s3_place(monkeypatch) as place:
        yield place
