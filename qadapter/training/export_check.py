"""How far an exported adapter is from the policy that it stands for, on text.

Every distribution is taken from a plain forward, by transformers and PEFT, of what was saved: the
base, each adapter, and the exported files.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import PeftModel
from torch import Tensor
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM

from qadapter.composition import Composition, blend
from qadapter.model import adapter_files, saving
from qadapter.model.checkpoint import fingerprint
from qadapter.text.anchors import Anchor
from qadapter.training.strength import mean_and_interval

EXPORTED = "exported"
ROWS = 64  # whose float32 distributions exist at a time


class ExportKL(NamedTuple):
    """KL in the states of n texts, in nats summed over each text's: float64 [n]."""

    base_blend: Tensor
    base_exported: Tensor
    blend_exported: Tensor
    states: Tensor
    """int64 [n], how many states these are."""


class Adapters:
    """Saved adapters on their base, in the order of ``weights``.

    Args:
        weights: of the adapters, by folder.
        base_model: where the base is, if not where it was at training.
        dtype: of the base.

    Raises:
        ValueError: adapters that do not fit the base, or each other's.
    """

    def __init__(
        self,
        weights: Mapping[str, float],
        base_model: str | None = None,
        dtype: torch.dtype | str = torch.float32,
    ) -> None:
        first, *others = weights
        self.weights, self.dtype = dict(weights), dtype
        self.peft_model, saved = saving.load(first, base_model, dtype, {})
        base = fingerprint(self.base)
        names = [str(self.peft_model.active_adapter)]
        compositions = [Composition(saved["alpha_0"], saved["alpha_tilde"], saved["center"])]
        for number, folder in enumerate(others, start=1):
            names.append(f"adapter-{number}")  # no part of a path: PEFT replaces it in keys
            compositions.append(saving.attach(self.peft_model, base, folder, names[-1]))
        self.trained = dict(zip(names, compositions, strict=True))
        if torch.cuda.is_available():
            self.peft_model.to("cuda")
        self.peft_model.eval()

    @property
    def base(self) -> Any:
        return self.peft_model.get_base_model()

    @torch.no_grad()
    def kl(
        self, exported: str | Path, strength: float, texts: Sequence[Anchor], progress: bool = True
    ) -> ExportKL:
        """Of the blend of logits at ``strength``, and of what `export_adapter` wrote for it.

        Args:
            exported: its folder, of a LoRA or of a merged model.
            strength: as it was exported.
            texts: tokenised, whose states count.
        """
        given = dict(zip(self.trained, self.weights.values(), strict=True))
        names, counts = blend(self.trained, 1, strength, adapters=given)
        sums = []
        with self._exported(exported) as of_exported:
            for text in tqdm(texts, desc="KL of the export", disable=not progress):
                ids = torch.tensor([text.ids], device=self.base.device)
                base, scaled = self._logits(None, ids), of_exported(ids)
                streams = [base if name is None else self._logits(name, ids) for name in names]
                b, e, *each = (logits[0, text.first :] for logits in (base, scaled, *streams))
                sums.append(_sums(b, e, each, counts[:, 0].tolist()))
        blend_of, exported_of, between = torch.stack(sums, 1)
        states = torch.tensor([text.states for text in texts])
        return ExportKL(blend_of, exported_of, between, states)

    def _logits(self, name: str | None, ids: Tensor) -> Tensor:
        model: PeftModel = self.peft_model
        if name is None:
            with model.disable_adapter():
                return model(input_ids=ids).logits
        model.set_adapter(name)
        return model(input_ids=ids).logits

    @contextmanager
    def _exported(self, folder: str | Path) -> Iterator[Callable[[Tensor], Tensor]]:
        if (Path(folder) / "adapter_config.json").exists():
            adapter_files.load(self.peft_model, folder, EXPORTED, trainable=False)
            try:
                yield lambda ids: self._logits(EXPORTED, ids)
            finally:
                self.peft_model.set_adapter(next(iter(self.trained)))
                self.peft_model.delete_adapter(EXPORTED)
            return
        merged: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=self.dtype)
        merged.to(self.base.device).eval()
        yield lambda ids: merged(input_ids=ids).logits


def _sums(
    base: Tensor, exported: Tensor, streams: Sequence[Tensor], counts: Sequence[float]
) -> Tensor:
    """The three sums [3], float64, of logits [N, V]."""
    total = torch.zeros(3, dtype=torch.float64)
    for first in range(0, base.shape[0], ROWS):
        rows = slice(first, first + ROWS)
        mixed = torch.stack([c * z[rows].float() for c, z in zip(counts, streams, strict=True)])
        never = base[rows] == float("-inf")  # tokens that no stream gives
        of_each = (
            base[rows].float(),
            mixed.sum(0).masked_fill(never, float("-inf")),
            exported[rows].float(),
        )
        b, m, e = (torch.log_softmax(logits, -1) for logits in of_each)
        for number, (p, q) in enumerate(((b, m), (b, e), (m, e))):
            total[number] += _kl(p, q).double().sum().cpu()
    return total


def _kl(p: Tensor, q: Tensor) -> Tensor:
    """KL(p || q) [N] of log-probabilities [N, V]."""
    return (p.exp() * (p - q)).masked_fill(p == float("-inf"), 0.0).sum(-1)


def table(kl: ExportKL, source: str) -> str:
    """As aligned text, per token with 95 % intervals by bootstrap over the texts."""
    counted = f"{source}: {len(kl.states)} texts, {int(kl.states.sum())} tokens"
    lines = [f"KL in nats a token, with 95 % intervals, on {counted}"]
    for name, sums in (
        ("KL(base || blend)", kl.base_blend),
        ("KL(base || exported)", kl.base_exported),
        ("KL(blend || exported)", kl.blend_exported),
    ):
        mean, low, high = mean_and_interval(sums, kl.states)
        lines.append(f"  {name:22} {mean:.3g} ({low:.3g} to {high:.3g})")
    moved = float(kl.base_blend.sum())
    if moved > 0:
        lines[-1] += f", {float(kl.blend_exported.sum()) / moved:.2%} of KL(base || blend)"
    return "\n".join(lines)
