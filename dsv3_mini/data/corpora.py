"""Corpora: everything a model reads, as a Hugging Face dataset with the columns `text` and `domain`.

    stories, sums      made by this project's grammars, as many as are asked for
    long_stories:N     stories drawn out to up to N words by sentences that change nothing (`long_stories.py`)
    code, prose        the standard library of the Python that runs, and its documentation
    a folder or file   .txt, .md and .py files; or .jsonl and .parquet
    hub:owner/name     streamed from the Hugging Face hub, and only where the network is explicitly allowed

Every corpus has two splits that share no document, "train" and "held_out".
"""

from __future__ import annotations

import contextlib
import difflib
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsv3_mini.data import python_source
from dsv3_mini.data.long_stories import LONG_TRAIN_SEED, long_story
from dsv3_mini.data.stories import HELD_OUT_SEED, TRAIN_SEED, generate_story
from dsv3_mini.data.sums import generate_sum, held_out_count, held_out_sum
from dsv3_mini.errors import DataError

if TYPE_CHECKING:  # importing it takes seconds, and generated text does not need it
    from datasets import Dataset, IterableDataset

GENERATED = ("stories", "sums")
LONG_STORIES = "long_stories"
OWN_PYTHON = ("code", "prose")
DOMAINS = GENERATED + OWN_PYTHON
SPLITS = ("train", "held_out")
HELD_OUT_STORIES = 1000
EXTERNAL_HELD_OUT_SHARE = 0.02
TEXT_SUFFIXES = (".txt", ".md", ".py")
_CHOICES = "stories, sums, code, prose, a folder, a .txt, .md, .py, .jsonl or .parquet file, or hub:owner/name"


def load_corpus(
    source: str, split: str = "train", *, text_column: str = "text", allow_network: bool = False
) -> Dataset | IterableDataset:
    """A corpus as a dataset with the columns `text` and `domain`.

    "stories" and "sums" without end (train), as an IterableDataset; so is a corpus of the hub, which is streamed. All else
    is a Dataset, in a fixed order. In folders, files are taken in the order of their names; text files are cut into
    documents of a few hundred words at paragraph ends; .jsonl and .parquet files, if a folder has any, are taken alone, one
    row a document. Of what has no split of its own, every document whose text hashes into the lowest 2% is held out.

    Args:
        source: a domain's name, a path, or "hub:owner/name".
        split: "train" or "held_out".
        text_column: where the text is in a .jsonl, .parquet or hub corpus.
        allow_network: a corpus of the hub is refused without it. `HF_HUB_OFFLINE` stays respected.

    Raises:
        DataError: no such corpus, split or column; nothing in it; a file that cannot be read. One line, with the
            file and, for JSONL, the line number.
    """
    if split not in SPLITS:
        raise DataError(f"split {split!r} is not known: choose train or held_out")
    if is_generated(source):
        return _generated(source, split)
    if source in OWN_PYTHON:
        return _own_python(source, split)
    if source.startswith("hub:"):
        return _from_hub(source, split, text_column, allow_network)
    path = Path(source).expanduser()
    if not path.exists():
        close = difflib.get_close_matches(source, DOMAINS, n=1)
        raise DataError(
            f"corpus {source!r} does not exist: " + (f"did you mean {close[0]}?" if close else f"give {_CHOICES}")
        )
    try:
        return _split_by_hash(_from_path(path, text_column), split, source)
    except UnicodeDecodeError:  # pyarrow hands on bytes that are no UTF-8; only reading the text finds them
        for file in _tables(path):
            if file.suffix == ".jsonl":
                _explain_jsonl(file, text_column)
        raise DataError(f"corpus {source!r} is not UTF-8: convert it") from None


def is_generated(source: str) -> bool:
    """Whether this project's grammars write it: stories, sums, or long_stories:N.

    Raises:
        DataError: long_stories without its number of words.
    """
    name, colon, _ = source.partition(":")
    if name == LONG_STORIES:
        _most_words(source)
    return source in GENERATED or (name == LONG_STORIES and bool(colon))


def generated_text(domain: str, split: str, index: int) -> str:
    """Document number `index` of a generated domain, made on the spot. Train has no end."""
    if domain.startswith(LONG_STORIES):
        seed = LONG_TRAIN_SEED if split == "train" else HELD_OUT_SEED
        return long_story(seed, index, _most_words(domain)).text
    if domain == "stories":
        return generate_story(TRAIN_SEED if split == "train" else HELD_OUT_SEED, index).text
    return (generate_sum(TRAIN_SEED, index) if split == "train" else held_out_sum(index)).text


