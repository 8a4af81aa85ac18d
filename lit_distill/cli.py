"""The command `lit-distill`: LightningCLI with this package's subcommands."""

from __future__ import annotations

import inspect
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.cli import ArgsType, LightningCLI

from lit_distill.commands.check import check
from lit_distill.commands.export import export
from lit_distill.commands.generate import generate
from lit_distill.commands.plan import plan
from lit_distill.commands.plot import plot
from lit_distill.commands.predict import predict
from lit_distill.commands.preflight import preflight
from lit_distill.commands.test import test
from lit_distill.data.datamodule import DistillDataModule
from lit_distill.training.direct_distill import DirectDistill
from lit_distill.training.image_callbacks import ImageGrid, ImageWriter


class CommandTrainer(pl.Trainer):
    """Lightning's Trainer with the subcommands as methods, which is where LightningCLI looks."""

    generate = generate
    check = check
    preflight = preflight
    plan = staticmethod(plan)
    plot = staticmethod(plot)
    export = export
    test = test  # type: ignore[assignment]
    predict = predict  # type: ignore[assignment]


class DistillCLI(LightningCLI):
    """LightningCLI with the subcommands of `CommandTrainer`."""

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Return the subcommands with those arguments of theirs that are not options."""
        given = {"model", "datamodule", "trainer_settings"}
        names = ("generate", "check", "preflight", "plan", "plot", "export")
        further = dict.fromkeys(names, given)
        return {**LightningCLI.subcommands(), **further}

    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        kwargs = super()._prepare_subcommand_kwargs(subcommand)
        kwargs["trainer_settings"] = self.config[subcommand].trainer
        accepted = inspect.signature(getattr(self.trainer, subcommand)).parameters
        return {name: value for name, value in kwargs.items() if name in accepted}

    def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:  # noqa: ANN401
        """Return the trainer; for ``plan`` one that needs none of the devices it plans for."""
        if self.subcommand == "plan":
            kwargs |= {"accelerator": "cpu", "devices": 1, "num_nodes": 1, "strategy": "auto"}
            kwargs |= {"precision": "32-true", "logger": False}
        return super().instantiate_trainer(**kwargs)

    def add_arguments_to_parser(self, parser: Any) -> None:  # noqa: ANN401
        """Set this project's defaults."""
        parser.set_defaults(
            {
                "model": {"class_path": "lit_distill.DirectDistill"},
                "data": {"class_path": "lit_distill.DistillDataModule"},
                "trainer.default_root_dir": "runs",
                # DistillDataModule gives every rank its share of every bucket.
                "trainer.use_distributed_sampler": False,
                # The whole of it, before the first step: there the undistilled pipeline's error,
                # which gap_closed is relative to, costs no second denoiser, and curves start.
                "trainer.num_sanity_val_steps": -1,
            }
        )

    def _parse_ckpt_path(self) -> None:
        # On fit, Lightning would let the checkpoint's settings silently beat the command line's.
        subcommand = self.config.get("subcommand")
        if subcommand in ("fit", "plan", "export", "plot"):
            return
        settings = self.config[subcommand].model.init_args if subcommand else {}
        # How this machine computes is no trait of the student.
        machine = {k: settings[k] for k in ("attention_backend", "quantization") if k in settings}
        super()._parse_ckpt_path()
        for name, value in machine.items():
            self.config[subcommand].model.init_args[name] = value

    def before_fit(self) -> None:
        """Show images of held-out rows at every validation, unless an ImageGrid is set up."""
        self._add_callback(ImageGrid())

    def before_predict(self) -> None:
        """Write the images, unless an ImageWriter is set up."""
        self._add_callback(ImageWriter())

    def _add_callback(self, callback: pl.Callback) -> None:
        callbacks = self.trainer.callbacks  # type: ignore[attr-defined]
        if not any(isinstance(known, type(callback)) for known in callbacks):
            callbacks.append(callback)


def build_cli(args: ArgsType = None) -> DistillCLI:
    """Parse `args` (default: the process's) and run the subcommand."""
    return DistillCLI(
        DirectDistill,
        DistillDataModule,
        trainer_class=CommandTrainer,
        subclass_mode_model=True,
        subclass_mode_data=True,
        # The optimizer is made by the module, after the pipeline is loaded.
        auto_configure_optimizers=False,
        seed_everything_default=0,
        save_config_kwargs={"overwrite": True},
        args=args,
    )


def main(args: ArgsType = None) -> None:
    """Run the command `lit-distill`."""
    build_cli(args)
