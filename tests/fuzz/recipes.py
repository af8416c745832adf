"""Recipes and overrides of any kind, up to the plan: recipes.py EXAMPLES FOLDER.

Nothing may be written, in the folder or elsewhere.
"""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path
from typing import Any

import yaml
from bounds import arguments, limited_seconds, run
from hypothesis import given
from hypothesis import strategies as st

from training.planning.text import plan_text
from training.recipe import RecipeError, flat_keys, load_recipe
from training.without_compiler import leave_out_compiler

DIGITS = Path(__file__).parents[2] / "yamls" / "digits_medium.yaml"
OUTCOMES: Counter[str] = Counter()
ROOM = Path("room")  # where a name with .. would lead out of, into the folder

SETTINGS = load_recipe(DIGITS).settings
KEYS = [
    *flat_keys(SETTINGS),
    *("model", "data", "data.source", "data.train", "algorithms", "optimizer", "schedule", "logging", "checkpoints"),
    *(f"algorithms.progressive_resizing.stages[{i}].epochs" for i in (-4, -1, 0, 2, 3, 10**9)),
    "algorithms.progressive_resizing.stages[1].x",
    *("algorithms.cutmix.alpha", "algorithms.ema", "algorithms.randaugment", "algorithms.stochastic_depth"),
    *("algorithms.composer.ema.half_life", "algorithms.composer.squeeze_excite", "algorithms.composer"),
    *("data.expected", "data.test", "data.source.eval_fraction", "data.train.augmentations[0]"),
    *("logging.trackers.tensorboard.folder", "logging.profile.steps", "parallelism.deepspeed.zero", "model.weights"),
    *("", ".", "..", "a..b", "[0]", "a[", "seed.x", "__class__", "data.train.__dict__", "run_name[0]", "\x00"),
    *("é" * 300),
]  # fmt: skip
NUMBERS = (
    *(0, -1, 1, 2, 3, 7, 64, 65_536, 2**31 - 1, 2**31, 2**32, 2**63 - 1, 2**63, 2**64, -(2**63), 10**30, 10**400),
    *(0.0, -0.0, 1e-320, 0.5, 1.5, 1e308, float("inf"), float("-inf"), float("nan")),
)
TEXTS = (
    *("", " ", ".", "..", "../../outside", "/etc/passwd", "/dev/null", "/proc/self/mem", "a/b", "a\nb"),
    *("a\x00b", "a\tb"),
    *("x" * 129, "x" * 5000, "-rf", "~", "~/x", "$HOME", "%s%n", "'; --", "\ud800", "\u202e", "\ufeff", "é"),
    *("null", "latest"),
    *("${oc.env:HOME}", "${oc.create:{a: 1}}", "${oc.decode:3}", "${seed}", "${run_name}", "${.seed}"),
    *("${...x}", "${", "${}"),
    *("${${seed}}", "${a" + "[0]" * 50 + "}", "${" * 200 + "}" * 200, "\\${seed}", "???"),
    *("${oc.dict.keys:data}", "${data}"),
    *("digits", "folder", "cifar10", "synthetic", "resnet18", "vit_b_16", "resnet_digits", "sgd", "adamw"),
    *("auto", "mps"),
    *("true", "yes", "1e3", "0x10", "1_000", "12:30:45", "2001-01-01", "!!python/name:os.system", "&a [*a]"),
    *("*a", "{a: 1", "[[["),
    *("!!python/object/apply:os.system ['touch PWNED']", "!!binary aGk=", "!!set {a, b}"),
    *("!!timestamp 2001-01-01", "!!float x"),
    *("!!int x", "!!null x", "!!omap [a: 1]", "<<: {a: 1}", "{<<: [{a: 1}, 2]}"),
    *("{1: 2, null: 3, [1]: 4, 2.5: x}", "? a"),
    "[&a0 [1,1,1,1,1,1,1,1,1,1]" + "".join(f",&a{i} [{','.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 10)) + "]",
    "[" * 400 + "]" * 400, "{a: " * 200 + "1" + "}" * 200,
)  # fmt: skip
LAUGHS = "\nl0: " + "ha" * 50 + "".join(f"\nl{i}: ${{l{i - 1}}}${{l{i - 1}}}" for i in range(1, 40)) + "\n"
SNIPPETS = (
    LAUGHS,
    "\nl0: [1]" + "".join(f"\nl{i}: [${{l{i - 1}}}, ${{l{i - 1}}}]" for i in range(1, 40)) + "\n",
    "\nb0: &b0 [1]\n" + "".join(f"b{i}: &b{i} [{', '.join([f'*b{i - 1}'] * 10)}]\n" for i in range(1, 10)),
    "\nm0: &m0 {a: 1}\n" + "".join(f"m{i}: &m{i} {{<<: [{', '.join([f'*m{i - 1}'] * 10)}]}}\n" for i in range(1, 10)),
    "\nx: &x [*x]\n", "\nx: &x {<<: *x}\n", "\nx: " + "[" * 3000 + "]" * 3000, "\nx:" + " {a:" * 900 + " 1" + "}" * 900,
    "\n%YAML 9.9\n---\n", "\n---\nseed: 1\n", "\n...\n",
    "\n%TAG ! tag:yaml.org,2002:python/\n--- !object/apply:os.system [x]\n",
    "\nx: !!python/object/apply:os.system ['touch PWNED']\n", "\n!!python/object/new:os.system ['touch PWNED']\n",
    "\nx: !!python/module:os\n", "\nx: !<tag:yaml.org,2002:python/name:os.system> \n", "\nx: !unknown {a: 1}\n",
    "\nseed: 1\nseed: 2\n", "\n? [a, b]\n: 1\n", "\n? {a: 1}\n: 1\n", "\n1: 2\nnull: 3\ntrue: 4\n2.5: x\n",
    "\nx: 2001-01-01\n",
    "\x00", "\x07", "\t- x", "\r", "\x85", "\u2028", "\ufeff", "\nx: |\n  " + "y" * 100_000, "\nx: '" + "\\x00" * 10,
    "\nx: " + "9" * 5000, "\nx: 0x" + "f" * 5000, "\nx: 1" + ":59" * 3000, "\nx: " + "1" * 3000 + ".e9",
    "\nx: !!float " + "9" * 9,
    "\nrun_name: ../../outside\n", "\nresults_dir: null\n", "\ndata: {source: ${data.source}}\n", "\ndata: ${data}\n",
)  # fmt: skip

