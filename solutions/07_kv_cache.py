# ---
# jupyter:
#   jupytext:
#     text_representation:
#       format_name: percent
#   dsv3:
#     title: The cache, and absorbed attention
#     minutes: 85
#     after: [06_mla]
#     builds: the mask of a chunk, a decode loop, absorbed attention, and the count that says when to absorb
#     tracks: [two-days, term]
# ---

# %% [markdown] tags=["why"]
# # 07 · The cache, and absorbed attention
#
# The tour's naive loop wrote a story and read it again from the start for every new token. In this lesson you end that.
# First comes the loop: read the prompt once, keep what attention needs of each token, and from then on read one token
# at a time. You show that the numbers stay the same.
#
# Then comes the trick for which DeepSeek's attention is built. The cache holds short latents, and attention wants keys
# and values. Must they be built again at every step? A change of brackets says no. You derive it, write it as einsum,
# count when it is cheaper and when it is not, and then see whether a clock agrees.
#
# The picture shows the loop: six tokens are given, eight are written. A row is a step, a column a position in the text.

# %%
from dsv3_mini.viz.figures.kv_cache import steps_figure

steps_figure(prompt=6, new=8)

# %% [markdown] tags=["paper"]
# ## In the report
#
# Section 2.1.1 gives attention in equations 1 to 11, which lesson 06 built. For the token at position $t$, with the
# vector $h_t$, two of the results are kept when the model generates:
#
# $$c_t = W^{DKV} h_t \qquad k^R_t = \mathrm{RoPE}(W^{KR} h_t)$$
#
# the **latent** (after its norm) and the **rope key**, which all heads share. Head $i$ finds its key and value in it:
# $k_{t,i} = [W^{UK}_i c_t\,;\,k^R_t]$ and $v_{t,i} = W^{UV}_i c_t$. The letters in code are those of the whole course:
#
# | letter | axis | at 671B |
# |---|---|---|
# | `b` | row of a batch | |
# | `s` | new tokens, whose queries are asked | |
# | `t` | all tokens in the cache, the new ones included | |
# | `h` | heads | 128 |
# | `n`, `r` | a query's part without position, and the part that RoPE turns | 128, 64 |
# | `c` | latent | 512 |
# | `v` | value of one head | 128 |
#
# Section 3.4 serves the two phases on different machines, **prefill** (the prompt is read) and **decode** (tokens are
# written). At the end of this lesson you can say why.

# %% [markdown] tags=["naive"]
# ## The naive way
#
# The tiny model that came with the course writes eight tokens after a prompt of twenty, the tour's way: the whole text
# goes through the model each time. Meanwhile we write down the latents in its last layer.

# %%
import torch

import dsv3_mini as dsv3
from dsv3_mini.data.shipped import shipped
from dsv3_mini.data.stories import generate_story
from dsv3_mini.data.tokenizer import Tokenizer

model, tokenizer = dsv3.from_pretrained(shipped("tiny")).eval().requires_grad_(False), Tokenizer.shipped()
cfg = model.cfg
stories = "\n".join(generate_story(7, index).text for index in range(4))
ids = torch.tensor([[tokenizer.eos_id, *tokenizer.encode(stories)]])[:, :160]  # [b s]
print(f"{ids.shape[1]} tokens of stories, {cfg.num_hidden_layers} layers, a latent of {cfg.kv_lora_rank} numbers")

# %%
latents: list[torch.Tensor] = []  # of the last layer, one [t c] for each step
norm = model.layers[-1].self_attn.kv_a_layernorm
watching = norm.register_forward_hook(lambda module, inputs, output: latents.append(output[0]))
naive, read = ids[:, :20], 0
for _ in range(8):
    logits = model(naive).logits
    read += naive.shape[1]
    naive = torch.cat([naive, logits[:, -1:].argmax(-1)], dim=1)
watching.remove()
print(f"to write {naive.shape[1] - 20} tokens the model read {read}")

# %%
for step, (before, now) in enumerate(zip(latents, latents[1:], strict=False), start=2):
    equal = (now[: len(before)] - before).abs().amax(-1) < 1e-4 * before.abs().max()
    print(f"step {step}: {int(equal.sum())} of {len(now)} latents are those of the step before")
    assert equal.all()

# %% [markdown]
# Only one row is new in each step, even in the last layer. It must be so: no token sees a later one, in any layer, so
# nothing that is written later can change what an earlier token is. And of the earlier tokens the newest query needs
# only what attention reads of them, the latent and the rope key. Keep these two, and the rest need not be computed
# again.
#
# With a **cache** the work has two phases. In *prefill* the prompt goes through the model in one call: many queries at
# once. In *decode* each call brings one token, and its one query looks at everything in the cache.

