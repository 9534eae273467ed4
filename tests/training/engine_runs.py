"""Trainings of a tiny model under an engine, in as many processes as there are.

    torchrun --nproc_per_node 2 -m tests.training.engine_runs FOLDER fsdp2 [CASE ...]

Every case is a function that returns tensors and figures; the first process writes them to FOLDER.
On a CPU, over gloo: accelerate has FSDP for accelerators alone, and is told otherwise here.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from datasets import Dataset
from safetensors.torch import load_file, save_file
from torch.distributed.fsdp import FSDPModule
from transformers import Trainer

from qadapter import functional as QF
from qadapter.model import sharded
from qadapter.model.modeling import QAdapterModel
from tests.tiny_models import make_base, make_quantised, perturb
from tests.tiny_text import preference_rows, word_tokenizer
from tests.training.test_anchors import anchor_rows
from tests.training.tiny_trainer import trainer

ROOT = Path(__file__).resolve().parents[2]
BASES = tempfile.TemporaryDirectory()  # where a base is found again when an adapter is saved
ENGINES = ("ddp", "fsdp2", "zero2", "zero3")
COMMON = {
    "lr_scheduler_type": "constant",
    "num_train_epochs": 1,
    "max_steps": -1,
    "train_sampling_strategy": "sequential",
    "reg_coef": 0.5,
    "learning_rate": 0.05,
}


def fsdp_on_cpu():
    """Let accelerate take FSDP on a CPU."""
    from accelerate.state import AcceleratorState, DistributedType

    plain = AcceleratorState.__init__

    def init(self, *args, fsdp_plugin=None, **kwargs):
        plain(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type = DistributedType.FSDP
            if self._mixed_precision != "no":
                fsdp_plugin.set_mixed_precision(self._mixed_precision)
            self.fsdp_plugin = fsdp_plugin

    AcceleratorState.__init__ = init


def zero(stage, dtype):
    """A configuration of DeepSpeed as the one that the package ships."""
    config = {
        "zero_optimization": {"stage": stage},
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": dtype == torch.bfloat16},
    }
    if stage == 3:
        # Nothing as small as this is in parts by default.
        config["zero_optimization"] |= {"stage3_param_persistence_threshold": 0}
    return config


def settings(engine, dtype=torch.float32, states="FULL_STATE_DICT"):
    """Arguments of training under an engine."""
    made = {"bf16": dtype == torch.bfloat16}
    if engine == "fsdp2":
        made |= {"fsdp": True, "fsdp_config": {"version": 2, "state_dict_type": states}}
    elif engine in ("zero2", "zero3"):
        made |= {"deepspeed": zero(int(engine[-1]), dtype)}
    return made


def model_of(kind="llama", dtype=torch.float32):
    torch.manual_seed(0)
    if kind == "nf4":
        base = make_quantised(BASES.name, kind, dtype)
    else:
        base = make_base(kind, dtype=dtype)
    return perturb(QAdapterModel.from_base(base), std=0.1)


def made(folder, processes, rows=9, kind="llama", dtype=torch.float32, **config):
    """A trainer whose updates are of 4 pairs in all."""
    from accelerate.state import AcceleratorState
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    AcceleratorState._reset_state()
    # What an earlier trainer has set: a base made now would be in parts (zero.Init).
    unset_hf_deepspeed_config()
    accumulated = config.get("gradient_accumulation_steps", 1)
    if config.get("anchor_coef") or config.get("kl_budget"):
        config["anchors"] = anchor_rows()
    batch = {
        "per_device_train_batch_size": 4 // processes // accumulated,
        "per_device_eval_batch_size": 4 // processes,
    }
    model = model_of(kind, dtype)
    data = Dataset.from_list(preference_rows(rows))
    common = {**COMMON, "optim": "sgd"}
    return trainer(
        folder, word_tokenizer(), model=model, data=data, **{**common, **batch, **config}
    )


def flat(model):
    """The adapter's weights, whole, in all processes."""
    state = sharded.adapter_state(model)
    return torch.cat([w.float().flatten() for _, w in sorted(state.items())])


def weights(run):
    return flat(run._own)


def figures_of(run):
    """Logged, evaluated and predicted, but for what depends on the number of processes."""
    logged = [line for line in run.state.log_history if "loss" in line][-1]
    found = {**logged, **run.evaluate()}
    own = ("runtime", "per_second", "preparation_time")
    return {k: v for k, v in found.items() if not k.endswith(own) and k not in ("kl", "grad_norm")}


