# ---
# jupyter:
#   jupytext:
#     text_representation:
#       format_name: percent
#   dsv3:
#     title: The whole model
#     minutes: 90
#     after: [07_kv_cache, 10_node_limited_routing, 11_mtp]
#     builds: a block, the whole forward pass, the count of 671B by hand, FP8 weights read back
#     tracks: [two-days, term]
# ---

# %% [markdown] tags=["why"]
# # 12 · The whole model
#
# You have every part in your hands: norm and SwiGLU, rotations, latent attention, the gate with its groups and biases,
# the experts, the chain of multi-token prediction. In this lesson you join them: a block, then the model. Then you find
# out whether it *is* DeepSeek-V3. That has three sides, and each is a number that somebody else computed:
#
# - it gives the logits that another library gives, with the same weights;
# - it has 671,026,419,200 numbers in it, which you count by hand;
# - it reads the file format in which the model was released, 8-bit weights and all.
#
# The picture is the plan, with the lessons in which the parts were built. The main model runs along the upper line. The
# lower line takes its last state and the embedding of the token that came next, and looks one token further.

# %%
from dsv3_mini import ModelConfig
from dsv3_mini.viz.figures.whole_model import assembly_figure

large = ModelConfig.preset("671b")
assembly_figure(large)

# %% [markdown] tags=["paper"]
# ## In the report
#
# Section 2 of the DeepSeek-V3 technical report describes the model in 25 equations. Each has its place in the package:
#
# | equations | part | file in `dsv3_mini/model/` | lesson |
# |---|---|---|---|
# | 1-11 | multi-head latent attention (MLA) | `attention.py`, `rope.py` | 05, 06, 07 |
# | 12-15 | shared and routed experts, gate values | `moe.py`, `experts.py`, `router.py` | 08 |
# | 16 | the bias that chooses and does not weigh | `router.py` | 09, 10 |
# | 17-20 | the sequence-wise balance loss | in training: `train/balance.py` | 09 |
# | 21-25 | multi-token prediction (MTP) | `mtp.py` | 11 |
#
# What joins them has no number, as it is that of any decoder (lesson 04): a stream `x` of shape `[b s d]`, for `b` rows
# of `s` tokens with `d` numbers each, to which every part adds. Section 4.2 of the report gives the sizes. And some
# things stand only in the released code and weights; you meet them below.

# %% [markdown] tags=["naive"]
# ## The naive way
#
# A model file is a dictionary: names to tensors. A nano model will do to look at, 3 layers of width 64. Its weights are
# random, but `wake` has made them such that every rule shows: norms that are not 1, gates that decide, biases that are
# negative and spread. Why that matters is the subject of the experiment below.

# %%
import torch

import dsv3_mini as dsv3
from dsv3_mini.config import RopeScaling
from dsv3_mini.course.divergences import wake
from dsv3_mini.hub.names import released_tensors

yarn = RopeScaling(factor=4.0, original_max_position_embeddings=64)
sizes = dict(vocab_size=512, initializer_range=0.08, max_position_embeddings=256, rope_scaling=yarn)
cfg = ModelConfig.preset("nano", **sizes)
torch.manual_seed(0)
model = wake(dsv3.DeepSeekV3(cfg)).eval()
w = released_tensors(model)

# %%
print(f"{len(w)} tensors. Of layer 1, with the first of its {cfg.n_routed_experts} experts:")
for name, tensor in w.items():
    if ".layers.1." in name and (".experts." not in name or ".experts.0." in name):
        print(f"  {name:52} {list(tensor.shape)}")

# %% [markdown]
# Those are the names of the released checkpoint. Now compute with them, for one token, in plain products. Take the
# *first* token of a text, and attention becomes easy: the token sees only itself, the softmax of a single score is 1,
# and what comes out is its own value. Queries, keys and positions do not matter at all.


# %%
def norm(x, weight):
    """x [d] over its root mean square, times the weight."""
    return weight * x / (x.square().mean() + cfg.rms_norm_eps).sqrt()


def feed(x, name):
    """SwiGLU (lesson 04) with the three matrices of that name."""
    gate, up, down = (w[f"{name}.{part}_proj.weight"] for part in ("gate", "up", "down"))
    return down @ (torch.nn.functional.silu(gate @ x) * (up @ x))


# %%
def attend_to_itself(x, name):
    """MLA (lesson 06) of a token that sees only itself: down to the latent, up to the values of all heads, out."""
    latent = (w[f"{name}.kv_a_proj_with_mqa.weight"] @ x)[: cfg.kv_lora_rank]
    latent = norm(latent, w[f"{name}.kv_a_layernorm.weight"])
    key_value = (w[f"{name}.kv_b_proj.weight"] @ latent).view(cfg.num_attention_heads, -1)
    value = key_value[:, cfg.qk_nope_head_dim :]
    return w[f"{name}.o_proj.weight"] @ value.flatten()


