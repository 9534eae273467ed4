"""``qadapter generate``: answers of the composed policy, on the terminal or into a file."""

import argparse
import hashlib
import json
import math
import secrets
import sys
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from qadapter import files
from qadapter.cli import sampling
from qadapter.cli.partial import adapter_hash, appending, check_same, json_line, read_partial
from qadapter.cli.sampling import Blend
from qadapter.text.prompts import PromptRow, prompt_ids, prompt_row, read_prompts

FIELDS = (
    "index", "prompt", "response", "tokens", "finish_reason", "mean_logprob", "strength",
    "alpha_0", "alpha_tilde", "adapters", "seed", "sample",
)  # fmt: skip


class Request(NamedTuple):
    """One answer to make: to which row, at which strength, which of its samples."""

    number: int
    row: int
    strength: float | None
    sample: int


def add_parser(commands: Any) -> None:
    parser = commands.add_parser("generate", help="sample from the composed policy")
    sampling.add_adapters(parser)
    prompts = parser.add_mutually_exclusive_group()
    prompts.add_argument(
        "--prompt", action="append", help="a prompt; repeat for several; default, stdin"
    )
    prompts.add_argument(
        "--input",
        help="prompts in .jsonl, .json, .csv, .txt or .parquet files, also compressed, or those "
        "of a glob; - for the lines of stdin",
    )
    parser.add_argument("--output", help="write the answers there (JSON lines); - for stdout")
    parser.add_argument("--resume", action="store_true", help="go on after an interrupted run")
    parser.add_argument("--batch-size", type=int, default=8, help="answers made at a time")
    parser.add_argument("--num-return-sequences", type=int, default=1, help="answers a prompt")
    parser.add_argument("--no-chat", action="store_true", help="do not use the chat template")
    parser.add_argument(
        "--strength",
        type=sampling.strength_option,
        nargs="+",
        help="0 is the base, 1 as trained, more is more, recommended what training with "
        "--kl-budget found; several are shown side by side",
    )
    parser.add_argument("--alpha-0", type=float, help="instead of strength")
    parser.add_argument("--alpha-tilde", type=float, help="instead of strength")
    sampling.add_sampling(parser, temperature=0.0, top_p=1.0)
    parser.set_defaults(run=generate)


def generate(options: argparse.Namespace) -> int:
    _check(options)
    blend = sampling.parse_blend(options.adapter, options.weight)
    rows = _rows(options, blend)
    if options.strength is not None:
        options.strength = [sampling.given_strength(s, blend) for s in options.strength]
    alphas = (options.alpha_0, options.alpha_tilde)
    sampling.say_recommended(blend, (options.strength, *alphas) == (None, None, None))
    requests = _requests(rows, options)
    if options.output in (None, "-"):
        return _to_stdout(rows, requests, blend, options)
    return _to_file(rows, requests, blend, options)


def _check(options: argparse.Namespace) -> None:
    sampling.check_sampling(options)
    for name in ("batch_size", "num_return_sequences"):
        if getattr(options, name) < 1:
            raise ValueError(
                f"--{name.replace('_', '-')}: expected 1 or more, got {getattr(options, name)}"
            )
    if options.strength is not None and (options.alpha_0, options.alpha_tilde) != (None, None):
        raise ValueError("--strength sets alpha_0 and alpha_tilde: give it, or the two, not both")
    if options.alpha_tilde is not None and not 0 < options.alpha_tilde < float("inf"):
        raise ValueError(f"--alpha-tilde: expected more than 0, got {options.alpha_tilde}")
    if options.alpha_0 is not None and not math.isfinite(options.alpha_0):
        raise ValueError(f"--alpha-0: expected a finite number, got {options.alpha_0}")
    if options.resume and options.output in (None, "-"):
        raise ValueError("--resume: only an --output file can be gone on with")
    if options.output is not None and Path(options.output).is_dir():
        raise ValueError(f"--output: {options.output} is a folder, expected a file")


def _rows(options: argparse.Namespace, blend: Blend) -> list[PromptRow]:
    if options.input is not None:
        rows = read_prompts(options.input)
    elif options.prompt:
        rows = [prompt_row(p, f"--prompt number {i}") for i, p in enumerate(options.prompt, 1)]
    else:
        rows = [prompt_row(sys.stdin.read().strip(), "stdin")]
    for row in rows:
        if row.strength is not None and (options.alpha_0, options.alpha_tilde) != (None, None):
            raise ValueError(
                f"{row.place}: strength sets alpha_0 and alpha_tilde, and so do --alpha-0 and "
                "--alpha-tilde; give one"
            )
    return [
        replace(
            row, strength=sampling.given_strength(row.strength, blend, f"{row.place}: strength")
        )
        for row in rows
    ]


