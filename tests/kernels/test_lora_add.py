"""The low-rank update of decoding gives float64's numbers, in one launch a module.

Compiled where there is a GPU, otherwise in Triton's interpreter (interpreter.py).
"""

import pytest
import torch

from tests.kernels.interpreter import DEVICE, INTERPRETED, ON_GPU, run_interpreted

pytest.importorskip("triton", reason="Triton is not installed")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
EPS = 2.0**-23

if not (INTERPRETED or ON_GPU):

    def test_in_the_interpreter():
        run_interpreted(__file__)

else:
    from qadapter.kernels import lora_add
    from qadapter.ops import few_rows, low_rank

    pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


def make(rows, dim, width, rank, dtype, lora_dtype):
    generator = torch.Generator().manual_seed(rows + dim)
    shapes = (rows, width), (rows, dim), (rank, dim), (width, rank)
    out, x, a, b = (torch.randn(*shape, generator=generator) for shape in shapes)
    made = out.to(dtype), x.to(dtype), a.to(lora_dtype), b.to(lora_dtype)
    return [tensor.to(DEVICE) for tensor in made]


def check(out, x, a, b, scaling):
    before, low = out.double(), x.double() @ a.double().T
    want = before + scaling * (low @ b.double().T)
    sizes = (x.double().abs() @ a.double().abs().T) @ b.double().abs().T
    lora_add.lora_add_(out, x, a, b, scaling)
    # The interpreter truncates to bfloat16.
    half = 1.01 if INTERPRETED and out.dtype == torch.bfloat16 else 0.51
    tolerance = 16 * EPS * (abs(scaling) * sizes + before.abs())
    tolerance += half * torch.finfo(out.dtype).eps * want.abs() + 1e-7
    assert ((out.double() - want).abs() <= tolerance).all()


if INTERPRETED or ON_GPU:

    @pytest.mark.parametrize("lora_dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_against_float64(dtype, lora_dtype):
        for shape in ((1, 1, 1, 1), (3, 70, 33, 5), (2, 2500, 300, 8)):
            check(*make(*shape, dtype, lora_dtype), 0.75)
        check(*make(1, 600, 17, 32, dtype, lora_dtype), -2.0)
        lora_add.lora_add_(*make(0, 5, 3, 2, dtype, lora_dtype), 1.0)

    def test_rows_anywhere():
        out, x, a, b = make(3, 40, 50, 4, torch.float32, torch.float32)
        want = out.clone()
        lora_add.lora_add_(want, x, a, b, 0.5)
        wide = torch.full((3, 130), float("nan"), device=DEVICE)
        wide[:, 3:43], wide[:, 60:110] = x, out
        lora_add.lora_add_(wide[:, 60:110], wide[:, 3:43], a, b, 0.5)
        assert torch.equal(wide[:, 60:110], want) and torch.equal(wide[:, 3:43], x)
        assert wide[:, 43:60].isnan().all() and wide[:, 110:].isnan().all()
        columns = torch.randn(40, 4, device=DEVICE).T  # A as no kernel reads it
        check(out, x, columns, b, 1.0)

    def test_one_launch_a_module_in_decoding(monkeypatch):
        """Both streams of a tiny Llama: the same tokens as by PEFT's products."""
        LoraConfig = pytest.importorskip("peft").LoraConfig
        from transformers import LlamaConfig, LlamaForCausalLM

        from qadapter import QAdapterModel

        torch.manual_seed(0)
        sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
        heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 60}
        base = LlamaForCausalLM(LlamaConfig(**sizes, **heads, initializer_range=0.3))
        config = LoraConfig(r=3, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
        model = QAdapterModel.from_base(base.eval(), lora_config=config).to(DEVICE)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.3)
        ids = torch.arange(8, device=DEVICE).view(2, 4) + 5
        arguments = {"strength": 0.5, "max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
        launches = []
        real = lora_add.lora_add_
        monkeypatch.setattr(lora_add, "lora_add_", lambda *a: (launches.append(a[0]), real(*a)))
        monkeypatch.setattr(few_rows, "rows_linear_limit", lambda dtype: 0)
        monkeypatch.setattr(low_rank, "on_gpu", lambda like: False)
        want = model.generate(ids, **arguments)
        assert not launches
        monkeypatch.setattr(low_rank, "on_gpu", lambda like: True)
        assert torch.equal(model.generate(ids, **arguments), want)
        # The prompt's 8 tokens and the 4 steps after it, two layers of two modules.
        assert len(launches) == 5 * 4
        assert [len(out) for out in launches] == [8] * 4 + [2] * 16
        launches.clear()
        monkeypatch.setattr(low_rank, "MOST_TOKENS", 4)  # of the prompt there are more
        assert torch.equal(model.generate(ids, **arguments), want)
        assert len(launches) == 4 * 4
