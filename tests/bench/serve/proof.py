"""How well the proof tells right adapters from wrong ones: the table of docs/en/proof.md.

    python -m tests.bench.serve.proof --base FOLDER --adapters FOLDER ... [--dtypes float32 ...] [--out proof.json]

Right adapters are made of each given one by scaling it and adding a little noise; a trainer's own code writes their
golden prompts and measures rounding. Wrong ones are made of each right one. The real engine scores all of them, in each
dtype, one prompt at a time and 64 sequences at once, and on a base model with noise in its weights. What the
proof decides is counted for all golden prompts and for halves and quarters of them. In brackets: the largest of its
numbers as a share of its limit, from the least of the cell to the most.
"""

import argparse
import asyncio
import json
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from adapters import GoldenPrompt, Rounding, read_golden, write_golden
from app.engine.base import TokenScore
from app.errors import ProofFailed
from app.lifecycle.evidence import gather, limits
from app.lifecycle.proof import _judge
from training.models.golden import _mean_difference, golden_prompts, rounding
from training.tokens.stop_tokens import find_stops

Tensors = dict[str, torch.Tensor]
SCALES = (0.3, 0.6, 1.0, 1.0, 1.5)
"""Of the right adapters that are made of one; after the first, with noise of 2 % of each tensor's spread."""
SUBSETS = (range(8), range(4), range(4, 8), (0, 3, 5, 6), (0, 4), (2, 7))
BASE_NOISE = (1, 2)
"""In percent of each matrix's spread."""
PROMPTS = 8
QUESTIONS = (
    "感冒有什么症状？", "高血压患者饮食上要注意什么？", "得了胃炎怎么办？", "孩子发烧39度怎么办？",
    "What are the symptoms of gout?", "How is asthma treated?", "When should I see a doctor with a headache?",
    "How can influenza be prevented?",
)  # fmt: skip


def half(name: str, weight: torch.Tensor) -> torch.Tensor:
    return weight * 0.5 if "lora_B" in name else weight


def double(name: str, weight: torch.Tensor) -> torch.Tensor:
    return weight * 2 if "lora_B" in name else weight


def flip(name: str, weight: torch.Tensor) -> torch.Tensor:
    return -weight if "lora_B" in name else weight


def noise(share: float) -> Callable[[str, torch.Tensor], torch.Tensor]:
    def change(_: str, weight: torch.Tensor) -> torch.Tensor:
        return weight + share * weight.std() * torch.randn(weight.shape)

    return change


def not_a_number(_: str, weight: torch.Tensor) -> torch.Tensor:
    return torch.full_like(weight, float("nan"))


def without_layer(number: int) -> Callable[[str, torch.Tensor], torch.Tensor]:
    return lambda name, weight: weight * 0 if f"layers.{number}." in name else weight


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--adapters", type=Path, nargs="+", required=True)
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16", "float16"])
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        _make(options.base, options.adapters, folder / "adapters")
        folders = sorted((folder / "adapters").iterdir())
        passes = [
            (options.base, None),
            (options.base, "NaN"),  # by itself: on a CPU others may compute with what it leaves in the cache
            *((_noisy(options.base, folder, percent), "right") for percent in BASE_NOISE),
        ]
        found: list[dict[str, Any]] = []
        for dtype in options.dtypes:
            for base, kind in passes:
                for one in asyncio.run(_score(base, folders, dtype, kind)):
                    shown = one["kind"] if base == options.base else base.name
                    found += _decide(folder / "adapters" / one["adapter"], dtype, shown, one)
    if options.out:
        options.out.write_text(json.dumps(found))
    _print(found)


