"""Hostile checkpoints wherever one is read, without a run: checkpoints.py EXAMPLES FOLDER PART.

PART is crafted (bombs, code, wrong shapes and types, in a file and in a folder of shards) or mutants.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
import struct
import traceback
import zipfile
from collections import Counter, OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from bounds import arguments, limit_memory, limited_seconds, report, run
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed.checkpoint.state_dict_saver import save

from algos.ema import EMA
from models.weights import load_weights
from training.checkpoints.export import main as export
from training.checkpoints.reading import check_checkpoint
from training.checkpoints.sums import write_sums
from training.checkpoints.weights import read_network_weights

OUTCOMES: Counter[str] = Counter()
TRACE = Path("it_ran")
WEIGHTS = {
    "body.weight": torch.ones(4, 3), "body.bias": torch.zeros(4),
    "head.weight": torch.ones(2, 4), "head.bias": torch.ones(2),
}  # fmt: skip
HUGE = 2**38  # numbers: a terabyte in float32


class Payload:
    """Touches a file when an unrestricted unpickler reads it."""

    def __reduce__(self) -> Any:
        return os.system, (f"touch {TRACE}",)


def network() -> torch.nn.Module:
    """Whose weights WEIGHTS are."""
    return torch.nn.Sequential(OrderedDict(body=torch.nn.Linear(3, 4), head=torch.nn.Linear(4, 2)))


def state(model: Any = WEIGHTS, **more: Any) -> dict[str, Any]:
    """What a run writes, as far as weights are concerned."""
    return {"state": {"model": model, **more}}


def whole() -> bytes:
    """A file that every place can read."""
    buffer = io.BytesIO()
    torch.save(state(), buffer)
    return buffer.getvalue()


def try_all(path: Path) -> None:
    """Read it in every place. Raises AssertionError for what is neither weights nor one line, and if code ran."""
    target = Path("out.safetensors")
    places: dict[str, Callable[[], Any]] = {
        "checked": lambda: check_checkpoint(path),
        "read": lambda: read_network_weights(path),
        "exported": lambda: export([str(path), str(target)]),
    }
    if path.is_file():
        places["model.weights"] = lambda: load_weights(network(), str(path))
    for place, read in places.items():
        OUTCOMES[f"{place}: {_outcome(read)}"] += 1
        target.unlink(missing_ok=True)
        if TRACE.exists():
            raise AssertionError(f"{place}: code of the file ran")


def _outcome(read: Callable[[], Any]) -> str:
    try:
        with limited_seconds():
            status = read()
    except (ValueError, OSError) as error:
        if "\n" in str(error) or len(str(error)) > 5000:
            raise AssertionError(f"no line: {error}") from error
        return "refused in one line"
    return "refused in one line" if status == 2 else "data"


def archive(members: dict[str, bytes], how: int = zipfile.ZIP_STORED) -> bytes:
    """A ZIP archive as torch.save lays one out."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", how) as file:
        for name, content in members.items():
            file.writestr(f"archive/{name}", content)
    return buffer.getvalue()


def with_declared_size(content: bytes, size: int) -> bytes:
    """The archive's directory tells of another size for its largest member."""
    changed = bytearray(content)
    place = changed.rindex(b"PK\x01\x02")
    changed[place + 20 : place + 28] = struct.pack("<II", size, size)
    return bytes(changed)


def nested(levels: int, kind: type) -> Any:
    value: Any = kind()
    for _ in range(levels):
        value = kind([value])
    return value


