"""A Hugging Face Trainer, measured by OscTrainerCallback; at the end a page of gradients and updates."""

import argparse

import torch
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

from oscopt.huggingface import OscTrainerCallback

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--steps", type=int, default=200)
parser.add_argument("--out", default="hugging_face.html")
args = parser.parse_args()

torch.manual_seed(0)
sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4}
model = BertForSequenceClassification(BertConfig(vocab_size=200, **sizes))  # or yours, by from_pretrained
words = torch.randint(0, 200, (512, 32))
labels = (words[:, 0] > words[:, 1]).long()
data = [{"input_ids": text, "labels": label} for text, label in zip(words, labels, strict=True)]

callback = OscTrainerCallback(what=("grad", "update"))
options = {"per_device_train_batch_size": 16, "learning_rate": 1e-3, "save_strategy": "no", "report_to": []}
trainer = Trainer(
    model,
    TrainingArguments(max_steps=args.steps, logging_steps=20, **options),
    train_dataset=data,
    callbacks=[callback],
)
trainer.train()

print(callback.meter.history.summary())
callback.meter.report(args.out)
