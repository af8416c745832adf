"""Progressive resizing: stages, the loader's sizes, resizing on the device, and whole runs."""

import itertools
import logging
import pickle

import pytest
import torch
from fake_loader import FakeLoader, FixedLoader
from torch import nn
from torch.nn import functional as F

from algos.framework.protocols import CropSwitchingLoader, ResizableLoader
from algos.learning_rate import LearningRate
from algos.progressive_resizing import ProgressiveResizing, Stage, ramp_stages, resize_images, stage_at
from algos.resizing.sampled_sizes import SampledSizes


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


# --- stages ---


def composers_sizes(*, epochs, width, scale, delay, finetune, multiple):
    """Image size of every epoch under Composer's algorithm, which is asked batch by batch."""
    from types import SimpleNamespace

    from composer.algorithms import ProgressiveResizing as Theirs

    theirs = Theirs(
        initial_scale=scale, delay_fraction=delay, finetune_fraction=finetune, size_increment=multiple, mode="crop"
    )
    sizes = []
    for epoch in range(epochs):
        kept = {0: torch.zeros(1, 1, width, width), 1: torch.zeros(1)}
        state = SimpleNamespace(
            batch_get_item=lambda key: kept[key],  # noqa: B023
            batch_set_item=kept.__setitem__,
            get_elapsed_duration=lambda: SimpleNamespace(value=epoch / epochs),  # noqa: B023
        )
        theirs.apply(None, state)
        sizes.append(kept[0].shape[-1])
    return sizes


@pytest.mark.parametrize("epochs", [1, 7, 16, 35, 90])
@pytest.mark.parametrize(
    ("scale", "delay", "finetune"),
    [(0.5, 0.4, 0.2), (0.6, 0.2, 0.2), (0.5, 0.0, 0.0), (0.25, 0.5, 0.3), (1.0, 0.1, 0.1)],
)
@pytest.mark.parametrize(("width", "multiple"), [(176, 4), (224, 32), (32, 8)])
def test_ramp_is_composers(epochs, scale, delay, finetune, width, multiple):
    ours = ramp_stages(
        total_epochs=epochs, final_image_size=width, initial_scale=scale, delay_fraction=delay,
        finetune_fraction=finetune, size_multiple=multiple,
    )  # fmt: skip
    assert sum(stage.epochs for stage in ours) == epochs
    sizes = [stage_at(epoch, ours).image_size for epoch in range(epochs)]
    theirs = composers_sizes(epochs=epochs, width=width, scale=scale, delay=delay, finetune=finetune, multiple=multiple)
    assert sizes.pop() == width  # theirs may end a run that is short, or has no fine-tuning share, below the full size
    theirs.pop()
    # A crop there ends a pixel short where its scale times the width falls short of the size by rounding.
    assert all(0 <= one - other <= 1 for one, other in zip(sizes, theirs, strict=True))


@pytest.mark.parametrize("final", [1, 2, 3, 30, 176, 226, 227])
@pytest.mark.parametrize("multiple", [1, 4, 32])
def test_ramp_never_shrinks_exceeds_the_final_size_or_reaches_0(final, multiple):
    for scale, delay, finetune in itertools.product((0.01, 0.5, 0.99), (0.0, 0.3, 1.0), (0.0, 0.7)):
        if delay + finetune > 1:
            continue
        stages = ramp_stages(
            total_epochs=10, final_image_size=final, initial_scale=scale, delay_fraction=delay,
            finetune_fraction=finetune, size_multiple=multiple,
        )  # fmt: skip
        sizes = [stage.image_size for stage in stages]
        assert sizes == sorted(set(sizes))
        assert sizes[0] >= 1
        assert sizes[-1] <= final
        assert sizes[-1] == final


@pytest.mark.parametrize("final", [8, 20, 30, 96, 176, 224])
@pytest.mark.parametrize(("delay", "finetune"), [(0.4, 0.2), (0.4, 0.0), (0.0, 0.0), (1.0, 0.0), (0.0, 0.02)])
def test_the_last_epoch_is_at_full_size_however_short_the_run(final, delay, finetune):
    for epochs in range(1, 31):
        ramp = dict(final_image_size=final, delay_fraction=delay, finetune_fraction=finetune)
        stages = ramp_stages(total_epochs=epochs, **ramp)
        assert sum(stage.epochs for stage in stages) == epochs
        assert stages[-1].image_size == final
    assert [stage_at(epoch, ramp_stages(total_epochs=3, final_image_size=96)).image_size for epoch in range(3)] == [
        48, 48, 96,
    ]  # fmt: skip


