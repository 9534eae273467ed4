"""Everything that PEFT offers, small: what each becomes here. Writes the table of docs/peft.md.

python -m tests.model.peft_offers
"""

import dataclasses
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch
from peft import LoraConfig, PeftConfig, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.tuners.lora import config as lora_options

from qadapter import QAdapterModel
from tests.tiny_models import make_base

PAGE = Path(__file__).parents[2] / "docs" / "peft.md"
BEGIN, END = "<!-- peft-table: begin -->", "<!-- peft-table: end -->"
IDS = torch.randint(3, 97, (2, 6), generator=torch.Generator().manual_seed(4))

TOKENS = IDS[0, :2].tolist()
DECODE: dict[str, Any] = {
    "do_sample": False,
    "eos_token_id": None,
    "pad_token_id": 0,
    "return_dict_in_generate": True,
    "output_logits": True,
}

ONE = "one forward"
EACH = "a forward per stream"
REFUSED = "refused"
MISSING = "not installed"

TARGETS = ["q_proj", "v_proj", "down_proj"]


def lora(**options: Any) -> Callable[[], LoraConfig]:
    return lambda: LoraConfig(
        **{"r": 4, "target_modules": list(TARGETS), "task_type": "CAUSAL_LM", **options}
    )


def lora_with(**options: Any) -> Callable[[], LoraConfig]:
    """Options whose own check wants a package that is not needed to refuse them."""

    def make() -> LoraConfig:
        config = lora()()
        for name, value in options.items():
            setattr(config, name, value)
        return config

    return make


def other(kind: str, **options: Any) -> Callable[[], PeftConfig]:
    """Another type of adapter, with ``r`` and ``target_modules`` where it has these."""

    def make() -> PeftConfig:
        made = next(c for k, c in PEFT_TYPE_TO_CONFIG_MAPPING.items() if k.value == kind)
        names = {field.name for field in dataclasses.fields(made)}
        usual = {"target_modules": list(TARGETS), "r": 4, "task_type": "CAUSAL_LM"}
        return made(**{k: v for k, v in {**usual, **options}.items() if k in names})

    return make


