"""Everything that a GPU machine without a network lacks to check this project, in one small folder.

    scripts/gpu_kit.sh                                # .gpu/ for Python 3.12 and torch 2.11
    scripts/gpu_kit.sh --python 3.13 --torch 2.15     # for another machine

The machine brings torch, torchvision and the usual packages around them (`HAS`); the kit brings the wheels of `WHEELS`,
the native decoder with the libjpeg that it was linked with, and photos as .beton files. Copy the folder into a checkout
there and run scripts/gpu_check.sh. docs/gpu_check.md describes both.
"""

from __future__ import annotations

import argparse
import email
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
CONSTRAINTS = ROOT / "constraints" / "newest.txt"
SCHEMA = 1  # of kit.json
MOST_BYTES = 40 * 2**20
TRAIN_PHOTOS, VAL_PHOTOS = 160, 32  # of about 110 kB; the check repeats their entries until they fill an epoch
# What the machine is taken to have. The kit is refused if one of its wheels needs a package that is on neither list.
HAS = {
    "anyio", "click", "filelock", "huggingface-hub", "matplotlib", "numpy", "packaging", "pillow", "protobuf", "psutil",
    "pygments", "python-dateutil", "pyyaml", "requests", "rich", "safetensors", "scikit-image", "scikit-learn", "six",
    "torch", "torchmetrics", "torchvision", "tqdm", "transformers", "typing-extensions", "urllib3", "yarl",
}  # fmt: skip
# What Composer, recipes and the tests need beside `HAS`. Where the machine has one too, the kit's comes first.
WHEELS = (
    "annotated-types", "antialiased-cnns", "argcomplete", "arrow", "backoff", "coolname", "gql", "graphql-core",
    "importlib-metadata", "mosaicml", "mosaicml-cli", "omegaconf", "prompt-toolkit", "py-cpuinfo", "pydantic",
    "pydantic-core", "pytorch-optimizer", "pytorch-ranger", "questionary", "ruamel-yaml", "tabulate", "termcolor",
    "timm", "torch-optimizer", "typing-inspection", "tzdata", "validators", "wcwidth", "websockets", "zipp",
)  # fmt: skip
# Older stacks need these too: OmegaConf 2.3 parses with antlr's runtime.
WHERE_NEEDED = ("antlr4-python3-runtime",)
# From the oldest glibc on; pip takes only the ones that are named.
PLATFORMS = tuple(f"manylinux{tag}_x86_64" for tag in ("_2_28", "_2_27", "_2_17", "2014", "2010", "1"))


class KitError(Exception):
    """The kit cannot be made; the message says what to do."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Make the kit; returns the exit status."""
    options = _parser().parse_args(arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that the half-made folder goes
    try:
        return _make(options)
    except KitError as error:
        print(f"gpu_kit: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("gpu_kit: stopped; no kit was written", file=sys.stderr)
        return 128 + signal.SIGINT


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="scripts/gpu_kit.sh",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=f"The kit has at most {MOST_BYTES >> 20} MiB. Exit status: 0 made, 2 could not be made, 130 stopped.",
    )
    parser.add_argument("--python", default="3.12", metavar="X.Y", help="Python of the GPU machine (default: 3.12)")
    parser.add_argument("--torch", default="2.11", metavar="X.Y", help="torch of the GPU machine (default: 2.11)")
    parser.add_argument("--out", type=Path, default=ROOT / ".gpu", metavar="FOLDER", help="default: .gpu")
    return parser


def _make(options: argparse.Namespace) -> int:
    for name in ("python", "torch"):
        parts = getattr(options, name).split(".")
        if len(parts) != 2 or not all(part.isdigit() for part in parts):
            raise KitError(f"--{name} {getattr(options, name)}: give a version of two numbers, like 3.12")
    out = options.out.resolve()
    if out.exists() and not (out / "kit.json").is_file() and any(out.iterdir()):
        raise KitError(f"--out {options.out}: the folder holds something else than a kit; give another one")
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f"{out.name}.partial-", dir=out.parent))
    try:
        partial.chmod(0o755)
        wheels = get_wheels(partial / "wheels", python=options.python, torch=options.torch)
        native = build_native(partial / "native")
        photos = write_photos(partial / "photos")
        about = {"schema": SCHEMA, "python": options.python, "torch": options.torch, "machine": platform.machine()}
        about |= {"wheels": wheels, "native": native, "photos": photos}
        (partial / "kit.json").write_text(json.dumps(about, indent=2) + "\n")
        size = folder_bytes(partial)
        if size > MOST_BYTES:
            raise KitError(f"the kit has {size / 2**20:.1f} MiB, more than {MOST_BYTES >> 20}; nothing was written")
        shutil.rmtree(out, ignore_errors=True)
        partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    _say(
        f"{options.out}: {size / 2**20:.1f} MiB; copy it into a checkout on the GPU machine, then scripts/gpu_check.sh"
    )
    return 0


