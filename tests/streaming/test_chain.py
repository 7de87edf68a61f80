"""Blocks must be a chain from the embeddings to the head: what is none is refused, and what is one goes through."""

import numpy as np
import pytest
import torch
from helpers import opened, save_tiny
from transformers import AutoModelForCausalLM, LlamaModel
from transformers.modeling_outputs import BaseModelOutputWithPast

from lowmem_wanda import evaluate, prune
from lowmem_wanda.errors import BudgetError, ModelError
from lowmem_wanda.streaming.calls import Calls
from lowmem_wanda.streaming.decoder import Decoder


def forward_of(walk):
    """A Llama's forward whose blocks are called by `walk(layers, call, hidden)`."""

    def forward(self, input_ids=None, inputs_embeds=None, **_):
        hidden = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        tables = self.rotary_emb(hidden, torch.arange(hidden.shape[1])[None])

        def call(layer, hidden, **more):
            return layer(hidden, position_embeddings=tables, **more)

        return BaseModelOutputWithPast(last_hidden_state=self.norm(walk(list(self.layers), call, hidden)))

    return forward


def chain(layers, call, hidden):
    for layer in layers:
        hidden = call(layer, hidden)
    return hidden


def twice(layers, call, hidden):
    return chain(layers, call, chain(layers, call, hidden))


def one_again(layers, call, hidden):
    return chain([layers[0], *layers], call, hidden)


def backwards(layers, call, hidden):
    return chain(layers[::-1], call, hidden)


def not_the_last(layers, call, hidden):
    return chain(layers[:-1], call, hidden)


def averaged(layers, call, hidden):
    for layer in layers:
        hidden = (hidden + call(layer, hidden)) / 2
    return hidden


def from_afar(layers, call, hidden):
    first = call(layers[0], hidden)
    return call(layers[2], first + call(layers[1], first))


def embeddings_at_the_head(layers, call, hidden):
    return chain(layers, call, hidden) + hidden


def outputs_as_arguments(layers, call, hidden):
    before = hidden
    for layer in layers:
        before, hidden = hidden, call(layer, hidden, before=before)
    return hidden


NO_CHAINS = {
    twice: r"model.layers.0: is called again in one forward",
    one_again: r"model.layers.0: is called again",
    backwards: r"model.layers.2: is called before model.layers.0",
    not_the_last: r"calls 2 of the 3 blocks in model.layers on text",
    averaged: r"model.layers.1: is not called with what model.layers.0 puts out",
    from_afar: r"model.layers.2: is not called with what model.layers.1 puts out",
    embeddings_at_the_head: r"its head is given something beside what its last block puts out",
    outputs_as_arguments: r"model.layers.\d: what it is called with depends on what the blocks before it put out",
}


@pytest.mark.parametrize(("walk", "message"), NO_CHAINS.items(), ids=lambda one: getattr(one, "__name__", ""))
def test_what_is_no_chain_is_refused(tiny, token_file, tmp_path, monkeypatch, walk, message):
    monkeypatch.setattr(LlamaModel, "forward", forward_of(walk))
    with pytest.raises(ModelError, match=message):
        prune(tiny("llama"), tmp_path / "out", text=[str(token_file)])
    with pytest.raises(ModelError, match=message):
        evaluate(tiny("llama"), text=[str(token_file)], length=16)
    assert not (tmp_path / "out").exists()


def test_what_is_a_chain_goes_through(tiny, token_file, tmp_path, monkeypatch):
    prune(tiny("llama"), tmp_path / "as-it-is", text=[str(token_file)])
    monkeypatch.setattr(LlamaModel, "forward", forward_of(chain))
    prune(tiny("llama"), tmp_path / "out", text=[str(token_file)])
    for file in (tmp_path / "out").glob("*.safetensors"):
        assert file.read_bytes() == (tmp_path / "as-it-is" / file.name).read_bytes()


XLM = {"emb_dim": 32, "n_layers": 3, "n_heads": 4, "n_words": 96, "max_position_embeddings": 64, "pad_token_id": 2}


def test_xlm_is_refused(token_file, tmp_path):
    """It has attentions, norms and feed-forwards in lists of their own, and adds between them."""
    path = save_tiny(tmp_path / "xlm", "xlm", **XLM)
    with pytest.raises(ModelError, match="is not called with what"):
        prune(path, tmp_path / "out", text=[str(token_file)])


GEMMA4 = {"sliding_window": 8, "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 96, "global_head_dim": 8,
          "num_kv_shared_layers": 0, "layer_types": ["sliding_attention", "sliding_attention", "full_attention"]}  # fmt: skip


