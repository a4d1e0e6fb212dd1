# ---
# jupyter:
#   jupytext:
#     text_representation:
#       format_name: percent
#   dsv3:
#     title: RoPE
#     minutes: 85
#     after: [04_transformer]
#     builds: rotary positions from complex numbers, both layouts, decoupled RoPE, positions that go on with a cache
#     tracks: [two-days, term]
# ---

# %% [markdown] tags=["why"]
# # 05 · RoPE
#
# Attention compares queries with keys, and nothing in a dot product says where the two tokens stand. Shuffle the
# earlier tokens of a row, and an attention gives the last one the same output as before. Lesson 04 helped itself with a
# learned vector for each position, which has nothing to say about a position that training never reached.
#
# Rotary position embedding, RoPE, *turns* each query and each key by an angle that grows with its position. The product
# of two turned vectors depends on the difference of their angles: on how far apart the tokens are, wherever they
# stand. In this lesson you build the turns, meet two layouts that look alike and are not, and find out why DeepSeek-V3
# gives positions a part of the key to themselves.
#
# The picture shows the idea. A vector is read as pairs of numbers, each pair as a hand on a dial. In every row one hand
# starts at three o'clock, and moves on as its token's position grows: one fast, the next more slowly.

# %%
from dsv3_mini import ModelConfig
from dsv3_mini.model.rope import frequencies
from dsv3_mini.viz.figures.rope import clocks_figure

tiny = ModelConfig.preset("tiny")
clocks_figure(frequencies(tiny), pairs=[0, 1, 2, 4], positions=[0, 1, 2, 3, 4, 8, 16])

# %% [markdown] tags=["paper"]
# ## In the report
#
# The report takes RoPE as known, and says where it stands (section 2.1.1). With $h_t$ for the state of token $t$ and
# $c^Q_t$ for its query latent, which lesson 06 is about:
#
# | equation | formula | in words |
# |---|---|---|
# | 3 | $k^R_t = \mathrm{RoPE}(W^{KR} h_t)$ | a rotated key of its own, `r` wide, the same for all heads |
# | 4 | $k_t = [k^C_t ; k^R_t]$ | a head's key: a part without position, `n` wide, beside the rotated one |
# | 8, 9 | $q_t = [q^C_t ; \mathrm{RoPE}(W^{QR} c^Q_t)]$ | a head's query, in the same two parts |
# | 10 | $\mathrm{softmax}(q_s \cdot k_t / \sqrt{n + r})$ | one scale for the whole product |
#
# And RoPE itself: of a vector $x$ of `r` numbers it makes $r/2$ complex numbers, and multiplies each by a turn,
#
# $$z_j = x_{2j} + i\,x_{2j+1} \qquad z_j \;\to\; z_j\, e^{i p w_j} \qquad w_j = \theta^{-j/(r/2)}$$
#
# $p$ is the position of the token, $j$ the number of the pair (from 0), $i$ the imaginary unit. $w_j$ is the pair's
# **frequency**, in radians per position. $\theta$, `rope_theta` in the config, is 10,000: pair 0 turns by one radian a
# position, the last one nearly 10,000 times slower.

# %% [markdown] tags=["naive"]
# ## The naive way
#
# Python knows complex numbers. $e^{i\varphi} = \cos\varphi + i\sin\varphi$ has length 1 and points in the direction
# $\varphi$. To multiply by it is to turn by $\varphi$: lengths stay, and two turns after each other add up. The dot
# product of two pairs is the real part of $a \bar b$, where $\bar b$ has the sign of its imaginary part flipped. Now
# turn both, a query $q$ at position $s$ and a key $k$ at position $t$:
#
# $$q\,e^{isw} \cdot \overline{k\,e^{itw}} = q\,\bar k\; e^{i(s-t)w}$$
#
# Only $s - t$ is left. That line is all of RoPE.

# %%
import cmath


def turned(pair: complex, position: int, w: float) -> complex:
    """The pair of a token at `position`, turned by w radians for each place before it."""
    return pair * cmath.exp(1j * position * w)


def dot(a: complex, b: complex) -> float:
    """The dot product of (real, imaginary) of one with those of the other."""
    return (a * b.conjugate()).real


# %%
query, key, w = 2 + 1j, 1 - 3j, 0.3
for s, t in ((5, 3), (105, 103), (5, 2)):
    print(f"query at {s:3}, key at {t:3}: score {dot(turned(query, s, w), turned(key, t, w)):6.3f}")

# %% [markdown]
# A hundred places further on the score is the same; one place farther apart it is another. And a whole vector, pair by
# pair, with $\theta = 100$ and two pairs:


# %%
def naive_rope(x: list[float], position: int, theta: float) -> list[float]:
    """x, r numbers -> r numbers: neighbours are a pair, and pair j has the frequency theta^(-j / (r/2))."""
    pairs, out = len(x) // 2, []
    for j in range(pairs):
        z = turned(complex(x[2 * j], x[2 * j + 1]), position, theta ** (-j / pairs))
        out += [z.real, z.imag]
    return out


for position in (0, 1, 10):
    print(f"position {position:2}:", [round(number, 2) for number in naive_rope([1, 0, 1, 0], position, 100.0)])

# %% [markdown]
# The second pair turns ten times as slowly as the first: at position 10 it stands where the first stood at position 1.
#
# Now the same with tensors. Each exercise has a check that says what is wrong; what you leave blank stays blank, and
# the rest of the notebook runs without it.

# %%
import torch
from einops import einsum, rearrange, repeat
from torch import Tensor

from dsv3_mini.course.checks import lesson_05 as check
from dsv3_mini.course.lesson import same, show_source
from dsv3_mini.model.rope import rotate, rotations

# %% [markdown] tags=["exercise"]
# ### Exercise 1 · Turns
# ●○○ · 10 minutes
#
# Make the turns $e^{i p w_j}$ of all positions and all pairs. `positions` is a tensor of whole numbers of any shape
# `[...]`, `width` is $r$, and the result is complex, `[... pairs]`, with $r/2$ pairs and
# $w_j = \theta^{-j/(r/2)}$ for $j = 0, 1, \dots$
#
# <details><summary>Hint 1</summary>Frequencies first, <code>[pairs]</code>; then an angle for every position and every
# pair: <code>positions[..., None] * w</code>.</details>
# <details><summary>Hint 2</summary><code>torch.polar(length, angle)</code> makes complex numbers. A turn has length
# 1.</details>


# %%
def turns(positions: Tensor, width: int, theta: float) -> Tensor:
    """positions [...] -> complex [... pairs], width/2 of them: e^(i p w_j) with w_j = theta^(-j / (width/2))."""
    ### BEGIN SOLUTION: the frequencies of the pairs, the angle of each position and pair, and turns of length 1
    pairs = width // 2
    w = theta ** (-torch.arange(pairs) / pairs)
    angles = positions[..., None] * w
    return torch.polar(torch.ones_like(angles), angles)
    ### END SOLUTION


# %%
check.turns(turns)

# %% [markdown] tags=["exercise"]
# ### Exercise 2 · Turn the pairs
# ●●○ · 12 minutes
#
# `x` is `[b s h r]`: queries or keys of `h` heads. Its pairs are *neighbours*, $(x_0, x_1)$, $(x_2, x_3)$ and so on.
# `turn` is what exercise 1 makes, complex, `[s pairs]`: each token has its own turns, the same in all rows and heads.
# Turn every pair, and give back a real tensor of the shape of `x`, each pair where it stood.
#
# With real numbers: $(a, b)$ becomes $(a\cos - b\sin,\; a\sin + b\cos)$. Both ways are right.
#
# <details><summary>Hint 1</summary><code>rearrange(x, "b s h (pairs two) -> b s h pairs two", two=2)</code> gives the
# pairs an axis, and <code>torch.view_as_complex</code> takes a last axis of 2 for real and imaginary part (if
# <code>.contiguous()</code>); <code>torch.view_as_real</code> goes back.</details>
# <details><summary>Hint 2</summary><code>turn</code> has no axis for the heads. Beside <code>[b s h pairs]</code> it
# needs one: <code>turn[:, None]</code>. Without it, torch would pair tokens with heads.</details>


# %%
def rotate_pairs(x: Tensor, turn: Tensor) -> Tensor:
    """x [b s h r], turn complex [s pairs] -> [b s h r]: each pair of neighbours turned by its token's turn."""
    ### BEGIN SOLUTION: neighbours to complex numbers, times the turns (with an axis for the heads), and back
    pairs = rearrange(x, "b s h (pairs two) -> b s h pairs two", two=2)
    complex_pairs = torch.view_as_complex(pairs.contiguous()) * turn[:, None]
    return rearrange(torch.view_as_real(complex_pairs), "b s h pairs two -> b s h (pairs two)")
    ### END SOLUTION


# %%
check.rotate_pairs(rotate_pairs)

# %% [markdown]
# ## Only the distance
#
# What does attention see of positions? Take *one* query vector and *one* key vector, and put them at every place of a
# row of 24. Left, each place has a vector that is added (random here, as before training): every pair of places is a
# case of its own, to be learnt. Right, each place is a turn.

