# ---
# jupyter:
#   jupytext:
#     text_representation:
#       format_name: percent
# ---

# %% [markdown]
# # 00 · The tour
#
# Beside this notebook lies a small DeepSeek-V3. It has every part of the large one (latent attention, a mixture of
# experts balanced without an auxiliary loss, multi-token prediction), it was trained on two cores, and it fits
# in 15 megabytes. In the next minutes you load it, let it write, and see where its words went on their way through.
#
# Nothing here needs to be understood yet. Every line you see is built, by you, in a later lesson.

# %%
# %matplotlib inline
import torch

import dsv3_mini as dsv3
from dsv3_mini.data.shipped import shipped
from dsv3_mini.data.tokenizer import Tokenizer

model = dsv3.from_pretrained(shipped("tiny")).eval()
tokenizer = Tokenizer.shipped()
print(f"{sum(p.numel() for p in model.parameters()):,} parameters")
print(f"{model.cfg.num_hidden_layers} layers, {model.cfg.n_routed_experts} experts in each sparse one")
print(f"{model.cfg.num_experts_per_tok} experts for each token")

# %% [markdown]
# ## Let it write
#
# The model reads tokens and gives, for each possible next token, a probability. We take the likeliest, append it, and
# ask again. A story ends with a question, and its answer, because the grammar that the model learnt from ends them so:
# that makes it possible to *judge* what it writes.

# %%
opening = "One rainy morning, Nora"
ids = torch.tensor([[tokenizer.eos_id, *tokenizer.encode(opening)]])
story = dsv3.generate(model, ids, max_new_tokens=180, stop_id=tokenizer.eos_id)
text = tokenizer.decode(i for i in story[0].tolist() if i != tokenizer.eos_id)
print(text)

# %% [markdown]
# Is that a story, by the rules of its language? The judge reads the text from scratch, replays what happened, and says. The
# model is young: it has read for less than forty minutes on one core. It knows how sentences go, and forgets who was in them.

# %%
from dsv3_mini.data.story_judge import judge_story
from dsv3_mini.evaluate.judged import well_formed_sentences

share, _ = well_formed_sentences([text])
print(f"well-formed sentences: {share:.0%}")
print("a well-formed story:", judge_story(text).well_formed)

# %% [markdown]
# Sums it has understood. It writes the steps, carries, and arrives. This one was held out: no text that it read
# contained it.

# %%
from dsv3_mini.data.sums import held_out_sum, is_right

problem = held_out_sum(400)
ids = torch.tensor([[tokenizer.eos_id, *tokenizer.encode(problem.prompt)]])
worked = dsv3.generate(model, ids, max_new_tokens=80, stop_id=tokenizer.eos_id)
answer = tokenizer.decode(i for i in worked[0, ids.shape[1] :].tolist() if i != tokenizer.eos_id)
print(problem.prompt + answer)
print("right:", is_right(problem, answer))

# %% [markdown]
# ## Where did the words go?
#
# In a sparse layer no token passes through the whole layer. A router scores all experts and sends the token to the best
# four, with a weight for each (its *gate value*). Below: the experts of one sentence, token by token. Thin lines
# part the four *groups* of experts; a token may visit two of them only. (On a cluster, a group lives on one machine.)

# %%
from dsv3_mini.viz.figures.routing import routing_figure

sentence = tokenizer.encode(text.split(". ")[1] + ".")
with torch.no_grad():
    routing = model(torch.tensor([sentence])).routing
layer = routing[1]
words = [tokenizer.decode([i]) for i in sentence]
routing_figure(words, layer.chosen[0], layer.gates[0], model.cfg.n_routed_experts, model.cfg.n_group, layer.layer)

# %% [markdown]
# ## Who works for whom?
#
# The model learnt from four kinds of text: stories, sums, Python code and English prose. Nobody told an expert what to
# care for. Count where the tokens of each kind went, and they turn out to have divided the work.

# %%
from dsv3_mini.data.stream import held_out_rows
from dsv3_mini.viz.figures.routing import load_figure

shares = {}
for domain in ("stories", "sums", "code", "prose"):
    rows = held_out_rows(domain, tokenizer, seq_len=256, rows=8).tokens
    with torch.no_grad():
        load = model(rows).routing[1].load.float()
    shares[domain] = load / load.mean()
load_figure(shares, routing[1].layer)

# %% [markdown]
# A row that is dark and light says: this kind of text has its favourites. Summed over all four rows the load is near
# even, so that no expert idles. Lesson 09 shows how: a bias for every expert, moved by a thousandth after each step.
#
# ## The same code, 100,000 times larger
#
# The class that you just ran is the released model's too. Built without memory for its numbers (on torch's *meta* device),
# the full configuration is there in a second, and can be counted.

# %%
with torch.device("meta"):
    large = dsv3.DeepSeekV3(dsv3.ModelConfig.preset("671b", num_nextn_predict_layers=0))
print(f"{sum(p.numel() for p in large.parameters()):,} parameters")

# %% [markdown]
# ## What is next
#
# Change `opening` above, and run on. Or ask it a sum: `opening = "58 + 27 = ?"`. On the command line,
# `dsv3 sample "After lunch,"` does the same, `dsv3 ledger --preset 671b` counts everything that can be counted, and
# `dsv3 train --preset tiny` trains the model that you have just used.
