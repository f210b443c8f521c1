"""The files of recipes/accelerate_configs: accelerate reads them as meant, and those for a CPU train the recipe."""

from __future__ import annotations

import json
import os
import re
import shlex
import socket
import subprocess
import sys
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin, patch_environment
from accelerate.utils.launch import prepare_multi_gpu_env
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from hf_schatten import load_learned_p

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "recipes" / "accelerate_configs"
FILES = sorted(FOLDER.glob("*.yaml"))
STEPS, DUE = 6, [2, 4, 6]
TRAINING = (
    "--train_file animals.txt --n_layer 1 --n_embd 16 --n_head 2 --vocab_size 270 --block_size 16 --optim schatten_p "
    "--optim_args p=adaptive,p_interval=2,p_first_step=2 --learning_rate 1e-2 "
    f"--max_steps {STEPS} --save_steps {STEPS} "
    "--per_device_train_batch_size 2 --max_train_samples 40 --max_eval_samples 4 --logging_steps 1 --report_to none "
    "--output_dir out --disable_tqdm true --do_eval false --use_cpu"
)


def name_of(path):
    return path.stem


def command_of(path):
    """Return the words of the command that the comment at the head of a file documents."""
    head = path.read_text(encoding="utf-8").partition("compute_environment")[0]
    text = re.search(r"^# (accelerate launch(?:.*\\\n# )*.*)", head, flags=re.MULTILINE)[1]
    return shlex.split(text.replace("\\\n# ", " "))


def parsed(path, *flags):
    """Return what ``accelerate launch`` makes of a file, of its flags and of a script."""
    arguments = launch_command_parser().parse_args(["--config_file", str(path), *flags, "train.py"])
    return _validate_launch_command(arguments)[0]


def needs_deepspeed():
    pytest.importorskip("deepspeed", reason="the extra deepspeed is not installed")


def test_the_files_are_there():
    assert [path.stem for path in FILES] == [
        *("ddp", "ddp_cpu", "fsdp2", "multi_node", "single", "tp", "zero1", "zero2", "zero3"),
    ]


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_accelerate_reads_the_file_without_a_warning(path, caplog):
    config = load_config_from_file(str(path))
    given = yaml.safe_load(path.read_text(encoding="utf-8"))
    for key in given.keys() - {"compute_environment", "distributed_type"}:
        assert getattr(config, key) == given[key] is not None
    for value in (config.mixed_precision, config.distributed_type):
        assert isinstance(value, str)  # YAML's own no is False
    if given["distributed_type"] == "DEEPSPEED":
        needs_deepspeed()
    parsed(path)
    assert caplog.text == ""


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_the_page_has_the_file_and_no_other_command_than_that_of_its_head(path):
    words = command_of(path)
    assert ROOT / words[words.index("--config_file") + 1] == path
    page = (ROOT / "docs" / "distributed.md").read_text(encoding="utf-8")
    assert f"](../{path.relative_to(ROOT).as_posix()})" in page
    commands = [shlex.split(line) for line in page.replace("\\\n", " ").splitlines() if "accelerate launch" in line]
    of_file = [command for command in commands if words[words.index("--config_file") + 1] in command]
    assert path.stem == "multi_node" or all(command == words for command in of_file)


def test_what_accelerate_starts():
    found = {path.stem: parsed(path) for path in FILES if not path.stem.startswith("zero")}
    assert {name: arguments.num_processes for name, arguments in found.items()} == {
        "single": 1,
        "ddp": 8,
        "ddp_cpu": 2,
        "fsdp2": 8,
        "multi_node": 16,
        "tp": 8,
    }
    assert {name for name, arguments in found.items() if arguments.multi_gpu} == {"ddp", "ddp_cpu", "multi_node", "tp"}
    assert {name for name, arguments in found.items() if arguments.use_fsdp} == {"fsdp2"}
    assert not any(arguments.cpu for arguments in found.values())  # which would start one process


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_zero_has_its_stage_and_nothing_elsewhere(stage):
    needs_deepspeed()
    arguments = parsed(FOLDER / f"zero{stage}.yaml")
    assert (arguments.use_deepspeed, arguments.num_processes, arguments.zero_stage) == (True, 8, stage)
    assert (arguments.offload_optimizer_device, arguments.offload_param_device) == ("none", "none")
    assert arguments.zero3_init_flag == (stage == 3)


