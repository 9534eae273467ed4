"""Runs, one folder each: train, keep the LoRAs, measure; what is done is not done again.

<output>/study.json                 data, set and base that everything here belongs to
<output>/base.json                  the base's own figures
<output>/runs/<name>/training.json  cost and log; step-<n>.safetensors beside it
<output>/runs/<name>/result.json    the figures, item by item
"""

from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from peft import set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from tqdm.auto import tqdm
from transformers import AutoTokenizer

from benchmarks import recording
from benchmarks.quality import data as quality_data
from benchmarks.quality import generate, judge, score, tasks
from benchmarks.quality.settings import Run, Set, Settings, digest, plain
from benchmarks.quality.train import MissingMethodError, Trained, composition, new_model, train
from qadapter import QAdapterModel, files
from qadapter.model.checkpoint import resolve_model
from qadapter.text.tokenization import eos_token_ids

BASE = score.Blend(0.0, 1.0)
TRAINED = "trained"
# A study can go on with more of them.
MORE_RUNS = ("seeds", "noise", "noisy_methods", "betas", "rates")


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
        self._check_same()
        self.model: QAdapterModel | None = None
        self.shape = ""
        self._hidden: dict[str, dict[int, Any]] = {
            name: {} for name in ("chosen", "rejected", "unrelated")
        }
        self.eos = eos_token_ids(self._model({**chosen.usual, "seed": 0}), self.tokenizer)
        self.heldout_rows = quality_data.some(data.heldout, chosen.heldout)
        self.heldout = self._tokens(self.heldout_rows)
        answered = quality_data.some(self.heldout_rows, chosen.prompts)
        self.prompts = [row["prompt"] for row in answered]
        measured, self.replay_prompts = quality_data.unrelated_and_replay(data, chosen.unrelated)
        self.unrelated = self._tokens(measured)
        self.base_record = self._base_record()

    def _check_same(self) -> None:
        what = plain(
            {
                "set": {k: v for k, v in asdict(self.set).items() if k not in MORE_RUNS},
                "data": {"name": self.data.name, "files": self.data.files},
                "base": self.base_name,
                "judges": self.judge_names,
            }
        )
        path = self.output / "study.json"
        if not path.exists():
            device = "cuda" if torch.cuda.is_available() else "cpu"
            files.write_json(path, {"what": what, "environment": recording.environment(device)})
        then = files.read_json(path)["what"]
        changed = [name for name in what if then.get(name) != what[name]]
        if changed:
            raise ValueError(
                f"{path}: made with another {' and '.join(changed)}; give another --output, or "
                "delete it"
            )

    @cached_property
    def judges(self) -> list[judge.Judge]:
        """Fitted when the first answers come."""
        pairs, heldout = (
            [(quality_data.text(row["chosen"]), quality_data.text(row["rejected"])) for row in rows]
            for rows in (self.data.train, self.heldout_rows)
        )
        return [judge.make_judge(name, pairs, heldout) for name in self.judge_names]

    def judge_reports(self) -> list[dict[str, Any]]:
        path = self.output / "judges.json"
        if not path.exists():
            files.write_json(path, [made.report for made in self.judges])
        return files.read_json(path)

    def _tokens(self, rows: list[quality_data.Row]) -> list[quality_data.Row]:
        length = self.set.usual["max_length"]
        return quality_data.tokenised(rows, self.tokenizer, length, self.eos)

    def _model(self, settings: Settings) -> QAdapterModel:
        """One for all measuring; made anew where the LoRA has another shape."""
        shape = f"{settings['lora_r']} {settings['lora_targets']}"
        if self.model is None or self.shape != shape:
            self.model = None
            self.model, self.shape = new_model(self.base, {**settings, "seed": 0}), shape
        return self.model

    # The base.

    def _base_record(self) -> dict[str, Any]:
        path = self.output / "base.json"
        if path.exists():
            record = files.read_json(path)
        else:
            model = self._model({**self.set.usual, "seed": 0})
            asked = tasks.questions(self.set.questions)
            texts = generate.ask(model, self.tokenizer, asked, BASE)
            right = [i for i, q in enumerate(asked) if tasks.right(texts[i], q.answer)]
            kept = quality_data.some(right, self.set.kept_questions)
            answers = generate.answers(
                model, self.tokenizer, self.prompts, BASE, self.set.new_tokens
            )
            record = {"asked": len(asked), "right": len(right), "kept": sorted(kept)}
            record |= {"answers": answers, "pairs": self._pairs(model, [])}
            files.write_json(path, record)
        asked = tasks.questions(self.set.questions)
        self.questions = [asked[i] for i in record["kept"]]
        return record

    def replay(self, new_tokens: int) -> list[quality_data.Row]:
        """Prompts with the base's greedy answers, tokenised; made once."""
        path = self.output / f"replay-{new_tokens}.json"
        if path.exists():
            rows = files.read_json(path)
        else:
            prompts = quality_data.some(self.replay_prompts, self.set.pairs)
            model = self._model({**self.set.usual, "seed": 0})
            texts = generate.answers(model, self.tokenizer, prompts, BASE, new_tokens)
            answers = [[{"role": "assistant", "content": text}] for text in texts]
            rows = [
                {"prompt": p, "chosen": a, "rejected": a}
                for p, a, text in zip(prompts, answers, texts, strict=True)
                if text
            ]
            files.write_json(path, rows)
        return self._tokens(rows)

    # A run.

    def folder(self, run: Run) -> Path:
        return self.output / "runs" / run.name

    def result(self, run: Run) -> dict[str, Any] | None:
        """What is there of a run with these settings."""
        path = self.folder(run) / "result.json"
        if not path.exists():
            return None
        record = files.read_json(path)
        same = record["settings_digest"] == digest(run.settings(self.set.usual))
        return record if same else None

    def run(self, run: Run, answered: bool = True, progress: Any = None) -> dict[str, Any]:
        """Train if need be, then measure; ``answered`` also makes answers."""
        record = self.result(run)
        if record is not None and (record["answered"] or not answered):
            return record
        settings = run.settings(self.set.usual)
        told = progress or (lambda text: None)
        training = self._trained(run, settings, told)
        points = []
        for step, label, blend, with_answers in self._points(run, settings):
            told(f"measuring {label}")
            weights = load_file(self.folder(run) / f"step-{step}.safetensors")
            point = {"step": step, "label": label, "blend": list(blend)}
            points.append(point | {"answered": answered and with_answers, "weights": weights})
        self._measure(settings, points, told)
        record = {
            "name": run.name,
            "variant": run.variant,
            "method": run.method,
            "seed": run.seed,
            "noise": run.noise,
            "changes": dict(run.changes),
            "settings": settings,
            "settings_digest": digest(settings),
            "answered": answered,
            "training": training,
            "points": points,
        }
        files.write_json(self.folder(run) / "result.json", record)
        return record

    def _trained(self, run: Run, settings: Settings, told: Any) -> dict[str, Any]:
        folder, key = self.folder(run), digest(settings)
        path = folder / "training.json"
        if path.exists() and files.read_json(path)["settings_digest"] == key:
            return files.read_json(path)
        replay = self.replay(settings["replay_tokens"]) if run.method == "replay" else []
        rows = quality_data.some(self.data.train, settings["pairs"], run.seed)
        rows = quality_data.flipped(rows, run.noise, run.seed)
        # The model for measuring would be in the memory figures of what trains.
        self.model = None
        steps = settings["steps"]
        made: Trained = train(
            run.method,
            settings,
            self.base,
            self.tokenizer,
            rows,
            self._checkpoints(run, steps),
            replay,
            lambda step: told(f"step {step}/{steps}"),
            # Whose cost is shown pays for its base passes.
            str(self.output / "base-cache") if run.noise or run.changes else None,
        )
        for step, weights in made.weights.items():
            with files.replacing_file(folder / f"step-{step}.safetensors") as temporary:
                save_file({k: v.contiguous() for k, v in weights.items()}, temporary)
        record = {
            "settings_digest": key,
            "seconds": made.seconds,
            "seconds_per_pair": made.seconds_per_pair,
            "peak_mib": made.peak_mib,
            "threads": torch.get_num_threads(),
            "log": made.log,
        }
        files.write_json(path, record)
        return record

    def _checkpoints(self, run: Run, steps: int) -> list[int]:
        if not run.is_main:
            return []
        return sorted({max(1, round(share * steps)) for share in self.set.checkpoints} - {steps})

    def _points(self, run: Run, settings: Settings) -> list[tuple[int, str, score.Blend, bool]]:
        """Where a run is measured: (step, label, blend, whether it answers)."""
        last = settings["steps"]
        own = score.trained(**composition(run.method, settings))
        points = [(last, TRAINED, own, True)]
        for s in self.set.strengths:
            blend = score.strength(s)
            if blend != own:
                answers = run.method == "qadapter" and s in self.set.answered_strengths
                points.append((last, f"strength {s:g}", blend, answers))
        for step in self._checkpoints(run, last):
            points.append((step, f"step {step}", own, run.method == "sft"))
        return points

    def _measure(self, settings: Settings, points: list[dict[str, Any]], told: Any) -> None:
        """Fills the points in; those of one step are scored in one pass."""
        model = self._model(settings)
        for step in dict.fromkeys(point["step"] for point in points):
            of_step = [point for point in points if point["step"] == step]
            loaded = set_peft_model_state_dict(model.peft_model, of_step[0]["weights"])
            if loaded.unexpected_keys:
                raise ValueError(f"step {step}: unknown weights {loaded.unexpected_keys[:2]}")
            blends = [score.Blend(*point["blend"]) for point in of_step]
            told(f"scoring step {step}")
            pairs = self._pairs(model, blends)
            unrelated = score.score(
                model,
                self.tokenizer,
                self.unrelated,
                "chosen",
                blends,
                base_cache=self._hidden["unrelated"],
            )
            for i, point in enumerate(of_step):
                del point["weights"]
                point["pairs"] = _rounded(pairs["policy"][i])
                point["unrelated"] = _rounded(
                    {
                        "tokens": [row["tokens"] for row in unrelated],
                        "kl": [row["kl"][i] for row in unrelated],
                        "nll_change": [
                            row["base_logp"] - row["policy_logp"][i] for row in unrelated
                        ],
                    }
                )
                if point["answered"]:
                    told(f"answering, {point['label']}")
                    point |= self._answered(model, blends[i])

    def _pairs(self, model: QAdapterModel, blends: list[score.Blend]) -> dict[str, Any]:
        """Per held-out pair: margin and gain in nats, and whether the mean log-likelihoods of the
        two responses are in order."""
        sides = [
            score.score(
                model,
                self.tokenizer,
                self.heldout,
                column,
                blends or [BASE],
                base_cache=self._hidden[column],
            )
            for column in ("chosen", "rejected")
        ]
        policies = []
        for i, _ in enumerate(blends):
            figures: dict[str, list[float]] = {"gain": [], "in_order": [], "chosen": []}
            for c, r in zip(*sides, strict=True):
                up = [row["policy_logp"][i] - row["base_logp"] for row in (c, r)]
                means = [row["policy_logp"][i] / row["tokens"] for row in (c, r)]
                figures["gain"].append(up[0] - up[1])
                figures["chosen"].append(up[0])
                figures["in_order"].append(float(means[0] > means[1]))
            policies.append(figures)
        base = [
            float(c["base_logp"] / c["tokens"] > r["base_logp"] / r["tokens"])
            for c, r in zip(*sides, strict=True)
        ]
        return {"in_order": base, "policy": policies}

    def _answered(self, model: QAdapterModel, blend: score.Blend) -> dict[str, Any]:
        texts = generate.answers(model, self.tokenizer, self.prompts, blend, self.set.new_tokens)
        base = self.base_record["answers"]
        figures: dict[str, Any] = {
            "words": [len(text.split()) for text in texts],
            "wins": {j.name: j.share_won(texts, base) for j in self.judges},
        }
        if self.data.rule is not None:
            figures["follows"] = [float(self.data.rule(text)) for text in texts]
        said = generate.ask(model, self.tokenizer, self.questions, blend)
        wanted = [question.answer for question in self.questions]
        pairs = list(zip(said, wanted, strict=True))
        figures["questions"] = {
            "right": [float(tasks.right(text, answer)) for text, answer in pairs],
            "contained": [float(tasks.contained(text, answer)) for text, answer in pairs],
        }
        return {"answers": texts, "figures": figures}


def _rounded(figures: dict[str, list[float]]) -> dict[str, list[float]]:
    return {name: [round(value, 5) for value in values] for name, values in figures.items()}


def run_all(
    study: Study, runs: list[Run], answered: bool = True
) -> tuple[list[dict[str, Any]], dict[str, str]]:
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
