"""Run a large language model of which only the outer blocks are on your own machine."""

__version__ = "0.1.0"

__all__ = ["__version__"]
