"""Read the tokenizer.json of a DeepSeek model (Hugging Face's format, byte-level BPE) into a tiktoken Encoding.

The two formats say the same thing in different words:

| tokenizer.json | tiktoken |
|---|---|
| bytes spelled as printable characters (a space is `Ġ`) | bytes |
| `model.merges`: pairs, oldest first | ranks: any two neighbours whose union is a token merge, lowest id first |
| `pre_tokenizer`: a sequence of regexes, each cutting what the one before has left | one regex |
| `added_tokens`: found in the text before anything else | special tokens: found only where `encode` allows them |

The second row needs care. Ranks forget *which* two halves make a token, so `_check_ranks_equal_merges` proves for
every token that the ranks below it would build it from a pair in the list; then both ways encode any text alike.
The third row needs a class: one regex cannot see a cut made by another (`\\s+(?!\\S)` must take the end of a
piece for the end of the text), so `SplitEncoding` cuts step by step.

Where we simplify: nothing is added to the text (no begin-of-sentence token), and what byte-level BPE does not
need (normalizers, dropout, unknown tokens, stripping of added tokens) is refused by name rather than imitated.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import regex
import tiktoken

from dsv3_mini.data.bpe import encode_with_ranks
from dsv3_mini.data.tokenizer import Tokenizer
from dsv3_mini.errors import DataError

# The names by which `Tokenizer` knows the special tokens of the released model.
DEEPSEEK_NAMES = {
    "eos_token": "<｜end▁of▁sentence｜>",
    "pad_token": "<｜▁pad▁｜>",
    "fim_begin": "<｜fim▁begin｜>",
    "fim_hole": "<｜fim▁hole｜>",
    "fim_end": "<｜fim▁end｜>",
}

# What ByteLevel cuts with when its `use_regex` is on: the pattern of GPT-2.
_BYTE_LEVEL_REGEX = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


class SplitEncoding(tiktoken.Encoding):
    """A tiktoken Encoding that cuts text with several regexes, one after the other, before it merges bytes.

    `splits` are the regexes in order. `late_special` names the special tokens that are looked for only after the
    others (tokenizer.json calls them normalized).
    """

    def __init__(
        self,
        name: str,
        *,
        splits: Sequence[str],
        mergeable_ranks: dict[bytes, int],
        special_tokens: dict[str, int],
        late_special: Collection[str] = (),
    ) -> None:
        # Text reaches the core in pieces that are already cut, so its own regex takes each as a whole.
        super().__init__(name, pat_str=r"(?s:.+)", mergeable_ranks=mergeable_ranks, special_tokens=special_tokens)
        self.splits = tuple(splits)
        self._patterns = [_compile(pattern) for pattern in splits]
        self.late_special = frozenset(late_special)

    def cut(self, text: str) -> list[str]:
        """The pieces of `text`; joined again they are the text. Both matches and what lies between them are pieces."""
        pieces = [text] if text else []
        for pattern in self._patterns:
            pieces = [part for piece in pieces for part, _ in _isolate(pattern, piece)]
        return pieces

    def encode_ordinary(self, text: str) -> list[int]:
        """Ids of `text`; special tokens spelled in it stay text."""
        return [id_ for piece in self.cut(text) for id_ in super(SplitEncoding, self).encode_ordinary(piece)]

    def encode(
        self,
        text: str,
        *,
        allowed_special: str | Collection[str] = frozenset(),
        disallowed_special: str | Collection[str] = "all",
    ) -> list[int]:
        """Ids of `text` with the special tokens in `allowed_special` ("all" or names) recognised.

        Raises:
            DataError: a token of `disallowed_special` (by default: every one that is not allowed) is in the text.
        """
        allowed = self.special_tokens_set if allowed_special == "all" else set(allowed_special)
        disallowed = self.special_tokens_set - allowed if disallowed_special == "all" else set(disallowed_special)
        if disallowed and (match := _any_of(disallowed).search(text)):
            raise DataError(
                f"text holds the special token {match[0]!r}: allow it, or pass disallowed_special=() to keep it as text"
            )
        pieces = [(text, False)]
        for names in (allowed - self.late_special, allowed & self.late_special):
            if names:
                pieces = [
                    part
                    for piece, done in pieces
                    for part in ([(piece, done)] if done else _isolate(_any_of(names), piece))
                ]
        ids: list[int] = []
        for piece, is_special in pieces:
            ids += [self.encode_single_token(piece)] if is_special else self.encode_ordinary(piece)
        return ids

    def encode_to_numpy(self, text: str, **special: Any) -> np.ndarray:
        """`encode`, as an array."""
        return np.array(self.encode(text, **special), dtype=np.uint32)

    def encode_with_unstable(self, text: str, **special: Any) -> tuple[list[int], list[list[int]]]:
        raise NotImplementedError(
            "which tokens more text could change is only known to a single-regex tiktoken Encoding"
        )

    def __getstate__(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "splits": self.splits,
            "mergeable_ranks": self._mergeable_ranks,
            "special_tokens": self._special_tokens,
            "late_special": self.late_special,
        }


def load_deepseek_tokenizer(path: str | Path) -> Tokenizer:
    """The same reader, wrapped as a `Tokenizer` that knows eos, pad and the FIM tokens by DeepSeek's names for them."""
    return Tokenizer(read_tokenizer_json(path), DEEPSEEK_NAMES)


