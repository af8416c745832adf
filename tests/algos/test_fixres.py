"""FixRes: what is frozen and what is trained, the phase in the Trainer, and on two ranks."""

import copy
import math
import pickle
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from fake_loader import FakeLoader, FixedLoader
from ranks import needs_fsdp, run_ranks
from torch import nn
from torch.nn import functional as F

from algos.cutmix import CutMix
from algos.fixres import FixRes, freeze_for_fixres, phase_learning_rate
from algos.learning_rate import LearningRate
from algos.mixup import MixUp
from algos.progressive_resizing import ProgressiveResizing, Stage
from algos.randaugment import RandAugment
from algos.sam import SAM


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def network():
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.Tanh(), nn.Conv2d(6, 8, 3, padding=1), nn.BatchNorm2d(8),
        nn.Tanh(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4),
    ).double()  # fmt: skip


LAST_NORM, CLASSIFIER = ("4.weight", "4.bias"), ("8.weight", "8.bias")
KEPT = {"classifier_and_norm": LAST_NORM + CLASSIFIER, "classifier": CLASSIFIER}
MOVING = {"classifier_and_norm": {"4.running_mean", "4.running_var", "4.num_batches_tracked"}, "classifier": set()}


def state(model):
    return {name.removeprefix("module."): value.clone() for name, value in model.state_dict().items()}


def changed(one, other):
    return {name for name in one if not torch.equal(one[name], other[name])}


def same(one, other):
    return one.keys() == other.keys() and not changed(one, other)


# --- the functional form ---


@pytest.mark.parametrize("train", ["classifier_and_norm", "classifier"])
def test_only_the_last_layers_learn_in_a_plain_loop(train):
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)
    images, labels = torch.randn(8, 3, 8, 8).double(), torch.arange(8) % 4

    def step():
        optimizer.zero_grad(set_to_none=False)
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()

    step()  # leaves momentum, and gradients that zero_grad(set_to_none=False) would keep as zeros
    before = state(model)
    names = freeze_for_fixres(model, train=train)
    assert tuple(names) == KEPT[train]
    for _ in range(3):
        model.train()
        step()
        model.eval()
        model.train()
    assert changed(before, state(model)) == set(KEPT[train]) | MOVING[train]


def test_frozen_norms_use_their_running_statistics_and_the_last_one_the_batchs():
    model, images = network(), torch.randn(8, 3, 8, 8).double()
    freeze_for_fixres(model)
    model.train()
    features = model[:4](images)
    running = model[1]
    normalized = F.batch_norm(
        model[0](images), running.running_mean, running.running_var, running.weight, running.bias, eps=running.eps
    )
    torch.testing.assert_close(features, model[3](torch.tanh(normalized)), rtol=0, atol=1e-12)
    mean = model[4](features).mean(dim=(0, 2, 3))
    torch.testing.assert_close(mean, torch.zeros_like(mean), rtol=0, atol=1e-12)


def test_all_freezes_nothing():
    model = network()
    model[0].requires_grad_(False)  # the user's own
    names = freeze_for_fixres(model, train="all")
    assert names == [name for name, _ in model.named_parameters() if not name.startswith("0.")]
    model.train()
    assert all(module.training for module in model.modules())


def test_calling_it_again_changes_nothing():
    model = network()
    first = freeze_for_fixres(model)
    hooks = [len(module._forward_pre_hooks) for module in model.modules()]
    assert freeze_for_fixres(model) == first
    assert [len(module._forward_pre_hooks) for module in model.modules()] == hooks
    assert sum(hooks) == 1


def test_a_frozen_model_copies_and_pickles():
    model = network()
    freeze_for_fixres(model)
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        again.train()
        again(torch.randn(2, 3, 8, 8).double())
        assert again[1].num_batches_tracked == 0
        assert again[4].num_batches_tracked == 1


def test_the_layers_of_torchvisions_models_are_the_papers():
    import torchvision

    assert freeze_for_fixres(torchvision.models.resnet50(weights=None)) == [
        "layer4.2.bn3.weight", "layer4.2.bn3.bias", "fc.weight", "fc.bias",
    ]  # fmt: skip
    names = freeze_for_fixres(torchvision.models.squeezenet1_1(weights=None), train="classifier")
    assert names == ["classifier.1.weight", "classifier.1.bias"]  # a convolution


def test_a_norm_behind_the_classifier_is_not_the_last_one_before_it():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 4), nn.BatchNorm1d(4))
    assert freeze_for_fixres(model) == ["1.weight", "1.bias", "3.weight", "3.bias"]


