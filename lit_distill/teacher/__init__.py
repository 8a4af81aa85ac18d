"""The teacher's targets: prompts planned, pairs generated and stored, their seeds verified.

A pair is fully determined by its `Teacher` settings, prompt and seed, and is recorded with them.
Must not know the student beyond the steps that it will use.
"""