def trained(folder, processes, **config):
    run = made(folder, processes, **config)
    run.train()
    predicted = run.predict(Dataset.from_list(preference_rows(7))).predictions
    tensors = {"weights": weights(run), "predicted": torch.as_tensor(predicted)}
    return tensors, figures_of(run)


FOUR_UPDATES = {
    "optim": "adamw_torch",
    "rows": 16,
    "lr_scheduler_type": "linear",
    "max_grad_norm": 1.0,
    "save_strategy": "steps",
    "save_steps": 2,
}


def resumed(folder, processes, **config):
    """4 updates at one go, saved after 2 of them, and the last 2 again by a new trainer; what the
    checkpoint and the end hold."""
    how = {**FOUR_UPDATES, **config}
    run = made(folder, processes, **how)
    run.train()
    tensors = {"weights": weights(run)}
    checkpoint = Path(run.args.output_dir) / "checkpoint-2"
    again = made(folder, processes, **how)
    again.train(str(checkpoint))
    tensors["resumed"] = weights(again)
    again.save_model(str(folder / "end"))
    saved = load_file(folder / "end" / "adapter_model.safetensors")
    tensors["saved"] = torch.cat([w.float().flatten() for _, w in sorted(saved.items())])
    sizes = {
        str(path.relative_to(checkpoint)): path.stat().st_size
        for path in checkpoint.rglob("*")
        if path.is_file()
    }
    return tensors, {"checkpoint": sizes, "end": sorted(p.name for p in (folder / "end").iterdir())}


def going_on(folder, processes, saved, **config):
    """The last 2 updates of the case ``saved``, which another number of processes has begun."""
    run = made(folder, processes, **{**FOUR_UPDATES, **config})
    run.train(str(folder.parent / saved / "out" / "checkpoint-2"))
    return {"weights": weights(run)}, {}


def evaluated_first(folder, processes, **config):
    run = made(folder, processes, **config)
    first = run.evaluate()["eval_loss"]
    run.train()
    return {"weights": weights(run)}, {"first": first, **figures_of(run)}


def generated(folder, processes, **config):
    """Text of 6 prompts that end at different lengths, when an engine has sharded the model (for a
    training that leaves it as it is); each process has its own, the first one more of them, and
    padding."""
    run = made(folder, processes, learning_rate=0.0, **config)
    run.train()
    rank = run.accelerator.process_index
    ids, mask = torch.full((6, 5), 7), torch.ones(6, 5, dtype=torch.int64)
    ids[:, 1] = torch.arange(20, 26)
    ids[0, :2] = mask[0, :2] = 0
    if processes == 1:
        mine = slice(None)
    else:
        mine = [slice(0, 4), slice(4, 6)][rank]
    seeds = torch.arange(6) + 5
    how = {"do_sample": True, "max_new_tokens": 40, "top_k": 5, "eos_token_id": [2, 23]}
    out = run._own.generate(ids[mine], mask[mine], seed=seeds[mine], **how)
    rows = [row.tolist() for row in out[:, 5:]]
    if processes > 1:
        from accelerate.utils import gather_object

        rows = gather_object(rows)
    return {}, {"rows": [[t for t in row if t != 0] for row in rows]}


def units(folder, processes, **config):
    """What FSDP2 shards at a time, the kinds of the head that the loss reads, and the share of the
    model that a process holds."""
    run = made(folder, processes, rows=4, **config)
    kinds, plain = set(), QF.linear_residual_values

    def spy(base, q, weight, *args, **kwargs):
        kinds.add(type(weight).__name__)
        return plain(base, q, weight, *args, **kwargs)

    QF.linear_residual_values = spy
    try:
        run.train()
    finally:
        QF.linear_residual_values = plain
    parts = [type(m).__name__ for m in run.model.modules() if isinstance(m, FSDPModule)]
    if isinstance(run.model, FSDPModule):
        run.model.reshard()
    parameters = list(run.model.parameters())
    held = sum(p.to_local().numel() if hasattr(p, "to_local") else p.numel() for p in parameters)
    share = held / sum(p.numel() for p in parameters)
    return {}, {"units": parts, "head": sorted(kinds), "share": share}


