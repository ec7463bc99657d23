"""The config of a job: one YAML file, read into the config class of its `stage`.

Relative paths in a config start from the current directory. This package must not import torch.
"""

from training.config.blocks import BaseModelSize, Golden, Lora, Publish, Reward, RopeScaling
from training.config.fields import OnError, Source
from training.config.job import AdapterJob, Rows
from training.config.load import STAGES, dump_config, load_config, read_yaml
from training.config.stages import (
    DpoConfig,
    GrpoConfig,
    JobConfig,
    KtoConfig,
    OfflineJob,
    OrpoConfig,
    PpoConfig,
    PtConfig,
    RmConfig,
    ScratchConfig,
    SftConfig,
)

__all__ = [
    "STAGES",
    "AdapterJob",
    "BaseModelSize",
    "DpoConfig",
    "Golden",
    "GrpoConfig",
    "JobConfig",
    "KtoConfig",
    "Lora",
    "OfflineJob",
    "OnError",
    "OrpoConfig",
    "PpoConfig",
    "PtConfig",
    "Publish",
    "Reward",
    "RmConfig",
    "RopeScaling",
    "Rows",
    "ScratchConfig",
    "SftConfig",
    "Source",
    "dump_config",
    "load_config",
    "read_yaml",
]
