"""Rules by which a model's functions are taken to be linear where they are: what intercepts them, and tells them apart.

At a prompt, a function `y = f(x_1, x_2, ...)` of activations is taken for `y = c + J_1 x_1 + J_2 x_2 + ...`:

- functions that are affine in what they get: J is their gradient; `c` is their bias, a position's embedding, a mask;
- norms: what they divide by is held, so that `c` is their bias;
- functions of single numbers (GELU, SiLU, ReLU, tanh): the slope f(x) / x is held;
- products of two activations, and softmax: as a method has it.

All else has no rule, and is refused: a number that some function let through by chance would look like any other.
"""

import contextlib
import math
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.overrides import TorchFunctionMode

from lig_lens.errors import InputError

# By name, whether torch's, a tensor's or of torch.nn.functional, in place or not; operators by their word.
_LINEAR = frozenset(
    "neg view view_as reshape reshape_as flatten unflatten squeeze unsqueeze transpose permute swapaxes movedim t get "
    "getitem expand expand_as repeat repeat_interleave tile broadcast_to cat concat stack hstack vstack split chunk "
    "unbind narrow select index_select gather take_along_dim roll flip clone contiguous to type type_as float double "
    "half bfloat16 cpu dropout dropout2d alpha_dropout feature_dropout mean sum cumsum embedding requires_grad "
    "as_strided diagonal tril triu unfold avg_pool1d avg_pool2d adaptive_avg_pool1d "
    "adaptive_avg_pool2d zeros_like ones_like empty_like full_like".split()
)
_AFFINE = frozenset(
    "add iadd radd sub isub rsub subtract linear addmm addbmm baddbmm where masked_fill conv1d conv2d conv3d pad "
    "index_put masked_scatter scatter lerp".split()
)
_MAPS = frozenset("linear addmm addbmm baddbmm conv1d conv2d conv3d".split())  # of one activation
_PRODUCTS = frozenset("mul imul rmul multiply matmul rmatmul mm bmm einsum".split())
_QUOTIENTS = frozenset("div itruediv truediv divide true_divide".split())
_SINGLE = frozenset(
    "gelu silu relu relu6 leaky_relu elu selu celu mish softplus hardswish hardsigmoid hardtanh tanh sigmoid "
    "logsigmoid softsign exp expm1 log1p erf square pow ipow clamp clip clamp_min clamp_max abs".split()
)
_HELD = frozenset("sqrt rsqrt std var norm vector_norm linalg_vector_norm linalg_norm detach".split())


