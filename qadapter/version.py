"""The version of the package, which it writes into what it saves."""

__version__ = "0.1.0"