def _make(base: Path, sources: Sequence[Path], target: Path) -> None:
    """Right adapters, with golden prompts and what rounding does to each, and wrong ones beside."""
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    stops = find_stops(base, model.config, tokenizer).token_ids
    rows = [
        {"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": ""}]}
        for q in QUESTIONS
    ]
    made: list[tuple[Path, Path]] = []
    for number, source in enumerate(sources):
        tensors = load_file(source / "adapter_model.safetensors")
        layers = sorted({int(name.split("layers.")[1].split(".")[0]) for name in tensors})
        for at, scale in enumerate(SCALES):
            folder = target / f"{number}-{at}-{scale}"
            a_little = noise(0.02 if at else 0.0)
            right = {
                name: a_little(name, weight * (scale if "lora_B" in name else 1))
                for name, weight in tensors.items()
            }
            _write(folder / "right", source, right)
            wrong = {
                "half": half, "double": double, "flip": flip, "noise of 1 %": noise(0.01), "noise of 10 %": noise(0.1),
                "one layer missing": without_layer(layers[(7 * at + 3 * number) % len(layers)]), "NaN": not_a_number,
            }  # fmt: skip
            for kind, change in wrong.items():
                _write(folder / kind, source, {name: change(name, weight) for name, weight in right.items()})
            fresh = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
            adapted = PeftModel.from_pretrained(fresh, folder / "right")
            golden = golden_prompts(adapted, tokenizer, rows, PROMPTS, 32, stops=stops)
            write_golden(folder / "golden.jsonl", golden)
            rounding(adapted, golden)  # it is in bfloat16 from now on
            moved = [_moved(adapted, [prompt]) for prompt in golden]
            (folder / "rounding.json").write_text(json.dumps(moved))
            made.append((folder, source))
    for folder, source in made:
        other = next((one for one, of in made if of != source), None)
        if other:
            shutil.copytree(other / "right", folder / "another adapter")


def _moved(model: Any, golden: Sequence[GoldenPrompt]) -> tuple[float, float]:
    """As training.models.golden.rounding, of the base model and the adapter, for each prompt by itself."""
    with torch.inference_mode(), model.disable_adapter():
        of_base = _mean_difference(model, golden, [prompt.base_logprobs for prompt in golden])
    with torch.inference_mode():
        return of_base, _mean_difference(model, golden, [prompt.logprobs for prompt in golden])


def _write(folder: Path, source: Path, tensors: Tensors) -> None:
    folder.mkdir(parents=True)
    shutil.copy(source / "adapter_config.json", folder)
    save_file(
        {name: weight.contiguous() for name, weight in tensors.items()}, folder / "adapter_model.safetensors"
    )


def _noisy(base: Path, scratch: Path, percent: int) -> Path:
    target = scratch / f"base with {percent} % of noise"
    shutil.copytree(base, target)
    torch.manual_seed(1)
    for file in target.glob("*.safetensors"):
        tensors = load_file(file)
        for name, weight in tensors.items():
            if weight.ndim > 1:
                exact = weight.float()
                tensors[name] = (exact + percent / 100 * exact.std() * torch.randn(weight.shape)).to(
                    weight.dtype
                )
        save_file(tensors, file, metadata={"format": "pt"})
    return target


