"""Builds the native decoder (data/decoding/native). Where that fails, the package installs without it, and another
decoder stands in."""

import shutil
import subprocess

from setuptools import Extension, setup


def pkg_config(kind: str, prefix: str) -> list[str]:
    """What pkg-config says about libjpeg, without the option's letter; nothing where it does not know."""
    if shutil.which("pkg-config") is None:
        return []
    told = subprocess.run(["pkg-config", kind, "libjpeg"], capture_output=True, text=True)
    return [flag.removeprefix(prefix) for flag in told.stdout.split() if flag.startswith(prefix)]


setup(
    ext_modules=[
        Extension(
            "brisk.data.decoding._native_decode",
            ["data/decoding/native/decode.cpp"],
            depends=[f"data/decoding/native/{name}.h" for name in ("baseline", "errors", "restarts")],
            include_dirs=pkg_config("--cflags", "-I"),
            library_dirs=pkg_config("--libs", "-L"),
            libraries=["jpeg"],
            # Floating-point arithmetic makes the weights: contracted, they would differ between machines.
            extra_compile_args=["-O3", "-std=c++17", "-ffp-contract=off"],
            language="c++",
            optional=True,
        )
    ]
)
