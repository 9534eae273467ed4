"""A decoder layer in one operation is its pieces', bit for bit, and attention is float64's."""

import pytest
import torch

from qadapter.ops import cpp, few_rows, layer_rows, low_rank
from qadapter.ops import decoder_layer as whole

pytestmark = pytest.mark.usefixtures("one_thread")

if not cpp.available()[0]:
    pytest.skip(cpp.available()[1], allow_module_level=True)

F32, BF16 = torch.float32, torch.bfloat16
# Rows, streams, hidden size, inner size, heads, heads of the keys, head size.
SHAPES = [
    (1, 1, 32, 48, 4, 2, 8),
    (2, 2, 64, 96, 2, 2, 32),
    (6, 3, 72, 100, 10, 2, 64),
    (8, 2, 96, 33, 6, 1, 20),
    (34, 2, 64, 70, 7, 1, 64),
]


@pytest.fixture(autouse=True)
def fresh(product_isa):
    """The instruction set is looked up once."""
    forget()
    yield
    forget()


def forget():
    for cached in (
        whole._operation,
        few_rows._operation,
        layer_rows._operations,
        layer_rows._rotary,
        low_rank._operations,
    ):
        cached.cache_clear()


class Problem:
    def __init__(self, shape, dtype, tokens, *, bias=False, adapters=F32):
        rows, self.streams, d, inner, heads, key_heads, dim = shape
        generator = torch.Generator().manual_seed(0)

        def random(*size, scale=1.0, dtype=dtype):
            return (torch.randn(*size, generator=generator) * scale).to(dtype)

        self.hidden = random(rows, 1, d)
        self.angles = random(rows, 1, dim), random(1, 1, dim).expand(rows, -1, -1)
        room = random(rows, key_heads, tokens + 3, 2 * dim)
        self.keys, self.values = room[:, :, :tokens, :dim], room[:, :, :tokens, dim:]
        self.norms, self.eps = [random(d), random(d)], [1e-5, 1e-6]
        sizes = {"q": (heads * dim, d), "k": (key_heads * dim, d), "v": (key_heads * dim, d)}
        sizes |= {"o": (d, heads * dim), "gate": (inner, d), "up": (inner, d), "down": (d, inner)}
        self.weights = [random(*size, scale=size[1] ** -0.5) for size in sizes.values()]
        self.biases = [random(size[0]) if bias else torch.empty(0) for size in sizes.values()]
        self.lora, self.places, self.scalings = [], [], []
        for place, (out, into) in enumerate(sizes.values()):
            for stream in range(1, self.streams):
                rank = 3 + place
                self.lora += [random(rank, into, dtype=adapters), random(out, rank, dtype=adapters)]
                self.places += [place, stream]
                self.scalings.append(0.1 * (place + 1))
        self.scaling = dim**-0.5

    def run(self, mask=None):
        keys, values = self.keys.clone(), self.values.clone()
        out = whole.decoder_layer(
            self.hidden, self.angles, keys, values, mask, self.norms, self.eps, self.weights,
            self.biases, self.lora, self.places, self.scalings, self.streams, self.scaling,
        )  # fmt: skip
        return out, keys, values

    def product(self, place, x):
        bias = self.biases[place]
        out = few_rows.rows_linear(x, self.weights[place], bias if bias.numel() else None)
        each = len(x) // self.streams
        for i, scaling in enumerate(self.scalings):
            if self.places[2 * i] == place:
                start = self.places[2 * i + 1] * each
                pair = self.lora[2 * i : 2 * i + 2]
                for first in range(start, start + each, 16):  # fewer than AMX takes
                    end = min(first + 16, start + each)
                    low_rank.lora_add_(out, x, *pair, scaling, first, end)
        return out

    def queries_and_cache(self):
        """Turned queries [rows, heads, 1, dim], and keys and values with the new token's."""
        keys, values = self.keys.clone(), self.values.clone()
        normed = layer_rows.rms_norm(self.hidden, self.norms[0], self.eps[0])
        dim = keys.shape[-1]
        q, k, v = (self.product(i, normed).unflatten(-1, (-1, dim)).mT for i in range(3))
        q, k, v = (t.transpose(1, 3).mT.transpose(1, 2) for t in (q, k, v))
        q, k, v = (t.reshape(len(t), -1, 1, dim) for t in (q, k, v))
        keys[:, :, -1:], values[:, :, -1:] = layer_rows.rotary(k, *self.angles), v
        return layer_rows.rotary(q, *self.angles), keys, values

    def after(self, attention):
        """The layer's output, from attention's [rows, 1, heads * dim]."""
        h = self.hidden + self.product(3, attention)
        normed = layer_rows.rms_norm(h, self.norms[1], self.eps[1])
        made = layer_rows.silu_mul(self.product(4, normed), self.product(5, normed))
        return h + self.product(6, made)


