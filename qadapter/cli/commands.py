"""The command line: qadapter train | anchors | generate | chat | serve | eval | export | demo |
env."""

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import Any

from qadapter.cli import (
    anchors,
    chat,
    demo,
    environment,
    evaluate,
    export,
    generate,
    serve,
    train,
)

DESCRIPTION = "Customise a frozen language model with a residual Q-function (Q-Adapter)."


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status. Errors of use are one line on stderr, status 2."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(prog="qadapter", description=DESCRIPTION)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    # train has hundreds of options, and a parser of its own
    commands.add_parser(
        "train", add_help=False, help="train an adapter on preference pairs (train --help)"
    )
    for command in (anchors, generate, chat, serve, evaluate, export, demo, environment):
        command.add_parser(commands)
    if arguments[:1] == ["train"]:
        return _reporting_errors(train.train, arguments[1:])
    options = parser.parse_args(arguments)
    if options.command is None:
        parser.print_help()
        return 2
    return _reporting_errors(options.run, options)


def _reporting_errors(run: Callable[[Any], int | None], options: Any) -> int:
    try:
        return run(options) or 0
    except (ValueError, OSError, ImportError) as error:
        print(f"qadapter: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("qadapter: interrupted", file=sys.stderr)
        return 130
