"""Forward hooks that sample the input rows of routed layers, on due steps only."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

# 2^32 divided by the golden ratio: i ↦ (i · this) mod 2^32 visits the integers evenly, whatever the stride, so that
# "below a threshold" keeps an even share of every sequence and position.
_GOLDEN = 2_654_435_769
_WORD = 2**32


class RowSample:
    """At most ``capacity`` rows of a stream, chosen by their index in the stream alone.

    The same stream gives the same sample however it is cut into micro-batches, and no random generator is
    used, so that the probe cannot change training.

    Args:
        capacity: most rows kept.
    """

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._rows: list[Tensor] = []
        self._kept = torch.empty(0, dtype=torch.int64)  # stream index of each kept row, on the host
        self._seen = 0
        self._threshold = _WORD

    def add(self, rows: Tensor) -> None:
        """Offer the next rows of the stream, (T, n); what is kept is a copy."""
        index = torch.arange(self._seen, self._seen + len(rows))
        self._seen += len(rows)
        chosen = self._chosen(index)
        self._rows.append(rows[chosen.to(rows.device)])
        self._kept = torch.cat([self._kept, index[chosen]])
        if len(self._kept) > self._capacity:
            while len(chosen := self._chosen(self._kept)) > self._capacity:
                self._threshold = self._threshold * 7 // 8
            self._rows = [torch.cat(self._rows)[chosen.to(rows.device)]]
            self._kept = self._kept[chosen]

    def rows(self) -> Tensor:
        """Return the sample, (at most capacity, n), in stream order."""
        return torch.cat(self._rows)

    def _chosen(self, index: Tensor) -> Tensor:
        return ((index * _GOLDEN) % _WORD < self._threshold).nonzero().flatten()


class InputProbe:
    """Samples the inputs of modules while armed.

    Counts each training forward once: not in evaluation, not under ``no_grad``, and once under gradient
    checkpointing of either kind, whose second forward runs inside backward. All micro-batches of an
    accumulated step contribute.

    Args:
        model: the model whose forward begins a micro-batch.
        modules: layers to sample, by the name the sample is asked for; the last dimension of a layer's first
            input is its features.
        capacity: most rows kept per layer.

    Attributes:
        armed: whether forwards are sampled. A plain bool, so that a compiled forward only guards on it.
    """

    def __init__(self, model: nn.Module, modules: Mapping[str, nn.Module], capacity: int) -> None:
        self.armed = False
        self._capacity = capacity
        self._samples: dict[str, RowSample] = {}
        self._seen: set[str] = set()
        self._handles = [model.register_forward_pre_hook(self._begin_forward)]
        self._handles += [module.register_forward_pre_hook(self._hook(name)) for name, module in modules.items()]

    def take(self) -> dict[str, Tensor]:
        """Return the sampled rows by layer, (rows, features) each, and forget them.

        Layers without a training forward since the last call are missing.
        """
        samples = {name: sample.rows() for name, sample in self._samples.items()}
        self._samples.clear()
        self._seen.clear()
        return samples

    def remove(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()

    def _begin_forward(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        if self.armed and not _inside_backward():
            self._seen.clear()

    def _hook(self, name: str) -> Any:
        def sample_input(module: nn.Module, args: tuple[Any, ...]) -> None:
            if self.armed and module.training:
                self._sample(name, args[0])

        return sample_input

    def _sample(self, name: str, inputs: Tensor) -> None:
        if _inside_backward():
            if name in self._seen:  # recomputation of a forward that was sampled
                return
        elif not torch.is_grad_enabled():  # a reentrant checkpoint's first forward, or no training at all
            return
        self._seen.add(name)
        sample = self._samples.setdefault(name, RowSample(self._capacity))
        sample.add(inputs.detach().reshape(-1, inputs.shape[-1]))


def _inside_backward() -> bool:
    return torch._C._current_graph_task_id() != -1
