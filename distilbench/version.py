"""The version, which both the package and its commands tell."""

__version__ = "0.1.0"