# %%
from einops import einsum, rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dsv3_mini.course.checks import lesson_07 as check
from dsv3_mini.course.lesson import same, show_source

# %% [markdown] tags=["exercise"]
# ### Exercise 1 · Who sees whom, beside a cache
# ●○○ · 8 minutes
#
# Not only one token can be new. A long prompt is read in chunks, and lesson 22 lets a model check several guessed
# tokens at once. `seen` tokens are in the cache (positions 0 to `seen - 1`), `new` ones come after them. Make the mask:
# a row for each new token, a column for each of the `seen + new` keys, true where the query may see the key.
#
# <details><summary>Hint 1</summary>At which position does new token 0 stand, and which is the last key it
# sees?</details>
# <details><summary>Hint 2</summary><code>tril(k)</code> keeps what lies on or below a diagonal that is moved
# <code>k</code> places to the right.</details>


# %%
def visible(seen: int, new: int) -> Bool[Tensor, "s t"]:
    """[new, seen + new]: true where a new token may see a key, that is, where the key does not come after it."""
    ### BEGIN SOLUTION: a table of True, cut to a lower triangle whose diagonal begins at column `seen`
    return torch.ones(new, seen + new, dtype=torch.bool).tril(seen)
    ### END SOLUTION


# %%
check.visible(visible)

# %% [markdown] tags=["exercise"]
# ### Exercise 2 · Prefill, then decode
# ●●○ · 12 minutes
#
# `read` is a model together with its cache. `read(tokens)` takes token ids `[b s]`, reads them *after all that it has
# read before*, and returns their logits `[b s v]` (`v`: the vocabulary). It forgets nothing: what you hand over twice
# stands in the cache twice. Write `new_tokens` tokens after the prompt, each time the likeliest, and return these new
# ones only.
#
# <details><summary>Hint 1</summary>After <code>logits = read(prompt)</code> you know the first new token already: the
# likeliest after the last position.</details>
# <details><summary>Hint 2</summary><code>logits[:, -1:].argmax(-1)</code> has the shape [b 1], just what
# <code>read</code> takes.</details>


# %%
def write(read, prompt: Int[Tensor, "b s"], new_tokens: int) -> Int[Tensor, "b new_tokens"]:
    """The likeliest `new_tokens` tokens after the prompt; the prompt is read in one call, then one token in each."""
    ### BEGIN SOLUTION: read the prompt, choose a token; then read that token, choose the next; put the chosen together
    new = [read(prompt)[:, -1:].argmax(-1)]
    while len(new) < new_tokens:
        new.append(read(new[-1])[:, -1:].argmax(-1))
    return torch.cat(new, dim=1)
    ### END SOLUTION


# %%
check.write(write)

# %% [markdown] tags=["package"]
# ## The package's own
#
# A `LatentCache` belongs to one layer. It takes its memory once, for as many tokens as will ever come: `torch.cat` at
# every step would copy the whole cache each time. `extend` writes the new rows and hands back all rows so far, as a
# view. Your loop is `Writing._write`, for a batch whose rows may be of unequal lengths and end each at its own time. What
# is drafted in it is for lesson 22: with nothing drafted, a pass reads one token of each row.

# %%
from dsv3_mini.inference.cache import LatentCache
from dsv3_mini.inference.writing import Writing

show_source(LatentCache, Writing._write)


# %%
def with_cache(capacity: int):
    """The tiny model with an empty cache, as `read`."""
    cache = LatentCache.for_model(cfg, 1, capacity, torch.float32, torch.device("cpu"))
    return lambda tokens: model(tokens, cache=cache).logits


def package_write(read, prompt: Tensor, new_tokens: int) -> Tensor:
    return dsv3.generate(model, prompt, new_tokens)[:, prompt.shape[1] :]


same(write, package_write, (with_cache(64), ids[:, :40], 24), (with_cache(64), ids[:, :3], 10))

# %% [markdown]
# Where does the model get the mask of your first exercise? From the number of tokens in the cache, which also tells the
# new tokens their positions (the bug of lesson 05 was to forget that). Look for `seen`.

# %%
show_source(dsv3.DeepSeekV3.main_states)

# %% [markdown]
# Now the claim on which all of this stands: cached equals uncached. The same tokens, once as a whole and once cut up,
# 100 of them at once and the others one by one. All logits are compared, not only the chosen tokens.


