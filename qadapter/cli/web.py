"""``qadapter chat --web``: a page where base and policy answer the same question side by side."""

import argparse
import html
import importlib.util
import math
import secrets
import urllib.parse
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from qadapter.cli import sampling
from qadapter.composition import RECOMMENDED
from qadapter.text.prompts import checked_seed, checked_strength

if TYPE_CHECKING:
    from qadapter.text.compared import Compared

LARGEST = 3.0
"""Where sliders end, if what they begin with does not lie beyond half of it."""

STRONGEST = 3.0  # nats that have the full colour

NUMBERS: dict[str, type] = {
    "strength": float, "temperature": float, "top_p": float, "max_new_tokens": int, "seed": int,
}  # fmt: skip
TEXTS = ("question", "system")

STYLE = """
.compared { white-space: pre-wrap; line-height: 1.6; min-height: 6em; overflow-wrap: anywhere; }
.compared .end { opacity: 0.6; }
"""
LEGEND = (
    "Colour is what the adapter did to a token, given all before it: "
    '<span style="background: {more}">likelier than in the base</span>, '
    '<span style="background: {less}">less likely</span>, full at a factor of 20. '
    "Point at a token for log p<sub>policy</sub> - log p<sub>base</sub> in nats."
)

Answers = Callable[[argparse.Namespace], tuple["Compared", "Compared"]]
"""Of base and policy. The options are those of the command, with ``question``, ``weights`` by
adapter, and all of ``NUMBERS`` and ``TEXTS``."""


def add_options(parser: Any) -> None:
    parser.add_argument(
        "--web",
        action="store_true",
        help="a page in the browser instead: base and policy side by side, what changed in colour",
    )
    parser.add_argument(
        "--server",
        metavar="URL",
        help="with --web: answers of `qadapter serve` there, no --adapter",
    )
    parser.add_argument("--host", help="with --web: default 127.0.0.1, this machine alone")
    parser.add_argument("--port", type=int, help="with --web: default, the first free from 7860 on")


def check(options: argparse.Namespace) -> None:
    """ValueError where options of the page and of the conversation are mixed up."""
    for name in ("server", "host", "port"):
        if not options.web and getattr(options, name) is not None:
            raise ValueError(f"--{name}: is of the page, give --web")
    if options.server is None and not options.adapter:
        raise ValueError("--adapter: expected the folder of a saved adapter")
    if options.server is not None and options.adapter:
        raise ValueError("--adapter: what is served is chosen by `qadapter serve`, not by --server")
    if options.server is not None and options.strength == RECOMMENDED:
        raise ValueError(f"--strength: give a number; a server does not tell what is {RECOMMENDED}")
    if options.web and importlib.util.find_spec("gradio") is None:
        raise ImportError(
            'the page needs Gradio: pip install "qadapter[web]". Without it, qadapter chat is a '
            "conversation in the terminal, with /both and /compare"
        )


def run(options: argparse.Namespace) -> int:
    """Serve the page until Ctrl-C. `check` has seen the options."""
    answers, weights, strength = _source(options)
    options.strength = strength
    made = page(answers, options, weights)
    # One model answers one question at a time; a server decides that for itself.
    made.queue(default_concurrency_limit=1 if options.server is None else 8)
    launch(made, options.host, options.port)
    print(f"{made.local_url} until Ctrl-C", flush=True)
    made.block_thread()
    return 0


def launch(made: Any, host: str | None = None, port: int | None = None) -> None:
    """Serve a page from a thread; OSError where the port is taken. The fonts are the machine's own:
    nothing is fetched from elsewhere."""
    import gradio as gr

    made.launch(
        server_name=host or "127.0.0.1",
        server_port=port,
        share=False,
        ssr_mode=False,
        prevent_thread_lock=True,
        quiet=True,
        footer_links=[],
        theme=gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"]),
        css=STYLE,
    )


def _source(options: argparse.Namespace) -> tuple[Answers, dict[str, float], float]:
    """Who answers, the weights of what can be weighed, the strength to begin with."""
    if options.server is not None:
        from qadapter.cli.web_server import Server

        return Server(options.server).compare, {}, _strength(options, None)
    blend = sampling.parse_blend(options.adapter, options.weight)
    options.strength = sampling.given_strength(options.strength, blend)
    model, tokenizer = sampling.load(blend.folders, options.base_model, options.dtype)
    weights = blend.weights if len(blend.weights) > 1 else {}
    return in_process(model, tokenizer, blend), weights, _strength(options, model)


