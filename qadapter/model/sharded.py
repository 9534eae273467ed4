"""A model whose parameters an engine holds in parts: FSDP2's DTensors, DeepSpeed's ZeRO-3.

The adapter is small and is put together whole wherever it is read or written; the base never is.
Collective functions here must be called by all processes in the same order.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict
from torch import Tensor, distributed, nn
from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor

from qadapter.model.checkpoint import is_adapter_name


def is_partitioned(parameter: Tensor) -> bool:
    """Whether DeepSpeed's ZeRO-3 has taken a parameter apart."""
    return hasattr(parameter, "ds_id") and hasattr(parameter, "ds_tensor")


def is_sharded(model: nn.Module) -> bool:
    """Whether an engine holds parameters of ``model`` in parts."""
    return isinstance(model, FSDPModule) or any(
        isinstance(parameter, DTensor) or is_partitioned(parameter)
        for parameter in model.parameters()
    )


def vocab_rows(model: Any) -> int:
    """Rows of a transformers model's embedding, whole or in parts."""
    weight = model.get_input_embeddings().weight
    return int(getattr(weight, "ds_shape", weight.shape)[0])


def refuse_partitioned(base: nn.Module) -> None:
    """ValueError for a base that was loaded in parts: what it is could not be looked at."""
    for name, parameter in base.named_parameters():
        if is_partitioned(parameter):
            raise ValueError(
                f"the base was loaded under DeepSpeed's zero.Init, which has {name} in parts "
                "already, so that it can be neither identified nor tried: take settings with "
                "zero3_init_flag: false (qadapter train --accelerate-config zero3), or load the "
                "model before QAdapterConfig is made; ZeRO-3 shards it then"
            )


def outside_forward(model: nn.Module, *methods: str) -> None:
    """Have FSDP2 gather what is in no unit of its own (embedding, last norm, head) for these
    methods of the whole model, as it does for its forward."""
    for method in methods:
        if method not in vars(model):  # not yet
            register_fsdp_forward_method(model, method)


@contextmanager
def gathered(parameters: Iterable[Tensor]) -> Iterator[None]:
    """Inside, those of the parameters that ZeRO-3 has in parts are whole. Collective."""
    partitioned = [parameter for parameter in parameters if is_partitioned(parameter)]
    if not partitioned:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(partitioned):
        yield


@contextmanager
def whole_head(model: Any) -> Iterator[None]:
    """Inside, the head of a `QAdapterModel` is whole in every process. Collective."""
    head = model.hf_model.get_output_embeddings()
    at_once = isinstance(model, FSDPModule) and any(
        isinstance(parameter, DTensor) for parameter in head.parameters()
    )
    if at_once:
        model.unshard()  # the embedding and the last norm with it: they are one unit
    try:
        with gathered(head.parameters()):
            yield
    finally:
        if at_once:
            model.reshard()


def anywhere(flags: Sequence[bool], device: torch.device) -> list[bool]:
    """Which of these are true in any process. Collective."""
    found = torch.tensor(list(flags), dtype=torch.int32, device=device)
    distributed.all_reduce(found, distributed.ReduceOp.MAX)
    return [bool(flag) for flag in found.tolist()]


def adapter_state(model: Any) -> dict[str, Tensor]:
    """The adapter of a `QAdapterModel`, whole and on the CPU, by the names that its
    ``peft_model.state_dict()`` has. Collective."""
    if isinstance(model, FSDPModule):
        model.reshard()  # between forwards the root is as its last one left it
    state, prefix = model.state_dict(), "peft_model."
    parameters = dict(model.named_parameters())
    found = {
        name: parameters.get(name, value)
        for name, value in state.items()
        if is_adapter_name(name) and isinstance(value, Tensor)
    }
    with gathered(found.values()):
        return {
            name.removeprefix(prefix): _whole(value).detach().to("cpu", copy=True)
            for name, value in found.items()
        }


def _whole(tensor: Tensor) -> Tensor:
    if not isinstance(tensor, DTensor):
        return tensor
    at: Any = tensor
    if at.device.type != at.device_mesh.device_type:  # offloaded
        at = at.to(at.device_mesh.device_type)
    return at.full_tensor()


@torch.no_grad()
def load_adapter(model: Any, saved: dict[str, Tensor], source: str) -> None:
    """Write the weights ``saved``, by PEFT's names, into the shards of a `QAdapterModel` under
    FSDP2. Every process reads them whole and keeps its part.

    Raises:
        ValueError: other weights than the adapter's, or a model under ZeRO-3, whose optimiser
            holds the weights that count.
    """
    if any(is_partitioned(parameter) for parameter in model.parameters()):
        raise ValueError(
            f"{source}: under ZeRO-3 an adapter is loaded with its optimiser: train("
            "resume_from_checkpoint=...), or load it before training"
        )
    model.reshard()
    own: PeftModel = model.peft_model
    state = {name.removeprefix("peft_model."): value for name, value in model.state_dict().items()}
    here = get_peft_model_state_dict(
        own,
        state_dict=state,
        adapter_name=str(own.active_adapter),
        save_embedding_layers=False,
    )
    for what, keys in (
        ("lacks", here.keys() - saved.keys()),
        ("has too much:", saved.keys() - here.keys()),
    ):
        if keys:
            raise ValueError(
                f"{source}: its file {what} {len(keys)} weights of this adapter ({min(keys)}, ...)"
            )
    for name, target in here.items():
        value = saved[name].to(device=target.device, dtype=target.dtype)
        if isinstance(target, DTensor):
            mesh, placements = target.device_mesh, target.placements
            value = distribute_tensor(value, mesh, placements, src_data_rank=None)
        target.copy_(value)
