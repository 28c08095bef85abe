# %% [markdown]
# # Do contributions foretell interventions?
#
# Activation patching puts one activation of the clean run into the corrupted run and asks what the metric does. It is
# exact and costs a run for each activation. Here its results are laid beside contributions, on the packaged induction
# model and on SmolLM2. Where do they disagree, and why?

# %%
import lig_lens as ll
from lig_lens.plots import agreement_scatter, effects_map

model = ll.load_model("induction")
pair = ll.induction_pairs(1)[0]
metric = ll.logit_difference(pair.answer, pair.wrong)
prompts = (model, pair.clean, pair.corrupted, metric)

flow = ll.attribute(model, pair.clean, corrupted=pair.corrupted, target=metric, progress=False)
heads = ll.patching.patch(*prompts, progress=False)  # every head's output at every position
print(heads)

# %%
effects_map(heads)

# %% [markdown]
# Three cells matter most: head 0.0 behind each of the two swapped words, and head 1.2 at the end, with some help from
# 1.1 and 1.3.

# %%
columns = ["spearman", "pearson", "average_precision"]
ll.compare_table({"LIG": flow, **ll.scores(*prompts, on="heads_by_pos")}, heads)[columns].round(2)

# %%
agreement_scatter(flow, heads)

# %%
agreement_scatter(ll.scores(*prompts, on="heads_by_pos")["attribution_patching"], heads)

# %% [markdown]
# LIG lies nearly on a line (Pearson 1.00 in the table). Attribution patching is one gradient, taken in the corrupted
# run. It is right about layer 1 and far off for head 0.0: 0 and less where the effects are 15 and 16. A gradient
# knows nothing of what happens on the way. All other places have effects near 0, and rank correlations, which count
# them all alike, are low for every score.
#
# ## Edges
#
# For edges there are two interventions, and two ways to split contributions. `knock_out` takes the message of an edge
# away (nothing is sent from *i* to *j* through head *h*). With `corrupted=` it puts in the message of the other run.

# %%
zeroed = ll.patching.knock_out(model, pair.clean, metric, progress=False)
patched = ll.patching.knock_out(model, pair.clean, metric, corrupted=pair.corrupted, progress=False)
by_message = ll.attribute(model, pair.clean, corrupted=pair.corrupted, target=metric, split="message", progress=False)
scores = {"LIG by source": flow, "LIG by message": by_message, **ll.scores(*prompts)}
ll.compare_table(scores, zeroed)[columns].round(2)

# %%
ll.compare_table(scores, patched)[columns].round(2)

# %% [markdown]
# Against messages of the corrupted run (second table) LIG by message comes first by Pearson and average precision.
# Against zeroed edges (first table) LIG has the highest Pearson and ranks poorly. Gradient times pattern ranks best
# there: it is the first-order value of just that intervention, taken in the clean run.
#
# What disagrees most?

# %%
for index, effect in zeroed.top(3):
    print(f"{zeroed.label(index):34} zeroed {effect:+6.2f}  by message {by_message.attn[index]:+6.2f}")
print()
for index, effect in patched.top(4):
    print(f"{patched.label(index):34} patched {effect:+6.2f}  by message {by_message.attn[index]:+6.2f}")

# %% [markdown]
# - Zeroing 'gold' → 'egg' in head 0.0 changes the metric, and the edge contributes nothing: both prompts have it
#   alike, so it carries nothing of their *difference*.
# - 'farm' → 'bell' contributes as much as 'egg' → 'leaf', and is not among the edges whose zeroing matters. In the
#   clean run what stands at 'bell' is not looked for. Put in what the corrupted run sends there, and it is: 12 of the
#   metric.
#
# The counterfactual decides. Ask what it takes to turn one prompt into the other, and contributions and patching
# agree; ask what the clean run cannot do without, and take knock-outs.
#
# ## A larger model
#
# Heads of four layers of SmolLM2 on the indirect-object task of [02_circuits](02_circuits.ipynb):

# %%
model = ll.load_model("smollm2")  # with a network: ll.load_model("gpt2")
clean = "When Mary and John went to the store, John gave a drink to"
corrupted = "When Mary and John went to the store, Mary gave a drink to"
prompts = (model, clean, corrupted, ll.logit_difference(" Mary", " John"))
chosen = {"layers": [17, 20, 23, 29]}
flow = ll.attribute(model, clean, corrupted=corrupted, target=prompts[3], tol=1e-2, progress=False, **chosen)
heads = ll.patching.patch(*prompts, progress=False, **chosen)
ll.compare_table({"LIG": flow, **ll.scores(*prompts, on="heads_by_pos", **chosen)}, heads)[columns].round(2)

# %%
agreement_scatter(flow, heads)

# %% [markdown]
# LIG has the better Pearson correlation, attribution patching the better rank correlation: nearly all places have
# small effects, and for small effects one gradient is the right answer. The few large ones are where they part.
#
# **Caveat.** One pair of prompts. `benchmarks/README.md` has the means over 24 pairs and all layers, with the same
# tendency.
