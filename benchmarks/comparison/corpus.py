"""A corpus of C source in tokens, one file that is made once and carried to where there is no network.

The source is the Linux kernel as Debian packs it, `linux-source-6.1` of Debian 12: 750 MB of text, of which the first
110 million tokens are kept.

    apt-get download linux-source-6.1
    dpkg-deb --extract linux-source-6.1_*.deb linux
    python benchmarks/comparison/corpus.py linux/usr/src/linux-source-6.1.tar.xz

A folder of source, or an archive of one, does as well.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import lzma
import sys
import tarfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from benchmarks.geometry.command_line import positive

Tokens = npt.NDArray[np.uint16]

DEFAULT = Path("outputs/corpus/linux.tokens")
LENGTH = 1024  # tokens of a block
HELD_OUT = 512  # blocks for validation
_TOKENS = 110_000_000
# Half and a quarter of it save 1 and 4 % of the file, and hold 2 and 6 % less text (of 2.3 million tokens)
_VOCABULARY = 32768
_LARGEST_FILE = 1 << 18  # bytes; larger ones are tables that a program wrote, a third of the kernel
_SAMPLE = 40_000_000  # characters of text that the tokenizer is trained on
_FORMAT = "uint16 little-endian, xz"
_END = "<|end|>"  # between files; its id is 0


class CorpusError(ValueError):
    """A corpus cannot be made or read; the message names what is wrong and the fix."""


@dataclass(frozen=True)
class Corpus:
    """Blocks of tokens.

    Attributes:
        vocabulary: size; every id is below.
        training: (blocks, 1024) uint16.
        held_out: of files that ``training`` has nothing of, in the same form.
    """

    vocabulary: int
    training: Tokens
    held_out: Tokens

    def batch(self, step: int, sequences: int, seed: int) -> Tensor:
        """Return the training blocks of a step: (sequences, 1024) int64, a function of the arguments alone.

        An epoch is a permutation of all blocks; the next one repeats it.
        """
        order = _order(len(self.training), seed)
        return _int64(self.training[order[np.arange(step * sequences, (step + 1) * sequences) % len(order)]])

    def validation(self, sequences: int) -> tuple[Tensor, ...]:
        """Return the held-out blocks in batches, (sequences, 1024) int64 each; an incomplete one is left out."""
        return tuple(_int64(self.held_out).split(sequences))[: len(self.held_out) // sequences]


@lru_cache(maxsize=2)
def _order(blocks: int, seed: int) -> npt.NDArray[np.int64]:
    order: npt.NDArray[np.int64] = torch.randperm(blocks, generator=torch.Generator().manual_seed(seed)).numpy()
    return order


def _int64(tokens: Tokens) -> Tensor:
    return torch.from_numpy(tokens.astype(np.int64))


def load(path: Path = DEFAULT) -> Corpus:
    """Read a corpus into memory: two bytes a token.

    Raises:
        CorpusError: when there is no such file, or it is damaged.
    """
    try:
        with path.open("rb") as file:
            header = json.loads(file.readline(1000))
            if header["format"] != _FORMAT:
                raise CorpusError(f"{path} has the format {header['format']!r}, not {_FORMAT!r}: make it anew")
            tokens = np.frombuffer(lzma.decompress(file.read()), "<u2").reshape(-1, LENGTH)
        if len(tokens) != header["training"] + header["held_out"] or tokens.max() >= header["vocabulary"]:
            raise ValueError("its header says otherwise")
    except FileNotFoundError as error:
        raise CorpusError(f"There is no {path}: benchmarks/comparison/corpus.py makes it") from error
    except (ValueError, TypeError, KeyError, EOFError, lzma.LZMAError) as error:
        if isinstance(error, CorpusError):
            raise
        raise CorpusError(f"{path} is damaged, or no corpus ({error}): copy it again, or make it anew") from error
    return Corpus(header["vocabulary"], tokens[: header["training"]], tokens[header["training"] :])


def save(corpus: Corpus, path: Path) -> None:
    """Write a corpus: a line of JSON, then the tokens, compressed.

    Appears when it is complete. Compressing 110 million tokens takes minutes and 3 GB of memory.
    """
    blocks = {"training": len(corpus.training), "held_out": len(corpus.held_out)}
    header = json.dumps({"format": _FORMAT, "vocabulary": corpus.vocabulary, **blocks})
    tokens = np.concatenate([corpus.training, corpus.held_out]).astype("<u2").tobytes()
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    # Symbols have two bytes, and a match may lie anywhere in the corpus. High and low bytes apart take 1.4 times as
    # much.
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 9, "lc": 3, "lp": 1, "pb": 1}]
    filters[0]["dict_size"] = max(1 << 16, len(tokens))
    partial.write_bytes(header.encode() + b"\n" + lzma.compress(tokens, filters=filters))
    partial.replace(path)


def read_source(source: Path) -> dict[str, str]:
    """Return the text of the .c and .h files of a folder or an archive, by path in it.

    Files above 256 KiB are left out.

    Raises:
        CorpusError: when it is neither, or holds none.
    """
    try:
        found = dict(_from_folder(source) if source.is_dir() else _from_archive(source))
    except (OSError, tarfile.TarError) as error:
        raise CorpusError(f"{source} is no folder, and no tar archive ({error})") from error
    if not found:
        raise CorpusError(f"{source} has no .c or .h file of at most {_LARGEST_FILE} bytes")
    return found


def _from_folder(folder: Path) -> Iterator[tuple[str, str]]:
    for path in folder.rglob("*.[ch]"):
        if path.is_file() and not path.is_symlink() and path.stat().st_size <= _LARGEST_FILE:
            yield path.relative_to(folder).as_posix(), path.read_text("utf-8", errors="replace")


def _from_archive(archive: Path) -> Iterator[tuple[str, str]]:
    with tarfile.open(archive, "r|*") as file:
        for member in file:
            if member.isfile() and member.name.endswith((".c", ".h")) and member.size <= _LARGEST_FILE:
                content = file.extractfile(member)
                assert content is not None  # of a file
                yield member.name.partition("/")[2], content.read().decode("utf-8", errors="replace")


def shuffled(names: Sequence[str]) -> list[str]:
    """Return paths in the order of their SHA-256: the same everywhere, and random for what is in the files."""
    return sorted(names, key=lambda name: hashlib.sha256(name.encode()).digest())


Encode = Callable[[Sequence[str]], list[list[int]]]


def make(files: dict[str, str], encode: Encode, vocabulary: int, tokens: int, held_out: int = HELD_OUT) -> Corpus:
    """Make a corpus of a random part of some files.

    Files come in the order of a hash of their paths, the first ones for validation; those for training are then
    sorted by path, since like files beside each other compress better. A file ends with token 0.

    Args:
        files: text by path.
        encode: from texts to their ids, above 0.
        vocabulary: number of ids.
        tokens: of training and validation together, at least; ``CorpusError`` when there are fewer.
        held_out: blocks for validation.
    """
    encoded = _encoded(files, encode)
    validation = _take(encoded, held_out)
    blocks = -(-tokens // LENGTH) - held_out
    training = sorted(_take(encoded, blocks))
    return Corpus(vocabulary, _blocks(training, blocks), _blocks(validation, held_out))


def _encoded(files: dict[str, str], encode: Encode) -> Iterator[tuple[str, Tokens]]:
    """Yield path and tokens of all files in the order of a hash of their paths."""
    names = iter(shuffled(list(files)))
    while group := list(islice(names, 256)):
        for name, ids in zip(group, encode([files[name] for name in group]), strict=True):
            yield name, np.array([*ids, 0], dtype=np.uint16)


def _take(encoded: Iterator[tuple[str, Tokens]], blocks: int) -> list[tuple[str, Tokens]]:
    """Return the next files, as many as fill some blocks."""
    taken: list[tuple[str, Tokens]] = []
    total = 0
    while total < blocks * LENGTH and (each := next(encoded, None)):
        taken.append(each)
        total += len(each[1])
    return taken


def _blocks(taken: Sequence[tuple[str, Tokens]], blocks: int) -> Tokens:
    tokens = np.concatenate([np.empty(0, np.uint16), *(each for _, each in taken)])
    if len(tokens) < blocks * LENGTH:
        raise CorpusError(f"The source has {len(tokens)} of {blocks * LENGTH} tokens: give more, or set --tokens")
    return tokens[: blocks * LENGTH].reshape(blocks, LENGTH)


def sample(files: dict[str, str]) -> Iterator[str]:
    """Yield the text of files in the order of a hash of their paths, until there are 40 million characters."""
    size = 0
    for name in shuffled(list(files)):
        yield files[name]
        size += len(files[name])
        if size > _SAMPLE:
            return


def tokenizer_of(texts: Iterable[str], vocabulary: int) -> Encode:
    """Train a byte-level BPE tokenizer, and return its encoder."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers  # noqa: PLC0415 - training needs none

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[_END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return lambda batch: [each.ids for each in tokenizer.encode_batch_fast(batch)]


def main(arguments: Sequence[str] | None = None) -> None:
    """Make a corpus, read it again, and print what it is."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("source", type=Path, help="folder with C source, or a tar archive of one")
    parser.add_argument("--output", type=Path, default=DEFAULT, help="file (default %(default)s)")
    parser.add_argument("--tokens", type=positive, default=_TOKENS, help="default %(default)s")
    parser.add_argument(
        "--vocabulary", type=positive, default=_VOCABULARY, help="of the tokenizer, default %(default)s"
    )
    parser.add_argument("--held-out", type=positive, default=HELD_OUT, help="blocks to validate with, of 1024 tokens")
    options = parser.parse_args(arguments)
    if not 256 < options.vocabulary <= 1 << 16:
        parser.error(f"a vocabulary of {options.vocabulary} is outside 257 to {1 << 16}: bytes, and two bytes a token")
    try:
        files = read_source(options.source)
        encode = tokenizer_of(sample(files), options.vocabulary)
        save(make(files, encode, options.vocabulary, options.tokens, options.held_out), options.output)
    except CorpusError as error:
        sys.exit(f"{parser.prog}: error: {error}")
    start = time.perf_counter()
    corpus = load(options.output)
    seconds = time.perf_counter() - start
    size = options.output.stat().st_size
    tokens = corpus.training.size + corpus.held_out.size
    print(f"{options.output}: {tokens:,} tokens in {size / 2**20:.1f} MiB, {8 * size / tokens:.2f} bits each")
    print(f"Held out: {corpus.held_out.size:,}. Read in {seconds:.1f} s.")


if __name__ == "__main__":
    main()
