"""Merges a newly trained adapter into its base model, for a new base model."""

import shutil
from pathlib import Path

from adapters import PROVENANCE_FILE, AdapterStore
from training.artifacts.merge import merge
from training.config import AdapterJob
from training.models.base_model import Base


def merge_adapter(adapter: Path, target: Path, base: Base, config: AdapterJob, store: AdapterStore) -> None:
    """Merge `adapter` into the base model, write it to the new folder `target` and remove the adapter's folder.

    The adapter's provenance is copied to `target`.
    """
    shutil.rmtree(target, ignore_errors=True)
    merge(
        config.base_model,
        [str(adapter)],
        target,
        store,
        trust_remote_code=base.trust_remote_code,
    )
    if base.rope_scaling is not None:
        stretched = base.config()
        merged = type(stretched).from_pretrained(target)
        merged.rope_parameters = stretched.rope_parameters
        merged.save_pretrained(target)
    shutil.copyfile(adapter / PROVENANCE_FILE, target / PROVENANCE_FILE)
    shutil.rmtree(adapter)
