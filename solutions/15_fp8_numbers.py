# ---
# jupyter:
#   jupytext:
#     text_representation:
#       format_name: percent
#   dsv3:
#     title: FP8 numbers
#     minutes: 90
#     after: [04_transformer]
#     builds: E4M3 rounding, a scale per tile, a product that scales its partial sums, the tensor core's short sum
#     tracks: [two-days, term]
# ---

# %% [markdown] tags=["why"]
# # 15 · FP8 numbers
#
# A training step is matrix products, and a matrix product is numbers on the move: read, multiplied, added up. Numbers
# of half the size need half the memory and half the wires, and the tensor cores of a Hopper GPU multiply them at twice
# the rate. DeepSeek-V3 was trained with nearly all of its products in **FP8**, numbers of 8 bits.
#
# Eight bits are 256 codes, for everything from a gradient to an outlier. In this lesson you find out what is lost on
# the way in, where numbers are rounded, overflow and underflow; what a *scale* saves of that, and why the report has
# one for every 128 numbers; and what is lost a second time where nobody looks for it, in adding up. You write all of
# it: the rounding, the quantiser, the product, and the sum as a tensor core makes it.
#
# The picture has the three formats of the lesson. E4M3 has 4 bits of exponent and 3 of mantissa (its digits after the
# leading one), E5M2 has 5 and 2. E5M6 has 12 bits in all, and is for keeping numbers, not for multiplying them.

# %%
from dsv3_mini.viz.figures.fp8_numbers import formats_figure

formats_figure()

# %% [markdown] tags=["paper"]
# ## In the report
#
# Section 3.3. This lesson is about the numbers, the next one about training with them.
#
# | section | what | where |
# |---|---|---|
# | 3.3.1 | which products run in FP8, and what stays in BF16 and FP32 | lesson 16 |
# | 3.3.2 | E4M3 for all tensors; a scale for each 1x128 tile of activations and each 128x128 block of weights | exercises 1 to 3 |
# | 3.3.2 | partial sums are *promoted* to FP32 every $N_C = 128$ elements of K | exercise 4 and the experiment |
# | 3.3.3 | E5M6 with scales that are powers of two, for what is kept until the backward pass | find the bug |
#
# A code has three fields: a sign, an exponent $E$, and a mantissa $M$ of $m$ bits. With the format's *bias* $B$, which
# moves exponents below zero, it stands for
#
# $$\pm\, 2^{E - B}\,(1 + M / 2^m) \quad \text{if } E > 0 \qquad \text{and} \qquad \pm\, 2^{1 - B}\, M / 2^m
# \quad \text{if } E = 0.$$
#
# The first are the **normal** numbers. The second are the **subnormal** ones: they have no leading one, and fill the
# gap between zero and the smallest normal number. E4M3 has $m = 3$ and $B = 7$.
#
# A scale is one FP32 number $s$ that many $x$ share. Stored is $q$, the nearest FP8 number to $x / s$, and whoever
# reads it takes $q\,s$. With $s = \max|x| / 448$ the largest of them becomes 448, the largest number of E4M3.

# %% [markdown] tags=["naive"]
# ## The naive way
#
# All numbers of E4M3, from the definition. One code of the 128 without a sign is taken for NaN, the one with all bits
# set; there is no infinity.

# %%
import math


def value_of(code: int) -> float:
    """The number that an E4M3 code (0 to 255) stands for."""
    exponent, mantissa = code >> 3 & 15, code & 7
    if (exponent, mantissa) == (15, 7):
        return math.nan
    size = 2.0**-6 * mantissa / 8 if exponent == 0 else 2.0 ** (exponent - 7) * (1 + mantissa / 8)
    return -size if code >> 7 else size


# %%
values = [value_of(code) for code in range(256)]
numbers = sorted({value for value in values if not math.isnan(value)})
print(f"{len(numbers)} numbers, from {numbers[0]:g} to {numbers[-1]:g}")
print(f"smallest above zero 2^{math.log2(values[1]):g}, smallest normal 2^{math.log2(values[8]):g}")

# %% [markdown]
# torch has the type, `torch.float8_e4m3fn` ("fn": finite, with NaN). It can be stored and cast, and not much else: on a
# CPU there is no arithmetic for it. Read as FP8, the bytes 0 to 255 are the same numbers.

# %%
import torch
from einops import einsum, rearrange, reduce, repeat
from torch import Tensor

as_torch = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
print("torch agrees on all 256 codes:", torch.equal(as_torch.nan_to_num(-1), torch.tensor(values).nan_to_num(-1)))


def nearest_number(x: float) -> float:
    return min(numbers, key=lambda number: abs(number - x))


for x in (3.3, -0.07, 100.0, 1000.0, 0.0005):
    print(f"{x:>8} becomes {nearest_number(x):g}")