# Row: what makes the config. Rows of one option of LoraConfig begin with its name.
LORA: dict[str, Callable[[], LoraConfig]] = {
    "r, lora_alpha, target_modules": lora(),
    'target_modules ("all-linear")': lora(target_modules="all-linear"),
    "target_modules (embedding)": lora(target_modules=["embed_tokens", "q_proj"]),
    "target_modules (head)": lora(target_modules=["lm_head", "q_proj"]),
    "exclude_modules": lora(exclude_modules=["v_proj"]),
    "lora_dropout": lora(lora_dropout=0.5),
    "fan_in_fan_out": lora(fan_in_fan_out=True),
    'bias ("none")': lora(bias="none"),
    'bias ("all")': lora(bias="all"),
    'bias ("lora_only")': lora(bias="lora_only"),
    "use_rslora": lora(use_rslora=True),
    "modules_to_save (head)": lora(modules_to_save=["lm_head"]),
    "modules_to_save (embedding)": lora(modules_to_save=["embed_tokens"]),
    "init_lora_weights (True)": lora(init_lora_weights=True),
    "init_lora_weights (False)": lora(init_lora_weights=False),
    **{
        f'init_lora_weights ("{kind}")': lora(init_lora_weights=kind)
        for kind in ("gaussian", "eva", "orthogonal", "mica")
    },
    **{
        f'init_lora_weights ("{kind}")': lora(init_lora_weights=kind)
        for kind in ("pissa", "pissa_niter_4", "olora", "corda", "lora_ga")
    },
    'init_lora_weights ("loftq"), loftq_config': lora_with(
        init_lora_weights="loftq", loftq_config={"loftq_bits": 4, "loftq_iter": 1}
    ),
    "eva_config": lora(init_lora_weights="eva", eva_config=lora_options.EvaConfig(rho=1.0)),
    "corda_config": lora(init_lora_weights="corda", corda_config=lora_options.CordaConfig()),
    "lora_ga_config": lora(init_lora_weights="lora_ga", lora_ga_config=lora_options.LoraGAConfig()),
    "layers_to_transform, layers_pattern": lora(layers_to_transform=[1], layers_pattern="layers"),
    "rank_pattern, alpha_pattern": lora(
        rank_pattern={"layers.1.self_attn.q_proj": 2}, alpha_pattern={"down_proj": 32}
    ),
    "megatron_config, megatron_core": lora(megatron_config={"hidden_size": 32}),
    "trainable_token_indices": lora(trainable_token_indices=TOKENS),
    "use_dora": lora(use_dora=True),
    "velora_config": lora(velora_config=lora_options.VeloraConfig(num_groups=4)),
    "alora_invocation_tokens": lora(alora_invocation_tokens=[5, 6]),
    "use_qalora, qalora_group_size": lora(use_qalora=True, qalora_group_size=8),
    "monteclora_config": lora(monteclora_config=lora_options.MontecloraConfig()),
    "layer_replication": lora(layer_replication=[(0, 2), (1, 3)]),
    "runtime_config": lora(use_dora=True, runtime_config=lora_options.LoraRuntimeConfig()),
    "lora_bias": lora(lora_bias=True),
    "target_parameters": lora(target_parameters=["mlp.gate_proj.weight"]),
    "use_bdlora": lora(
        use_bdlora=lora_options.BdLoraConfig(
            target_modules_bd_a=["q_proj", "v_proj"], target_modules_bd_b=["down_proj"], nblocks=2
        )
    ),
    "arrow_config": lora(arrow_config=lora_options.ArrowConfig()),
    "kasa_config": lora(kasa_config=lora_options.KasaConfig()),
    "ensure_weight_tying": lora(ensure_weight_tying=True),
}
# Fields of LoraConfig that say where it comes from, not what it does.
DESCRIBE = {
    *("task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path"),
    *("revision", "inference_mode"),
}
OTHERS: dict[str, Callable[[], PeftConfig]] = {
    kind.value: other(kind.value) for kind in PEFT_TYPE_TO_CONFIG_MAPPING if kind.value != "LORA"
} | {
    "ADALORA": other("ADALORA", total_step=10),
    "ADAPTION_PROMPT": other(
        "ADAPTION_PROMPT", target_modules="self_attn", adapter_len=2, adapter_layers=2
    ),
    "C3A": other("C3A", block_size=16),
    "CARTRIDGE": other("CARTRIDGE", num_virtual_tokens=2),
    "CPT": other("CPT", cpt_token_ids=[1, 2], cpt_mask=[1, 1], cpt_tokens_type_mask=[1, 2]),
    "FOURIERFT": other("FOURIERFT", n_frequency=10),
    "IA3": other("IA3", feedforward_modules=["down_proj"]),
    "LN_TUNING": other("LN_TUNING", target_modules=["input_layernorm", "norm"]),
    "MULTITASK_PROMPT_TUNING": other("MULTITASK_PROMPT_TUNING", num_virtual_tokens=2, num_tasks=2),
    "OFT": other("OFT", r=0, oft_block_size=8),
    "PREFIX_TUNING": other("PREFIX_TUNING", num_virtual_tokens=2),
    "PROMPT_TUNING": other("PROMPT_TUNING", num_virtual_tokens=2),
    "P_TUNING": other("P_TUNING", num_virtual_tokens=2),
    "PVERA (sample_at_inference)": other("PVERA", sample_at_inference=True),
    "ROAD": other("ROAD", group_size=8),
    "TRAINABLE_TOKENS": other(
        "TRAINABLE_TOKENS", target_modules=["embed_tokens"], token_indices=TOKENS
    ),
    "VBLORA": other("VBLORA", vector_length=2, num_vectors=4),
    "WAVEFT": other("WAVEFT", n_frequency=20),
}


