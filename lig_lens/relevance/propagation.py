"""Rules under which a backward pass hands relevance back: gradient times input of a model with some parts held.

Layer-wise relevance propagation of a function `y = f(x_1, x_2, ...)` takes it for `y = c + J_1 x_1 + J_2 x_2 + ...` at
the point where the model is. Relevance of `x_i` is then `x_i` times what a backward pass through J brings there, and
`c` times what arrives at y is kept: it belongs to no input. What J is:

- functions that are affine in what they get: their gradient; `c` is their bias, a position's embedding, a mask;
- norms: what they divide by is held, so that `c` is their bias;
- functions of single numbers (GELU, SiLU, ReLU, tanh): the slope f(x) / x is held;
- products of two activations: half of the relevance goes to either, `J = x_2 / 2` and `x_1 / 2`;
- softmax: its gradient, or nothing, which holds it.

All else has no rule, and is refused: a number that some function let through by chance would look like any other.
"""

import contextlib
import math
import threading
from collections.abc import Callable, Iterator
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
    "gelu silu relu relu6 leaky_relu elu selu celu mish softplus hardswish hardsigmoid hardtanh tanh sigmoid logsigmoid "
    "softsign exp expm1 log1p erf square pow ipow clamp clip clamp_min clamp_max abs".split()
)
_DIVISORS = frozenset("sqrt rsqrt std var norm vector_norm linalg_vector_norm linalg_norm".split())


