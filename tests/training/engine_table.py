"""The table of docs/scaling.md, one process against two, measured.

    python -m tests.training.engine_table [--engines fsdp2 ...] [--keep FOLDER]

What cannot run here says so in its cells. With --keep, what an earlier call has measured of other
engines stays.
"""

import argparse
import importlib.util
import json
import tempfile
from importlib import metadata
from pathlib import Path

from tests.training import engine_runs
from tests.training.test_engines import start_of, update_error

PAGE = engine_runs.ROOT / "docs" / "scaling.md"
BEGIN, END = "<!-- engines: made by make scale-table -->\n", "<!-- end of engines -->\n"
COLUMNS = ("save", "resume", "evaluate", "generate", "cache")
LABELS = {"ddp": "DDP", "fsdp2": "FSDP2", "zero2": "ZeRO-2", "zero3": "ZeRO-3"}
# Cases in float32, and the same in bfloat16.
CASES = {
    "train": "bf16",
    "resume": "bf16, resume",
    "generate": "bf16, generate",
    "cached": "bf16, cached",
}


def evaluated(figures, one):
    """Largest relative difference of what an evaluation says."""
    names = [name for name in one if name.startswith("eval_")]
    return max(abs(figures[name] - one[name]) / (abs(one[name]) + 1e-2) for name in names)


def short(figure):
    return "0" if figure == 0 else f"{float(figure):.0e}".replace("e-0", "e-")


def cells(ranks, alone, sixteen):
    """Of an engine and a dtype: a figure by column."""
    train, resume, generate, cached = CASES.values() if sixteen else CASES
    tensors, figures = ranks
    tensors_one, figures_one = alone
    start = start_of("train")

    def against_one(case, plain):
        found = update_error(tensors[case]["weights"], tensors_one[plain]["weights"], start)
        if not sixteen:
            return short(found)
        of_one = update_error(tensors_one[case]["weights"], tensors_one[plain]["weights"], start)
        return f"{found:.2f} ({of_one:.2f})"

    saved = (tensors[resume]["saved"] - tensors[resume]["resumed"]).abs().max()
    again = update_error(tensors[resume]["resumed"], tensors[resume]["weights"], start)
    said = short(evaluated(figures[train], figures_one["train"]))
    if sixteen:
        found = (evaluated(each[train], figures_one["train"]) for each in (figures, figures_one))
        said = "{:.2f} ({:.2f})".format(*found)
    texts, texts_one = figures[generate]["rows"], figures_one[generate]["rows"]
    same = sum(a == b for a, b in zip(texts, texts_one, strict=True))
    made = (short(saved), short(again), said, f"{same} of {len(texts_one)}")
    return dict(zip(COLUMNS, (*made, against_one(cached, "cached")), strict=True))


def measured(engines):
    """Engines, each with its cells by dtype."""
    names = [*CASES, *CASES.values()]
    folder = Path(tempfile.mkdtemp())
    alone: tuple[dict, dict] = ({}, {})
    for name in names:
        alone[0][name], alone[1][name] = engine_runs.case(name, folder / "one" / name, "ddp", 1)
    for engine in engines:
        if "zero" in engine and importlib.util.find_spec("deepspeed") is None:
            reason = dict.fromkeys(COLUMNS, "not run here: DeepSpeed is not installed")
            yield engine, {"float32": reason, "bf16": reason}
            continue
        (folder / engine).mkdir()
        ranks = engine_runs.start(folder / engine, engine, names, timeout=3000)
        dtypes = ("float32", "bf16")
        yield engine, {dtype: cells(ranks, alone, dtype == "bf16") for dtype in dtypes}


def table(found):
    lines = ["| engine | dtype | " + " | ".join(COLUMNS) + " |", "|" + "---|" * 7]
    for engine, label in LABELS.items():
        for dtype, row in found.get(engine, {}).items():
            lines.append(f"| {label} | {dtype} | " + " | ".join(row[c] for c in COLUMNS) + " |")
    names = ("torch", "transformers", "accelerate", "peft", "deepspeed")
    there = [name for name in names if importlib.util.find_spec(name) is not None]
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in there)
    return "\n".join(lines) + f"\n\n{versions}.\n"


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--engines", nargs="+", choices=LABELS, default=list(LABELS))
    parser.add_argument("--keep", type=Path, help="JSON file of what was measured")
    options = parser.parse_args()
    found = {}
    if options.keep and options.keep.exists():
        found = json.loads(options.keep.read_text())
    for engine, row in measured(options.engines):
        found[engine] = row
        if options.keep:
            options.keep.write_text(json.dumps(found))
        before, rest = PAGE.read_text().split(BEGIN)
        PAGE.write_text(before + BEGIN + table(found) + END + rest.split(END)[1])


if __name__ == "__main__":
    main()
