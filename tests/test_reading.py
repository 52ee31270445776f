"""cachetrain/reading.py reads regular files of a bounded size only; log.py prints names that change no terminal."""

import ast
import os
import re
import socket
from itertools import pairwise

import pytest
from helpers import REPO, SCRIPTS

from cachetrain import reading
from cachetrain.atomic import claim, is_locked, locked_directory
from cachetrain.log import counted, list_entry, printable

# Opens that are not of users' files, by module: a template of ours, files of /proc, temporary files of this process.
OTHER_OPENS = {
    "report/page.py": 1,
    "curation/page.py": 1,
    "data/ram.py": 2,
    "training/logs/machine.py": 1,
    "caching/buckets.py": 1,
}
PACKAGE = [path.relative_to(REPO).as_posix() for path in (REPO / "cachetrain").rglob("*.py")]
WRITES = {"w", "a", "x", "wb", "ab", "xb"}


def not_regular(folder, kind):
    """A path of which opening or reading waits, or never ends."""
    path = folder / "x"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(str(path))
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to(kind)
    return path


@pytest.mark.parametrize("kind", ["pipe", "socket", "folder", "/dev/zero", "/dev/tty", "/proc/self/fd"])
def test_what_is_no_regular_file_is_named_and_nothing_waits_for_it(kind, tmp_path):
    path = not_regular(tmp_path, kind)
    for read in (
        reading.open_regular,
        reading.read_bytes,
        reading.read_json,
        lambda path: list(reading.json_lines(path)),
    ):
        with pytest.raises(OSError, match=re.escape(str(path))):
            read(path)


def test_files_without_a_size_or_beyond_their_limit_are_named(tmp_path):
    for path in ("/proc/self/status", "/proc/self/mem"):  # as /proc/kmsg, which has no end
        (tmp_path / "link").unlink(missing_ok=True)
        (tmp_path / "link").symlink_to(path)
        with pytest.raises(OSError, match=re.escape(str(tmp_path / "link"))):
            reading.read_bytes(tmp_path / "link")
    (tmp_path / "x").write_bytes(b"12345")
    assert reading.read_bytes(tmp_path / "x", 5) == b"12345"
    with pytest.raises(OSError, match="has 5 bytes, expected at most 4"):
        reading.read_bytes(tmp_path / "x", 4)
    with open(tmp_path / "sparse", "wb") as file:
        file.truncate(2**40)
    with pytest.raises(OSError, match="expected at most"):
        reading.read_text(tmp_path / "sparse")


@pytest.mark.parametrize("kind", ["pipe", "socket", "/dev/full"])
def test_a_lock_or_a_claim_that_is_no_regular_file_is_named(kind, tmp_path):
    for name in (".lock", "claim"):
        not_regular(tmp_path, kind).rename(tmp_path / name)
    assert not is_locked(tmp_path)
    with pytest.raises(OSError), locked_directory(tmp_path):
        pass
    with pytest.raises(OSError):
        claim(tmp_path / "claim", tmp_path, "here")


@pytest.mark.parametrize(
    ("data", "text"),
    [("a ü\n".encode(), "a ü\n"), ("a ü".encode("utf-8-sig"), "a ü"), (b"", "")],
)
def test_text_is_utf8_with_or_without_a_byte_order_mark(data, text, tmp_path):
    (tmp_path / "x").write_bytes(data)
    assert reading.read_text(tmp_path / "x") == text


@pytest.mark.parametrize("data", [b"1\ncaf\xe9", "1\na".encode("utf-16"), "1\na".encode("utf-16-le")])
def test_other_text_is_named(data, tmp_path):
    (tmp_path / "x").write_bytes(data)
    with pytest.raises(ValueError, match=r"/x.*: not UTF-8 text.*; save it as UTF-8"):
        reading.read_text(tmp_path / "x")


NO_OBJECTS = ["", "{", "[]", "null", '"x"', "[" * 100_000, '{"a": ' + "1" * 5000 + "}", "{}{}"]


