"""What all runs of a study share, and the runs: train, keep the LoRAs, measure; nothing twice.

<output>/study.json                 data, set and base that everything here belongs to
<output>/base.json                  the base's own figures
<output>/anchors-<tokens>.jsonl     texts of the base's, which all anchored runs share
<output>/runs/<name>/training.json  cost and log; step-<n>.safetensors beside it
<output>/runs/<name>/result.json    the figures, item by item
"""

import itertools
import json
from collections.abc import Callable
from dataclasses import asdict
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from peft import set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from tqdm.auto import tqdm
from transformers import AutoTokenizer

from benchmarks import recording
from benchmarks.quality import data as quality_data
from benchmarks.quality import generate, judge, score, tasks
from benchmarks.quality.settings import Run, Set, Settings, digest
from benchmarks.quality.train import DEVICE, composition, new_model, train
from qadapter import QAdapterModel, files
from qadapter.composition import StreamWeights
from qadapter.model.checkpoint import resolve_model
from qadapter.text.tokenization import PromptTooLongError, eos_token_ids, tokenize_preference
from qadapter.training.anchor_texts import make_anchors

BASE = StreamWeights(0.0, 1.0)
TRAINED = "trained"
# A study can go on with more of them.
MORE_RUNS = ("seeds", "methods", "noise", "noisy_methods", "betas", "rates")
Record = dict[str, Any]
Tell = Callable[[str], Any]


def cached(path: Path, make: Callable[[], Any]) -> Any:
    """What the file holds; made if there is none."""
    if not path.exists():
        files.write_json(path, make())
    return files.read_json(path)


@lru_cache(maxsize=1)
def scoring_model(base: str, lora_r: int, lora_targets: str) -> QAdapterModel:
    """One model for all measuring; made anew where the LoRA has another shape."""
    return new_model(base, {"lora_r": lora_r, "lora_targets": lora_targets, "seed": 0})


