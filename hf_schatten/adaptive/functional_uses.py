"""What weights are multiplied with that are read and not called.

Such are Mamba's ``dt_proj``, attention's ``in_proj_weight`` and experts that their layer reads one by one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, multi_head_attention_forward
from torch.overrides import TorchFunctionMode

from hf_schatten.matrices.layout import matrix_name

# Takes the inputs (..., n) of a weight, by its name and that of its part or expert.
Offer = Callable[[str, Tensor], None]

_MULTIPLICATIONS = (torch.mul, torch.multiply, Tensor.mul, Tensor.__mul__, Tensor.__rmul__)
_PRODUCTS = (torch.matmul, torch.mm, torch.bmm, Tensor.matmul, Tensor.mm, Tensor.bmm, Tensor.__matmul__)


class _Watched(NamedTuple):
    """A weight that is looked for."""

    name: str
    weight: Tensor  # all of it, or what its rows were multiplied by numbers to


class _Use(NamedTuple):
    """A weight that a function gets."""

    view: Tensor  # what the function gets: the weight, or a view of it
    weight: Tensor  # all of it


class _Found(NamedTuple):
    """What a weight is multiplied with."""

    part: str  # or expert of the weight, "" for all of it
    inputs: Tensor  # (..., n)


_All = Iterator[_Found]


class FunctionalUses(TorchFunctionMode):
    """A mode that sees all functions of a forward, and offers the inputs of the weights that no module is called with.

    A weight whose module is called is sampled by that module's hook, which says so by :meth:`called`, and is not
    looked for again. So only the first forward that is watched looks at every layer.

    Args:
        layers: the module that owns each parameter, by the parameter's name.
        offer: called in the backward pass, as soon as a gradient comes back to a product.
    """

    def __init__(self, layers: Mapping[str, nn.Module], offer: Offer) -> None:
        super().__init__()
        self._watched = dict(layers)
        self._offer = offer
        self._weights: dict[int, _Watched] = {}  # by the address of the storage
        self._pending: dict[str, list[list[_Found]]] = {}
        self._watching = False

    def begin(self) -> None:
        """Watch the forward that begins, if any weight is left to look for."""
        if self._watched and not self._watching:
            weights = ((name, getattr(module, name.rpartition(".")[2])) for name, module in self._watched.items())
            self._weights = {address: _Watched(*pair) for pair in weights if (address := _address(pair[1]))}
            self._watching = True
            self.__enter__()

    def end(self) -> None:
        """Watch no longer."""
        if self._watching:
            self.__exit__(None, None, None)
            self._watching = False
            self._pending.clear()
            self._weights.clear()

    def called(self, name: str) -> None:
        """Forget a weight, since its module is called."""
        if self._watched.pop(name, None) is not None:
            for found in self._pending.pop(name, []):
                found.clear()

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Call the function, and note what the weights among its arguments are multiplied with."""
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        if not torch.is_grad_enabled():
            return output
        if func in _READERS:
            product = output[0] if isinstance(output, tuple) else output
            if isinstance(product, Tensor) and product.requires_grad:
                for view, watched in self._watched_among(args):
                    found = list(_READERS[func](_Use(view, watched.weight), args, kwargs))
                    self._note(watched, found, product)
        elif func in _MULTIPLICATIONS and len(args) == 2:
            for view, watched in self._watched_among(args):
                self._follow(watched, args[args[0] is view], output)
        return output

    def _watched_among(self, args: tuple[Any, ...]) -> Iterator[tuple[Tensor, _Watched]]:
        """Yield the arguments that are views of watched weights, with these."""
        for view in args:
            watched = self._weights.get(_address(view)) if isinstance(view, Tensor) else None
            if watched is not None and watched.name in self._watched:
                yield view, watched

    def _follow(self, watched: _Watched, factor: Any, scaled: Tensor) -> None:
        """Watch what a weight's rows were multiplied by numbers to, whose inputs are the weight's."""
        by_rows = not isinstance(factor, Tensor) or factor.ndim == 0 or factor.shape[-1] == 1
        if by_rows and scaled.shape == watched.weight.shape and scaled.ndim == 2 and (address := _address(scaled)):
            self._weights[address] = _Watched(watched.name, scaled)

    def _note(self, watched: _Watched, found: list[_Found], product: Tensor) -> None:
        self._pending.setdefault(watched.name, []).append(found)

        def offer(gradient: Tensor) -> None:
            while found:
                part, inputs = found.pop()
                self._offer(matrix_name(watched.name, part), inputs)

        product.register_hook(offer)


