# ---
# jupyter:
#   jupytext:
#     text_representation:
#       format_name: percent
#   dsv3:
#     title: Long context
#     minutes: 80
#     after: [05_rope]
#     builds: YaRN by hand, a needle-in-a-haystack test, a context four times as long
#     tracks: [term]
# ---

# %% [markdown] tags=["why"]
# # 17 · Long context
#
# DeepSeek-V3 read 14.8 trillion tokens in rows of 4,096, and it answers questions about texts of 128,000. What lies
# between is a training of 2,000 steps. It can be so short because most of the work is done by a formula that changes
# no weight at all.
#
# The formula is YaRN. It slows some of the hands of lesson 05, and leaves others alone. In this lesson you write it,
# see what each simpler way does to a trained model, and look for needles in haystacks with a tiny model that was
# trained on rows of 208 tokens and then reads 832.
#
# The picture shows the trouble. A bar is the part of the circle that the angle between a query and a key covers, for
# each pair of the tiny model's rotated dimensions. The fast pairs have been all around many times. The slow ones have
# seen a small piece, and a longer text takes them beyond it.

# %%
from dsv3_mini import ModelConfig
from dsv3_mini.course.long_context import FACTOR, TRAINED
from dsv3_mini.model.rope import frequencies
from dsv3_mini.viz.figures.long_context import angles_figure

tiny_cfg = ModelConfig.preset("tiny")
angles_figure(frequencies(tiny_cfg), TRAINED, FACTOR * TRAINED)

# %% [markdown] tags=["paper"]
# ## In the report
#
# Section 4.3. After pre-training, two phases of 1,000 steps each:
#
# | phase | tokens a row | rows a step | learning rate |
# |---|---|---|---|
# | pre-training | 4,096 | up to 15,360 | down to $7.3 \cdot 10^{-6}$ |
# | first | 32,768 | 1,920 | $7.3 \cdot 10^{-6}$ |
# | second | 131,072 | 480 | $7.3 \cdot 10^{-6}$ |
#
# YaRN is applied to the decoupled part alone, the shared key $k^R_t$ and the queries' rotated part: nothing else in MLA
# knows positions. Its settings are the same in both phases:
#
# $$s = 40 \qquad \alpha = 1 \qquad \beta = 32 \qquad \sqrt{t} = 0.1 \ln s + 1$$
#
# $s$ is the **factor**: how much longer the context shall be. $\alpha$ and $\beta$ are numbers of turns: a pair that made
# more than $\beta$ turns within the old context keeps its frequency, and one that made fewer than $\alpha$ is slowed by
# $s$. $t$ is a temperature: it makes attention sharper when there is more to look at. In a config file the three are
# called `factor`, `beta_slow` and `beta_fast`.

# %% [markdown] tags=["naive"]
# ## The naive way
#
# Do nothing, and read on: **extrapolation**. RoPE has an angle for every distance, so nothing crashes. Or tell the
# model that all tokens stand four times closer: **position interpolation**. No angle is then beyond those of training.
# Both are a line of code. Here are the angles of a query and a key that are 800 tokens apart, and of two neighbours,
# for the fastest pair and for a slow one:

# %%
import math

w = frequencies(tiny_cfg)
print("                        neighbours: pair 0, pair 5      800 apart: pair 5 (degrees)")
for name, speed in (("read on", 1.0), ("interpolated", 1 / FACTOR)):
    near_fast, near_slow, far_slow = (math.degrees(speed * angle) for angle in (w[0], w[5], 800 * w[5]))
    print(f"{name:22}  {near_fast:18.1f} {near_slow:7.2f} {far_slow:21.0f}")
print(f"the widest angle of pair 5 in training: {math.degrees((TRAINED - 1) * w[5]):.0f}")

# %% [markdown]
# Reading on takes the slow pair to angles it never saw. Interpolation keeps it at home, and spoils the fast pair: two
# neighbours stand at an angle of 14 degrees that in training meant nothing at all, a quarter of a token.
#
# Each exercise below has a check that says what is wrong; what you leave blank stays blank, and the rest runs without
# it.

# %%
import torch
from torch import Tensor

from dsv3_mini.course.checks import lesson_17 as check
from dsv3_mini.course.lesson import same, show_source