def expanded() -> torch.Tensor:
    """One number, of any shape."""
    return torch.ones(1).expand(HUGE // 4, 4)


def saved(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


# Instructions that ask for memory: the largest index of the memo, lengths that are not there.
ASKING = {
    "a memo's largest index": b"\x80\x02K\x01r\xff\xff\xff\x7f.",
    "a frame that is not there": b"\x80\x04\x95" + struct.pack("<Q", 2**62) + b".",
    "bytes that are not there": b"\x80\x04\x8e" + struct.pack("<Q", 2**40) + b".",
    "a bytearray that is not there": b"\x80\x05\x96" + struct.pack("<Q", 2**40) + b".",
    "a number that is not there": b"\x80\x02\x8b" + struct.pack("<i", 2**31 - 1) + b".",
    "a negative length": b"\x80\x02\x8b" + struct.pack("<i", -5) + b".",
    "a bytearray of a length": b"\x80\x02cbuiltins\nbytearray\n\x8a\x05\x00\x00\x00\x00\x40\x85R.",
    "an array of a length": b"\x80\x02cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\n"
    b"\x8a\x05\x00\x00\x00\x00\x40\x85C\x01b\x87R.",
    "deep lists": b"\x80\x02" + b"](" * 100_000 + b"e" * 100_000 + b".",
    "deep tuples": b"\x80\x02" + b"(" * 100_000 + b"t" * 100_000 + b".",
    "marks": b"\x80\x02" + b"(" * 1_000_000 + b".",
    "doubled lists": b"\x80\x02]q\x00" + b"](h\x00h\x00eq\x00" * 60 + b".",
}  # fmt: skip

FILES: dict[str, Callable[[], bytes]] = {
    "whole": whole,
    "code in torch.save": lambda: saved(state() | {"callbacks": Payload()}),
    **{f"code, protocol {n}": lambda n=n: pickle.dumps(state() | {"x": Payload()}, protocol=n) for n in range(6)},
    "a compressed bomb": lambda: archive({"data.pkl": b"\x80\x02}.", "data/0": bytes(1 << 28)}, zipfile.ZIP_DEFLATED),
    "a compressed pickle": lambda: archive({"data.pkl": b"\x80\x02" + b"N0" * (1 << 26) + b"."}, zipfile.ZIP_DEFLATED),
    "a member that declares 4 GB": lambda: with_declared_size(whole(), 2**32 - 2),
    "an expanded tensor": lambda: saved(state({**WEIGHTS, "body.weight": expanded()})),
    "an expanded average": lambda: saved(
        state(algorithms=[(EMA.__qualname__, {"tensors": {"module.body.weight": expanded()}})])
    ),
    "averages that are none": lambda: saved(state(algorithms=[(EMA.__qualname__, 3)])),
    "algorithms that are none": lambda: saved(state(algorithms=7)),
    "a tensor without data": lambda: saved(state({**WEIGHTS, "body.bias": torch.empty(HUGE, device="meta")})),
    "a sparse tensor": lambda: saved(state({**WEIGHTS, "body.weight": torch.ones(4, 3).to_sparse()})),
    "a sparse tensor of any shape": lambda: saved(
        state({**WEIGHTS, "body.weight": torch.sparse_coo_tensor(torch.zeros(2, 1), torch.ones(1), (HUGE, 9))})
    ),
    "a complex tensor": lambda: saved(state({**WEIGHTS, "body.bias": torch.zeros(4, dtype=torch.complex64)})),
    "a quantized tensor": lambda: saved(
        state({**WEIGHTS, "body.bias": torch.quantize_per_tensor(torch.zeros(4), 1.0, 0, torch.qint8)})
    ),
    **{
        f"a tensor of {kind}": lambda kind=kind: saved(state({**WEIGHTS, "body.bias": torch.zeros(4, dtype=kind)}))
        for kind in (torch.bool, torch.int64, torch.float64, torch.float16, torch.bfloat16, torch.float8_e4m3fn)
    },
    **{
        f"a shape of {list(shape)}": lambda shape=shape: saved(state({**WEIGHTS, "body.weight": torch.ones(shape)}))
        for shape in ((), (0,), (3, 4), (12,), (4, 3, 1), (1, 4, 3))
    },
    **{
        f"a model that is {value!r}": lambda value=value: saved(state(value))
        for value in (None, 3, "x", [], (), {}, {1: torch.ones(1)}, {None: 1}, [("weight", torch.ones(1))])
    },
    **{f"a file of {value!r}": lambda value=value: saved(value) for value in (None, 3, [], {}, {"state": []})},
    "deep dicts": lambda: saved(state({"weight": nested(200, list)})),
    "names of any length": lambda: saved(state({"\n" * 100_000: torch.ones(1)})),
    **{f"a pickle of {name}": lambda name=name: ASKING[name] for name in ASKING},
    **{f"an archive of {name}": lambda of=of: archive({"data.pkl": of}) for name, of in ASKING.items()},
    "nothing": lambda: b"",
    "an archive of nothing": lambda: archive({}),
    "an archive with no pickle": lambda: archive({"version": b"3"}),
}  # fmt: skip


def folder_of(spoil: Callable[[Path], Any], folder: Path) -> Path:
    """A folder of shards as a run leaves it, spoiled."""
    save(
        {"model": {"module.weight": torch.ones(4, 3), "module.bias": torch.zeros(4)}},
        checkpoint_id=folder,
        no_dist=True,
    )
    torch.save(state({}), folder / "state.pt")
    write_sums(folder)
    spoil(folder)
    return folder


def huge_metadata(folder: Path) -> None:
    """Its records declare a terabyte."""
    path = folder / ".metadata"
    records = pickle.loads(path.read_bytes())
    entry = next(iter(records.state_dict_metadata.values()))
    entry.size = torch.Size([HUGE])
    path.write_bytes(pickle.dumps(records))
    _sums_again(folder)


def _sums_again(folder: Path) -> None:
    (folder / "sums-rank0.json").unlink()
    write_sums(folder)


def metadata_of(content: bytes) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        (folder / ".metadata").write_bytes(content)
        _sums_again(folder)

    return spoil


def sums_of(text: str) -> Callable[[Path], Any]:
    return lambda folder: (folder / "sums-rank0.json").write_text(text)


FOLDERS: dict[str, Callable[[Path], Any]] = {
    "whole": lambda folder: None,
    "records of a terabyte": huge_metadata,
    "code in its records": metadata_of(pickle.dumps(Payload())),
    **{f"records of {name}": metadata_of(content) for name, content in ASKING.items()},
    "records that are none": metadata_of(pickle.dumps({"a": 1})),
    "code in its state": lambda folder: (torch.save(Payload(), folder / "state.pt"), _sums_again(folder)),
    "checksums of a device": sums_of(json.dumps({"../../../../../../../dev/zero": 1, "/dev/zero": 2})),
    "checksums of the memory": sums_of(json.dumps({"/proc/kcore": 1})),
    "checksums nested deeply": sums_of("[" * 20_000),
    "checksums of a name with a null": sums_of(json.dumps({"a\0b": 1})),
    "checksums of a long name": sums_of(json.dumps({"a" * 5000: 1})),
    "no shards": lambda folder: [path.unlink() for path in folder.glob("*.distcp")],
    "shards of zeros": lambda folder: (
        [path.write_bytes(bytes(path.stat().st_size)) for path in folder.glob("*.distcp")], _sums_again(folder)
    ),
}  # fmt: skip


def crafted() -> None:
    """Each of FILES and FOLDERS in every place. Raises AssertionError that names those neither read nor refused."""
    failed = []
    for number, (name, make) in enumerate(FILES.items()):
        path = Path(f"{number}.pt")
        path.write_bytes(make())
        failed += failure(name, path)
    for number, (name, spoil) in enumerate(FOLDERS.items()):
        failed += failure(f"a folder, {name}", folder_of(spoil, Path(f"shards-{number}")))
    assert not failed, "\n".join(failed)


def failure(name: str, path: Path) -> list[str]:
    """What is wrong with reading it, if anything; removes it."""
    try:
        try_all(path)
    except BaseException as error:
        return [f"{name}: {''.join(traceback.format_exception(error)[-3:])}"]
    finally:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    return []


def mutants() -> Any:
    """A whole file with bytes changed, cut or put in; half of the time its checksums are made right again."""
    original = whole()
    members = {}
    with zipfile.ZipFile(io.BytesIO(original)) as file:
        for info in file.infolist():
            members[info.filename.partition("/")[2]] = file.read(info)

    def change(edits: list[tuple[float, bytes, int]], member: str | None) -> None:
        content = bytearray(original if member is None else members[member])
        for place, piece, length in edits:
            at = int(place * len(content))
            content[at : at + length] = piece
        path = Path("mutant.pt")
        path.write_bytes(content if member is None else archive({**members, member: bytes(content)}))
        try_all(path)
        path.unlink()

    opcodes = st.sampled_from([bytes([code]) for code in range(256)])
    edit = st.tuples(st.floats(0, 1), st.binary(max_size=9) | opcodes, st.integers(0, 9))
    return change, given(
        st.lists(edit, min_size=1, max_size=3), st.none() | st.just("data.pkl") | st.sampled_from(sorted(members))
    )


if __name__ == "__main__":
    count, (folder, part) = arguments()
    os.chdir(folder)
    if part == "crafted":
        limit_memory()
        crafted()
        report(OUTCOMES)
    else:
        run(count, *mutants(), OUTCOMES)
