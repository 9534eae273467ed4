"""What both streams cost in vLLM on the CPU: over the base alone, against two servers, against
the package's own decoder.

    python -m benchmarks.serving_cost --adapter out

A process each takes turns at the same batches:

    base      vLLM with the base
    merged    vLLM with the adapter merged into the weights; this and `base` are two separate
              servers, whose logits a client would have to mix
    streams   vLLM with the plug-in
    own       model.generate(strength=...)

Time is CPU time of the process with one thread, which neighbours on the machine disturb less than
the clock on the wall; medians of the turns, ratios turn by turn. Run it where vLLM is (make
serve-test makes such an environment).
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks import recording
from qadapter import export_adapter, files

KINDS = ("base", "merged", "streams", "own")
STRENGTH = 0.5
KV_BYTES = 1 << 29  # for each engine


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--adapter", required=True, help="folder of a saved adapter")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--prompt", type=int, default=32, help="tokens of every prompt")
    parser.add_argument("--tokens", type=int, default=17, help="of every answer")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--json", type=Path, default=recording.RESULTS / "serving-cpu.json")
    parser.add_argument("--kind", choices=KINDS, help=argparse.SUPPRESS)
    parser.add_argument("--merged", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.kind:
        serve_turns(options)
        return
    with tempfile.TemporaryDirectory() as folder:
        merged = Path(folder) / "merged"
        export_adapter(options.adapter, merged, strength=STRENGTH, merge=True, dtype=options.dtype)
        measure(options, merged)


def measure(options: argparse.Namespace, merged: Path) -> None:
    """Writes the file again after every turn of a batch."""
    children = {kind: start(kind, merged) for kind in KINDS}
    made = {kind: ask(child, None) for kind, child in children.items()}
    environment = recording.environment("cpu") | {"threads": 1}
    settings = {
        "clock": "cpu",
        "versions": recording.versions() | {"vllm": made["base"]["version"]},
        "model": made["base"]["model"],
        "dtype": options.dtype,
        "prompt": options.prompt,
        "tokens": options.tokens,
        "KV tokens a GiB": {
            k: m["kv tokens"] * (1 << 30) // KV_BYTES for k, m in made.items() if m
        },
    }
    for child in children.values():
        ask(child, 1)  # warms up
    turns: dict[int, list[dict[str, Any]]] = {batch: [] for batch in options.batch}
    for turn in range(options.turns):
        for batch in options.batch:
            order = KINDS if turn % 2 else KINDS[::-1]
            turns[batch].append({kind: ask(children[kind], batch) for kind in order})
            done = {b: t for b, t in turns.items() if t}
            rows = [row(b, options.tokens, t) for b, t in done.items()]
            record = {"benchmark": "serving", "environment": environment, **settings, "rows": rows}
            files.write_json(options.json, record)
    for child in children.values():
        child.stdin.close()
        child.wait()
    for one in rows:
        print(json.dumps(one))


def row(batch: int, tokens: int, turns: list[dict[str, Any]]) -> dict[str, Any]:
    """Milliseconds to the first tokens of a batch and of each further step, and ratios to base."""
    made: dict[str, Any] = {"batch": batch, "turns": len(turns)}
    for what in ("first", "step"):
        for kind in KINDS:
            took = [1000.0 * turn[kind][what] for turn in turns]
            made[f"{kind} {what} ms"] = spread(took)
            if kind != "base":
                ratios = [turn[kind][what] / turn["base"][what] for turn in turns]
                made[f"{kind} {what} over base"] = spread(ratios)
        of_two = [(t["base"][what] + t["merged"][what]) / t["base"][what] for t in turns]
        made[f"two servers {what} over base"] = spread(of_two)
    for kind in KINDS:
        made[f"{kind} tokens a second"] = batch * 1000.0 / made[f"{kind} step ms"]["median"]
    return made


def spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def start(kind: str, merged: Path) -> Any:
    environment = {
        **os.environ,
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_NO_USAGE_STATS": "1",
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-m", "benchmarks.serving_cost", *sys.argv[1:]]
    command += ["--kind", kind, "--merged", str(merged)]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=environment)


def ask(child: Any, batch: int | None) -> Any:
    """What it is if ``batch`` is None, else CPU seconds of the first tokens and of a step."""
    child.stdin.write(json.dumps(batch) + "\n")
    child.stdin.flush()
    for line in child.stdout:
        if line.startswith("MADE "):
            return json.loads(line.removeprefix("MADE "))
    raise SystemExit("a process has ended before its answer")


# In a process of its own.


def serve_turns(options: argparse.Namespace) -> None:
    served: Any = (Decoder if options.kind == "own" else Engine)(options)
    for line in sys.stdin:
        batch = json.loads(line)
        made: Any = served.about
        if batch is not None:
            prompts = [[100 + 7 * i + j for j in range(options.prompt)] for i in range(batch)]
            first, all_of_them = served.seconds(prompts, options.tokens)
            made = {"first": first, "step": (all_of_them - first) / (options.tokens - 1)}
        print("MADE", json.dumps(made), flush=True)


class Engine:
    """vLLM, stepped by hand."""

    def __init__(self, options: argparse.Namespace) -> None:
        import vllm

        from qadapter.model.serving import engine_arguments

        arguments = engine_arguments(options.adapter, strength=STRENGTH)
        if options.kind != "streams":
            del arguments["hf_overrides"]
        if options.kind == "merged":
            arguments["model"] = options.merged
        length, most = options.prompt + options.tokens, max(options.batch)
        self.engine = vllm.LLM(
            **arguments,
            dtype=options.dtype,
            enforce_eager=True,
            max_model_len=2 * length,
            max_num_seqs=most,
            max_num_batched_tokens=most * length,  # prompts of a batch make one step
            kv_cache_memory_bytes=KV_BYTES,
            enable_prefix_caching=False,
        ).llm_engine
        cache = self.engine.vllm_config.cache_config
        self.about = {
            "version": vllm.__version__,
            "model": Path(arguments["model"]).name,
            "kv tokens": cache.num_gpu_blocks * cache.block_size,
        }
        self.asked = 0

    def seconds(self, prompts: list[list[int]], tokens: int) -> tuple[float, float]:
        from vllm import SamplingParams

        params = SamplingParams(
            temperature=0.0, max_tokens=tokens, ignore_eos=True, detokenize=False
        )
        begin = time.process_time()
        for ids in prompts:
            self.asked += 1
            self.engine.add_request(str(self.asked), {"prompt_token_ids": ids}, params)
        first, seen = 0.0, set()
        while self.engine.has_unfinished_requests():
            seen |= {output.request_id for output in self.engine.step()}
            if not first and len(seen) == len(prompts):
                first = time.process_time() - begin
        return first, time.process_time() - begin


class Decoder:
    """The package's own."""

    def __init__(self, options: argparse.Namespace) -> None:
        import torch

        from qadapter import QAdapterModel

        torch.set_num_threads(1)
        self.model = QAdapterModel.from_pretrained(options.adapter, dtype=options.dtype).eval()
        self.about: dict[str, Any] = {}

    def seconds(self, prompts: list[list[int]], tokens: int) -> tuple[float, float]:
        import torch
        from transformers import StoppingCriteriaList

        stamps: list[float] = []

        def stamp(input_ids: Any, scores: Any, **kwargs: Any) -> Any:
            stamps.append(time.process_time())
            return torch.zeros(len(prompts), dtype=torch.bool)

        begin = time.process_time()
        self.model.generate(
            torch.tensor(prompts),
            strength=STRENGTH,
            min_new_tokens=tokens,
            max_new_tokens=tokens,
            do_sample=False,
            stopping_criteria=StoppingCriteriaList([stamp]),
        )
        return stamps[0] - begin, time.process_time() - begin


if __name__ == "__main__":
    main()