# %% [markdown] tags=["exercise"]
# ### Exercise 1 · How often round
# ●○○ · 5 minutes
#
# Which pairs are in trouble? Those that never came round. `w` `[pairs]` are frequencies in radians per position, and
# `context` is a number of tokens. Return how many turns each pair makes within the context, as real numbers `[pairs]`.
#
# <details><summary>Hint 1</summary>A whole turn has 2 pi radians.</details>


# %%
def turns_within(w: Tensor, context: int) -> Tensor:
    """w [pairs] in radians per position, context in tokens -> turns [pairs]."""
    ### BEGIN SOLUTION: the angle after `context` positions, in whole turns
    return context * w / (2 * math.pi)
    ### END SOLUTION


# %%
check.turns_within(turns_within)

# %% [markdown] tags=["exercise"]
# ### Exercise 2 · Where the ramp begins and ends
# ●●○ · 15 minutes
#
# YaRN treats three kinds of pairs differently, and pairs are numbered from fast to slow. So there are two borders, as
# numbers of pairs: up to `low` all stay as they are, from `high` on all are slowed, and between them runs a ramp.
#
# Pair $j$ of $r/2$ has the frequency $w_j = \theta^{-j/(r/2)}$. For which $j$, as a real number, does it turn exactly
# $k$ times within the `trained` tokens? Solve that for $j$. Then
#
# - `low` is the $j$ that turns `fast` times, rounded down, and at least 0;
# - `high` is the $j$ that turns `slow` times, rounded up, and at most `width - 1`, where `width` is $r$.
#
# (The last number looks like a slip: the last pair is $r/2 - 1$. It stands so in the released code, and frequencies that
# a model was trained with are part of the model.)
#
# <details><summary>Hint 1</summary>From exercise 1, k = trained * w_j / (2 pi). Put in w_j and take the logarithm of both
# sides.</details>
# <details><summary>Hint 2</summary>j = (r/2) ln(trained / (2 pi k)) / ln(theta). Python has <code>math.floor</code> and
# <code>math.ceil</code>.</details>


# %%
def ramp_ends(width: int, theta: float, trained: int, fast: float, slow: float) -> tuple[int, int]:
    """The pairs between which the ramp runs: low (turns `fast` times in `trained` tokens) and high (`slow` times)."""
    ### BEGIN SOLUTION: solve for the pair that turns k times; low down and at least 0, high up and at most width - 1

    def pair_that_turns(k: float) -> float:
        return width / 2 * math.log(trained / (2 * math.pi * k)) / math.log(theta)

    low, high = math.floor(pair_that_turns(fast)), math.ceil(pair_that_turns(slow))
    return max(low, 0), min(high, width - 1)
    ### END SOLUTION


# %%
check.ramp_ends(ramp_ends)

# %% [markdown] tags=["exercise"]
# ### Exercise 3 · YaRN's frequencies
# ●●○ · 12 minutes
#
# Now the frequencies themselves. Let $x_j$ be 0 up to pair `low`, 1 from pair `high` on, and between them in even steps.
# Then pair $j$ has the frequency $(1 - x_j)\, w_j + x_j\, w_j / s$. This is *NTK-by-parts*: neither reading on nor
# interpolation, but each where it does no harm.
#
# <details><summary>Hint 1</summary><code>(torch.arange(len(w)) - low) / (high - low)</code> is the ramp, if it ended
# nowhere.</details>
# <details><summary>Hint 2</summary><code>.clamp(0, 1)</code> gives it its ends.</details>


# %%
def yarn_frequencies(w: Tensor, low: int, high: int, factor: float) -> Tensor:
    """w [pairs] -> [pairs]: kept up to low, divided by factor from high on, mixed in even steps between."""
    ### BEGIN SOLUTION: a ramp from 0 at low to 1 at high, clamped; mix w and w / factor by it
    x = ((torch.arange(len(w)) - low) / (high - low)).clamp(0, 1)
    return (1 - x) * w + x * w / factor
    ### END SOLUTION


# %%
check.yarn_frequencies(yarn_frequencies)

# %% [markdown]
# What has become of the tiny model's eight pairs? The grey band is the ramp.

# %%
from dsv3_mini.model.rope import correction_range
from dsv3_mini.train.extend import extended_config
from dsv3_mini.viz.figures.long_context import stretch_figure

cfg = extended_config(tiny_cfg, FACTOR * TRAINED, TRAINED)
ways = {"as trained": w, "position interpolation": [one / FACTOR for one in w], "YaRN": frequencies(cfg)}
stretch_figure(ways, TRAINED, *correction_range(cfg, cfg.rope_scaling))

