"""Every mistake in a recipe gives a one-line error with the file, the key, the given value and what is allowed."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from training.recipe import RecipeError, load_recipe

ROOT = Path(__file__).parents[3]
DIGITS = ROOT / "yamls" / "digits_medium.yaml"

# Ten aliases a line, nine lines: a billion values in 300 bytes.
BOMB = "\nb0: &b0 [1]\n" + "".join(f"b{i}: &b{i} [{', '.join([f'*b{i - 1}'] * 10)}]\n" for i in range(1, 10))
# Each line is twice as long as the one before.
LAUGHS = "\nl0: ha" + "".join(f"\nl{i}: ${{l{i - 1}}}${{l{i - 1}}}" for i in range(1, 40)) + "\n"


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("modle.name=resnet18", ["modle: unknown key", "did you mean model?"]),
        ("data.train.image_siz=3", ["data.train.image_siz: unknown key (given 3)", "did you mean image_size?"]),
        ("data.train.image_size=large", ["data.train.image_size: is 'large'; it must be a whole number"]),
        ("data.train.image_size=12.5", ["data.train.image_size: is 12.5; it must be a whole number"]),
        ("data.train.image_size=0", ["data.train.image_size: is 0; it must be at least 1"]),
        ("data.train.image_size=null", ["data.train.image_size: is null; it must be a whole number"]),
        ("data.train.loader=fcv", ["data.train.loader: is 'fcv'", "one of auto, ffcv, torch", "did you mean ffcv?"]),
        ("data.train.crop_scale=[0.5]", ["data.train.crop_scale: is [0.5]", "a list of 2 values"]),
        ("data.train.crop_ratio=1.5", ["data.train.crop_ratio: is 1.5; it must lie in (0, 1]"]),
        ("data.train.crop_ratio=0.875", ["data.train.crop_ratio: is 0.875 beside crop_scale and crop_aspect_ratio"]),
        ("data.train.sizes=[256,256]", ["data.train.sizes: sizes 256, 256: give different longest sides in px"]),
        ("data.train.sizes=[]", ["data.train.sizes: sizes (none): give different longest sides in px"]),
        ("data.train.sizes=256", ["data.train.sizes: is 256; it must be a list, each item a whole number"]),
        ("data.train.tier_headroom=0.5", ["data.train.tier_headroom: is 0.5; it must be at least 1"]),
        ("data.train.batches_ahead=0", ["data.train.batches_ahead: batches_ahead 0: give auto or a whole number"]),
        (
            "data.train.batches_ahead=many",
            ["data.train.batches_ahead: batches_ahead many: give auto or a whole"],
        ),
        ("data.train.per_device_batch_size=3", ["data.train: global_batch_size is 64", "give exactly one"]),
        ("data.source.name=digit", ["data.source.name: 'digit' is no source", "did you mean digits?"]),
        ("data.source.eval_fracton=0.1", ["data.source.eval_fracton: unknown key", "did you mean eval_fraction?"]),
        ("model.name=resnet5", ["model.name: unknown model 'resnet5'", "did you mean resnet50?"]),
        ("model.widht=3", ["model.widht: unknown key", "did you mean width?"]),
        ("model=3", ["model.name: is missing (given 3)"]),
        ("algorithms.mixupp={}", ["algorithms.mixupp: 'mixupp' is no algorithm", "did you mean mixup?"]),
        ("algorithms.mixup.alpa=1", ["algorithms.mixup.alpa: unknown key (given 1)", "did you mean alpha?"]),
        ("algorithms.mixup.alpha=much", ["algorithms.mixup.alpha: is 'much'; it must be a number"]),
        ("algorithms.sam.rho=-1", ["algorithms.sam: sam.rho is -1"]),
        ("algorithms.sam.perturbation=locl", ["algorithms.sam.perturbation: is 'locl'", "global, per_rank"]),
        ("algorithms=3", ["algorithms: is 3; it must be a mapping"]),
        (
            "algorithms.progressive_resizing.stages=[{epochs: 1, imag_size: 3}]",
            ["algorithms.progressive_resizing.stages[0].imag_size: unknown key", "did you mean image_size?"],
        ),
        (
            "algorithms.progressive_resizing.stages=[{epochs: 1}]",
            ["algorithms.progressive_resizing.stages[0].image_size: is missing; give a whole number"],
        ),
        ("optimizer.name=sdg", ["optimizer.name: 'sdg' is no optimizer", "did you mean sgd?"]),
        ("optimizer.learning_rate=fast", ["optimizer.learning_rate: is 'fast'; it must be a number"]),
        ("schedule.decay=cosin", ["schedule.decay: is 'cosin'", "did you mean cosine?"]),
        ("schedule.decay=step", ["schedule: decay: step needs milestones_epochs"]),
        ("precision=bf16", ["precision: is 'bf16'", "did you mean amp_bf16?"]),
        ("parallelism.strategy=dpp", ["parallelism.strategy: is 'dpp'", "did you mean ddp?"]),
        ("checkpoints.every_epochs=0", ["checkpoints.every_epochs: is 0; it must be at least 1"]),
        ("run_name=a/b", ["run_name: is 'a/b'"]),
        ("run_name=..", ["run_name: is '..'"]),
        ("run_name=.", ["run_name: is '.'"]),
        ("run_name=.hidden", ["run_name: is '.hidden'"]),
        ('run_name="a\\nb"', ["run_name: is 'a\\nb'"]),
        (f"run_name={'a' * 129}", ["run_name: is 'aaa", "at most 128"]),
        ("run_name=${oc.env:HOME}", ["run_name: has ${oc.env:HOME}", "let the shell fill it in: run_name=$NAME"]),
        ("data.cache_dir=/x/${oc.decode:'3'}/y", ["data.cache_dir: has ${oc.decode:"]),
        ("data.train.augmentations={}", ["data.train.augmentations: is {}; it must be a list"]),
        ("data.train=[1,2]", ["data.train: cannot be [1,2]: "]),
        ("algorithms=[1]", ["algorithms: cannot be [1]: "]),
        ("algorithms.progressive_resizing.stages[7].epochs=3", ["stages[7].epochs: cannot be 3: "]),
        ("seed=-1", ["seed: is -1; it must lie in [0, 4294967295]"]),
        ("duration.epochs=1000000000", ["duration.epochs: is 1000000000; it must lie in [1, 1000000]"]),
        ("data.train.flip=mirror", ["data.train.flip: is 'mirror'; it must be one of random, alternating, none"]),
        ("data.train.flip=alternating", ["data.train.flip: flip probability 0.0 beside flip 'alternating'", "set it"]),
        ("data.train.sampler=balance", ["data.train.sampler: is 'balance'", "did you mean balanced?"]),
        ("loss=focal", ["loss.name: is 'focal'; it must be one of cross_entropy, binary_cross_entropy"]),
        ("loss.class_weights=equal", ["loss.class_weights: is 'equal'; it must be auto, none, or a list"]),
        ("loss.class_weights=[1,true]", ["loss.class_weights: is [1, True]; it must be auto"]),
        ("loss.class_weights=[1,-1]", ["loss.class_weights: class weights 1, -1: give a finite number of at least 0"]),
        ("loss.weights=auto", ["loss.weights: unknown key", "allowed: name, class_weights"]),
        ("data.train.num_workers=-1", ["data.train.num_workers: is -1; it must be at least 0"]),
        ("seed", ["seed: an override has the form key=value"]),
    ],
)
def test_a_mistake_is_one_line_that_names_it(override: str, says: list[str]) -> None:
    with pytest.raises(RecipeError) as error:
        load_recipe(DIGITS, [override])
    text = str(error.value)
    assert text.startswith(f"{DIGITS}: ")
    assert "\n" not in text
    for part in says:
        assert part in text


@pytest.mark.parametrize(("key", "given"), [("path", "x.beton"), ("loader", "torch")])
def test_sizes_belong_to_files_that_are_written_here(key: str, given: str) -> None:
    with pytest.raises(RecipeError, match=rf"data.train.sizes: is \[8, 16\] beside data.train.{key}: {given}, for"):
        load_recipe(DIGITS, ["data.train.sizes=[8,16]", f"data.train.{key}={given}"])
    assert load_recipe(DIGITS, ["data.train.sizes=[8,16]", "smoke=true"]).data.train.sizes is None


@pytest.mark.parametrize(
    ("asked", "as_written"), [("load=latest", "load: latest"), ("autoresume=true", "autoresume: true")]
)
def test_a_run_is_continued_under_its_own_name_only(asked: str, as_written: str) -> None:
    with pytest.raises(RecipeError, match=f"run_name_taken: is next, and {as_written} continues"):
        load_recipe(DIGITS, ["run_name_taken=next", asked])


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda text: text + "\nseed: 1\n", "found duplicate key seed"),
        (lambda text: text.replace("run_name: digits_medium\n", ""), "run_name: is missing; give text"),
        (lambda text: text.replace("learning_rate: 0.2, ", ""), "optimizer: learning_rate is None and learning"),
        (lambda text: text + "\n  - [", "while parsing"),
        (lambda text: "- a\n- b\n", "is not a mapping"),
        (lambda text: text.replace("seed: 0", "seed: ${sed}"), "sed"),
        (lambda text: text.replace("seed: 0", "seed: ${oc.env:SEED}"), "seed: has ${oc.env:SEED}"),
        (lambda text: text.replace("  sam: {", "  7: {"), "algorithms.7: 7 is no algorithm"),
        (lambda text: text + "\nx: 0x" + "f" * 5000, "x: is a whole number of 20000 bits"),
        (lambda text: text + LAUGHS, "has one reference ${...} more than the 8 of a recipe"),
        (lambda text: text + "\n# " + "a" * 1_000_000, "has more than 1,000,000 bytes"),
        (lambda text: text + "\nx:" + " {a:" * 60 + " 1" + "}" * 60, "is nested too deeply for a recipe"),
        (lambda text: text + '\n"a\\x07\\Lb": 1\n', "a\\x07\\u2028b: unknown key"),
        (lambda text: text + BOMB, "stands for more than 20,000 values"),
        (lambda text: text + "\nx: &x [*x]\n", "stands for more than 20,000 values"),
        (lambda text: text + "\nx: " + "[" * 3000 + "]" * 3000 + "\n", "is nested too deeply"),
        (lambda text: text.replace("seed: 0", "seed: !!python/object/apply:os.system [true]"), "python/object"),
    ],
)
def test_a_broken_file_is_one_line(tmp_path: Path, change, says: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(change(DIGITS.read_text()))
    with pytest.raises(RecipeError) as error:
        load_recipe(path)
    assert str(error.value).startswith(f"{path}: ")
    assert "\n" not in str(error.value)
    assert says in str(error.value)


def test_an_item_of_a_list_is_named_by_its_index() -> None:
    recipe = load_recipe(DIGITS, ["algorithms.progressive_resizing.stages[0].image_size=14"])
    stages = recipe.algorithms["progressive_resizing"]["stages"]
    assert [stage["image_size"] for stage in recipe.settings["algorithms"]["progressive_resizing"]["stages"]] == [
        14, 16, 20,
    ]  # fmt: skip
    assert len(stages) == 3


def test_a_missing_file_and_a_key_given_twice_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="no such file"):
        load_recipe(tmp_path / "none.yaml")
    with pytest.raises(RecipeError, match="seed: given twice"):
        load_recipe(DIGITS, ["seed=1", "seed=2"])


def test_a_number_with_an_exponent_is_a_number(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(DIGITS.read_text().replace("weight_decay: 5.0e-4", "weight_decay: 1e-3"))
    assert load_recipe(path).optimizer["weight_decay"] == 1e-3
    assert load_recipe(DIGITS, ["optimizer.weight_decay=1e-3"]).optimizer["weight_decay"] == 1e-3


@pytest.mark.parametrize(
    ("section", "short", "override", "parsed"),
    [
        ("model", "resnet18", "model.weights=best.pt", ("model", "weights", "best.pt")),
        ("model", "resnet_digits", "model.width=32", ("model", "width", 32)),
        ("optimizer", "sgd", "optimizer.learning_rate=0.5", ("optimizer", "learning_rate", 0.5)),
        ("source", "digits", "data.source.eval_fraction=0.3", ("data", "source", "eval_fraction", 0.3)),
    ],
)
def test_a_name_alone_takes_overrides_as_a_mapping_does(
    tmp_path: Path, section: str, short: str, override: str, parsed: tuple
) -> None:
    settings = yaml.safe_load(DIGITS.read_text())
    settings["optimizer" if section == "optimizer" else "model"] = {"optimizer": "sgd"}.get(section, "resnet_digits")
    if section == "source":
        settings["data"]["source"] = short
    elif section == "model":
        settings["model"] = short
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(settings))
    rate = ["optimizer.learning_rate=0.5"] if section == "optimizer" else []
    found = load_recipe(path, list(dict.fromkeys([override, *rate]))).settings
    *keys, expected = parsed
    for key in keys:
        found = found[key]
    assert found == expected
    # The same where the name itself comes from the command line.
    where = {"source": "data.source"}.get(section, section)
    again = load_recipe(DIGITS, list(dict.fromkeys([f"{where}=null", f"{where}.name={short}", override, *rate])))
    once = load_recipe(DIGITS, list(dict.fromkeys([f"{where}={short}", override, *rate])))
    assert once.settings[where.partition(".")[0]] == again.settings[where.partition(".")[0]]


def test_a_loss_is_a_name_or_a_mapping(tmp_path: Path) -> None:
    plain = load_recipe(DIGITS, ["loss.class_weights=none"])
    assert (plain.loss, plain.class_weights, plain.settings["loss"]) == ("cross_entropy", None, "cross_entropy")
    weighted = load_recipe(DIGITS, ["loss=binary_cross_entropy", "loss.class_weights=auto"])
    assert (weighted.loss, weighted.class_weights) == ("binary_cross_entropy", "auto")
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(weighted.settings))
    assert load_recipe(path).settings == weighted.settings
    assert load_recipe(path, ["loss.class_weights=[1, 0.5]"]).class_weights == [1, 0.5]
    with pytest.raises(RecipeError, match=r"loss.class_weights: is auto, and data.train.sampler is balanced: .* twice"):
        load_recipe(path, ["data.train.sampler=balanced"])
    assert load_recipe(path, ["data.train.sampler=balanced", "loss.class_weights=none"]).class_weights is None


def test_toggling() -> None:
    plain = load_recipe(DIGITS).algorithms
    assert sorted(plain) == [
        "blurpool", "channels_last", "fixres", "label_smoothing", "mixup", "progressive_resizing", "sam",
    ]  # fmt: skip
    off = load_recipe(DIGITS, ["algorithms.sam=null"]).algorithms
    assert sorted({*plain} - {*off}) == ["sam"]
    assert load_recipe(DIGITS, ["algorithms.mixup.alpha=0.1"]).algorithms["mixup"]["alpha"] == 0.1
    # A setting turns on what a recipe has off, with every other setting at its default.
    again = load_recipe(DIGITS, ["algorithms=null", "algorithms.mixup.alpha=0.3"]).algorithms
    assert list(again) == ["mixup"]
    assert again["mixup"]["alpha"] == 0.3
    assert load_recipe(DIGITS, ["algorithms=null"]).algorithms == {}
    assert load_recipe(DIGITS, ["algorithms.label_smoothing={}"]).algorithms["label_smoothing"]["smoothing"] == 0.1


def test_the_settings_written_down_give_the_same_recipe(tmp_path: Path) -> None:
    recipe = load_recipe(DIGITS, ["algorithms.sam=null", "seed=3"])
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe.settings))
    again = load_recipe(path)
    assert again.settings == recipe.settings
    assert again.algorithms == recipe.algorithms
