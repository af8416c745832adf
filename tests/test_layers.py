"""The layout's rules: no lower layer imports a higher one, and algos needs only torch and numpy."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# layer -> the layers that it may import
MAY_IMPORT = {
    "algos": set(),
    "models": set(),
    "data": set(),
    "training": {"algos", "models", "data"},
}
MODULES = [path for layer in MAY_IMPORT for path in sorted((ROOT / layer).rglob("*.py"))]


# In each layer, its wings and its single modules from low to high: one may import those of the lines before its own.
WINGS = {
    "algos": ["framework", "blurring resizing"],  # then the algorithms, of which learning_rate serves others
    "models": [
        "attention checkpointing data_only losses sharding summary sync_batchnorm",
        "classifier roles weights",
        "libraries",
        "alexnet resnet vit",
        "registry",
    ],
    "data": ["draws prefetch whole_files", "sources decoding", "beton", "loading", "build", "convert inspect"],
    "training": [
        "composer_shim late loopback optimizers without_compiler",
        "command_line",
        "recipe",
        "guards",
        "results",
        "checkpoints",
        "facts network",
        "arrangement",
        "trained",
        "teachers",
        "planning",
        "build callbacks",
        "judging",
        "exporting",
        "export demo",
        "engines",
        "probing",
        "session",
        "ablation",
        "cli ablate",
    ],
}


def imported_modules(path: Path) -> dict[str, int]:
    """The whole name of every module or name that `path` imports, wherever in the file it stands -> its line."""
    found: dict[str, int] = {}
    package = path.relative_to(ROOT).with_suffix("").parts[:-1] if path.is_relative_to(ROOT) else ()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = (
                ".".join([*package[: len(package) - node.level + 1], node.module or ""]) if node.level else node.module
            )
            names = [f"{(base or '').rstrip('.')}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            found.setdefault(name, node.lineno)
    return found


def imported_packages(path: Path) -> dict[str, int]:
    """Top-level package of every import in `path` -> its line."""
    found: dict[str, int] = {}
    for name, line in imported_modules(path).items():
        found.setdefault(name.partition(".")[0], line)
    return found


def wing_rank(module: str) -> tuple[str, int] | None:
    """The wing that `module` stands in and how high it is; None outside of the layers that have wings."""
    layer, _, rest = module.partition(".")
    wing = rest.partition(".")[0]
    for rank, names in enumerate(WINGS.get(layer, ())):
        if wing in names.split():
            return f"{layer}.{wing}", rank
    return None


def arrows_up(path: Path, module: str) -> dict[str, int]:
    """What the file at `path`, as `module`, imports of wings that are not below its own -> its line."""
    here, layer = wing_rank(module), module.partition(".")[0]
    if here is None:
        return {}
    return {
        name: line
        for name, line in imported_modules(path).items()
        if name.startswith(f"{layer}.")
        and (there := wing_rank(name)) != here
        and (there is None or there[1] >= here[1])
    }


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_layer_imports_a_higher_one(path: Path) -> None:
    layer = path.relative_to(ROOT).parts[0]
    forbidden = ({*MAY_IMPORT, "run", "tests", "examples", "benchmarks"} - {layer}) - MAY_IMPORT[layer]
    wrong = {name: line for name, line in imported_packages(path).items() if name in forbidden}
    assert not wrong, f"{path}: {layer} may import {MAY_IMPORT[layer] or 'no other layer'}, and imports {wrong}"


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_wing_imports_a_higher_one(path: Path) -> None:
    parts = path.relative_to(ROOT).with_suffix("").parts
    if parts[0] != "algos" and parts[1:] != ("__init__",):
        assert wing_rank(".".join(parts)), f"{path}: no wing of tests/test_layers.py, which says who may import whom"
    wrong = arrows_up(path, ".".join(parts))
    assert not wrong, f"{path}: {parts[1]} imports what is not below it: {wrong}"


def test_the_checks_see_an_import_that_is_not_allowed(tmp_path: Path) -> None:
    module = tmp_path / "module.py"
    module.write_text("def late():\n    from training.planning import Plan\n    import data.loading.order as order\n")
    assert imported_packages(module) == {"training": 2, "data": 3}
    assert arrows_up(module, "training.recipe.late") == {"training.planning.Plan": 2}
    assert arrows_up(module, "data.beton.late") == {"data.loading.order": 3}
    assert arrows_up(module, "training.engines.late") == arrows_up(module, "data.build") == {}


BLOCKED = ("composer", "ffcv", "models", "data", "training", "torchvision", "omegaconf", "numba", "cv2", "sklearn")


@pytest.mark.timeout(60)
def test_functional_forms_import_with_torch_and_numpy_alone() -> None:
    code = f"""
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {BLOCKED}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name.partition(".")[0])
sys.meta_path.insert(0, Block())
import algos, torch
from algos import apply_blurpool, mixup_batch, smooth_labels, sam_gradients, stage_at, warmup_decay
from algos import freeze_for_fixres, apply_channels_last
model = apply_channels_last(apply_blurpool(torch.nn.Sequential(torch.nn.Conv2d(16, 8, 3, stride=2))))
assert model(torch.zeros(1, 16, 8, 8)).shape == (1, 8, 3, 3)
try:
    algos.MixUp(alpha=0.2)
except ModuleNotFoundError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=50)
    assert done.returncode == 0, done.stderr
    assert "Composer is not installed: pip install 'brisk-vision[train]'" in done.stdout