class Rules(TorchFunctionMode, ABC):
    """While it is entered, what is computed from activations goes by rules; values stay what they are.

    Two things can be done with `y = c + J_1 x_1 + ...`: `propagation.py` hands relevance back through J,
    `decomposition.py` sends parts of the inputs on through it.
    """

    def __init__(self, method: str, *, hold_softmax: bool) -> None:
        """State the rules.

        Args:
            method: name of the method whose they are, for messages.
            hold_softmax: whether softmax is held, else its gradient is taken.
        """
        super().__init__()
        self.method, self.hold_softmax = method, hold_softmax
        self._inside = 0  # modules that are one function of single numbers, one within another

    @abstractmethod
    def is_hot(self, value: Tensor) -> bool:
        """Whether a tensor is an activation that rules are about."""

    @abstractmethod
    def passed(self, name: str, output: Any, n_hot: int) -> Any:
        """What a function that is linear in its activations put out, of how many of them."""

    @abstractmethod
    def shifted(self, output: Tensor, constant: Tensor) -> Tensor:
        """What a function put out that adds a constant to something linear."""

    @abstractmethod
    def product(self, output: Tensor) -> Tensor:
        """A product of two activations."""

    @abstractmethod
    def held(self, output: Tensor) -> Tensor:
        """What is held: no activation any more."""

    @abstractmethod
    def single(self, func: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """A function of single numbers."""

    @abstractmethod
    def normed(self, value: Tensor, x: Tensor, norm: "Norm") -> Tensor:
        """A norm's output, and how it is made."""

    def softmax(self, value: Tensor, x: Tensor) -> Tensor:
        """A softmax whose gradient is taken."""
        raise self.unknown("softmax")

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        hot = [one for one in _tensors((args, kwargs)) if self.is_hot(one)]
        if self._inside or not hot:
            return func(*args, **kwargs)
        name = str(getattr(func, "__name__", func)).strip("_")
        first = hot[0] if len(hot) == 1 and _first(args, kwargs) is hot[0] else None
        if name in _LINEAR or (name in _QUOTIENTS and first is not None):
            return self.passed(name, func(*args, **kwargs), len(hot))
        if name in _AFFINE and not (name in _MAPS and len(hot) > 1):
            constant = self._constant(name, func, args, kwargs)  # before the call, which may work in place
            output = self.passed(name, func(*args, **kwargs), len(hot))
            return output if constant is None else self.shifted(output, constant.expand(output.shape))
        if name in _PRODUCTS and len(hot) <= 2:
            output = func(*args, **kwargs)
            return self.product(output) if len(hot) == 2 else self.passed(name, output, 1)
        if name in _HELD or (name == "pow" and _is_root(*args, **kwargs)):
            return self.held(func(*args, **kwargs))
        if name in _SINGLE and first is not None:
            rest = {key: value for key, value in kwargs.items() if key not in ("input", "inplace")}
            return self.single(lambda x: func(x, *args[1:], **rest), first)
        if name == "softmax":
            output = func(*args, **kwargs)
            return self.held(output) if self.hold_softmax else self.softmax(output, hot[0])
        if name in _NORMS and first is not None:
            return self.normed(func(*args, **kwargs), first, _NORMS[name](*args, **kwargs))
        if name == "scaled_dot_product_attention":
            with self:
                return _attention(*args, **kwargs)
        output = func(*args, **kwargs)
        live = [one for one in _tensors(output) if one.is_floating_point()]
        if any(one.requires_grad or not torch.is_grad_enabled() for one in live):
            raise self.unknown(name)
        return output

    def unknown(self, name: str) -> InputError:
        """The error for something without a rule."""
        return InputError(
            f"method={self.method!r} has no rule for {name!r}, which this model calls on its activations: take a "
            "method that needs none, such as 'ig' or 'ca_lig'."
        )

    def _constant(self, name: str, func: Any, args: Any, kwargs: Any) -> Tensor | None:
        """What an affine function makes of no activations; None for nothing."""
        if name == "linear":
            found = args[2] if len(args) > 2 else kwargs.get("bias")
        else:
            empty = self._zeroed(args), {key: self._zeroed(value) for key, value in kwargs.items()}
            with torch.no_grad():
                found = func(*empty[0], **empty[1])
        return found if found is not None and bool((found != 0).any()) else None

    def _zeroed(self, value: Any) -> Any:
        """An argument with nothing in its activations; others are copies, which may be written to."""
        if isinstance(value, Tensor):
            return torch.zeros_like(value) if self.is_hot(value) else value.clone()
        return type(value)(map(self._zeroed, value)) if isinstance(value, (tuple, list)) else value

    @contextlib.contextmanager
    def aside(self) -> Iterator[None]:
        """Compute something that rules are not about."""
        self._inside += 1
        try:
            yield
        finally:
            self._inside -= 1

    @contextlib.contextmanager
    def over(self, model: nn.Module) -> Iterator[None]:
        """Be entered, with modules that are one function of single numbers taken whole, however they compute it.

        GPT-2's GELU is a product of its input with something else made of that: rules for products would share it.
        """
        thread = threading.get_ident()

        # These hooks are there for all modules of the process, whoever runs them.
        def before(module: nn.Module, args: Any) -> None:
            self._inside += int(self._may_be_single(module, args, thread))

        def after(module: nn.Module, args: Any, output: Any) -> Any:
            if not self._may_be_single(module, args, thread):
                return None
            self._inside -= 1
            if self._inside or output is args[0] or not isinstance(output, Tensor):
                return None
            with self.aside():
                if is_single(module.forward, args[0], output):
                    return self.single(module.forward, args[0])
            return module.forward(args[0])

        with _functions_as_modules(model), register_module_forward_pre_hook(before):
            with register_module_forward_hook(after), self:
                yield

    def _may_be_single(self, module: nn.Module, args: Any, thread: int) -> bool:
        if threading.get_ident() != thread or module._parameters or module._buffers or module._modules:
            return False
        return len(args) == 1 and isinstance(args[0], Tensor) and self.is_hot(args[0])


def is_single(func: Callable[[Tensor], Any], x: Tensor, output: Tensor) -> bool:
    """Whether each number of an output comes from the number in its place: it then goes where that goes."""
    if output.shape != x.shape or x.ndim == 0:
        return False
    with torch.no_grad():
        item, generator = x[:1], torch.Generator().manual_seed(0)
        order = torch.randperm(item.numel(), generator=generator).to(x.device)
        kept = (torch.rand(item.numel(), generator=generator) < 0.5).to(x.device)
        moved = item.flatten()[order]  # to other places, between other numbers
        given = func(torch.where(kept, moved, 1 - 2 * moved).reshape(item.shape)).flatten()
        return torch.allclose(given[kept], output[:1].flatten()[order][kept], rtol=1e-5, atol=1e-7)


class _Function(nn.Module):
    """A function as a module."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, **kwargs)


@contextlib.contextmanager
def _functions_as_modules(model: nn.Module) -> Iterator[None]:
    """Let plain functions that modules keep as their activation be modules for a while, so that hooks see them."""
    put = [
        (module, name, value)
        for module in model.modules()
        for name, value in list(vars(module).items())
        if name.startswith("act") and callable(value) and not isinstance(value, (nn.Module, type))
    ]
    try:
        for module, name, value in put:
            module.__dict__[name] = _Function(value)
        yield
    finally:
        for module, name, value in put:
            module.__dict__[name] = value


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    return [one for part in value for one in _tensors(part)] if isinstance(value, (tuple, list)) else []


def _is_root(_base: Any, exponent: Any = None, **_: Any) -> bool:
    """Whether a power is a square root, or divides."""
    return isinstance(exponent, (int, float)) and (exponent < 0 or exponent == 0.5)


def _first(args: Any, kwargs: Any) -> Any:
    return args[0] if args else kwargs.get("input")


def slope(func: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    """A function of single numbers, and f(x) / x, at 0 its gradient."""
    with torch.no_grad():
        value, nought = func(x.clone()), x == 0
        found = value / x.masked_fill(nought, 1.0)
    if bool(nought.any()):
        with torch.enable_grad():
            at = x.detach().clone().requires_grad_()
            (gradient,) = torch.autograd.grad(func(at.clone()).sum(), at)
        found = torch.where(nought, gradient, found)
    return value, found


@dataclass(frozen=True)
class Norm:
    """How a norm makes its output: activations, the mean taken off or not, divided and multiplied.

    Attributes:
        dims: axes that are normed.
        eps: what is added to the mean square.
        weight: what is multiplied with.
        centred: whether the mean is taken off.
    """

    dims: tuple[int, ...]
    eps: float
    weight: Tensor | None
    centred: bool

    def divisor(self, x: Tensor) -> Tensor:
        """What it divides by."""
        return (self._middle(x).square().mean(self.dims, keepdim=True) + self.eps).sqrt()

    def over(self, x: Tensor, divisor: Tensor) -> Tensor:
        """What it makes of activations when it divides by something that is held, its bias left out."""
        scaled = self._middle(x) / divisor
        return scaled if self.weight is None else scaled * self.weight

    def _middle(self, x: Tensor) -> Tensor:
        return x - x.mean(self.dims, keepdim=True) if self.centred else x


def _layer_norm(
    _x: Any, normalized_shape: Any, weight: Any = None, _bias: Any = None, eps: float = 1e-5, **_: Any
) -> Norm:
    return Norm(tuple(range(-len(normalized_shape), 0)), eps, weight, centred=True)


def _rms_norm(input: Tensor, normalized_shape: Any, weight: Any = None, eps: float | None = None) -> Norm:
    eps = torch.finfo(input.dtype).eps if eps is None else eps
    return Norm(tuple(range(-len(normalized_shape), 0)), eps, weight, centred=False)


_NORMS: dict[str, Callable[..., Norm]] = {"layer_norm": _layer_norm, "rms_norm": _rms_norm}


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """The same in its parts, each of which has a rule."""
    if enable_gqa:
        groups = query.shape[-3] // key.shape[-3]
        key, value = key.repeat_interleave(groups, -3), value.repeat_interleave(groups, -3)
    scores = (query @ key.transpose(-2, -1)) * (1 / math.sqrt(query.shape[-1]) if scale is None else scale)
    if is_causal:
        allowed = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
        scores = scores.masked_fill(~allowed, -torch.inf)
    if attn_mask is not None:
        hides = attn_mask.dtype == torch.bool
        scores = scores.masked_fill(~attn_mask, -torch.inf) if hides else scores + attn_mask
    return scores.softmax(-1) @ value
