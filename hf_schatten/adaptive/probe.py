"""Hooks that sample the inputs of routed layers, on due steps only."""

from __future__ import annotations

import gc
import logging
import weakref
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import disable_saved_tensors_hooks
from torch.utils.hooks import RemovableHandle
from torch.utils.module_tracker import ModuleTracker

from hf_schatten.adaptive.functional_uses import FunctionalUses
from hf_schatten.adaptive.row_sample import RowSample
from hf_schatten.adaptive.rows import Masks, Rows, input_rows, masks_of, shows_inputs, token_rows
from hf_schatten.distributed.pieces import local
from hf_schatten.matrices.backbones import outermost_models
from hf_schatten.matrices.layout import matrix_name

logger = logging.getLogger(__name__)

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


_PROBES: weakref.WeakSet[Probe] = weakref.WeakSet()  # that exist


_OF_COPIES = "_armed", "_warned", "_model", "_layers", "_most_rows"  # attributes of a probe


class _Hook:
    """A hook of a probe that still exists. A copy of its module, or a pickle, has one that does nothing."""

    def __init__(self, probe: Probe, call: Callable[..., None], *arguments: Any) -> None:
        self._probe = weakref.ref(probe)  # what drops its optimizer drops the probe, which then takes its hooks along
        self._call = call
        self._arguments = arguments

    def __call__(self, *of_module: Any) -> None:
        probe = self._probe()
        if probe is not None:
            self._call(probe, *self._arguments, *of_module)

    def __reduce__(self) -> tuple[Any, ...]:
        return _NoHook, ()


class _NoHook:
    """What a copy of a module has in a hook's place."""

    def __call__(self, *of_module: Any) -> None:
        pass


