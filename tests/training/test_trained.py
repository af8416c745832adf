"""load_trained where a state dict does not say all: the layer norms of a ViT that started from published weights."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from models.vit import vit_digits
from training import session
from training.trained import load_trained


@pytest.mark.slow
@pytest.mark.timeout(150)
def test_a_vits_norms_keep_the_epsilon_of_its_weights(short_recipe: Any, tmp_path: Path, caplog) -> None:
    transformers = pytest.importorskip("transformers")
    network = vit_digits(num_classes=10)
    size = {
        "hidden_size": network.class_token.shape[-1],
        "num_hidden_layers": len(network.encoder.layers),
        "num_attention_heads": network.encoder.layers[0].self_attention.num_heads,
        "intermediate_size": network.encoder.layers[0].mlp[0].out_features,
    }
    shape = {"image_size": 32, "patch_size": network.patch_size}
    config = transformers.ViTConfig(**size, **shape, layer_norm_eps=0.05, num_labels=10)
    published = tmp_path / "published"
    transformers.ViTForImageClassification(config).save_pretrained(published)
    recipe = short_recipe(
        "algorithms=null", "model=null", "model.name=vit_digits", f"model.weights={published}", "duration.epochs=1",
        "schedule.warmup_epochs=0", "data.train.image_size=32", "data.eval.image_size=32",
    )  # fmt: skip
    session.train(recipe, say=lambda text: None)

    norms = [one for one in load_trained(recipe.run_dir).network.modules() if isinstance(one, nn.LayerNorm)]
    assert {norm.eps for norm in norms} == {0.05}
    shutil.rmtree(published)
    norms = [one for one in load_trained(recipe.run_dir).network.modules() if isinstance(one, nn.LayerNorm)]
    assert {norm.eps for norm in norms} == {1e-6}
    assert "layer norms' epsilon is torchvision's" in caplog.text
