"""The command `lig-lens classify`."""

import typer

from lig_lens.cli.configs import ClassifyConfig
from lig_lens.cli.flags import with_flags
from lig_lens.cli.shared import Outputs, load, opened, say, terminal_width


@with_flags(ClassifyConfig)
def classify(settings: ClassifyConfig) -> None:
    """Explain what the tokens of TEXT do to a class of a classifier: print their scores, write what is asked for."""
    settings.check_prompt()
    # Before the model is loaded, since a file may be unreadable.
    prompt, corrupted = settings.text, settings.corrupted
    if settings.image is not None:
        prompt = opened("--image", settings.image)
        corrupted = None if corrupted is None else opened("--corrupted", corrupted)
    from lig_lens.relevance.explain import explain_class
    from lig_lens.show.summary import relevance_table

    model = load(settings)
    found = explain_class(model, prompt, **{**settings.explain_arguments(), "corrupted": corrupted})
    first = found[0] if isinstance(found, list) else found
    # Written before anything is printed, so that a closed pipe costs no result.
    with Outputs(settings) as outputs:
        outputs.write(settings.out, first.save)
        outputs.write(settings.json_path, first.to_json)
        if settings.html is not None:
            say(settings, "writing the page")
            from lig_lens.show.explorer import write_explorer

            outputs.write(settings.html, lambda path: write_explorer(found, path, title=f"lig_lens: {settings.title}"))
        typer.echo(relevance_table(found, settings.top, terminal_width()))