# %%
from dsv3_mini.viz.figures.rope import stripes_figure

torch.manual_seed(0)
query, key = repeat(torch.randn(2, 16), "two r -> two b s h r", b=1, s=24, h=1)
learned, turn = 0.4 * torch.randn(24, 1, 16), rotations(tiny, torch.arange(24))
tables = {
    "a vector for each place, added": einsum(query + learned, key + learned, "b s h r, b t h r -> s t"),
    "a turn for each place": einsum(rotate(query, turn), rotate(key, turn), "b s h r, b t h r -> s t"),
}
stripes_figure(tables)


# %%
def same_along_diagonals(table: Tensor) -> bool:
    """Whether places that are equally far apart have equal scores."""
    diagonals = [table.diagonal(distance) for distance in range(-23, 24)]
    return all((diagonal - diagonal[0]).abs().max() < 1e-3 for diagonal in diagonals)


for name, table in tables.items():
    print(f"{name}: only the distance counts: {same_along_diagonals(table)}")
assert [same_along_diagonals(table) for table in tables.values()] == [False, True]

# %% [markdown]
# ## Two layouts
#
# Which numbers are a pair? The released weights pair *neighbours*, also called interleaved. Many programs pair
# dimension $j$ with $j + r/2$ instead, the *half* layout: they can then read all first numbers in one run and all
# second ones in another. Between the two lies a permutation.

# %%
from dsv3_mini.viz.figures.rope import layout_figure

layout_figure(8)


# %%
def rotate_halves(x: Tensor, turn: Tensor) -> Tensor:
    """x [b s h r], turn [s pairs] -> [b s h r]: RoPE in the half layout."""
    first, second = x.chunk(2, dim=-1)
    pairs = torch.complex(first, second) * turn[:, None]
    return torch.cat([pairs.real, pairs.imag], dim=-1)


def in_halves(x: Tensor) -> Tensor:
    """The permutation of the picture, from neighbours to halves."""
    return rearrange(x, "... (pairs two) -> ... (two pairs)", two=2)


# %% [markdown]
# Each layout with its own rotation gives the same scores. Vectors of one layout with the rotation of the other give
# others, and that mistake is hard to see: shapes are right, lengths stay, scores still depend on the distance alone. A
# model that is *trained* so is as good as any. A checkpoint that is *loaded* so is broken.

# %%
query, key = torch.randn(2, 1, 24, 2, 16)


def scores(turner, query: Tensor, key: Tensor) -> Tensor:
    return einsum(turner(query, turn), turner(key, turn), "b s h r, b t h r -> b h s t")


right = scores(rotate, query, key)
moved, mixed = scores(rotate_halves, in_halves(query), in_halves(key)), scores(rotate_halves, query, key)
print("halves, rotated as halves:     the same scores:", torch.allclose(moved, right, atol=1e-4))
print("neighbours, rotated as halves: the same scores:", torch.allclose(mixed, right, atol=1e-4))
assert torch.allclose(moved, right, atol=1e-4) and not torch.allclose(mixed, right, atol=1e-1)

# %% [markdown] tags=["exercise"]
# ### Exercise 3 · To the other layout
# ●●○ · 12 minutes
#
# You want to run released weights in a program that rotates halves. Nobody permutes vectors at every step: the rows of
# the projection that makes them are put in another order, once.
#
# `weight` is a query projection, `[(h nr), c]`: it reads vectors of `c` numbers, and makes `h` heads (`heads`) of `nr`
# numbers each. Of the `nr` rows of a head the last `rope` are rotated; those before them carry no position. In the new
# order the rotated rows of a head have first the first numbers of all pairs, then the second ones. Everything else stays
# where it is.
#
# <details><summary>Hint 1</summary>Three steps: give the heads an axis; reorder the last <code>rope</code> rows of each;
# put the rows together again.</details>
# <details><summary>Hint 2</summary>Try your idea with more than four rotated rows. With four, the way there and the way
# back are the same permutation.</details>


# %%
def to_halves(weight: Tensor, heads: int, rope: int) -> Tensor:
    """weight [(h nr) c], rotated rows as neighbours -> [(h nr) c], rotated rows as halves."""
    ### BEGIN SOLUTION: heads to an axis, each head's last `rope` rows from (pairs two) to (two pairs), heads back
    rows = rearrange(weight, "(h nr) c -> h nr c", h=heads)
    plain, rotated = rows[:, :-rope], rows[:, -rope:]
    rotated = rearrange(rotated, "h (pairs two) c -> h (two pairs) c", two=2)
    return rearrange(torch.cat([plain, rotated], dim=1), "h nr c -> (h nr) c")
    ### END SOLUTION