def _requests(rows: Sequence[PromptRow], options: argparse.Namespace) -> list[Request]:
    """Row after row, strength after strength, sample after sample: the order of the output."""
    wanted: list[tuple[int, Any, int]] = [
        (row, strength, sample)
        for row, prompt in enumerate(rows)
        for strength in (
            [prompt.strength] if prompt.strength is not None else options.strength or [None]
        )
        for sample in range(options.num_return_sequences)
    ]
    return [Request(number, *request) for number, request in enumerate(wanted)]


class _Maker:
    """The model with the settings of a run: makes answers batch by batch."""

    def __init__(
        self, rows: Sequence[PromptRow], blend: Blend, options: argparse.Namespace, seed: int | None
    ) -> None:
        self.rows, self.blend, self.options, self.seed = rows, blend, options, seed
        self.model, self.tokenizer = sampling.load(
            blend.folders, options.base_model, options.dtype, decodes=True
        )
        self.ids = [self._encoded(row) for row in rows]

    def _encoded(self, row: PromptRow) -> list[int]:
        try:
            template = dict(row.template)
            for name, variables in self.options.chat_template_kwargs.items():
                template[name] = {**variables, **row.template.get(name, {})}
            ids = prompt_ids(
                self.tokenizer, row.prompt, self.options.system, not self.options.no_chat, template
            )
        except ValueError as error:
            raise ValueError(f"{row.place}: {error}") from None
        limit = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        if limit is not None and len(ids) + self.options.max_new_tokens > limit:
            raise ValueError(
                f"{row.place}: the prompt has {len(ids)} tokens, which with --max-new-tokens "
                f"{self.options.max_new_tokens} is more than the model's {limit} positions"
            )
        return ids

    def batches(self, requests: Sequence[Request]) -> list[list[Request]]:
        """Prompts of like length together, the longest first: what does not fit shows at once.

        One strength a batch where there is enough of it, since a batch of strength 0 or 1 alone may
        need one stream only; else strengths share a batch, but not with those left to the adapter.
        """
        size = self.options.batch_size
        by_strength: dict[float | None, list[Request]] = defaultdict(list)
        for request in requests:
            by_strength[request.strength].append(request)
        parts: list[list[Request]] = []
        few: list[Request] = []
        for strength, part in by_strength.items():
            if strength is None or len(part) >= size:
                parts.append(part)
            else:
                few += part
        batches = []
        for part in (*parts, few):
            part.sort(key=lambda r: -len(self.ids[r.row]))
            batches += [part[i : i + size] for i in range(0, len(part), size)]
        return batches

    def row_seed(self, row: int) -> int | None:
        """What row's draws come from: its own seed, or one derived from the run's."""
        from qadapter.text.answers import derived_seed

        if self.seed is None:
            return None
        own = self.rows[row].seed
        return own if own is not None else derived_seed(self.seed, row)

    def answers(self, batch: Sequence[Request], streamer: Any = None) -> list[dict[str, Any]]:
        from qadapter.text.answers import answer, derived_seed

        strengths = [request.strength for request in batch]
        seeds = [self.row_seed(request.row) for request in batch]
        adapters = self.blend.adapters()
        blend: dict[str, Any] = {} if adapters is None else {"adapters": adapters}
        # Every strength draws with the same noise: side by side they differ by strength alone.
        draws = [
            derived_seed(seed, request.sample)
            for seed, request in zip(seeds, batch, strict=True)
            if seed is not None
        ]
        results = answer(
            self.model,
            self.tokenizer,
            [self.ids[request.row] for request in batch],
            stop=self.options.stop,
            seeds=draws or None,
            strength=None if strengths[0] is None else _one_or_all(strengths),
            alpha_0=self.options.alpha_0,
            alpha_tilde=self.options.alpha_tilde,
            streamer=streamer,
            **blend,
            **sampling.sampling_arguments(self.options),
        )
        return [
            self._record(request, result, seed)
            for request, result, seed in zip(batch, results, seeds, strict=True)
        ]

    def _record(self, request: Request, result: Any, seed: int | None) -> dict[str, Any]:
        row, given = self.rows[request.row], request.strength is not None
        alpha_0, alpha_tilde = self.options.alpha_0, self.options.alpha_tilde
        mean = result.mean_logprob
        values = (
            request.row,
            row.prompt,
            result.text,
            result.tokens,
            result.finish_reason,
            mean if math.isfinite(mean) else None,
            request.strength,
            None if given else self.model.alpha_0 if alpha_0 is None else alpha_0,
            None if given else self.model.alpha_tilde if alpha_tilde is None else alpha_tilde,
            self.blend.weights,
            seed,
            request.sample,
        )
        # A row's own field never hides one of the answer's.
        others = {(f"input_{k}" if k in FIELDS else k): v for k, v in row.fields.items()}
        return {**dict(zip(FIELDS, values, strict=True)), **others}


def _one_or_all(strengths: Sequence[float | None]) -> Any:
    # One number lets a stream that does not count rest.
    return strengths[0] if len(set(strengths)) == 1 else list(strengths)


def _run_seed(options: argparse.Namespace) -> int | None:
    if options.temperature == 0:
        return None
    return options.seed if options.seed is not None else secrets.randbits(53)


