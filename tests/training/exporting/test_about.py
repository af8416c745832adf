"""model.json of a stranger's run: what training never writes is refused in one line, before anything is made of it."""

from __future__ import annotations

import json
from typing import Any

import pytest

from training.trained import MODEL_FILE, load_trained


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"image_size": 10**9}, "image_size must lie in [1, 8192]"),
        ({"image_size": "8"}, "image_size must lie in"),
        ({"crop_ratio": 0}, "crop_ratio must lie in (0, 1]"),
        ({"crop_ratio": "1"}, "TypeError"),
        ({"std": [0, 1, 1]}, "std three above 0"),
        ({"mean": [1, 2]}, "mean must be three numbers"),
        ({"class_names": []}, "class_names is empty"),
        ({"class_names": None}, "TypeError"),
        ("[" * 20_000, "RecursionError"),
        ("[1]", "TypeError"),
    ],
)
def test_what_training_never_writes_is_one_line(made_run: Any, change: Any, said: str) -> None:
    run = made_run("one")
    path = run / MODEL_FILE
    path.write_text(change if isinstance(change, str) else json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match="is damaged") as refused:
        load_trained(run)
    assert said in str(refused.value)
    assert "\n" not in str(refused.value)
