"""Experts removed from a trained model: the choice of the prototype, what it costs, and llama.cpp's own text of it."""

import importlib.util
import json
import subprocess
import sys

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lowmem_wanda import check_gguf
from lowmem_wanda import shrink_gguf as shrink

pytestmark = pytest.mark.real

KEPT = {  # by the rule in plain numpy: count x sqrt(sum_i E[h_i^2] |W_down[:, i]|^2)
    "25%": {
        0: [0, 1, 2, 5, 6, 7, 8, 10, 11, 12, 13, 15], 1: [0, 1, 2, 3, 4, 5, 8, 9, 10, 11, 12, 15],
        2: [0, 1, 2, 4, 5, 6, 8, 9, 10, 12, 13, 14], 3: [2, 3, 4, 5, 6, 7, 8, 9, 10, 12, 13, 15],
    },
    "50%": {
        0: [0, 1, 2, 6, 7, 8, 12, 13], 1: [2, 4, 8, 9, 10, 11, 12, 15], 2: [0, 1, 5, 8, 9, 12, 13, 14],
        3: [2, 3, 4, 5, 6, 7, 10, 15],
    },
}  # fmt: skip
SIZES = {"25%": 2395968, "50%": 1761088}  # bytes of files without our note
PROMPTS = (
    "Once upon a time", "The king", "In the", "She said", "First Citizen:", "It was a dark", "One day, a", "He was born in",
)  # fmt: skip
GENERATE = """
import json, sys, xllamacpp
params = xllamacpp.CommonParams()
params.model.path, params.n_ctx, params.warmup, params.cpuparams.n_threads = sys.argv[1], 128, False, 2
server = xllamacpp.Server(params)
for prompt in json.loads(sys.argv[2]):
    answer = server.handle_completions({"prompt": prompt, "n_predict": 32, "temperature": 0, "ignore_eos": True})
    print("TEXT " + json.dumps(answer["choices"][0]["text"]))
"""


@pytest.fixture(scope="module")
def folder(shared):
    return shared / "models/mixed-moe-2.6m-gguf"


@pytest.fixture(scope="module")
def small(folder, tmp_path_factory):
    """A function: share -> (the GGUF without it, its report)."""
    made = {}

    def get(share):
        if share not in made:
            target = tmp_path_factory.mktemp("small") / "small.gguf"
            made[share] = target, shrink(folder / "moe-q8.gguf", target, share, scores_from=folder / "moe.imatrix.gguf")
        return made[share]

    return get


def load(shared):
    path = shared / "models/mixed-moe-2.6m"
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, experts_implementation="eager").eval()


def cut(model, kept):
    for block, ids in kept.items():
        layer = model.model.layers[block].mlp
        for module, name in ((layer.gate, "weight"), (layer.experts, "gate_up_proj"), (layer.experts, "down_proj")):
            setattr(module, name, torch.nn.Parameter(getattr(module, name)[ids].clone(), requires_grad=False))
        for module in (layer, layer.gate, layer.experts):
            if hasattr(module, "num_experts"):
                module.num_experts = len(ids)
    return model


@pytest.mark.parametrize("share", KEPT)
def test_kept_sets_and_sizes_are_those_of_the_prototype(folder, small, share):
    target, report = small(share)
    assert {layer["layer"]: layer["kept"] for layer in report["layers"]} == KEPT[share]
    assert 0 < report["bytes"]["after"] - SIZES[share] < 256  # the note in its description
    findings = check_gguf(target, folder / "moe-q8.gguf")
    assert not findings.problems and findings.kept == KEPT[share]


@torch.no_grad()
def test_what_it_costs(shared, small):
    """KL divergence of the transformers model cut alike, from the whole one: 0.0038 and 0.108 (REAP: 0.006, 0.225)."""
    tokens = torch.from_numpy(np.load(shared / "corpora/moe-eval.npy"))
    model = load(shared)
    dense = torch.cat([model(part).logits.log_softmax(-1) for part in tokens.split(30)])
    for share, expected in (("25%", 0.0038), ("50%", 0.1078)):
        model = cut(load(shared), {layer["layer"]: layer["kept"] for layer in small(share)[1]["layers"]})
        found = torch.cat([model(part).logits.log_softmax(-1) for part in tokens.split(30)])
        assert float((dense.exp() * (dense - found)).sum(-1).mean()) == pytest.approx(expected, rel=0.02)


