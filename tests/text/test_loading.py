"""The same two pairs from files of every kind, and errors that name file and line."""

import bz2
import csv
import gzip
import json
import lzma

import datasets
import pyarrow
import pytest

from qadapter.text.data import load_preference_data, load_responses, prepare_dataset
from tests.text.chat_tokenizer import PAIR, TOKENIZER, assistant, user

ROWS = [
    {"prompt": "Name a colour: ", "chosen": "é, \"red\"", "rejected": "None"},
    {"prompt": "Name\na number: ", "chosen": "1", "rejected": "many\r\nnumbers"},
]  # fmt: skip


def as_lines(rows):
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def write_table(path, rows=ROWS, delimiter=","):
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter=delimiter)
        writer.writeheader()
        writer.writerows(rows)
    return path


def rows_of(*arguments, **keywords):
    return [dict(row) for row in load_preference_data(*arguments, **keywords)]


@pytest.fixture
def write(tmp_path):
    def write(name, content):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write


def zstd(data):
    return pyarrow.compress(data, codec="zstd", asbytes=True)


@pytest.mark.parametrize(
    ("suffix", "compress"),
    [("gz", gzip.compress), ("bz2", bz2.compress), ("xz", lzma.compress), ("zst", zstd)],
)
def test_compressed_files(write, suffix, compress):
    data = as_lines(ROWS)
    path = write(f"a.jsonl.{suffix}", compress(data))
    assert rows_of(path) == ROWS
    # Two pieces, one behind the other, are one file; half of one is none.
    two = compress(data[:80]) + compress(data[80:])
    assert rows_of(write(f"b.jsonl.{suffix}", two)) == ROWS
    with pytest.raises(ValueError, match=rf"c\.jsonl\.{suffix}: cannot be decompressed"):
        load_preference_data(write(f"c.jsonl.{suffix}", compress(data)[:-9]))
    with pytest.raises(ValueError, match="unknown kind of file"):
        load_preference_data(write(f"a.{suffix}", compress(data)))


def test_tables_of_text(tmp_path, write):
    table = write_table(tmp_path / "a.csv")
    assert rows_of(table) == ROWS
    assert rows_of(write("a.csv.gz", gzip.compress(table.read_bytes()))) == ROWS
    assert rows_of(write_table(tmp_path / "a.tsv", delimiter="\t")) == ROWS
    # Messages in the cells are JSON.
    cells = write_table(tmp_path / "b.csv", [{k: json.dumps(v) for k, v in PAIR.items()}])
    assert rows_of(cells) == [PAIR]
    # The lines of a file, not the number of the row: the second row begins in line 4.
    write("c.csv", "prompt,chosen,rejected\na,b,c\n\na,\"b\nb\",c\na,b\n")  # fmt: skip
    with pytest.raises(ValueError, match=r"c\.csv, line 6: expected 3 cells.*found 2"):
        load_preference_data(tmp_path / "c.csv")
    assert len(rows_of(tmp_path / "c.csv", skip_bad_rows=True)) == 2
    with pytest.raises(ValueError, match=r"d\.csv, line 2: not a table: unexpected end of data"):
        load_preference_data(write("d.csv", 'chosen,rejected\na,"b\n'))
    with pytest.raises(ValueError, match=r"line 1: a column is there twice: chosen, chosen"):
        load_preference_data(write("e.csv", "chosen,chosen\na,b\n"))


def test_other_tables(tmp_path):
    table = datasets.Dataset.from_list(ROWS)
    with datasets.arrow_writer.ArrowWriter(path=str(tmp_path / "a.arrow")) as writer:
        for row in ROWS:
            writer.write(row)
        writer.finalize()
    assert rows_of(tmp_path / "a.arrow") == ROWS
    table.to_parquet(tmp_path / "a.parquet")
    table.save_to_disk(tmp_path / "one")
    assert rows_of(tmp_path / "one", "test") == ROWS
    assert rows_of(tmp_path / "one", "train[1:]") == ROWS[1:]
    datasets.DatasetDict(train=table, test=table.select([1])).save_to_disk(tmp_path / "two")
    assert rows_of(tmp_path / "two", "test") == ROWS[1:]
    assert rows_of(tmp_path / "two", "train[:50%]+test") == ROWS
    with pytest.raises(ValueError, match=r'two: split=.*Unknown split "other"'):
        load_preference_data(tmp_path / "two", "other")
    (tmp_path / "b.parquet").write_bytes(b"PAR1")
    with pytest.raises(ValueError, match=r"b\.parquet: "):
        load_preference_data(tmp_path / "b.parquet")


