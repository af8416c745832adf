"""Every block of the documentation: Python runs, recipes are read, and commands are run or their arguments checked.

Commands that take long are not run here: each is parsed by the program's own parser, and its recipe is read with its
overrides. `CHECKED` says why, and where the program itself is tested. A page says `<!-- not run: reason -->` before a
block that this machine cannot run; its arguments are checked all the same where it is one of those.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import tomllib
import torch
import yaml
from blocks import PAGES, ROOT, Block, blocks, commands, mapping, variables

from training.planning.text import plan_text
from training.recipe import Recipe, load_recipe
from training.recipe.listing import listing

# Their Python runs in other tests, which check more of these pages.
_ELSEWHERE = {ROOT / "README.md": "tests/test_readme.py", ROOT / "CONTRIBUTING.md": "below"} | {
    page: "tests/algos/test_pages.py"
    for page in PAGES
    if page.parent.name == "algorithms" and page.stem not in ("composer_algorithms", "learning_rate")
}
# What blocks show that are neither code nor commands, by the words that they begin with.
_SHOWN = (
    "speed-ups on         all off", "yamls/*.yaml -> training/recipe", "results/RUN_lr_range.png", "epoch 4/4  20 px",
    "run.py: yamls/hardware/mine", "run.py: rank 0 has heard", "run.py: recipe.yaml: data.train.num_wrokers",
    "report: results/digits_medium has no summary", "source ──> .beton file", "part    item", "layer    ",
)  # fmt: skip
# Names that stand for a reader's own files.
_STANDS_FOR = {"RECIPE": "yamls/digits_medium.yaml", "my.yaml": "yamls/digits_medium.yaml", "N": "2"}
# Programs whose commands are checked and not run, and why.
CHECKED = {
    "run.py": "trains; tests/training/test_session.py runs it",
    "evaluate.py": "needs a finished run; tests/training/judging runs it",
    "predict.py": "needs a finished run; tests/training/judging runs it",
    "demo.py": "serves a page until it is stopped; tests/training/exporting runs it",
    "training.ablate": "trains many times; tests/training/ablation runs it",
    "training.export": "needs a finished run; tests/training/exporting runs it",
    "training.results.report": "needs finished runs; tests/training/results runs it",
    "training.checkpoints.export": "needs a finished run; tests/training/checkpoints runs it",
    "training.engines.compare": "trains under each engine; tests/training/engines runs it",
    "data.convert": "needs a reader's images; tests/data/test_convert.py runs it",
    "data.inspect": "needs a reader's file; tests/data/test_inspect.py runs it",
    "composer": "starts ranks; tests/training/engines runs it",
    "torchrun": "starts ranks; tests/training/engines runs it",
    "accelerate": "starts ranks; tests/examples runs the script",
    "examples": "tests/examples runs them",
    "pytest": "would run within this test",
    "make": "installs, or runs whole suites",
    "pip": "installs; tests/test_packaging.py resolves the commands of docs/installation.md",
    "apt-get": "installs",
    "scripts": "need a network or a GPU machine; tests/benchmarks runs their parts",
    "source": "changes the shell",
    "tensorboard": "serves a page until it is stopped",
    "find": "lists a reader's files",
}
_MAINS = {
    "run.py": "training.cli",
    "evaluate.py": "training.judging.evaluate",
    "predict.py": "training.judging.predict",
    "demo.py": "training.demo",
}
_BASE = ROOT / "yamls" / "resnet50_medium.yaml"  # below blocks that are a part of a recipe


def _with(kind: Callable[[Block], bool]) -> list[Any]:
    return [
        pytest.param(page, id=str(page.relative_to(ROOT)))
        for page in PAGES
        if any(kind(block) for block in blocks(page))
    ]


def _is_python(block: Block) -> bool:
    return block.language == "python" and block.page not in _ELSEWHERE


def _is_recipe(block: Block) -> bool:
    return block.language == "yaml" or (block.language == "" and mapping(block.text) is not None)


def _is_shown(block: Block) -> bool:
    return block.language == "text" or block.text.lstrip().startswith(_SHOWN)


def _is_cluster(block: Block) -> bool:
    return block.text.startswith(("#!/bin/bash", "apiVersion:"))


def _is_commands(block: Block) -> bool:
    return block.language in ("", "bash", "sh") and not (_is_recipe(block) or _is_shown(block) or _is_cluster(block))


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder like a checkout, in which a reader follows a page."""
    for name in ("yamls", "examples", "benchmarks", "scripts", "tests", "constraints"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    if not torch.distributed.is_initialized():  # by another test in this process, which then needs them
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT"):
            monkeypatch.delenv(name, raising=False)  # Composer leaves them behind
    return tmp_path


@pytest.mark.parametrize("page", _with(_is_python))
@pytest.mark.filterwarnings("ignore")  # Composer's and Lightning's own
def test_python_runs(page: Path, checkout: Path) -> None:
    """In their order and with the same names, as a reader would paste them."""
    names: dict[str, Any] = {"__name__": "page"}
    for block in filter(_is_python, blocks(page)):
        exec(compile("\n" * block.line + block.text, str(page), "exec"), names)


def test_what_contributing_adds_does_what_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """An algorithm, a model and a source, each run in the file that it is to be added to."""
    found = [block.text for block in blocks(ROOT / "CONTRIBUTING.md") if block.language == "python"]
    within = ("algos.blurpool", "models.resnet", "data.sources.sources")
    algorithm, model, source = (
        _as_if_in(module, text, monkeypatch) for module, text in zip(within, found, strict=True)
    )
    images = torch.rand(2, 3, 4, 4)
    faded = algorithm["grayscale_batch"](images, strength=1.0)
    torch.testing.assert_close(faded, images.mean(dim=1, keepdim=True).expand_as(images))
    with pytest.raises(ValueError, match="must lie in"):
        algorithm["grayscale_batch"](images, strength=2.0)
    assert model["plain_cnn"](num_classes=5)(images).shape == (2, 5)
    made = source["stripes"](num_samples=8)
    assert (len(made), made.image(0).shape, made.label(1)) == (8, (16, 16, 3), 1)


def _as_if_in(module: str, text: str, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The names of a new module beside `module`, which has that one's names and then runs `text`."""
    new = ModuleType(f"{module}_of_the_page")
    vars(new).update({**vars(import_module(module)), "__name__": new.__name__})
    monkeypatch.setitem(sys.modules, new.__name__, new)
    exec(text, vars(new))
    return vars(new)


@pytest.mark.parametrize("page", _with(_is_recipe))
def test_recipes_are_read(page: Path, checkout: Path) -> None:
    for block in filter(_is_recipe, blocks(page)):
        assert _read_block(block, checkout / "block.yaml"), block


@pytest.mark.parametrize("page", _with(_is_commands))
def test_commands_are_right(page: Path, checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _save_files(page)
    shared = variables(ROOT / "docs" / "recipes" / "index.md")
    for block in filter(_is_commands, blocks(page)):
        for words in commands(_expanded(block.text, shared)):
            try:
                _check(words, run=block.reason is None, monkeypatch=monkeypatch)
            except (AssertionError, ValueError, SystemExit, OSError) as error:
                pytest.fail(f"{block}: {' '.join(words)}\n{type(error).__name__}: {error}")


def test_cluster_scripts_are_right(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SLURM's and Kubernetes' files, whose commands start ranks on machines that are not here."""
    found = [block for page in PAGES for block in blocks(page) if _is_cluster(block)]
    assert len(found) == 4
    for block in found:
        _save_files(block.page)
        if block.text.startswith("apiVersion:"):
            *_, job = yaml.safe_load_all(block.text)
            (command,) = job["spec"]["template"]["spec"]["containers"][0]["args"]
        elif "srun" in block.text:
            ((*_, command),) = [words for words in commands(block.text) if words[0] == "srun"]
        else:
            command = re.sub(r"^export .*$", "", block.text, flags=re.MULTILINE)
        values = {"GPUS": "8", "SLURM_NODEID": "0", "JOB_COMPLETION_INDEX": "0", "MASTER_ADDR": "a", "MASTER_PORT": "1"}
        command = re.sub(r"\$\(\(.+?\)\)", "16", command)
        for words in commands(_expanded(command, values)):
            _check(words, run=False, monkeypatch=monkeypatch)


def test_every_block_is_one_of_these() -> None:
    found = [block for page in PAGES for block in blocks(page)]
    assert len(found) > 100
    kinds = (_is_recipe, _is_shown, _is_cluster, _is_commands)
    for block in found:
        assert block.language == "python" or sum(kind(block) for kind in kinds) == 1, block
    shown = [block.text.lstrip() for block in found if _is_shown(block)]
    for words in _SHOWN:
        assert any(text.startswith(words) for text in shown), f"no block begins with {words!r}: remove it from _SHOWN"


def _read_block(block: Block, path: Path) -> Recipe:
    path.write_text(block.text)
    if "run_name:" in block.text:
        return load_recipe([path])
    base = path.with_name("base.yaml")  # whose optimizer has keys that another one may lack
    given = yaml.safe_load(block.text)
    kept = {
        key: value
        for key, value in yaml.safe_load(_BASE.read_text()).items()
        if key not in given.keys() & {"optimizer"}
    }
    base.write_text(yaml.safe_dump(kept))
    return load_recipe([base, path])


def _save_files(page: Path) -> None:
    """What a page says to save as a file."""
    text = page.read_text()
    for name, content in re.findall(r"ave (?:this|it) as `(\w+\.yaml)`:\s+```yaml\n(.*?)```", text, re.DOTALL):
        Path(name).write_text(content)
    for name in ("recipe.yaml", "my.yaml"):
        if not Path(name).exists():
            shutil.copy(ROOT / "yamls" / "digits_medium.yaml", name)


def _expanded(text: str, values: dict[str, str]) -> str:
    """`text` with `$name` replaced, and without what stands in brackets for a choice."""
    text = re.sub(r"\[key=value \.\.\.\]", "", text)
    text = re.sub(r"\[(--[\w-]+ \w+)\]", r"\1", text)
    for name, value in values.items():
        text = re.sub(rf'"?\${name}\b"?', lambda _, value=value: value, text)
    return text


def _check(words: list[str], *, run: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run a command, or check its arguments. Raises an AssertionError or what the program raises."""
    words = [_STANDS_FOR.get(word, word) for word in words if word != "$"]
    if "|" in words:
        at = words.index("|")
        _check(words[:at], run=run, monkeypatch=monkeypatch)
        words = words[at + 1 :]
    settings = []
    while re.fullmatch(r"[A-Za-z_]+=.*", words[0], re.DOTALL):
        settings.append(words.pop(0))
        if not words:
            return  # an assignment alone
    program, *arguments = words
    with monkeypatch.context() as environment:
        for name, _, value in (setting.partition("=") for setting in settings):
            environment.setenv(name, value)
        if program == "python":
            _check_python(arguments, run=run)
        else:
            _OTHERS[Path(program).parts[0] if program.startswith("scripts/") else program](words)


def _check_python(arguments: list[str], *, run: bool) -> None:
    if arguments[0] == "-m" and arguments[1] == "pytest":
        return _check_pytest(arguments[2:])
    if arguments[0].startswith(("examples/", "scripts/")):
        assert Path(arguments[0]).is_file()
        return None
    module, rest = (arguments[1], arguments[2:]) if arguments[0] == "-m" else (arguments[0], arguments[1:])
    assert module in CHECKED or module.startswith("benchmarks."), f"{module} is neither run nor in CHECKED"
    options = _parsed(_MAINS.get(module, module), rest)
    if getattr(options, "list", False):
        assert "digits_medium" in listing()
    elif hasattr(options, "overrides"):
        recipe = _recipe(options)
        if getattr(options, "plan", False) and run:
            assert "learning rate" in plan_text(recipe)
    return None


def _recipe(options: argparse.Namespace) -> Recipe:
    """The recipe of a command, with its overrides. A file that an earlier command makes is taken to be there."""
    overrides = [one for one in options.overrides if not re.match(r"(model\.weights|load)=.*\.", one)]
    files = [options.file] if isinstance(options.file, str) else options.file
    return load_recipe(files, overrides)


class _Parsed(BaseException):
    """Carries what a program's own parser made of its arguments, and ends the program."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options


def _parsed(module: str, arguments: list[str]) -> argparse.Namespace:
    if module == "training.cli":  # checks more than its parser does
        return import_module(module)._options(arguments)
    if module == "training.results.report":
        module = "training.results.report.__main__"
    with pytest.MonkeyPatch.context() as patch:
        for name in ("parse_args", "parse_intermixed_args"):
            patch.setattr(argparse.ArgumentParser, name, _parse_and_end(getattr(argparse.ArgumentParser, name)))
        try:
            import_module(module).main(arguments)
        except _Parsed as ended:
            return ended.options
    raise AssertionError(f"{module} parsed no arguments")


def _parse_and_end(parse: Callable[..., argparse.Namespace]) -> Callable[..., None]:
    def parse_and_end(*given: Any, **settings: Any) -> None:
        raise _Parsed(parse(*given, **settings))

    return parse_and_end


def _check_script(script: str, arguments: list[str]) -> None:
    """What a launcher starts."""
    if script.startswith("examples/"):
        assert Path(script).is_file()
    else:
        _check_python([script, *arguments], run=False)


def _check_composer(words: list[str]) -> None:
    from composer.cli.launcher import _get_parser

    options = _get_parser().parse_args(words[1:])
    _check_script(options.training_script, options.training_script_args)


def _check_torchrun(words: list[str]) -> None:
    from torch.distributed.run import get_args_parser

    options = get_args_parser().parse_args(words[1:])
    _check_script(options.training_script, options.training_script_args)


def _check_accelerate(words: list[str]) -> None:
    launch = pytest.importorskip("accelerate.commands.launch")
    assert words[1] == "launch"
    options = launch.launch_command_parser().parse_args(words[2:])
    _check_script(options.training_script, options.training_script_args)


def _check_pytest(arguments: list[str]) -> None:
    for argument in arguments:
        assert not argument.startswith("tests") or Path(argument).exists()
    if "-m" in arguments:
        markers = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["pytest"]["ini_options"]["markers"]
        assert arguments[arguments.index("-m") + 1] in [marker.partition(":")[0] for marker in markers]


def _check_make(words: list[str]) -> None:
    for target in words[1:]:
        name, equals, value = target.partition("=")
        if equals:
            assert name != "STACK" or (ROOT / "constraints" / f"{value}.txt").exists()
        else:
            assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE), f"make has no {target}"


def _check_pip(words: list[str]) -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for word in words:
        named = re.fullmatch(r"(?:\.|brisk-vision)\[([\w,-]+)\]", word)
        assert not named or set(named[1].split(",")) <= set(extras), word
        assert not word.startswith("constraints/") or Path(word).exists(), word


def _check_apt(words: list[str]) -> None:
    setup = (ROOT / "scripts" / "setup.sh").read_text()
    for package in words[2:]:
        assert package in setup, f"scripts/setup.sh does not install {package}"


def _check_file(words: list[str]) -> None:
    assert os.access(words[0], os.X_OK), f"{words[0]} is no program"


def _is_there(words: list[str]) -> None:
    assert words[0] in CHECKED


_OTHERS: dict[str, Callable[[list[str]], None]] = {
    "composer": _check_composer, "torchrun": _check_torchrun, "accelerate": _check_accelerate, "make": _check_make,
    "pip": _check_pip, "uv": _check_pip, "apt-get": _check_apt, "scripts": _check_file, "source": _is_there,
    "tensorboard": _is_there, "find": _is_there,
}  # fmt: skip


def test_a_wrong_command_is_found(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for wrong in _wrong():
        try:
            _check(commands(wrong)[0], run=True, monkeypatch=monkeypatch)
        except (AssertionError, ValueError, SystemExit, OSError, KeyError):
            continue
        pytest.fail(f"nothing was found wrong with: {wrong}")


def _wrong() -> Iterator[str]:
    yield "python run.py -f yamls/digits_medium.yaml algorithms.samm=null"
    yield "python run.py -f yamls/digits.yaml"
    yield "python run.py -f yamls/digits_medium.yaml --planned"
    yield "composer -n 2 run.py -f yamls/digits_medium.yaml data.train.batch=2"
    yield "python -m training.export results/a --to onyx"
    yield "python -m training.exported results/a"
    yield "python evaluate.py results/a --image-sizes 3"
    yield "make tests"
    yield "pip install '.[training]'"
    yield "scripts/gpu_checks.sh"
    yield "frobnicate --all"
