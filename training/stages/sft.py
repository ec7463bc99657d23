"""Supervised fine-tuning: conversations and a base model in, a LoRA adapter with its proof out."""

import hashlib
import logging
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch.utils.tensorboard import SummaryWriter
from transformers import PrinterCallback, set_seed
from trl import SFTConfig as TrlConfig
from trl import SFTTrainer, get_training_chat_template

from adapters import GOLDEN_FILE, PROVENANCE_FILE, Provenance, fingerprint, write_golden
from training.callback import EventCallback
from training.config import SftConfig
from training.data import Row, read_chats
from training.events import EventLog
from training.golden import golden_prompts
from training.lora import base_folder, base_name, load_base, new_adapter
from training.templates import prompt_completion

log = logging.getLogger(__name__)


def run(config: SftConfig, run_dir: Path, events: EventLog) -> Path:
    """Train the adapter; returns a folder ready to be published.

    Raises ConfigError (the base cannot be had), DataError (bad rows), AdapterError (not a base model).
    """
    if config.threads:
        torch.set_num_threads(config.threads)
    set_seed(config.seed)  # before the adapter's weights are drawn

    train_rows = read_chats(config.train_files, config.bad_rows)
    evaluation_rows = read_chats(config.evaluation_files, config.bad_rows) if config.evaluation_files else []
    folder = base_folder(config.base_model)
    base_fingerprint = fingerprint(folder)
    model, tokenizer = load_base(folder)

    every_answer = _marks_answers(tokenizer)
    board = SummaryWriter(run_dir / "tensorboard")
    trainer = SFTTrainer(
        model=model,
        args=_arguments(config, run_dir, every_answer),
        train_dataset=_dataset(train_rows, every_answer),
        eval_dataset=_dataset(evaluation_rows, every_answer) if evaluation_rows else None,
        processing_class=tokenizer,
        peft_config=new_adapter(config.lora),
        callbacks=[EventCallback(config.name, events, board)],
    )
    trainer.remove_callback(PrinterCallback)  # it prints every log as a dictionary
    _tell_what_is_cut(trainer.train_dataset, len(train_rows), config.max_length)

    metrics = {}
    if evaluation_rows:
        metrics["eval_loss_before"] = trainer.evaluate()["eval_loss"]
    metrics["train_loss"] = trainer.train().training_loss
    if evaluation_rows:
        metrics["eval_loss"] = trainer.evaluate()["eval_loss"]
    board.close()

    result = run_dir / "result"
    trainer.model.save_pretrained(result, save_embedding_layers=False)
    prompts = golden_prompts(
        trainer.model,
        tokenizer,
        evaluation_rows or train_rows,
        config.golden.prompts,
        config.golden.max_new_tokens,
    )
    write_golden(result / GOLDEN_FILE, prompts)
    dtype: Any = str(model.dtype).removeprefix("torch.")
    provenance = Provenance(
        stage=config.stage,
        base_model=base_name(config.base_model),
        base_fingerprint=base_fingerprint,
        dtype=dtype,
        run_id=run_dir.name,
        data_digests={file.name: _sha256(file) for file in (*config.train_files, *config.evaluation_files)},
        metrics=metrics,
        licence=config.licence,
        notes=config.notes,
    )
    (result / PROVENANCE_FILE).write_text(provenance.model_dump_json(indent=2) + "\n", encoding="utf-8")
    return result


def _arguments(config: SftConfig, run_dir: Path, every_answer: bool) -> TrlConfig:
    on_gpu = torch.cuda.is_available()
    return TrlConfig(
        output_dir=str(run_dir / "checkpoints"),
        use_cpu=not on_gpu,
        # TRL turns both on by default; on a CPU the one is slow and the other saves nothing.
        bf16=on_gpu and torch.cuda.is_bf16_supported(),
        gradient_checkpointing=on_gpu,
        dataloader_pin_memory=on_gpu,
        assistant_only_loss=every_answer,
        max_length=config.max_length,
        train_sampling_strategy="group_by_length",
        per_device_train_batch_size=config.batch_size,
        per_device_eval_batch_size=config.batch_size,
        learning_rate=config.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=0.03,
        num_train_epochs=config.epochs,
        max_steps=config.max_steps or -1,
        seed=config.seed,
        data_seed=config.seed,
        logging_steps=10,
        logging_first_step=True,
        save_strategy="steps",
        save_steps=0.25,
        save_total_limit=2,
        eval_strategy="no",  # before and after, by hand
        report_to="none",  # events and TensorBoard come by callbacks
        disable_tqdm=True,
    )


def _marks_answers(tokenizer: object) -> bool:
    """Does the chat template mark what the assistant says, or does TRL know a version that does?"""
    try:
        get_training_chat_template(tokenizer)
    except ValueError:
        log.info("the base's chat template marks no answers: the loss is on the last answer of each row")
        return False
    return True


def _dataset(rows: list[Row], every_answer: bool) -> Dataset:
    return Dataset.from_list(rows if every_answer else [prompt_completion(row) for row in rows])


def _tell_what_is_cut(dataset: Dataset, rows: int, max_length: int) -> None:
    """TRL cuts long rows, and drops those of which no answer is left, without a word."""
    cut = sum(len(tokens) == max_length for tokens in dataset["input_ids"])
    if cut or len(dataset) < rows:
        log.warning(
            "%d of %d rows reach max_length %d and may be cut; %d more have no answer within it and are left out",
            cut, rows, max_length, rows - len(dataset),
        )  # fmt: skip


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
