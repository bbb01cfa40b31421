"""`tokenclean demo`: the whole job on a task small enough to watch, with noise that is known because it was planted.

Input: a folder. Output: in it data.jsonl, the models base and reference, run.yaml and the run. The task: shift four
letters by three, wrapped in polite phrases. The base knows the phrases, not the shift; the reference was trained on
clean answers; in the data that is cleaned, 30 % of the answers' words were replaced at random.
"""

import json
import os
import random
import shlex
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from rich.console import Console
from rich.table import Table
from rich.text import Text
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging as transformers_logging

from tokenclean_ray import rounds, summary
from tokenclean_ray.chat_template import build_encoder
from tokenclean_ray.config import Train
from tokenclean_ray.config_file import load_config
from tokenclean_ray.finetune import IGNORED, Rows, fit
from tokenclean_ray.layout import Store
from tokenclean_ray.progress import say
from tokenclean_ray.report import write_report
from tokenclean_ray.token_loss import TokenLoss

LETTERS = ["b", "c", "d", "f", "g", "h", "j", "k", "l", "m", "n", "p", "q", "r", "s", "t", "v", "w", "x", "z"]
SHIFT = 3
NOISE = 0.3
OPENERS = [
    "sure here is what you asked",
    "of course the shifted letters are",
    "happy to help the result is",
    "let me see that would be",
    "each letter moved by three gives",
    "good question the answer should be",
]
CLOSERS = [
    "hope that helps you out today",
    "tell me if you need more",
    "that is all there is now",
    "glad that we could do this",
    "ask again any time you like",
    "please check it once for yourself",
]
SPECIALS = ["<unk>", "<s>", "</s>", "<|user|>", "<|assistant|>"]
TEMPLATE = (
    "{% for m in messages %}{{ '<|' + m.role + '|> ' }}"
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content }} </s>{% endgeneration %} "
    "{% else %}{{ m.content }} {% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|> {% endif %}"
)
PRETRAIN_ROWS, WARMUP_ROWS, POOL_ROWS = 16000, 2000, 6000

Row = dict[str, Any]


def run(output: str) -> None:
    """Make everything in `output`, clean the data and show what was kept; parts that are there are kept."""
    began = time.monotonic()
    transformers_logging.disable_progress_bar()
    folder = Path(output)
    if not (folder / "run.yaml").is_file():
        make(folder)
    record = rounds.clean(load_config(str(folder / "run.yaml"), []))
    summary.show_clean(record)
    show(folder, record)
    print(f"report: {write_report(record['config']['output'])}")
    seconds = f"{time.monotonic() - began:.0f} s in all"
    say(f"{seconds}; try: {_command()} clean {shlex.quote(f'{folder}/run.yaml')} select.keep_ratio=0.5")


def _command() -> str:
    """What a shell finds this package's command by: `make demo` activates no environment."""
    if shutil.which("tokenclean"):
        return "tokenclean"
    return f"{shlex.quote(os.path.relpath(sys.executable))} -m tokenclean_ray"


def make(folder: Path) -> None:
    """Write the data, train the two models, write the config last: it says that the rest is there."""
    rng = random.Random(0)
    words = {word for phrase in OPENERS + CLOSERS for word in phrase.split()}
    vocabulary = [*SPECIALS, *LETTERS, *sorted(words)]
    tokenizer = _tokenizer(vocabulary)
    base = _model(len(vocabulary))
    say("making a base that knows the phrases but not the task …")
    loose = [_row(rng, lambda letters: [rng.choice(LETTERS) for _ in letters]) for _ in range(PRETRAIN_ROWS)]
    _train(base, tokenizer, loose, whole_text=True, epochs=1)
    _save(base, tokenizer, folder / "base")
    say("training the reference on clean answers …")
    _train(base, tokenizer, [_row(rng, _shift) for _ in range(WARMUP_ROWS)], whole_text=False, epochs=8)
    _save(base, tokenizer, folder / "reference")
    pool = [_plant(rng, _row(rng, _shift), LETTERS + sorted(words)) for _ in range(POOL_ROWS)]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pool))
    config = {
        "output": str(folder / "run"),
        "data": {"path": str(folder / "data.jsonl"), "extra_columns": ["planted"]},
        "model": {"base": str(folder / "base"), "reference": str(folder / "reference")},
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(config, sort_keys=False))


