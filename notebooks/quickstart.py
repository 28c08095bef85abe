# ---
# jupyter:
#   jupytext:
#     text_representation:
#       format_name: percent
# ---

# %% [markdown]
# # Which token moves where, and through which head?
#
# MiniLM reads 'The cat sat because it was tired.' Where does 'it' get its content from? (Open this file as a notebook
# with jupytext, or run it as it is.)

# %%
import lig_lens as ll
from lig_lens.plots import head_grid

model = ll.load_model("minilm")
flow = ll.attribute(model, "The cat sat because it was tired.", maps="attn", progress=False)
flow

# %% [markdown]
# The strongest edges into 'it', over all layers and heads. The share is relative to everything that reaches this head
# at this token, so it can be compared between heads; the raw contribution is in the units of that head's output.

# %%
it = flow.tokens.index("it")
edges = [edge for edge in flow.top(2000) if edge.dst == it]
for edge in edges[:5]:
    print(
        f"layer {edge.layer} head {edge.head:2d}  {edge.src_token:>6} → it  {edge.contribution:+.2f}  {edge.share:.0%}"
    )

# %% [markdown]
# Before believing a number, look at its gap: how far the contributions are from adding up.

# %%
print(f"worst gap {float(flow.gap['attn'].max()):.1e}, converged everywhere: {bool(flow.converged['attn'].all())}")

# %% [markdown]
# And the heads of one layer at a glance. One caveat: under the `itb` baseline a token contributes nothing to itself by
# construction, so the diagonal is empty; `itb_map_ratio` or `zero` fill it.

# %%
figure = head_grid(flow, layers=[1])
figure
