"""Prompts and images encoded once, kept in memory or on disk, and put together as batches.

Every encoding equals what the pipeline itself would have computed.
Must not know what the encodings are used for.
"""