@pytest.mark.parametrize("text", NO_OBJECTS)
def test_json_that_is_no_object_is_named(text, tmp_path):
    (tmp_path / "x").write_text(text)
    with pytest.raises(ValueError, match=re.escape(str(tmp_path / "x"))):
        reading.read_json(tmp_path / "x")
    (tmp_path / "x").write_text("{}\n" + text + "\n")
    with pytest.raises(ValueError, match=re.escape(str(tmp_path / "x") + ", line 2")):
        list(reading.json_lines(tmp_path / "x"))


def test_an_incomplete_last_line_is_left_out(tmp_path):
    (tmp_path / "x").write_text('{"a": 1}\n{"a": 2}\n{"a"')
    assert list(reading.json_lines(tmp_path / "x")) == [(1, {"a": 1}), (2, {"a": 2})]


def opens(path):
    """Calls in a module that open a file to read it in another way than reading.py's."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            modes = {arg.value for arg in node.args if isinstance(arg, ast.Constant)}
            by_method = isinstance(node.func, ast.Attribute) and node.func.attr in ("read_text", "read_bytes")
            if by_method or (isinstance(node.func, ast.Name) and node.func.id == "open" and not modes & WRITES):
                yield node


def test_users_files_are_opened_in_one_place():
    package = REPO / "cachetrain"
    found = {path.relative_to(package).as_posix(): len(list(opens(path))) for path in package.rglob("*.py")}
    assert {name: count for name, count in found.items() if count and name != "reading.py"} == OTHER_OPENS


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a b é 猫 👩‍🚀.png", "a b é 猫 👩‍🚀.png"),
        ("a\x1b[31m\r\n\tb\x07", r"a\x1b[31m\r\n\tb\x07"),
        ("a\x9b31m\x85\u2028\u202eb", r"a\x9b31m\x85\u2028\u202eb"),
        (os.fsdecode(b"caf\xe9"), r"caf\udce9"),
    ],
)
def test_names_are_printed_in_one_line_that_changes_nothing_else(name, text):
    assert printable(name) == text


# Numbers that are never 1 where they are printed, or no numbers.
NEVER_ONE = {
    "len(rows)", "format_percent(trained['all'])", "format_percent(held_out['all'])", "len(bad)", "state.st_size",
    "longest", "len(names)", "self.samples_per_epoch", "num_tokens", "len(self._first_sizes)", "values.size",
    "_MAX_ROWS", "lengths[-1]", "pairs", "MAX_VARIANTS", "num_variants", "counts['with_variants']",
    "'text' if is_text else 'image'", "max(lengths)",
}  # fmt: skip


def test_one_of_a_kind_is_not_printed_as_several():
    assert [counted(n, "pair") for n in (0, 1, 2, 1234)] == ["0 pairs", "1 pair", "2 pairs", "1,234 pairs"]
    trees = [ast.parse((REPO / name).read_text(encoding="utf-8")) for name in (*SCRIPTS, *PACKAGE)]
    nodes = [node for tree in trees for node in ast.walk(tree)]
    calls = [node for node in nodes if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("counted")]
    nouns = "|".join({call.args[1].value.split()[-1] for call in calls if isinstance(call.args[1], ast.Constant)})
    found = {
        f"{{{ast.unparse(number.value)}}}{text.value}"
        for node in nodes
        for number, text in pairwise(node.values if isinstance(node, ast.JoinedStr) else ())
        if isinstance(number, ast.FormattedValue) and isinstance(text, ast.Constant)
        if re.match(rf" ([a-z-]+ )?({nouns})s\b", text.value) and ast.unparse(number.value) not in NEVER_ONE
    }
    assert found == set()  # use log.counted


def test_lists_keep_bytes_that_are_no_text():
    assert list_entry(os.fsdecode(b"caf\xe9\n\x1b\xc3\xa9")) == b"caf\xe9\\n\\x1b\xc3\xa9"
    assert list_entry("half \ud83d") == b"half \\ud83d"
