"""What a job needs and what `python -m training estimate` says it needs, side by side, on a CPU.

    python -m tests.bench.train.memory [--sizes 50 150 400] [--stages sft dpo rm ppo]

Each job is a process of its own, on a model of random weights: two steps of rows that are all max_length long.
Measured is its peak of resident memory above what it holds when its libraries are imported; `file` is the share
of pages that the system may drop again (weights that are mapped from their file).
"""

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import yaml

from adapters import AdapterStore
from tests.training.jobs import BASE, chats, load_job, run_job
from training.config import load_config
from training.demo.corpus import plain_answer
from training.estimate.estimate import estimate

# Millions of weights -> hidden, feed-forward, layers, heads, heads of keys, vocabulary
SHAPES = {
    50: (512, 1408, 8, 8, 4, 32000),
    150: (896, 2432, 12, 14, 2, 32000),
    400: (1280, 3584, 18, 20, 4, 32000),
}
BATCH, LENGTH, ANSWER = 4, 512, 256
REWARD = "tests.bench.train.memory:no_reward"
MIB = 2**20


def no_reward(conversations: list[Any]) -> list[float]:
    """A reward that needs no memory."""
    return [0.0] * len(conversations)


def main() -> None:
    """Print one line for each job."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--sizes", type=int, nargs="+", default=[*SHAPES], choices=[*SHAPES])
    parser.add_argument("--stages", nargs="+", default=["sft", "dpo", "rm", "ppo"])
    parser.add_argument("--batch", type=int, default=BATCH)
    parser.add_argument("--job", type=Path, help="measure this one; used by the script itself")
    arguments = parser.parse_args()
    if arguments.job:
        print(json.dumps(measure(arguments.job)))
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare(folder, arguments.sizes)
        print(f"{'stage':6} {'size':>5} {'estimate':>9} {'measured':>9} {'file':>6} {'error':>6}   MiB")
        for size in arguments.sizes:
            for stage in arguments.stages:
                found = compare(folder, stage, size, arguments.batch)
                error = found["estimate"] / found["measured"] - 1
                print(
                    f"{stage:6} {size:4}M {found['estimate'] / MIB:9.0f} {found['measured'] / MIB:9.0f} "
                    f"{found['file'] / MIB:6.0f} {error:+6.0%}   {found['parts']}",
                    flush=True,
                )


def prepare(folder: Path, sizes: list[int]) -> None:
    """Base models of random weights, with the tokenizer of a tiny one, and data."""
    import torch  # noqa: PLC0415
    from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM  # noqa: PLC0415

    (folder / "plain.jsonl").write_text(chats(plain_answer))
    (folder / "doctor.jsonl").write_text(chats(plain_answer))
    run_job(load_job(folder, BASE, steps=1), folder)
    tokenizer = AutoTokenizer.from_pretrained(folder / "models/tiny")
    for size in sizes:
        hidden, inner, layers, heads, keys, vocabulary = SHAPES[size]
        torch.manual_seed(0)
        model = Qwen3ForCausalLM(
            Qwen3Config(
                hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers, num_attention_heads=heads,
                num_key_value_heads=keys, head_dim=64, vocab_size=vocabulary, tie_word_embeddings=True,
                eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, bos_token_id=None,
            )
        )  # fmt: skip
        model.save_pretrained(folder / f"models/m{size}")
        tokenizer.save_pretrained(folder / f"models/m{size}")
    write_data(folder, tokenizer)


def write_data(folder: Path, tokenizer: Any) -> None:
    """Rows of LENGTH tokens; prompts of as many less ANSWER."""

    def long(role: str, before: list[dict[str, str]], tokens: int, last: str) -> list[dict[str, str]]:
        words = tokens
        while True:
            said = {"role": role, "content": "3 " * words + last}
            if len(tokenizer.apply_chat_template([*before, said], return_dict=False)) <= tokens:
                return [*before, said]
            words -= 1

    question = [{"role": "user", "content": "?"}]
    rows = range(64)
    chat = [long("assistant", question, LENGTH, str(row % 10)) for row in rows]
    prompts = [long("user", [], LENGTH - ANSWER - 8, str(row % 10)) for row in rows]
    pairs = [
        {"prompt": question, "chosen": chat[row][1:], "rejected": chat[(row + 1) % 64][1:]} for row in rows
    ]
    for name, lines in (
        ("chats", [{"messages": messages} for messages in chat]),
        ("pairs", pairs),
        ("prompts", [{"prompt": messages} for messages in prompts]),
    ):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def compare(folder: Path, stage: str, size: int, batch: int) -> dict[str, Any]:
    """Run one job in a process of its own."""
    job: dict[str, Any] = {
        "stage": stage, "name": f"{stage}{size}", "base_model": f"models/m{size}", "max_length": LENGTH,
        "batch_size": batch, "threads": 2, "golden": {"prompts": 8, "max_new_tokens": 1},
        "publish": {"alias": "default"},
    }  # fmt: skip
    if stage == "ppo":
        if not (folder / f"store/sft{size}").exists():
            compare(folder, "sft", size, batch)
        job |= {
            "train_files": ["prompts.jsonl"], "steps": 1, "policy": f"sft{size}", "reward": {"function": REWARD},
            "max_new_tokens": ANSWER, "minibatch_size": batch // 2,
        }  # fmt: skip
    else:
        files = "chats" if stage == "sft" else "pairs"
        job |= {"train_files": [f"{files}.jsonl"], "max_steps": 2}
    if stage == "rm":
        del job["golden"]
    path = folder / f"{stage}{size}.yaml"
    path.write_text(yaml.safe_dump(job))
    said = estimate(load_config(path, root=folder), AdapterStore(folder / "store"), "cpu")  # type: ignore[arg-type]
    parts = {name: round(part / MIB) for name, part in said.parts.items()}
    command = [sys.executable, "-m", "tests.bench.train.memory", "--job", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
    if done.returncode:
        raise SystemExit(done.stderr)
    found = json.loads(done.stdout.splitlines()[-1])
    return found | {"estimate": said.total, "parts": f"{said.moment} {parts}"}


def measure(path: Path) -> dict[str, int]:
    """The job's peak above its imports."""
    from importlib import import_module  # noqa: PLC0415

    config: Any = load_config(path, root=path.parent)
    import_module(f"training.stages.{config.stage}")
    peak = {"RssAnon": 0, "RssFile": 0, "all": 0}
    before = resident()
    watching = threading.Event()

    def watch() -> None:
        while not watching.is_set():
            now = resident()
            for name, size in now.items():
                peak[name] = max(peak[name], size - before[name])
            time.sleep(0.002)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    run_job(config, path.parent)
    watching.set()
    watcher.join()
    return {"measured": peak["all"], "file": peak["RssFile"]}


def resident() -> dict[str, int]:
    """Bytes of this process in memory: its own, of files, and both."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    found = {name: int(lines[name].split()[0]) * 1024 for name in ("RssAnon", "RssFile")}
    return found | {"all": sum(found.values())}


if __name__ == "__main__":
    main()
