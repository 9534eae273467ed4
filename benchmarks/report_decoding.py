"""The tables of decoding and of the sampler."""

from typing import Any

from benchmarks import harness
from benchmarks.report_common import conditions, left_out

Rows = dict[str, dict[str, Any]]  # who -> row

LORAS = {"all": "all layers", "upper": "upper half"}


def _decode_cases(record: dict[str, Any]) -> dict[tuple[str, str, int], Rows]:
    """(mode, LoRA, batch) -> who -> row, of those that ran."""
    cases: dict[tuple[str, str, int], Rows] = {}
    for row in record["rows"]:
        if "missing" not in row:
            key = (row["mode"], row["lora"], row["batch"])
            cases.setdefault(key, {})[row["who"]] = row
    return cases


def _modes(record: dict[str, Any]) -> str:
    cases = _decode_cases(record)
    used = {mode: record["modes"][mode] for mode, _, _ in cases}
    texts = []
    for mode, settings in used.items():
        values = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in settings.items())
        texts.append(f"{mode} ({values})" if values else mode)
    return " or ".join(texts)


def _decode_title(record: dict[str, Any]) -> str:
    rows = record["rows"]
    prompt = [length for row in rows for length in row["prompt_tokens"]]
    return (
        f"Time per new token, {rows[0]['model']}, {record['dtype']}, prompts of {min(prompt)} to "
        f"{max(prompt)} tokens, {record['new_tokens']} new ones, {_modes(record)} "
        f"({conditions(record)})"
    )


WAYS_TEXT = (
    "base: transformers' `generate` of the base alone; lora: of the PEFT model; naive: two "
    "forwards with PEFT's `disable_adapter()`, composed by hand; two streams: strength "
)


def _ratio(rows: Rows, who: str, of: str) -> str:
    if who not in rows or of not in rows:
        return ""
    return f"{rows[who]['ms']['median'] / rows[of]['ms']['median']:.2f}x"


def decode(record: dict[str, Any]) -> str:
    """One line per case: the base's time, and how many times it everybody else takes."""
    lines = []
    for (mode, lora, batch), rows in _decode_cases(record).items():
        if "base" not in rows or "two streams" not in rows:
            continue
        lines.append(
            [
                str(batch),
                mode,
                LORAS[lora],
                *(f"{rows[who]['ms']['median']:.1f}" for who in ("base", "two streams")),
                _ratio(rows, "two streams", "base"),
                _ratio(rows, "naive", "base"),
                _ratio(rows, "naive", "two streams"),
                *(_ratio(rows, who, "base") for who in ("lora", "one stream", "two adapters")),
                _ratio(rows, "two streams", "one stream"),
            ]
        )
    header = ["batch", "", "LoRA on", "base ms", "two streams ms", "of base", "naive of base"]
    header += ["naive of two streams", "lora of base", "one stream", "two adapters"]
    header += ["two streams of one"]
    title = (
        f"{_decode_title(record)}, medians: {WAYS_TEXT}{record['strength']}; one stream: strength "
        "1; two adapters: both blended with the base, three streams. Columns with an x say how "
        "many times the base's time, or that of two streams, somebody takes."
    )
    return f"{title}\n\n{harness.table(header, lines)}"


def decode_full(record: dict[str, Any]) -> str:
    lines = []
    for (mode, lora, batch), rows in _decode_cases(record).items():
        for who, row in rows.items():
            timing = row["ms"]
            lines.append(
                [
                    str(batch),
                    mode,
                    LORAS[lora],
                    who,
                    f"{timing['median']:.1f} ({timing['p20']:.1f}-{timing['p80']:.1f})",
                    f"{row['mean_ms']:.1f}",
                    *(_ratio(rows, who, peer) for peer in ("base", "naive")),
                    f"{row['prefill_ms']:.0f}",
                ]
            )
    header = ["batch", "", "LoRA on", "", "ms a token (p20-p80)", "mean", "of base", "of naive"]
    header += ["first token ms"]
    title = f"{_decode_title(record)}, all tokens but the first of all runs."
    reasons = left_out(record["rows"], "mode")
    return "\n\n".join([title, harness.table(header, lines), *([reasons] if reasons else [])])


