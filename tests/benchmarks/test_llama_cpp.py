"""What llama.cpp is given is the adapter; where its package is missing, the table says so."""

import numpy as np
import pytest
import torch
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from benchmarks import decoding_problem as decoding
from benchmarks.peers import llama_cpp
from tests.tiny_models import make_model

gguf = pytest.importorskip("gguf")


def turned_in_pairs(x, angles):
    """Rotary embedding of neighbours [T, heads, dim / 2, 2], as llama.cpp takes it."""
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * torch.polar(torch.ones_like(angles), angles)).flatten(-2)


def test_the_adapter_s_file_is_the_adapter(tmp_path):
    model = make_model()
    llama_cpp.write_adapter(model, tmp_path / "adapter.gguf")
    reader = gguf.GGUFReader(tmp_path / "adapter.gguf")
    fields = {name: field.contents() for name, field in reader.fields.items()}
    assert fields["general.type"] == "adapter" and fields["adapter.type"] == "lora"
    config = model.peft_model.peft_config["default"]
    assert fields["adapter.lora.alpha"] == config.lora_alpha
    tensors = {t.name: torch.tensor(np.array(t.data)) for t in reader.tensors}
    layers = model.hf_model.base_model.layers
    assert len(tensors) == 2 * len(config.target_modules) * len(layers)
    value = layers[2].self_attn.v_proj
    assert torch.equal(tensors["blk.2.attn_v.weight.lora_b"], value.lora_B["default"].weight)
    assert torch.equal(tensors["blk.2.attn_v.weight.lora_a"], value.lora_A["default"].weight)
    # Queries of both kinds, turned, differ by one order of elements, so their products are alike.
    own = layers[1].self_attn.q_proj.lora_B["default"].weight.detach()
    theirs = tensors["blk.1.attn_q.weight.lora_b"]
    low = torch.randn(5, own.shape[1], generator=torch.Generator().manual_seed(0))
    angles = torch.rand(5, 1, 4, generator=torch.Generator().manual_seed(1)) * 6
    q, p = ((low @ weight.T).unflatten(-1, (4, 8)) for weight in (own, theirs))
    both = torch.cat([angles, angles], -1)[None, :, 0]
    turned = apply_rotary_pos_emb(q.mT.mT[None].transpose(1, 2), q[None].transpose(1, 2),
                                  both.cos(), both.sin())[0][0].transpose(0, 1)  # fmt: skip
    pairs = turned_in_pairs(p, angles)
    torch.testing.assert_close(
        torch.einsum("thd,shd->hts", turned, turned), torch.einsum("thd,shd->hts", pairs, pairs)
    )
    assert not torch.equal(own, theirs)


def test_without_the_package_it_says_so(monkeypatch):
    monkeypatch.setattr(llama_cpp, "PACKAGE", "no_such_package")
    clock = decoding.Clock(1, torch.device("cpu"))
    ids = torch.ones(1, 3, dtype=torch.int64)
    with pytest.raises(RuntimeError, match="no_such_package cannot be imported"):
        llama_cpp.LlamaCpp(None, {}).run(ids, ids, 4, clock)
