"""Loads a revision from the store into an engine and proves it there."""

import asyncio
import logging
import time
from dataclasses import dataclass
from pathlib import Path

from adapters import (
    GOLDEN_FILE,
    AdapterStore,
    GoldenPrompt,
    InvalidAdapter,
    Manifest,
    read_golden,
    validate,
    write_golden,
)
from adapters.durable import fsync
from adapters.validate import TEMPLATE_FILE
from app.engine.base import Engine, LoadedAdapter
from app.errors import AdapterRefused, EngineUnavailable, ProofFailed, Unproven
from app.lifecycle.proof import Proof, prove, prove_again, record
from app.metrics import Metrics

logger = logging.getLogger(__name__)

_PROOF_SECONDS = 60


@dataclass(frozen=True)
class Staged:
    """A revision that was checked again, with its files in the page cache for loading."""

    ref: str
    manifest: Manifest
    folder: Path
    golden: list[GoldenPrompt]
    template: str | None
    """The adapter's own chat template."""
    recorded: Path | None
    """The file of recorded answers, for an adapter without golden prompts."""


class Loader:
    """Loads and proves revisions, and remembers which are proved in the present engine."""

    def __init__(
        self, store: AdapterStore, metrics: Metrics, *, recorded_dir: Path, allow_unproven: bool
    ) -> None:
        self._store = store
        self._metrics = metrics
        self._recorded_dir = recorded_dir
        self._allow_unproven = allow_unproven
        self._proofs: dict[str, Proof] = {}

    def forget(self) -> None:
        """Forget all proofs, since the engine is gone."""
        self._proofs.clear()

    def stage(self, engine: Engine, manifest: Manifest) -> Staged:
        """Check a revision before loading it. Reads every byte: call it in a thread.

        Raises AdapterError, AdapterRefused.
        """
        ref = manifest.ref
        folder = self._store.verify(manifest)
        try:
            validate(folder, engine.facts)
        except InvalidAdapter as error:
            raise InvalidAdapter([f"{ref}: {problem}" for problem in error.problems]) from error
        template = None
        if manifest.chat_template_digest:
            template = (folder / TEMPLATE_FILE).read_text(encoding="utf-8")
        if manifest.golden_prompts:
            return Staged(ref, manifest, folder, read_golden(folder / GOLDEN_FILE), template, None)
        if not self._allow_unproven:
            raise Unproven(
                f"{ref} has no {GOLDEN_FILE} and cannot be proved: train it with python -m training, or start the "
                "service with XINGLIN_ALLOW_UNPROVEN=true"
            )
        # Its answers when first loaded on this base model replace the trainer's golden prompts.
        recorded = self._recorded_dir / engine.facts.fingerprint / f"{ref}.jsonl"
        golden = read_golden(recorded) if recorded.exists() else []
        return Staged(ref, manifest, folder, golden, template, recorded)

    async def load(self, engine: Engine, staged: Staged) -> LoadedAdapter:
        """Load a revision into the engine; a failure leaves nothing there. Raises AdapterRefused, EngineUnavailable."""
        started = time.perf_counter()
        loaded = await engine.load(
            staged.ref,
            staged.folder,
            template=staged.template,
            stop=staged.manifest.stop,
            stop_token_ids=staged.manifest.stop_token_ids,
        )
        self._metrics.load_seconds.labels("load").observe(time.perf_counter() - started)
        return loaded

    async def prove(self, engine: Engine, loaded: LoadedAdapter, staged: Staged) -> None:
        """Prove a loaded revision; remove it if that fails. Raises AdapterRefused, EngineUnavailable."""
        try:
            async with asyncio.timeout(_PROOF_SECONDS):
                await self._prove(engine, loaded, staged)
        except BaseException as error:
            await asyncio.shield(_remove(engine, loaded))
            if isinstance(error, ProofFailed):
                self._metrics.proofs.labels(staged.manifest.name, "failed").inc()
            if isinstance(error, TimeoutError):
                raise AdapterRefused(
                    f"{staged.ref} could not be proved within {_PROOF_SECONDS} s, since the engine is busy with other "
                    "adapters: retry, or raise XINGLIN_MAX_LORAS"
                ) from error
            raise
        self._metrics.proofs.labels(staged.manifest.name, "passed").inc()

    async def _prove(self, engine: Engine, loaded: LoadedAdapter, staged: Staged) -> None:
        dtype = engine.dtype if staged.recorded else staged.manifest.dtype
        proof = self._proofs.get(staged.ref)
        if proof and staged.golden:
            await prove_again(engine, loaded, staged.golden, proof)
            return
        golden = staged.golden or await record(engine, loaded)
        proof = self._proofs[staged.ref] = await prove(
            engine, loaded, golden, dtype, staged.manifest.rounding
        )
        if staged.recorded and not staged.golden:
            await asyncio.to_thread(_keep, staged.recorded, golden)
        logger.info(
            "proved %s: log-probabilities of %d tokens in %d golden prompts differ by %.1e nats on average",
            staged.ref, proof.evidence.tokens, proof.prompts, proof.evidence.adapter_difference,
        )  # fmt: skip


async def _remove(engine: Engine, adapter: LoadedAdapter) -> None:
    try:
        await engine.remove(adapter)
    except EngineUnavailable:
        logger.info("%s is gone with its engine", adapter.name)


def _keep(path: Path, golden: list[GoldenPrompt]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".new")
    write_golden(temporary, golden)
    fsync(temporary)
    temporary.replace(path)
    fsync(path.parent)
