"""Inputs that were once read wrongly, or ended in a traceback of another library, or never.

A new fault is one more line: the reader (see `test_corpus.READERS`), the name of the file, and its
bytes. Each is tried by the rule of the fuzz tests: a result, or an error of ours that names it.
"""

import json

from conftest import HEADER

ROW = "a.png,x,1,cpu,4,1"

LORA = {"r": 2, "lora_alpha": 4, "peft_type": "LORA"}

CORPUS = [
    ("table", "empty.csv", b""),
    ("table", "nested.json", b"[" * 100_000),
    ("table", "nested objects.jsonl", b'{"a":' * 100_000),
    ("table", "text after a quote.csv", f'{HEADER}\na.png,"x" y,1,cpu,4,1\n{ROW}\n'.encode()),
    ("table", "open quote.csv", f'{HEADER}\na.png,"x,1,cpu,4,1\n{ROW}\n'.encode()),
    ("table", "carriage return.csv", f'{HEADER}\na.png,"x\ry",1,cpu,4,1\n'.encode()),
    ("table", "utf-16.csv", f"{HEADER}\n{ROW}\n".encode("utf-16")),
    ("table", "utf-16 without mark.csv", f"{HEADER}\n{ROW}\n".encode("utf-16-le")),
    ("table", "no column name.csv", f"{HEADER},\n{ROW},7\n".encode()),
    ("table", "long cell.csv", f"{HEADER}\na.png,{'x' * 200_000},1,cpu,4,1\n".encode()),
    ("table", "half an emoji.json", b'[{"prompt": "\\ud83d"}]'),
    ("table", "half a byte order mark.jsonl", b"\xef"),
    ("metadata", "long name.csv", f"{HEADER}\n{'x/' * 3000}a.png,x,1,cpu,4,1\n".encode()),
    ("metadata", "NUL.csv", f"{HEADER}\na\0.png,x,1,cpu,4,1\n".encode()),
    ("metadata", "digits.csv", f"{HEADER}\na.png,x,1,cpu,4,\u0663\n".encode()),
    ("metadata", "many columns.csv", ",".join(f"c{i}" for i in range(20_000)).encode()),
    ("prompts", "utf-16.txt", "a cat\n".encode("utf-16")),
    ("prompts", "utf-16 without mark.txt", "a cat\n".encode("utf-16-le")),
    ("prompts", "latin.txt", "café\n".encode("latin-1")),
    ("prompts", "half an emoji.jsonl", b'{"prompt": "a cat \\ud83d"}'),
    ("prompts", "negative.csv", b"prompt,negative_prompt\na cat,blurry\n"),
    ("picture", "zero bytes.png", b""),
    ("picture", "script.eps", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n"),
    ("latents", "shape.safetensors", (60).to_bytes(8, "little") + b'{"latents":{"dtype":"F32",'
     b'"shape":["x"],"data_offsets":[0,4]}}    '),
    ("latents", "list.safetensors", (2).to_bytes(8, "little") + b"[]"),
    ("settings", "bomb", json.dumps(LORA | {"alpha_pattern": {r"(\w+\.?)+x": 4}}).encode()),
    ("settings", "dots", json.dumps(LORA | {"alpha_pattern": {".*" * 30 + "x": 4}}).encode()),
    ("settings", "choices", json.dumps(LORA | {"alpha_pattern": {"(a|a?)" * 40: 4}}).encode()),
    ("settings", "no expression", json.dumps(LORA | {"alpha_pattern": {"(": 4}}).encode()),
    ("settings", "list", b"[]"),
    ("settings", "NaN", b'{"lora_alpha": NaN}'),
    ("settings", "text", b'{"lora_alpha": 4, "alpha_pattern": {"to_q": "8"}}'),
    ("settings", "nested", b"[" * 100_000),
    ("lora", "absurd header.safetensors", b"\xff" * 100),
    ("lora", "metadata.safetensors", (53).to_bytes(8, "little")
     + b'{"__metadata__":{"lora_adapter_metadata":"[1, 2, 3"}}'),
    ("checkpoint", "empty.ckpt", b""),
    ("checkpoint", "html.ckpt", b"<!DOCTYPE html><html>404</html>"),
    ("checkpoint", "empty archive.ckpt", b"PK\x05\x06" + bytes(18)),
    ("checkpoint", "cut.ckpt", b"PK\x03\x04" + bytes(100)),
    ("checkpoint", "pickle.ckpt", b"\x80\x02c__builtin__\neval\nX\x01\x00\x00\x001\x85R."),
]  # fmt: skip
