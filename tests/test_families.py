"""Families of models as checkpoints, loaded as a user would: their logits, their maps, and what is refused."""

import contextlib
import copy
import re
import shutil
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from checkpoints import GPT2, GQA, IDS, OTHER, SMALL, saved
from families import FAMILIES, Family
from family_knock_outs import knocked_out
from family_oracle import apart, block_map, maps_from_zero, missed
from recorded import held
from tiny_models import VOCAB
from transformer_lens.model_bridge import TransformerBridge

import lig_lens as ll
from lig_lens.errors import BoundaryError, InputError
from lig_lens.models.served import _without_alias

ENCODERS = {
    "RobertaForMaskedLM": SMALL,
    "XLMRobertaForMaskedLM": SMALL,
    "CamembertForMaskedLM": SMALL,
    "ElectraForMaskedLM": {**SMALL, "embedding_size": 16},
}
OTHERS = {"PhimoeForCausalLM": {**GQA, "num_local_experts": 2, "num_experts_per_tok": 2}}
CLASSIFIERS = {
    "BertForSequenceClassification": SMALL,
    "RobertaForSequenceClassification": SMALL,
    "XLMRobertaForSequenceClassification": SMALL,
    "ElectraForSequenceClassification": SMALL,
    "GPT2ForSequenceClassification": {**GPT2, "pad_token_id": 0},
    "LlamaForSequenceClassification": GQA,
    "MistralForSequenceClassification": GQA,
    "Qwen2ForSequenceClassification": GQA,
}