# %%
check.to_halves(to_halves)

# %% [markdown] tags=["package"]
# ## The package's own
#
# `rotate` is yours. It turns in FP32 even where the model is BF16, and it also takes keys without heads.
# `rotations` asks the config for the frequencies; `rotation_scale` is 1 here. (Both can stretch a context: that is
# YaRN, in lesson 17.) `neighbours_to_halves` does what your third function does.

# %%
from dsv3_mini.hub import rope_layout

show_source(rotations, rotate, rope_layout._reorder)


# %%
def package_turns(positions: Tensor, width: int, theta: float) -> Tensor:
    return rotations(tiny.replace(qk_rope_head_dim=width, rope_theta=theta), positions)


torch.manual_seed(0)
x = torch.randn(2, 24, 3, 16)
same(turns, package_turns, (torch.arange(40), 16, 1e4), (torch.tensor([[7, 0, 99]]), 6, 500.0))
same(rotate_pairs, rotate, (x, turn), (x[:, :, :1], turn.conj().resolve_conj()))
same(to_halves, rope_layout.neighbours_to_halves, (torch.randn(4 * 48, 96), 4, 16), (torch.randn(80, 192), 1, 16))

# %% [markdown] tags=["experiment"]
# ## Experiment: does a trained model see distances only?
#
# The algebra is about one product of a query with a key. A model is more: norms, experts, four layers of them. Take the
# trained tiny model of lesson 00 and stories that it never saw, and tell it that the tokens stand elsewhere:
#
# **What we expect.** All 1,000 places further: nothing changes, the loss stays to a thousandth of a nat, although
# training never showed a position above 511. If any part of the model looks at positions as such, this fails. But with
# the *distances* changed (each doubled, all reversed, or all zero), or with rows in the order of the other layout, it
# should cost more than half a nat. If zero costs nothing, the model does not use its positions at all.

# %%
import torch.nn.functional as F

import dsv3_mini as dsv3
from dsv3_mini.data.packing import inputs_and_targets
from dsv3_mini.data.shipped import shipped
from dsv3_mini.data.stream import held_out_rows
from dsv3_mini.data.tokenizer import Tokenizer

model, tokenizer = dsv3.from_pretrained(shipped("tiny")).requires_grad_(False), Tokenizer.shipped()
stories = held_out_rows("stories", tokenizer, seq_len=256, rows=4).tokens
tokens, targets = inputs_and_targets(stories, tokenizer.pad_id)


# %%
def logits_at(positions: Tensor, net: dsv3.DeepSeekV3 = model) -> Tensor:
    """The model's logits [b s v], its tokens told to stand at these positions [s]."""
    x, turn = net.embed_tokens(tokens), rotations(net.cfg, positions)
    for block in net.layers:
        x, _ = block(x, turn)
    return net.lm_head(net.norm(x))


def cost(logits: Tensor) -> float:
    """Nats per token."""
    return F.cross_entropy(rearrange(logits, "b s v -> (b s) v"), rearrange(targets, "b s -> (b s)")).item()


# %%
import copy

other_layout = copy.deepcopy(model)
for block in other_layout.layers:
    attend = block.self_attn
    for linear, heads in ((attend.q_proj.q_b_proj, attend.heads), (attend.kv_a_proj_with_mqa, 1)):
        linear.weight.copy_(rope_layout.neighbours_to_halves(linear.weight, heads, attend.rope))

# %%
from dsv3_mini.viz.figures.rope import cost_figure

here = torch.arange(tokens.shape[1])
trained = logits_at(here)
costs = {
    "as it was trained": cost(trained),
    "all 1,000 places further": cost(logits_at(here + 1000)),
    "distances doubled": cost(logits_at(2 * here)),
    "reversed": cost(logits_at(-here)),
    "all at one place": cost(logits_at(0 * here)),
    "rows in the half layout": cost(logits_at(here, other_layout)),
}
cost_figure(costs)

# %%
usual, further, *changed = costs.values()
print("1,000 places further, the same loss:", abs(further - usual) < 1e-3)
print("changed distances, or the wrong layout, cost more than half a nat:", min(changed) > usual + 0.5)
assert abs(further - usual) < 1e-3 and min(changed) > usual + 0.5

