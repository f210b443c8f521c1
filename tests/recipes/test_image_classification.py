"""The image recipe: its options, digits and augmentation, ResMLP, the metric, and whole tiny runs.

One long file, in the order of a run, for all of it shares the digits and one tiny model.
"""

import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import PartialState
from datasets import ClassLabel, Dataset, Image
from huggingface_hub import ModelCard
from PIL import Image as Pictures
from safetensors.torch import load_file
from sklearn.datasets import load_digits
from sklearn.metrics import accuracy_score
from transformers import AutoModelForImageClassification

from benchmarks.comparison.scripts import Script
from hf_schatten import SchattenCallback, route_parameters
from hf_schatten.adaptive.probe import Probe
from recipes.image_classification import arguments, data, image_classification
from recipes.image_classification.resmlp import ResMLPConfig, ResMLPForImageClassification
from recipes.recipe_parts.command_line import InputError
from recipes.recipe_parts.metrics import load_metric
from recipes.recipe_parts.splits import held_out_rows

pytestmark = pytest.mark.filterwarnings(r"error:::recipes\.")

FOLDER = Path(image_classification.__file__).parent
TINY = "--hidden_size 16 --num_hidden_layers 1 --num_attention_heads 2 --max_train_samples 32 --max_eval_samples 40"
QUICK = (
    "--optim schatten_p --optim_args p=adaptive,p_first_step=1,p_interval=3 --learning_rate 1e-2 --random_shift 1 "
    "--per_device_train_batch_size 8 --per_device_eval_batch_size 40 --logging_steps 1 --report_to none --use_cpu "
    "--disable_tqdm true --dataloader_pin_memory false"
)


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def _no_pictures_of_the_callback(monkeypatch):
    """Leave only the picture that the card draws itself: the others take most of a tiny run's time."""
    monkeypatch.setattr(SchattenCallback, "_draw", lambda *args: None)


@pytest.fixture(scope="module")
def digits():
    return data.load_sklearn_digits(0.2)


@pytest.fixture
def resmlp():
    torch.manual_seed(0)
    sizes = {"image_size": 8, "patch_size": 2, "num_channels": 1, "hidden_size": 12, "num_hidden_layers": 2}
    model = ResMLPForImageClassification(ResMLPConfig(**sizes, num_labels=3))
    with torch.no_grad():  # nothing at its first value, so that nothing can be left out
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def run(folder, *flags):
    image_classification.main([*TINY.split(), *QUICK.split(), "--output_dir", str(folder), *flags])
    return json.loads((folder / "all_results.json").read_text())


def test_a_run_leaves_its_process_group(tmp_path, monkeypatch):
    left = []
    monkeypatch.setattr(PartialState, "destroy_process_group", lambda self, group=None: left.append(group))
    run(tmp_path, "--max_steps", "1", "--do_eval", "false")
    assert left == [None]


# Options


COMPARISONS = {"comparison.yaml", "resmlp_comparison.yaml", "cifar10_comparison.yaml"}


@pytest.mark.parametrize("name", sorted({path.name for path in FOLDER.glob("*.yaml")} - COMPARISONS))
def test_shipped_files_are_valid(name, monkeypatch):
    monkeypatch.setattr("transformers.training_args.is_torch_bf16_gpu_available", lambda: True)
    model_args, data_args, training_args = arguments.parse_arguments([str(FOLDER / name), "--use_cpu"])
    assert training_args.optim == "schatten_p"
    assert not training_args.remove_unused_columns
    config = image_classification.new_config(model_args)
    assert config.model_type == name.partition("_")[0]
    assert config.image_size % config.patch_size == 0
    assert (data_args.dataset_name is None) == ("digits" in name)