# %% [markdown] tags=["exercise"]
# ### Exercise 4 · Two factors
# ●●○ · 10 minutes
#
# The softmax of a longer row spreads over more keys. YaRN sharpens it with the temperature, and code has two places
# for that, which are easily mixed up. With $m(x) = 0.1\, x \ln s + 1$ and two settings of the config,
#
# - the turns (cosines and sines) are multiplied by $m(\texttt{mscale}) \,/\, m(\texttt{mscale\_all\_dim})$,
# - the softmax scale $1/\sqrt{n + r}$ is multiplied by $m(\texttt{mscale\_all\_dim})^2$.
#
# Squared, since queries and keys would each be longer by $m$, and their product by $m^2$. In the released model both
# settings are 1, so the first factor is 1 and the second does all. `width` is $n + r$. Return the turns' factor and the
# whole softmax scale.
#
# <details><summary>Hint 1</summary><code>math.log</code> is the natural logarithm. The second number you return is
# <code>width ** -0.5</code> times a square.</details>


# %%
def yarn_scales(width: int, factor: float, mscale: float, mscale_all_dim: float) -> tuple[float, float]:
    """width n + r, YaRN's factor s and its two settings -> (what turns are multiplied by, the softmax scale)."""
    ### BEGIN SOLUTION: m(x) = 0.1 x ln s + 1; the ratio of the two, and 1 / sqrt(width) times the square of the second
    on_turns, on_all = (0.1 * x * math.log(factor) + 1 for x in (mscale, mscale_all_dim))
    return on_turns / on_all, on_all**2 / math.sqrt(width)
    ### END SOLUTION


# %%
check.yarn_scales(yarn_scales)

# %% [markdown] tags=["package"]
# ## The package's own
#
# The same four, for a config. A model has to be told nothing: whether it stretches follows from its config, and
# `rotations` (lesson 05) asks `frequencies`.

# %%
from dsv3_mini.model import rope

show_source(rope.frequencies, rope.correction_range, rope.yarn_mscale, rope.rotation_scale, rope.softmax_scale)

# %%
released = ModelConfig.preset("671b")


def package_frequencies(w: Tensor, low: int, high: int, factor: float) -> Tensor:
    return torch.tensor(rope.frequencies(cfg if len(w) == 8 else released))


def package_scales(width: int, factor: float, mscale: float, mscale_all_dim: float) -> tuple[float, float]:
    chosen = cfg if width == 48 else released
    return rope.rotation_scale(chosen), rope.softmax_scale(chosen)


plain = torch.tensor(frequencies(released.replace(rope_scaling=None)))
same(yarn_frequencies, package_frequencies, (torch.tensor(w), 0, 4, 4.0), (plain, 10, 23, 40.0))
same(yarn_scales, package_scales, (48, 4.0, 1.0, 1.0), (192, 40.0, 1.0, 1.0))

# %% [markdown] tags=["experiment"]
# ## Experiment: needles in a haystack
#
# Does it work? A lower loss on long texts would not say, since most tokens can be guessed from the few before them.
# So we hide a **needle**: one of the grammar's stories, whole. Around it stands **haystack**, sentences that change
# nothing. At the end stands the story's question. `depth` 0 puts the needle first, `depth` 1 puts it right before the
# question. Only questions are asked that the tiny model answers when the story stands alone, so what an answer loses,
# it loses to the distance.

# %%
import dsv3_mini as dsv3
from dsv3_mini.course.long_context import recorded
from dsv3_mini.course.long_context import ways as ways_to_read
from dsv3_mini.data.long_stories import plot_of
from dsv3_mini.data.shipped import shipped
from dsv3_mini.data.tokenizer import Tokenizer
from dsv3_mini.evaluate.needle import hidden_in_hay, needle_grid, needles

tokenizer = Tokenizer.shipped()
tiny, extended = (dsv3.from_pretrained(shipped(name), mtp=False).eval() for name in ("tiny", "tiny-4x"))
stories = needles(tiny, tokenizer, 6)
text = hidden_in_hay(stories[0], 180, 0.5, tokenizer)
print(f"{text.before}\n\n  {plot_of(text.story)}\n\n{text.behind}\n")
print(f"Question: {text.story.question}\nAnswer: {text.story.answer}")