def _address(tensor: Tensor) -> int:
    """Return where the storage of a tensor and of all its views begins, 0 of one without memory or in shards."""
    return tensor.untyped_storage().data_ptr() if type(tensor) in (Tensor, nn.Parameter) else 0


def _by_expert(use: _Use, inputs: Tensor) -> _All:
    """Yield what each expert whose weight is used is multiplied with; rows of zeros are padding."""
    view, weight = use
    if weight.ndim != 3 and view.numel() == weight.numel():
        yield _Found("", inputs.detach())
    elif view.ndim == 2 and (size := _size_of_slices(view, weight)):
        number = (view.storage_offset() - weight.storage_offset()) // size
        yield _Found(str(number), inputs.detach())
    elif len(view) == len(weight) == len(inputs):
        for expert, tokens in enumerate(inputs.detach()):
            rows = tokens.reshape(-1, tokens.shape[-1])
            yield _Found(str(expert), rows[rows.any(dim=-1)])


def _size_of_slices(view: Tensor, weight: Tensor) -> int:
    """Return the elements of each of the equal slices that a weight consists of, 0 where a view is not of one alone.

    A weight of two dimensions may have experts one below the other: then the view must be one of them.
    """
    if weight.ndim == 3:
        return weight.stride(0)
    whole_rows = weight.shape[-1] in view.shape and (view.is_contiguous() or view.mT.is_contiguous())
    size = view.numel() if whole_rows and weight.is_contiguous() else 0
    equal = size and weight.numel() % size == 0 and (view.storage_offset() - weight.storage_offset()) % size == 0
    return size if equal else 0


def _of_linear(use: _Use, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _All:
    if len(args) > 1 and use.view is args[1]:
        yield from _by_expert(use, args[0])


def _of_product(use: _Use, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _All:
    if len(args) < 2:  # the other by keyword
        return
    left, right = args[:2]
    if use.view is right:
        yield from _by_expert(use, left)
    elif right.ndim > 1:
        yield from _by_expert(use, right.mT)


def _of_einsum(use: _Use, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _All:
    """Yield the other operand with what is summed last, in the order in which the weight stores it."""
    if len(args) != 3 or not isinstance(args[0], str) or "." in args[0]:
        return
    operands, _, result = args[0].replace(" ", "").partition("->")
    pairs = list(zip(operands.split(","), args[1:], strict=True))
    pairs.sort(key=lambda pair: pair[1] is not use.view)
    (own, first), (other, inputs) = pairs
    if first is inputs or len(set(other)) < len(other):  # a product of the weight with itself, or a diagonal
        return
    summed = [label for label in own if label in other and label not in result]
    kept = [label for label in other if label not in summed]
    moved = inputs.detach().permute([other.index(label) for label in (*kept, *summed)])
    yield _Found("", moved.flatten(len(kept)))


def _of_attention(use: _Use, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _All:
    """Yield what ``nn.MultiheadAttention`` projects, and what its output projection gets."""
    if len(args) < 12:  # some by keyword, as torch's own layer does not give them
        return
    query, key, value, packed, projection = *args[:3], args[5], args[11]
    weight = use.view
    if weight is packed and query is key is value:
        yield _Found("", query.detach())
    elif weight is packed:
        yield from (_Found(part, each.detach()) for part, each in zip("qkv", (query, key, value), strict=True))
    elif weight is projection:  # the same attention, with no projection behind it and without dropout
        identity = torch.eye(len(weight), dtype=weight.dtype, device=weight.device)
        alone = kwargs | {"training": False, "need_weights": False}
        with torch.no_grad():
            yield _Found("", multi_head_attention_forward(*(*args[:10], 0.0, identity, None), **alone)[0])


_READERS: dict[Any, Callable[[_Use, tuple[Any, ...], dict[str, Any]], _All]] = {
    linear: _of_linear,
    **dict.fromkeys(_PRODUCTS, _of_product),
    torch.einsum: _of_einsum,
    multi_head_attention_forward: _of_attention,
}
