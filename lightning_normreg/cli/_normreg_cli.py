"""LightningCLI for any model, with role-based decay groups, monitors and projection."""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from jsonargparse import ArgumentParser, Namespace
from lightning_utilities.core.rank_zero import rank_zero_info
from torch import nn
from torch.optim import Optimizer

import lightning_normreg.demos  # noqa: F401, so that its classes are known by their short names
from lightning_normreg._compat import pl
from lightning_normreg.cli._errors import DEBUG_HINT, ArgumentRefused, blamed_on, message_for_user
from lightning_normreg.cli._groups import CALLBACK_GROUPS, GROUP_OF_CALLBACK, DecayGroup
from lightning_normreg.cli._namespace import namespace_of
from lightning_normreg.cli._parser import Parser, add_optional
from lightning_normreg.cli._schedulers import MakeScheduler, natural_interval
from lightning_normreg.cli._subcommands import SUMMARIES, epilog

DEFAULT = pl.__name__
if TYPE_CHECKING:
    from pytorch_lightning.cli import LightningArgumentParser, LightningCLI

    Base = LightningCLI
else:
    Base = object
    LightningCLI = import_module(f"{DEFAULT}.cli").LightningCLI

MakeOptimizer = Callable[[Iterable[Any]], Optimizer]


class Commands(Base):
    """What :class:`NormRegCLI` adds to the LightningCLI of a namespace."""

    namespace = DEFAULT

    def __init__(self, model_class: Any = None, datamodule_class: Any = None, **options: Any) -> None:
        helps = {name: {"description": SUMMARIES[name], "epilog": epilog(name)} for name in self.subcommands()}
        options["parser_kwargs"] = helps | options.get("parser_kwargs", {})
        self._makes_optimizers = options.pop("auto_configure_optimizers", True)
        with self.explained_errors():
            super().__init__(model_class, datamodule_class, auto_configure_optimizers=False, **options)

    @contextmanager
    def explained_errors(self) -> Iterator[None]:
        """Errors of arguments inside of this end the process with 2 and a message that names the key."""
        try:
            yield
        except Exception as error:
            defaults = dict(GROUP_OF_CALLBACK)
            for key, given in (("model", self.model_class), ("data", self.datamodule_class)):
                defaults[getattr(given, "__name__", key)] = key
            early = not hasattr(self, "trainer")
            said = message_for_user(error, self._settings("config"), defaults, constructing=early)
            if said is None or not hasattr(self, "parser"):
                raise
            self._parser(getattr(self, "subcommand", None)).error(said, error)

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        """Make our parser, which Lightning before 2.6 has no argument for."""
        kwargs.setdefault("dump_header", [f"{self.namespace}=={import_module(self.namespace).__version__}"])
        theirs = import_module(f"{self.namespace}.cli").LightningArgumentParser
        parser: LightningArgumentParser = type("Parser", (Parser, theirs), {})(**kwargs)
        parser.add_argument("-c", "--config", action="config", help="Path to a configuration file, YAML or JSON.")
        return parser

    def _settings(self, which: str) -> Any:
        """Those of the subcommand: as parsed (``config``), or as objects (``config_init``)."""
        settings = getattr(self, which, {})
        return settings.get(str(getattr(self, "subcommand", None)), settings)

    def add_core_arguments_to_parser(self, parser: Any) -> None:
        """Put the groups of this package before Lightning's."""
        group = parser.add_argument_group("curves, projection and rotation")
        for key, (makes, default, text) in CALLBACK_GROUPS.items():
            group.add_argument(f"--{key}", type=bool | makes, default=default, help=text)
        if self._makes_optimizers:
            self._add_optimizer_arguments(parser)
        super().add_core_arguments_to_parser(parser)
        parser.title("trainer", "trainer", "Lightning's Trainer; --trainer.NAME for each of:")
        parser.fold("trainer")
        parser.title("model", "model")
        parser.title("data", "data")

    def _add_optimizer_arguments(self, parser: LightningArgumentParser) -> None:
        group = parser.add_argument_group("optimizer", "In place of the model's own configure_optimizers.")
        text = "Class name or path, such as AdamW, then its arguments, such as --optimizer.lr 1e-3."
        add_optional(group, "optimizer", MakeOptimizer, None, text)
        text = "Split the parameters for --optimizer by role: weights and embeddings have --optimizer.weight_decay; "
        text += "gains, shifts and biases have 0, or what is given, such as --decay.bias 0.01. false makes one group."
        group.add_argument("--decay", type=bool | DecayGroup, default=True, help=text)
        group = parser.add_argument_group("learning-rate schedule", "For --optimizer.")
        text = "Class name or path, then its arguments. SchedulerSequence and SchedulerChain take a list, in YAML."
        add_optional(group, "lr_scheduler", _scheduler_type(self.namespace), None, text)
        text = "When the scheduler steps. By default after each batch for OneCycleLR, CyclicLR and DecayFreeLR, "
        text += "after each epoch for all others."
        add_optional(group, "lr_interval", Literal["step", "epoch"], None, text)

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse, and look whether a checkpoint is there."""
        with warnings.catch_warnings():
            # It guards against a script that passes arguments of its own; here they are the command line's.
            warnings.filterwarnings("ignore", message="LightningCLI's args parameter")
            super().parse_arguments(parser, args)
        subcommand = self.config.get("subcommand")
        path = self.config[subcommand].get("ckpt_path") if subcommand else None
        elsewhere = str(path).startswith("registry") or str(path) in ("best", "last", "hpc") or "://" in str(path)
        if path and not elsewhere and not Path(path).exists():
            self._parser(subcommand).error(f"ckpt_path: there is no file {str(path)!r}.")

    def _parse_ckpt_path(self) -> None:
        try:
            super()._parse_ckpt_path()
        except (pickle.UnpicklingError, EOFError, RuntimeError) as error:
            subcommand = self.config["subcommand"]
            path = str(self.config[subcommand].ckpt_path)
            message = f"ckpt_path: {path!r} is no checkpoint that can be loaded with weights_only=True. {DEBUG_HINT}"
            self._parser(subcommand).error(message, error)

    def instantiate_classes(self) -> None:
        """Make the objects, and give the model its optimizer."""
        super().instantiate_classes()
        if self._makes_optimizers:
            self._give_optimizer()

    def _give_optimizer(self) -> None:
        made, parsed = self._settings("config_init"), self._settings("config")
        own = type(self.model).configure_optimizers
        inherits = own is import_module(self.namespace).LightningModule.configure_optimizers
        if made["optimizer"] is None:
            if made["lr_scheduler"] is not None:
                raise ArgumentRefused("lr_scheduler", "it needs --optimizer; the model's own has its own scheduler.")
            if not isinstance(made["decay"], bool):
                raise ArgumentRefused("decay", "the model's own configure_optimizers makes its own groups. Give "
                                      "--optimizer, or let the model call lightning_normreg.decay_groups.")  # fmt: skip
            if inherits and self.subcommand == "fit":
                name = type(self.model).__name__
                raise ArgumentRefused("optimizer", f"{name} has no configure_optimizers. Give one, such as AdamW.")
            return
        if not inherits:
            rank_zero_info(f"--optimizer takes the place of {type(self.model).__name__}.configure_optimizers.")
        # Made by a parser of their own, for those of this one hold on to it, and the model is copied and pickled.
        parser = ArgumentParser(exit_on_error=False)
        add_optional(parser, "optimizer", MakeOptimizer)
        add_optional(parser, "lr_scheduler", _scheduler_type(self.namespace))
        chosen = {key: parsed[key] for key in ("optimizer", "lr_scheduler")}
        make = parser.instantiate_classes(parser.parse_object(chosen))
        arguments = {**parsed["optimizer"].get("init_args", {}), **parsed["optimizer"].get("dict_kwargs", {})}
        decay = DecayGroup() if made["decay"] is True else made["decay"] or None
        self.model.configure_optimizers = partial(
            _configure_optimizers, self.model, make, decay, arguments.get("weight_decay"), made["lr_interval"]
        )

    def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:
        """Make the Trainer; what its callbacks name replaces a default of the same class."""
        made = self._settings("config_init")
        named = made["trainer"].get("callbacks") or []
        named = list(named) if isinstance(named, list) else [named]
        defaults = self.trainer_defaults.get("callbacks", [])
        self.trainer_defaults = {key: value for key, value in self.trainer_defaults.items() if key != "callbacks"}
        callbacks = list(defaults) if isinstance(defaults, list) else [defaults]
        for key, (makes, *_) in CALLBACK_GROUPS.items():
            with blamed_on(key):
                setting = makes() if made[key] is True else made[key]
                callbacks += setting.callbacks() if setting else []
        forced = [made[key] for key in self._parser(self.subcommand).callback_keys]
        for callback in callbacks:
            if any(type(callback) is type(other) for other in named + forced):
                name = type(callback).__name__
                rank_zero_info(f"The {name} of trainer.callbacks takes the place of the default one.")
            else:
                named.append(callback)
        with blamed_on("trainer"):
            return super().instantiate_trainer(**{"callbacks": named} | kwargs)


class NormRegCLI(Commands, LightningCLI):
    """LightningCLI with curves, projection and decay groups, for any LightningModule and DataModule by class path.

    It takes LightningCLI's arguments and has its subcommands ``fit``, ``validate``, ``test`` and ``predict``, and adds:

    * ``--monitor``, ``--projection``, ``--rotation``: ``true``, ``false``, or arguments of the callbacks
      (``--projection.radius 1.0``). What ``trainer.callbacks`` names replaces the default of the same class.
    * ``--optimizer``, ``--lr_scheduler``: any class, without a line in the model. Without them the model's own
      ``configure_optimizers`` is used. Sequences of schedules: :class:`SchedulerSequence`, :class:`SchedulerChain`.
    * ``--decay``: groups by role for ``--optimizer``; its arguments are those of :func:`decay_groups`.
    * ``--lr_interval``: whether the scheduler steps after each batch or epoch.
    * Errors of arguments name the key, and end the process with 2.

    Models of ``lightning.pytorch`` get its Trainer. A class derived from this one is for ``pytorch_lightning``; derive
    from ``NormRegCLI.of("lightning.pytorch")`` for the other.

    Args:
        model_class: A LightningModule, or None for any by ``--model``.
        datamodule_class: A LightningDataModule, or None for any by ``--data``.
        options: LightningCLI's other arguments, by keyword.

    Examples:
        >>> from lightning_normreg.demos import DemoConvNet
        >>> args = ["--optimizer=AdamW", "--optimizer.weight_decay=0.05", "--seed_everything=0"]
        >>> cli = NormRegCLI(DemoConvNet, run=False, args=args)
        >>> for group in cli.model.configure_optimizers().param_groups:
        ...     print(group["name"], group["weight_decay"])
        weight 0.05
        gamma 0.0
        beta 0.0
        bias 0.0
    """

    def __new__(cls, model_class: Any = None, *args: Any, **options: Any) -> Any:
        """Make the class of the model's namespace."""
        namespace = namespace_of(model_class, options.get("args"))
        if namespace == DEFAULT:
            return super().__new__(cls)
        if cls is not NormRegCLI:
            raise TypeError(
                f"{cls.__name__} must be of the model's namespace. Derive it from NormRegCLI.of({namespace!r})."
            )
        return NormRegCLI.of(namespace)(model_class, *args, **options)

    @staticmethod
    @cache
    def of(namespace: str) -> type[LightningCLI]:
        """The class for ``"pytorch_lightning"`` (this one) or ``"lightning.pytorch"``."""
        if namespace == DEFAULT:
            return NormRegCLI
        base = import_module(f"{namespace}.cli").LightningCLI
        return type("NormRegCLI", (Commands, base), {"namespace": namespace, "__doc__": NormRegCLI.__doc__})


