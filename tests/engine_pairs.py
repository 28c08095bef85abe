"""The same attribution by both engines, and how far apart they are."""

import torch

import lig_lens


def both(model: object, ids: object, maps: str | tuple[str, ...], baseline: str, target: object, **options: object):
    names, n_pos = (maps,) if isinstance(maps, str) else maps, len(ids)
    generator = torch.Generator().manual_seed(3)
    start = torch.randn(n_pos, model.cfg.d_model, generator=generator) if baseline == "tensor" else baseline
    extra = {"corrupted": [(i + 11) % 35 + 5 for i in range(n_pos)]} if baseline == "corrupted" else {}
    flows = [
        lig_lens.attribute(
            model, ids, maps=names, target=target, engine=engine, progress=False,
            **{f"{name}_baseline": start for name in names}, **extra, **options,
        )
        for engine in ("closed_form", "hooks")
    ]  # fmt: skip
    for name in names:
        assert set(flows[0].engines[name]) == {"closed_form"} and set(flows[1].engines[name]) == {"hooks"}
    return flows


def difference(flows: list[lig_lens.Flow], name: str) -> float:
    fast, slow = (getattr(flow, name) for flow in flows)
    return float((fast - slow).abs().max() / slow.abs().max())
