"""One training step by LLaMA-Factory's own loader, collator and trainer; run in its environment by test_export.py.

Arguments: a folder for `tokenized_path`, a model, a folder for output. Prints what was trained on, as JSON.
"""

import json
import sys

import torch
from llamafactory.data import SFTDataCollatorWith4DAttentionMask, get_dataset, get_template_and_fix_tokenizer
from llamafactory.hparams import get_train_args
from llamafactory.model import load_model, load_tokenizer
from llamafactory.train.sft.trainer import CustomSeq2SeqTrainer

data, model_path, output = sys.argv[1:]
settings = {
    "stage": "sft", "do_train": True, "finetuning_type": "full", "template": "empty", "model_name_or_path": model_path,
    "dataset": "none", "tokenized_path": data, "cutoff_len": 2048, "output_dir": output, "max_steps": 1,
    "per_device_train_batch_size": 1000, "logging_steps": 1, "save_strategy": "no", "report_to": "none",
    "use_cpu": True, "disable_tqdm": True,
}  # fmt: skip
model_args, data_args, training_args, finetuning_args, _ = get_train_args(settings)
tokens = load_tokenizer(model_args)
template = get_template_and_fix_tokenizer(tokens["tokenizer"], data_args)
rows = get_dataset(template, model_args, data_args, training_args, stage="sft", **tokens)["train_dataset"]
model = load_model(tokens["tokenizer"], model_args, finetuning_args, is_trainable=True)
collator = SFTDataCollatorWith4DAttentionMask(template=template, model=model, label_pad_token_id=-100, **tokens)
parts = {"model": model, "args": training_args, "data_collator": collator, "train_dataset": rows, **tokens}
trainer = CustomSeq2SeqTrainer(finetuning_args=finetuning_args, **parts)
batches, count = trainer.get_batch_samples(iter(trainer.get_train_dataloader()), 1, torch.device("cpu"))
trainer.train()
batch = {name: batches[0][name].tolist() for name in ("input_ids", "attention_mask", "labels")}
print(json.dumps({"count": int(count), "loss": trainer.state.log_history[0]["loss"], **batch}))
