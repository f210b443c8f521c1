"""What DeepSpeed ZeRO makes of parameters: flat partitions, and where the elements of each parameter lie in them.

All three stages hand the optimizer vectors in the place of parameters: of each group, or of each *sub-group* at stage
3, the elements that a process updates, in float32, one parameter after another. A training step is one call of the
optimizer for each of these vectors. What is read of parameters is in :mod:`hf_schatten.private_api`; stage 3's
optimizer has ``fp16_groups``, ``sub_group_to_group_id``, ``fp32_partitioned_groups_flat`` and ``averaged_gradients``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from hf_schatten.distributed.pieces import Pieces
from hf_schatten.distributed.processes import ALONE, Peers, process_count, process_rank
from hf_schatten.matrices.engines import UnsupportedEngineError, shape_of
from hf_schatten.private_api import ZeroParameter


class Fragment(NamedTuple):
    """What this process updates of one parameter."""

    number: int  # of the parameter in its group
    shape: torch.Size  # of the parameter
    start: int  # of the first element, in the parameter
    numel: int  # 0 where it updates nothing of it
    offset: int  # of the first element, in the partition


class Partition(NamedTuple):
    """A vector that DeepSpeed hands the optimizer in one call, with the parameters that it holds elements of."""

    group: int  # number of the parameters' group in the optimizer
    flat: Tensor
    fragments: list[Fragment]
    reduced: Callable[[], list[Tensor | None]]  # before the first call of a step: each fragment's gradient, unclipped
    check: Callable[[], None] = lambda: None  # raises, before a step, where elements are elsewhere than DeepSpeed says


def is_partitioned(groups: Sequence[dict[str, Any]]) -> bool:
    """Return whether groups hold other tensors than the parameters that they name."""
    return any(
        len(group["params"]) != len(group.get("param_names", group["params"]))
        or (group["spectral"] and any(parameter.ndim < 2 for parameter in group["params"]))
        for group in groups
    )


def partitions_of(groups: Sequence[dict[str, Any]], parameters: Sequence[Sequence[Any]]) -> list[Partition]:
    """Return the partitions of a process in the order in which they are stepped.

    Args:
        groups: of the optimizer.
        parameters: the model's, of each group in the order of its names.

    Raises:
        UnsupportedEngineError: when another engine than ZeRO has replaced the parameters, or ZeRO otherwise.
    """
    every = [ZeroParameter(parameter) for of_group in parameters for parameter in of_group]
    if all(parameter.is_of_stage_1_or_2 for parameter in every):
        pairs = zip(groups, parameters, strict=True)
        found = [_of_group(number, group, its) for number, (group, its) in enumerate(pairs)]
    elif all(parameter.stage_3 for parameter in every):
        found = _of_sub_groups(every[0].stage_3, parameters)
    else:
        raise UnsupportedEngineError(
            "The training engine has replaced the parameters by flat tensors, and is not known: use stages 1 to 3 of "
            "DeepSpeed ZeRO, DDP, FSDP version 2 or tensor parallelism, or optim='adamw_torch' with this engine."
        )
    _require_all_processes(every[0].processes)
    for partition in found:
        if partition.flat.device.type == "cpu" and _computes_elsewhere():
            raise UnsupportedEngineError(
                "schatten_p does not support offload_optimizer of DeepSpeed: leave it out of zero_optimization, or "
                "use optim='adamw_torch'. Stages 2 and 3 without it keep a share of the state on each GPU."
            )
    return found


def pieces_of_partitions(partitions: Sequence[Partition]) -> list[list[Pieces]]:
    """Return what each process has of the parameters of each partition; all processes must call it."""
    fragments = [fragment for partition in partitions for fragment in partition.fragments]
    device = partitions[0].flat.device
    mine = torch.tensor([[f.start, f.start + f.numel] for f in fragments], dtype=torch.long).to(device)
    count = process_count()
    received = [torch.empty_like(mine) for _ in range(count)]
    if count > 1:
        dist.all_gather(received, mine)
    else:
        received = [mine]
    ranges = torch.stack(received, dim=1).tolist()  # (fragments, processes, 2)
    peers = Peers(dist.group.WORLD, count, process_rank()) if count > 1 else ALONE
    pieces = iter(
        Pieces(peers, (fragment.shape.numel(),), tuple((((a, b),) if a < b else (),) for a, b in each))
        for fragment, each in zip(fragments, ranges, strict=True)
    )
    return [[next(pieces) for _ in partition.fragments] for partition in partitions]


def _of_group(group_number: int, group: dict[str, Any], parameters: Sequence[Any]) -> Partition:
    """Return the partition of a group at stages 1 and 2."""
    (flat,) = group["params"]
    own = [ZeroParameter(parameter) for parameter in parameters]
    fragments = [
        Fragment(number, parameter.shape, *of_zero.fragment)
        for number, (parameter, of_zero) in enumerate(zip(parameters, own, strict=True))
    ]

    def check() -> None:
        for parameter, fragment in zip(parameters, fragments, strict=True):
            of_parameter = parameter.detach().flatten().narrow(0, fragment.start, fragment.numel)
            of_partition = flat.detach().narrow(0, fragment.offset, fragment.numel).to(parameter.dtype)
            if not torch.allclose(of_partition, of_parameter, rtol=0.0, atol=0.0, equal_nan=True):
                raise UnsupportedEngineError(
                    "DeepSpeed says otherwise where the elements of parameters are than they are, as with "
                    "round_robin_gradients: leave it out of zero_optimization, or use optim='adamw_torch'."
                )

    return Partition(group_number, flat, fragments, lambda: [each.reduced_gradient() for each in own], check)


def _of_sub_groups(optimizer: Any, parameters: Sequence[Sequence[Any]]) -> list[Partition]:
    """Return the partitions of all sub-groups at stage 3."""
    numbers = {id(parameter): index for of_group in parameters for index, parameter in enumerate(of_group)}
    found = []
    for sub_group, (together, flat) in enumerate(
        zip(optimizer.fp16_groups, optimizer.fp32_partitioned_groups_flat, strict=True)
    ):
        fragments, offset = [], 0
        for parameter in together:
            size = parameter.partition_numel()
            start = min(process_rank() * size, parameter.ds_numel)
            numel = min(size, parameter.ds_numel - start)
            fragments.append(Fragment(numbers[id(parameter)], shape_of(parameter), start, numel, offset))
            offset += size

        def reduced(sub_group: int = sub_group) -> list[Tensor | None]:
            return list(optimizer.averaged_gradients[sub_group])

        found.append(Partition(optimizer.sub_group_to_group_id[sub_group], flat, fragments, reduced))
    return found


def _computes_elsewhere() -> bool:
    """Whether the processes exchange tensors of another device than the CPU."""
    return dist.is_initialized() and "gloo" not in str(dist.get_backend())


def _require_all_processes(group: Any) -> None:
    """Raise unless the partitions of a parameter are shared out to all processes."""
    if dist.is_initialized() and dist.get_world_size(group) != process_count():
        raise UnsupportedEngineError(
            f"schatten_p supports DeepSpeed ZeRO where all {process_count()} processes share every parameter, and "
            f"here {dist.get_world_size(group)} do: leave out MiCS and DeepSpeed's own expert and sequence "
            "parallelism, or use optim='adamw_torch'."
        )
