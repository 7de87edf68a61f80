"""Calibration tokens: which text, which windows, what is refused."""

import json
import sys
import types

import numpy as np
import pytest
from safetensors.numpy import save_file

from lowmem_wanda.data.calibration import BUILT_IN, calibrate
from lowmem_wanda.data.documents import documents_of
from lowmem_wanda.data.shares import divided
from lowmem_wanda.errors import CalibrationError


def encode(document):
    """A token for each byte."""
    return list(document.encode())


def rows(texts, sequences=5, length=8, vocabulary=256, seed=0):
    return calibrate(
        [str(t) for t in texts], encode, sequences=sequences, length=length, vocabulary=vocabulary, seed=seed
    ).tokens


def test_the_built_in_text_gives_as_many_windows_as_it_holds():
    texts = [documents_of(path) for path in BUILT_IN.iterdir() if path.suffix in (".txt", ".jsonl")]
    size = sum(len(encode(reader())) for text in texts for reader in text.readers)
    assert size > 120_000
    calibration = calibrate([], encode, sequences=10**6, length=2048, vocabulary=256)
    assert calibration.tokens.shape == (size // 2048, 2048)
    assert calibration.sources == ("built-in text",)


@pytest.mark.parametrize(
    ("total", "shares", "expected"), [(10, [1, 1], [5, 5]), (7, [2, 1], [5, 2]), (66, [0.7, 0.2, 0.1], [46, 13, 7])]
)
def test_sequences_are_divided_by_shares(total, shares, expected):
    assert divided(total, shares) == expected


def test_texts_with_shares(tmp_path):
    for letter in "ab":
        (tmp_path / f"{letter}.txt").write_text(letter * 100)
    texts = [f"{tmp_path}/a.txt:3", f"{tmp_path}/b.txt"]
    found = calibrate(texts, encode, sequences=8, length=10, vocabulary=256)
    whole = [bytes(row.tolist()).decode() for row in found.tokens]
    assert whole.count("a" * 10) == 6 and whole.count("b" * 10) == 2 and whole != sorted(whole)
    assert [(file["name"], file["share"]) for file in found.files] == [("a.txt", 0.75), ("b.txt", 0.25)]
    again = calibrate(texts, encode, sequences=8, length=10, vocabulary=256)
    assert np.array_equal(again.tokens, found.tokens)


@pytest.mark.parametrize(("texts", "said"), [
    (["a.txt:0", "b.txt"], "a share is a number above 0"), (["a.txt:1000", "b.txt"], "one of the texts would get none"),
    (["ids.npy:1", "more.npy:1"], "3 rows of 8 tokens, where its share is 4 of 8"),
])  # fmt: skip
def test_shares_that_cannot_be_had(tmp_path, texts, said):
    for letter in "ab":
        (tmp_path / f"{letter}.txt").write_text(letter * 100)
    np.save(tmp_path / "ids.npy", np.ones((3, 8), int))
    np.save(tmp_path / "more.npy", np.ones((4, 10), int))
    with pytest.raises(CalibrationError, match=said):
        calibrate([f"{tmp_path}/{text}" for text in texts], encode, sequences=8, length=10, vocabulary=256)


def test_a_share_of_each_text_is_known_without_shares(tmp_path):
    for letter in "ab":
        (tmp_path / f"{letter}.txt").write_text(letter * 100)
    files = calibrate([f"{tmp_path}/{one}.txt" for one in "ab"], encode, sequences=9, length=10, vocabulary=256).files
    assert sum(file["share"] for file in files) == pytest.approx(1) and files[0]["share"] in np.arange(10) / 9


def test_a_file_that_ends_like_a_share_is_a_file(tmp_path):
    (tmp_path / "a:3").write_text("a" * 100)
    assert calibrate([f"{tmp_path}/a:3"], encode, sequences=2, length=10, vocabulary=256).sources == ("a:3",)


def test_built_in_conversations_go_through_the_template_or_are_plain_lines():
    seen = []

    def render(messages, tools):
        seen.append(tools)
        if messages[0]["role"] == "system":
            raise CalibrationError("knows no system")
        return "<chat>" + "".join(f"<{one['role']}>{one['content']}" for one in messages)

    found = calibrate([], encode, sequences=10**6, length=64, vocabulary=256, render=render)
    text = bytes(found.tokens.reshape(-1).tolist())
    facts = {file["name"]: file for file in found.files}
    assert any(seen) and b"<chat><user>" in text and b"system: " in text and b'tools: [{"type": "function"' in text
    assert "of them as plain lines" in facts["agents.jsonl"]["how"] and "plain" not in facts["code.txt"]["how"]
    assert sum(file["share"] for file in found.files) == pytest.approx(1)


def test_the_seed_decides(tmp_path):
    file = tmp_path / "a.txt"
    file.write_text("the quick brown fox jumps over the lazy dog " * 20)
    assert np.array_equal(rows([file], seed=1), rows([file], seed=1))
    assert not np.array_equal(rows([file], seed=1), rows([file], seed=2))


def test_windows_are_windows_of_documents(tmp_path):
    file = tmp_path / "a.jsonl"
    documents = ["abcdefghijklmnop", "ABCDEFGHIJKLMNOP", "0123456789"]
    file.write_text("".join(json.dumps({"text": document}) + "\n" for document in documents) + "\n")
    windows = [bytes(row.tolist()).decode() for row in rows([file], sequences=50)]
    assert all(any(window in document for document in documents) for window in windows)
    assert {window[0] in "0123456789" for window in windows} == {True, False}


def test_short_documents_are_joined(tmp_path):
    file = tmp_path / "a.txt"
    file.write_text("<|endoftext|>".join(["abc", "def", "ghi", " "]))
    windows = {bytes(row.tolist()).decode() for row in rows([file], sequences=40)}
    assert windows <= {"abcdefghiabcdefghi"[start : start + 8] for start in range(18)}


def test_a_long_text_is_tokenized_in_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr("lowmem_wanda.data.documents.LONGEST", 100)
    file = tmp_path / "a.txt"
    file.write_text("0123456789\n" * 100)
    lengths = []
    calibrate(
        [str(file)],
        lambda document: lengths.append(len(document)) or encode(document),
        sequences=20,
        length=50,
        vocabulary=256,
    )
    assert max(lengths) <= 100


@pytest.mark.parametrize("suffix", [".npy", ".safetensors"])
def test_rows_of_ids_are_used_as_they_stand(tmp_path, suffix):
    ids, file = np.arange(40, dtype=np.int32).reshape(4, 10), tmp_path / f"ids{suffix}"
    np.save(file, ids) if suffix == ".npy" else save_file({"input_ids": ids}, file)
    assert np.array_equal(rows([file], sequences=3), ids[:3, :8])
    assert np.array_equal(rows([file], sequences=99, length=99), ids)


def test_one_row_of_ids_is_sampled(tmp_path):
    np.save(tmp_path / "ids.npy", np.arange(100))
    sample = rows([tmp_path / "ids.npy"])
    assert sample.shape == (5, 8) and (np.diff(sample, axis=1) == 1).all()


def refused(tmp_path, name, content):
    file = tmp_path / name
    if isinstance(content, np.ndarray):
        np.save(file, content, allow_pickle=True)
    elif content is not None:
        file.write_bytes(content)
    return file


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.txt", None, "none.txt: cannot be read"),
        ("empty.txt", b"", "is empty"),
        ("short.txt", b"abc", "3 tokens in all, fewer than --length 8"),
        ("blank.txt", b" \n ", "0 tokens in all"),
        ("bad.jsonl", b'{"txt": 1}\n', 'byte 0 is not a JSON object with a "text"'),
        ("float.npy", np.ones((2, 8)), "holds float64"),
        ("empty.npy", b"", "not an array of token ids"),
        ("cube.npy", np.ones((2, 2, 2), int), "of shape"),
        ("object.npy", np.array([{}], dtype=object), "not an array of token ids"),
        ("text.npy", b"hello", "not an array of token ids"),
        ("large.npy", np.full((2, 8), 256), "token id 256 is outside"),
        ("negative.npy", np.full((2, 8), -1), "token id -1 is outside"),
        ("broken.safetensors", b"12345678{}", "no safetensors header"),
    ],
)
def test_what_is_no_calibration_is_refused(tmp_path, name, content, message):
    from lowmem_wanda.errors import LowmemError

    with pytest.raises(LowmemError, match=message):
        rows([refused(tmp_path, name, content)])


def test_rows_do_not_keep_their_documents(tmp_path):
    np.save(tmp_path / "ids.npy", np.zeros(10_000_000, np.uint8))
    assert rows([tmp_path / "ids.npy"], sequences=4).base is None


def test_ids_and_text_do_not_mix(tmp_path):
    with pytest.raises(CalibrationError, match="give one kind"):
        rows([refused(tmp_path, "a.npy", np.ones((2, 8), int)), refused(tmp_path, "a.txt", b"text")])


@pytest.mark.parametrize(("name", "first"), [("c4", "allenai/c4"), ("wikitext2", "Salesforce/wikitext")])
def test_data_sets_are_downloaded_through_datasets(monkeypatch, name, first):
    asked = []

    class Rows(list):
        def __getitem__(self, key):
            return [row["text"] for row in self] if key == "text" else super().__getitem__(key)

    def load_dataset(*args, **kwargs):
        asked.append(args)
        return Rows([{"text": "a document of C4"}, {"text": "and a second one"}])

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    assert rows([name]).shape == (5, 8)
    assert asked[0][0] == first


def test_without_datasets_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(CalibrationError, match=r"pip install datasets"):
        rows(["c4"])
