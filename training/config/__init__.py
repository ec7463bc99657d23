"""What a job asks for: one YAML file, read into one of the configs by its `stage`.

Relative paths in a config are relative to the current directory. Light on purpose: no torch here.
"""

from training.config.blocks import BaseModelSize, Golden, Lora, Publish, Reward, RopeScaling
from training.config.fields import OnError, Source
from training.config.job import AdapterJob
from training.config.load import STAGES, ConfigError, dump_config, load_config, read_yaml
from training.config.stages import (
    BaseConfig,
    DpoConfig,
    GrpoConfig,
    JobConfig,
    KtoConfig,
    OrpoConfig,
    PpoConfig,
    PtConfig,
    RmConfig,
    SftConfig,
)

__all__ = [
    "STAGES",
    "AdapterJob",
    "BaseConfig",
    "BaseModelSize",
    "ConfigError",
    "DpoConfig",
    "Golden",
    "GrpoConfig",
    "JobConfig",
    "KtoConfig",
    "Lora",
    "OnError",
    "OrpoConfig",
    "PpoConfig",
    "PtConfig",
    "Publish",
    "Reward",
    "RmConfig",
    "RopeScaling",
    "SftConfig",
    "Source",
    "dump_config",
    "load_config",
    "read_yaml",
]
