"""The named sets: which benchmarks, with which arguments."""

import shlex
from dataclasses import dataclass


@dataclass(frozen=True)
class Step:
    """``name`` is the results' file; ``module`` is imported only when it runs."""

    name: str
    module: str
    arguments: tuple[str, ...] = ()


@dataclass(frozen=True)
class Set:
    device: str
    about: str
    steps: tuple[Step, ...]


def steps(text: str) -> tuple[Step, ...]:
    """One a line: the results' name, the module's without "bench_", its arguments."""
    words = [shlex.split(line) for line in text.strip().splitlines()]
    return tuple(
        Step(name, f"benchmarks.bench_{module}", tuple(more)) for name, module, *more in words
    )


ALIKE = """
sample sample
decode decode
train_step train_step
train_step_shuffled train_step --shuffle 0
train_step_scaling train_step --scaling
"""
SETS = {
    "cpu-quick": Set(
        "cpu",
        "all operations in small, in less than five minutes",
        steps("""
logits logits --n 64 --v 49152 --rounds 9 --seconds 1 --far 20
linear linear --n 256 --size 576x49152 --dtype bf16 --mode uncached --rounds 5 --seconds 4 \
    --far 20
linear_scaling scaling --sweep vocab threads --peers qadapter eager --rounds 1 --least 1 \
    --far 20
sample sample --batch-sizes 8 --vocab 49152 --dtype bf16 --streams two \
    --peers eager transformers FlashInfer --filters plain "top-k, top-p" --far 20
decode decode --batch-sizes 1 --new-tokens 12 --mode sampled --lora all --rounds 1
train_step train_step --pairs 2 --batches 1 --rounds 1
context context --budgets 512 --resolution 64
"""),
    ),
    "cpu": Set(
        "cpu",
        "everything, in about two hours",
        steps(f"""
logits logits --seconds 20 --far 20
linear linear --size 576x49152 --seconds 10 --far 20
linear linear --size 576x128256 2048x128256 --mode uncached --seconds 10 --far 20 --append
linear_scaling scaling --rounds 3 --seconds 20 --far 20
{ALIKE.strip()}
context context --resolution 64
loss_curves loss_curve
instructions instructions
"""),
    ),
    "gpu-quick": Set(
        "cuda",
        "all operations in small",
        steps("""
logits logits --dtype bf16 --seconds 5
linear linear --size 4096x128256 --mode uncached --seconds 10
sample sample --streams two --filters plain "top-k, top-p"
decode decode --model smollm2 --batch-sizes 1 --new-tokens 32 --mode sampled --lora all
train_step train_step --batches 1
context context --budgets 4096 --resolution 256
"""),
    ),
    "gpu": Set(
        "cuda",
        "everything but what is the CPU's alone",
        steps(f"""
logits logits
linear linear
linear_scaling scaling
{ALIKE.strip()}
context context
"""),
    ),
}
