"""Matching without a backward pass through weight gradients: all candidates of a model run as one ordinary batch."""
