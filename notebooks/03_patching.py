# %% [markdown]
# # Do contributions predict interventions?
#
# Activation patching puts one activation of the clean run into the corrupted run and measures what the metric does. It
# is exact and costs one run per activation. Here its results are compared with contributions, on the packaged induction
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
# Values are positive where the patched-in clean output raises the metric (patched - corrupted). Three cells matter
# most: L0H0 at the position after each of the two swapped words, and L1H2 at the end, with some help from L1H1 and
# L1H3.

# %%
columns = ["spearman", "pearson", "average_precision"]
ll.compare_table({"LIG": flow, **ll.scores(*prompts, on="heads_by_pos")}, heads)[columns].round(2)

# %%
agreement_scatter(flow, heads)

# %%
agreement_scatter(ll.scores(*prompts, on="heads_by_pos")["attribution_patching"], heads)

# %% [markdown]
# LIG lies nearly on a line (Pearson 1.00 in the table). Attribution patching is one gradient, taken in the corrupted
# run. It is right about layer 1 and far off for L0H0: 0 and less where the effects are 15 and 16. A gradient knows
# nothing of what happens on the way. All other places have effects near 0, and rank correlations, which count all
# places alike, are low for every score.
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
# Against messages of the corrupted run (second table), LIG by message comes first by Pearson and average precision.
# Against zeroed edges (first table), LIG has the highest Pearson but ranks poorly. Gradient times pattern ranks best
# there: it is the first-order value of exactly that intervention, taken in the clean run.
#
# What disagrees most?

# %%
for index, effect in zeroed.top(3):
    print(f"{zeroed.label(index):34} zeroed {effect:+6.2f}  by message {by_message.attn[index]:+6.2f}")
print()
for index, effect in patched.top(4):
    print(f"{patched.label(index):34} patched {effect:+6.2f}  by message {by_message.attn[index]:+6.2f}")

# %% [markdown]
# - Zeroing 'gold' → 'egg' in L0H0 changes the metric, but the edge contributes nothing: it is the same in both prompts,
#   so it carries nothing of their *difference*.
# - 'farm' → 'bell' contributes as much as 'egg' → 'leaf', but is not among the edges whose zeroing matters. In the
#   clean run the second layer does not look for what 'bell' holds. With the corrupted run's message put in there it
#   does, and that costs 12 of the metric.
#
# It depends on the counterfactual. If you ask what it takes to turn one prompt into the other, contributions and
# patching agree; if you ask what the clean run cannot do without, use knock-outs.
#
# ## A larger model
#
# These are heads of four layers of SmolLM2, on the indirect-object task of [02_circuits](02_circuits.ipynb):

# %%
model = ll.load_model("smollm2")  # with a network: ll.load_model("gpt2")
clean = "When Mary and John went to the store, John gave a drink to"
corrupted = "When Mary and John went to the store, Mary gave a drink to"
prompts = (model, clean, corrupted, ll.logit_difference(" Mary", " John"))
chosen = {"layers": [int(depth * model.cfg.n_layers) for depth in (0.57, 0.67, 0.77, 0.97)]}
flow = ll.attribute(model, clean, corrupted=corrupted, target=prompts[3], tol=1e-2, progress=False, **chosen)
heads = ll.patching.patch(*prompts, progress=False, **chosen)
ll.compare_table({"LIG": flow, **ll.scores(*prompts, on="heads_by_pos", **chosen)}, heads)[columns].round(2)

# %%
agreement_scatter(flow, heads)

# %% [markdown]
# LIG has the better Pearson correlation, attribution patching the better rank correlation: nearly all places have small
# effects, and for small effects one gradient is the right answer. The two scores differ on the few large ones.
#
# **Caveat.** This is one pair of prompts. `benchmarks/README.md` has the means over 24 pairs and all layers, with the
# same tendency.
