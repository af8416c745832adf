"""The learning rate against torch's schedulers, across changes of the batch size, and on resuming."""

import copy
import inspect
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from fake_loader import FakeLoader
from test_progressive_resizing import make_trainer, same, stages, train
from torch.optim import lr_scheduler

from algos.fixres import FixRes
from algos.learning_rate import LearningRate, warmup_decay
from algos.progressive_resizing import ProgressiveResizing

STEPS_PER_EPOCH, EPOCHS = 5, 8
STEPS = STEPS_PER_EPOCH * EPOCHS
MILESTONES = (2, 6, 7)


def torchs_rates(make):
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    scheduler, rates = make(optimizer), []
    for _ in range(STEPS):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


@pytest.mark.parametrize(
    ("settings", "make"),
    [
        ({"decay": "cosine"}, lambda o: lr_scheduler.CosineAnnealingLR(o, T_max=STEPS)),
        ({"final_factor": 0.1}, lambda o: lr_scheduler.CosineAnnealingLR(o, T_max=STEPS, eta_min=0.1)),
        ({"decay": "linear"}, lambda o: lr_scheduler.LinearLR(o, 1.0, 0.0, total_iters=STEPS)),
        ({"decay": "linear", "final_factor": 0.25}, lambda o: lr_scheduler.LinearLR(o, 1.0, 0.25, total_iters=STEPS)),
        ({"decay": "polynomial", "power": 3.0}, lambda o: lr_scheduler.PolynomialLR(o, total_iters=STEPS, power=3.0)),
        ({"decay": "constant"}, lambda o: lr_scheduler.ConstantLR(o, factor=1.0)),
        (
            {"decay": "step", "milestones_epochs": MILESTONES, "step_factor": 0.3},
            lambda o: lr_scheduler.MultiStepLR(o, [epoch * STEPS_PER_EPOCH for epoch in MILESTONES], gamma=0.3),
        ),
        (
            {"decay": "constant", "warmup_epochs": 2, "warmup_start_factor": 0.1},
            lambda o: lr_scheduler.LinearLR(o, 0.1, 1.0, total_iters=2 * STEPS_PER_EPOCH),
        ),
        (
            {"decay": "cosine", "warmup_epochs": 2, "warmup_start_factor": 0.1},
            lambda o: lr_scheduler.SequentialLR(
                o,
                [
                    lr_scheduler.LinearLR(o, 0.1, 1.0, total_iters=2 * STEPS_PER_EPOCH),
                    lr_scheduler.CosineAnnealingLR(o, T_max=6 * STEPS_PER_EPOCH),
                ],
                [2 * STEPS_PER_EPOCH],
            ),
        ),
    ],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore:The epoch parameter in")  # of SequentialLR's own call
def test_equals_torchs_schedulers_step_by_step(settings, make):
    ours = [warmup_decay(step / STEPS_PER_EPOCH, total_epochs=EPOCHS, **settings) for step in range(STEPS)]
    assert ours == pytest.approx(torchs_rates(make), rel=0, abs=1e-9)


def test_ends_and_joins():
    shape = dict(total_epochs=10, warmup_epochs=4, warmup_start_factor=0.2, final_factor=0.1)
    assert warmup_decay(0, **shape) == 0.2
    assert warmup_decay(2, **shape) == pytest.approx(0.6)
    assert warmup_decay(4, **shape) == 1.0
    assert warmup_decay(7, **shape) == pytest.approx(0.1 + 0.9 / 2)
    assert warmup_decay(10, **shape) == pytest.approx(0.1)
    assert warmup_decay(12, **shape) == pytest.approx(0.1)  # never rises again
    assert warmup_decay(4, total_epochs=4, warmup_epochs=4) == 1.0  # all warmup, nothing left to decay
    assert warmup_decay(3.999, total_epochs=4, warmup_epochs=4) == pytest.approx(1, abs=1e-3)


def test_milestones_hit_when_they_are_reached():
    shape = dict(total_epochs=9, decay="step", milestones_epochs=(6, 2.5), step_factor=0.1)
    values = [warmup_decay(epoch, **shape) for epoch in (0, 2.49, 2.5, 5.99, 6, 8.9)]
    assert values == pytest.approx([1, 1, 0.1, 0.1, 0.01, 0.01])


def test_points_are_joined_by_straight_lines():
    points = ((1, 0.25), (2.5, 1.5), (4, 0.5), (7, 0))
    epochs = [step / 40 for step in range(40 * 9)]
    ours = [warmup_decay(epoch, total_epochs=9, decay="piecewise_linear", points=points) for epoch in epochs]
    assert ours == pytest.approx(np.interp(epochs, *zip(*points, strict=True)), rel=0, abs=1e-12)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"decay": "piecewise_linear"}, r"points is \[\] and decay is piecewise_linear; .* needs them"),
        ({"points": ((0, 1), (3, 0))}, r"points is \[\[0, 1\], \[3, 0\]\] and decay is cosine"),
        ({"decay": "piecewise_linear", "points": ((0, 1, 2),)}, "must be pairs of numbers"),
        ({"decay": "piecewise_linear", "points": ((2, 1), (2, 0))}, "rising order of their epochs"),
        ({"decay": "piecewise_linear", "points": ((-1, 1), (2, 0))}, "neither below 0"),
        ({"decay": "piecewise_linear", "points": ((0, 1), (2, -1))}, "neither below 0"),
        ({"decay": "piecewise_linear", "points": ((0, 1),), "warmup_epochs": 2}, "warmup_epochs is 2 beside points"),
        ({"decay": "cosin"}, "decay 'cosin' must be one of cosine, linear, step, polynomial, constant"),
        ({"warmup_epochs": -1}, "warmup_epochs -1 must be 0 or more"),
        ({"warmup_start_factor": 2}, r"warmup_start_factor 2 is a share .* must lie in \[0, 1\]"),
        ({"final_factor": -0.1}, r"final_factor -0.1 is a share"),
        ({"power": 0}, "power 0 must be above 0"),
        ({"step_factor": -1}, "step_factor -1 must be above 0"),
        ({"decay": "step"}, "decay: step needs milestones_epochs"),
        (
            {"milestones_epochs": (3,)},
            r"milestones_epochs is \[3\], which decay: step alone reads, and decay is cosine",
        ),
        ({"decay": "step", "milestones_epochs": (0, 3)}, r"milestones_epochs \[0, 3\] must all be above 0"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        LearningRate(**settings)


def test_its_page_runs_and_names_every_setting():
    page = (Path(__file__).parents[2] / "docs" / "algorithms" / "learning_rate.md").read_text()
    for block in re.findall(r"^```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL):
        exec(compile(block, "learning_rate.md", "exec"), {})
    (recipe,) = re.findall(r"^```yaml\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    LearningRate(**yaml.safe_load(recipe)["schedule"])
    for setting, parameter in inspect.signature(LearningRate).parameters.items():
        (row,) = re.findall(rf"^\| `{setting}` \| (\S+) \|", page, re.MULTILINE)
        assert row == (str(parameter.default) if parameter.default != () else "none")


# --- in the Trainer ---


def expected_rates(lengths, **shape):
    """Of a run whose epochs have `lengths` steps."""
    epochs = [epoch + step / length for epoch, length in enumerate(lengths) for step in range(length)]
    return [0.1 * warmup_decay(epoch, total_epochs=len(lengths), **shape) for epoch in epochs]


@pytest.mark.parametrize(("sizes", "lengths"), [((8, 8, 16, 16), (3, 3, 2, 2)), ((8, 8, 4, 4), (3, 3, 6, 6))])
def test_no_jump_and_no_early_end_when_the_batch_size_changes(sizes, lengths):
    """Counted in batches, a doubled batch ends a linear decay at 0 three steps early and a halved one makes it rise."""
    rows = stages(*((1, 8, size) for size in sizes))
    _, _, seen = train([LearningRate(decay="linear"), ProgressiveResizing(stages=rows)], epochs=4, lr=0.1)
    assert seen.rates == pytest.approx(expected_rates(lengths, decay="linear"), rel=1e-12)
    drops = [before - after for before, after in zip(seen.rates, seen.rates[1:], strict=False)]
    assert min(drops) > 0  # never rises, never stalls
    assert max(drops) < 0.1 / (4 * min(lengths)) + 1e-12  # nor falls by more than the longest step of the run
    assert seen.rates[-1] == pytest.approx(0.1 / (4 * lengths[-1]))  # the last step still trains


@pytest.mark.parametrize("size", [16, 4])
def test_milestones_do_not_move_with_the_batch_size(size):
    rows = stages((1, 8), (3, 8, size))
    schedule = LearningRate(decay="step", milestones_epochs=(2, 3))
    _, _, seen = train([schedule, ProgressiveResizing(stages=rows)], epochs=4, lr=0.1)
    length = -(-24 // size)
    assert seen.rates == pytest.approx([0.1] * (3 + length) + [0.01] * length + [0.001] * length)


class Halved:
    """Not even an algorithm of this package."""

    def __init__(self, factor):
        self.factor = factor

    def modify_learning_rate(self, learning_rate, epoch, total_epochs):
        return learning_rate * (self.factor if epoch >= 1 else 1.0)


def test_products_multiply():
    from composer.core import Algorithm

    class Theirs(Halved, Algorithm):
        def match(self, event, state):
            return False

        def apply(self, event, state, logger):
            pass

    rows = stages((1, 8), (2, 8, 16))
    resizing = ProgressiveResizing(stages=rows, learning_rate_scaling="linear")
    algorithms = [Theirs(0.5), LearningRate(decay="linear", warmup_epochs=1), resizing, Theirs(0.25)]
    _, _, seen = train(algorithms, lr=0.1)
    plain = expected_rates((3, 2, 2), decay="linear", warmup_epochs=1)
    assert seen.rates == pytest.approx(plain[:3] + [rate * 2 * 0.5 * 0.25 for rate in plain[3:]], rel=1e-12)


@pytest.mark.parametrize("order", [slice(None), slice(None, None, -1)])
def test_fixres_sets_its_own_rate_after_every_factor_however_listed(order):
    rows = stages((2, 8), (1, 8, 16))
    algorithms = [
        ProgressiveResizing(stages=rows, learning_rate_scaling="linear"),
        LearningRate(decay="constant"),
        FixRes(epochs=1, train="all", learning_rate=0.03),
    ][order]
    _, _, seen = train(algorithms, lr=0.1)
    assert seen.rates == pytest.approx([0.1] * 6 + [0.03, 0.03 * (1 + math.cos(math.pi / 2)) / 2])


def test_every_group_keeps_its_own_initial_rate():
    trainer = make_trainer([LearningRate(decay="linear")], FakeLoader())
    optimizer = trainer.state.optimizers[0]
    first, *others = optimizer.param_groups[0]["params"]
    optimizer.param_groups[0]["params"] = [first]
    optimizer.add_param_group({"params": others, "lr": 0.5})
    trainer.fit(duration="1ep")
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.05 / 3, 0.5 / 3])


def test_a_rate_that_is_a_tensor_is_set_in_place():
    trainer = make_trainer([LearningRate(decay="linear")], FakeLoader())
    group = trainer.state.optimizers[0].param_groups[0]
    group["lr"] = kept = torch.tensor(0.05)
    trainer.fit(duration="1ep")
    assert group["lr"] is kept
    assert kept.item() == pytest.approx(0.05 / 3)


@pytest.mark.parametrize("steps", [2, 3, 5])
def test_resumed_runs_are_the_whole_run(tmp_path, steps):
    algorithms = lambda: [LearningRate(warmup_epochs=1.5, final_factor=0.1)]  # noqa: E731
    keep = dict(save_folder=str(tmp_path), save_interval=f"{steps}ba", run_name="a", save_num_checkpoints_to_keep=-1)
    whole, _, expected = train(algorithms(), **keep)
    resumed, _, seen = train(algorithms(), load_path=str(next(tmp_path.glob(f"*-ba{steps}-rank0.pt"))))
    assert same(resumed, whole)
    assert seen.rates == expected.rates[steps:]


def test_a_length_in_batches_is_the_same_share_of_the_run():
    _, _, in_epochs = train([LearningRate(warmup_epochs=1)], epochs=3)
    _, _, in_batches = train([LearningRate(warmup_epochs=1)], epochs="9ba")
    _, _, cut_short = train([LearningRate(decay="linear")], epochs="7ba", lr=0.1)
    assert in_batches.rates == in_epochs.rates
    assert cut_short.rates == pytest.approx([0.1 * (1 - step / 7) for step in range(7)])


def test_what_cannot_be_done_is_said_before_the_first_step():
    from composer.optim import ConstantScheduler

    for algorithms, settings, message in (
        ([LearningRate(warmup_epochs=5)], {}, "warmup_epochs is 5, longer than the run of 3 epochs"),
        ([LearningRate()], {"epochs": "72sp"}, "the run's length is .*; give it in epochs or in batches"),
        ([LearningRate()], {"schedulers": ConstantScheduler()}, r"scheduler \(LambdaLR\) beside LearningRate"),
        ([LearningRate(), LearningRate()], {}, "LearningRate is among the Trainer's algorithms twice"),
    ):
        loader = FakeLoader()
        with pytest.raises(ValueError, match=message):
            train(copy.deepcopy(algorithms), loader, **settings)
        assert not loader.served