# %%
def mixture(x, name):
    """The experts (lessons 08 to 10) for one token: score, choose in the best groups, weigh, add up."""
    affinity = (w[f"{name}.gate.weight"] @ x).sigmoid()
    groups = (affinity + w[f"{name}.gate.e_score_correction_bias"]).view(cfg.n_group, -1)
    best = groups.topk(2).values.sum(-1).topk(cfg.topk_group).indices
    allowed = torch.full_like(groups, -torch.inf)
    allowed[best] = groups[best]
    chosen = allowed.flatten().topk(cfg.num_experts_per_tok).indices
    gates = affinity[chosen] / affinity[chosen].sum() * cfg.routed_scaling_factor
    routed = [g * feed(x, f"{name}.experts.{e}") for g, e in zip(gates, chosen.tolist(), strict=True)]
    return sum(routed) + feed(x, f"{name}.shared_experts")


# %%
def first_token(token):
    """The logits [v] behind the first token of a text."""
    x = w["model.embed_tokens.weight"][token]
    for layer in range(cfg.num_hidden_layers):
        name = f"model.layers.{layer}"
        x = x + attend_to_itself(norm(x, w[f"{name}.input_layernorm.weight"]), f"{name}.self_attn")
        part = mixture if cfg.is_moe_layer(layer) else feed
        x = x + part(norm(x, w[f"{name}.post_attention_layernorm.weight"]), f"{name}.mlp")
    return w["lm_head.weight"] @ norm(x, w["model.norm.weight"])


# %%
tokens = torch.randint(0, cfg.vocab_size, (2, 48), generator=torch.Generator().manual_seed(1))
with torch.no_grad():
    logits = model(tokens).logits
naive = first_token(tokens[0, 0])
close = (naive - logits[0, 0]).abs().max() < 1e-5 * logits.abs().max()
assert close
print("the naive model agrees with the package on the first token:", bool(close))

# %% [markdown]
# Less than forty lines, and they are the whole model for that one token. For all the others you need what you built in
# lessons 05 to 07, for more than one row a batch, and to be fast the grouped experts of lesson 08. So leave the plain
# products behind, and join the real parts.

# %%
from torch import Tensor, nn

from dsv3_mini.course.checks import lesson_12 as check
from dsv3_mini.course.lesson import same, show_source
from dsv3_mini.model.attention import MultiHeadLatentAttention
from dsv3_mini.model.feed_forward import SwiGLU
from dsv3_mini.model.moe import MoE
from dsv3_mini.model.norm import RMSNorm
from dsv3_mini.model.rope import rotations

# %% [markdown]
# ## A block
#
# A layer has four parts. Which feed-forward it gets depends on its number: the first `first_k_dense_replace` layers (3
# at 671B) have a wide SwiGLU, all others a mixture of experts.


# %%
def make_block(cfg: ModelConfig, layer: int) -> nn.ModuleDict:
    """The parts of one layer, under their released names."""
    sparse = cfg.is_moe_layer(layer)
    return nn.ModuleDict(
        {
            "input_layernorm": RMSNorm(cfg.hidden_size, cfg.rms_norm_eps),
            "self_attn": MultiHeadLatentAttention(cfg),
            "post_attention_layernorm": RMSNorm(cfg.hidden_size, cfg.rms_norm_eps),
            "mlp": MoE(cfg, layer) if sparse else SwiGLU(cfg.hidden_size, cfg.intermediate_size),
        }
    )


# %%
blocks = [make_block(cfg, layer) for layer in range(cfg.num_hidden_layers)]
for layer, parts in enumerate(blocks):
    kind = type(parts["mlp"]).__name__
    print(f"layer {layer}, {kind:6}: {parts.load_state_dict(model.layers[layer].state_dict())}")

# %% [markdown] tags=["exercise"]
# ### Exercise 1 · One block
# ●○○ · 8 minutes
#
# Run the four parts. `x` `[b s d]` is the stream. `turn` holds the rotation of each of the `s` positions (lesson 05);
# attention is called as `parts["self_attn"](x, turn)`. Attention reads the stream through `input_layernorm`, the
# feed-forward reads it through `post_attention_layernorm`, and each adds what it found.
#
# The two kinds of feed-forward do not return the same thing. `SwiGLU` returns a tensor. `MoE` returns a pair: the
# tensor, and how the tokens were routed, which whoever watches the load wants to see. Here you need the tensor only.
#
# <details><summary>Hint 1</summary>Lesson 04's block: <code>x = x + part(norm(x))</code>, twice. The second part reads
# the stream as the first has left it.</details>
# <details><summary>Hint 2</summary><code>fed = fed[0] if isinstance(fed, tuple) else fed</code>. A bare
# <code>fed[0]</code> would take the first row of the batch where <code>fed</code> is a tensor.</details>


# %%
def block(parts: nn.ModuleDict, x: Tensor, turn: Tensor) -> Tensor:
    """x [b s d] -> [b s d]: attention and feed-forward, each behind its norm, each added to the stream."""
    ### BEGIN SOLUTION: add attention of the normed stream, then the feed-forward of the normed new stream
    x = x + parts["self_attn"](parts["input_layernorm"](x), turn)
    fed = parts["mlp"](parts["post_attention_layernorm"](x))
    fed = fed[0] if isinstance(fed, tuple) else fed
    return x + fed
    ### END SOLUTION


# %%
check.block(block)