def test_values_for_each_token_are_kept_for_each_micro_batch(token_file, tmp_path, monkeypatch):
    path = save_tiny(tmp_path / "gemma4", "gemma4_text", **GEMMA4)
    for batch in (1, 4, 6):
        prune(path, tmp_path / f"{batch}", text=[str(token_file)], batch=batch)
    one, four, six = ({f.name: f.read_bytes() for f in (tmp_path / f"{b}").glob("*.safetensors")} for b in (1, 4, 6))
    assert one == four == six
    model = opened(path)
    with torch.no_grad(), Decoder(model) as decoder:
        decoder.embed([ids[None] for ids in np.load(token_file)])
        assert decoder._calls.own_bytes == 5 * 16 * 3 * 8 * 4  # tokens but the first 16, layers, width, float32
    monkeypatch.setattr("lowmem_wanda.streaming.decoder.free_memory", lambda _: 1000)
    with pytest.raises(BudgetError, match="values for each token"), torch.no_grad(), Decoder(model) as decoder:
        decoder.embed([ids[None] for ids in np.load(token_file)])


def test_what_blocks_leave_for_others_is_kept_for_each_micro_batch(token_file, tmp_path, monkeypatch):
    """Gemma 4's last layers attend to keys and values of layers before them."""
    path = save_tiny(tmp_path / "gemma4", "gemma4_text", **{**GEMMA4, "num_kv_shared_layers": 1,
                     "layer_types": ["full_attention"] * 3})  # fmt: skip
    made = []
    for name, way in {"4": {"batch": 4}, "6": {"batch": 6}, "0": {"batch": 4, "held": 0}, "9": {"batch": 4}}.items():
        order = {"statistics": "sequential"} if name in "09" else {}
        prune(path, tmp_path / name, text=[str(token_file)], **way, **order)
        made.append({file.name: file.read_bytes() for file in (tmp_path / name).glob("*.safetensors")})
    assert made[0] == made[1] and made[2] == made[3]
    model = opened(path)
    with torch.no_grad(), Decoder(model) as decoder:
        decoder.embed([ids[None] for ids in np.load(token_file)])
    assert [model.skeleton.traces[index].written for index in range(3)] == [0, 2 * 2 * 8 * 4, 0]  # keys, values
    monkeypatch.setattr("lowmem_wanda.streaming.decoder.free_memory", lambda _: 6 * 16 * 2 * 2 * 8 * 4)
    with pytest.raises(BudgetError, match="values for each token"), torch.no_grad(), Decoder(model) as decoder:
        decoder.embed([ids[None] for ids in np.load(token_file)])


def test_a_mapping_that_the_model_writes_on_between_blocks_is_refused():
    board = {}
    calls = Calls("model.layers", 2, torch.device("cpu"))
    calls.arrive(0, torch.zeros(1, 2, 3), ((board,), {}))
    board["mask"] = torch.zeros(1)
    with pytest.raises(ModelError, match=r"model\.layers\.1: is called with a mapping that the model itself writes on"):
        calls.arrive(1, calls.hand_on(torch.zeros(1, 2, 3)), ((board,), {}))


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("gpt_bigcode", {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64}),
        ("openai-gpt", {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64}),
        ("ctrl", {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64, "dff": 64}),
        ("xlstm", {"num_blocks": 3, "num_heads": 4, "hidden_size": 64}),
    ],
)
@torch.no_grad()
def test_perplexity_is_transformers_own(token_file, tmp_path, family, settings):
    """Of models that shape states after the input (GPT-BigCode), or whose blocks give more than states (xLSTM)."""
    path, ids = save_tiny(tmp_path / family, family, **settings), torch.from_numpy(np.load(token_file))
    prune(path, tmp_path / "out", text=[str(token_file)])
    found = evaluate(tmp_path / "out", text=[str(token_file)], length=16)
    logits = (
        AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()(ids, use_cache=False).logits
    )
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())
    assert found["perplexity"] == pytest.approx(loss.exp().item(), rel=1e-5)


@pytest.mark.parametrize(
    ("family", "settings", "message"),
    [
        (
            "cpmant",
            {"dim_head": 8, "dim_ff": 64, "segment_types": 4, "prompt_types": 4, "prompt_length": 4},
            "one for each token",
        ),
        (
            "xmod",
            {"languages": ["en_XX"], "default_language": "en_XX", "is_decoder": True, "pad_token_id": 0},
            "does not run",
        ),
    ],
)
def test_others_are_refused_in_a_sentence(token_file, tmp_path, family, settings, message):
    path = save_tiny(tmp_path / family, family, **settings)
    with pytest.raises(ModelError, match=message):
        prune(path, tmp_path / "out", text=[str(token_file)])
