"""Selective backpropagation: its draw against exact probabilities, a run against a loop of plain functions."""

from __future__ import annotations

import sys
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from composer.core import Callback, State
from torch import Tensor, nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).parent))
from composition import GLOBAL_BATCH_SIZE, make_trainer
from watched_steps import kind_of_run

from algos import MixUp, SelectiveBackprop, draw_loss_ranks, resize_images, select_samples
from algos.framework.randomness import generator_at
from algos.selective_backprop import count_kept
from models.classifier import ImageClassifier


def draws(num_samples: int, keep: float, number: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.stack([draw_loss_ranks(num_samples, keep=keep, generator=generator) for _ in range(number)])


@pytest.mark.parametrize("keep", [0.25, 0.5, 0.75])
def test_ranks_are_drawn_as_often_as_their_weights_say(keep: float) -> None:
    num_samples, number = 5, 4000
    count = count_kept(num_samples, keep)
    weights = ((np.arange(num_samples) + 0.5) / num_samples) ** (1 / keep - 1)
    expected = np.zeros(num_samples)
    for order in permutations(range(num_samples), count):  # one after the other, without replacement
        probability, left = 1.0, weights.sum()
        for rank in order:
            probability *= weights[rank] / left
            left -= weights[rank]
        expected[list(order)] += probability
    found = torch.bincount(draws(num_samples, keep, number).flatten(), minlength=num_samples) / number
    assert expected.sum() == pytest.approx(count)
    np.testing.assert_allclose(found, expected, atol=4 * 0.5 / number**0.5)


def test_a_draw_rises_and_has_no_rank_twice() -> None:
    for ranks in draws(8, 0.5, 20):
        assert ranks.tolist() == sorted(set(ranks.tolist()))
        assert len(ranks) == 4
    assert draw_loss_ranks(6, keep=1, generator=torch.Generator()).tolist() == list(range(6))
    assert (count_kept(100, 0.29), count_kept(3, 0.1), count_kept(5, 0.5)) == (29, 1, 2)


def test_samples_are_found_by_the_rank_of_their_loss() -> None:
    losses = torch.tensor([0.3, 2.0, float("nan"), 0.3, 0.1])
    for ranks, places in (([0], [4]), ([1, 2], [0, 3]), ([3], [1]), ([4, 0], [2, 4])):
        assert select_samples(losses, ranks=torch.tensor(ranks)).tolist() == places


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: select_samples(torch.rand(2, 3), ranks=torch.tensor([0])), "one for each sample"),
        (lambda: select_samples(torch.rand(2), ranks=torch.tensor([0, 1, 2])), "draw them with draw_loss_ranks"),
        (lambda: select_samples(torch.rand(2), ranks=torch.rand(1)), "type torch.float32 for 2 losses"),
        (lambda: draw_loss_ranks(0, keep=0.5, generator=torch.Generator()), "num_samples 0 must be at least 1"),
        (lambda: draw_loss_ranks(2, keep=0.0, generator=torch.Generator()), r"keep 0.0 must lie in \(0, 1\]"),
        (lambda: SelectiveBackprop(keep=1.5), "keep 1.5 must lie"),
        (lambda: SelectiveBackprop(start=0.9, end=0.5), "start 0.9 and end 0.5 are shares of the run"),
        (lambda: SelectiveBackprop(end=1.1), "end 1.1"),
        (lambda: SelectiveBackprop(interval=0), "interval 0 must be at least 1 step"),
        (lambda: SelectiveBackprop(scale=0), r"scale 0 must lie in \(0, 1\]"),
    ],
)
def test_what_is_out_of_range_is_refused(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("settings", [{}, {"start": 0.0, "end": 1.0, "interval": 1}, {"start": 0.3, "interval": 3}])
@pytest.mark.parametrize("steps", [1, 7])
def test_the_steps_of_an_epoch_are_those_at_which_it_acts(settings: dict[str, Any], steps: int) -> None:
    algorithm = SelectiveBackprop.for_planning(**settings)
    for epoch in range(10):
        shares = [(epoch + step / steps) / 10 for step in range(steps)]
        expected = [
            step
            for step, share in enumerate(shares)
            if algorithm.start <= share < algorithm.end and (epoch * steps + step) % algorithm.interval == 0
        ]
        assert (
            list(algorithm.selecting_steps(epoch, total_epochs=10, steps=steps, first_step=epoch * steps)) == expected
        )
    assert not SelectiveBackprop.for_planning(start=0, keep=1).selecting_steps(0, total_epochs=1, steps=4, first_step=0)


class Record(Callback):
    """The batches as the loader gave them and as they are trained, and torch's generator at the start."""

    def __init__(self) -> None:
        self.given: list[Any] = []
        self.trained: list[Any] = []
        self.random_state = torch.empty(0)

    def fit_start(self, state: State, logger: Any) -> None:
        self.random_state = torch.get_rng_state()

    def after_dataloader(self, state: State, logger: Any) -> None:
        self.given.append(state.batch)

    def before_train_batch(self, state: State, logger: Any) -> None:
        self.trained.append(state.batch)


def batch_norm_and_dropout() -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.SiLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Dropout(0.3)]
    return nn.Sequential(*layers, nn.Linear(16, 4)).double()


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("composition.network", lambda *_, **__: batch_norm_and_dropout())


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("scale", [1.0, 0.75])
def test_a_run_is_a_loop_of_the_plain_functions(scale: float) -> None:
    """Weights, batch norm's statistics and dropout's draws: nothing is left of the pass that finds the losses."""
    record = Record()
    settings = {"start": 0.2, "end": 0.8, "keep": 0.5, "interval": 2, "scale": scale}
    trainer = make_trainer([SelectiveBackprop(**settings)], callbacks=[record])
    trainer.fit()

    model = batch_norm_and_dropout()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-3)
    torch.set_rng_state(record.random_state)
    for step, (images, labels) in enumerate(record.given):
        if 0.2 <= step / 12 < 0.8 and step % 2 == 0:
            model.eval()
            with torch.no_grad():
                seen = resize_images(images, image_size=12) if scale < 1 else images
                losses = F.cross_entropy(model(seen), labels, reduction="none")
            ranks = draw_loss_ranks(
                8, keep=0.5, generator=generator_at(0, rank=0, step=step, stream="selective_backprop")
            )
            kept = np.sort(np.argsort(losses.numpy())[ranks.numpy()])
            images, labels = images[kept], labels[kept]
        model.train()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert [len(batch[1]) for batch in record.trained] == [8, 8, 8, 8, 4, 8, 4, 8, 4, 8, 8, 8]
    found = trainer.state.model.state_dict()
    for name, value in model.state_dict().items():
        torch.testing.assert_close(found[f"module.{name}"], value, rtol=0, atol=1e-13)
    trainer.close()


