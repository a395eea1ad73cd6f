"""How much training of a small Transformer can be left out, and what it costs."""

__version__ = "0.1.0"