# %% [markdown]
# Four models read. *As trained* is the tiny model, which simply reads on; *position interpolation* stretches it without
# mercy; *YaRN, not trained* has your frequencies and the old weights; *YaRN, trained* went on from there, on twelve million
# tokens in rows of 832, in which such long stories were mixed with short texts of all kinds.
#
# **What we expect.** At 208 tokens, as long as its rows were, the tiny model finds needles; at 832 it finds none.
# Interpolation, with nothing trained after it, should fail everywhere: no angle between neighbours is as it was. YaRN
# without training should find some of the needles at both lengths, and more after it. If reading on finds needles at 832
# tokens, or the trained model misses half of them, this fails.

# %%
found = {}
print(f"{'needles found, of ' + str(2 * len(stories)):24} in 208 tokens   in 832 tokens")
for name, (model, read) in ways_to_read(tiny, extended).items():
    grid = needle_grid(model, tokenizer, stories, [TRAINED, FACTOR * TRAINED], [0.0, 0.5], read)
    found[name] = [sum(row) for row in grid.right]
    print(f"{name:24} {found[name][0]:13} {found[name][1]:15}")

# %%
asked = 2 * len(stories)
print("reading on finds nothing at four times the length:", found["as trained"][1] == 0)
print("interpolation alone finds nothing at any:", sum(found["position interpolation"]) == 0)
print("YaRN finds some before it is trained:", min(found["YaRN, not trained"]) > 0)
print("and most after:", min(found["YaRN, trained"]) > 0.5 * asked)
assert found["as trained"][1] == 0 and min(found["YaRN, not trained"]) > 0
assert min(found["YaRN, trained"]) > 0.5 * asked and found["YaRN, trained"][1] > found["YaRN, not trained"][1]

# %% [markdown]
# A dozen questions are few. These are the whole maps, 30 stories in each field, as
# `python -m dsv3_mini.course.long_context` measured them:

# %%
from dsv3_mini.viz.figures.long_context import needle_figure

measured = recorded()
needle_figure(measured["needles"], measured["trained"])

# %% [markdown]
# Look at the upper left map first. Even within its 208 tokens the tiny model is weak at depth 0: its rows held
# several stories each, so hardly any question had ever reached back over a whole row. *What it was trained on* is
# shorter than its rows. And what did the training cost at the old length?

# %%
losses = measured["old_length_loss"]
before, untrained, after = (losses[name] for name in ("as trained", "YaRN, not trained", "YaRN, trained"))
print("nats per token in rows of 208       before   stretched   trained")
for domain in before:
    change = after[domain] / before[domain] - 1
    print(f"{domain:32} {before[domain]:9.3f} {untrained[domain]:11.3f} {after[domain]:9.3f}   {change:+.1%}")
target = [measured["needles"]["YaRN, trained"].share(832, depth) for depth in (0.0, 0.25, 0.5, 0.75, 1.0)]
print("needles at 832 tokens, by depth:", "  ".join(f"{share:.1%}" for share in target))

# %% [markdown]
# Stretching alone costs most on sums, where an answer hangs on which digit stands at which place. Training brings
# that back. The aim of this phase was 95% of the needles at every depth, for less than 1% at the old length: it got both.
# It took nearly as many tokens as pre-training had. The report's phases are each 0.4% of its pre-training, but 63
# billion tokens, at the rate that pre-training ended with. Here the rate had to be high to get anywhere, and a high rate
# forgets: what stories lost they had to learn again while it fell (try `--tokens 2000000`: the fall comes too soon).
#
# And length is learnt from texts that *have* it. In a first version of the long stories hardly a question reached over
# more than 650 tokens, and the needles further back were those that the model lost.
#
# One thing is not as the formula promises. Is the temperature any good here? Take the untrained stretched model with
# and without it:

# %%
import dataclasses

from dsv3_mini.data.stream import held_out_rows
from dsv3_mini.evaluate.bits_per_byte import held_out_loss
from dsv3_mini.train.extend import with_config

rows = held_out_rows("stories", tokenizer, TRAINED, rows=8).tokens
for name, value in (("with the temperature", 1.0), ("without", 0.0)):
    scaling = dataclasses.replace(cfg.rope_scaling, mscale=value or 1e-9, mscale_all_dim=value)
    stretched = with_config(tiny, cfg.replace(rope_scaling=scaling))
    print(f"{name:22} {held_out_loss(stretched, rows, tokenizer.pad_id).per_token:.2f} nats per token")