# %%
def read_in_parts() -> Float[Tensor, "b s v"]:
    """Logits of all tokens: the first 100 are prefilled, the rest decoded one by one."""
    cache = LatentCache.for_model(cfg, 1, ids.shape[1], torch.float32, torch.device("cpu"))
    parts = (ids[:, :100], *ids[:, 100:].split(1, dim=1))
    return torch.cat([model(part, cache=cache).logits for part in parts], dim=1)


whole, cached = model(ids).logits, read_in_parts()
difference = ((cached - whole).abs().max() / whole.abs().max()).item()
print("cached = uncached within 1e-5 of the largest logit:", difference < 1e-5)
assert difference < 1e-5

# %% [markdown]
# ## What to do with a latent
#
# The cache has latents, and equation 10 wants keys and values. The straight way is to build them, for all `t` tokens,
# at every step. That is a lot for one query. Look at the score of one head without its rope part, with $q$ the query
# (`n` numbers) and $W$ short for $W^{UK}$ (`[n c]`):
#
# $$ q^\top k_t = q^\top (W c_t) = (q^\top W)\, c_t = (W^\top q)^\top c_t $$
#
# The product does not care where the brackets stand. On the left each *latent* is multiplied with $W$, on the right the
# *query* is, once. Then the query is as wide as a latent, and meets the cache as it is. $W^{UK}$ has been **absorbed**
# into the query. The output works the same way, from the other end. With the attention weights $p_t$:
#
# $$ \sum_t p_t\, v_t = \sum_t p_t\, (W^{UV} c_t) = W^{UV} \Big(\sum_t p_t\, c_t\Big) $$
#
# The latents are mixed first, and $W^{UV}$ is applied to the mixture, once for each query. Here is the first of the two
# at the released widths, to scale, with 1,024 tokens in the cache. $C$ holds the latents, one in each column.

# %%
from dsv3_mini.viz.figures.kv_cache import brackets_figure

brackets_figure(nope=128, latent=512, tokens=1024)

# %% [markdown]
# In numbers, for one head. In double precision the two agree to far more digits than FP32 has.

# %%
random = torch.Generator().manual_seed(0)
q, W, C = (torch.randn(*shape, generator=random, dtype=torch.double) for shape in ((128,), (128, 512), (1024, 512)))
keys_first = einsum(q, einsum(W, C, "n c, t c -> t n"), "n, t n -> t")
query_first = einsum(einsum(q, W, "n, n c -> c"), C, "c, t c -> t")
print("keys first = query first:", torch.allclose(keys_first, query_first, rtol=1e-12, atol=1e-9))
print(f"multiplications: {W.numel() * len(C) + len(q) * len(C):,} and {W.numel() + C.numel():,}")

# %% [markdown]
# Two things do *not* change. The **scale** stays $1/\sqrt{n + r}$ (times YaRN's factor, where there is one): the
# absorbed query looks $c + r$ numbers wide, but its dot product is the same number as before. And the **rope part**
# stays outside. Its key is turned by an angle that depends on the token's position, so between query and latent there
# would stand a different matrix for every token, and nothing could be absorbed once for all of them. That is why the
# rope key has its own place in the cache (lesson 05 made this point from the other side).

# %% [markdown] tags=["exercise"]
# ### Exercise 3 · Absorbed attention
# ●●● · 20 minutes
#
# Write it for all heads at once, from queries to the heads' outputs, without building a key or a value. Each head has
# its own matrices: `up_key` is $W^{UK}$, `up_value` is $W^{UV}$. The mask is true where a query sees a key, as in
# exercise 1, now with the rows of the batch in front.
#
# <details><summary>Hint 1</summary>Five einsums: the fold into the query; scores with the latents; scores with the rope
# keys; the mixture of latents; the fold into the output.</details>
# <details><summary>Hint 2</summary>Scores are <code>b h s t</code>. The latents have no <code>h</code>: one serves all
# heads. The mixture is <code>b s h c</code>: each head has its own.</details>
# <details><summary>Hint 3</summary><code>scores.masked_fill(~mask[:, None], -torch.inf)</code> gives the mask an axis
# for the heads.</details>


# %%
def absorbed(
    query_nope: Float[Tensor, "b s h n"],
    query_rope: Float[Tensor, "b s h r"],
    latent: Float[Tensor, "b t c"],
    key_rope: Float[Tensor, "b t r"],
    up_key: Float[Tensor, "h n c"],
    up_value: Float[Tensor, "h v c"],
    scale: float,
    mask: Bool[Tensor, "b s t"],
) -> Float[Tensor, "b s h v"]:
    """Attention on the latents themselves; W_UK is folded into the queries, W_UV into the output."""
    ### BEGIN SOLUTION: query through up_key; scores on latents and rope keys; scale, mask, softmax; mix; up_value
    query_latent = einsum(query_nope, up_key, "b s h n, h n c -> b s h c")
    content = einsum(query_latent, latent, "b s h c, b t c -> b h s t")
    position = einsum(query_rope, key_rope, "b s h r, b t r -> b h s t")
    scores = (content + position) * scale
    share = scores.masked_fill(~mask[:, None], -torch.inf).softmax(dim=-1)
    mixed = einsum(share, latent, "b h s t, b t c -> b s h c")
    return einsum(mixed, up_value, "b s h c, h v c -> b s h v")
    ### END SOLUTION


