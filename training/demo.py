"""Try a run's network on a picture: a page on this machine with its answers, and what shifting the picture does."""

from __future__ import annotations

import argparse
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from training.command_line import add_run, carry_out, complain

_EXAMPLES = """\
examples
  python demo.py results/digits_medium                                        a page on http://127.0.0.1:7860
  python demo.py results/digits_medium --against results/digits_medium_speedups_off    two networks side by side
  python demo.py results/digits_medium --host 0.0.0.0 --port 8000             for other machines too
  python demo.py results/digits_medium --export my_space                      a Hugging Face Space, to upload

RUN is a run's folder, for its best checkpoint, or one of its checkpoints. The page loads nothing from the network and
sends nothing anywhere; pictures are removed after ten minutes.
Exit status: 0 the Space was written, 1 its graph differs from the network, 2 a mistake on the command line, 130 stopped
with Ctrl-C."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    options = _parser().parse_args(arguments)
    return carry_out("demo.py", lambda: _show(options))


def _show(options: argparse.Namespace) -> int:
    from training.exporting.checking import NotTheSame
    from training.exporting.space import distinct_names

    try:
        import gradio  # noqa: F401  # pyright: ignore[reportMissingImports]
    except ModuleNotFoundError:
        return complain("demo.py", "the page needs gradio: pip install 'brisk-vision[demo-page]'")
    try:
        runs = _load(options)
        title = " against ".join(distinct_names(runs))
        if options.export is not None:
            return _write_space(runs, options.export, title=title)
        return _serve(runs, options, title=title)
    except NotTheSame as error:
        return complain("demo.py", str(error), status=1)


def _load(options: argparse.Namespace) -> list[Any]:
    """The runs to show. Raises ValueError if they do not have the same classes."""
    from training.trained import load_trained

    sources = [options.run, *([options.against] if options.against is not None else [])]
    runs = [load_trained(source, trust_checkpoint=options.trust_checkpoint) for source in sources]
    first, *others = runs
    for other in others:
        if other.class_names != first.class_names:
            raise ValueError(
                f"--against {options.against} has other classes ({len(other.class_names)}) than {options.run} "
                f"({len(first.class_names)}); give a run on the same data"
            )
    return runs


def _serve(runs: Sequence[Any], options: argparse.Namespace, *, title: str) -> int:
    from training.exporting.page import build_page, launch
    from training.exporting.space import distinct_names

    networks = [_classifier(run, name) for run, name in zip(runs, distinct_names(runs), strict=True)]
    page = build_page(networks, title=title)
    address = launch(page, host=options.host, port=options.port, wait=False)
    print(f"{address} (Ctrl-C stops it)", flush=True)
    try:
        threading.Event().wait()
    finally:
        page.close(verbose=False)
    return 0


def _write_space(runs: Sequence[Any], target: Path, *, title: str) -> int:
    from training.exporting.export_run import upload_command
    from training.exporting.space import write_space

    write_space(runs, target, title=title)
    print(f"{target}/: {', '.join(sorted(path.name for path in target.iterdir()))}")
    print(f"try it:\n  python {target / 'app.py'}")
    print(f"to upload it:\n  {upload_command(target, 'OWNER/NAME')} --repo-type space", flush=True)
    return 0


def _classifier(run: Any, name: str) -> Any:
    """The run's network for the page, in torch."""
    from dataclasses import asdict

    import torch

    from training.exporting.export_run import as_exported
    from training.exporting.page import Classifier

    trained = as_exported(run)

    @torch.inference_mode()
    def network(images: Any) -> Any:
        return trained.network(torch.from_numpy(images)).numpy()

    return Classifier(name=name, class_names=trained.class_names, network=network, **asdict(trained.preprocessing))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="demo.py", description=__doc__, epilog=_EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_run(parser)
    parser.add_argument("--against", metavar="RUN2", help="a second run on the same data, shown beside the first")
    parser.add_argument("--host", default="127.0.0.1", help="the address to listen on (default: this machine alone)")
    parser.add_argument("--port", type=_port, help="the port (default: the first free one from 7860)")
    parser.add_argument("--export", type=Path, metavar="DIR", help="write a Hugging Face Space to a new folder instead")
    return parser


def _port(text: str) -> int:
    if not text.isdigit() or not 0 < int(text) < 65536:
        raise argparse.ArgumentTypeError(f"{text} is no port; give a number from 1 to 65535")
    return int(text)