# %% [markdown]
# Hardly any difference, and not in its favour. YaRN's 0.1 was fitted to large models that read thousands of tokens; one
# of 208, whose heads look for a name or two, has no use for it. We keep it, as training adapts to either, and
# a config with the usual settings is read by other programs.
#
# ## Two phases
#
# Why does the report go to 32K first and to 128K after? A row of 128K costs four times as much attention for each
# token as one of 32K, and is one sample of how far things lie apart where four would fit. So most of what the
# stretched angles need is learnt where rows are cheap. The factor is 40 in both phases, so the second begins with
# frequencies that the first has learnt.
#
# The tiny model does the first phase with a factor of 4, which is what it needs, and no more. A factor of 16 from the
# beginning, as the report would do for both phases, makes every pair from number 4 on 16 times slower, and with eight
# pairs that is half of them. You can see it in the explorer. The second phase then goes on with 16, to rows of 3,328.

# %%
from dsv3_mini.train.recipe import Recipe

for name in ("tiny", "tiny-4x", "tiny-16x", "deepseek-v3", "deepseek-v3-32k", "deepseek-v3-128k"):
    recipe = Recipe.preset(name)
    print(f"{name:18} {recipe.total_tokens:19,} tokens in rows of {recipe.context(0):9,.0f}", end="")
    print(f", last rate {recipe.learning_rate(recipe.total_tokens):.1e}")

# %% [markdown]
# `dsv3 train --extend data/tiny --recipe tiny-4x --out runs/tiny-4x` is the first phase: the weights of a model
# folder, YaRN from the rows that it was trained on to the recipe's, a warm-up (Adam's averages begin anew), and a rate
# that starts above the last one of pre-training, because here are twelve million tokens and not 63 billion. The second is
# `dsv3 train --extend runs/tiny-4x --recipe tiny-16x --out runs/tiny-16x`. Left below is the first phase's model, which reads
# on beyond its 832 tokens, right the second's.

# %%
needle_figure(measured["phases"], 4 * TRAINED)

# %% [markdown] tags=["interactive"]
# ## The stretch explorer
#
# Each pair has a mark for its speed after stretching, as a share of its speed in training. Below it stands how often it
# turned within the trained context. Try three things. Set the factor to 40: which pairs notice? Let *kept from* go down
# to 2: what does the ramp do? And take the released model with 4,096 tokens: how many of its 32 pairs never came round?

# %%
from dsv3_mini.viz.widgets.long_context import stretch_explorer

explorer = stretch_explorer()
explorer

# %%
before = explorer.picture.value
explorer.set(factor=40)
assert explorer.picture.value != before
before = explorer.picture.value
explorer.set(width=64, trained=4_096)
assert explorer.picture.value != before
never = sum(4_096 * one < 2 * math.pi for one in plain.tolist())
print(f"{never} of the released model's {len(plain)} pairs never came round within 4,096 tokens")

# %% [markdown]
# ## Find the bug
#
# Somebody reads that YaRN is for long texts, and so leaves short ones alone. It looks like the best of both: up to
# the trained length, the model is exactly what it was. The test, on a long text and on a short one, passes.


# %%
def turns_with_a_bug(positions: Tensor, plain: Tensor, stretched: Tensor, trained: int, longest: int) -> Tensor:
    """Turns [s pairs] of tokens that stand at `positions` [s]."""
    w = stretched if positions.max() >= trained else plain
    return torch.exp(1j * positions[:, None] * w)


pairs, slow = torch.tensor(w), torch.tensor(frequencies(cfg))
# A decoder reads 200 tokens, keeps their turned keys, and reads 50 more.
first = turns_with_a_bug(torch.arange(200), pairs, slow, TRAINED, 832)
rest = turns_with_a_bug(torch.arange(200, 250), pairs, slow, TRAINED, 832)
whole = turns_with_a_bug(torch.arange(250), pairs, slow, TRAINED, 832)
# One key, 50 tokens before one query; both vectors are all ones.
for name, turn in (("read at once", whole), ("kept, then read on", torch.cat([first, rest]))):
    print(f"{name:20} score {(turn[240] * turn[190].conj()).real.sum():.2f}")

