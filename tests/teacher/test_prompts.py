import json

import pytest
import torch

from lit_distill.data.table_io import MetadataError
from lit_distill.errors import InputError
from lit_distill.pipelines.rollout import sample
from lit_distill.teacher.prompts import plan_pairs, prompt_batches, read_prompts
from lit_distill.teacher.teacher import Teacher


@pytest.fixture
def written(tmp_path):
    def written(name, data):
        path = tmp_path / name
        path.write_bytes(data if isinstance(data, bytes) else data.encode())
        return path

    return written


@pytest.mark.parametrize("codec", ["utf-16", "utf-16-le"])
@pytest.mark.parametrize("name", ["prompts.txt", "prompts.csv"])
def test_utf16_is_refused_with_the_remedy(written, codec, name):
    path = written(name, "prompt\na red cat\n".encode(codec))
    with pytest.raises(MetadataError, match=f"{name} is not .*it looks like UTF-16, save it as U"):
        read_prompts(path)


def test_another_encoding_is_refused(written):
    with pytest.raises(MetadataError, match=r"prompts.txt is not a text file in UTF-8: byte 3 is"):
        read_prompts(written("prompts.txt", "café".encode("latin-1")))


def test_only_line_breaks_end_a_prompt(written):
    """Not the separators at which `str.splitlines` splits, too."""
    lines = ["one\u2028two", "three\x0bfour\x85five", "six"]
    path = written("prompts.txt", f"{lines[0]}\r\n{lines[1]}\n\n{lines[2]}\r")
    assert [prompt.text for prompt in read_prompts(path)] == lines


def test_half_an_emoji_is_refused_before_anything_is_generated(written):
    lines = [json.dumps({"prompt": text}) for text in ("a cat", "a cat \ud83d", "a 😀")]
    with pytest.raises(MetadataError, match=r"row 2: 'prompt' holds half of a surrogate pair"):
        read_prompts(written("prompts.jsonl", "\n".join(lines)))


def test_seeds_of_the_file_are_used(written):
    prompts = read_prompts(written("prompts.csv", "prompt,seed\na,7\nb,\nc,9\n"))
    assert [pair.seed for pair in plan_pairs(prompts, 1, first_seed=100)] == [7, 101, 9]
    batches = prompt_batches(prompts, {"num_inference_steps": 4}, batch_size=2, first_seed=100)
    assert [batch["seed"] for batch in batches] == [[7, 101], [9]]
    with pytest.raises(InputError, match=r"seeds_per_prompt is 2, but the prompts have .* 'seed'"):
        plan_pairs(prompts, 2)
    with pytest.raises(MetadataError, match=r"row 2: seed must be an integer >= 0 .* got '-1'"):
        read_prompts(written("prompts.csv", "prompt,seed\na,-1\n"))


def test_a_field_that_nothing_uses_is_refused_by_name(written):
    table = "prompt,negative_prompt,note\na,blurry,\n"
    with pytest.raises(MetadataError, match=r"field 'negative_prompt' is not used: .*call_columns"):
        read_prompts(written("prompts.csv", table))
    prompts = read_prompts(written("prompts.csv", table), {"negative_prompt": "negative_prompt"})
    assert prompts[0].call == {"negative_prompt": "blurry"}  # and an empty field is no loss
    rows = [{"prompt": "a", "style": "oil"}]
    with pytest.raises(MetadataError, match=r"field 'style' is not used"):
        read_prompts(written("prompts.json", json.dumps(rows)))


def test_each_row_has_its_negative_prompt(written):
    """The remedy that the error names, in a batch."""
    path = written("prompts.csv", "prompt,negative_prompt\na red seven,blue\na red seven,one\n")
    columns = {"negative_prompt": "negative_prompt"}
    options = {"torch_dtype": "float32", "num_inference_steps": 2, "call_columns": columns}
    teacher = Teacher("tiny-digits", **options)
    pipe = teacher.load()
    pairs = [p._replace(seed=3) for p in plan_pairs(read_prompts(path, columns), 1)]
    together, _ = teacher.sample(pipe, pairs)
    assert not torch.allclose(together[0], together[1], atol=1e-3)
    for pair, latents in zip(pairs, together, strict=True):
        alone, _ = sample(
            pipe,
            num_inference_steps=2,
            cfg_scale=4.0,
            generator=[torch.Generator().manual_seed(3)],
            prompt=[pair.prompt],
            negative_prompt=[pair.call["negative_prompt"]],
        )
        torch.testing.assert_close(latents, alone[0], rtol=1e-4, atol=1e-4)
    with pytest.raises(InputError, match=r"'negative_prompt' is both in model.call_kwargs and in"):
        Teacher("tiny-digits", call_kwargs={"negative_prompt": "x"}, call_columns=columns)
