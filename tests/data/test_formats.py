"""Whatever people have becomes the same documents, told by its content; what is no text is named, not calibrated on."""

import gzip
import json
import os
import pickle
import subprocess
import sys
import zipfile

import numpy as np
import pytest
import torch
from helpers import SHARED, opened

from lowmem_wanda.data.calibration import calibrate
from lowmem_wanda.data.documents import documents_of
from lowmem_wanda.data.windows import windows
from lowmem_wanda.errors import CalibrationError

TEXT = "Grüße aus Łódź 🙂\nline two\n" * 30
ROWS = [{"text": f"document {place}: {TEXT}", "url": "https://example.com"} for place in range(5)]
LINES = "\n".join(json.dumps(row) for row in ROWS)


def encode(text):
    return list(text.encode())


def read(path, **settings):
    return [reader() for reader in documents_of(path, **settings).readers]


@pytest.mark.parametrize("name", ["a.txt", "a.log", "notes"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32", "utf-16-be", "utf-16-le", "utf-32-be"])
@pytest.mark.parametrize("packed", ["", "gzip", "zstd"])
def test_text_of_every_encoding_is_the_same_text(tmp_path, name, encoding, packed):
    marks = {"utf-16-be": b"\xfe\xff", "utf-16-le": b"\xff\xfe", "utf-32-be": b"\0\0\xfe\xff"}
    content = marks.get(encoding, b"") + TEXT.encode(encoding)
    path = tmp_path / name
    path.write_bytes(pack(content, packed))
    assert read(path) == [TEXT.strip()]
    how = documents_of(path).how
    assert how.startswith(f"{packed}, " if packed else "UTF-") and encoding[:6].upper().strip("-") in how


def pack(content, how):
    if how == "zstd":
        import zstandard

        return zstandard.ZstdCompressor().compress(content)
    return gzip.compress(content) if how else content


ROW_FORMS = {
    "lines": LINES, "lines with CRLF": LINES.replace("\n", "\r\n") + "\r\n", "lines with blank ones": "\n\n" + LINES.replace("\n", "\n \n"),
    "a list": json.dumps(ROWS), "a list with indents": json.dumps(ROWS, indent=2, ensure_ascii=False),
}  # fmt: skip


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "c4-train.json.gz", "a.txt", "a.json.zst", "a"])
@pytest.mark.parametrize("form", ROW_FORMS)
def test_rows_are_told_by_content(tmp_path, name, form):
    path = tmp_path / name
    packed = "gzip" if name.endswith(".gz") else "zstd" if name.endswith(".zst") else ""
    path.write_bytes(pack(ROW_FORMS[form].encode(), packed))
    assert read(path) == [row["text"] for row in ROWS]


def test_rows_in_utf_16_and_parquet(tmp_path):
    import pyarrow
    from pyarrow import parquet

    (tmp_path / "a.jsonl").write_bytes(LINES.encode("utf-16"))
    parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "a.parquet")
    for name in ("a.jsonl", "a.parquet"):
        assert read(tmp_path / name) == [row["text"] for row in ROWS]
    assert documents_of(tmp_path / "a.parquet").how == "Parquet"


def test_one_object_is_one_document(tmp_path):
    path = tmp_path / "a.json"
    path.write_text(json.dumps(ROWS[0], indent=2))
    assert read(path) == [ROWS[0]["text"]]


@pytest.mark.parametrize(
    "text",
    [
        "{ this is code }\nfoo();",
        "[Scene 1]\nA room.",
        "[1] A reference\n",
        "{",
        "[" * 3000,
        "PKI is",
        "BZhang",
        "GGUF files",
    ],
)
def test_texts_that_begin_like_something_else_are_texts(tmp_path, text):
    path = tmp_path / "a.txt"
    path.write_text(text)
    assert read(path) == [text.strip()]


CHAT = [{"role": "user", "content": "What is 2+2?"}, {"role": "assistant", "content": "4"}]
CHATS = {
    "messages": {"messages": CHAT}, "conversations": {"conversations": [{"from": "human", "value": "What is 2+2?"}, {"from": "gpt", "value": "4"}]},
    "prompt and completion": {"prompt": CHAT[:1], "completion": CHAT[1:]}, "instruction": {"instruction": "What is 2+2?", "input": "", "output": "4"},
}  # fmt: skip


