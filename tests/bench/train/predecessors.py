"""Training against the predecessors' own ways: speed, memory and what is learnt, on one CPU core.

    python -m tests.bench.train.predecessors --data-dir xinglin-data --medicalgpt sft.jsonl --bentsao llama_data.json

Needs a finished demo (`python -m training demo`), whose base model, adapters and prompts it takes, and files of
MedicalGPT's (sharegpt) and BenTsao's (alpaca) training data. Each measurement is a process of its own with one
thread, and the quicker of two; seconds are its CPU seconds. docs/en/training-speed.md says what is compared. Takes some
twenty minutes.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from shutil import copytree
from typing import Any

import yaml

from training.config import Source
from training.data import read_chats

_BASE = "models/xinglin-demo"
_HELD_OUT = 50  # rows
_AT_ONCE = 2  # comparisons, each on one core
_SEED = 0
_LORA = {"r": 8, "lora_alpha": 16, "lora_dropout": 0.05}
_MEDICALGPT: dict[str, Any] = {
    "way": "medicalgpt", "max_length": 512, "micro_batch": 2, "accumulation": 8,
    "lora": {**_LORA, "target_modules": "all-linear"}, "learning_rate": 4e-3, "chat_template": None,
}  # fmt: skip
_RECIPES: dict[str, dict[str, Any]] = {
    # Their launchers' settings, but for the learning rate: theirs are for billions of weights.
    "medicalgpt": {**_MEDICALGPT, "rows": 500},
    "mixed": {**_MEDICALGPT, "rows": 500, "max_length": 1024},
    "bentsao": {
        "way": "bentsao", "rows": 4560, "most_steps": 8, "max_length": 256, "micro_batch": 128, "accumulation": 1,
        "lora": {**_LORA, "target_modules": ["q_proj", "v_proj"]}, "learning_rate": 4e-3,
        "chat_template": "bentsao-med",
    },
}  # fmt: skip
_OUR_MICRO_BATCH = 4
_ROUNDS = 2
_DEMO_PPO = Path("training/demo/doctor-ppo.yaml")
MIB = 2**20

Result = dict[str, Any]


def main() -> None:
    """Run every comparison asked for, and print the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data-dir", type=Path, default=Path("xinglin-data"))
    parser.add_argument("--medicalgpt", type=Path, nargs="+", help="files of its SFT data")
    parser.add_argument("--bentsao", type=Path, nargs="+", help="its llama_data.json")
    parser.add_argument("--rows", type=int, help="take the first so many of each; every tenth is held out")
    parser.add_argument("--only", nargs="+", choices=[*_RECIPES, "ppo"])
    parser.add_argument("--json", type=Path, help="write everything that was measured there")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)  # the script's own: measure this one
    arguments = parser.parse_args()
    if arguments.child:
        from tests.bench.train import measured  # noqa: PLC0415 - the libraries that are measured

        spec = json.loads(arguments.child.read_text())
        Path(spec["told"]).write_text(json.dumps(getattr(measured, spec["measure"])(spec)))
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for part in ("models", "store", "demo"):
            copytree(arguments.data_dir / part, folder / part)
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            asked = {}
            given = {"medicalgpt": [arguments.medicalgpt], "bentsao": [arguments.bentsao]}
            given["mixed"] = [arguments.medicalgpt, arguments.bentsao]
            for recipe, kinds in given.items():
                if recipe in (arguments.only or _RECIPES) and all(kinds):
                    _split(folder / recipe, kinds, arguments.rows or _RECIPES[recipe]["rows"])
                    asked[recipe] = pool.submit(_least, _compare_sft, folder, recipe)
            if "ppo" in (arguments.only or ["ppo"]):
                asked["ppo"] = pool.submit(_least, _compare_ppo, folder)
            found = {recipe: comparison.result() for recipe, comparison in asked.items()}
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1))
    for recipe, results in found.items():
        print(f"\n{recipe}\n")
        print(_ppo_table(results) if recipe == "ppo" else _sft_table(results))


