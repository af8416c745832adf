"""The arithmetic of a prediction, with numbers that can be checked by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from training.probing.machines import Machine, bill, machines_with, read_prices
from training.probing.phases import Phase, chosen_phases
from training.probing.predict import bottleneck, due_count, predict, span_of
from training.probing.text import duration
from training.recipe import RecipeError

PHASE = Phase(
    first_epoch=0, epochs=3, steps=10, images=640, image_size=12, global_batch_size=64, macs=1e6, window_steps=1,
    notes=(),
)  # fmt: skip


def test_a_run_is_its_steps_and_what_lies_between_them() -> None:
    made = predict(
        [PHASE], {0: [2.0, 2.0]}, {0: [5.0]},
        evaluations=[7.0], checkpoints=[1.0, 3.0], evaluation_count=2, checkpoint_count=3,
    )  # fmt: skip
    assert made.total.mean == 3 * (10 * 2 + 5) + 2 * 7 + 3 * 2
    assert made.total.low == 3 * (10 * 2 + 5) + 2 * 7 + 3 * 1.5
    assert made.total.high == 3 * (10 * 2 + 5) + 2 * 7 + 3 * 2.5
    assert made.phases[0].images_per_second == 640 / 20


def test_a_phase_that_was_not_measured_lies_between_its_neighbors_by_cost() -> None:
    phases = [replace(PHASE, macs=macs) for macs in (1e6, 3e6, 2e6, 9e6)]
    made = predict(
        phases, {0: [1.0], 1: [5.0]}, {0: [0.0], 1: [0.4]},
        evaluations=[], checkpoints=[], evaluation_count=0, checkpoint_count=0,
    )  # fmt: skip
    assert [one.step.mean for one in made.phases] == [1, 5, 3, 5]
    assert made.phases[2].between.mean == pytest.approx(0.2)
    assert [one.measured for one in made.phases] == [True, True, False, False]


def test_communication_is_counted_and_the_low_end_takes_it_as_hidden() -> None:
    made = predict(
        [PHASE], {0: [2.0]}, {0: [0.0]},
        evaluations=[], checkpoints=[], evaluation_count=0, checkpoint_count=0, communication_seconds=0.5,
    )  # fmt: skip
    assert (made.total.mean, made.total.low, made.total.high) == (75, 60, 75)


def test_the_range_holds_the_mean_even_of_a_skewed_measurement() -> None:
    span = span_of([1, 1, 1, 1, 1, 100])
    assert span.low == 1
    assert span.high >= span.mean == 17.5


@pytest.mark.parametrize(
    ("step", "cached", "loader", "busy", "expected"),
    [
        (2.0, 1.0, 1.9, None, "loader"),
        (1.05, 1.0, 0.9, None, "device"),
        (2.0, 1.0, 0.1, None, "device"),  # slower with the loader, but not for want of batches
        (1.0, 1.0, 0.1, 0.3, "host"),
        (1.0, 1.0, 0.1, 0.9, "device"),
    ],
)
def test_bottleneck(step: float, cached: float, loader: float, busy: float | None, expected: str) -> None:
    assert bottleneck(step=step, cached=cached, loader=loader, busy_share=busy) == expected


def test_chosen_phases_include_the_cheapest_and_the_dearest() -> None:
    phases = [replace(PHASE, macs=macs) for macs in (5, 1, 9, 3, 7)]
    assert chosen_phases(phases, most=9) == [0, 1, 2, 3, 4]
    assert chosen_phases(phases, most=3) == [0, 1, 2]


def test_due_at_intervals_and_at_the_end() -> None:
    assert [due_count(epochs, every=4) for epochs in (3, 4, 5, 8)] == [1, 1, 2, 2]


def test_durations() -> None:
    seconds = (4.23, 59.96, 200, 3599.9, 7500, 90_000)
    assert [duration(one) for one in seconds] == ["4.2 s", "60.0 s", "3 min 20 s", "60 min 0 s", "2 h 5 min", "1 d 1 h"]


def test_bill() -> None:
    machine = Machine(name="m", device="X", devices=8, usd_per_hour=16.0, watts_per_device=500)
    found = bill(machine, seconds=7200, ranks=4)
    assert (found.device_hours, found.kwh, found.usd) == (8, 4, 16)
    assert bill(None, seconds=3600, ranks=1).usd is None


def test_shipped_prices_are_dated_and_found_by_the_device() -> None:
    prices = read_prices()
    assert prices.dated.startswith("20")
    assert [one.devices for one in machines_with(prices, "NVIDIA A100-SXM4-40GB")] == [8]
    assert [one.devices for one in machines_with(prices, "NVIDIA A10G")] == [4]
    assert machines_with(prices, "cpu") == []


def test_a_mistake_in_the_prices_names_the_file(tmp_path) -> None:
    path = tmp_path / "prices.yaml"
    path.write_text("dated: 2026-01-01\nmachines: [{name: a, device: T4, devices: 1, usd_per_huor: 3}]\n")
    with pytest.raises(RecipeError, match=rf"^{path}: machines\[0\].usd_per_huor: unknown key .*usd_per_hour"):
        read_prices(path)
