"""vLLM serves base and adapters in one engine, with a strength per request.

    qadapter serve --adapter out

    from qadapter.integrations.vllm import engine_arguments
    llm = vllm.LLM(**engine_arguments("out"))
    llm.generate(prompts, vllm.SamplingParams(extra_args={"strength": 0.5}))

vLLM finds what is here by its entry points (pyproject.toml) and imports it; nothing here imports
vLLM before. `settings` is what is served, `two_streams` what becomes of a model of vLLM's, `models`
which ones, `strength` how a request's strength reaches the forward. docs/serving.md says what it
costs and what is refused.
"""

from qadapter.integrations.vllm.settings import (
    ARCHITECTURES,
    engine_arguments,
    served_architecture,
)

__all__ = ["engine_arguments", "register"]


def register() -> None:
    """Entry point of ``vllm.general_plugins``: every process of vLLM runs it."""
    from vllm import ModelRegistry

    for name in map(served_architecture, ARCHITECTURES):
        ModelRegistry.register_model(name, f"qadapter.integrations.vllm.models:{name}")
