# ---
# jupyter:
#   jupytext:
#     text_representation:
#       format_name: percent
#   dsv3:
#     title: Shapes and einops
#     minutes: 75
#     after: []
#     builds: split heads, ranks of expert groups, scores on latents, the combine of expert outputs
#     tracks: [half-day, two-days, term]
# ---

# %% [markdown] tags=["why"]
# # 01 · Shapes and einops
#
# Most lines of a model's code do no arithmetic. They move numbers from one axis to another: a vector is split into
# heads, heads change places with tokens, experts are put into groups. A wrong move seldom raises an error. The shape is
# right, the meaning is wrong, and training covers it up: the loss goes down all the same.
#
# In this lesson you learn to write such moves so that they can be read, and you build four of them that DeepSeek-V3
# needs: splitting heads, ranking groups of experts, scoring queries against cached latents, and summing up what the
# experts said. Then you find a bug that every shape check in the world lets through.
#
# Here is the first move. On the left are three tokens (rows `s`) with eight numbers each. On the right the same 24
# numbers, as two heads (blocks `h`) with four numbers (`q`) for each token. The numbers count in the order in which
# they lie in memory.

# %%
from dsv3_mini.viz.figures.shapes import shape_figure, trace

split = trace("s (h q) -> h s q", s=3, h=2, q=4)
shape_figure(split, "Splitting heads: each head gets a block of its own", colour_by="h")

# %% [markdown] tags=["paper"]
# ## What the report writes, and what code needs
#
# The report (sections 2.1.1 and 2.1.2) writes its equations for *one* token and *one* head. Two of them matter here.
# Head $i$ of the token at position $t$ sums the values $v$ of the tokens $j$ before it, weighed by a softmax over
# scores (equation 10; $q$ is the query, $k$ a key, and $d_h + d_h^R$ how wide both are):
#
# $$ o_{t,i} = \sum_{j=1}^{t} \mathrm{softmax}_j\!\left(\frac{q_{t,i}^\top k_{j,i}}{\sqrt{d_h + d_h^R}}\right) v_{j,i} $$
#
# A sparse layer adds up the outputs of $N_r$ routed experts, weighed by gate values $g$ that are zero for all but a few
# (equation 12, the routed part; $u_t$ is the token's vector):
#
# $$ \sum_{i=1}^{N_r} g_{i,t}\, \mathrm{FFN}_i(u_t) $$
#
# Code does this for all tokens, heads and experts at once. Each index of the equation becomes an *axis*, and the whole
# course calls an axis by the same letter:
#
# | letter | axis | letter | axis |
# |---|---|---|---|
# | `b` | row of a batch | `c` | latent, the compressed key and value |
# | `s` | position of a query | `e` | expert |
# | `t` | position of a key | `g` | group of experts |
# | `T` | token, batch and position in one | `m` | member of a group |
# | `h` | head | `k` | slot of a chosen expert |
# | `d` | width of the model | `f` | inner width of an expert |
# | `q` | width of a query, `n` and `r` together | `v` | width of a value |
# | `n` | part of a query without position | `r` | part of it that RoPE rotates |
#
# The report's $t$ is our `s`, its $j$ is our `t`.

# %% [markdown] tags=["naive"]
# ## The naive way
#
# Splitting heads, written with an index for each axis. The line in the middle holds all that there is to know: number
# `m` of head `k` stands at place `k * q + m` of the token's vector.

# %%
import torch

b, s, h, q = 1, 3, 2, 4
x = torch.arange(b * s * h * q).reshape(b, s, h * q)
heads = torch.empty(b, h, s, q, dtype=torch.long)
for i in range(b):
    for j in range(s):
        for k in range(h):
            for m in range(q):
                heads[i, k, j, m] = x[i, j, k * q + m]
print(heads[0])

# %% [markdown]
# Four loops are slow, so people reach for `view`. It gives new brackets to the same memory, and it asks for nothing but
# a number of elements that fits. So this runs:

# %%
wrong = x.view(b, h, s, q)
print(wrong[0])
print("same shape:  ", wrong.shape == heads.shape)
print("same numbers:", torch.equal(wrong, heads))