T5 = {"vocab_size": VOCAB, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_heads": 4}


@dataclass(frozen=True)
class Loaded:
    """A row of the table: the plain model in float64, and the same as a bridge."""

    name: str
    row: Family
    plain: Any
    model: Any
    folder: Path

    @property
    def maps(self) -> tuple[str, ...]:
        return ("block",) if self.row.layout == "block_only" else ("attn", "mlp", "block")


@pytest.fixture(scope="module", params=FAMILIES)
def loaded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    name, row = request.param, FAMILIES[request.param]
    kind, folder = name.split(",")[0], tmp_path_factory.mktemp("family")
    if not hasattr(transformers, kind):
        pytest.skip(f"transformers {transformers.__version__} has no {kind}")
    plain = saved(kind, folder, **row.config).double()
    ready(plain)
    if version("transformer_lens").startswith(row.wrong_on):
        with pytest.warns(ll.BridgeWarning) if "HunYuan" in kind else pytest.raises(BoundaryError, match="run alone"):
            ll.describe_boundaries(ll.load_model(str(folder), device="cpu", dtype="float64"))
        pytest.skip("this bridge computes something else or cannot run, which is said on loading")
    with warnings.catch_warnings():
        warnings.simplefilter("error", ll.BridgeWarning)
        return Loaded(name, row, plain, ll.load_model(str(folder), device="cpu", dtype="float64"), folder)


def ready(plain: Any) -> None:
    """Let a plain model run in float64, with gradients."""
    plain.config.use_cache = False  # RWKV writes its states in place
    if hasattr(plain, "set_experts_implementation"):
        plain.set_experts_implementation("eager")  # the joint product of matrices knows no float64
    if "XGLM" in type(plain).__name__:
        plain.forward = in_double(plain.forward)


def in_double(run: Callable[..., Any]) -> Callable[..., Any]:
    """XGLM's own attention makes a number of PyTorch's default dtype of the smallest float64."""

    def ran(*args: Any, **kwargs: Any) -> Any:
        torch.set_default_dtype(torch.float64)
        try:
            return run(*args, **kwargs)
        finally:
            torch.set_default_dtype(torch.float32)

    return ran


def test_maps_are_those_of_the_plain_model(loaded: Loaded) -> None:
    """Against autograd through the plain transformers model, in float64."""
    row, plain, prompt = loaded.row, loaded.plain, torch.tensor([IDS[:4]])
    asked = {"layers": [row.layer], "maps": loaded.maps, "tol": 1e-5, "max_nodes": 8192, "progress": False}
    zero = {"attn_baseline": "zero", "mlp_baseline": "zero", "block_baseline": "zero", "experts": row.experts}
    flow = ll.attribute(loaded.model, IDS[:4], **asked, **zero)
    assert flow.layouts == (row.layout,)
    assert {flow.engines[name][0] for name in loaded.maps if name != "mlp"} == {row.engine}
    layer = plain.get_submodule(row.layers)[row.layer]
    if row.layout == "block_only":
        difference = max(
            apart(found.block[0], block_map(plain, layer, baseline, input_ids=prompt), 1e-4, baseline)
            for baseline, found in (("zero", flow), ("itb", ll.attribute(loaded.model, IDS[:4], **asked)))
        )
    else:
        with held_to(prompt, plain, layer) if row.experts == "held" else contextlib.nullcontext():
            expected = maps_from_zero(plain, layer, layer.get_submodule(row.out), 4, input_ids=prompt)
        difference = missed(flow, expected, 1e-4)
    held(loaded.name, "text", flow, difference)


@contextlib.contextmanager
def held_to(prompt: torch.Tensor, plain: Any, layer: Any) -> Iterator[None]:
    """PhiMoE's router by hand, with both experts, and those they are weighed against, as on the prompt."""
    router, seen = layer.mlp.router, []
    handle = router.register_forward_hook(lambda _module, args, output: seen.append((output[0], output[2])))
    with torch.no_grad():
        plain(prompt)
    handle.remove()
    (scores, chosen), near = seen[0], []
    rest = scores.clone()
    for which in chosen.T[..., None]:
        best = rest.gather(-1, which)
        near.append((best - scores) / scores.abs().clamp(min=best) <= 2 * router.router_jitter_noise)
        near[-1] &= rest > -torch.inf
        rest = rest.scatter(-1, which, -torch.inf)

    def forward(hidden: torch.Tensor) -> Any:
        made = hidden @ router.weight.T
        of = torch.arange(len(hidden)) % len(chosen)
        exps = [made.exp() * kept[of] for kept in near]
        weights = [(exp / exp.sum(-1, keepdim=True)).gather(-1, chosen[of, n, None]) for n, exp in enumerate(exps)]
        return made, torch.cat(weights, -1), chosen[of]

    router.forward = forward
    try:
        with torch.no_grad():
            assert not any(bool(kept.all()) for kept in near) and any(bool((kept.sum(-1) > 1).any()) for kept in near)
        yield
    finally:
        del router.forward


def test_logits_of_families_are_those_of_the_plain_model(loaded: Loaded) -> None:
    ids = torch.tensor([IDS])
    with torch.no_grad():
        found, expected = loaded.model(ids), loaded.plain(ids).logits
    torch.testing.assert_close(found if isinstance(found, torch.Tensor) else found[0], expected, rtol=1e-5, atol=1e-5)


def test_runs_share_no_state(loaded: Loaded) -> None:
    """Neither items of a batch nor one run and the next; and the model is left as it was."""
    asked = {"layers": [loaded.row.layer], "maps": "block", "block_baseline": "zero", "progress": False}
    asked |= {"tol": 0.1, "engine": "hooks", "experts": loaded.row.experts}
    with torch.no_grad():
        before = loaded.model(torch.tensor([IDS]))
        batch = [ll.attribute(loaded.model, [OTHER, IDS[:4]], **asked)[1] for _ in range(2)]
        alone = ll.attribute(loaded.model, IDS[:4], max_batch_tokens=4, **asked)
        after = loaded.model(torch.tensor([IDS]))
    assert torch.equal(batch[0].block, batch[1].block)
    assert float((batch[0].block - alone.block).abs().max()) <= 1e-5 * float(alone.block.abs().max())
    torch.testing.assert_close(after, before, rtol=0, atol=0)


def test_maps_that_a_block_lacks_are_refused(loaded: Loaded) -> None:
    """With the reason, and the map that it has."""
    if loaded.row.layout != "block_only":
        pytest.skip("it has all")
    layer = loaded.row.layer
    described = ll.describe_boundaries(loaded.model)[layer]
    assert described.layout == "block_only" and described.hook_z is None
    reason = r"no attention with separable heads|after attention it mixes positions"
    assert re.search(reason, described.why_hooks)
    for maps in (("attn",), ("mlp", "block")):
        with pytest.raises((InputError, BoundaryError), match=rf"Block {layer}.*({reason}).*use maps=\('block',\)"):
            ll.attribute(loaded.model, IDS, layers=[layer], maps=maps, progress=False)
    with pytest.raises((InputError, BoundaryError), match=rf"Block {layer}.*({reason})"):
        ll.attribute(loaded.model, IDS, corrupted=OTHER, target=ll.metric(curved), layers=[layer], progress=False)


def test_edges_are_knocked_out_as_by_hand(loaded: Loaded) -> None:
    """Against the plain model with eager attention, in whose softmax the edge is put to 0."""
    if not loaded.row.knock_outs:
        with pytest.raises(
            (InputError, BoundaryError), match=r"cannot be read|no attention with separable heads|mixes positions"
        ):
            ll.patching.knock_out(
                loaded.model,
                IDS,
                curved,
                layers=[loaded.row.layer],
                edges=[(loaded.row.layer, 1, 2, 3)],
                progress=False,
            )
        return
    if "ALiBi" in loaded.name:
        pytest.skip("transformers' eager attention adds the bias twice")
    eager = type(loaded.plain).from_pretrained(loaded.folder, attn_implementation="eager").double().eval()
    ready(eager)
    attentions_before = int(ll.describe_boundaries(loaded.model)[0].layout != "block_only")
    effects = ll.patching.knock_out(loaded.model, IDS, curved, layers=[1], progress=False)
    # Some models round to single precision inside, so weak edges would tell nothing.
    rounding = 1e-6 * abs(effects.reference)
    for at in effects.values[0].nan_to_num().abs().flatten().topk(2).indices.tolist():
        head, src, dst = (int(n) for n in np.unravel_index(at, effects.values[0].shape))
        expected = knocked_out(eager, IDS, (attentions_before, head, src, dst), curved)
        assert abs(expected) > 100 * rounding
        assert float(effects.values[0, head, src, dst]) == pytest.approx(expected, rel=1e-5, abs=rounding)


def test_half_precision_computes_in_single(loaded: Loaded) -> None:
    """A metric on bfloat16 weights gives what it gives on the same weights in float32, and leaves them as they were."""
    if loaded.row.layout == "block_only" or "ALiBi" in loaded.name:
        pytest.skip("no map to a metric, or a model that transformers runs in one precision only")
    try:
        model = ll.load_model(str(loaded.folder), device="cpu", dtype="bfloat16")
    except InputError as error:
        assert "cannot run in bfloat16" in str(error)
        pytest.skip(str(error))
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    asked = {"corrupted": OTHER, "target": ll.metric(curved), "layers": [1], "tol": 0.5, "progress": False}
    flows = []
    for dtype in (torch.bfloat16, torch.float32):
        model.to(dtype)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ll.ConvergenceWarning)
            flows.append(ll.attribute(model, IDS, **asked))
        if dtype is torch.bfloat16:
            for name, weight in model.named_parameters():
                assert weight.dtype == before[name].dtype and torch.equal(weight, before[name])
    # Constants of some models (rotary tables) are rounded with their weights.
    scale = float(flows[1].attn.abs().max())
    assert float((flows[0].attn - flows[1].attn).abs().max()) <= 0.02 * scale