# %%
check.absorbed(absorbed)

# %% [markdown]
# The package has both ways next to each other, and takes the absorbed one when few tokens are new. How few? `absorbs`
# says it; exercise 4 finds out.

# %%
from dsv3_mini.model.attention import MultiHeadLatentAttention

show_source(MultiHeadLatentAttention.forward, MultiHeadLatentAttention.expanded, MultiHeadLatentAttention.absorbed)

# %% [markdown]
# Is yours the same as the *other* one, the package's naive `expanded`, which builds all keys and values? The inputs are
# those that the stories bring to the third layer of the trained model, once with one query and once with sixteen.

# %%
from dsv3_mini.model.rope import rotations

turn, x = rotations(cfg, torch.arange(ids.shape[1])), model.embed_tokens(ids)
for block in model.layers[:2]:
    x, _ = block(x, turn)
layer, x = model.layers[2].self_attn, model.layers[2].input_layernorm(x)
(query_nope, query_rope), kept = layer._queries(x, turn), layer._latents(x, turn)
per_head = rearrange(layer.kv_b_proj.weight, "(h nv) c -> h nv c", h=layer.heads)
matrices = per_head.split([layer.nope, layer.value], dim=1)  # up_key, up_value
causal = torch.ones(1, ids.shape[1], ids.shape[1], dtype=torch.bool).tril()


# %%
def expanded_by_the_package(query_nope, query_rope, latent, key_rope, up_key, up_value, scale, mask) -> Tensor:
    """The layer has its matrices and its scale itself."""
    return layer.expanded(query_nope, query_rope, latent, key_rope, mask)


def with_new(new: int) -> tuple:
    """The arguments when the last `new` tokens are new."""
    return query_nope[:, -new:], query_rope[:, -new:], *kept, *matrices, layer.scale, causal[:, -new:]


same(absorbed, expanded_by_the_package, with_new(1), with_new(16))

# %% [markdown]
# And all layers of the trained model, both ways by the package, for every query of the stories:

# %%
x, worst = model.embed_tokens(ids), 0.0
for block in model.layers:
    attend, normed = block.self_attn, block.input_layernorm(x)
    inputs = (*attend._queries(normed, turn), *attend._latents(normed, turn), causal)
    naive_way, short_way = attend.expanded(*inputs), attend.absorbed(*inputs)
    worst = max(worst, ((short_way - naive_way).abs().max() / naive_way.abs().max()).item())
    x, _ = block(x, turn)
print(f"absorbed = naive within 1e-5 in all {len(model.layers)} layers:", worst < 1e-5)
assert worst < 1e-5

# %% [markdown] tags=["exercise"]
# ### Exercise 4 · Count the products
# ●●○ · 15 minutes
#
# Same numbers, different work. Count it for one layer and one row: `s` new tokens, `t` tokens in the cache when they are
# in. A multiplication with its addition is two FLOPs, so an einsum costs two times the product of all its letters'
# lengths (`"b s h c, b t c -> b h s t"`: $2 \cdot b\,s\,h\,c\,t$). Count all scores, masked ones too; softmax, scale and
# mask are free.
#
# - *expanded*: from the latents of all `t` tokens build the `n` numbers of each head's key and the `v` of its value.
#   The rope key is there already. Then scores (over `n + r` numbers) and the weighted sum of the values.
# - *absorbed*: fold each new query; scores on latents and rope keys; the weighted sum of the latents; fold each output.
#
# <details><summary>Hint 1</summary>Write down the einsums of both ways first, then the letters of each.</details>
# <details><summary>Hint 2</summary>Building costs <code>t * h * c * (n + v)</code> multiplications, the two folds
# together <code>s * h * c * (n + v)</code>: the same, but for s instead of t tokens.</details>


# %%
def count_flops(s: int, t: int, h: int, n: int, r: int, v: int, c: int) -> tuple[int, int]:
    """(expanded, absorbed): FLOPs of one layer's attention for s new tokens over t, queries and latents given."""
    ### BEGIN SOLUTION: two times (what builds or folds + what runs over the pairs of s queries and t keys), for each way
    expanded = t * c * (n + v) + s * t * (n + r + v)
    absorbed = s * c * (n + v) + s * t * (2 * c + r)
    return 2 * h * expanded, 2 * h * absorbed
    ### END SOLUTION


