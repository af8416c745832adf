"""Random draws as a function of the run's position."""

import itertools

import pytest
import torch

from algos.framework.randomness import generator_at


def draw(**where):
    return torch.rand(4, generator=generator_at(**where)).tolist()


def test_the_same_place_draws_the_same():
    where = {"seed": 17, "rank": 1, "step": 5, "stream": "mixup"}
    torch.manual_seed(0)
    first = draw(**where)
    state = torch.get_rng_state()
    torch.manual_seed(1)
    assert draw(**where) == first
    torch.manual_seed(0)
    draw(**where)
    assert torch.equal(torch.get_rng_state(), state)


def test_every_coordinate_matters():
    places = itertools.product((0, 1, 2**32, 2**40), (0, 1, 7), (0, 1, 2, 2**32 + 1), ("mixup", "other"))
    draws = [tuple(draw(seed=seed, rank=rank, step=step, stream=stream)) for seed, rank, step, stream in places]
    assert len(set(draws)) == len(draws) == 96


def test_successive_steps_are_uncorrelated():
    values = torch.tensor([draw(seed=0, rank=0, step=step, stream="mixup")[0] for step in range(2000)])
    assert abs(values.mean() - 0.5) < 0.02
    assert abs(torch.corrcoef(torch.stack([values[:-1], values[1:]]))[0, 1]) < 0.07


@pytest.mark.parametrize("name", ["seed", "rank", "step"])
def test_negative_places_are_refused(name):
    where = {"seed": 0, "rank": 0, "step": 0, "stream": "mixup"} | {name: -1}
    with pytest.raises(ValueError, match=f"{name} -1 is negative"):
        generator_at(**where)
