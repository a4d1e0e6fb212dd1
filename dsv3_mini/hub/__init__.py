"""Checkpoints in and out, in the layout of the released model on the Hugging Face hub.

    model = from_pretrained(folder)                            a folder with config.json and *.safetensors -> model
    save_pretrained(model, folder)                             model -> such a folder, in BF16 (transformers opens it)
    save_pretrained(model, folder, dtype=torch.float8_e4m3fn)  the released FP8 layout
    hub.export.export_pretrained(model, tokenizer, folder)     save_pretrained, and what servers read beside it
    read_tensors(folder)[name]                                 one tensor at a time, FP8 weights kept as they are

Three things are worth knowing of the layout:

- names. Experts are stored one by one; our modules hold them stacked, and gate and up projections side by side. MTP
  modules are numbered on after the main layers, and carry copies of embedding and head (`names.py`).
- FP8. A weight in E4M3 has one FP32 scale per 128x128 block, `weight_scale_inv`, and W = q * scale (`fp8_blocks.py`).
- safetensors only. A pickle runs code when it is opened, so `.bin` and `.pt` files are never opened.

RoPE pairs neighbouring dimensions in the released weights and in this package: nothing is permuted on the way.
"""

from dsv3_mini.hub.fp8_blocks import Fp8Weight, quantise_blocks
from dsv3_mini.hub.load import from_pretrained
from dsv3_mini.hub.reader import TensorFolder, read_tensors
from dsv3_mini.hub.save import save_pretrained

__all__ = ["Fp8Weight", "TensorFolder", "from_pretrained", "quantise_blocks", "read_tensors", "save_pretrained"]