class Propagation(TorchFunctionMode):
    """While it is entered, what is computed from activations with a gradient has one by the rules; values are the same.

    It counts what biases and the like keep, by `stage`: whoever runs the model moves that on.

    Attributes:
        stage: how many blocks have run.
        kept: relevance that belongs to no input, by stage; filled in by the backward pass.
    """

    def __init__(self, method: str, *, hold_softmax: bool, refuse_products: bool = False) -> None:
        """State the rules.

        Args:
            method: name of the method whose they are, for messages.
            hold_softmax: whether softmax is held, else its gradient is taken.
            refuse_products: whether products of two activations have no rule.
        """
        super().__init__()
        self.method, self.hold_softmax, self.refuse_products = method, hold_softmax, refuse_products
        self.stage = 0
        self.kept: dict[int, float] = {}
        self._inside = 0  # modules that are one function of single numbers, one within another

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        hot = [one for one in _tensors((args, list(kwargs.values()))) if one.requires_grad]
        if self._inside or not hot or not torch.is_grad_enabled():
            return func(*args, **kwargs)
        name = str(getattr(func, "__name__", func)).strip("_")
        if name in _LINEAR:
            return func(*args, **kwargs)
        if name in _AFFINE:
            return self._affine(name, func, args, kwargs)
        if name in _PRODUCTS:
            return self._product(func(*args, **kwargs), len(hot))
        if name in _SINGLE and len(hot) == 1 and _first(args, kwargs) is hot[0]:
            rest = {key: value for key, value in kwargs.items() if key not in ("input", "inplace")}
            return self._single(lambda x: func(x, *args[1:], **rest), hot[0])
        if name in _QUOTIENTS and len(hot) == 1 and _first(args, kwargs) is hot[0]:
            return func(*args, **kwargs)
        if name in _DIVISORS or name == "pow" and _is_root(*args, **kwargs):
            return func(*args, **kwargs).detach()
        if name == "softmax":
            return self._softmax(func(*args, **kwargs), hot[0])
        if name in _NORMS:
            return self._as(func(*args, **kwargs), _NORMS[name](*args, **kwargs))
        if name == "scaled_dot_product_attention":
            with self:
                return _attention(*args, **kwargs)
        output = func(*args, **kwargs)
        if any(one.requires_grad for one in _tensors(output)):
            raise self._unknown(name)
        return output

    def _unknown(self, name: str) -> InputError:
        return InputError(
            f"method={self.method!r} has no rule for {name!r}, which this model calls on its activations: take a method "
            "that needs none, such as 'ig' or 'ca_lig'."
        )

    def _affine(self, name: str, func: Any, args: Any, kwargs: Any) -> Any:
        if name in _MAPS and sum(map(_hot, _tensors((args, kwargs)))) > 1:
            raise self._unknown(f"{name} with weights made of activations")
        with torch.no_grad():  # before the call, which may work in place
            constant = func(*_zeroed(args), **{key: _zeroed(value) for key, value in kwargs.items()})
        output = func(*args, **kwargs)
        if bool((constant != 0).any()):
            self.keep(output, constant)
        return output

    def _product(self, output: Tensor, n_hot: int) -> Tensor:
        if n_hot == 1:
            return output
        if self.refuse_products or n_hot > 2:
            raise self._unknown("a product of activations")
        return output / 2 + (output / 2).detach()

    def _single(self, func: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        with torch.no_grad():
            value, nought = func(x.clone()), x == 0
            slope = value / x.masked_fill(nought, 1.0)
        if bool(nought.any()):
            with torch.enable_grad():
                at = x.detach().clone().requires_grad_()
                (gradient,) = torch.autograd.grad(func(at.clone()).sum(), at)
            slope = torch.where(nought, gradient, slope)
        return self._as(value, slope * x)

    def _as(self, value: Tensor, linear: Tensor) -> Tensor:
        """A value with the gradient of something else, to which a constant is added; that is kept."""
        output = value.detach() + (linear - linear.detach())
        self.keep(output, value - linear.detach())
        return output

    def _softmax(self, value: Tensor, x: Tensor) -> Tensor:
        if self.hold_softmax:
            return value.detach()
        with torch.no_grad():
            weighted = torch.where(value == 0, 0.0, value * x)  # what is masked is -inf
            constant = value - weighted + value * weighted.sum(-1, keepdim=True)
        self.keep(value, constant)
        return value

    def keep(self, output: Tensor, constant: Tensor) -> None:
        """Count what a constant keeps of the relevance that will arrive at an output that holds it."""
        stage, constant = self.stage, constant.detach()

        def count(gradient: Tensor) -> None:
            share = torch.where(gradient == 0, 0.0, gradient * constant)
            self.kept[stage] = self.kept.get(stage, 0.0) + float(share.double().sum())

        output.register_hook(count)

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
            if is_single(module.forward, args[0], output):
                self._inside += 1
                try:
                    return self._single(module.forward, args[0])
                finally:
                    self._inside -= 1
            return module.forward(args[0])

        with _functions_as_modules(model), register_module_forward_pre_hook(before):
            with register_module_forward_hook(after), self:
                yield

    @staticmethod
    def _may_be_single(module: nn.Module, args: Any, thread: int) -> bool:
        alone = not (module._parameters or module._buffers or module._modules)
        return alone and len(args) == 1 and _hot(args[0]) and threading.get_ident() == thread


def is_single(func: Callable[[Tensor], Any], x: Tensor, output: Tensor) -> bool:
    """Whether each number of an output comes from the number in its place: it then goes where that goes."""
    if output.shape != x.shape:
        return False
    with torch.no_grad():
        order = torch.randperm(x.numel(), generator=torch.Generator().manual_seed(0)).to(x.device)
        moved = func(x.flatten()[order].reshape(x.shape))
        return bool(torch.equal(moved.flatten(), output.flatten()[order]))


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


def _hot(value: Any) -> bool:
    return isinstance(value, Tensor) and value.requires_grad


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


def _zeroed(value: Any) -> Any:
    """An argument with nothing in its activations; others are copies, which may be written to."""
    if isinstance(value, Tensor):
        return torch.zeros_like(value) if _hot(value) else value.clone()
    return type(value)(_zeroed(one) for one in value) if isinstance(value, (tuple, list)) else value


def _layer_norm(
    input: Tensor, normalized_shape: Any, weight: Any = None, bias: Any = None, eps: float = 1e-5, **_: Any
) -> Tensor:
    dims = tuple(range(-len(normalized_shape), 0))
    centred = input - input.mean(dims, keepdim=True)
    scaled = centred / (centred.square().mean(dims, keepdim=True) + eps).sqrt().detach()
    return scaled if weight is None else scaled * weight


def _rms_norm(input: Tensor, normalized_shape: Any, weight: Any = None, eps: float | None = None, **_: Any) -> Tensor:
    dims, eps = tuple(range(-len(normalized_shape), 0)), torch.finfo(input.dtype).eps if eps is None else eps
    scaled = input / (input.square().mean(dims, keepdim=True) + eps).sqrt().detach()
    return scaled if weight is None else scaled * weight


# Norms without their bias, what divides held.
_NORMS: dict[str, Callable[..., Tensor]] = {"layer_norm": _layer_norm, "rms_norm": _rms_norm}


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
