"""Mend a store: ``python -m distilbench.tracking relocate`` after a checkout was copied, moved or renamed."""

from __future__ import annotations

import argparse

from distilbench.cli import run_command
from distilbench.settings import TrackingSettings
from distilbench.tracking.connect import quieten
from distilbench.tracking.relocation import relocate
from distilbench.tracking.uri import store_address_of


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(prog="python -m distilbench.tracking", description=__doc__)
    commands = parser.add_subparsers(required=True)
    relocating = commands.add_parser("relocate", help="have a store keep and seek its files beside itself")
    relocating.add_argument("uri", nargs="?", help="the store, if it is not mlflow.db at the project's root")
    return parser


def main() -> None:
    """Do what the command line asks for, and say it."""
    asked = make_parser().parse_args()
    address = store_address_of(TrackingSettings("mlflow", asked.uri, "distilbench", patience_seconds=0))
    quieten()
    with address.asking():
        for line in relocate(address):
            print(line)


if __name__ == "__main__":
    run_command(main)