# %% [markdown]
# 1000 has **overflowed**, there is nothing beyond 448. 0.0005 has **underflowed**, it lies below half of the smallest
# number. Between those two ends nothing is off by more than one part in 16, until the subnormal numbers begin. (Torch's
# cast stops at 448 as well. A cast that makes NaN of what is too large would be a poor servant in training.)
#
# To search among 253 numbers for each number of a matrix is slow. Look at how they stand instead: from one power of two
# to the next there are always 8, evenly spaced.

# %%
for low in (2.0**-9, 2.0**-6, 1.0, 2.0, 256.0):
    next_one = next(number for number in numbers if number > low)
    print(f"from {low:<10g} the next number is {next_one - low:g} away")

# %% [markdown] tags=["exercise"]
# ### Exercise 1 · Round to E4M3
# ●●○ · 15 minutes
#
# The nearest E4M3 number of every number in a tensor, without a search. Let $2^e$ be the power of two at or below
# $|x|$. Around $x$ the numbers are a *step* of $2^{e-3}$ apart, so the nearest one is a whole number of steps. Below
# $2^{-6}$ the exponent has come to its end: the steps stay at $2^{-9}$ down to zero. Beyond 448 all becomes 448, with
# its sign.
#
# What lies half-way goes to the *even* number of steps, as in all arithmetic that follows IEEE's rule: of many such
# cases half go up and half go down. `torch.round` does it so. The result stays in FP32; a cast would give the exercise
# away.
#
# <details><summary>Hint 1</summary><code>torch.frexp(x)</code> takes numbers apart exactly, which a logarithm does not:
# <code>x = mantissa * 2**exponent</code> with a mantissa between 1/2 and 1. So $e$ is its <code>exponent</code> less
# one.</details>
# <details><summary>Hint 2</summary><code>torch.ldexp(torch.ones_like(x), k)</code> is $2^k$ for a tensor of whole
# numbers <code>k</code>. <code>exponent.clamp(min=-6)</code> keeps the steps from getting finer.</details>


# %%
def round_to_e4m3(x: Tensor) -> Tensor:
    """x [...] in FP32 -> [...] in FP32: the nearest number of E4M3, half-way cases to even, beyond 448 it is 448."""
    ### BEGIN SOLUTION: the exponent, not below -6; the step, three bits below it; round x / step; clamp
    exponent = torch.frexp(x).exponent - 1
    step = torch.ldexp(torch.ones_like(x), exponent.clamp(min=-6) - 3)
    return (torch.round(x / step) * step).clamp(-448, 448)
    ### END SOLUTION


# %%
from dsv3_mini.course.checks import lesson_15 as check

check.round_to_e4m3(round_to_e4m3)

# %% [markdown]
# ## A number line to zoom into
#
# Take a number and look at what is around it. Three things to try. Zoom in and out at 3.3, then at 100: does the
# picture change? Go down with the number until E4M3 has no step small enough: where does it stop to look the same? And
# make the number 1000, then move the *scale*, by which it is divided before the rounding and multiplied afterwards: how
# large must it be until E4M3 can hold it, and what happens to 0.01 under that scale?

# %%
from dsv3_mini.viz.widgets.fp8_numbers import number_line_explorer

line = number_line_explorer()
line

# %%
from dsv3_mini.fp8.formats import E4M3, E5M2, E5M6, round_to

before = line.picture.value
line.set(number=1000.0, scale=2)
assert line.picture.value != before
for number in (1000.0, 0.01, 0.0005):
    for scale in (1.0, 4.0, 2.0**-8):
        kept = round_to(torch.tensor(number / scale), E4M3).item() * scale
        print(f"{number:>6g} under a scale of {scale:<10g} is kept as {kept:.4g}")

# %% [markdown]
# So a scale moves the whole line. It does not make it finer: in the normal range 3 bits of mantissa are 3 bits,
# whatever the scale. What it decides is who overflows and who underflows.
#
# ## What a model's numbers are like
#
# Which numbers have to go through this? A linear layer with input $x$ and weight $W$ makes three products in a training
# step: $x W^\top$ in the forward pass, and two in the backward pass, of the gradient of its output with $W$ and with
# $x$. So three kinds of matrices enter: activations, weights, and gradients. Take them from the trained tiny model of
# lesson 00, all linear layers of attention and of the feed-forwards that all tokens visit, on stories that it never
# saw.

# %%
import dsv3_mini as dsv3
from dsv3_mini.course.fp8_measures import operands_of
from dsv3_mini.data.packing import inputs_and_targets
from dsv3_mini.data.shipped import shipped
from dsv3_mini.data.stream import held_out_rows
from dsv3_mini.data.tokenizer import Tokenizer

