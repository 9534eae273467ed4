"""Weights that were moved are the same weights."""

import copy

import pytest
import torch
from torch import nn

from qadapter import QAdapterModel
from qadapter.model import large_pages
from tests.tiny_models import make_base

if large_pages.mode() not in ("always", "madvise") or torch.cuda.is_available():
    pytest.skip("no large pages, or a GPU that weights go to", allow_module_level=True)

IDS = torch.randint(3, 97, (2, 7), generator=torch.Generator().manual_seed(3))


@pytest.fixture(autouse=True)
def any_size(monkeypatch):
    monkeypatch.setattr(large_pages, "LEAST", 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["llama", "llama-tied", "gpt2"])
@torch.no_grad()
def test_a_model_gives_what_it_gave(kind, dtype):
    model = make_base(kind, dtype=dtype)
    before, want = dict(model.named_parameters()), model(IDS).logits
    places = {name: parameter.data_ptr() for name, parameter in before.items()}
    values = copy.deepcopy(model.state_dict())
    size = large_pages.settle(model)
    assert size >= sum(parameter.nbytes for parameter in before.values())
    for name, parameter in model.named_parameters():
        assert parameter is before[name] and parameter.data_ptr() != places[name]
        assert parameter.data_ptr() % 64 == 0
        assert torch.equal(parameter, values[name])
        assert parameter.untyped_storage().nbytes() == parameter.nbytes
    assert torch.equal(model(IDS).logits, want)
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert tied == (kind != "llama")


def test_they_train_and_are_saved_as_before(tmp_path):
    model = make_base()
    assert large_pages.settle(model)
    model(IDS, labels=IDS).loss.backward()
    torch.optim.SGD(model.parameters(), 0.1).step()
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    for one, other in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, other)


def test_two_parameters_around_one_memory_stay_so():
    one, other = nn.Linear(8, 8), nn.Linear(8, 8)
    other.weight.data = one.weight.data
    assert large_pages.settle(nn.ModuleList([one, other]))
    assert one.weight.data_ptr() == other.weight.data_ptr()


def test_what_is_loaded_is_moved_and_what_is_given_is_not(tmp_path, monkeypatch):
    base = make_base()
    base.save_pretrained(tmp_path)
    place = base.lm_head.weight.data_ptr()
    assert QAdapterModel.from_base(base).hf_model.lm_head.weight.data_ptr() == place
    moved = []
    settle = large_pages.settle
    monkeypatch.setattr(large_pages, "settle", lambda model: moved.append(settle(model)))
    QAdapterModel.from_pretrained(tmp_path)
    assert len(moved) == 1 and moved[0] > 0


def test_nothing_is_done_without_memory_or_pages(tmp_path, monkeypatch):
    model = make_base()
    memory = tmp_path / "meminfo"
    memory.write_text("MemTotal:  99 kB\nMemAvailable:    40 kB\n")
    for name, value in (
        ("MEMORY", memory), ("MEMORY", tmp_path / "none"), ("MODE", tmp_path / "none"),
        ("LEAST", 1 << 30),
    ):  # fmt: skip
        with monkeypatch.context() as patch:
            patch.setattr(large_pages, name, value)
            assert large_pages.settle(model) == 0
    assert large_pages.settle(model) > 0
