"""Settings are said once: signature, flags, config files and checks have what the model says."""

import importlib
import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pytest
import typer
from pydantic import Field
from typer.main import get_command

from lig_lens.cli.configs import (
    CircuitConfig,
    ClassifyConfig,
    ExplainConfig,
    RunConfig,
    load_config,
    merge_settings,
    parse_settings,
)
from lig_lens.cli.flags import with_flags
from lig_lens.cli.main import app
from lig_lens.errors import InputError
from lig_lens.fields import FEWEST_NODES, Flag, PositiveInt, Section, fields_of, flag_of, help_of
from lig_lens.integrate.rules import NODES_PER_PANEL
from lig_lens.paths import BASELINES, BaselineEntry
from lig_lens.settings import DEFAULTS, EXPLANATION, Explanation, Settings

COMMANDS: dict[str, type[RunConfig]] = {
    "explain": ExplainConfig,
    "classify": ClassifyConfig,
    "patch": CircuitConfig,
    "compare": CircuitConfig,
}


class AMetric:
    """Stands for a metric of the logits."""

    per_metric = True
    name = "a_metric"


@pytest.fixture
def mine() -> Iterator[None]:
    """A baseline of one's own, which starts from the second prompt, and one that does not."""
    BASELINES.add("mine", BaselineEntry(object(), maps=("attn",)))
    BASELINES.add("other_mine", BaselineEntry(object(), maps=("attn",), shared=True, second_prompt=True))
    yield
    BASELINES.remove("mine")
    BASELINES.remove("other_mine")


def refused(**asked: Any) -> str:
    with pytest.raises(InputError) as caught:
        Settings.of(**asked)
    return str(caught.value)


def test_the_signature_is_the_model() -> None:
    parameters = inspect.signature(importlib.import_module("lig_lens.attribution").attribute).parameters
    asked = {name: one.default for name, one in parameters.items() if one.kind is one.KEYWORD_ONLY}
    assert asked == {name: field.default for name, field in Settings.model_fields.items()}
    assert all(getattr(DEFAULTS, name) == value for name, value in asked.items())


def test_the_signature_of_explain_class_is_the_model() -> None:
    parameters = inspect.signature(importlib.import_module("lig_lens.relevance.explain").explain_class).parameters
    asked = {name: parameters[name].default for name in Explanation.model_fields}
    assert asked == {name: field.default for name, field in Explanation.model_fields.items()}
    assert all(getattr(EXPLANATION, name) == value for name, value in asked.items())
    assert ClassifyConfig().method == (parameters["method"].default,)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_setting_has_a_flag_and_a_key(command: str, tmp_path: Path) -> None:
    kind = COMMANDS[command]
    parameters = {one.name: one for one in get_command(app).commands[command].params}  # type: ignore[attr-defined]
    # A file may serve both commands on circuits; `patch` has no flag for what it would not use.
    fields = {key: field for key, field in fields_of(kind).items() if command != "patch" or key not in ("tol", "edges")}
    assert set(parameters) == {*fields, "config"}
    for key, field in fields.items():
        assert help_of(field) and parameters[key].help == help_of(field), key
        if flag_of(field).argument is None:
            assert f"--{key.replace('_', '-')}" in parameters[key].opts
        path = tmp_path / "x.yaml"
        value = field.default if field.default is not None else merge_settings(ExplainConfig).model_dump().get(key)
        shown = list(value) if isinstance(value, tuple) else value
        path.write_text(f"{key}: {'null' if shown is None else str(shown).lower()}\n")
        assert load_config(path, kind) == {key: value}


def test_a_field_is_all_it_takes(tmp_path: Path) -> None:
    class Mine(ExplainConfig):
        depth: Annotated[PositiveInt, Flag(Section.ACCURACY)] = Field(2, description="How deep.")

    seen: list[int] = []
    line = typer.Typer()

    @line.command()
    @with_flags(Mine)
    def explain(settings: Mine) -> None:
        """Explain."""
        seen.append(settings.depth)

    (tmp_path / "x.yaml").write_text("depth: 3\n")
    for arguments in (
        [],
        ["--config", str(tmp_path / "x.yaml")],
        ["--depth", "4", "--config", str(tmp_path / "x.yaml")],
    ):
        line(arguments, standalone_mode=False)
    assert seen == [2, 3, 4]
    with pytest.raises(InputError, match=r"^--depth: Input should be greater than or equal to 1, not 0\.$"):
        line(["--depth", "0"], standalone_mode=False)


