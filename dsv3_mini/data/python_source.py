"""The reader's own Python as text: the standard library's source ("code") and its documentation ("prose").

Every machine that can run the course has some ten megabytes of it, so there is real text to learn from without a
download. Nothing is imported or executed: source is cut at blank lines between definitions, docstrings are found
with `ast`, and the reference manual is read out of `pydoc_data/topics.py` as a literal.

Held out are whole files (and whole chapters of the manual), chosen by a hash of their path, the same for both domains:
a docstring is part of the code as well, so cutting file by file keeps it from being learned in one domain and
measured in the other. What the text is depends on the Python that runs; for one Python it is always the same.
"""

from __future__ import annotations

import ast
import hashlib
import re
import sys
import sysconfig
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

CODE_CHARS = 700  # about 250 tokens of our own tokenizer
PROSE_CHARS = 700
HELD_OUT_SHARE = 0.03  # of the files

# Tests are repetitive, lib2to3 and distutils have left newer Pythons, the others are tables or bundled packages.
_SKIPPED_FOLDERS = {
    "__pycache__", "config", "distutils", "encodings", "ensurepip", "idle_test", "lib2to3", "pydoc_data",
    "site-packages", "dist-packages", "test", "tests", "turtledemo",
}  # fmt: skip
_SKIPPED_FILES = re.compile(
    r"^(_sysconfigdata.*|_sysconfig_vars.*|this|antigravity|__phello__.*|stringprep|entities)\.py$"
)


def python_documents(domain: str) -> Iterator[dict[str, str]]:
    """The documents of "code" or "prose", without repetitions: all of "train" first, then all of "held_out".

    Yields:
        `text`, `domain`, `split` ("train" or "held_out") and `name` (where it was found, such as "json/decoder.py").
    """
    seen: set[bytes] = set()
    pieces = _code_pieces if domain == "code" else _prose_pieces
    later = []
    for name, text in pieces():
        digest = hashlib.sha1(" ".join(text.split()).encode()).digest()
        if digest in seen:
            continue
        seen.add(digest)
        split = "held_out" if place(name) < HELD_OUT_SHARE else "train"
        document = {"text": text, "domain": domain, "split": split, "name": name}
        if split == "train":
            yield document
        else:
            later.append(document)
    yield from later


def place(name: str) -> float:
    """A stable hash of a name or a text as a number in [0, 1): what lies below a share is held out."""
    # 53 bits are what a float holds exactly, so that 1.0 is never reached.
    return (int.from_bytes(hashlib.sha256(name.encode("utf-8", "surrogatepass")).digest()[:8], "big") >> 11) / 2**53


def library_fingerprint() -> str:
    """What the documents depend on: the Python that runs, where its library lies, and the rules of this file."""
    rules = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:16]
    return f"{sys.version} {library_folder()} {rules}"


def library_folder() -> Path:
    return Path(sysconfig.get_paths()["stdlib"])


def library_files() -> Iterator[tuple[str, str]]:
    """The standard library's Python files in order of their names: (path relative to the library, source)."""
    folder = library_folder()
    paths = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*.py")}
    for name in sorted(paths):
        *folders, file = name.split("/")
        if _SKIPPED_FILES.match(file) or any(
            part in _SKIPPED_FOLDERS or part.startswith("config-") for part in folders
        ):
            continue
        try:
            yield name, paths[name].read_text(encoding="utf-8").expandtabs()
        except (OSError, UnicodeDecodeError):  # a broken link, or one of the few files in another encoding
            continue


def split_code(source: str, limit: int = CODE_CHARS) -> list[str]:
    """Cut source at the blank line that is indented least, neighbours joined again while they stay below `limit`.

    So a short function is one document, a long class one document for each method or two. Every line is kept, in
    order; only blank lines at a cut are lost.
    """
    return _join(_cut_lines(source.split("\n"), limit), limit)


def split_prose(text: str, limit: int = PROSE_CHARS) -> list[str]:
    """Cut text at paragraph ends (at sentence or line ends within a paragraph that is too long), joined up to `limit`."""
    paragraphs = [p.strip("\n").rstrip() for p in re.split(r"\n[ \t]*\n", text) if p.strip()]
    short: list[str] = []
    for paragraph in paragraphs:
        while len(paragraph) > limit:
            ends = [m.end() for m in re.finditer(r"[.!?]\s|\n", paragraph[:limit])] or [limit]
            short.append(paragraph[: ends[-1]].rstrip())
            paragraph = paragraph[ends[-1] :].lstrip("\n ")
        if paragraph:
            short.append(paragraph)
    return _join(short, limit, between="\n\n")


def _code_pieces() -> Iterator[tuple[str, str]]:
    for name, source in library_files():
        for piece in split_code(source):
            if len(piece) >= 40 and _share(str.isalpha, piece) > 0.5:  # below: tables of numbers, rulers, leftovers
                yield name, piece


def _prose_pieces() -> Iterator[tuple[str, str]]:
    for name, text in _topics():
        for piece in split_prose(text):
            if _is_english(piece):
                yield name, piece
    for name, source in library_files():
        for docstring in _docstrings(source):
            english = "\n\n".join(p for p in re.split(r"\n[ \t]*\n", docstring) if ">>>" not in p)
            for piece in split_prose(english):
                if _is_english(piece):
                    yield name, piece


def _topics() -> Iterator[tuple[str, str]]:
    """The chapters of the language reference that `help()` shows, read as a literal from pydoc_data/topics.py."""
    path = library_folder() / "pydoc_data" / "topics.py"
    if not path.exists():  # some systems package it apart
        return
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict):
            for name, text in sorted(ast.literal_eval(node.value).items()):
                yield f"topics/{name}", text


def _docstrings(source: str) -> Iterator[str]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of invalid escapes in old files
        try:
            nodes: list[ast.AST] = [ast.parse(source)]
        except SyntaxError:  # deliberately broken or very old examples
            return
    while nodes:
        node = nodes.pop()
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            docstring = ast.get_docstring(node)
            if docstring:
                yield docstring
            nodes.extend(reversed(node.body))


def _is_english(text: str) -> bool:
    words = re.findall(r"\b[A-Za-z]+\b", text)
    return len(words) >= 8 and "." in text and _share(lambda c: c.isalpha() or c == " ", text) > 0.85


def _share(test: Callable[[str], bool], text: str) -> float:
    return sum(map(test, text)) / len(text)


def _cut_lines(lines: list[str], limit: int) -> list[str]:
    """Blocks of lines below `limit` characters, cut first where the indentation after a blank line is least."""
    text = "\n".join(lines).strip("\n")
    if len(text) <= limit or len(lines) == 1:
        return [text] if text.strip() else []
    after_blank = [i for i in range(1, len(lines)) if lines[i].strip() and not lines[i - 1].strip()]
    cuts = after_blank or [i for i in range(1, len(lines)) if lines[i].strip()]
    if not cuts:
        return [text]
    least = min(_indent(lines[i]) for i in cuts)
    starts = [0, *(i for i in cuts if _indent(lines[i]) == least), len(lines)]
    return [block for a, b in zip(starts, starts[1:], strict=False) for block in _cut_lines(lines[a:b], limit)]


def _indent(line: str) -> int:
    return len(line) - len(line.lstrip())


def _join(pieces: list[str], limit: int, between: str = "\n\n") -> list[str]:
    joined: list[str] = []
    for piece in pieces:
        if joined and len(joined[-1]) + len(between) + len(piece) <= limit:
            joined[-1] += between + piece
        else:
            joined.append(piece)
    return joined
