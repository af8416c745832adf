"""Image files that are damaged, bombs or none: pixels or a reason, the same in every place that reads one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest

pytestmark = pytest.mark.timeout(1000)


@pytest.mark.examples(60, 4000)
def test_an_image_is_read_everywhere_or_nowhere(examples: int, fuzzed: Callable[..., Counter[str]]) -> None:
    outcomes = fuzzed("images.py", examples, timeout=900)
    assert set(outcomes) <= {"pixels", "a reason why not", "converted", "left out of the conversion"}
    assert outcomes["pixels"] == outcomes["converted"] > 0
    assert outcomes["a reason why not"] == outcomes["left out of the conversion"] > examples / 3
