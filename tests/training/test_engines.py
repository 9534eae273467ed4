"""Training under an engine is the training of one process: FSDP2, DeepSpeed's ZeRO, DDP.

Slow for starting processes: one start does all cases of an engine.
"""

import importlib.util

import pytest
import torch

from tests.training import engine_runs

SGD = ("train", "accumulated", "cached", "anchors", "budget", "checkpointing", "tied", "padded")
SIXTEEN = ("bf16", "bf16, cached", "bf16, resume")
QUICK = ("units", "anchors", "resume, sharded", "generate", "fail")
HAS_BITSANDBYTES = importlib.util.find_spec("bitsandbytes") is not None
NAMES = {
    "ddp": ("evaluate first", "generate", "fail", "resume", "nf4"),
    "fsdp2": (*SGD, "resume", *SIXTEEN, "bf16, anchors", "evaluate first", "nf4", "nf4, resume"),
    "zero2": (*SGD, "resume", *SIXTEEN, "generate", "fail", "evaluate first", "nf4"),
    "zero3": (*SGD, "resume", *SIXTEEN, "generate", "fail"),
}
needs_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed"
)
needs_bitsandbytes = pytest.mark.skipif(
    not HAS_BITSANDBYTES, reason="bitsandbytes is not installed"
)
ALL = [
    pytest.param(
        engine,
        name,
        marks=[needs_deepspeed] * ("zero" in engine) + [needs_bitsandbytes] * ("nf4" in name),
    )
    for engine, names in NAMES.items()
    for name in names
]


@pytest.fixture(scope="module")
def started(tmp_path_factory):
    """What two processes make of all cases of an engine, and one process of a case."""
    made = {}

    def of(engine, names, name):
        if (engine, names) not in made:
            folder = tmp_path_factory.mktemp(engine)
            made[engine, names] = engine_runs.start(folder, engine, names)
        tensors, figures = made[engine, names]
        return tensors[name], figures[name]

    def alone(name):
        if name not in made:
            made[name] = engine_runs.case(name, tmp_path_factory.mktemp("one"), "ddp", 1)
        return made[name]

    return of, alone


def start_of(name):
    """The adapter that a case begins with."""
    config = engine_runs.CASES[name][1]
    return engine_runs.flat(engine_runs.model_of(config.get("kind", "llama")))


def update_error(ranks, one, start):
    """Norm of the difference of two trainings, in parts of what the second one moved."""
    return float((ranks - one).norm() / (one - start).norm())


def check(engine, name, ranks, one, alone):
    (tensors, figures), (tensors_one, figures_one) = ranks, one
    if name == "fail":
        return check_failures(engine, figures)
    if name == "units":
        assert figures["units"] == ["FSDPQAdapterModel", *["FSDPLlamaDecoderLayer"] * 3]
        assert figures["head"] == ["Parameter"] and figures_one["share"] == 1.0
        assert 0.49 < figures["share"] < 0.52
        return None
    if name.endswith("generate"):
        assert figures["rows"] == figures_one["rows"]
        assert len({len(row) for row in figures["rows"]}) > 2  # they end at different lengths
        return None
    start = start_of(name)
    error = update_error(tensors["weights"], tensors_one["weights"], start)
    if name.startswith("bf16"):
        # Both round to 16 bits, in other places: neither is further from float32 than the other.
        plain = {"bf16, resume": "resume", "bf16, cached": "cached", "bf16, anchors": "budget"}
        exact = alone(plain.get(name, "train"))[0]["weights"]
        rounding = update_error(tensors_one["weights"], exact, start)
        assert update_error(tensors["weights"], exact, start) < 2 * rounding < 1.5
    else:
        # AdamW divides gradients by their size: what is rounding in a small one grows.
        assert error < (5e-5 if name == "nf4, resume" else 1e-5)
    if "resumed" in tensors:
        assert update_error(tensors["resumed"], tensors["weights"], start) < 1e-6
        assert torch.equal(tensors["saved"], tensors["resumed"])
        check_files(engine, figures, figures_one)
    elif not name.startswith("bf16"):
        assert figures.keys() == figures_one.keys() and "eval_rewards/accuracies" in figures
        for key, value in figures_one.items():
            assert figures[key] == pytest.approx(value, rel=1e-4, abs=1e-5), key
    return None


def check_files(engine, figures, figures_one):
    """The plain LoRA of one process, its files once, and nothing of the base's size."""
    adapter = ("adapter_model.safetensors", "adapter_config.json", "qadapter_config.json")
    checkpoint = figures["checkpoint"]
    assert {*adapter, "trainer_state.json"} <= checkpoint.keys()
    largest = figures_one["checkpoint"]["adapter_model.safetensors"]
    assert checkpoint["adapter_model.safetensors"] <= largest
    # Optimiser: two moments and the master weights at most, float32, and what names them.
    assert sum(checkpoint.values()) < 20 * largest
    assert figures["end"] == figures_one["end"]


def check_failures(engine, said):
    where = "no space left"
    assert len(said["checkpoint"]) == 2 and all(where in line for line in said["checkpoint"])
    assert all(line.startswith("OSError") for line in said["checkpoint"] + said["adapter"])
    assert "process 1" in said["checkpoint"][0] and "process 0" in said["adapter"][1]
    assert said["left"] == []
    assert all("the base: 'llama" in line and "'qwen2" in line for line in said["base"])
    if engine == "zero3":
        assert all("eval_on_start=True" in line for line in said["train"])
        assert all("zero3_init_flag" in line for line in said["zero.Init"])


@pytest.mark.parametrize("name", QUICK)
def test_fsdp2_in_short(started, name):
    of, alone = started
    check("fsdp2", name, of("fsdp2", QUICK, name), alone(name), alone)


@pytest.mark.slow
@pytest.mark.parametrize(("engine", "name"), ALL)
def test_an_engine_trains_as_one_process(started, engine, name):
    of, alone = started
    names = tuple(one for one in NAMES[engine] if HAS_BITSANDBYTES or "nf4" not in one)
    check(engine, name, of(engine, names, name), alone(name), alone)
