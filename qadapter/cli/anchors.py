"""``qadapter anchors``: texts made by the base itself, for training that keeps it as it is."""

import argparse
import sys
from pathlib import Path
from typing import Any

from qadapter.cli import sampling


def add_parser(commands: Any) -> None:
    parser = commands.add_parser("anchors", help="have the base make texts that it should keep")
    parser.add_argument("--model", required=True, help="Hub id, folder, adapter folder, or smollm2")
    parser.add_argument("--output", default="anchors.jsonl", help="default %(default)s")
    parser.add_argument("--count", type=int, help="how many; default 256, or all of --prompts")
    parser.add_argument(
        "--prompts",
        help="the base answers these, instead of asking by itself: files as generate --input "
        "takes them, - for the lines of stdin",
    )
    parser.add_argument("--max-new-tokens", type=int, default=96, help="longest answer, or text")
    parser.add_argument("--max-prompt-tokens", type=int, default=64, help="longest question")
    parser.add_argument("--seed", type=int, default=0, help="of the draws; default %(default)s")
    parser.add_argument("--batch-size", type=int, help="texts made at a time")
    parser.add_argument("--dtype", default="auto", help="dtype of the base, such as bfloat16")
    parser.add_argument("--show", type=int, default=3, help="how many to print at the end")
    there = parser.add_mutually_exclusive_group()
    there.add_argument("--resume", action="store_true", help="go on with what --output has")
    there.add_argument("--overwrite", action="store_true", help="replace what --output has")
    parser.set_defaults(run=anchors)


def anchors(options: argparse.Namespace) -> int:
    output = Path(options.output)
    _check(options, output)
    prompts = None
    if options.prompts is not None:
        from qadapter.text.prompts import read_prompts

        prompts = [row.asked for row in read_prompts(options.prompts)]
    count = options.count
    if count is None:
        count = 256 if prompts is None else len(prompts)

    from qadapter.training.anchor_texts import BATCH_SIZE, make_anchors

    model, tokenizer = sampling.load({sampling.FIRST: options.model}, None, options.dtype)
    if options.overwrite:
        # Only now: a model that is not there costs nobody the old file.
        output.unlink(missing_ok=True)
    try:
        rows = make_anchors(
            model,
            tokenizer,
            count,
            max_new_tokens=options.max_new_tokens,
            max_prompt_tokens=options.max_prompt_tokens,
            seed=options.seed,
            batch_size=options.batch_size or BATCH_SIZE,
            path=output,
            prompts=prompts,
        )
    except BaseException:
        if output.exists():
            print(f"what was made is in {output}; --resume goes on", file=sys.stderr)
        raise
    for row in rows[: options.show]:
        print(_shown(row), end="\n\n")
    print(_summary(rows, prompts, output), file=sys.stderr)
    return 0


def _check(options: argparse.Namespace, output: Path) -> None:
    for name, least in (
        ("count", 1),
        ("max_new_tokens", 1),
        ("max_prompt_tokens", 1),
        ("batch_size", 1),
        ("show", 0),
    ):
        value = getattr(options, name)
        if value is not None and value < least:
            raise ValueError(f"--{name.replace('_', '-')}: expected {least} or more, got {value}")
    if output.is_dir():
        raise ValueError(f"--output: {output} is a folder, expected a file")
    if output.exists() and not (options.resume or options.overwrite):
        raise ValueError(
            f"--output: {output} is there: --resume goes on with it, --overwrite replaces it"
        )


def _shown(row: dict[str, Any]) -> str:
    cut = " [...]" if row["truncated"] else ""
    if "text" in row:
        return f"{row['text']}{cut}"
    turns = [f"{message['role']}> {message['content'] or ''}" for message in row["messages"]]
    return "\n".join(turns) + cut


def _summary(rows: list[dict[str, Any]], prompts: list[Any] | None, output: Path) -> str:
    cut = sum(row["truncated"] for row in rows)
    parts = [f"{len(rows)} anchors in {output}", f"{cut} of them cut at --max-new-tokens"]
    if prompts is None:
        parts.append(f"draws left out as duplicates or empty: {rows[-1]['draw'] + 1 - len(rows)}")
    elif len(prompts) > len(rows):
        left = len(prompts) - len(rows)
        parts.append(f"prompts left out as repeated, unanswered or beyond --count: {left}")
    return ", ".join(parts)