@cache
def _scheduler_type(namespace: str) -> Any:
    """What makes a scheduler. Lightning's plateau, with its ``monitor``, comes first: torch's has the same name."""
    plateau = import_module(f"{namespace}.cli").ReduceLROnPlateau
    return Callable[[Optimizer], plateau] | MakeScheduler


def _configure_optimizers(
    module: nn.Module, make: Namespace, decay: DecayGroup | None, weight_decay: float | None, interval: str | None
) -> Any:
    """Make the optimizer when training starts, so that parameters are those that are trained, sharded or not.

    ``make`` makes optimizer and scheduler. ``decay`` is None for one group, ``weight_decay`` where the optimizer has no
    such argument, ``interval`` for the scheduler's own.
    """
    parameters: Iterable[Any] = module.parameters()
    if decay is not None and weight_decay is not None:
        with blamed_on("decay"):
            parameters = decay.split(module, weight_decay)
    elif decay is not None:
        rank_zero_info("The optimizer has no `weight_decay`, so its parameters are in one group.")
    with blamed_on("optimizer"):
        optimizer = make.optimizer(parameters)
    if make.lr_scheduler is None:
        return optimizer
    with blamed_on("lr_scheduler"):
        scheduler = make.lr_scheduler(optimizer)
    entry = {"scheduler": scheduler, "interval": interval or natural_interval(scheduler)}
    if hasattr(scheduler, "monitor"):
        entry["monitor"] = scheduler.monitor
    return {"optimizer": optimizer, "lr_scheduler": entry}