# %% [markdown]
# Compare the first block with the one above: its second row is 4, 5, 6, 7, which belongs to head 1 of token 0, and now
# poses as token 1 of head 0. The right line is `x.view(b, s, h, q).transpose(1, 2)`. Nothing in it says why the 1 and
# the 2.
#
# ## rearrange: the axes have names
#
# einops writes the move as a pattern. On the left of the arrow stands what comes in, on the right what goes out.
# Parentheses hold axes that share one dimension: in `(h q)` **the letter on the right runs fastest**, as the last digit
# of a counter does. What einops cannot know, here the number of heads, you tell it by name.

# %%
from einops import rearrange

by_name = rearrange(x, "b s (h q) -> b h s q", h=h)
print("same numbers:", torch.equal(by_name, heads))

# %% [markdown]
# A pattern cannot lose an element, and it complains when a letter is missing or a length does not divide.

# %%
from einops import EinopsError

for pattern, lengths in (("b s (h q) -> b h s", {"h": 2}), ("b s (h q) -> b h s q", {"h": 3})):
    try:
        rearrange(x, pattern, **lengths)
    except EinopsError as error:
        print(pattern, "->", str(error).strip().splitlines()[-1].strip())

# %% [markdown] tags=["exercise"]
# ### Exercise 1 · Split the heads
# ●○○ · 5 minutes
#
# Attention works on each head apart. Its projection gives, for each token, the queries of all heads in one long
# vector: first the `q` numbers of head 0, then those of head 1, and so on. Write the function that splits them.
#
# <details><summary>Hint 1</summary>On the left the last axis is two letters in parentheses.</details>
# <details><summary>Hint 2</summary>Which letter runs fastest? A head's numbers are neighbours.</details>

# %%
from jaxtyping import Bool, Float, Int
from torch import Tensor


def split_heads(x: Float[Tensor, "b s hq"], heads: int) -> Float[Tensor, "b h s q"]:
    """The vector of each token, split into equal runs, one for each head; heads stand before tokens."""
    ### BEGIN SOLUTION: one rearrange; its pattern names b, s, h and q
    return rearrange(x, "b s (h q) -> b h s q", h=heads)
    ### END SOLUTION


# %%
from dsv3_mini.course.checks import lesson_01 as check

check.split_heads(split_heads)

# %% [markdown]
# ## reduce: letters that vanish
#
# A letter on the left that is missing on the right is reduced: summed, averaged, or the largest taken, as the third
# argument says. `dim=-1` says *which* axis goes; a pattern says *what* goes. A `1` on the right keeps the place, so
# that the result still broadcasts against the input.

# %%
from einops import reduce

affinity = torch.tensor([[[3.0, 1.0, 2.0, 8.0, 0.0, 5.0]]])  # [b s e]: one token, six experts
print("best expert of each pair:", reduce(affinity, "b s (g m) -> b s g", "max", m=2).tolist())
print("sum over all experts:    ", reduce(affinity, "b s e -> b s 1", "sum").tolist())

# %% [markdown] tags=["exercise"]
# ### Exercise 2 · Rank the groups
# ●●○ · 10 minutes
#
# 256 experts do not fit on one machine. They are put into groups, one group to a machine, and a token may visit a few
# groups only, so that it does not travel everywhere (section 2.1.2, node-limited routing). Which groups? Those with the
# highest *rank*: the sum of the token's two highest preferences within the group. A preference is one number for each
# expert, and may be negative. Groups are runs of neighbouring experts.
#
# <details><summary>Hint 1</summary>First give the groups an axis of their own: <code>e</code> becomes <code>(g
# m)</code>, m for member.</details>
# <details><summary>Hint 2</summary><code>grouped.topk(2, dim=-1).values</code> has the two best of each
# group.</details>
# <details><summary>Hint 3</summary>Call the axis of the two best <code>two</code>, and reduce it with "sum".</details>


# %%
def group_ranks(preference: Float[Tensor, "b s e"], n_group: int) -> Float[Tensor, "b s g"]:
    """For each token and group of experts, the sum of the two highest preferences in the group."""
    ### BEGIN SOLUTION: split e into groups, take the two best of each, reduce them to their sum
    grouped = rearrange(preference, "b s (g m) -> b s g m", g=n_group)
    return reduce(grouped.topk(2, dim=-1).values, "b s g two -> b s g", "sum")
    ### END SOLUTION


# %%
check.group_ranks(group_ranks)

# %% [markdown]
# ## repeat: letters that appear
#
# A letter that stands on the right only is new, and its length must be told. In latent attention all heads share one
# rotated key per token; to put it beside each head's own part, it is repeated along `h`.