@pytest.mark.parametrize("name", sorted(COMPARISONS))
def test_the_comparisons_are_read_by_the_benchmark(name, monkeypatch):
    monkeypatch.setattr("transformers.training_args.is_torch_bf16_gpu_available", lambda: True)
    task = Script.load(FOLDER / name)
    assert task.script.is_file()
    assert Path(task.arguments[0]).is_file()
    *_, training_args = arguments.parse_arguments([*task.arguments, "--use_cpu"])
    assert training_args.eval_strategy != "no"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--patchsize 3", "unknown option 'patchsize' in the command line. Did you mean 'patch_size'?"),
        ("--model_type cnn", "--model_type cnn is not known: give vit or resmlp"),
        ("--patch_size 3", "--image_size 8 is not a multiple of --patch_size 3"),
        ("--patch_size 0", "--patch_size 0 is too small: give at least 1"),
        ("--num_channels 2", r"--num_channels 2: give 1 \(grey\) or 3 \(colour\)"),
        ("--hidden_size 10", "--hidden_size 10 is not a multiple of --num_attention_heads 4"),
        ("--model_name_or_path a --config_overrides b=1", "cannot go with --model_name_or_path"),
        ("--validation_fraction 1", "--validation_fraction 1.0 is not between 0 and 1"),
        ("--random_crop_area 0", "--random_crop_area 0.0 is not above 0 and at most 1"),
        ("--eval_crop 1.5", "--eval_crop 1.5 is not above 0 and at most 1"),
        ("--random_shift -1", "--random_shift -1 is too small: give at least 0"),
        ("--max_train_samples 0", "--max_train_samples 0 is too small: give at least 1"),
        ("--resume_from_checkpoint last --output_dir nowhere", r"no complete checkpoint-\* folder in nowhere"),
    ],
)
def test_bad_flags(flags, message):
    with pytest.raises(InputError, match=message):
        image_classification.main([*flags.split(), "--use_cpu"])


def test_heads_matter_to_a_vit_alone():
    model_args, *_ = arguments.parse_arguments(["--model_type", "resmlp", "--hidden_size", "10", "--use_cpu"])
    assert image_classification.build_model(model_args, ["a", "b"]).config.hidden_size == 10


# Images


def test_every_digit_is_split_alike(digits):
    assert {split: len(rows) for split, rows in digits.items()} == {"train": 1438, "validation": 359}
    train, held_out = digits["train"]["row"][:], digits["validation"]["row"][:]
    assert sorted(train + held_out) == list(range(1797))
    for digit, count in enumerate(np.bincount(load_digits().target)):
        assert digits["validation"]["label"][:].count(digit) == round(0.2 * count)


def test_the_split_is_the_same_everywhere():
    labels = [0, 1] * 6 + [2]
    assert held_out_rows(labels, 0.34) == [3, 8, 9, 10, 12]


def test_pixels_are_the_sources(digits):
    row = digits["validation"][5]
    made = data.Pixels(size=8, channels=1)({"image": [row["image"]], "label": [row["label"]], "row": [row["row"]]})
    source = load_digits()
    expected = torch.tensor(source.images[row["row"]] / 8 - 1, dtype=torch.float32)
    torch.testing.assert_close(made["pixel_values"][0], expected[None], atol=1.01 / 255, rtol=0.0)  # 8 bits
    assert made["labels"] == [source.target[row["row"]]]


def picture_of(array):
    return Pictures.fromarray(np.asarray(array, dtype=np.uint8))


def batch_of(*pictures):
    return {"image": list(pictures), "label": [0] * len(pictures), "row": list(range(len(pictures)))}


def test_the_middle_is_evaluated():
    picture = picture_of(np.arange(4 * 8).reshape(4, 8))
    (values,) = data.Pixels(size=2, channels=1, central_share=0.5)(batch_of(picture))["pixel_values"]
    expected = torch.tensor([[11.0, 12.0], [19.0, 20.0]]) / 127.5 - 1
    torch.testing.assert_close(values, expected[None], atol=1e-6, rtol=0.0)


def test_colours_are_channels():
    colours = np.random.default_rng(0).integers(256, size=(4, 4, 3))
    (values,) = data.Pixels(size=4, channels=3)(batch_of(picture_of(colours)))["pixel_values"]
    expected = torch.tensor(colours / 127.5 - 1, dtype=torch.float32).permute(2, 0, 1)
    torch.testing.assert_close(values, expected, atol=1e-6, rtol=0.0)


@pytest.mark.parametrize(("down", "right"), [(0, 0), (1, 0), (-1, 2), (2, -2), (0, -1)])
def test_a_shift_moves_pixels(down, right):
    values = torch.arange(20.0).reshape(1, 4, 5)
    expected = np.full((4, 5), -1.0)
    for y in range(4):
        for x in range(5):
            if 0 <= y - down < 4 and 0 <= x - right < 5:
                expected[y, x] = values[0, y - down, x - right]
    np.testing.assert_array_equal(data._shifted(values, down, right)[0].numpy(), expected)