def held_out_size(domain: str) -> int:
    """How many held-out documents a generated domain has."""
    return held_out_count() if domain == "sums" else HELD_OUT_STORIES


def _most_words(source: str) -> int:
    number = source.partition(":")[2]
    if not number.isdecimal() or int(number) < 1:
        raise DataError(f"corpus {source!r} needs the most words of a story, at least 1: give long_stories:500")
    return int(number)


# ---- domains of our own --------------------------------------------------------------------------------------------


def _generate(domain: str, split: str) -> Iterator[dict[str, str]]:
    index = 0
    while split == "train" or index < held_out_size(domain):
        yield {"text": generated_text(domain, split, index), "domain": domain}
        index += 1


def _generated(domain: str, split: str) -> Dataset | IterableDataset:
    from datasets import Dataset, IterableDataset

    if split == "train":
        return IterableDataset.from_generator(_generate, gen_kwargs={"domain": domain, "split": split})
    return Dataset.from_list(list(_generate(domain, split)))


def _own_python(domain: str, split: str) -> Dataset:
    """Cut once, then kept in the cache of `datasets`, which the fingerprint ties to this Python and these rules."""
    from datasets import Dataset

    with _quietly():
        try:
            dataset = Dataset.from_generator(
                _python_documents, gen_kwargs={"domain": domain, "made_from": python_source.library_fingerprint()}
            )
        except OSError:  # the cache cannot be written, as in a read-only home
            dataset = Dataset.from_list(list(python_source.python_documents(domain)))
    in_train = dataset["split"][:].count("train")
    rows = range(in_train) if split == "train" else range(in_train, len(dataset))
    return _require_text(dataset.select(rows).select_columns(["text", "domain", "name"]), domain)


def _python_documents(domain: str, made_from: str) -> Iterator[dict[str, str]]:
    return python_source.python_documents(domain)


# ---- files ---------------------------------------------------------------------------------------------------------


def _from_path(path: Path, text_column: str) -> Dataset:
    from datasets import Dataset, concatenate_datasets

    tables = _tables(path)
    files = _visible_files(path)
    texts = [file for file in files if file.suffix in TEXT_SUFFIXES]
    if tables:
        parts = [_read_table(file, text_column) for file in tables]
        return concatenate_datasets(parts)
    if not texts:
        there = ", ".join(sorted({file.suffix or file.name for file in files})[:6]) or "nothing"
        raise DataError(f"{path} holds no text: expected .txt, .md, .py, .jsonl or .parquet files, found {there}")
    return Dataset.from_dict({"text": [document for file in texts for document in _read_text(file)]})


def _visible_files(path: Path) -> list[Path]:
    """The file itself, or a folder's files in the order of their names; names that begin with a dot are passed over."""
    if not path.is_dir():
        return [path]
    files = (file for file in path.rglob("*") if file.is_file())
    return sorted(file for file in files if not any(part.startswith(".") for part in file.relative_to(path).parts))


def _tables(path: Path) -> list[Path]:
    return [file for file in _visible_files(path) if file.suffix in (".jsonl", ".parquet")]


def _read_text(file: Path) -> list[str]:
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{file} is not UTF-8: byte 0x{error.object[error.start]:02x} at position {error.start}; convert it"
        ) from None
    except OSError as error:
        raise DataError(f"{file} cannot be read: {error.strerror}") from None
    return (python_source.split_code if file.suffix == ".py" else python_source.split_prose)(text)


def _read_table(file: Path, text_column: str) -> Dataset:
    from datasets import Dataset

    read = Dataset.from_json if file.suffix == ".jsonl" else Dataset.from_parquet
    try:
        with _quietly():
            dataset = read(str(file))
    except Exception as error:  # of datasets, pyarrow or the system: many kinds, none of them written for people
        if file.suffix == ".jsonl":
            _explain_jsonl(file, text_column)
        raise DataError(f"{file} cannot be read as {file.suffix[1:]}: {_first_line(error)}") from None
    is_text = _is_text(dataset.features, text_column, str(file))
    if not is_text or dataset.data.column(text_column).null_count:
        if file.suffix == ".jsonl":
            _explain_jsonl(file, text_column)
        raise DataError(
            f"{file}: column {text_column!r} has rows that are not text: fill them in, or name another column"
        )
    dataset = dataset.select_columns([text_column])
    return dataset if text_column == "text" else dataset.rename_column(text_column, "text")


