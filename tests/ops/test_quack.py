"""The linear operation on quack-kernels is float64's, by stand-ins that do what its products do.

The package itself, where it is installed, compiles what is asked of it for compute capability 9.0:
no GPU is needed for that.
"""

import contextlib
import importlib.util
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

import qadapter
from qadapter.ops import linear_quack, linear_torch, quack

NAMES = ("q", "value", "base_logp", "policy_logp", "base_lse", "p_action", "slope_action")
NOW = (9, 0)


class Lse:
    def __call__(self, a, b, *, store_d, target, tuned):
        assert not store_d and not tuned and b.stride(0) == 1
        z = a.float() @ b.float()
        return {"lse": z.logsumexp(-1), "target_logit": z.gather(1, target[:, None])[:, 0]}


class ScaledExp:
    """E, and for every row and tile of columns a power of two and a sum."""

    def __init__(self):
        self.shapes = []

    def gemm(self, a, b, d, *, epi_args, tile_M, tile_N, cluster_M, cluster_N, pingpong):
        self.shapes.append(tuple(d.shape))
        assert a.shape[0] % tile_M == d.shape[1] % tile_N == 0 and a.is_contiguous()
        assert epi_args["max_log2"] == tile_N and epi_args["sum_exp"].is_contiguous()
        z = a.float() @ b.float().T
        log2 = (z * 1.4426950408889634).unflatten(1, (-1, tile_N))
        k = log2.amax(-1).round()
        e = torch.exp2(log2 - k[..., None])
        d.copy_(e.flatten(1))
        epi_args["sum_exp"].copy_(e.sum(-1))
        epi_args["max_log2_out"].copy_(k)
        epi_args["target_logit"].copy_(z.gather(1, epi_args["target"][:, None])[:, 0])


class ByRow:
    def gemm(self, a, b, d, *, epi_args, transform_a, tile_K, tile_M, **tiles):
        e, strip = a
        assert transform_a == "scaled" and strip.is_contiguous() and strip.dtype == e.dtype
        scaled = e.float() * strip.T.float().repeat_interleave(tile_K, 1)
        # b is [D, V], a view of the head
        d.copy_((scaled.to(e.dtype).float() @ b.float().T) * epi_args["v"][0][:, None])


@pytest.fixture
def stand_in(monkeypatch):
    functions = SimpleNamespace(
        lse=Lse(),
        scaled_exp=ScaledExp(),
        scaled="scaled",
        by_row=ByRow(),
        operand=lambda mod, e, values, rows, columns: (e, values["u"]),
    )
    monkeypatch.setattr(linear_quack, "quack", lambda: functions)
    return functions.scaled_exp.shapes


def make(rows, dim=64, vocab=1152, spread=3.0):
    generator = torch.Generator().manual_seed(rows)
    base = torch.randn(rows, dim, generator=generator)
    q = base + 0.3 * torch.randn(rows, dim, generator=generator)
    weight = torch.randn(vocab, dim, generator=generator) * spread / dim**0.5
    actions = torch.randint(0, vocab, (rows,), generator=generator)
    return base.bfloat16(), q.bfloat16(), weight.bfloat16(), actions


def run(tensors, lse=None, logp=None, alpha=1.0, chunk=0, need_grad=True):
    base, q, weight, actions = tensors
    return linear_quack.linear_fwd(base, q, weight, actions, lse, logp, alpha, chunk, need_grad)


def in_torch(tensors, lse=None, logp=None, alpha=1.0):
    base, q, weight, actions = tensors
    composition = (alpha, 1.0, alpha)
    return linear_torch.linear_fwd(
        base, q, weight, actions, None, lse, logp, *composition, 1.0, 0.0, 0, True
    )


def widened(tensors):
    return [t.double() if t is not None and t.is_floating_point() else t for t in tensors]


@pytest.mark.parametrize(("alpha", "spread"), [(1.0, 3.0), (0.25, 3.0), (1.0, 60.0)])
@pytest.mark.parametrize("chunk", [0, 128, 200])
def test_against_float64(stand_in, alpha, spread, chunk):
    """Chunks that are no multiple of a tile; logits far apart, whose exponentials need their k."""
    tensors = make(300, spread=spread)
    tensors[3][5] = -100
    exact, plain = in_torch(widened(tensors), alpha=alpha), in_torch(tensors, alpha=alpha)
    ours = run(tensors, alpha=alpha, chunk=chunk)
    size = float(exact[4].abs().max()) + 1
    for name, a, b in zip(NAMES, ours, exact, strict=False):
        assert a.dtype == torch.float32, name
        assert float((a - b).abs().max()) <= 8 * 2.0**-23 * size, name
    largest = tensors[2].double().abs().amax(0)
    bound = 2.0**-7 * largest + 2 * (plain[7] - exact[7]).abs() + 2.0**-8 * exact[7].abs()
    assert ours[7].dtype == torch.bfloat16 and ((ours[7] - exact[7]).abs() <= bound).all()
    assert all(rows % 128 == 0 for rows, _ in stand_in)
    assert len(stand_in) == {0: 1, 128: 3, 200: 2}[chunk]