# %%
check.count_flops(count_flops)

# %% [markdown]
# The ledger counts the same, for any model:

# %%
from dsv3_mini.ledger.decode import attention_flops, crossing

large = dsv3.ModelConfig.preset("671b")


def by_the_ledger(s: int, t: int, h: int, n: int, r: int, v: int, c: int) -> tuple[int, int]:
    widths = dict(num_attention_heads=h, qk_nope_head_dim=n, qk_rope_head_dim=r, v_head_dim=v, kv_lora_rank=c)
    flops = attention_flops(large.replace(**widths), s, t)
    return flops.rebuilt, flops.absorbed


show_source(attention_flops, crossing)
same(count_flops, by_the_ledger, (1, 4096, 128, 128, 64, 128, 512), (7, 300, 4, 32, 16, 32, 64))

# %% [markdown]
# Look at the two formulas side by side. Building costs something for each of the `t` cached tokens, folding for each of
# the `s` new ones: with one new token that is nothing. But on the latents a query and a key meet in `2c + r` numbers
# instead of `n + r + v`, and that difference is paid for each *pair*. So with few new tokens absorbing wins, with many
# building wins, and in between the two are equal: with $A = c\,(n+v)$ and $B = 2c - n - v$,
#
# $$ s^* = \frac{t A}{A + t B} \;\longrightarrow\; \frac{A}{B} = \frac{c\,(n + v)}{2c - n - v} \quad \text{for a long context} $$
#
# It depends on the widths, hardly on the context, and not at all on heads or batch. This count is the package's rule:
# `MultiHeadLatentAttention.absorbs` compares the same two numbers, and a chunk of fewer than $s^*$ tokens is absorbed.

# %%
for preset, contexts in (("tiny", (128, 512)), ("16b", (4096,)), ("671b", (1024, 4096, 131_072))):
    for context in contexts:
        equal = crossing(dsv3.ModelConfig.preset(preset), context)
        print(f"{preset:>4}, {context:>7,} tokens in the cache: equal at {equal:5.1f} new tokens")

# %% [markdown]
# FLOPs are half of the account. A machine also has to bring the numbers from memory. Count the bytes for one row of
# 4,096 tokens in one layer at 671B, two bytes a number (BF16): both ways read the latents, but the expanded one also
# writes keys and values out and reads them again.

# %%
context, wide = 4096, large.num_attention_heads * (large.qk_nope_head_dim + large.v_head_dim)
read_latents = 2 * context * (large.kv_lora_rank + large.qk_rope_head_dim)
heads_out_and_in = 2 * 2 * context * wide
flops = attention_flops(large, 1, context)
print(f"absorbed: {flops.absorbed / 1e9:6.2f} GFLOP, {read_latents / 1e6:6.1f} MB")
print(f"expanded: {flops.rebuilt / 1e9:6.2f} GFLOP, {(read_latents + heads_out_and_in) / 1e6:6.1f} MB")
print(f"ratio:    {flops.rebuilt / flops.absorbed:6.0f}        {1 + heads_out_and_in / read_latents:6.0f}")

# %% [markdown] tags=["experiment"]
# ## Experiment: does the clock agree?
#
# Counting is not measuring. A CPU does large products at full speed and small ones slowly, masks and softmax are not
# free, and torch's fused attention serves the expanded way only. So take one layer with the released widths, eight
# heads and 1,024 tokens in the cache, and let both ways run side by side, one right after the other. What is compared
# is the ratio of the two times: the speed of the machine drops out of it.
#
# **What we expect.** The count says: equal at 146 new tokens. If it is worth something, the clock finds absorbed ahead
# at 32 and expanded ahead at 512. With a single new token the count promises a factor of about 100. So much we do not
# demand: a product that small is over in a few milliseconds, and whatever else goes on in the machine disturbs it. More
# than 3 it should be. If one of these fails, counting products is no guide to choosing the way.
#
# The button measures; so does the cell below it. Grey dots are our times.

# %%
from dsv3_mini.viz.widgets.kv_cache import stopwatch

watch = stopwatch()
watch

# %%
before = watch.picture.value
measured = watch.measure()
assert watch.picture.value != before and watch.rounds_done == 3
print("1 new token: absorbed is more than 3 times faster:", measured[1] > 3)
print("the clock, too, sees the crossing between 32 and 512 new tokens:", measured[32] > 1 > measured[512])
print("1,024 new tokens, a prefill: expanded is faster:", measured[1024] < 1)
assert measured[1] > 3 and measured[32] > 1 > measured[512] and measured[1024] < 1