@dataclasses.dataclass
class Offer:
    """What became of a row: how it runs, why, and how far the streams are from what they are."""

    runs: str
    why: str = ""
    base_off_by: float = 0.0
    adapter_off_by: float = 0.0
    loaded_off_by: float = 0.0
    moved_by: float = 1.0
    decoded_off_by: float = 0.0
    alone_off_by: float = 0.0


@torch.no_grad()
def outcome(row: str, folder: Path) -> Offer:
    """Wrap, move the adapter, compare its streams with PEFT's own, save and load."""
    kind = "qwen2" if row.startswith("bias") else "llama"  # llama has no biases
    torch.manual_seed(0)
    base = make_base(kind)
    base.save_pretrained(folder / "base")
    base.config._name_or_path = str(folder / "base")
    want = base(IDS).logits.flatten(0, 1)
    try:
        config = LORA[row]() if row in LORA else OTHERS[row]()
    except ImportError as error:
        return Offer(MISSING, str(error))
    if row == "XLORA":
        config = _xlora(folder)
        base.config.use_cache = False
    try:
        if row in LORA:
            model = QAdapterModel.from_base(base, lora_config=config)
        else:
            model = QAdapterModel(get_peft_model(base, config))
    except ValueError as error:
        return Offer(REFUSED, str(error))
    except ImportError as error:
        return Offer(MISSING, str(error))
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and "index" not in name:
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    out = model(IDS)
    peft_logits = model.peft_model(IDS).logits.flatten(0, 1)
    reason = model.streams((None, "default")).reason
    decoded = model.generate(IDS, strength=0.6, max_new_tokens=3, **DECODE)
    texts = model(decoded.sequences)
    mixed = (0.4 * texts.base_logits + 0.6 * texts.q_logits).view(2, 9, -1)[:, 5:8]
    model.save_pretrained(folder / "adapter")
    again = QAdapterModel.from_pretrained(folder / "adapter")(IDS)
    return Offer(
        ONE if reason is None else EACH,
        "" if reason is None else reason,
        _far(out.base_logits, want),
        _far(out.q_logits, peft_logits),
        max(_far(again.q_logits, out.q_logits), _far(again.base_logits, out.base_logits)),
        _far(out.q_logits, want),
        _far(torch.stack(decoded.logits, 1), mixed),
        _far(model(IDS[:1]).q_logits, out.q_logits[:6]),
    )


def _far(one: torch.Tensor, other: torch.Tensor) -> float:
    return (one - other).abs().max().item()


def _xlora(folder: Path) -> PeftConfig:
    """Mixes adapters that are there already."""
    QAdapterModel.from_base(make_base(), lora_config=lora()()).save_pretrained(folder / "expert")
    return peft.XLoraConfig(
        task_type="CAUSAL_LM", hidden_size=32, adapters={"0": str(folder / "expert")}
    )


NOTES = {
    'init_lora_weights ("eva")': "A from data by `initialize_lora_eva_weights`, else random",
    "eva_config": 'as `init_lora_weights="eva"`',
    "monteclora_config": "its KL term is not added to the loss",
    "ADALORA": "ranks stay as they begin: nothing calls `update_and_allocate`",
    "runtime_config": "of DoRA",
    "use_dora": "scales the whole product, not a term that is added",
}


def table() -> str:
    lines = ["| in PEFT | here | remark |", "| --- | --- | --- |"]
    for row in [*LORA, *OTHERS]:
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            offer = outcome(row, Path(folder))
        what = f"LoRA: {row}" if row in LORA else row
        lines.append(f"| {what} | {offer.runs} | {NOTES.get(row) or _short(offer)} |")
    return "\n".join(lines)


def _short(offer: Offer) -> str:
    if offer.runs in (ONE, EACH):
        return ""
    why = offer.why.partition("\n")[0].replace("|", "/")
    return why.removeprefix("adapter 'default': ").partition("; ")[0]


def page() -> str:
    """docs/peft.md with the table as it comes out now."""
    head, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    return f"{head}{BEGIN}\n{table()}\n{END}{rest.partition(END)[2]}"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
