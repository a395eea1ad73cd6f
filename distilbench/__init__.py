"""How much training of a small Transformer can be left out, and what it costs."""