class Probe:
    """Hooks that sample the inputs of modules while armed.

    Counts each training forward once, as soon as a gradient comes back to its output. So evaluation, ``no_grad``, the
    forward of gradient checkpointing of either kind that is not differentiated, and the pass of DoRA that only
    measures a norm do not count. All micro-batches of an accumulated step contribute; padding does not (an
    ``attention_mask`` by keyword, of the model or of each model of transformers in it).

    Rows are copied then, too, where autograd keeps the layer's input until then anyway: earlier copies would add to
    the peak of memory, which lies before the backward pass.

    While armed, ``torch.compile`` runs eagerly what it would have to recompile: training has one graph.

    The model does not keep its probe: one that nothing else refers to removes its hooks. A copy of the model has no
    probe. A copy of the probe, made together with the model's, samples that copy.

    Args:
        model: the model whose forward begins a micro-batch.
        layers: the module that owns each routed parameter, by the parameter's name.
        rows: most rows that are kept of each input.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Mapping[str, nn.Module],
        rows: int,
    ) -> None:
        self._armed = False  # a plain bool, so that a compiled forward only guards on it
        self._warned = False
        self._model = model
        self._layers = dict(layers)
        self._most_rows = rows
        self._begin()

    def _begin(self) -> None:
        """Start without samples, and with hooks where the model is whole: a copy may still be in the making."""
        self._samples: dict[str, RowSample] = {}
        self._masks: Masks = {}
        weakref.finalize(self, _EAGER_COMPILER.ask, id(self), False)
        _PROBES.add(self)
        self._functional = FunctionalUses(self._layers, self._offer_use)
        self._handles: list[RemovableHandle] = []
        if all("training" in vars(module) for module in (self._model, *self._layers.values())):
            self._attach()

    def _attach(self) -> None:
        begin = _Hook(self, Probe._begin_forward)
        masked: list[nn.Module] = [*outermost_models(self._model)] or [self._model]
        self._handles += [each.register_forward_pre_hook(begin, with_kwargs=True) for each in masked]
        self._handles.append(self._model.register_forward_pre_hook(_Hook(self, Probe._watch)))
        self._handles.append(self._model.register_forward_hook(_Hook(self, Probe._end_watch), always_call=True))
        for name, module in self._layers.items():
            if shows_inputs(name, module):
                self._handles.append(module.register_forward_hook(_Hook(self, Probe._sample_forward, name)))
        weakref.finalize(self, _remove, self._handles)

    def __getstate__(self) -> dict[str, Any]:
        """What a copy keeps: whom it samples and whether, but no samples."""
        return {key: vars(self)[key] for key in _OF_COPIES}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._begin()
        _EAGER_COMPILER.ask(id(self), self._armed)

    @property
    def armed(self) -> bool:
        """Whether forwards are sampled."""
        return self._armed

    def arm(self, armed: bool) -> None:
        """Sample the forwards from now on, or stop."""
        if armed and not self._handles:
            self._attach()
        if armed and not self._armed:
            self._warn_of_another()
        self._armed = armed
        _EAGER_COMPILER.ask(id(self), armed)

    def _warn_of_another(self) -> None:
        """Warn once where a layer is sampled for two optimizers, of which one may be forgotten."""
        if self._warned or not self._sampled_twice():
            return
        gc.collect()  # one that was dropped may wait for it
        if name := self._sampled_twice():
            self._warned = True
            logger.warning(
                "Two optimizers sample the inputs of %s, and perhaps of other layers: call stop_following() on the "
                "one that you no longer use, or delete it.",
                name,
            )

    def _sampled_twice(self) -> str | None:
        """Return the name of a parameter whose layer another armed probe samples, None where there is none."""
        others = [probe for probe in _PROBES if probe.armed and probe is not self]
        sampled = {id(module) for probe in others for module in probe._layers.values()}
        return next((name for name, module in self._layers.items() if id(module) in sampled), None)

    def take(self) -> dict[str, Tensor]:
        """Return the sampled inputs, (rows, features) each, and forget them.

        Keys are names of parameters, followed by the expert's number where they have experts. What has had no training
        forward since the last call is missing. Rows of a step that a loss scaler skipped may not be finite.
        """
        sampled = {name: sample.rows() for name, sample in self._samples.items()}
        self._forget()
        return {name: rows for name, rows in sampled.items() if rows is not None}

    def why_unsampled(self) -> str:
        """Return, as a sentence, why layers may have had no training forward, and what to do."""
        if self._model.training:
            return "Their weights are read in a way that cannot be seen, or these modules are in evaluation mode."
        return "The model is in evaluation mode, as from_pretrained returns it: call model.train() before training."

    def remove(self) -> None:
        """Remove the hooks."""
        self.arm(False)
        self._forget()
        _remove(self._handles)

    def _forget(self) -> None:
        self._samples.clear()
        self._masks = {}

    def _begin_forward(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._armed and torch.is_grad_enabled() and not _inside_backward():
            self._masks = masks_of(kwargs)

    def _watch(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        if self._armed and module.training and torch.is_grad_enabled() and not torch.compiler.is_compiling():
            self._functional.begin()

    def _end_watch(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if not torch.compiler.is_compiling():
            self._functional.end()

    def _sample_forward(self, name: str, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if self._armed:
            self._functional.called(name)
        if self._armed and module.training:
            self._sample(name, module, args, output)

    def _sample(self, name: str, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if not (isinstance(output, Tensor) and output.requires_grad):  # no training, or a reentrant checkpoint's first
            return
        args = tuple(local(each) if isinstance(each, Tensor) else each for each in args)
        # A recomputed input lives until its backward pass, which comes next.
        at_once = not (_inside_backward() or _autograd_keeps(args[0]))
        keeps = [
            self._offer(matrix_name(name, rows.expert), rows, at_once=at_once)
            for rows in input_rows(name, module, args, self._masks)
        ]
        output.register_hook(lambda gradient: _call_and_forget(keeps))

    def _offer_use(self, key: str, inputs: Tensor) -> None:
        """Offer what a weight was multiplied with, (..., n), as rows that count."""
        self._offer(key, token_rows(key, inputs, self._masks))()

    def _offer(self, key: str, rows: Rows, *, at_once: bool = False) -> Callable[[], None]:
        """Offer rows to the sample of this key; return what makes them count."""
        if key not in self._samples:
            self._samples[key] = RowSample(self._most_rows)
        return self._samples[key].offer(rows.count, rows.pick, at_once=at_once)


def _remove(handles: Iterable[RemovableHandle]) -> None:
    for handle in handles:
        handle.remove()


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
