"""What a baseline is."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from jaxtyping import Float, Int
from torch import Tensor

from lig_lens.arguments import checked
from lig_lens.blocks.values import Values
from lig_lens.errors import InputError, check_choice
from lig_lens.names import MAPS
from lig_lens.paths import BASELINES, BaselineEntry, baselines_of
from lig_lens.paths.columns import Columns
from lig_lens.paths.path import ResidPath, TailPath, TailStart


@dataclass(frozen=True)
class Place:
    """Where a path runs: one layer of one prompt.

    Attributes:
        values: of the prompt at the block.
        corrupted: of the second prompt there, if there is one.
        index: of the layer among those that were asked for.
        chunk: prompts that may be run through the block at once.
    """

    values: Values
    corrupted: Values | None
    index: int
    chunk: int

    @property
    def second(self) -> Values:
        """Values of the second prompt.

        Raises:
            InputError: there is none.
        """
        if self.corrupted is None:
            raise InputError("This baseline needs a second prompt: pass corrupted=... as well.")
        return self.corrupted


class Baseline:
    """Where a path of integration starts, and how its columns are refilled.

    A baseline of the `attn` or `block` map gives `resid_start`, one of the `mlp` map `tail_start`; which maps a name is
    for stands in its entry (`lig_lens.paths`).
    """

    def resid_start(self, place: Place) -> Float[Tensor, "pos d_model"] | None:
        """Residual vectors at the start, one set for all destinations.

        None means that every position starts at the destination's own vector, so that each destination has its path.
        """
        raise InputError(
            f"{type(self).__name__} gives no start for residual vectors: it is not for 'attn' and 'block'."
        )

    def tail_start(self, place: Place, dst: Int[Tensor, "dst"]) -> TailStart:
        """Head outputs and skip connection at the start; only the positions `dst` are meant to be used."""
        raise InputError(f"{type(self).__name__} gives no start for head outputs: it is not for 'mlp'.")

    def refill(
        self, columns: Columns, solve: Callable[["Baseline", float], Columns], place: Place, dst: Int[Tensor, "dst"]
    ) -> Columns:
        """What becomes of the columns once they are integrated; by default they stay.

        Args:
            columns: [head src dst], along this baseline's path.
            solve: gives the columns along another baseline's path; the second argument is the tolerance in units of
                the one that was asked for.
            place: the layer and the prompt.
            dst: positions of the columns.
        """
        return columns

    def check(self, map_name: str, node_shape: tuple[int, ...], n_layers: int) -> None:
        """Raise InputError if the baseline does not fit a prompt; see `chosen_baseline`."""

    def check_block(self, values: Values) -> None:
        """Raise InputError if a block lacks what the baseline needs; before anything is integrated."""

    def resid_path(self, place: Place) -> ResidPath:
        """Path of the `attn` or `block` map."""
        return ResidPath(place.values.resid_pre, self.resid_start(place))

    def tail_path(self, place: Place, dst: Int[Tensor, "dst"]) -> TailPath:
        """Path of the `mlp` map."""
        start, values = self.tail_start(place, dst), place.values
        return TailPath(start.z, values.heads.z, start.skip, values.resid_pre, start.bias)


@checked
def register_baseline(
    name: str,
    baseline: object,
    *,
    maps: Sequence[str],
    shared: bool = False,
    second_prompt: bool = False,
    pattern: bool = False,
) -> None:
    """Make a baseline of your own known under a name, in `attribute`, in flags and in config files.

    Args:
        name: under which Flows record it.
        baseline: an object, or its class.
        maps: that it is for, any of `attn`, `mlp` and `block`.
        shared: all destinations have one path, so that it can go with a metric.
        second_prompt: it needs a corrupted prompt.
        pattern: it needs the attention pattern.

    Raises:
        InputError: a name that is taken or cannot be one, an unknown map, or something else than a `Baseline`.
    """
    kind = baseline if isinstance(baseline, type) else type(baseline)
    if not issubclass(kind, Baseline):
        raise InputError(f"register_baseline: {kind.__name__} is no Baseline: make it a subclass of lig_lens.Baseline.")
    if not maps:
        raise InputError(f"register_baseline: maps={maps!r}: give a list of maps, such as ['attn', 'block'].")
    chosen = tuple(check_choice("map", one, MAPS) for one in maps)
    BASELINES.add(name, BaselineEntry(baseline, chosen, shared, second_prompt, pattern))


def chosen_baseline(
    map_name: str, baseline: object, n_layers: int, node_shape: tuple[int, ...], has_corrupted: bool
) -> Baseline:
    """Return the baseline that a name or a tensor stands for, if it fits a prompt.

    Args:
        map_name: `attn`, `mlp` or `block`.
        baseline: a name, or a tensor of `node_shape`, with a leading axis of `n_layers` if it differs by layer.
        n_layers: number of layers asked for.
        node_shape: [pos, d_model] for attn and block, [pos, head, d_head] for mlp.
        has_corrupted: whether a corrupted prompt was given.

    Raises:
        InputError: unknown name, wrong shape, or no second prompt where one is needed.
    """
    if isinstance(baseline, Tensor):
        chosen: Baseline = TensorBaseline(baseline)
    else:
        name = check_choice(f"{map_name}_baseline", baseline, baselines_of(map_name))
        if BASELINES.entry(name).second_prompt and not has_corrupted:
            raise InputError(f"{map_name}_baseline={name!r} needs a second prompt: pass corrupted=... as well.")
        chosen = BASELINES[name]
    chosen.check(map_name, node_shape, n_layers)
    return chosen


def describe_baseline(baseline: object) -> str:
    """Name of a baseline, as a Flow records it."""
    return f"tensor{list(baseline.shape)}" if isinstance(baseline, Tensor) else str(baseline)


@dataclass(frozen=True, eq=False)
class TensorBaseline(Baseline):
    """The user's own vectors, of all layers or for each of them."""

    tensor: Tensor

    def check(self, map_name: str, node_shape: tuple[int, ...], n_layers: int) -> None:
        """See the base class."""
        if not self.tensor.is_floating_point() or self.tensor.is_meta:
            what = "is on the meta device, without numbers" if self.tensor.is_meta else f"has dtype {self.tensor.dtype}"
            raise InputError(f"{map_name}_baseline {what}: give a tensor of floating point numbers.")
        if tuple(self.tensor.shape) not in (node_shape, (n_layers, *node_shape)):
            raise InputError(
                f"{map_name}_baseline has shape {list(self.tensor.shape)}: this prompt needs {list(node_shape)} or, "
                f"one per layer, {[n_layers, *node_shape]}."
            )
        if not bool(self.tensor.isfinite().all()):
            raise InputError(f"{map_name}_baseline holds NaN or infinite values.")

    def resid_start(self, place: Place) -> Float[Tensor, "pos d_model"]:
        """See the base class."""
        return self._at(place.index, place.values.resid_pre)

    def tail_start(self, place: Place, dst: Int[Tensor, "dst"]) -> TailStart:
        """See the base class."""
        return TailStart(self._at(place.index, place.values.heads.z), place.values.resid_pre)

    def _at(self, index: int, like: Tensor) -> Tensor:
        tensor = self.tensor[index] if self.tensor.ndim > like.ndim else self.tensor
        return tensor.detach().to(like)
