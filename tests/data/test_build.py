"""What ships is what its programs write: rebuilt here and compared byte for byte."""

import json
import shutil

import pytest

from dsv3_mini.data import build
from dsv3_mini.data.shipped import shipped
from dsv3_mini.data.tokenizer import SPECIAL_TOKENS, Tokenizer


@pytest.mark.parametrize("what", build.ALL)
def test_what_ships_is_what_would_be_built(what, capsys):
    assert build.main([what, "--check"]) == 0, capsys.readouterr()
    assert "is as built" in capsys.readouterr().out


def test_a_check_names_the_file_and_the_line_and_changes_nothing(tmp_path, monkeypatch, capsys):
    for name in ("sums.train.jsonl", "sums.held_out.jsonl"):
        shutil.copy(shipped(name), tmp_path / name)
    monkeypatch.setattr(build, "shipped", lambda *_: tmp_path)
    assert build.main(["sums", "--check"]) == 0
    lines = (tmp_path / "sums.train.jsonl").read_text().splitlines(keepends=True)
    changed = "".join([*lines[:41], lines[41].replace("answer", "anser"), *lines[42:]])
    (tmp_path / "sums.train.jsonl").write_text(changed)
    (tmp_path / "sums.held_out.jsonl").unlink()
    capsys.readouterr()
    assert build.main(["sums", "--check"]) == 1
    said = capsys.readouterr().out
    assert "differs, first in line 42" in said and "is missing" in said
    assert (tmp_path / "sums.train.jsonl").read_text() == changed
    assert sorted(path.name for path in tmp_path.iterdir()) == ["sums.train.jsonl"]

    assert build.main(["sums"]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["sums.held_out.jsonl", "sums.train.jsonl"]
    assert (tmp_path / "sums.train.jsonl").read_bytes() == shipped("sums.train.jsonl").read_bytes()


def test_a_shorter_or_longer_file_differs(tmp_path):
    (tmp_path / "x").write_bytes(b"a\nb\n")
    assert build.differences({"x": b"a\nb\nc\n"}, tmp_path) == {"x": "differs, first in line 3"}
    assert build.differences({"x": b"a\n"}, tmp_path) == {"x": "differs, first in line 2"}
    assert build.differences({"x": b"a\nb\n"}, tmp_path) == {}


def rows(name: str) -> list[dict]:
    return [json.loads(line) for line in shipped(name).read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("domain", ["stories", "sums"])
def test_what_is_held_out_is_not_in_what_is_trained_on(domain):
    train, held_out = (rows(f"{domain}.{split}.jsonl") for split in ("train", "held_out"))
    assert len(train) == 4000 and len(held_out) >= 700
    texts = [row["text"] for row in held_out]
    assert len(set(texts)) == len(texts) and not set(texts) & {row["text"] for row in train}
    assert all(str(row["answer"]) in row["text"] for row in train + held_out)


def test_the_tokenizer_is_of_4096_tokens_and_fits_its_text():
    tokenizer = Tokenizer.shipped()
    assert tokenizer.n_vocab == 4096 and len(tokenizer.ranks) == 4096 - len(SPECIAL_TOKENS)
    for domain, least in (("stories", 4.2), ("code", 2.8), ("prose", 2.9)):
        name = "stories.held_out.jsonl" if domain == "stories" else build.SAMPLE_FILE
        texts = [row["text"] for row in rows(name) if row.get("domain", "stories") == domain]
        n_tokens = sum(len(tokenizer.encode(text)) for text in texts)
        assert sum(len(text.encode()) for text in texts) / n_tokens > least
    story_words = [word for row in rows("stories.held_out.jsonl") for word in row["text"].split(" ") if word.isalpha()]
    whole = sum(len(tokenizer.encode(" " + word)) == 1 for word in story_words)
    assert whole / len(story_words) > 0.97


def test_the_sample_of_python_is_small_and_under_its_licence():
    assert shipped(build.SAMPLE_FILE).stat().st_size < 1_500_000
    assert not any("copyright" in row["text"].lower() for row in rows(build.SAMPLE_FILE))
    licence = shipped("LICENSE.python.txt").read_text()
    assert "PYTHON SOFTWARE FOUNDATION LICENSE VERSION 2" in licence
    described = shipped("README.md").read_text()
    shipped_here = {path.name for path in shipped().iterdir() if path.suffix in (".jsonl", ".tiktoken", ".txt", ".md")}
    assert all(f"`{name}`" in described for name in shipped_here)