def attention(q, keys, values, scaling, mask=None):
    groups = q.shape[1] // keys.shape[1]
    keys, values = (t.repeat_interleave(groups, 1) for t in (keys, values))
    scores = q @ keys.mT * scaling
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    return (scores.softmax(-1) @ values).transpose(1, 2).flatten(2)


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("shape", SHAPES)
def test_all_but_attention_is_its_pieces_bit_for_bit(shape, dtype):
    """Of one token alone attention is the value itself."""
    for bias, adapters in ((False, F32), (True, BF16)):
        problem = Problem(shape, dtype, 1, bias=bias, adapters=adapters)
        out, keys, values = problem.run()
        q, own_keys, own_values = problem.queries_and_cache()
        assert torch.equal(keys, own_keys) and torch.equal(values, own_values)
        groups = q.shape[1] // keys.shape[1]
        assert torch.equal(
            out, problem.after(values.repeat_interleave(groups, 1).flatten(1)[:, None])
        )


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("shape", SHAPES)
def test_attention_is_float64_s(shape, dtype):
    for tokens in (2, 16, 70):
        problem = Problem(shape, dtype, tokens)
        problem.lora, problem.places, problem.scalings = [], [], []
        wide, d = problem.weights[0].shape
        problem.weights[3] = torch.eye(d, wide).to(dtype)  # attention itself, cut or filled up
        problem.weights[6].zero_()
        mask = torch.rand(len(problem.hidden), 1, 1, tokens) > 0.3
        mask[..., -1] = True
        for seen in (None, mask, mask[:1]):
            out, keys, values = problem.run(seen)
            q, own_keys, own_values = problem.queries_and_cache()
            assert torch.equal(keys, own_keys) and torch.equal(values, own_values)
            exact = attention(q.double(), keys.double(), values.double(), problem.scaling, seen)
            exact = torch.nn.functional.pad(exact, (0, max(0, d - wide)))[..., :d]
            largest = values.double().abs().amax()
            rounding = torch.finfo(dtype).eps / 2
            scores = 1 + (q.double().norm(dim=-1).amax() * keys.double().norm(dim=-1).amax())
            allowed = 1.01 * rounding * (2 * exact.abs() + problem.hidden.double().abs())
            allowed += torch.finfo(F32).eps * largest * (8 + tokens**0.5 + scores * problem.scaling)
            assert ((out.double() - problem.hidden.double() - exact).abs() <= allowed).all()


def test_threads_do_not_change_a_bit():
    problem = Problem((16, 2, 576, 1536, 9, 3, 64), BF16, 90)
    one = problem.run()[0]
    torch.set_num_threads(2)
    try:
        assert all(torch.equal(one, problem.run()[0]) for _ in range(5))
    finally:
        torch.set_num_threads(1)


def test_what_does_not_fit_is_an_error_that_names_it():
    def broken(message, **changes):
        problem = Problem(SHAPES[1], F32, 3)
        for name, value in changes.items():
            setattr(problem, name, value)
        with pytest.raises(RuntimeError, match=message):
            problem.run(changes.get("mask"))

    good = Problem(SHAPES[1], F32, 3)
    broken("hidden: expected a contiguous", hidden=torch.zeros(2, 3, 64))
    broken("hidden: expected float32 or bfloat16", hidden=good.hidden.half())
    broken("cos: expected float32", angles=(good.angles[0].bfloat16(), good.angles[1]))
    broken("keys: expected float32", keys=good.keys[:1])
    broken(r"weights\[3\]", weights=[*good.weights[:3], good.weights[4], *good.weights[4:]])
    broken(r"biases\[0\]", biases=[torch.zeros(3), *good.biases[1:]])
    broken("norms", norms=[good.norms[0][:5], good.norms[1]])
    broken("lora: expected dense", lora=[good.lora[1], *good.lora[1:]])
    broken("places: there is no product", places=[9, *good.places[1:]])
    broken("as many rows", streams=3)
    broken("mask: expected bool", mask=torch.ones(2, 1, 1, 3))
