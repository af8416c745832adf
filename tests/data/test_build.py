"""Building loaders and files from settings."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import data.build
import data.decoding.decode
import data.decoding.libffcv_decode
import data.decoding.native_decode
from data import FFCVLoader, TorchLoader
from data.build import build_loader
from data.convert import main
from data.decoding.decode import make_decoder
from data.sources import digits

pytestmark = pytest.mark.timeout(60)

SETTINGS = {"per_device_batch_size": 50, "image_size": 8, "num_workers": 0}


def build(tmp_path: Path, **settings):
    log: list[str] = []
    settings = {"source": "digits", "split": "train", "cache_dir": tmp_path, "log": log.append} | SETTINGS | settings
    return build_loader(**settings), log


def test_a_source_is_converted_once(tmp_path: Path):
    first, log = build(tmp_path)
    assert isinstance(first, FFCVLoader)
    assert any("loader: ffcv (decoder: native)" in line for line in log)
    assert any("converting 1438 images" in line for line in log)
    (beton,) = tmp_path.glob("*.beton")
    written = beton.stat().st_mtime_ns
    _, log = build(tmp_path)
    assert not any("converting" in line for line in log)
    assert beton.stat().st_mtime_ns == written
    evaluation, _ = build(tmp_path, split="eval")
    assert (evaluation.train, evaluation.num_samples) == (False, 359)
    build(tmp_path, source_settings={"split_seed": 1})
    build(tmp_path, write_settings={"write_mode": "jpg"})
    assert len(list(tmp_path.glob("*.beton"))) == 4


@pytest.fixture
def absent(monkeypatch: pytest.MonkeyPatch):
    """Makes decoders that are installed look as if they were not."""

    def hide(*names: str) -> None:
        for name in names:
            module = {"native": data.decoding.native_decode, "libffcv": data.decoding.libffcv_decode}[name]
            for place in (module, data.decoding.decode):
                monkeypatch.setattr(place, f"find_{name}", lambda: None)
            module._library.cache_clear()
            monkeypatch.setattr(module, "_library", module._library.__wrapped__)

    return hide


def test_auto_takes_libffcv_where_ours_was_not_built(tmp_path: Path, absent: Callable[..., None]):
    absent("native")
    loader, log = build(tmp_path)
    assert isinstance(loader, FFCVLoader)
    assert loader.decoder_name == "libffcv"
    assert any("loader: ffcv (decoder: libffcv)" in line for line in log)
    with pytest.raises(ModuleNotFoundError, match=r"was not built.*C\+\+ compiler and libjpeg-turbo"):
        make_decoder("native")


def test_auto_takes_torch_where_there_is_no_decoder(tmp_path: Path, absent: Callable[..., None]):
    absent("native", "libffcv")
    loader, log = build(tmp_path)
    assert isinstance(loader, TorchLoader)
    assert any("loader: torch (no decoder of .beton files is there)" in line for line in log)
    with pytest.raises(ModuleNotFoundError, match=r"C\+\+ compiler.*loader 'torch'"):
        build(tmp_path, loader="ffcv")
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'brisk-vision\[ffcv\]'.*loader 'torch'"):
        make_decoder("libffcv")
    assert list(tmp_path.iterdir()) == []


def test_a_file_of_the_users_own(tmp_path: Path, digits_beton: Path):
    loader, log = build(tmp_path, path=digits_beton, source="nothing of the kind")
    assert loader.num_samples == len(digits())
    assert log == []
    copy = tmp_path / "x.beton"
    copy.write_bytes(digits_beton.read_bytes())
    loader, log = build(tmp_path, path=copy)
    assert "has no description beside it" in log[0]
    assert loader.class_names == tuple("0123456789")
    with pytest.raises(ValueError, match=r"loader 'torch' cannot read .*x.beton"):
        build(tmp_path, path=copy, loader="torch")


def test_wrong_names(tmp_path: Path):
    with pytest.raises(ValueError, match="loader 'dali': give one of auto, ffcv, torch"):
        build(tmp_path, loader="dali")
    with pytest.raises(ValueError, match="split 'test'"):
        build(tmp_path, split="test")
    with pytest.raises(ValueError, match="do not fit source 'folder'"):
        build(tmp_path, source="folder")
    with pytest.raises(ValueError, match="unknown source 'digit'"):
        build(tmp_path, source="digit")


def test_other_ranks_wait_for_rank_0(tmp_path: Path):
    found = []
    waiting = threading.Thread(target=lambda: found.append(build(tmp_path, rank=1, world_size=2)[0]))
    waiting.start()
    time.sleep(0.3)
    assert not found
    build(tmp_path, rank=0, world_size=2)
    waiting.join(timeout=30)
    assert found[0].num_samples == 1438


def test_other_ranks_do_not_wait_for_ever(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match=r"has not come, and nothing was written to it for 0\.3 seconds"):
        build(tmp_path, rank=1, world_size=2, stall_timeout_seconds=0.3)


def test_two_that_convert_together_do_not_disturb_each_other(tmp_path: Path):
    with ThreadPoolExecutor() as pool:
        loaders = [task.result()[0] for task in [pool.submit(build, tmp_path, split="eval") for _ in range(3)]]
    assert [sum(len(labels) for _, labels in loader) for loader in loaders] == [359] * 3
    assert len(list(tmp_path.iterdir())) == 2


def test_converting_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    out = tmp_path / "x.beton"
    assert main(["synthetic", str(out), "--set", "num_samples=20", "--set", "image_size=40", "--max-side", "16"]) == 0
    loader = FFCVLoader(out, per_device_batch_size=20, image_size=16, train=False, eval_crop_ratio=1.0)
    assert next(iter(loader))[0].shape == (20, 3, 16, 16)
    assert "20 images of 10 classes" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["digit"], "did you mean digits"),
        (["./missing"], "no folder missing"),
        (["digits", "--jpeg-quality", "0"], "jpeg_quality 0"),
        (["digits", "--set", "speed"], "write it as KEY=VALUE"),
        (["digits", "--set", "speed=3"], "do not fit source 'digits'"),
    ],
)
def test_mistakes_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments, message):
    source, *options = arguments
    assert main([source, str(tmp_path / "x.beton"), *options]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert list(tmp_path.iterdir()) == []


def test_importing_the_package_costs_neither_torch_nor_ffcv():
    script = (
        "import sys; from data import Beton, digits, write_beton, random_resized_crops, train_batches; "
        "import data.decoding.decode; data.decoding.decode.present_decoders(); "
        "print([m for m in ('torch', 'numba', 'ffcv', 'torchvision', 'sklearn', 'algos', 'models', 'training') "
        "if m in sys.modules])"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment, check=True)
    assert done.stdout.strip() == "[]"