def test_the_fine_tuning_share_is_all_at_full_size():
    for epochs in range(1, 200):
        stages = ramp_stages(total_epochs=epochs, final_image_size=226, delay_fraction=0.1, finetune_fraction=0.2)
        full = [stage_at(epoch, stages).image_size == 226 for epoch in range(epochs)]
        assert full == [10 * epoch >= 8 * epochs or epoch == epochs - 1 for epoch in range(epochs)]


def test_stage_at_the_borders():
    stages = [Stage(epochs=2, image_size=8), Stage(epochs=1, image_size=12)]
    assert [stage_at(epoch, stages).image_size for epoch in range(3)] == [8, 8, 12]
    with pytest.raises(ValueError, match="epoch 3 lies beyond the 3 epochs that the stages cover"):
        stage_at(3, stages)
    with pytest.raises(ValueError, match="epoch -1 is negative"):
        stage_at(-1, stages)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"initial_scale": 0}, r"initial_scale 0 must lie in \(0, 1\]"),
        ({"initial_scale": 1.5}, r"initial_scale 1.5 must lie"),
        ({"delay_fraction": -0.1}, "neither may be negative"),
        ({"delay_fraction": 0.6, "finetune_fraction": 0.5}, "nor their sum exceed 1"),
        ({"delay_fraction": float("nan")}, "neither may be negative"),
        ({"size_multiple": 0}, "size_multiple 0 must be at least 1"),
        ({"learning_rate_scaling": "quadratic"}, "must be 'none', 'linear' or 'sqrt'"),
        ({"stages": []}, "stages is an empty list"),
        ({"stages": [8]}, "a stage is 8; give algos.Stage"),
        ({"stages": [{"epochs": 1}]}, "image_size.*its keys are epochs, image_size, per_device_batch_size, global"),
        ({"stages": [{"epochs": 1, "image_size": 8, "size": 3}]}, "'size'; its keys are"),
        ({"stages": [{"epochs": 0, "image_size": 8}]}, "a stage's epochs is 0; it must be a whole number"),
        ({"stages": [{"epochs": 1, "image_size": 8.5}]}, "a stage's image_size is 8.5"),
        ({"stages": [{"epochs": 1, "image_size": True}]}, "a stage's image_size is True"),
        (
            {"stages": [{"epochs": 1, "image_size": 8, "per_device_batch_size": 4, "global_batch_size": 8}]},
            "per_device_batch_size 4 and global_batch_size 8; give one of them",
        ),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        ProgressiveResizing(**settings)


def test_stages_may_be_mappings():
    made = ProgressiveResizing(stages=[{"epochs": 1, "image_size": 8}])
    assert made.stages == [Stage(epochs=1, image_size=8)]


# --- resizing on the device ---


def residue(images):
    return images.std().item()


def test_fine_gratings_fade_where_nearest_neighbor_turns_them_into_coarse_ones():
    """A grating of period 2.5 px cannot be shown at half the size; what is left of it is alias."""
    wave = torch.sin(2 * torch.pi * torch.arange(176, dtype=torch.float64) / 2.5)
    images = wave.expand(1, 1, 176, 176)
    inner = (..., slice(4, -4), slice(4, -4))
    nearest = residue(F.interpolate(images, scale_factor=0.5)[inner])
    unfiltered = residue(F.interpolate(images, size=(88, 88), mode="bilinear")[inner])
    ours = residue(resize_images(images, image_size=88)[inner])
    assert nearest > 0.6
    assert ours < 0.1 * nearest
    assert ours < 0.2 * unfiltered


@pytest.mark.parametrize("size", [1, 59, 60, 61, 88, 128, 175, 200])
def test_sizes_are_exact(size):
    assert resize_images(torch.zeros(1, 1, 176, 176), image_size=size).shape == (1, 1, size, size)


