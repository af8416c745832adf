"""Stochastic depth: the formula block by block, its rates, and that nothing else about a model changes."""

import copy
import pickle
import warnings

import pytest
import torch
from torch import nn
from torchvision.models import resnet18, resnet50
from torchvision.models.resnet import BasicBlock, Bottleneck
from torchvision.models.vision_transformer import EncoderBlock, VisionTransformer
from torchvision.ops import stochastic_depth

from algos.blurpool import apply_blurpool
from algos.framework.randomness import generator_at, microbatch_draws
from algos.sam import SAM
from algos.stochastic_depth import StochasticDepth, apply_stochastic_depth, draw_stochastic_depth
from models.resnet import resnet20, resnet_digits


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def basic_block():
    return BasicBlock(4, 4).double()


def bottleneck():
    return Bottleneck(16, 4).double()


def frozen_norms(block):
    """Training mode for the drawing, evaluation mode for batch norms' own statistics."""
    for module in block.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 0.0
    return block.train()


@pytest.mark.parametrize("make", [basic_block, bottleneck])
def test_each_sample_is_its_shortcut_or_its_scaled_branch(make):
    block = make()
    images = torch.randn(64, 4 if make is basic_block else 16, 6, 6, dtype=torch.float64)
    kept = frozen_norms(copy.deepcopy(block))
    end = "bn2" if make is basic_block else "bn3"
    seen = {}
    getattr(kept, end).register_forward_hook(lambda *call: seen.update(branch=call[2].clone()))
    kept(images)
    dropped = apply_stochastic_depth(frozen_norms(block), drop_rate=0.4, distribution="uniform")(images)
    shortcut, scaled = images.relu(), (images + seen["branch"] / 0.6).relu()
    is_shortcut = (dropped - shortcut).abs().amax(dim=(1, 2, 3)) == 0
    is_scaled = (dropped - scaled).abs().amax(dim=(1, 2, 3)) < 1e-12
    assert (is_shortcut ^ is_scaled).all()
    assert 10 < int(is_shortcut.sum()) < 42  # of 64 at 0.4: five standard deviations either way


def test_a_batch_is_dropped_as_one():
    block = apply_stochastic_depth(basic_block(), drop_rate=0.5, mode="batch", distribution="uniform").train()
    images = torch.randn(8, 4, 6, 6, dtype=torch.float64)
    shortcuts = [int(((block(images) - images.relu()).abs().amax(dim=(1, 2, 3)) == 0).sum()) for _ in range(60)]
    assert set(shortcuts) == {0, 8}


@pytest.mark.parametrize(("mode", "torchvisions"), [("sample", "row"), ("batch", "batch")])
def test_a_branch_equals_torchvisions_stochastic_depth(mode, torchvisions):
    end = apply_stochastic_depth(basic_block(), drop_rate=0.4, mode=mode, distribution="uniform").bn2.train()
    plain = nn.BatchNorm2d(4).double().train()
    values = torch.randn(16, 4, 6, 6, dtype=torch.float64)
    torch.manual_seed(1)
    expected = stochastic_depth(plain(values), 0.4, torchvisions)
    torch.manual_seed(1)
    assert torch.equal(end(values), expected)


def test_the_expectation_is_what_evaluation_computes():
    end = apply_stochastic_depth(basic_block(), drop_rate=0.3, distribution="uniform").bn2
    # Statistics that training mode finds too, so that both modes normalize alike: mean 0, variance 1 in each channel.
    values = torch.tensor([1.0, -1.0], dtype=torch.float64).repeat(4, 4, 2, 1)
    values = values[torch.zeros(4000, dtype=torch.int64)]
    evaluated, drawn = end.eval()(values), end.train()(values)
    torch.testing.assert_close(drawn.mean(dim=0), evaluated.mean(dim=0), rtol=0.05, atol=0)


@pytest.mark.parametrize(("distribution", "expected"), [("linear", [0.05, 0.1, 0.15, 0.2]), ("uniform", [0.2] * 4)])
def test_rates_grow_as_in_the_paper(distribution, expected):
    model = nn.Sequential(*(BasicBlock(4, 4) for _ in range(4)))
    apply_stochastic_depth(model, drop_rate=0.2, distribution=distribution)
    assert [block.bn2.drop_rate_here for block in model] == pytest.approx(expected)


def ends(model):
    return [module for module in model.modules() if hasattr(module, "drop_rate_here")]


