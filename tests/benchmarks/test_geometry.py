"""The scripts of benchmarks/geometry: numbers against independent float64 computations, pictures, pages and errors."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.image import imread
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from benchmarks.geometry import erasure, geometry
from benchmarks.geometry.geometry import write_geometry
from benchmarks.geometry.layer_geometry import ORDERS, fit_decay, layer_geometry
from benchmarks.geometry.text import GeometryError, byte_blocks, read_text, token_blocks
from hf_schatten.linalg import dualizer, relative_size, stable_rank

pytestmark = pytest.mark.pictures

WIDTH, LENGTH = 16, 24
TEXT = "\n".join(f"def f{i}(x):\n    return {i} * x + f{i - 1}(x)" for i in range(300))


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    core.train_from_iterator(
        [TEXT], trainers.BpeTrainer(vocab_size=280, initial_alphabet=alphabet, show_progress=False)
    )
    return PreTrainedTokenizerFast(tokenizer_object=core)


@pytest.fixture
def checkpoint(tmp_path, tokenizer) -> Path:
    torch.manual_seed(0)
    config = GPT2Config(
        n_layer=2, n_embd=WIDTH, n_head=2, vocab_size=280, n_positions=LENGTH, bos_token_id=0, eos_token_id=0
    )
    model = GPT2LMHeadModel(config)
    for name, parameter in model.named_parameters():
        if ".ln_" in name:  # as training leaves them: with weights 1 and biases 0, inputs sum to 0 up to rounding
            torch.nn.init.normal_(parameter, mean=float(name.endswith("weight")), std=0.5)
    folder = tmp_path / "run" / "checkpoint-5"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def data(tmp_path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT, "utf-8")
    return path


def reference(gradient: np.ndarray, weight: np.ndarray, order: float) -> tuple[float, float, float]:
    """Variance, relative size and stable rank of the dualized gradient, from the definitions."""
    sigma = np.linalg.svd(gradient.astype(np.float64), compute_uv=False)
    q = 1.0 if math.isinf(order) else order / (order - 1)
    t = (sigma / (sigma**q).sum() ** (1 / q)) ** (q - 1)
    return t.var(), np.sqrt((t**2).sum() / (weight.astype(np.float64) ** 2).sum()), (t**2).sum() / t.max() ** 2


def rows_of(page: Path) -> dict[str, list[str]]:
    lines = [line.strip("| ").split(" | ") for line in page.read_text("utf-8").splitlines() if line.startswith("| ")]
    return {first.strip("`"): rest for first, *rest in lines}


def test_the_page_has_the_numbers_of_an_independent_computation(checkpoint, tokenizer, data, tmp_path, capsys):
    output = tmp_path / "report"
    geometry.main([str(checkpoint), "--data", str(data), "--output", str(output), "--batches", "2"])
    assert str(output / "geometry.md") in capsys.readouterr().out
    rows = rows_of(output / "geometry.md")

    model = GPT2LMHeadModel.from_pretrained(checkpoint).eval()
    blocks = token_blocks(TEXT, tokenizer, 16, LENGTH)
    assert blocks.shape == (16, LENGTH)
    model(input_ids=blocks, labels=blocks).loss.backward()
    c_attn = model.transformer.h[1].attn.c_attn.weight  # (in, out)
    gradient, weight = (tensor[:, :WIDTH].detach().numpy() for tensor in (c_attn.grad, c_attn))
    for cell, order in zip(rows["transformer.h.1.attn.c_attn.q"][1:], (2, 4, 8, 32, math.inf), strict=True):
        measured = [float(number) for number in cell.split(" · ")]
        assert measured == pytest.approx(reference(gradient, weight, order), rel=1e-3, abs=1e-12)

    assert len([name for name in rows if name.startswith("transformer.h.")]) == 12
    assert [rows["∞"][index] for index in (0, 2)] == ["0", "16"]  # variance, and the stable rank of a polar factor
    assert rows["1"][2] == "1"
    picture = imread(output / "geometry.png")
    assert picture.shape[0] > 500
    assert picture.shape[1] > 1500
    assert picture.std() > 0.05


@pytest.mark.parametrize("shape", [(9, 9), (6, 14), (14, 6)])
def test_the_geometry_is_that_of_the_dualizer(shape):
    generator = torch.Generator().manual_seed(0)
    gradient, weight = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
    layer = layer_geometry("h.0.mlp.fc", gradient * 1e-9, weight)
    assert layer.kind == "mlp.fc"
    for index, order in enumerate(ORDERS):
        T = dualizer(gradient, order)
        variance = torch.linalg.svdvals(T).var(correction=0).item()
        assert layer.variance[index] == pytest.approx(variance, rel=1e-9, abs=1e-15)
        assert layer.relative_size[index] == pytest.approx(relative_size(T, weight, 2).item(), rel=1e-9, abs=0)
        assert layer.stable_rank[index] == pytest.approx(stable_rank(T).item(), rel=1e-9, abs=0)
    # Proposition 5: the limit of variance · (r - 1)².
    assert layer.variance[-2] * (ORDERS[-2] - 1) ** 2 == pytest.approx(layer.log_variance, rel=0.1, abs=0)


def test_a_quadratic_decay_is_recovered():
    orders = np.array(ORDERS)
    with np.errstate(divide="ignore"):
        decay = fit_decay(3.0 / (orders - 1) ** 2)
    assert decay is not None
    assert (decay.constant, decay.r_squared, decay.exponent) == pytest.approx((3.0, 1.0, -2.0), rel=1e-9, abs=0)
    assert fit_decay(np.zeros(len(ORDERS))) is None


def test_a_rank_one_gradient_has_no_variance_to_fit():
    layer = layer_geometry("a", torch.outer(torch.arange(1.0, 4.0), torch.ones(5)).double(), torch.eye(3, 5))
    assert not layer.variance.any()
    np.testing.assert_allclose(layer.stable_rank, 1, rtol=1e-12, atol=0)


def test_the_tokenizer_may_lie_in_the_parent_folder(checkpoint, data, tmp_path):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (checkpoint / name).rename(checkpoint.parent / name)
    assert write_geometry(checkpoint, tmp_path / "out", data, batches=1).is_file()
    (checkpoint.parent / "tokenizer.json").unlink()
    (checkpoint.parent / "tokenizer_config.json").unlink()
    with pytest.raises(GeometryError, match=r"has a tokenizer .* with tokenizer.save_pretrained\(folder\)"):
        write_geometry(checkpoint, tmp_path / "out", data)


def test_a_bad_path_is_named_with_the_fix(checkpoint, tmp_path):
    def message(*arguments: str) -> str:
        with pytest.raises(SystemExit) as stopped:
            geometry.main([*arguments, "--output", str(tmp_path / "none")])
        return str(stopped.value)

    assert "missing is not a checkpoint: it has no config.json. Give a folder" in message(str(tmp_path / "missing"))
    assert f"Did you mean {checkpoint}?" in message(str(checkpoint.parent))
    assert "cannot be read as UTF-8 text" in message(str(checkpoint), "--data", str(tmp_path / "absent.txt"))
    (tmp_path / "short.txt").write_text("one word")
    assert "holds no block of 24 tokens" in message(str(checkpoint), "--data", str(tmp_path / "short.txt"))
    (checkpoint / "model.safetensors").write_bytes(b"broken")
    assert "holds no causal language model that can be loaded" in message(str(checkpoint))
    assert not (tmp_path / "none").exists()


def test_erasure_leaves_a_picture_and_a_row_for_each_optimizer(data, tmp_path):
    erasure.main(["--quick", "--steps", "5", "--data", str(data), "--output", str(tmp_path)])
    assert imread(tmp_path / "erasure.png").std() > 0.05
    rows = rows_of(tmp_path / "erasure.md")
    values = {name: [float(cell) for cell in rows[name]] for name in erasure.OPTIMIZERS}
    for loss, distance, cosine, overlap in values.values():
        assert 0 < loss < 6
        assert 0.01 < distance < 2
        assert 0 < cosine < 1
        assert 0 < overlap < 1
    assert len({tuple(row) for row in values.values()}) == len(erasure.OPTIMIZERS)


def test_a_trajectory_is_measured_against_its_first_weights():
    seen: list[dict[str, torch.Tensor]] = []

    def make(model, lr):
        class Recording(torch.optim.SGD):
            def step(self, closure=None):
                seen.append({name: W.detach().clone() for name, W in model.named_parameters()})
                return super().step(closure)

        return Recording(model.parameters(), lr=1.0)

    blocks = byte_blocks(TEXT, erasure.QUICK.length)
    trajectory = erasure.train(make, erasure.QUICK, blocks, 4)
    assert trajectory.steps == [0, 2, 4]
    first, after_two = (seen[index]["transformer.h.0.mlp.c_fc.weight"].double().numpy() for index in (0, 2))
    distance = np.linalg.norm(after_two - first) / np.linalg.norm(first)
    assert any(value == pytest.approx(distance, rel=1e-5, abs=0) for value in trajectory.distance[1].tolist())
    assert distance > 0
    for values, expected in ((trajectory.distance, 0), (trajectory.cosine, 1), (trajectory.overlap, 1)):
        torch.testing.assert_close(values[0], torch.full_like(values[0], expected), rtol=1e-5, atol=1e-5)
    assert erasure.train(make, erasure.QUICK, blocks, 4).losses == trajectory.losses


def test_the_overlap_of_subspaces():
    basis = torch.linalg.qr(torch.randn(16, 16, generator=torch.Generator().manual_seed(0))).Q
    values = torch.linspace(4, 1, 16)
    W = basis @ torch.diag(values) @ basis.mT
    assert erasure.subspace_overlap(W, 3 * W).item() == pytest.approx(1, rel=1e-4, abs=0)
    assert erasure.subspace_overlap(W, basis @ torch.diag(values.flip(0)) @ basis.mT).item() < 1e-6
    half = basis @ torch.diag(values[[0, 3, 2, 1, *range(4, 16)]]) @ basis.mT  # of the top two, one has gone
    assert erasure.subspace_overlap(W, half).item() == pytest.approx(0.5, rel=1e-4, abs=0)


def test_the_default_text_is_the_standard_library():
    text = read_text(None)
    assert len(text) > 1_000_000
    assert "class Fraction" in text
    with pytest.raises(GeometryError, match="holds no block of 100"):
        byte_blocks("short", 100)
