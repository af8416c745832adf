"""The algorithms' pages: their Python blocks run, their recipes build, and their defaults match the code."""

import inspect
import re
from pathlib import Path

import pytest
import torch
import yaml

from algos.framework import registry

PAGES = Path(__file__).parents[2] / "docs" / "algorithms"
NAMES = [
    "blurpool",
    "channels_last",
    "cutmix",
    "distillation",
    "ema",
    "fixres",
    "label_smoothing",
    "mixup",
    "patch_dropout",
    "progressive_resizing",
    "randaugment",
    "sam",
    "selective_backprop",
    "stochastic_depth",
]


def blocks(name, language):
    found = re.findall(rf"^```{language}\n(.*?)^```$", (PAGES / f"{name}.md").read_text(), re.MULTILINE | re.DOTALL)
    assert found
    return found


@pytest.mark.parametrize("name", NAMES)
def test_python_blocks_run_as_they_stand(name):
    torch.manual_seed(0)
    for block in blocks(name, "python"):
        exec(compile(block, f"{name}.md", "exec"), {})


@pytest.mark.parametrize("name", NAMES)
def test_recipes_build(name):
    for block in blocks(name, "yaml"):
        algorithms = yaml.safe_load(block)["algorithms"]
        assert name in algorithms
        for algorithm, settings in algorithms.items():
            registry.find(algorithm)(**settings)


@pytest.mark.parametrize("name", NAMES)
def test_every_setting_is_in_the_table(name):
    page = (PAGES / f"{name}.md").read_text()
    for setting, parameter in inspect.signature(registry.find(name)).parameters.items():
        row = next((line for line in page.splitlines() if line.startswith("|") and f"`{setting}`" in line), None)
        assert row, setting
        if isinstance(parameter.default, (int, float, str)):
            assert str(parameter.default).lower() in row.split("|")[2], setting


@pytest.mark.parametrize("name", [*NAMES, "learning_rate"])
def test_every_page_has_the_same_sections_in_the_same_order(name):
    found = re.findall(r"^## (.*)$", (PAGES / f"{name}.md").read_text(), re.MULTILINE)
    assert found == [
        "Use",
        "Settings",
        "Details",
        "Cost",
        "Measured effect",
        "With other algorithms",
        "Source",
    ]
