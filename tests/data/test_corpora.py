"""Corpora against the files that they were read from; no network; every mistake one line that names the thing."""

import ast
import json
import random
import re
import socket

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsv3_mini.data import python_source
from dsv3_mini.data.corpora import DOMAINS, load_corpus
from dsv3_mini.data.stories import HELD_OUT_SEED, TRAIN_SEED, generate_story
from dsv3_mini.errors import DataError


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refuse(*arguments, **named):
        raise AssertionError("a corpus reached for the network")

    for name in ("connect", "connect_ex"):
        monkeypatch.setattr(socket.socket, name, refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / ".cache")
    return tmp_path


# ---- the reader's own Python -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def own_python():
    return {
        (domain, split): load_corpus(domain, split) for domain in ("code", "prose") for split in ("train", "held_out")
    }


def test_code_is_the_library_line_by_line(own_python):
    library = dict(python_source.library_files())
    for split in ("train", "held_out"):
        rows = own_python["code", split]
        for i in random.Random(0).sample(range(len(rows)), 60):
            lines = [line for line in rows[i]["text"].split("\n") if line.strip()]
            source = [line for line in library[rows[i]["name"]].split("\n") if line.strip()]
            start = next(k for k in range(len(source)) if source[k : k + len(lines)] == lines)
            assert start >= 0


def test_prose_is_what_the_library_says_of_itself(own_python):
    """`ast` walks everything here; the package walks definitions only, and cuts at paragraphs."""
    library = dict(python_source.library_files())
    rows = own_python["prose", "train"]
    docstrings = [
        row for row in rows.select(random.Random(1).sample(range(len(rows)), 24)) if "topics/" not in row["name"]
    ]
    assert len(docstrings) > 8
    for row in docstrings:
        kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        nodes = [node for node in ast.walk(ast.parse(library[row["name"]])) if isinstance(node, kinds)]
        said = " ".join(" ".join((ast.get_docstring(node) or "").split()) for node in nodes)
        paragraphs = row["text"].split("\n\n")
        assert all(" ".join(paragraph.split()) in said for paragraph in paragraphs)


def test_no_file_is_both_learned_and_measured(own_python):
    names = {key: set(rows["name"]) for key, rows in own_python.items()}
    trained = names["code", "train"] | names["prose", "train"]
    held_out = names["code", "held_out"] | names["prose", "held_out"]
    assert not trained & held_out
    for domain in ("code", "prose"):
        sizes = {split: sum(map(len, own_python[domain, split]["text"])) for split in ("train", "held_out")}
        assert 0.005 < sizes["held_out"] / sum(sizes.values()) < 0.06
        assert sum(sizes.values()) > {"code": 4e6, "prose": 1e6}[domain]


def test_documents_are_short_and_do_not_repeat(own_python):
    for domain, limit in (("code", python_source.CODE_CHARS), ("prose", python_source.PROSE_CHARS)):
        texts = [text for split in ("train", "held_out") for text in own_python[domain, split]["text"]]
        assert len({" ".join(text.split()) for text in texts}) == len(texts)
        assert sum(len(text) > limit for text in texts) < 0.001 * len(texts)  # a line that is longer itself
        assert min(map(len, texts)) >= 20


def test_reading_them_again_gives_the_same(own_python):
    again = list(python_source.python_documents("code"))
    assert [row["text"] for row in again if row["split"] == "held_out"] == list(own_python["code", "held_out"]["text"])
    assert [row["text"] for row in again if row["split"] == "train"] == list(own_python["code", "train"]["text"])


text_lines = st.lists(
    st.sampled_from(["", "", "a b.", "    c d e", "        return f", "x" * 30, "def g():"]), max_size=40
)


