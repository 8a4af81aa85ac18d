import resource
import signal
import threading
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from short_training import adamw, fit, module
from two_processes import Signal, difference, train

from lit_distill.errors import InputError
from lit_distill.training.checkpoint_io import AtomicCheckpointIO, read_checkpoint
from lit_distill.training.lr_scheduler import WarmupCosine


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM], ids=lambda s: s.name)
def test_a_signal_saves_and_training_resumes_exactly(number, pairs, tmp_path):
    whole = train(pairs, tmp_path / "whole.ckpt", "auto", 1, {"r": 4, "lora_dropout": 0.1}, 5)
    saver = ModelCheckpoint(tmp_path, filename="stopped", save_on_exception=True)
    handlers = signal.getsignal(number)
    with pytest.raises(SystemExit, match=f"stopped by {number.name} after step 3"):
        train(
            pairs,
            tmp_path / "end.ckpt",
            "auto",
            1,
            {"r": 4, "lora_dropout": 0.1},
            5,
            callbacks=[Signal(number, 0), saver],
        )
    assert signal.getsignal(number) == handlers
    resumed = train(
        pairs,
        tmp_path / "end.ckpt",
        "auto",
        1,
        {"r": 4, "lora_dropout": 0.1},
        5,
        tmp_path / "stopped.ckpt",
    )
    assert difference(resumed, whole) == 0