# %% [markdown]
# The FLOPs tell who wins. By how much they tell only where there is much to compute: these are our times (the grey dots)
# over the count.

# %%
from dsv3_mini.viz.widgets.kv_cache import RECORDED, counted_ratios

counted = counted_ratios(large, 1024)
print("measured over counted:", {new: round(ratio / counted[new], 2) for new, ratio in RECORDED.items()})

# %% [markdown]
# From 32 new tokens on the count is off by a fifth at most. With a single one, absorbed attention has next to nothing to
# compute and still brings every latent, and the weights that it absorbs, from memory: it gains an eighth of what the count
# promises. Bytes have their say too: that is the next section. But first:
# are the two still the same number at these widths, where a latent has 512 numbers and the sums are long?

# %%
from dsv3_mini.bench.decode import largest_difference, one_layer, random_inputs

wide_layer = one_layer(large, heads=8)
apart = [largest_difference(wide_layer, random_inputs(wide_layer, new, 1024)) for new in (1, 32)]
print("absorbed = naive within 1e-5 at the released widths:", max(apart) < 1e-5)
assert max(apart) < 1e-5

# %% [markdown] tags=["interactive"]
# ## The roofline of a decode step
#
# How long does a whole step take at 671B? A machine has two limits: how many FLOPs it does in a second, and how many
# bytes it brings from memory. A part of the step takes as long as the slower of the two. Which one that is depends on
# the part's **intensity**, its FLOPs per byte. Draw the FLOP/s within reach against the intensity, and you see a roof:
# it rises while memory is the limit, and is level once the processor is. The kink, here at 295 FLOP per byte, is where
# both are used in full.
#
# The model is one H800 that is large enough to hold everything, which no H800 is. On many cards the parts share the
# work, and what they say to each other comes on top. Four parts: *attention over the cache*; *attention's weights*, the
# projections; the *routed experts*; the *other weights* (dense layers, shared experts, gates, output head). Play:
#
# 1. Batch 1. What does the step wait for, and how much of it is attention over the cache?
# 2. Raise the batch. Which points move to the right, and why? Which one stays, and why?
# 3. Batch 256, then a context of 131,072. Who takes the time now?
# 4. Now choose *heads cached*, the cache of usual attention, and *rebuilt*, latents from which keys and values are
#    built at each step. *Rebuilt* lies as high under the roof as *absorbed*. Why is it so slow all the same?
# 5. *Absorbed* with two new tokens a row (lesson 22 does that): does attention take twice as long?

# %%
from dsv3_mini.viz.widgets.kv_cache import roofline_explorer

roofline = roofline_explorer()
roofline

# %%
from dsv3_mini.ledger.decode import H800, WAYS, decode_step

before = roofline.picture.value
roofline.set(batch=256, context=131_072)
assert roofline.picture.value != before
for way in WAYS:
    over_cache, *_ = decode_step(large, batch=256, context=4096, way=way)
    taken, limit = 1e3 * over_cache.seconds(H800), over_cache.limit(H800)
    print(f"{way:12} {over_cache.intensity:4.0f} FLOP per byte, {taken:6,.0f} ms, waits for {limit}")
one, two = (decode_step(large, 256, 4096, new=new)[0].seconds(H800) for new in (1, 2))
print(f"absorbed, two new tokens a row take {two / one:.1f} times as long as one")

# %% [markdown]
# A weight is read once in a step, whatever the batch, and used once for each row: its intensity *is* the batch (for an
# expert, the rows that visit it). So a server gathers many rows. The cache belongs to one row: twice the rows, twice the
# FLOPs and twice the bytes, so the point of attention stays where it is. What moves it is how often each cached number
# is used. With *heads cached* each is used once, by the query of its own head. *Absorbed*, one latent serves the queries
# of all 128 heads, twice. And *rebuilt* keeps memory and processor busy with work that absorbed attention does not have.

# %% [markdown]
# ## Find the bug
#
# A server rarely has one prompt to continue, and prompts rarely have one length. A colleague pads the shorter ones at
# the end, prefills all rows together, and decodes on from there. The cache has a *slot* for each token: first the
# `padded` slots of the prompts, padding included, then those of the new tokens. The colleague's function says, for the
# new tokens, what each may see and at which position it stands (RoPE needs that).


