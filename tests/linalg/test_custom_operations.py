"""What old versions of torch ask of operations of our own."""

from __future__ import annotations

import torch

from hf_schatten.linalg import iteration_numbers, many_matrices, spectral_power  # noqa: F401 - they define them


def test_what_an_operation_may_write_to_has_no_default():
    """Torch 2.11 raises an IndexError at the call where it has."""
    own = [schema for schema in torch._C._jit_get_all_schemas() if schema.name.startswith("hf_schatten::")]
    written = [
        argument
        for schema in own
        for argument in schema.arguments
        if argument.alias_info is not None and argument.alias_info.is_write
    ]
    assert {schema.name.partition("::")[2] for schema in own} >= {"advance_averages", "add_updates", "weighted_sum"}
    assert len(written) >= 5
    assert [argument.name for argument in written if argument.has_default_value()] == []