# %%
from einops import repeat

key_rope = torch.arange(12).reshape(1, 3, 4)  # [b t r]
every_head = repeat(key_rope, "b t r -> b t h r", h=2)
print("shape:", tuple(every_head.shape))
print("all heads have the same key:", torch.equal(every_head[:, :, 0], every_head[:, :, 1]))

# %% [markdown]
# ## einsum: products, and sums over what is left out
#
# `einsum` takes several tensors and a pattern with a comma. Elements that agree in every letter they share are
# multiplied; a letter that does not stand on the right is summed over. That is all, and it covers the dot product, the
# matrix product, the batched matrix product and the weighted sum.

# %%
from einops import einsum

query, key = torch.randn(2, 5, 8), torch.randn(2, 7, 8)
scores = einsum(query, key, "b s q, b t q -> b s t")  # every query with every key of its row; q is summed
print("shape:", tuple(scores.shape))
print("as a batched matrix product:", torch.allclose(scores, query @ key.mT, atol=1e-5))

# %% [markdown] tags=["exercise"]
# ### Exercise 3 · Scores on latents
# ●●○ · 10 minutes
#
# DeepSeek-V3 caches two things for each token and no keys: a latent (`c` wide) and the rotated key that all heads share
# (`r` wide). When it decodes, each head's query comes in two parts too: `query_latent`, which meets the latent, and
# `query_rope`, which meets the rotated key. The score is the sum of both dot products, times `scale`. There is no
# mask and no softmax here.
#
# <details><summary>Hint 1</summary>One einsum for each part. The cached tensors have no letter h: one entry serves all
# heads.
# </details>
# <details><summary>Hint 2</summary>Queries are <code>b s h c</code>, latents <code>b t c</code>, scores
# <code>b h s t</code>.</details>


# %%
def latent_scores(
    query_latent: Float[Tensor, "b s h c"],
    query_rope: Float[Tensor, "b s h r"],
    latent: Float[Tensor, "b t c"],
    key_rope: Float[Tensor, "b t r"],
    scale: float,
) -> Float[Tensor, "b h s t"]:
    """How much each query of each head wants each cached token: both parts' dot products added, times scale."""
    ### BEGIN SOLUTION: an einsum for the latent part, one for the rope part; scale their sum
    content = einsum(query_latent, latent, "b s h c, b t c -> b h s t")
    position = einsum(query_rope, key_rope, "b s h r, b t r -> b h s t")
    return (content + position) * scale
    ### END SOLUTION


# %%
check.latent_scores(latent_scores)

# %% [markdown] tags=["exercise"]
# ### Exercise 4 · Combine the experts
# ●●● · 15 minutes
#
# Equation 12, for all tokens at once. Suppose that every expert has worked on every token, which is wasteful and easy:
# `outputs[e, T]` is what expert `e` makes of token `T`. The router has given each token `k` slots: `chosen[T, k]` is
# the number of the expert in a slot, `gates[T, k]` its gate value, final as it comes. Sum up what the chosen experts
# say.
#
# <details><summary>Hint 1</summary>Make the equation's g: a tensor <code>[T e]</code> that is zero where a token does
# not visit an expert. <code>torch.zeros(...).scatter(1, chosen, gates)</code> puts each gate value into its expert's
# column.</details>
# <details><summary>Hint 2</summary>Then one einsum of <code>T e</code> with <code>e T d</code>.</details>


# %%
def combine(
    outputs: Float[Tensor, "e T d"], chosen: Int[Tensor, "T k"], gates: Float[Tensor, "T k"]
) -> Float[Tensor, "T d"]:
    """For each token the sum of its chosen experts' outputs, each times its gate value."""
    ### BEGIN SOLUTION: put the gates into a [T e] that is zero elsewhere; one einsum sums over e
    weight = gates.new_zeros(chosen.shape[0], outputs.shape[0]).scatter(1, chosen, gates)
    return einsum(weight, outputs, "T e, e T d -> T d")
    ### END SOLUTION


# %%
check.combine(combine)

# %% [markdown]
# ## jaxtyping: shapes in the signature
#
# The annotations above, such as `Float[Tensor, "b s d"]`, come from jaxtyping. They tell a reader what goes in and out,
# and they can be asked. Within one context a letter keeps the length at which it was first seen: below, `s` is 5 from
# the first line on, so a tensor of 7 positions is none of `b s c`. A shape check of this kind finds a forgotten swap at
# once, as long as the two lengths differ.