def test_fsdp2_is_version_2_with_whole_checkpoints():
    environment = prepare_multi_gpu_env(parsed(FOLDER / "fsdp2.yaml"))
    settings = {key: value for key, value in environment.items() if key.startswith("FSDP_")}
    with patch_environment(**settings):
        plugin = FullyShardedDataParallelPlugin()  # refuses and warns of what version 2 does not have
    assert plugin.fsdp_version == 2
    assert plugin.reshard_after_forward is True
    assert plugin.state_dict_type.name == "FULL_STATE_DICT"
    assert plugin.auto_wrap_policy.__name__ == "transformer_auto_wrap_policy"
    assert not plugin.cpu_ram_efficient_loading
    assert environment["ACCELERATE_USE_FSDP"] == "true"


def test_flags_take_the_placeholders_of_several_machines():
    given = load_config_from_file(str(FOLDER / "multi_node.yaml"))
    words = command_of(FOLDER / "multi_node.yaml")
    values = dict(pairwise(words))
    assert (values["--machine_rank"], values["--main_process_ip"]) == ("RANK", "ADDRESS")
    arguments = parsed(FOLDER / "multi_node.yaml", "--machine_rank", "1", "--main_process_ip", "10.0.0.7")
    environment = prepare_multi_gpu_env(arguments)
    assert (arguments.node_rank, arguments.nnodes, arguments.nproc_per_node) == (1, "2", "8")
    assert arguments.rdzv_endpoint == f"10.0.0.7:{given.main_process_port}"
    assert environment["ACCELERATE_MIXED_PRECISION"] == "bf16"
    assert given.distributed_type == DistributedType.MULTI_GPU


# Runs


@pytest.fixture
def folder(tmp_path):
    lines = [f"The {animal} sat on mat {i}." for i in range(60) for animal in ("cat", "dog", "owl")]
    (tmp_path / "animals.txt").write_text("\n\n".join(lines))
    return tmp_path