def folder_bytes(folder: Path) -> int:
    """Bytes of all files below `folder`."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


# --- wheels --------------------------------------------------------------------------------------------------------


def get_wheels(folder: Path, *, python: str, torch: str) -> list[str]:
    """Download the kit's wheels; returns their names. Raises KitError for one that is not to be had, or is missing."""
    folder.mkdir()
    pins = pinned(CONSTRAINTS.read_text().splitlines(), python=python)
    missing = [name for name in WHEELS if name not in pins]
    if missing:
        raise KitError(f"{CONSTRAINTS.name} does not pin {', '.join(missing)}; make lock writes it")
    wanted = [name for name in (*WHEELS, *WHERE_NEEDED) if name in pins]
    for number, name in enumerate(wanted, 1):
        _say(f"wheel {number} of {len(wanted)}: {name} {pins[name]}")
        _get_wheel(f"{name}=={pins[name]}", folder, python=python)
    found = sorted(folder.glob("*.whl"))
    needs = unmet(found, python=python)
    if needs:
        raise KitError(f"add to WHEELS, or to HAS if every such machine has it: {', '.join(sorted(needs))}")
    _say(f"{len(found)} wheels, {folder_bytes(folder) / 1e6:.1f} MB, for Python {python} beside torch {torch}")
    return [path.name for path in found]


def pinned(lines: Iterable[str], *, python: str) -> dict[str, str]:
    """Name -> version of the constraints that hold on Linux with this Python."""
    from packaging.requirements import Requirement

    pins = {}
    for line in lines:
        requirement = Requirement(line)
        if requirement.marker is None or requirement.marker.evaluate(_target(python)):
            pins[requirement.name] = str(requirement.specifier).removeprefix("==")
    return pins


def unmet(wheels: Iterable[Path], *, python: str) -> set[str]:
    """The packages that `wheels` require and that are neither among them nor in `HAS`."""
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name, parse_wheel_filename

    wheels = list(wheels)
    there = {parse_wheel_filename(path.name)[0] for path in wheels} | HAS
    required = {}
    for path in wheels:
        for text in _metadata(path).get_all("Requires-Dist") or ():
            requirement = Requirement(text)
            if requirement.marker is None or requirement.marker.evaluate(_target(python) | {"extra": ""}):
                required[canonicalize_name(requirement.name)] = path.name
    return {f"{name} (for {wheel})" for name, wheel in required.items() if name not in there}


def _get_wheel(requirement: str, folder: Path, *, python: str) -> None:
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    binary = ["--only-binary=:all:", "--python-version", python, "--implementation", "cp"]
    binary += [word for name in PLATFORMS for word in ("--platform", name)]
    done = _run([*pip, "download", "--no-deps", *binary, "--dest", str(folder), requirement])
    if done.returncode:  # only a source distribution, of Python alone: `unmet` would not see a compiled one
        done = _run([*pip, "wheel", "--no-deps", "--wheel-dir", str(folder), requirement])
    if done.returncode:
        raise KitError(f"pip has no wheel of {requirement} for Python {python}: {_last_line(done)}")


def _metadata(wheel: Path) -> Any:
    with zipfile.ZipFile(wheel) as archive:
        name = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        return email.message_from_bytes(archive.read(name))


def _target(python: str) -> dict[str, str]:
    return {
        "python_version": python,
        "python_full_version": f"{python}.0",
        "sys_platform": "linux",
        "platform_system": "Linux",
        "platform_machine": "x86_64",
        "implementation_name": "cpython",
        "platform_python_implementation": "CPython",
        "os_name": "posix",
    }


# --- the native decoder --------------------------------------------------------------------------------------------


def build_native(folder: Path) -> list[str]:
    """Build the decoder as setup.py does and put the libjpeg beside it that it needs.

    It has a C interface, so one file serves every Python, and the suffix says so. libjpeg-turbo's license (IJG and
    modified BSD) permits to pass the library on with this notice: this software is based in part on the work of the
    Independent JPEG Group.
    """
    _say("building the native decoder")
    folder.mkdir()
    with tempfile.TemporaryDirectory() as scratch:
        where = ["--build-lib", scratch, "--build-temp", scratch]
        done = _run([sys.executable, "setup.py", "--quiet", "build_ext", *where], LDFLAGS="-s")  # no debug symbols
        built = list(Path(scratch).rglob("_native_decode*.so"))
        if not built:
            raise KitError(f"the native decoder was not built; it needs g++ and libjpeg's headers: {_last_line(done)}")
        library = folder / "_native_decode.abi3.so"
        shutil.copyfile(built[0], library)
    jpeg = _linked(library, "libjpeg.so")
    shutil.copyfile(jpeg, folder / jpeg.name)
    (folder / "NOTICE").write_text(
        f"{jpeg.name} is libjpeg-turbo (https://libjpeg-turbo.org), under the IJG and the modified BSD license.\n"
        "This software is based in part on the work of the Independent JPEG Group.\n"
    )
    return [library.name, jpeg.name]


