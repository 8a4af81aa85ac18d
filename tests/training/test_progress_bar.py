import io
import re

import lightning.pytorch as pl
import pytest
import torch

from lit_distill.training import progress_bar
from lit_distill.training.progress_bar import StepProgressBar


class Terminal(io.StringIO):
    def isatty(self):
        return True


class Module(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1))

    def training_step(self, batch, batch_idx):
        loss = self.weight.square().sum()
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val_gap_closed", 0.5, prog_bar=True)

    test_step = validation_step

    def predict_step(self, batch, batch_idx):
        return None

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.01)


def rows(batches, size=4):
    return torch.utils.data.DataLoader(
        [{"row": torch.arange(size)} for _ in range(batches)], batch_size=None
    )


def trainer(tmp_path, *, steps=6, **options):
    bar = StepProgressBar(**options.pop("bar", {}))
    quiet = {"accelerator": "cpu", "logger": False, "enable_model_summary": False}
    return pl.Trainer(
        **quiet, callbacks=[bar], max_steps=steps, default_root_dir=tmp_path, **options
    )


def terminal(monkeypatch):
    """A terminal of 120 columns, in which every step is drawn; from here on the error stream."""
    out = Terminal()
    monkeypatch.setattr("sys.stderr", out)
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setattr(progress_bar, "REDRAWN_EVERY", 0.0)
    return out


def drawn(out):
    return [text.rstrip() for text in re.split(r"[\r\n]|\x1b\[A", out.getvalue()) if text.strip()]


def test_the_bar_counts_optimizer_steps_of_the_whole_run(monkeypatch, tmp_path):
    """12 batches in 3 epochs, two batches a step: one bar of 6 steps."""
    out = terminal(monkeypatch)
    trainer(tmp_path, max_epochs=3, accumulate_grad_batches=2, check_val_every_n_epoch=3).fit(
        Module(), rows(4), rows(2)
    )
    texts = [text for text in drawn(out) if text.startswith("step ")]
    steps = [int(re.match(r"step (\d+)/6 ", text)[1]) for text in texts]
    assert steps == sorted(steps) and set(steps) >= {0, 1, 2, 3, 4, 5, 6}
    assert re.fullmatch(
        r"step 6/6  loss 0\.\d+  gap closed 0\.500  \S+ images/s \|[█#]+\| 00:00 left", texts[-1]
    )
    assert "gap closed" not in texts[2]  # nothing is validated yet but the start
    assert max(map(len, texts)) < 80  # also in a wider terminal
    assert not any("Epoch" in text for text in drawn(out))


def test_images_a_second_leave_validation_out(monkeypatch, tmp_path, capsys):
    """4 images a batch, a second each; a validation of 50 seconds in between."""
    clock = [0.0]
    monkeypatch.setattr(progress_bar.time, "monotonic", lambda: clock[0])

    class Slow(Module):
        def training_step(self, batch, batch_idx):
            clock[0] += 1
            return super().training_step(batch, batch_idx)

        def validation_step(self, batch, batch_idx):
            clock[0] += 50
            super().validation_step(batch, batch_idx)

    trainer(tmp_path, steps=4, num_sanity_val_steps=0).fit(Slow(), rows(2), rows(1))
    assert capsys.readouterr().err.splitlines() == [
        "step 1/4  loss 1  4 images/s  00:03 left",
        "step 2/4  loss 0.96  gap closed 0.500  4 images/s  00:52 left",
        "step 4/4  loss 0.886  gap closed 0.500  4 images/s  00:00 left",
    ]


def test_a_file_gets_a_line_a_minute(monkeypatch, tmp_path, capsys):
    clock = [0.0]
    monkeypatch.setattr(progress_bar.time, "monotonic", lambda: clock[0])

    class Slow(Module):
        def training_step(self, batch, batch_idx):
            clock[0] += 25
            return super().training_step(batch, batch_idx)

        def predict_step(self, batch, batch_idx):
            clock[0] += 25

    run = trainer(tmp_path, steps=7)
    run.fit(Slow(), rows(7))
    found = capsys.readouterr().err.splitlines()
    assert [line.split()[1] for line in found] == ["1/7", "4/7", "7/7"]
    trainer(tmp_path).predict(Slow(), rows(7), return_predictions=False)
    assert capsys.readouterr().err.splitlines() == ["generating 4/7", "generating 7/7"]


@pytest.mark.parametrize("command", ["validate", "test", "predict"])
def test_other_commands_have_a_bar_that_goes_away(command, monkeypatch, tmp_path):
    out = terminal(monkeypatch)
    getattr(trainer(tmp_path), command)(Module(), rows(3))
    what = {"validate": "validating", "test": "testing", "predict": "generating"}[command]
    texts = drawn(out)
    assert any(text.startswith(f"{what} 3/3 |") for text in texts)
    assert out.getvalue().endswith("\r")  # the line is empty again


def test_a_resumed_run_begins_at_its_step(monkeypatch, tmp_path):
    out = terminal(monkeypatch)
    first = trainer(tmp_path, steps=2)
    first.fit(Module(), rows(6))
    first.save_checkpoint(tmp_path / "a.ckpt")
    out.truncate(0)
    trainer(tmp_path, steps=4).fit(Module(), rows(6), ckpt_path=tmp_path / "a.ckpt")
    texts = [text for text in drawn(out) if text.startswith("step ")]
    assert texts[0].startswith("step 2/4 ") and texts[-1].startswith("step 4/4 ")


def test_an_error_begins_on_a_line_of_its_own(monkeypatch, tmp_path):
    out = terminal(monkeypatch)

    class Broken(Module):
        def training_step(self, batch, batch_idx):
            if batch_idx == 2:
                raise RuntimeError
            return super().training_step(batch, batch_idx)

    with pytest.raises(RuntimeError):
        trainer(tmp_path).fit(Broken(), rows(6))
    assert out.getvalue().endswith("\n")
