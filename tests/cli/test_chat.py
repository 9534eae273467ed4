"""``qadapter chat`` answers piped lines as the policy does; bad lines and Ctrl-C do not end it."""

import io
import signal

import pytest

from qadapter import QAdapterModel
from qadapter.cli import main
from qadapter.text import answers
from qadapter.text.prompts import encode_prompts
from tests.tiny_models import save_two_adapters


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny_tokenizer):
    return save_two_adapters(tmp_path_factory.mktemp("models"), tiny_tokenizer)


@pytest.fixture
def talk(folder, monkeypatch, capsys):
    """Pipe lines in; returns what was printed after each of them."""

    def call(*lines, options=(), adapter=None):
        monkeypatch.setenv("COLUMNS", "90")
        monkeypatch.setattr("sys.stdin", io.StringIO("".join(line + "\n" for line in lines)))
        command = ["chat", "--adapter", *([str(folder / "one")] if adapter is None else adapter)]
        common = ("--max-new-tokens", "8", "--temperature", "0")
        capsys.readouterr()
        assert main([*command, *common, *options]) == 0
        out = capsys.readouterr().out
        parts = []
        for line in lines:
            before, found, out = out.partition(f"> {line}\n")
            assert found, line
            parts.append(before)
        return [*parts, out]

    return call


def said(part):
    """The answer, without notes in brackets."""
    return "\n".join(line for line in part.splitlines() if not line.startswith("(")).strip()


def expected(folder, tokenizer, messages, system=None, **arguments):
    model = QAdapterModel.from_pretrained(folder / "one")
    inputs = encode_prompts(tokenizer, [messages], system)
    ids = model.generate(**inputs, max_new_tokens=8, do_sample=False, **arguments)
    new = ids[0, inputs["input_ids"].shape[1] :]
    return tokenizer.decode(new, skip_special_tokens=True).strip()


def user(text):
    return {"role": "user", "content": text}


def test_the_conversation_is_kept(talk, folder, tiny_tokenizer):
    parts = talk("a cat", "a dog", options=("--strength", "0.5"))
    first = expected(folder, tiny_tokenizer, [user("a cat")], strength=0.5)
    assert said(parts[1]) == first
    turns = [user("a cat"), {"role": "assistant", "content": first}, user("a dog")]
    assert said(parts[2]) == expected(folder, tiny_tokenizer, turns, strength=0.5)
    assert said(parts[2]) != expected(folder, tiny_tokenizer, [user("a dog")], strength=0.5)


def test_commands_change_what_comes(talk, folder, tiny_tokenizer):
    parts = talk(
        "a cat", "/strength 3", "/retry", "/system short", "/reset", "a cat", "/system none",
        "/strength trained", "/retry", "//a cat",
    )  # fmt: skip
    one = [user("a cat")]
    assert said(parts[1]) == expected(folder, tiny_tokenizer, one)
    assert "strength 3" in parts[2]
    assert said(parts[3]) == expected(folder, tiny_tokenizer, one, strength=3.0)
    assert said(parts[6]) == expected(folder, tiny_tokenizer, one, "short", strength=3.0)
    assert "system message: none" in parts[7] and "as trained" in parts[8]
    assert said(parts[9]) == said(parts[1])


def test_compare(talk, folder, tiny_tokenizer):
    parts = talk("a cat", "/strength 2", "/compare", "/compare 0 0.5 1", "a dog")
    one = [user("a cat")]
    for part, strengths in ((parts[3], (0, 2)), (parts[4], (0, 0.5, 1))):
        head, rule, *lines = part.splitlines()
        titles = [title.strip() for title in head.split(" | ")]
        assert titles == [f"strength {s:g}" for s in strengths]
        assert all(len(line) <= 90 for line in [rule, *lines])
        for i, strength in enumerate(strengths):
            column = " ".join(line.split(" | ")[i] for line in lines if line.count("|") >= i)
            want = expected(folder, tiny_tokenizer, one, strength=strength)
            assert column.split() == want.split()
    # The comparison is no part of the conversation.
    turns = [*one, {"role": "assistant", "content": said(parts[1])}, user("a dog")]
    assert said(parts[5]) == expected(folder, tiny_tokenizer, turns, strength=2.0)