# To standard output.


def _to_stdout(
    rows: Sequence[PromptRow],
    requests: Sequence[Request],
    blend: Blend,
    options: argparse.Namespace,
) -> int:
    maker = _Maker(rows, blend, options, _run_seed(options))
    if len(requests) == 1 and options.output is None:
        from qadapter.text.answers import Printer

        maker.answers(requests, Printer(maker.tokenizer, options.stop))
        return 0
    from tqdm.auto import tqdm

    made: dict[int, dict[str, Any]] = {}
    with tqdm(total=len(requests), desc="Answering", disable=None) as progress:
        for batch in maker.batches(requests):
            for request, record in zip(batch, maker.answers(batch), strict=True):
                made[request.number] = record
            progress.update(len(batch))
    if options.output == "-":
        sys.stdout.writelines(json_line(made[request.number]) for request in requests)
        return 0
    for i, row in enumerate(rows):
        print(("\n" if i else "") + f"> {_shown(row.prompt)}")
        of_row = [r for r in requests if r.row == i]
        for sample in range(options.num_return_sequences):
            print(_answers_of([r for r in of_row if r.sample == sample], made))
    return 0


def _answers_of(requests: Sequence[Request], made: dict[int, dict[str, Any]]) -> str:
    from qadapter.text.answers import side_by_side

    texts = [made[r.number]["response"] for r in requests]
    if len(texts) == 1:
        return texts[0].strip()
    return side_by_side([f"strength {r.strength:g}" for r in requests], texts)


def _shown(prompt: Any) -> str:
    return prompt if isinstance(prompt, str) else str(prompt[-1].get("content") or "")


# To a file.


def _to_file(
    rows: Sequence[PromptRow],
    requests: Sequence[Request],
    blend: Blend,
    options: argparse.Namespace,
) -> int:
    output = Path(options.output)
    partial = output.with_name(output.name + ".partial")
    settings = _settings(rows, blend, options)
    made: dict[int, dict[str, Any]] = {}
    seed = _run_seed(options)
    if partial.exists():
        if not options.resume:
            raise ValueError(
                f"{partial} is there, of a run that was interrupted: --resume goes on with it; "
                "delete it to start over"
            )
        header, made = read_partial(partial)
        if header is not None:
            check_same(header["settings"], settings, partial, _source(options))
            seed = header["seed"]
    maker = _Maker(rows, blend, options, seed)
    unknown = set(made) - {request.number for request in requests}
    if unknown:
        raise ValueError(f"{partial}: answers to unknown rows: {sorted(unknown)[:3]}")
    output.parent.mkdir(parents=True, exist_ok=True)
    try:
        with appending(partial, {"settings": settings, "seed": seed}) as file:
            _make_missing(maker, requests, made, file)
        with files.replacing_file(output) as temporary:
            lines = (json_line(made[request.number]) for request in requests)
            temporary.write_text("".join(lines), encoding="utf-8")
    except BaseException:
        if made:
            print(
                f"{len(made)} of {len(requests)} answers are in {partial}; --resume goes on",
                file=sys.stderr,
            )
        else:
            partial.unlink(missing_ok=True)
        raise
    partial.unlink()
    print(f"{len(requests)} answers in {output}", file=sys.stderr)
    return 0


def _make_missing(
    maker: _Maker, requests: Sequence[Request], made: dict[int, dict[str, Any]], file: TextIO
) -> None:
    from tqdm.auto import tqdm

    with tqdm(total=len(requests), initial=len(made), desc="Answering") as progress:
        # The batches are those of an undisturbed run, so that rounding is the same too.
        for batch in maker.batches(requests):
            missing = [request for request in batch if request.number not in made]
            if not missing:
                continue
            for request, record in zip(batch, maker.answers(batch), strict=True):
                if request in missing:
                    made[request.number] = record
                    file.write(json_line({"number": request.number, "answer": record}))
            file.flush()
            progress.update(len(missing))


def _source(options: argparse.Namespace) -> str:
    if options.input is not None:
        return "stdin" if options.input == "-" else str(options.input)
    return "--prompt" if options.prompt else "stdin"


def _settings(
    rows: Sequence[PromptRow], blend: Blend, options: argparse.Namespace
) -> dict[str, Any]:
    """What the answers depend on; where things lie, and the size of a batch, do not count."""
    names = (
        "system", "no_chat", "strength", "alpha_0", "alpha_tilde", "max_new_tokens",
        "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "stop",
        "num_return_sequences", "dtype", "seed", "chat_template_kwargs",
    )  # fmt: skip
    prompts = json.dumps([(r.prompt, r.strength, r.seed, r.fields) for r in rows], default=str)
    adapters = {
        name: {"weight": blend.weights[name], "sha256": adapter_hash(Path(folder))}
        for name, folder in blend.folders.items()
    }
    return {
        "input": hashlib.sha256(prompts.encode()).hexdigest(),
        "adapter": adapters,
        **{name: getattr(options, name) for name in names},
    }
