"""What a process holds while it trains, by arithmetic: the table of docs/scaling.md.

    python -m benchmarks.memory

Bytes of models of Llama's kind, from shapes alone: weights, LoRA, its gradients and the two moments
of AdamW, what FSDP2 gathers, the base cache. Not counted: activations, DistributedDataParallel's
buckets (the gradients again), buffers of all-gathers, CUDA's own.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

PAGE = Path(__file__).parents[1] / "docs" / "scaling.md"
BEGIN, END = "<!-- memory: made by make memory-table -->\n", "<!-- end of memory -->\n"

BFLOAT16, FLOAT32 = 2, 4
BLOCK, NESTED = 64, 256  # of nf4's absolute maxima, and of these again where quantised twice


@dataclass(frozen=True)
class Shape:
    """A model of Llama's kind, its head not tied."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int

    def linears(self) -> list[tuple[int, int]]:
        """(out, in) of the linear layers of a layer."""
        queries, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        up = (self.intermediate, self.hidden)
        return [
            *((queries, self.hidden), (keys, self.hidden), (keys, self.hidden)),
            *((self.hidden, queries), up, up, (self.hidden, self.intermediate)),
        ]

    def layer(self) -> list[tuple[int, ...]]:
        """Of all parameters of a layer."""
        return [*self.linears(), (self.hidden,), (self.hidden,)]

    def lora(self, rank: int) -> list[tuple[int, int]]:
        """Of A and B on all linear layers of a layer."""
        return [s for out, into in self.linears() for s in ((rank, into), (out, rank))]

    def root(self) -> list[tuple[int, ...]]:
        """Embedding, last norm, head: in no layer."""
        return [(self.vocab, self.hidden), (self.hidden,), (self.vocab, self.hidden)]


LLAMA_8B = Shape(4096, 14336, 32, 32, 8, 128, 128256)
LLAMA_70B = Shape(8192, 28672, 80, 64, 8, 128, 128256)


class Memory(NamedTuple):
    """Bytes of the process that has most."""

    base: int
    lora: int
    gradients: int
    moments: int
    gathered: int  # FSDP2: the unit of the root, which stays, and two layers

    @property
    def total(self) -> int:
        return sum(self)


def elements(shapes: list, processes: int = 1) -> int:
    """Of these parameters, cut along their first dimension."""
    return sum(math.ceil(s[0] / processes) * math.prod(s[1:]) for s in shapes)


def nf4(shape: tuple[int, int], storage: int = 1, processes: int = 1, twice: bool = True) -> int:
    """Bytes of a weight in bitsandbytes' nf4. Two values a byte are stored in elements of
    ``storage`` bytes, which FSDP2 cuts; what is known of the blocks is whole in each process.

    Args:
        twice: the blocks' absolute maxima in 8 bits (bnb_4bit_use_double_quant).
    """
    count = math.prod(shape)
    packed = math.ceil(math.ceil(count / 2 / storage) / processes) * storage
    blocks = math.ceil(count / BLOCK)
    table = 16 * FLOAT32
    if not twice:
        return packed + table + blocks * FLOAT32
    # a maximum a block of blocks, the mean of them all, and the table of the 8 bits
    nested = math.ceil(blocks / NESTED) * FLOAT32 + FLOAT32 + 256 * FLOAT32
    return packed + table + blocks + nested


def memory(shape: Shape, rank: int, processes: int = 1, quantised: bool = False) -> Memory:
    """Of a base in bfloat16, its linear layers in nf4 if ``quantised``, with a LoRA of ``rank`` in
    float32 on all of these; sharded by FSDP2 if there are several ``processes``."""
    norms = [s for s in shape.layer() if len(s) == 1]
    if quantised:
        storage = BFLOAT16 if processes > 1 else 1
        linears = sum(nf4(s, storage, processes) for s in shape.linears())
        # Gathered are the packed values alone.
        whole = sum(math.ceil(math.prod(s) / 2 / storage) * storage for s in shape.linears())
    else:
        linears = elements(shape.linears(), processes) * BFLOAT16
        whole = elements(shape.linears()) * BFLOAT16
    layer = linears + elements(norms, processes) * BFLOAT16
    base = shape.layers * layer + elements(shape.root(), processes) * BFLOAT16
    lora = shape.layers * elements(shape.lora(rank), processes) * FLOAT32
    gathered = 0
    if processes > 1:
        # In bfloat16 (mixed precision), LoRA and all.
        unit = whole + elements([*norms, *shape.lora(rank)]) * BFLOAT16
        gathered = elements(shape.root()) * BFLOAT16 + 2 * unit
    return Memory(base, lora, lora, 2 * lora, gathered)


def cache(rows: int, hidden: int = 0) -> int:
    """Bytes on disk of what is kept of the base in ``rows`` states of responses: a logsumexp and a
    log-probability; with ``hidden`` (alpha_0 != center), hidden states of that width too."""
    return rows * (2 * FLOAT32 + hidden * BFLOAT16)


def table(rank: int = 8) -> str:
    lines = [
        "| Llama-3.1 | in a process | base | LoRA | gradients | AdamW | gathered | sum |",
        "|" + "---|" * 8,
    ]
    for name, shape in (("8B", LLAMA_8B), ("70B", LLAMA_70B)):
        for quantised in (False, True):
            for processes in (1, 2, 8):
                kind = "nf4" if quantised else "bf16"
                how = "whole (one process, DDP)" if processes == 1 else f"FSDP2, {processes}"
                found = memory(shape, rank, processes, quantised)
                cells = [f"{count / 1e9:.2f}" for count in (*found, found.total)]
                lines.append(f"| {name} | {kind}, {how} | " + " | ".join(cells) + " |")
    rows = 10**6
    kept = [cache(rows, width) / 1e9 for width in (0, LLAMA_8B.hidden, LLAMA_70B.hidden)]
    lines += [
        "",
        "GB (10^9 bytes). Base cache on disk, a million tokens of responses: {:.3f}; with hidden "
        "states {:.1f} (8B), {:.1f} (70B).".format(*kept),
    ]
    return "\n".join(lines) + "\n"


def written(page: str) -> str:
    """The page with the table in its place."""
    before, rest = page.split(BEGIN)
    return before + BEGIN + table() + END + rest.split(END)[1]


if __name__ == "__main__":
    PAGE.write_text(written(PAGE.read_text()))
