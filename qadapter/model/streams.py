"""All streams of a model in one forward: rows [stream 0; stream 1; ...], one cache.

The base stream and the streams of one or several LoRA adapters share every frozen weight. Instead
of a pass each they run as row blocks of one batch: rows [i B, (i + 1) B) belong to stream i, and a
LoRA layer adds each adapter's delta to its block of the base layer's output, a contiguous slice.
Layers below the first one that has a LoRA see the same input in every stream; they run once for B
rows, and their keys and values are kept once.

A stream is named by its adapter, None is the base. Exact for LoRA on linear layers (rank and alpha
patterns, rsLoRA, any choice of modules). What PEFT does in another way (DoRA, other adapter types,
modules_to_save, LoRA on embeddings, LLM.int8) takes one pass a stream: `Streams.reason`.
"""

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from peft import PeftModel
from peft.tuners.lora.layer import Linear as LoraLinear
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from transformers import PreTrainedModel

from qadapter.composition import Names
from qadapter.model import lora_linear, quantised, whole_layers
from qadapter.model.checkpoint import is_ordinary
from qadapter.model.sharded import vocab_rows
from qadapter.model.whole_layers import Forward, replaced
from qadapter.ops import few_rows, low_rank

# What transformers' models hand to each of their layers, one row of it per row of the batch.
_PER_ROW = ("attention_mask", "position_ids", "position_embeddings")
_CACHE_NAMES = ("past_key_values", "cache_params")


class _NotRows(Exception):
    """A LoRA layer was called with something else than all rows of all streams in order."""


def switches(model: nn.Module) -> list[nn.Module]:
    """The layers of PEFT's that an adapter is turned on and off in."""
    return [
        module
        for module in model.modules()
        if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper)
    ]


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Inside, ``model`` is in eval mode; then every module is in the mode that it was in."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