@pytest.mark.parametrize("form", CHATS)
def test_chats_of_every_form_are_the_models_chat(tmp_path, form):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(CHATS[form]))
    assert read(path) == ["user: What is 2+2?\nassistant: 4"]
    seen = []
    documents_of(path, lambda messages, tools: seen.append((messages, tools)) or "rendered").readers[0]()
    assert seen == [(CHAT, None)]


def test_tools_reach_the_template_and_prompts_are_joined(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"messages": CHAT, "tools": [{"name": "add"}]}))
    assert read(path, render=lambda messages, tools: f"{tools}") == ["[{'name': 'add'}]"]
    path.write_text(json.dumps({"prompt": "Once ", "completion": "upon", "text": None}))
    assert read(path) == ["Once upon"]
    path.write_text(json.dumps({"instruction": "Add.", "input": "2, 2", "output": "4"}))
    assert read(path) == ["user: Add.\n\n2, 2\nassistant: 4"]


def saved(content):
    def save(path):
        path.write_bytes(content)

    return save


def torch_file(path):
    torch.save({"ids": torch.ones(3)}, path)


def npz(path):
    with open(path, "wb") as file:
        np.savez(file, ids=np.ones(3, int))


def zipped(path):
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("a.txt", TEXT)


def arrow(path):
    import pyarrow

    table = pyarrow.Table.from_pylist(ROWS)
    with pyarrow.OSFile(str(path), "wb") as sink, pyarrow.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)


OTHERS = {
    "torch.save": (torch_file, "a zip archive, as torch.save"), "npz": (npz, "zip archive|archive of arrays"), "zip": (zipped, "zip archive"),
    "pickle": (saved(pickle.dumps({"a": 1})), "a pickle, which is never opened"), "old pickle": (saved(pickle.dumps([1], protocol=2)), "a pickle"),
    "GGUF": (saved(b"GGUF\3\0\0\0" + bytes(64)), "a GGUF file"), "arrow": (arrow, "an Arrow file; save it as .parquet"),
    "PDF": (saved(b"%PDF-1.7\n" + b"x" * 100), "a PDF"), "xz": (saved(b"\xfd7zXZ\0" + bytes(64)), "compressed by xz"),
    "bzip2": (saved(__import__("bz2").compress(TEXT.encode())), "bzip2 archive"), "sqlite": (saved(b"SQLite format 3\0" + bytes(99)), "SQLite"),
    "Latin-1": (saved("Grüße aus München".encode("latin-1")), "is not UTF-8 near byte 2"), "a cut character": (saved("Grüße".encode()[:3]), "is not UTF-8"),
    "NUL": (saved(b"text\0text"), "holds a NUL"), "UTF-16 without a mark": (saved(TEXT.encode("utf-16-le")), "holds a NUL|is not UTF-8"),
    "half UTF-16": (saved(TEXT.encode("utf-16")[:-1]), "is not UTF-16"), "gzip cut short": (saved(gzip.compress(TEXT.encode())[:-9]), "not a whole gzip"),
    "zstd cut short": (saved(pack(TEXT.encode() * 99, "zstd")[:40]), "zstd|is empty"), "parquet cut short": (saved(b"PAR1" + bytes(50) + b"PAR1"), "not a whole Parquet"),
    "an image": (saved(b"\x89PNG\r\n" + bytes(50)), "an image"), "empty": (saved(b""), "is empty"),
}  # fmt: skip


@pytest.mark.parametrize("kind", OTHERS)
@pytest.mark.parametrize("name", ["a.txt", "a.bin"])
def test_what_is_no_text_is_named(tmp_path, kind, name):
    make, message = OTHERS[kind]
    make(tmp_path / name)
    for work in (
        lambda: calibrate([str(tmp_path / name)], encode, sequences=1, length=4, vocabulary=256),
        lambda: windows([str(tmp_path / name)], encode, length=4, vocabulary=256),
    ):
        with pytest.raises(CalibrationError, match=f"{name}: .*({message})") as error:
            work()
        assert "\n" not in str(error.value) and len(str(error.value)) < 600