def _split(folder: Path, kinds: list[list[Path]], rows: int) -> None:
    """Training rows and held-out rows, as both sides read them: as many of each kind, in turn."""
    each = [
        read_chats([Source.model_validate(str(file.absolute())) for file in files])[: rows // len(kinds)]
        for files in kinds
    ]
    chats = [chat for together in zip(*each, strict=True) for chat in together]
    # Every tenth of each kind.
    is_held_out = [at // len(kinds) % 10 == 0 for at in range(len(chats))]
    parts = {
        "train": [chat for chat, held_out in zip(chats, is_held_out, strict=True) if not held_out],
        "held_out": [chat for chat, held_out in zip(chats, is_held_out, strict=True) if held_out][:_HELD_OUT],
    }
    folder.mkdir()
    for name, part in parts.items():
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in part]
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")


def _least(compare: Callable[..., dict[str, Result]], *given: Any) -> dict[str, Result]:
    """Of each side the round that took the least CPU seconds: the work is the same each time, the machine is not."""
    rounds = [compare(*given) for _ in range(_ROUNDS)]
    return {name: min((each[name] for each in rounds), key=lambda one: one["seconds"]) for name in rounds[0]}


def _compare_sft(folder: Path, recipe: str) -> dict[str, Result]:
    """Theirs and ours for as many steps; both ways of ours."""
    data = folder / recipe
    rows = len((data / "train.jsonl").read_text().splitlines())
    batch = _RECIPES[recipe]["micro_batch"] * _RECIPES[recipe]["accumulation"]
    steps = min(-(-rows // batch), _RECIPES[recipe].get("most_steps", rows))
    spec = _RECIPES[recipe] | {
        "recipe": recipe, "base": str(folder / _BASE), "data_dir": str(folder), "rows": rows, "steps": steps,
        "seed": _SEED,
        "train": str(data / "train.jsonl"), "held_out": str(data / "held_out.jsonl"),
    }  # fmt: skip
    results = {"theirs": _child(spec | {"side": "theirs"}, "theirs")}
    if spec["way"] == "bentsao":
        grouped = spec | {"side": "theirs", "grouped": True}
        results["theirs, with group_by_length"] = _child(grouped, "theirs grouped")
    theirs = results["theirs"]
    full_rows = round(theirs["tokens"] / steps / spec["max_length"])
    micro_batch = min(_OUR_MICRO_BATCH, spec["micro_batch"])
    ours = spec | {"side": "ours", "micro_batch": micro_batch, "accumulation": batch // micro_batch}
    results["ours"] = _child(ours, "ours")
    packed = ours | {"packing": True, "micro_batch": full_rows, "accumulation": 1}
    results["ours, packed"] = _child(packed, "ours, packed")
    return results


def _compare_ppo(folder: Path) -> dict[str, Result]:
    """TRL's RLOO in MedicalGPT's batches and in ours, and our PPO: as many answers."""
    job = yaml.safe_load(_DEMO_PPO.read_text())
    answers = job["steps"] * job["batch_size"]
    models = folder / "merged"
    paths = {"data_dir": str(folder), "base": str(folder / _BASE)}
    _in_child(paths | {"measure": "merge", "models": str(models)})
    spec = paths | {
        "recipe": "ppo", "policy": str(models / "policy"),
        "reward": str(models / "reward"), "train": str(folder / "demo/doctor.jsonl"), "seed": _SEED,
        "held_out": str(folder / "demo/doctor_heldout.jsonl"), "max_new_tokens": job["max_new_tokens"],
        "answers": answers, "job": job,
    }  # fmt: skip
    theirs = spec | {"side": "theirs"}
    small = {"micro_batch": 1, "accumulation": 4, "steps": answers // 4, "learning_rate": 1e-5}
    large = {"micro_batch": 32, "accumulation": 1, "steps": answers // 32, "learning_rate": 1e-4}
    return {
        "theirs": _child(theirs | small, "theirs"),
        "theirs, 32 answers a step": _child(theirs | large, "theirs, 32 answers a step"),
        "ours": _child(spec | {"side": "ours"}, "ours"),
    }


def _child(spec: dict[str, Any], name: str) -> Result:
    result = _in_child(spec | {"measure": "ppo" if spec["recipe"] == "ppo" else "sft"})
    shown = {key: value for key, value in result.items() if not isinstance(value, list)}
    print(f"{spec['recipe']}: {name}: {json.dumps(shown)}", flush=True)
    return result


def _in_child(spec: dict[str, Any]) -> Result:
    """Measured in a process of its own, so that nothing is warm and its peak of memory is its own."""
    one_thread = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    with tempfile.TemporaryDirectory() as name:
        asked, told = Path(name) / "spec.json", Path(name) / "result.json"
        asked.write_text(json.dumps(spec | {"told": str(told), "folder": name}))
        command = [sys.executable, "-m", "tests.bench.train.predecessors", "--child", str(asked)]
        done = subprocess.run(
            command, env=os.environ | one_thread, capture_output=True, text=True, check=False, timeout=1800
        )
        if done.returncode:
            raise SystemExit(done.stderr)
        result: Result = json.loads(told.read_text())
        return result


# Tables


def _sft_table(results: dict[str, Result]) -> str:
    theirs = results["theirs"]
    head = ["", "rows", "steps", "CPU s", "tokens with loss / CPU s", "as many times theirs", "filled",
            "CPU s of the job", "peak MiB", "held-out loss", "theirs at as many CPU s"]  # fmt: skip
    lines = [["the base model", *[""] * 8, f"{theirs['loss_before']:.3f}", ""]]
    for name, one in results.items():
        speed, their_speed = (each["learnt"] / each["seconds"] for each in (one, theirs))
        same = _loss_after([[0, 0.0, theirs["loss_before"]], *theirs["curve"]], one["seconds"])
        lines.append(
            [
                name, f"{one['rows']:,}", str(one["steps"]), f"{one['seconds']:.1f}", f"{speed:,.0f}",
                f"{speed / their_speed:.2f}", f"{one['tokens'] / one['positions']:.0%}", f"{one['job_seconds']:.1f}",
                f"{one['peak'] / MIB:.0f}", f"{one['loss']:.3f}", f"{same:.3f}" if one is not theirs else "",
            ]
        )  # fmt: skip
    return _markdown(head, lines)


def _loss_after(curve: list[list[float]], seconds: float) -> float:
    """Held-out loss after so many CPU seconds, between the points where it was measured; the last, if after all."""
    for (_, before, higher), (_, after, lower) in pairwise(curve):
        if before <= seconds <= after:
            return lower + (higher - lower) * (after - seconds) / (after - before)
    return curve[-1][2]


def _ppo_table(results: dict[str, Result]) -> str:
    head = ["", "answers", "CPU s", "answers / CPU s", "peak MiB", "reward, greedy", "reward, sampled",
            "KL, sampled", "tokens an answer"]  # fmt: skip
    first = results["theirs"]
    lines = [["the doctor", *[""] * 4, f"{first['greedy_before']['reward']:.2f}",
              f"{first['sampled_before']['reward']:.2f}", "0", f"{first['sampled_before']['length']:.0f}"]]  # fmt: skip
    lines += [
        [
            name, str(one["answers"]), f"{one['seconds']:.1f}", f"{one['answers'] / one['seconds']:.2f}",
            f"{one['peak'] / MIB:.0f}", f"{one['greedy']['reward']:.2f}", f"{one['sampled']['reward']:.2f}",
            f"{one['sampled']['kl']:.2f}", f"{one['sampled']['length']:.0f}",
        ]
        for name, one in results.items()
    ]  # fmt: skip
    return _markdown(head, lines)


def _markdown(head: list[str], lines: list[list[str]]) -> str:
    rows = [head, ["---"] * len(head), *lines]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


if __name__ == "__main__":
    main()
