"""The corpus of C source: what is kept of it, in which order, and that its file is read as it was written."""

from __future__ import annotations

import io
import json
import tarfile

import numpy as np
import pytest
import torch

from benchmarks.comparison import corpus
from benchmarks.comparison.corpus import LENGTH, Corpus, CorpusError, load, make, read_source, save


def random_corpus(blocks: int = 12, held_out: int = 3) -> Corpus:
    tokens = np.random.default_rng(0).integers(0, 1 << 16, (blocks + held_out, LENGTH), dtype=np.uint16)
    tokens[0, :2] = 0, (1 << 16) - 1  # the ends
    return Corpus(1 << 16, tokens[:blocks], tokens[blocks:])


def files(count: int) -> dict[str, str]:
    """Return files whose characters are their number: 200 to 300 of them."""
    return {f"folder{number % 3}/{number}.c": chr(1 + number) * (200 + number) for number in range(count)}


def characters(texts):
    return [[ord(each) for each in text] for text in texts]


def owners(tokens: np.ndarray) -> set[int]:
    return {int(each) - 1 for each in np.unique(tokens) if each}


# The file


def test_a_file_is_read_as_it_was_written(tmp_path):
    made = random_corpus()
    save(made, tmp_path / "new" / "c.tokens")
    read = load(tmp_path / "new" / "c.tokens")
    assert read.vocabulary == made.vocabulary
    assert np.array_equal(read.training, made.training)
    assert np.array_equal(read.held_out, made.held_out)
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["c.tokens"]  # nothing partial


def test_a_damaged_file_is_refused(tmp_path):
    path = tmp_path / "c.tokens"
    save(random_corpus(), path)
    whole = path.read_bytes()
    header, _, rest = whole.partition(b"\n")
    changed = {**json.loads(header), "vocabulary": 9}
    damages = {
        "one byte": whole[:900] + bytes([whole[900] ^ 1]) + whole[901:],
        "cut": whole[:-50],
        "empty": b"",
        "no header": rest,
        "another header": json.dumps(changed).encode() + b"\n" + rest,
        "not ours": b"[]\n" + rest,
    }
    for damage, content in damages.items():
        path.write_bytes(content)
        with pytest.raises(CorpusError, match="damaged, or no corpus"):
            pytest.fail(f"{damage}: {load(path)}")


def test_a_missing_file_and_another_format_name_the_fix(tmp_path):
    with pytest.raises(CorpusError, match=r"There is no .*corpus\.py makes it"):
        load(tmp_path / "c.tokens")
    (tmp_path / "c.tokens").write_bytes(b'{"format": "uint32"}\n')
    with pytest.raises(CorpusError, match=r"format 'uint32'.*make it anew"):
        load(tmp_path / "c.tokens")


# What is in it


def test_validation_and_training_share_no_file():
    made = make(files(60), characters, 100, 12 * LENGTH, held_out=2)
    assert made.training.shape == (10, LENGTH)
    assert made.held_out.shape == (2, LENGTH)
    assert not owners(made.training) & owners(made.held_out)


def test_the_order_hangs_on_paths_alone():
    some = files(60)
    made = make(some, characters, 100, 12 * LENGTH, held_out=2)
    again = make(dict(reversed(some.items())), characters, 100, 12 * LENGTH, held_out=2)
    assert np.array_equal(made.training, again.training)
    assert np.array_equal(made.held_out, again.held_out)


def test_a_file_is_whole_and_ends_with_token_0():
    made = make(files(60), characters, 100, 12 * LENGTH, held_out=2)
    for tokens in (made.training, made.held_out):
        documents = np.split(tokens.ravel(), np.flatnonzero(tokens.ravel() == 0) + 1)[:-1]  # the last one is cut
        assert len(documents) > 5
        for document in documents:
            number = int(document[0]) - 1
            assert document.tolist() == [*[number + 1] * (200 + number), 0]


def test_too_little_source_is_an_error():
    with pytest.raises(CorpusError, match=r"has \d+ of 30720 tokens"):
        make(files(60), characters, 100, 32 * LENGTH, held_out=2)


def test_a_folder_and_its_archive_hold_the_same(tmp_path):
    folder = tmp_path / "linux"
    (folder / "a").mkdir(parents=True)
    (folder / "a" / "b.c").write_bytes(b"int \xff;\n")  # not UTF-8
    (folder / "c.h").write_text("// c\n", encoding="utf-8")
    (folder / "large.h").write_text("x" * (1 << 18) + "x", encoding="utf-8")
    (folder / "text.txt").write_text("no source", encoding="utf-8")
    (folder / "link.c").symlink_to("c.h")
    with tarfile.open(tmp_path / "linux.tar.xz", "w:xz") as archive:
        archive.add(folder, "linux-6.1")
    expected = {"a/b.c": "int \ufffd;\n", "c.h": "// c\n"}
    assert read_source(folder) == read_source(tmp_path / "linux.tar.xz") == expected


def test_what_is_no_source_is_an_error(tmp_path):
    with pytest.raises(CorpusError, match=r"holds no|has no \.c or \.h file"):
        read_source(tmp_path)
    (tmp_path / "text").write_bytes(io.BytesIO(b"no archive").getvalue())
    for name in ("text", "missing"):
        with pytest.raises(CorpusError, match="is no folder, and no tar archive"):
            read_source(tmp_path / name)


def test_a_whole_corpus_from_the_command_line(tmp_path, capsys):
    source = tmp_path / "source"
    source.mkdir()
    for number in range(40):
        text = "".join(f"int function_{number * 100 + line}(void);\n" for line in range(100))
        (source / f"{number}.h").write_text(text, encoding="utf-8")
    path = tmp_path / "c.tokens"
    arguments = [str(source), "--output", str(path), "--tokens", "8192", "--vocabulary", "300", "--held-out", "2"]
    corpus.main(arguments)
    assert f"{path}: 8,192 tokens" in capsys.readouterr().out
    made, written = load(path), path.read_bytes()
    assert made.vocabulary == 300
    assert made.training.shape == (6, LENGTH)
    assert 257 < made.training.max() < 300  # ids of merges
    corpus.main(arguments)
    assert path.read_bytes() == written
    with pytest.raises(SystemExit, match="give more, or set --tokens"):
        corpus.main([*arguments, "--tokens", "1000000"])
    with pytest.raises(SystemExit):
        corpus.main([*arguments, "--vocabulary", "65537"])
    assert path.read_bytes() == written  # nothing is lost


# What is trained on


def test_a_batch_is_a_function_of_seed_and_step():
    made = random_corpus(blocks=10)
    batches = [made.batch(step, 4, seed=1) for step in range(5)]  # two epochs
    corpus._order.cache_clear()
    assert torch.equal(batches[3], made.batch(3, 4, seed=1))
    assert not torch.equal(batches[0], made.batch(0, 4, seed=2))
    epoch = torch.cat(batches)
    assert epoch.dtype == torch.int64
    assert sorted(epoch[:10].tolist()) == sorted(made.training.tolist())  # each block once
    assert torch.equal(epoch[:10], epoch[10:])


def test_validation_is_what_was_held_out():
    made = random_corpus(held_out=5)
    batches = made.validation(2)
    assert [batch.shape for batch in batches] == [(2, LENGTH), (2, LENGTH)]
    assert torch.cat(batches).tolist() == made.held_out[:4].tolist()