# %% [markdown]
# How far can the shift go? The algebra says: any distance. A machine rounds: an FP32 number has 24 binary digits, a
# BF16 number 8, and an angle near 1,000 needs ten for its whole part alone. So we expect that FP32 positions bear a
# shift of 1,000 and much more, and that BF16 positions do not bear even that: neighbours get the same angle.

# %%
for name, digits in (("FP32", 24), ("BF16", 8)):
    steps = [2.0 ** (size.bit_length() - digits) for size in (1_000, 1_000_000)]
    near, far = (f"{step:,.0f}" if step >= 1 else f"1/{1 / step:,.0f}" for step in steps)
    print(f"{name}: numbers near 1,000 go in steps of {near}, near a million in steps of {far}")

# %%
from dsv3_mini.viz.figures.rope import shift_figure

shifts = [10**power for power in range(8)]
changes = {
    "positions in FP32": [(logits_at(here + shift) - trained).abs().mean().item() for shift in shifts],
    "positions in BF16": [(logits_at((here + shift).bfloat16()) - trained).abs().mean().item() for shift in shifts],
}
shift_figure(shifts, changes)

# %%
fp32, bf16 = (dict(zip(shifts, values, strict=True)) for values in changes.values())
print("FP32, 1,000 further: a logit changes by less than a thousandth on average:", fp32[1000] < 1e-3)
print("BF16, 1,000 further: by more than a tenth:", bf16[1000] > 0.1)
assert fp32[1000] < 1e-3 < 0.1 < bf16[1000]

# %% [markdown] tags=["interactive"]
# ## The frequency explorer
#
# One pair alone is a poor ruler. Its **wavelength** $\lambda_j = 2\pi / w_j$ is the number of positions after which it
# reads the same again, so it cannot tell a distance $d$ from $d + \lambda_j$. And a slow pair hardly turns from one
# token to the next. Together they work as digits do: the units tell 3 from 4, and not 3 from 13; for that there are
# the tens.
#
# In the explorer every pair has a bar, from the smallest distance that it shows (where it has turned by so many degrees
# as you say count) to its wavelength (where it begins anew). To the right you see one pair from near, and below it all
# of them together: what a query finds in a key equal to itself, by distance.
#
# Three questions to try. How many of the released model's 32 pairs (64 dimensions, theta 10,000) come round within
# 4,096 tokens? What is left of far distances with theta at 100? And what does it change to have 128 dimensions instead
# of 16?

# %%
from dsv3_mini.viz.widgets.rope import frequency_explorer

explorer = frequency_explorer()
explorer

# %%
from dsv3_mini.viz.figures.rope import ROUND, kinds

before = explorer.picture.value
explorer.set(context=163_840, pair=31)
assert explorer.picture.value != before
released = frequencies(tiny.replace(qk_rope_head_dim=64))
for context in (4_096, 163_840):
    print(f"{kinds(released, context, degrees=10).count(ROUND)} of 32 pairs come round within {context:,} tokens")
before = explorer.picture.value
explorer.set(theta=100.0)
assert explorer.picture.value != before
slowest = 2 * torch.pi / frequencies(tiny.replace(qk_rope_head_dim=64, rope_theta=100.0))[-1]
print(
    f"with theta = 100 even the slowest comes round after {slowest:.0f} tokens; farther away no pair alone tells how far"
)

# %% [markdown]
# The width changes the far end a little, for the last exponent comes closer to 1. Above all it gives the ruler more
# marks.
#
# ## Why a latent cannot carry it
#
# Lesson 06 is about MLA, which keeps no keys at all. For each token it caches one **latent** $c_t$, a short vector from
# which every head makes its own key with a matrix, $k_t = W^{UK} c_t$ (`up` below). Decoding is cheap because no key
# needs to be made: $q \cdot (W^{UK} c_t) = (q\,W^{UK}) \cdot c_t$. Fold the matrix into the query once, and compare
# with all latents. In lesson 01 you wrote such scores.
#
# Where does the turn go? Four places come to mind:
#
# - *the latents*: turn what is cached, make keys from that;
# - *the keys*: make keys, turn them as RoPE always does;
# - *the latents and the folded queries*: turn both in the latent's own space;
# - *a part of its own*: leave latents and keys alone, and give each token a small second key that is turned. This is
#   what equations 3 and 4 do, **decoupled RoPE**.
#
# Three things are wanted. The score sees distances only. One folded query serves all that is cached, so that one
# matrix-vector product gives the scores. And one matrix makes all values from what is cached, $v_t = W^{UV} c_t$ with
# the latent as it is.
#
# **What we expect.** A turn between $W^{UK}$ and the query is another one for each token, so there is no one matrix to
# fold: *the keys* fail there. A latent that was turned is another one at each place: *the latents* fail at distances,
# and both ways that turn them fail at the values. Only the last place should do all three.

