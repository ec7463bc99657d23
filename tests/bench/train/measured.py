"""What tests.bench.train.predecessors measures, each in a process of its own.

A task takes what it is to do (`spec`), runs one side, whichever it is, under the same watch, and returns numbers.
"""

import json
import os
from pathlib import Path
from typing import Any

import torch
import yaml
from peft import PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GenerationConfig,
    Trainer,
    TrainerCallback,
)

import training.stages.sft  # noqa: F401 - both sides' libraries are in memory before anything is measured
from adapters import AdapterRef, AdapterStore
from tests.bench.train import baselines
from training.config import load_config
from training.runs.execute import begin, carry_out
from training.stages.ppo import Ppo
from training.templates import named
from training.tokens.loss_mask import encode

_CURVE = 6
"""Points at which the held-out loss is measured."""

Result = dict[str, Any]


class Watch:
    """CPU seconds, tokens and snapshots of a Hugging Face trainer; its own seconds are left out."""

    def __init__(self, snapshots: int) -> None:
        self._snapshots = snapshots
        self._pause = self._began = self.seconds = 0.0
        self.positions = self.tokens = self.learnt = 0
        self.epochs = 0.0
        self.taken: list[tuple[int, float, dict[str, Any]]] = []
        self.shape: Any = None
        train = Trainer.train

        def watched(trainer: Any, *args: Any, **kwargs: Any) -> Any:
            trainer.add_callback(self._callback())
            step = trainer.training_step

            def counted(model: Any, inputs: Any, *more: Any) -> Any:
                self._count(inputs)
                return step(model, inputs, *more)

            if "labels" in (trainer.train_dataset.column_names or ()):
                trainer.training_step = counted
            return train(trainer, *args, **kwargs)

        Trainer.train = watched

    def _count(self, inputs: Any) -> None:
        self.positions += inputs["input_ids"].numel()
        self.tokens += int((inputs["input_ids"] != 0).sum())  # 0 is what the demo's tokenizer pads with
        self.learnt += int((inputs["labels"][:, 1:] >= 0).sum())

    def _callback(self) -> Any:
        watch = self

        class Callback(TrainerCallback):  # type: ignore[misc]
            def on_train_begin(self, *_: Any, **__: Any) -> None:
                watch._began = _cpu_seconds()

            def on_step_end(self, args: Any, state: Any, control: Any, model: Any, **_: Any) -> None:
                now = _cpu_seconds()
                due = {
                    round(state.max_steps * part / watch._snapshots)
                    for part in range(1, watch._snapshots + 1)
                }
                if watch._snapshots and state.global_step in due:
                    weights = get_peft_model_state_dict(model)
                    copy = {name: weight.detach().clone() for name, weight in weights.items()}
                    watch.taken.append((state.global_step, now - watch._began - watch._pause, copy))
                    watch.shape = model.peft_config["default"]
                watch._pause += _cpu_seconds() - now

            def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
                watch.seconds = _cpu_seconds() - watch._began - watch._pause
                watch.epochs = state.epoch

        return Callback()


def sft(spec: dict[str, Any]) -> Result:
    """One run of supervised fine-tuning, theirs or ours."""
    watch = Watch(_CURVE)
    began, memory = _cpu_seconds(), _begin_memory()
    if spec["side"] == "theirs":
        baselines.sft(spec, Path(spec["folder"]) / "out")
    else:
        keep = ("learning_rate", "lora", "max_length", "chat_template", "seed")
        job = {key: spec[key] for key in keep} | {
            "stage": "sft", "base_model": spec["base"], "train_files": [spec["train"]],
            "batch_size": spec["micro_batch"], "gradient_accumulation_steps": spec["accumulation"],
            "max_steps": spec["steps"], "packing": spec.get("packing", False),
            "golden": {"prompts": 8, "max_new_tokens": 1},
        }  # fmt: skip
        _run_job(job, spec)
    peak, job_seconds = _peak_memory() - memory, _cpu_seconds() - began
    curve = [
        (step, seconds, _held_out_loss(spec, watch.shape, weights)) for step, seconds, weights in watch.taken
    ]
    return {
        "rows": round(watch.epochs * spec["rows"]), "steps": curve[-1][0], "tokens": watch.tokens,
        "positions": watch.positions, "learnt": watch.learnt, "seconds": watch.seconds, "job_seconds": job_seconds,
        "peak": peak, "loss": curve[-1][2], "loss_before": _held_out_loss(spec, watch.shape, None), "curve": curve,
    }  # fmt: skip


def _run_job(job: dict[str, Any], spec: dict[str, Any]) -> str:
    """The ref of what is published."""
    path, data_dir = Path(spec["folder"]) / "job.yaml", Path(spec["data_dir"])
    path.write_text(yaml.safe_dump(job | {"name": f"bench-{spec['recipe']}", "threads": 1}))
    return carry_out(begin(load_config(path, root=data_dir), data_dir), data_dir).ref


def _held_out_loss(spec: dict[str, Any], shape: Any, weights: dict[str, Any] | None) -> float:
    """Nats for one of the assistant's tokens, the same rows for everybody; of the base model without weights."""
    tokenizer = AutoTokenizer.from_pretrained(spec["base"])
    if spec["chat_template"]:
        tokenizer.chat_template = named(spec["chat_template"]).jinja
    model = AutoModelForCausalLM.from_pretrained(spec["base"])
    if weights is not None:
        model = get_peft_model(model, shape)
        set_peft_model_state_dict(model, weights)
    model.eval()
    total = count = 0.0
    for line in Path(spec["held_out"]).read_text(encoding="utf-8").splitlines():
        row = encode(tokenizer, json.loads(line)["messages"], spec["max_length"])
        ids, mask = torch.tensor([row.input_ids]), torch.tensor(row.loss_mask[1:], dtype=torch.bool)
        with torch.no_grad():
            scores = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
        total -= float(scores.gather(-1, ids[0, 1:, None])[:, 0][mask].sum())
        count += int(mask.sum())
    return total / count


