"""The key checkpoints.remote: a place away from the machine, as a URL or a folder."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

from training.recipe.schema import RecipeError

# protocol -> the module that fsspec needs for it, of the same name for pip
_NEEDS = {"s3": "s3fs", "gs": "gcsfs", "sftp": "paramiko", "file": "fsspec"}
_EXAMPLE = "s3://BUCKET/PREFIX, gs://BUCKET/PREFIX, sftp://USER@HOST/FOLDER or /ANOTHER/DISK/FOLDER"
_PASSWORD = re.compile(r"(//[^/@\s:]*):[^/@\s]*@")
_PATH = "checkpoints.remote"


def mask(text: str) -> str:
    """`text` without the passwords of URLs in it."""
    return _PASSWORD.sub(r"\1:***@", text)


def protocol_of(url: str) -> str:
    """The protocol of a URL; file for a path."""
    return url.partition("://")[0] if "://" in url else "file"


def check_remote(url: str | None, *, run_dir: Path) -> None:
    """Raise RecipeError unless `url` is a place that can be written to with what is installed. Connects to nothing."""
    if url is None:
        return
    shown, protocol = mask(url), protocol_of(url)
    if protocol not in _NEEDS:
        raise RecipeError(_PATH, f"is {shown}, and {protocol} is no protocol that is known here; give {_EXAMPLE}")
    if shown != url:
        raise RecipeError(
            _PATH,
            f"is {shown}, which holds a password; leave it out, and give it where {_NEEDS[protocol]} looks for "
            "it: in the environment, a key file or an agent",
        )
    if set("?#*[") & set(url):
        raise RecipeError(_PATH, f"is {shown}, and ? # * [ mean something else to some servers; give {_EXAMPLE}")
    if protocol == "file":
        _check_folder(url, run_dir)
    else:
        place, _, path = url.partition("://")[2].partition("/")
        if not place or (protocol == "sftp" and not path.strip("/")):
            raise RecipeError(_PATH, f"is {shown}, which names no folder; give {_EXAMPLE}")
    if importlib.util.find_spec(_NEEDS[protocol]) is None:
        package = _NEEDS[protocol]
        raise RecipeError(
            _PATH, f"is {shown}, which needs {package}, and that is missing: pip install {package}, or set {_PATH}=null"
        )


def _check_folder(url: str, run_dir: Path) -> None:
    path = url.removeprefix("file://")
    if not path.strip():
        raise RecipeError(_PATH, f"is {url!r}; give {_EXAMPLE}, or null for none")
    if (Path(path).expanduser() / run_dir.name).resolve() == run_dir.resolve():
        raise RecipeError(_PATH, f"is {url}, where the run's own results are; give a folder on another disk")
