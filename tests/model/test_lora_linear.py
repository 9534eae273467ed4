"""A LoRA layer in one autograd node is PEFT's: values and gradients as close to float64 as its own,
and everything that it does not serve takes PEFT's way."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.layer import Linear as LoraLinear
from torch import nn

from qadapter.model import lora_linear, recompute
from qadapter.ops import cpp, low_rank

pytestmark = pytest.mark.usefixtures("one_thread")

if not cpp.available()[0]:
    pytest.skip(cpp.available()[1], allow_module_level=True)

F32, BF16 = torch.float32, torch.bfloat16


def layer(width=37, out=50, rank=8, dtype=BF16, *, bias=True, **config):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(width, out, bias=bias, dtype=dtype))
    made = get_peft_model(model, LoraConfig(target_modules=["0"], r=rank, **config))
    nn.init.normal_(made.base_model.model[0].lora_B["default"].weight, std=0.1)
    return made.base_model.model


def run(model, x, grad):
    """Output, and the gradients of x, A and B."""
    x = x.detach().clone().requires_grad_()
    factors = [p for p in model.parameters() if p.requires_grad]
    out = model(x)
    return [out.detach(), *torch.autograd.grad(out, [x, *factors], grad)]


def exact(model, x, grad):
    model = copy.deepcopy(model).double()
    assert not lora_linear.is_fused(model[0])
    return run(model, x.double(), grad.double())


@pytest.fixture(params=["plain", None])
def vectors(request, monkeypatch):
    """The compiler's own code, and the best that this CPU has."""
    if request.param:
        monkeypatch.setenv("QADAPTER_CPU_CAPABILITY", request.param)
    caches = (low_rank._operations, low_rank._backward)
    for cache in caches:
        cache.cache_clear()
    yield
    for cache in caches:
        cache.cache_clear()


@pytest.mark.usefixtures("vectors")
@pytest.mark.parametrize(("dtype", "adapter_dtype"), [(BF16, F32), (BF16, BF16), (F32, F32)])
@pytest.mark.parametrize("shape", [(1, 37), (23, 37), (2, 19, 37)])
@pytest.mark.parametrize("rank", [1, 8, 21])
def test_as_near_to_float64_as_peft(dtype, adapter_dtype, shape, rank):
    model = layer(rank=rank, dtype=dtype, bias=len(shape) == 2)
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            parameter.data = parameter.data.to(adapter_dtype)
    gen = torch.Generator().manual_seed(1)
    x = torch.randn(shape, generator=gen).to(dtype)
    grad = torch.randn(*shape[:-1], 50, generator=gen).to(dtype)
    truth, eager = exact(model, x, grad), run(model, x, grad)
    assert lora_linear.fuse_lora(model) == 1
    got = run(model, x, grad)
    for one, peft, true in zip(got, eager, truth, strict=True):
        assert one.dtype == peft.dtype and one.shape == peft.shape
        error, of_peft = ((part.double() - true).norm() for part in (one, peft))
        # A rounding of the result itself is nobody's fault, nor the order of sums in float32.
        units = 0.275 if dtype == BF16 else 2
        assert error <= 1.1 * of_peft + units * torch.finfo(one.dtype).eps * true.norm()


def test_strided_inputs_and_gradients():
    model = layer()
    wide = torch.randn(4, 60, 2, dtype=BF16)
    x, grad = wide[:, 3:40, 1], torch.randn(1, 50, dtype=BF16).expand(4, 50)
    truth = exact(model, x, grad)
    lora_linear.fuse_lora(model)
    for one, true in zip(run(model, x, grad), truth, strict=True):
        torch.testing.assert_close(one.double(), true, rtol=0.01, atol=0.01)


@pytest.mark.parametrize("dtype", [BF16, F32])
def test_what_needs_no_gradient_gets_none(dtype):
    model = layer(dtype=dtype)
    lora_linear.fuse_lora(model)
    x, grad = torch.randn(5, 37, dtype=dtype), torch.randn(5, 50, dtype=dtype)
    both = run(model, x, grad)
    factors = [p for p in model.parameters() if p.requires_grad]
    model(x).backward(grad)  # the first layer of a model: x is no result
    assert all(torch.equal(p.grad, one) for p, one in zip(factors, both[2:], strict=True))
    factors[0].requires_grad_(False)
    factors[0].grad = factors[1].grad = None
    model(x).backward(grad)
    assert factors[0].grad is None and torch.equal(factors[1].grad, both[3])
    with torch.no_grad():
        assert torch.equal(model(x), both[0])


def test_rows_do_not_depend_on_the_batch_nor_on_threads():
    model = layer(width=64, out=64)
    lora_linear.fuse_lora(model)
    x, grad = torch.randn(2, 300, 64, dtype=BF16)
    one = run(model, x, grad)
    torch.set_num_threads(3)
    assert all(map(torch.equal, one[2:], run(model, x, grad)[2:]))


