"""Runs that are stopped: what is saved is of finished steps, and resumes bit by bit."""

import os
import signal
import warnings

import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric.plugins.environments import SLURMEnvironment
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.trainer.connectors import signal_connector
from short_training import module
from two_processes import QUIET, difference, weights_of

from lit_distill import EMA, DistillDataModule
from lit_distill.commands.stopped import stop_report
from lit_distill.encoding.encode_once import EncodeOnce
from lit_distill.training.checkpoint_io import read_checkpoint
from lit_distill.training.signals import StoppedBySignal

LORA = {"r": 4, "lora_dropout": 0.1}


class BrokenError(Exception):
    """What the tests raise."""


def run(pairs, out, ckpt_path=None, callbacks=(), saver=None, data=DistillDataModule, **options):
    """Train 6 steps of 4 rows, validated after every 3; return the weights."""
    torch.manual_seed(0)
    table = str(pairs / "heldout/metadata.csv")
    saver = saver or ModelCheckpoint(out, filename="saved", save_on_exception=True)
    options = {"max_steps": 6, "val_check_interval": 1.0, "limit_val_batches": 2} | options
    cache_dir = options.pop("cache_dir", None)
    trainer = pl.Trainer(
        callbacks=[EMA(0.9), *callbacks, saver], default_root_dir=out, **QUIET, **options
    )
    model = module(lora=LORA, metrics={}, preflight=False)
    rows = data(table, table, batch_size=2, cache_dir=cache_dir)
    trainer.fit(model, datamodule=rows, ckpt_path=ckpt_path)
    return weights_of(model)


@pytest.fixture(scope="module")
def whole(pairs, tmp_path_factory):
    return run(pairs, tmp_path_factory.mktemp("whole"))


class At(pl.Callback):
    """Calls a function in a hook, the first time that step 2 is complete."""

    def __init__(self, hook, function):
        self.function, self.called = function, False
        setattr(self, hook, self.call)

    def call(self, trainer, *_):
        if (trainer.global_step == 2 or trainer.sanity_checking) and not self.called:
            self.called = True
            self.function()


def send(number):
    return lambda: os.kill(os.getpid(), number)


def fail():
    raise BrokenError


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda s: s.name)
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_signal_in_a_step_lets_it_finish(number, accumulate, pairs, tmp_path, whole):
    options = {"accumulate_grad_batches": accumulate}
    expected = run(pairs, tmp_path / "whole", **options) if accumulate > 1 else whole
    handlers = signal.getsignal(number)
    stop = At("on_before_backward", send(number))
    with pytest.raises(StoppedBySignal, match=f"stopped by {number.name} after step 3") as stopped:
        run(pairs, tmp_path, callbacks=[stop], **options)
    assert stopped.value.code == 128 + number
    assert signal.getsignal(number) == handlers
    saved = tmp_path / "saved.ckpt"
    assert stopped.value.last_checkpoint == (str(saved), 3)
    assert difference(run(pairs, tmp_path, saved, **options), expected) == 0


def test_the_second_ctrl_c_stops_at_once_and_saves_no_half_step(pairs, tmp_path):
    def twice():
        send(signal.SIGINT)()
        send(signal.SIGINT)()
        raise AssertionError("the step continues")

    saver = ModelCheckpoint(
        tmp_path, filename="saved", every_n_train_steps=1, save_on_exception=True
    )
    warned = pytest.warns(UserWarning, match=r"in the middle of a step.*saved\.ckpt, of step 2")
    with warned, pytest.raises(SystemExit) as ended:
        run(pairs, tmp_path, callbacks=[At("on_before_backward", twice)], saver=saver)
    assert ended.value.code == 1
    assert read_checkpoint(tmp_path / "saved.ckpt")["global_step"] == 2