def curved(logits: torch.Tensor) -> torch.Tensor:
    flat = logits.flatten()
    return flat[-1] + 0.1 * flat[0] * flat[-1] + 0.1 * flat[-2:].prod() / flat.std()


def test_padding_on_either_side_changes_nothing(loaded: Loaded) -> None:
    """The model never sees it."""
    seen: list[torch.Tensor] = []
    hook = loaded.model.original_model.get_input_embeddings().register_forward_pre_hook(
        lambda _module, args: seen.append(args[0])
    )
    asked = {"layers": [loaded.row.layer], "maps": loaded.maps[0], "tol": 0.1, "progress": False}
    asked[f"{loaded.maps[0]}_baseline"] = "zero"
    ids, flows = IDS[:3], []
    try:
        for left, right in ((0, 0), (2, 0), (0, 2), (1, 1)):
            mask = [0] * left + [1] * len(ids) + [0] * right
            padded = [3] * left + ids + [3] * right
            flows.append(ll.attribute(loaded.model, padded, attention_mask=mask, **asked))
    finally:
        hook.remove()
    assert len(seen) >= 4 and not any(3 in one for one in seen)
    for flow in flows[1:]:
        assert torch.equal(getattr(flow, loaded.maps[0]), getattr(flows[0], loaded.maps[0]))
        assert flow.tokens == flows[0].tokens