def merge(spec: dict[str, Any]) -> Result:
    """The doctor and its reward adapter as whole models, which their script asks for."""
    data_dir, models = Path(spec["data_dir"]), Path(spec["models"])
    base, store = Path(spec["base"]), AdapterStore(data_dir / "store")
    for name, ref, model in (
        ("policy", "doctor", AutoModelForCausalLM.from_pretrained(base)),
        ("reward", "doctor-rm", AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)),
    ):
        manifest = store.get(AdapterRef.parse(ref))
        merged = PeftModel.from_pretrained(
            model, store.folder(manifest.name, manifest.revision)
        ).merge_and_unload()
        merged.save_pretrained(models / name)
        AutoTokenizer.from_pretrained(base).save_pretrained(models / name)
    return {}


def ppo(spec: dict[str, Any]) -> Result:
    """One run of reinforcement learning, theirs or ours."""
    watch = Watch(0)
    train = Ppo.train

    def watched(self: Ppo, *args: Any) -> Any:
        began = _cpu_seconds()
        found = train(self, *args)
        watch.seconds = _cpu_seconds() - began
        return found

    Ppo.train = watched  # type: ignore[assignment, method-assign]
    memory = _begin_memory()
    out = Path(spec["folder"]) / "out"
    if spec["side"] == "theirs":
        baselines.rloo(spec, out)
        peak = _peak_memory() - memory
        model = AutoModelForCausalLM.from_pretrained(out)
    else:
        unused = ("evaluation_files", "publish", "notes")
        ref = _run_job({key: value for key, value in spec["job"].items() if key not in unused}, spec)
        peak = _peak_memory() - memory
        store, revision = AdapterStore(Path(spec["data_dir"]) / "store"), AdapterRef.parse(ref)
        manifest = store.get(revision)
        base = AutoModelForCausalLM.from_pretrained(spec["base"])
        model = PeftModel.from_pretrained(base, store.folder(manifest.name, manifest.revision))
    before = AutoModelForCausalLM.from_pretrained(spec["policy"])
    return {
        "answers": spec["answers"], "seconds": watch.seconds, "peak": peak,
        "greedy": _judge(spec, model, before, greedy=True), "sampled": _judge(spec, model, before, greedy=False),
        "greedy_before": _judge(spec, before, before, greedy=True),
        "sampled_before": _judge(spec, before, before, greedy=False),
    }  # fmt: skip


def _judge(spec: dict[str, Any], model: Any, before: Any, *, greedy: bool) -> dict[str, float]:
    """Mean reward, and nats of an answer that it has strayed from the policy before, on held-out prompts."""
    torch.manual_seed(spec["seed"])
    tokenizer = AutoTokenizer.from_pretrained(spec["policy"], padding_side="left")
    scorer = AutoModelForSequenceClassification.from_pretrained(spec["reward"], num_labels=1).eval()
    lines = Path(spec["held_out"]).read_text(encoding="utf-8").splitlines()
    prompts = [json.loads(line)["messages"][:1] for line in lines]
    asked = tokenizer.apply_chat_template(
        prompts, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
    )
    length, stop, pad = asked["input_ids"].shape[1], tokenizer.eos_token_id, tokenizer.pad_token_id
    sampling = {} if greedy else {"temperature": 1.0, "top_k": 0, "top_p": 1.0}
    wanted = GenerationConfig(
        do_sample=not greedy,
        max_new_tokens=spec["max_new_tokens"],
        eos_token_id=stop,
        pad_token_id=pad,
        **sampling,
    )
    with torch.no_grad():
        ids = model.eval().generate(**asked, generation_config=wanted)
        answer = ids[:, length:]
        is_stop = (answer == stop).int()
        mask = (is_stop.cumsum(1) - is_stop == 0).float()
        attention = torch.cat([asked["attention_mask"], mask.long()], 1)
        positions = (attention.cumsum(1) - 1).clamp(min=0)
        found = [
            one.eval()(input_ids=ids, attention_mask=attention, position_ids=positions)
            .logits[:, length - 1 : -1].log_softmax(-1).gather(-1, answer[..., None])[..., 0] * mask
            for one in (model, before)
        ]  # fmt: skip
        texts = tokenizer.batch_decode(answer, skip_special_tokens=True)
        chats = [
            [*prompt, {"role": "assistant", "content": text}]
            for prompt, text in zip(prompts, texts, strict=True)
        ]
        rewards = [
            float(scorer(**one).logits[0, 0])
            for one in (
                tokenizer.apply_chat_template(chat, return_tensors="pt", return_dict=True) for chat in chats
            )
        ]
    return {
        "reward": sum(rewards) / len(rewards),
        "kl": float((found[0] - found[1]).sum(1).mean()),
        "length": float(mask.sum(1).mean()),
    }


def _cpu_seconds() -> float:
    times = os.times()
    return times.user + times.system


def _begin_memory() -> int:
    """Forget the peak so far; returns what is held now."""
    Path("/proc/self/clear_refs").write_text("5")
    return _peak_memory()


def _peak_memory() -> int:
    """Bytes: the most that was resident."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines["VmHWM"].split()[0]) * 1024
