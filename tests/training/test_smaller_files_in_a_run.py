"""A run whose stages read files of different sizes: which they read, and that resumption is exact."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from resumed_runs import assert_same_training, train_until

from data.beton.tiers import Tiers
from training import session

SYNTHETIC = (
    "data.source={name: synthetic, num_samples: 240, image_size: 32}",
    "data.train.sizes=[12,32]",
    "data.train.batches_ahead=3",
)


@pytest.mark.timeout(180)
def test_stages_read_the_smallest_file_that_serves_them_and_resume_exactly(
    short_recipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[tuple[int, bool, int]] = []
    serving = Tiers.serving

    def recording(self: Tiers, image_size: int, crops: Any, *, augment: bool) -> Any:
        file = serving(self, image_size, crops, augment=augment)
        if self.all != [self.largest]:  # the training data
            read.append((image_size, augment, int(file.heights.max())))
        return file

    monkeypatch.setattr(Tiers, "serving", recording)
    said: list[str] = []
    more = [*SYNTHETIC, "algorithms.sam=null", "algorithms.mixup=null"]
    session.train(short_recipe("run_name=whole", *more), say=said.append)
    # Three stages, and FixRes's epoch with evaluation's crop; 12 px serve training at up to 8 px.
    assert [image_size for image_size, _, _ in read] == [8, 12, 12, 16]
    assert [side for _, _, side in read] == [12, 32, 32, 32]
    assert any(line.endswith(".12.beton serves training at up to 8 px") for line in said)
    assert "3 batches ahead take" in "".join(said)

    train_until(3, short_recipe("run_name=broken", "checkpoints.every_steps=2", *more))
    again = ["checkpoints.every_steps=2", "autoresume=true", "data.train.batches_ahead=1"]
    session.train(short_recipe("run_name=broken", *more, *again), say=said.append)
    assert_same_training(tmp_path / "results" / "whole", tmp_path / "results" / "broken")