def fused(model, x):
    """Whether the layer's own code serves x."""
    parts = lora_linear._parts(model[0], x)
    return parts is not None


def test_what_it_does_not_serve_takes_pefts_way():
    x = torch.randn(3, 37, dtype=BF16)
    plain = layer()
    expected = plain(x)
    lora_linear.fuse_lora(plain)
    assert fused(plain, x)
    in_float32 = layer(dtype=F32)
    lora_linear.fuse_lora(in_float32)
    assert fused(in_float32, x.float()) and not fused(in_float32, x)
    in_float64 = layer(dtype=torch.float64)
    lora_linear.fuse_lora(in_float64)
    assert not fused(in_float64, x.double())
    assert not fused(plain, x.float()) and not fused(plain, x[:0])
    with torch.autocast("cpu", BF16):
        assert not fused(plain, x)
    plain[0].enable_adapters(False)
    assert not fused(plain, x) and torch.equal(plain(x), plain[0].base_layer(x))
    plain[0].enable_adapters(True)
    plain[0].merge()
    assert not fused(plain, x)
    plain[0].unmerge()
    torch.testing.assert_close(plain(x), expected, rtol=0.02, atol=0.02)
    hook = plain[0].lora_A["default"].register_forward_hook(lambda *_: None)
    assert not fused(plain, x)
    hook.remove()
    plain[0].base_layer.weight.requires_grad_(True)
    assert not fused(plain, x)
    for config in ({"lora_dropout": 0.5}, {"use_dora": True}, {"lora_bias": True}):
        other = layer(**config)
        lora_linear.fuse_lora(other)
        assert not fused(other, x)
        other(x)
    still = layer(lora_dropout=0.5).eval()
    lora_linear.fuse_lora(still)
    assert fused(still, x)


def test_several_adapters():
    model = layer()
    lora: LoraLinear = model[0]
    lora_linear.fuse_lora(model)
    x = torch.randn(3, 37, dtype=BF16)
    first = model(x)
    lora.update_layer("other", 4, lora_alpha=8, config=LoraConfig(r=4))
    lora.set_adapter(["default", "other"])
    assert not fused(model, x)
    torch.testing.assert_close(model(x), first)  # the other's B is 0
    lora.set_adapter(["other"])
    assert fused(model, x)
    assert torch.equal(model(x), lora.base_layer(x))


def test_a_copy_is_fused_by_itself():
    model = layer()
    lora_linear.fuse_lora(model)
    twin = copy.deepcopy(model)
    nn.init.zeros_(twin[0].lora_B["default"].weight)
    x = torch.randn(3, 37, dtype=BF16)
    assert lora_linear.is_fused(twin[0])
    assert torch.equal(twin(x), twin[0].base_layer(x)) and not torch.equal(twin(x), model(x))


def mlp(dtype):
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaMLP

    torch.manual_seed(0)
    model = nn.ModuleDict({"mlp": LlamaMLP(LlamaConfig(hidden_size=64, intermediate_size=96))})
    config = LoraConfig(target_modules=["gate_proj", "up_proj", "down_proj"], r=4)
    made = get_peft_model(model.to(dtype), config, autocast_adapter_dtype=False)
    for name, parameter in made.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn_like(parameter, dtype=F32).mul(0.1)
    whole = made.base_model.model["mlp"].eval()
    lora_linear.fuse_lora(whole)
    recompute.recompute_cheap(whole)
    return whole


@pytest.mark.parametrize("dtype", [BF16, F32])
def test_a_gated_mlp_in_one_node(dtype, monkeypatch):
    model, served = mlp(dtype), []
    original = lora_linear.gated
    monkeypatch.setattr(
        lora_linear, "gated", lambda *args: served.append(original(*args)) or served[-1]
    )
    x, grad = torch.randn(2, 2, 30, 64).to(dtype)
    ours = run(model, x, grad)
    assert served.pop() is not None
    with torch.no_grad():
        assert torch.equal(model(x), ours[0])
    assert served.pop() is None
    hook = model.up_proj.register_forward_hook(lambda *_: None)
    apart = run(model, x, grad)  # a node a layer
    hook.remove()
    assert served.pop() is None
    assert torch.equal(ours[0], apart[0])
    for one, other in zip(ours[1:], apart[1:], strict=True):
        error = (one - other).float().norm() / other.float().norm()
        assert error <= torch.finfo(dtype).eps
    factors = [p for p in model.parameters() if p.requires_grad]
    model(x).backward(grad)  # the first layer of a model: x is no result
    assert all(torch.equal(p.grad, one) for p, one in zip(factors, ours[2:], strict=True))
