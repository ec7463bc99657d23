"""Errors of the training commands and their exit codes.

TrainingError         the run failed (1)
├── ConfigError       the command or the config is wrong (2)
├── DataError         data files that cannot be trained on
├── ServiceError      a judge or rollout service cannot be reached, or its response is invalid
├── Busy              another process is working on the same run or folder
└── JobFailed         a job of a pipeline did not succeed

adapters.AdapterError and unexpected exceptions also exit with 1. runs.stop.Stopped is not a failure and exits with 75.
"""

from typing import ClassVar


class TrainingError(Exception):
    """Base of all errors of training. The message is shown to the user as is: what is wrong, and what to do."""

    exit_code: ClassVar[int] = 1


class ConfigError(TrainingError):
    """An invalid command or config. The message names the file, each bad field and what is wrong."""

    exit_code = 2


class DataError(TrainingError):
    """Data files that cannot be trained on. The message names each bad row, one per line."""


class ServiceError(TrainingError):
    """A judge or rollout service cannot be reached, or its response is invalid."""


class Busy(TrainingError):
    """Another process is working on the same run or folder."""


class JobFailed(TrainingError):
    """A job of a pipeline did not succeed; its run's events say why."""
