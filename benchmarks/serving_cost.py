"""What both streams cost in vLLM over the base alone, on the CPU.

    python -m benchmarks.serving_cost --adapter out

Two engines, a process each, take turns at the same batches; medians of the turns. Time is CPU time
of the engine's process with one thread, which neighbours on the machine disturb less than the
clock on the wall. Run it where vLLM is (make serve-test makes such an environment).
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from typing import Any

PROMPT, TOKENS = 64, 16
KINDS = ("base", "streams")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--adapter", required=True, help="folder of a saved adapter")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--engine", choices=KINDS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.engine:
        serve_turns(options)
        return
    children = {kind: start(kind) for kind in KINDS}
    blocks = {kind: ask(child, None) for kind, child in children.items()}
    print(f"KV cache: {blocks['base']} blocks for the base, {blocks['streams']} for both streams")
    turns: dict[tuple[str, int], list[tuple[float, float]]] = {}
    for turn in range(options.turns + 1):  # the first warms up
        for batch in options.batch:
            for kind in KINDS if turn % 2 else KINDS[::-1]:
                made = ask(children[kind], batch)
                if turn:
                    turns.setdefault((kind, batch), []).append(made)
    for child in children.values():
        child.stdin.close()
        child.wait()
    for batch in options.batch:
        report(batch, {kind: turns[kind, batch] for kind in KINDS})


def report(batch: int, turns: dict[str, list[tuple[float, float]]]) -> None:
    for at, what in enumerate((f"prefill of {PROMPT} tokens", "a decoded token")):
        base, streams = (statistics.median(made[at] for made in turns[kind]) for kind in KINDS)
        spread = [s[at] / b[at] for b, s in zip(*(turns[kind] for kind in KINDS), strict=True)]
        print(
            f"batch {batch}, {what}: base {1000 * base:.1f} ms, both streams {1000 * streams:.1f} "
            f"ms, {statistics.median(spread):.2f} times ({min(spread):.2f} to {max(spread):.2f})"
        )


def start(kind: str) -> Any:
    environment = {
        **os.environ,
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_NO_USAGE_STATS": "1",
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-m", "benchmarks.serving_cost", *sys.argv[1:], "--engine", kind]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=environment)


def ask(child: Any, batch: int | None) -> Any:
    """The number of blocks if ``batch`` is None, else seconds of a prefill and of a token."""
    child.stdin.write(json.dumps(batch) + "\n")
    child.stdin.flush()
    for line in child.stdout:
        if line.startswith("MADE "):
            return json.loads(line.removeprefix("MADE "))
    raise SystemExit("an engine has ended before its answer")


# In an engine's process.


def serve_turns(options: argparse.Namespace) -> None:
    from vllm import LLM

    from qadapter.model.serving import engine_arguments

    arguments = engine_arguments(options.adapter)
    if options.engine == "base":
        del arguments["hf_overrides"]
    llm = LLM(
        **arguments,
        dtype=options.dtype,
        enforce_eager=True,
        max_model_len=256,
        max_num_seqs=max(options.batch),
        kv_cache_memory_bytes=1 << 30,
        enable_prefix_caching=False,
    )
    for line in sys.stdin:
        batch = json.loads(line)
        if batch is None:
            made: Any = llm.llm_engine.vllm_config.cache_config.num_gpu_blocks
        else:
            prefill = seconds(llm, batch, 1)
            made = prefill, (seconds(llm, batch, 1 + TOKENS) - prefill) / TOKENS
        print("MADE", json.dumps(made), flush=True)


def seconds(llm: Any, batch: int, tokens: int) -> float:
    """CPU time in which every prompt of a batch gets its answer."""
    from vllm import SamplingParams

    prompts = [{"prompt_token_ids": [100 + 7 * i + j for j in range(PROMPT)]} for i in range(batch)]
    params = SamplingParams(
        temperature=0.0,
        max_tokens=tokens,
        ignore_eos=True,
        detokenize=False,
        extra_args={"strength": 0.5},
    )
    begin = time.process_time()
    llm.generate(prompts, params, use_tqdm=False)
    return time.process_time() - begin


if __name__ == "__main__":
    main()