@pytest.fixture
def full_disk():
    """No file may be larger than 1 MB, which fails as a full disk does."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10**6, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_leaves_the_old_checkpoint_and_no_part_of_the_new(tmp_path, full_disk):
    io, path = AtomicCheckpointIO(), tmp_path / "last.ckpt"
    with pytest.raises(OSError, match=r"last\.ckpt can't be written: File too large"):
        io.save_checkpoint({"big": torch.zeros(10**6)}, path)
    assert not list(tmp_path.iterdir())
    io.save_checkpoint({"hyper_parameters": {}, "a": 1}, path)
    before = path.read_bytes()
    with pytest.raises(OSError, match=r"last\.ckpt can't be written: File too large"):
        io.save_checkpoint({"big": torch.zeros(10**6)}, path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_two_runs_that_save_one_file_never_leave_a_damaged_one(tmp_path):
    """What is read is one of the two, at any time."""
    path, ended = tmp_path / "last.ckpt", threading.Event()
    hyper = {"pretrained_model_name_or_path": "tiny-digits"}

    def save(value):
        size = int(value * 10**5)
        content = {"hyper_parameters": hyper, "state_dict": {"x": torch.full((size,), value)}}
        while not ended.is_set():
            AtomicCheckpointIO().save_checkpoint(content, path)

    writers = [threading.Thread(target=save, args=(value,)) for value in (1.0, 2.0)]
    for writer in writers:
        writer.start()
    while not path.exists():
        pass
    try:
        for _ in range(50):
            read = read_checkpoint(path)["state_dict"]["x"]
            assert (read == read[0]).all() and read[0] in (1.0, 2.0)
    finally:
        ended.set()
        for writer in writers:
            writer.join()
    assert list(tmp_path.iterdir()) == [path]


def test_a_checkpoint_that_could_not_be_read_back_is_refused_when_it_is_saved(tmp_path):
    io = AtomicCheckpointIO()
    content = {"hyper_parameters": {"pretrained_model_name_or_path": Path("tiny-digits")}}
    content["state_dict"] = {}
    content["numbers"] = [np.float64(0.5), (np.int64(3),), {np.str_("a"): np.arange(2)}]
    io.save_checkpoint(content, tmp_path / "last.ckpt")
    assert read_checkpoint(tmp_path / "last.ckpt") == {
        "hyper_parameters": {"pretrained_model_name_or_path": "tiny-digits"},
        "state_dict": {},
        "numbers": [0.5, (3,), {"a": [0, 1]}],
    }
    content["callbacks"] = {"Mine": [object()]}
    with pytest.raises(InputError, match=r"checkpoint\.callbacks\.Mine\[0\] is a builtins\.object"):
        io.save_checkpoint(content, tmp_path / "other.ckpt")
    assert not (tmp_path / "other.ckpt").exists()


@pytest.fixture(scope="module")
def checkpoint(pairs, tmp_path_factory):
    path = tmp_path_factory.mktemp("checkpoint") / "good.ckpt"
    model = module(lr_scheduler=lambda optimizer: WarmupCosine(optimizer, 2))
    fit(model, pairs, path.parent, max_steps=2, enable_checkpointing=False).save_checkpoint(path)
    return path


def scheduled(**options):
    return module(**{"lr_scheduler": lambda optimizer: WarmupCosine(optimizer, 2)} | options)


def edited(change):
    def spoil(path, content, raw):
        change(content)
        torch.save(content, path)

    return spoil


def written(change):
    return lambda path, content, raw: path.write_bytes(change(bytearray(raw)))


def flipped(raw):
    position = raw.index(b"/data/0") + 300  # in a tensor
    raw[position] ^= 0xFF
    return raw


class Code:
    def __reduce__(self):
        return (print, ("this must not run",))


NAME = "denoisers.transformer.transformer_blocks.0.attn.to_q.lora_A.default.weight"
SPOILT = {
    "empty": (written(lambda raw: b""), {}, r"spoilt\.ckpt is empty: the process was killed"),
    "half": (written(lambda raw: raw[: len(raw) // 2]), {}, "is truncated or not a checkpoint"),
    "cut at the end": (written(lambda raw: raw[:-100]), {}, "is truncated or not a checkpoint"),
    "text": (written(lambda raw: b"a: 1\n" * 100), {}, "is not a checkpoint: 500 bytes of another"),
    "a flipped bit": (
        written(flipped),
        {},
        "is damaged: the checksum of its part .*/data/0 differs",
    ),
    "code": (edited(lambda c: c.update(evil=Code())), {}, r"other objects than .* \(print\)"),
    "foreign": (edited(lambda c: c.pop("hyper_parameters")), {}, "not written by lit_distill"),
    "missing": (edited(lambda c: c["state_dict"].pop(NAME)), {}, f"missing: {NAME}"),
    "unknown": (
        edited(lambda c: c["state_dict"].update(x=torch.zeros(1))),
        {},
        "unknown: x",
    ),
    "another rank": (
        edited(lambda c: None),
        {"lora": {"r": 8}},
        r"is \(4, 64\) in it and \(8, 64\)",
    ),
    "full for lora": (edited(lambda c: None), {"lora": None}, "unknown: .*lora_A"),
    "weights only": (edited(lambda c: c.pop("optimizer_states")), {}, "holds weights only"),
    "another optimizer": (
        edited(lambda c: None),
        {"optimizer": lambda params: torch.optim.SGD(params, lr=0.1)},
        "model.optimizer is torch.optim.sgd.SGD, but the checkpoint's is torch.optim.adamw.AdamW",
    ),
    "another schedule": (
        edited(lambda c: None),
        {"lr_scheduler": lambda optimizer: torch.optim.lr_scheduler.ConstantLR(optimizer)},
        "model.lr_scheduler is .*ConstantLR, but the checkpoint's is .*WarmupCosine",
    ),
}


@pytest.mark.filterwarnings("ignore:model.lora:UserWarning")  # warned of before it is refused
@pytest.mark.parametrize("kind", SPOILT)
def test_a_spoilt_or_foreign_checkpoint_is_refused_by_name(
    kind, checkpoint, pairs, tmp_path, capsys
):
    spoil, options, message = SPOILT[kind]
    path = tmp_path / "spoilt.ckpt"
    spoil(path, torch.load(checkpoint, weights_only=True), checkpoint.read_bytes())
    with pytest.raises(ValueError, match=message):
        fit(scheduled(**options), pairs, tmp_path, path, max_steps=3)
    assert "this must not run" not in capsys.readouterr().out


def test_settings_that_differ_from_the_checkpoint_are_kept_and_named(checkpoint, pairs, tmp_path):
    model = module(
        optimizer=adamw(lr=1e-4, betas=(0.5, 0.9)),
        lr_scheduler=lambda optimizer: WarmupCosine(optimizer, 3, 20),
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer = fit(model, pairs, tmp_path, checkpoint, max_steps=3, batch_size=2)
    warned = "\n".join(str(warning.message) for warning in caught)
    assert "lr=0.0001 differs from the checkpoint's 0.001; continuing with 0.0001" in warned
    assert "betas=(0.5, 0.9) differs from the checkpoint's (0.9, 0.999)" in warned
    assert "num_warmup_steps=3 differs from the checkpoint's 2" in warned
    assert "num_training_steps=20 differs from the checkpoint's 2" in warned
    assert "data: rows_a_batch=2 differs from the checkpoint's 4" in warned
    group = trainer.optimizers[0].param_groups[0]
    assert group["betas"] == (0.5, 0.9)
    assert group["lr"] == pytest.approx(1e-4)  # at the top: 3 steps of warm-up are made
    assert trainer.train_dataloader.batch_sampler.position == 2 * 2 + 1


def test_settings_that_agree_are_not_reported(checkpoint, pairs, tmp_path):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = module(lr_scheduler=lambda optimizer: WarmupCosine(optimizer, 2, 2))
        fit(model, pairs, tmp_path, checkpoint, max_steps=3)
    assert not [w for w in caught if "differs" in str(w.message)]
