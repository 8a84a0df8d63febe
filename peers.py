"""What bench.py is measured against: the training that Hugging Face's Trainer does, with peft for
LoRA and DoRA.

bench.py runs it in a process of its own, as it would run for anybody who uses these packages, so
that nothing that makes ours fast, in the loop or in the process, is in it. The package with Houlsby
and Pfeiffer adapters needs an older transformers than ours, so that these have no peer here.
"""
import contextlib
import sys
import tempfile
import time

import numpy as np
import torch
from torch.utils.data import SequentialSampler
from transformers import (
    DataCollatorWithPadding,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)


class Clock(TrainerCallback):
    """Trainer's seconds from its first step to its last, without what it does before and after."""

    def on_step_begin(self, args, state, control, **_):
        if state.global_step == 0:
            self.begin = time.perf_counter()

    def on_step_end(self, args, state, control, **_):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.seconds = time.perf_counter() - self.begin


class InOrder(Trainer):
    def _get_train_sampler(self, train_dataset=None):
        return SequentialSampler(self.train_dataset)


def with_peft(model, s):
    """The method of the settings `s` by peft, on Hugging Face's own modules."""
    from peft import LoraConfig, get_peft_model  # not in requirements.txt
    return get_peft_model(model, LoraConfig(
        task_type="SEQ_CLS", r=s["r"], lora_alpha=s["alpha"], lora_dropout=s["dropout"],
        target_modules=["query", "value"], use_dora=s["method"] == "dora"))


def prepare(model, tokenizer, s, split, batches, dtype):
    """A function that trains on these batches of an Encoded split, and returns the seconds. model:
    Hugging Face's, fresh; dtype: autocast's, or None."""
    model = model if s["method"] == "full" else with_peft(model, s)
    rows = [{"input_ids": split.ids[i].tolist(), "labels": int(split.labels[i])}
            for i in np.concatenate(batches)]
    folder, clock = tempfile.TemporaryDirectory(), Clock()
    arguments = TrainingArguments(
        folder.name, per_device_train_batch_size=s["batch_size"], max_steps=len(batches),
        learning_rate=1e-5, weight_decay=0.01, bf16=dtype is torch.bfloat16,
        fp16=dtype is torch.float16, use_cpu=not torch.cuda.is_available(), save_strategy="no",
        logging_strategy="no", report_to=[], disable_tqdm=True, seed=s["seed"])
    trainer = InOrder(model, arguments, train_dataset=rows, callbacks=[clock],
                      data_collator=DataCollatorWithPadding(tokenizer))
    trainer.remove_callback(PrinterCallback)

    def train_round():
        with contextlib.redirect_stdout(sys.stderr):
            trainer.train()
        return clock.seconds
    train_round.folder = folder  # lives as long
    return train_round