def _explain_jsonl(file: Path, text_column: str) -> None:
    """Find the line that makes a JSONL file unreadable, and say so."""
    lines = file.read_bytes().split(b"\n")
    if not any(line.strip() for line in lines):
        raise DataError(f"{file} is empty: there is nothing to learn from")
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line) if line.strip() else {text_column: ""}
        except UnicodeDecodeError as error:
            raise DataError(
                f"{file}, line {number}: not UTF-8 (byte 0x{line[error.start]:02x}); convert the file"
            ) from None
        except json.JSONDecodeError as error:
            raise DataError(
                f"{file}, line {number}: not JSON ({error.msg} at column {error.colno}); one object a line"
            ) from None
        if not isinstance(row, dict):
            raise DataError(f"{file}, line {number}: {type(row).__name__} must be an object with {text_column!r}")
        if text_column not in row:
            there = ", ".join(map(repr, row)) or "nothing"
            raise DataError(f"{file}, line {number}: no {text_column!r}; the line has {there}")
        if not isinstance(row[text_column], str):
            raise DataError(f"{file}, line {number}: {text_column!r} is {json.dumps(row[text_column])[:40]}, not text")


# ---- the hub -------------------------------------------------------------------------------------------------------


def _from_hub(source: str, split: str, text_column: str, allow_network: bool) -> IterableDataset:
    if not allow_network:
        raise DataError(
            f"corpus {source!r} is on the network, which is off by default: allow it, or give a local folder or file"
        )
    name = source.removeprefix("hub:")
    try:
        from datasets import load_dataset

        dataset = load_dataset(name, split="train", streaming=True)
        first = next(iter(dataset), None)
    except Exception as error:  # no network, no such name, no access: datasets and the hub have many kinds
        raise DataError(f"corpus {source!r} cannot be opened: {_first_line(error)}") from None
    if first is None:
        raise DataError(f"corpus {source!r} is empty: there is nothing to learn from")
    if not _is_text(dataset.features or first, text_column, source):
        raise DataError(f"corpus {source!r}: column {text_column!r} is not text: name another as the text column")
    if text_column != "text":
        dataset = dataset.rename_column(text_column, "text")
    return dataset.filter(_in_split, fn_kwargs={"split": split}).map(_with_domain, fn_kwargs={"domain": name})


def _in_split(row: dict[str, Any], split: str) -> bool:
    text = row["text"] or ""
    return bool(text.strip()) and (python_source.place(text) < EXTERNAL_HELD_OUT_SHARE) == (split == "held_out")


def _with_domain(row: dict[str, Any], domain: str) -> dict[str, str]:
    return {"domain": domain}


# ---- checks that all share ------------------------------------------------------------------------------------------


def _split_by_hash(dataset: Dataset, split: str, source: str) -> Dataset:
    """One of the two splits of a dataset; equal texts always land on the same side, texts of blanks on none."""
    places: dict[int, float] = {}
    for row, document in enumerate(_require_text(dataset, source)):
        if document["text"].strip():
            places[row] = python_source.place(document["text"])
    if not places:
        raise DataError(f"corpus {source!r} is empty: there is nothing to learn from")
    least, most = min(places.values()), max(places.values())
    if least == most:
        raise DataError(f"corpus {source!r} has only one document: at least two are needed, one of them to be held out")
    # In a small corpus the hash may leave a side empty: then the text that is nearest to being held out is.
    share = EXTERNAL_HELD_OUT_SHARE if least < EXTERNAL_HELD_OUT_SHARE <= most else math.nextafter(least, 1)
    chosen = [row for row, place in places.items() if (place < share) == (split == "held_out")]
    domain = Path(source).stem or "text"
    return dataset.add_column("domain", [domain] * len(dataset)).select(chosen)


def _require_text(dataset: Dataset, source: str) -> Dataset:
    if not len(dataset):
        raise DataError(f"corpus {source!r} is empty: there is nothing to learn from")
    return dataset


def _is_text(columns: Mapping[str, Any], text_column: str, where: str) -> bool:
    """Whether a column, by its feature or by a value of it, is one of text; a DataError if it is not there."""
    if text_column not in columns:
        there = ", ".join(map(repr, columns))
        raise DataError(f"{where} has no column {text_column!r}: name another as the text column; it has {there}")
    column = columns[text_column]
    return isinstance(column, str) or getattr(column, "dtype", None) in ("string", "large_string")


def _first_line(error: Exception) -> str:
    """The first line of the deepest cause: datasets wraps what went wrong."""
    while error.__cause__ is not None:
        error = error.__cause__
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """No progress bars and no log of what is reported as one error line anyway; both as they were afterwards."""
    import datasets

    shown, verbosity = not datasets.are_progress_bars_disabled(), datasets.logging.get_verbosity()
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    try:
        yield
    finally:
        datasets.logging.set_verbosity(verbosity)
        if shown:
            datasets.enable_progress_bars()
