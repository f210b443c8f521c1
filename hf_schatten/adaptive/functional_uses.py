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

Found = Iterator[tuple[str, Tensor]]  # the part or expert of a weight, "" for all of it, and its inputs (..., n)
Offer = Callable[[str, Tensor], None]  # takes the inputs of a weight, by its name and that of its part or expert

_PRODUCTS = (torch.matmul, torch.mm, torch.bmm, Tensor.matmul, Tensor.mm, Tensor.bmm, Tensor.__matmul__)


class _Use(NamedTuple):
    """A weight that a function gets."""

    view: Tensor  # what the function gets: the weight, or a view of it
    weight: Tensor  # all of it


class FunctionalUses(TorchFunctionMode):
    """Sees every function of a forward, and offers the inputs of the weights that no module is called with.

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
        self._weights: dict[int, tuple[str, Tensor]] = {}  # by the address of the storage
        self._pending: dict[str, list[list[tuple[str, Tensor]]]] = {}
        self._watching = False

    def begin(self) -> None:
        """Watch the forward that begins, if any weight is left to look for."""
        if self._watched and not self._watching:
            weights = ((name, getattr(module, name.rpartition(".")[2])) for name, module in self._watched.items())
            self._weights = {address: (name, each) for name, each in weights if (address := _address(each))}
            self._watching = True
            self.__enter__()

    def end(self) -> None:
        """Watch no longer."""
        if self._watching:
            self.__exit__(None, None, None)
            self._watching = False
            self._pending.clear()

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
        if torch.is_grad_enabled() and (func in _READERS):
            product = output[0] if isinstance(output, tuple) else output
            if isinstance(product, Tensor) and product.requires_grad:
                for name, use in self._uses(args):
                    self._note(name, list(_READERS[func](use, args, kwargs)), product)
        return output

    def _uses(self, args: tuple[Any, ...]) -> Iterator[tuple[str, _Use]]:
        """Yield the names of the watched weights of which arguments are views, with both."""
        for view in args:
            if isinstance(view, Tensor):
                name, weight = self._weights.get(_address(view), ("", view))
                if name in self._watched:
                    yield name, _Use(view, weight)

    def _note(self, name: str, found: list[tuple[str, Tensor]], product: Tensor) -> None:
        self._pending.setdefault(name, []).append(found)

        def offer(gradient: Tensor) -> None:
            while found:
                part, inputs = found.pop()
                self._offer(f"{name}.{part}" if part else name, inputs)

        product.register_hook(offer)


def _address(tensor: Tensor) -> int:
    """Return where the storage of a tensor and of all its views begins, 0 of one without memory or in shards."""
    return tensor.untyped_storage().data_ptr() if type(tensor) in (Tensor, nn.Parameter) else 0


def _by_expert(use: _Use, inputs: Tensor) -> Found:
    """Yield the inputs (..., n) of each expert whose weight is used; rows of zeros are padding."""
    view, weight = use
    if weight.ndim != 3:
        if view.numel() == weight.numel():  # else it is a part, whose name only the layout knows
            yield "", inputs.detach()
    elif view.ndim == 2:
        yield str((view.storage_offset() - weight.storage_offset()) // weight.stride(0)), inputs.detach()
    elif len(view) == len(weight) == len(inputs):
        for expert, tokens in enumerate(inputs.detach()):
            rows = tokens.reshape(-1, tokens.shape[-1])
            yield str(expert), rows[rows.any(dim=-1)]


def _of_linear(use: _Use, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Found:
    if len(args) > 1 and use.view is args[1]:
        yield from _by_expert(use, args[0])


def _of_product(use: _Use, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Found:
    if len(args) < 2:  # the other by keyword
        return
    left, right = args[:2]
    if use.view is right:
        yield from _by_expert(use, left)
    elif right.ndim > 1:
        yield from _by_expert(use, right.mT)


def _of_einsum(use: _Use, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Found:
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
    yield "", moved.flatten(len(kept))


def _of_attention(use: _Use, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Found:
    """Yield what ``nn.MultiheadAttention`` projects, and what its output projection gets."""
    if len(args) < 12:  # some by keyword, as torch's own layer does not give them
        return
    query, key, value, packed, projection = *args[:3], args[5], args[11]
    weight = use.view
    if weight is packed and query is key is value:
        yield "", query.detach()
    elif weight is packed:
        yield from zip("qkv", (query.detach(), key.detach(), value.detach()), strict=True)
    elif weight is projection:  # the same attention, with no projection behind it and without dropout
        identity = torch.eye(len(weight), dtype=weight.dtype, device=weight.device)
        alone = kwargs | {"training": False, "need_weights": False}
        with torch.no_grad():
            yield "", multi_head_attention_forward(*(*args[:10], 0.0, identity, None), **alone)[0]


_READERS: dict[Any, Callable[[_Use, tuple[Any, ...], dict[str, Any]], Found]] = {
    linear: _of_linear,
    **dict.fromkeys(_PRODUCTS, _of_product),
    torch.einsum: _of_einsum,
    multi_head_attention_forward: _of_attention,
}