def read_tokenizer_json(path: str | Path) -> SplitEncoding:
    """Read a tokenizer.json, or the folder that holds one.

    `encoding.encode(text, allowed_special="all")` gives the ids that `tokenizers` gives for the same file without
    its post-processing; `encoding.encode_ordinary(text)` treats added tokens as text.

    Raises:
        DataError: the file cannot be read, or asks for something that byte-level BPE in tiktoken does not do.
    """
    path = Path(path)
    path = path / "tokenizer.json" if path.is_dir() else path
    try:
        spec = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(f"{path} does not exist: give a tokenizer.json, or the folder that holds one") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise DataError(f"{path} cannot be read as JSON: {error}") from None
    try:
        return _encoding(spec)
    except DataError as error:
        raise DataError(f"{path}: {error}") from None


def _encoding(spec: Any) -> SplitEncoding:
    _require(isinstance(spec, dict), "the file", type(spec).__name__, "must hold a JSON object")
    normalizer = spec.get("normalizer")
    _require(
        not normalizer or (_kind(normalizer) == "Sequence" and not normalizer.get("normalizers")),
        "normalizer",
        _kind(normalizer),
        "is not supported: byte-level BPE encodes the text as it is",
    )
    model = spec.get("model")
    _require(_kind(model) == "BPE", "model.type", _kind(model), "must be 'BPE'")
    for name in ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback"):
        _require(not model.get(name), f"model.{name}", model.get(name), "is not supported: it must be absent or null")

    special, late = _added_tokens(spec.get("added_tokens") or [])
    vocab = model.get("vocab")
    _require(isinstance(vocab, dict) and vocab, "model.vocab", type(vocab).__name__, "must map tokens to ids")
    merges = _merges(model.get("merges"))
    ranks = _ranks(vocab, merges, special)
    _check_ranks_equal_merges(ranks, merges)
    splits = _splits(spec.get("pre_tokenizer"))
    return SplitEncoding(
        "tokenizer.json", splits=splits, mergeable_ranks=ranks, special_tokens=special, late_special=late
    )


# ---- how the text is cut -------------------------------------------------------------------------------------------