# %% [markdown]
# ## The model
#
# Around the blocks stand an embedding, a last norm and a head, and beside them the MTP modules. These are all the parts
# there are: they take the whole model's weights, name by name, and none is left over. `Block` is the package's form of
# what you have just written; called as `layer(x, turn)` it returns the new stream and the routing (`None` for a dense
# layer). `MTPModule` is lesson 11's; called as `module(embedding, hidden, turn)` it returns the next depth's state,
# normed already, and its routing.

# %%
from dsv3_mini.model.block import Block
from dsv3_mini.model.mtp import MTPModule


def make_parts(cfg: ModelConfig) -> nn.ModuleDict:
    """All parts of a model, not yet joined."""
    d, layers = cfg.hidden_size, cfg.num_hidden_layers
    modules = nn.ModuleDict({"embed_tokens": nn.Embedding(cfg.vocab_size, d), "norm": RMSNorm(d, cfg.rms_norm_eps)})
    modules["layers"] = nn.ModuleList(Block(cfg, layer) for layer in range(layers))
    modules["mtp"] = nn.ModuleList(MTPModule(cfg, layers + j) for j in range(cfg.num_nextn_predict_layers))
    modules["lm_head"] = nn.Linear(d, cfg.vocab_size, bias=False)
    return modules


# %%
parts = make_parts(cfg)
print(parts.load_state_dict(model.state_dict()))

# %% [markdown] tags=["exercise"]
# ### Exercise 2 · The whole forward pass
# ●●● · 20 minutes
#
# From token numbers `[b s]` to logits `[b s v]` for `v` tokens of the vocabulary, and to a list with the logits of each
# MTP module.
#
# The main model: embed; run the layers in turn, each with `turn = rotations(cfg, torch.arange(s))`; norm; head.
#
# The MTP modules are a chain. Number `j` (1, 2, ...) reads, at position `i`, the state that the depth before left there
# (for the first one: the main model's, *after* the last norm) and the embedding of token `i + j`. So at depth `j` there
# are `s - j` positions: the states lose their last ones, the embeddings their first `j`. The head is the main model's.
# Where no position is left, the chain ends.
#
# <details><summary>Hint 1</summary>The released weights want the embedding first: <code>module(embedding[:, j:],
# hidden[:, : s - j], turn[: s - j])</code>.</details>
# <details><summary>Hint 2</summary>What a module returns is what the head reads <em>and</em> the
# <code>hidden</code> of the next depth.</details>
# <details><summary>Hint 3</summary>Layers and modules return pairs: <code>x, routing = layer(x, turn)</code>.</details>


# %%
def forward(cfg: ModelConfig, parts: nn.ModuleDict, tokens: Tensor) -> tuple[Tensor, list[Tensor]]:
    """tokens [b s] -> logits [b s v] of the next token, and for each MTP depth j logits [b s-j v] of the one j further."""
    ### BEGIN SOLUTION: embed, run the layers, norm, head; then the chain of MTP modules, each with the same head
    length = tokens.shape[1]
    turn = rotations(cfg, torch.arange(length))
    embedding = parts["embed_tokens"](tokens)
    x = embedding
    for layer in parts["layers"]:
        x, _ = layer(x, turn)
    hidden = parts["norm"](x)
    logits, mtp_logits = parts["lm_head"](hidden), []
    for depth, module in enumerate(parts["mtp"], start=1):
        kept = length - depth
        if kept < 1:
            break
        hidden, _ = module(embedding[:, depth:], hidden[:, :kept], turn[:kept])
        mtp_logits.append(parts["lm_head"](hidden))
    return logits, mtp_logits
    ### END SOLUTION


# %%
check.forward(forward)

# %% [markdown] tags=["package"]
# ## The package's own, and somebody else's
#
# `DeepSeekV3` does what you wrote. It has two more things to look after: a mask, where a row holds several documents
# that may not see each other, and the cache of lesson 07.

# %%
from dsv3_mini import DeepSeekV3

show_source(Block.forward, DeepSeekV3.main_states, DeepSeekV3.hidden_states)


# %%
def package_block(parts: nn.ModuleDict, x: Tensor, turn: Tensor) -> Tensor:
    return model.layers[blocks.index(parts)](x, turn)[0]


def package_forward(cfg: ModelConfig, parts: nn.ModuleDict, tokens: Tensor) -> tuple[Tensor, list[Tensor]]:
    out = model(tokens)
    return out.logits, out.mtp_logits


x, turn = torch.randn(2, 9, cfg.hidden_size), rotations(cfg, torch.arange(9))
same(block, package_block, *[(own, x, turn) for own in blocks])
same(forward, package_forward, (cfg, parts, tokens))

# %% [markdown]
# Now nothing but your own: your forward pass over your blocks.


# %%
class MyLayer:
    """Your block in the place of the package's: called in the same way, with no routing to show."""

    def __init__(self, parts: nn.ModuleDict) -> None:
        self.parts = parts

    def __call__(self, x: Tensor, turn: Tensor) -> tuple[Tensor, None]:
        return block(self.parts, x, turn), None


