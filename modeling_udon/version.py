"""Version of the package, below all that records it."""

__version__ = "0.1.0"
