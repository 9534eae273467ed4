"""Bytes by arithmetic are those of the models that transformers, PEFT and torch make."""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from torch import distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from benchmarks import memory
from benchmarks.memory import LLAMA_8B, LLAMA_70B, Shape
from tests.training.ragged_pairs import filled, shards

# All layers are alike.
TWO_OF_70B, TWO_OF_8B = (replace(shape, layers=2) for shape in (LLAMA_70B, LLAMA_8B))
# Nothing is a multiple of anything.
ODD = Shape(hidden=36, intermediate=52, layers=3, heads=3, kv_heads=1, head_dim=12, vocab=101)


def model_of(shape, rank):
    """On the meta device, in bfloat16, with a LoRA as `QAdapterModel` puts it on by default."""
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        vocab_size=shape.vocab,
        tie_word_embeddings=False,
    )
    with torch.device("meta"):
        base = LlamaForCausalLM._from_config(config, dtype=torch.bfloat16)
        lora = LoraConfig(r=rank, target_modules="all-linear", task_type="CAUSAL_LM")
        return get_peft_model(base, lora)


def size(tensors):
    return sum(t.numel() * t.element_size() for t in tensors)


@pytest.mark.parametrize(("shape", "rank"), [(LLAMA_8B, 8), (TWO_OF_70B, 16), (ODD, 3)])
def test_a_whole_model(shape, rank):
    model = model_of(shape, rank)
    trained = [p for p in model.parameters() if p.requires_grad]
    base = [p for name, p in model.named_parameters() if "lora_" not in name]
    found = memory.memory(shape, rank)
    assert (found.base, found.lora, found.gathered) == (size(base), size(trained), 0)
    for parameter in trained:
        parameter.grad = torch.empty_like(parameter)
    assert found.gradients == size(p.grad for p in trained)
    optimiser = torch.optim.AdamW(trained, foreach=False)
    optimiser.step()
    states = [s for state in optimiser.state.values() for k, s in state.items() if k != "step"]
    assert found.moments == size(states) > 0


@pytest.mark.parametrize(("shape", "rank", "processes"), [(TWO_OF_8B, 8, 8), (ODD, 3, 4)])
def test_shards(shape, rank, processes):
    """Of FSDP2 itself, which needs neither the weights nor the other processes."""
    model = model_of(shape, rank)
    layers = model.get_base_model().model.layers
    units = [size(p.new_empty(p.shape, dtype=torch.bfloat16) for p in layers[0].parameters())]
    of_layers = {p for layer in layers for p in layer.parameters()}
    root = size(p for p in model.parameters() if p not in of_layers)
    dist.init_process_group("fake", store=dist.HashStore(), rank=0, world_size=processes)
    try:
        mesh = init_device_mesh("cpu", (processes,))
        for layer in layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        of = {name: p.to_local() for name, p in model.named_parameters()}
    finally:
        dist.destroy_process_group()
    found = memory.memory(shape, rank, processes)
    assert found.lora == size(p for name, p in of.items() if "lora_" in name)
    assert found.base == size(p for name, p in of.items() if "lora_" not in name)
    assert found.gathered == root + 2 * units[0]


@pytest.mark.parametrize("shape", [(48, 32), (7, 100), (640, 1024)])
@pytest.mark.parametrize("twice", [False, True])
def test_four_bits_are_those_of_bitsandbytes(shape, twice):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    how = {"compress_statistics": twice, "quant_type": "nf4"}
    for storage in (torch.uint8, torch.bfloat16):
        weight = bitsandbytes.nn.Params4bit(
            torch.randn(shape), requires_grad=False, quant_storage=storage, **how
        ).to("cpu")
        state = weight.quant_state
        assert state is not None
        parts = [weight.data, state.absmax, state.code]
        if twice:
            parts += [state.offset.reshape(1), state.state2.absmax, state.state2.code]
        assert memory.nf4(shape, storage.itemsize, twice=twice) == size(parts)
        half = weight.data.reshape(-1).chunk(2)[0]
        rest = size(parts) - size([weight.data])
        assert memory.nf4(shape, storage.itemsize, 2, twice) == size([half]) + rest


def test_the_base_cache_on_disk(tmp_path):
    filled(tmp_path, with_hidden=True)
    (path,) = shards(tmp_path)
    kept = {name: value for name, value in load_file(path).items() if name.startswith("base_")}
    hidden = kept.pop("base_hidden").to(torch.bfloat16)
    assert memory.cache(len(hidden)) == size(kept.values())
    assert memory.cache(*hidden.shape) == size([*kept.values(), hidden])


def test_the_page_has_the_table():
    page = memory.PAGE.read_text()
    assert memory.written(page) == page
