"""Prune language models of any size with Wanda, one decoder block in memory at a time."""

__version__ = "0.1.0"