def test_equals_torchvisions_antialiased_resize():
    from torchvision.transforms.v2 import functional

    images = torch.rand(2, 3, 40, 40)
    expected = functional.resize(images, [23, 23], antialias=True)
    torch.testing.assert_close(resize_images(images, image_size=23), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_constants_dtype_and_memory_format_are_kept(dtype):
    images = torch.full((2, 3, 20, 20), 0.75, dtype=dtype).to(memory_format=torch.channels_last)
    resized = resize_images(images, image_size=13)
    assert resized.dtype == dtype
    assert resized.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(resized, torch.full_like(resized, 0.75))
    assert resize_images(images, image_size=20) is images


@pytest.mark.parametrize(
    ("images", "size", "message"),
    [
        (torch.zeros(1, 3, 8, 8, dtype=torch.uint8), 4, "uint8 images; resizing needs floating point"),
        (torch.zeros(1, 3, 8, 6), 4, r"shape \[1, 3, 8, 6\]; they must be \[N, C, S, S\]"),
        (torch.zeros(3, 8, 8), 4, r"must be \[N, C, S, S\]"),
        (torch.zeros(1, 3, 8, 8), 0, "image_size 0 must be at least 1 px"),
    ],
)
def test_images_that_cannot_be_resized_are_refused(images, size, message):
    with pytest.raises(ValueError, match=message):
        resize_images(images, image_size=size)


# --- whole runs ---


def make_trainer(algorithms, loader, *, epochs=3, callbacks=(), lr=0.05, **settings):
    from composer import Trainer
    from composer.models import ComposerClassifier

    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1), nn.GroupNorm(2, 6), nn.Tanh(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(6, 4),
    ).double()  # fmt: skip
    return Trainer(
        model=ComposerClassifier(network, num_classes=4),
        train_dataloader=loader, max_duration=epochs if isinstance(epochs, str) else f"{epochs}ep", device="cpu",
        optimizers=torch.optim.SGD(network.parameters(), lr=lr, momentum=0.9), algorithms=algorithms, seed=3,
        callbacks=list(callbacks), progress_bar=False, log_to_console=False, **settings,
    )  # fmt: skip


def watch():
    from composer.core import Callback

    class Watch(Callback):
        def __init__(self):
            self.shapes, self.rates, self.microbatches, self.lengths = [], [], [], []

        def before_train_batch(self, state, logger):
            self.shapes.append(tuple(state.batch[0].shape))
            self.rates.append(state.optimizers[0].param_groups[0]["lr"])
            self.lengths.append(state.dataloader_len.value)

        def before_forward(self, state, logger):
            self.microbatches.append(len(state.batch[0]))

    return Watch()


def train(algorithms, loader=None, **settings):
    loader, seen = loader or FakeLoader(), watch()
    trainer = make_trainer(algorithms, loader, callbacks=[seen], **settings)
    trainer.fit()
    trainer.close()
    return [parameter.detach().clone() for parameter in trainer.state.model.parameters()], loader, seen


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def stages(*rows):
    return [Stage(*row) for row in rows]


def test_the_fake_loader_is_what_the_algorithms_ask_for():
    assert isinstance(FakeLoader(), ResizableLoader)
    assert isinstance(FakeLoader(), CropSwitchingLoader)
    assert not isinstance(FixedLoader(), ResizableLoader)


def test_the_loader_serves_each_stage_at_its_size():
    algorithm = ProgressiveResizing(stages=stages((1, 4), (1, 6), (1, 8)))
    _, loader, seen = train([algorithm])
    assert [shape[-1] for shape in seen.shapes] == [4] * 3 + [6] * 3 + [8] * 3
    assert [served.image_size for served in loader.served] == [4] * 3 + [6] * 3 + [8] * 3


def test_a_ramp_ends_at_the_loaders_own_size():
    _, _, seen = train([ProgressiveResizing(size_multiple=2)], epochs=5)
    assert [shape[-1] for shape in seen.shapes[::3]] == [4, 4, 4, 6, 8]


def test_listed_twice_is_refused():
    with pytest.raises(ValueError, match="ProgressiveResizing is among the Trainer's algorithms twice"):
        train([ProgressiveResizing(), ProgressiveResizing()])