def test_the_config_alone_tells_the_layouts(loaded: Loaded, tmp_path: Path) -> None:
    """Weights made at random, some of which are 0 or 1."""
    shutil.copy(loaded.folder / "config.json", tmp_path)
    for file in loaded.folder.glob("tokenizer*"):
        shutil.copy(file, tmp_path)
    made = ll.describe_boundaries(str(tmp_path), config_only=True)
    found = ll.describe_boundaries(loaded.model)
    assert [block.layout for block in made] == [block.layout for block in found]
    assert [block.n_heads for block in made] == [block.n_heads for block in found]


def test_norms_that_see_flattened_positions(tmp_path: Path) -> None:
    """OPT flattens items and positions before its second norm; a bridge without familiar names shows it so."""
    saved("OPTForCausalLM", tmp_path, **FAMILIES["OPTForCausalLM"].config)
    flows = [
        ll.attribute(model, IDS, progress=False)
        for model in (
            TransformerBridge.boot_transformers(str(tmp_path), device="cpu"),
            ll.load_model(str(tmp_path), device="cpu"),
        )
    ]
    for name in flows[0].maps:
        torch.testing.assert_close(getattr(flows[0], name), getattr(flows[1], name), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", [*ENCODERS, *OTHERS, *CLASSIFIERS])
def test_logits_are_those_of_the_plain_model(kind: str, tmp_path: Path) -> None:
    plain = saved(kind, tmp_path, **{**ENCODERS, **OTHERS, **CLASSIFIERS}[kind])
    model = ll.load_model(str(tmp_path), device="cpu")
    ids = torch.tensor([IDS])
    with torch.no_grad():
        expected, found = plain(ids).logits, model(ids)
    found = found if isinstance(found, torch.Tensor) else found[0]
    assert found.shape == expected.shape
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "name", ["FalconForCausalLM, ALiBi", "GPTJForCausalLM", "BloomForCausalLM", "Gemma2ForCausalLM"]
)
def test_classifiers_of_a_language_models_family(name: str, tmp_path: Path) -> None:
    """By the name of its class, where the config's type says nothing."""
    kind = name.split(",")[0].replace("ForCausalLM", "ForSequenceClassification")
    plain = saved(kind, tmp_path, **FAMILIES[name].config | {"pad_token_id": 0})
    with warnings.catch_warnings():
        warnings.simplefilter("error", ll.BridgeWarning)
        model = ll.load_model(str(tmp_path), device="cpu")
    ids = torch.tensor([IDS])
    with torch.no_grad():
        torch.testing.assert_close(model(ids), plain(ids).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ENCODERS)
