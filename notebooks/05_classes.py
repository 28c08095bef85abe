# %% [markdown]
# # What explains a class, and which explanation to trust?
#
# A classifier says 'positive'. Which words made it say so? Many methods answer, and they disagree. This notebook asks
# one of them, Context-Aware Layer-wise Integrated Gradients (CA-LIG), looks at what it found on the way, puts others
# beside it, and then lets the classifier itself be the judge.

# %%
import lig_lens as ll
from lig_lens.plots import compare_relevance, deletion_curves, league, relevance_layers, relevance_text

model = ll.load_model("sentiment")  # MiniLM, trained on sentences of film reviews; right about 83 % of new ones
sentence = "The plot is thin, but the acting is superb and the ending is a delight."
found = ll.explain_class(model, sentence, target="positive", progress=False)
print(found)

# %%
relevance_text(found)

# %% [markdown]
# Red words raise the logit of 'positive', blue ones lower it. The scores add up: to what the logit has risen since all
# words were masked.

# %%
print(f"scores add up to {float(found.scores.sum()):.3f}, the logit changed by {found.value - found.reference:.3f}")
print("largest gap at any boundary between blocks:", f"{found.worst_gap():.1e}")

# %% [markdown]
# ## Layer by layer
#
# On the left relevance as it is followed back through the blocks, on the right what the vectors at each boundary
# contribute by themselves. Both add up to the same number in every row. On the right the words hold it up to the last
# block; behind that all is at [CLS], which is what the classifier reads.

# %%
relevance_layers(found)

# %% [markdown]
# ## Others beside it
#
# All methods go through the same function. Some know nothing of the class (`rollout`), some have no sign (`chefer`),
# and `random` is the floor that a method of use is above.

# %%
methods = ["ca_lig", "ig", "attn_lrp", "grad_x_input", "chefer", "rollout", "random"]
several = ll.explain_class(model, sentence, target="positive", method=methods, progress=False)
compare_relevance(several)

# %% [markdown]
# ## The classifier as the judge
#
# If the words that a method names are what the classifier looks at, then masking them should change its mind, and
# keeping nothing but them should not. `between` is the area between those two curves: chance gets 0.

# %%
sentences = [
    sentence,
    "A tired, joyless sequel that mistakes noise for excitement.",
    "It is a small film with a large heart, and it earns every tear.",
    "Nothing in the second half is as good as the first ten minutes.",
    "The jokes are old, the songs are worse, and it never seems to end.",
    "Quietly funny and beautifully shot, it stays with you for days.",
]
measured = ll.faithfulness(
    model, sentences, methods=methods, replacers=["mask"], measures=["comprehensiveness", "between"], progress=False
)
league(measured)

# %%
deletion_curves(measured)

# %% [markdown]
# `grad_x_input` does no better than `random`. Of those ahead six sentences say little: their bands overlap, and a
# method that is marked alone as best is so on these six. The [league](../docs/league.md) has 200 sentences, all
# methods, four ways of removing words, and intervals. It also says where CA-LIG loses.
#
# **Caveat.** What takes the place of a removed word is part of the question. A masked sentence is not one that the
# classifier was trained on, and what it says of it is not what it would say of a shorter one.