@pytest.mark.parametrize(("first", "second"), [(8, 16), (16, 8), (4, 24), (24, 5)])
def test_every_sample_of_every_epoch_is_seen_whatever_the_batch_size_becomes(first, second):
    rows = stages((1, 8, first), (2, 8, second), (1, 8))
    _, loader, seen = train([ProgressiveResizing(stages=rows)], epochs=4)
    sizes = [first, second, second, 8]
    for epoch in range(4):
        served = [one for one in loader.served if one.epoch == epoch]
        assert sorted(index for one in served for index in one.indices) == list(range(24))
        assert max(len(one.indices) for one in served) == sizes[epoch]
    steps = [-(-24 // size) for size in sizes]
    assert seen.lengths == [length for length in steps for _ in range(length)]
    assert seen.microbatches == [shape[0] for shape in seen.shapes]  # no batch was split


def test_a_microbatch_size_of_the_runs_own_holds_in_every_stage():
    rows = stages((1, 8, 4), (1, 8, 16), (1, 8))
    ours, _, seen = train([ProgressiveResizing(stages=rows)], device_train_microbatch_size=6)
    assert seen.microbatches == [4] * 6 + [6, 6, 4, 6, 2] + [6, 2] * 3
    whole, _, _ = train([ProgressiveResizing(stages=rows)])
    for one, other in zip(ours, whole, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


def test_microbatches_that_memory_decided_stay_small():
    from composer.core import State, Time

    state = object.__new__(State)
    loader = FakeLoader()
    state._dataloader, state._dataloader_len = loader, Time(3, "ba")
    state.auto_microbatching, state._device_train_microbatch_size = True, 8
    state.device_train_microbatch_size = 8
    algorithm = ProgressiveResizing(stages=stages((1, 8), (1, 8, 16), (1, 8, 4), (1, 8, 24)))
    algorithm.prepare(total_epochs=4, image_size=8, per_device_batch_size=8)
    algorithm._note_run(state, loader)
    algorithm._set_loader(state, 0)
    algorithm._set_loader(state, 1)
    assert state.device_train_microbatch_size == 16
    state.device_train_microbatch_size = 8  # what Composer does when 16 images do not fit
    for epoch, expected in ((2, 4), (3, 8)):
        algorithm._set_loader(state, epoch)
        assert state.device_train_microbatch_size == expected


def test_a_run_on_part_of_each_epoch_stays_one():
    rows = stages((1, 8), (1, 8, 4), (1, 8, 16))
    _, _, seen = train([ProgressiveResizing(stages=rows)], train_subset_num_batches=2)
    assert seen.lengths == [2] * 6


def test_global_batch_sizes_are_shared_out():
    algorithm = ProgressiveResizing(stages=[Stage(1, 8, global_batch_size=24), Stage(1, 8)])
    algorithm.prepare(total_epochs=2, image_size=8, per_device_batch_size=8)
    assert [algorithm.per_device_batch_size(0, ranks) for ranks in (1, 2, 3)] == [24, 12, 8]
    assert algorithm.per_device_batch_size(1, 3) == 8
    with pytest.raises(ValueError, match="global_batch_size is 24 and there are 5 ranks; make it a multiple of 5"):
        algorithm.per_device_batch_size(0, 5)


@pytest.mark.parametrize(
    ("scaling", "factors"), [("none", (1, 1, 1)), ("linear", (2, 0.5, 1)), ("sqrt", (2**0.5, 0.5**0.5, 1))]
)
def test_learning_rate_follows_the_batch_size(scaling, factors):
    algorithm = ProgressiveResizing(stages=stages((1, 8, 16), (1, 8, 4), (1, 8)), learning_rate_scaling=scaling)
    _, _, seen = train([LearningRate(decay="constant"), algorithm], lr=0.1)
    expected = [0.1 * factors[0]] * 2 + [0.1 * factors[1]] * 6 + [0.1 * factors[2]] * 3
    assert seen.rates == pytest.approx(expected, rel=1e-12)


def test_loaders_that_cannot_change_are_resized_behind(caplog):
    caplog.set_level(logging.WARNING, logger="algos.progressive_resizing")
    rows = stages((1, 4), (1, 6), (1, 8))
    _, loader, seen = train([ProgressiveResizing(stages=rows)], FixedLoader())
    assert [shape[-1] for shape in seen.shapes] == [4] * 3 + [6] * 3 + [8] * 3
    assert {served.image_size for served in loader.served} == {8}
    assert "FixedLoader cannot change its image size: batches are resized on the device" in caplog.text
    caplog.clear()
    train([ProgressiveResizing(stages=rows)])
    assert not caplog.text


def test_mixup_sees_resized_images_and_label_smoothing_does_not_mind():
    from algos.label_smoothing import LabelSmoothing
    from algos.mixup import MixUp

    algorithms = lambda: [MixUp(alpha=1.0), LabelSmoothing(), ProgressiveResizing(stages=stages((1, 4), (2, 8)))]  # noqa: E731
    forward, _, _ = train(algorithms(), FixedLoader())
    backward, _, _ = train(algorithms()[::-1], FixedLoader())
    for one, other in zip(forward, backward, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-7)  # bilinear resizing and mixing commute


@pytest.mark.parametrize("loader", [FakeLoader, FixedLoader])
@pytest.mark.parametrize("steps", [2, 3, 4, 7])
def test_resumed_runs_are_the_whole_run(tmp_path, steps, loader):
    batch = {FakeLoader: 12, FixedLoader: None}[loader]
    algorithms = lambda: [LearningRate(), ProgressiveResizing(stages=stages((1, 4), (1, 6, batch), (1, 8)))]  # noqa: E731
    whole, _, expected = train(
        algorithms(), loader(), save_folder=str(tmp_path), save_interval=f"{steps}ba", run_name="a",
        save_num_checkpoints_to_keep=-1,
    )  # fmt: skip
    path = next(tmp_path.glob(f"*-ba{steps}-rank0.pt"))
    resumed, _, seen = train(algorithms(), loader(), load_path=str(path))
    assert same(resumed, whole)
    assert seen.shapes == expected.shapes[steps:]
    assert seen.rates == expected.rates[steps:]
    assert seen.lengths == expected.lengths[steps:]


def drawn(**settings):
    return ProgressiveResizing(**{"sizes": [4, 8, 12], **settings})


def test_without_the_loaders_help_each_batch_is_resized_to_its_draw():
    _, _, seen = train([drawn(final_epochs=1)], FixedLoader(num_samples=80), epochs=4)
    sizes = [shape[-1] for shape in seen.shapes]
    expected = SampledSizes((4, 8, 12), final_epochs=1)
    for epoch in range(3):
        shapes = expected.shapes(epoch, total_epochs=4, num_images=10, seed=3, per_device_batch_size=1)
        assert sizes[10 * epoch : 10 * epoch + 10] == [size for size, _ in shapes]
    assert sizes[30:] == [12] * 10
    assert set(sizes[:30]) == {4, 8, 12}


def test_another_plan_is_refused_on_resuming(tmp_path):
    ours = lambda *rows: [ProgressiveResizing(stages=stages(*rows))]  # noqa: E731
    train(ours((1, 4), (2, 8)), save_folder=str(tmp_path), save_interval="2ba", run_name="a")
    resume = dict(load_path=f"{tmp_path}/ep0-ba2-rank0.pt")
    with pytest.raises(
        ValueError, match=r"had the stages 1 epochs at 4 px, 2 epochs at 8 px, and this one the stages 2"
    ):
        train(ours((2, 4), (1, 8)), **resume)
    with pytest.raises(ValueError, match="1 epochs at 8 px in batches of 12 a device; continue it with the same"):
        train(ours((1, 4), (1, 8), (1, 8, 12)), **resume)
    train(ours((2, 4), (1, 8)), load_weights_only=True, load_strict_model_weights=True, **resume)  # a new run
    with pytest.raises(ValueError, match=r"had the stages 1 epochs at 4 px, .* this one the drawn sizes with sizes="):
        train([drawn()], FixedLoader(), **resume)


@pytest.mark.parametrize(
    ("algorithm", "loader", "message"),
    [
        (ProgressiveResizing(stages=stages((1, 4), (1, 8))), FakeLoader, r"cover 1 \+ 1 = 2 epochs and the run has 3"),
        (ProgressiveResizing(stages=stages((2, 4), (1, 32))), FakeLoader, "stage 2 of .*resizing: image size 32"),
        (ProgressiveResizing(stages=stages((2, 4), (1, 8, 48))), FakeLoader, "stage 2 .*: batch size 48: there are 24"),
        (ProgressiveResizing(stages=stages((3, 4, 12))), FixedLoader, "FixedLoader, cannot change it; use a"),
        (ProgressiveResizing(stages=stages((3, 4)), learning_rate_scaling="linear"), FakeLoader, "no algos.Lear"),
        (drawn(), FakeLoader, "a FakeLoader, changes its size between passes alone; use a loader with set_batch_sha"),
        (drawn(global_batch_sizes=[8, 6, 4]), FixedLoader, "a drawn size sets a batch size, and the loader, a FixedL"),
        (drawn(final_epochs=4), FixedLoader, "final_epochs is 4 and the run has 3 epochs"),
    ],
)  # fmt: skip
def test_what_cannot_be_done_is_said_before_the_first_step(algorithm, loader, message):
    made = loader()
    with pytest.raises(ValueError, match=message):
        train([algorithm], made)
    assert not made.served


def torch_loader():
    from torch.utils.data import DataLoader, TensorDataset

    images = torch.randn(24, 3, 16, 16, dtype=torch.float64)
    return DataLoader(TensorDataset(images, torch.arange(24) % 4), batch_size=8)


def sizes_of(seen):
    return [shape[-1] for shape in seen.shapes]


@pytest.mark.parametrize("epochs", [1, 2, 3, 5, 10])
def test_without_stages_a_torch_loader_gets_a_ramp_of_its_images_own_size(epochs):
    _, _, seen = train([ProgressiveResizing()], torch_loader(), epochs=epochs)
    stages = ramp_stages(total_epochs=epochs, final_image_size=16)
    assert sizes_of(seen) == [stage_at(epoch, stages).image_size for epoch in range(epochs) for _ in range(3)]


@pytest.mark.parametrize("batches", [1, 4, 7, 20])
def test_in_a_run_of_batches_that_ramp_rises_from_batch_to_batch(batches):
    _, _, seen = train([ProgressiveResizing()], torch_loader(), epochs=f"{batches}ba")
    stages = ramp_stages(total_epochs=batches, final_image_size=16)
    assert sizes_of(seen) == [stage_at(batch, stages).image_size for batch in range(batches)]


def test_a_second_fit_stretches_the_ramp_and_explicit_stages_must_cover_it():
    for loader, first, second in ((torch_loader(), [8, 16], [8, 16]), (FakeLoader(), [4, 8], [4, 8])):
        seen = watch()
        trainer = make_trainer([ProgressiveResizing()], loader, epochs=2, callbacks=[seen])
        trainer.fit()
        trainer.fit(duration="2ep")
        assert sizes_of(seen)[::3] == first + second
    trainer = make_trainer([ProgressiveResizing(stages=stages((2, 8)))], torch_loader(), epochs=2)
    trainer.fit()
    with pytest.raises(ValueError, match="cover 2 = 2 epochs and the run has 4"):
        trainer.fit(duration="2ep")


def test_stages_in_a_run_of_batches_count_the_epochs_that_it_begins():
    for batches, last in ((9, 3), (7, 1)):
        rows = stages((1, 4), (1, 6), (1, 8))
        _, _, seen = train([ProgressiveResizing(stages=rows)], epochs=f"{batches}ba")
        assert sizes_of(seen) == [4] * 3 + [6] * 3 + [8] * last
    with pytest.raises(ValueError, match=r"a stage sets a batch size.* length is 9 batches; give it in epochs"):
        train([ProgressiveResizing(stages=stages((2, 8, 4), (1, 8)))], epochs="9ba")


def test_another_ramp_is_refused_on_resuming(tmp_path):
    train([ProgressiveResizing()], torch_loader(), save_folder=str(tmp_path), save_interval="2ba", run_name="a")
    resume = dict(load_path=f"{tmp_path}/ep0-ba2-rank0.pt")
    with pytest.raises(ValueError, match=r"had the ramp initial_scale=0.5, .* the ramp initial_scale=0.25"):
        train([ProgressiveResizing(initial_scale=0.25)], torch_loader(), **resume)
    with pytest.raises(ValueError, match=r"had the ramp .*, and this one the stages 3 epochs at 8 px; continue"):
        train([ProgressiveResizing(stages=stages((3, 8)))], torch_loader(), **resume)


@pytest.mark.parametrize("loader", [FakeLoader, torch_loader])
def test_a_run_that_is_measured_in_neither_epochs_nor_batches_is_refused(loader):
    with pytest.raises(ValueError, match="give it in epochs or in batches"):
        train([ProgressiveResizing()], loader(), epochs="90sp")


def test_composer_does_not_take_it_for_its_own():
    import composer.algorithms

    assert not hasattr(composer.algorithms, ProgressiveResizing.__qualname__)
    again = pickle.loads(pickle.dumps(ProgressiveResizing(size_multiple=8)))
    assert type(again) is ProgressiveResizing
