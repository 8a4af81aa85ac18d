"""The command `lit-distill`: LightningCLI with this package's subcommands."""

from __future__ import annotations

import inspect
import os
import signal
import sys
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.cli import ArgsType, LightningCLI
from lightning.pytorch.utilities import rank_zero_only

from lit_distill.commands import console
from lit_distill.commands.check import check
from lit_distill.commands.checkpoint_settings import checkpoint_model
from lit_distill.commands.export import export
from lit_distill.commands.fit import SaveFitConfig, TrainingSize, fit
from lit_distill.commands.generate import generate
from lit_distill.commands.init import init
from lit_distill.commands.parser import CommandParser
from lit_distill.commands.plan import plan
from lit_distill.commands.play import play
from lit_distill.commands.plot import plot
from lit_distill.commands.predict import predict
from lit_distill.commands.preflight import preflight
from lit_distill.commands.stopped import stop_report
from lit_distill.commands.test import test
from lit_distill.commands.validate import validate
from lit_distill.data.datamodule import DistillDataModule
from lit_distill.errors import InputError
from lit_distill.export.exporter import ExportError
from lit_distill.preflight.report import PreflightError
from lit_distill.training.direct_distill import DirectDistill
from lit_distill.training.image_callbacks import ImageGrid, ImageWriter
from lit_distill.training.progress_bar import StepProgressBar
from lit_distill.training.sample_images import SampleImages
from lit_distill.training.signals import StoppedBySignal
from lit_distill.version import __version__

EXPECTED_ERRORS = (InputError, PreflightError, ExportError, OSError, FloatingPointError)
"""Errors whose message says what a user can do; anything else is a fault of the program."""

PARSER = {
    "prog": "lit-distill",
    "version": __version__,
    "description": "Distil any diffusers pipeline into one that needs a few steps and no guidance.",
}
"""Arguments of the program's parser; a subcommand's has its own description."""

WITHOUT_TRAINER = {"init": init}
"""Subcommands that take neither model nor data nor trainer."""


class CommandTrainer(pl.Trainer):
    """Lightning's Trainer with the subcommands as methods, where LightningCLI expects them."""

    generate = generate
    check = check
    preflight = preflight
    plan = staticmethod(plan)
    plot = staticmethod(plot)
    export = export
    fit = fit  # type: ignore[assignment]
    validate = validate  # type: ignore[assignment]
    play = play
    test = test  # type: ignore[assignment]
    predict = predict  # type: ignore[assignment]