@pytest.mark.parametrize(
    ("model", "train", "message"),
    [
        (
            nn.Sequential(nn.ReLU()),
            "classifier",
            "no linear layer or convolution to train in Sequential; use train: all",
        ),
        (
            nn.Linear(2, 2),
            "classifier_and_norm",
            "Linear has no batch norm before its classifier; use train: classifier",
        ),
        (nn.Linear(2, 2), "last", "train 'last' must be 'classifier_and_norm', 'classifier' or 'all'"),
    ],
)
def test_models_without_such_layers_are_refused(model, train, message):
    with pytest.raises(ValueError, match=message):
        freeze_for_fixres(model, train=train)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"epochs": 0}, "epochs 0 must be at least 1"),
        ({"image_size": 0}, "image_size 0 must be at least 1 px"),
        ({"train": "last"}, "train 'last' must be"),
        ({"learning_rate": -1}, "learning_rate -1 must be 0 or more"),
        ({"learning_rate": math.inf}, "learning_rate inf must be 0 or more and finite"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        FixRes(**settings)


def test_the_phases_rate_is_a_cosine_of_its_own():
    rates = [phase_learning_rate(e, start_epoch=6, total_epochs=10, learning_rate=0.3) for e in (6, 7, 8, 9, 10)]
    expected = [0.3, 0.15 * (1 + math.sqrt(0.5)), 0.15, 0.15 * (1 - math.sqrt(0.5)), 0.0]
    assert rates == pytest.approx(expected, abs=1e-12)


# --- in the Trainer ---


def make_trainer(algorithms, loader, *, epochs=3, callbacks=(), make=network, **settings):
    from composer import Trainer
    from composer.models import ComposerClassifier

    torch.manual_seed(0)
    model = make()
    return Trainer(
        model=ComposerClassifier(model, num_classes=4), train_dataloader=loader, max_duration=f"{epochs}ep",
        device="cpu", optimizers=torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01),
        algorithms=algorithms, seed=3, callbacks=list(callbacks), progress_bar=False, log_to_console=False, **settings,
    )  # fmt: skip


def bare(model):
    return state(model.module.module if hasattr(model.module, "module") else model.module)


def watch():
    from composer.core import Callback

    class Watch(Callback):
        """States after every step, and the rate of every step."""

        def __init__(self):
            self.states, self.rates = [], []

        def batch_start(self, state, logger):
            self.rates.append(state.optimizers[0].param_groups[0]["lr"])

        def batch_end(self, state, logger):
            self.states.append(bare(state.model))

    return Watch()


def train(algorithms, loader=None, **settings):
    loader, seen = loader or FakeLoader(), watch()
    trainer = make_trainer(algorithms, loader, callbacks=[seen], **settings)
    trainer.fit()
    trainer.close()
    return seen, loader


@pytest.mark.parametrize("layers", ["classifier_and_norm", "classifier", "all"])
@pytest.mark.parametrize("with_sam", [False, True])
def test_the_last_phase_trains_the_right_layers_on_test_crops(layers, with_sam):
    algorithms = [FixRes(epochs=2, image_size=12, train=layers), *([SAM(rho=0.1)] if with_sam else [])]
    seen, loader = train(algorithms)
    assert [one.test_crop for one in loader.served] == [False] * 3 + [True] * 6
    assert [one.image_size for one in loader.served] == [8] * 3 + [12] * 6
    before, after = seen.states[2], seen.states[-1]
    expected = set(before) if layers == "all" else set(KEPT[layers]) | MOVING[layers]
    assert changed(before, after) == expected
    assert changed(seen.states[0], before) == set(before)  # everything trained until then
    tracked = after["4.num_batches_tracked"]
    assert tracked == (3 if layers == "classifier" else 9)


def test_an_evaluation_within_an_epoch_leaves_the_frozen_ones_frozen():
    from composer.core import DataSpec, Evaluator

    evaluation = Evaluator(label="eval", dataloader=DataSpec(FakeLoader()), metric_names=["MulticlassAccuracy"])
    seen, _ = train([FixRes(epochs=2)], eval_dataloader=evaluation, eval_interval="2ba")
    assert changed(seen.states[2], seen.states[-1]) == set(KEPT["classifier_and_norm"]) | MOVING["classifier_and_norm"]