class Study:
    """What all runs share: the base, the data, the judges, what the base says."""

    def __init__(
        self,
        chosen: Set,
        data: quality_data.StudyData,
        output: str | Path,
        base: str = "smollm2",
        judges: tuple[str, ...] = ("n-grams", "embeddings"),
    ) -> None:
        self.set, self.data, self.output = chosen, data, Path(output)
        self.base = resolve_model(base)
        self.judge_names, self.missing_judges = judge.split_names(judges)
        self.about = self._checked_about(base)
        self.tokenizer = AutoTokenizer.from_pretrained(self.base)
        self.heldout_rows = quality_data.some(data.heldout, chosen.heldout)
        answered = quality_data.some(self.heldout_rows, chosen.prompts)
        self.prompts = [row["prompt"] for row in answered]
        measured, self.replay_prompts = quality_data.unrelated_and_replay(data, chosen.unrelated)
        self.heldout, self.unrelated = self.tokens(self.heldout_rows), self.tokens(measured)
        self.known: score.Known = {}
        self.base_record: Record = cached(self.output / "base.json", self._asked_base)
        asked = tasks.questions(chosen.questions)
        self.questions = [asked[i] for i in self.base_record["kept"]]

    def _checked_about(self, base: str) -> Record:
        """What the folder was made with; ValueError where that is something else."""
        what = {
            "set": {k: v for k, v in asdict(self.set).items() if k not in MORE_RUNS},
            "data": {"name": self.data.name, "files": self.data.files},
            "base": base,
            "judges": self.judge_names,
        }
        what = json.loads(json.dumps(what))  # as it comes back from the file
        path = self.output / "study.json"
        about = cached(path, lambda: {"what": what, "environment": recording.environment(DEVICE)})
        # A set that was written before it had all of these.
        about["what"]["set"] = {
            "answered_kls": [],
            "precompute": False,
            **about["what"].get("set", {}),
        }
        changed = [name for name in what if about["what"].get(name) != what[name]]
        if changed:
            raise ValueError(
                f"{path}: made with another {' and '.join(changed)}; give another --output, or "
                "delete it"
            )
        return about

    @cached_property
    def judges(self) -> list[judge.Judge]:
        """Fitted when the first answers come."""
        pairs, heldout = (
            [(quality_data.text(row["chosen"]), quality_data.text(row["rejected"])) for row in rows]
            for rows in (self.data.train, self.heldout_rows)
        )
        return [judge.Judge(name, pairs, heldout) for name in self.judge_names]

    def judge_reports(self) -> list[Record]:
        return cached(self.output / "judges.json", lambda: [made.report for made in self.judges])

    @cached_property
    def limits(self) -> tuple[int, list[int]]:
        """How many tokens a sequence has at most, and which end it."""
        return self.set.usual["max_length"], eos_token_ids(self.model(), self.tokenizer)

    def tokens(self, rows: list[quality_data.Row]) -> list[quality_data.Row]:
        length, eos = self.limits
        return quality_data.tokenised(rows, self.tokenizer, length, eos)

    def model(self, settings: Settings | None = None) -> QAdapterModel:
        settings = settings or self.set.usual
        return scoring_model(self.base, settings["lora_r"], settings["lora_targets"])

    def _asked_base(self) -> Record:
        model, asked = self.model(), tasks.questions(self.set.questions)
        right = [i for i, r in enumerate(self.answered_right(model, BASE, asked)) if r]
        return {
            "asked": len(asked),
            "right": len(right),
            "kept": sorted(quality_data.some(right, self.set.kept_questions)),
            "answers": self.answers(model, BASE),
            "pairs": {"in_order": self.figures(model, [BASE], {})[0]["pairs"]["in_order"]},
        }

    def answers(self, model: QAdapterModel, blend: StreamWeights) -> list[str]:
        tokens = self.set.new_tokens
        return generate.answers(model, self.tokenizer, self.prompts, blend, tokens)

    def answered_right(
        self, model: QAdapterModel, blend: StreamWeights, questions: list[tasks.Question]
    ) -> list[bool]:
        prompts = [question.messages() for question in questions]
        texts = generate.answers(model, self.tokenizer, prompts, blend, tasks.TOKENS)
        return [tasks.right(t, q.answer) for t, q in zip(texts, questions, strict=True)]

    def figures(
        self, model: QAdapterModel, blends: list[StreamWeights], own: score.Known
    ) -> list[Record]:
        rows = self.heldout, self.unrelated
        return score.figures(model, self.tokenizer, *rows, blends, self.known, own)

    def said(self, settings: Settings) -> list[quality_data.Row]:
        """What a method takes of the base, sampled at temperature 1 and made once: answers to
        other prompts, tokenised, or anchors."""
        if tokens := settings.get("anchor_tokens"):
            return self._sampled("anchors", tokens, settings["anchor_count"])
        if tokens := settings.get("replay_tokens"):
            prompts = quality_data.some(self.replay_prompts, self.set.pairs)
            made = self._sampled("replay", tokens, len(prompts), prompts)
            return [row for text in made for row in self._replayed(text)]
        return []

    def _sampled(self, name: str, tokens: int, count: int, prompts: Any = None) -> list[Record]:
        path, of_base = self.output / f"{name}-{tokens}.jsonl", (self.model(), self.tokenizer)
        options: Record = {"path": path, "prompts": prompts, "progress": False}
        return make_anchors(*of_base, count, max_new_tokens=tokens, **options)

    def _replayed(self, text: quality_data.Row) -> list[quality_data.Row]:
        """Tokenised; none if too long. A cut answer is without the end that the template writes."""
        *prompt, answer = text["messages"]
        pair = {"prompt": prompt, "chosen": [answer], "rejected": [answer]}
        length, eos = self.limits
        try:
            row = tokenize_preference(pair, self.tokenizer, max_length=length, eos_token_ids=eos)
        except PromptTooLongError:
            return []
        if text["truncated"] and not row["chosen_truncated"]:
            row |= {"chosen_ids": row["chosen_ids"][:-1], "chosen_truncated": True}
        return [row]

    def settings(self, run: Run) -> Settings:
        return run.settings(self.set.usual)

    def file(self, run: Run, name: str) -> Path:
        return self.output / "runs" / run.name / name

    def done(self, run: Run, name: str = "result.json") -> Record | None:
        """What is there of a run with these settings."""
        path = self.file(run, name)
        record = files.read_json(path) if path.exists() else None
        same = record and record["settings_digest"] == digest(self.settings(run))
        return record if same else None


def run_one(study: Study, run: Run, answered: bool, tell: Tell) -> Record:
    """Train if need be, then measure; ``answered`` also makes answers."""
    record = study.done(run)
    if record is not None and (record["answered"] or not answered):
        return record
    settings = study.settings(run)
    record = {
        "name": run.name,
        "variant": run.variant,
        **asdict(run),
        "changes": dict(run.changes),
        "settings": settings,
        "settings_digest": digest(settings),
        "answered": answered,
        "training": study.done(run, "training.json") or _trained(study, run, tell),
        "points": _measured(study, run, answered, tell),
    }
    files.write_json(study.file(run, "result.json"), record)
    return record