# %%
torch.manual_seed(0)
places = torch.arange(64)
latent, up = torch.randn(64, 16), torch.randn(8, 16)  # 64 tokens, latents 16 wide; one head's keys 8 wide
query, query_part, key_part = torch.randn(1, 8), torch.randn(1, 4), torch.randn(64, 4)


def turn_rows(x: Tensor, positions: Tensor) -> Tensor:
    """x [t width], each row turned by its position."""
    return rotate(x[None], rotations(tiny.replace(qk_rope_head_dim=x.shape[-1]), positions))[0]


# %%
def with_turn_at(place: str, positions: Tensor) -> tuple[Tensor, Tensor]:
    """The scores [1 t] of the last token's query with all keys, and what is cached of each token."""
    last, kept = positions[-1:], turn_rows(latent, positions)
    match place:
        case "the latents":
            return turn_rows(query, last) @ (kept @ up.T).T, kept
        case "the keys":
            return turn_rows(query, last) @ turn_rows(latent @ up.T, positions).T, latent
        case "latents and folded queries":
            return turn_rows(query @ up, last) @ kept.T, kept
        case "a part of its own":
            part = turn_rows(key_part, positions)
            return query @ (latent @ up.T).T + turn_rows(query_part, last) @ part.T, torch.cat([latent, part], dim=-1)


# %% [markdown]
# Is there *any* folded query? There are 64 scores and at most 20 numbers cached of each token: a least-squares fit finds
# the best one there is, and if that does not give all 64 scores, none does. The same for the values.


# %%
def one_matrix_makes(wanted: Tensor, kept: Tensor) -> bool:
    """Whether some matrix gives `wanted` [t x] from what is cached, `kept` [t y], for all tokens."""
    best = torch.linalg.lstsq(kept, wanted).solution
    return torch.allclose(kept @ best, wanted, atol=1e-3)


expected = {
    "the latents": (False, True, False),
    "the keys": (True, False, True),
    "latents and folded queries": (True, True, False),
    "a part of its own": (True, True, True),
}

# %%
print(f"{'the turn is at':28} {'distances only':16} {'one folded query':18} values")
for place, wanted in expected.items():
    scores_here, kept = with_turn_at(place, places)
    scores_further, _ = with_turn_at(place, places + 100)
    found = (
        torch.allclose(scores_here, scores_further, atol=1e-2),
        one_matrix_makes(scores_here.T, kept),
        one_matrix_makes(latent, kept),
    )
    print(f"{place:28} {found[0]!s:16} {found[1]!s:18} {found[2]}")
    assert found == wanted

# %% [markdown]
# So the latent carries *what* a token says, and a small vector beside it *where* it stands. All heads share that
# vector, so the cache grows by `r` numbers a token, not by `r` for each head. (The third place would work with two
# copies of the latent in the cache, one turned and one not: twice the memory for what `r` numbers can do.)

# %% [markdown] tags=["exercise"]
# ### Exercise 4 · Decoupled scores
# ●●○ · 15 minutes
#
# The scores of equation 10, before the softmax. `query_nope` and `key_nope` are `[b s h n]` and `[b t h n]`: the parts
# without position, one for each head. `query_rope` `[b s h r]` has a part for each head as well, `key_rope` `[b t r]`
# is one for all heads. Both are *not yet turned*. `turn` `[s pairs]` are the turns of the tokens, which are queries and
# keys at once here (`t` and `s` are the same length). Return `[b h s t]`, scaled; no mask.
#
# `rotate(x, turn)` of the package is imported above; it takes `[b s h r]` and `[b s r]`.
#
# <details><summary>Hint 1</summary>Turn both rope parts. Then two einsums, added: the one for positions has no
# <code>h</code> in its keys.</details>
# <details><summary>Hint 2</summary>A query is <code>[nope ; rope]</code>, <code>n + r</code> numbers. The two sums are
# the two halves of one dot product, so there is one scale.</details>


# %%
def decoupled_scores(
    query_nope: Tensor, query_rope: Tensor, key_nope: Tensor, key_rope: Tensor, turn: Tensor
) -> Tensor:
    """query_nope [b s h n], query_rope [b s h r], key_nope [b t h n], key_rope [b t r], turn [s pairs] -> [b h s t]."""
    ### BEGIN SOLUTION: turn both rope parts, add the products of both parts, divide by the root of n + r
    content = einsum(query_nope, key_nope, "b s h n, b t h n -> b h s t")
    position = einsum(rotate(query_rope, turn), rotate(key_rope, turn), "b s h r, b t r -> b h s t")
    return (content + position) / (query_nope.shape[-1] + query_rope.shape[-1]) ** 0.5
    ### END SOLUTION