def test_a_json_file_may_hold_lines(write):
    assert rows_of(write("a.json", as_lines(ROWS))) == ROWS
    assert rows_of(write("a.ndjson", as_lines(ROWS))) == ROWS
    assert rows_of(write("b.json", json.dumps(ROWS, indent=1))) == ROWS


def test_several_files(tmp_path, write, monkeypatch):
    one, two = write("part-0.jsonl", as_lines(ROWS[:1])), write("part-1.jsonl", as_lines(ROWS[1:]))
    monkeypatch.chdir(tmp_path)
    for source in ([one, two], "part-*.jsonl", str(tmp_path / "part-?.jsonl"), ["**/part-[01].*"]):
        assert rows_of(source) == ROWS
    assert rows_of(["part-1.jsonl", "part-0.jsonl"]) == ROWS[::-1]
    datasets.Dataset.from_list(ROWS).to_parquet("c.parquet")
    assert sorted(map(str, rows_of(["part-*", "c.parquet"]))) == sorted(map(str, ROWS * 2))
    assert rows_of(write("[1].jsonl", as_lines(ROWS))) == ROWS  # a name, where there is such a file
    with pytest.raises(FileNotFoundError, match=r"no file matches part-9\*"):
        load_preference_data("part-9*")
    with pytest.raises(FileNotFoundError, match=r"no such file: gone\.jsonl"):
        load_preference_data([one, "gone.jsonl"])
    with pytest.raises(ValueError, match="owner/name: among several, each must be a file"):
        load_preference_data([one, "owner/name"])
    for given in (None, 3, [{"prompt": "a"}]):
        with pytest.raises(TypeError, match="expected a file, a folder, a name on the Hub"):
            load_preference_data(given)
    with pytest.raises(ValueError, match="no files"):
        load_preference_data([])
    # What one file lacks would be filled with None.
    other = datasets.Dataset.from_list([{"question": "a", "chosen": "b", "rejected": "c"}])
    other.to_parquet("d.parquet")
    with pytest.raises(ValueError, match=r"different columns: .*question"):
        load_preference_data([one, "d.parquet"])


def test_slices_and_configurations(tmp_path, write):
    rows = [{**ROWS[0], "prompt": f"{i}"} for i in range(200)]
    path = write("a.jsonl", as_lines(rows))
    assert rows_of(path, "test") == rows  # a file has no splits
    assert rows_of(path, "train[:1%]") == rows[:2]
    assert rows_of(path, "test[-3:]") == rows[-3:]
    with pytest.raises(ValueError, match=r"a\.jsonl: split='train\[:1': Unrecognized"):
        load_preference_data(path, "train[:1")
    with pytest.raises(ValueError, match="no splits to be added"):
        load_preference_data(path, "train+test")
    with pytest.raises(ValueError, match="config='b': only a Hub data set or a folder"):
        load_preference_data(path, config="b")
    folder = tmp_path / "hub"
    folder.mkdir()
    for name, content in (("one", rows[:100]), ("two", rows[100:])):
        (folder / f"{name}.jsonl").write_bytes(as_lines(content))
    (folder / "README.md").write_text(
        "---\nconfigs:\n- config_name: one\n  data_files: one.jsonl\n"
        "- config_name: two\n  data_files:\n  - {split: dev, path: two.jsonl}\n---\n"
    )
    assert rows_of(folder, config="one") == rows[:100]
    assert rows_of(folder, "dev[:2%]", config="two") == rows[100:102]
    with pytest.raises(ValueError, match="config"):
        load_preference_data(folder)