# %%
from jaxtyping import jaxtyped

query, latent = torch.zeros(2, 5, 4, 16), torch.zeros(2, 7, 16)
with jaxtyped("context"):
    print("query  fits b s h c:", isinstance(query, Float[Tensor, "b s h c"]))
    print("latent fits b t c:  ", isinstance(latent, Float[Tensor, "b t c"]))
    print("latent fits b s c:  ", isinstance(latent, Float[Tensor, "b s c"]))

# %% [markdown] tags=["package"]
# ## The package's own version
#
# `dsv3_mini` holds the same patterns, in the places where they are needed. Here is attention on the cached latents.
# Look for the two lines that are your `latent_scores`; the lines around them you meet again in lesson 06.

# %%
from dsv3_mini.course.lesson import same, show_source
from dsv3_mini.model.attention import MultiHeadLatentAttention

show_source(MultiHeadLatentAttention.absorbed)

# %% [markdown]
# To prove that yours does the same, put it in the package's place: a small model, with its own weights, attends with
# your scores, and with its own.

# %%
import dsv3_mini as dsv3

torch.manual_seed(0)
small = dsv3.ModelConfig.preset("nano", initializer_range=0.3)
block = dsv3.DeepSeekV3(small).layers[1].requires_grad_(False)
layer, moe = block.self_attn, block.mlp
query_nope = torch.randn(2, 6, layer.heads, layer.nope)
query_rope = torch.randn(2, 6, layer.heads, layer.rope)
latent, key_rope = torch.randn(2, 6, small.kv_lora_rank), torch.randn(2, 6, layer.rope)


# %%
def attend_with_your_scores(
    query_nope: Tensor, query_rope: Tensor, latent: Tensor, key_rope: Tensor, mask: Bool[Tensor, "b s t"] | None
) -> Float[Tensor, "b s h v"]:
    weight = rearrange(layer.kv_b_proj.weight, "(h nv) c -> h nv c", h=layer.heads)
    up_key, up_value = weight.split([layer.nope, layer.value], dim=1)
    query_latent = einsum(query_nope, up_key, "b s h n, h n c -> b s h c")
    share = latent_scores(query_latent, query_rope, latent, key_rope, layer.scale).softmax(dim=-1)
    mixed = einsum(share, latent, "b h s t, b t c -> b s h c")
    return einsum(mixed, up_value, "b s h c, h v c -> b s h v")


same(attend_with_your_scores, layer.absorbed, (query_nope, query_rope, latent, key_rope, None))

# %% [markdown]
# The router's version of your `group_ranks` goes one step further: it keeps the best groups and puts the experts of
# the others at minus infinity.

# %%
from dsv3_mini.model.router import limit_to_groups

show_source(limit_to_groups)


