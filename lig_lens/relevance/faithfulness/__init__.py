"""Which explanations to trust: what a model does when positions are removed, and what scores foretold. Loads no torch.

What takes a removed position's place, a measure, or a set of inputs is a class or a function and a line below.
"""

from lig_lens.registry import Entry, Registry

TEXT_REPLACERS = Registry(
    "replacer",
    mask=Entry("lig_lens.relevance.faithfulness.replacers:Token"),
    unk=Entry("lig_lens.relevance.faithfulness.replacers:Token"),
    pad=Entry("lig_lens.relevance.faithfulness.replacers:Token"),
    mean=Entry("lig_lens.relevance.faithfulness.replacers:MeanEmbedding"),
    dropped=Entry("lig_lens.relevance.faithfulness.replacers:Dropped"),
)
IMAGE_REPLACERS = Registry(
    "replacer",
    mean=Entry("lig_lens.relevance.faithfulness.patch_replacers:Filled"),
    zero_pixels=Entry("lig_lens.relevance.faithfulness.patch_replacers:Filled"),
    black=Entry("lig_lens.relevance.faithfulness.patch_replacers:Filled"),
    blurred=Entry("lig_lens.relevance.faithfulness.patch_replacers:Filled"),
)
MEASURES = Registry(
    "measure",
    comprehensiveness=Entry("lig_lens.relevance.faithfulness.curves:Comprehensiveness"),
    sufficiency=Entry("lig_lens.relevance.faithfulness.curves:Sufficiency"),
    aopc=Entry("lig_lens.relevance.faithfulness.curves:Aopc"),
    log_odds=Entry("lig_lens.relevance.faithfulness.curves:LogOdds"),
    deletion=Entry("lig_lens.relevance.faithfulness.curves:Deletion"),
    insertion=Entry("lig_lens.relevance.faithfulness.curves:Insertion"),
    between=Entry("lig_lens.relevance.faithfulness.curves:Between"),
    leave_one_out=Entry("lig_lens.relevance.faithfulness.games:LeaveOneOut"),
    shapley=Entry("lig_lens.relevance.faithfulness.games:Shapley"),
    lexicon_sign=Entry("lig_lens.relevance.faithfulness.lexicon:LexiconSign"),
    lexicon_rank=Entry("lig_lens.relevance.faithfulness.lexicon:LexiconRank"),
    randomization=Entry("lig_lens.relevance.faithfulness.reruns:Randomization"),
    runtime=Entry("lig_lens.relevance.faithfulness.reruns:Runtime"),
)
"""Of those with a correlation there are two by a parameter: `leave_one_out by=pearson`."""
DATA = Registry(
    "set of inputs",
    movie_sentences=Entry("lig_lens.relevance.faithfulness.data:movie_sentences"),
    digit_images=Entry("lig_lens.relevance.faithfulness.data:digit_images"),
)
"""Functions that give pairs, of which the first is a prompt, for the name of a split."""
LEXICONS = Registry("lexicon", sentiment=Entry("lig_lens.relevance.faithfulness.data:sentiment_lexicon"))
"""Functions that give the valence of words."""
