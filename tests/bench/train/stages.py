"""Every stage on the demo's base, with several seeds: what each one learns, and how much seeds matter.

    python -m tests.bench.train.stages --data-dir xinglin-data --seeds 3

Needs a finished demo (`python -m training demo`). Works in a folder of its own, which it removes. Takes some six
minutes a seed on two cores.
"""

import argparse
import json
import logging
import statistics
import tempfile
from pathlib import Path
from shutil import copytree
from typing import Any

import torch
import yaml
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from adapters import AdapterRef, AdapterStore
from training.config import load_config
from training.demo.build import PIPELINE
from training.demo.corpus import SAFETY_LINE, is_doctor_style
from training.demo.facts import conditions
from training.runs.execute import begin, carry_out

_PAIRS = {
    "base_model": "models/xinglin-demo",
    "policy": "doctor",
    "train_files": ["demo/pairs.jsonl"],
    "evaluation_files": ["demo/pairs_heldout.jsonl"],
    "max_length": 256,
    "batch_size": 16,
    "max_steps": 30,
    "learning_rate": 5e-4,
    "threads": 1,
}
_ONLINE = {
    "stage": "grpo",
    "base_model": "models/xinglin-demo",
    "policy": "doctor",
    "reward": "doctor-rm",
    "train_files": ["demo/doctor.jsonl"],
    "steps": 20,
    "max_new_tokens": 96,
    "learning_rate": 1e-3,
    "threads": 1,
}
_PT = {
    "stage": "pt",
    "base_model": "models/xinglin-demo",
    "train_files": ["demo/notes.jsonl"],
    "evaluation_files": ["demo/notes_heldout.jsonl"],
    "max_length": 256,
    "batch_size": 8,
    "max_steps": 40,
    "learning_rate": 3e-3,
    "threads": 1,
}
_CONDITIONS_HELD_OUT = 6
_BATCH = 48


def _jobs() -> dict[str, dict[str, Any]]:
    demo = {name: yaml.safe_load((PIPELINE.parent / f"{name}.yaml").read_text()) for name in _DEMO}
    return (
        {"pt": _PT}
        | demo
        | {
            "dpo": _PAIRS | {"stage": "dpo"},
            "kto": _PAIRS | {"stage": "kto"},
            "orpo": _PAIRS | {"stage": "orpo"},
            "grpo": _ONLINE,
            "rloo": _ONLINE | {"algorithm": "rloo"},
        }
    )


_DEMO = ("doctor", "doctor-rm", "doctor-ppo")
_SHOWN = ("eval_loss", "eval_accuracy", "eval_rewards/margins", "eval_reward", "eval_kl", "reward", "kl")


def _write_notes(data_dir: Path) -> None:
    """Texts for stage pt, of a kind that the base model has not read; those held out are of other conditions."""
    notes = [
        f"{facts.name}\n{facts.prevention}\n{facts.red_flag}\n{facts.symptoms}\n{facts.care[0]}\n"
        for condition in conditions()
        for facts in (condition.zh, condition.en)
    ]
    lines = [json.dumps({"text": note}, ensure_ascii=False) + "\n" for note in notes]
    held_out = 2 * _CONDITIONS_HELD_OUT
    (data_dir / "notes.jsonl").write_text("".join(lines[:-held_out]), encoding="utf-8")
    (data_dir / "notes_heldout.jsonl").write_text("".join(lines[-held_out:]), encoding="utf-8")


def _habits(data_dir: Path, ref: str) -> dict[str, float]:
    """Of greedy answers to phrasings that no model was trained on."""
    store = AdapterStore(data_dir / "store")
    manifest = store.get(AdapterRef.parse(ref))
    base = data_dir / "models" / "xinglin-demo"
    tokenizer = AutoTokenizer.from_pretrained(base, padding_side="left")
    model = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base), store.folder(manifest.name, manifest.revision)
    ).eval()
    lines = (data_dir / "demo" / "doctor_heldout.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line)["messages"] for line in lines]
    answers: list[str] = []
    for at in range(0, len(rows), _BATCH):
        prompts = [row[:1] for row in rows[at : at + _BATCH]]
        batch = tokenizer.apply_chat_template(
            prompts, add_generation_prompt=True, return_tensors="pt", padding=True, return_dict=True
        )
        with torch.inference_mode():
            output = model.generate(**batch, max_new_tokens=110, do_sample=False)
        answers += tokenizer.batch_decode(output[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)

    def content(text: str) -> str:
        for line in SAFETY_LINE.values():
            text = text.replace(line, "")
        return text.strip()

    same = [content(answer) == row[1]["content"] for answer, row in zip(answers, rows, strict=True)]
    return {
        "doctor style": statistics.mean(map(is_doctor_style, answers)),
        "safety line": statistics.mean(answer.endswith(tuple(SAFETY_LINE.values())) for answer in answers),
        "right content": statistics.mean(same),
    }


def _run(data_dir: Path, name: str, job: dict[str, Any], seed: int) -> dict[str, float]:
    path = data_dir / f"{name}.yaml"
    settings = {"publish": {"alias": "default"}} | job | {"name": job.get("name", f"by-{name}"), "seed": seed}
    path.write_text(yaml.safe_dump(settings), encoding="utf-8")
    published = carry_out(begin(load_config(path, root=data_dir), data_dir), data_dir)
    manifest = AdapterStore(data_dir / "store").get(AdapterRef.parse(published.ref))
    shown = {
        f"{name}{suffix}": manifest.metrics[f"{name}{suffix}"]
        for name in _SHOWN
        for suffix in ("_before", "")
        if f"{name}{suffix}" in manifest.metrics
    }
    return shown | (_habits(data_dir, published.ref) if manifest.task == "chat" and name != "pt" else {})


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data-dir", type=Path, default=Path("xinglin-data"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--stages", nargs="+", choices=_jobs(), default=list(_jobs()))
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.ERROR)
    found: dict[str, list[dict[str, float]]] = {name: [] for name in arguments.stages}
    for seed in range(arguments.seeds):
        with tempfile.TemporaryDirectory() as folder:
            data_dir = Path(folder)
            for part in ("models", "store", "demo"):
                copytree(arguments.data_dir / part, data_dir / part)
            _write_notes(data_dir / "demo")
            for name in arguments.stages:
                found[name].append(_run(data_dir, name, _jobs()[name], seed))
                print(
                    seed, name, {key: round(value, 3) for key, value in found[name][-1].items()}, flush=True
                )
    print("\n| stage | measure | mean | from | to |\n|---|---|---|---|---|")
    for name, runs in found.items():
        for measure in runs[0]:
            values = [run[measure] for run in runs]
            print(
                f"| {name} | {measure} | {statistics.mean(values):.3f} | {min(values):.3f} | {max(values):.3f} |"
            )


if __name__ == "__main__":
    main()
