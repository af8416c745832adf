"""Loads an export with the code of its model card, in a process that cannot import this project.

Run by path, with the export as the current folder: python -I reload.py CODE GIVEN.npz RESULT.npz torch|numpy [PROJECT].
PROJECT, for weights that only this project's networks take, is the folder of its packages.
"""

from __future__ import annotations

import sys
from typing import Any

_PROJECT = ("algos", "brisk", "models", "data", "training", "composer")


class _Blocked:
    """Finds none of this project's packages, even where they are installed in the environment."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        if name.partition(".")[0] in _PROJECT:
            raise ModuleNotFoundError(f"No module named {name!r}: an export must load without it", name=name)


def main(code: str, given: str, result: str, arrays: str, project: str | None = None) -> None:
    """Write the logits of every array in `given` to `result`."""
    if project is None:
        sys.meta_path.insert(0, _Blocked())  # pyright: ignore[reportArgumentType]
    else:
        sys.path.insert(0, project)
    import numpy as np

    with open(code, encoding="utf-8") as file:
        names: dict[str, Any] = {"__name__": "__main__"}
        exec(compile(file.read(), code, "exec"), names)
    images = np.load(given)
    if arrays == "numpy":
        logits = {name: names["network"](images[name]) for name in images.files}
    else:
        import torch

        with torch.inference_mode():
            logits = {name: names["network"](torch.from_numpy(images[name])).numpy() for name in images.files}
    np.savez(result, **logits)


if __name__ == "__main__":
    main(*sys.argv[1:])
