"""The wheel, installed away from the checkout, in a project that has its own data/, models/, training/ and run.py.

Its environments hold only what the named distributions require, as links to this environment's package folders, so that
neither a download nor a copy of torch is needed.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import zipfile
from importlib.metadata import distribution
from pathlib import Path

import pytest
import tomllib
from packaging.requirements import Requirement

from data import write_beton
from data.sources import ArraySource

ROOT = Path(__file__).parent.parent
pytestmark = [pytest.mark.timeout(250), pytest.mark.xdist_group("packaging")]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, so that the checkout keeps no build folder."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in tracked.split("\0"):
        if name.startswith(("algos/", "brisk/", "data/", "models/", "training/")) or name in (
            "pyproject.toml", "setup.py", "README.md", "LICENSE", "run.py",
        ):  # fmt: skip
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    command = [sys.executable, "-m", "uv", "build", "--wheel", "--no-build-isolation", "--offline", "--quiet",
               "--python", sys.executable, "--out-dir", str(folder), str(source)]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    (made,) = folder.glob("*.whl")
    return made


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """Somebody's own project, which must not be taken for ours, nor ours for it."""
    folder = tmp_path / "project"
    for name in ("data", "models", "training"):
        (folder / name).mkdir(parents=True)
        (folder / name / "__init__.py").write_text(f"MINE = {name!r}\n")
    (folder / "run.py").write_text("MINE = 'run'\n")
    return folder


