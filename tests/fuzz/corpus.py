"""Inputs that were read wrongly once. A new fault is added as a line, and a test tries it.

Each line: the reader, its file's name, and the bytes. What the readers may do is what the fuzz
tests require, so no line says which error it expects.
"""

CORPUS = [
    ("metadata", "metadata.csv", b""),
]
