"""What a step of training asks of one rank, counted by running the optimizers' own code on tensors without memory.

On the device ``meta`` operations have shapes and no values: products of matrices are counted by PyTorch's own counter,
all other operations by the bytes that they read and write. The package's own operations count as a GPU runs them
(:mod:`hf_schatten.linalg.many_matrices`).
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, PretrainedConfig

from benchmarks.scaling.scaling_machines import Cost
from hf_schatten import SchattenP, create_schatten_optimizer
from hf_schatten.distributed.owners import Compute, Delivery, at_parameters, elements
from hf_schatten.distributed.processes import ALONE
from hf_schatten.distributed.replicated import Replicated
from hf_schatten.linalg.spectral_power import iterate_in_turns
from hf_schatten.optim.apply import apply_updates
from hf_schatten.optim.finite_gradients import FiniteGradients
from hf_schatten.optim.matrix import CURVES, NODES, Matrix
from hf_schatten.optim.momentum import Momenta
from hf_schatten.optim.stack import Stack, stacks_of

_OWN = torch.ops.hf_schatten
_SEVERAL_KERNELS = {"inner_products": 2}  # parts of the sums, then the sums; of our other operations each is one
_PRODUCTS = {"mm", "bmm", "addmm", "baddbmm"}
_OVERWRITING = {"copy_", "fill_", "zero_", "weighted_sum"}
_FUSED_ADAMW_PASSES = 7  # weights, gradients and two moments are read; weights and moments are written
_FUSED_ADAMW_KERNELS = 10
_CAUSAL = 0.5  # share of the attention matrix that is computed


@dataclass(frozen=True)
class Plan:
    """A model, and what each rank sees of the data in a step.

    Attributes:
        name: For tables.
        config: Of the model.
        dtype: Of weights, gradients and updates.
        sequences: Sequences of a rank in a step.
        length: Tokens in a sequence.
    """

    name: str
    config: PretrainedConfig
    dtype: torch.dtype
    sequences: int
    length: int


PLANS: dict[str, Callable[[], Plan]] = {
    "gpt2": lambda: Plan("GPT-2 small", GPT2Config(), torch.float32, 16, 1024),
    "llama-1.3b": lambda: Plan(
        "Llama-like, 1.3 B",
        LlamaConfig(
            vocab_size=32_000,
            hidden_size=2048,
            intermediate_size=5504,
            num_hidden_layers=24,
            num_attention_heads=16,
            max_position_embeddings=2048,
        ),
        torch.float32,
        8,
        2048,
    ),
    "llama-8b": lambda: Plan(
        "Llama 3.1, 8 B",
        LlamaConfig(
            vocab_size=128_256,
            hidden_size=4096,
            intermediate_size=14_336,
            num_hidden_layers=32,
            num_attention_heads=32,
            num_key_value_heads=8,
        ),
        torch.bfloat16,
        2,
        4096,
    ),
    "tiny": lambda: Plan(
        "tiny",
        GPT2Config(n_layer=2, n_embd=16, n_head=2, vocab_size=40, n_positions=8, bos_token_id=0, eos_token_id=0),
        torch.float32,
        1,
        8,
    ),
}


class Workload:
    """A plan's model and optimizers, and what their work costs.

    Args:
        plan: The plan.
        device: ``meta`` for what an accelerator would do; ``cpu`` really computes, and counts what a CPU does.
    """

    def __init__(self, plan: Plan, device: str = "meta") -> None:
        self.plan, self.device = plan, device
        with torch.device(device):
            self.model: nn.Module = AutoModelForCausalLM.from_config(plan.config).to(plan.dtype)
        compute_dtype = "float32" if device == "cpu" else "auto"  # a CPU is calibrated in float32
        self.optimizer: SchattenP = create_schatten_optimizer(
            self.model, p=2.0, compute_dtype=compute_dtype, share_work=False, verbose=False
        )
        self.optimizer.create_state()
        self.matrices = list(self.optimizer.matrices())
        self._costs: dict[tuple[str, tuple[tuple[int, int], ...]], Cost] = {}

    @property
    def parameters(self) -> int:
        """Number of the model's parameters."""
        return sum(parameter.numel() for parameter in self.model.parameters())

    @property
    def layers(self) -> int:
        """Number of the model's blocks."""
        return int(self.plan.config.num_hidden_layers)

    @cached_property
    def matrix_elements(self) -> int:
        """Number of those in matrices."""
        return elements(self.matrices)

    @property
    def itemsize(self) -> int:
        """Bytes of one weight, gradient or update."""
        return self.plan.dtype.itemsize

    @property
    def training_flops(self) -> float:
        """Operations of forward and backward: 6 for each weight and token, and causal attention."""
        config, tokens = self.plan.config, self.plan.sequences * self.plan.length
        weights = self.matrix_elements + config.vocab_size * config.hidden_size
        attention = 12 * self.layers * config.hidden_size * self.plan.length * _CAUSAL
        return (6.0 * weights + attention) * tokens

    @cached_property
    def replicated(self) -> Cost:
        """A step of `SchattenP` where a rank computes all updates."""
        return self._count_step(self.optimizer, self.model.parameters())

    @cached_property
    def rest(self) -> Cost:
        """Of that step what is neither momentum nor update nor weight of a matrix: checks, and AdamW's parameters."""
        delivery, (gradients, momenta, compute) = Delivery(self.matrices, self._stacks), self._computation()

        def deliver_all() -> None:
            momenta.advance(delivery.elsewhere)
            for delivered in delivery.deliver(compute, momenta):
                apply_updates(delivered, gradients)

        return self.replicated - count(deliver_all, self.device)

    def advance(self, matrices: Sequence[Matrix]) -> Cost:
        """What a rank does with the momenta of matrices whose updates it does not compute."""
        return self._cost_of(self._advancing, matrices)

    def updates(self, matrices: Sequence[Matrix]) -> Cost:
        """What a rank does to compute these matrices' updates, from their gradients into the buffer that it sends."""
        return self._cost_of(self._filling_buffers, matrices)

    def apply(self, matrices: Sequence[Matrix]) -> Cost:
        """What a rank does with updates that arrive together."""
        return self._cost_of(self._applying, matrices)

    @cached_property
    def muon(self) -> Cost:
        """A step of ``torch.optim.Muon`` for the matrices, unsplit, and of fused AdamW for the rest."""
        matrices = {id(matrix.parameter): matrix.parameter for matrix in self.matrices}
        own = self._count_step(torch.optim.Muon(list(matrices.values())), matrices.values())
        return own + self._fused_adamw(self.parameters - self.matrix_elements)

    @property
    def adamw(self) -> Cost:
        """A step of fused AdamW for all parameters."""
        return self._fused_adamw(self.parameters)

    def statistics_bytes(self) -> int:
        """Bytes that a due step's all-reduce adds up: each matrix' curves, and whether a rank has measured them."""
        return 8 * CURVES * (NODES + 1) * len(self.matrices)

    @property
    def spectra(self) -> int:
        """How many spectra a due step estimates: of each matrix' gradient, and of each layer's inputs."""
        return len(self.matrices) + len({matrix.input_name for matrix in self.matrices})

    def memory(self, optimizer: str, ranks: int) -> float:
        """Bytes of weights, gradients, DDP's buckets and the optimizer's state: all but activations and buffers.

        Args:
            optimizer: ``adamw``, ``muon`` or ``schatten_p``.
            ranks: Of the run; one alone has no buckets.
        """
        elements_of_matrices = {"adamw": 2 * self.itemsize, "muon": self.itemsize, "schatten_p": 4}[optimizer]
        elements_of_others = 8 if optimizer == "schatten_p" else 2 * self.itemsize
        state = elements_of_matrices * self.matrix_elements
        state += elements_of_others * (self.parameters - self.matrix_elements)
        return (2 + (ranks > 1)) * self.itemsize * self.parameters + state

    def _fused_adamw(self, parameters: int) -> Cost:
        return Cost(moved=_FUSED_ADAMW_PASSES * self.itemsize * parameters, kernels=_FUSED_ADAMW_KERNELS)

    def _stacks(self, matrices: Iterable[Matrix]) -> list[Stack]:
        return stacks_of(matrices, lambda group: self.optimizer.options, self.optimizer._momenta_dtype)

    def _cost_of(self, work: Callable[[Sequence[Matrix]], Callable[[], object]], matrices: Sequence[Matrix]) -> Cost:
        """Return what work with some matrices costs: counted once for all that have the same shapes."""
        if not matrices:
            return Cost()
        key = work.__name__, tuple(sorted(matrix.wide_shape for matrix in matrices))
        if key not in self._costs:
            self._costs[key] = count(work(matrices), self.device)
        return self._costs[key]

    def _advancing(self, matrices: Sequence[Matrix]) -> Callable[[], object]:
        return partial(self._computation()[1].advance, matrices)

    def _filling_buffers(self, matrices: Sequence[Matrix]) -> Callable[[], object]:
        sender, (_, momenta, compute) = Replicated(matrices, self._stacks, ALONE), self._computation()

        def fill_buffers() -> None:
            for current, work in zip(sender.rounds, sender.work, strict=True):
                sender._own(current, compute(work, momenta.write))

        return fill_buffers

    def _applying(self, matrices: Sequence[Matrix]) -> Callable[[], object]:
        gradients = self._computation()[0]
        updates = [torch.zeros(m.wide_shape, dtype=m.parameter.dtype, device=self.device) for m in matrices]

        def apply() -> None:
            apply_updates(at_parameters(matrices, updates, torch.ones(len(matrices), device=self.device)), gradients)

        return apply

    def _computation(self) -> tuple[FiniteGradients, Momenta, Compute]:
        """Return what a step of `SchattenP` computes updates from, and what computes them."""
        self._give_gradients(self.model.parameters())
        gradients = FiniteGradients(self.optimizer.param_groups)
        momenta, optimizer = Momenta(gradients), self.optimizer
        momenta.count([group for group in optimizer.param_groups if group["spectral"]], optimizer.state)
        scaled = optimizer._coupling.start(Delivery([], list), momenta, optimizer._measured_direction)
        return gradients, momenta, partial(optimizer._compute, scaled, gradients)

    @staticmethod
    def _give_gradients(parameters: Iterable[Tensor]) -> None:
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter)

    def _count_step(self, optimizer: torch.optim.Optimizer, parameters: Iterable[Tensor]) -> Cost:
        """Cost of a step that is not the first."""
        self.model.zero_grad()
        self._give_gradients(parameters)
        optimizer.step()
        return count(optimizer.step, self.device)


