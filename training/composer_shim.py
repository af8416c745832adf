"""What Composer's last release leaves open on newer versions of torch. Nothing here changes Composer's files.

Checkpoints: Composer asks torch.load to run what a file says; training/checkpoints/reading.py has torch refuse that.
"""

from __future__ import annotations

import importlib.util
import re
import traceback
import warnings
from importlib import metadata
from pathlib import Path

_COMPOSER = "mosaicml"
_STACKS = Path(__file__).parents[1] / "constraints"
_INSTALL = "pip install -e '.[train]' -c constraints/newest.txt, then pip install --no-deps mosaicml==0.32.1"
# What a library raises when it meets a version that it was not made for.
_OF_ANOTHER_VERSION = (AttributeError, ImportError, NameError, TypeError)

# Each warning that Composer causes and no user can act on: how it starts, and why.
_OF_NO_USE = (
    # Composer 0.32.1 asks FSDP1 for its state in torch's old way, which works and is deprecated.
    "FSDP.state_dict_type\\(\\) and FSDP.set_state_dict_type\\(\\) are being deprecated",
    # Composer makes a scaler for fp16 on CPU runs too, where it does nothing.
    "torch.cuda.amp.GradScaler is enabled, but CUDA is not available",
    # Composer imports MosaicML's command line, whose dependency looks for an optional package.
    "SOCKS support in urllib3 requires the installation of optional dependencies",
    # Callbacks that have no state are missing in a checkpoint of another engine, or of a run that had them off.
    "(LoadShards|RefuseAnother|FiniteGuard|LikeDDP|Tracking|Profile) is not in the state_dict",
    "pkg_resources is deprecated",  # some of Composer's dependencies
    ".*invalid escape sequence.*",  # likewise
)


def quiet_composer() -> None:
    """Keep the warnings of `_OF_NO_USE` from people's screens."""
    for message in _OF_NO_USE:
        warnings.filterwarnings("ignore", message=message)


def describe_missing(error: ModuleNotFoundError) -> str:
    """What to type when a package is not installed."""
    if error.name == "composer":
        return "Composer is not installed: pip install --no-deps mosaicml==0.32.1"
    if not str(error).startswith("No module named"):
        return str(error)  # this project's own words, which say what to do
    return f"{error.name} is not installed: {_INSTALL}"


def describe_mismatch(error: Exception) -> str | None:
    """What to type if `error` comes from Composer under a torch that it was never tried with; None otherwise.

    Which versions it was tried with is read from the checkout's constraints/.
    """
    if not isinstance(error, _OF_ANOTHER_VERSION) or not _is_from_composer(error):
        return None
    here, tried = _installed("torch"), _tried("torch")
    if here in tried:
        return None
    return (
        f"Composer {_installed(_COMPOSER)} failed with torch {here} ({type(error).__name__}: {error}). It was tried "
        f"with torch {', '.join(sorted(tried)) or '(none)'}. Install what it was tried with: {_INSTALL}"
    )


def _is_from_composer(error: Exception) -> bool:
    spec = importlib.util.find_spec("composer")
    homes = tuple(spec.submodule_search_locations or ()) if spec else ()
    return any(Path(frame.filename).is_relative_to(home) for frame in traceback.extract_tb(error.__traceback__)
               for home in homes)  # fmt: skip


def _installed(name: str) -> str:
    try:
        return metadata.version(name).partition("+")[0]
    except metadata.PackageNotFoundError:
        return "(unknown)"


def _tried(name: str) -> set[str]:
    """Versions of the package in constraints/, a file for each stack."""
    files = sorted(_STACKS.glob("*.txt"))
    return {found for file in files for found in re.findall(rf"^{name}==([^\s;]+)", file.read_text(), re.MULTILINE)}
