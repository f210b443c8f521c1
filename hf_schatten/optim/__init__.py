"""The optimizer: SchattenP, its matrices and stacks, and the rules of a step. Knows torch only."""
