# ---
# jupyter:
#   jupytext:
#     text_representation:
#       format_name: percent
#   dsv3:
#     title: Latent attention
#     minutes: 85
#     after: [05_rope]
#     builds: attention whose heads share keys, the latent and its rotated key, and the best cut of a trained latent
#     tracks: [half-day, two-days, term]
# ---

# %% [markdown] tags=["why"]
# # 06 · Latent attention
#
# A model that writes a text asks, at every new token, about all tokens before. What it asks them for are keys and
# values, and those do not change any more once they are there. So they are kept, in the *cache*. In plain **multi-head
# attention** (MHA, lesson 04) a token leaves a key and a value for each head, in each layer. With many heads and a long
# text the cache becomes as large as the model.
#
# In this lesson you make it small in three ways, and measure what that costs: heads that share a key and a value, in
# groups (GQA) or all together (MQA); and DeepSeek's way, **multi-head latent attention** (MLA), in which a token leaves
# one short vector from which every head rebuilds a key and a value of its own.

# %%
from dsv3_mini.viz.figures.mla import sharing_figure

sharing_figure(heads=8, groups=2)

# %% [markdown]
# How much is it? The released model has 128 heads in each of 61 layers, and reads texts of 128K tokens. The ledger
# counts what the four kinds of attention would cache there, in BF16, which takes two bytes a number.

# %%
from dsv3_mini import ModelConfig
from dsv3_mini.ledger import cache_per_token

large = ModelConfig.preset("671b")
cache = cache_per_token(large)
for kind in ("mha", "gqa", "mqa", "mla"):
    per_token = cache.bytes(kind)
    print(f"{kind.upper()}: {per_token:>9,} bytes a token, {per_token * 131_072 / 1e9:6.1f} GB for 128K tokens")
print(f"GQA here has {cache.groups} groups of {large.num_attention_heads // cache.groups} heads")

# %% [markdown] tags=["paper"]
# ## In the report
#
# Section 2.1.1. The letters of the course: `d` is the width of the stream, `h` the number of heads; `c` is the width of
# the **latent**, the short vector. A query and a key have two parts: `n` numbers that know no position ("nope") and `r`
# numbers that RoPE has turned. A value has `v`. Let $x$ be a token's vector where it enters attention. Each $W$ is a
# learned matrix; in its name D stands for down, to the latent, and U for up, from it.
#
# | equations | what | wide | at 671B | cached |
# |---|---|---|---|---|
# | 1 | the latent, $c^{KV} = W^{DKV} x$ | `c` | 512 | yes |
# | 2, 5 | keys and values of all heads, $k^C = W^{UK} c^{KV}$, $v = W^{UV} c^{KV}$ | `h n`, `h v` | 128 · 128 each | no |
# | 3 | one turned key for all heads, $k^R = \mathrm{RoPE}(W^{KR} x)$ | `r` | 64 | yes |
# | 4 | the key of a head, $[k^C; k^R]$ | `n + r` | 192 | no |
# | 6 to 9 | queries, in the same way from a latent of their own, $c^Q = W^{DQ} x$ | `h (n + r)` | from 1536 | no |
# | 10 | attention, with scores divided by $\sqrt{n + r}$ | `h v` | | no |
# | 11 | the output matrix $W^O$ | `d` | 7168 | no |
#
# Both latents pass through an RMSNorm, and it is the normed one that is cached. In the released weights
# `kv_a_proj_with_mqa` makes latent and turned key (1 and 3), `kv_b_proj` the keys and values (2 and 5).

# %% [markdown] tags=["naive"]
# ## The naive way
#
# First the sharing of keys. There are `h` heads that ask, and `g` groups, each with one key and one value for `h / g`
# neighbouring heads. With `g = h` this is MHA, with `g = 1` **multi-query attention** (MQA), in between **grouped-query
# attention** (GQA).

