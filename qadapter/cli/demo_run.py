"""What ``qadapter demo`` does: a small real model learns one visible preference, and it is checked.

The preference: an answer opens with a summary, "In short, ...". Pairs, held-out questions and
unrelated text come with the package; whether an answer follows the preference is decided by a rule
(`qadapter.cli.demo_rule.follows`) on text that the customised model generates.
"""

import textwrap
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm
from transformers import AutoTokenizer

from qadapter import files
from qadapter.cli.demo_rule import follows
from qadapter.model.checkpoint import resolve_model
from qadapter.model.modeling import QAdapterModel
from qadapter.text.data import load_preference_data
from qadapter.text.prompts import encode_prompts
from qadapter.training import evaluation
from qadapter.training.plots import plot_training
from qadapter.training.trainer import QAdapterConfig, QAdapterTrainer

PREFERENCE = 'an answer opens with "In short, ..."'
STRENGTHS = (0.5, 1.0, 2.0)
MAX_NEW_TOKENS = 64
SHOWN = 4

RECIPE: dict[str, Any] = {
    "learning_rate": 2e-3,
    "max_steps": 30,
    "per_device_train_batch_size": 6,
    "warmup_steps": 3,
    "kl_budget": 0.02,
    "anchor_count": 96,
    "anchor_tokens": 64,
}
"""The loss is the default one, held to a budget on texts that the base makes; what else was tried,
and why it did not take, is in docs/demo.md."""


def run(output: str | Path, *, model: str = "smollm2", max_steps: int | None = None) -> dict:
    """Train, generate, measure, print; writes adapter, report.json, answers.json and training.png.

    Returns the report. Takes some minutes on two CPU cores.
    """
    output = Path(output)
    started = time.perf_counter()
    source = resolve_model(model)
    two_streams = QAdapterModel.from_pretrained(source)
    tokenizer = AutoTokenizer.from_pretrained(source)
    held_out = load_preference_data(evaluation.DEMO_DATA / "heldout.jsonl")
    train_data = load_preference_data(evaluation.DEMO_DATA / "train.jsonl")
    questions = [messages[-1]["content"] for messages in held_out["prompt"]]
    dtype = str(two_streams.hf_model.dtype).removeprefix("torch.")
    recipe = {**RECIPE, **({} if max_steps is None else {"max_steps": max_steps})}
    print(
        f"Preference: {PREFERENCE}. {len(train_data)} pairs, base {model} in {dtype}.\n"
        f"Budget: KL(base || policy) of {recipe['kl_budget']:g} nats a token, on "
        f"{recipe['anchor_count']} texts that the base makes first.\n"
    )

    trainer = QAdapterTrainer(
        two_streams,
        QAdapterConfig(
            output_dir=str(output / "adapter"),
            logging_steps=max(1, recipe["max_steps"] // 20),
            save_strategy="no",
            report_to="none",
            seed=0,
            **recipe,
        ),
        train_dataset=train_data,
        processing_class=tokenizer,
    )
    training_started = time.perf_counter()
    trainer.train()
    training_seconds = time.perf_counter() - training_started
    trainer.save_model(str(output / "adapter"))
    plot = plot_training(
        trainer.state.log_history,
        output / "training.png",
        title=f"{model}: {PREFERENCE}",
    )

    answers = {}
    for strength in tqdm((0.0, *STRENGTHS), desc="Answering by strength"):
        name = f"strength {strength:g}" if strength else "base"
        answers[name] = _answers(two_streams, tokenizer, questions, strength)
    compositions = [two_streams.composition_at(strength) for strength in STRENGTHS]
    forgetting = evaluation.forgetting_of(
        two_streams, tokenizer, evaluation.load_unrelated(), compositions
    )
    report = {
        "model": model,
        "dtype": dtype,
        "preference_text": PREFERENCE,
        "recipe": recipe,
        "questions": len(questions),
        "follows": {name: sum(map(follows, texts)) / len(texts) for name, texts in answers.items()},
        "forgetting": {
            f"strength {strength:g}": figures
            for strength, figures in zip(STRENGTHS, forgetting, strict=True)
        },
        "recommended_strength": two_streams.recommended_strength,
        "preference": evaluation.evaluate_preferences(two_streams, tokenizer, held_out),
        "training_seconds": round(training_seconds, 1),
        "total_seconds": round(time.perf_counter() - started, 1),
    }
    files.write_json(output / "report.json", report)
    files.write_json(
        output / "answers.json",
        [
            {"question": q, **{name: texts[i] for name, texts in answers.items()}}
            for i, q in enumerate(questions)
        ],
    )
    print(_side_by_side(questions[:SHOWN], answers))
    print(_summary(report))
    print(f"\nadapter {output / 'adapter'}, plot {plot or '(needs matplotlib)'}, all answers "
          f"{output / 'answers.json'}")  # fmt: skip
    print(
        f'try: qadapter generate --adapter {output / "adapter"} --strength 1 --prompt "Why is the '
        'sky blue?"'
    )
    return report


def _answers(
    model: QAdapterModel, tokenizer: Any, questions: Sequence[str], strength: float
) -> list[str]:
    """Greedy answers, all at once; at strength 0 the base's own."""
    inputs: dict[str, Any] = encode_prompts(tokenizer, questions, None, True, model.device)
    ids = model.generate(
        **inputs, strength=strength, max_new_tokens=MAX_NEW_TOKENS, do_sample=False
    )
    new = ids[:, inputs["input_ids"].shape[1] :]
    return [text.strip() for text in tokenizer.batch_decode(new, skip_special_tokens=True)]


def _side_by_side(questions: Sequence[str], answers: dict[str, list[str]]) -> str:
    lines = ["", "Held-out questions", ""]
    for i, question in enumerate(questions):
        lines.append(f"  {question}")
        for name, texts in answers.items():
            mark = "yes" if follows(texts[i]) else "no "
            text = textwrap.shorten(texts[i], 300, placeholder=" ...")
            body = textwrap.wrap(text, 78) or ["(nothing)"]
            lines.append(f"    {name:13} {mark} {body[0]}")
            lines += [" " * 22 + line for line in body[1:]]
        lines.append("")
    return "\n".join(lines)


def _summary(report: dict[str, Any]) -> str:
    lines = [
        f"Answers to {report['questions']} held-out questions, checked by rule, and forgetting on "
        "unrelated text",
        "                 follow   KL(base || policy)   change in log-likelihood",
    ]
    for name, share in report["follows"].items():
        line = f"  {name:13} {share:7.0%}"
        if name in report["forgetting"]:
            figures = report["forgetting"][name]
            line += f"   {figures['kl_base_policy']:10.4f} nats   {-figures['delta_nll']:+10.4f}"
        lines.append(line + (" nats a token" if name in report["forgetting"] else ""))
    if (found := report["recommended_strength"]) is not None:
        budget = report["recipe"]["kl_budget"]
        lines.append(f"Strength {found:.2g} keeps the budget of {budget:g} on held-out texts.")
    lines += ["", evaluation.table({"preference": report["preference"]}), ""]
    seconds = report["training_seconds"], report["total_seconds"]
    lines.append("training {:.0f} s, everything {:.0f} s".format(*seconds))
    return "\n".join(lines)
