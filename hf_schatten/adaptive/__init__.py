"""From activations and gradients to p: sampling, the criterion, and when p is estimated."""