# %%
def my_model(tokens: Tensor) -> Tensor:
    """Logits [b s v] of the model that you have built."""
    return forward(cfg, {**dict(parts.items()), "layers": [MyLayer(own) for own in blocks]}, tokens)[0]


same(my_model, lambda tokens: model(tokens).logits, (tokens,), (tokens[:, :7],))

# %% [markdown]
# Yours equals the package's. But who says that the package is right? A mistake that you and it have in common would not
# show. So ask somebody who read the report on their own: the library *transformers* has a DeepSeek-V3, written by
# others. Save the weights as the released model's are saved, let it read them, and compare. (The course's environment
# has transformers for its tests. It is no part of the package, which never imports it.)


# %%
def logits_of_transformers(folder, tokens):
    """What transformers' DeepSeek-V3 makes of a checkpoint folder."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.set_verbosity_error()  # it would list MTP's weights, which its main model has no use for
    logging.disable_progress_bar()
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(folder)(tokens).logits


# %%
import tempfile
from importlib.util import find_spec
from pathlib import Path

scratch = tempfile.TemporaryDirectory()
folder = Path(scratch.name) / "awake"
dsv3.save_pretrained(model, folder, dtype=torch.float32)
if find_spec("transformers"):
    theirs = logits_of_transformers(folder, tokens)
    off = (theirs - logits).abs().max() / theirs.abs().max()
    print("dsv3_mini and transformers agree within 1e-5:", bool(off < 1e-5))
    same(my_model, lambda tokens: theirs, (tokens,))
else:
    print("transformers is not here: pip install transformers, restart the kernel, and run this notebook again")

# %% [markdown]
# ## What the report does not say
#
# The report alone would not have been enough. Where report and released code differ, or the report leaves something
# open, the weights decide: they were trained with the code. These are the places:
#
# | place | report | released code and weights |
# |---|---|---|
# | gate values | sum to 1 | are then multiplied by 2.5 (`routed_scaling_factor`) |
# | rank of a group | sum of its best two affinities | sum of its best two *with their biases* |
# | experts of other groups | not chosen | their preference becomes $-\infty$; with 0 they might win |
# | precision of the gate | BF16 or FP32 (section 3.3) | FP32 |
# | pairs of RoPE | left open | neighbours: 0 and 1, 2 and 3, ... |
# | YaRN, stretching `s` times | one factor, $0.1 \ln s + 1$ | on cosine and sine 1, on the softmax's scale its square |
# | MTP's input | state, then embedding | embedding, then state; and a norm of its own before the head |
# | first weights | standard deviation 0.006 | `config.json` says 0.02 |
#
# (What training has to do otherwise than one might read it, the balance loss and the rule for the bias, is lesson 09's.)
#
# Some can be seen on a few numbers, here; the others are run on a whole model, in the experiment below. First the rank
# of groups: four experts in two groups, of which the first is overloaded, so that its biases are low. Report and code
# choose different groups.

# %%
from einops import reduce

affinity = torch.tensor([0.9, 0.8, 0.7, 0.6])
bias = torch.tensor([-0.5, -0.4, 0.1, 0.0])
for what, numbers in (("affinity", affinity), ("affinity + bias", affinity + bias)):
    rank = reduce(numbers, "(g m) -> g", "sum", g=2)  # a group of two: its best two are all it has
    print(f"by {what:15}: sums {rank[0]:.1f} and {rank[1]:.1f}, group {int(rank.argmax())} is chosen")

# %% [markdown]
# Next the groups that were not chosen. All preferences are negative here, as they may become where many biases are.
# Group 0 is the better one; put the others at 0, and they win against the group that was chosen.

# %%
from dsv3_mini.model.router import limit_to_groups

preference = torch.tensor([[[-0.3, -0.2, -0.6, -0.5]]])
limited = limit_to_groups(preference, n_group=2, topk_group=1)
at_zero = limited.masked_fill(limited.isinf(), 0.0)
print("at -inf, experts", sorted(limited.topk(2).indices.flatten().tolist()), "are chosen")
print("at 0, experts", sorted(at_zero.topk(2).indices.flatten().tolist()), "are chosen")

# %% [markdown]
# The gate's precision. 256 experts, 8 of them chosen: the eighth and the ninth are often closer to each other than two
# neighbouring BF16 numbers.

# %%
scores = torch.randn(4096, 256, generator=torch.Generator().manual_seed(0))
exact, rounded = (scores.to(kind).sigmoid().topk(8).indices.sort().values for kind in (torch.float32, torch.bfloat16))
changed = (exact != rounded).any(-1).float().mean()
print("in BF16 more than one token in ten goes to another expert:", bool(changed > 0.1))

# %% [markdown]
# YaRN's two factors (lesson 05). They are switched on by the *configured* length of the context, whatever the length of
# the text at hand.

# %%
from dsv3_mini.model.rope import rotation_scale, softmax_scale

for length in (large.max_position_embeddings, 4096):
    at = large.replace(max_position_embeddings=length)
    plain = at.qk_head_dim**-0.5
    print(f"configured for {length:>7,}: cosine and sine x {rotation_scale(at):.3f}, ", end="")
    print(f"softmax scale x {softmax_scale(at) / plain:.3f}")

# %% [markdown] tags=["experiment"]
# ## Experiment: would the comparison have noticed?
#
# Two models agree within 1e-5. That proves as much as the weights can show, and no more. Take a model, do *one* thing
# otherwise, and look how far its logits move: if they stay where they are, a comparison on those weights says nothing
# about that thing. `DIVERGENCES` holds eleven ways of doing one thing otherwise: places from the table above, and
# mistakes that people make.
#
# Three sets of weights: **fresh**, initialised as in the report (standard deviation 0.006, norms 1, biases 0);
# **trained**, the tiny model that comes with the course; **awake**, the ones with which we compared.
#
# **What we expect.** In a fresh model all biases are 0, so it cannot know about three of the eleven: who sees the bias
# when groups are ranked, whether it gets into the gate values, and, as no preference is ever negative, whether other
# groups are put at 0. The experiment fails if those move a logit of the fresh model, or if the awake weights let *any*
# of the eleven pass: then our proof above has a hole.

# %%
from dsv3_mini.course.divergences import DIVERGENCES, BiasWeighs, altered, largest_change

show_source(altered, largest_change, BiasWeighs)
for name in DIVERGENCES:
    print(name)

# %%
from dsv3_mini.data.shipped import shipped
from dsv3_mini.data.stream import held_out_rows
from dsv3_mini.data.tokenizer import Tokenizer

TOLERANCE = 1e-5
tokenizer, trained = Tokenizer.shipped(), dsv3.from_pretrained(shipped("tiny")).eval()
story = held_out_rows("stories", tokenizer, seq_len=48, rows=2).tokens
torch.manual_seed(0)
fresh = DeepSeekV3(cfg.replace(initializer_range=0.006))
compared = {"fresh": (fresh, tokens), "trained": (trained, story), "awake": (model, tokens)}
changes = {
    weights: {name: largest_change(one, name, read) for name in DIVERGENCES}
    for weights, (one, read) in compared.items()
}

# %%
from dsv3_mini.viz.figures.whole_model import visibility_figure

visibility_figure(changes, TOLERANCE)

# %%
unseen = {weights: [name for name, change in own.items() if change == 0] for weights, own in changes.items()}
for weights, names in unseen.items():
    print(f"{weights}: {len(names)} change nothing at all", *names, sep="\n    ")
about_the_bias = {"groups ranked without the bias", "other groups at 0, not -inf", "gate values contain the bias"}
assert about_the_bias <= set(unseen["fresh"])
assert min(changes["awake"].values()) > 100 * TOLERANCE
print("awake weights show each of them, more than a hundred times above the tolerance")

# %% [markdown]
# Trained weights are witnesses of another kind, and not perfect either. The tiny model was configured for 512 tokens
# and has no YaRN, so nothing about YaRN can show. And where an affinity plus its bias never falls below 0, it does not
# matter what the other groups are put at. "It writes good text" is no proof that every line of a model is right.
#
# ## The ledger, by hand
#
# The second number. How many does the model have in it? A matrix that takes `i` numbers to `o` has `o * i` of them;
# there are no additive biases in it, but for the one of the gate. MLA has five matrices and two norms:
#
# | tensor | numbers | what it does |
# |---|---|---|
# | `q_a_proj` | `q_lora_rank * d` | compresses the query |
# | `q_a_layernorm` | `q_lora_rank` | |
# | `q_b_proj` | `heads * (nope + rope) * q_lora_rank` | widens it to all heads |
# | `kv_a_proj_with_mqa` | `(kv_lora_rank + rope) * d` | the latent, and one turned key for all heads |
# | `kv_a_layernorm` | `kv_lora_rank` | |
# | `kv_b_proj` | `heads * (nope + value) * kv_lora_rank` | widens the latent to keys and values |
# | `o_proj` | `d * heads * value` | all heads' outputs, back to the stream |
#
# The widths are in the config: `nope` is `qk_nope_head_dim`, `rope` is `qk_rope_head_dim`, `value` is `v_head_dim`.
# Where `q_lora_rank` is `None` (as in the preset `16b`) one matrix makes the queries.

# %% [markdown] tags=["exercise"]
# ### Exercise 3 · Six hundred and seventy-one billion
# ●●○ · 18 minutes
#
# Count, for any config, and return a dict with these keys:
#
# - `"attention"`: the table above, for one layer;
# - `"dense FFN"`: a SwiGLU of width `intermediate_size`; `"expert"`: one of width `moe_intermediate_size`;
# - `"gate"`: a row of `d` numbers and one bias for each of `n_routed_experts`;
# - `"dense layer"`: attention, dense FFN and two norms; `"sparse layer"`: attention, gate, two norms, and all experts,
#   `n_routed_experts` of them and `n_shared_experts` shared ones;
# - `"main"`: embedding, all layers, the last norm, head. MTP modules are not counted.
#
# <details><summary>Hint 1</summary>A SwiGLU has three matrices: gate, up, down. A norm has <code>d</code>
# numbers.</details>
# <details><summary>Hint 2</summary>Embedding and head are two matrices of <code>vocab_size * d</code>.</details>
# <details><summary>Hint 3</summary>The check compares key by key, on small numbers first: start with
# <code>"attention"</code> and run it.</details>


# %%
def count(cfg: ModelConfig) -> dict[str, int]:
    """Numbers in one attention, dense FFN, expert, gate, dense layer and sparse layer, and in the main model."""
    ### BEGIN SOLUTION: the sides of every matrix multiplied; what belongs together added up; layers of each kind
    d, heads, rank, latent = cfg.hidden_size, cfg.num_attention_heads, cfg.q_lora_rank, cfg.kv_lora_rank
    nope, rope, value = cfg.qk_nope_head_dim, cfg.qk_rope_head_dim, cfg.v_head_dim
    queries = heads * (nope + rope)
    query = d * queries if rank is None else d * rank + rank + rank * queries
    key_value = d * (latent + rope) + latent + latent * heads * (nope + value)
    attention = query + key_value + heads * value * d
    dense_ffn, expert = 3 * d * cfg.intermediate_size, 3 * d * cfg.moe_intermediate_size
    gate = cfg.n_routed_experts * (d + 1)
    experts = cfg.n_routed_experts + cfg.n_shared_experts
    dense_layer = attention + dense_ffn + 2 * d
    sparse_layer = attention + gate + experts * expert + 2 * d
    dense = cfg.first_k_dense_replace
    layers = dense * dense_layer + (cfg.num_hidden_layers - dense) * sparse_layer
    one_each = {"attention": attention, "dense FFN": dense_ffn, "expert": expert, "gate": gate}
    main = 2 * cfg.vocab_size * d + layers + d
    return {**one_each, "dense layer": dense_layer, "sparse layer": sparse_layer, "main": main}
    ### END SOLUTION


# %%
check.count(count)

# %% [markdown]
# The package's ledger keeps a list of all tensors, with their shapes, and sums over it. For the main model it reads:

# %%
from dsv3_mini.ledger import count_parameters

counts = count_parameters(large)
for part, times in counts.main_blocks:
    print(f"{times:>3} x {part.name:12} {part.total:>15,} = {times * part.total:>16,}")
print(f"{'main model':36} {counts.main:>16,}")
assert counts.main == 671_026_419_200

# %%
from dsv3_mini.config import PRESETS


def by_the_ledger(cfg: ModelConfig) -> dict[str, int]:
    own = count_parameters(cfg)
    ffns = {"dense FFN": own.dense_ffn, "expert": own.expert, "gate": own.gate}
    layers = {"dense layer": own.dense_layer, "sparse layer": own.moe_layer}
    parts = {"attention": own.attention, **ffns, **layers}
    return {**{name: part.total for name, part in parts.items()}, "main": own.main}


same(count, by_the_ledger, *[(ModelConfig.preset(name),) for name in PRESETS])

# %% [markdown]
# A sum of one's own formulas is not yet a model. Build it, then. 671 billion FP32 numbers are 2.7 TB, but on torch's
# *meta* device a tensor has a shape and a type and no numbers, and takes no memory: the released model is here in a
# second, and even runs, as far as shapes go.

# %%
with torch.device("meta"):
    built = DeepSeekV3(large)
held = sum(tensor.numel() for name, tensor in built.state_dict().items() if not name.startswith("mtp."))
assert held == counts.main
print(f"the built main model holds {held:,} numbers, {held * 4 / 1e12:.1f} TB in FP32")
with torch.device("meta"), torch.no_grad():
    out = built(torch.zeros(1, 4096, dtype=torch.long))
print("a row of 4,096 tokens: logits", list(out.logits.shape), "and MTP's", list(out.mtp_logits[0].shape))
print(f"routed in {len(out.routing)} layers, MTP's counted; experts of a token:", out.routing[0].chosen.shape[-1])

# %% [markdown] tags=["interactive"]
# ## Where the parameters are
#
# The ledger as a map: areas are numbers of parameters. Look at *all* of them first, then at those *at work for one
# token*: a token visits 8 of 256 experts in each layer, and the map changes its face. Choose *by layer* and find the
# three dense layers (bare numbers are those of layers). Then walk down to `tiny`, in which embedding and head are a
# large share: a vocabulary does not shrink with the model.

# %%
from dsv3_mini.viz.figures.whole_model import COUNTED, tiles
from dsv3_mini.viz.widgets.whole_model import treemap_explorer

areas = treemap_explorer()
areas

# %%
before = areas.picture.value
areas.set(counted="at work for one token", by="layer")
assert areas.picture.value != before and areas.values["model"] == "671b"
for counted in COUNTED:
    laid = tiles(large, "part", counted, mtp=False)
    in_experts = sum(tile.count for tile in laid if tile.part == "routed experts")
    total = sum(tile.count for tile in laid)
    print(f"{counted:22} {total:>16,}, in routed experts {in_experts / total:.0%}")

# %% [markdown]
# A config of your own goes in by name: `treemap_explorer({"few experts": large.replace(n_routed_experts=64)})`.
#
# ## Reading the released format
#
# The third side. The model was released as a folder: a `config.json`, *safetensors* files, and an index that says which
# tensor is in which file. Make such a folder of the trained tiny model.

# %%
fp8 = Path(scratch.name) / "fp8"
dsv3.save_pretrained(trained, fp8, dtype=torch.float8_e4m3fn)
for file in sorted(fp8.iterdir()):
    print(f"{file.name:36} {file.stat().st_size:>9,} bytes")

# %%
from collections import Counter

from dsv3_mini.hub import Fp8Weight, read_tensors

stored = read_tensors(fp8)
print(Counter(stored.stored_dtype(name) for name in stored))
weight = stored["model.layers.0.mlp.down_proj.weight"]
for what, tensor in (("weight", weight.q), ("weight_scale_inv", weight.scale)):
    print(f"{what:18} {str(tensor.dtype):20} {list(tensor.shape)}")
print("largest number of the weight:", weight.q.float().abs().max().item())

# %% [markdown]
# Most tensors are in **E4M3**: 8 bits, of which 4 are an exponent and 3 are digits; the largest number is 448. (Lesson
# 15 takes it apart bit by bit.) So few digits are enough only if the numbers use the range well. Therefore a matrix is
# cut into blocks of 128 x 128, and each block has a **scale** in FP32: its largest number divided by 448. Stored is the
# weight divided by the scale. In the file the scale is called `weight_scale_inv`.

# %% [markdown] tags=["exercise"]
# ### Exercise 4 · Back from 8 bits
# ●●○ · 12 minutes
#
# `q` is `[o i]` in E4M3, `scale` is `[ceil(o/128) ceil(i/128)]` in FP32. Give back the weight `[o i]` in FP32. A matrix
# whose sides are no multiples of 128 has narrower blocks at its lower and right edge; they have a scale like any other.
#
# <details><summary>Hint 1</summary>The name misleads. Stored is the weight divided by the scale, so what brings it
# back?</details>
# <details><summary>Hint 2</summary>Spread the grid of scales over whole blocks first, <code>repeat(scale, "a b -> (a p)
# (b q)", p=128, q=128)</code>, and then cut it to the shape of the weight.</details>

# %%
from einops import repeat


def dequantise(q: Tensor, scale: Tensor) -> Tensor:
    """q [o i] in E4M3, scale [ceil(o/128) ceil(i/128)] -> the weight [o i] in FP32."""
    ### BEGIN SOLUTION: each block of 128 x 128 times its scale, in FP32, the spread scales cut to the shape of q
    rows, columns = q.shape
    spread = repeat(scale, "a b -> (a p) (b q)", p=128, q=128)[:rows, :columns]
    return q.float() * spread
    ### END SOLUTION


# %%
check.dequantise(dequantise)

# %%
show_source(Fp8Weight)
in_fp8 = [stored[name] for name in stored if stored.stored_dtype(name) == "F8_E4M3"]
same(dequantise, lambda q, scale: Fp8Weight(q, scale).dequantise(), *[(one.q, one.scale) for one in in_fp8[:20]])

# %% [markdown]
# `from_pretrained` does this for every tensor, one at a time, and fills a model with them. What do 8 bits cost? Three
# digits after the leading one leave an error of at most 1/16 of a number, some up and some down, and every output sums
# over many. We expect that the loss on stories that the model never read moves by less than 1%.

# %%
from dsv3_mini.evaluate.bits_per_byte import held_out_loss

rows = held_out_rows("stories", tokenizer, seq_len=256, rows=8).tokens


def loss_of(model: DeepSeekV3) -> float:
    return held_out_loss(model, rows, tokenizer.pad_id).per_token


from_8_bits = dsv3.from_pretrained(fp8).eval()
moved = loss_of(from_8_bits) / loss_of(trained) - 1
print("read from 8 bits, the loss moves by less than 1%:", abs(moved) < 0.01)
assert abs(moved) < 0.01

# %% [markdown]
# ## Find the bug
#
# In the files every expert is a tensor of its own; in the model they are stacked, `[e o i]`, for the grouped product of
# lesson 08. Somebody writes a loader. It finds all names of a layer's experts, sorts them, since a dictionary promises
# no order, and stacks. It passes all tests on the nano model. With the tiny one every shape fits, too.


# %%
def stack_badly(tensors, layer: int, part: str) -> Tensor:
    """One matrix of every expert of a layer, stacked -> [e o i]."""
    stem = f"model.layers.{layer}.mlp.experts."
    names = [name for name in tensors if name.startswith(stem) and name.endswith(f".{part}.weight")]
    return torch.stack([tensors[name] for name in sorted(names)])


for one in (model, trained):
    right = one.layers[1].mlp.experts.down_proj
    wrong = stack_badly(released_tensors(one), 1, "down_proj")
    print(f"{one.cfg.n_routed_experts:>2} experts: same shape {right.shape == wrong.shape},", end=" ")
    print(f"same numbers {torch.equal(right, wrong)}")

# %%
import copy

broken = copy.deepcopy(trained)
for layer, own in enumerate(broken.layers):
    for part in ("gate_proj", "up_proj", "down_proj") if trained.cfg.is_moe_layer(layer) else ():
        wrong = stack_badly(released_tensors(trained), layer, part)
        width = wrong.shape[1]
        target = own.mlp.experts.down_proj if part == "down_proj" else own.mlp.experts.gate_up_proj
        rows_of = {"gate_proj": slice(0, width), "up_proj": slice(width, None)}.get(part, slice(None))
        target.data[:, rows_of] = wrong
worse = loss_of(broken) - loss_of(trained)
assert worse > 0.1
print("the loss is higher by more than 0.1 nats a token:", worse > 0.1)

# %% [markdown] tags=["bug"]
# ### Find the bug · The experts change places
# ●●○ · 10 minutes
#
# No error, every shape right, and the model writes worse. Write the loader as it should be. `tensors` maps released
# names to tensors, in no particular order, of all layers, with shared experts among them; `part` is one of `gate_proj`,
# `up_proj`, `down_proj`. Row `e` of the result must be expert number `e`: the gate knows experts by their number only.
#
# <details><summary>Hint 1</summary>Print <code>sorted(["experts.2", "experts.10"])</code>.</details>
# <details><summary>Hint 2</summary>Cut the number out of the name, <code>int(...)</code>, and sort by it; or ask for
# number 0, 1, 2, ... as long as there is one.</details>


# %%
def stack_experts(tensors: dict[str, Tensor], layer: int, part: str) -> Tensor:
    """One matrix of every expert of a layer, stacked in the order of their numbers -> [e o i]."""
    ### BEGIN SOLUTION: the names of this layer's routed experts and this part, sorted by the number in them
    stem, end = f"model.layers.{layer}.mlp.experts.", f".{part}.weight"
    names = [name for name in tensors if name.startswith(stem) and name.endswith(end)]
    names.sort(key=lambda name: int(name.removeprefix(stem).removesuffix(end)))
    return torch.stack([tensors[name] for name in names])
    ### END SOLUTION


# %%
check.stack_experts(stack_experts)

# %% [markdown] tags=["at-671b"]
# ## At 671B
#
# What is on disk when the real model is downloaded? Take the names and shapes of the model on the meta device, and ask
# the package how the released layout stores each. MTP's layer comes with copies of embedding and head of its own.

# %%
from dsv3_mini.hub.names import shared_names
from dsv3_mini.hub.save import stored_layout

tensors = released_tensors(built)
tensors.update({own: tensors[main] for own, main in shared_names(large).items()})
numbers = Counter()
for name, tensor in tensors.items():
    for shape, dtype in stored_layout(name, tensor.shape, torch.float8_e4m3fn).values():
        numbers[dtype] += shape.numel()
for dtype, many in numbers.most_common():
    print(f"{many:>15,} numbers of {str(dtype).removeprefix('torch.'):14} {many * dtype.itemsize / 1e9:7.1f} GB")
print(f"in {len(tensors):,} tensors, the scales not counted")

# %%
from dsv3_mini.ledger import checkpoint_bytes

for kind in ("fp8", "bf16"):
    print(f"released folder in {kind}: {checkpoint_bytes(large, weights=kind) / 1e9:,.0f} GB")
scales = numbers[torch.float32] - counts.gate_biases - counts.mtp_module["gate bias"]
assert checkpoint_bytes(large) == sum(many * dtype.itemsize for dtype, many in numbers.items())
print(f"{scales:,} scales are {4 * scales / checkpoint_bytes(large):.2%} of the bytes")
print(f"the MTP layer: {counts.mtp_unique:,} numbers of its own, {counts.mtp_shipped:,} as shipped")

# %%
share = counts.activated / counts.main
print(f"at work for one token: {counts.activated:,}, {share:.1%} of the main model")
at_work = large.num_experts_per_tok + large.n_shared_experts
print(f"experts at work: {at_work} of {large.n_routed_experts + large.n_shared_experts} in each of", end=" ")
print(f"{counts.moe_layers} layers, {counts.moe_layers * at_work * counts.expert.total / counts.activated:.0%} of that")

# %% [markdown] tags=["recap"]
# ## Recap
#
# 1. Your model and transformers' agree within 1e-5 on a freshly initialised checkpoint. Name something that may still
#    be wrong.
#    <details><summary>Answer</summary>All that concerns the gate's bias, which is 0 there: whether groups are ranked
#    with it, whether it leaks into the gate values, whether other groups are put at 0. And norms whose weight is 1 could
#    be exchanged without a trace.</details>
# 2. Which numbers of the 671,026,419,200 does no gradient ever reach, and what moves them?
#    <details><summary>Answer</summary>The biases of the gates, 256 in each of 58 layers: 14,848. They are a buffer. A
#    rule moves them after each step, by the load that the experts had (lesson 09).</details>
# 3. A colleague loads an FP8 checkpoint, and the weights come out far too large, every one of them. What happened?
#    <details><summary>Answer</summary>They divided by <code>weight_scale_inv</code>. The scale is a block's largest
#    number over 448, far below 1, and it multiplies: W = q * scale.</details>

# %% [markdown] tags=["next"]
# ## Next
#
# The model is complete: from here on it does not change any more. What changes is its weights. In lesson 13 you
# train it: learning rate and batch size as functions of the tokens read, a loss with MTP's share in it, the biases'
# rule running beside the optimizer, and a board on which you watch it all live.