@given(text_lines, st.integers(10, 120))
def test_cutting_keeps_every_line_of_code(lines, limit):
    pieces = python_source.split_code("\n".join(lines), limit)
    assert [x for piece in pieces for x in piece.split("\n") if x.strip()] == [x for x in lines if x.strip()]
    assert all(len(piece) <= limit or piece.count("\n") == 0 for piece in pieces)


@given(text_lines, st.integers(10, 120))
def test_cutting_keeps_every_word_of_prose(lines, limit):
    text = "\n".join(lines)
    pieces = python_source.split_prose(text, limit)
    assert re.sub(r"\s", "", "".join(pieces)) == re.sub(r"\s", "", text)
    assert all(len(piece) <= limit for piece in pieces)


# ---- generated, files and the hub ------------------------------------------------------------------------------------


def test_generated_domains_are_their_grammars_sequences():
    stream = load_corpus("stories")
    assert [row["text"] for row in stream.take(5)] == [generate_story(TRAIN_SEED, i).text for i in range(5)]
    held_out = load_corpus("stories", "held_out")
    assert held_out[7] == {"text": generate_story(HELD_OUT_SEED, 7).text, "domain": "stories"}

    trained_sums = {row["text"] for row in load_corpus("sums").take(3000)}
    held_out_sums = set(load_corpus("sums", "held_out")["text"])
    assert len(held_out_sums) > 500 and not trained_sums & held_out_sums


def both_splits(source, **options) -> list[str]:
    train, held_out = (list(load_corpus(str(source), split, **options)["text"]) for split in ("train", "held_out"))
    assert train and held_out and not set(train) & set(held_out)
    return train + held_out


def test_tables_are_read_whole(folder):
    texts = [f"Document number {i}, with a line\nbreak, a “quote” and ünïcödé." for i in range(300)]
    jsonl = "".join(json.dumps({"n": i, "body": text}, ensure_ascii=i % 2 == 0) + "\n" for i, text in enumerate(texts))
    (folder / "a.jsonl").write_text(jsonl, encoding="utf-8")
    pyarrow.parquet.write_table(pyarrow.table({"body": texts, "n": range(300)}), folder / "b.parquet")
    for name in ("a.jsonl", "b.parquet"):
        assert sorted(both_splits(folder / name, text_column="body")) == sorted(texts)
    assert sorted(both_splits(folder, text_column="body")) == sorted(texts * 2)


def test_a_folder_of_text_is_read_in_order_and_cut_at_paragraphs(folder):
    (folder / "sub").mkdir()
    (folder / ".hidden").mkdir()
    paragraphs = [f"Paragraph {i}. " + "Some words that fill it. " * 20 for i in range(12)]
    (folder / "b.txt").write_text("\n\n".join(paragraphs[:6]))
    (folder / "sub" / "c.md").write_text("\n\n".join(paragraphs[6:]))
    (folder / "a.py").write_text("def one():\n    return 1\n")
    (folder / ".hidden" / "secret.txt").write_text("not to be read")
    assert sorted(both_splits(folder)) == sorted(["def one():\n    return 1", *(p.strip() for p in paragraphs)])


