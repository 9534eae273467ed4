"""Attention over packed sequences: no padding, and a prompt computed once for several responses.

A pack is a row of tokens, [prompt, chosen, rejected, prompt, chosen, rejected, ...]. In a group of
lengths (p, c, r) the first p + c tokens are an ordinary causal sequence; the r tokens after them
attend to the p and, causally, to themselves. Nothing attends across groups. What a token sees is
thus exactly what it sees in a sequence of its own, so that hidden states are those of the unpacked
batch up to the rounding of sums taken in another order.

transformers passes unknown keyword arguments of a model on to its attention function, and lets
functions be registered by name. `enable` registers one that does the above and, without packing,
is the function the model had; it then tries, on random tokens, that results are the same.

    flash-attention   one varlen call; the keys of a shared prompt are gathered once per response
                      (queries and keys then differ in number: its causal mask ends flush right)
    sdpa              one call a sequence, causal without a mask where it is a whole sequence;
                      with AVX512_BF16 or AMX one call for all of them, in bfloat16
"""

import functools
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from qadapter.model import cpu_attention
from qadapter.model.quantised import mixes_rows
from qadapter.ops import varlen_attention

logger = logging.getLogger(__name__)

PREFIX = "qadapter_"
ARGUMENTS = (
    "cu_seq_lens_q",
    "cu_seq_lens_k",
    "max_length_q",
    "max_length_k",
    "packed_key_index",
    "packed_groups",
)
"""The keyword arguments of a packed forward: flash-attention's four, and two of ours."""


@dataclass(frozen=True)
class Groups:
    """Lengths of every group, as an object: torch.compile guards the contents of lists of ints, and
    would compile anew for every batch."""

    lengths: tuple[tuple[int, ...], ...]


def layout(groups: Sequence[Sequence[int]]) -> dict[str, Any]:
    """The arguments of a packed forward, and ``position_ids`` [1, T] that restart.

    ``groups`` has one entry a group: the lengths of the shared prompt and of the responses behind
    it; the first response follows the prompt directly. One length alone is a plain sequence.
    """
    queries: list[int] = []
    keys: list[int] = []
    positions: list[int] = []
    key_index: list[int] = []
    start = 0
    for shared, *responses in groups:
        first = responses[0] if responses else 0
        queries.append(shared + first)
        keys.append(shared + first)
        positions.extend(range(shared + first))
        key_index.extend(range(start, start + shared + first))
        at = start + shared + first
        for length in responses[1:]:
            queries.append(length)
            keys.append(shared + length)
            positions.extend(range(shared, shared + length))
            key_index.extend(range(start, start + shared))
            key_index.extend(range(at, at + length))
            at += length
        start = at
    arguments = {
        "position_ids": torch.tensor([positions], dtype=torch.int64),
        "cu_seq_lens_q": torch.tensor([0, *accumulate(queries)], dtype=torch.int32),
        "cu_seq_lens_k": torch.tensor([0, *accumulate(keys)], dtype=torch.int32),
        "max_length_q": max(queries, default=0),
        "max_length_k": max(keys, default=0),
        "packed_groups": Groups(tuple(tuple(group) for group in groups)),
    }
    if len(key_index) != len(positions):
        arguments["packed_key_index"] = torch.tensor(key_index, dtype=torch.int64)
    return arguments


@contextmanager
def _named(config: Any, name: str) -> Iterator[None]:
    """transformers' flash-attention looks its library up by the name in the config."""
    before, config._attn_implementation_internal = config._attn_implementation_internal, name
    try:
        yield
    finally:
        config._attn_implementation_internal = before


def _flash(
    original: str, module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any
) -> tuple[Tensor, None]:
    index = kwargs.pop("packed_key_index", None)
    if kwargs.pop("packed_groups", None) is not None:
        mask = None
    if index is not None:
        key, value = key.index_select(2, index), value.index_select(2, index)
    with _named(module.config, original):
        return ALL_ATTENTION_FUNCTIONS[original](module, query, key, value, mask, **kwargs)