def _linked(library: Path, name: str) -> Path:
    """The shared library whose name begins with `name`, as the loader finds it for `library`."""
    for line in _run(["ldd", str(library)]).stdout.splitlines():
        words = line.split()
        if words and words[0].startswith(name) and "=>" in words and words[2].startswith("/"):
            # Under the name that the decoder asks for, not that of the file behind the link.
            return Path(words[2]).with_name(words[0])
    raise KitError(f"ldd finds no {name} for the native decoder; install libjpeg-turbo and its headers")


# --- the photos ----------------------------------------------------------------------------------------------------


def write_photos(folder: Path) -> dict[str, int]:
    """Write train.beton and val.beton; returns their numbers of photos."""
    from benchmarks.photos import make_photos
    from data import write_beton
    from data.sources import folder as folder_source

    _say(f"cutting {TRAIN_PHOTOS + VAL_PHOTOS} photos")
    folder.mkdir()
    counts = {"train": TRAIN_PHOTOS, "val": VAL_PHOTOS}
    with tempfile.TemporaryDirectory() as scratch:
        made = make_photos(Path(scratch), TRAIN_PHOTOS + VAL_PHOTOS)
        for path in sorted(made.folder.rglob("*.jpg")):
            split = "train" if int(path.stem) < TRAIN_PHOTOS else "val"
            moved = Path(scratch, split, path.parent.name, path.name)
            moved.parent.mkdir(parents=True, exist_ok=True)
            path.rename(moved)
        for split in counts:
            whole = write_beton(
                folder_source(Path(scratch, split)), Path(scratch, f"{split}.beton"), write_mode="jpg", progress=False
            )
            repeat_entries(whole, folder / f"{split}.beton", times=1)
    return counts


def repeat_entries(path: Path, out: Path, *, times: int) -> None:
    """Write a .beton file with every image of `path` `times` over; the entries of one image share its stored bytes.

    So a small file gives epochs of any length with crops and decoding as of large photos. The bytes are packed without
    FFCV's pages of 8 MiB, of which a small file would be half empty; this project's reader does not need them.
    """
    import numpy as np

    from data.beton.format import (
        ALLOCATION,
        FIELD,
        HEADER,
        Beton,
        _metadata_row,
        pack_checksums,
        read_frame,
        sidecar_path,
    )

    beton, raw = Beton(path), path.read_bytes()
    header = np.frombuffer(raw, HEADER, 1).copy()
    fields = np.frombuffer(raw, FIELD, int(header["num_fields"][0]), HEADER.itemsize)
    row, image, _ = _metadata_row(path, fields)
    rows = np.tile(np.frombuffer(raw, row, len(beton), HEADER.itemsize + fields.nbytes), times)
    stored = [beton.image_bytes(index) for index in range(len(beton))]
    sizes = np.array([len(data) for data in stored])
    starts = HEADER.itemsize + fields.nbytes + rows.nbytes + np.cumsum(sizes) - sizes
    rows[image]["data_ptr"] = np.tile(starts, times)
    table = np.zeros(len(rows), ALLOCATION)
    table["sample_id"], table["ptr"] = np.arange(len(rows)), np.tile(starts, times)
    table["size"] = np.tile(sizes, times)
    header["num_samples"], header["table_start"] = len(rows), starts[-1] + sizes[-1]
    with out.open("wb") as file:
        for part in (header, fields, rows, *stored, table):
            file.write(part.tobytes())
    frame = read_frame(out)
    about = {**beton.sidecar, "num_samples": len(rows), "bytes": frame.num_bytes, "checksum": frame.checksum}
    about["class_counts"] = np.bincount(frame.labels, minlength=len(beton.class_names)).tolist()
    about["image_checksums"] = pack_checksums([zlib.crc32(data.data) for data in stored] * times)
    sidecar_path(out).write_text(json.dumps(about))


def _run(command: Sequence[str], **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, **environment})


def _last_line(done: subprocess.CompletedProcess[str]) -> str:
    return next(reversed((done.stderr + done.stdout).strip().splitlines()), f"exit status {done.returncode}")


def _say(text: str) -> None:
    print(f"[gpu kit] {text}", flush=True)


if __name__ == "__main__":
    os.chdir(ROOT)
    sys.exit(main())
