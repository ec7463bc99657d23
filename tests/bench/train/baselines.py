"""How MedicalGPT and BenTsao train, each as plainly as its own scripts do, with transformers, PEFT and TRL alone.

Written anew from what those scripts do. Kinder to them than they are: nothing is quantised, gradients are not
checkpointed, and nothing is evaluated or saved on the way, all of which costs time.
"""

import json
from pathlib import Path
from typing import Any

from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    Trainer,
    TrainingArguments,
    set_seed,
)
from trl import RLOOConfig, RLOOTrainer

_IGNORED = -100
_BENTSAO_PROMPT = "下面是一个问题，运用医学知识来正确回答提问.\n### 问题:\n{question}\n### 回答:\n"

Messages = list[dict[str, str]]
Example = dict[str, list[int]]


def sft(spec: dict[str, Any], folder: Path) -> None:
    """Train an adapter as `spec["side"]` does, and save it in `folder`."""
    set_seed(spec["seed"])
    tokenizer = AutoTokenizer.from_pretrained(spec["base"])
    rows = [json.loads(line)["messages"] for line in Path(spec["train"]).read_text().splitlines()]
    encode = {"medicalgpt": _medicalgpt_row, "bentsao": _bentsao_row}[spec["way"]]
    examples = [encode(tokenizer, row, spec["max_length"]) for row in rows]
    examples = [one for one in examples if any(label != _IGNORED for label in one["labels"])]
    is_bentsao = spec["way"] == "bentsao"
    tokenizer.padding_side = "left" if is_bentsao else "right"
    model = AutoModelForCausalLM.from_pretrained(spec["base"])
    model = get_peft_model(model, LoraConfig(**spec["lora"], task_type="CAUSAL_LM"))
    if not is_bentsao:
        model.enable_input_require_grads()
    model.config.use_cache = False
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(folder),
            use_cpu=True,
            per_device_train_batch_size=spec["micro_batch"],
            gradient_accumulation_steps=spec["accumulation"],
            max_steps=spec["steps"],
            learning_rate=spec["learning_rate"],
            lr_scheduler_type="linear",
            warmup_steps=0.1 if is_bentsao else 0.05,
            weight_decay=0.0 if is_bentsao else 0.05,
            train_sampling_strategy="group_by_length" if spec.get("grouped") else "random",
            save_strategy="no",
            logging_steps=10,
            seed=spec["seed"],
            dataloader_pin_memory=False,
            disable_tqdm=True,
            report_to="none",
        ),
        train_dataset=Dataset.from_list(examples),
        processing_class=tokenizer,
        data_collator=DataCollatorForSeq2Seq(
            tokenizer, padding=True, label_pad_token_id=_IGNORED, pad_to_multiple_of=8 if is_bentsao else 4
        ),
    )
    trainer.train()
    model.save_pretrained(folder)


def _medicalgpt_row(tokenizer: Any, messages: Messages, max_length: int) -> Example:
    """All turns; question and answer of each shortened in proportion, and the chat cut at the turn that is too much."""
    ids: list[int] = []
    labels: list[int] = []
    before = ""
    for at, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        asked = tokenizer.apply_chat_template(messages[:at], tokenize=False, add_generation_prompt=True)
        question = tokenizer(asked[len(before) :], add_special_tokens=False).input_ids
        answer = tokenizer(message["content"], add_special_tokens=False).input_ids
        whole = len(question) + len(answer)
        question = question[: int(max_length * len(question) / whole)]
        answer = [*answer[: int(max_length * len(answer) / whole) - 1], tokenizer.eos_token_id]
        if len(ids) + len(question) + len(answer) > max_length:
            break
        ids += question + answer
        labels += [_IGNORED] * len(question) + answer
        before = asked + message["content"] + tokenizer.eos_token
    return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels}


def _bentsao_row(tokenizer: Any, messages: Messages, max_length: int) -> Example:
    """One question and its answer, cut at the end; an end token where there is room for it."""
    prompt = _BENTSAO_PROMPT.format(question=messages[0]["content"])
    ids = tokenizer(prompt + messages[1]["content"], truncation=True, max_length=max_length).input_ids
    if len(ids) < max_length:
        ids = [*ids, tokenizer.eos_token_id]
    asked = len(tokenizer(prompt, truncation=True, max_length=max_length).input_ids)
    return {
        "input_ids": ids,
        "attention_mask": [1] * len(ids),
        "labels": [_IGNORED] * asked + ids[asked:],
    }


def rloo(spec: dict[str, Any], folder: Path) -> None:
    """What MedicalGPT calls PPO: every weight of a merged policy learns by TRL's RLOO, beside a reference and a
    reward model of their own. Saves the model in `folder`.

    Prompts are chats and not text, as with theirs, whose answers would reach the reward model without their end.
    """
    set_seed(spec["seed"])
    rows = [json.loads(line)["messages"][:-1] for line in Path(spec["train"]).read_text().splitlines()]
    trainer = RLOOTrainer(
        model=AutoModelForCausalLM.from_pretrained(spec["policy"]),
        reward_funcs=AutoModelForSequenceClassification.from_pretrained(spec["reward"], num_labels=1),
        args=RLOOConfig(
            output_dir=str(folder),
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            per_device_train_batch_size=spec["micro_batch"],
            gradient_accumulation_steps=spec["accumulation"],
            max_steps=spec["steps"],
            max_completion_length=spec["max_new_tokens"],
            learning_rate=spec["learning_rate"],
            save_strategy="no",
            logging_steps=10,
            seed=spec["seed"],
            dataloader_pin_memory=False,
            disable_tqdm=True,
            report_to="none",
        ),
        train_dataset=Dataset.from_list([{"prompt": row} for row in rows]),
        processing_class=AutoTokenizer.from_pretrained(spec["policy"], padding_side="left"),
    )
    trainer.train()
    trainer.save_model(str(folder))