# %%
check.decoupled_scores(decoupled_scores)

# %% [markdown]
# In the package these lines are spread over three functions: `_queries` and `_latents` turn, and `expanded` puts the
# parts side by side, so that one fused kernel does the rest. To prove that yours does the same, let a whole attention
# run on your scores. (Turned by position 0, a vector stays as it is.)

# %%
from dsv3_mini.model.attention import MultiHeadLatentAttention as MLA

show_source(MLA._queries, MLA._latents, MLA.expanded)

# %%
torch.manual_seed(0)
nano = ModelConfig.preset("nano", initializer_range=0.3)
layer = dsv3.DeepSeekV3(nano).layers[1].self_attn.requires_grad_(False)
places = torch.arange(7)
turn, still = rotations(nano, places), rotations(nano, 0 * places)


# %%
def attend_with_your_scores(x: Tensor) -> Tensor:
    """x [b s d] -> [b s d]."""
    query_nope, query_rope = layer._queries(x, still)
    latent, key_rope = layer._latents(x, still)
    key_value = rearrange(layer.kv_b_proj(latent), "b t (h nv) -> b t h nv", h=layer.heads)
    key_nope, value = key_value.split([layer.nope, layer.value], dim=-1)
    scores = decoupled_scores(query_nope, query_rope, key_nope, key_rope, turn)
    weights = scores.masked_fill(places[:, None] < places, -torch.inf).softmax(dim=-1)
    return layer.o_proj(rearrange(einsum(weights, value, "b h s t, b t h v -> b s h v"), "b s h v -> b s (h v)"))


# %%
same(attend_with_your_scores, lambda x: layer(x, turn), (torch.randn(2, 7, 64),), (torch.randn(1, 7, 64),))

# %% [markdown]
# ## Find the bug
#
# A decoder keeps each token's rotated key and reads on from there. Somebody writes it as below. On a text that is read
# in one piece it is right, and so it passes its first test. Then it writes, token by token.