@pytest.mark.parametrize("hook", ["on_train_batch_start", "on_before_backward"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_an_exception_before_the_optimizer_saves_the_step_before(
    hook, accumulate, pairs, tmp_path, whole
):
    """The loader is a batch ahead then, and a gradient may be half accumulated."""
    options = {"accumulate_grad_batches": accumulate}
    expected = run(pairs, tmp_path / "whole", **options) if accumulate > 1 else whole
    with pytest.raises(BrokenError):
        run(pairs, tmp_path, callbacks=[At(hook, fail)], **options)
    saved = tmp_path / "saved.ckpt"
    assert read_checkpoint(saved)["global_step"] == 2
    assert difference(run(pairs, tmp_path, saved, **options), expected) == 0


def test_an_exception_while_the_optimizer_changes_weights_saves_nothing(pairs, tmp_path):
    class Half(torch.optim.AdamW):
        steps = 0

        def step(self, closure=None):
            super().step(closure)
            Half.steps += 1
            if Half.steps == 3:
                raise BrokenError

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with pytest.raises(BrokenError):
            trainer = pl.Trainer(
                callbacks=[ModelCheckpoint(tmp_path, save_on_exception=True)], max_steps=6, **QUIET
            )
            model = module(optimizer=lambda params: Half(params), preflight=False)
            table = str(pairs / "heldout/metadata.csv")
            trainer.fit(model, datamodule=DistillDataModule(table, batch_size=2))
    assert not list(tmp_path.glob("*.ckpt"))
    messages = [str(warning.message) for warning in caught]
    assert any("which is not saved; the last checkpoint: none" in text for text in messages)


@pytest.mark.parametrize("hook", ["on_train_batch_end"])
def test_an_exception_after_the_optimizer_saves_nothing(hook, pairs, tmp_path):
    with pytest.raises(BrokenError):
        run(pairs, tmp_path, callbacks=[At(hook, fail)])
    assert not list(tmp_path.glob("*.ckpt"))


@pytest.mark.parametrize("number", [None, signal.SIGINT, signal.SIGTERM])
def test_a_stop_in_a_validation_saves_the_step_before_it(number, pairs, tmp_path, whole):
    stop = At("on_validation_batch_start", fail if number is None else send(number))
    options = {"num_sanity_val_steps": 0, "val_check_interval": 2}
    expected = run(pairs, tmp_path / "whole", **options)
    with pytest.raises(BrokenError if number is None else StoppedBySignal):
        run(pairs, tmp_path, callbacks=[stop], **options)
    saved = tmp_path / "saved.ckpt"
    assert read_checkpoint(saved)["global_step"] == 2
    assert difference(run(pairs, tmp_path, saved, **options), expected) == 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda s: s.name)
def test_a_signal_in_the_first_validation_ends_with_its_status(number, pairs, tmp_path):
    stop = At("on_validation_batch_start", send(number))
    with pytest.raises(StoppedBySignal, match="before the first step") as stopped:
        run(pairs, tmp_path, callbacks=[stop])
    assert stopped.value.code == 128 + number
    assert not list(tmp_path.glob("*.ckpt"))
    assert stop_report(stopped.value, ["fit"]).endswith("\nNo checkpoint was saved.")


@pytest.mark.parametrize("command", ["validate", "test", "predict"])
def test_a_signal_ends_other_commands_at_once(command, pairs, tmp_path):
    stop = pl.Callback()
    names = {"validate": "validation", "test": "test", "predict": "predict"}
    setattr(stop, f"on_{names[command]}_batch_start", lambda *_: send(signal.SIGTERM)())
    trainer = pl.Trainer(default_root_dir=tmp_path, callbacks=[stop], **QUIET)
    rows = DistillDataModule(val_metadata_path=str(pairs / "heldout/metadata.csv"))
    handlers = signal.getsignal(signal.SIGTERM)
    with pytest.raises(StoppedBySignal) as stopped:
        getattr(trainer, command)(module(metrics={}), datamodule=rows)
    assert (str(stopped.value), stopped.value.code) == ("stopped by SIGTERM", 143)
    assert signal.getsignal(signal.SIGTERM) == handlers


def test_a_signal_while_encoding_keeps_what_is_encoded(pairs, tmp_path, monkeypatch):
    populate, calls = EncodeOnce.populate, []

    def stop_at_the_third(self, **arguments):
        calls.append(arguments)
        if len(calls) == 3:
            send(signal.SIGTERM)()
        return populate(self, **arguments)

    monkeypatch.setattr(EncodeOnce, "populate", stop_at_the_third)
    handlers = signal.getsignal(signal.SIGTERM)
    with pytest.raises(StoppedBySignal, match="before the first step"):
        run(pairs, tmp_path, cache_dir=str(tmp_path / "cache"))
    assert signal.getsignal(signal.SIGTERM) == handlers
    assert len(calls) == 3
    assert list((tmp_path / "cache").rglob("*.safetensors"))


@pytest.mark.parametrize("steps", [{"max_steps": 8}, {"max_steps": -1, "max_epochs": 2}])
@pytest.mark.parametrize("saves", [{"save_on_train_epoch_end": True}, {"every_n_train_steps": 4}])
def test_early_stopping_resumes_at_the_end_of_an_epoch(steps, saves, pairs, tmp_path, whole):
    """The order of the rows, too: Lightning would begin with the first epoch's again."""

    def fit(out, ckpt_path=None, **options):
        stop = EarlyStopping("val_gap_closed", mode="max", patience=9)
        saver = ModelCheckpoint(out, filename="last", enable_version_counter=False, **saves)
        return run(pairs, out, ckpt_path, [stop], saver, **options)

    expected = fit(tmp_path / "whole", **steps)
    fit(tmp_path, max_steps=-1, max_epochs=1)
    assert difference(fit(tmp_path, tmp_path / "last.ckpt", **steps), expected) == 0


def test_where_slurm_requeues_the_job_it_is_saved_after_the_step(
    pairs, tmp_path, whole, monkeypatch
):
    names = {"JOB_ID": 1, "NTASKS": 1, "LOCALID": 0, "PROCID": 0, "NODEID": 0, "JOB_NAME": "train"}
    for name, value in names.items():
        monkeypatch.setenv(f"SLURM_{name}", str(value))
    commands = []
    monkeypatch.setattr(signal_connector, "call", lambda command: commands.append(command) or 0)
    stop = At("on_before_backward", send(signal.SIGUSR1))
    environment = SLURMEnvironment(auto_requeue=True)
    run(pairs, tmp_path, callbacks=[stop], plugins=[environment])
    assert commands == [["scontrol", "requeue", "1"]]
    (saved,) = tmp_path.glob("hpc_ckpt_*.ckpt")
    assert read_checkpoint(saved)["global_step"] == 3
    elsewhere = saved.rename(tmp_path / "step_3.ckpt")
    assert difference(run(pairs, tmp_path, elsewhere), whole) == 0


class Checkpoints:
    last = ("runs/last.ckpt", 3)


def test_the_command_that_resumes_is_printed():
    stop = StoppedBySignal(signal.SIGTERM, "after step 3", 3, Checkpoints())
    arguments = ["fit", "--config", "my config.yaml", "--ckpt_path", "old.ckpt"]
    assert stop_report(stop, arguments).splitlines() == [
        "stopped by SIGTERM after step 3",
        "The last checkpoint, of step 3: runs/last.ckpt",
        "Resume with: lit-distill fit --config 'my config.yaml' --ckpt_path runs/last.ckpt",
    ]
    late = StoppedBySignal(signal.SIGINT, "after step 5", 5, Checkpoints())
    assert "Later steps are lost" in stop_report(late, ["fit", "--ckpt_path=old.ckpt"])
    assert stop_report(StoppedBySignal(signal.SIGINT), ["test"]) == "stopped by SIGINT"
    assert (stop.code, late.code) == (143, 130)


def test_workers_that_read_data_do_not_die_of_ctrl_c(pairs, tmp_path, whole):
    """A terminal sends it to them, too."""

    class Workers(DistillDataModule):
        def __init__(self, *args, **options):
            super().__init__(*args, num_workers=1, **options)

    def interrupt():
        for process in torch.multiprocessing.active_children():
            os.kill(process.pid, signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(StoppedBySignal, match="after step 3"):
        run(pairs, tmp_path, callbacks=[At("on_before_backward", interrupt)], data=Workers)
    assert difference(run(pairs, tmp_path, tmp_path / "saved.ckpt"), whole) == 0
