"""The model of report section 2, one idea a file. Knows nothing of training, widgets or process groups.

Letters in patterns and shapes: `b` batch, `s` sequence (queries), `t` sequence (keys), `h` heads, `d` model width,
`c` latent, `r` rope width, `n` nope width, `v` value width (vocabulary where no head is near), `e` experts,
`k` chosen experts, `g` groups, `f` expert width, `T` tokens (b*s).
"""

from dsv3_mini.model.transformer import DeepSeekV3, ModelOutput

__all__ = ["DeepSeekV3", "ModelOutput"]