# %%
def read_on_with_a_bug(kept: Tensor, query: Tensor, key: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    """Scores of the new tokens, and all keys to keep."""
    angles = torch.arange(key.shape[1])[:, None] * w
    turn = torch.polar(torch.ones_like(angles), angles)
    keys = torch.cat([kept, rotate(key, turn)], dim=1)
    return einsum(rotate(query, turn), keys, "b s r, b t r -> b s t"), keys


torch.manual_seed(0)
w = torch.tensor(frequencies(tiny))
query, key, nothing = torch.randn(1, 8, 16), torch.randn(1, 8, 16), torch.zeros(1, 0, 16)
whole, _ = read_on_with_a_bug(nothing, query, key, w)
_, kept = read_on_with_a_bug(nothing, query[:, :7], key[:, :7], w)

# %%
last, _ = read_on_with_a_bug(kept, query[:, 7:], key[:, 7:], w)
print("the last token's scores, whole text or with a cache, are the same:", torch.allclose(last[:, 0], whole[:, 7]))

# %% [markdown] tags=["bug"]
# ### Find the bug · Every new token is the first
# ●●○ · 10 minutes
#
# `kept` `[b t r]` holds the keys of `t` earlier tokens, already turned. `query` and `key` `[b s r]` belong to the next
# `s` tokens and are not turned yet. `w` `[pairs]` are the frequencies. Return the scores `[b s (t+s)]` of the new
# queries with all keys (no scale and no mask, for brevity), and all keys `[b (t+s) r]`, to be kept.
#
# <details><summary>Hint 1</summary>At which position stands the eighth token, when it is read alone?</details>
# <details><summary>Hint 2</summary>How many tokens came before can be read off <code>kept</code>. Kept keys need
# nothing done to them.</details>


# %%
def read_on(kept: Tensor, query: Tensor, key: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    """kept [b t r] turned; query, key [b s r] not yet; w [pairs] -> scores [b s (t+s)], and all keys [b (t+s) r]."""
    ### BEGIN SOLUTION: positions that go on where the kept keys end; turn the new ones, append, score
    seen = kept.shape[1]
    angles = torch.arange(seen, seen + key.shape[1])[:, None] * w
    turn = torch.polar(torch.ones_like(angles), angles)
    keys = torch.cat([kept, rotate(key, turn)], dim=1)
    return einsum(rotate(query, turn), keys, "b s r, b t r -> b s t"), keys
    ### END SOLUTION


# %%
check.read_on(read_on)

# %% [markdown]
# What it costs you have measured already. Where a text is read token by token, the bug puts every token at place 0:
# that is the bar *all at one place* of the experiment. Nothing crashes, and every score by itself looks reasonable.
# What shows it is a comparison, cached against uncached; lesson 07 makes it a test.

# %% [markdown] tags=["at-671b"]
# ## At 671B
#
# The released model rotates 64 of the 192 dimensions of each query and key. Its frequencies before any stretching:

# %%
large = ModelConfig.preset("671b")
plain = frequencies(large.replace(rope_scaling=None))
wavelengths = [2 * torch.pi / w for w in plain]
original = large.rope_scaling.original_max_position_embeddings
print(f"rotated: {large.qk_rope_head_dim} of {large.qk_head_dim} dimensions of a head, {len(plain)} pairs")
print(f"wavelengths from {wavelengths[0]:.1f} to {wavelengths[-1]:,.0f} tokens")
for context in (original, large.max_position_embeddings):
    print(f"in {context:>7,} tokens {sum(length <= context for length in wavelengths)} pairs come round")

# %% [markdown]
# The model was pre-trained on rows of 4,096 tokens. The slow pairs never made a whole turn there, and in a context of
# 163,840 they would point where they never pointed in training. What to do about it is YaRN, lesson 17.
#
# And the price of the other places for the turn? First memory: with turned keys in the cache there would be a key of
# `n` numbers for each head, beside the latent that values are made from. Or time: the keys of all tokens are made again
# from the latents at every step, because no fold is possible. The ledger counts that as well.

# %%
from dsv3_mini.ledger import decode_flops_per_token

decoupled = large.kv_lora_rank + large.qk_rope_head_dim
turned_keys = large.kv_lora_rank + large.num_attention_heads * large.qk_nope_head_dim
print(f"cached of a token, one layer: {decoupled} numbers, {large.qk_rope_head_dim / decoupled:.0%} of them rotated")
print(f"with turned keys: {turned_keys:,} numbers, {turned_keys / decoupled:.0f} times as many")
step = decode_flops_per_token(large, original)
print(f"a new token after {original - 1:,} others: {step.absorbed / 1e9:.0f} GFLOP with folded queries")
print(
    f"with keys made again: {step.re_expanded / 1e9:,.0f} GFLOP, {step.re_expanded / step.absorbed:.0f} times as many"
)
assert step.re_expanded > 10 * step.absorbed and turned_keys > 10 * decoupled

# %% [markdown]
# What decoupling costs is two projections, one for all heads' rotated queries and one for the shared key:

# %%
from dsv3_mini.ledger import count_parameters

rope_queries = large.num_attention_heads * large.qk_rope_head_dim * large.q_lora_rank
rope_key = large.qk_rope_head_dim * large.hidden_size
attention_layer = count_parameters(large).attention.trainable
print(f"rotated queries {rope_queries:,} parameters, rotated key {rope_key:,}")
print(f"together {(rope_queries + rope_key) / attention_layer:.0%} of an attention layer's {attention_layer:,}")

# %% [markdown] tags=["recap"]
# ## Recap
#
# 1. Queries and keys are both turned *forwards*. Why does the score see the difference of positions, not their sum?
#    <details><summary>Answer</summary>The dot product of two pairs is the real part of one times the conjugate of the
#    other, and the conjugate of a turn turns backwards: the angles subtract.</details>
# 2. You load a checkpoint, all shapes fit, the text is gibberish from the first word on, and a model that you train
#    yourself with the same code is fine. What do you suspect?
#    <details><summary>Answer</summary>The layout: weights whose pairs are neighbours, in code that pairs halves, or the
#    other way round. Training finds weights for either; loaded ones are for one of them. It is cured by ordering the
#    rotated rows of the query and key projections.</details>
# 3. Why does the rotated key stand beside the latent, and is not made from it?
#    <details><summary>Answer</summary>A turn between the up-projection and the query differs from token to token, so
#    the projection can no longer be folded into the query: every key would have to be made again at every step. The
#    small key of its own is turned once, kept, and shared by all heads.</details>

# %% [markdown] tags=["next"]
# ## Next
#
# You know what stands beside the latent. Lesson 06 builds the latent itself: from plain heads over shared ones to MLA,
# on one budget of weights, and measures what a small rank loses. Lesson 17 returns to frequencies, when a context of
# 4,096 tokens is to become one of 163,840.
