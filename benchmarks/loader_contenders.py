"""The loaders that benchmarks/loaders.py measures, and the process that runs each of them.

    python -m benchmarks.loader_contenders ours JOB     # JOB: the fields of `Job` as JSON

Reads requests {"image_size": px, "epoch": number}, one per line, and answers each with a line: the cost of a pass over
the data at that size. All contenders crop at random (scale 0.35 to 1, or from the job's least area on), flip, and
return uint8 batches; other settings are each library's defaults. Only what the one contender needs is imported.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

CROP_SCALE = (0.35, 1.0)
SETTLE_SECONDS = 0.05  # work after the last batch, for the next pass or for closing, counts too


@dataclass(frozen=True)
class Job:
    """Settings that all contenders share. All of them drop an incomplete last batch."""

    photos: str  # folder with one folder a class
    beton: str  # the same images, as a .beton file
    batch_size: int
    num_workers: int
    least_area: float = CROP_SCALE[0]  # of a crop, over the image's

    @property
    def crop_scale(self) -> tuple[float, float]:
        """Range of a crop's share of the image's area."""
        return self.least_area, CROP_SCALE[1]


# (image size in px, number of the epoch) -> batches of one pass over the data.
Epoch = Callable[[int, int], Iterator[Any]]


def ours(job: Job, *, decoder: str = "native") -> Epoch:
    """This package's FFCVLoader."""
    from data.loading.ffcv_loader import FFCVLoader

    loader = FFCVLoader(
        job.beton,
        decoder=decoder,
        per_device_batch_size=job.batch_size,
        image_size=1,
        train=True,
        num_workers=job.num_workers,
        crop_scale=job.crop_scale,
    )

    def epoch(image_size: int, number: int) -> Iterator[Any]:
        loader.set_image_size(image_size)
        loader.set_position(number)
        return (images for images, _ in loader)

    return epoch


def ffcv(job: Job) -> Epoch:
    """FFCV's Loader with its own decoder; a new size compiles nothing, since memory is allocated anew every pass."""
    from ffcv.fields.basics import IntDecoder
    from ffcv.fields.rgb_image import RandomResizedCropRGBImageDecoder
    from ffcv.loader import Loader, OrderOption
    from ffcv.transforms import RandomHorizontalFlip, ToTensor, ToTorchImage

    decoder: Any = RandomResizedCropRGBImageDecoder((1, 1), scale=job.crop_scale)
    loader = Loader(
        job.beton,
        batch_size=job.batch_size,
        num_workers=job.num_workers,
        os_cache=True,
        order=OrderOption.RANDOM,
        drop_last=True,
        pipelines={
            "image": [decoder, RandomHorizontalFlip(), ToTensor(), ToTorchImage()],
            "label": [IntDecoder(), ToTensor()],
        },
    )

    def epoch(image_size: int, number: int) -> Iterator[Any]:
        decoder.output_size = (image_size, image_size)
        return (images for images, _ in loader)

    return epoch


def torchvision(job: Job) -> Epoch:
    """ImageFolder, PIL, transforms and torch's DataLoader."""
    from torchvision import datasets, transforms

    def epoch(image_size: int, number: int) -> Iterator[Any]:
        transform = transforms.Compose(
            [
                transforms.RandomResizedCrop(image_size, scale=job.crop_scale),
                transforms.RandomHorizontalFlip(),
                transforms.PILToTensor(),
            ]
        )
        return _data_loader(datasets.ImageFolder(job.photos, transform), job)

    return epoch


def torchvision_v2(job: Job) -> Epoch:
    """torchvision's own JPEG decoder, transforms v2 on tensors, and torch's DataLoader."""
    from torchvision import datasets
    from torchvision.io import ImageReadMode, decode_jpeg, read_file
    from torchvision.transforms import v2

    def load(path: str) -> Any:
        return decode_jpeg(read_file(path), mode=ImageReadMode.RGB)

    def epoch(image_size: int, number: int) -> Iterator[Any]:
        transform = v2.Compose([v2.RandomResizedCrop(image_size, scale=job.crop_scale), v2.RandomHorizontalFlip()])
        return _data_loader(datasets.ImageFolder(job.photos, transform, loader=load), job)

    return epoch


def dali(job: Job) -> Epoch:
    """DALI on the CPU: decodes only the crop, and resizes with its default filter."""
    fn, plugin = (importlib.import_module(f"nvidia.dali.{name}") for name in ("fn", "plugin.pytorch"))
    pipeline_def = importlib.import_module("nvidia.dali").pipeline_def

    @pipeline_def(batch_size=job.batch_size, num_threads=job.num_workers, device_id=None)
    def pipeline(image_size: int) -> Any:
        jpegs, labels = fn.readers.file(file_root=job.photos, random_shuffle=True, name="files")
        images = fn.decoders.image_random_crop(jpegs, device="cpu", random_area=list(job.crop_scale))
        images = fn.resize(images, size=[image_size, image_size])
        return fn.flip(images, horizontal=fn.random.coin_flip()), labels

    iterators: dict[int, Any] = {}  # DALI's size is fixed when the pipeline is built

    def epoch(image_size: int, number: int) -> Iterator[Any]:
        if image_size not in iterators:
            iterators[image_size] = plugin.DALIClassificationIterator(
                pipeline(image_size),
                reader_name="files",
                auto_reset=True,
                last_batch_policy=plugin.LastBatchPolicy.DROP,
            )
        return (batch[0]["data"] for batch in iterators[image_size])

    return epoch


