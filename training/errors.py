"""What a command of training may fail with, each with its exit code.

TrainingError         the run failed (1)
├── ConfigError       the command or the config is wrong (2)
├── DataError         data files that cannot be trained on
├── ServiceError      a judge or a rollout service cannot be asked, or does not answer as it must
├── Busy              another process is at work on the same thing
└── JobFailed         a job of a pipeline did not succeed

adapters.AdapterError and defects end with 1, too. runs.stop.Stopped is no failure, and ends with 75.
"""

from typing import ClassVar


class TrainingError(Exception):
    """Base of the tree. The message goes to the user as it is: what is wrong, and what to do."""

    exit_code: ClassVar[int] = 1


class ConfigError(TrainingError):
    """A command or config that cannot be carried out. The message names the file, each bad field and what is wrong."""

    exit_code = 2


class DataError(TrainingError):
    """Data files that cannot be trained on. The message names each bad row, one a line."""


class ServiceError(TrainingError):
    """A judge or a rollout service cannot be asked, or does not answer as it must."""


class Busy(TrainingError):
    """Another process is at work on the same thing."""


class JobFailed(TrainingError):
    """A job of a pipeline did not succeed; its run's events say why."""
