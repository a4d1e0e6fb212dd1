"""Rebuild what ships in data/, byte for byte: `python -m dsv3_mini.data.build [stories|sums|tokenizer|all] [--check]`.

    stories     data/stories.train.jsonl, data/stories.held_out.jsonl      the first stories of the grammar's sequences
    sums        data/sums.train.jsonl, data/sums.held_out.jsonl            the same of the sums
    tokenizer   data/tokenizer.tiktoken                                    byte pairs learned from a fixed mixture

`--check` writes nothing: it says whether what is there is what would be built, and exits with code 1 if it is not.

The tokenizer learns code and prose from data/tokenizer_corpus.jsonl, a sample of the standard library of one Python
that ships for this reason: read from the Python that runs, the ranks would differ from version to version.
`sample` remakes that file; it gives the same bytes only under the Python that data/README.md names, so "all" leaves it.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dsv3_mini.data import lexicon, python_source
from dsv3_mini.data.bpe import train_bpe
from dsv3_mini.data.corpora import held_out_size
from dsv3_mini.data.shipped import shipped
from dsv3_mini.data.stories import HELD_OUT_SEED, TRAIN_SEED, generate_story
from dsv3_mini.data.sums import generate_sum, held_out_sum
from dsv3_mini.data.tokenizer import SHIPPED_FILE, SPECIAL_TOKENS, Tokenizer
from dsv3_mini.errors import UserError

VOCAB_SIZE = 4096  # special tokens included
SHIPPED_TRAIN = 4000  # of stories, and of sums
SAMPLE_FILE = "tokenizer_corpus.jsonl"

# What the byte pairs are learned from. The words of the stories are repeated until each becomes one token, which a small
# model needs to repeat them. Code and prose pay for it. A few sums suffice, as digits are never joined.
TOKENIZER_STORIES = 6_000
LEXICON_REPEATS = 100
TOKENIZER_SUMS = 600
SAMPLE_CHARS = {"code": 600_000, "prose": 450_000}


def build_stories() -> dict[str, bytes]:
    """Training and held-out stories as JSON lines, each with its question, the one right answer and its kind."""
    held_out = [generate_story(HELD_OUT_SEED, i) for i in range(held_out_size("stories"))]
    train = [generate_story(TRAIN_SEED, i) for i in range(SHIPPED_TRAIN)]
    return {
        "stories.train.jsonl": _json_lines(map(_public_fields, train)),
        "stories.held_out.jsonl": _json_lines(map(_public_fields, held_out)),
    }


def build_sums() -> dict[str, bytes]:
    """Training and held-out sums as JSON lines."""
    held_out = [held_out_sum(i) for i in range(held_out_size("sums"))]
    train = [generate_sum(TRAIN_SEED, i) for i in range(SHIPPED_TRAIN)]
    return {
        "sums.train.jsonl": _json_lines(map(_public_fields, train)),
        "sums.held_out.jsonl": _json_lines(map(_public_fields, held_out)),
    }


def build_tokenizer() -> dict[str, bytes]:
    """The rank file of 4,096 tokens, special tokens included, learned from `tokenizer_texts`."""
    ranks = train_bpe(tokenizer_texts(), VOCAB_SIZE - len(SPECIAL_TOKENS))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / SHIPPED_FILE
        Tokenizer.from_ranks(ranks).save(path)
        return {SHIPPED_FILE: path.read_bytes()}


def tokenizer_texts() -> list[str]:
    """The fixed mixture: the first stories and sums, every word of the stories, the shipped sample of code and prose."""
    stories = [generate_story(TRAIN_SEED, i).text for i in range(TOKENIZER_STORIES)]
    sums = [generate_sum(TRAIN_SEED, i).text for i in range(TOKENIZER_SUMS)]
    sample = [json.loads(line)["text"] for line in shipped(SAMPLE_FILE).read_text(encoding="utf-8").splitlines()]
    return stories + [" ".join(["", *lexicon.vocabulary()])] * LEXICON_REPEATS + sums + sample


def build_sample() -> dict[str, bytes]:
    """Code and prose of the running Python's library, up to `SAMPLE_CHARS` of each, in the order of a hash.

    Only training documents, and only of modules that carry no copyright notice of their own: what is left is under Python's
    own licence, which ships beside it.
    """
    own_notice = {name for name, source in python_source.library_files() if "copyright" in source.lower()}
    rows: list[dict[str, str]] = []
    for domain, limit in SAMPLE_CHARS.items():
        documents = [
            document
            for document in python_source.python_documents(domain)
            if document["split"] == "train" and document["name"] not in own_notice
        ]
        documents.sort(key=lambda document: hashlib.sha256(document["text"].encode()).digest())
        for document in documents:
            limit -= len(document["text"])
            if limit < 0:
                break
            rows.append({"domain": domain, "name": document["name"], "text": document["text"]})
    return {SAMPLE_FILE: _json_lines(rows)}


BUILDERS: Mapping[str, Callable[[], dict[str, bytes]]] = {
    "stories": build_stories,
    "sums": build_sums,
    "tokenizer": build_tokenizer,
    "sample": build_sample,
}
ALL = ("stories", "sums", "tokenizer")


def write(files: Mapping[str, bytes], folder: Path) -> None:
    """Write files into a folder, each whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        unfinished = folder / f"{name}.{os.getpid()}.tmp"
        unfinished.write_bytes(content)
        os.replace(unfinished, folder / name)


def differences(files: Mapping[str, bytes], folder: Path) -> dict[str, str]:
    """What is wrong with the files of a folder: name to "is missing" or "differs, first in line N"."""
    wrong: dict[str, str] = {}
    for name, content in files.items():
        path = folder / name
        if not path.exists():
            wrong[name] = "is missing"
        elif (there := path.read_bytes()) != content:
            pairs = zip(there.split(b"\n"), content.split(b"\n"), strict=False)
            lines = min(there.count(b"\n"), content.count(b"\n")) + 1
            line = next((number for number, (a, b) in enumerate(pairs, start=1) if a != b), lines)
            wrong[name] = f"differs, first in line {line}"
    return wrong


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code: 0, 1 if a check finds a difference, 2 for a mistake in what was asked."""
    parser = argparse.ArgumentParser(prog="python -m dsv3_mini.data.build", description="Rebuild what ships in data/.")
    parser.add_argument("what", nargs="?", default="all", choices=[*BUILDERS, "all"], help="default: all (but sample)")
    parser.add_argument("--check", action="store_true", help="write nothing, say whether what is there is up to date")
    options = parser.parse_args(arguments)
    folder = shipped()
    try:
        wrong: dict[str, str] = {}
        for what in ALL if options.what == "all" else [options.what]:
            files = BUILDERS[what]()
            if options.check:
                wrong |= differences(files, folder)
            else:
                write(files, folder)
            for name, content in files.items():
                print(
                    f"{name:28} {len(content):>9,} bytes  {wrong.get(name, 'is as built' if options.check else 'built')}"
                )
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    if wrong:
        print(f"{len(wrong)} file(s) differ: run python -m dsv3_mini.data.build {options.what}", file=sys.stderr)
    return 1 if wrong else 0


def _public_fields(record: Any) -> dict[str, Any]:
    return {name: value for name, value in asdict(record).items() if not name.startswith("_")}


def _json_lines(rows: Iterable[Mapping[str, Any]]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


if __name__ == "__main__":
    sys.exit(main())
