# ---
# jupyter:
#   jupytext:
#     text_representation:
#       format_name: percent
#   dsv3:
#     title: Training in FP8
#     minutes: 90
#     after: [11_mtp, 15_fp8_numbers]
#     builds: re-tiling, the three products of a linear in 8 bits, SwiGLU recomputed, bytes kept, a loss gap measured
#     tracks: [term]
# ---

# %% [markdown] tags=["why"]
# # 16 · Training in FP8
#
# In lesson 15 you rounded numbers to 8 bits, with a scale for each tile of them. Now a model is to *learn* with such
# numbers. Its weights are the least of it: what is rounded besides are the activations that pass through the model and
# the gradients that come back. They are others with every batch, nobody can look at them first, and a mistake in them
# goes into the weights and stays there.
#
# In this lesson you build a linear layer that trains in 8 bits: its three matrix products, and what each of them asks
# of its operands. You count what such a layer keeps in memory for the backward pass. Then you train the same model
# twice on the same text, in 16 bits and in 8, and measure how far the losses part.
#
# The picture shows the three products. A tile of one shade shares a scale. Watch which way the tiles lie.

# %%
from dsv3_mini.viz.figures.fp8_training import products_figure

products_figure()

# %% [markdown] tags=["paper"]
# ## In the report
#
# Section 3.3, with its figures 6 and 7, and appendix B. The letters here: a layer reads `x` of shape `[T i]` (`T`
# tokens, `i` inputs), has the weight `w`, `[o i]`, and writes `y = x wᵀ`, `[T o]`. `g` is the gradient of the loss with
# respect to `y`. **Fprop** is the product of the forward pass, **Dgrad** and **Wgrad** are the two of the backward pass:
# one for the data, one for the weight.
#
# | what | in which numbers | why |
# |---|---|---|
# | operands of Fprop, Dgrad and Wgrad | FP8, E4M3 in all three | they are nearly all of the arithmetic |
# | scales of `x` and `g` | one for each 1 x 128 tile, from its own largest number, at once | an outlier spoils 127 others, not a matrix |
# | scales of `w` | one for each 128 x 128 block | the same block serves `w` and `wᵀ` |
# | partial sums | promoted to FP32 every 128 terms | the tensor core keeps about 14 bits of a sum |
# | embedding, head, router, norms, attention's core | BF16 or FP32 | cheap, and sensitive |
# | master weights, gradients of weights | FP32 | small updates have to add up |
# | Adam's moments | BF16 | averages, made anew in every step |
# | `x` kept for Wgrad | FP8; behind attention E5M6, with scales that are powers of two | memory |
# | SwiGLU | its input kept in FP8, its output computed again | memory |
#
# Section 3.3 says what comes of it: relative to BF16 the loss is off by less than **0.25%**. And appendix B tells of
# one variant that went wrong: with square blocks for `g` in Dgrad, a 16B model diverged.

# %% [markdown] tags=["naive"]
# ## The naive way
#
# Casting is not enough, gradients least of all. What arrives at one token may look like this:

# %%
import torch

arriving = torch.tensor([2e-3, 4e-4, 3e-5])
print("a gradient:", [f"{value:g}" for value in arriving.tolist()])
print("in E4M3:   ", [f"{value:g}" for value in arriving.to(torch.float8_e4m3fn).float().tolist()])

# %% [markdown]
# So everything gets a scale, as in lesson 15: value = code * scale. In Fprop that is easy. Each token has its own scale,
# the product sums over the inputs of *one* token, and its scale is multiplied in afterwards.
#
# Then comes Wgrad, `gᵀ x`, and sums over the tokens. Two tokens, two inputs, one output, one scale for each token:

# %%
x = torch.tensor([[1.0, -2.0], [300.0, 100.0]])  # the second token is loud
g = torch.tensor([[0.5], [0.001]])
scale = x.abs().amax(dim=1, keepdim=True) / 448
codes = (x / scale).to(torch.float8_e4m3fn).float()


def shown(row):
    return [f"{value:.2f}" for value in row.flatten().tolist()]


print("what Wgrad should give:                 ", shown(g.T @ x))
for token in (0, 1):
    print(f"codes added up, times token {token}'s scale: ", shown((g.T @ codes) * scale[token]))

