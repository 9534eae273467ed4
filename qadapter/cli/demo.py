"""``qadapter demo``: the packaged model learns a visible preference, in minutes."""

import argparse
from typing import Any


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "demo", help="customise the packaged model to a visible preference, and show that it took"
    )
    parser.add_argument("--output", default="demo-output", help="folder for adapter, report, plot")
    parser.add_argument("--model", default="smollm2", help="another base, to try the preference on")
    parser.add_argument("--max-steps", type=int, help="stop earlier (to look around)")
    parser.set_defaults(run=demo)


def demo(options: argparse.Namespace) -> int:
    from qadapter.cli import demo_run  # the trainer takes seconds to import

    demo_run.run(options.output, model=options.model, max_steps=options.max_steps)
    return 0