def test_augmentation_hangs_on_seed_epoch_and_row_alone():
    pictures = [picture_of(np.random.default_rng(i).integers(256, size=(8, 8))) for i in range(6)]
    augment = partial(data.Pixels, 8, 1, augmented=True, shift=2, flip=True, least_area=0.5)
    whole = torch.stack(augment()(batch_of(*pictures))["pixel_values"])
    alone = augment()({"image": [pictures[4]], "label": [0], "row": [4]})["pixel_values"][0]
    assert torch.equal(whole[4], alone)
    for other in (augment(seed=1), augment(epoch=1)):
        assert not torch.equal(whole, torch.stack(other(batch_of(*pictures))["pixel_values"]))


def test_flips_are_mirrored_pictures():
    picture = picture_of(np.arange(16).reshape(4, 4))
    plain = data.Pixels(4, 1)(batch_of(picture))["pixel_values"][0]
    made = data.Pixels(4, 1, augmented=True, flip=True)(batch_of(*[picture] * 40))["pixel_values"]
    flipped = [torch.equal(values, plain.flip(-1)) for values in made]
    assert all(torch.equal(values, plain) != mirrored for values, mirrored in zip(made, flipped, strict=True))
    assert 8 < sum(flipped) < 32


def test_random_parts_lie_in_the_picture():
    picture, random = Pictures.new("L", (30, 20)), np.random.default_rng(0)
    for _ in range(200):
        left, top, right, bottom = data._random_part(picture, 0.25, random)
        assert 0 <= left < right <= 30 + 1e-9
        assert 0 <= top < bottom <= 20 + 1e-9
        # A stretched part may be wider than the picture, and is cut there.
        assert (right - left) * (bottom - top) >= 0.25 * 600 * (1 if right - left < 30 and bottom - top < 20 else 0.5)


@pytest.fixture
def colour_folder(tmp_path):
    """A data set as the Hub has them: colour pictures, other names of columns, classes as text, no validation."""
    random = np.random.default_rng(0)
    pictures = [picture_of(random.integers(256, size=(10, 12, 3))) for _ in range(20)]
    rows = {"img": pictures, "kind": ["cat", "dog"] * 10, "note": ["x"] * 20}
    folder = tmp_path / "pets"
    (folder / "data").mkdir(parents=True)
    Dataset.from_dict(rows).cast_column("img", Image()).to_parquet(folder / "data" / "train-00000.parquet")
    return folder


def test_a_data_set_in_the_form_of_the_hubs(colour_folder):
    splits = data.load_hub_images(str(colour_folder), None, "img", "kind", 0.2)
    assert {split: len(rows) for split, rows in splits.items()} == {"train": 16, "validation": 4}
    assert splits["train"].features["label"] == ClassLabel(names=["cat", "dog"])
    assert set(splits["train"].column_names) == {"image", "label", "row"}
    for rows in splits.values():
        assert rows["label"][:] == [row % 2 for row in rows["row"]]


@pytest.mark.parametrize(
    ("image", "label", "message"),
    [
        ("image", "kind", "--image_column image is not a column of .*pets, which has: img, kind, note"),
        ("img", "label", "--label_column label is not a column of .*pets, which has: img, kind, note"),
        ("note", "kind", "--image_column note of .*pets holds .*string.*, no images"),
    ],
)
def test_wrong_columns(colour_folder, image, label, message):
    with pytest.raises(InputError, match=message):
        data.load_hub_images(str(colour_folder), None, image, label, 0.2)


def test_without_a_train_split(colour_folder):
    source = colour_folder / "data" / "train-00000.parquet"
    source.rename(source.with_name("test-00000.parquet"))
    with pytest.raises(InputError, match="has no split 'train'; it has: test"):
        data.load_hub_images(str(colour_folder), None, "img", "kind", 0.2)


# ResMLP


def reference_logits(model, pixels):
    """ResMLP as its paper writes it (equations 1 to 3), in float64."""
    weights = {name: value.detach().double() for name, value in model.state_dict().items()}

    def affine(name, hidden):
        return weights[f"resmlp.{name}.weight"] * hidden + weights[f"resmlp.{name}.bias"]

    def linear(name, hidden):
        return torch.einsum("...i,oi->...o", hidden, weights[f"{name}.weight"]) + weights[f"{name}.bias"]

    B, side = len(pixels), 4
    patches = pixels.double().reshape(B, 1, side, 2, side, 2).permute(0, 2, 4, 1, 3, 5).reshape(B, side * side, 4)
    kernel = weights["resmlp.patches.weight"].reshape(-1, 4)
    hidden = patches @ kernel.T + weights["resmlp.patches.bias"]
    for i in range(model.config.num_hidden_layers):
        inner = affine(f"layers.{i}.affine_before_patches", hidden)
        mixed = torch.einsum("qp,bpc->bqc", weights[f"resmlp.layers.{i}.cross_patch.weight"], inner)
        mixed = mixed + weights[f"resmlp.layers.{i}.cross_patch.bias"][:, None]
        hidden = hidden + affine(f"layers.{i}.affine_after_patches", mixed)
        inner = linear(f"resmlp.layers.{i}.fc1", affine(f"layers.{i}.affine_before_mlp", hidden))
        inner = inner * 0.5 * (1 + torch.erf(inner / 2**0.5))
        hidden = hidden + affine(f"layers.{i}.affine_after_mlp", linear(f"resmlp.layers.{i}.fc2", inner))
    return linear("classifier", affine("affine", hidden).mean(dim=1))