# %% [markdown]
# The codes of two tokens mean different things, and once they are added up no scale can set that right. In general: a
# scale comes out of a sum only if **all that is summed shares it**. That one sentence decides the tiles of all three
# products.
#
# You multiplied in slices in lesson 15: along the axis that is summed over, 128 neighbours share a scale, and each
# slice's partial sum meets the two scales that belong to it. Read the picture at the top once more with that in mind.
# Fprop sums over the inputs: `x` is cut along them. Dgrad sums over the outputs: `g` is cut along those. Wgrad sums
# over the tokens, and needs *both* `x` and `g` cut along the tokens. Only `w` is content with one cut: its blocks are
# square, so they lie right both ways.
#
# `g` is at hand when the backward pass begins, and is quantised twice. But `x` is long gone. What is left of it are the
# 8-bit codes that Fprop multiplied, in tiles that lie the wrong way.

# %%
from einops import reduce, repeat
from torch import Tensor

from dsv3_mini.course.checks import lesson_16 as check
from dsv3_mini.course.lesson import same, show_source
from dsv3_mini.fp8.formats import E4M3, power_of_two_at_least, round_to

# %% [markdown] tags=["exercise"]
# ### Exercise 1 · Re-tiling
# ●●○ · 15 minutes
#
# `q` `[T i]` holds codes, `scale` `[T j]` their scales: token `t` has one for each `w` neighbouring inputs. Give codes
# and scales of the same values for Wgrad: tiles of `w` neighbouring *tokens* of one input, scales `[n i]` with
# `T = n * w`.
#
# The numbers are rounded to 8 bits a second time. Make the new scales **powers of two**: the smallest power of two that
# is not below (largest magnitude of the tile) / 448. Where the old scales are powers of two as well, as behind attention,
# nothing is lost then: the exponent of a number changes, its mantissa stays. Only what is tiny beside its new neighbours
# loses bits.
#
# `power_of_two_at_least(x)` and `round_to(x, E4M3)` are lesson 15's, from the package.
#
# <details><summary>Hint 1</summary>Back to values first: <code>repeat(scale, "T j -> T (j w)", w=w)</code> has a scale
# for each number.</details>
# <details><summary>Hint 2</summary><code>reduce(..., "(n w) i -> n i", "max", w=w)</code> looks down a tile of
# tokens.</details>


# %%
def retile_for_wgrad(q: Tensor, scale: Tensor, w: int) -> tuple[Tensor, Tensor]:
    """Codes [T i], scales [T j] of 1 x w tiles -> codes [T i], scales [n i] of w x 1 tiles, powers of two."""
    ### BEGIN SOLUTION: values from codes and scales; the new tiles' largest / 448, up to a power of two; codes anew
    values = q * repeat(scale, "T j -> T (j w)", w=w)
    largest = reduce(values.abs(), "(n w) i -> n i", "max", w=w)
    new = power_of_two_at_least(largest / 448)
    return round_to(values / repeat(new, "n i -> (n w) i", w=w), E4M3), new
    ### END SOLUTION


# %%
check.retile_for_wgrad(retile_for_wgrad)

# %% [markdown] tags=["exercise"]
# ### Exercise 2 · Three products
# ●●○ · 15 minutes
#
# Put a layer together, with the package's tools (lesson 15 built what they do):
#
# - `quantize(m, tile)` quantises a matrix; `tile` is `(rows, columns)` that share a scale.
# - `retile(q, tile)` is exercise 1. `q.transpose()` turns a quantised matrix over, tiles and all.
# - `multiply(a, b)` is lesson 15's product and gives `a bᵀ` in FP32. The axis that is summed over is the *last* of both,
#   since a tensor core wants its 8-bit operands so.
#
# The first line below is given: what the forward pass keeps. The backward pass has `kept_x`, `kept_w` and `g`, but no
# `x`.
# Return `y` `[T o]`, `dx` `[T i]` and `dw` `[o i]`; every operand of every product in E4M3 with the report's tiles.
#
# <details><summary>Hint 1</summary>Dgrad: <code>dx = g w</code> sums over <code>o</code>, which has to stand last:
# <code>multiply(..., kept_w.transpose())</code>.</details>
# <details><summary>Hint 2</summary>Wgrad: <code>dw = gᵀ x</code> sums over <code>T</code>. So both are turned over after
# they were tiled along the tokens, <code>(128, 1)</code>.</details>

# %%
from functools import partial

from dsv3_mini.fp8.gemm import gemm
from dsv3_mini.fp8.quantize import quantize, retile

multiply = partial(gemm, out_dtype=torch.float32)