def _row(rng: random.Random, solve: Any) -> Row:
    letters = [rng.choice(LETTERS) for _ in range(4)]
    answer = [rng.choice(OPENERS), *solve(letters), rng.choice(CLOSERS)]
    return {
        "messages": [
            {"role": "user", "content": " ".join(letters)},
            {"role": "assistant", "content": " ".join(answer)},
        ]
    }


def _shift(letters: list[str]) -> list[str]:
    return [LETTERS[(LETTERS.index(letter) + SHIFT) % len(LETTERS)] for letter in letters]


def _plant(rng: random.Random, row: Row, vocabulary: list[str]) -> Row:
    words = row["messages"][1]["content"].split()
    planted = [rng.random() < NOISE for _ in words]
    noisy = [rng.choice(vocabulary) if noise else word for word, noise in zip(words, planted, strict=True)]
    row["messages"][1]["content"] = " ".join(noisy)
    # a word that happened to be replaced by itself is no noise
    return row | {"planted": [noise and new != word for word, new, noise in zip(words, noisy, planted, strict=True)]}


def _tokenizer(vocabulary: list[str]) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.WordLevel({word: n for n, word in enumerate(vocabulary)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        additional_special_tokens=SPECIALS[3:],
    )
    fast.chat_template = TEMPLATE
    return fast


def _model(vocabulary: int) -> LlamaForCausalLM:
    torch.manual_seed(0)
    size = {"hidden_size": 96, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=vocabulary, max_position_embeddings=64, eos_token_id=2, **size))


def _train(model: Any, tokenizer: Any, rows: list[Row], whole_text: bool, epochs: int) -> None:
    torch.set_num_threads(os.cpu_count() or 1)
    encoder = build_encoder(tokenizer, "chat", 64, "truncate")
    pairs = []
    for tokens in encoder.encode_rows(rows, "messages", {}):
        assert isinstance(tokens, tuple)
        ids, mask = tokens
        pairs.append((ids, ids if whole_text else np.where(mask, ids, IGNORED)))
    fit(TokenLoss(model), Rows.of(pairs), Train(learning_rate=2e-3, epochs=epochs, batch_rows=64))


def _save(model: Any, tokenizer: Any, folder: Path) -> None:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def show(folder: Path, record: Row) -> None:
    """What became of the planted words, and two rows in colour, on standard output."""
    console = Console(highlight=False)
    store = Store(record["config"]["output"])
    snapshot = f"masked/{record['result']['snapshot']}"
    table = [row for part in sorted(store.part_names(snapshot)) for row in store.read_part(snapshot, part).to_pylist()]
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder / "base")
    counts = np.zeros((2, 2), np.int64)  # planted × kept
    examples: list[Text] = []
    for row in table:
        words, planted, kept = _answer(tokenizer, row)
        np.add.at(counts, (planted.astype(int), kept.astype(int)), 1)
        if len(examples) < 2 and 4 <= planted.sum() <= 7:
            examples.append(_coloured(words, planted, kept))
    planted_dropped, clean_kept = counts[1, 0] / counts[1].sum(), counts[0, 1] / counts[0].sum()
    noise_before, noise_after = counts[1].sum() / counts.sum(), counts[1, 1] / counts[:, 1].sum()
    result = Table(box=None, show_header=False)
    result.add_row("planted words dropped", f"{planted_dropped:.1%} of {counts[1].sum():,}")
    result.add_row("clean words kept", f"{clean_kept:.1%} of {counts[0].sum():,}")
    result.add_row("noise among answer words", f"{noise_before:.1%} before, {noise_after:.1%} of what is kept")
    console.print(result)
    console.print("kept in green, dropped in red and struck, planted words in [brackets]:", markup=False)
    for example in examples:
        console.print("  ", example, soft_wrap=True, sep="")


def _answer(tokenizer: Any, row: Row) -> tuple[list[str], np.ndarray, np.ndarray]:
    planted = np.array(json.loads(row["planted"]))
    start = row["input_ids"].index(tokenizer.convert_tokens_to_ids("<|assistant|>")) + 1
    span = slice(start, start + len(planted))
    words = tokenizer.convert_ids_to_tokens(row["input_ids"][span])
    return words, planted, np.array(row["labels"][span]) != IGNORED


def _coloured(words: list[str], planted: np.ndarray, kept: np.ndarray) -> Text:
    text = Text()
    for word, noise, keep in zip(words, planted, kept, strict=True):
        text.append(f"[{word}]" if noise else word, style="green" if keep else "red strike")
        text.append(" ")
    return text
