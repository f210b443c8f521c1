"""Which process computes which matrix, and how what it has computed reaches the others."""