class _Counter(TorchDispatchMode):
    """Counts operations on one device, and the bytes of all that are no products of matrices.

    Of the package's own operations the spectral iteration counts as all that it consists of, and the others as the
    kernels that they are on a GPU.
    """

    def __init__(self, device: str) -> None:
        super().__init__()
        self._device = device
        self.moved = self.kernels = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        with self:
            if func is _OWN.spectral_iteration.default:
                # PyTorch's counter sees its products, and not the operation itself, whose formula it knows.
                return iterate_in_turns(*args, **kwargs)
            decomposed = func.decompose(*args, **kwargs)  # in there, torch leaves that to us
        if decomposed is not NotImplemented:
            return decomposed
        result = func(*args, **kwargs)
        name = func._schema.name.partition("::")[2]
        allocates = name.removeprefix("new_").startswith("empty")
        if not (func.is_view or name == "_unsafe_view" or allocates) and self._bytes((args, kwargs, result)):
            self.kernels += _SEVERAL_KERNELS.get(name, 1)
            if name not in _PRODUCTS:
                self.moved += self._moved(func, name, args, kwargs, result)
        return result

    def _moved(self, func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> int:
        given = dict(zip((argument.name for argument in func._schema.arguments), args, strict=False)) | kwargs
        if func is _OWN.advance_averages.default:
            return _passes(given["places"], given["averages"], given["gradients"]) + self._bytes(given["out"])
        if func is _OWN.add_updates.default:
            return _passes(given["places"], given["weights"], given["updates"])
        moved = 0
        for argument in func._schema.arguments:
            written = argument.alias_info is not None and argument.alias_info.is_write
            if name == "_fused_adamw_" and argument.name == "grads":
                written = given.get("grad_scale") is not None  # which it would take out of the gradients
            read = not (written and (argument.is_out or name in _OVERWRITING))
            moved += (read + written) * self._bytes(given.get(argument.name))
        if all(returned.alias_info is None for returned in func._schema.returns):
            moved += self._bytes(result)
        return moved

    def _bytes(self, tree: Any) -> int:
        """Bytes of all tensors, without what an expansion repeats."""
        tensors = [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor) and leaf.device.type == self._device]
        return sum(min(t.numel() * t.itemsize, t.untyped_storage().nbytes()) for t in tensors)


def _passes(places: Sequence[int], changed: Sequence[Tensor], taken: Sequence[Tensor]) -> int:
    """Return the bytes of an operation that changes matrices in place, each by one that it reads.

    Args:
        places: of the matrices, nine numbers each, of which the first four are sizes.
        changed: the tensors in which they lie, one for each, where several may lie in one.
        taken: the tensors in which those that are read lie.
    """
    sizes = [math.prod(places[start : start + 4]) for start in range(0, len(places), 9)]
    return sum(
        size * (2 * tensor.itemsize + other.itemsize)
        for size, tensor, other in zip(sizes, changed, taken, strict=True)
    )


def count(call: Callable[[], object], device: str) -> Cost:
    """Return what a call costs; the call is really made."""
    with torch.no_grad(), FlopCounterMode(display=False) as flops, _Counter(device) as counter:
        call()
    return Cost(flops.get_total_flops(), counter.moved, counter.kernels)
