"""The command line: what it passes on, prints and writes; exit statuses and one-line errors."""

import importlib
import inspect
import json
import os
import subprocess
import sys
import types
import warnings
from pathlib import Path

import pytest
from flows import make_flow

from lig_lens.blocks.block import BlockBoundaries
from lig_lens.cli.configs import ExplainConfig, load_config, merge_settings, parse_settings
from lig_lens.cli.flags import parse_numbers
from lig_lens.cli.main import run
from lig_lens.errors import ConvergenceWarning, InputError
from lig_lens.flow.flow import Flow
from lig_lens.names import MAPS
from lig_lens.paths import BASELINES, BaselineEntry

CONFIGS = Path(__file__).parents[1] / "configs"


class Core:
    """Stands in for the loader and the attribution, and keeps what it was asked."""

    def __init__(self):
        self.flow = make_flow()
        self.loaded = self.asked = self.prompt = None
        self.error = None

    def load_model(self, name, device=None, dtype=None):
        self.loaded = (name, device, dtype)
        return "model"

    def attribute(self, model, prompt, **arguments):
        if self.error is not None:
            raise self.error
        self.prompt, self.asked = prompt, arguments
        return self.flow


@pytest.fixture
def core(monkeypatch):
    core = Core()
    for module, name in (("models.loading", "load_model"), ("attribution", "attribute")):
        monkeypatch.setattr(importlib.import_module(f"lig_lens.{module}"), name, getattr(core, name))
    monkeypatch.delenv("LIG_LENS_TRACEBACK", raising=False)
    return core


def _error(capsys, arguments, status=2):
    """The line on stderr of a run that fails with `status`, after what it said of its progress."""
    assert run(arguments) == status
    captured = capsys.readouterr()
    assert captured.out == ""
    *said, line = captured.err.splitlines()
    assert line.startswith("lig-lens: error: ") and all(one.startswith("lig-lens: loading ") for one in said)
    return line


def test_flags_reach_the_attribution(core, capsys):
    arguments = ["explain", "a b", "--model", "smollm2", "--layers", "0-2,-1", "--maps", "attn,block"]
    arguments += [
        "--destinations",
        "4",
        "--attn-baseline",
        "corrupted",
        "--corrupted",
        "c d",
        "--tol",
        "0.01",
    ]
    arguments += ["--max-nodes", "64", "--max-batch-tokens", "128", "--dtype", "bfloat16", "--device", "cpu"]
    assert run([*arguments, "--engine", "hooks", "--no-progress"]) == 0
    assert core.loaded == ("smollm2", "cpu", "bfloat16") and core.prompt == "a b"
    assert core.asked == {
        "maps": ("attn", "block"),
        "layers": (0, 1, 2, -1),
        "destinations": (4,),
        "attn_baseline": "corrupted",
        "mlp_baseline": "att_itb_a0",
        "block_baseline": "itb",
        "corrupted": "c d",
        "stream": None,
        "tol": 0.01,
        "max_nodes": 64,
        "max_batch_tokens": 128,
        "engine": "hooks",
        "progress": False,
    }


def test_defaults(core):
    assert run(["explain", "a"]) == 0
    assert core.loaded == ("minilm", None, None)
    assert core.asked["layers"] is None and core.asked["progress"] is True