def three_products(x: Tensor, w: Tensor, g: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """x [T i], w [o i], g [T o] -> y [T o], dx [T i], dw [o i], all three from 8-bit operands."""
    kept_x, kept_w = quantize(x, (1, 128)), quantize(w, (128, 128))
    ### BEGIN SOLUTION: Fprop from kept_x and kept_w; Dgrad from g in (1, 128); Wgrad from g and kept_x, both in (128, 1)
    y = multiply(kept_x, kept_w)
    dx = multiply(quantize(g, (1, 128)), kept_w.transpose())
    dw = multiply(quantize(g, (128, 1)).transpose(), retile(kept_x, (128, 1)).transpose())
    return y, dx, dw
    ### END SOLUTION


# %%
check.three_products(three_products)

# %% [markdown] tags=["exercise"]
# ### Exercise 3 · SwiGLU, a second time
# ●●○ · 12 minutes
#
# A feed-forward is two linears with SwiGLU between: the first one writes `gate` and `up` side by side, SwiGLU makes
# `hidden = silu(gate) * up` of them, the second one reads `hidden`. Backward needs all three, and they are wide. The
# report keeps only what SwiGLU *reads*, in 8 bits, and computes the rest again.
#
# `q` `[T 2f]` are the codes that were kept (columns: `gate`, then `up`), `scale` `[T j]` their scales, one for each `w`
# neighbours. `dh` `[T f]` is the gradient that has come back to `hidden`. Give `hidden` `[T f]`, which Wgrad of the
# second linear will ask for, and the gradient of gate and up, `[T 2f]`, which goes on to the first.
#
# `silu(z) = z * sigmoid(z)`. By hand or with autograd, as you like.
#
# <details><summary>Hint 1</summary>With autograd: values from codes, <code>.requires_grad_()</code>, forward, and
# <code>torch.autograd.grad(hidden, values, dh)</code>.</details>
# <details><summary>Hint 2</summary>By hand: the derivative of silu is <code>s * (1 + z * (1 - s))</code> with
# <code>s = sigmoid(z)</code>.</details>


# %%
def swiglu_again(q: Tensor, scale: Tensor, w: int, dh: Tensor) -> tuple[Tensor, Tensor]:
    """Codes [T 2f], scales [T j], dh [T f] -> hidden [T f], and the gradient of gate and up [T 2f]."""
    ### BEGIN SOLUTION: gate and up from codes and scales; silu(gate) * up; dh through both factors, side by side again
    gate, up = (q * repeat(scale, "T j -> T (j w)", w=w)).chunk(2, dim=-1)
    s = torch.sigmoid(gate)
    d_gate, d_up = dh * up * s * (1 + gate * (1 - s)), dh * gate * s
    return gate * s * up, torch.cat([d_gate, d_up], dim=-1)
    ### END SOLUTION


# %%
check.swiglu_again(swiglu_again)

# %% [markdown] tags=["package"]
# ## The package's own
#
# `fp8/linear.py` is your second exercise as an autograd function. Its three products have a line each, and what a
# `recipe` is you will see below: which tile, which format, who multiplies. `fp8/swiglu.py` is the third one.

# %%
from dsv3_mini.fp8 import linear, swiglu

show_source(linear._Linear, linear.fprop, linear.dgrad, linear.wgrad, swiglu._Down)

# %% [markdown]
# Are they the same as yours? Exercise 1 is held against `retile`, the second against the whole layer. For the third,
# autograd goes through the package's SwiGLU from the values that were kept.

# %%
from dsv3_mini.fp8.quantize import Quantized


def as_tiles(codes: Tensor, scale: Tensor) -> Quantized:
    width = codes.shape[1] // scale.shape[1]
    return Quantized(codes.to(torch.float8_e4m3fn), scale, (1, width), E4M3, codes.shape[1])


def package_retile(q: Tensor, scale: Tensor, w: int) -> tuple[Tensor, Tensor]:
    new = retile(as_tiles(q, scale), (w, 1))
    return new.numbers(), new.scale


# %%
from dsv3_mini.model.feed_forward import swiglu as package_swiglu


def package_again(q: Tensor, scale: Tensor, w: int, dh: Tensor) -> tuple[Tensor, Tensor]:
    gate_up = as_tiles(q, scale).dequantize().requires_grad_()
    hidden = package_swiglu(gate_up)
    return hidden.detach(), *torch.autograd.grad(hidden, gate_up, dh)


# %%
def package_layer(x: Tensor, w: Tensor, g: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    layer = linear.FP8Linear(w.shape[1], w.shape[0])
    layer.weight.data = w
    x = x.clone().requires_grad_()
    y = layer(x)
    return y.detach(), *torch.autograd.grad(y, [x, layer.weight], g)


torch.manual_seed(0)
x, w, g = torch.randn(256, 384), torch.randn(128, 384) / 384**0.5, torch.randn(256, 128)

# %%
kept = quantize(x)
same(retile_for_wgrad, package_retile, (kept.numbers(), kept.scale, 128))
same(three_products, package_layer, (x, w, g))
gate_up = quantize(x[:, :256])
same(swiglu_again, package_again, (gate_up.numbers(), gate_up.scale, 128, g))

# %% [markdown]
# How good are the three results? That can be foretold. Rounding to E4M3 moves a number by some percent, more just above
# a power of two and less just below the next one. Two operands, both rounded: the square root of 2 times as much. And
# adding up does not help, since the errors grow with the terms. The `x` of Wgrad is rounded twice.

# %%
from dsv3_mini.course.fp8_runs import layer_errors
from dsv3_mini.fp8.recipe import ABLATIONS, REPORT

numbers = torch.randn(1_000_000)
once = quantize(numbers[None]).dequantize()[0]
one_rounding = ((once - numbers).norm() / numbers.norm()).item()
print(f"one rounding moves a number by {one_rounding:.1%}, in root mean square")
foretold = {"y (Fprop)": 2**0.5, "dx (Dgrad)": 2**0.5, "dw (Wgrad)": 3**0.5}
for result, off in layer_errors(REPORT).items():
    print(f"{result:11} foretold {foretold[result] * one_rounding:.1%}, measured {off.error:.1%}")
    assert abs(off.error / (foretold[result] * one_rounding) - 1) < 0.2

# %% [markdown]
# ### What becomes 8 bits, and what does not
#
# One call turns a model into its FP8 twin; parameters stay the same objects under the same names. Take the tiny model
# that comes with the course and look at who multiplies 8-bit numbers afterwards.

# %%
import copy

import dsv3_mini as dsv3
from dsv3_mini.data.shipped import shipped
from dsv3_mini.fp8.convert import to_fp8

model = dsv3.from_pretrained(shipped("tiny"))
twin = to_fp8(copy.deepcopy(model))
quantised = [module for module in twin.modules() if isinstance(module, linear.Fp32Weights)]
small = {parameter for module in quantised for parameter in module.parameters()}

# %%
from collections import Counter

from dsv3_mini.course.fp8_runs import part_of

count = Counter()
for name, parameter in twin.named_parameters():
    part = "joint of MTP" if "eh_proj" in name else part_of(name)
    count["8 bits" if parameter in small else "stays high", part] += parameter.numel()
for (where, part), many in sorted(count.items()):
    print(f"{where:11} {part:20} {many:>10,} numbers")

# %% [markdown]
# In a model this small the embedding and the head are a good part of everything; at the end of the lesson you compute
# the same for the large one. Why do these stay? The router decides between experts whose scores hardly differ: a
# rounding there is no small error but another expert. Norms and attention's softmax are few operations on numbers of
# wide range. The head's errors go straight into the loss. And the weights that are quantised for each step are copies.
# The *masters*, from which they are made, stay in FP32: more on that in the bug below.

# %% [markdown] tags=["exercise"]
# ### Exercise 4 · What is kept for backward
# ●●○ · 12 minutes
#
# Half of why FP8 is worth its trouble is memory. Between forward and backward pass each operation keeps what it will
# need: autograd saves those tensors in its graph. Count them, in bytes.
#
# Inside `with torch.autograd.graph.saved_tensors_hooks(pack, unpack):` every tensor that is saved passes through your
# function `pack(tensor)`, which returns what shall be kept in its place (return the tensor itself); `unpack` gives it
# back. `forward(x, weights)` is a function to be called inside; `weights` is a list of tensors that are in memory
# anyway and are not counted.
#
# Two tensors may share their memory: a view looks into the storage of another tensor, and keeps all of it alive.
# `tensor.untyped_storage()` has `.data_ptr()`, its address, and `.nbytes()`. Count each storage once.
#
# <details><summary>Hint 1</summary>A dict from address to bytes counts everything once.</details>
# <details><summary>Hint 2</summary>Keep the result of <code>forward</code> in a variable until you have counted, or the
# graph is gone and addresses are used again.</details>


# %%
def kept_bytes(forward, x: Tensor, weights: list[Tensor]) -> int:
    """Bytes that the graph of forward(x, weights) keeps for its backward pass, the weights not counted."""
    ### BEGIN SOLUTION: a hook that notes address and size of each saved storage; their sum without those of the weights
    kept = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = forward(x, weights)  # noqa: F841  (it holds the graph)
    own = {weight.untyped_storage().data_ptr() for weight in weights}
    return sum(storage.nbytes() for place, storage in kept.items() if place not in own)
    ### END SOLUTION


# %%
check.kept_bytes(kept_bytes)

# %% [markdown]
# Now count a whole layer of the tiny model, attention, router and experts, in both ways. The package counts by the type
# of the numbers.

# %%
from dsv3_mini.fp8.kept import bytes_kept
from dsv3_mini.model.rope import rotations

layers = {"BF16": copy.deepcopy(model.layers[1]), "FP8": to_fp8(copy.deepcopy(model.layers[1]))}
layers = {name: layer.to(torch.bfloat16) for name, layer in layers.items()}
passing = torch.randn(8, 176, model.cfg.hidden_size, dtype=torch.bfloat16).requires_grad_()
turn = rotations(model.cfg, torch.arange(passing.shape[1]))


def through(layer):
    """forward(x, weights) of a layer; its weights are its own."""
    return lambda x, weights: layer(x, turn)[0]


# %%
def package_kept(forward, x, weights):
    return sum(bytes_kept(lambda: forward(x, weights), weights).values())


for layer in layers.values():
    same(kept_bytes, package_kept, (through(layer), passing, list(layer.parameters())))

# %%
from dsv3_mini.viz.figures.fp8_training import kept_figure

NAMES = {torch.float8_e4m3fn: "E4M3", torch.uint8: "E5M6, packed", torch.bfloat16: "BF16", torch.float32: "FP32"}
kept = {}
for name, layer in layers.items():
    found = bytes_kept(lambda layer=layer: through(layer)(passing, None), list(layer.parameters()))
    kept[name] = {said: found[dtype] for dtype, said in NAMES.items() if found.get(dtype)}
    kept[name]["indices, rotations"] = sum(size for dtype, size in found.items() if dtype not in NAMES)
ratio = sum(kept["FP8"].values()) / sum(kept["BF16"].values())
assert ratio < 0.55
kept_figure(kept, f"In FP8 the layer keeps {ratio:.0%} of what it keeps in BF16")

# %% [markdown]
# Two savings in one. What the linears read is kept in 8 bits, or in 12 behind attention: E5M6 numbers, two of them in
# three bytes. And queries, keys and values of all heads are not kept at all, but built again from the latents in the
# backward pass, as the report does with the up-projections of attention. They are the FP32 of the upper bar: on a CPU
# this course computes attention's core in FP32. (In BF16, as on a GPU, they would be half of that.) What norms and
# residual stream keep stays BF16, and the router and all scales FP32.

# %% [markdown] tags=["experiment"]
# ## Experiment: does it learn as well?
#
# Every gradient is off by some percent, in every layer, and errors pile up on the way back. How can a training stand
# that? Perhaps because it stands much worse already. A batch is a sample of the text: the next one gives another
# gradient. As long as rounding adds little to *that* noise, it should not matter.
#
# **What we expect.** On the trained tiny model, in each part of it: the gradient in 8 bits is off by more than in a single
# layer (errors do pile up), but by less than half of what two batches differ.

# %%
from dsv3_mini.data.packing import inputs_and_targets
from dsv3_mini.data.stream import TokenStream
from dsv3_mini.data.tokenizer import Tokenizer

stream = TokenStream(Tokenizer.shipped(), 128, {"stories": 0.8, "sums": 0.2}, seed=5)
first, second = (inputs_and_targets(stream.next_batch(8), stream.tokenizer.pad_id) for _ in range(2))
stream.close()

# %%
from dsv3_mini.course.fp8_runs import differences, gradients

right, other = gradients(model, *first), gradients(model, *second)
rounding = differences(right, gradients(twin, *first))
batch = differences(right, other)
worst = max(rounding[part] / batch[part] for part in rounding)
print("off by more than 5% in every part:             ", all(value > 0.05 for value in rounding.values()))
print("below half of the batch's noise in every part: ", worst < 0.5)
assert worst < 0.5

# %%
from dsv3_mini.viz.figures.fp8_training import noise_figure

noise_figure(rounding, batch, "Rounding is the smaller noise")

# %% [markdown]
# ### Two trainings
#
# Now the test that counts. The same first weights, the same text in the same order, the same settings; one model
# computes in BF16 and the other in FP8, with all that belongs to the recipe: E5M6, recomputation, Adam's moments in
# BF16. One step, for all kinds:

# %%
from dsv3_mini.course.fp8_runs import training_steps

show_source(training_steps)

# %% [markdown]
# **What we expect.** A single step's losses differ by tenths of a percent, up and down: two trainings that differ in the
# last bits drift apart as weather does, and rounding alone decides which is ahead. So compare means: over the last
# third of the steps, the relative distance of the loss should be less than the report's 0.25%. And it should be of the
# size that BF16 and FP32 part, neither of which is at fault.
#
# The next cell but one trains the nano model, in both ways in turn, for half a minute. It is far too short and too small to
# settle a quarter of a percent; the pale lines are the runs that we recorded, and they are longer.

# %%
from dsv3_mini.viz.widgets.fp8_training import PrecisionRace

race = PrecisionRace()
race

# %%
before = race.picture.value
race.train(60)
assert race.picture.value != before
print("it learns: the loss fell by more than a third:", race.losses["FP8"][-1] < 2 / 3 * race.losses["FP8"][0])
print("FP8 is within 1% of BF16 over the last third: ", abs(race.gap) < 0.01)

# %% [markdown]
# Then the recorded runs. `python -m dsv3_mini.course.fp8_runs` makes them anew. A line is one kind of training, a
# column one seed (of first weights and text): the distance from BF16 over the last third of the steps; then that of all
# seeds together; and at the end, on text that training never read, the median of the seeds. *FP32* is the yardstick.
#
# There are three kinds of runs. *nano* and *tiny* begin with new weights. *tiny-trained* goes on from the tiny model that
# ships, at a quarter of its highest rate.

# %%
from dsv3_mini.course.fp8_runs import LINE, recorded, table

print(table(recorded()))
print()
for size in recorded().sizes:
    for way in ("FP32", "FP8"):
        farthest = max(abs(recorded().gap(size, way, seed)) for seed in recorded().seeds(size))
        verdict = "within" if farthest < LINE else "not within"
        print(f"{size:14}{way:5} a single run is at most {farthest:.2%} from BF16: {verdict} the report's {LINE:.2%}")

# %% [markdown]
# Single runs from new weights do not keep within 0.25%, and FP32 keeps to it as little as FP8. Nobody would say that FP32
# computes too coarsely, and its losses part from BF16's by tenths of a percent all the same. What is of that size and of
# either sign is drift; harm would be larger, or always on one side.
#
# Why is the drift so large? A young model learns in leaps: one day it finds out that a name comes back, and its loss falls.
# Whether that happens at step 250 or at step 260 is decided by a rounding, and over the last third of a short run it makes
# a difference of this size. To see less than the drift takes what the report had, long runs and large batches. Or one takes
# the leaps out: a trained model has made them. There, in the last lines of the table, FP32 stays with BF16, and FP8 shows what it
# costs: something, and well inside the line.

# %% [markdown] tags=["interactive"]
# ## The recorded runs, one by one
#
# Left: the two losses, which hardly can be told apart. Right: their relative distance, in the band of the report's
# 0.25%; pale, how far FP32 is from BF16. Choose which run and which way, and over how many steps to take the mean. With
# a mean of a single step you see the weather; with 50, the climate.

# %%
from dsv3_mini.viz.widgets.fp8_training import gap_explorer

gaps = gap_explorer()
gaps

# %%
before = gaps.picture.value
gaps.set(way="per-tensor scaling", window=50)
assert gaps.picture.value != before

# %% [markdown]
# Per-tensor scaling, E5M2 for gradients, square blocks in Dgrad: the report's choices are turned round one by one, and
# at our size none of them is clearly missed, though E5M2's losses scatter most. That is a finding too, and it has a
# reason. These models are small and young, their numbers are tame, and floating-point numbers have range enough for
# tame ones. What the choices guard against are numbers that lie far apart, as those of a large model may after weeks.
#
# That can be staged on a single layer. Here one token in 64 is loud, in its activations and its gradient, and you say
# how loud. Judged is the *median* token. Left the error of the three results, right what of that is not noise:
# the part by which they are too small on average, which no number of batches averages out.

# %%
from dsv3_mini.viz.widgets.fp8_training import ablation_explorer

staged = ablation_explorer()
staged

# %%
before = staged.picture.value
staged.set(changed="block-wise Dgrad", outlier=1_000_000)
assert staged.picture.value != before
report, changed = (layer_errors(ABLATIONS[name], 1e6) for name in ("the report's", "block-wise Dgrad"))
print("Fprop is not touched:                  ", changed["y (Fprop)"] == report["y (Fprop)"])
print("quiet tokens lose their whole gradient:", changed["dx (Dgrad)"].missing > 0.9)
print("with the report's tiles they do not:   ", abs(report["dx (Dgrad)"].missing) < 0.01)

# %%
tame = {name: layer_errors(recipe) for name, recipe in ABLATIONS.items()}
five = tame["E5M2 gradients"]["dx (Dgrad)"].error / tame["the report's"]["dx (Dgrad)"].error
print("E5M2 gradients, no loud tokens: dx is off by more than 1.5 times as much:", five > 1.5)
loud = {
    name: layer_errors(recipe, 1e6)["dx (Dgrad)"].error for name, recipe in ABLATIONS.items() if "promo" not in name
}
print(
    "one token in 64 a million times as loud: off by less than 10% are",
    *[n for n, e in loud.items() if e < 0.1],
    sep="\n  ",
)
never, promoted = (tame[name]["dw (Wgrad)"] for name in ("no promotion", "the report's"))
print("never promoted, dw is smaller, but by less than 0.2%:", 0 < never.missing - promoted.missing < 0.002)

# %% [markdown]
# Three things to look for:
#
# - *Per-tensor scaling* works up to surprisingly loud tokens, and then fails within a factor of a hundred. E4M3 reaches
#   from 448 down to 2⁻⁹: find the edge, and compute where it should be. At a hundred thousand half of the result is error,
#   and nothing is missing on average, since rounding to nearest is fair. At a million everything is 0.
# - *E5M2 gradients* do not care how loud a token is, but are less exact all the time. That was the bargain before
#   tiles: range for gradients, or precision. With a scale for each tile of 128 the range is not needed.
# - *No promotion* can hardly be seen. Wgrad adds up 2,048 terms here, and what the tensor core cuts off is some
#   hundredths of a percent of `dw`. That is less than one expects of a report that speaks of about 2%. But there it is
#   the largest error of any one sum, of 4096 terms and without the errors of rounding; lesson 15 measured it. Here it is
#   an average over all of `dw`. One thing is left to say for promotion: what is cut off always makes the result
#   smaller.
#
# So square blocks in Dgrad do no harm on this layer until a token is some ten thousand times as loud as its neighbours. In
# the report they made a 16B model diverge. Whether tokens are that far apart there, or whether much less is enough over
# 300 billion tokens, a single layer cannot say.
#
# ## Find the bug
#
# A colleague wants to save memory. "The products read 8-bit weights anyway. Why keep FP32 masters beside them? I keep
# the weights as 8-bit numbers with their scales, and in each step I dequantise, apply the update and quantise again."


# %%
def colleagues_weights(weight: Tensor, updates: list[Tensor]) -> list[Tensor]:
    """What the products read after each update, [o i]."""
    stored, read = quantize(weight, (128, 128)), []
    for update in updates:
        stored = quantize(stored.dequantize() - update, (128, 128))
        read.append(stored.dequantize())
    return read


# %%
torch.manual_seed(0)
weight, way = torch.randn(128, 128), torch.randn(128, 128).sign()
updates = [0.002 * way] * 40  # as Adam would: every weight a little, always to its own side
last = colleagues_weights(weight, updates)[-1]
went = (weight - last) * way / 0.08
print(f"of the way that 40 updates lead, the colleague's weights went {went.mean().item():.0%}")
print(f"those that are larger than 0.2 went                           {went[weight.abs() > 0.2].mean().item():z.0%}")
assert went[weight.abs() > 0.2].mean().item() < 0.5

# %% [markdown] tags=["bug"]
# ### Find the bug · Forty steps and no progress
# ●●○ · 10 minutes
#
# No update was too small to be computed, and still next to nothing moved. For most weights an update is smaller than half
# a step of E4M3's grid, and was rounded away, forty times. Only weights near zero, where the grid is fine, have moved. And
# updates *are* small: a thousandth of a weight is a usual size.
#
# Write it as it should be: give what the products read after each update, as a list of matrices `[o i]`, dequantised.
# Weights are quantised in blocks of 128 x 128.
#
# <details><summary>Hint 1</summary>What is carried from one step to the next, and in which numbers?</details>
# <details><summary>Hint 2</summary>8-bit weights are a copy, made anew for each step and thrown away. Scales belong to the
# copy.</details>


# %%
def weights_to_multiply(weight: Tensor, updates: list[Tensor]) -> list[Tensor]:
    """weight [o i] in FP32, updates to be taken off one after the other -> what the products read after each, [o i]."""
    ### BEGIN SOLUTION: a master in FP32 takes all updates; after each one a quantised copy of it is what is read
    master, read = weight, []
    for update in updates:
        master = master - update
        read.append(quantize(master, (128, 128)).dequantize())
    return read
    ### END SOLUTION


# %%
check.weights_to_multiply(weights_to_multiply)

# %% [markdown]
# In BF16 the same happens more slowly, which makes it harder to notice: lesson 13's optimizer keeps FP32 masters for a
# BF16 model too. Adam's moments are another matter. They are averages that fade: a rounding in one of them is forgotten
# after some steps, and does not add up. So BF16 is enough for them.
#
# A relative of this bug is called *delayed scaling*: to save a pass over the numbers, a tensor is quantised with a scale
# from the largest number of the steps before. It works until a number comes that is larger than all before it, and is cut
# off without a word. The report measures anew each time.

# %% [markdown] tags=["at-671b"]
# ## At 671B
#
# How much of the large model's arithmetic is in 8 bits? All linears of attention, feed-forwards and experts; not the
# router, not the head, not attention's core.

# %%
from dsv3_mini import ModelConfig
from dsv3_mini.ledger import count_parameters, flops_per_token, training_state

large = ModelConfig.preset("671b")
parts = [(t, times) for block, times in count_parameters(large).main_blocks for t in block.tensors]
in_8_bits = sum(times * t.activated for t, times in parts if t.kind == "linear")
multiplied = sum(times * t.activated for t, times in parts if t.kind in ("linear", "matrix"))
core = flops_per_token(large, 4096).attention
print(f"of the weights that a token meets, {in_8_bits / multiplied:.1%} are multiplied in 8 bits")
print(f"of all multiplications at a context of 4096: {2 * in_8_bits / (2 * multiplied + core):.1%}")

# %% [markdown]
# What is kept for backward, for one token in one sparse layer, is a matter of widths. The table counts what the linears
# read (and what SwiGLU reads): two bytes each in BF16; one byte and a scale's share in FP8, 12 bits behind attention,
# and nothing for SwiGLU's output.

# %%
d, f = large.hidden_size, large.moe_intermediate_size
experts = large.num_experts_per_tok + large.n_shared_experts
latents, heads = large.q_lora_rank + large.kv_lora_rank, large.num_attention_heads * large.v_head_dim
one = 1 + 4 / 128  # a byte, and its part of a FP32 scale
rows = {
    "read by attention's first linears": (d, one),
    "latents": (latents, one),
    "read by the linear behind attention": (heads, one + 0.5),
    "read by the experts": (experts * d, one),
    "read by SwiGLU": (experts * 2 * f, one),
    "written by SwiGLU": (experts * f, 0.0),
}
for name, (many, size) in rows.items():
    print(f"{name:36} {2 * many:>8,} bytes in BF16 {size * many:>10,.0f} in FP8")
bf16, fp8 = sum(2 * many for many, _ in rows.values()), sum(size * many for many, size in rows.values())

# %%
layers = count_parameters(large).moe_layers
print(f"together {bf16 / 1e3:.0f} kB and {fp8 / 1e3:.0f} kB: {fp8 / bf16:.0%}")
print(
    f"a sequence of 4096 tokens in {layers} layers: {bf16 * 4096 * layers / 1e9:.0f} GB and {fp8 * 4096 * layers / 1e9:.0f} GB"
)
for weights in ("bf16", "fp8"):
    state = training_state(large, weights=weights)
    print(f"masters, gradients, moments, and weights in {weights}: {state.per_parameter:.1f} bytes a parameter")
longest = max(d, large.intermediate_size, heads)
print(f"the longest sum of Fprop has {longest:,} terms: {longest // 128} promotions; Wgrad's is as long as the batch")

# %% [markdown]
# So 8-bit weights save little of the *state* of a training: masters, gradients and moments stay as they are. What FP8
# buys are products that take half the time at best, half of the kept activations, and half of the bytes that travel to
# the experts.

# %% [markdown] tags=["recap"]
# ## Recap
#
# 1. Why may `w` have square blocks, while `x` and `g` have long tiles, and why two kinds of them?
#    <details><summary>Answer</summary>A scale must be shared along the axis that is summed over. A square block is as long
#    in both directions, so it serves Fprop and Dgrad. `x` is summed over its inputs in Fprop and over the tokens in Wgrad,
#    `g` over its outputs and over the tokens. A square block would do for them too, but then 128 tokens would share a
#    scale, and tokens differ far more than the rows of a weight.</details>
# 2. Every gradient in an FP8 training is wrong by several percent. Why does the loss hardly notice?
#    <details><summary>Answer</summary>Rounding to nearest errs to both sides, anew in each step: it is noise, smaller than
#    the noise that comes from looking at one batch. What would be noticed is an error with a direction: small updates that
#    are rounded away, quiet tokens that become 0, sums that are always cut off.</details>
# 3. The master weights were to be saved in BF16 as well. Which share of a weight must an update have to leave a trace?
#    <details><summary>Answer</summary>BF16 has 8 bits: neighbouring numbers lie between a 256th and a 128th of the number
#    apart, and a change of less than half of that is rounded away. So about 0.2 to 0.4%, and a usual update is smaller. FP32
#    has 24 bits: a few parts in a hundred million.</details>

# %% [markdown] tags=["next"]
# ## Next
#
# The model is trained, and reads as far as its rows were long. Lesson 17 stretches that: YaRN turns the slow
# frequencies of RoPE more slowly still, and a short training afterwards teaches the model to look further back.