def test_resmlp_is_the_papers(resmlp):
    pixels, labels = torch.randn(5, 1, 8, 8), torch.tensor([0, 1, 2, 2, 0])
    output = resmlp(pixel_values=pixels, labels=labels)
    expected = reference_logits(resmlp, pixels)
    torch.testing.assert_close(output.logits.double(), expected, atol=1e-5, rtol=1e-5)
    loss = -expected.log_softmax(-1)[torch.arange(5), labels].mean()
    torch.testing.assert_close(output.loss.double(), loss, atol=1e-5, rtol=1e-5)


def test_resmlp_begins_as_the_paper_says():
    config = ResMLPConfig(image_size=8, patch_size=2, num_channels=1, hidden_size=32, layer_scale_init=0.01)
    weights = AutoModelForImageClassification.from_config(config).state_dict()
    for name, value in weights.items():
        if name.endswith("bias"):
            assert not value.any(), name
        elif "affine" in name:
            assert torch.equal(value, torch.full_like(value, 0.01 if "after" in name else 1.0)), name
        else:
            assert 0.015 < value.std() < 0.025, name


def test_resmlp_refuses_other_sizes(resmlp):
    with pytest.raises(ValueError, match="patch_size 3 does not divide image_size 8"):
        ResMLPConfig(image_size=8, patch_size=3)
    with pytest.raises(ValueError, match=r"images of \(6, 8\) pixels; the model takes 8 by 8"):
        resmlp(torch.zeros(1, 1, 6, 8))


def test_resmlp_recomputes_under_gradient_checkpointing(resmlp):
    pixels, labels = torch.randn(4, 1, 8, 8), torch.tensor([0, 1, 2, 1])
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            resmlp.activation_checkpointing_enable({"use_reentrant": False})
        resmlp.zero_grad()
        resmlp(pixels, labels).loss.backward()
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in resmlp.parameters()]))
    torch.testing.assert_close(gradients[0], gradients[1], atol=1e-7, rtol=1e-6)


def test_resmlp_routes_its_sublayers_and_not_its_ends(resmlp):
    routing = route_parameters(resmlp)
    matrices = [f"resmlp.layers.{i}.{name}.weight" for i in range(2) for name in ("cross_patch", "fc1", "fc2")]
    assert [route.name for route in routing.to("schatten_p")] == matrices
    reasons = {route.name: route.reason for route in routing.to("adamw")}
    assert reasons["classifier.weight"] == "outside the backbone (task head)"
    assert reasons["resmlp.patches.weight"].startswith("convolution before or between the layers")


def test_inputs_across_patches_are_sampled_by_channel(resmlp):
    """The layer over the patches sees a row for each image and channel, with an entry for each patch."""
    layer = resmlp.resmlp.layers[0]
    probe = Probe(resmlp, {"across.weight": layer.cross_patch, "fc1.weight": layer.fc1}, 1000)
    probe.arm(True)
    pixels = torch.randn(3, 1, 8, 8)
    resmlp(pixels, torch.tensor([0, 1, 2])).loss.backward()
    samples = probe.take()
    tokens = layer.affine_before_patches(resmlp.resmlp.patches(pixels).flatten(2).mT).detach()  # (3, 16, 12)
    expected = torch.stack([tokens[image, :, channel] for image in range(3) for channel in range(12)])
    torch.testing.assert_close(samples["across.weight"], expected, atol=1e-6, rtol=1e-6)
    assert samples["fc1.weight"].shape == (3 * 16, 12)
    probe.remove()


# Metric


