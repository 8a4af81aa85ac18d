"""Prompts and images encoded once, stored in memory or on disk, and collated to batches.

Every encoding equals what the pipeline itself would have computed.
Must not know what the encodings are used for.
"""
