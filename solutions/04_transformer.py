# ---
# jupyter:
#   jupytext:
#     text_representation:
#       format_name: percent
#   dsv3:
#     title: The transformer
#     minutes: 85
#     after: [01_shapes_and_einops]
#     builds: RMSNorm, SwiGLU, causal attention, cross-entropy, and a first model that you train
#     tracks: [half-day, two-days, term]
# ---

# %% [markdown] tags=["why"]
# # 04 · The transformer
#
# DeepSeek-V3 changes almost every part of the transformer: how it remembers (latent attention), how it computes (a
# mixture of experts), what it predicts (more than one token). To see what a change is worth, you need the thing before
# the change. In this lesson you build it, a plain decoder: four small functions, put together to a model, and trained
# on stories in the time it takes to stretch. It is the *dense baseline* with which later lessons compare.
#
# The picture is the whole model. Every token has a vector of `d` numbers, and that vector travels from left to right:
# the **residual stream**. Nothing ever replaces it. Each part reads the stream (through a norm) and adds what it found.

# %%
from dsv3_mini.course.baseline import BaselineShape
from dsv3_mini.viz.figures.transformer import decoder_figure

shape = BaselineShape()
decoder_figure(shape.layers, shape.width)

# %% [markdown] tags=["paper"]
# ## In the report
#
# Section 2 of the DeepSeek-V3 technical report begins where this lesson ends: it takes the transformer as known and
# writes down what it changes. What stays, in the course's letters (`b` batch, `s` and `t` positions of queries and
# keys, `h` heads, `d` width of the stream, `f` width of the feed-forward):
#
# | part | formula | where it is used |
# |---|---|---|
# | RMSNorm | $y = w \odot x \,/\, \sqrt{\mathrm{mean}(x^2) + \epsilon}$ | before every part, and inside MLA (section 2.1.1) |
# | SwiGLU | $W_{down}\,(\mathrm{silu}(W_{gate}\,x) \odot W_{up}\,x)$ | the first 3 layers, and each expert (section 2.1.2) |
# | attention | $o_s = \sum_{t \le s} \mathrm{softmax}_t(q_s \cdot k_t / \sqrt{q})\, v_t$ | equation 10, there with latent keys |
# | loss | $-\mathrm{mean} \log p(\mathrm{next\ token})$ | pre-training; equation 24 is its twin for MTP |
#
# $\odot$ multiplies entry by entry. $\epsilon$ is a small number, $10^{-6}$ here, that keeps the division finite.

# %% [markdown] tags=["naive"]
# ## The naive way
#
# Attention, one number at a time. A **query** of token `s` asks; the **key** of each token `t` up to `s` answers with a
# dot product, its *score*; the softmax turns scores into weights that sum to 1; the output is the weighted mean of the
# **values**. No later token is asked: when the model writes, there are none yet.

# %%
import math
from operator import mul


def naive_attention(query: list, key: list, value: list) -> list:
    """One head. query, key: s vectors of q numbers; value: s vectors of v numbers -> s vectors of v numbers."""
    outputs = []
    for s, asking in enumerate(query):
        scores = [sum(map(mul, asking, k)) / math.sqrt(len(asking)) for k in key[: s + 1]]
        parts = [math.exp(score - max(scores)) for score in scores]
        weights = [part / sum(parts) for part in parts]
        outputs.append([sum(map(mul, weights, column)) for column in zip(*value[: s + 1], strict=True)])
    return outputs


# %%
for row in naive_attention([[1.0, 0.0], [0.0, 4.0]], [[1.0, 0.0], [0.0, 1.0]], [[10.0], [20.0]]):
    print([round(number, 1) for number in row])

# %% [markdown]
# The first token sees only itself and gets its own value, 10. The second asks for what the second key offers, so its
# mean lies close to 20. Three nested loops, and all of it for one head of one row of text: in tensors it is two
# products.
#
# Now the four functions. Each has a check that says what is wrong, not only that something is. What you leave blank
# stays blank: the rest of the notebook runs without it.

# %%
import torch
from einops import einsum, reduce
from torch import Tensor

