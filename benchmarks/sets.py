"""The named sets: which benchmarks, with which arguments."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Step:
    """``name`` is the results' file; ``module`` is imported only when it runs."""

    name: str
    module: str
    arguments: tuple[str, ...] = ()


def _step(name: str, module: str, *arguments: str) -> Step:
    return Step(name, f"benchmarks.{module}", tuple(a for text in arguments for a in text.split()))


@dataclass(frozen=True)
class Set:
    device: str
    about: str
    steps: tuple[Step, ...]


_BOTH = ("--filters", "plain", "top-k, top-p")  # has a space, so not to be split
_LARGER = "--size 576x128256 2048x128256"
_EVERYTHING = (
    _step("logits", "bench_logits"),
    _step("linear", "bench_linear"),
    _step("linear_scaling", "bench_scaling"),
    _step("sample", "bench_sample"),
    _step("decode", "bench_decode"),
    _step("train_step", "bench_train_step"),
    _step("train_step_shuffled", "bench_train_step", "--shuffle 0"),
    _step("train_step_scaling", "bench_train_step", "--scaling"),
    _step("context", "bench_context"),
)

SETS = {
    "cpu-quick": Set(
        "cpu",
        "all operations in small, in less than five minutes",
        (
            _step("logits", "bench_logits", "--n 64 --v 49152 --rounds 9 --seconds 1"),
            _step(
                "linear",
                "bench_linear",
                "--n 256 --size 576x49152 --dtype bf16 --mode uncached --rounds 5 --seconds 4",
            ),
            _step(
                "linear_scaling",
                "bench_scaling",
                "--sweep vocab threads --peers qadapter eager --rounds 1 --least 1",
            ),
            Step(
                "sample",
                "benchmarks.bench_sample",
                ("--batch-sizes", "8", "--vocab", "49152", "--dtype", "bf16", "--streams", "two",
                 "--peers", "eager", "transformers", "FlashInfer", *_BOTH),
            ),
            _step(
                "decode",
                "bench_decode",
                "--batch-sizes 1 --new-tokens 12 --mode sampled --lora all --rounds 1",
            ),
            _step("train_step", "bench_train_step", "--pairs 2 --batches 1 --rounds 1"),
            _step("context", "bench_context", "--budgets 512 --resolution 64"),
        ),
    ),
    "cpu": Set(
        "cpu",
        "everything, in about two hours",
        (
            _step("logits", "bench_logits", "--seconds 20"),
            _step("linear", "bench_linear", "--size 576x49152 --seconds 10"),
            _step("linear", "bench_linear", f"{_LARGER} --mode uncached --seconds 10 --append"),
            _step("linear_scaling", "bench_scaling", "--rounds 3 --seconds 20"),
            *_EVERYTHING[3:-1],
            _step("context", "bench_context", "--resolution 64"),
            _step("loss_curves", "bench_loss_curve"),
            _step("instructions", "bench_instructions"),
        ),
    ),
    "gpu-quick": Set(
        "cuda",
        "all operations in small",
        (
            _step("logits", "bench_logits", "--dtype bf16 --seconds 5"),
            _step("linear", "bench_linear", "--size 4096x128256 --mode uncached --seconds 10"),
            Step("sample", "benchmarks.bench_sample", ("--streams", "two", *_BOTH)),
            _step(
                "decode",
                "bench_decode",
                "--model smollm2 --batch-sizes 1 --new-tokens 32 --mode sampled --lora all",
            ),
            _step("train_step", "bench_train_step", "--batches 1"),
            _step("context", "bench_context", "--budgets 4096 --resolution 256"),
        ),
    ),
    "gpu": Set("cuda", "everything but what is the CPU's alone", _EVERYTHING),
}  # fmt: skip
