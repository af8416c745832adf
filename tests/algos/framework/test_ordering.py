"""The order of algorithms, and the registry that names them."""

import inspect
import itertools
import subprocess
import sys

import pytest

import algos
from algos.framework import registry
from algos.framework.base import Contract, Event, Resource
from algos.framework.ordering import arrange

IMAGES, MIXING, MODEL, TARGETS = Resource.IMAGES, Resource.MIXING, Resource.MODEL, Resource.TARGETS


def test_writers_act_before_those_who_wait_for_them():
    contracts = {
        "a_last": Contract(after=[TARGETS]),
        "b_middle": Contract(writes=[TARGETS], after=[MIXING]),
        "c_first": Contract(owns=[MIXING]),
    }
    assert arrange(contracts) == ["c_first", "b_middle", "a_last"]


def test_the_order_does_not_depend_on_the_listing():
    contracts = {
        "d": Contract(after=[MODEL]),
        "c": Contract(writes=[MODEL]),
        "b": Contract(writes=[IMAGES]),
        "a": Contract(after=[IMAGES, MODEL]),
    }
    orders = {tuple(arrange(dict(listing))) for listing in itertools.permutations(contracts.items())}
    assert orders == {("b", "c", "a", "d")}


def test_owning_is_writing():
    assert arrange({"a": Contract(after=[MIXING]), "b": Contract(owns=[MIXING])}) == ["b", "a"]
    assert Contract(owns=[MIXING]).writes == {MIXING}


def test_two_that_write_and_wait_for_one_resource_do_not_wait_for_each_other():
    both = Contract(writes=[IMAGES], after=[IMAGES])
    assert arrange({"b": both, "a": both, "c": Contract(writes=[IMAGES])}) == ["c", "a", "b"]


def test_two_owners_are_named_with_the_way_out():
    contracts = {"mixup": Contract(owns=[MIXING]), "cutmix": Contract(owns=[MIXING])}
    with pytest.raises(ValueError, match=r"cutmix and mixup both decide how samples are mixed.*algorithms\.mixup=null"):
        arrange(contracts)


def test_a_circle_is_named():
    contracts = {
        "a": Contract(writes=[IMAGES], after=[TARGETS]),
        "b": Contract(writes=[TARGETS], after=[IMAGES]),
        "c": Contract(writes=[MODEL]),
    }
    with pytest.raises(ValueError, match=r"wait for each other: (a -> b -> a|b -> a -> b); turn one of them off"):
        arrange(contracts)


def test_nothing_and_one_are_arranged():
    assert arrange({}) == []
    assert arrange({"a": Contract(writes=[IMAGES], after=[IMAGES])}) == ["a"]


def test_contracts_compare_by_value():
    assert Contract(writes=[IMAGES, TARGETS]) == Contract(writes=[TARGETS, IMAGES])
    assert len({Contract(owns=[MODEL]), Contract(owns=[MODEL])}) == 1


def test_every_registered_algorithm_is_found_described_and_ordered():
    contracts = {name: registry.find(name).contract for name in registry.names()}
    order = arrange(contracts)
    assert sorted(order) == registry.names()
    for first, second in (("blurpool", "channels_last"), ("mixup", "label_smoothing")):
        assert order.index(first) < order.index(second)
    for name in registry.names():
        assert registry.description(name)
        assert callable(getattr(algos, registry.functional_name(name)))
        assert getattr(algos, registry.find(name).__name__) is registry.find(name)


def test_settings_are_keywords_with_plain_annotations():
    for name in registry.names():
        for parameter in inspect.signature(registry.find(name)).parameters.values():
            assert parameter.kind is inspect.Parameter.KEYWORD_ONLY, f"{name}.{parameter.name}"
            assert parameter.annotation is not inspect.Parameter.empty, f"{name}.{parameter.name}"


def test_unknown_names_are_refused_with_the_nearest():
    with pytest.raises(ValueError, match=r"unknown algorithm 'blur_pool'.*did you mean blurpool\?"):
        registry.find("blur_pool")
    with pytest.raises(ValueError, match=r"unknown algorithm 'zzz'; known: blurpool, channels_last"):
        registry.functional_name("zzz")
    with pytest.raises(AttributeError, match=r"no attribute 'Blur'; it has: .*BlurPool"):
        algos.Blur  # noqa: B018


def test_functional_forms_need_torch_alone():
    """Without Composer the functions work and the classes say what to install."""
    script = """
import sys
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name in ("composer", "torchvision"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Missing())
import torch
from algos import BlurPool, apply_blurpool, apply_channels_last, draw_mixup, mixup_batch, smooth_labels
model = apply_channels_last(apply_blurpool(torch.nn.Conv2d(16, 4, 3, stride=2)))
model(torch.zeros(1, 16, 8, 8))
lam, permutation = draw_mixup(2, alpha=0.2, generator=torch.Generator())
mixup_batch(torch.zeros(2, 3, 4, 4), smooth_labels(torch.tensor([0, 1]), smoothing=0.1, num_classes=2),
            lam=lam, permutation=permutation)
assert BlurPool.contract
try:
    BlurPool()
except ModuleNotFoundError as error:
    assert "pip install 'brisk-vision[train]'" in str(error)
else:
    raise AssertionError
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr


def test_importing_the_package_imports_no_algorithm():
    script = "import algos, sys; assert not [m for m in sys.modules if m.startswith(('algos.', 'torch', 'composer'))]"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr


def test_functional_forms_and_classes_do_not_import_composer():
    script = (
        "import sys; from algos import SAM, apply_blurpool, arrange, mixup_batch, sam_gradients; SAM.contract; "
        "assert 'composer' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr


def test_composer_knows_the_events_and_the_algorithms():
    import composer.core

    for event in Event:
        theirs = composer.core.Event[event.name]
        assert event == theirs
        assert theirs == event
        assert hash(event) == hash(theirs)
        assert [other for other in composer.core.Event if other in (event,)] == [theirs]
    assert Event.INIT != composer.core.Event.FIT_START
    assert isinstance(registry.find("sam")(), composer.core.Algorithm)
    assert {name for name in dir(composer.core.Algorithm) if not name.startswith("_")} <= set(dir(registry.find("sam")))