def test_a_folder_of_files(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    write_table(folder / "train.csv")
    assert rows_of(folder) == ROWS  # with the text "None"
    (folder / "train.csv").unlink()
    (folder / "train.jsonl").write_bytes(as_lines(ROWS) + b"{oops\n")
    with pytest.raises(ValueError, match=r"data: .*With the files themselves"):
        load_preference_data(folder)


def test_rows_of_other_forms_fit_into_one_table(write, caplog):
    parts = [{"type": "text", "text": "blue"}]
    rows = [
        PAIR | {"id": 1},
        {
            "prompt": [user("what?")],
            "chosen": assistant(parts),
            "rejected": assistant("b"),
            "id": "x",
        },
        {"chosen": [user("a"), assistant("b")], "rejected": [user("a"), assistant("c")]},
        PAIR | {"tools": [{"name": "search"}]},
    ]
    table = load_preference_data(write("a.jsonl", as_lines(rows)))
    assert table[1]["chosen"] == [assistant("blue")]
    assert table[2]["prompt"] == [user("a")]
    # A column that only a later row has is there; one that nothing reads and no table holds is not.
    assert table["tools"][:] == [None, None, None, [{"name": "search"}]]
    assert "left out what does not fit into a table: id" in caplog.text
    with pytest.raises(ValueError, match=r"b\.jsonl, line 5: the row does not fit into one table"):
        load_preference_data(write("b.jsonl", as_lines([*rows, PAIR | {"tools": "[]"}, PAIR])))


def test_forms_are_said(write, caplog):
    rows = [{"conversations": [{"from": "human", "value": "a"}]}]
    rows[0] |= {"chosen": {"from": "gpt", "value": "b"}, "rejected": {"from": "gpt", "value": "c"}}
    (row,) = rows_of(write("a.jsonl", as_lines(rows)))
    assert row == {"prompt": [user("a")], "chosen": [assistant("b")], "rejected": [assistant("c")]}
    assert "a.jsonl: the columns are taken as 'conversations' as the prompt" in caplog.text
    caplog.clear()
    rows = [{"input": {"messages": [user("a")]}, "preferred_output": [assistant("b")]}]
    rows[0]["non_preferred_output"] = [assistant("c")]
    assert rows_of(write("b.jsonl", as_lines(rows))) == [row]
    assert caplog.text.count("OpenAI's preference format") == 1


def test_columns_of_other_names(tmp_path, write):
    columns = {"prompt": "ask", "chosen": "good", "rejected": "chosen"}
    rows = [{here: row[here] for here in columns} for row in ROWS]
    named = [{columns[here]: text for here, text in row.items()} | {"id": 1} for row in rows]
    expected = [{"id": 1, **row} for row in rows]
    path = write("a.jsonl", as_lines(named))
    datasets.Dataset.from_list(named).to_parquet(tmp_path / "a.parquet")
    for source in (path, tmp_path / "a.parquet"):
        assert rows_of(source, columns=columns) == expected
        with pytest.raises(
            ValueError, match="no column 'nope', which was to be 'prompt'; found: ask"
        ):
            load_preference_data(source, columns={"prompt": "nope"})
        with pytest.raises(ValueError, match="'answer' is read by nothing; known are prompt"):
            load_preference_data(source, columns={"answer": "good"})
    # Another form's name is one, too.
    rows = [{"q": "a", "system": "s", "chosen": "b", "rejected": "c"}]
    (row,) = rows_of(write("b.jsonl", as_lines(rows)), columns={"question": "q"})
    assert row["prompt"] == [{"role": "system", "content": "s"}, user("a")]


@pytest.mark.parametrize(
    ("name", "encoding", "message"),
    [
        ("a.jsonl", "latin-1", "line 1: not UTF-8: byte 0xe9.*iconv -f LATIN1"),
        ("a.json", "latin-1", "line 3: not UTF-8: byte 0xe9"),
        ("a.csv", "cp1252", "line 2: not UTF-8: byte 0xe9"),
        ("a.jsonl", "utf-16", "line 1: not UTF-8, but UTF-16.*iconv -f UTF-16"),
        ("a.json", "utf-16-be", "line 1: not UTF-8, but UTF-16"),
        ("a.csv", "utf-16-le", "line 1: not UTF-8, but UTF-16"),
    ],
)
def test_other_encodings(tmp_path, name, encoding, message):
    write_table(tmp_path / "a.csv")
    text = {
        "a.jsonl": as_lines(ROWS).decode(),
        "a.json": json.dumps(ROWS, ensure_ascii=False, indent=0).replace("{\n", "{"),
        "a.csv": (tmp_path / "a.csv").read_text(encoding="utf-8"),
    }[name]
    (tmp_path / name).write_bytes(text.encode(encoding))
    with pytest.raises(ValueError, match=rf"{name}, {message}") as error:
        load_preference_data(tmp_path / name)
    assert not isinstance(error.value, UnicodeError)


def test_half_of_a_surrogate_pair(write):
    whole = {"prompt": "a", "chosen": "b \\ud83d\\ude00", "rejected": "c"}
    lines = json.dumps(whole).replace("\\\\", "\\") + "\n"
    assert rows_of(write("a.jsonl", lines))[0]["chosen"] == "b \U0001f600"
    # Also where nothing reads it: no table holds it.
    with pytest.raises(ValueError, match=r"c\.jsonl, line 1: the row has half of a surrogate pair"):
        load_preference_data(write("c.jsonl", json.dumps({**PAIR, "id": "\ud83d"}) + "\n"))
    half = lines.replace("\\ude00", "")
    assert half != lines
    path = write("b.jsonl", lines + half)
    with pytest.raises(
        ValueError, match=r"b\.jsonl, line 2: .* half of a surrogate pair, '\\ud83d'"
    ):
        load_preference_data(path)
    assert len(rows_of(path, skip_bad_rows=True)) == 1


def test_bad_rows_are_skipped_and_counted(write, caplog):
    good = as_lines([PAIR])
    empty = as_lines([PAIR | {"chosen": []}])
    bad = [
        b"{oops\n",
        empty,
        b"[1]\n",
        b'{"chosen": "a"}\n',
        empty,
        as_lines(ROWS[:1]),
        b'"\xe9"\n',
    ]
    path = write("a.jsonl", good + b"".join(bad) + good)
    with pytest.raises(ValueError, match=r"a\.jsonl, line 2: not valid JSON"):
        load_preference_data(path)
    assert rows_of(path, skip_bad_rows=True) == [PAIR, PAIR]
    assert len(caplog.records) == 1
    for words in (
        "Skipped 7 of 9 rows", "2 x 'chosen' is empty", "1 x not valid JSON", "1 x not UTF-8",
        "1 x expected an object, found list", "1 x missing column(s) rejected",
        "1 x strings in a file of message lists", "The first: ", "line 2: not valid JSON",
        "line 3: 'chosen' is empty", "line 4: ",
    ):  # fmt: skip
        assert words in caplog.text
    assert "line 5" not in caplog.text  # the first few
    with pytest.raises(ValueError, match=r"b\.jsonl: no rows left: 1 x not valid JSON"):
        load_preference_data(write("b.jsonl", "{oops\n"), skip_bad_rows=True)


@pytest.mark.parametrize("num_proc", [None, 2])
def test_bad_rows_of_a_data_set(num_proc, caplog):
    rows = [
        PAIR,
        PAIR | {"chosen": [assistant("")]},
        PAIR | {"prompt": [user("hello " * 90)]},
        PAIR,
    ]
    table = datasets.Dataset.from_list(rows)
    with pytest.raises(ValueError, match="row 1: 'chosen' is empty"):
        prepare_dataset(table, TOKENIZER, max_length=60, num_proc=num_proc)
    keywords = {"max_length": 60, "num_proc": num_proc, "skip_bad_rows": True}
    prepared = prepare_dataset(table, TOKENIZER, **keywords)
    assert prepared[:] == prepare_dataset(table.select([0, 3]), TOKENIZER)[:]
    assert "Dropped 1 of 4 pairs: prompt of 60 tokens or more." in caplog.text
    assert (
        "Skipped 1 of 4 rows of the data set: 1 x 'chosen' is empty. The first: row 1:"
        in caplog.text
    )
    with pytest.raises(ValueError, match=r"no pairs left: 1 x 'chosen' is .*; 1 x prompt as long"):
        prepare_dataset(table.select([1, 2]), TOKENIZER, **keywords)
    with pytest.raises(ValueError, match="no pairs left: 1 x 'chosen' is empty"):
        prepare_dataset(table.select([1]), TOKENIZER, skip_bad_rows=True)


def test_responses_alone(tmp_path, write):
    rows = [{"prompt": "a", "response": "b"}, {"prompt": "c", "response": "d"}]
    pairs = [
        {"prompt": r["prompt"], "chosen": r["response"], "rejected": r["response"]} for r in rows
    ]
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "a.parquet")
    write_table(tmp_path / "a.csv", rows)
    for path in (write("a.jsonl", as_lines(rows)), tmp_path / "a.csv", tmp_path / "a.parquet"):
        assert [dict(row) for row in load_responses(path)] == pairs
    assert [dict(row) for row in load_responses(write("b.jsonl", as_lines(ROWS)))] == ROWS
    with pytest.raises(ValueError, match=r"missing column\(s\) chosen, rejected; found: prompt, x"):
        load_responses(write("c.jsonl", as_lines([{"prompt": "a", "x": "b"}])))