def failing(folder, processes, **config):
    """Errors of one process: what each of them says."""
    from accelerate.utils import gather_object

    said = {}

    def of(what, function):
        try:
            function()
            message = "nothing"
        except (OSError, ValueError) as error:
            message = f"{type(error).__name__}: {error}"
        said[what] = gather_object([message]) if processes > 1 else [message]

    run = made(folder, processes, save_strategy="steps", save_steps=2, **config)
    rank = run.accelerator.process_index
    folders = [Path(run.args.output_dir) / "checkpoint-2", folder / "end"]

    def raising(*args, **kwargs):
        raise OSError("no space left")

    plain = Trainer._save_rng_state
    if rank == processes - 1:
        Trainer._save_rng_state = raising
    of("checkpoint", run.train)
    Trainer._save_rng_state = plain
    if rank == 0:
        run._own.save_pretrained = raising
    of("adapter", lambda: run.save_model(str(folders[1])))
    run.accelerator.wait_for_everyone()
    said["left"] = [str(path) for path in folders if path.exists()]
    kind = "qwen2" if rank == processes - 1 > 0 else "llama"
    of("base", lambda: made(folder, processes, kind=kind, **config))
    if config.get("deepspeed", {}).get("zero_optimization", {}).get("stage") == 3:
        early = made(folder, processes, **config)
        early.evaluate()
        of("train", early.train)
        of("zero.Init", model_of)  # while the settings of ZeRO-3 are there
    return {}, said


CASES = {
    "train": (trained, {}),
    "accumulated": (trained, {"rows": 7, "gradient_accumulation_steps": 2}),
    "cached": (trained, {"precompute_base": True}),
    "anchors": (trained, {"anchor_coef": 2.0, "precompute_base": True}),
    "budget": (trained, {"kl_budget": 0.5}),
    "checkpointing": (trained, {"gradient_checkpointing": True}),
    "tied": (trained, {"kind": "llama-tied"}),
    "padded": (trained, {"packing": False}),
    "evaluate first": (evaluated_first, {}),
    "generate": (generated, {}),
    "units": (units, {}),
    "fail": (failing, {}),
    "bf16": (trained, {"dtype": torch.bfloat16}),
    "bf16, cached": (trained, {"dtype": torch.bfloat16, "precompute_base": True}),
    "bf16, anchors": (
        trained,
        {"dtype": torch.bfloat16, "kl_budget": 0.5, "precompute_base": True},
    ),
    "bf16, resume": (resumed, {"dtype": torch.bfloat16}),
    "bf16, generate": (generated, {"dtype": torch.bfloat16}),
    "nf4": (trained, {"kind": "nf4"}),
    "nf4, cached": (trained, {"kind": "nf4", "precompute_base": True}),
    "nf4, resume": (resumed, {"kind": "nf4"}),
    "nf4, bf16": (trained, {"kind": "nf4", "dtype": torch.bfloat16}),
    "resume": (resumed, {}),
    "resume, sharded": (resumed, {"states": "SHARDED_STATE_DICT"}),
    "go on": (going_on, {"saved": "resume"}),
    "go on, sharded": (going_on, {"saved": "resume, sharded", "states": "SHARDED_STATE_DICT"}),
}


def case(name, folder, engine, processes):
    function, config = CASES[name]
    config = dict(config)
    states = config.pop("states", "FULL_STATE_DICT")
    dtype = config.get("dtype", torch.float32)
    return function(folder, processes, **settings(engine, dtype, states), **config)


def start(folder, engine, names, processes=2, timeout=900, python=sys.executable):
    """What several processes make of these cases: tensors and figures by name."""
    command = [python, "-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc_per_node={processes}", "-m", "tests.training.engine_runs"]
    log, path = Path(folder) / "log.txt", Path(folder) / "made.json"
    with log.open("w") as out:
        subprocess.run(
            [*command, str(folder), engine, *names],
            env=dict(os.environ, OMP_NUM_THREADS="1", DS_ACCELERATOR="cpu"),
            stdout=out,
            stderr=subprocess.STDOUT,
            timeout=timeout,
            cwd=ROOT,
        )
    # DeepSpeed may abort at exit, when all is written.
    assert path.exists(), log.read_text()[-8000:]
    figures = json.loads(path.read_text())
    found = load_file(Path(folder) / "made.safetensors")
    tensors = {name: {} for name in names}
    for key, value in found.items():
        name, _, what = key.partition("/")
        tensors[name][what] = value
    return tensors, figures


def main(folder, engine, names):
    folder, processes = Path(folder), int(os.environ["WORLD_SIZE"])
    if engine == "fsdp2":
        fsdp_on_cpu()
    if engine.startswith("zero"):
        import deepspeed.ops

        # Compiled for minutes at the first start; gloo serves as well.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    tensors, figures = {}, {}
    for name in names:
        found, figures[name] = case(name, folder / name, engine, processes)
        tensors |= {f"{name}/{what}": value.contiguous() for what, value in found.items()}
    if os.environ["RANK"] == "0":
        save_file(tensors, folder / "made.safetensors")
        (folder / "made.json").write_text(json.dumps(figures))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3:])
