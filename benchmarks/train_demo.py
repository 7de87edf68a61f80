"""Trains the demo model, a Llama of 1.1 M parameters, on the built-in text: `python benchmarks/train_demo.py`.

A tenth of the documents is held out and goes to lowmem_wanda/data/held-out.txt; the weights with the lowest loss on it
are saved, as bfloat16, to lowmem_wanda/data/demo. Takes about a quarter of an hour on two cores. Not part of any test.
"""

import argparse
import math
import random
import shutil
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from lowmem_wanda.data.calibration import BUILT_IN, SEPARATOR

BEGIN = "<|begin|>"
LENGTH, BATCH = 256, 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=BUILT_IN.parent / "demo")
    parser.add_argument("--steps", type=int, default=800)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    documents = [
        doc.strip()
        for path in sorted(BUILT_IN.glob("*.txt"))
        for doc in path.read_text("utf-8").split(SEPARATOR.decode())
    ]
    random.Random(0).shuffle(documents)
    held, learned = documents[: len(documents) // 10], documents[len(documents) // 10 :]
    (BUILT_IN.parent / "held-out.txt").write_text(f"\n{SEPARATOR.decode()}\n".join(held) + "\n", "utf-8")
    tokenizer = train_tokenizer(learned)
    model = LlamaForCausalLM(config())
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(learned)} documents, {len(held)} held out")
    best = train(model, tokenizer, learned, held, arguments.steps)
    model.load_state_dict(best)
    shutil.rmtree(arguments.out, ignore_errors=True)
    model.to(torch.bfloat16).save_pretrained(arguments.out)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=BEGIN, eos_token=BEGIN, model_max_length=512)
    fast.save_pretrained(arguments.out)


def config() -> LlamaConfig:
    return LlamaConfig(
        vocab_size=1024, hidden_size=128, intermediate_size=352, num_hidden_layers=5, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, tie_word_embeddings=True, bos_token_id=0, eos_token_id=0,
        attention_dropout=0.1,
    )  # fmt: skip


def train_tokenizer(documents: list[str]) -> Tokenizer:
    """Byte-level BPE of 1024 tokens that starts every text with BEGIN."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1024, special_tokens=[BEGIN], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(documents, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{BEGIN} $A", special_tokens=[(BEGIN, 0)])
    return tokenizer


def encode(tokenizer: Tokenizer, documents: list[str], dropout: float | None = None) -> torch.Tensor:
    """All documents as one row of ids; `dropout` of BPE merges makes each epoch spell words differently."""
    tokenizer.model.dropout = dropout
    ids = torch.tensor([token for document in documents for token in tokenizer.encode(document).ids])
    tokenizer.model.dropout = None
    return ids


def train(
    model: LlamaForCausalLM, tokenizer: Tokenizer, learned: list[str], held: list[str], steps: int
) -> dict[str, torch.Tensor]:
    """Trains by AdamW with a cosine schedule; gives the weights with the lowest held-out loss."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.1, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(step / 100, 0.05 + 0.475 * (1 + math.cos(math.pi * step / steps)))
    )
    held_rows = rows(encode(tokenizer, held))
    lowest, best, start = math.inf, {}, time.time()
    for step in range(steps + 1):
        if step % 20 == 0:
            random.shuffle(learned)
            stream = encode(tokenizer, learned, dropout=0.1)
        if step % 100 == 0:
            loss = evaluate(model, held_rows)
            print(
                f"step {step:5d}  held-out perplexity {math.exp(loss):8.2f}  {time.time() - start:6.0f} s", flush=True
            )
            if loss < lowest:
                lowest, best = loss, {name: weight.clone() for name, weight in model.state_dict().items()}
        starts = torch.randint(0, len(stream) - LENGTH, (BATCH,))
        batch = torch.stack([stream[first : first + LENGTH] for first in starts])
        model.train()
        model(input_ids=batch, labels=batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return best


def rows(ids: torch.Tensor) -> torch.Tensor:
    return ids[: len(ids) // LENGTH * LENGTH].reshape(-1, LENGTH)


def evaluate(model: LlamaForCausalLM, batch: torch.Tensor) -> float:
    model.eval()
    with torch.no_grad():
        return sum(float(model(input_ids=row[None], labels=row[None]).loss) for row in batch) / len(batch)


if __name__ == "__main__":
    main()