def limit(job: Job, *, entropy_only: bool) -> Epoch:
    """libjpeg-turbo alone on the same bytes and the same crops, in `num_workers` threads; returns no pixels."""
    import numpy as np

    from data.beton.format import Beton
    from data.decoding.crops import CropSettings
    from data.loading.order import train_batches

    decode_batch = _compile_limits()
    beton = Beton(job.beton)
    crops = CropSettings(scale=job.crop_scale)
    widest = int(beton.widths.max())

    def decode(indices: Any, image_size: int, number: int) -> int:
        addresses, sizes = beton.addresses(indices), beton.num_bytes(indices).astype(np.uint64)
        heights, widths = beton.heights[indices], beton.widths[indices]
        rows = np.ascontiguousarray(crops.rows(indices, heights, widths, seed=0, epoch=number, augment=True))
        side = 0 if entropy_only else image_size
        failed = decode_batch(addresses.ctypes.data, sizes.ctypes.data, rows.ctypes.data, len(indices), side, widest)
        if failed >= 0:
            raise ValueError(f"image {indices[failed]} of {job.beton} is no whole JPEG")
        return len(indices)

    def epoch(image_size: int, number: int) -> Iterator[int]:
        batches = train_batches(
            len(beton), per_device_batch_size=job.batch_size, rank=0, world_size=1, seed=0, epoch=number
        )
        with ThreadPoolExecutor(max(1, job.num_workers)) as pool:
            yield from pool.map(partial(decode, image_size=image_size, number=number), batches)

    return epoch


CONTENDERS: dict[str, Callable[[Job], Epoch]] = {
    "ours": ours,
    "ours_libffcv": partial(ours, decoder="libffcv"),
    "ffcv": ffcv,
    "torchvision": torchvision,
    "torchvision_v2": torchvision_v2,
    "dali": dali,
    "limit_crop": partial(limit, entropy_only=False),
    "limit_entropy": partial(limit, entropy_only=True),
}


def serve(epoch: Epoch, requests: Iterator[str], answers: Any) -> None:
    """Answer every request until there are no more."""
    closing_seconds = 0.0
    for line in requests:
        request = json.loads(line)
        begin, cpu = time.monotonic(), cpu_seconds()
        num_images, first_batch_at, last_batch_at = 0, begin, begin
        for batch in epoch(request["image_size"], request["epoch"]):
            last_batch_at = time.monotonic()
            first_batch_at = last_batch_at if num_images == 0 else first_batch_at
            num_images += checked_length(batch, request["image_size"])
        end = time.monotonic()
        time.sleep(SETTLE_SECONDS)
        answer = {
            "images": num_images,
            "cpu_seconds": cpu_seconds() - cpu,
            "wall_seconds": end - begin,
            "first_batch_at": first_batch_at,
            # From the last batch of the previous pass to the first of this one, without the wait for the request.
            "turnaround_seconds": closing_seconds + first_batch_at - begin,
        }
        closing_seconds = end - last_batch_at
        print(json.dumps(answer), file=answers, flush=True)


def cpu_seconds() -> float:
    """User and system CPU-seconds of this process and of its children, ended or alive."""
    import psutil

    total = 0.0
    for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN):
        used = resource.getrusage(who)
        total += used.ru_utime + used.ru_stime
    for child in psutil.Process().children(recursive=True):
        try:
            used = child.cpu_times()
        except psutil.NoSuchProcess:
            continue
        total += used.user + used.system
    return total


def checked_length(batch: Any, image_size: int) -> int:
    """Images in a batch, after checking its dtype and shape. The limits return only the number."""
    if isinstance(batch, int):
        return batch
    shape = tuple(batch.shape)
    if str(batch.dtype) != "torch.uint8" or shape[1:] not in ((3, image_size, image_size), (image_size, image_size, 3)):
        raise ValueError(f"a batch is {batch.dtype} {list(shape)}, not uint8 images of {image_size} px")
    return shape[0]


def _data_loader(dataset: Any, job: Job) -> Iterator[Any]:
    from torch.utils.data import DataLoader

    loader = DataLoader(dataset, job.batch_size, shuffle=True, num_workers=job.num_workers, drop_last=True)
    return (images for images, _ in loader)


def _compile_limits() -> Any:
    source = Path(__file__).with_name("jpeg_limits.c")
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder, "jpeg_limits.so")
        command = [os.environ.get("CC", "cc"), "-O3", "-shared", "-fPIC", "-o", str(library), str(source), "-ljpeg"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        if done.returncode != 0:
            reason = next((line for line in done.stderr.splitlines() if "error" in line), "it gives no reason")
            raise RuntimeError(f"{' '.join(command[:1])} does not compile {source.name}: {reason}")
        function = ctypes.CDLL(str(library)).decode_batch
    function.argtypes = [ctypes.c_void_p] * 3 + [ctypes.c_int64, ctypes.c_int32, ctypes.c_int32]
    function.restype = ctypes.c_int64
    return function


def main() -> None:
    """Serve the contender that the command line names."""
    # Libraries' output goes to stderr, and only answers go to stdout.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    name, job = sys.argv[1], Job(**json.loads(sys.argv[2]))
    serve(CONTENDERS[name](job), iter(sys.stdin.readline, ""), answers)


if __name__ == "__main__":
    main()
