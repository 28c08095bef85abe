"""The command `lig-lens league`."""

from typing import Any

import typer

from lig_lens.cli.configs import LeagueConfig
from lig_lens.cli.flags import with_flags
from lig_lens.cli.shared import Outputs, load, say


@with_flags(LeagueConfig)
def league(settings: LeagueConfig) -> None:
    """Measure how faithful methods are to a classifier: what it does without what they call relevant."""
    from lig_lens.files import write_atomic
    from lig_lens.relevance.faithfulness.data import inputs_of, lexicon_of
    from lig_lens.relevance.faithfulness.faithfulness import faithfulness

    prompts = inputs_of(settings.inputs, settings.split, settings.count, settings.seed)
    lexicon = None if settings.lexicon is None else lexicon_of(settings.lexicon)
    model: Any = load(settings)
    say(settings, f"{len(prompts)} inputs from {settings.inputs}")
    found = faithfulness(
        model,
        prompts,
        methods=settings.methods,
        replacers=settings.replacers,
        measures=settings.measures,
        fractions=settings.fractions,
        lexicon=lexicon,
        seed=settings.seed,
        baseline=settings.baseline,
        tol=settings.tol,
        max_nodes=settings.max_nodes,
        max_batch_tokens=settings.max_batch_tokens,
        progress=settings.progress,
    )
    text = found.to_markdown()
    with Outputs(settings) as outputs:
        outputs.write(settings.json_path, found.to_json)
        outputs.write(settings.markdown, lambda path: write_atomic(path, text.encode()))
        typer.echo(text)
