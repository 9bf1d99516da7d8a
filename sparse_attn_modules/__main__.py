"""Command line: ``python -m sparse_attn_modules info`` says what is installed and which backends can run, ``build``
compiles the CUDA kernels ahead of time, ``choose`` finds the blocks that a model needs on given photographs."""

from __future__ import annotations

import argparse
import platform
import sys
from importlib import metadata

import torch

from . import __version__
from .backends import BACKENDS
from .build import ARCHITECTURES, BuildError, build_library
from .patching.choose import add_arguments, choose

_OPTIONAL_PACKAGES = ("einops", "timm", "segment_anything", "torchvision", "triton", "matplotlib", "scikit-image")


def info() -> str:
    """Versions, devices, and each backend with what keeps it from running here."""
    lines = [
        f"sparse_attn_modules {__version__}",
        f"python {platform.python_version()} on {platform.platform()}",
        f"torch {torch.__version__}, built for CUDA {torch.version.cuda or 'none'}, {torch.get_num_threads()} threads",
        "",
        "packages",
        *(f"  {name:<18} {_version(name)}" for name in _OPTIONAL_PACKAGES),
        "",
        "devices",
        f"  cpu                {torch.backends.cpu.get_cpu_capability()}",
    ]
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        capability = f"sm_{properties.major}{properties.minor}"
        memory = properties.total_memory / 2**30
        lines.append(f"  cuda:{index:<13} {properties.name}, {capability}, {memory:.0f} GiB")
    if not torch.cuda.is_available():
        lines.append("  cuda               none available")
    lines += ["", "backends, in order of preference"]
    for name, backend in BACKENDS.items():
        reason = backend.why_not_here()
        lines.append(f"  {name:<18} {'can run' if reason is None else f'cannot run: {reason}'}")
    return "\n".join(lines)


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m sparse_attn_modules", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("info", help="versions, devices, backends and why one cannot run")
    build = commands.add_parser("build", help="compile the CUDA kernels ahead of time")
    build.add_argument("--arch", choices=ARCHITECTURES, default=ARCHITECTURES[0], help="GPU architecture")
    build.add_argument("--into", metavar="DIR", help="folder for the library; default: the user's cache")
    add_arguments(
        commands.add_parser("choose", help="calibrate a model on a folder of photographs: mask file, trade, pictures")
    )
    options = parser.parse_args(arguments)
    if options.command == "info":
        print(info())
        return 0
    if options.command == "choose":
        try:
            choose(options)
        except ValueError as error:
            print(error, file=sys.stderr)
            return 1
        return 0
    try:
        print(build_library(options.arch, options.into))
    except BuildError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
