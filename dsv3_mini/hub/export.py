"""A folder that a server opens: the checkpoint, and beside it all that says how to talk to the model.

transformers, vLLM and SGLang take the same folder:

| file | what they take from it |
|---|---|
| config.json | `architectures` names the class, the rest builds it; bos, eos and pad by id |
| model-*.safetensors, their index | the weights |
| tokenizer.json | text to ids |
| tokenizer_config.json | the special tokens' parts, the chat template |
| generation_config.json | how to sample where a request does not say, and where to stop |

Our own tokenizer.tiktoken lies there too, so that `dsv3 sample --model FOLDER` reads the same folder.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from dsv3_mini.data.hf_tokenizer import tokenizer_config, tokenizer_json
from dsv3_mini.data.tokenizer import Tokenizer
from dsv3_mini.errors import ConfigError
from dsv3_mini.hub.save import hf_config, write_folder, write_json, write_weights
from dsv3_mini.inference.generate import TEMPERATURE, TOP_P
from dsv3_mini.model import DeepSeekV3

RANKS = "tokenizer.tiktoken"


def export_pretrained(
    model: DeepSeekV3,
    tokenizer: Tokenizer,
    folder: str | Path,
    dtype: torch.dtype = torch.bfloat16,
    max_shard_bytes: float = 5e9,
    overwrite: bool = False,
) -> None:
    """What `save_pretrained` writes, and what a server wants beside it; complete or not there at all.

    Args: as those of `save_pretrained`.

    Raises:
        CheckpointError: as there.
        ConfigError: the tokenizer has more tokens than the model.
        DataError: the tokenizer is not one of ours.
    """
    ids = special_ids(tokenizer)
    if tokenizer.n_vocab > model.cfg.vocab_size:
        raise ConfigError(
            f"vocab_size = {model.cfg.vocab_size} is less than the tokenizer's {tokenizer.n_vocab} tokens: this is not the "
            "tokenizer of this model"
        )
    texts = {
        "tokenizer.json": tokenizer_json(tokenizer),
        "tokenizer_config.json": tokenizer_config(tokenizer, model.cfg.max_position_embeddings),
        "generation_config.json": {**ids, "do_sample": True, "temperature": TEMPERATURE, "top_p": TOP_P},
    }
    with write_folder(model, folder, dtype, max_shard_bytes, overwrite) as new:
        write_weights(model, new, dtype, max_shard_bytes)
        write_json(new / "config.json", {**hf_config(model, dtype), **ids})
        for name, values in texts.items():
            write_json(new / name, values)
        tokenizer.save(new / RANKS)


def special_ids(tokenizer: Tokenizer) -> dict[str, Any]:
    """Ids by the names that Hugging Face's configs have for them. Documents begin as they end, with eos."""
    return {
        "bos_token_id": tokenizer.eos_id,
        "eos_token_id": tokenizer.eos_id,
        "pad_token_id": tokenizer.pad_id,
    }