BAD_ROWS = {
    "no field": ({"url": "x"}, "none of the fields text, .* but 'url'"), "text is a number": ({"text": 5}, "none of the fields"),
    "a message without content": ({"messages": [{"who": "me"}]}, "neither role and content"), "an input that is a list": ({"instruction": "a", "input": [], "output": "b"}, "no text"),
    "mixed": ({"prompt": "a", "completion": [1]}, "neither two texts nor two lists"),
}  # fmt: skip


@pytest.mark.parametrize("kind", BAD_ROWS)
def test_rows_without_text_are_named_with_their_place(tmp_path, kind):
    row, message = BAD_ROWS[kind]
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(ROWS[0]) + "\n" + json.dumps(row) + "\n")
    with pytest.raises(CalibrationError, match=f"line at byte {len(json.dumps(ROWS[0])) + 1} .*{message}"):
        read(path)


@pytest.mark.parametrize("content", ["[1, 2", '[{"text": "a"}] and more', '{"text": "a"', "hello", "[" + "[" * 5000])
def test_a_json_name_needs_json(tmp_path, content):
    path = tmp_path / "a.json"
    path.write_text(content)
    with pytest.raises(CalibrationError, match="JSON"):
        read(path)


@pytest.mark.parametrize("kind", ["pipe", "folder", "device"])
def test_nothing_waits_for_a_pipe(tmp_path, kind):
    path = tmp_path / "a.txt"
    {"pipe": os.mkfifo, "folder": os.mkdir, "device": lambda path: os.symlink("/dev/zero", path)}[kind](path)
    with pytest.raises(CalibrationError, match=f"is a {kind}, not a file"):
        calibrate([str(path)], encode, sequences=1, length=4, vocabulary=256)


def test_ids_are_told_by_content(tmp_path):
    np.save(tmp_path / "ids.npy", np.arange(32).reshape(2, 16))
    (tmp_path / "ids.npy").rename(tmp_path / "ids.bin")
    found = calibrate([str(tmp_path / "ids.bin")], None, sequences=2, length=16, vocabulary=96)
    assert (
        found.tokens.tolist() == np.arange(32).reshape(2, 16).tolist() and found.files[0]["how"] == "rows of token ids"
    )


@pytest.mark.parametrize("row", [[5] * 8 + [0] * 8, [0] * 16])
def test_padding_is_warned_of(tmp_path, row):
    np.save(tmp_path / "ids.npy", np.array([list(range(16)), row, row]))
    found = calibrate([str(tmp_path / "ids.npy")], None, sequences=3, length=16, vocabulary=96)
    assert "2 of 3 rows of token ids end in one repeated id (0)" in found.warnings[0]
    np.save(tmp_path / "ids.npy", np.array([list(range(16))] * 3))
    assert not calibrate([str(tmp_path / "ids.npy")], None, sequences=3, length=16, vocabulary=96).warnings


def test_ids_outside_the_vocabulary_say_whose_fault_it_is(tmp_path):
    np.save(tmp_path / "ids.npy", np.full((2, 8), -100))
    with pytest.raises(CalibrationError, match="-100 .*give input ids, not labels"):
        calibrate([str(tmp_path / "ids.npy")], None, sequences=3, length=8, vocabulary=96)
    (tmp_path / "a.txt").write_text(TEXT)
    with pytest.raises(CalibrationError, match="its tokenizer is not this model's"):
        calibrate([str(tmp_path / "a.txt")], encode, sequences=3, length=8, vocabulary=96)


def test_a_long_line_is_cut_between_characters(tmp_path, monkeypatch):
    monkeypatch.setattr("lowmem_wanda.data.documents.LONGEST", 100)
    path = tmp_path / "a.txt"
    path.write_text("ü🙂é" * 200)
    pieces = read(path, strip=False)
    assert "".join(pieces) == "ü🙂é" * 200 and max(len(piece.encode()) for piece in pieces) <= 100


