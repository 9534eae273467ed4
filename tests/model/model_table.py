"""What every causal LM class of transformers does here, tried on a tiny random model of it.

    python -m tests.model.model_table                   # make docs/models.json and docs/models.md
    python -m tests.model.model_table TYPE [TYPE ...]   # these model types, printed

Two streams, with the default LoRA moved away from its start, are held against each stream alone on
each row's whole text, without cache and padding. Results: "exact", with the way that was taken
behind it; "padded", where a batch cannot be packed; "refused" or "not tried", with the reason; or
"wrong", which is a bug.
"""

import argparse
import json
import re
import warnings
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from qadapter import QAdapterModel
from qadapter.model import packed_attention
from tests.model import tiny_classes
from tests.tiny_models import perturb

DOCS = Path(__file__).resolve().parents[2] / "docs"
JSON, PAGE = DOCS / "models.json", DOCS / "models.md"
COLUMNS = ("training, padded", "training, packed", "decoding", "decoding, left padding")
LENGTHS = (9, 6, 12)
STRENGTH = 0.6
NEW = 8
ALLOWED = 2e-3  # of the logits' largest
HEAD = """# Model classes

{tried} of the {count} causal LM classes of transformers {version} was tried as a tiny random model
with the default LoRA: {usable} are usable, {others} are refused. Nothing goes by this table: what a
base does is tried again when it is first used. `make model-table` makes it anew.

- **exact**: both streams are what each is alone on the whole text, within {allowed:g} of the
  largest logit. *a pass a stream*: they take turns instead of sharing a forward. *the whole text
  at every token*: the base keeps a state that a cache does not hold.
- **padded**: training batches are padded, not packed; as exact, and slower.
- **refused**: an error says why.

Parts for images and sound are made where a class has them, and see nothing: only text is read.
Gemma 3n's tower for images needs the timm library, so another stands in its place. Gemma 4's
assistants share fewer layers than they should, as transformers 5.23 makes none that share all.

| class | training | packed | decoding | left padding |
| --- | --- | --- | --- | --- |
"""


def rows_of(model: Any, lengths: Any = LENGTHS) -> list[torch.Tensor]:
    vocab = min(tiny_classes.VOCAB, model.hf_model.get_input_embeddings().weight.shape[0])
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(5, vocab, (n,), generator=generator) for n in lengths]