# %% [markdown] tags=["bug"]
# ### Find the bug · Long enough to stretch?
# ●○○ · 8 minutes
#
# The same query and the same key, and another score. Write it so that it is right: `positions` `[s]` are those of the
# tokens that are read now; `plain` and `stretched` `[pairs]` are the frequencies to choose from; `trained` is the
# original context, and `longest` is the longest text that the model is configured for. Return complex turns
# `[s pairs]`.
#
# <details><summary>Hint 1</summary>What has been kept was turned when the text was short. Which of the arguments stay
# the same for all of a text, and for all texts?</details>
# <details><summary>Hint 2</summary>The released code asks whether the <i>configured</i> maximum is longer than the
# original context.</details>


# %%
def turns_for(positions: Tensor, plain: Tensor, stretched: Tensor, trained: int, longest: int) -> Tensor:
    """positions [s], plain and stretched [pairs] -> complex turns [s pairs], fit for keys that are kept."""
    ### BEGIN SOLUTION: choose by what the model is configured for, never by what is read now
    w = stretched if longest > trained else plain
    return torch.exp(1j * positions[:, None] * w)
    ### END SOLUTION


# %%
check.turns_for(turns_for)

# %% [markdown]
# The price is real: a stretched model is a little different on short texts, too. That is what the table of losses
# above is about, and why short texts are in the mixture.

# %% [markdown] tags=["at-671b"]
# ## At 671B

# %%
scaling = released.rope_scaling
low, high = rope.correction_range(released, scaling)
speed = torch.tensor(frequencies(released)) / plain
kept, slowed = int((speed > 1 - 1e-6).sum()), int((speed < 1 / scaling.factor + 1e-6).sum())
print(
    f"ramp from pair {low} to pair {high}: {kept} pairs as they were, {slowed} slowed {scaling.factor:.0f} times, "
    f"{len(speed) - kept - slowed} between"
)

# %%
sqrt_t = rope.yarn_mscale(scaling.factor, scaling.mscale_all_dim)
print(
    f"temperature: {sqrt_t:.5f}, squared {sqrt_t**2:.5f} on the softmax scale; on the turns "
    f"{rope.rotation_scale(released):g}"
)
print(
    f"configured for {released.max_position_embeddings:,} tokens, {scaling.factor:.0f} times "
    f"{scaling.original_max_position_embeddings:,}"
)

# %% [markdown]
# What does it cost? The report bills 119 thousand GPU hours for both phases, beside 2,664 thousand for pre-training.
# The tokens are few, and each one has more to look at:

# %%
from dsv3_mini.ledger import flops_per_token

total = Recipe.preset("deepseek-v3").total_tokens
for name in ("deepseek-v3", "deepseek-v3-32k", "deepseek-v3-128k"):
    recipe = Recipe.preset(name)
    row = round(recipe.context(0))
    flops = flops_per_token(released, row).train
    print(
        f"{name:18} {recipe.total_tokens / 1e9:6,.0f}B tokens ({recipe.total_tokens / total:.2%}), "
        f"{flops / 1e9:,.0f} GFLOP each"
    )
bytes_a_token = 2 * released.num_hidden_layers * (released.kv_lora_rank + released.qk_rope_head_dim)
print(f"latent cache of one text of 131,072 tokens in BF16: {131_072 * bytes_a_token / 1e9:.1f} GB")

# %% [markdown] tags=["recap"]
# ## Recap
#
# 1. Position interpolation takes no pair to an angle that it never saw. Why does a model fail with it all the same?
#    <details><summary>Answer</summary>The fast pairs tell neighbours apart, by angles that are now four times smaller:
#    every short distance looks like another one. All angles were seen, and none means what it meant.</details>
# 2. Why is the ramp given by turns within the trained context, and not by numbers of pairs?
#    <details><summary>Answer</summary>What harms a pair is to meet angles that it did not meet in training. Whether it
#    will depends on how much of the circle it saw, so on its wavelength against that context. The same pair number
#    means something else with another theta, width or length.</details>
# 3. A colleague finds that the stretched model is slightly worse on short texts, and turns YaRN off for those. What
#    breaks?
#    <details><summary>Answer</summary>Texts that begin short and become long: keys that were kept have turns of one kind,
#    later queries of the other. And the weights were trained with the stretched frequencies: plain ones are wrong for
#    them now, at any length.</details>

# %% [markdown] tags=["next"]
# ## Next
#
# This was the last part of training on one machine. Lesson 18 begins with many: what processes say to each other, and
# what it costs. What long contexts do to the cache stands in lesson 07, and to a server in lesson 23.
