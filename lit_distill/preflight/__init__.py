"""Checks, by a few small samples, that a pipeline can be distilled, and in how much memory.

A finding names what was checked, what was observed, and which setting avoids the problem.
Must not know Lightning, or change the pipeline that it checks.
"""
