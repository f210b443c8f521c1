"""The runner behind every launcher, in processes of its own: python, accelerate, torchrun, and trl's script."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from scripts import materials
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

from hf_schatten import load_learned_p

RUNNER = ["-m", "hf_schatten.run"]
SCRIPT = str(materials.SCRIPTS / "language_modeling.py")
# One thread each, or sums are rounded otherwise.
ACCELERATE = ["-m", "accelerate.commands.launch", "--mixed_precision", "no", "--dynamo_backend", "no"]
ACCELERATE += ["--num_machines", "1", "--num_cpu_threads_per_process", "1"]
TORCHRUN = ["-m", "torch.distributed.run", "--standalone"]
END = f"checkpoint-{materials.STEPS}"


@pytest.fixture
def options(tmp_path):
    return materials.TRAINING | materials.SCHATTEN | materials.language_modeling(tmp_path)


def launch(folder, *command, check=True, cpu="true"):
    """Run Python with these arguments, and return what it has printed."""
    environment = os.environ | {"ACCELERATE_USE_CPU": cpu, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [sys.executable, *map(str, command)], capture_output=True, text=True, check=False, cwd=folder, env=environment
    )
    assert result.returncode == 0 or not check, result.stderr
    assert "hf_schatten.run: warning" not in result.stderr
    return result


def estimates(output):
    """Return the entries that have logged p, after checking that they are due and that the checkpoint agrees."""
    log = json.loads((output / END / "trainer_state.json").read_text())["log_history"]
    found = [entry for entry in log if "schatten_p_median" in entry]
    assert [entry["step"] for entry in found] == materials.DUE
    p = {name.removeprefix("schatten_p/"): p for name, p in found[-1].items() if name.startswith("schatten_p/")}
    assert {name.replace(".weight", ""): value for name, value in load_learned_p(output / END).items()} == p
    assert len(p) == 12
    assert len(set(p.values())) > 6
    return found


def ranks(result):
    """Return what the processes say of themselves; two that print at once may share a line."""
    return sorted(re.findall(r"process \d+ of \d+", result.stdout))


def assert_same_end(first, second):
    weights = load_file(first / END / "model.safetensors")
    for name, value in load_file(second / END / "model.safetensors").items():
        assert torch.equal(value, weights[name]), name
    for found, expected in zip(estimates(first), estimates(second), strict=True):
        assert expected.keys() == found.keys()
        for name in expected.keys() - {"num_tokens"}:  # which trl counts from the resume
            assert found[name] == expected[name], name


def test_python_takes_the_arguments_of_a_json_file(options, tmp_path):
    values = {name.removeprefix("--"): True if value is None else value for name, value in options.items()}
    values |= {"output_dir": tmp_path / "run", "disable_tqdm": True}
    (tmp_path / "arguments.json").write_text(json.dumps(values, default=str))
    result = launch(tmp_path, *RUNNER, SCRIPT, "arguments.json")
    assert ranks(result) == ["process 0 of 1"]
    estimates(tmp_path / "run")


@pytest.mark.slow
def test_accelerate_with_one_process_trains_as_python_does(options, tmp_path):
    command = [*RUNNER, SCRIPT, *materials.flags(options)]
    launch(tmp_path, *command, "--output_dir", "python")
    result = launch(tmp_path, *ACCELERATE, "--num_processes", "1", *command, "--output_dir", "accelerate")
    assert ranks(result) == ["process 0 of 1"]
    assert_same_end(tmp_path / "accelerate", tmp_path / "python")


def test_torchrun_with_two_processes_trains_on_both(options, tmp_path):
    command = [*RUNNER, SCRIPT, *materials.flags(options, {"--output_dir": "run"})]
    result = launch(tmp_path, *TORCHRUN, "--nproc_per_node", "2", *command)
    assert ranks(result) == ["process 0 of 2", "process 1 of 2"]
    assert estimates(tmp_path / "run")[0]["epoch"] == pytest.approx(2 / 5, rel=1e-6, abs=0)  # 35 sequences, 8 a step


@pytest.mark.slow
def test_accelerate_with_two_processes_trains_as_torchrun_does_and_resumes_exactly(options, tmp_path):
    command = [*RUNNER, SCRIPT, *materials.flags(options)]
    torchrun = [*TORCHRUN, "--nproc_per_node", "2", *command]
    accelerate = [*ACCELERATE, "--multi_gpu", "--num_processes", "2", *command]
    launch(tmp_path, *torchrun, "--output_dir", "torchrun")
    result = launch(tmp_path, *accelerate, "--output_dir", "accelerate")
    assert ranks(result) == ["process 0 of 2", "process 1 of 2"]
    assert_same_end(tmp_path / "accelerate", tmp_path / "torchrun")
    middle = f"accelerate/checkpoint-{materials.MIDDLE}"
    result = launch(tmp_path, *accelerate, "--output_dir", "resumed", "--resume_from_checkpoint", middle)
    assert ranks(result) == ["process 0 of 2", "process 1 of 2"]
    assert not (tmp_path / "resumed" / f"checkpoint-{materials.MIDDLE}").exists()
    assert_same_end(tmp_path / "resumed", tmp_path / "accelerate")


@pytest.mark.slow
def test_the_script_of_trl_runs_as_a_module_and_resumes_exactly(options, tmp_path):
    pytest.importorskip("trl")
    torch.manual_seed(0)
    folder = options["--config_name"]
    GPT2LMHeadModel(GPT2Config.from_pretrained(folder)).save_pretrained(tmp_path / "model")
    AutoTokenizer.from_pretrained(folder).save_pretrained(tmp_path / "model")
    (tmp_path / "data").mkdir()
    rows = [{"text": line} for line in options["--train_file"].read_text().splitlines()]
    (tmp_path / "data" / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    training = {name: value for name, value in materials.TRAINING.items() if name not in ("--do_train", "--do_eval")}
    trl = {"--model_name_or_path": "model", "--dataset_name": "data", "--max_length": 16, "--bf16": "false"}
    command = materials.flags(training, materials.SCHATTEN, trl)
    command = [*RUNNER, "-m", "trl.scripts.sft", *command]
    launch(tmp_path, *command, "--output_dir", "straight")
    middle = f"straight/checkpoint-{materials.MIDDLE}"
    launch(tmp_path, *command, "--output_dir", "resumed", "--resume_from_checkpoint", middle)
    assert not (tmp_path / "resumed" / f"checkpoint-{materials.MIDDLE}").exists()
    assert_same_end(tmp_path / "resumed", tmp_path / "straight")


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
def test_deepspeed_trains_and_resumes_exactly(options, stage, tmp_path, monkeypatch):
    """The script knows nothing of the optimizer, and --deepspeed names a file."""
    pytest.importorskip("deepspeed", reason="the extra deepspeed is not installed")
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    automatic = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
    config = dict.fromkeys((*automatic, "gradient_clipping"), "auto") | {"zero_optimization": {"stage": stage}}
    (tmp_path / "zero.json").write_text(json.dumps(config))
    # Where there is no GPU, Accelerate leaves it to the script to say how many processes DeepSpeed has.
    (tmp_path / "with_deepspeed.py").write_text(
        "import runpy, sys, deepspeed\ndeepspeed.init_distributed('gloo')\ndel sys.argv[0]\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')\n"
    )
    command = [*TORCHRUN, "--nproc_per_node", "2", *RUNNER, "with_deepspeed.py", SCRIPT]
    options = options | {"--deepspeed": "zero.json", "--per_device_train_batch_size": 2}
    result = launch(tmp_path, *command, *materials.flags(options, {"--output_dir": "run"}), cpu="false")
    assert ranks(result) == ["process 0 of 2", "process 1 of 2"]
    assert "schatten_p: 8 tensors" in result.stdout
    found = estimates(tmp_path / "run")
    middle = tmp_path / "run" / f"checkpoint-{materials.MIDDLE}"
    resumed = {"--output_dir": "resumed", "--resume_from_checkpoint": middle}
    launch(tmp_path, *command, *materials.flags(options, resumed), cpu="false")
    again = json.loads((tmp_path / "resumed" / END / "trainer_state.json").read_text())["log_history"]
    for expected, entry in zip(found, [each for each in again if "schatten_p_median" in each], strict=True):
        assert {key: entry[key] for key in expected} == expected