def test_the_phase_has_a_rate_of_its_own():
    seen, _ = train([FixRes(epochs=2, learning_rate=0.03), LearningRate(decay="linear", warmup_epochs=1)])
    expected = [0.03 * (1 + math.cos(math.pi * step / 6)) / 2 for step in range(6)]
    assert seen.rates == pytest.approx([0.0, 0.1 / 3, 0.2 / 3, *expected])
    seen, _ = train([FixRes(epochs=2), LearningRate(decay="linear")])
    assert seen.rates == pytest.approx([0.1 * (1 - step / 9) for step in range(9)])


@pytest.mark.parametrize("plain_images", [True, False])
def test_the_phase_sees_plain_images(plain_images, monkeypatch, tmp_path):
    def trained_on_probabilities(**settings):
        seen = []
        monkeypatch.setattr(
            "composer.models.ComposerClassifier.loss",
            lambda self, outputs, batch: seen.append(batch[1].ndim == 2) or F.cross_entropy(outputs, batch[1]),
        )
        augmenting = [MixUp(num_classes=4), CutMix(num_classes=4), RandAugment(mean=(128.0,) * 3, std=(30.0,) * 3)]
        train([*augmenting, FixRes(epochs=2, plain_images=plain_images)], **settings)
        return seen

    whole = trained_on_probabilities(save_folder=str(tmp_path), save_interval="7ba", run_name="a")
    assert whole == [True] * 3 + [not plain_images] * 6
    resumed = trained_on_probabilities(load_path=str(next(tmp_path.glob("*-ba7-rank0.pt"))))
    assert resumed == [not plain_images] * 2


@pytest.mark.parametrize("order", [slice(None), slice(None, None, -1)])
def test_composes_with_progressive_resizing_however_listed(order):
    stages = [Stage(1, 4), Stage(1, 6, 12), Stage(2, 8)]
    _, loader = train([ProgressiveResizing(stages=stages), FixRes(epochs=1, image_size=12)][order], epochs=4)
    by_epoch = [next(one for one in loader.served if one.epoch == epoch) for epoch in range(4)]
    assert [one.image_size for one in by_epoch] == [4, 6, 8, 12]
    assert [one.test_crop for one in by_epoch] == [False, False, False, True]
    _, loader = train([ProgressiveResizing(stages=stages), FixRes(epochs=1)][order], epochs=4)
    assert loader.served[-1].image_size == 8


@pytest.mark.parametrize("steps", [2, 4, 6, 7])
def test_resumed_runs_are_the_whole_run(tmp_path, steps):
    algorithms = lambda: [  # noqa: E731
        FixRes(epochs=2, image_size=12, learning_rate=0.02), LearningRate(), SAM(rho=0.1, interval=2),
    ]  # fmt: skip
    keep = dict(save_folder=str(tmp_path), save_interval=f"{steps}ba", run_name="a", save_num_checkpoints_to_keep=-1)
    whole, _ = train(algorithms(), **keep)
    loader = FakeLoader()
    resumed, _ = train(algorithms(), loader, load_path=str(next(tmp_path.glob(f"*-ba{steps}-rank0.pt"))))
    assert same(resumed.states[-1], whole.states[-1])
    assert resumed.rates == whole.rates[steps:]
    assert [one.image_size for one in loader.served if one.epoch == 2] == [12] * 3


def test_a_crop_may_be_kept_with_any_loader():
    for loader in (FixedLoader(), FakeLoader()):
        seen, _ = train([FixRes(epochs=2, crop="keep")], loader)
        assert not any(one.test_crop for one in loader.served)
        for name, value in seen.states[-1].items():
            frozen = name not in KEPT["classifier_and_norm"] and name not in MOVING["classifier_and_norm"]
            assert torch.equal(value, seen.states[2][name]) == frozen, name
    with pytest.raises(ValueError, match="crop 'test_time' must be 'test' or 'keep'"):
        FixRes(crop="test_time")


def test_a_second_fit_trains_all_layers_until_its_own_phase():
    seen = watch()
    trainer = make_trainer([FixRes(epochs=1)], FakeLoader(), epochs=2, callbacks=[seen])
    trainer.fit()
    trainer.fit(duration="2ep")
    changed = [
        {name for name, value in after.items() if not torch.equal(value, before[name])}
        for before, after in pairwise(seen.states[2::3])
    ]
    everything = set(seen.states[0])
    in_phase = set(KEPT["classifier_and_norm"]) | MOVING["classifier_and_norm"]
    assert changed == [in_phase, everything, in_phase]


class NoSize(FixedLoader):
    def set_test_crop(self, enabled):
        pass