def test_encoders_have_all_maps(kind: str, tmp_path: Path) -> None:
    saved(kind, tmp_path, **ENCODERS[kind])
    model = ll.load_model(str(tmp_path), device="cpu")
    flow = ll.attribute(model, IDS, progress=False)
    assert flow.maps == ("attn", "mlp", "block") and set(flow.layouts) == {"post_ln"}
    assert all(bool(flow.converged[name].all()) for name in flow.maps)


@pytest.mark.parametrize("kind", CLASSIFIERS)
def test_classes_are_explained(kind: str, tmp_path: Path) -> None:
    """The contributions of every layer add up to the change of the classifier's own logit."""
    plain = saved(kind, tmp_path, **CLASSIFIERS[kind])
    model = ll.load_model(str(tmp_path), device="cpu")
    with torch.no_grad():
        change = float((plain(torch.tensor([IDS])).logits - plain(torch.tensor([OTHER])).logits)[0, 1])
    flow = ll.attribute(model, IDS, corrupted=OTHER, target=ll.class_logit(1), progress=False)
    torch.testing.assert_close(
        (flow.attn.sum((1, 2, 3)) + flow.skip.sum(1)).double(), torch.full((2,), change).double(), rtol=2e-3, atol=1e-5
    )


@pytest.mark.parametrize(
    "kind, config, missing",
    [
        ("BertModel", SMALL, "cls.predictions"),
        ("LlamaModel", {**GQA, "tie_word_embeddings": False}, "lm_head.weight"),
        ("RobertaModel", SMALL, "lm_head"),
    ],
)
def test_a_head_that_was_never_loaded_is_named(kind: str, config: dict[str, Any], missing: str, tmp_path: Path) -> None:
    saved(kind, tmp_path, **config)
    model = ll.load_model(str(tmp_path), device="cpu")
    asked = {"corrupted": OTHER, "progress": False}
    for target in (ll.logit_difference(9, 17), ll.metric(lambda logits: logits[0, -1, 3])):
        with pytest.raises(InputError, match=rf"random weights: {missing}.*saved as {kind}"):
            ll.attribute(model, IDS, target=target, **asked)
    with pytest.raises(InputError, match="random weights"):
        ll.patching.patch(model, IDS, OTHER, ll.logit_difference(9, 17), progress=False)
    ll.attribute(model, IDS, maps="attn", layers=[0], progress=False)  # needs no head
    for other in (copy.deepcopy(model), copy.deepcopy(model).to(torch.bfloat16)):
        with pytest.raises(InputError, match="random weights"):
            ll.attribute(other, IDS, target=ll.logit_difference(9, 17), **asked)
    for name, weight in model.original_model.named_parameters():
        if "lm_head" in name or "cls" in name:
            weight.data.normal_()
    ll.attribute(model, IDS, target=ll.logit_difference(9, 17), layers=[1], **asked)  # trained weights were put in


def test_another_head_than_the_models_own_is_named(tmp_path: Path) -> None:
    saved("GPT2ForTokenClassification", tmp_path, **GPT2)
    model = ll.load_model(str(tmp_path), device="cpu")
    with pytest.raises(InputError, match=r"saved as GPT2ForTokenClassification, .* loaded as GPT2LMHeadModel"):
        ll.attribute(model, IDS, corrupted=OTHER, target=ll.logit_difference(9, 17), progress=False)


