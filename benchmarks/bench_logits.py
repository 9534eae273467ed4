"""Values and losses from materialised logits, against eager PyTorch and torch.compile.

    python -m benchmarks.bench_logits [--n 256 --v 128256 --dtype fp32 bf16 --threads 2 --json PATH]

Bytes are those that must move: forward one read of both logits, backward a read of what x needs
and one write; what a peer moves beyond that counts against it. "Of ceiling" is the time that the
reads would take at the best read bandwidth seen, plus the writes at half the copy bandwidth, over
the median time.
"""

import argparse
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import qadapter
from benchmarks import harness
from benchmarks.peers import compiled, eager
from qadapter import functional as QF

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
OPS = ("forward", "backward", "forward+backward", "loss+backward")
LOSS = {"gamma": 1.0, "reg_coef": 0.1, "bt_scale": 1.0}


def make_inputs(n: int, v: int, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator(device=device).manual_seed(0)
    base = torch.randn(n, v, device=device, generator=generator).mul_(3)
    q = base + torch.randn(n, v, device=device, generator=generator).mul_(0.3)
    actions = torch.randint(0, v, (n,), device=device, generator=generator)
    return base.to(dtype), q.to(dtype), actions


def cases(
    base: Tensor, q: Tensor, actions: Tensor, alphas: tuple[float, float, float], pairs: int
) -> tuple[dict[str, dict[str, Callable[[], Any]]], Tensor]:
    """op -> implementation -> function; and the tensor whose gradient they compute."""
    n = base.shape[0]
    leaf = q.detach().clone().requires_grad_()
    grads = tuple(torch.randn(3, n, device=q.device))
    names = dict(zip(("alpha_0", "alpha_tilde", "center"), alphas, strict=True))
    lengths = torch.full((2 * pairs + 1,), n // (2 * pairs), device=q.device, dtype=torch.int32)
    lengths[0] = 0
    cu_seqlens = lengths.cumsum(0, dtype=torch.int32)

    def ours(logits: Tensor) -> tuple[Tensor, ...]:
        values = QF.residual_values(base, logits, actions, **names)
        return values.q, values.value, values.base_logp, values.policy_logp

    forwards: dict[str, Callable[[Tensor], tuple[Tensor, ...]]] = {
        "qadapter": ours,
        "compile": lambda logits: compiled.residual_values(base, logits, actions, *alphas),
        "eager": lambda logits: eager.residual_values(base, logits, actions, *alphas),
    }

    def forward(function: Callable[[Tensor], tuple[Tensor, ...]]) -> Callable[[], Any]:
        def run() -> Any:
            with torch.no_grad():
                return function(q)

        return run

    def both(function: Callable[[Tensor], tuple[Tensor, ...]]) -> Callable[[], Any]:
        def run() -> Any:
            leaf.grad = None
            q_a, value, _, logp = function(leaf)
            torch.autograd.backward((q_a, value, logp), grads)

        return run

    def backward(function: Callable[[Tensor], tuple[Tensor, ...]]) -> Callable[[], Any]:
        graph: list[tuple[Tensor, ...]] = []

        def prepare() -> None:
            q_a, value, _, logp = function(leaf)
            graph[:] = [(q_a, value, logp)]
            leaf.grad = None

        def run() -> Any:
            torch.autograd.backward(graph.pop(), grads)

        return harness.Prepared(prepare, run)

    def loss(function: Callable[[], Tensor]) -> Callable[[], Any]:
        def run() -> Any:
            leaf.grad = None
            function().backward()

        return run

    def our_loss() -> Tensor:
        return QF.qadapter_loss(base, leaf, actions, cu_seqlens, **names, **LOSS).loss

    def eager_loss() -> Tensor:
        q_a, value, _, _ = eager.residual_values(base, leaf, actions, *alphas)
        return eager.preference_loss(q_a, value, pairs, **LOSS)

    def compiled_loss() -> Tensor:
        return compiled.loss(base, leaf, actions, alphas, pairs, *LOSS.values())

    ops = {
        "forward": {k: forward(f) for k, f in forwards.items()},
        "backward": {k: backward(f) for k, f in forwards.items()},
        "forward+backward": {k: both(f) for k, f in forwards.items()},
        "loss+backward": {
            "qadapter": loss(our_loss),
            "compile": loss(compiled_loss),
            "eager": loss(eager_loss),
        },
    }
    return ops, leaf


def traffic(op: str, tensor_bytes: int, m: float) -> tuple[int, int]:
    """(bytes read, bytes written) that the operation cannot do without."""
    back = (tensor_bytes * (1 if m == 0 else 2), tensor_bytes)
    if op == "forward":
        return 2 * tensor_bytes, 0
    if op == "backward":
        return back
    return 2 * tensor_bytes + back[0], back[1]


def run(options: argparse.Namespace) -> list[dict[str, Any]]:
    rows = []
    alphas = (options.alpha_0, options.alpha_tilde, options.center)
    peaks = harness.ceilings(options.device, clock=options.clock)
    print(
        f"ceilings: read {peaks.read_gb_s:.1f} GB/s, copy {peaks.copy_gb_s:.1f} GB/s, GEMM "
        + ", ".join(f"{k} {v:.2f} TFLOP/s" for k, v in peaks.gemm_tflop_s.items())
    )
    for name in options.dtype:
        base, q, actions = make_inputs(options.n, options.v, DTYPES[name], options.device)
        ops, leaf = cases(base, q, actions, alphas, options.pairs)
        for op in options.op or ops:
            functions = {k: ops[op][k] for k in ("qadapter", *options.peers)}
            reads = {f"read {k}": f for k, f in harness.read_function(base).items()}
            times = harness.interleaved(
                {**functions, **reads},
                device=options.device,
                rounds=options.rounds,
                seconds=options.seconds,
                clock=options.clock,
            )
            read_gb_s = base.nbytes / min(times[k].best for k in reads) / 1e6
            read, written = traffic(op, base.nbytes, alphas[0] - alphas[2])
            floor = (read / read_gb_s + written / (peaks.copy_gb_s / 2)) / 1e6
            for who, function in functions.items():
                timing = times[who]
                leaf.grad = None
                harness.prepare(function)
                with harness.peak_memory(options.device) as peak:
                    result = function()
                del result
                rows.append(
                    {
                        "dtype": name,
                        "op": op,
                        "who": who,
                        "ms": timing,
                        "gb_s": (read + written) / timing.median / 1e6,
                        "read_gb_s": read_gb_s,
                        "share_of_ceiling": floor / timing.median,
                        "times_ours": timing.median / times["qadapter"].median,
                        "times_ours_best": timing.best / times["qadapter"].best,
                        "peak_mib": peak.mebibytes,
                    }
                )
        del base, q, ops, leaf
    harness.write_json(
        "logits",
        options.device,
        rows,
        options.json,
        clock=options.clock,
        shape={"n": options.n, "v": options.v, "alphas": alphas, "pairs": options.pairs},
        ceilings=peaks,
    )
    return rows


def show(rows: list[dict[str, Any]]) -> str:
    header = ["dtype", "op", "who", "best", "median (p20-p80) ms"]
    header += ["GB/s", "of ceiling", "x ours: best", "median", "peak MiB"]
    lines = [
        [
            row["dtype"],
            row["op"],
            row["who"],
            f"{row['ms'].best:.2f}",
            f"{row['ms'].median:.2f} ({row['ms'].p20:.2f}-{row['ms'].p80:.2f})",
            f"{row['gb_s']:.1f}",
            f"{row['share_of_ceiling']:.0%}",
            f"{row['times_ours_best']:.2f}",
            f"{row['times_ours']:.2f}",
            f"{row['peak_mib']:.0f}",
        ]
        for row in rows
    ]
    return harness.table(header, lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--n", type=int, default=256, help="rows, a multiple of 2 * pairs")
    parser.add_argument("--v", type=int, default=128256, help="vocabulary")
    parser.add_argument("--pairs", type=int, default=4)
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=["fp32", "bf16"])
    parser.add_argument(
        "--op", nargs="+", help="forward, backward, forward+backward, loss+backward"
    )
    parser.add_argument("--peers", nargs="*", default=["compile", "eager"])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--backend", help="default: cpp on a CPU, triton on a GPU")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--alpha-0", type=float, default=1.0)
    parser.add_argument("--alpha-tilde", type=float, default=1.0)
    parser.add_argument("--center", type=float, default=1.0)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--seconds", type=float, default=60.0, help="at most, per op and dtype")
    parser.add_argument("--clock", choices=harness.CLOCKS, default="wall")
    parser.add_argument("--json", help="default: benchmarks/results/logits-<device>.json")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    backend = options.backend or {"cpu": "cpp", "cuda": "triton"}[options.device]
    with qadapter.use_backend(backend):
        rows = run(options)
    print(show(rows))


if __name__ == "__main__":
    main()
