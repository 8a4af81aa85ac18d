"""How a denoiser computes: what is recomputed, in which precision, sharded, compiled or quantised.

Every mode returns the same output and the same gradient as the plain module.
Knows torch modules only: no pipeline, no rows, no Lightning.
"""