def _trained(study: Study, run: Run, tell: Tell) -> Record:
    settings = study.settings(run)
    said = study.said(settings)
    rows = quality_data.some(study.data.train, settings["pairs"], run.seed)
    # The model for measuring would be in the memory figures of what trains.
    scoring_model.cache_clear()
    weights, cost = train(
        run.method,
        settings,
        study.base,
        study.tokenizer,
        quality_data.flipped(rows, run.noise, run.seed),
        _checkpoints(study, run),
        said,
        lambda step: tell(f"step {step}/{settings['steps']}"),
        str(study.output / "base-cache"),
        # Whose cost is shown pays for its base passes.
        study.set.precompute or bool(run.noise or run.changes),
    )
    for step, values in weights.items():
        with files.replacing_file(study.file(run, f"step-{step}.safetensors")) as temporary:
            save_file({k: v.contiguous() for k, v in values.items()}, temporary)
    record = {"settings_digest": digest(settings), **cost}
    files.write_json(study.file(run, "training.json"), record)
    return record


def _checkpoints(study: Study, run: Run) -> list[int]:
    last, shares = study.settings(run)["steps"], study.set.checkpoints if run.is_main else ()
    return sorted({max(1, round(share * last)) for share in shares} - {last})


class Point(NamedTuple):
    """Where a run is measured."""

    step: int
    label: str
    blend: StreamWeights
    answered: bool


def _points(study: Study, run: Run) -> list[Point]:
    settings = study.settings(run)
    last, own = settings["steps"], score.trained(**composition(settings))
    answered = study.set.answered_strengths if run.method == "qadapter" else ()
    blends = {s: score.strength(s) for s in study.set.strengths}
    return [
        Point(last, TRAINED, own, True),
        *(Point(last, f"strength {s:g}", b, s in answered) for s, b in blends.items() if b != own),
        *(Point(s, f"step {s}", own, run.method == "sft") for s in _checkpoints(study, run)),
    ]


def _measured(study: Study, run: Run, answered: bool, tell: Tell) -> list[Record]:
    """The points of a run; those of one step are scored in one pass."""
    model, made = study.model(study.settings(run)), []

    def measure(points: list[Point], own: score.Known) -> None:
        if not points:
            return
        figures = study.figures(model, [point.blend for point in points], own)
        for point, scored in zip(points, figures, strict=True):
            record = {**point._asdict(), "blend": list(point.blend), **scored}
            record["answered"] = answered and point.answered
            if record["answered"]:
                tell(f"answering, {point.label}")
                record |= _answered(study, model, point.blend)
            made.append(record)

    for step, group in itertools.groupby(_points(study, run), lambda point: point.step):
        weights = load_file(study.file(run, f"step-{step}.safetensors"))
        loaded = set_peft_model_state_dict(model.peft_model, weights)
        if loaded.unexpected_keys:
            raise ValueError(f"step {step}: unknown weights {loaded.unexpected_keys[:2]}")
        tell(f"scoring step {step}")
        own: score.Known = {}
        measure(list(group), own)
        if step == study.settings(run)["steps"] and answered:
            measure(_at_kls(study, step, made), own)
    return made


def _at_kls(study: Study, step: int, made: list[Record]) -> list[Point]:
    """At the strengths where KL is what the set says, read off between those that are measured;
    none where it is beyond them."""
    scored = [r for r in made if r["step"] == step and abs(sum(r["blend"]) - 1) < 1e-9]
    strengths = [record["blend"][0] for record in scored]
    sums = [[sum(record["unrelated"][of]) for of in ("kl", "tokens")] for record in scored]
    roots = [max(kl / tokens, 0.0) ** 0.5 for kl, tokens in sums]
    reached = [kl for kl in study.set.answered_kls if kl**0.5 <= max(roots)]
    found = [_strength_at(kl**0.5, [0.0, *roots], [0.0, *strengths]) for kl in reached]
    return [
        Point(step, f"KL {kl:g}", score.strength(round(s, 3)), True)
        for kl, s in zip(reached, found, strict=True)
    ]


def _strength_at(root: float, roots: list[float], strengths: list[float]) -> float:
    order = np.argsort(strengths)
    return float(np.interp(root, np.array(roots)[order], np.array(strengths)[order]))


def _answered(study: Study, model: QAdapterModel, blend: StreamWeights) -> Record:
    texts, base = study.answers(model, blend), study.base_record["answers"]
    figures: Record = {
        "words": [len(text.split()) for text in texts],
        "wins": {made.name: made.share_won(texts, base) for made in study.judges},
    }
    if study.data.rule is not None:
        figures["follows"] = [float(study.data.rule(text)) for text in texts]
    right = study.answered_right(model, blend, study.questions)
    figures["questions"] = {"right": [float(r) for r in right]}
    return {"answers": texts, "figures": figures}


def run_all(study: Study, runs: list[Run], answered: bool = True) -> list[Record]:
    """Results of all runs, under a progress bar."""
    results = []
    with tqdm(runs, desc="runs") as bar:
        for run in bar:
            bar.set_description(run.name)
            # Of noise the held-out pairs and KL tell, in half the time.
            asked = answered and not run.noise
            results.append(run_one(study, run, asked, bar.set_postfix_str))
    return results