class Streams:
    """The streams ``names`` of a PEFT model, in one forward where that is exact.

    Attributes:
        hf_model: the transformers model, LoRA layers in place.
        reason: None, or why each stream takes a pass of its own.
        uncached: None, or why every token must be computed from the whole text.
        takes_positions: whether ``forward`` is told the positions of its tokens.
        cache_name: how ``forward`` calls a transformers cache; None where it takes none.
        shared_layers: how many layers run once for all streams.
    """

    def __init__(self, peft_model: PeftModel, names: Names) -> None:
        self.peft_model, self.names = peft_model, names
        self.hf_model = cast(PreTrainedModel, peft_model.get_base_model())
        self._compiled: tuple[Any, Any] = (None, None)
        self.uncached: str | None = None
        parameters = inspect.signature(self.hf_model.forward).parameters
        self.cache_name = next((name for name in _CACHE_NAMES if name in parameters), None)
        self.takes_positions = "position_ids" in parameters
        self.shared_layers = 0
        self._rows = self._tokens = 0
        self._kernels = False  # the C++ kernels serve this forward,
        self._few = False  # those for few rows too
        self._one_token = 0  # and, where it is not 0, that for a whole layer of so many rows
        self._on_gpu = False  # the Triton kernel for few tokens' LoRA does
        self._forwards: list[Forward] = []
        self._outer = self._forwards  # where whole layers hold the rest
        self._whole: list[whole_layers.WholeLayer] = []
        self._layers: list[nn.Module] = []
        self._refusal = self.reason = _why_not(self.hf_model, names)
        if self.reason is not None:
            return
        trunk = self.hf_model.base_model
        for module in self.hf_model.modules():
            if quantised.is_lora_linear(module):
                self._forwards.append((module, self._sliced(cast(LoraLinear, module))))
            elif (
                type(module) is nn.Linear
                and is_ordinary(module.weight)
                and "forward" not in vars(module)
            ):
                self._forwards.append((module, self._linear(module)))
        if len(names) > 1:
            self._layers = _upper_layers(trunk, names)
            self.shared_layers = len(_decoder_layers(trunk)) - len(self._layers)
            if self.shared_layers == 0:
                self._layers = []
            elif self._differs():  # an architecture that does not take B rows below, n B above
                self._layers, self.shared_layers = [], 0
            if not self._layers:
                self.reason = self._differs()
        if self.reason is None and few_rows.rows_linear_limit(self.hf_model.dtype) > 0:
            self._find_whole_layers()

    def is_stale(self) -> bool:
        """Whether PEFT has changed its layers since, by merging an adapter for example."""
        return _why_not(self.hf_model, self.names) != self._refusal

    def compiled(self, function: Callable[..., Tensor], compile_config: Any) -> Any:
        """``function`` by torch.compile; kept, so that the next `generate` need not compile."""
        if self._compiled[0] != compile_config:
            self._compiled = compile_config, torch.compile(function, **compile_config.to_dict())
        return self._compiled[1]

    # One forward.

    def hidden(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        cache: Any,
    ) -> Tensor:
        """Last hidden states [streams * B, T, D] of input_ids [B, T]; call it in `installed`."""
        inputs = self._inputs(input_ids, attention_mask, position_ids, cache)
        base_model: Any = self.hf_model.base_model
        return base_model(**inputs)[0]

    def logits(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        cache: Any,
        **arguments: Any,
    ) -> Tensor:
        """Logits [streams * B, V] after the last token, by the model's own head."""
        inputs = self._inputs(input_ids, attention_mask, position_ids, cache)
        model: Any = self.hf_model
        return model(**inputs, **arguments).logits[:, -1]

    def _inputs(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        cache: Any,
    ) -> dict[str, Any]:
        count = len(self.names)
        self._rows, self._tokens = count * input_ids.shape[0], count * input_ids.numel()
        self._kernels = (
            not torch.compiler.is_compiling()
            and not torch.is_grad_enabled()
            and input_ids.device.type == "cpu"
            and few_rows.rows_linear_limit(self.hf_model.dtype) > 0
            and not torch.is_autocast_enabled("cpu")
        )
        self._on_gpu = (
            not torch.compiler.is_compiling()
            and not torch.is_grad_enabled()
            and low_rank.on_gpu(input_ids)
            and not torch.is_autocast_enabled("cuda")
        )
        self._few = self._kernels and self._tokens <= few_rows.rows_linear_limit(
            self.hf_model.dtype
        )
        one = self._few and input_ids.shape[1] == 1 and self._rows <= whole_layers.MOST_ROWS
        self._one_token = self._rows if one else 0
        if count > 1 and not self._layers:
            input_ids = input_ids.repeat(count, 1)
            if attention_mask is not None:
                attention_mask = attention_mask.repeat(count, 1)
            if position_ids is not None:
                position_ids = position_ids.repeat(count, 1)
        return self.arguments(input_ids, attention_mask, position_ids, cache)

    def arguments(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        cache: Any,
    ) -> dict[str, Any]:
        """What to call the model with, by the names that its forward has."""
        arguments: dict[str, Any] = {"input_ids": input_ids, "use_cache": cache is not None}
        if attention_mask is not None:
            arguments["attention_mask"] = attention_mask
        if position_ids is not None and self.takes_positions:
            arguments["position_ids"] = position_ids
        if cache is not None:
            arguments[cast(str, self.cache_name)] = cache
        return arguments

    def refresh(self) -> None:
        """Before a text: parameters may have been replaced since the last."""
        for whole in self._whole:
            whole.refresh()

    @contextmanager
    def installed(self, whole: bool = True) -> Iterator[None]:
        """Inside, the model's layers work on row blocks, and ``whole`` ones as one operation where
        they can. For one forward at a time: what the caller does between two of them sees the
        ordinary model."""
        hooks = [
            layer.register_forward_pre_hook(self._widen, with_kwargs=True) for layer in self._layers
        ]
        try:
            with replaced(self._outer if whole else self._forwards):
                yield
        finally:
            for hook in hooks:
                hook.remove()

    def _find_whole_layers(self) -> None:
        self._rows = self._tokens = 2 * len(self.names)
        self._kernels = self._few = True
        found = whole_layers.candidates(_decoder_layers(self.hf_model.base_model), self.names)
        with evaluating(self.peft_model), self.installed():
            found = [whole for whole in found if whole_layers.is_exact(whole, self._rows)]
        self._whole, held = found, set[nn.Module]()
        outer: list[Forward] = []
        for whole in found:
            modules = set(whole.layer.modules())
            parts = [pair for pair in self._forwards if pair[0] in modules]
            outer.append((whole.layer, whole.instead(lambda: self._one_token, parts)))
            held |= modules
        self._outer = outer + [pair for pair in self._forwards if pair[0] not in held]

    def _linear(self, module: nn.Linear) -> Callable[[Tensor], Tensor]:
        parameters = module._parameters  # module.weight is a search

        def forward(x: Tensor) -> Tensor:
            weight, bias = cast(Tensor, parameters["weight"]), parameters["bias"]
            if self._few and weight.dtype == x.dtype:
                return few_rows.rows_linear(x, weight, bias)
            return nn.functional.linear(x, weight, bias)

        return forward

    def _sliced(self, module: LoraLinear) -> Callable[..., Tensor]:
        """The layer's forward, each adapter's delta added to its rows."""
        base: Any = module.base_layer
        mine = [(i, name) for i, name in enumerate(self.names) if name and name in module.lora_A]
        count = len(self.names)

        def forward(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            out = base(x, *args, **kwargs)
            rows = x.shape[0] // count
            if count > 1 and mine and x.shape[0] != self._rows and x.shape[0] != self._tokens:
                raise _NotRows
            dense = x.ndim <= 3 and x.stride(-1) == 1 == out.stride(-1)
            for i, name in mine:
                a, b = cast(Any, module.lora_A[name]), cast(Any, module.lora_B[name])
                scaling = module.scaling[name]
                start, stop = i * rows, (i + 1) * rows
                plain = dense and b.bias is None and out.dtype == x.dtype
                arguments = (out, x, a.weight, b.weight, float(scaling), start, stop)
                if self._kernels and plain and a.weight.dtype in (torch.float32, torch.bfloat16):
                    low_rank.lora_add_(*arguments)
                elif not (self._on_gpu and plain and low_rank.few_tokens_add_(*arguments)):
                    part = x[start:stop].to(a.weight.dtype)
                    out[start:stop] += b(a(part)) * scaling
            return out

        return forward

    def _widen(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Before the upper layers: what the layers below made for B rows, for n B rows."""
        count = len(self.names)
        batch = self._rows // count

        def repeat(value: Any) -> Any:
            if isinstance(value, tuple):
                return tuple(repeat(item) for item in value)
            # One row stands for any number.
            if isinstance(value, Tensor) and value.ndim > 1 and value.shape[0] == batch > 1:
                return value.repeat(count, *[1] * (value.ndim - 1))
            return value

        names = inspect.signature(layer.forward).parameters
        args = tuple(
            repeat(v) if name in _PER_ROW else v for name, v in zip(names, args, strict=False)
        )
        kwargs = {name: repeat(v) if name in _PER_ROW else v for name, v in kwargs.items()}
        hidden = args[0] if args else kwargs["hidden_states"]
        if hidden.shape[0] != self._rows:
            hidden = hidden.repeat(count, 1, 1)
        if args:
            return (hidden, *args[1:]), kwargs
        return args, kwargs | {"hidden_states": hidden}

    # One pass a stream.

    @contextmanager
    def only(self, name: str | None) -> Iterator[None]:
        """Inside, the model is one stream, by PEFT's own layers."""
        modules: list[Any] = switches(self.peft_model)
        before = [(module._disable_adapters, module._active_adapter) for module in modules]
        for module in modules:
            module._disable_adapters = name is None
            if name is not None:
                module._active_adapter = [name]
        try:
            yield
        finally:
            for module, (disabled, active) in zip(modules, before, strict=True):
                module._disable_adapters, module._active_adapter = disabled, active

    @torch.no_grad()
    def _differs(self) -> str | None:
        """One forward against one pass a stream, on random tokens: what is wrong with it."""
        model = self.hf_model
        vocab = vocab_rows(model)
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(vocab, (3, 5), generator=generator).to(model.device)
        try:
            with evaluating(self.peft_model):
                with self.installed():
                    together = self.hidden(ids, None, None, None).float()
                alone = []
                base_model: Any = model.base_model
                for name in self.names:
                    with self.only(name):
                        alone.append(base_model(input_ids=ids, use_cache=False)[0].float())
        except _NotRows:
            return "a LoRA layer is called with a part of the tokens"
        except Exception as error:  # whatever a model's own code makes of it
            return f"a forward of all streams fails ({type(error).__name__}: {error})"
        apart = torch.cat(alone)
        if together.shape != apart.shape:
            return f"a forward of all streams gives {tuple(together.shape)}"
        if model.dtype in (torch.float32, torch.float64):
            scale = apart.abs().amax((0, 1)) + apart.abs().mean()
            error_size, allowed = ((together - apart).abs() / scale).max().item(), 1e-3
        else:
            # Single entries are far off by rounding alone where an adapter has moved the base far
            # (0.25 measured with 30 layers in bfloat16, 0.03 in the norm).
            streams = zip((together - apart).chunk(len(alone)), alone, strict=True)
            error_size = max((error.norm() / one.norm()).item() for error, one in streams)
            allowed = 0.06
        if not error_size <= allowed:
            return f"a forward of all streams differs by {error_size:.2g} of the hidden states"
        return None


def _why_not(hf_model: nn.Module, names: Sequence[str | None]) -> str | None:
    adapters = {name for name in names if name is not None}
    for path, one in hf_model.named_modules():
        if isinstance(one, AuxiliaryTrainingWrapper):
            return f"{path} is trained beside the LoRA"
        if not isinstance(one, BaseTunerLayer):
            continue
        module: Any = one
        if not quantised.is_lora_linear(module):
            return f"{path} is a {type(module).__module__}.{type(module).__qualname__}"
        variants = adapters & module.lora_variant.keys()
        if variants:
            kind = type(module.lora_variant[min(variants)]).__name__
            return f"{path} has a {kind.removesuffix('Variant')}"
        if module.merged:
            return f"{path} is merged"
        if "forward" in vars(module) and not lora_linear.is_fused(module):
            return f"the forward of {path} was replaced"
    return None


def _decoder_layers(trunk: nn.Module) -> list[nn.Module]:
    count = getattr(trunk.config.get_text_config(), "num_hidden_layers", None)  # type: ignore[union-attr,operator]
    for child in trunk.children():
        if isinstance(child, nn.ModuleList) and len(child) == count:
            return list(child)
    return []


def _upper_layers(trunk: nn.Module, names: Names) -> list[nn.Module]:
    """The layers from the first one with a LoRA on; all where a LoRA sits outside of them."""
    layers = _decoder_layers(trunk)

    def adapted(module: Any) -> bool:
        return quantised.is_lora_linear(module) and any(n in module.lora_A for n in names if n)

    inside = {m for layer in layers for m in layer.modules()}
    if any(adapted(m) for m in trunk.modules() if m not in inside):
        return layers
    on = (i for i, layer in enumerate(layers) if any(map(adapted, layer.modules())))
    first = next(on, len(layers))
    # With no LoRA anywhere in the trunk the last layer still widens the batch.
    return layers[min(first, max(len(layers) - 1, 0)) :]