def _strength(options: argparse.Namespace, model: Any) -> float:
    """As asked for, or recommended, or what the adapter was trained at, or 1."""
    if options.strength is not None:
        return float(options.strength)
    if model is None:
        return 1.0
    if model.recommended_strength is not None and len(model.adapter_names) == 1:
        return round(float(model.recommended_strength), 3)
    alike = model.alpha_0 == model.alpha_tilde
    return 1.0 / model.alpha_tilde if alike else 1.0


def in_process(model: Any, tokenizer: Any, blend: sampling.Blend) -> Answers:
    """Answers of a model in this process."""
    from qadapter.text.compared import compare
    from qadapter.text.prompts import prompt_ids

    def answers(options: argparse.Namespace) -> "tuple[Compared, Compared]":
        system, template = options.system or None, options.chat_template_kwargs
        ids = prompt_ids(tokenizer, options.question, system, template=template)
        limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        if limit is not None and len(ids) + options.max_new_tokens > limit:
            raise ValueError(
                f"the question has {len(ids)} tokens, which with {options.max_new_tokens} of the "
                f"answer is more than the model's {limit} positions"
            )
        return compare(
            model,
            tokenizer,
            ids,
            strength=options.strength,
            adapters=blend.adapters({**blend.weights, **options.weights}),
            seed=options.seed if options.temperature > 0 else None,
            stop=options.stop,
            **sampling.sampling_arguments(options),
        )

    return answers


# The settings of a question, and the link to them.


def settings(
    options: argparse.Namespace, given: Mapping[str, Any], weights: Mapping[str, Any]
) -> argparse.Namespace:
    """The options with what the page, or a link, says. ValueError that names what does not fit."""
    made = argparse.Namespace(**vars(options))
    for name, kind in NUMBERS.items():
        if given.get(name) is not None:
            number = sampling.parse_number(str(given[name]), name)
            setattr(made, name, kind(number) if number == kind(number) else number)
    made.question = str(given.get("question") or "").strip()
    made.system = str(given.get("system", options.system) or "").strip()
    made.weights = {n: sampling.parse_number(str(w), f"weight.{n}") for n, w in weights.items()}
    checked_strength(made.strength, "strength")
    if isinstance(made.max_new_tokens, float):
        raise ValueError(f"max_new_tokens: expected a whole number, got {made.max_new_tokens}")
    checked_seed(made.seed, "seed")
    sampling.check_sampling(made)
    return made


def from_link(
    options: argparse.Namespace, query: Mapping[str, str], names: Sequence[str]
) -> argparse.Namespace:
    """Settings from the parameters of an address; ValueError names one that does not fit."""
    weights = {name: query.get(f"weight.{name}", options.weights[name]) for name in names}
    return settings(options, query, weights)


def link(made: argparse.Namespace) -> str:
    """Relative to the page's own address."""
    query = {name: getattr(made, name) for name in (*TEXTS, *NUMBERS)}
    query |= {f"weight.{name}": weight for name, weight in made.weights.items()}
    shown = {k: f"{v:.10g}" if isinstance(v, float) else v for k, v in query.items()}
    return "?" + urllib.parse.urlencode({k: v for k, v in shown.items() if v not in (None, "")})


# The page.


def colour(nats: float) -> str:
    """Blue where a token got likelier, orange where less, by how much."""
    share = 0.0 if math.isnan(nats) else min(abs(nats) / STRONGEST, 1.0)
    rgb = "37, 99, 235" if nats > 0 else "234, 88, 12"
    return f"rgba({rgb}, {0.6 * share:.2f})"


def coloured(answer: "Compared") -> str:
    """HTML of an answer."""
    spans = [
        f'<span title="{nats:+.2f}" style="background: {colour(nats)}">{html.escape(text)}</span>'
        for text, nats in answer.pieces
    ]
    if answer.end is not None:
        shade = colour(answer.end)
        spans.append(
            f'<span class="end" title="{answer.end:+.2f}" style="background: {shade}"> end</span>'
        )
    elif answer.finish_reason == "length":
        spans.append('<span class="end"> ... cut off</span>')
    return f'<div class="compared">{"".join(spans)}</div>'