# %%
heads = 8
for groups in (8, 2, 1):
    reads = [head * groups // heads for head in range(heads)]
    print(f"g = {groups}: heads 0 to 7 read key and value number {reads}")

# %% [markdown]
# And this is attention with it, head by head.

# %%
import torch
from einops import einsum, rearrange, repeat
from torch import Tensor


def naive_grouped(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """query [b s h q], key [b t g q], value [b t g v] -> [b s h v]."""
    heads, groups, outputs = query.shape[2], key.shape[2], []
    for head in range(heads):
        group = head * groups // heads
        scores = einsum(query[:, :, head], key[:, :, group], "b s q, b t q -> b s t") / query.shape[-1] ** 0.5
        later = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
        outputs.append(scores.masked_fill(later, -torch.inf).softmax(dim=-1) @ value[:, :, group])
    return torch.stack(outputs, dim=2)


# %% [markdown] tags=["exercise"]
# ### Exercise 1 · Heads that share
# ●○○ · 12 minutes
#
# Write it without the loop, for any number of groups. The mask and the scale are those of lesson 04: no key with `t >
# s`, scores divided by the root of the width `q` of a query.
#
# Keys need not be copied for that. Give the heads two letters, `g` for the group and `m` for the member of a group, and
# let einsum do the sharing: what has no `m` is the same for all of them.
#
# <details><summary>Hint 1</summary><code>rearrange(query, "b s (g m) q -> b s g m q", g=key.shape[2])</code>: the
# members of a group are neighbours, so <code>m</code> stands on the right.</details>
# <details><summary>Hint 2</summary>Scores are <code>"b g m s t"</code>. At the end the output has its heads in one axis
# again, <code>(g m)</code>.</details>


# %%
def grouped_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """query [b s h q], key [b t g q], value [b t g v] -> [b s h v], causal: each group serves h / g neighbouring heads."""
    ### BEGIN SOLUTION: split h into (g m); scores "b g m s t" by einsum, scaled and masked; softmax over t; values by einsum
    query = rearrange(query, "b s (g m) q -> b s g m q", g=key.shape[2])
    scores = einsum(query, key, "b s g m q, b t g q -> b g m s t") / query.shape[-1] ** 0.5
    later = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    weights = scores.masked_fill(later, -torch.inf).softmax(dim=-1)
    return rearrange(einsum(weights, value, "b g m s t, b t g v -> b s g m v"), "b s g m v -> b s (g m) v")
    ### END SOLUTION


# %%
from dsv3_mini.course.checks import lesson_06 as check

check.grouped_attention(grouped_attention)

# %% [markdown]
# ## The same weights
#
# Is a smaller cache bought with a smaller model? Not if you keep the budget. Let heads be `w` wide, in queries, keys
# and values alike. A head that asks costs `2 d w` weights, for its query and its part of the output matrix. A group
# that answers costs `2 d w`, for its key and value. So what counts is heads plus groups: who gives up three groups can
# have three more heads.

# %%
d, w = 64, 16
for name, heads, groups in (("MHA", 4, 4), ("GQA", 6, 2), ("MQA", 7, 1)):
    weights = 2 * d * w * (heads + groups)
    print(f"{name}: {heads} heads ask, {groups} answer: {weights:,} weights, {2 * groups * w:>3} numbers cached")

# %% [markdown]
# ## A latent
#
# Look at GQA once more. A token leaves `2 g w` numbers, and the keys and values of all heads come from them: copied,
# one to each member of the group. Copying is a matrix too, of zeros and ones. Here it is, for 6 heads in 2 groups with
# keys and values of 4. What a token leaves is laid out group by group, key before value.

# %%
heads, groups, w = 6, 2, 4
left = torch.randn(1, 5, groups * 2 * w)  # [b t c]: what 5 tokens leave
copy = repeat(torch.eye(groups * 2 * w), "(g kv) c -> (g m kv) c", g=groups, m=heads // groups)
rebuilt = rearrange(einsum(left, copy, "b t c, o c -> b t o"), "b t (h kv) -> b t h kv", h=heads)
by_group = rearrange(left, "b t (g kv) -> b t g kv", g=groups)
print("a matrix of shape", list(copy.shape), "rebuilds", heads, "keys and values from", left.shape[-1], "numbers")
print(
    "each is its group's:",
    all(torch.equal(rebuilt[:, :, i], by_group[:, :, i * groups // heads]) for i in range(heads)),
)

# %% [markdown]
# So GQA is a latent with an up-projection that may only copy. MLA lets that matrix be *any* matrix, and lets its width
# `c` be any number. What MLA can express with a latent of `2 g w` is more than GQA with `g` groups can: every head has
# keys and values of its own, and the numbers of the latent go to whatever needs them, keys or values, this head or
# that. The price is the weights of the up-projection.
#
# One thing does not fit into a latent: where its token stands. Lesson 05 tried to put it there, and what worked was a
# part of its own: one small key of `r` numbers, turned by its position and shared by all heads, which each head appends
# to what it rebuilds.

# %% [markdown] tags=["exercise"]
# ### Exercise 2 · What a token leaves
# ●○○ · 10 minutes
#
# Equations 1 and 3. One matrix `down` of shape `[(c r), d]` makes both: its first `c` rows the latent, its last `r`
# rows the shared key. Then they part. The latent goes through an RMSNorm, `torch.nn.functional.rms_norm(latent, [c],
# weight, eps)`. The key is turned, `rotate(key_rope, turn)`, with the function from lesson 05: `turn` holds one
# rotation for each position and pair.
#
# <details><summary>Hint 1</summary>One einsum, then <code>.split([c, r], dim=-1)</code>. <code>c</code> is
# <code>len(weight)</code>.</details>
# <details><summary>Hint 2</summary>Neither does the norm see the key, nor does the rotation see the latent.</details>

# %%
from torch.nn.functional import rms_norm

from dsv3_mini.model.rope import rotate


def compress(x: Tensor, down: Tensor, weight: Tensor, eps: float, turn: Tensor) -> tuple[Tensor, Tensor]:
    """x [b s d], down [(c r) d], weight [c], turn [s pairs] -> latent [b s c], normed, and key_rope [b s r], turned."""
    ### BEGIN SOLUTION: x through down, split into c and r numbers; rms_norm for the first part, rotate for the second
    c = len(weight)
    latent, key_rope = einsum(x, down, "b s d, cr d -> b s cr").split([c, len(down) - c], dim=-1)
    return rms_norm(latent, [c], weight, eps), rotate(key_rope, turn)
    ### END SOLUTION


# %%
check.compress(compress)

# %% [markdown] tags=["exercise"]
# ### Exercise 3 · Keys and values of all heads
# ●●○ · 12 minutes
#
# Equations 2, 4 and 5, for cached tokens `t`. `up` is $W^{UK}$ and $W^{UV}$ in one matrix `[(h nv), c]`, as the
# released weights have it: ordered by head, and each head's `nv = n + v` rows are first the `n` of its key, then the
# `v` of its value. A head's key is its own `n` numbers and after them the `r` that all heads share.
#
# <details><summary>Hint 1</summary>Rebuild, split the heads, <code>"b t (h nv) -> b t h nv"</code>, and only then cut
# <code>nv</code> in two.</details>
# <details><summary>Hint 2</summary><code>repeat(key_rope, "b t r -> b t h r", h=heads)</code>, then
# <code>torch.cat</code>.</details>


# %%
def expand(latent: Tensor, key_rope: Tensor, up: Tensor, heads: int, nope: int) -> tuple[Tensor, Tensor]:
    """latent [b t c], key_rope [b t r], up [(h nv) c] -> key [b t h (n r)] and value [b t h v]; `nope` is n."""
    ### BEGIN SOLUTION: latent through up, heads split, each head's row cut after n; the shared key behind each head's own
    both = rearrange(einsum(latent, up, "b t c, hnv c -> b t hnv"), "b t (h nv) -> b t h nv", h=heads)
    shared = repeat(key_rope, "b t r -> b t h r", h=heads)
    return torch.cat([both[..., :nope], shared], dim=-1), both[..., nope:]
    ### END SOLUTION


# %%
check.expand(expand)

# %% [markdown] tags=["package"]
# ## The package's own
#
# `dsv3_mini` has your two functions as methods. (`cache` and `absorbed`, the second way to compute the same, are for
# lesson 07: there the latents stay in the cache and the keys are never built.)

# %%
from dsv3_mini.course.lesson import same, show_source
from dsv3_mini.model.attention import MultiHeadLatentAttention

show_source(MultiHeadLatentAttention._latents, MultiHeadLatentAttention.expanded)

# %% [markdown]
# Queries go the same way, down to a latent of `q_lora_rank` numbers, through a norm, and up to all heads (equations 6
# to 9). Nothing of a query is cached, so this saves no cache. It saves weights, as two thin matrices are smaller than a
# thick one, and it saves memory in training, where the thin latent is kept for the backward pass and the wide queries
# can be made again.

# %%
from dsv3_mini.model.rope import rotations

cfg = ModelConfig.preset("nano")
torch.manual_seed(0)
layer = MultiHeadLatentAttention(cfg).requires_grad_(False)
layer.kv_a_layernorm.weight.uniform_(0.5, 1.5)


def queries(x: Tensor, turn: Tensor) -> Tensor:
    down, norm, up = layer.q_proj
    query = rearrange(up(norm(down(x))), "b s (h q) -> b s h q", h=layer.heads)
    nope, rope = query.split([layer.nope, layer.rope], dim=-1)
    return torch.cat([nope, rotate(rope, turn)], dim=-1)  # [b s h (n r)], in the order of the keys


# %% [markdown]
# Put together, your three functions are a layer of DeepSeek-V3. Once the keys of all heads are built, there are as many
# groups as heads.


# %%
def attend_with_yours(x: Tensor) -> Tensor:
    turn = rotations(cfg, torch.arange(x.shape[1]))
    norm, down = layer.kv_a_layernorm, layer.kv_a_proj_with_mqa.weight
    latent, key_rope = compress(x, down, norm.weight, norm.eps, turn)
    key, value = expand(latent, key_rope, layer.kv_b_proj.weight, layer.heads, layer.nope)
    mixed = grouped_attention(queries(x, turn), key, value)
    return layer.o_proj(rearrange(mixed, "b s h v -> b s (h v)"))


def attend_with_the_packages(x: Tensor) -> Tensor:
    return layer(x, rotations(cfg, torch.arange(x.shape[1])))


same(attend_with_yours, attend_with_the_packages, *[(torch.randn(2, s, cfg.hidden_size),) for s in (1, 9, 40)])

# %% [markdown]
# ## A trained latent
#
# The tiny model of lesson 00 was trained with a latent of 64 numbers. Does it use them all? Take its up-projections,
# and the latents that stories and sums leave in each layer, texts which it was not trained on. Every other row is for
# looking, the rest for measuring.

# %%
import dsv3_mini as dsv3
from dsv3_mini.course.smaller_cache import collect_latents, ups_of
from dsv3_mini.data.shipped import shipped
from dsv3_mini.data.stream import held_out_rows
from dsv3_mini.data.tokenizer import Tokenizer

model, tokenizer = dsv3.from_pretrained(shipped("tiny")).eval(), Tokenizer.shipped()
tiny, pad = model.cfg, tokenizer.pad_id
rows = torch.cat([held_out_rows(domain, tokenizer, 256, 8).tokens for domain in ("stories", "sums")])
looked_at, measured_on = rows[::2], rows[1::2]
ups, latents = ups_of(model), collect_latents(model, looked_at)
print(f"in each of {len(ups)} layers: {len(latents[0]):,} latents of {latents[0].shape[1]} numbers,", end=" ")
print(f"and a matrix {list(ups[0].shape)} that makes keys and values of them")

# %% [markdown] tags=["exercise"]
# ### Exercise 4 · Cut a latent
# ●●○ · 15 minutes
#
# A matrix of *rank* `k` is a product of two thin ones, `[o, k]` and `[k, c]`. If `up` had rank `k`, the right one could
# be applied before caching, and `k` numbers a token would do. So: which matrix of rank `k`, in place of `up`, rebuilds
# the keys and values of the tokens at hand with the least squared error?
#
# The keys and values are `outputs = latents @ up.T`, `[T, o]` for `T` tokens. The **singular value decomposition**
# `torch.linalg.svd(outputs, full_matrices=False)` gives `U, S, Vh`. The rows of `Vh` are directions of length 1, at
# right angles, the one along which the outputs are largest first. Nothing with `k` directions comes closer to the
# outputs than their part along the first `k`. To keep the part of a vector $y$ along the rows of a matrix $D$, take
# $D^\top D\,y$.
#
# <details><summary>Hint 1</summary>Let <code>D</code> be <code>Vh[:rank]</code>, <code>[k, o]</code>. Which side of
# <code>up</code> has the <code>o</code>?</details>
# <details><summary>Hint 2</summary><code>D @ up</code> is <code>[k, c]</code>, the matrix that would be applied before
# caching. <code>D.T</code> takes its numbers back to keys and values.</details>


# %%
def cut_latent(up: Tensor, latents: Tensor, rank: int) -> Tensor:
    """up [o c], latents [T c] -> [o c] of that rank: rebuilds latents @ up.T with the least squared error."""
    ### BEGIN SOLUTION: the first `rank` right singular vectors of the outputs; up, projected onto them
    directions = torch.linalg.svd(latents @ up.T, full_matrices=False).Vh[:rank]
    return directions.T @ (directions @ up)
    ### END SOLUTION


# %%
check.cut_latent(cut_latent)

# %%
from dsv3_mini.course.smaller_cache import fitted_to_the_data

show_source(fitted_to_the_data)
same(cut_latent, fitted_to_the_data, (ups[0], latents[0], 16), (ups[3], latents[3], 40))

# %% [markdown] tags=["experiment"]
# ## Experiment: what rank loses
#
# Replace `up` in every layer by a cut one, train nothing, and measure the loss on the other half of the texts. Three
# ways to choose `k` directions: fitted to the data, as in your exercise; from the weights alone, the matrix nearest to
# `up`; and blindly, `k` random directions of the latent.
#
# **What we expect.** With all 64 directions nothing changes. With fewer, the loss rises. If the model spread its work
# evenly over the latent, it would not matter which half is kept. We expect that it does not, and that the fitted half
# costs less than half of what a random half costs. If it costs as much, all directions are alike, and a narrower latent
# can only be had by training one.

# %%
from dsv3_mini.course.smaller_cache import CUTS, loss_after

ranks = (64, 48, 32, 24, 16, 8)
whole = loss_after(model, ups, measured_on, pad)
losses = {name: {64: whole} for name in CUTS}
for name, cut in CUTS.items():
    for rank in ranks[1:]:
        thin = [cut(up, z, rank) for up, z in zip(ups, latents, strict=True)]
        losses[name][rank] = loss_after(model, thin, measured_on, pad)
added = {name: {rank: loss - whole for rank, loss in by_rank.items()} for name, by_rank in losses.items()}
for name in CUTS:
    print(f"{name:>22}:", "  ".join(f"{rank}: +{max(added[name][rank], 0):.2f}" for rank in ranks[1:]))

# %%
full_rank = [fitted_to_the_data(up, z, 64) for up, z in zip(ups, latents, strict=True)]
assert abs(loss_after(model, full_rank, measured_on, pad) - whole) < 1e-3
fitted, blind = added["fitted to the data"], added["random directions"]
assert fitted[32] < blind[32] / 2
print("all 64 directions: nothing lost")
print("32 fitted directions cost less than half of what 32 random ones cost:", fitted[32] < blind[32] / 2)

# %% [markdown]
# Compare the first two lines as well. The fitted cut is the best there is for keys and values, in squared error. The
# loss is something else, and where the two lie hundredths of a nat apart, either may win.
#
# Why is the random cut so much worse? Look at the singular values: their squares say how much of the keys and values
# lies along each direction. This many of the 64 hold 90% and 99% of it.

# %%
for number, (up, z) in enumerate(zip(ups, latents, strict=True)):
    size = torch.linalg.svdvals(z @ up.T).square()
    held = size.cumsum(0) / size.sum()
    print(f"layer {number}:", ", ".join(f"{int((held < share).sum()) + 1} hold {share:.0%}" for share in (0.9, 0.99)))

# %% [markdown]
# And the other way to a small cache? Let neighbouring heads of the same model share: give each group the mean of its
# heads' keys, and of their values. Two groups would be GQA, one group MQA. (With as many groups as heads nothing is
# averaged. It caches what MHA would.) A pair of a key and a value takes `n + r + v` numbers.

# %%
from dsv3_mini.course.smaller_cache import Measured, heads_averaged

heads, averaged = tiny.num_attention_heads, {tiny.num_attention_heads: whole}
for groups in (2, 1):
    shared = [heads_averaged(up, heads, groups) for up in ups]
    averaged[groups] = loss_after(model, shared, measured_on, pad)
measured = Measured(tiny, losses["fitted to the data"], averaged)
pair, r = tiny.qk_head_dim + tiny.v_head_dim, tiny.qk_rope_head_dim
print(f"all heads averaged: {pair} numbers cached, +{averaged[1] - whole:.2f} nats")
print(f"latent cut to 24:   {24 + r} numbers cached, +{fitted[24]:.2f} nats")
assert fitted[24] < averaged[1] - whole

# %%
from dsv3_mini.viz.figures.mla import cut_figure

curves = {f"latent, {name}": {rank + r: loss for rank, loss in losses[name].items()} for name in CUTS}
curves["heads averaged in groups"] = {groups * pair: loss for groups, loss in averaged.items()}
cut_figure(curves, whole, "At the same cache, a cut latent loses less than averaged heads")

# %% [markdown]
# This is not yet fair to GQA. The heads of this model were trained to be different, and nothing was trained afterwards:
# what the picture shows is how a *finished* model takes it. For a fair race all must be trained with the cache that
# they have, on the same weights.
#
# ## Experiment: a fair race
#
# The task asks for nothing but memory. On a table lie twelve cards. Each has a name and eight facts, any of 32 values
# each, and for every name all eight are asked for. Attention sees a card through what it caches of it. Six readers
# with the same number of weights, up to one percent, are trained from scratch on 300 batches of tables.

# %%
from dsv3_mini.course.card_race import RACE, CacheShape, CardReader

show_source(CardReader.attend)
for shape in RACE:
    print(f"{shape.name:14} {shape.weights:,} weights, {shape.cached:>3} numbers cached of a card")

# %% [markdown]
# **What we expect.** To find a card by its name takes few numbers, to say what is on it takes many. MQA has 32 numbers
# and must spend half of them on the key. A latent has no such wall: it may spend nearly all on values. So we expect MLA
# to answer more with 27 numbers than MQA with 32. If it does not, the freedom of the up-projection is worth nothing
# here, and one should rather share keys and have more heads.

# %%
from dsv3_mini.course.card_race import race
from dsv3_mini.viz.figures.mla import race_figure

finishes = race()
right = {finish.shape: finish.right for finish in finishes}
race_figure(finishes, "On the same weights, a latent answers more for each number cached")

# %%
mha, mqa, latent_27 = right[CacheShape(4, groups=4)], right[CacheShape(7, groups=1)], right[CacheShape(5, latent=27)]
print("MHA, with four times the cache of MQA, answers more than it:", mha > mqa)
print("MLA with 27 numbers answers more than MQA with 32:", latent_27 > mqa)
print(
    "MLA with 42 numbers answers more than GQA with 64:",
    right[CacheShape(4, latent=42)] > right[CacheShape(6, groups=2)],
)
assert mha > mqa and latent_27 > mqa

# %% [markdown]
# The weights are the same, and what decides is the cache: how many numbers, and how freely they may be spent. But see
# the whole picture. MHA, with the largest cache of all, is still ahead. A small cache is not free in a task that was
# made to need a large one; it is a trade, and a latent trades better than shared keys.

# %% [markdown] tags=["interactive"]
# ## From tiny to 671B
#
# Choose a model; its heads and its latent are set to its own. Then move them. On the left the cache of one text, in the
# middle what the attention of a layer weighs: MLA's up-projection is paid there, and its compressed queries save. On
# the right is the tiny model from above, with the same cut: if you halve the latent of the large model, the ring shows
# what half a latent cost the small one. That is a hint and no forecast; nobody can cut the released model in a
# notebook.

# %%
from dsv3_mini.viz.widgets.mla import cache_explorer

explorer = cache_explorer(measured)
explorer

# %%
before = explorer.picture.value
explorer.set(latent=256)
assert explorer.picture.value != before
explorer.set(model="tiny")
assert explorer.values["heads"] == tiny.num_attention_heads and explorer.values["latent"] == tiny.kv_lora_rank
print("moved to", explorer.values)

# %% [markdown]
# ## Find the bug
#
# A score has two parts, the product of the `n` numbers without position and that of the `r` turned ones. Somebody
# remembers that a dot product is divided by the root of its width, and does it for each part.


# %%
def two_scales(query_nope: Tensor, query_rope: Tensor, key_nope: Tensor, key_rope: Tensor) -> Tensor:
    """query_nope [b s h n], query_rope [b s h r], key_nope [b t h n], key_rope [b t r] -> scores [b h s t]"""
    content = einsum(query_nope, key_nope, "b s h n, b t h n -> b h s t") / query_nope.shape[-1] ** 0.5
    position = einsum(query_rope, key_rope, "b s h r, b t r -> b h s t") / query_rope.shape[-1] ** 0.5
    return content + position


torch.manual_seed(0)
n, r = large.qk_nope_head_dim, large.qk_rope_head_dim
drawn = [torch.randn(1, 64, *shape) for shape in ((8, n), (8, r), (8, n), (r,))]
print(f"scores of random queries and keys spread by {two_scales(*drawn).std():.1f}, and should by 1.0")

# %% [markdown]
# It looks harmless, and a model trained with it would learn to live with it. In a model trained with the right scale it
# does damage. Two scales are the same as one with larger queries, so the bug can be put into the weights of the tiny
# model: its queries' first `n` numbers times $\sqrt{(n + r) / n}$, the other `r` times $\sqrt{(n + r) / r}$.

# %%
import copy as copying

broken = copying.deepcopy(model).requires_grad_(False)
for block in broken.layers:
    layer_here = block.self_attn
    by_head = rearrange(layer_here.q_proj.q_b_proj.weight, "(h q) c -> h q c", h=layer_here.heads)
    without_position, turned = by_head.split([layer_here.nope, layer_here.rope], dim=1)
    without_position *= (tiny.qk_head_dim / layer_here.nope) ** 0.5
    turned *= (tiny.qk_head_dim / layer_here.rope) ** 0.5
loss_of_two = loss_after(broken, ups, measured_on, pad)
assert loss_of_two > whole
print(f"tiny with one scale: {whole:.2f} nats a token; with two: {loss_of_two:.2f}")

# %% [markdown] tags=["bug"]
# ### Find the bug · One root too many
# ●●○ · 10 minutes
#
# Query and key are one vector each, `[nope; rope]`, and their product is one dot product; it only happens to be
# computed in two parts. Write the scores with the scale that equation 10 has. Two things are wrong with the bug: how
# far the scores spread, and how much a number of the one part counts against a number of the other.
#
# <details><summary>Hint 1</summary>What would you divide by if you put the parts together first?</details>
# <details><summary>Hint 2</summary>The variance of a sum of <code>n + r</code> independent products is <code>n +
# r</code> times that of one.</details>


# %%
def scores(query_nope: Tensor, query_rope: Tensor, key_nope: Tensor, key_rope: Tensor) -> Tensor:
    """query_nope [b s h n], query_rope [b s h r], key_nope [b t h n], key_rope [b t r] -> [b h s t], scaled."""
    ### BEGIN SOLUTION: add both products, then divide by one root
    content = einsum(query_nope, key_nope, "b s h n, b t h n -> b h s t")
    position = einsum(query_rope, key_rope, "b s h r, b t r -> b h s t")
    return (content + position) / (query_nope.shape[-1] + query_rope.shape[-1]) ** 0.5
    ### END SOLUTION


# %%
check.scores(scores)

# %% [markdown] tags=["at-671b"]
# ## At 671B
#
# The cache first, and the other ways to the same size. GQA would have to do with fewer than two groups for 128 heads.

# %%
per_layer = cache.mla // large.num_hidden_layers
print(f"{large.kv_lora_rank} + {large.qk_rope_head_dim} = {per_layer} numbers a layer,", end=" ")
print(f"{cache.mla:,} in all, 1/{cache.saving:.0f} of MHA's {cache.mha:,}")
print(f"as much as GQA with {cache.mla / cache.mqa:.1f} groups")
rebuilt_from = large.num_attention_heads * (large.qk_nope_head_dim + large.v_head_dim)
print(f"{rebuilt_from:,} numbers of keys and values are rebuilt from {large.kv_lora_rank}")

# %% [markdown]
# Then the weights of one layer's attention. Compressed queries save most of what direct ones would weigh. And the same
# budget spent otherwise, by the rule of heads plus groups from above, with queries and keys of 192 and values of 128:

# %%
from dsv3_mini.ledger import count_parameters

own = count_parameters(large).attention
direct = count_parameters(large.replace(q_lora_rank=None)).attention
thin_queries = own["q_a"] + own["q_norm"] + own["q_b"]
print(f"queries: {direct['q']:,} weights directly, {thin_queries:,} through {large.q_lora_rank} numbers")
one = large.hidden_size * (large.qk_head_dim + large.v_head_dim)  # a head that asks, or a group that answers
heads_and_groups = own.trainable // one
print(f"MLA: {own.trainable:,} weights for {large.num_attention_heads} heads, {per_layer} numbers cached a layer")
both = large.qk_head_dim + large.v_head_dim
for name, groups in (("MHA", heads_and_groups // 2), ("GQA", 8), ("MQA", 1)):
    heads = (heads_and_groups - groups) // groups * groups
    print(f"{name}: the same weights buy {heads} heads, with g = {groups}: {groups * both:,} numbers cached a layer")

# %% [markdown]
# MQA would cache even less than MLA. But all of its 80 heads would read one and the same key and value, and what that
# costs the race has shown. MLA gives each of its 128 heads a key and a value of its own.
#
# Last the scale. It is one over the root of 192, and YaRN, which stretches the context to 128K (lesson 17), multiplies
# it once more.

# %%
from dsv3_mini.model.rope import softmax_scale

plain = softmax_scale(large.replace(rope_scaling=None))
print(f"1 / sqrt({large.qk_nope_head_dim} + {large.qk_rope_head_dim}) = {plain:.5f}")
print(f"with YaRN {softmax_scale(large):.5f}, {softmax_scale(large) / plain:.3f} times as much")

# %% [markdown] tags=["recap"]
# ## Recap
#
# 1. GQA with `g` groups and MLA with a latent of `2 g w` numbers cache the same. What can MLA do that GQA cannot, and
#    what does it pay?
#    <details><summary>Answer</summary>GQA's heads get copies of <code>g</code> keys and values. MLA rebuilds a
#    different key and value for each head, and divides its numbers between keys and values as training finds best. It
#    pays with the weights of the up-projection, and with computing it.</details>
# 2. Queries go through a latent too. How much cache does that save?
#    <details><summary>Answer</summary>None: no query is ever cached. It saves weights, and activations in
#    training.</details>
# 3. Why is the best cut of the trained latent found with the SVD of keys and values, and not with that of the weights?
#    <details><summary>Answer</summary>The error that counts is that of keys and values of tokens that occur. Latents
#    are not alike in all directions: where they hardly ever point, an error of the matrix costs nothing.</details>

# %% [markdown] tags=["next"]
# ## Next
#
# You have made what is cached small, and then rebuilt all keys and values from it. A decoder that did that for each new
# token would spend in computing what it saves in memory. Lesson 07 builds the cache, and finds that the up-projections
# need not be applied to the cached tokens at all: they can move into the query and into the output. That is the other
# half of why MLA works, and the reason why the turned key stands apart.
