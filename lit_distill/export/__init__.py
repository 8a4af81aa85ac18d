"""The student as files for other tools, and as a plain diffusers pipeline.

Nothing counts as exported before it was loaded back and reproduced the student's image.
Must not know how the student was trained beyond what its checkpoint records.
"""