@pytest.mark.parametrize(
    ("algorithms", "loader", "make", "message"),
    [
        ([FixRes(epochs=4)], FakeLoader, network, "fixres.epochs is 4 and the run has 3 epochs.*make it at most 3"),
        ([FixRes()], FixedLoader, network, r"FixedLoader, cannot be .*; write FixRes\(epochs=5, crop='keep'\)"),
        ([FixRes(epochs=1, image_size=8)], NoSize, network, "NoSize, cannot change its size; leave image_size out"),
        ([FixRes(epochs=1, learning_rate=0.1)], FakeLoader, network, "fixres.learning_rate changes the"),
        ([FixRes(epochs=1), FixRes(epochs=1)], FakeLoader, network, "FixRes is among the Trainer's algorithms twice"),
        (
            [FixRes(epochs=1)], FakeLoader, lambda: nn.Sequential(nn.Flatten(), nn.Linear(192, 4)).double(),
            "has no batch norm before its classifier; use train: classifier",
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_done_is_said_before_the_first_step(algorithms, loader, make, message):
    made = loader()
    with pytest.raises(ValueError, match=message):
        train(copy.deepcopy(algorithms), made, make=make)
    assert not made.served


@pytest.mark.slow
def test_frozen_layers_stay_frozen_in_a_compiled_model_that_is_evaluated_in_between():
    from composer.core import DataSpec, Evaluator

    torch._dynamo.reset()
    evaluation = lambda: Evaluator(label="eval", dataloader=DataSpec(FakeLoader()), metric_names=["MulticlassAccuracy"])  # noqa: E731
    runs = [
        train([FixRes(epochs=2)], eval_dataloader=evaluation(), eval_interval="2ba", compile_config=config)[0]
        for config in (None, {"backend": "aot_eager"})
    ]
    plain, compiled = (run.states[-1] for run in runs)
    assert not changed(runs[1].states[2], compiled) & {name for name in compiled if name[0] in "013"}
    for name in plain:
        torch.testing.assert_close(compiled[name], plain[name], rtol=0, atol=1e-9)


# --- several ranks ---


@needs_fsdp
@pytest.mark.slow
def test_two_ranks_freeze_alike_replicated_and_sharded(tmp_path):
    script, here = tmp_path / "rank.py", Path(__file__)
    script.write_text(
        f"import sys; sys.path[:0] = [{str(here.parent)!r}]; import {here.stem} as tests\n"
        f"tests.train_ranks({str(tmp_path)!r})\n"
    )
    assert "find_unused_parameters" not in run_ranks(2, str(script), timeout=240)
    ranks = [torch.load(tmp_path / f"rank{rank}.pt", weights_only=False) for rank in (0, 1)]
    names = ranks[0]["ddp"]["before"]
    statistics = {name for name in names if name.split(".")[-1].startswith(("running", "num_"))}
    expected = set(KEPT["classifier_and_norm"]) | MOVING["classifier_and_norm"]
    for rank in ranks:
        assert same(rank["ddp"]["resumed"], rank["ddp"]["after"])
        for found in rank.values():  # DDP hands rank 0's statistics out before every forward pass
            assert changed(found["before"], found["after"]) - statistics == expected - statistics
    for kind in ("ddp", "fsdp"):
        assert changed(ranks[0][kind]["before"], ranks[0][kind]["after"]) == expected
        assert changed(ranks[0][kind]["after"], ranks[1][kind]["after"]) <= statistics


def train_ranks(folder):
    from composer.utils import dist
    from composer.utils.parallelism import FSDP2Config

    def loader():
        return FakeLoader(rank=dist.get_global_rank(), world_size=2)

    dist.initialize_dist("cpu")
    algorithms = lambda: [FixRes(epochs=2, image_size=12), SAM(rho=0.1, interval=2)]  # noqa: E731
    keep = dict(save_folder=folder, save_interval="3ba", run_name="a", save_num_checkpoints_to_keep=-1)
    ddp, _ = train(algorithms(), loader(), device_train_microbatch_size=4, **keep)
    resumed, _ = train(algorithms(), loader(), device_train_microbatch_size=4, load_path=f"{folder}/ep1-ba3-rank0.pt")
    found = {"ddp": {"before": ddp.states[1], "after": ddp.states[-1], "resumed": resumed.states[-1]}}
    fsdp, _ = train(algorithms(), loader(), make=lambda: network().float(), parallelism_config={"fsdp": FSDP2Config()})
    whole = lambda state: {  # noqa: E731
        name: value.full_tensor() if hasattr(value, "full_tensor") else value for name, value in state.items()
    }
    found["fsdp"] = {"before": whole(fsdp.states[1]), "after": whole(fsdp.states[-1])}
    torch.save(found, f"{folder}/rank{dist.get_global_rank()}.pt")