def test_summary_names_edges_heads_and_gaps(core, capsys):
    assert run(["explain", "a"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "7 tokens, 2 layers of tiny" and "attn from itb" in lines[2]
    strongest = core.flow.top(1, layer=3)[0]
    row = next(line for line in lines if line.startswith("3 "))
    source, destination = (token.replace("##", "\u2011") for token in (strongest.src_token, strongest.dst_token))
    assert f"{source} ({strongest.src}) → {destination} ({strongest.dst})" in row
    assert f"head {strongest.head} " in row
    assert row.endswith(f"{max(float(core.flow.gap[m][1].max()) for m in core.flow.maps):.1e}")
    assert any("columns miss tol 0.001" in line for line in lines)
    assert lines[-1].startswith("No file written") and not any("\x1b" in line for line in lines)


@pytest.mark.parametrize("maps", [("mlp",), ("block",)])
def test_summary_without_the_attn_map(core, capsys, maps):
    core.flow = make_flow(maps=maps)
    assert run(["explain", "a", "--maps", maps[0]]) == 0
    assert f"Worst gaps: {maps[0]} " in capsys.readouterr().out


def test_summary_fits_a_narrow_terminal():
    from lig_lens.show.summary import summarize

    assert max(len(line) for line in summarize(make_flow(), width=72).splitlines()[:-1]) <= 72


def test_files_are_written_and_named_last(core, capsys, tmp_path):
    names = {"--out": "f.safetensors", "--json": "f.json", "--html": "f.html"}
    flags = [part for flag, name in names.items() for part in (flag, str(tmp_path / name))]
    assert run(["explain", "<b>a</b>", *flags]) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == "Wrote " + ", ".join(str(tmp_path / name) for name in names.values())
    assert Flow.load(tmp_path / "f.safetensors").tokens == core.flow.tokens
    assert json.loads((tmp_path / "f.json").read_text())["schema"] == "lig_lens.flow"
    assert "<title>lig_lens: &lt;b&gt;a&lt;/b&gt;</title>" in (tmp_path / "f.html").read_text()


BAD_FLAGS = [
    ([], "Missing command"),
    (["explain"], "There is no prompt: give TEXT, or --image FILE"),
    (["explain", " "], "TEXT is empty (' '): give a prompt"),
    (["explain", "a", "--nope"], "No such option: --nope"),
    (["explain", "a", "--attn-baseline", "itbb"], "Unknown attn baseline 'itbb': use one of 'zero', 'itb'"),
    (["explain", "a", "--mlp-baseline", "itb"], "use one of 'zero', 'att_itb_a0', 'corrupted'"),
    (["explain", "a", "--block-baseline", "itb_map_ratio"], "Unknown block baseline 'itb_map_ratio'"),
    (["explain", "a", "--engine", "hoks"], "Did you mean 'hooks'?"),
    (["explain", "a", "--dtype", "float3"], "Unknown dtype 'float3'"),
    (["explain", "a", "--maps", "attn,mpl"], "--maps: Unknown map 'mpl': use one of 'attn', 'mlp', 'block'."),
    (["explain", "a", "--maps", "attn,attn"], "'attn' is given twice"),
    (["explain", "a", "--layers", "0,x"], "--layers: cannot read 'x' in '0,x': write numbers like 0,3"),
    (["explain", "a", "--layers", "3-1"], "cannot read '3-1'"),
    (["explain", "a", "--layers", "1,1"], "--layers: 1 is given twice"),
    (["explain", "a", "--tol", "0"], "--tol: Input should be greater than 0, not 0.0"),
    (["explain", "a", "--tol", "nan"], "--tol: "),
    (["explain", "a", "--tol", "x"], "--tol: 'x' is not a number: write for example 0.001"),
    (["explain", "a", "--max-nodes", "1.5"], "--max-nodes: '1.5' is not a number: write for example 4096"),
    (["explain", "a", "--max-nodes", "0"], "--max-nodes: Input should be greater than or equal to 7, not 0"),
    (["explain", "a", "--attn-baseline", "corrupted"], "add --corrupted TEXT2"),
    (["explain", "a", "--corrupted", "b"], "--corrupted 'b' is given, but no baseline"),
    (["explain", "a", "--config", "none.yaml"], "Cannot read the config 'none.yaml': No such file"),
    (["explain", "a", "--out", "none/f"], "--out: cannot write 'none/f': the folder 'none' does not exist"),
    (["explain", "a", "--html", "."], "--html: '.' is a folder: give the name of a file in it"),
    (["explain", "a", "--out", "f", "--json", "./f"], "Two of --out, --json, --html name one path"),
    (["explain", "a", "--image", "a.png"], "TEXT goes with models of text, and --image 'a.png' is given"),
    (["explain", "--image", "a.png", "--target-text", "b"], "--target-text goes with models of text"),
    (["explain", "--image", "none.png"], "--image: there is no file 'none.png': give the path of an image"),
    (["explain", "a", "--stream", "crosss"], "Unknown stream 'crosss': use one of 'decoder', 'encoder', 'cross'."),
    (["explain", "a", "--stream", "cross"], "--stream cross needs a target: add --target-text TEXT"),
    (["explain", "a", "--stream", "cross", "--target-text", "b", "--maps", "mlp"], "there is the attn map alone"),
    (["boundaries"], "Missing argument"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD_FLAGS)
def test_bad_input_is_one_line_and_status_2(core, capsys, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert message in _error(capsys, arguments)
    assert core.loaded is None and core.asked is None  # found before the work


def test_errors_of_the_library(core, capsys):
    core.error = InputError("layer 9 is out of range:\nuse 0 to 5.")
    assert _error(capsys, ["explain", "a"]) == "lig-lens: error: layer 9 is out of range: use 0 to 5."


def test_anything_else_is_status_1_with_a_hint(core, capsys, monkeypatch):
    core.error = RuntimeError("boom")
    line = _error(capsys, ["explain", "a"], status=1)
    assert line == "lig-lens: error: RuntimeError: boom (set LIG_LENS_TRACEBACK=1 for the traceback)"
    monkeypatch.setenv("LIG_LENS_TRACEBACK", "1")
    assert run(["explain", "a"]) == 1
    assert "Traceback" in capsys.readouterr().err


def test_ctrl_c_is_status_1(core, capsys):
    core.error = KeyboardInterrupt()
    assert run(["explain", "a"]) == 1
    assert "Interrupted" in capsys.readouterr().err


def test_the_convergence_warning_is_one_line(core, capsys, monkeypatch):
    def attribute(*_, **__):
        warnings.warn("3 of 9 cells missed tol", ConvergenceWarning, stacklevel=2)
        return core.flow

    monkeypatch.setattr(importlib.import_module("lig_lens.attribution"), "attribute", attribute)
    assert run(["explain", "a"]) == 0
    assert capsys.readouterr().err == "lig-lens: loading minilm\nlig-lens: warning: 3 of 9 cells missed tol\n"


def test_config_file_is_used_and_flags_win(core, tmp_path):
    path = tmp_path / "x.yaml"
    lines = ["model: smollm2", "layers: [0, 3]", "tol: 1e-2", "attn_baseline: zero", "progress: no"]
    path.write_text("\n".join([*lines, f"json: {tmp_path}/f.json"]))
    assert run(["explain", "a", "--config", str(path), "--attn-baseline", "itb", "--layers", "1"]) == 0
    assert core.loaded[0] == "smollm2" and core.asked["tol"] == 0.01 and core.asked["progress"] is False
    assert core.asked["attn_baseline"] == "itb" and core.asked["layers"] == (1,)
    assert (tmp_path / "f.json").exists()


def test_a_baseline_of_ones_own_is_taken(core, tmp_path):
    (tmp_path / "x.yaml").write_text("attn_baseline: mine\n")
    BASELINES.add("mine", BaselineEntry(object(), maps=("attn",)))
    try:
        for arguments in (["--attn-baseline", "mine"], ["--config", str(tmp_path / "x.yaml")]):
            assert run(["explain", "a", *arguments]) == 0
            assert core.asked["attn_baseline"] == "mine"
    finally:
        BASELINES.remove("mine")
    assert run(["explain", "a", "--attn-baseline", "mine"]) == 2


BAD_YAML = [
    ("atn_baseline: itb", "unknown key 'atn_baseline'. Did you mean 'attn_baseline'?"),
    ("attn-baseline: itb", "unknown key 'attn-baseline'. Did you mean 'attn_baseline'?"),
    ("xyzzy: 1", "unknown key 'xyzzy'. Valid keys: text, image, target_text, model, layers"),
    ("attn_baseline: itbb", "attn_baseline: Unknown attn baseline 'itbb'"),
    ("tol: '0.1'", "tol: Input should be a valid number, not '0.1'"),
    ("tol: true", "tol: Input should be a valid number, not True"),
    ("layers: 3", "not 3; write a list such as [0, 3]"),
    ("layers: ['0']", "Input should be a valid integer"),
    ("layers: [true]", "Input should be a valid integer"),
    ("layers: []", "The list is empty"),
    ("maps: attn", "write a list such as [attn, mlp]"),
    ("progress: 1", "Input should be a valid boolean, not 1"),
    ("model: 3", "Input should be a valid string, not 3"),
    ("engine: 3", "engine: Input should be a valid string, not 3"),
    ("attn_baseline: null", "attn_baseline: Input should be a valid string, not None"),
    ("mlp_baseline: 2020-01-01", "mlp_baseline: Input should be a valid string, not datetime.date(2020, 1, 1)"),
    ("tol: 0.1\ntol: 0.2", "the key 'tol' is given twice"),
    ("- a", "holds list, not 'key: value' lines"),
    ("a: [", "is not valid YAML"),
    ("tol: 2\nmodel: 3", "(1 more wrong.)"),
]


@pytest.mark.parametrize(("text", "message"), BAD_YAML)
def test_config_files_are_as_strict_as_flags(core, capsys, tmp_path, text, message):
    path = tmp_path / "x.yaml"
    path.write_text(text)
    line = _error(capsys, ["explain", "a", "--config", str(path)])
    assert message in line and str(path) in line


def test_empty_config_changes_nothing(tmp_path):
    (tmp_path / "x.yaml").write_text("# nothing\n")
    assert merge_settings(ExplainConfig, load_config(tmp_path / "x.yaml")) == ExplainConfig()


def test_default_yaml_says_what_happens_without_it():
    settings = load_config(CONFIGS / "default.yaml")
    assert set(settings) == {field.alias or name for name, field in ExplainConfig.model_fields.items()}
    assert merge_settings(ExplainConfig, settings) == ExplainConfig()
    parameters = inspect.signature(importlib.import_module("lig_lens.attribution").attribute).parameters
    # None there means what the command line spells out, unless the target is a metric.
    left_open = {"maps", "attn_baseline"}
    assert all(parameters[name].default is None for name in left_open)
    for name, value in ExplainConfig().attribute_arguments().items():
        assert name in left_open or parameters[name].default == value, name


def test_paper_yaml_is_valid():
    settings = merge_settings(ExplainConfig, load_config(CONFIGS / "paper.yaml"))
    assert settings.model == "bert-base-uncased"
    assert (settings.attn_baseline, settings.mlp_baseline) == ("itb", "att_itb_a0")
    assert load_config(CONFIGS / "paper.yaml")["maps"] == MAPS


def test_settings_that_are_absent_stay_absent():
    assert parse_settings({"tol": 0.5}) == {"tol": 0.5}
    assert parse_numbers("--layers", " 0 , 2-3 ") == (0, 2, 3)


def test_boundaries_prints_one_row_per_block(capsys, monkeypatch):
    seen = []

    def describe_boundaries(model, config_only=False, stream=None):
        seen.append((model, config_only, stream))
        fields = {"layout": "pre_ln", "hook_z": "blocks.0.attn.hook_z", "resid_mid": None}
        fields |= {"resid_pre": "blocks.0.hook_resid_pre", "resid_post": "blocks.0.hook_resid_post"}
        heads = {"engine": "hooks", "n_heads": 9, "n_key_value_heads": 3, "d_head": 64, "norms": ("RMSNorm",)}
        return [BlockBoundaries(layer=0, **fields, **heads)]

    boundaries = types.SimpleNamespace(describe_boundaries=describe_boundaries)
    loading = types.SimpleNamespace(load_model=lambda name: f"loaded {name}")
    monkeypatch.setitem(sys.modules, "lig_lens.blocks.describe", boundaries)
    monkeypatch.setitem(sys.modules, "lig_lens.models.loading", loading)
    assert run(["boundaries", "x"]) == 0
    assert run(["boundaries", "x", "--config-only"]) == 0
    assert seen == [("loaded x", False, None), ("x", True, None)]
    row = capsys.readouterr().out.splitlines()[3]
    assert row.split() == [
        *("0", "pre_ln", "9", "(3", "kv)", "64", "RMSNorm", "hooks"),
        *("hook_resid_pre", "attn.hook_z", "-", "hook_resid_post"),
    ]


def _python(code, *arguments, encoding="utf-8"):
    environment = {**os.environ, "PYTHONPATH": str(CONFIGS.parent), "PYTHONIOENCODING": encoding}
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, capture_output=True, encoding=encoding, env=environment)


def test_help_version_and_bad_flags_load_no_torch():
    code = (
        "import sys\nfrom lig_lens.cli.main import run\nstatus = run(sys.argv[1:])\n"
        "heavy = {'torch', 'transformers', 'transformer_lens', 'plotly', 'numpy'} & set(sys.modules)\n"
        "assert not heavy, heavy\nsys.exit(status)"
    )
    for arguments, status in (
        (["--help"], 0),
        (["explain", "--help"], 0),
        (["--version"], 0),
        (["explain", "a", "--out", "none/f"], 2),
    ):
        done = _python(code, *arguments)
        assert done.returncode == status, done.stderr


def test_the_console_entry_point():
    code = "import sys; from lig_lens.cli.main import main; main()"
    done = _python(code, "--version")
    assert (done.returncode, done.stdout) == (0, "lig-lens 0.1.0\n")
    done = _python(code, "explain", "")
    assert done.returncode == 2 and done.stdout == "" and len(done.stderr.splitlines()) == 1


def test_a_terminal_that_cannot_show_a_token_does_not_end_the_run():
    code = (
        "import sys\nsys.path.insert(0, sys.argv.pop(1))\nfrom flows import make_flow\n"
        "import lig_lens.attribution, lig_lens.models.loading\n"
        "sys.modules['lig_lens.models.loading'].load_model = lambda *a, **k: None\n"
        "sys.modules['lig_lens.attribution'].attribute = lambda *a, **k: make_flow(tokens=('Ġä', '日本'))\n"
        "from lig_lens.cli.main import main\nmain()"
    )
    done = _python(code, str(Path(__file__).parent), "explain", "a", encoding="latin-1")
    assert done.returncode == 0, done.stderr
    assert "·ä" in done.stdout and "\\u2192" in done.stdout