def start(folder, path, *flags, before=(), after=(), placeholders=None):
    """Start the documented command of a file with a tiny model and a small text; ``before`` precedes the script."""
    words = [(placeholders or {}).get(word, word) for word in command_of(path)]
    script = next(index for index, word in enumerate(words) if word.endswith(".py"))
    words[words.index("--config_file") + 1] = str(path)
    environment = {key: value for key, value in os.environ.items() if key != "ACCELERATE_USE_CPU"}
    environment |= {"HF_HOME": str(folder / "cache"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    environment |= {"PYTHONWARNINGS": "default"}
    command = [sys.executable, "-m", "accelerate.commands.launch", *words[2:script], *flags]
    command += [*before, str(ROOT / words[script])]
    return subprocess.Popen(
        [*command, *TRAINING.split(), *after],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def end(*processes):
    """Wait for launchers that must succeed, and return what they have printed; end the others when one fails."""
    with ExitStack() as stack:
        for process in processes:
            stack.enter_context(process)
            stack.callback(process.terminate)  # does nothing to one that has ended
        outputs = []
        for process in processes:
            outputs.append(process.communicate(timeout=300)[0])
            assert process.returncode == 0, outputs[-1][-4000:]
    return "".join(outputs)


def assert_trained(folder, processes):
    """Check how many processes have trained, each with its random numbers, and that they have estimated p."""
    checkpoint = folder / "out" / f"checkpoint-{STEPS}"
    states = sorted(path.name for path in checkpoint.glob("rng_state*"))
    assert states == ([f"rng_state_{rank}.pth" for rank in range(processes)] if processes > 1 else ["rng_state.pth"])
    card = (folder / "out" / "README.md").read_text(encoding="utf-8")
    assert (f"{processes} processes, each on" in card) == (processes > 1)
    log = json.loads((checkpoint / "trainer_state.json").read_text())["log_history"]
    assert [entry["step"] for entry in log if "schatten_p_median" in entry] == DUE
    learned = load_learned_p(checkpoint)
    assert len(learned) == 6
    assert len(set(learned.values())) > 1


def test_ddp_cpu_trains_on_two_processes(folder):
    output = end(start(folder, FOLDER / "ddp_cpu.yaml"))
    assert_trained(folder, 2)
    assert "were not passed to `accelerate launch`" not in output


@pytest.mark.slow
def test_ddp_trains_on_two_processes(folder):
    end(start(folder, FOLDER / "ddp.yaml", "--num_processes", "2", "--mixed_precision", "no"))
    assert_trained(folder, 2)


@pytest.mark.slow
def test_single_trains_on_one_process(folder):
    output = end(start(folder, FOLDER / "single.yaml"))
    assert_trained(folder, 1)
    assert "were not passed to `accelerate launch`" not in output


@pytest.mark.slow
def test_two_machines_train_together(folder):
    """Two launchers on this machine stand for two machines, with a process each."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    flags = ["--num_processes", "2", "--main_process_port", port, "--mixed_precision", "no"]
    places = ({"RANK": str(rank), "ADDRESS": "127.0.0.1"} for rank in range(2))
    end(*[start(folder, FOLDER / "multi_node.yaml", *flags, placeholders=values) for values in places])
    assert_trained(folder, 2)


# FSDP on a CPU, which accelerate turns into DDP, and says nothing.
WITH_FSDP = f"""
import runpy, sys
sys.path.insert(0, {str(ROOT / "tests" / "distributed")!r})
from test_fsdp2_trainer import allow_fsdp_on_the_cpu
allow_fsdp_on_the_cpu()
del sys.argv[0]
sys.path[0] = {str(ROOT / "recipes" / "pretrain_clm")!r}
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.slow
def test_fsdp2_trains_on_two_processes(folder):
    (folder / "with_fsdp.py").write_text(WITH_FSDP)
    flags = ["--num_processes", "2", "--mixed_precision", "no"]
    end(start(folder, FOLDER / "fsdp2.yaml", *flags, before=[str(folder / "with_fsdp.py")]))
    assert_trained(folder, 2)
    assert list((folder / "out" / f"checkpoint-{STEPS}").glob("pytorch_model_fsdp*"))


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_zero_trains_on_two_processes(folder, stage, monkeypatch):
    needs_deepspeed()
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    end(start(folder, FOLDER / f"zero{stage}.yaml", "--num_processes", "2", "--mixed_precision", "no"))
    assert_trained(folder, 2)
    files = sorted(path.name for path in (folder / "out" / f"checkpoint-{STEPS}" / f"global_step{STEPS}").iterdir())
    assert len([name for name in files if name.endswith("optim_states.pt")]) == 2


# Tensor parallelism on a CPU, which accelerate does not take.
WITH_TP = f"""
import runpy, sys
from accelerate import ParallelismConfig
ParallelismConfig._validate_accelerator = lambda self, accelerator: None
del sys.argv[0]
sys.path[0] = {str(ROOT / "recipes" / "pretrain_clm")!r}
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def save_tokenizer(folder):
    """Save a tokenizer of bytes."""
    characters = {character: number for number, character in enumerate(sorted(ByteLevel.alphabet()))}
    tokenizer = Tokenizer(BPE(characters | {"<|endoftext|>": len(characters)}, []))
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>").save_pretrained(folder)


@pytest.mark.slow
def test_tp_trains_on_two_processes(folder):
    (folder / "with_tp.py").write_text(WITH_TP)
    config = LlamaConfig(
        vocab_size=270,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=16,
    )
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    save_tokenizer(folder / "model")
    words = command_of(FOLDER / "tp.yaml")
    own = words[words.index("--model_name_or_path") :]
    assert own == ["--model_name_or_path", "MODEL", "--tp_plan", "auto", "--save_strategy", "no"]
    flags = ["--num_processes", "2", "--mixed_precision", "no"]
    arguments = ["--model_name_or_path", str(folder / "model"), *own[2:]]
    end(start(folder, FOLDER / "tp.yaml", *flags, before=[str(folder / "with_tp.py")], after=arguments))
    log = json.loads((folder / "out" / "trainer_state.json").read_text())["log_history"]
    assert [entry["step"] for entry in log if "schatten_p_median" in entry] == DUE