@torch.no_grad()
def alone(model: QAdapterModel, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits [T, V] of the base and of the adapter for one row, by PEFT's own layers."""
    hf_model = model.hf_model
    q_logits = hf_model(input_ids=ids[None], use_cache=False).logits[0]
    with model.peft_model.disable_adapter():
        base_logits = hf_model(input_ids=ids[None], use_cache=False).logits[0]
    return base_logits, q_logits


def far(got: torch.Tensor, want: torch.Tensor) -> float:
    """The largest difference over the largest value; tokens that are masked are left out."""
    real = torch.isfinite(want) & (want.abs() < 1e30)
    return float(((got - want).abs()[real]).max() / want[real].abs().max())


def verdict(error: float, way: str = "") -> str:
    if error <= ALLOWED:
        return f"exact{way}"
    return f"wrong: off by {error:.2g} of the largest logit"


def training(model: QAdapterModel, rows: list[torch.Tensor]) -> str:
    """A padded batch of three rows in `QAdapterModel.forward`."""
    width = max(map(len, rows))
    ids = torch.zeros(len(rows), width, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        ids[i, : len(row)], mask[i, : len(row)] = row, 1
    model.train()
    error = 0.0
    try:
        logits = model(ids, mask)
    finally:
        model.eval()
    for i, row in enumerate(rows):
        at = slice(i * width, i * width + len(row))
        for got, want in zip(logits, alone(model, row), strict=True):
            error = max(error, far(got[at].detach(), want))
    return verdict(error)


def packed(model: QAdapterModel, rows: list[torch.Tensor]) -> str:
    reason = packed_attention.enable(model.hf_model)
    if reason is not None:
        return f"padded: {reason_of(ValueError(reason))}"
    prompt, chosen, rejected = rows
    arguments = packed_attention.layout([[len(prompt), len(chosen), len(rejected)], [len(prompt)]])
    ids = torch.cat([prompt, chosen, rejected, prompt])[None]
    positions = arguments.pop("position_ids")
    logits = model(ids, position_ids=positions, **arguments)
    p, c, r = map(len, rows)
    error = 0.0
    for other, at in ((chosen, slice(p, p + c)), (rejected, slice(p + c, p + c + r))):
        text = torch.cat([prompt, other])
        for got, want in zip(logits, alone(model, text), strict=True):
            error = max(error, far(got[at].detach(), want[p:]))
    for got, want in zip(logits, alone(model, prompt), strict=True):
        error = max(error, far(got[p + c + r :].detach(), want))
    return verdict(error)


def decoding(model: QAdapterModel, rows: list[torch.Tensor]) -> str:
    """Logits of every step, then the same texts where rows end apart and leave the batch."""
    width = max(map(len, rows))
    ids = torch.zeros(len(rows), width, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        ids[i, width - len(row) :], mask[i, width - len(row) :] = row, 1
    options: dict[str, Any] = {"strength": STRENGTH, "do_sample": False, "max_new_tokens": NEW}
    options |= {"pad_token_id": 0, "num_beams": 1}
    out = model.generate(
        ids, mask, eos_token_id=None, return_dict_in_generate=True, output_logits=True, **options
    )
    error = 0.0
    for i, row in enumerate(rows):
        text = torch.cat([row, out.sequences[i, width:]])
        base, q = alone(model, text)
        want = STRENGTH * q + (1 - STRENGTH) * base
        for step, logits in enumerate(out.logits):
            error = max(error, far(logits[i], want[len(row) + step - 1]))
    if error > ALLOWED:
        return verdict(error)
    free = out.sequences[:, width:]
    eos = [int(free[1, 1]), int(free[0, 4])]
    got = model.generate(ids, mask, eos_token_id=eos, **options)[:, width:]
    for i, row in enumerate(free):
        ends = [t for t in range(NEW) if int(row[t]) in eos]
        count = min(got.shape[1], ends[0] + 1 if ends else NEW)
        if not torch.equal(got[i, :count], row[:count]):
            return f"wrong: row {i} is another where rows leave"
    return "exact" + way(model)


def way(model: QAdapterModel) -> str:
    streams = model.streams((None, "default"))
    parts = [] if streams.reason is None else ["a pass a stream"]
    if streams.uncached is not None:
        parts.append("the whole text at every token")
    return f" ({', '.join(parts)})" if parts else ""


def tried(check: Any, *arguments: Any) -> str:
    try:
        return check(*arguments)
    except (ValueError, NotImplementedError) as error:
        return f"refused: {reason_of(error)}"
    except Exception as error:
        return f"wrong: {type(error).__name__}: {reason_of(error)}"


def reason_of(error: BaseException) -> str:
    """On one line, without figures that differ between machines."""
    text = re.sub(r"\s+", " ", str(error)).strip()
    text = re.sub(r",? by [0-9.e+-]+( of the hidden states' size)?", "", text)
    return text if len(text) <= 160 else text[:157] + "..."


def look(kind: str) -> dict[str, str]:
    """One row of the table."""
    name = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[kind]
    try:
        base = tiny_classes.make(kind)
    except Exception as error:  # a config that small values do not fit
        return {"class": name, "wrapped": f"not tried: {reason_of(error)}"}
    row = {"class": type(base).__name__}
    try:
        model = perturb(QAdapterModel.from_base(base))
    except ValueError as error:
        return {**row, "wrapped": f"refused: {reason_of(error)}"}
    except Exception as error:
        return {**row, "wrapped": f"wrong: {type(error).__name__}: {reason_of(error)}"}
    base_logits, q_logits = alone(model, rows_of(model)[0])
    if far(q_logits, base_logits) < 0.01:
        row["wrapped"] = "wrong: the adapter does nothing"
        return row
    row["wrapped"] = "yes"
    rows = rows_of(model)
    row["training, padded"] = tried(training, model, rows)
    row["decoding"] = tried(decoding, model, rows_of(model, (9, 9, 9)))
    row["decoding, left padding"] = tried(decoding, model, rows)
    row["training, packed"] = tried(packed, model, rows)
    return row


def render(table: dict[str, Any]) -> str:
    """docs/models.md of docs/models.json."""
    rows = table["classes"]
    usable = sum(row["wrapped"] == "yes" for row in rows.values())
    untried = sum(row["wrapped"].startswith("not tried") for row in rows.values())
    lines = HEAD.format(
        tried=f"Every one but {untried}" if untried else "Every one",
        count=len(rows),
        version=table["transformers"],
        usable=usable,
        others=len(rows) - usable - untried,
        allowed=ALLOWED,
    ).splitlines()
    reasons: dict[str, int] = {}
    for row in rows.values():
        cells = [row.get(name, row["wrapped"]) for name in COLUMNS]
        if row["wrapped"] != "yes":
            cells = [row["wrapped"], "", "", ""]
        lines.append(f"| {row['class']} | {' | '.join(short(cell, reasons) for cell in cells)} |")
    lines += ["", *(f"{number}. {reason}" for reason, number in reasons.items()), ""]
    return "\n".join(lines)


def short(cell: str, reasons: dict[str, int]) -> str:
    """The first word, and the number of its reason in the list below the table."""
    word, found, reason = cell.partition(": ")
    if not found:
        return cell
    return f"{word} ({reasons.setdefault(reason, len(reasons) + 1)})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kinds", nargs="*", help="model types; default, all")
    given = parser.parse_args().kinds
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    rows = {}
    for kind in given or tiny_classes.kinds():
        rows[kind] = look(kind)
        print(kind, json.dumps(rows[kind]), flush=True)
    if not given:
        table = {"transformers": transformers.__version__, "classes": rows}
        JSON.write_text(json.dumps(table, indent=1) + "\n")
        PAGE.write_text(render(table))


if __name__ == "__main__":
    main()
