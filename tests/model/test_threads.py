"""Several threads share a model: each gets what it gets alone; a step may call the model again."""

import copy
import threading

import pytest
import torch
from peft import LoraConfig
from transformers import LogitsProcessor, StoppingCriteria

from qadapter import QAdapterModel
from tests.tiny_models import make_base, make_model, perturb

GENERATOR = torch.Generator().manual_seed(4)
PROMPTS = [torch.randint(3, 97, (1 + i % 2, 4 + i), generator=GENERATOR) for i in range(4)]
STRENGTHS = [0.5, 0.0, 1.0, 2.0]
GREEDY = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None}


def in_threads(*functions):
    """What the functions return, run at the same time; their errors are raised."""
    results, errors = [None] * len(functions), []
    ready = threading.Barrier(len(functions))

    def work(i):
        try:
            ready.wait()
            results[i] = functions[i]()
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(functions))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return results


@pytest.mark.parametrize("dora", [False, True], ids=["one pass", "a pass a stream"])
def test_texts_are_those_of_one_call_after_the_other(dora):
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], use_dora=dora)
    model = perturb(QAdapterModel.from_base(make_base(), lora_config=config))

    def text(i):
        return model.generate(PROMPTS[i], strength=STRENGTHS[i], max_new_tokens=10, **GREEDY)

    want = [text(i) for i in range(4)]
    for _ in range(3):
        got = in_threads(*(lambda i=i: text(i) for i in range(4)))
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def gradients(model, ids):
    model.train()
    model.zero_grad()
    logits = model(ids)
    (logits.q_logits - logits.base_logits).square().mean().backward()
    found = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    return logits.base_logits.detach(), found


@pytest.mark.parametrize("checkpointing", [False, True])
def test_training_beside_a_thread_that_samples(checkpointing):
    model = make_model()
    if checkpointing:
        model.gradient_checkpointing_enable()

    def text():
        return model.generate(PROMPTS[0], strength=0.5, max_new_tokens=12, **GREEDY)

    def train():
        return [gradients(model, PROMPTS[3]) for _ in range(6)]

    want_text, want = text(), train()[0]
    texts, trained = in_threads(lambda: [text() for _ in range(6)], train)
    assert all(torch.equal(got, want_text) for got in texts)
    for base_logits, found in trained:
        assert torch.equal(base_logits, want[0])
        assert all(torch.equal(a, b) for a, b in zip(found, want[1], strict=True))


def test_backward_waits_for_the_lock_where_layers_run_again():
    """Gradient checkpointing recomputes in backward, when another thread may hold the model."""
    model = make_model()
    model.gradient_checkpointing_enable()
    model.train()
    loss = model(PROMPTS[3]).q_logits.square().mean()
    off, done = threading.Event(), threading.Event()

    def hold():
        with model.adapter_off():
            off.set()
            done.wait(0.5)  # as long as backward waits, it is not done

    thread = threading.Thread(target=hold)
    thread.start()
    off.wait()
    loss.backward()
    done.set()
    thread.join()
    got = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    model(PROMPTS[3]).q_logits.square().mean().backward()
    want = [p.grad for p in model.parameters() if p.grad is not None]
    assert len(got) == len(want) > 0
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_training_mode_waits_while_another_thread_samples():
    """LoRA's dropout must not come on in the middle of a text."""
    # DoRA runs by PEFT's own layers, which have the dropout.
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], lora_dropout=0.5, use_dora=True)
    model = perturb(QAdapterModel.from_base(make_base(), lora_config=config))
    want = model.generate(PROMPTS[0], strength=1.0, max_new_tokens=10, **GREEDY)

    class Switches(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            thread = threading.Thread(target=model.train)
            thread.start()
            thread.join(0.02)
            return torch.zeros(len(input_ids), dtype=torch.bool)

    options = {"max_new_tokens": 10, **GREEDY, "stopping_criteria": [Switches()]}
    assert torch.equal(model.generate(PROMPTS[0], strength=1.0, **options), want)


def test_two_models_around_one_base_take_turns():
    base = make_model()
    other = QAdapterModel(base.peft_model)
    want = base.generate(PROMPTS[1], strength=0.5, max_new_tokens=10, **GREEDY)
    got = in_threads(
        *(
            lambda m=m: m.generate(PROMPTS[1], strength=0.5, max_new_tokens=10, **GREEDY)
            for m in (base, other, base, other)
        )
    )
    assert all(torch.equal(one, want) for one in got)


def test_a_copy_of_a_model_has_a_lock_of_its_own():
    model = make_model()
    model(PROMPTS[0])
    twin = copy.deepcopy(model)
    with model.adapter_off():
        (logits,) = in_threads(lambda: twin(PROMPTS[0]))
    assert torch.equal(logits.q_logits, model(PROMPTS[0]).q_logits)


# Calls from inside a step.


class Calls(LogitsProcessor):
    """Calls something at every token, keeps what came, and changes nothing."""

    def __init__(self, function):
        self.function, self.seen = function, []

    def __call__(self, input_ids, scores):
        self.seen.append(self.function(input_ids))
        return scores


class Puts:
    """A streamer that does so."""

    def __init__(self, function):
        self.function, self.seen = function, []

    def put(self, value):
        self.seen.append(self.function(value))

    def end(self):
        pass


def inside(model, role, function):
    if role == "streamer":
        found = Puts(function)
        given = {"streamer": found}
    elif role == "processor":
        found = Calls(function)
        given = {"logits_processor": [found]}
    else:
        found = Calls(function)
        found.seen = []

        def criterion(input_ids, scores, **kwargs):
            found.seen.append(function(input_ids))
            return torch.zeros(len(input_ids), dtype=torch.bool)

        given = {"stopping_criteria": [criterion]}
    options = {"strength": 0.5, "max_new_tokens": 4, **GREEDY}
    text = model.generate(PROMPTS[0], **options, **given)
    assert torch.equal(text, model.generate(PROMPTS[0], **options))
    return found.seen


@pytest.mark.parametrize("role", ["processor", "criterion", "streamer"])
@pytest.mark.parametrize("layers", [None, [2]], ids=["all layers", "last layer"])
def test_a_call_inside_a_step_sees_the_ordinary_model(role, layers):
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], layers_to_transform=layers)
    model = perturb(QAdapterModel.from_base(make_base(), lora_config=config))
    for ids in (PROMPTS[0], PROMPTS[1]):  # as many rows as one stream has, and as both have
        with torch.no_grad():
            want = model.hf_model(input_ids=ids).logits
            both = model(ids)
        seen = inside(model, role, lambda _, ids=ids: model.hf_model(input_ids=ids).logits)
        assert len(seen) >= 4 and all(torch.equal(got, want) for got in seen)
        with torch.no_grad():
            seen = inside(model, role, lambda _, ids=ids: model(ids))
        assert all(torch.equal(got.base_logits, both.base_logits) for got in seen)
        assert all(torch.equal(got.q_logits, both.q_logits) for got in seen)


def test_a_text_made_inside_a_step():
    model = make_model()
    options = {"strength": 2.0, "max_new_tokens": 5, **GREEDY}
    want = model.generate(PROMPTS[2], **options)
    seen = inside(model, "processor", lambda _: model.generate(PROMPTS[2], **options))
    assert all(torch.equal(got, want) for got in seen)
