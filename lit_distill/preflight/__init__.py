"""Checks, by a few small samples, that a pipeline can be distilled, and in how much memory.

A finding says what was checked, what was found, and which setting avoids it.
Must not know Lightning, or change the pipeline that it checks.
"""
