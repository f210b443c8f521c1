"""Hooks that sample the inputs of routed layers and the gradients of their outputs, on due steps only."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import disable_saved_tensors_hooks
from torch.utils.module_tracker import ModuleTracker

from hf_schatten.adaptive.rows import Rows, input_rows, output_rows
from hf_schatten.matrices.layout import matrix_name

# 2^32 divided by the golden ratio: i ↦ (i · this) mod 2^32 visits the integers evenly, whatever the stride, so that
# "below a threshold" keeps an even share of every sequence and position.
_GOLDEN = 2_654_435_769
_WORD = 2**32

_ROWS_AT_ONCE = 4096  # that are copied to add to a Gram matrix
_TRACKER = ModuleTracker()  # never entered: only asked whether backward runs


class RowSample:
    """At most ``capacity`` rows of a stream, chosen by their index in the stream alone.

    The same stream gives the same sample however it is cut into micro-batches, and no random generator is
    used, so that the probe cannot change training.

    Args:
        capacity: most rows kept.
    """

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._pieces: list[tuple[Tensor, Tensor]] = []  # stream indices on the host, rows
        self._seen = 0
        self._threshold = _WORD

    def offer(self, count: int, pick: Callable[[Tensor], Tensor]) -> Callable[[], None]:
        """Offer the next rows of the stream.

        Args:
            count: number of rows.
            pick: from indices (k,) below ``count`` to a copy of those rows, (k, n).

        Returns:
            A function that picks what was chosen, to be called once, now or later.
        """
        start = self._seen
        self._seen += count
        self._threshold = _threshold(self._seen, self._capacity, self._threshold)
        index = _chosen(self._threshold, start, self._seen)

        def keep() -> None:
            self._pieces = [self._thinned(*piece) for piece in self._pieces]
            self._pieces.append((index, pick(index - start)))

        return keep

    def rows(self) -> Tensor | None:
        """Return the sample, (at most capacity, n), in stream order; None where nothing was kept."""
        if not self._pieces:
            return None
        index, rows = (torch.cat(column) for column in zip(*self._pieces, strict=True))
        order = index.argsort()
        kept = order[_hash(index[order]) < self._threshold]
        return rows[kept.to(rows.device)]

    def _thinned(self, index: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        chosen = _hash(index) < self._threshold
        return (index, rows) if chosen.all() else (index[chosen], rows[chosen.to(rows.device)])


def _hash(index: Tensor) -> Tensor:
    return (index * _GOLDEN) % _WORD


# All layers that see the same tokens choose the same rows: the choice is remembered.
@lru_cache(maxsize=64)
def _threshold(seen: int, capacity: int, threshold: int) -> int:
    """Lower the threshold until at most ``capacity`` of the first ``seen`` rows lie below it."""
    kept = _below(threshold, 0, seen)
    while len(kept) > capacity:
        threshold = threshold * 7 // 8
        kept = kept[_hash(kept) < threshold]
    return threshold


@lru_cache(maxsize=16)
def _chosen(threshold: int, start: int, stop: int) -> Tensor:
    """Return what :func:`_below` does, not to be written to."""
    return _below(threshold, start, stop)


def _below(threshold: int, start: int, stop: int) -> Tensor:
    """Return the stream indices in [start, stop) that lie below the threshold, on the host."""
    index = torch.arange(start, stop)
    return index[_hash(index) < threshold]


class GramSum:
    """The Gram matrix AᵀA of all rows of a stream, (n, n) float64, additive over micro-batches and processes.

    Takes 2 n² operations a row, where :class:`RowSample` copies some rows.
    """

    def __init__(self) -> None:
        self._gram: Tensor | None = None

    def offer(self, count: int, pick: Callable[[Tensor], Tensor]) -> Callable[[], None]:
        """Offer the next rows of the stream, as to :meth:`RowSample.offer`."""

        def add() -> None:
            for index in torch.arange(count).split(_ROWS_AT_ONCE):
                rows = pick(index).double()
                with torch.autocast(rows.device.type, enabled=False):
                    product = rows.mT @ rows
                self._gram = product if self._gram is None else self._gram.add_(product)

        return add

    def rows(self) -> Tensor | None:
        """Return the Gram matrix; None where there were no rows."""
        return self._gram


class _EagerCompiler:
    """Makes ``torch.compile`` run eagerly what it would have to compile anew, as long as any probe asks for it."""

    def __init__(self) -> None:
        self._askers: set[int] = set()
        self._stance = ExitStack()

    def ask(self, asker: int, eager: bool) -> None:
        """Ask for it under a number, or no longer."""
        if eager and not self._askers:
            self._stance.enter_context(torch.compiler.set_stance("eager_on_recompile"))
        (self._askers.add if eager else self._askers.discard)(asker)
        if not self._askers:
            self._stance.close()


_EAGER_COMPILER = _EagerCompiler()


class Sampled(NamedTuple):
    """What a probe has sampled, (rows, features) or (features, features) each.

    Attributes:
        inputs: by parameter name, followed by the expert's number where it has experts.
        outputs: of the gradients of outputs, by parameter name.
    """

    inputs: dict[str, Tensor]
    outputs: dict[str, Tensor]


_Samples = dict[str, "RowSample | GramSum"]


class Probe:
    """Samples the inputs of modules, and the gradients of their outputs where asked, while armed.

    Counts each training forward once: not in evaluation, not under ``no_grad``, and once under gradient
    checkpointing of either kind, whose second forward runs inside backward. All micro-batches of an
    accumulated step contribute; padding does not (an ``attention_mask`` that the model gets by keyword).

    Rows are copied when the gradient reaches the layer, where autograd keeps its input until then anyway: earlier
    copies would add to the peak of memory, which lies before the backward pass.

    While armed, ``torch.compile`` runs what it would have to compile anew eagerly: training has one graph.

    Args:
        model: the model whose forward begins a micro-batch.
        layers: the module that owns each routed parameter, by the parameter's name.
        new_sample: makes what keeps a matrix' rows, such as ``partial(RowSample, 1024)`` or :class:`GramSum`.
        outputs: whether to sample the gradients of outputs.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Mapping[str, nn.Module],
        new_sample: Callable[[], RowSample | GramSum],
        *,
        outputs: bool = False,
    ) -> None:
        self._armed = False  # a plain bool, so that a compiled forward only guards on it
        self._new_sample = new_sample
        self._with_outputs = outputs
        self._inputs: _Samples = {}
        self._outputs: _Samples = {}
        self._seen: set[str] = set()
        self._masks: dict[str, Tensor] = {}
        weakref.finalize(self, _EAGER_COMPILER.ask, id(self), False)
        self._handles = [model.register_forward_pre_hook(self._begin_forward, with_kwargs=True)]
        self._handles += [module.register_forward_hook(self._hook(name)) for name, module in layers.items()]

    @property
    def armed(self) -> bool:
        """Whether forwards are sampled."""
        return self._armed

    def arm(self, armed: bool) -> None:
        """Sample the forwards from now on, or stop."""
        self._armed = armed
        _EAGER_COMPILER.ask(id(self), armed)

    def take(self) -> Sampled:
        """Return the samples and forget them; what has had no training forward since the last call is missing."""
        sampled = Sampled(
            *(
                {name: rows for name, sample in samples.items() if (rows := sample.rows()) is not None}
                for samples in (self._inputs, self._outputs)
            )
        )
        self._forget()
        return sampled

    def remove(self) -> None:
        """Remove the hooks."""
        self.arm(False)
        self._forget()
        for handle in self._handles:
            handle.remove()

    def _forget(self) -> None:
        self._inputs.clear()
        self._outputs.clear()
        self._seen.clear()
        self._masks = {}

    def _begin_forward(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._armed and torch.is_grad_enabled() and not _inside_backward():
            self._seen.clear()
            masks = {name: kwargs.get(name) for name in ("attention_mask", "decoder_attention_mask")}
            self._masks = {name: mask for name, mask in masks.items() if isinstance(mask, Tensor) and mask.ndim == 2}

    def _hook(self, name: str) -> Any:
        def sample_input(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            if self._armed and module.training:
                self._sample(name, module, args, output)

        return sample_input

    def _sample(self, name: str, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if not (isinstance(output, Tensor) and output.requires_grad):  # no training, or a reentrant checkpoint's first
            return
        recomputed = _inside_backward()
        if recomputed and name in self._seen:
            return
        self._seen.add(name)
        keeps = [
            self._offer(self._inputs, matrix_name(name, rows.part), rows)
            for rows in input_rows(name, module, args, self._masks)
        ]
        rows_of = output_rows(name, module, self._masks) if self._with_outputs else None
        if rows_of is not None:
            output.register_hook(lambda gradient: self._offer(self._outputs, name, rows_of(gradient.detach()))())
        if recomputed or not _autograd_keeps(args[0]):
            _call_and_forget(keeps)
        else:
            output.register_hook(lambda gradient: _call_and_forget(keeps))

    def _offer(self, samples: _Samples, key: str, rows: Rows) -> Callable[[], None]:
        """Offer rows to the sample of this key; return what picks the chosen ones."""
        if key not in samples:
            samples[key] = self._new_sample()
        return samples[key].offer(rows.count, rows.pick)


def _call_and_forget(functions: list[Callable[[], None]]) -> None:
    """Call functions once; the hook that holds them lives to the end of backward, and what they hold must not."""
    while functions:
        functions.pop()()


def _autograd_keeps(inputs: Tensor) -> bool:
    """Whether a layer keeps this very tensor for its backward pass, and not a packed or converted copy."""
    return not _autograd_packs() and not torch.is_autocast_enabled(inputs.device.type)


def _autograd_packs() -> bool:
    """Whether hooks, such as those of a checkpoint or an offload to the CPU, replace what autograd saves."""
    try:
        with disable_saved_tensors_hooks("asked only whether there are any"):
            return False
    except RuntimeError:
        return True


def _inside_backward() -> bool:
    return _TRACKER.is_bw
