"""The command of the installed package: ``distilbench train ...`` runs ``python -m distilbench.train ...``."""

from __future__ import annotations

import sys
from pathlib import Path

from distilbench.cli import exit_immediately, open_streams, print_to_stderr, run_command
from distilbench.version import __version__

COMMANDS = ("train", "compare", "confirm", "predict", "benchmark")


def main() -> None:
    """Run the command that the first argument names, with the remaining arguments."""
    exit_immediately()
    open_streams()
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name == "--version":
        print(f"distilbench {__version__}")
    elif name == "completion":
        print(Path(__file__).with_name("completion.sh").read_text())
    elif name in ("--help", "-h"):
        print(f"usage: distilbench {{{','.join(COMMANDS)}}} [key=value ...] | completion | --version\n\n"
              "What each takes: distilbench train --help")  # fmt: skip
    elif name in COMMANDS:
        from importlib import import_module

        del sys.argv[1]
        module = import_module(f"distilbench.{name}")
        run_command(module.main, module.to_hydra_argument if name == "compare" else str)
    else:
        print_to_stderr(f"the command must be one of {', '.join(COMMANDS)}, got {name!r}; distilbench --help")
        sys.exit(2)


if __name__ == "__main__":
    main()