def test_blocks_that_were_never_loaded_are_named(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    saved("GPT2LMHeadModel", tmp_path, **GPT2)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["transformer.h.1.attn.c_proj.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"lacks weights of its blocks: transformer\.h\.1\.attn\.c_proj\.weight"):
        ll.load_model(str(tmp_path))


@pytest.mark.parametrize(
    "kind, config",
    [
        ("FunnelModel", {"vocab_size": VOCAB, "d_model": 32, "n_head": 4, "d_head": 8, "block_sizes": [1, 1]}),
        ("xLSTMForCausalLM", {"vocab_size": VOCAB, "hidden_size": 32, "num_blocks": 2, "num_heads": 4}),
        ("MiniMaxForCausalLM", {**GQA, "head_dim": 8, "num_local_experts": 2}),
    ],
)
def test_a_family_that_is_not_served_is_named(kind: str, config: dict[str, Any], tmp_path: Path) -> None:
    model_class = getattr(transformers, kind)
    model_class(model_class.config_class(**config)).save_pretrained(tmp_path)
    with pytest.raises(InputError, match=rf"{kind} \(model_type '\w+'\) is served neither by"):
        ll.load_model(str(tmp_path))


def test_a_bridge_that_computes_something_else_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An adapter that changes weights."""

    def careless(of_transformer_lens: type) -> type:
        class Careless(of_transformer_lens):  # type: ignore[misc]
            def prepare_model(self, hf_model: Any) -> None:
                super().prepare_model(hf_model)
                for layer in hf_model.model.layers:
                    layer.self_attn.o_proj.weight.data *= 2

        return Careless

    monkeypatch.setattr("lig_lens.models.served.MENDED", {"Qwen2ForCausalLM": careless})
    saved("Qwen2ForCausalLM", tmp_path, **GQA)
    with pytest.warns(ll.BridgeWarning, match="gives other logits than the plain Qwen2ForCausalLM"):
        ll.load_model(str(tmp_path), device="cpu")


@pytest.mark.parametrize(
    "kind, config, dtype, message",
    [
        ("GPTBigCodeForCausalLM", {**GPT2, "multi_query": False}, "float32", "only supports multi_query=True"),
    ],
)
def test_what_cannot_be_served_is_refused_on_loading(
    kind: str, config: dict[str, Any], dtype: str, message: str, tmp_path: Path
) -> None:
    saved(kind, tmp_path, **config)
    with pytest.raises(InputError, match=message):
        ll.load_model(str(tmp_path), device="cpu", dtype=dtype)


def test_what_neither_the_bridge_nor_the_plain_model_can_run_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """XGLM in float64, as it is without this package's adapter."""
    monkeypatch.setattr("lig_lens.models.served.MENDED", {})
    saved("XGLMForCausalLM", tmp_path, **FAMILIES["XGLMForCausalLM"].config)
    with pytest.raises(InputError, match=r"cannot run in float64 .* and neither can the plain XGLMForCausalLM"):
        ll.load_model(str(tmp_path), device="cpu", dtype="float64")


def test_a_classifier_of_another_shape_is_named(tmp_path: Path) -> None:
    config = {"vocab_size": VOCAB, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
    saved("T5ForSequenceClassification", tmp_path, **config)
    with pytest.raises(InputError, match="T5ForSequenceClassification is no classifier that lig_lens knows"):
        ll.load_model(str(tmp_path))


def test_names_of_transformer_lens_stand_for_hub_ids() -> None:
    assert _without_alias("gpt2-small") == "gpt2" and _without_alias("no/alias") == "no/alias"


@pytest.mark.parametrize("kind, config", [("GPT2LMHeadModel", GPT2), ("LlamaForCausalLM", GQA)])
def test_no_tokenizer_is_made_up(kind: str, config: dict[str, Any], tmp_path: Path) -> None:
    """Of a folder without one, transformers makes a tokenizer that reads every text as special tokens, or refuses."""
    saved(kind, tmp_path, **config)
    for file in tmp_path.glob("tokenizer*"):
        file.unlink()
    model = ll.load_model(str(tmp_path), device="cpu")
    with pytest.raises(InputError, match="has no tokenizer: pass the prompt as token ids"):
        ll.attribute(model, "w1 w2", progress=False)
    assert ll.attribute(model, IDS, maps="attn", layers=[0], progress=False).tokens == tuple(map(str, IDS))


def test_code_that_comes_with_a_model_is_not_run(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "own", "auto_map": {"AutoConfig": "conf_own.C"}}')
    (tmp_path / "conf_own.py").write_text("print('it ran')")
    with pytest.raises(InputError, match="code that comes with it, which is not run unasked"):
        ll.load_model(str(tmp_path))
    assert capfd.readouterr().out == ""
