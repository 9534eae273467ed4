"""Runs, one folder each: train, keep the LoRAs, measure; what is done is not done again.

<output>/study.json                 data, set and base that everything here belongs to
<output>/base.json                  the base's own figures
<output>/runs/<name>/training.json  cost and log; step-<n>.safetensors beside it
<output>/runs/<name>/result.json    the figures, item by item
"""

import itertools
import json
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from peft import set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from tqdm.auto import tqdm
from transformers import AutoTokenizer

from benchmarks import recording
from benchmarks.quality import data as quality_data
from benchmarks.quality import generate, judge, score, tasks
from benchmarks.quality.settings import Run, Set, Settings, digest
from benchmarks.quality.train import DEVICE, MissingMethodError, composition, new_model, train
from qadapter import QAdapterModel, files
from qadapter.composition import StreamWeights
from qadapter.model.checkpoint import resolve_model
from qadapter.text.tokenization import eos_token_ids

BASE = StreamWeights(0.0, 1.0)
TRAINED = "trained"
# A study can go on with more of them.
MORE_RUNS = ("seeds", "noise", "noisy_methods", "betas", "rates")
Record = dict[str, Any]
Tell = Callable[[str], Any]


def cached(path: Path, make: Callable[[], Any]) -> Any:
    """What the file holds; made if there is none."""
    if not path.exists():
        files.write_json(path, make())
    return files.read_json(path)


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
        self.base_name, self.base = base, resolve_model(base)
        self.judge_names, self.missing_judges = judge.split_names(judges)
        self.tokenizer = AutoTokenizer.from_pretrained(self.base)
        self.about = self._checked_about()
        self.model: QAdapterModel | None = None
        self.shape = ""
        self.eos = eos_token_ids(self.scoring_model(chosen.usual), self.tokenizer)
        self.heldout_rows = quality_data.some(data.heldout, chosen.heldout)
        answered = quality_data.some(self.heldout_rows, chosen.prompts)
        self.prompts = [row["prompt"] for row in answered]
        measured, self.replay_prompts = quality_data.unrelated_and_replay(data, chosen.unrelated)
        self.heldout, self.unrelated = self._tokens(self.heldout_rows), self._tokens(measured)
        self._hidden: dict[str, dict[int, Any]] = defaultdict(dict)  # of the base, while measuring
        self.base_record: Record = cached(self.output / "base.json", self._asked_base)
        asked = tasks.questions(chosen.questions)
        self.questions = [asked[i] for i in self.base_record["kept"]]

    def _checked_about(self) -> Record:
        """What the folder was made with; ValueError where that is something else."""
        what = {
            "set": {k: v for k, v in asdict(self.set).items() if k not in MORE_RUNS},
            "data": {"name": self.data.name, "files": self.data.files},
            "base": self.base_name,
            "judges": self.judge_names,
        }
        what = json.loads(json.dumps(what))  # as it comes back from the file
        path = self.output / "study.json"
        about = cached(path, lambda: {"what": what, "environment": recording.environment(DEVICE)})
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
        return [judge.make_judge(name, pairs, heldout) for name in self.judge_names]

    def judge_reports(self) -> list[Record]:
        return cached(self.output / "judges.json", lambda: [made.report for made in self.judges])

    def _tokens(self, rows: list[quality_data.Row]) -> list[quality_data.Row]:
        length = self.set.usual["max_length"]
        return quality_data.tokenised(rows, self.tokenizer, length, self.eos)

    def scoring_model(self, settings: Settings) -> QAdapterModel:
        """One model for all measuring; made anew where the LoRA has another shape."""
        shape = f"{settings['lora_r']} {settings['lora_targets']}"
        if self.model is None or self.shape != shape:
            self.model = None
            self.model, self.shape = new_model(self.base, {**settings, "seed": 0}), shape
        return self.model

    def _answers(self, model: QAdapterModel, blend: StreamWeights) -> list[str]:
        tokens = self.set.new_tokens
        return generate.answers(model, self.tokenizer, self.prompts, blend, tokens)

    # The base.

    def _asked_base(self) -> Record:
        model = self.scoring_model(self.set.usual)
        asked = tasks.questions(self.set.questions)
        texts = generate.ask(model, self.tokenizer, asked, BASE)
        right = [i for i, q in enumerate(asked) if tasks.right(texts[i], q.answer)]
        return {
            "asked": len(asked),
            "right": len(right),
            "kept": sorted(quality_data.some(right, self.set.kept_questions)),
            "answers": self._answers(model, BASE),
            "pairs": {"in_order": self._pairs(model, [BASE])[0]["in_order"]},
        }

    def replay(self, new_tokens: int) -> list[quality_data.Row]:
        """Prompts with the base's greedy answers, tokenised; made once."""

        def answered() -> list[quality_data.Row]:
            prompts = quality_data.some(self.replay_prompts, self.set.pairs)
            model = self.scoring_model(self.set.usual)
            texts = generate.answers(model, self.tokenizer, prompts, BASE, new_tokens)
            answers = [[{"role": "assistant", "content": text}] for text in texts]
            rows = zip(prompts, answers, texts, strict=True)
            return [{"prompt": p, "chosen": a, "rejected": a} for p, a, text in rows if text]

        return self._tokens(cached(self.output / f"replay-{new_tokens}.json", answered))

    # A run.

    def folder(self, run: Run) -> Path:
        return self.output / "runs" / run.name

    def result(self, run: Run) -> Record | None:
        return self._done(run, "result.json")

    def _done(self, run: Run, name: str) -> Record | None:
        """What is there of a run with these settings."""
        path = self.folder(run) / name
        if not path.exists():
            return None
        record = files.read_json(path)
        same = record["settings_digest"] == digest(run.settings(self.set.usual))
        return record if same else None

    def run(self, run: Run, answered: bool = True, tell: Tell = lambda text: None) -> Record:
        """Train if need be, then measure; ``answered`` also makes answers."""
        record = self.result(run)
        if record is not None and (record["answered"] or not answered):
            return record
        settings = run.settings(self.set.usual)
        training = self._done(run, "training.json") or self._trained(run, settings, tell)
        record = {
            "name": run.name,
            "variant": run.variant,
            **asdict(run),
            "changes": dict(run.changes),
            "settings": settings,
            "settings_digest": digest(settings),
            "answered": answered,
            "training": training,
            "points": self._measured(run, settings, answered, tell),
        }
        files.write_json(self.folder(run) / "result.json", record)
        return record

    def _trained(self, run: Run, settings: Settings, tell: Tell) -> Record:
        replay = self.replay(settings["replay_tokens"]) if run.method == "replay" else []
        rows = quality_data.some(self.data.train, settings["pairs"], run.seed)
        rows = quality_data.flipped(rows, run.noise, run.seed)
        # The model for measuring would be in the memory figures of what trains.
        self.model = None
        made = train(
            run.method,
            settings,
            self.base,
            self.tokenizer,
            rows,
            self._checkpoints(run),
            replay,
            lambda step: tell(f"step {step}/{settings['steps']}"),
            # Whose cost is shown pays for its base passes.
            str(self.output / "base-cache") if run.noise or run.changes else None,
        )
        for step, weights in made.weights.items():
            with files.replacing_file(self._weights(run, step)) as temporary:
                save_file({k: v.contiguous() for k, v in weights.items()}, temporary)
        cost = {name: value for name, value in vars(made).items() if name != "weights"}
        record = {"settings_digest": digest(settings), **cost}
        files.write_json(self.folder(run) / "training.json", record)
        return record

    def _weights(self, run: Run, step: int) -> Path:
        return self.folder(run) / f"step-{step}.safetensors"

    def _checkpoints(self, run: Run) -> list[int]:
        if not run.is_main:
            return []
        last = run.settings(self.set.usual)["steps"]
        return sorted({max(1, round(share * last)) for share in self.set.checkpoints} - {last})

    def _points(self, run: Run, settings: Settings) -> list[tuple[int, str, StreamWeights, bool]]:
        """Where a run is measured: (step, label, blend, whether it answers)."""
        last, own = settings["steps"], score.trained(**composition(run.method, settings))
        answered = self.set.answered_strengths if run.method == "qadapter" else ()
        return [
            (last, TRAINED, own, True),
            *(
                (last, f"strength {s:g}", score.strength(s), s in answered)
                for s in self.set.strengths
                if score.strength(s) != own
            ),
            *((step, f"step {step}", own, run.method == "sft") for step in self._checkpoints(run)),
        ]

    def _measured(self, run: Run, settings: Settings, answered: bool, tell: Tell) -> list[Record]:
        """The points of a run; those of one step are scored in one pass."""
        model, made = self.scoring_model(settings), []
        for step, found in itertools.groupby(self._points(run, settings), lambda point: point[0]):
            points = list(found)
            blends = [blend for _, _, blend, _ in points]
            weights = load_file(self._weights(run, step))
            loaded = set_peft_model_state_dict(model.peft_model, weights)
            if loaded.unexpected_keys:
                raise ValueError(f"step {step}: unknown weights {loaded.unexpected_keys[:2]}")
            tell(f"scoring step {step}")
            figures = self._pairs(model, blends), self._conversations(model, blends)
            for (_, label, blend, asked), pairs, unrelated in zip(points, *figures, strict=True):
                point = {"step": step, "label": label, "blend": list(blend)}
                point |= {"answered": answered and asked, "pairs": pairs, "unrelated": unrelated}
                if point["answered"]:
                    tell(f"answering, {label}")
                    point |= self._answered(model, blend)
                made.append(point)
        return made

    def _scored(
        self, model: QAdapterModel, blends: Sequence[StreamWeights], what: str
    ) -> dict[str, Any]:
        """Of chosen, rejected or unrelated responses: fields of `score.score`, blends first."""
        rows, column = (self.heldout, what) if what != "unrelated" else (self.unrelated, "chosen")
        cache = self._hidden[what]
        made = score.score(model, self.tokenizer, rows, column, blends, base_cache=cache)
        return {name: np.array([row[name] for row in made]).T for name in made[0]}

    def _pairs(self, model: QAdapterModel, blends: Sequence[StreamWeights]) -> list[Record]:
        """Per blend and held-out pair: gain, and that of the chosen alone, in nats, and whether
        the mean log-likelihoods of the two responses are in order."""
        c, r = (self._scored(model, blends, what) for what in ("chosen", "rejected"))
        chosen, rejected = (side["policy_logp"] - side["base_logp"] for side in (c, r))
        means = [side["policy_logp"] / side["tokens"] for side in (c, r)]
        in_order = (means[0] > means[1]).astype(float)
        figures = {"gain": chosen - rejected, "in_order": in_order, "chosen": chosen}
        return _by_blend(figures)

    def _conversations(self, model: QAdapterModel, blends: Sequence[StreamWeights]) -> list[Record]:
        """Per blend and unrelated conversation: its tokens, sums over them in nats."""
        made = self._scored(model, blends, "unrelated")
        change = made["base_logp"] - made["policy_logp"]
        tokens = np.broadcast_to(made["tokens"], change.shape)
        return _by_blend({"tokens": tokens, "kl": made["kl"], "nll_change": change})

    def _answered(self, model: QAdapterModel, blend: StreamWeights) -> Record:
        texts = self._answers(model, blend)
        base = self.base_record["answers"]
        figures: Record = {
            "words": [len(text.split()) for text in texts],
            "wins": {j.name: j.share_won(texts, base) for j in self.judges},
        }
        if self.data.rule is not None:
            figures["follows"] = [float(self.data.rule(text)) for text in texts]
        said = generate.ask(model, self.tokenizer, self.questions, blend)
        wanted = [question.answer for question in self.questions]
        figures["questions"] = {
            "right": [float(t) for t in map(tasks.right, said, wanted)],
            "contained": [float(t) for t in map(tasks.contained, said, wanted)],
        }
        return {"answers": texts, "figures": figures}


def _by_blend(figures: dict[str, Any]) -> list[Record]:
    """A record a blend of [blends, items]."""
    rounded = {
        name: [[round(v, 5) for v in items] for items in values.tolist()]
        for name, values in figures.items()
    }
    count = len(next(iter(rounded.values())))
    return [{name: values[i] for name, values in rounded.items()} for i in range(count)]


def run_all(
    study: Study, runs: list[Run], answered: bool = True
) -> tuple[list[Record], dict[str, str]]:
    """Results of all runs, and of methods that cannot run here why; a progress bar."""
    results, missing = [], {}
    with tqdm(total=len(runs), desc="runs") as bar:
        for run in runs:
            bar.set_description(run.name)
            if run.method not in missing:
                try:
                    # Of noise the held-out pairs and KL tell, in half the time.
                    asked = answered and not run.noise
                    results.append(study.run(run, asked, bar.set_postfix_str))
                except MissingMethodError as error:
                    missing[run.method] = str(error)
                    bar.write(f"{run.method} is left out: {error}")
            bar.update()
    return results, missing