model, tokenizer = dsv3.from_pretrained(shipped("tiny")).eval(), Tokenizer.shipped()
rows = held_out_rows("stories", tokenizer, seq_len=256, rows=4).tokens
operands = operands_of(model, *inputs_and_targets(rows, tokenizer.pad_id))
kinds = {name: [getattr(each, name) for each in operands.values()] for name in ("activation", "weight", "gradient")}
for name, matrices in kinds.items():
    print(f"{name + 's':12} {len(matrices)} matrices, {sum(x.numel() for x in matrices):>9,} numbers")

# %% [markdown]
# **What we expect.** Activations come out of norms and weights were drawn near 1/10: E4M3, which reaches from $2^{-9}$
# to 448, should hold them as they are. The gradient of a mean over 1,000 tokens is another matter. It must be small,
# and we expect that without a scale most of it becomes zero. With a scale for each tile of 1x128 hardly anything
# should.

# %%
from dsv3_mini.fp8.quantize import quantize
from dsv3_mini.viz.figures.fp8_numbers import shares, sizes_figure


def divided(x: Tensor) -> Tensor:
    """x [T c] divided by the scales of its 1x128 tiles."""
    scale = quantize(x, (1, 128)).scale
    return x / repeat(scale, "T n -> T (n tile)", tile=128)[:, : x.shape[1]]


table = {}
for name, matrices in kinds.items():
    as_they_are, scaled = (torch.cat([make(x).flatten() for x in matrices]) for make in (lambda x: x, divided))
    table[name + "s"] = {"as they are": as_they_are, "divided by a scale per 1x128 tile": scaled}
sizes_figure(table, "A scale moves numbers to where the format has some")

# %%
for name, treated in table.items():
    lost, lost_scaled = (shares(numbers, E4M3)[0] for numbers in treated.values())
    print(f"{name:12} become zero: {lost:4.0%} as they are, {lost_scaled:4.0%} under scales")
lost, lost_scaled = (shares(numbers, E4M3)[0] for numbers in table["gradients"].values())
assert lost > 0.5 > 0.05 > lost_scaled

# %% [markdown] tags=["exercise"]
# ### Exercise 2 · A scale for each tile
# ●●○ · 12 minutes
#
# The quantiser. `x` is `[T c]`, `T` tokens of `c` channels. Each token's channels are cut into `n` runs of `tile`
# neighbours, and each run has a scale of its own: its largest *magnitude* (absolute value) divided by 448. Return `q`
# `[T c]`, the rounded numbers `x / scale`, and `scale` `[T n]`, so that `q` times its scale is about `x`. For rounding
# use torch's cast, `.to(torch.float8_e4m3fn)`.
#
# A tile of nothing but zeros must give zeros, not NaN.
#
# <details><summary>Hint 1</summary><code>rearrange(x, "T (n tile) -> T n tile", tile=tile)</code> gives the tiles an
# axis; <code>reduce(..., "T n tile -> T n", "max")</code> takes the largest of each.</details>
# <details><summary>Hint 2</summary>0 / 0 is the NaN. <code>clamp_min(1e-30)</code> keeps a scale above zero, and no
# other scale notices.</details>


# %%
def quantize_tiles(x: Tensor, tile: int) -> tuple[Tensor, Tensor]:
    """x [T (n tile)] -> q [T (n tile)] in E4M3 and scale [T n] in FP32, with x about q * scale."""
    ### BEGIN SOLUTION: tiles to an axis; largest magnitude / 448, kept above zero; divide, cast, tiles back
    tiles = rearrange(x, "T (n tile) -> T n tile", tile=tile)
    scale = (reduce(tiles.abs(), "T n tile -> T n", "max") / 448).clamp_min(1e-30)
    q = (tiles / rearrange(scale, "T n -> T n 1")).to(torch.float8_e4m3fn)
    return rearrange(q, "T n tile -> T (n tile)"), scale
    ### END SOLUTION


# %%
check.quantize_tiles(quantize_tiles)

# %% [markdown] tags=["package"]
# ## The package's own
#
# `encode` is your rounding, for every format: it counts steps as you do, and the count *is* the code, up to where the
# exponent begins. `quantize` is your quantiser for tiles of any height and width. Where the edge of a matrix cuts a
# tile, the tile is narrower (`_whole_tiles` cuts body and edges apart).

# %%
from dsv3_mini.course.lesson import same, show_source
from dsv3_mini.fp8.formats import encode

show_source(encode, quantize)

# %%
torch.manual_seed(0)
some = torch.randn(40, 512) * torch.exp2(torch.randint(-12, 12, (40, 1)))


def package_tiles(x: Tensor, tile: int) -> tuple[Tensor, Tensor]:
    made = quantize(x, (1, tile))
    return made.q, made.scale