def _sequences(
    groups: Sequence[Sequence[int]], query: Tensor, key: Tensor, value: Tensor
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Queries, keys and values of every sequence. One split and joins of its pieces: the backward
    of slices would fill a tensor of the whole pack for each."""
    lengths = [length for group in groups for length in group]
    queries = iter(query.split(lengths, dim=2))
    keys, values = iter(key.split(lengths, dim=2)), iter(value.split(lengths, dim=2))
    for _, *responses in groups:
        own_q, prompt_k, prompt_v = next(queries), next(keys), next(values)
        if not responses:
            yield own_q, prompt_k, prompt_v
        for number in range(len(responses)):
            q, k, v = next(queries), next(keys), next(values)
            yield (
                torch.cat((own_q, q), 2) if number == 0 else q,
                torch.cat((prompt_k, k), 2),
                torch.cat((prompt_v, v), 2),
            )


@functools.lru_cache(maxsize=8)
def _shared_and_own(groups: Groups) -> Tensor:
    """int64 [S, 2] of the sequences: how much of a prompt they share, and what is their own."""
    rows = []
    for shared, *responses in groups.lengths:
        rows.append((0, shared + sum(responses[:1])))
        rows.extend((shared, length) for length in responses[1:])
    return torch.tensor(rows, dtype=torch.int64).view(-1, 2)


# One graph break a layer: traced, the loop would be compiled for these lengths alone.
@torch.compiler.disable
def _sdpa_packed(
    original: str, module: Any, query: Tensor, key: Tensor, value: Tensor, groups: Groups, **kw: Any
) -> Tensor:
    function = ALL_ATTENTION_FUNCTIONS[original]
    window = kw.get("sliding_window")
    outputs = []
    plain = cpu_attention.serves(query, kw)
    if plain and varlen_attention.serves(query, value):
        sequences = _shared_and_own(groups)
        output = varlen_attention.varlen_attention(
            query[0], key[0], value[0], sequences, kw["scaling"], window
        )
        return output.transpose(0, 1)[None]
    for q, k, v in _sequences(groups.lengths, query, key, value):
        num_queries, num_keys = q.shape[2], k.shape[2]
        if num_queries == 0:
            continue
        if plain:
            outputs.append(cpu_attention.attention(q, k, v, kw["scaling"], window))
            continue
        mask = None
        if num_queries < num_keys or (window is not None and num_keys > window):
            mask = cpu_attention.causal_mask(num_queries, num_keys, window, q.device)[None, None]
        outputs.append(function(module, q, k, v, mask, **kw)[0])
    return torch.cat(outputs, dim=1)


def _sdpa(
    original: str, module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any
) -> tuple[Tensor, None]:
    groups = kwargs.pop("packed_groups", None)
    if groups is None:
        return ALL_ATTENTION_FUNCTIONS[original](module, query, key, value, mask, **kwargs)
    kept = {k: v for k, v in kwargs.items() if k not in ARGUMENTS}
    return _sdpa_packed(original, module, query, key, value, groups, **kept), None


def _register(original: str) -> str:
    name = PREFIX + original
    if name not in ALL_ATTENTION_FUNCTIONS:
        serve = _flash if "flash" in original else _sdpa

        def attention(
            module: Any,
            query: Tensor,
            key: Tensor,
            value: Tensor,
            attention_mask: Any,  # by this name some models hand it over
            *_: Any,
            **kwargs: Any,
        ) -> tuple[Tensor, None]:
            return serve(original, module, query, key, value, attention_mask, **kwargs)

        ALL_ATTENTION_FUNCTIONS.register(name, attention)
        ALL_MASK_ATTENTION_FUNCTIONS.register(name, ALL_MASK_ATTENTION_FUNCTIONS[original])
    return name


def is_enabled(model: PreTrainedModel) -> bool:
    return str(model.config._attn_implementation).startswith(PREFIX)


def arguments_for(
    model: PreTrainedModel, input_ids: Tensor, arguments: dict[str, Any]
) -> dict[str, Any]:
    """What to call ``model`` with; ``arguments`` may hold those of a packed forward."""
    arguments = {"input_ids": input_ids, "use_cache": False, **arguments}
    if "packed_groups" in arguments:
        if not is_enabled(model):
            raise RuntimeError(
                "a packed batch, but the model's attention implementation is "
                f"{model.config._attn_implementation!r}; call packed_attention.enable(model) first "
                "and leave the attention implementation as it is then"
            )
        # A mask of four dimensions is passed on as it is, so that none is made; nothing reads it.
        arguments["attention_mask"] = torch.empty(1, 1, 1, 1, device=input_ids.device)
    return arguments


def trunk(model: PreTrainedModel, input_ids: Tensor, arguments: dict[str, Any]) -> Tensor:
    """Last hidden states [B, T, D], without the language-model head."""
    base_model: Any = model.base_model
    return base_model(**arguments_for(model, input_ids, arguments))[0]


def _static_reason(model: PreTrainedModel) -> str | None:
    name = str(model.config._attn_implementation)
    if not (name == "sdpa" or "flash" in name):
        return f"the attention implementation is {name!r}; sdpa and flash-attention can be packed"
    if not getattr(model, "_supports_flash_attn", False):
        return f"{type(model).__name__} does not pass what packed attention needs to its layers"
    kinds = set(getattr(model.config.get_text_config(), "layer_types", None) or ())
    other = kinds - {"full_attention", "sliding_attention"}
    if other:
        return f"it has layers of another kind: {', '.join(sorted(other))}"
    return None


@torch.no_grad()
def _differs(model: PreTrainedModel) -> str | None:
    """Packed against one sequence at a time, on random tokens."""
    config = model.config.get_text_config()
    window = getattr(config, "sliding_window", None)
    long = window + 5 if isinstance(window, int) and window <= 64 else 9
    groups = [[3, long, 4], [6], [2, 3, long]]
    generator = torch.Generator().manual_seed(0)
    total = sum(map(sum, groups))
    ids = torch.randint(config.vocab_size, (1, total), generator=generator).to(model.device)
    arguments = {
        k: v.to(model.device) if isinstance(v, Tensor) else v for k, v in layout(groups).items()
    }
    packed = trunk(model, ids, arguments)[0].float()
    plain = torch.empty_like(packed)
    start = 0
    for shared, *responses in groups:
        prompt = torch.arange(start, start + shared)
        at = start + shared
        for length in responses or [0]:
            own = torch.arange(at, at + length)
            where = torch.cat([prompt, own]).to(model.device)
            plain[where] = trunk(model, ids[:, where], {})[0].float()
            at += length
        start = at
    scale = plain.abs().amax(0)
    error = ((packed - plain).abs() / (scale + plain.abs().mean())).max().item()
    exact = model.dtype in (torch.float32, torch.float64) and not mixes_rows(model)
    allowed = 1e-3 if exact else 0.1
    if not error <= allowed:
        return f"packed and separate sequences differ, by {error:.2g} of the hidden states' size"
    return None


def enable(model: PreTrainedModel) -> str | None:
    """Make ``model`` take packed batches; None, or the reason why it cannot.

    What the model computes without packing is not changed. Its attention implementation gets
    another name (``qadapter_sdpa`` for ``sdpa``).
    """
    if is_enabled(model):
        return None
    if (reason := _static_reason(model)) is not None:
        return reason
    original = str(model.config._attn_implementation)
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        model.config._attn_implementation = _register(original)
        reason = _differs(model)
    except Exception as error:  # whatever a model's own code makes of the arguments
        reason = f"a packed forward fails ({type(error).__name__}: {error})"
    finally:
        for module, flag in training.items():
            module.training = flag
    if reason is not None:
        model.config._attn_implementation = original
    return reason
