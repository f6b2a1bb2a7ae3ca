"""The parser: help, names of flags, and errors in the words of the command line."""

import argparse
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from nni_plugin.cli import main
from nni_plugin.cli import main as entry
from nni_plugin.cli.arguments import above, count_or_fraction, device_name, integers, names, number
from nni_plugin.cli.main import COMMANDS, _as_flags, _readable, build_parser

COMMON = {"--config", "--print_config", "--seed", "--device", "--output"}
PROMISED = {
    "prune": {
        "--model", "--library", "--checkpoint", "--dataset", "--data-dir", "--method", "--macs", "--params",
        "--channels", "--schedule", "--epochs", "--pretrain-epochs", "--resume",
    },
    "compare": {
        "--model", "--library", "--dataset", "--methods", "--macs", "--params", "--latency", "--seeds", "--processes",
        "--epochs", "--pretrain-epochs", "--resume",
    },
    "correlate": {"--model", "--library", "--checkpoint", "--dataset", "--data-dir", "--methods", "--resume"},
    "coverage": {"--models", "--library", "--all", "--macs", "--seconds", "--workers", "--resume"},
    "layers": {"--model", "--library", "--checkpoint", "--dataset", "--data-dir", "--criteria", "--resume"},
    "experiment": {"--model", "--dataset", "--macs", "--search-space", "--max-trials", "--tuner", "--training-service"},
    "measure": {"--model", "--library", "--batch-size"},
    "export": {"--format"},
}  # fmt: skip
# The flags that timm's train.py has for the same things.
OF_TIMM = {
    "--model", "--pretrained", "--model-kwargs", "--dataset", "--data-dir", "--num-classes", "--in-chans", "--img-size",
    "--batch-size", "--workers", "--opt", "--momentum", "--weight-decay", "--clip-grad", "--sched", "--lr", "--epochs",
    "--warmup-epochs", "--smoothing", "--mixup", "--model-ema", "--model-ema-decay", "--amp", "--amp-dtype",
    "--channels-last", "--seed", "--output",
}  # fmt: skip


@pytest.mark.parametrize("name", COMMANDS)
def test_help(command, name):
    said = command(name, "--help")
    assert said.code == 0
    assert said.err == ""
    missing = {flag for flag in COMMON | PROMISED[name] if flag not in said.out}
    assert not missing
    assert " 0x" not in said.out  # the address of a function, another one each time
    assert "<" not in said.out
    assert said.out == command(name, "--help").out


def test_help_of_all(command):
    said = command("--help")
    assert said.code == 0
    assert all(name in said.out for name in COMMANDS)


def test_names_of_timm(command):
    text = command("prune", "--help").out
    assert not {flag for flag in OF_TIMM if f"{flag} " not in text and f"{flag}\n" not in text}


def test_every_flag_says_what_it_is():
    for module in COMMANDS.values():
        parser = argparse.ArgumentParser()
        module.add_arguments(parser)
        for action in parser._actions:
            assert action.help, action.option_strings
            assert action.dest == "help" or all(
                option == option.lower() and "_" not in option for option in action.option_strings
            )


def test_parser_is_there_for_the_documentation():
    parsed = build_parser().parse_args(["prune", "--model", "m", "--output", "o", "--ignore", "a,b"])
    assert parsed.prune.ignore == ("a", "b")
    assert parsed.prune.output == Path("o")


def test_defaults_in_the_help_are_the_ones_taken(command):
    text = " ".join(command("prune", "--help").out.split())
    defaults = build_parser().parse_args(["prune", "--model", "m", "--output", "o"]).prune
    for flag in ("lr", "weight_decay", "batch_size", "epochs", "schedule", "latency_batch_sizes"):
        value = defaults[flag]
        shown = ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
        assert shown in text.replace("one- shot", "one-shot")