same(round_to_e4m3, lambda x: round_to(x, E4M3), (some,), (kinds["activation"][0],))
same(quantize_tiles, package_tiles, (some, 128), (some, 64), (kinds["activation"][0][:, :128], 128))

# %% [markdown]
# ## How far an outlier reaches
#
# Why so many scales? The usual answer: one outlier in a tensor makes the scale large, and all others pay for it. Before
# you believe it, think of what they pay with. A *floating*-point number that is a thousand times smaller than the
# largest has the same 3 bits of mantissa. Only when the outlier pushes it below the smallest normal number does it lose
# bits. From there to 448 it is a factor of 448 · 64 = 28,672.
#
# **What we expect.** Normal numbers of size 1 with one outlier. Under one scale nothing should happen up to an outlier
# of a thousand; around 30,000 the error should begin to rise, and at a million everything else should be lost. Under a
# scale per tile only the outlier's own tile should suffer. Whole numbers of 8 bits (dotted) are there to compare. Their
# 127 equal steps are finer than E4M3's while there is no outlier, and we expect them to be lost long before it.
#
# Drag the outlier. Whom does it take with it?

# %%
from dsv3_mini.viz.widgets.fp8_numbers import outlier_explorer

outlier = outlier_explorer()
outlier

# %%
from dsv3_mini.course.fp8_measures import outlier_reach

before = outlier.picture.value
outlier.set(size=2.0**24, channel=130)
assert outlier.picture.value != before
reach = outlier_reach((1.0, 1024.0, 2.0**18, 2.0**24), E4M3)
for name, errors in reach.items():
    print(f"{name:26}", "  ".join(f"{error:6.1%}" for error in errors))
whole, tiled, integers = reach.values()
assert whole[1] < 1.1 * whole[0] and whole[3] > 0.9 and integers[1] > 0.9
assert max(tiled) < 0.25

# %% [markdown]
# So an outlier of a thousand, which ruins 8-bit whole numbers, costs E4M3 nothing. Do tiles matter at all, then? They
# do for numbers that spread over more than those 28,672, and the histograms say who does: the gradients. (In the last
# column the tiled error is that of one lost tile of the 32 here.)
#
# There is another cure: E5M2, with one bit more of exponent and a reach of 57344. Other FP8 recipes take it for
# gradients. It pays with a bit of mantissa, always. The report takes E4M3 with tiles for all tensors: a scale is a part
# of the exponent, one that 128 numbers share.
#
# **What we expect.** On the tiny model's operands, E4M3 has about half the error of E5M2. With one scale E4M3 loses
# some of the small gradients, and tiles bring them back.

# %%
from dsv3_mini.course.fp8_measures import WHOLE, relative_error, zeroed

ways = {"E4M3, one scale": (WHOLE, E4M3), "E5M2, one scale": (WHOLE, E5M2), "E4M3, 1x128 tiles": ((1, 128), E4M3)}
error, gone = {}, {}
for kind, matrices in kinds.items():
    for way, (tile, fmt) in ways.items():
        made = [quantize(x, tile, fmt).dequantize() for x in matrices]
        error[kind, way] = sum(map(relative_error, matrices, made)) / len(made)
        gone[kind, way] = zeroed(torch.cat([x.flatten() for x in matrices]), torch.cat([y.flatten() for y in made]))
for way in ways:
    print(f"{way:18}", "  ".join(f"{k}s: error {error[k, way]:.1%}, {gone[k, way]:4.1%} zero" for k in kinds))

# %%
for kind in kinds:
    assert error[kind, "E4M3, 1x128 tiles"] < 0.7 * error[kind, "E5M2, one scale"]
    assert gone[kind, "E4M3, 1x128 tiles"] <= gone[kind, "E4M3, one scale"]
print("E4M3 under tiles has less error than E5M2 in activations, weights and gradients: True")
fewer = gone["gradient", "E4M3, one scale"] / max(gone["gradient", "E4M3, 1x128 tiles"], 1e-9)
print("tiles bring back at least half of the gradients that one scale loses:", fewer > 2)
assert fewer > 2

# %% [markdown]
# The lost gradients hardly show in the error, small as they are. Whether a training misses them is another question,
# and lesson 16 asks it.
#
# ## Multiply
#
# A product over K, the axis along which the terms are added up, now has a scale that changes along the way: every 128
# numbers another. The sum must be taken apart at these places. What is added up inside a block of 128 are bare FP8
# numbers; the result, a *partial sum*, is multiplied by the scale of `a`'s tile and the scale of `b`'s block, and only
# then added to the total.

# %%
from dsv3_mini.viz.figures.fp8_numbers import tiles_figure

tiles_figure()