def page(answers: Answers, options: argparse.Namespace, weights: Mapping[str, float]) -> Any:
    """The page, as Gradio's ``Blocks``.

    Args:
        answers: who answers.
        options: what the settings are to begin with.
        weights: of the adapters that get a slider each, by name.
    """
    import gradio as gr

    options = argparse.Namespace(**vars(options), question="", weights=dict(weights))
    if options.seed is None:
        options.seed = secrets.randbits(31)
    names = list(weights)
    fields = [*TEXTS, *NUMBERS]

    def answered(*values: Any) -> tuple[str, str, str, str]:
        given = dict(zip(fields, values, strict=False))
        of_adapters = dict(zip(names, values[len(fields) :], strict=True))
        try:
            made = settings(options, given, of_adapters)
            if not made.question:
                return "", "", "### Policy", ""
            base, policy = answers(made)
        except (ValueError, OSError) as error:
            raise gr.Error(str(error), duration=None) from error
        address = html.escape(link(made), quote=True)
        return (
            coloured(base),
            coloured(policy),
            f"### Policy, strength {made.strength:g}",
            f'<a id="settings-link" href="{address}">Link to this question and its settings</a>',
        )

    def opened(request: gr.Request) -> Iterator[list[Any]]:
        """What a link says, and its answers; without one nothing is touched, as by the time that
        this arrives there may be a question."""
        untouched = [gr.skip()] * (len(inputs) + len(outputs))
        if not request.query_params:
            yield untouched
            return
        try:
            made = from_link(options, dict(request.query_params), names)
            for what, value in (("strength", made.strength), *made.weights.items()):
                if abs(value) > most:
                    raise ValueError(f"{what}: at most {most:g} here, got {value:g}")
        except ValueError as error:
            gr.Warning(f"The link is not right. {error}")
            yield untouched
            return
        values = [getattr(made, name) for name in fields] + [made.weights[name] for name in names]
        yield [*values, *untouched[len(values) :]]
        yield [*untouched[: len(values)], *answered(*values)]

    most = max(LARGEST, *(math.ceil(2 * abs(x)) for x in (options.strength, *weights.values())))
    with gr.Blocks(title="qadapter", analytics_enabled=False) as made:
        gr.Markdown("## Base and policy, side by side")
        question = gr.Textbox(
            label="Question", max_lines=8, autofocus=True, elem_id="question", submit_btn=True
        )
        strength = gr.Slider(
            0, most, options.strength, step=0.01, elem_id="strength",
            label="Strength: 0 is the base, 1 as trained; another one answers anew",
        )  # fmt: skip
        sliders = [
            gr.Slider(
                -most, most, weight, step=0.01, label=f"Weight of {name}", elem_id=f"weight-{name}"
            )
            for name, weight in weights.items()
        ]
        with gr.Accordion("Sampling", open=False):
            system = gr.Textbox(options.system or "", label="System message")
            with gr.Row():
                numbers = {
                    "temperature": gr.Number(options.temperature, label="Temperature, 0 is greedy"),
                    "top_p": gr.Number(options.top_p, label="Top p"),
                    "max_new_tokens": gr.Number(
                        options.max_new_tokens, label="Tokens at most", precision=0
                    ),
                    "seed": gr.Number(options.seed, label="Seed", precision=0),
                }
        with gr.Row():
            with gr.Column():
                gr.Markdown("### Base")
                base = gr.HTML(elem_id="base")
            with gr.Column():
                title = gr.Markdown("### Policy")
                policy = gr.HTML(elem_id="policy")
        gr.HTML(LEGEND.format(more=colour(STRONGEST), less=colour(-STRONGEST)))
        address = gr.HTML(elem_id="link")
        inputs = [question, system, strength, *numbers.values(), *sliders]
        outputs = [base, policy, title, address]
        asks = [question.submit, strength.release, *(slider.release for slider in sliders)]
        gr.on(
            asks, answered, inputs, outputs, trigger_mode="always_last", api_name="answer",
            show_progress_on=[base, policy],
        )  # fmt: skip
        made.load(
            opened, None, inputs + outputs, show_progress_on=[base, policy],
            api_visibility="private",
        )  # fmt: skip
    return made
