"""Export a run's network: weights or a graph, class names, preprocessing and a model card in one folder."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from training.command_line import add_run, carry_out, complain

_NAMES = ("safetensors", "torch", "onnx", "hf", "torchscript")  # exporting.formats has them too, and imports torch

_EXAMPLES = """\
formats
  safetensors   weights for torchvision's or timm's own network, or for this project's
  torch         a torch.export program (model.pt2): any network, BlurPool included, and any batch
  onnx          a graph for ONNX Runtime: any batch, and any image size where the network allows it
  hf            a folder for transformers (hf.*, ViTs) or for timm and transformers (timm.*, torchvision's ResNets)
  torchscript   a trace for torch.jit.load, C++ included

examples
  python -m training.export results/digits_medium --to onnx                     into results/digits_medium/export/onnx
  python -m training.export results/digits_medium --to torch -o digits_pt2      into a folder of your own
  python -m training.export results/vit/checkpoints/ep10.pt --to hf             another checkpoint than the best
  python -m training.export results/digits_medium --to onnx --push-to-hub me/digits   prints how to upload it

RUN is a run's folder, for its best checkpoint, or one of its checkpoints. EMA's averages are exported if there are any.
Each export is loaded again by another process that cannot import this project, and compared with the network.
Exit status: 0 done, 1 the export differs from the network, 2 a mistake on the command line, 130 stopped with Ctrl-C."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    options = _parser().parse_args(arguments)
    return carry_out("export", lambda: _export(options))


def _export(options: argparse.Namespace) -> int:
    from training.exporting.checking import NotTheSame
    from training.exporting.export_run import export_run, upload_command

    try:
        made = export_run(options.run, options.to, options.output, trust_checkpoint=options.trust_checkpoint, say=_say)
    except NotTheSame as error:
        return complain("export", str(error), status=1)
    _say(made.checked)
    _say(f"{made.folder}/: {', '.join(sorted(path.name for path in made.folder.iterdir()))}")
    if options.push_to_hub is not None:
        _say(f"to upload it:\n  {upload_command(made.folder, options.push_to_hub)}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m training.export",
        description=__doc__,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_run(parser)
    parser.add_argument("--to", required=True, choices=_NAMES, help="the format")
    parser.add_argument("-o", "--output", type=Path, metavar="FOLDER", help="a new folder; RUN/export/FORMAT otherwise")
    parser.add_argument(
        "--push-to-hub",
        nargs="?",
        const="OWNER/NAME",
        metavar="OWNER/NAME",
        help="print the command that uploads the folder to the Hugging Face hub; nothing is sent",
    )
    return parser


def _say(text: str) -> None:
    print(text, flush=True)


if __name__ == "__main__":
    sys.exit(main())