def test_a_small_corpus_still_holds_one_text_out_and_equal_texts_stay_together(folder):
    texts = ["red", "green", "red", "blue", "green", "   "]
    (folder / "few.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    assert sorted(both_splits(folder / "few.jsonl")) == sorted(texts[:-1])


def test_a_changed_file_is_read_anew(folder):
    for texts in (["one", "two"], ["three", "four"]):
        (folder / "x.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        assert sorted(both_splits(folder / "x.jsonl")) == sorted(texts)


def test_a_hub_corpus_is_streamed_and_split(monkeypatch):
    rows = [{"body": f"text {i}", "n": i} for i in range(500)]
    monkeypatch.setattr(
        datasets, "load_dataset", lambda *_, **__: datasets.Dataset.from_list(rows).to_iterable_dataset()
    )
    parts = {
        split: [row["text"] for row in load_corpus("hub:any/name", split, text_column="body", allow_network=True)]
        for split in ("train", "held_out")
    }
    assert sorted(parts["train"] + parts["held_out"]) == sorted(row["body"] for row in rows)
    assert 0 < len(parts["held_out"]) < 30
    with pytest.raises(DataError, match="has no column 'text'.*'body', 'n'"):
        load_corpus("hub:any/name", allow_network=True)


# ---- mistakes --------------------------------------------------------------------------------------------------------

WRONG_FILES = [
    ("a.jsonl", b'{"text": "a"}\n\n{"text": oops}\n', r"a\.jsonl, line 3: not JSON"),
    ("b.jsonl", b'{"text": "a"}\n{"text": "\xff"}\n', r"b\.jsonl, line 2: not UTF-8 \(byte 0xff\)"),
    ("c.jsonl", b'{"body": "a", "n": 1}\n{"body": "b", "n": 1}\n', r"no column 'text'.*it has 'body', 'n'"),
    ("d.jsonl", b'{"text": "a"}\n{"body": "b"}\n', r"d\.jsonl, line 2: no 'text'; the line has 'body'"),
    ("e.jsonl", b"", r"e\.jsonl is empty"),
    ("f.jsonl", b'{"text": "a"}\n{"text": 7}\n', r"f\.jsonl, line 2: 'text' is 7, not text"),
    ("g.jsonl", b'{"text": null}\n', r"g\.jsonl, line 1: 'text' is null, not text"),
    ("h.jsonl", b'{"text": "a"}\n3\n', r"h\.jsonl, line 2: int must be an object"),
    ("i.jsonl", b'{"text": "  "}\n', r"is empty: there is nothing to learn from"),
    ("j.jsonl", b'{"text": "once"}\n{"text": "once"}\n', r"only one document"),
    ("k.txt", b"", r"is empty: there is nothing to learn from"),
    ("l.txt", b"ab\xffcd", r"l\.txt is not UTF-8: byte 0xff at position 2"),
    ("m.csv", b"a,b", r"holds no text: expected .*, found \.csv"),
    ("n.parquet", b"PAR1 but not really", r"n\.parquet cannot be read as parquet"),
]


@pytest.mark.parametrize(("name", "content", "message"), WRONG_FILES, ids=[case[0] for case in WRONG_FILES])
def test_wrong_files_are_named(folder, capfd, name, content, message):
    (folder / name).write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        load_corpus(str(folder / name))
    assert "\n" not in str(caught.value) and name in str(caught.value)
    assert capfd.readouterr() == ("", "")  # nothing but the error is said


def test_wrong_parquet_columns_are_named(folder):
    pyarrow.parquet.write_table(pyarrow.table({"text": [1, 2], "body": ["a", None]}), folder / "x.parquet")
    for column, message in (("text", "not text"), ("body", "not text"), ("words", "no column 'words'.*'text', 'body'")):
        with pytest.raises(DataError, match=message):
            load_corpus(str(folder / "x.parquet"), text_column=column)


@pytest.mark.parametrize(
    ("source", "split", "message"),
    [
        ("storys", "train", "did you mean stories"),
        ("/no/such/folder", "train", "'/no/such/folder' does not exist: give stories, sums"),
        ("stories", "validation", "'validation' is not known: choose train or held_out"),
        ("hub:owner/name", "train", "'hub:owner/name' is on the network, which is off by default"),
    ],
)
def test_wrong_sources_are_named(source, split, message):
    with pytest.raises(DataError, match=message):
        load_corpus(source, split)


def test_an_empty_folder_is_named(folder):
    (folder / "empty").mkdir()
    with pytest.raises(DataError, match="holds no text.*found nothing"):
        load_corpus(str(folder / "empty"))


def test_the_four_domains_have_text_and_their_name():
    for domain in DOMAINS:
        row = next(iter(load_corpus(domain, "held_out")))
        assert row["domain"] == domain and row["text"].strip()
