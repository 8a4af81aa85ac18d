"""Memory and compute of every stage, known before a GPU is rented and without any weights.

The pipeline is built from its configuration files with parameters that have a shape but no memory,
and a training step of it is counted operation by operation on a CPU. Must not know Lightning.
"""
