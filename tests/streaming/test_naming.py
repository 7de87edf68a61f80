"""What of a checkpoint is understood: names, odd tensors beside the weights, numbers in config.json, tokenizers."""

import json
import os
import sys

import pytest
import torch
from helpers import contents, opened, save_tiny
from safetensors.torch import load_file, save_file

from lowmem_wanda import check, prune
from lowmem_wanda.errors import CalibrationError, CheckpointError, ModelError


@pytest.fixture
def llama(tmp_path):
    """A tiny Llama in one file, to be changed."""
    return save_tiny(tmp_path / "llama", "llama", shard="1GB")


def renamed(path, change):
    file = path / "model.safetensors"
    save_file({change(name): tensor for name, tensor in load_file(file).items()}, file, {"format": "pt"})


def added(path, **tensors):
    file = path / "model.safetensors"
    save_file({**load_file(file), **tensors}, file, {"format": "pt"})


def configured(path, **changes):
    file = path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.mark.parametrize(
    "prefix", ["_orig_mod.", "module.", "_fsdp_wrapped_module.", "base_model.model.", "module._orig_mod."]
)
def test_the_prefix_of_a_wrapper_is_named(llama, prefix):
    renamed(llama, lambda name: prefix + name)
    with pytest.raises(CheckpointError, match=f"begin with '{prefix}'.*save the model within"):
        opened(llama)


def test_names_without_the_models_own_prefix_are_found(llama, token_file, tmp_path):
    renamed(llama, lambda name: name.removeprefix("model."))
    prune(llama, tmp_path / "out", text=[str(token_file)])


def test_a_norm_for_each_head_is_no_matrix(token_file, tmp_path):
    """Command R+: its norms have two dimensions."""
    path = save_tiny(tmp_path / "cohere", "cohere", use_qk_norm=True)
    norm = next(iter(opened(path).block_tensors(0)), None)
    assert any(len(tensor.shape) == 2 and "norm" in tensor.name for tensor in opened(path).block_tensors(0)), norm
    prune(path, tmp_path / "out", text=[str(token_file)])
    assert not check(tmp_path / "out", path).problems


MASKS = {
    "transformer.h.{}.attn.attention.bias": torch.tril(torch.ones(64, 64, dtype=torch.uint8))[None, None],
    "transformer.h.{}.attn.attention.masked_bias": torch.tensor(-1e9),
    "transformer.h.{}.attn.mask": torch.ones(1, 1, 64, 64),
    "transformer.h.{}.attn.flags": torch.ones(8, dtype=torch.bool),
}


def test_masks_that_were_saved_as_buffers_are_copied(token_file, tmp_path):
    path = save_tiny(tmp_path / "neo", "gpt_neo", shard="1GB", num_layers=3, num_heads=4, window_size=16, pad_token_id=0,
                     attention_types=[[["global", "local", "global"], 1]])  # fmt: skip
    added(path, **{name.format(block): tensor.clone() for name, tensor in MASKS.items() for block in range(3)})
    facts = {}
    prune(path, tmp_path / "out", text=[str(token_file)], on_start=facts.update)
    assert not check(tmp_path / "out", path).problems
    assert len(facts["untouched"]) == 12


@pytest.mark.parametrize("name", ["v_head.summary.weight", "value_head.weight", "score.weight"])
def test_heads_beside_the_model_are_copied_and_said(llama, token_file, tmp_path, name):
    added(llama, **{name: torch.ones(1, 32)})
    facts = {}
    prune(llama, tmp_path / "out", text=[str(token_file)], on_start=facts.update)
    assert facts["untouched"] == [name]
    held = {key: tensor for file in (tmp_path / "out").glob("*.safetensors") for key, tensor in load_file(file).items()}
    assert torch.equal(held[name], torch.ones(1, 32))


@pytest.mark.parametrize(
    "name", ["model.layers.0.mlp.new.weight", "model.layers.3.mlp.up_proj.weight", "extra.layers.0.weight"]
)
def test_matrices_that_may_be_of_a_block_are_refused(llama, name):
    added(llama, **{name: torch.ones(4, 32)})
    with pytest.raises(CheckpointError, match=f"{name} has no place"):
        opened(llama)


def test_tensors_of_zero3_are_named(llama):
    added(llama, **{"model.layers.1.mlp.up_proj.weight": torch.empty(0)})
    with pytest.raises(CheckpointError, match="up_proj.weight is empty, as DeepSpeed ZeRO-3 leaves it"):
        opened(llama)


def test_matrices_without_weights_are_refused(llama):
    names = [f"model.layers.{block}.mlp.{part}_proj.weight" for block in range(3) for part in ("gate", "up", "down")]
    added(llama, **{name: torch.empty((32, 0) if "down" in name else (0, 32)) for name in names})
    configured(llama, intermediate_size=0)
    with (
        pytest.warns(UserWarning, match="zero-element"),
        pytest.raises(CheckpointError, match="is empty, .* makes it so"),
    ):
        opened(llama)