# %% [markdown] tags=["exercise"]
# ### Exercise 3 · Partial sums
# ●●○ · 15 minutes
#
# `a` `[m k]` and `b` `[n k]` are in E4M3, and the result is `a @ b.T` with the scales, `[m n]` in FP32. A tile of `a`
# is one row by `block` columns, so `a_scale` is `[m kb]`, with `kb` blocks along K. A block of `b` is `block` by
# `block`, so `b_scale` is `[nb kb]`, with `nb` blocks along n: a run of `block` rows of `b` shares its scales.
#
# <details><summary>Hint 1</summary><code>.float()</code> first: there is no arithmetic in FP8 on a CPU.
# <code>a.float().split(block, dim=1)</code> gives the blocks of K one by one.</details>
# <details><summary>Hint 2</summary>For block number <code>i</code> the scales are the columns <code>a_scale[:,
# i]</code> and <code>b_scale[:, i]</code>. The second needs one for each row of <code>b</code>: <code>repeat(..., "nb
# -> (nb block)", block=block)</code>.</details>


# %%
def blockwise_gemm(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, block: int) -> Tensor:
    """a [m k], a_scale [m kb], b [n k], b_scale [nb kb], k = kb * block, n = nb * block -> a @ b.T, scaled, [m n]."""
    ### BEGIN SOLUTION: for each block of K: the product of the bare numbers, times both scales, added to the total
    total = torch.zeros(len(a), len(b))
    blocks = zip(a.float().split(block, dim=1), b.float().split(block, dim=1), strict=True)
    for i, (left, right) in enumerate(blocks):
        partial = einsum(left, right, "m k, n k -> m n")
        b_rows = repeat(b_scale[:, i], "nb -> (nb block)", block=block)
        total += partial * einsum(a_scale[:, i], b_rows, "m, n -> m n")
    return total
    ### END SOLUTION


# %%
check.blockwise_gemm(blockwise_gemm)

# %% [markdown]
# The package's `gemm` is one interface to several ways to compute the same. `exact` multiplies by the scales first and
# then in FP32; that is what you compare with here. On a Hopper GPU others run on the tensor cores, and take your road.

# %%
from dsv3_mini.fp8.gemm import gemm

x, weight = torch.randn(6, 384), torch.randn(256, 384) / 20
a, b = quantize(x, (1, 128)), quantize(weight, (128, 128))
same(
    blockwise_gemm,
    lambda *_: gemm(a, b, backend="exact", out_dtype=torch.float32),
    (a.q, a.scale, b.q, b.scale, 128),
)
product = gemm(a, b, backend="exact", out_dtype=torch.float32)
print(f"error of the product: {relative_error(x @ weight.T, product):.0%}, as each factor was rounded")

# %% [markdown]
# ## Adding up
#
# So much for what goes in. Rounding is not everything: it errs up as often as down, and a sum over K averages it. The
# *sum itself* is the second loss. A product of two E4M3 numbers is exact on the tensor core, but the register in which
# products are added up is short: on Hopper it keeps about 14 bits. One step goes like this:
#
# 1. Take 32 products and the running sum. The largest magnitude among them, at least $2^e$ and below $2^{e+1}$, sets
#    the **grain**: the last of `bits` bits if the first is $2^e$, so $2^{e + 1 - \text{bits}}$.
# 2. Shift all to that grain, and cut off what is finer (towards zero, no rounding).
# 3. Add. Of the new sum, again only the first `bits` bits are kept.
#
# As the sum grows, its grain grows, and what is added to it is cut more and more coarsely.

# %% [markdown] tags=["exercise"]
# ### Exercise 4 · One step of a tensor core
# ●●● · 15 minutes
#
# `total` is `[m n]`, the running sums of a whole product at once, each a sum of its own. `products` is `[p m n]`: the
# next `p` products of each. `bits` is how many bits a sum has, its leading one counted. Return the new sums, `[m n]`.
#
# <details><summary>Hint 1</summary>You cut twice: all numbers by the largest of them, then the sum by itself. A small
# function inside yours, <code>cut(x, largest)</code>, does both.</details>
# <details><summary>Hint 2</summary>The exponent of <code>torch.frexp(largest)</code> is $e + 1$ already, so the grain
# is <code>torch.ldexp(torch.ones_like(largest), torch.frexp(largest).exponent - bits)</code>.</details>
# <details><summary>Hint 3</summary><code>torch.trunc(x / grain) * grain</code> cuts. In FP32 all of this is exact: the
# grain is a power of two, and the counts of grains are small whole numbers.</details>