def _splits(pre_tokenizer: Any) -> list[str]:
    """The regexes of a pre-tokenizer, in order; its last step must be ByteLevel."""
    steps = _flatten(pre_tokenizer)
    last = _kind(steps[-1]) if steps else None
    _require(last == "ByteLevel", "pre_tokenizer", last, "must end with ByteLevel: only byte-level BPE is supported")
    patterns: list[str] = []
    for step in steps:
        kind = _kind(step)
        if kind == "Split":
            behavior, pattern = step.get("behavior"), step.get("pattern")
            _require(behavior == "Isolated", "Split.behavior", behavior, "is not supported: it must be 'Isolated'")
            text = pattern.get("Regex") if isinstance(pattern, dict) else None
            literal = pattern.get("String") if isinstance(pattern, dict) else None
            _require(isinstance(text or literal, str), "Split.pattern", pattern, "must hold a Regex or a String")
            patterns.append(text or regex.escape(literal))
        elif kind == "Digits":
            patterns.append(r"\p{N}" if step.get("individual_digits") else r"\p{N}+")
        elif kind == "ByteLevel":
            _require(not step.get("add_prefix_space"), "ByteLevel.add_prefix_space", True, "is not supported")
            patterns += [_BYTE_LEVEL_REGEX] if step.get("use_regex", True) else []
        else:
            raise DataError(f"pre_tokenizer step {kind!r} is not supported: use Split, Digits and ByteLevel")
    for pattern in patterns:
        _compile(pattern)
    return patterns


def _compile(pattern: str) -> regex.Pattern[str]:
    """A pattern of tokenizer.json, written for the engine Oniguruma, where `$` is the end of a line."""
    strange = regex.search(r"\\[hHZ]|&&", pattern)
    _require(
        not strange, "pre_tokenizer pattern", pattern, f"uses {strange and strange[0]}, which Python reads differently"
    )
    try:
        return regex.compile(pattern, regex.MULTILINE)
    except regex.error as error:
        raise DataError(f"pre_tokenizer pattern {pattern!r} is not a regex that Python can read: {error}") from None


def _flatten(pre_tokenizer: Any) -> list[Any]:
    if _kind(pre_tokenizer) != "Sequence":
        return [pre_tokenizer]
    return [step for inner in pre_tokenizer.get("pretokenizers") or [] for step in _flatten(inner)]


def _isolate(pattern: regex.Pattern[str], text: str) -> Iterable[tuple[str, bool]]:
    """Cut `text` into the matches of `pattern` (True) and the stretches between them (False), in order."""
    end = 0
    for match in pattern.finditer(text):
        if match.start() > end:
            yield text[end : match.start()], False
        if match[0]:
            yield match[0], True
        end = match.end()
    if end < len(text):
        yield text[end:], False


def _any_of(names: Iterable[str]) -> regex.Pattern[str]:
    """A regex for any of these strings; where two begin at the same place, the longer one."""
    return regex.compile("|".join(regex.escape(name) for name in sorted(names, key=len, reverse=True)))


# ---- the tokens ----------------------------------------------------------------------------------------------------