@pytest.mark.parametrize(
    ("family", "key", "number"),
    [("llama", "num_hidden_layers", 300_000), ("llama", "num_hidden_layers", 10**9), ("gpt2", "n_layer", 10**9),
     ("mixtral", "num_local_experts", 10**9), ("mixtral", "num_local_experts", 5000)],
)  # fmt: skip
def test_absurd_numbers_of_layers_are_refused_before_they_are_built(tmp_path, family, key, number):
    path = save_tiny(tmp_path / family, family)
    configured(path, **{key: number})
    with pytest.raises(ModelError, match=f"config.json: \\w+ is {number}, where the names of the tensors count to"):
        opened(path)


@pytest.mark.parametrize(
    "way", ["flash_attention_2", "flash_attention_3", "kernels-community/flash-attn", "flex_attention"]
)
@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation"])
def test_attention_of_other_packages_is_not_needed(llama, token_file, tmp_path, monkeypatch, way, key):
    prune(llama, tmp_path / "plain", text=[str(token_file)])
    configured(llama, **{key: way})
    monkeypatch.setattr("transformers.integrations.hub_kernels.load_and_register_attn_kernel", None, raising=False)
    prune(llama, tmp_path / "out", text=[str(token_file)])
    plain, out = contents(tmp_path / "plain"), contents(tmp_path / "out")
    assert all(out[name] == plain[name] for name in plain if name.endswith(".safetensors"))
    assert way in (tmp_path / "out/config.json").read_text()  # as it is in the source


def test_positions_that_stretch_with_the_text_count(llama):
    configured(llama, max_position_embeddings=16, rope_scaling={"rope_type": "dynamic", "factor": 4.0})
    assert opened(llama).window(100) == 64
    configured(llama, rope_scaling={"rope_type": "linear", "factor": 4.0})
    assert opened(llama).window(100) == 16


def test_two_lists_of_blocks_the_one_that_text_goes_through(tiny, token_file, tmp_path, monkeypatch):
    """A model with a larger encoder beside its decoder, as Phi-4-multimodal has."""
    from transformers import LlamaForCausalLM

    made = LlamaForCausalLM.__init__

    def with_encoder(self, config):
        made(self, config)
        self.encoder = torch.nn.ModuleList([torch.nn.Linear(256, 256, bias=False) for _ in range(2)])

    path = save_tiny(tmp_path / "two", "llama", shard="1GB")
    monkeypatch.setattr(LlamaForCausalLM, "__init__", with_encoder)
    added(path, **{f"encoder.{place}.weight": torch.ones(256, 256) for place in range(2)})
    assert opened(path).skeleton.path == "model.layers"
    prune(path, tmp_path / "out", text=[str(token_file)])


BAD_TOKENIZERS = {
    "a list": ({"tokenizer_config.json": "[1]"}, "tokenizer cannot be loaded"),
    "no JSON": ({"tokenizer.json": "{"}, "tokenizer cannot be loaded .*add a tokenizer.json that is whole"),
    "another form": ({"tokenizer.json": '{"model": {"type": "New"}}'}, "tokenizer cannot be loaded"),
    "deep": ({"tokenizer.json": "[" * 5000}, "tokenizer cannot be loaded"),
}


@pytest.mark.parametrize(("files", "message"), BAD_TOKENIZERS.values(), ids=list(BAD_TOKENIZERS))
def test_a_tokenizer_that_cannot_be_loaded_is_one_sentence(llama, files, message):
    for name, content in files.items():
        (llama / name).write_text(content)
    with pytest.raises(CalibrationError, match=message) as error:
        opened(llama).encode("text")
    assert "\n" not in str(error.value)


PIECES = [
    (b"\n\x0e\n\x05", "it is in {}, which needs another package.; pip install sentencepiece protobuf"),
    (b"IQ== 0\nIg== 1\n", "it is in {}, which needs another package.; pip install tiktoken"),
    (b"x", "{} holds neither a SentencePiece model nor tiktoken's ranks.; download it again"),
]


@pytest.mark.parametrize("name", ["tokenizer.model", "source.spm"])
@pytest.mark.parametrize(("content", "message"), PIECES)
def test_a_tokenizer_of_pieces_says_what_it_needs(llama, monkeypatch, name, content, message):
    (llama / name).write_bytes(content)
    (llama / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}')
    monkeypatch.setattr("lowmem_wanda.streaming.tokenizer.find_spec", lambda _: None)
    with pytest.raises(CalibrationError, match=message.format(name)):
        opened(llama).encode("text")


@pytest.mark.skipif(sys.platform != "linux", reason="names of files are text there")
def test_a_tokenizer_in_a_folder_whose_name_is_no_utf_8(shared, tmp_path):
    folder = tmp_path / os.fsdecode(b"mod\xe9le")
    folder.symlink_to(shared / "models" / "stories260K")
    assert opened(folder).encode("Once upon") == opened(shared / "models" / "stories260K").encode("Once upon")