@pytest.mark.usefixtures("small")
def test_microbatches_do_not_change_what_is_kept() -> None:
    kept = []
    for size in (8, 3):
        record = Record()
        algorithms = [MixUp(), SelectiveBackprop(start=0, interval=1, end=1, keep=0.75)]
        trainer = make_trainer(algorithms, callbacks=[record], device_train_microbatch_size=size)
        # With batch norm and dropout microbatches train otherwise; the first step's losses are those of one network.
        trainer.fit(duration="1ba")
        kept.append(record.trained[0])
        trainer.close()
    assert torch.equal(kept[0][0], kept[1][0])
    assert torch.equal(kept[0][1], kept[1][1])
    assert kept[0][1].shape == (6, 4)  # mixed targets


@pytest.mark.usefixtures("small")
def test_a_run_counts_the_images_that_it_trains() -> None:
    algorithms = [SelectiveBackprop(start=0, end=0.5, interval=1)]
    trainer = make_trainer(algorithms, kind=kind_of_run)
    trainer.fit()
    assert trainer.state.timestamp.sample.value == 6 * GLOBAL_BATCH_SIZE // 2 + 6 * GLOBAL_BATCH_SIZE
    trainer.close()


def test_a_loss_without_reduction_is_refused() -> None:
    trainer = make_trainer([SelectiveBackprop()])
    trainer.state.model.loss = lambda outputs, batch: F.cross_entropy(outputs, batch[1])
    with pytest.raises(ValueError, match=r"ImageClassifier.loss takes no reduction='none'; give it that argument"):
        trainer.fit()
    trainer.close()


def test_losses_of_each_class_are_added_up() -> None:
    classifier = ImageClassifier(batch_norm_and_dropout(), num_classes=4, loss="binary_cross_entropy").eval()
    images, targets = torch.randn(6, 3, 8, 8, dtype=torch.float64), torch.eye(4).double()[[0, 1, 2, 3, 0, 1]]
    algorithm, state = SelectiveBackprop(), _StateOf(classifier)
    mine = algorithm._losses(images, targets, state)  # pyright: ignore[reportArgumentType]
    classifier.loss = lambda outputs, batch, reduction: F.binary_cross_entropy_with_logits(  # [N, K], as Composer's
        outputs, batch[1], reduction=reduction
    )
    torch.testing.assert_close(algorithm._losses(images, targets, state), mine)  # pyright: ignore[reportArgumentType]


class _StateOf:
    def __init__(self, model: nn.Module) -> None:
        from composer.core import Precision

        self.model, self.precision, self.precision_config = model, Precision.FP32, None