# %%
def tensor_core_step(total: Tensor, products: Tensor, bits: int) -> Tensor:
    """total [m n], products [p m n] -> [m n]: all cut to one grain, added, and cut to the first `bits` bits again."""

    ### BEGIN SOLUTION: cut total and products by the grain of the largest magnitude; add; cut the sum by its own grain
    def cut(x: Tensor, largest: Tensor) -> Tensor:
        grain = torch.ldexp(torch.ones_like(largest), torch.frexp(largest).exponent - bits)
        return torch.trunc(x / grain) * grain

    largest = torch.maximum(total.abs(), reduce(products.abs(), "p m n -> m n", "max"))
    added = cut(total, largest) + reduce(cut(products, largest), "p m n -> m n", "sum")
    return cut(added, added.abs())
    ### END SOLUTION


# %%
check.tensor_core_step(tensor_core_step)

# %% [markdown]
# The package has this step too, in a backend that multiplies as Hopper's tensor cores do. `promote_every` is the cure,
# and the report's $N_C$: after so many products the partial sum leaves the tensor core, takes its scales, and is added
# to a total in FP32; the tensor core begins again from zero, with a fine grain. With $N_C = 128$ that is the place
# where a scale has to be multiplied in anyway.

# %%
from dsv3_mini.fp8.backends.hopper import Hopper


def package_step(total: Tensor, products: Tensor, bits: int) -> Tensor:
    return Hopper(bits=bits)._step(total, products.clone())  # it works in place


show_source(Hopper._multiply, Hopper._step)
sums, products = torch.randn(8, 8) * 50, torch.randn(32, 8, 8)
same(tensor_core_step, package_step, (sums, products, 14), (0 * sums, products, 8))

# %% [markdown]
# What can go wrong with 14 bits? Add up 32,768 ones, without promotion.

