"""What run.py says when Composer is missing, or meets a torch that it was never tried with."""

from __future__ import annotations

import warnings
from pathlib import Path

import composer
import pytest

from training import cli, composer_shim, session
from training.composer_shim import describe_mismatch, describe_missing, quiet_composer

COMPOSER = Path(composer.__file__).parent


def error_within(folder: Path, error: Exception) -> Exception:
    """`error`, raised by code of a file in `folder`."""
    code = compile("def fail():\n    raise error", str(folder / "trainer.py"), "exec")
    scope = {"error": error}
    exec(code, scope)
    with pytest.raises(type(error)) as raised:
        scope["fail"]()
    return raised.value


@pytest.fixture
def another_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(composer_shim, "_installed", {"torch": "9.9.0", "mosaicml": "0.32.1"}.get)


@pytest.mark.usefixtures("another_torch")
def test_an_error_of_composers_under_an_untried_torch_says_what_to_install() -> None:
    said = describe_mismatch(error_within(COMPOSER, AttributeError("torch has no _six")))
    assert said is not None
    assert said.startswith("Composer 0.32.1 failed with torch 9.9.0 (AttributeError: torch has no _six). ")
    assert "tried with torch 2.14.1, 2.15.0, 2.6.0, 2.7.0" in said
    assert "pip install -e '.[train]' -c constraints/newest.txt" in said


@pytest.mark.usefixtures("another_torch")
def test_others_errors_are_left_alone() -> None:
    assert describe_mismatch(error_within(Path("/home/me/composer"), AttributeError("x"))) is None
    assert describe_mismatch(error_within(COMPOSER, ZeroDivisionError("x"))) is None


def test_under_a_torch_that_it_was_tried_with_an_error_is_a_fault() -> None:
    assert describe_mismatch(error_within(COMPOSER, AttributeError("x"))) is None


@pytest.mark.usefixtures("another_torch")
def test_the_command_line_says_it_in_one_line(short_recipe, overrides, monkeypatch, capsys) -> None:
    def train(recipe, say):
        raise error_within(COMPOSER, ImportError("cannot import name 'gone' from 'torch'"))

    monkeypatch.setattr(session, "train", train)
    assert cli.main(["-f", "yamls/digits_medium.yaml", *overrides]) == 1
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "cannot import name 'gone'" in said


@pytest.mark.parametrize(
    ("name", "command"), [("composer", "--no-deps mosaicml==0.32.1"), ("omegaconf", "-c constraints/newest.txt")]
)
def test_a_missing_package_is_named_with_the_command_that_installs_it(name: str, command: str) -> None:
    said = describe_missing(ModuleNotFoundError(f"No module named {name!r}", name=name))
    assert command in said


def test_warnings_of_no_use_are_silent_and_others_are_not() -> None:
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        quiet_composer()
        warnings.warn(
            "FSDP.state_dict_type() and FSDP.set_state_dict_type() are being deprecated. Use ...", stacklevel=1
        )
        warnings.warn("torch.compile failed", stacklevel=1)
    assert [str(one.message) for one in seen] == ["torch.compile failed"]