async def _score(base: Path, folders: Sequence[Path], dtype: str, only: str | None) -> list[dict[str, Any]]:
    """What an engine finds of each adapter of each folder, or of one kind only, without and with it."""
    from app.engine.build import EngineOptions  # noqa: PLC0415
    from app.engine.vllm import VllmEngine  # noqa: PLC0415 - after the environment

    engine = VllmEngine.build(
        EngineOptions(
            model=str(base), name="base", dtype=dtype, max_model_len=1024, max_num_seqs=64, max_lora_rank=16,
            max_loras=8, max_resident=32, kv_cache_gib=1, gpu_memory_utilization=0.5,
        )
    )  # fmt: skip
    await engine.start()
    found = []
    for folder in folders:
        golden = read_golden(folder / "golden.jsonl")
        of_kinds = [only] if only else _kinds(folder)
        loaded = {kind: await engine.load(f"{folder.name}@{kind}", folder / kind) for kind in of_kinds}

        async def scores(adapter: Any, golden: Sequence[GoldenPrompt] = golden) -> list[list[float]]:
            asked = (engine.score(one.prompt_token_ids, one.token_ids, adapter) for one in golden)
            return [[score.logprob for score in each] for each in await asyncio.gather(*asked)]

        async def one_by_one(adapter: Any, golden: Sequence[GoldenPrompt] = golden) -> list[list[float]]:
            return [
                [score.logprob for score in await engine.score(one.prompt_token_ids, one.token_ids, adapter)]
                for one in golden
            ]

        alone = [await one_by_one(adapter) for adapter in (None, *loaded.values())]
        together = await asyncio.gather(*(scores(adapter) for adapter in (None, *loaded.values())))
        for batch, (of_base, *of_adapters) in ((1, alone), (64, together)):
            for kind, of_adapter in zip(of_kinds, of_adapters, strict=True):
                one = {"adapter": folder.name, "kind": kind, "batch": batch}
                found.append({**one, "base_scores": of_base, "scores": of_adapter})
        for adapter in loaded.values():
            await engine.remove(adapter)
    await engine.close()
    return found


def _kinds(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.is_dir() and path.name != "NaN")


def _decide(folder: Path, dtype: str, kind: str, one: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """What the proof says, for each subset of the golden prompts."""
    golden = read_golden(folder / "golden.jsonl")
    moved = json.loads((folder / "rounding.json").read_text())
    lengths = [len(prompt.token_ids) for prompt in golden]
    for subset in SUBSETS:
        some = [at for at in subset if at < len(golden)]
        evidence = gather(
            [golden[at] for at in some],
            [[TokenScore(score, score) for score in one["base_scores"][at]] for at in some],
            [[TokenScore(score, score) for score in one["scores"][at]] for at in some],
        )
        moved_here = _over(some, moved, lengths)
        allowed = limits(evidence, moved_here, "float32", dtype)
        of_limit = max(
            evidence.base_difference / allowed.base,
            evidence.adapter_difference / allowed.adapter,
            abs(evidence.slope - 1) / allowed.slope,
        )
        try:
            _judge("adapter", dtype, evidence, moved_here, "float32")
            verdict = "accepted"
        except ProofFailed as error:
            verdict = str(error).partition("(")[0].removeprefix("adapter failed its proof: ").strip()
        yield {
            "dtype": dtype, "batch": one["batch"], "kind": kind, "prompts": len(some), "verdict": verdict,
            "of_limit": of_limit, "evidence": asdict(evidence), "limits": asdict(allowed),
        }  # fmt: skip


def _over(some: Sequence[int], moved: Sequence[tuple[float, float]], lengths: Sequence[int]) -> Rounding:
    tokens = sum(lengths[at] for at in some)
    base, adapter = (sum(moved[at][side] * lengths[at] for at in some) / tokens for side in (0, 1))
    return Rounding(base=base, adapter=adapter)


def _print(found: Sequence[dict[str, Any]]) -> None:
    kinds = sorted({one["kind"] for one in found}, key=lambda kind: (kind != "right", kind))
    dtypes = list(dict.fromkeys(one["dtype"] for one in found))
    print(f"{'accepted of all':28}" + "".join(f"{dtype:>30}" for dtype in dtypes))
    for kind in kinds:
        cells = []
        for dtype in dtypes:
            of_cell = [one for one in found if (one["kind"], one["dtype"]) == (kind, dtype)]
            counts = Counter(one["verdict"] == "accepted" for one in of_cell)
            ratios = [one["of_limit"] for one in of_cell]
            cells.append(f"{counts[True]} of {counts.total()} ({min(ratios):.2g} to {max(ratios):.2g})")
        print(f"{kind:28}" + "".join(f"{cell:>30}" for cell in cells))


if __name__ == "__main__":
    main()