from dsv3_mini.course.checks import lesson_04 as check
from dsv3_mini.course.lesson import same, show_source

# %% [markdown] tags=["exercise"]
# ### Exercise 1 · RMSNorm
# ●○○ · 8 minutes
#
# The stream grows from layer to layer, because every part adds to it. A part should not care how large its input has
# become, so it reads the stream divided by its own size. That size is the **r**oot of the **m**ean of the **s**quares
# of one token's `d` numbers. Afterwards each dimension is multiplied by a learned number, its `weight`.
#
# `x` has any number of axes in front, `"... d"`. `eps` is added to the mean *under* the root.
#
# <details><summary>Hint 1</summary>Three steps: square, mean over the last axis, root.</details>
# <details><summary>Hint 2</summary><code>reduce(x * x, "... d -> ... 1", "mean")</code> keeps an axis of size 1, so
# that the result divides <code>x</code> without any reshaping.</details>


# %%
def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x [... d], weight [d] -> [... d]: x divided by its root mean square over d, times weight."""
    ### BEGIN SOLUTION: divide x by the root of (the mean of its squares over the last axis + eps), then scale by weight
    mean_square = reduce(x * x, "... d -> ... 1", "mean")
    return weight * x * torch.rsqrt(mean_square + eps)
    ### END SOLUTION


# %%
check.rms_norm(rms_norm)

# %% [markdown] tags=["exercise"]
# ### Exercise 2 · SwiGLU
# ●○○ · 10 minutes
#
# Attention moves information between tokens; the feed-forward works on each token alone. It widens the vector from `d`
# to `f`, bends it, and narrows it again. In SwiGLU two matrices widen: `up` carries the content, `gate` says how much
# of it passes. The gate is bent by **silu**, $\mathrm{silu}(z) = z \cdot \mathrm{sigmoid}(z)$: near 0 for very negative
# `z`, near `z` for large ones.
#
# `gate` and `up` are `[f, d]`, `down` is `[d, f]`: the layout `[out, in]` of `nn.Linear.weight`.
#
# <details><summary>Hint 1</summary>Name the axes and the order of factors no longer matters:
# <code>einsum(x, gate, "... d, f d -> ... f")</code>.</details>
# <details><summary>Hint 2</summary><code>torch.nn.functional.silu</code>, on the gate's half only.</details>


# %%
def swiglu(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """x [... d], gate and up [f d], down [d f] -> [... d]: down (silu(gate x) * (up x))."""
    ### BEGIN SOLUTION: widen x by gate and by up, multiply silu of the first with the second, narrow by down
    opening = einsum(x, gate, "... d, f d -> ... f")
    carried = einsum(x, up, "... d, f d -> ... f")
    return einsum(torch.nn.functional.silu(opening) * carried, down, "... f, d f -> ... d")
    ### END SOLUTION


# %%
check.swiglu(swiglu)

# %% [markdown] tags=["exercise"]
# ### Exercise 3 · Causal attention
# ●●○ · 15 minutes
#
# The loops from above, for all rows and heads at once, in two einsums: queries `"b s h q"` with keys `"b t h q"` give
# scores `"b h s t"`; weights with values `"b t h v"` give the output `"b s h v"`. Between the two stand the scale
# $1/\sqrt{q}$, the mask (no key with `t > s`), and the softmax over `t`.
#
# Queries and keys have two letters for their positions, `s` and `t`, although both count the same tokens: with one
# letter, einsum would pair each token with itself only.
#
# <details><summary>Hint 1</summary><code>torch.ones(s, s, dtype=torch.bool).triu(1)</code> is true where the key comes
# after the query.</details>
# <details><summary>Hint 2</summary><code>scores.masked_fill(later, -torch.inf)</code>, and the softmax gives those
# places exactly 0.</details>


# %%
def causal_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """query, key [b s h q], value [b s h v] -> [b s h v]: softmax(query key / sqrt(q)) value, no token sees a later one."""
    ### BEGIN SOLUTION: scores by einsum, scaled; -inf where the key is later; softmax over the keys; values by einsum
    scores = einsum(query, key, "b s h q, b t h q -> b h s t") / math.sqrt(query.shape[-1])
    later = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    weights = scores.masked_fill(later, -torch.inf).softmax(dim=-1)
    return einsum(weights, value, "b h s t, b t h v -> b s h v")
    ### END SOLUTION


# %%
check.causal_attention(causal_attention)

# %% [markdown]
# Play with the pieces before you go on. The table is one head with random queries and keys for eight words. Widen the
# head without the scale, and each row puts all its weight on one word: dot products of `q` random numbers have a
# standard deviation of $\sqrt{q}$, and a softmax of large numbers is a maximum. Then try the masks that are wrong, and
# watch the sum.

# %%
from dsv3_mini.viz.widgets.transformer import mask_explorer, weights_by_mask

masks = mask_explorer()
masks

# %%
before = masks.picture.value
masks.set(mask="0, after the softmax", query=3)
assert masks.picture.value != before
scores = torch.tensor([[1.0, 1.0], [0.0, 0.0]])  # the first token has nothing before it: its weight is 1, on itself
for mask in masks.controls["mask"].options:
    first = weights_by_mask(scores, mask)[0]
    print(f"{mask:26} first token: {first[0]:.2f} on itself, {first[1]:.2f} on the future, sum {first.sum():.2f}")

# %% [markdown] tags=["exercise"]
# ### Exercise 4 · Cross-entropy from logits
# ●●○ · 12 minutes
#
# At every position the head gives `v` numbers, the **logits**, one for each token of the vocabulary. Their softmax is
# the probability of each token to come next. The loss is minus the logarithm of what the model gave to the token that
# really came, averaged over all positions that count. In nats: $\ln$, not $\log_2$.
#
# Two traps. A logit of 500 has an exponential that is infinite, so $\log p_i = z_i - \mathrm{logsumexp}(z)$ is never
# computed by way of `exp` alone. And where a row is padded its target is `IGNORED` (-100): such a place is no index,
# and it counts neither in the sum nor in the mean.
#
# <details><summary>Hint 1</summary><code>logits.log_softmax(dim=-1)</code> does the first trap's work.</details>
# <details><summary>Hint 2</summary>Keep the positions that count first: <code>kept = targets != IGNORED</code>, then
# <code>logits[kept]</code> is <code>[n, v]</code> and <code>targets[kept]</code> is <code>[n]</code>.</details>
# <details><summary>Hint 3</summary><code>.gather(-1, targets[kept][:, None])</code> picks one number from each
# row.</details>

# %%
from dsv3_mini.data.packing import IGNORED


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """logits [b s v], targets [b s] -> a number: mean of -ln p(target), in nats; targets of IGNORED are left out."""
    ### BEGIN SOLUTION: log-probabilities of the targets that are not IGNORED, their mean, the sign turned
    kept = targets != IGNORED
    log_p = logits[kept].log_softmax(dim=-1)
    return -log_p.gather(-1, targets[kept][:, None]).mean()
    ### END SOLUTION


# %%
check.cross_entropy(cross_entropy)

# %% [markdown] tags=["package"]
# ## The package's own
#
# Norm and SwiGLU in the package are yours, as modules. Two differences are about machines: `RMSNorm` computes in FP32
# even where the stream is BF16, and `SwiGLU` keeps gate and up in one matrix, so that `x` is read from memory once.

# %%
from dsv3_mini.model.feed_forward import SwiGLU
from dsv3_mini.model.feed_forward import swiglu as gated
from dsv3_mini.model.norm import RMSNorm

show_source(RMSNorm, gated, SwiGLU)


# %%
def package_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    norm = RMSNorm(len(weight), eps)
    norm.load_state_dict({"weight": weight})
    return norm(x)


def package_swiglu(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    return gated(x @ torch.cat([gate, up]).T) @ down.T


torch.manual_seed(0)
x = torch.randn(2, 5, 8)
same(rms_norm, package_norm, (x, torch.rand(8), 1e-6), (0.01 * x, torch.rand(8), 1e-3))
same(swiglu, package_swiglu, (x, torch.randn(12, 8), torch.randn(12, 8), torch.randn(8, 12)))

# %% [markdown]
# Attention goes through torch's fused kernel, which never writes the `[s, t]` table to memory, and the loss never holds
# all logits: it takes them in chunks of 512 tokens and forms their gradient while they are there. With the identity as
# head the states *are* the logits, so the two can be compared.

# %%
from dsv3_mini.model.attention import attention
from dsv3_mini.train import losses

query, key, value = (torch.randn(2, 7, 3, width) for width in (4, 4, 6))
targets = torch.tensor([[3, 0, 7, 1, 2], [5, 5, 6, IGNORED, IGNORED]])
same(causal_attention, lambda q, k, v: attention(q, k, v, scale=0.5, mask=None), (query, key, value))
same(cross_entropy, lambda z, y: losses.cross_entropy(z, torch.eye(z.shape[-1]), y), (4 * x, targets))

# %% [markdown]
# Put together they are a model. This is the baseline's block and what surrounds it, the whole of it; `DeepSeekV3` in
# `dsv3_mini/model/transformer.py` has the same outline with other parts. (`turn` is for lesson 05. Here each position
# has a learned vector that is added to the embedding: attention by itself does not know which key came first.)

# %%
from dsv3_mini.course.baseline import Baseline, BaselineBlock, MultiHeadAttention

show_source(MultiHeadAttention, BaselineBlock, Baseline.hidden_states, Baseline.loss)

# %%
torch.manual_seed(0)
model = Baseline(shape)
tokens = torch.randint(0, shape.vocab_size, (1, 16))
print("logits", list(model(tokens).shape))
for name, part in model.named_children():
    print(f"{name:16} {sum(p.numel() for p in part.parameters()):>8,} parameters")

# %% [markdown]
# ## A first training
#
# A training is a loop: loss, gradient, step. Written as a generator it hands out each step as it is taken, and whoever
# asks for the next one may draw a curve in between.

# %%
from dsv3_mini.course.baseline import train_steps

show_source(train_steps)

# %% [markdown]
# What should the first loss be? A model that knows nothing gives every token the same probability, and pays $\ln v$. A
# fresh model is slightly worse: its logits are random with a standard deviation near 1, and confident nonsense costs
# about half a nat more. A first loss that is far from this is the cheapest bug report there is.

# %%
from dsv3_mini.course.baseline import story_batches
from dsv3_mini.data.tokenizer import Tokenizer

tokenizer = Tokenizer.shipped()
tokens, targets = next(story_batches(tokenizer))
with torch.no_grad():
    first = model.loss(tokens, targets).item()
print(f"ln {shape.vocab_size:,} = {math.log(shape.vocab_size):.1f} nats; the first loss is {first:.1f}")
print("the first loss lies within one nat above it:", 0 < first - math.log(shape.vocab_size) < 1)

# %% [markdown]
# Press the button, or run the cell after the next, which presses it for you. A hundred steps of 1,024 tokens take about
# 20 seconds on one core. The pale line is how it went when this lesson was written; yours is drawn over it while it
# trains, and below stands what the model writes by then.

# %%
from dsv3_mini.course.baseline import held_out_loss, write
from dsv3_mini.viz.widgets.transformer import first_run

run = first_run(
    begin=lambda: train_steps(model, story_batches(tokenizer)),
    write=lambda: write(model, tokenizer, "One rainy morning, Nora", new_tokens=24),
    vocab_size=shape.vocab_size,
)
run

# %%
before = run.picture.value
run.train()
assert run.picture.value != before
losses_seen = run.losses["loss"]
print(f"{len(losses_seen)} steps, {len(losses_seen) * tokens.numel():,} tokens")
print("the last ten steps cost less than 3.5 nats a token:", sum(losses_seen[-10:]) / 10 < 3.5)
print("stories it never saw cost less than 3.5 nats too:", held_out_loss(model, tokenizer) < 3.5)

# %% [markdown]
# What does a loss mean? A loss of $x$ nats is what a model pays that gives the right token one chance in $e^x$.

# %%
for nats in (8.9, 3.0, 1.0):
    print(f"{nats} nats: one chance in {math.exp(nats):,.0f}")

# %% [markdown]
# Your model has learnt how a sentence goes and that names stand first. It has not learnt yet who was where: that takes
# more steps. Let it train on with the button, if you like, and see when the people in its stories keep their names.

# %% [markdown] tags=["experiment"]
# ## Experiment: without the stream
#
# Is the residual stream needed, or only tidy? Take the same net with the same first weights and the same batches, and
# let every part *replace* the stream by its output: `x = part(norm(x))`. The other half of the race is run already: it
# is your first training.
#
# **What we expect.** The net has as many parameters and can in principle compute as much. But what a token *is* must
# now survive four attentions, each of which averages over earlier tokens. In forty steps the plain net should have left
# it behind by a clear margin; if the two curves lie within half a nat, the stream is not worth its place in the picture
# above.

# %%
from dsv3_mini.course.baseline import NoResidualBlock
from dsv3_mini.viz.widgets.transformer import residual_race

show_source(NoResidualBlock)
torch.manual_seed(0)
first_weights = Baseline(shape).state_dict()
torch.manual_seed(0)
bare = Baseline(shape, NoResidualBlock)
same_start = all(torch.equal(first_weights[name], tensor) for name, tensor in bare.state_dict().items())
print("the same first weights:", same_start)

# %%
race = residual_race(
    with_stream=run.losses["loss"],
    begin=lambda: train_steps(bare, story_batches(tokenizer)),
    vocab_size=shape.vocab_size,
)
race

# %%
race.train()
without, with_stream = race.losses["without it"][35:40], run.losses["loss"][35:40]
gap = sum(without) / 5 - sum(with_stream) / 5
print("with the stream it is ahead by more than half a nat:", gap > 0.5)
assert gap > 0.5

# %% [markdown] tags=["interactive"]
# ## Why: what flows through a fresh net
#
# The race shows *that* the stream matters. This picture shows why, before any training: one batch through a net of
# random weights, forwards and back. Choose an arrangement and look at all three panels; the other two stay grey behind
# it.
#
# - Left: how large the states are. With the stream they grow slowly, since each part adds; hence the norms, and a final
#   norm.
# - Middle: how alike two tokens of a row are, as the cosine between their states. Each attention averages. Where
#   nothing is added back, all tokens become the same vector, and a net whose tokens are all alike cannot tell what
#   comes next.
# - Right: the gradient on its way back, from the last layer to the first. The stream hands it through. Where a norm
#   stands on the stream, or no stream is there, every layer multiplies it anew, and the early layers of a deep net get
#   steps of another size than the late ones.

# %%
from dsv3_mini.viz.widgets.transformer import ARRANGEMENTS, stream_explorer

streams = stream_explorer()
streams

# %%
from dsv3_mini.course.baseline import signal_by_layer

before = streams.picture.value
streams.set(arrangement="nothing added", layers=16)
assert streams.picture.value != before
alike = {}
for name, block in ARRANGEMENTS.items():
    torch.manual_seed(0)
    deep = Baseline(BaselineShape(vocab_size=64, layers=12), block)
    alike[name] = signal_by_layer(deep, tokens[:2] % 64, tokens[:2].roll(-1, 1) % 64).likeness[-1]
print("tokens most alike after 12 layers:", max(alike, key=alike.get))

# %% [markdown]
# ## Find the bug
#
# Somebody writes the block as below. It runs, its shapes are right, it even learns, and a deep net of it learns far too
# slowly. Two lines to look at, one idea that is broken.


# %%
def broken_block(x: Tensor, norm_1, attend, norm_2, feed) -> Tensor:
    x = norm_1(x)
    x = x + attend(x)
    x = norm_2(x)
    return x + feed(x)


silent, norm = torch.zeros_like, RMSNorm(4, 1e-6)
stream = torch.tensor([[[6.0, 8.0, 0.0, 0.0]]])
out = broken_block(stream, norm, silent, norm, silent)
print("into the block:", stream.flatten().tolist())
print("out of it, both parts silent:", [round(n, 1) for n in out.flatten().tolist()])

# %% [markdown] tags=["bug"]
# ### Find the bug · The stream that would not stay
# ●●○ · 10 minutes
#
# Attention and feed-forward both returned zeros, so the block had nothing to add, and still the stream came out
# another. Write the block as it should be. `norm_1`, `attend`, `norm_2` and `feed` are functions from `[b s d]` to `[b
# s d]`; the feed-forward reads what attention has added already.
#
# <details><summary>Hint 1</summary>Which lines assign to <code>x</code>? After each of them, is the old stream still in
# it?</details>
# <details><summary>Hint 2</summary>A norm belongs between the stream and the part that reads it, not on the
# stream.</details>


# %%
def block(x: Tensor, norm_1, attend, norm_2, feed) -> Tensor:
    """x [b s d] -> [b s d]: attend and feed each read x through their norm, and add to it."""
    ### BEGIN SOLUTION: add attend of the normed stream to the stream, then feed of the normed new stream
    x = x + attend(norm_1(x))
    return x + feed(norm_2(x))
    ### END SOLUTION


# %%
check.block(block)

# %% [markdown] tags=["at-671b"]
# ## At 671B
#
# The same four parts in the released model, from the ledger: where the parameters of one of its three dense layers are,
# and what attention would weigh there with plain heads of the same widths (128 heads, queries and keys of 192, values
# of 128).

# %%
from dsv3_mini import ModelConfig
from dsv3_mini.ledger import count_parameters

large = ModelConfig.preset("671b")
layer = count_parameters(large)
norms = sum(t.total for t in layer.dense_layer.tensors if t.kind == "norm")
d, heads = large.hidden_size, large.num_attention_heads
plain = d * heads * (2 * large.qk_head_dim + 2 * large.v_head_dim)
print(f"all norms of a layer   {norms:>12,}   {norms / layer.dense_layer.trainable:.4%}")
for name, part in (("attention (MLA)", layer.attention), ("SwiGLU", layer.dense_ffn)):
    print(f"{name:22} {part.trainable:>12,}   {part.trainable / layer.dense_layer.trainable:.0%}")
print(f"plain attention        {plain:>12,}   {plain / layer.attention.trainable:.1f} times MLA")
assert d * large.intermediate_size * 3 == layer.dense_ffn.trainable

# %% [markdown]
# Next the loss. Its logits would be the largest tensor of the whole step, which is why the package never holds them
# all.

# %%
context = 4096
logit_bytes = context * large.vocab_size * 4
print(f"a model that knows nothing pays ln {large.vocab_size:,} = {math.log(large.vocab_size):.2f} nats a token")
print(f"logits of one row of {context} tokens in FP32: {logit_bytes / 1e9:.1f} GB")
print(f"in chunks of {losses.CHUNK} tokens: {losses.CHUNK * large.vocab_size * 4 / 1e6:.0f} MB")
wide, met = large.intermediate_size // large.moe_intermediate_size, large.num_experts_per_tok
print(
    f"a dense layer's SwiGLU is {wide} experts wide; a token meets {met} of them, and a shared one, in a sparse layer"
)

# %% [markdown] tags=["recap"]
# ## Recap
#
# 1. A row of attention weights is masked *after* the softmax, with zeros. What is wrong, besides that the row sums to
#    less than 1?
#    <details><summary>Answer</summary>How much is missing depends on the scores of later tokens: the future still leaks
#    into the present, through the denominator of the softmax.</details>
# 2. Why does a part read the stream through a norm, and why is the norm not put on the stream itself?
#    <details><summary>Answer</summary>The stream grows as parts add to it, and a part should see inputs of one size.
#    Put on the stream, the norm would rescale at every layer what earlier layers wrote, and the gradient that goes
#    back.</details>
# 3. Your model's first loss on a vocabulary of 129,280 is 3 nats. Good news?
#    <details><summary>Answer</summary>No: it should be near 11.8. Something tells it the answer, as a target that was
#    not shifted, or a mask that lets it look ahead.</details>

# %% [markdown] tags=["next"]
# ## Next
#
# The baseline knows where a token stands by a learned vector for each position, so it has nothing to say about position
# 129 when it was built for 128. Lesson 05 turns queries and keys instead, so that attention sees distances, and then
# stretches that to 32 times the length. `Baseline(BaselineShape(rope_theta=10000.0))` is this model with that change.