# %%
def view_with_a_bug(
    lengths: Int[Tensor, " b"], padded: int, new: int
) -> tuple[Bool[Tensor, "b s t"], Int[Tensor, "b s"]]:
    """What `new` tokens may see, and their positions, after prompts of `lengths` tokens padded to `padded`."""
    places = torch.arange(padded, padded + new)
    mask = places[:, None] >= torch.arange(padded + new)
    return mask.expand(len(lengths), -1, -1), places.expand(len(lengths), -1)


# %% [markdown]
# Try it on two rows of the stories, with prompts of 20 and 33 tokens and six tokens that follow each. Each row has been
# read alone, too: those logits are the truth.

# %%
lengths, new = torch.tensor([20, 33]), 6
padded = int(lengths.max())
rows = [ids[0, start : start + length + new] for start, length in zip((0, 60), lengths.tolist(), strict=True)]
alone = torch.cat([model(row[None]).logits[:, -new:] for row in rows])
prompts = torch.nn.utils.rnn.pad_sequence([row[:-new] for row in rows], True, tokenizer.pad_id)  # [b padded]
following = torch.stack([row[-new:] for row in rows])  # [b s]


# %%
def read_together(view) -> Float[Tensor, "b s v"]:
    """Logits of the new tokens of both rows, which share a cache; `view` says what they see and where they stand."""
    cache = LatentCache.for_model(cfg, len(rows), padded + new, torch.float32, torch.device("cpu"))
    model(prompts, cache=cache)
    mask, positions = view(lengths, padded, new)
    x, turn = model.embed_tokens(following), rotations(cfg, positions)
    for block, kept in zip(model.layers, cache, strict=True):
        x, _ = block(x, turn, mask, kept)
    return model.lm_head(model.norm(x))


off = (read_together(view_with_a_bug) - alone).abs().amax((1, 2)) / alone.abs().max()
for length, difference in zip(lengths.tolist(), off.tolist(), strict=True):
    print(f"row with a prompt of {length}: as if read alone:", difference < 1e-5)
assert off[0] > 1e-3 and off[1] < 1e-5

# %% [markdown] tags=["bug"]
# ### Find the bug · Padding that talks
# ●●○ · 12 minutes
#
# The longest row is right, so a test with one row, or with rows of one length, passes. The shorter one is off: two
# things are wrong with it, for one reason. Write the function as it should be. Row `b` has its prompt in slots 0 to
# `lengths[b] - 1`, padding up to slot `padded - 1`, and its new tokens from slot `padded` on. The mask is
# `[b new padded + new]`, true where a new token may see a slot; the positions are `[b new]`.
#
# <details><summary>Hint 1</summary>A slot is a place in memory, a position is a place in the text. For which row are
# they the same?</details>
# <details><summary>Hint 2</summary>Two kinds of slots are visible: those of the row's own prompt, and those of new
# tokens up to the query itself. Make a mask <code>[b t]</code> of the first, <code>[s t]</code> of the second, and join
# them with <code>|</code>.</details>


# %%
def batch_view(lengths: Int[Tensor, " b"], padded: int, new: int) -> tuple[Bool[Tensor, "b s t"], Int[Tensor, "b s"]]:
    """What `new` tokens may see, and their positions, after prompts of `lengths` tokens padded to `padded`."""
    ### BEGIN SOLUTION: mask: own prompt, or new tokens up to the query; positions: go on from the row's own length
    slots, step = torch.arange(padded + new), torch.arange(new)
    in_prompt = slots < lengths[:, None]  # [b t]
    is_new = (slots >= padded) & (slots <= padded + step[:, None])  # [s t]
    return in_prompt[:, None] | is_new, lengths[:, None] + step
    ### END SOLUTION


# %%
check.batch_view(batch_view)


# %%
def read_with_your_view() -> Float[Tensor, "b s v"]:
    return read_together(batch_view)


same(read_with_your_view, lambda: alone, ())

# %% [markdown]
# With the padding hidden and the positions counted in text, a row no longer notices its neighbours. In the prefill
# nothing was wrong: the padding stands behind the prompt, where no token of it looks. Only mind where you read the
# first new token: at the logits of slot `lengths[b] - 1`, not at the last slot, which is padding. The package needs no
# such mask: in its `LatentCache` a row's next token goes behind the row's own last one, over the padding, and a slot is a
# position. Servers keep caches in small pages, one list of pages for each row (lesson 23).

# %% [markdown] tags=["at-671b"]
# ## At 671B
#
# The whole model, one new token: what a row keeps, and what its step costs in the three ways. These FLOPs are the
# ledger's, weights and attention together.

# %%
from dsv3_mini.ledger import cache_per_token, decode_flops_per_token

