"""The formats of an export: what each writes into a folder, and the Python that loads it again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from training.exporting import graphs
from training.exporting.hugging_face import CONFIG_FILE, WEIGHTS_FILE, save_weights, write_timm, write_transformers
from training.exporting.rebuild import as_here, as_torchvision, library_name
from training.exporting.samples import Samples
from training.trained import Trained

_LOAD_WEIGHTS = 'load_file("model.safetensors")'


@dataclass(frozen=True)
class Written:
    """What was written, and how to read it.

    file: the one that holds the weights.
    code: Python that makes `network`, a function from normalized images to logits, with the folder as the current one.
    arrays: whether it takes and gives torch's tensors or NumPy's arrays.
    requires: distributions that the code needs.
    library: the hub's word for who reads it (library_name in a model card).
    any_size: whether it takes images of any size; None where that is up to the library's network.
    needs_project: whether the code needs this project's package.
    """

    file: str
    code: str
    requires: tuple[str, ...]
    library: str
    arrays: Literal["torch", "numpy"] = "torch"
    any_size: bool | None = None
    needs_project: bool = False


def write(format_name: str, trained: Trained, folder: Path, samples: Samples) -> Written:
    """Write the network into `folder`. Raises ValueError for a network that the format cannot take."""
    return FORMATS[format_name](trained, folder, samples)


def _write_safetensors(trained: Trained, folder: Path, samples: Samples) -> Written:
    library, _ = library_name(trained)
    if library == "timm" and write_timm(trained, folder, samples):
        code = 'import timm\n\nnetwork = timm.create_model("local-dir:.", pretrained=True).eval()'
        return Written(WEIGHTS_FILE, code, ("timm", "torch"), "timm")
    if library == "hf":
        return _write_hf(trained, folder, samples)
    for rebuild, requires in ((as_torchvision, ("torchvision",)), (as_here, ("brisk-vision",))):
        rebuilt = rebuild(trained, samples)
        if rebuilt is None:
            continue
        ours = rebuild is as_here
        state = {name: value.contiguous().clone() for name, value in rebuilt.network.state_dict().items()}
        save_weights(state, folder)
        code = f"from safetensors.torch import load_file\n{rebuilt.code}\n"
        code += f"network.load_state_dict({_LOAD_WEIGHTS}, strict=True)\nnetwork.eval()"
        needs = ("safetensors", "torch", *requires)
        return Written(WEIGHTS_FILE, code, needs, "brisk" if ours else "pytorch", needs_project=ours)
    raise ValueError(
        f"safetensors holds weights alone, and {_described(trained)} is rebuilt by its recipe only; "
        "give --to torch, onnx or torchscript, which carry the graph, or take the bare weights with "
        "python -m training.checkpoints.export"
    )


def _write_hf(trained: Trained, folder: Path, samples: Samples) -> Written:
    try:
        import transformers  # noqa: F401
    except ModuleNotFoundError:
        raise ValueError("an export for transformers needs it: pip install 'brisk-vision[hf]'") from None
    call = write_transformers(trained, folder, samples)
    if call is None:
        raise ValueError(
            f"transformers and timm have no network that computes what {_described(trained)} does; give --to torch, "
            "onnx or torchscript, which carry the graph (hf takes hf.*, timm.*, torchvision's ResNets and ViTs, "
            "without BlurPool)"
        )
    code = f"""\
from transformers import AutoModelForImageClassification

model = AutoModelForImageClassification.from_pretrained(".").eval()


def network(images):
    return model(pixel_values=images{call}).logits"""
    through_timm = '"architecture"' in (folder / CONFIG_FILE).read_text()
    requires = ("transformers", "torch", *(("timm",) if through_timm else ()))
    return Written(WEIGHTS_FILE, code, requires, "timm" if through_timm else "transformers")


def _write_torch(trained: Trained, folder: Path, samples: Samples) -> Written:
    any_size = graphs.write_program(trained.network, samples.images, folder / "model.pt2")
    code = 'import torch\n\nnetwork = torch.export.load("model.pt2").module()'
    return Written("model.pt2", code, ("torch",), "pytorch", any_size=any_size)


def _write_torchscript(trained: Trained, folder: Path, samples: Samples) -> Written:
    any_size = graphs.write_torchscript(trained.network, samples.images, folder / "model.ts")
    code = 'import torch\n\nnetwork = torch.jit.load("model.ts")'
    return Written("model.ts", code, ("torch",), "pytorch", any_size=any_size)


def _write_onnx(trained: Trained, folder: Path, samples: Samples) -> Written:
    any_size = graphs.write_onnx(trained.network, samples.images, folder / "model.onnx")
    code = """\
import onnxruntime

session = onnxruntime.InferenceSession("model.onnx")


def network(images):
    return session.run(["logits"], {"images": images})[0]"""
    return Written("model.onnx", code, ("onnxruntime", "numpy"), "onnx", arrays="numpy", any_size=any_size)


def _described(trained: Trained) -> str:
    changed = [name for name in trained.recipe.algorithms if name == "blurpool" or name.startswith("composer.")]
    return f"{trained.recipe.model['name']}{' with ' + ', '.join(changed) if changed else ''}"


FORMATS: dict[str, Callable[[Trained, Path, Samples], Written]] = {
    "safetensors": _write_safetensors,
    "torch": _write_torch,
    "onnx": _write_onnx,
    "hf": _write_hf,
    "torchscript": _write_torchscript,
}
