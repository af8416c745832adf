"""EMA against the explicit formula and torch's AveragedModel; evaluated, saved and resumed; on several ranks."""

import copy
import pickle
from pathlib import Path

import pytest
import torch
from ranks import needs_fsdp, run_ranks
from torch import nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from algos.blurpool import BlurPool, apply_blurpool
from algos.ema import EMA, averaged_state_dict, averaged_weights, ema_update


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def network(dtype=torch.float64):
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, stride=2), nn.BatchNorm2d(16), nn.ReLU(), nn.Flatten(), nn.Linear(144, 4)
    ).to(dtype)


def jiggle(model):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter))
    model.train()(torch.randn(4, 3, 8, 8, dtype=next(model.parameters()).dtype))


# --- the functional forms ---


@pytest.mark.parametrize("decay", [0.0, 0.3, 0.99, 1.0])
def test_update_is_the_formula_and_counts_are_copied(decay):
    model = network()
    average = copy.deepcopy(model)
    expected = {name: tensor.clone() for name, tensor in average.state_dict().items()}
    for _ in range(3):
        jiggle(model)
        ema_update(average, model, decay=decay)
        for name, tensor in model.state_dict().items():
            if tensor.is_floating_point():
                expected[name] = decay * expected[name] + (1 - decay) * tensor
            else:
                expected[name] = tensor.clone()
    for name, tensor in average.state_dict().items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=1e-14)
    assert average[1].num_batches_tracked == 3


def test_equals_torchs_averaged_model():
    model = network()
    theirs = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
    jiggle(model)
    theirs.update_parameters(model)  # copies
    average = copy.deepcopy(model)
    for _ in range(4):
        jiggle(model)
        theirs.update_parameters(model)
        ema_update(average, model, decay=0.9)
    ours, reference = average.state_dict(), theirs.module.state_dict()
    for name in ours.keys() - {"1.num_batches_tracked"}:  # which theirs averages
        assert torch.equal(ours[name], reference[name])


def test_a_mapping_works_as_a_module_does_and_keeps_its_own_precision():
    model = network(torch.bfloat16)
    average = {name: tensor.float() for name, tensor in model.state_dict().items() if tensor.is_floating_point()}
    average["1.num_batches_tracked"] = torch.tensor(0)
    before = average["4.weight"].clone()
    jiggle(model)
    ema_update(average, model, decay=0.9999)
    assert average["4.weight"].dtype == torch.float32
    expected = 0.9999 * before + 0.0001 * model[4].weight.float()
    torch.testing.assert_close(average["4.weight"], expected, rtol=1e-6, atol=1e-7)
    assert not torch.equal(average["4.weight"], before)


