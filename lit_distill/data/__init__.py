"""Pairs to learn from: a metadata table, parsed and checked, and its rows as batches.

A table is refused with every problem in one error, or every row of it can be used.
Must not know pipelines or training: a batch holds prompts, seeds, settings and targets.
"""