def test_files_keep_the_words_of_yaml_1_1(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    for word, value in {"no": False, "off": False, "yes": True, "True": True, "false": False}.items():
        path.write_text(f"progress: {word}\n")
        assert load_config(path) == {"progress": value}
    path.write_text("answer: yes\ntol: 1e-3\n")
    assert load_config(path, CircuitConfig) == {"answer": "yes", "tol": 0.001}


def test_the_fewest_nodes_are_a_panel() -> None:
    assert FEWEST_NODES == NODES_PER_PANEL
    with pytest.raises(InputError, match=r"^--max-nodes: Input should be greater than or equal to 7, not 3\.$"):
        parse_settings({"max_nodes": 3}, "--")


def test_a_registered_baseline_is_a_choice(mine: None, tmp_path: Path) -> None:
    assert parse_settings({"attn_baseline": "mine"}, "--") == {"attn_baseline": "mine"}
    path = tmp_path / "x.yaml"
    path.write_text("attn_baseline: mine\n")
    assert load_config(path) == {"attn_baseline": "mine"}
    assert Settings.of(attn_baseline="mine").baseline_of("attn") == "mine"
    assert "Unknown block_baseline 'mine'" in refused(block_baseline="mine")
    with pytest.raises(InputError, match="Unknown mlp baseline 'mine'"):
        parse_settings({"mlp_baseline": "mine"}, "--")


def test_what_a_registered_baseline_needs_is_checked(mine: None) -> None:
    message = refused(attn_baseline="other_mine")
    assert message == "attn_baseline='other_mine' needs a second prompt: pass corrupted=... as well."
    assert Settings.of(attn_baseline="other_mine", corrupted=[1, 2]).corrupted == [1, 2]
    with pytest.raises(InputError, match="The attn baseline is 'other_mine', but there is no second prompt"):
        merge_settings(ExplainConfig, {"attn_baseline": "other_mine"})
    assert merge_settings(ExplainConfig, {"attn_baseline": "other_mine", "corrupted": "a"}).corrupted == "a"
    assert Settings.of(target=AMetric(), attn_baseline="other_mine", corrupted="a").per_metric
    assert "attn_baseline='mine' has a path for each destination" in refused(target=AMetric(), attn_baseline="mine")


def test_what_is_left_open_depends_on_the_target() -> None:
    plain, metric = Settings.of(), Settings.of(target=AMetric(), corrupted="a")
    assert (plain.maps, plain.attn_baseline, plain.per_metric) == (("attn", "mlp", "block"), "itb", False)
    assert (metric.maps, metric.attn_baseline, metric.per_metric) == (("attn",), "corrupted", True)
    assert ExplainConfig().maps == plain.maps and parse_settings({}) == {}


@pytest.mark.parametrize(
    "asked, message",
    [
        (
            {"target": AMetric(), "corrupted": "a", "maps": "mlp"},
            "maps=('mlp',): contributions to a metric (a_metric) are an attn map, and what bypasses the heads comes "
            "with it: use maps='attn', or leave maps out.",
        ),
        (
            {"target": AMetric(), "corrupted": "a", "destinations": [1]},
            "destinations=[1]: contributions to a metric add up over all of them: leave it out.",
        ),
        (
            {"split": "message"},
            "split='message' goes with a metric as target: contributions to a head's output are those of sources "
            "(split='source').",
        ),
        ({"maps": 3}, "maps=3: Input should be a valid tuple."),
        ({"max_nodes": "many"}, "max_nodes='many': Input should be a valid integer."),
        ({"tol": "small"}, "tol='small' is not between 0 and 1: it is a relative gap, such as 1e-3."),
        (
            {"attn_baseline": 3},
            "Unknown attn_baseline 3: use one of 'zero', 'itb', 'itb_zero_ratio', ",
        ),
        ({"target": None}, "Unknown target None: use one of 'l2'."),
    ],
)
def test_messages_of_arguments(asked: dict[str, Any], message: str) -> None:
    assert refused(**asked).startswith(message)


def test_what_python_hands_over_is_kept() -> None:
    positions, tensor, target = np.array([0, 2]), np.zeros((2, 2)), object()
    settings = Settings.of(
        maps=["attn", "attn"],
        layers=positions,
        destinations=range(3),
        attn_baseline=tensor,
        target=target,
        max_nodes=np.int64(64),
        progress=0,
        out=Path("x"),
    )
    assert settings.maps == ("attn",) and settings.layers is positions and settings.destinations == range(3)
    assert settings.attn_baseline is tensor and settings.target is target and settings.out == Path("x")
    assert (settings.max_nodes, type(settings.max_nodes), settings.progress) == (64, int, False)