def decode_parts(record: dict[str, Any]) -> str:
    lines = [
        [
            str(part["batch"]),
            part["mode"],
            LORAS[part["lora"]],
            *(f"{part[name]['median']:.2f}" for name in ("forward", "head", "sampler")),
            f"{part['two streams']:.2f}",
            f"{part['base forward']['median']:.2f}",
        ]
        for part in record["parts"]
    ]
    header = ["batch", "", "LoRA on", "forward", "head", "sampler", "a token of two streams"]
    header += ["forward of the base"]
    title = (
        f"Milliseconds of the parts of a token, {record['rows'][0]['model']}, each measured alone "
        f"({conditions(record)}): the forward of both streams without the head, the head's "
        "product, the sampler; beside them the whole token, and transformers' forward of the base "
        "without the head."
    )
    return f"{title}\n\n{harness.table(header, lines)}"


SAMPLERS = ("qadapter torch", "eager", "transformers", "compile", "FlashInfer")
SampleCase = tuple[str, str, str, int, int, str]


def _sample_cases(record: dict[str, Any]) -> dict[SampleCase, Rows]:
    """(logits, streams, dtype, B, V, filters) -> who -> row, of those that ran, ours first."""
    cases: dict[SampleCase, Rows] = {}
    for row in record["rows"]:
        if "missing" not in row:
            key = (row["logits"], row["streams"], row["dtype"], row["b"], row["v"], row["filters"])
            cases.setdefault(key, {})[row["who"]] = row
    return cases


def _sample_lines(cases: dict[SampleCase, Rows], peers: list[str]) -> list[list[str]]:
    lines = []
    for (_, _, dtype, b, v, filters), rows in cases.items():
        own = next(iter(rows.values()))
        times = {w: f"{r['times_ours']:.1f}x" for w, r in rows.items() if r is not own}
        lines.append(
            [
                dtype,
                f"{b} x {v:,}",
                filters,
                f"{own['ms']['median']:.3f}",
                f"{own['share_of_read']:.0%}",
                *(times.get(who, "") for who in peers),
            ]
        )
    return lines


def _sample_table(cases: dict[SampleCase, Rows]) -> str:
    peers = [who for who in SAMPLERS if any(who in list(rows)[1:] for rows in cases.values())]
    header = ["dtype", "B x V", "filters", "ms", "of read", *peers]
    return harness.table(header, _sample_lines(cases, peers))


STREAMS = {"two": "base and adapter, two tensors", "one": "one tensor, as the mixed hidden state's"}
KINDS = {"peaked": "logits as language models have them", "flat": "standard normal logits"}


def sample(record: dict[str, Any]) -> str:
    """Two tensors, peaked logits: plain, and with top-k and top-p."""
    wanted = ("plain", "top-k, top-p")
    cases = {
        key: rows
        for key, rows in _sample_cases(record).items()
        if key[:2] == ("peaked", "two") and key[5] in wanted
    }
    versions = record["versions"]
    found = "".join(f", {name} {versions[name]}" for name in versions)
    title = (
        f"Drawing a token per row from the logits of two streams ({conditions(record)}{found}): "
        "combine, filter, draw, log-probability; peers draw only. \"Of read\" is the time that a "
        "bare read of the logits takes, in the same run, over our time; the peers' columns say how "
        "many times our time they take. transformers: its processors, softmax, multinomial; "
        "compile: these compiled; eager: plain PyTorch on sorted or top-k values, inverse CDF; "
        f"{_settings(record)}."
    )  # fmt: skip
    return f"{title}\n\n{_sample_table(cases)}"


def _settings(record: dict[str, Any]) -> str:
    values: dict[str, Any] = {}
    for settings in record["filters"].values():
        values |= settings
    return ", ".join(f"{name.replace('_', '-')} {value}" for name, value in values.items())


def sample_full(record: dict[str, Any]) -> str:
    """Everything measured, by kind of logits and number of tensors; who is left out, and why."""
    cases = _sample_cases(record)
    parts = []
    for kind in dict.fromkeys(key[:2] for key in cases):
        part = {key: rows for key, rows in cases.items() if key[:2] == kind}
        title = f"{KINDS[kind[0]]}; {STREAMS[kind[1]]} ({conditions(record)}):"
        parts += [title[0].upper() + title[1:], _sample_table(part)]
    reasons = left_out(record["rows"], "filters")
    return "\n\n".join([*parts, *([reasons] if reasons else [])])