def test_the_metric_counts_right_predictions():
    accuracy = load_metric("accuracy")
    random = np.random.default_rng(0)
    for count in (1, 7, 100):
        predictions, references = random.integers(4, size=(2, count))
        found = accuracy.compute(predictions=predictions, references=references)
        assert found == {"accuracy": pytest.approx(accuracy_score(references, predictions), abs=1e-12, rel=1e-12)}


# Whole runs


@pytest.mark.parametrize("model", ["vit", "resmlp"])
def test_a_run_learns_and_writes_model_and_card(model, tmp_path, capsys):
    out = tmp_path / "out"
    metrics = run(out, "--model_type", model, "--max_steps", "16", "--save_strategy", "no", "--eval_strategy", "no")
    assert metrics["train_loss"] < metrics["eval_start_loss"]
    assert 0 <= metrics["eval_accuracy"] <= 1
    table = [line.split() for line in capsys.readouterr().out.splitlines()[-3:]]
    assert [line[0] for line in table] == ["validation", "loss", "accuracy"]
    assert table[2][2] == f"{metrics['eval_accuracy']:.4g}"

    card = ModelCard.load(out / "README.md")
    for text in (
        "parameters for scikit-learn's handwritten digits\n",
        "(layers 1, width 16, images 8, patches 2). Trained from scratch for 16 steps of 8 images, 128 in all",
        "32 to train on, 40 to evaluate on.",
        "Training images are augmented: shifts by up to 1 pixel.",
        f"| accuracy | {metrics['eval_start_accuracy']:.4g} | {metrics['eval_accuracy']:.4g} |",
        "python recipes/image_classification/image_classification.py --hidden_size 16",
        "## Optimizer: Schatten-p",
    ):
        assert text in card.text, text
    assert card.data.pipeline_tag == "image-classification"

    loaded = AutoModelForImageClassification.from_pretrained(out)
    assert loaded.config.id2label[7] == "7"
    assert (out / "resmlp.py").is_file() == (model == "resmlp")


def test_a_saved_resmlp_loads_with_its_own_code(resmlp, tmp_path):
    resmlp.save_pretrained(tmp_path)
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path, trust_remote_code=True)
    pixels = torch.randn(2, 1, 8, 8)
    assert torch.equal(loaded(pixels).logits, resmlp.eval()(pixels).logits)


def test_a_resumed_run_is_the_run_itself(tmp_path, monkeypatch):
    """With an augmentation, over the end of an epoch of four steps."""
    seen, augment = [], data.Pixels._augment
    monkeypatch.setattr(data.Pixels, "_augment", lambda self, *args: seen.append(self.epoch) or augment(self, *args))
    flags = ["--model_type", "resmlp", "--max_steps", "7", "--do_eval", "false"]
    run(tmp_path / "whole", *flags, "--save_steps", "3")
    assert seen[:32] == [0] * 32
    assert set(seen[32:]) == {1}
    run(tmp_path / "rest", *flags, "--resume_from_checkpoint", str(tmp_path / "whole" / "checkpoint-3"))
    whole, rest = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "rest"))
    assert all(torch.equal(rest[name], value) for name, value in whole.items())
    losses = [
        {entry["step"]: entry["loss"] for entry in state["log_history"] if "loss" in entry}
        for state in (json.loads((tmp_path / name / "trainer_state.json").read_text()) for name in ("whole", "rest"))
    ]
    assert losses[0] == losses[1]
    assert len(losses[0]) == 7


def test_colour_images_and_weights_to_continue_from(colour_folder, tmp_path):
    base = ["--image_size", "8", "--num_channels", "3", "--random_crop_area", "0.5", "--random_flip"]
    columns = ["--dataset_name", str(colour_folder), "--image_column", "img", "--label_column", "kind"]
    flags = [*columns, "--max_steps", "2", "--save_strategy", "no"]
    run(tmp_path / "first", *base, *flags, "--config_overrides", "hidden_act=relu")
    metrics = run(tmp_path / "second", *flags, "--model_name_or_path", str(tmp_path / "first"))
    assert metrics["eval_start_loss"] == pytest.approx(
        json.loads((tmp_path / "first" / "eval_results.json").read_text())["eval_loss"], abs=1e-6, rel=1e-6
    )
    assert AutoModelForImageClassification.from_pretrained(tmp_path / "second").config.hidden_act == "relu"
    text = ModelCard.load(tmp_path / "second" / "README.md").text
    assert "`pets`, 2 classes: 16 to train on, 4 to evaluate on." in text
    assert "Trained further from `first`" in text
