"""Composer's own algorithms by name: all of them, checked arguments, Contracts, and in recipes."""

import inspect
import pickle
from types import SimpleNamespace

import pytest

from algos.framework import registry
from algos.framework.base import Contract, Event
from algos.framework.composer_algorithms import _KNOWN, find, refuse_doubles
from algos.framework.ordering import arrange
from training.build import build_algorithms
from training.planning import plan_run
from training.recipe import RecipeError, load_recipe

DIGITS = "yamls/digits_medium.yaml"
# The settings that have no default.
NEEDED = {
    "composer.alibi": {"max_sequence_length": 8},
    "composer.gradient_clipping": {"clipping_type": "norm", "clipping_threshold": 1.0},
    "composer.stochastic_depth": {"target_layer_name": "ResNetBottleneck"},
}


def test_every_algorithm_of_composers_is_there_with_a_contract():
    from composer import algorithms
    from composer.core import Algorithm

    classes = [one for one in vars(algorithms).values() if inspect.isclass(one) and issubclass(one, Algorithm)]
    assert len(registry.composer_names()) == len(classes) == len(_KNOWN) == 28
    assert {name.removeprefix("composer.") for name in registry.composer_names()} == set(_KNOWN)
    made = {name: registry.maker(name)(**NEEDED.get(name, {})) for name in _KNOWN_NAMES if name != GLU}
    # Composer's own classes, which its passes look for.
    assert {type(one) for one in made.values()} == {one for one in classes if one.__name__ != "GatedLinearUnits"}
    assert all(isinstance(one.contract, Contract) and one.events for one in made.values())


GLU = "composer.gated_linear_units"  # cannot be made without transformers
_KNOWN_NAMES = [f"composer.{name}" for name in _KNOWN]


class _Anything(SimpleNamespace):
    """A state that says yes to whatever is asked of it."""

    def __getattr__(self, name):
        return _Anything()

    def __call__(self, *args, **kwargs):
        return _Anything()

    def __iter__(self):
        return iter(())

    def __mod__(self, other):
        return 0


@pytest.mark.parametrize("name", _KNOWN_NAMES)
def test_declared_events_hold_all_at_which_it_acts(name):
    if name == GLU:
        pytest.importorskip("transformers")
    algorithm = find(name)(**NEEDED.get(name, {}))
    for event in Event:
        try:
            acts = algorithm.match(event, _Anything())
        except Exception:  # it looked closer at the state than there is one
            continue
        assert not acts or event in algorithm.events, event


def test_signature_is_the_constructors_and_instances_are_ordinary():
    assert list(inspect.signature(registry.maker("composer.ema")).parameters) == [
        "half_life", "smoothing", "ema_start", "update_interval",
    ]  # fmt: skip
    ema = find("composer.ema")(half_life="50ba")
    assert (ema.half_life.value, type(ema).__qualname__) == (50, "EMA")
    assert pickle.loads(pickle.dumps(ema)).contract == ema.contract
    assert registry.maker("mixup") is registry.find("mixup")
    assert not any(name.startswith("composer.") for name in registry.names())


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("composer.emma", {}, r"unknown algorithm 'composer.emma'; .* did you mean composer.ema\?"),
        ("composer.ema", {"half_live": "1ba"}, r"composer.ema has no setting 'half_live'; .*did you mean half_life\?"),
        ("composer.stochastic_depth", {}, "needs target_layer_name, which have no default"),
        ("composer.ema", {"half_life": "soon"}, r"composer.ema refuses \{'half_life': 'soon'\}: "),
        ("composer.ema", {"half_life": None, "smoothing": 0.9}, "composer.ema refuses .*no attribute 'half_life'"),
        ("composer.colout", {"p_row": "a"}, "composer.colout refuses"),
        ("composer.channels_last", {"x": 1}, "it has: none"),
    ],
)
def test_mistakes_are_refused(name, settings, message):
    with pytest.raises(ValueError, match=message):
        find(name)(**settings)


def test_what_cannot_be_together_is_refused_and_the_rest_is_ordered():
    contract = lambda name: registry.maker(name)().contract  # noqa: E731
    for ours, theirs in [("mixup", "cutmix"), ("sam", "sam"), ("progressive_resizing", "progressive_resizing")]:
        pair = {ours: contract(ours), f"composer.{theirs}": contract(f"composer.{theirs}")}
        with pytest.raises(ValueError, match=r"both decide .*algorithms\.composer\."):
            arrange(pair)
    chosen = ["composer.cutout", "composer.label_smoothing", "composer.squeeze_excite", "channels_last", "mixup"]
    order = arrange({name: contract(name) for name in chosen})
    assert order.index("composer.squeeze_excite") < order.index("channels_last")
    assert order.index("composer.cutout") < order.index("mixup") < order.index("composer.label_smoothing")
    with pytest.raises(ValueError, match=r"blurpool and composer.blurpool do the same; .*algorithms.blurpool=null"):
        refuse_doubles(["mixup", "composer.blurpool", "blurpool"])


def test_recipes_and_overrides_spell_them_in_a_section():
    recipe = load_recipe(DIGITS, ["algorithms.composer.colout.p_row=0.1", "algorithms.composer.squeeze_excite={}"])
    assert recipe.algorithms["composer.colout"] == {"p_row": 0.1}
    assert recipe.algorithms["composer.squeeze_excite"] == {}
    made = build_algorithms(plan_run(recipe))
    assert made["composer.colout"].p_row == 0.1
    assert list(made).index("composer.squeeze_excite") < list(made).index("channels_last")
    assert "composer.colout" not in load_recipe(DIGITS, ["algorithms.composer.colout=null"]).algorithms
    assert load_recipe(DIGITS, ["algorithms.composer=null"]).algorithms == load_recipe(DIGITS).algorithms


def test_a_written_recipe_reads_back(tmp_path):
    import yaml

    recipe = load_recipe(DIGITS, ["algorithms.composer.cutout.length=0.25"])
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe.settings))
    assert load_recipe(tmp_path / "recipe.yaml").algorithms == recipe.algorithms


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "algorithms.composer.emma={}",
            r"algorithms.composer.emma: .* is no algorithm; .* did you mean composer.ema\?",
        ),
        ("algorithms.composer.cutout.lenght=1", r"algorithms.composer.cutout: .* did you mean length\?"),
        ("algorithms.composer.cutout=3", "algorithms.composer.cutout: is 3; it must be a mapping"),
        ("algorithms.composer=3", "algorithms.composer: is 3; it must be a mapping"),
        ("algorithms.composer.mixup={}", "algorithms: mixup and composer.mixup do the same"),
    ],
)
def test_mistakes_in_recipes_are_one_line(override, message):
    with pytest.raises(RecipeError, match=message):
        load_recipe(DIGITS, [override])


def test_the_page_runs_and_names_every_one():
    import re
    from pathlib import Path

    import yaml

    page = (Path(__file__).parents[3] / "docs" / "algorithms" / "composer_algorithms.md").read_text()
    for block in re.findall(r"^```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL):
        exec(compile(block, "composer_algorithms.md", "exec"), {})
    (block,) = re.findall(r"^```yaml\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    for name, settings in yaml.safe_load(block)["algorithms"]["composer"].items():
        find(f"composer.{name}")(**settings)
    rows = [line for line in page.splitlines() if line.startswith("|")]
    assert set(re.findall(r"`(\w+)`", "".join(rows))) == set(_KNOWN)
