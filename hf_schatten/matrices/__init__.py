"""What in a model is a matrix: routing, fused projections and the layout of matrices in parameters."""