@pytest.mark.parametrize("options", [(), ("--strength", "0")])
def test_compare_with_what_was_trained(talk, folder, tiny_tokenizer, options):
    parts = talk("a cat", "/both", options=options)
    head, _, *lines = parts[2].splitlines()
    assert head.split(" | ")[1].strip() == "as trained"
    column = " ".join(line.split(" | ")[1] for line in lines if "|" in line)
    assert column.split() == expected(folder, tiny_tokenizer, [user("a cat")]).split()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("/nothing", "unknown command /nothing"),
        ("/strength -1", "/strength: expected 0"),
        ("/strength much", "/strength: expected a number, got 'much'"),
        ("/temperature -1", "/temperature: expected 0"),
        ("/weights formal=1", "no adapter 'formal'; known are default"),
        ("/compare 0 x", "/compare: expected a number, got 'x'"),
        ("/retry", "no message to answer yet"),
        ("/compare", "no message to answer yet"),
        ("the " * 250, "more than the model's 256 positions"),
    ],
)
def test_errors_do_not_end_the_chat(talk, folder, tiny_tokenizer, line, message):
    parts = talk(line.strip(), "a cat")
    assert message in parts[1] and parts[1].startswith("(")
    assert said(parts[2]) == expected(folder, tiny_tokenizer, [user("a cat")])


def test_help_and_quit(talk):
    parts = talk("/help", "/quit")
    for name in (
        "strength",
        "weights",
        "both",
        "compare",
        "temperature",
        "system",
        "retry",
        "reset",
    ):
        assert f"/{name}" in parts[1]
    assert parts[2] == ""


def test_old_turns_go_where_the_model_ends(talk, folder, tiny_tokenizer):
    long = ("the cat " * 60).strip()
    parts = talk(long, long.replace("cat", "dog"), "a cat")
    assert "outgrew" not in parts[1] and "outgrew" in parts[2]
    alone = expected(folder, tiny_tokenizer, [user(long.replace("cat", "dog"))])
    assert said(parts[2]) == alone


def test_nothing_is_forgotten_for_a_message_that_is_too_long(talk, folder, tiny_tokenizer):
    parts = talk("a cat", ("the " * 250).strip(), "a dog")
    assert "more than the model's 256 positions" in parts[2]
    assert "outgrew" not in parts[2] + parts[3]
    turns = [user("a cat"), {"role": "assistant", "content": said(parts[1])}, user("a dog")]
    assert said(parts[3]) == expected(folder, tiny_tokenizer, turns)


def test_draws(talk):
    sampled = ("--temperature", "1.5", "--top-p", "1", "--seed", "5")
    first = talk("a cat", "/retry", "/retry", options=sampled)
    assert first == talk("a cat", "/retry", "/retry", options=sampled)
    assert len(set(map(said, first[1:]))) > 1
    other = ("--temperature", "1.5", "--top-p", "1", "--seed", "6")
    assert first != talk("a cat", "/retry", "/retry", options=other)


def test_interrupt_stops_the_answer_alone(talk, folder, tiny_tokenizer, monkeypatch):
    pressed = []

    class Pressing(answers.Printer):
        def put(self, value):
            super().put(value)
            if not pressed and len(self.token_cache) == 3:
                pressed.append(True)
                signal.raise_signal(signal.SIGINT)  # os.kill may wake another thread, later

    monkeypatch.setattr(answers, "Printer", Pressing)
    handler = signal.getsignal(signal.SIGINT)
    parts = talk("a cat", "/retry")
    whole = expected(folder, tiny_tokenizer, [user("a cat")])
    assert pressed and "(stopped)" in parts[1]
    assert len(said(parts[1]).split()) < len(whole.split())
    assert whole.startswith(said(parts[1]))
    assert said(parts[2]) == whole
    assert signal.getsignal(signal.SIGINT) is handler


def test_without_a_chat_template(talk, folder, tiny_tokenizer, tmp_path):
    import shutil

    shutil.copytree(folder / "one", tmp_path / "plain")
    plain = tiny_tokenizer.__class__.from_pretrained(folder / "base")
    plain.chat_template = None
    plain.save_pretrained(tmp_path / "plain")
    parts = talk("a cat", "a dog", adapter=[str(tmp_path / "plain")])
    assert "no chat template" in parts[0]
    first = expected(folder, plain, "a cat")
    assert said(parts[1]) == first
    assert said(parts[2]) == expected(folder, plain, f"a cat\n{first}\na dog")


def test_several_adapters(talk, folder):
    both = [f"one={folder / 'one'}", "--adapter", f"two={folder / 'two'}"]
    parts = talk("a cat", "/weights two=0", "/retry", adapter=both)
    alone = talk("a cat")
    assert "weights one=1 two=0" in parts[2]
    assert said(parts[3]) == said(alone[1])
    assert said(parts[1]) != said(alone[1])
