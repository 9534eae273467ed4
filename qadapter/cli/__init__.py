"""The command line, one file per command:
qadapter train | anchors | generate | chat | serve | eval | export | demo | env."""

from qadapter.cli.commands import main

__all__ = ["main"]
