"""The tables of decoding and of the sampler."""

from collections.abc import Callable

from benchmarks import tables
from benchmarks.tables import Column, Record, Row, conditions

LORAS = {"all": "all layers", "upper": "upper half"}
CASE: list[Column] = [("batch", "batch"), ("", "mode"), ("LoRA on", "lora", LORAS.__getitem__)]
WAYS_TEXT = (
    "base: transformers' `generate` of the base alone; lora: of the PEFT model; naive: two "
    "forwards with PEFT's `disable_adapter()`, composed by hand; two streams: strength "
)


def _modes(record: Record) -> str:
    texts = []
    for mode in dict.fromkeys(row["mode"] for row in record["rows"] if "missing" not in row):
        settings = record["modes"][mode].items()
        values = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in settings)
        texts.append(f"{mode} ({values})" if values else mode)
    return " or ".join(texts)


def _decode_title(record: Record) -> str:
    rows = record["rows"]
    prompt = [length for row in rows for length in row["prompt_tokens"]]
    return (
        f"Time per new token, {rows[0]['model']}, {record['dtype']}, prompts of {min(prompt)} to "
        f"{max(prompt)} tokens, {record['new_tokens']} new ones, {_modes(record)} "
        f"({conditions(record)})"
    )


def _ratio(who: str, of: str) -> Callable[[Row], float | None]:
    def ratio(row: Row) -> float | None:
        one, other = (row.get(f"{name} ms median") for name in (who, of))
        return one / other if tables.there(one) and tables.there(other) else None

    return ratio


def decode(record: Record) -> str:
    """One line per case: the base's time, and how many times it everybody else takes."""
    ratios = {
        "of base": ("two streams", "base"),
        "naive of base": ("naive", "base"),
        "naive of two streams": ("naive", "two streams"),
        "lora of base": ("lora", "base"),
        "one stream": ("one stream", "base"),
        "two adapters": ("two adapters", "base"),
        "two streams of one": ("two streams", "one stream"),
    }
    columns: list[Column] = [
        *CASE,
        ("base ms", "base ms median", "{:.1f}"),
        ("two streams ms", "two streams ms median", "{:.1f}"),
        *((name, _ratio(*of), "{:.2f}x") for name, of in ratios.items()),
    ]
    title = (
        f"{_decode_title(record)}, medians: {WAYS_TEXT}{record['strength']}; one stream: strength "
        "1; two adapters: both blended with the base, three streams. Columns with an x say how "
        "many times the base's time, or that of two streams, somebody takes."
    )
    rows = tables.beside(
        tables.frame(record["rows"]), ("mode", "lora", "batch"), ("base", "two streams")
    )
    return tables.paragraphs(title, tables.table(rows, columns))


def decode_full(record: Record) -> str:
    columns: list[Column] = [
        *CASE,
        ("", "who"),
        ("ms a token (p20-p80)", tables.spread(1)),
        ("mean", "mean_ms", "{:.1f}"),
        ("of base", "times_base", "{:.2f}x"),
        ("of naive", "times_naive", "{:.2f}x"),
        ("first token ms", "prefill_ms", "{:.0f}"),
    ]
    title = f"{_decode_title(record)}, all tokens but the first of all runs."
    rows = record["rows"]
    return tables.paragraphs(
        title, tables.table(tables.frame(rows), columns), tables.left_out(rows, "mode")
    )


def decode_parts(record: Record) -> str:
    columns: list[Column] = [
        *CASE,
        *((name, f"{name} median", "{:.2f}") for name in ("forward", "head", "sampler")),
        ("a token of two streams", "two streams", "{:.2f}"),
        ("forward of the base", "base forward median", "{:.2f}"),
    ]
    title = (
        f"Milliseconds of the parts of a token, {record['rows'][0]['model']}, each measured alone "
        f"({conditions(record)}): the forward of both streams without the head, the head's "
        "product, the sampler; beside them the whole token, and transformers' forward of the base "
        "without the head."
    )
    return tables.paragraphs(title, tables.table(tables.frame(record["parts"]), columns))


SAMPLERS = ("qadapter torch", "eager", "transformers", "compile", "FlashInfer")
STREAMS = {"two": "base and adapter, two tensors", "one": "one tensor, as the mixed hidden state's"}
KINDS = {"peaked": "logits as language models have them", "flat": "standard normal logits"}


def _sample_table(rows: list[Row]) -> str:
    """Of one kind of logits: who comes first in a case, ours, and how many times it the others."""
    case = ["dtype", "b", "v", "filters"]
    found = tables.frame(rows)
    found.loc[~found.duplicated(case), "who"] = "own"
    columns: list[Column] = [
        ("dtype", "dtype"),
        ("B x V", lambda row: f"{row['b']} x {row['v']:,}"),
        ("filters", "filters"),
        ("ms", "own ms median", "{:.3f}"),
        ("of read", "own share_of_read", "{:.0%}"),
    ]
    peers = [who for who in SAMPLERS if (found["who"] == who).any()]
    columns += [(who, f"{who} times_ours", "{:.1f}x") for who in peers]
    return tables.table(tables.beside(found, case), columns)


def _filters(record: Record) -> str:
    values = {name: value for one in record["filters"].values() for name, value in one.items()}
    return ", ".join(f"{name.replace('_', '-')} {value}" for name, value in values.items())


def sample(record: Record) -> str:
    """Two tensors, peaked logits: plain, and with top-k and top-p."""
    rows = [
        row
        for row in record["rows"]
        if (row["logits"], row["streams"]) == ("peaked", "two")
        and row["filters"] in ("plain", "top-k, top-p")
    ]
    versions = "".join(f", {name} {version}" for name, version in record["versions"].items())
    title = (
        f"Drawing a token per row from the logits of two streams ({conditions(record)}{versions}): "
        "combine, filter, draw, log-probability; peers draw only. \"Of read\" is the time that a "
        "bare read of the logits takes, in the same run, over our time; the peers' columns say how "
        "many times our time they take. transformers: its processors, softmax, multinomial; "
        "compile: these compiled; eager: plain PyTorch on sorted or top-k values, inverse CDF; "
        f"{_filters(record)}."
    )  # fmt: skip
    return tables.paragraphs(title, _sample_table(rows))


def sample_full(record: Record) -> str:
    """Everything measured, by kind of logits and number of tensors; who is left out, and why."""
    kinds: dict[tuple[str, str], list[Row]] = {}
    for row in record["rows"]:
        kinds.setdefault((row["logits"], row["streams"]), []).append(row)
    parts = []
    for (logits, streams), rows in kinds.items():
        title = f"{KINDS[logits]}; {STREAMS[streams]} ({conditions(record)}):"
        parts += [title[0].upper() + title[1:], _sample_table(rows)]
    return tables.paragraphs(*parts, tables.left_out(record["rows"], "filters"))
