"""vLLM serves base and adapters in one engine, with a strength per request.

    qadapter serve --adapter out

    from qadapter.integrations.vllm import engine_arguments
    llm = vllm.LLM(**engine_arguments("out"))
    llm.generate(prompts, vllm.SamplingParams(extra_args={"strength": 0.5}))

vLLM finds what is here by its entry points (pyproject.toml) and imports it; nothing here imports
vLLM before. `qadapter.model.serving` says what is served, `two_streams` makes streams of a model of
vLLM's, `models` says of which, `strength` brings a request's strength to the forward.
docs/serving.md has what it costs and what is refused.
"""

from qadapter.model.serving import ARCHITECTURES, engine_arguments, served_architecture

__all__ = ["engine_arguments", "register"]


def register() -> None:
    """Entry point of ``vllm.general_plugins``: every process of vLLM runs it."""
    from vllm import ModelRegistry

    for name in map(served_architecture, ARCHITECTURES):
        ModelRegistry.register_model(name, f"qadapter.integrations.vllm.models:{name}")
