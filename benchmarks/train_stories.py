"""Trains a Llama of 3.3 M parameters whose widths every GGUF type can hold, on stories, for `benchmarks/quants.py`:

    python benchmarks/train_stories.py MODEL OUT --text STORIES... --held 200

The tokenizer is that of the checkpoint MODEL (stories260K: 512 tokens of the SentencePiece kind). The last stories of
the last file are held out. Writes tokenizer.model, too (`pip install sentencepiece protobuf`), without which
llama.cpp's converter gives all merges one rank. Takes about a quarter of an hour on two cores.
"""

import argparse
import json
import shutil
import time
from pathlib import Path

import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

LENGTH, BATCH, RATE = 256, 16, 2e-3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--text", type=Path, nargs="+", required=True)
    parser.add_argument("--held", type=int, default=200)
    parser.add_argument("--steps", type=int, default=1100)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    stories = [story.strip() for file in arguments.text for story in file.read_text("utf-8").split("<|endoftext|>")]
    stories = [story for story in stories if story]
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    ids = torch.tensor([token for story in stories[: -arguments.held] for token in tokenizer(story)["input_ids"]])
    model = LlamaForCausalLM(config(tokenizer))
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(ids):,} tokens")
    train(model, ids, arguments.steps)
    model.save_pretrained(arguments.out)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(arguments.model / file, arguments.out)
    (arguments.out / "tokenizer.model").write_bytes(sentencepiece_model(arguments.model / "tokenizer.json"))
    (arguments.out / "held-out.txt").write_text("\n".join(stories[-arguments.held :]), "utf-8")
    (arguments.out / "learned.txt").write_text("\n<|endoftext|>\n".join(stories[: -arguments.held]), "utf-8")


def config(tokenizer) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=256, intermediate_size=768, num_hidden_layers=4, num_attention_heads=8,
        num_key_value_heads=4, max_position_embeddings=512, tie_word_embeddings=True, rms_norm_eps=1e-5,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip


def train(model: LlamaForCausalLM, ids: torch.Tensor, steps: int) -> None:
    """Trains on random pieces of the text, with a rate that rises for 50 steps and falls from then on."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.1, betas=(0.9, 0.95))
    start = time.perf_counter()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = RATE * min(1, (step + 1) / 50) * (0.05 + 0.95 * (1 - step / steps))
        begins = torch.randint(0, len(ids) - LENGTH, (BATCH,))
        tokens = torch.stack([ids[begin : begin + LENGTH] for begin in begins])
        loss = model(input_ids=tokens, labels=tokens).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 100 == 99:
            print(f"step {step + 1}: loss {loss:.3f}, {time.perf_counter() - start:.0f} s", flush=True)


def sentencepiece_model(file: Path) -> bytes:
    """The BPE model of a tokenizer.json as SentencePiece stores it; merges rank by their order."""
    from sentencepiece import sentencepiece_model_pb2

    made = json.loads(file.read_text("utf-8"))["model"]
    merges = ["".join(merge.split(" ") if isinstance(merge, str) else merge) for merge in made["merges"]]
    rank = {merged: place for place, merged in enumerate(merges)}
    model = sentencepiece_model_pb2.ModelProto()
    for text, number in sorted(made["vocab"].items(), key=lambda pair: pair[1]):
        kind = 2 if number == 0 else 3 if number < 3 else 6 if text.startswith("<0x") else 1
        score = -float(rank.get(text, len(merges) + number)) if kind == 1 else 0.0
        model.pieces.add(piece=text, score=score, type=kind)
    spec = {"model_type": 2, "vocab_size": len(made["vocab"]), "unk_id": 0, "bos_id": 1, "eos_id": 2}
    for key, value in spec.items():
        setattr(model.trainer_spec, key, value)
    model.trainer_spec.byte_fallback = model.normalizer_spec.add_dummy_prefix = True
    model.normalizer_spec.name, model.normalizer_spec.remove_extra_whitespaces = "identity", False
    return model.SerializeToString()


if __name__ == "__main__":
    main()