scalars = st.one_of(
    st.sampled_from(NUMBERS), st.sampled_from(TEXTS), st.none(), st.booleans(), st.integers(), st.floats(),
    st.text(max_size=30), st.dates(), st.binary(max_size=20),
)  # fmt: skip


def _like(value: Any) -> st.SearchStrategy[Any]:
    if isinstance(value, bool):
        return st.sampled_from(["true", "false"])
    if isinstance(value, int):
        return st.integers(0, 40) | st.sampled_from(NUMBERS) | st.integers(1, 10**9)
    if isinstance(value, float):
        return st.floats(0, 2) | st.sampled_from(NUMBERS)
    if isinstance(value, list):
        return st.lists(st.floats(0, 2) | st.integers(0, 9), max_size=4)
    return st.sampled_from(["null", "{}", "auto", *TEXTS])


keys = st.sampled_from([*KEYS, "name", "epochs", "image_size"]) | st.text(max_size=8) | st.integers(-3, 3)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(keys, inner, max_size=4),
    max_leaves=8,
)
override_texts = (
    st.sampled_from(TEXTS)
    | st.sampled_from(NUMBERS).map(str)
    | st.text(max_size=40)
    | values.map(lambda value: yaml.dump(value, default_flow_style=True).strip()[:3000])
)
# Of the kind that a key has, so that one gets further than to the check of types.
likely = st.sampled_from(sorted(key for key, value in flat_keys(SETTINGS).items())).flatmap(
    lambda key: st.tuples(st.just(key), _like(flat_keys(SETTINGS)[key]))
)
overrides = st.one_of(
    st.lists(likely.map("{0[0]}={0[1]}".format), min_size=1, max_size=3, unique_by=lambda text: text.partition("=")[0]),
    st.lists(
        st.builds("{}={}".format, st.sampled_from(KEYS) | st.text(max_size=20), override_texts) | st.text(max_size=20),
        min_size=1, max_size=3,
    ),
)  # fmt: skip


@st.composite
def changed_recipes(draw: st.DrawFn) -> bytes:
    """The digits' recipe with values of any type in a few places."""
    changed = yaml.safe_load(DIGITS.read_text())
    for _ in range(draw(st.integers(1, 3))):
        *path, last = draw(st.sampled_from([key for key in KEYS if "[" not in key])).split(".")
        inner = changed
        for name in path:
            inner = inner[name] if isinstance(inner, dict) and isinstance(inner.get(name), dict) else inner
        if isinstance(inner, dict):
            inner[last] = draw(values)
    return yaml.dump(changed, allow_unicode=draw(st.booleans())).encode(errors="surrogatepass")


@st.composite
def changed_texts(draw: st.DrawFn) -> bytes:
    """The digits' recipe as a text, with something put into it, cut or written over."""
    text = DIGITS.read_bytes()
    for _ in range(draw(st.integers(1, 2))):
        at = draw(st.integers(0, len(text)))
        piece = draw(st.sampled_from(SNIPPETS).map(str.encode) | st.binary(max_size=8))
        end = at + draw(st.sampled_from([0, 0, len(piece), 40]))
        text = text[:at] + piece + text[end:]
    return text if draw(st.booleans()) else text[: draw(st.integers(0, len(text)))]


recipes = st.one_of(
    st.tuples(st.just(DIGITS.read_bytes()), overrides),
    st.tuples(changed_recipes(), st.just([])),
    st.tuples(changed_texts(), st.just([])),
)


def plan(recipe: tuple[bytes, list[str]]) -> None:
    """As run.py does with --plan. Raises AssertionError for an outcome that is neither a plan nor a line."""
    content, given_overrides = recipe
    path = ROOM / "recipe.yaml"
    path.write_bytes(content)
    try:
        with limited_seconds():
            plan_text(load_recipe(path, given_overrides))
        OUTCOMES["a plan"] += 1
        return
    except RecipeError as error:
        text = str(error)
        refused = error
    finally:
        path.unlink()
    text = str(refused)
    if not (text.isprintable() and len(text) < 20_000) or "can't allocate memory" in text:
        raise AssertionError(f"no line that one can read: {text[:2000]!r}")
    OUTCOMES["refused in one line"] += 1


def contents(folder: Path) -> dict[str, Any]:
    """The files and folders below, with their sizes."""
    return {str(path.relative_to(folder)): path.lstat().st_size for path in sorted(folder.rglob("*"))}


if __name__ == "__main__":
    count, (folder,) = arguments()
    os.environ["HOME"] = folder
    os.chdir(folder)
    ROOM.mkdir(exist_ok=True)
    leave_out_compiler()
    plan_text(load_recipe(DIGITS))  # whatever is imported or written once
    before = contents(Path(folder))
    run(count, plan, given(recipes), OUTCOMES)
    after = contents(Path(folder))
    assert after == before, f"written: {sorted(after.items() ^ before.items())}"
