"""Hooks that sample the inputs of routed layers and the gradients of their outputs, on due steps only."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import disable_saved_tensors_hooks
from torch.utils.module_tracker import ModuleTracker

from hf_schatten.adaptive.functional_uses import FunctionalUses
from hf_schatten.adaptive.row_sample import RowSample
from hf_schatten.adaptive.rows import Rows, input_rows, output_rows, shows_inputs, token_rows
from hf_schatten.matrices.backbones import outermost_models
from hf_schatten.matrices.layout import matrix_name

_TRACKER = ModuleTracker()  # never entered: only asked whether backward runs


class _EagerCompiler:
    """Makes ``torch.compile`` run eagerly what it would have to recompile, as long as any probe asks for it."""

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
    """What a probe has sampled, (rows, features) each.

    Attributes:
        inputs: by parameter name, followed by the expert's number where it has experts.
        outputs: of the gradients of outputs, by parameter name.
    """

    inputs: dict[str, Tensor]
    outputs: dict[str, Tensor]


_Samples = dict[str, RowSample]


class Probe:
    """Samples the inputs of modules, and the gradients of their outputs where asked, while armed.

    Counts each training forward once, as soon as a gradient comes back to its output. So evaluation, ``no_grad``, the
    forward of gradient checkpointing of either kind that is not differentiated, and the pass of DoRA that only
    measures a norm do not count. All micro-batches of an accumulated step contribute; padding does not (an
    ``attention_mask`` by keyword, of the model or of each model of transformers in it).

    Rows are copied then, too, where autograd keeps the layer's input until then anyway: earlier copies would add to
    the peak of memory, which lies before the backward pass.

    While armed, ``torch.compile`` runs eagerly what it would have to recompile: training has one graph.

    Args:
        model: the model whose forward begins a micro-batch.
        layers: the module that owns each routed parameter, by the parameter's name.
        rows: most rows that are kept of each input and output.
        outputs: whether to sample the gradients of outputs.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Mapping[str, nn.Module],
        rows: int,
        *,
        outputs: bool = False,
    ) -> None:
        self._armed = False  # a plain bool, so that a compiled forward only guards on it
        self._most_rows = rows
        self._with_outputs = outputs
        self._inputs: _Samples = {}
        self._outputs: _Samples = {}
        self._masks: dict[str, Tensor] = {}
        weakref.finalize(self, _EAGER_COMPILER.ask, id(self), False)
        self._functional = FunctionalUses(layers, self._offer_inputs)
        masked: list[nn.Module] = [*outermost_models(model)] or [model]
        self._handles = [each.register_forward_pre_hook(self._begin_forward, with_kwargs=True) for each in masked]
        self._handles.append(model.register_forward_pre_hook(self._watch))
        self._handles.append(model.register_forward_hook(lambda *_: self._functional.end(), always_call=True))
        called = {name: module for name, module in layers.items() if shows_inputs(name, module)}
        self._handles += [module.register_forward_hook(self._hook(name)) for name, module in called.items()]

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
        self._masks = {}

    def _begin_forward(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._armed and torch.is_grad_enabled() and not _inside_backward():
            masks = {name: kwargs.get(name) for name in ("attention_mask", "decoder_attention_mask")}
            self._masks = {name: mask for name, mask in masks.items() if isinstance(mask, Tensor) and mask.ndim == 2}

    def _watch(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        if self._armed and module.training and torch.is_grad_enabled() and not torch.compiler.is_compiling():
            self._functional.begin()

    def _hook(self, name: str) -> Any:
        def sample_input(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            if self._armed:
                self._functional.called(name)
            if self._armed and module.training:
                self._sample(name, module, args, output)

        return sample_input

    def _sample(self, name: str, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if not (isinstance(output, Tensor) and output.requires_grad):  # no training, or a reentrant checkpoint's first
            return
        # A recomputed input lives until its backward pass, which comes next.
        at_once = not (_inside_backward() or _autograd_keeps(args[0]))
        keeps = [
            self._offer(self._inputs, matrix_name(name, rows.expert), rows, at_once=at_once)
            for rows in input_rows(name, module, args, self._masks)
        ]
        rows_of = output_rows(name, module, self._masks) if self._with_outputs else None
        if rows_of is not None:
            output.register_hook(lambda gradient: self._offer(self._outputs, name, rows_of(gradient.detach()))())
        output.register_hook(lambda gradient: _call_and_forget(keeps))

    def _offer_inputs(self, key: str, inputs: Tensor) -> None:
        """Offer what a weight was multiplied with, (..., n), as rows that count."""
        self._offer(self._inputs, key, token_rows(key, inputs, self._masks))()

    def _offer(self, samples: _Samples, key: str, rows: Rows, *, at_once: bool = False) -> Callable[[], None]:
        """Offer rows to the sample of this key; return what makes them count."""
        if key not in samples:
            samples[key] = RowSample(self._most_rows)
        return samples[key].offer(rows.count, rows.pick, at_once=at_once)


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