@pytest.mark.parametrize(
    ("make", "count"),
    [(resnet18, 8), (resnet50, 16), (lambda: resnet20(num_classes=4), 9), (lambda: resnet_digits(num_classes=4), 3)],
)
def test_every_block_of_a_resnet_is_found_in_order(make, count):
    model = apply_stochastic_depth(make(), drop_rate=0.1)
    assert [end.drop_rate_here for end in ends(model)] == pytest.approx([0.1 * (i + 1) / count for i in range(count)])


def test_both_branches_of_a_vision_transformers_blocks():
    model = VisionTransformer(8, 4, 3, 2, 8, 16, num_classes=4)
    apply_stochastic_depth(model, drop_rate=0.3)
    assert [end.drop_rate_here for end in ends(model)] == pytest.approx([0.1, 0.1, 0.2, 0.2, 0.3, 0.3])
    block = EncoderBlock(2, 8, 16, 0.0, 0.0)
    apply_stochastic_depth(block, drop_rate=0.5, distribution="uniform").train()
    values = torch.randn(64, 5, 8)
    untouched = (block(values) - values).abs().amax(dim=(1, 2)) == 0
    assert 4 < int(untouched.sum()) < 30  # both branches dropped: a quarter of 64


def test_names_weights_and_evaluation_stay(tmp_path):
    plain = resnet_digits(num_classes=4)
    dropping = apply_stochastic_depth(copy.deepcopy(plain), drop_rate=0.5)
    assert list(plain.state_dict()) == list(dropping.state_dict())
    dropping.load_state_dict(plain.state_dict())
    images = torch.randn(4, 3, 16, 16)
    assert torch.equal(plain.eval()(images), dropping.eval()(images))
    zero = apply_stochastic_depth(copy.deepcopy(plain), drop_rate=0.0).train()
    assert torch.equal(plain.train()(images), zero(images))


def test_copies_and_pickles_drop_too():
    model = apply_stochastic_depth(resnet_digits(num_classes=4), drop_rate=0.5).train()
    images = torch.randn(4, 3, 16, 16)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.manual_seed(1)
        expected = model(images)
        torch.manual_seed(1)
        assert torch.equal(other(images), expected)
    algorithm = pickle.loads(pickle.dumps(StochasticDepth(drop_rate=0.2)))
    assert algorithm.settings.drop_rate == 0.2


@pytest.mark.parametrize("placement", ["before", "after"])
def test_blurpool_composes_in_either_order(placement):
    first, second = resnet18(num_classes=4), resnet18(num_classes=4)
    second.load_state_dict(first.state_dict())
    apply_stochastic_depth(apply_blurpool(first, placement=placement), drop_rate=0.5)
    apply_blurpool(apply_stochastic_depth(second, drop_rate=0.5), placement=placement)
    images = torch.randn(2, 3, 32, 32)
    outputs = []
    for model in (first, second):
        torch.manual_seed(3)
        outputs.append(model.train()(images))
    assert torch.equal(*outputs)
    assert len(ends(first)) == 8


def test_twice_is_once_and_other_settings_are_refused():
    model = resnet_digits(num_classes=4)
    apply_stochastic_depth(model, drop_rate=0.2)
    classes = [type(module) for module in model.modules()]
    apply_stochastic_depth(model, drop_rate=0.2)
    assert [type(module) for module in model.modules()] == classes
    with pytest.raises(ValueError, match=r"already with drop_rate=0.2, .* asked for drop_rate=0.3"):
        apply_stochastic_depth(model, drop_rate=0.3)


def test_a_model_without_blocks_is_a_warning():
    with pytest.warns(UserWarning, match="changed nothing in Linear: .*BasicBlock, Bottleneck, EncoderBlock"):
        apply_stochastic_depth(nn.Linear(2, 2))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        apply_stochastic_depth(basic_block())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"drop_rate": 1.0}, r"drop_rate 1.0 must lie in \[0, 1\)"),
        ({"drop_rate": -0.1}, r"drop_rate -0.1 must lie in \[0, 1\)"),
        ({"mode": "row"}, "mode 'row' must be 'sample' or 'batch'"),
        ({"distribution": "cosine"}, "distribution 'cosine' must be 'linear'"),
    ],
)
def test_mistakes_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        StochasticDepth(**settings)


def test_compiles_as_one_graph():
    model = apply_stochastic_depth(basic_block(), drop_rate=0.5).train()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    images = torch.randn(4, 4, 6, 6, dtype=torch.float64)
    torch.manual_seed(5)
    expected = model(images)
    torch.manual_seed(5)
    assert torch.equal(compiled(images), expected)