def test_cached_statistics_and_no_gradient(stand_in):
    tensors = make(40)
    whole, without = run(tensors), run(tensors, need_grad=False)
    for name, a, b in zip(NAMES, whole, without, strict=False):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5, msg=name)
    assert without[7].shape == (0, 64)
    cached = run(tensors, lse=whole[4], logp=whole[2])
    alone = run((None, *tensors[1:]), lse=whole[4], logp=whole[2])
    for name, a, b, c in zip(NAMES, whole, cached, alone, strict=False):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5, msg=name)
        torch.testing.assert_close(a, c, rtol=1e-5, atol=1e-5, msg=name)
    with pytest.raises(ValueError, match="without base_hidden"):
        run((None, *tensors[1:]))


def test_equal_streams_and_wrong_numbers(stand_in):
    base, _, weight, actions = make(30)
    q = base.clone()
    assert not run((base, q, weight, actions))[0].any()
    actions[2] = weight.shape[0]
    q[4, 3] = float("nan")
    for name, values in zip(NAMES[:4], run((base, q, weight, actions)), strict=False):
        of_base = name == "base_logp"
        assert values.isnan().nonzero()[:, 0].tolist() == ([2] if of_base else [2, 4]), name


def test_what_is_served():
    _, q, weight, _ = make(4)
    plain = (q, weight, None, (0.5, 1.0, 0.5), 1.0, 0.0, True)

    def served(capability=NOW, **changed):
        names = ("q_hidden", "weight", "bias", "composition", "logit_scale", "logit_softcap")
        given = dict(zip((*names, "need_grad"), plain, strict=True)) | changed
        return linear_quack.why_not(**given, capability=capability) is None

    assert served() and served((10, 0), need_grad=False)
    assert not served((10, 0)) and not served((8, 0), need_grad=False)
    assert not served(q_hidden=q.float()) and not served(weight=weight.half())
    assert not served(bias=weight[:, 0]) and not served(logit_softcap=30.0)
    assert not served(composition=(1.0, 1.0, 0.0)) and not served(composition=(1.0, 0.5, 1.0))
    assert not served(weight=weight[:1000]) and not served(weight=weight.t().contiguous().t())
    assert not served(logit_scale=0.5)


def test_the_rest_runs_elsewhere(stand_in, monkeypatch):
    """By the backend's own function: what is not served goes to Triton, or here to torch."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    base, q, weight, actions = make(6)
    rest = (actions, None, None, None, 0.3, 1.0, 1.0, 1.0, 0.0, 0, True)
    ours, want = (
        quack.linear_fwd(base, q, weight, *rest),
        linear_torch.linear_fwd(base, q, weight, *rest),
    )
    assert all(torch.equal(a, b) for a, b in zip(ours, want, strict=True))
    assert not stand_in
    served = (actions, None, None, None, 1.0, 1.0, 1.0, 1.0, 0.0, 0, True)
    ours, want = quack.linear_fwd(base, q, weight, *served), run((base, q, weight, actions))
    assert all(torch.equal(a, b) for a, b in zip(ours, want, strict=True))
    assert len(stand_in) == 2


def test_without_it_nothing_changes():
    info = next(info for info in qadapter.backends() if info.name == "quack")
    if not torch.cuda.is_available():
        assert not info.available and "no GPU" in info.reason
        with qadapter.use_backend("quack"), pytest.raises(RuntimeError, match="quack"):
            qadapter.functional.residual_values(*torch.zeros(2, 1, 3), torch.zeros(1).long())


COMPILE = """
import sys, torch
from quack.epilogue import frontend
from quack.gemm_runtime import host
from qadapter.ops import linear_quack

host.get_max_active_clusters = lambda clusters: 132 // clusters  # asks the driver
frontend.run_gemm_epi_plan = lambda *a, **k: print("compiled")  # would launch
functions = linear_quack.quack()
rows, dim, vocab, tile = 256, 256, 1536, 192
x, weight = torch.zeros(rows, dim).bfloat16(), torch.zeros(vocab, dim).bfloat16()
target = torch.zeros(rows, dtype=torch.int64)
found = functions.lse(x, weight.mT, store_d=False, target=target, tuned=False)
assert found["lse"].shape == found["target_logit"].shape == (rows,)
if sys.argv[1] == "forward":
    raise SystemExit
tiles = {"tile_M": 128, "cluster_M": 2, "cluster_N": 1, "_launch": False}
e = torch.zeros(rows, vocab).bfloat16()
sums, powers = torch.zeros(2, rows, vocab // tile)
of_rows = {"target": target, "target_logit": torch.zeros(rows)}
of_tiles = {"max_log2": tile, "sum_exp": sums, "max_log2_out": powers}
product = functions.scaled_exp.gemm
product(x, weight, e, epi_args=of_tiles | of_rows, tile_N=tile, pingpong=True, **tiles)
operand = functions.operand(functions.scaled, e, {"u": torch.ones(24, rows).bfloat16()}, 128, 64)
by_row = {"epi_args": {"v": torch.ones(1, rows)}, "transform_a": functions.scaled}
functions.by_row.gemm(operand, weight.mT, x, tile_N=256, tile_K=64, **by_row, **tiles)
"""


@pytest.mark.skipif(importlib.util.find_spec("quack") is None, reason="needs quack-kernels")
@pytest.mark.parametrize(("arch", "what"), [("90", "all"), ("100", "forward")])
def test_the_package_compiles_these_products(arch, what):
    where = {"QUACK_ARCH": arch, "CUTE_DSL_ARCH": f"sm_{arch}a", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-c", COMPILE, what]
    done = subprocess.run(command, env=os.environ | where, capture_output=True, text=True)
    assert done.returncode == 0 and "compiled" in done.stdout, done.stderr[-3000:]
