"""The model card of an exported adapter: what it is, what it is not, how servers load it."""

from collections.abc import Mapping
from pathlib import Path

from peft import LoraConfig

_NOT_THE_BLEND = """Strength {strength:g} is in the weights: every layer has W + {strength:g} times
the change that was trained. **A scaled LoRA is not the blend of logits** that qadapter samples from
at this strength, softmax(s z_q + (1 - s) z_b): both agree to first order in the change, and exactly
at strength 1 of one adapter of weight 1 and at strength 0. `qadapter export --check FILE` measures
how far they are apart on your text; `qadapter generate --strength {strength:g}` with the adapter
itself samples from the blend."""

_LORA = """```python
from peft import PeftModel
from transformers import AutoModelForCausalLM

base = AutoModelForCausalLM.from_pretrained("{base}")
model = PeftModel.from_pretrained(base, "this folder")
```

vLLM (rank {rank}, alpha {alpha:g}; the same for all layers):

```
vllm serve {base} --enable-lora --max-lora-rank {vllm_rank} --lora-modules exported=THIS_FOLDER
```

llama.cpp, whose converter makes a GGUF of it, and a GGUF of the base:

```
python convert_lora_to_gguf.py --base BASE_FOLDER --outfile adapter.gguf THIS_FOLDER
llama-server -m base.gguf --lora adapter.gguf
```
"""

_BIAS = """
`lora_bias=True`: the LoRA has biases of its own, which PEFT adds and other servers may refuse.
"""

_MERGED = """The weights are the base's with the change added, each rounded once.

```python
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("this folder")
```

PEFT is not needed. vLLM:

```
vllm serve THIS_FOLDER
```

llama.cpp, whose converter makes a GGUF of it:

```
python convert_hf_to_gguf.py --outfile model.gguf THIS_FOLDER
llama-server -m model.gguf
```
"""


def model_card(
    weights: Mapping[str, float], strength: float, base: str, config: LoraConfig, merged: bool
) -> str:
    """Markdown.

    Args:
        weights: of the adapters, by folder.
        strength: that was exported.
        base: its name, as it was saved with the adapter.
        config: of the LoRA.
        merged: whether the LoRA was added to the weights.
    """
    names = {Path(folder).resolve().name: weight for folder, weight in weights.items()}
    if len(weights) == 1 and set(names.values()) == {1.0}:
        what = f"`{next(iter(names))}`"
    else:
        parts = [f"{weight:g} times `{Path(f).resolve().name}`" for f, weight in weights.items()]
        what = " + ".join(parts)
    loading = _MERGED if merged else _LORA + (_BIAS if config.lora_bias else "")
    loading = loading.format(
        base=config.base_model_name_or_path or base,
        rank=config.r,
        alpha=config.lora_alpha,
        vllm_rank=max(8, 1 << (config.r - 1).bit_length()),
    )
    tags = "qadapter, preference" if merged else "qadapter, lora, preference"
    return f"""---
library_name: {"transformers" if merged else "peft"}
base_model: {base}
tags: [{tags}]
---
# {"Merged model" if merged else "Plain LoRA"} exported from a Q-Adapter

- base: `{base}`
- strength: {strength:g}
- adapter: {what}

{_NOT_THE_BLEND.format(strength=strength)}

## Loading

{loading}"""