# --- in the Trainer ---


def train(algorithms, *, epochs=2, network=None, **settings):
    from composer import Trainer
    from composer.models import ComposerClassifier
    from torch.utils.data import DataLoader, TensorDataset

    torch.manual_seed(0)
    network = resnet_digits(num_classes=4).double() if network is None else network
    model = ComposerClassifier(network, num_classes=4)
    samples = TensorDataset(torch.randn(16, 3, 8, 8, dtype=torch.float64), torch.arange(16) % 4)
    trainer = Trainer(
        model=model, train_dataloader=DataLoader(samples, batch_size=8), max_duration=f"{epochs}ep", device="cpu",
        optimizers=torch.optim.SGD(model.parameters(), lr=0.1), algorithms=algorithms, seed=11,
        progress_bar=False, log_to_console=False, **settings,
    )  # fmt: skip
    trainer.fit()
    trainer.close()
    return torch.cat([parameter.detach().flatten() for parameter in network.parameters()])


def test_a_resumed_run_drops_what_it_would_have_dropped(tmp_path):
    algorithms = lambda: [StochasticDepth(drop_rate=0.5)]  # noqa: E731
    whole = train(algorithms())
    train(algorithms(), epochs=1, save_folder=str(tmp_path), run_name="a")
    assert torch.equal(train(algorithms(), load_path=f"{tmp_path}/ep1-ba2-rank0.pt"), whole)
    assert not torch.equal(train([]), whole)


def test_the_draw_is_a_function_of_the_seed_the_rank_and_the_step():
    def draw(rank=0, step=0, mode="sample"):
        generator = generator_at(7, rank=rank, step=step, stream="stochastic_depth")
        return draw_stochastic_depth([0.1, 0.5], 4000, generator=generator, mode=mode)

    assert torch.equal(draw(), draw())
    assert not torch.equal(draw(), draw(rank=1))
    assert not torch.equal(draw(), draw(step=1))
    assert draw().double().mean(dim=1).tolist() == pytest.approx([0.9, 0.5], abs=0.04)  # five standard deviations
    alike = torch.stack([draw(step=step, mode="batch") for step in range(1000)])
    assert torch.equal(alike, alike[..., :1].expand_as(alike))
    assert alike[..., 0].double().mean(dim=0).tolist() == pytest.approx([0.9, 0.5], abs=0.08)


@pytest.mark.parametrize("mode", ["sample", "batch"])
@pytest.mark.parametrize("with_sam", [False, True], ids=["alone", "with SAM"])
def test_microbatches_drop_what_the_whole_batch_does(mode, with_sam, batch_free_norms):
    algorithms = lambda: [StochasticDepth(drop_rate=0.5, mode=mode), *([SAM(rho=0.05)] if with_sam else [])]  # noqa: E731
    whole = train(algorithms())
    for size in (1, 3, 4):
        torch.testing.assert_close(train(algorithms(), device_train_microbatch_size=size), whole, rtol=0, atol=1e-12)


@pytest.fixture
def batch_free_norms(monkeypatch):
    monkeypatch.setattr("models.resnet.nn.BatchNorm2d", lambda channels: nn.GroupNorm(1, channels))


def test_outside_of_a_step_layers_draw_for_themselves():
    network = resnet_digits(num_classes=4).double()
    train([StochasticDepth(drop_rate=0.5)], epochs=1, network=network)
    assert [draws.of_rows for draws in microbatch_draws(network)] == [None]
    assert network.train()(torch.randn(3, 3, 8, 8, dtype=torch.float64)).shape == (3, 4)


def test_sams_second_pass_drops_the_same_branches():
    network, passes = resnet_digits(num_classes=4).double(), []
    for end in ends(apply_stochastic_depth(network, drop_rate=0.5)):
        end.register_forward_hook(lambda *call: passes.append((call[2] == 0).flatten(1).all(dim=1).tolist()))
    train([StochasticDepth(drop_rate=0.5), SAM(rho=0.05)], epochs=1, network=network, device_train_microbatch_size=4)
    calls = [passes[index : index + 3] for index in range(0, len(passes), 3)]  # three blocks a pass
    assert len(calls) == 8  # two steps of two passes of two microbatches
    assert calls[0:2] == calls[2:4]
    assert calls[4:6] == calls[6:8]
    assert len({str(call) for call in calls}) == 4
