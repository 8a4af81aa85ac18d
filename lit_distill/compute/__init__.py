"""How a denoiser computes: checkpointing, precision, sharding, compilation, quantisation.

Except for quantisation, a mode changes neither the output nor the gradient, up to rounding.
Must not know pipelines, data or Lightning: it sees torch modules only.
"""