cache = cache_per_token(large)
print(f"one token leaves {cache.bytes('mla'):,} bytes in the cache, and {cache.bytes('mha'):,} with heads cached")
for context in (4096, 131_072):
    step, kept_bytes = decode_flops_per_token(large, context), context * cache.bytes("mla")
    print(f"{context:>7,} tokens: {kept_bytes / 1e9:.2f} GB of cache. GFLOP for the next one: "
          f"absorbed {step.absorbed / 1e9:,.0f}, heads cached {step.expanded / 1e9:,.0f}, "
          f"rebuilt {step.re_expanded / 1e9:,.0f}")  # fmt: skip

# %% [markdown]
# Heads cached would cost the fewest FLOPs, and a cache that is 71 times as large. Absorbed pays some FLOPs for a small
# cache and a high intensity. How high? Each head uses each latent twice, for its score and for its mixture, and each rope
# key once; all heads share what was read, two bytes a number.

# %%
h, c, r = large.num_attention_heads, large.kv_lora_rank, large.qk_rope_head_dim
one_token = 2 * h * (2 * c + r) / (2 * (c + r))  # FLOP per byte
print(f"absorbed, FLOP per byte: {one_token:.0f} with one new token, {2 * one_token:.0f} with two")
print(f"an H800's roof bends at {H800.ridge:.0f}")
over_cache, *_ = decode_step(large, 1, 4096)
assert round(over_cache.intensity) == round(one_token)
prefill = attention_flops(large, 4096, 4096)
print(f"prefill of 4,096 tokens: absorbing would take {prefill.absorbed / prefill.rebuilt:.1f} times the FLOPs")

# %% [markdown]
# One query per row brings absorbed attention almost to the kink: memory and processor are both close to fully used. The
# second token that MTP adds (lesson 22) passes it. And prefill wants the other way altogether, since there are as many
# queries as keys. Two phases with different work, different limits and different code: a reason to give them machines
# of their own. The report uses 32 GPUs as a unit for prefill, and 320 for decode (section 3.4). Why so many for the
# lighter work?

# %%
tokens = H800.ridge * large.n_routed_experts / large.num_experts_per_tok
print(f"an expert uses its weights fully when it has {H800.ridge:.0f} tokens in a step")
print(f"a token visits {large.num_experts_per_tok} of {large.n_routed_experts}: that is {tokens:,.0f} tokens in all")
cached_bytes = tokens * 4096 * cache.bytes("mla")
print(f"on 320 GPUs: {tokens / 320:.0f} each; with 4,096 tokens a row, {cached_bytes / 1e12:.1f} TB of cache")

# %% [markdown]
# Decoding is light for each token, and wants thousands of them at once, each with a cache of its own.
#
# One more bracket. $W^{UQ}$ makes the query from its own latent (lesson 06), and $W^{UK}$ follows at once: why not
# multiply the two matrices beforehand, and fold with the product? Count its size, for all heads of a layer.

# %%
q_latent, n = large.q_lora_rank, large.qk_nope_head_dim
apart_size, product_size = h * n * (q_latent + c), h * q_latent * c
print(f"W_UQ without its rope part, and W_UK: {apart_size / 1e6:.1f}M numbers; their product {product_size / 1e6:.1f}M")
print(f"{product_size / apart_size:.0f} times the weights to read, and as many times the FLOPs")

# %% [markdown]
# Each matrix is thin in the middle: `n` = 128 is far smaller than 1,536 and 512. The product has lost that. "Absorbed"
# means the order of the products, not a new matrix.

# %% [markdown] tags=["recap"]
# ## Recap
#
# 1. Why may a decoder keep a token's latent for ever, although more and more tokens follow?
#    <details><summary>Answer</summary>No token sees a later one, in any layer. What a token is in a layer depends on the
#    tokens up to it, and these do not change.</details>
# 2. Absorbed attention compares vectors of 576 numbers. Which scale does its softmax get?
#    <details><summary>Answer</summary>The old one, 1/sqrt(192) (times YaRN's factor): the brackets moved, the number
#    did not.</details>
# 3. A chat server reads a prompt of 2,000 tokens and then writes 300. When should it absorb?
#    <details><summary>Answer</summary>While it writes: one new token a step is far below the crossing (some 160 new
#    tokens at these widths). The prompt, read in one go or in chunks of several hundred, is cheaper expanded.</details>

# %% [markdown] tags=["next"]
# ## Next
#
# Attention is done: you can write it, cache it, and say what it costs. In the roofline the routed experts took most of
# the time at small batches. Lesson 08 builds them. The cache comes back in lesson 22, where several guessed tokens are
# checked at once, and in lesson 23, where many rows share machines.