def test_the_report_says_how_each_file_was_read(tmp_path, monkeypatch):
    if not SHARED.is_dir():
        pytest.skip("no ../shared with real models beside this checkout")
    from lowmem_wanda import prune

    (tmp_path / "a.json.gz").write_bytes(gzip.compress(LINES.encode()))
    (tmp_path / "b.txt").write_bytes((TEXT * 20).encode("utf-16"))
    report = prune(
        SHARED / "models/stories260K",
        tmp_path / "out",
        text=[str(tmp_path / "a.json.gz"), str(tmp_path / "b.txt")],
        sequences=8,
        length=32,
    )
    one, two = report["calibration"]["files"]
    assert (one["name"], one["how"], one["documents"]) == ("a.json.gz", "gzip, UTF-8 JSON lines, field text", 5)
    assert (two["how"], two["documents"]) == ("UTF-16 text", 1) and one["tokens"] + two["tokens"] > 32


MEMORY = """
import resource, sys
from lowmem_wanda.data.calibration import calibrate
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
calibrate([sys.argv[1]], lambda text: list(range(64)), sequences=4, length=16, vocabulary=64)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["txt", "npy", "gz", "json"])
def test_no_text_is_held_in_memory(tmp_path, kind):
    path = tmp_path / f"a.{kind}"
    if kind == "npy":
        header = str({"descr": "<i8", "fortran_order": False, "shape": (1_000_000, 32)}).encode() + b"\n"
        path.write_bytes(b"\x93NUMPY\1\0" + len(header).to_bytes(2, "little") + header)
        os.truncate(path, path.stat().st_size + 256_000_000)
    elif kind == "json":
        path.write_text("[" + ",".join(json.dumps({"text": "a b " * 1000}) for _ in range(50_000)) + "]")
    else:
        content = b"a b \n" * 40_000_000
        path.write_bytes(gzip.compress(content, 1) if kind == "gz" else content)
    done = subprocess.run([sys.executable, "-c", MEMORY, path], capture_output=True, text=True, check=True)
    # pages of the file that are mapped count, too, but the system can have them back
    assert int(done.stdout) < 350_000, done.stdout


def test_a_line_has_a_limit(tmp_path, monkeypatch):
    monkeypatch.setattr("lowmem_wanda.data.documents.MOST_ROW", 1000)
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"text": "a" * 2000}))
    with pytest.raises(CalibrationError, match="line at byte 0 is longer than"):
        read(path)


def test_what_unpacks_to_too_much_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("lowmem_wanda.data.formats.MOST", 1 << 20)
    path = tmp_path / "a.gz"
    path.write_bytes(gzip.compress(b"a b \n" * 1_000_000))
    with pytest.raises(CalibrationError, match="when it is unpacked"):
        read(path)


FUNCTION = {"name": "add", "description": "adds", "parameters": {"type": "object", "properties": {}}}
TOOL = {"type": "function", "function": FUNCTION}
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{{ tools|length if tools else '' }}"
)


def test_the_models_own_template_renders_chats(tmp_path):
    if not SHARED.is_dir():
        pytest.skip("no ../shared with real models beside this checkout")
    import shutil

    shutil.copytree(SHARED / "models/stories260K", tmp_path / "model")
    model = opened(tmp_path / "model")
    assert model.render(CHAT, None) == ""
    (tmp_path / "model/chat_template.jinja").write_text(TEMPLATE)
    model = opened(tmp_path / "model")
    assert model.render(CHAT, None) == "<user>What is 2+2?<assistant>4" and model.render(CHAT, [TOOL]).endswith("1")
    (tmp_path / "model/chat_template.jinja").write_text("{{ raise_exception('roles must alternate') }}")
    with pytest.raises(
        CalibrationError, match="chat template does not take a chat of 2 messages .*roles must alternate"
    ):
        opened(tmp_path / "model").render(CHAT, None)


def test_windows_say_how_their_texts_were_read(tmp_path):
    (tmp_path / "a.txt").write_bytes(TEXT.encode("utf-16"))
    (tmp_path / "b.jsonl").write_text(LINES)
    (one, two) = windows([str(tmp_path / "a.txt"), str(tmp_path / "b.jsonl")], encode, length=64, vocabulary=256).files
    assert (one["how"], two["how"], two["documents"]) == ("UTF-16 text", "UTF-8 JSON lines, field text", 5)
    assert one["tokens"] == len(TEXT.encode()) and two["read"] == 5
