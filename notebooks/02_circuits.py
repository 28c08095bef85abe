# %% [markdown]
# # Which heads make the prediction?
#
# We start with a model whose circuit is known, then turn to one whose circuit has to be found. The question is put by a
# *metric*: a number computed from the logits. Contributions are then in its units, and add up to its change at every
# layer.

# %%
import lig_lens as ll
from lig_lens.plots import effects_map, head_grid, importance

model = ll.load_model("induction")  # two layers, packaged
pair = ll.induction_pairs(1)[0]
print("clean    ", pair.clean, "→", pair.answer)
print("corrupted", pair.corrupted, "→", pair.wrong)

# %% [markdown]
# ## Induction
#
# In the clean prompt 'egg leaf' came before, so 'egg' should be followed by 'leaf'. In the corrupted prompt 'egg' and
# 'farm' are swapped, so that 'egg' should be followed by 'bell'. The metric is the difference of the two logits.

# %%
metric = ll.logit_difference(pair.answer, pair.wrong)
flow = ll.attribute(model, pair.clean, corrupted=pair.corrupted, target=metric, progress=False)
clean, corrupted = flow.settings["metric"]["clean"], flow.settings["metric"]["corrupted"]
print(f"f(clean) {clean:+.2f}, f(corrupted) {corrupted:+.2f}, difference {clean - corrupted:.2f}")
for row, layer in enumerate(flow.layers):
    print(f"layer {layer}: heads {flow.attn[row].sum():+.2f}, skip {flow.skip[row].sum():+.2f}")

# %% [markdown]
# Both layers explain all of the difference: the second layer works with what the first one has put there. Hardly
# anything bypasses the heads in either layer.

# %%
importance(flow)

# %% [markdown]
# Layer 0 is L0H0 alone. In layer 1, L1H2 carries most, and the three others carry some of it. What do they move?

# %%
for edge in flow.top(4):
    print(
        f"L{edge.layer}H{edge.head}: {edge.src_token} ({edge.src}) → {edge.dst_token} ({edge.dst}) "
        f"{edge.contribution:+.1f}"
    )
print("planted:", pair.edges)

# %%
head_grid(flow)

# %% [markdown]
# L0H0 carries each of the two swapped words to the next position: to 'bell' and to 'leaf'. L1H2 carries what is now
# held there to the last position. These are the four edges that the task was built on. The other heads of layer 1 help
# a little on the same two edges; nothing else is visible.
#
# Is it true? Take each head's output away by replacing it with its mean over other prompts:

# %%
others = [other.clean for other in ll.induction_pairs(12, seed=1)]
effects_map(ll.patching.ablate(model, pair.clean, metric, others, progress=False))

# %% [markdown]
# Values are positive where what is left in raises the metric (clean - ablated). Ablating L0H0 or L1H2 costs more than
# 12 of the metric each, the other heads less than 1. Contributions and ablations agree on the circuit, but not on every
# number: L1H1 and L1H3 contribute more than 3 each and cost 0.6. Contributions divide up the whole way from the
# corrupted prompt to the clean one. Ablation asks what the clean prompt loses. [03_patching](03_patching.ipynb) goes
# into that.
#
# ## Indirect objects
#
# SmolLM2, with 30 layers, completes 'When Mary and John went to the store, John gave a drink to' with ' Mary'. In the
# corrupted prompt it is Mary who gives. Every third layer is enough for a first look. (With another model, the layer
# numbers below will differ.)

# %%
model = ll.load_model("smollm2")  # with a network: ll.load_model("gpt2")
clean = "When Mary and John went to the store, John gave a drink to"
corrupted = "When Mary and John went to the store, Mary gave a drink to"
metric = ll.logit_difference(" Mary", " John")
flow = ll.attribute(
    model, clean, corrupted=corrupted, target=metric, layers=range(2, model.cfg.n_layers, 3), tol=1e-2, progress=False
)
importance(flow)

# %% [markdown]
# Every row adds up to 10.3, the change of the metric. Up to layer 14 nearly all of it bypasses the heads; at layer 23
# hardly anything does. Blue heads work against the answer. *Where* does it bypass them?

# %%
for row, layer in enumerate(flow.layers):
    at = int(flow.skip[row].abs().argmax())
    print(f"layer {layer:2d}: {float(flow.skip[row, at]):6.2f} bypasses the heads at {flow.tokens[at]!r} ({at})")

# %% [markdown]
# Up to layer 14 it is in the vector of the second name (10). Between layers 17 and 23 heads carry it to the last
# position (14), where it stays. Which heads?

# %%
strongest = flow.top(6)
for edge in strongest:
    print(
        f"L{edge.layer}H{edge.head}: {edge.src_token!r} ({edge.src}) → {edge.dst_token!r} ({edge.dst}) "
        f"{edge.contribution:+.2f}"
    )

# %%
layers, heads = (sorted({getattr(edge, name) for edge in strongest}) for name in ("layer", "head"))
names = [at for at, token in enumerate(flow.tokens) if token.strip() in ("Mary", "John")]
head_grid(flow, layers=layers, heads=heads, tokens=[*names, -1])

# %% [markdown]
# Four positions are drawn: the first two names, the second 'John' and the last 'to'.
#
# 1. L17H4 acts at the second name, along the edge from that position to itself.
# 2. L20H0 and L23H3 carry the second name to the last position.
# 3. L23H0 acts at the last position, mostly along the edge from that position to itself; so do L29H1 and L29H0 in the
#    list above.
#
# By default an edge says what moves *because its source token moves*, and a token that moves takes its own query along.
# What the head then reads is another question. Split by message instead:

# %%
by_message = ll.attribute(
    model, clean, corrupted=corrupted, target=metric, layers=layers, tol=1e-2, split="message", progress=False
)
for edge in strongest:
    if edge.src == edge.dst:
        column = by_message.attn[by_message.layers.index(edge.layer), edge.head, :, edge.dst]
        read = column.abs().topk(2).indices.tolist()
        print(
            f"L{edge.layer}H{edge.head} at {edge.dst_token!r} reads:",
            ", ".join(f"{flow.tokens[i]!r} ({i}) {column[i]:+.2f}" for i in read),
        )

# %% [markdown]
# L17H4 is an induction head: at the second name it reads the word *after* that name's first mention, which is ' went'
# for John and ' and' for Mary. L23H0, at the last position, reads the two names themselves, as name movers do. L29H1
# and L29H0 read the last position itself, where the name has arrived by then.
#
# **Caveat.** A contribution is relative to the corrupted prompt. What both prompts have in common (that a name is due
# at all, say) contributes nothing here, however much the prediction needs it.