# %%
core, total = Hopper(), torch.zeros(1, 1)
for _ in range(32_768 // 32):
    total = core._step(total, torch.ones(32, 1, 1))
print(f"32,768 ones, added up in 14 bits: {total.item():,.0f}")
assert total.item() == 2**14

# %% [markdown]
# From 16,384 on the grain is 2, and each one is cut to zero before it is added. The sum cannot grow any more.

# %% [markdown] tags=["experiment"]
# ## Experiment: the error against K
#
# Sums in a model have both signs, and are kinder. Multiply two random matrices (normal numbers, in E4M3 with tiles) on
# the emulated tensor core, and compare with the exact product of the *same* FP8 numbers: what is left is the error of
# adding up alone. We look at the worst of 4,096 sums, relative to the size that such sums have (the root of the mean of
# their squares: a single sum may be next to zero, and would make any error look large).
#
# **What we expect.** The report speaks of about 2% at K = 4096 without promotion. It should grow with K, as the sums
# grow and more of them are cut; with promotion every 128 it should hardly grow, and be at least 8 times smaller at
# K = 4096. If promotion brought less, the report's trouble with it would be for nothing; if the error without it stayed
# near a tenth of a percent, 14 bits would be enough.

# %%
from dsv3_mini.course.fp8_measures import error_curves
from dsv3_mini.viz.figures.fp8_numbers import sums_figure

inners = (128, 256, 512, 1024, 2048, 4096, 8192)
every = {"never promoted": None, "promoted every 1,024": 1024, "promoted every 128 (the report)": 128}
curves = error_curves(inners, every)
sums_figure(curves, "Without promotion the error of a sum grows with its length")

# %%
from dsv3_mini.course.fp8_measures import sum_errors

never, _, promoted = (curve[4096] for curve in curves.values())
typical = [sum_errors(4096, each).square().mean().sqrt().item() for each in (None, 128)]
print(f"K = 4,096, never promoted: the worst sum is off by {never:.1%}, a typical one by {typical[0]:.1%}")
print(f"promoted every 128:        the worst sum is off by {promoted:.2%}, a typical one by {typical[1]:.2%}")
print("at least 8 times smaller with promotion:", never >= 8 * promoted)
assert never >= 8 * promoted and 0.01 < never < 0.03
assert curves["never promoted"][8192] > curves["never promoted"][512]

# %% [markdown]
# The report's 2% is that of the worst sum. A typical one (the root of the mean of the squares) is off by a tenth of it
# or so, which is less than the rounding of the operands cost. But rounding errs up as often as down, and a cut always
# goes towards zero: where all that is added has one sign, nothing averages out. Try that below. With promotion every
# 128 the longest sum is as good as the shortest.

# %% [markdown] tags=["interactive"]
# ## A tensor core to try
#
# The same with your own numbers. How many bits would a tensor core need to do without promotion? At which interval does
# more promotion stop to help? And choose operands without signs: their sums grow with K and not with its root, and each
# cut goes the same way.

# %%
from dsv3_mini.viz.widgets.fp8_numbers import accumulation_explorer

explorer = accumulation_explorer()
explorer

# %%
before = explorer.picture.value
explorer.set(operands="positive")
assert explorer.picture.value != before
for operands_are in ("normal", "positive"):
    worst = [sum_errors(4096, each, operands=operands_are).max().item() for each in (None, 128)]
    print(f"{operands_are:8} operands: off by up to {worst[0]:4.1%} without promotion, {worst[1]:.2%} with it")
    assert worst[0] > 8 * worst[1]

# %% [markdown]
# ## Scales that are powers of two
#
# Most FP8 numbers are made, multiplied and forgotten. Some are kept. What a linear layer has read is needed again in
# the backward pass, for the gradient of its weights, and that product adds up over *tokens*: its tiles must lie the
# other way, 128x1 instead of 1x128. To **re-tile** is to read the numbers with their old scales and to quantise them
# with new ones, and so to round a second time.
#
# Unless scales are powers of two. Then a change of scale changes exponents, and mantissas stay as they are. Such a
# scale needs no more than an exponent itself: a format for it is E8M0, 8 bits of exponent and nothing else. The report
# uses power-of-two scales for what the linear layer after attention has read, and keeps those numbers in E5M6, 12 bits,
# so that little is lost the first time.
#
# **What we expect.** With FP32 scales the second rounding adds to the first, and the error grows by $\sqrt 2$. With
# powers of two it should not grow. From E5M6 the one rounding that counts is the last one.

# %%
from dsv3_mini.fp8.quantize import retile

x = operands["1.self_attn.o_proj"].activation
print(f"after attention in layer 1: {list(x.shape)}")
storage = {"E4M3, FP32 scales": (E4M3, False), "E4M3, powers of two": (E4M3, True), "E5M6, powers of two": (E5M6, True)}
kept, turned = {}, {}
for name, (fmt, powers) in storage.items():
    kept[name] = quantize(x, (1, 128), fmt, powers)
    turned[name] = retile(kept[name], (128, 1), powers, fmt=E4M3)
    first, second = (relative_error(x, each.dequantize()) for each in (kept[name], turned[name]))
    print(
        f"{name:20} {kept[name].nbytes / x.numel():.2f} bytes a number: error {first:.1%} kept, {second:.1%} re-tiled"
    )

# %%
kept_error = {name: relative_error(x, each.dequantize()) for name, each in kept.items()}
turned_error = {name: relative_error(x, each.dequantize()) for name, each in turned.items()}
fp32, powers, e5m6 = storage
print("FP32 scales: re-tiling adds to the error:   ", turned_error[fp32] > 1.2 * kept_error[fp32])
print("powers of two: it adds nothing to speak of: ", turned_error[powers] < 1.1 * kept_error[powers])
assert turned_error[fp32] > 1.2 * kept_error[fp32] and turned_error[powers] < 1.1 * kept_error[powers]
assert kept_error[e5m6] < kept_error[powers] / 4 and turned_error[e5m6] < 1.1 * kept_error[powers]

# %% [markdown]
# ## Find the bug
#
# torch has E8M0 as a type, `torch.float8_e8m0fnu`. What is more natural than to compute the scale and cast it? The cast
# gives a power of two, and its largest error is a factor of 1.5.


# %%
def scales_with_a_bug(amax: Tensor) -> Tensor:
    """amax [...], the largest magnitude of each tile -> a power of two for each."""
    return (amax / 448).to(torch.float8_e8m0fnu).float()


# %%
amax = reduce(x.abs(), "T c -> T 1", "max")
scale = scales_with_a_bug(amax)
stored = (x / scale).to(torch.float8_e4m3fn).float() * scale
cut = (amax / (448 * scale)).clamp_min(1)
print(f"tiles whose largest number is cut: {(cut > 1).float().mean():.0%}, by up to {1 - 1 / cut.max():.0%}")
print(f"error with the bug {relative_error(x, stored):.1%}, and it should be {kept_error[powers]:.1%}")
assert relative_error(x, stored) > 1.2 * kept_error[powers]

# %% [markdown] tags=["bug"]
# ### Find the bug · Nearest is not enough
# ●●○ · 12 minutes
#
# Nothing crashes, no number is NaN, and most of a matrix is right. But in many tiles the largest numbers, those that
# weigh most, do not fit and are cut to 448. Write the scale that is asked for: for each largest magnitude `amax`, the
# smallest power of two $s$ under which it still fits, $\text{amax} \le 448\,s$. A tile of zeros has `amax` 0 and gets
# any scale that one can divide by.
#
# <details><summary>Hint 1</summary>Which way must a scale be rounded so that <code>amax / scale</code> cannot get
# larger?</details>
# <details><summary>Hint 2</summary><code>torch.frexp</code> gives a mantissa between 1/2 and 1: 1/2 itself for a power
# of two, more for all others. A <code>ceil</code> of a logarithm is nearly right, and just above a power of two it is
# wrong.</details>


# %%
def power_of_two_scale(amax: Tensor) -> Tensor:
    """amax [...] -> scale [...]: the smallest power of two with amax <= 448 * scale."""
    ### BEGIN SOLUTION: frexp of amax / 448 (kept above zero): 2^exponent, or half of that where it is a power of two already
    mantissa, exponent = torch.frexp((amax / 448).clamp_min(1e-30))
    return torch.ldexp(torch.ones_like(amax), exponent - (mantissa == 0.5).int())
    ### END SOLUTION


# %%
check.power_of_two_scale(power_of_two_scale)

# %%
from dsv3_mini.fp8.formats import power_of_two_at_least

show_source(power_of_two_at_least)
same(power_of_two_scale, lambda amax: power_of_two_at_least(amax / 448), (amax,), (448 * 2.0 ** torch.arange(-9, 9),))

# %% [markdown] tags=["at-671b"]
# ## At 671B
#
# How much of the model is FP8's? The ledger knows which matrices the recipe keeps in E4M3, and how many scales they
# have.

# %%
from dsv3_mini import ModelConfig
from dsv3_mini.ledger import checkpoint_bytes, count_parameters

large = ModelConfig.preset("671b")
parameters = count_parameters(large)
fp8 = [(times, each) for block, times in parameters.main_blocks for each in block.tensors if each.kind == "linear"]
multiplied = sum(times * each.activated for times, each in fp8)
scales = sum(times * each.fp8_scales for times, each in fp8)
weights = sum(times * each.total for times, each in fp8)
per_scale = f"{scales / 1e6:.1f} million scales: {4 * scales / weights:.3%} of the bytes"
in_fp8, in_bf16 = (checkpoint_bytes(large, weights=kind) / 1e9 for kind in ("fp8", "bf16"))
print(f"of the weights that a token is multiplied with, {multiplied / parameters.multiplied:.1%} are in FP8")
print(f"{weights / 1e9:.1f} billion weights, {per_scale}")
print(f"the shipped model: {in_fp8:.0f} GB, in BF16 {in_bf16:.0f} GB")

# %% [markdown]
# For activations the scales weigh more: four bytes for 128. As E8M0 they would be one.

# %%
width = large.num_attention_heads * large.v_head_dim  # what the linear layer after attention reads of a token
for name, number, scale_bytes in (("BF16", 2, 0), ("E4M3, FP32 scales", 1, 4), ("E5M6, FP32 scales", 1.5, 4)):
    size = width * number + width / 128 * scale_bytes
    print(f"{name:18} {size / 1e3:5.1f} kB a token and layer, scales {width / 128 * scale_bytes / size:.1%} of it")

# %% [markdown]
# And the sums. In the forward pass K is what a layer reads, in the backward pass what it writes, and for the gradient of
# the weights the number of tokens. The longest of the first two, added up as the report does it and without promotion:

# %%
lengths = {each.name: each.shape for _, each in fp8}
longest = {
    "forward, most layers": large.hidden_size,
    "forward, at most": max(shape[1] for shape in lengths.values()),
    "backward, at most": max(shape[0] for shape in lengths.values()),
}
for name, inner in longest.items():
    alone, promoted = (sum_errors(inner, each).max().item() for each in (None, 128))
    print(f"{name:21} K = {inner:>6,}: {inner // 128:>3} promotions, {promoted:.2%} off, without them {alone:.1%}")
    assert alone > 8 * promoted

# %% [markdown] tags=["recap"]
# ## Recap
#
# 1. A tensor has numbers of size 1 and one of 500. Under one scale, does E4M3 lose the small ones?
#    <details><summary>Answer</summary>No. They come to lie near 1, where there are 8 numbers from one power of two to
#    the next, as everywhere. Only what is some 28,672 times smaller than the largest falls among the subnormal numbers
#    and loses bits. In 8-bit whole numbers they would all be lost.</details>
# 2. Why is 128 the width of a tile *and* the interval of promotion?
#    <details><summary>Answer</summary>When a partial sum leaves the tensor core it is multiplied by the scales of its
#    tiles and added in FP32. Both have to happen at the same moment, so one does it once: the scales cost nothing
#    extra.</details>
# 3. Where do scales that are powers of two help, and what do they cost?
#    <details><summary>Answer</summary>Where numbers change their tiles: a change of scale leaves mantissas alone, so
#    nothing is rounded a second time. They must be rounded up, so up to one power of two at the top stays
#    unused.</details>

# %% [markdown] tags=["next"]
# ## Next
#
# You know what an FP8 number is, what it costs, and how it is multiplied. Lesson 16 trains with it: a linear layer
# whose three products, forward and backward, run in FP8, a model with such layers beside its BF16 twin, and the gap
# between their losses.