class DistillCLI(LightningCLI):
    """LightningCLI with the subcommands of `CommandTrainer`."""

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Return the subcommands, each with its arguments that are not options."""
        names = ("generate", "check", "preflight", "plan", "plot", "export", "play")
        context = {"model", "datamodule", "trainer_settings", "configs"}
        added = dict.fromkeys(names, context)
        return {**LightningCLI.subcommands(), **added}

    def _add_subcommands(self, parser: Any, **kwargs: Any) -> None:  # noqa: ANN401
        super()._add_subcommands(parser, **kwargs)
        for name, command in WITHOUT_TRAINER.items():
            plain = CommandParser(description=(command.__doc__ or "").partition("\n")[0])
            plain.add_function_arguments(command)
            parser._subcommands_action.add_subcommand(name, plain, help=plain.description)
            self._subcommand_parsers[name] = plain
        parser.commands = self._subcommand_parsers

    def _prepare_subcommand_parser(self, klass: type, subcommand: str, **kwargs: Any) -> Any:  # noqa: ANN401
        parser: Any = super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
        arguments = inspect.signature(getattr(klass, subcommand)).parameters.values()
        parser.required = {each.name for each in arguments if each.default is each.empty}
        return parser

    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        kwargs = super()._prepare_subcommand_kwargs(subcommand)
        kwargs["configs"] = [str(path) for path in self.config[subcommand].config or []]
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
        """Set this project's defaults, and add the images of prompts, under ``sample``."""
        parser.add_lightning_class_args(SampleImages, "sample")
        parser.set_defaults(
            {
                "model": {"class_path": "lit_distill.DirectDistill"},
                "data": {"class_path": "lit_distill.DistillDataModule"},
                "trainer.default_root_dir": "runs",
                # DistillDataModule distributes the rows of every bucket over the ranks.
                "trainer.use_distributed_sampler": False,
                # A full validation before the first step: it is where the curves start, and the
                # undistilled pipeline's error, to which gap_closed is relative, costs no second
                # denoiser there.
                "trainer.num_sanity_val_steps": -1,
            }
        )

    def _parse_ckpt_path(self) -> None:
        # On fit, Lightning would silently prefer the checkpoint's settings to the command line's.
        subcommand = self.config.get("subcommand")
        config = self.config.get(str(subcommand), {})
        ignored = (None, "fit", "plan", "export", "play", "plot")
        if subcommand in ignored or not config.get("ckpt_path"):
            return
        settings = {subcommand: {"model": checkpoint_model(config.ckpt_path, config)}}
        self.config = self.parser.parse_object(settings, self.config)

    def _set_seed(self) -> None:
        if self.subcommand not in WITHOUT_TRAINER:
            super()._set_seed()

    def instantiate_classes(self) -> None:
        """Create trainer, model and data, where the subcommand takes them."""
        if self.subcommand not in WITHOUT_TRAINER:
            console.hide_loading_bars()
            super().instantiate_classes()

    def _run_subcommand(self, subcommand: str) -> None:
        if subcommand in WITHOUT_TRAINER:
            WITHOUT_TRAINER[subcommand](**self.config[subcommand].as_dict())
        else:
            super()._run_subcommand(subcommand)

    def _instantiate_trainer(
        self, config: dict[str, Any], callbacks: list[pl.Callback]
    ) -> pl.Trainer:
        """Return the trainer, with what this package prints; only a training writes logs."""
        configured = config.get("callbacks") or []
        configured = configured if isinstance(configured, list) else [configured]
        has_bar = any(isinstance(callback, ProgressBar) for callback in configured)
        if not has_bar and config.get("enable_progress_bar") is not False:
            callbacks = [*callbacks, StepProgressBar()]
        if config.get("enable_model_summary") is None and console.is_quiet():
            config["enable_model_summary"] = False
        if config.get("logger") is None and self.subcommand != "fit":
            config["logger"] = False
        return super()._instantiate_trainer(config, callbacks)

    def before_fit(self) -> None:
        """Log images of held-out rows at every validation, unless an ImageGrid is configured."""
        self._add_callback(ImageGrid())
        self._add_callback(TrainingSize())

    def before_predict(self) -> None:
        """Write the images, unless an ImageWriter is configured."""
        self._add_callback(ImageWriter())

    def _add_callback(self, callback: pl.Callback) -> None:
        callbacks = self.trainer.callbacks  # type: ignore[attr-defined]
        if not any(isinstance(other, type(callback)) for other in callbacks):
            callbacks.append(callback)


def build_cli(args: ArgsType = None) -> DistillCLI:
    """Parse `args` (default: `sys.argv`) and run the subcommand."""
    return DistillCLI(
        DirectDistill,
        DistillDataModule,
        trainer_class=CommandTrainer,
        parser_class=CommandParser,
        parser_kwargs=PARSER,
        subclass_mode_model=True,
        subclass_mode_data=True,
        # The module creates the optimizer, after the pipeline is loaded.
        auto_configure_optimizers=False,
        seed_everything_default=0,
        save_config_callback=SaveFitConfig,
        save_config_kwargs={"overwrite": True},
        args=args,
    )


def main(args: ArgsType = None) -> None:
    """Run the command `lit-distill`.

    Without `args`, as the command, it prints only what its user can act on, and errors that a user
    can mend in a few lines, and exits with status 2. ``--verbose`` (LIT_DISTILL_VERBOSE=1) brings
    the messages of all libraries back, ``--debug`` (LIT_DISTILL_DEBUG=1) shows the traceback. With
    `args`, as a program calls it, it hides nothing and raises the errors.
    """
    if args is not None:
        build_cli(args)
        return
    debug = os.environ.get("LIT_DISTILL_DEBUG", "") not in ("", "0")
    if "--debug" in sys.argv:
        sys.argv.remove("--debug")
        debug = True
    if _is_flag("--verbose"):
        sys.argv.remove("--verbose")
        os.environ[console.VERBOSE] = "1"
    try:
        with console.quiet():
            build_cli()
    except StoppedBySignal as stop:
        _print_once(stop_report(stop, sys.argv[1:]))
        raise
    except KeyboardInterrupt:  # outside of what a run finishes first
        if debug:
            raise
        _print_once("interrupted")
        sys.exit(128 + signal.SIGINT)
    except EXPECTED_ERRORS as error:
        if debug:
            raise
        _print_once(f"error: {error}\nThe traceback: --debug")
        sys.exit(2)


def _is_flag(option: str) -> bool:
    """Return whether an option is given without a value: test and validate have one of the name."""
    value = sys.argv[sys.argv.index(option) + 1 :][:1] if option in sys.argv else ["true"]
    return value not in (["true"], ["false"])


def _print_once(text: str) -> None:
    """Print to the standard error stream, on one of several processes."""
    if getattr(rank_zero_only, "rank", 0) == 0:
        print(text, file=sys.stderr)