# %%
def limit_with_your_ranks(preference: Tensor, n_group: int, topk_group: int) -> Float[Tensor, "b s e"]:
    ranks = group_ranks(preference, n_group)
    keep = torch.zeros(ranks.shape, dtype=torch.bool).scatter(-1, ranks.topk(topk_group, dim=-1).indices, True)
    keep = repeat(keep, "b s g -> b s (g m)", m=preference.shape[-1] // n_group)
    return preference.masked_fill(~keep, -torch.inf)


same(limit_with_your_ranks, limit_to_groups, (torch.randn(2, 5, 16), 4, 2), (torch.randn(1, 9, 12), 3, 1))

# %% [markdown]
# The experts: the package never lets one see a token that did not choose it, and gets the same sum.

# %%
from dsv3_mini.model.feed_forward import swiglu

tokens = torch.randn(12, small.hidden_size)
routing = moe.gate(rearrange(tokens, "T d -> 1 T d"))
chosen, gates = routing.chosen[0], routing.gates[0]


def experts_with_your_combine(x: Tensor, chosen: Tensor, gates: Tensor, load: Tensor) -> Float[Tensor, "T d"]:
    inner = swiglu(einsum(x, moe.experts.gate_up_proj, "T d, e ff d -> e T ff"))
    outputs = einsum(inner, moe.experts.down_proj, "e T f, e d f -> e T d")
    return combine(outputs, chosen, gates)


same(experts_with_your_combine, moe.experts, (tokens, chosen, gates, routing.load))

# %% [markdown]
# And the heads, where the package splits its queries.

# %%
from dsv3_mini.model.rope import rotations

no_turn = rotations(small, torch.zeros(6, dtype=torch.long))  # at position 0 RoPE turns nothing


def queries_with_your_split(x: Float[Tensor, "b s d"]) -> Float[Tensor, "b h s q"]:
    return split_heads(layer.q_proj(x), layer.heads)


def queries_of_the_package(x: Float[Tensor, "b s d"]) -> Float[Tensor, "b h s q"]:
    return rearrange(torch.cat(layer._queries(x, no_turn), dim=-1), "b s h q -> b h s q")


same(queries_with_your_split, queries_of_the_package, (torch.randn(2, 6, small.hidden_size),))

# %% [markdown] tags=["experiment"]
# ## Experiment: what does a pattern cost?
#
# A tensor is a run of memory and a way to walk through it: for each axis a *stride*, how far to jump to the next
# element. Some moves only change the walk and take no memory. Others must write the numbers anew.
#
# What we expect, before we measure: splitting and swapping axes is free, for a stride can say it. So is repeating along
# a new axis, with a stride of zero. Merging two axes is free where they lie side by side in memory, as heads do right
# after they were split; where they do not, no one stride can say it, and the numbers are copied. Repeating into an axis
# that exists always copies. If einops copied everything to be safe, the first four lines below would fail.


# %%
def new_bytes(before: Tensor, after: Tensor) -> int:
    """Bytes that `after` needed beside those of `before`: none, if both walk through the same memory."""
    shared = before.untyped_storage().data_ptr() == after.untyped_storage().data_ptr()
    return 0 if shared else after.untyped_storage().nbytes()


x = torch.randn(2, 64, 128)  # [b s (h q)] with h = 4, q = 32
swapped = rearrange(x, "b s (h q) -> b h s q", h=4)
written = swapped.contiguous()  # the same numbers, written out anew: in memory, heads now come before tokens
print(f"x has {x.nbytes:,} bytes; strides {x.stride()}, and after the split and swap {swapped.stride()}")

# %%
merge = "b h s q -> b s (h q)"
trials = {
    "split      b s (h q) -> b s h q": (0, new_bytes(x, rearrange(x, "b s (h q) -> b s h q", h=4))),
    "and swap   b s (h q) -> b h s q": (0, new_bytes(x, swapped)),
    "new axis   b s d -> b s h d    ": (0, new_bytes(x, repeat(x, "b s d -> b s h d", h=4))),
    "merge back b h s q -> b s (h q)": (0, new_bytes(swapped, rearrange(swapped, merge))),
    "merge anew b h s q -> b s (h q)": (x.nbytes, new_bytes(written, rearrange(written, merge))),
    "old axis   b s d -> b s (h d)  ": (4 * x.nbytes, new_bytes(x, repeat(x, "b s d -> b s (h d)", h=4))),
}
for name, (expected, measured) in trials.items():
    print(f"{name}  expected {expected:>9,}  measured {measured:>9,}", "✓" if expected == measured else "✗")
assert all(expected == measured for expected, measured in trials.values())

# %% [markdown]
# Lines four and five are the same pattern, on tensors that are equal number for number. One costs nothing, the other a
# copy of everything. A pattern says what you mean; what it costs depends on where the numbers lie.

# %% [markdown] tags=["interactive"]
# ## The shape microscope
#
# Pick a pattern, then press *Play*, or *Step* to move one element at a time. The slider goes to any moment (with the
# arrow keys, too), *Colour by* paints the elements by their index on one axis. Point at an element to see where it
# goes.

# %%
from dsv3_mini.viz.widgets.shapes import ShapeMicroscope, Specimen

microscope = ShapeMicroscope()
microscope

# %% [markdown]
# Three puzzles. Decide with a pencil, then let the microscope show it. The cell below has the answers.
#
# 1. *split heads*, `s (h q) -> h s q`: where does element 13 arrive?
# 2. *split heads, letters swapped*, `s (q h) -> h s q`: and here?
# 3. *one rope key for all heads*, `t r -> t h r`: in how many places does element 7 arrive, and where?

# %%
still = microscope.png()
microscope.set(pattern="split heads", moved=14)
assert microscope.png() != still
print("1.", microscope.move.targets(13))
microscope.set(pattern="split heads, letters swapped", moved=14)
print("2.", microscope.move.targets(13))
microscope.set(pattern="one rope key for all heads", moved=8, colour="r")
print("3.", microscope.move.targets(7))

# %% [markdown]
# It takes patterns of your own, too, with up to four axes on a side. And `microscope.save_html("shapes.html")` writes
# all of it into one file that moves without Python, for slides.

# %%
mine = Specimen("a batch of heads", "b s (h q) -> (b h) s q", {"b": 2, "s": 2, "h": 2, "q": 2}, colour="h")
ShapeMicroscope([mine])

# %% [markdown]
# ## Find the bug
#
# A colleague writes attention from scratch. One projection makes keys (`n` wide) and values (`v` wide) of all heads
# from the latent, and this function takes them apart. All shapes are right. The model trains, and its loss is as good
# as that of the package. Then the colleague loads released weights, and the model babbles.


# %%
def keys_and_values_with_a_bug(
    key_value: Float[Tensor, "b t hnv"], heads: int, nope: int
) -> tuple[Float[Tensor, "b t h n"], Float[Tensor, "b t h v"]]:
    """The keys and the values of all heads, from one vector per token."""
    keys, values = key_value.split([heads * nope, key_value.shape[-1] - heads * nope], dim=-1)
    return rearrange(keys, "b t (h n) -> b t h n", h=heads), rearrange(values, "b t (h v) -> b t h v", h=heads)


# %%
from dsv3_mini.model.attention import attention


def attend_with_the_bug(key_value: Float[Tensor, "b t hnv"]) -> Float[Tensor, "b s h v"]:
    keys, values = keys_and_values_with_a_bug(key_value, layer.heads, layer.nope)
    keys = torch.cat([keys, repeat(key_rope, "b t r -> b t h r", h=layer.heads)], dim=-1)
    return attention(torch.cat([query_nope, query_rope], dim=-1), keys, values, layer.scale, mask=None)


right = layer.expanded(query_nope, query_rope, latent, key_rope, mask=None)
wrong = attend_with_the_bug(layer.kv_b_proj(latent))
print("same shape:  ", wrong.shape == right.shape)
print("same numbers:", torch.allclose(wrong, right, atol=1e-4))

# %% [markdown] tags=["bug"]
# ### Find the bug · Keys that are values
# ●●○ · 10 minutes
#
# The released projection gives, for each token, the vector of head 0, then that of head 1, and so on. The vector of
# *one* head is its key (`nope` numbers), then its value (the rest). Write the function as it should be.
#
# <details><summary>Hint 1</summary>Which of the microscope's last two patterns does the released layout follow, and
# which one the colleague?</details>
# <details><summary>Hint 2</summary>Split into heads first. Then cut each head's vector after <code>nope</code>
# numbers.</details>


# %%
def keys_and_values(
    key_value: Float[Tensor, "b t hnv"], heads: int, nope: int
) -> tuple[Float[Tensor, "b t h n"], Float[Tensor, "b t h v"]]:
    """The keys and the values of all heads, from one vector per token."""
    ### BEGIN SOLUTION: give the heads an axis, then cut each head's vector into key and value
    per_head = rearrange(key_value, "b t (h nv) -> b t h nv", h=heads)
    return per_head[..., :nope], per_head[..., nope:]
    ### END SOLUTION


# %%
check.keys_and_values(keys_and_values)

# %% [markdown]
# Why did training not notice? Because the bug is only another *order* of the projection's rows. Put the rows of the
# weight into the order that the colleague's code expects, and it computes the same function. Training finds its weights
# in whatever order the code asks for. A checkpoint from elsewhere has an order already.

# %%
rows = rearrange(layer.kv_b_proj.weight, "(h two n) c -> (two h n) c", two=2, h=layer.heads)
print("same numbers:", torch.allclose(attend_with_the_bug(latent @ rows.T), right, atol=1e-4))

# %% [markdown] tags=["at-671b"]
# ## The numbers at 671B
#
# The same letters, with the lengths of the released model. On torch's *meta* device a tensor has a shape and no memory,
# so that we can ask for sizes that no laptop holds. One row of 4096 tokens, one layer:

# %%
cfg = dsv3.ModelConfig.preset("671b")
length = dict(b=1, s=4096, t=4096, T=4096, h=cfg.num_attention_heads, d=cfg.hidden_size, c=cfg.kv_lora_rank)
length |= dict(q=cfg.qk_head_dim, n=cfg.qk_nope_head_dim, r=cfg.qk_rope_head_dim, v=cfg.v_head_dim)
length |= dict(e=cfg.n_routed_experts, k=cfg.num_experts_per_tok, g=cfg.n_group)


def megabytes(axes: str, dtype: torch.dtype = torch.bfloat16) -> float:
    """The size of a tensor with these axes in the released model; prints its shape."""
    tensor = torch.empty([length[letter] for letter in axes.split()], dtype=dtype, device="meta")
    print(f"{axes:8} {str(list(tensor.shape)):24} {tensor.nbytes / 1e6:9,.1f} MB")
    return tensor.nbytes / 1e6


# %%
sizes = {axes: megabytes(axes) for axes in ("b s d", "b s h q", "b t h q", "b t h v", "b t c", "b t r")}
sizes |= {axes: megabytes(axes, torch.float32) for axes in ("b s e", "b s g", "b h s t")}
assert max(sizes, key=sizes.get) == "b h s t"
assert sizes["b s h q"] > sizes["b s d"] > 10 * sizes["b t c"]

# %% [markdown]
# The queries of all heads (`b s h q`) are larger than the residual stream `b s d` that they come from, and so are the
# keys. The latents `b t c` are small. The scores `b h s t` dwarf everything, which is why good attention kernels never
# write them to memory. What a decoder must keep is `b t c` and `b t r`; the ledger, which counts every layer, agrees:

# %%
from dsv3_mini.ledger import cache_per_token, count_parameters

cache = cache_per_token(cfg)
by_shape = (length["c"] + length["r"]) * cfg.num_hidden_layers * torch.bfloat16.itemsize
print(f"cache of one token, all layers: {by_shape:,} bytes; by the ledger: {cache.bytes('mla'):,}")
print(f"with keys and values of all heads: {cache.bytes('mha'):,} bytes, {cache.saving:.0f} times as many")
assert by_shape == cache.bytes("mla")

# %% [markdown]
# And the weights of one sparse layer, as the model stores them. The experts stand in two stacked tensors whose first
# axis is `e`; gate and up projection lie side by side.

# %%
from dsv3_mini.model.block import Block

with torch.device("meta"):
    sparse = Block(cfg, layer=cfg.first_k_dense_replace)
for name, weight in sparse.named_parameters():
    if weight.ndim > 1:
        print(f"{name:40} {str(list(weight.shape)):20} {2 * weight.numel() / 1e6:10,.1f} MB in BF16")
total = sum(weight.numel() for weight in sparse.parameters())
print(f"{total:,} parameters; by the ledger: {count_parameters(cfg).moe_layer.trainable:,}")
assert total == count_parameters(cfg).moe_layer.trainable

# %% [markdown] tags=["recap"]
# ## Recap
#
# <details><summary>1. <code>x</code> has the shape [b s (h q)]. What is the difference between <code>x.view(b, h, s,
# q)</code> and <code>rearrange(x, "b s (h q) -> b h s q", h=h)</code>?</summary>
#
# Both have the same shape. `view` leaves every number where it lies in memory and sets new brackets, so a "head"
# becomes a run of tokens. `rearrange` follows the names: head 0 has the first `q` numbers of each token.
#
# </details>
#
# <details><summary>2. In <code>einsum(p, y, "T e, e T d -> T d")</code>, which letter is summed over, and how do you
# know?</summary>
#
# `e`: it stands on the left and not on the right. `T` and `d` stand on the right, so each of their values keeps its own
# sum.
#
# </details>
#
# <details><summary>3. A shape check passes, the loss goes down. Name a mistake that both let through.</summary>
#
# Any swap within parentheses, `(h q)` for `(q h)`, or halves for heads as in the bug above: where it is only another
# order of a weight's rows, training adapts to it. Weights from elsewhere, or a comparison with an independent
# implementation, bring it out.
#
# </details>

# %% [markdown] tags=["next"]
# ## What is next
#
# Lesson 02 goes from text to tokens: what the letters `b` and `s` are made of. In lesson 04 you put these patterns to
# work in a whole transformer, and in lesson 06 in the latent attention whose scores you have just written.
