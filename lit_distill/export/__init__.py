"""The student as files for other tools, and as a plain diffusers pipeline.

An export is complete only after it was reloaded and verified to reproduce the student's image.
Must not know how the student was trained, beyond what its checkpoint records.
"""