def test_what_the_wheel_puts_into_site_packages(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    top = {name.partition("/")[0] for name in names}
    assert {name for name in top if not name.endswith(".dist-info")} == {"algos", "brisk"}
    for package in ("algos", "brisk", "brisk/data", "brisk/models"):
        assert f"{package}/py.typed" in names
    assert any(name.startswith("brisk/data/decoding/_native_decode.") for name in names), "the decoder was not built"
    modules = {name for name in names if name.endswith(".py")}
    expected = {
        f"{prefix}{path.relative_to(ROOT)}"
        for layer, prefix in (("algos", ""), ("brisk", ""), ("data", "brisk/"), ("models", "brisk/"))
        for path in (ROOT / layer).rglob("*.py")
    }
    assert modules == expected, "pyproject.toml lists the packages: tool.setuptools.packages"


def test_the_checkouts_python_is_one_that_the_package_asks_for() -> None:
    asked = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["requires-python"]
    assert Requirement(f"x{asked}").specifier.contains(".".join(map(str, sys.version_info[:2])))


def commands_without_make() -> list[str]:
    """The commands for somebody's own environment, as the documentation gives them."""
    text = (ROOT / "docs" / "installation.md").read_text().partition("## Without make")[2].partition("\n## ")[0]
    return re.findall(r"(?:^    |`)((?:uv )?pip install [^`\n]+)", text, re.MULTILINE)


@pytest.mark.timeout(150)
def test_the_documented_commands_find_versions_that_fit_together(tmp_path: Path) -> None:
    """Each in an empty environment, as far as uv decides what it would install; pip reads no overrides."""
    empty = tmp_path / "empty"
    uv = [sys.executable, "-m", "uv"]
    subprocess.run([*uv, "venv", "--quiet", "--python", sys.executable, str(empty)], check=True, timeout=60)
    commands = commands_without_make()
    assert len(commands) == 4
    found = []
    for command in commands:
        _, install, arguments = command.partition("pip install ")
        alone = [] if command.startswith("uv ") else ["--no-config"]
        there = ["--dry-run", "--python", str(empty / "bin" / "python")]
        done = subprocess.run(
            [*uv, *install.split(), *alone, *there, *shlex.split(arguments)],
            cwd=ROOT, capture_output=True, text=True, timeout=100,
        )  # fmt: skip
        assert done.returncode == 0, f"{command}\n{done.stderr}"
        found.append(dict(re.findall(r"^ \+ ([\w-]+)==(\S+)", done.stderr, re.MULTILINE)))
    train, composer, both, composers_own = found
    assert "mosaicml" not in train
    assert composer.keys() == {"mosaicml"}
    assert both["mosaicml"] == composers_own["mosaicml"] == composer["mosaicml"]
    assert both["torch"] == train["torch"] != composers_own["torch"]


FUNCTIONAL = """
import sys, torch
from torch import nn
import algos, brisk, brisk.algos, brisk.algos.mixup, algos.mixup
from algos import apply_blurpool, draw_mixup, mixup_batch, smooth_labels

assert brisk.algos is algos and brisk.algos.mixup is algos.mixup and brisk.algos.mixup_batch is mixup_batch
assert algos.mixup.__spec__.name == "algos.mixup"
layers = [nn.Conv2d(3, 16, 3), nn.Conv2d(16, 32, 3, stride=2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10)]
model = apply_blurpool(nn.Sequential(*layers))
images, labels = torch.randn(8, 3, 16, 16), torch.randint(10, (8,))
lam, permutation = draw_mixup(8, alpha=0.2, generator=torch.Generator().manual_seed(0))
images, targets = mixup_batch(images, labels, lam=lam, permutation=permutation, num_classes=10)
nn.functional.cross_entropy(model(images), smooth_labels(targets, smoothing=0.1)).backward()
import data, models, training, run
assert (data.MINE, models.MINE, training.MINE, run.MINE) == ("data", "models", "training", "run")
try:
    algos.MixUp(alpha=0.2)
except ModuleNotFoundError as error:
    print(error)
"""

LOADER = """
import sys
from brisk.data import FFCVLoader
loader = FFCVLoader(sys.argv[1], per_device_batch_size=8, image_size=16, train=True, num_workers=1)
sizes = []
for images, labels in loader:
    sizes.append(tuple(images.shape))
loader.set_image_size(12)
images, labels = next(iter(loader))
print(sizes, tuple(images.shape), images.dtype)
import data
assert data.MINE == "data"
"""

TRAINER = """
import torch
from composer import Trainer
from composer.models import ComposerClassifier
from torch.utils.data import DataLoader, TensorDataset
import algos

network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(48, 4))
images = TensorDataset(torch.randn(16, 3, 4, 4), torch.randint(4, (16,)))
trainer = Trainer(
    model=ComposerClassifier(network, num_classes=4), train_dataloader=DataLoader(images, 8), max_duration="1ep",
    optimizers=torch.optim.SGD(network.parameters(), lr=0.1), algorithms=[algos.SAM(rho=0.05)],
)
trainer.fit()
assert trainer.state.timestamp.batch.value == 2
import data
assert data.MINE == "data"
print("trained")
"""


def test_plain_pytorch(wheel: Path, project: Path, tmp_path: Path) -> None:
    said = run(FUNCTIONAL, project, environment(tmp_path, wheel, "torch", "numpy"))
    assert "Composer is not installed: pip install 'brisk-vision[train]'" in said


def test_a_loader_on_a_file(wheel: Path, project: Path, photos: ArraySource, tmp_path: Path) -> None:
    path = write_beton(photos, tmp_path / "photos.beton", write_mode="jpg", progress=False)
    said = run(LOADER, project, environment(tmp_path, wheel, "torch", "numpy"), str(path))
    assert said.strip() == "[(8, 3, 16, 16), (8, 3, 16, 16), (8, 3, 16, 16)] (8, 3, 12, 12) torch.uint8"


def test_composers_trainer(wheel: Path, project: Path, tmp_path: Path) -> None:
    said = run(TRAINER, project, environment(tmp_path, wheel, "torch", "numpy", "mosaicml"))
    assert said.strip().endswith("trained")


@pytest.fixture(scope="module")
def photos() -> ArraySource:
    import numpy as np

    images = np.random.default_rng(0).integers(0, 256, (30, 40, 50, 3), dtype=np.uint8)
    return ArraySource(images, np.arange(30) % 3, class_names=("ant", "bee", "cat"), name="photos")


def run(code: str, folder: Path, site_packages: Path, *arguments: str) -> str:
    """What `code` prints, as a script of the project in `folder`, by a Python that sees `site_packages` alone."""
    (folder / "script.py").write_text(code)
    inherited = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "VIRTUAL_ENV")}
    start = f"import runpy, sys; sys.path[:0] = [{str(folder)!r}, {str(site_packages)!r}]; runpy.run_path('script.py')"
    done = subprocess.run(
        [base_python(), "-S", "-c", start, *arguments],
        cwd=folder, env=inherited, capture_output=True, text=True, timeout=150,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def base_python() -> str:
    """The interpreter that this virtual environment was made of: with -S it sees no site-packages at all."""
    return str(Path(sys.base_prefix) / "bin" / f"python{sys.version_info.major}.{sys.version_info.minor}")


def environment(folder: Path, wheel: Path, *names: str) -> Path:
    """A site-packages with the wheel unpacked, and all that the distributions `names` require linked beside it."""
    site_packages = folder / "site-packages"
    site_packages.mkdir()
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site_packages)
    wanted: list[tuple[str, str]] = [(name, "") for name in names]  # distribution, extra
    seen: set[tuple[str, str]] = set()
    while wanted:
        name, extra = wanted.pop()
        if (name, extra) in seen:
            continue
        seen.add((name, extra))
        for requirement in map(Requirement, distribution(name).requires or ()):
            if requirement.marker is None or requirement.marker.evaluate({"extra": extra}):
                wanted += [(requirement.name, one) for one in ("", *requirement.extras)]
        link(name, site_packages)
    return site_packages


def link(name: str, site_packages: Path) -> None:
    """Link what the installed distribution `name` has in site-packages. Folders that several share are made anew."""
    files = distribution(name).files or []
    home = Path(str(distribution(name).locate_file("")))
    for file in files:
        if file.parts[0] in ("..", "__pycache__") or not (home / file).exists():
            continue
        shared = file.parts[0] in ("nvidia", "google", "sphinxcontrib", "ruamel")
        top = Path(*file.parts[: 2 if shared and len(file.parts) > 1 else 1])
        target = site_packages / top
        if not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            target.symlink_to(home / top)
