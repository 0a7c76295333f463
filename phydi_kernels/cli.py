"""The command ``phydi-kernels``.

Each subcommand is a module with ``add_arguments(parser)`` and ``run(args) -> int``, imported when it is asked for:
``phydi-kernels --help`` does not wait for torch.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

from . import __version__

COMMANDS = {
    "info": "print versions, devices, compiled kernels and the implementation each operator would run",
    "demo": "train a PHResNet on handwritten digits with three initialisations; separate three classes by GDA",
    "selftest": "compare every operator with its float64 reference on one device",
    "bench": "run the benchmarks of a source checkout",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one subcommand and returns its exit status: 0 for success, 1 for failure, 2 for bad usage."""
    arguments = sys.argv[1:] if argv is None else list(argv)
    parser = argparse.ArgumentParser(
        prog="phydi-kernels", description="Parameterized hypercomplex layers and kernel discriminant analysis."
    )
    parser.add_argument("--version", action="version", version=f"phydi-kernels {__version__}")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="command")
    for name, description in COMMANDS.items():
        subparser = subparsers.add_parser(name, help=description, description=description)
        if arguments[:1] == [name]:
            module = importlib.import_module(f".{name}", __package__)
            module.add_arguments(subparser)
            subparser.set_defaults(run=module.run)
    args = parser.parse_args(arguments)
    return args.run(args)