def byte_alphabet() -> dict[str, int]:
    """How tokenizer.json spells bytes: printable Latin-1 as itself, the others as U+0100, U+0101, ... in order."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


def _added_tokens(added: Any) -> tuple[dict[str, int], set[str]]:
    """Added tokens by name, and those of them that are looked for last."""
    _require(isinstance(added, list), "added_tokens", type(added).__name__, "must be a list")
    special: dict[str, int] = {}
    late = set()
    for token in added:
        content, id_ = (token.get("content"), token.get("id")) if isinstance(token, dict) else (None, None)
        _require(isinstance(content, str) and content != "", "added_tokens.content", content, "must be text")
        _require(_is_id(id_), f"added token {content!r}: id", id_, "must be a whole number of at least 0")
        for flag in ("lstrip", "rstrip", "single_word"):
            _require(not token.get(flag), f"added token {content!r}: {flag}", True, "is not supported")
        _require(special.get(content, id_) == id_, f"added token {content!r}: id", id_, "is its second id")
        special[content] = id_
        if token.get("normalized"):
            late.add(content)
    return special, late


def _merges(merges: Any) -> dict[tuple[str, str], int]:
    """Each pair with its place in the list; a pair is written `["a", "b"]` or, in older files, `"a b"`."""
    _require(isinstance(merges, list), "model.merges", type(merges).__name__, "must be a list of pairs")
    places: dict[tuple[str, str], int] = {}
    for place, merge in enumerate(merges):
        pair = tuple(merge.split(" ")) if isinstance(merge, str) else tuple(merge) if isinstance(merge, list) else ()
        good = len(pair) == 2 and all(isinstance(half, str) and half for half in pair)
        _require(good, f"model.merges[{place}]", merge, "must be a pair of tokens")
        places[pair] = place
    return places


def _ranks(
    vocab: Mapping[str, Any], merges: Mapping[tuple[str, str], int], special: Mapping[str, int]
) -> dict[bytes, int]:
    """Tokens as bytes, with their ids. Added tokens that no merge builds stay out: text cannot reach them."""
    alphabet = byte_alphabet()
    built = {left + right for left, right in merges}
    ranks: dict[bytes, int] = {}
    for token, id_ in vocab.items():
        _require(_is_id(id_), f"model.vocab[{token!r}]", id_, "must be a whole number of at least 0")
        _require(
            special.get(token, id_) == id_, f"added token {token!r}: id", special.get(token), f"is {id_} in model.vocab"
        )
        if token in alphabet or token in built:
            strange = [character for character in token if character not in alphabet]
            _require(
                not strange,
                f"token {token!r}",
                strange[:1],
                "is not in the byte alphabet: only byte-level BPE is supported",
            )
            ranks[bytes(alphabet[character] for character in token)] = id_
        else:
            _require(
                token in special, f"token {token!r}", id_, "is built by no merge: such a vocabulary is not supported"
            )
    for pair in merges:
        for token in (*pair, "".join(pair)):
            _require(token in vocab, f"model.merges: {' '.join(pair)!r}", token, "is not in model.vocab")
    for character, byte in alphabet.items():
        _require(bytes([byte]) in ranks, f"byte 0x{byte:02x}", character, "is not in model.vocab: all 256 must be")
    owners: dict[int, str] = {}
    for token, id_ in [*vocab.items(), *special.items()]:
        _require(owners.setdefault(id_, token) == token, f"id {id_}", token, f"already belongs to {owners[id_]!r}")
    return ranks


def _check_ranks_equal_merges(ranks: Mapping[bytes, int], merges: Mapping[tuple[str, str], int]) -> None:
    """Prove that merging by rank is the same as merging by list.

    Take the tokens oldest first. If the ranks below a token build it from two halves that the list names as a
    pair, and these pairs come in the order of the ids, then wherever the token appears in a text both ways make
    the same merges inside it: what merges inside a stretch depends on its surroundings only through a merge across its
    border, and then the token does not appear there.
    """
    spelling = {byte: character for character, byte in byte_alphabet().items()}
    known = {token: id_ for token, id_ in ranks.items() if len(token) == 1}
    last = -1
    for token, id_ in sorted(((t, i) for t, i in ranks.items() if len(t) > 1), key=lambda item: item[1]):
        pair = tuple("".join(spelling[byte] for byte in part) for part in encode_with_ranks(token, known))
        place = merges.get(pair, -1) if len(pair) == 2 else -1
        _require(
            place > last,
            f"token id {id_}",
            " ".join(pair),
            "is not the next pair of model.merges: ids must follow the merges",
        )
        known[token] = id_
        last = place


# ---- checks --------------------------------------------------------------------------------------------------------


def _kind(part: Any) -> Any:
    return part.get("type") if isinstance(part, dict) else part


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _require(holds: Any, field: str, value: Any, rule: str) -> None:
    if not holds:
        shown = repr(value)
        raise DataError(f"{field} = {shown if len(shown) <= 80 else shown[:77] + '...'} {rule}")
