"""Halftone: one server, one checkpoint, every precision, measured the same way."""

__version__ = "0.1.0"