def test_averaged_weights_come_and_go_bit_for_bit_and_nest():
    model = network()
    first, second = copy.deepcopy(model), copy.deepcopy(model)
    jiggle(first)
    jiggle(second)
    before = copy.deepcopy(model.state_dict())
    with averaged_weights(model, first) as lent:
        assert lent is model
        assert same(model.state_dict(), first.state_dict())
        with averaged_weights(model, second):
            assert same(model.state_dict(), second.state_dict())
        assert same(model.state_dict(), first.state_dict())
    assert same(model.state_dict(), before)
    with pytest.raises(RuntimeError, match="stop"), averaged_weights(model, first):
        raise RuntimeError("stop")
    assert same(model.state_dict(), before)


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def test_wrappers_and_transient_buffers_leave_no_trace():
    model = network()
    average = copy.deepcopy(model)
    apply_blurpool(model, min_channels=1)  # registers buffers that no state dict holds
    compiled = torch.compile(model, backend="eager")
    jiggle(model)
    ema_update(average, compiled, decay=0.5)
    with averaged_weights(compiled, average):
        assert same(model.state_dict(), average.state_dict())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: nn.Linear(2, 2), r"average lacks 0.bias, 0.weight, 1.bias, 6 more and has bias, weight besides"),
        (lambda: network()[:4], r"average lacks 4.bias, 4.weight and has nothing besides"),
        (
            lambda: nn.Sequential(*network()[:4], nn.Linear(144, 5)),
            r"average's 4.weight has shape \[5, 144\] and the model's \[4, 144\]",
        ),
    ],
)
def test_another_networks_average_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        ema_update(make().double(), network(), decay=0.9)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "half_life_steps is None and decay is None; give exactly one"),
        ({"half_life_steps": 10, "decay": 0.9}, "give exactly one"),
        ({"half_life_steps": 0}, "half_life_steps 0 must be above 0"),
        ({"decay": 1.0}, "decay 1.0 must lie between 0 and 1"),
        ({"decay": 0.9, "update_interval_steps": 0}, "update_interval_steps 0 must be at least 1"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        EMA(**settings)


def test_settings_become_a_decay_an_update():
    assert EMA(decay=0.99).decay_an_update == 0.99
    assert EMA(decay=0.9, update_interval_steps=3).decay_an_update == pytest.approx(0.729)
    assert EMA(half_life_steps=10).decay_an_update ** 10 == pytest.approx(0.5)
    assert EMA(half_life_steps=10, update_interval_steps=5).decay_an_update ** 2 == pytest.approx(0.5)
    assert pickle.loads(pickle.dumps(EMA(decay=0.9))).decay_an_update == 0.9
    with pytest.raises(ValueError, match=r"decay 1.5 must lie in \[0, 1\]"):
        ema_update(network(), network(), decay=1.5)


# --- in the Trainer ---


def make_trainer(algorithms, *, epochs=2, microbatch=8, callbacks=(), make=network, **settings):
    from composer import Trainer
    from composer.models import ComposerClassifier
    from composer.utils import dist
    from torch.utils.data import DataLoader, TensorDataset

    torch.manual_seed(0)
    model = ComposerClassifier(make(), num_classes=4)
    samples = TensorDataset(torch.randn(32, 3, 8, 8, dtype=torch.float64), torch.arange(32) % 4)
    loader = lambda: DataLoader(samples, batch_size=8 // dist.get_world_size(), sampler=dist.get_sampler(samples))  # noqa: E731
    return Trainer(
        model=model, train_dataloader=loader(), eval_dataloader=loader(), max_duration=f"{epochs}ep", device="cpu",
        optimizers=torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), algorithms=algorithms, seed=11,
        device_train_microbatch_size=microbatch, callbacks=list(callbacks),
        progress_bar=False, log_to_console=False, **settings,
    )  # fmt: skip


def watch():
    """A callback that keeps the bare network's tensors after every step, and what every evaluation ran on."""
    from composer.core import Callback

    class Watch(Callback):
        def __init__(self):
            self.weights, self.evaluated = [], []

        def batch_end(self, state, logger):
            self.weights.append(bare(state.model))

        def eval_batch_start(self, state, logger):
            self.evaluated.append(bare(state.model))

    return Watch()


def bare(model):
    tensors = model.state_dict() if hasattr(model, "state_dict") else model
    return {name.removeprefix("module."): tensor.clone() for name, tensor in tensors.items() if "metric" not in name}


def reference(weights, decay, interval=1):
    """The average after each step, written out."""
    averages, average = [], None
    for step, tensors in enumerate(weights, start=1):
        if step % interval == 0:
            if average is None:
                average = dict(tensors)
            for name, tensor in tensors.items():
                moves = tensor.is_floating_point()
                average[name] = decay * average[name] + (1 - decay) * tensor if moves else tensor
        averages.append(average and dict(average))
    return averages


def close(one, other, atol=1e-13):
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(tensor, other[name], rtol=0, atol=atol, check_dtype=False)


@pytest.mark.parametrize(("interval", "microbatch"), [(1, 8), (3, 2)])
def test_evaluation_runs_on_the_average_and_training_does_not_notice(interval, microbatch):
    seen, plain = watch(), watch()
    ema = EMA(decay=0.8, update_interval_steps=interval)
    trainer = make_trainer([ema], callbacks=[seen], microbatch=microbatch)
    trainer.fit()
    expected = reference(seen.weights, 0.8**interval, interval)
    close(seen.evaluated[0], expected[3])
    close(seen.evaluated[-1], expected[7])
    close({name.removeprefix("module."): tensor for name, tensor in ema.average.items()}, expected[7])
    make_trainer([], callbacks=[plain], microbatch=microbatch).fit()
    assert all(same(one, other) for one, other in zip(seen.weights, plain.weights, strict=True))
    assert same(bare(trainer.state.model), seen.weights[-1])  # whatever was evaluated or saved


def test_resumed_runs_are_the_whole_run_and_evaluate_the_average_at_once(tmp_path):
    seen, seen_first = watch(), watch()
    whole = EMA(half_life_steps=3)
    make_trainer([whole], callbacks=[seen]).fit()
    first = EMA(half_life_steps=3)
    make_trainer([first], epochs=1, callbacks=[seen_first], save_folder=str(tmp_path), run_name="a").fit()
    resumed, seen_again = EMA(half_life_steps=3), watch()
    trainer = make_trainer([resumed], callbacks=[seen_again], load_path=f"{tmp_path}/ep1-ba4-rank0.pt")
    assert same(resumed.average, first.average)
    trainer.eval()
    assert same(seen_again.evaluated[0], seen_first.evaluated[-1])
    trainer.fit()
    assert same(resumed.average, whole.average)
    assert same(seen_again.weights[-1], seen.weights[-1])
    assert same(seen_again.evaluated[-1], seen.evaluated[-1])


def test_a_checkpoint_holds_the_weights_and_their_average(tmp_path):
    seen = watch()
    trainer = make_trainer([BlurPool(min_channels=1), EMA(decay=0.8)], callbacks=[seen], save_folder=str(tmp_path))
    trainer.fit()
    checkpoint = torch.load(tmp_path / "ep2-ba8-rank0.pt", weights_only=False)
    assert same(bare(checkpoint["state"]["model"]), seen.weights[-1])
    close(bare(averaged_state_dict(checkpoint)), reference(seen.weights, 0.8)[-1])
    trainer.state.model.load_state_dict(averaged_state_dict(checkpoint))
    checkpoint["state"]["algorithms"] = []
    with pytest.raises(ValueError, match="holds no averaged weights"):
        averaged_state_dict(checkpoint)


def test_checkpoints_that_do_not_match_are_refused(tmp_path):
    make_trainer([], epochs=1, save_folder=str(tmp_path / "without")).fit()
    path = f"{tmp_path}/without/ep1-ba4-rank0.pt"
    with pytest.raises(ValueError, match=r"checkpoint, of step 4, was trained without ema .*algorithms.ema=null"):
        make_trainer([EMA(decay=0.9)], load_path=path)
    fresh = EMA(decay=0.9)
    make_trainer([fresh], load_path=path, load_weights_only=True)
    assert fresh.average is None
    make_trainer([EMA(decay=0.9)], epochs=1, save_folder=str(tmp_path / "with")).fit()
    checkpoint = torch.load(tmp_path / "with" / "ep1-ba4-rank0.pt", weights_only=False)
    checkpoint["state"]["algorithms"][0][1]["tensors"].pop("module.4.bias")
    torch.save(checkpoint, tmp_path / "odd.pt")
    with pytest.raises(ValueError, match=r"average lacks module.4.bias and has nothing besides"):
        make_trainer([EMA(decay=0.9)], load_path=str(tmp_path / "odd.pt"))


def test_two_averages_are_refused():
    from composer.algorithms import EMA as ComposersEMA
    from composer.algorithms import SWA

    with pytest.raises(ValueError, match="EMA is among the Trainer's algorithms twice"):
        make_trainer([EMA(decay=0.8), EMA(decay=0.9)])
    for other in (ComposersEMA(), SWA()):
        with pytest.raises(ValueError, match="would both swap the weights for an average"):
            make_trainer([EMA(decay=0.8), other])


def test_evaluations_within_each_other_and_failed_ones_leave_the_weights():
    from composer.core import Event

    ema, seen = EMA(decay=0.8), watch()
    trainer = make_trainer([ema], epochs=1, callbacks=[seen])
    trainer.fit()
    state = trainer.state
    averaged = reference(seen.weights, 0.8)[-1]
    for event in (Event.EVAL_START, Event.EVAL_START, Event.EVAL_END):
        ema.apply(event, state, None)
        close(bare(state.model), averaged)
    ema.apply(Event.EVAL_END, state, None)
    assert same(bare(state.model), seen.weights[-1])
    ema.apply(Event.EVAL_START, state, None)  # and it fails
    ema.apply(Event.FIT_START, state, None)
    assert same(bare(state.model), seen.weights[-1])


# --- several ranks ---


def on_two_ranks(tmp_path, call):
    script = tmp_path / "rank.py"
    here = Path(__file__)
    script.write_text(
        f"import sys; sys.path.insert(0, {str(here.parent)!r}); import {here.stem} as tests\n"
        f"tests.{call}({str(tmp_path)!r})\n"
    )
    run_ranks(2, str(script), timeout=200)


@pytest.mark.slow
def test_two_ranks_average_alike_and_one_process_goes_on_from_them(tmp_path):
    on_two_ranks(tmp_path, "train_a_ddp_rank")
    ranks = [torch.load(tmp_path / f"rank{rank}.pt", weights_only=False) for rank in (0, 1)]
    assert same(ranks[0]["evaluated"], ranks[1]["evaluated"])
    assert same(ranks[0]["evaluated"], ranks[0]["resumed"])
    assert same(ranks[0]["evaluated"], ranks[1]["resumed"])
    close(ranks[0]["evaluated"], reference(ranks[0]["weights"], 0.8)[-1])
    alone, seen = EMA(decay=0.8), watch()
    trainer = make_trainer([alone], callbacks=[seen], load_path=f"{tmp_path}/ep1-ba4-rank0.pt")
    trainer.eval()
    assert same(seen.evaluated[0], ranks[0]["evaluated"])


def train_a_ddp_rank(folder):
    from composer.utils import dist

    seen, again = watch(), watch()
    make_trainer([EMA(decay=0.8)], epochs=1, microbatch=4, callbacks=[seen], save_folder=folder, run_name="a").fit()
    resumed = make_trainer([EMA(decay=0.8)], microbatch=4, callbacks=[again], load_path=f"{folder}/ep1-ba4-rank0.pt")
    resumed.eval()
    weights = [{name.removeprefix("module."): tensor for name, tensor in one.items()} for one in seen.weights]
    last = lambda one: {name.removeprefix("module."): tensor for name, tensor in one.items()}  # noqa: E731
    torch.save(
        {"weights": weights, "evaluated": last(seen.evaluated[-1]), "resumed": last(again.evaluated[0])},
        f"{folder}/rank{dist.get_global_rank()}.pt",
    )


def norm_free():
    return nn.Sequential(nn.Flatten(), nn.Linear(192, 6), nn.Tanh(), nn.Linear(6, 4)).double()


@needs_fsdp
@pytest.mark.slow
@pytest.mark.parametrize("kind", ["full", "sharded"])
def test_sharded_models_average_evaluate_save_and_resume(kind, tmp_path):
    on_two_ranks(tmp_path, f"train_a_{kind}_fsdp_rank")
    ranks = [torch.load(tmp_path / f"rank{rank}.pt", weights_only=False) for rank in (0, 1)]
    assert same(ranks[0]["average"], ranks[1]["average"])
    close(ranks[0]["average"], reference(ranks[0]["weights"], 0.8)[-1])
    for rank in ranks:
        assert same(rank["resumed"], rank["average"])
        close(rank["logits"], {"logits": functional_logits(rank["average"])}, atol=1e-6)  # Composer computes in float32
        assert same(rank["after"], rank["weights"][-1])
    if kind == "full":
        alone = EMA(decay=0.8)
        make_trainer([alone], make=norm_free, load_path=f"{tmp_path}/ep1-ba4-rank0.pt")
        assert same(alone.average, ranks[0]["average"])


def functional_logits(tensors):
    tensors = {name.removeprefix("module."): tensor for name, tensor in tensors.items()}
    hidden = torch.tanh(F.linear(torch.ones(1, 192).double(), tensors["1.weight"], tensors["1.bias"]))
    return F.linear(hidden, tensors["3.weight"], tensors["3.bias"])


def train_a_full_fsdp_rank(folder):
    _train_an_fsdp_rank(folder, "full")


def train_a_sharded_fsdp_rank(folder):
    _train_an_fsdp_rank(folder, "sharded")


def _train_an_fsdp_rank(folder, kind):
    from composer.core import Callback
    from composer.utils import dist
    from composer.utils.parallelism import FSDP2Config

    class Keep(Callback):
        def __init__(self):
            self.weights, self.logits = [], []

        def batch_end(self, state, logger):
            self.weights.append(whole(state.model))

        def eval_end(self, state, logger):  # after the algorithm has put the weights back
            self.after = whole(state.model)

        def eval_batch_end(self, state, logger):
            self.logits.append(state.model([torch.ones(1, 3, 8, 8).double(), None]).clone())

    def trainer(algorithm, keep, **settings):
        config = FSDP2Config(state_dict_type=kind)
        return make_trainer(
            [algorithm], microbatch=4, callbacks=[keep], make=norm_free, parallelism_config={"fsdp": config}, **settings
        )

    keep, ema = Keep(), EMA(decay=0.8)
    trainer(ema, keep, epochs=1, save_folder=folder, run_name="a", save_overwrite=True).fit()
    found = {"weights": keep.weights, "average": ema.state_dict()["tensors"], "after": keep.after}
    found["logits"] = {"logits": keep.logits[-1]}
    again, kept = EMA(decay=0.8), Keep()
    path = f"{folder}/ep1-ba4" if kind == "sharded" else f"{folder}/ep1-ba4-rank0.pt"
    resumed = trainer(again, kept, epochs=2, load_path=path)
    found["resumed"] = {name: tensor.clone() for name, tensor in again.state_dict()["tensors"].items()}
    resumed.eval()
    torch.testing.assert_close(kept.logits[0], keep.logits[-1], rtol=0, atol=0)
    resumed.eval()  # FSDP2's root is left whole after one: the next must not read that
    resumed.fit()
    torch.save(found, f"{folder}/rank{dist.get_global_rank()}.pt")


def whole(model):
    for module in model.modules():
        if hasattr(module, "reshard"):
            module.reshard()
    full = lambda tensor: tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor  # noqa: E731
    return {name: full(parameter.detach()).clone() for name, parameter in model.named_parameters()}