@pytest.mark.parametrize(
    ("read", "text", "value"),
    [
        (above(0), "0", 0),
        (above(1), 7, 7),
        (above(0, 3), "3", 3),
        (integers, "1,16,256", (1, 16, 256)),
        (integers, [1, 16], (1, 16)),
        (integers, 8, (8,)),
        (names, "conv1, fc", ("conv1", "fc")),
        (names, "", ()),
        (names, ["conv1"], ("conv1",)),
        (number, "5e-4", 5e-4),
        (number, 3, 3.0),
        (count_or_fraction, "223", 223),
        (count_or_fraction, "1.0", 1.0),
        (device_name, "cpu", "cpu"),
    ],
)
def test_readers(read, text, value):
    assert read(text) == value
    assert type(read(text)) is type(value)


@pytest.mark.parametrize(
    ("read", "text"),
    [
        *((above(1), text) for text in ("0", "-1", "1.5", 1.5, "", "x", True, None)),
        (above(0, 3), "4"),
        *((integers, text) for text in ("", "1,,2", "1,0", "1.5", [1, -1], "a")),
        *((number, text) for text in ("", "x", "nan", "inf", float("inf"), None)),
        *((count_or_fraction, text) for text in ("", "half", "nan")),
        *((device_name, text) for text in ("", "meta", "cuda:99", "cpu:x")),
    ],
)
def test_readers_refuse(read, text):
    with pytest.raises(ValueError, match=r"expected|cannot be used") as caught:
        read(text)
    assert isinstance(caught.value, argparse.ArgumentTypeError)  # whose text argparse shows


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("take a smaller batch_size.", "take a smaller --batch-size."),
        ("at least batch_size=12 images (in_chans=3);", "at least --batch-size 12 images (--in-chans 3);"),
        ("timm has it: use library=timm.", "timm has it: use --library timm."),
        ("the folder of data_dir, got num_workers=-1", "the folder of --data-dir, got --workers -1"),
        # Not ours: paths, quoted names, reprs, and words of the language.
        ("'/home/batch_size/data_dir'", "'/home/batch_size/data_dir'"),
        ("with {'in_chans': 3}", "with {'in_chans': 3}"),
        ("Layer 'batch_size' is not there", "Layer 'batch_size' is not there"),
        ("Model(in_chans=3)", "Model(in_chans=3)"),
        ("the model is unchanged", "the model is unchanged"),
        ("my_batch_size and batch_sizes", "my_batch_size and batch_sizes"),
    ],
)
def test_python_names_become_flags(text, expected):
    assert _as_flags(text, ["batch_size", "in_chans", "data_dir", "library", "model"]) == expected


def test_words_of_the_parser_become_flags():
    assert _readable('Parser key "prune.batch_size": no') == "--batch-size: no"
    assert _readable("required: prune.model") == "required: --model"
    assert _readable("required: export.directory") == "required: directory"
    assert _readable("Expected a <class 'dict'>") == "Expected a dict"


def test_warnings_are_one_line_each(command, monkeypatch):
    def run(arguments, line):
        warnings.warn("first line\nsecond line", stacklevel=1)

    monkeypatch.setattr(COMMANDS["export"], "run", run)
    said = command("export", "folder")
    assert said.code == 0
    assert said.err == "nni-plugin: warning: first line second line\n"


def test_interrupted_command_without_resume_promises_none(command, monkeypatch):
    def run(arguments, line):
        raise KeyboardInterrupt

    monkeypatch.setattr(COMMANDS["export"], "run", run)
    said = command("export", "folder")
    assert said.code == 130
    assert said.err == "nni-plugin export: interrupted.\n"


def test_errors_in_the_program_are_not_hidden(monkeypatch):
    def run(arguments, line):
        raise RuntimeError("a mistake of ours")

    monkeypatch.setattr(COMMANDS["export"], "run", run)
    with pytest.raises(RuntimeError, match="a mistake of ours"):
        main(["export", "folder"])


@pytest.mark.parametrize("program", [[str(Path(sys.executable).with_name("nni-plugin"))], ["-m", "nni_plugin"]])
def test_the_command_is_installed(program, tmp_path):
    assert entry is main
    program = [sys.executable, *program] if program[0] == "-m" else program
    done = subprocess.run([*program, "export"], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 2
    last = done.stderr.splitlines()[-1]
    assert last.startswith("nni-plugin export: error: ")
    assert "directory" in last
