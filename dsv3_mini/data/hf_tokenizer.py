"""Our tokenizer in Hugging Face's words: tokenizer.json and tokenizer_config.json, which transformers and the servers read.

    tokenizer.json          what text becomes: cuts, bytes, merges, special tokens, the token that begins a document
    tokenizer_config.json   which special token is which, and the template that makes one text of a conversation

It is the way back of `deepseek_tokenizer.py`, whose table says how the two formats differ. Ranks name a token and not the two
halves that it is made of; what the older ranks make of its bytes are those halves, and the list of merges is all of them, in
the order of the ranks.

Two things are as servers want them, and not as `Tokenizer.encode` has them:

- Every text begins with `<|eos_token|>`, as every document in training does (`add_special_tokens=False` leaves it out).
- Special tokens that a text *spells* become special tokens (`split_special_tokens=True` keeps them as text). A conversation
  is rendered to text before it is encoded, so there is no other way for its roles; whoever serves strangers must take the
  names of special tokens out of what they say.
"""

from __future__ import annotations

from typing import Any

from dsv3_mini.data.bpe import PATTERN, encode_with_ranks
from dsv3_mini.data.deepseek_tokenizer import byte_alphabet
from dsv3_mini.data.tokenizer import CHAT_ROLES, ENCODING_NAME, SPECIAL_TOKENS, Tokenizer
from dsv3_mini.errors import DataError

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] not in " + repr(list(CHAT_ROLES)) + " %}"
    "{{ raise_exception('role ' + message['role'] + ' must be one of " + ", ".join(CHAT_ROLES) + "') }}"
    "{% endif %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
"""`Tokenizer.chat` as a Jinja template: with `add_generation_prompt` where the user has the last word, the same ids."""


def tokenizer_json(tokenizer: Tokenizer) -> dict[str, Any]:
    """The content of tokenizer.json: byte-level BPE that gives the ids which `tokenizer` gives.

    Raises:
        DataError: a tokenizer that is not ours, or whose ranks hold a token that no two older ones make.
    """
    if tokenizer.encoding.name != ENCODING_NAME:
        raise DataError(
            f"encoding {tokenizer.encoding.name!r} is not ours and has a tokenizer.json of its own: copy that file instead"
        )
    spelling = {byte: character for character, byte in byte_alphabet().items()}
    spelled = ["".join(spelling[byte] for byte in token) for token in tokenizer.ranks]
    special = {name: tokenizer.special(name) for name in SPECIAL_TOKENS}
    first = SPECIAL_TOKENS[0]
    sequence = [{"SpecialToken": {"id": first, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    second = {"Sequence": {"id": "B", "type_id": 0}}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [_added(name, id_) for name, id_ in special.items()],
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": PATTERN}, "behavior": "Isolated", "invert": False},
                _BYTE_LEVEL,
            ],
        },
        "post_processor": {
            "type": "TemplateProcessing",
            "single": sequence,
            "pair": [*sequence, second],
            "special_tokens": {first: {"id": first, "ids": [special[first]], "tokens": [first]}},
        },
        "decoder": _BYTE_LEVEL,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {token: rank for rank, token in enumerate(spelled)} | special,
            "merges": [["".join(spelling[byte] for byte in half) for half in pair] for pair in merges(tokenizer.ranks)],
        },
    }


def tokenizer_config(tokenizer: Tokenizer, max_length: int) -> dict[str, Any]:
    """The content of tokenizer_config.json, for a model whose context holds `max_length` tokens."""
    eos, pad = SPECIAL_TOKENS[:2]
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": eos,
        "eos_token": eos,
        "pad_token": pad,
        "additional_special_tokens": list(SPECIAL_TOKENS[2:]),
        "added_tokens_decoder": {str(tokenizer.special(name)): _flags(name) for name in SPECIAL_TOKENS},
        "clean_up_tokenization_spaces": False,
        "model_max_length": max_length,
        "chat_template": CHAT_TEMPLATE,
    }


def merges(ranks: list[bytes]) -> list[tuple[bytes, bytes]]:
    """The two halves of each token of several bytes, oldest first: what the ranks below it make of its bytes.

    Raises:
        DataError: they make more than two pieces of it, so that no merge ends in this token.
    """
    older: dict[bytes, int] = {}
    pairs = []
    # A byte is no merge; and wherever the bytes stand in the ranks, none of them waits for a merge.
    older.update((token, rank) for rank, token in enumerate(ranks) if len(token) == 1)
    for rank, token in enumerate(ranks):
        if len(token) == 1:
            continue
        halves = encode_with_ranks(token, older)
        if len(halves) != 2:
            raise DataError(
                f"token {token!r} of rank {rank} is made of {len(halves)} older ones: byte-pair merges make it of two"
            )
        pairs.append((halves[0], halves[1]))
        older[token] = rank
    return pairs


_BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}


def _flags(name: str) -> dict[str, Any]:
    return {
        "content": name,
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
        "special": True,
    }


def _added(name: str, id_: int) -> dict[str, Any]:
    return {"id": id_, **_flags(name)}