PLACES = {  # GGUF name -> parameter, and where in it
    "token_embd.weight": ("model.embed_tokens.weight", ...), "output_norm.weight": ("model.norm.weight", ...),
    "attn_norm": ("input_layernorm.weight", ...), "ffn_norm": ("post_attention_layernorm.weight", ...),
    "attn_q": ("self_attn.q_proj.weight", ...), "attn_k": ("self_attn.k_proj.weight", ...),
    "attn_v": ("self_attn.v_proj.weight", ...), "attn_output": ("self_attn.o_proj.weight", ...),
    "attn_q_norm": ("self_attn.q_norm.weight", ...), "attn_k_norm": ("self_attn.k_norm.weight", ...),
    "ffn_gate_inp": ("mlp.gate.weight", ...), "ffn_down_exps": ("mlp.experts.down_proj", ...),
    "ffn_gate_exps": ("mlp.experts.gate_up_proj", np.s_[:, :96]), "ffn_up_exps": ("mlp.experts.gate_up_proj", np.s_[:, 96:]),
}  # fmt: skip


def with_weights_of(model, path):
    """The model with a GGUF's weights, dequantized."""
    parameters = dict(model.named_parameters())
    for tensor in gguf.GGUFReader(path).tensors:
        block, name = tensor.name.split(".")[1], tensor.name.split(".")[-2]
        place, part = PLACES.get(tensor.name) or PLACES[name]
        parameter = parameters[place if tensor.name in PLACES else f"model.layers.{block}.{place}"]
        weight = gguf.dequantize(tensor.data, tensor.tensor_type).reshape([int(one) for one in tensor.shape[::-1]])
        parameter.data[part] = torch.from_numpy(np.array(weight))
    return model


def dequantized(source, target):
    """The same GGUF in F32."""
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(target, "qwen3moe")
    for key, field in reader.fields.items():
        if not key.startswith("GGUF.") and key != "general.architecture":
            kind = field.types[0]
            rest = (field.types[-1],) if kind == gguf.GGUFValueType.ARRAY else ()
            writer.add_key_value(key, field.contents(), kind, *rest)
    for tensor in reader.tensors:
        weight = gguf.dequantize(tensor.data, tensor.tensor_type)
        writer.add_tensor(tensor.name, np.ascontiguousarray(weight.reshape([int(one) for one in tensor.shape[::-1]])))
    writer.write_header_to_file(), writer.write_kv_data_to_file(), writer.write_tensors_to_file(), writer.close()
    return target


@torch.no_grad()
def greedy(model, ids, banned, count=32):
    """The most likely tokens after some, one by one, without a banned one."""
    ids = list(ids)
    for _ in range(count):
        logits = model(torch.tensor([ids])).logits[0, -1]
        logits[banned] = -torch.inf
        ids.append(int(logits.argmax()))
    return ids[-count:]


@pytest.mark.slow
@pytest.mark.skipif(not importlib.util.find_spec("xllamacpp"), reason="no llama.cpp: pip install xllamacpp")
@pytest.mark.parametrize(("kind", "equal"), [("F32", 8), ("Q8_0", 7)])
def test_llama_cpp_writes_the_text_of_the_transformers_model_cut_alike(shared, folder, tmp_path, kind, equal):
    """llama.cpp rounds the inputs of Q8_0 to 8 bits, which decides a near tie of the first prompt otherwise."""
    source, target = folder / "moe-q8.gguf", tmp_path / "small.gguf"
    if kind == "F32":
        source = dequantized(source, tmp_path / "f32.gguf")
    shrink(source, target, "50%", scores_from=folder / "moe.imatrix.gguf")
    tokenizer = AutoTokenizer.from_pretrained(shared / "models/mixed-moe-2.6m")
    prompts = [tokenizer.encode(text) for text in PROMPTS]
    done = subprocess.run([sys.executable, "-c", GENERATE, target, json.dumps(prompts)], capture_output=True, text=True)
    texts = [json.loads(line[5:]) for line in done.stdout.splitlines() if line.startswith("TEXT ")]
    model = with_weights_of(cut(load(shared), KEPT["50%"]), target)
    banned = 11  # llama.cpp's end of text where a file names none, which "ignore_eos" bans
    ours = [tokenizer.decode(greedy(model, ids, banned)) for ids in prompts]
    assert len(texts) == len(PROMPTS) and sum(one == other for one, other in zip(texts, ours, strict=True)) >= equal
