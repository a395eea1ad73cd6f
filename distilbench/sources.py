"""What the sources of text and of weights share: is the hub there, and what did an installed package bring."""

from __future__ import annotations
